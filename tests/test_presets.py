"""Presets: shortened and changed, as the options of a training ask for."""

import pytest

from d2l_lib.presets import PRESETS, changed, preset, shortened


@pytest.mark.parametrize("name", PRESETS)
def test_so_many_steps_are_those_of_every_stage(name):
    p = preset(name)
    needle, qa = shortened(p.needle, 8), shortened(p.qa, 8)
    assert needle.steps == 8 * needle.batches_per_step
    assert needle.polish_steps == (needle.steps if p.needle.polish_steps else 0)
    for warm_up, before in ((needle.readout, p.needle.readout), (qa.readout, p.qa.readout)):
        assert (warm_up is None) == (before is None)
        batches = 8 * warm_up.batches_per_step if warm_up else 0
        assert warm_up is None or (warm_up.steps, warm_up.warmup_steps) == (batches, batches // 10)
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
