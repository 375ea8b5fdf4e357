"""Small random models for tests: seconds to build, no download, every weight random so that nothing is a no-op."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from d2l_lib.base_model import module_sizes
from d2l_lib.hypernetwork import Hypernetwork, HypernetworkConfig

FAMILIES = ("gemma2", "gemma3_text", "mistral", "qwen3", "llama")
N_LAYERS, HIDDEN, VOCABULARY = 4, 32, 64


def small_base_model(family: str = "llama", seed: int = 0):
    """A decoder of 4 layers, hidden size 32 and vocabulary 64."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    options = {"attn_implementation": "eager"} if family == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(config, **options)
    return model.eval().requires_grad_(False)


def small_hypernetwork(model, modules=("down_proj",), seed: int = 1, **options) -> Hypernetwork:
    """A hypernetwork for `model` with all parameters random."""
    d_in, d_out = module_sizes(model, list(modules))
    settings = {
        "n_layers": N_LAYERS,
        "d_in": d_in,
        "d_out": d_out,
        "feature_size": HIDDEN,
        "latent_size": 16,
        "rank": 2,
        "n_latent_queries": 6,
        "n_blocks": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 8,
    }
    torch.manual_seed(seed)
    hypernetwork = Hypernetwork(HypernetworkConfig(**(settings | options)))
    randomize(hypernetwork)
    return hypernetwork.eval()


def randomize(hypernetwork: Hypernetwork) -> None:
    """Noise on every parameter, so that scalers and biases that start at 0 count."""
    with torch.no_grad():
        for parameter in hypernetwork.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def random_loras(config: HypernetworkConfig, contexts: int, rows: int, size: float = 0.1):
    """{module: (A [contexts, L, rows, d_in], B [contexts, L, rows, d_out])}"""
    return {
        m: (
            torch.randn(contexts, config.n_layers, rows, config.d_in[m]) * size,
            torch.randn(contexts, config.n_layers, rows, config.d_out[m]) * size,
        )
        for m in config.modules
    }


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids without special tokens."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
