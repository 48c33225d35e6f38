"""Losses of the tokenizers: pixels, LPIPS and quantiser, as in UniTok (arXiv:2502.20321)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from fourdstar_jax.perceptual.lpips import LPIPS
from fourdstar_jax.tokenizer.base import Reconstruction


def tokenizer_loss(
    output: Reconstruction,
    images: Float[Array, "*b h w 3"],
    masks: Float[Array, "*b h w 1"] | None = None,
    *,
    lpips: LPIPS | None = None,
    l1_weight: float = 0.2,
    l2_weight: float = 1.0,
    quantizer_weight: float = 1.0,
    foreground_weight: float = 0.0,
    lpips_weight: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Loss of images in [0, 1], and its parts before weighting; pixels count as in [-1, 1].

    A pixel of mask m counts 1 + `foreground_weight` m times (normalised by the sum): on a white
    background the object is a small share of the picture, and plain means would let it blur.

    Raises ValueError for weights without what they need: masks, LPIPS' network.
    """
    if foreground_weight > 0 and masks is None:
        raise ValueError(f"{foreground_weight=} needs masks")
    weight = jnp.ones(images.shape[:-1] + (1,), jnp.float32)
    if masks is not None:
        weight = weight + foreground_weight * masks
    weight = weight / jnp.mean(weight)
    error = 2 * (output.images - images)  # UniTok's pixels lie in [-1, 1]
    l1 = jnp.mean(weight * jnp.abs(error))
    l2 = jnp.mean(weight * error**2)
    loss = l1_weight * l1 + l2_weight * l2 + quantizer_weight * output.quantizer_loss
    metrics = {
        "l1": l1,
        "l2": l2,
        "quantizer": output.quantizer_loss,
        "perplexity": output.perplexity,
    }
    if lpips_weight > 0:
        if lpips is None:
            raise ValueError(f"{lpips_weight=} needs the network: lpips=")
        metrics["lpips"] = jnp.mean(lpips(output.images, images))
        loss = loss + lpips_weight * metrics["lpips"]
    return loss, metrics | {"loss": loss}
