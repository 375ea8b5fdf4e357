"""Context encoders that are not the base model: other tokenizers, widths and families, and models that see images."""

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import (
    HIDDEN,
    N_LAYERS,
    NO_SYSTEM_TEMPLATE,
    PARTS_TEMPLATE,
    VISION_FAMILIES,
    build_base_model,
    build_model,
    build_tokenizer,
    build_vision_model,
    logits_of,
    random_hypernetwork,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import d2l_lib as d2l
from d2l_lib import documents
from d2l_lib.base_model import final_norm
from d2l_lib.encoder import ContextEncoder, image_inputs
from d2l_lib.formats.checkpoints import save_checkpoint
from d2l_lib.formats.peft import merge
from d2l_lib.hypernetwork import Hypernetwork
from d2l_lib.model import DocToLoRA
from d2l_lib.presets import HypernetworkPreset, preset
from d2l_lib.training.batches import IGNORED, Batch, Chunks
from d2l_lib.training.contexts import NeedleBatches
from d2l_lib.training.loop import Run
from d2l_lib.training.recipes import Base, hypernetwork_config, train_hypernetwork
from d2l_lib.training.step import Internalization

TEXT = "Ada keeps 3 cats. The oldest is Tom. Tom is 19."
OTHER_TEXT = "Bob has a boat. It is called Wave."
SIZES = {"latent_size": 16, "n_latent_queries": 6, "n_blocks": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8}
each_vision_family = pytest.mark.parametrize("family", VISION_FAMILIES)
each_type = pytest.mark.parametrize("encoder_type", ["early_exit", "per_layer_activations", "embed_only"])


def other_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character but the space, in another order and another chat format than the base model's."""
    characters = [chr(code) for code in range(126, 32, -1)]
    words = {token: index for index, token in enumerate(["<pad>", "<eos>", "<bos>", "<start>", "<end>", *characters])}
    backend = Tokenizer(models.WordLevel(words, unk_token="~"))
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        extra_special_tokens=["<start>", "<end>"],
        chat_template=NO_SYSTEM_TEMPLATE,
    )


def with_encoder(encoder_type: str = "early_exit", source: str | None = None) -> DocToLoRA:
    """A Llama that answers and a wider, deeper Gemma-2 that reads, by its own tokenizer."""
    tokenizer, reader = build_tokenizer(), other_tokenizer()
    base_model = build_base_model(tokenizer)
    encoder_model = build_base_model(reader, family="gemma2", hidden_size=48, n_layers=6, seed=3)
    depth = {"per_layer_activations": N_LAYERS}.get(encoder_type)
    hypernetwork = random_hypernetwork(
        base_model, feature_size=48, encoder_type=encoder_type, encoder_layer=depth, encoder_model="some/encoder"
    )
    encoder = ContextEncoder.from_config(encoder_model, hypernetwork.config, source)
    return DocToLoRA(base_model, tokenizer, hypernetwork, encoder=encoder, encoder_tokenizer=reader)


def picture(seed: int, size: tuple[int, int] = (20, 30)) -> Image.Image:
    """Random coloured noise."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def with_vision_encoder(family: str, encoder_type: str = "early_exit") -> DocToLoRA:
    """A Llama that answers and a vision-language model that reads."""
    tokenizer = build_tokenizer()
    base_model = build_base_model(tokenizer)
    vision_model, processor = build_vision_model(family, hidden_size=48, seed=2)
    hypernetwork = random_hypernetwork(base_model, feature_size=48, encoder_type=encoder_type)
    encoder = ContextEncoder.from_config(vision_model, hypernetwork.config)
    encoder.processor = processor
    return DocToLoRA(base_model, tokenizer, hypernetwork, encoder=encoder, encoder_tokenizer=processor.tokenizer)


# --- another language model -------------------------------------------------------------------------------------------


@each_type
def test_blocks_come_from_the_encoders_features_of_its_own_tokens(encoder_type):
    model = with_encoder(encoder_type)
    adapter = model.internalize(TEXT)
    ids = torch.tensor([documents.context_ids(model.encoder_tokenizer, TEXT)])
    assert ids.tolist() != [documents.context_ids(model.tokenizer, TEXT)]
    with torch.no_grad():
        features = model.encoder.encode(ids)
        A, B = model.hypernetwork(features, attention_mask=torch.ones_like(ids))["down_proj"]
    assert A.shape == (1, N_LAYERS, 2, 48) and B.shape == (1, N_LAYERS, 2, HIDDEN)
    assert torch.allclose(adapter.blocks[0].A["down_proj"], A[0], atol=1e-6)
    assert torch.allclose(adapter.blocks[0].B["down_proj"], B[0], atol=1e-6)
    assert (logits_of(model, adapter) - logits_of(model, None)).abs().max() > 0.1
    assert isinstance(model.answer("Who?", adapter, max_new_tokens=4), str)
    assert "Gemma2ForCausalLM" in repr(model)


@torch.no_grad()
def test_hidden_states_stand_side_by_side_and_padding_changes_none():
    tokenizer = build_tokenizer()
    model = build_base_model(tokenizer)
    encoder = ContextEncoder(model, "hidden_states", encoder_layers=(0, 2, 3))
    assert (encoder.feature_size, encoder.n_layers_run) == (3 * model.config.hidden_size, 3)
    ids = torch.tensor([[7, 9, 30, 12, 8], [40, 21, 13, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    features = encoder.encode(ids, mask)
    for row, length in enumerate((5, 3)):
        states = model.model(ids[row : row + 1, :length], output_hidden_states=True).hidden_states
        expected = torch.cat([states[layer] for layer in (0, 2, 3)], -1)[0]
        torch.testing.assert_close(features[row, :length], expected, rtol=1e-4, atol=1e-4)
    last = ContextEncoder(model, "hidden_states", encoder_layers=(N_LAYERS,)).encode(ids[:1], mask[:1])
    kept = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    model.model(ids[:1])
    handle.remove()
    torch.testing.assert_close(last, kept[0], rtol=1e-4, atol=1e-4)  # before the final norm
    for layers, reason in (((), "unknown"), ((N_LAYERS + 1,), "do not fit"), ((-1,), "do not fit")):
        with pytest.raises(ValueError, match=reason):
            ContextEncoder(model, "hidden_states", encoder_layers=layers)


def test_chunks_are_measured_in_the_encoders_tokens():
    """Spaces take no token in the encoder's tokenizer and one in the base model's."""
    text = "a b c d e f. " * 6
    model = with_encoder()
    assert len(model.internalize(text, chunk_tokens=14).blocks) == 3  # sentences of 7 tokens, two by two
    assert len(build_model().internalize(text, chunk_tokens=14).blocks) == 6


def test_saved_with_its_encoder_and_loaded_again(tmp_path):
    model = with_encoder("per_layer_activations")
    adapter, answer = model.internalize([TEXT, OTHER_TEXT], chunk_tokens=20), model.answer("Who?", max_new_tokens=6)
    with pytest.raises(ValueError, match="base model has no name .* include_base=True"):
        model.save(tmp_path / "nothing", include_base=False)
    assert not (tmp_path / "nothing").exists()
    folder = model.save(tmp_path / "whole")
    again = d2l.load(folder, device="cpu")
    assert again.internalize([TEXT, OTHER_TEXT], chunk_tokens=20) == adapter
    assert again.answer("Who?", max_new_tokens=6) == answer
    assert again.encoder.model.config.model_type == "gemma2" and len(again.encoder_tokenizer) == 99

    by_name = again.save(tmp_path / "by_name")  # both models are found by the paths that they were loaded from
    assert {path.name for path in by_name.iterdir()} == {"hypernetwork.safetensors", "config.json"}
    third = d2l.load(by_name, device="cpu")
    assert third.encoder.source == str(folder / "encoder_model")
    assert third.internalize([TEXT, OTHER_TEXT], chunk_tokens=20) == adapter
    moved = (folder / "encoder_model").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="encoder_model"):
        d2l.load(by_name, device="cpu")
    fourth = d2l.load(by_name, device="cpu", encoder_model=moved)
    assert fourth.internalize([TEXT, OTHER_TEXT], chunk_tokens=20) == adapter


def test_the_encoder_that_the_configuration_names_is_loaded(tmp_path):
    """As in published checkpoints: no word of it in the folder but in the hypernetwork's own settings."""
    model = with_encoder()
    folder = model.save(tmp_path / "whole")
    model.encoder.source = str(folder / "encoder_model")
    config = model.config.to_dict() | {"encoder_model": model.encoder.source}
    hypernetwork = Hypernetwork(type(model.config)(**config))
    hypernetwork.load_state_dict(model.hypernetwork.state_dict())
    save_checkpoint(tmp_path / "bare", hypernetwork, {"base_model": str(folder / "base_model")})
    again = d2l.load(tmp_path / "bare", device="cpu")
    assert again.internalize(TEXT).blocks == model.internalize(TEXT).blocks


def test_encoders_that_do_not_fit():
    model = with_encoder()
    parts = (model.base_model, model.tokenizer, model.hypernetwork)
    with pytest.raises(ValueError, match="pass encoder_tokenizer"):
        DocToLoRA(*parts, encoder=model.encoder)
    with pytest.raises(ValueError, match="features of size 48, this context encoder gives 32"):
        DocToLoRA(*parts)
    per_layer = with_encoder("per_layer_activations")
    deep = ContextEncoder(per_layer.encoder.model, "per_layer_activations")
    with pytest.raises(ValueError, match="writes 4 layers from as many hidden states, this context encoder gives 6"):
        DocToLoRA(
            per_layer.base_model,
            per_layer.tokenizer,
            per_layer.hypernetwork,
            encoder=deep,
            encoder_tokenizer=per_layer.encoder_tokenizer,
        )


def test_configuration_for_an_encoder():
    base_model, encoder_model = build_base_model(family="phi"), build_base_model(hidden_size=48, n_layers=6)
    p = HypernetworkPreset(**SIZES, rank=3, encoder_layer=None, encoder_type="per_layer_activations")
    config = hypernetwork_config(p, base_model, "some/base", encoder_model, "some/encoder")
    assert config.modules == ["fc2"] and config.feature_size == 48
    assert (config.encoder_layer, config.encoder_model, config.base_model) == (N_LAYERS, "some/encoder", "some/base")
    with pytest.raises(ValueError, match="does not fit a model of 2 layers"):
        hypernetwork_config(p, base_model, "some/base", build_base_model(n_layers=2), "some/encoder")


def test_needle_batches_hold_the_encoders_tokens():
    p, tokenizer, reader = preset("tiny").needle, build_tokenizer(), other_tokenizer()
    ours, theirs = NeedleBatches(tokenizer, p, 0, encoder_tokenizer=reader)[5], NeedleBatches(tokenizer, p, 0)[5]
    assert torch.equal(ours.input_ids, theirs.input_ids)
    prefix, suffix = documents.chat_affixes(reader)
    for ids, mask in zip(ours.chunks.ids, ours.chunks.mask, strict=True):
        for row, real in zip(ids.tolist(), mask.sum(1).tolist(), strict=True):
            assert row[: len(prefix)] == prefix and row[real - len(suffix) : real] == suffix
            assert max(row) < len(reader)


# --- images -----------------------------------------------------------------------------------------------------------


@each_vision_family
@torch.no_grad()
def test_features_of_an_image_are_the_language_parts_hidden_states(family):
    """With the picture's features in place; nothing of the model is changed."""
    model, processor = build_vision_model(family)
    inputs = image_inputs(processor, picture(0))
    states = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    norm = final_norm(model)
    for depth in (0, 1, 3):
        torch.testing.assert_close(ContextEncoder(model, "early_exit", depth).encode(**inputs), norm(states[depth]))
    per_layer = ContextEncoder(model, "per_layer_activations").encode(**inputs)
    torch.testing.assert_close(per_layer[:, :-1], torch.stack(states[: N_LAYERS - 1], dim=1))
    torch.testing.assert_close(per_layer[:, -1], norm(states[N_LAYERS - 1]))
    torch.testing.assert_close(ContextEncoder(model, "embed_only").encode(**inputs), states[0])
    place = inputs["input_ids"][0] == processor.tokenizer.image_token_id
    assert 4 <= int(place.sum()) <= 16
    other = ContextEncoder(model, "embed_only").encode(**image_inputs(processor, picture(1)))
    differs = (other - states[0]).abs().amax(-1)[0] > 1e-3
    assert torch.equal(differs, place)
    after = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(states, after, strict=True))


@each_vision_family
@each_type
def test_images_become_labelled_blocks(family, encoder_type):
    model = with_vision_encoder(family, encoder_type)
    red, blue = picture(1), picture(2, size=(40, 25))
    adapter = model.internalize({"red": red, "note": TEXT, "blue": blue}, chunk_tokens=20)
    assert model.current is adapter and adapter.documents == ["red", "note", "blue"]
    assert [(block.document, block.chunk) for block in adapter.blocks] == [
        ("red", 0), ("note", 0), ("note", 1), ("note", 2), ("blue", 0),
    ]  # fmt: skip
    for block in (adapter.blocks[0], adapter.blocks[-1]):
        assert block.span is None
        assert block.A["down_proj"].shape == (N_LAYERS, 2, 48) and block.B["down_proj"].shape == (N_LAYERS, 2, HIDDEN)
    assert not torch.equal(adapter.blocks[0].A["down_proj"], adapter.blocks[-1].A["down_proj"])
    assert adapter.only(document="red") == model.internalize({"red": red})
    assert adapter.without(document=["red", "blue"]) == model.internalize({"note": TEXT}, chunk_tokens=20)
    assert (logits_of(model, adapter.only(document="red")) - logits_of(model, None)).abs().max() > 0.1
    assert isinstance(model.answer("What is it?", adapter, max_new_tokens=4), str)


def test_names_of_images():
    model = with_vision_encoder("gemma3")
    assert model.internalize(picture(0)).documents == ["image"]
    assert model.internalize([TEXT, picture(0), picture(1)]).documents == ["document 1", "document 2", "document 3"]
    one, other = model.internalize_each({"a": picture(0), "b": picture(1)})
    assert (one.documents, other.documents) == (["a"], ["b"])
    counts = []
    model.internalize([TEXT, picture(0)], progress=lambda *now: counts.append(now))
    assert counts == [(1, 2), (2, 2)]


def test_every_kind_of_picture_is_read_in_colour():
    model = with_vision_encoder("llava")
    grey = picture(0).convert("L")
    expected = model.internalize({"x": grey.convert("RGB")})
    for kind in ("L", "RGBA", "P"):
        assert model.internalize({"x": grey.convert(kind)}).blocks[0].A["down_proj"].isfinite().all()
    assert model.internalize({"x": grey}) == expected


def test_the_image_chat_equals_the_template_applied_by_hand():
    _, processor = build_vision_model("gemma3")
    text = "<bos><start>system\n<end>\n<start>user\n{}<end>\n<start>assistant\n"
    seen = text.format("\n\n<image>" + "<soft>" * 4 + "<eoi>\n\n")
    ids = processor.tokenizer(seen, add_special_tokens=False)["input_ids"]
    assert image_inputs(processor, picture(0))["input_ids"].tolist() == [ids]
    start = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    processor.chat_template = start + PARTS_TEMPLATE
    ids = processor.tokenizer(seen.replace("<start>system\n<end>\n", ""), add_special_tokens=False)["input_ids"]
    assert image_inputs(processor, picture(0))["input_ids"].tolist() == [ids]
    processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        image_inputs(processor, picture(0))


def test_images_that_cannot_be_read():
    text_only = build_model()
    with pytest.raises(ValueError, match="reads text only: images need"):
        text_only.internalize({"note": TEXT, "photo": picture(0)})
    assert text_only.current is None
    model = with_vision_encoder("gemma3")
    file = io.BytesIO()
    picture(0, size=(200, 200)).save(file, "png")
    cut = Image.open(io.BytesIO(file.getvalue()[:5000]))
    with pytest.raises(ValueError, match="image 'cut' could not be read"):
        model.internalize({"whole": picture(0), "cut": cut})
    model.encoder.processor.image_seq_length = 400
    model.encoder.processor.full_image_sequence = "<image>" + "<soft>" * 400 + "<eoi>"
    with pytest.raises(ValueError, match="image 'photo' takes 4.. tokens, the context encoder reads 256"):
        model.internalize({"photo": picture(0)})
    for wrong in (np.zeros((4, 4, 3)), 7, None, b"bytes"):
        with pytest.raises(TypeError, match="text"):
            model.internalize(wrong)
        with pytest.raises(TypeError, match="text"):
            model.internalize({"a": wrong, "b": picture(0)})
    with pytest.raises(TypeError, match="name"):
        model.internalize({"": picture(0)})
    assert model.current is None


@each_vision_family
def test_a_vision_language_model_answers_and_reads(family, tmp_path):
    """It is base model and context encoder in one: blocks go to its language part; saved and loaded with both."""
    from peft import PeftModel

    network, processor = build_vision_model(family)
    model = DocToLoRA(network, processor.tokenizer, random_hypernetwork(network))
    model.encoder.processor = processor
    adapter = model.internalize({"photo": picture(0), "note": TEXT})
    assert "language_model" in adapter.paths["down_proj"]
    answer = model.answer("What is it?", max_new_tokens=6)
    assert (logits_of(model, adapter) - logits_of(model, None)).abs().max() > 0.1
    peft = PeftModel.from_pretrained(copy.deepcopy(network), adapter.export_peft(tmp_path / "peft"))
    ids = torch.tensor([model.tokenizer("Who is it?")["input_ids"]])
    with torch.no_grad():
        for other in (merge(model, adapter), peft):
            torch.testing.assert_close(other(input_ids=ids).logits, logits_of(model, adapter), rtol=1e-4, atol=1e-4)
    again = d2l.load(model.save(tmp_path / "whole"), device="cpu")
    assert type(again.base_model) is type(network) and again.encoder.model is again.base_model
    assert again.internalize({"photo": picture(0), "note": TEXT}) == adapter
    assert again.answer("What is it?", max_new_tokens=6) == answer


def test_vision_encoder_saved_and_loaded_again(tmp_path):
    model = with_vision_encoder("gemma3", "per_layer_activations")
    adapter = model.internalize([picture(0), TEXT])
    again = d2l.load(model.save(tmp_path / "whole"), device="cpu")
    assert again.internalize([picture(0), TEXT]) == adapter
    (tmp_path / "whole" / "encoder_model" / "processor_config.json").unlink()
    blind = d2l.load(tmp_path / "whole", device="cpu")
    assert blind.internalize(TEXT).blocks[0].A["down_proj"].isfinite().all()
    with pytest.raises((FileNotFoundError, ValueError), match="preprocessor_config.json"):
        blind.internalize(picture(0))


def test_images_in_bfloat16():
    model = with_vision_encoder("gemma3")
    expected = model.internalize(picture(0))
    model.encoder.model.bfloat16()
    half = model.internalize(picture(0))
    ours, theirs = (adapter.factors("down_proj")[0] for adapter in (half, expected))
    assert (ours - theirs).norm() < 0.3 * theirs.norm()


# --- training ---------------------------------------------------------------------------------------------------------


def train(model: DocToLoRA, batch: Batch, steps: int) -> list[float]:
    """The losses of so many training steps of the model's hypernetwork on one batch.

    They cannot reach 0: the random base model's normed states and small output matrix bound its logits.
    """
    torch.manual_seed(0)
    step = Internalization(
        model.base_model, model.hypernetwork, replace(preset("tiny").needle, l1=0.0), model.encoder.model
    )
    model.hypernetwork.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.hypernetwork.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = step(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.hypernetwork.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.hypernetwork.requires_grad_(False).eval()
    return losses


def question_batch(model: DocToLoRA, answers: str, chunks: Chunks) -> Batch:
    """The same question, for each context its own one-token answer."""
    question = documents.question_ids(model.tokenizer, "Which?")
    rows = [[model.tokenizer.convert_tokens_to_ids(answer), model.tokenizer.eos_token_id] for answer in answers]
    return Batch(
        chunks=chunks,
        input_ids=torch.tensor([question + row for row in rows]),
        labels=torch.tensor([[IGNORED] * len(question) + row for row in rows]),
        n_questions=torch.ones(len(rows), dtype=torch.long),
    )


def fresh(model: DocToLoRA) -> DocToLoRA:
    """The same models with a new, untrained hypernetwork of this project's own initialisation."""
    p = HypernetworkPreset(**SIZES, rank=2, encoder_layer=None)
    config = hypernetwork_config(p, model.base_model, "base", model.encoder.model, "encoder")
    torch.manual_seed(0)
    hypernetwork = Hypernetwork(config)
    encoder = ContextEncoder.from_config(model.encoder.model, config)
    parts = (model.base_model, model.tokenizer, hypernetwork)
    made = DocToLoRA(*parts, encoder=encoder, encoder_tokenizer=model.encoder_tokenizer)
    if "processor" in vars(model.encoder):
        made.encoder.processor = model.encoder.processor
    return made


def test_training_through_another_encoder():
    """Two documents, one question, two answers."""
    model = fresh(with_encoder())
    chunks = documents.context_ids(model.encoder_tokenizer, [TEXT, OTHER_TEXT])
    batch = question_batch(model, "AB", Chunks.of(chunks, [1, 1], 0))
    losses = train(model, batch, 50)
    assert losses[-1] < 0.1 * losses[0]
    adapters = model.internalize_each([TEXT, OTHER_TEXT])
    assert model.answer(["Which?", "Which?"], adapters, max_new_tokens=3) == ["A", "B"]


def test_the_whole_training_takes_an_encoder(tmp_path):
    """`train_hypernetwork`, as the command runs it: sizes, batches, resumable steps."""
    settings = {"steps": 2, "contexts": 2, "warmup_steps": 1, "readout": None, "encoder_layer": 1}
    settings |= {"shortest": 64, "longest": 120}
    p = replace(preset("tiny").needle, **SIZES, rank=2, **settings)
    model = with_encoder()
    batches = NeedleBatches(model.tokenizer, p, 0, encoder_tokenizer=model.encoder_tokenizer)
    base = Base(model.base_model, model.tokenizer, "some/base", model.encoder.model, "some/encoder")
    trained = train_hypernetwork(p, base, batches, Run(tmp_path))
    assert (trained.config.encoder_model, trained.config.feature_size) == ("some/encoder", 48)
    assert trained.scaler_B["down_proj"].abs().max() > 0


@each_vision_family
def test_training_on_images(family):
    """Two pictures, one question, two answers."""
    model = fresh(with_vision_encoder(family))
    pictures = [picture(0), picture(1)]
    read = [image_inputs(model.encoder.processor, one) for one in pictures]
    chunks = Chunks.of([one["input_ids"][0].tolist() for one in read], [1, 1], 0)
    assert len(chunks.ids) == 1  # both of one length
    others = [name for name in read[0] if name not in ("input_ids", "attention_mask")]
    images = [{name: torch.cat([one[name] for one in read]) for name in others}]
    losses = train(model, question_batch(model, "AB", replace(chunks, images=images)), 50)
    assert losses[-1] < 0.1 * losses[0]
    adapters = model.internalize_each(pictures)
    assert model.answer(["Which?", "Which?"], adapters, max_new_tokens=3) == ["A", "B"]
