"""The hypernetwork to compare with: what it reads, that it learns, and that it can be asked like the real one."""

from dataclasses import replace

import pytest
import torch
from tiny_models import build_base_model, build_tokenizer

from d2l_lib.presets import DistillationPreset
from d2l_lib.records import read_jsonl
from d2l_lib.studies import baselines
from d2l_lib.training import text_to_lora
from d2l_lib.training.loop import Run
from d2l_lib.training.recipes import Base, hypernetwork_config
from d2l_lib.training.text_to_lora import TextToLoRA, load_text_to_lora, save_text_to_lora, train_text_to_lora

SMALL = DistillationPreset(
    latent_size=16, n_latent_queries=4, n_blocks=1, n_heads=2, n_kv_heads=1, head_dim=8, rank=2, encoder_layer=1,
    shortest_chunk=60, longest_chunk=160, single_chunk_share=0.5, contexts=6, questions=2, l1=0.0, steps=30,
    learning_rate=1e-2, warmup_steps=1, most_facts=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def base():
    tokenizer = build_tokenizer()
    return build_base_model(tokenizer, window=2048), tokenizer


def network_for(base_model) -> TextToLoRA:
    torch.manual_seed(0)
    return TextToLoRA(hypernetwork_config(SMALL, base_model, "x"))


def test_it_reads_the_mean_of_the_real_tokens_and_nothing_else(base):
    network = network_for(base[0])
    with torch.no_grad():
        network.scaler_B["down_proj"].fill_(1.0)
    features = torch.randn(2, 5, network.config.feature_size)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    A, B = network(features, mask)["down_proj"]
    config = network.config
    assert A.shape == (2, config.n_layers, 2, config.d_in["down_proj"])
    assert B.shape == (2, config.n_layers, 2, config.d_out["down_proj"])
    shuffled = features.clone()
    shuffled[1, :3] = features[1, [2, 0, 1]]
    shuffled[1, 3:] = float("nan")
    for before, after in zip((A, B), network(shuffled, mask)["down_proj"], strict=True):
        torch.testing.assert_close(before, after)
    other = features.clone()
    other[1, 0] += 1.0
    assert not torch.allclose(network(other, mask)["down_proj"][0][1], A[1])
    assert not torch.allclose(A[0, 0], A[0, 1]), "each layer gets rows of its own"


def test_it_learns_is_saved_and_answers_as_a_method(base, tmp_path):
    base_model, tokenizer = base
    base_model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = Base(base_model, tokenizer, str(tmp_path / "base"))
    network = train_text_to_lora(SMALL, base, Run(tmp_path / "run", report_steps=5))
    log = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert log[-1]["loss"] < log[0]["loss"]
    save_text_to_lora(tmp_path / "final", network)
    model = load_text_to_lora(tmp_path / "final")
    (adapter,) = model.internalize_each(["Ada Row wrote the Book of Velm. It was a long winter."])
    assert len(adapter.blocks) == 1 and adapter.bias is None
    features = model.encoder.encode(torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3, dtype=torch.long))
    with torch.no_grad():
        mine, theirs = network(features, torch.ones(1, 3)), model.hypernetwork(features, torch.ones(1, 3))
    assert torch.equal(mine["down_proj"][1], theirs["down_proj"][1]) and mine["down_proj"][1].any()
    method = baselines.Internalized(model, "text-to-LoRA")
    assert len(method.answer(method.prepare("A document.", ["Who?"]), ["Who?"])) == 1


def test_bad_places_are_named(base, tmp_path):
    with pytest.raises(FileNotFoundError, match="train one with"):
        load_text_to_lora(tmp_path)
    config = hypernetwork_config(replace(SMALL, encoder_layer=None), base[0], "x")
    with pytest.raises(ValueError, match="one hidden state"):
        text_to_lora.TextToLoRA(replace(config, encoder_type="per_layer_activations"))
