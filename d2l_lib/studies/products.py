"""The matrix products that a task cannot do without, from its sizes alone: the arithmetic behind `bench`'s floors.

Sums, norms and activations are left out, and of a token's attention what it may not see. Where two ways give the same
numbers (see `hypernetwork.Attention`), the one with fewer operations counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from d2l_lib.hypernetwork import HypernetworkConfig
from d2l_lib.model import DocToLoRA


@dataclass(frozen=True)
class Product:
    """[rows, inner] x [inner, columns], so many times; a multiplication and an addition are two operations."""

    rows: int
    inner: int
    columns: int
    times: float = 1.0

    @property
    def operations(self) -> float:
        return 2.0 * self.rows * self.inner * self.columns * self.times


Products = list[Product]


def operations(products: Iterable[Product]) -> float:
    """All their operations."""
    return sum(product.operations for product in products)


def _repeated(products: Iterable[Product], times: float) -> Products:
    return [replace(one, times=one.times * times) for one in products]


# ------------------------------------------------------------------------------------------------------- internalizing
def internalizing(model: DocToLoRA, tokens: int, chunks: int = 1) -> Products:
    """Reading chunks of `tokens` tokens, one after another, and writing their blocks.

    Of a model that writes token rows, words are counted as if all tokens of the chunks' texts were different.
    """
    one = _linears(model, tokens, model.encoder.n_layers_run) + _attention(model, tokens, model.encoder.n_layers_run)
    if not model.writes_rows:
        return _repeated(one + writing(model.config, tokens), chunks)
    words = model.hypernetwork.words
    different = chunks * (tokens - words.before - words.after) + 1  # and the end of a turn
    (d_out,) = model.config.d_out.values()
    return _repeated(one + _rows(model.config, tokens), chunks) + [Product(different, d_out, d_out)]


def _rows(config: HypernetworkConfig, tokens: int) -> Products:
    """Codes of a chunk's tokens, from states that are mixed in each block.

    Convolutions over a few neighbours are left out.
    """
    d, h, wide = config.latent_size, config.latent_size // config.n_heads, 3 * config.latent_size
    scores = [Product(tokens, h, tokens, config.n_heads), Product(tokens, tokens, h, config.n_heads)]
    mixer = [
        Product(tokens, d, wide),
        *scores,
        Product(tokens, d, d),
        Product(tokens, d, wide),
        Product(tokens, wide, d),
    ]
    around = [Product(tokens, config.feature_size, d), Product(tokens, d, config.rank * d)]
    return around + _repeated(mixer, config.n_blocks)


def writing(config: HypernetworkConfig, tokens: int, chunks: int = 1) -> Products:
    """The blocks of chunks, from their features; the first product is the one that reads the features."""
    sequences = chunks * (config.n_layers if config.layer_to_layer else 1)
    rows = len(config.modules) * config.rank  # of a base layer
    outputs = rows if config.layer_to_layer else rows * config.n_layers
    F, d, queries = config.feature_size, config.latent_size, config.n_latent_queries
    products = [Product(sequences * tokens, F, 4 * F, 2), Product(sequences * tokens, 4 * F, d)]
    for block in range(config.n_blocks):
        products += _perceiver_layer(config, queries, tokens, sequences, is_first=block == 0)
        for _ in range(config.n_self_attention_per_block):
            products += _perceiver_layer(config, queries, queries, sequences)
    products += _perceiver_layer(config, outputs, queries, sequences, is_first=True)
    residual = [Product(chunks * rows, d, 4 * d, config.n_layers), Product(chunks * rows, 4 * d, d, config.n_layers)]
    products += _repeated(residual, config.n_pre_head_layers)
    sizes = [config.d_in[module] + config.d_out[module] for module in config.modules]
    return products + [Product(chunks * config.rank, d, size, config.n_layers) for size in sizes]


def _perceiver_layer(
    config: HypernetworkConfig, queries: int, tokens: int, sequences: int, is_first: bool = False
) -> Products:
    """Latents of each sequence read its tokens; is_first: the latents are still the same for all sequences."""
    d, h, heads = config.latent_size, config.head_dim, config.n_kv_heads
    rows, own = config.n_heads // heads * queries, 1 if is_first else sequences
    plain = [Product(sequences * tokens, d, heads * h, 2)]
    plain += [Product(rows, h, tokens, heads * sequences), Product(rows, tokens, h, heads * sequences)]
    absorbed = [Product(rows, h, d, heads * own), Product(rows, d, h, heads * sequences)]
    absorbed += [Product(heads * rows, d, tokens, sequences), Product(heads * rows, tokens, d, sequences)]
    wide = config.n_heads * h
    around = [Product(own * queries, d, wide), Product(sequences * queries, wide, d)]
    around += [Product(sequences * queries, d, 4 * d, 2), Product(sequences * queries, 4 * d, d)]
    return around + min(plain, absorbed, key=operations)


# -------------------------------------------------------------------------------------------------------- base model
def _linears(model: DocToLoRA, tokens: int, layers: float) -> Products:
    """The linears of so many base layers, on all tokens at once."""
    c = model.base_model.config
    d, wide, q, kv = c.hidden_size, c.intermediate_size, *_heads(model)
    one = [Product(tokens, d, q), Product(tokens, q, d), Product(tokens, d, kv, 2)]
    return _repeated([*one, Product(tokens, d, wide, 2), Product(tokens, wide, d)], layers)


def _heads(model: DocToLoRA) -> tuple[int, int]:
    """Sizes of all queries and of all keys of a token."""
    c = model.base_model.config
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return c.num_attention_heads * size, c.num_key_value_heads * size


def _attention(model: DocToLoRA, tokens: int, layers: float, sequences: int = 1) -> Products:
    """Scores and mixing of base layers: a token sees itself and what is before it."""
    heads = model.base_model.config.num_attention_heads
    size, seen = _heads(model)[0] // heads, (tokens + 1) / (2 * tokens)
    one = [Product(tokens, size, tokens), Product(tokens, tokens, size)]
    return _repeated(one, heads * layers * sequences * seen)


def _updates(model: DocToLoRA, tokens: int, rank: int, layers: float) -> tuple[Products, Products]:
    """A x, and B^T of it, in so many base layers."""
    c = model.config
    A = [Product(tokens, c.d_in[module], rank, layers) for module in c.modules]
    return A, [Product(tokens, rank, c.d_out[module], layers) for module in c.modules]


def answering(model: DocToLoRA, rank: int, questions: int, length: int, new_tokens: int) -> Products:
    """Answers of `new_tokens` tokens to questions of `length`, with an adapter of `rank` rows (0: none)."""
    c = model.base_model.config
    layers, steps = c.num_hidden_layers, new_tokens - 1  # the last token is not read again
    products = _attention(model, length, layers, questions)
    for tokens, times in ((questions * length, 1), (questions, steps)):
        A, B = _updates(model, tokens, rank, layers) if rank else ([], [])
        sizes = ((model.config.d_in[module], model.config.d_out[module]) for module in model.config.modules)
        update = min(A + B, [Product(tokens, *both, layers) for both in sizes], key=operations)
        products += _repeated(_linears(model, tokens, layers) + update, times)
    size, seen = _heads(model)[0] // c.num_attention_heads, length + new_tokens // 2
    later = [Product(1, size, seen), Product(1, seen, size)]
    products += _repeated(later, c.num_attention_heads * layers * questions * steps)
    return [*products, Product(questions, c.hidden_size, c.vocab_size, new_tokens)]


# ---------------------------------------------------------------------------------------------------------- training
def training(
    model: DocToLoRA, tokens: int, contexts: int, questions: int, question_tokens: int, answer_tokens: int
) -> Products:
    """A step's loss and gradients: contexts of one chunk each, `questions` to each.

    A product's gradients are two more of its size, one for each factor, and one where a factor needs none: features,
    and weights of the base model. Its first layer needs gradients from the update on alone.
    """
    c, asked = model.base_model.config, contexts * questions
    read = _linears(model, tokens, model.encoder.n_layers_run) + _attention(model, tokens, model.encoder.n_layers_run)
    first, *rest = writing(model.config, tokens, contexts)
    products = _repeated(read, contexts) + _repeated([first], 2) + _repeated(rest, 3)
    n, later = asked * question_tokens, c.num_hidden_layers - 1
    products += _linears(model, n, 1 + 2 * later) + _attention(model, question_tokens, 1 + 3 * later, asked)
    rank = model.config.rank * (1 + model.config.use_bias)  # of a chunk's block and the bias block
    products += _updates(model, n, rank, 2 + 3 * later)[0] + _updates(model, n, rank, 3 * (1 + later))[1]
    return [*products, Product(asked * answer_tokens, c.hidden_size, c.vocab_size, 2)]
