"""The one padding and the one answer loop: prompts of token ids in, a model's continuations out.

prompts (token ids) -> pad_rows -> generate (transformers' own, greedy) -> texts: greedy_texts
                                -> TransformersEngine.reply -> token ids with their largest log-probabilities

In `reply` a document is read once for its questions. Guesses at the answers, where they are at hand, are checked by
`packed` in one pass. What they do not find is answered token by token: new tokens find room in the cache, and finished
rows leave their batch. On a CPU no bit of any answer changes by their leaving: in products of four rows or more, no row
depends on how many there are. Another padding does change bits, so rows of other batches do not come in.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from d2l_lib.base_model import input_device, window_of
from d2l_lib.documents import stop_ids, tokenizer_fingerprint
from d2l_lib.lora import without_lora
from d2l_lib.packed import Guessing, can_pack

TOP_K = 16  # log-probabilities kept of each token
_NEIGHBOURS = 4  # the last groups that a prompt is compared with
_FEWEST = 4  # rows that stay in a batch
_ROOM = 64  # tokens to come that a cache has room for
Prompts = Sequence[Sequence[int]]  # token ids


# --- padding --------------------------------------------------------------------------------------------------------


def pad_rows(
    rows: Sequence[Sequence[int]], value: int, *, side: str = "right", width: int | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of ids as (ids [n, T], mask [n, T]), padded with `value` on one side; the mask is 0 at padding.

    width: T (None: the longest row). An empty row is all padding.
    """
    width = max(map(len, rows)) if width is None else width
    ids, mask = torch.full((len(rows), width), value), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place] = torch.as_tensor(row, dtype=torch.long)
        mask[index, place] = 1
    return ids, mask


def pad_id_of(tokenizer) -> int:
    """An id to pad with; any will do, as it is always masked."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


# --- the cache ------------------------------------------------------------------------------------------------------


class _RoomyLayer(DynamicLayer):
    """A cache layer that writes new tokens into room beside the earlier ones; transformers' copies those every time.

    keys, values: views of the used part. What other methods put in their place is copied into new room.
    """

    def __init__(self, layer: DynamicLayer):
        """layer: of transformers, with tokens in it."""
        super().__init__()
        super().lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self._rooms: dict[str, tuple[Tensor, Tensor]] = {}  # the whole room, and the view of its used part

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, with these new ones [rows, heads, tokens, size]."""
        for name, new in (("keys", key_states), ("values", value_states)):
            old = getattr(self, name)
            start, end = old.shape[-2], old.shape[-2] + new.shape[-2]
            room, used = self._rooms.get(name, (None, None))
            if used is not old or end > room.shape[-2]:
                room = _room_for(old, len(old), new.shape[-2])
                room[..., :start, :] = old
            room[..., start:end, :] = new
            self._keep(name, room, end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i becomes row indices[i]: in place where the last rows take the places of others."""
        rows = len(indices)
        moved = (indices != torch.arange(rows, device=indices.device)).nonzero()[:, 0]
        from_end = bool((indices[moved] >= rows).all())
        for name in ("keys", "values"):
            old = getattr(self, name)
            room, used = self._rooms.get(name, (None, None))
            if used is old and from_end:
                room = room[:rows]
                old[moved] = old[indices[moved]]
            else:
                room = _room_for(old, rows)
                torch.index_select(old, 0, indices, out=room[..., : old.shape[-2], :])
            self._keep(name, room, old.shape[-2])

    def _keep(self, name: str, room: Tensor, length: int) -> None:
        used = room[..., :length, :]
        self._rooms[name] = room, used
        setattr(self, name, used)


def _room_for(states: Tensor, rows: int, tokens: int = 0) -> Tensor:
    """An empty tensor for these states [.., heads, length, size] of so many rows, `tokens` more, and some of later."""
    heads, length, size = states.shape[1:]
    return states.new_empty(rows, heads, length + tokens + _ROOM, size)


def _with_room(cache: Cache) -> Cache:
    """The cache, with room in each layer of whole attention."""
    for place, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer) is DynamicLayer and layer.get_seq_length():
            cache.layers[place] = _RoomyLayer(layer)
    return cache


def _may_leave(cache: Any) -> bool:
    """Whether rows of this cache can be left out: not those of recurrent layers, nor of a model's own cache."""
    layers = getattr(cache, "layers", ())
    return len(layers) > 0 and all(isinstance(layer, DynamicLayer) for layer in layers)


def _staying(done: Sequence[bool], padded: Sequence[bool]) -> list[int]:
    """The places of the rows that stay, in their order to come: the last ones take the places of those that leave.

    done, padded: of each row.

    All rows that are not done stay. Some of the others do too, so that numbers stay what they are in the whole batch,
    to the last bit: at least _FEWEST rows (products of fewer go another way), and a padded one if there is any (a batch
    without padding needs no mask).
    """
    ranked = sorted(range(len(done)), key=lambda row: (done[row], not padded[row]))
    n = done.count(False)
    if any(padded) and not any(padded[row] for row in ranked[:n]):
        n += 1
    chosen = set(ranked[: max(n, min(_FEWEST, len(done)))])
    late = [row for row in sorted(chosen) if row >= len(chosen)]
    return [row if row in chosen else late.pop() for row in range(len(chosen))]


# --- greedy texts ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(model: nn.Module, tokenizer, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any):
    """transformers' `generate` from a fresh configuration: greedy, one answer a row, ending at the tokenizer's stops.

    options: as in transformers, generation_config= included (its unset fields stay fresh).

    The model's own generation settings do not count and do not change. Nothing is compiled: compiled code would miss an
    adapter. ValueError for a custom_generate by name, which would run code from the hub.
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
    # transformers fills unset fields from `model.generation_config` and leaves marks on the model. This copy of the
    # outer object takes both; its modules are the model's own.
    alone = copy.copy(model)
    alone.generation_config = GenerationConfig()
    return alone.generate(input_ids, attention_mask=attention_mask, generation_config=config, **others)


def greedy_texts(
    model: nn.Module,
    tokenizer,
    prompts: Prompts,
    limits: Sequence[int],
    stream: Callable[[str], None] | None = None,
) -> list[str]:
    """The greedy answer to each prompt, in one batch: at most `limits[i]` tokens, without the end of the turn.

    stream: for one prompt alone, called as stream(text so far) after each token.
    """
    ids, mask = pad_rows(prompts, pad_id_of(tokenizer), side="left")
    device = input_device(model)
    options = {} if stream is None else {"streamer": _Teller(tokenizer, stream)}
    whole = generate(model, tokenizer, ids.to(device), mask.to(device), max_new_tokens=max(limits), **options)
    rows = whole[:, ids.shape[1] :].tolist()
    return [_text_of(tokenizer, row[:limit]) for row, limit in zip(rows, limits, strict=True)]


def _text_of(tokenizer, ids: Sequence[int]) -> str:
    """The text of an answer's tokens up to the end of its turn."""
    stops = stop_ids(tokenizer)
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return tokenizer.decode(ids[:end], skip_special_tokens=True).strip()


class _Teller:
    """A streamer for transformers' `generate`, one prompt at a time: calls tell(text so far) after each new token.

    An error in `tell` ends the answer. A character whose bytes are not all there yet is left out.
    """

    def __init__(self, tokenizer, tell: Callable[[str], None]):
        self._tokenizer, self._tell = tokenizer, tell
        self._ids: list[int] | None = None  # None until the prompt has come

    def put(self, ids: Tensor) -> None:
        if self._ids is None:
            self._ids = []
            return
        self._ids += ids.reshape(-1).tolist()
        self._tell(_text_of(self._tokenizer, self._ids).rstrip("\ufffd"))

    def end(self) -> None:
        """The last token has come."""


# --- answers with their log-probabilities ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """A model's answer as token ids, with the k largest log-probabilities of each.

    ids: the stop token last, if `finished`.
    values, indices: [tokens, k], float16 (largest first) and int32.
    """

    ids: list[int]
    finished: bool
    values: np.ndarray
    indices: np.ndarray

    @classmethod
    def rounded(cls, ids: list[int], finished: bool, values: np.ndarray, indices: np.ndarray) -> Reply:
        """A reply from wider numbers; those below float16 become its smallest (their probability stays 0)."""
        lowest = np.finfo(np.float16).min
        return cls(ids, finished, np.maximum(values, lowest).astype(np.float16), indices.astype(np.int32))


class TransformersEngine:
    """Batched generation with a KV cache, on the model's device.

    The log-probabilities are the model's own: at temperature 1, before any selection, also of sampled answers. An
    adapter that is applied to the model is ignored.
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

    def reply(
        self, prompts: Prompts, max_new_tokens: int, temperature: float, seed: int, guesses: Prompts | None = None
    ) -> list[Reply | None]:
        """A reply to each prompt (token ids), or None for a prompt that fills the model's window.

        max_new_tokens: the longest reply; it never exceeds the window.
        temperature: 0 is greedy, others sample with `seed`.
        guesses: token ids of what each reply may be, without a stop token. Right ones make greedy replies on a CPU
            cheaper. No guess changes a reply's tokens, and log-probabilities change by rounding only.

        FloatingPointError if the model's values are not numbers.
        """
        replies: list[Reply | None] = [None] * len(prompts)
        generator = torch.Generator().manual_seed(seed)
        groups = self._groups(prompts, max_new_tokens)
        if guesses is not None and temperature == 0 and can_pack(self.model):
            for i, reply in self._guessed(prompts, groups, guesses, max_new_tokens).items():
                replies[i] = reply
            groups = self._groups(prompts, max_new_tokens, replies)
        # Shared and lone prompts go apart: together, both would be padded to the longest of both parts.
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

    def _guessed(self, prompts: Prompts, groups, guesses: Prompts, max_new_tokens: int) -> dict[int, Reply]:
        """{place: greedy reply} of those that a guess has found."""
        limits = [min(max_new_tokens, self.window - len(prompt)) for prompt in prompts]
        guessing = Guessing(self.model, prompts, guesses, limits=limits, stops=self.stops, k=TOP_K)
        with without_lora(self.model):
            guessing.run(groups, self.batch_tokens)
        replies = {}
        for i, answer in guessing.found.items():
            values, indices = np.concatenate(answer.values), np.concatenate(answer.indices)
            self._check_numbers(values)
            replies[i] = Reply.rounded(answer.ids, answer.ids[-1] in self.stops, values, indices)
        return replies

    def _check_numbers(self, values: np.ndarray) -> None:
        if np.isnan(values).any():
            raise FloatingPointError(f"{self.name} gives log-probabilities that are not numbers: use another dtype")

    def _positions(self, prompts: Prompts, batch: Sequence[tuple[int, list[int]]], max_new_tokens: int) -> int:
        """Cache positions, padding included, of a batch of groups (see `_groups`)."""
        head = max(n for n, _ in batch)
        rest = max(len(prompts[i]) - n for n, places in batch for i in places)
        return sum(len(places) for _, places in batch) * (head + rest + max_new_tokens)

    def _groups(
        self, prompts: Prompts, max_new_tokens: int, replies: Sequence[Reply | None] = ()
    ) -> list[tuple[int, list[int]]]:
        """(n, places) of nearby prompts that begin with the same n tokens: a document is read once for its questions.

        The shared tokens are at least half of each prompt. n is 0 for a lone prompt, and always in models with sliding
        windows, which would count the padding between the two parts. No group takes more than `batch_tokens`. Prompts
        that fill the model's window are left out, and those that have one of `replies`.
        """
        config = self.model.config.get_text_config()
        types = getattr(config, "layer_types", None) or ["sliding_attention"] * bool(
            getattr(config, "sliding_window", None)
        )
        slides = any(kind != "full_attention" for kind in types)
        groups: list[tuple[int, list[int]]] = []
        for i, ids in enumerate(prompts):
            if len(ids) >= self.window or (replies and replies[i] is not None):
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
        """Replies to prompts. shared: (n, rows) for each run of `rows` prompts that begin with the same n tokens.

        Finished rows leave the batch. Noise is drawn for all rows all the same: who leaves changes no other answer.
        """
        device = self.model.device
        begin = [n for n, rows in shared for _ in range(rows)]
        ids, mask = self._padded([prompt[n:] for prompt, n in zip(prompts, begin, strict=True)])
        limits = [min(max_new_tokens, self.window - len(prompt)) for prompt in prompts]
        limit, stops = torch.tensor(limits, device=device), torch.tensor(self.stops, device=device)
        here = torch.arange(len(prompts), device=device)  # the prompts in the batch
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        cache, steps = None, []
        with without_lora(self.model):
            if any(n for n, _ in shared):
                cache, head_mask = self._heads(prompts, shared)
                mask = torch.cat([head_mask, mask], 1)
            while not done.all():
                stay = _staying(done.tolist(), (mask == 0).any(1).tolist())
                if len(stay) < len(here) and _may_leave(cache):
                    stay = torch.tensor(stay, device=device)
                    here, done, ids, mask = here[stay], done[stay], ids[stay], mask[stay]
                    cache.batch_select_indices(stay)
                output = self._step(ids, mask, cache)
                cache = _with_room(output.past_key_values) if cache is None else cache
                log_probs = output.logits[:, -1].float().log_softmax(-1)  # [rows, vocabulary]
                top = log_probs.topk(TOP_K)
                chosen = top.indices[:, 0]
                if temperature > 0:
                    places = here.cpu()
                    probabilities = torch.ones(len(prompts), log_probs.shape[1])
                    probabilities[places] = (log_probs / temperature).softmax(-1).cpu()
                    chosen = torch.multinomial(probabilities, 1, generator=generator)[places, 0].to(device)
                steps.append((here, chosen, top.values, top.indices))
                done = done | torch.isin(chosen, stops) | (len(steps) >= limit[here])
                ids, mask = chosen[:, None], torch.cat([mask, mask.new_ones(len(here), 1)], 1)
        return self._replies(steps, limits)

    def _heads(self, prompts, shared: Sequence[tuple[int, int]]) -> tuple[Any, Tensor]:
        """(cache, mask) of what the prompts of each run of `shared` begin with, read once per run: a row per prompt."""
        starts = torch.tensor([0, *(rows for _, rows in shared)]).cumsum(0).tolist()
        ids, mask = self._padded([prompts[start][:n] for start, (n, _) in zip(starts, shared, strict=False)])
        repeats = torch.tensor([rows for _, rows in shared], device=mask.device)
        place = torch.arange(len(shared), device=mask.device).repeat_interleave(repeats)
        cache = _with_room(self._step(ids, mask, None).past_key_values)
        cache.batch_select_indices(place)
        return cache, mask[place]

    def _replies(self, steps: Sequence[tuple[Tensor, ...]], limits: Sequence[int]) -> list[Reply]:
        """The reply to each prompt of its steps: (prompts [rows], tokens [rows], values and indices [rows, k])."""
        tokens = np.zeros((len(limits), len(steps)), dtype=np.int64)
        values, indices = (np.zeros((*tokens.shape, TOP_K), dtype=kind) for kind in (np.float32, np.int64))
        for step, columns in enumerate(steps):
            rows, *written = (one.cpu().numpy() for one in columns)
            for whole, part in zip((tokens, values, indices), written, strict=True):
                whole[rows, step] = part
        self._check_numbers(values)
        replies = []
        for row, most in enumerate(limits):
            ids = tokens[row, :most].tolist()
            stop = next((i for i, token in enumerate(ids) if token in self.stops), None)
            n = most if stop is None else stop + 1
            replies.append(Reply.rounded(ids[:n], stop is not None, values[row, :n], indices[row, :n]))
        return replies

    def _padded(self, rows: Prompts) -> list[Tensor]:
        """ids and mask [rows, longest], padded on the left, on the model's device."""
        return [one.to(self.model.device) for one in pad_rows(rows, self.tokenizer.pad_token_id, side="left")]

    def _step(self, ids: Tensor, mask: Tensor, cache):
        """The model's output for the last columns of `mask`; positions of finished rows stay in the window."""
        positions = (mask.cumsum(-1) - 1).clamp(0, min(self.window, 2**31) - 1)[:, -ids.shape[1] :]
        where = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        return self.model(input_ids=ids, **where, use_cache=True, logits_to_keep=1)
