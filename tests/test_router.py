"""The router: what it reads, what it chooses, the verdict, its training, and that it comes with the model."""

import copy
import json
import math
import random
from dataclasses import replace

import pytest
import torch

import d2l_lib as d2l
from d2l_lib.adapter import Block
from d2l_lib.base_model import final_norm, target_linears
from d2l_lib.documents import answer_ids, question_ids
from d2l_lib.formats.checkpoints import ROUTER, SETTINGS
from d2l_lib.reading import null_score
from d2l_lib.router import Responses, Router, RouterConfig, with_verdict
from d2l_lib.routing import _HOP, first_hops, route, weigh
from d2l_lib.studies.router_weights import JUDGED, keep_router, measure_router_weights
from d2l_lib.tasks import world
from d2l_lib.training.router import (
    ELSEWHERE,
    ENCYCLOPEDIA,
    FIRST_HOP,
    RouterPreset,
    calibrate,
    draw_questions,
    new_router,
    router_loss,
    train_router,
)


@pytest.fixture(scope="module")
def model():
    return d2l.load("tiny/qa")


@pytest.fixture(scope="module")
def document():
    return world.draw_document(random.Random("router"), "test", 12)


@pytest.fixture(scope="module")
def adapter(model, document):
    return model.internalize_each([document.text])[0]


@pytest.fixture(scope="module")
def small():
    """A router of 2 layers, rank 3 and width 8 that has learned nothing."""
    torch.manual_seed(0)
    return Router(RouterConfig(2, 3, 5, 8, world.UNKNOWN)).requires_grad_(False)


def drawn(blocks, tokens, seed=0):
    torch.manual_seed(seed)
    return Responses(torch.randn(blocks, tokens, 12), torch.rand(2) + 0.5, torch.tensor([-1.0, -20.0, -3.0]))


def refusing(model):
    """The model's router, no block of which is ever good enough."""
    router = copy.deepcopy(model.router)
    router.none.bias.fill_(1e3)
    return router


def test_a_question_beside_others_has_the_scores_it_has_alone(small):
    asked = [drawn(4, 5), drawn(1, 9, 1), drawn(6, 3, 2)]
    scores, verdicts = small(asked)
    assert scores.shape == (3, 7) and verdicts.shape == (3, 6)
    for row, one in enumerate(asked):
        K = len(one.rows)
        own, of_own = small([one])
        torch.testing.assert_close(scores[row, : K + 1], own[0])
        torch.testing.assert_close(verdicts[row, :K], of_own[0])
        assert (scores[row, K + 1 :] == -1e4).all()


def test_the_score_is_what_the_text_says(small):
    one = drawn(3, 4)
    small.measure([drawn(5, 6, 3)])
    h = torch.nn.functional.gelu(small.token((one.rows - small.mean) / small.deviation))
    mean = (small.attention(h).softmax(1) * h).sum(1)
    known = torch.cat([torch.tensor([-1.0, -12.0, -3.0]), one.null.log()])
    over_tokens = torch.cat([h[:, -1], h.amax(1), mean, known.expand(3, -1)], -1)
    z = torch.nn.functional.gelu(small.block(over_tokens))
    expected = torch.cat([small.none(known), small.score(z)[:, 0]])
    scores, verdicts = small([one])
    torch.testing.assert_close(scores[0], expected)
    torch.testing.assert_close(verdicts[0], small.verdict(z)[:, 0])


def test_a_block_has_the_score_that_it_has_among_others_and_an_adapter_without_blocks_has_none(small):
    one = drawn(5, 4)
    scores, other = small([one])[0][0], small([replace(one, rows=one.rows[[3, 1]])])[0][0]
    torch.testing.assert_close(other, scores[[0, 4, 2]])
    none = small([replace(one, rows=one.rows[:0])])[0]
    assert none.shape == (1, 2) and none[0, 0].isfinite() and none[0, 1] == -1e4


def test_only_what_would_be_answered_with_yes_or_no_is_judged(small):
    for log_probs, expected in (((-9.0, -0.8, -0.7), True), ((-0.1, -3.0, -3.0), False), ((-9.0, -5.0, -0.1), True)):
        assert small.states(torch.tensor(log_probs)) == expected


def test_sizes_that_make_no_router_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        RouterConfig(2, 0, 5, 8, world.UNKNOWN)
    with pytest.raises(ValueError, match="two verdicts"):
        RouterConfig(2, 3, 5, 8, world.UNKNOWN, ("Yes",))


def test_a_verdict_is_one_more_row_that_the_question_itself_finds():
    torch.manual_seed(0)
    block = Block("d", 0, None, 0.5, {"down_proj": torch.randn(2, 3, 7)}, {"down_proj": torch.randn(2, 3, 5)})
    x, direction = torch.randn(7), torch.nn.functional.normalize(torch.randn(5), dim=0)
    judged = with_verdict(block, "down_proj", x, direction, 4.0, 1)

    def added(one, layer):
        return 4.0 * one.weight * one.B["down_proj"][layer].T @ (one.A["down_proj"][layer] @ x)

    torch.testing.assert_close(added(judged, 1) - added(block, 1), 40.0 * direction, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(added(judged, 0), added(block, 0))
    assert (judged.rank, judged.document, judged.weight, block.rank) == (4, "d", 0.5, 3)


@torch.no_grad()
def test_one_pass_with_the_bias_gives_all_that_is_read(model, adapter, document):
    texts = [world.question_about(random.Random(0), fact).text for fact in document.facts[:3]] + ["Who?"]
    prompts, rows = question_ids(model.tokenizer, texts), []
    handle = model.base_model.get_input_embeddings().register_forward_pre_hook(lambda _, a: rows.append(len(a[0])))
    weighed = weigh(model, model.router, prompts, [adapter] * 4)
    handle.remove()
    assert rows == [4]
    linears, seen = target_linears(model.base_model, ["down_proj"])["down_proj"], {}
    handles = [
        linear.register_forward_pre_hook(lambda _, a, layer=layer: seen.update({layer: a[0][0]}))
        for layer, linear in enumerate(linears)
    ]
    output = model.base_model.get_output_embeddings().weight * final_norm(model.base_model).weight
    e = torch.nn.functional.normalize(output - output.mean(0), dim=-1)
    for prompt, one in zip(prompts, weighed, strict=True):
        with model.applied(adapter.scaled(0.0)):
            logits = model.base_model(torch.tensor([prompt])).logits[0, -1]
        assert one.adapter is adapter
        got = one.responses.rows.unflatten(-1, (2, 4, 8))  # [K, T, keys or words, layers, rows]
        for place, block in enumerate(adapter.blocks):
            for layer in range(4):
                keys = seen[layer] @ block.A["down_proj"][layer].T
                torch.testing.assert_close(got[place, :, 0, layer], keys, rtol=1e-3, atol=1e-3)
                words = e[prompt] @ block.B["down_proj"][layer].T
                torch.testing.assert_close(got[place, :, 1, layer], words, rtol=1e-3, atol=1e-3)
        for layer in range(4):
            null = null_score(seen[layer][-1], *(part[layer] for part in model.hypernetwork.null()["down_proj"]))
            torch.testing.assert_close(one.responses.null[layer], null, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one.x, seen[3][-1], rtol=1e-3, atol=1e-4)
        first = [answer_ids(model.tokenizer, text)[0] for text in (world.UNKNOWN, "Yes", "No")]
        torch.testing.assert_close(one.responses.log_probs, logits.log_softmax(-1)[first], rtol=1e-3, atol=1e-3)
    for handle in handles:
        handle.remove()


def test_of_many_blocks_those_that_respond_most_are_compared_and_none_without_weight(
    model, adapter, document, monkeypatch
):
    texts = [world.question_about(random.Random(0), fact).text for fact in document.facts[:4]]
    prompts, many = question_ids(model.tokenizer, texts), [adapter] * 4
    whole = weigh(model, model.router, prompts, many)
    monkeypatch.setattr("d2l_lib.routing.CANDIDATES", 3)
    for one, every in zip(weigh(model, model.router, prompts, many), whole, strict=True):
        keys = every.responses.rows[:, -1].unflatten(-1, (2, 4, 8))[:, 0, 3].norm(dim=-1)
        kept = sorted(keys.topk(3).indices.tolist())
        assert [block.chunk for block in one.adapter.blocks] == kept
        torch.testing.assert_close(one.responses.rows, every.responses.rows[kept])
    assert model.answer(texts, adapter, blocks=1) == [model.answer(text, adapter, blocks=1) for text in texts]
    first = route(model, texts[:1], many[:1])[0].blocks[0]
    without = adapter._with(blocks=tuple(b.weighted(float(b.chunk != first.chunk)) for b in adapter.blocks))
    assert all(block.chunk != first.chunk for block in route(model, texts[:1], [without])[0].blocks)
    assert route(model, texts[:1], [adapter.scaled(0.0)])[0].blocks == ()


def test_left_out_the_router_chooses_and_a_stated_threshold_or_shortlist_tries(model, adapter, document, monkeypatch):
    text = world.question_about(random.Random(0), document.facts[0]).text
    (before,) = route(model, [text], [adapter], least=-math.inf)
    monkeypatch.setattr(model, "router", refusing(model))
    assert route(model, [text], [adapter])[0].blocks == ()
    assert route(model, [text], [adapter.only(chunk=0)])[0].blocks == (), "of one block too"
    assert route(model, [text, text], [None, adapter.only(chunk=[])])[0] is None
    assert route(model, [text], [adapter], least=-math.inf)[0] == before
    assert len(route(model, [text], [adapter], least=-math.inf, shortlist=None)[0].blocks) == 1
    assert len(route(model, [text], [adapter], shortlist=8)[0].blocks) == 1


def bundled_choices(model, kind, n=40):
    """Of `n` validation questions of a kind: (question, the one adapter chosen, its answer)."""
    rng, questions, adapters = random.Random(f"bundled/{kind}"), [], []
    while len(questions) < n:
        document = world.draw_document(rng, "validation", 12)
        if (question := world.ask(rng, document, kind)) is not None:
            questions.append(question)
            adapters += model.internalize_each([document.text])
    texts = [question.text for question in questions]
    return list(zip(questions, route(model, texts, adapters), model.answer(texts, adapters, blocks=1), strict=True))


@pytest.mark.parametrize("kind", ["which_of", "list", "yes_no", "paraphrase"])
def test_the_bundled_router_finds_the_block_of_the_fact(model, kind):
    found = [
        any(s < end and start < e for s, e in (block.span for block in one.blocks) for start, end in question.evidence)
        for question, one, _ in bundled_choices(model, kind)
    ]
    assert sum(found) >= 0.85 * len(found), "by the keys of the last token it is one of ten of which-of questions"


def test_the_bundled_router_chooses_none_where_nothing_answers(model):
    refused = [not one.blocks for _, one, _ in bundled_choices(model, "unanswerable")]
    assert sum(refused) >= 0.9 * len(refused)


def test_the_bundled_model_says_the_verdict(model):
    right = [answer == question.answer for question, _, answer in bundled_choices(model, "yes_no")]
    judged = [one.blocks[0].rank == 9 for _, one, _ in bundled_choices(model, "yes_no", 10) if one.blocks]
    assert sum(right) >= 0.85 * len(right) and all(judged), "without it, half of them"
    assert {block.rank for _, one, _ in bundled_choices(model, "paraphrase", 10) for block in one.blocks} == {8}


def test_blocks_that_the_router_cannot_read_are_chosen_by_keys(model, adapter, document, monkeypatch):
    text = world.question_about(random.Random(0), document.facts[0]).text
    monkeypatch.setattr(model, "router", refusing(model))
    assert route(model, [text], [adapter])[0].blocks == ()
    other = adapter._with(blocks=tuple(adapter.blocks[:4]) + adapter.compressed(4).blocks)
    chosen = route(model, [text, text], [other, adapter])
    assert chosen[0] == route(model, [text], [other], least=model.least_relevance)[0] and chosen[1].blocks == ()


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


def test_what_asks_for_a_first_hop_alone_has_none(model, adapter, document, monkeypatch):
    monkeypatch.setattr("d2l_lib.routing._chosen_by_router", lambda model, prompts, adapters, blocks: list(adapters))
    for question, expected in (
        ("Who was the mayor of Halmere?", None),
        ("Where is the seat of the Lencott Bank?", None),
        ("Who taught the mayor of Halmere?", "What is the mayor of Halmere?"),
        ("Who founded the employer of Ada Lovel?", "What is the employer of Ada Lovel?"),
    ):
        hops = first_hops(model, [question], [adapter])
        assert (hops[0].asked if hops else None) == expected


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
    monkeypatch.setattr("d2l_lib.routing.ASK_HOP", ())
    at_once = right()
    assert sum(by_hops) >= sum(at_once) + 3 and sum(by_hops) >= 0.8 * len(asked)


def test_a_question_that_is_its_own_first_hop_keeps_its_block(model, monkeypatch):
    rng = random.Random("one hop")
    document = world.draw_document(rng, "validation", 30)
    (adapter,) = model.internalize_each([document.text])
    texts = [question for fact in document.facts for question in world.wordings(fact) if _HOP.search(question)]
    by_hops = chosen_spans(model, texts, [adapter] * len(texts))
    monkeypatch.setattr("d2l_lib.routing.ASK_HOP", ())
    at_once = chosen_spans(model, texts, [adapter] * len(texts))
    assert len(texts) >= 8 and sum(a == b for a, b in zip(by_hops, at_once, strict=True)) >= 0.9 * len(texts)


def test_no_first_hop_is_answered_where_the_router_refuses_it(model, adapter, monkeypatch):
    monkeypatch.setattr(model, "router", refusing(model))
    monkeypatch.setattr(model, "answer", lambda questions, *_, **__: list(questions) and pytest.fail("asked a block"))
    assert chosen_spans(model, ["When was the mayor of Zorwick born?"], [adapter]) == [[]]


def test_a_router_is_saved_with_the_model_and_a_damaged_one_is_named(model, tmp_path):
    folder = model.save(tmp_path / "model")
    other = refusing(model)
    keep_router(str(folder), other)
    loaded = d2l.load(folder).router
    assert loaded.config == other.config and not loaded.training
    for name, value in other.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    settings = json.loads((folder / SETTINGS).read_text())
    settings["meta"]["router"]["width"] += 1
    (folder / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="does not fit its settings"):
        d2l.load(folder)
    settings["meta"]["router"] |= {"width": other.config.width, "rank": 4}
    (folder / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(ValueError):
        d2l.load(folder)
    (folder / ROUTER).unlink()
    with pytest.raises(ValueError, match="has no router.safetensors"):
        d2l.load(folder)


def test_a_model_without_a_router_replaces_the_files_of_one_with_it(model, tmp_path, monkeypatch):
    folder = model.save(tmp_path / "model")
    assert (folder / ROUTER).is_file()
    monkeypatch.setattr(model, "router", None)
    model.save(folder)
    assert not (folder / ROUTER).exists() and d2l.load(folder).router is None


def test_a_short_training_lowers_the_loss_and_the_study_counts_right_choices(model):
    p = RouterPreset(questions=400, steps=60, warm_up=10, width=16, calibration=100, error=0.02)
    table, router = measure_router_weights(model, 150, 0, p=p)
    fresh, asked = new_router(model, 16, 0), list(draw_questions(model, router, 150, 3, "validation"))
    fresh.measure([one.responses for one in asked])
    before, after = (float(router_loss(one, asked, 0.3).detach()) for one in (fresh, router))
    assert after < 0.8 * before
    assert set(table["kind"]) >= {"one_hop", "unanswerable", ENCYCLOPEDIA, "which_of", JUDGED}
    share = table.set_index(["kind", "idea"])["share"]
    assert share["unanswerable", "keys of all layers"] == 0, "only the router can choose none"
    assert share["unanswerable", "router"] > 0.3
    again = train_router(model, 0, p)
    calibrate(model, again, p.calibration, 0, "validation", p.error)
    assert all(torch.equal(a, b) for a, b in zip(router.parameters(), again.parameters(), strict=True))


def test_drawn_questions_name_the_blocks_that_hold_the_answer(model):
    router = new_router(model, 16, 0)
    for one in draw_questions(model, router, 120, 1, "train"):
        K = len(one.responses.rows)
        assert all(0 <= place < K for place in one.right) and one.responses.rows.shape[2] == 64
        assert (one.verdict is not None) == (one.kind == "yes_no")
        assert one.kind == FIRST_HOP or bool(one.right) == (one.kind not in ("unanswerable", ENCYCLOPEDIA, ELSEWHERE))


def test_none_is_calibrated_to_its_share_of_answerable_questions(model, monkeypatch):
    router = copy.deepcopy(model.router)
    bias = router.none.bias.clone()
    router.none.bias.add_(50.0)  # everything is refused
    calibrate(model, router, 200, 0, "validation", 0.25)
    assert router.none.bias < bias + 40

    rng, refused = random.Random("fresh"), []
    monkeypatch.setattr(model, "router", router)
    for _ in range(20):
        document = world.draw_document(rng, "validation", 20)
        questions = [world.question_about(rng, fact).text for fact in rng.sample(document.facts, 10)]
        adapter = model.internalize(document.text)
        refused += [not one.blocks for one in route(model, questions, [adapter] * len(questions))]
    assert 0.15 < sum(refused) / len(refused) < 0.35


def test_an_open_router_never_chooses_none(model, monkeypatch):
    adapter = model.internalize("The river Orrin flows through Halmere.")
    asked = "What is the capital of Norway?"
    weights = {name: value.clone() for name, value in model.router.state_dict().items()}
    monkeypatch.setattr(model, "router", model.router.always_open())
    (one,) = route(model, [asked], [adapter])
    assert len(one.blocks) == 1
    monkeypatch.undo()
    assert all(torch.equal(value, weights[name]) for name, value in model.router.state_dict().items())
