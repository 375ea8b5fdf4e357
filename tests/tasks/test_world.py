"""The generated world: spans, answers and splits are what they claim, on every document."""

import random

import pytest

from d2l_lib.tasks import needles, questions, world
from d2l_lib.tasks.world import RELATION, UNKNOWN


def documents(n: int, split: str = "test", n_facts: int = 8):
    rng = random.Random(f"test/{split}")
    return [(rng, world.draw_document(rng, split, n_facts)) for _ in range(n)]


def test_every_fact_stands_where_its_span_says():
    for _, document in documents(100):
        for fact in document.facts:
            sentence = document.text[slice(*fact.span)]
            # the first letter of a sentence is a capital, whatever the name's own is
            assert fact.value.lower() in sentence.lower() and fact.subject.lower() in sentence.lower()
            assert sentence.endswith(".") and sentence.count(". ") == 0


def test_every_statement_names_its_subject_before_the_value():
    for relation in world.RELATIONS:
        for statement in relation.statements:
            assert 0 <= statement.index("{s}") < statement.index("{v}"), statement


def test_same_seed_same_text_and_another_seed_another():
    first, again, other = (world.draw_document(random.Random(seed), "train", 6).text for seed in (1, 1, 2))
    assert first == again != other


def test_splits_share_no_name_and_no_value():
    seen = {split: set() for split in ("train", "validation", "test")}
    for split, words in seen.items():
        for _, document in documents(150, split):
            for fact in document.facts:
                words |= {fact.subject, fact.value}
    assert (
        not seen["train"] & seen["test"]
        and not seen["train"] & seen["validation"]
        and not seen["validation"] & seen["test"]
    )
    encyclopedia = {fact.subject for fact in world.encyclopedia()} | {fact.value for fact in world.encyclopedia()}
    assert not encyclopedia & set.union(*seen.values())


def test_single_name_words_belong_to_one_split():
    for split in ("train", "test"):
        for _, document in documents(30, split):
            for kind, name in document.entities:
                if kind == "person":
                    assert {world.split_of(word) for word in name.split()} == {split}


@pytest.mark.parametrize("kind", world.ONE_HOP_KINDS + ("paraphrase",))
def test_plain_answers_stand_in_the_evidence_sentence(kind):
    asked = [(d, world.ask(rng, d, kind)) for rng, d in documents(60)]
    found = [(d, q) for d, q in asked if q is not None]
    assert len(found) > 30
    for document, question in found:
        (span,) = question.evidence
        assert question.answer.lower() in document.text[slice(*span)].lower()


def test_two_hop_needs_both_sentences_and_does_not_name_the_bridge():
    n = 0
    for rng, document in documents(150):
        question = world.ask(rng, document, "two_hop")
        if question is None:
            continue
        n += 1
        first, second = (document.text[slice(*span)] for span in question.evidence)
        facts = {f.span: f for f in document.facts}
        bridge = facts[question.evidence[0]].value
        assert bridge.lower() in first.lower() and bridge.lower() in second.lower()
        assert bridge not in question.text and question.answer.lower() in second.lower()
        assert question.answer not in question.text
    assert n > 50


def test_yes_no_is_yes_only_for_stated_facts():
    answers = set()
    for rng, document in documents(150):
        question = world.ask(rng, document, "yes_no")
        if question is None:
            continue
        answers.add(question.answer)
        fact = {f.span: f for f in document.facts}[question.evidence[0]]
        names_the_value = fact.value in question.text
        assert names_the_value == (question.answer == "Yes")
    assert answers == {"Yes", "No"}


def test_list_answers_hold_every_subject_with_the_value():
    longest = 0
    for rng, document in documents(200, n_facts=14):
        question = world.ask(rng, document, "list")
        if question is None:
            continue
        fact = {f.span: f for f in document.facts}[question.evidence[0]]
        expected = [f.subject for f in document.facts if (f.relation, f.value) == (fact.relation, fact.value)]
        assert question.answer == ", ".join(expected)
        longest = max(longest, len(expected))
    assert longest >= 2


def test_unanswerable_questions_have_no_fact():
    for rng, document in documents(100):
        question = world.ask(rng, document, "unanswerable")
        assert question.answer == UNKNOWN and question.evidence == ()
        for fact in document.facts:
            for template in RELATION[fact.relation].questions:
                assert world._sentence(template, s=fact.subject) != question.text


def test_encyclopedia_is_fixed_and_unambiguous():
    facts = world.encyclopedia()
    assert len(facts) == 400 and len({(f.subject, f.relation) for f in facts}) == 400
    assert world.encyclopedia() == facts


def test_conflicts_change_the_value_and_nothing_else():
    document, pairs = world.conflicting_document(random.Random(3), 5, 3)
    assert len(pairs) == 3
    for stated, believed in pairs:
        assert (stated.subject, stated.relation) == (believed.subject, believed.relation)
        assert stated.value != believed.value and stated.value.lower() in document.text[slice(*stated.span)].lower()


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'riddle'.*one_hop"):
        world.ask(random.Random(0), documents(1)[0][1], "riddle")


@pytest.mark.parametrize(
    "draw",
    [
        lambda: world.draw_document(random.Random(0), "valid", 3),
        lambda: needles.draw_number(random.Random(0), "valid"),
    ],
)
def test_an_unknown_split_is_refused_at_once(draw):
    with pytest.raises(ValueError, match="no split 'valid'; choose one of train, validation, test, encyclopedia"):
        draw()


def test_variants_differ_from_their_document_in_one_respect():
    document, variants = questions.write_variants(random.Random(0), "test", 8)
    assert set(variants) == {"other words", "shuffled", "other values"}
    assert (
        sorted(variants["shuffled"].split()) == sorted(document.text.split()) and variants["shuffled"] != document.text
    )
    for fact in document.facts:
        assert fact.value in variants["other words"] and document.text[slice(*fact.span)] in variants["shuffled"]
        assert document.text[slice(*fact.span)] not in variants["other values"]
    assert variants["other words"] != document.text
    assert (document, variants) == questions.write_variants(random.Random(0), "test", 8)


def test_shuffled_words_stay_in_their_sentences():
    text = "Ada lives in Velm. Tom keeps three cats."
    shuffled = questions.shuffle_words(random.Random(1), text)
    first, second = shuffled.rstrip(".").split(". ")
    assert sorted(first.split()) == sorted("Ada lives in Velm".split()) and shuffled != text
    assert sorted(second.split()) == sorted("Tom keeps three cats".split())
