"""Question answering: each published format as a small file, what a broken file says, and scores worked out by hand."""

import csv
import json
import logging

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_models

from d2l_lib.documents import question_ids
from d2l_lib.tasks import qa, scores
from d2l_lib.tasks.questions import world_samples

SQUAD = [  # (id, context, question, answers)
    ("q1", "Mill Town has 311 people.", "How many people?", ["311", "311 people", "311"]),
    ("q2", "Mill Town has 311 people.", "What is it called?", ["Mill Town"]),
    ("q3", " The bridge is old. ", "Who built it?", []),
]
PAPER = {
    "title": "A Title",
    "abstract": "An abstract.",
    "question_answers": [
        ("p1", "Which data?", [{"extractive_spans": ["one", "two"]}, {"free_form_answer": "Two sets."}]),
        ("p2", "Is it fast?", [{"yes_no": True}, {"yes_no": False}]),
        ("p3", "What colour?", [{"unanswerable": True}]),
    ],
}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(value), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, value)), encoding="utf-8")
    else:
        path.write_text(json.dumps(value), encoding="utf-8")
    return path


def squad_original(rows=SQUAD):
    paragraphs = {}
    for id_, context, question, answers in rows:
        listed = [{"text": answer, "answer_start": 3} for answer in answers]
        entry = {"id": id_, "question": question, "answers": listed, "is_impossible": not answers}
        paragraphs.setdefault(context, []).append(entry)
    listed = [{"context": context, "qas": questions} for context, questions in paragraphs.items()]
    return {"version": "v2.0", "data": [{"title": "Mill Town", "paragraphs": listed}]}


def squad_hub(rows=SQUAD):
    return [
        {
            "id": i,
            "title": "Mill Town",
            "context": c,
            "question": q,
            "answers": {"text": a, "answer_start": [3] * len(a)},
        }
        for i, c, q, a in rows
    ]


def annotation(answer):
    empty = {"unanswerable": False, "extractive_spans": [], "yes_no": None, "free_form_answer": "", "evidence": []}
    return empty | answer


def papers_original():
    questions = [
        {"question_id": i, "question": q, "answers": [{"answer": annotation(a), "worker_id": "w"} for a in answers]}
        for i, q, answers in PAPER["question_answers"]
    ]
    sections = [{"section_name": "Intro", "paragraphs": ["First.", "Second."]}]
    return {"1909.0": {"title": PAPER["title"], "abstract": PAPER["abstract"], "full_text": sections, "qas": questions}}


def papers_hub():
    ids, questions, answers = zip(*PAPER["question_answers"], strict=True)
    listed = [{"answer": list(map(annotation, some)), "worker_id": ["w"] * len(some)} for some in answers]
    return [
        {
            "id": "1909.0",
            "title": PAPER["title"],
            "abstract": PAPER["abstract"],
            "full_text": {"section_name": ["Intro"], "paragraphs": [["First.", "Second."]]},
            "qas": {"question_id": list(ids), "question": list(questions), "answers": listed},
        }
    ]


STORY = [  # (section, text); the data have a story with one number twice
    ("1", "A miller had three\r\ngeese.\n\nHe was glad."),
    ("2", "The fox came."),
    ("2", "It was night."),
    ("3", "The miller wept."),
]
TALES = [  # (section, explicit or implicit, question, the first answers of both annotators)
    ("1", "explicit", "How many geese had the miller?", "three", "three geese"),
    ("3", "implicit", "Why did the miller weep?", "The fox ate the geese.", ""),
    ("2, 1", "explicit", "Who came to the miller?", "the fox", "the fox"),
]


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_tale(folder, split="val", name="the-geese", rows=TALES):
    """Both files of a story, with the columns of the data set; returns the file of questions."""
    sections = [{"section": section, "text": text} for section, text in STORY]
    write_csv(folder / "section-stories" / split / f"{name}-story.csv", sections)
    questions = [
        {"question_id": number, "local-or-sum": "local", "cor_section": section, "attribute1": "action"}
        | {
            "attribute2": "",
            "question": question,
            "ex-or-im1": kind,
            "answer1": first,
            "answer2": "other",
            "answer3": "",
        }
        | {"ex-or-im2": kind, "answer4": second, "answer5": "another", "answer6": ""}
        for number, (section, kind, question, first, second) in enumerate(rows, 1)
    ]
    return write_csv(folder / "questions" / split / f"{name}-questions.csv", questions)


def drop_answer(number="", spans=(), **date):
    return {"number": number, "spans": list(spans), "date": {"day": "", "month": "", "year": ""} | date}


# ------------------------------------------------------------------------------------------------------------ formats
def test_squad_original_and_hub_forms_are_equal(tmp_path):
    original = qa.load_qa("squad_v2", write(tmp_path / "dev-v2.0.json", squad_original()))
    parquet = qa.load_qa("squad_v2", write(tmp_path / "validation-00000-of-00001.parquet", squad_hub()))
    lines = qa.load_qa("squad_v2", write(tmp_path / "dev.jsonl", squad_hub()))
    pd.testing.assert_frame_equal(original, parquet)
    pd.testing.assert_frame_equal(original, lines)
    assert tuple(original.columns) == qa.COLUMNS and list(original["id"]) == ["q1", "q2", "q3"]
    assert original["answers"].tolist() == [["311", "311 people"], ["Mill Town"], [""]]
    assert original["kind"].tolist() == ["", "", "unanswerable"] and original.attrs["unusable"] == {}
    assert original["document"][2] == "The bridge is old." and set(original["title"]) == {"Mill Town"}


def test_questions_that_cannot_be_used_are_counted(tmp_path, caplog):
    rows = [*SQUAD, ("q4", " ", "Where?", ["here"]), ("q5", "A text.", "", ["here"])]
    with caplog.at_level(logging.WARNING):
        frame = qa.load_qa("squad", write(tmp_path / "dev.json", squad_original(rows)))
    assert list(frame["id"]) == ["q1", "q2"]
    assert frame.attrs["unusable"] == {"no answer": 1, "no document": 1, "no question": 1}
    assert "3 of 5 questions cannot be used" in caplog.text
    with pytest.raises(ValueError, match=r"none of 1 questions can be used \(no answer: 1\).*public answers"):
        qa.load_qa("squad", write(tmp_path / "test.json", squad_original(SQUAD[2:])))


def test_drop_original_and_hub_forms(tmp_path):
    first = {"query_id": "a", "question": "How many?", "answer": drop_answer("3")}
    second = {"query_id": "b", "question": "Who?", "answer": drop_answer(spans=["Ann", "Bo"])}
    third = {"query_id": "c", "question": "When?", "answer": drop_answer(day="3", month="May", year="1870")}
    validated = [drop_answer("2"), drop_answer("3")]
    section = {"passage": "A game.", "qa_pairs": [first | {"validated_answers": validated}, second, third]}
    original = qa.load_qa("drop", write(tmp_path / "drop_dataset_dev.json", {"nfl_1": section}))
    assert original["answers"].tolist() == [["3", "2"], ["Ann", "Bo"], ["3 May 1870"]]
    assert original["kind"].tolist() == ["number", "span", "date"]
    hub = [
        {"section_id": "nfl_1", "query_id": row.id, "passage": "A game.", "question": row.question}
        | {"answers_spans": {"spans": row.answers, "types": [row.kind] * len(row.answers)}}
        for row in original.itertuples()
    ]
    pd.testing.assert_frame_equal(original, qa.load_qa("drop", write(tmp_path / "validation.parquet", hub)))


def test_ropes_original_and_hub_forms(tmp_path):
    background, situation = "Wood floats.", "Ann has wood and iron."
    answers = [{"text": "wood"}]
    question = {"id": "1", "question": "What floats?", "answers": answers}
    paragraph = {"background": background, "situation": situation, "qas": [question]}
    original = qa.load_qa("ropes", write(tmp_path / "dev-v1.0.json", {"data": [{"paragraphs": [paragraph]}]}))
    flat = {"background": background, "situation": situation} | question | {"answers": {"text": ["wood"]}}
    pd.testing.assert_frame_equal(original, qa.load_qa("ropes", write(tmp_path / "validation.parquet", [flat])))
    assert original["document"][0] == "Wood floats.\nAnn has wood and iron."


def test_fairytales_own_sections_and_the_hubs_form(tmp_path):
    for name in ("the-geese", "a-tale"):
        write_tale(tmp_path / "data-by-train-split", name=name)
    write_tale(tmp_path / "data-by-train-split", "train")
    frame = qa.load_named(f"fairytaleqa={tmp_path}", split="validation")
    assert frame["title"].tolist() == ["a-tale"] * 3 + ["the-geese"] * 3
    assert frame["document"].tolist()[:3] == [
        "A miller had three geese.\n\nHe was glad.",
        "The miller wept.",
        "A miller had three geese.\n\nHe was glad.\n\nThe fox came.\n\nIt was night.",
    ], "a question's own sections in the story's order; printed line ends are spaces"
    assert frame["answers"].tolist()[3:] == [["three", "three geese"], ["The fox ate the geese."], ["the fox"]]
    assert frame["kind"].tolist() == ["explicit", "implicit", "explicit"] * 2 and frame["id"].is_unique
    scored = qa.score(frame.assign(prediction=[answers[-1] for answers in frame["answers"]]))
    assert scored["score"].tolist() == [1] * 6 and set(scored["metric"]) == {"rouge_l"}
    hub = [
        {"story_name": row.title, "story_section": row.document, "question": row.question, "answer1": row.answers[0]}
        | {"answer2": row.answers[-1], "local-or-sum": "local", "attribute": "action", "ex-or-im": row.kind}
        for row in frame.itertuples()
    ]
    in_hubs_form = [
        write(tmp_path / "hub" / "plain_text" / "validation" / "0000.parquet", hub),
        write_csv(tmp_path / "files" / "valid.csv", hub),
    ]
    for file in in_hubs_form:
        for place in (file, tmp_path / file.relative_to(tmp_path).parts[0]):
            pd.testing.assert_frame_equal(frame, qa.load_qa("fairytaleqa", place, split="validation"))
    own = tmp_path / "data-by-train-split" / "questions" / "train"
    assert len(qa.load_qa("fairytaleqa", own, split="train")) == 3
    assert len(qa.load_qa("fairytaleqa", own / "the-geese-questions.csv")) == 3
    assert [row["question"] for row in qa.stream_qa("fairytaleqa", own, split="train")] == [row[2] for row in TALES]


def test_a_broken_fairytale_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no questions of fairytaleqa, split test \(it has .*questions/val\)"):
        write_tale(tmp_path)
        qa.load_qa("fairytaleqa", tmp_path)
    with pytest.raises(ValueError, match="several folders for fairytaleqa, split validation"):
        write_tale(tmp_path / "copy")
        qa.load_qa("fairytaleqa", tmp_path, split="validation")
    file = write_tale(tmp_path / "one", rows=[*TALES, ("1, 7", "explicit", "Who?", "a miller", "")])
    with pytest.raises(ValueError, match="record 4, column 'cor_section' names section '7'; .* has 1, 2, 3: are both"):
        qa.load_qa("fairytaleqa", file)
    lines = file.read_text(encoding="utf-8").splitlines()
    for changed, message in (
        ("\n".join(lines[:2]) + "\n2,local,1", "record 2 has not as many cells as columns"),
        ("\n".join(lines[:2]) + ",more", "record 1 has not as many cells as columns"),
        ("\n".join(lines[:2]) + '\n2,"local', "is not a complete CSV file"),
        (lines[0].replace("answer1", "answer"), "it holds no questions"),
        ("\n".join(lines).replace("answer1", "answer"), "record 1 has no column 'answer1', only question_id"),
    ):
        file.write_text(changed, encoding="utf-8")
        with pytest.raises(ValueError, match=message) as raised:
            qa.load_qa("fairytaleqa", file)
        assert str(file) in str(raised.value)
    file.write_bytes(b"question\n\xff\xfe\n")
    with pytest.raises(ValueError, match="is not a complete CSV file"):
        qa.load_qa("fairytaleqa", file)
    story = tmp_path / "one" / "section-stories" / "val" / "the-geese-story.csv"
    story.unlink()
    with pytest.raises(FileNotFoundError, match="the-geese-story.csv does not exist: .*the-geese-questions.csv needs"):
        qa.load_qa("fairytaleqa", file)


def test_qasper_papers_original_and_hub_forms(tmp_path):
    original = qa.load_qa("qasper_papers", write(tmp_path / "qasper-dev-v0.3.json", papers_original()))
    hub = qa.load_qa("qasper_papers", write(tmp_path / "qasper" / "validation" / "0000.parquet", papers_hub()))
    pd.testing.assert_frame_equal(original, hub)
    assert original["document"][0] == "A Title\n\nAn abstract.\n\nIntro\n\nFirst.\n\nSecond."
    assert original["answers"].tolist() == [["one, two", "Two sets."], ["yes", "no"], ["unanswerable"]]
    assert original["kind"].tolist() == ["extractive", "yes_no", "unanswerable"]


@pytest.mark.parametrize("name", ["qasper", "2wikimqa", "multifieldqa_en"])
@pytest.mark.parametrize("file", ["data/{}.jsonl", "{}/test-00000-of-00001.parquet"])
def test_longbench_files_are_found_by_their_config(tmp_path, name, file):
    for other in ("qasper_e", "2wikimqa_e", "multifieldqa_en_e", "qasper"):
        record = {"input": f"{other}?", "context": "A long text.", "answers": ["yes", "yes"], "length": 3}
        record |= {"dataset": other, "language": "en", "all_classes": None, "_id": "0a"}
        write(tmp_path / file.format(other), [record])
    frame = qa.load_qa(name, tmp_path)
    assert frame.to_dict("records") == [
        {"dataset": name, "id": "0a", "document": "A long text.", "question": f"{name}_e?", "answers": ["yes"]}
        | {"kind": "", "title": ""}
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_pwc_lines(tmp_path, suffix):
    lines = [{"input": "A text.", "prompt": f"Do {i}.", "answer": f"Done {i}."} for i in range(3)]
    path = tmp_path / f"PwC_test{suffix}"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    write(tmp_path / "PwC_train.jsonl", lines[:1])
    frame = qa.load_qa("pwc", tmp_path)
    assert frame["id"].tolist() == ["1", "2", "3"] and frame["answers"].tolist()[2] == ["Done 2."]
    assert len(qa.load_qa("pwc", tmp_path, split="train")) == 1


def test_the_hub_form_of_the_datasets_library(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(qa, "project_root", lambda: tmp_path)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: (asked.append((a, k)), datasets.Dataset.from_list(papers_hub()))[1]
    )
    frame = qa.load_qa("qasper_papers", split="test")
    assert asked == [(("allenai/qasper", None), {"split": "test", "revision": "refs/convert/parquet"})]
    assert frame["answers"].tolist()[0] == ["one, two", "Two sets."]


def test_without_the_hub_the_error_says_what_to_get_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr(qa, "project_root", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"rajpurkar/squad, config plain_text, split validation.*data/qa/squad"):
        qa.load_qa("squad")


def test_the_project_folder_is_read_first(tmp_path, monkeypatch):
    monkeypatch.setattr(qa, "project_root", lambda: tmp_path)
    write(tmp_path / "data" / "qa" / "squad" / "dev-v1.1.json", squad_original(SQUAD[:2]))
    assert len(qa.load_qa("squad")) == 2


# ------------------------------------------------------------------------------------------- choosing files and rows
def test_shards_are_joined_in_order_and_must_be_complete(tmp_path):
    folder = tmp_path / "plain_text"
    for shard in (1, 0):
        write(folder / f"validation-0000{shard}-of-00002.parquet", squad_hub(SQUAD[shard : shard + 1]))
    write(folder / "train-00000-of-00001.parquet", squad_hub(SQUAD[:1]))
    assert qa.load_qa("squad", tmp_path)["id"].tolist() == ["q1", "q2"]
    (folder / "validation-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="only some of its shards"):
        qa.load_qa("squad", tmp_path)


def test_a_folder_that_fits_twice_or_not_is_refused(tmp_path):
    write(tmp_path / "dev-v1.1.json", squad_original(SQUAD[:2]))
    write(tmp_path / "dev-v2.0.json", squad_original())
    with pytest.raises(ValueError, match=r"several files.*dev-v1.1.json, dev-v2.0.json.*pass one file"):
        qa.load_qa("squad", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file of squad, split train \(it has dev-v1.1.json"):
        qa.load_qa("squad", tmp_path, split="train")
    with pytest.raises(FileNotFoundError, match="does not exist: pass the file or folder"):
        qa.load_qa("squad", tmp_path / "elsewhere")


def test_drawing_is_fixed_by_the_seed_and_keeps_the_order(tmp_path, caplog):
    rows = [(f"{i:02d}", f"Text {i // 3}.", f"Question {i}?", ["a"] if i else []) for i in range(30)]
    path = write(tmp_path / "dev.jsonl", squad_hub(rows))
    some = qa.load_qa("squad", path, n=10, seed=1)
    assert list(some["id"]) == sorted(some["id"]) and len(some) == 10 and list(some.index) == list(range(10))
    assert some.equals(qa.load_qa("squad", path, n=10, seed=1)) and some.attrs["unusable"] == {"no answer": 1}
    assert list(some["id"]) != list(qa.load_qa("squad", path, n=10, seed=2)["id"])
    assert len(qa.load_qa("squad", path, n=1000)) == 29


def test_the_instruction_goes_around_the_question(tmp_path):
    path = write(tmp_path / "dev.json", squad_original([("q", "A text.", "Why {so}?", ["a"])]))
    assert qa.load_qa("squad", path)["question"][0] == "Why {so}?"
    frame = qa.load_qa("squad", path, template=qa.DATASETS["squad"].template)
    assert frame["question"][0] == qa.ANSWER_ONLY.removesuffix("{question}") + "Why {so}?"
    assert all("{question}" in dataset.template for dataset in qa.DATASETS.values())
    assert {dataset.metric for dataset in qa.DATASETS.values()} <= set(qa.METRICS)


def test_world_samples_in_the_same_form():
    frame = qa.load_qa("world", n=9, seed=3, split="validation")
    samples = world_samples(9, 3, split="validation")
    assert tuple(frame.columns) == qa.COLUMNS and frame["id"].is_unique
    assert frame["document"].equals(samples["document"]) and frame["kind"].equals(samples["kind"])
    assert [answers[0] for answers in frame["answers"]] == list(samples["answer"])
    with pytest.raises(ValueError, match="pass n"):
        qa.load_qa("world")
    with pytest.raises(ValueError, match="no split 'dev'; choose one of train, validation, test"):
        qa.load_qa("world", n=1, split="dev")


# ------------------------------------------------------------------------------------------------------- broken input
BROKEN = {
    "not JSON": ("squad", "dev.json", '{"data": [', "dev.json is not a complete JSON file"),
    "cut line": ("pwc", "test.jsonl", '{"input": "a", "prom', "line 1 is not JSON"),
    "second line cut": ("pwc", "test.json", '{"input": "a", "prompt": "b", "answer": "c"}\n{"in', "line 2 is not JSON"),
    "no records": ("squad", "dev.json", '{"data": []}', "it holds no questions"),
    "an empty file": ("pwc", "test.jsonl", "", "it holds no questions"),
    "no list": ("squad", "dev.json", '"text"', "holds str and no list of records"),
    "a list of texts": ("squad", "dev.json", '["text"]', "record 1 is str, not an object"),
    "another format": (
        "squad",
        "dev.json",
        '[{"input": "a", "answers": []}]',
        "record 1 has no column 'context', only input, answers",
    ),
    "wrong suffix": ("squad", "dev.csv", "a,b", "cannot be read: pass a folder, or a file that ends in .parquet"),
    "not parquet": ("squad", "dev.parquet", "PAR1", "is not a complete parquet file"),
    "number for text": (
        "pwc",
        "test.jsonl",
        '{"input": 3, "prompt": "b", "answer": "c"}',
        "column 'input' is int, not",
    ),
    "text for list": (
        "qasper",
        "a.jsonl",
        '{"_id": "1", "input": "a", "context": "b", "answers": "c"}',
        "record 1, column 'answers' is not a list of texts",
    ),
    "ragged": (
        "drop",
        "dev.jsonl",
        '{"query_id": "1", "passage": "a", "question": "b", "answers_spans": {"spans": ["c"], "types": []}}',
        r"record 1, column 'answers_spans' is ragged \(1 spans, 0 types\)",
    ),
    "a date that is text": (
        "drop",
        "dev.jsonl",
        '{"query_id": "1", "passage": "a", "question": "b", "answer": {"spans": [], "number": "", "date": "May"}}',
        "no column 'day', only str",
    ),
    "nested": (
        "squad",
        "dev.json",
        '{"data": [{"paragraphs": [{"context": "a", "qas": []}, {"context": "b", "qas": [{"id": "1", "answers": []}]}'
        "]}]}",
        "record 1, paragraphs 2, qas 1 has no column 'question', only context, id, answers",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_with_record_and_column(tmp_path, case):
    name, file, content, message = BROKEN[case]
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as raised:
        qa.load_qa(name, tmp_path / file)
    assert str(tmp_path / file) in str(raised.value)


def test_wrong_arguments_say_what_is_known():
    with pytest.raises(ValueError, match="unknown data set 'sqaud'; choose one of squad, squad_v2, drop"):
        qa.load_qa("sqaud")
    with pytest.raises(ValueError, match="n is 0"):
        qa.load_qa("world", n=0)
    with pytest.raises(ValueError, match="has no place for the question"):
        qa.load_qa("world", n=1, template="Answer: {input}")


# ---------------------------------------------------------------------------------------------------------- documents
def test_documents_keep_their_order_and_rows():
    frame = pd.DataFrame({"dataset": list("aaab"), "document": ["y", "x", "y", "x"], "question": list("1234")})
    groups = qa.group_by_document(frame)
    assert [(document, list(rows.index)) for document, rows in groups] == [("y", [0, 2]), ("x", [1]), ("x", [3])]


def test_lengths_are_tokens_of_the_document():
    frame = pd.DataFrame({"document": ["abc", "é", "abc"]})
    assert qa.add_lengths(frame, tiny_models.build_tokenizer())["length_tokens"].tolist() == [3, 2, 3]


def test_truncation_keeps_both_ends_and_fills_the_window():
    tokenizer = tiny_models.build_tokenizer()
    document = "".join(chr(97 + i % 26) for i in range(400))

    def used(text):
        return len(question_ids(tokenizer, qa.PROMPT.format(document=text, question="Who?")))

    fits = used(document) + 10
    assert qa.truncate_document(document, "Who?", tokenizer, fits, 10) == document
    short = qa.truncate_document(document, "Who?", tokenizer, 200, 10)
    assert 189 <= used(short) + 10 <= 200
    half = len(short) // 2
    assert short == document[:half] + document[-half:]
    emoji = qa.truncate_document("\U0001f600" * 100, "Who?", tokenizer, 150)
    assert set(emoji) == {"\U0001f600"} and used(emoji) <= 150
    with pytest.raises(ValueError, match="no room for a document in a window of 20 tokens"):
        qa.truncate_document(document, "Who?", tokenizer, 20)


# ------------------------------------------------------------------------------------------------------------- scores
def test_scores_by_hand():
    predictions = pd.DataFrame(
        {
            "dataset": ["squad", "pwc", "squad_v2", "world"],
            "answers": [["1999", "year 1999"], ["US", "the U.S."], [""], ["3,000"]],
            "prediction": ["in the year 1999", "U.S.", "", "3000"],
        },
        index=[7, 7, 3, 1],
    )
    scored = qa.score(predictions)
    assert list(scored.index) == [7, 7, 3, 1] and list(predictions.columns) == ["dataset", "answers", "prediction"]
    # in year 1999 / year 1999: precision 2/3, recall 1. ROUGE-L keeps "the": 2 of 4 words; "1999" alone 1 of 4
    assert scored["token_f1"].tolist() == pytest.approx([0.8, 1, 1, 0])
    assert scored["token_f1_squad"].tolist() == pytest.approx([0.8, 1, 1, 1])
    assert scored["exact_match"].tolist() == [0, 1, 1, 0] and scored["exact_match_squad"].tolist() == [0, 1, 1, 1]
    assert scored["rouge_l"].tolist() == pytest.approx([2 / 3, 0.8, 0, 0])
    assert scored["rouge_l_first"].tolist() == pytest.approx([0.4, 0, 0, 0])
    assert scored["metric"].tolist() == ["token_f1", "rouge_l_first", "token_f1", "exact_match"]
    assert scored["score"].tolist() == pytest.approx([0.8, 0, 1, 0])
    own = qa.score(predictions.drop(columns="dataset"), metric="rouge_l")
    assert own["score"].tolist() == own["rouge_l"].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": None}, "row 0, column 'prediction' is empty"),
        ({"prediction": 3}, "row 0, column 'prediction': 3 is not text"),
        ({"answers": [[]]}, r"row 0, column 'answers': \[\] is not a list of at least one text"),
        ({"answers": "text"}, "row 0, column 'answers': 'text' is not a list"),
        ({"dataset": "mine"}, "unknown data set 'mine'"),
    ],
)
def test_rows_that_cannot_be_scored(change, message):
    row = pd.DataFrame({"dataset": ["squad"], "answers": [["a"]], "prediction": ["a"]})
    with pytest.raises(ValueError, match=message):
        qa.score(row.assign(**change))


def test_tables_that_cannot_be_scored():
    table = pd.DataFrame({"dataset": ["squad"], "answers": [["a"]]})
    with pytest.raises(ValueError, match="no column prediction, only dataset, answers"):
        qa.score(table)
    with pytest.raises(ValueError, match="no rows"):
        qa.score(table.assign(prediction="a").iloc[:0])
    with pytest.raises(ValueError, match="unknown metric 'f1'; choose one of token_f1"):
        qa.score(table.assign(prediction="a"), metric="f1")


def score_table():
    """Two methods, two data sets with different metrics, lengths from three bins."""
    rows = [
        {"method": method, "dataset": dataset, "answers": ["a b"], "prediction": prediction, "length_tokens": length}
        for method, good in (("in context", "a b"), ("Doc-to-LoRA", "b"))
        for length in (40_000, 128, 100, 127)
        for dataset, prediction in (("world", good), ("squad", good), ("squad", "c"))
    ]
    return qa.score(pd.DataFrame(rows))


def test_summary_by_method_data_set_and_length():
    table = qa.summarise_scores(score_table())
    assert list(table.columns) == ["method", "dataset", "length_bin", "metric", "n", "score", "low", "high"]
    assert list(table["method"]) == ["in context"] * 6 + ["Doc-to-LoRA"] * 6
    assert list(table["length_bin"][:3]) == ["0-127", "128-255", "32768+"]
    cell = table.set_index(["method", "dataset", "length_bin"]).loc
    known = cell["in context", "world", "0-127"]
    assert known["metric"] == "exact_match" and (known["low"], known["high"]) == scores.wilson(2, 2)
    b_alone = cell["Doc-to-LoRA", "squad", "0-127"]  # "a" is an article: both "a b" and "b" are "b"
    assert b_alone["metric"] == "token_f1" and b_alone["n"] == 4 and b_alone["score"] == pytest.approx(0.5)
    assert 0 <= b_alone["low"] < 0.5 < b_alone["high"] <= 1


def test_summary_of_one_metric_and_its_refusals():
    scored = score_table()
    with pytest.raises(ValueError, match="mixes exact_match, token_f1: add 'dataset' to by"):
        qa.summarise_scores(scored, by=["method"])
    table = qa.summarise_scores(scored, by=["method"], metric="exact_match_squad")
    assert table["n"].tolist() == [12, 12] and table["score"].tolist() == pytest.approx([2 / 3, 2 / 3])
    assert (table["low"][0], table["high"][0]) == scores.wilson(8, 12)
    with pytest.raises(ValueError, match="no column length_tokens"):
        qa.summarise_scores(scored.drop(columns="length_tokens"))
    with pytest.raises(ValueError, match="row 0, column 'method' is empty"):
        qa.summarise_scores(scored.assign(method=None))
    given = qa.summarise_scores(scored.assign(length_bin="any"), by=["length_bin"], metric="rouge_l")
    assert given["length_bin"].tolist() == ["any"] and given["n"].tolist() == [24]


def test_bootstrap_interval_is_fixed_and_near_the_normal_one():
    values = pd.Series([0.0, 1.0] * 200).to_numpy()
    low, high = qa.bootstrap_interval(values, seed=5)
    assert (low, high) == qa.bootstrap_interval(values, seed=5) != qa.bootstrap_interval(values, seed=6)
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.01)  # 0.5 +- 1.96 * 0.5 / 20
    assert qa.bootstrap_interval(values[:1]) == (0.0, 0.0)
