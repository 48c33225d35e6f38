"""What tokenizers have in common: protocol, codebooks, training pass, and the spec's hash."""

import hashlib
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fourdstar_jax.tokenizer.quantize import Quantizer, QuantizerStats
from fourdstar_jax.types import TokenizerSpec


@runtime_checkable
class Tokenizer(Protocol):
    """Images to integers and back. Leading axes are free."""

    @property
    def has_blank(self) -> bool:
        """Whether blank patches, and they alone, have the code `quantize.BLANK`."""
        ...

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


class Codebooks(nnx.Module):
    """The part of a tokenizer that its quantizer and sizes decide; families add the rest."""

    name: ClassVar[str]  # the spec's
    has_blank = False
    quantizer: Quantizer
    resolution: int
    num_tokens: int

    def codes(self, tokens: Int[Array, "*b n K"]) -> Float[Array, "*b n D"]:
        """Codebook vectors of the tokens, K unit-length chunks side by side."""
        return self.quantizer.codes(tokens)

    def codebooks(self) -> Float[Array, "K vocab d"]:
        """The unit vectors `codes` looks up."""
        return self.quantizer.normalized()

    @property
    def spec(self) -> TokenizerSpec:
        """Needs concrete parameters (not inside `jax.jit`): it holds their hash."""
        return self.described(weights_sha256(self))

    def described(self, weights_sha256: str) -> TokenizerSpec:
        """The spec, for weights whose hash is known."""
        num_codebooks, vocab_size, width = self.quantizer.codebooks[...].shape
        return TokenizerSpec(
            name=self.name,
            resolution=self.resolution,
            num_tokens=self.num_tokens,
            num_codebooks=num_codebooks,
            vocab_size=vocab_size,
            code_dim=num_codebooks * width,
            weights_sha256=weights_sha256,
        )

    def with_stats(self, stats: QuantizerStats) -> "Codebooks":
        """The same tokenizer with the usage statistics that a training pass returned."""
        return replace_quantizer(self, **stats._asdict())


class Reconstruction(NamedTuple):
    """What a training step of a tokenizer needs."""

    images: Float[Array, "*b h w 3"]  # not clamped to [0, 1]: the loss has a gradient everywhere
    tokens: Int[Array, "*b n K"]
    quantizer_loss: Float[Array, ""]
    perplexity: Float[Array, ""]  # of the codes of this batch, at most vocab_size
    stats: QuantizerStats  # to be kept by the tokenizer's `with_stats`


def replace_quantizer[M: nnx.Module](model: M, **values: Array) -> M:
    """The model with other values of its quantizer's variables, by their names."""
    graphdef, state = nnx.split(model)
    for name, value in values.items():
        variable = state["quantizer"][name]
        state["quantizer"][name] = variable.replace(value)  # pyright: ignore[reportCallIssue]
    return nnx.merge(graphdef, state)


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
