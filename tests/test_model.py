"""Documents in, answers out; the adapter acts where it is asked to and nowhere else."""

import copy
import json
import pickle
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import build_base_model, build_model, build_tokenizer, logits_of, random_hypernetwork

import d2l_lib as d2l
from d2l_lib import documents, onednn
from d2l_lib import model as model_module
from d2l_lib.encoder import ContextEncoder
from d2l_lib.engine import pad_rows
from d2l_lib.model import DocToLoRA

FIRST = "Ada keeps 3 cats. The oldest is Tom. Tom is 19."
SECOND = "Bob has a boat. It is called Wave."
QUESTIONS = ["Who?", "What is the name of the oldest cat?", "Where is it now?", "Is it so?"]


@pytest.fixture
def model():
    return build_model()


def weights(model):
    return {name: tensor.clone() for name, tensor in model.base_model.state_dict().items()}


def n_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.base_model.modules())


# --- internalize ------------------------------------------------------------------------------------------------------


def test_one_block_per_chunk_and_the_adapter_becomes_current(model):
    adapter = model.internalize(FIRST, chunk_tokens=20)
    assert model.current is adapter
    assert adapter.documents == ["document"]
    chunks = [FIRST[slice(*block.span)] for block in adapter.blocks]
    assert chunks == ["Ada keeps 3 cats. ", "The oldest is Tom. ", "Tom is 19."]
    assert adapter.scale == model.config.scale
    assert adapter.rank == (3 + 1) * model.config.rank
    assert all(not tensor.requires_grad for tensor in adapter._tensors())


def test_names(model):
    assert model.internalize([FIRST, SECOND]).documents == ["document 1", "document 2"]
    assert model.internalize({"ada": FIRST, "bob": SECOND}).documents == ["ada", "bob"]


def test_blocks_are_what_the_hypernetwork_writes(model):
    adapter = model.internalize(FIRST)
    ids = torch.tensor([documents.context_ids(model.tokenizer, FIRST)])
    with torch.no_grad():
        features = ContextEncoder.from_config(model.base_model, model.config).encode(ids)
        A, B = model.hypernetwork(features, attention_mask=torch.ones_like(ids))["down_proj"]
    assert torch.allclose(adapter.blocks[0].A["down_proj"], A[0], atol=1e-6)
    assert torch.allclose(adapter.blocks[0].B["down_proj"], B[0], atol=1e-6)


def test_together_equals_one_by_one_exactly(model):
    together = model.internalize({"ada": FIRST, "bob": SECOND}, chunk_tokens=20)
    alone = model.internalize({"ada": FIRST}, chunk_tokens=20)
    other = model.internalize({"bob": SECOND}, chunk_tokens=20)
    assert together.without(document="bob") == alone
    assert alone + other == together
    assert torch.equal(logits_of(model, together.without(document="bob")), logits_of(model, alone))


def test_a_block_does_not_depend_on_its_neighbours_in_a_batch():
    """Whatever stands beside a chunk, how much of it, and where in the batch the chunk is: the same bits."""
    model = build_model(("down_proj",))
    model.batch_tokens = 4096
    texts = [f"{'The old tree is green. ' * (1 + i % 3)}Number {i * 7919 % 1000}." for i in range(30)]
    alone = {text: model.internalize(text).blocks[0] for text in texts}
    assert model.chunk_batch > 1
    rng = random.Random(0)
    for _ in range(12):
        chosen = rng.sample(texts, rng.randint(2, 12))
        for text, adapter in zip(chosen, model.internalize_each(chosen), strict=True):
            (block,) = adapter.blocks
            for side in ("A", "B"):
                assert torch.equal(getattr(block, side)["down_proj"], getattr(alone[text], side)["down_proj"])


@pytest.mark.parametrize("alike", [True, False])
def test_long_chunks_of_one_length_stand_together_where_that_changes_no_bit(monkeypatch, alike):
    """200 tokens: long. 144 and 130: padded to 168, so long, and to 144, so short; no batch may hold both."""
    model, sizes = build_model(("down_proj",)), []
    rows = [torch.randint(model.base_model.config.vocab_size, (n,)).tolist() for n in (200, 144, 130, *[200] * 6)]
    monkeypatch.setattr(model, "_is_free", lambda *_: False)  # of short chunks, which other tests are about
    alone = [model.internalize_ids(torch.tensor([row])).blocks[0] for row in rows]
    assert not model._together, "a chunk alone needs no trial"
    encode, equal = model.encoder.encode, torch.equal

    def spy(ids, **options):
        sizes.append(tuple(ids.shape))
        return encode(ids, **options)

    monkeypatch.setattr(model.encoder, "encode", spy)
    if not alike:  # as on a processor whose products depend on the number of rows
        monkeypatch.setattr(torch, "equal", lambda *_: False)
    together = model.internalize_ids(*pad_rows(rows, 0)).blocks
    monkeypatch.setattr(torch, "equal", equal)
    tried = [(4, 200), (1, 200), (2, 200), (1, 200)]
    assert alike or not any(model._together.values())
    batches, left = [], 7
    while left:
        batches.append((next(n for n in (4, 2, 1) if n <= left and model._together.get(n, True)), 200))
        left -= batches[-1][0]
    assert sorted(sizes) == sorted([*tried, *batches, (1, 144), (2, 144)])
    for one, other in zip(together, alone, strict=True):
        assert all(equal(getattr(one, side)["down_proj"], getattr(other, side)["down_proj"]) for side in "AB")
    sizes.clear()
    model.internalize_ids(*pad_rows(rows, 0))
    assert sorted(sizes) == sorted([*batches, (1, 144), (2, 144)]), "it is tried once"


SHORT = [f"Number {i * 7919 % 1000}." for i in range(61)]  # a chunk each, all of one padded length


@pytest.fixture
def encoded(monkeypatch):
    """(a model, the shapes of what its encoder reads)"""
    model, sizes = build_model(("down_proj",)), []
    encode = model.encoder.encode

    def watched(ids, **options):
        sizes.append(tuple(ids.shape))
        return encode(ids, **options)

    monkeypatch.setattr(model.encoder, "encode", watched)
    return model, sizes


def rows_read(model, sizes: list, texts: list[str]) -> tuple[list, list[int]]:
    """The blocks of these texts, and how many rows each pass of the encoder had."""
    sizes.clear()
    blocks = [adapter.blocks[0] for adapter in model.internalize_each(texts)]
    assert len({width for _, width in sizes}) == 1
    return blocks, [rows for rows, _ in sizes]


def assert_same_blocks(blocks, others):
    for one, other in zip(blocks, others, strict=True):
        for side in "AB":
            torch.testing.assert_close(getattr(one, side)["down_proj"], getattr(other, side)["down_proj"])


needs_onednn = pytest.mark.skipif(not onednn.is_available(), reason="this torch has no oneDNN")


@needs_onednn
def test_short_chunks_stand_together_where_that_changes_no_bit(encoded, monkeypatch):
    model, sizes = encoded
    monkeypatch.setattr(model_module, "_all_equal", lambda *_: True)  # a matter of the processor
    monkeypatch.setattr(model_module, "_FREE_ROWS", {12: 9, 4: 2, 1: 1})
    model.batch_tokens = 12 * width_of(model, SHORT[0])
    full = model._rows(width_of(model, SHORT[0]))
    assert rows_read(model, sizes, SHORT[:1])[1] == [full], "a single text is not worth a trial"
    assert rows_read(model, sizes, SHORT[:1])[1] == [full, 1, 1], "what is tried, then the chunk alone"
    alone = [rows_read(model, sizes, [text])[0][0] for text in SHORT]
    assert rows_read(model, sizes, SHORT[:1])[1] == [1], "it is tried once"
    assert rows_read(model, sizes, SHORT[:2])[1] == [4, 1, 1], "filled up to four; ends compared with chunks alone"
    together, rows = rows_read(model, sizes, SHORT)
    assert rows == [12, 1, 1, 12, 12, 12, 12, 1]
    assert rows_read(model, sizes, SHORT)[1] == [12] * 5 + [1], "compared once"
    assert rows_read(model, sizes, SHORT[:8])[1] == [4, 4]
    assert_same_blocks(together, alone)
    model.iterative = True
    assert rows_read(model, sizes, SHORT[:1])[1] == [full]


def test_short_chunks_fill_a_batch_where_bits_depend_on_its_rows(encoded, monkeypatch):
    model, sizes = encoded
    monkeypatch.setattr(model_module, "_all_equal", lambda *_: False)
    full = model._rows(width_of(model, SHORT[0]))
    rows_read(model, sizes, SHORT[:1])
    rows_read(model, sizes, SHORT[:1])
    assert rows_read(model, sizes, SHORT)[1] == [full] * -(-len(SHORT) // full)
    assert rows_read(model, sizes, SHORT[:1])[1] == [full]


@needs_onednn
def test_a_number_of_rows_that_changes_bits_is_read_alone_and_not_taken_again(encoded, monkeypatch):
    model, sizes = encoded
    monkeypatch.setattr(model_module, "_all_equal", lambda *_: True)
    rows_read(model, sizes, SHORT[:1])
    alone = [rows_read(model, sizes, [text])[0][0] for text in SHORT]
    monkeypatch.setattr(model_module, "_all_equal", lambda *_: False)  # of all that was not tried yet
    blocks, rows = rows_read(model, sizes, SHORT)
    assert rows[0] > 1 and rows[1 : 3 + rows[0]] == [1] * (2 + rows[0]), "ends are compared, then each is read alone"
    for one, other in zip(blocks[: rows[0]], alone, strict=False):
        assert all(torch.equal(getattr(one, side)["down_proj"], getattr(other, side)["down_proj"]) for side in "AB")
    for _ in range(2):
        rows_read(model, sizes, SHORT)  # smaller numbers are tried, too
    assert rows_read(model, sizes, SHORT)[1] == [1] * len(SHORT)
    assert_same_blocks(blocks, alone)


@needs_onednn
def test_real_models_have_the_same_bits_together_and_alone():
    model = d2l.load("tiny", device="cpu")
    alone = [model.internalize(text).blocks[0] for text in SHORT]
    for one, other in zip([one.blocks[0] for one in model.internalize_each(SHORT)], alone, strict=True):
        assert all(torch.equal(getattr(one, side)["down_proj"], getattr(other, side)["down_proj"]) for side in "AB")


@pytest.mark.parametrize("differs", [None, 0, 3])
def test_both_ends_of_a_batch_are_compared(differs, model):
    rows, loras = [[1], [2], [3], [4]], {"down_proj": tuple(torch.randn(4, 2, 3) for _ in "AB")}
    model._encode_rows = lambda chosen, width: {
        m: tuple(side[rows.index(chosen[0]), None] + (rows.index(chosen[0]) == differs) for side in pair)
        for m, pair in loras.items()
    }
    assert model._are_as_alone(loras, rows, 24) == (differs is None)


@pytest.mark.parametrize("same", [True, False])
def test_all_bits_of_all_chunks_are_compared(same):
    alone = {"down_proj": (torch.ones(1, 2, 3), torch.zeros(1, 2, 3))}
    several = {"down_proj": tuple(side.repeat(4, 1, 1) for side in alone["down_proj"])}
    if not same:
        several["down_proj"][1][3, 1, 2] = 1e-30
    assert model_module._all_equal(several, alone) == same


def width_of(model, text: str) -> int:
    """The padded length of a text's one chunk."""
    return (len(documents.context_ids(model.tokenizer, text)) // 24 + 1) * 24


@pytest.mark.parametrize("encoder_type", ["early_exit", "per_layer_activations", "embed_only"])
def test_chunk_batches_give_the_same_blocks(encoder_type):
    model = build_model(("down_proj", "q_proj"), encoder_type=encoder_type)
    model.chunk_batch = 1
    single = model.internalize([FIRST, SECOND], chunk_tokens=20)
    model.chunk_batch, model.batch_tokens = 4, 4096
    batched = model.internalize([FIRST, SECOND], chunk_tokens=20)
    for module in single.modules:
        for one, many in zip(single.factors(module), batched.factors(module), strict=True):
            assert torch.allclose(one, many, atol=5e-6)


def test_internalize_each(model):
    model.internalize(FIRST)
    current = model.current
    each = model.internalize_each([FIRST, SECOND], chunk_tokens=20)
    assert model.current is current
    assert [adapter.documents for adapter in each] == [["document 1"], ["document 2"]]
    assert sum(each) == model.internalize([FIRST, SECOND], chunk_tokens=20)


def test_equal_chunks_are_encoded_once(model):
    seen = []
    text = "The grass is green. " * 30 + "End."
    adapter = model.internalize(text, chunk_tokens=19, progress=lambda *counts: seen.append(counts))
    assert len(adapter.blocks) == 31
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1] == (2, 2)
    assert adapter.nbytes == adapter.only(chunk=[0, 30]).nbytes
    assert adapter.blocks[3].A["down_proj"] is adapter.blocks[0].A["down_proj"]


def test_any_length(model):
    text = "".join(f"Fact {index} is {index * 7919 % 1000}. " for index in range(400))
    adapter = model.internalize(text)
    assert model.window == 256
    assert len(adapter.blocks) > 30
    assert "".join(text[slice(*block.span)] for block in adapter.blocks) == text
    assert isinstance(model.answer("Who?", max_new_tokens=2), str)


def test_features_are_not_kept(model, monkeypatch):
    """Memory does not grow with length: at any time the encoder has seen at most chunk_batch chunks."""
    sizes = []
    encode = model.encoder.encode

    def spy(ids, **options):
        sizes.append(tuple(ids.shape))
        return encode(ids, **options)

    monkeypatch.setattr(model.encoder, "encode", spy)
    model.internalize("".join(f"Fact {index}. " for index in range(100)), chunk_tokens=20)
    assert len(sizes) > 40 / model.chunk_batch
    assert all(
        rows <= model.chunk_batch and rows * length <= max(model.batch_tokens, 20 + 60) for rows, length in sizes
    )
    for block in model.current.blocks:
        for tensor in block.A.values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_internalize_ids_ignores_padding(model):
    rows = [documents.context_ids(model.tokenizer, text) for text in (FIRST, SECOND)]
    width = max(map(len, rows)) + 3
    left = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    right = torch.tensor([row + [7] * (width - len(row)) for row in rows])
    left_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    right_mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    from_text = [model.internalize(text) for text in (FIRST, SECOND)]
    for ids, mask in ((left, left_mask), (right, right_mask)):
        adapter = model.internalize_ids(ids, mask)
        assert [block.span for block in adapter.blocks] == [None, None]
        for block, text in zip(adapter.blocks, from_text, strict=True):
            assert torch.equal(block.A["down_proj"], text.blocks[0].A["down_proj"])
    assert model.current is adapter


def test_text_with_control_characters_and_emoji(model):
    for text in ("\x00\x01 a \x7f", "👩‍🚀🎉", "a\u200bb", "\ufeffBOM", "ends <end> here <eos>"):
        adapter = model.internalize(text)
        assert adapter.blocks[0].span == (0, len(text))


def test_progress_bar(model, capfd):
    model.internalize(FIRST, progress=True)
    assert "1/1" in capfd.readouterr().err


# --- the adapter acts only where it is asked to -----------------------------------------------------------------------


def test_applied_restores_everything(model):
    before, hooks = weights(model), n_hooks(model)
    base = logits_of(model, None)
    adapter = model.internalize(FIRST)
    assert (logits_of(model, adapter) - base).abs().max() > 0.1
    with pytest.raises(RuntimeError, match="inside"), model.applied(adapter):
        raise RuntimeError("inside")
    assert n_hooks(model) == hooks
    assert all(torch.equal(before[name], tensor) for name, tensor in model.base_model.state_dict().items())
    assert torch.equal(logits_of(model, None), base)


def test_current_adapter_does_not_reach_the_base_model(model):
    base = logits_of(model, None)
    model.internalize(FIRST)
    ids = torch.tensor([model.tokenizer("Who is it?")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model.base_model(ids).logits, base)


def test_which_adapter_a_call_uses(model):
    ids = torch.tensor([model.tokenizer("Who is it?")["input_ids"]])
    generate = lambda **options: model.generate(input_ids=ids, max_new_tokens=12, **options).tolist()  # noqa: E731
    base = generate()
    a = model.internalize(FIRST)
    b = model.internalize(SECOND)
    with_a, with_b = generate(adapter=a), generate(adapter=b)
    assert len({str(one) for one in (base, with_a, with_b)}) == 3
    assert generate() == with_b
    assert generate(adapter=None) == base
    with model.applied(a):
        assert generate() == with_a
        assert generate(adapter=b) == with_b
        assert generate(adapter=None) == base
        with model.applied(None):
            assert generate() == base
        assert generate() == with_a
        assert model.internalize(SECOND) == b
    model.reset()
    assert model.current is None
    assert generate() == base


def test_fresh_hypernetwork_changes_no_logit():
    tokenizer = build_tokenizer()
    base_model = build_base_model(tokenizer)
    fresh = type(random_hypernetwork(base_model))(random_hypernetwork(base_model).config)
    model = DocToLoRA(base_model, tokenizer, fresh)
    assert torch.equal(logits_of(model, model.internalize(FIRST)), logits_of(model, None))


def test_rows_of_adapters(model):
    a, b = model.internalize_each([FIRST, SECOND], chunk_tokens=20)
    ids = torch.tensor([model.tokenizer("Who is it?")["input_ids"]] * 4)
    with torch.no_grad(), model.applied([a, None, b, a]) as network:
        rows = network(ids).logits
    for row, adapter in zip(rows, (a, None, b, a), strict=True):
        assert torch.allclose(row, logits_of(model, adapter)[0], atol=1e-4)


def test_blocks_left_out_of_order(model):
    a, b = model.internalize_each([FIRST, SECOND])
    ids = torch.tensor([model.tokenizer("Who is it?")["input_ids"]])
    with_b = model.generate(input_ids=ids, max_new_tokens=8, adapter=b)
    outer, inner = model.applied(a), model.applied(b)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=8), with_b)
    inner.__exit__(None, None, None)
    assert n_hooks(model) == 0
    assert torch.equal(
        model.generate(input_ids=ids, max_new_tokens=8), model.generate(input_ids=ids, max_new_tokens=8, adapter=None)
    )


@pytest.mark.parametrize("halved", [0, 1])
def test_rows_of_adapters_that_differ_in_modules_and_precision(halved):
    """A row gets what it gets alone, whatever stands beside it."""
    model, other = build_model(("down_proj", "q_proj")), build_model(("down_proj", "v_proj"), seed=3)
    adapters = [model.internalize(FIRST), other.internalize(SECOND).as_lora()]
    adapters[halved] = adapters[halved].to(dtype=torch.bfloat16)
    ids = torch.tensor([model.tokenizer("Who is it?")["input_ids"]] * 2)
    with torch.no_grad(), model.applied(adapters) as network:
        rows = network(ids).logits
    alone = [logits_of(model, adapter)[0] for adapter in adapters]
    torch.testing.assert_close(rows[1 - halved], alone[1 - halved], rtol=0, atol=1e-4)
    assert (rows[halved] - alone[halved]).abs().max() < 0.05 * (rows[0] - rows[1]).abs().max()


# --- answers ----------------------------------------------------------------------------------------------------------


def test_batch_equals_one_by_one(model):
    adapter = model.internalize(FIRST, chunk_tokens=20)
    other = model.internalize(SECOND)
    single = [model.answer(question, adapter, max_new_tokens=8) for question in QUESTIONS]
    assert len(set(single)) > 1
    assert model.answer(QUESTIONS, adapter, max_new_tokens=8) == single
    adapters = [adapter, None, other, adapter]
    mixed = [model.answer(q, one, max_new_tokens=8) for q, one in zip(QUESTIONS, adapters, strict=True)]
    assert model.answer(QUESTIONS, adapters, max_new_tokens=8) == mixed
    model.answer_batch = 3
    assert model.answer(QUESTIONS, adapters, max_new_tokens=8) == mixed
    assert model.answer([]) == []


def test_answer_equals_a_plain_greedy_loop(model):
    adapter = model.internalize(FIRST)
    stops = documents.stop_ids(model.tokenizer)
    ids = documents.question_ids(model.tokenizer, QUESTIONS[1])
    start = len(ids)
    with torch.no_grad(), model.applied(adapter) as network:
        while len(ids) < start + 10 and ids[-1] not in stops or len(ids) == start:
            ids.append(int(network(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    expected = model.tokenizer.decode([i for i in ids[start:] if i not in stops], skip_special_tokens=True).strip()
    assert model.answer(QUESTIONS[1], max_new_tokens=10) == expected


def test_answer_stops_at_the_end_of_the_turn(model):
    end = model.tokenizer.convert_tokens_to_ids("<end>")
    letter = model.tokenizer.convert_tokens_to_ids("x")
    head = torch.zeros_like(model.base_model.lm_head.weight)
    model.base_model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    calls = []

    def force(module, args, output):
        calls.append(1)
        output = torch.zeros_like(output)
        output[..., letter if len(calls) <= 3 else end] = 1
        return output

    handle = model.base_model.lm_head.register_forward_hook(force)
    assert model.answer("Who?", max_new_tokens=20) == "xxx"
    assert len(calls) == 4
    handle.remove()


def test_answer_stays_inside_the_window(model):
    wrapping = len(documents.question_ids(model.tokenizer, "x")) - 1
    long = "x" * (model.window - wrapping - 3)
    alone = model.answer(long, max_new_tokens=50)
    assert len(model.tokenizer(alone)["input_ids"]) <= 3 * 3
    assert model.answer([long, "Who?"], max_new_tokens=50) == [alone, model.answer("Who?", max_new_tokens=50)]


def test_generate_passes_options_on(model):
    adapter = model.internalize(FIRST)
    ids = torch.tensor([documents.question_ids(model.tokenizer, question) for question in ("Who?", "Why?")])
    beams = model.generate(input_ids=ids, max_new_tokens=6, num_beams=3)
    with model.applied(adapter) as network:
        expected = network.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, num_beams=3, do_sample=False
        )
    assert torch.equal(beams, expected)
    two = model.generate(input_ids=ids, max_new_tokens=6, num_beams=3, adapter=[adapter, None])
    width = two.shape[1]
    plain = model.generate(input_ids=ids, max_new_tokens=6, num_beams=3, adapter=None)
    assert two[0].tolist() == beams[0].tolist()[:width] or two[0].tolist()[: beams.shape[1]] == beams[0].tolist()
    assert two[1].tolist()[: ids.shape[1] + 3] == plain[1].tolist()[: ids.shape[1] + 3]


def test_generate_takes_one_adapter_a_row(model):
    adapter = model.internalize(FIRST)
    for rows, adapters in ((2, [adapter]), (4, [adapter, None]), (1, [])):
        with pytest.raises(ValueError, match=f"{rows} row.s. but {len(adapters)} adapters: give one"):
            model.generate(input_ids=torch.full((rows, 3), 5), max_new_tokens=2, adapter=adapters)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_model_of_its_own(model, copied):
    adapter = model.internalize(FIRST)
    other = copied(model)
    with torch.no_grad():
        next(model.hypernetwork.parameters()).add_(1)
    assert other.internalize(FIRST) == adapter != model.internalize(FIRST)
    assert other.answer("Who?", adapter) == other.answer("Who?", other.current)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"encoder_type": "per_layer_activations", "per_layer_processing": True}])
def test_save_and_load(tmp_path, settings):
    model = build_model(("down_proj", "v_proj"), **settings)
    model.chunk_tokens = 30
    adapter = model.internalize(FIRST)
    folder = model.save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    again = d2l.load(folder, device="cpu")
    assert again.chunk_tokens == 30
    assert again.config.to_dict() == model.config.to_dict()
    assert again.internalize(FIRST) == adapter
    assert again.answer(QUESTIONS, adapter, max_new_tokens=5) == model.answer(QUESTIONS, max_new_tokens=5)
    again.save(tmp_path / "again", include_base=False)
    assert not (tmp_path / "again" / "base_model").exists()
    assert d2l.load(tmp_path / "again", device="cpu").internalize(FIRST) == adapter


def test_base_model_override(tmp_path):
    model = build_model()
    folder = model.save(tmp_path / "model")
    (folder / "base_model").rename(tmp_path / "moved")
    with pytest.raises((FileNotFoundError, ValueError)):
        d2l.load(folder)
    assert d2l.load(folder, device="cpu", base_model=tmp_path / "moved").internalize(FIRST) == model.internalize(FIRST)


def bundle_base_model(data, monkeypatch):
    """A random model whose base is the bundled "tiny" of the data folder `data`."""
    monkeypatch.setattr("d2l_lib.base_model._DATA", data)
    model = build_model()
    model.base_source = "tiny"
    model.base_model.save_pretrained(data / "tiny" / "base_model")
    model.tokenizer.save_pretrained(data / "tiny" / "base_model")
    return model


def test_bundled_names(tmp_path, monkeypatch):
    model = bundle_base_model(tmp_path, monkeypatch)
    with pytest.raises(FileNotFoundError, match="none yet"):
        d2l.load("tiny")
    for name in ("hypernetwork", "needle"):
        model.save(tmp_path / "tiny" / name)
        files = sorted(path.name for path in (tmp_path / "tiny" / name).iterdir())
        assert files == ["config.json", "hypernetwork.safetensors"]
    adapter = model.internalize(FIRST)
    assert d2l.load("tiny", device="cpu").internalize(FIRST) == adapter
    assert d2l.load("tiny/needle", device="cpu").internalize(FIRST) == adapter
    with pytest.raises(FileNotFoundError, match="hypernetwork, needle"):
        d2l.load("tiny/other")


def test_folder_with_the_name_of_a_bundled_model(tmp_path, monkeypatch):
    """A checkpoint for "tiny" means the bundled one, also in a working directory (data/, say) that holds a tiny/."""
    model = bundle_base_model(tmp_path, monkeypatch)
    folder = model.save(tmp_path / "tiny" / "hypernetwork")
    monkeypatch.chdir(tmp_path)
    for source in ("tiny", folder):
        assert d2l.load(source, device="cpu").base_source == "tiny"


def test_hub_repository_in_our_own_format(tmp_path, monkeypatch):
    """The base model inside it is fetched whole, with its weights."""
    from fnmatch import fnmatch

    folder = build_model().save(tmp_path / "model")
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]

    def download(name, allow_patterns):
        wanted = [file for file in files if any(fnmatch(file, pattern) for pattern in allow_patterns)]
        assert sorted(wanted) == sorted(files)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert d2l.load("owner/repository", device="cpu").window == 256


def test_import_is_cheap_and_leaves_the_environment_alone(project_folder):
    code = (
        "import os, sys; before = dict(os.environ); import d2l_lib; assert dict(os.environ) == before; "
        "assert not {'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules); print(d2l_lib.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=project_folder, check=False)
    assert done.returncode == 0, done.stderr
    assert "Adapter" in done.stdout
    assert d2l.Adapter is d2l.adapter.Adapter
    with pytest.raises(AttributeError, match="nonsense"):
        d2l.nonsense  # noqa: B018


# --- recorded reference values ----------------------------------------------------------------------------------------


def close(ours, reference, tolerance=1e-5):
    return (ours - reference).abs().max() <= tolerance * reference.abs().max()


@pytest.mark.parametrize("folder", ["A", "B", "B_mistral"])
def test_published_format_gives_the_reference_values(recording_of, folder):
    place = recording_of(folder)
    model = d2l.load(place / "pytorch_model.bin", device="cpu", base_model=place / "base_model")
    golden = load_file(place / "golden.safetensors")
    for case in ("case1", "case3"):
        adapter = model.internalize_ids(golden[f"{case}.ctx_ids"], golden[f"{case}.ctx_attn_mask"])
        for rows, name in zip(adapter.factors("down_proj"), "AB", strict=True):
            assert close(rows, golden[f"{case}.combined.down_proj.{name}"][0])
        ids = golden[f"{case}.input_ids"]
        with torch.no_grad(), model.applied(adapter) as network:
            assert close(network(input_ids=ids).logits, golden[f"{case}.logits"])
        with torch.no_grad():
            assert close(model.base_model(input_ids=ids).logits, golden[f"{case}.logits_base"])
        n_new = golden[f"{case}.generated"].shape[1] - ids.shape[1]
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=n_new), golden[f"{case}.generated"])
        assert torch.equal(
            model.generate(input_ids=ids, max_new_tokens=n_new, adapter=None), golden[f"{case}.generated_base"]
        )
    text = json.loads((place / "golden.json").read_text())["texts"]["case5"]
    adapter = model.internalize(text)
    assert close(adapter.blocks[0].A["down_proj"], golden["case5.lora.down_proj.A"][0])
    ids = golden["case5.input_ids"]
    generated = golden["case5.generated"]
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=generated.shape[1] - ids.shape[1]), generated)
