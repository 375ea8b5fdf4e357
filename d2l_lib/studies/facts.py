"""Short paragraphs of English facts in one block, with fresh names and values; in the prompt; and controls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from d2l_lib.model import DocToLoRA
from d2l_lib.studies.passages import READING, choose, other_rows, rows_of_methods
from d2l_lib.tasks import facts, qa

_N_FACTS = 4, 8
_METHODS = "question alone", "passage in the prompt", READING, "Doc-to-LoRA", "another passage's adapter"


def run(model: DocToLoRA, n: int, seed: int, only: Sequence[str] | None = None) -> Iterator[list[dict]]:
    """After each method all rows so far, one for each metric: n questions about paragraphs of four facts, n of eight.

    only: methods whose names hold one of these words; rows of others that are recorded stay.

    The paragraphs are of the test split of `tasks.facts`. ValueError if one takes more than one block, if no method has
    such a name, and for recorded rows of other questions.
    """
    chosen = choose(model, _METHODS, only)
    rows = other_rows("facts", chosen, n, seed) if only else []
    for n_facts in _N_FACTS:
        frame = facts.fact_samples(n, seed, (n_facts, n_facts), split="test")
        lengths = qa.add_lengths(frame, model.encoder_tokenizer).drop_duplicates("document")["length_tokens"]
        if lengths.max() > model.chunk_tokens:
            raise ValueError(
                f"a paragraph of {n_facts} facts has {lengths.max()} tokens, a block takes {model.chunk_tokens}: "
                "take a model with longer chunks"
            )
        sizes = {"n_facts": n_facts, "tokens": round(float(lengths.mean()), 1), "most_tokens": int(lengths.max())}
        print(sizes, flush=True)
        for new in rows_of_methods(model, frame, chosen, seed):
            rows += [row | sizes for row in new]
            yield sorted(rows, key=lambda row: (row["n_facts"], _METHODS.index(row["method"])))
