"""Files of torch.save: every good one is read as views, every bad one is refused in one line."""

import importlib.util
import json
import resource
import struct
import subprocess
import sys
import zlib
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fourdstar_jax.convert import torch_file

HERE = Path(__file__).parent
MAX_TIME_S = 2.0
MAX_MEMORY = 200 << 20  # bytes above what importing takes


def neighbour(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


a = neighbour("torch_archives")


def write(folder, data):
    path = folder / "file.pth"
    path.write_bytes(data)
    return path


def round_trip(folder, value, storages=None, **options):
    return torch_file.read(write(folder, a.archive(value, storages, **options)))


OPTIONS = [{}, {"zip64": True}, {"flags": 0}, {"pad": 0}, {"flags": 0x0800, "zip64": True}]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_whole_file(tmp_path, options):
    tree, storages = a.sample()
    found = round_trip(tmp_path, tree, storages, **options)
    numbers = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    model = found["model"]
    assert type(found) is dict and type(model) is dict and list(model) == list(tree["model"])
    np.testing.assert_array_equal(model["whole"], numbers)
    np.testing.assert_array_equal(model["turned"], numbers[1].T)
    assert model["scalar"].shape == () and model["scalar"] == 5
    np.testing.assert_array_equal(model["parameter"], [3, 5, 7, 9, 11])
    np.testing.assert_array_equal(model["ids"], np.array([3, -5]))
    assert model["half"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(model["half"].astype(np.float32), [[1, -2, 0.25]])
    assert model["empty"].shape == (0, 7)
    assert found["args"] == {
        "lr": 1e-4,
        "name": "a é",
        "dtype": np.dtype(ml_dtypes.bfloat16),
        "sizes": [1, 300, -7, 1 << 70],
    }
    assert type(found["args"]) is dict
    assert found["steps"] == (5, None, True, False, 2.5)
    assert found[7] == {"nested": [[(), {}], []]}
    for array in model.values():
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
    assert np.shares_memory(model["whole"], model["turned"])
    assert not np.shares_memory(model["whole"], model["ids"])


@pytest.mark.parametrize(
    "storage, dtype",
    [
        *(("DoubleStorage", "f8"), ("FloatStorage", "f4"), ("HalfStorage", "f2")),
        *(("BFloat16Storage", ml_dtypes.bfloat16), ("LongStorage", "i8"), ("IntStorage", "i4")),
        *(("ShortStorage", "i2"), ("CharStorage", "i1"), ("ByteStorage", "u1")),
        ("BoolStorage", "?"),
    ],
)
def test_every_type(tmp_path, storage, dtype):
    values = np.array([1, 0, 1, 1, 0]).astype(dtype)
    tensor = a.Tensor("key", storage, 5, (5,), (1,))
    found = round_trip(tmp_path, tensor, {"key": values.tobytes()})
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


def test_names_of_types(tmp_path):
    names = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    found = round_trip(tmp_path, [a.Dtype(name) for name in names])
    assert found == [np.dtype(name) for name in names]


def test_a_file_written_by_pytorch():
    # PyTorch 2.13, on a little-endian machine:
    #   line = torch.nn.Linear(1, 1, bias=False)
    #   torch.nn.init.constant_(line.weight, 0.25)
    #   shared = torch.arange(6.0)
    #   torch.save({
    #       "model": collections.OrderedDict(
    #           whole=shared, part=shared[1:4], turned=shared.view(2, 3).t()),
    #       "half": torch.tensor([1.5, -2.0, 0.25], dtype=torch.bfloat16),
    #       "scalar": torch.tensor(7), "empty": torch.zeros(0, 3),
    #       "parameter": torch.nn.Parameter(torch.full((2, 3), 0.5)),
    #       "linear": line.state_dict(),
    #       "args": argparse.Namespace(
    #           lr=1e-4, name="run", dtype=torch.bfloat16, sizes=[1, 300, -1, 2**40]),
    #       "dtype": torch.float16, "steps": (3, None, True)}, path)
    found = torch_file.read(HERE / "fixtures" / "real_torch.pth")
    shared = np.arange(6, dtype=np.float32)
    np.testing.assert_array_equal(found["model"]["whole"], shared)
    np.testing.assert_array_equal(found["model"]["part"], shared[1:4])
    np.testing.assert_array_equal(found["model"]["turned"], shared.reshape(2, 3).T)
    assert np.shares_memory(found["model"]["whole"], found["model"]["part"])
    np.testing.assert_array_equal(found["half"].astype(np.float32), [1.5, -2, 0.25])
    assert found["scalar"].shape == () and found["scalar"].dtype == np.int64
    assert found["scalar"] == 7
    assert found["empty"].shape == (0, 3)
    np.testing.assert_array_equal(found["parameter"], np.full((2, 3), 0.5, np.float32))
    assert list(found["linear"]) == ["weight"]  # the module's _metadata is gone
    np.testing.assert_array_equal(found["linear"]["weight"], [[0.25]])
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    assert found["args"] == dict(lr=1e-4, name="run", dtype=bfloat16, sizes=[1, 300, -1, 1 << 40])
    assert found["dtype"] == np.float16 and found["steps"] == (3, None, True)


def test_arrays_outlive_the_call_and_reading_copies_nothing(tmp_path):
    numel = 16 << 20
    tensor = a.Tensor("0", "FloatStorage", numel, (numel,), (1,))
    path = write(tmp_path, a.archive({"x": tensor, "y": tensor}, {"0": bytes(4 * numel)}))
    before = resident()
    found = torch_file.read(path)
    assert resident() - before < 8 << 20
    path.unlink()
    assert found["x"][-1] == 0 and np.shares_memory(found["x"], found["y"])


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def view(shape, strides, offset=0, numel=6, size=24, storage="FloatStorage"):
    tensor = a.Tensor("0", storage, numel, shape, strides, offset)
    return lambda: a.archive([tensor], {"0": bytes(size)})


def code(opcodes, storages=None):
    """An archive whose pickle is these opcodes."""
    return lambda: a.zipped(a.entries(a.START + opcodes + a.STOP, storages))


def packed(entries, **options):
    return lambda: a.zipped(entries, **options)


def changed(old, new, count=1, **options):
    """A good archive with bytes replaced, the first `count` times."""

    def make():
        data = a.archive(*a.sample(), **options)
        assert old in data
        return data.replace(old, new, count)

    return make


def field(signature, offset, value, which=0, width=4, **options):
    """A good archive with one field of a zip header set."""

    def make():
        data, at = bytearray(a.archive(*a.sample(), **options)), -1
        for _ in range(which + 1):
            at = data.index(signature, at + 1)
        data[at + offset : at + offset + width] = value.to_bytes(width, "little")
        return bytes(data)

    return make


def good():
    return a.archive(*a.sample())


def called(module, attribute, *arguments):
    return code(a.name(module, attribute) + a.op(tuple(arguments)) + b"R")


GOOD = a.entries(a.pickled({}))
LOCAL, CENTRAL, END, END64 = b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6"
NAMESPACE = a.name("argparse", "Namespace")
REBUILD = a.name("torch._utils", "_rebuild_tensor_v2")
ARRAY = a.op(a.Tensor("0", "FloatStorage", 6, (6,), (1,)))
SIX = {"0": bytes(24)}
WIDE = b"\x8a\xff" + b"\xff" * 254 + b"\x7f"  # an integer of 2040 bits

# name -> (maker of the file, words of the reason)
HOSTILE = {
    # names
    "os.system": (called("os", "system", "true"), "wants 'os.system'"),
    "posix.system": (called("posix", "system", "true"), "wants"),
    "eval": (called("builtins", "eval", "1"), "wants 'builtins.eval'"),
    "python 2 eval": (called("__builtin__", "eval", "1"), "wants"),
    "getattr": (called("builtins", "getattr", {}, "pop"), "wants 'builtins.getattr'"),
    "torch.load": (called("torch", "load", "x"), "wants 'torch.load'"),
    "dotted": (code(a.name("torch.FloatStorage", "__init__")), "wants"),
    "name over a module's": (code(a.name("collections", "OrderedDict.fromkeys")), "wants"),
    "name with a line": (code(a.name("os\r", "system")), "wants"),
    "name that is long": (code(a.name("x" * 100_000, "y")), "wants 'xxx"),
    "name cut short": (code(b"cos"), "cut short"),
    "stack global": (code(a.text("os") + a.text("system") + b"\x93"), "opcode"),
    "instance": (code(b"(ios\nsystem\n"), "opcode"),
    "object": (code(b"(" + a.ORDERED + b"o"), "opcode"),
    "extension": (code(b"\x82\x01"), "opcode"),
    "persistent by text": (code(b"P1\n"), "opcode"),
    "protocol 4": (lambda: a.zipped(a.entries(b"\x80\x04}.")), "protocol 2"),
    # calls
    "OrderedDict of items": (called("collections", "OrderedDict", [("a", 1)]), "calls"),
    "call of a storage": (called("torch", "FloatStorage", 1 << 40), "calls"),
    "call of a dtype": (called("torch", "float32"), "no function"),
    "call of Namespace": (called("argparse", "Namespace"), "calls"),
    "call without a tuple": (code(a.name("collections", "OrderedDict") + b"]R"), "no function"),
    "call of text": (code(a.text("x") + b")R"), "no function"),
    "call of an array": (code(ARRAY + b")R", SIX), "no function"),
    "tensor of nothing": (called("torch._utils", "_rebuild_tensor_v2"), "calls"),
    "tensor of text": (called("torch._utils", "_rebuild_tensor_v2", "x", 0), "calls"),
    "parameter of a list": (called("torch._utils", "_rebuild_parameter", [], True, {}), "calls"),
    "parameter with hooks": (
        code(a.name("torch._utils", "_rebuild_parameter") + ARRAY + b"\x88}\x87R", SIX),
        "calls",
    ),
    "new OrderedDict": (code(a.name("collections", "OrderedDict") + b")\x81"), "makes an object"),
    "new array": (code(ARRAY + b")\x81", SIX), "makes an object"),
    "new Namespace of more": (code(NAMESPACE + a.op((1,)) + b"\x81"), "makes an object"),
    "state of an array": (code(ARRAY + b"}b", SIX), "sets the state"),
    "state of a dict": (code(b"}}b"), "sets the state"),
    "state of a function": (code(REBUILD + b"}b"), "sets the state"),
    "state of an OrderedDict": (code(a.ORDERED + a.op({"__class__": 1}) + b"b"), "sets the state"),
    "state that is a list": (code(NAMESPACE + b")\x81]b"), "sets the state"),
    "state with slots": (code(NAMESPACE + b")\x81N}\x86b"), "sets the state"),
    "state without names": (code(NAMESPACE + b")\x81" + a.op({1: 2}) + b"b"), "without names"),
    "items of a Namespace": (code(NAMESPACE + b")\x81K\0K\0s"), "no dict"),
    "append to a dict": (code(b"}K\0a"), "no list"),
    "append to an array": (code(ARRAY + b"K\0a", SIX), "no list"),
    "odd items": (code(b"}(K\0u"), "no dict"),
    "key that is a list": (code(b"}]K\0s"), "dict key"),
    "key that is a tuple": (code(b"}" + b")" + b"\x85" * 1000 + b"K\0s"), "dict key"),
    "key that is large": (code(b"}" + WIDE + b"K\0s"), "dict key"),
    "keys that collide": (
        code(b"}(" + b"".join(a.integer(i * ((1 << 61) - 1)) + b"N" for i in range(20_000)) + b"u"),
        "dict key",
    ),
    "bare function": (code(REBUILD), "bare"),
    "bare storage": (code(a.storage(a.Tensor("0", "FloatStorage", 6, (), ())), SIX), "bare"),
    # sizes and nesting of the pickle
    "string of 2^32 bytes": (code(b"X\xff\xff\xff\xff"), "cut short"),
    "string of 8-byte length": (code(b"\x8d" + b"\xff" * 7 + b"\x7f"), "cut short"),
    "bytes of 8-byte length": (code(b"\x8e" + b"\xff" * 7 + b"\x7f"), "cut short"),
    "bytearray": (code(b"\x96" + b"\xff" * 7 + b"\x7f"), "cut short"),
    "string cut short": (code(b"X\xff\xff\0\0"), "cut short"),
    "string that is not text": (code(b"X\1\0\0\0\xff"), "damaged"),
    "integer of 2^31 bytes": (code(b"\x8b\xff\xff\xff\x7f"), "cut short"),
    "integer cut short": (code(b"\x8a\xff1"), "cut short"),
    "integer of decimals": (code(b"I" + b"9" * 100_000 + b"\n"), "cut short"),
    "memo not written": (code(b"h\7"), "before it is written"),
    "memo of nothing": (code(b"q\0"), "no"),
    "memo bomb": (
        code(b"N" + b"".join(b"r" + struct.pack("<I", i) for i in range(600_000))),
        "opcodes",
    ),
    "million nested lists": (code(b"]" * 1_000_000 + b"a" * 999_999), "opcodes"),
    "nested lists": (code(b"]" * 140_000 + b"a" * 139_999), "deep"),
    "nested tuples": (code(b")" + b"\x85" * 290_000), "deep"),
    "nested marks": (code(b"(" * 140_000 + b"t" * 140_000), "deep"),
    "nested dicts": (code(b"}" + b"K\0}" * 70_000 + b"s" * 70_000), "deep"),
    "list in itself": (code(b"]q\0h\0a"), "in themselves"),
    "dict in itself": (code(b"}q\0K\0h\0s"), "in themselves"),
    "billion laughs": (code(b")" + b"q\0h\0\x86" * 40), "more than"),
    "billion laughs in dicts": (code(b"}" + b"q\0}(K\0h\0K\1h\0u" * 40), "left over"),
    "many empty dicts": (code(b"](" + b"}" * 299_990 + b"e"), ""),
    "many dicts": (code(b"](" + b"}K\0Ns" * 200_000 + b"e"), "opcodes"),
    "no value": (code(b""), "left over"),
    "two values": (code(b"NN"), "left over"),
    "mark left": (code(b"N("), "left over"),
    "mark missing": (code(b"Nt"), "no"),
    "under the mark": (code(b"]N(a"), "no"),
    "bytes after the end": (code(b"N.N"), "left over"),
    "no stop": (lambda: a.zipped(a.entries(a.START + b"N")), "cut short"),
    "empty pickle": (lambda: a.zipped(a.entries(b"")), "protocol"),
    "large pickle": (lambda: a.zipped(a.entries(bytes(17 << 20))), "more than"),
    "large strings of text": (
        code(b"](" + (b"X\0\0\x0f\0" + b"x" * (0xF0000 - 4) + b"\xf0\x9f\x98\x80") * 16 + b"e"),
        "",
    ),
    # storages and tensors
    "storage with too few bytes": (view((6,), (1,), size=20), "not its size"),
    "storage with too many bytes": (view((6,), (1,), size=28), "not its size"),
    "storage of another type": (view((6,), (1,), storage="DoubleStorage"), "not its size"),
    "storage of 2^62": (view((6,), (1,), numel=1 << 62), "not its size"),
    "storage of -1": (view((6,), (1,), numel=-1), "not its size"),
    "storage that is not there": (code(ARRAY), "not in the archive"),
    "storage outside the folder": (
        code(a.op(a.Tensor("../../x", "FloatStorage", 6, (6,), (1,))), SIX),
        "not in the archive",
    ),
    "storage of two types": (
        code(b"](" + ARRAY + a.op(a.Tensor("0", "IntStorage", 6, (6,), (1,))) + b"e", SIX),
        "two types",
    ),
    "storage id that is text": (code(a.text("0") + b"Q"), "storage"),
    "storage id of odd parts": (code(a.op(("storage", 1, "0", "cpu", 6)) + b"Q"), "storage"),
    "2^40 elements": (view((1 << 40,), (1,)), "leaves its storage"),
    "2^40 elements by stride 0": (view((1 << 40,), (0,)), "leaves its storage"),
    "stride 0 past the storage": (view((7,), (0,)), "leaves its storage"),
    "2^80 elements": (view((1 << 40, 1 << 40), (0, 0)), "leaves its storage"),
    "elements of a product 2^64": (view((1 << 32, 1 << 32), (1, 1)), "leaves its storage"),
    "stride past the storage": (view((2,), (6,)), "leaves its storage"),
    "stride of 2^62": (view((2,), (1 << 62,)), "leaves its storage"),
    "stride of 2^64": (view((2,), (1 << 64,)), "leaves its storage"),
    "offset past the storage": (view((1,), (1,), 6), "leaves its storage"),
    "scalar past the storage": (view((), (), 6), "leaves its storage"),
    "offset of 2^63": (view((1,), (1,), 1 << 63), "leaves its storage"),
    "negative offset": (view((1,), (1,), -1), "negative"),
    "negative stride": (view((2,), (-1,), 3), "negative"),
    "negative size": (view((-1,), (1,)), "negative"),
    "two negative sizes": (view((-1, -1), (1, 1)), "negative"),
    "size that is a bool": (view((True,), (1,)), "no integer"),
    "size that is a float": (view((1.0,), (1,)), "no integer"),
    "huge empty": (view((0, 1 << 61), (1, 1)), "too large"),
    "shape longer than strides": (view((1, 6), (1,)), "do not fit"),
    "many dimensions": (view((1,) * 65, (1,) * 65), "dimensions"),
    "wide numbers": (
        code(
            REBUILD + b"(" + a.storage(a.Tensor("0", "FloatStorage", 6, (), ())) + b"K\0"
            + (b"(" + WIDE * 16 + b"t") * 2 + b"\x89" + a.ORDERED + b"tR",
            SIX,
        ),
        "leaves its storage",
    ),
    "many tensors": (
        code(
            b"](" + REBUILD + b"q\0("
            + a.storage(a.Tensor("0", "FloatStorage", 6, (), ()))
            + b"K\0))\x89" + a.ORDERED + b"tq\1R" + b"h\0h\1R" * 70_000 + b"e",
            SIX,
        ),
        "tensors",
    ),
    # the archive
    "deflated bomb": (
        packed([("a/data.pkl", bytes(64 << 20)), ("a/version", b"3")], method=8), "compressed"
    ),
    "deflated": (lambda: a.archive(*a.sample(), method=8), "compressed"),
    "encrypted": (lambda: a.archive(*a.sample(), flags=1), "encrypted"),
    "strongly encrypted": (lambda: a.archive(*a.sample(), flags=0x40), "encrypted"),
    "absolute path": (packed([("/etc/passwd", b""), *GOOD]), "2 folders"),
    "backslashes": (packed([("archive\\..\\x", b""), *GOOD]), "2 folders"),
    "name of nothing": (packed([("", b""), *GOOD]), "2 folders"),
    "name that is not UTF-8": (changed(b"archive/version", b"archive/v\xffrsion", 2), "damaged"),
    "twice": (packed([*GOOD, ("archive/data.pkl", a.pickled([]))]), "twice"),
    "two folders": (packed([*GOOD, ("other/data.pkl", b"")]), "2 folders"),
    "no folder": (packed([("data.pkl", a.pickled({}))]), "no data.pkl"),
    "no data.pkl": (packed(GOOD[1:]), "no data.pkl"),
    "no version": (packed(GOOD[:-1]), "no version"),
    "no entry": (packed([]), "0 folders"),
    "version of words": (packed([*GOOD[:-1], ("archive/version", b"three")]), "version"),
    "version of digits": (packed([*GOOD[:-1], ("archive/version", b"9" * 9999)]), "more than"),
    "version 11": (packed([*GOOD[:-1], ("archive/version", b"11")]), "version"),
    "big endian": (packed([GOOD[0], ("archive/byteorder", b"big"), GOOD[-1]]), "byte order"),
    "TorchScript": (packed([*GOOD, ("archive/constants.pkl", b"")]), "TorchScript"),
    "damaged pickle": (changed(b"whole", b"whale"), "damaged"),
    "other name in the local header": (changed(b"archive/version", b"archive/Version"), "disagree"),
    "long extra in the local header": (field(LOCAL, 28, 65535, width=2), "overlaps"),
    "disagree": (field(LOCAL, 0, 0, which=1), "disagree"),
    "overlap by offset": (field(CENTRAL, 42, 0, which=1), "disagree"),
    "gap by offset": (field(CENTRAL, 42, 1), "where the archive says"),
    "overlap by size": (lambda: both_sizes(10**6), "overlaps"),
    "size of 4 GB": (lambda: both_sizes(0xFFFFFFFE), "overlaps"),
    "size in a missing zip64 field": (lambda: both_sizes(0xFFFFFFFF), "overlaps"),
    "offset beyond the file": (field(CENTRAL, 42, 0x7FFFFFFF, which=6), "overlaps"),
    "directory of 4 GB": (field(END, 12, 0xFFFFFFFF), "damaged"),
    "directory elsewhere": (field(END, 16, 10), "where the archive says"),
    "directory of 2^60 entries": (
        lambda: big_directory(1 << 60, 1 << 10), "damaged"
    ),
    "directory of 2^60 bytes": (lambda: big_directory(3, 1 << 60), "damaged"),
    "many entries": (
        packed([(f"archive/data/{i}", b"") for i in range(3000)] + GOOD[:-1]), "no version"
    ),
    "zip64 of another count": (
        changed(struct.pack("<HHII", *[0xFFFF] * 2, *[0xFFFFFFFF] * 2), bytes(12), zip64=True),
        "where the archive says",
    ),
    "directory of 4 MB": (lambda: long_directory(b"", 4 << 20), "too large"),
    "long extra fields": (lambda: long_directory(bytes(65_532), 2_000_000), "twice"),
    "entries without a name": (lambda: long_directory(b"", 2_000_000), "twice"),
    "two names of one place": (lambda: two_names(1, 1), "overlaps"),
    "names that changed places": (lambda: two_names(2, 1), "disagree"),
    "comment": (lambda: good()[:-2] + b"\1\0x", "after the zip"),
    "bytes in front": (lambda: b"PK" + good(), "where the archive says"),
    "bytes behind": (lambda: good() + b"\0" * 50, "after the zip"),
    # other files
    "empty": (lambda: b"", "not a file of torch.save"),
    "text": (lambda: b"hello" * 100, "not a file of torch.save"),
    "before 1.6": (lambda: b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "before 1.6"),
    "tar": (lambda: b"sys_info".ljust(257, b"\0") + b"ustar\x0000" + bytes(248), "a tar file"),
    "only an end": (lambda: END + bytes(18), "0 folders"),
}  # fmt: skip
ADMITTED = {"many empty dicts", "large strings of text"}  # large, but good
# Slow under the checks of types that the test run adds to every call: in their own process only.
LARGE = ADMITTED | {
    *("nested lists", "nested tuples", "nested dicts", "nested marks", "million nested lists"),
    *("memo bomb", "many dicts", "billion laughs", "many tensors"),
}


# Archives that torch.save would not write, and that read as if it had: name -> (file, tree)
ODD = {
    # A memo is a dict here, so that an index far away costs nothing.
    "memo of a far index": (code(b"Nr\xff\xff\xff\xff"), None),
    # Nothing is ever written under the name of an entry: entries are looked up by the names that
    # the pickle has in its storages, letter by letter, and all others are left alone.
    "parent path": (packed([("archive/../../x", b""), *GOOD]), {}),
    "dot": (packed([("archive/./data/0", b""), *GOOD]), {}),
    "folder": (packed([("archive/data/", b""), *GOOD]), {}),
    "line in a name": (packed([("archive/x\ny", b""), *GOOD]), {}),
    "zero in a name": (packed([("archive/version\0", b"99"), *GOOD]), {}),
    "another name in an extra field": (lambda: renamed(b"archive/data/1", b"archive/data/0"), ...),
    # Place and size of an entry come from the directory alone, as in torch's own reader; the copy
    # in the local header serves those who read the archive as a stream.
    "other size in the local header": (field(LOCAL, 22, 5, flags=0), ...),
    "other checksum in the local header": (field(LOCAL, 14, 5, flags=0), ...),
    "other method in the local header": (field(LOCAL, 8, 8, width=2), ...),
    "other flags in the local header": (field(LOCAL, 6, 9, width=2), ...),
    "descriptor of another size": (field(b"PK\7\x08", 8, 1), ...),
    # Bytes that belong to no entry are never looked at.
    "bytes in between": (lambda: gap(), ...),
    # The directory has as many entries as its bytes hold; no other disk is ever opened.
    "directory of 65535 entries": (field(END, 8, 0xFFFFFFFF), ...),
    "directory of few entries": (field(END, 8, 0x00010001), ...),
    "zip64 of another length": (field(END64, 4, 45, width=8, zip64=True), ...),
    "several disks": (field(END, 4, 1, width=2), ...),
}  # fmt: skip


def both_sizes(size):
    data = bytearray(good())
    at = data.index(CENTRAL)
    data[at + 20 : at + 28] = struct.pack("<II", size, size)
    return bytes(data)


def big_directory(count, size):
    data = bytearray(a.archive(*a.sample(), zip64=True))
    at = data.rindex(END64)
    data[at + 24 : at + 48] = struct.pack("<QQQ", count, count, size)
    return bytes(data)


def long_directory(extra, size):
    """An archive with a directory of about `size` bytes, all of them entries without a name."""
    entry = CENTRAL + bytes(26) + struct.pack("<H", len(extra)) + bytes(14) + extra
    directory = entry * (size // len(entry))
    end = struct.pack("<HHHHIIH", 0, 0, 0, 0, len(directory), 30, 0)
    return LOCAL + bytes(26) + directory + END + end


def two_names(first, second):
    """A good archive whose storages 1 and 2 lie where these two lie."""
    data = bytearray(good())
    places = {}
    for key in (1, 2):
        at = data.rindex(f"archive/data/{key}".encode())  # in the directory
        places[key] = at - 4, bytes(data[at - 4 : at])
    for key, other in ((1, first), (2, second)):
        at, _ = places[key]
        data[at : at + 4] = places[other][1]
    return bytes(data)


def renamed(old, new):
    """A good archive where an extra field of one entry holds another name (Unicode path)."""
    data = good()
    at = data.rindex(old)
    extra = struct.pack("<HHBI", 0x7075, 5 + len(new), 1, zlib.crc32(old)) + new
    head = data[: at - 16] + struct.pack("<H", len(extra)) + data[at - 14 : at + len(old)]
    tail, end = data[at + len(old) :], len(data) - 22
    size = struct.unpack_from("<I", data, end + 12)[0] + len(extra)
    out = head + extra + tail
    return out[:-10] + struct.pack("<I", size) + out[-6:]


def gap():
    """Three bytes after the last entry, before the directory that knows of them."""
    data = bytearray(good())
    at = data.index(CENTRAL)
    end = data.rindex(END)
    data[end + 16 : end + 20] = struct.pack("<I", at + 3)
    return bytes(data[:at] + b"xyz" + data[at:])


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in LARGE])
def test_hostile_files_are_refused_in_one_line(tmp_path, name):
    make, reason = HOSTILE[name]
    path = write(tmp_path, make())
    with pytest.raises(ValueError) as caught:
        torch_file.read(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line and len(line) < len(str(path)) + 200
    assert reason in line, line


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_read_like_others(tmp_path, name):
    make, tree = ODD[name]
    found = repr(torch_file.read(write(tmp_path, make())))  # the next file takes this one's place
    assert found == repr(round_trip(tmp_path, *a.sample()) if tree is ... else tree)


def test_hostile_files_cost_little(tmp_path):
    """In a process of their own: processor time of each, and the peak of memory over all."""
    names = list(HOSTILE)
    for i, name in enumerate(names):
        (tmp_path / f"{i}.pth").write_bytes(HOSTILE[name][0]())
    script = """
import json, pathlib, re, sys, time
from fourdstar_jax.convert import torch_file

def peak():  # of this process; getrusage would begin with that of the one that started it
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024

out = []
for i in range(int(sys.argv[2])):
    before, start, reason = peak(), time.process_time(), None
    try:
        torch_file.read(f"{sys.argv[1]}/{i}.pth")
    except ValueError as error:
        reason = str(error)
    if i == 0:
        base = before
    out.append((reason, time.process_time() - start, peak() - base))
print(json.dumps(out))
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(len(names))],
        capture_output=True,
        text=True,
        cwd=HERE.parent.parent,
    )
    assert result.returncode == 0, result.stderr
    out = json.loads(result.stdout)
    assert len(out) == len(names)
    assert max(peak for _, _, peak in out) > 32 << 20  # long strings: what is measured is real
    for name, (reason, time_s, peak) in zip(names, out, strict=True):
        assert (reason is None) == (name in ADMITTED), name
        assert HOSTILE[name][1] in (reason or ""), (name, reason)
        assert time_s < MAX_TIME_S, (name, time_s)
        assert peak < MAX_MEMORY, (name, peak >> 20)


@pytest.mark.parametrize("options", [{}, {"zip64": True}])
def test_a_file_cut_anywhere_is_refused(tmp_path, options):
    data = a.archive(*a.sample(), **options)
    for length in range(0, len(data), 7):
        path = write(tmp_path, data[:length])
        with pytest.raises(ValueError) as caught:
            torch_file.read(path)
        assert str(caught.value).startswith(f"{path}: "), length
        path.unlink()


def test_nothing_is_imported_or_run(tmp_path):
    marker = tmp_path / "ran"
    path = write(tmp_path, called("os", "system", f"touch {marker}")())
    with pytest.raises(ValueError, match="os.system"):
        torch_file.read(path)
    assert not marker.exists()
    assert "torch" not in sys.modules


def test_what_is_not_a_file(tmp_path):
    for path in (tmp_path, tmp_path / "missing.pth"):
        with pytest.raises(ValueError) as caught:
            torch_file.read(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_namespace_and_ordered_dict_of_nothing(tmp_path):
    assert round_trip(tmp_path, [Namespace(), OrderedDict()]) == [{}, {}]


def test_fuzz():
    outcomes, failures = neighbour("torch_file_fuzz").run(2000, seed=0)
    assert failures == []
    assert outcomes["returned"] > 20 and outcomes["refused"] > 1000, outcomes
    assert outcomes.total() == 2000
