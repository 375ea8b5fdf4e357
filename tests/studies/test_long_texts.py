"""The studies of long texts and of half precision: the rows that they record."""

import pytest
import torch
from tiny_models import build_model, build_rows_model

from d2l_lib.studies import half_precision, long_texts

STORY = " ".join(f"On day {i} the old captain walked home and counted {7 * i} gulls." for i in range(400))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "story.txt").write_text(STORY)
    return str(tmp_path)


def test_each_text_is_internalized_and_read_again(folder, monkeypatch):
    models, seen = {"sum": build_model(), "rows": build_rows_model()}, []
    earlier = [{"model": "rows", "length": "9 tokens"}, {"model": "sum", "length": "300 tokens"}]
    monkeypatch.setattr(long_texts, "earlier_rows", lambda name: earlier)
    monkeypatch.setattr(long_texts, "MB", 10_000)

    def load(name):
        models[name].cache = None  # as of a new process
        return models[name]

    def alone(what, *arguments):
        seen.append(what.__name__)
        return what(torch.get_num_threads(), *arguments)

    monkeypatch.setattr(long_texts, "load", load)
    monkeypatch.setattr(long_texts, "_alone", alone)
    *_, rows = long_texts.run(2, 0, ["sum", "rows"], folder, [300], [1])
    assert rows[0] == earlier[0] and [row["length"] for row in rows[1:]] == ["300 tokens", "1 MB"] * 2
    assert seen == ["_cut", "_first_run", "_second_run", "_second_run"] * 4
    for row in rows[1:]:
        model = models[row["model"]]
        chunks = len(model.current.blocks)
        assert (row["tokens"] == 300 and row["chunks"] < chunks) or (row["bytes"], row["chunks"]) == (10_000, chunks)
        assert row["file_mb"] > 0 and row["adapter_mb"] > 0
        assert row["again_seconds"] > 0 and row["n"] == 2 and row["peak_mb"] > row["beyond_adapter_mb"]
        assert all(tensor.dtype == torch.float16 for block in model.current.blocks for tensor in block.A.values())


def test_answers_in_half_precision_are_compared(folder, monkeypatch):
    monkeypatch.setattr(half_precision, "earlier_rows", lambda name: [{"base_model": "another"}])
    model, asked = build_rows_model(), []

    def answer(questions, adapters, max_new_tokens):
        asked.append(adapters)
        precision = adapters[0].blocks[0].A["down_proj"].dtype
        return ["same" if place or precision == torch.float32 else "other" for place in range(len(questions))]

    monkeypatch.setattr(model, "answer", answer)
    *_, rows = half_precision.run(model, 4, 0, folder, 400)
    assert [row.get("sample") for row in rows] == [None, "needles in novels", "paragraphs of facts"]
    assert [row["equal"] for row in rows[1:]] == [0.75, 0.75] and rows[1]["n"] == 4
    for whole, half in zip(asked[::2], asked[1::2], strict=True):
        assert half == [one.to(dtype=torch.float16) for one in whole] and len(whole[0].blocks) >= 1
