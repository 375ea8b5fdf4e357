"""Self-generated data: what the frozen base model answers with a document in its prompt, for training without it.

    documents  ->  questions  ->  the teacher's answers and their top-16 log-probabilities  ->  parquet shards

    python -m d2l_lib.selfgen --model tiny --source world --documents 2000 --seed 0 --shard-size 100 --out FOLDER
    torchrun --nproc_per_node 2 -m d2l_lib.selfgen ...           # every process makes its share of the shards

One row is one document. The published columns (paper, main stage), and which axes they have:

    ctx_ids              [tokens]                     the document alone, in chat format (`documents.context_ids`)
    input_ids            [questions][tokens]          chat-formatted question and its answer, without the document
    response_start_end   [questions][2]               the answer within input_ids, as [start, end)
    logprobs_vals        [questions][end - start][16] float16, natural logarithms, largest first
    logprobs_indices     [questions][end - start][16] the token ids that they belong to

An answer ends with its stop token, which is learned like any other. Our shards have text columns besides (document,
questions, answers, references, kinds, closed, evidence); a reader of the published ones does not need them.

A shard is a function of the settings, the models and its index: workers make shards independently, and a killed run
continues to the same bytes (on one kind of machine, with the same library versions and number of threads; vLLM does
not promise that much).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from d2l_lib import arguments as options

from . import world
from .base_model import bundled_path, load_base_model, load_config, load_tokenizer
from .documents import check_count, check_text, context_ids, question_ids, stop_ids
from .lora import without_lora
from .packing import TEACHER_COLUMNS
from .records import atomic_file, one_line_errors, read_json, read_jsonl, write_json
from .trainer import own_device

FORMAT, VERSION = "doc-to-lora self-generated data", 1
MANIFEST = "manifest.json"
TOP_K = 16
# Log-probabilities are at most 0; software that sums in another order may be above it by rounding.
HIGHEST = 1e-3
NEIGHBOURS = 4  # so many groups back a prompt finds others that begin alike

_IDS = pa.list_(pa.int32())
PUBLISHED = {
    "ctx_ids": _IDS,
    "input_ids": pa.list_(_IDS),
    "response_start_end": pa.list_(_IDS),
    "logprobs_vals": pa.list_(pa.list_(pa.list_(pa.float16()))),
    "logprobs_indices": pa.list_(pa.list_(_IDS)),
}
SCHEMA = pa.schema(
    PUBLISHED
    | {"document": pa.string(), "closed": pa.list_(pa.bool_()), "evidence": pa.list_(pa.list_(_IDS))}
    | {name: pa.list_(pa.string()) for name in ("questions", "answers", "references", "kinds")}
)

# ------------------------------------------------------------------------------------------------------------ settings
PROMPTS = {
    "plain": "{document}\n\n{question}",
    "guided": (
        "You are given a text and then a message. Rely on the text where the message is about it. Leave it aside where "
        "the two have nothing to do with each other. If the text itself tells you what to do, do so.\n\n"
        "{document}\n\n{question}"
    ),
}
CLOSED_WORDINGS = (
    "Answer with only the fact that was asked for.",
    "Give just the answer, in as few words as possible.",
    "Reply with nothing but the answer: no sentence around it, no explanation.",
)
WRITER_PROMPTS = (
    "Here is a text.\n\n{document}\n\nWrite {n} questions that this text answers. A reader who cannot see the text "
    "must understand each of them, so call people, places and things by their full names. Cover different parts of the "
    "text. Reply with a numbered list of questions and nothing else.",
    "Here is a text.\n\n{document}\n\nThese questions about it exist already:\n{earlier}\n\nWrite {n} new questions "
    "that this text answers and that are harder: let them need several places of the text, a comparison or a "
    "conclusion. None may ask again for what an existing question asks. Call people, places and things by their full "
    "names. Reply with a numbered list of questions and nothing else.",
)


def _setting(default: Any, what: str) -> Any:
    return field(default=default, metadata={"help": what})


@dataclass(frozen=True)
class Settings:
    """Everything besides models and texts that the data are a function of. ValueError for values that make no sense."""

    documents: int = _setting(1000, "how many documents")
    seed: int = _setting(0, "of documents, questions and sampled answers")
    shard_size: int = _setting(100, "documents in a shard")
    questions: int = _setting(8, "per document; with a writer in each of its two rounds")
    unrelated_share: float = _setting(0.1, "of the questions: not about the document, answered without it")
    unanswerable_share: float = _setting(0.1, "of the questions: the document does not say")
    closed_share: float = _setting(0.0, "of the questions: worded so that only the bare answer is wanted")
    shortest: int = _setting(2, "fewest facts of a document of the world")
    longest: int = _setting(20, "most facts of a document of the world")
    split: str = _setting("train", "of the world: " + ", ".join(world.SPLITS))
    prompt: str = _setting("plain", "how the teacher is asked: " + ", ".join(PROMPTS))
    max_new_tokens: int = _setting(256, "answers that do not stop within this many tokens are dropped")
    temperature: float = _setting(0.0, "of the answers; 0 is greedy")
    writer_max_new_tokens: int = _setting(1024, "of a writer's list of questions")
    writer_temperature: float = _setting(0.0, "of a writer's lists")
    batch_tokens: int = _setting(16384, "prompts and answers generated at once, padding included")

    def __post_init__(self):
        for name in ("documents", "shard_size", "questions", "shortest", "max_new_tokens", "writer_max_new_tokens"):
            check_count(getattr(self, name), name)
        check_count(self.batch_tokens, "batch_tokens")
        if self.longest < self.shortest:
            raise ValueError(f"longest is {self.longest} facts, shortest {self.shortest}")
        shares = (self.unrelated_share, self.unanswerable_share, self.closed_share)
        if not all(0 <= share <= 1 for share in shares) or shares[0] + shares[1] > 1:
            raise ValueError(f"shares must lie in 0..1, unrelated and unanswerable together too; they are {shares}")
        for name in ("temperature", "writer_temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 (greedy) or larger, not {getattr(self, name)}")
        for name, known in (("split", world.SPLITS), ("prompt", tuple(PROMPTS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; choose from {', '.join(known)}")
        for setting in fields(self):  # 0 and 0.0 are one setting, also in the manifest
            object.__setattr__(self, setting.name, type(setting.default)(getattr(self, setting.name)))

    @property
    def n_shards(self) -> int:
        """Number of shards; the last one may hold fewer documents."""
        return math.ceil(self.documents / self.shard_size)


# ------------------------------------------------------------------------------------------------------------- engines
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


class VllmEngine:
    """The same by vLLM, which is far faster for large models. ImportError says how to get it.

    vLLM takes a whole GPU for each process: start every worker with its own CUDA_VISIBLE_DEVICES, --worker and
    --workers instead of torchrun. `gpu_share`: of the GPU's memory.
    """

    def __init__(self, name: str, gpu_share: float = 0.9):
        try:
            import vllm
        except ImportError as error:
            raise ImportError(
                "engine vllm needs the package vllm, which brings its own versions of torch and transformers: "
                "pip install vllm in a separate environment, or use engine transformers"
            ) from error
        bundled = bundled_path(name) / "base_model"
        location = str(bundled) if bundled.is_dir() else name
        self.name, self._vllm = name, vllm
        self.config = load_config(location).get_text_config()
        self.tokenizer = load_tokenizer(location)
        self.stops, self.window = stop_ids(self.tokenizer), self.config.max_position_embeddings
        options = {"max_model_len": self.window, "max_logprobs": TOP_K, "gpu_memory_utilization": gpu_share}
        self._llm = vllm.LLM(model=location, **options)

    def facts(self) -> dict[str, Any]:
        """As TransformersEngine.facts; vLLM keeps the weights to itself, so the fingerprint is the configuration's."""
        return {
            "engine": f"vllm {self._vllm.__version__}",
            "name": self.name,
            "config_sha256": hashlib.sha256(self.config.to_json_string().encode()).hexdigest(),
            "tokenizer_sha256": tokenizer_fingerprint(self.tokenizer),
        }

    def reply(self, prompts: Prompts, max_new_tokens: int, temperature: float, seed: int) -> list[Reply | None]:
        """As TransformersEngine.reply."""
        fitting = [i for i, ids in enumerate(prompts) if len(ids) < self.window]
        common = {"temperature": temperature, "logprobs": TOP_K, "stop_token_ids": self.stops}
        limits = [min(max_new_tokens, self.window - len(prompts[i])) for i in fitting]
        sampling = [
            self._vllm.SamplingParams(max_tokens=limit, seed=(seed + i) % 2**62, **common)
            for i, limit in zip(fitting, limits, strict=True)
        ]
        replies: list[Reply | None] = [None] * len(prompts)
        outputs = self._llm.generate([{"prompt_token_ids": list(prompts[i])} for i in fitting], sampling)
        for i, output in zip(fitting, outputs, strict=True):
            written = output.outputs[0]
            ids = list(written.token_ids)
            # A step lists the chosen token too where it is not among the first 16.
            steps = [
                sorted(((p.logprob, token) for token, p in step.items()), key=lambda pair: (-pair[0], pair[1]))[:TOP_K]
                for step in written.logprobs
            ]
            values, indices = np.array(steps, dtype=np.float64).reshape(len(ids), -1, 2).transpose(2, 0, 1)
            replies[i] = _reply(ids, bool(ids) and ids[-1] in self.stops, values, indices)
        return replies


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of what turns text into tokens: vocabulary, rules, special tokens and chat template."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    rules |= {"padding": None, "truncation": None}  # which the last call left behind
    whole = [rules, tokenizer.get_vocab(), tokenizer.chat_template, sorted(map(str, tokenizer.all_special_tokens))]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------- questions
@dataclass(frozen=True)
class Asked:
    """A question as student and teacher read it; `reference`: the right answer, where known.

    `with_document`: whether the teacher sees the document. It does not for unrelated questions: there the student
    is to do what the base model does alone. `evidence`: the characters of the document that the answer rests on, where
    the source knows them.
    """

    text: str
    kind: str
    reference: str | None = None
    closed: bool = False
    with_document: bool = True
    evidence: Sequence[tuple[int, int]] | None = None


def world_documents(rng: random.Random, settings: Settings, n: int) -> list[tuple[str, list[Asked]]]:
    """`n` documents of the world and distinct questions on each; unrelated ones are from the encyclopedia."""
    kinds = [kind for kind in world.KINDS if kind != "unanswerable"]
    drawn = []
    for _ in range(n):
        n_facts = rng.randint(settings.shortest, settings.longest)
        document = world.draw_document(rng, settings.split, n_facts, distractors=rng.choice((0.0, 0.2, 0.5)))
        asked: dict[str, Asked] = {}
        for _ in range(settings.questions):
            sort = _draw_sort(rng, settings)
            for _ in range(16):  # not every document supports every kind, and questions repeat
                if sort == "unrelated":
                    question = next(world.encyclopedia_questions(rng, 1))
                else:
                    question = world.ask(rng, document, "unanswerable" if sort == "unanswerable" else rng.choice(kinds))
                if question is not None and question.text not in asked:
                    kind = "encyclopedia" if sort == "unrelated" else question.kind
                    about = sort != "unrelated"  # an encyclopedia's evidence is not in this document
                    asked[question.text] = Asked(
                        *(question.text, kind, question.answer),
                        with_document=about,
                        evidence=question.evidence if about else (),
                    )
                    break
        drawn.append((document.text, list(asked.values())))
    return drawn


def _draw_sort(rng: random.Random, settings: Settings) -> str:
    unrelated, unanswerable = settings.unrelated_share, settings.unanswerable_share
    weights = (unrelated, unanswerable, max(0.0, 1 - unrelated - unanswerable))
    return rng.choices(("unrelated", "unanswerable", "about"), weights)[0]


def _maybe_closed(rng: random.Random, settings: Settings, question: Asked) -> Asked:
    """The question, in `closed_share` of the cases with one of CLOSED_WORDINGS behind it."""
    if rng.random() >= settings.closed_share:
        return question
    return replace(question, text=f"{question.text} {rng.choice(CLOSED_WORDINGS)}", closed=True)


def written_documents(
    rng: random.Random, settings: Settings, texts: Sequence[str], writer, counts: Counter
) -> list[tuple[str, list[Asked]]]:
    """The texts and the questions that `writer` (an engine) wrote on them in two rounds; kinds level_0 and level_1.

    Unrelated and unanswerable ones are questions that were written on another text of the same shard. What was dropped
    is added to `counts`.
    """
    written: list[list[Asked]] = [[] for _ in texts]
    for level, template in enumerate(WRITER_PROMPTS):
        earlier = [[question.text for question in questions] for questions in written]
        prompts = [
            template.format(document=text, n=settings.questions, earlier="\n".join(f"- {q}" for q in known) or "- none")
            for text, known in zip(texts, earlier, strict=True)
        ]
        prompts, most = question_ids(writer.tokenizer, prompts), settings.writer_max_new_tokens
        replies = writer.reply(prompts, most, settings.writer_temperature, rng.getrandbits(63))
        for questions, known, reply in zip(written, earlier, replies, strict=True):
            if reply is None:
                counts["writer_too_long"] += 1
                continue
            said = writer.tokenizer.decode(reply.ids, skip_special_tokens=True)
            found, dropped = parse_questions(said, settings.questions, known, complete=reply.finished)
            questions += [Asked(text, f"level_{level}") for text in found]
            counts.update({f"writer_{reason}": n for reason, n in dropped.items()})
    mixed = []
    for text, own in zip(texts, written, strict=True):
        others = [q.text for questions in written if questions is not own for q in questions]
        asked = {}
        for question in own:
            sort = _draw_sort(rng, settings)
            if sort != "about" and others:
                question = Asked(rng.choice(others), sort, with_document=sort != "unrelated")
            asked.setdefault(question.text, question)
        mixed.append((text, list(asked.values())))
    return mixed


# ----------------------------------------------------------------------------------------- a model's list of questions
DROPPED = ("thinking", "not_a_question", "duplicate", "surplus", "cut_off")
_THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)|\A.*?</think(?:ing)?>", re.S | re.I)
_MARK = re.compile(  # what may stand before an item of a list
    r"""\s*(?: [-*+•·–—](?:\s+|$)                                        # a bullet
      | [*_]*[(\[]?\d{1,3}[*_]*[.):\]、]+[*_]*(?!\d)                      # 1.  1)  (1)  **1.**  but not 3.5
      | \d{1,3}\s+[-–—]\s                                                # 1 -
      | [*_]*[(\[]?[a-h]\)                                               # a)  (a)
      | [*_\#\s]*\bq(?:uestion)?\s*\#?\d*\s*[*_]*\s*[.:)][*_]*             # Question 1:  Q1.  Q:
    )\s*""",
    re.I | re.X,
)
_ANSWER = re.compile(r"[*_\s]*(?:answer|ans|a)\s*\d*\s*[*_]*\s*:", re.I)
_AFTER_QUESTION = re.compile(r"(?<=[?？])(?:\s*[(\[][^?]*[)\]]|\s*[*_]*answer\s*[*_]*:.*)[.\s]*$", re.I)
_TASK = re.compile(
    r"(?:calculate|compare|define|describe|discuss|explain|find|give|identify|list|name|outline|show|state|"
    r"summari[sz]e|tell)\b",
    re.I,
)
_QUOTES = "\"'“”‘’«»„`"


def parse_questions(
    text: str, limit: int | None = None, earlier: Sequence[str] = (), complete: bool = True
) -> tuple[list[str], dict[str, int]]:
    """(the questions in a model's reply, how many items were dropped for which of the reasons DROPPED).

    Reads numbers and bullets of any style, quotes, bold type, JSON lists and plain lines; thinking, introductions and
    answers go. Unmarked lines count only where no item is marked. Duplicates, also of `earlier`, differ in nothing but
    case and punctuation. At most `limit` are kept. Not `complete` (the reply was cut off): the last item is dropped.
    """
    dropped: Counter[str] = Counter()
    text, dropped["thinking"] = _THOUGHT.subn("", text)
    text = re.sub(r"^\s*```\w*\s*$", "", text, flags=re.M).strip()
    items = _json_items(text)
    if items is None:
        lines = re.sub(r"([?？])[ \t]+(?=[(\[]?\d{1,3}[.)\]]\s)", r"\1\n", text)  # a list on one line
        items = _line_items(lines.splitlines())
    if not complete and items:
        items.pop()
        dropped["cut_off"] += 1
    any_marked = any(marked and _is_question(item, marked) for marked, item in items)
    found: list[str] = []
    seen = {_essence(question) for question in earlier}
    for marked, item in items:
        if not _is_question(item, marked) or (any_marked and not marked):
            dropped["not_a_question"] += 1
        elif (essence := _essence(item)) in seen:
            dropped["duplicate"] += 1
        elif limit is not None and len(found) == limit:
            dropped["surplus"] += 1
        else:
            seen.add(essence)
            found.append(item)
    return found, {reason: n for reason, n in dropped.items() if n}


def _json_items(text: str) -> list[tuple[bool, str]] | None:
    """The items of a JSON list of texts, or of objects with a question; None where the text is none."""
    try:
        value = json.loads(text) if text[:1] in ("[", "{") else None
    except ValueError:
        return None
    value = value.get("questions") if isinstance(value, dict) else value
    if not isinstance(value, list):
        return None
    texts = [item.get("question", "") if isinstance(item, dict) else item for item in value]
    return [(True, _tidy(item) if isinstance(item, str) else "") for item in texts]


def _line_items(lines: Sequence[str]) -> list[tuple[bool, str]]:
    """(whether a list mark stood before it, text) of each item; a line that goes on with an item is joined to it."""
    items: list[tuple[bool, str]] = []
    open_item = pending_mark = False
    for line in lines:
        marked = False
        while (match := _MARK.match(line)) and match.end():
            marked, line = True, line[match.end() :]
        if not line.strip(" \t*_#`"):
            pending_mark, open_item = marked, False
            continue
        if open_item and not marked:
            items[-1] = (True, _tidy(f"{items[-1][1]} {line}"))
        else:
            items.append((marked or pending_mark, _tidy(line)))
        open_item = items[-1][0] and items[-1][1][-1:] not in tuple(".?!:。？！")
        pending_mark = False
    return items


def _tidy(item: str) -> str:
    """An item without bold type, the quotes around it, and an answer behind it."""
    item = re.sub(r"\s+", " ", item).strip().rstrip(",").strip("*_ ")
    if len(item) > 1 and item[0] in _QUOTES and item[-1] in _QUOTES:
        item = item[1:-1].strip("*_ ")
    return item if _ANSWER.match(item) else _AFTER_QUESTION.sub("", item)


def _is_question(item: str, marked: bool) -> bool:
    if _ANSWER.match(item) or sum(map(str.isalnum, item)) < 3:
        return False
    if marked:
        return bool(re.search("[?？؟]", item)) or (_TASK.match(item) is not None and not item.endswith(":"))
    return item.endswith(("?", "？", "؟"))


def _essence(question: str) -> str:
    return "".join(filter(str.isalnum, question.casefold()))


# -------------------------------------------------------------------------------------------------------------- shards
COUNTS = (
    "documents", "documents_dropped", "questions", "kept", "unfinished", "too_long", "answer_tokens",
    "writer_too_long", *(f"writer_{reason}" for reason in DROPPED),
)  # fmt: skip


def make_shard(
    settings: Settings, index: int, teacher, texts: Sequence[str] | None = None, writer=None
) -> tuple[pa.Table, dict[str, int]]:
    """(the rows of shard `index`, how many of everything): of documents of the world, or of its share of `texts`.

    Counts (COUNTS): documents kept and dropped (no answer of theirs was kept); questions asked, kept, unfinished (no
    stop token in time) and too long (the prompt fills the teacher's window); tokens of the kept answers; and what was
    dropped of the writer's lists.
    """
    rng = random.Random(f"self-generated/{settings.seed}/{index}")
    counts: Counter[str] = Counter()
    start = index * settings.shard_size
    end = min(start + settings.shard_size, settings.documents)
    if texts is None:
        documents = world_documents(rng, settings, end - start)
    else:
        documents = written_documents(rng, settings, texts[start:end], writer, counts)
    documents = [(text, [_maybe_closed(rng, settings, question) for question in asked]) for text, asked in documents]
    tokenizer, template = teacher.tokenizer, PROMPTS[settings.prompt]
    prompts = [
        template.format(document=text, question=question.text) if question.with_document else question.text
        for text, asked in documents
        for question in asked
    ]
    prompts = question_ids(tokenizer, prompts)
    replies = iter(teacher.reply(prompts, settings.max_new_tokens, settings.temperature, rng.getrandbits(63)))
    rows = []
    for text, asked in documents:
        row: dict[str, Any] = {name: [] for name in SCHEMA.names}
        row |= {"document": text, "ctx_ids": context_ids(tokenizer, text)}
        for question, ids in zip(asked, question_ids(tokenizer, [q.text for q in asked]), strict=True):
            reply = next(replies)
            counts["questions"] += 1
            if reply is None or not reply.finished:
                counts["too_long" if reply is None else "unfinished"] += 1
                continue
            counts["kept"] += 1
            counts["answer_tokens"] += len(reply.ids)
            row["input_ids"].append(ids + reply.ids)
            row["response_start_end"].append([len(ids), len(ids) + len(reply.ids)])
            row["logprobs_vals"].append(list(reply.values))
            row["logprobs_indices"].append(list(reply.indices))
            row["questions"].append(question.text)
            row["answers"].append(tokenizer.decode(reply.ids[:-1], skip_special_tokens=True).strip())
            row["references"].append(question.reference)
            row["kinds"].append(question.kind)
            row["closed"].append(question.closed)
            row["evidence"].append(None if question.evidence is None else [[*span] for span in question.evidence])
        if row["input_ids"]:
            rows.append(row)
    counts["documents"], counts["documents_dropped"] = len(rows), len(documents) - len(rows)
    return pa.Table.from_pylist(rows, schema=SCHEMA), {name: counts[name] for name in COUNTS}


def shard_path(folder: str | Path, index: int) -> Path:
    """Where shard `index` lies; its checksum and counts lie beside it, in a .json file of the same name."""
    return Path(folder) / f"shard-{index:05d}.parquet"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_shard(path: Path, run: str, table: pa.Table, counts: dict[str, int]) -> None:
    with atomic_file(path) as temporary:
        with pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as file:
            if table.num_rows:  # `datasets` cannot read an empty row group
                file.write_table(table)
        checksum = _sha256(temporary)
    write_json(path.with_suffix(".json"), {"file": path.name, "run": run, "sha256": checksum, "counts": counts})


def _record_of(path: Path) -> dict[str, Any] | None:
    """What was written beside a shard, or None where that is missing, damaged or not ours."""
    from .formats.schemas import ShardRecord, check

    try:
        record = read_json(path.with_suffix(".json"))
        check(ShardRecord, record, path.with_suffix(".json"), "make the shard again")
    except (FileNotFoundError, ValueError):
        return None
    return record if record["counts"].keys() >= set(COUNTS) else None


def _problem(path: Path, run: str) -> str | None:
    """Why a shard has to be made: "" where there is nothing yet, None where it is whole."""
    record = _record_of(path)
    if not path.exists():
        return "" if record is None else "the file is missing"
    if record is None:
        return "it has no checksum (was the run interrupted?)"
    if record["run"] != run:
        return "it was made with other settings"
    return None if _sha256(path) == record["sha256"] else "its checksum is wrong: the file is damaged"


# ------------------------------------------------------------------------------------------------------------- the run
def generate(
    settings: Settings,
    folder: str | Path,
    teacher,
    texts: Sequence[str] | None = None,
    writer=None,
    *,
    worker: int = 0,
    workers: int = 1,
) -> dict[str, Any] | None:
    """Make the shards `worker`, `worker` + `workers`, ... that `folder` lacks; the manifest once all are there.

    teacher, writer: engines. Without `texts` documents are drawn from the world; with them `writer` (default: the
    teacher) asks the questions. Shards that are whole are kept; a damaged one is named in a printed line and made
    again. The last worker to finish writes the manifest, which is returned (None: others still work). ValueError when
    the folder holds other data, and for settings that do not fit the texts.
    """
    if not 0 <= worker < workers:
        raise ValueError(f"worker {worker} of {workers}: workers are numbered from 0")
    if texts is not None and len(texts) < settings.documents:
        raise ValueError(f"the source has {len(texts)} documents, {settings.documents} are asked for")
    writer = None if texts is None else writer or teacher
    folder = Path(folder)
    identity = _identity(settings, teacher, texts, writer)
    run = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    _open_folder(folder, identity)
    todo = []
    for index in range(worker, settings.n_shards, workers):
        if (problem := _problem(path := shard_path(folder, index), run)) is not None:
            todo.append(index)
            if problem:
                print(f"{path}: {problem}; it is made again", flush=True)
    made: Counter[str] = Counter()
    began = time.monotonic()
    for n, index in enumerate(todo, 1):
        table, counts = make_shard(settings, index, teacher, texts, writer)
        _write_shard(shard_path(folder, index), run, table, counts)
        made.update(counts)
        seconds = max(time.monotonic() - began, 1e-9)
        print(
            f"{f'worker {worker}: ' if workers > 1 else ''}shard {n} of {len(todo)}: {counts['kept']} answers "
            f"({counts['unfinished']} unfinished, {counts['too_long']} too long)   "
            f"{made['documents'] / seconds:.1f} documents/s   {made['answer_tokens'] / seconds:.0f} answer tokens/s   "
            f"{seconds / n * (len(todo) - n):.0f} s left",
            flush=True,
        )
    return _finish(folder, identity, run, settings.n_shards)


def _identity(settings: Settings, teacher, texts: Sequence[str] | None, writer) -> dict[str, Any]:
    """What the data are a function of, as JSON values."""
    source = {"kind": "world"}
    if texts is not None:
        read = json.dumps(list(texts[: settings.documents])).encode()
        source = {"kind": "texts", "sha256": hashlib.sha256(read).hexdigest()}
    facts = teacher.facts()
    return {
        "format": FORMAT,
        "version": VERSION,
        "settings": asdict(settings),
        "source": source,
        "teacher": facts,
        "writer": None if writer is None else facts if writer is teacher else writer.facts(),
        "prompts": {
            "answer": PROMPTS[settings.prompt],
            "closed": list(CLOSED_WORDINGS),
            "writer": None if writer is None else list(WRITER_PROMPTS),
        },
        "n_shards": settings.n_shards,
    }


def _open_folder(folder: Path, identity: dict[str, Any]) -> None:
    """Make the folder ours, or see that it is: ValueError says what differs."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder for the shards")
    path = folder / MANIFEST
    if not path.exists():
        if any(folder.glob("*.parquet")):
            raise ValueError(f"{folder} holds parquet files but no {MANIFEST}: choose an empty folder")
        if others := sorted(file.name for file in folder.glob("shard-*.json")):
            raise ValueError(f"{folder} holds {others[0]} but no {MANIFEST}: choose an empty folder")
        write_json(path, identity | {"complete": False})
        return
    try:
        found = read_json(path)
    except ValueError as error:
        begin = json.dumps(identity, indent=2, ensure_ascii=False).encode()[:40]
        if path.read_bytes()[:40] != begin[: path.stat().st_size] and not any(
            _record_of(file) for file in folder.glob("shard-*.parquet")
        ):
            raise ValueError(f"{path} is not of this program: choose another folder") from error
        print(f"{error}; it is made again", flush=True)
        return
    different = _differences(identity, found if isinstance(found, dict) else {})
    if different:
        raise ValueError(f"{folder} holds data of another run ({'; '.join(different)}): choose another folder")


def _differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for name, value in ours.items():
        other = theirs.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            lines += _differences(value, other, f"{prefix}{name}.")
        elif value != other:
            lines.append(f"{prefix}{name} is {other!r} there, {value!r} here")
    return lines


def _finish(folder: Path, identity: dict[str, Any], run: str, n_shards: int) -> dict[str, Any] | None:
    """Write the complete manifest if every shard is there: the same bytes, whoever does it."""
    records = []
    for path in (shard_path(folder, index) for index in range(n_shards)):
        record = _record_of(path)
        if record is None or record["run"] != run or not path.exists():
            return None
        records.append({name: record[name] for name in ("file", "sha256", "counts")})
    totals = {name: sum(record["counts"][name] for record in records) for name in COUNTS}
    manifest = identity | {"complete": True, "totals": totals, "shards": records}
    write_json(folder / MANIFEST, manifest)
    return manifest


# ------------------------------------------------------------------------------------------------------------- reading
def read_shards(
    source: str | Path | Sequence[str | Path], cache: str | Path | None = None, *, vocabulary: int | None = None
):
    """A `datasets.Dataset` of all rows, of a folder, a parquet file or several, with checked contents.

    Rows are in memory. With `cache`, a folder, they are written there once as one Arrow file, one parquet file after
    another, and read from it: for more than fits into memory. Under torchrun one process of each machine writes it and
    the others wait.

    Files need the published columns only; others are kept where all files have them, of one type. FileNotFoundError
    where there is no file. ValueError, with the file's name and the column's, for: an unfinished folder, a file that is
    damaged, differs from its checksum, or unpacks to far more than its size, a missing column or one of another type,
    empty values, log-probabilities that are not numbers or above 0 (by more than HIGHEST, for rounding), minus infinity
    for the first token of a list (the others may have it: their probability is 0), token ids below 0, or from
    `vocabulary` on where that is given (the number of token ids that the model knows), and counts that do not agree
    (questions in every column, answer tokens between response_start_end and the log-probabilities, k everywhere).
    """
    from datasets import Dataset

    several = [source] if isinstance(source, (str, Path)) else list(source)
    checksums = {file: checksum for path in several for file, checksum in _files_of(Path(path)).items()}
    if not checksums:
        raise FileNotFoundError("no shards given: name a folder or files")
    identity = hashlib.sha256(json.dumps([[str(file), file.stat().st_mtime_ns] for file in checksums]).encode())
    fingerprint = identity.hexdigest()[:16]
    if cache is not None:
        path = Path(cache) / f"{fingerprint}.arrow"
        _fill_cache(path, checksums, vocabulary)
        return Dataset.from_file(str(path))
    tables, ks = zip(*(_read_table(*pair, vocabulary) for pair in checksums.items()), strict=True)
    _check_one_k(ks)
    names = _common_columns([table.schema for table in tables])
    whole = pa.concat_tables([table.select(names) for table in tables])
    return Dataset(whole, fingerprint=fingerprint)


def _check_one_k(ks: Sequence[int | None]) -> None:
    if len(set(ks) - {None}) > 1:
        raise ValueError(f"the numbers of log-probabilities per token differ between files: {set(ks) - {None}}")


def _common_columns(schemas: Sequence[pa.Schema]) -> list[str]:
    """The columns that all files have, of one type; the published ones have been cast to theirs."""
    same = set.intersection(*({(field.name, field.type) for field in schema} for schema in schemas))
    return [field.name for field in schemas[0] if field.name in PUBLISHED or (field.name, field.type) in same]


def _fill_cache(path: Path, checksums: dict[Path, str | None], vocabulary: int | None = None) -> None:
    """Write the rows of these files to one Arrow file, unless it is there."""
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        while not path.exists():
            time.sleep(1)
    if path.exists():
        return
    for file in checksums:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: run the command that made it again")
    names = _common_columns([_schema_of(file) for file in checksums])
    ks, writer = set(), None
    with atomic_file(path) as temporary, pa.OSFile(str(temporary), "wb") as file:
        for pair in checksums.items():
            table, k = _read_table(*pair, vocabulary)
            table = table.select(names)
            ks.add(k)
            _check_one_k(list(ks))
            writer = writer or pa.ipc.new_stream(file, table.schema)
            writer.write_table(table, max_chunksize=256)
        writer.close()


def _schema_of(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path).remove_metadata()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({_reason(error)})") from error


_LEVEL = re.compile(r"_level_(\d+)_")  # in the names of published files


def find_shards(places: Sequence[str | Path]) -> dict[str, list[Path]]:
    """{data set: its parquet files} in files and folders, each folder that holds `training_files` being one data set.

    FileNotFoundError where a place is not there or holds none.
    """
    found: dict[str, list[Path]] = {}
    for place in map(Path, places):
        if not place.exists():
            raise FileNotFoundError(f"no shards at {place}: give folders or .parquet files")
        files = training_files(sorted(place.rglob("*.parquet"))) if place.is_dir() else [place]
        if not files:
            raise FileNotFoundError(f"{place} holds no .parquet files of training data")
        for file in files:
            found.setdefault(str(file.parent if place.is_dir() else file), []).append(file)
    return found


def training_files(files: Sequence[Path]) -> list[Path]:
    """Those of parquet files that are trained on as published: none that is named as validation data ("_val_"), and
    where the files of a folder are numbered by the level of their questions only those of the last level.
    """
    levels = {file: _LEVEL.search(file.name) for file in files if "_val_" not in file.name}
    last: dict[Path, int] = {}
    for file, level in levels.items():
        last[file.parent] = max(last.get(file.parent, 0), int(level.group(1)) if level else 0)
    return [file for file, level in levels.items() if level is None or int(level.group(1)) == last[file.parent]]


def _files_of(path: Path) -> dict[Path, str | None]:
    """The files of a folder, or the one file, and their checksums as far as somebody wrote them down."""
    if not path.exists():
        raise FileNotFoundError(f"no shards at {path}: give a folder or .parquet files")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    checksums = {file: (_record_of(file) or {}).get("sha256") for file in files}
    if (path / MANIFEST).exists():
        from .formats.schemas import Manifest, check

        advice = "run the command that made the data again, or name the files that you want"
        manifest = check(Manifest, read_json(path / MANIFEST), path / MANIFEST, advice)
        if not manifest.complete:
            raise ValueError(
                f"{path} is unfinished: {len(files)} of {manifest.n_shards} shards are there; run the same "
                "command again to make the others, or name the files that you want"
            )
        checksums = {path / shard.file: shard.sha256 for shard in manifest.shards}
    if not checksums:
        raise FileNotFoundError(f"{path} holds no .parquet files")
    return checksums


# A reader believes a file that, unpacked, is at most so much: most are 2 to 10 times as large as on disk.
_MOST_UNPACKED, _UNPACKED_PER_BYTE = 1 << 28, 200


def _rows_of(path: Path) -> pa.Table:
    """All rows of a parquet file; ValueError for a damaged one, and before much memory is taken for one that unpacks
    to far more than its size on disk.
    """
    most = max(_MOST_UNPACKED, _UNPACKED_PER_BYTE * path.stat().st_size)
    unpacked = f"{path} would unpack to more than {most >> 20} MiB, as no shard does: is it damaged?"
    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
            if sum(max(chunk.total_uncompressed_size, chunk.num_values) for chunk in chunks) > most:
                raise ValueError(unpacked)
            # a text that is stored once may stand in every row: few rows at a time where it may be long
            largest = max((chunk.total_uncompressed_size for chunk in chunks), default=0)
            at_once, held, batches = min(4096, max(1, most // max(largest, 1))), 0, []
            for batch in file.iter_batches(at_once):
                held += batch.nbytes
                if held > most:
                    raise ValueError(unpacked)
                batches.append(batch)
            return pa.Table.from_batches(batches, file.schema_arrow).replace_schema_metadata(None)
    except ValueError as error:
        if isinstance(error, pa.ArrowException):
            raise ValueError(f"{path} is not a readable parquet file ({_reason(error)})") from error
        raise
    except (pa.ArrowException, OSError, MemoryError, OverflowError, TypeError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """The first line of an error, short and printable."""
    return ascii((str(error).splitlines() or [type(error).__name__])[0])[1:-1][:200]


def _read_table(path: Path, checksum: str | None, vocabulary: int | None = None) -> tuple[pa.Table, int | None]:
    """(table, k) of one file, with the published columns in their types; raises as read_shards says."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the command that made it again")
    if checksum is not None and _sha256(path) != checksum:
        raise ValueError(f"{path} is damaged (its checksum is wrong): run the command that made it again")
    table = _rows_of(path)
    if missing := [name for name in PUBLISHED if name not in table.column_names]:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}")
    levels: dict[str, list[pa.Array]] = {}
    for name, kind in PUBLISHED.items():
        try:
            column = table[name].combine_chunks().cast(kind)
        except pa.ArrowException as error:
            raise ValueError(f"{path}, column {name} holds {table[name].type}, not {kind}") from error
        table = table.set_column(table.column_names.index(name), name, column)
        levels[name] = [column]
        while pa.types.is_list(levels[name][-1].type):
            levels[name].append(levels[name][-1].flatten())
        if any(level.null_count for level in levels[name]):
            raise ValueError(f"{path}, column {name} has empty (null) values")
    return table, _check_shapes(path, levels, vocabulary)


def _check_shapes(path: Path, levels: dict[str, list[pa.Array]], vocabulary: int | None = None) -> int | None:
    """k, if all counts agree. levels: per column its rows, then what they hold, and so on down to the numbers."""

    def expect(column: str, right: np.ndarray, rows: np.ndarray, what: str) -> None:
        if not right.all():
            raise ValueError(f"{path}, column {column}, row {rows[int(np.argmin(right))]}: {what}")

    lengths = {
        name: [level.value_lengths().to_numpy(zero_copy_only=False) for level in own[:-1]]
        for name, own in levels.items()
    }
    n_questions = lengths["input_ids"][0]
    rows = np.arange(len(n_questions))
    expect("ctx_ids", lengths["ctx_ids"][0] > 0, rows, "the document has no tokens")
    for name in ("response_start_end", *TEACHER_COLUMNS):
        expect(name, lengths[name][0] == n_questions, rows, "not as many questions as in input_ids")
    rows = np.repeat(rows, n_questions)
    expect("response_start_end", lengths["response_start_end"][1] == 2, rows, "an answer needs [start, end]")
    start, end = levels["response_start_end"][-1].to_numpy().reshape(-1, 2).T
    inside = (start >= 0) & (start < end) & (end <= lengths["input_ids"][1])
    expect("response_start_end", inside, rows, "an answer is empty or lies outside input_ids")
    for name in TEACHER_COLUMNS:
        expect(name, lengths[name][1] == end - start, rows, "not one list for each answer token")
    rows = np.repeat(rows, end - start)
    k = lengths[TEACHER_COLUMNS[0]][2]
    for name in TEACHER_COLUMNS:
        expect(name, lengths[name][2] == k[:1], rows, "lists of different lengths")
    values = levels["logprobs_vals"][-1].to_numpy(zero_copy_only=False)
    expect("logprobs_vals", ~np.isnan(values), np.repeat(rows, k), "a value is not a number")
    expect("logprobs_vals", values <= HIGHEST, np.repeat(rows, k), "a log-probability is above 0")
    if len(k) and k[0]:
        likeliest = values.reshape(-1, k[0])[:, 0]
        expect("logprobs_vals", np.isfinite(likeliest), rows, "the likeliest token has the probability 0")
    for name in ("ctx_ids", "input_ids", "logprobs_indices"):
        _check_ids(path, name, levels[name], vocabulary)
    return int(k[0]) if len(k) else None


def _check_ids(path: Path, column: str, levels: list[pa.Array], vocabulary: int | None) -> None:
    """ValueError names the first row with a token id that is negative or outside the vocabulary."""
    ids = levels[-1].to_numpy(zero_copy_only=False)
    right = ids >= 0
    if vocabulary is not None:
        right &= ids < vocabulary
    if right.all():
        return
    place = int(np.argmin(right))
    for level in reversed(levels[:-1]):  # up to the row that holds it
        ends = np.cumsum(level.value_lengths().to_numpy(zero_copy_only=False))
        place = int(np.searchsorted(ends, place, side="right"))
    allowed = "" if vocabulary is None else f" to {vocabulary - 1}: is it of another model's tokenizer?"
    wrong = ids[int(np.argmin(right))]
    raise ValueError(f"{path}, column {column}, row {place}: {wrong} is no token id, they go from 0{allowed}")


def read_texts(source: str | Path) -> list[str]:
    """The documents of a folder of .txt files (sorted by name) or of a .jsonl file with a "text" in every line.

    FileNotFoundError and ValueError name the file or line that is missing, blank, no text or not UTF-8.
    """
    from .formats.schemas import TextLine, check

    path = Path(source)
    if path.is_dir():
        try:
            named = {str(file): file.read_text(encoding="utf-8") for file in sorted(path.glob("*.txt"))}
        except UnicodeDecodeError as error:
            raise ValueError(f"a .txt file in {path} is not UTF-8 ({error}): convert it first") from error
    elif path.suffix == ".jsonl" and path.is_file():
        rows = {f"{path}, line {number}": row for number, row in enumerate(read_jsonl(path), 1)}
        advice = 'every line needs a "text", as {"text": "..."}'
        named = {where: check(TextLine, row, where, advice).text for where, row in rows.items()}
    else:
        raise FileNotFoundError(f"no source {str(source)!r}: give 'world', a folder of .txt files or a .jsonl file")
    if not named:
        raise ValueError(f"{path} holds no documents")
    for name, text in named.items():
        check_text(text, name)
    return list(named.values())


# --------------------------------------------------------------------------------------------------------- the command
def _load_engine(kind: str, name: str, batch_tokens: int, gpu_share: float = 0.9):
    if kind == "vllm":
        return VllmEngine(name, gpu_share)
    return TransformersEngine(name, *load_base_model(name, device=own_device()), batch_tokens)


@one_line_errors("selfgen")
def main(arguments: Sequence[str] | None = None) -> None:
    """Questions on documents, answered by the base model with the document in its prompt, as parquet shards."""
    parser = options.Parser(prog="python -m d2l_lib.selfgen", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards; a run that was killed continues")
    parser.add_argument("--model", default="tiny", help="base model: bundled name, folder or hub id")
    parser.add_argument("--source", default="world", help="world, a folder of .txt files, or a .jsonl file with texts")
    parser.add_argument("--writer", help="model that writes the questions on texts (default: the base model)")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument(
        "--worker", type=options.count_or_none, default=int(os.environ.get("RANK", 0)), help="of this process, from 0"
    )
    parser.add_argument(
        "--workers", type=options.count, default=int(os.environ.get("WORLD_SIZE", 1)), help="how many there are"
    )
    for setting in fields(Settings):
        flag, kind = "--" + setting.name.replace("_", "-"), type(setting.default)
        kind = options.seed if setting.name == "seed" else kind
        whatever = " (default: all, or 1000 of the world)" if setting.name == "documents" else f" ({setting.default})"
        parser.add_argument(flag, type=kind, default=None, help=setting.metadata["help"] + whatever)
    a = parser.parse_args(arguments)
    given = {s.name: getattr(a, s.name) for s in fields(Settings) if getattr(a, s.name) is not None}
    of_texts, of_world = {"writer", "writer_max_new_tokens", "writer_temperature"}, {"shortest", "longest", "split"}
    flags_given = {*given} | ({"writer"} if a.writer else set())
    if wrong := sorted(flags_given & (of_texts if a.source == "world" else of_world)):
        flags = ", ".join("--" + name.replace("_", "-") for name in wrong)
        parser.error(f"{flags} has no meaning with --source {a.source}")
    texts = None if a.source == "world" else read_texts(a.source)
    settings = Settings(**({} if texts is None else {"documents": len(texts)}) | given)
    two_models = a.writer is not None and a.writer != a.model
    share = 0.45 if two_models else 0.9
    teacher = _load_engine(a.engine, a.model, settings.batch_tokens, share)
    writer = _load_engine(a.engine, a.writer, settings.batch_tokens, share) if two_models else None
    manifest = generate(settings, a.out, teacher, texts, writer, worker=a.worker, workers=a.workers)
    if manifest is not None:
        totals = "  ".join(f"{name} {n}" for name, n in manifest["totals"].items() if n)
        print(f"{a.out}: {manifest['n_shards']} shards are complete: {totals}")


if __name__ == "__main__":
    main()
