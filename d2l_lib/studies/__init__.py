"""Studies: the programs behind data/full_runs, `d2l study NAME`.

A study is an entry in STUDIES and a function `run(model, n, seed, ...)`. It returns a table (a DataFrame, or rows as
dicts), or several by the names of their files. A long study yields them instead, and continues from its own files when
it is started again. This module holds the recorder; it lists the studies without torch.

    torchrun --nproc_per_node 2 -m -- d2l_lib study reading --n 200

A study with `shares` gives its pieces to the processes that torchrun started (`training.processes.shared`); the first
one writes the record, which is that of one process but for times. Other studies refuse to start there. Without "--"
torchrun reads --n as an option of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from d2l_lib.presets import QA_VARIANTS
from d2l_lib.records import project_root, read_rows, write_jsonl
from d2l_lib.training.processes import is_first_process, own_device, processes, together
from d2l_lib.training.settings import WRITERS


@dataclass(frozen=True)
class Study:
    """What the command knows of a study before its import.

    place: its function, "module:function".
    files: its files in data/full_runs, without ".jsonl".
    n, of: default number of samples, and what is counted.
    model: the model to load ("": the study loads what it needs).
    load: the function that loads it.
    options: its own, as argparse takes them.
    shares: whether several processes share its work.
    """

    place: str
    files: tuple[str, ...]
    about: str
    n: int
    of: str
    model: str = "tiny/qa"
    load: str = "loading:load"
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    shares: bool = False


_OF_SPEED = {
    "--lengths": {"type": "count", "nargs": "+", "help": "of documents, in tokens"},
    "--limit": {"type": "positive", "default": 600.0, "help": "seconds after which a measurement is ended"},
    "--memory-limit": {"type": "count", "help": "MiB that a measurement may allocate on the CPU (Linux)"},
    "--again": {"action": "store_true", "help": "drop first what is recorded of the same models, depth and device"},
}
_TRAINING_SEED = {"type": "seed", "default": 0, "help": "of the model, for the record (0)"}
_SIZES = {
    "--layers": {"type": "count", "help": "base layers (26 on a GPU, 2 on a CPU)"},
    "--vocabulary": {"type": "count", "help": "256000 on a GPU, 4096 on a CPU"},
    "--dtype": {"choices": ("float32", "bfloat16", "float16")},
}
READING_METHODS = (
    "bias alone",
    "published sum",
    "sparse",
    "sparse, always open",
    "router",
    "router, always open",
    "in context",
)
_ONLY = {"nargs": "+", "metavar": "WORD", "help": "methods with such a name; recorded rows of others stay"}
STUDIES = {
    "base-model": Study(
        "base_scores:run",
        ("base_model",),
        "what the base model reads, and knows of the encyclopedia",
        *(500, "samples per task", "tiny", "base_model:load_base_model"),
        shares=True,
    ),
    "needles": Study(
        "needle_scores:run",
        ("needle_{variant}_seed{training_seed}",),
        "exact match on needles by length and depth",
        *(500, "haystacks per length", "tiny"),
        options={
            "--variant": {"default": "ours", "help": "what the hypernetwork's training is called in the record"},
            "--training-seed": _TRAINING_SEED,
            "--read": {
                "choices": ("sum", "sparse"),
                "nargs": "+",
                "default": ("sum", "sparse"),
                "help": "how adapters are read; sparse alone keeps what is recorded of the sum",
            },
        },
        shares=True,
    ),
    "kinds": Study(
        "kinds:run",
        ("qa_kinds", "qa_lengths"),
        "answers by kind of question, number of facts and length",
        *(1000, "one-hop questions"),
        shares=True,
    ),
    "methods": Study(
        "methods:run",
        ("qa_methods", "qa_methods_lengths"),
        "all methods on the same documents, with their costs",
        *(10, "documents of 20 facts, eight questions each"),
        options={
            "--distillation-steps": {"type": "count", "default": 300},
            "--only": _ONLY,
            "--text-to-lora": {"help": "folder of a model that `d2l train --stage text-to-lora` made"},
        },
    ),
    "probes": Study(
        "probes:run",
        ("qa_probes",),
        "interference, conflict, many documents, removal, two hops",
        *(500, "questions per probe and condition"),
        shares=True,
    ),
    "ablations": Study(
        "ablations:run",
        ("qa_ablation/<variant>_seed<seed>",),
        "the question-answering recipe with one part changed, trained",
        *(100, "questions per task and number of facts", ""),
        options={
            "--variant": {"choices": list(QA_VARIANTS), "help": "one variant (default: all)"},
            "--seeds": {"type": "seed", "nargs": "+", "help": "several, in place of --seed"},
            "--runs": {"type": Path, "default": Path("runs"), "help": "where the trainings are"},
        },
    ),
    "attribution": Study(
        "faithfulness:run",
        ("attribution",),
        "methods that trace an answer, against what really happens",
        *(500, "one-hop questions that all blocks answer rightly"),
        options={"--n-two-hop": {"type": "count", "default": 150, "help": "two-hop questions answered rightly"}},
    ),
    "two-hops": Study(
        "two_hops:run",
        ("two_hops",),
        "whether traces hold both sentences of questions that need two",
        *(200, "questions that need their first hop"),
        options={"--split": {"choices": ("validation", "test"), "default": "test", "help": "of the documents (test)"}},
        shares=True,
    ),
    "routing": Study(
        "routing_shares:run",
        ("routing",),
        "how the relevance of a block is best measured",
        *(400, "questions, half of each condition"),
    ),
    "reading": Study(
        "reading:run",
        ("reading",),
        "the sum of many blocks against sparse reading, in one pass",
        *(200, "questions of each condition"),
        options={
            "--training-seed": _TRAINING_SEED,
            "--only": {
                "choices": READING_METHODS,
                "nargs": "+",
                "help": "methods; the seed of the null block's training matters to sparse alone",
            },
        },
        shares=True,
    ),
    "router": Study(
        "router:run",
        ("router",),
        "blocks found and answers given by keys, of 64 to 10,000 blocks",
        *(200, "questions for each number of blocks"),
    ),
    "router-weights": Study(
        "router_weights:run",
        ("router_weights",),
        "the router, trained on documents of one split and judged on those of another",
        *(4000, "questions to judge on"),
        options={
            "--training-seed": _TRAINING_SEED,
            "--keep": {"metavar": "MODEL", "help": "write the weights into this model's folder"},
        },
    ),
    "answering": Study(
        "answering:run",
        ("answering",),
        "a token with many blocks against the base model's, and a routed answer against a plain one",
        *(9, "turns"),
    ),
    "lists": Study(
        "lists:run",
        ("lists",),
        "list questions answered by several blocks, together and each alone",
        *(200, "questions"),
    ),
    "no-block": Study(
        "no_block:run",
        ("no_block",),
        "what a null block's threshold with a stated error rate costs",
        *(200, "questions of each topic, and to choose the threshold"),
    ),
    "retrieval": Study(
        "retrieval_scores:run",
        ("retrieval", "retrieval_pools"),
        "passages found by BM25 in the prompt, against adapters",
        *(200, "questions of each condition and number of chunks"),
        options={"--again": {"action": "store_true", "help": "measure conditions again that are recorded already"}},
    ),
    "passages": Study(
        "passages:run",
        ("passages",),
        "questions about passages of real text, in the prompt and internalized",
        *(1000, "questions", "smollm2"),
        options={
            "--questions": {"metavar": "DATASET[=FILE]", "default": "squad", "help": "data set, and its file (squad)"},
            "--only": _ONLY,
            "--seen": {
                "metavar": "DATASET=FILE",
                "help": "what the hypernetwork learned from: questions about passages of it, too",
            },
        },
        shares=True,
    ),
    "distilled-passages": Study(
        "distilled_passages:run",
        ("distilled_passages",),
        "a LoRA trained for each passage of real text, against adapters",
        *(8, "passages, at most five questions each", "smollm2"),
        options={
            "--questions": {"metavar": "DATASET[=FILE]", "default": "squad", "help": "data set, and its file (squad)"},
            "--steps": {"type": "count", "default": 300, "help": "of training a LoRA (300)"},
        },
    ),
    "facts": Study(
        "facts:run",
        ("facts",),
        "paragraphs of four and eight English facts in one block",
        *(400, "questions for each number of facts", "smollm2"),
        options={"--only": _ONLY},
        shares=True,
    ),
    "written-questions": Study(
        "written_questions:run",
        ("written_questions",),
        "a model as a writer of questions on texts",
        *(24, "texts", "smollm2", "base_model:load_base_model"),
        options={
            "--texts": {
                "metavar": "PLACE",
                "default": "data/samples/passages.jsonl",
                "help": "a folder of .txt and .md files, or a .jsonl file (data/samples/passages.jsonl)",
            },
            "--styles": {"nargs": "+", "choices": WRITERS, "default": WRITERS, "help": "how it is asked (both)"},
        },
    ),
    "prose-needles": Study(
        "prose_needles:run",
        ("prose_needles",),
        "one made-up sentence in texts that people wrote, by length",
        *(50, "haystacks of each length", "smollm2"),
        options={
            "--texts": {
                "metavar": "PLACE",
                "default": "data/qa/novels",
                "help": "a folder of .txt files, or a .jsonl file",
            },
            "--lengths": {
                "type": "count",
                "nargs": "+",
                "default": tuple(2**k for k in range(8, 16)),
                "help": "of haystacks, in tokens (256 to 32,768)",
            },
            "--in-prompt": {
                "type": "count",
                "nargs": "+",
                "default": (256, 512, 1024),
                "help": "those that the base model also reads in its prompt (256, 512, 1024)",
            },
        },
        shares=True,
    ),
    "long-texts": Study(
        "long_texts:run",
        ("long_texts",),
        "long texts: tokens a second, memory, and the same text again",
        *(3, "times that the same text is read again", ""),
        options={
            "--models": {"nargs": "+", "default": ("tiny/qa", "smollm2"), "help": "bundled names, or folders"},
            "--texts": {"metavar": "PLACE", "default": "data/qa/novels", "help": "a folder of .txt files"},
            "--tokens": {"type": "count", "nargs": "*", "default": (4096, 131_072), "help": "lengths (4096 131072)"},
            "--megabytes": {"type": "count", "nargs": "*", "default": (1,), "help": "lengths (1)"},
        },
    ),
    "half-precision": Study(
        "half_precision:run",
        ("half_precision",),
        "answers with blocks in half precision, against all digits",
        *(200, "questions of each sample", "smollm2"),
        options={
            "--texts": {"metavar": "PLACE", "default": "data/qa/novels", "help": "a folder of .txt files"},
            "--length": {"type": "count", "default": 512, "help": "of haystacks, in tokens (512)"},
        },
        shares=True,
    ),
    "articles": Study(
        "articles:run",
        ("articles",),
        "questions about one passage, with the whole article in one adapter",
        *(300, "questions", "smollm2"),
        options={"--questions": {"metavar": "DATASET[=FILE]", "default": "squad", "help": "data set, and its file"}},
        shares=True,
    ),
    "chunks": Study(
        "chunks:run",
        ("chunks",),
        "which passage of an article is read, by what speaks for it",
        *(300, "questions of each set", "smollm2"),
        options={
            "--questions": {"metavar": "DATASET[=FILE]", "default": "squad", "help": "what weights are fitted on"},
            "--test": {"metavar": "DATASET[=FILE]", "default": "squad", "help": "other questions"},
            "--keep": {"metavar": "MODEL", "help": "write the weights into this model's folder"},
        },
    ),
    "rise": Study(
        "rise:run",
        ("rise",),
        "how the gate weighs words, and rises, among many chunks",
        *(320, "prompts about something else", "smollm2"),
        options={
            "--questions": {"metavar": "DATASET[=FILE]", "default": "squad", "help": "passages (squad)"},
            "--keep": {"metavar": "MODEL", "help": "write the weights into this model's folder"},
        },
    ),
    "tracing": Study(
        "tracing:run",
        ("tracing",),
        "answers from real text, traced to the sentence that states them",
        *(200, "questions that are answered rightly", "smollm2"),
        options={"--questions": {"metavar": "DATASET[=FILE]", "default": "squad", "help": "passages (squad)"}},
    ),
    "interference": Study(
        "interference:run",
        ("interference",),
        "general questions with an unrelated text inside",
        *(200, "questions", "smollm2"),
        options={"--questions": {"metavar": "DATASET[=FILE]", "default": "squad", "help": "passages (squad)"}},
        shares=True,
    ),
    "gate": Study(
        "gate:run",
        ("gate", "gate_ideas"),
        "when the adapter should stay out of an answer",
        *(400, "questions of each sort and split"),
        options={"--keep": {"metavar": "MODEL", "help": "write the thresholds into this model's folder"}},
    ),
    "dial": Study(
        "dial:run",
        ("conflict_dial",),
        "how strongly an adapter should speak",
        *(400, "documents of each split"),
    ),
    "report": Study(
        "flags:run",
        ("report",),
        "how well the report flags facts that were not stored",
        *(25, "documents of each split, of 8 to 40 facts"),
    ),
    "recompression": Study(
        "recompression:run",
        ("recompression",),
        "needles found by adapters of smaller rank",
        *(100, "haystacks", "tiny"),
        options={"--length": {"type": "count", "default": 131072, "help": "of the haystacks, in tokens"}},
    ),
    "speed-tiny": Study(
        "speed:run_tiny",
        ("speed_tiny",),
        "seconds and memory of the tiny models",
        *(5, "repeats of each measurement, at most", ""),
        options=_OF_SPEED,
    ),
    "speed-smollm2": Study(
        "speed:run_smollm2",
        ("speed_smollm2",),
        "seconds and memory of SmolLM2-135M-Instruct, from its first load on",
        *(3, "repeats of each measurement, at most", ""),
        options=_OF_SPEED,
    ),
    "elastic": Study(
        "elastic:run",
        ("elastic",),
        "a training and shards, killed and resumed with 1, 2 and 4 processes",
        *(6, "steps of each stage", ""),
    ),
    "absorption": Study(
        "absorption:run",
        ("absorption",),
        "the Perceiver's attention with and without keys and values",
        *(7, "runs of each way, in turn", ""),
    ),
    "bench": Study(
        "bench:run",
        ("bench",),
        "ours, the plain published computation, and arithmetic, in turn",
        *(5, "turns of each task", ""),
        options={
            "--chunks": {"type": "count", "nargs": "+", "default": (1, 8), "help": "of internalized documents (1 8)"},
            "--again": {"action": "store_true", "help": "measure again what is recorded"},
        },
    ),
    "history": Study(
        "history:run",
        ("history",),
        "internalizing and a training step, by an older commit and today",
        *(7, "turns", ""),
        options={
            "--before": {"type": Path, "required": True, "metavar": "FOLDER", "help": "a checkout of the older commit"},
        },
    ),
    "quicker": Study(
        "quicker:run",
        ("quicker",),
        "ideas for quicker internalizing, in turn with reading chunk by chunk",
        *(7, "turns", ""),
    ),
    "scaling": Study(
        "scaling:run",
        ("scaling",),
        "the published training on 8 to 256 GPUs, on paper",
        *(256, "GPUs, the most", ""),
    ),
    "generation": Study(
        "generation:run",
        ("generation",),
        "answers per CPU second of self-generation, by how they are found",
        *(5, "turns", ""),
        options={
            "--documents": {"type": "count", "default": 60, "help": "of the world, in each turn (60)"},
            "--before": {"type": Path, "metavar": "FOLDER", "help": "a checkout of an older commit, to compare with"},
        },
    ),
    "speed-gemma": Study(
        "speed:run_gemma",
        ("speed_gemma",),
        "seconds and memory at Gemma-2-2B's sizes",
        *(5, "repeats of each measurement, at most", ""),
        options=_SIZES | _OF_SPEED,
    ),
}


def record_path(name: str) -> Path:
    """The file of a record in data/full_runs."""
    return project_root() / "data" / "full_runs" / f"{name}.jsonl"


def earlier_rows(name: str) -> list[dict[str, Any]]:
    """The rows that a record holds so far."""
    path = record_path(name)
    return read_rows(path) if path.is_file() else []


def recorded_rows(name: str, command: str) -> list[dict[str, Any]]:
    """All rows of a record; FileNotFoundError says that `command` makes them."""
    path = record_path(name)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: {command} records it")
    return read_rows(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command `study`: a name, and the options of that study."""
    names = parser.add_subparsers(dest="study", required=True, metavar="NAME")
    names.add_parser("list", help="all studies and their files")
    for name, study in STUDIES.items():
        several = f"several processes share its work: torchrun --nproc_per_node 2 -m -- d2l_lib study {name} ..."
        one = names.add_parser(
            name,
            help=study.about,
            description=f"{study.about}: {', '.join(study.files)}.",
            epilog=several if study.shares else "it runs in one process.",
        )
        if study.model:
            one.add_argument("--model", default=study.model, help=f"bundled name, or a folder ({study.model})")
        one.add_argument("--n", type="count", default=study.n, help=f"{study.of} ({study.n})")
        one.add_argument("--seed", type="seed", default=0, help="of what is asked and measured (0)")
        for option, settings in study.options.items():
            one.add_argument(option, **settings)


def run(a: argparse.Namespace) -> None:
    """Run a study and record its tables; print those that it returns."""
    if a.study == "list":
        for name, study in STUDIES.items():
            print(f"{name:<14} {study.about} ({', '.join(study.files)})")
        return
    study = STUDIES[a.study]
    if processes() > 1 and not study.shares:
        able = ", ".join(name for name, one in STUDIES.items() if one.shares)
        a.error(f"the study {a.study} runs in one process: start it without torchrun; those that share work are {able}")
    own = [option[2:].replace("-", "_") for option in study.options]
    options = {name: getattr(a, name) for name in ("n", "seed", *own)}
    function = _function(f"studies.{study.place}")
    with together():
        if study.model:
            device = own_device()
            options["model"] = _function(study.load)(a.model, **({} if device is None else {"device": device}))
        _run_and_record(study, function, options, a)


def _run_and_record(study: Study, function: Callable, options: dict[str, Any], a: argparse.Namespace) -> None:
    """Run a study in every process, and record its tables in the first."""
    result = function(**options)
    facts = {"seed": a.seed, "n": a.n, "command": a.command, "threads": _threads()}
    several = isinstance(result, Iterator)
    for tables in result if several else [result]:
        by_file = tables if isinstance(tables, dict) else {study.files[0].format(**vars(a)): tables}
        for name, table in by_file.items() if is_first_process() else ():
            rows = record(name, table, facts)
            if not several:
                _show(rows)


def record(name: str, table, facts: dict) -> list[dict]:
    """Write a table. Each row gains the `facts` that it lacks; a row with a command of its own stays as it is."""
    if not isinstance(table, list):
        table = table.astype(object).where(table.notna(), None).to_dict("records")
    rows = [row if "command" in row else row | {k: v for k, v in facts.items() if k not in row} for row in table]
    write_jsonl(record_path(name), rows)
    return rows


def _show(rows: list[dict]) -> None:
    """Print at most 60 rows of a record; only those that validation chose, if there is such a column."""
    import pandas as pd

    table = pd.DataFrame(rows).drop(columns=["command", "threads"], errors="ignore")
    table = table[table["chosen"]] if "chosen" in table else table
    print(table.to_string(max_rows=60))


def _function(place: str):
    module, name = place.split(":")
    return getattr(import_module(f"d2l_lib.{module}"), name)


def _threads() -> int:
    import torch

    return torch.get_num_threads()
