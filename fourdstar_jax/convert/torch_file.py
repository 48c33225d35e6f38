"""Reads files of `torch.save` (the zip format of PyTorch 1.6 and later) without PyTorch.

Such a file is a zip archive of stored entries, `<top>/data.pkl` (a pickle of protocol 2) and
`<top>/data/<key>` (the bytes of one storage each). Files come from anywhere, so nothing is ever
unpickled: `pickletools` tells the opcodes apart, and a small machine of our own follows those that
torch.save writes with the few names in `_TYPES` and `_FUNCTIONS`, which it never imports or calls.
`zipfile` reads the archive's directory; that entries lie apart and inside the file, and tensors
inside their entries, is checked here.

Sources: APPNOTE.TXT 6.3 of the zip format, CPython's `pickletools` for the opcodes,
`torch/serialization.py` and `torch/_utils.py` of PyTorch 2.x for what is written.
"""

import io
import mmap
import os
import pickletools
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MAX_DIRECTORY = 2 << 20  # bytes; an entry of the zip takes about 100
MAX_PICKLE = 16 << 20  # bytes; a state dict of a thousand tensors takes 0.1 MB
MAX_OPCODES = 300_000  # about 50 a tensor
MAX_NODES = 300_000  # values in the tree, with shared containers counted wherever they appear
MAX_DEPTH = 64  # of containers in containers
MAX_TENSORS = 65_536
MAX_DIMS = 16
MAX_EMPTY = 1 << 40  # product of the other dimensions of a tensor without elements

# (class of storages, dtype) of torch: the numbers as they lie in the file
_TYPES = {
    ("DoubleStorage", "float64"): np.dtype("<f8"),
    ("FloatStorage", "float32"): np.dtype("<f4"),
    ("HalfStorage", "float16"): np.dtype("<f2"),
    ("BFloat16Storage", "bfloat16"): np.dtype(ml_dtypes.bfloat16),
    ("LongStorage", "int64"): np.dtype("<i8"),
    ("IntStorage", "int32"): np.dtype("<i4"),
    ("ShortStorage", "int16"): np.dtype("<i2"),
    ("CharStorage", "int8"): np.dtype("i1"),
    ("ByteStorage", "uint8"): np.dtype("u1"),
    ("BoolStorage", "bool"): np.dtype("?"),
}
# Names as pickletools gives them: module, space, name. Each has one space, so none is ambiguous.
_STORAGES = {f"torch {storage}": dtype for (storage, _), dtype in _TYPES.items()}
_DTYPES = {f"torch {name}": dtype for (_, name), dtype in _TYPES.items()}
_ORDERED = "collections OrderedDict"
_NAMESPACE = "argparse Namespace"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_FUNCTIONS = (_ORDERED, _NAMESPACE, _TENSOR, _PARAMETER)


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
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for a writer
            raise _Refused("not a file")
        with _File(path) as file:
            archive = _Archive(file)
        value = _Machine(archive).run(archive.content("data.pkl", MAX_PICKLE))
        return _tree(value)
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened: {error.strerror}") from None


class _Refused(Exception):
    """A reason not to read a file, one line without its name."""


class _File(io.FileIO):
    """A file for `zipfile`, which reads a directory of any size whole."""

    def read(self, size: int | None = -1, /) -> bytes:
        bounded = size is not None and 0 <= size <= MAX_DIRECTORY
        data = super().read(size if bounded else MAX_DIRECTORY + 1)
        if len(data) > MAX_DIRECTORY:
            raise _Refused(f"a zip directory of more than {MAX_DIRECTORY} bytes is too large")
        return data


class _Archive:
    """A zip archive as torch.save lays it out: stored entries apart from each other, one folder."""

    def __init__(self, file: _File):
        head = file.read(262)
        if head[:2] == b"\x80\x02":
            raise _Refused("written by PyTorch before 1.6: load and save it again with a later one")
        if head[257:] == b"ustar":
            raise _Refused("a tar file: load it in PyTorch and save it again with torch.save")
        if len(head) < 22 or head[:2] != b"PK":
            raise _Refused("not a file of torch.save, which are zip archives, or cut short")
        self.data = data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # The directory's end must be the file's, or readers could differ about which one counts.
        signature, at, comment = struct.unpack_from("<I12xIH", data, len(data) - 22)
        if signature != 0x06054B50 or comment:
            raise _Refused("cut short, or with bytes after the zip archive")
        try:
            archive = zipfile.ZipFile(file)
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            OSError,
            ValueError,
            OverflowError,
            Warning,
        ):
            raise _Refused("the zip directory is damaged") from None
        found = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        if at not in (archive.start_dir, 0xFFFFFFFF) or (found and found[0].header_offset != 0):
            raise _Refused("the zip directory is not where the archive says")
        # orig_filename: zipfile takes `filename` from other fields too, and cuts it at a zero
        tops = {entry.orig_filename.partition("/")[0] for entry in found}
        if len(tops) != 1:
            raise _Refused(
                f"{len(tops)} folders at the top of the archive, where torch.save has one"
            )
        self.entries: dict[str, tuple[zipfile.ZipInfo, int]] = {}  # and where the next one begins
        ends = [*(entry.header_offset for entry in found[1:]), archive.start_dir]
        for entry, end in zip(found, ends, strict=True):
            shown, name = _show(entry.orig_filename), entry.orig_filename.partition("/")[2]
            if entry.flag_bits & ~0x0808:  # what is left: sizes follow the bytes; names are UTF-8
                raise _Refused(f"zip entry {shown} is encrypted or has flags {entry.flag_bits:#x}")
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise _Refused(f"zip entry {shown} is compressed, which torch.save never does")
            if name in self.entries:
                raise _Refused(f"zip entry {shown} is there twice")
            self.entries[name] = entry, min(end, archive.start_dir)
        self._check_format()

    def _check_format(self) -> None:
        if "constants.pkl" in self.entries:
            raise _Refused("a TorchScript archive: save its state_dict with torch.save")
        if missing := [name for name in ("data.pkl", "version") if name not in self.entries]:
            raise _Refused(f"the archive has no {missing[0]}")
        version = self.content("version", 16).decode("ascii", "replace").strip()
        if not version.isdigit() or not 1 <= int(version) <= 10:
            raise _Refused(f"version {_show(version)} of the format; 1 to 10 are read")
        if "byteorder" in self.entries and self.content("byteorder", 16) != b"little":
            raise _Refused("written with another byte order than little")

    def span(self, name: str) -> tuple[int, int]:
        """First byte and size of an entry's content, which nothing else in the archive shares."""
        entry, end = self.entries[name]
        at, shown = entry.header_offset, _show(entry.orig_filename)
        raw = entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
        if at + 30 + len(raw) > end:
            raise _Refused(f"zip entry {shown} overlaps the next one")
        signature, length, extra = struct.unpack_from("<I22xHH", self.data, at)
        if signature != 0x04034B50 or self.data[at + 30 : at + 30 + length] != raw:
            raise _Refused(f"zip entry {shown}: its local header disagrees with the directory")
        start = at + 30 + length + extra
        if start + entry.file_size > end:
            raise _Refused(f"zip entry {shown} overlaps the next one")
        return start, entry.file_size

    def content(self, name: str, limit: int) -> bytes:
        """The bytes of a small entry."""
        entry, _ = self.entries[name]
        start, size = self.span(name)
        if size > limit:
            raise _Refused(f"{_show(entry.orig_filename)} has {size} bytes, more than {limit}")
        content = self.data[start : start + size]
        if zlib.crc32(content) != entry.CRC:
            raise _Refused(f"{_show(entry.orig_filename)} is damaged (its checksum differs)")
        return content


def _show(text: str) -> str:
    """Part of a text that the file decides, for a message of one line."""
    return ascii(text if len(text) <= 60 else text[:60] + "...")


def _opcodes(code: bytes) -> Iterator[tuple[str, Any]]:
    """Name and argument of every opcode of a pickle, to its end."""
    file = io.BytesIO(code)
    if file.read(2) != b"\x80\x02":
        raise _Refused("its pickle is not of protocol 2, which torch.save writes by default")
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count == MAX_OPCODES:
                raise _Refused(f"its pickle has more than {MAX_OPCODES} opcodes")
            yield opcode.name, argument
    except (ValueError, Warning):  # of escapes in text, where Python makes warnings errors
        raise _Refused("its pickle is cut short or damaged") from None
    if file.tell() != len(code):
        raise _Refused("its pickle stops with bytes left over")


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

    def __init__(self, archive: _Archive):
        self.archive = archive
        self.bytes = np.frombuffer(archive.data, np.uint8)  # read-only, and keeps the map open
        self.stack: list[Any] = []  # since the last mark
        self.below: list[list[Any]] = []  # what was on the stack at each mark
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}
        self.num_tensors = 0

    def run(self, code: bytes) -> Any:
        for name, argument in _opcodes(code):
            match name:
                case "BINPUT" | "LONG_BINPUT":
                    self.memo[argument] = self.top()
                case "BINGET" | "LONG_BINGET":
                    if argument not in self.memo:
                        raise _Refused(f"its pickle reads memo {argument} before it is written")
                    self.stack.append(self.memo[argument])
                case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                    self.stack.append(argument)
                case "MARK":
                    self.below.append(self.stack)
                    self.stack = []
                case "TUPLE":
                    values = tuple(self.since_mark())
                    self.stack.append(values)
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    self.stack.append(tuple(self.pop(int(name[-1]))))
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
                case "EMPTY_TUPLE":
                    self.stack.append(())
                case "EMPTY_LIST":
                    self.stack.append([])
                case "EMPTY_DICT":
                    self.stack.append({})
                case "APPEND":
                    self.extend(self.pop(1))
                case "APPENDS":
                    self.extend(self.since_mark())
                case "SETITEM":
                    self.set_items(self.pop(2))
                case "SETITEMS":
                    self.set_items(self.since_mark())
                case "GLOBAL":
                    self.stack.append(_admit(argument))
                case "BINPERSID":
                    self.stack.append(self.storage(self.pop(1)[0]))
                case "REDUCE":
                    self.stack.append(self.reduce(*self.pop(2)))
                case "NEWOBJ":
                    cls, arguments = self.pop(2)
                    named = type(cls) is _Global and cls.name == _NAMESPACE
                    if not named or type(arguments) is not tuple or arguments:
                        raise _Refused("its pickle makes an object other than argparse.Namespace")
                    self.stack.append(_Namespace())
                case "BUILD":
                    self.build(self.pop(1)[0])
                case "STOP":
                    if len(self.stack) != 1 or self.below:
                        raise _Refused("its pickle stops with values left over")
                case _:
                    raise _Refused(f"its pickle has opcode {name}, which torch.save never uses")
        return self.stack[0]

    def top(self) -> Any:
        if not self.stack:
            raise _Refused("its pickle takes a value where there is none")
        return self.stack[-1]

    def pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise _Refused("its pickle takes a value where there is none")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def since_mark(self) -> list[Any]:
        if not self.below:
            raise _Refused("its pickle takes a mark where there is none")
        values, self.stack = self.stack, self.below.pop()
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
        if f"data/{key}" not in self.archive.entries:
            raise _Refused(f"storage {_show(key)} is not in the archive")
        start, size = self.archive.span(f"data/{key}")
        if type(numel) is not int or numel * dtype.itemsize != size:
            raise _Refused(f"storage {_show(key)} has {size} bytes, which is not its size")
        found = _Storage(dtype, start, numel)
        if self.storages.setdefault(key, found) != found:
            raise _Refused(f"storage {_show(key)} is used as two types")
        return found

    def reduce(self, function: Any, arguments: Any) -> Any:
        if type(function) is not _Global or type(arguments) is not tuple:
            raise _Refused("its pickle calls something that is no function")
        match function.name, arguments:
            case "collections OrderedDict", ():
                return _Ordered()
            case "torch._utils _rebuild_tensor_v2", (_Storage() as storage, *rest):
                return self.tensor(storage, rest)
            case "torch._utils _rebuild_parameter", (np.ndarray() as array, bool(), hooks):
                if type(hooks) is _Ordered and not hooks:
                    return array
        raise _Refused(f"its pickle calls {_dotted(function.name)} with arguments it does not take")

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


def _dotted(name: str) -> str:
    return name.replace(" ", ".", 1)


def _admit(name: str) -> Any:
    """Our stand-in for a global name of the pickle; nothing is ever imported."""
    if name in _DTYPES:
        return _DTYPES[name]
    if name in _STORAGES or name in _FUNCTIONS:
        return _Global(name)
    raise _Refused(f"its pickle wants {_show(_dotted(name))}, which is not needed for weights")


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
