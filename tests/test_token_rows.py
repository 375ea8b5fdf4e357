"""Token rows: what each row writes, chunks alone and in batches, files, adding and removing documents."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import CHAT_TEMPLATE, build_base_model, build_model, build_rows_model, build_tokenizer, logits_of
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import d2l_lib as d2l
from d2l_lib.analysis import weights
from d2l_lib.analysis.attribution import attribute
from d2l_lib.documents import context_ids, stop_ids
from d2l_lib.formats import peft
from d2l_lib.model import DocToLoRA
from d2l_lib.routing import key_scores, relevance, route
from d2l_lib.token_rows import TokenRows, Words

TEXTS = {"a": "Ada lives in Velm.", "b": "The lake is cold, and so is the long night.", "c": "Bo"}


@pytest.fixture(scope="module")
def model():
    return build_rows_model()


@pytest.fixture(scope="module")
def each(model):
    return dict(zip(TEXTS, model.internalize_each(TEXTS), strict=True))


def direction_of(model, token: int) -> torch.Tensor:
    """The unit vector that tells a token from all others, by a plain formula."""
    base = model.base_model
    e = (base.get_output_embeddings().weight * base.model.norm.weight).double()
    away = e - e.mean(0)
    C = away.T @ away / len(e)
    vector = torch.linalg.solve(C + 0.05 * C.diagonal().mean() * torch.eye(len(C)), away[token])
    return (vector / vector.norm()).float()


def test_every_token_of_the_text_has_three_rows_that_write_it_and_one_of_context(model, each):
    gains = model.hypernetwork.log_gain.exp()
    assert gains.unique().numel() == 3
    for name, text in TEXTS.items():
        (block,) = each[name].blocks
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert block.rank == 4 * len(ids)
        assert block.A["down_proj"].shape == (1, 4 * len(ids), model.config.latent_size)
        B = block.B["down_proj"][0]
        for t, token in enumerate(ids):
            for k, written in enumerate((token, token, stop_ids(model.tokenizer)[0])):
                torch.testing.assert_close(B[4 * t + k], gains[k] * direction_of(model, written), rtol=1e-3, atol=1e-3)
            assert not B[4 * t + 3].any()


def test_words_are_held_once(model):
    once, often = (model.internalize_each([text])[0].blocks for text in ("Velm lake.", "Velm lake. " * 9))
    different = set(model.tokenizer("Velm lake.", add_special_tokens=False)["input_ids"])
    assert len(often[0].B.table) == len(once[0].B.table) == 2 * len(different) + 2
    assert often[0].rank > 8 * once[0].rank
    blocks = model.internalize("Ada lives in Velm. " * 30, chunk_tokens=40).blocks
    assert len(blocks) > 5 and len({id(block.B.table) for block in blocks}) == 1
    codes = {id(block.A["down_proj"]): block.A["down_proj"].nbytes + block.B.rows.nbytes for block in blocks}
    assert model.current.nbytes == sum(codes.values()) + blocks[0].B.table.nbytes


def dense(adapter):
    """The adapter as files of before hold it: B of each block as one tensor."""
    return replace(adapter, blocks=tuple(replace(block, B=dict(block.B)) for block in adapter.blocks))


def test_adapters_of_before_are_read_and_add_up_with_new_ones(model, each, tmp_path):
    a, b = each["a"], each["b"]
    path = dense(a).save(tmp_path / "before")
    assert json.loads(safe_open(path, "pt").metadata()["d2l-adapter"])["version"] == 1
    before = d2l.Adapter.load(path)
    assert before == a and before.nbytes > 1.4 * a.nbytes
    torch.testing.assert_close(logits_of(model, before), logits_of(model, a), rtol=1e-5, atol=1e-5)
    mixed = before + b
    torch.testing.assert_close(logits_of(model, mixed), logits_of(model, a + b), rtol=1e-5, atol=1e-5)
    assert d2l.Adapter.load(mixed.save(tmp_path / "mixed")) == mixed


def test_files_whose_rows_name_nothing_are_refused(each, tmp_path):
    path = each["a"].save(tmp_path / "a")
    tensors, labels = load_file(path), {"d2l-adapter": safe_open(path, "pt").metadata()["d2l-adapter"]}
    rows = "block0.B.rows"
    own = tensors[rows]
    for wrong in (own + 1000, own + 0.5, own - 5, own[:-1], own[None]):
        save_file(tensors | {rows: wrong.contiguous()}, tmp_path / "b", labels)
        with pytest.raises(ValueError, match="damaged header.*(rows|expected)"):
            d2l.Adapter.load(tmp_path / "b")
    save_file(tensors | {"block0.B.table": tensors["block0.B.table"][0]}, tmp_path / "b", labels)
    with pytest.raises(ValueError, match="names rows that block0.B.table lacks"):
        d2l.Adapter.load(tmp_path / "b")


def test_blocks_in_half_precision(model, each, tmp_path):
    model.block_dtype = torch.float16
    try:
        half = model.internalize({"a": TEXTS["a"]})
        assert half == each["a"].to(dtype=torch.float16) and half.nbytes < 0.6 * each["a"].nbytes
        assert (logits_of(model, half) - logits_of(model, each["a"])).abs().max() < 0.05
        model.save(tmp_path / "model", include_base=True)
        assert d2l.load(tmp_path / "model").block_dtype is torch.float16
        with torch.no_grad():
            model.hypernetwork.roles.weight *= torch.inf
        with pytest.raises(ValueError, match="NaN or infinity"):
            model.internalize("Bo")
    finally:
        model.block_dtype = None
        model.hypernetwork.load_state_dict(build_rows_model().hypernetwork.state_dict())


def spaced_tokenizer():
    """The small tokenizer with the tokens "the" and " the"."""
    tokenizer = build_tokenizer()
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [("t", "h"), ("th", "e"), ("\u0120", "the")]
    for left, right in merges:
        whole["model"]["vocab"][left + right] = len(whole["model"]["vocab"])
    whole["model"]["merges"] = [list(pair) for pair in merges]
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    backend = Tokenizer.from_str(json.dumps(whole))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, chat_template=CHAT_TEMPLATE)


def test_rows_write_the_tokens_of_the_document_and_words_are_alike_whatever_stands_before_them():
    tokenizer = spaced_tokenizer()
    words = Words(build_base_model(tokenizer), tokenizer)
    plain, spaced, capital = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("t", " the", "T"))
    whole = tokenizer("the", add_special_tokens=False)["input_ids"]
    parts = tokenizer("\N{SNOWMAN}", add_special_tokens=False)["input_ids"]
    assert list(map(len, (plain, spaced, capital, whole, parts))) == [1, 1, 1, 1, 3] and whole != spaced
    ids = [*spaced, *whole, *plain, *capital, *parts]
    assert words.tokens(torch.tensor(ids)).tolist() == [[token, token, stop_ids(tokenizer)[0]] for token in ids]
    the, same, t, same_t, *broken = words.alike(torch.tensor(ids)).tolist()
    assert the == same and t == same_t and len({the, t, *broken}) == 5 and broken == parts


def test_a_chunk_in_a_batch_is_the_chunk_alone(model, each):
    for name, text in TEXTS.items():
        assert model.internalize({name: text}) == each[name]
    # and codes are those of the text's own states, as in training: chat wrapping and padding are not mixed in
    net, ids = model.hypernetwork, torch.tensor([context_ids(model.tokenizer, TEXTS["a"])])
    own = slice(net.words.before, ids.shape[1] - net.words.after)
    assert model.tokenizer.decode(ids[0, own]) == TEXTS["a"]
    with torch.no_grad():
        features = model.encoder.encode(ids, torch.ones_like(ids))[:, own]
        codes = net.codes(features, torch.ones(features.shape[:2], dtype=torch.bool))
    torch.testing.assert_close(each["a"].blocks[0].A["down_proj"], codes.flatten(1, 2), rtol=1e-4, atol=1e-4)


def test_model_and_adapter_survive_files(model, each, tmp_path):
    model.reading = replace(model.reading, temperature=0.7, null_logit=-0.5)
    try:
        model.save(tmp_path / "model", include_base=True)
        again = d2l.load(tmp_path / "model")
        assert (
            again.reading == model.reading
            and again.writes_rows
            and "4 rows a token on down_proj of layers 2 and 3" in repr(again)
        )
        assert again.config == model.config and again.internalize({"a": TEXTS["a"]}) == each["a"]
    finally:
        model.reading = type(model.reading)()
    both = each["a"] + each["b"].scaled(0.5)
    loaded = d2l.Adapter.load(both.save(tmp_path / "both.safetensors"))
    assert loaded == both and loaded.is_rows
    assert torch.equal(logits_of(model, loaded), logits_of(model, both))


def test_documents_are_added_and_taken_out(model, each):
    a, b, c = each.values()
    plain, of_a = logits_of(model, None), logits_of(model, a)
    assert (of_a - plain).abs().max() > 0.1
    whole = a + b + c
    assert (logits_of(model, whole) - of_a).abs().max() > 0.01
    assert torch.equal(logits_of(model, whole.without("b")), logits_of(model, a + c))
    assert torch.equal(logits_of(model, whole.only("a")), of_a)
    torch.testing.assert_close(logits_of(model, c + b + a), logits_of(model, whole), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(model, a + b.scaled(0)), of_a, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits_of(model, whole.without(["a", "b", "c"])), plain)
    torch.testing.assert_close(logits_of(model, a.scaled(0)), plain, rtol=1e-5, atol=1e-5)


def test_what_adds_adapters_up_refuses_rows(model, each, tmp_path):
    a = each["a"]
    both = a + each["b"]
    refused = (
        lambda: a.factors("down_proj"),
        lambda: a.compressed(2),
        lambda: a.as_lora(),
        lambda: a.stacked,
        lambda: peft.export_peft(a, tmp_path / "peft"),
        lambda: peft.merge(model, a),
        lambda: weights.spectra(a),
        lambda: weights.norms(a),
        lambda: weights.block_energy(a),
        lambda: relevance(model, ["Who?"], [both]),
        lambda: key_scores(model, ["Who?"], [both]),
        lambda: route(model, ["Who?"], [both]),
        lambda: attribute(model, both, "Who?", "Ada", "layer"),
    )
    for number, call in enumerate(refused):
        try:
            call()
        except ValueError as error:
            assert "token rows" in str(error), (number, error)
        else:
            pytest.fail(f"number {number} took rows")
    assert not (tmp_path / "peft").exists()
    with pytest.raises(ValueError, match=r"analysis\.attribution which chunk or sentence"):
        a.factors("down_proj")
    with pytest.raises(ValueError, match="leave blocks out"):
        model.answer("Who?", both, blocks=1)
    assert not build_model().internalize("A.").is_rows


def test_a_network_without_words_and_settings_that_do_not_fit_say_so(model):
    bare = TokenRows(model.config)
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(RuntimeError, match=r"prepare\(base_model, tokenizer\)"):
        bare(torch.zeros(1, 4, model.config.feature_size), ids, ids)
    for change in ({"rank": 2}, {"n_layers": 2}, {"use_bias": True}):
        with pytest.raises(ValueError, match="4 a token"):
            TokenRows(replace(model.config, **change))
    for change in ({"encoder_layers": ()}, {"row_layers": ()}, {"reader_layers": ()}):
        with pytest.raises(ValueError, match="go together"):
            replace(model.config, **change)
    for layers in ((2, 1), (3,)):
        with pytest.raises(ValueError, match="a lower one and the last"):
            replace(model.config, row_layers=layers)
    with pytest.raises(ValueError, match="writer is"):
        replace(model.config, writer="nobody")


def test_what_rows_cannot_be_written_for_is_refused(model):
    text = context_ids(model.tokenizer, "Bo")
    assert model.internalize_ids(torch.tensor([text])).blocks[0].rank == 8
    with pytest.raises(ValueError, match="has no text"):
        model.internalize_ids(torch.tensor([text[:5]]))
    with pytest.raises(ValueError, match="token rows are for texts"):
        model.internalize(Image.new("RGB", (8, 8)))
    other = build_tokenizer()
    assert DocToLoRA(model.base_model, model.tokenizer, model.hypernetwork, encoder_tokenizer=other).writes_rows
    with pytest.raises(ValueError, match="the base model's tokenizer"):
        DocToLoRA(model.base_model, model.tokenizer, model.hypernetwork, encoder_tokenizer=spaced_tokenizer())
