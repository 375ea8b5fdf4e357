"""What attention without keys and values saves (see `hypernetwork.Attention`): CPU seconds of both ways, in pairs.

    OMP_NUM_THREADS=1 d2l study absorption

Random models stand in, as time does not depend on the numbers: hidden size 256, 8 layers, latents of 256, 8 Perceiver
blocks, rank 8. "many latents" has 208 latent queries on the states of an early layer, "few latents" 8 on each layer's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from d2l_lib.base_model import load_base_model, module_sizes
from d2l_lib.hypernetwork import Attention, Hypernetwork, HypernetworkConfig
from d2l_lib.loading import load
from d2l_lib.model import DocToLoRA
from d2l_lib.presets import PRESETS
from d2l_lib.studies.measurements import processor_name
from d2l_lib.training.batches import IGNORED, Batch, Chunks
from d2l_lib.training.step import Internalization

BASE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
CONFIGURATIONS = {
    "many latents": {"encoder_type": "early_exit", "n_latent_queries": 208},
    "few latents": {"encoder_type": "per_layer_activations", "n_latent_queries": 8},
}
# Of each model: tokens of a chunk with its chat wrapping, and numbers of chunks.
_DOCUMENTS = {
    "many latents": (512, (1, 8)),
    "few latents": (512, (1, 8)),
    "tiny": (264, (1, 8)),
    "tiny/qa": (28, (1, 48)),
}
CONTEXTS, QUESTIONS, QUESTION_TOKENS, ANSWER_TOKENS = 4, 4, 32, 8  # of a training step, one chunk to a context
_WAYS = {"plain": False, "absorbed": True}


def random_model(configuration: str, seed: int = 0, *, layers: int | None = None, rank: int = 8) -> DocToLoRA:
    """A random model of one of CONFIGURATIONS, with the bundled tokenizer; layers: of the base model (None: BASE's)."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", **BASE | ({} if layers is None else {"num_hidden_layers": layers}))
    base_model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    d_in, d_out = module_sizes(base_model, ["down_proj"])
    sizes = {"n_layers": config.num_hidden_layers, "feature_size": config.hidden_size, "latent_size": 256, "rank": rank}
    own = {"d_in": d_in, "d_out": d_out, "n_blocks": 8, "per_layer_processing": True} | CONFIGURATIONS[configuration]
    hypernetwork = Hypernetwork(HypernetworkConfig(**sizes, **own)).eval().requires_grad_(False)
    for parameter in hypernetwork.scaler_B.values():
        parameter.fill_(1.0)  # a fresh hypernetwork writes B = 0
    return DocToLoRA(base_model, load_base_model("tiny", device="cpu")[1], hypernetwork)


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
        for task, count, do in (*tasks, ("training step", CONTEXTS, _training_step(model, tokens, generator))):
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


def random_batch(n_tokens: int, tokens: int, generator: torch.Generator) -> Batch:
    """A batch of a training step: random chunks of `tokens` tokens, questions and answers; n_tokens: the vocabulary."""
    ids = torch.randint(n_tokens, (CONTEXTS * QUESTIONS, QUESTION_TOKENS), generator=generator)
    labels = torch.where(torch.arange(QUESTION_TOKENS) < QUESTION_TOKENS - ANSWER_TOKENS, IGNORED, ids)
    chunks = torch.randint(n_tokens, (CONTEXTS, tokens), generator=generator).tolist()
    return Batch(
        chunks=Chunks.of(chunks, [1] * CONTEXTS, 0),
        input_ids=ids,
        labels=labels,
        n_questions=torch.full((CONTEXTS,), QUESTIONS),
    )


def internalization(model: DocToLoRA) -> Internalization:
    """The training step of cross-entropy alone."""
    return Internalization(model.base_model, model.hypernetwork, replace(PRESETS["tiny"].qa.world, l1=0.0))


def _training_step(model: DocToLoRA, tokens: int, generator: torch.Generator) -> Callable[[], None]:
    """A function that takes a step's loss and gradients, on random chunks, questions and answers."""
    batch = random_batch(model.base_model.config.vocab_size, tokens, generator)
    hypernetwork, step = model.hypernetwork.requires_grad_(True), internalization(model)

    def run() -> None:
        hypernetwork.zero_grad()
        step(batch)["loss"].backward()

    return run
