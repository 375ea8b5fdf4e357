"""Seconds and memory are those of what is named: parts add up, floors read every token, no measurement holds another's.

Small random models stand in where only the counting is tested; what needs a process of its own runs the bundled model.
"""

import json
import os
import signal
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from tiny_models import build_model, build_rows_model

from d2l_lib.__main__ import main
from d2l_lib.adapter import Adapter
from d2l_lib.documents import chunk_document
from d2l_lib.records import read_jsonl
from d2l_lib.studies import gemma_sizes, measurements, speed, watches
from d2l_lib.studies.measurements import Measurement
from d2l_lib.studies.watches import peak_memory_mib

SETTINGS = {"early_exit": {}, "per_layer_activations": {"encoder_type": "per_layer_activations"}}


@pytest.fixture(params=SETTINGS)
def model(request):
    return build_model(window=512, **SETTINGS[request.param])


@pytest.fixture
def small_gemma(monkeypatch):
    """Gemma-2's architecture at a size that a test can run."""
    sizes = {"vocab_size": 2000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 8}
    monkeypatch.setattr(gemma_sizes, "GEMMA_2_2B", gemma_sizes.GEMMA_2_2B | sizes | heads)


# --- what is measured -------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is told to go on: `clock.now`, in seconds."""
    found = SimpleNamespace(now=0.0)
    monkeypatch.setattr(watches, "time", SimpleNamespace(perf_counter=lambda: found.now))
    return found


@pytest.mark.parametrize("mode", ["batched", "iterative"])
@pytest.mark.parametrize("slow", watches.PARTS)
def test_time_is_put_down_to_the_part_that_took_it(model, mode, slow, clock, monkeypatch):
    def slowly(function):
        def wrapped(*args, **kwargs):
            clock.now += 1.0
            return function(*args, **kwargs)

        return wrapped

    hypernetwork = model.hypernetwork
    monkeypatch.setattr(model, "_is_free", lambda *_: False)  # what is tried once takes its time, too
    owner, name = {
        "text": (sys.modules["d2l_lib.model"], "chunk_document"),
        "encoder": (type(model.encoder), "_features"),
        "Perceiver": (hypernetwork.aggregator.perceiver, "forward"),
        "head": (hypernetwork.head, "forward"),
        "moving": (model, "adapter_of"),
    }[slow]
    monkeypatch.setattr(owner, name, slowly(getattr(owner, name)))
    model.iterative = mode == "iterative"
    watch = watches.Stopwatch(model.device)
    with watches.watching(model, watch):
        model.internalize_each(["The grass is green. The sky is blue."])
    assert set(watch.parts) == set(watches.PARTS) and watch.parts[slow] == watch.seconds == clock.now > 0
    by_layer = mode == "iterative" and (slow == "head" or (slow == "Perceiver" and model.config.layer_to_layer))
    assert clock.now == (model.config.n_layers if by_layer else 1)


def test_watching_leaves_no_hook_behind_even_after_an_error(model):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in [*model.hypernetwork.modules(), body])

    body = model.encoder.model.model
    before = hooks()
    watch = watches.Stopwatch(model.device)
    with pytest.raises(ValueError, match="no text"), watches.watching(model, watch), watches.watching(model, watch):
        model.internalize_each([" "])
    assert hooks() == before and "encode" not in vars(model.encoder)


@pytest.mark.parametrize("length", [100, 257, 1000])
def test_the_floor_reads_every_token_once_and_the_text_has_the_length_that_was_asked_for(model, length, monkeypatch):
    text = measurements.distinct_text(model.tokenizer, length, 0)
    assert len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) == pytest.approx(length, abs=1)
    model.chunk_tokens = 60
    seen = []
    encode = model.encoder.encode
    monkeypatch.setattr(model.encoder, "encode", lambda ids, **k: seen.append(ids) or encode(ids, **k))
    run, facts = measurements._floor(model, Measurement("floor", length_tokens=length).here())
    run(watches.Stopwatch(model.device))
    assert all(ids.shape[1] <= 60 for ids in seen)
    read = torch.cat([ids.flatten() for ids in seen]).tolist()
    assert read == model.tokenizer(text, add_special_tokens=False)["input_ids"] and facts["tokens"] == len(read)


def test_no_two_chunks_of_a_text_are_alike(model):
    chunks = chunk_document(measurements.distinct_text(model.tokenizer, 4000, 1), model.tokenizer, 60)
    assert len({chunk.text for chunk in chunks}) == len(chunks)
    assert measurements.distinct_text(model.tokenizer, 300, 1) != measurements.distinct_text(model.tokenizer, 300, 2)


def test_a_made_up_adapter_has_the_shapes_of_the_real_one(model, tmp_path):
    model.chunk_tokens, model.chunk_batch = 80, 12
    made = measurements.adapter_of_length(model, 1500, 0)
    real = model.internalize(measurements.distinct_text(model.tokenizer, 1500, 0))
    assert len(made.blocks) == len(real.blocks) > model.chunk_batch
    assert [block.span for block in made.blocks] == [block.span for block in real.blocks]
    assert (made.rank, made.nbytes) == (real.rank, real.nbytes)
    assert made.nbytes == measurements.adapter_bytes(model, len(made.blocks))
    sizes = [adapter.save(tmp_path / "a.safetensors").stat().st_size for adapter in (made, real)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01), "shared tensors would be stored once"


def test_every_kind_is_measured_and_says_what_on(model, monkeypatch):
    asked = []
    monkeypatch.setattr(measurements, "route", lambda *a: asked.append(a) or [a[2][0].only(chunk=0)])
    model.chunk_tokens = 60
    n_chunks = len(chunk_document(measurements.distinct_text(model.tokenizer, 200, 0), model.tokenizer, 60))
    for what, modes in measurements.MODES.items():
        for mode in modes if what != "start" else ():
            length = 0 if what == "documents" or mode == "no adapter" else 200
            row = measurements.measure(Measurement(what, "mine", length, mode, documents=2), model, repeats=1, least=1)
            assert row["status"] == "measured" and 0 < row["seconds_low"] <= row["seconds"] <= row["seconds_high"]
            assert sum(row["parts"].values()) == pytest.approx(row["seconds"], abs=1e-4)
            assert row["peak_memory_mib"] >= row["resting_memory_mib"] > 50 and row["cpu_share"] > 0
            assert {"device_name", "threads", "dtype", "torch", "transformers", "base_model", "n"} <= set(row)
            assert row["base_model"]["hidden_size"] == 32 and row["hypernetwork"]["rank"] == 2
            if what == "answer":
                assert row["blocks"] == (0 if mode == "no adapter" else n_chunks)
    assert asked, "routed answers choose a block"
    assert not model.base_model.model.layers[0].mlp.down_proj._forward_hooks


def test_token_rows_are_measured_by_their_two_parts_and_the_size_of_their_rows(monkeypatch):
    model = build_rows_model()
    model.chunk_tokens = 60
    row = measurements.measure(Measurement("internalize", "mine", 200, "batched"), model, repeats=1, least=1)
    assert set(row["parts"]) == {"text", "encoder", "head", "moving"} and min(row["parts"].values()) > 0
    text = measurements.distinct_text(model.tokenizer, 200, 0)
    assert row["adapter_mib"] == round(model.internalize(text).nbytes / 2**20, 3) and row["chunks"] > 1
    row = measurements.measure(Measurement("answer", "mine", 200, "all blocks"), model, repeats=1, least=1)
    assert row["blocks"] > 1 and row["cpu_seconds"] > 0


def test_a_start_is_a_new_python_whose_base_model_may_be_made_first(tmp_path, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        time = 1.0 * len(asked)
        facts = {"loading": time / 4, "loading_cpu_seconds": time / 8, "peak_memory_mib": 100 * time}
        return SimpleNamespace(returncode=0, stdout="a note\n" + json.dumps(facts) + "\n", stderr="")

    monkeypatch.setattr(measurements.subprocess, "run", run)
    row = measurements.measure(Measurement("start", "mine", mode="later"), repeats=3)
    assert (row["n"], row["peak_memory_mib"], row["loading_cpu_seconds"]) == (3, 300.0, 0.25)
    assert [command[-1] for command in asked] == ["", "", ""] and {command[3] for command in asked} == {"mine"}
    assert set(row["parts"]) == {"starting Python", "loading"} and row["status"] == "measured"
    row = measurements.measure(Measurement("start", "mine", mode="first"), repeats=3)
    assert row["n"] == 1 and asked[-1][-1] and not os.path.exists(asked[-1][-1]), "an empty folder, deleted afterwards"
    monkeypatch.setattr(measurements.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="gone"))
    with pytest.raises(RuntimeError, match="loading mine failed:\ngone"):
        measurements.measure(Measurement("start", "mine", mode="later"), repeats=1)


def test_a_new_python_loads_the_model():
    row = measurements.measure(Measurement("start", "tiny", mode="later"), repeats=1)
    assert 0 < row["parts"]["loading"] < row["seconds"] and row["peak_memory_mib"] > 50
    assert 0 < row["loading_cpu_seconds"] < row["cpu_seconds"]


def test_iterative_is_passed_on(model, monkeypatch):
    seen = []
    forward = model.hypernetwork.forward
    monkeypatch.setattr(model.hypernetwork, "forward", lambda *a, **k: seen.append(k["iterative"]) or forward(*a, **k))
    for mode in ("iterative", "batched"):
        measurements.measure(Measurement("internalize", "mine", 100, mode), model, repeats=1, least=1)
        assert seen[-1] == (mode == "iterative")


def test_repeats_stop_when_the_time_is_over_but_not_before_the_least(model, monkeypatch):
    counts = []

    def prepare(_, m):
        counts.append(0)

        def run(watch):
            counts[-1] += 1
            watch.parts = {"all": float(counts[-1])}

        return run, {}

    monkeypatch.setitem(measurements._PREPARE, "floor", prepare)
    m = Measurement("floor", "mine", 100)
    row = measurements.measure(m, model, repeats=5, least=3, budget_s=60)
    assert (row["n"], row["seconds"], row["seconds_low"], row["seconds_high"]) == (5, 3.0, 2.0, 4.0)
    assert row["parts"] == {"all": 3.0}, "those of the median run"
    assert measurements.measure(m, model, repeats=5, least=3, budget_s=0)["n"] == 3
    assert counts == [5, 3]


def test_too_little_memory_is_recorded_not_raised(model, monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(measurements._PREPARE, "floor", no_room)
    row = measurements.measure(Measurement("floor", "mine", 100), model)
    assert row["status"] == "out of memory" and "seconds" not in row and row["base_model"]["num_hidden_layers"] == 4
    assert measurements.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert measurements.is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not measurements.is_out_of_memory(RuntimeError("shapes do not match"))
    monkeypatch.setitem(measurements._PREPARE, "floor", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measurements.measure(Measurement("floor", "mine", 100), model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"what": "sing"}, "no measurement 'sing'"),
        ({"what": "internalize", "length_tokens": 10}, "batched, iterative"),
        ({"what": "floor"}, "length_tokens must be a whole number"),
        ({"what": "floor", "length_tokens": 10, "dtype": "int8"}, "dtype must be"),
        ({"what": "documents", "documents": 0}, "documents must be"),
        ({"what": "floor", "length_tokens": 10, "layers": 0}, "layers must be"),
    ],
)
def test_a_measurement_that_cannot_be_made_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Measurement(**values)


# --- Gemma's sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", gemma_sizes.RECIPES)
def test_random_gemma_internalizes_and_writes_something(small_gemma, recipe):
    model = measurements.build(Measurement("floor", f"gemma-2-2b/{recipe}", 10, layers=3, dtype="bfloat16"))
    assert model.base_model.config.model_type == "gemma2" and len(model.base_model.model.layers) == 3
    assert model.base_model.dtype == torch.bfloat16 and model.hypernetwork.head.weight.dtype == torch.float32
    assert (model.config.rank, model.config.modules, model.config.latent_size) == (8, ["down_proj"], 512)
    adapter = model.internalize(measurements.distinct_text(model.tokenizer, 1500, 0))
    assert len(adapter.blocks) == 2 and all(b.B["down_proj"].abs().max() > 0 for b in adapter.blocks)
    assert adapter.nbytes == measurements.adapter_bytes(model, 2)


def test_gemma_is_refused_with_an_unknown_recipe_or_too_few_tokens(small_gemma):
    with pytest.raises(ValueError, match="no recipe 'cake'.*needle, main"):
        measurements.build(Measurement("floor", "gemma-2-2b/cake", 10))
    with pytest.raises(ValueError, match="vocabulary of 99 is too small"):
        measurements.build(Measurement("floor", "gemma-2-2b/main", 10, vocabulary=99))


def test_published_sizes_give_the_published_count_of_parameters():
    counts = gemma_sizes.parameter_counts("needle")
    assert counts["base model"] == pytest.approx(2.614e9, rel=1e-3)
    assert counts["hypernetwork"] == pytest.approx(309e6, rel=0.01)
    assert gemma_sizes.parameter_counts("needle", layers=2)["base model"] < 0.4 * counts["base model"]


def test_operations_are_two_for_each_weight_and_token_and_those_of_attention(small_gemma):
    tokens = 64
    table = gemma_sizes.operations("needle", layers=4, tokens=tokens).set_index("part")["gflop_per_token"] * 1e9
    linear = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 64  # q, k, v, o and the feed-forward part, of one layer
    layer = 2 * linear + 2 * 2 * tokens * 32  # scores and mixing, all heads together, of every token with every token
    assert table["encoder"] == pytest.approx(layer), "a quarter of the layers"
    assert table["all layers"] == pytest.approx(4 * layer + 2 * 2000 * 32 / tokens), "and the head for the last token"
    head = 4 * 8 * 512 * (64 + 32) * 2 + 4 * 8 * 2 * (2 * 512 * 2048)
    assert table["head"] == pytest.approx(head / tokens)
    main = gemma_sizes.operations("main", layers=4, tokens=tokens).set_index("part")["gflop_per_token"] * 1e9
    assert main["encoder"] == pytest.approx(3 * layer)
    half = gemma_sizes.operations("main", layers=2, tokens=tokens).set_index("part")["gflop_per_token"] * 1e9
    # each layer's states are read on their own, all but the first projection of the queries, which is done once
    assert main["Perceiver"] == pytest.approx(2 * half["Perceiver"], rel=0.01)


# --- a process for each -----------------------------------------------------------------------------------------------


def test_a_process_of_its_own_measures_its_own_memory():
    ballast = torch.ones(500, 2**18)  # 500 MiB that are ours alone
    m = Measurement("internalize", "tiny", 300, "batched")
    row = measurements.measure_alone(m, repeats=1, least=1)
    assert peak_memory_mib() > 500 + 0 * ballast[0, 0].item()
    assert row["status"] == "measured" and 50 < row["resting_memory_mib"] <= row["peak_memory_mib"] < peak_memory_mib()
    assert speed.measurement_of(row) == m.here() and row["chunks"] == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit on memory is Linux's")
def test_a_length_that_does_not_fit_is_recorded_as_such():
    m = Measurement("in context", "tiny", 60_000)
    row = measurements.measure_alone(m, memory_limit_mib=400)
    assert row["status"] == "out of memory" and row["length_tokens"] == 60_000 and "seconds" not in row


def test_a_process_that_takes_too_long_is_ended_and_one_that_fails_says_why(tmp_path):
    row = measurements.measure_alone(Measurement("internalize", "tiny", 131_072, "batched"), limit_s=0.5)
    assert row["status"] == "stopped after 0.5 s"
    with pytest.raises(RuntimeError, match="nothing at"):
        measurements.measure_alone(Measurement("floor", str(tmp_path / "nowhere"), 100))


class _EndsItsProcess:
    """Ends the process in which it is unpickled, as the system does for want of memory."""

    def __reduce__(self):
        return _end_this_process, ()


def _end_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_the_system_ends_ran_out_of_memory():
    row = measurements.measure_alone(Measurement("floor", "tiny", 100), repeats=_EndsItsProcess())
    assert row["status"] == "out of memory" and row["killed"] and row["model"] == "tiny"


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """measure_alone without the work: which measurements were made."""
    made = []

    def fake(m, **_):
        if m.length_tokens == 13:
            raise RuntimeError("unlucky")
        made.append(m)
        return asdict(m) | {"status": "measured", "seconds": 1.0}

    monkeypatch.setattr(speed, "measure_alone", fake)
    return made


def test_a_record_goes_on_where_it_was_interrupted(counted, capsys):
    wanted = [Measurement("floor", "tiny", length) for length in (10, 11, 13, 14)]
    made = []
    with pytest.raises(RuntimeError, match="unlucky"):
        made.extend(speed.record(wanted))
    rows = made[-1]
    assert [row["length_tokens"] for row in rows] == [10, 11]
    capsys.readouterr()
    (rows,) = speed.record(wanted[:2] + wanted[3:], rows)
    assert [m.length_tokens for m in counted] == [10, 11, 14]
    assert capsys.readouterr().out == "1 of 1: tiny, floor, 14 tokens: 1.0000 s\n"
    assert [row["length_tokens"] for row in rows] == [10, 11, 14]
    assert list(speed.record(wanted[:2] * 2, rows)) == [] and len(counted) == 3, "nothing was missing"


def test_measuring_again_replaces_the_same_models_on_the_same_device_alone(counted):
    old = [Measurement("floor", "tiny", 10), Measurement("floor", "tiny", 99)]
    kept = [
        Measurement("floor", "tiny/qa", 10).here(),
        replace(Measurement("floor", "tiny", 10).here(), device="cuda"),
        Measurement("floor", "tiny", 10, layers=26).here(),
    ]
    (rows,) = speed.record([old[0]], [asdict(m.here()) | {"seconds": 0.0} for m in [*old, *kept]], again=True)
    assert [row["seconds"] for row in rows] == [0.0, 0.0, 0.0, 1.0]
    assert [speed.measurement_of(row) for row in rows[:3]] == kept


def test_other_threads_precision_or_device_are_another_measurement():
    m = Measurement("floor", "tiny", 10).here()
    assert m == Measurement("floor", "tiny", 10).here()
    others = [replace(m, threads=m.threads + 1), replace(m, dtype="bfloat16"), replace(m, device="cuda")]
    assert len({m, *others}) == 4


def test_the_plans_hold_every_measurement_once_and_the_lengths_that_were_asked_for():
    for plan in (speed.tiny_measurements(), speed.smollm2_measurements(), speed.gemma_measurements()):
        assert len(set(plan)) == len(plan)
    plan = speed.gemma_measurements([1024, 2048], layers=26, vocabulary=256_000, dtype="bfloat16", seed=3)
    assert {(m.layers, m.vocabulary, m.dtype, m.seed) for m in plan} == {(26, 256_000, "bfloat16", 3)}
    assert {m.length_tokens for m in plan} == {0, 1024, 2048}
    internalized = {(m.model, m.length_tokens, m.mode) for m in plan if m.what == "internalize"}
    assert len(internalized) == 2 * 2 * 2
    assert {m.length_tokens for m in speed.tiny_measurements(0, [64])} == {0, 64}
    assert {(m.length_tokens, m.seed) for m in speed.smollm2_measurements(5, [64])} == {(0, 5), (64, 5)}


def test_the_command_records_what_is_missing(tmp_path, counted, monkeypatch, capsys):
    (tmp_path / "d2l_lib").mkdir()
    (tmp_path / "d2l_lib" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "full_runs"
    for name in ("tiny", "smollm2", "gemma"):
        command = ["study", f"speed-{name}", "--lengths", "64", "--n", "1"]
        main(command)
        rows = read_jsonl(folder / f"speed_{name}.jsonl")
        assert {row["command"] for row in rows} == {f"d2l study speed-{name} --lengths 64 --n 1"}
        assert len(rows) == len(capsys.readouterr().out.splitlines())
        before = len(counted)
        main(command)
        assert len(counted) == before
    (folder / "speed_gemma.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="d2l study speed-gemma records it"):
        speed.read_records("gemma")


# --- tables -----------------------------------------------------------------------------------------------------------


def rows_of(*measurements: tuple[Measurement, float | None]) -> pd.DataFrame:
    """A record of these measurements with these seconds (None: out of memory)."""
    rows = []
    for m, seconds in measurements:
        row = asdict(m.here()) | {"base_model": {"num_hidden_layers": 2}, "device_name": "a chip"}
        if seconds is None:
            row |= {"status": "out of memory"}
        else:
            row |= {"status": "measured", "n": 3, "seconds": seconds, "seconds_low": seconds, "seconds_high": seconds}
            row |= {"peak_memory_mib": 100.0, "resting_memory_mib": 80.0, "adapter_mib": 5.0}
            row["parts"] = {"encoder": 0.75 * seconds, "head": 0.25 * seconds}
        rows.append(row)
    return pd.DataFrame(rows)


def test_the_floor_of_answering_stands_at_every_length_that_is_answered():
    rows = rows_of(
        (Measurement("answer", mode="no adapter"), 0.5),
        (Measurement("answer", "tiny", 64, "routed"), 1.0),
        (Measurement("answer", "tiny", 128, "routed"), 2.0),
        (Measurement("in context", "tiny", 256), None),
        (Measurement("internalize", "tiny", 64, "batched"), 9.0),
    )
    table = speed.cost_table(rows, ["answer", "in context"])
    floor = table[table["floor"]]
    assert list(floor["length_tokens"]) == [64, 128] and set(floor["seconds"]) == {0.5}
    assert set(table["method"]) == {
        "answer, one block of all (routed)", "answer, document in the prompt", "floor: the question alone"
    }  # fmt: skip
    assert table.loc[table["length_tokens"] == 256, "seconds"].isna().all() and 9.0 not in set(table["seconds"])


def test_the_floor_of_memory_is_the_model_and_where_it_lies_there_the_adapter():
    on_cpu = Measurement("internalize", "gemma-2-2b/main", 64, "batched", layers=2, device="cpu")
    rows = rows_of((on_cpu, 1.0), (replace(on_cpu, device="cuda"), 1.0), (replace(on_cpu, length_tokens=128), None))
    table = speed.memory_table(rows)
    floor = table[table["floor"]].set_index("panel")["memory_mib"]
    assert dict(floor) == {
        "gemma-2-2b, main: 2 layers, float32, CPU": 85.0, "gemma-2-2b, main: 2 layers, bfloat16, a chip": 80.0
    }  # fmt: skip
    assert len(table[~table["floor"]]) == 3


def test_parts_are_those_of_internalizing_all_layers_at_once():
    m = Measurement("internalize", "tiny", 64, "batched")
    parts = speed.parts_table(
        rows_of((m, 4.0), (replace(m, mode="iterative"), 8.0), (replace(m, what="floor", mode=""), 1.0))
    )
    assert dict(zip(parts["part"], parts["seconds"], strict=True)) == {
        "text": 0.0, "encoder": 3.0, "Perceiver": 0.0, "head": 1.0, "moving": 0.0
    }  # fmt: skip


def test_save_and_load_leave_no_file_behind(model, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    loaded = []
    load = Adapter.load
    monkeypatch.setattr(Adapter, "load", lambda path: loaded.append(load(path)) or loaded[-1])
    model.chunk_tokens = 60
    for what in ("save", "load"):
        row = measurements.measure(Measurement(what, "mine", 200), model, repeats=1, least=1)
        assert row["file_mib"] == pytest.approx(row["adapter_mib"], rel=0.3) and row["file_mib"] > row["adapter_mib"]
    assert len(loaded) == 1 and len(loaded[0].blocks) == row["blocks"]
    assert list(tmp_path.iterdir()) == []
