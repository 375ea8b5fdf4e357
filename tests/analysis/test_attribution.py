"""Attribution: leaving out is exact, gradients are derivatives, a shuffled hypernetwork destroys what was found."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import build_model

import d2l_lib as d2l
from d2l_lib.analysis import attribution, trust
from d2l_lib.analysis.attribution import (
    METHODS,
    Trials,
    answer_target,
    attribute,
    by_token,
    gradient,
    lasso,
    ranks,
    rows_of,
)
from d2l_lib.documents import context_ids
from d2l_lib.lora import is_applied
from d2l_lib.routing import key_scores
from d2l_lib.studies import faithfulness
from d2l_lib.tasks import world

TEXT = "Ada is here. Bob ran. It rained. Cleo sat down. The end."
QUESTION, ANSWER = "Who?", "Bob"


@pytest.fixture(scope="module")
def small():
    """A random model that writes two modules, and a document of several chunks."""
    model = build_model(modules=("down_proj", "up_proj"))
    (adapter,) = model.internalize_each({"doc": TEXT}, chunk_tokens=24)
    assert len(adapter.blocks) > 2
    return model, adapter


@pytest.fixture(scope="module")
def qa():
    """The bundled model, a document of the generated world, its adapter, and a question that is answered rightly."""
    model = d2l.load("tiny/qa")
    document = world.draw_document(random.Random("attribution"), "test", 8)
    (adapter,) = model.internalize_each({"doc": document.text})
    rng = random.Random("attribution/questions")
    for fact in document.facts:
        question = world.question_about(rng, fact)
        if model.answer(question.text, adapter) == question.answer:
            return model, document, adapter, question
    raise AssertionError("the bundled model answers nothing")


@torch.no_grad()
def log_probs(model, adapter, question=QUESTION, answer=ANSWER):
    """Of every answer token, by a plain forward pass with the adapter applied."""
    target = answer_target(model, question, answer)
    ids = torch.tensor([target.prompt + target.answer])
    with model.applied(adapter):
        logits = model.base_model(ids).logits[0].log_softmax(-1)
    return logits[torch.arange(len(target.prompt) - 1, ids.shape[1] - 1), torch.tensor(target.answer)]


# --------------------------------------------------------------------------------------------------- leaving out
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_leave_one_out_is_the_adapter_without_the_chunk(small, weight):
    model, adapter = small
    adapter = adapter.scaled(weight)
    table = attribute(model, adapter, QUESTION, ANSWER)
    full = log_probs(model, adapter)
    for place, block in enumerate(adapter.blocks):
        expected = full - log_probs(model, adapter.without(chunk=block.chunk))
        torch.testing.assert_close(torch.tensor(table["by_token"][place]), expected, rtol=1e-4, atol=2e-5)
        assert math.isclose(table["contribution"][place], float(expected.sum()), rel_tol=1e-4, abs_tol=5e-5)


def test_leave_one_out_is_recomputing_without_the_chunk(qa):
    model, document, _, question = qa
    texts = [document.text[slice(*fact.span)] for fact in document.facts]
    rows = context_ids(model.encoder_tokenizer, texts)
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    everything = model.internalize_ids(ids, mask)
    table = attribute(model, everything, question.text, question.answer, controls=False)
    full = log_probs(model, everything, question.text, question.answer).sum()
    for place in range(len(texts)):
        kept = [other for other in range(len(texts)) if other != place]
        again = model.internalize_ids(ids[kept], mask[kept])
        lost = full - log_probs(model, again, question.text, question.answer).sum()
        assert math.isclose(table["contribution"][place], float(lost), rel_tol=1e-5, abs_tol=1e-4)
    model.reset()


def test_add_one_in_is_the_block_alone_against_the_bias(small):
    model, adapter = small
    table = attribute(model, adapter, QUESTION, ANSWER, method="add_one_in")
    none = log_probs(model, replace(adapter, blocks=())).sum()
    for place, block in enumerate(adapter.blocks):
        alone = log_probs(model, replace(adapter, blocks=(block,))).sum()
        assert math.isclose(table["contribution"][place], float(alone - none), rel_tol=1e-4, abs_tol=1e-4)
    assert table.attrs["controls"]["zero adapter"]["log_prob"] == pytest.approx(float(none), abs=1e-4)


def test_margin_says_whether_the_answer_is_what_is_said(small):
    model, adapter = small
    trials = Trials(model, adapter, QUESTION, model.answer(QUESTION, adapter, max_new_tokens=3) or "x")
    _, margins = trials.score(torch.ones(1, len(trials)))
    with torch.no_grad(), model.applied(adapter):
        ids = torch.tensor([trials.target.prompt + trials.target.answer])
        logits = model.base_model(ids).logits[0, len(trials.target.prompt) - 1 : -1]
    for place, token in enumerate(trials.target.answer):
        others = torch.cat([logits[place, :token], logits[place, token + 1 :]])
        assert float(margins[0, place]) == pytest.approx(float(logits[place, token] - others.max()), abs=1e-4)


@pytest.mark.parametrize("method", ["leave_one_out", "add_one_in", "gradient"])
def test_a_part_without_weight_contributes_nothing(small, method):
    model, adapter = small
    blocks = (*adapter.blocks[:-1], replace(adapter.blocks[-1], weight=0.0))
    table = attribute(model, replace(adapter, blocks=blocks), QUESTION, ANSWER, method=method)
    assert abs(table["contribution"].iloc[-1]) < 1e-5
    assert table["contribution"].iloc[:-1].abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------ gradients
@pytest.mark.parametrize("level", ["chunk", "layer", "rank"])
def test_the_gradient_is_the_derivative_by_the_units_weight(small, level):
    model, adapter = small
    trials = Trials(model, adapter, QUESTION, ANSWER, level, directions=2)
    found, margin, _ = gradient(trials)
    h = 1e-2
    for place in range(len(trials)):
        step = torch.zeros(len(trials))
        step[place] = h
        weights = torch.stack([torch.ones(len(trials)) + step, torch.ones(len(trials)) - step])
        log_prob, margins = trials.score(weights)
        slope = (log_prob[0] - log_prob[1]) / (2 * h)
        torch.testing.assert_close(found[place], slope, rtol=2e-2, atol=3e-3)
        weakest = int(trials.score(torch.ones(1, len(trials)))[1].argmin())
        by_margin = float(margins[0, weakest] - margins[1, weakest]) / (2 * h)
        assert float(margin[place]) == pytest.approx(by_margin, rel=2e-2, abs=3e-3)


def test_integrated_gradients_add_up_to_what_the_features_do(small):
    """Between the mean feature everywhere, where chunks differ in nothing, and the features themselves."""
    model, adapter = small
    table = attribute(
        model, adapter, QUESTION, ANSWER, "sentence", "integrated_gradients", documents=TEXT, steps=64, controls=False
    )
    chunks = [TEXT[slice(*block.span)].strip() for block in adapter.blocks]
    ids = context_ids(model.encoder_tokenizer, chunks)
    length = max(map(len, ids))
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])
    with torch.no_grad():
        features = model.encoder.encode(padded, attention_mask=mask)
        mean = (features * mask[..., None]).sum((0, 1)) / mask.sum()
        loras = model.hypernetwork(mean.expand_as(features), attention_mask=mask)
    blocks = tuple(
        replace(block, A={m: A[place] for m, (A, _) in loras.items()}, B={m: B[place] for m, (_, B) in loras.items()})
        for place, block in enumerate(adapter.blocks)
    )
    change = log_probs(model, adapter).sum() - log_probs(model, replace(adapter, blocks=blocks)).sum()
    assert abs(float(change)) > 0.05
    assert table.attrs["elsewhere"] != 0
    assert table["contribution"].sum() + table.attrs["elsewhere"] == pytest.approx(float(change), rel=0.02, abs=0.01)


# ---------------------------------------------------------------------------------------------- layers, directions
def test_all_layers_are_the_whole_adapter_and_none_is_the_bias(small):
    model, adapter = small
    trials = Trials(model, adapter, QUESTION, ANSWER, "layer")
    assert len(trials) == adapter.n_layers * len(adapter.modules)
    found, _ = trials.score(torch.stack([torch.ones(len(trials)), torch.zeros(len(trials))]))
    torch.testing.assert_close(found[0], log_probs(model, adapter), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], log_probs(model, replace(adapter, blocks=())), rtol=1e-4, atol=1e-4)


def test_leaving_a_layer_out_is_zeros_in_that_layer(small):
    model, adapter = small
    table = attribute(model, adapter, QUESTION, ANSWER, "layer", controls=False)
    layer, module = 2, "up_proj"

    def without(block):
        B = dict(block.B)
        B[module] = B[module].clone()
        B[module][layer] = 0.0
        return replace(block, B=B)

    changed = replace(adapter, blocks=tuple(map(without, adapter.blocks)))
    lost = float((log_probs(model, adapter) - log_probs(model, changed)).sum())
    row = table[(table["layer"] == layer) & (table["module"] == module)].iloc[0]
    assert row["contribution"] == pytest.approx(lost, rel=1e-4, abs=5e-5)


def test_directions_are_the_singular_ones_of_the_sum(small):
    model, adapter = small
    rows = rows_of(adapter, "rank", directions=2)
    documents = replace(adapter, bias=None)
    A, B = documents.factors("down_proj")
    for layer in range(adapter.n_layers):
        S = torch.linalg.svdvals(B[layer].T.double() @ A[layer].double())
        found = rows.units[(rows.units["layer"] == layer) & (rows.units["module"] == "down_proj")]["strength"]
        assert list(found) == pytest.approx((adapter.scale * S[:2]).tolist(), rel=1e-4)
    trials = Trials(model, adapter, QUESTION, ANSWER, "rank", directions=2)
    whole, _ = trials.score(torch.ones(1, len(trials)))
    torch.testing.assert_close(whole[0], log_probs(model, adapter), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------- sentences
def test_a_sentence_is_left_out_by_writing_its_chunk_without_it(small):
    model, adapter = small
    table = attribute(model, adapter, QUESTION, ANSWER, "sentence", documents=TEXT)
    assert [TEXT[a:b] for a, b in zip(table["start"], table["end"], strict=True)] == list(table["text"])
    assert " ".join(table["text"]) == TEXT
    full = log_probs(model, adapter).sum()
    shared = table["block"].duplicated(keep=False)
    assert shared.any(), "no chunk of several sentences: the test needs one"
    for row in table[shared].to_dict("records"):
        block = adapter.blocks[row["block"]]
        rest = (TEXT[block.span[0] : row["start"]] + TEXT[row["end"] : block.span[1]]).strip()
        (anew,) = model.internalize_each([rest], chunk_tokens=60)
        assert len(anew.blocks) == 1
        blocks = [anew.blocks[0] if one is block else one for one in adapter.blocks]
        lost = float(full - log_probs(model, replace(adapter, blocks=tuple(blocks))).sum())
        assert row["contribution"] == pytest.approx(lost, rel=1e-3, abs=1e-4)


def test_chunks_of_one_sentence_are_their_sentence(qa):
    model, document, adapter, question = qa
    chunks = attribute(model, adapter, question.text, question.answer, controls=False)
    sentences = attribute(
        model, adapter, question.text, question.answer, "sentence", documents=document.text, controls=False
    )
    counts = sentences["block"].value_counts()
    for row in sentences.to_dict("records"):
        if counts[row["block"]] == 1:
            assert row["contribution"] == pytest.approx(chunks["contribution"][row["block"]], rel=1e-4, abs=1e-4)


# ---------------------------------------------------------------------------------------------------- end to end
@pytest.mark.parametrize(
    "method", ["leave_one_out", "add_one_in", "gradient", "surrogate", "relevance", "question_parts"]
)
def test_the_evidence_is_ranked_first(qa, method):
    model, document, adapter, question = qa
    table = attribute(model, adapter, question.text, method=method, controls=False)
    assert table.attrs["answer"] == question.answer
    truth = trust.evidence_units(table, question.evidence)
    assert trust.worst_rank(table["contribution"], truth) == 1


def test_question_parts_are_read_by_themselves(qa):
    model, _, adapter, question = qa
    own = replace(question, text="Where was it, and when?")
    table = attribute(model, adapter, own.text, own.answer, method="question_parts", controls=False)
    words = own.text.split()
    parts = [" ".join(words[a:b]).rstrip("?") for a in range(5) for b in range(a + 2, 6)]
    squares = torch.stack([key_scores(model, [part], [adapter])[0] for part in parts]).square()
    expected = (squares / squares.sum(1, keepdim=True)).amax(0)
    needed = attribute(model, adapter, own.text, own.answer, controls=False)["contribution"].argmax()
    expected[needed] = 1.0
    np.testing.assert_allclose(table["contribution"], expected, rtol=1e-4)
    assert math.isnan(table["margin_contribution"][0])
    one = attribute(model, adapter, "Where?", own.answer, method="question_parts", controls=False)
    assert one["contribution"].between(0, 1).all()


def test_the_block_of_a_first_hop_counts_as_much_as_the_answers(qa):
    model, rng, found = qa[0], random.Random("hops"), []
    while len(found) < 12:
        document = world.draw_document(rng, "validation", 12)
        if (question := world.ask(rng, document, "two_hop")) is not None:
            (adapter,) = model.internalize_each([document.text])
            table = attribute(model, adapter, question.text, question.answer, method="question_parts", controls=False)
            first, _ = trust.evidence_units(table, question.evidence)
            found.append((table["contribution"][first] > 0.99).any())
            assert (table["contribution"] == 1.0).sum() == 1
    assert sum(found) >= 9


def test_a_shuffled_hypernetwork_holds_nothing_of_the_answer(qa):
    model, document, _, question = qa
    other = trust.randomised(model)
    assert other.hypernetwork_key != model.hypernetwork_key
    for name, parameter in model.hypernetwork.named_parameters():
        shuffled = other.hypernetwork.get_parameter(name)
        torch.testing.assert_close(parameter.flatten().sort().values, shuffled.flatten().sort().values)
    (adapter,) = other.internalize_each([document.text])
    table = attribute(other, adapter, question.text, question.answer)
    mine = attribute(model, qa[2], question.text, question.answer)
    assert mine["contribution"].max() > 3 * table["contribution"].max()


def test_the_sentence_ranked_first_is_what_the_answer_needs(qa):
    model, document, adapter, question = qa
    table = attribute(model, adapter, question.text, question.answer, "sentence", documents=document.text)
    facts = {"hops": 1}
    checks = faithfulness._checks(model, document, question, table, facts, seed=0)
    assert checks["all_blocks_without_top"] is False
    assert checks["routed_without_top"] is False
    assert checks["routed_without_other"] is True


def test_results_hold_plain_values_controls_and_tokens(qa):
    model, document, adapter, question = qa
    (wrong,) = model.internalize_each({"other": world.draw_document(random.Random(5), "test", 8).text})
    for level, methods in METHODS.items():
        for method in methods:
            table = attribute(
                model, adapter, question.text, level=level, method=method, documents=document.text, wrong=wrong,
                samples=12, steps=2, directions=2,
            )  # fmt: skip
            json.dumps(table.attrs)
            controls = table.attrs["controls"]
            assert controls["all blocks"]["probability"] > 100 * controls["zero adapter"]["probability"]
            assert controls["all blocks"]["probability"] > 100 * controls["wrong document"]["probability"]
            assert controls["random units"]["units"]
            assert set(table["level"]) == {level}
            assert "".join(table.attrs["tokens"]).strip() == question.answer
            assert all(len(each) == len(table.attrs["tokens"]) for each in table["by_token"])
            if method not in ("relevance", "integrated_gradients", "question_parts"):
                summed = by_token(table).sum(axis=1).to_numpy()
                np.testing.assert_allclose(summed, table["contribution"], rtol=1e-4, atol=1e-4)
            assert table["contribution"].notna().all()


def test_the_model_is_what_it_was(small):
    model, adapter = small
    before = model.base_model(torch.tensor([[5, 6, 7]])).logits
    for method in METHODS["chunk"]:
        attribute(model, adapter, QUESTION, ANSWER, method=method, samples=8)
    assert torch.equal(before, model.base_model(torch.tensor([[5, 6, 7]])).logits)
    assert not is_applied(model.base_model)
    assert model.current is None


def test_trials_in_parts_are_trials_at_once(small, monkeypatch):
    model, adapter = small
    whole = attribute(model, adapter, QUESTION, ANSWER)["contribution"]
    monkeypatch.setattr("d2l_lib.analysis.trials._TOKENS_AT_ONCE", 1)
    np.testing.assert_allclose(attribute(model, adapter, QUESTION, ANSWER)["contribution"], whole, atol=1e-4)


def test_progress_counts_what_is_written_anew_and_the_trials(small, monkeypatch):
    model, adapter = small
    monkeypatch.setattr("d2l_lib.analysis.trials._TOKENS_AT_ONCE", 1)
    seen = []
    options = {"documents": TEXT, "controls": False, "progress": lambda *count: seen.append(count)}
    table = attribute(model, adapter, QUESTION, ANSWER, "sentence", **options)
    trials = len(table) + 1
    written, scored = seen[:-trials], seen[-trials:]
    assert scored == [(done, trials) for done in range(1, trials + 1)]
    shortened = int(table["block"].duplicated(keep=False).sum())
    assert written[-1] == (shortened, shortened)

    def stop(done, total):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        attribute(model, adapter, QUESTION, ANSWER, progress=stop)
    assert not is_applied(model.base_model)


# ------------------------------------------------------------------------------------------------------ bad input
def test_what_cannot_be_traced_is_named(small):
    model, adapter = small
    with pytest.raises(ValueError, match="unknown level 'word'"):
        attribute(model, adapter, QUESTION, ANSWER, "word")
    with pytest.raises(ValueError, match="has no method 'relevance'"):
        attribute(model, adapter, QUESTION, ANSWER, "layer", "relevance")
    with pytest.raises(ValueError, match="holds no document"):
        attribute(model, replace(adapter, blocks=()), QUESTION, ANSWER)
    with pytest.raises(ValueError, match="pass documents="):
        attribute(model, adapter, QUESTION, ANSWER, "sentence")
    with pytest.raises(ValueError, match="'doc'"):
        attribute(model, adapter, QUESTION, ANSWER, "sentence", documents={"another": TEXT})
    with pytest.raises(ValueError, match="the answer"):
        attribute(model, adapter, QUESTION, "  ")
    with pytest.raises(TypeError, match="attribution has no option 'sample'; choose from documents, wrong, seed, samp"):
        attribute(model, adapter, QUESTION, ANSWER, sample=8)
    with pytest.raises(ValueError, match="samples"):
        attribute(model, adapter, QUESTION, ANSWER, method="surrogate", samples=0)
    with pytest.raises(ValueError, match="window"):
        attribute(model, adapter, QUESTION, "x" * model.window)
    other = build_model(modules=("down_proj", "up_proj"), seed=2)
    with pytest.raises(ValueError, match="another"):
        attribute(other, adapter, QUESTION, ANSWER, "sentence", documents=TEXT)


def test_a_registered_method_is_a_method_like_any_other(small, monkeypatch):
    model, adapter = small
    monkeypatch.setattr(attribution, "METHODS", dict(METHODS))
    monkeypatch.setattr(attribution, "_RUN", dict(attribution._RUN))

    @attribution.register("chunk")
    def rank_of_block(trials):
        ranks = torch.tensor([float(block.rank) for block in trials.adapter.blocks])
        return attribution.Scores(ranks[:, None].expand(-1, len(trials.target.answer)), ranks)

    assert attribution.METHODS["chunk"] == (*METHODS["chunk"], "rank_of_block")
    table = attribute(model, adapter, QUESTION, ANSWER, method="rank_of_block")
    assert table["margin_contribution"].tolist() == [block.rank for block in adapter.blocks]
    with pytest.raises(ValueError, match="has no method 'rank_of_block'"):
        attribute(model, adapter, QUESTION, ANSWER, "layer", "rank_of_block")


# -------------------------------------------------------------------------------------------------- faithfulness
def test_lasso_finds_the_few_that_count():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (40, 20), generator=generator).float()
    y = 3.0 * x[:, [4]] - 2.0 * x[:, [11]] + 7.0
    found = lasso(x, y, 0.05)[:, 0]
    assert found[4] == pytest.approx(3.0, abs=0.4) and found[11] == pytest.approx(-2.0, abs=0.4)
    assert (found.abs() > 0.05).sum() == 2
    assert lasso(x, y, 1.0).abs().max() < 1e-6, "the largest penalty leaves nothing"
    assert torch.equal(lasso(x, torch.zeros(40, 2), 0.1), torch.zeros(20, 2))


def test_ranks_and_correlations():
    assert ranks([0.1, 5.0, -1.0, 5.0]) == [3, 1, 4, 2]
    assert trust.rank_correlation([1, 2, 3, 4], [10, 20, 25, 90]) == pytest.approx(1.0)
    assert trust.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert trust.rank_correlation([1, 1, 1], [1, 2, 3]) == 0.0


def test_areas_and_a_perfect_order(qa):
    """The order by what really happens has a smaller deletion area than the reverse, and a larger insertion area."""
    model, _, adapter, question = qa
    trials = Trials(model, adapter, question.text, question.answer)
    lost = attribute(model, adapter, question.text, question.answer)["contribution"]
    best = sorted(range(len(lost)), key=ranks(lost).__getitem__)
    found = trust.curves(trials, {"best": best, "worst": best[::-1]})
    areas = {key: trust.area(rows) for key, rows in found.groupby(["method", "curve"])}
    assert areas["best", "deletion"] < areas["worst", "deletion"] / 3
    assert areas["best", "insertion"] > areas["worst", "insertion"]
    ends = found[found["share"].isin([0.0, 1.0])]
    whole = math.exp(float(trials.score(torch.ones(1, len(trials)))[0].sum()))
    for curve, share in (("deletion", 0.0), ("insertion", 1.0)):
        at = ends[(ends["curve"] == curve) & (ends["share"] == share)]["probability"]
        assert list(at) == pytest.approx([whole, whole], rel=1e-3)
    straight = pd.DataFrame({"units": [0, 1, 2], "share": [0, 0.5, 1], "probability": [1.0, 0.5, 0.0]})
    assert trust.area(straight) == pytest.approx(0.5)


def test_subset_effects_are_those_of_the_adapters_without_them(small):
    model, adapter = small
    trials = Trials(model, adapter, QUESTION, ANSWER)
    masks, effects = trust.subset_effects(trials, 4, torch.Generator().manual_seed(0))
    full = log_probs(model, adapter).sum()
    for mask, effect in zip(masks, effects, strict=True):
        assert int(mask.sum()) == len(adapter.blocks) // 2
        kept = tuple(block for block, gone in zip(adapter.blocks, mask, strict=True) if not gone)
        assert float(effect) == pytest.approx(
            float(full - log_probs(model, replace(adapter, blocks=kept)).sum()), abs=1e-4
        )


def test_sign_flips_tell_a_difference_from_none():
    rng = np.random.default_rng(0)
    assert trust.sign_flip(rng.normal(1.0, 1.0, 60)) < 0.001
    assert trust.sign_flip(np.tile([1.0, -1.0], 30)) > 0.9
    assert trust.sign_flip([1.0] * 4) == pytest.approx(2 / 16, abs=0.02)  # exact: all signs alike
    assert trust.sign_flip([]) == 1.0


def test_evidence_and_chance():
    units = pd.DataFrame({"start": [0, 10, 20], "end": [10, 20, 30]})
    assert trust.evidence_units(units, [(12, 18), (8, 12)]) == [[1], [0, 1]]
    assert trust.worst_rank([1.0, 3.0, 2.0], [[1], [0, 2]]) == 2
    assert faithfulness._chance([[1]], 4) == 0.25
    assert faithfulness._chance([[0], [1]], 4) == 0.5  # both of two in three of four: 3 choose 1 ... 2 of 4 sets
    assert trust.without_sentence("One. Two. Three.", 5, 9) == "One. Three."


def test_the_study_keeps_what_it_has_done(qa, tmp_path, monkeypatch):
    model = qa[0]
    options = {"kinds": ("one_hop",), "sentences": (4, 5)}
    monkeypatch.setattr(faithfulness, "_BATCH", 2)
    samples = faithfulness.study(model, 3, 3, tmp_path, **options)
    files = list(tmp_path.iterdir())
    assert files
    monkeypatch.setattr(faithfulness, "study_one", None)  # nothing is computed twice
    again = faithfulness.study(model, 3, 3, tmp_path, **options)
    assert len(again) == len(samples)
    found = pd.DataFrame(faithfulness.summarise(samples, 0))
    rows = found[(found["what"] == "method") & (found["sentences"] == "all") & (found["answering"] == "all blocks")]
    assert {*METHODS["chunk"], "leave_one_out, sentences", "leave_one_out, randomised weights"} <= set(rows["method"])
    assert rows["hit_rate"].between(0, 1).all()
    checks = found[found["what"] == "check"]
    assert {"wrong without the sentence ranked first", "wrong without a random other sentence"} <= set(checks["name"])


def test_questions_are_drawn_alike_and_sizes_are_grouped():
    first = [next(trust.drawn(0, ("one_hop",), 8, 12)) for _ in range(2)]
    assert first[0] == first[1]
    assert [faithfulness.size_group(n) for n in (8, 16, 17, 40)] == ["8-16", "8-16", "17-24", "33-40"]
