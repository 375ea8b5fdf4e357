"""Self-generated data: true log-probabilities, nothing mixed up, the same bytes whatever happens to a run."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import build_base_model, build_tokenizer
from transformers import DynamicCache

from d2l_lib.__main__ import main
from d2l_lib.documents import chat_affixes, context_ids, question_ids
from d2l_lib.engine import Reply, TransformersEngine, _staying, _with_room, pad_rows
from d2l_lib.formats import shards as shard_files
from d2l_lib.formats import writing
from d2l_lib.formats.shards import PUBLISHED, SCHEMA, TEACHER_COLUMNS, read_shards
from d2l_lib.training import batches, losses, selfgen
from d2l_lib.training.selfgen import Settings, generate, make_shard, parse_questions

ROOT = Path(__file__).resolve().parents[2]
SMALL = Settings(
    documents=11, shard_size=2, questions=3, shortest=1, longest=3, max_new_tokens=24, unrelated_share=0.2, seed=3
)  # fmt: skip


def build_engine(family: str = "llama", window: int = 2048, **options) -> TransformersEngine:
    """A random model that likes its stop tokens, so that many of its answers end, after various numbers of tokens."""
    tokenizer = build_tokenizer()
    model = build_base_model(tokenizer, family=family, window=window)
    engine = TransformersEngine("random", model, tokenizer, **options)
    with torch.no_grad():
        model.get_output_embeddings().weight[engine.stops] *= 3
    return engine


@pytest.fixture(scope="module")
def engine():
    return build_engine()


@pytest.fixture(scope="module")
def whole(engine, tmp_path_factory):
    """A finished folder of SMALL, made without interruption. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    generate(SMALL, folder, engine)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def prompt_of(row: dict, q: int) -> str:
    unrelated = row["kinds"][q] in ("encyclopedia", "unrelated")
    return row["questions"][q] if unrelated else f"{row['document']}\n\n{row['questions'][q]}"


def answer_ids(row: dict, q: int) -> list[int]:
    start, end = row["response_start_end"][q]
    return row["input_ids"][q][start:end]


# --- answers and log-probabilities ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "shares"), [("llama", True), ("qwen3", True), ("gemma2", False), ("mistral", False)]
)
def test_a_document_is_read_once_for_its_questions_and_the_answers_stay_the_same(family, shares):
    engine = build_engine(family)
    first, second = "The mayor of Velm is Ada Row. " * 4, "It was a long winter in Tarn, with much snow. " * 3
    texts = [f"{first}\n\nWho is the mayor?", "Who wrote it?", f"{first}\n\nWhere is Velm?", f"{second}\n\nWas it?",
             f"{first}\n\nIs Ada Row a mayor?", f"{second}\n\nWhere was much snow?"]  # fmt: skip
    prompts = question_ids(engine.tokenizer, texts)
    groups = engine._groups(prompts, 16)
    together = sorted(sorted(places) for n, places in groups)
    assert together == ([[0, 2, 4], [1], [3, 5]] if shares else [[i] for i in range(6)])
    for n, places in groups:
        assert all(prompts[i][:n] == prompts[places[0]][:n] and len(prompts[i]) > n for i in places)
        assert n == 0 or n > 100
    small = TransformersEngine("random", engine.model, engine.tokenizer, batch_tokens=400)
    assert all(small._positions(prompts, [group], 16) <= 400 for group in small._groups(prompts, 16))
    batched = engine.reply(prompts, 16, 0.0, seed=0)
    for prompt, reply in zip(prompts, batched, strict=True):
        (alone,) = engine.reply([prompt], 16, 0.0, seed=0)
        assert reply.ids == alone.ids and reply.finished == alone.finished
        np.testing.assert_allclose(reply.values, alone.values, atol=2e-2)  # float16


@pytest.mark.parametrize(("family", "temperature"), [("llama", 0.0), ("gemma2", 3.0)])
def test_log_probabilities_are_those_of_a_plain_pass_over_document_question_and_answer(family, temperature):
    engine = build_engine(family)
    table, counts = make_shard(replace(SMALL, documents=4, shard_size=4, temperature=temperature), 0, engine)
    lengths = []
    for row in table.to_pylist():
        assert row["ctx_ids"] == context_ids(engine.tokenizer, row["document"])
        for q, question in enumerate(row["questions"]):
            prompt, answer = question_ids(engine.tokenizer, prompt_of(row, q)), answer_ids(row, q)
            assert row["input_ids"][q] == question_ids(engine.tokenizer, question) + answer, "no document in it"
            assert answer[-1] in engine.stops and not set(answer[:-1]) & set(engine.stops)
            with torch.no_grad():
                logits = engine.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1)
            indices = torch.tensor(row["logprobs_indices"][q])
            values = torch.tensor(np.array(row["logprobs_vals"][q], dtype=np.float32))
            assert values.shape == indices.shape == (len(answer), 16)
            torch.testing.assert_close(values, expected.gather(-1, indices), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(values, expected.topk(16).values, rtol=1e-3, atol=1e-3)
            assert (indices[:, 0].tolist() == answer) == (temperature == 0), "greedy"
            lengths.append(len(answer))
    assert counts["kept"] == len(lengths) and len(set(lengths)) > 2, "answers of different lengths"


def test_neither_batches_nor_their_padding_matter(engine):
    prompts = question_ids(
        engine.tokenizer, ["Who?", "Where is the seat of it?", "When was " + "x" * 300 + " born?"] * 3
    )
    together = engine.reply(prompts, 16, 0.0, 0)
    alone = build_engine(batch_tokens=1).reply(prompts, 16, 0.0, 0)
    for a, b in zip(together, alone, strict=True):
        assert (a.ids, a.finished) == (b.ids, b.finished)
        np.testing.assert_allclose(a.values.astype(float), b.values.astype(float), rtol=1e-3, atol=1e-3)


def test_sampling_follows_its_seed_and_stores_the_untempered_distribution(engine):
    prompts = question_ids(engine.tokenizer, ["Who?", "Where?", "What is it?"])
    first, again = (engine.reply(prompts, 16, 1.5, seed=5) for _ in range(2))
    other = engine.reply(prompts, 16, 1.5, seed=6)
    assert [r.ids for r in first] == [r.ids for r in again] != [r.ids for r in other]
    with torch.no_grad():
        logits = engine.model(torch.tensor([prompts[0] + first[0].ids])).logits[0, len(prompts[0]) - 1 : -1]
    np.testing.assert_allclose(first[0].values, logits.log_softmax(-1).topk(16).values, rtol=1e-3, atol=1e-3)


class Stepwise(TransformersEngine):
    """Answers token by token, whatever was guessed."""

    def reply(self, prompts, max_new_tokens, temperature, seed, guesses=None):
        return super().reply(prompts, max_new_tokens, temperature, seed)


class Plain(Stepwise):
    """The plainest loop: nobody leaves a batch, and transformers' own cache grows."""

    @torch.inference_mode()
    def _generate(self, prompts, shared, max_new_tokens, temperature, generator):
        places = [place for place, (_, rows) in enumerate(shared) for _ in range(rows)]
        begin = [shared[place][0] for place in places]
        ids, mask = self._padded([prompt[n:] for prompt, n in zip(prompts, begin, strict=True)])
        limits = [min(max_new_tokens, self.window - len(prompt)) for prompt in prompts]
        cache, steps = None, []
        if any(begin):
            heads = [prompts[places.index(place)][:n] for place, (n, _) in enumerate(shared)]
            head_ids, head_mask = self._padded(heads)
            cache = self._step(head_ids, head_mask, None).past_key_values
            cache.batch_select_indices(torch.tensor(places))
            mask = torch.cat([head_mask[places], mask], 1)
        everybody, done = torch.arange(len(prompts)), torch.zeros(len(prompts), dtype=torch.bool)
        while not done.all():
            output = self._step(ids, mask, cache)
            cache, log_probs = output.past_key_values, output.logits[:, -1].float().log_softmax(-1)
            top = log_probs.topk(16)
            chosen = top.indices[:, 0]
            if temperature > 0:
                probabilities = (log_probs / temperature).softmax(-1)
                chosen = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            steps.append((everybody, chosen, top.values, top.indices))
            done |= torch.isin(chosen, torch.tensor(self.stops)) | (len(steps) >= torch.tensor(limits))
            ids, mask = chosen[:, None], torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
        return self._replies(steps, limits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_shards_are_those_of_a_plain_loop_byte_by_byte(temperature, tmp_path):
    """With the bundled model: its products are as large as those that are claimed to keep every bit."""
    settings = Settings(documents=5, shard_size=5, temperature=temperature, max_new_tokens=24)
    loaded = selfgen.load_engine("transformers", "tiny", 16384)
    engine = Stepwise("tiny", loaded.model, loaded.tokenizer)
    sizes: list[int] = []
    step = engine._step
    engine._step = lambda ids, mask, cache: sizes.append(len(ids)) or step(ids, mask, cache)
    plain = Plain("tiny", engine.model, engine.tokenizer)
    folders = [tmp_path / name for name in ("ours", "plain")]
    for one, folder in zip((engine, plain), folders, strict=True):
        generate(settings, folder, one)
    ours, theirs = map(contents, folders)
    assert ours == theirs
    assert len(set(sizes)) > 4 and min(sizes) < max(sizes) / 4, "rows left"


@pytest.mark.parametrize(("family", "temperature"), [("llama", 0.0), ("llama", 1.5), ("gemma2", 3.0), ("mistral", 3.0)])
def test_who_leaves_a_batch_changes_nobody_elses_answer(family, temperature):
    engine = build_engine(family)
    document = "The mayor of Velm is Ada Row. " * 3
    texts = [f"{document}\n\n{'Who' * n} is it?" for n in range(1, 9)] + ["Who?", "Where?", "When was it built?"]
    prompts = question_ids(engine.tokenizer, texts)
    plain = Plain("plain", engine.model, engine.tokenizer)
    if temperature > 0:  # every sixth token ends an answer
        engine.stops = plain.stops = list(range(0, engine.model.get_input_embeddings().num_embeddings, 6))
    ours, theirs = (one.reply(prompts, 24, temperature, seed=3) for one in (engine, plain))
    assert len({len(reply.ids) for reply in ours}) > 2, "answers of different lengths"
    for a, b in zip(ours, theirs, strict=True):
        assert (a.ids, a.finished) == (b.ids, b.finished)
        np.testing.assert_allclose(a.values.astype(float), b.values.astype(float), rtol=2e-3, atol=2e-3)


def test_rows_that_stay():
    rng = random.Random(0)
    for _ in range(300):
        n = rng.randint(1, 12)
        done, padded = ([rng.random() < share for _ in range(n)] for share in (rng.random(), rng.random()))
        stay = _staying(done, padded)
        assert len(set(stay)) == len(stay) and {row for row in range(n) if not done[row]} <= set(stay)
        assert all(row in (place, *range(len(stay), n)) for place, row in enumerate(stay)), "only the last ones move"
        assert any(padded[row] for row in stay) == any(padded), "a mask stays a mask"
        live = done.count(False)
        assert max(live, min(4, n)) <= len(stay) <= max(live + 1, min(4, n))


def test_a_cache_with_room_holds_what_transformers_own_cache_holds():
    def states(rows, tokens):
        return torch.randn(rows, 2, tokens, 3), torch.randn(rows, 2, tokens, 3)

    torch.manual_seed(0)
    plain = DynamicCache()
    plain.update(*states(3, 5), 0)
    roomy = _with_room(copy.deepcopy(plain))
    changes = [
        lambda cache: cache.batch_select_indices(torch.tensor([0, 0, 1, 1, 1, 2, 2])),
        lambda cache: cache.batch_select_indices(torch.tensor([0, 6, 2, 5])),  # three of seven leave
        lambda cache: cache.reorder_cache(torch.tensor([3, 0, 1, 0])),
        lambda cache: cache.crop(-2),
        lambda cache: cache.batch_select_indices(torch.tensor([2, 1])),
    ]
    for change in changes:
        for cache in (plain, roomy):
            change(cache)
        for tokens in (4, 1, 70, 1):  # 70 do not fit into the room that is left
            new = states(len(plain.layers[0].keys), tokens)
            for a, b in zip(plain.update(*new, 0), roomy.update(*new, 0), strict=True):
                assert torch.equal(a, b)
        assert roomy.get_seq_length() == plain.get_seq_length()
    before = roomy.layers[0].keys.data_ptr()
    roomy.update(*states(2, 1), 0)
    assert roomy.layers[0].keys.data_ptr() == before, "earlier tokens are not copied"


def test_a_shard_keeps_where_the_world_put_the_evidence(engine):
    table, _ = make_shard(SMALL, 1, engine)
    drawn = selfgen.world_documents(random.Random(f"self-generated/{SMALL.seed}/1"), SMALL, SMALL.shard_size)
    truth = {(text, q.text): [[*span] for span in q.evidence] for text, asked in drawn for q in asked}
    kept = [
        (row["document"], question, spans)
        for row in table.to_pylist()
        for question, spans in zip(row["questions"], row["evidence"], strict=True)
    ]
    assert kept and any(spans for *_, spans in kept)
    assert all(truth[text, question] == spans for text, question, spans in kept)


def test_a_shard_is_a_function_of_seed_and_index(engine):
    table, counts = make_shard(SMALL, 1, engine)
    assert make_shard(SMALL, 1, engine)[0].equals(table)
    assert make_shard(SMALL, 2, engine)[0]["document"] != table["document"]
    assert make_shard(replace(SMALL, seed=4), 1, engine)[0]["document"] != table["document"]
    assert counts["documents"] + counts["documents_dropped"] == 2
    assert sum(make_shard(SMALL, 5, engine)[1][name] for name in ("documents", "documents_dropped")) == 1, "the rest"


def test_unfinished_answers_are_dropped_and_counted(engine):
    settings = replace(SMALL, documents=6, shard_size=6)
    full, all_counts = make_shard(settings, 0, engine)
    short, counts = make_shard(replace(settings, max_new_tokens=3), 0, engine)
    assert counts["questions"] == all_counts["questions"] == counts["kept"] + counts["unfinished"]
    assert counts["unfinished"] > all_counts["unfinished"] and counts["kept"] > 0

    def answers(table):
        return {
            prompt_of(row, q): answer_ids(row, q) for row in table.to_pylist() for q in range(len(row["questions"]))
        }

    assert answers(short) == {prompt: ids for prompt, ids in answers(full).items() if len(ids) <= 3}
    assert len(answers(short)) == counts["kept"] and sum(map(len, answers(short).values())) == counts["answer_tokens"]
    none, counts = make_shard(replace(settings, max_new_tokens=1, temperature=0.0), 0, Never(engine))
    assert none.num_rows == counts["kept"] == 0 and counts["documents_dropped"] == 6
    assert none.schema.equals(SCHEMA)


class Never(TransformersEngine):
    """Never stops."""

    def __init__(self, engine):
        super().__init__("never", engine.model, engine.tokenizer)
        self.stops = [-1]


def test_prompts_that_fill_the_window_are_counted_and_answers_end_inside_it():
    engine = build_engine(window=160)
    prompts = [[5] * n for n in (159, 160, 161, 150)]
    replies = Never(engine).reply(prompts, 24, 0.0, 0)
    assert [None if r is None else len(r.ids) for r in replies] == [1, None, None, 10]
    _, counts = make_shard(replace(SMALL, documents=6, shard_size=6), 0, engine)
    assert counts["too_long"] > 0 and counts["questions"] == sum(counts[n] for n in ("kept", "unfinished", "too_long"))


def test_a_model_that_gives_nan_is_refused(engine):
    broken = build_engine()
    with torch.no_grad():
        broken.model.get_output_embeddings().weight[7] = float("nan")
    with pytest.raises(FloatingPointError, match="not numbers"):
        broken.reply([[5, 6]], 4, 0.0, 0)


# --- questions --------------------------------------------------------------------------------------------------------


class Recorder(TransformersEngine):
    """An engine that remembers its prompts as texts."""

    def __init__(self, engine):
        super().__init__("recorder", engine.model, engine.tokenizer)
        self.prompts = []

    def reply(self, prompts, *options):
        self.prompts += [self.tokenizer.decode(ids) for ids in prompts]
        return super().reply(prompts, *options)


def test_closed_wording_is_in_the_prompt_and_every_question_beside_its_own_document(engine):
    recorder = Recorder(engine)
    settings = replace(SMALL, documents=8, shard_size=8, closed_share=0.5)
    table, counts = make_shard(settings, 0, recorder)
    assert len(recorder.prompts) == counts["questions"]
    closed = [any(wording in prompt for wording in selfgen.CLOSED_WORDINGS) for prompt in recorder.prompts]
    assert 0.2 < np.mean(closed) < 0.8
    for row in table.to_pylist():
        for q, question in enumerate(row["questions"]):
            assert any(f"{prompt_of(row, q)}<" in prompt for prompt in recorder.prompts), "asked as stored"
            worded = any(question.endswith(wording) for wording in selfgen.CLOSED_WORDINGS)
            assert worded == row["closed"][q]
            assert question in engine.tokenizer.decode(row["input_ids"][q]), "the student reads the wording too"
    everything = Recorder(engine)
    make_shard(replace(settings, closed_share=1.0), 0, everything)
    assert all(any(w in prompt for w in selfgen.CLOSED_WORDINGS) for prompt in everything.prompts)


def test_shares_of_unrelated_and_unanswerable_questions():
    settings = Settings(questions=8, unrelated_share=0.25, unanswerable_share=0.25)
    drawn = selfgen.world_documents(random.Random(0), settings, 60)
    kinds = Counter(q.kind for _, asked in drawn for q in asked)
    assert abs(kinds["encyclopedia"] / kinds.total() - 0.25) < 0.07
    assert abs(kinds["unanswerable"] / kinds.total() - 0.25) < 0.07
    assert len(kinds) == 10
    for text, asked in drawn:
        assert len({q.text for q in asked}) == len(asked) <= 8
        assert all(q.with_document == (q.kind != "encyclopedia") for q in asked)
        assert all(q.reference in text for q in asked if q.kind in ("one_hop", "number", "date", "paraphrase"))
    only = selfgen.world_documents(random.Random(0), Settings(unrelated_share=0, unanswerable_share=0), 10)
    assert not {"encyclopedia", "unanswerable"} & {q.kind for _, asked in only for q in asked}


def test_guided_prompt_frames_document_and_question(engine):
    recorder = Recorder(engine)
    make_shard(replace(SMALL, prompt="guided", unrelated_share=0.0), 0, recorder)
    opening = selfgen.PROMPTS["guided"].partition("{")[0]
    assert all(opening in prompt for prompt in recorder.prompts)


class Author:
    """A writer whose lists are made up here; it remembers its prompts."""

    def __init__(self, tokenizer, lists):
        self.tokenizer, self.lists, self.prompts = tokenizer, iter(lists), []

    def facts(self):
        return {"name": "author"}

    def reply(self, prompts, max_new_tokens, temperature, seed):
        self.prompts.append([self.tokenizer.decode(ids) for ids in prompts])
        written = [next(self.lists) for _ in prompts]
        return [
            None if text is None else Reply(self.tokenizer(text)["input_ids"], True, None, None) for text in written
        ]


TEXTS = ["Ada {keeps} 3 cats.", "Bo sold his boat in 1990."]
LISTS = ["1. Who keeps cats?\n2. How many?", "Sure:\n- What did Bo sell?", "1) who keeps CATS?\n2) Why cats?", None]


def test_questions_on_texts_are_written_in_two_rounds(engine):
    author, recorder = Author(engine.tokenizer, LISTS), Recorder(engine)
    settings = Settings(documents=2, max_new_tokens=24, unrelated_share=0, unanswerable_share=0)
    table, counts = make_shard(settings, 0, recorder, TEXTS, author)
    first, second = author.prompts
    assert all(text in prompt for text, prompt in zip(TEXTS, first, strict=True))
    assert "- Who keeps cats?\n- How many?" in second[0] and "- What did Bo sell?" in second[1]
    asked = [f"{TEXTS[0]}\n\n{q}" for q in ("Who keeps cats?", "How many?", "Why cats?")] + [
        f"{TEXTS[1]}\n\nWhat did Bo sell?"
    ]
    assert all(f"{question}<" in prompt for question, prompt in zip(asked, recorder.prompts, strict=True))
    assert (counts["writer_duplicate"], counts["writer_not_a_question"], counts["writer_too_long"]) == (1, 1, 1)
    assert counts["questions"] == 4
    assert set(table["kinds"].combine_chunks().flatten().to_pylist()) <= {"level_0", "level_1"}


def test_unrelated_and_unanswerable_questions_on_texts_come_from_other_texts(engine):
    for shares, kind in (((1, 0), "unrelated"), ((0, 1), "unanswerable")):
        settings = Settings(documents=2, unrelated_share=shares[0], unanswerable_share=shares[1])
        drawn = selfgen.written_documents(random.Random(0), settings, TEXTS, Author(engine.tokenizer, LISTS), Counter())
        assert [text for text, _ in drawn] == TEXTS
        (_, ada), (_, bo) = drawn
        assert {q.kind for q in ada + bo} == {kind}
        assert {q.text for q in ada} == {"What did Bo sell?"} and {q.text for q in bo} <= {
            "Who keeps cats?", "How many?", "Why cats?",
        }  # fmt: skip
        assert all(q.with_document == (kind == "unanswerable") for q in ada + bo)


TWO = ["Who is it?", "Where does the club meet?"]


@pytest.mark.parametrize(
    ("text", "expected", "dropped"),
    [
        ("1. Who is it?\n2. Where does the club meet?", TWO, {}),
        ("1) Who is it?\n\n\n2) Where does the club meet?\n", TWO, {}),
        ("(1) Who is it?\n[2] Where does the club meet?", TWO, {}),
        ("- Who is it?\n* Where does the club meet?", TWO, {}),
        ("• Who is it?\n– Where does the club meet?", TWO, {}),
        ("1、Who is it?\n2.Where does the club meet?", TWO, {}),
        ("1 - Who is it?\n2 - Where does the club meet?", TWO, {}),
        ("**1.** Who is it?\n**2.** Where does the club meet?", TWO, {}),
        ("1. **Who is it?**\n2. *Where does the club meet?*", TWO, {}),
        ("Q1: Who is it?\nQ2: Where does the club meet?", TWO, {}),
        ("**Question 1:** Who is it?\n**Question 2:** Where does the club meet?", TWO, {}),
        ("### Question 1:\nWho is it?\n\n### Question 2:\nWhere does the club meet?", TWO, {}),
        ("- 1. Who is it?\n- 2. Where does the club meet?", TWO, {}),
        ("a) Who is it?\nb) Where does the club meet?", TWO, {}),
        ('1. "Who is it?"\n2. “Where does the club meet?”', TWO, {}),
        ('["Who is it?", "Where does the club meet?"]', TWO, {}),
        ("[" * 100_000, [], {"not_a_question": 1}),
        ('{"questions": ' * 50_000, [], {"not_a_question": 1}),
        ('```json\n["Who is it?",\n "Where does the club meet?"]\n```', TWO, {}),
        ('[{"question": "Who is it?", "answer": "Bo"}, {"question": "Where does the club meet?"}]', TWO, {}),
        ('{"questions": ["Who is it?", "Where does the club meet?", 3]}', TWO, {"not_a_question": 1}),
        ('[\n"Who is it?",\n"Where does the club meet?",\n]', TWO, {"not_a_question": 2}),
        ("1. Who is it? 2. Where does the club meet?", TWO, {}),
        ("1. Who\n   is it?\n2. Where does the club\nmeet?", TWO, {}),
        ("Who is it?\nWhere does the club meet?", TWO, {}),
        ("Here are 2 questions:\n\n1. Who is it?\n2. Where does the club meet?", TWO, {"not_a_question": 1}),
        ("1. Who is it?\n2. Where does the club meet?\n\nWould you like more?", TWO, {"not_a_question": 1}),
        ("1. Who is it?\nAnswer: Bo.\n2. Where does the club meet?\nA: in 3.", TWO, {"not_a_question": 2}),
        ("1. Who is it? (Answer: Bo)\n2. Where does the club meet? Answer: here", TWO, {}),
        ("1. Who is it?\n2. Paris\n3. WHO is it??\n4. " + TWO[1], TWO, {"not_a_question": 1, "duplicate": 1}),
        ("<think>\n1. Is this one?\n</think>\n1. Who is it?\n2. Where does the club meet?", TWO, {"thinking": 1}),
        ("Is this one?\n</think>\nWho is it?\nWhere does the club meet?", TWO, {"thinking": 1}),
        ("<think>\n1. Who is it?\n2. Where does", [], {"thinking": 1}),
        ("1. Who is it?\r\n2. Where does the club meet?\r\n", TWO, {}),
        ("I cannot help with that.", [], {"not_a_question": 1}),
        ("", [], {}),
        ("\n \n", [], {}),
        ("1.\n2.\n- \n**", [], {}),
        ("1. ?\n2. ...?", [], {"not_a_question": 2}),
        ("1. Explain how Bo lost it.\n2. Paris is nice.", ["Explain how Bo lost it."], {"not_a_question": 1}),
        ("1. 3.5 million people did what?", ["3.5 million people did what?"], {}),
        ("3.5 million people did what?", ["3.5 million people did what?"], {}),
        ("A. Smith founded what?", ["A. Smith founded what?"], {}),
        ("1. 1984 was the year of what?", ["1984 was the year of what?"], {}),
        ("1. What does the label “Answer” say?", ["What does the label “Answer” say?"], {}),
        ("1. Who wrote the Question of Answers?", ["Who wrote the Question of Answers?"], {}),
        ("1. 谁创立了公司？\n2. 公司在哪里？", ["谁创立了公司？", "公司在哪里？"], {}),
    ],
)  # fmt: skip
def test_lists_of_questions_of_any_style(text, expected, dropped):
    assert parse_questions(text) == (expected, dropped)


def test_lists_of_questions_with_limits():
    text = "1. Who is it?\n2. Where does the club meet?\n3. Why do they"
    assert parse_questions(text, limit=1, complete=False) == (TWO[:1], {"cut_off": 1, "surplus": 1})
    assert parse_questions(text, earlier=["who is it"], complete=False) == (TWO[1:], {"cut_off": 1, "duplicate": 1})
    rng = random.Random(0)
    for _ in range(300):  # no text breaks it
        noise = "".join(rng.choices("1.?)(-*\n \t\"'`[]{}<think></think>#QA:ab、？", k=rng.randint(0, 60)))
        found, _ = parse_questions(noise, limit=3)
        assert len(found) <= 3 and all(isinstance(q, str) and q for q in found)


# --- files ------------------------------------------------------------------------------------------------------------


def run_and_kill(folder: Path, seed: int) -> list[int]:
    """In a process of its own: start the run of SMALL again and again, by turns with one, two and four workers, each
    time killed at a random point, until it is through; the workers of each start that was killed.
    """
    rng, killed, engine = random.Random(seed), [], build_engine()
    engine.reply([[5]], 1, 0.0, 0)  # what is imported late is imported before the first fork
    while True:
        before = len(list(folder.iterdir())) if folder.exists() else 0
        workers = (1, 2, 4)[len(killed) % 3]
        children = {os.fork() or _work(folder, engine, worker, workers) for worker in range(workers)}
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and children:
            children -= {child for child in children if os.waitpid(child, os.WNOHANG)[0]}
            if children and folder.exists() and len(list(folder.iterdir())) > before:
                time.sleep(rng.uniform(0, 0.06))
                for child in children:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                killed.append(workers)
                break
            time.sleep(0.0005)
        else:
            return killed


def _work(folder: Path, engine: TransformersEngine, worker: int, workers: int) -> NoReturn:
    generate(SMALL, folder, engine, worker=worker, workers=workers)
    os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.slow
def test_a_run_that_is_killed_with_one_two_and_four_workers_ends_with_the_same_bytes(whole, tmp_path):
    assert set(processes.run(run_and_kill, tmp_path / "killed", 0)) == {1, 2, 4}
    assert contents(tmp_path / "killed") == contents(whole)


def test_two_workers_make_the_same_files_in_any_order(engine, whole, tmp_path):
    assert generate(SMALL, tmp_path, engine, worker=1, workers=2) is None, "worker 0 has not begun"
    assert sorted(path.name for path in tmp_path.glob("*.parquet")) == [f"shard-0000{i}.parquet" for i in (1, 3, 5)]
    with pytest.raises(ValueError, match=r"is unfinished: 3 of 6 shards"):
        read_shards(tmp_path)
    manifest = generate(SMALL, tmp_path, engine, worker=0, workers=2)
    assert manifest["complete"] and contents(tmp_path) == contents(whole)
    for index in (0, 1):  # whoever comes last
        (tmp_path / "manifest.json").write_text("{")
        generate(SMALL, tmp_path, engine, worker=index, workers=2)
        assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("damage", ["flip", "flip_no_record", "cut", "empty", "bad_record", "gone"])
def test_a_damaged_shard_is_named_refused_and_made_again(engine, whole, tmp_path, capsys, damage):
    for name, content in contents(whole).items():
        (tmp_path / name).write_bytes(content)
    path = tmp_path / "shard-00002.parquet"
    content = path.read_bytes()
    if damage.startswith("flip"):
        path.write_bytes(content[:700] + bytes([content[700] ^ 1]) + content[701:])
        if damage == "flip_no_record":
            path.with_suffix(".json").unlink()
    elif damage in ("cut", "empty"):
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    elif damage == "gone":
        path.unlink()
    else:
        path.with_suffix(".json").write_text("{}")
        path.write_bytes(content[:-9])
    with pytest.raises((ValueError, FileNotFoundError), match="shard-00002.parquet"):
        read_shards(tmp_path)
    generate(SMALL, tmp_path, engine)
    said = capsys.readouterr().out
    assert "shard-00002.parquet: " in said and "made again" in said and "shard 1 of 1" in said
    assert contents(tmp_path) == contents(whole)


def test_a_run_that_fails_between_shard_and_checksum_leaves_nothing_that_is_trusted(
    engine, whole, tmp_path, monkeypatch
):
    original, calls = selfgen.write_json, []

    def failing(path, value):
        calls.append(path)
        if len(calls) == 4:
            raise OSError("no space left on device")
        return original(path, value)

    for module in (selfgen, shard_files):
        monkeypatch.setattr(module, "write_json", failing)
    with pytest.raises(OSError, match="no space"):
        generate(SMALL, tmp_path, engine)
    monkeypatch.undo()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    name = writing._temporary_name(tmp_path / "shard-00004.parquet").name
    of_killed = tmp_path / name.replace(f".{os.getpid()}.", f".{ended.pid}.")
    of_killed.write_bytes(b"left by a killed run")
    (tmp_path / name).write_bytes(b"of a process that still writes")
    generate(SMALL, tmp_path, engine)
    assert [path.name for path in tmp_path.glob(".*")] == [name], "only what no living process writes is taken away"
    (tmp_path / name).unlink()
    assert contents(tmp_path) == contents(whole)


def test_a_folder_of_another_run_is_left_alone(engine, whole, tmp_path):
    before = contents(whole)
    with pytest.raises(ValueError, match=r"settings\.seed is 3 there, 4 here.*another folder"):
        generate(replace(SMALL, seed=4), whole, engine)
    other = build_engine()
    with torch.no_grad():
        next(other.model.parameters())[0, 0] += 1
    with pytest.raises(ValueError, match=r"teacher\.weights_sha256"):
        generate(SMALL, whole, other)
    assert contents(whole) == before
    (tmp_path / "mine.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match="no manifest.json"):
        generate(SMALL, tmp_path, engine)
    with pytest.raises(ValueError, match="is a file"):
        generate(SMALL, tmp_path / "mine.parquet", engine)
    with pytest.raises(ValueError, match="numbered from 0"):
        generate(SMALL, tmp_path, engine, worker=2, workers=2)


def test_numbers_of_any_type_are_the_same_settings():
    given = Settings(documents=np.int64(3), temperature=0, closed_share=1)
    assert json.dumps(asdict(given)) == json.dumps(asdict(Settings(documents=3, temperature=0.0, closed_share=1.0)))


def test_manifest_says_what_the_data_are(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["settings"]["seed"] == 3 and manifest["n_shards"] == len(manifest["shards"]) == 6
    assert manifest["teacher"]["name"] == "random" and len(manifest["teacher"]["weights_sha256"]) == 64
    assert manifest["prompts"]["answer"] == "{document}\n\n{question}"
    totals = manifest["totals"]
    assert totals["documents"] + totals["documents_dropped"] == 11
    assert totals["questions"] == totals["kept"] + totals["unfinished"] + totals["too_long"]
    assert totals["kept"] == sum(map(len, read_shards(whole)["input_ids"]))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_our_shards_and_published_ones_load(whole, tmp_path):
    from datasets import Dataset, Features, List, Value, load_dataset

    ours = read_shards(whole)
    assert set(ours.column_names) == set(SCHEMA.names) and len(ours) > 6
    published = {
        "ctx_ids": List(Value("int32")),
        "input_ids": List(List(Value("int32"))),
        "response_start_end": List(List(Value("int32"), length=2)),
        "logprobs_vals": List(List(List(Value("float16")))),
        "logprobs_indices": List(List(List(Value("int32")))),
    }
    path = tmp_path / "published.parquet"
    Dataset.from_dict({name: ours[name][:] for name in published}, features=Features(published)).to_parquet(path)
    theirs = read_shards(path)
    assert theirs.column_names == list(published)
    assert theirs[:] == {name: ours[name][:] for name in published}
    both = read_shards([whole, path])
    assert len(both) == 2 * len(ours) and both.column_names == list(published)
    assert read_shards(tmp_path)[:] == theirs[:], "a folder without a manifest"
    # and ours, as somebody reads it who knows the published columns only
    files = sorted(map(str, whole.glob("*.parquet")))
    plain = load_dataset(
        "parquet", data_files=files, split="train", columns=list(published), cache_dir=str(tmp_path / "c")
    )
    assert plain[:] == theirs[:] and plain.features["logprobs_vals"] == theirs.features["logprobs_vals"]


def table_with(whole: Path, **changed) -> pa.Table:
    """The first shard's rows with changed columns: None drops one; a function gets the column's values."""
    rows = pq.read_table(whole / "shard-00000.parquet").select(list(PUBLISHED)).to_pydict()
    for name, change in changed.items():
        values = rows.pop(name)
        if change is not None:
            change(values)
            rows[name] = values
    return pa.table(rows)


def pop_first(values):
    values[0].pop()


def pop_token(values):
    values[0][0].pop()


def pop_k(values):
    values[0][0][0].pop()


def put(*path, value):
    def change(values):
        *inner, last = path
        for index in inner:
            values = values[index]
        values[last] = value

    return change


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        *((name, None, f"no column {name}") for name in PUBLISHED),
        ("response_start_end", pop_first, "row 0: not as many questions"),
        ("logprobs_vals", pop_first, "row 0: not as many questions"),
        ("logprobs_indices", pop_first, "row 0: not as many questions"),
        ("logprobs_vals", pop_token, "row 0: not one list for each answer token"),
        ("logprobs_indices", pop_token, "row 0: not one list for each answer token"),
        ("logprobs_vals", pop_k, "lists of different lengths"),
        ("logprobs_indices", pop_k, "lists of different lengths"),
        ("response_start_end", pop_token, "needs .start, end."),
        ("response_start_end", put(0, 0, 1, value=9999), "outside input_ids"),
        ("response_start_end", put(0, 0, 0, value=-1), "outside input_ids"),
        ("ctx_ids", put(0, value=[]), "no tokens"),
        ("ctx_ids", put(0, value=None), "empty .null. values"),
        ("input_ids", put(0, 0, value=None), "empty .null. values"),
        ("logprobs_vals", put(0, 0, 0, 3, value=float("nan")), "not a number"),
    ],
)
def test_missing_and_ragged_columns_are_named(whole, tmp_path, column, change, message):
    path = tmp_path / "broken.parquet"
    pq.write_table(table_with(whole, **{column: change}), path)
    with pytest.raises(ValueError, match=rf"broken\.parquet.*{column}.*{message}|broken\.parquet.*{message}"):
        read_shards(path)


def test_other_files_are_refused(whole, tmp_path):
    path = tmp_path / "broken.parquet"
    with pytest.raises(FileNotFoundError, match="no shards at"):
        read_shards(path)
    with pytest.raises(FileNotFoundError, match="holds no .parquet"):
        read_shards(tmp_path)
    path.write_bytes((whole / "shard-00000.parquet").read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"broken\.parquet is not a readable parquet file"):
        read_shards(path)
    pq.write_table(pa.table({name: [["text"]] for name in PUBLISHED}), path)
    with pytest.raises(ValueError, match=r"column ctx_ids holds list<.*string>, not"):
        read_shards(path)
    with pytest.raises(FileNotFoundError, match="no shards given"):
        read_shards([])


def test_rows_feed_the_distillation_loss(engine, whole):
    data = read_shards(whole)[:]
    affixes = chat_affixes(engine.tokenizer)
    chunks = [chunk for ids in data["ctx_ids"] for chunk in batches.split_into_chunks(ids, 2, *affixes)]
    assert all(chunk[: len(affixes[0])] == affixes[0] for chunk in chunks)
    questions = sum(data["input_ids"], [])
    spans = sum(data["response_start_end"], [])
    answered = [[-100] * start + ids[start:end] for ids, (start, end) in zip(questions, spans, strict=True)]
    input_ids, mask = pad_rows(questions, 0)
    answers = losses.find_answer_tokens(pad_rows(answered, -100, width=input_ids.shape[1])[0])
    with torch.no_grad():
        logits = engine.model(input_ids, attention_mask=mask, use_cache=False).logits
    values, indices = (sum(sum(data[name], []), []) for name in TEACHER_COLUMNS)
    teacher = torch.tensor(values), torch.tensor(indices)
    loss = losses.distillation(logits, answers, *teacher)
    assert len(loss) == len(teacher[0]) == len(answers) and loss.isfinite().all() and (loss > 0).all()
    n_questions = torch.tensor([len(ids) for ids in data["input_ids"]])
    assert losses.context_average(loss, answers, n_questions).isfinite()
    # A student that is the teacher: the loss is the entropy of the stored part.
    perfect, places = torch.full_like(logits, -1e4), (answers.row, answers.position)
    perfect[places] = perfect[places].scatter(-1, teacher[1], teacher[0])
    log_q = teacher[0].log_softmax(-1)
    torch.testing.assert_close(
        losses.distillation(perfect, answers, *teacher), -(teacher[0].exp() * log_q).sum(-1), rtol=1e-4, atol=1e-4
    )
    assert (losses.distillation(perfect, answers, *teacher) <= loss + 1e-4).all(), "no other student does better"


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    engine.model.save_pretrained(folder)
    engine.tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_command_shares_the_work_under_torchrun(saved, whole, tmp_path, monkeypatch, capsys):
    flags = "--documents 11 --shard-size 2 --questions 3 --shortest 1 --longest 3 --max-new-tokens 24".split()
    flags += ["--unrelated-share", "0.2", "--seed", "3", "--model", saved, "--out", str(tmp_path)]
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        main(["generate", *flags])
        assert len(list(tmp_path.glob("*.parquet"))) == (3 if rank == "1" else 6)
    said = capsys.readouterr().out
    assert "worker 1: shard 3 of 3" in said and "answer tokens/s" in said and "6 shards are complete" in said
    assert all((tmp_path / path.name).read_bytes() == path.read_bytes() for path in whole.glob("*.parquet"))


def test_the_command_on_texts(saved, tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, text in zip(("b", "a"), TEXTS, strict=True):
        (texts / f"{name}.txt").write_text(text)
    assert selfgen.read_texts(texts) == TEXTS[::-1]
    (texts / "c.md").write_text(TEXTS[0])
    (texts / "d.html").write_text("<p>not read")
    assert selfgen.read_texts(texts) == [*TEXTS[::-1], TEXTS[0]]
    (texts / "c.md").unlink()
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert selfgen.read_texts(tmp_path / "texts.jsonl") == TEXTS
    flags = ["--model", saved, "--source", str(texts), "--writer-max-new-tokens", "8", "--out", str(tmp_path / "out")]
    main(["generate", *flags])  # a random model writes no questions
    assert "shards are complete" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["documents"] == manifest["totals"]["documents_dropped"] == 2
    assert manifest["writer"] == manifest["teacher"] and len(read_shards(tmp_path / "out")) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source", "nowhere"], "no source 'nowhere'"),
        (["--documents", "0"], "documents must be a whole number of at least 1"),
        (["--closed-share", "1.5"], "shares must lie in 0..1"),
        (["--unrelated-share", "0.6", "--unanswerable-share", "0.6"], "shares must lie in 0..1"),
        (["--temperature", "-1"], "temperature must be 0"),
        (["--split", "holiday"], "split 'holiday' is unknown"),
        (["--prompt", "x"], "prompt 'x' is unknown"),
        (["--source", "data/demo", "--writer-style", "x"], "writer_style 'x' is unknown; choose from lists, openings"),
        (["--shortest", "9", "--longest", "3"], "longest is 3 facts"),
        (["--model", "nobody"], "no bundled base model 'nobody'"),
        (["--engine", "vllm"], "pip install vllm"),
    ],
)
def test_bad_settings_say_what_is_wrong(tmp_path, flags, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SystemExit, match=message):
        main(["generate", "--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_flags_that_do_nothing_are_refused(tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_text('{"text": "Ada."}\n')
    for flags in (
        ["--writer", "tiny"],
        ["--writer-style", "openings"],
        ["--source", str(tmp_path / "texts.jsonl"), "--split", "test"],
    ):
        with pytest.raises(SystemExit):
            main(["generate", "--out", str(tmp_path / "out"), *flags])
        assert f"{flags[-2]} has no meaning with --source" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "Ada."}\n{"text": " "}\n', "line 2 holds no text"),
        (
            '{"text": "Ada."}\n{"words": "x"}\n',
            'line 2: text: a value is expected, and it is missing: every line needs a "text"',
        ),
        ('{"text": "Ada."}\n{"text": 3}\n', 'line 2: text: a text is expected, not 3: every line needs a "text"'),
        ('{"text": "Ada."}\n["text"]\n', "line 2: an object of named values is expected"),
        ('{"text": "Ada."}\n' + "[" * 100_000, "line 2 is not JSON .it is nested too deeply"),
        ('{"text": "Ada."}\n{"text": "\\ud800"}\n', "line 2: text: a text of valid Unicode"),
        ('{"text": "Ada."}\n{"text": "x", "n": NaN}\n', "line 2 is not JSON .a number must be a finite number"),
        ('{"text": "Ada."}\n{"te', "line 2 is not JSON"),
        ("", "holds no documents"),
    ],
)
def test_bad_texts_are_named(tmp_path, content, message):
    (tmp_path / "texts.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        selfgen.read_texts(tmp_path / "texts.jsonl")


def test_bad_folders_of_texts(tmp_path, engine):
    with pytest.raises(ValueError, match="holds no documents"):
        selfgen.read_texts(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="not UTF-8"):
        selfgen.read_texts(tmp_path)
    with pytest.raises(ValueError, match="the source has 2 documents, 3 are asked for"):
        generate(Settings(documents=3), tmp_path / "out", engine, TEXTS)


def test_vllm_gives_what_transformers_gives(saved, engine, monkeypatch):
    """A stand-in for vLLM that answers as its documentation says, from the transformers engine."""

    class LLM:
        def __init__(self, model, **options):
            assert model == saved and options["max_logprobs"] == 16 and options["max_model_len"] == 2048

        def generate(self, prompts, sampling):
            outputs = []
            for prompt, s in zip(prompts, sampling, strict=True):
                assert s.stop_token_ids == engine.stops and s.logprobs == 16
                reply = engine.reply([prompt["prompt_token_ids"]], s.max_tokens, s.temperature, s.seed)[0]
                steps = [
                    {int(i): types.SimpleNamespace(logprob=float(v)) for i, v in zip(*step, strict=True)} | extra
                    for step in zip(reply.indices, reply.values, strict=True)
                    for extra in [{10**6: types.SimpleNamespace(logprob=-99.0)}]  # a sampled token beyond the first 16
                ]
                written = types.SimpleNamespace(token_ids=tuple(reply.ids), logprobs=steps)
                outputs.append(types.SimpleNamespace(outputs=[written]))
            return outputs

    stub = types.SimpleNamespace(LLM=LLM, SamplingParams=types.SimpleNamespace, __version__="0")
    monkeypatch.setitem(sys.modules, "vllm", stub)
    vllm = selfgen.VllmEngine(saved)
    settings = replace(SMALL, batch_tokens=1)
    table, counts = make_shard(settings, 0, vllm)
    expected, expected_counts = make_shard(settings, 0, build_engine(batch_tokens=1))
    assert counts == expected_counts and table.drop(["logprobs_indices"]).equals(expected.drop(["logprobs_indices"]))
    assert vllm.reply([[5] * 2048], 4, 0.0, 0) == [None]
    assert vllm.facts()["tokenizer_sha256"] == engine.facts()["tokenizer_sha256"]
