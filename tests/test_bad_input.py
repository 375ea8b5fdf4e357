"""Bad documents, questions, adapters and files get an error that says what to do; nothing half-done is left."""

import pickle

import numpy as np
import pytest
import torch
from tiny_models import build_base_model, build_model, build_tokenizer, random_hypernetwork

import d2l_lib as d2l
from d2l_lib import base_model as base_model_module
from d2l_lib import loading
from d2l_lib.adapter import Adapter
from d2l_lib.model import DocToLoRA

DOCUMENT = "Ada keeps 3 cats. The oldest is Tom."


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(scope="module")
def adapter(model):
    return model.internalize(DOCUMENT)


# --- documents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " ", "\n\t ", "\u200b\u200e", "\x00\x01\x02", "\ufeff"])
def test_document_without_text(model, text):
    current = model.current
    with pytest.raises(ValueError, match="holds no text"):
        model.internalize(text)
    with pytest.raises(ValueError, match="'document 2' holds no text"):
        model.internalize([DOCUMENT, text])
    assert model.current is current


@pytest.mark.parametrize("value", [None, 3, b"bytes", ["a", None], {"x": 4}, [["a"]], object(), float("nan")])
def test_document_that_is_no_text(model, value):
    with pytest.raises(TypeError, match="not|must be"):
        model.internalize(value)


def test_bytes_say_how_to_decode(model):
    with pytest.raises(TypeError, match="decode"):
        model.internalize([b"bytes"])


@pytest.mark.parametrize("nothing", [[], {}, ()])
def test_no_documents(model, nothing):
    with pytest.raises(ValueError, match="no documents"):
        model.internalize(nothing)
    with pytest.raises(ValueError, match="no documents"):
        model.internalize_each(nothing)


@pytest.mark.parametrize("name", ["", " ", 3, None])
def test_document_names(model, name):
    with pytest.raises(TypeError, match="document name"):
        model.internalize({name: DOCUMENT})


def test_unpaired_surrogate(model):
    with pytest.raises(ValueError, match="surrogate at character 2"):
        model.internalize("ab\ud800")
    with pytest.raises(ValueError, match="surrogate"):
        model.answer("ab\ud800")


@pytest.mark.parametrize("chunk_tokens", [0, -1, 1.5, "20", True, 10_000])
def test_chunk_tokens(model, chunk_tokens):
    with pytest.raises(ValueError, match="chunk_tokens must be a whole number from 1 to"):
        model.internalize(DOCUMENT, chunk_tokens=chunk_tokens)


def test_progress_must_be_callable(model):
    with pytest.raises(TypeError, match="progress"):
        model.internalize(DOCUMENT, progress="yes")


def test_ready_made_ids(model):
    for ids in (torch.zeros(3, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 4)):
        with pytest.raises(ValueError, match="token ids must be whole numbers"):
            model.internalize_ids(ids)
    with pytest.raises(ValueError, match="attention_mask is"):
        model.internalize_ids(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 3))
    with pytest.raises(ValueError, match="vocabulary of 261"):
        model.internalize_ids(torch.tensor([[1, 261]]))
    with pytest.raises(ValueError, match="vocabulary of 261"):
        model.generate(input_ids=torch.tensor([[-1, 5]]))
    with pytest.raises(ValueError, match="chunk 0 has 300 tokens.*reads 256"):
        model.internalize_ids(torch.ones(1, 300, dtype=torch.long))
    with pytest.raises(ValueError, match="chunk 1 has no token"):
        model.internalize_ids(torch.ones(2, 4, dtype=torch.long), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]))


def test_failed_internalize_changes_nothing(adapter):
    model = build_model()
    model.internalize(DOCUMENT)
    current = model.current
    model.hypernetwork.train()
    with torch.no_grad():
        model.hypernetwork.head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.internalize("Other text.")
    assert model.current is current
    assert model.hypernetwork.training


# --- questions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["", "  \n"])
def test_blank_question(model, question):
    with pytest.raises(ValueError, match="question holds no text"):
        model.answer(question)


@pytest.mark.parametrize("question", [[3], [None], ["Who?", b"x"]])
def test_question_that_is_no_text(model, question):
    with pytest.raises(TypeError, match=r"question \d is"):
        model.answer(question)


@pytest.mark.parametrize("question", [None, 3, b"Who?", {"q": "Who?"}])
def test_question_must_be_text_or_list(model, question):
    with pytest.raises(TypeError, match="the question must be"):
        model.answer(question)


def test_question_longer_than_the_window(model):
    with pytest.raises(ValueError, match=r"the question takes \d+ tokens.*window is 256.*internalize the long part"):
        model.answer("x" * 300)
    with pytest.raises(ValueError, match="question 2 of 2"):
        model.answer(["Who?", "x" * 300])
    with pytest.raises(ValueError, match="input_ids holds 300 tokens"):
        model.generate(input_ids=torch.ones(1, 300, dtype=torch.long))


@pytest.mark.parametrize("count", [0, -1, 2.5, None, True])
def test_max_new_tokens(model, count):
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.answer("Who?", max_new_tokens=count)


def test_number_of_adapters(model, adapter):
    with pytest.raises(ValueError, match="2 question.* but 1 adapters"):
        model.answer(["Who?", "What?"], [adapter])
    with pytest.raises(ValueError, match="1 question.* but 2 adapters"):
        model.answer("Who?", [adapter, adapter])
    with pytest.raises(ValueError, match="list of adapters is empty"), model.applied([]):
        pass


def test_numpy_numbers_are_numbers(model):
    """Rows, counts and weights often come out of a table."""
    adapter = model.internalize(DOCUMENT, chunk_tokens=np.int64(20))
    assert adapter == model.internalize(DOCUMENT, chunk_tokens=20)
    assert adapter.only(chunk=np.int64(1)) == adapter.only(chunk=1)
    assert adapter.without(chunk=np.array([0, 1])) == adapter.without(chunk=[0, 1])
    assert adapter.scaled(np.float32(0.5)) == adapter.scaled(0.5)
    assert adapter.compressed(np.int64(2)) == adapter.compressed(2)
    assert model.answer("Who?", max_new_tokens=np.int64(2)) == model.answer("Who?", max_new_tokens=2)


def test_choices_that_are_no_names_or_numbers(adapter):
    for document in (3, [3], [["document"]]):
        with pytest.raises(TypeError, match="a document's name"):
            adapter.only(document=document)
    for chunk in ("x", [0, "x"], True, 0.0):
        with pytest.raises(TypeError, match="a chunk's number"):
            adapter.without(chunk=chunk)


def test_weights_stay_finite(adapter):
    with pytest.raises(ValueError, match="weight of Block.* must be a finite number, not inf"):
        adapter.scaled(1e200).scaled(1e200)
    with pytest.raises(ValueError, match="bias_weight must be a finite number"):
        adapter.scaled_bias(1e200).scaled_bias(1e200)


def test_precision_of_adapters(adapter):
    half = adapter.to(dtype=torch.bfloat16)
    assert half != adapter
    with pytest.raises(ValueError, match=r"different precision \(torch.float32, torch.bfloat16\).*to\(dtype"):
        adapter + half
    with pytest.raises(ValueError, match="floating-point"):
        adapter.to(dtype=torch.int32)


def test_questions_need_an_order(model):
    with pytest.raises(TypeError, match="the question must be"):
        model.answer({"Who?", "Why?"})


def test_token_ids_of_any_whole_type(model):
    ids = torch.tensor([[70, 80, 90]])
    expected = model.generate(input_ids=ids, max_new_tokens=2)
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(model.generate(input_ids=ids.to(dtype), max_new_tokens=2), expected)
    with pytest.raises(ValueError, match="whole numbers"):
        model.generate(input_ids=ids.bool())


@pytest.mark.parametrize("mask", [[1, 1, 0], [0, 0, 0]])
def test_padding_where_the_answer_goes(model, mask):
    with pytest.raises(ValueError, match="row 1 ends in padding.*pad on the left"):
        model.generate(input_ids=torch.full((2, 3), 70), attention_mask=torch.tensor([[1, 1, 1], mask]))


def test_what_is_no_adapter(model):
    for wrong in ("adapter", 3, {"a": 1}):
        with pytest.raises(TypeError, match="expected an Adapter"):
            model.generate(input_ids=torch.ones(1, 3, dtype=torch.long), adapter=wrong)
        with pytest.raises(TypeError, match="expected an Adapter"):
            model.answer("Who?", wrong)
    with pytest.raises(TypeError, match="expected Adapters"):
        model.answer(["Who?", "Why?"], [None, 3])


@pytest.mark.parametrize("wrong", ["x", 3, object(), "document"])
@pytest.mark.parametrize("blocks", [None, 1])
def test_what_is_no_adapter_is_found_before_anything_is_computed(model, adapter, wrong, blocks, monkeypatch):
    def compute(*arguments, **options):
        raise AssertionError("the model was run")

    monkeypatch.setattr(model.base_model, "forward", compute)
    monkeypatch.setattr(model, "answer_batch", 2)
    questions = ["Who?"] * 5
    for given in (wrong, [adapter] * 4 + [wrong], [wrong] + [None] * 4, ([None] * 4 + [wrong])):
        with pytest.raises(TypeError, match="expected (an )?Adapter"):
            model.answer(questions, given, blocks=blocks)
        with pytest.raises(TypeError, match="expected (an )?Adapter"), model.applied(given):
            pass
    stranger = build_model(seed=7).internalize(DOCUMENT)
    with pytest.raises(ValueError, match="another hypernetwork"):
        model.answer(questions, [adapter] * 4 + [stranger], blocks=blocks)
    with pytest.raises(TypeError, match="Mapping|dict|expected"):
        model.answer(questions, {"document": adapter}, blocks=blocks)


# --- places and precisions --------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_read(monkeypatch):
    """No weights are read."""

    def read(*arguments, **options):
        raise AssertionError(f"read {arguments}")

    for name in ("load_checkpoint", "read_published", "load_base_model", "read_whole"):
        monkeypatch.setattr(loading, name, read)
    monkeypatch.setattr(base_model_module, "without_code", read)


PLACES = [
    ({"device": "nonsense"}, ValueError, "unknown device 'nonsense'; devices here: cpu"),
    ({"device": ""}, ValueError, "unknown device ''"),
    ({"device": 0.5}, TypeError, "device must be a name such as 'cpu'"),
    ({"device": 99}, TypeError, "device must be a name"),
    ({"device": ["cpu"]}, TypeError, "device must be a name"),
    ({"device": "cpu:7"}, ValueError, "'cpu:7' is not here"),
    ({"device": "cuda:99"}, ValueError, "'cuda:99' is not here"),
    ({"device": torch.device("meta")}, ValueError, "'meta' is not here"),
    ({"device": "hpu"}, ValueError, "'hpu' cannot be used here"),
    ({"dtype": "foo"}, TypeError, "dtype must be torch.float32, torch.bfloat16 or torch.float16"),
    ({"dtype": "float32"}, TypeError, "dtype must be torch.float32"),
    ({"dtype": float}, TypeError, "dtype must be torch.float32"),
    ({"dtype": torch.int8}, ValueError, "cannot run in torch.int8: give torch.float32"),
    ({"dtype": torch.bool}, ValueError, "cannot run in torch.bool"),
    ({"dtype": torch.complex64}, ValueError, "cannot run in torch.complex64"),
    ({"dtype": torch.float8_e4m3fn}, ValueError, "cannot run in torch.float8_e4m3fn"),
    ({"device_map": 3}, TypeError, "device_map must be 'auto' or"),
    ({"device": "cpu", "device_map": "auto"}, ValueError, "or device_map"),
]


@pytest.mark.usefixtures("nothing_read")
@pytest.mark.parametrize(("options", "error", "message"), PLACES)
def test_where_no_model_can_be(options, error, message):
    with pytest.raises(error, match=message):
        d2l.load("tiny", **options)
    with pytest.raises(error, match=message):
        base_model_module.load_base_model("tiny", **options)


@pytest.mark.usefixtures("nothing_read")
def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:0", torch.device("cuda")):
        with pytest.raises(ValueError, match=r"'cuda(:0)?' is not here; devices here: cpu.*None takes the fastest"):
            d2l.load("tiny", device=device)


@pytest.mark.usefixtures("nothing_read")
def test_sources_that_are_no_names():
    for source in (None, 3, b"tiny", ["tiny"], {}):
        with pytest.raises(TypeError, match="source must be a name or path"):
            d2l.load(source)
    for source in ("", "  "):
        with pytest.raises(ValueError, match="must be a name or path"):
            d2l.load(source)
    for name in ("base_model", "encoder_model"):
        with pytest.raises(TypeError, match=f"{name} must be a name, a path or None, not int"):
            d2l.load("tiny", **{name: 3})


# --- models that do not belong together -------------------------------------------------------------------------------


def test_adapter_for_another_model(adapter):
    for other, message in (
        (build_model(n_layers=2), "blocks for 4 layers, this model has 2: was it made for another model"),
        (build_model(base_seed=5), "other weights"),
    ):
        with pytest.raises(ValueError, match=message):
            other.answer("Who?", adapter)
        with pytest.raises(ValueError, match="different base models"):
            adapter + other.internalize(DOCUMENT)


def test_adapter_of_another_hypernetwork(adapter):
    other = build_model(seed=7)
    own = other.internalize(DOCUMENT)
    for refused in ([adapter], [own, adapter], [adapter.compressed(2)]):
        with pytest.raises(ValueError, match=r"another hypernetwork.*as_lora\(\)"):
            other.answer(["Who?"] * len(refused), refused, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"different hypernetworks.*as_lora\(\)"):
        adapter + own


def test_adapter_of_another_hypernetwork_as_a_plain_lora(adapter):
    """Knowingly: the same update, the bias as a block, and it can be added."""
    other, ids = build_model(seed=7), torch.tensor([[5, 6, 7, 8]])
    own, plain = other.internalize(DOCUMENT), adapter.as_lora()
    assert plain.documents == [*adapter.documents, "bias"] and plain.bias is None and not plain.hypernetwork_key
    assert plain.as_lora() is plain
    assert adapter.compressed(2).as_lora().documents == adapter.compressed(2).documents
    for module in adapter.modules:
        for one, same in zip(
            adapter.scaled_bias(0.5).factors(module), adapter.scaled_bias(0.5).as_lora().factors(module), strict=True
        ):
            assert torch.equal(one, same)
    with torch.no_grad(), other.applied(plain) as network:
        logits = network(ids).logits
    with torch.no_grad(), build_model().applied(adapter) as network:
        torch.testing.assert_close(logits, network(ids).logits, rtol=0, atol=1e-5)
    both = own + plain
    assert both.hypernetwork_key == own.hypernetwork_key
    assert both.documents == [*own.documents, *(f"{name} (2)" for name in adapter.documents), "bias"]
    assert isinstance(other.answer("Who?", both, max_new_tokens=2), str)


def test_retrained_hypernetwork_is_another_one():
    model = build_model()
    before = model.internalize(DOCUMENT)
    with torch.no_grad():
        for parameter in model.hypernetwork.parameters():
            parameter.add_(0.01)
    with pytest.raises(ValueError, match="different hypernetworks"):
        before + model.internalize(DOCUMENT)


def test_hypernetwork_for_another_base_model():
    tokenizer = build_tokenizer()
    hypernetwork = random_hypernetwork(build_base_model(tokenizer))
    with pytest.raises(ValueError, match="writes for 4 layers, this base model has 2.*base_model="):
        DocToLoRA(build_base_model(tokenizer, n_layers=2), tokenizer, hypernetwork)
    with pytest.raises(ValueError, match="down_proj 48 -> 32"):
        DocToLoRA(build_base_model(tokenizer, hidden_size=64), tokenizer, hypernetwork)


def test_tokenizer_without_chat_template():
    tokenizer = build_tokenizer(chat_template=None)
    base_model = build_base_model(tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        DocToLoRA(base_model, tokenizer, random_hypernetwork(base_model))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["nonsense", "/nonsense/model", "./nonsense", "nonsense.bin", "./dir/nonsense.bin"])
def test_nothing_there(source):
    with pytest.raises(FileNotFoundError, match="nothing at.*model.save wrote"):
        d2l.load(source)


def test_hub_that_is_not_reached():
    with pytest.raises(FileNotFoundError, match="hub gave no repository nobody/nothing.*download it"):
        d2l.load("nobody/nothing")


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither hypernetwork.safetensors nor"):
        d2l.load(tmp_path)
    build_base_model(build_tokenizer()).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="looks like a base model"):
        d2l.load(tmp_path)
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"several checkpoints.*a\.bin, b\.bin"):
        d2l.load(tmp_path)


def test_base_model_that_is_missing(tmp_path, model):
    model.save(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        d2l.load(tmp_path / "model", base_model=tmp_path / "nowhere")


def test_damaged_model_folders(tmp_path, model):
    folder = model.save(tmp_path / "model")
    whole = (folder / "hypernetwork.safetensors").read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2]):
        (folder / "hypernetwork.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="hypernetwork.safetensors"):
            d2l.load(folder)
    (folder / "hypernetwork.safetensors").write_bytes(whole)
    (folder / "config.json").write_text('{"format": ')
    with pytest.raises(ValueError, match="config.json"):
        d2l.load(folder)


def test_damaged_published_checkpoint(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    for content in (b"", b"not a pickle", pickle.dumps({"a": 1}, protocol=2)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="pytorch_model.bin"):
            d2l.load(path)


class Attack:
    def __reduce__(self):
        return exec, ("raise SystemExit('code out of a checkpoint ran')",)


def test_checkpoint_that_would_run_code(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"base_model_name_or_path": "x", "hypernet_config": Attack()}, path)
    with pytest.raises(ValueError, match="exec"):
        d2l.load(path, base_model="tiny")


def test_interrupted_save_leaves_the_old_model(tmp_path, model, monkeypatch):
    folder = model.save(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model.tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space"):
        model.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_save_without_base_needs_a_name(tmp_path, model):
    with pytest.raises(ValueError, match="include_base=True"):
        model.save(tmp_path / "model", include_base=False)
    assert list(tmp_path.iterdir()) == []


def test_missing_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        Adapter.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        Adapter.load(tmp_path)


def test_damaged_adapters(tmp_path, model, adapter):
    path = adapter.save(tmp_path / "adapter")
    whole = path.read_bytes()
    for damaged in (b"", b"x" * 50, whole[:7], whole[:200], whole[:-1], whole + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            Adapter.load(path)


def test_adapter_files_that_hold_something_else(tmp_path, adapter):
    from safetensors.torch import save_file

    path = tmp_path / "adapter"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="holds tensors but no adapter"):
        Adapter.load(path)
    for header in ("{}", "[1]", "{", '{"version": 1}', '{"version": 1, "blocks": [{}], "bias": null}'):
        save_file({"x": torch.zeros(2)}, path, metadata={"d2l-adapter": header})
        with pytest.raises(ValueError, match="damaged header"):
            Adapter.load(path)
    infinite = adapter.save(path).read_bytes().replace(b'\\"weight\\": 1.0', b'\\"weight\\": NaN', 1)
    path.write_bytes(infinite)
    with pytest.raises(ValueError, match="damaged header.*finite number, not nan"):
        Adapter.load(path)
    save_file({"x": torch.zeros(2)}, path, metadata={"d2l-adapter": '{"version": 99}'})
    with pytest.raises(ValueError, match="format version 99"):
        Adapter.load(path)


def test_export_over_a_file(tmp_path, adapter):
    (tmp_path / "peft").write_text("precious")
    with pytest.raises(NotADirectoryError, match="is a file"):
        adapter.export_peft(tmp_path / "peft")
    assert (tmp_path / "peft").read_text() == "precious"


def test_names_with_markup_are_escaped(model):
    page = model.internalize({"<img src=x onerror=alert(1)>": DOCUMENT})._repr_html_()
    assert "<img" not in page
