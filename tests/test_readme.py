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


def test_results_are_the_recorded_claims(project_folder):
    """data/RESULTS.md is what `d2l notebooks` writes from the claims that the notebooks recorded."""
    rows = notebooks.headline_rows(project_folder / "data" / "results")
    assert len(rows) > 40
    assert (project_folder / "data" / "RESULTS.md").read_text(encoding="utf-8") == notebooks.results_page(rows)


def test_ten_claims_with_their_marks(project_folder):
    """Each row of the README's table is a recorded claim, with its mark, the base model's size and the kind of text."""
    text = (project_folder / "README.md").read_text(encoding="utf-8")
    recorded = {row["claim"]: row for row in notebooks.headline_rows(project_folder / "data" / "results")}
    claims = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in text.splitlines()
        if line.startswith(("| ✓", "| ✗"))
    ]
    assert len(claims) == 10 and {mark for mark, *_ in claims} == {"✓", "✗"}
    for mark, claim, figure, aim, what, caveat in claims:
        row = recorded[claim]
        assert (mark, figure, aim) == (row["met"], row["figure"], row["aim"]), f"the README does not say so: {row}"
        assert re.fullmatch(r"\d+(\.\d+)? [MB], (generated world|real text)", what) and caveat


def test_links_and_pictures_are_there(project_folder):
    for name in ("README.md", "d2l_lib/README.md", "data/README.md", "data/RESULTS.md"):
        page = project_folder / name
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{name} links to {target}, which is not there"
