"""Nothing that is written destroys or half-writes anything: folders and files of others, links, inputs, full disks."""

import errno
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import kill_writers
import processes
import pytest
import torch
from tiny_models import build_base_model, build_model, build_tokenizer, random_hypernetwork

import d2l_lib as d2l
from d2l_lib import __main__ as command
from d2l_lib import records
from d2l_lib.adapter import Adapter
from d2l_lib.formats import pickles, writing
from d2l_lib.formats.checkpoints import convert, export, load_checkpoint, read_published, save_checkpoint
from d2l_lib.formats.writing import FolderKind, atomic_folder, read_whole
from d2l_lib.presets import Schedule
from d2l_lib.studies import watch
from d2l_lib.training import loop, recipes, selfgen, text_to_lora
from d2l_lib.training.notes import Step

HEADS = {"n_heads": 16, "n_kv_heads": 4, "head_dim": 128}  # of the published code
KIND = FolderKind("sample", ("mark", "part/*.bin"), lambda folder: ("mark", "part/*.bin"))
THESIS = "three years of work"


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(scope="module")
def adapter(model):
    return model.internalize("The code is 4217. It is kept in the blue safe.")


@pytest.fixture(scope="module")
def published(model, tmp_path_factory):
    hypernetwork = random_hypernetwork(model.base_model, latent_size=8, n_blocks=1, **HEADS)
    return export(hypernetwork, tmp_path_factory.mktemp("published") / "pytorch_model.bin", "some/base")


@pytest.fixture(scope="module")
def writers(model, adapter, published):
    """{what is called: it writes a folder of this name}"""
    network = text_to_lora.TextToLoRA(random_hypernetwork(model.base_model, use_bias=False).config)
    return {
        "export_peft": adapter.export_peft,
        "model.save": lambda folder: model.save(folder, include_base=True),
        "save_checkpoint": lambda folder: save_checkpoint(folder, model.hypernetwork, {"base_model": "tiny"}),
        "convert": lambda folder: convert(published, folder),
        "text_to_lora": lambda folder: text_to_lora.save_text_to_lora(folder, network),
    }


WRITERS = ["export_peft", "model.save", "save_checkpoint", "convert", "text_to_lora"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# --- whose a folder is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_with_files_of_others_is_refused_and_they_are_named(name, writers, tmp_path):
    folder = tmp_path / "mine"
    (folder / "notes").mkdir(parents=True)
    (folder / "notes" / "thesis.txt").write_text(THESIS)
    (folder / ".hidden").write_text("x")
    (folder / "config.json").write_text('{"format": "of another program"}')
    (folder / "model.safetensors").write_text("x")
    before = contents(folder)
    with pytest.raises(FileExistsError, match=r"\.hidden.*notes/thesis\.txt.*new or empty folder"):
        writers[name](folder)
    assert contents(folder) == before and os.listdir(tmp_path) == ["mine"]


@pytest.mark.parametrize("name", WRITERS)
def test_settings_of_another_program_alone_are_not_taken_for_ours(name, writers, tmp_path):
    for file, content in (("config.json", '{"model_type": "qwen3"}'), ("adapter_config.json", '{"peft_type": "LORA"}')):
        folder = tmp_path / file
        folder.mkdir()
        (folder / file).write_text(content)
        with pytest.raises(FileExistsError, match=file):
            writers[name](folder)
        assert contents(folder) == {file: content.encode()}


@pytest.mark.parametrize("name", WRITERS)
def test_an_empty_folder_and_an_earlier_output_are_written(name, writers, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir(mode=0o750)
    writers[name](folder)
    names = set(contents(folder))
    assert names and stat.S_IMODE(folder.stat().st_mode) == 0o750
    inode = folder.stat().st_ino
    writers[name](folder)
    assert set(contents(folder)) == names and folder.stat().st_ino != inode, "it was written anew"
    assert os.listdir(tmp_path) == ["out"]
    (folder / "README.md").write_text("my notes on this adapter")
    with pytest.raises(FileExistsError, match=r": README\.md\. Nothing was written"):
        writers[name](folder)
    assert set(contents(folder)) == {*names, "README.md"}


@pytest.mark.parametrize("name", WRITERS)
def test_another_kind_of_output_is_not_replaced(name, writers, tmp_path):
    other = "model.save" if name == "export_peft" else "export_peft"
    writers[other](tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(FileExistsError):
        writers[name](tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_peft_folder_of_another_program_is_not_replaced(adapter, tmp_path):
    from safetensors.torch import save_file

    folder = adapter.export_peft(tmp_path / "theirs")
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    before = contents(folder)
    with pytest.raises(FileExistsError, match="adapter_config.json, adapter_model.safetensors"):
        adapter.export_peft(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("name", WRITERS)
def test_the_working_directory_and_folders_above_it_are_refused(name, writers, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for folder in (".", "", "..", "/", tmp_path, tmp_path / "home", "../here/./"):
        with pytest.raises(FileExistsError, match="working directory, a folder above it or your home"):
            writers[name](folder)
    assert os.listdir(".") == [] and sorted(os.listdir(tmp_path)) == ["here", "home"]


def test_a_link_inside_an_earlier_output_is_not_ours(adapter, tmp_path):
    folder = adapter.export_peft(tmp_path / "out")
    (folder / "adapter_config.json").rename(tmp_path / "elsewhere.json")
    (folder / "adapter_config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(FileExistsError, match="adapter_config.json"):
        adapter.export_peft(folder)
    assert (folder / "adapter_config.json").is_symlink()


def test_what_comes_into_the_folder_while_it_is_written_stays(tmp_path):
    folder = tmp_path / "out"
    for turn in range(2):
        with atomic_folder(folder, KIND) as temporary:
            (temporary / "mark").write_text(str(turn))
    exchange = writing._exchange

    def late(one, other):
        (other / "deep").mkdir()
        (other / "deep" / "thesis.txt").write_text(THESIS)
        return exchange(one, other)

    with pytest.MonkeyPatch.context() as patch, atomic_folder(folder, KIND) as temporary:
        (temporary / "mark").write_text("new")
        patch.setattr(writing, "_exchange", late)
    assert contents(folder) == {"mark": b"new", "deep/thesis.txt": THESIS.encode()}
    assert os.listdir(tmp_path) == ["out"]


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_to_a_folder_is_written_through(name, writers, tmp_path):
    for target in (tmp_path / "big", tmp_path / "not yet there"):
        link = tmp_path / f"link to {target.name}"
        link.symlink_to(target)
        for _ in range(2):
            writers[name](link)
            assert link.is_symlink() and contents(target)
    assert hidden(tmp_path) == []


def test_a_link_to_a_file_is_written_through(adapter, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "chain")
    (tmp_path / "chain").symlink_to(Path("disk") / "a.safetensors")
    for _ in range(2):  # dangling, then not
        adapter.save(tmp_path / "a.safetensors")
        assert (tmp_path / "a.safetensors").is_symlink() and (tmp_path / "chain").is_symlink()
        assert Adapter.load(tmp_path / "disk" / "a.safetensors") == adapter
    assert os.listdir(tmp_path / "disk") == ["a.safetensors"] and hidden(tmp_path) == []
    records.write_jsonl(tmp_path / "chain", [1])
    assert (tmp_path / "disk" / "a.safetensors").read_text() == "1\n"


# --- single files -----------------------------------------------------------------------------------------------------


def test_an_adapter_does_not_replace_other_kinds_of_files(adapter, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "thesis.pdf").write_bytes(b"%PDF-1.7")
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    for name in ("thesis.pdf", "model.safetensors"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(FileExistsError, match=f"{name} is a file of another kind"):
            adapter.save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    (tmp_path / "old.st").write_bytes(b"cut off")
    assert Adapter.load(adapter.save(tmp_path / "old.st")) == adapter
    assert Adapter.load(adapter.save(tmp_path / "old.st")) == adapter
    with pytest.raises(IsADirectoryError, match="is a folder"):
        adapter.save(tmp_path)


def test_devices_and_protected_files_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="no ordinary file"):
        writing.write_atomic(tmp_path / "pipe", "x")
    path = writing.write_atomic(tmp_path / "a.txt", "old")
    path.chmod(0o600)
    writing.write_atomic(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.read_text() == "new"
    with pytest.MonkeyPatch.context() as patch:  # root may write everything
        patch.setattr(writing.os, "access", lambda *_: False)
        with pytest.raises(PermissionError, match="write-protected"):
            writing.write_atomic(path, "newer")
        with pytest.raises(PermissionError, match="write-protected"):
            writing.check_folder(tmp_path, KIND)
    assert path.read_text() == "new"


def test_the_longest_names_can_be_written(tmp_path):
    for name in ("x" * 255, "é" * 127):
        assert writing.write_atomic(tmp_path / name, "1").read_text() == "1"


# --- inputs of the same call ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loaded", [False, True])
def test_files_with_usual_names_that_somebody_put_beside_a_saved_model_stay(model, loaded, tmp_path):
    """The settings list what was written; without the list, as in folders of before, usual names count as written."""
    folder = model.save(tmp_path / "model", include_base=True)
    model = d2l.load(folder) if loaded else model
    listed = records.read_json(folder / "config.json")["meta"]["files"]
    assert listed == sorted(f"base_model/{path.name}" for path in (folder / "base_model").iterdir())
    for _ in range(2):
        model.save(folder)  # over what it wrote itself
        assert records.read_json(folder / "config.json")["meta"]["files"] == listed
    mine = folder / "base_model" / "vocab.json"
    mine.write_text("mine")
    with pytest.raises(FileExistsError, match="holds files that do not belong.*vocab.json"):
        model.save(folder, include_base=True)
    assert mine.read_text() == "mine"
    settings = records.read_json(folder / "config.json")
    del settings["meta"]["files"]
    (folder / "config.json").write_text(json.dumps(settings))
    build_model().save(folder, include_base=True)
    assert not mine.exists()


def test_a_model_saved_where_it_came_from_keeps_its_base_model(model, tmp_path):
    folder = model.save(tmp_path / "m", include_base=True)
    base = contents(folder / "base_model")
    text = "The code is 4217."
    expected = model.internalize(text)
    for options in ({}, {"include_base": False}, {}):
        d2l.load(folder, device="cpu").save(folder, **options)
        assert contents(folder / "base_model") == base
        assert d2l.load(folder, device="cpu").internalize(text) == expected
    d2l.load(folder, device="cpu").save(folder, include_base=True)
    assert d2l.load(folder, device="cpu").internalize(text) == expected
    assert os.listdir(tmp_path) == ["m"]
    moved = folder.rename(tmp_path / "moved")
    assert d2l.load(moved, device="cpu").internalize(text) == expected


def test_an_encoder_of_its_own_stays_too(tmp_path):
    from d2l_lib.encoder import ContextEncoder
    from d2l_lib.model import DocToLoRA

    tokenizer = build_tokenizer()
    base, other = build_base_model(tokenizer), build_base_model(tokenizer, seed=7)
    hypernetwork = random_hypernetwork(base)
    encoder = ContextEncoder.from_config(other, hypernetwork.config)
    made = DocToLoRA(base, tokenizer, hypernetwork, encoder=encoder, encoder_tokenizer=tokenizer)
    folder = made.save(tmp_path / "m")
    before = contents(folder)
    assert {"base_model/model.safetensors", "encoder_model/model.safetensors"} <= before.keys()
    again = d2l.load(folder, device="cpu")
    again.save(folder)
    assert contents(folder).keys() == before.keys()
    assert d2l.load(folder, device="cpu").internalize("Hello.") == made.internalize("Hello.")


def test_a_base_model_that_somebody_put_beside_a_checkpoint_is_never_deleted(model, tmp_path):
    folder = save_checkpoint(tmp_path / "m", model.hypernetwork, {"base_model": "big/model"})
    model.base_model.save_pretrained(folder / "base_model")
    model.tokenizer.save_pretrained(folder / "base_model")
    mine = contents(folder / "base_model")
    (tmp_path / "disk").mkdir()
    for is_link in (False, True):
        if is_link:
            (folder / "base_model").rename(tmp_path / "disk" / "big")
            (folder / "base_model").symlink_to(tmp_path / "disk" / "big")
        for _ in range(2):
            d2l.load(folder, device="cpu").save(folder)
            assert contents(folder / "base_model") == mine and (folder / "base_model").is_symlink() == is_link
        for write in (
            lambda: model.save(folder, include_base=True),
            lambda: save_checkpoint(folder, model.hypernetwork, {}),
        ):
            with pytest.raises(FileExistsError, match="base_model"):
                write()
        assert contents(folder / "base_model") == mine
    assert load_checkpoint(folder)[1]["base_model"] == "big/model"


def test_a_base_model_alone_in_the_folder_stays(model, tmp_path):
    folder = tmp_path / "m"
    checkpoint = save_checkpoint(tmp_path / "c", model.hypernetwork, {"base_model": "big/model"})
    model.base_model.save_pretrained(folder / "base_model")
    model.tokenizer.save_pretrained(folder / "base_model")
    mine = contents(folder / "base_model")
    for _ in range(2):
        d2l.load(checkpoint, base_model=folder / "base_model", device="cpu").save(folder)
        assert contents(folder / "base_model") == mine
    with pytest.raises(FileExistsError, match="base_model"):
        save_checkpoint(folder, model.hypernetwork, {})


def test_convert_keeps_its_source_wherever_the_target_is(model, published, tmp_path):
    source = tmp_path / "a" / "source"
    source.mkdir(parents=True)
    (source / "pytorch_model.bin").write_bytes(published.read_bytes())
    before = contents(tmp_path / "a")
    for target in (source, tmp_path / "a", tmp_path / "a" / "source" / ".." / "source"):
        with pytest.raises(FileExistsError, match="pytorch_model.bin"):
            convert(source, target)
        assert contents(tmp_path / "a") == before
    inside = convert(source, source / "inside")
    assert read_published(source)[2] == "some/base" == load_checkpoint(inside)[1]["base_model"]
    own = convert(source, tmp_path / "own")
    kept = contents(own)
    convert(own, own)
    assert contents(own).items() >= kept.items(), "the published file was put beside"


def test_convert_does_not_replace_a_published_file_of_others(published, tmp_path):
    own = convert(published, tmp_path / "own")
    theirs = tmp_path / "theirs" / "pytorch_model.bin"
    theirs.parent.mkdir()
    torch.save({"weight": torch.ones(3)}, theirs)
    before = theirs.read_bytes()
    for target in (theirs, theirs.parent):
        with pytest.raises(FileExistsError, match="of another kind"):
            convert(own, target)
        assert theirs.read_bytes() == before
    for _ in range(2):
        assert read_published(convert(own, tmp_path / "out.bin"))[2] == "some/base"


def test_the_mark_of_an_exported_file_is_read_by_torch_and_missed_where_it_is_cut(published, tmp_path):
    assert published.read_bytes().endswith(pickles.COMMENT)
    assert torch._C.PyTorchFileReader(str(published)).get_all_records()
    for cut in (1, len(pickles.COMMENT)):
        (tmp_path / "cut.bin").write_bytes(published.read_bytes()[:-cut])
        with pytest.raises(pickles.CheckpointError, match="cut off"):
            read_published(tmp_path / "cut.bin")


# --- one step, with and without the system's exchange -----------------------------------------------------------------


@pytest.fixture(params=["exchange", "without"])
def system(request, monkeypatch):
    if request.param == "without":
        monkeypatch.setattr(writing, "_exchange", lambda one, other: False)
    return request.param


def write_sample(folder: Path, text: str) -> None:
    with atomic_folder(folder, KIND) as temporary:
        (temporary / "mark").write_text(text)
        (temporary / "part").mkdir()
        (temporary / "part" / "x.bin").write_text(text)


def read_sample(folder: Path) -> tuple[str, str]:
    return (folder / "mark").read_text(), (folder / "part" / "x.bin").read_text()


def test_folders_are_replaced_on_every_system(system, tmp_path):
    for text in ("one", "two", "three"):
        write_sample(tmp_path / "out", text)
        assert read_sample(tmp_path / "out") == (text, text)
        assert os.listdir(tmp_path) == ["out"]


def test_threads_that_write_and_read_one_folder(system, tmp_path):
    folder, errors = tmp_path / "out", []
    write_sample(folder, "first")

    def write(number: int) -> None:
        try:
            for turn in range(15):
                write_sample(folder, f"{number} {turn}")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        one, other = read_whole(folder, read_sample)
        assert one == other
    assert not errors
    assert os.listdir(tmp_path) == ["out"]


def die_between_the_two_steps(path: Path) -> None:
    writing._exchange = lambda one, other: False
    rename, calls = os.rename, []

    def killed(*names):
        calls.append(names)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*names)

    writing.os.rename = killed
    write_sample(path, "new")


def test_a_kill_between_the_two_steps_of_the_fallback_loses_nothing(tmp_path):
    write_sample(tmp_path / "out", "old")
    writer = processes.start(die_between_the_two_steps, tmp_path / "out")
    writer.join(300)
    assert writer.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert read_whole(tmp_path / "out", read_sample) == ("old", "old")
    write_sample(tmp_path / "out", "newer")
    assert read_sample(tmp_path / "out") == ("newer", "newer") and os.listdir(tmp_path) == ["out"]


def test_a_reader_begins_again_where_the_folder_is_replaced(tmp_path):
    folder = tmp_path / "out"
    write_sample(folder, "old")
    seen = []

    def read(place: Path) -> tuple[str, str]:
        first = (place / "mark").read_text()
        seen.append(first)
        if len(seen) == 1:
            write_sample(folder, "new")
        return first, (place / "part" / "x.bin").read_text()

    assert read_whole(folder, read) == ("new", "new") and seen == ["old", "new"]
    with pytest.raises(ValueError, match="damaged"):
        read_whole(folder, lambda place: (_ for _ in ()).throw(ValueError("damaged")))
    with pytest.raises(FileNotFoundError):
        read_whole(tmp_path / "nothing", read_sample)


def test_what_killed_processes_left_goes_and_what_others_use_stays(tmp_path):
    folder = tmp_path / "out"
    write_sample(folder, "old")
    own = writing._temporary_name(folder).name
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    of_dead = own.replace(f".{os.getpid()}.", f".{ended.pid}.")
    elsewhere = of_dead[: -len("00000000.tmp") - 6] + "ffffff00000000.tmp"  # of another machine on a shared disk
    for name in (own, of_dead, elsewhere, ".out.notes.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mark").write_text("x")
    (tmp_path / of_dead / "thesis.txt").write_text(THESIS)
    write_sample(folder, "new")
    assert sorted(hidden(tmp_path)) == sorted([own, of_dead, elsewhere, ".out.notes.tmp"])
    assert contents(tmp_path / of_dead) == {"thesis.txt": THESIS.encode()}, "only what belongs to the kind is deleted"
    assert contents(tmp_path / own) == contents(tmp_path / elsewhere) == {"mark": b"x"}
    (tmp_path / of_dead / "thesis.txt").unlink()
    write_sample(folder, "newer")
    assert not (tmp_path / of_dead).exists()


# --- trainings and generated data -------------------------------------------------------------------------------------


class Small(Step):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(2, 2)

    def forward(self, x):
        loss = self.line(x).square().mean()
        self.notes.add("total_loss", float(loss.detach()))
        return {"loss": loss}


class Ones(torch.utils.data.Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, index):
        return {"x": torch.ones(1, 2)}


def train(run: Path, stop_at: int, keep: int = 2) -> None:
    schedule = Schedule(steps=100, learning_rate=1e-3, warmup_steps=1)
    options = {"stop_at": stop_at, "keep": keep, "report_steps": 1, "save_steps": 1}
    loop.fit(Small(), Ones(), schedule, loop.Run(run, **options))


def test_a_training_deletes_only_what_a_training_wrote(tmp_path, capsys):
    train(tmp_path, 2)
    (tmp_path / "checkpoint-1" / "thesis.txt").write_text(THESIS)
    (tmp_path / "checkpoint-9").mkdir()  # half-written, as it seems
    (tmp_path / "checkpoint-9" / "thesis.txt").write_text(THESIS)
    (tmp_path / "checkpoint-9" / "optimizer.pt").write_text("half")
    train(tmp_path, 4)
    assert [folder.name for folder in loop.checkpoints(tmp_path) if loop.is_whole(folder)] == [
        "checkpoint-3",
        "checkpoint-4",
    ]
    for number in (1, 9):
        assert contents(tmp_path / f"checkpoint-{number}") == {"thesis.txt": THESIS.encode()}
        assert f"checkpoint-{number} stays, for it holds thesis.txt" in capsys.readouterr().out or number == 9


def test_a_training_leaves_runs_of_other_programs_alone(tmp_path):
    (tmp_path / "theirs" / "checkpoint-500").mkdir(parents=True)
    (tmp_path / "theirs" / "checkpoint-500" / "optimizer.pt").write_text("x")
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log.jsonl").write_text('{"time": 1}\n')
    for name in ("theirs", "log"):
        before = contents(tmp_path / name)
        with pytest.raises(FileExistsError, match="choose another folder for this run"):
            train(tmp_path / name, 1)
        assert contents(tmp_path / name) == before


def test_a_base_model_of_other_sizes_is_not_replaced(tmp_path):
    model, tokenizer = build_base_model(build_tokenizer()), build_tokenizer()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = model.config.to_dict()
    writing.check_folder(tmp_path / "base", recipes._base_folder(config))
    with pytest.raises(FileExistsError, match="config.json"):
        writing.check_folder(tmp_path / "base", recipes._base_folder(config | {"hidden_size": 64}))


def test_a_log_that_was_cut_off_goes_on(tmp_path):
    path = tmp_path / "log.jsonl"
    for n in range(2):
        records.append_jsonl(path, {"n": n})
    with path.open("ab") as file:
        file.write(b'{"n": 2')
    assert records.read_appended(path) == [{"n": 0}, {"n": 1}]
    path.write_bytes(b'{"n": \n{"n": 1}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        records.read_appended(path)


def test_scores_are_not_written_over_another_file(tmp_path):
    for content in ("no newline at the end", "[1, 2]\n", '{"a": 1}\n'):
        (tmp_path / "mine.txt").write_text(content)
        with pytest.raises(ValueError, match="mine.txt"):
            watch.read_scores(tmp_path / "mine.txt")
        assert (tmp_path / "mine.txt").read_text() == content


@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.json", "shard-00000.parquet"])
def test_generated_data_do_not_replace_files_of_others(name, tmp_path):
    (tmp_path / name).write_text("// theirs")
    with pytest.raises(ValueError, match="choose a"):
        selfgen._open_folder(tmp_path, {"format": selfgen.FORMAT, "version": 1})
    assert contents(tmp_path) == {name: b"// theirs"}


# --- full disks and errors of commands --------------------------------------------------------------------------------


@contextmanager
def full_disk(limit: int):
    """Writes beyond `limit` bytes of one file fail as they do on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", [*WRITERS, "adapter.save", "convert to a file"])
def test_a_full_disk_names_the_output_and_leaves_the_old_one(name, writers, adapter, published, tmp_path):
    own = convert(published, tmp_path / "own")
    files = {"adapter.save": adapter.save, "convert to a file": lambda path: convert(own, path)}
    path = tmp_path / ("out.bin" if "file" in name else "out")
    write = (writers | files)[name]
    write(path)
    before = contents(tmp_path)
    with full_disk(300), pytest.raises(OSError, match="File too large|disk full") as failed:
        write(path)
    assert Path(failed.value.filename).name == path.name and failed.value.errno in (errno.EFBIG, errno.EIO)
    assert contents(tmp_path) == before and hidden(tmp_path) == []


def test_appending_on_a_full_disk_leaves_whole_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    records.append_jsonl(path, {"n": 0})
    before = path.read_bytes()
    with full_disk(20), pytest.raises(OSError, match="File too large") as failed:
        records.append_jsonl(path, {"n": "x" * 100})
    assert failed.value.filename == str(path) and path.read_bytes() == before


def test_a_training_on_a_full_disk_names_the_checkpoint(tmp_path):
    train(tmp_path, 1)
    with full_disk(1000), pytest.raises(OSError, match="File too large|disk full") as failed:
        train(tmp_path, 3)
    assert "checkpoint-2" in failed.value.filename
    assert Path(loop._last_whole_checkpoint(tmp_path)).name == "checkpoint-1"


def test_every_command_ends_in_one_line(project_folder):
    files = [path for path in (project_folder / "d2l_lib").rglob("*.py") if "\ndef main(" in path.read_text()]
    for path in files:
        before, _, after = path.read_text().partition("\ndef main(")
        assert 'one_line_errors("' in before.splitlines()[-1] or "with one_line_errors(" in after, path
    assert project_folder / "d2l_lib" / "__main__.py" in files


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/a.bin"), "cmd: /x/a.bin: No space left on device\n", 1),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "cmd: /x: Permission denied\n", 1),
        (FileExistsError("x holds files\nof others"), "cmd: x holds files of others\n", 1),
        (ValueError("seed must be positive"), "cmd: seed must be positive\n", 1),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "cmd: the file could not be written", 1),
        (KeyboardInterrupt(), "cmd: stopped; files that were finished are kept\n", 130),
    ],
)
def test_errors_of_commands_are_one_line(error, line, status, capsys):
    @command.one_line_errors("cmd")
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == status
    assert capsys.readouterr().err.startswith(line) and line.count("\n") <= 1


def test_faults_of_the_program_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), command.one_line_errors("cmd"):
        raise ZeroDivisionError


@pytest.fixture(scope="module")
def inputs(model, published, tmp_path_factory):
    """A folder with what the commands read."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "notes.txt").write_text("The code is 4217. It is kept in the blue safe.")
    records.write_jsonl(folder / "passages.jsonl", [{"text": "A passage. " * 100, "token_count": 200}])
    model.save(folder / "model", include_base=True)
    build_base_model(model.tokenizer, window=2048).save_pretrained(folder / "base")
    model.tokenizer.save_pretrained(folder / "base")
    convert(published, folder / "own")
    return folder


SMALL_RUN = (
    "latent_size=16 n_latent_queries=8 n_blocks=1 n_heads=4 n_kv_heads=2 head_dim=8 batches_per_step=2 shortest=48 "
    "context_tokens=1200"
)
FULL = {
    "generate": "generate --out OUT --documents 4 --shard-size 4",
    "generate for texts": "generate --out OUT --model IN/base --source IN/passages.jsonl --documents 1 --shard-size 1",
    "convert": "convert PUBLISHED OUT",
    "convert back": "convert IN/own OUT.bin",
    "internalize": "internalize IN/notes.txt -o OUT.safetensors --model IN/model --quiet",
    "corpora": "corpora write fineweb-edu --source IN/passages.jsonl --out OUT.jsonl",
    "train": "train --preset paper-gemma --stage needle --base IN/base --runs OUT --steps 1 --set " + SMALL_RUN,
}


@pytest.mark.parametrize("name", FULL)
def test_a_command_on_a_full_disk_ends_in_one_line(name, inputs, published, tmp_path, capsys):
    words = {"IN": inputs, "OUT": tmp_path / "out", "PUBLISHED": published}
    line = re.sub("|".join(words), lambda match: str(words[match[0]]), FULL[name])
    with full_disk(500), pytest.raises(SystemExit) as stopped:
        command.main(line.split())
    message = capsys.readouterr().err
    lines = [one for one in message.splitlines() if one.startswith(f"d2l {line.split()[0]}: ")]
    assert stopped.value.code == 1 and len(lines) == 1, message
    assert "File too large" in lines[0] and str(tmp_path / "out") in lines[0] and "Traceback" not in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size >= 500]
    assert not [path for path in tmp_path.rglob(".*") if path.name.endswith(".tmp")]


# --- real kills -------------------------------------------------------------------------------------------------------


def what_is_printed_by(function, *arguments) -> str:
    printed = io.StringIO()
    with redirect_stdout(printed):
        function(*arguments)
    return printed.getvalue()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_and_concurrent_writers():
    printed = processes.run(what_is_printed_by, kill_writers.main, 3, 16, "save,export,convert,shards", timeout=600)
    assert printed.count("3 kills") == 6 and printed.count("no mixture") == 5


def test_errors_that_name_each_other_are_followed_once():
    first, second = ValueError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    assert writing.write_failure(first) is None
    second.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")
    assert writing.write_failure(first).errno == errno.ENOSPC
