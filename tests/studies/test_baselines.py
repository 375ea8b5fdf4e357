"""The methods that Doc-to-LoRA is compared with, on the bundled base model, which answers well enough to tell."""

import random
from dataclasses import replace

import pandas as pd
import pytest
from tiny_models import build_rows_model

import d2l_lib as d2l
from d2l_lib.studies import baselines, methods
from d2l_lib.tasks import qa, world
from d2l_lib.training import context_distillation


@pytest.fixture(scope="module")
def model():
    return d2l.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def questions() -> pd.DataFrame:
    """Three documents of four facts, two one-hop questions on each."""
    rng, rows = random.Random(5), []
    for number in range(3):
        document = world.draw_document(rng, "test", 4)
        for fact in document.facts[:2]:
            question = world.question_about(rng, fact)
            rows.append({"dataset": "world", "id": f"{number}/{fact.relation}", "document": document.text,
                         "question": question.text, "answers": [question.answer], "kind": question.kind})  # fmt: skip
    return pd.DataFrame(rows)


def right(compared: pd.DataFrame) -> dict[str, float]:
    return qa.score(compared).groupby("method", sort=False)["score"].mean().to_dict()


@pytest.mark.slow
def test_methods_see_the_document_or_do_not(model, questions):
    methods = [
        baselines.InContext(model),
        baselines.NoContext(model),
        baselines.PromptCompression(model, 1.0, use_llmlingua=False, name="all tokens"),
        baselines.PromptCompression(model, 0.05, use_llmlingua=False, name="few tokens"),
        baselines.Internalized(model, with_context=True, name="both"),
    ]
    compared = baselines.compare(methods, questions)
    assert list(compared["method"].unique()) == [method.name for method in methods]
    scores = right(compared)
    assert scores["in context"] == 1 and scores["all tokens"] == 1
    assert scores["no context"] == 0 and scores["few tokens"] < 0.5
    for method in methods:  # the rows of the questions, in their order, for every method
        own = compared[compared["method"] == method.name]
        assert list(own["id"]) == list(questions["id"])
    assert (compared[["seconds_prepare", "seconds_answer", "peak_memory_mib"]] >= 0).all().all()
    cost = baselines.costs(compared).set_index("method")
    assert (cost["documents"] == 3).all() and (cost["peak_memory_mib"] > 50).all()


def test_truncated_context_keeps_both_ends_and_its_limit(model):
    method = baselines.InContext(model, "truncated", tokens=200, max_new_tokens=20)
    text = " ".join(f"Sentence number {i} stands here." for i in range(100))
    (prompt,) = qa.with_document(text, ["Where?"], model.tokenizer, 200, 20)
    assert prompt.lstrip().startswith("Sentence number 0") and "Sentence number 99 stands here." in prompt
    assert "number 50 " not in prompt and prompt.endswith("Where?")
    assert len(model.tokenizer(prompt)["input_ids"]) <= 180
    assert len(method.answer(method.prepare(text, []), ["Where?", "Who?"])) == 2


def test_distillation_on_the_asked_questions_learns_their_answers(model, questions):
    first = questions[questions["document"] == questions["document"][0]]
    oracle = context_distillation.ContextDistillation(model, "oracle", steps=60)
    untrained = context_distillation.ContextDistillation(model, "oracle", steps=0, name="untrained")
    scores = right(baselines.compare([oracle, untrained], first))
    assert scores[oracle.name] == 1 and scores["untrained"] == 0
    before = [parameter.clone() for parameter in model.base_model.parameters()]
    adapter = oracle.prepare(first["document"].iloc[0], list(first["question"]))
    assert len(adapter.blocks) == 1 and adapter.bias is None and adapter.scale == model.config.scale
    assert all((a == b).all() for a, b in zip(before, model.base_model.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in model.base_model.parameters())


def test_adapters_of_token_rows_are_compared_in_their_own_way(questions):
    model = build_rows_model()
    few = questions[questions["document"] == questions["document"][0]].head(2)
    methods = [baselines.Internalized(model, max_new_tokens=4), baselines.Internalized(model, "asked", read="sparse")]
    table = baselines.compare([methods[0], replace(methods[1], max_new_tokens=4)], few)
    said = table.groupby("method", sort=False)["prediction"].apply(list)
    assert said["Doc-to-LoRA"] == said["asked"] and (table["bytes_kept"] > 0).all()
    with pytest.raises(ValueError, match="token rows, and distillation trains a LoRA: give a model whose adapters are"):
        context_distillation.ContextDistillation(model, "oracle")


def test_the_base_model_asks_questions_of_its_own(model, questions):
    document = questions["document"][0]
    asked = context_distillation.sample_questions(model, document, 6, seed=1)
    assert len(set(asked)) == len(asked) == 6 and all(question.endswith("?") for question in asked)
    assert asked == context_distillation.sample_questions(model, document, 6, seed=1)
    assert asked != context_distillation.sample_questions(model, document, 6, seed=2)
    names = [word for word in document.split() if word[0].isupper() and len(word) > 4]
    assert any(name.strip(".") in question for name in names for question in asked)  # about this document


def test_token_information_of_one_text_in_windows_and_whole(model):
    ids = model.tokenizer("The grass is green. " * 20, add_special_tokens=False)["input_ids"]
    values = baselines.token_information(model, ids)
    assert len(values) == len(ids) and min(values) >= 0
    assert sum(values[-20:]) < sum(values[:20])  # what was said often is no news
    long = ids * 12
    assert len(long) > model.window and len(baselines.token_information(model, long)) == len(long)


def test_bad_settings_say_what_to_do(model, questions, monkeypatch):
    with pytest.raises(ValueError, match="more than 0 and at most 1, not 0"):
        baselines.PromptCompression(model, 0)
    with pytest.raises(ValueError, match='"oracle" or a number'):
        context_distillation.ContextDistillation(model, "all")
    with pytest.raises(ImportError, match="pip install llmlingua"):
        baselines.PromptCompression(model, 0.5, use_llmlingua=True)
    with pytest.raises(ValueError, match="no context: give each a name"):
        baselines.compare([baselines.NoContext(model), baselines.NoContext(model)], questions)


def test_methods_that_come_later_join_the_recorded_ones(model, monkeypatch):
    """The rows of others stay, in the order of the methods; all rows of a table answer the same questions."""
    earlier = [
        {"method": name, "documents": 2, "seed": 0, "command": "an earlier one", "score": 0.25}
        for name in ("in context", "no context", "distillation (oracle)")
    ]
    monkeypatch.setattr(methods, "earlier_rows", lambda name: earlier)
    rows = methods.run(model, 2, 0, 1, None, only=["no context", "best 4"])["qa_methods"]
    names = ["in context", "no context", "BM25, best 4 chunks", "BM25, best 4 sentences", "distillation (oracle)"]
    assert [row["method"] for row in rows] == names
    assert [row["score"] for row in rows if "command" in row] == [0.25, 0.25]
    no_context = next(row for row in rows if row["method"] == "no context")
    assert no_context["n"] == 16 and no_context["score"] == 0 and no_context["bytes_kept"] == 0
    for n, seed in ((3, 0), (2, 1)):
        with pytest.raises(ValueError, match="'an earlier one': the methods of a table answer the same questions"):
            methods.run(model, n, seed, 1, None, only=["no context"])
    with pytest.raises(ValueError, match="no method is called BM26; there are in context, no context"):
        methods.run(model, 2, 0, 1, None, only=["BM26"])
