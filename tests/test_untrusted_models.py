"""Model folders from anywhere: code that lies in them is neither run nor asked about, and their templates end."""

import builtins
import json
import os
import pickle
import shutil
import sys
import types

import pytest
import torch
from PIL import Image
from tiny_models import (
    CHAT_TEMPLATE,
    PARTS_TEMPLATE,
    build_base_model,
    build_model,
    build_tokenizer,
    build_vision_model,
)

import d2l_lib as d2l
from d2l_lib import documents
from d2l_lib.base_model import NeedsCode, load_base_model, load_processor
from d2l_lib.encoder import image_inputs
from d2l_lib.training import selfgen

CODE = """
open({mark!r}, "w").write("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, ProcessorMixin
class Config(LlamaConfig):
    model_type = "{kind}"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
class Processor(ProcessorMixin):
    pass
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A whole model in one folder, base model included."""
    return build_model().save(tmp_path_factory.mktemp("saved") / "model", include_base=True)


@pytest.fixture(scope="module")
def saved_vision(tmp_path_factory):
    """A vision-language model with its processor."""
    folder = tmp_path_factory.mktemp("saved") / "vision"
    model, processor = build_vision_model("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def nothing_asked(monkeypatch):
    """No question on the terminal, as one that nobody answers would stop a run for ever."""

    def ask(*arguments):
        raise AssertionError(f"asked {arguments}")

    monkeypatch.setattr(builtins, "input", ask)


def changed(path, **fields):
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | fields))


def ask_for_code(folder, door):
    """Make a model folder name code of its own; the file that would tell that it ran."""
    mark = folder.parent / "ran"
    kind = f"own_{door}"
    (folder / "own.py").write_text(CODE.format(mark=str(mark), kind=kind))
    if door == "config":
        changed(folder / "config.json", model_type=kind, auto_map={"AutoConfig": "own.Config"})
    elif door == "model":  # a configuration that transformers knows, but no language model for it
        auto_map = {f"AutoModelFor{task}": "own.Model" for task in ("CausalLM", "ImageTextToText")}
        changed(folder / "config.json", model_type="clip_vision_model", architectures=["Model"], auto_map=auto_map)
    elif door == "known model":
        auto_map = {"AutoModelForCausalLM": "own.Model", "AutoTokenizer": [None, "own.Tokenizer"]}
        changed(folder / "config.json", architectures=["Model"], auto_map=auto_map)
    elif door == "tokenizer":
        auto_map = {"AutoTokenizer": [None, "own.Tokenizer"]}
        changed(folder / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=auto_map)
    elif door == "attention":
        changed(folder / "config.json", attn_implementation="somebody/own-attention")
    elif door == "attention of a part":
        changed(folder / "config.json", attn_implementation={"": "sdpa", "text_config": "somebody/own@main:attend"})
    return mark


DOORS = ("config", "model", "tokenizer", "attention")


@pytest.mark.usefixtures("nothing_asked")
@pytest.mark.parametrize("door", DOORS)
def test_code_of_a_base_model_is_not_run(saved, tmp_path, door):
    whole = shutil.copytree(saved, tmp_path / "model")
    mark = ask_for_code(whole / "base_model", door)
    with pytest.raises(NeedsCode, match="not run here"):
        load_base_model(whole / "base_model", device="cpu")
    with pytest.raises(NeedsCode, match="not run here"):
        d2l.load(whole, device="cpu")
    with pytest.raises(NeedsCode, match="not run here"):
        d2l.load(saved, device="cpu", base_model=whole / "base_model")
    with pytest.raises(NeedsCode, match="not run here"):
        d2l.load(saved, device="cpu", encoder_model=whole / "base_model")
    assert not mark.exists() and "own" not in sys.modules


@pytest.mark.usefixtures("nothing_asked")
@pytest.mark.parametrize("door", [door for door in DOORS if door != "model"])
def test_code_of_a_teacher_is_not_run(saved, tmp_path, door, monkeypatch):
    started = []
    engine = types.ModuleType("vllm")
    engine.LLM = lambda **options: started.append(options)
    monkeypatch.setitem(sys.modules, "vllm", engine)
    folder = shutil.copytree(saved / "base_model", tmp_path / "model")
    mark = ask_for_code(folder, door)
    with pytest.raises(NeedsCode, match="not run here"):
        selfgen.VllmEngine(str(folder))
    assert not started and not mark.exists()
    selfgen.VllmEngine(str(saved / "base_model"))
    assert len(started) == 1 and not started[0].get("trust_remote_code")


@pytest.mark.usefixtures("nothing_asked")
def test_a_model_that_needs_none_of_its_code_is_built_without_it(saved, tmp_path):
    folder = shutil.copytree(saved / "base_model", tmp_path / "model")
    mark = ask_for_code(folder, "known model")
    model, _ = load_base_model(folder, device="cpu")
    assert type(model).__module__.startswith("transformers.models.llama")
    assert not mark.exists()


@pytest.mark.usefixtures("nothing_asked")
def test_code_of_one_part_of_a_model_is_not_run(saved_vision, tmp_path):
    folder = shutil.copytree(saved_vision, tmp_path / "model")
    mark = ask_for_code(folder, "attention of a part")
    with pytest.raises(NeedsCode, match="somebody/own"):
        load_base_model(folder, device="cpu")
    assert not mark.exists()


@pytest.mark.usefixtures("nothing_asked")
@pytest.mark.parametrize("file", ["processor_config.json", "preprocessor_config.json"])
def test_code_of_a_processor_is_not_run(saved_vision, tmp_path, file):
    folder = shutil.copytree(saved_vision, tmp_path / "model")
    mark = ask_for_code(folder, "processor")
    for other in ("processor_config.json", "preprocessor_config.json"):
        (folder / other).unlink(missing_ok=True)
    changed(folder / file, processor_class="Processor", auto_map={"AutoProcessor": "own.Processor"})
    with pytest.raises(NeedsCode, match="not run here"):
        load_processor(folder)
    assert not mark.exists()


@pytest.mark.usefixtures("nothing_asked")
def test_code_for_generating_is_not_run(saved, tmp_path):
    """A folder custom_generate/ beside the weights would replace `generate`."""
    whole = shutil.copytree(saved, tmp_path / "model")
    mark = tmp_path / "ran"
    (whole / "base_model" / "custom_generate").mkdir()
    code = f"open({str(mark)!r}, 'w')\ndef generate(model, input_ids, **options):\n    return input_ids\n"
    (whole / "base_model" / "custom_generate" / "generate.py").write_text(code)
    model, reference = (d2l.load(folder, device="cpu") for folder in (whole, saved))
    assert model.answer("Who?", max_new_tokens=4) == reference.answer("Who?", max_new_tokens=4) != ""
    for options in ({"custom_generate": str(whole / "base_model")}, {"trust_remote_code": True}):
        with pytest.raises(ValueError, match="not run here"):
            model.generate(input_ids=torch.tensor([[5, 6]]), **options)
    assert not mark.exists()


class Runs:
    """A pickle of this makes a folder when it is opened carelessly."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_pickled_weights_run_nothing(tmp_path):
    model = build_base_model(build_tokenizer())
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(weights, folder / "pytorch_model.bin")
    loaded, _ = load_base_model(folder, device="cpu")  # the format itself is read
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    torch.save(weights | {"more": Runs(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises((ValueError, FileNotFoundError), match="model"):
        load_base_model(folder, device="cpu")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(tmp_path / "ran"), protocol=2))
    with pytest.raises((ValueError, FileNotFoundError), match="model"):
        load_base_model(folder, device="cpu")
    assert not (tmp_path / "ran").exists()


# --- chat templates ---------------------------------------------------------------------------------------------------

ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__'] }}",
    "{{ messages.append.__self__.__class__.__base__ }}{{ namespace.__init__.__globals__.os.mkdir('ran') }}",
    "{% set x = messages.append(1) %}",
)
FAILURES = ("{% import 'os' as os %}", "{% include '/etc/hostname' %}", "{{ 1 // 0 }}", "{% for %}", "{{ no.such }}",
            "{{ messages[7]['content'] }}", "{% for i in range(10 ** 9) %}{% endfor %}", "{{ 'a' + 1 }}")  # fmt: skip
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def model_with(template, saved, folder):
    """The saved model with another chat template in a file beside its tokenizer."""
    whole = shutil.copytree(saved, folder)
    (whole / "base_model" / "chat_template.jinja").write_text(template + CHAT_TEMPLATE)
    return whole


@pytest.mark.parametrize("template", [*ESCAPES, *FAILURES])
def test_hostile_templates_are_refused(tmp_path, template, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = build_tokenizer(template + CHAT_TEMPLATE)
    problem = "what no template may do" if template in ESCAPES else "chat template failed"
    for use in (documents.chat_affixes, documents.stop_ids, lambda t: documents.question_ids(t, "Who?", "Be brief.")):
        with pytest.raises(ValueError, match=problem) as caught:
            use(tokenizer)
        assert len(str(caught.value)) < 500
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("template", [ESCAPES[0], FAILURES[0]])
def test_a_model_with_a_hostile_template_reads_and_answers_nothing(saved, tmp_path, template):
    model = d2l.load(model_with(template, saved, tmp_path / "model"), device="cpu")
    for use in (model.internalize, model.answer):
        with pytest.raises(ValueError, match="chat template"):
            use("Ada keeps 3 cats.")


def test_a_template_without_end_is_stopped(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "TEMPLATE_SECONDS", 0.1)
    with pytest.raises(ValueError, match="does not end: stopped after 0.1 s"):
        documents.chat_affixes(build_tokenizer(NESTED + CHAT_TEMPLATE))
    model = d2l.load(model_with(NESTED, saved, tmp_path / "model"), device="cpu")
    with pytest.raises(ValueError, match="does not end"):
        model.answer("Who?")
    assert sys.gettrace() is None
    monkeypatch.setattr(documents, "TEMPLATE_SECONDS", 60)
    assert documents.chat_affixes(build_tokenizer(CHAT_TEMPLATE))  # others go on as before
    assert sys.gettrace() is None


def test_a_debugger_keeps_its_place_while_templates_are_rendered():
    seen = []

    def watch(frame, event, argument):
        seen.append(frame.f_code.co_filename)

    sys.settrace(watch)
    try:
        documents.chat_affixes(build_tokenizer())
        assert sys.gettrace() is watch
    finally:
        sys.settrace(None)
    assert "<template>" in seen


@pytest.mark.parametrize(("template", "problem"), [(ESCAPES[0], "may do"), (FAILURES[0], "failed"), (NESTED, "end")])
def test_hostile_templates_of_processors_are_refused(template, problem, monkeypatch):
    if "end" in problem:
        monkeypatch.setattr(documents, "TEMPLATE_SECONDS", 0.1)
    _, processor = build_vision_model("llava")
    picture = Image.new("RGB", (16, 16))
    assert "input_ids" in image_inputs(processor, picture)
    processor.chat_template = template + PARTS_TEMPLATE
    with pytest.raises(ValueError, match=f"chat template .*{problem}"):
        image_inputs(processor, picture)


def test_a_model_of_another_chat_template_answers_by_it(saved, tmp_path):
    """What the tests above change is what counts."""
    model = d2l.load(model_with("{{ 'Attention! ' }}", saved, tmp_path / "model"), device="cpu")
    before = model.tokenizer.decode(documents.question_ids(model.tokenizer, "Who?"))
    assert before.startswith("Attention!")
