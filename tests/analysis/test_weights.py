"""Geometry from factors equals that of the update that is formed, and does not depend on which factors were chosen."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import build_base_model, build_model, logits_of

from d2l_lib.adapter import Adapter, Block, decompose, only_layers, singular_part
from d2l_lib.analysis import weights
from d2l_lib.tasks.world import Question

LAYERS, D_IN, D_OUT = 3, 12, 10
SIZES = {"down_proj": (D_IN, D_OUT), "up_proj": (D_OUT, D_IN)}


def random_adapter(seed: int = 0, chunks: int = 3, rank: int = 2, bias: bool = True, scale: float = 1.7) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def factors(module: str) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.randn(LAYERS, rank, size, generator=generator) for size in SIZES[module])

    blocks = []
    for chunk in range(chunks):
        pairs = {module: factors(module) for module in SIZES}
        A, B = ({module: pair[side] for module, pair in pairs.items()} for side in (0, 1))
        blocks.append(Block("document", chunk, (10 * chunk, 10 * chunk + 9), 1.0 + chunk, A, B))
    parts = {module: factors(module) for module in SIZES} if bias else None
    return Adapter(tuple(blocks), parts, scale, n_layers=LAYERS, sizes=SIZES)


def dense(adapter: Adapter, module: str) -> torch.Tensor:
    """The update [L, d_out, d_in] itself."""
    A, B = adapter.factors(module)
    return adapter.scale * B.double().mT @ A.double()


def one_direction(d_in: int, d_out: int, size: float = 1.0, layers: int = 1) -> Adapter:
    """An update of `size` at one place of the matrix."""
    A, B = torch.zeros(layers, 1, 4), torch.zeros(layers, 1, 4)
    A[:, 0, d_in], B[:, 0, d_out] = size, 1.0
    return Adapter((Block("document", 0, None, 1.0, {"down_proj": A}, {"down_proj": B}),), None, 1.0)


@pytest.mark.parametrize("scale", [1.7, -1.7])
@pytest.mark.parametrize("chunks", [3, 9])  # rank 8, and 20: more than the matrix has
def test_decomposition_is_that_of_the_formed_update(chunks, scale):
    adapter = random_adapter(chunks=chunks, scale=scale)
    for module in adapter.modules:
        U, S, V = decompose(adapter, module)
        assert S.shape == (LAYERS, min(adapter.rank, D_IN, D_OUT))
        torch.testing.assert_close(U * S.unsqueeze(1) @ V.mT, dense(adapter, module))
        eye = torch.eye(S.shape[1], dtype=torch.float64).expand(LAYERS, -1, -1)
        torch.testing.assert_close(U.mT @ U, eye)
        torch.testing.assert_close(V.mT @ V, eye)
    table = weights.spectra(adapter)
    for (module, layer), group in table.groupby(["module", "layer"]):
        expected = torch.linalg.svdvals(dense(adapter, module)[layer])[: len(group)]
        assert group["value"].to_numpy() == pytest.approx(expected.numpy())
        assert list(group["index"]) == list(range(1, len(group) + 1))
        assert group["share"].sum() == pytest.approx(1)


def test_ranks_of_known_spectra():
    assert weights.effective_rank([3.0, 3.0, 3.0, 0.0]) == pytest.approx(3)
    assert weights.effective_rank([5.0]) == pytest.approx(1)
    p = np.array([0.75, 0.25])
    assert weights.effective_rank([3.0, 1.0]) == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert weights.stable_rank([3.0, 1.0]) == pytest.approx(10 / 9)
    assert weights.effective_rank([0.0, 0.0]) == weights.stable_rank([0.0]) == 0
    with pytest.raises(ValueError, match="not negative"):
        weights.effective_rank([1.0, -1.0])


def test_norms_are_those_of_the_formed_update_and_of_the_base_weight():
    model = build_model()
    adapter = model.internalize("Ada was born in Oldfield. The mill is closed.")
    table = weights.norms(adapter, model.base_model)
    for row in table.to_dict("records"):
        update = dense(adapter, row["module"])[row["layer"]]
        W = model.base_model.model.layers[row["layer"]].mlp.down_proj.weight.double()
        assert row["frobenius"] == pytest.approx(float(update.norm()))
        assert row["spectral"] == pytest.approx(float(torch.linalg.matrix_norm(update, 2)))
        assert row["relative_frobenius"] == pytest.approx(float(update.norm() / W.norm()))
        assert row["relative_spectral"] == pytest.approx(
            float(torch.linalg.matrix_norm(update, 2) / torch.linalg.matrix_norm(W, 2))
        )
        assert row["stable_rank"] == pytest.approx(row["frobenius"] ** 2 / row["spectral"] ** 2)
    assert len(table) == adapter.n_layers


def test_other_factors_of_the_same_update_have_the_same_geometry():
    adapter = random_adapter()
    generator = torch.Generator().manual_seed(7)
    blocks = []
    for block in adapter.blocks:
        M = torch.randn(block.rank, block.rank, generator=generator)
        A = {module: M @ rows for module, rows in block.A.items()}
        B = {module: torch.linalg.inv(M).mT @ rows for module, rows in block.B.items()}
        blocks.append(replace(block, A=A, B=B))
    other = replace(adapter, blocks=tuple(blocks))
    for table in (weights.spectra, weights.norms, weights.bias_and_documents, weights.block_energy):
        pd.testing.assert_frame_equal(table(adapter), table(other), rtol=1e-4)
    for measure in ("cosine", "left", "right"):
        alike = weights.similarity({"one": adapter, "other": other}, measure, rank=3)
        assert alike.to_numpy() == pytest.approx(np.ones((2, 2)), abs=1e-5)


def test_parts_add_up_to_the_whole():
    adapter = random_adapter()
    table = weights.bias_and_documents(adapter)
    for row in table.to_dict("records"):
        whole = dense(adapter, row["module"])[row["layer"]]
        bias = dense(replace(adapter, blocks=()), row["module"])[row["layer"]]
        assert row["whole"] == pytest.approx(float(whole.norm()))
        assert row["bias"] == pytest.approx(float(bias.norm()))
        assert row["documents"] == pytest.approx(float((whole - bias).norm()))
        cosine = float(((whole - bias) * bias).sum() / (whole - bias).norm() / bias.norm())
        assert row["cosine"] == pytest.approx(cosine)
    without = weights.bias_and_documents(random_adapter(bias=False))
    assert (without["bias"] == 0).all() and without["cosine"].isna().all()


def test_shares_of_blocks_add_up_and_follow_their_labels():
    adapter = random_adapter()
    table = weights.block_energy(adapter)
    assert table.groupby(["module", "layer"])["share"].sum().to_numpy() == pytest.approx(np.ones(2 * LAYERS))
    row = table[(table["chunk"] == 2) & (table["module"] == "up_proj") & (table["layer"] == 1)].iloc[0]
    block = dense(replace(adapter.only(chunk=2), bias=None), "up_proj")[1]
    whole = dense(replace(adapter, bias=None), "up_proj")[1]
    assert (row["document"], row["start"], row["end"]) == ("document", 20, 29)
    assert row["norm"] == pytest.approx(float(block.norm()))
    assert row["share"] == pytest.approx(float((block * whole).sum() / whole.square().sum()))
    norms = weights.block_norms(adapter)
    everywhere = sum(dense(replace(adapter.only(chunk=2), bias=None), m).square().sum() for m in adapter.modules)
    assert norms["chunk"].tolist() == [0, 1, 2]
    assert norms["norm"].iloc[2] == pytest.approx(math.sqrt(float(everywhere)))
    with pytest.raises(ValueError, match="holds no documents"):
        weights.block_energy(replace(adapter, blocks=()))


def test_cosines_are_those_of_the_formed_updates():
    adapters = {"one": random_adapter(0), "two": random_adapter(1), "opposite": random_adapter(0).scaled(-1.0)}
    for bias in (True, False):
        table = weights.similarity(adapters, bias=bias, ordered=False)
        flat = {
            name: torch.cat([dense(a if bias else replace(a, bias=None), m).flatten() for m in a.modules])
            for name, a in adapters.items()
        }
        for one, x in flat.items():
            for other, y in flat.items():
                assert table.loc[one, other] == pytest.approx(float(x @ y / x.norm() / y.norm()))
    assert table.loc["one", "opposite"] == pytest.approx(-1)


def test_overlaps_are_those_of_the_formed_updates():
    adapters = {"one": random_adapter(0), "two": random_adapter(1)}
    for measure in ("left", "right"):
        value = weights.similarity(adapters, measure, rank=3, bias=True).loc["one", "two"]
        shares = []
        for module in SIZES:
            for layer in range(LAYERS):
                decomposed = [torch.linalg.svd(dense(a, module)[layer], full_matrices=False) for a in adapters.values()]
                x, y = (U[:, :3] if measure == "left" else Vh[:3].mT for U, _, Vh in decomposed)
                shares.append(float((x.mT @ y).square().sum()) / 3)
        assert value == pytest.approx(np.mean(shares))


def test_orthogonal_updates_have_nothing_in_common():
    adapters = {"one": one_direction(0, 0), "same input": one_direction(0, 1), "all": one_direction(0, 0, 5.0)}
    assert weights.similarity(adapters).loc["one", "same input"] == 0
    assert weights.similarity(adapters).loc["one", "all"] == pytest.approx(1)
    assert weights.similarity(adapters, "left", rank=1).loc["one", "same input"] == pytest.approx(0)
    assert weights.similarity(adapters, "right", rank=1).loc["one", "same input"] == pytest.approx(1)


def test_alike_adapters_stand_together():
    names = list("abcdef")
    kind = {"a": 0, "b": 1, "c": 0, "d": 1, "e": 2, "f": 0}
    table = pd.DataFrame(
        [[1.0 if x == y else 0.9 if kind[x] == kind[y] else 0.1 for y in names] for x in names], names, names
    )
    order = weights.cluster_order(table)
    assert sorted(order) == names
    kinds = [kind[name] for name in order]
    assert sum(x != y for x, y in zip(kinds, kinds[1:], strict=False)) == 2
    with pytest.raises(ValueError, match="same names on both sides"):
        weights.cluster_order(table.loc[:, names[::-1]])


def test_what_cannot_be_compared_is_named():
    adapter = random_adapter()
    with pytest.raises(ValueError, match="'nothing' is zero"):
        weights.similarity({"nothing": adapter.scaled(0.0), "one": adapter})
    with pytest.raises(ValueError, match="'other' and 'one' are adapters for different base models"):
        weights.similarity({"one": adapter, "other": one_direction(0, 0)})
    with pytest.raises(ValueError, match="has 1 directions in down_proj, fewer than rank=2"):
        weights.similarity({"one": one_direction(0, 0)}, "left", rank=2)
    with pytest.raises(ValueError, match="must be 'cosine'"):
        weights.similarity({"one": adapter}, "angle")
    with pytest.raises(ValueError, match="no adapter"):
        weights.similarity({})
    with pytest.raises(ValueError, match="holds the bias inside"):
        weights.bias_and_documents(adapter.compressed(2))
    with pytest.raises(ValueError, match="is empty"):
        weights.spectra(replace(adapter, blocks=(), bias=None))


def test_intruders_are_the_directions_that_the_base_weight_lacks():
    """W = diag(8, 4, 2, 1, ...): more of a direction of its own makes no intruder, a strong mixture of many does."""
    base_model = build_base_model(n_layers=1)
    W = base_model.model.layers[0].mlp.down_proj.weight  # [32, 48]
    with torch.no_grad():
        W.copy_(torch.diag(2.0 ** torch.arange(32)).flip(0, 1)[:, :32] @ torch.eye(32, 48) / 2**28)

    def update(direction: torch.Tensor, size: float) -> Adapter:
        A, B = torch.zeros(1, 1, 48), (direction / direction.norm()).view(1, 1, 32)
        A[0, 0, 47] = size  # an input that W does not use
        return Adapter((Block("document", 0, None, 1.0, {"down_proj": A}, {"down_proj": B}),), None, 1.0)

    along = weights.intruder_dimensions(update(torch.eye(32)[3], 100.0), base_model, top=5)
    assert not along["intruder"].any() and along["cosine"].to_numpy() == pytest.approx(np.ones(5))
    mixed = weights.intruder_dimensions(update(torch.ones(32), 1000.0), base_model, top=5)
    assert list(mixed["index"]) == [1, 2, 3, 4, 5]
    assert mixed["value"].iloc[0] == pytest.approx(1000.0, rel=1e-2)
    assert bool(mixed["intruder"].iloc[0])
    assert mixed["cosine"].iloc[0] == pytest.approx(1 / math.sqrt(32), rel=0.05)
    strict = weights.intruder_dimensions(update(torch.ones(32), 1000.0), base_model, top=1, threshold=0.1)
    assert not strict["intruder"].any()
    nothing = weights.intruder_dimensions(update(torch.ones(32), 0.0), base_model)
    assert nothing["cosine"].to_numpy() == pytest.approx(np.ones(10))
    with pytest.raises(ValueError, match="was it made for another model"):
        weights.intruder_dimensions(one_direction(0, 0), base_model)


def test_singular_parts_add_up_and_the_first_is_the_compressed_adapter():
    adapter = random_adapter()
    first, rest = singular_part(adapter, 0, 3), singular_part(adapter, 3)
    for module in adapter.modules:
        torch.testing.assert_close(dense(first, module), dense(adapter.compressed(3), module), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            dense(first, module) + dense(rest, module), dense(adapter, module), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ValueError, match="no directions 8 to None"):
        singular_part(adapter, 8)


def test_a_model_says_the_same_with_all_directions_and_something_else_without_the_first():
    model = build_model()
    adapter = model.internalize("Ada was born in Oldfield.")
    whole = logits_of(model, adapter)
    torch.testing.assert_close(logits_of(model, singular_part(adapter)), whole, rtol=1e-3, atol=1e-3)
    assert (logits_of(model, singular_part(adapter, 1)) - whole).abs().max() > 0.01


@pytest.mark.parametrize("bias", [True, False])
def test_other_layers_write_nothing_and_these_the_same(bias):
    adapter = random_adapter(bias=bias)
    part = only_layers(adapter, [0, 2])
    for module in adapter.modules:
        torch.testing.assert_close(dense(part, module)[[0, 2]], dense(adapter, module)[[0, 2]])
        assert not dense(part, module)[1].any()
    assert weights.norms(part)["effective_rank"].iloc[1] == 0
    with pytest.raises(ValueError, match=r"no layer \[3\]"):
        only_layers(adapter, [0, 3])


def test_error_of_a_smaller_rank_is_that_of_the_formed_update():
    adapter = random_adapter()
    table = weights.recompression(adapter, [1, 3, 8, 50]).set_index("rank")
    for rank in (1, 3):
        small = adapter.compressed(rank)
        lost = sum(float((dense(adapter, m) - dense(small, m)).square().sum()) for m in SIZES)
        whole = sum(float(dense(adapter, m).square().sum()) for m in SIZES)
        assert table.loc[rank, "error"] == pytest.approx(math.sqrt(lost / whole), rel=1e-5)
        assert table.loc[rank, "bytes"] == sum(t.nbytes for t in small._tensors())
    assert table.loc[8, "error"] == table.loc[50, "error"] == 0
    assert table.loc[50, "bytes"] == adapter.nbytes
    with pytest.raises(ValueError, match="rank"):
        weights.recompression(adapter, [0])
    with pytest.raises(ValueError, match="no rank to try"):
        weights.recompression(adapter, [])


def test_exact_match_counts_whole_answers_with_the_adapter_that_was_given():
    model = build_model()
    adapter = model.internalize("Ada was born in Oldfield.")
    texts = ["Who is it?", "Where was Ada born?"]
    with_it, without = model.answer(texts, adapter), model.answer(texts, None)
    assert with_it != without
    asked = [Question(text, answer, "one_hop") for text, answer in zip(texts, with_it, strict=True)]
    assert weights.exact_match(model, asked, adapter) == 1
    assert weights.exact_match(model, asked, [adapter, adapter]) == 1
    expected = sum(a == b for a, b in zip(with_it, without, strict=True)) / 2
    assert weights.exact_match(model, asked, None) == expected < 1
    with pytest.raises(ValueError, match="no question"):
        weights.exact_match(model, [], adapter)


def test_parts_are_asked_by_their_names():
    model = build_model()
    adapter = model.internalize("Ada was born in Oldfield.")
    texts = ["Who is it?", "Where was Ada born?"]
    asked = [
        Question(text, answer, "one_hop") for text, answer in zip(texts, model.answer(texts, adapter), strict=True)
    ]
    parts = weights.by_origin(adapter) | weights.by_layer(adapter) | weights.by_direction(adapter, [1])
    assert set(parts) == {
        "both",
        "documents without the bias",
        "bias alone",
        (1, "first k"),
        (1, "all but the first k"),
    } | {(layer, kept) for layer in range(adapter.n_layers) for kept in ("only this layer", "all but this layer")}
    first = parts[1, "first k"]
    for module in adapter.modules:
        assert torch.linalg.matrix_rank(dense(first, module), rtol=1e-6).max() == 1
        torch.testing.assert_close(
            dense(first, module) + dense(parts[1, "all but the first k"], module), dense(adapter, module)
        )
    for name in ("both", (0, "only this layer")):
        assert weights.ask_parts(model, texts, {name: parts[name]}).iloc[0].tolist() == model.answer(texts, parts[name])
    shares = weights.shares_right(model, asked, weights.by_origin(adapter))
    assert shares["both"] == 1
    assert shares["bias alone"] == weights.exact_match(model, asked, parts["bias alone"])
    counts = weights.count_intruders(weights.by_origin(adapter), model.base_model)
    assert counts["both"] == weights.intruder_dimensions(adapter, model.base_model)["intruder"].sum()


def test_blocks_of_the_evidence_are_left_out_and_the_largest_other():
    model = build_model()
    text = "Ada was born in Oldfield. Tom keeps three cats. The lamp was painted."
    adapter = model.internalize(text, chunk_tokens=8)
    blocks = weights.block_norms(adapter)
    assert len(blocks) > 2
    start, end = blocks.loc[1, ["start", "end"]].astype(int)
    assert weights.overlap(blocks, [(start, start + 1)]) == [place == 1 for place in range(len(blocks))]
    assert not any(weights.overlap(blocks, []))
    others = blocks.drop(1)
    largest = int(others.loc[others["norm"].idxmax(), "chunk"])
    chunk = int(blocks.loc[1, "chunk"])
    left_out = [adapter, adapter.without(chunk=chunk), adapter.without(chunk=largest), adapter.only(chunk=chunk)]
    answers = model.answer(["Who is it?"] * 4, left_out)
    for place, answer in enumerate(answers):
        question = Question("Who is it?", answer, "one_hop", evidence=((start, end),))
        (row,) = weights.ask_without_blocks(model, [question], adapter).to_numpy().tolist()
        assert row[place] and row == [one == answer for one in answers]


def test_variants_are_compared_with_their_own_documents():
    names = ["1", "2", "1, shuffled", "2, shuffled"]
    table = pd.DataFrame([[1, 0.2, 0.9, 0], [0.2, 1, 0, 0.7], [0.9, 0, 1, 0], [0, 0.7, 0, 1]], names, names)
    assert weights.compare_variants(table).to_dict() == {"another document": 0.2, "shuffled": 0.8, "itself": 1}
    model = build_model()
    adapters = dict(zip(names, model.internalize_each(["Ada.", "Tom keeps cats.", "Oldfield.", "Lamps."]), strict=True))
    asked = {name: [Question("Who?", model.answer("Who?", adapters[name]), "one_hop")] for name in ("1", "2")}
    shares = weights.ask_variants(model, asked, adapters)
    assert shares["itself"] == 1
    crossed = [weights.exact_match(model, asked[one], adapters[other]) for one, other in (("1", "2"), ("2", "1"))]
    assert shares["another document"] == sum(crossed) / 2
