"""What settings of STAR's sampler give on unseen clips: a table to choose `config.sampling` by.

The same clips, keys and measures as in training (`train.free`), once for each combination. Nothing
is trained; temperatures and guidance share one compiled program, each top-k has its own.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fourdstar_jax.evaluate import unseen
from fourdstar_jax.generate import Model
from fourdstar_jax.perceptual import lpips as perceptual
from fourdstar_jax.star import sample

COLUMNS = ("accuracy", "propagation", "propagation_frozen", "psnr_in_mask", "lpips", "flicker")


def sweep(
    bundle_dir: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    split: str = "unseen_clip",
    *,
    clips: int = 8,
    temperatures: Sequence[float] = (1.0, 0.7, 0.5, 0.3),
    top_ks: Sequence[int | None] = (None,),
    cfgs: Sequence[float] = (1.0,),
    history_cfgs: Sequence[float] = (1.0,),
    lpips: str | os.PathLike[str] | None = None,
    log: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """A dict for each combination: its settings, and all figures of `train.free.Sampler`.

    `lpips` is the file of LPIPS' weights; without it `lpips` and `flicker` (LPIPS(t, t+1) over the
    truth's) are not measured. `log` takes the table line by line, as it grows. Raises ValueError
    for settings outside their range, before anything is sampled.
    """
    combinations: list[dict[str, Any]] = [
        dict(temperature=t, top_k=k, cfg_scale=c, history_scale=h)
        for k, c, h, t in itertools.product(top_ks, cfgs, history_cfgs, temperatures)
    ]
    for settings in combinations:
        sample.check_settings(**settings)
    network = None if lpips is None else perceptual.load(lpips)
    model = Model(bundle_dir)
    sampler = unseen.sampler(model, unseen.load(model, Path(data_dir), split), clips, network)
    rows = []
    for settings in combinations:
        figures, _ = sampler._replace(settings=settings)(model.star)
        rows.append({**settings, **figures})
        if len(rows) == 1:
            log("  ".join(f"{name:>11}" for name in (*settings, *_shown(figures))))
        log("  ".join(f"{_text(rows[-1][name]):>11}" for name in (*settings, *_shown(figures))))
    return rows


def _shown(figures: Mapping[str, float]) -> Iterator[str]:
    return (name for name in COLUMNS if name in figures)


def _text(value: float | None) -> str:
    return "all" if value is None else f"{value:.4g}"
