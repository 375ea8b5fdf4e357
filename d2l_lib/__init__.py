"""Doc-to-LoRA workbench: turn documents into labelled low-rank adapters, measure them, take them apart, take them away.

    import d2l_lib as d2l
    model = d2l.load("tiny")
    adapter = model.internalize("The special magic number is 0042.")
    model.answer("What is the special magic number?", adapter)

Names are imported when they are first used, so importing the package costs nothing.
"""

from importlib import import_module

# Name of the package -> (module, name in it), or a module by itself.
_EXPORTS = {
    "load": ("loading", "load"),
    "DocToLoRA": ("model", "DocToLoRA"),
    "Adapter": ("adapter", "Adapter"),
    "Block": ("adapter", "Block"),
    "report": ("views.report", "report"),
    "weights": ("analysis.weights", None),
    "attribution": ("analysis.attribution", None),
    "plots": ("views.plots", None),
    "viewers": ("views", None),
}

__all__ = ["Adapter", "Block", "DocToLoRA", "load", "report"]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, inside = _EXPORTS[name]
    found = import_module(f"{__name__}.{module}")
    return found if inside is None else getattr(found, inside)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
