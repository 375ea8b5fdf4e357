"""Attribution of token rows: leaving a block or a sentence out is the adapter without it; shares are what was read."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import build_rows_model

from d2l_lib.analysis.attribution import METHODS, ROW_METHODS, Trials, attribute, methods_of
from d2l_lib.documents import answer_ids, question_ids
from d2l_lib.row_reading import answer_rows
from d2l_lib.views.trace import Trace, save_html

TEXTS = {"a": "Ada is here. Bob ran.", "b": "It rained. The end."}
QUESTION, ANSWER = "Who?", "Bob"


@pytest.fixture(scope="module")
def small():
    """A random model that writes token rows, and documents of one and two chunks."""
    model = build_rows_model()
    return model, model.internalize_each({"a": TEXTS["a"]})[0] + model.internalize_each(
        {"b": TEXTS["b"]}, chunk_tokens=12
    )[0]


@torch.no_grad()
def plain_score(model, adapter) -> tuple[float, float]:
    """(log-probability of ANSWER, its smallest margin) by one whole pass."""
    prompt, written = question_ids(model.tokenizer, QUESTION), answer_ids(model.tokenizer, ANSWER, after_space=True)
    with model.applied(adapter) as network:
        logits = network(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1]
    own = logits.gather(1, torch.tensor(written)[:, None])[:, 0]
    best = logits.scatter(1, torch.tensor(written)[:, None], -math.inf).amax(1)
    return float((own - logits.logsumexp(1)).sum()), float((own - best).min())


def test_leaving_out_and_adding_are_other_adapters(small):
    model, adapter = small
    assert [block.document for block in adapter.blocks] == ["a", "b", "b"]
    every, margin = plain_score(model, adapter)
    none = plain_score(model, None)[0]
    left, added = (
        attribute(model, adapter, QUESTION, ANSWER, "chunk", method, wrong=adapter.only("b"))
        for method in ("leave_one_out", "add_one_in")
    )
    for place, block in enumerate(adapter.blocks):
        alone = replace(adapter, blocks=(block,))
        rest = replace(adapter, blocks=tuple(one for one in adapter.blocks if one is not block))
        without = plain_score(model, rest)
        assert left["contribution"][place] == pytest.approx(every - without[0], abs=1e-3)
        assert left["margin_contribution"][place] == pytest.approx(margin - without[1], abs=1e-3)
        assert added["contribution"][place] == pytest.approx(plain_score(model, alone)[0] - none, abs=1e-3)
    controls = left.attrs["controls"]
    assert controls["all blocks"]["log_prob"] == pytest.approx(every, abs=1e-3)
    assert controls["zero adapter"]["log_prob"] == pytest.approx(none, abs=1e-3)
    assert controls["wrong document"]["log_prob"] == pytest.approx(plain_score(model, adapter.only("b"))[0], abs=1e-3)
    assert left["contribution"].abs().max() > 0.01


def test_a_sentence_is_left_out_by_writing_its_chunk_anew(small):
    model, adapter = small
    one = adapter.only("a")
    table = attribute(model, one, QUESTION, ANSWER, "sentence", documents={"a": TEXTS["a"]})
    assert list(table["text"]) == ["Ada is here.", "Bob ran."]
    every = plain_score(model, one)[0]
    for contribution, rest in zip(table["contribution"], ("Bob ran.", "Ada is here."), strict=True):
        (anew,) = model.internalize_each({"a": rest})
        assert contribution == pytest.approx(every - plain_score(model, anew)[0], abs=1e-3)


def test_shares_are_those_of_the_rows_that_were_read(small):
    model, adapter = small
    trials = Trials(model, adapter, QUESTION, ANSWER)
    shares = attribute(model, adapter, QUESTION, ANSWER, "chunk", "attended", controls=False)
    read = torch.tensor(shares["by_token"].tolist())
    assert read.shape == (3, len(trials.target.answer)) and (read >= 0).all()
    torch.testing.assert_close(read.sum(0), torch.ones(read.shape[1]), rtol=1e-4, atol=1e-4)  # the gate is open
    most = answer_rows(model, QUESTION, adapter, ANSWER)
    first = most[most["token"] == 0]
    for place, block in enumerate(adapter.blocks):
        its = first[(first["document"] == block.document) & (first["chunk"] == block.chunk)]["share"].sum()
        assert read[place, 0] >= its - 1e-4
    by_sentence = attribute(model, adapter, QUESTION, ANSWER, "sentence", "attended", documents=TEXTS, controls=False)
    of_block = torch.tensor(by_sentence["by_token"].tolist())
    for place in range(3):
        inside = torch.tensor((by_sentence["block"] == place).to_numpy())
        torch.testing.assert_close(of_block[inside].sum(0), read[place], rtol=1e-4, atol=1e-4)
    silent = adapter.only("a") + adapter.only("b").scaled(0)
    read = attribute(model, silent, QUESTION, ANSWER, "chunk", "attended", controls=False)["contribution"]
    assert read[0] > 0 and read[1] == read[2] == 0


def test_methods_are_those_of_the_model(small, tmp_path):
    model, adapter = small
    assert methods_of(model) is ROW_METHODS and methods_of(object()) is METHODS
    assert set(ROW_METHODS) == {"chunk", "sentence"} and "attended" not in METHODS["chunk"]
    for level, methods in ROW_METHODS.items():
        for method in methods:
            table = attribute(
                model, adapter, QUESTION, ANSWER, level, method, documents=TEXTS, samples=8, controls=False
            )
            assert len(table) == (3 if level == "chunk" else 4)
    with pytest.raises(ValueError, match="no method 'gradient'; it has leave_one_out"):
        attribute(model, adapter, QUESTION, ANSWER, "chunk", "gradient")
    with pytest.raises(ValueError, match="no layers: choose the level chunk or sentence"):
        attribute(model, adapter, QUESTION, ANSWER, "layer")
    with pytest.raises(ValueError, match="token rows are all read in the same layers"):
        Trials(model, adapter, QUESTION, ANSWER, "rank")
    trace = Trace(model, adapter, TEXTS, QUESTION, ANSWER)
    assert trace.methods is ROW_METHODS and len(trace.table("sentence", "leave_one_out")) == 4
    assert isinstance(trace.answer_without({0}), str)
    page = save_html(tmp_path / "page.html", model, adapter, TEXTS, QUESTION, ANSWER, removals=1).read_text()
    assert "sentence, attended" in page and "chunk, leave one out" in page and "layer" not in page.partition("<body")[2]
