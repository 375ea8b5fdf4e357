"""TODO docstring."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2l_lib.documents import stop_ids
from d2l_lib.formats.shards import tokenizer_fingerprint
from d2l_lib.lora import without_lora


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, side: str, width: int | None = None) -> tuple[Tensor, Tensor]:
    """(ids [n, T], mask [n, T]) of rows of token ids, filled up on the left or right to `width` (None: to the longest);
    mask 0 there.
    """
    width = max(map(len, rows)) if width is None else width
    ids, mask = torch.full((len(rows), width), pad_id), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return ids, mask


TOP_K = 16


NEIGHBOURS = 4  # so many groups back a prompt finds others that begin alike


Prompts = Sequence[Sequence[int]]  # token ids


@dataclass(frozen=True)
class Reply:
    """What a model wrote: token ids (the stop token last, if `finished`), and for each of them the k largest
    log-probabilities (values float16, largest first, and indices int32, both [tokens, k]).
    """

    ids: list[int]
    finished: bool
    values: np.ndarray
    indices: np.ndarray


class TransformersEngine:
    """Batched generation with a KV cache, on whatever device the model is.

    The log-probabilities are the model's own, at temperature 1 and before any selection, also where the answer is
    sampled. An adapter that is applied to the model at the time is ignored.
    """

    def __init__(self, name: str, model, tokenizer, batch_tokens: int = 16384):
        self.name, self.model, self.tokenizer, self.batch_tokens = name, model, tokenizer, batch_tokens
        self.stops = stop_ids(tokenizer)
        self.window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf

    def facts(self) -> dict[str, Any]:
        """Name and fingerprints of the model and its tokenizer, for the manifest."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return {
            "engine": "transformers",
            "name": self.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "weights_sha256": digest.hexdigest(),
            "tokenizer_sha256": tokenizer_fingerprint(self.tokenizer),
        }

    def reply(self, prompts: Prompts, max_new_tokens: int, temperature: float, seed: int) -> list[Reply | None]:
        """A reply to each prompt (token ids), or None where a prompt fills the model's window.

        Greedy at temperature 0, else sampled with `seed`. Of at most `max_new_tokens`, and never beyond the window.
        FloatingPointError when the model gives values that are not numbers.
        """
        replies: list[Reply | None] = [None] * len(prompts)
        generator = torch.Generator().manual_seed(seed)
        groups = self._groups(prompts, max_new_tokens)
        # shared and lone prompts apart: side by side, each would be padded by the longest of both parts
        waiting = sorted(groups, key=lambda group: (group[0] > 0, max(len(prompts[i]) for i in group[1])))
        while waiting:
            batch = [waiting.pop()]
            while waiting and (waiting[-1][0] > 0) == (batch[0][0] > 0):
                if self._positions(prompts, [*batch, waiting[-1]], max_new_tokens) > self.batch_tokens:
                    break
                batch.append(waiting.pop())
            order = [i for _, places in batch for i in places]
            shared = [(n, len(places)) for n, places in batch]
            written = self._generate([prompts[i] for i in order], shared, max_new_tokens, temperature, generator)
            for i, reply in zip(order, written, strict=True):
                replies[i] = reply
        return replies

    def _positions(self, prompts: Prompts, batch: Sequence[tuple[int, list[int]]], max_new_tokens: int) -> int:
        """Places in the cache, padding included, of groups (see _groups) that are generated together."""
        head = max(n for n, _ in batch)
        rest = max(len(prompts[i]) - n for n, places in batch for i in places)
        return sum(len(places) for _, places in batch) * (head + rest + max_new_tokens)

    def _groups(self, prompts: Prompts, max_new_tokens: int) -> list[tuple[int, list[int]]]:
        """(n, places) of near prompts that begin with the same n tokens, so that a document is read once for all of its
        questions. What is shared is at least half of each prompt; n is 0 for one that is alone, and everywhere in
        models with sliding windows, which would count the padding between the two parts.

        No group takes more than `batch_tokens`; prompts that fill the model's window are left out.
        """
        config = self.model.config.get_text_config()
        types = getattr(config, "layer_types", None) or ["sliding_attention"] * bool(
            getattr(config, "sliding_window", None)
        )
        slides = any(kind != "full_attention" for kind in types)
        groups: list[tuple[int, list[int]]] = []
        for i, ids in enumerate(prompts):
            if len(ids) >= self.window:
                continue
            for g in reversed(range(max(0, len(groups) - NEIGHBOURS), len(groups))):
                n, places = groups[g]
                first = prompts[places[0]]
                most = min(n or len(first) - 1, len(ids) - 1)
                common = next((j for j in range(most) if first[j] != ids[j]), most)
                group = (common, [*places, i])
                fits = self._positions(prompts, [group], max_new_tokens) <= self.batch_tokens
                if not slides and fits and 2 * common >= max(len(first), len(ids)):
                    groups[g] = group
                    break
            else:
                groups.append((0, [i]))
        return groups

    @torch.inference_mode()
    def _generate(
        self,
        prompts,
        shared: Sequence[tuple[int, int]],
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator,
    ) -> list[Reply]:
        """Replies to prompts; shared: (n, rows) says that the next `rows` of them begin with the same n tokens."""
        device, longest_shared = self.model.device, max(n for n, _ in shared)
        begin = [n for n, rows in shared for _ in range(rows)]
        ids, mask = _left_padded([prompt[n:] for prompt, n in zip(prompts, begin, strict=True)], self.tokenizer, device)
        limits = [min(max_new_tokens, self.window - len(prompt)) for prompt in prompts]
        limit, stops = torch.tensor(limits, device=device), torch.tensor(self.stops, device=device)
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        cache, tokens, values, indices = None, [], [], []
        with without_lora(self.model):
            if longest_shared:
                starts = torch.tensor([0, *(rows for _, rows in shared)]).cumsum(0).tolist()
                heads = [prompts[start][:n] for start, (n, _) in zip(starts, shared, strict=False)]
                head_ids, head_mask = _left_padded(heads, self.tokenizer, device)
                repeats = torch.tensor([rows for _, rows in shared], device=device)
                place = torch.arange(len(shared), device=device).repeat_interleave(repeats)
                cache = self._step(head_ids, head_mask, None).past_key_values
                cache.batch_select_indices(place)
                mask = torch.cat([head_mask[place], mask], 1)
            while not done.all():
                output = self._step(ids, mask, cache)
                cache = output.past_key_values
                log_probs = output.logits[:, -1].float().log_softmax(-1)  # [rows, vocabulary]
                top = log_probs.topk(TOP_K)
                chosen = top.indices[:, 0]
                if temperature > 0:
                    probabilities = (log_probs / temperature).softmax(-1).cpu()
                    chosen = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(device)
                tokens.append(chosen)
                values.append(top.values)
                indices.append(top.indices)
                done |= torch.isin(chosen, stops) | (len(tokens) >= limit)
                ids, mask = chosen[:, None], torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
        tokens = torch.stack(tokens, 1).tolist()
        values, indices = (torch.stack(steps, 1).cpu().numpy() for steps in (values, indices))
        if np.isnan(values).any():
            raise FloatingPointError(f"{self.name} gives log-probabilities that are not numbers: use another dtype")
        replies = []
        for row, most in enumerate(limits):
            stop = next((i for i, token in enumerate(tokens[row][:most]) if token in self.stops), None)
            n = most if stop is None else stop + 1
            replies.append(_reply(tokens[row][:n], stop is not None, values[row, :n], indices[row, :n]))
        return replies

    def _step(self, ids: torch.Tensor, mask: torch.Tensor, cache):
        """The model's output for the last columns of `mask`; positions of rows that are done stay in the window."""
        positions = (mask.cumsum(-1) - 1).clamp(0, min(self.window, 2**31) - 1)[:, -ids.shape[1] :]
        where = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        return self.model(input_ids=ids, **where, use_cache=True, logits_to_keep=1)


def _left_padded(rows: Prompts, tokenizer, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) [rows, longest]; an empty row is padding and nothing else."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, prompt in enumerate(rows):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _reply(ids: list[int], finished: bool, values: np.ndarray, indices: np.ndarray) -> Reply:
    """Log-probabilities below the range of float16 become its smallest number (their probability is 0 all the same)."""
    lowest = np.finfo(np.float16).min
    return Reply(ids, finished, np.maximum(values, lowest).astype(np.float16), indices.astype(np.int32))
