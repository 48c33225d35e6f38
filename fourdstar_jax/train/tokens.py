"""Between stages 2 and 3: encodes a dataset into a folder of tokens with a bundle's tokenizer."""

import os
from pathlib import Path

import jax
import numpy as np

from fourdstar_jax import bundle
from fourdstar_jax.data import tokens


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
