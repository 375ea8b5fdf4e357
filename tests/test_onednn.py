"""Packed weights: torch's products to rounding, made once, never those of weights that have changed."""

import copy
import pickle
import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from d2l_lib import onednn
from d2l_lib.onednn import Packs, in_use, linear, packed, product, product_of_rows

pytestmark = pytest.mark.skipif(not onednn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def packs():
    return Packs()


@pytest.fixture
def weight():
    return nn.Parameter(torch.randn(24, 16))


def by_pack(packs: Packs, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with packs.used():
        pack = packed(weight)
        assert pack.is_mkldnn
        return product(x, pack)


@pytest.mark.parametrize("is_packed", [True, False])
def test_products_are_those_of_torch(packs, weight, is_packed):
    x, bias, other = torch.randn(3, 5, 16), torch.randn(24), torch.randn(3, 5, 24)
    expected = F.linear(x, weight)
    with packs.used() if is_packed else nullcontext():
        assert packed(weight).is_mkldnn == is_packed
        same = torch.testing.assert_close
        same(product(x, packed(weight)), expected)
        same(product(x, packed(weight), bias), expected + bias)
        same(product(x, packed(weight), bias, times=other), (expected + bias) * other)
        same(product(x, packed(weight), plus=other), expected + other)
    torch.testing.assert_close(product_of_rows(x[0], x[1]), x[0] @ x[1].T)
    torch.testing.assert_close(product_of_rows(x[0], torch.randn(16, 4).T).shape, torch.Size([5, 4]))


def test_linears_and_other_modules(packs):
    x, other = torch.randn(5, 16), torch.randn(5, 24)
    plain, wrapped = nn.Linear(16, 24), nn.Sequential(nn.Linear(16, 24), nn.Tanh())
    for module in (plain, wrapped):
        for use in (packs.used, nullcontext):
            with use():
                torch.testing.assert_close(linear(module, x), module(x))
                torch.testing.assert_close(linear(module, x, times=other), module(x) * other)
                torch.testing.assert_close(linear(module, x, plus=other), module(x) + other)
    with packs.used():
        assert packs.of(id(plain.weight), [plain.weight], list)[0].is_mkldnn, "it has its pack already"
        plain.register_forward_hook(lambda _, __, y: 2 * y)
        torch.testing.assert_close(linear(plain, x, plus=other), plain(x) + other)


def test_a_pack_is_made_once(packs, weight):
    with packs.used():
        first = packed(weight)
        assert packed(weight) is first
    with packs.used():
        assert packed(weight) is first
        made = packs.of("double", [weight], lambda: [2 * weight, weight])
        assert packs.of("double", [weight], lambda: pytest.fail("made again")) is made


@pytest.mark.parametrize("change", ["in place", "data", "one column", "one value", "numpy", "memory", "replaced"])
def test_changed_weights_are_packed_anew(packs, weight, change):
    x = torch.randn(4, 16)
    by_pack(packs, x, weight)
    if change == "in place":
        weight.mul_(2)
    elif change == "data":
        weight.data.mul_(2)  # torch does not count it
    elif change == "one column":
        weight.data[:, 5] = 0
    elif change == "one value":
        weight.data[3, 5] += 1
    elif change == "numpy":
        weight.numpy()[:] = 1
    elif change == "memory":
        weight.data = 2 * weight.data
    else:
        weight = nn.Parameter(2 * weight)
    torch.testing.assert_close(by_pack(packs, x, weight), F.linear(x, weight))


@pytest.mark.parametrize("shape", [(8, 16), (130, 64), (33, 7), (1000, 96)])
@pytest.mark.parametrize("side", [0, 1])
def test_moved_values_are_packed_anew(packs, shape, side):
    """Rows or columns in another order: a sum over all values would be the same."""
    weight, x = nn.Parameter(torch.randn(shape)), torch.randn(4, shape[1])
    orders = {"flipped": torch.arange(shape[side]).flip(0), "drawn": torch.randperm(shape[side])}
    for order in orders.values():
        by_pack(packs, x, weight)
        weight.data.copy_(weight.data.index_select(side, order))
        torch.testing.assert_close(by_pack(packs, x, weight), F.linear(x, weight), msg=str(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_in_another_precision_lose_their_packs(packs, dtype):
    module = nn.Linear(15, 3, bias=False)
    by_pack(packs, torch.randn(4, 15), module.weight)
    module.to(dtype)
    with packs.used():
        assert packed(module.weight) is module.weight and not packs._kept


def test_hooks_of_all_modules_are_heard(packs):
    module, seen = nn.Linear(16, 8), []
    with packs.used(), torch.no_grad():
        for register in (register_module_forward_hook, register_module_forward_pre_hook):
            handle = register(lambda *_: seen.append(1))
            linear(module, torch.randn(4, 16))
            handle.remove()
    assert len(seen) == 2


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_a_fused_step_is_seen(packs, weight, optimizer):
    x = torch.randn(4, 16)
    steps = optimizer([weight], lr=0.1, fused=True)
    by_pack(packs, x, weight)
    weight.grad = torch.zeros_like(weight)
    weight.grad[3, 5] = 1
    steps.step()
    torch.testing.assert_close(by_pack(packs, x, weight), F.linear(x, weight))


def test_packs_of_weights_that_are_gone_go(packs, weight):
    with packs.used():
        for _ in range(3):
            packed(nn.Parameter(torch.randn(8, 8)))
        packed(weight)
    with packs.used():
        assert len(packs._kept) == 1


def test_a_change_inside_the_block_counts(packs, weight):
    x = torch.randn(4, 16)
    with packs.used():
        product(x, packed(weight))
        weight.add_(1)
        torch.testing.assert_close(product(x, packed(weight)), F.linear(x, weight))


def test_packs_belong_to_their_block_and_thread(packs, weight):
    seen = []
    with packs.used():
        assert in_use() is packs
        thread = threading.Thread(target=lambda: seen.append(in_use()))
        thread.start()
        thread.join()
        with torch.enable_grad():
            assert in_use() is None and packed(weight) is weight
        with torch.autocast("cpu", torch.bfloat16):
            assert in_use() is None
        with Packs().used():
            assert in_use() is not packs
        assert in_use() is packs
    assert seen == [None] and in_use() is None
    with pytest.raises(ZeroDivisionError), packs.used():
        raise ZeroDivisionError
    assert in_use() is None


def test_other_weights_stay_what_they_are(packs):
    class Other(torch.Tensor):
        pass

    with torch.inference_mode():
        inferred = torch.randn(4, 4)
    strange = [torch.randn(4, 4).double(), torch.randn(4, 4).bfloat16(), torch.randn(4, 4).as_subclass(Other), inferred]
    with packs.used():
        for weight in (*strange, torch.randn(4, 4, device="meta")):
            assert packed(weight) is weight
        x = torch.randn(2, 4)
        torch.testing.assert_close(product(x, packed(inferred)), F.linear(x, inferred))


def test_compiled_code_has_torchs_products(packs, weight):
    x = torch.randn(4, 16)

    @torch.compile(backend="eager")
    def compiled(x):
        return product(x, packed(weight))

    with packs.used():
        torch.testing.assert_close(compiled(x), F.linear(x, weight))
        assert not packs._kept


@pytest.mark.parametrize("width", [8, 1000, 10**9])
def test_pieces_are_nearly_alike_and_small(width):
    most = max(2, min(512, 400_000 // width))
    for rows in (1, 2, 4, 511, 512, 513, 1025, 5000):
        sizes = [len(one) for one in torch.empty(rows).split(onednn.piece_of(rows, width))]
        assert max(sizes) <= most and (min(sizes) > 1 or rows == 1 or most == 2) and len(sizes) == -(-rows // most)


def test_copies_and_pickles_begin_empty(packs, weight):
    by_pack(packs, torch.randn(4, 16), weight)
    for twin in (copy.deepcopy(packs), pickle.loads(pickle.dumps(packs))):
        assert not twin._kept
        by_pack(twin, torch.randn(4, 16), weight)


def test_a_torch_without_onednn_multiplies_itself(packs, weight, monkeypatch):
    monkeypatch.setattr(onednn, "is_available", lambda: False)
    with packs.used():
        assert in_use() is None and packed(weight) is weight
