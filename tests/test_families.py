"""The same method on every ordinary family of base models: adapters, exports, generation, chat formats, devices."""

import copy
import json

import pytest
import torch
from tiny_models import FAMILIES, MLP_OUTPUT, build_base_model, build_tokenizer, logits_of, random_hypernetwork
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.func import functional_call
from transformers import PreTrainedTokenizerFast

import d2l_lib as d2l
from d2l_lib import documents
from d2l_lib.base_model import default_modules, load_base_model
from d2l_lib.encoder import ContextEncoder
from d2l_lib.engine import pad_rows
from d2l_lib.formats.peft import merge
from d2l_lib.lora import apply_lora
from d2l_lib.model import DocToLoRA

each_family = pytest.mark.parametrize("family", FAMILIES)
# Windows shorter than a question, where a family has them, in some of the layers or all.
SLIDING = {
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "phi3": {"sliding_window": 8},
}
TEXT = "Ada keeps 3 cats. The oldest is Tom. Tom is 19."
QUESTIONS = ["Who?", "What is the name of the oldest cat?", "Is it so?"]


def build(family: str, **settings) -> DocToLoRA:
    """A whole random model of this family that writes what `default_modules` finds."""
    tokenizer = build_tokenizer()
    base_model = build_base_model(tokenizer, family=family, **(SLIDING.get(family, {}) | settings))
    return DocToLoRA(base_model, tokenizer, random_hypernetwork(base_model, default_modules(base_model)))


# --- one adapter, four ways to apply it -------------------------------------------------------------------------------


@each_family
def test_hooks_peft_merged_weights_and_the_formula_agree(family, tmp_path):
    """y = W x + s B^T A x by hooks, as a PEFT folder, merged, and with W + s B^T A put in by hand."""
    from peft import PeftModel

    model = build(family, initializer_range=0.05)
    adapter = model.internalize(TEXT, chunk_tokens=20)
    assert adapter.modules == [MLP_OUTPUT.get(family, "down_proj")] and len(adapter.blocks) == 3
    ids = torch.tensor([model.tokenizer("Who keeps cats, and how many?")["input_ids"]])

    by_hand = dict(model.base_model.named_parameters())
    for module in adapter.modules:
        A, B = adapter.factors(module)
        for layer in range(adapter.n_layers):
            name = adapter.paths[module].format(layer=layer) + ".weight"
            by_hand[name] = by_hand[name] + adapter.scale * B[layer].T @ A[layer]
    merged = merge(model, adapter)
    peft = PeftModel.from_pretrained(copy.deepcopy(model.base_model), adapter.export_peft(tmp_path / "peft"))
    with torch.no_grad():
        plain = model.base_model(ids, use_cache=False).logits
        with model.applied(adapter) as network:
            expected = network(ids, use_cache=False).logits
        ours = {
            "formula": functional_call(model.base_model, by_hand, (ids,), {"use_cache": False}).logits,
            "merged": merged(ids, use_cache=False).logits,
            "peft": peft(input_ids=ids, use_cache=False).logits,
        }
    assert (expected - plain).abs().max() > 0.05
    differences = {name: (logits - expected).abs().max().item() for name, logits in ours.items()}
    assert max(differences.values()) < 1e-5, differences


# --- generation -------------------------------------------------------------------------------------------------------


@each_family
def test_caches_give_the_same_tokens(family):
    """A prompt and answer longer than a sliding window: no cache, the growing one and the static one."""
    model = build(family, tie_word_embeddings=False)
    adapter = model.internalize(TEXT)
    ids = torch.tensor([documents.question_ids(model.tokenizer, QUESTIONS[1])])
    options = {"max_new_tokens": 14, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, use_cache=False, **options)
    assert expected.sequences.shape[1] == ids.shape[1] + 14 and expected.past_key_values is None
    for cache in ("dynamic", "static"):
        ours = model.generate(ids, cache_implementation=cache, **options)
        assert torch.equal(ours.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(ours.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
        assert (type(ours.past_key_values).__name__ == "StaticCache") == (cache == "static")
    plain = model.generate(ids, adapter=None, **options)
    assert (plain.logits[0] - expected.logits[0]).abs().max() > 0.1
    assert torch.equal(model.generate(ids, adapter=adapter, **options).sequences, expected.sequences)


@each_family
def test_left_padded_batch_equals_one_by_one(family):
    model = build(family, tie_word_embeddings=False)
    each = model.internalize_each([TEXT, "Bob has a boat. It is called Wave."])
    rows = documents.question_ids(model.tokenizer, QUESTIONS)
    ids, mask = pad_rows(rows, 0, side="left")
    options = {"max_new_tokens": 8, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    for adapters in ([each[0]] * 3, [each[0], each[1], None]):
        together = model.generate(ids, attention_mask=mask, adapter=adapters, **options)
        for index, (row, adapter) in enumerate(zip(rows, adapters, strict=True)):
            alone = model.generate(torch.tensor([row]), adapter=adapter, **options)
            assert torch.equal(together.sequences[index, -8:], alone.sequences[0, -8:])
            ours = torch.stack(together.logits)[:, index]
            torch.testing.assert_close(ours, torch.stack(alone.logits)[:, 0], rtol=1e-4, atol=1e-4)
        one_by_one = [model.answer(*pair, max_new_tokens=8) for pair in zip(QUESTIONS, adapters, strict=True)]
        assert model.answer(QUESTIONS, adapters, max_new_tokens=8) == one_by_one


@each_family
def test_bfloat16(family):
    model = build(family, initializer_range=0.05)
    adapter = model.internalize(TEXT)
    expected, plain = logits_of(model, adapter), logits_of(model, None)
    model.base_model.bfloat16()
    half = logits_of(model, adapter)
    assert half.dtype == torch.bfloat16 and model.internalize(TEXT).blocks[0].A[adapter.modules[0]].isfinite().all()
    assert (half.float() - expected).abs().max() < 0.2 * (expected - plain).abs().max()
    assert isinstance(model.answer("Who?", max_new_tokens=4), str)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_compiled_models_answer_with_the_adapter(family):
    """Code that was compiled without hooks would ignore them without a word."""
    model = build(family)
    compiled = torch.compile(model.base_model, backend="eager")
    ids = torch.tensor([documents.question_ids(model.tokenizer, "Who?")])
    with torch.no_grad():
        plain = compiled(input_ids=ids, use_cache=False).logits
        adapter = model.internalize(TEXT)
        with model.applied(adapter) as network:
            expected = network(ids, use_cache=False).logits
            assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, expected)
            with model.applied(None):
                assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, plain)
        assert not torch.equal(expected, plain)
        assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, plain)


# --- chat formats -----------------------------------------------------------------------------------------------------

# The formats as the models' cards and papers describe them, in as few words as they take.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}SYSTEM{% endif %}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + FIRST + (m['content'] | trim)"
    " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA2 = GEMMA.replace("SYSTEM", "{{ raise_exception('System role not supported') }}").replace("FIRST + ", "")
GEMMA3 = GEMMA.replace(
    "SYSTEM", "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}"
).replace("FIRST", "(first if first and loop.first else '')")
CHATML = (
    "{% if messages[0]['role'] != 'system' %}DEFAULT{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}{% for m in turns %}"
    "{% if m['role'] == 'user' %}{{ ' [INST] ' + (system + '\n\n' if loop.first and system is defined else '') + "
    "m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
OLD_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "mistral": MISTRAL,
    "mistral, older": OLD_MISTRAL,
    "qwen2.5": CHATML.replace("DEFAULT", "{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}"),
    "qwen3": CHATML.replace("DEFAULT", ""),
    "llama3": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system }}<|eot_id|>"
        "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + (m['content'] | trim)"
        " + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "phi3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "parts only": (
        "{% for m in messages %}{{ m['role'] }}{% for part in m['content'] %}{% if part['type'] == 'text' %}"
        "{{ ': ' + part['text'] }}{% endif %}{% endfor %}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    ),
}
REFUSE_SYSTEM = ("gemma2", "mistral, older")
LONG = "First line.\n\nSecond line: 3 cats & 19."


def turns_for(name: str, *contents: tuple[str, str]) -> list[dict]:
    """Chat messages in the shape that this template reads."""
    as_parts = name == "parts only"
    return [{"role": role, "content": [{"type": "text", "text": t}] if as_parts else t} for role, t in contents]


@pytest.mark.parametrize("name", TEMPLATES)
def test_wrapping_equals_the_template_applied_by_hand(name):
    tokenizer = build_tokenizer(TEMPLATES[name])
    options = {"add_generation_prompt": True, "return_dict": False, "date_string": "26 Jul 2024"}
    if name in REFUSE_SYSTEM:  # what the others make of an empty system turn
        whole = turns_for(name, ("user", LONG))
        by_hand = tokenizer.apply_chat_template(whole, tokenize=False, **options).replace(LONG, "\n\n" + LONG)
        by_hand = tokenizer(by_hand, add_special_tokens=False)["input_ids"]
    else:
        by_hand = tokenizer.apply_chat_template(turns_for(name, ("system", ""), ("user", LONG)), **options)
    assert documents.context_ids(tokenizer, f" {LONG}\n") == by_hand
    prefix, suffix = documents.chat_affixes(tokenizer)
    assert prefix + tokenizer(LONG, add_special_tokens=False)["input_ids"] + suffix == by_hand
    question = tokenizer.apply_chat_template(turns_for(name, ("user", "Who?")), **options)
    assert documents.question_ids(tokenizer, "Who?") == question


def test_no_chat_template_says_what_to_do():
    with pytest.raises(ValueError, match="instruction-tuned version"):
        documents.context_ids(build_tokenizer(None), "Text.")


def word_tokenizer(template: str, special: dict[str, int], words: dict[str, int], **parts) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer in which these texts are single tokens with these ids; other ids start at 1,000,000."""
    pieces = dict(words)
    merges = []
    for word in words:
        for end in range(1, len(word) + 1):
            pieces.setdefault(word[:end], 1_000_000 + len(pieces))
            pieces.setdefault(word[end - 1], 1_000_000 + len(pieces))
            if end > 1 and (word[: end - 1], word[end - 1]) not in merges:
                merges.append((word[: end - 1], word[end - 1]))
    backend = Tokenizer(models.BPE(vocab=special | pieces, merges=merges))
    for name, part in parts.items():
        setattr(backend, name, part)
    names = list(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=names[0], eos_token=names[1], extra_special_tokens=names[2:],
        chat_template=template,
    )  # fmt: skip


def published_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The published tokenizer's pieces that its chat wrapping takes, under their published ids."""
    if name == "gemma":
        special = {"<bos>": 2, "<eos>": 1, "<start_of_turn>": 106, "<end_of_turn>": 107}
        words = {"\n": 108, "\n\n": 109, "\n\n\n": 110, "user": 1645, "model": 2516}
        return word_tokenizer(GEMMA2, special, words, normalizer=normalizers.Replace(" ", "▁"))
    if name == "mistral":
        words = {"▁": 28705, "\n": 13, "/": 28748, "]": 28793, "▁[": 733, "INST": 16289}
        first = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        return word_tokenizer(MISTRAL, {"<s>": 1, "</s>": 2}, words, pre_tokenizer=first)
    special = {"<|endoftext|>": 151643, "<|im_end|>": 151645, "<|im_start|>": 151644}
    words = {"Ċ": 198, "user": 872, "system": 8948, "assistant": 77091}
    parts = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False), "decoder": decoders.ByteLevel()}
    return word_tokenizer(TEMPLATES["qwen3"], special, words, **parts)


@pytest.mark.parametrize(
    ("name", "model_name", "rendered"),
    [
        ("gemma", "google/gemma-2-2b-it", "<bos><start_of_turn>user\n\n\n|<end_of_turn>\n<start_of_turn>model\n"),
        ("mistral", "mistralai/Mistral-7B-Instruct-v0.2", "<s> [INST] \n\n| [/INST]"),
        (
            "qwen",
            "Qwen/Qwen3-4B-Instruct-2507",
            "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n|<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_affixes_of_the_published_models(name, model_name, rendered, golden_root):
    known = json.loads((golden_root / "packing.json").read_text())["ctx_affixes"][model_name]
    tokenizer = published_tokenizer(name)
    assert "|".join(documents._document_wrapping(tokenizer)) == rendered
    prefix, suffix = documents.chat_affixes(tokenizer)
    assert (prefix, suffix) == (known["prefix"], known["suffix"])


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{family: the folder of a whole model}, its base model inside."""
    root = tmp_path_factory.mktemp("models")
    return {family: build(family).save(root / family) for family in ("llama", "gemma2", "phi")}


def test_device_map_of_one_device(saved):
    reference = d2l.load(saved["llama"], device="cpu")
    adapter = reference.internalize(TEXT)
    for device_map in ("auto", {"": "cpu"}):
        model = d2l.load(saved["llama"], device_map=device_map)
        if model.device.type != "cpu":
            pytest.skip("an accelerator is here: `auto` takes it")
        assert model.internalize(TEXT) == adapter
        assert torch.equal(logits_of(model, adapter), logits_of(reference, adapter))
    with pytest.raises(ValueError, match="device .* or device_map"):
        load_base_model(saved["llama"] / "base_model", device="cpu", device_map="auto")
    with pytest.raises(ValueError, match="device_map does not fit it"):
        load_base_model(saved["llama"] / "base_model", device_map="everywhere")


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("away", ["late layers", "all"])
def test_weights_on_the_disk(saved, family, away, tmp_path):
    """Layers (or everything) that wait on the disk are read when they are needed; the adapter goes along."""
    reference = d2l.load(saved[family], device="cpu")
    reference.encoder._can_be_written_out = lambda mask: False  # layers that wait on the disk are transformers' own
    adapter = reference.internalize(TEXT, chunk_tokens=20)
    inside = {name.split(".")[1] for name, _ in reference.base_model.named_modules() if name.count(".") == 1}
    device_map = {f"model.{name}": "cpu" for name in inside - {"layers"}} | {"lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": "disk" if i in (0, 2, 3) else "cpu" for i in range(4)}
    if away == "all":
        device_map = {"model": "disk", "lm_head": "disk"}
    model = d2l.load(saved[family], device_map=device_map)
    assert any(weight.is_meta for weight in model.base_model.parameters())
    assert model.base_key == reference.base_key
    assert model.internalize(TEXT, chunk_tokens=20) == adapter
    assert torch.equal(logits_of(model, adapter), logits_of(reference, adapter))
    assert not torch.equal(logits_of(model, adapter), logits_of(model, None))
    assert model.answer(QUESTIONS, adapter, max_new_tokens=5) == reference.answer(QUESTIONS, adapter, max_new_tokens=5)
    for kind, depth in (("early_exit", 2), ("per_layer_activations", None), ("embed_only", None)):
        ids = torch.tensor([documents.context_ids(model.tokenizer, TEXT)])
        ours = ContextEncoder(model.base_model, kind, depth).encode(ids)
        assert torch.equal(ours, ContextEncoder(reference.base_model, kind, depth).encode(ids))


def test_factors_go_to_where_each_linear_computes():
    """Layers on two devices, as a device_map puts them: A and B are on the linear's own."""
    model = build("llama")
    adapter = model.internalize(TEXT)
    seen = []
    linears = [layer.mlp.down_proj for layer in model.base_model.model.layers]
    linears[2].to("meta")  # a device that computes nothing, but tells where it was asked to
    loras = {m: tuple(one[None] for one in adapter.factors(m)) for m in adapter.modules}
    with apply_lora(model.base_model, loras, adapter.scale):
        for linear in linears:
            (hook,) = linear._forward_hooks.values()
            seen.append(hook.keywords["delta"](torch.ones(1, 2, 48, device=linear.weight.device)).device)
    assert [device.type for device in seen] == ["cpu", "cpu", "meta", "cpu"]
