"""CLIP's image tower, 3D-ResNet50 and DreamSim by their original code, with random weights.

    PYTORCH_PYTHON tests/parity/measuring.py original --clip CHECKOUT --resnet CHECKOUT --out DIR
    PYTORCH_PYTHON tests/parity/measuring.py original --dreamsim CHECKOUT --out DIR
    python tests/parity/measuring.py compare --out DIR

The checkouts are of openai/CLIP, kenshohara/3D-ResNets-PyTorch and ssundaram21/dreamsim, which
needs peft. `--small` is what the fixtures in tests/parity/fixtures were made with (measuring, and
dreamsim in a folder of its own); without, the released sizes (B/32, L/14, depth 50, B/16).
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


def dreamsim(parsed) -> None:
    """Files as the original's cache folder has them, and the embeddings that it gives with them."""
    import functools
    import json
    import types

    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    # what the package imports and this does not use: models it has besides, and reading pictures
    sys.modules["open_clip"] = types.ModuleType("open_clip")
    for name in ("timm", "timm.models", "timm.models.vision_transformer"):
        sys.modules[name] = types.ModuleType(name)
    vision = sys.modules["torchvision"] = types.ModuleType("torchvision")

    class Normalize:
        def __init__(self, mean, std):
            self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (mean, std))

        def __call__(self, x):
            return (x - self.mean) / self.std

    vision.transforms = types.SimpleNamespace(Normalize=Normalize)
    sys.path.insert(0, str(parsed.dreamsim))
    for name in ("load_mae_as_vit", "load_synclr_as_dino"):  # of other variants
        module = types.ModuleType(name)
        setattr(module, name, None)
        sys.modules[f"dreamsim.feature_extraction.{name}"] = module
    import dreamsim.feature_extraction.extractor as extractor
    import dreamsim.feature_extraction.load_clip_as_dino as as_clip
    import dreamsim.feature_extraction.load_open_clip_as_dino as as_open_clip
    import dreamsim.feature_extraction.vision_transformer as vit
    from dreamsim.model import PerceptualModel, dreamsim_args

    torch.manual_seed(0)
    width, layers, side, dim = (64, 2, 32, 12) if parsed.small else (768, 12, 224, 512)
    norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    sizes = dict(img_size=[side], embed_dim=width, depth=layers, num_heads=width // 64)
    make = functools.partial(vit.VisionTransformer, **sizes, qkv_bias=True, norm_layer=norm)
    as_clip.vit_base = as_open_clip.vit_base = make
    if layers != 12:  # the last block, whose number the original has as it is

        def described(self, batch, layer=11, found=extractor.ViTExtractor.extract_descriptors):
            return found(self, batch, layers - 1)

        extractor.ViTExtractor.extract_descriptors = described

    def randomised(model) -> dict:
        for x in model.parameters():
            kind = torch.randn_like(x) * 0.1
            x.data = (1 + kind if x.ndim == 1 else kind * (3 / x[0].numel() ** 0.5)).half().float()
        return {name: x.half() for name, x in model.state_dict().items()}

    folder = parsed.out
    folder.mkdir(parents=True, exist_ok=True)
    for branch in ("clip", "open_clip"):
        model = make()
        model.pos_drop = torch.nn.LayerNorm(width)
        state = randomised(model) | {"proj": torch.randn(width, dim).half().float() * 0.1}
        torch.save({"state_dict": state}, folder / f"{branch}_vitb16_pretrain.pth.tar")
    dino = make()
    torch.save(randomised(dino), folder / "dino_vitbase16_pretrain.pth")
    loaders = {  # DINO's head, which the original loads too, is of its training only
        "dino_vitb16": lambda: dino,
        "clip_vitb16": lambda: as_clip.load_clip_as_dino(16, folder),
        "open_clip_vitb16": lambda: as_open_clip.load_open_clip_as_dino(16, folder),
    }
    extractor.ViTExtractor.create_model = staticmethod(lambda kind, folder: loaders[kind]())
    sizes = dreamsim_args["model_config"]["ensemble"]
    model = PerceptualModel(**sizes, load_dir=str(folder), device="cpu", normalize_embeds=True)
    lora = LoraConfig(r=4, lora_alpha=2, lora_dropout=0.3, bias="none", target_modules=["qkv"])
    model = get_peft_model(model, lora).eval()
    for name, x in model.named_parameters():
        if "lora_" in name:
            x.data = (torch.randn_like(x) * 0.3).half().float()
    model.save_pretrained(folder / "ensemble_lora")
    for file in (folder / "ensemble_lora").iterdir():
        if not file.name.startswith("adapter_"):
            file.unlink()
    config = folder / "ensemble_lora" / "adapter_config.json"
    kept = ("r", "lora_alpha", "lora_dropout", "bias", "target_modules")  # that the package reads
    config.write_text(json.dumps({k: json.loads(config.read_text())[k] for k in kept}) + "\n")
    images = torch.tensor(np.random.default_rng(0).random((3, side, side, 3), np.float32))
    with torch.no_grad():
        embedded = model.base_model.model.embed(images.permute(0, 3, 1, 2))
        distance = model(images[:1].permute(0, 3, 1, 2), images[1:2].permute(0, 3, 1, 2))
    arrays = {"images": images, "embeddings": embedded.contiguous(), "distance": distance}
    save_file(arrays, folder / "embeddings.safetensors")


def compare_dreamsim(folder: Path) -> dict[str, float]:
    """Relative L2 of our embeddings, of unit length, and of the distance of the first two."""
    import jax
    import safetensors.numpy

    from fourdstar_jax.convert import measuring
    from fourdstar_jax.perceptual import dreamsim

    stored = safetensors.numpy.load_file(folder / "embeddings.safetensors")
    network = dreamsim.build(measuring.dreamsim_arrays(folder))
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(jax.jit(lambda n, x: n(x))(network, stored["images"]), np.float64)
    ours /= np.linalg.norm(ours, axis=-1, keepdims=True)
    theirs = {"embeddings": stored["embeddings"], "distance": stored["distance"]}
    pairs = {"embeddings": ours, "distance": np.array([1 - ours[0] @ ours[1]])}
    return {
        name: float(np.linalg.norm(x - theirs[name]) / np.linalg.norm(theirs[name]))
        for name, x in pairs.items()
    }


def compare(folder: Path) -> dict[str, float]:
    """Relative L2 of our features, by file."""
    import jax
    import safetensors.numpy

    from fourdstar_jax.perceptual import clip, resnet3d

    if (folder / "embeddings.safetensors").is_file():
        return compare_dreamsim(folder)
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
    parser.add_argument("--dreamsim", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    parsed = parser.parse_args()
    if parsed.what == "original":
        sys.exit((dreamsim if parsed.dreamsim else original)(parsed))
    for name, error in compare(parsed.out).items():
        print(f"{name:12} {error:.1e}")
