"""Pages in a notebook: `d2l.viewers` is this package, `page` holds what the pages share.

Names are imported on first use: samples need no torch.
"""

from importlib import import_module

import pandas as pd

# Tables hold texts of documents: their dollar signs start no formula.
pd.set_option("display.html.use_mathjax", False)

_EXPORTS = {
    "view_samples": "samples",
    "chat": "conversation",
    "Conversation": "conversation",
    "bundled_examples": "examples",
    "view_shards": "shards",
    "Trace": "trace",
    "view_attribution": "trace",
    "save_html": "trace",
}
_EXPORTS |= dict.fromkeys(("SampleViewer", "render_sample", "render_sample_table", "render_document"), "samples")
_EXPORTS |= dict.fromkeys(("Chat", "render_answers", "render_inside"), "conversation")
_EXPORTS |= dict.fromkeys(("Viewer", "render_message", "render_view"), "page")


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
