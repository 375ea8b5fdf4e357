"""The study of interference: what the base model knows, and what of it an unrelated adapter costs."""

import json

import pytest

from d2l_lib.records import project_root, read_rows, write_jsonl
from d2l_lib.studies import articles, interference

KNOWN = {f"What is {number}?": f"Answer{number}" for number in range(6)}


class _Forgetful:
    """Knows everything alone, all but one answer with one text inside, and nothing with more."""

    def internalize_each(self, documents):
        return [_Texts((document,)) for document in documents]

    def answer(self, prompts, adapters, max_new_tokens):
        replies = []
        for prompt, adapter in zip(prompts, adapters, strict=True):
            size = 0 if adapter is None else len(adapter.documents)
            lost = size > 1 or (size == 1 and prompt == "What is 3?")
            replies.append("no idea" if lost else f"It is {KNOWN[prompt]}, I think.")
        return replies


class _Texts:
    nbytes = 1

    def __init__(self, documents):
        self.documents = documents

    def __add__(self, other):
        return _Texts(self.documents + other.documents)

    def __radd__(self, other):
        return self


def test_what_stays_right_is_counted_for_each_adapter(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "general.jsonl", [{"question": q, "answers": [a]} for q, a in KNOWN.items()])
    monkeypatch.setattr(interference, "QUESTIONS", tmp_path / "general.jsonl")
    paragraphs = [
        {
            "context": f"Text {i}.",
            "qas": [{"id": str(i), "question": "?", "answers": [{"text": "x", "answer_start": 0}]}],
        }
        for i in range(12)
    ]
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    rows = interference.run(_Forgetful(), n=6, seed=0, questions=f"squad={file}")
    assert [row["inside"] for row in rows] == ["no adapter", "one passage", "10 passages"]
    assert [row["right"] for row in rows] == [1, 5 / 6, 0] == [row["stay_right"] for row in rows]
    assert all(row["n"] == 6 and row["n_passages"] == 12 and row["low"] <= row["right"] <= row["high"] for row in rows)
    monkeypatch.setattr(articles, "_SIZES", (50, 200))  # characters: the file is one article
    again = interference.run(_Forgetful(), n=6, seed=0, questions=f"squad={file}")
    assert again[:3] == [row | {"seconds": again[i]["seconds"]} for i, row in enumerate(rows)]
    (row,) = again[3:]
    assert (row["inside"], row["n_passages"], row["stay_right"]) == ("a whole article", 12, 0)


@pytest.mark.parametrize(
    ("reply", "answers", "right"),
    [
        ("The capital is Paris.", ["Paris"], True),
        ("Parisian life", ["Paris"], False),
        ("it is COLD", ["cold"], True),
        ("O is oxygen", ["O"], True),
        ("oh no", ["O"], False),
        ("seven days", ["7", "seven"], True),
    ],
)
def test_an_answer_is_a_whole_word(reply, answers, right):
    assert interference.says(reply, answers) is right


def test_the_general_questions_are_different_and_have_answers():
    rows = read_rows(project_root() / interference.QUESTIONS)
    assert len(rows) == 200 == len({row["question"] for row in rows})
    assert all(row["answers"] and all(isinstance(one, str) and one for one in row["answers"]) for row in rows)


def test_the_prompts_that_train_the_gate_are_others():
    trained = [row["prompt"] for row in read_rows(project_root() / "data" / "unrelated_prompts.jsonl")]
    asked = {row["question"].casefold() for row in read_rows(project_root() / interference.QUESTIONS)}
    assert len(set(trained)) == len(trained) > 300
    assert not asked & {prompt.casefold() for prompt in trained}
