"""A newcomer's first five minutes.

Every way to install names the same packages, and every command that is promised exists.
"""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

# import name -> package name, where they differ
PACKAGE_OF = {
    "yaml": "pyyaml",
    "rattler": "py-rattler",
    "rouge_score": "rouge-score",
    "IPython": "ipython",
    "PIL": "pillow",
}
# used only where it happens to be installed
OPTIONAL = {"flash_attn", "llmlingua", "pypdf", "vllm"}


@pytest.fixture(scope="module")
def project(project_folder) -> dict:
    return tomllib.loads((project_folder / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def lock(project_folder) -> dict[str, str]:
    lines = (project_folder / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins), (
        "name==version alone, no local suffix, no address"
    )
    return {canonicalize_name(name): version for name, version in (pin.split("==") for pin in pins)}


def declared(project) -> list[Requirement]:
    return [Requirement(line) for line in [*project["dependencies"], *project["optional-dependencies"]["test"]]]


def test_environment_yml_installs_the_pyproject_list_and_nothing_else(project_folder, project):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    environment = yaml.safe_load((project_folder / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-e .[test]"]}
    assert "test" in project["optional-dependencies"]
    assert conda == ["python=3.11", "pip"], "packages and their versions belong in pyproject.toml"
    assert SpecifierSet(project["requires-python"]).contains("3.11")


def test_environment_yml_is_understood_by_conda(project_folder):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    rattler = pytest.importorskip("rattler", reason="py-rattler is not installed")
    environment = yaml.safe_load((project_folder / "environment.yml").read_text())
    specs = [rattler.MatchSpec(spec) for spec in environment["dependencies"] if isinstance(spec, str)]
    assert [spec.name.normalized for spec in specs] == ["python", "pip"]


def test_lock_satisfies_pyproject(project, lock):
    for requirement in declared(project):
        name = canonicalize_name(requirement.name)
        assert name in lock, f"{name} is not in requirements.lock"
        assert requirement.specifier.contains(lock[name]), f"{requirement} does not allow the tested {lock[name]}"


def test_every_import_is_declared(project_folder, project):
    names = {canonicalize_name(requirement.name) for requirement in declared(project)}
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "test" for line in lines]
    core = {canonicalize_name(Requirement(line).name) for line in [*project["dependencies"], *extras]}
    # come with jupyterlab and nbconvert by definition
    core |= {"ipython", "nbformat", "nbclient"}
    for path in sorted([*project_folder.glob("d2l_lib/**/*.py"), *project_folder.glob("tests/**/*.py")]):
        allowed = core if path.is_relative_to(project_folder / "d2l_lib") else core | names
        for name in imported_packages(path) - OPTIONAL:
            package = canonicalize_name(PACKAGE_OF.get(name, name))
            assert package in allowed, f"{path.name} imports {name}, which pyproject.toml does not name"


def imported_packages(path: Path) -> set[str]:
    """Top-level names of the third-party packages that a file imports anywhere."""
    local = {"d2l_lib", *(other.stem for folder in (path.parent, path.parents[1]) for other in folder.glob("*.py"))}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return {name for name in found if name not in sys.stdlib_module_names and name not in local}


def makefile_targets(project_folder) -> set[str]:
    text = (project_folder / "Makefile").read_text()
    return set(re.findall(r"^([a-z]+):", text, flags=re.MULTILINE))


def test_readme_commands_exist(project_folder):
    readme = project_folder / "README.md"
    if not readme.is_file():
        pytest.skip("there is no README.md yet")
    text = readme.read_text(encoding="utf-8")
    named = set(re.findall(r"^\s*(?:\$ )?make ([a-z]+)|`make ([a-z]+)", text, flags=re.MULTILINE))
    commands = {first or second for first, second in named}
    assert commands >= {"notebooks", "test"}
    assert commands <= makefile_targets(project_folder), "README names a make command that does not exist"
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (project_folder / link).exists(), f"README links to {link}, which does not exist"


def test_make_offers_what_the_project_promises(project_folder):
    assert makefile_targets(project_folder) >= {"setup", "notebooks", "test", "lab", "train", "lint"}


def test_make_keeps_everything_inside_the_clone(project_folder):
    printed = subprocess.run(
        ["make", "--no-print-directory", "-n", "test", "notebooks", "train", "PRESET=other"],
        cwd=project_folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "--preset other" in printed
    for line in printed.splitlines():
        if ".venv/bin/python -m" in line and "pip" not in line:
            assert str(project_folder / ".cache" / "xdg") in line and str(project_folder / ".cache" / "tmp") in line, (
                line
            )


def test_make_test_uses_the_cores_and_lets_python_keep_what_it_compiled(project_folder):
    def make(*words: str) -> str:
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
        for name in ("MAKEFLAGS", "MAKEOVERRIDES"):  # of the make that runs this test
            environment.pop(name, None)
        command = ["make", "--no-print-directory", "--eval=variables: ; @env", *words]
        return subprocess.run(
            command, cwd=project_folder, env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert "-n logical --maxprocesses 4 " in make("-n", "test")
    assert "-n 0 " in make("-n", "test", "WORKERS=0")
    assert "PYTHONDONTWRITEBYTECODE" not in make("variables")


def test_ci_script_is_sound_bash(project_folder):
    subprocess.run(["bash", "-n", ".ci/run"], cwd=project_folder, check=True)
