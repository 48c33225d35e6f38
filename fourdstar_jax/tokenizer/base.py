"""What every tokenizer has in common: its spec, which travels with the tokens, and its protocol."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """What the integers of a token file mean. Stored in every token file, checked on reading."""

    name: str
    resolution: int  # height and width of the images, pixels
    num_tokens: int  # n, of one image, row-major
    num_codebooks: int  # K
    vocab_size: int  # of each codebook
    code_dim: int  # D, of a whole code: K times the width of one codebook
    weights_sha256: str  # of all parameters

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TokenizerSpec":
        """Raises ValueError naming the fields that are missing or unknown."""
        names = {field.name for field in dataclasses.fields(cls)}
        if missing := names - set(values):
            raise ValueError(f"tokenizer spec lacks {sorted(missing)}")
        if unknown := set(values) - names:
            raise ValueError(f"tokenizer spec has unknown fields {sorted(unknown)}")
        return cls(**values)

    def check(self, other: "TokenizerSpec") -> None:
        """Raises ValueError naming each field in which `other` differs."""
        differing = [
            f"{field.name} {getattr(self, field.name)!r} != {getattr(other, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
        if differing:
            raise ValueError(f"tokens of another tokenizer: {', '.join(differing)}")


@runtime_checkable
class Tokenizer(Protocol):
    """Images to integers and back. Leading axes are free."""

    @property
    def spec(self) -> TokenizerSpec:
        """Needs concrete parameters (not inside `jax.jit`): it holds their hash."""
        ...

    def described(self, weights_sha256: str) -> TokenizerSpec:
        """The spec, for weights whose hash is known."""
        ...

    def encode(self, images: Float[Array, "*b h w 3"]) -> Int[Array, "*b n K"]:
        """Tokens of images in [0, 1]."""
        ...

    def codes(self, tokens: Int[Array, "*b n K"]) -> Float[Array, "*b n D"]:
        """Codebook vectors of the tokens."""
        ...

    def decode(self, tokens: Int[Array, "*b n K"]) -> Float[Array, "*b h w 3"]:
        """Images in [0, 1]."""
        ...

    def codebooks(self) -> Float[Array, "K vocab d"]:
        """The vectors `codes` looks up."""
        ...


def weights_sha256(model: nnx.Module) -> str:
    """SHA-256 over the names, shapes and float32 bytes of all parameters, in order of name."""
    digest = hashlib.sha256()
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    named = sorted((jax.tree_util.keystr(path), leaf) for path, leaf in leaves)
    for name, leaf in named:
        values = np.asarray(leaf, np.float32)
        digest.update(f"{name}{values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
