"""Routing: the relevance of a block is what it alone changes, and the most relevant blocks answer."""

import math
import random
from dataclasses import replace

import pytest
import torch

import d2l_lib as d2l
from d2l_lib.base_model import target_linears
from d2l_lib.documents import question_ids
from d2l_lib.reading import answer_reads
from d2l_lib.routing import (
    _lead,
    conformal_threshold,
    key_scores,
    leads_and_divergences,
    most_relevant,
    null_margins,
    relevance,
    route,
    route_by_keys,
)
from d2l_lib.tasks import world


@pytest.fixture(scope="module")
def model():
    return d2l.load("tiny/qa")


@pytest.fixture(scope="module")
def document():
    return world.draw_document(random.Random("routing"), "test", 12)


@pytest.fixture(scope="module")
def adapter(model, document):
    (adapter,) = model.internalize_each([document.text])
    return adapter


def asked(document, n=6):
    rng = random.Random("routing/questions")
    return [world.question_about(rng, fact) for fact in document.facts[:n]]


@torch.no_grad()
def test_relevance_is_the_lead_of_what_a_block_would_say_and_a_share_of_the_divergence(model, adapter, document):
    question = asked(document, 1)[0].text
    divergence, lead, both = (relevance(model, [question], [adapter], share=share)[0] for share in (math.inf, 0.0, 2.0))
    assert divergence.shape == (len(adapter.blocks),)
    torch.testing.assert_close(both, lead + 2 * divergence)
    ids = torch.tensor(question_ids(model.tokenizer, [question]))

    def first_token(one):
        with model.applied(one):
            return torch.log_softmax(model.base_model(ids).logits[0, -1].double(), -1)

    none = first_token(adapter.scaled(0.0))
    for place in (0, 3, len(adapter.blocks) - 1):
        alone = first_token(replace(adapter, blocks=(adapter.blocks[place],)))
        expected = float((alone.exp() * (alone - none)).sum())
        assert math.isclose(float(divergence[place]), expected, rel_tol=1e-3, abs_tol=1e-4)
        said, *others = sorted((float(p), token) for token, p in enumerate(alone) if token != int(none.argmax()))[::-1]
        rival = max(others[0][0], float(alone[int(none.argmax())]))
        assert math.isclose(float(lead[place]), said[0] - rival, rel_tol=1e-3, abs_tol=1e-3)


def test_the_block_of_the_evidence_is_most_relevant(model, adapter, document):
    questions = asked(document)
    scores = relevance(model, [question.text for question in questions], [adapter] * len(questions))
    hits = 0
    for question, score in zip(questions, scores, strict=True):
        span = adapter.blocks[int(score.argmax())].span
        hits += span[0] <= question.evidence[0][0] < span[1]
    assert hits >= len(questions) - 1


def test_answers_do_not_depend_on_what_is_asked_beside(model, adapter, document):
    questions = [question.text for question in asked(document)]
    other = adapter.only(chunk=[0, 1, 2])
    mixed = relevance(model, questions, [adapter, other, adapter, other, adapter, other])
    for question, one, score in zip(questions, [adapter, other] * 3, mixed, strict=True):
        (single,) = relevance(model, [question], [one])
        torch.testing.assert_close(score, single, rtol=1e-4, atol=1e-5)


def test_relevance_in_parts_is_relevance_at_once(model, adapter, document, monkeypatch):
    questions = [question.text for question in asked(document, 2)]
    whole = relevance(model, questions, [adapter] * 2)
    monkeypatch.setattr("d2l_lib.routing.TOKENS_AT_ONCE", 1)
    for a, b in zip(whole, relevance(model, questions, [adapter] * 2), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_block_without_weight_would_say_nothing_else(model, adapter, document):
    question = asked(document, 1)[0].text
    silent = adapter.scaled(0.0)
    (divergence,) = relevance(model, [question], [silent], share=math.inf)
    assert float(divergence.abs().max()) < 1e-5
    (found,) = relevance(model, [question], [silent])
    assert float(found.max()) < 0
    assert len(route(model, [question], [silent], least=0.0)[0].blocks) == 0


def test_a_block_that_answers_surely_beats_one_that_changes_as_much_with_doubts():
    sure = torch.tensor([0.001, 0.99, 0.009]).log()
    torn = torch.tensor([0.001, 0.54, 0.459]).log()
    same = torch.tensor([0.98, 0.01, 0.01]).log()
    none = torch.tensor([0.90, 0.05, 0.05]).log()
    leads = _lead(none.expand(3, 3), torch.stack([sure, torn, same]))
    expected = [math.log(0.99 / 0.009), math.log(0.54 / 0.459), math.log(0.01 / 0.98)]
    torch.testing.assert_close(leads, torch.tensor(expected))


def test_route_keeps_the_most_relevant_in_their_order(model, adapter, document):
    question = asked(document, 1)[0].text
    (score,) = relevance(model, [question], [adapter])
    (routed,) = route(model, [question], [adapter], 3, least=-math.inf, shortlist=None)
    best = set(score.argsort(descending=True)[:3].tolist())
    assert [block.chunk for block in routed.blocks] == sorted(adapter.blocks[place].chunk for place in best)
    assert routed.bias is adapter.bias
    assert len(adapter.blocks) > 3  # the operand is what it was


def test_route_leaves_small_adapters_and_none_alone(model, adapter):
    small = adapter.only(chunk=[0, 1])
    routed = route(model, ["Who?", "Who?"], [small, None], 2, least=-math.inf)
    assert routed[0] is small
    assert routed[1] is None


def test_without_a_limit_of_its_own_route_takes_the_models(model, adapter, monkeypatch):
    small = adapter.only(chunk=[0, 1])
    monkeypatch.setattr(model, "least_relevance", math.inf)
    monkeypatch.setattr(model, "router", None)
    assert len(route(model, ["Who?"], [small])[0].blocks) == 0
    monkeypatch.setattr(model, "least_relevance", -math.inf)
    assert route(model, ["Who?"], [small], 2)[0] is small


def test_least_relevance_lets_no_block_answer(model, adapter, document):
    question = asked(document, 1)[0].text
    (score,) = relevance(model, [question], [adapter])
    (none,) = route(model, [question], [adapter], 2, least=float(score.max()) + 1)
    (one,) = route(model, [question], [adapter], 2, least=float(score.sort().values[-2:].mean()))
    assert len(none.blocks) == 0
    assert len(one.blocks) == 1


def test_answer_with_blocks_is_the_answer_of_the_routed_adapter(model, adapter, document):
    texts = [question.text for question in asked(document)]
    routed = route(model, texts, [adapter] * len(texts), 1)
    assert model.answer(texts, adapter, blocks=1) == model.answer(texts, routed)
    assert model.answer(texts[0], adapter, blocks=1) == model.answer(texts[0], routed[0])


def test_a_shortlist_that_holds_all_blocks_answers_like_every_block_tried(model, adapter, document):
    texts = [question.text for question in asked(document)]
    texts += [question.text for question in world.encyclopedia_questions(random.Random(0), 4)]
    eight = adapter.only(chunk=range(8))
    some, every = (model.answer(texts, eight, blocks=1, shortlist=most) for most in (8, None))
    assert some == every
    some, every = (route(model, texts, [eight] * len(texts), 2, shortlist=most) for most in (8, None))
    assert some == every and {len(one.blocks) for one in some} > {0}


def test_only_the_blocks_of_the_largest_key_scores_are_tried(model, adapter, document):
    texts = [question.text for question in asked(document, 4)]
    many = [adapter] * len(texts)
    everywhere = leads_and_divergences(model, texts, many)
    for score, (lead, divergence), (whole, whole_divergence) in zip(
        key_scores(model, texts, many), leads_and_divergences(model, texts, many, shortlist=3), everywhere, strict=True
    ):
        tried = score.argsort(descending=True)[:3]
        assert lead.isfinite().nonzero().flatten().tolist() == sorted(tried.tolist())
        torch.testing.assert_close(lead[tried], whole[tried], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(divergence[tried], whole_divergence[tried], rtol=1e-4, atol=1e-4)
        assert divergence.isfinite().sum() == 3
    (best,) = route(model, texts[:1], many[:1], least=-math.inf)
    assert best == route_by_keys(model, texts[:1], many[:1])[0], "left out, the keys choose"
    (five,) = route(model, texts[:1], many[:1], 5, least=-math.inf)
    assert five == route_by_keys(model, texts[:1], many[:1], 5)[0]
    assert len(five.blocks) == 5, "the shortlist is no shorter than what answers"
    assert route(model, texts[:1], many[:1], least=math.inf)[0].blocks == (), "no block where none reaches the least"
    with pytest.raises(ValueError, match="shortlist"):
        model.answer(texts, adapter, blocks=1, shortlist=0)


def test_many_blocks_take_as_many_rows_as_few(model, adapter, document, monkeypatch):
    question, rows = asked(document, 1)[0].text, []
    embeddings = model.base_model.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    checks = []
    monkeypatch.setattr(type(model), "_check_adapter", lambda self, one, keys=None: checks.append(len(one.blocks)))
    try:
        for size in (9, len(adapter.blocks)):
            one = replace(adapter, blocks=adapter.blocks[:size])
            route(model, [question], [one], least=-math.inf)
            assert rows == [1, 1] and checks == [size], "each adapter is checked once, its blocks are not"
            rows.clear(), checks.clear()
            route(model, [question], [one])
            assert rows == [1] and checks == [size], "the router tries none"
            rows.clear(), checks.clear()
        route(model, [question], [adapter], shortlist=8)
        assert rows == [1, 8]
        rows.clear(), checks.clear()
        route(model, [question], [adapter], shortlist=None)
        assert rows == [1, len(adapter.blocks)]
        checks.clear()
        model.answer([question] * 3, adapter, blocks=1)
        assert checks == [len(adapter.blocks)]
    finally:
        handle.remove()


def test_keys_of_a_layer_are_those_of_the_blocks_and_kept(adapter):
    fresh = replace(adapter)
    keys = fresh.keys_of(2)["down_proj"]
    for block, own in zip(adapter.blocks, keys, strict=True):
        assert torch.equal(own, block.A["down_proj"][2])
    assert fresh.keys_of(2)["down_proj"] is keys and "stacked" not in vars(fresh)
    assert torch.equal(fresh.stacked["down_proj"][0][2], fresh.keys_of(2)["down_proj"])
    assert fresh.keys_of(2)["down_proj"].data_ptr() == fresh.stacked["down_proj"][0][2].data_ptr(), "no second copy"


def test_bad_numbers_are_named(model, adapter):
    with pytest.raises(ValueError, match="blocks"):
        model.answer("Who?", adapter, blocks=0)
    with pytest.raises(ValueError, match="2 questions but 1 adapters"):
        relevance(model, ["Who?", "Where?"], [adapter])


@torch.no_grad()
def test_key_scores_come_from_one_pass_and_find_the_block_of_the_evidence(model, adapter, document):
    questions = asked(document, 8)
    texts = [one.text for one in questions]
    weighed = replace(adapter, blocks=(adapter.blocks[0].weighted(0.0), *adapter.blocks[1:]))
    scores = key_scores(model, [*texts, texts[0]], [adapter] * 8 + [weighed])
    assert [tuple(one.shape) for one in scores] == [(len(adapter.blocks),)] * 9
    assert scores[8][0] == 0 and torch.allclose(scores[8][1:], scores[0][1:], rtol=1e-5)
    seen, linear = [], target_linears(model.base_model, ["down_proj"])["down_proj"][3]
    handle = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, -1]))
    with model.applied(replace(adapter, blocks=())):
        model.base_model(torch.tensor(question_ids(model.tokenizer, texts[:1])))
    handle.remove()
    expected = [float((block.A["down_proj"][3] @ seen[0]).norm()) for block in adapter.blocks]
    torch.testing.assert_close(scores[0], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    first = [adapter.blocks[int(score.argmax())].span for score in scores[:8]]
    right = [
        any(s < end and start < e for s, e in q.evidence) for (start, end), q in zip(first, questions, strict=True)
    ]
    assert sum(right) >= 7


def test_routing_by_keys_keeps_the_best_blocks_and_one_by_one_is_as_in_a_batch(model, adapter, document):
    texts = [one.text for one in asked(document, 3)]
    small = replace(adapter, blocks=adapter.blocks[:2])
    routed = route_by_keys(model, [*texts, texts[0], texts[0]], [adapter] * 3 + [small, None], 2)
    assert routed[3] is small and routed[4] is None
    for text, score, one in zip(texts, key_scores(model, texts, [adapter] * 3), routed, strict=False):
        assert one == most_relevant(adapter, score, 2) and len(one.blocks) == 2
        assert route_by_keys(model, [text], [adapter], 2) == [one]
    with pytest.raises(ValueError, match="one adapter per question"):
        key_scores(model, texts, [adapter])
    with pytest.raises(ValueError, match="blocks"):
        route_by_keys(model, texts, [adapter] * 3, 0)


def test_a_question_reads_a_block_where_its_margin_exceeds_the_threshold(model, adapter, document):
    texts = [question.text for question in asked(document, 4)]
    texts += [question.text for question in world.encyclopedia_questions(random.Random(0), 4)]
    margins = null_margins(model, texts, adapter)
    assert margins[:4].min() > margins[4:].max(), "answerable questions are above the others"
    for text, margin in zip(texts, margins.tolist(), strict=True):
        (alone,) = null_margins(model, [text], adapter).tolist()
        assert math.isclose(alone, margin, abs_tol=1e-4), "single = batch"
        for threshold, is_read in ((margin - 0.01, True), (margin + 0.01, False)):
            reads = answer_reads(model, text, adapter, "x", read=replace(model.reading, null_threshold=threshold))
            assert (reads["block"] >= 0).any() == is_read
    with pytest.raises(ValueError, match="no block to compare"):
        null_margins(model, texts, adapter.scaled(0.0))
    with pytest.raises(ValueError, match="no null block"):
        null_margins(d2l.load("tiny"), texts, adapter)


def test_a_conformal_threshold_is_exceeded_at_most_as_often_as_stated():
    assert conformal_threshold(range(1, 20), 0.05) == 19 and conformal_threshold(range(1, 200), 0.05) == 190
    assert conformal_threshold(torch.tensor([3.0, 1.0, 2.0]), 0.25) == 3.0 and conformal_threshold([3, 1, 2], 0.5) == 2
    rng = random.Random(0)
    exceeded = 0
    for _ in range(4000):
        *scores, further = (rng.gauss(0, 1) for _ in range(40))
        exceeded += further > conformal_threshold(scores, 0.1)
    assert 0.08 < exceeded / 4000 <= 0.11, "of 39 scores the 36th: 4 of 40 ranks are above"
    with pytest.raises(ValueError, match="needs 19 scores or more, not 18"):
        conformal_threshold(range(18), 0.05)
    with pytest.raises(ValueError, match="between 0 and 1"):
        conformal_threshold(range(18), 5)
