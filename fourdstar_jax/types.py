"""The few things that travel everywhere: Gaussians, Cameras, Rendered, and a TokenizerSpec."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from fourdstar_jax.outside import SHA256, Fields

Array = jax.Array | np.ndarray  # what functions on host or device arrays take


class Gaussians(NamedTuple):
    """3D Gaussians after activation, in the world frame (x right, y up, z towards azimuth 0).

    Leading axes are free: `[G, ...]` is one static object, `[T, G, ...]` one that moves, where
    Gaussian g of timestep t and Gaussian g of timestep t + 1 are the same one.
    """

    means: Float[Array, "*b G 3"]  # centres, scene units
    quats: Float[Array, "*b G 4"]  # rotation, wxyz; normalised where used
    scales: Float[Array, "*b G 3"]  # standard deviations, scene units
    opacities: Float[Array, "*b G"]  # [0, 1]
    colors: Float[Array, "*b G 3"]  # RGB, [0, 1]


class Cameras(NamedTuple):
    """Pinhole cameras. Leading axes are free."""

    viewmats: Float[Array, "*b V 4 4"]  # world to camera, OpenCV axes (x right, y down, +z forward)
    Ks: Float[Array, "*b V 3 3"]  # intrinsics in pixels; pixel centres lie at +0.5


class Rendered(NamedTuple):
    """What `rasterize` returns."""

    renders: Float[Array, "*b V h w 3"]  # colour over the background, [0, 1]
    alphas: Float[Array, "*b V h w 1"]  # 1 - transmittance
    depths: Float[Array, "*b V h w 1"] | None  # expected camera z of what is hit, else 0
    features: Float[Array, "*b V h w F"] | None  # alpha-blended extra channels, no background
    num_intersections: Int[Array, ""]  # (Gaussian, tile) pairs over the whole call
    overflow: Bool[Array, ""]  # pairs exceeded the capacity: the images are not to be used


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
    def from_dict(cls, values: dict[str, Any], where: str = "tokenizer spec") -> "TokenizerSpec":
        """The inverse of `to_dict`. Raises ValueError for a field that is missing or not right.

        `where` names the file in it.
        """
        fields = Fields(values, where)
        fields.only(field.name for field in dataclasses.fields(cls))
        return cls(
            name=fields.text("name"),
            resolution=fields.integer("resolution", 1, 4096),
            num_tokens=fields.integer("num_tokens", 1, 1 << 18),
            num_codebooks=fields.integer("num_codebooks", 1, 1024),
            vocab_size=fields.integer("vocab_size", 1, 1 << 20),
            code_dim=fields.integer("code_dim", 1, 1 << 16),
            weights_sha256=fields.text("weights_sha256", pattern=SHA256),
        )

    def check(self, other: "TokenizerSpec") -> None:
        """Raises ValueError naming each field in which `other` differs."""
        differing = [
            f"{field.name} {getattr(self, field.name)!r} != {getattr(other, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
        if differing:
            raise ValueError(f"tokens of another tokenizer: {', '.join(differing)}")
