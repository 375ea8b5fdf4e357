"""The attribution viewer shows what the tables hold, takes sentences out and puts them back, and is safe with any text.

A toy model whose answer is what its adapter holds tells what reached it; the bundled model is used once, end to end.
"""

import html
import json
import math
import re
import threading
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import browser
import ipywidgets as W
import pandas as pd
import pytest
import torch
from pages import Tags, controls, page
from toy_models import HOSTILE

from d2l_lib.analysis import attribution
from d2l_lib.analysis import trials as unit_trials
from d2l_lib.views import trace as trace_module
from d2l_lib.views.trace import (
    LEAST_LIMIT,
    Trace,
    color_limit,
    contributions,
    has_tokens,
    pieces,
    render_controls,
    render_heat_map,
    render_legend,
    render_sentences,
    render_units,
    save_html,
    sentence_style,
    sentence_values,
    shade,
    true_sentences,
    view_attribution,
)

LAMPS = "Ada lives in Velm. She paints lamps.\nThe lake costs $5 and $6."
QUESTION = "What does Ada paint?"
EVIDENCE = (LAMPS.index("She"), LAMPS.index("\n"))


# --- a toy model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyBlock:
    """A block whose matrix A is its text."""

    document: str
    chunk: int
    span: tuple
    A: str
    B: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class ToyAdapter:
    blocks: tuple
    layers = ()

    def in_layers(self, layers):
        return self

    @property
    def documents(self):
        return list(dict.fromkeys(block.document for block in self.blocks))


@dataclass
class ToyModel:
    """Its answer is the text of all blocks; the question "fail" and a chunk that is left with "Break." fail."""

    written: list = field(default_factory=list)
    chunk_tokens: int = 8

    def encoder_tokenizer(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [list(text) for text in texts]}

    def internalize_each(self, texts, chunk_tokens):
        assert all(len(text) <= chunk_tokens for text in texts)
        if "Break." in texts:
            raise ValueError("cannot read this")
        self.written += texts
        return [ToyAdapter((ToyBlock("document 1", 0, (0, len(text)), text),)) for text in texts]

    def answer(self, question, adapter):
        if question == "fail":
            raise ValueError("the question takes <b>500</b> tokens")
        return " | ".join(block.A for block in adapter.blocks) or "nothing"


def toy_adapter(text: str = LAMPS, name: str = "lamps", cuts: tuple = (37,)) -> ToyAdapter:
    """One block per chunk; the chunks end at `cuts`."""
    edges = [0, *cuts, len(text)]
    spans = list(zip(edges, edges[1:], strict=False))
    return ToyAdapter(tuple(ToyBlock(name, i, span, text[slice(*span)].strip()) for i, span in enumerate(spans)))


def toy_table(units: pd.DataFrame, level: str, method: str, tokens: list, answer: str = "lamps") -> pd.DataFrame:
    """Unit i contributes i - 1 (0 to the last token, all to the first)."""
    values = [float(i - 1) for i in range(len(units))]
    known = math.nan if method == "integrated_gradients" else 0.0
    by_token = [[value, *[known] * (len(tokens) - 1)] for value in values]
    table = units.assign(level=level, contribution=values, margin_contribution=values, by_token=by_token)
    reading = {"log_prob": -0.25, "probability": 0.78, "margin": 3.0}
    table.attrs = {"level": level, "method": method, "tokens": tokens, "answer": answer}
    table.attrs["controls"] = {"all blocks": reading, "zero adapter": reading | {"log_prob": -7.5}}
    table.attrs["controls"] |= {"wrong document": None}
    table.attrs["controls"]["random units"] = {"units": ["x"], "contribution": 0.125, "largest": 0.5}
    return table


def toy_attribute(model, adapter, question, answer, level, method, *, documents, wrong, progress):
    """As `attribution.attribute` is called and answers; the tokens are words."""
    tokens = [" " + word for word in answer.split()][:3]
    if progress is not None:
        progress(2, 3)
    if method == "surrogate":
        raise RuntimeError(f"no {HOSTILE}")
    if level == "sentence":
        units = attribution.sentence_units(adapter, documents)
    elif level == "chunk":
        units = unit_trials._unit_table(
            [
                {"unit": f"{b.document}, chunk {b.chunk}", "document": b.document, "chunk": b.chunk}
                for b in adapter.blocks
            ]
        )
    else:
        directions = [{}] if level == "layer" else [{"direction": 0}, {"direction": 1}]
        units = unit_trials._unit_table(
            [
                {"unit": f"layer {layer}, {module}", "layer": layer, "module": module} | more
                for layer in (0, 1)
                for module in ("down_proj", "up_proj")
                for more in directions
            ]
        )
    return toy_table(units, level, method, tokens, answer)


def toy_trace(text: str = LAMPS, **options) -> Trace:
    cuts = options.pop("cuts", (37,))
    options = {"question": QUESTION, "answer": "red lamps", "evidence": [EVIDENCE]} | options
    return Trace(ToyModel(), toy_adapter(text, cuts=cuts), text, attribute=toy_attribute, **options)


def toy_view(text: str = LAMPS, question: str = QUESTION, answer="red lamps", evidence=(EVIDENCE,), cuts=(37,)):
    """A viewer; also made by the notebook of the browser test."""
    return view_attribution(
        ToyModel(), toy_adapter(text, cuts=cuts), text, question, answer, evidence, attribute=toy_attribute
    )


def channels(color: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", color)]


# --- pure renderers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_a_larger_contribution_is_a_stronger_colour(sign):
    colors = [channels(shade(sign * size, 2.0)) for size in (0.0, 0.3, 1.0, 1.7, 2.0)]
    distances = [sum(255 - channel for channel in color) for color in colors]
    assert distances == sorted(set(distances)) and distances[0] == 0
    assert shade(sign * 9.0, 2.0) == shade(sign * 2.0, 2.0)


def test_signs_have_colours_of_their_own_and_nothing_has_none():
    red, _, blue = channels(shade(1.0, 1.0))
    assert blue > red
    red, _, blue = channels(shade(-1.0, 1.0))
    assert red > blue
    assert shade(math.nan, 1.0) == shade(math.inf, 1.0) == "transparent"


def test_small_contributions_stay_pale():
    assert color_limit([0.001, -0.002, math.nan]) == LEAST_LIMIT and color_limit([]) == LEAST_LIMIT
    assert color_limit([0.5, -3.0]) == 3.0


@pytest.mark.parametrize("background", [trace_module.SUPPORTS, trace_module.OPPOSES])
def test_black_text_is_readable_on_the_strongest_colours(background):
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in background]
    luminance = sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    assert (luminance + 0.05) / 0.05 > 4.5, "contrast as WCAG AA asks for"


def test_the_legend_has_units_and_the_ends_of_the_scale():
    trace = toy_trace()
    table = trace.table("sentence", "leave_one_out")
    legend = Tags(render_legend(2.0, trace_module.measure(table, 1), evidence=True)).text
    assert "nats of log-probability of answer token 2, “ lamps”" in legend
    assert "−2.00" in legend and "+2.00" in legend and "true evidence" in legend
    assert "whole answer" in trace_module.measure(table)
    assert "no unit" in trace_module.measure(trace.table("sentence", "random"))
    assert "nats of relevance" in trace_module.measure(trace.table("chunk", "relevance"))
    read = trace.table("sentence", "leave_one_out").copy()
    read.attrs = table.attrs | {"method": "attended"}
    assert trace_module.measure(read, 1).startswith("attention of answer token 2, “ lamps” (1 for each token")
    assert "in attention of each of the 2 answer tokens" in trace_module._render_each_token(read, trace.texts)


def test_sentences_are_shaded_and_the_evidence_is_outlined():
    trace = toy_trace()
    assert trace.true == {1} and list(trace.units["text"])[1] == "She paints lamps."
    values = [0.2, 2.0, -1.0]
    spans = [a for tag, a in Tags(render_sentences(trace.units, trace.texts, values, trace.true, [True] * 3)).elements]
    spans = [a for a in spans if "data-sentence" in a]
    assert ["outline" in a["style"] for a in spans] == [False, True, False]
    assert [shade(value, 2.0) in a["style"] for a, value in zip(spans, values, strict=True)] == [True] * 3
    text = Tags(render_sentences(trace.units, trace.texts, [math.nan] * 3, (), [True] * 3)).text
    assert text == LAMPS, "the text is whole, line ends included"


def test_choosing_a_token_changes_the_shading():
    trace = toy_trace()
    table = trace.table("sentence", "leave_one_out")
    assert sentence_values(trace.units, table) == sentence_values(trace.units, table, 0) == [-1.0, 0.0, 1.0]
    assert sentence_values(trace.units, table, 1) == [0.0, 0.0, 0.0]
    whole, second = (sentence_style(sentence_values(trace.units, table, t), [True] * 3) for t in (None, 1))
    assert whole != second and shade(1.0, 1.0) in whole and shade(1.0, 1.0) not in second


def test_sentences_have_the_value_of_their_chunk():
    trace = toy_trace()
    table = trace.table("chunk", "leave_one_out")
    assert sentence_values(trace.units, table) == [-1.0, -1.0, 0.0]
    assert trace_module.last_of_unit(trace.units, "chunk") == [False, True, True]
    assert all(map(math.isnan, sentence_values(trace.units, trace.table("layer", "gradient"))))


def test_the_style_holds_numbers_only():
    style = sentence_style([1.5, math.nan, -0.001], [True, True, True])
    assert f'.d2l-unit-0 {{ --shade: {shade(1.5, 1.5)}; --value: "+1.50"; }}' in style
    assert set(re.findall(r"--[a-z]+: ([^;]+);", style)) == {shade(1.5, 1.5), '"+1.50"', shade(-0.001, 1.5)}
    assert "d2l-unit-1" not in style and "−0.00" not in style


def test_heat_map_of_layers_by_ranks():
    table = toy_trace().table("rank", "leave_one_out")
    tags = Tags(render_heat_map(table))
    cells = [a for tag, a in tags.elements if tag == "td"]
    assert len(cells) == 8 and "rank direction of down_proj" in tags.text and "of up_proj" in tags.text
    assert shade(6.0, 6.0) in cells[-1]["style"] and "layer 1, up_proj" in cells[-1]["title"]
    modules = Tags(render_heat_map(toy_trace().table("layer", "leave_one_out")))
    assert "Layer by module" in modules.text and sum(tag == "td" for tag, _ in modules.elements) == 4
    assert render_heat_map(toy_trace().table("chunk", "leave_one_out")) == ""


def test_units_are_listed_by_contribution_with_their_tokens():
    trace = toy_trace()
    page_of = render_units(trace.table("sentence", "leave_one_out"), trace.texts)
    text = Tags(page_of).text
    assert text.index("The lake") < text.index("She paints") < text.index("Ada lives")
    assert "“ lamps”" in text and "margin (logits)" in text
    blind = trace.table("sentence", "integrated_gradients")
    assert not has_tokens(blind) and "does not tell tokens apart" in render_units(blind, trace.texts)
    assert contributions(blind) == [-1.0, 0.0, 1.0]


def test_units_that_contribute_nothing_are_left_out_of_many():
    table = pd.concat([toy_trace().table("sentence", "leave_one_out")] * 4, ignore_index=True)
    table.attrs = toy_trace().table("sentence", "leave_one_out").attrs | {"token_contributions": None}
    for values, heading in (
        ([0.0] * 12, "None of 12 contributes to it"),
        ([2.0, *[0.001] * 10, -1.0], "The 2 highest of 12 contributions; those below 0 speak against it"),
        ([1.0] * 12, "The 8 highest of 12 contributions"),
    ):
        table["contribution"] = values
        text = Tags(render_units(table, toy_trace().texts, each_token=False)).text
        assert heading in text and ("speak against" in text) == (min(values) < 0)


def test_controls_are_shown_with_units_and_what_was_not_given():
    text = Tags(render_controls(toy_trace().table("sentence", "leave_one_out"))).text
    assert "zero adapter−7.50" in text and "78.0 %" in text and "log-probability (nats)" in text
    assert "wrong documentnot given" in text and "1 random unit left out, each alone: +0.12 nats" in text
    bare = toy_trace().table("chunk", "gradient")
    bare.attrs = bare.attrs | {"controls": None}
    assert "none were computed" in render_controls(bare)


def test_hostile_text_is_escaped_everywhere():
    trace = Trace(
        ToyModel(), toy_adapter(HOSTILE, HOSTILE, ()), {HOSTILE: HOSTILE}, HOSTILE, HOSTILE, attribute=toy_attribute
    )
    whole = trace_module.render_page(trace, [trace.table("sentence", "leave_one_out")], {0: HOSTILE})
    for rendered in (trace_module.render_trace(trace, "sentence", "leave_one_out", 1), whole):
        tags = Tags(rendered)
        assert tags.names().isdisjoint({"script", "img"}) and HOSTILE in tags.text


# --- what is traced ---------------------------------------------------------------------------------------------------


def test_a_sentence_is_taken_out_of_its_chunk_and_a_whole_chunk_is_dropped():
    trace = toy_trace()
    model, blocks = trace.model, trace.adapter.blocks
    assert trace.answer_without({1}) == "Ada lives in Velm. | The lake costs $5 and $6."
    assert model.written == ["Ada lives in Velm."]
    assert trace.adapter_without({2}) == replace(trace.adapter, blocks=blocks[:1])
    assert trace.adapter_without({0, 1}) == replace(trace.adapter, blocks=blocks[1:])
    assert trace.answer_without({0, 1, 2}) == "nothing" and len(model.written) == 1, "no model needed"
    assert trace.adapter_without(()) == trace.adapter
    assert trace.answer_without(()) == trace.said == "Ada lives in Velm. She paints lamps. | " + LAMPS[37:]
    [written, _] = trace.adapter_without({0}).blocks
    assert (written.document, written.chunk, written.span, written.A) == ("lamps", 0, (0, 37), "She paints lamps.")


def test_evidence_marks_the_sentences_that_it_touches():
    trace = toy_trace()
    texts = trace.texts
    assert true_sentences(trace.units, texts, {"lamps": [(0, 3), EVIDENCE]}) == {0, 1}
    assert true_sentences(trace.units, texts, ()) == set()
    for wrong, message in (
        ([(5, 5)], "not inside"),
        ([(0, 999)], "not inside"),
        ([3], "pairs of characters"),
        ({"boats": [(0, 1)]}, "documents are lamps"),
    ):
        with pytest.raises(ValueError, match=message):
            true_sentences(trace.units, texts, wrong)
    with pytest.raises(ValueError, match="document's name"):
        true_sentences(trace.units, texts | {"boats": "A."}, [(0, 1)])


def test_text_that_is_not_inside_is_left_out():
    adapter = toy_adapter()
    only_first = replace(adapter, blocks=adapter.blocks[:1])
    found = pieces(attribution.sentence_units(only_first, LAMPS), {"lamps": LAMPS})
    assert found == [("Ada lives in Velm.", " "), ("She paints lamps.", "\n[…] ")]


# --- the widgets ------------------------------------------------------------------------------------------------------


def boxes(viewer) -> dict[str, W.Checkbox]:
    """{sentence: its checkbox}"""
    flow = next(child for child in viewer.children if isinstance(child, W.Box) and not isinstance(child, W.HBox))
    return {child.description.strip(): child for child in flow.children if isinstance(child, W.Checkbox)}


def answer_now(viewer) -> str:
    return page(viewer, "trace-answer").root()["data-now"]


def test_taking_a_sentence_out_and_putting_it_back():
    viewer = toy_view()
    sentence = boxes(viewer)["She paints lamps."]
    assert sentence.value and "d2l-true" in sentence._dom_classes
    whole = answer_now(viewer)
    assert "lamps" in whole
    sentence.value = False
    assert answer_now(viewer) == "Ada lives in Velm. | The lake costs $5 and $6."
    assert page(viewer, "trace-answer").root()["data-changed"] == "true"
    boxes(viewer)["Ada lives in Velm."].value = False
    assert answer_now(viewer) == "The lake costs $5 and $6."
    assert page(viewer, "trace-answer").root()["data-removed"] == "2"
    sentence.value = True
    assert answer_now(viewer).startswith("She paints lamps.")
    controls(viewer)["Restore all"].click()
    assert answer_now(viewer) == whole and all(box.value for box in boxes(viewer).values())


def test_level_method_and_token_are_chosen():
    viewer = toy_view()
    control = controls(viewer)
    assert (control["Level"].value, control["Method"].value) == ("sentence", "leave_one_out")
    before = page(viewer, "trace-legend").elements, legend(viewer)
    control["Explain"].value = 1
    assert legend(viewer) != before[1] and page(viewer, "trace").root()["data-token"] == "1"
    control["Method"].value = "integrated_gradients"
    assert [label for label, _ in control["Explain"].options] == ["whole answer"]
    for level in attribution.METHODS:
        control["Level"].value = level
        assert [value for _, value in control["Method"].options] == list(attribution.METHODS[level])
        assert page(viewer, "trace").root()["data-level"] == level
    assert "Layer by rank" in page(viewer, "trace").text and "no place in the text" in legend(viewer)


def legend(viewer) -> str:
    return next(c.value for c in viewer.children if isinstance(c, W.HTML) and "d2l-trace-legend" in c.value)


def test_another_question_and_answer_are_traced():
    viewer = toy_view()
    boxes(viewer)["She paints lamps."].value = False
    control = controls(viewer)
    control["Question"].value = "Where?"
    assert "Where?" in page(viewer, "trace-answer").text and page(viewer, "trace-answer").root()["data-removed"] == "0"
    assert not any("d2l-true" in box._dom_classes for box in boxes(viewer).values()), "its evidence is not known"
    control["Answer"].value = "Velm"
    assert "Answer that is explained" in page(viewer, "trace-answer").text
    assert [label for label, _ in control["Explain"].options] == ["whole answer", "1 “ Velm”"]


def test_another_question_is_asked_anew_and_the_answer_before_is_not_explained():
    viewer = toy_view()
    control = controls(viewer)
    assert "Answer that is explained" in page(viewer, "trace-answer").text
    control["Question"].value = "Where?"
    assert control["Answer"].value == "" and "Answer that is explained" not in page(viewer, "trace-answer").text
    assert "red" not in "".join(label for label, _ in control["Explain"].options)
    control["Answer"].value = "Velm"  # given for this question
    assert "Answer that is explainedVelm" in page(viewer, "trace-answer").text
    control["Question"].value = QUESTION
    assert control["Answer"].value == "" and "explained" not in page(viewer, "trace-answer").text
    assert any("d2l-true" in box._dom_classes for box in boxes(viewer).values()), "its evidence is known again"


@pytest.mark.parametrize(
    ("n_tokens", "of_units", "token_by_token"), [(6, False, False), (7, True, False), (9, True, True)]
)
def test_the_page_says_where_a_table_is_scrolled(n_tokens, of_units, token_by_token):
    """Eight columns of numbers are seen at once: the strongest units have two beside those of the tokens."""
    trace = toy_trace()
    table = toy_table(trace.units, "sentence", "leave_one_out", [" word"] * n_tokens)
    pages = (render_units(table, trace.texts), trace_module._render_each_token(table, trace.texts))
    assert tuple("scroll the table sideways" in text for text in pages) == (of_units, token_by_token)


def test_a_page_without_contributions_keeps_its_style_and_offers_no_tokens():
    viewer = toy_view()
    assert len(controls(viewer)["Explain"].options) > 1
    controls(viewer)["Level"].value = "chunk"
    controls(viewer)["Method"].value = "surrogate"  # which fails
    controls(viewer)["Question"].value = "Where?"
    assert boxes(viewer) and "RuntimeError" in page(viewer, "message").text
    assert [label for label, _ in controls(viewer)["Explain"].options] == ["whole answer"]
    shown = "".join(child.value for child in viewer.children if isinstance(child, W.HTML))
    assert ".d2l-sentences label {" in shown and "d2l-trace-legend" not in shown


def test_the_bar_moves_while_contributions_are_computed(monkeypatch):
    monkeypatch.setattr("d2l_lib.views.page.REDRAW_S", 0.0)
    viewer = toy_view()
    counts = []
    viewer.work._count.observe(lambda change: counts.append(change["new"]), "value")
    controls(viewer)["Method"].value = "random"
    assert "2 of 3 steps" in counts


def test_sentences_have_the_same_numbers_everywhere(tmp_path):
    trace = toy_trace()
    assert list(trace.units["unit"]) == ["lamps, sentence 1", "lamps, sentence 2", "lamps, sentence 3"]
    expected = {text: str(number) for number, text in enumerate(trace.units["text"], 1)}

    def numbers(rendered: str) -> dict[str, str]:
        found = re.findall(r'data-sentence="(\d+)"[^>]*><bdi>(.*?)</bdi>', rendered, re.S)
        return {html.unescape(text): number for number, text in found}

    values = [1.0, 2.0, 3.0]
    assert numbers(render_sentences(trace.units, trace.texts, values, trace.true, [True] * 3)) == expected
    table = trace.table("sentence", "leave_one_out")
    assert numbers(trace_module.render_page(trace, [table], {})) == expected
    listed = Tags(render_units(table, trace.texts)).text
    assert all(f"sentence {number}: {' '.join(text.split())}" in listed for text, number in expected.items())


def test_sentences_of_a_later_part_go_on_counting():
    text = " ".join(f"Fact {i} is here." for i in range(250))
    viewer = toy_view(text, evidence=(), cuts=(len(text) // 2,))
    assert "counter-reset: d2l-sentence 0;" in legend(viewer)
    controls(viewer)["Sentences"].value = 200
    assert "counter-reset: d2l-sentence 200;" in legend(viewer)


def test_signs_of_formulas_in_a_sentence_are_shown_as_they_are():
    [box] = [box for label, box in boxes(toy_view()).items() if "lake" in label]
    assert box.description_allow_html and "$" not in box.description and "\uff04" not in box.description
    assert Tags(box.description).text.strip() == "The lake costs $5 and $6."
    [plain] = [box for label, box in boxes(toy_view()).items() if "paints" in label]
    assert not plain.description_allow_html


def test_changes_while_it_works_all_count():
    started, go = threading.Event(), threading.Event()

    class Slow(ToyModel):
        def answer(self, question, adapter):
            started.set()
            go.wait(20)
            return super().answer(question, adapter)

    go.set()
    model = Slow()
    viewer = view_attribution(
        *(model, toy_adapter(), LAMPS, QUESTION, "red lamps"), attribute=toy_attribute, background=True
    )
    viewer.work.wait()
    go.clear()
    started.clear()
    boxes(viewer)["She paints lamps."].value = False
    assert started.wait(20)
    boxes(viewer)["Ada lives in Velm."].value = False  # while the answer without the first one is being made
    controls(viewer)["Level"].value = "chunk"
    controls(viewer)["Question"].value = "Where?"
    controls(viewer)["Question"].value = "When?"
    assert "answering" in page(viewer, "message").text and viewer.work.is_busy
    go.set()
    viewer.work.wait()
    shown = page(viewer, "trace-answer")
    assert "When?" in shown.text and shown.root()["data-removed"] == "0"
    assert page(viewer, "trace").root()["data-level"] == "chunk" and len(boxes(viewer)) == 3


def test_what_goes_wrong_is_told_on_the_page():
    viewer = toy_view()
    control = controls(viewer)
    control["Question"].value = "fail"
    assert "<b>500</b> tokens" in page(viewer, "message").text and boxes(viewer) == {}
    control["Restore all"].click()
    control["Level"].value = "chunk"
    control["Question"].value = QUESTION
    assert "ready" in page(viewer, "message").text and len(boxes(viewer)) == 3
    control["Method"].value = "surrogate"
    message = page(viewer, "message")
    assert "RuntimeError: no " + HOSTILE in message.text and "img" not in message.names()
    control["Method"].value = "gradient"
    assert "ready" in page(viewer, "message").text


def test_a_failed_removal_leaves_no_stale_answer():
    viewer = toy_view("Break. Fix.", evidence=(), cuts=())
    boxes(viewer)["Fix."].value = False
    assert not [c for c in viewer.children if isinstance(c, W.HTML) and "d2l-trace-answer" in c.value]
    assert "cannot read this" in page(viewer, "message").text
    boxes(viewer)["Fix."].value = True
    assert answer_now(viewer) == "Break. Fix."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": None}, "pass the adapter that model.internalize returned, not NoneType"),
        ({"documents": {"boats": "A."}}, "pass documents="),
        ({"documents": "Short."}, "pass documents="),
        ({"documents": 3}, "documents must be"),
        ({"evidence": [(0, 10_000)]}, "is not inside"),
        ({"evidence": 3}, "iterable"),
        ({"question": "fail"}, "500"),
    ],
)
def test_bad_input_is_told_on_the_page(changes, message):
    given = {"adapter": toy_adapter(), "documents": LAMPS, "question": QUESTION} | changes
    viewer = view_attribution(ToyModel(), **given, attribute=toy_attribute)
    assert message in page(viewer, "message").text
    assert message in Tags(viewer.static_html).text


def test_many_sentences_are_shown_in_parts():
    text = " ".join(f"Fact {i} is here." for i in range(450))
    viewer = toy_view(text, evidence=(), cuts=(len(text) // 2,))
    control = controls(viewer)
    assert control["Level"].value == "chunk", "sentences of a long document cost a pass each"
    assert len(boxes(viewer)) == 200 and len(control["Sentences"].options) == 3
    boxes(viewer)["Fact 7 is here."].value = False
    control["Sentences"].value = 400
    assert list(boxes(viewer))[0] == "Fact 400 is here."
    control["Sentences"].value = 0
    assert not boxes(viewer)["Fact 7 is here."].value, "what was taken out stays out"


def test_the_viewer_has_a_plain_form():
    viewer = toy_view()
    bundle = viewer._repr_mimebundle_()
    tags = Tags(bundle["text/html"])
    for shown in ("She paints lamps.", "supports", "nats of log-probability", "zero adapter", QUESTION):
        assert shown in tags.text
    json.dumps(bundle)


# --- files ------------------------------------------------------------------------------------------------------------


def save_toy(path: Path, text: str = LAMPS, **options) -> Path:
    return save_html(
        path, ToyModel(), toy_adapter(text), text, QUESTION, "red lamps", attribute=toy_attribute, **options
    )


def test_a_saved_page_is_whole_or_not_there(tmp_path, monkeypatch):
    saved = save_toy(tmp_path / "deep" / "page.html", evidence=[EVIDENCE])
    text = saved.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and text.endswith("</html>\n")
    assert re.findall(r"https?:|<script|<link|<img|url\(|@import", text) == []
    assert Tags(text).names() <= set(
        "html head meta title style body main h1 h4 div span b bdi br fieldset legend label input table tr".split()
        + ["th", "td"]
    )
    with pytest.raises(RuntimeError, match="no "):
        save_toy(tmp_path / "other.html", views=[("chunk", "surrogate")])
    with pytest.raises(ValueError, match="at least one"):
        save_toy(saved, views=[])
    assert sorted(path.name for path in tmp_path.rglob("*.html")) == ["page.html"] and saved.read_text() == text


def test_a_saved_page_of_a_long_answer_writes_what_each_token_gets_once(tmp_path):
    """The tables of all tokens would else stand behind every token that one can choose: squared in the tokens."""

    def long_answer(*arguments, **options):
        table = toy_attribute(*arguments, **options)
        n, units = 52, len(table)
        table.attrs["tokens"] = [f" t{i}" for i in range(n)]
        return table.assign(by_token=[[(i - j) / 7 for j in range(n)] for i in range(units)])

    page = save_html(tmp_path / "page.html", ToyModel(), toy_adapter(), LAMPS, QUESTION, attribute=long_answer)
    text = page.read_text(encoding="utf-8")
    usual = [method in attribution.METHODS[level] for level, method in trace_module._SAVED_VIEWS]
    assert text.count("Token by token") == sum(usual) and "the 52 answer tokens" in text
    assert len(text) < 1_000_000
    for token in (0, 51):  # shown by no script, but by what is chosen
        assert f".d2l-saved:has(#view-0:checked):has(#token-{token + 1}:checked) {{ .d2l-choice-0-{token + 1}" in text
        assert f'<th class="d2l-token-column">{token + 1}<br>' in text


def test_an_unknown_option_is_named():
    given = (ToyModel(), toy_adapter(), LAMPS, QUESTION)
    for call in (Trace, view_attribution, partial(save_html, "page.html")):
        with pytest.raises(TypeError, match="has no option 'atribute'; choose from wrong, attribute"):
            call(*given, atribute=toy_attribute)
    with pytest.raises(TypeError, match="a trace has no option 'removals'"):
        Trace(*given, removals=3)


def test_as_many_removals_are_made_beforehand_as_asked_for(tmp_path):
    text = save_toy(tmp_path / "page.html", removals=1).read_text()
    assert 'id="removed-2"' in text and 'id="removed-1"' not in text, "the largest contribution first"


@pytest.mark.browser
def test_a_saved_page_works_offline(tmp_path):
    reason = browser.why_not()
    if reason:
        pytest.skip(reason)
    saved = save_toy(tmp_path / "page.html", LAMPS[:-1] + HOSTILE, evidence=[EVIDENCE])
    with browser.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser.chromium(), args=["--no-sandbox"])
        try:
            shown = chromium.new_context(offline=True).new_page()
            requests, complaints = [], []
            shown.on("request", lambda request: requests.append(request.url))
            shown.on("console", lambda message: complaints.append(message.text))
            shown.goto(saved.as_uri())
            expect = browser.expect
            sentence, now = shown.locator(".d2l-unit-1 span"), shown.locator(".d2l-now:visible")
            color = "element => getComputedStyle(element).backgroundColor"
            expect(now).to_contain_text("She paints lamps.")
            sentence.click()
            expect(now).not_to_contain_text("She paints lamps.")
            shown.keyboard.press("ArrowUp")  # the sentence before, by keyboard alone
            expect(now).not_to_contain_text("Ada lives in Velm.")
            shown.get_by_label("nothing taken out").check()
            expect(now).to_contain_text("She paints lamps.")
            last = shown.locator(".d2l-unit-2 span")
            assert last.evaluate(color) == shade(1.0, 1.0)
            shown.get_by_label("“ lamps”").check()
            assert last.evaluate(color) == shade(0.0, 1.0)
            shown.get_by_label("rank, leave one out").check()
            expect(shown.locator(".d2l-heat:visible")).to_have_count(2)
            assert "dashed" in sentence.evaluate("element => getComputedStyle(element).outline")
            assert requests == [saved.as_uri()] and complaints == []
            assert shown.evaluate("() => window.owned") is None and shown.locator("img, script").count() == 0
        finally:
            chromium.close()


# --- the bundled model ------------------------------------------------------------------------------------------------


def bundled():
    """The bundled model, a document inside it with several sentences a chunk, and a question; also for the notebook."""
    import d2l_lib as d2l

    model = d2l.load("tiny/qa")
    samples = Path(__file__).resolve().parent.parent.parent / "data" / "samples" / "world_test.jsonl"
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if row["kind"] == "one_hop" and row["document"].count(row["answer"]) == 1:
            adapter = model.internalize(row["document"], chunk_tokens=48)
            if model.answer(row["question"], adapter) == row["answer"]:
                evidence = list(zip(row["evidence_start"], row["evidence_end"], strict=True))
                return model, adapter, row["document"], row["question"], row["answer"], evidence
    raise AssertionError("the bundled model answers none of the samples")


@pytest.fixture(scope="module")
def bundled_trace():
    return Trace(*bundled())


def test_the_bundled_model_end_to_end(bundled_trace, tmp_path):
    trace = bundled_trace
    assert trace.said == trace.answer
    assert len(trace.units) > len(trace.adapter.blocks), "sentences share chunks"
    values = sentence_values(trace.units, trace.table("sentence", "leave_one_out"))
    [true] = trace.true
    assert values.index(max(values)) == true
    assert trace.answer_without({true}) != trace.said
    current = trace.model.current
    saved = save_html(
        *(tmp_path / "page.html", trace.model, trace.adapter, trace.texts, trace.question, trace.answer),
        removals=1,
    )
    assert trace.answer_without({true}) in saved.read_text() and trace.model.current is current


def test_a_contribution_is_what_taking_the_sentence_out_costs(bundled_trace):
    """What is shown and what a click does are the same thing."""
    trace = bundled_trace
    values = sentence_values(trace.units, trace.table("sentence", "leave_one_out"))

    def log_prob(adapter) -> float:
        trials = attribution.Trials(trace.model, adapter, trace.question, trace.answer)
        return float(trials.score(torch.ones(1, len(trials)))[0].sum())

    whole = log_prob(trace.adapter)
    for number in (*trace.true, 0, len(values) - 1):
        shortened = trace.adapter_without({number})
        assert len(shortened.blocks) <= len(trace.adapter.blocks)
        assert whole - log_prob(shortened) == pytest.approx(values[number], abs=1e-4)


def shoot(cell, name: str) -> None:
    """A picture to look at, in the cache folder of this clone."""
    folder = Path(__file__).resolve().parent.parent.parent / ".cache" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    cell.screenshot(path=folder / name)
