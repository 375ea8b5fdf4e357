"""The study of attention without keys and values: both ways of every task, in turn, and which one the model goes."""

from types import SimpleNamespace

import pytest
import torch

from d2l_lib.hypernetwork import Attention
from d2l_lib.model import DocToLoRA
from d2l_lib.studies import absorption, random_models


@pytest.fixture
def small(monkeypatch):
    sizes = {"vocab_size": 2000, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    monkeypatch.setattr(random_models, "BASE", random_models.BASE | sizes)
    documents = {"many latents": (40, (1, 2)), "few latents": (300, (3,))}
    monkeypatch.setattr(absorption, "_DOCUMENTS", documents)


def test_both_ways_of_every_task_are_measured_in_turn(small, monkeypatch):
    ways, clock = [], SimpleNamespace(now=0.0)

    def slow(way, seconds, read):
        def wrapped(self, *arguments):
            clock.now += seconds
            if self.absorbs is not None:  # the decoder's goes by the counts
                ways.append(way)
            return read(self, *arguments)

        return wrapped

    monkeypatch.setattr(Attention, "_read_plain", slow("plain", 2.0, Attention._read_plain))
    monkeypatch.setattr(Attention, "_read_by_head", slow("plain", 2.0, Attention._read_by_head))
    monkeypatch.setattr(Attention, "_read_absorbed", slow("absorbed", 1.0, Attention._read_absorbed))
    monkeypatch.setattr(DocToLoRA, "_is_free", lambda *_: False)  # what is tried once is a run, too
    monkeypatch.setattr(absorption, "time", SimpleNamespace(process_time=lambda: clock.now))
    *_, rows = absorption.run(n=2, seed=0)
    tasks = [
        ("many latents", "internalize", 1),
        ("many latents", "internalize", 2),
        ("many latents", "training step", 4),
    ]
    tasks += [("few latents", "internalize", 3), ("few latents", "training step", 4)]
    names = [(row["model"], row["task"], row["chunks"], row["way"]) for row in rows]
    assert names == [(*task, way) for task in tasks for way in ("plain", "absorbed")]
    runs = [way for index, way in enumerate(ways) if index % 8 == 0]  # a run passes at least eight blocks
    assert runs[:6] == ["plain", "absorbed"] * 3, "one run of each way unmeasured, then two in turn"
    for plain, absorbed in zip(rows[::2], rows[1::2], strict=True):
        assert plain["share"] == 1 and absorbed["share"] < 0.6, "each way took its own time"
        assert plain["chosen"] == (plain["model"] == "many latents") and absorbed["chosen"] != plain["chosen"]


def test_a_training_step_has_gradients_and_leaves_the_base_model_alone(small):
    model = random_models.random_model("few latents")
    torch.nn.init.ones_(model.hypernetwork.bias_B["down_proj"])  # else A of the bias gets no gradient
    step = random_models.training_step(model, 30, torch.Generator().manual_seed(0))
    step()
    first = [parameter.grad.clone() for parameter in model.hypernetwork.parameters()]
    step()
    assert all(grad.abs().sum() > 0 for grad in first)
    again = [parameter.grad for parameter in model.hypernetwork.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True)), "steps start from no gradient"
    assert all(parameter.grad is None for parameter in model.base_model.parameters())
