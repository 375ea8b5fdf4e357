"""The README says what is so: its snippet prints what stands below it, its table is that of the recorded runs."""

import contextlib
import io
import re

import pytest

from d2l_lib.records import read_jsonl
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


@pytest.fixture
def numbers_beside(project_folder) -> dict[str, list[str]]:
    """{claim: the numbers of its last column in the README, in their order, from the records}; others have none."""
    headlines = notebooks.headline_rows(project_folder / "data" / "results")
    figures = {row["claim"]: str(row["figure"]).split(" ")[0] for row in headlines}

    def figure(start: str) -> float:
        """The (mean) figure of the one claim that starts so."""
        (claim,) = [name for name in figures if name.startswith(start)]
        return float(figures[claim])

    def one(study: str, value: str, **where) -> float:
        """`value` of the one row of a record with these columns."""
        rows = read_jsonl(project_folder / "data" / "full_runs" / f"{study}.jsonl")
        (row,) = [row for row in rows if all(row.get(name) == wanted for name, wanted in where.items())]
        return row[value]

    squad = {"metric": "token_f1_squad", "tokens": None}
    in_prompt = one("passages", "score", method="passage in the prompt", **squad)
    with_lora = one("passages", "score", method="passage in the prompt, reading LoRA", **squad)
    another = one("passages", "score", method="another passage's adapter", **squad)
    inside = figure("SQuAD, unseen paragraphs, F1")
    assert f"{inside / with_lora:.2f}" == f"{figure('SQuAD, share of the F1'):.2f}"

    lengths: dict[tuple[int, int], list[float]] = {}
    for seed in (1, 2):
        for row in read_jsonl(project_folder / "data" / "full_runs" / f"needle_ours_seed{seed}.jsonl"):
            lengths.setdefault((seed, row["length_tokens"]), []).append(row["exact_match"])
    needles = [sum(depths) / len(depths) for depths in lengths.values()]

    def share(condition: str, method: str) -> float:
        """Of in context, with the bundled training."""
        where = {"condition": condition, "training_seed": 0}
        return one("reading", "exact_match", method=method, **where) / one(
            "reading", "exact_match", method="in context", **where
        )

    refused = [
        one("reading", "exact_match", condition=condition, method="router, always open", training_seed=seed)
        - one("reading", "exact_match", condition=condition, method="router", training_seed=seed)
        for condition in ("8 facts", "20 facts", "40 facts", "16 documents", "64 documents")
        for seed in (0, 1, 2)
    ]
    largest = {"blocks": 10_000}
    routed_ms, alone_ms = (
        one("router", "cpu_milliseconds", measure=name, **largest) for name in ("router", "bias alone")
    )
    prepared = {
        name: one("qa_methods", "seconds_prepare", method=name)
        for name in ("Doc-to-LoRA", "distillation (100 queries)")
    }
    kinds = ("two_hop", "paraphrase", "unanswerable", "yes_no", "which_of", "list")
    summed, sparse = "published sum", "read sparsely in one pass: "
    return {
        "SQuAD": [f"{in_prompt:.2f}", f"{with_lora:.2f}", f"{inside / with_lora:.2f}", f"{another:.2f}"]
        + [f"{figure('SQuAD, ten paragraphs'):.3f}", f"{inside:.3f}"],
        "General questions": [
            f"{figure(f'General questions, lost with {what} inside'):.3f}"
            for what in ("ten unrelated passages", "an unrelated article")
        ],
        "needle": [f"{min(needles):.0%}"[:-1], f"{max(needles):.0%}", "40,000"],
        "one-hop questions": [f"{figure('one-hop questions, share of in context, routed'):.3f}"],
        "routed: 40 facts": [f"{share('40 facts', summed):.2f}", f"{figure(sparse + '40 facts'):.2f}"]
        + [f"{figure(f'routed: {kind}'):.2f}" for kind in kinds],
        "routed: 64 documents": [f"{figure(sparse + '64 documents'):.3f}", "10,000"]
        + [f"{one('router', 'share', measure='router', **largest):.2f}", f"{routed_ms / alone_ms:.1f}"],
        "routed: encyclopedia": [f"{share('encyclopedia beside 20 facts', summed):.2f}"]
        + [f"{figure(sparse + 'encyclopedia'):.3f}", f"{sum(refused) / len(refused):.1%}", "1000"],
        "times faster": [
            f"{one('qa_methods', 'score', method=name):.3g}"
            for name in ("distillation (100 queries)", "Doc-to-LoRA", "Doc-to-LoRA, sparse")
        ]
        + [f"{prepared['distillation (100 queries)'] / prepared['Doc-to-LoRA']:.0f}"],
        "evidence sentence": [
            f"{figure('both evidence sentences'):.2f}",
            f"{figure('the same where both are needed'):.2f}",
            str(one("two_hops", "n", questions="all", method="question_parts")),
        ],
    }


def test_what_to_read_beside_a_claim_has_recorded_numbers(project_folder, numbers_beside):
    """Each number in the last column of the README's table stands in a record."""
    text = (project_folder / "README.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith(("| ✓", "| ✗"))]
    told = {row[1].strip(): re.findall(r"\b\d+(?:[.,]\d+)*%?", row[-1]) for row in rows}
    for claim, numbers in told.items():
        expected = next((of for start, of in numbers_beside.items() if claim.startswith(start)), [])
        assert numbers == expected, claim


def test_links_and_pictures_are_there(project_folder):
    for name in ("README.md", "d2l_lib/README.md", "data/README.md", "data/RESULTS.md"):
        page = project_folder / name
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{name} links to {target}, which is not there"
