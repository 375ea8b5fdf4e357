"""Paragraphs of English facts: answers stand in them, no question has two, and the splits share nothing."""

import random
import re
from collections import Counter

import pytest

from d2l_lib.tasks import facts, qa

N = 300


def paragraphs(split: str, n: int = N, n_facts: tuple[int, int] = (1, 8)):
    return [facts.draw_paragraph(rng := random.Random(f"test/{number}"), split, rng.randint(*n_facts))
            for number in range(n)]  # fmt: skip


def as_words(text: str) -> str:
    return rf"(?<!\w){re.escape(text)}(?!\w)"


def in_words(split: str) -> list[tuple[re.Pattern, facts._Kind]]:
    """Every statement of a split as a pattern with its subject and value."""
    patterns = []
    for kind in facts.KINDS:
        for statement in facts.wordings_of(kind.statements, split):
            text = re.escape(statement).replace(r"\{s\}", "(?P<s>.+?)").replace(r"\{v\}", "(?P<v>.+?)")
            patterns.append((re.compile(text.replace(r"\{a\}", "an?"), re.IGNORECASE), kind))
    return patterns


@pytest.mark.parametrize("split", facts.SPLITS)
def test_subjects_and_answers_stand_in_the_paragraph_as_whole_words(split):
    for paragraph in paragraphs(split):
        for fact in paragraph.facts:
            assert re.search(as_words(fact.value), paragraph.text), (fact, paragraph.text)
            assert re.search(as_words(fact.subject), paragraph.text, re.IGNORECASE)
        assert "{" not in paragraph.text and "  " not in paragraph.text and paragraph.text[-1] == "."
    frame = facts.fact_samples(N, 0, split=split)
    for row in frame.itertuples():
        assert re.search(as_words(row.answers[0]), row.document) and len(row.answers) == 1
        assert row.question[0].isupper() and row.question[-1] == "?" and row.answers[0] not in row.question


@pytest.mark.parametrize("split", facts.SPLITS)
def test_no_question_has_two_answers(split):
    for paragraph in paragraphs(split):
        assert max(Counter((fact.kind, fact.subject) for fact in paragraph.facts).values()) == 1
        assert max(Counter(fact.value for fact in paragraph.facts).values()) == 1
        married = [(fact.kind.name, {fact.subject, fact.value}) for fact in paragraph.facts
                   if fact.kind.name in ("spouse", "twin")]  # fmt: skip
        assert all(not (a & b) for kind, a in married for other, b in married if kind == other and a is not b)
        wrote = {fact.subject for fact in paragraph.facts if fact.kind.name == "title"}
        assert not wrote & {fact.value for fact in paragraph.facts if fact.kind.name == "author"}
    for _, rows in qa.group_by_document(facts.fact_samples(N, 0, split=split)):
        assert rows["question"].is_unique


def test_the_name_in_a_question_matters():
    several = facts_of_one_kind = related = 0
    for paragraph in paragraphs("test", n_facts=(4, 8)):
        subjects = {fact.subject for fact in paragraph.facts}
        several += len(subjects) > 1
        facts_of_one_kind += max(Counter(fact.kind for fact in paragraph.facts).values()) > 1
        related += bool(subjects & {fact.value for fact in paragraph.facts})
    assert several > 0.9 * N and facts_of_one_kind > 0.4 * N and related > 0.03 * N


def test_each_kind_has_wordings_of_its_own():
    assert len(facts.KINDS) >= 25 and len({(kind.subject, kind.name) for kind in facts.KINDS}) == len(facts.KINDS)
    for wordings in ([kind.statements for kind in facts.KINDS], [kind.questions for kind in facts.KINDS]):
        assert all(len(few) == len(set(few)) == 4 for few in wordings)
        train, test = ({text for few in wordings for text in facts.wordings_of(few, split)} for split in facts.SPLITS)
        assert not train & test and len(test) == len(facts.KINDS) and len(train) == 3 * len(facts.KINDS)
    for kind in facts.KINDS:
        assert all(text.count("{s}") == text.count("{v}") == 1 for text in kind.statements), kind
        assert all(text.count("{s}") == 1 and "{v}" not in text for text in kind.questions), kind
    assert max(Counter((kind.subject, text) for kind in facts.KINDS for text in kind.questions).values()) == 1


def test_splits_share_no_name_no_value_and_no_wording():
    seen = {}
    for split in facts.SPLITS:
        every = [fact for paragraph in paragraphs(split, 1500) for fact in paragraph.facts]
        values = {fact.value for fact in every}
        subjects = {fact.subject for fact in every}
        names = {word for fact in every for word in re.findall(r"[A-Z]\w{3,}", f"{fact.subject} {fact.value}")
                 if fact.kind.subject not in ("book",) and fact.kind.value not in ("title", "day", "date")}  # fmt: skip
        seen[split] = {"values": values, "subjects": subjects, "names": names - facts._SHARED}
        assert {fact.kind for fact in every} == set(facts.KINDS)
    for what in ("values", "subjects", "names"):
        assert not seen["train"][what] & seen["test"][what]
    words = [word for one in facts._WORDS.values() for word in one.split()]
    assert len(words) == len(set(words))


@pytest.mark.parametrize("split", facts.SPLITS)
def test_a_paragraph_is_in_the_words_of_its_split(split):
    other = {"train": "test", "test": "train"}[split]
    own = in_words(split)
    for paragraph in paragraphs(split, 40):
        assert not any(opening.strip() in paragraph.text for opening in facts._OPENINGS[other])
        for sentence in paragraph.text.split(". "):
            fits = [kind for pattern, kind in own if pattern.search(sentence.rstrip(".") + ".")]
            assert fits, sentence
    frame = facts.fact_samples(60, 5, split=split)
    endings = {re.escape(q).replace(r"\{s\}", ".+") for kind in facts.KINDS
               for q in facts.wordings_of(kind.questions, split)}  # fmt: skip
    assert all(any(re.fullmatch(one, question) for one in endings) for question in frame["question"])


def test_a_paragraph_is_fixed_by_seed_split_and_number():
    first, more = facts.fact_samples(20, 3), facts.fact_samples(50, 3)
    assert first.equals(more[:20]) and first.equals(facts.fact_samples(20, 3)) and more["id"].is_unique
    apart = [set(facts.fact_samples(20, seed, split=split)["document"]) for seed in (3, 4) for split in facts.SPLITS]
    assert len(set.union(*apart)) == sum(map(len, apart))
    again = random.Random("facts/train/3/0")
    assert first["document"][0] == facts.draw_paragraph(again, "train", again.randint(1, 8)).text


def test_numbers_of_facts_and_questions():
    frame = facts.fact_samples(400, 0)
    assert set(frame["n_facts"]) == set(range(1, 9))
    sizes = [len(rows) for _, rows in qa.group_by_document(frame)][:-1]
    assert set(sizes) == {3, 4, 5}
    assert set(facts.fact_samples(50, 0, (8, 8), "test")["n_facts"]) == {8}
    assert len(facts.draw_paragraph(random.Random(0), "test", 60).facts) == 60


def test_facts_as_a_data_set():
    frame = qa.load_named("facts", n=30, seed=2, split="train")
    assert tuple(frame.columns) == qa.COLUMNS and len(frame) == 30
    assert frame.equals(facts.fact_samples(30, 2)[list(qa.COLUMNS)])
    assert qa.load_qa("facts", n=9).equals(qa.load_qa("facts", n=9, split="test"))
    scored = qa.score(frame.assign(prediction=[f"{answers[0]}." for answers in frame["answers"]]))
    assert scored["score"].eq(1).all()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="no split 'dev'; choose one of train, test"):
        facts.fact_samples(1, 0, split="dev")
    for wrong in ((0, 3), (4, 3)):
        with pytest.raises(ValueError, match="from one up"):
            facts.fact_samples(1, 0, n_facts=wrong)
    with pytest.raises(ValueError, match="facts are generated without end: pass n"):
        qa.load_qa("facts")
    with pytest.raises(ValueError, match="facts are generated, not read"):
        next(qa.stream_qa("facts"))
