"""Retrieval by BM25: what is ranked first, what goes into the prompt, and the studies that count it."""

import builtins

import pandas as pd
import pytest

import d2l_lib as d2l
from d2l_lib.studies import baselines, retrieval_scores
from d2l_lib.studies.reading import draw_conditions
from d2l_lib.studies.retrieval import PassageIndex, Retrieval, passages_of
from d2l_lib.studies.retrieval_scores import measure_pools, measure_retrieval
from d2l_lib.studies.router import block_pool, draw_pool

TOWNS = [
    "Brihead has a harbour for large ships.",
    "The mayor of Brihead keeps bees.",
    "The weather was mild that autumn.",
    "Merstead has a mayor and a bridge.",
]


@pytest.fixture(scope="module")
def model():
    return d2l.load("tiny/qa")


def test_the_passage_that_shares_most_and_rarest_words_comes_first():
    index = PassageIndex(TOWNS)
    assert index.best("Who is the mayor of Brihead?", 4)[0] == 1
    assert index.best("Which town has a bridge?", 1) == [3]
    assert index.best("HARBOUR!", 4) == [0], "case and punctuation do not count"
    scores = index.scores("Who is the mayor of Brihead?")
    assert scores.shape == (4,) and scores[1] > max(scores[0], scores[3]) > scores[2] == 0


def test_of_equal_passages_the_earlier_comes_first():
    same = ["Alda paints boats.", "Bram paints boats.", "Cora paints boats.", "Dirk sleeps."]
    assert PassageIndex(same).best("Who paints boats?", 2) == [0, 1]
    assert PassageIndex([same[0]] * 50).best("boats", 50) == list(range(50))


def test_a_question_without_a_word_in_common_finds_nothing():
    index = PassageIndex(TOWNS)
    for question in ("Quel temps fait-il?", "Who is it?", "?"):
        assert index.best(question, 4) == [] and index.excerpt(question, 4) == ""
        assert (index.scores(question) == 0).all()


def test_the_best_passages_stand_in_the_order_of_the_document():
    index = PassageIndex(TOWNS)
    best = index.best("Which mayor keeps a bridge in Brihead?", 3)
    assert best != sorted(best) and set(best) == {0, 1, 3}
    assert index.excerpt("Which mayor keeps a bridge in Brihead?", 3) == " ".join([TOWNS[0], TOWNS[1], TOWNS[3]])


def test_short_and_empty_documents(model):
    assert PassageIndex(["Brihead has a harbour."]).best("Where is a harbour?", 4) == [0]
    wordless = PassageIndex(["the", "..."])
    assert wordless.best("Where is the harbour?", 4) == [] and wordless.nbytes == 6
    with pytest.raises(ValueError, match="no passages: an index needs at least one"):
        PassageIndex([])
    for unit in ("chunk", "sentence"):
        with pytest.raises(ValueError, match="the document holds no text"):
            Retrieval(model, unit=unit).prepare(" \n", [])
    with pytest.raises(ValueError, match="unit is 'page'; choose one of chunk, sentence"):
        passages_of("A text.", "page", model.tokenizer, 20)
    with pytest.raises(ValueError, match="k must be a whole number of at least 1, not 0"):
        Retrieval(model, 0)
    with pytest.raises(ValueError, match="k must be a whole number of at least 1, not 0"):
        PassageIndex(TOWNS).best("bridge", 0)


def test_passages_are_the_chunks_of_the_blocks_or_the_sentences(model):
    text = " ".join(TOWNS)
    (adapter,) = model.internalize_each([text])
    chunks = passages_of(text, "chunk", model.encoder_tokenizer, model.chunk_tokens)
    assert chunks == [text[slice(*block.span)].strip() for block in adapter.blocks]
    assert passages_of(text, "sentence", model.encoder_tokenizer, model.chunk_tokens) == TOWNS


def test_the_prompt_holds_the_passages_and_the_question(model):
    method = Retrieval(model, 2, "sentence")
    index = method.prepare(" ".join(TOWNS), [])
    found, alone = method.prompts(index, ["Has the mayor of Brihead a bridge?", "Qui?"])
    assert found.startswith(TOWNS[1]) and found.endswith("\n\nHas the mayor of Brihead a bridge?")
    assert TOWNS[0] not in found and TOWNS[2] not in found
    assert alone == "Qui?"
    assert [Retrieval(model, k, unit).name for k, unit in ((1, "chunk"), (4, "sentence"))] == [
        "BM25, best chunk", "BM25, best 4 sentences"]  # fmt: skip


def test_a_fact_is_found_and_read_and_costs_fewer_bytes_than_an_adapter(model):
    asked = next(draw_conditions(3, 0, "validation"))
    document, questions = asked.documents[0].text, [question.text for question in asked.questions]
    method = Retrieval(model, 8)
    index = method.prepare(document, questions)
    assert method.answer(index, questions) == [question.answer for question in asked.questions]
    assert len(document.encode()) < baselines.kept_bytes(index) < 10 * len(document.encode())
    assert baselines.kept_bytes(model.internalize_each([document])[0]) > 100 * baselines.kept_bytes(index)


def test_bytes_that_are_kept():
    assert baselines.kept_bytes(None) == 0 and baselines.kept_bytes("Lù") == 3
    assert baselines.kept_bytes(("Lù", None)) == 3


def test_without_bm25s_the_error_says_what_to_install(model, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "bm25s":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    for make in (lambda: Retrieval(model), lambda: PassageIndex(TOWNS)):
        with pytest.raises(ImportError, match="retrieval needs bm25s .*: pip install bm25s"):
            make()


def test_a_pool_of_chunks_is_a_pool_of_blocks(model):
    adapter, questions = block_pool(model, 30, 0, "validation")
    chunks, same = draw_pool(model, 30, 0, "validation")
    flat = [chunk for of_document in chunks for chunk in of_document][:30]
    assert [block.span for block in adapter.blocks] == [chunk.span for chunk in flat]
    assert [(question.text, places) for question, places in questions] == [(one.text, places) for one, places in same]
    for question, places in same:
        assert any(question.answer.split()[-1] in flat[place].text for place in places)


def test_pools_are_ranked_and_answered(model):
    table = measure_pools(model, 6, 0, sizes=(20, 40), split="validation")
    assert (table["n"] == 6).all() and (table["cpu_milliseconds"] >= 0).all()
    shares = table.set_index(["blocks", "measure"])["share"]
    for size in (20, 40):
        assert shares[size, "among 8"] >= shares[size, "among 4"] >= shares[size, "right chunk first"] > 0
        assert shares[size, "best 8 chunks"] >= 0.5
    megabytes = table.groupby("blocks")["megabytes"].first()
    assert 0.001 < megabytes[20] < megabytes[40] < 0.02


@pytest.mark.slow
def test_every_condition_is_answered_by_every_method(model):
    tables = list(measure_retrieval(model, 2, 0, split="validation", without=["list"]))
    table = pd.concat(tables)
    assert table["condition"].nunique() == len(tables) == 11 and (table["n"] == 2).all()
    assert (table.groupby("condition")["method"].nunique() == 5).all()
    shares = table.set_index(["condition", "method"])["exact_match"]
    assert shares["8 facts", "no document"] == 0 < shares["8 facts", "BM25, best 4 chunks"]
    assert shares["encyclopedia beside 20 facts", "no document"] == 1
    kept = table[table["condition"] == "20 facts"].set_index("method")["kilobytes"]
    assert kept["no document"] == 0 < kept["everything that fits"] < kept["BM25, best chunk"]
    assert kept["BM25, best chunk"] * 100 < kept["Doc-to-LoRA, sparse"]


def test_the_study_goes_on_where_it_was_interrupted(monkeypatch):
    table = pd.DataFrame({"condition": ["b"], "n": 2})
    monkeypatch.setattr(retrieval_scores, "measure_pools", lambda *_: pd.DataFrame({"blocks": [64]}))
    monkeypatch.setattr(
        retrieval_scores, "measure_retrieval", lambda *_, without: iter([] if "b" in without else [table])
    )
    earlier = [{"condition": name, "n": n, "seed": 0} for name, n in (("a", 2), ("other n", 3))]
    monkeypatch.setattr(retrieval_scores, "earlier_rows", lambda name: earlier)
    pools, rows = retrieval_scores.run(None, 2, 0)
    assert list(pools) == ["retrieval_pools"] and [row["condition"] for row in rows["retrieval"]] == ["a", "b"]
    earlier.append({"condition": "b", "n": 2, "seed": 0})
    assert len(list(retrieval_scores.run(None, 2, 0))) == 1, "all conditions are there"
    _, rows = retrieval_scores.run(None, 2, 0, again=True)
    assert [row["condition"] for row in rows["retrieval"]] == ["b"]
