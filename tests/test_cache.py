"""The cache of adapters: what is read equals what was computed, nothing stale is read, and files of others stay."""

import os
import warnings

import processes
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_model, build_pooled_model, build_rows_model
from tokenizers.normalizers import Lowercase

from d2l_lib import __main__ as command
from d2l_lib import model as own_model
from d2l_lib.base_model import Fingerprint
from d2l_lib.cache import AdapterCache, document_key

TEXT = "The mill was built by Anna. It stands in Lindvik. Anna sold it to Bo. Bo painted it red."
OTHER = "The harbour was dug by Carl. It is deep."
BUILDERS = {
    "sum of blocks": build_model,
    "token rows": build_rows_model,
    "some layers": build_pooled_model,
}


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def model(tmp_path):
    model = build_model()
    model.cache = AdapterCache(tmp_path / "cache")
    return model


def count_encoded(model, monkeypatch) -> list[int]:
    """A list that gets the number of chunks of each encoding from now on."""
    counts, encode = [], model._encode

    def counted(chunks, progress):
        counts.append(len(chunks))
        return encode(chunks, progress)

    monkeypatch.setattr(model, "_encode", counted)
    return counts


def ages(cache) -> None:
    """Makes the files' order of use plain: a second between each."""
    for number, file in enumerate(cache.files()):
        os.utime(file.path, (number, number))


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
def test_a_hit_equals_a_miss_bit_for_bit(build, tmp_path, monkeypatch):
    model = build()
    documents = {"mill": TEXT, "twice": TEXT[:27] * 2, "harbour": OTHER}
    plain = model.internalize(documents, chunk_tokens=12)
    model.cache = AdapterCache(tmp_path / "cache")
    missed = model.internalize(documents, chunk_tokens=12)
    counts = count_encoded(model, monkeypatch)
    hit = model.internalize(documents, chunk_tokens=12)
    assert counts == [], "nothing was encoded"
    assert plain == missed == hit and len(hit.blocks) > 3, "blocks, spans, names and bias"
    assert hit is model.current and hit.nbytes == plain.nbytes, "equal chunks share their tensors"
    again = build()
    again.cache = AdapterCache(tmp_path / "cache")
    counts = count_encoded(again, monkeypatch)
    (other,) = again.internalize_each({"another name": OTHER}, chunk_tokens=12)
    assert counts == [] and other.documents == ["another name"]
    assert other.only(document="another name").blocks[0].A.keys() == hit.blocks[0].A.keys()
    mixed = again.internalize({"new": OTHER + " Yes.", "mill": TEXT}, chunk_tokens=12)
    assert counts and mixed.documents == ["new", "mill"], "only the new one was computed; the order is the caller's"
    assert mixed.only(document="mill").blocks == hit.only(document="mill").blocks


def test_whatever_changes_blocks_is_a_miss(model, monkeypatch):
    model.internalize(TEXT, chunk_tokens=12)

    def misses(model, text=TEXT, chunk_tokens=12) -> bool:
        counts = count_encoded(model, monkeypatch)
        model.internalize(text, chunk_tokens=chunk_tokens)
        return bool(counts)

    def with_cache(other):
        other.cache = model.cache
        return other

    assert not misses(model)
    assert misses(model, text=TEXT + " ") and misses(model, chunk_tokens=11)
    assert misses(with_cache(build_model(seed=2))), "another hypernetwork"
    assert misses(with_cache(build_model(base_seed=5))), "another base model"
    assert misses(with_cache(build_model(rank=3))), "another rank"
    half = with_cache(build_model())
    half.base_model.to(torch.bfloat16)
    assert half.base_key == model.base_key and misses(half), "the same weights in less precision"
    model.chunk_batch = 1
    assert misses(model)
    model.tokenizer.chat_template = model.tokenizer.chat_template.replace("user", "reader") + " "
    assert misses(model), "other chat wrapping"
    with torch.no_grad():
        next(model.hypernetwork.parameters()).add_(0.5)
    assert misses(model), "trained on"


def test_without_a_cache_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("D2L_ADAPTER_CACHE", str(tmp_path / "cache"))
    model = build_model()
    assert model.cache is None
    model.internalize(TEXT)
    assert list(tmp_path.iterdir()) == []
    assert AdapterCache().folder == tmp_path / "cache" and AdapterCache().files() == []


def _fill(folder, texts) -> list[str]:
    """What a process of its own computes or reads: some numbers of each text's adapter."""
    model = build_model()
    model.cache = AdapterCache(folder)
    return [str(model.internalize(text, chunk_tokens=12).blocks[0].A["down_proj"].tolist()) for text in texts]


def test_two_processes_may_write_and_read_the_same_files(tmp_path):
    texts = [f"{TEXT} Number {number} is open." for number in range(12)] * 2
    both = [processes.start(_fill, tmp_path, order) for order in (texts, texts[::-1])]
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    cache = AdapterCache(tmp_path)
    assert len(cache.files()) == 12 and len(list(tmp_path.iterdir())) == 12, "no leftovers"
    assert processes.run(_fill, tmp_path, texts[:12]) == _fill(tmp_path / "fresh", texts[:12])


def test_a_call_takes_the_models_fingerprints_once(model, monkeypatch):
    """They read values of every weight, so a call must not take them for every document."""
    taken = []
    for owner, name in ((Fingerprint, "key"), (own_model, "parameters_key")):
        monkeypatch.setattr(owner, name, counting(getattr(owner, name), name, taken))
    for _ in range(2):  # a miss and a hit
        model.internalize([TEXT, OTHER, TEXT + OTHER])
        assert sorted(taken) == ["key", "parameters_key"]
        taken.clear()


def _zero_columns(model):
    for layer in model.base_model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data[:, 1:] = 0


def _other_places(model):
    model.base_model.model.rotary_emb.inv_freq *= 0.5


CHANGES = {
    "columns": _zero_columns,
    "rotary positions": _other_places,
    "norms": lambda model: setattr(model.base_model.model.layers[0].input_layernorm, "variance_epsilon", 1.0),
    "layers": lambda model: setattr(model.encoder, "n_layers_run", model.encoder.n_layers_run + 1),
    "class": lambda model: setattr(model.base_model.model.layers[0].mlp, "act_fn", torch.nn.Tanh()),
    "hook": lambda model: model.base_model.model.layers[0].mlp.register_forward_hook(lambda *given: 2 * given[-1]),
    "forward": lambda model: setattr(model.base_model.model.layers[0].mlp, "forward", lambda x: 0 * x),
    "letters": lambda model: setattr(model.tokenizer.backend_tokenizer, "normalizer", Lowercase()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_blocks_of_before_a_change_are_read(model, monkeypatch, change):
    before = model.internalize(TEXT).blocks[0].A["down_proj"].clone()
    counts = count_encoded(model, monkeypatch)
    CHANGES[change](model)
    kept = model.internalize(TEXT).blocks[0].A["down_proj"]
    model.cache = None
    assert torch.equal(kept, model.internalize(TEXT).blocks[0].A["down_proj"]) and len(counts) == 2
    assert not torch.allclose(kept, before, atol=1e-6)


def test_autocast_has_blocks_of_its_own(model):
    def read() -> torch.Tensor:
        return model.internalize(TEXT).blocks[0].A["down_proj"].float()

    with torch.autocast("cpu", torch.bfloat16):
        rounded = read()
    exact = read()
    assert not torch.equal(rounded, exact) and len(model.cache.files()) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(read(), rounded)


def test_while_hooks_act_nothing_is_kept_and_hooks_are_heard(model):
    seen = []
    handle = model.base_model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    for _ in range(2):
        seen.clear()
        model.internalize(TEXT)
        assert seen and model.cache.files() == []
    handle.remove()
    model.internalize(TEXT)
    assert len(model.cache.files()) == 1


def test_another_process_has_the_same_key(model):
    """Also after passes of all kinds: nothing that a pass leaves behind is part of a key."""
    before = model.cache_facts(16)
    adapter = model.internalize(TEXT)
    model.answer("Who built the mill?", adapter)
    with model.applied(adapter):
        assert model.cache_facts(16) == before
    assert processes.run(_facts) == before


def _facts() -> dict:
    return build_model().cache_facts(16)


def counting(function, name: str, calls: list[str]):
    """The function, which adds its name to `calls`."""

    def counted(*arguments, **options):
        calls.append(name)
        return function(*arguments, **options)

    return counted


def test_the_least_recently_used_leave_first(model):
    texts = [f"{TEXT} It has {number} rooms." for number in range(4)]
    for text in texts[:3]:
        model.internalize(text)
    (size,) = {file.n_bytes for file in model.cache.files()}
    ages(model.cache)
    first, _, third = (file.path for file in model.cache.files())
    by_text = {text: model.cache.path(document_key(text, model.cache_facts(model.chunk_tokens))) for text in texts}
    oldest = next(text for text, path in by_text.items() if path == first)
    model.internalize(oldest)  # used again
    model.cache.limit_bytes = 3 * size + 10
    model.internalize(texts[3])
    assert {file.path for file in model.cache.files()} == {first, third, by_text[texts[3]]}
    model.cache.limit_bytes = 100
    with pytest.warns(UserWarning, match="does not keep one of .* MB, its limit is 0.0 MB"):
        model.internalize(texts[3] + " Yes.")
    assert len(model.cache.files()) == 3, "what is larger than the limit is not kept, and drives nothing out"


def test_files_of_others_stay(model):
    folder = model.cache.folder
    adapter = model.internalize(TEXT)
    own = model.cache.files()[0].path
    plain = folder / f"{'a' * 64}.safetensors"
    adapter.save(plain)  # an adapter that somebody saved under such a name
    renamed = folder / f"{'b' * 64}.safetensors"
    renamed.write_bytes(own.read_bytes())
    notes, weights = folder / "notes.txt", folder / f"{'c' * 64}.safetensors"
    notes.write_text("mine")
    save_file({"weights": torch.ones(2)}, weights)
    (folder / f"{'d' * 64}.safetensors").mkdir()
    others = sorted(path for path in folder.iterdir() if path != own)
    assert [file.path for file in model.cache.files()] == [own]
    model.cache.limit_bytes = own.stat().st_size
    model.internalize(OTHER)
    assert [file.path for file in model.cache.files()] != [own] and not own.exists()
    assert model.cache.clear() == 1 and sorted(folder.iterdir()) == others
    key = document_key(TEXT, model.cache_facts(model.chunk_tokens))
    weights.rename(model.cache.path(key))  # where the cache would write
    with pytest.warns(UserWarning) as told:
        assert model.internalize(TEXT) == adapter
    assert "skips a file" in str(told[0].message) and "could not keep one" in str(told[1].message)
    assert torch.equal(load_file(model.cache.path(key))["weights"], torch.ones(2))


def _cut(content: bytes) -> bytes:
    return content[:-7]


def _flipped(content: bytes) -> bytes:
    return content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]


def _exchanged(content: bytes) -> bytes:
    return b"not at all"


@pytest.mark.parametrize("damage", [_cut, _flipped, _exchanged])
def test_a_damaged_file_is_a_miss_with_a_warning_and_is_replaced(model, damage, monkeypatch):
    adapter = model.internalize(TEXT)
    (file,) = model.cache.files()
    whole = file.path.read_bytes()
    file.path.write_bytes(damage(whole))
    counts = count_encoded(model, monkeypatch)
    with pytest.warns(UserWarning, match="skips a file, its document is internalized") as told:
        assert model.internalize(TEXT) == adapter
    assert counts and file.path.name in str(told[0].message)
    assert model.internalize(TEXT) == adapter and len(counts) == 1, "the file is whole again"


def test_a_folder_that_cannot_be_written_costs_the_cache_alone(tmp_path):
    (tmp_path / "file").write_text("no folder")
    model = build_model()
    plain = model.internalize(TEXT)
    model.cache = AdapterCache(tmp_path / "file" / "cache")
    with pytest.warns(UserWarning, match="could not keep one"):
        assert model.internalize(TEXT) == plain
    with pytest.raises(ValueError, match="limit_bytes must be"):
        AdapterCache(tmp_path, limit_bytes=0)


def test_the_command_shows_and_clears(model, monkeypatch, capsys):
    monkeypatch.setenv("D2L_ADAPTER_CACHE", str(model.cache.folder))
    model.internalize_each([TEXT, OTHER])
    (model.cache.folder / "notes.txt").write_text("mine")
    assert command.main(["cache"]) == 0
    size = sum(file.n_bytes for file in model.cache.files()) / 1e6
    assert capsys.readouterr().out == f"2 adapters, {size:.1f} MB of at most 2,147 MB, in {model.cache.folder}\n"
    assert command.main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == f"deleted 2 adapters in {model.cache.folder}\n"
    assert [path.name for path in model.cache.folder.iterdir()] == ["notes.txt"]
