"""The reader of published pickles: it runs nothing, writes nothing, and accepts the known names only."""

import copyreg
import io
import os
import pickle
import struct
import tarfile
import time
import zipfile
from collections import OrderedDict
from itertools import combinations

import pytest
import torch
from fuzz_checkpoints import PROGRAM, fuzz, packed, records_of, small_checkpoint, watched
from safetensors.torch import save

from d2l_lib.formats import pickles
from d2l_lib.formats.pickles import CheckpointError, Record


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    return small_checkpoint(tmp_path_factory.mktemp("small") / "pytorch_model.bin")


@pytest.fixture(scope="module")
def records(content) -> dict[str, bytes]:
    return records_of(content)


class Call:
    """Pickles as a call of a function, which a careless reader carries out."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def refusal(content: bytes, tmp_path) -> str:
    """The message with which the file is refused, from disk; nothing was done and no file was written."""
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    with watched() as seen, pytest.raises(CheckpointError) as caught:
        pickles.read(path)
    assert not seen
    assert sorted(tmp_path.rglob("*")) == before
    assert str(caught.value).isprintable()
    return str(caught.value)


def with_program(records, program: bytes) -> bytes:
    return packed(records | {PROGRAM: program})


# --- what a checkpoint may name ---------------------------------------------------------------------------------------

COMMAND = b"X\x07\x00\x00\x00touch x\x85R."
PROGRAMS = {
    "posix.system": b"\x80\x02cposix\nsystem\n" + COMMAND,
    "os.system": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + COMMAND,
    "nt.system": b"\x80\x04\x8c\x02nt\x94\x8c\x06system\x94h\x00h\x01\x93" + COMMAND,
    "builtins.getattr": b"\x80\x02cbuiltins\ngetattr\ncbuiltins\n__import__\nX\x02\x00\x00\x00os\x85R"
    b"X\x06\x00\x00\x00system\x86R.",
    "builtins.eval": b"(X\x01\x00\x00\x001ibuiltins\neval\n.",
    "collections.OrderedDict.fromkeys": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.",
    "torch.load": b"\x80\x02ctorch\nload\n.",
    "torch._utils._rebuild_tensor": b"\x80\x02ctorch._utils\n_rebuild_tensor\n.",
    "torch._utils._rebuild_device_tensor_from_numpy": b"\x80\x02ctorch._utils\n_rebuild_device_tensor_from_numpy\n.",
    "torch.nn.parameter.Parameter": b"\x80\x02ctorch.nn.parameter\nParameter\n.",
    "torch._tensor._rebuild_from_type_v2": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n.",
    "torch.device": b"\x80\x02ctorch\ndevice\n.",
    "peft.peft_model.PeftModel": b"\x80\x02cpeft.peft_model\nPeftModel\n.",
    "extension 7": b"\x80\x02\x82\x07.",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_name_that_is_not_known_is_refused_by_name(records, tmp_path, name):
    assert f"asks for {name}, which no" in refusal(with_program(records, PROGRAMS[name]), tmp_path)


@pytest.mark.parametrize("protocol", range(6))
def test_a_call_is_refused_in_every_protocol_and_wherever_it_stands(content, tmp_path, protocol):
    marker = tmp_path / "executed"
    call = Call(os.system, f"touch {marker}")
    for value in (call, {"base_model_name_or_path": "x", "hypernet_config": [OrderedDict(a=call)]}):
        file = io.BytesIO()
        if protocol >= 2:
            torch.save(value, file, pickle_protocol=protocol)
            assert f"asks for {os.system.__module__}.system, which" in refusal(file.getvalue(), tmp_path)
        plain = pickle.dumps(value, protocol)  # no zip around it
        assert f"asks for {os.system.__module__}.system, which" in refusal(plain, tmp_path)
    assert not marker.exists()


def test_what_others_allow_torch_to_read_is_not_allowed_here(records, tmp_path):
    """torch.serialization.add_safe_globals, as peft, transformers or a user may call it, widens nothing."""
    file = io.BytesIO()
    torch.save({"base_model_name_or_path": "x", "hypernet_config": Call(struct.calcsize, "i")}, file)
    program = b"\x80\x02cos\nsystem\n."
    with torch.serialization.safe_globals([struct.calcsize, (os.getcwd, "os.system")]):
        assert "asks for _struct.calcsize" in refusal(file.getvalue(), tmp_path)
        assert "asks for os.system" in refusal(with_program(records, program), tmp_path)
        known = ("ctx_to_lora.configs.CtxEncoderArguments", "torch._utils._rebuild_tensor_v2")
        torch.serialization.add_safe_globals([(os.system, name) for name in known])
        try:
            assert isinstance(pickles.read(io.BytesIO(packed(records)))["ctx_encoder_args"], Record)
        finally:
            torch.serialization.clear_safe_globals()


def test_extension_codes_that_were_used_before_are_refused(records, tmp_path):
    """Python's own unpickler takes these out of a cache, past `find_class`."""
    copyreg.add_extension("os", "system", 7)
    try:
        pickle.loads(b"\x80\x02\x82\x07.")
        assert "asks for extension 7" in refusal(with_program(records, PROGRAMS["extension 7"]), tmp_path)
    finally:
        copyreg.remove_extension("os", "system", 7)


def test_a_long_or_disguised_name_is_shown_short_and_plain(records, tmp_path):
    name = ("\x1b]0;title\x07" + "x" * 5000).encode()
    program = b"\x80\x04X" + struct.pack("<I", len(name)) + name + b"\x8c\x01f\x93."
    message = refusal(with_program(records, program), tmp_path)
    assert r"asks for \x1b]0;title" in message and len(message) < 500


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x02ccollections\nOrderedDict\n(]]tR.", "damaged"),  # called with arguments
        (b"\x80\x02cpeft.utils.peft_types\nPeftType\nK\x01\x85R.", "int where a str"),
        (b"\x80\x02cctx_to_lora.configs\nCtxEncoderArguments\nK\x01\x85\x81.", "cannot make"),
        (b"\x80\x02cctx_to_lora.configs\nCtxEncoderArguments\n)R.", "not called like this"),
        (b"\x80\x02X\x01\x00\x00\x00a)R.", "str where a _Global"),
        (b"\x80\x02}}X\x01\x00\x00\x00aK\x01sb.", "attributes of a dict"),
        (b"\x80\x02}K\x01K\x02s.", "int where a str"),  # keys are texts
        (b"\x80\x02(X\x01\x00\x00\x00al.", "instruction LIST"),
        (b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00].", "instruction FRAME"),
        (b"\x80\x02]2.", "instruction DUP"),
        (b"\x80\x02]", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02h\x05.", "damaged"),
        (b"", "damaged"),
        (b"\x80\x02].", "is not a Doc-to-LoRA checkpoint"),
    ],
)
def test_programs_that_torch_does_not_write(records, tmp_path, program, message):
    assert message in refusal(with_program(records, program), tmp_path)


def test_values_that_take_for_ever_to_hash_or_to_print(records, tmp_path):
    """A tuple of tuples of ... of tuples, doubled sixty times, as a key, a set's member and a setting."""
    deep = b")q\x00" + b"h\x00h\x00\x86q\x00" * 60
    start = time.perf_counter()
    for program in (
        b"\x80\x02}" + deep + b"Ns.",
        b"\x80\x02c__builtin__\nset\n](" + deep + b"e\x85R.",
        b"\x80\x02ccollections\nOrderedDict\n)R(X\x17\x00\x00\x00base_model_name_or_path" + deep
        + b"X\x0f\x00\x00\x00hypernet_config" + deep + b"u.",
    ):  # fmt: skip
        file = io.BytesIO(with_program(records, program))
        with pytest.raises((CheckpointError, TypeError, AttributeError)):
            from d2l_lib.formats.checkpoints import parse_published

            parse_published(pickles.read(file))
    assert time.perf_counter() - start < 10


# --- tensors ----------------------------------------------------------------------------------------------------------


def tensor_program(key=b"X\x01\x00\x00\x000", count=b"K\x04", offset=b"K\x00", size=b"K\x04\x85", stride=b"K\x01\x85"):
    """A program with one tensor of float32 values out of record data/0, which holds four."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + key + b"X\x03\x00\x00\x00cpu" + count + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + stride
    tensor += b"\x89ccollections\nOrderedDict\n)RtR"
    start = b"\x80\x02ccollections\nOrderedDict\n)R(X\x01\x00\x00\x00w" + tensor
    return start + b"X\x17\x00\x00\x00base_model_name_or_pathNX\x0f\x00\x00\x00hypernet_configNu."


FOUR = {PROGRAM: b"", "archive/data/0": struct.pack("<4f", 1, 2, 3, 4)}


def test_tensors_of_a_storage():
    def values(**changes):
        return pickles.read(io.BytesIO(with_program(FOUR, tensor_program(**changes))))["w"]

    assert values().tolist() == [1, 2, 3, 4]
    assert values(size=b"K\x02K\x02\x86", stride=b"K\x01K\x02\x86").tolist() == [[1, 3], [2, 4]]
    assert values(offset=b"K\x03", size=b")", stride=b")").item() == 4


LARGE = b"\x8a\x08" + struct.pack("<q", 2**62)


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": b"K\x01"},
        {"offset": b"J\xff\xff\xff\xff"},
        {"offset": LARGE},
        {"size": b"K\x05\x85"},
        {"size": b"J\xff\xff\xff\xff\x85"},
        {"size": LARGE + b"\x85", "stride": b"K\x00\x85"},  # one value repeated 2**62 times
        {"size": b"K\xffK\xff\x86", "stride": b"K\x00K\x00\x86"},
        {"size": b"K\x00\x85"},
        {"size": b"K\x01\x85", "stride": LARGE + b"\x85"},
        {"size": b"K\x04K\x01\x86"},  # more sizes than strides
        {"size": b"\x88\x85"},
        {"size": b"(" + b"K\x01" * 20 + b"t", "stride": b"(" + b"K\x01" * 20 + b"t"},
        {"stride": b"K\x02\x85"},
        {"stride": b"J\xff\xff\xff\xff\x85"},
        {"count": b"K\x05"},
        {"count": LARGE},
        {"count": b"J\xff\xff\xff\xff"},
        {"key": b"X\x01\x00\x00\x001"},
        {"key": b"X\x0b\x00\x00\x00../../evil\n"},
        {"key": b"K\x00"},
    ],
)
def test_a_tensor_that_reaches_outside_its_storage(tmp_path, changes):
    assert "damaged" in refusal(with_program(FOUR, tensor_program(**changes)), tmp_path)


# --- the file around it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/evil", "archive/../../evil", "archive/..\\evil", "C:\\evil", "archive/code/x.py", "x"]
)
def test_a_record_outside_the_checkpoint_is_refused_by_name(records, tmp_path, name):
    folder = tmp_path / "deep" / "down"
    folder.mkdir(parents=True)
    assert ascii(name)[1:-1] in refusal(packed(records | {name: b"evil"}), folder)
    assert not list(tmp_path.rglob("evil*"))
    with_root = {key.replace("archive", ".."): value for key, value in records.items()}
    assert "'../" in refusal(packed(with_root), folder)


def test_compressed_repeated_and_encrypted_records(records, content, tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in (records | {"archive/data/0": bytes(1 << 26)}).items():
            archive.writestr(name, value)
    assert "compressed" in refusal(file.getvalue(), tmp_path)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file := io.BytesIO(content), "a") as archive:
        archive.writestr(PROGRAM, b"\x80\x02].")
    assert "several times" in refusal(file.getvalue(), tmp_path)
    directory = content.index(b"PK\x01\x02")
    encrypted = bytearray(content)
    encrypted[directory + 8] |= 1
    assert "damaged" in refusal(bytes(encrypted), tmp_path)
    big = records | {"archive/byteorder": b"big"}
    assert "big-endian" in refusal(packed(big), tmp_path)
    assert "at most" in refusal(packed(records | {PROGRAM: bytes(pickles.LONGEST_PICKLE + 1)}), tmp_path)


def test_every_flipped_byte_of_a_tensor_is_noticed(content, tmp_path):
    at = content.index(records_of(content)["archive/data/0"])
    damaged = bytearray(content)
    damaged[at] ^= 1
    assert "damaged" in refusal(bytes(damaged), tmp_path)


def test_cut_files(content, tmp_path):
    for length in (1, 3, 4, 50, len(content) // 2, len(content) - 30, len(content) - 1):
        assert "copy it again" in refusal(content[:length], tmp_path), length
    assert "empty" in refusal(b"", tmp_path)
    with pytest.raises(FileNotFoundError):
        pickles.read(tmp_path / "absent")


def test_older_formats_are_refused(tmp_path):
    for value, message in (
        ({"a": torch.ones(2)}, "a pickle without PyTorch's zip around it"),
        (Call(os.system, "touch x"), f"asks for {os.system.__module__}.system"),
    ):
        file = io.BytesIO()
        torch.save(value, file, _use_new_zipfile_serialization=False)
        assert message in refusal(file.getvalue(), tmp_path)
        archived = io.BytesIO()
        with tarfile.open(fileobj=archived, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for name, part in (("../evil", b"x"), ("storages", b"\x80\x02K\x00."), ("pickle", pickle.dumps(value, 2))):
                entry = tarfile.TarInfo(name)
                entry.size = len(part)
                archive.addfile(entry, io.BytesIO(part))
        expected = message if "asks for" in message else "asks for torch.storage._load_from_bytes"
        assert expected in refusal(archived.getvalue(), tmp_path)


def test_files_of_other_models(tmp_path):
    for value in (torch.nn.Linear(2, 2).state_dict(), OrderedDict(), OrderedDict(hypernet_config="x")):
        file = io.BytesIO()
        torch.save(value, file)
        assert "is not a Doc-to-LoRA checkpoint: it lacks base_model" in refusal(file.getvalue(), tmp_path)
    file = io.BytesIO()
    torch.save(torch.nn.Linear(2, 2), file)
    assert "asks for torch.nn.modules.linear.Linear" in refusal(file.getvalue(), tmp_path)
    assert "not a PyTorch checkpoint" in refusal(save({"x": torch.ones(1)}), tmp_path)


def test_what_was_written_is_read_again_bit_for_bit(content, tmp_path):
    first = pickles.read(io.BytesIO(content))
    second = pickles.read(pickles.write(tmp_path / "again.bin", first))
    assert list(first) == list(second)
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == second[name].dtype and value.numpy().tobytes() == second[name].numpy().tobytes()
    left, right = (vars(each["hypernet_config"]) for each in (first, second))
    assert left.keys() == right.keys() and vars(left["lora_config"]).keys() == vars(right["lora_config"]).keys()
    assert (tmp_path / "again.bin").read_bytes() == content
    apart = OrderedDict(("".join(list(name)), value) for name, value in first.items())  # equal texts, other objects
    apart["hypernet_config"] = first["hypernet_config"]
    for record in (apart["hypernet_config"], apart["hypernet_config"].lora_config):
        for name, value in vars(record).items():
            if type(value) is str:
                setattr(record, name, value[:1] + value[1:])
    assert pickles.write(tmp_path / "apart.bin", apart).read_bytes() == content
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        changed = OrderedDict((k, v.to(dtype) if isinstance(v, torch.Tensor) else v) for k, v in first.items())
        again = pickles.read(pickles.write(tmp_path / "again.bin", changed))
        assert all(torch.equal(v, again[k]) for k, v in changed.items() if isinstance(v, torch.Tensor))


def test_a_set_that_was_filled_in_another_order_is_written_alike(content, tmp_path):
    filled = (({one, other}, {other, one}) for one, other in combinations([f"proj_{i}" for i in range(200)], 2))
    here, there = next((a, b) for a, b in filled if list(a) != list(b))  # by chance of their hashes
    first, written = pickles.read(io.BytesIO(content)), []
    for modules in (here, there):
        first["hypernet_config"].lora_config.target_modules = modules
        written.append(pickles.write(tmp_path / "modules.bin", first).read_bytes())
    assert here == there and written[0] == written[1]
    again = pickles.read(tmp_path / "modules.bin")
    assert again["hypernet_config"].lora_config.target_modules == here


def test_mutated_files(content):
    """Three hundred; `python tests/fuzz_checkpoints.py 10000` runs more of the same."""
    counts, _, grown = fuzz(content, 300, seed=2)
    assert counts.total() == 300 and grown < 200
    outcomes = [sum(n for (_, what), n in counts.items() if what == outcome) for outcome in ("read", "refused")]
    assert min(outcomes) > 5  # neither everything nor nothing is refused
