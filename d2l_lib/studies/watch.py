"""Scores for the checkpoints of a training, during the run or later.

    d2l watch runs/paper-gemma/needle_own_seed0 --task needle --lengths 64 256 1024 --n 50
    d2l watch runs/paper-gemma/qa_own_seed0 --task squad --source FOLDER --n 200

Every whole checkpoint is scored once, as a line in RUN/scores.jsonl, so the watcher can stop and start at any time. It
waits for checkpoints that are still being written. It ends when the run has ended (RUN/final) and everything is scored.
It never changes the run's own files.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from d2l_lib.base_model import load_base_model
from d2l_lib.formats.checkpoints import build_hypernetwork, config_of_settings, read_safetensors
from d2l_lib.formats.writing import write_atomic
from d2l_lib.hypernetwork import HypernetworkConfig
from d2l_lib.model import DocToLoRA
from d2l_lib.records import append_jsonl, read_appended, read_json
from d2l_lib.studies.needle_scores import needle_samples
from d2l_lib.tasks import qa
from d2l_lib.training.loop import checkpoints, is_whole, step_of
from d2l_lib.training.recipes import HYPERNETWORK

_BEGINS = b'{"checkpoint"'  # every line of scores
_PREFIX = "hypernetwork."  # of its tensors in a training step
_Score = Callable[[DocToLoRA], dict]


def load_training_checkpoint(checkpoint: Path, base_model, tokenizer) -> DocToLoRA:
    """The model at a checkpoint-N folder of a training; `base_model` and `tokenizer` are the run's own.

    FileNotFoundError if the run did not write down its hypernetwork, or if the checkpoint is gone. CheckpointError if
    the checkpoint does not fit.
    """
    config, chunk_tokens = read_facts(checkpoint.parent / HYPERNETWORK)
    tensors = read_safetensors(checkpoint / "model.safetensors")
    state = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
    hypernetwork = build_hypernetwork(config, state)
    hypernetwork = hypernetwork.to(base_model.device).requires_grad_(False)
    return DocToLoRA(base_model, tokenizer, hypernetwork, chunk_tokens=chunk_tokens)


def read_facts(path: Path) -> tuple[HypernetworkConfig, int | None]:
    """(hypernetwork's configuration, tokens of its chunks) from a training's file; ValueError for a damaged file."""
    from d2l_lib.formats.schemas import TrainingFacts, check

    facts = read_json(path)
    check(TrainingFacts, facts, path, "start the training again, it writes this file")
    return config_of_settings(facts["hypernetwork"], path), facts["chunk_tokens"]


def stages(run: Path) -> list[Path]:
    """The folders of a run, itself or in it, with a hypernetwork.json; oldest first."""
    facts = [path for path in (run / HYPERNETWORK, *run.glob(f"*/{HYPERNETWORK}")) if path.exists()]
    return [path.parent for path in sorted(facts, key=lambda path: path.stat().st_mtime)]


def read_scores(path: Path) -> list[dict]:
    """The scores so far; an unfinished last line (the watcher was killed) is removed, also from the file.

    ValueError names a line that is no JSON or names no checkpoint; a file of something else stays unchanged.
    """
    from d2l_lib.formats.schemas import ScoreLine, check

    rows = read_appended(path)
    for number, row in enumerate(rows, 1):
        check(ScoreLine, row, f"{path}, line {number}", "take that line out")
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        last = content[content.rfind(b"\n") + 1 :]
        if not last.startswith(_BEGINS[: len(last)]):  # not a line of scores
            raise ValueError(f"{path}, line {len(rows) + 1}: no scores of checkpoints are in it: name another file")
        write_atomic(path, content[: -len(last)])
    return rows


def score_new(run: Path, score: _Score, base: tuple, scores: Path) -> int:
    """The number of new scores: one per whole checkpoint that `scores` lacks; base: (base model, tokenizer)."""
    done = {line["checkpoint"] for line in read_scores(scores)}
    count = 0
    for stage in stages(run):
        for checkpoint in checkpoints(stage):
            name = checkpoint.relative_to(run).as_posix()
            if name in done or not is_whole(checkpoint):
                continue
            began = time.monotonic()
            try:
                step = step_of(checkpoint)
                model = load_training_checkpoint(checkpoint, *base)
            except FileNotFoundError:
                print(f"{checkpoint} is gone: not scored", flush=True)
                continue
            line = {"checkpoint": name, "step": step, **score(model)}
            line["seconds"] = round(time.monotonic() - began, 1)
            append_jsonl(scores, line)
            print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
            count += 1
    return count


def watch(run: Path, score: _Score, base: tuple, scores: Path, every: float, once: bool = False) -> None:
    """`score_new` every `every` seconds, until the run has ended (or just `once`)."""
    while True:
        ended = (run / "final").exists()
        score_new(run, score, base, scores)
        if ended or once:
            return
        time.sleep(every)


def _needle_score(lengths: Sequence[int], n: int, seed: int) -> _Score:
    """A function from a model to its exact match on `n` haystacks per length."""

    def score(model: DocToLoRA) -> dict:
        samples = needle_samples(model, lengths, n, seed, split="validation")
        by_length = {str(k): float(v) for k, v in samples.groupby("length_tokens")["correct"].mean().items()}
        facts = {"task": "needle", "n": len(samples), "seed": seed}
        return facts | {"exact_match": float(samples["correct"].mean()), "by_length": by_length}

    return score


def _question_score(name: str, source: Path | None, n: int, seed: int) -> _Score:
    """A function from a model to the data set's own score (see `qa.DATASETS`) on `n` of its questions."""
    frame = qa.load_qa(name, source, n=n, seed=seed, template=qa.DATASETS[name].template)

    def score(model: DocToLoRA) -> dict:
        groups = qa.group_by_document(frame)
        adapters = dict(zip((d for d, _ in groups), model.internalize_each([d for d, _ in groups]), strict=True))
        predictions = model.answer(
            list(frame["question"]), [adapters[document] for document in frame["document"]], max_new_tokens=48
        )
        scored = qa.score(frame.assign(prediction=predictions))
        facts = {"task": name, "n": len(scored), "seed": seed, "metric": scored["metric"].iloc[0]}
        return facts | {"score": round(float(scored["score"].mean()), 4)}

    return score


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command `watch`."""
    parser.add_argument("run", type=Path, help="the folder of a run; its stages lie in it")
    parser.add_argument("--task", default="needle", choices=("needle", *qa.DATASETS))
    parser.add_argument("--lengths", type="count", nargs="+", default=[64, 256, 1024], help="of haystacks, in tokens")
    parser.add_argument("--source", type=Path, help="file or folder of the data set (default: data/qa, or the hub)")
    parser.add_argument("--n", type="count", default=50, help="haystacks per length, or questions")
    parser.add_argument("--seed", type="seed", default=0, help="of the evaluation")
    parser.add_argument("--base", help="base model, where the run's own is not found by its name")
    parser.add_argument("--scores", type=Path, help="default: RUN/scores.jsonl")
    parser.add_argument("--every", type="positive", default=60, help="seconds between two looks")
    parser.add_argument("--once", action="store_true", help="score what is there, and end")


def run(a: argparse.Namespace) -> None:
    """Score the checkpoints of a training as they appear."""
    if not a.run.is_dir():
        raise FileNotFoundError(f"there is no run at {a.run}")
    while not (folders := stages(a.run)):
        if a.once or (a.run / "final").exists():
            raise ValueError(f"{a.run} has no {HYPERNETWORK}: is it the folder of a training?")
        time.sleep(a.every)
    base = load_base_model(a.base or read_facts(folders[0] / HYPERNETWORK)[0].base_model)
    if a.task == "needle":
        score = _needle_score(a.lengths, a.n, a.seed)
    else:
        score = _question_score(a.task, a.source, a.n, a.seed)
    watch(a.run, score, base, a.scores or a.run / "scores.jsonl", a.every, a.once)
