"""A base model's surprise at a text beside the frequencies of its characters."""

import math
import random

import pytest
import torch
from torch import nn

from d2l_lib import viewers
from d2l_lib.analysis.familiarity import Familiarity, familiarity
from d2l_lib.base_model import load_base_model
from d2l_lib.loading import load
from d2l_lib.tasks import world
from d2l_lib.views.examples import bundled_examples


@pytest.fixture(scope="module")
def tiny():
    return load_base_model("tiny")


def test_the_tiny_model_knows_its_world_and_no_real_prose(tiny):
    for seed in range(5):
        known = familiarity(*tiny, world.draw_document(random.Random(seed), "test", 6).text)
        assert not known.is_strange and known.warning() == "" and known.bits < known.plain_bits / 2
    for example in bundled_examples("smollm2").values():
        strange = familiarity(*tiny, example.text)
        assert strange.is_strange and strange.perplexity > len(tiny[1]), "worse than any token as likely as any other"
        assert f"({strange.bits:.1f} bits each" in strange.warning()
    assert familiarity(*tiny, "Ada lives in Velm.") is None


def test_bits_are_those_of_the_loss(tiny):
    model, tokenizer = tiny
    text = world.draw_document(random.Random(1), "test", 6).text[:200].strip()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
    loss = model(input_ids=ids, labels=ids).loss.item()
    known = familiarity(model, tokenizer, text)
    assert known.perplexity == pytest.approx(math.exp(loss), rel=1e-4) and known.n_characters == len(text)
    assert known.bits == pytest.approx(loss / math.log(2) * (ids.shape[1] - 1) / len(text), rel=1e-4)
    repeated = familiarity(model, tokenizer, "ab" * 60)
    assert repeated.plain_bits == pytest.approx(1.0)


def test_long_and_odd_texts_are_cut_to_the_window(tiny):
    class Alone(nn.Module):
        """The model with a window of 32 tokens."""

        def __init__(self, model):
            super().__init__()
            self.model, self.config = (
                model,
                model.config.__class__(**model.config.to_dict() | {"max_position_embeddings": 32}),
            )

        def get_input_embeddings(self):
            return self.model.get_input_embeddings()

        def forward(self, input_ids):
            assert input_ids.shape[1] <= 32
            return self.model(input_ids=input_ids)

    model, tokenizer = tiny
    for text in ("word " * 10_000, "林" * 500, "\U0001f600" * 300):
        assert familiarity(model, tokenizer, text).n_characters <= 800
    assert familiarity(Alone(model), tokenizer, "word " * 100).n_characters < 200


def test_the_chat_warns_of_a_text_that_its_model_does_not_know():
    text = bundled_examples("smollm2")["iron bridge"].text
    chat = viewers.chat(load("tiny/qa"), {"bridge": text, "world": bundled_examples("tiny")["a small world"].text})
    [bridge, known] = chat.conversation.inside()
    assert (
        bridge["warning"].startswith("Outside what this model knows: it predicts the first ") and known["warning"] == ""
    )
    assert chat.static_html.count("d2l-warning") == 1 and "Expect wrong answers." in chat.static_html
    assert Familiarity(100, 9.0, 4.4, 4.4).is_strange and not Familiarity(100, 9.0, 4.3, 4.4).is_strange
