"""The curriculum: rows say what the chat template says, labels cover answers only, batches are functions of (seed,
step).
"""

import json
import random

import pytest
import torch
import train_small

from d2l_lib.base_model import bundled_path, load_tokenizer
from d2l_lib.tasks import world
from d2l_lib.training import pretraining
from d2l_lib.training.batches import IGNORED
from d2l_lib.training.pretraining import Curriculum, build_tokenizer, conversation


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(bundled_path("tiny") / "base_model"))


@pytest.fixture(scope="module")
def curriculum(tokenizer):
    return Curriculum(tokenizer, steps=100, batch_tokens=1024, window=1024, seed=0)


def test_a_tokenizer_is_a_function_of_its_seed(tokenizer):
    """Equal to one that was built before and saved."""
    _, saved = train_small.small_base()
    built = build_tokenizer(600, 512, 0)
    assert json.loads(built.backend_tokenizer.to_str()) == json.loads(saved.backend_tokenizer.to_str())
    assert (built.chat_template, built.model_max_length) == (saved.chat_template, saved.model_max_length)
    assert built.special_tokens_map == saved.special_tokens_map and built.padding_side == saved.padding_side
    assert built.get_vocab() != tokenizer.get_vocab()


def test_conversation_equals_the_chat_template(tokenizer):
    messages = [
        {"role": "user", "content": "A text.\n\nWho?"},
        {"role": "assistant", "content": "Ada Low"},
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": "1412"},
    ]
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    assert conversation([("Who?", "Ada Low"), ("When?", "1412")], "A text.") == expected


def test_generation_marks_cover_the_answer_and_its_end(tokenizer):
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada Low"}]
    encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    marked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked).strip() == "Ada Low<|end|>"


def test_digits_are_single_tokens_and_words_keep_their_tokens_anywhere(tokenizer):
    def pieces(text: str) -> list[str]:
        return [tokenizer.decode(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]

    assert pieces("4217") == pieces("in 4217")[1:] == [" 4", "2", "1", "7"]
    assert all(pieces(f"{digit}00")[0] == f" {digit}" for digit in range(10)), "numbers differ from their first token"
    alone = tokenizer("Marlow", add_special_tokens=False)["input_ids"]
    inside = tokenizer("by Marlow", add_special_tokens=False)["input_ids"]
    assert inside[-len(alone) :] == alone


def test_answer_mask_marks_what_follows_the_assistant_mark(tokenizer, curriculum):
    ids = torch.tensor(
        tokenizer(conversation([("Who?", "Ada"), ("When?", "1412")]), add_special_tokens=False)["input_ids"]
    )
    answers = tokenizer.decode(ids[curriculum.answer_mask(ids)])
    assert answers.replace(" ", "") == "Ada<|end|>1412<|end|>"


@pytest.mark.parametrize("i", [0, 3, 20, 50, 80, 99])
def test_batches_are_functions_of_seed_and_step(tokenizer, curriculum, i):
    batch = curriculum[i]
    again = Curriculum(tokenizer, 100, 1024, 1024, 0)[i]
    other = Curriculum(tokenizer, 100, 1024, 1024, 1)[i]
    assert all(torch.equal(batch[k], again[k]) for k in batch)
    assert batch["input_ids"].shape != other["input_ids"].shape or not torch.equal(
        batch["input_ids"], other["input_ids"]
    )
    labelled = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    assert labelled.any(dim=1).all(), "every row teaches something"
    assert not (batch["input_ids"][labelled] == curriculum.pad).any()


def test_every_answer_in_a_document_row_is_right(tokenizer, curriculum):
    """Whatever the row asks, the answer is what the document (or the encyclopedia) says, or 'I do not know.'"""
    known = {f.value for f in world.encyclopedia()}
    rng = random.Random(5)
    for _ in range(50):
        row = curriculum.document_row(rng, 256)
        document, _, rest = row.partition("\n\n")
        for answer in (part.split("<|end|>")[0] for part in rest.split("<|assistant|>")[1:]):
            allowed = answer in (world.UNKNOWN, "Yes", "No") or answer in known
            assert allowed or all(piece.lower() in document.lower() for piece in answer.split(", "))


def test_loss_at_labelled_positions_equals_the_models_own(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    batch = Curriculum(tokenizer, 100, 512, 1024, 0)[60]
    ours = pretraining.AnswerLoss(model.model)(**batch)["loss"]
    theirs = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
