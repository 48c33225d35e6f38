"""Writes archives like those of torch.save, good and bad, without PyTorch.

`op` and the constants are pickle opcodes written by hand; `pickled` turns a tree into them, and
`zipped` packs entries as torch does (stored, sizes after the bytes).
"""

import struct
import zlib
from argparse import Namespace
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

START, STOP = b"\x80\x02", b"."


class Tensor(NamedTuple):
    """A view of a storage, as in the arguments of `_rebuild_tensor_v2`."""

    key: str
    storage: str
    numel: int
    shape: tuple
    strides: tuple
    offset: int = 0


class Parameter(NamedTuple):
    data: Tensor


class Dtype(NamedTuple):
    name: str


def name(module: str, attribute: str) -> bytes:
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


ORDERED = name("collections", "OrderedDict") + b")R"


def integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def storage(t: Tensor) -> bytes:
    cls = name("torch", t.storage)
    return b"(" + text("storage") + cls + text(t.key) + text("cpu") + integer(t.numel) + b"tQ"


def tensor(t: Tensor) -> bytes:
    shape = b"(" + b"".join(map(op, t.shape)) + b"t"
    strides = b"(" + b"".join(map(op, t.strides)) + b"t"
    arguments = storage(t) + integer(t.offset) + shape + strides + b"\x89" + ORDERED
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def op(value: Any) -> bytes:
    """The opcodes that leave `value` on the stack."""
    match value:
        case Tensor():
            return tensor(value)
        case Parameter(data):
            function = name("torch._utils", "_rebuild_parameter")
            return function + b"(" + tensor(data) + b"\x88" + ORDERED + b"tR"
        case Dtype(attribute):
            return name("torch", attribute)
        case Namespace():
            return name("argparse", "Namespace") + b")\x81" + op(vars(value)) + b"b"
        case dict():
            start = ORDERED if isinstance(value, OrderedDict) else b"}"
            return start + b"(" + b"".join(op(k) + op(v) for k, v in value.items()) + b"u"
        case list():
            return b"](" + b"".join(map(op, value)) + b"e"
        case tuple():
            return b"(" + b"".join(map(op, value)) + b"t"
        case str():
            return text(value)
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return integer(value)
        case float():
            return b"G" + struct.pack(">d", value)
        case None:
            return b"N"
    raise TypeError(type(value))


def pickled(value: Any) -> bytes:
    return START + op(value) + STOP


def zipped(
    entries: list[tuple[str, bytes]],
    *,
    method: int = 0,
    flags: int = 0x0808,
    zip64: bool = False,
    pad: int = 7,
) -> bytes:
    """An archive of these entries, in torch's manner; bit 3 of `flags` puts sizes after the bytes.

    `method` 8 compresses. `pad` bytes of extra field go into each local header.
    """
    out, directory = b"", b""
    for entry_name, content in entries:
        raw, crc = entry_name.encode(), zlib.crc32(content)
        packed = zlib.compress(content, 9, -15) if method == 8 else content
        later = bool(flags & 8)
        sizes = (crc, len(packed), len(content))
        at = len(out)
        out += struct.pack("<IHHHHH", 0x04034B50, 0, flags, method, 0, 0)
        out += struct.pack("<III", *((0, 0, 0) if later else sizes))
        out += struct.pack("<HH", len(raw), pad + 4) + raw + b"FB" + struct.pack("<H", pad)
        out += b"Z" * pad + packed
        if later:
            kind = "<IIQQ" if zip64 else "<IIII"
            out += struct.pack(kind, 0x08074B50, *sizes)
        extra, shown = b"", (*sizes, at)
        if zip64:
            extra = struct.pack("<HHQQQ", 1, 24, len(content), len(packed), at)
            shown = (crc, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
        directory += struct.pack("<IHHHHHH", 0x02014B50, 0, 0, flags, method, 0, 0)
        directory += struct.pack("<III", *shown[:3])
        directory += struct.pack("<HHHHHII", len(raw), len(extra), 0, 0, 0, 0, shown[3])
        directory += raw + extra
    count, start = len(entries), len(out)
    out += directory
    if zip64:
        end64 = len(out)
        numbers = (count, count, len(directory), start)
        out += struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 0, 0, 0, 0, *numbers)
        out += struct.pack("<IIQI", 0x07064B50, 0, end64, 1)
    shown = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF) if zip64 else ()
    shown = shown or (count, count, len(directory), start)
    return out + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, *shown, 0)


def entries(code: bytes, storages: dict[str, bytes] | None = None) -> list[tuple[str, bytes]]:
    """The entries that torch.save writes around a pickle."""
    data = [(f"archive/data/{key}", raw) for key, raw in (storages or {}).items()]
    head = [("archive/data.pkl", code), ("archive/byteorder", b"little")]
    return head + data + [("archive/version", b"3\n")]


def archive(value: Any, storages: dict[str, bytes] | None = None, **options: Any) -> bytes:
    return zipped(entries(pickled(value), storages), **options)


def sample() -> tuple[Any, dict[str, bytes]]:
    """A tree with most of what a released file holds, and its storages."""
    numbers = np.arange(24, dtype="<f4")
    storages = {
        "0": numbers.tobytes(),
        "1": np.array([3, -5], "<i8").tobytes(),
        "2": np.array([0x3F80, 0xC000, 0x3E80], "<u2").tobytes(),  # 1, -2, 0.25 in bfloat16
        "3": b"",
    }
    whole = Tensor("0", "FloatStorage", 24, (2, 3, 4), (12, 4, 1))
    tree = {
        "model": OrderedDict(
            whole=whole,
            turned=whole._replace(shape=(4, 3), strides=(1, 4), offset=12),
            scalar=whole._replace(shape=(), strides=(), offset=5),
            parameter=Parameter(whole._replace(shape=(5,), strides=(2,), offset=3)),
            ids=Tensor("1", "LongStorage", 2, (2,), (1,)),
            half=Tensor("2", "BFloat16Storage", 3, (1, 3), (99, 1)),
            empty=Tensor("3", "FloatStorage", 0, (0, 7), (7, 1)),
        ),
        "args": Namespace(
            lr=1e-4, name="a é", dtype=Dtype("bfloat16"), sizes=[1, 300, -7, 1 << 70]
        ),
        "steps": (5, None, True, False, 2.5),
        7: {"nested": [[(), {}], []]},
    }
    return tree, storages
