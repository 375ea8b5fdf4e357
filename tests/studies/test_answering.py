"""The study of what answering costs: its rows, and that the ways do what they are called."""

import torch

import d2l_lib as d2l
from d2l_lib.studies import answering


def test_every_size_and_number_of_questions_has_both_measures():
    model = d2l.load("tiny/qa")
    table = answering.measure_answering(model, 1, 0, sizes=(1, 8), questions=(1, 2), split="validation")
    assert len(table) == 8 and (table["n"] == 1).all()
    assert set(table["measure"]) == {"a token", "a routed answer"}
    assert (table[["milliseconds", "base_milliseconds", "ratio"]] > 0).all().all()
    assert (table["ratio_low"] == table["ratio_high"]).all(), "of one turn"


def test_as_many_tokens_are_written_as_asked_for(monkeypatch):
    model, made = d2l.load("tiny/qa"), []

    def generate(network, tokenizer, ids, mask, *, min_new_tokens, max_new_tokens):
        made.append((tuple(ids.shape), min_new_tokens, max_new_tokens))

    monkeypatch.setattr(answering, "generate", generate)
    answering._written(model, ["Who?", "What is Halmere known for?"], None, 7)()
    shape, least, most = made[0]
    assert shape[0] == 2 and least == most == 7
    assert torch.tensor(shape).min() > 1
