"""One text where several are expected is refused, and not taken as a list of letters."""

from types import SimpleNamespace

import pytest

from d2l_lib import routing
from d2l_lib.analysis import report
from d2l_lib.documents import check_texts
from d2l_lib.presets import changed, preset
from d2l_lib.routing import gated
from d2l_lib.studies import evaluation

MODEL = SimpleNamespace(gate=None, least_relevance=0.0, tokenizer=None)
CALLS = {
    "routing.route": lambda texts: routing.route(MODEL, texts, [None]),
    "routing.relevance": lambda texts: routing.relevance(MODEL, texts, [None] * 5),
    "routing.leads_and_divergences": lambda texts: routing.leads_and_divergences(MODEL, texts, [None] * 5),
    "gated": lambda texts: gated(MODEL, texts, None),
    "reports.find_questions": lambda texts: report.find_questions(MODEL, texts),
    "reports.ask_about": lambda texts: report.ask_about(MODEL, texts, 1, 0),
    "reports.score_answers": lambda texts: report.score_answers(MODEL, texts, [[1]], [None]),
    "evaluation.greedy_answers": lambda texts: evaluation.greedy_answers(MODEL, None, texts),
    "presets.changed": lambda texts: changed(preset("tiny").needle, texts),
    "check_texts": lambda texts: check_texts(texts, "texts"),
}


@pytest.mark.parametrize("wrong", ["Code?", b"Code?", {"Code?": 1}, {"Code?"}, None, 3, ["Code?", 3]], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_list_of_texts_is_refused(name, wrong):
    with pytest.raises(TypeError, match="must be (a list of )?texts"):
        CALLS[name](wrong)


def test_lists_of_texts_are_taken():
    for several in (["a", "b"], ("a", "b"), iter(["a", "b"])):
        assert check_texts(several, "texts") == ["a", "b"]
    assert check_texts([], "texts") == []
