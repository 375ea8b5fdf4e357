"""The study of passages of real text asks every method about the right passage, and its controls about another one."""

import json
from dataclasses import dataclass, replace

import pandas as pd
import pytest
import torch
from tiny_models import build_rows_model

from d2l_lib import loading
from d2l_lib.adapter import Adapter, Block
from d2l_lib.base_model import bundled_path, load_tokenizer, module_sizes
from d2l_lib.formats.peft import export_peft, merge
from d2l_lib.model import DocToLoRA
from d2l_lib.studies import passages
from d2l_lib.tasks.scores import wilson
from d2l_lib.training.row_features import never_learned

N = 24


@dataclass(frozen=True)
class _Inside:
    documents: tuple[str, ...]
    nbytes: int = 1000

    def __add__(self, other):
        return _Inside(self.documents + other.documents)

    def __radd__(self, other):
        return self


class _Reader:
    """Knows an answer where its passage is in the prompt or in the adapter."""

    window, base_source = 1024, None

    def __init__(self, answers: dict[str, tuple[str, str]]):
        self.tokenizer = load_tokenizer(str(bundled_path("tiny") / "base_model"))
        self.answers = answers  # by question: passage, answer
        self.sizes: set[int] = set()
        self.n_plain = 0  # prompts without an adapter

    def internalize_each(self, documents):
        return [_Inside((document,)) for document in documents]

    def answer(self, prompts, adapters, max_new_tokens):
        replies = []
        self.n_plain += adapters.count(None)
        for prompt, adapter in zip(prompts, adapters, strict=True):
            question = next(question for question in self.answers if question in prompt)
            document, answer = self.answers[question]
            self.sizes.add(0 if adapter is None else len(adapter.documents))
            known = document in prompt or (adapter is not None and document in adapter.documents)
            replies.append(answer if known else "the moon")
        return replies


@pytest.fixture
def squad(tmp_path):
    """A file of N passages with a question each; returns it and {question: (passage, answer)}."""
    names = [f"Person{number}" for number in range(N)]
    answers = {f"Where does {name} live?": (f"{name} lives in Town{i}.", f"Town{i}") for i, name in enumerate(names)}
    paragraphs = [
        {
            "context": document,
            "qas": [{"id": question, "question": question, "answers": [{"text": answer, "answer_start": 0}]}],
        }
        for question, (document, answer) in answers.items()
    ]
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"version": "1.1", "data": [{"title": "people", "paragraphs": paragraphs}]}))
    return file, answers


def _whole(rows: list[dict]) -> list[dict]:
    """The rows of all questions."""
    return [row for row in rows if "tokens" not in row]


def test_every_method_is_asked_about_its_passage_and_the_control_about_another(squad):
    file, answers = squad
    reader = _Reader(answers)
    *_, rows = passages.run(reader, n=N, seed=0, questions=f"squad={file}")
    table = pd.DataFrame(_whole(rows))
    f1 = table[table["metric"] == "token_f1_squad"].set_index("method")["score"]
    assert f1["question alone"] == f1["another passage's adapter"] == 0
    assert f1["passage in the prompt"] == f1["Doc-to-LoRA"] == f1["Doc-to-LoRA, 10 passages in one adapter"] == 1
    assert f1["best of ten passages by BM25 in the prompt"] == f1["Doc-to-LoRA and the passage in the prompt"] == 1
    assert not f1.index.str.contains("reading LoRA").any(), "this base model has none"
    assert reader.sizes == {0, 1, 10, N - 20}
    assert reader.n_plain == 2 * N, "the best passage is the right one: the same prompts"
    seconds = table.groupby("method")["seconds"].first()
    assert seconds["best of ten passages by BM25 in the prompt"] == seconds["passage in the prompt"]
    assert set(table["n"]) == {N} and set(table["n_passages"]) == {N}
    with_adapter = table["method"].str.contains("Doc-to-LoRA|adapter")
    by_search = table["method"].str.contains("BM25")
    assert set(table.loc[with_adapter, "kilobytes"]) == {1.0}
    assert table.loc[~with_adapter & ~by_search, "kilobytes"].isna().all()
    found = table[by_search]
    assert set(found["right_passage"]) == {1.0} and found["kilobytes"].between(0.01, 1).all()
    assert found["seconds_indexing"].notna().all() and found["seconds_searching"].notna().all()
    assert set(table["metric"]) == {"token_f1_squad", "exact_match_squad", "recall"}


def test_recall_counts_the_answers_words_in_a_sentence(squad):
    file, answers = squad
    talking = {question: (document, f"In {answer}, of course.") for question, (document, answer) in answers.items()}
    *_, rows = passages.run(_Reader(talking), n=N, seed=0, questions=f"squad={file}")
    table = pd.DataFrame(_whole(rows))
    own = table[table["method"] == "Doc-to-LoRA"].set_index("metric")["score"]
    assert own["recall"] == 1 and own["exact_match_squad"] == 0 and 0 < own["token_f1_squad"] < 1


def test_scores_by_length_are_of_the_passages_of_that_length(squad, monkeypatch):
    file, answers = squad
    monkeypatch.setattr(passages, "_ENDS", (10, 11))  # Person9's passage has 10 tokens, Person10's has 12
    short = list(answers)[:10]
    known = {
        question: (document, answer if question in short else "the sun")
        for question, (document, answer) in answers.items()
    }
    *_, rows = passages.run(_Reader(known), n=N, seed=0, questions=f"squad={file}")
    table = pd.DataFrame(rows)
    assert set(table["method"]) == {
        name for name, one in passages.METHODS.items() if not one.reads and not one.published and name != passages.SEEN
    }
    for _, own in table.groupby(["method", "metric"]):
        whole, parts = own[own["tokens"].isna()], own[own["tokens"].notna()].set_index("tokens")
        assert len(whole) == 1 and list(parts.index) == ["<= 128", "> 200"], "ranges that occur, in their order"
        assert list(parts["n"]) == list(parts["n_passages"]) == [10, N - 10] and whole["n"].item() == N
        assert (parts["n"] * parts["score"]).sum() == pytest.approx(N * whole["score"].item())
        assert parts["seconds"].isna().all() and whole["seconds"].notna().all()
    exact = table[(table["method"] == "Doc-to-LoRA") & (table["metric"] == "exact_match_squad")].set_index("tokens")
    assert exact.loc[["<= 128", "> 200"], "score"].tolist() == [1, 0]
    intervals = list(exact.loc[["<= 128", "> 200"], ["low", "high"]].itertuples(index=False, name=None))
    assert intervals == [wilson(10, 10), wilson(0, N - 10)]


def test_ranges_are_told_by_the_models_tokens():
    tokenizer = load_tokenizer(str(bundled_path("tiny") / "base_model"))
    frame = pd.DataFrame({"document": ["a" + " a" * (length - 1) for length in (1, 128, 129, 200, 201, 900)]})
    assert passages.qa.add_lengths(frame, tokenizer)["length_tokens"].tolist() == [1, 128, 129, 200, 201, 900]
    tokens = passages._with_ranges(frame, tokenizer)["tokens"]
    assert tokens.tolist() == ["<= 128", "<= 128", "129-200", "129-200", "> 200", "> 200"]


def test_some_methods_are_measured_again_and_the_others_stay(squad, monkeypatch):
    file, answers = squad
    asked = {"n": N, "seed": 0, "questions": f"squad={file}"}
    *_, whole = passages.run(_Reader(answers), **asked)
    monkeypatch.setattr(
        passages, "earlier_rows", lambda name: [row | {"command": "before", "seed": 0} for row in whole]
    )
    in_steps = list(passages.run(_Reader(answers), **asked, only=["alone", "another"]))
    assert [len(rows) for rows in in_steps] == [36, 42], "of all questions, and of the one range that occurs"
    assert [row["method"] for row in in_steps[-1]] == [row["method"] for row in whole]
    again = {row["method"] for row in in_steps[-1] if "command" not in row}
    assert again == {"question alone", "another passage's adapter"}
    with pytest.raises(ValueError, match="no reading LoRA in .*reading_lora: d2l train --stage reading-lora makes one"):
        next(passages.run(_Reader(answers), **asked, only=["reading"]))
    with pytest.raises(ValueError, match="no hypernetwork of the published form in .*published: d2l train --stage"):
        next(passages.run(_Reader(answers), **asked, only=["published form"]))
    with pytest.raises(ValueError, match="no method is called prayer; there are question alone"):
        next(passages.run(_Reader(answers), **asked, only=["prayer"]))
    with pytest.raises(ValueError, match=f"seed 0, n {N}"):
        next(passages.run(_Reader(answers), **asked | {"n": 3}, only=["alone"]))


# --- seen passages --------------------------------------------------------------------------------------------------
def _learn(monkeypatch, validation: int) -> None:
    """A training with so many passages for validation."""
    whole = passages.PRESETS["smollm2"]
    monkeypatch.setitem(passages.PRESETS, "smollm2", replace(whole, rows=replace(whole.rows, validation=validation)))


def test_seen_passages_are_those_of_the_training_without_its_validation(squad, monkeypatch):
    file, answers = squad
    _learn(monkeypatch, validation=9)
    asked = {"n": 7, "seed": 0, "questions": "squad=nowhere.json", "seen": f"squad={file}", "only": ["seen"]}
    monkeypatch.setattr(passages, "earlier_rows", lambda name: [])
    internalized = []
    reader = _Reader(answers)
    reader.internalize_each = lambda documents: (
        internalized.append(documents) or _Reader.internalize_each(reader, documents)
    )
    *_, rows = passages.run(reader, **asked)
    assert {row["method"] for row in rows} == {"Doc-to-LoRA, seen passages"} and len(rows) == 6
    assert rows[0]["score"] == 1 and rows[0]["n"] == rows[0]["n_passages"] == 7
    every = [document for document, _ in answers.values()]
    held = {every[number] for number in never_learned(N, 9)}
    assert len(internalized[0]) == 7 and held.isdisjoint(internalized[0])
    *_, again = passages.run(reader, **asked)
    *_, every_one = passages.run(reader, **asked | {"n": 100})
    *_, other = passages.run(reader, **asked | {"seed": 1})
    assert again[0]["n"] == 7 and every_one[0]["n"] == N - 9
    assert internalized[0] == internalized[1] != internalized[3] and set(internalized[2]) == {*every} - held


def test_seen_passages_stand_beside_unseen_ones_where_their_file_is_given(squad, monkeypatch):
    file, answers = squad
    _learn(monkeypatch, validation=4)
    asked = {"n": N - 4, "seed": 0, "questions": f"squad={file}"}
    *_, rows = passages.run(_Reader(answers), **asked, seen=f"squad={file}")
    assert {row["method"] for row in rows} == {
        name for name, one in passages.METHODS.items() if not one.reads and not one.published
    }
    names = list(dict.fromkeys(row["method"] for row in rows))
    assert names.index("Doc-to-LoRA, seen passages") == names.index("Doc-to-LoRA") + 1
    with pytest.raises(ValueError, match="the method 'Doc-to-LoRA, seen passages' needs --seen"):
        next(passages.run(_Reader(answers), **asked, only=["seen"]))
    with pytest.raises(ValueError, match="--seen is for the method .*, which --only leaves out"):
        next(passages.run(_Reader(answers), **asked, only=["alone"], seen=f"squad={file}"))
    _learn(monkeypatch, validation=N)
    monkeypatch.setattr(passages, "earlier_rows", lambda name: [])
    with pytest.raises(ValueError, match=f"{N} passages have a question .* more than {N}: is this its file"):
        next(passages.run(_Reader(answers), **asked, only=["seen"], seen=f"squad={file}"))


# --- with the passage in the prompt ---------------------------------------------------------------------------------
def test_retrieval_chooses_among_the_passages_of_one_adapter(squad):
    file, answers = squad
    frame = passages.qa.load_named(f"squad={file}")
    adapters = {document: _Inside((document,)) for document in frame["document"]}
    inside = passages._together(adapters, 3)
    others = {
        question: next(one for one in inside[document].documents if one != document)
        for question, (document, _) in answers.items()
    }
    shared = "Where does {} live? {} lives there."
    frame["question"] = [shared.format(others[q].split()[0], others[q].split()[0]) for q in frame["question"]]
    prompts, costs = passages._with_best(_Reader(answers), frame, 3)
    assert [prompt.split("\n")[0] for prompt in prompts] == list(others.values()), "the best one of its ten"
    assert costs["right_passage"] == 0


@torch.no_grad()
def test_the_reading_lora_answers_as_a_model_that_it_was_merged_into(squad, tmp_path, monkeypatch):
    file, _ = squad
    model, modules = build_rows_model(), ["down_proj", "q_proj"]
    model.window = 1024
    (d_in, d_out), shape = module_sizes(model.base_model, modules), (4, 3)
    torch.manual_seed(0)
    A, B = ({m: torch.randn(*shape, side[m]) * 0.2 for m in modules} for side in (d_in, d_out))
    lora = Adapter((Block("reading", 0, None, 1.0, A, B),), None, 2.0, base_model="base", base_key=model.base_key)
    folder = export_peft(lora, tmp_path / "reading_lora", dtype=torch.float16)
    for place in (passages, loading):
        monkeypatch.setattr(place, "bundled_path", lambda name: tmp_path)
    asked, replies = {"n": 6, "seed": 0, "questions": f"squad={file}", "only": ["reading LoRA"]}, []
    monkeypatch.setattr(passages, "earlier_rows", lambda name: [])
    plain = passages.ask_reading
    monkeypatch.setattr(passages, "ask_reading", lambda *arguments: replies.append(plain(*arguments)) or replies[-1])
    *_, rows = passages.run(model, **asked)
    rows = _whole(rows)
    assert [row["method"] for row in rows[::3]] == [
        "passage in the prompt, reading LoRA",
        "best of ten passages by BM25, reading LoRA",
    ]
    merged = merge(model.base_model, Adapter.from_peft(folder, model))
    frame = passages.qa.load_named(f"squad={file}", n=6, seed=0)
    prompts = passages._with_passages(model, frame, 0)[0]
    read = DocToLoRA(merged, model.tokenizer, model.hypernetwork).answer(prompts, None, max_new_tokens=24)
    assert replies[0][0] == read != model.answer(prompts, None, max_new_tokens=24)
    assert all("kilobytes" not in row for row in rows[:3]) and all(row["right_passage"] == 1 for row in rows[3:])


def test_questions_are_asked_together_as_far_as_adapters_fit(monkeypatch):
    class Sized:
        def __init__(self, nbytes: int):
            self.nbytes = nbytes

    monkeypatch.setattr(passages, "_AT_ONCE", (4, 10))
    large, small = Sized(9), Sized(2)

    def parts(adapters):
        return [(part.start, part.stop) for part in passages._batches(adapters)]

    assert parts([None] * 9) == [(0, 4), (4, 8), (8, 9)] and parts([]) == []
    assert parts([large, large, large, large, large]) == [(0, 4), (4, 5)], "one adapter counts once"
    assert parts([small, large, small, None, Sized(3)]) == [(0, 1), (1, 2), (2, 5)]
    assert parts([Sized(99), Sized(99)]) == [(0, 1), (1, 2)], "each question is asked"
