"""Scores: what the base model knows and reads, and what a generated adapter lets it answer.

Every function returns a table (pandas DataFrame) with one row per sample or per group; `summarise` turns samples into shares
with 95% Wilson intervals.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import time
from collections.abc import Sequence

import pandas as pd
import torch

from . import needles, world
from .documents import question_ids, stop_ids
from .records import project_root

BASE_TASKS = ("needle", "one_hop", "encyclopedia", "unanswerable", "unknown", "other_kinds")


# ------------------------------------------------------------------------------------------------------------- the basics
@torch.inference_mode()
def greedy_answers(model, tokenizer, prompts: Sequence[str], max_new_tokens: int = 24, batch_tokens: int = 16384) -> list[str]:
    """The base model's greedy answers to user turns `prompts`, batched by length with left padding.

    Prompts longer than the model's window are answered too: that is what the comparison beyond the window is about.
    """
    ids = [question_ids(tokenizer, prompt) for prompt in prompts]
    answers = [""] * len(ids)
    waiting = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    while waiting:
        batch = [waiting.pop()]
        longest = len(ids[batch[0]])
        while waiting and (len(batch) + 1) * longest <= batch_tokens:
            batch.append(waiting.pop())
        padded = torch.full((len(batch), longest), tokenizer.pad_token_id)
        for row, i in enumerate(batch):
            padded[row, longest - len(ids[i]) :] = torch.tensor(ids[i])
        generated = model.generate(
            input_ids=padded.to(model.device),
            attention_mask=(padded != tokenizer.pad_token_id).long().to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stop_ids(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )
        for row, i in enumerate(batch):
            answers[i] = tokenizer.decode(generated[row, longest:], skip_special_tokens=True).strip()
    return answers


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% Wilson score interval of a share; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share = right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(samples: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Exact match by the columns `by`: n, exact_match, low, high (95% Wilson interval)."""
    rows = []
    for key, group in samples.groupby(list(by), sort=False):
        right, n = int(group["correct"].sum()), len(group)
        low, high = wilson(right, n)
        rows.append({**dict(zip(by, key, strict=True)), "n": n, "exact_match": right / n, "low": low, "high": high})
    return pd.DataFrame(rows)


# --------------------------------------------------------------------------------------------------------- the base model
def base_model_samples(model, tokenizer, n: int, seed: int, split: str = "test", facts: tuple[int, int] = (2, 20)) -> pd.DataFrame:
    """`n` samples of each thing the base model should do; columns task, kind, length_tokens, question, answer, prediction, correct.

    Documents and unknown names are from `split`, with `facts` (fewest, most) facts each.
    """
    rng = random.Random(f"base model/{split}/{seed}")
    rows: list[dict] = []

    def add(task: str, kind: str, prompt: str, question: str, answer: str) -> None:
        rows.append({"task": task, "kind": kind, "prompt": prompt, "question": question, "answer": answer})

    for i in range(n):
        length = (64, 128, 256, 512, 980)[i % 5]
        haystack = needles.build_haystack(tokenizer, length, rng.random(), needles.draw_number(rng, split))
        add("needle", f"{length} tokens", f"{haystack.text}\n\n{haystack.question}", haystack.question, haystack.answer)
    quotas = {"one_hop": [*world.ONE_HOP_KINDS], "unanswerable": ["unanswerable"]}
    quotas["other_kinds"] = ["paraphrase", "two_hop", "yes_no", "which_of", "list"]
    for task, kinds in quotas.items():
        for kind in kinds:
            done = 0
            while done < math.ceil(n / len(kinds)):
                document = world.draw_document(rng, split, rng.randint(*facts))
                question = world.ask(rng, document, kind)
                if question is not None:
                    add(task, kind, f"{document.text}\n\n{question.text}", question.text, question.answer)
                    done += 1
    for question in world.encyclopedia_questions(rng, n):
        add("encyclopedia", question.kind, question.text, question.text, question.answer)
    for _ in range(n):
        question = world.unknown_question(rng, split)
        add("unknown", question.kind, question.text, question.text, question.answer)
    predictions = greedy_answers(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=48)
    for row, prediction in zip(rows, predictions, strict=True):
        row["length_tokens"] = len(tokenizer(row.pop("prompt"), add_special_tokens=False)["input_ids"])
        row["prediction"] = prediction
        row["correct"] = prediction == row["answer"]
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------------------------------- needles
def needle_samples(
    model, lengths: Sequence[int], n: int, seed: int, *, chunk_tokens: int | None = None, split: str = "test", batch: int = 20
) -> pd.DataFrame:
    """Exact match of Doc-to-LoRA on `n` haystacks per length; the haystack is internalized, the prompt is the question alone.

    Columns: method, length_tokens, depth (0 to 1), answer, prediction, correct, chunks, rank, seconds (per document, to
    internalize), seed.
    """
    rows = []
    for length in lengths:
        haystacks = list(needles.evaluation_set(model.tokenizer, length, n, seed, split))
        for start in range(0, n, batch):
            some = haystacks[start : start + batch]
            adapters, seconds = [], []
            for haystack in some:
                began = time.perf_counter()
                adapters += model.internalize_each([haystack.text], chunk_tokens=chunk_tokens)
                seconds.append(time.perf_counter() - began)
            predictions = model.answer([h.question for h in some], adapters, max_new_tokens=10)
            for haystack, adapter, prediction, took in zip(some, adapters, predictions, seconds, strict=True):
                rows.append(
                    _needle_row("Doc-to-LoRA", length, haystack, prediction, seed)
                    | {"chunks": len(adapter.blocks), "rank": adapter.rank, "seconds": round(took, 4)}
                )
    return pd.DataFrame(rows)


def needle_in_context_samples(model, lengths: Sequence[int], n: int, seed: int, split: str = "test") -> pd.DataFrame:
    """The same haystacks and questions put to the base model with the haystack in its prompt, also beyond its window."""
    rows = []
    for length in lengths:
        haystacks = list(needles.evaluation_set(model.tokenizer, length, n, seed, split))
        prompts = [f"{h.text}\n\n{h.question}" for h in haystacks]
        predictions = greedy_answers(model.base_model, model.tokenizer, prompts, max_new_tokens=10)
        rows += [_needle_row("in context", length, h, p, seed) for h, p in zip(haystacks, predictions, strict=True)]
    return pd.DataFrame(rows)


def _needle_row(method: str, length: int, haystack: needles.Haystack, prediction: str, seed: int) -> dict:
    return {
        "method": method,
        "length_tokens": length,
        "depth": round(haystack.depth, 4),
        "answer": haystack.answer,
        "prediction": prediction,
        "correct": needles.exact_match(prediction, haystack.answer),
        "seed": seed,
    }


def block_norms(adapter, haystack: needles.Haystack | None = None) -> pd.DataFrame:
    """Frobenius norm of every block's update, all layers and modules together; columns chunk, norm, holds_needle.

    ||B^T A||_F^2 = sum of (A A^T) * (B B^T): never forms the d_out x d_in product.
    """
    rows = []
    for i, block in enumerate(adapter.blocks):
        square = sum(
            float(((A @ A.transpose(1, 2)) * (block.B[m] @ block.B[m].transpose(1, 2))).sum()) for m, A in block.A.items()
        )
        inside = (
            haystack is not None
            and haystack.needle_span is not None
            and block.span[0] <= haystack.needle_span[0]
            and haystack.needle_span[1] <= block.span[1]
        )
        rows.append({"chunk": i, "norm": abs(block.weight) * adapter.scale * math.sqrt(max(0.0, square)), "holds_needle": inside})
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------------------------- cost
def measure_internalization(source: str, length_tokens: int, seed: int, chunk_tokens: int | None = None) -> dict:
    """Seconds and peak memory to internalize one document of `length_tokens` tokens of distinct text, in a fresh process.

    Keys: length_tokens, chunks, seconds, peak_memory_mib (of the whole process), adapter_mib.
    """
    command = [sys.executable, "-m", "d2l_lib.evaluation", "--cost", str(length_tokens), "--model", source, "--seed", str(seed)]
    command += ["--chunk-tokens", str(chunk_tokens)] if chunk_tokens else []
    done = subprocess.run(command, capture_output=True, text=True, cwd=project_root())
    if done.returncode:
        raise RuntimeError(f"measuring {length_tokens} tokens failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _internalization_cost(source: str, length_tokens: int, seed: int, chunk_tokens: int | None) -> dict:
    from .model import load

    model = load(source)
    rng = random.Random(f"cost/{seed}")
    parts, tokens = [], 0
    while tokens < length_tokens:
        parts.append(world.draw_document(rng, "test", 20).text)
        tokens += len(model.tokenizer(parts[-1], add_special_tokens=False)["input_ids"])
    model.internalize(parts[0], chunk_tokens=chunk_tokens)  # first calls set up memory pools
    text = "\n".join(parts)
    began = time.perf_counter()
    adapter = model.internalize(text, chunk_tokens=chunk_tokens)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    return {
        "length_tokens": length_tokens,
        "chunks": len(adapter.blocks),
        "seconds": round(seconds, 3),
        "peak_memory_mib": round(peak, 1),
        "adapter_mib": round(adapter.nbytes / 2**20, 2),
    }


def main() -> None:
    """`--cost LENGTH` prints one measurement; without it, the full evaluation of a bundled model is recorded in data/results."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk-tokens", type=int)
    parser.add_argument("--cost", type=int, metavar="LENGTH")
    a = parser.parse_args()
    if a.cost:
        print(json.dumps(_internalization_cost(a.model, a.cost, a.seed, a.chunk_tokens)))


if __name__ == "__main__":
    main()
