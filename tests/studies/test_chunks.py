"""The study of chunks: weights that find the right chunk, their place in a model's folder, what speaks for a chunk."""

import pytest
import torch
from test_articles import squad_file
from tiny_models import build_rows_model

from d2l_lib.formats.checkpoints import load_checkpoint, save_checkpoint
from d2l_lib.studies import articles, chunks


def made(n: int, seed: int) -> list:
    """Questions on six chunks: the third part tells most, then the second; the last nothing."""
    torch.manual_seed(seed)
    asked = []
    for number in range(n):
        right = torch.zeros(6, dtype=torch.bool)
        right[number % 6] = True
        parts = torch.randn(6, 4)
        parts[:, 0] += 1.0 * right
        parts[:, 1] += 2.0 * right
        parts[:, 2] += 4 * right
        asked.append(chunks._Asked(parts, right))
    return asked


def test_parts_that_tell_the_right_chunk_weigh_more(monkeypatch):
    monkeypatch.setattr(chunks, "_ask", lambda _, source, n, seed, most: made(n, seed=len(source)))
    rows = {(row["split"], row["method"]): row for row in chunks.run(None, 90, 0, "learned", "others", None)}
    first = {method: rows["test", method]["first"] for method in ("rows", "nearness", "words", "all four")}
    assert first["rows"] < 0.6 < first["nearness"] < first["words"] <= first["all four"] + 0.02
    assert rows["test", "all four"]["among_three"] > 0.95
    weights = rows["fitted", "all four"]["weights"]
    assert weights == rows["test", "all four"]["weights"]  # fitted once
    assert 0 < weights[0] < weights[2] and 0 < weights[1] < weights[2]


def test_kept_weights_are_those_of_the_record(monkeypatch, tmp_path):
    model = build_rows_model()
    folder = save_checkpoint(tmp_path / "model", model.hypernetwork, {"chunk_tokens": 32}, torch.float16)
    monkeypatch.setattr(chunks, "_ask", lambda _, source, n, seed, most: made(n, seed=len(source)))
    rows = chunks.run(None, 180, 0, "learned", "others", str(folder))
    of_rows, near, *words = next(row["weights"] for row in rows if row["method"] == "all four")
    kept, meta = load_checkpoint(folder)
    assert meta == {"chunk_tokens": 32}
    assert kept.reader.chunk_words.tolist() == pytest.approx([one / of_rows for one in words], rel=1e-2)
    assert float(kept.reader.chunk_weight[chunks._NEAREST]) == pytest.approx(near / of_rows, rel=1e-2)
    assert float(kept.reader.chunk_weight.abs().sum()) == pytest.approx(near / of_rows, rel=1e-2)
    for name, value in model.hypernetwork.named_parameters():  # nothing else is changed
        if name not in ("reader.chunk_words", "reader.chunk_weight"):
            assert torch.equal(dict(kept.named_parameters())[name], value.half().float()), name


def test_rows_that_tell_nothing_are_refused(monkeypatch, tmp_path):
    def without_rows(_, source, n, seed, most):
        asked = made(n, seed=len(source))
        return [chunks._Asked(one.parts * torch.tensor([-1.0, 1, 1, 1]), one.right) for one in asked]

    monkeypatch.setattr(chunks, "_ask", without_rows)
    folder = save_checkpoint(tmp_path / "model", build_rows_model().hypernetwork, {}, torch.float16)
    before = (folder / "hypernetwork.safetensors").read_bytes()
    with pytest.raises(ValueError, match="rows tell nothing"):
        chunks.run(None, 90, 0, "learned", "others", str(folder))
    assert (folder / "hypernetwork.safetensors").read_bytes() == before


def test_what_speaks_for_the_chunks_of_an_article(monkeypatch, tmp_path):
    monkeypatch.setattr(articles, "_SIZES", (100, 400))
    file, _ = squad_file(tmp_path, {"a": 4, "b": 5, "untitled": 4}, 40)
    asked = chunks._ask(build_rows_model(), f"squad={file}", 4, 0, 2)
    assert len(asked) == 4
    for one in asked:
        assert one.parts.shape == (len(one.right), 4) and one.parts.isfinite().all()
        assert one.right.any() and not one.right.all()
        assert (one.parts[:, 1:] >= 0).all()
    assert len(articles.questions_on_articles(f"squad={file}", 4, 0, 1)[0]) == 1
