"""Does a base model know texts like this one? Its surprise, beside that of the mere frequencies of the characters.

    bits = -1/n sum_i log2 p(token i | tokens before it)      n: characters
    plain_bits = -sum_c f(c) log2 f(c)                        f(c): the share of character c in the same text

A model that knows a language needs far fewer bits than the frequencies (English: about 1 of 4.4). One that needs more
is misled by what it learned. The comparison needs no threshold of its own, and no other text.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from d2l_lib.base_model import input_device, window_of
from d2l_lib.engine import pad_id_of
from d2l_lib.lora import without_lora

_CHARACTERS = 800  # about 200 tokens of prose
_TOKENS = 256
_LEAST = 100  # characters; the frequencies of fewer say little


class Familiarity(NamedTuple):
    """How well a model predicts the beginning of a text.

    n_characters: of the beginning.
    perplexity: of the model, per token.
    bits, plain_bits: per character, of the model and of the frequencies of the characters.
    """

    n_characters: int
    perplexity: float
    bits: float
    plain_bits: float

    @property
    def is_strange(self) -> bool:
        """Whether the model predicts the text no better than the frequencies of its characters do."""
        return self.bits >= self.plain_bits

    def warning(self) -> str:
        """One line that gives the reason where the text is strange to the model, else ""."""
        if not self.is_strange:
            return ""
        return (
            f"Outside what this model knows: it predicts the first {self.n_characters:,} characters worse "
            f"({self.bits:.1f} bits each, perplexity {self.perplexity:,.0f}) than their mere frequencies do "
            f"({self.plain_bits:.1f} bits). Expect wrong answers"
        )


@torch.no_grad()
def familiarity(base_model: nn.Module, tokenizer, text: str) -> Familiarity | None:
    """How well the base model alone predicts the beginning of a text; None for a text under 100 characters.

    base_model: any causal language model, in evaluation mode. An adapter that is applied to it is ignored.
    tokenizer: that of the model.
    text: its first 800 characters count, or half, a quarter, ... of them: at most 256 tokens, within the window.

    A text of another language that shares the model's alphabet may still pass: it is strange, but not random.
    """
    start, most = text.strip()[:_CHARACTERS], min(_TOKENS, window_of(base_model) - 1)
    if len(start) < _LEAST:
        return None
    while len(ids := tokenizer(start, add_special_tokens=False)["input_ids"]) > most:
        start = start[: len(start) // 2]
    first = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), pad_id_of(tokenizer))
    tokens = torch.tensor([[first, *ids]], device=input_device(base_model))
    with without_lora(base_model):
        log_probs = base_model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
    nats = -log_probs.gather(1, tokens[0, 1:, None]).sum().item()
    counts = Counter(start)
    plain = -sum(n / len(start) * math.log2(n / len(start)) for n in counts.values())
    return Familiarity(len(start), math.exp(nats / len(ids)), nats / math.log(2) / len(start), plain)
