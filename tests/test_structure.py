"""The rooms of the package: nothing imports upwards, by the contracts in pyproject.toml and by a count of our own."""

import subprocess
import sys

import structure


def test_contracts_of_imports_are_kept(tmp_path):
    command = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(cache_dir=None, no_cache=True))"
    result = subprocess.run([sys.executable, "-c", command], cwd=structure.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Contracts: 0 kept" not in result.stdout and " 0 broken" in result.stdout


def test_no_room_imports_a_higher_one_and_none_in_a_circle():
    figures = structure.count()
    assert figures["imports upwards"] == [] and figures["circles"] == []
