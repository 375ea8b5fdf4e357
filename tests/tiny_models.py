"""Small random models for tests: a byte-level tokenizer with a chat template, a Llama, a hypernetwork that acts.

No training, no download; building one takes well under a second.
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from d2l_lib.base_model import module_sizes
from d2l_lib.hypernetwork import Hypernetwork, HypernetworkConfig
from d2l_lib.model import DocToLoRA

SPECIAL = ["<pad>", "<eos>", "<bos>", "<start>", "<end>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<start>' + m['role'] + '\n' + m['content'] + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)
# Like Gemma-2's: no system turn, the text is trimmed.
NO_SYSTEM_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start>' + m['role'] + '\n' + (m['content'] | trim) + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
)


def build_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte (an emoji takes four) and five special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        extra_special_tokens=["<start>", "<end>"],
        chat_template=chat_template,
    )


def build_base_model(tokenizer, n_layers: int = 3, window: int = 256, seed: int = 0, hidden_size: int = 32):
    """A random Llama of hidden size 32; weights are large enough that its greedy answers depend on the input."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=window,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def build_hypernetwork(base_model, modules=("down_proj",), seed: int = 1, **settings) -> Hypernetwork:
    """A random hypernetwork of rank 2 for this base model, whose documents and bias both change the base model."""
    d_in, d_out = module_sizes(base_model, list(modules))
    values = {
        "latent_size": 16,
        "rank": 2,
        "n_latent_queries": 4,
        "n_blocks": 1,
        "n_heads": 2,
        "n_kv_heads": 1,
        "head_dim": 8,
    }
    config = HypernetworkConfig(
        n_layers=base_model.config.num_hidden_layers,
        d_in=d_in,
        d_out=d_out,
        feature_size=base_model.config.hidden_size,
        **(values | settings),
    )
    torch.manual_seed(seed)
    hypernetwork = Hypernetwork(config)
    with torch.no_grad():
        for name, parameter in hypernetwork.named_parameters():
            if name.startswith("bias"):
                parameter.add_(0.05 * torch.randn_like(parameter))
            if name.startswith("scaler_B"):
                parameter.add_(2 + torch.randn_like(parameter))
    return hypernetwork.eval().requires_grad_(False)


def build_model(
    modules=("down_proj",), seed: int = 1, n_layers: int = 3, window: int = 256, base_seed: int = 0, **settings
) -> DocToLoRA:
    """A whole random model; `settings` go to HypernetworkConfig."""
    tokenizer = build_tokenizer()
    base_model = build_base_model(tokenizer, n_layers=n_layers, window=window, seed=base_seed)
    return DocToLoRA(base_model, tokenizer, build_hypernetwork(base_model, modules, seed, **settings))


@torch.no_grad()
def logits_of(model: DocToLoRA, adapter, text: str = "Who is it?") -> torch.Tensor:
    """Logits [1, length, vocabulary] of the base model with an adapter (or None) applied."""
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    with model.applied(adapter) as network:
        return network(ids).logits
