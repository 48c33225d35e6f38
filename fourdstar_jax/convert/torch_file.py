"""Reads files of `torch.save` (the zip format of PyTorch 1.6 and later) without PyTorch.

Such a file is a zip archive of stored entries, `<top>/data.pkl` (a pickle of protocol 2) and
`<top>/data/<key>` (the bytes of one storage each). Files come from anywhere, so nothing of Python's
pickle runs: a small machine of our own knows the few opcodes that torch.save writes and the few
names in `_STORAGES`, `_DTYPES` and `_Machine.reduce`, and it calls nothing. The zip's directory is
read here too, and the archive has to be exactly what torch.save lays out: entries back to back,
local headers that agree with the directory, nothing compressed, nothing before, between or after.

Sources: APPNOTE.TXT 6.3 of the zip format, CPython's `pickletools` for the opcodes,
`torch/serialization.py` and `torch/_utils.py` of PyTorch 2.x for what is written.
"""

import mmap
import os
import stat
import struct
import zlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MAX_ENTRIES = 65_536
MAX_DIRECTORY = 16 << 20  # bytes of the zip's central directory
MAX_PICKLE = 16 << 20  # bytes; a state dict of a thousand tensors takes 0.1 MB
MAX_OPCODES = 300_000  # about 50 a tensor
MAX_NODES = 300_000  # values in the tree, with shared containers counted wherever they appear
MAX_DEPTH = 64  # of containers in containers
MAX_TEXT = 1 << 20  # bytes of one string
MAX_TENSORS = 65_536
MAX_DIMS = 16
MAX_EMPTY = 1 << 40  # product of the other dimensions of a tensor without elements

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_STORAGES = {
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": _BFLOAT16,
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}
_DTYPES = {
    "torch.float64": np.dtype("f8"),
    "torch.float32": np.dtype("f4"),
    "torch.float16": np.dtype("f2"),
    "torch.bfloat16": _BFLOAT16,
    "torch.int64": np.dtype("i8"),
    "torch.int32": np.dtype("i4"),
    "torch.int16": np.dtype("i2"),
    "torch.int8": np.dtype("i1"),
    "torch.uint8": np.dtype("u1"),
    "torch.bool": np.dtype("?"),
}
_ORDERED = "collections.OrderedDict"
_NAMESPACE = "argparse.Namespace"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"


def read(path: str | os.PathLike[str]) -> Any:
    """The tree that was saved: dict, list, tuple, str, int, float, bool, None, and arrays.

    Tensors and parameters are read-only views of one memory map of the file: reading costs address
    space, and tensors that shared a storage share memory. As with any memory map, the file must not
    be shortened while they live. An OrderedDict is a dict (its `_metadata` is dropped), an
    argparse.Namespace is a dict of its attributes, a torch.dtype is a numpy dtype; bfloat16 is
    that of ml_dtypes.

    Raises ValueError, one line that begins with the path, for whatever torch.save of a tree of
    these would not have written, and for files that cannot be opened.
    """
    path = os.fspath(path)
    try:
        data = _map(path)
        entries = _entries(data)
        files = _layout(data, entries)
        value = _Machine(data, files).run(_content(data, files["data.pkl"], MAX_PICKLE))
        return _tree(value)
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened: {error.strerror}") from None


class _Refused(Exception):
    """Why a file is not read, one line without its name."""


def _map(path: str) -> memoryview:
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for a writer
        raise _Refused("not a file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(2)
        if head == b"\x80\x02":
            raise _Refused("written by PyTorch before 1.6: load and save it again with a later one")
        if size > 262 and os.pread(file.fileno(), 5, 257) == b"ustar":
            raise _Refused("a tar file: load it in PyTorch and save it again with torch.save")
        if size < 22 or head != b"PK":
            raise _Refused("not a file of torch.save, which are zip archives, or cut short")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class _Entry(NamedTuple):
    name: str
    crc: int
    size: int
    start: int  # of its bytes in the file


def _entries(data: memoryview) -> list[_Entry]:
    """Every entry of the archive in the order of the file, checked against its local header."""
    count, directory_start, end = _directory(data)
    offset = directory_start
    found: list[tuple[int, int, int, int, bytes]] = []
    names: set[bytes] = set()
    for _ in range(count):
        if offset + 46 > end:
            raise _Refused("the zip directory is cut short")
        (
            signature,
            _,
            _,
            flags,
            method,
            _,
            _,
            crc,
            packed,
            size,
            n,
            extra,
            comment,
            disk,
            _,
            _,
            at,
        ) = struct.unpack_from("<IHHHHHHIIIHHHHHII", data, offset)
        if signature != 0x02014B50:
            raise _Refused("the zip directory is damaged")
        if offset + 46 + n + extra + comment > end:
            raise _Refused("the zip directory is cut short")
        name = bytes(data[offset + 46 : offset + 46 + n])
        fields = bytes(data[offset + 46 + n : offset + 46 + n + extra])
        size, packed, at = _zip64(fields, size, packed, at)
        if flags & ~0x0808:  # what is left: sizes follow the bytes; names are UTF-8
            raise _Refused(f"zip entry {_show(name)} is encrypted or has flags {flags:#x}")
        if method != 0 or packed != size:
            raise _Refused(f"zip entry {_show(name)} is compressed, which torch.save never does")
        if disk not in (0, 0xFFFF) or comment:
            raise _Refused(f"zip entry {_show(name)} is on another disk or has a comment")
        if name in names:
            raise _Refused(f"zip entry {_show(name)} is there twice")
        names.add(name)
        found.append((at, flags, crc, size, name))
        offset += 46 + n + extra + comment
    if offset != end:
        raise _Refused("bytes after the last entry of the zip directory")

    entries, expected = [], 0
    found.sort()
    for i, (at, flags, crc, size, name) in enumerate(found):
        limit = found[i + 1][0] if i + 1 < len(found) else directory_start
        if at != expected or limit > directory_start:
            raise _Refused(f"zip entry {_show(name)} does not follow the one before it")
        start = _local(data, at, limit, flags, crc, size, name)
        _descriptor(data, start + size, limit, flags, crc, size, name)
        entries.append(_Entry(_name(name), crc, size, start))
        expected = limit
    return entries


def _directory(data: memoryview) -> tuple[int, int, int]:
    """Number of entries, first byte and end of the central directory, which ends the file."""
    end = len(data) - 22
    signature, disk, first, here, count, size, offset, comment = struct.unpack_from(
        "<IHHHHIIH", data, end
    )
    if signature != 0x06054B50 or comment:
        raise _Refused("cut short, or with bytes after the zip archive")
    if disk not in (0, 0xFFFF) or first not in (0, 0xFFFF) or here != count:
        raise _Refused("a zip archive of several disks")
    if end >= 76 and data[end - 20 : end - 16] == b"PK\x06\x07":
        end -= 20
        _, disk, at, disks = struct.unpack_from("<IIQI", data, end)
        if disk or disks != 1 or at != end - 56 or data[at : at + 4] != b"PK\x06\x06":
            raise _Refused("the zip64 end of the archive is damaged")
        end = at
        _, length, _, _, disk, first, here64, count64, size64, offset64 = struct.unpack_from(
            "<IQHHIIQQQQ", data, end
        )
        if length != 44 or disk or first or here64 != count64:
            raise _Refused("the zip64 end of the archive is damaged")
        if (
            count not in (count64, 0xFFFF)
            or size not in (size64, 0xFFFFFFFF)
            or offset not in (offset64, 0xFFFFFFFF)
        ):
            raise _Refused("the two ends of the zip archive disagree")
        count, size, offset = count64, size64, offset64
    if count > MAX_ENTRIES or size > MAX_DIRECTORY:
        raise _Refused(f"a zip directory of {count} entries in {size} bytes is too large")
    if offset + size != end:
        raise _Refused("the zip directory is not where the archive says")
    return count, offset, end


def _zip64(fields: bytes, *values: int) -> list[int]:
    """`values` of 32 bits; those that are all ones come from the zip64 extra field (4.5.3)."""
    wanted = sum(value == 0xFFFFFFFF for value in values)
    if not wanted:
        return list(values)
    offset = 0
    while offset + 4 <= len(fields):
        kind, length = struct.unpack_from("<HH", fields, offset)
        if kind == 1 and length >= 8 * wanted and offset + 4 + 8 * wanted <= len(fields):
            large = iter(struct.unpack_from(f"<{wanted}Q", fields, offset + 4))
            return [next(large) if value == 0xFFFFFFFF else value for value in values]
        offset += 4 + length
    raise _Refused("a zip entry lacks its 64-bit sizes")


def _local(
    data: memoryview, at: int, limit: int, flags: int, crc: int, size: int, name: bytes
) -> int:
    """First byte of an entry after its local header, which must agree with the directory."""
    if at + 30 + len(name) > limit:
        raise _Refused(f"zip entry {_show(name)} overlaps the next one")
    signature, _, flags2, method, _, _, crc2, packed, size2, n, extra = struct.unpack_from(
        "<IHHHHHIIIHH", data, at
    )
    start = at + 30 + n + extra
    if signature != 0x04034B50:
        raise _Refused(f"zip entry {_show(name)} has no local header")
    if flags2 != flags or method or bytes(data[at + 30 : at + 30 + n]) != name:
        raise _Refused(f"zip entry {_show(name)}: its local header disagrees with the directory")
    if start + size > limit:
        raise _Refused(f"zip entry {_show(name)} overlaps the next one")
    fields = bytes(data[at + 30 + n : start])
    size2, packed = _zip64(fields, size2, packed)
    later = flags & 8 and not (crc2 or packed or size2)  # they follow the bytes
    if not later and (crc2, packed, size2) != (crc, size, size):
        raise _Refused(f"zip entry {_show(name)}: its local header disagrees with the directory")
    return start


def _descriptor(
    data: memoryview, at: int, limit: int, flags: int, crc: int, size: int, name: bytes
) -> None:
    """Checks what lies between an entry's bytes and the next header (4.3.9): nothing else."""
    rest = bytes(data[at : min(limit, at + 25)])
    allowed = [b""]
    if flags & 8:
        allowed = [b"PK\x07\x08" + struct.pack("<IQQ", crc, size, size)]
        if size < 1 << 32:
            allowed.append(b"PK\x07\x08" + struct.pack("<III", crc, size, size))
    if rest not in allowed:
        raise _Refused(f"zip entry {_show(name)} is not followed by the next one")


def _name(raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _Refused(f"zip entry {_show(raw)} is not UTF-8") from None
    parts = name.split("/")
    if "\\" in name or not name.isprintable() or any(part in ("", ".", "..") for part in parts):
        raise _Refused(f"zip entry {_show(raw)} is no plain path inside the archive")
    return name


def _show(name: bytes | str) -> str:
    """Part of a name from the file, for a message of one line."""
    text = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
    return ascii(text if len(text) <= 60 else text[:60] + "...")


def _layout(data: memoryview, entries: list[_Entry]) -> dict[str, _Entry]:
    """The entries by their name without the top folder, which all share."""
    tops = {entry.name.partition("/")[0] for entry in entries}
    if len(tops) != 1:
        raise _Refused(f"{len(tops)} folders at the top of the archive, where torch.save has one")
    files = {entry.name.partition("/")[2]: entry for entry in entries}
    if "constants.pkl" in files:
        raise _Refused("a TorchScript archive: save its state_dict with torch.save")
    if missing := [name for name in ("data.pkl", "version") if name not in files]:
        raise _Refused(f"the archive has no {missing[0]}")
    version = _content(data, files["version"], 16).strip()
    if not version.isdigit() or not 1 <= int(version) <= 10:
        raise _Refused(f"version {_show(version)} of the format; 1 to 10 are read")
    if "byteorder" in files and _content(data, files["byteorder"], 16) != b"little":
        raise _Refused("written with another byte order than little")
    return files


def _content(data: memoryview, entry: _Entry, limit: int) -> bytes:
    if entry.size > limit:
        raise _Refused(f"{_show(entry.name)} has {entry.size} bytes, more than {limit}")
    content = bytes(data[entry.start : entry.start + entry.size])
    if zlib.crc32(content) != entry.crc:
        raise _Refused(f"{_show(entry.name)} is damaged (its checksum differs)")
    return content


class _Global(NamedTuple):
    name: str


class _Storage(NamedTuple):
    dtype: np.dtype
    start: int  # byte in the file
    numel: int


class _Ordered(dict):
    """An OrderedDict of the file."""


class _Namespace(dict):
    """Attributes of an argparse.Namespace."""


class _Machine:
    """The opcodes of pickle that torch.save writes, on values that are plain or of this file."""

    def __init__(self, data: memoryview, files: dict[str, _Entry]):
        self.bytes = np.frombuffer(data, np.uint8)  # read-only, and keeps the map open
        self.files = files
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}
        self.num_tensors = 0

    def run(self, code: bytes) -> Any:
        if code[:1] != b"\x80" or code[1:2] != b"\x02":
            raise _Refused("its pickle is not of protocol 2, which torch.save writes by default")
        at, count, stack = 2, 0, self.stack

        def take(size: int) -> bytes:
            nonlocal at
            if size > len(code) - at:
                raise _Refused("its pickle is cut short")
            at += size
            return code[at - size : at]

        while True:
            opcode = take(1)
            count += 1
            if count > MAX_OPCODES:
                raise _Refused(f"its pickle has more than {MAX_OPCODES} opcodes")
            match opcode:
                case b"q" | b"r":  # BINPUT, LONG_BINPUT
                    index = int.from_bytes(take(1 if opcode == b"q" else 4), "little")
                    if index > MAX_OPCODES:
                        raise _Refused(f"its pickle has a memo of {index} values")
                    self.memo[index] = self.top()
                case b"h" | b"j":  # BINGET, LONG_BINGET
                    index = int.from_bytes(take(1 if opcode == b"h" else 4), "little")
                    if index not in self.memo:
                        raise _Refused(f"its pickle reads memo {index} before it is written")
                    stack.append(self.memo[index])
                case b"X":  # BINUNICODE
                    length = int.from_bytes(take(4), "little")
                    if length > MAX_TEXT:
                        raise _Refused(f"its pickle has a string of {length} bytes")
                    stack.append(_text(take(length)))
                case b"K":  # BININT1
                    stack.append(take(1)[0])
                case b"M":  # BININT2
                    stack.append(int.from_bytes(take(2), "little"))
                case b"J":  # BININT
                    stack.append(int.from_bytes(take(4), "little", signed=True))
                case b"\x8a":  # LONG1
                    stack.append(int.from_bytes(take(take(1)[0]), "little", signed=True))
                case b"G":  # BINFLOAT
                    stack.append(struct.unpack(">d", take(8))[0])
                case b"N":
                    stack.append(None)
                case b"\x88":  # NEWTRUE
                    stack.append(True)
                case b"\x89":  # NEWFALSE
                    stack.append(False)
                case b"(":  # MARK
                    self.marks.append(len(stack))
                case b")":  # EMPTY_TUPLE
                    stack.append(())
                case b"t":  # TUPLE
                    stack.append(tuple(self.since_mark()))
                case b"\x85" | b"\x86" | b"\x87":  # TUPLE1, TUPLE2, TUPLE3
                    stack.append(tuple(self.pop(opcode[0] - 0x84)))
                case b"]":  # EMPTY_LIST
                    stack.append([])
                case b"}":  # EMPTY_DICT
                    stack.append({})
                case b"a":  # APPEND
                    self.extend(self.pop(1))
                case b"e":  # APPENDS
                    self.extend(self.since_mark())
                case b"s":  # SETITEM
                    self.set_items(self.pop(2))
                case b"u":  # SETITEMS
                    self.set_items(self.since_mark())
                case b"c":  # GLOBAL
                    end = code.find(b"\n", at, at + 128)
                    end2 = code.find(b"\n", end + 1, end + 129) if end >= 0 else -1
                    if end2 < 0:
                        raise _Refused("its pickle names something without an end")
                    name = code[at:end] + b"." + code[end + 1 : end2]
                    at = end2 + 1
                    stack.append(_admit(name))
                case b"Q":  # BINPERSID
                    stack.append(self.storage(self.pop(1)[0]))
                case b"R":  # REDUCE
                    stack.append(self.reduce(*self.pop(2)))
                case b"\x81":  # NEWOBJ
                    cls, arguments = self.pop(2)
                    if type(cls) is not _Global or type(arguments) is not tuple or arguments:
                        raise _Refused("its pickle makes an object other than argparse.Namespace")
                    if cls.name != _NAMESPACE:
                        raise _Refused("its pickle makes an object other than argparse.Namespace")
                    stack.append(_Namespace())
                case b"b":  # BUILD
                    self.build(self.pop(1)[0])
                case b".":  # STOP
                    if len(stack) != 1 or self.marks or at != len(code):
                        raise _Refused("its pickle stops with values or bytes left over")
                    return stack[0]
                case _:
                    raise _Refused(f"its pickle has opcode {opcode!r}, which torch.save never uses")

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise _Refused("its pickle takes a value where there is none")
        return self.stack[-1]

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise _Refused("its pickle takes a value where there is none")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def since_mark(self) -> list[Any]:
        if not self.marks:
            raise _Refused("its pickle takes a mark where there is none")
        height = self.marks.pop()
        values = self.stack[height:]
        del self.stack[height:]
        return values

    def extend(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise _Refused("its pickle appends to something that is no list")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) not in (dict, _Ordered) or len(values) % 2:
            raise _Refused("its pickle sets items of something that is no dict")
        for key in values[::2]:
            # small integers, so that no choice of keys makes a dict slow
            small = isinstance(key, int) and -(1 << 31) <= key < 1 << 31
            if not small and not isinstance(key, str):
                raise _Refused("its pickle has a dict key that is neither text nor a small integer")
        target.update(zip(values[::2], values[1::2], strict=True))

    def build(self, state: Any) -> None:
        target = self.top()
        if type(target) is _Ordered and type(state) is dict and set(state) <= {"_metadata"}:
            return  # versions of modules, which weights do not need
        if type(target) is _Namespace and type(state) is dict:
            if not all(isinstance(key, str) for key in state):
                raise _Refused("its pickle has an argparse.Namespace with attributes without names")
            target.update(state)
            return
        raise _Refused("its pickle sets the state of something other than an argparse.Namespace")

    def storage(self, value: Any) -> _Storage:
        if type(value) is not tuple or len(value) != 5 or type(value[0]) is not str:
            raise _Refused("its pickle has a storage that torch.save would not write")
        kind, cls, key, location, numel = value
        admitted = kind == "storage" and type(cls) is _Global and cls.name in _STORAGES
        if not admitted or type(key) is not str or type(location) is not str:
            raise _Refused("its pickle has a storage that torch.save would not write")
        dtype = _STORAGES[cls.name]
        entry = self.files.get(f"data/{key}")
        if entry is None:
            raise _Refused(f"storage {_show(key)} is not in the archive")
        if type(numel) is not int or numel * dtype.itemsize != entry.size:
            raise _Refused(f"storage {_show(key)} has {entry.size} bytes, which is not its size")
        found = _Storage(dtype, entry.start, numel)
        if self.storages.setdefault(key, found) != found:
            raise _Refused(f"storage {_show(key)} is used as two types")
        return found

    def reduce(self, function: Any, arguments: Any) -> Any:
        if type(function) is not _Global or type(arguments) is not tuple:
            raise _Refused("its pickle calls something that is no function")
        match function.name, arguments:
            case "collections.OrderedDict", ():
                return _Ordered()
            case "torch._utils._rebuild_tensor_v2", (_Storage() as storage, *rest):
                return self.tensor(storage, rest)
            case "torch._utils._rebuild_parameter", (np.ndarray() as array, bool(), hooks):
                if type(hooks) is _Ordered and not hooks:
                    return array
        raise _Refused(f"its pickle calls {function.name} with arguments it does not take")

    def tensor(self, storage: _Storage, arguments: list[Any]) -> np.ndarray:
        """A view of the file, with every element inside the storage."""
        self.num_tensors += 1
        if self.num_tensors > MAX_TENSORS:
            raise _Refused(f"more than {MAX_TENSORS} tensors")
        if len(arguments) == 6 and type(arguments[5]) is dict and not arguments[5]:
            arguments = arguments[:5]
        if len(arguments) != 5:
            raise _Refused("a tensor with arguments that are not read (conjugated or negated)")
        offset, shape, strides, requires_grad, hooks = arguments
        if type(requires_grad) is not bool or type(hooks) is not _Ordered or hooks:
            raise _Refused("a tensor with hooks")
        if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
            raise _Refused("a tensor whose shape and strides do not fit each other")
        if len(shape) > MAX_DIMS:
            raise _Refused(f"a tensor of {len(shape)} dimensions, more than {MAX_DIMS}")
        for number in (offset, *shape, *strides):
            if type(number) is not int or number < 0:
                raise _Refused("a tensor with a negative size, stride or offset, or no integer")
        count, other, last = 1, 1, offset  # of elements; the last one's place in the storage
        for size, stride in zip(shape, strides, strict=True):
            count, other, last = count * size, other * max(size, 1), last + (size - 1) * stride
        if count == 0:
            if other > MAX_EMPTY:
                raise _Refused("an empty tensor with a dimension that is too large")
            return np.ndarray(shape, storage.dtype, self.bytes[:0])
        # torch allows more elements than numbers (stride 0); a small file could then claim any size
        if count > storage.numel or last >= storage.numel:
            raise _Refused(
                f"a tensor of {_count(count)} elements leaves its storage of {storage.numel}"
            )
        itemsize = storage.dtype.itemsize
        # a stride along one element or none is never walked, and may be too large for numpy
        steps = [itemsize * (t if s > 1 else 0) for s, t in zip(shape, strides, strict=True)]
        start = storage.start + itemsize * offset
        return np.ndarray(shape, storage.dtype, self.bytes, start, steps)


def _count(number: int) -> str:
    return str(number) if number < 1 << 62 else "far too many"


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise _Refused("its pickle has a string that is not UTF-8") from None


def _admit(raw: bytes) -> Any:
    """What a global name of the pickle stands for here; nothing is ever imported."""
    name = raw.decode("utf-8", "replace")
    if name in _DTYPES:
        return _DTYPES[name]
    if name in _STORAGES or name in (_ORDERED, _NAMESPACE, _TENSOR, _PARAMETER):
        return _Global(name)
    raise _Refused(f"its pickle wants {_show(name)}, which is not needed for weights")


def _tree(value: Any) -> Any:
    """`value` in plain containers, none of them shared, so that a walk of it comes to an end."""
    left = MAX_NODES

    def plain(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise _Refused(f"more than {MAX_NODES} values")
        if depth > MAX_DEPTH:
            raise _Refused(f"containers nested more than {MAX_DEPTH} deep, or in themselves")
        if isinstance(value, _Global | _Storage):
            raise _Refused("a bare class, function or storage among its values")
        if isinstance(value, dict):
            return {key: plain(item, depth + 1) for key, item in value.items()}
        if type(value) is list:
            return [plain(item, depth + 1) for item in value]
        if type(value) is tuple:
            return tuple(plain(item, depth + 1) for item in value)
        return value

    return plain(value, 0)
