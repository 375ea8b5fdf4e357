"""Follow one generation through its passes: a state of earlier tokens goes along with the cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_NOT_FOLLOWED = (
    "{}: this reading follows one generation, from its empty cache on and one token at a time (nothing assisted, no "
    "prompt in parts; read='sum', where there is one, has no such limit)"
)


class Followed:
    """What a reading keeps of earlier tokens. It starts anew with each pass that has an empty cache (or none).

    before: tokens that the cache holds. length: and with those of the pass.
    """

    before: int = 0
    length: int = 0
    cache: Any = None

    def begin(self, arguments: dict[str, Any]) -> None:
        """Called before each pass with the decoder's keyword arguments.

        RuntimeError where the cache is not the one that the last pass left: it was cut, or holds a prompt of before.
        """
        cache = arguments.get("past_key_values")
        self.before = 0 if cache is None else int(cache.get_seq_length())
        if self.before == 0:
            self.start()
            if cache is not None and cache is not self.cache:
                self._follow(cache)
        elif self.before != self.length:
            raise RuntimeError(_NOT_FOLLOWED.format(f"the cache holds {self.before} tokens, {self.length} were read"))

    def start(self) -> None:
        """Forget what was before."""
        raise NotImplementedError

    def exchange(self, chosen: list[int]) -> None:
        """Row i of the batch goes on from row chosen[i]."""
        raise NotImplementedError

    def take(self, tokens: int) -> None:
        """Count the tokens of this pass; RuntimeError for several that come after a cache."""
        self.length = self.before + tokens
        if self.before and tokens > 1:
            raise RuntimeError(_NOT_FOLLOWED.format(f"{tokens} tokens come after a cache of {self.before}"))

    def _follow(self, cache) -> None:
        """Lets beam search exchange rows of the state along with those of the cache."""
        self.cache, exchange = cache, cache.reorder_cache

        def exchange_both(chosen: Tensor) -> None:
            exchange(chosen)
            if cache is self.cache:
                self.exchange(chosen.tolist())

        cache.reorder_cache = exchange_both


def rows_of(rows: Tensor | None, context: int, batch: int) -> list[int]:
    """The rows of a batch that adapter `context` answers; rows: the adapter of each (None: one for all).

    Several rows of the batch for an entry of `rows` are beams or samples; ValueError where that does not come out even.
    """
    if rows is None:
        return list(range(batch))
    if batch % len(rows):
        raise ValueError(f"a batch of {batch} rows does not fit adapters for {len(rows)} rows: pass rows=")
    each = rows.repeat_interleave(batch // len(rows)).tolist()
    return [row for row, its in enumerate(each) if its == context]
