"""The model: it internalizes documents, then answers questions without them.

    documents -> chunks -> context encoder -> hypernetwork -> one block per chunk -> Adapter
    question  -> base model with the adapter applied -> answer

The base model never changes: an adapter acts through hooks, inside a `with` block only.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2l_lib.adapter import Adapter, Block, SharedRows, same_base, stack_factors
from d2l_lib.base_model import (
    Fingerprint,
    decoder_body,
    decoder_layers,
    input_device,
    module_paths,
    module_sizes,
    parameters_key,
    passes_key,
    reads_images,
    window_of,
)
from d2l_lib.cache import AdapterCache, document_key
from d2l_lib.documents import (
    Document,
    Documents,
    chat_affixes,
    check_count,
    chunk_document,
    context_ids,
    is_image,
    name_texts_and_images,
    question_ids,
    tokenizer_fingerprint,
)
from d2l_lib.encoder import ContextEncoder, image_inputs
from d2l_lib.engine import generate, greedy_texts, pad_id_of, pad_rows
from d2l_lib.formats.checkpoints import (
    MODEL_FOLDER,
    part_in,
    write_checkpoint,
    write_router,
)
from d2l_lib.formats.writing import atomic_folder
from d2l_lib.hypernetwork import Hypernetwork, Loras
from d2l_lib.layers import weights_of
from d2l_lib.lora import apply_lora, noted_adapter, without_lora
from d2l_lib.onednn import Packs, are_small, in_use
from d2l_lib.reading import Reading, read_sparsely
from d2l_lib.router import Router
from d2l_lib.routing import SHORTLIST, Gate, route_prompts
from d2l_lib.row_reading import RowReading, read_rows
from d2l_lib.token_rows import TokenRows, TokenStates

# Longest chunk of the published models (needle evaluation, section 2).
_LONGEST_CHUNK = 1024


class _Current:
    """The default of every `adapter=` argument: the applied adapter, else the current one."""

    def __repr__(self) -> str:
        return "<the current adapter>"


_CURRENT = _Current()
Adapters = Adapter | Sequence[Adapter | None] | None
_Progress = Callable[[int, int], None] | bool | None
_Read = str | Reading | RowReading | None
_TOGETHER = 1 << 24  # bytes of blocks that then lie in one tensor
_LENGTH_STEP = 24  # tokens; chunks of one batch are padded to a multiple of it
_SMALL = 256  # hidden size of an encoder of which many short chunks are read at once
_FILLED = 12, 288  # chunks and tokens of a batch on a CPU that copies fill up, at most
_FREE_ROWS = {48: 37, 12: 5, 4: 2, 1: 1}  # rows of a batch where these change no bit: from how many short chunks on
_LONG_ROWS = (8, 4, 2, 1)  # long chunks that are read at once
_LONG_NUMBERS = 600_000  # of their features, at most
_BlockFactors = tuple[dict[str, Tensor], dict[str, Tensor] | SharedRows]


class DocToLoRA:
    """A frozen base model, its tokenizer, and a hypernetwork that turns documents into adapters for it.

    Attributes:
        base_model, tokenizer, hypernetwork
        config: the hypernetwork's HypernetworkConfig.
        encoder: a ContextEncoder that shares the base model's weights, or another model with `encoder_tokenizer`.
        current: the Adapter of calls without `adapter=`, or None.
        window: the most tokens that the base model reads.
        chunk_tokens: default length of a chunk, in the encoder's tokens, without its chat wrapping.
        chunk_batch, batch_tokens: the most chunks, and tokens, of one encoder batch; a longer chunk is one alone. On
            the CPU, batches that must be filled up stay smaller.
        least_relevance: nats that a block must reach to answer when `blocks` is a number and blocks are tried (see
            `routing`); minus infinity unless the checkpoint names it.
        router: what chooses blocks where `blocks` is a number (a Router, or None: see `routing`).
        gate: the threshold of `routing.gated` where the base model has an answer of its own (a Gate, or None).
        reading: how `read="sparse"` chooses what each token of an answer reads (a Reading; a RowReading where the
            hypernetwork writes rows, whose adapters are read in no other way).
        iterative: True writes blocks one base layer after another: less memory, the same numbers.
        block_dtype: the precision of blocks, torch.float16 for half the memory (None: what the hypernetwork writes).
        cache: an AdapterCache keeps the blocks of texts in files, and texts of before are read from there (None: no).

    Chunks of similar length are encoded together. On the CPU a block is bit-equal whatever chunks are beside it: where
    bits depend on the number of rows, batches of padded chunks have one shape for each length, filled up where chunks
    are missing. (In float64 a block may differ in the last bit.) There, in float32, weights of small models are held a
    second time, as oneDNN reads them (see `onednn`).
    """

    def __init__(
        self,
        base_model: nn.Module,
        tokenizer,
        hypernetwork: Hypernetwork | TokenStates,
        *,
        chunk_tokens: int | None = None,
        least_relevance: float = -math.inf,
        gate: Gate | None = None,
        router: Router | None = None,
        reading: Reading | None = None,
        block_dtype: torch.dtype | None = None,
        base_source: str | None = None,
        encoder: ContextEncoder | None = None,
        encoder_tokenizer=None,
    ):
        self.base_model = base_model
        self.tokenizer = tokenizer
        self.hypernetwork = hypernetwork
        self.config = hypernetwork.config
        self.writes_rows = isinstance(hypernetwork, TokenRows)
        self.copies_tokens = isinstance(hypernetwork, TokenStates)
        self.base_source = base_source
        if encoder is None:
            encoder = ContextEncoder.from_config(base_model, self.config, source=base_source)
        if encoder_tokenizer is None and encoder.model is not base_model:
            raise ValueError("an encoder that is not the base model has a tokenizer of its own: pass encoder_tokenizer")
        self.encoder = encoder
        self.encoder_tokenizer = tokenizer if encoder_tokenizer is None else encoder_tokenizer
        self._check_base_model()
        if self.copies_tokens:
            if self.encoder_tokenizer is not tokenizer and self.encoder_tokenizer.get_vocab() != tokenizer.get_vocab():
                raise ValueError(
                    "rows of tokens write what was read: the context encoder needs the base model's tokenizer"
                )
            hypernetwork.prepare(base_model, tokenizer)
        self.current: Adapter | None = None
        self.iterative = False
        self.cache: AdapterCache | None = None
        self.block_dtype = block_dtype
        self.least_relevance, self.gate, self.router = least_relevance, gate, router
        self.reading = (RowReading() if self.writes_rows else Reading()) if reading is None else reading
        self._evaluating = 0  # how many threads internalize now
        self._lock = threading.Lock()
        self._fingerprint = Fingerprint()
        self._tokenizer_key: tuple[tuple, str] = ((), "")  # (what it was taken of, the fingerprint)
        # whether so many chunks have the bits of chunks alone: of long ones, or by `_kind`
        self._together: dict[int | tuple, bool] = {}
        self._free: dict[tuple, bool | None] = {}  # see `_is_free`
        self._packs = Packs()
        self.window = window_of(base_model)
        on_cpu = self.device.type == "cpu"
        self.chunk_batch, self.batch_tokens = self._batch_limits()
        self.answer_batch = 16 if on_cpu else 32
        self.chunk_tokens = min(_LONGEST_CHUNK, self._longest_chunk()) if chunk_tokens is None else chunk_tokens

    def __getstate__(self) -> dict[str, Any]:
        """What a copy begins with: all but what belongs to threads of this one."""
        return {name: one for name, one in vars(self).items() if name not in ("_lock", "_evaluating", "_fingerprint")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock(), "_evaluating": 0, "_fingerprint": Fingerprint()}

    def _batch_limits(self) -> tuple[int, int]:
        """Chunks and tokens of a batch: on a CPU more for a small encoder, whose states then stay in its own memory."""
        if self.device.type != "cpu":
            return 8, 8192
        is_small = decoder_body(self.encoder.model).config.hidden_size <= _SMALL
        return (48, 2304) if is_small else (12, 288)

    @property
    def device(self) -> torch.device:
        """The base model's device (that of its inputs, if it is spread over several)."""
        return input_device(self.base_model)

    @property
    def has_null_block(self) -> bool:
        """Whether the hypernetwork was trained to be read sparsely, with a block of "no block" (see `reading`)."""
        return bool(self.config.null_rows)

    def _check_base_model(self) -> None:
        """ValueError if the hypernetwork writes for a base model of other sizes."""
        name = self.config.base_model or "another base model"
        remedy = f"it was made for {name}: pass that one as base_model="
        n_layers = len(decoder_layers(self.base_model))
        if n_layers != self.config.n_layers and not self.writes_rows:
            raise ValueError(
                f"hypernetwork writes for {self.config.n_layers} layers, this base model has {n_layers}; {remedy}"
            )
        d_in, d_out = module_sizes(self.base_model, self.config.modules)
        for module in self.config.modules:
            expected = (self.config.d_in[module], self.config.d_out[module])
            if expected != (d_in[module], d_out[module]):
                raise ValueError(
                    f"hypernetwork writes {module} {expected[0]} -> {expected[1]}, this base model's is "
                    f"{d_in[module]} -> {d_out[module]}; {remedy}"
                )
        if self.encoder.feature_size != self.config.feature_size:
            raise ValueError(
                f"hypernetwork reads features of size {self.config.feature_size}, this context encoder gives "
                f"{self.encoder.feature_size}; {remedy}"
            )
        if self.config.layer_to_layer and self.encoder.n_states != n_layers:
            raise ValueError(
                f"hypernetwork writes {n_layers} layers from as many hidden states, this context encoder gives "
                f"{self.encoder.n_states}; {remedy}"
            )

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.hypernetwork.parameters()) / 1e6
        layers = len(decoder_layers(self.base_model))
        base = f"{type(self.base_model).__name__}, {layers} layers, window {self.window} tokens"
        if self.encoder.model is not self.base_model:
            base += f"; context encoder {type(self.encoder.model).__name__}"
        writes = self.hypernetwork.described()
        return f"DocToLoRA({base}; hypernetwork {count:.1f} M parameters, {writes}; {self.device})"

    # --- documents in -----------------------------------------------------------------------------------------------

    def internalize(
        self,
        documents: Documents,
        *,
        chunk_tokens: int | None = None,
        progress: _Progress = None,
    ) -> Adapter:
        """The adapter of these documents, one block per chunk; it becomes `model.current`.

        documents: a text (named "document"), a list ("document 1", "document 2", ...) or {name: text}, of any length.
            A Path is read as its file's text, and named by the file. A PIL image (alone named "image") is one chunk
            without a span, for vision-language context encoders.
        chunk_tokens: longest chunk in tokens, without its chat wrapping (None: `model.chunk_tokens`).
        progress: True shows a bar; a function is called as progress(done, total), in different chunks.

        A few chunks are read at a time and finished blocks go to the CPU: working memory does not grow with length.
        Chunks of the same text are encoded once and share their tensors.

        TypeError or ValueError, before any computation, for documents that are no text or hold none, for a text that is
        the name of a file, for images if the encoder reads text only, and for a `chunk_tokens` that the window does not
        hold. FileNotFoundError for a Path without a file.
        """
        empty, blocks = self._blocks_of(name_texts_and_images(documents), chunk_tokens, progress)
        adapter = replace(empty, blocks=tuple(block for of_document in blocks.values() for block in of_document))
        self.current = adapter  # which another thread may replace
        return adapter

    def internalize_each(
        self,
        documents: Documents,
        *,
        chunk_tokens: int | None = None,
        progress: _Progress = None,
    ) -> list[Adapter]:
        """One adapter per document, for `answer(questions, adapters)`; `model.current` stays what it was.

        documents, chunk_tokens, progress: as of `internalize`, with its errors.
        """
        empty, blocks = self._blocks_of(name_texts_and_images(documents), chunk_tokens, progress)
        return [replace(empty, blocks=tuple(of_document)) for of_document in blocks.values()]

    def internalize_ids(self, ctx_ids: Tensor, attention_mask: Tensor | None = None) -> Adapter:
        """The adapter of ready chunks of token ids [n_chunks, length], chat wrapping included; it becomes current.

        ctx_ids: whole numbers below the vocabulary's size.
        attention_mask: [n_chunks, length], 0 at padding, on any side (None: no padding).

        Blocks have no span.

        ValueError for other shapes or ids, a chunk without a token, and one longer than the window.
        """
        ctx_ids, attention_mask = _checked_ids(ctx_ids, attention_mask, self.encoder.model)
        rows = [ids[mask].tolist() for ids, mask in zip(ctx_ids, attention_mask.bool(), strict=True)]
        for index, ids in enumerate(rows):
            if not ids:
                raise ValueError(f"chunk {index} has no token (its attention_mask is all 0): leave it out")
            if len(ids) > window_of(self.encoder.model):
                raise ValueError(
                    f"chunk {index} has {len(ids)} tokens, the context encoder reads {window_of(self.encoder.model)}: "
                    "cut it into shorter chunks"
                )
        encoded = self._factors_of(["document"] * len(rows), rows, None)
        blocks = [Block("document", index, None, 1.0, A, B) for index, (A, B) in enumerate(encoded)]
        adapter = self.current = self.adapter_of(blocks)
        return adapter

    def _blocks_of(
        self, documents: dict[str, Document], chunk_tokens: int | None, progress: _Progress
    ) -> tuple[Adapter, dict[str, list[Block]]]:
        """An adapter without blocks, whose bias and fingerprints all share, and the blocks of each named document.

        All chunks are one stream.
        """
        limit = self._chunk_limit(chunk_tokens)
        if self.cache is None:
            blocks = self._new_blocks_of(documents, limit, progress)
            return self.adapter_of([]), blocks
        empty = self.adapter_of([])
        facts = self.cache_facts(limit, (empty.base_key, empty.hypernetwork_key))
        if facts["passes"] is None:
            return empty, self._new_blocks_of(documents, limit, progress)
        keys = {name: document_key(one, facts) for name, one in documents.items() if not is_image(one)}
        kept = {name: adapter for name, key in keys.items() if (adapter := self.cache.read(key)) is not None}
        missing = {name: one for name, one in documents.items() if name not in kept}
        new = self._new_blocks_of(missing, limit, progress) if missing else {}
        for name in new.keys() & keys.keys():
            self.cache.write(keys[name], replace(empty, blocks=tuple(new[name]), bias=None))
        read = {name: [block.renamed(name) for block in adapter.blocks] for name, adapter in kept.items()}
        return empty, {name: (new | read)[name] for name in documents}

    def cache_facts(self, chunk_tokens: int, keys: tuple[str, str] | None = None) -> dict[str, Any]:
        """What a document's blocks depend on beside its text: models, their precision and device, cutting, batches.

        keys: this model's base_key and hypernetwork_key (None: computed here).

        "passes" is None where hooks act on the models: then blocks are neither kept nor read.
        """
        encoder, own, device = self.encoder, next(self.hypernetwork.parameters()), self.device.type
        base_key, hypernetwork_key = (self.base_key, self.hypernetwork_key) if keys is None else keys
        return {
            "base_model": base_key,
            "encoder": None if encoder.model is self.base_model else Fingerprint().key(encoder.model),
            "hypernetwork": hypernetwork_key,
            "config": self.config.to_dict(),
            "tokenizer": self._encoder_tokenizer_key(),
            "passes": passes_key(encoder.model, self.hypernetwork),
            "reads": [encoder.encoder_type, encoder.n_layers_run, list(encoder.encoder_layers)],
            "autocast": str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None,
            "precision": [str(one.dtype) for one in (self.base_model, encoder.model, own)],
            "device": [one.device.type for one in (self.base_model, encoder.model, own)],
            "chunk_tokens": int(chunk_tokens),
            "blocks": str(self.block_dtype),
            "batches": [self.chunk_batch, self.batch_tokens, self.iterative],
        }

    def _encoder_tokenizer_key(self) -> str:
        """The fingerprint of the encoder's tokenizer; it is taken anew (0.4 s) where its size or settings changed."""
        tokenizer, backend = self.encoder_tokenizer, getattr(self.encoder_tokenizer, "backend_tokenizer", None)
        rules = [repr(getattr(backend, name, None)) for name in ("normalizer", "pre_tokenizer", "post_processor")]
        state = (tokenizer, len(tokenizer), tokenizer.chat_template, str(tokenizer.special_tokens_map), *rules)
        if self._tokenizer_key[0] != state:
            self._tokenizer_key = state, tokenizer_fingerprint(tokenizer)
        return self._tokenizer_key[1]

    def _new_blocks_of(self, documents: dict[str, Document], limit: int, progress: _Progress) -> dict[str, list[Block]]:
        """The blocks of each named document, computed."""
        tokenizer = self.encoder_tokenizer
        images = {name: self._image_inputs(one, name) for name, one in documents.items() if is_image(one)}
        texts = {name: one for name, one in documents.items() if name not in images}
        chunks = [chunk for name, text in texts.items() for chunk in chunk_document(text, tokenizer, limit, name)]
        ids = context_ids(tokenizer, [chunk.text for chunk in chunks])
        blocks: dict[str, list[Block]] = {name: [] for name in documents}
        labels = [(chunk.document, chunk.index, chunk.span) for chunk in chunks] + [(name, 0, None) for name in images]
        encoded = self._factors_of([name for name, *_ in labels], [*ids, *images.values()], progress)
        for label, (A, B) in zip(labels, encoded, strict=True):
            blocks[label[0]].append(Block(*label, 1.0, A, B))
        return blocks

    def _factors_of(
        self, documents: Sequence[str], chunks: Sequence[list[int] | dict[str, Tensor]], progress: _Progress
    ) -> list[_BlockFactors]:
        """(A, B) of every chunk, whose documents are named; the words of a document's rows lie in one table."""
        encoded = self._encode(chunks, progress)
        if not self.writes_rows:
            return encoded
        own: dict[str, dict[tuple[int, ...], Any]] = {name: {} for name in documents}
        for name, ids in zip(documents, chunks, strict=True):
            own[name][tuple(ids)] = None
        with torch.no_grad():
            words = {name: dict(zip(its, self._shared_rows(list(its)), strict=True)) for name, its in own.items()}
        triples = zip(documents, chunks, encoded, strict=True)
        return [(A, words[name][tuple(ids)]) for name, ids, (A, _) in triples]

    def _shared_rows(self, chunks: Sequence[tuple[int, ...]]) -> list[SharedRows]:
        """B of the chunks of one document, on the CPU."""
        rows = self.hypernetwork.shared_rows(chunks)
        self._check_written([rows[0].table])
        table = _kept(rows[0].table, self.block_dtype)
        return [SharedRows(one.module, table, one.rows) for one in rows]

    def _image_inputs(self, image: Document, name: str) -> dict[str, Tensor]:
        """The context encoder's inputs for an image; ValueError if it reads text only or too few tokens."""
        if self.copies_tokens:
            raise ValueError(f"image {name!r} has no words to write: token rows are for texts")
        inputs = image_inputs(self.encoder.processor, image)
        length, window = inputs["input_ids"].shape[1], window_of(self.encoder.model)
        if length > window:
            raise ValueError(
                f"image {name!r} takes {length} tokens, the context encoder reads {window}: make it smaller"
            )
        return inputs

    def _longest_chunk(self) -> int:
        """Tokens of text that fit into the encoder's window beside the chat wrapping."""
        prefix, suffix = chat_affixes(self.encoder_tokenizer)
        return window_of(self.encoder.model) - len(prefix) - len(suffix)

    def _chunk_limit(self, chunk_tokens: int | None) -> int:
        limit = self.chunk_tokens if chunk_tokens is None else chunk_tokens
        if isinstance(limit, bool) or not isinstance(limit, Integral) or not 1 <= limit <= self._longest_chunk():
            raise ValueError(
                f"chunk_tokens must be a whole number from 1 to {self._longest_chunk()} (the context encoder's window "
                f"less the chat wrapping), not {limit!r}"
            )
        return limit

    @torch.no_grad()
    def _encode(self, chunks: Sequence[list[int] | dict[str, Tensor]], progress: _Progress) -> list[_BlockFactors]:
        """(A, B) of every chunk (token ids, or an image's inputs), each {module: [L, r, size]}, on the CPU.

        Equal chunks of token ids share their tensors.
        """
        keys = [id(chunk) if isinstance(chunk, dict) else tuple(chunk) for chunk in chunks]
        images = {key: chunk for key, chunk in zip(keys, chunks, strict=True) if isinstance(chunk, dict)}
        distinct = list(dict.fromkeys(key for key in keys if key not in images))
        done: dict[int | tuple[int, ...], _BlockFactors] = {}
        apart: list[_BlockFactors] = []
        with self._in_eval_mode(), self._products(), _reporter(progress, len(distinct) + len(images)) as report:
            for batch, width, n in self._batches(distinct):
                loras = self._encode_batch(batch, width, n)
                for index, ids in enumerate(batch):
                    done[ids] = self._on_cpu(loras, index, self.hypernetwork.rows_of(len(ids)))
                    apart.append(done[ids])
                if sum(one.nbytes for pair in apart for side in pair for one in side.values()) > _TOGETHER:
                    _put_together(apart)
                    apart = []
                report(len(done))
            for key, inputs in images.items():
                done[key] = self._on_cpu(self._write_blocks(inputs), 0)
                report(len(done))
        return [done[key] for key in keys]

    def _products(self) -> AbstractContextManager:
        """Inside the `with` block products are oneDNN's, if there is room for packs of all that reads and writes."""
        read = weights_of(decoder_layers(self.encoder.model)[: self.encoder.n_layers_run])
        return self._packs.used() if are_small([*read, *self.hypernetwork.parameters()]) else nullcontext()

    @contextmanager
    def _in_eval_mode(self) -> Iterator[None]:
        """Inside the `with` block the hypernetwork is in evaluation mode; the last of several threads restores it."""
        with self._lock:
            if not self._evaluating:
                self._was_training = self.hypernetwork.training
                if self._was_training:
                    self.hypernetwork.eval()
            self._evaluating += 1
        try:
            yield
        finally:
            with self._lock:
                self._evaluating -= 1
                if not self._evaluating and self._was_training:
                    self.hypernetwork.train()

    def _batches(self, chunks: Sequence[tuple[int, ...]]) -> Iterator[tuple[list[tuple[int, ...]], int, int]]:
        """(different chunks, their padded length, rows for them), one batch after another.

        Short chunks are padded to the next multiple of _LENGTH_STEP above their length. Every row then has padding,
        because results with and without a mask differ in the last bits. Long chunks, which fill a batch alone, are not
        padded; on the CPU, a few of one length stand together where they are small.
        """
        short: dict[int, list[tuple[int, ...]]] = {}
        long: dict[int, list[tuple[int, ...]]] = {}
        for ids in chunks:
            width = (len(ids) // _LENGTH_STEP + 1) * _LENGTH_STEP
            if self._rows(width) == 1 or width > window_of(self.encoder.model):
                long.setdefault(len(ids), []).append(ids)
            else:
                short.setdefault(width, []).append(ids)
        for width, alike in short.items():
            start = 0
            while start < len(alike):
                n = self._short_rows(alike[0], len(alike) - start, width)
                yield alike[start : start + n], width, n
                start += n
        for length, alike in long.items():
            while alike:
                n = next(n for n in _LONG_ROWS if n <= len(alike) and self._may_stand_together(n, alike[0]))
                yield alike[:n], length, n
                alike = alike[n:]

    def _short_rows(self, ids: Sequence[int], left: int, width: int) -> int:
        """How many rows the next batch has, of which `left` short chunks like this one, or fewer, are read."""
        if not self._is_free(width, ids):
            return self._rows(width)
        most = min(self.chunk_batch, self.batch_tokens // width)
        fits = {
            n: least for n, least in _FREE_ROWS.items() if n <= most and self._together.get(self._kind(width, n), True)
        }
        return next((n for n, least in fits.items() if left >= least), 1)

    def _kind(self, width: int, n: int | None = None) -> tuple:
        """What the bits of a batch of short chunks can depend on, beside the chunks."""
        return width, n, self.encoder.model.dtype, next(self.hypernetwork.parameters()).dtype, torch.get_num_threads()

    def _is_free(self, width: int, ids: Sequence[int] | None = None) -> bool:
        """Whether a batch of chunks of this width may have any number of rows: its bits do not depend on it.

        Products by oneDNN promise that, others do not. So it is tried with copies of a chunk `ids` (None: not now), but
        not before a width comes a second time: a single short text does not pay for that.
        """
        if self.device.type != "cpu" or self.iterative or self.copies_tokens or in_use() is None:
            return False
        kind = self._kind(width)
        if ids is not None and kind not in self._free:
            self._free[kind] = None
        elif ids is not None and self._free[kind] is None:
            full, alone = (self._encode_rows([ids] * n, width) for n in (self._rows(width), 1))
            self._free[kind] = _all_equal(full, alone)
        return bool(self._free.get(kind))

    def _may_stand_together(self, n: int, ids: Sequence[int]) -> bool:
        """Whether n long chunks like this one are read at once: small ones, to which that makes no difference.

        In products of many rows, the bits of a row mostly do not depend on how many there are, but this is the
        processor's choice. So it is tried once for each n, with copies of a chunk.
        """
        if n == 1:
            return True
        if self.device.type != "cpu" or self.iterative or self.copies_tokens or n > self.chunk_batch:
            return False
        features = n * len(ids) * self.encoder.n_states * self.encoder.feature_size
        if features > _LONG_NUMBERS or n * len(ids) > self.batch_tokens:
            return False
        if n not in self._together:
            several, alone = (self._encode_rows([ids] * rows, len(ids)) for rows in (n, 1))
            self._together[n] = _all_equal(several, alone)
        return self._together[n]

    def _rows(self, width: int) -> int:
        """How many chunks of `width` tokens make a batch that is filled up: a function of the length alone."""
        most, tokens = self.chunk_batch, self.batch_tokens
        if self.device.type == "cpu":
            most, tokens = min(most, _FILLED[0]), min(tokens, _FILLED[1])
        return max(1, min(most, tokens // width))

    def _encode_batch(self, batch: Sequence[Sequence[int]], width: int, n: int) -> Loras:
        """{module: (A [rows, L, r, d_in], B [rows, L, r, d_out])} of chunks of token ids, padded to `width`.

        A batch of short chunks is filled up to n rows with copies of the last one.
        """
        if len(batch[0]) == width:  # long chunks have no padding
            return self._encode_rows(batch, width)
        rows = [*batch, *[batch[-1]] * (n - len(batch))]
        loras = self._encode_rows(rows, width)
        if not self._is_free(width) or self._are_as_alone(loras, rows, width):
            return loras
        alone = [self._encode_rows([ids], width) for ids in batch]
        return {m: tuple(torch.cat(sides) for sides in zip(*(one[m] for one in alone), strict=True)) for m in loras}

    def _are_as_alone(self, loras: Loras, rows: Sequence[Sequence[int]], width: int) -> bool:
        """Whether so many short chunks have the bits of chunks alone: the first batch of so many is compared."""
        n, kind = len(rows), self._kind(width, len(rows))
        if n > 1 and kind not in self._together:
            ends = [(i, self._encode_rows([rows[i]], width)) for i in (0, n - 1)]
            self._together[kind] = all(
                _all_equal({m: tuple(side[i, None] for side in pair) for m, pair in loras.items()}, alone)
                for i, alone in ends
            )
        return n == 1 or self._together[kind]

    def _encode_rows(self, rows: Sequence[Sequence[int]], width: int) -> Loras:
        """The blocks of these chunks, as many as there are."""
        ids, mask = pad_rows(rows, pad_id_of(self.encoder_tokenizer), width=width)
        return self._write_blocks({"input_ids": ids, "attention_mask": mask})

    def _write_blocks(self, inputs: Mapping[str, Tensor]) -> Loras:
        """{module: (A [n, L, r, d_in], B [n, L, r, d_out])} of the encoder's inputs. B of token rows has no rows.

        inputs: input_ids and attention_mask [n, T]; images have more.
        """
        device, dtype = input_device(self.encoder.model), self.encoder.model.dtype
        inputs = {name: one.to(device, dtype if one.is_floating_point() else None) for name, one in inputs.items()}
        ids = inputs.pop("input_ids")
        features = self.encoder.encode(ids, **inputs)
        place = next(self.hypernetwork.parameters()).device
        mask = inputs["attention_mask"].to(place)
        more = {"input_ids": ids} if self.copies_tokens and not self.writes_rows else {}
        loras = self.hypernetwork(features.to(place), attention_mask=mask, iterative=self.iterative, **more)
        self._check_written([tensor for pair in loras.values() for tensor in pair])
        return loras

    def _check_written(self, tensors: Sequence[Tensor]) -> None:
        """ValueError for NaN, infinity, and numbers too large for the blocks' precision."""
        written = [tensor for tensor in tensors if tensor.numel()]
        ends = torch.stack([end for tensor in written for end in tensor.aminmax()])  # NaN spreads to both
        if not ends.isfinite().all():
            raise ValueError("the hypernetwork wrote NaN or infinity: its weights, or the base model's, are damaged")
        if not ends.to(dtype=self.block_dtype).isfinite().all():
            raise ValueError(f"the hypernetwork wrote numbers too large for model.block_dtype = {self.block_dtype}")

    def _on_cpu(self, loras: Loras, index: int, rows: slice = slice(None)) -> _BlockFactors:
        """(A, B) of one chunk of a batch, these rows, without the B of token rows, which words make."""
        sides = (0,) if self.writes_rows else (0, 1)
        kept = [{m: _kept(pair[side][index, :, rows], self.block_dtype) for m, pair in loras.items()} for side in sides]
        return kept[0], kept[1] if len(kept) > 1 else {}

    @torch.no_grad()
    def adapter_of(self, blocks: Sequence[Block], *, bias: bool = True) -> Adapter:
        """An Adapter of blocks that were made for this base model, with the hypernetwork's bias block or without."""
        bias = self.hypernetwork.bias() if bias else None
        if bias is not None:
            bias = {m: (A.detach().cpu().clone(), B.detach().cpu().clone()) for m, (A, B) in bias.items()}
        paths = module_paths(self.base_model, self.config.modules)
        paths = {module: self.hypernetwork.place_of(path) for module, path in paths.items()}
        return Adapter(
            blocks=tuple(blocks),
            bias=bias,
            scale=self.config.scale,
            n_layers=self.config.n_layers,
            layers=self.config.written_layers,
            sizes={module: self.hypernetwork.row_sizes(module) for module in self.config.modules},
            base_model=self.base_source or self.config.base_model,
            base_key=self.base_key,
            hypernetwork_key=self.hypernetwork_key,
            paths=paths,
        )

    @property
    def base_key(self) -> str:
        """The base model's fingerprint: see `base_model.Fingerprint`."""
        return self._fingerprint.key(self.base_model)

    @property
    def hypernetwork_key(self) -> str:
        """The fingerprint: a hash of some values of each parameter of the hypernetwork that writes blocks, read anew.

        The null block of sparse reading writes none: a model that gets one still takes the adapters of before.
        """
        return parameters_key(self.hypernetwork, without="null_")

    # --- adapters on ------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Drop the current adapter: calls without `adapter=` use the base model until the next `internalize`."""
        self.current = None

    @contextmanager
    def applied(
        self, adapter: Adapters | _Current = _CURRENT, *, read: _Read = None, starts: Tensor | None = None
    ) -> Iterator[nn.Module]:
        """Inside the `with` block the base model (also the plain transformers object) answers with the adapter.

        adapter: left out, the current one; None, the plain base model; a list, one (or None) per batch row.
        read: as in `answer`. Sparse reading follows left-padded prompts, and their answers token by token with a cache.
        starts: [batch], the columns of the last prompt tokens. With them a pass may hold prompts and their answers (see
            `reading.read_sparsely`).

        `with` blocks nest; the innermost counts, also for calls without `adapter=`. On exit, also after an exception,
        weights and hooks are what they were, bit for bit.

        A `with` block belongs to the thread (or asyncio task) that opens it. Calls of this model in other threads do
        not see it: without `adapter=` they use their own `with` block, else `model.current`. A thread that is started
        inside and opens none (as for a streamer) sees it in calls of the plain transformers object. RuntimeError if
        `with` blocks of several threads could be meant.
        """
        reading = self._reading(read, adapter)
        with self._with_applied(self._chosen(adapter), shared=True, reading=reading, starts=starts):
            yield self.base_model

    @contextmanager
    def _with_applied(
        self,
        adapter: Adapters,
        shared: bool,
        *,
        reading: Reading | None = None,
        starts: Tensor | None = None,
        checked: bool = False,
    ) -> Iterator[None]:
        """Inside the `with` block this thread's passes have the adapter.

        shared: see `lora.OpenBlock`.
        reading: None is the published sum.
        checked: the adapters are known to fit this model.
        """
        contexts, rows = _distinct(adapter) if isinstance(adapter, (list, tuple)) else ([adapter], None)
        if not checked:
            self._check_adapters(contexts)
        notes = {"owner": self, "adapter": adapter, "shared": shared}
        if all(one is None for one in contexts):
            with without_lora(self.base_model, reading=reading, **notes):
                yield
        elif isinstance(reading, RowReading):
            with read_rows(self.base_model, contexts, reading, self.hypernetwork.reader, rows=rows, **notes):
                yield
        elif reading is not None:
            null = self.hypernetwork.null()
            with read_sparsely(self.base_model, contexts, reading, rows=rows, starts=starts, null=null, **notes):
                yield
        else:
            with apply_lora(self.base_model, *stack_factors(contexts), rows=rows, **notes):
                yield

    def _check_adapters(self, adapters: Sequence[object]) -> None:
        """`_check_adapter` of several, with the model's fingerprints taken once."""
        wanted = [one for one in adapters if isinstance(one, Adapter)]
        keys = (
            self.base_key if any(one.base_key for one in wanted) else "",
            self.hypernetwork_key if any(one.hypernetwork_key for one in wanted) else "",
        )
        for one in adapters:
            self._check_adapter(one, keys)

    def _check_adapter(self, adapter: object, keys: tuple[str, str] | None = None) -> None:
        """TypeError unless it is an adapter; ValueError for one of another base model or hypernetwork.

        keys: this model's base_key and hypernetwork_key (None: computed here).
        """
        if adapter is None:
            return
        if not isinstance(adapter, Adapter):
            raise TypeError(f"expected Adapters or None in the list, not {type(adapter).__name__}")
        n_layers = len(decoder_layers(self.base_model))
        if adapter.n_layers not in (n_layers, self.config.n_layers):
            raise ValueError(
                f"adapter has blocks for {adapter.n_layers} layers, this model has {n_layers}: "
                "was it made for another model?"
            )
        if adapter.is_rows != self.writes_rows:
            kinds = ("blocks that are added up", "token rows")
            raise ValueError(
                f"adapter holds {kinds[adapter.is_rows]}, this model reads {kinds[self.writes_rows]}: it was made by "
                "another hypernetwork, internalize the documents again here"
            )
        d_in, d_out = module_sizes(self.base_model, adapter.modules)
        sizes = {module: (d_in[module], d_out[module]) for module in adapter.modules}
        sizes |= {
            module: self.hypernetwork.row_sizes(module)
            for module in adapter.modules
            if adapter.is_rows and module in self.config.modules
        }
        if adapter.sizes != sizes:
            raise ValueError(f"adapter writes {adapter.sizes}, this model has {sizes}: was it made for another model?")
        base_key, hypernetwork_key = (self.base_key, self.hypernetwork_key) if keys is None else keys
        if not same_base(adapter.base_key, base_key):
            raise ValueError(
                f"adapter was made for base model {adapter.base_model or '(unnamed)'}, this one "
                f"({self.base_source or self.config.base_model or 'unnamed'}) has other weights "
                "(a fine-tune, or one with an adapter merged in, is another model; float16 and float32 count as "
                "different): internalize the documents again here"
            )
        if adapter.hypernetwork_key and adapter.hypernetwork_key != hypernetwork_key:
            raise ValueError(
                "adapter was made by another hypernetwork (or by this one before it was changed): internalize the "
                "documents again here, or use adapter.as_lora() to apply it as an ordinary LoRA all the same"
            )

    def _chosen(self, adapter: Adapters | _Current) -> Adapters:
        """The adapter that a call means: its argument, else the one applied around it, else the current one."""
        if adapter is _CURRENT:
            block = noted_adapter(self.base_model, self)
            adapter = self.current if block is None else block.adapter
        if adapter is None or isinstance(adapter, (Adapter, list, tuple)):
            return adapter
        raise TypeError(f"expected an Adapter, a list of them or None, not {type(adapter).__name__}")

    def _reading(self, read: _Read, adapter: Adapters | _Current) -> Reading | None:
        """How a call reads its adapter (None: the published sum). ValueError for an unknown word."""
        if read is None:
            around = noted_adapter(self.base_model, self) if adapter is _CURRENT else None
            if around is not None:
                return around.reading
            return self.reading if self.writes_rows else None
        if isinstance(read, RowReading if self.writes_rows else Reading):
            return read
        if self.writes_rows and read != "sparse":
            raise ValueError(f"rows are read by attention: read must be 'sparse' or a RowReading, not {read!r}")
        if read not in ("sum", "sparse"):
            raise ValueError(f"read must be 'sum', 'sparse' or a Reading, not {read!r}")
        return self.reading if read == "sparse" else None

    # --- answers out ------------------------------------------------------------------------------------------------

    def answer(
        self,
        question: str | Sequence[str],
        adapter: Adapters | _Current = _CURRENT,
        *,
        max_new_tokens: int = 64,
        system: str = "",
        blocks: int | None = None,
        shortlist: int | None = SHORTLIST,
        read: _Read = None,
        stream: Callable[[str], None] | None = None,
    ) -> str | list[str]:
        """The greedy answer to a question, or a list of answers to a list.

        adapter: left out, the current one; None, the base model alone; a list, one (or None) per question.
        max_new_tokens: the longest answer. It ends earlier at the end of its turn, or of the window.
        system: the text of a system turn before the question.
        blocks: how many blocks answer, the most relevant to each question (None: all). That keeps out the noise of the
            others (see `routing`). With a router, what "the X of Y" in a question is, is asked
            first, and a question that states a value is judged: the block gets a row that says yes or no.
        shortlist: of how many blocks the most relevant is chosen, those whose keys respond most in one pass of the
            question. The keys of one layer are kept in one piece with the adapter (10,000 blocks of `tiny/qa`: 164 MB).
            Left out, as many as answer: the model's router chooses, or else the keys of the last layer, which is better
            with hundreds of blocks (`d2l study router`). None tries every block, with a row of a forward pass for each.
        read: "sum", the published sum of the blocks. "sparse", the matching block at each token, in one pass (see
            `reading`), as `model.reading` says. Or a Reading. Left out: as the adapter applied around, else the sum.
        stream: called as stream(text so far) after each token of the answer to a single question. An error that it
            raises ends the answer.

        Questions are wrapped in the chat template and batched; answers equal those of one-by-one calls. The base
        model's own generation settings (sampling, penalties, ...) do not count. Several threads may answer at once,
        also while another internalizes: name the adapter there, as all threads share `model.current`.

        TypeError for a question that is no text and for what is no adapter. ValueError for a blank question and one
        that overflows the window, an adapter of another model, another number of adapters than questions, `stream` with
        several questions, an unknown `read`, and `blocks` where the adapter holds token rows.
        """
        single = isinstance(question, str)
        if not single and (isinstance(question, (bytes, Mapping, set)) or not isinstance(question, Iterable)):
            raise TypeError(f"the question must be a text or a list of texts, not {type(question).__name__}")
        if stream is not None and not single:
            raise ValueError("stream follows the answer to one question: ask a text, not a list")
        questions = [question] if single else list(question)
        check_count(max_new_tokens, "max_new_tokens")
        prompts = question_ids(self.tokenizer, question if single else questions, system)
        prompts = [prompts] if single else prompts
        for index, prompt in enumerate(prompts):
            which = "the question" if single else f"question {index + 1} of {len(prompts)}"
            self._check_window(len(prompt), f"{which} takes {len(prompt)} tokens with its chat wrapping")
        chosen, reading = self._chosen(adapter), self._reading(read, adapter)
        per_row = list(chosen) if isinstance(chosen, (list, tuple)) else [chosen] * len(questions)
        if len(per_row) != len(questions):
            raise ValueError(
                f"{len(questions)} question(s) but {len(per_row)} adapters: give one adapter for all, or one per "
                "question (a + b puts several documents into one adapter)"
            )
        checked = blocks is not None or len(questions) > self.answer_batch  # else the one batch checks them
        if checked:
            self._check_adapters(list({id(one): one for one in per_row}.values()))
        if blocks is not None and self.writes_rows:
            raise ValueError("rows of all blocks are read by attention, which chooses by itself: leave blocks out")
        if blocks is not None:
            per_row = route_prompts(self, questions, prompts, per_row, blocks, shortlist=shortlist, system=system)
        answers: list[str] = []
        for start in range(0, len(questions), self.answer_batch):
            batch = slice(start, start + self.answer_batch)
            answers += self._answer_batch(prompts[batch], per_row[batch], max_new_tokens, reading, stream, checked)
        return answers[0] if single else answers

    def _answer_batch(
        self,
        prompts: list[list[int]],
        adapters: list[Adapter | None],
        max_new_tokens: int,
        reading: Reading | None,
        stream: Callable[[str], None] | None = None,
        checked: bool = False,
    ) -> list[str]:
        """Greedy answers of one left-padded batch. stream: as of `answer`. checked: as of `_with_applied`."""
        limits = [min(max_new_tokens, self.window - len(prompt)) for prompt in prompts]
        several = any(one is not adapters[0] for one in adapters)
        one_or_more, options = adapters if several else adapters[0], {"reading": reading, "checked": checked}
        with self._with_applied(one_or_more, shared=False, **options):
            return greedy_texts(self.base_model, self.tokenizer, prompts, limits, stream)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int = 64,
        adapter: Adapters | _Current = _CURRENT,
        attention_mask: Tensor | None = None,
        read: _Read = None,
        **options: Any,
    ) -> Tensor:
        """transformers' `generate` with an adapter applied: token ids [batch, length] in, prompt and new ids out.

        adapter: left out, the current one; None, the base model alone; a list, one (or None) per row.
        attention_mask: 0 at padding (None: no padding).
        read: as in `answer`.
        options: passed on to transformers. Defaults are fresh, not the base model's own: greedy, to the end of the
            model's turn.

        New tokens may exceed the window; `answer` stops there. Nothing is compiled, not even with a static cache:
        compiled code would miss the adapter. With `streamer=` it may run in a thread of its own: name the adapter in
        the call, as that thread does not see the caller's `applied`.

        ValueError for padding on the right, where new tokens go, for another number of adapters than rows, and for
        sparse reading without a cache or with a prompt in parts.
        """
        check_count(max_new_tokens, "max_new_tokens")
        input_ids, attention_mask = _checked_ids(input_ids, attention_mask, self.base_model)
        if not attention_mask[:, -1].all():
            row = int((attention_mask[:, -1] == 0).nonzero()[0])
            raise ValueError(f"row {row} ends in padding (its attention_mask is 0 there): pad on the left")
        length = int(attention_mask.sum(1).max())
        self._check_window(length, f"input_ids holds {length} tokens")
        ids, mask = input_ids.to(self.device), attention_mask.to(self.device)
        chosen, reading = self._chosen(adapter), self._reading(read, adapter)
        if isinstance(chosen, (list, tuple)) and len(chosen) != len(ids):
            raise ValueError(f"{len(ids)} row(s) but {len(chosen)} adapters: give one adapter for all, or one per row")
        if reading is not None:
            _check_followed(options)
        with self._with_applied(chosen, shared=False, reading=reading):
            return generate(self.base_model, self.tokenizer, ids, mask, max_new_tokens=max_new_tokens, **options)

    def _check_window(self, length: int, what: str) -> None:
        if length >= self.window:
            raise ValueError(
                f"{what}; the base model's window is {self.window} and the answer needs room in it: "
                "shorten it, or internalize the long part"
            )

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, include_base: bool | None = None) -> Path:
        """Write a folder that `d2l.load` reads: hypernetwork, configuration, and the base model's name or path.

        include_base: also write the base model and tokenizer (and a context encoder that is another model). None: only
            if it was not loaded by a name or path, which could be found again.

        The folder is complete or absent. It must be new, empty, or an earlier output of `save`, which is replaced; this
        model's base model inside it stays. FileExistsError names the files of any other folder.
        """
        models = {"base_model": (self.base_model, self.tokenizer, self.base_source)}
        same_source = self.encoder.source is not None and self.encoder.source == self.base_source  # the base in 4-bit
        if self.encoder.model is not self.base_model and not same_source:
            models["encoder_model"] = (self.encoder.model, self.encoder_tokenizer, self.encoder.source)
        meta: dict[str, Any] = {"chunk_tokens": self.chunk_tokens}
        if self.least_relevance > -math.inf:
            meta["least_relevance"] = self.least_relevance
        if self.gate is not None:
            meta["gate"] = asdict(self.gate)
        if self.block_dtype is not None:
            meta["block_dtype"] = str(self.block_dtype).removeprefix("torch.")
        if self.router is not None:
            meta["router"] = asdict(self.router.config)
        if self.writes_rows:
            meta["row_reading"] = asdict(self.reading)
        elif self.reading != Reading():
            meta["reading"] = asdict(self.reading)
        included, kept, files = [], [], []
        for name, (_, _, source) in models.items():
            include = source is None if include_base is None else include_base
            if not include and source is None:
                raise ValueError(
                    f"this {name.replace('_', ' ')} has no name or path to be found again by: save with "
                    "include_base=True"
                )
            meta[name] = None if include else source
            included += [name] if include else []
            if not include and (stays := part_in(folder, name, source)) is not None:
                meta[name] = stays["meta"]
                files += stays["files"]
                kept.append(name)
        with atomic_folder(folder, MODEL_FOLDER, kept) as temporary:
            for name in included:
                network, tokenizer, _ = models[name]
                network.save_pretrained(temporary / name)
                tokenizer.save_pretrained(temporary / name)
                if network is self.encoder.model and reads_images(network):
                    self.encoder.processor.save_pretrained(temporary / name)
                written = (path for path in (temporary / name).rglob("*") if path.is_file())
                files += sorted(path.relative_to(temporary).as_posix() for path in written)
            if files:
                meta["files"] = files
            write_checkpoint(temporary, self.hypernetwork, meta)
            if self.router is not None:
                write_router(temporary, self.router)
        return Path(folder)


# --- small helpers --------------------------------------------------------------------------------------------------


def _all_equal(loras: Loras, alone: Loras) -> bool:
    """Whether the factors of each chunk are, bit for bit, those of the one chunk of `alone`."""
    pairs = [(side, one) for m in alone for side, one in zip(loras[m], alone[m], strict=True)]
    return all(torch.equal(side, one.expand_as(side)) for side, one in pairs)


def _put_together(pairs: Sequence[_BlockFactors]) -> None:
    """Make the tensors of some chunks parts of a large one: left where they are, they would tear holes in memory."""
    for place in (0, 1):
        sides = [pair[place] for pair in pairs]
        tensors = [one for side in sides for one in side.values()]
        if tensors:
            parts = iter(torch.cat([one.flatten() for one in tensors]).split([one.numel() for one in tensors]))
            for side in sides:
                side.update({module: next(parts).view(one.shape) for module, one in side.items()})


def _kept(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy on the CPU, in this precision (None: its own): a slice would keep the whole batch alive."""
    return tensor.detach().to("cpu", dtype, copy=True)


def _checked_ids(ids: Tensor, mask: Tensor | None, network: nn.Module) -> tuple[Tensor, Tensor]:
    """(token ids, mask), each [rows, length]; ValueError for other shapes, no ids, or unknown ids."""
    ids = torch.as_tensor(ids)
    if ids.dim() != 2 or ids.numel() == 0 or ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise ValueError(f"token ids must be whole numbers [rows, length], got {ids.dtype} {list(ids.shape)}")
    n_tokens = network.get_input_embeddings().num_embeddings
    if not 0 <= int(ids.min()) <= int(ids.max()) < n_tokens:
        raise ValueError(f"token ids {int(ids.min())} to {int(ids.max())} do not fit a vocabulary of {n_tokens}")
    ids = ids.long()
    mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask).long()
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask is {list(mask.shape)}, the token ids are {list(ids.shape)}")
    return ids, mask


def _check_followed(options: Mapping[str, Any]) -> None:
    """ValueError for options of `generate` that hide from sparse reading where an answer begins."""
    config = options.get("generation_config")
    for name, wrong in (("use_cache", (False,)), ("prefill_chunk_size", None)):
        value = options.get(name, getattr(config, name, None))
        if value is not None and (wrong is None or value in wrong):
            raise ValueError(f"sparse reading cannot follow {name}={value!r}: leave it out, or read='sum'")


def _distinct(adapters: Sequence[Adapter | None]) -> tuple[list[Adapter | None], Tensor]:
    """(the distinct adapters, the number of each row's adapter among them [rows])."""
    adapters = list(adapters)
    if not adapters:
        raise ValueError("the list of adapters is empty: give one per row, or None for the base model")
    places = {id(adapter): place for place, adapter in enumerate({id(one): one for one in adapters}.values())}
    distinct = list({id(one): one for one in adapters}.values())
    return distinct, torch.tensor([places[id(one)] for one in adapters])


@contextmanager
def _reporter(progress: _Progress, total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of finished chunks."""
    if progress is None or progress is False:
        yield lambda done: None
    elif progress is True:
        from tqdm.auto import tqdm

        with tqdm(total=total, unit="chunk") as bar:
            yield lambda done: bar.update(done - bar.n)
    elif callable(progress):
        yield lambda done: progress(done, total)
    else:
        raise TypeError(f"progress must be True, a function or None, not {progress!r}")
