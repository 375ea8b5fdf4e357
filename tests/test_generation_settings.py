"""`answer` is the greedy answer, whatever generation settings the base model came with."""

import pytest
import torch
from tiny_models import build_model
from transformers import GenerationConfig

QUESTIONS = ["Who keeps cats?", "How many of them?"]
# One unusual value for each setting; those that no answer could survive if they counted, where there are such.
UNUSUAL = {
    "max_length": 3, "max_new_tokens": 1, "min_length": 200, "min_new_tokens": 50, "early_stopping": True,
    "max_time": 1e-9, "stop_strings": ["e", "a", "o"], "do_sample": True, "num_beams": 3, "num_beam_groups": 3,
    "penalty_alpha": 0.6, "dola_layers": "low", "use_cache": False, "cache_implementation": "static",
    "cache_config": {"max_cache_len": 4}, "return_legacy_cache": True, "temperature": 50.0, "top_k": 1, "top_p": 0.01,
    "min_p": 0.9, "top_h": 0.1, "typical_p": 0.1, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "diversity_penalty": 9.0,
    "repetition_penalty": 30.0, "encoder_repetition_penalty": 30.0, "length_penalty": -9.0, "no_repeat_ngram_size": 1,
    "bad_words_ids": [[i] for i in range(5, 150)], "renormalize_logits": True, "constraints": [],
    "force_words_ids": [[7]], "forced_bos_token_id": 7, "forced_eos_token_id": 7, "remove_invalid_values": True,
    "exponential_decay_length_penalty": (1, 9.0), "suppress_tokens": list(range(5, 150)),
    "begin_suppress_tokens": list(range(5, 150)), "sequence_bias": [[[i], -99.0] for i in range(5, 150)],
    "token_healing": True, "guidance_scale": 9.0, "low_memory": True, "watermarking_config": {"bias": 50.0},
    "num_return_sequences": 3, "output_attentions": True, "output_hidden_states": True, "output_scores": True,
    "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 60, "bos_token_id": 60,
    "eos_token_id": list(range(5, 250)), "encoder_no_repeat_ngram_size": 1, "decoder_start_token_id": 60,
    "is_assistant": True, "num_assistant_tokens": 1, "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.1, "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1,
    "assistant_early_exit": 1, "assistant_lookbehind": 1, "target_lookbehind": 1, "prefill_chunk_size": 2,
    "disable_compile": False, "transformers_version": "0",
    "forced_decoder_ids": [[1, 7]],
}  # fmt: skip


def unusual(name):
    """The value in the table, or one that no setting is meant to have."""
    return UNUSUAL.get(name, "unheard of")


@pytest.fixture(scope="module")
def asked():
    """A model, an adapter, and its answers with settings as they come."""
    model = build_model()
    adapter = model.internalize("Ada keeps 3 cats.").scaled(20)
    options = {"max_new_tokens": 12}
    answers = [model.answer(QUESTIONS, one, **options) for one in (adapter, None)]
    assert len({*answers[0], *answers[1]}) > 1 and all(map(len, answers[0]))
    return model, adapter, options, answers


FIELDS = sorted({*vars(GenerationConfig()), *UNUSUAL})


@pytest.mark.parametrize("field", FIELDS)
def test_no_setting_of_the_base_model_counts(asked, field, monkeypatch):
    model, adapter, options, answers = asked
    settings = GenerationConfig()
    setattr(settings, field, unusual(field))
    before = dict(vars(settings))
    monkeypatch.setattr(model.base_model, "generation_config", settings)
    marks = set(vars(model.base_model))
    assert [model.answer(QUESTIONS, one, **options) for one in (adapter, None)] == answers
    assert model.base_model.generation_config is settings and vars(settings) == before
    assert set(vars(model.base_model)) == marks


def test_no_setting_in_the_model_configuration_counts(asked, monkeypatch):
    """Where older models keep their settings."""
    model, adapter, options, answers = asked
    for field in ("repetition_penalty", "num_beams", "do_sample", "eos_token_id", "suppress_tokens", "use_cache"):
        monkeypatch.setattr(model.base_model.config, field, unusual(field), raising=False)
    assert [model.answer(QUESTIONS, one, **options) for one in (adapter, None)] == answers


def test_a_base_model_without_settings_answers(asked, monkeypatch):
    model, adapter, options, answers = asked
    monkeypatch.setattr(model.base_model, "generation_config", None)
    assert model.answer(QUESTIONS, adapter, **options) == answers[0]


def test_the_settings_of_a_call_count(asked):
    model, adapter, _, _ = asked
    ids = torch.tensor([[5, 6, 7]])
    options = {"input_ids": ids, "adapter": adapter, "max_new_tokens": 6}
    plain = model.generate(**options)
    kept_out = plain[0, 3:].tolist()
    for given in ({"suppress_tokens": kept_out}, {"generation_config": GenerationConfig(suppress_tokens=kept_out)}):
        assert not set(model.generate(**options, **given)[0, 3:].tolist()) & set(kept_out)
    assert model.generate(**options, num_return_sequences=2, num_beams=2).shape[0] == 2
    assert torch.equal(model.generate(**options), plain)
