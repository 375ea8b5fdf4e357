"""The command `train`: remake what is bundled, or train a hypernetwork for a base model of your own.

    d2l train                                        # base model and needle hypernetwork, from nothing
    d2l train --stage needle --seed 1
    d2l train --stage reading --seed 1               # data/tiny/qa with sparse reading on, into runs/tiny/reading_seed1
    d2l train --stage rows --preset smollm2 --questions squad=train-v1.1.json facts    # token rows for a real model
    d2l train --stage reading-lora --preset smollm2 --questions squad=train-v1.1.json facts    # reads its prompt
    d2l train --stage published --preset smollm2 --questions squad=train-v1.1.json    # rank 8, a plain sum
    d2l train --stage qa --preset paper-gemma --shards FOLDER ...       # the published recipe on shards
    torchrun --nproc_per_node 8 -m d2l_lib train ...                    # processes share a step's batches

Stages with two batches or more in a step can be shared: qa, text-to-lora, reading-lora, and with
`--set batches_per_step=2` needle, rows and published, whose step is then twice as large. base and reading cannot.

Killed runs continue (see `loop`). A preset of a published base model takes --base (a folder or another hub name), and
--steps and --set for runs of another size. Its hypernetwork ends in a folder that `d2l.load` reads.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from d2l_lib.presets import NEEDLE_VARIANTS, PRESETS, Preset, Schedule, changed, preset, shortened
from d2l_lib.training.processes import processes

if TYPE_CHECKING:
    from d2l_lib.training.loop import Run

STAGES = ("all", "base", "needle", "qa", "text-to-lora", "reading", "rows", "reading-lora", "published")
_ON_QUESTIONS = ("rows", "reading-lora", "published")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.epilog = (
        "On both cores of a CPU, or on several GPUs: torchrun --nproc_per_node 2 -m d2l_lib train ... (with "
        "OMP_NUM_THREADS=1). The processes share the batches of a step, and the result is that of one. The stages qa, "
        "text-to-lora and reading-lora have two batches in a step; needle, rows and published have them with --set "
        "batches_per_step=2; base and reading are trained by one process."
    )
    parser.add_argument("--preset", default="tiny", choices=sorted(PRESETS))
    parser.add_argument("--stage", choices=STAGES, default="all", help="all: base, then needle")
    parser.add_argument("--seed", type="seed", help="of the hypernetwork; the preset's own seed makes the bundled one")
    parser.add_argument("--start", help="model that the stage reading begins with (default: the preset's bundled qa)")
    parser.add_argument("--variant", choices=sorted(NEEDLE_VARIANTS), default="ours", help="of the needle training")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="bfloat16 and compiled code for the base model: needs a C++ compiler; twice as fast on a CPU with AMX",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="checkpoints of runs in progress")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where the bundled models and their logs go")
    parser.add_argument(
        "--shards", type=Path, nargs="+", default=[], help="self-generated data for qa: folders, or parquet files"
    )
    parser.add_argument(
        "--questions",
        nargs="+",
        metavar="DATASET[=FILE]",
        help="for rows and reading-lora: data sets of questions about passages, and their files; facts are generated",
    )
    parser.add_argument("--cache", type=Path, help="where shards are unpacked to (default: RUNS/shards)")
    own = parser.add_argument_group("runs of your own (they end in RUNS/PRESET/.../final, and leave --data alone)")
    own.add_argument("--base", help="base model: bundled name, folder or hub id (default: the preset's)")
    own.add_argument("--steps", type="count", help="optimizer steps of each stage, in place of the preset's")
    own.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change settings of the preset")
    own.add_argument("--save-steps", type="count", default=250, help="optimizer steps from checkpoint to checkpoint")
    own.add_argument("--report-steps", type="count", default=50, help="optimizer steps from log line to log line")
    own.add_argument("--keep", type="count or none", default=2, help="keep so many checkpoints; 0 keeps all")
    own.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="bfloat16 autocast around float32 parameters, as published (default: on a GPU)",
    )
    own.add_argument("--recompute", action="store_true", help="less memory for more time: keep no activations")
    own.add_argument("--compile", action="store_true", help="compile the Perceiver: for GPUs, on a CPU it does not pay")


def run(a: argparse.Namespace) -> None:
    """Do what the options say."""
    from d2l_lib.training import recipes, text_to_lora  # torch and transformers: not for --help

    p = preset(a.preset)
    own = _is_own(a, p)
    _check(a, own, p)
    _check_processes(a.stage, _schedule(a, p, own))
    if a.stage == "reading":
        settings, source = shortened(changed(p.reading, a.set), a.steps), a.start or f"{p.name}/qa"
        own = own or a.start is not None
        run = _run_options(a, a.runs / p.name / f"reading_{'own_' if own else ''}seed{a.seed or 0}", a.seed or 0)
        if own:
            final = recipes.train_reading(settings, source, run)
        else:
            final = recipes.remake_reading(settings, source, run, a.data)
        print(f"{final}: d2l.load reads it", flush=True)
    elif a.stage in _ON_QUESTIONS:
        _run_on_questions(a, p)
    elif own or a.shards:
        _run_own(a, p)
    elif a.stage == "qa":
        recipes.remake_qa(p, a.runs, a.data, p.qa.first.seed if a.seed is None else a.seed)
    elif a.stage == "text-to-lora":
        text_to_lora.remake_text_to_lora(p, a.runs, a.data, a.seed or 0)
    else:
        if a.stage != "needle":
            recipes.remake_base(p, a.runs, a.data, a.fast)
        if a.stage != "base":
            seed = p.needle.seed if a.seed is None else a.seed
            recipes.remake_needle(p, a.runs, a.data, seed, a.variant)


def _is_own(a: argparse.Namespace, p: Preset) -> bool:
    """Whether these options ask for something other than a bundled model."""
    return isinstance(p.base, str) or a.base is not None or a.steps is not None or bool(a.set)


def _check(a: argparse.Namespace, own: bool, p: Preset) -> None:
    """Status 2 for options that this stage does not have."""
    if a.stage == "reading" and (p.reading is None or a.base is not None or a.fast or a.variant != "ours"):
        a.error("the stage reading needs the preset tiny and takes --start, but no --base, --fast or --variant")
    if a.stage in _ON_QUESTIONS and (p.rows is None or a.questions is None or a.fast or a.variant != "ours"):
        a.error(f"the stage {a.stage} needs --preset smollm2 and --questions, and takes neither --fast nor --variant")
    if a.questions is not None and a.stage not in _ON_QUESTIONS:
        a.error(f"--questions is for --stage {' and '.join(_ON_QUESTIONS)}, not for {a.stage}")
    if a.start is not None and a.stage != "reading":
        a.error(f"--start needs --stage reading, not {a.stage}")
    if own and (a.stage in ("base", "text-to-lora") or a.fast or a.variant != "ours"):
        a.error(
            "runs of your own have neither a base nor a text-to-lora stage, and no variants: give --stage needle or "
            "qa, and --set"
        )
    if a.stage != "qa" and (a.shards or a.cache):
        a.error(f"--shards and --cache are for --stage qa, not for {a.stage}")


def _schedule(a: argparse.Namespace, p: Preset, own: bool) -> Schedule:
    """The settings of the first training of this stage."""
    if a.stage == "text-to-lora":
        return p.qa.world
    if a.stage == "base" or (a.stage == "all" and not own):
        return p.base
    of_stage = {"all": p.needle, "qa": p.qa.first, "reading-lora": p.reading_lora}
    return changed(of_stage[a.stage] if a.stage in of_stage else getattr(p, a.stage), a.set)


def _check_processes(stage: str, settings: Schedule) -> None:
    """ValueError where the processes cannot share a step; one process on a CPU is told of its other cores."""
    import torch

    if stage != "reading":  # which refuses several by itself
        settings.accumulation(processes())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if processes() > 1 or torch.accelerator.is_available():
        return
    several = max(n for n in range(1, cores + 1) if settings.batches_per_step % n == 0)
    if several > 1:
        print(f"for {several} of {cores} cores: torchrun --nproc_per_node {several} -m d2l_lib train ...", flush=True)
    elif torch.get_num_threads() < cores:
        print(f"a step is one batch, for one process; OMP_NUM_THREADS={cores} gives it all cores", flush=True)


def _run_on_questions(a: argparse.Namespace, p: Preset) -> None:
    """Train token rows or the reading LoRA: the bundled ones, or with other settings, for another base, in RUNS."""
    from d2l_lib.tasks.qa import load_named
    from d2l_lib.training import reading_lora, recipes

    tables = {name.partition("=")[0]: load_named(name, split="train", **_drawn(name, p)) for name in a.questions}
    seed, own = a.seed or 0, a.base is not None or a.steps is not None or bool(a.set)
    stage = a.stage.replace("-", "_")
    run = _run_options(a, a.runs / p.name / f"{stage}_{'own_' if own else ''}seed{seed}", seed)
    features = a.runs / p.name / "features"
    settings = shortened(changed(getattr(p, stage), a.set), a.steps)
    if a.stage == "reading-lora":
        if own:
            final = reading_lora.train_reading_lora(settings, p.rows, _base_source(a, p), tables, run)
        else:
            final = reading_lora.remake_reading_lora(p, tables, run, a.data)
        print(f"{final}: a PEFT LoRA, which d2l study passages and d2l study facts read", flush=True)
        return
    if a.stage == "published":
        if own:
            final = recipes.train_published(settings, p.rows, _base_source(a, p), tables, run, features)
        else:
            final = recipes.remake_published(p, tables, run, features, a.data)
    elif own:
        final = recipes.train_rows(settings, _base_source(a, p), tables, run, features)
    else:
        final = recipes.remake_rows(p, tables, run, features, a.data)
    print(f"{final}: d2l.load reads it", flush=True)


def _drawn(name: str, p: Preset) -> dict[str, int]:
    """How many questions of a data set without end are generated."""
    return {"n": p.rows.generated, "seed": 0} if name == "facts" else {}


def _run_own(a: argparse.Namespace, p: Preset) -> None:
    """Train for the user's base model, or on the user's data."""
    from d2l_lib.training import recipes

    stage = "qa" if a.stage == "qa" else "needle"
    seed = (p.qa.first if stage == "qa" else p.needle).seed if a.seed is None else a.seed
    run = _run_options(a, a.runs / p.name / f"{stage}_own_seed{seed}", seed)

    def settled(settings):
        return recipes.settle_encoder(shortened(changed(settings, a.set), a.steps))

    source = _base_source(a, p)
    if stage == "needle":
        recipes.own_needle(settled(p.needle), source, run, p.name)
        return
    stages = {name: settled(settings) for name, settings in p.qa.stages.items()}
    readout = p.qa.readout
    if readout is not None:
        readout = replace(readout, batches_per_step=next(iter(stages.values())).batches_per_step)
    settings = replace(p.qa, readout=shortened(readout, a.steps), **stages)
    recipes.own_qa(settings, source, run, p.name, a.shards, a.cache or a.runs / "shards")


def _run_options(a: argparse.Namespace, folder: Path, seed: int) -> Run:
    """The run of these options."""
    import torch

    from d2l_lib.training.loop import Run

    return Run(
        folder,
        seed,
        save_steps=a.save_steps,
        report_steps=a.report_steps,
        keep=a.keep or None,
        bf16=torch.cuda.is_available() if a.bf16 is None else a.bf16,
        recompute=a.recompute,
        compiled=a.compile,
    )


def _base_source(a: argparse.Namespace, p: Preset) -> str:
    """The source of the base model, now and when the checkpoint is loaded; a folder as an absolute path."""
    from d2l_lib.base_model import bundled_path

    source = a.base or p.base_source
    is_folder = Path(source).is_dir() and not (bundled_path(source) / "base_model").is_dir()
    return str(Path(source).resolve()) if is_folder else source
