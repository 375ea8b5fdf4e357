"""Random models of two sizes, and inputs for them: they stand in for the costs of trained ones.

Time does not depend on the numbers. Hidden size 256, 8 layers, latents of 256, 8 Perceiver blocks, rank 8. "many
latents" has 208 latent queries on the states of an early layer, "few latents" 8 on each layer's.

Run as a program, it does tasks that it reads from its standard input (`serve`). `history` runs it by older states of
this package: so it imports only what those have as well.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from d2l_lib.base_model import load_base_model, module_sizes
from d2l_lib.hypernetwork import Hypernetwork, HypernetworkConfig
from d2l_lib.model import DocToLoRA
from d2l_lib.presets import PRESETS
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
TOKENS = 512  # of a chunk
CONTEXTS, QUESTIONS, QUESTION_TOKENS, ANSWER_TOKENS = 4, 4, 32, 8  # of a training step, one chunk to a context
STEP = CONTEXTS, QUESTIONS, QUESTION_TOKENS, ANSWER_TOKENS


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


def training_step(model: DocToLoRA, tokens: int, generator: torch.Generator) -> Callable[[], Tensor]:
    """A function that takes a step's loss and gradients, on random chunks, questions and answers."""
    batch = random_batch(model.base_model.config.vocab_size, tokens, generator)
    hypernetwork, step = model.hypernetwork.requires_grad_(True), internalization(model)

    def run() -> Tensor:
        hypernetwork.zero_grad()
        loss = step(batch)["loss"]
        loss.backward()
        return loss.detach()

    return run


def internalizing(model: DocToLoRA, chunks: int, generator: torch.Generator) -> Callable[[], Tensor]:
    """A function that internalizes random chunks and gives the mean size of a number in their blocks."""
    ids = torch.randint(model.base_model.config.vocab_size, (chunks, TOKENS), generator=generator)

    def run() -> Tensor:
        blocks = model.internalize_ids(ids).blocks
        return torch.stack([factors["down_proj"].abs().mean() for one in blocks for factors in (one.A, one.B)]).mean()

    return run


def serve() -> None:
    """For each line [what, model, chunks, seed] of standard input, CPU seconds and the task's number; JSON both.

    what: "internalize", or "training step". The first run of a task is not measured.

    SystemExit where a module of the package is not that of the working directory.
    """
    own = (Path(module.__file__).resolve() for name, module in [*sys.modules.items()] if name.startswith("d2l_lib."))
    if elsewhere := next((file for file in own if not file.is_relative_to(Path.cwd().resolve())), None):
        sys.exit(f"{elsewhere} is not of the package in {Path.cwd()}: give a checkout of this project")
    torch.set_num_threads(1)
    ready: dict[str, Callable[[], Tensor]] = {}
    for line in sys.stdin:
        what, name, chunks, seed = json.loads(line)
        if line not in ready:
            model, generator = random_model(name, seed), torch.Generator().manual_seed(seed)
            if what == "training step":
                ready[line] = training_step(model, TOKENS, generator)
            else:
                ready[line] = internalizing(model, chunks, generator)
            ready[line]()
        began = time.process_time()
        number = ready[line]()
        print(json.dumps([time.process_time() - began, float(number)]), flush=True)


if __name__ == "__main__":
    serve()
