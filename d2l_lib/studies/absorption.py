"""What attention without keys and values saves (see `hypernetwork.Attention`): CPU seconds of both ways, in pairs.

    OMP_NUM_THREADS=1 d2l study absorption

Random models stand in (see `random_models`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from d2l_lib.hypernetwork import Attention
from d2l_lib.loading import load
from d2l_lib.model import DocToLoRA
from d2l_lib.studies.measurements import processor_name
from d2l_lib.studies.random_models import CONFIGURATIONS, CONTEXTS, TOKENS, random_model, training_step

# Of each model: tokens of a chunk with its chat wrapping, and numbers of chunks.
_DOCUMENTS = {
    "many latents": (TOKENS, (1, 8)),
    "few latents": (TOKENS, (1, 8)),
    "tiny": (264, (1, 8)),
    "tiny/qa": (28, (1, 48)),
}
_WAYS = {"plain": False, "absorbed": True}


def run(n: int, seed: int) -> Iterator[list[dict]]:
    """One row per model, task and way: CPU seconds (median, quartiles) of n runs that alternate with the other way's.

    share: of the plain way's median. chosen: whether the model goes this way by itself.
    """
    rows: list[dict] = []
    for name, (tokens, counts) in _DOCUMENTS.items():
        model = random_model(name, seed) if name in CONFIGURATIONS else load(name, device="cpu")
        absorbs = _attentions(model)[0].is_absorbed(model.config.n_latent_queries, tokens)
        facts = {"model": name, "tokens": tokens, "device_name": processor_name(), "torch": torch.__version__}
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(model.base_model.config.vocab_size, (max(counts), tokens), generator=generator)
        tasks = [("internalize", count, partial(model.internalize_ids, ids[:count])) for count in counts]
        for task, count, do in (*tasks, ("training step", CONTEXTS, training_step(model, tokens, generator))):
            for row in _alternating(model, do, n):
                row["chosen"] = _WAYS[row["way"]] == absorbs
                rows.append(facts | {"task": task, "chunks": count} | row)
            yield rows


def _attentions(model: DocToLoRA) -> list[Attention]:
    """What reads the tokens of a chunk."""
    return [one for one in model.hypernetwork.aggregator.perceiver.encoder.modules() if isinstance(one, Attention)]


def _alternating(model: DocToLoRA, do: Callable[[], object], n: int) -> list[dict]:
    """The times of both ways; each runs once before, unmeasured."""
    seconds: dict[str, list[float]] = {way: [] for way in _WAYS}
    for _ in range(n + 1):
        for way, absorbs in _WAYS.items():
            for attention in _attentions(model):
                attention.absorbs = absorbs
            began = time.process_time()
            do()
            seconds[way].append(time.process_time() - began)
    rows = []
    for way, of_way in seconds.items():
        low, median, high = (round(float(one), 4) for one in np.quantile(of_way[1:], (0.25, 0.5, 0.75)))
        rows.append({"way": way, "cpu_seconds": median, "cpu_seconds_low": low, "cpu_seconds_high": high})
    return [row | {"share": round(row["cpu_seconds"] / rows[0]["cpu_seconds"], 3)} for row in rows]
