"""The study of needles in prose: every haystack holds its needle, and answers are counted by kind."""

import pytest
from tiny_models import build_rows_model

from d2l_lib.studies import prose_needles

STORY = " ".join(f"On day {i} the old captain walked home and counted {7 * i} gulls." for i in range(300))


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """The rows that the record holds before."""
    rows = []
    monkeypatch.setattr(prose_needles, "earlier_rows", lambda name: rows if name == "prose_needles" else None)
    return rows


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "story.txt").write_text(STORY)
    return tmp_path


def test_each_length_and_way_has_its_rows(folder, monkeypatch):
    model, seen = build_rows_model(), []

    def ask(model, prompts, adapters, new_tokens):
        seen.append((prompts, adapters))
        found = []
        for prompt, adapter in zip(prompts, adapters, strict=True):
            inside = "" if adapter is None else " ".join(map(str, (len(adapter.blocks), adapter.documents)))
            found.append(inside or prompt)
        return found, 0.5

    monkeypatch.setattr(prose_needles, "ask", ask)
    first, second = prose_needles.run(model, 6, 0, str(folder), [700, 1400], [100])
    assert len(first) == 8 and len(second) == 16 and second[:8] == first
    assert {row["method"] for row in second} == {"Doc-to-LoRA", "question alone"}
    assert [row["n"] for row in first[:4]] == [2, 2, 2, 6] and all(row["exact_match"] == 0 for row in second)
    *inside, (_, none) = seen[:4]
    assert none == [None] * 6 and [len(adapters) for _, adapters in inside] == [2, 2, 2]  # a stretch at a time
    some = [one for _, adapters in inside for one in adapters]
    assert all(one.documents == ["haystack"] for one in some)
    blocks = [len(one.blocks) for one in some]
    assert min(blocks) > 3 and len({tuple(block.chunk for block in one.blocks) for one in some}) == len(set(blocks))
    # haystacks with the same text share all blocks but those with a needle
    one, other = some[:2]
    shared = [a.A["down_proj"] is b.A["down_proj"] for a, b in zip(one.blocks, other.blocks, strict=True)]
    assert 0 < shared.count(False) <= 2


def test_rows_of_other_lengths_stay(folder, monkeypatch, recorded):
    recorded += [{"length_tokens": length, "n": 50, "method": "question alone"} for length in (64, 700, 9000)]
    monkeypatch.setattr(prose_needles, "ask", lambda model, prompts, *_: ([""] * len(prompts), 0.5))
    (rows,) = prose_needles.run(build_rows_model(), 3, 0, str(folder), [700], [])
    assert [row["length_tokens"] for row in rows] == [64, *[700] * 8, 9000]
    assert rows[0] is recorded[0] and 50 not in [row["n"] for row in rows[1:-1]]


def test_right_answers_are_counted_by_kind(folder, monkeypatch):
    model = build_rows_model()
    needles = {}
    draw = prose_needles.prose.draw_needle

    def kept(rng, kind):
        one = draw(rng, kind)
        needles.setdefault(one.question, []).append(one.answer)
        return one

    monkeypatch.setattr(prose_needles.prose, "draw_needle", kept)

    place = {}

    def ask(model, prompts, adapters, new_tokens):
        replies = []
        for prompt, adapter in zip(prompts, adapters, strict=True):
            question = next(question for question in needles if question in prompt)
            number = place[question] = place.get(question, -1) + 1
            answer = needles[question][20 + number % 2]  # 20 were drawn to see how long they are
            replies.append("no" if adapter is None or "date" in prompt else answer)
        return replies, 0.5

    monkeypatch.setattr(prose_needles, "ask", ask)
    (rows,) = prose_needles.run(model, 6, 0, str(folder), [700], [])
    by_kind = {row["kind"]: row["exact_match"] for row in rows if row["method"] == "Doc-to-LoRA"}
    assert by_kind == {"date": 1, "number": 1, "word": 1, "all": 1}
    assert all(row["exact_match"] == row["holds_answer"] == 0 for row in rows if row["method"] == "question alone")


def test_the_base_model_reads_haystacks_in_its_prompt_with_and_without_a_lora(folder, monkeypatch):
    model, parts = build_rows_model(), []
    model.window = 1024
    monkeypatch.setattr(prose_needles, "_AT_ONCE", 1600)

    def ask(model, prompts, adapters, new_tokens):
        parts.append((new_tokens, len(prompts)))
        return ["I cannot tell."] * len(prompts), 1.0

    def ask_reading(model, prompts, lora, new_tokens):
        assert lora == "the LoRA" and all(prompt.count("gulls") > 5 for prompt in prompts)
        parts.append(("LoRA", len(prompts)))
        return [f"{number}" for number in range(len(prompts))], 2.0 if len(prompts) == 2 else 5.0

    monkeypatch.setattr(prose_needles, "ask", ask)
    monkeypatch.setattr(prose_needles, "ask_reading", ask_reading)
    monkeypatch.setattr(prose_needles, "reading_lora", lambda model: "the LoRA")
    monkeypatch.setattr(prose_needles, "reading_lora_folder", lambda model: folder)
    (rows,) = prose_needles.run(model, 5, 0, str(folder), [700], [700])
    seconds = {row["method"]: row["seconds"] for row in rows if row["kind"] == "all"}
    assert seconds[prose_needles.IN_PROMPT] == 1 and seconds[prose_needles.WITH_LORA] == (2 * 2 + 2 * 2 + 5) / 5
    assert parts[-6:] == [(24, 2), (24, 2), (24, 1), ("LoRA", 2), ("LoRA", 2), ("LoRA", 1)], "few at a time, for memory"
    monkeypatch.setattr(prose_needles, "reading_lora_folder", lambda model: folder / "none")
    (rows,) = prose_needles.run(model, 5, 0, str(folder), [700], [700])
    assert {row["method"] for row in rows} == {"Doc-to-LoRA", "question alone", prose_needles.IN_PROMPT}
