"""Variants of the question-answering recipe: each changes what its name says, is trained and scored."""

from dataclasses import asdict, replace

import pytest
import train_small

from d2l_lib import presets, studies
from d2l_lib.presets import QA_VARIANTS, SHORT_QA, qa_variant
from d2l_lib.studies import ablations
from d2l_lib.training.loop import Run
from d2l_lib.training.recipes import Base


def differences(first, second) -> dict:
    return {name: value for name, value in asdict(second).items() if asdict(first)[name] != value}


def test_each_variant_changes_what_it_says_and_nothing_else():
    assert qa_variant("ours") == SHORT_QA
    assert qa_variant("no warm-up") == replace(SHORT_QA, readout=None)
    assert differences(SHORT_QA.recall, qa_variant("rank 16").recall) == {"rank": 16}
    assert qa_variant("rank 16").readout == SHORT_QA.readout
    assert differences(SHORT_QA.readout, qa_variant("keys not whitened").readout) == {"whiten": False}
    distilled, plain = (qa_variant(f"self-generated, {how}") for how in ("distillation", "cross-entropy"))
    assert distilled.recall is None and differences(distilled.self_generated, plain.self_generated) == {"distil": False}
    recipes = [repr(qa_variant(name)) for name in QA_VARIANTS]
    assert len(set(recipes)) == len(recipes)
    with pytest.raises(KeyError, match="known: ours"):
        qa_variant("rank 5")


@pytest.mark.slow
def test_a_variant_is_trained_scored_and_its_record_is_found(tmp_path, monkeypatch):
    base = Base(*train_small.small_base(), "small")
    sizes = {"latent_size": 16, "n_latent_queries": 2, "n_blocks": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
    recall = replace(
        SHORT_QA.recall, **sizes, rank=2, encoder_layer=1, steps=2, contexts=2, chunks=4, most_facts=5, warmup_steps=1
    )
    readout = replace(SHORT_QA.readout, steps=30, sentences=8, warmup_steps=1)
    world = replace(recall, last_layer=False, kinds=None)
    p = replace(SHORT_QA, readout=readout, recall=recall, world=world)
    monkeypatch.setattr(ablations, "FACTS", (1, 3))
    table = ablations.run_variant(p, base, Run(tmp_path / "run"), n=3, shards=None)
    assert list(table["task"]) == ["one hop", "one hop", "unanswerable", "encyclopedia"]
    assert (table["n"] == 3).all() and (table["seconds"] >= 0).all()
    monkeypatch.setattr(studies, "project_root", lambda: tmp_path)
    assert ablations.read_records().empty
    name = ablations.record_name("self-generated, cross-entropy", 2)
    assert name == "qa_ablation/self_generated_cross_entropy_seed2"
    assert len({ablations.record_name(variant, 0) for variant in presets.QA_VARIANTS}) == len(presets.QA_VARIANTS)
    rows = studies.record(name, table.assign(variant="self-generated, cross-entropy"), {"seed": 2, "n": 9})
    assert [(row["seed"], row["n"]) for row in rows] == [(2, 3)] * 4
    assert len(ablations.read_records()) == 4
