"""Licences of what this project is made of and can be used with: `fourdstar doctor --licenses`."""

import importlib.metadata
import re
from collections.abc import Iterator
from typing import NamedTuple


class Entry(NamedTuple):
    """A line of the inventory."""

    kind: str  # code, weights, data, package
    name: str
    licence: str
    commercial: str  # use: yes, no, or what is to be asked
    source: str = ""  # where its authors say so

    def __str__(self) -> str:
        told = f"{self.kind:8s} {self.name:34s} {self.licence:34s} {self.commercial}"
        return f"{told:104s} {self.source}" if self.source else told


PERMISSIVE = r"MIT|Apache|BSD|ISC|PSF|Python Software Foundation|Zlib|CC0|0BSD|HPND|Unlicense|CNRI"
WEAK_COPYLEFT = r"MPL|Mozilla|LGPL"
ASK = "ask: no licence was found"
# As their authors say of them; what they were trained on may bind more.
OTHERS = (
    Entry("code", "fourdstar_jax", "Apache-2.0", "yes", "LICENSE"),
    Entry("weights", "the bundled model", "Apache-2.0, of CC0 assets", "yes", "its card"),
    Entry("weights", "UniTok", "MIT", "yes", "github.com/FoundationVision/UniTok, README"),
    Entry(
        "weights",
        "LlamaGen (VQ-16, trunk)",
        "MIT, its majority",
        "yes",
        "github.com/FoundationVision/LlamaGen, README",
    ),
    Entry("weights", "FLAN-T5", "Apache-2.0", "yes", "huggingface.co/google/flan-t5-xl"),
    Entry("weights", "MVAR", "none is told", ASK, "github.com/MILab-PKU/MVAR, README"),
    Entry(
        "weights",
        "LPIPS (VGG16, AlexNet)",
        "BSD-2-Clause; nets of ImageNet",
        "to measure and train",
        "github.com/richzhang/PerceptualSimilarity, LICENSE",
    ),
    Entry("weights", "CLIP (to measure)", "MIT", "yes", "github.com/openai/CLIP, LICENSE"),
    Entry(
        "weights",
        "3D-ResNet50 (to measure)",
        "MIT; of Kinetics",
        "to measure",
        "github.com/kenshohara/3D-ResNets-PyTorch, LICENSE",
    ),
    Entry(
        "weights",
        "I3D (to measure)",
        "Apache-2.0; of Kinetics",
        "to measure",
        "github.com/google-deepmind/kinetics-i3d",
    ),
    Entry(
        "weights",
        "Inception (to measure)",
        "Apache-2.0; of ImageNet",
        "to measure",
        "github.com/tensorflow/models",
    ),
    Entry(
        "weights",
        "DreamSim (to measure)",
        "MIT; its three ViTs' own not checked",
        ASK,
        "github.com/ssundaram21/dreamsim",
    ),
    Entry(
        "weights",
        "Qwen2.5-VL 7B, 32B (captions)",
        "Apache-2.0",
        "yes",
        "huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct",
    ),
    Entry(
        "weights",
        "Qwen2.5-VL 3B (captions)",
        "Qwen Research License",
        "no",
        "huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct",
    ),
    Entry(
        "weights",
        "Qwen2.5-VL 72B (captions)",
        "Qwen License",
        "ask: it has conditions",
        "huggingface.co/Qwen/Qwen2.5-VL-72B-Instruct",
    ),
    Entry("data", "Cap3D's captions", "ODC-By-1.0", "yes", "huggingface.co/datasets/tiange/Cap3D"),
    Entry("data", "one's own GLBs, Objaverse", "each asset's: prepare --licence", "as each says"),
)


def packages() -> Iterator[Entry]:
    """Of every installed package, by what it says of itself."""
    found = {}
    for package in importlib.metadata.distributions():
        about = package.metadata
        classifiers = [x for x in about.get_all("Classifier") or [] if x.startswith("License ::")]
        named = [x.rpartition(" :: ")[2] for x in classifiers if not x.endswith("OSI Approved")]
        text = about.get("License-Expression") or " or ".join(named)
        text = text or " ".join((about.get("License") or "").split())
        if not text:
            text = "not told"
        found[about["Name"].lower()] = Entry("package", about["Name"], text[:34], commercial(text))
    for name in sorted(found):
        if name != "fourdstar-jax":
            yield found[name]


def commercial(licence: str) -> str:
    """Whether a licence allows commercial use: "yes", or what is to be looked at."""
    if re.search(r"non-?commercial|\bNC\b", licence, re.I):
        return "no"
    if re.search(PERMISSIVE, licence):
        return "yes"
    if re.search(WEAK_COPYLEFT, licence):
        return "yes; changes to it are shared"
    if re.search(r"GPL", licence):
        return "yes; what is handed out with it is GPL"
    return ASK
