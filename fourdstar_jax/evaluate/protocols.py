"""What exactly a number in a table is: the protocols by which predictions are scored.

The same names (FVD, FID-VID) mean different numbers in different papers' scripts. A protocol fixes
all that moves a number, has a version, and is printed with every result (`described`).
"""

import dataclasses
from typing import Literal

SIDES = (0.0, 90.0, 180.0, 270.0)  # front, right, back, left
CONSISTENT4D = (-75.0, 15.0, 105.0, 195.0)
SEEN = 0.02  # scene units that a point may lie behind what a view sees, of an object 0.8 high
SAME_PSNR = 100.0  # dB, in place of infinity: of identical pictures


@dataclasses.dataclass(frozen=True)
class Resize:
    """How pictures get a network's size; each channel by itself, without a change of range."""

    size: int  # pixels a side
    library: Literal["Pillow, 8 bits", "Pillow, float32", "TensorFlow 1"]
    filter: Literal["bicubic", "bilinear"]

    @property
    def antialias(self) -> bool:
        """Whether the filter grows with the factor by which pictures shrink."""
        return self.library != "TensorFlow 1"

    def __str__(self) -> str:
        how = "antialiased" if self.antialias else "not antialiased"
        return f"{self.size}x{self.size} by {self.library}, {self.filter}, {how}"


TO_512 = Resize(512, "Pillow, 8 bits", "bicubic")
TO_CLIP = Resize(224, "Pillow, 8 bits", "bicubic")
TO_I3D = Resize(224, "Pillow, float32", "bicubic")
TO_RESNET = Resize(112, "Pillow, float32", "bicubic")
TO_INCEPTION = Resize(299, "TensorFlow 1", "bilinear")


@dataclasses.dataclass(frozen=True)
class Metric:
    """One column of a table."""

    name: str
    label: str
    better: Literal["higher", "lower"]
    per: Literal["frame", "clip", "object", "set"]  # what has a value; all but sets are averaged
    text: str  # range, formula and source
    network: str | None = None  # of `networks.NETWORKS`
    resize: tuple[Resize, ...] = ()  # one after the other
    digits: int = 3
    optional: bool = False  # left out where its weights are not there, unless it is asked for


@dataclasses.dataclass(frozen=True)
class Protocol:
    """All that moves a number. `version` rises whenever one of its numbers would change."""

    name: str
    version: int
    text: str
    metrics: tuple[Metric, ...]
    background: Literal["white", None]  # that transparent pixels are put on; None refuses them
    azimuths_deg: tuple[tuple[float, ...], ...] = ()  # what its views may be; () takes any
    aggregation: str = "mean over frames, then over an object's views, then over objects"

    @property
    def num_views(self) -> int | None:
        """Views an object must have; None for any number."""
        return len(self.azimuths_deg[0]) if self.azimuths_deg else None

    def metric(self, name: str) -> Metric:
        """A metric by its name. Raises ValueError if the protocol has no such one."""
        for metric in self.metrics:
            if metric.name == name:
                return metric
        names = ", ".join(m.name for m in self.metrics)
        raise ValueError(f"the protocol {self.name} has no metric {name!r}, only {names}")


PSNR = Metric(
    "psnr",
    "PSNR",
    "higher",
    "frame",
    f"dB, of pictures in [0, 1] at their own size; identical ones count {SAME_PSNR:g} dB",
    digits=2,
)
PSNR_IN_MASK = dataclasses.replace(
    PSNR,
    name="psnr_in_mask",
    label="PSNR in mask",
    text="dB, of pictures in [0, 1], pixels weighted by the truth's alpha; "
    f"identical ones count {SAME_PSNR:g} dB",
)
ALPHA_IOU = Metric(
    "alpha_iou", "alpha IoU", "higher", "frame", "of alpha above a half; two empty ones give 1"
)
SSIM = Metric(
    "ssim",
    "SSIM",
    "higher",
    "frame",
    "Wang et al. 2004, window 11 of sigma 1.5 inside the picture, range 1, at their own size",
)
LPIPS_VGG = Metric(
    "lpips_vgg", "LPIPS (VGG)", "lower", "frame", "v0.1, pictures in [-1, 1]", "lpips_vgg"
)
LPIPS_ALEX = dataclasses.replace(
    LPIPS_VGG, name="lpips_alex", label="LPIPS (Alex)", network="lpips_alex"
)
CLIP_B32 = Metric(
    "clip_b32",
    "CLIP",
    "higher",
    "frame",
    "cosine of the image embeddings of ViT-B/32",
    "clip_b32",
    (TO_CLIP,),
)
CLIP_L14 = dataclasses.replace(
    CLIP_B32,
    name="clip_l14",
    label="CLIP (L/14)",
    text="cosine of the image embeddings of ViT-L/14",
    network="clip_l14",
)
DREAMSIM = Metric(
    "dreamsim",
    "DreamSim",
    "lower",
    "frame",
    "1 less the cosine of the embeddings of DreamSim's ensemble (arXiv:2306.09344)",
    "dreamsim",
    (TO_CLIP,),
    optional=True,
)
TEMPORAL_LPIPS = Metric(
    "temporal_lpips",
    "tLP",
    "lower",
    "clip",
    "|LPIPS(p(t), p(t+1)) - LPIPS(g(t), g(t+1))|, VGG (TecoGAN, arXiv:1811.09393)",
    "lpips_vgg",
    digits=4,
)
TEMPORAL_ERROR = Metric(
    "temporal_error",
    "temporal error",
    "lower",
    "clip",
    "mean |(p(t+1) - p(t)) - (g(t+1) - g(t))| at fixed pixels, [0, 1], over the truth's mask at t "
    "or t + 1",
    digits=4,
)
WARPING_ERROR = Metric(
    "warping_error",
    "warping error",
    "lower",
    "clip",
    "mean |p(t) - p(t+1) at where the true flow leads|, inside the truth's mask and where the "
    "truth itself stays within 0.1; needs a data set with flow",
    digits=4,
)
FLOW_ERROR = Metric(
    "flow_error",
    "flow EPE",
    "lower",
    "clip",
    "mean length of the Gaussians' projected motion, blended as colours are (GaussianFlow, "
    "arXiv:2403.12365), less the true flow, pixels inside the truth's mask; what is not covered "
    "does not move; needs a data set with flow and objects made here",
)
ONE_VIDEO = Metric(
    "i3d_one_video",
    "one-video I3D distance",
    "lower",
    "clip",
    "what papers after Consistent4D print as FVD, though a video is no set: (mean over the 400 "
    "logits of one clip, their variance with ddof 1) as two normals of one dimension and means as "
    "vectors, |l - l'|^2 + (s - s')^2; I3D of Kinetics-400 with the last pooling over places only, "
    "values in [-1, 1]",
    "i3d",
    (TO_I3D,),
    1,
)
FID_VID = Metric(
    "fid_vid",
    "FID-VID",
    "lower",
    "clip",
    "as STAG4D: Frechet distance of the frames of one clip, Inception of 2015, 2,048 features",
    "inception",
    (TO_INCEPTION,),
    2,
)
FVD = Metric(
    "fvd",
    "FVD",
    "lower",
    "set",
    "Frechet distance of two sets of clips, I3D of Kinetics-400 as on TF-Hub, 400 logits, values "
    "in [-1, 1], covariances with ddof 1; a clip of fewer than 9 frames shows each one twice or "
    "more often",
    "i3d",
    (TO_I3D,),
    1,
)
MMD = Metric(
    "mmd",
    "MMD",
    "lower",
    "set",
    "squared kernel distance of two sets of clips on the logits of FVD, kernel (x.y / 400 + 1)^3, "
    "without bias; short clips as for FVD",
    "i3d",
    (TO_I3D,),
)
FID = Metric(
    "fid",
    "FID",
    "lower",
    "set",
    "Frechet distance of all frames of all views, Inception of 2015, 2,048 features",
    "inception",
    (TO_INCEPTION,),
    2,
)
FID_VID_RESNET = Metric(
    "fid_vid_resnet",
    "FID-VID (DisCo)",
    "lower",
    "set",
    "Frechet distance of all windows of 16 frames, one apart, 3D-ResNet50, 2,048 features, values "
    "0 to 255 less (114.7748, 107.7354, 99.475); a clip of fewer than 16 frames shows each one "
    "twice or more often",
    "resnet3d",
    (TO_RESNET,),
    2,
)

_GEOMETRY = "opaque Gaussian centres (above 0.5) and the truth's tracked points, scene units, "
CD_3D = Metric(
    "cd_3d",
    "CD-3D",
    "lower",
    "object",
    _GEOMETRY + "Chamfer distance, both ways added up, each frame aligned by itself",
    digits=4,
)
CD_4D = Metric(
    "cd_4d",
    "CD-4D",
    "lower",
    "object",
    _GEOMETRY + "as CD-3D, all frames aligned as the first one",
    digits=4,
)
CD_M = Metric(
    "cd_m",
    "CD-M",
    "lower",
    "object",
    _GEOMETRY + "pairs are the nearest at the first frame, aligned; their mean distance over time, "
    "both ways added up. ActionBench's three, but for points, alignment (docs/EVALUATION.md)",
    digits=4,
)
F_SCORE = Metric(
    "f_score",
    "F-score",
    "higher",
    "object",
    _GEOMETRY + "harmonic mean of the shares within 0.02 of the other, aligned as CD-4D",
)

JITTER = Metric(
    "jitter",
    "jitter",
    "lower",
    "object",
    "mean |x(t-1) - 2 x(t) + x(t+1)| of Gaussian centres, weighted by the least of the three "
    "opacities, scene units; what stands still has none: read it beside the flow error",
    digits=5,
)
REPROJECTION = Metric(
    "reprojection",
    "reprojection",
    "lower",
    "object",
    "mean |colour - colour| of the truth's tracked points between every two views that see them, "
    f"channels averaged, [0, 1]; seen is what lies at most {SEEN:g} behind the true depth; the "
    "truth's own, of light, is not 0; needs a data set with points and depth",
    digits=4,
)

_LEGACY = tuple(
    dataclasses.replace(metric, resize=(TO_512, *metric.resize)) for metric in (CLIP_B32, LPIPS_VGG)
)
_PAPER = (*_LEGACY, ONE_VIDEO, FID_VID)

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "consistent4d-legacy",
            1,
            "Consistent4D's two scripts (evaluation/ of its repository), which most papers on "
            "video to 4D ran, in closed form where NumPy 2.2 broke them",
            (
                *_LEGACY,
                ONE_VIDEO,
                dataclasses.replace(
                    PSNR,
                    name="psnr_own_range",
                    label="PSNR (own range)",
                    text="dB, the range is that of each true picture's values, as torchmetrics "
                    f"infers it; identical ones count {SAME_PSNR:g} dB",
                    resize=(TO_512,),
                ),
                dataclasses.replace(
                    SSIM,
                    name="ssim_own_range",
                    label="SSIM (own range)",
                    text="window 11 of sigma 1.5, the range is the larger one of the two pictures' "
                    "values, as torchmetrics infers it",
                    resize=(TO_512,),
                ),
            ),
            background=None,
            azimuths_deg=(CONSISTENT4D,),
        ),
        Protocol(
            "4dstar-reconstruction",
            1,
            "4DSTAR's Tables 1 and 3: eight views in, the four sides scored. The paper names the "
            "metrics only; sizes and aggregation are Consistent4D's, FID-VID STAG4D's",
            _PAPER,
            background="white",
            azimuths_deg=(SIDES,),
        ),
        Protocol(
            "4dstar-video-to-4d",
            1,
            "4DSTAR's Tables 2 and 4: one video in, the views of Consistent4D's seven objects "
            "scored, or the four sides. The paper names the metrics only; sizes and aggregation "
            "are Consistent4D's, FID-VID STAG4D's",
            _PAPER,
            background="white",
            azimuths_deg=(CONSISTENT4D, SIDES),
        ),
        Protocol(
            "set-fvd",
            1,
            "distances of two sets of clips, every view of every object a clip: what FVD was "
            "defined as (arXiv:1812.01717), and DisCo's FID-VID",
            (FVD, MMD, FID_VID_RESNET),
            background="white",
            aggregation="all clips at once",
        ),
        Protocol(
            "fourdstar-open-v2",
            3,
            "ours: pictures at their own size and in one range, masks beside whole pictures, "
            "sets as sets, steadiness in time; every view that the truth has",
            (
                *(PSNR, PSNR_IN_MASK, ALPHA_IOU, SSIM, LPIPS_VGG, LPIPS_ALEX),
                *(
                    CLIP_B32,
                    CLIP_L14,
                    DREAMSIM,
                    TEMPORAL_LPIPS,
                    TEMPORAL_ERROR,
                    WARPING_ERROR,
                    FLOW_ERROR,
                    FVD,
                    MMD,
                ),
                *(FID, FID_VID, FID_VID_RESNET, CD_3D, CD_4D, CD_M, F_SCORE, JITTER, REPROJECTION),
            ),
            background="white",
        ),
    )
}


def find(name: str) -> Protocol:
    """A protocol by its name. Raises ValueError for an unknown one."""
    if name not in PROTOCOLS:
        raise ValueError(f"protocol {name!r} must be one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def described(protocol: Protocol, metrics: tuple[Metric, ...] | None = None) -> list[str]:
    """Lines that say all that is fixed, of all its metrics or of those given."""
    views = "any, all that the truth has"
    if protocol.azimuths_deg:
        sets = [", ".join(f"{a:g}" for a in azimuths) for azimuths in protocol.azimuths_deg]
        views = f"{protocol.num_views}, at azimuths {' or '.join(sets)} degrees, elevation 0"
    background = {
        "white": "transparent pixels are put on white: colour x alpha + 1 - alpha, then 8 bits",
        None: "pictures without transparency, put on white before",
    }[protocol.background]
    lines = [
        f"protocol {protocol.name}, version {protocol.version}: {protocol.text}",
        "pictures: 8 bits a channel, never cut or resized but as said here",
        f"background: {background}",
        "frames: all of the truth; predictions have as many",
        f"views: {views}",
        f"aggregation: {protocol.aggregation}",
    ]
    for metric in protocol.metrics if metrics is None else metrics:
        resize = "".join(f"; {r}" for r in metric.resize)
        lines.append(
            f"{metric.name} ({metric.per}, {metric.better} is better): {metric.text}{resize}"
        )
    return lines
