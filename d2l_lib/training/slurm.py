"""An sbatch script for a training on several GPUs and nodes.

    d2l slurm --preset paper-gemma --nodes 2 --gpus 8 --shards /data/self_gen > train.sbatch
    sbatch train.sbatch

One task per node starts torchrun, which starts one process per GPU. All processes share the batches; the steps are
those of one process. A job that hits its time limit or loses a node goes back into the queue and continues from the
last checkpoint. So RUNS must lie on a disk that all nodes share.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from d2l_lib.documents import check_texts
from d2l_lib.presets import PRESETS, SHARD_STAGES, changed, preset

STAGES = ("needle", "qa")


def sbatch_script(
    name: str,
    stage: str = "qa",
    *,
    nodes: int = 1,
    gpus: int = 8,
    cpus: int = 8,
    hours: int = 48,
    partition: str | None = None,
    shards: Sequence[str] = (),
    runs: str = "runs",
    extra: Sequence[str] = (),
) -> str:
    """The script for preset `name` and stage "needle" or "qa"; `extra` are further options of `d2l train`.

    gpus and cpus: per node, and per GPU.

    ValueError if the processes cannot share the batches of a step evenly, as the preset and `--set` in `extra` say, if
    a setting is unknown, or if shards are missing.
    """
    shards, extra = check_texts(shards, "shards"), check_texts(extra, "extra options")
    p = preset(name)
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; known: {', '.join(STAGES)}")
    if min(nodes, gpus, cpus, hours) < 1:
        raise ValueError(
            f"{nodes} nodes with {gpus} GPUs, {cpus} cores each, {hours} hours: at least one of everything"
        )
    for settings in [p.needle] if stage == "needle" else p.qa.stages.values():
        changed(settings, _changes(extra)).accumulation(nodes * gpus)
    if stage == "qa" and not shards and all(one in SHARD_STAGES for one in p.qa.stages):
        raise ValueError("this preset learns from self-generated data: give its folders (--shards DIR ...)")
    command = ["-m", "d2l_lib", "train", "--stage", stage, "--preset", name, "--runs", runs]
    command += ["--shards", *shards] if shards and stage == "qa" else []
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name=d2l-{name}-{stage}",
        f"#SBATCH --nodes={nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --gpus-per-node={gpus}",
        f"#SBATCH --cpus-per-task={gpus * cpus}",
        f"#SBATCH --time={hours}:00:00",
        "#SBATCH --output=%x-%j.log",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@120",
        *([f"#SBATCH --partition={shlex.quote(partition)}"] if partition else []),
        "",
        "set -euo pipefail",
        "# Near the time limit: back into the queue; the training goes on from its last checkpoint.",
        """trap 'scontrol requeue "$SLURM_JOB_ID"' USR1""",
        'cd "$SLURM_SUBMIT_DIR"',
        # No pipe into `head`: under pipefail, SIGPIPE in scontrol would end the script.
        'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        "head_node=${hosts%%$'\\n'*}",
        "export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false",
        "# The nodes of a cluster often reach no hub: models and data are in the cache or in folders.",
        "export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}",
        "",
        "srun .venv/bin/torchrun \\",
        f"    --nnodes={nodes} --nproc_per_node={gpus} \\",
        '    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$head_node:29500" \\',
        f"    {shlex.join([*command, *extra])} &",
        "# In the background, so that the signal is not kept waiting.",
        "wait $!",
    ]
    return "\n".join(lines) + "\n"


def _changes(extra: Sequence[str]) -> list[str]:
    """What these options of `d2l train` set."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--set", nargs="+", default=[])
    return parser.parse_known_args(extra)[0].set


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command `slurm`; those after "--" go to `d2l train`."""
    parser.add_argument("--preset", default="paper-gemma", choices=sorted(PRESETS))
    parser.add_argument("--stage", choices=STAGES, default="qa")
    parser.add_argument("--nodes", type="count", default=1)
    parser.add_argument("--gpus", type="count", default=8, help="of a node")
    parser.add_argument("--cpus", type="count", default=8, help="for each GPU")
    parser.add_argument("--hours", type="count", default=48)
    parser.add_argument("--partition")
    parser.add_argument("--shards", nargs="+", default=[], help="folders of self-generated data")
    parser.add_argument("--runs", default="runs", help="a folder on a disk that all nodes share")
    parser.add_argument("extra", nargs="*", help="further options of the training, behind --")


def run(a: argparse.Namespace) -> None:
    """Print the script."""
    names = ("nodes", "gpus", "cpus", "hours", "partition", "shards", "runs", "extra")
    print(sbatch_script(a.preset, a.stage, **{name: getattr(a, name) for name in names}), end="")
