"""Adapters of the published form hold the written layers alone, and act as those that hold zeros for all others."""

from dataclasses import replace

import pytest
import torch
from tiny_models import N_LAYERS, build_pooled_model, logits_of

import d2l_lib as d2l
from d2l_lib.analysis import attribution, weights
from d2l_lib.analysis.trials import LEVELS
from d2l_lib.routing import relevance
from d2l_lib.studies import measurements
from d2l_lib.training.context_distillation import ContextDistillation
from d2l_lib.views.trace import Trace

TEXT = "The mill was built by Anna. It stands in Lindvik. Anna sold it to Bo. Bo painted it red."
QUESTION = "Who is it?"


@pytest.fixture(scope="module")
def model():
    return build_pooled_model()


@pytest.fixture(scope="module")
def adapter(model):
    return model.internalize({"mill": TEXT}, chunk_tokens=50)  # two sentences a chunk


@pytest.fixture(scope="module")
def old(adapter, tmp_path_factory):
    """The adapter as files of before hold it: zeros in the layers that are not written."""
    return d2l.Adapter.load(adapter.in_layers(range(N_LAYERS)).save(tmp_path_factory.mktemp("old") / "a"))


def test_it_holds_the_written_layers_alone(model, adapter):
    assert adapter.layers == (N_LAYERS - 2, N_LAYERS - 1) and len(adapter.blocks) == 2
    sizes = sum(adapter.sizes["down_proj"])
    assert adapter.nbytes == 4 * 2 * 2 * sizes * (len(adapter.blocks) + 1)
    assert adapter.nbytes == measurements.adapter_bytes(model, len(adapter.blocks))
    with model.applied(adapter):
        hooked = [bool(layer.mlp.down_proj._forward_hooks) for layer in model.base_model.model.layers]
    assert hooked == [False, False, True, True]


def test_logits_and_answers_are_bit_equal_to_those_of_adapters_with_zeros(model, adapter, old):
    assert old.layers == (0, 1, 2, 3) and old == adapter and old.nbytes == 2 * adapter.nbytes
    own = logits_of(model, adapter)
    assert torch.equal(own, logits_of(model, old)) and not torch.equal(own, logits_of(model, None))
    other = model.internalize_each(["Carl dug it."])[0]
    for mixed in ([adapter, old], [old, other], [adapter, None, other]):
        wide = [one and one.in_layers(range(N_LAYERS)) for one in mixed]
        questions = [QUESTION] * len(mixed)
        assert model.answer(questions, mixed, max_new_tokens=5) == model.answer(questions, wide, max_new_tokens=5)
    for both in (adapter + other, old + other, other + old):
        same = both.in_layers(range(N_LAYERS))
        assert torch.equal(logits_of(model, both), logits_of(model, same))
        assert len(both.blocks) == len(adapter.blocks) + 1
    for options in ({"read": "sparse"}, {"blocks": 1}, {"blocks": 1, "shortlist": None}):
        answers = [model.answer(QUESTION, one, max_new_tokens=5, **options) for one in (adapter, old)]
        assert answers[0] == answers[1]


def test_analysis_tells_the_same(model, adapter, old):
    assert torch.equal(*relevance(model, [QUESTION] * 2, [adapter, old]))
    for level in LEVELS:
        tables = [
            attribution.attribute(
                model, one, QUESTION, answer="Bo", level=level, method="leave_one_out", documents={"mill": TEXT}
            )
            for one in (adapter, old)
        ]
        assert tables[0].equals(tables[1]) and tables[0]["contribution"].abs().max() > 0
    by_gradient = [
        attribution.attribute(
            model, one, QUESTION, answer="Bo", level="sentence", method="gradient", documents={"mill": TEXT}
        )["contribution"]
        for one in (adapter, old)
    ]
    assert by_gradient[0].equals(by_gradient[1]) and by_gradient[0].abs().max() > 0
    assert weights.norms(adapter).equals(weights.norms(old))
    sizes = [weights.recompression(one, [1, 100])["bytes"].tolist() for one in (adapter, old)]
    assert sizes[0][1] == adapter.nbytes and sizes[1] == [2 * size for size in sizes[0]]
    parts = [weights.by_layer(one)[N_LAYERS - 1, "only this layer"] for one in (adapter, old)]
    assert torch.equal(*(logits_of(model, part) for part in parts))


def test_a_sentence_is_taken_out_of_adapters_that_hold_more_layers(model, adapter, old):
    traces = [Trace(model, one, {"mill": TEXT}, QUESTION, "Bo") for one in (adapter, old)]
    assert traces[0].adapter_without({1}) == traces[1].adapter_without({1}) != adapter


def test_a_trained_block_may_be_in_all_layers(model):
    adapter = ContextDistillation(model, "oracle", steps=0).prepare(TEXT, [QUESTION])
    assert adapter.layers == (0, 1, 2, 3) and adapter.hypernetwork_key == model.hypernetwork_key
    assert len(model.answer([QUESTION], [replace(adapter)], max_new_tokens=3)) == 1
