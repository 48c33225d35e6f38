"""Table 1: objects seen from their rig's views, through tokenizers and the 4D VQ-VAE.

    fourdstar evaluate --table configs/tables/reconstruction.py --data data/test \\
        --weights weights --out results/table1 --rows vqvae=runs/vqvae/bundle

A row is run where its bundle is there: VQ-16 and UniTok as 2D tokenizers, each view for itself
(`fourdstar convert vq16` and `unitok` make the bundles), and the 4D VQ-VAE from the tokens of all
views. The data set's rig must be that of the bundles, and have the four sides.
"""

from ml_collections import ConfigDict

PAPER = {
    "VQ-VAE (VQ-16)": dict(clip_b32=0.938, lpips_vgg=0.067, i3d_one_video=326.570, fid_vid=13.447),
    "UniTok": dict(clip_b32=0.973, lpips_vgg=0.050, i3d_one_video=151.238, fid_vid=4.402),
    "4D VQ-VAE": dict(clip_b32=0.973, lpips_vgg=0.048, i3d_one_video=133.372, fid_vid=4.175),
}


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            title="Table 1: reconstruction",
            protocol="4dstar-reconstruction",
            split="unseen_object",
            frames=8,  # of each clip, the first ones
            rows=dict(
                vq16=dict(label="VQ-16", how="tokenizer", path="runs/vq16/bundle"),
                unitok=dict(label="UniTok", how="tokenizer", path="runs/unitok/bundle"),
                vqvae=dict(label="4D VQ-VAE", how="reconstruct", path="runs/vqvae/bundle"),
            ),
            # Beside ours only if the true frames have this hash (`truths.frames_sha256`): the
            # paper's 100 objects are not public.
            order=("vq16", "unitok", "vqvae"),
            against="vqvae",  # the row that others are compared with, in pairs
            paper=PAPER,
            paper_sha256="",
        )
    )
