"""What each part of the question-answering recipe contributes: one part changed, a short training, scores.

    d2l study ablations --variant "rank 4" --seed 1     # one row of the table
    d2l study ablations --seeds 0 1 2                   # every variant and seed that has no record yet

Variants are `presets.QA_VARIANTS`. Each (variant, seed) is a file data/full_runs/qa_ablation/<variant>_seed<k>.jsonl.
Runs can be made on any machine, in any order; an interrupted one continues.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import pandas as pd
import torch

from d2l_lib.base_model import load_base_model
from d2l_lib.engine import TransformersEngine
from d2l_lib.model import DocToLoRA
from d2l_lib.presets import QA_VARIANTS, HypernetworkPreset, QAPreset, qa_variant
from d2l_lib.records import read_rows
from d2l_lib.studies import record_path
from d2l_lib.tasks import world
from d2l_lib.tasks.questions import world_samples
from d2l_lib.tasks.scores import summarise
from d2l_lib.training import selfgen
from d2l_lib.training.loop import Run
from d2l_lib.training.recipes import Base, train_qa

FACTS = (8, 20)  # facts of a document with one-hop questions
SHARDS = selfgen.Settings(documents=1000, questions=8)  # self-generated data, for the variants with shards


def _score_briefly(model: DocToLoRA, n: int, seed: int) -> pd.DataFrame:
    """`n` questions per task; columns task, facts, question, answer, prediction, correct.

    Tasks: one hop, for each number of facts in FACTS; unanswerable, on 8 facts; encyclopedia, with the adapter of an
    unrelated document of 20 facts.
    """
    tables = [
        world_samples(n, seed, facts=(count, count), kinds=world.ONE_HOP_KINDS).assign(task="one hop", facts=count)
        for count in FACTS
    ]
    tables.append(world_samples(n, seed, facts=(8, 8), kinds=("unanswerable",)).assign(task="unanswerable", facts=8))
    rng = random.Random(f"ablation/{seed}")
    unrelated = [
        {"document": world.draw_document(rng, "test", 20).text, "question": question.text, "answer": question.answer}
        for question in world.encyclopedia_questions(rng, n)
    ]
    tables.append(pd.DataFrame(unrelated).assign(task="encyclopedia", facts=20))
    samples = pd.concat(tables, ignore_index=True)
    adapters = model.internalize_each(list(samples["document"]))
    samples["prediction"] = model.answer(list(samples["question"]), adapters, max_new_tokens=48)
    samples["correct"] = samples["prediction"] == samples["answer"]
    return samples[["task", "facts", "question", "answer", "prediction", "correct"]]


def run_variant(p: QAPreset, base: Base, run: Run, n: int, shards: Path | None = None) -> pd.DataFrame:
    """Train one variant (resumable) and score it: task, facts, n, exact_match, low, high, seconds trained."""
    hypernetwork = train_qa(p, base, run, shards).eval().requires_grad_(False)
    model = DocToLoRA(base.model, base.tokenizer, hypernetwork, chunk_tokens=p.first.chunk_tokens)
    logs = [read_rows(path) for path in sorted(run.folder.glob("*/log.jsonl"))]
    seconds = sum(log[-1]["seconds"] for log in logs if log)
    return summarise(_score_briefly(model, n, seed=0), ["task", "facts"]).assign(seconds=round(seconds))


def record_name(variant: str, seed: int) -> str:
    """The name of the record of a variant and seed."""
    name = variant.replace(",", "").replace(" ", "_").replace("-", "_")
    return f"qa_ablation/{name}_seed{seed}"


def read_records() -> pd.DataFrame:
    """All recorded rows: variant, seed, task, facts, n, exact_match, low, high, seconds, command."""
    paths = [record_path(record_name(variant, seed)) for variant in QA_VARIANTS for seed in range(10)]
    return pd.DataFrame([row for path in paths if path.exists() for row in read_rows(path)])


def _share_warm_up(variant: str, run: Path, ours: Path) -> None:
    """Copy the finished warm-up in `ours` to `run` if the variant's own would be the same, step by step."""
    p, q = qa_variant(variant), qa_variant("ours")
    settings, known = p.first, q.first
    sizes = [field.name for field in fields(HypernetworkPreset)] + ["last_layer"]
    same = p.readout == q.readout and all(getattr(settings, name) == getattr(known, name) for name in sizes)
    if same and (ours / "recall").exists() and not run.exists():
        shutil.copytree(ours / "readout", run / "readout")


def run(
    n: int, seed: int, variant: str | None, seeds: Sequence[int] | None, runs: Path
) -> Iterator[dict[str, pd.DataFrame]]:
    """The records, one by one: variants of the recipe, trained on the bundled base model and scored."""
    base = Base(*load_base_model("tiny"), "tiny")
    for one in seeds or [seed]:
        for name in [variant] if variant else QA_VARIANTS:
            file = record_name(name, one)
            if record_path(file).exists():
                continue
            print(f"--- {name}, seed {one}", flush=True)
            shards = None
            if QA_VARIANTS[name].get("shards"):
                shards = runs / "selfgen" / "ablation"
                selfgen.generate(SHARDS, shards, TransformersEngine("tiny", base.model, base.tokenizer))
            folder = runs / "tiny" / "ablation" / Path(file).name
            _share_warm_up(name, folder, folder.with_name(f"ours_seed{one}"))
            table = run_variant(qa_variant(name), base, Run(folder, one), n, shards)
            print(table.to_string(), flush=True)
            command = f'd2l study ablations --variant "{name}" --seed {one} --n {n}'
            facts = {"variant": name, "seed": one, "threads": torch.get_num_threads(), "command": command}
            yield {file: table.assign(**facts)}
