"""Files appear complete or not at all."""

import os
import stat

import matplotlib.pyplot as plt
import pytest

from d2l_lib import records
from d2l_lib.formats import writing


def only_visible(folder):
    """Names in a folder, hidden leftovers included."""
    return sorted(path.name for path in folder.iterdir())


def test_write_atomic_round_trip(tmp_path):
    path = writing.write_atomic(tmp_path / "new" / "a.txt", "héllo\r\n")
    assert path.read_bytes() == "héllo\r\n".encode()
    writing.write_atomic(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert only_visible(path.parent) == ["a.txt"]


def test_file_has_ordinary_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("x")
    written = writing.write_atomic(tmp_path / "written", "x")
    assert stat.S_IMODE(os.stat(written).st_mode) == stat.S_IMODE(os.stat(plain).st_mode)


def test_interrupted_file_leaves_the_old_one(tmp_path):
    path = writing.write_atomic(tmp_path / "a.txt", "old")
    with pytest.raises(KeyboardInterrupt), writing.atomic_file(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert only_visible(tmp_path) == ["a.txt"]


def test_full_disk_leaves_nothing(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match="[Nn]o space"), writing.atomic_file(tmp_path / "a.txt") as temporary:
        os.symlink("/dev/full", temporary)
        with open(temporary, "w") as file:
            file.write("x" * 100_000)
    assert only_visible(tmp_path) == []


def test_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "model"
    with writing.atomic_folder(folder) as temporary:
        (temporary / "old").write_text("1")
    with writing.atomic_folder(folder) as temporary:
        (temporary / "new").write_text("2")
        assert only_visible(folder) == ["old"]
    assert only_visible(folder) == ["new"]
    assert only_visible(tmp_path) == ["model"]


def test_interrupted_folder_leaves_the_old_one(tmp_path):
    folder = tmp_path / "model"
    with writing.atomic_folder(folder) as temporary:
        (temporary / "old").write_text("1")
    with pytest.raises(RuntimeError), writing.atomic_folder(folder) as temporary:
        (temporary / "new").write_text("2")
        raise RuntimeError
    assert only_visible(folder) == ["old"]
    assert only_visible(tmp_path) == ["model"]


def test_folder_does_not_replace_a_file(tmp_path):
    writing.write_atomic(tmp_path / "model", "precious")
    with pytest.raises(NotADirectoryError, match="is a file"), writing.atomic_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "model").read_text() == "precious"


def test_json_and_jsonl_round_trip(tmp_path):
    value = {"name": "Ünïcode </script>", "list": [1, 2.5, None, True]}
    assert records.read_json(records.write_json(tmp_path / "a.json", value)) == value
    rows = [value, {"n": 1}, []]
    assert records.read_jsonl(records.write_jsonl(tmp_path / "a.jsonl", iter(rows))) == rows


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        records.write_json(tmp_path / "a.json", {"loss": float("nan")})
    with pytest.raises(ValueError):
        records.write_jsonl(tmp_path / "a.jsonl", [{"loss": 1.0}, {"loss": float("inf")}])
    assert only_visible(tmp_path) == []


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"n": 2')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        records.read_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 1}\n"\xff"')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        records.read_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text('{"n": ')
    with pytest.raises(ValueError, match=r"a\.json is not a complete JSON"):
        records.read_json(tmp_path / "a.json")


def test_project_root_follows_the_working_directory(tmp_path, monkeypatch, project_folder):
    monkeypatch.chdir(tmp_path)
    assert records.project_root() == project_folder
    (tmp_path / "d2l_lib").mkdir()
    (tmp_path / "d2l_lib" / "__init__.py").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert records.project_root() == tmp_path


def test_same_figure_same_bytes(tmp_path, monkeypatch):
    (tmp_path / "d2l_lib").mkdir()
    (tmp_path / "d2l_lib" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    contents = []
    for _ in range(2):
        figure, axes = plt.subplots()
        axes.plot([1, 2])
        path = records.save_figure(figure, "03_exact_match_by_length")
        contents.append(path.read_bytes())
        plt.close(figure)
    assert path == tmp_path / "figures" / "03_exact_match_by_length.png"
    assert contents[0] == contents[1]
    assert b"matplotlib" not in contents[0]


@pytest.mark.parametrize("name", ["loss", "3_a_by_b", "03_A_by_b", "../03_a_by_b", "03_length"])
def test_figure_names_follow_the_pattern(name):
    with pytest.raises(ValueError, match="NN_what_by_what"):
        records.save_figure(plt.Figure(), name)


def test_environment_line_names_what_made_the_numbers():
    from tiny_models import build_model

    line = records.environment_line("tiny", build_model())
    for part in ("preset tiny", "LlamaForCausalLM", "hypernetwork", "cpu, float32", "torch", "transformers"):
        assert part in line
    assert "preset tiny" in records.environment_line("tiny")
    assert "LlamaForCausalLM (" in records.environment_line("tiny", build_model().base_model)
