"""The published names: through the hub, through its cache without a connection, and from files put where we say."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from rehearsal import snapshot_in
from tiny_models import build_base_model, build_tokenizer, random_hypernetwork

import d2l_lib as d2l
from d2l_lib.formats import hub
from d2l_lib.formats.checkpoints import export

PUBLISHED = {
    "gemma_demo": "google/gemma-2-2b-it",
    "gemma_2b_d2l": "google/gemma-2-2b-it",
    "mistral_7b_d2l": "mistralai/Mistral-7B-Instruct-v0.2",
    "qwen_4b_d2l": "Qwen/Qwen3-4B-Instruct-2507",
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(folder of a tiny base model, its hypernetwork)."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = build_tokenizer()
    base_model = build_base_model(tokenizer)
    base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, random_hypernetwork(base_model, n_heads=16, n_kv_heads=4, head_dim=128)


def link_blob(snapshot: Path, name: str, content: bytes) -> None:
    """A file as the hub's cache keeps it: a link to a blob."""
    blob = snapshot.parents[1] / "blobs" / f"{abs(hash((name, content))):x}"
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(content)
    (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
    (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))


def fill_cache(cache: Path, parts, tmp_path) -> None:
    """All four published checkpoints and their base models, tiny ones, in one cache."""
    base, hypernetwork = parts
    published = snapshot_in(cache, "SakanaAI/doc-to-lora")
    for name, base_model in PUBLISHED.items():
        content = export(hypernetwork, tmp_path / "one.bin", base_model).read_bytes()
        step = 80_000 if name == "gemma_demo" else 20_000
        link_blob(published, f"{name}/checkpoint-{step}/pytorch_model.bin", content)
        link_blob(published, f"{name}/args.yaml", b"lora_r: 8\n")
    link_blob(published, "gemma_demo/checkpoint-9000/pytorch_model.bin", b"an earlier step")
    for base_model in set(PUBLISHED.values()):
        snapshot = snapshot_in(cache, base_model)
        for file in base.iterdir():
            link_blob(snapshot, file.name, file.read_bytes())


def test_the_published_names_are_found_in_the_cache_without_a_connection(tmp_path, parts):
    """In a process of its own, whose HF_HOME is the cache that the test built."""
    fill_cache(tmp_path / "home", parts, tmp_path)
    code = (
        "import sys, warnings, torch, d2l_lib as d2l\n"
        "for name in sys.argv[1:]:\n"
        "    with warnings.catch_warnings(record=True) as said:\n"
        "        warnings.simplefilter('always')\n"
        "        model = d2l.load('SakanaAI/doc-to-lora/' + name, device='cpu')\n"
        "    model.internalize('Ada keeps three cats.')\n"
        "    text = ' '.join(str(one.message) for one in said if 'holds the steps' in str(one.message))\n"
        "    print(name, model.base_source, model.hypernetwork.head.weight.sum().item(), text, sep='|')\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_CACHE", None)
    names = [*PUBLISHED, "gemma_demo/checkpoint-80000", "gemma_2b_d2l/checkpoint-20000/pytorch_model.bin"]
    project = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, env=environment, cwd=project, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == names
    assert [line[1] for line in lines] == [PUBLISHED[name.partition("/")[0]] for name in names]
    assert {float(line[2]) for line in lines} == {parts[1].head.weight.sum().item()}
    said = {line[0]: line[3] for line in lines if line[3]}
    assert said.keys() == {"gemma_demo"}
    assert "holds the steps 9000, 80000: the latest, checkpoint-80000, is loaded" in said["gemma_demo"]


FILES = [
    *(f"{name}/args.yaml" for name in PUBLISHED),
    *(f"gemma_demo/checkpoint-{step}/pytorch_model.bin" for step in (80_000, 9_000)),
    "gemma_demo/checkpoint-80000/optimizer.bin",
    "gemma_demo_2/checkpoint-1/pytorch_model.bin",
    "gemma_2b_d2l/checkpoint-20000/pytorch_model.bin",
    "mistral_7b_d2l/checkpoint-20000/pytorch_model.bin",
    "own/hypernetwork.safetensors",
    "own/config.json",
    "own/base_model/config.json",
    "own/base_model/model.safetensors",
    "own_2/hypernetwork.safetensors",
    "README.md",
]


@pytest.fixture
def asked(tmp_path, monkeypatch) -> list[str]:
    """A hub that can be reached: the files that it was asked for."""
    files = []

    def download(name, allow_patterns):
        files.extend(file for file in FILES if any(fnmatch(file, pattern) for pattern in allow_patterns))
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes(b"x")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_: FILES)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return files


@pytest.mark.parametrize(
    ("name", "place", "wanted"),
    [
        ("gemma_2b_d2l", "gemma_2b_d2l/checkpoint-20000/pytorch_model.bin", None),
        ("gemma_2b_d2l/", "gemma_2b_d2l/checkpoint-20000/pytorch_model.bin", None),
        ("gemma_demo/checkpoint-9000", "gemma_demo/checkpoint-9000/pytorch_model.bin", None),
        ("gemma_demo/checkpoint-9000/pytorch_model.bin", "gemma_demo/checkpoint-9000/pytorch_model.bin", None),
        ("own", "own", {file for file in FILES if file.startswith("own/")}),
    ],
)
def test_only_the_files_of_the_checkpoint_that_is_meant_are_asked_for(tmp_path, asked, name, place, wanted):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hub.from_hub(f"SakanaAI/doc-to-lora/{name}") == tmp_path / place
    assert set(asked) == (wanted or {place})


def test_the_latest_step_is_asked_for_and_said(tmp_path, asked):
    with pytest.warns(UserWarning, match="doc-to-lora/gemma_demo holds the steps 9000, 80000: the latest, checkpoint-"):
        place = hub.from_hub("SakanaAI/doc-to-lora/gemma_demo")
    assert asked == ["gemma_demo/checkpoint-80000/pytorch_model.bin"]
    assert place == tmp_path / asked[0]


def test_the_whole_repository_is_not_a_checkpoint(asked):
    with pytest.raises(
        ValueError, match=r"several checkpoints.*gemma_2b_d2l/checkpoint-20000/pytorch_model.bin, gemma"
    ):
        hub.from_hub("SakanaAI/doc-to-lora")
    with pytest.raises(
        FileNotFoundError, match="doc-to-lora/gemma_9b holds no checkpoint; the repository has gemma_2b"
    ):
        hub.from_hub("SakanaAI/doc-to-lora/gemma_9b")
    assert asked == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_without_a_connection_the_error_says_what_to_put_where_and_that_works(tmp_path, monkeypatch, parts, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    source = f"SakanaAI/doc-to-lora/{name}"
    with pytest.raises(FileNotFoundError) as caught:
        d2l.load(source)
    message = str(caught.value)
    step = 80_000 if name == "gemma_demo" else 20_000
    file = f"{name}/checkpoint-{step}/pytorch_model.bin"
    assert f"hf download SakanaAI/doc-to-lora {file}; its base model: hf download {PUBLISHED[name]}." in message
    assert f"to {tmp_path / 'cache'}, or" in message
    put, base_folder = re.search(r"put the file at (\S+) and the base model's .* into (\S+)$", message).groups()
    assert put == str(tmp_path / source / f"checkpoint-{step}" / "pytorch_model.bin")
    assert base_folder == str(tmp_path / PUBLISHED[name])

    export(parts[1], put, PUBLISHED[name])
    with pytest.raises(FileNotFoundError, match=re.escape(f"of {PUBLISHED[name]} into {base_folder}")):
        d2l.load(source, device="cpu")
    shutil.copytree(parts[0], base_folder)
    model = d2l.load(source, device="cpu")
    assert torch.equal(model.hypernetwork.head.weight, parts[1].head.weight)


def test_a_name_that_is_not_published(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for source in ("SakanaAI/doc-to-lora/gemma_9b", "SakanaAI/doc-to-lora"):
        with pytest.raises(FileNotFoundError, match="It holds gemma_demo, gemma_2b_d2l, mistral_7b_d2l, qwen_4b_d2l"):
            d2l.load(source)


def test_a_local_folder_of_steps(tmp_path, parts):
    for step in (500, 1000, 90):
        export(parts[1], tmp_path / f"checkpoint-{step}" / "pytorch_model.bin", "some/base")
        (tmp_path / f"checkpoint-{step}" / "training_args.bin").write_bytes(b"x")
    with pytest.warns(UserWarning, match="holds the steps 90, 500, 1000: the latest"):
        assert hub.checkpoint_in(tmp_path) == tmp_path / "checkpoint-1000" / "pytorch_model.bin"
    assert hub.checkpoint_in(tmp_path / "checkpoint-90") == tmp_path / "checkpoint-90" / "pytorch_model.bin"
    shutil.copytree(parts[0], tmp_path / "checkpoint-90" / "base_model")
    (tmp_path / "checkpoint-90" / "base_model" / "pytorch_model.bin").write_bytes(b"weights of the base model")
    assert hub.checkpoint_in(tmp_path / "checkpoint-90") == tmp_path / "checkpoint-90" / "pytorch_model.bin"
    model = d2l.load(tmp_path / "checkpoint-90", device="cpu")  # the stored name, some/base, is nowhere
    assert model.base_source == str(tmp_path / "checkpoint-90" / "base_model")
