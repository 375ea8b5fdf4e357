"""A learned router: a small network that reads how blocks respond to a question, and chooses the blocks, or none.

All that it reads comes of one pass of the question with the bias alone. For block k and token t of the prompt, row i of
the block in layer l gives two numbers,

    a = A_kli . x_l(t)    how its key responds to the token; x_l: the input of layer l's target linear
    b = B_kli . e(t)      how much it writes the token; e: the token's output embedding, centred, of unit length

and with the numbers of all rows as v(k, t):

    h(k, t)  = gelu(W v(k, t) + w)
    z(k)     = gelu(U [h at the last token; the largest of h; their mean, with learned weights over the tokens; g] + u)
    score(k) = p . z(k) + c       verdict(k) = q . z(k) + d       none = m . g + n
    g        = [log p of the base model's refusal, of "Yes" and of "No"; log n_l at the last token]

where n_l is what the null block answers there (see `reading`). The block of the highest score answers if that is above
`none`. So a block's odds against none do not depend on what else is inside: to add or remove others changes the answer
only where one of them is chosen. Latent query i writes row i of every block, so a row means the same in all of them:
the network needs no more than these responses, and 35,000 weights for `tiny/qa`.

A block says a value; it compares nothing. A question that the base model would answer with "Yes" or "No" states a value
of its own, and the verdict tells whether the block says that value: its rows write the question's words, or they do
not. It goes into the answer as one more row of the chosen block (see `with_verdict`), so the model itself says it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2l_lib.adapter import Block

CANDIDATES = 32  # blocks that are compared in all layers, those that respond most in the last one
_LEAST_LOG = -12.0  # of a probability: below, it makes no difference
_TINY = 1e-3  # of responses, which are around 1
FAR = -1e4  # what is not there
_STRENGTH = 40.0  # length of what a verdict adds to the residual stream, where lengths are some hundreds


@dataclass(frozen=True)
class RouterConfig:
    """Sizes of a router, and what the base model says.

    n_layers, rank, d_out: of the blocks. width: of the network's layers.
    refusal: what the base model says when it does not know. verdicts: its words for yes and no.

    ValueError for sizes below 1.
    """

    n_layers: int
    rank: int
    d_out: int
    width: int
    refusal: str
    verdicts: tuple[str, str] = ("Yes", "No")

    def __post_init__(self):
        if min(self.n_layers, self.rank, self.d_out, self.width) < 1 or len(self.verdicts) != 2:
            raise ValueError(f"a router has sizes of at least 1 and two verdicts: {self}")


@dataclass(frozen=True)
class Responses:
    """What a router reads of one question of T tokens and K blocks.

    rows: [K, T, 2 * n_layers * rank], a of all layers, then b. null: n [n_layers] at the last token.
    log_probs: [3], of the first tokens of a refusal and of the two verdicts, with the bias alone.
    """

    rows: Tensor
    null: Tensor
    log_probs: Tensor


class Router(nn.Module):
    """See the module's text."""

    def __init__(self, config: RouterConfig):
        super().__init__()
        self.config, width = config, config.width
        size = 2 * config.n_layers * config.rank
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("deviation", torch.ones(size))
        self.register_buffer("centre", torch.zeros(config.d_out))
        self.token = nn.Linear(size, width)
        self.attention = nn.Linear(width, 1)
        self.block = nn.Linear(3 * width + 3 + config.n_layers, width)
        self.score = nn.Linear(width, 1)
        self.verdict = nn.Linear(width, 1)
        self.none = nn.Linear(3 + config.n_layers, 1)

    def forward(self, asked: Sequence[Responses]) -> tuple[Tensor, Tensor]:
        """(scores [n, 1 + K], the first of no block; verdicts [n, K]) of n questions with at most K blocks.

        A score is -1e4 where a question has fewer blocks.
        """
        rows, here, said = _padded(asked)
        h = F.gelu(self.token((rows - self.mean) / self.deviation))
        absent = ~said[:, None, :, None]
        weights = self.attention(h).masked_fill(absent, FAR).softmax(2)
        over_tokens = [h[:, :, -1], h.masked_fill(absent, FAR).amax(2), (weights * h).sum(2)]
        g = torch.stack([torch.cat([one.log_probs.clamp_min(_LEAST_LOG), one.null.log()]) for one in asked]).float()
        z = F.gelu(self.block(torch.cat([*over_tokens, g.unsqueeze(1).expand(*h.shape[:2], -1)], -1)))
        return torch.cat([self.none(g), self.score(z)[..., 0].masked_fill(~here, FAR)], 1), self.verdict(z)[..., 0]

    def directions(self, embeddings: Tensor) -> Tensor:
        """e [..., d_out] of output embeddings times the final norm's weight [..., d_out]."""
        return F.normalize(embeddings.float() - self.centre, dim=-1)

    def always_open(self) -> Router:
        """A copy that never chooses none."""
        router = copy.deepcopy(self)
        router.none.weight.data.zero_()
        router.none.bias.data.fill_(FAR)
        return router

    def measure(self, asked: Sequence[Responses]) -> None:
        """Take over mean and deviation of the rows' responses in these questions."""
        rows = torch.cat([one.rows.float().flatten(0, 1) for one in asked])
        self.mean.copy_(rows.mean(0))
        self.deviation.copy_(rows.std(0).clamp_min(_TINY))

    def states(self, log_probs: Tensor) -> bool:
        """Whether a question with these log-probabilities (see `Responses`) states what is to be judged."""
        return bool(log_probs[1:].exp().sum() > 0.5)


def _padded(asked: Sequence[Responses]) -> tuple[Tensor, Tensor, Tensor]:
    """(v [n, K, T, rows], prompts to the right; blocks that are there [n, K]; tokens that are there [n, T])."""
    K, T = (max(1, *(one.rows.shape[side] for one in asked)) for side in (0, 1))
    beyond = [(K - one.rows.shape[0], T - one.rows.shape[1]) for one in asked]
    rows = [F.pad(one.rows.float(), (0, 0, t, 0, 0, k)) for one, (k, t) in zip(asked, beyond, strict=True)]
    blocks, tokens = torch.tensor(beyond).T
    return torch.stack(rows), torch.arange(K) < K - blocks[:, None], torch.arange(T) >= tokens[:, None]


def with_verdict(block: Block, module: str, x: Tensor, direction: Tensor, scale: float, held: int) -> Block:
    """This block with one more row, which the question's own x finds: it adds `direction` to the residual stream.

    x: [d_in], the input of the last layer's linear at the last token, the question's own key, of |A x| = 1 there.
    direction: [d_out], of unit length. scale: the adapter's. held: the place of the last layer in the block.
    """
    A, B = (torch.zeros_like(side[module][:, :1]) for side in (block.A, block.B))
    A[held, 0] = (x / x.square().sum().clamp_min(_TINY)).to(A)
    B[held, 0] = (_STRENGTH / (scale * block.weight) * direction).to(B)
    return replace(
        block,
        A=block.A | {module: torch.cat([block.A[module], A], 1)},
        B=block.B | {module: torch.cat([block.B[module], B], 1)},
    )
