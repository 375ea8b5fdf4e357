"""Sparse reading: the definition, the algebra of adapters, step by step as in one pass, beams, and what is refused."""

import math
import random
from dataclasses import replace

import pytest
import torch
from tiny_models import build_model

import d2l_lib as d2l
from d2l_lib.adapter import Block
from d2l_lib.analysis.trials import block_texts
from d2l_lib.base_model import target_linears
from d2l_lib.documents import question_ids
from d2l_lib.engine import pad_rows
from d2l_lib.hypernetwork import Hypernetwork
from d2l_lib.reading import Reading, answer_reads, choices_table, read_sparsely
from d2l_lib.tasks import needles, world
from d2l_lib.tasks.questions import disjoint_documents

TEXTS = {"a": "Ada paints lamps. Bo sells maps.", "b": "Cy keeps bees in Dun.", "c": "Eve rows boats. Fay bakes."}
FLOOR = 0.3  # of the null block
QUESTIONS = ["Who paints?", "What does Cy keep, and where?", "Who?"]


@pytest.fixture(scope="module")
def model():
    """Random weights; adapters that are strong enough to change answers."""
    return build_model(modules=("down_proj",))


@pytest.fixture(scope="module")
def adapter(model):
    return model.internalize(TEXTS, chunk_tokens=20)


def ids_of(model, questions=QUESTIONS):
    """Prompts of different lengths, padded on the left."""
    return pad_rows(question_ids(model.tokenizer, list(questions)), 0, side="left")


def logits_of(model, adapter, ids, mask=None, **how):
    with torch.no_grad(), model.applied(adapter, **how):
        return model.base_model(ids, attention_mask=mask, use_cache=False).logits


def defined(model, adapter, reading, ids, start):
    """Logits [tokens, vocabulary] of one row, written from the definition: block by block, token by token."""
    (linears,) = target_linears(model.base_model, adapter.modules).values()
    layers, so_far, handles, gate = reading.layers_of(len(linears)), {}, [], {}
    null, nulls = model.hypernetwork.null(), {}

    def hook(layer):
        def add(linear, inputs, output):
            x, added = inputs[0][0], torch.zeros_like(output[0])
            A, B = (factors[layer] for factors in adapter.bias["down_proj"])
            evidence = [0.0] * len(adapter.blocks)
            for t, token in enumerate(x):
                added[t] = adapter.bias_weight * B.T @ (A @ token)
                if layer not in layers or (t < start and not reading.prompt):
                    continue
                if null is not None:
                    keys, floor = (one[layer] for one in null["down_proj"])
                    own = math.hypot(float(floor * token.norm()), float((keys @ token).norm()))
                    nulls[t] = nulls.get(t, 0.0) + own
                for k, block in enumerate(adapter.blocks):
                    score = float((block.A["down_proj"][layer] @ token).norm())
                    evidence[k] = score if t <= start else reading.decay * evidence[k] + score
                    so_far[k, t] = so_far.get((k, t), 0.0) + evidence[k]
                ranked = [so_far[k, t] if one.weight else -math.inf for k, one in enumerate(adapter.blocks)]
                best = ranked.index(max(ranked))
                if t == start and reading.thresholds:
                    place = layers.index(layer)
                    for k, block in enumerate(adapter.blocks):
                        ratio = (block.A["down_proj"][layer] @ token).norm() / token.norm()
                        gate[k] = gate.get(k, 0.0) + reading.gate_weights[place] * float(ratio.log())
                    gate["open", layer] = gate[best] > reading.thresholds[place]
                beats_null = math.log(max(ranked) / nulls[t]) if null is not None else math.inf
                if t == start and null is not None:
                    gate["open", layer] = beats_null > reading.null_threshold
                if beats_null > 0 if t < start else gate.get(("open", layer), True):
                    block = adapter.blocks[best]
                    product = block.B["down_proj"][layer].T @ (block.A["down_proj"][layer] @ token)
                    added[t] += block.weight * product
            return output + adapter.scale * added

        return add

    try:
        handles += [linear.register_forward_hook(hook(layer)) for layer, linear in enumerate(linears)]
        with torch.no_grad():
            return model.base_model(ids[None], use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


READINGS = {
    "default": Reading(),
    "some layers": Reading(layers=(0, 2), decay=0.9),
    "memoryless": Reading(layers=(3,), decay=0.0),
    "open gate": Reading(layers=(1, 2, 3), thresholds=(-50.0, -50.0, -50.0), gate_weights=(1.0, 1.0, 2.0)),
    "gate shut above": Reading(layers=(1, 2, 3), thresholds=(-50.0, 50.0, 50.0)),
}


@pytest.mark.parametrize("name", READINGS)
def test_it_is_what_the_definition_says(model, adapter, name):
    weighed = adapter.scaled(0.5, "a").scaled(-1.5, "b")
    ids, start = torch.tensor(question_ids(model.tokenizer, [QUESTIONS[1]])[0]), 12
    expected = defined(model, weighed, READINGS[name], ids, start)
    got = logits_of(model, weighed, ids[None], read=READINGS[name], starts=torch.tensor([start]))[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    if name == "default":
        assert (got - logits_of(model, weighed, ids[None])[0]).abs().max() > 0.01  # the sum says something else


def with_null(model, adapter, floor):
    """The model with a null block of this floor, and the adapter as made by it."""
    torch.manual_seed(1)
    config = replace(model.config, null_rows=2)
    hypernetwork = Hypernetwork(config).eval().requires_grad_(False)
    hypernetwork.load_state_dict(model.hypernetwork.state_dict(), strict=False)
    hypernetwork.null_keys["down_proj"].mul_(100)
    hypernetwork.null_floor["down_proj"].fill_(floor)
    new = d2l.DocToLoRA(model.base_model, model.tokenizer, hypernetwork)
    return new, replace(adapter, hypernetwork_key=new.hypernetwork_key)


@pytest.mark.parametrize("name", ["prompt", "answers", "strict", "lax"])
def test_a_null_block_is_what_the_definition_says(model, adapter, name):
    reading = {
        "prompt": Reading(prompt=True), "answers": Reading(), "strict": Reading(prompt=True, null_threshold=9.0),
        "lax": Reading(layers=(0, 2), decay=1.0, prompt=True, null_threshold=-9.0),
    }[name]  # fmt: skip
    new, own = with_null(model, adapter, FLOOR)
    ids, start = torch.tensor(question_ids(model.tokenizer, [QUESTIONS[1]])[0]), 12
    expected = defined(new, own, reading, ids, start)
    got = logits_of(new, own, ids[None], read=reading, starts=torch.tensor([start]))[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    bias = logits_of(new, replace(own, blocks=()), ids[None])[0]
    assert torch.allclose(got[:start], bias[:start], atol=1e-5) != reading.prompt
    torch.testing.assert_close(logits_of(new, own, ids[None])[0], logits_of(model, adapter, ids[None])[0])  # the sum


def test_a_null_block_reads_some_tokens_of_the_prompt_and_closes_some_answers(model, adapter):
    """The floor lies between the scores, so that neither verdict is a matter of course."""
    new, own = with_null(model, adapter, FLOOR)
    ids, mask = ids_of(new)
    null = {"null": new.hypernetwork.null()}
    with torch.no_grad(), read_sparsely(new.base_model, [own], Reading(prompt=True), **null) as state:
        new.base_model(ids, attention_mask=mask, use_cache=False)
        table = choices_table(state)
    assert (table.token == ids.shape[1] - 1).all() and len(table) == 9, "answers alone are in the table"
    assert (table.block < 0).any() and (table.block >= 0).any()
    shut = Reading(prompt=True, null_threshold=99.0)
    empty = logits_of(new, replace(own, blocks=()), ids, mask)
    assert not torch.allclose(logits_of(new, own, ids, mask, read=shut)[mask.bool()], empty[mask.bool()], atol=1e-3)
    closed, _ = with_null(model, adapter, 99.0)
    own = replace(own, hypernetwork_key=closed.hypernetwork_key)
    torch.testing.assert_close(logits_of(closed, own, ids, mask, read=Reading(prompt=True)), empty)


def test_a_model_with_a_null_block_comes_back_from_its_folder(model, adapter, tmp_path):
    new, own = with_null(model, adapter, FLOOR)
    new.reading = Reading(prompt=True, null_threshold=0.25)
    new.save(tmp_path / "model", include_base=True)
    own.save(tmp_path / "a.safetensors")
    again, file = d2l.load(tmp_path / "model"), d2l.Adapter.load(tmp_path / "a.safetensors")
    assert again.reading == new.reading and again.hypernetwork_key == new.hypernetwork_key == model.hypernetwork_key
    ids, mask = ids_of(new)
    assert torch.equal(logits_of(again, file, ids, mask, read="sparse"), logits_of(new, own, ids, mask, read="sparse"))
    adapter.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size == (tmp_path / "b.safetensors").stat().st_size
    assert "null_rows" not in model.config.to_dict() and "null_rows" in new.config.to_dict()
    # the null block writes no blocks: adapters of before and after are of one kind
    assert model.answer("Who?", own) == new.answer("Who?", own)
    assert model.answer("Who?", own + adapter) == new.answer("Who?", own + adapter)


@pytest.mark.parametrize("null", [False, True])
def test_prompts_and_answers_in_one_pass_read_as_token_by_token(model, adapter, null):
    """Rows of different lengths and with different adapters, one of them without: logits and what is read are equal."""
    reading = Reading(prompt=null)
    if null:
        model, adapter = with_null(model, adapter, FLOOR)
    adapters = [adapter, adapter.only("b"), None]
    ids, mask = ids_of(model)
    steps = 9
    with model.applied(adapters, read=reading):
        out = model.base_model.generate(
            ids, attention_mask=mask, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    whole = out.sequences[:, :-1]
    long = torch.cat([mask, mask.new_ones(3, steps - 1)], 1)
    starts = torch.tensor([ids.shape[1] - 1] * 3)
    positions = (long.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), model.applied(adapters, read=reading, starts=starts):
        once = model.base_model(whole, attention_mask=long, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), once[:, ids.shape[1] - 1 :], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("null", [False, True])
def test_single_equals_batch_with_one_adapter_each(model, adapter, null):
    reading = Reading(prompt=null)
    if null:
        model, adapter = with_null(model, adapter, FLOOR)
    adapters = [adapter, adapter.without("a"), adapter]
    both = model.answer(QUESTIONS, adapters, max_new_tokens=12, read=reading)
    for question, one, answer in zip(QUESTIONS, adapters, both, strict=True):
        assert model.answer(question, one, max_new_tokens=12, read=reading) == answer
    assert both != model.answer(QUESTIONS, adapters, max_new_tokens=12)


def test_blocks_are_removed_exactly_and_their_order_does_not_matter(model, adapter):
    ids, mask = ids_of(model)
    never = model.internalize_each({name: text for name, text in TEXTS.items() if name != "b"}, chunk_tokens=20)
    expected = logits_of(model, sum(never), ids, mask, read="sparse")
    assert torch.equal(logits_of(model, adapter.without("b"), ids, mask, read="sparse"), expected)
    # a weight of 0 is as good: the block is not read, and its place changes nothing
    torch.testing.assert_close(logits_of(model, adapter.scaled(0.0, "b"), ids, mask, read="sparse"), expected)
    turned = replace(adapter, blocks=adapter.blocks[::-1])
    first, second = (logits_of(model, one, ids, mask, read="sparse") for one in (adapter, turned))
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, expected)


def test_without_blocks_the_bias_alone_acts_and_one_block_is_read_as_in_the_sum(model, adapter):
    ids, mask = ids_of(model)
    empty = replace(adapter, blocks=())
    sums = logits_of(model, empty, ids, mask)
    torch.testing.assert_close(logits_of(model, empty, ids, mask, read="sparse"), sums)
    torch.testing.assert_close(logits_of(model, adapter.scaled(0.0), ids, mask, read="sparse"), sums)
    shut = Reading(thresholds=(99.0, 99.0, 99.0))
    torch.testing.assert_close(logits_of(model, adapter, ids, mask, read=shut), sums)
    alone = replace(adapter, blocks=adapter.blocks[:1])
    everywhere = {"read": Reading(layers=(0, 1, 2, 3)), "starts": torch.zeros(3, dtype=torch.long)}
    torch.testing.assert_close(logits_of(model, alone, ids, mask, **everywhere), logits_of(model, alone, ids, mask))


def test_blocks_of_different_rank_and_an_adapter_of_several_modules(model, adapter):
    ids, mask = ids_of(model)
    wide = [
        Block(b.document, b.chunk, b.span, b.weight,
              *({m: torch.nn.functional.pad(f, (0, 0, 0, extra)) for m, f in side.items()} for side in (b.A, b.B)))
        for extra, b in enumerate(adapter.blocks)
    ]  # fmt: skip
    ranks = replace(adapter, blocks=tuple(wide))
    assert len({block.rank for block in ranks.blocks}) > 1
    torch.testing.assert_close(
        logits_of(model, ranks, ids, mask, read="sparse"), logits_of(model, adapter, ids, mask, read="sparse")
    )
    several = build_model(modules=("down_proj", "q_proj"))
    one = several.internalize(TEXTS, chunk_tokens=20)
    assert len(several.answer(QUESTIONS, one, max_new_tokens=5, read="sparse")) == 3
    with pytest.raises(ValueError, match="one module"):
        several.answer("Who?", one, read=Reading(thresholds=(0.0, 0.0, 0.0)))


def test_the_model_is_bit_equal_after_and_reading_nests(model, adapter):
    before = {name: value.clone() for name, value in model.base_model.state_dict().items()}
    ids, mask = ids_of(model)
    plain, sums = logits_of(model, None, ids, mask), logits_of(model, adapter, ids, mask)
    sparse = logits_of(model, adapter, ids, mask, read="sparse")
    with torch.no_grad(), model.applied(adapter, read="sparse"):
        assert torch.equal(logits_of(model, adapter, ids, mask), sums)  # a named adapter without `read` is the sum
        assert torch.equal(logits_of(model, None, ids, mask), plain)
        assert torch.equal(model.base_model(ids, attention_mask=mask, use_cache=False).logits, sparse)
        assert model.answer(QUESTIONS) == model.answer(QUESTIONS, adapter, read="sparse")  # as it is applied around
        assert model.answer(QUESTIONS, read="sum") == model.answer(QUESTIONS, adapter)
    assert torch.equal(logits_of(model, None, ids, mask), plain)
    assert all(torch.equal(value, before[name]) for name, value in model.base_model.state_dict().items())
    hooks = [hook for part in model.base_model.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]
    assert not hooks


def test_an_answer_does_not_depend_on_the_one_before(model, adapter):
    ids, mask = ids_of(model)
    with model.applied(adapter, read="sparse"):
        first, second = (model.generate(ids, attention_mask=mask, max_new_tokens=6) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(
        first, model.generate(ids, attention_mask=mask, max_new_tokens=6, adapter=adapter, read="sparse")
    )


def test_beams_exchange_their_evidence(model, adapter):
    """The score of a beam is the log-probability that its tokens have in one pass."""
    ids, mask = ids_of(model)
    out = model.generate(
        ids, attention_mask=mask, adapter=adapter, read=Reading(decay=1.0), num_beams=3, max_new_tokens=8,
        min_new_tokens=8, length_penalty=0.0, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    whole, start = out.sequences, ids.shape[1] - 1
    assert len({tuple(map(int, one.flatten())) for one in out.beam_indices}) > 1
    long = torch.cat([mask, mask.new_ones(3, 8)], 1)
    positions = (long.cumsum(1) - 1).clamp(min=0)
    starts = torch.tensor([start] * 3)
    with torch.no_grad(), model.applied(adapter, read=Reading(decay=1.0), starts=starts):
        logits = model.base_model(whole, attention_mask=long, position_ids=positions, use_cache=False).logits
    chosen = logits[:, start:-1].log_softmax(-1).gather(2, whole[:, start + 1 :, None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores, chosen, rtol=1e-3, atol=1e-2)


def test_the_table_says_what_each_token_read(model, adapter):
    ids, mask = ids_of(model, QUESTIONS[:2])
    read = Reading(layers=(1, 3))
    with torch.no_grad(), read_sparsely(model.base_model, [adapter], read) as state:
        model.base_model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        table = choices_table(state)
    assert list(table.columns) == ["row", "token", "layer", "module", "block", "document", "chunk", "evidence", "lead"]
    assert len(table) == 2 * 3 * 2  # rows, tokens, layers
    assert sorted(table.token.unique()) == [ids.shape[1] - 1, ids.shape[1], ids.shape[1] + 1]
    for line in table.itertuples():
        block = adapter.blocks[line.block]
        assert (line.document, line.chunk) == (block.document, block.chunk) and line.lead >= 0 and line.evidence > 0
    last = table[(table.row == 0) & (table.layer == 3)]
    assert (last.evidence.to_numpy() >= table[(table.row == 0) & (table.layer == 1)].evidence.to_numpy()).all()
    shut = Reading(layers=(1, 3), thresholds=(99.0, 99.0))
    with torch.no_grad(), read_sparsely(model.base_model, [adapter], shut) as state:
        model.base_model(ids, attention_mask=mask, use_cache=False)
        table = choices_table(state)
    assert (table.block == -1).all() and table.document.isna().all()


def test_what_an_answer_reads_is_the_block_of_its_evidence():
    model = d2l.load("tiny/qa")
    document = world.draw_document(random.Random("reads"), "validation", 12)
    (adapter,) = model.internalize_each([document.text])
    blocks = block_texts(adapter, document.text)
    assert list(blocks["block"]) == list(range(len(adapter.blocks)))
    assert " ".join(blocks["text"]) == " ".join(document.text.split()), "chunks cover the text"
    right = 0
    for fact in document.facts[:6]:
        question = world.question_about(random.Random(0), fact).text
        answer = model.answer(question, adapter, read="sparse")
        table, given = answer_reads(model, question, adapter), answer_reads(model, question, adapter, answer)
        assert table.equals(given)
        assert "".join(table[table["layer"] == 3]["text"][:-1]).strip() == answer
        assert table["token"].min() == 0 and set(table["layer"]) == {1, 2, 3}
        first = table[(table["token"] == 0) & (table["layer"] == 3)]["block"].item()
        span = adapter.blocks[first].span
        right += first >= 0 and span[0] < fact.span[1] and fact.span[0] < span[1]
    assert right >= 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"decay": 1.5}, "decay"),
        ({"decay": math.nan}, "decay"),
        ({"layers": (4,)}, "layer 4"),
        ({"null_threshold": math.inf}, "null_threshold"),
        ({"thresholds": (1.0,)}, "thresholds"),
        ({"thresholds": (1.0, 1.0, 1.0), "gate_weights": (1.0,)}, "gate_weights"),
    ],
)
def test_readings_that_do_not_fit_are_refused(model, adapter, settings, words):
    with pytest.raises(ValueError, match=words):
        model.answer("Who?", adapter, read=Reading(**settings))


def test_what_it_cannot_follow_is_refused(model, adapter):
    ids, mask = ids_of(model)
    with pytest.raises(ValueError, match="'sum', 'sparse'"):
        model.answer("Who?", adapter, read="dense")
    for option in ({"use_cache": False}, {"prefill_chunk_size": 4}):
        with pytest.raises(ValueError, match="cannot follow"):
            model.generate(ids, attention_mask=mask, adapter=adapter, read="sparse", **option)
    with torch.no_grad(), model.applied(adapter, read="sparse"):
        cache = model.base_model(ids, attention_mask=mask).past_key_values
        with pytest.raises(RuntimeError, match="one token at a time"):
            model.base_model(ids[:, :3], past_key_values=cache)
    with torch.no_grad(), model.applied(adapter):
        cache = model.base_model(ids, attention_mask=mask).past_key_values
    with torch.no_grad(), model.applied(adapter, read="sparse"), pytest.raises(RuntimeError, match="empty cache"):
        model.base_model(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="rows="), read_sparsely(model.base_model, [adapter, None], Reading()):
        pass


@pytest.fixture(scope="module", params=["tiny", "tiny/qa"])
def bundled(request):
    """A bundled model, the texts of two documents, their adapter, and questions: right answers of the first."""
    model = d2l.load(request.param)
    if request.param == "tiny":
        texts = {"a": needles.build_haystack(model.tokenizer, 600, 0.4, "4217").text}
        texts |= {"b": needles.build_haystack(model.tokenizer, 300, 0.5, None).text}
        asked = [(needles.QUESTION, "4217"), (f"Tell me: {needles.QUESTION}", None)]
    else:
        documents = dict(zip("ab", disjoint_documents(random.Random(2), 2, 6, "validation"), strict=True))
        texts = {name: document.text for name, document in documents.items()}
        questions = [world.question_about(random.Random(0), fact) for fact in documents["a"].facts[:3]]
        asked = [(question.text, question.answer) for question in questions]
    return model, texts, model.internalize(texts), asked


def test_bundled_models_drop_blocks_exactly_in_any_order(bundled):
    model, texts, adapter, asked = bundled
    ids, mask = ids_of(model, [question for question, _ in asked])
    (never,) = model.internalize_each({"b": texts["b"]})
    without = logits_of(model, adapter.without("a"), ids, mask, read="sparse")
    assert torch.equal(without, logits_of(model, never, ids, mask, read="sparse"))
    whole = logits_of(model, adapter, ids, mask, read="sparse")
    turned = logits_of(model, replace(adapter, blocks=adapter.blocks[::-1]), ids, mask, read="sparse")
    torch.testing.assert_close(whole[mask.bool()], turned[mask.bool()], rtol=1e-4, atol=1e-4)
    assert (whole[:, -1] - without[:, -1]).abs().max() > 1


def test_bundled_models_answer_alone_as_in_a_batch_and_are_what_they_were(bundled):
    model, _, adapter, asked = bundled
    before = {name: value.clone() for name, value in model.base_model.state_dict().items()}
    questions = [question for question, _ in asked] * 3
    adapters = [one for one in (adapter, adapter.without("a"), None) for _ in asked]
    answers = model.answer(questions, adapters, read="sparse")
    assert answers == [
        model.answer(question, one, read="sparse") for question, one in zip(questions, adapters, strict=True)
    ]
    for (_, right), answer, missing in zip(asked, answers, answers[len(asked) :], strict=False):
        assert right is None or answer == right != missing
    assert answers[2 * len(asked) :] == model.answer(questions[: len(asked)], None)
    assert all(torch.equal(value, before[name]) for name, value in model.base_model.state_dict().items())
    hooks = [hook for part in model.base_model.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]
    assert not hooks


def test_beams_of_bundled_models_have_the_score_of_one_pass(bundled):
    model, _, adapter, asked = bundled
    ids, mask = ids_of(model, [question for question, _ in asked])
    rows, start, steps = len(ids), ids.shape[1] - 1, 5
    out = model.generate(
        ids, attention_mask=mask, adapter=adapter, read="sparse", num_beams=3, max_new_tokens=steps,
        min_new_tokens=steps, length_penalty=0.0, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    long = torch.cat([mask, mask.new_ones(rows, steps)], 1)
    positions, starts = (long.cumsum(1) - 1).clamp(min=0), torch.full((rows,), start)
    with torch.no_grad(), model.applied(adapter, read="sparse", starts=starts):
        logits = model.base_model(out.sequences, attention_mask=long, position_ids=positions, use_cache=False).logits
    chosen = logits[:, start:-1].log_softmax(-1).gather(2, out.sequences[:, start + 1 :, None]).sum((1, 2))
    assert len({tuple(map(int, one.flatten())) for one in out.beam_indices}) > 1
    torch.testing.assert_close(out.sequences_scores, chosen, rtol=1e-3, atol=2e-2)


def test_a_document_of_twenty_facts_is_read_where_the_sum_drowns():
    model = d2l.load("tiny/qa")
    rng = random.Random("reading")
    right = {"sum": 0, "sparse": 0}
    for _ in range(2):
        document = world.draw_document(rng, "validation", 20)
        questions = [world.question_about(rng, fact) for fact in document.facts[:10]]
        (adapter,) = model.internalize_each([document.text])
        for read in right:
            answers = model.answer([one.text for one in questions], adapter, read=read)
            right[read] += sum(a == q.answer for a, q in zip(answers, questions, strict=True))
    assert right["sparse"] >= 18 and right["sparse"] - right["sum"] >= 5, right


def test_a_checkpoint_says_how_its_blocks_are_read(tmp_path):
    model = build_model(modules=("down_proj",))
    for number, reading in enumerate((Reading(), Reading((0, 2), 0.25, (-1.0, 2.0), (1.0, 3.0)))):
        model.reading = reading
        folder = model.save(tmp_path / str(number), include_base=True)
        assert d2l.load(folder).reading == reading
    config = folder / "config.json"
    config.write_text(config.read_text().replace("0.25", "1.25"))
    with pytest.raises(ValueError, match="decay"):
        d2l.load(folder)
    config.write_text(config.read_text().replace("1.25", "0.25").replace("2.0", '"2"'))
    with pytest.raises(ValueError, match="thresholds"):
        d2l.load(folder)
