"""The one padding and the one answer loop: token ids in, side by side, and what a model writes after them out.

prompts (token ids) -> pad_rows -> generate (transformers' own, greedy) -> texts: greedy_texts
                                -> TransformersEngine.reply -> token ids with their largest log-probabilities
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from d2l_lib.base_model import input_device, window_of
from d2l_lib.documents import stop_ids, tokenizer_fingerprint
from d2l_lib.lora import without_lora

TOP_K = 16  # log-probabilities that are kept of each token
_NEIGHBOURS = 4  # so many groups back a prompt finds others that begin alike
Prompts = Sequence[Sequence[int]]  # token ids


# --- padding --------------------------------------------------------------------------------------------------------


def pad_rows(
    rows: Sequence[Sequence[int]], value: int, *, side: str = "right", width: int | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of ids as (ids [n, T], mask [n, T]), filled up with `value` on one side; the mask is 0 there.

    width: T (None: the longest row). An empty row is padding and nothing else.
    """
    width = max(map(len, rows)) if width is None else width
    ids, mask = torch.full((len(rows), width), value), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place] = torch.as_tensor(row, dtype=torch.long)
        mask[index, place] = 1
    return ids, mask


def pad_id_of(tokenizer) -> int:
    """An id to pad with; it is always masked, so any will do."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


# --- greedy texts ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(model: nn.Module, tokenizer, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any):
    """transformers' `generate` from a fresh configuration: greedy, one answer a row, ending at the tokenizer's stops.

    Nothing of the model's own generation settings counts, and none is changed; `options` are the caller's, as in
    transformers (generation_config= included: its unset fields stay fresh). Nothing is compiled, as compiled code would
    miss an adapter. ValueError for a custom_generate by name, which would run code from the hub.
    """
    if isinstance(options.get("custom_generate"), str) or options.pop("trust_remote_code", None):
        raise ValueError("a custom_generate from the hub is code of others, which is not run here: pass a function")
    stops = stop_ids(tokenizer)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        eos_token_id=stops or None,
        pad_token_id=pad_id_of(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        disable_compile=True,
    )
    chosen = options.pop("generation_config", None)
    if chosen is not None:
        fields = vars(GenerationConfig())
        config.update(**{k: v for k, v in chosen.to_dict().items() if k in fields and v is not None})
    others = config.update(**options)
    # transformers fills up unset fields from `model.generation_config` and leaves marks on the model: both on a copy of
    # the outer object, whose modules are the model's own.
    alone = copy.copy(model)
    alone.generation_config = GenerationConfig()
    return alone.generate(input_ids, attention_mask=attention_mask, generation_config=config, **others)


def greedy_texts(model: nn.Module, tokenizer, prompts: Prompts, limits: Sequence[int]) -> list[str]:
    """The greedy answer to each prompt, in one batch: of at most `limits[i]` tokens, without the end of the turn."""
    ids, mask = pad_rows(prompts, pad_id_of(tokenizer), side="left")
    device, stops = input_device(model), stop_ids(tokenizer)
    whole = generate(model, tokenizer, ids.to(device), mask.to(device), max_new_tokens=max(limits))
    texts = []
    for row, limit in zip(whole[:, ids.shape[1] :].tolist(), limits, strict=True):
        end = next((place for place, token in enumerate(row) if token in stops), len(row))
        texts.append(tokenizer.decode(row[: min(end, limit)], skip_special_tokens=True).strip())
    return texts


# --- answers with their log-probabilities ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """What a model wrote: token ids (the stop token last, if `finished`), and for each of them the k largest
    log-probabilities (values float16, largest first, and indices int32, both [tokens, k]).
    """

    ids: list[int]
    finished: bool
    values: np.ndarray
    indices: np.ndarray

    @classmethod
    def rounded(cls, ids: list[int], finished: bool, values: np.ndarray, indices: np.ndarray) -> Reply:
        """A reply of wider numbers; those below float16 become its smallest (their probability is 0 all the same)."""
        lowest = np.finfo(np.float16).min
        return cls(ids, finished, np.maximum(values, lowest).astype(np.float16), indices.astype(np.int32))


class TransformersEngine:
    """Batched generation with a KV cache, on whatever device the model is.

    The log-probabilities are the model's own, at temperature 1 and before any selection, also where the answer is
    sampled. An adapter that is applied to the model at the time is ignored.
    """

    def __init__(self, name: str, model, tokenizer, batch_tokens: int = 16384):
        self.name, self.model, self.tokenizer, self.batch_tokens = name, model, tokenizer, batch_tokens
        self.stops = stop_ids(tokenizer)
        self.window = window_of(model)

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
            for g in reversed(range(max(0, len(groups) - _NEIGHBOURS), len(groups))):
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
        ids, mask = self._padded([prompt[n:] for prompt, n in zip(prompts, begin, strict=True)])
        limits = [min(max_new_tokens, self.window - len(prompt)) for prompt in prompts]
        limit, stops = torch.tensor(limits, device=device), torch.tensor(self.stops, device=device)
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        cache, tokens, values, indices = None, [], [], []
        with without_lora(self.model):
            if longest_shared:
                starts = torch.tensor([0, *(rows for _, rows in shared)]).cumsum(0).tolist()
                heads = [prompts[start][:n] for start, (n, _) in zip(starts, shared, strict=False)]
                head_ids, head_mask = self._padded(heads)
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
            replies.append(Reply.rounded(tokens[row][:n], stop is not None, values[row, :n], indices[row, :n]))
        return replies

    def _padded(self, rows: Prompts) -> list[Tensor]:
        """ids and mask [rows, longest], filled up on the left, where the model is."""
        return [one.to(self.model.device) for one in pad_rows(rows, self.tokenizer.pad_token_id, side="left")]

    def _step(self, ids: Tensor, mask: Tensor, cache):
        """The model's output for the last columns of `mask`; positions of rows that are done stay in the window."""
        positions = (mask.cumsum(-1) - 1).clamp(0, min(self.window, 2**31) - 1)[:, -ids.shape[1] :]
        where = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        return self.model(input_ids=ids, **where, use_cache=True, logits_to_keep=1)
