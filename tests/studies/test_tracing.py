"""The study of traces: on a model whose answers hang on one sentence, the right one is first and the others are not."""

import json

import pandas as pd
import pytest

from d2l_lib.adapter import Block
from d2l_lib.studies import tracing

NAMES = ["Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal"]


class _Inside:
    nbytes = 1

    def __init__(self, text: str):
        self.text, self.documents = text, ["doc"]
        self.blocks = (Block("doc", 0, (0, len(text)), 1.0, {}, {}),)


class _Reader:
    """Says where somebody lives if a sentence of its adapter tells."""

    writes_rows = True

    def internalize_each(self, texts):
        return [_Inside(text) for text in texts]

    def answer(self, prompts, adapters, max_new_tokens):
        told = []
        for prompt, adapter in zip(prompts, adapters, strict=True):
            name = prompt.split()[2]
            place = adapter.text.partition(f"{name} lives in ")[2].partition(".")[0]
            told.append(place or "the moon")
        return told


def _attribute(model, adapter, question, answer, level, method, *, documents, controls, seed):
    units = tracing.sentence_units(adapter, documents)
    sign = -1.0 if method == "random" else 1.0
    return units.assign(contribution=[sign * (answer in text) for text in units["text"]])


def test_the_sentence_that_states_the_answer_is_first_and_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(tracing, "attribute", _attribute)
    paragraphs = []
    for i, name in enumerate(NAMES):
        text = f"It rains. {name} lives in Town{i}. The end." if i else f"{name} lives in Town{i}."  # one sentence
        qas = [
            {"id": name, "question": f"Where does {name} live?", "answers": [{"text": f"Town{i}", "answer_start": 0}]}
        ]
        paragraphs.append({"context": text, "qas": qas})
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"version": "1.1", "data": [{"title": "towns", "paragraphs": paragraphs}]}))
    rows = pd.DataFrame(tracing.run(_Reader(), 6, 0, f"squad={file}")).set_index("name")
    assert rows.loc["leave_one_out", "share"] == rows.loc["attended", "share"] == 1.0
    assert rows.loc["random", "share"] == 0.0
    assert rows.loc["wrong without the sentence ranked first", "share"] == 1.0
    assert rows.loc["wrong without another sentence", "share"] == 0.0
    assert set(rows["n"]) == {6} and set(rows["sentences"]) == {3.0} and rows["chance"].round(4).eq(0.3333).all()
    with pytest.raises(ValueError, match="answers 7 passages' questions rightly: ask for fewer"):
        tracing.run(_Reader(), 8, 0, f"squad={file}")
