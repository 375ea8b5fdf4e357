"""The sbatch script: bash accepts it, the training accepts its options, and on stand-ins for Slurm it starts them."""

import shlex
import subprocess

import pytest

from d2l_lib.__main__ import main
from d2l_lib.training import slurm


def torchrun_command(script: str) -> list[str]:
    """The words that srun starts."""
    joined = script.replace("\\\n", " ")
    (line,) = [line for line in joined.splitlines() if line.startswith("srun")]
    return shlex.split(line.removesuffix("&"))[1:]


@pytest.mark.parametrize("preset", ["paper-gemma", "paper-mistral", "paper-qwen", "tiny"])
@pytest.mark.parametrize("stage", ["needle", "qa"])
def test_bash_parses_it(preset, stage):
    nodes, gpus = (1, 1) if preset == "tiny" else (2, 8)
    script = slurm.sbatch_script(preset, stage, nodes=nodes, gpus=gpus, shards=["/data/it's here"])
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert script.startswith("#!/bin/bash\n#SBATCH") and f"#SBATCH --nodes={nodes}\n" in script
    command = torchrun_command(script)
    assert f"--nnodes={nodes}" in command and f"--nproc_per_node={gpus}" in command and command[-1] != "&"
    assert ("/data/it's here" in command) == (stage == "qa")


def test_it_starts_one_torchrun_per_node_on_the_first_node(tmp_path):
    """Run by bash with stand-ins for srun, scontrol and torchrun."""
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for path, text in {
        binaries / "srun": 'exec "$@"',
        binaries / "scontrol": "echo node07; for i in {1..20000}; do echo other-node-$i; done",
        binaries / "torchrun": 'printf "%s\\n" "$@" > arguments',
    }.items():
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    script = slurm.sbatch_script("paper-gemma", "needle", nodes=2, gpus=8, extra=["--set", "seed=3"])
    environment = {"PATH": f"{binaries}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "42"}
    subprocess.run(
        ["bash"], input=script, text=True, check=True, env=environment | {"SLURM_JOB_NODELIST": "node[07-08]"}
    )
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[:5] == [
        "--nnodes=2", "--nproc_per_node=8", "--rdzv_id=42", "--rdzv_backend=c10d", "--rdzv_endpoint=node07:29500",
    ]  # fmt: skip
    assert arguments[5:] == [
        "-m", "d2l_lib", "train", "--stage", "needle", "--preset", "paper-gemma", "--runs", "runs", "--set", "seed=3",
    ]  # fmt: skip


def test_settings_of_the_training_count(capsys):
    main(["slurm", "--preset", "tiny", "--gpus", "4", "--", "--keep", "0", "--set", "batches_per_step=4", "l1=0.0"])
    assert torchrun_command(capsys.readouterr().out)[-5:] == "--keep 0 --set batches_per_step=4 l1=0.0".split()
    with pytest.raises(SystemExit, match="4 processes cannot share out 2 batches evenly"):
        main(["slurm", "--preset", "tiny", "--gpus", "4"])
    with pytest.raises(SystemExit, match="8 processes cannot share out 4 batches evenly"):
        main(["slurm", "--stage", "needle", "--", "--set", "batches_per_step=4"])


def test_what_cannot_work_is_refused(capsys):
    with pytest.raises(ValueError, match="6 processes cannot share out 16 batches evenly"):
        slurm.sbatch_script("paper-gemma", "needle", nodes=2, gpus=3)
    with pytest.raises(ValueError, match="give its folders .--shards DIR"):
        slurm.sbatch_script("paper-gemma", "qa")
    with pytest.raises(ValueError, match="at least one of everything"):
        slurm.sbatch_script("paper-gemma", "needle", nodes=0)
    with pytest.raises(SystemExit, match="d2l slurm: 48 processes"):
        main(["slurm", "--nodes", "6", "--shards", "x"])
    with pytest.raises(SystemExit, match="no_such=1.*name=value"):
        main(["slurm", "--stage", "needle", "--", "--set", "no_such=1"])
    main(["slurm", "--preset", "paper-qwen", "--shards", "a", "b", "--partition", "gpu", "--", "--recompute"])
    printed = capsys.readouterr().out
    assert "#SBATCH --partition=gpu\n" in printed and "--shards a b --recompute &" in printed
