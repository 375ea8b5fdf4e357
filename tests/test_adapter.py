"""An adapter is a sum of labelled blocks, and a value."""

import json
import pickle
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from fuzz_files import split_safetensors, with_header
from safetensors import safe_open
from tiny_models import build_model, held, logits_of

from d2l_lib.adapter import Adapter, Block, only_layers, scaled_layers, singular_part, stack_factors

N_LAYERS, SIZES, RANK = 3, {"down_proj": (6, 5), "q_proj": (5, 4)}, 2


def random_factors(generator, rank=RANK):
    make = lambda size: torch.randn(N_LAYERS, rank, size, generator=generator)  # noqa: E731
    return {m: make(d_in) for m, (d_in, _) in SIZES.items()}, {m: make(d_out) for m, (_, d_out) in SIZES.items()}


def build_adapter(names=("a", "b"), n_chunks=2, seed=0, bias=True, **fields) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    bias_A, bias_B = random_factors(torch.Generator().manual_seed(99))
    blocks = [
        Block(name, chunk, (10 * chunk, 10 * chunk + 10), 1.0, *random_factors(generator))
        for name in names
        for chunk in range(n_chunks)
    ]
    values = {"scale": 2.5, "base_key": "base", "hypernetwork_key": "hyper"} | fields
    return Adapter(tuple(blocks), {m: (bias_A[m], bias_B[m]) for m in SIZES} if bias else None, **values)


def update(adapter, module):
    """The change of W, [L, d_out, d_in], formed whole (only a test may)."""
    A, B = adapter.factors(module)
    return adapter.scale * B.mT.double() @ A.double()


def same_update(first, second, tolerance=1e-6):
    return all(torch.allclose(update(first, m), update(second, m), atol=tolerance) for m in SIZES)


def learning(adapter):
    """The adapter with a first block that asks for gradients."""
    first = adapter.blocks[0]
    block = replace(first, A={m: t.clone().requires_grad_() for m, t in first.A.items()})
    return replace(adapter, blocks=(block, *adapter.blocks[1:]))


def snapshot(adapter):
    return [tensor.clone() for tensor in adapter._tensors()], repr(adapter)


# --- what is inside ---------------------------------------------------------------------------------------------------


def test_contents():
    adapter = build_adapter()
    assert adapter.documents == ["a", "b"]
    assert adapter.modules == ["down_proj", "q_proj"]
    assert adapter.rank == 5 * RANK
    assert adapter.nbytes == 4 * 5 * N_LAYERS * RANK * (6 + 5 + 5 + 4)
    assert [(b.document, b.chunk, b.span) for b in adapter.blocks[:2]] == [("a", 0, (0, 10)), ("a", 1, (10, 20))]


def test_factors_are_the_sum_of_blocks_and_bias():
    adapter = build_adapter().scaled(0.5, document="b").scaled_bias(3.0)
    for module, (d_in, d_out) in SIZES.items():
        A, B = adapter.factors(module)
        assert A.shape == (N_LAYERS, adapter.rank, d_in)
        assert B.shape == (N_LAYERS, adapter.rank, d_out)
        expected = 3.0 * adapter.bias[module][1].mT @ adapter.bias[module][0]
        for block in adapter.blocks:
            expected = expected + block.weight * block.B[module].mT @ block.A[module]
        assert torch.allclose(B.mT @ A, expected, atol=1e-5)


def test_order_of_blocks_changes_nothing():
    adapter = build_adapter()
    turned = Adapter(adapter.blocks[::-1], adapter.bias, adapter.scale)
    assert same_update(adapter, turned)


def test_frozen():
    adapter = build_adapter()
    with pytest.raises(AttributeError):
        adapter.scale = 1.0
    with pytest.raises(AttributeError):
        adapter.blocks[0].weight = 2.0


def test_no_operation_changes_its_operand(tmp_path):
    adapter, other = build_adapter(), build_adapter(("c",), seed=1)
    before = snapshot(adapter)
    adapter + other  # noqa: B018
    adapter.only(document="a")
    adapter.without(document="a")
    adapter.scaled(0.1)
    adapter.scaled_bias(0.1)
    adapter.compressed(2)
    adapter.to(dtype=torch.float16)
    adapter.save(tmp_path / "x")
    adapter.export_peft(tmp_path / "y")
    A, B = adapter.only(document="a", chunk=0).factors("q_proj")
    A.zero_()
    B.zero_()
    after = snapshot(adapter)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1] == after[1]


# --- sums and selections ----------------------------------------------------------------------------------------------


def test_sum_keeps_the_bias_once():
    a, b = build_adapter(("a",)), build_adapter(("b",), seed=1)
    both = a + b
    assert both.documents == ["a", "b"]
    assert both.rank == a.rank + b.rank - RANK
    bias_only = a.without(document="a")
    for m in SIZES:
        assert torch.allclose(update(both, m), update(a, m) + update(b, m) - update(bias_only, m), atol=1e-5)
    assert sum([a, b]) == both


def test_without_is_exactly_never_added():
    a, b = build_adapter(("a",)), build_adapter(("b",), seed=1)
    assert (a + b).without(document="b") == a
    for module in SIZES:
        for removed, never in zip((a + b).without(document="b").factors(module), a.factors(module), strict=True):
            assert torch.equal(removed, never)


def test_only_and_without_are_complements():
    adapter = build_adapter(("a", "b", "c"), n_chunks=3)
    assert [b.document for b in adapter.only(document=["a", "c"]).blocks] == ["a"] * 3 + ["c"] * 3
    assert [(b.document, b.chunk) for b in adapter.only(chunk=1).blocks] == [("a", 1), ("b", 1), ("c", 1)]
    assert [(b.document, b.chunk) for b in adapter.only(document="b", chunk=[0, 2]).blocks] == [("b", 0), ("b", 2)]
    for choice in ({"document": "a"}, {"chunk": 2}, {"document": ["a", "b"], "chunk": 0}):
        inside, outside = adapter.only(**choice), adapter.without(**choice)
        assert len(inside) + len(outside) == len(adapter)
        assert same_update(inside + outside, adapter, 1e-5)


def test_parts_of_one_document_join_again():
    adapter = build_adapter(("a",), n_chunks=3)
    assert adapter.only(chunk=0) + adapter.only(chunk=[1, 2]) == adapter


def test_taken_names_are_numbered():
    a, b = build_adapter(("a",)), build_adapter(("a", "a (2)"), seed=1)
    both = a + b + a
    assert both.documents == ["a", "a (3)", "a (2)", "a (4)"]
    assert both.without(document=["a (3)", "a (2)", "a (4)"]) == a


@pytest.mark.parametrize("operation", ["only", "without"])
def test_unknown_names_list_what_is_inside(operation):
    adapter = build_adapter()
    with pytest.raises(ValueError, match=r"'zebra'.*'a' \(2 chunks\), 'b' \(2 chunks\)"):
        getattr(adapter, operation)(document="zebra")
    with pytest.raises(ValueError, match=r"no chunk 7.*'a' \(2 chunks\)"):
        getattr(adapter, operation)(document="a", chunk=7)
    with pytest.raises(ValueError, match="name a document or a chunk"):
        getattr(adapter, operation)()


def test_all_documents_removed_leaves_the_bias():
    empty = build_adapter().without(document=["a", "b"])
    assert empty.rank == RANK
    assert empty.documents == []
    assert empty
    with pytest.raises(ValueError, match="holds no documents"):
        empty.without(document="a")


def test_weights_are_linear():
    adapter = build_adapter(bias=False)
    for module in SIZES:
        assert torch.allclose(update(adapter.scaled(0.5), module), 0.5 * update(adapter, module))
        assert torch.allclose(update(adapter.scaled(-1), module), -update(adapter, module))
    assert adapter.scaled(0.5).scaled(2) == adapter
    assert adapter.scaled(0).rank == adapter.rank


def test_weight_of_one_document_leaves_the_others_and_the_bias():
    adapter = build_adapter()
    assert [b.weight for b in adapter.scaled(0.25, document="b").blocks] == [1, 1, 0.25, 0.25]
    assert adapter.scaled(0.25).bias_weight == 1
    assert adapter.scaled_bias(0.5).bias_weight == 0.5
    assert [b.weight for b in adapter.scaled_bias(0.5).blocks] == [1] * 4
    assert same_update(adapter.scaled_bias(0), Adapter(adapter.blocks, None, adapter.scale))


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "2", None, True])
def test_weights_must_be_finite_numbers(weight):
    with pytest.raises(ValueError, match="finite number"):
        build_adapter().scaled(weight)
    with pytest.raises(ValueError, match="finite number"):
        build_adapter().scaled_bias(weight)


def test_adapters_that_do_not_belong_together():
    adapter = build_adapter()
    with pytest.raises(ValueError, match="different base models"):
        adapter + build_adapter(base_key="other")
    with pytest.raises(ValueError, match="different hypernetworks"):
        adapter + build_adapter(hypernetwork_key="other")
    with pytest.raises(ValueError, match="different hypernetworks"):
        adapter + build_adapter(bias=False)
    with pytest.raises(ValueError, match="different scales"):
        adapter + build_adapter(scale=1.0)
    with pytest.raises(ValueError, match="scaled_bias"):
        adapter + adapter.scaled_bias(0.5)
    with pytest.raises(ValueError, match="3 layers.*2 layers"):
        fewer = {m: torch.zeros(2, 1, d_in) for m, (d_in, _) in SIZES.items()}
        other = {m: torch.zeros(2, 1, d_out) for m, (_, d_out) in SIZES.items()}
        adapter + Adapter((Block("x", 0, None, 1.0, fewer, other),), None, 2.5)
    with pytest.raises(TypeError):
        adapter + 3


def test_shapes_are_checked():
    block = build_adapter().blocks[0]
    with pytest.raises(ValueError, match="down_proj: A is"):
        Adapter((block,), None, 1.0, n_layers=4, sizes=SIZES)
    with pytest.raises(ValueError, match="modules"):
        Adapter((block,), None, 1.0, n_layers=3, sizes={"down_proj": (6, 5)})
    with pytest.raises(ValueError, match="without blocks and bias"):
        Adapter((), None, 1.0)


def test_unknown_module_lists_the_known():
    with pytest.raises(ValueError, match="'up_proj'.*down_proj, q_proj"):
        build_adapter().factors("up_proj")


def test_empty_adapter_has_empty_factors():
    adapter = Adapter((), None, 1.0, n_layers=3, sizes=SIZES)
    A, B = adapter.factors("down_proj")
    assert (A.shape, B.shape) == ((3, 0, 6), (3, 0, 5))


# --- compression ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 10, 50])
def test_compression_is_the_best_of_its_rank(rank):
    adapter = build_adapter().scaled(0.3, document="a")
    small = adapter.compressed(rank)
    assert small.rank == min(rank, adapter.rank)
    for module in SIZES:
        U, S, Vh = torch.linalg.svd(update(adapter, module), full_matrices=False)
        best = U[..., :rank] * S[:, None, :rank] @ Vh[:, :rank]
        assert torch.allclose(update(small, module), best, atol=1e-5)


def test_compressed_holds_the_bias_and_cannot_be_added():
    adapter = build_adapter()
    small = adapter.compressed(3)
    assert small.bias is None
    assert "a, b" in small.documents[0]
    for first, second in ((small, adapter), (adapter, small), (small, small)):
        with pytest.raises(ValueError, match="add first, compress the sum"):
            first + second
    with pytest.raises(ValueError, match="folded into the compressed block"):
        small.scaled_bias(0.5)
    assert small.compressed(2).bias_inside


@pytest.mark.parametrize("rank", [0, -1, 2.0, True])
def test_compression_rank_is_checked(rank):
    with pytest.raises(ValueError, match="rank must be"):
        build_adapter().compressed(rank)


# --- files ------------------------------------------------------------------------------------------------------------


def test_save_and_load_are_bit_equal(tmp_path):
    adapter = build_adapter(("a</script>", "ü")).scaled(0.1, document="ü").scaled_bias(0.7)
    path = adapter.save(tmp_path / "x.safetensors")
    loaded = Adapter.load(path)
    assert loaded == adapter
    assert repr(loaded) == repr(adapter)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_round_trip_of_special_adapters(tmp_path):
    adapter = build_adapter()
    ids_only = Adapter((Block("x", 0, None, 1.0, adapter.blocks[0].A, adapter.blocks[0].B),), None, 1.0)
    empty = Adapter((), None, 1.0, n_layers=3, sizes=SIZES)
    bias_only, half = adapter.without(document=["a", "b"]), adapter.to(dtype=torch.bfloat16)
    for one in (adapter.compressed(2), bias_only, ids_only, empty, half):
        assert Adapter.load(one.save(tmp_path / "x")) == one


def test_shared_tensors_are_stored_once(tmp_path):
    block = build_adapter().blocks[0]
    repeated = Adapter(tuple(Block("a", i, None, 1.0, block.A, block.B) for i in range(50)), None, 1.0)
    single = Adapter(repeated.blocks[:1], None, 1.0)
    assert repeated.nbytes == single.nbytes
    size = repeated.save(tmp_path / "x").stat().st_size
    assert size < 50 * single.nbytes
    assert Adapter.load(tmp_path / "x") == repeated


def test_many_blocks_lie_in_few_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr("d2l_lib.adapter._OWN_TENSORS", 20)
    adapter = build_adapter(n_chunks=20)
    repeated = replace(adapter.blocks[3], chunk=70)
    other = Block("c", 0, None, 0.5, *random_factors(torch.Generator().manual_seed(3), rank=4))
    adapter = replace(adapter, blocks=(*adapter.blocks, repeated, other))
    with safe_open(adapter.save(tmp_path / "x"), framework="pt") as file:
        shapes = sorted(tuple(file.get_tensor(name).shape) for name in file.keys())  # noqa: SIM118
    assert len(shapes) == 8 and shapes[-1] == (41, N_LAYERS, RANK, 6), "those of 40 blocks and the bias, and of one"
    loaded = Adapter.load(tmp_path / "x")
    assert loaded == adapter and loaded.nbytes == adapter.nbytes
    assert loaded.blocks[3].A["q_proj"] is loaded.blocks[-2].A["q_proj"]
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded._tensors()}) <= 8, "nothing was copied"
    header, data = split_safetensors((tmp_path / "x").read_bytes())
    text = header["__metadata__"]["d2l-adapter"]
    assert json.loads(text)["version"] == 2
    for name in (":41", ":-1", ":", ":0x1", ":9999999999"):
        labels = json.loads(text)
        stack = labels["blocks"][3]["A"]["q_proj"].partition(":")[0]
        labels["blocks"][3]["A"]["q_proj"] = stack + name
        wrong = header | {"__metadata__": {"d2l-adapter": json.dumps(labels)}}
        (tmp_path / "y").write_bytes(with_header(json.dumps(wrong), data))
        with pytest.raises(ValueError, match=r"are missing"):
            Adapter.load(tmp_path / "y")


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    adapter = build_adapter()
    path = adapter.save(tmp_path / "x")

    def fail(name, *_):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("d2l_lib.formats.tensors.write_parts", fail)
    monkeypatch.setattr("safetensors.torch.save_file", lambda tensors, name, metadata: fail(name))
    with pytest.raises(OSError, match="No space"):
        adapter.scaled(2).save(path)
    with pytest.raises(OSError, match="No space"):
        adapter.export_peft(tmp_path / "peft")
    assert Adapter.load(path) == adapter
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("modules", [("down_proj",), ("down_proj", "q_proj", "v_proj")])
def test_peft_gives_the_same_logits(tmp_path, modules):
    peft = pytest.importorskip("peft")
    model = build_model(modules)
    adapter = model.internalize({"a": "One thing. Two things.", "b": "Three."}, chunk_tokens=12)
    adapter = adapter.scaled(0.5, document="a").scaled_bias(0.7)
    ours = logits_of(model, adapter)
    base = logits_of(model, None)
    folder = adapter.export_peft(tmp_path / "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["use_rslora"] is False
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    wrapped = peft.PeftModel.from_pretrained(model.base_model, folder)
    with torch.no_grad():
        theirs = wrapped(torch.tensor([model.tokenizer("Who is it?")["input_ids"]])).logits
    assert (ours - base).abs().max() > 0.1
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


def test_export_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to export"):
        Adapter((), None, 1.0, n_layers=3, sizes=SIZES).export_peft(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


# --- display and stacking ---------------------------------------------------------------------------------------------


def test_print_shows_what_is_inside():
    text = repr(build_adapter().scaled(0.5, document="b"))
    for part in ("2 documents, 4 chunks", "rank 10", "3 layers", "a: 2 chunks, rank 4", "weight 0.5", "(bias)"):
        assert part in text
    many = repr(build_adapter([f"name {i}" for i in range(100)]))
    assert len(many.splitlines()) < 15
    assert "90 more" in many


def test_html_is_escaped():
    page = build_adapter(("<script>alert(1)</script>", "b"))._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_stack_fills_up_with_zero_rows():
    a, b = learning(build_adapter(("a",))), learning(build_adapter(("b", "c"), seed=1))  # so they are not added up
    loras, scale, layers = stack_factors([a, None, b])
    A, B = loras["q_proj"]
    assert scale == a.scale and layers is None
    assert A.shape == (3, N_LAYERS, b.rank, 5)
    assert torch.equal(A[0, :, : a.rank], a.factors("q_proj")[0])
    assert not A[0, :, a.rank :].any()
    assert not A[1].any()
    assert not B[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_of_a_large_rank_is_added_up_once(dtype):
    small = build_adapter(("a",), n_chunks=1, bias=False)
    many = build_adapter(("b", "c"), n_chunks=20, seed=1).scaled(0.5, document="c").to(dtype=dtype)
    d_out = SIZES["q_proj"][1]
    assert small.rank < d_out <= many.rank
    loras, scale, _ = stack_factors([small.to(dtype=dtype), None, many])
    alone, *_ = stack_factors([many])
    A, B = loras["q_proj"]
    assert A.shape[2] == d_out and alone["q_proj"][0].shape[2] == d_out and A.dtype == dtype
    expected = update(many, "q_proj").float() / scale
    for formed in (B[2].mT @ A[2], alone["q_proj"][1][0].mT @ alone["q_proj"][0][0]):
        assert torch.allclose(
            formed.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.05 * expected.abs().max()
        )
    again, *_ = stack_factors([many])
    assert again["q_proj"][0].data_ptr() == alone["q_proj"][0].data_ptr(), "formed once"
    part, *_ = stack_factors([many.without(document="c")])
    own = update(many.without(document="c"), "q_proj").float() / scale
    formed = (part["q_proj"][1][0].mT @ part["q_proj"][0][0]).float()
    assert (formed - own).abs().max() < (formed - expected).abs().max() / 10, "a part has a sum of its own"
    learned, *_ = stack_factors([learning(many)])
    assert learned["q_proj"][0].shape[2] == many.rank, "what learns stays as it is"


@pytest.mark.parametrize("first", [torch.inference_mode, partial(torch.autocast, "cpu", torch.bfloat16)])
@pytest.mark.parametrize("part", ["applied", "stacked", "keys"])
def test_what_is_kept_does_not_depend_on_the_first_pass(first, part):
    def made(adapter: Adapter) -> torch.Tensor:
        if part == "applied":
            return stack_factors([adapter])[0]["q_proj"][0]
        return adapter.stacked["q_proj"][0] if part == "stacked" else adapter.keys_of(1)["q_proj"]

    adapter = build_adapter(("b",), n_chunks=20)
    with first():
        made(adapter)
    kept, other = made(adapter), made(build_adapter(("b",), n_chunks=20))
    assert torch.equal(kept, other) and kept.dtype == other.dtype and not kept.is_inference()


def test_a_sum_that_inference_formed_serves_a_pass_with_gradients():
    many = build_adapter(("b",), n_chunks=20)
    with torch.inference_mode():
        stack_factors([many])
    (A, B), x = stack_factors([many])[0]["q_proj"], torch.ones(SIZES["q_proj"][0], requires_grad=True)
    (A[0, 0] @ x @ B[0, 0]).sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_pickle_holds_the_fields_alone():
    many = build_adapter(("b",), n_chunks=20)
    before = pickle.dumps(many)
    stack_factors([many])
    assert many.stacked and pickle.dumps(many) == before and pickle.loads(before) == many


def test_stack_of_different_scales():
    a, b = build_adapter(), build_adapter(scale=0.5)
    loras, scale, _ = stack_factors([a, b])
    A, B = loras["down_proj"]
    for index, adapter in enumerate((a, b)):
        assert torch.allclose(scale * B[index].mT @ A[index], update(adapter, "down_proj").float(), atol=1e-5)


# --- some layers alone ------------------------------------------------------------------------------------------------


@pytest.fixture
def partial():
    """An adapter that holds layers 0 and 2 of 3."""
    return held(build_adapter(), (0, 2))


def test_layers_that_are_not_held_take_no_room_and_are_zeros(partial):
    whole, full = build_adapter(), partial.in_layers(range(N_LAYERS))
    assert partial.nbytes * N_LAYERS == whole.nbytes * 2 and full.nbytes == whole.nbytes
    assert "2 of 3 layers x down_proj" in repr(partial) and "rank 10, 3 layers x" in repr(full)
    for module in SIZES:
        rows = zip(partial.factors(module), full.factors(module), whole.factors(module), strict=True)
        for mine, wide, all_layers in rows:
            assert torch.equal(mine, wide) and torch.equal(mine[[0, 2]], all_layers[[0, 2]]) and not mine[1].any()
        assert torch.equal(partial.stacked[module][1], full.stacked[module][1])
        for layer in range(N_LAYERS):
            assert torch.equal(replace(partial).keys_of(layer)[module], replace(full).keys_of(layer)[module])
    assert partial == full and full == partial and partial != whole and partial != partial.scaled(2)
    with pytest.raises(ValueError, match="writes layer 2, which is not among"):
        partial.in_layers([0, 1])


@pytest.mark.parametrize("wrong", [(2, 0), (0, 0), (0, 3), (-1, 0)])
def test_layers_are_checked(partial, wrong):
    with pytest.raises(ValueError, match="layers must ascend from 0 to at most 2"):
        replace(partial, layers=wrong)
    with pytest.raises(ValueError, match=r"A is \(2, 2, 6\).*expected \(1, rank, 6\)"):
        replace(partial, layers=(1,))


@pytest.mark.parametrize(
    "operation",
    [
        lambda one: one.scaled(0.5, document="b").scaled_bias(2),
        lambda one: one.without(document="a"),
        lambda one: one.compressed(3),
        lambda one: one.as_lora(),
        lambda one: one.to(dtype=torch.float64),
        lambda one: one + held(build_adapter(("c",), seed=1), (0, 2)).in_layers(one.layers),
        lambda one: only_layers(one, [1, 2]),
        lambda one: scaled_layers(one, [0.1, 0.2, 0.3]),
        lambda one: singular_part(one, 1, 4),
    ],
    ids=["scaled", "without", "compressed", "as_lora", "to", "sum", "only_layers", "scaled_layers", "singular_part"],
)
def test_operations_are_those_of_the_full_adapter_and_hold_no_more_layers(partial, operation):
    mine, full = operation(partial), operation(partial.in_layers(range(N_LAYERS)))
    assert mine.layers == (0, 2) and full.layers == (0, 1, 2) and mine.nbytes * 3 == full.nbytes * 2
    assert same_update(mine, full, 1e-12) and any(update(mine, module)[2].any() for module in SIZES)


def test_a_sum_holds_the_layers_of_both(partial):
    full = partial.in_layers(range(N_LAYERS))
    other = held(build_adapter(("c",), seed=1), (0, 2)).in_layers(range(N_LAYERS))
    for first, second in ((partial, other), (other, partial)):
        both = first + second
        assert both.layers == (0, 1, 2) and both == first.in_layers(range(N_LAYERS)) + second.in_layers(range(3))
    repeated = replace(partial, blocks=[replace(partial.blocks[0], chunk=number) for number in range(5)])
    assert (repeated + other).nbytes < (full + other).nbytes, "blocks that share tensors still do"
    lora = held(replace(build_adapter(("d",), seed=3, bias=False, scale=0.5), hypernetwork_key=""), (1,))
    both = lora + partial
    assert both.layers == (0, 1, 2)
    for module in SIZES:
        assert torch.allclose(update(both, module), update(lora, module) + update(partial, module), atol=1e-6)


def test_layers_that_are_held_come_back_from_a_file(partial, tmp_path):
    loaded = Adapter.load(partial.save(tmp_path / "x"))
    assert loaded == partial and loaded.layers == (0, 2) and loaded.nbytes == partial.nbytes
    full = build_adapter()
    with safe_open(full.save(tmp_path / "y"), "pt") as file:
        assert "layers" not in json.loads(file.metadata()["d2l-adapter"]), "as files of before"
    assert Adapter.load(tmp_path / "y").layers == (0, 1, 2)


def test_stacks_hold_the_layers_that_any_adapter_writes(partial):
    middle = held(build_adapter(("c",), seed=1), (1,))
    for adapters, expected in (
        ([partial], (0, 2)),
        ([partial, None, partial.without(document="a")], (0, 2)),
        ([partial, held(build_adapter(), (0,))], (0, 2)),
        ([partial, middle], None),
    ):
        loras, scale, layers = stack_factors(adapters)
        assert layers == expected
        for module in SIZES:
            A, B = loras[module]
            assert A.shape[1] == B.shape[1] == len(expected or range(N_LAYERS))
            for context, adapter in enumerate(adapters):
                formed = scale * B[context].mT.double() @ A[context].double()
                own = torch.zeros(N_LAYERS, *formed.shape[1:]).double() if adapter is None else update(adapter, module)
                assert torch.allclose(formed, own[list(expected or range(N_LAYERS))], atol=1e-6)


def test_keys_of_a_layer_that_is_not_held_are_zeros_of_the_same_sort(partial):
    half = partial.to(dtype=torch.float16)
    for layer in range(N_LAYERS):
        for module, keys in half.keys_of(layer).items():
            whole = [block.A[module][0] for block in half.blocks]
            assert keys.dtype == torch.float16 and keys.shape == (len(whole), max(map(len, whole)), SIZES[module][0])
            assert keys.any() == (layer in half.layers)


# --- many documents, and names of all kinds ---------------------------------------------------------------------------

MANY = 10_000


@pytest.fixture(scope="module")
def many():
    adapter = build_adapter(("a",), n_chunks=1)
    block = adapter.blocks[0]
    return replace(adapter, blocks=tuple(replace(block, document=f"doc {i}") for i in range(MANY)))


def count_steps(action) -> int:
    """How many lines of Python an action runs: a measure of its work that does not depend on the machine."""
    steps = 0

    def trace(frame, event, argument):
        nonlocal steps
        steps += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return steps


def other_names(adapter):
    return replace(adapter, blocks=tuple(replace(block, document=f"x{block.document}") for block in adapter.blocks))


def refused(action):
    with pytest.raises(ValueError):
        action()


OPERATIONS = {
    "repr": lambda a, tmp: repr(a),
    "HTML": lambda a, tmp: a._repr_html_(),
    "a + b": lambda a, tmp: a + other_names(a),
    "a + a": lambda a, tmp: a + a,
    "sum": lambda a, tmp: sum(replace(a, blocks=(block,)) for block in a.blocks[: len(a) // 10]),
    "sum of one name": lambda a, tmp: sum([replace(a, blocks=a.blocks[:1])] * (len(a) // 10)),
    "only": lambda a, tmp: a.only(a.documents[::2]),
    "without": lambda a, tmp: a.without(a.documents[::2]),
    "scaled": lambda a, tmp: a.scaled(0.5, a.documents[::2]),
    "documents": lambda a, tmp: replace(a).documents,
    "unknown documents": lambda a, tmp: refused(lambda: a.only([f"y{name}" for name in a.documents])),
    "unknown chunks": lambda a, tmp: refused(lambda: a.only(chunk=range(1, len(a)))),
    "==": lambda a, tmp: replace(a) == replace(a),
    "to": lambda a, tmp: a.to("cpu"),
    "factors": lambda a, tmp: a.factors("q_proj"),
    "save and load": lambda a, tmp: Adapter.load(a.save(tmp / "a")),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_work_grows_with_the_number_of_documents_and_no_faster(many, tmp_path, name):
    small, large = (replace(many, blocks=many.blocks[:n]) for n in (200, 800))
    OPERATIONS[name](small, tmp_path)  # what is done once in a process
    steps = [count_steps(lambda a=a: OPERATIONS[name](a, tmp_path)) for a in (replace(small), replace(large))]
    assert steps[1] < 6 * steps[0] + 1000  # four times the documents; squared it would be sixteen


def test_displays_and_errors_of_many_documents_are_short(many):
    page = many._repr_html_()
    assert page.count("<tr>") == 1 + 10 + 1 + 1  # heading, documents, "more", bias
    assert "9990 more" in page
    assert len(page) < 3000
    for wrong in ({"document": "nope"}, {"document": [f"y {i}" for i in range(MANY)]}, {"chunk": range(1, MANY)}):
        with pytest.raises(ValueError, match="9,990 more") as error:
            many.only(**wrong)
        assert len(str(error.value)) < 600


def test_long_names_are_cut_where_they_are_shown_and_nowhere_else():
    name = "n" * MANY
    adapter = build_adapter((name, "b"))
    assert adapter.documents == [name, "b"]
    assert len(adapter.only(name)) == 2
    for text in (repr(adapter), adapter._repr_html_(), repr(adapter.blocks[0])):
        assert len(text) < 1000
        assert "n…" in text
    with pytest.raises(ValueError, match="nnn…") as error:
        adapter.only("nope")
    assert len(str(error.value)) < 300


def test_the_name_of_a_compressed_block_is_short(many):
    few = replace(many, blocks=many.blocks[:12])
    (name,) = few.compressed(2).documents
    assert name == "compressed: " + ", ".join(f"doc {i}" for i in range(10)) + " and 2 more"
    (name,) = build_adapter(("n" * MANY, "b")).compressed(2).documents
    assert len(name) < 100


def test_copies_are_numbered_in_order_also_where_a_number_is_taken():
    one = build_adapter(("a",), n_chunks=1)
    taken = build_adapter(("a (3)",), n_chunks=1)
    assert (one + one + taken + one + one).documents == ["a", "a (2)", "a (3)", "a (4)", "a (5)"]
    assert (one + build_adapter(("a", "a (2)"), n_chunks=1)).documents == ["a", "a (3)", "a (2)"]
    three = one + one + one
    assert (three.without("a (2)") + one).documents == ["a", "a (3)", "a (2)"]
    assert sum([one] * 5) == ((one + one) + one) + one + one
    assert replace(three).documents == three.documents


def test_a_sum_of_chunks_of_one_document_stays_one_document():
    whole = build_adapter(("a",), n_chunks=3)
    parts = [whole.only(chunk=chunk) for chunk in (0, 1, 2)]
    assert sum(parts) == whole
    assert (sum(parts) + parts[1]).documents == ["a", "a (2)"]


ODD_NAMES = {
    "emoji": "🧪👩\u200d🔬",
    "right to left": "\u200fمستند",
    "long": "x" * MANY,
    "quotes": '"it\'s" `a`',
    "slashes": "../a/b\\c",
    "markup": "<b>&amp;$x$",
    "no-break space": "a\u00a0b",
    "combining": "e\u0301",
}


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES)
def test_odd_but_valid_names_come_back_from_a_file(name, tmp_path):
    adapter = build_adapter((name, "b"))
    loaded = Adapter.load(adapter.save(tmp_path / "a"))
    assert loaded.documents == [name, "b"]
    assert loaded == adapter
    assert len(loaded.without(name)) == 2


BAD_NAMES = {"surrogate": "r\udce9sum\udce9", "line end": "a\nb", "tab": "a\tb", "nul": "a\0b", "separator": "a\u2028b"}


@pytest.mark.parametrize("name", BAD_NAMES.values(), ids=BAD_NAMES)
def test_names_that_cannot_be_kept_are_refused_at_once(name):
    with pytest.raises(ValueError, match="document name .* give another name"):
        build_adapter((name,))


@pytest.mark.parametrize("name", ["", " ", "\u200b", None, 3, b"a"])
def test_a_block_needs_a_name(name):
    with pytest.raises(TypeError, match="document name"):
        build_adapter((name,))


def test_a_weight_beyond_all_numbers_is_refused():
    with pytest.raises(ValueError, match="finite"):
        build_adapter().scaled(1e300).scaled(1e300)
