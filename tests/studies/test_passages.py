"""The study of passages of real text asks every method about the right passage, and its controls about another one."""

import json
from dataclasses import dataclass

import pandas as pd
import pytest

from d2l_lib.base_model import bundled_path, load_tokenizer
from d2l_lib.studies import passages

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

    window = 1024

    def __init__(self, answers: dict[str, tuple[str, str]]):
        self.tokenizer = load_tokenizer(str(bundled_path("tiny") / "base_model"))
        self.answers = answers  # by question: passage, answer
        self.sizes: set[int] = set()

    def internalize_each(self, documents):
        return [_Inside((document,)) for document in documents]

    def answer(self, prompts, adapters, max_new_tokens):
        replies = []
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


def test_every_method_is_asked_about_its_passage_and_the_control_about_another(squad):
    file, answers = squad
    reader = _Reader(answers)
    *_, rows = passages.run(reader, n=N, seed=0, questions=f"squad={file}")
    table = pd.DataFrame(rows)
    f1 = table[table["metric"] == "token_f1_squad"].set_index("method")["score"]
    assert f1["question alone"] == f1["another passage's adapter"] == 0
    assert f1["passage in the prompt"] == f1["Doc-to-LoRA"] == f1["Doc-to-LoRA, 10 passages in one adapter"] == 1
    assert reader.sizes == {0, 1, 10, N - 20}
    assert set(table["n"]) == {N} and set(table["n_passages"]) == {N}
    with_adapter = table["method"].str.contains("Doc-to-LoRA|adapter")
    assert set(table.loc[with_adapter, "kilobytes"]) == {1.0} and table.loc[~with_adapter, "kilobytes"].isna().all()
    assert set(table["metric"]) == {"token_f1_squad", "exact_match_squad", "recall"}


def test_recall_counts_the_answers_words_in_a_sentence(squad):
    file, answers = squad
    talking = {question: (document, f"In {answer}, of course.") for question, (document, answer) in answers.items()}
    *_, rows = passages.run(_Reader(talking), n=N, seed=0, questions=f"squad={file}")
    table = pd.DataFrame(rows)
    own = table[table["method"] == "Doc-to-LoRA"].set_index("metric")["score"]
    assert own["recall"] == 1 and own["exact_match_squad"] == 0 and 0 < own["token_f1_squad"] < 1


def test_some_methods_are_measured_again_and_the_others_stay(squad, monkeypatch):
    file, answers = squad
    asked = {"n": N, "seed": 0, "questions": f"squad={file}"}
    *_, whole = passages.run(_Reader(answers), **asked)
    monkeypatch.setattr(
        passages, "earlier_rows", lambda name: [row | {"command": "before", "seed": 0} for row in whole]
    )
    in_steps = list(passages.run(_Reader(answers), **asked, only=["alone", "another"]))
    assert [len(rows) for rows in in_steps] == [12, 15]
    assert [row["method"] for row in in_steps[-1]] == [row["method"] for row in whole]
    again = {row["method"] for row in in_steps[-1] if "command" not in row}
    assert again == {"question alone", "another passage's adapter"}
    with pytest.raises(ValueError, match="no method is called prayer; there are question alone"):
        next(passages.run(_Reader(answers), **asked, only=["prayer"]))
    with pytest.raises(ValueError, match=f"seed 0, n {N}"):
        next(passages.run(_Reader(answers), **asked | {"n": 3}, only=["alone"]))
