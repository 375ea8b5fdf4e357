"""A small needle training run for a process of its own, or for several that share the batches."""

import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from d2l_lib.base_model import load_tokenizer
from d2l_lib.formats.checkpoints import save_checkpoint
from d2l_lib.presets import NeedlePreset, WarmUpPreset, preset
from d2l_lib.training import contexts, loop, processes, recipes

STEPS = 16
SMALL = replace(
    preset("tiny").needle,
    latent_size=16, n_latent_queries=4, n_blocks=1, n_heads=2, n_kv_heads=1, head_dim=8, rank=2, encoder_layer=1,
    shortest=32, longest=64, steps=STEPS, contexts=3, warmup_steps=2, polish_steps=4,
    readout=WarmUpPreset(steps=4, sentences=4, learning_rate=1e-3, warmup_steps=1),
)  # fmt: skip
# Steps of four batches, with unequal numbers of contexts, and noise.
ELASTIC = replace(
    SMALL, batches_per_step=4, steps=48, warmup_steps=8, context_tokens=160, neftune=5.0, readout=None, polish_steps=0
)
BRIEF = replace(ELASTIC, batches_per_step=2, steps=4, warmup_steps=1)


class SlowBatches(contexts.NeedleBatches):
    """Batches that take their time, so that a test can kill the run between two of them."""

    seconds = 0.0

    def __getitem__(self, i):
        time.sleep(self.seconds)
        return super().__getitem__(i)


def small_base():
    """A random base model of two layers, and its tokenizer (build_tokenizer(600, 512, 0), saved)."""
    tokenizer = load_tokenizer(str(Path(__file__).parent / "small_tokenizer"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=48, tie_word_embeddings=True, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False), tokenizer


def train(run: Path, seconds_per_batch: float, p: NeedlePreset = SMALL, save_steps: int = 4) -> None:
    SlowBatches.seconds = seconds_per_batch
    recipes.NeedleBatches = SlowBatches
    base = recipes.Base(*small_base(), "small")
    hypernetwork = recipes.train_needle(p, base, loop.Run(run, save_steps=save_steps, report_steps=2))
    if processes.is_first_process():
        save_checkpoint(run / "final", hypernetwork, {})


def train_elastic(run: Path, seconds_per_batch: float) -> None:
    train(run, seconds_per_batch, ELASTIC, save_steps=3)
