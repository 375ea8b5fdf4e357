"""The study of written questions counts what is left out and holds answers against their own and the next text."""

import json

import pytest
from tiny_models import build_base_model, build_tokenizer

from d2l_lib.studies import written_questions

TEXTS = ["The mill was built in 1702 by Anders Holm.", "Bread is sold because it smells."]


def test_answers_are_held_against_their_own_and_the_next_text():
    rows = [
        {"document": TEXTS[0], "questions": ["Who built it?", "When?"], "answers": ["Anders Holm", "In 1999"]},
        {"document": TEXTS[1], "questions": ["Was the bread sold?"], "answers": ["The bread smells."]},
    ]
    row = written_questions.inside(rows, TEXTS)
    assert row["all_words_inside"] == round(2 / 3, 4) and row["low"] < 2 / 3 < row["high"]
    assert row["all_words_in_next"] == 0
    rows[0]["answers"][1] = "Bread"  # not in its own text, but in the next one
    assert written_questions.inside(rows, TEXTS)["all_words_in_next"] == round(1 / 3, 4)
    assert written_questions.inside([], TEXTS) == {
        "all_words_inside": 0, "low": 0, "high": 1, "all_words_in_next": 0,
    }  # fmt: skip


def test_each_style_is_a_row_and_texts_have_to_be_there(tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    tokenizer = build_tokenizer()
    model = build_base_model(tokenizer, window=2048), tokenizer
    *_, rows = written_questions.run(model, 2, 0, str(tmp_path / "texts.jsonl"), ["openings", "lists"])
    assert [row["style"] for row in rows] == ["openings", "lists"]
    for row in rows:
        left_out = sum(n for name, n in row.items() if name.startswith("writer_"))
        assert row["written"] == row.get("questions", 0) + left_out
    assert rows[0]["written"] == 3, "who and when; why"
    with pytest.raises(ValueError, match="holds 2 texts; at least two, and 3 are asked for"):
        next(written_questions.run(model, 3, 0, str(tmp_path / "texts.jsonl"), ["lists"]))
