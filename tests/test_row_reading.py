"""Rows read by attention: against a plain oracle, with and without a cache, alone and in batches; what is refused."""

import itertools
import math

import pytest
import torch
from tiny_models import build_model, build_rows_model, logits_of

from d2l_lib.adapter import Block
from d2l_lib.documents import question_ids
from d2l_lib.row_reader import FLOOR, LENGTH, NEAR, REACH, SATURATION, word_gains
from d2l_lib.row_reading import RowReading, answer_rows, read_rows

TEXTS = {"a": "Ada lives in Velm.", "b": "The lake is cold at night."}
READINGS = [RowReading(), RowReading(0.4), RowReading(2.0, 12.0), RowReading(chunks=None)]
QUESTIONS = ["Who is it?", "Where does Ada live?", "What?"]


@pytest.fixture(scope="module")
def model():
    return build_rows_model()


@pytest.fixture(scope="module")
def adapter(model):
    return model.internalize(TEXTS)


def oracle(model, adapter, reading: RowReading, text: str = QUESTIONS[0]) -> torch.Tensor:
    """Logits by the formula, row by row: plain hooks on the linears of the upper layers."""
    net, layers, handles, near, gates = model.hypernetwork.reader, model.base_model.model.layers, [], [], []
    gate_length = math.log1p(math.exp(10 * float(net.gate_length)))
    asked, words = model.tokenizer(text)["input_ids"], model.hypernetwork.words
    chunks = {id(b): TEXTS[b.document][slice(*b.span)] for b in adapter.blocks}
    held = {b: words.alike(torch.tensor(model.tokenizer(chunk)["input_ids"])).tolist() for b, chunk in chunks.items()}
    mean_length = sum(map(len, held.values())) / len(held)

    def gain(own: list, counts: dict) -> float:
        """BM25 of one word, or of two in a row, that each chunk holds so often, for the chunk with these words."""
        n, f = sum(count > 0 for count in counts.values()), counts[id(own)]
        free = SATURATION * (1 - LENGTH + LENGTH * len(own) / mean_length)
        return math.log(len(held) / n) * f * (SATURATION + 1) / (f + free) if n else 0.0

    def words_of(block, so_far: int) -> list[float]:
        """w_1 and w_2 of what is asked up to this token."""
        own, totals, last = held[block], [0.0, 0.0], None
        for word, token in zip(words.alike(torch.tensor(asked)).tolist()[: so_far + 1], asked, strict=False):
            if token in net.wrapping:
                last = None
                continue
            totals[0] += gain(own, {id(some): some.count(word) for some in held.values()})
            if last is not None:
                pairs = {id(some): list(itertools.pairwise(some)).count((last, word)) for some in held.values()}
                totals[1] += gain(own, pairs)
            last = word
        return totals

    def rows(role: int) -> list:
        return [(b, t, b.A["down_proj"][0, 4 * t + role], b.B["down_proj"][0, 4 * t + role])
                for b in adapter.blocks for t in range(b.rank // 4)]  # fmt: skip

    def around(found, block, t: int, spread: float, side: int) -> torch.Tensor:
        weights = {
            d: math.exp(-abs(d) / spread) if spread else float(d == 0)
            for d in range(-REACH, REACH + 1)
            if d * side > 0 or not side
        }
        mean = sum(w * found[id(block), t + d] for d, w in weights.items() if (id(block), t + d) in found)
        return torch.as_tensor(math.log1p(mean / sum(weights.values()) / FLOOR))

    def match(_, inputs, output):
        joint, each, content, name, tokens = 0.0, 0.0, 0.0, str(net.match_layer), rows(3)
        for x in inputs[0][0]:
            u = x / x.norm()
            none = u @ net.null_key + 10 * net.null_logit
            content += float((u @ net.content_key).sigmoid())
            logits = torch.stack([u @ net.keys[name] @ c + math.log(b.weight) for b, _, c, _ in tokens])
            joint = joint + torch.cat([none[None], logits]).softmax(0)[1:]
            parts = [logits[[i for i, row in enumerate(tokens) if row[0] is b]] for b in adapter.blocks]
            each = each + torch.cat([torch.cat([none[None], part]).softmax(0)[1:] for part in parts])
            maps = [
                {(id(b), t): float(p) for (b, t, *_), p in zip(tokens, found, strict=True)} for found in (joint, each)
            ]
            near.append({(id(b), t): torch.stack([around(maps[0], b, t, *k) for k in NEAR]) for b, t, *_ in tokens})
            most = torch.stack([torch.stack([around(maps[1], b, t, *k) for k in NEAR]) for b, t, *_ in tokens]).amax(0)
            logit = (most * (10 * net.gate_scaler).exp().add(1).log()).sum() - 10 * net.gate_bias
            logit = logit + net.gate_words * max(words_of(own, len(gates))[0] for own in held)
            logit = logit - net.gate_rise * math.log(len(adapter.blocks)) - gate_length * math.log1p(content)
            gates.append(float(logit > reading.null_logit))

    def read(_, inputs, output):
        added, name = torch.zeros_like(output), str(net.last_layer)
        for place, x in enumerate(inputs[0][0]):
            u, logits, values, owners = x / x.norm(), [], [], []
            weights = (u @ net.evidence_keys).unflatten(0, net.evidence_scaler.shape) + 10 * net.evidence_scaler
            for role in range(3):
                for block, t, c, B in rows(role):
                    favour = near[place][id(block), t] @ weights[:, role] + math.log(block.weight)
                    logits.append((u @ net.keys[name] @ c + favour) / reading.temperature)
                    values.append(B)
                    owners.append(id(block))
            if reading.chunks is not None:
                of_chunk = {}
                for own in set(owners):
                    its = [logit * reading.temperature for logit, o in zip(logits, owners, strict=True) if o == own]
                    most = torch.stack([near[place][key] for key in near[place] if key[0] == own]).amax(0)
                    favour = most @ net.chunk_weight + torch.tensor(words_of(own, place)) @ net.chunk_words
                    of_chunk[own] = torch.stack(its).logsumexp(0) + favour
                best = sorted(of_chunk, key=of_chunk.get)[-reading.chunks :]
                logits = [logit if own in best else logit - 1e9 for logit, own in zip(logits, owners, strict=True)]
            added[0, place] = gates[place] * (torch.stack(logits).softmax(0)[:, None] * torch.stack(values)).sum(0)
        return output + adapter.scale * added

    for place, layer in enumerate(net.lora_layers):
        for module, A in net.lora_A.items():
            (linear,) = [one for name, one in layers[layer].named_modules() if name.endswith(module)]
            update = (net.lora_B[module][place].T @ A[place]).T
            handles.append(
                linear.register_forward_hook(
                    lambda _, x, y, update=update: y + torch.tensor(gates)[:, None] * (x[0] @ update)
                )
            )
    handles.append(layers[net.match_layer].mlp.down_proj.register_forward_hook(match))
    handles.append(layers[net.last_layer].mlp.down_proj.register_forward_hook(read))
    with torch.no_grad():
        logits = model.base_model(torch.tensor([model.tokenizer(text)["input_ids"]])).logits
    for handle in handles:
        handle.remove()
    return logits


def read_logits(model, adapter, reading, text: str = QUESTIONS[0]):
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    with torch.no_grad(), model.applied(adapter, read=reading) as network:
        return network(ids).logits


@pytest.mark.parametrize(
    "reading", [RowReading(), RowReading(0.4), RowReading(2.0, 12.0), RowReading(chunks=None)], ids=str
)
def test_reading_is_a_softmax_over_all_rows_where_the_gate_is_open(model, adapter, reading):
    half = adapter.only("a") + adapter.only("b").scaled(0.3)
    for one, text in itertools.product((adapter, half), QUESTIONS[:2]):
        got, expected = read_logits(model, one, reading, text), oracle(model, one, reading, text)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert (read_logits(model, half, reading) - read_logits(model, adapter, reading)).abs().max() > 1e-2
    plain = RowReading()
    if reading != plain:
        assert (read_logits(model, adapter, reading) - read_logits(model, adapter, plain)).abs().max() > 1e-2


def test_an_adapter_without_rows_is_the_base_model_and_the_model_stays(model, adapter):
    before = {name: value.clone() for name, value in model.base_model.state_dict().items()}
    base = logits_of(model, None)
    for silent in (adapter.scaled(0), adapter.without(list(TEXTS)), None):
        assert torch.equal(read_logits(model, silent, None), base)
    assert torch.equal(read_logits(model, adapter, RowReading(null_logit=1e4)), base)  # the gate is closed
    assert (read_logits(model, adapter, RowReading()) - base).abs().max() > 0.1
    assert torch.equal(logits_of(model, None), base)
    assert all(torch.equal(value, before[name]) for name, value in model.base_model.state_dict().items())
    assert not any(one._forward_hooks for one in model.base_model.modules())


def test_one_pass_is_token_by_token_and_batches_are_single_questions(model, adapter):
    ids = torch.tensor([model.tokenizer(QUESTIONS[1])["input_ids"]])
    with torch.no_grad(), model.applied(adapter) as network:
        whole, cache, steps = network(ids).logits, None, []
        for token in ids[0]:
            out = network(token[None, None], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits[:, 0])
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-3, atol=1e-3)
    mixed = [adapter.only("a"), None, adapter]
    together = model.answer(QUESTIONS, mixed, max_new_tokens=6)
    single = [model.answer(q, one, max_new_tokens=6) for q, one in zip(QUESTIONS, mixed, strict=True)]
    assert together == single
    assert together[1] == model.answer(QUESTIONS[1], None, max_new_tokens=6)
    assert together[1] != model.answer(QUESTIONS[1], adapter, max_new_tokens=6)


def test_samples_and_beams_of_a_question_read_its_own_adapter(model, adapter):
    prompts = question_ids(model.tokenizer, [QUESTIONS[0]])
    ids = torch.tensor(prompts * 2)
    mixed = [adapter.only("a"), None]
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    torch.manual_seed(0)
    sampled = model.generate(ids, adapter=mixed, do_sample=True, num_return_sequences=2, **options)
    assert len(sampled.sequences) == 4
    first = sampled.logits[0]
    assert torch.equal(first[0], first[1]) and torch.equal(first[2], first[3])
    assert not torch.allclose(first[0], first[2], atol=1e-2)
    with torch.no_grad(), model.applied(mixed[0]) as network:
        torch.testing.assert_close(first[0], network(ids[:1]).logits[0, -1], rtol=1e-3, atol=1e-3)
    beams = model.generate(ids, adapter=mixed, num_beams=2, max_new_tokens=4)
    for row, one in enumerate(mixed):
        alone = model.generate(ids[:1], adapter=one, num_beams=2, max_new_tokens=4)
        assert beams[row, : alone.shape[1]].tolist() == alone[0].tolist()


def test_words_of_an_answer_do_not_open_the_gate(model, adapter):
    """The same tokens open it as part of what is asked, and leave it closed as part of an answer."""
    reader = model.hypernetwork.reader
    prompt, words = question_ids(model.tokenizer, ["Who?"])[0], model.tokenizer(" Ada lives in Velm")["input_ids"]
    assert tuple(prompt[-len(reader.answer_start) :]) == reader.answer_start
    end = next(iter(reader.answer_ends))
    again = prompt + words + [end] + words

    def evidence_of_gate(ids, cut=()):
        gates, cache = [], None
        with torch.no_grad(), read_rows(model.base_model, [adapter], RowReading(), reader) as state:
            for start, stop in zip((0, *cut), (*cut, len(ids)), strict=True):
                out = model.base_model(torch.tensor([ids[start:stop]]), past_key_values=cache, use_cache=True)
                found = (*state.over_time[0][0], state.content[0], state.held[0][0])
                cache, gates = out.past_key_values, [*gates, tuple(one.clone() for one in found)]
        return gates

    ((joint, *before),) = evidence_of_gate(prompt)
    ((later, *same),) = evidence_of_gate(prompt + words)
    torch.testing.assert_close(before, same, rtol=1e-4, atol=1e-5)
    assert (later > joint + 1e-3).any()
    ((_, *more),) = evidence_of_gate(again)
    for then, now in zip(before, more, strict=True):
        assert (now > then - 1e-4).all() and (now > then + 1e-3).any()
    steps = evidence_of_gate(again, cut=range(len(prompt), len(again)))
    torch.testing.assert_close(steps[-1], evidence_of_gate(again)[0], rtol=1e-4, atol=1e-5)
    assert not evidence_of_gate(prompt[: -len(reader.answer_start)][:2])[0][-1].any()  # the chat's own tokens


def test_words_of_a_question_count_where_few_chunks_hold_them():
    """By hand: three chunks, of 4, 8 and 4 tokens; one word is in all, one in the first twice, one pair in the last."""
    counts = torch.tensor([[1.0, 1, 1], [2, 0, 0], [0, 0, 1]])
    gains = word_gains(counts, torch.tensor([4.0, 8, 4]))
    assert gains[0].tolist() == [0, 0, 0]
    free = 1.2 * (0.25 + 0.75 * 4 / (16 / 3))
    assert gains[1].tolist() == pytest.approx([math.log(3) * 2 * 2.2 / (2 + free), 0, 0])
    assert gains[2].tolist() == pytest.approx([0, 0, math.log(3) * 2.2 / (1 + free)])
    assert not word_gains(torch.tensor([[3.0]]), torch.tensor([4.0])).any()  # one chunk


def test_many_codes_are_taken_block_by_block(model, adapter, monkeypatch):
    half = adapter.to(dtype=torch.float16)
    expected = [logits_of(model, one) for one in (adapter, adapter.scaled(0.3, document="a"), half)]
    monkeypatch.setattr("d2l_lib.row_reading._AT_ONCE", 0)
    got = [logits_of(model, one) for one in (adapter, adapter.scaled(0.3, document="a"), half)]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(got[0], got[1])


def hand_made(model, word: int):
    """An adapter of two documents whose rows are silent but one, which writes `word`."""
    d, d_out = model.config.latent_size, model.config.d_out["down_proj"]
    blocks = []
    for name, n in (("quiet", 8), ("loud", 12)):
        A, B = torch.zeros(1, n, d), torch.zeros(1, n, d_out)
        blocks.append(Block(name, 0, None, 1.0, {"down_proj": A}, {"down_proj": B}))
    blocks[1].B["down_proj"][0, 5] = 1e4 * model.hypernetwork.words.directions(torch.tensor(word))
    return model.adapter_of(blocks)


def test_the_table_names_the_row_that_writes_a_word(model):
    word = model.tokenizer("V", add_special_tokens=False)["input_ids"][0]
    adapter = hand_made(model, word)
    ids = question_ids(model.tokenizer, [QUESTIONS[0]])
    seen = {}
    layer = model.base_model.model.layers[-1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0][0, -1]))
    with torch.no_grad(), model.applied(adapter) as network:
        network(torch.tensor(ids))
    handle.remove()
    q = model.hypernetwork.reader.asked(model.hypernetwork.reader.last_layer, seen["x"] / seen["x"].norm())
    adapter.blocks[1].A["down_proj"][0, 5] = 400 * q / q.square().sum()
    answer = model.answer(QUESTIONS[0], adapter, max_new_tokens=1)
    assert answer == "V"
    table = answer_rows(model, QUESTIONS[0], adapter, answer)
    assert list(table.columns) == ["token", "text", "share", "document", "chunk", "row", "place", "role"]
    assert table.groupby("token").size().tolist() == [3, 3] and table["text"][0] == "V"
    for _, lines in table.groupby("token"):
        assert (lines["share"].diff().dropna() <= 0).all() and lines["share"].sum() <= 1 + 1e-6
    top = table.iloc[0]
    assert (top["document"], top["chunk"], top["row"], top["place"], top["role"]) == ("loud", 0, 5, 1, "inside")
    assert top["share"] > 0.99
    adapter.blocks[0].A["down_proj"][0, 6] = 9 * adapter.blocks[1].A["down_proj"][0, 5]  # the last of its words
    top = answer_rows(model, QUESTIONS[0], adapter, answer).iloc[0]
    assert (top["document"], top["row"], top["place"], top["role"]) == ("quiet", 6, 1, "end")
    nobody = answer_rows(model, QUESTIONS[0], adapter, answer, read=RowReading(null_logit=1e3))
    assert nobody.iloc[0]["row"] == -1 and nobody["document"].isna().iloc[0]


def test_a_table_of_a_real_adapter_is_what_the_formula_says(model, adapter):
    table = answer_rows(model, QUESTIONS[0], adapter, "Ada")
    assert len(table) == 3 * 4 and table["share"].between(0, 1).all()
    known = table[table["row"] >= 0]
    sizes = {block.document: block.rank for block in adapter.blocks}
    assert all(row < sizes[document] for document, row in zip(known["document"], known["row"], strict=True))
    assert (known["place"] == known["row"] // 4).all() and (known["row"] % 4 < 3).all()
    assert answer_rows(model, QUESTIONS[0], adapter.only("b"), "Ada")["document"].dropna().eq("b").all()


def test_what_does_not_fit_is_refused(model, adapter):
    for numbers in ({"temperature": 0}, {"temperature": float("nan")}, {"null_logit": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(numbers))):
            RowReading(**numbers)
    with pytest.raises(ValueError, match="read by attention"):
        model.answer(QUESTIONS[0], adapter, read="sum")
    with pytest.raises(ValueError, match="leave blocks out"):
        model.answer(QUESTIONS[0], adapter, blocks=2)
    with pytest.raises(ValueError, match="at least 0"):
        model.answer(QUESTIONS[0], adapter.scaled(-1))
    other = build_model()
    with pytest.raises(ValueError, match="another model|another hypernetwork"):
        other.answer(QUESTIONS[0], adapter)
    with pytest.raises(ValueError, match="another hypernetwork"):
        model.answer(QUESTIONS[0], other.internalize(TEXTS))
    with pytest.raises(ValueError, match="another hypernetwork"):
        model.answer(QUESTIONS[0], other.internalize(TEXTS).as_lora())
    with pytest.raises(ValueError, match="read must be"):
        other.answer(QUESTIONS[0], None, read=RowReading())
    with (
        pytest.raises(ValueError, match="need rows="),
        read_rows(model.base_model, [adapter, adapter], RowReading(), model.hypernetwork.reader),
    ):
        pass
