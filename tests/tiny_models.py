"""Small random models for tests: a byte-level tokenizer with a chat template, decoders of each family, vision-language
models with their processors, a hypernetwork.

No training, no download; building one takes well under a second. Every weight is random, so that nothing is a no-op.
"""

from dataclasses import replace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from d2l_lib.adapter import Adapter
from d2l_lib.base_model import EAGER_ATTENTION, module_sizes
from d2l_lib.hypernetwork import Hypernetwork, HypernetworkConfig
from d2l_lib.model import DocToLoRA
from d2l_lib.pooled_rows import PooledRows
from d2l_lib.row_reader import reader_sizes
from d2l_lib.token_rows import TokenRows

FAMILIES = ("gemma2", "gemma3_text", "mistral", "qwen2", "qwen3", "llama", "phi3", "phi")
VISION_FAMILIES = ("gemma3", "llava")
# The linear that a hypernetwork writes, where a family does not call it down_proj.
MLP_OUTPUT = {"phi": "fc2"}
N_LAYERS, HIDDEN, WINDOW = 4, 32, 256
VOCABULARY = 64  # of a base model without a tokenizer
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
# Reads a turn as plain text or as parts, of which some may be images.
PARTS_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<start>' + m['role'] + '\n' }}{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}{{ '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
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


def build_base_model(
    tokenizer=None,
    *,
    family: str = "llama",
    n_layers: int = N_LAYERS,
    hidden_size: int = HIDDEN,
    window: int = WINDOW,
    seed: int = 0,
    **settings,
):
    """A random decoder for this tokenizer (None: of VOCABULARY tokens), frozen; `settings` go to its configuration.

    With a tokenizer its weights are large enough that greedy answers depend on the input; without one they are small,
    so that float32 rounding stays far below the tests' tolerances.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY if tokenizer is None else len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=window,
        **{"initializer_range": 0.02 if tokenizer is None else 0.2, "pad_token_id": 0, "eos_token_id": 1} | settings,
        bos_token_id=2,
    )
    options = {"attn_implementation": "eager"} if family in EAGER_ATTENTION else {}
    return AutoModelForCausalLM.from_config(config, **options).eval().requires_grad_(False)


def build_vision_model(family: str = "gemma3", *, n_layers: int = N_LAYERS, hidden_size: int = HIDDEN, seed: int = 0):
    """(a random vision-language model, frozen, its processor): pictures of 16 x 16 pixels in patches of 4 x 4."""
    from transformers import Gemma3Processor, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    names = {"gemma3": ["<image>", "<soft>", "<eoi>"], "llava": ["<image>"]}[family]
    roles = {"gemma3": ["boi_token", "image_token", "eoi_token"], "llava": ["image_token"]}[family]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer().backend_tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        extra_special_tokens=dict(zip(roles, names, strict=True)),
        chat_template=PARTS_TEMPLATE,
    )
    size = {"height": 16, "width": 16}
    if family == "gemma3":
        pictures = Gemma3ImageProcessorPil(size=size)
        processor = Gemma3Processor(pictures, tokenizer, chat_template=PARTS_TEMPLATE, image_seq_length=4)
        text, vision = "gemma3_text", {"model_type": "siglip_vision_model"}
        settings = {"mm_tokens_per_image": 4, "boi_token_index": tokenizer.boi_token_id}
        settings["eoi_token_index"] = tokenizer.eoi_token_id
    else:
        pictures = CLIPImageProcessorPil(size=size, crop_size=size)
        processor = LlavaProcessor(
            pictures,
            tokenizer,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=PARTS_TEMPLATE,
        )
        text, vision, settings = "llama", {"model_type": "clip_vision_model", "projection_dim": 16}, {}
    config = AutoConfig.for_model(
        family,
        text_config={
            "model_type": text,
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 48,
            "num_hidden_layers": n_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": hidden_size // 4,
            "max_position_embeddings": WINDOW,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
        },
        vision_config=vision
        | {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        image_token_id=tokenizer.image_token_id,
        **settings,
    )
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "multi_modal_projector" in name or "vision_tower" in name:
            parameter.add_(torch.randn_like(parameter) * 0.2)  # so that pictures differ in what they look like
    return model, processor


def random_hypernetwork(base_model, modules=("down_proj",), seed: int = 1, **settings) -> Hypernetwork:
    """A hypernetwork of rank 2 for this base model with all parameters random; `settings` go to HypernetworkConfig."""
    sizes = base_model.config.get_text_config()
    d_in, d_out = module_sizes(base_model, list(modules))
    values = {
        "latent_size": 16,
        "rank": 2,
        "n_latent_queries": 6,
        "n_blocks": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 8,
    }
    config = HypernetworkConfig(
        n_layers=sizes.num_hidden_layers,
        d_in=d_in,
        d_out=d_out,
        **({"feature_size": sizes.hidden_size} | values | settings),
    )
    torch.manual_seed(seed)
    hypernetwork = Hypernetwork(config)
    randomize(hypernetwork)
    return hypernetwork.eval()


@torch.no_grad()
def randomize(hypernetwork: Hypernetwork) -> None:
    """Noise on every parameter, so that scalers and biases that start at 0 count."""
    for parameter in hypernetwork.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)


def build_model(
    modules=("down_proj",),
    seed: int = 1,
    n_layers: int = N_LAYERS,
    window: int = WINDOW,
    base_seed: int = 0,
    **settings,
) -> DocToLoRA:
    """A whole random model; `settings` go to HypernetworkConfig."""
    tokenizer = build_tokenizer()
    base_model = build_base_model(tokenizer, n_layers=n_layers, window=window, seed=base_seed)
    return DocToLoRA(base_model, tokenizer, random_hypernetwork(base_model, modules, seed, **settings))


def build_rows_model(base_seed: int = 0, seed: int = 1, family: str = "llama") -> DocToLoRA:
    """A whole random model that writes token rows; its values are as large as a layer's, so that answers change."""
    tokenizer = build_tokenizer()
    base_model = build_base_model(tokenizer, family=family, seed=base_seed)
    d_in, d_out = module_sizes(base_model, ["down_proj"])
    config = HypernetworkConfig(
        n_layers=1, d_in=d_in, d_out=d_out, feature_size=3 * HIDDEN, latent_size=16, rank=4, scale=1.0, n_blocks=1,
        encoder_type="hidden_states", encoder_layers=(0, 2, 3), use_bias=False, n_heads=4, n_kv_heads=4,
        writer="token_rows", row_layers=(N_LAYERS - 2, N_LAYERS - 1), reader_layers=(N_LAYERS - 1,),
        reader_rank=2, reader_sizes=reader_sizes(base_model, (N_LAYERS - 1,)),
    )  # fmt: skip
    torch.manual_seed(seed)
    hypernetwork = TokenRows(config)
    randomize(hypernetwork)
    with torch.no_grad():
        hypernetwork.log_gain += 2
        for keys in hypernetwork.reader.keys.values():
            keys.mul_(4)
        hypernetwork.reader.gate_bias.fill_(0)  # open from the first token on
    return DocToLoRA(base_model, tokenizer, hypernetwork.eval())


def build_pooled_model(seed: int = 1) -> DocToLoRA:
    """A whole random model that writes rank 2 in the last two layers alone, with a bias block."""
    tokenizer = build_tokenizer()
    base_model = build_base_model(tokenizer)
    d_in, d_out = module_sizes(base_model, ["down_proj"])
    config = HypernetworkConfig(
        n_layers=N_LAYERS, d_in=d_in, d_out=d_out, feature_size=3 * HIDDEN, latent_size=16, rank=2, scale=1.0,
        n_blocks=1, encoder_type="hidden_states", encoder_layers=(0, 2, 3), n_heads=4, n_kv_heads=4,
        writer="pooled_rows", written_layers=(N_LAYERS - 2, N_LAYERS - 1), pooled_size=64, pooled_blocks=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    hypernetwork = PooledRows(config)
    randomize(hypernetwork)
    return DocToLoRA(base_model, tokenizer, hypernetwork.eval())


def held(adapter: Adapter, layers: tuple[int, ...]) -> Adapter:
    """The adapter with the tensors of these layers alone."""

    def of(side):
        return {module: rows[list(layers)] for module, rows in side.items()}

    blocks = tuple(replace(block, A=of(block.A), B=of(block.B)) for block in adapter.blocks)
    bias = adapter.bias and {m: (A[list(layers)], B[list(layers)]) for m, (A, B) in adapter.bias.items()}
    return replace(adapter, blocks=blocks, bias=bias, layers=layers)


@torch.no_grad()
def logits_of(model: DocToLoRA, adapter, text: str = "Who is it?") -> torch.Tensor:
    """Logits [1, length, vocabulary] of the base model with an adapter (or None) applied."""
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    with model.applied(adapter) as network:
        return network(ids).logits


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
    """Token ids of the small vocabulary without special tokens."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
