"""A LoRA that reads its prompt: rows with branches against plain ones, the loss, runs and their command."""

import json
from dataclasses import replace

import processes
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_models import build_base_model, build_tokenizer

from d2l_lib.__main__ import main
from d2l_lib.adapter import Adapter, stack_factors
from d2l_lib.base_model import Fingerprint, bundled_path
from d2l_lib.documents import question_ids, stop_ids
from d2l_lib.lora import apply_lora
from d2l_lib.presets import PRESETS, ReadingLoraPreset, RowsPreset
from d2l_lib.tasks.qa import PROMPT, load_qa
from d2l_lib.training.batches import IGNORED
from d2l_lib.training.loop import Run, read_log
from d2l_lib.training.reading_lora import (
    PackedBatches,
    ReadingLoraStep,
    linear_names,
    pack,
    questions_of,
    train_reading_lora,
)
from d2l_lib.training.row_features import Limits, passages_of

SMALL = ReadingLoraPreset(
    rank=2, passages=3, validation=2, steps=6, learning_rate=1e-2, warmup_steps=1, batches_per_step=2
)
ROWS = RowsPreset(longest_passage=60, validation=4, steps=1, learning_rate=1e-3, warmup_steps=1)
NAMES = ["Ada", "Bo", "Cy", "Dan", "Eve", "Flo", "Gus", "Hal", "Ida", "Jo", "Kai", "Lea"]
TOWNS = ["Velm", "Oru", "Tak", "Siba", "Mond"]
WINDOW = 256


def question_file(folder):
    """A file in SQuAD's form: for each name a passage with one to three questions."""
    paragraphs = []
    for i, name in enumerate(NAMES):
        first, second = TOWNS[i % 5], TOWNS[(2 * i + 1) % 5]
        text = f"{name} is in {first}, not in {second}" + "." * (1 + i % 4)
        asked = [("Where?", first), (f"Where is {name}?", first), ("And not?", second)][: 1 + i % 3]
        qas = [
            {"id": f"{i}{q}", "question": q, "answers": [{"text": a, "answer_start": text.index(a)}]} for q, a in asked
        ]
        paragraphs.append({"context": text, "qas": qas})
    file = folder / "squad.json"
    file.write_text(json.dumps({"version": "1.1", "data": [{"title": "towns", "paragraphs": paragraphs}]}))
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder of a random base model, the model, its tokenizer, the table of questions, its file)"""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = build_tokenizer()
    model = build_base_model(tokenizer)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    file = question_file(folder)
    return folder / "model", model, tokenizer, load_qa("squad", file, split="train"), file


@pytest.fixture(scope="module")
def batches(base):
    _, _, tokenizer, frame, _ = base
    return PackedBatches(questions_of(frame, tokenizer, ROWS)[0], tokenizer, WINDOW, SMALL, seed=1)


def with_values(model, p=SMALL, tests=()):
    """A step whose B is not zero."""
    step = ReadingLoraStep(model, p, 0, tests)
    torch.manual_seed(3)
    for one in step.B.values():
        one.data.normal_(std=0.2)
    return step


# --- questions and rows ---------------------------------------------------------------------------------------------
def test_the_questions_are_those_of_token_rows_and_validation_passages_are_apart(base):
    _, _, tokenizer, frame, _ = base
    learned, held_out = questions_of(frame, tokenizer, ROWS, 4)
    every = passages_of(frame, tokenizer, Limits(60))
    assert len(learned) == len(NAMES) - 4 and len(held_out) == 4
    assert {one.passage for one in learned + held_out} == {one.text for one in every}
    asked = {(row.document, row.question, row.answers[0]) for row in frame.itertuples()}
    assert {(one.passage, *pair) for one in learned + held_out for pair in one.pairs} == asked
    assert questions_of(frame, tokenizer, ROWS)[1] == []
    with pytest.raises(ValueError, match="12 passages have a question .* at most 60 tokens; this training needs more"):
        questions_of(frame, tokenizer, ROWS, 12)


def test_a_row_holds_the_common_beginning_once():
    ids, positions, branch, labels = pack([[1, 2, 3, 9], [1, 2, 4, 5, 9]], [[7, 0], [8, 6, 0]])
    assert ids == [1, 2, 3, 9, 7, 4, 5, 9, 8, 6]
    assert positions == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]
    assert branch == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    assert labels == [IGNORED] * 3 + [7, 0] + [IGNORED] * 2 + [8, 6, 0]
    alone = pack([[1, 2, 3]], [[7, 0]])
    assert alone == ([1, 2, 3, 7], [0, 1, 2, 3], [0, 0, 1, 1], [IGNORED, IGNORED, 7, 0])
    assert pack([[1, 2], [1, 2, 3]], [[7], [8]])[0] == [1, 2, 2, 3], "the last token of a prompt is its own"


def test_batches_hold_each_passage_once_an_epoch_with_the_prompts_of_the_study(base, batches):
    tokenizer = base[2]
    assert len(batches) == 6 and len(batches._epoch(0)) == 4
    of_epoch = [batches[i] for i in range(4)]
    assert sum(one.n_questions for one in of_epoch) == sum(len(one.pairs) for one in batches.passages) == 24
    again = PackedBatches(batches.passages, tokenizer, WINDOW, SMALL, seed=1)
    other = PackedBatches(batches.passages, tokenizer, WINDOW, SMALL, seed=2)
    for i in (5, 0, 3):
        assert torch.equal(batches[i].ids, again[i].ids)
    assert batches._epoch(1) != batches._epoch(0) != other._epoch(0)
    one = batches.passages[2]
    row = batches.collate([one])
    for number, (question, answer) in enumerate(one.pairs, 1):
        mine = (row.branch[0] == 0) | (row.branch[0] == number)
        (prompt,) = question_ids(tokenizer, [PROMPT.format(document=one.passage, question=question)])
        written = [*tokenizer(answer, add_special_tokens=False)["input_ids"], stop_ids(tokenizer)[0]]
        assert row.ids[0, mine].tolist() == prompt + written[:-1]
        assert row.positions[0, mine].tolist() == list(range(len(prompt) + len(written) - 1))
        assert row.labels[0, mine].tolist() == [IGNORED] * (len(prompt) - 1) + written


# --- the loss -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_a_branch_has_the_logits_of_a_row_of_its_own(base, batches, family):
    tokenizer = base[2]
    model = build_base_model(tokenizer, family=family)
    step = with_values(model)
    batch = batches.collate(batches.passages[:4])
    assert (batch.branch == -1).any(), "some rows are padded"
    losses, right = step.losses(batch)
    plain, exact = [], []
    with apply_lora(model, {m: (step.A[m][None], step.B[m][None]) for m in step.A}, step.p.scale):
        for one in batches.passages[:4]:
            for question, answer in one.pairs:
                (prompt,) = question_ids(tokenizer, [PROMPT.format(document=one.passage, question=question)])
                written = [*tokenizer(answer, add_special_tokens=False)["input_ids"], stop_ids(tokenizer)[0]]
                logits = model(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1]
                plain.append(F.cross_entropy(logits, torch.tensor(written), reduction="none"))
                exact.append(logits.argmax(-1).tolist() == written)
    torch.testing.assert_close(losses, torch.cat(plain), rtol=1e-4, atol=1e-4)
    assert right.tolist() == exact
    assert batch.n_tokens == int((batch.branch >= 0).sum()) < batch.ids.numel()


def test_all_linears_learn_and_the_base_model_stays(base, batches):
    _, model, _, _, _ = base
    key = Fingerprint().key(model)
    assert sorted(linear_names(model)) == sorted("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
    step = ReadingLoraStep(model, SMALL, 0, [batches[0]])
    untouched = step.report()["validation_loss"]
    with torch.no_grad():
        logits = step.logits(batches[0])
        step.A["q_proj"].mul_(5)
        assert torch.equal(step.logits(batches[0]), logits), "B is zero at first"
    optimizer = torch.optim.Adam(step.parameters(), lr=1e-2)
    for i in range(30):
        optimizer.zero_grad()
        step(batches[i % 4])["loss"].backward()
        optimizer.step()
    for name, parameter in step.named_parameters():
        assert (parameter.grad.flatten(1).norm(dim=1) > 0).all(), f"{name} learns in each layer"
    report = step.report()
    assert report["validation_loss"] < 0.7 * untouched and 0 <= report["validation_exact_match"] <= 1
    assert report["questions"] == sum(batches[i % 4].n_questions for i in range(30))
    assert report["tokens"] == sum(batches[i % 4].n_tokens for i in range(30))
    assert Fingerprint().key(model) == key and not list(model.parameters())[0].requires_grad


# --- runs -----------------------------------------------------------------------------------------------------------
def test_a_stopped_run_resumes_to_the_file_of_an_uninterrupted_one(base, tmp_path):
    source, model, _, frame, _ = base
    whole, two = (Run(tmp_path / name, seed=1, report_steps=1) for name in ("whole", "two"))
    p = replace(SMALL, steps=8)
    tables = {"towns": frame, "more": frame.iloc[:6]}
    final = train_reading_lora(p, ROWS, str(source), tables, whole)
    train_reading_lora(p, ROWS, str(source), tables, replace(two, stop_at=2))
    assert (two.folder / "checkpoint-2").exists() and not (two.folder / "checkpoint-4").exists()
    again = train_reading_lora(p, ROWS, str(source), tables, two)
    assert again == two.folder / "final"
    names = [file.name for file in sorted(final.iterdir())]
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    assert all((final / name).read_bytes() == (again / name).read_bytes() for name in names)
    tensors = load_file(final / names[1])
    assert len(tensors) == 2 * 7 * 4 and {one.dtype for one in tensors.values()} == {torch.float16}
    log = read_log(two.folder / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert [line["questions"] for line in log] == [line["questions"] for line in read_log(whole.folder / "log.jsonl")]
    assert log[-1]["validation_loss"] < log[0]["validation_loss"] and log[-1]["tokens"] > log[0]["tokens"] > 0

    adapter = Adapter.from_peft(final, model)
    assert adapter.base_key == Fingerprint().key(model) and adapter.rank == 2
    ids = torch.tensor([question_ids(base[2], ["Where?"])[0]])
    with torch.no_grad(), apply_lora(model, *stack_factors([adapter])):
        read = model(ids).logits
    assert not torch.allclose(read, model(ids).logits, atol=0.01)


def train_from_file(source, file, run: Run) -> None:
    train_reading_lora(replace(SMALL, steps=8), ROWS, str(source), {"towns": load_qa("squad", file)}, run)


@pytest.mark.slow
def test_two_processes_report_what_one_does(base, tmp_path):
    source, _, _, _, file = base
    logs = []
    for n_processes in (1, 2):
        run = Run(tmp_path / str(n_processes), seed=1, report_steps=2)
        started = processes.start_together(n_processes, train_from_file, source, file, run)
        for process in started:
            process.join(120)
        assert [process.exitcode for process in started] == [0] * n_processes
        logs.append([{**line, "seconds": 0} for line in read_log(run.folder / "log.jsonl")])
    assert [line["step"] for line in logs[0]] == [2, 4] and logs[0][1]["questions"] > logs[0][0]["questions"]
    for one, two in zip(*logs, strict=True):
        assert one == pytest.approx(two, abs=2e-5)


def test_the_command_ends_in_a_folder_of_peft(base, tmp_path, capsys, monkeypatch):
    source, model, _, _, file = base
    command = ["train", "--preset", "smollm2", "--stage", "reading-lora", "--runs", str(tmp_path)]
    for wrong, reason in (
        ([], "reading-lora needs --preset smollm2 and --questions"),
        (["--questions", "squad", "--fast"], "neither --fast nor --variant"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*command, *wrong])
        assert stopped.value.code == 2 and reason in capsys.readouterr().err
    own = ["--questions", f"squad={file}", "--base", str(source)]
    with pytest.raises(SystemExit):
        main([*command, *own])
    assert "12 passages have a question" in capsys.readouterr().err
    small = replace(PRESETS["smollm2"], rows=ROWS, reading_lora=SMALL)
    monkeypatch.setitem(PRESETS, "smollm2", small)
    main([*command, *own, "--steps", "1", "--set", "rank=3"])
    final = tmp_path / "smollm2" / "reading_lora_own_seed0" / "final"
    assert f"{final}: a PEFT LoRA" in capsys.readouterr().out
    assert Adapter.from_peft(final, model).rank == 3

    monkeypatch.setitem(PRESETS, "smollm2", replace(small, base=str(source)))
    main([*command, *own[:2], "--data", str(tmp_path / "data"), "--report-steps", "1"])
    bundled = Adapter.from_peft(tmp_path / "data" / "smollm2" / "reading_lora", model)
    assert bundled.rank == 2 and bundled.base_model == str(source)
    log = read_log(tmp_path / "data" / "full_runs" / "smollm2_reading_lora_seed0_training.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3] and {line["seed"] for line in log} == {0}


def test_the_bundled_lora_is_small_and_fits_the_bundled_base_model():
    folder = bundled_path("smollm2") / "reading_lora"
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 12e6
    lora = Adapter.from_peft(folder)
    assert (lora.base_model, lora.n_layers, lora.rank) == ("smollm2", 30, 8) and lora.base_key
    assert lora.sizes["q_proj"] == (576, 576) and lora.sizes["down_proj"] == (1536, 576) and len(lora.sizes) == 7
    assert all((one != 0).flatten(1).any(1).all() for one in lora.blocks[0].B.values())
