"""The command `d2l`: its help, its options, its errors, and what is recorded as having made a file."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from d2l_lib import __main__ as command
from d2l_lib import studies
from d2l_lib.records import iter_jsonl

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "pandas", "numpy")
WRONG = {
    "ask": [["x.txt"], ["x.txt", "Who?", "--blocks", "0"], ["x.txt", "Who?", "--chunk-tokens", "-1"], []],
    "internalize": [["x.txt"], ["-o", "x.safetensors"], ["x.txt", "-o", "x.safetensors", "--chunk-tokens", "0"]],
    "corpora": [["write", "squad", "--documents", "0"], ["write", "squad"], ["write", "no-such"], ["read"]],
    "generate": [["--out", "x", "--workers", "0"], ["--out", "x", "--worker", "-1"], ["--out", "x", "--seed", "-1"],
                 []],
    "slurm": [["--nodes", "0"], ["--gpus", "-8"], ["--hours", "0"], ["--preset", "none"]],
    "train": [["--seed", "-1"], ["--steps", "0"], ["--report-steps", "-5"], ["--steps", "9" * 5000],
              ["--steps", "1e9"], ["--save-steps", "0"], ["--keep", "-1"], ["--stage", "none"],
              ["--stage", "text-to-lora", "--seed", "-1"], ["--stage", "reading", "--base", "x"],
              ["--stage", "reading", "--preset", "paper-gemma"], ["--start", "x"], ["--stage", "reading-lora"],
              ["--stage", "published"]],
    "watch": [[".", "--every", "0"], [".", "--every", "inf"], [".", "--n", "0"], [".", "--lengths", "-64"]],
    "cache": [["x"], ["--clear", "x"]],
    "convert": [["only one"], []],
    "notebooks": [["--all"], ["x"]],
    "study": [[], ["none"], ["ablations", "--n", "0"], ["ablations", "--seeds", "0", "-1"],
              ["ablations", "--variant", "none"], ["kinds", "--n", "0"], ["methods", "--n", "-3"],
              ["methods", "--distillation-steps", "0"], ["needles", "--n", "0"], ["base-model", "--seed", "-1"],
              ["needles", "--training-seed", "x"], ["attribution", "--n", "0"], ["attribution", "--n-two-hop", "-1"],
              ["attribution", "--seed", "9" * 20], ["gate", "--n", "0"], ["dial", "--seed", "1.5"],
              ["probes", "--n", "0"],
              ["report", "--n", "0"], ["speed-tiny", "--lengths", "64", "0"], ["speed-tiny", "--n", "0"],
              ["speed-smollm2", "--n", "0"],
              ["speed-gemma", "--limit", "nan"], ["recompression", "--length", "0"], ["routing", "--seed", "-1"],
              ["reading", "--n", "0"], ["elastic", "--n", "0"], ["router", "--n", "0"], ["no-block", "--n", "0"],
              ["router-weights", "--n", "0"], ["lists", "--n", "0"], ["answering", "--n", "0"],
              ["retrieval", "--n", "0"], ["two-hops", "--n", "0"],
              ["methods", "--only"], ["passages", "--n", "0"], ["passages", "--only"], ["interference", "--n", "0"],
              ["passages", "--seen"], ["distilled-passages", "--steps", "0"],
              ["articles", "--n", "0"], ["chunks", "--n", "0"], ["rise", "--n", "0"], ["tracing", "--n", "0"],
              ["absorption", "--n", "0"], ["bench", "--n", "0"], ["bench", "--chunks"], ["bench", "--chunks", "0"],
              ["scaling", "--n", "0"], ["history"], ["history", "--before"], ["quicker", "--n", "0"],
              ["generation", "--n", "0"], ["generation", "--documents", "0"],
              ["facts", "--n", "0"], ["long-texts", "--tokens", "0"], ["half-precision", "--length", "0"],
              ["prose-needles", "--texts", "x", "--n", "0"],
              ["written-questions", "--n", "0"], ["written-questions", "--styles", "x"]],
}  # fmt: skip


@pytest.mark.parametrize(("name", "words"), [(n, words) for n, several in WRONG.items() for words in several])
def test_wrong_options_end_a_command_at_once_with_one_line(name, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command.main([name, *words])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"d2l {name}") and message.count("\n") == 1 and len(message) < 700
    assert re.search("error|expected|invalid|unknown|required|needs|unrecognized|no notebook", message)
    assert list(tmp_path.iterdir()) == []


def test_every_command_and_every_study_is_among_them():
    assert {*WRONG} == {*command.COMMANDS}
    assert {words[0] for words in WRONG["study"] if words} == {"none", *studies.STUDIES}


def test_a_command_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["none"])
    assert stopped.value.code == 2 and "there are ask, internalize, cache, train" in capsys.readouterr().err
    assert command.main([]) == 2


def test_numbers_on_the_command_line():
    count, seed, positive = (command.KINDS[name] for name in ("count", "seed", "positive"))
    assert (count("12"), command.KINDS["count or none"]("0"), seed("4294967295")) == (12, 0, 2**32 - 1)
    assert positive("0.5") == 0.5
    for kind, text in ((count, "1_0"), (count, "+-1"), (seed, "4294967296"), (count, "²"), (positive, "inf")):
        with pytest.raises(argparse.ArgumentTypeError, match="is expected, not"):
            kind(text)


INSTANT = [
    "--help",
    "study list",
    "ask --help",
    "convert --help",
    "generate --help",
    "train --help",
    "study kinds --help",
]


@pytest.mark.parametrize("line", INSTANT)
def test_help_is_instant_and_imports_nothing_heavy(line):
    words = line.split()
    code = (
        "import sys, time; began = time.process_time()\n"
        "from d2l_lib.__main__ import main\n"
        "try:\n    status = main(sys.argv[1:])\nexcept SystemExit as stop:\n    status = stop.code\n"
        f"loaded = [name for name in {HEAVY} if name in sys.modules]\n"
        "print(status, loaded, time.process_time() - began, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, check=True)
    status, loaded, seconds = re.fullmatch(r"(\S+) (\[.*\]) (\S+)\n", done.stderr).groups()
    assert status in ("0", "None") and loaded == "[]" and float(seconds) < 1
    if line in ("--help", "study list"):
        most = 32 if line == "--help" else len(studies.STUDIES)
        assert len(done.stdout.splitlines()) <= most and all(len(line) <= 120 for line in done.stdout.splitlines())


def test_every_module_of_a_command_has_its_two_functions():
    for name, (module, _) in command.COMMANDS.items():
        if module:
            home = __import__(f"d2l_lib.{module}", fromlist=["run"])
            assert callable(home.add_arguments) and callable(home.run), name


def test_every_study_has_its_function():
    for study in studies.STUDIES.values():
        assert callable(studies._function(f"studies.{study.place}"))


# --- what is recorded -------------------------------------------------------------------------------------------------
def recorded_commands() -> set[str]:
    """The commands in the rows of data/full_runs, and those in backticks in the two pages."""
    found = {
        row["command"]
        for path in (ROOT / "data" / "full_runs").rglob("*.jsonl")
        for row in iter_jsonl(path)
        if "command" in row
    }
    for page in ("README.md", "data/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        found |= set(re.findall(r"`((?:torchrun|d2l) [^`]*)`", text))
        found |= set(re.findall(r"^(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:torchrun|d2l) .*$", text, re.MULTILINE))
    return found


def test_every_recorded_command_is_one():
    commands = recorded_commands()
    assert len(commands) > 40
    for line in commands:
        assert "python -m" not in line, line
        words = shlex.split(line.replace("<variant>", "ours").replace("<k>", "1"), comments=True)
        start = next(i for i, word in enumerate(words) if Path(word).name in ("d2l", "d2l_lib"))
        command.parse(words[start + 1 :])


def test_every_record_is_made_by_a_study_or_a_training():
    files = [study_file for study in studies.STUDIES.values() for study_file in study.files]
    patterns = [re.sub(r"<\w+>|\{\w+\}", "*", name) + ".jsonl" for name in files]
    folder = ROOT / "data" / "full_runs"
    made = {path for pattern in patterns for path in folder.glob(pattern)}
    rest = {path.name for path in folder.rglob("*.jsonl") if path not in made}
    assert all(name.endswith("_training.jsonl") or name == "base_model_first_recipe.jsonl" for name in rest), rest


# --- ask and internalize ----------------------------------------------------------------------------------------------
def run_d2l(*words: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONPROFILEIMPORTTIME": "1" if "--json" in words else ""}
    return subprocess.run(
        [sys.executable, "-m", "d2l_lib", *words], capture_output=True, text=True, cwd=folder, env=environment
    )


@pytest.mark.slow
def test_ask_and_internalize_on_files(tmp_path, monkeypatch, capsys):
    """From another folder, with the bundled model; the first in a process of its own."""
    row = next(row for row in iter_jsonl(ROOT / "data" / "samples" / "world_test.jsonl") if row["kind"] == "one_hop")
    (tmp_path / "notes.txt").write_text(row["document"])
    (tmp_path / "page.html").write_text("<p>Nothing of interest happened that year.</p>")
    done = run_d2l("ask", "notes.txt", "page.html", row["question"], "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["answer"] == row["answer"] and facts["documents"] == ["notes.txt", "page.html"]
    assert list(facts["seconds"]) == ["read", "import", "load", "internalize", "answer"]
    assert done.stderr.index("loading tiny/qa") < done.stderr.index("internalizing")
    assert not re.search(r"\| +(pandas|datasets)$", done.stderr, re.MULTILINE), "what only tables need"
    monkeypatch.chdir(tmp_path)
    assert command.main(["internalize", "notes.txt", "-o", "notes.safetensors", "--quiet"]) == 0
    assert capsys.readouterr() == ("notes.safetensors\n", "")
    from d2l_lib import Adapter

    assert {block.document for block in Adapter.load(tmp_path / "notes.safetensors").blocks} == {"notes.txt"}


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        (["ask", "nothing.txt", "Who?"], 1, "d2l ask: no document at nothing.txt: there is no such file"),
        (["ask", "empty.txt", "Who?"], 1, "d2l ask: empty.txt holds no text"),
        (["ask", "empty.txt", "empty.txt"], 2, "the question comes last"),
        (["ask", "empty.txt", " "], 2, "the question is blank"),
        (["internalize", "empty.txt", "-o", "folder"], 1, "folder is a folder"),
    ],
)
def test_bad_documents_are_told_before_anything_is_loaded(words, status, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit) as stopped:
        command.main([*words, "--quiet"])
    said = capsys.readouterr().err
    assert stopped.value.code == status and line in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["convert", "notes.txt", "out"], "d2l convert: notes.txt is damaged or not a PyTorch checkpoint"),
        (["ask", "notes.txt", "Who?", "--model", "notes.txt"], "d2l ask: notes.txt is damaged or not a PyTorch"),
        (
            ["ask", "notes.txt", "Who?", "--model", " "],
            "d2l ask: the source of a model must be a name or path, not ' '",
        ),
        (["ask", "notes.txt", "?" * 300, "--model", "none"], "d2l ask: nothing at 'none'"),
        (["internalize", ".", "-o", "a.safetensors"], "d2l internalize: . is a folder"),
    ],
)
def test_what_is_no_model_ends_a_command_with_one_line(words, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("Ada keeps 3 cats.")
    with pytest.raises(SystemExit):
        command.main([*words, *(["--quiet"] if words[0] != "convert" else [])])
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)


@pytest.mark.parametrize(
    "words", [["ask", "", "Who?"], ["generate", "--out", ""], ["train", "--base", ""], ["watch", ""]]
)
def test_an_empty_argument_is_not_the_working_folder(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command.main(words)
    assert stopped.value.code == 2 and "an argument is empty ('')" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_the_model_does_not_know_gets_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D2L_ADAPTER_CACHE", str(tmp_path / "cache"))
    Path("notes.txt").write_text(
        "I had coffee with Ana at the Lisbon station on Friday, and we spoke of her journey. " * 3
    )
    command.main(["ask", "notes.txt", "Where did I have coffee?"])
    told = capsys.readouterr().err
    assert "notes.txt: Outside what this model knows" in told and "--model smollm2" in told
    command.main(["ask", "notes.txt", "Where did I have coffee?", "--quiet"])
    assert "Outside" not in capsys.readouterr().err
