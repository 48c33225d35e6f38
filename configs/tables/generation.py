"""Table 2: video to 4D, beside other systems' outputs.

    fourdstar evaluate --table configs/tables/generation.py --data data/test --weights weights \\
        --out results/table2 --rows ours=runs/star/bundle l4gm=workspace

Ours is generated from each clip's view 0 with the neutral prompt. The other rows are folders that
those systems wrote from the same frames (docs/EVALUATION.md: outputs of other systems).
"""

from ml_collections import ConfigDict

PAPER = {
    "STAG4D": dict(clip_b32=0.910, lpips_vgg=0.141, i3d_one_video=752.215, fid_vid=27.280),
    "L4GM": dict(clip_b32=0.926, lpips_vgg=0.132, i3d_one_video=515.430, fid_vid=20.125),
    "SV4D 2": dict(clip_b32=0.932, lpips_vgg=0.139, i3d_one_video=497.753, fid_vid=19.223),
    "GVFDiffusion": dict(clip_b32=0.931, lpips_vgg=0.138, i3d_one_video=528.336, fid_vid=19.064),
    "4DSTAR": dict(clip_b32=0.952, lpips_vgg=0.131, i3d_one_video=464.709, fid_vid=15.312),
}


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            title="Table 2: video to 4D",
            protocol="4dstar-video-to-4d",
            split="unseen_object",
            frames=8,
            rows=dict(
                stag4d=dict(label="STAG4D", how="stag4d", path="runs/stag4d"),
                l4gm=dict(label="L4GM", how="l4gm", path="runs/l4gm"),
                sv4d2=dict(label="SV4D 2.0", how="sv4d2", path="runs/sv4d2"),
                gvfdiffusion=dict(label="GVFDiffusion", how="gvfdiffusion", path="runs/gvf"),
                actionmesh=dict(label="ActionMesh", how="actionmesh", path="runs/actionmesh"),
                motion324=dict(label="Motion 3-to-4", how="motion324", path="runs/motion324"),
                ours=dict(label="4DSTAR", how="generate", path="runs/star/bundle"),
            ),
            order=("stag4d", "l4gm", "sv4d2", "gvfdiffusion", "actionmesh", "motion324", "ours"),
            against="ours",  # the row that others are compared with, in pairs
            paper=PAPER,
            paper_sha256="",
        )
    )
