"""Training of the published form: pooled rows, what blocks add through the layers, runs and their command."""

import math
from dataclasses import replace

import processes
import pytest
import torch
import torch.nn.functional as F
from test_row_stage import base  # noqa: F401  a base model with questions about towns

import d2l_lib as d2l
from d2l_lib.adapter import Adapter
from d2l_lib.documents import context_ids
from d2l_lib.formats.checkpoints import save_checkpoint
from d2l_lib.hypernetwork import HypernetworkConfig
from d2l_lib.model import DocToLoRA
from d2l_lib.pooled_rows import PooledRows
from d2l_lib.presets import PublishedPreset, RowsPreset, Schedule, shortened
from d2l_lib.tasks.qa import load_qa
from d2l_lib.token_rows import TokenRows
from d2l_lib.training import published, recipes
from d2l_lib.training.loop import Run, read_log
from d2l_lib.training.published import PassageBatches, PublishedStep, few_of
from d2l_lib.training.row_features import Limits, passages_of, read_features, streams_higher

ROWS = RowsPreset(
    steps=1, learning_rate=1e-3, warmup_steps=0, encoder_layers=(0, 2, 3), row_layers=(1, 3), reader_layers=(3,),
    longest_passage=60, latent_size=24, n_blocks=1, n_heads=2, validation=4,
)  # fmt: skip
SMALL = PublishedPreset(
    pointer=Schedule(steps=4, learning_rate=3e-3, warmup_steps=1), pooled_size=64, pooled_blocks=1, rank=4,
    written_layers=(2, 3), steps=4, passages=4, questions=2, learning_rate=3e-3, warmup_steps=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def rows_folder(base, tmp_path_factory):  # noqa: F811
    """A checkpoint of fresh token rows for the base model."""
    source, model, tokenizer, _, _ = base
    torch.manual_seed(3)
    net = TokenRows(recipes.rows_config(ROWS, model, str(source)))
    return save_checkpoint(tmp_path_factory.mktemp("rows") / "rows", net, {"chunk_tokens": 60}, torch.float32)


@pytest.fixture(scope="module")
def trained(base, rows_folder, tmp_path_factory):  # noqa: F811
    """(the folder of a short training, its run, its data)"""
    source, _, _, frame, _ = base
    folder = tmp_path_factory.mktemp("published")
    run = Run(folder / "run", save_steps=2, report_steps=2)
    data = ROWS, str(source), {"squad": frame}, run, folder / "features"
    return recipes.train_published(replace(SMALL, rows=str(rows_folder)), *data), run, data


@pytest.fixture(scope="module")
def features(base, trained):  # noqa: F811
    """The passages of the training, as they lie on disk, with streams into the first written layer."""
    _, model, tokenizer, frame, _ = base
    passages = passages_of(frame, tokenizer, Limits(60))
    every = read_features(trained[2][4] / "squad", passages)
    return recipes._higher(model, [few_of(one, 2) for one in every], 1, SMALL.written_layers[0])


def fresh(base, features, p=SMALL):  # noqa: F811
    """A step of a hypernetwork that has learned nothing."""
    _, model, tokenizer, _, _ = base
    torch.manual_seed(0)
    rows = recipes.rows_config(ROWS, model, "random")
    net = PooledRows(recipes.published_config(p, rows, model))
    net.prepare(model, tokenizer)
    step = PublishedStep(model.requires_grad_(False), net, p)
    step.start(features)
    return step


def learned(step, batch, steps: int, rate: float) -> dict[str, float]:
    """What a report says of a batch after some steps on it alone."""
    optimizer = torch.optim.AdamW([one for one in step.parameters() if one.requires_grad], lr=rate)
    step.train()
    for _ in range(steps):
        loss, _ = step.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return step.eval().loss(batch)[1]


def test_training_sees_the_logits_that_the_adapted_model_gives(base, features):  # noqa: F811
    _, model, tokenizer, _, _ = base
    step = fresh(base, features).eval()
    net = step.hypernetwork
    for part in (net.keys, net.free_keys, net.bias_B):
        torch.nn.init.normal_(part, std=0.3)
    net.log_gain.data.fill_(0.0)  # large enough to be seen
    batch = PassageBatches(features, step, SMALL, 1, 0).collate(range(3))
    a, share, _ = step.pooled(batch)
    kept = [slice(len(q) - 1, len(q) - 1 + len(n)) for q, n in zip(batch.prompts, batch.answers, strict=True)]
    seen = step.upper(batch.streams, batch.owner, a, net.values(share, batch.words), kept)
    plain = step.upper(batch.streams, batch.owner, a * 0, net.values(share, batch.words) * 0, kept)
    step.fold()
    ids = [torch.tensor(context_ids(tokenizer, tokenizer.decode(one.ids))) for one in features[:3]]
    d2l_model = DocToLoRA(model, tokenizer, net, chunk_tokens=60)
    for question, prompt in enumerate(batch.prompts):
        adapter = d2l_model.internalize_ids(ids[int(batch.owner[question])][None])
        row = torch.cat([prompt, batch.answers[question][:-1]])[None]
        with torch.no_grad(), d2l_model.applied(adapter):
            stream = model(row, output_hidden_states=True).hidden_states[-1][0, len(prompt) - 1 :]
        expected = published.final_norm(model)(seen[question])  # the last hidden state is normed
        torch.testing.assert_close(expected, stream, rtol=2e-2, atol=2e-2)
        assert (expected - published.final_norm(model)(plain[question])).norm() > 0.05 * expected.norm()


def test_shares_stay_within_the_text_and_keys_add_up_to_nothing(base, features):  # noqa: F811
    step = fresh(base, features).eval()
    torch.nn.init.normal_(step.hypernetwork.keys)
    batch = PassageBatches(features, step, SMALL, 1, 0).collate(range(4))
    a, share, c = step.pooled(batch)
    assert a.shape[:3] == (4, 2, 4) and share.shape == (4, 8, 3 * batch.ids.shape[1]) and c.shape[1] == share.shape[2]
    torch.testing.assert_close(share.sum(-1), torch.ones(4, 8))
    assert not share.masked_select(~batch.mask.repeat_interleave(3, 1)[:, None]).any()
    assert a.norm() > 1 and a.sum(2).abs().max() < 1e-4 * a.norm()
    scores = torch.einsum("nli,lri->nlr", torch.cat(batch.x)[:2].float(), a[0])
    moved = torch.einsum("nli,lri->nlr", torch.cat(batch.x)[:2].float(), a[0] + torch.randn_like(a[0, :, :1]))
    torch.testing.assert_close(scores.softmax(-1), moved.softmax(-1))  # so taking the mean away loses nothing


def test_it_learns_to_find_and_then_to_say_what_its_own_passage_says(base, features):  # noqa: F811
    p = replace(SMALL, dropout=0.0)
    step = fresh(base, features, p)
    batch = PassageBatches(features, step, p, 1, 0).collate(range(8))
    notes = learned(step, batch, 60, 1e-2)
    assert notes["pointer_first_right"] > 0.8
    step.adds = True
    before = step.eval().loss(batch)[1]
    after = learned(step, batch, 40, 3e-3)
    assert after["own"] < 0.5 * before["own"] and after["own_first_right"] > 0.8
    assert after["own"] < after["wrong"] - 0.5


def test_a_sample_of_the_vocabulary_stands_for_all_of_it(base, features, monkeypatch):  # noqa: F811
    monkeypatch.setattr(published, "_FREQUENT", 5)
    monkeypatch.setattr(published, "_SAMPLED", 20)
    step = fresh(base, features)
    size = base[1].get_output_embeddings().weight.shape
    torch.manual_seed(0)
    normed, labels = torch.randn(6, size[1]), torch.tensor([1, 7, 9, 30, 31, 32])
    exact = F.cross_entropy(step.eval()._logits(normed, labels, labels)[0], labels)
    step.train()
    samples = [F.cross_entropy(*step._logits(normed, labels, labels)) for _ in range(200)]
    assert float(torch.stack(samples).mean()) == pytest.approx(float(exact), abs=0.05)
    assert float(torch.stack(samples).std()) > 0  # other tokens each time


def test_streams_into_a_higher_layer(base, features, trained):  # noqa: F811
    _, model, tokenizer, frame, _ = base
    lower = read_features(trained[2][4] / "squad", passages_of(frame, tokenizer, Limits(60)))[0]
    prompt, answer = lower.prompts[0], lower.answers[0]
    with torch.no_grad():
        states = model(torch.cat([prompt, answer[:-1]])[None], output_hidden_states=True).hidden_states
    torch.testing.assert_close(features[0].streams[0].float(), states[2][0], rtol=1e-2, atol=1e-2)
    assert streams_higher(model, lower.streams, 1, 1)[0] is lower.streams[0]


def test_mixing_layers_are_taken_over_and_stay_as_they_are(base, trained, rows_folder):  # noqa: F811
    ours = d2l.load(trained[0]).hypernetwork
    theirs = d2l.load(rows_folder, base_model=str(base[0])).hypernetwork.state_dict()
    own = ours.state_dict()
    parts = ("project", "mixers", "norm", "place_scaler", "feature_mean")
    shared = [name for name in own if name.split(".")[0] in parts]
    assert len(shared) > 10
    for name in shared:
        torch.testing.assert_close(own[name], theirs[name], rtol=1e-3, atol=1e-3)  # kept in half precision


def test_what_cannot_be_is_refused(base, trained, rows_folder):  # noqa: F811
    rows, source, tables, run, folder = trained[2]
    small = replace(SMALL, rows=str(rows_folder))
    for wrong, reason in (
        ({"first_passages": 5}, "multiple of 24"),
        ({"passages": 40}, "16 passages to learn|12 passages to learn"),
        ({"pooled_size": 24}, "multiple of 64"),
        ({"written_layers": (3, 2)}, "written_layers must ascend"),
        ({"written_layers": (2, 4)}, "at most 3"),
        ({"written_layers": (0, 1)}, "begin below layer 1"),
        ({"rows": str(trained[0])}, "holds no token rows"),
    ):
        with pytest.raises(ValueError, match=reason):
            recipes.train_published(replace(small, **wrong), rows, source, tables, run, folder)
    with pytest.raises(ValueError, match="holds no token rows that read the states"):
        recipes.train_published(small, replace(rows, encoder_layers=(0, 2)), source, tables, run, folder)
    sizes = {"n_layers": 2, "d_in": {"x": 4}, "d_out": {"x": 4}, "feature_size": 4}
    with pytest.raises(ValueError, match="pooled_size and pooled_blocks go together"):
        HypernetworkConfig(**sizes, written_layers=(1,))
    both = {"d_in": {"x": 4, "y": 4}, "d_out": {"x": 4, "y": 4}}
    config = HypernetworkConfig(
        **(sizes | both), writer="pooled_rows", written_layers=(1,), pooled_size=64, pooled_blocks=1, n_kv_heads=4
    )
    with pytest.raises(ValueError, match="for one module"):
        PooledRows(config)


def test_a_trained_hypernetwork_writes_its_layers_alone_and_the_base_model_reads_them(base, trained):  # noqa: F811
    _, _, _, frame, _ = base
    final, run, _ = trained
    model = d2l.load(final)
    assert model.hypernetwork.described() == "rank 4 on down_proj of layers 2, 3"
    assert not model.writes_rows and model.copies_tokens
    one, two = list(dict.fromkeys(frame["document"]))[:2]
    adapter, other = model.internalize_each([one, two])
    for part in (adapter.blocks[0].A, adapter.blocks[0].B, {"down_proj": adapter.bias["down_proj"][0]}):
        assert part["down_proj"].shape[:2] == (2, 4) and part["down_proj"].any()
    assert (adapter.layers, adapter.n_layers) == ((2, 3), 4)
    assert not adapter.factors("down_proj")[1][:2].any() and adapter.factors("down_proj")[1][2:].any()
    assert adapter.rank == 8 and not adapter.is_rows
    assert adapter != other
    back = Adapter.from_peft(adapter.export_peft(run.folder / "peft"), model)
    ours, theirs = (B.mT @ A for A, B in (one.factors("down_proj") for one in (adapter, back)))
    torch.testing.assert_close(adapter.scale * ours, back.scale * theirs, rtol=1e-3, atol=1e-5)
    assert len(model.answer(["Where is Ada's home?"] * 2, [adapter, other], max_new_tokens=3)) == 2
    model.iterative = True
    assert model.internalize(one).blocks[0].A["down_proj"].equal(adapter.blocks[0].A["down_proj"])
    with pytest.raises(ValueError, match="no text"):
        model.hypernetwork(torch.zeros(1, 1, model.config.feature_size), torch.ones(1, 1), torch.zeros(1, 1).long())
    logs = [read_log(run.folder / stage / "log.jsonl") for stage in ("pointer", "sum")]
    assert [[line["step"] for line in log] for log in logs] == [[2, 4], [2, 4]]
    assert "validation_pointer_first_right" in logs[0][1] and "validation_wrong_first_right" in logs[1][1]
    assert all(math.isfinite(value) for log in logs for line in log for value in line.values())


@pytest.mark.parametrize(("stage", "at"), [("pointer", 2), ("sum", 2)])
def test_a_killed_training_ends_as_a_whole_one(trained, rows_folder, tmp_path, monkeypatch, stage, at):
    final, run, (rows, source, tables, _, features) = trained
    p, real = replace(SMALL, rows=str(rows_folder)), recipes.fit
    half = replace(run, folder=tmp_path / "run")

    def killed(step, batches, schedule, own):
        real(step, batches, schedule, replace(own, stop_at=at) if own.folder.name == stage else own)
        if own.folder.name == stage:
            raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        recipes.train_published(p, rows, source, tables, half, features)
    monkeypatch.setattr(recipes, "fit", real)
    again = recipes.train_published(p, rows, source, tables, half, features)
    assert (again / "hypernetwork.safetensors").read_bytes() == (final / "hypernetwork.safetensors").read_bytes()


def train_from_file(source, file, rows, run: Run) -> None:
    pointer = replace(SMALL.pointer, batches_per_step=2, steps=8)
    p = replace(SMALL, rows=str(rows), batches_per_step=2, steps=8, pointer=pointer)
    recipes.train_published(p, ROWS, str(source), {"squad": load_qa("squad", file)}, run, run.folder / "features")


@pytest.mark.slow
def test_two_processes_end_where_one_does(base, rows_folder, tmp_path):  # noqa: F811
    source, _, _, _, file = base
    ends = []
    for n_processes in (1, 2):
        run = Run(tmp_path / str(n_processes), seed=1, report_steps=2)
        started = processes.start_together(n_processes, train_from_file, source, file, rows_folder, run)
        for process in started:
            process.join(120)
        assert [process.exitcode for process in started] == [0] * n_processes
        ends.append(d2l.load(run.folder / "final").hypernetwork.state_dict())
    assert all(torch.allclose(value, ends[1][name], atol=1e-4) for name, value in ends[0].items())


def test_a_shorter_run_shortens_both_stages():
    short = shortened(SMALL, 2)
    assert (short.steps, short.pointer.steps, short.warmup_steps, short.pointer.warmup_steps) == (2, 2, 0, 0)
