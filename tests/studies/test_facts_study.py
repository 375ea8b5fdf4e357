"""The study of facts asks about paragraphs of four and eight facts, each in one block."""

import pandas as pd
import pytest
from test_passages import _Reader

from d2l_lib.studies import facts as study
from d2l_lib.tasks import facts

N = 24


class _FactReader(_Reader):
    """Knows an answer where its paragraph is in the prompt or in the adapter; its chunks have `chunk_tokens`."""

    def __init__(self, chunk_tokens: int):
        super().__init__({})
        self.encoder_tokenizer, self.chunk_tokens = self.tokenizer, chunk_tokens
        drawn = pd.concat([facts.fact_samples(N, 5, (k, k), split="test") for k in (4, 8)])
        self.known = {(row.document, row.question): row.answers[0] for row in drawn.itertuples()}

    def answer(self, prompts, adapters, max_new_tokens):
        places = [
            (prompt, "" if one is None else one.documents[0]) for prompt, one in zip(prompts, adapters, strict=True)
        ]
        return [
            next((answer for (document, question), answer in self.known.items()
                  if question in prompt and (document in prompt or document == inside)), "the moon")
            for prompt, inside in places
        ]  # fmt: skip


def test_own_paragraphs_are_known_and_another_ones_adapter_tells_nothing():
    in_steps = list(study.run(_FactReader(10_000), n=N, seed=5))
    assert [len(rows) for rows in in_steps] == list(range(3, 25, 3))
    table = pd.DataFrame(in_steps[-1])
    assert set(table["n"]) == {N} and set(table["dataset"]) == {"facts"}
    assert set(table["metric"]) == {"token_f1_squad", "exact_match_squad", "recall"}
    exact = table[table["metric"] == "exact_match_squad"].set_index(["n_facts", "method"])
    for k in (4, 8):
        right = exact.loc[k, "score"]
        assert right["passage in the prompt"] == right["Doc-to-LoRA"] == 1
        assert right["question alone"] == right["another passage's adapter"] == 0
        assert (exact.loc[k, "high"] - exact.loc[k, "low"]).between(0.1, 0.2).all()
    assert exact.loc[4, "tokens"].iloc[0] < exact.loc[8, "tokens"].iloc[0] < exact.loc[8, "most_tokens"].iloc[0]


def test_some_methods_are_measured_again_and_the_others_stay(monkeypatch):
    *_, whole = study.run(_FactReader(10_000), n=N, seed=5)
    before = [row | {"seed": 5, "command": "before"} for row in whole]
    monkeypatch.setattr("d2l_lib.studies.passages.earlier_rows", lambda name: before if name == "facts" else [])
    *_, rows = study.run(_FactReader(10_000), n=N, seed=5, only=["alone"])
    assert [(row["method"], row["n_facts"]) for row in rows] == [(row["method"], row["n_facts"]) for row in whole]
    assert {row["method"] for row in rows if "command" not in row} == {"question alone"}
    with pytest.raises(ValueError, match="no reading LoRA"):
        next(study.run(_FactReader(10_000), n=N, seed=5, only=["reading"]))


def test_a_paragraph_of_more_than_one_block_is_refused():
    with pytest.raises(ValueError, match="a block takes 20: take a model with longer chunks"):
        next(study.run(_FactReader(20), n=N, seed=5))
