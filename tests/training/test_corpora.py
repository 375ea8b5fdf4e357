"""Corpora: documents out of files as they are published, how large these are, and what is said without a hub."""

import errno
import json
import time

import datasets
import pandas as pd
import published_data
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_models

from d2l_lib.__main__ import main
from d2l_lib.formats.shards import find_shards, read_shards
from d2l_lib.records import read_jsonl
from d2l_lib.tasks import qa
from d2l_lib.training import corpora, selfgen


@pytest.fixture(autouse=True)
def no_project_data(tmp_path, monkeypatch):
    monkeypatch.setattr(qa, "project_root", lambda: tmp_path / "elsewhere")


def write_passages(path, counts=(10, 2000, 2001, 5)):
    """A file of FineWeb-Edu: its columns and types."""
    rows = [
        {
            "text": f"Passage {i} tells of things." if i != 3 else " ",
            "id": f"<urn:uuid:{i}>",
            "dump": "CC-MAIN-2024-10",
            "url": "https://example.org",
            "file_path": "s3://x",
            "language": "en",
            "language_score": 0.9,
            "token_count": count,
            "score": 3.1,
            "int_score": 3,
        }
        for i, count in enumerate(counts)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_questions(folder, name):
    """Three questions on two texts in the hub's form of each set, questions on one text not all side by side."""
    texts, order = ["The first text.", "The second text."], (0, 1, 0)
    rows = []
    for i, which in enumerate(order):
        text, answer = texts[which], f"answer {i}"
        rows.append(
            {
                "squad": {"id": str(i), "title": "T", "context": text, "question": f"Q{i}?"}
                | {"answers": {"text": [answer], "answer_start": [0]}},
                "ropes": {"id": str(i), "background": text, "situation": "A situation.", "question": f"Q{i}?"}
                | {"answers": {"text": [answer]}},
                "drop": {"section_id": "s", "query_id": str(i), "passage": text, "question": f"Q{i}?"}
                | {"answers_spans": {"spans": [answer], "types": ["span"]}},
                "pwc": {"input": text, "prompt": f"Q{i}?", "answer": answer},
            }.get(
                name,
                {"input": f"Q{i}?", "context": text, "answers": [answer], "length": 3, "dataset": name}
                | {"language": "en", "all_classes": None, "_id": str(i)},
            )
        )
    folder.mkdir(parents=True, exist_ok=True)
    if name == "pwc":
        (folder / "PwC_train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif name in corpora.LONG_SETS:
        file = folder / f"{qa.DATASETS[name].config}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        pd.DataFrame(rows).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("name", [*corpora.TRAINING_SETS, *corpora.LONG_SETS])
def test_questions_on_one_text_are_one_document_and_counted(tmp_path, name):
    folder = write_questions(tmp_path / name, name)
    found = list(corpora.stream(name, folder))
    assert [document["questions"] for document in found] == [["Q0?", "Q2?"], ["Q1?"]]
    assert [document["answers"] for document in found] == [[["answer 0"], ["answer 2"]], [["answer 1"]]]
    assert found[0]["document"].startswith("The first text.")
    size = corpora.size(name, folder)
    assert (size.documents, size.rows) == (2, 3) and size.bytes == sum(f.stat().st_size for f in folder.iterdir())
    assert str(size).startswith(f"{name}: 2 documents, 3 rows, 0.0 MiB, at {folder}")


def test_grouping_waits_for_so_many_texts_only(monkeypatch):
    monkeypatch.setattr(corpora, "OPEN_DOCUMENTS", 2)
    rows = [{"document": text, "question": text + str(i), "answers": ["a"]} for i, text in enumerate("ababcac")]
    found = [document["questions"] for document in corpora._grouped(rows)]
    assert found == [["a0", "a2"], ["b1", "b3"], ["c4", "c6"], ["a5"]]


def test_passages_of_at_most_so_many_tokens(tmp_path):
    write_passages(tmp_path / "sample" / "10BT" / "000_00000.parquet")
    found = [row["document"] for row in corpora.stream("fineweb-edu", tmp_path)]
    assert found == ["Passage 0 tells of things.", "Passage 1 tells of things."], "too long, and blank, left out"
    own_count = corpora.stream("fineweb-edu", tmp_path, most_tokens=10, tokenizer=tiny_models.build_tokenizer())
    assert list(own_count) == [], "one token per byte: all are longer"
    size = corpora.size("fineweb-edu", tmp_path)
    assert size.documents == size.rows == 4 and "4 documents" in str(size)
    pq.write_table(pa.table({"content": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r'other.parquet, record 1 has no "text", only content'):
        list(corpora.stream("fineweb-edu", tmp_path / "other.parquet"))
    with pytest.raises(FileNotFoundError, match=r"no .parquet or .jsonl files of HuggingFaceFW/fineweb-edu"):
        list(corpora.stream("fineweb-edu", tmp_path / "elsewhere"))


def test_published_self_generated_data_in_both_writers_types(tmp_path):
    tokenizer = tiny_models.build_tokenizer()
    root = published_data.write_published(tmp_path, tokenizer, n=3)
    rows = list(corpora.stream("self-generated", root))
    expected = [row for seed in (2, 3, 5) for row in published_data.shard_rows(tokenizer, 3, seed)]
    assert len(rows) == 9, "the last level of questions alone, no validation data, and SQuAD"
    for row, right in zip(rows, expected, strict=True):
        assert {name: row[name] for name in ("ctx_ids", "input_ids", "response_start_end", "logprobs_indices")} == {
            name: right[name] for name in ("ctx_ids", "input_ids", "response_start_end", "logprobs_indices")
        }
        assert row["logprobs_vals"][0][0] == pytest.approx(right["logprobs_vals"][0][0], abs=1e-2)
    assert corpora.size("self-generated", root).documents == 9
    sets = find_shards([root])
    assert [len(files) for files in sets.values()] == [2, 1]
    with pytest.raises(FileNotFoundError, match="no .parquet files of training data"):
        (tmp_path / "empty").mkdir()
        find_shards([tmp_path / "empty"])


def test_shards_from_a_cache_on_disk_are_those_in_memory(tmp_path):
    tokenizer = tiny_models.build_tokenizer()
    root = published_data.write_published(tmp_path / "data", tokenizer, n=2)
    files = [file for own in find_shards([root]).values() for file in own]
    mapped, held = read_shards(files, cache=tmp_path / "cache"), read_shards(files)
    assert mapped.to_list() == held.to_list() and mapped.features == held.features
    (written,) = (tmp_path / "cache").iterdir()
    assert mapped.cache_files == [{"filename": str(written)}] and held.cache_files == []
    before = written.stat().st_mtime_ns
    assert len(read_shards(files, cache=tmp_path / "cache")) == 6 and written.stat().st_mtime_ns == before
    files[0].write_bytes(files[0].read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a readable parquet file"):
        read_shards(files, cache=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [written.name], "no half file is left"


def test_without_the_hub_it_is_said_at_once_what_to_get(tmp_path):
    began = time.monotonic()
    for name in corpora.CORPORA:
        size = corpora.size(name)
        assert size.documents is size.bytes is None and "unknown: HF_HUB_OFFLINE is set" in str(size)
        with pytest.raises(FileNotFoundError) as error:
            next(iter(corpora.stream(name)))
        hub, _, _ = corpora._hub_place(name)
        assert hub in str(error.value) and "source" in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"Qwen3-4B.*SakanaAI/self_gen_qa_d2l.*as --shards"):
        corpora.download(tmp_path, "Qwen/Qwen3-4B-Instruct-2507")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("file", ["/full/a.parquet", None])
def test_a_full_disk_is_no_missing_hub(file, monkeypatch, tmp_path):
    def download(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", *([file] if file else []))

    monkeypatch.setattr(corpora, "_check_online", lambda: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(datasets, "load_dataset", download)
    with pytest.raises(OSError, match="No space left on device") as failed:
        corpora.download(tmp_path, "google/gemma-2-2b-it")
    assert failed.value.filename == (file or str(tmp_path))
    with pytest.raises(OSError, match="No space left on device") as failed:
        qa.load_qa("squad", split="validation")
    assert failed.value.filename == (file or str(datasets.config.HF_DATASETS_CACHE))


def test_the_hub_is_streamed_and_says_its_size_first(monkeypatch):
    """What is asked of the libraries, with their answers in their forms; a real hub is not reached by tests."""
    asked = []
    monkeypatch.setattr(corpora, "_check_online", lambda: None)
    rows = [{"text": "A passage.", "token_count": 3}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (asked.append((a, k)), rows)[1])
    assert list(corpora.stream("fineweb-edu")) == [{"document": "A passage."}]
    assert asked == [(("HuggingFaceFW/fineweb-edu", "sample-10BT"), {"split": "train", "streaming": True})]

    class Builder:
        info = datasets.DatasetInfo(
            splits=datasets.SplitDict({"train": datasets.SplitInfo("train", 1, num_examples=87_599)}),
            download_size=2**24,
        )

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: Builder)
    assert str(corpora.size("squad")) == (
        "squad: 87,599 rows, 16.0 MiB, at rajpurkar/squad plain_text train (bytes to download, of all splits)"
    )
    passages = corpora.size("fineweb-edu")
    assert passages.documents == 87_599 and passages.place == "HuggingFaceFW/fineweb-edu sample-10BT train"
    asked.clear()
    records = [{"id": "1", "context": "A text.", "question": "Q?", "answers": {"text": ["a"], "answer_start": [0]}}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (asked.append((a, k)), records)[1])
    assert next(corpora.stream("squad"))["questions"] == ["Q?"]
    assert asked[0][1] == {"split": "train", "revision": None, "streaming": True}


def test_the_command_tells_the_size_then_writes_what_selfgen_reads(tmp_path, capsys):
    folder = write_questions(tmp_path / "squad", "squad")
    out = tmp_path / "texts.jsonl"
    main(["corpora", "write", "squad", "--source", str(folder), "--documents", "1", "--out", str(out)])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("squad: 2 documents, 3 rows") and said[1] == f"{out}: 1 documents"
    assert read_jsonl(out)[0]["questions"] == ["Q0?", "Q2?"]
    assert selfgen.read_texts(out) == ["The first text."]
    with pytest.raises(SystemExit, match=r"corpora: fineweb-edu could not be reached .*sample/10BT"):
        main(["corpora", "write", "fineweb-edu", "--out", str(tmp_path / "x.jsonl")])
    assert not (tmp_path / "x.jsonl").exists()
    with pytest.raises(ValueError, match="unknown corpus 'sqaud'; choose one of fineweb-edu, squad"):
        corpora.size("sqaud")
