"""Scores: what the base model knows and reads, and what a generated adapter lets it answer.

Every function returns a table (pandas DataFrame) with one row per sample or per group; `summarise` turns samples
into shares with 95% Wilson intervals.
"""

from __future__ import annotations

import json
import math
import random
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from d2l_lib import arguments as options
from d2l_lib.base_model import generate, load_base_model
from d2l_lib.documents import check_texts, question_ids
from d2l_lib.loading import load
from d2l_lib.records import one_line_errors, project_root, write_jsonl
from d2l_lib.tasks import needles, world
from d2l_lib.tasks.questions import world_samples
from d2l_lib.tasks.scores import in_fives, summarise

OTHER_KINDS = ("paraphrase", "two_hop", "yes_no", "which_of", "list")


# --------------------------------------------------------------------------------------------------------- the basics
@torch.inference_mode()
def greedy_answers(
    model, tokenizer, prompts: Sequence[str], max_new_tokens: int = 24, batch_tokens: int = 16384
) -> list[str]:
    """The base model's greedy answers to user turns `prompts`, batched by length with left padding.

    Prompts longer than the model's window are answered too: that is what the comparison beyond the window is about.
    """
    ids = question_ids(tokenizer, check_texts(prompts, "prompts"))
    answers = [""] * len(ids)
    waiting = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    while waiting:
        batch = [waiting.pop()]
        longest = len(ids[batch[0]])
        while waiting and (len(batch) + 1) * longest <= batch_tokens:
            batch.append(waiting.pop())
        padded = torch.full((len(batch), longest), tokenizer.pad_token_id)
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, i in enumerate(batch):
            padded[row, longest - len(ids[i]) :] = torch.tensor(ids[i])
            mask[row, longest - len(ids[i]) :] = 1
        ids_here, mask_here = padded.to(model.device), mask.to(model.device)
        generated = generate(model, tokenizer, ids_here, mask_here, max_new_tokens=max_new_tokens)
        for row, i in enumerate(batch):
            answers[i] = tokenizer.decode(generated[row, longest:], skip_special_tokens=True).strip()
    return answers


# -------------------------------------------------------------------------------------------------------- the samples


# ----------------------------------------------------------------------------------------------------- the base model
def base_model_samples(
    model, tokenizer, n: int, seed: int, split: str = "test", facts: tuple[int, int] = (2, 20)
) -> pd.DataFrame:
    """`n` samples of each thing the base model should do; columns task, kind, facts, length_tokens, question,
    answer, prediction, correct.

    Documents and unknown names are from `split`, with `facts` (fewest, most) facts each. The column `facts` says how
    many the document holds, in fives ("6-10"), or is empty where there is no document of facts.
    """
    rng = random.Random(f"base model/{split}/{seed}")
    rows: list[dict] = []

    def add(task: str, kind: str, prompt: str, question: str, answer: str, facts: str = "") -> None:
        rows.append(
            {"task": task, "kind": kind, "facts": facts, "prompt": prompt, "question": question, "answer": answer}
        )

    for i in range(n):
        length = (64, 128, 256, 512, 980)[i % 5]
        haystack = needles.build_haystack(tokenizer, length, rng.random(), needles.draw_number(rng, split))
        add("needle", f"{length} tokens", f"{haystack.text}\n\n{haystack.question}", haystack.question, haystack.answer)
    for task, kinds in (
        ("one_hop", world.ONE_HOP_KINDS),
        ("unanswerable", ("unanswerable",)),
        ("other_kinds", OTHER_KINDS),
    ):
        for sample in world_samples(n, seed, split=split, facts=facts, kinds=kinds).to_dict("records"):
            add(
                task,
                sample["kind"],
                f"{sample['document']}\n\n{sample['question']}",
                sample["question"],
                sample["answer"],
                in_fives(sample["n_facts"]),
            )
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


# ------------------------------------------------------------------------------------------------------------ needles
def needle_samples(
    model,
    lengths: Sequence[int],
    n: int,
    seed: int,
    *,
    chunk_tokens: int | None = None,
    split: str = "test",
    batch: int = 20,
) -> pd.DataFrame:
    """Exact match of Doc-to-LoRA on `n` haystacks per length; the haystack is internalized, the prompt is the
    question alone.

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
    """The same haystacks and questions put to the base model with the haystack in its prompt, also beyond its
    window.
    """
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
            float(((A @ A.transpose(1, 2)) * (block.B[m] @ block.B[m].transpose(1, 2))).sum())
            for m, A in block.A.items()
        )
        needle = None if haystack is None else haystack.needle_span
        inside = (
            needle is not None and block.span is not None and block.span[0] < needle[1] and needle[0] < block.span[1]
        )
        rows.append(
            {
                "chunk": i,
                "norm": abs(block.weight) * adapter.scale * math.sqrt(max(0.0, square)),
                "holds_needle": inside,
            }
        )
    return pd.DataFrame(rows)


# --------------------------------------------------------------------------------------------------------------- cost
def measure_internalization(source: str, length_tokens: int, seed: int) -> dict:
    """Seconds and peak memory to internalize one document of `length_tokens` tokens of distinct text, in a fresh
    process.

    Keys: length_tokens, chunks, seconds, peak_memory_mib (of the whole process), adapter_mib. RuntimeError when the
    process fails.
    """
    command = [
        sys.executable,
        "-m",
        "d2l_lib.studies.evaluation",
        "cost",
        str(length_tokens),
        "--model",
        source,
        "--seed",
        str(seed),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project_root())
    if done.returncode:
        raise RuntimeError(f"measuring {length_tokens} tokens failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory_mib() -> float:
    """The most memory that this process has held so far, or since `reset_peak_memory`, in MiB.

    On a GPU what torch allocated there; else the resident set, read from /proc where there is one: getrusage counts a
    parent's memory too after a fork.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) / 1024
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def reset_peak_memory() -> bool:
    """Let `peak_memory_mib` begin again at what is held now; False where the system has no way to (macOS, Windows)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def internalization_cost(model, length_tokens: int, seed: int) -> dict:
    """What `measure_internalization` returns, measured in this process (whose peak memory holds all that came
    before).
    """
    rng = random.Random(f"cost/{seed}")
    parts, tokens = [], 0
    while tokens < length_tokens:
        parts.append(world.draw_document(rng, "test", 20).text)
        tokens += len(model.tokenizer(parts[-1], add_special_tokens=False, verbose=False)["input_ids"])
    model.internalize_each(parts[:1])  # the first call sets up memory pools
    text = "\n".join(parts)
    began = time.perf_counter()
    adapter = model.internalize(text)
    seconds = time.perf_counter() - began
    return {
        "length_tokens": length_tokens,
        "chunks": len(adapter.blocks),
        "seconds": round(seconds, 3),
        "peak_memory_mib": round(peak_memory_mib(), 1),
        "adapter_mib": round(adapter.nbytes / 2**20, 2),
    }


# ------------------------------------------------------------------------------------------------------- the commands
NEEDLE_LENGTHS = tuple(2**k for k in range(6, 18))
IN_CONTEXT_LENGTHS = tuple(2**k for k in range(6, 14))


def record(path: Path, samples: pd.DataFrame, by: Sequence[str], **facts) -> pd.DataFrame:
    """Summarise `samples` by the columns `by` and write the rows to `path`, each with `facts` (seed, command, ...)."""
    table = summarise(samples, by).assign(**facts)
    write_jsonl(path, table.to_dict("records"))
    return table


@one_line_errors("evaluation")
def main() -> None:
    """Full evaluations, recorded in data/full_runs with seed, n and command; `cost` prints one measurement."""
    parser = options.Parser(description=main.__doc__)
    parser.add_argument("what", choices=("base", "needle", "cost"))
    parser.add_argument("length", type=options.count, nargs="?", help="of the document, in tokens (for cost)")
    parser.add_argument("--model", default="tiny", help="bundled name, or a folder")
    parser.add_argument("--variant", default="ours", help="what the hypernetwork's training is called in the record")
    parser.add_argument("--training-seed", type=options.seed, default=0, help="its seed, for the record")
    parser.add_argument("--n", type=options.count, default=500, help="samples per task, or haystacks per length")
    parser.add_argument("--seed", type=options.seed, default=0, help="of the evaluation")
    a = parser.parse_args()
    command = " ".join(["python -m d2l_lib.studies.evaluation", *sys.argv[1:]])
    folder = project_root() / "data" / "full_runs"
    if a.what == "base":
        samples = base_model_samples(*load_base_model(a.model), a.n, a.seed)
        facts = {"seed": a.seed, "command": command}
        print(record(folder / "base_model.jsonl", samples, ["task", "kind", "facts"], **facts).to_string())
        return
    model = load(a.model)
    if a.what == "cost":
        print(json.dumps(internalization_cost(model, a.length, a.seed)))
        return
    samples = needle_samples(model, NEEDLE_LENGTHS, a.n, a.seed)
    if a.model == "tiny":
        samples = pd.concat([samples, needle_in_context_samples(model, IN_CONTEXT_LENGTHS, a.n, a.seed)])
    bins = (samples["depth"] * needles.N_DEPTH_BINS).astype(int).clip(upper=needles.N_DEPTH_BINS - 1)
    samples["depth"] = (bins + 0.5) / needles.N_DEPTH_BINS
    facts = {"seed": a.seed, "variant": a.variant, "training_seed": a.training_seed, "command": command}
    record(
        folder / f"needle_{a.variant}_seed{a.training_seed}.jsonl",
        samples,
        ["method", "length_tokens", "depth"],
        **facts,
    )
    print(summarise(samples, ["method", "length_tokens"]).to_string())


if __name__ == "__main__":
    main()
