"""Every notebook is a page that was run to its end, reads without running, and runs again with other parameters."""

import ast
import asyncio
import json
import os
import re
import shutil
import sys
from pathlib import Path

import processes
import pytest
import screenshots

from d2l_lib import records
from d2l_lib.__main__ import main
from d2l_lib.studies import notebooks

ROOT = Path(__file__).resolve().parent.parent
PAGES = notebooks.list_notebooks(ROOT / "notebooks")
# Values that make each notebook quick; every name must stand in its parameters cell. A notebook that is missing here
# fails.
QUICK = {
    "00_quickstart.ipynb": {"SEED": 1, "DOCUMENT_TOKENS": 2048},
    "01_generate_data.ipynb": {"SEED": 1, "N_SAMPLES": 20},
    "02_train_hypernetwork.ipynb": {"SEED": 1, "LIVE_STEPS": 4, "N": 3},
    "04_question_answering.ipynb": {"SEED": 2, "N_FACTS": 3, "N": 4},
    "03_needle_in_a_haystack.ipynb": {
        "SEED": 1,
        "N": 2,
        "LENGTHS": [64, 512],
        "EXAMPLE_TOKENS": 2048,
        "COST_LENGTHS": [512, 1024],
        "PROSE_TOKENS": 256,
    },
    "05_inside_the_adapters.ipynb": {
        "SEED": 1,
        "N_FACTS": 4,
        "N_DOCUMENTS": 2,
        "N": 4,
        "EXAMPLE_TOKENS": 2048,
        "N_HAYSTACKS": 1,
    },
    "06_trace_a_fact.ipynb": {"SEED": 2, "N_FACTS": 6, "N": 1},
    "07_speed_and_memory.ipynb": {"SEED": 1, "LENGTHS": [256, 512], "REPEATS": 1},
    "08_who_should_answer.ipynb": {"SEED": 2, "N_FACTS": 6, "N_ASKED": 2},
    "09_real_text.ipynb": {"N_DOCUMENTS": 1, "N_TOKENS": 4},
}
ABSOLUTE_PATH = re.compile(r"""(?<![\w.:/<])/(?:home|root|Users|tmp|work|mnt|opt|var|private)/[\w.]|[A-Z]:\\\\Users""")
HANGS = re.compile(r"\b(?:Output\(|interact\(|interactive\(|interactive_output\(|interact_manual\()")


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(page: dict) -> list[dict]:
    return [cell for cell in page["cells"] if cell["cell_type"] == "code"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def python(cell: dict) -> ast.Module:
    """The cell's Python, without IPython's % and ! lines."""
    return ast.parse("\n".join(line for line in source(cell).splitlines() if not line.lstrip().startswith(("%", "!"))))


def test_there_are_notebooks():
    assert PAGES, "no notebook found in notebooks/"


@pytest.fixture(params=PAGES, ids=lambda path: path.name)
def page(request) -> dict:
    return load(request.param) | {"path": request.param}


def test_has_one_parameters_cell_of_plain_values(page):
    tagged = [cell for cell in code_cells(page) if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    names = set()
    for statement in python(tagged[0]).body:
        assert isinstance(statement, ast.Assign), "the parameters cell only assigns"
        ast.literal_eval(statement.value)
        names |= {target.id for target in statement.targets}
    assert {"PRESET", "SEED"} <= names


def test_is_a_page_over_the_library(page):
    imports = []
    for number, cell in enumerate(code_cells(page)):
        for node in ast.walk(python(cell)):
            assert not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)), (
                f"defined in: {source(cell)}"
            )
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                imports.append(number)
        assert not HANGS.search(source(cell)), (
            "Output widgets and interact can hang a headless run: set HTML.value instead"
        )
    assert len(set(imports)) <= 1, "one import cell"
    assert page["cells"][0]["cell_type"] == "markdown" and source(page["cells"][0]).startswith("# ")


def test_was_run_from_top_to_bottom_without_error(page):
    counts = [cell["execution_count"] for cell in code_cells(page) if source(cell).strip()]
    assert counts == list(range(1, len(counts) + 1)), "run all cells in order (make notebooks)"
    outputs = [output for cell in code_cells(page) for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("PRESET" in source(cell) or "environment_line" in source(cell) for cell in code_cells(page)[2:3]), (
        "the cell after the parameters prints preset, model, device and versions"
    )


def test_reads_without_a_kernel(page):
    assert "widgets" not in page["metadata"], "stored widget state holds random ids (make notebooks leaves it out)"
    for cell in code_cells(page):
        for output in cell["outputs"]:
            data = output.get("data", {})
            assert notebooks.WIDGET_MIME not in data, (
                "a stored widget shows an error without its kernel (make notebooks leaves it out)"
            )
            if data.get("text/plain") == notebooks.WIDGET_PLACEHOLDER:
                assert "text/html" in data, f"this viewer has no plain form: {source(cell)}"


def test_names_no_place_on_the_machine_that_ran_it(page):
    found = ABSOLUTE_PATH.findall(
        json.dumps({key: value for key, value in page.items() if key != "path"}, ensure_ascii=False)
    )
    assert found == []


def test_saves_figures_under_its_own_number(page):
    number = page["path"].name[:2]
    text = "\n".join(source(cell) for cell in code_cells(page))
    for name in re.findall(r"""save_figure\([^,]+,\s*["']([^"']+)["']""", text):
        assert re.fullmatch(rf"{number}_[a-z0-9_]+_by_[a-z0-9_]+", name.removesuffix(".png")), name
        assert (ROOT / "figures" / f"{name.removesuffix('.png')}.png").is_file(), (
            f"figures/{name}.png is not there: run make notebooks"
        )


def test_every_figure_comes_from_a_notebook():
    """But for the README's pictures of viewers, which tests/screenshots.py takes."""
    text = "\n".join(source(cell) for path in PAGES for cell in code_cells(load(path)))
    figures = {figure.name for figure in (ROOT / "figures").glob("*.png")}
    assert figures >= set(screenshots.PICTURES)
    for name in figures - set(screenshots.PICTURES):
        assert name.removesuffix(".png") in text, f"no notebook saves {name}"


def test_links_the_paper_and_keeps_its_anatomy(page):
    opening = source(page["cells"][0])
    assert "https://arxiv.org/abs/2602.15902" in opening
    for part in ("**Question.**", "**Answer.**", "CPU"):
        assert part in opening
    assert any(source(cell).startswith("## What we learned") for cell in page["cells"])
    last = source(page["cells"][-1])
    assert f'records.write_results(\n    "{page["path"].stem}"' in last and len(last.splitlines()) < 60


# --- the machinery ----------------------------------------------------------------------------------------------------


def toy_page(*sources: str) -> dict:
    cells = [
        {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "source": text, "id": f"c{i}"}
        for i, text in enumerate(sources)
    ]
    cells[0]["metadata"]["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


def test_injection_replaces_known_names_and_refuses_others():
    page = toy_page("PRESET = 'tiny'\nN = 100  # questions\n# N_OTHER = 3", "print(N)")
    changed = notebooks.inject_parameters(page, {"N": 2})
    assert source(changed["cells"][0]) == "PRESET = 'tiny'\nN = 2\n# N_OTHER = 3"
    assert source(page["cells"][0]).splitlines()[1] == "N = 100  # questions", "the page that was given is unchanged"
    with pytest.raises(KeyError, match="does not assign 'N_OTHER'.*'N', 'PRESET'"):
        notebooks.inject_parameters(page, {"N_OTHER": 1})
    with pytest.raises(ValueError, match="found 0"):
        notebooks.inject_parameters({"cells": page["cells"][1:]}, {"N": 1})
    with pytest.raises(ValueError, match="each value on one line"):
        notebooks.inject_parameters(toy_page("N = [\n    1,\n]"), {"N": [2]})


def test_a_failing_notebook_is_named_and_not_tried_again(tmp_path, capsys):
    path = tmp_path / "00_bad.ipynb"
    path.write_text(json.dumps(toy_page("N = 1", "raise ValueError('the lake is cold')")))
    with pytest.raises(notebooks.NotebookFailed, match=r"00_bad\.ipynb(.|\n)*the lake is cold"):
        notebooks.execute(path, tmp_path / "executed")
    assert "trying once more" not in capsys.readouterr().out


def test_a_hanging_notebook_is_tried_once_more_and_says_so(tmp_path, capsys):
    path = tmp_path / "00_slow.ipynb"
    path.write_text(json.dumps(toy_page("import time\ntime.sleep(600)")))
    with pytest.raises(notebooks.NotebookFailed, match="00_slow"):
        notebooks.execute(path, tmp_path / "executed", timeout_s=2)
    assert capsys.readouterr().out.count("gave no answer within 2 s; trying once more") == 1


def test_widgets_leave_their_plain_form():
    page = toy_page("viewer")
    page["metadata"]["widgets"] = {"state": "x"}
    data = {notebooks.WIDGET_MIME: {"model_id": "1f"}, "text/plain": "Viewer(...)", "text/html": "<table></table>"}
    bar = {notebooks.WIDGET_MIME: {"model_id": "2f"}, "text/plain": ["Loading: 0%|", "  | 0/29 [00:00<?, ?it/s]"]}
    page["cells"][0]["outputs"] = [
        {"output_type": "display_data", "data": bar, "metadata": {}},
        {"output_type": "execute_result", "data": data, "metadata": {}, "execution_count": 1},
    ]
    stored = notebooks.without_widget_state(page)
    assert len(stored["cells"][0]["outputs"]) == 1 and len(page["cells"][0]["outputs"]) == 2
    assert stored["cells"][0]["outputs"][0]["data"] == {
        "text/plain": notebooks.WIDGET_PLACEHOLDER,
        "text/html": "<table></table>",
    }
    assert "widgets" not in stored["metadata"] and "widgets" in page["metadata"]


def test_table_cells_may_hold_bars():
    assert notebooks.format_table([{"claim": "a | b"}], ("claim",)).splitlines()[2] == r"| a \| b |"


def test_headline_table_collects_every_claim(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "project_root", lambda: tmp_path)
    records.write_results("03_a", {"length_tokens": 64}, records.claim("needle", "99.5%", ">= 99%"))
    records.write_results("00_b", {}, records.claim("first", 1), records.claim("second", "0.2, 0.4", "<= 0.3"))
    assert capsys.readouterr().out.splitlines() == [f"recorded in data/results/{n}.jsonl" for n in ("03_a", "00_b")]
    rows = notebooks.headline_rows(tmp_path / "data" / "results")
    assert [(row["claim"], row["met"], row["notebook"]) for row in rows] == [
        ("first", "", "00_b"),
        ("second", "✗", "00_b"),
        ("needle", "✓", "03_a"),
    ]
    table = notebooks.format_table(rows).splitlines()
    assert table[4] == "| needle | 99.5%    | >= 99% | ✓   | 03_a     |"
    assert notebooks.results_page(rows).splitlines()[-5:] == table


@pytest.mark.parametrize(
    ("figure", "aim", "met"),
    [
        ("99.0%", ">= 99%", True),
        ("98.9%", ">= 99%", False),
        ("14, 14, 17", "<= 20", True),
        ("0.00% and 1.02%", "<= 1% each", False),
        ("9.1e-06", "<= 1e-4", True),
        ("1.21 times", "<= 1.5 times", True),
        (0.5, ">= 0.95", False),
        ("-0.2", "<= 0", True),
        ("0.45 against 0.35", "higher", None),
        ("-13 MiB", "", None),
    ],
)
def test_a_claim_knows_whether_its_aim_is_met(figure, aim, met):
    assert records.claim("a", figure, aim) == {"claim": "a", "figure": figure, "aim": aim, "met": met}
    assert records.claim("a", figure, aim, True)["met"] is True


def test_a_figure_in_words_has_no_aim_in_numbers():
    with pytest.raises(ValueError, match="speed: the figure 'none' holds no number to hold against the aim '>= 99%'"):
        records.claim("speed", "none", ">= 99%")


# --- all of them, quickly ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copied_project(tmp_path_factory) -> Path:
    """A copy of the project in which notebooks may write their figures and results."""
    copy = tmp_path_factory.mktemp("project")
    for folder in ("d2l_lib", "data", "notebooks", "figures"):
        if (ROOT / folder).is_dir():
            shutil.copytree(
                ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            )
    return copy


def run_cells(page: dict, folder: Path) -> int:
    """How many cells of a page ran in this process, in `folder`; the first error ends it."""
    from IPython.core.interactiveshell import InteractiveShell

    os.chdir(folder)
    shell = InteractiveShell.instance()
    for number, cell in enumerate(code_cells(page)):
        result = shell.run_cell(source(cell), store_history=True)
        assert result.success, f"cell {number}: {result.error_before_exec or result.error_in_exec!r}\n{source(cell)}"
    return shell.execution_count - 1


@pytest.mark.notebooks
@pytest.mark.slow
@pytest.mark.skipif(bool(os.environ.get("D2L_NOTEBOOKS_JUST_RAN")), reason="make notebooks has just run them whole")
@pytest.mark.parametrize("name", [path.name for path in PAGES])
def test_runs_again_with_quick_parameters(name, copied_project):
    """Without a kernel: `make notebooks` runs them in theirs."""
    assert name in QUICK, f"say in QUICK which values make {name} quick"
    page = notebooks.inject_parameters(load(copied_project / "notebooks" / name), QUICK[name])
    ran = processes.run(run_cells, page, copied_project / "notebooks")
    assert ran == sum(bool(source(cell).strip()) for cell in code_cells(page))


@pytest.mark.notebooks
@pytest.mark.slow
def test_questions_are_answered_by_a_real_model_and_data_set_too(copied_project):
    """Page 04 says so: token rows have one way to be read, and no block is tried or routed."""
    page = load(copied_project / "notebooks" / "04_question_answering.ipynb")
    other = {"PRESET": "smollm2", "DATASET": "facts", "N": 2, "N_FACTS": 2}
    assert processes.run(run_cells, notebooks.inject_parameters(page, other), copied_project / "notebooks") > 0


def test_the_command_takes_numbers_and_names(monkeypatch, capsys):
    names = ["3", "00", "06_trace_a_fact", "notebooks/03_needle_in_a_haystack.ipynb"]
    chosen = [page.name[:2] for page in notebooks.choose_notebooks(PAGES, names)]
    assert chosen == ["00", "03", "06"] and notebooks.choose_notebooks(PAGES, []) == PAGES
    monkeypatch.setattr(notebooks, "execute", lambda *_: pytest.fail("a notebook was run"))
    for arguments, status, said in (
        (["--help"], 0, "default: all"),
        (["3", "99"], 2, "no notebook '99'; there are 00_"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["notebooks", *arguments])
        printed = "".join(capsys.readouterr())
        assert stopped.value.code == status and said in printed and (status == 0 or printed.count("\n") == 1)


def test_two_pages_run_at_a_time_and_those_that_measure_time_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "notebooks").mkdir()
    for name in ("00_a", "01_b", "02_c", "03_timed"):
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text(json.dumps(toy_page(f"N = '{name}'")))
    running, together = set(), []

    async def execute(path, executed_folder, timeout_s):
        running.add(path.stem)
        await asyncio.sleep(0.05)
        together.append(sorted(running))
        running.remove(path.stem)
        if path.stem in fails:
            raise notebooks.NotebookFailed(f"{path.name} did not run to its end")
        return path

    monkeypatch.setattr(notebooks, "_execute", execute)
    monkeypatch.setattr(notebooks, "project_root", lambda: tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    fails = ()
    assert main(["notebooks"]) == 0
    assert max(map(len, together)) == 2 and together[-1] == ["03_timed"]
    assert (tmp_path / "data" / "RESULTS.md").is_file()
    capsys.readouterr()
    fails = ("00_a",)
    assert main(["notebooks"]) == 1
    assert capsys.readouterr().err.splitlines() == ["00_a.ipynb did not run to its end"]


def test_a_stopped_run_leaves_no_notebook_behind(tmp_path):
    """Ctrl-C, as the cancelled task that it is."""
    log = tmp_path / "log"
    code = f"import os, time; open({str(log)!r}, 'w').write(str(os.getpid())); time.sleep(600)"

    async def stop():
        task = asyncio.create_task(notebooks._run_and_wait([sys.executable, "-c", code], tmp_path, 600, None))
        while not (log.exists() and log.read_text()):
            await asyncio.sleep(0.02)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(stop())
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)
