"""Table 4: what carries the past in STAR.

    fourdstar evaluate --table configs/tables/state.py --data data/test --weights weights \\
        --out results/table4 --rows ours=runs/star/bundle baseline=runs/star_baseline/bundle

A row given twice was trained twice, as by two seeds: `ours=runs/star/bundle
ours=runs/star_1/bundle`. `--seeds 0 1` generates twice with each. `--protocol fourdstar-open-v2`
has our metrics instead of the paper's: temporal and warping error, PSNR in the mask, FVD, MMD,
CD-4D and CD-M among them.

The bundles are of `configs/star.py:small` and `small,baseline`, `small,explicit`, `small,average`,
`small,merging`, `small,slots`. The paper's A is L4GM with explicit states; ours is STAR with them.
`launch/tables.sh` trains them.
"""

from ml_collections import ConfigDict

PAPER = {
    "A: L4GM w/ explicit state": dict(
        clip_b32=0.930, lpips_vgg=0.132, i3d_one_video=508.192, fid_vid=19.714
    ),
    "baseline": dict(clip_b32=0.939, lpips_vgg=0.148, i3d_one_video=883.946, fid_vid=37.066),
    "B: temporal average": dict(
        clip_b32=0.942, lpips_vgg=0.146, i3d_one_video=646.558, fid_vid=27.016
    ),
    "C: learned merging": dict(
        clip_b32=0.945, lpips_vgg=0.141, i3d_one_video=579.288, fid_vid=21.449
    ),
    "S-T Container": dict(clip_b32=0.952, lpips_vgg=0.131, i3d_one_video=464.709, fid_vid=15.312),
}


def get_config() -> ConfigDict:
    labels = dict(
        explicit="A: explicit state (STAR)",
        baseline="baseline",
        average="B: temporal average",
        merging="C: learned merging",
    )
    rows = {
        name: dict(label=label, how="generate", path=f"runs/star_{name}/bundle")
        for name, label in labels.items()
    }
    rows["slots"] = dict(
        label="S-T Container, 192 slots", how="generate", path="runs/star_slots/bundle"
    )
    rows["ours"] = dict(label="S-T Container", how="generate", path="runs/star/bundle")
    return ConfigDict(
        dict(
            title="Table 4: the state",
            protocol="4dstar-video-to-4d",
            split="unseen_object",
            frames=8,
            rows=rows,
            order=("baseline", "explicit", "average", "merging", "ours", "slots"),
            against="ours",  # the row that others are compared with, in pairs
            paper=PAPER,
            paper_sha256="",
        )
    )
