"""Between stages 2 and 3: a bundle's encoders over a dataset, its views and its captions."""

import os
from pathlib import Path

import jax
import numpy as np

from fourdstar_jax import bundle
from fourdstar_jax.data import features, tokens


def prepare_tokens(
    data_dir: str | os.PathLike[str],
    bundle_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> None:
    """Writes the tokens of every rig view of every clip (see `data.tokens`).

    Raises ValueError for a bundle without a tokenizer, images that are not of its resolution, or an
    `out_dir` that holds something.
    """
    tokenizer = bundle.read(bundle_dir).load("tokenizer")
    encode = jax.jit(lambda tokenizer, images: tokenizer.encode(images))
    tokens.tokenize(
        Path(data_dir),
        Path(out_dir),
        lambda images: encode(tokenizer, images),
        spec=tokenizer.spec,
        codebooks=np.asarray(tokenizer.codebooks()),
        overwrite=overwrite,
    )


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
