"""Options of the commands: what makes no sense ends them at once, with status 2 and one line."""

import importlib
import sys

import pytest

from d2l_lib import arguments
from d2l_lib.presets import PRESETS, changed, preset, shortened

WRONG = {
    "ablations": [["--n", "0"], ["--seeds", "0", "-1"], ["--variant", "none"]],
    "baselines": [["kinds", "--n", "0"], ["methods", "--documents", "-3"], ["kinds", "--distillation-steps", "0"]],
    "corpora": [["write", "squad", "--documents", "0"]],
    "distillation": [["--seed", "-1"], ["--steps", "0"], ["--save-steps", "0"], ["--keep", "-1"], ["--steps", "1e9"]],
    "evaluation": [["needle", "--n", "0"], ["cost", "0"], ["base", "--seed", "-1"], ["base", "--training-seed", "x"]],
    "faithfulness": [["--n", "0"], ["--n-two-hop", "-1"], ["--seed", "99999999999999999999"]],
    "gating": [["gate", "--n", "0"], ["--seed", "-1"], ["--seed", "1.5"]],
    "probes": [["--n", "0"], ["--seed", "-1"]],
    "reports": [["--documents", "0"], ["--seed", "-1"]],
    "selfgen": [["--out", "x", "--workers", "0"], ["--out", "x", "--worker", "-1"], ["--out", "x", "--seed", "-1"]],
    "slurm": [["--nodes", "0"], ["--gpus", "-8"], ["--hours", "0"]],
    "speed": [["tiny", "--lengths", "64", "0"], ["tiny", "--repeats", "0"], ["tiny", "--limit", "nan"]],
    "text_to_lora": [["--seed", "-1"]],
    "training": [["--seed", "-1"], ["--steps", "0"], ["--report-steps", "-5"], ["--steps", "9" * 5000]],
    "watch": [[".", "--every", "0"], [".", "--every", "inf"], [".", "--n", "0"], [".", "--lengths", "-64"]],
    "weights": [["recompression", "--length", "0"], ["recompression", "--n", "-1"]],
}  # fmt: skip


@pytest.mark.parametrize(("module", "options"), [(m, o) for m, several in WRONG.items() for o in several])
def test_wrong_options_end_a_command_at_once_with_one_line(module, options, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *options])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"d2l_lib.{module}").main()
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert len(message) < 600
    assert "error" in message or "expected" in message or "invalid" in message or "unknown" in message
    assert list(tmp_path.iterdir()) == []


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
