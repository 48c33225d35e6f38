"""CLIP's image tower and 3D-ResNet50 by their original code, with random weights.

    PYTORCH_PYTHON tests/parity/measuring.py original --clip CHECKOUT --resnet CHECKOUT --out DIR
    python tests/parity/measuring.py compare --out DIR

The checkouts are of openai/CLIP and kenshohara/3D-ResNets-PyTorch. `--small` is what the fixture in
tests/parity/fixtures/measuring was made with; without, the released sizes (B/32, L/14, depth 50).
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np

CLIPS = {"b32": (224, 32, 768, 12, 12, 512), "l14": (224, 14, 1024, 24, 16, 768)}
SMALL_CLIPS = {"small": (24, 8, 128, 1, 2, 12)}  # pixels, patch, width, layers, heads, embedding


def original(parsed) -> None:
    import torch
    from safetensors.torch import save_file

    def code(path, name):
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    parsed.out.mkdir(parents=True, exist_ok=True)

    def save(name, model, images, inputs):
        for key, x in model.state_dict().items():  # norms that do something
            if x.ndim == 1 and x.is_floating_point():
                x.copy_(
                    torch.rand_like(x) * 0.5 + 0.75
                    if key.endswith(("weight", "var"))
                    else torch.randn_like(x) * 0.1
                )
        with torch.no_grad():
            features = model.eval()(inputs)
        arrays = {k: x for k, x in model.state_dict().items() if x.is_floating_point()}
        arrays = {f"state.{k}": x.contiguous() for k, x in arrays.items()}
        arrays |= {"images": torch.tensor(images), "features": features}
        save_file(arrays, parsed.out / f"{name}.safetensors")

    module = code(parsed.clip / "clip" / "model.py", "clip_model")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    for name, sizes in (SMALL_CLIPS if parsed.small else CLIPS).items():
        images = rng.random((2, sizes[0], sizes[0], 3), np.float32)
        inputs = ((torch.tensor(images) - mean) / std).permute(0, 3, 1, 2)
        save(f"clip_{name}", module.VisionTransformer(*sizes), images, inputs)

    module = code(parsed.resnet / "models" / "resnet.py", "resnet_model")
    layers, widths = (
        ((1, 2, 1, 1), [2, 3, 4, 5]) if parsed.small else ((3, 4, 6, 3), [64, 128, 256, 512])
    )
    model = module.ResNet(module.Bottleneck, layers, widths)
    model.fc = torch.nn.Identity()
    side, frames = (40, 8) if parsed.small else (112, 16)
    images = rng.random((2, frames, side, side, 3), np.float32)
    inputs = 255 * torch.tensor(images) - torch.tensor([114.7748, 107.7354, 99.4750])
    save("resnet3d", model, images, inputs.permute(0, 4, 1, 2, 3))


def compare(folder: Path) -> dict[str, float]:
    """Relative L2 of our features, by file."""
    import jax
    import safetensors.numpy

    from fourdstar_jax.perceptual import clip, resnet3d

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored = safetensors.numpy.load_file(path)
        state = {k.removeprefix("state."): x for k, x in stored.items() if k.startswith("state.")}
        network = (clip if path.stem.startswith("clip") else resnet3d).build(state)
        with jax.default_matmul_precision("highest"):
            ours = np.asarray(jax.jit(lambda n, x: n(x))(network, stored["images"]), np.float64)
        theirs = stored["features"].astype(np.float64)
        assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
        found[path.stem] = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["original", "compare"])
    parser.add_argument("--clip", type=Path)
    parser.add_argument("--resnet", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    parsed = parser.parse_args()
    if parsed.what == "original":
        sys.exit(original(parsed))
    for name, error in compare(parsed.out).items():
        print(f"{name:12} {error:.1e}")
