"""TODO docstring."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence

import pandas as pd

from d2l_lib import arguments as options
from d2l_lib.adapter import singular_part
from d2l_lib.analysis.weights import recompression
from d2l_lib.loading import load
from d2l_lib.model import DocToLoRA
from d2l_lib.records import one_line_errors, project_root, read_rows, write_jsonl
from d2l_lib.tasks import needles
from d2l_lib.tasks.scores import summarise

RANKS = (4, 8, 16, 32, 64, 128)


def recompressed_needles(
    model: DocToLoRA, length_tokens: int, n: int, seed: int, ranks: Sequence[int] = RANKS, skip: int = 0
) -> Iterator[list[dict]]:
    """For haystacks `skip` to `n` the rows of every rank, one list per haystack; each is internalized once.

    Keys: length_tokens, sample, depth, rank, full (bool: nothing was cut), error and bytes (see `recompression`),
    stored_bytes (of the adapter as it is saved: tensors that equal chunks share count once), answer, prediction,
    correct, seconds (to internalize), seed.
    """
    for sample, haystack in enumerate(needles.evaluation_set(model.tokenizer, length_tokens, n, seed)):
        if sample < skip:
            continue
        began = time.perf_counter()
        (whole,) = model.internalize_each([haystack.text])
        seconds = round(time.perf_counter() - began, 2)
        cut = sorted(rank for rank in ranks if rank < whole.rank)
        small = singular_part(whole, 0, max(cut)) if cut else None
        adapters = [singular_part(small, 0, rank) for rank in cut] + [whole]
        table = recompression(whole, [*cut, whole.rank]).to_dict("records")
        said = [model.answer(haystack.question, adapter, max_new_tokens=10) for adapter in adapters]
        yield [
            {"length_tokens": length_tokens, "sample": sample, "depth": round(haystack.depth, 4)}
            | {"rank": row["rank"], "full": row["rank"] == whole.rank, "error": round(row["error"], 6)}
            | {"bytes": row["bytes"], "stored_bytes": adapter.nbytes}
            | {"answer": haystack.answer, "prediction": prediction}
            | {"correct": needles.exact_match(prediction, haystack.answer), "seconds": seconds, "seed": seed}
            for row, adapter, prediction in zip(table, adapters, said, strict=True)
        ]


@one_line_errors("weights")
def main() -> None:
    """Needles found by recompressed adapters of long haystacks, recorded in data/full_runs/recompression.jsonl.

    One row per haystack and rank, written as soon as a haystack is done: started again, the command goes on there. Rows
    of other lengths and seeds stay.
    """
    parser = options.Parser(description=main.__doc__)
    parser.add_argument("what", choices=("recompression",))
    parser.add_argument("--model", default="tiny", help="bundled name, or a folder")
    parser.add_argument("--length", type=options.count, default=131072, help="of the haystacks, in tokens")
    parser.add_argument("--n", type=options.count, default=100, help="haystacks")
    parser.add_argument("--seed", type=options.seed, default=0, help="of the evaluation")
    a = parser.parse_args()
    model = load(a.model)
    path = project_root() / "data" / "full_runs" / "recompression.jsonl"
    rows = read_rows(path) if path.is_file() else []
    key = model.hypernetwork_key
    if any(row["hypernetwork"] != key for row in rows):
        raise ValueError(f"{path} holds rows of another hypernetwork: move it away first")
    done = {row["sample"] for row in rows if (row["length_tokens"], row["seed"]) == (a.length, a.seed)}
    facts = {"n": a.n, "hypernetwork": key, "command": " ".join(["python -m d2l_lib.analysis.weights", *sys.argv[1:]])}
    for new in recompressed_needles(model, a.length, a.n, a.seed, RANKS, skip=len(done)):
        rows += [row | facts for row in new]
        write_jsonl(path, rows)
        print(
            f"haystack {new[0]['sample'] + 1} of {a.n}: {sum(row['correct'] for row in new)} of {len(new)}", flush=True
        )
    print(summarise(pd.DataFrame(rows), ["length_tokens", "rank"]).to_string())


if __name__ == "__main__":
    main()
