"""Table 3: the 4D VQ-VAE with and without STOP.

    fourdstar evaluate --table configs/tables/stop.py --data data/test --weights weights \\
        --out results/table3 --rows without=runs/vqvae_without/bundle with=runs/vqvae/bundle

`without` is trained with `--config.model.offsets=False`, all else as `with`;
`launch/tables.sh` does so.
"""

from ml_collections import ConfigDict

PAPER = {
    "w/o STOP": dict(clip_b32=0.968, lpips_vgg=0.057, i3d_one_video=174.757, fid_vid=5.575),
    "4D VQ-VAE": dict(clip_b32=0.973, lpips_vgg=0.048, i3d_one_video=133.372, fid_vid=4.175),
}


def get_config() -> ConfigDict:
    rows = {
        "without": dict(label="w/o STOP", how="reconstruct", path="runs/vqvae_without/bundle"),
        "with": dict(label="4D VQ-VAE", how="reconstruct", path="runs/vqvae/bundle"),
    }
    return ConfigDict(
        dict(
            title="Table 3: STOP",
            protocol="4dstar-reconstruction",
            split="unseen_object",
            frames=8,
            rows=rows,
            order=("without", "with"),
            against="with",  # the row that others are compared with, in pairs
            paper=PAPER,
            paper_sha256="",
        )
    )
