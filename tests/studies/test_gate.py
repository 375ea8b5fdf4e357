"""Gate and dial: the base model answers where no block is relevant, and layers are weighed on their own."""

import json
import math
import random
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

import d2l_lib as d2l
from d2l_lib.adapter import scaled_layers
from d2l_lib.routing import Gate, gated, relevance
from d2l_lib.studies import gate as gate_study
from d2l_lib.studies import routing_shares
from d2l_lib.studies.dial import best_strength, dial_curve, dial_samples
from d2l_lib.studies.gate import best_threshold, gate_curve
from d2l_lib.tasks import world

DOCUMENT = world.draw_document(random.Random("gating"), "test", 5)


@pytest.fixture(scope="module")
def model():
    return d2l.load("tiny/qa")


@pytest.fixture(scope="module")
def adapter(model):
    (adapter,) = model.internalize_each([DOCUMENT.text])
    return adapter


def test_unrelated_questions_go_to_the_base_model_and_answerable_ones_to_their_block(model, adapter):
    rng = random.Random(0)
    own = [world.question_about(rng, fact).text for fact in DOCUMENT.facts]
    chosen = gated(model, own, adapter)
    assert sum(one is not None for one in chosen) >= len(own) - 1
    assert all(len(one.blocks) == 1 for one in chosen if one is not None)
    unrelated = [question.text for question in world.encyclopedia_questions(rng, 8)]
    assert sum(one is None for one in gated(model, unrelated, adapter)) >= 7


def test_the_threshold_decides(model, adapter):
    question = world.question_about(random.Random(1), DOCUMENT.facts[0]).text
    ((score,),) = [relevance(model, [question], [adapter])]
    most = float(score.max())
    assert gated(model, [question], adapter, least=most + 0.01) == [None]
    (all_of_it,) = gated(model, [question], adapter, least=most - 0.01, blocks=None)
    assert all_of_it is adapter
    (two,) = gated(model, [question], [adapter], least=-math.inf, blocks=2)
    best = sorted(score.argsort(descending=True)[:2].tolist())
    assert [block.chunk for block in two.blocks] == [adapter.blocks[place].chunk for place in best]
    assert gated(model, [question], None) == [None]
    with pytest.raises(ValueError, match="1 questions but 2 adapters"):
        gated(model, [question], [adapter, adapter])


def test_where_the_base_model_knows_an_answer_blocks_must_be_more_relevant(model, adapter, monkeypatch):
    own = world.question_about(random.Random(1), DOCUMENT.facts[0]).text
    known = next(iter(world.encyclopedia_questions(random.Random(0), 1))).text
    monkeypatch.setattr(model, "least_relevance", -math.inf)
    monkeypatch.setattr(model, "gate", None)
    assert None not in gated(model, [own, known], adapter)
    monkeypatch.setattr(model, "gate", Gate(known=math.inf, growth=0.0, refusal=world.UNKNOWN))
    kept, spared = gated(model, [own, known], adapter)
    assert len(kept.blocks) == 1 and spared is None
    assert None not in gated(model, [own, known], adapter, least=-math.inf), "a threshold that is given is the only one"
    monkeypatch.setattr(model, "gate", Gate(known=math.inf, growth=0.0, refusal="another phrase"))
    assert gated(model, [own, known], adapter) == [None, None]


def test_more_blocks_ask_for_more():
    gate = Gate(known=1.0, growth=0.5, refusal="no")
    assert [gate.least(n) for n in (0, 1, 2, 8)] == [1.0, 1.0, 1.5, 2.5]


def test_layers_are_weighed_on_their_own_and_the_operand_stays(adapter):
    before = adapter.factors("down_proj")
    scaled = scaled_layers(adapter, {1: 3.0})
    bias = adapter.bias["down_proj"]

    def documents(one, layer):
        A, B = one.factors("down_proj")
        own = one.rank - bias[0].shape[1]
        return B[layer, :own].T @ A[layer, :own]

    for layer in range(adapter.n_layers):
        expected = documents(adapter, layer) * (3.0 if layer == 1 else 1.0)
        torch.testing.assert_close(documents(scaled, layer), expected)
    assert scaled.bias is adapter.bias
    for one, other in zip(before, adapter.factors("down_proj"), strict=True):
        assert torch.equal(one, other)


def test_equal_weights_are_scaled(model, adapter):
    question = world.question_about(random.Random(2), DOCUMENT.facts[0]).text
    ids = torch.tensor(model.tokenizer(question)["input_ids"]).unsqueeze(0)
    logits = []
    for one in (adapter.scaled(0.5), scaled_layers(adapter, [0.5] * adapter.n_layers)):
        with model.applied(one), torch.no_grad():
            logits.append(model.base_model(ids).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("weights", "message"),
    [({9: 1.0}, "no layer 9"), ([1.0], "1 weights for 4 layers"), ([1, 1, 1, float("nan")], "finite number")],
)
def test_wrong_weights_are_named(adapter, weights, message):
    with pytest.raises(ValueError, match=message):
        scaled_layers(adapter, weights)


def test_the_gate_curve_takes_the_base_models_answer_below_the_threshold():
    samples = pd.DataFrame(
        {
            "condition": "routed",
            "about": ["the encyclopedia"] * 4 + ["the document"] * 4,
            "relevance": [0.1, 0.1, 0.1, 3.0, 5.0, 5.0, 2.0, 0.3],
            "base_correct": [True] * 4 + [False] * 4,
            "knows": [True] * 4 + [False] * 4,
            "correct": [False, True, True, False] + [True] * 4,
        }
    )
    apart = gate_curve(samples, (0.0, 4.0), least=1.0).set_index("least")
    assert list(apart["unrelated_loss"]) == [0.25, 0.0] and list(apart["answerable_loss"]) == [0.25, 0.25]
    curve = gate_curve(samples, (0.0, 0.2, 4.0)).set_index("least")
    assert list(curve["unrelated_loss"]) == [0.5, 0.25, 0.0]
    assert list(curve["answerable_loss"]) == [0.0, 0.0, 0.5]
    assert best_threshold(curve.reset_index(), "routed") == 0.2
    assert best_threshold(curve.reset_index(), "routed", allowed=0.5) == 4.0
    with pytest.raises(ValueError, match="try lower ones"):
        best_threshold(curve.reset_index(), "routed", allowed=-0.1)


def test_the_chosen_threshold_is_kept_in_the_models_folder(tmp_path, project_folder):
    folder = Path(shutil.copytree(project_folder / "data" / "tiny" / "qa", tmp_path / "qa"))
    gate_study.keep_thresholds(folder, 4.5)
    model = d2l.load(folder)
    assert model.least_relevance == 4.5
    assert d2l.load(model.save(tmp_path / "again")).least_relevance == 4.5
    gate = Gate(known=5.25, growth=0.75, refusal="I do not know.")
    gate_study.keep_thresholds(folder, 3.5, gate)
    assert d2l.load(d2l.load(folder).save(tmp_path / "with gate")).gate == gate
    settings = json.loads((folder / "config.json").read_text())
    settings["meta"]["gate"] = {"known": "much"}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"config\.json: meta\.gate\.known: a finite number is expected, not 'much'"):
        d2l.load(folder)
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.save a folder"):
        gate_study.keep_thresholds(file, 4.5)


def test_unanswerable_questions_are_scored_on_their_own():
    samples = pd.DataFrame(
        {
            "condition": "routed",
            "about": [*gate_study.SORTS[:2], *["nothing"] * 4],
            "relevance": [9.0, 0.0, 1.0, 1.0, 3.0, 3.0],
            "base_correct": True,
            "correct": [True, True, False, False, False, True],
        }
    )
    curve = gate_curve(samples, (0.0, 2.0, 5.0)).set_index("least")
    assert list(curve["unanswerable"]) == [0.25, 0.75, 1.0]
    assert list(curve["unrelated_loss"]) == [0.0, 0.0, 0.0]
    assert gate_curve(samples[:2], (0.0,))["unanswerable"].isna().all()


def test_contradictions_count_as_overridden_where_the_document_is_followed():
    samples = pd.DataFrame(
        {
            "condition": "routed",
            "about": [*gate_study.SORTS[:2], *["a contradiction"] * 4],
            "relevance": [9.0, 0.0, 1.0, 1.0, 3.0, 3.0],
            "base_correct": [False, True, *[False] * 4],
            "correct": [True, True, True, True, True, False],
        }
    )
    curve = gate_curve(samples, (0.0, 2.0)).set_index("least")
    assert list(curve["override"]) == [0.75, 0.25]
    assert list(curve["override_loss"]) == [0.0, pytest.approx(2 / 3)]


@pytest.mark.slow
def test_the_ideas_are_measured_on_the_same_questions(model):
    table, ideas, gate = gate_study.measure_gate(model, 4, 0, many=2)
    assert set(table["rule"]) == set(gate_study.RULES) and set(table["documents"]) == {1, 2}
    assert table.groupby(["rule", "split", "documents", "condition"])["chosen"].sum().max() == 1
    assert len(ideas) == 8 and (ideas.groupby("documents")["n"].nunique() == 1).all()
    assert (gate.known, gate.growth) == tuple(ideas.iloc[-1][["at_one_block", "growth"]])
    at = table[
        table["chosen"] & (table["split"] == "test") & (table["documents"] == 1) & (table["condition"] == "routed")
    ]
    plain = ideas[(ideas["idea"] == "relevance") & (ideas["documents"] == 1)].iloc[0]
    assert plain["unrelated_loss"] == at[at["rule"] == "one threshold"]["unrelated_loss"].iloc[0]


def test_every_share_is_measured_on_the_same_questions(model):
    table = routing_shares.measure_shares(model, 2, 0, many=3, shares=(0.0, math.inf))
    assert set(table["condition"]) == {"one hop", "paraphrase", "3 documents"}
    assert set(table["share"]) == {"0", "divergence alone"}
    assert (table.groupby("condition")["n"].nunique() == 1).all()


def test_the_strongest_override_without_damage_is_chosen():
    curve = pd.DataFrame(
        {
            "layers": ["all layers"] * 3,
            "weight": [1.0, 1.5, 2.0],
            "gate": False,
            "override": [0.5, 0.7, 0.9],
            "document": [0.9, 0.9, 0.9],
            "unrelated": [1.0, 1.0, 0.7],
        }
    )
    assert best_strength(curve, False) == ("all layers", 1.5)


def test_samples_ask_both_sorts_and_the_dial_turns_every_layer(model):
    rows = gate_study.gate_samples(model, 4, 0, "validation", facts=(2, 3), per_document=2)
    assert (rows.groupby(["condition", "about"]).size() == 4).all()
    assert set(rows["about"]) == set(gate_study.SORTS)
    several = gate_study.many_documents_samples(model, 2, 0, "test", count=3, per_adapter=2)
    assert several["single_document"].dtype == bool
    one = gate_study.many_documents_samples(model, 2, 0, "test", count=1, per_adapter=2)
    assert (one["single_document"] == one["correct"]).all(), "of one document, alone is the same in each condition"
    dial = dial_samples(model, 2, 0, "test", weights=(0.0, 1.0), n_facts=2)
    assert set(dial["layers"]) == {"all layers", *(f"layer {layer}" for layer in range(4))}
    curve = dial_curve(dial).set_index(["layers", "weight", "gate"])
    assert curve.loc[("all layers", 0.0, False), "override"] == 0
    assert curve.loc[("all layers", 0.0, False), "believed"] == 1
