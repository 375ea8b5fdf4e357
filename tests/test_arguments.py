"""Options of the commands: what makes no sense ends them at once, with status 2 and one line, and nothing is begun."""

import argparse
import importlib
import sys

import pytest

from d2l_lib import __main__ as command
from d2l_lib import arguments
from d2l_lib.presets import PRESETS, changed, preset, shortened

COMMANDS = {
    "ask": [["a.md"], ["a.md", "Who?", "--blocks", "0"], ["a.md", "Who?", "--chunk-tokens", "-1"], []],
    "corpora": [["write", "squad", "--documents", "0"], ["write", "no-such"], ["read"]],
    "convert": [["only one"], []],
    "generate": [["--out", "x", "--workers", "0"], ["--out", "x", "--worker", "-1"], [],
                 ["--out", "x", "--seed", "-1"]],
    "internalize": [["a.md"], ["-o", "a.safetensors"], ["a.md", "-o", "a.safetensors", "--chunk-tokens", "0"]],
    "notebooks": [["--all"]],
    "slurm": [["--nodes", "0"], ["--gpus", "-8"], ["--hours", "0"], ["--preset", "none"]],
    "train": [["--seed", "-1"], ["--steps", "0"], ["--save-steps", "0"], ["--keep", "-1"], ["--steps", "1e9"],
              ["--report-steps", "-5"], ["--steps", "9" * 5000], ["--stage", "none"]],
    "watch": [[".", "--every", "0"], [".", "--every", "inf"], [".", "--n", "0"], [".", "--lengths", "-64"]],
    "such": [[], ["--help"]],
}  # fmt: skip
STUDIES = {
    "ablations": [["--n", "0"], ["--seeds", "0", "-1"], ["--variant", "none"]],
    "baselines": [["kinds", "--n", "0"], ["methods", "--documents", "-3"], ["kinds", "--distillation-steps", "0"]],
    "evaluation": [["needle", "--n", "0"], ["cost", "0"], ["base", "--seed", "-1"], ["base", "--training-seed", "x"]],
    "faithfulness": [["--n", "0"], ["--n-two-hop", "-1"], ["--seed", "99999999999999999999"]],
    "flags": [["--documents", "0"], ["--seed", "-1"]],
    "gating": [["gate", "--n", "0"], ["--seed", "-1"], ["--seed", "1.5"]],
    "probes": [["--n", "0"], ["--seed", "-1"]],
    "recompression": [["recompression", "--length", "0"], ["recompression", "--n", "-1"]],
    "speed": [["tiny", "--lengths", "64", "0"], ["tiny", "--repeats", "0"], ["tiny", "--limit", "nan"]],
}  # fmt: skip


def pairs(several: dict) -> list:
    return [(name, options) for name, each in several.items() for options in each]


@pytest.fixture
def nothing_begins(monkeypatch, tmp_path):
    """A command whose options were taken ends there, instead of going to work."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*several):
        parse(*several)
        pytest.fail("these options were taken")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)


def check_end(stopped, capsys, folder):
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1 and len(message) < 600
    words = ("error", "expected", "invalid", "unknown", "required", "unrecognized", "no command", "arguments")
    assert any(word in message for word in words)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("name", "options"), pairs(COMMANDS))
def test_wrong_options_end_a_command_at_once_with_one_line(name, options, nothing_begins, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        command.main([name, *options])
    check_end(stopped, capsys, tmp_path)


@pytest.mark.parametrize(("name", "options"), pairs(STUDIES))
def test_wrong_options_end_a_study_at_once_with_one_line(name, options, nothing_begins, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", [name, *options])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"d2l_lib.studies.{name}").main()
    check_end(stopped, capsys, tmp_path)


def test_every_command_is_among_them():
    assert {*COMMANDS} == {*command.COMMANDS, "such"} - {"study"}


def test_numbers_on_the_command_line():
    assert (arguments.count("12"), arguments.count_or_none("0"), arguments.seed("4294967295")) == (12, 0, 2**32 - 1)
    assert arguments.positive("0.5") == 0.5
    for kind, text in (
        (arguments.count, "1_0"),
        (arguments.count, "+-1"),
        (arguments.seed, "4294967296"),
        (arguments.count, "²"),
    ):
        with pytest.raises(arguments.argparse.ArgumentTypeError, match="a whole number from"):
            kind(text)
    kinds = command.KINDS
    assert (kinds["count"]("12"), kinds["count or none"]("0"), kinds["seed"]("4294967295")) == (12, 0, 2**32 - 1)
    assert kinds["positive"]("0.5") == 0.5
    for name, text in (("count", "1_0"), ("count", "+-1"), ("seed", "4294967296"), ("count", "²"), ("positive", "inf")):
        with pytest.raises(argparse.ArgumentTypeError, match="is expected, not"):
            kinds[name](text)


@pytest.mark.parametrize("name", PRESETS)
def test_so_many_steps_are_those_of_every_stage(name):
    p = preset(name)
    needle, qa = shortened(p.needle, 8), shortened(p.qa, 8)
    assert needle.steps == 8 * needle.batches_per_step
    assert needle.polish_steps == (needle.steps if p.needle.polish_steps else 0)
    for warm_up, before in ((needle.readout, p.needle.readout), (qa.readout, p.qa.readout)):
        assert (warm_up is None) == (before is None)
        assert warm_up is None or (warm_up.steps, warm_up.warmup_steps) == (8, 0)
    assert qa.stages.keys() == p.qa.stages.keys()
    for stage in qa.stages.values():
        assert stage.steps == 8 * stage.batches_per_step
        assert stage.warmup_steps <= stage.steps / 10
    assert shortened(p.qa, None) is p.qa


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "8"])
def test_steps_are_counted(steps):
    with pytest.raises(ValueError, match="at least one"):
        shortened(preset("tiny").needle, steps)


@pytest.mark.parametrize("change", ["steps=0", "steps=-1", "learning_rate=-1e-3", "learning_rate=1e999", "l1=-0.1"])
def test_settings_that_no_training_can_have(change):
    with pytest.raises(ValueError, match="must be a finite number of at least"):
        changed(preset("tiny").needle, [change])
