"""Training of the published form: what blocks add, through the head and through the layers, runs and their command."""

from dataclasses import replace

import pytest
import torch
from test_row_stage import base  # noqa: F401  a base model with questions about towns

import d2l_lib as d2l
from d2l_lib.adapter import Adapter
from d2l_lib.documents import context_ids
from d2l_lib.hypernetwork import Hypernetwork, HypernetworkConfig
from d2l_lib.model import DocToLoRA
from d2l_lib.presets import PublishedPreset, RowsPreset
from d2l_lib.token_rows import Words
from d2l_lib.training import recipes
from d2l_lib.training.loop import Run, read_log
from d2l_lib.training.published import PassageBatches, PublishedStep, few_of, start_copying
from d2l_lib.training.row_features import Limits, passages_of, read_features

ROWS = RowsPreset(
    steps=1, learning_rate=1e-3, warmup_steps=0, encoder_layers=(0, 2, 3), row_layers=(2, 3), reader_layers=(3,),
    longest_passage=60,
)  # fmt: skip
SMALL = PublishedPreset(
    latent_size=24, n_heads=2, head_dim=24, projection_size=32, rank=4, encoder_layers=(0, 2), written_layers=(2, 3),
    below=2, pointer_steps=4, steps=6, passages=4, whole_passages=3, validation=4, questions=2, learning_rate=3e-3,
    warmup_steps=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):  # noqa: F811
    """(the folder of a short training, its run, its data)"""
    source, _, _, frame, _ = base
    folder = tmp_path_factory.mktemp("published")
    run = Run(folder / "run", save_steps=2, report_steps=2)
    data = ROWS, str(source), {"squad": frame}, run, folder / "features"
    return recipes.train_published(SMALL, *data), run, data


@pytest.fixture(scope="module")
def features(base, trained):  # noqa: F811
    """The passages of the training, as they lie on disk."""
    _, _, tokenizer, frame, _ = base
    passages = passages_of(frame, tokenizer, Limits(60))
    every = read_features(trained[2][4] / "squad", passages)
    return [few_of(one, [0], 2, 2) for one in every]


def features_of(model, text: str):
    """(features, mask) of a text for a model's hypernetwork."""
    ids = torch.tensor([context_ids(model.tokenizer, text)])
    return model.encoder.encode(ids, attention_mask=torch.ones_like(ids)), torch.ones_like(ids)


def fresh(base, features, p=SMALL):  # noqa: F811
    """A step of a hypernetwork that starts copying."""
    _, model, tokenizer, _, _ = base
    torch.manual_seed(0)
    net = Hypernetwork(recipes.published_config(p, model, tokenizer, "random"))
    step = PublishedStep(model.requires_grad_(False), net, p)
    plain = step.asked(features)
    step.measure(plain)
    start_copying(step, Words(model, tokenizer), features, step.whitened(plain), 0)
    return step


def test_training_sees_the_logits_that_the_adapted_model_gives(base, features):  # noqa: F811
    _, model, tokenizer, _, _ = base
    step = fresh(base, features).eval()
    net = step.hypernetwork
    torch.nn.init.normal_(net.bias_B["down_proj"], std=0.1)
    batch = PassageBatches(features, step.ask, SMALL, 0).collate(range(3), True)
    kept = [slice(len(q) - 1, len(q) - 1 + len(a)) for q, a in zip(batch.prompts, batch.answers, strict=True)]
    seen = step.upper(batch.streams, batch.owner, *step.rows(batch), kept)
    step.fold()
    ids = [torch.tensor(context_ids(tokenizer, tokenizer.decode(one.ids))) for one in features[:3]]
    d2l_model = DocToLoRA(model, tokenizer, net, chunk_tokens=60)
    for question, prompt in enumerate(batch.prompts):
        adapter = d2l_model.internalize_ids(ids[int(batch.owner[question])][None])
        row = torch.cat([prompt, batch.answers[question][:-1]])[None]
        with torch.no_grad(), d2l_model.applied(adapter):
            logits = model(row).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(step.head(seen[question]), logits, rtol=2e-2, atol=2e-2)


def test_the_pointer_stage_is_exact_for_the_last_layer(base, features):  # noqa: F811
    step = fresh(base, features, replace(SMALL, written_layers=(3,))).eval()
    batches = PassageBatches(features, step.ask, SMALL, 0)
    whole, pointer = batches.collate(range(3), True), batches.collate(range(3), False)
    A, B = step.rows(whole)
    kept = [slice(len(q) - 1, len(q) - 1 + len(a)) for q, a in zip(whole.prompts, whole.answers, strict=True)]
    exact = torch.cat(step.upper(whole.streams, whole.owner, A, B, kept))
    torch.testing.assert_close(step.pointer_streams(pointer.asked, pointer.owner, A, B), exact, rtol=1e-2, atol=1e-2)


def test_it_learns_to_answer_from_its_own_passage(base, features):  # noqa: F811
    p = replace(SMALL, dropout=0.0, latent_size=32, head_dim=32, projection_size=64)
    step = fresh(base, features, p)
    batch = PassageBatches(features, step.ask, p, 0).collate(range(8), False)
    optimizer = torch.optim.AdamW(step.hypernetwork.parameters(), lr=1e-2)
    for _ in range(60):
        loss, _ = step.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        notes = step.eval().loss(batch)[1]
    assert notes["pointer_own_first_right"] > 0.9
    assert notes["pointer_own"] < notes["pointer_wrong"] - 0.1


def test_what_cannot_be_is_refused(base, trained):  # noqa: F811
    rows, source, tables, run, folder = trained[2]
    for wrong, reason in (
        ({"first_passages": 5}, "multiple of 24"),
        ({"encoder_layers": (0, 1)}, r"states on disk are of layers \(0, 2, 3\)"),
        ({"validation": 40}, "16 passages have a question"),
        ({"latent_size": 8, "head_dim": 8}, "cannot pass codes and 8 tags"),
        ({"head_dim": 8}, "cannot pass codes"),
        ({"written_layers": (3, 2)}, "written_layers must ascend"),
        ({"written_layers": (2, 4)}, "at most 3"),
    ):
        with pytest.raises(ValueError, match=reason):
            recipes.train_published(replace(SMALL, **wrong), rows, source, tables, run, folder)
    with pytest.raises(ValueError, match="wrapping must be two numbers"):
        HypernetworkConfig(n_layers=2, d_in={"x": 4}, d_out={"x": 4}, feature_size=4, wrapping=(1,))


def test_a_trained_hypernetwork_writes_its_layers_alone_and_the_base_model_reads_them(base, trained):  # noqa: F811
    _, base_model, tokenizer, frame, _ = base
    final, run, _ = trained
    model = d2l.load(final)
    assert model.hypernetwork.described() == "rank 4 on down_proj of layers 2, 3"
    one, two = list(dict.fromkeys(frame["document"]))[:2]
    adapter, other = model.internalize_each([one, two])
    for part in (adapter.blocks[0].A, adapter.blocks[0].B, {"down_proj": adapter.bias["down_proj"][0]}):
        rows = part["down_proj"]
        assert rows.shape[0] == 4 and not rows[:2].any() and rows[2:].any()
    assert adapter.rank == 8 and not adapter.is_rows
    assert adapter != other
    back = Adapter.from_peft(adapter.export_peft(run.folder / "peft"), model)
    for ours, theirs in zip(adapter.factors("down_proj"), back.factors("down_proj"), strict=True):
        assert ours.shape == theirs.shape
    ours, theirs = (B.mT @ A for A, B in (one.factors("down_proj") for one in (adapter, back)))
    torch.testing.assert_close(adapter.scale * ours, back.scale * theirs, rtol=1e-3, atol=1e-5)
    assert len(model.answer(["Where is Ada's home?"] * 2, [adapter, other], max_new_tokens=3)) == 2
    whole = model.hypernetwork(*(model_inputs := features_of(model, one)))
    for layer in range(4):
        alone = model.hypernetwork(*model_inputs, layer=layer)
        step_by_step = model.hypernetwork(*model_inputs, iterative=True)
        for own, part, same in zip(whole["down_proj"], alone["down_proj"], step_by_step["down_proj"], strict=True):
            torch.testing.assert_close(part[:, 0], own[:, layer])
            torch.testing.assert_close(same, own)
    log = read_log(run.folder / "log.jsonl")
    assert [line["step"] for line in log] == [2, 4, 6]
    assert "validation_pointer_wrong_first_right" in log[1] and "validation_wrong_first_right" in log[2]


def test_a_killed_training_ends_as_a_whole_one(trained, tmp_path):
    final, run, (rows, source, tables, _, features) = trained
    half = replace(run, folder=tmp_path / "run", stop_at=2)
    recipes.train_published(SMALL, rows, source, tables, half, features)
    again = recipes.train_published(SMALL, rows, source, tables, replace(half, stop_at=None), features)
    assert (again / "hypernetwork.safetensors").read_bytes() == (final / "hypernetwork.safetensors").read_bytes()
