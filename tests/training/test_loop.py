"""Training: a killed run ends where an uninterrupted one does, batches are as described, the loss is the one we say."""

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
import train_small
from safetensors.torch import load_file

from d2l_lib.__main__ import main
from d2l_lib.encoder import ContextEncoder
from d2l_lib.hypernetwork import Hypernetwork, combine
from d2l_lib.lora import apply_lora
from d2l_lib.records import read_jsonl
from d2l_lib.tasks import needles
from d2l_lib.training import command, recipes, step, text_to_lora
from d2l_lib.training.batches import group_by_length
from d2l_lib.training.contexts import NeedleBatches, _random_chunks
from d2l_lib.training.loop import InOrderTrainer, Run, checkpoints, is_whole, read_log
from d2l_lib.training.recipes import Base, hypernetwork_config, train_needle

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base():
    return Base(*train_small.small_base(), "small")


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """(hypernetwork, folder) of an uninterrupted run of SMALL."""
    folder = tmp_path_factory.mktemp("whole")
    return train_needle(train_small.SMALL, base, Run(folder, save_steps=4, report_steps=2)), folder


@pytest.fixture
def batches(base):
    return NeedleBatches(base.tokenizer, train_small.SMALL, 0)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "hypernetwork.safetensors")


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(whole, tmp_path):
    """Killed and resumed in processes of their own, uninterrupted in this one."""
    run = tmp_path / "killed"
    killed = processes.start(train_small.train, run, 0.25)
    log = run / "log.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert killed.is_alive(), "it ended before its third report"
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert not (run / "final").exists(), "killed too late to prove anything"
    # the newest checkpoint may be half-written: make sure that one is, and that it is not trusted
    (run / "checkpoint-12").mkdir(exist_ok=True)
    (run / "checkpoint-12" / "trainer_state.json").unlink(missing_ok=True)
    processes.run(train_small.train, run, 0)
    hypernetwork, folder = whole
    expected, resumed = dict(hypernetwork.named_parameters()), weights(run)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    losses = [[(line["step"], line["loss"]) for line in read_jsonl(one / "log.jsonl")] for one in (folder, run)]
    assert losses[0] == losses[1]


def test_stopping_early_and_going_on_changes_nothing(base, whole, tmp_path):
    train_needle(train_small.SMALL, base, Run(tmp_path, stop_at=5))
    two = train_needle(train_small.SMALL, base, Run(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), two.parameters(), strict=True))


def test_tensorboard_shows_what_the_log_says_also_after_a_resumed_start(base, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    p = replace(train_small.SMALL, readout=None, polish_steps=0)
    for stop_at in (6, None):
        train_needle(p, base, Run(tmp_path, stop_at=stop_at, report_steps=2, save_steps=4))
        time.sleep(1)  # files are read by name: its second comes first, and then a count in which 10 is before 9
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    log = read_log(tmp_path / "log.jsonl")
    shown = [(event.step, round(event.value, 4)) for event in events.Scalars("loss")]
    assert shown == [(line["step"], pytest.approx(line["loss"], abs=1e-3)) for line in log]


def test_batches_are_functions_of_seed_and_step(base, batches):
    again = NeedleBatches(base.tokenizer, train_small.SMALL, 0)[7]
    other = NeedleBatches(base.tokenizer, train_small.SMALL, 1)[7]
    batch = batches[7]
    assert all(torch.equal(a, b) for a, b in zip(batch.chunks.ids, again.chunks.ids, strict=True))
    assert torch.equal(batch.labels, again.labels) and not torch.equal(batch.labels, other.labels)


def test_chunks_are_whole_sentences_and_together_the_haystack(base):
    rng = random.Random(0)
    p = replace(train_small.SMALL, longest=256)
    for _ in range(100):
        haystack = needles.build_haystack(base.tokenizer, rng.randint(40, 256), rng.random(), "4217")
        pieces = _random_chunks(rng, haystack.text, haystack.length_tokens, p)
        assert " ".join(pieces).split() == haystack.text.split()
        assert all(piece.endswith(".") for piece in pieces)
        assert sum("The special magic number is 4217." in piece for piece in pieces) == 1, "the needle is never cut"


def test_only_needle_free_chunks_are_repeated_and_only_late(base):
    p = replace(train_small.SMALL, longest=256, steps=100, contexts=8, empty_share=0.0)
    batches = NeedleBatches(base.tokenizer, p, 0)
    early, late = batches[10], batches[95]
    assert (early.repeats == 1).all() and late.repeats.max() > 8
    # in every context at least one chunk, the needle's, counts once
    start = 0
    for n in late.chunks.counts.tolist():
        assert (late.repeats[start : start + n] == 1).any()
        start += n


def test_a_repeated_block_is_that_many_equal_blocks(base):
    """The reason why repeats stand for a long haystack: weight K equals K copies (in exact arithmetic; here to
    1e-5).
    """
    model, tokenizer = base.model, base.tokenizer
    hypernetwork = Hypernetwork(hypernetwork_config(train_small.SMALL, model, "small"))
    torch.nn.init.normal_(hypernetwork.scaler_B["down_proj"], std=0.3)
    encoder = ContextEncoder.from_config(model, hypernetwork.config)
    ids = torch.tensor([tokenizer(needles.FILLER_LINE)["input_ids"]])
    with torch.no_grad():
        blocks = hypernetwork(encoder.encode(ids), attention_mask=torch.ones_like(ids))
        weighted = combine(blocks, hypernetwork.bias(), torch.tensor([1]), weights=torch.tensor([5.0]))
        copies = {m: (A.repeat(5, 1, 1, 1), B.repeat(5, 1, 1, 1)) for m, (A, B) in blocks.items()}
        repeated = combine(copies, hypernetwork.bias(), torch.tensor([5]))
        logits = []
        for loras in (weighted, repeated):
            with apply_lora(model, loras, hypernetwork.config.scale):
                logits.append(model(ids).logits)
    assert torch.allclose(*logits, atol=1e-5 * logits[0].abs().max().item())


def test_group_by_length_puts_every_chunk_back():
    chunks = [[1] * n for n in (5, 200, 7, 30, 6, 190, 31)]
    groups, order = group_by_length(chunks)
    flat = [c for group in groups for c in group]
    assert [flat[i] for i in order] == chunks
    assert all(len(group[-1]) >= 0.6 * len(group[0]) for group in groups) and len(groups) == 3


def test_loss_that_is_not_a_number_stops_the_run_and_says_so(base, tmp_path):
    train_needle(train_small.SMALL, base, Run(tmp_path, stop_at=4))
    kept = sorted(tmp_path.glob("checkpoint-*"))
    with pytest.raises(FloatingPointError, match="not a number: lower the learning rate"):
        train_needle(replace(train_small.SMALL, l1=float("nan")), base, Run(tmp_path))
    assert kept and sorted(tmp_path.glob("checkpoint-*")) == kept


def test_gradients_reach_every_parameter_and_never_the_base(base, batches):
    model = base.model
    hypernetwork = Hypernetwork(hypernetwork_config(train_small.SMALL, model, "small"))
    torch.nn.init.normal_(hypernetwork.scaler_B["down_proj"], std=0.3)
    torch.nn.init.normal_(hypernetwork.bias_B["down_proj"], std=0.3)
    before = [parameter.clone() for parameter in model.parameters()]
    step.Internalization(model, hypernetwork, train_small.SMALL)(batches[3])["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in hypernetwork.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_scalers_norms_biases_and_queries_are_spared_from_weight_decay(base, tmp_path, monkeypatch):
    seen = {}
    original = InOrderTrainer.get_decay_parameter_names
    monkeypatch.setattr(
        InOrderTrainer,
        "get_decay_parameter_names",
        lambda self, m: seen.setdefault("names", original(self, m)),
    )
    train_needle(train_small.SMALL, base, Run(tmp_path, stop_at=1))
    assert seen["names"] and not any(
        part in n for n in seen["names"] for part in ("scaler", "bias", "norm", "latents_q")
    )


@pytest.mark.slow
def test_a_run_killed_and_resumed_with_one_two_and_four_processes_has_the_curve_of_one(base, tmp_path):
    """Checkpoints lie between report lines, so that what was noted is resumed too."""
    one, two = tmp_path / "one", tmp_path / "two"
    (alone,) = processes.start_together(1, train_small.train_elastic, one, 0)
    for n_processes, last in ((1, 3), (2, 6), (4, None)):
        slowly = 0 if last is None else 0.1
        together = processes.start_together(n_processes, train_small.train_elastic, two, slowly)
        deadline = time.monotonic() + 120
        while last is not None and not is_whole(two / f"checkpoint-{last}"):
            assert time.monotonic() < deadline and all(process.is_alive() for process in together)
            time.sleep(0.02)
        if last is not None:
            time.sleep(0.3)  # into the next step
            for process in together:
                process.kill()
            assert checkpoints(two)[-1].name == f"checkpoint-{last}"
        for process in together:
            process.join(120)
            assert process.exitcode == (0 if last is None else -signal.SIGKILL)
    alone.join(120)
    logs = [read_jsonl(run / "log.jsonl") for run in (one, two)]
    assert [line["step"] for line in logs[0]] == list(range(2, 13, 2))
    for name in ("step", "loss", "total_loss", "exact_match", "learning_rate"):
        assert [line[name] for line in logs[0]] == pytest.approx([line[name] for line in logs[1]], abs=1e-5), name
    expected, resumed = weights(one), weights(two)
    start = Hypernetwork(hypernetwork_config(train_small.ELASTIC, base.model, "x")).state_dict()
    assert all(torch.allclose(expected[name], resumed[name], atol=1e-6) for name in expected)
    assert any((expected[name] - start[name]).abs().max() > 1e-2 for name in expected)


@pytest.mark.parametrize(
    ("words", "each"),
    [
        ([], 1),
        (["--stage", "needle", "--seed", "1"], 1),
        (["--stage", "needle", "--set", "batches_per_step=6"], 6),
        (["--stage", "qa"], 2),
        (["--stage", "text-to-lora"], 2),
        (["--stage", "qa", "--preset", "paper-gemma"], 64),
        (["--preset", "paper-qwen"], 16),
        (["--stage", "rows", "--preset", "smollm2", "--questions", "facts"], 1),
        (["--stage", "published", "--preset", "smollm2", "--questions", "facts", "--set", "batches_per_step=4"], 4),
        (["--stage", "reading-lora", "--preset", "smollm2", "--questions", "facts"], 2),
    ],
)
def test_a_training_says_at_once_how_many_processes_share_it(words, each, monkeypatch, capsys):
    """Before anything is loaded: a line for one process, and an error for a number that does not fit."""
    for name in ("_run_on_questions", "_run_own"):
        monkeypatch.setattr(command, name, lambda *_: None)
    for name in ("remake_base", "remake_needle", "remake_qa"):
        monkeypatch.setattr(recipes, name, lambda *_: None)
    monkeypatch.setattr(text_to_lora, "remake_text_to_lora", lambda *_: None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(command.os, "sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    main(["train", *words])
    several = {1: 0, 2: 2, 4: 4, 6: 3, 16: 4, 64: 4}[each]
    said = capsys.readouterr().out
    assert (f"--nproc_per_node {several} " in said) if several else "OMP_NUM_THREADS=4" in said
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(SystemExit, match=f"5 processes cannot share out {each} batches evenly"):
        main(["train", *words])
    if each > 1:
        monkeypatch.setenv("WORLD_SIZE", str(each))
        main(["train", *words])
        assert not capsys.readouterr().out, "nothing to say where they fit"


def test_processes_that_cannot_share_a_step_are_refused(base, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes cannot share out 1 batches evenly: start a number that divides"):
        train_needle(train_small.SMALL, base, Run(tmp_path))
