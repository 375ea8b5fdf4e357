"""Find a checkpoint in a folder, or in a repository of the Hugging Face hub (downloaded, or from its cache).

The published checkpoints are one repository (https://huggingface.co/SakanaAI/doc-to-lora) with a folder for each, and
in it a folder `checkpoint-N` for each saved step N. Only the files of one checkpoint are downloaded.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from d2l_lib.formats.checkpoints import PUBLISHED, SETTINGS, WEIGHTS

# {folder: (step of its checkpoint, base model)}
REPOSITORY = "SakanaAI/doc-to-lora"
PUBLISHED_MODELS = {
    "gemma_demo": (80_000, "google/gemma-2-2b-it"),
    "gemma_2b_d2l": (20_000, "google/gemma-2-2b-it"),
    "mistral_7b_d2l": (20_000, "mistralai/Mistral-7B-Instruct-v0.2"),
    "qwen_4b_d2l": (20_000, "Qwen/Qwen3-4B-Instruct-2507"),
}
BASE_MODEL_FILES = "config.json, *.safetensors, tokenizer.json, tokenizer_config.json"


def checkpoint_in(folder: Path) -> Path:
    """`folder` in this project's format, else the published *.bin in or below it; of several steps the latest.

    FileNotFoundError for none, ValueError for several that are not steps of one training.
    """
    if (folder / WEIGHTS).is_file():
        return folder
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.bin") if path.is_file()]
    chosen = _choose(files, "", str(folder))
    if chosen is None:
        hint = " (it looks like a base model: pass it as base_model=)" if (folder / SETTINGS).is_file() else ""
        raise FileNotFoundError(f"{folder} holds neither {WEIGHTS} nor a published *.bin{hint}")
    return folder / chosen


def from_hub(source: str) -> Path:
    """The checkpoint of a hub repository ("owner/name") or of a folder or file inside it, downloaded or cached.

    Of several steps the latest, with a warning that names it. FileNotFoundError says which files to put where.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    owner, name, *inside = source.rstrip("/").split("/")
    repository, below = f"{owner}/{name}", "/".join(inside)
    try:
        return _fetch(repository, below)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"no folder or file {source!r} here, and the hub gave no repository {repository} ({reason}): download it "
            f"where the hub is reached, then pass the folder or *.bin file{_what_to_get(repository, below)}"
        ) from error


def _fetch(repository: str, below: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    place = f"{repository}/{below}".rstrip("/")
    try:
        files = HfApi().list_repo_files(repository)
    except Exception:  # whatever fails at the hub, its cache may have the checkpoint
        snapshot = _cached(repository) or Path(snapshot_download(repository, allow_patterns=_guess(below)))
        inside = snapshot / below
        return inside if inside.is_file() else checkpoint_in(inside)
    chosen = _choose(files, below, place)
    if chosen is None:
        places = sorted({file.rpartition("/")[0] or file for file in files if file.endswith((".bin", WEIGHTS))})
        raise FileNotFoundError(f"{place} holds no checkpoint; the repository has {', '.join(places) or 'none'}")
    is_file = chosen.endswith(".bin")
    folder = chosen.rpartition("/")[0] if is_file else chosen
    prefix = f"{folder}/" if folder else ""
    wanted = [chosen] if is_file else [prefix + WEIGHTS, prefix + SETTINGS]
    models = [file for file in files if file.startswith((f"{prefix}base_model/", f"{prefix}encoder_model/"))]
    return Path(snapshot_download(repository, allow_patterns=wanted + models)) / chosen


def _choose(files: Sequence[str], below: str, place: str) -> str | None:
    """The *.bin, or the folder of this project's format, that `below` means among a repository's (folder's) files."""
    prefix = f"{below}/" if below else ""
    if (below in files and below.endswith(".bin")) or prefix + WEIGHTS in files:
        return below
    binaries = [file for file in files if file.startswith(prefix) and file.endswith(".bin")]
    binaries = [file for file in binaries if not {"base_model", "encoder_model"} & set(file.split("/")[:-1])]
    binaries = [file for file in binaries if "/" not in file.removeprefix(prefix)] or binaries
    binaries = sorted(file for file in binaries if file.rpartition("/")[2] == PUBLISHED) or sorted(binaries)
    if len(binaries) < 2:
        return binaries[0] if binaries else None
    matches = [re.fullmatch(r"(.*/)?checkpoint-(\d+)/[^/]+", file) for file in binaries]
    if not all(matches) or len({match[1] for match in matches}) > 1:
        listed = ", ".join(file.removeprefix(prefix) for file in binaries[:20])
        raise ValueError(f"{place} holds several checkpoints, name one of them: {listed}")
    by_step = sorted(zip((int(match[2]) for match in matches), binaries, strict=True))
    latest = by_step[-1]
    warnings.warn(
        f"{place} holds the steps {', '.join(str(step) for step, _ in by_step)}: the latest, checkpoint-{latest[0]}, "
        "is loaded; name its folder to choose another",
        stacklevel=2,
    )
    return latest[1]


def _guess(below: str) -> list[str]:
    """Patterns for the files of one checkpoint, where the repository cannot be listed."""
    if below.endswith(".bin"):
        return [below]
    prefix = f"{below}/" if below else ""
    published = f"checkpoint-{PUBLISHED_MODELS[below][0]}/{PUBLISHED}" if below in PUBLISHED_MODELS else PUBLISHED
    return [prefix + name for name in (WEIGHTS, SETTINGS, "base_model/*", "encoder_model/*", published)]


def _cached(repository: str) -> Path | None:
    """The folder of a repository's main revision in the hub's cache, complete or in part; None without one."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    revision = folder / "refs" / "main"
    snapshots = [*(folder / "snapshots").glob("*")]
    if revision.is_file():
        snapshots = [path for path in snapshots if path.name == revision.read_text(encoding="utf-8").strip()]
    return snapshots[0] if len(snapshots) == 1 else None


def _what_to_get(repository: str, below: str) -> str:
    """The end of the error for a published checkpoint: its file, its base model, and their places."""
    if repository != REPOSITORY:
        return ""
    name = below.partition("/")[0]
    if name not in PUBLISHED_MODELS:
        return f". It holds {', '.join(PUBLISHED_MODELS)}: load {REPOSITORY}/{next(iter(PUBLISHED_MODELS))}, say"
    from huggingface_hub import constants

    step, base_model = PUBLISHED_MODELS[name]
    file = below if below.endswith(".bin") else f"{below if '/' in below else f'{name}/checkpoint-{step}'}/{PUBLISHED}"
    here = Path.cwd()
    return (
        f". There (accept the licence at https://huggingface.co/{repository} if it asks): hf download {repository} "
        f"{file}; its base model: hf download {base_model}. Then copy the hub's cache to {constants.HF_HUB_CACHE}, or "
        f"put the file at {here / repository / file} and the base model's {BASE_MODEL_FILES} into {here / base_model}"
    )
