"""A hypernetwork that pools a chunk's token rows into rank-r blocks of the published form.

    y = W x + s * B^T (A x)    in the last layers of the base model, all rows added: a plain LoRA

Adapters hold these layers alone: no zeros of others are kept, and no product of zeros is taken.

Written words and what looks for them are those of token rows (`token_rows`), so mixing layers that were trained there
can be taken over. A Perceiver's latents, r for each written layer, read the mixed states of the chunk's tokens. Latent
i then chooses among 3 rows a token, one for each role of a written word:

    share_i = softmax over tokens t and roles k of temperature * (Q_k z_i) . (K c_kt)
    b_i = gain of its layer * sum over (t, k) of share_i(t, k) * direction of the word
    a_i = sum over (t, k) of share_i(t, k) * (keys c_kt)  +  free_keys z_i,  less the mean of its layer's r rows

A softmax over scores a_i x does not change when all of them move alike. So where rows have learned by a softmax which
of them a token should read, their keys less the mean say the same to a sum, in which the vocabulary's softmax chooses.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2l_lib.hypernetwork import BlockWriter, HypernetworkConfig, Loras, zero_padding
from d2l_lib.token_rows import WORD_ROLES, TokenStates

_HEAD = 64  # numbers of an attention head


class PooledRows(TokenStates, BlockWriter):
    """Hidden states of n chunks -> blocks of rank r for the L written layers (see the module's text).

    `prepare` tells it the base model's words before the first `forward`; `pooled` needs none.
    """

    def __init__(self, config: HypernetworkConfig):
        super().__init__(config)
        if len(config.modules) != 1:
            raise ValueError(f"pooled rows are for one module, not for {', '.join(config.modules)}")
        if config.pooled_size % _HEAD:
            raise ValueError(f"pooled_size {config.pooled_size} must be a multiple of {_HEAD}")
        (self.module,) = config.modules
        L, r, d, roles = len(config.written_layers), config.rank, config.pooled_size, len(WORD_ROLES)
        d_in, d_out = config.d_in[self.module], config.d_out[self.module]
        options = {"activation": "gelu", "batch_first": True, "norm_first": True, "dropout": 0.0}
        self.pool_project = nn.Linear(config.feature_size + config.latent_size, d)
        self.pool_mixer = nn.TransformerEncoderLayer(d, d // _HEAD, 2 * d, **options)
        self.pool_norm = nn.RMSNorm(d)
        self.roles = nn.Linear(d, roles * d)
        self.latents = nn.Parameter(torch.randn(L * r, d))
        self.perceiver = nn.ModuleList(
            nn.TransformerDecoderLayer(d, d // _HEAD, 2 * d, **options) for _ in range(config.pooled_blocks)
        )
        self.latent_norm = nn.RMSNorm(d)
        self.query = nn.Linear(d, roles * d)
        self.key = nn.Linear(d, d, bias=False)
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.keys = nn.Parameter(torch.zeros(L, d, d_in))
        self.free_keys = nn.Parameter(torch.zeros(L, d, d_in))
        self.log_gain = nn.Parameter(torch.zeros(L))
        self.bias_A = nn.Parameter(torch.randn(L, r, d_in) / math.sqrt(d_in))
        self.bias_B = nn.Parameter(torch.zeros(L, r, d_out))

    def pooled(self, features: Tensor, mask: Tensor, mixed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(a [n, L, r, d_in], share [n, L * r, 3 T], c [n, 3 T, d]) of features [n, T, F]; mask: True at the text."""
        raw = ((features - self.feature_mean) / self.feature_scale).clamp(-8, 8)
        mixed = self.states(features, mask) if mixed is None else mixed
        states = self.pool_project(torch.cat([raw, mixed], -1))
        states = self.pool_norm(self.pool_mixer(states, src_key_padding_mask=~mask))
        d, roles, L = states.shape[-1], len(WORD_ROLES), len(self.config.written_layers)
        c = F.rms_norm(self.roles(states).unflatten(-1, (roles, d)), (d,)).flatten(1, 2)  # [n, 3 T, d]
        z = self.latents.expand(len(features), -1, -1)
        for block in self.perceiver:
            z = block(z, states, memory_key_padding_mask=~mask)
        z = self.latent_norm(z)
        queries = self.query(z).unflatten(-1, (roles, d))
        of_role = self.key(c).unflatten(1, (-1, roles))
        scores = torch.einsum("nskd,ntkd->nstk", queries, of_role) * self.temperature / math.sqrt(d)
        share = scores.masked_fill(~mask[:, None, :, None], -torch.inf).flatten(2).softmax(-1)
        found, z = (share @ c).unflatten(1, (L, -1)), z.unflatten(1, (L, -1))
        a = torch.einsum("nlrd,ldi->nlri", found, self.keys) + torch.einsum("nlrd,ldi->nlri", z, self.free_keys)
        return a - a.mean(2, keepdim=True), share, c

    def values(self, share: Tensor, words: Tensor) -> Tensor:
        """b [n, L, r, d_out] of shares [n, L * r, 3 T] of words [n, T, 3]."""
        b = share @ self.words.directions(words.flatten(1))
        return b.unflatten(1, (len(self.log_gain), -1)) * self.log_gain.exp()[:, None, None]

    def forward(self, features: Tensor, attention_mask: Tensor, input_ids: Tensor, iterative: bool = False) -> Loras:
        """{module: (A [n, L, r, d_in], B [n, L, r, d_out])}.

        features: [n, T, F]. attention_mask: [n, T], 0 at padding on the right. input_ids: [n, T], chat wrapping
        included. iterative: few layers are written, so it changes nothing.

        RuntimeError before `prepare`; ValueError without text.
        """
        features, _ = zero_padding(features, attention_mask)
        own = self.text(attention_mask)
        a, share, _ = self.pooled(features.to(self.pool_project.weight.dtype), own)
        b = self.values(share, self.words.tokens(input_ids))
        return {self.module: (a, b)}

    def described(self) -> str:
        """What it writes, in a few words."""
        return f"rank {self.config.rank} on {self.module} of layers {', '.join(map(str, self.config.written_layers))}"

    def bias(self) -> Loras:
        """The block of no document: {module: (A [L, r, d_in], B [L, r, d_out])}."""
        return {self.module: (self.bias_A, self.bias_B)}

    def null(self) -> None:
        """None: a plain sum is not read sparsely."""
