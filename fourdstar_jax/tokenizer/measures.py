"""How steady tokens are, for white patches and in time, and how many of the codes are in use."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from fourdstar_jax.tokenizer.base import Tokenizer
from fourdstar_jax.tokenizer.quantize import BLANK

HALF_STEP = 0.5 / 255  # of 8 bits: what is nearer than this is the same


def patches(images: Float[Array, "*b h w c"], grid: int) -> Float[Array, "*b n p"]:
    """The pixels of the grid x grid patches of square images, row-major."""
    return rearrange(images, "... (i h) (j w) c -> ... (i j) (h w c)", i=grid, j=grid)


def blank_patches(images: Float[Array, "*b h w 3"], grid: int) -> Bool[Array, "*b n"]:
    """Whether all pixels of a patch are white, to half a step of 8 bits; images in [0, 1]."""
    return jnp.all(jnp.abs(1 - patches(images, grid)) <= HALF_STEP, axis=-1)


@jax.jit
def errors(tokenizer: Tokenizer, images: Float[Array, "*b h w 3"]) -> Float[Array, "*b"]:
    """How wrong pictures in [0, 1] come back: the root mean square over what is not white."""
    back = tokenizer.decode(tokenizer.encode(images))
    drawn = jnp.any(jnp.abs(1 - images) > HALF_STEP, axis=-1)
    square = jnp.mean((back - images) ** 2, axis=-1)
    count = jnp.maximum(jnp.sum(drawn, axis=(-2, -1)), 1)
    return jnp.sqrt(jnp.sum(jnp.where(drawn, square, 0.0), axis=(-2, -1)) / count)


def steadiness_counts(
    tokens: Int[Array, "*b T V n K"], images: Float[Array, "*b T V h w 3"]
) -> dict[str, Array]:
    """What `steadiness` makes shares of: counts of patches, to be summed over batches.

    A patch is unchanged where no pixel differs from the timestep before by more than half a step
    of 8 bits, and kept where all its codes are the same.
    """
    grid = round(tokens.shape[-2] ** 0.5)
    blank = blank_patches(images, grid)
    pixels = rearrange(patches(images, grid), "... T V n p -> T ... V n p")
    same = jnp.all(jnp.abs(pixels[1:] - pixels[:-1]) <= HALF_STEP, axis=-1)
    ids = rearrange(tokens, "... T V n K -> T ... V n K")
    kept = jnp.all(ids[1:] == ids[:-1], axis=-1)
    drawn = ~rearrange(blank, "... T V n -> T ... V n")[1:]
    counts = {
        "patches": jnp.ones_like(blank),
        "blank": blank,
        "blank_token": blank & jnp.all(tokens == BLANK, axis=-1),
        "unchanged": same,
        "unchanged_kept": same & kept,
        "unchanged_object": same & drawn,
        "unchanged_object_kept": same & drawn & kept,
    }
    return {name: jnp.sum(x, dtype=jnp.float32) for name, x in counts.items()}


def steadiness(counts: dict[str, float]) -> dict[str, float]:
    """Shares, where there is anything to count.

    blank_share: of the patches, that are blank. blank_with_blank_token: of these, with the code
    BLANK of every codebook (only the local tokenizer has such a token). unchanged_kept: of the
    patches unchanged since the timestep before, that keep their token; unchanged_object_kept: of
    those that are not blank.
    """
    shares = {
        "blank_share": ("blank", "patches"),
        "blank_with_blank_token": ("blank_token", "blank"),
        "unchanged_kept": ("unchanged_kept", "unchanged"),
        "unchanged_object_kept": ("unchanged_object_kept", "unchanged_object"),
    }
    return {
        name: float(np.divide(counts[part], counts[whole]))
        for name, (part, whole) in shares.items()
        if counts[whole] > 0
    }


def code_counts(tokens: Int[Array, "*b n K"], vocab_size: int) -> Float[Array, "K vocab"]:
    """How often each code of each codebook occurs, to be summed over batches."""
    num_codebooks = tokens.shape[-1]
    ids = tokens.reshape(-1, num_codebooks)
    counts = jnp.zeros((num_codebooks, vocab_size), jnp.float32)
    return counts.at[jnp.arange(num_codebooks), ids].add(1.0)


def code_use(
    counts: Float[Array | np.ndarray, "K vocab"], *, has_blank: bool = False
) -> dict[str, float]:
    """Use of the codebooks, means over them; with `has_blank` the code BLANK is left out.

    codes_used: share of the codes that occur. codes_perplexity: exp of the entropy of how often,
    at most the number of codes.
    """
    of = np.asarray(counts, np.float64)[:, BLANK + 1 if has_blank else 0 :]
    share = of / np.maximum(of.sum(axis=1, keepdims=True), 1)
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1)), axis=1)
    return {
        "codes_used": float(np.mean(of > 0)),
        "codes_perplexity": float(np.mean(np.exp(entropy))),
    }
