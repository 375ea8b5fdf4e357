"""The report: what is said to be stored is answered, what is taken out is found lost, and its page is safe to open."""

import random
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tiny_models import build_rows_model

import d2l_lib as d2l
from d2l_lib.analysis import report
from d2l_lib.analysis.report import beyond_training, is_about, score_answers, trained_on
from d2l_lib.analysis.rows import PARTS
from d2l_lib.documents import answer_ids, stop_ids
from d2l_lib.engine import Reply
from d2l_lib.studies.flags import SIGNALS, flag_curve
from d2l_lib.tasks import world
from d2l_lib.tasks.short_questions import Written

DOCUMENT = world.draw_document(random.Random("reports"), "test", 4, distractors=0.0)


@pytest.fixture(scope="module")
def model():
    return d2l.load("tiny/qa")


@pytest.fixture(scope="module")
def adapter(model):
    (adapter,) = model.internalize_each({"notes": DOCUMENT.text})
    return adapter


@pytest.fixture(scope="module")
def made(model, adapter):
    """The report on a document whose last block was taken out."""
    part = adapter.without(chunk=adapter.blocks[-1].chunk)
    unrelated = ["Who is the mayor of Nowhere?"]
    return d2l.report(model, {"notes": DOCUMENT.text}, adapter=part, unrelated=unrelated, n=8)


def test_a_margin_is_above_zero_exactly_where_the_greedy_answer_is_this_one(model, adapter):
    rng = random.Random(0)
    questions = [world.question_about(rng, fact) for fact in DOCUMENT.facts]
    texts = [question.text for question in questions]
    said = model.answer(texts, adapter)
    ends = stop_ids(model.tokenizer)[-1:]
    for answers in (said, [*said[1:], said[0]]):
        ids = [[*model.tokenizer(text, add_special_tokens=False)["input_ids"], *ends] for text in answers]
        scores = score_answers(model, texts, ids, [adapter] * len(texts))
        for answer, greedy, (log_prob, margin) in zip(answers, said, scores, strict=True):
            assert (margin > 0) == (answer == greedy)
            assert log_prob <= 0


def test_margins_by_condition_are_those_of_the_right_answers(model, adapter):
    rng = random.Random(0)
    questions = [world.question_about(rng, fact) for fact in DOCUMENT.facts[:2]]
    conditions = {"inside": [adapter] * 2, "bias alone": [adapter.scaled(0.0)] * 2}
    table = report.margins_by_condition(model, questions, conditions)
    assert table["condition"].tolist() == ["inside"] * 2 + ["bias alone"] * 2
    right = [
        answer == q.answer
        for q, answer in zip(questions, model.answer([q.text for q in questions], adapter), strict=True)
    ]
    assert (table["margin"][:2] > 0).tolist() == right
    assert (table["norm"][:2] > 0).all() and (table["norm"][2:] == 0).all()


def test_scores_do_not_depend_on_what_is_scored_beside(model, adapter):
    questions, answers = ["Who?", "Where was the mayor born?"], [[5, 6, 7], [8]]
    together = score_answers(model, questions, answers, [adapter, None])
    alone = [
        score_answers(model, [q], [a], [one])[0] for q, a, one in zip(questions, answers, (adapter, None), strict=True)
    ]
    for first, second in zip(together, alone, strict=True):
        assert first == pytest.approx(second, abs=1e-3)


def test_a_sentence_whose_block_is_gone_is_lost_and_the_others_are_what_the_adapter_answers(made, model, adapter):
    gone = adapter.blocks[-1].span
    table = made.table
    taken = (table["start"] >= gone[0]) & (table["start"] < gone[1])
    assert set(table["status"][taken]) == {"lost"}
    assert (table["chunk"][taken] == -1).all()
    rng, status = random.Random(0), {"answered": [], "failed": []}
    for fact in DOCUMENT.facts:
        if fact.span[0] < gone[0]:
            said = model.answer(world.question_about(rng, fact).text, adapter.without(chunk=adapter.blocks[-1].chunk))
            (found,) = table["status"][(table["start"] <= fact.span[0]) & (fact.span[0] < table["end"])]
            status["answered" if said == fact.value else "failed"].append(found)
    assert set(status["failed"]) <= {"lost"}
    assert status["answered"].count("stored") >= max(1, len(status["answered"]) - 1)
    assert table["margin"][taken].max() < 0 < table["margin"][~taken].max()
    assert table["over_zero"][taken].abs().max() < table["over_zero"][~taken].max()
    assert "".join(DOCUMENT.text[a:b] for a, b in zip(table["start"], table["end"], strict=True)) == DOCUMENT.text


def test_questions_carry_what_was_said_instead(made):
    wrong = made.questions[made.questions["margin"] <= 0]
    assert len(wrong)
    assert (wrong["said"] != wrong["told"]).all()
    right = made.questions[made.questions["margin"] > 0]
    assert (right["said"] == right["told"]).all()


def test_a_belief_against_the_document_is_named(model):
    rng = random.Random("beliefs")
    document, ((_, believed),) = world.conflicting_document(rng, 0, 1)
    found = d2l.report(model, document.text, unrelated=[], n=8)
    assert believed.value in set(found.table["believed"])
    assert found.facts["sentences that contradict the base model"] == 1
    plain = d2l.report(model, DOCUMENT.text, unrelated=[], n=4)
    assert set(plain.table["believed"]) == {""}


def test_unrelated_answers_that_change_are_counted(model, adapter):
    rng = random.Random(1)
    texts = [world.question_about(rng, fact).text for fact in DOCUMENT.facts]  # related: the adapter changes them
    found = report._disturbed(model, texts, adapter, None)
    assert found["changed"].mean() > 0.5
    assert not report._disturbed(model, texts, replace(adapter, blocks=(), bias=None), None)["changed"].any()


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("When did the Marbay Fair open?", "25 December 2067", True),
        ("When did the Marbay Fair open?", "I do not know.", False),
        ("Did the Marbay Fair open on 25 December 2067?", "Yes", False),
        ("When did the Dunfell Summit open?", "25 December 2067", False),  # a name that the sentence does not hold
        ("What opened on 25 December 2067?", "the Marbay Fair", True),
    ],
)
def test_only_questions_that_the_sentence_makes_count(question, answer, expected):
    assert is_about("The Marbay Fair opened on 25 December 2067.", question, answer) is expected


def test_a_document_beyond_training_is_warned_of(model, adapter):
    most, longest = trained_on(model)
    assert not beyond_training(model, {"notes": DOCUMENT.text}, adapter)
    long = replace(adapter, blocks=adapter.blocks * (most // len(adapter.blocks) + 1))
    assert f"{len(long.blocks)} blocks" in beyond_training(model, {}, long)[0]
    (wide,) = model.internalize_each({"notes": DOCUMENT.text}, chunk_tokens=4 * longest)
    (warning,) = beyond_training(model, {"notes": DOCUMENT.text}, wide)
    assert f"at most {longest}" in warning


def test_the_page_escapes_every_text_and_needs_no_network(made, tmp_path):
    hostile = "<script>alert('x')</script>"
    dirty = replace(
        made,
        table=made.table.assign(text=hostile, believed=hostile, document=hostile),
        questions=made.questions.assign(question=hostile, told=hostile, said=hostile, document=hostile),
        unrelated=pd.DataFrame({"question": [hostile], "alone": [hostile], "said": [hostile], "changed": [True]}),
        texts={hostile: hostile + DOCUMENT.text},
        warnings=(hostile,),
    )
    path = dirty.save_html(tmp_path / "report.html")
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page and page.count("&lt;script&gt;") > 8
    assert not re.search(r"(src|href)=(?![\"']?data:)", page)
    assert page.count("data:image/png;base64,") == 1
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]
    assert "<script" not in dirty._repr_html_()


def test_what_is_flagged_is_counted():
    rows = pd.DataFrame(
        {"condition": "all blocks", "correct": [False, False, True, True], **dict.fromkeys(SIGNALS, 0.0)}
    )
    rows["kept"] = [-1.0, float("nan"), 0.5, 2.0]
    curve = flag_curve(rows, {signal: [0.0, 1.0] for signal in SIGNALS})
    found = curve[curve["signal"] == "kept"].set_index("threshold")
    assert list(found.loc[0.0, ["found", "precision", "false_alarms"]]) == [0.5, 1.0, 0.0]
    assert list(found.loc[1.0, ["found", "precision", "false_alarms"]]) == [0.5, 0.5, 0.5]  # no question: never flagged


def test_blank_documents_are_refused(model):
    with pytest.raises(ValueError, match="no text"):
        d2l.report(model, " ")


# --- adapters of token rows -----------------------------------------------------------------------------------------
TEXT = "Ada lives in Velm. Bo paints lamps."
QUESTIONS = ["Where does Ada live?", "What does Bo paint?"]


@pytest.fixture
def rows_model(monkeypatch):
    """A random model that writes token rows; its base model answers with the last word of the sentence before it."""

    def replies(model, prompts, teacher=None):
        said = [prompt.partition(".")[0].split()[-1] if "." in prompt else "nothing" for prompt in prompts]
        stop = stop_ids(model.tokenizer)[0]
        ids = [[*model.tokenizer(one, add_special_tokens=False)["input_ids"], stop] for one in said]
        return [Reply(one, True, np.zeros((len(one), 1), np.float16), None) for one in ids]

    monkeypatch.setattr(report, "_replies", replies)
    return build_rows_model()


def _ask(model, sentences, n, seed):
    return [{question: 1} for question in QUESTIONS[: len(sentences)]]


def test_a_report_on_token_rows_has_their_tokens_and_capacity(rows_model, tmp_path):
    model = rows_model
    made = d2l.report(model, {"notes": TEXT}, ask=_ask, unrelated=["Who is it?"], wrong="Rain fell.")
    assert made.questions["told"].tolist() == ["Velm", "lamps"]
    ends = stop_ids(model.tokenizer)[:1]
    inside = [[*answer_ids(model.tokenizer, text, after_space=True), *ends] for text in ("Velm", "lamps")]
    assert made.questions["told_ids"].tolist() == inside, "as they stand in the text"
    assert made.capacity["part"].tolist() == list(PARTS) and made.facts["rank"] == sum(b.rank for b in _blocks(model))
    assert set(made.table["status"]) <= {"stored", "lost"} and (made.questions["margin"] != 0).all()
    assert made.save_html(tmp_path / "report.html").stat().st_size > 1000


def _blocks(model):
    (adapter,) = model.internalize_each([TEXT])
    return adapter.blocks


@pytest.mark.parametrize(("said", "least"), [("in Velm", 0.66), ("Velm", 1.0), ("Bo", 0.0)])
def test_rows_that_say_the_same_in_other_words_keep_a_sentence(rows_model, monkeypatch, said, least):
    monkeypatch.setattr(type(rows_model), "answer", lambda self, asked, *_, **how: [said] * len(asked))
    monkeypatch.setattr(report, "score_answers", lambda model, asked, *_: [(-9.0, -9.0)] * len(asked))
    made = d2l.report(rows_model, TEXT, ask=_ask, unrelated=[], wrong="Rain fell.")
    assert made.table["kept"][0] == pytest.approx(max(least, 1e-4), abs=0.01)
    assert made.table["status"].tolist() == ["stored" if least > 0.5 else "lost", "lost"]


def test_a_base_model_that_has_read_the_web_is_asked_in_its_own_way(rows_model, monkeypatch, tmp_path):
    calls = []

    def written(rng, texts, writer, counts, *, most, max_new_tokens):
        calls.append((list(texts), most))
        return [[Written(question, "where", (0, 4))] for question in QUESTIONS]

    monkeypatch.setattr(report, "write_questions", written)
    monkeypatch.setattr(report, "reading_lora_folder", lambda model: tmp_path / "none")
    monkeypatch.setattr(rows_model, "base_source", "smollm2")
    made = d2l.report(rows_model, TEXT, n=3)
    assert calls == [(["Ada lives in Velm.", "Bo paints lamps."], 3)]
    assert made.questions["question"].tolist() == QUESTIONS and len(made.unrelated) == 20
    assert made.unrelated["question"][0] == "What is the capital of France?"


@pytest.mark.parametrize("unrelated", [[], ()])
def test_a_report_without_unrelated_questions_is_shown_like_any_other(model, adapter, unrelated, tmp_path):
    made = d2l.report(model, {"notes": DOCUMENT.text}, adapter=adapter, unrelated=unrelated, n=2)
    assert "answers to unrelated questions changed: 0" in str(made)
    assert "(0 of 0)" in made._repr_html_()
    assert "(0 of 0)" in made.save_html(tmp_path / "report.html").read_text()


def test_a_report_without_any_question_is_shown_like_any_other(model, adapter, tmp_path):
    nothing = lambda model, sentences, n, seed: [{} for _ in sentences]  # noqa: E731
    made = d2l.report(model, {"notes": DOCUMENT.text}, adapter=adapter, unrelated=["Who is it?"], ask=nothing)
    assert set(made.table["status"]) == {"not asked"}
    assert "0 sentences stored" in str(made)
    assert "no question found" in made._repr_html_()
    assert made.save_html(tmp_path / "report.html").stat().st_size > 1000


def test_a_report_asks_for_lists_and_counts(model, adapter):
    with pytest.raises(TypeError, match="unrelated questions must be a list of texts"):
        d2l.report(model, {"notes": DOCUMENT.text}, adapter=adapter, unrelated="Who is it?")
    with pytest.raises(ValueError, match="n must be a whole number of at least 1"):
        d2l.report(model, {"notes": DOCUMENT.text}, adapter=adapter, n=0)
    with pytest.raises(TypeError, match="a report has no option 'block'; choose from adapter, blocks"):
        d2l.report(model, {"notes": DOCUMENT.text}, block=1)
    with pytest.raises(ValueError, match="no documents given"):
        d2l.report(model, [])
