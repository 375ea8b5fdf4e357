"""Training of token rows: passages, features on disk, batches, the loss against a plain one, runs and their command."""

import json
from dataclasses import replace

import pandas as pd
import processes
import pytest
import torch
import torch.nn.functional as F
from tiny_models import build_base_model, build_tokenizer

import d2l_lib as d2l
from d2l_lib.__main__ import main
from d2l_lib.adapter import Block
from d2l_lib.base_model import Fingerprint
from d2l_lib.documents import context_ids, question_ids, stop_ids
from d2l_lib.encoder import ContextEncoder
from d2l_lib.model import DocToLoRA
from d2l_lib.presets import RowsPreset
from d2l_lib.row_reader import check_parts, nearness
from d2l_lib.row_reading import RowReading, read_rows
from d2l_lib.tasks.qa import load_qa
from d2l_lib.token_rows import TokenRows, Words
from d2l_lib.training import recipes, row_features
from d2l_lib.training.loop import Run, read_log
from d2l_lib.training.row_features import Limits, facts_of, never_learned, passages_of, read_features, write_features
from d2l_lib.training.token_rows import RowsBatches, RowsStep, answer_rows, validation_batches

SMALL = RowsPreset(
    latent_size=16, n_blocks=1, n_heads=2, dropout=0.1, encoder_layers=(0, 2, 3), longest_passage=60, passages=3,
    reader_layers=(3,), reader_rank=2, row_layers=(2, 3), validation=4, others=2,
    steps=6, learning_rate=3e-3, warmup_steps=1,
)  # fmt: skip
NAMES = ["Ada", "Bo", "Cy", "Dan", "Eve", "Flo", "Gus", "Hal", "Ida", "Jo", "Kai", "Lea", "Max", "Nia", "Oz", "Pia"]
TOWNS = ["Velm", "Oru", "Tak", "Siba", "Mond", "Zell", "Quin", "Rast"]
BELOW = 2  # layers that are computed once


def question_file(folder):
    """A file in SQuAD's form: for each name a passage with two questions."""
    paragraphs = []
    for i, name in enumerate(NAMES):
        first, second = TOWNS[i % 8], TOWNS[(3 * i + 1) % 8]
        text = f"{name} lives in {first}, works in {second}" + "." * (1 + i % 5)
        asked = [(f"Where is {name}'s home?", first), (f"Where is {name}'s work?", second)]
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
def made(base, tmp_path_factory):
    """(passages, the folder of their features, the arguments that made it)"""
    _, model, tokenizer, frame, _ = base
    encoder = ContextEncoder(model, "hidden_states", encoder_layers=(0, 2, 3))
    limits = Limits(60)
    facts = facts_of(Fingerprint().key(model), frame, encoder, BELOW, limits)
    options = {"encoder": encoder, "facts": facts}
    passages, folder = passages_of(frame, tokenizer, limits), tmp_path_factory.mktemp("features")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_features, "PER_FILE", 6)
        write_features(model, tokenizer, passages, folder, **options)
    return passages, folder, options


@pytest.fixture(scope="module")
def features(made):
    return read_features(made[1], made[0])


def prepared(base, p=SMALL, seed: int = 1) -> TokenRows:
    _, model, tokenizer, _, _ = base
    torch.manual_seed(seed)
    net = TokenRows(recipes.rows_config(p, model, "random"))
    net.prepare(model, tokenizer)
    return net


# --- passages and features ------------------------------------------------------------------------------------------
def test_passages_and_chunks_of_long_ones_have_the_short_questions_whose_answers_stand_there():
    tokenizer = build_tokenizer()
    rows = [
        ("Ada lives in Velm.", "Where?", ["Velm", "Oru"]),
        ("Ada lives in Velm.", "Who?", ["Ada"]),
        ("Ada lives in Velm.", "What?", ["Oru", "Velm"]),  # the first answer is not there
        ("Ada lives in Velm.", "Which?", ["lives in Velm"]),  # too long
        ("Ada lives in Velm.", "Where " * 9, ["Velm"]),
        ("Ada lives in Velm.", "And?", ["in"]),  # one too many
        ("Bo is in Oru. Cy is in Tak.", "Who is in Tak?", ["Cy"]),  # a long passage
        ("Bo is in Oru. Cy is in Tak.", "What?", ["is"]),  # stands in two chunks
        ("Bo is away.", "Where?", ["home"]),  # no usable question
    ]
    frame = pd.DataFrame(rows, columns=["document", "question", "answers"]).assign(dataset="squad")
    limits = Limits(passage_tokens=20, question_tokens=50, answer_tokens=5, questions=2)
    one, part = passages_of(frame, tokenizer, limits)
    assert tokenizer.decode(one.ids) == one.text == "Ada lives in Velm."
    assert [text for _, _, text in one.questions] == ["Velm", "Ada"]
    assert part.text.strip() == "Cy is in Tak." and [text for _, _, text in part.questions] == ["Cy"]
    for (prompt, answer, text), question in zip(one.questions, ("Where?", "Who?"), strict=True):
        assert prompt == question_ids(tokenizer, [question])[0] and answer[-1] == stop_ids(tokenizer)[0]
        assert tokenizer.decode(answer[:-1]).strip() == text
        at = one.ids.index(answer[0])
        assert one.ids[at : at + len(answer) - 1] == answer[:-1], "in the tokens of the passage"
    assert len(passages_of(frame, tokenizer, replace(limits, questions=9))[0].questions) == 3
    assert len(passages_of(frame, tokenizer, replace(limits, answer_tokens=20))[0].questions) == 2


def test_questions_on_learned_documents_are_none_of_a_document_with_a_passage_for_validation():
    tokenizer, limits = build_tokenizer(), Limits(passage_tokens=20, question_tokens=50, answer_tokens=5)
    documents = {  # and the answers that stand in one passage; a letter is a token
        "Ada lives in Velm.": ["Velm", "a town of the north"],
        "Bo lives in Oru now. Cy has been in Tak. Dan was in Siba too.": ["Oru", "Tak"],
        "Eve lives in Mond. ": ["nobody knows"],
        "Flo lives in Zell.": ["Flo"],
    }
    rows = [(document, f"{answer}?", [answer]) for document, answers in documents.items() for answer in answers]
    frame = pd.DataFrame(rows, columns=["document", "question", "answers"]).assign(dataset="squad")
    texts = [one.text for one in passages_of(frame, tokenizer, limits)]
    assert len(texts) == 4 and sum(text in list(documents)[1] for text in texts) == 2
    for n in range(4):
        held = [texts[number] for number in never_learned(4, n)]
        left = row_features.questions_on_learned(frame, tokenizer, limits, n)
        learned = [one for one in documents if not any(text in one for text in held) and "Eve" not in one]
        assert list(left["document"].unique()) == learned and list(left.index) == list(range(len(left)))
        assert list(left["question"]) == [f"{answer}?" for one in learned for answer in documents[one]], "every one"
    with pytest.raises(ValueError, match="4 passages have a question .* at most 20 tokens; the training needs more"):
        row_features.questions_on_learned(frame, tokenizer, limits, 4)


@torch.no_grad()
def test_features_are_those_of_a_plain_pass(base, made, features):
    _, model, tokenizer, _, _ = base
    passages = made[0]
    assert len(features) == len(passages) == len(NAMES)
    for one, passage in zip(features[::7], passages[::7], strict=True):
        ids = torch.tensor([context_ids(tokenizer, passage.text)])
        before = ids[0].tolist().index(passage.ids[0], 1)
        while ids[0, before : before + len(passage.ids)].tolist() != passage.ids:
            before += 1
        states = model.model(ids, output_hidden_states=True).hidden_states
        own = torch.cat([states[2], states[3]], -1)[0, before : before + len(passage.ids)]
        torch.testing.assert_close(one.states.float(), own, rtol=2e-3, atol=2e-3)
        assert len(one.streams) == len(one.answers) == len(passage.questions)
        for number, (prompt, answer, _) in enumerate(passage.questions):
            states = model.model(torch.tensor([prompt + answer[:-1]]), output_hidden_states=True).hidden_states
            torch.testing.assert_close(one.streams[number].float(), states[BELOW][0], rtol=2e-3, atol=2e-3)
            assert one.answers[number].tolist() == answer and one.prompts[number].tolist() == prompt


def test_a_folder_of_features_is_continued_and_refuses_other_facts(base, made, tmp_path, monkeypatch):
    _, model, tokenizer, _, _ = base
    passages, folder, options = made
    monkeypatch.setattr(row_features, "PER_FILE", 6)
    files = sorted(folder.glob("*"))
    assert [file.name for file in files] == [f"features-0000{i}.safetensors" for i in range(3)]
    for file in files[:1] + files[2:]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    kept = (tmp_path / files[0].name).stat().st_mtime_ns
    calls, count = [], row_features._features
    monkeypatch.setattr(row_features, "_features", lambda *a: calls.append(1) or count(*a))
    write_features(model, tokenizer, passages, tmp_path, **options)
    assert calls == [1] and (tmp_path / files[0].name).stat().st_mtime_ns == kept
    assert all((tmp_path / file.name).read_bytes() == file.read_bytes() for file in files)
    other = options | {"facts": options["facts"] | {"below": 1}}
    with pytest.raises(ValueError, match="choose another folder"):
        write_features(model, tokenizer, passages, tmp_path, **other)
    with pytest.raises(ValueError, match="of other passages"):
        read_features(tmp_path, passages[1:])
    with pytest.raises(FileNotFoundError, match="make them first"):
        read_features(tmp_path / "none", passages)


def test_layers_that_give_other_numbers_alone_are_refused(base):
    _, model, tokenizer, _, _ = base
    ids = question_ids(tokenizer, ["Where?"])[0]
    check_parts(model, ids, BELOW)
    alternating = build_base_model(tokenizer, family="gemma2", sliding_window=4)
    check_parts(alternating, ids, 2)
    with pytest.raises(ValueError, match="Gemma2ForCausalLM from 1 on give other numbers alone"):
        check_parts(alternating, ids, 1)


def test_states_too_large_for_float16_stay_finite(base, made):
    _, _, tokenizer, _, _ = base
    huge = build_base_model(tokenizer)
    with torch.no_grad():
        huge.get_input_embeddings().weight.mul_(1e6)
    encoder = ContextEncoder(huge, "hidden_states", encoder_layers=(0, 2, 3))
    tensors = row_features._features(huge, tokenizer, made[0][:2], encoder, BELOW)
    assert tensors["states"].abs().max() == torch.tensor(6e4).half()
    assert all(tensors[name].isfinite().all() for name in ("states", "stream"))


# --- batches --------------------------------------------------------------------------------------------------------
def equal(a, b) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same(first, second) -> bool:
    return all(map(equal, vars(first).values(), vars(second).values()))


def test_batches_are_functions_of_seed_and_step(base, features):
    words = Words(base[1], base[2])
    p = replace(SMALL, steps=40)
    batches = RowsBatches(features[:11], words, p, seed=3)  # four batches an epoch
    in_order = [batches[i] for i in range(14)]
    for i in (13, 0, 9, 4, 3, 12):
        assert same(batches[i], in_order[i]) and same(RowsBatches(features[:11], words, p, 3)[i], in_order[i])
    assert not all(same(RowsBatches(features[:11], words, p, 4)[i], in_order[i]) for i in range(4))
    sizes = [one.n_contexts for one in in_order[:4]]
    assert sum(sizes) == 11 and len(batches) == 40
    assert not all(torch.equal(in_order[i].labels, in_order[i + 4].labels) for i in range(4)), "an order for each epoch"
    assert {one.together for one in in_order} == {True, False}
    with pytest.raises(ValueError, match="two passages or more"):
        RowsBatches(features[:1], words, p, 0)[0]


def test_all_places_of_an_answer_are_marked_and_its_end():
    ids = [5, 6, 9, 5, 6, 5]
    rows = answer_rows(ids, [5, 6, 1])
    expected = torch.zeros(3, 6, 3, dtype=torch.bool)
    expected[0, [0, 3], 0] = expected[1, [1, 4], 1] = expected[2, [1, 4], 2] = True
    assert torch.equal(rows, expected)
    assert not answer_rows(ids, [9, 6, 1]).any() and not answer_rows(ids[:1], [5, 6, 1]).any()


# --- the loss -------------------------------------------------------------------------------------------------------
def plain_loss(model, batch, passages, others, p) -> torch.Tensor:
    """The loss by whole passes of the adapted model, one question at a time."""
    net, blocks, place = model.hypernetwork, [], 0
    table = model.base_model.get_input_embeddings().weight
    for number, (ids, mask, states) in enumerate(zip(batch.ids, batch.mask, batch.states, strict=True)):
        n = int(mask.sum())
        alone = torch.cat([table[ids[:n]], states[:n]], -1)[None]
        A = net.codes(alone, torch.ones(1, n, dtype=torch.bool)).flatten(1, 2)
        B = F.pad(net.values(net.words.tokens(ids[None, :n])), (0, 0, 0, 1)).flatten(1, 2)
        blocks.append(Block(f"passage {number}", 0, None, 1.0, {"down_proj": A}, {"down_proj": B}))

    def read(ids, seen, first: int):
        """(gate's logit at the last token, shares from token `first` on) with these blocks inside."""
        with read_rows(
            model.base_model, [model.adapter_of([blocks[i] for i in seen])], RowReading(chunks=None), net.reader
        ) as state:
            model.base_model(torch.tensor([ids]))
        of_each = nearness(state.over_time[0][0, 1], state.rows[0].slots)  # at the last token
        return net.reader.gate(of_each, state.content[0][0], len(seen)), state.shares[0][0, first:, 1:]

    pointers, weights, opened, closed, every = [], [], [], [], range(len(blocks))
    for own, passage in enumerate(passages):
        for prompt, answer, _ in passage.questions:
            seen = list(every) if batch.together else [own]
            gate = read(prompt, seen, 0)[0]
            shares = read(prompt + answer[:-1], seen, len(prompt) - 1)[1]
            opened.append(F.logsigmoid(gate))
            assert gate > 0
            for n, of_answer in enumerate(shares):
                right = [batch.right[place] if i == own else torch.zeros_like(batch.right[place]) for i in seen]
                right = [one[: int(batch.mask[i].sum())].flatten() for one, i in zip(right, seen, strict=True)]
                weights.append(p.first_weight if n == 0 else 1.0)
                pointers.append(-weights[-1] * of_answer[torch.cat(right)].sum().log())
                place += 1
            away = [i for i in every if i != own] if batch.together else [(own + 1) % len(blocks)]
            closed.append(F.logsigmoid(-read(prompt, away, 0)[0]))
    for number, prompt in enumerate(others, start=len(opened)):
        closed.append(F.logsigmoid(-read(prompt, every if batch.together else [number % len(blocks)], 0)[0]))
    gates = torch.stack(opened).mean() + torch.stack(closed).mean()
    return torch.stack(pointers).sum() / sum(weights) - p.gate_weight * gates


@pytest.mark.parametrize("together", [True, False])
@torch.no_grad()
def test_the_loss_is_that_of_the_adapted_model(base, made, features, together):
    _, model, tokenizer, _, _ = base
    net = prepared(base)
    reader = net.reader
    for parameter in (
        *reader.lora_B.values(),
        reader.null_key,
        reader.null_logit,
        reader.evidence_keys,
        reader.content_key,
    ):
        parameter.normal_()
    reader.gate_bias.fill_(-1.0)  # open, so that all reads are seen
    reader.gate_rise.fill_(0.2)
    p = replace(SMALL, gate_weight=0.9, first_weight=3.0, match_weight=0.0)
    numbers, passages = [0, 4, 9], made[0]
    exact = [
        replace(
            one,
            streams=tuple(
                row_features.streams_below(model, tokenizer, [q[0] + q[1][:-1] for q in passage.questions], BELOW)
            ),
        )
        for one, passage in zip(features, passages, strict=True)
    ]
    prompts = question_ids(tokenizer, ["What is it?", "Who?"])
    batches = RowsBatches(exact, net.words, p, 0)
    step = RowsStep(model, net, p).eval()
    step.start(exact, batches)
    for layer in (reader.match_layer, reader.last_layer):
        W = step.whitening(layer)
        assert torch.allclose(W, W.mT, atol=1e-4) and not torch.allclose(W, torch.eye(len(W)), atol=0.1)
    streams = row_features.streams_below(model, tokenizer, prompts, BELOW)
    others = [(stream, torch.tensor(ids)) for stream, ids in zip(streams, prompts, strict=True)]
    batch = batches.collate(numbers, together, others)
    assert batch.right.flatten(1).any(1).all() and not batch.mask.all()
    loss, notes = step.loss(batch)
    assert 0 <= notes[f"exact_match_{'together' if together else 'alone'}"] <= 1
    step.plain_keys()
    torch.testing.assert_close(step.loss(batch)[0], loss, rtol=1e-3, atol=1e-3)
    adapted = DocToLoRA(model, tokenizer, net.eval())
    torch.testing.assert_close(
        loss, plain_loss(adapted, batch, [passages[i] for i in numbers], prompts, p), rtol=1e-3, atol=1e-3
    )


@torch.no_grad()
def test_words_of_a_question_are_sent_to_their_like(base, made, features):
    net, p = prepared(base), SMALL
    batches = RowsBatches(features, net.words, p, 0)
    step = RowsStep(base[1], net, p).eval()
    step.start(features, batches)

    def word(token: int) -> str:
        return base[2].decode([token]).strip().lower() or str(token)

    for together in (False, True):
        batch = batches.collate([2, 7, 11], together)
        match = step.matches(batch, step.codes(batch), step.lower(batch.streams)[0])
        here, away = match.found, match.astray
        assert (here.flatten(2).sum(-1) <= 1 + 1e-5).all() and here.min() >= 0
        assert (away.sum(-1) <= 1 + 1e-5).all() and away.min() >= 0 and match.log_null.max() <= 0
        if not together:
            assert torch.equal(here, match.of_each)
            torch.testing.assert_close(match.log_null.exp(), 1 - away.flatten(2).sum(-1), rtol=1e-3, atol=1e-5)
        losses, number = [], 0
        for place, i in enumerate((2, 7, 11)):
            passage = made[0][i]
            for prompt, _, _ in passage.questions:
                assert not together or away[number, :, place].max() == 0
                for n, token in enumerate(prompt):
                    like = [t for t, other in enumerate(passage.ids) if word(other) == word(token)]
                    if 1 <= len(like) <= 3:
                        losses.append(-here[number, n, place if together else 0, like].sum().log())
                number += 1
        torch.testing.assert_close(step.match_loss(batch, here), torch.stack(losses).mean(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_prompts_about_something_else_set_the_gate(base, features):
    net = prepared(base)
    step = RowsStep(base[1], net, replace(SMALL, gate_error=0.25)).eval()
    batches = RowsBatches(features, net.words, SMALL, 0)
    step.start(features, batches)
    net.reader.null_key.normal_()
    prompts = question_ids(
        base[2], [f"{word} is it?" for word in ("What", "Who", "Why", "How", "Where", "When", "Ada", "Bo")]
    )
    streams = row_features.streams_below(base[1], base[2], prompts, BELOW)
    others = [(stream, torch.tensor(ids)) for stream, ids in zip(streams, prompts, strict=True)]
    asked = [batches.collate(part, together, others) for part in ([0, 1, 2], [3, 4, 5]) for together in (False, True)]
    shares = step.calibrate(asked)
    assert set(shares) == {f"open_{who}_{where}" for who in ("related", "others") for where in ("alone", "together")}
    assert shares["open_others_alone"] == 0.25 and 0 < shares["open_others_together"] <= 0.3
    assert shares == step.calibrate(asked), "it stays where it is set"


def test_a_batch_without_a_reachable_answer_is_finite(base, features):
    net = prepared(base)
    step, batches = RowsStep(base[1], net, SMALL), RowsBatches(features, net.words, SMALL, 0)
    step.start(features, batches)
    batch = batches.collate([0, 1], False)
    loss = step(replace(batch, right=torch.zeros_like(batch.right)))["loss"]
    loss.backward()
    assert loss.isfinite() and all(q.grad is None or q.grad.isfinite().all() for q in net.parameters())
    assert all(value == value for value in step.report().values())


def test_a_few_steps_teach_the_pointer(base, features):
    net = prepared(base)
    p = replace(SMALL, dropout=0.0, steps=60, passages=6, together_share=0.3)
    step = RowsStep(base[1], net, p, validation_batches(features[:6], net.words, p))
    batches = RowsBatches(features, net.words, p, 0)
    step.start(features, batches)
    optimizer = torch.optim.Adam([one for one in net.parameters() if one.requires_grad], lr=1e-2)
    before = step.report()
    for i in range(60):
        optimizer.zero_grad()
        step(batches[i])["loss"].backward()
        optimizer.step()
    after = step.report()
    assert after["validation_pointer_loss_alone"] < 0.5 * before["validation_pointer_loss_alone"], (before, after)
    assert after["validation_pointer_loss_together"] < 0.7 * before["validation_pointer_loss_together"]
    assert after["validation_gate_loss_alone"] < before["validation_gate_loss_alone"]
    assert step.training and net.feature_mean.grad is None


# --- runs -----------------------------------------------------------------------------------------------------------
def test_a_stopped_run_resumes_to_the_weights_of_an_uninterrupted_one(base, tmp_path):
    source, _, _, frame, _ = base
    whole, two = (Run(tmp_path / name, seed=1, report_steps=1) for name in ("whole", "two"))
    features = tmp_path / "features"
    final = recipes.train_rows(SMALL, str(source), {"towns": frame}, whole, features)
    recipes.train_rows(SMALL, str(source), {"towns": frame}, replace(two, stop_at=2), features)
    assert (two.folder / "checkpoint-2").exists() and not (two.folder / "checkpoint-6").exists()
    again = recipes.train_rows(SMALL, str(source), {"towns": frame}, two, features)
    trained, resumed = d2l.load(final), d2l.load(again)
    own = dict(resumed.hypernetwork.named_parameters())
    for name, value in trained.hypernetwork.named_parameters():
        assert torch.equal(value, own[name]), name
    log = read_log(two.folder / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert all("validation_exact_match_alone" in line for line in log)
    assert len(frame) and trained.chunk_tokens == SMALL.longest_passage and trained.writes_rows
    with pytest.raises(ValueError, match=r"16 passages of towns .* needs 103"):
        recipes.train_rows(replace(SMALL, validation=100), str(source), {"towns": frame}, whole, features)


def train_from_file(source, file, run: Run, features) -> None:
    tables = {"towns": load_qa("squad", file, split="train")}
    recipes.train_rows(replace(SMALL, batches_per_step=2, steps=8), str(source), tables, run, features)


@pytest.mark.slow
def test_two_processes_share_features_and_steps(base, tmp_path):
    source, _, _, _, file = base
    ends = []
    for n_processes in (1, 2):
        run = Run(tmp_path / str(n_processes), seed=1, report_steps=2)
        started = processes.start_together(n_processes, train_from_file, source, file, run, run.folder / "features")
        for process in started:
            process.join(120)
        assert [process.exitcode for process in started] == [0] * n_processes
        ends.append(d2l.load(run.folder / "final").hypernetwork.state_dict())
        assert len(list((run.folder / "features" / "towns").iterdir())) == -(-len(NAMES) // row_features.PER_FILE)
    assert all(torch.allclose(value, ends[1][name], atol=1e-4) for name, value in ends[0].items())


def test_the_command_ends_in_a_model_that_loads(base, tmp_path, capsys):
    source, _, _, _, file = base
    sizes = [
        "latent_size=16", "n_blocks=1", "n_heads=2", "encoder_layers=(0, 2)", "longest_passage=60", "passages=3",
        "validation=0", "reader_layers=(3,)", "row_layers=(2, 3)",
    ]  # fmt: skip
    command = ["train", "--preset", "smollm2", "--stage", "rows", "--runs", str(tmp_path)]
    own = ["--questions", f"squad={file}", "--base", str(source), "--steps", "2", "--set", *sizes]
    main([*command, *own])
    final = tmp_path / "smollm2" / "rows_own_seed0" / "final"
    assert f"{final}: d2l.load reads it" in capsys.readouterr().out
    model = d2l.load(final)
    assert model.writes_rows and model.config.encoder_layers == (0, 2)
    assert isinstance(model.answer("Where?", model.internalize("Ada lives in Velm."), max_new_tokens=3), str)
    for wrong, reason in (
        ([], "needs --preset smollm2 and --questions"),
        (["--questions", "squad", "--fast"], "neither --fast nor --variant"),
        (["--questions", "squad", "--start", "x"], "--start needs --stage reading"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*command, *wrong])
        assert stopped.value.code == 2 and reason in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main([*command[:3], "--stage", "qa", "--questions", "squad"])
    assert stopped.value.code == 2 and "--questions is for --stage rows" in capsys.readouterr().err
