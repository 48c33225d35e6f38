"""Before stage 3 with text_encoder="t5": a bundle's text encoder over a dataset's captions."""

import os

import jax

from fourdstar_jax import bundle
from fourdstar_jax.data import features


def prepare_features(
    data_dir: str | os.PathLike[str],
    bundle_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    batch: int = 8,
    overwrite: bool = False,
) -> None:
    """Writes the features of every caption (see `data.features`).

    Raises ValueError for a bundle without a text encoder, features that do not fit `dtype` (T5's
    may not fit float16), or an `out_dir` that holds something.
    """
    found = bundle.read(bundle_dir)
    encoder, stage = found.load("text"), found.stage("text")
    encode = jax.jit(lambda encoder, ids, mask: encoder(ids, mask))
    features.write(
        os.fspath(data_dir),
        os.fspath(out_dir),
        lambda ids, mask: encode(encoder, ids, mask),
        encoder={"sha256": stage.sha256, "model": stage.model},
        dtype=dtype,
        batch=batch,
        overwrite=overwrite,
    )
