"""Our UniTok against the original's own code, block by block, on the same random weights.

    python tests/parity/unitok.py original --source UNITOK --out DIR [--small]
    python tests/parity/unitok.py compare DIR

The first needs PyTorch, timm 1.0.8 and a checkout of FoundationVision/UniTok and nothing of ours;
the second needs this package and no PyTorch. Of the original run are kept the weights
(`weights.pth`, as the released file is) and in `activations.safetensors` the image and what every
block makes of it: the blocks are a chain, each reads what the one before it wrote. `--small` made
`fixtures/unitok`, with half-precision weights.
"""

import argparse
import importlib
import json
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import safetensors
import safetensors.numpy
from common import (
    BLOCK_LIMIT,
    END_TO_END_LIMIT,
    TIE,
    Row,
    load,
    picture,
    print_rows,
    relative_l2,
)

SEED = 0
# what the original imports for training and CLIP, and its tokenizer does without
NOT_NEEDED = ("torchvision", "torchvision.models", "torchvision.models.feature_extraction")
NOT_NEEDED += ("torchvision.ops", "torchvision.ops.misc", "torchvision.datasets")
NOT_NEEDED += ("torchvision.transforms", "torchvision.transforms.functional", "pytz", "tap")
# (chunks, vocabulary, width of a code, image) of the two sizes
RELEASED, SMALL = (8, 4096, 64, 256), (4, 32, 16, 64)


def build(source: Path, small: bool) -> Any:
    """The original's encoder, projections, quantiser and decoder, put together as UniTok does."""
    import torch

    for name in NOT_NEEDED:
        try:
            importlib.import_module(name)
        except Exception:  # missing, or of another torch
            sys.modules[name] = mock.MagicMock()
    if isinstance(sys.modules["tap"], mock.MagicMock):
        sys.modules["tap"].Tap = object
    sys.path.insert(0, str(source))
    vitamin = importlib.import_module("models.vitamin")
    projection = importlib.import_module("models.vqvae").AttnProjection
    quantizer = importlib.import_module("models.quant").VectorQuantizerM

    chunks, vocabulary, width, size = SMALL if small else RELEASED
    options: dict[str, Any] = dict(
        patch_size=1, fc_norm=False, drop_rate=0.0, num_classes=0, global_pool="",
        pos_embed="none", class_token=False, reg_tokens=0, img_size=size,
        mlp_layer=vitamin.GeGluMlp,
    )  # fmt: skip

    def vit():
        if not small:
            return importlib.import_module("timm").create_model("vitamin_large", **options)
        stages = vitamin.VitCfg(embed_dim=(8, 12, 64), depths=(1, 2, 1), stem_width=8)
        return vitamin._create_vision_transformer_hybrid(
            "vitamin_base", backbone=vitamin.MbConvStages(cfg=stages),
            embed_dim=64, depth=1, num_heads=1, mlp_ratio=1.0, **options,
        )  # fmt: skip

    model = torch.nn.Module()
    model.encoder = vit()
    dim = model.encoder.embed_dim
    model.encoder.pos_embed = torch.nn.Parameter(torch.zeros(1, 1, dim), requires_grad=False)
    model.quant_proj = projection(dim, width, dim // width)
    model.quantizer = quantizer(vocabulary * chunks, width, num_codebooks=chunks)
    model.post_quant_proj = projection(width, dim, dim // width)
    if small:
        decoder = vitamin.ViTaminDecoder.__new__(vitamin.ViTaminDecoder)
        torch.nn.Module.__init__(decoder)
        blocks = vit()
        decoder.num_query, decoder.grad_ckpt = 0, False
        decoder.blocks, decoder.norm, decoder.norm_pre = blocks.blocks, blocks.norm, blocks.norm_pre
        block = vitamin.InvMbConvLNBlock
        decoder.up_conv1 = vitamin.Upsample2d(dim, 12)
        decoder.up_conv2 = torch.nn.Sequential(block(12, 12, stride=2), block(12, 12))
        decoder.up_conv3 = torch.nn.Sequential(block(12, 8, stride=2))
        decoder.up_conv4 = vitamin.InvStem(in_chs=8, out_chs=3)
        model.decoder = decoder
    else:
        model.decoder = vitamin.ViTaminDecoder("vitamin_large", img_size=size)
    return model.eval()


def random_weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values that keep activations near 1, with no weight of a norm at its start."""
    if name.endswith(("pos_embed", "zero_k_bias")):
        values = np.zeros(shape)
    elif name.endswith("vocab_usage"):
        values = rng.dirichlet(np.ones(shape[0]))
    elif "norm" in name:
        values = rng.normal(float(name.endswith("weight")), 0.2, shape)
    elif name.endswith("bias"):
        values = rng.normal(0, 0.1, shape)
    else:  # linear maps, convolutions and codebooks, whose lengths do not count
        values = rng.normal(0, np.prod(shape[1:]) ** -0.5, shape)
    return values.astype(np.float32)


def as_ours(x: Any) -> np.ndarray:
    """Pictures channels last; sequences and ids as they are."""
    x = x.detach().numpy()
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1) if x.ndim == 4 else x)


def record(model: Any, images: Any) -> dict[str, np.ndarray]:
    """What the blocks wrote, in the order in which they ran, and the ids."""
    backbone = "encoder.patch_embed.backbone"
    names = [f"{backbone}.stem", f"{backbone}.pool", "encoder.norm", "quant_proj"]
    names += ["post_quant_proj", "decoder.norm", "decoder.up_conv1", "decoder.up_conv4"]
    for name, _ in model.named_modules():
        parent, _, last = name.rpartition(".")
        if last.isdigit() and parent.startswith(
            (f"{backbone}.stages.", "encoder.blocks", "decoder.blocks", "decoder.up_conv")
        ):
            names.append(name)
    written: dict[str, np.ndarray] = {}
    modules, hooks = dict(model.named_modules()), []
    for name in names:

        def keep(module, inputs, output, name=name):
            written[name] = as_ours(output)

        hooks.append(modules[name].register_forward_hook(keep))
    features = model.quant_proj(model.encoder(images).float())
    ids = model.quantizer.f_to_idx(features)
    codes = model.quantizer.idx_to_f(ids)
    written["quantizer"] = as_ours(codes)
    model.decoder(model.post_quant_proj(codes))
    written["tokens"] = as_ours(ids.transpose(1, 2))
    for hook in hooks:
        hook.remove()
    return written


def original(source: Path, out: Path, small: bool) -> None:
    """Runs the original at the released size, or a small model of its classes, and saves it all."""
    import torch

    model = build(source, small)
    rng = np.random.default_rng(SEED)
    images = picture(rng, 1, SMALL[3] if small else RELEASED[3])
    weights = {n: random_weight(rng, n, tuple(w.shape)) for n, w in model.state_dict().items()}
    kept = {n: torch.from_numpy(w) for n, w in weights.items()}
    with torch.no_grad():
        x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        model.load_state_dict(kept)
        # spread around zero, the vectors choose many different codes
        mean = model.quant_proj(model.encoder(x)).mean(dim=(0, 1))
        kept["quant_proj.mlp.w2.bias"] -= mean
        if small:  # half the file: the model has the values that half precision can tell
            kept = {n: w.half() for n, w in kept.items()}
        model.load_state_dict({n: w.float() for n, w in kept.items()})
        written = record(model, x)
        exact = model.double()
        features = exact.quant_proj(exact.encoder(x.double()))
        codes = torch.from_numpy(written["quantizer"]).double()
        again = exact.decoder(exact.post_quant_proj(codes))
        books = [
            torch.nn.functional.normalize(c.codebook.weight, dim=1).numpy()
            for c in exact.quantizer.codebooks
        ]
    tokens = written.pop("tokens")
    chunked = written["quant_proj"].astype(np.float64).reshape(*tokens.shape, -1)
    chunked /= np.linalg.norm(chunked, axis=-1, keepdims=True)
    cosine = np.sort(np.einsum("bnkd,kvd->bnkv", chunked, np.stack(books)), axis=-1)
    margins = cosine[..., -1] - cosine[..., -2]
    order = list(written)
    arrays = {"images": images, "tokens": tokens.astype(np.int32), "margins": margins}
    arrays |= {f"written.{i:03}.{n}": written[n] for i, n in enumerate(order)}
    facts = {
        "float32 against float64": {
            "encoder": relative_l2(written["quant_proj"], as_ours(features)),
            "decoder": relative_l2(written["decoder.up_conv4"], as_ours(again)),
        },
        "distinct tokens": [len(np.unique(tokens[..., k])) for k in range(tokens.shape[-1])],
        "smallest margin": float(margins.min()),
        "ties": int((margins <= TIE).sum()),
        "rms": {n: float(np.sqrt(np.mean(x**2))) for n, x in written.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    args = OrderedDict(model="vitamin_large", img_size=images.shape[1], dtype=torch.float32)
    torch.save(
        {"args": args, "epoch": 0, "iter": 0, "trainer": {"unitok": OrderedDict(kept)}},
        out / "weights.pth",
    )
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()},
        out / "activations.safetensors",
        metadata={key: json.dumps(value) for key, value in facts.items()},
    )
    for key, value in facts.items():
        print(f"{key}: {value}")


def ours(name: str) -> Any:
    """The function of ours that does what their module does on what the one before it wrote."""
    name = name.replace("encoder.patch_embed.backbone.stages.", "encoder.patch_embed.stages.")
    name = name.replace("decoder.up_conv2.", "decoder.tail.up.stages.0.")
    name = name.replace("decoder.up_conv3.", "decoder.tail.up.stages.1.")

    def run(m, x):
        from fourdstar_jax.nn.conv import upsampled_conv
        from fourdstar_jax.nn.vit import gelu

        stem, tail = m.encoder.patch_embed, m.decoder.tail
        match name:
            case "encoder.patch_embed.backbone.stem":
                return stem.conv2(gelu(stem.norm1(stem.conv1(x))))
            case "encoder.patch_embed.backbone.pool":
                return stem.pool(stem.pool_norm(x))
            case "quantizer":
                return m.quantizer.codes(m.quantizer.encode(x))
            case "decoder.up_conv1":
                return upsampled_conv(tail.up.up_conv1, x.reshape(grid(x)))
            case "decoder.up_conv4":
                return tail.conv2(gelu(tail.norm1(upsampled_conv(tail.conv1, x))))
        block = m
        for part in name.split("."):
            block = block[int(part)] if part.isdigit() else getattr(block, part)
        if name.startswith("encoder.blocks.0"):
            x = x.reshape(len(x), -1, x.shape[-1])
        return block(x)

    def grid(x):
        side = round(x.shape[1] ** 0.5)
        return (len(x), side, side, x.shape[-1])

    return run


def compare(folder: Path) -> list[Row]:
    """A row for every block, for both halves and for the tokens, of what `original` saved."""
    import jax
    import jax.numpy as jnp

    from fourdstar_jax import sharding

    arrays = safetensors.numpy.load_file(folder / "activations.safetensors")
    images, their_tokens = arrays["images"], arrays["tokens"]
    chain = [(n.split(".", 2)[2], arrays[n]) for n in sorted(arrays) if n.startswith("written.")]
    written = dict(chain)
    clear = arrays["margins"] > TIE
    rows = []

    def row(block: str, value: float, limit: float) -> None:
        rows.append(Row("unitok", block, value, limit))

    def wrong(tokens: Any) -> float:
        """Share of tokens that differ where it is clear which code is nearest."""
        return float(np.mean((np.asarray(tokens) != their_tokens)[clear]))

    with jax.default_matmul_precision("highest"), sharding.use_mesh(devices=jax.devices()[:1]):
        model = load("unitok", folder / "weights.pth", resolution=images.shape[1])
        before = images
        for name, theirs in chain:
            mine = np.asarray(jax.jit(ours(name))(model, jnp.asarray(before)))
            if name == "quantizer":  # whole tokens: a tie may fall either way
                kept = np.all(clear, axis=-1)
                mine, theirs_kept = mine[kept], theirs[kept]
                row(name, relative_l2(mine, theirs_kept), BLOCK_LIMIT)
            else:
                row(name, relative_l2(mine.reshape(theirs.shape), theirs), BLOCK_LIMIT)
            before = theirs
        features = jax.jit(lambda m, x: m._features(x))(model, images)
        row("encoder", relative_l2(features, written["quant_proj"]), END_TO_END_LIMIT)
        decoded = jax.jit(lambda m, x: m._images(x))(model, written["quantizer"])
        last = written["decoder.up_conv4"]
        row("decoder", relative_l2(decoded, last), END_TO_END_LIMIT)
        near = jax.jit(lambda m, x: m.quantizer.encode(x))(model, written["quant_proj"])
        row("quantizer: wrong tokens", wrong(near), 0.0)
        # Theirs take and give pictures in [-1, 1], ours in [0, 1].
        tokens = jax.jit(lambda m, x: m.encode((x + 1) / 2))(model, images)
        row("images to tokens: wrong tokens", wrong(tokens), 0.0)
        # Where a tie fell the other way the pictures may differ by right.
        if np.array_equal(tokens, their_tokens):
            again = jax.jit(lambda m, x: 2 * m.decode(x) - 1)(model, tokens)
            value = relative_l2(again, np.clip(last, -1, 1))
            row("images to tokens to images", value, END_TO_END_LIMIT)
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("original")
    command.add_argument("--source", type=Path, required=True, help="checkout of UniTok")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--small", action="store_true", help="a model of a few hundred KB")
    commands.add_parser("compare").add_argument("folder", type=Path)
    parsed = parser.parse_args(arguments)
    if parsed.command == "original":
        original(parsed.source, parsed.out, parsed.small)
        return 0
    return print_rows(compare(parsed.folder))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
