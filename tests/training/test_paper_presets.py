"""The published recipes on small models of the same families: sizes and rates, and runs from command to checkpoint."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import published_data
import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from transformers import Gemma2Config

import d2l_lib as d2l
from d2l_lib import presets
from d2l_lib.__main__ import main
from d2l_lib.documents import stop_ids
from d2l_lib.hypernetwork import Hypernetwork, HypernetworkConfig
from d2l_lib.presets import changed, preset, shortened
from d2l_lib.records import read_json, read_jsonl
from d2l_lib.training import command, contexts, recipes, step
from d2l_lib.training.batches import IGNORED, Batch, Chunks
from d2l_lib.training.loop import Run

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = {"paper-gemma": "gemma2", "paper-mistral": "mistral", "paper-qwen": "qwen3"}
TEMPLATES = {"gemma2": tiny_models.NO_SYSTEM_TEMPLATE}
SMALL = "latent_size=16 n_latent_queries=8 n_blocks=2 n_heads=4 n_kv_heads=2 head_dim=8 batches_per_step=2".split()
NEEDLE = [*SMALL, "shortest=48", "context_tokens=1200", "learning_rate=0.01"]
MAIN = [*SMALL, "context_tokens=1200", "learning_rate=0.01", "encoder_bits=None"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{family: folder of a small base model with its tokenizer}"""
    folders = {}
    for family in FAMILIES.values():
        folders[family] = tmp_path_factory.mktemp(family)
        tokenizer = tiny_models.build_tokenizer(TEMPLATES.get(family, tiny_models.CHAT_TEMPLATE))
        tiny_models.build_base_model(tokenizer, family=family, window=2048).save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


def load(folder):
    return recipes.load_base_model(folder)


def falls(log) -> bool:
    losses = [line["loss"] for line in read_jsonl(log)]
    return len(losses) >= 3 and losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_needles_from_the_command_to_a_model_that_loads(bases, tmp_path, name):
    base = bases[FAMILIES[name]]
    command = ["--preset", name, "--stage", "needle", "--base", str(base), "--runs", str(tmp_path), "--set", *NEEDLE]
    main(["train", *command, "--steps", "12", "--report-steps", "3", "--save-steps", "6", "--keep", "0"])
    run = tmp_path / name / "needle_own_seed0"
    assert falls(run / "log.jsonl")
    assert [line["step"] for line in read_jsonl(run / "log.jsonl")] == [3, 6, 9, 12]
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-6"]
    model = d2l.load(run / "final")
    assert model.chunk_tokens == 1024 and model.config.encoder_type == "early_exit"
    adapter = model.internalize("The special magic number is 4217.")
    assert isinstance(model.answer("What is the special magic number?", adapter), str)
    assert model.hypernetwork.scaler_B["down_proj"].abs().max() > 0, "it has been trained"


@pytest.mark.parametrize("name", FAMILIES)
def test_both_main_stages_from_the_command_to_a_model_that_loads(bases, tmp_path, name):
    base = bases[FAMILIES[name]]
    published_data.write_published(tmp_path / "data", load(base)[1], n=6)
    command = ["--preset", name, "--base", str(base), "--runs", str(tmp_path), "--shards", str(tmp_path / "data")]
    main(["train", "--stage", "qa", *command, "--steps", "12", "--report-steps", "3", "--set", *MAIN])
    run = tmp_path / name / "qa_own_seed0"
    assert falls(run / "self_generated" / "log.jsonl")
    first, second = (read_jsonl(run / stage / "log.jsonl") for stage in ("self_generated", "chunked"))
    assert second[-1]["loss"] < second[0]["loss"] < first[0]["loss"], "it goes on from the first stage"
    model = d2l.load(run / "final")
    assert model.chunk_tokens == 512 and model.config.encoder_type == "per_layer_activations"
    assert len(model.internalize("Tom lives in Rome. " * 60).blocks) > 1


def test_what_the_paper_says():
    gemma = preset("paper-gemma")
    assert [preset(name).needle.l1 for name in FAMILIES] == [1.5, 2.0, 0.5]
    assert [preset(name).base_source for name in FAMILIES] == [
        "google/gemma-2-2b-it", "mistralai/Mistral-7B-Instruct-v0.2", "Qwen/Qwen3-4B-Instruct-2507",
    ]  # fmt: skip
    needle, single, chunked = gemma.needle, gemma.qa.self_generated, gemma.qa.chunked
    assert list(gemma.qa.stages.values()) == [single, chunked]
    for p in (needle, single, chunked):
        assert (p.latent_size, p.rank, p.n_heads, p.head_dim, p.n_kv_heads) == (512, 8, 16, 128, 4)
        assert p.min_learning_rate == 1e-7
    assert (needle.n_blocks, needle.n_latent_queries, needle.encoder_type) == (8, 208, "early_exit")
    assert (single.n_blocks, single.n_latent_queries, single.encoder_type) == (9, 8, "per_layer_activations")
    assert (needle.neftune, single.neftune, chunked.neftune) == (0.0, 5.0, 5.0)
    assert [p.steps // p.batches_per_step for p in (single, chunked)] == [80_000, 20_000]
    assert [p.warmup_steps // p.batches_per_step for p in (needle, single, chunked)] == [100, 100, 2000]
    assert [p.learning_rate for p in (needle, single, chunked)] == [4e-5, 4e-5, 2e-5]
    assert sum(chunked.chunk_probabilities.values()) == sum(needle.chunk_probabilities.values()) == 1


def test_the_published_architecture_has_the_published_size():
    """The needle hypernetwork of Gemma-2-2b has the 309 M parameters of the paper; counted without memory for them."""
    config = Gemma2Config()  # the sizes of Gemma-2-2b
    p = preset("paper-gemma").needle
    with torch.device("meta"):
        hypernetwork = Hypernetwork(
            HypernetworkConfig(
                n_layers=config.num_hidden_layers, feature_size=config.hidden_size, per_layer_processing=True,
                d_in={"down_proj": config.intermediate_size}, d_out={"down_proj": config.hidden_size},
                **{name: getattr(p, name) for name in (
                    "latent_size", "rank", "n_latent_queries", "n_blocks", "n_heads", "n_kv_heads", "head_dim",
                )},
            )
        )  # fmt: skip
    assert round(sum(parameter.numel() for parameter in hypernetwork.parameters()) / 1e6) in (309, 310)


# ------------------------------------------------------------------------------------------------------------- batches
def small_needle(**changes):
    return replace(changed(preset("paper-gemma").needle, NEEDLE), steps=8, warmup_steps=1, **changes)


def test_needle_batches_keep_to_their_limits_and_end_turns_as_the_template_does(bases):
    _, tokenizer = load(bases["gemma2"])
    batches = contexts.NeedleBatches(tokenizer, small_needle(), 0)
    counts, chunk_lengths = set(), []
    for i in range(8):
        batch = batches[i]
        tokens = sum(int(mask.sum()) for mask in batch.chunks.mask)
        assert tokens <= 1200 and batch.l1_share == 1 and (batch.repeats == 1).all()
        counts.add(len(batch.chunks.counts))
        chunk_lengths += [int(row.sum()) for mask in batch.chunks.mask for row in mask]
        ends = (batch.labels != IGNORED).int().cumsum(-1).argmax(-1)
        assert (batch.labels.gather(1, ends[:, None]) == stop_ids(tokenizer)[-1]).all()
        assert stop_ids(tokenizer)[-1] != tokenizer.eos_token_id
    assert len(counts) > 1 and max(counts) > 1, "as many contexts as fit"
    wrapping = sum(map(len, contexts.chat_affixes(tokenizer)))
    assert min(chunk_lengths) >= 20 and max(chunk_lengths) <= 256 + 2 * wrapping
    with pytest.raises(ValueError, match="set max_repeats to 1"):
        contexts.NeedleBatches(tokenizer, small_needle(max_repeats=4), 0)


def test_distillation_batches_keep_to_their_limits(bases, tmp_path):
    _, tokenizer = load(bases["gemma2"])
    path = published_data.write_shards(tmp_path / "a.parquet", published_data.shard_rows(tokenizer, 20, facts=6))
    shards = recipes.read_shards(path)
    qa = preset("paper-gemma").qa
    p = replace(changed(qa.chunked, MAIN), shortest_chunk=25, longest_chunk=200, context_tokens=2500, input_tokens=300)
    batches = contexts.DistillationBatches(tokenizer, p, [shards], 0)
    n_chunks = []
    for i in range(6):
        batch = batches[i]
        assert sum(int(mask.sum()) for mask in batch.chunks.mask) <= 2500
        ends = (batch.labels != IGNORED).int().cumsum(-1).argmax(-1) + 1
        assert ends.sum() <= 300 and (batch.n_questions == 1).all()
        n_chunks += batch.chunks.counts.tolist()
    assert len(set(n_chunks)) > 2 and max(n_chunks) <= 8
    with pytest.raises(ValueError, match="of 1000 documents none fits into a batch of 30 tokens"):
        contexts.DistillationBatches(tokenizer, replace(p, context_tokens=30), [shards], 0)[0]
    short = replace(changed(qa.self_generated, MAIN), context_tokens=30)
    with pytest.raises(ValueError, match="no document has at most"):
        contexts.DistillationBatches(tokenizer, short, [shards], 0)


def test_lengths_without_reading_are_the_lengths(bases, tmp_path):
    _, tokenizer = load(bases["gemma2"])
    rows = published_data.shard_rows(tokenizer, 5)
    shards = recipes.read_shards(published_data.write_shards(tmp_path / "a.parquet", rows))
    for data in (shards, shards.select([3, 1])):
        assert contexts._context_lengths(data).tolist() == [len(ids) for ids in data["ctx_ids"]]


# ------------------------------------------------------------------------------------------------ steps of many batches
class Merged(torch.utils.data.Dataset):
    """Pairs of batches, each as one batch."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches) // 2

    def __getitem__(self, i):
        pair = [self.batches[2 * i], self.batches[2 * i + 1]]
        chunks = [row for b in pair for row in b.chunks.rows()]
        n_chunks = [n for b in pair for n in b.chunks.counts.tolist()]
        width = max(b.labels.shape[1] for b in pair)
        wide = [
            {
                n: torch.nn.functional.pad(getattr(b, n), (0, width - b.labels.shape[1]), value=v)
                for n, v in PADS.items()
            }
            for b in pair
        ]
        return Batch(
            chunks=Chunks.of(chunks, n_chunks, 0),
            **{name: torch.cat([one[name] for one in wide]) for name in PADS},
            n_questions=torch.cat([b.n_questions for b in pair]),
            repeats=torch.cat([b.repeats for b in pair]),
            l1_share=pair[0].l1_share,
        )


PADS = {"input_ids": 0, "labels": IGNORED}


def train(base, p, batches, run, **options):
    hypernetwork = recipes.train_hypernetwork(
        p, recipes.Base(base, None, "x"), batches, Run(run, report_steps=1, **options)
    )
    return hypernetwork, [line["total_loss"] for line in read_jsonl(run / "log.jsonl")]


def test_two_batches_a_step_are_one_batch_twice_as_large(bases, tmp_path):
    """Also where they have different numbers of contexts: every context counts alike."""
    base, tokenizer = load(bases["gemma2"])
    p = small_needle()
    batches = contexts.NeedleBatches(tokenizer, p, 0)
    assert any(len(batches[2 * i].chunks.counts) != len(batches[2 * i + 1].chunks.counts) for i in range(4))
    two, curve = train(base, p, batches, tmp_path / "two")
    large = replace(p, steps=4, warmup_steps=1, batches_per_step=1)
    one, other = train(base, replace(large, warmup_steps=0), Merged(batches), tmp_path / "one")
    assert len(curve) == 4 and curve == pytest.approx(other, rel=1e-4)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(two.parameters(), one.parameters(), strict=True))


@pytest.mark.slow
def test_two_processes_share_out_a_step_and_end_where_one_does(bases, tmp_path):
    """The command under torchrun: a step of two batches with different numbers of contexts, one for each process."""
    own = ["train", "--preset", "paper-gemma", "--stage", "needle", "--base", str(bases["gemma2"])]
    own += ["--steps", "4", "--report-steps", "1", "--set", *NEEDLE]
    main([*own, "--runs", str(tmp_path / "one")])
    torchrun = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2 -m d2l_lib".split()]
    command = [*torchrun, *own, "--runs", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    runs = [tmp_path / name / "paper-gemma" / "needle_own_seed0" for name in ("one", "two")]
    curves = [[line["total_loss"] for line in read_jsonl(run / "log.jsonl")] for run in runs]
    assert len(curves[0]) == 4 and curves[0] == pytest.approx(curves[1], rel=1e-4)
    one, two = (load_file(run / "final" / "hypernetwork.safetensors") for run in runs)
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


def test_computing_activations_again_changes_no_number(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "_RECOMPUTED_TOKENS", 300)
    base, tokenizer = load(bases["gemma2"])
    p = small_needle(neftune=0.0)
    batches = contexts.NeedleBatches(tokenizer, p, 0)
    kept, curve = train(base, p, batches, tmp_path / "kept")
    again, other = train(base, p, batches, tmp_path / "again", recompute=True)
    assert curve == pytest.approx(other, rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(kept.parameters(), again.parameters(), strict=True))


def test_noise_is_on_answering_alone_and_only_in_training(bases):
    base, tokenizer = load(bases["gemma2"])
    p = small_needle()
    torch.manual_seed(0)
    hypernetwork = Hypernetwork(recipes.hypernetwork_config(p, base, "x"))
    batch = contexts.NeedleBatches(tokenizer, p, 0)[0]
    plain = step.Internalization(base, hypernetwork, replace(p, l1=0.0))
    noisy = step.Internalization(base, hypernetwork, replace(p, l1=0.0, neftune=5.0))
    without = plain(batch)["loss"].item()
    with torch.no_grad():
        drawn = {noisy(batch)["loss"].item() for _ in range(2)}
        assert len(drawn) == 2 and without not in drawn
        assert all(value == pytest.approx(without, rel=0.5) for value in drawn)
        assert noisy.eval()(batch)["loss"].item() == without, "and the hook is gone"
    ids = torch.tensor([[5, 6, 7]])
    before = base.get_input_embeddings()(ids)
    with step._noisy_embeddings(base, 5.0, n_tokens=100):
        noise = base.get_input_embeddings()(ids) - before
    most = 5.0 / (100 * before.shape[-1]) ** 0.5
    assert 0.5 * most < noise.abs().max() <= most * 1.001
    assert torch.equal(base.get_input_embeddings()(ids), before)
    assert step._n_real_tokens(torch.tensor([[IGNORED, 3, 4, IGNORED], [IGNORED, 3, IGNORED, IGNORED]])) == 5


def test_the_rate_ends_where_the_preset_says(bases, tmp_path):
    base, tokenizer = load(bases["gemma2"])
    p = small_needle(min_learning_rate=1e-7)
    train(base, p, contexts.NeedleBatches(tokenizer, p, 0), tmp_path)
    # the last of four steps is two thirds down the cosine: a quarter is left of the way to the end
    rate = read_jsonl(tmp_path / "log.jsonl")[-1]["learning_rate"]
    assert rate == pytest.approx(0.25 * p.learning_rate + 0.75 * 1e-7, rel=1e-9)
    assert read_json(tmp_path / "hypernetwork.json")["chunk_tokens"] == 1024


# ------------------------------------------------------------------------------------------------------------ settings
def test_settings_are_changed_by_name_and_wrong_ones_are_named():
    p = preset("paper-gemma").needle
    assert changed(p, ["rank=4", "l1=1", "encoder_type=embed_only", "context_tokens=None"]) == replace(
        p, rank=4, l1=1, encoder_type="embed_only", context_tokens=None
    )
    assert changed(p, ["chunk_probabilities={1: 1.0}"]).chunk_probabilities == {1: 1.0}
    for change, message in (
        ("ranks=4", "name=value, where the name is one of latent_size"),
        ("rank", "give name=value"),
        ("rank=four", "rank must be int"),
        ("rank=True", "rank must be int"),
        ("steps=None", "steps must be int"),
        ("batches_per_step=0", "batches_per_step must be a finite number of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            changed(p, [change])
    several = changed(preset("tiny").needle, ["batches_per_step=4"])
    assert several.readout == replace(preset("tiny").needle.readout, batches_per_step=4)
    short = shortened(p, 50)
    assert (short.steps, short.warmup_steps) == (50 * 16, 80) and shortened(p, None) is p
    assert shortened(replace(p, warmup_steps=16), 50).warmup_steps == 16
    with pytest.raises(ValueError, match="at least one"):
        shortened(p, 0)


def test_batches_are_shared_out_evenly_or_not_at_all():
    p = preset("paper-gemma").needle
    assert replace(p, batches_per_step=64).accumulation(16) == 4 and p.accumulation(1) == 16
    with pytest.raises(ValueError, match="3 processes cannot share out 16 batches"):
        p.accumulation(3)


def test_wrong_commands_say_what_to_do(bases, tmp_path, capsys):
    command = ["train", "--preset", "paper-gemma", "--runs", str(tmp_path), "--stage"]
    with pytest.raises(SystemExit, match="^d2l train: .*give --shards"):
        main([*command, "qa", "--base", str(bases["gemma2"])])
    with pytest.raises(SystemExit, match=r"^d2l train: base model 'google/gemma-2-2b-it' could not be read"):
        main([*command, "needle"])
    for wrong, reason in (
        (["base"], "neither a base nor a text-to-lora stage"),
        (["text-to-lora"], "neither a base nor a text-to-lora stage"),
        (["needle", "--variant", "no_readout"], "no variants"),
        (["needle", "--shards", "x"], "are for --stage qa, not for needle"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*command, *wrong])
        assert stopped.value.code == 2 and reason in capsys.readouterr().err


def test_a_run_of_other_sizes_is_not_continued(bases, tmp_path):
    base, tokenizer = load(bases["gemma2"])
    p = small_needle()
    train(base, p, contexts.NeedleBatches(tokenizer, p, 0), tmp_path, save_steps=2)
    with pytest.raises(ValueError, match="has checkpoints of a hypernetwork of other sizes"):
        train(base, replace(p, rank=4), contexts.NeedleBatches(tokenizer, p, 0), tmp_path)


def test_4_bit_needs_a_gpu_and_says_so(monkeypatch, capsys):
    p = preset("paper-gemma").qa.self_generated
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settled = recipes.settle_encoder(p)
    assert settled == replace(p, encoder_bits=None) and "no GPU" in capsys.readouterr().out
    assert recipes.settle_encoder(settled) is settled and recipes.load_encoder(settled, "x") is None
    with pytest.raises(ValueError, match="4, or None"):
        recipes.settle_encoder(replace(p, encoder_bits=8))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(recipes, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package bitsandbytes"):
        recipes.settle_encoder(p)
    monkeypatch.setattr(recipes, "find_spec", lambda name: object())
    assert recipes.settle_encoder(p) is p


def test_presets_are_complete():
    assert set(presets.PRESETS) == {"tiny", "smollm2", *FAMILIES}
    assert (
        preset("smollm2").base_source == "smollm2"
        and preset("smollm2").rows is not None
        and preset("tiny").rows is None
    )
    assert preset("tiny").base_source == "tiny"
    a = SimpleNamespace(base=None, steps=None, set=[])
    assert not command._is_own(a, preset("tiny")) and command._is_own(a, preset("paper-gemma"))
