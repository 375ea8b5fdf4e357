"""The study of articles: each question has its passage inside, alone and among all of its article."""

import json

import pytest
from test_passages import _Reader

from d2l_lib.studies import articles


def squad_file(folder, titles: dict[str, int], size: int):
    """A file with so many passages of `size` characters for each title, two questions on each; and its answers."""
    answers, data = {}, []
    for title, count in titles.items():
        paragraphs = []
        for i in range(count):
            text = f"{title}{i} lives in Town{title}{i}. ".ljust(size, "x")
            asked = {f"Where does {title}{i} live, {q}?": (text, f"Town{title}{i}") for q in ("now", "then")}
            answers |= asked
            paragraphs.append(
                {
                    "context": text,
                    "qas": [
                        {"id": q, "question": q, "answers": [{"text": a, "answer_start": 0}]}
                        for q, (_, a) in asked.items()
                    ],
                }
            )
        data.append({"title": title, "paragraphs": paragraphs})
    file = folder / "squad.json"
    file.write_text(json.dumps({"version": "1.1", "data": data}))
    return file, answers


def test_articles_of_the_right_size_give_as_many_questions(tmp_path):
    file, answers = squad_file(tmp_path, {"a": 5, "b": 9, "small": 2, "large": 11}, 5000)
    reader = _Reader(answers)
    table = articles.run(reader, n=8, seed=0, questions=f"squad={file}")
    assert reader.sizes == {1, 5, 9}
    assert set(table["score"]) == {1.0} and set(table["n"]) == {8} and set(table["n_articles"]) == {2}
    assert set(table["method"]) == {"its passage alone", "the whole article"}
    assert set(table["passages_of_an_article"]) == {7} and set(table["characters_of_an_article"]) == {35000}


def test_a_data_set_without_titles_is_refused(tmp_path):
    file, answers = squad_file(tmp_path, {"": 6}, 5000)
    with pytest.raises(ValueError, match="are there titles"):
        articles.run(_Reader(answers), n=8, seed=0, questions=f"squad={file}")
