"""Doc-to-LoRA workbench: turn documents into labelled low-rank adapters, measure them, take them apart, take them away.

    import d2l_lib as d2l
    model = d2l.load("tiny")
    adapter = model.internalize("The special magic number is 0042.")
    model.answer("What is the special magic number?", adapter)

Names and submodules are imported when they are first used, so importing the package costs nothing.
"""

from importlib import import_module
from pathlib import Path

_EXPORTS = {
    "load": "model",
    "DocToLoRA": "model",
    "Adapter": "adapter",
    "Block": "adapter",
    "report": "reports",
}
_SUBMODULES = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py")))

__all__ = ["Adapter", "Block", "DocToLoRA", "load", "report"]


def __getattr__(name: str):
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *_SUBMODULES})
