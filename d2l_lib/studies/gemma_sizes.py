"""Gemma-2-2B's sizes with random weights: time, memory and operations do not depend on the numbers."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from d2l_lib.base_model import load_base_model, module_sizes
from d2l_lib.documents import check_count
from d2l_lib.encoder import ContextEncoder
from d2l_lib.hypernetwork import Hypernetwork, HypernetworkConfig
from d2l_lib.model import DocToLoRA

# The published sizes of google/gemma-2-2b-it.
GEMMA_2_2B = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
}
# The paper's hypernetworks for it: rank 8 on the down projections, latents of 512. With one pre-head layer per base
# layer they have 310 and 315 million parameters; 309 million are published.
RECIPES = {
    "needle": {"encoder_type": "early_exit", "n_latent_queries": 208, "n_blocks": 8},
    "main": {"encoder_type": "per_layer_activations", "n_latent_queries": 8, "n_blocks": 9},
}
_CHUNK_TOKENS = 1024  # of the published evaluation


def random_model(
    recipe: str, layers: int | None, vocabulary: int | None, dtype: torch.dtype, device: str, seed: int
) -> DocToLoRA:
    """A random model of these sizes, with the bundled tokenizer.

    recipe: one of RECIPES.
    layers: of the base model (None: as published).
    vocabulary: number of tokens (None: as published).
    """
    with torch.device(device):
        torch.manual_seed(seed)
        base_model, hypernetwork = _random_parts(recipe, layers, vocabulary, dtype)
        for parameter in hypernetwork.scaler_B.values():
            parameter.fill_(1.0)  # a fresh hypernetwork writes B = 0
    _, tokenizer = load_base_model("tiny", device="cpu")
    if len(tokenizer) > base_model.config.vocab_size:
        raise ValueError(
            f"a vocabulary of {base_model.config.vocab_size} is too small: documents are written with the "
            f"{len(tokenizer)} tokens of the bundled tokenizer"
        )
    return DocToLoRA(base_model, tokenizer, hypernetwork, chunk_tokens=_CHUNK_TOKENS)


def _random_parts(recipe: str, layers: int | None, vocabulary: int | None, dtype: torch.dtype):
    """(base model, hypernetwork), random and frozen, on the default device."""
    if recipe not in RECIPES:
        raise ValueError(f"there is no recipe {recipe!r} for gemma-2-2b; there are {', '.join(RECIPES)}")
    sizes = GEMMA_2_2B | ({} if layers is None else {"num_hidden_layers": layers})
    sizes |= {} if vocabulary is None else {"vocab_size": vocabulary}
    config = AutoConfig.for_model("gemma2", **sizes)
    base_model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    d_in, d_out = module_sizes(base_model, ["down_proj"])
    shared = {"d_in": d_in, "d_out": d_out, "latent_size": 512, "rank": 8, "per_layer_processing": True}
    width = {"n_layers": config.num_hidden_layers, "feature_size": config.hidden_size}
    hypernetwork = Hypernetwork(HypernetworkConfig(**shared, **width, **RECIPES[recipe]))
    return base_model.eval().requires_grad_(False), hypernetwork.eval().requires_grad_(False)


def parameter_counts(recipe: str, layers: int | None = None) -> dict[str, int]:
    """Parameters of the base model and the hypernetwork."""
    with torch.device("meta"):
        base_model, hypernetwork = _random_parts(recipe, layers, None, torch.bfloat16)
    return {"base model": n_parameters(base_model), "hypernetwork": n_parameters(hypernetwork)}


def n_parameters(module: torch.nn.Module) -> int:
    """The number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def operations(recipe: str, layers: int | None = None, tokens: int = _CHUNK_TOKENS) -> pd.DataFrame:
    """Floating-point operations per document token, by shapes alone.

    Columns: part (encoder, Perceiver, head, all layers), gflop_per_token (billions; a multiplication and an addition
    are two). One chunk of `tokens` tokens is read. "all layers" is the base model with the chunk in its prompt, and its
    language-model head for the last token alone.
    """
    check_count(tokens, "tokens")
    with torch.device("meta"):
        base_model, hypernetwork = _random_parts(recipe, layers, None, torch.bfloat16)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        mask = torch.ones_like(ids)
    rows = []

    def count(part: str, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        with FlopCounterMode(display=False) as counter:
            result = run()
        rows.append({"part": part, "gflop_per_token": counter.get_total_flops() / tokens / 1e9})
        return result

    def head(embedding: torch.Tensor) -> torch.Tensor:
        for residual in hypernetwork.layers:
            embedding = residual(embedding)
        return hypernetwork.head(F.normalize(embedding, dim=-1))

    encoder = ContextEncoder.from_config(base_model, hypernetwork.config)
    features = count("encoder", lambda: encoder.encode(ids, attention_mask=mask))
    embedding = count("Perceiver", lambda: hypernetwork.aggregator(features.float(), None))
    count("head", lambda: head(embedding))
    count("all layers", lambda: base_model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1))
    return pd.DataFrame(rows)
