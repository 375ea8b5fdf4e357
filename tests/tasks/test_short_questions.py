"""A small model's questions: openings that suit the sentence, and every kind of useless question or answer named."""

import hashlib
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import build_tokenizer

from d2l_lib.documents import question_ids, split_sentences, stop_ids
from d2l_lib.engine import Reply
from d2l_lib.formats.shards import ANSWERS_DROPPED, QUESTIONS_DROPPED, read_shards
from d2l_lib.records import read_json
from d2l_lib.tasks import short_questions
from d2l_lib.training.selfgen import Settings, make_shard, read_texts

SAMPLES = Path(__file__).resolve().parents[2] / "data" / "samples"

TEXT = "The mill at Ottersby was built in 1702 by Anders Holm. Bread is sold there because it smells. Rain fell."
OPENINGS = Settings(
    documents=1, questions=9, writer_style="openings", unrelated_share=0, unanswerable_share=0, writer_max_new_tokens=9
)
OF_WRITER = {"most": 9, "max_new_tokens": 9}


class Writer:
    """An engine whose replies are given, by opening; it keeps its prompts."""

    def __init__(self, replies: dict[str, str | None], finished: bool = True):
        self.tokenizer, self.stops, self.window = build_tokenizer(), [0], 2048
        self.replies, self.finished, self.prompts = replies, finished, []

    def reply(self, prompts, max_new_tokens, temperature, seed):
        self.prompts = [self.tokenizer.decode(ids) for ids in prompts]
        said = [
            next(text for opening, text in self.replies.items() if prompt.endswith(opening)) for prompt in self.prompts
        ]
        return [
            None if text is None else Reply(self.tokenizer(text)["input_ids"], self.finished, None, None)
            for text in said
        ]


def test_an_opening_needs_what_it_asks_for():
    pairs = short_questions._draw_pairs(random.Random(0), TEXT, 99)
    by_sentence = {}
    for span, opening in pairs:
        by_sentence.setdefault(TEXT[slice(*span)], []).append(opening)
    assert by_sentence == {
        "The mill at Ottersby was built in 1702 by Anders Holm.": ["Who", "When", "Where"],
        "Bread is sold there because it smells.": ["Why"],
    }
    assert len(short_questions._draw_pairs(random.Random(0), TEXT, 2)) == 2


@pytest.mark.parametrize(
    ("sentence", "opening", "fits"),
    [
        ("He died on 3 May.", "When", True),
        ("It has 42 lines.", "When", False),
        ("It has 42 lines on a page.", "How many", True),
        ("It opened in November 1869.", "How many", False),
        ("It was twelve metres high.", "How many", True),
        ("She lived in Paris.", "Where", True),
        ("It was opened in May 1950.", "Where", False),
        ("They came in the end.", "Where", False),
        ("It was found by Karl von Frisch.", "Who", True),
        ("Bees dance.", "Who", False),
        ("Nobody came because it rained.", "Why", True),
    ],
)
def test_openings_by_sentence(sentence, opening, fits):
    assert (opening in {o for _, o in short_questions._draw_pairs(random.Random(0), sentence, 99)}) == fits


def test_questions_go_on_from_their_opening_and_keep_their_sentence():
    writer = Writer(
        {
            "Who": " built the mill at Ottersby? Anders.",
            "When": " did rain fall.",
            "Where": None,
            "Why": " is this text?",
        }
    )
    counts = Counter()
    (written,) = short_questions.write_questions(random.Random(0), [TEXT], writer, counts, **OF_WRITER)
    assert [(q.text, q.kind) for q in written] == [("Who built the mill at Ottersby?", "who")]
    assert TEXT[slice(*written[0].span)] == "The mill at Ottersby was built in 1702 by Anders Holm."
    assert counts == {"writer_not_a_question": 1, "writer_too_long": 1, "writer_about_the_text": 1}
    (prompt,) = question_ids(writer.tokenizer, [short_questions.PROMPT.format(sentence=TEXT[slice(*written[0].span)])])
    assert writer.prompts[0] == writer.tokenizer.decode(prompt) + "Who"
    cut = Writer({"Who": " built", "When": " did", "Where": " was", "Why": " is bread sold?"}, finished=False)
    (written,) = short_questions.write_questions(random.Random(0), [TEXT], cut, counts := Counter(), **OF_WRITER)
    assert [q.text for q in written] == ["Why is bread sold?"] and counts == {"writer_cut_off": 3}


def test_a_question_comes_once():
    writer = Writer({"Who": "", "When": "", "Where": "", "Why": " is bread sold?"})
    text = "Bread is sold because it smells. Bread is sold because it is good."
    (written,) = short_questions.write_questions(random.Random(0), [text], writer, counts := Counter(), **OF_WRITER)
    assert len(written) == 1 and counts == {"writer_duplicate": 1}


LONG = "It stood on a hill above the river where nobody had ever lived before and then it fell down at last in spring."


@pytest.mark.parametrize(
    ("question", "problem"),
    [
        ("Who built the mill at Ottersby?", None),
        ("Why do people build mills?", None),  # "build" and "built", "mills" and "mill" begin alike
        ("What is the text about?", "about_the_text"),
        ("What is the answer to this question?", "about_the_text"),
        ("Who is the author of the following short passage?", "about_the_text"),
        ("When did the mill of the hills of the hills of the hills stand?", "goes_round"),
        ("Why why why why is it?", "goes_round"),
        (f"Why {LONG[:-1].lower()}?", "repeats_text"),
        ("Where is the mill of Ashwood?", "off_text"),
        ("How many people built 51 mills?", "off_text"),
        ("How many people can you hold in your arms?", "off_text"),
        ("Who are you?", "off_text"),
    ],
)
def test_why_a_question_is_left_out(question, problem):
    document = f"The mill at Ottersby was built in 1702. Many people came. {LONG}"
    assert short_questions.question_problem(question, document) == problem
    assert problem is None or problem in QUESTIONS_DROPPED


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("Anders Holm.", None),
        ("1702", None),
        (" \n.", "empty"),
        ("The answer to this question is:", "no_answer"),
        ("who built the mill", "repeats_question"),
        ("It is the one that is not the one that is not the one.", "goes_round"),
        (LONG, None),
        (f"{LONG} {LONG.replace('It', 'He')}", None),
        (f"{LONG} The mill stands. {LONG}", "repeats_text"),
    ],
)
def test_why_an_answer_is_left_out(answer, problem):
    document = f"{LONG} The mill stands. {LONG} Nothing else."
    assert short_questions.answer_problem(answer, "Who built the mill?", document) == problem
    assert problem is None or problem in ANSWERS_DROPPED


class Teacher:
    """An engine that gives these answers in turn."""

    def __init__(self, answers: list[str]):
        self.tokenizer, self.answers = build_tokenizer(), answers

    def reply(self, prompts, max_new_tokens, temperature, seed):
        assert len(prompts) == len(self.answers)
        stop = stop_ids(self.tokenizer)[-1]
        ids = [[*self.tokenizer(answer, add_special_tokens=False)["input_ids"], stop] for answer in self.answers]
        return [Reply(one, True, np.zeros((len(one), 16), "f2"), np.zeros((len(one), 16), "i4")) for one in ids]


def test_a_shard_counts_what_was_left_out_and_keeps_the_sentence_as_evidence():
    replies = {"Who": " built the mill at Ottersby?", "When": " was the mill built?", "Where": " is Ashwood?"}
    writer = Writer(replies | {"Why": " is bread sold there?"})
    teacher = Teacher(["Anders Holm.", "The answer is:", "Because it smells."])
    table, counts = make_shard(OPENINGS, 0, teacher, [TEXT], writer)
    (row,) = table.to_pylist()
    assert list(zip(row["questions"], row["answers"], row["kinds"], strict=True)) == [
        ("Who built the mill at Ottersby?", "Anders Holm.", "who"),
        ("Why is bread sold there?", "Because it smells.", "why"),
    ]
    marked = [[TEXT[slice(*span)] for span in spans] for spans in row["evidence"]]
    assert marked == [
        ["The mill at Ottersby was built in 1702 by Anders Holm."],
        ["Bread is sold there because it smells."],
    ]
    assert {name: n for name, n in counts.items() if n and not name.endswith("tokens")} == {
        "documents": 1, "questions": 3, "kept": 2, "writer_off_text": 1, "answer_no_answer": 1,
    }  # fmt: skip


def test_answers_to_listed_questions_are_kept_as_they_are():
    listed = replace(OPENINGS, writer_style="lists", questions=1)
    teacher = Teacher(["The answer is:"])
    writer = Writer({"": "1. Who built the mill?"})
    table, counts = make_shard(listed, 0, teacher, [TEXT], writer)
    assert table["answers"][0].as_py() == ["The answer is:"]
    assert counts["kept"] == 1 and counts["writer_duplicate"] == 1, "the second round wrote it again"


# --- the samples that come with the project ---------------------------------------------------------------------------


def test_the_bundled_samples_are_whole_and_none_of_them_should_have_been_left_out():
    texts = read_texts(SAMPLES / "passages.jsonl")
    manifest = read_json(SAMPLES / "smollm2" / "manifest.json")
    assert manifest["complete"] and manifest["settings"]["writer_style"] == "openings"
    assert manifest["source"]["sha256"] == hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    assert manifest["prompts"]["writer"]["openings"] == short_questions.OPENINGS, "made with other openings"
    rows = read_shards(SAMPLES / "smollm2", vocabulary=49_152)
    totals, asked = manifest["totals"], [question for row in rows for question in row["questions"]]
    assert len(asked) == totals["kept"] and totals["documents"] == len(rows) > 20
    for row in rows:
        text = row["document"]
        assert text in texts and len(set(row["questions"])) == len(row["questions"])
        sentences = [text[start:end].strip() for start, end in split_sentences(text)]
        assert all(text[slice(*span)] in sentences for spans in row["evidence"] for span in spans)
        for question, answer in zip(row["questions"], row["answers"], strict=True):
            assert short_questions.question_problem(question, text) is None
            assert short_questions.answer_problem(answer, question, text) is None
        assert all(np.shape(values)[1] == 16 and np.all(np.diff(values) <= 0) for values in row["logprobs_vals"])
    assert sum(file.stat().st_size for file in (SAMPLES / "smollm2").iterdir()) < 1_500_000
