"""Doc-to-LoRA workbench: turn documents into labelled low-rank adapters, measure, dissect and export them.

    import d2l_lib as d2l
    model = d2l.load("tiny")
    adapter = model.internalize("The special magic number is 0042.")
    model.answer("What is the special magic number?", adapter)

Names are imported on first use, so importing the package costs nothing.
"""

from contextlib import suppress
from importlib import import_module
from types import ModuleType

# Name in this package -> (module, name in it; None: the module itself).
_EXPORTS = {
    "load": ("loading", "load"),
    "DocToLoRA": ("model", "DocToLoRA"),
    "Adapter": ("adapter", "Adapter"),
    "AdapterCache": ("cache", "AdapterCache"),
    "Block": ("adapter", "Block"),
    "report": ("views.report", "report"),
    "weights": ("analysis.weights", None),
    "attribution": ("analysis.attribution", None),
    "plots": ("views.plots", None),
    "viewers": ("views", None),
}

# Former module names, for programs that still import them -> modules that hold their names, and the command in place
# of each one's `main`.
_FORMER = {
    "attribution_viewer": ("views.trace",),
    "baselines": ("studies.baselines", "training.context_distillation", "studies.kinds", "studies.methods"),
    "checkpoints": ("formats.checkpoints", "d2l"),
    "corpora": ("training.corpora", "d2l corpora"),
    "distillation": ("training.recipes", "training.contexts"),
    "evaluation": (
        "studies.base_scores",
        "studies.needle_scores",
        "studies.watches",
        "tasks.scores",
        "tasks.questions",
    ),
    "exports": ("formats.peft",),
    "faithfulness": ("studies.faithfulness", "analysis.trust"),
    "gating": ("routing", "studies.gate", "studies.dial", "studies.routing_shares", "adapter"),
    "hub": ("formats.hub",),
    "images": ("documents", "encoder"),
    "losses": ("training.losses",),
    "markup": ("formats.markup",),
    "metrics": ("tasks.scores",),
    "needles": ("tasks.needles",),
    "packing": ("training.batches", "tasks.qa", "formats.shards"),
    "pickles": ("formats.pickles",),
    "pretraining": ("training.pretraining",),
    "probes": ("studies.probes", "tasks.questions"),
    "qa": ("tasks.qa",),
    "readout": ("training.warm_up",),
    "reports": ("views.report", "analysis.report", "studies.flags"),
    "selfgen": (
        "training.selfgen",
        "training.settings",
        "training.generate",
        "formats.shards",
        "engine",
        "d2l generate",
    ),
    "shard_viewer": ("views.shards",),
    "slurm": ("training.slurm", "d2l slurm"),
    "speed": ("studies.speed", "studies.measurements", "studies.gemma_sizes", "studies.watches"),
    "text_to_lora": ("training.text_to_lora",),
    "trainer": ("training.loop", "training.batches"),
    "watch": ("studies.watch", "d2l watch"),
    "world": ("tasks.world",),
}

__all__ = ["Adapter", "Block", "DocToLoRA", "load", "report"]


class _Former(ModuleType):
    """A former module: looks its names up in the modules that hold them."""

    def __init__(self, name: str, places: tuple[str, ...]):
        super().__init__(f"{__name__}.{name}")
        self._places = places

    def __getattr__(self, name: str):
        for place in self._places:
            if place.partition(" ")[0] == "d2l":
                if name == "main":
                    main = import_module(f"{__name__}.__main__").main
                    return lambda arguments: main([*place.split()[1:], *arguments])
                continue
            with suppress(ImportError, AttributeError):
                return getattr(import_module(f"{__name__}.{place}"), name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}; its names are now in {self._places}")


def __getattr__(name: str):
    if name in _FORMER:
        return _Former(name, _FORMER[name])
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, inside = _EXPORTS[name]
    found = import_module(f"{__name__}.{module}")
    return found if inside is None else getattr(found, inside)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
