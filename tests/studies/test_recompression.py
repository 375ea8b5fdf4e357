"""Recompression: the record goes on where it was interrupted."""

import json

import pytest
from tiny_models import build_model

from d2l_lib import loading, records
from d2l_lib.__main__ import main
from d2l_lib.studies import recompression


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    model = build_model(window=1024)
    (tmp_path / "d2l_lib").mkdir()
    (tmp_path / "d2l_lib" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load", lambda name: model)
    monkeypatch.setattr(recompression, "RANKS", (1, 2))
    command = ["study", "recompression", "--length", "400", "--seed", "3", "--n"]
    path = tmp_path / "data" / "full_runs" / "recompression.jsonl"
    internalized = []
    once = model.internalize_each
    monkeypatch.setattr(model, "internalize_each", lambda texts: internalized.append(texts) or once(texts))

    def rows() -> list[dict]:
        differ = ("seconds", "n", "command")
        return [{k: v for k, v in row.items() if k not in differ} for row in records.read_jsonl(path)]

    main([*command, "3"])
    at_once = rows()
    assert len(internalized) == 3, "each haystack is internalized once"
    path.unlink()
    for n in ("1", "3"):
        main([*command, n])
    assert len(internalized) == 6, "the second call does not begin again"
    assert rows() == at_once
    in_parts = records.read_jsonl(path)
    assert [row["sample"] for row in in_parts if row["full"]] == [0, 1, 2]
    assert [row["n"] for row in in_parts if row["full"]] == [1, 3, 3]
    assert in_parts[-1]["command"] == "d2l study recompression --length 400 --seed 3 --n 3"
    small, whole = in_parts[0], next(row for row in in_parts if row["full"])
    assert small["rank"] == 1 < whole["rank"] and small["bytes"] < whole["bytes"] and small["error"] > whole["error"]
    assert whole["error"] == 0 and json.dumps(in_parts)

    other = build_model(seed=5, window=1024)
    monkeypatch.setattr(loading, "load", lambda name: other)
    with pytest.raises(SystemExit, match="^d2l study: .*recompression.jsonl holds rows of another hypernetwork"):
        main([*command, "3"])
