"""A hypernetwork whose blocks grow with the chunk: four rows for each token, read with a softmax.

The published hypernetwork writes r rows a chunk, whatever its length, and the adapted model adds all of them. Here a
token of a question or of an answer reads the rows by attention (`row_reader`, `row_reading`). Row 4t + k belongs to
token t of the chunk, and says

    k = 0    "write it as the first token of an answer"
    k = 1    "write it as a later token of an answer"
    k = 2    "write the end of the turn after it"
    k = 3    "this is what it is": words of a question look for it, before the last layer

    A = c_k = role_k(mix(features))_t                  its code, learned
    B = gain_k * unit(C^-1 (e - mean of e)),  k < 3    e: a token's output embedding times the final norm's weight

Output embeddings of all tokens are alike, so a mixture of them writes none. C is their covariance: its inverse turns e
into the direction that tells the token from all others, and of a mixture the largest share is said. Values need no
learning, so a row can write any word, also one that training never saw. An answer is written in the tokens of the
document, a space before its first word included, so a name goes on as it stands there, in whatever parts.

Attention over the words of the input as output is the pointer network's (Vinyals et al. 2015, arXiv 1506.03134; See et
al. 2017, arXiv 1704.04368); here it is an adapter: keys and values of one linear of a frozen model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2l_lib.adapter import SharedRows
from d2l_lib.base_model import decoder_body, final_norm_name
from d2l_lib.documents import chat_affixes, question_affixes, stop_ids
from d2l_lib.hypernetwork import HypernetworkConfig, Loras, zero_padding
from d2l_lib.row_reader import RowReader

WORD_ROLES = ("first", "inside", "end")
ROLES = (*WORD_ROLES, "context")
_RIDGE = 0.05  # of the mean variance of an embedding's numbers
_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a part of a letter's bytes reads as
_SAME = 0.99  # cosine of directions that write one token, half precision counted
_KERNEL = 7  # tokens that a mixing convolution sees
_AT_ONCE = 256  # words whose directions one matrix product gives


class _Mixer(nn.Module):
    """A convolution over neighbours, then a Transformer layer over the chunk, on [n, T, d]."""

    def __init__(self, config: HypernetworkConfig):
        super().__init__()
        d = config.latent_size
        self.neighbours = nn.Conv1d(d, d, _KERNEL, padding=_KERNEL // 2, groups=d)
        options = {"activation": "gelu", "batch_first": True, "norm_first": True, "dropout": config.dropout}
        self.attention = nn.TransformerEncoderLayer(d, config.n_heads, 3 * d, **options)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.neighbours((x * mask.unsqueeze(-1)).mT).mT
        return self.attention(x, src_key_padding_mask=~mask)


class TokenStates(nn.Module):
    """Hidden states of a chunk's tokens, mixed among each other, and the base model's words."""

    def __init__(self, config: HypernetworkConfig):
        super().__init__()
        self.config = config
        d = config.latent_size
        self.feature_mean = nn.Parameter(torch.zeros(config.feature_size))
        self.feature_scale = nn.Parameter(torch.ones(config.feature_size))
        self.project = nn.Linear(config.feature_size, d)
        self.place_scaler = nn.Parameter(torch.tensor(0.5))
        self.mixers = nn.ModuleList(_Mixer(config) for _ in range(config.n_blocks))
        self.norm = nn.RMSNorm(d)
        self._words: Words | None = None

    def prepare(self, base_model: nn.Module, tokenizer) -> None:
        """Take the output embeddings and the tokens of the model that is written for."""
        self._words = Words(base_model, tokenizer)

    @property
    def words(self) -> Words:
        """The base model's words. RuntimeError before `prepare`."""
        if self._words is None:
            raise RuntimeError("these rows write a model's own words: call prepare(base_model, tokenizer) first")
        return self._words

    def states(self, features: Tensor, mask: Tensor) -> Tensor:
        """[n, T, d] of features [n, T, F]; mask [n, T] is True at tokens of chunks."""
        x = self.project(((features - self.feature_mean) / self.feature_scale).clamp(-8, 8))
        x = x + self.place_scaler * _places(mask, x)
        for mixer in self.mixers:
            x = mixer(x, mask)
        return self.norm(x)

    def take_mixing(self, other: TokenStates) -> None:
        """Take over the mixing layers of another hypernetwork, of the same sizes."""
        own = dict(TokenStates(self.config).named_parameters())
        self.load_state_dict({name: value for name, value in other.state_dict().items() if name in own}, strict=False)

    def text(self, attention_mask: Tensor) -> Tensor:
        """[n, T]: True at a chunk's text, its chat wrapping left out.

        attention_mask: [n, T], 0 at padding on the right. RuntimeError before `prepare`; ValueError without text.
        """
        own = torch.zeros_like(attention_mask, dtype=torch.bool)
        for row, length in enumerate(attention_mask.sum(1).tolist()):
            if length <= self.words.before + self.words.after:
                raise ValueError(f"a chunk of {length} tokens has no text: wrap it as documents.context_ids does")
            own[row, self.words.before : length - self.words.after] = True
        return own


class TokenRows(TokenStates):
    """Hidden states of n chunks -> rows (see the module's text), and what reads them: `reader`.

    `prepare` tells it the base model's words before the first `forward`; `codes` needs none.
    """

    def __init__(self, config: HypernetworkConfig):
        if config.n_layers != 1 or len(config.modules) != 1 or config.use_bias or config.rank != len(ROLES):
            raise ValueError(f"token rows are for one module, {len(ROLES)} a token, without a bias block")
        super().__init__(config)
        (self.module,) = config.modules
        self.roles = nn.Linear(config.latent_size, len(ROLES) * config.latent_size)
        self.log_gain = nn.Parameter(torch.zeros(len(WORD_ROLES)))
        self.reader = RowReader(config, len(WORD_ROLES))

    def prepare(self, base_model: nn.Module, tokenizer) -> None:
        """Take the output embeddings and the tokens of the model that is written for."""
        super().prepare(base_model, tokenizer)
        self.reader.words = self.words
        before, after = question_affixes(tokenizer)
        self.reader.answer_start, self.reader.wrapping = tuple(after), frozenset(before + after)
        self.reader.answer_ends = frozenset(stop_ids(tokenizer))

    def codes(self, features: Tensor, mask: Tensor) -> Tensor:
        """c [n, T, 4, d] of features [n, T, F]; mask [n, T] is True at tokens of chunks."""
        codes = self.roles(self.states(features, mask)).unflatten(-1, (len(ROLES), -1))
        return F.rms_norm(codes, (self.config.latent_size,))

    def forward(
        self, features: Tensor, attention_mask: Tensor, input_ids: Tensor | None = None, iterative: bool = False
    ) -> Loras:
        """{module: (A [n, 1, 4 T, d], B [n, 1, 4 T, d_out])} of chunks of T tokens, chat wrapping included.

        features: [n, T, F]. attention_mask: [n, T], 0 at padding on the right.
        input_ids: [n, T] (None: B has no rows; `shared_rows` makes those of a whole document).
        iterative: there is one layer, so it changes nothing.

        `rows_of` tells which rows are a chunk's own. RuntimeError before `prepare`; ValueError without text.
        """
        features, _ = zero_padding(features, attention_mask)
        A = self.codes(features.to(self.project.weight.dtype), self.text(attention_mask))
        if input_ids is None:
            B = A.new_zeros(len(A), 0, self.config.d_out[self.module])
        else:
            B = F.pad(self.values(self.words.tokens(input_ids)), (0, 0, 0, 1)).flatten(1, 2)  # context writes no word
        return {self.module: (A.flatten(1, 2).unsqueeze(1), B.unsqueeze(1))}

    def values(self, tokens: Tensor) -> Tensor:
        """B [..., 3, d_out] of what a token's rows of words write [..., 3]."""
        return self.log_gain.exp().unsqueeze(-1) * self.words.directions(tokens)

    def shared_rows(self, chunks: Sequence[Sequence[int]]) -> list[SharedRows]:
        """B of each chunk of token ids, chat wrapping included: rows of one table of all their words.

        The table holds each word as "first" and as "inside", then the end of a turn, then zeros for rows of context.
        """
        text = [torch.tensor(ids[self.words.before : len(ids) - self.words.after]) for ids in chunks]
        different, places = torch.cat(text).unique(return_inverse=True)
        padded = F.pad(different, (0, -len(different) % _AT_ONCE))  # so a word is the same in any table
        directions = torch.cat([self.words.directions(some) for some in padded.split(_AT_ONCE)])[: len(different)]
        gains = self.log_gain.exp()[:, None]
        words = (gains[:2] * directions[:, None]).flatten(0, 1)
        end = gains[2] * self.words.directions(different.new_tensor([self.words.end]))
        table = torch.cat([words, end, torch.zeros_like(end)])
        own = 2 * places[:, None] + torch.tensor([0, 1, 0, 0])
        own[:, 2], own[:, 3] = len(words), len(words) + 1
        counts = [len(ROLES) * len(one) for one in text]
        return [SharedRows(self.module, table, rows) for rows in own.flatten().to(torch.int32).split(counts)]

    def described(self) -> str:
        """What it writes, in a few words."""
        layers = " and ".join(map(str, self.config.row_layers))
        return f"{len(ROLES)} rows a token on {self.module} of layers {layers}"

    def row_sizes(self, module: str) -> tuple[int, int]:
        """Lengths of the rows of A, which are codes, and of B."""
        return self.config.latent_size, self.config.d_out[module]

    def place_of(self, path: str) -> str:
        """The path of a module in the base model, with the numbers of the layers that read rows for {layer}."""
        return path.replace("{layer}", ",".join(map(str, self.config.row_layers)))

    def rows_of(self, n_tokens: int) -> slice:
        """The rows of the text of a chunk of `n_tokens`, its chat wrapping counted."""
        n = len(ROLES)
        return slice(n * self.words.before, n * (n_tokens - self.words.after))

    def bias(self) -> None:
        """None: there is no bias block."""


def _places(mask: Tensor, like: Tensor) -> Tensor:
    """[n, T, d] sines and cosines of each token's number in its chunk (Vaswani et al. 2017, arXiv 1706.03762)."""
    places = (mask.cumsum(1) - 1).clamp_min(0).to(like)
    rates = torch.exp(torch.arange(0, like.shape[-1], 2, device=like.device) * (-math.log(2000.0) / like.shape[-1]))
    angles = places.unsqueeze(-1) * rates
    return torch.cat([angles.sin(), angles.cos()], -1)[..., : like.shape[-1]]


class Words:
    """The directions that write a base model's tokens, and the chat wrapping around chunks."""

    def __init__(self, base_model: nn.Module, tokenizer):
        body = decoder_body(base_model)
        self.tokenizer = tokenizer
        self._embeddings = base_model.get_output_embeddings().weight.detach()
        self._final = getattr(body, final_norm_name(base_model)).weight.detach().float()
        self._mean, covariance = self._moments()
        ridge = _RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), device=covariance.device)
        self._telling = torch.linalg.inv(covariance + ridge)
        self.end = stop_ids(tokenizer)[0]
        self.before, self.after = map(len, chat_affixes(tokenizer))

    @cached_property
    def _alike(self) -> Tensor:
        """[vocabulary]: for each token the first one with the same text."""
        first: dict[str, int] = {}
        alike = torch.arange(len(self._embeddings))
        for token in range(min(len(self._embeddings), len(self.tokenizer))):
            text = self.tokenizer.decode([token]).strip().lower()
            if text and _BROKEN not in text:
                alike[token] = first.setdefault(text, token)
        return alike

    def alike(self, tokens: Tensor) -> Tensor:
        """[...]: equal numbers for tokens [...] of one text, capitals and spaces around it left aside."""
        return self._alike.to(tokens.device)[tokens]

    def standing_in(self, values: Tensor, tokens: Tensor) -> Tensor:
        """[n, T]: where rows with these values [T, d_out] write a token of the same text as each of tokens [n]."""
        alike, found = self._alike.to(tokens.device), torch.zeros(len(tokens), len(values), dtype=torch.bool)
        units = F.normalize(values.float(), dim=-1)
        for text in alike[tokens].unique():
            same = (self.directions((alike == text).nonzero()[:, 0]) @ units.T > _SAME).any(0)
            found[(alike[tokens] == text).cpu()] = same.cpu()
        return found.to(values.device)

    def directions(self, tokens: Tensor) -> Tensor:
        """[..., d_out] unit directions that write these tokens [...]."""
        return F.normalize((self._embeddings[tokens].float() * self._final - self._mean) @ self._telling, dim=-1)

    def _moments(self) -> tuple[Tensor, Tensor]:
        """(mean [d_out], covariance [d_out, d_out]) of all tokens' embeddings times the final norm's weight."""
        size, parts = len(self._embeddings), [part.float() * self._final for part in self._embeddings.split(8192)]
        mean = sum(part.sum(0) for part in parts) / size
        return mean, sum((part - mean).T @ (part - mean) for part in parts) / size

    def tokens(self, input_ids: Tensor) -> Tensor:
        """[..., 3]: what the rows of words of each token [...] write."""
        return torch.stack([input_ids, input_ids, torch.full_like(input_ids, self.end)], dim=-1)
