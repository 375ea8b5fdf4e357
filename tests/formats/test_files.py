"""What every reader promises: one declared error for whatever a file holds, in bounded time and memory."""

import json
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fuzz_files import fuzz_all, split_safetensors, with_header
from safetensors.torch import load_file, save_file
from tiny_models import build_model

import d2l_lib as d2l
from d2l_lib import records
from d2l_lib.formats import schemas
from d2l_lib.formats.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from d2l_lib.formats.peft import check_export
from d2l_lib.formats.shards import PUBLISHED, _sha256, read_shards
from d2l_lib.formats.tensors import read_tensors
from d2l_lib.studies import watch


@pytest.fixture(scope="module")
def model():
    return build_model(("down_proj", "q_proj"))


@pytest.fixture(scope="module")
def adapter(model):
    return model.internalize({"first": "The code is 4217. It is red.", "second": "Ada has a boat."}, chunk_tokens=24)


def test_mutated_files_of_every_kind(tmp_path):
    """Sixteen of each; `python tests/fuzz_files.py 10000` runs more of the same."""
    results = fuzz_all(16, 1, [], tmp_path, lambda line: None)
    assert len(results) == 8
    for kind, counts in results.items():
        assert counts.total() == 16 and any(outcome == "refused" for _, outcome in counts), kind


# ---------------------------------------------------------------------------------------------------------- the error
def test_one_form_of_error_names_file_place_expectation_value_and_advice():
    value = {"known": True, "growth": 1.0, "refusal": "No."}
    with pytest.raises(ValueError) as caught:
        schemas.check(schemas.GateSettings, value, "folder/config.json", "copy it again")
    assert str(caught.value) == "folder/config.json: known: a finite number is expected, not True: copy it again"
    with pytest.raises(ValueError) as caught:
        schemas.check(
            schemas.GateSettings, value | {"known": 1, "refusal": "x" * 10**6 + "\x1b[31m"} | {"a\x1b": 1}, "f", "w"
        )
    assert len(str(caught.value)) < 300 and str(caught.value).isprintable() and "no such name" in str(caught.value)


@pytest.mark.parametrize(
    "value", ["x" * 10**7, "\ud800\x1b", [[[[[[1]]]]]] * 50, {"a": {"b": ["c"] * 999}}, 10**4000, None]
)
def test_values_are_shown_short_and_printable(value):
    text = schemas.shown(value)
    assert len(text) <= schemas._LONGEST_VALUE and text.isprintable() and text.isascii()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' * 200_000, "nested too deeply"),
        (b"9" * 5000, "digits"),
        (b"[1e999]", "finite number, not 1e999"),
        (b"[-Infinity]", "finite number, not -infinity"),
        (b"[NaN]", "finite number, not nan"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'"\xff"', "utf-8"),
        (b'{"a": 1', "delimiter"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_no_json_is_one_error(tmp_path, content, reason):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.json is not a complete JSON file .*{reason}.*write it again"):
        records.read_json(path)
    with pytest.raises(ValueError, match=f"the header is not JSON .*{reason}.*save it"):
        records.parse_json(content, "the header", "save it")
    if content:
        path.write_bytes(b"{}\n" + content)
        with pytest.raises(ValueError, match=f"a.json, line 2 is not JSON .*{reason}"):
            records.read_jsonl(path)


def test_of_a_repeated_key_the_last_value_counts():
    assert records.parse_json('{"a": 1, "a": 2}', "x") == {"a": 2}


def test_rows_are_objects(tmp_path):
    path = records.write_jsonl(tmp_path / "a.jsonl", [{"a": 1}, [1]])
    with pytest.raises(ValueError, match="a.jsonl, value 2 is list, not an object"):
        records.read_rows(path)


# ------------------------------------------------------------------------------------------------------------ adapters
def edited(path, target, change):
    """The adapter file with its labels changed by `change`, at `target`."""
    header, data = split_safetensors(path.read_bytes())
    labels = json.loads(header["__metadata__"]["d2l-adapter"])
    change(labels)
    target.write_bytes(with_header(json.dumps(header | {"__metadata__": {"d2l-adapter": json.dumps(labels)}}), data))
    return target


def put(*path, value):
    def change(labels):
        *inner, last = path
        for key in inner:
            labels = labels[key]
        labels[last] = value

    return change


@pytest.mark.parametrize(
    ("place", "values", "what"),
    [
        (("blocks", 0, "document"), (5, None, ["x"], ""), "a text"),
        (("blocks", 0, "document"), ("\ud800",), "valid Unicode"),
        (("blocks", 0, "chunk"), ("x", 1.5, True, None), "a whole number"),
        (("blocks", 0, "chunk"), (-1,), "a number of at least 0"),
        (("blocks", 0, "span"), ("ab", 3, {"a": 1}), "a list"),
        (("blocks", 0, "span"), ([9, 3],), "start <= end"),
        (("blocks", 0, "span", 0), (-1,), "a number of at least 0"),
        (("blocks", 0, "weight"), ("1", True, None), "a finite number"),
        (("blocks", 0, "A"), (["x"], 3), "an object of named values"),
        (("blocks", 0, "unheard"), (1,), "no such name"),
        (("blocks",), ({}, "x", None), "a list"),
        (("n_layers",), (0, -1), "a number of at least 1"),
        (("n_layers",), (10**12,), "a number of at most 1000"),
        (("layers",), ("0", 1), "a list"),
        (("layers",), ([-1], [1.5]), "a number|a whole number"),
        (("sizes", "q_proj"), ([1, 2, 3], []), "values|value"),
        (("sizes", "q_proj", 0), (0,), "a number of at least 1"),
        (("paths", "q_proj"), (5,), "a text"),
        (
            ("paths", "q_proj"),
            ("{layer}.{layer}", "x", "3", "a.3.{layer}/b", "{layer}{0.__class__}", "{layer!r}", "{layer}/x"),
            "one {layer}",
        ),
        (("base_key",), (5, None), "a text"),
        (("bias_inside",), ("no", 1, None), "true or false"),
        (("scale",), ("1", None), "a finite number"),
    ],
)
def test_labels_of_another_kind_are_refused_by_place(tmp_path, adapter, place, values, what):
    path = adapter.save(tmp_path / "a")
    named = ".".join(map(str, place))
    for value in values:
        with pytest.raises(
            ValueError, match=rf"damaged header: {named}[^:]*: [^:]*({what}).* is expected, .*: save it again"
        ):
            d2l.Adapter.load(edited(path, tmp_path / "b", put(*place, value=value)))


def test_tensors_that_are_missing_left_over_or_shared_wrongly(tmp_path, adapter):
    path = adapter.save(tmp_path / "a")
    tensors = load_file(path)
    labels = split_safetensors(path.read_bytes())[0]["__metadata__"]
    save_file(tensors | {"surplus": torch.zeros(1)}, tmp_path / "b", metadata=labels)
    with pytest.raises(ValueError, match="surplus.* belong to no block"):
        d2l.Adapter.load(tmp_path / "b")
    save_file({name: tensor for name, tensor in tensors.items() if "block1.A.q" not in name}, tmp_path / "b", labels)
    with pytest.raises(ValueError, match="block1.A.q_proj.* are missing"):
        d2l.Adapter.load(tmp_path / "b")
    with pytest.raises(ValueError, match="block0.A.q_proj.* belong to no block"):
        d2l.Adapter.load(edited(path, tmp_path / "b", lambda labels: labels["blocks"][0]["A"].pop("q_proj")))
    with pytest.raises(ValueError, match="blocks.0 has other modules than sizes"):
        d2l.Adapter.load(edited(path, tmp_path / "b", lambda labels: labels["sizes"].pop("q_proj")))
    for layers, wrong in (([1, 0], "layers must ascend"), ([7], "layers must ascend"), ([0], "expected .1, rank")):
        with pytest.raises(ValueError, match=f"damaged header: .*{wrong}"):
            d2l.Adapter.load(edited(path, tmp_path / "b", put("layers", value=layers)))


BAD_TENSORS = {
    "NaN or infinity": lambda t: t * torch.nan,
    "it holds NaN or infinity": lambda t: t + torch.inf,
    "not int64": lambda t: t.long(),
    "not bool": lambda t: t > 0,
    "not complex64": lambda t: t.to(torch.complex64),
    "not float8_e4m3fn": lambda t: t.to(torch.float8_e4m3fn),
    "not empty": lambda t: t[:0],
}


@pytest.mark.parametrize("message", BAD_TENSORS)
def test_only_finite_floating_tensors_are_read_wherever_they_come_from(tmp_path, model, adapter, message):
    def spoil(path):
        tensors = load_file(path)
        name = sorted(tensors)[-1]
        labels = split_safetensors(path.read_bytes())[0].get("__metadata__")
        save_file(tensors | {name: BAD_TENSORS[message](tensors[name]).contiguous()}, path, labels)
        return f"{path.name}: {name}.*{message}"

    spoiled = spoil(adapter.save(tmp_path / "a"))
    with pytest.raises(ValueError, match=spoiled):
        d2l.Adapter.load(tmp_path / "a")
    folder = adapter.export_peft(tmp_path / "peft")
    spoiled = spoil(folder / "adapter_model.safetensors")
    for read in (d2l.Adapter.from_peft, check_export):
        with pytest.raises(ValueError, match=spoiled):
            read(folder)
    folder = save_checkpoint(tmp_path / "checkpoint", model.hypernetwork)
    spoiled = spoil(folder / "hypernetwork.safetensors")
    with pytest.raises(CheckpointError, match=spoiled):
        load_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_wrong_number_among_many_is_found_in_every_precision(tmp_path, dtype):
    tensor = torch.zeros(3, 5, 7, dtype=dtype)
    save_file({"x": tensor}, tmp_path / "x")
    assert torch.equal(read_tensors(tmp_path / "x")[0]["x"], tensor)
    for wrong in (torch.nan, torch.inf, -torch.inf):
        changed = tensor.clone()
        changed[1, 2, 3] = wrong
        save_file({"x": changed}, tmp_path / "x")
        with pytest.raises(ValueError, match="x: finite numbers are expected"):
            read_tensors(tmp_path / "x")


def test_headers_larger_than_their_file_are_not_read(tmp_path):
    for size in (10**12, 2**63, 50):
        (tmp_path / "a").write_bytes(struct.pack("<Q", size) + b"{}")
        with pytest.raises(ValueError, match=f"not a complete safetensors file.*its header would have {size} bytes"):
            d2l.Adapter.load(tmp_path / "a")


# ---------------------------------------------------------------------------------------------------------------- PEFT
@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"r": "8"}, "r: a whole number is expected, not '8'"),
        ({"r": True}, "r: a whole number is expected, not True"),
        ({"r": 10**12}, "r: a number of at most"),
        ({"lora_alpha": "8"}, "lora_alpha: a finite number"),
        ({"lora_alpha": None}, "a LoRA with r and lora_alpha"),
        ({"use_rslora": "no"}, "use_rslora: true or false is expected, not 'no'"),
        ({"rank_pattern": ["x"]}, "rank_pattern: an object of named values"),
        ({"rank_pattern": {"q_proj": "3"}}, "rank_pattern.q_proj: a whole number"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern.q_proj: a finite number"),
        ({"target_modules": 5}, "target_modules: a pattern or a list of names"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path: a text"),
        ({"peft_type": 5}, "peft_type: a text"),
    ],
)
def test_settings_of_another_kind_are_refused_and_told(tmp_path, adapter, values, what):
    folder = adapter.export_peft(tmp_path / "peft")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(ValueError, match=f"adapter_config.json: {what}"):
        d2l.Adapter.from_peft(folder)
    assert what in check_export(folder).problems[0]


def test_a_pattern_that_would_take_ages_is_refused(tmp_path, adapter):
    folder = adapter.export_peft(tmp_path / "peft")
    path = folder / "adapter_config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"rank_pattern": {r"([a-z0-9_.]|[a-z0-9_.]{2}|[a-z0-9_.]{3})*[A-Z]": 3}}))
    with pytest.raises(ValueError, match="a pattern that takes too long"):
        d2l.Adapter.from_peft(folder)


def test_a_lora_of_one_far_layer_takes_no_memory_for_a_thousand(tmp_path, adapter):
    folder = adapter.export_peft(tmp_path / "peft")
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if "layers.0." in name}
    save_file({name.replace("layers.0.", "layers.999."): tensor for name, tensor in tensors.items()}, path)
    with pytest.raises(ValueError, match="a model with 1000 layers: pass base_model="):
        d2l.Adapter.from_peft(folder)
    save_file({name.replace("layers.0.", "layers.999999999999."): tensor for name, tensor in tensors.items()}, path)
    with pytest.raises(ValueError, match="is in no decoder layer"):
        d2l.Adapter.from_peft(folder)


# -------------------------------------------------------------------------------------------------------------- shards
def shard(path, *, value=-0.5, other=-1.0, index=7, token=3, document=1, rows=2):
    """A shard whose last row has these numbers."""
    plain = {"value": -0.5, "other": -1.0, "index": 7, "token": 3, "document": 1}
    last = {"value": value, "other": other, "index": index, "token": token, "document": document}
    table = [
        {
            "ctx_ids": [2, n["document"]],
            "input_ids": [[1, 5], [1, n["token"], 2]],
            "response_start_end": [[1, 2], [1, 3]],
            "logprobs_vals": [
                [[np.float16(-0.5)] * 2],
                [[np.float16(-0.5)] * 2, [np.float16(n["value"]), np.float16(n["other"])]],
            ],
            "logprobs_indices": [[[7, 8]], [[7, 8], [8, n["index"]]]],
        }
        for n in [*[plain] * (rows - 1), last]
    ]
    pq.write_table(pa.Table.from_pylist(table, schema=pa.schema(PUBLISHED)), path)
    return path


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"value": np.inf}, "column logprobs_vals, row 1: a log-probability is above 0"),
        ({"value": 5.0}, "column logprobs_vals, row 1: a log-probability is above 0"),
        ({"other": 0.01}, "column logprobs_vals, row 1: a log-probability is above 0"),
        ({"value": np.nan}, "column logprobs_vals, row 1: a value is not a number"),
        ({"value": -np.inf}, "column logprobs_vals, row 1: the likeliest token has the probability 0"),
        ({"index": -3}, "column logprobs_indices, row 1: -3 is no token id, they go from 0"),
        ({"token": -1}, "column input_ids, row 1: -1 is no token id"),
        ({"document": -1}, "column ctx_ids, row 1: -1 is no token id"),
    ],
)
def test_impossible_numbers_in_shards_are_refused_by_row(tmp_path, numbers, message):
    with pytest.raises(ValueError, match=rf"s\.parquet, {message}"):
        read_shards(shard(tmp_path / "s.parquet", **numbers))


def test_rounding_impossible_alternatives_and_the_vocabulary(tmp_path):
    path = shard(tmp_path / "s.parquet", value=1e-4, other=-np.inf)
    assert len(read_shards(path, vocabulary=9)) == 2
    with pytest.raises(
        ValueError, match=r"column logprobs_indices, row 0: 8 is no token id, they go from 0 to 7: is it of"
    ):
        read_shards(path, vocabulary=8)


def test_a_shard_that_unpacks_to_far_more_than_its_size(tmp_path, monkeypatch):
    text = "x" * 100_000
    rows = [{"ctx_ids": [1], **{name: [] for name in PUBLISHED if name != "ctx_ids"}, "document": text}] * 3000
    schema = pa.schema(PUBLISHED | {"document": pa.string()})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "s.parquet", compression="zstd")
    assert (tmp_path / "s.parquet").stat().st_size < 100_000
    before = pa.total_allocated_bytes()
    with pytest.raises(ValueError, match="s.parquet would unpack to more than 256 MiB"):
        read_shards(tmp_path / "s.parquet")
    assert pa.total_allocated_bytes() - before < 1 << 20


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (put("shards", 0, "file", value="../s.parquet"), "shards.0.file: the name of a file in this folder"),
        (put("shards", 0, "sha256", value="x"), "shards.0.sha256: 64 hexadecimal digits"),
        (put("shards", value={}), "shards: a list is expected"),
        (put("complete", value="yes"), "complete: true or false is expected, not 'yes'"),
        (put("n_shards", value=5), "the 5 different shards of n_shards"),
        (lambda manifest: manifest.pop("complete"), "complete: a value is expected, and it is missing"),
    ],
)
def test_manifests_of_another_kind_are_refused(tmp_path, change, what):
    path = shard(tmp_path / "s.parquet")
    manifest = {"complete": True, "n_shards": 1, "shards": [{"file": path.name, "sha256": _sha256(path)}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert len(read_shards(tmp_path)) == 2
    change(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"manifest.json: {what}"):
        read_shards(tmp_path)


# ---------------------------------------------------------------------------------------------------------- base models
def test_a_base_model_without_all_of_its_weights_is_refused(tmp_path, model):
    folder = model.save(tmp_path / "model") / "base_model"
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"its weights lack {name}"):
        d2l.load(tmp_path / "model")
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for n_layers in (10**12, -1, True):
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": n_layers}))
        with pytest.raises(ValueError, match="base_model"):
            d2l.load(tmp_path / "model")


# -------------------------------------------------------------------------------------------------------------- scores
def test_another_file_in_the_place_of_scores_is_left_alone(tmp_path):
    path = tmp_path / "scores.jsonl"
    line = '{"checkpoint": "checkpoint-2", "step": 2}\n'
    for content in ("my notes, without a line break", line + "my notes", '{"step": 2}\n{"checkpoi', line + "[1]\n"):
        path.write_text(content)
        with pytest.raises(ValueError, match="scores.jsonl, line"):
            watch.read_scores(path)
        assert path.read_text() == content
    path.write_text(line + '{"checkpoint": "check')
    assert watch.read_scores(path) == [{"checkpoint": "checkpoint-2", "step": 2}]
    assert path.read_text() == line
