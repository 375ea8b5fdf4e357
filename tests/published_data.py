"""Files in the forms in which data sets are published, written here and small: no download, real column types."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2l_lib.documents import context_ids, question_ids, stop_ids
from d2l_lib.tasks import world

GEMMA = "google/gemma-2-2b-it_temp_0.0_closed_qa_prob_1.0"  # the folder of a base model in the published data


def shard_rows(tokenizer, n: int, seed: int = 0, facts: int = 3, k: int = 16) -> list[dict]:
    """Rows of self-generated data with the published columns: right answers, and a teacher that is nearly sure."""
    rng, stop, rows = random.Random(seed), stop_ids(tokenizer)[-1], []
    for _ in range(n):
        document = world.draw_document(rng, "train", facts)
        row = {"ctx_ids": context_ids(tokenizer, document.text)}
        row |= {name: [] for name in ("input_ids", "response_start_end", "logprobs_vals", "logprobs_indices")}
        for fact in document.facts:
            question = world.question_about(rng, fact)
            answer = tokenizer(question.answer, add_special_tokens=False)["input_ids"] + [stop]
            asked = question_ids(tokenizer, question.text)
            row["input_ids"].append(asked + answer)
            row["response_start_end"].append([len(asked), len(asked) + len(answer)])
            others = [[token, *rng.sample([i for i in range(len(tokenizer)) if i != token], k - 1)] for token in answer]
            row["logprobs_indices"].append(others)
            row["logprobs_vals"].append([[-0.1] + [-4.0 - j for j in range(k - 1)] for _ in answer])
        rows.append(row)
    return rows


def write_shards(path: Path, rows: list[dict], kind: str = "list") -> Path:
    """A parquet file of these rows. kind: "list" as documented (int32, float16); "large": large lists, int64 and
    float32, spans as lists of fixed size; as other writers make them.
    """
    if kind == "list":
        lists, ids, values, span = pa.list_, pa.int32(), pa.float16(), pa.list_(pa.int32())
    else:
        lists, ids, values, span = pa.large_list, pa.int64(), pa.float32(), pa.list_(pa.int64(), 2)
    schema = pa.schema(
        {
            "ctx_ids": lists(ids),
            "input_ids": lists(lists(ids)),
            "response_start_end": lists(span),
            "logprobs_vals": lists(lists(lists(values))),
            "logprobs_indices": lists(lists(lists(ids))),
        }
    )
    if kind == "list":
        rows = [row | {"logprobs_vals": _half(row["logprobs_vals"])} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def _half(questions: list) -> list:
    return [[[np.float16(value) for value in token] for token in answer] for answer in questions]


def write_published(root: Path, tokenizer, n: int = 8) -> Path:
    """The published folders of a base model: passages with two levels of questions and validation data, and SQuAD."""
    passages = root / GEMMA / "fw_qa_v2" / "min_0_to_2000" / "train"
    for name, seed in (("level_0_0000", 1), ("level_1_0000", 2), ("level_1_0001", 3), ("level_1_val_0000", 4)):
        write_shards(passages / f"ds_000_00000_{name}.parquet", shard_rows(tokenizer, n, seed))
    write_shards(root / GEMMA / "squad_compact" / "train" / "ds_0000.parquet", shard_rows(tokenizer, n, 5), "large")
    return root
