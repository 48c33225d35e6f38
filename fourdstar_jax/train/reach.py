"""How well a tokenizer gives back the pictures it was trained on, kept in the bundle.

`generate` compares a user's video with it: one that comes back much worse is far from the training.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np

from fourdstar_jax import bundle, sharding
from fourdstar_jax.data import pipeline, transforms
from fourdstar_jax.data.quarantine import Readable
from fourdstar_jax.tokenizer.measures import errors

QUANTILES = (0.5, 0.9, 0.99)
BATCH = 16


def measure(
    bundle_dir: str | os.PathLike[str], data_dir: str | os.PathLike[str], *, pictures: int = 256
) -> dict[str, float]:
    """Adds quantiles of `tokenizer.measures.errors` to the bundle's tokenizer; returns them.

    They are over so many pictures of the data's training split, of its views and clips in turn at
    random moments. Raises ValueError for a bundle without a tokenizer.
    """
    source = Readable(pipeline.ClipSource(os.fspath(data_dir), "train", cache_bytes=0, maps=()))
    rng = np.random.default_rng(0)
    order = rng.permutation(len(source))
    chosen = []
    for i in range(pictures):
        views = source[int(order[i % len(order)])]["rig_rgba"]
        chosen.append(views[rng.integers(len(views)), i % views.shape[1]])
    images, _ = transforms.on_white(np.stack(chosen))
    with sharding.use_mesh(devices=jax.local_devices()[:1]):
        tokenizer = bundle.read(bundle_dir).load("tokenizer")
        batches = np.array_split(images, -(-pictures // BATCH))
        found = np.concatenate([errors(tokenizer, jnp.asarray(batch)) for batch in batches])
    reach = {str(q): round(float(np.quantile(found, q)), 5) for q in QUANTILES}
    bundle.add_info(bundle_dir, "tokenizer", reach=reach | {"pictures": pictures})
    return reach
