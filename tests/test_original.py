"""The original's Python example runs here with its import lines changed, and gives the recorded ids.

The calls are those of its examples/python_api.py; the paths, the question and the number of tokens are the recording's.
"""

import json
import shutil

import pytest
import torch as real_torch
from safetensors.torch import load_file
from tiny_models import build_base_model, build_tokenizer, random_hypernetwork

from d2l_lib.documents import question_ids
from d2l_lib.formats import pickles
from d2l_lib.formats.checkpoints import export
from d2l_lib.original import ModulatedPretrainedModel, get_tokenizer, torch


@pytest.mark.parametrize("name", ["A", "B", "B_mistral"])
@pytest.mark.parametrize("moved", [False, True], ids=["in place", "moved"])
def test_the_example_gives_the_recorded_ids(recording_of, tmp_path, monkeypatch, name, moved):
    place = recording_of(name)
    if moved:  # where neither the stored base path nor the working directory leads to the base model
        shutil.copytree(place / "base_model", tmp_path / "base_model")
        shutil.copy(place / "pytorch_model.bin", tmp_path)
    monkeypatch.chdir(tmp_path)
    recorded = load_file(place / "golden.safetensors")
    texts = json.loads((place / "golden.json").read_text())["texts"]
    (tmp_path / "document.txt").write_text(texts["case5"])

    checkpoint_path = str((tmp_path if moved else place) / "pytorch_model.bin")
    state_dict = torch.load(checkpoint_path, weights_only=False)
    model = ModulatedPretrainedModel.from_state_dict(state_dict, train=False, use_sequence_packing=False)
    model.reset()
    tokenizer = get_tokenizer(model.base_model.name_or_path)

    doc = open("document.txt").read()  # noqa: SIM115
    chat = [{"role": "user", "content": texts["question"]}]
    chat_ids = tokenizer.apply_chat_template(
        chat,
        add_special_tokens=False,
        return_attention_mask=False,
        add_generation_prompt=True,
        return_tensors="pt",
    ).to(model.device)
    model.internalize(doc)
    outputs = model.generate(input_ids=chat_ids, max_new_tokens=8)

    assert real_torch.equal(chat_ids, recorded["case5.input_ids"])
    assert real_torch.equal(outputs, recorded["case5.generated"])
    assert tokenizer.decode(outputs[0]) == tokenizer.decode(recorded["case5.generated"][0])

    model.reset()
    without = model.generate(input_ids=chat_ids, max_new_tokens=8)
    assert real_torch.equal(without, model.base_model.generate(chat_ids, max_new_tokens=8, do_sample=False))
    assert not real_torch.equal(without, outputs)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random checkpoint in the published format with its base model beside it."""
    folder = tmp_path_factory.mktemp("published")
    tokenizer = build_tokenizer()
    base_model = build_base_model(tokenizer)
    base_model.save_pretrained(folder / "base_model")
    tokenizer.save_pretrained(folder / "base_model")
    hypernetwork = random_hypernetwork(base_model, n_heads=16, n_kv_heads=4, head_dim=128)
    return export(hypernetwork, folder / "pytorch_model.bin", "nobody/nothing")


def test_the_state_dict_can_be_used_again(checkpoint):
    state_dict = torch.load(checkpoint, map_location="cpu", weights_only=True)
    before = {name: value.clone() for name, value in state_dict.items() if isinstance(value, real_torch.Tensor)}
    first = ModulatedPretrainedModel.from_state_dict(state_dict, device="cpu")
    with real_torch.no_grad():
        first.hypernetwork.head.weight += 1
    second = ModulatedPretrainedModel.from_state_dict(state_dict, train=False, device="cpu")
    assert list(state_dict) == [*before, "base_model_name_or_path", "hypernet_config", "ctx_encoder_args"]
    assert all(real_torch.equal(state_dict[name], value) for name, value in before.items())
    assert real_torch.equal(second.hypernetwork.head.weight, before["head.weight"])
    assert state_dict["base_model_name_or_path"] == str(checkpoint.parent / "base_model")


def test_the_base_model_may_be_another_one_than_stored(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open(checkpoint, "rb") as file:  # no folder to look into
        state_dict = torch.load(file)
    assert state_dict["base_model_name_or_path"] == "nobody/nothing"
    with pytest.raises(FileNotFoundError, match="nobody/nothing.*pass base_model="):
        ModulatedPretrainedModel.from_state_dict(state_dict)
    base_model = checkpoint.parent / "base_model"
    assert ModulatedPretrainedModel.from_state_dict(state_dict, base_model=base_model).base_source == str(base_model)
    state_dict["base_model_name_or_path"] = str(base_model)  # as one had to with the original
    assert ModulatedPretrainedModel.from_state_dict(state_dict).base_source == str(base_model)


def test_load_is_restricted_and_the_rest_is_torch(tmp_path):
    path = tmp_path / "x.bin"
    real_torch.save({"base_model_name_or_path": "x", "hypernet_config": eval}, path)
    with pytest.raises(pickles.CheckpointError, match="asks for builtins.eval"):
        torch.load(path, weights_only=False)
    assert torch.float32 is real_torch.float32 and torch.no_grad is real_torch.no_grad
    with pytest.raises(AttributeError, match="nonsense"):
        torch.nonsense  # noqa: B018


def test_generate_takes_what_a_tokenizer_makes_of_a_chat(checkpoint):
    model = ModulatedPretrainedModel.from_state_dict(torch.load(checkpoint), device="cpu")
    tokenizer = get_tokenizer(checkpoint.parent / "base_model")
    model.internalize("Ada keeps three cats.")
    chats = [[{"role": "user", "content": text}] for text in ("Who?", "How many cats are there?")]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "padding": True}
    batch = tokenizer.apply_chat_template(chats, return_dict=True, **options)
    together = model.generate(input_ids=batch, max_new_tokens=4)[:, -4:]
    for row, chat in zip(together, chats, strict=True):
        alone = tokenizer.apply_chat_template(chat, **options)
        assert alone[0].tolist() == question_ids(tokenizer, chat[0]["content"])
        assert real_torch.equal(model.generate(input_ids=alone, max_new_tokens=4)[0, -4:], row)
    with pytest.raises(TypeError):
        model.generate(batch)  # the original's first argument was another
    with pytest.raises(ValueError, match="train=False"):
        ModulatedPretrainedModel.from_state_dict(torch.load(checkpoint), train=True)


def test_an_encoder_of_4_bits_runs_in_full_precision_without_cuda_and_says_so(tmp_path, checkpoint):
    import d2l_lib as d2l

    base_model = checkpoint.parent / "base_model"
    plain = d2l.load(checkpoint, device="cpu")
    config = type(plain.config).from_dict(plain.config.to_dict() | {"encoder_4bit": True})
    plain.hypernetwork.config = config
    path = export(plain.hypernetwork, tmp_path / "four" / "pytorch_model.bin", str(base_model))
    with pytest.warns(UserWarning, match="4-bit precision; here it runs in full precision.*not CUDA") as said:
        model = d2l.load(path, device="cpu")
    assert len(said) == 1 and said[0].filename == __file__
    assert model.encoder.model is model.base_model and model.config.encoder_4bit
    with pytest.warns(UserWarning, match="full precision"):
        again = d2l.load(model.save(tmp_path / "own"), device="cpu")
    assert again.config.encoder_4bit
    document = "Ada keeps three cats."
    blocks = [one.internalize(document).blocks[0].A["down_proj"] for one in (plain, model, again)]
    assert real_torch.equal(blocks[0], blocks[1]) and real_torch.equal(blocks[0], blocks[2])


def test_an_encoder_of_4_bits(golden_root, monkeypatch, tmp_path):
    """As on CUDA with bitsandbytes: a 4-bit copy of the base model reads, the base model itself answers."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    import d2l_lib as d2l

    monkeypatch.setattr("d2l_lib.loading._can_quantize", lambda device: True)
    plain = d2l.load(golden_root / "A" / "pytorch_model.bin", device="cpu")
    plain.hypernetwork.config = type(plain.config).from_dict(plain.config.to_dict() | {"encoder_4bit": True})
    path = export(plain.hypernetwork, tmp_path / "pytorch_model.bin", str(golden_root / "A" / "base_model"))
    model = d2l.load(path, device="cpu", dtype=real_torch.float32)
    assert not any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.base_model.modules())
    compared = 0
    for path, exact in model.base_model.named_modules():
        rounded = model.encoder.model.get_submodule(path)
        if isinstance(rounded, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(rounded.weight.data, rounded.weight.quant_state).float()
            assert 1e-3 < (weight - exact.weight).norm() / exact.weight.norm() < 0.15, path
            compared += 1
    assert compared == 7 * model.config.n_layers
    document = "Ada keeps three cats."
    exact, rounded = (one.internalize(document).blocks[0].A["down_proj"] for one in (plain, model))
    assert not real_torch.equal(exact, rounded)
    again = d2l.load(model.save(tmp_path / "own"), device="cpu")
    assert again.encoder.model is not again.base_model
    assert real_torch.equal(again.internalize(document).blocks[0].A["down_proj"], rounded)
