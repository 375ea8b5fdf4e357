"""The router: what its weights choose, that one pass is enough, and that it comes with the model."""

import math
import random
from dataclasses import replace

import pytest
import torch

import d2l_lib as d2l
from d2l_lib.base_model import target_linears
from d2l_lib.documents import question_ids
from d2l_lib.reading import null_score
from d2l_lib.router import Router
from d2l_lib.routing import _HOP, route, weigh
from d2l_lib.studies.router_weights import fit_router, keep_router, measure_router_weights
from d2l_lib.tasks import world

WEIGHTS = {"layers": (1, 2), "last_token": (1.0, 2.0), "words": (1.0, 0.5), "refusal": world.UNKNOWN}
LAST, WORDS = (-100.0, 0.0, 0.0), (100.0, 0.0, 0.0)  # by_words: never, always


@pytest.fixture(scope="module")
def model():
    return d2l.load("tiny/qa")


@pytest.fixture(scope="module")
def document():
    return world.draw_document(random.Random("router"), "test", 12)


@pytest.fixture(scope="module")
def adapter(model, document):
    return model.internalize_each([document.text])[0]


def responses():
    """[2 layers, 3 tokens, 4 blocks]: the last token speaks for block 2, the second for block 0."""
    torch.manual_seed(0)
    return torch.rand(2, 3, 4) * 0.1 + torch.tensor([[0.1] * 4, [0.9, 0.1, 0.2, 0.1], [0.1, 0.2, 0.9, 0.3]])


def test_the_last_token_chooses_by_its_log_odds_and_no_block_below_the_null_block():
    s, null = responses(), torch.full((2, 3), 0.5)
    odds = [sum(w * math.log(s[layer, -1, k] / 0.5) for layer, w in enumerate((1.0, 2.0))) for k in range(4)]
    order = sorted(range(4), key=lambda k: -odds[k])
    for offset in (-odds[2] - 0.01, -odds[2] + 0.01, 10.0):
        router = Router(offset=offset, by_words=LAST, **WEIGHTS)
        expected = [k for k in order if odds[k] + offset > 0]
        assert router.choose(s, null, -1.0, 4) == expected
        assert router.choose(s, null, -1.0, 1) == expected[:1]
    assert order[0] == 2 and len(expected) == 4


def test_words_choose_the_block_that_stands_out_at_one_of_them():
    s = responses()
    router = Router(offset=-1e6, by_words=WORDS, **WEIGHTS)
    assert router.choose(s, torch.ones(2, 3), -1.0, 1) == [0], "the null block has no say"
    loud = s.clone()
    loud[:, 0] += 50.0  # a word to which all blocks respond says nothing
    assert router.choose(loud, torch.ones(2, 3), -1.0, 1) == [0]
    s[:, :, 0] = 0.0
    assert 0 not in router.choose(s, torch.ones(2, 3), -1.0, 4), "a block without weight never answers"


def test_an_answer_of_its_own_and_a_loud_first_layer_send_a_question_to_its_words():
    router = Router(offset=0.0, by_words=(-2.0, -0.5, 3.0), **WEIGHTS)
    for log_refusal, margin, expected in ((0.0, 0.6, False), (-1.0, 0.6, True), (-4.1, 0.0, True), (-3.9, 0.0, False)):
        assert router.goes_by_words(log_refusal, margin) == expected
    assert router.goes_by_words(-12.0, -1.3) == router.goes_by_words(-1e9, -1.3)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one weight of each sort"):
        Router(offset=0.0, by_words=LAST, **WEIGHTS | {"words": (1.0,)})
    with pytest.raises(ValueError, match="finite"):
        Router(offset=math.nan, by_words=LAST, **WEIGHTS)


@torch.no_grad()
def test_one_pass_with_the_bias_gives_all_that_is_weighed(model, adapter, document):
    texts = [world.question_about(random.Random(0), fact).text for fact in document.facts[:3]] + ["Who?"]
    prompts, rows = question_ids(model.tokenizer, texts), []
    handle = model.base_model.get_input_embeddings().register_forward_pre_hook(lambda _, a: rows.append(len(a[0])))
    weighed = weigh(model, prompts, [adapter] * 4, (1, 3), world.UNKNOWN)
    handle.remove()
    assert rows == [4]
    linears, seen = target_linears(model.base_model, ["down_proj"])["down_proj"], {}
    handles = [
        linears[layer].register_forward_pre_hook(lambda _, a, layer=layer: seen.update({layer: a[0][0]}))
        for layer in (1, 3)
    ]
    for prompt, one in zip(prompts, weighed, strict=True):
        with model.applied(adapter.scaled(0.0)):
            logits = model.base_model(torch.tensor([prompt])).logits[0, -1]
        assert one.responses.shape == (2, len(prompt), len(adapter.blocks)) and one.adapter is adapter
        for place, layer in enumerate((1, 3)):
            expected = torch.stack([(seen[layer] @ b.A["down_proj"][layer].T).norm(dim=-1) for b in adapter.blocks], -1)
            torch.testing.assert_close(one.responses[place], expected, rtol=1e-3, atol=1e-4)
            null = null_score(seen[layer], *(part[layer] for part in model.hypernetwork.null()["down_proj"]))
            torch.testing.assert_close(one.null[place], null, rtol=1e-3, atol=1e-4)
        first = model.tokenizer(world.UNKNOWN, add_special_tokens=False)["input_ids"][0]
        assert math.isclose(one.log_refusal, float(logits.log_softmax(-1)[first]), abs_tol=1e-3)
    for handle in handles:
        handle.remove()


def test_of_many_blocks_those_that_respond_most_are_weighed(model, adapter, document, monkeypatch):
    texts = [world.question_about(random.Random(0), fact).text for fact in document.facts[:4]]
    prompts, many = question_ids(model.tokenizer, texts), [adapter] * 4
    whole = weigh(model, prompts, many, (1, 2, 3), world.UNKNOWN)
    monkeypatch.setattr("d2l_lib.routing.CANDIDATES", 3)
    for one, every in zip(weigh(model, prompts, many, (1, 2, 3), world.UNKNOWN), whole, strict=True):
        kept = sorted(every.responses[-1, -1].topk(3).indices.tolist())
        assert [block.chunk for block in one.adapter.blocks] == kept
        torch.testing.assert_close(one.responses, every.responses[..., kept])
    assert model.answer(texts, adapter, blocks=1) == [model.answer(text, adapter, blocks=1) for text in texts]


def test_left_out_the_router_chooses_and_a_stated_threshold_or_shortlist_tries(model, adapter, document, monkeypatch):
    text = world.question_about(random.Random(0), document.facts[0]).text
    (before,) = route(model, [text], [adapter], least=-math.inf)
    refuse_all = replace(model.router, offset=-1e6, by_words=LAST)
    monkeypatch.setattr(model, "router", refuse_all)
    assert route(model, [text], [adapter])[0].blocks == ()
    assert route(model, [text], [adapter.only(chunk=0)])[0].blocks == (), "of one block too"
    assert route(model, [text, text], [None, adapter.only(chunk=[])])[0] is None
    assert route(model, [text], [adapter], least=-math.inf)[0] == before
    assert len(route(model, [text], [adapter], least=-math.inf, shortlist=None)[0].blocks) == 1
    assert len(route(model, [text], [adapter], shortlist=8)[0].blocks) == 1


def test_the_bundled_router_finds_what_last_tokens_cannot(model):
    """On validation documents: which of two, and no block for questions without an answer."""
    rng, right, refused = random.Random("bundled"), [], []
    for _ in range(24):
        document = world.draw_document(rng, "validation", 12)
        (adapter,) = model.internalize_each([document.text])
        if (question := world.ask(rng, document, "which_of")) is not None:
            spans = [block.span for block in route(model, [question.text], [adapter])[0].blocks]
            ((start, end),) = question.evidence
            right.append(any(s < end and start < e for s, e in spans))
        nothing = world.ask(rng, document, "unanswerable")
        refused.append(not route(model, [nothing.text], [adapter])[0].blocks)
    assert sum(right) >= 0.4 * len(right), "by the keys of the last token it is one of ten"
    assert sum(refused) >= 0.75 * len(refused)


def test_what_stands_within_a_question_ends_with_the_last_name():
    for question, expected in (
        ("When was the mayor of Halmere born?", "the mayor of Halmere"),
        ("Who is the mayor of the venue of the Finport Regatta?", "the venue of the Finport Regatta"),
        ("Which body employed the author of the Chronicle of Benmarket?", "the author of the Chronicle of Benmarket"),
        ("Who wrote the Ballad of Kelbury?", None),
        ("Where was Ada Lovel born?", None),
    ):
        found = _HOP.search(question)
        assert (found and found[0]) == expected


def chosen_spans(model, questions, adapters):
    return [[block.span for block in one.blocks] for one in route(model, questions, adapters)]


def test_two_hops_go_to_the_block_of_the_second_by_way_of_the_first(model, monkeypatch):
    rng, asked, adapters = random.Random("hops"), [], []
    while len(asked) < 24:
        document = world.draw_document(rng, "validation", 12)
        if (question := world.ask(rng, document, "two_hop")) is not None:
            asked.append(question)
            adapters += model.internalize_each([document.text])
    texts = [one.text for one in asked]

    def right():
        return [
            any(s < one.evidence[1][1] and one.evidence[1][0] < e for s, e in spans)
            for one, spans in zip(asked, chosen_spans(model, texts, adapters), strict=True)
        ]

    by_hops = right()
    assert chosen_spans(model, texts[:1], adapters[:1]) == chosen_spans(model, texts, adapters)[:1]
    monkeypatch.setattr("d2l_lib.routing._ASK_HOP", ())
    at_once = right()
    assert sum(by_hops) >= sum(at_once) + 3 and sum(by_hops) >= 0.8 * len(asked)


def test_a_question_that_is_its_own_first_hop_keeps_its_block(model, monkeypatch):
    rng = random.Random("one hop")
    document = world.draw_document(rng, "validation", 30)
    (adapter,) = model.internalize_each([document.text])
    texts = [question for fact in document.facts for question in world.wordings(fact) if _HOP.search(question)]
    by_hops = chosen_spans(model, texts, [adapter] * len(texts))
    monkeypatch.setattr("d2l_lib.routing._ASK_HOP", ())
    at_once = chosen_spans(model, texts, [adapter] * len(texts))
    assert len(texts) >= 8 and sum(a == b for a, b in zip(by_hops, at_once, strict=True)) >= 0.9 * len(texts)


def test_no_first_hop_is_answered_where_the_router_refuses_it(model, adapter, monkeypatch):
    monkeypatch.setattr(model, "router", replace(model.router, offset=-1e6, by_words=LAST))
    monkeypatch.setattr(model, "answer", lambda questions, *_, **__: list(questions) and pytest.fail("asked a block"))
    assert chosen_spans(model, ["When was the mayor of Zorwick born?"], [adapter]) == [[]]


def test_a_router_is_saved_with_the_model_and_a_damaged_one_is_named(model, tmp_path):
    folder = model.save(tmp_path / "model")
    other = replace(model.router, offset=1.25)
    keep_router(str(folder), other)
    assert d2l.load(folder).router == other
    import json

    settings = json.loads((folder / "config.json").read_text())
    settings["meta"]["router"]["words"] = [1.0]
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="router is damaged"):
        d2l.load(folder)


def test_the_study_fits_weights_that_choose_and_counts_right_choices(model):
    table, router = measure_router_weights(model, 6, 0)
    assert router.layers == (1, 2, 3) and router.refusal == world.UNKNOWN
    assert set(table["kind"]) >= {"one_hop", "unanswerable", "encyclopedia", "which_of", "64 documents"}
    share = table.set_index(["kind", "idea"])["share"]
    assert share["one_hop", "router"] >= 0.8 and share["one_hop", "words"] < share["one_hop", "log-odds"]
    assert share["unanswerable", "log-odds"] == 0, "only the router can choose none"
    assert fit_router.__doc__ and table["n"].max() == 6
