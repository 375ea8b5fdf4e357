"""With many documents the work grows with their number, and no faster."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_models import build_model
from toy_models import ToyModel

from d2l_lib.analysis import attribution, weights
from d2l_lib.documents import name_documents
from d2l_lib.routing import most_relevant
from d2l_lib.views.conversation import LISTED, chat, render_inside


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


@pytest.fixture(scope="module")
def model():
    """A model whose chunks all have the factors of one, so that only the work around the models is measured."""
    model = build_model()
    block = model.internalize("Tom lives in Rome.").blocks[0]
    model._encode = lambda chunks, progress=None: [(block.A, block.B)] * len(chunks)
    return model


def sentences(n: int) -> str:
    return " ".join(f"Tom {i} lives in Rome." for i in range(n))


def rows(n: int) -> list[dict]:
    return [{"name": f"d {i}", "n_characters": 3, "n_blocks": 1, "weight": 1.0} for i in range(n)]


def one_long(model, n: int):
    adapter = model.internalize(sentences(n), chunk_tokens=16)
    return replace(adapter, blocks=adapter.blocks[: n // 2])


def texts(n: int) -> list[str]:
    return [f"Document {i}." for i in range(n)]


def half(adapter):
    return most_relevant(adapter, torch.arange(len(adapter.blocks)), len(adapter.blocks) // 2)


# {what: (model, number) -> what is measured}
OPERATIONS = {
    "names": lambda model, n: partial(name_documents, texts(n)),
    "internalize": lambda model, n: partial(model.internalize, texts(n)),
    "internalize each": lambda model, n: partial(model.internalize_each, texts(n)),
    "sentences": lambda model, n: partial(attribution.sentence_units, one_long(model, n), sentences(n)),
    "rows": lambda model, n: partial(attribution.rows_of, one_long(model, n), "chunk"),
    "energy": lambda model, n: partial(weights.block_energy, one_long(model, n)),
    "most relevant": lambda model, n: partial(half, one_long(model, n)),
    "chat": lambda model, n: partial(
        chat, ToyModel(window=10**9), dict(zip(map(str, range(n)), texts(n), strict=True))
    ),
    "inside": lambda model, n: partial(render_inside, rows(n), 1.0, 1.0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_work_grows_with_the_number_of_documents_and_no_faster(model, name):
    OPERATIONS[name](model, 20)()  # what is done once in a process
    steps = [count_steps(OPERATIONS[name](model, n)) for n in (50, 200)]
    assert steps[1] < 6 * steps[0] + 1000  # four times the documents; squared it would be sixteen


def test_the_energies_of_many_blocks_are_those_of_few(model):
    """Both ways of counting, all pairs of rows and the formed update, on the two sides of the change between them."""
    adapter = one_long(model, 60)
    torch.manual_seed(0)
    blocks = [
        replace(block, **{side: {m: torch.randn_like(t) for m, t in getattr(block, side).items()} for side in "AB"})
        for block in adapter.blocks
    ]
    for some in (2, len(blocks)):
        few = replace(adapter, blocks=tuple(blocks[:some]))
        (module,) = few.modules
        documents = replace(few, bias=None)
        d_in, d_out = few.sizes[module]
        assert (documents.rank * (d_in + d_out) <= d_in * d_out) == (some == 2), "each way is taken once"
        A, B = (factor.double() for factor in documents.factors(module))
        whole = few.scale * B.mT @ A
        own = [few.scale * (x.double().mT @ y.double()) for x, y in ((b.B[module], b.A[module]) for b in few.blocks)]
        table = weights.block_energy(few)
        expected = [float((dw[layer] * whole[layer]).sum() / whole[layer].square().sum())
                    for dw in own for layer in range(few.n_layers)]  # fmt: skip
        assert table["share"].tolist() == pytest.approx(expected)
        assert table["norm"].tolist() == pytest.approx([float(dw[k].norm()) for dw in own for k in range(few.n_layers)])
        assert table.groupby("layer")["share"].sum().tolist() == pytest.approx([1.0] * few.n_layers)


def test_a_long_list_of_what_is_inside_is_cut():
    page = render_inside(rows(10_000), 1.0, 1.0)
    assert page.count("<li>") == LISTED + 1 and "and 9,900 more" in page and 'data-documents="10000"' in page
