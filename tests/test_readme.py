"""The README says what is so: its snippet prints what stands below it, its table is that of the recorded runs."""

import contextlib
import io
import re

from d2l_lib.studies import notebooks


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_snippet_prints_what_the_readme_shows(project_folder):
    found = blocks((project_folder / "README.md").read_text(encoding="utf-8"))
    place = next(i for i, (language, _) in enumerate(found) if language == "python")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(found[place][1], "README.md", "exec"), {})
    assert printed.getvalue() == found[place + 1][1]


def test_table_holds_the_recorded_figures(project_folder):
    """Times and memory differ from machine to machine; every other row of the README is the recorded one."""
    text = (project_folder / "README.md").read_text(encoding="utf-8")
    rows = notebooks.headline_rows(project_folder / "data" / "results")
    assert rows
    for row in rows:
        if "memory" in row["claim"]:
            continue
        cells = [" ".join(str(row[column]).split()) for column in ("claim", "figure", "aim")]
        pattern = r"\|\s*" + r"\s*\|\s*".join(map(re.escape, cells)) + r"\s*\|"
        assert re.search(pattern, text), f"the README's table lacks: {cells}"
