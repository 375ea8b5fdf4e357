"""What is measured of token rows: equal words are equal, order changes nothing, summed adapters are refused."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import build_model, build_rows_model

from d2l_lib.analysis import rows, weights
from d2l_lib.formats.peft import merge

TEXT = "The museum opened in May. The museum has a bell."
OTHER = "A bee that has been far away runs in circles."


@pytest.fixture(scope="module")
def adapters():
    model = build_rows_model()
    return dict(zip(("one", "again", "other"), model.internalize_each([TEXT, TEXT, OTHER]), strict=True))


def test_parts_are_the_rows_by_role(adapters):
    (block,) = adapters["one"].blocks
    parts = rows.row_parts(adapters["one"])
    assert tuple(parts) == rows.PARTS == ("first", "inside", "end", "context", "words")
    for place, role in enumerate(rows.PARTS[:4]):
        torch.testing.assert_close(parts[role].float(), block.A["down_proj"][0, place::4])
    torch.testing.assert_close(parts["words"].float(), block.B["down_proj"][0, ::4])
    both = rows.row_parts(adapters["one"] + adapters["other"])
    assert len(both["words"]) == len(parts["words"]) + len(rows.row_parts(adapters["other"])["words"])


def test_spectra_are_those_of_the_matrices(adapters):
    table = rows.row_spectra(adapters)
    for (name, part), own in table.groupby(["adapter", "part"]):
        matrix = rows.row_parts(adapters[name])[part].numpy()
        values = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(own["value"], values, rtol=1e-6, atol=1e-9)
        assert own["share"].sum() == pytest.approx(1) and list(own["index"]) == list(range(1, len(values) + 1))


def test_ranks_count_tokens_words_and_directions(adapters):
    table = rows.row_ranks(adapters).set_index(["adapter", "part"])
    line = table.loc[("one", "context")]
    assert line["rows"] > line["different"] > 1, "some words stand there twice"
    assert line["norm"] == pytest.approx(line["size"] ** 0.5, rel=1e-3) and line["norm_spread"] < 1e-2
    for (name, part), own in table.iterrows():
        values = np.linalg.svd(rows.row_parts(adapters[name])[part].numpy(), compute_uv=False)
        assert own["effective_rank"] == pytest.approx(weights.effective_rank(values))
        assert 1 <= own["stable_rank"] <= own["effective_rank"] ** 2 and own["effective_rank"] <= own["size"]
    assert table.loc[("one", "words"), "stable_rank"] <= line["different"], "equal words add no direction"


@pytest.mark.parametrize("part", rows.PARTS)
def test_equal_texts_are_alike_in_any_order_and_others_are_less(adapters, part):
    table = rows.row_similarity(adapters, part, ordered=False)
    assert list(table.index) == ["one", "again", "other"] and (table.to_numpy() == table.to_numpy().T).all()
    assert table.loc["one", "again"] == pytest.approx(1) and np.diag(table) == pytest.approx(1)
    assert -1 <= table.loc["one", "other"] < 0.999
    assert set(rows.row_similarity(adapters, part).index) == set(adapters)


def test_shared_words_are_those_of_the_text(adapters):
    table = rows.shared_words(adapters)
    tokenizer = build_rows_model().tokenizer
    own, other = ({*tokenizer(text, add_special_tokens=False)["input_ids"]} for text in (TEXT, OTHER))
    assert table.loc["one", "again"] == 1
    assert table.loc["one", "other"] == pytest.approx(len(own & other) / len(own | other))


def test_parts_of_a_document_are_compared_with_those_of_others():
    names = ["a, 1", "a, 2", "b, 1"]
    table = pd.DataFrame([[1.0, 0.6, 0.2], [0.6, 1.0, 0.4], [0.2, 0.4, 1.0]], index=names, columns=names)
    means = rows.same_and_other(table)
    assert means["the same document"] == 0.6 and means["another document"] == pytest.approx(0.3)
    assert np.isnan(rows.same_and_other(table.iloc[1:, 1:])["the same document"])


def test_summed_and_empty_adapters_and_unknown_parts_are_refused(adapters):
    with pytest.raises(ValueError, match=r"summed.*analysis\.weights"):
        rows.row_parts(build_model().internalize(TEXT))
    with pytest.raises(ValueError, match="no documents"):
        rows.row_parts(adapters["one"].without(document="document 1"))
    with pytest.raises(ValueError, match="part must be one of first"):
        rows.row_similarity(adapters, "keys")
    with pytest.raises(ValueError, match="no adapter to compare"):
        rows.row_similarity({})


_OF_SUMS = {
    "spectra": weights.spectra,
    "norms": weights.norms,
    "norms over those of the base model": lambda one: weights.norms(one, build_rows_model().base_model),
    "bias_and_documents": weights.bias_and_documents,
    "block_energy": weights.block_energy,
    "block_norms": weights.block_norms,
    "similarity": lambda one: weights.similarity({"one": one, "other": one}),
    "intruder_dimensions": lambda one: weights.intruder_dimensions(one, build_rows_model().base_model),
    "by_direction": lambda one: weights.by_direction(one, [1]),
    "by_layer": weights.by_layer,
    "recompression": lambda one: weights.recompression(one, [1]),
    "compressed": lambda one: one.compressed(1),
    "as_lora": lambda one: one.as_lora(),
    "merge": lambda one: merge(build_rows_model(), one),
    "export_peft": lambda one: one.export_peft("never written"),
}


@pytest.mark.parametrize("name", _OF_SUMS)
def test_what_is_for_sums_says_so(adapters, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"holds token rows.*analysis\.rows measures it"):
        _OF_SUMS[name](adapters["one"])
    assert not list(tmp_path.iterdir())
