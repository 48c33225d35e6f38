"""Our VQ-16 against LlamaGen's own code, block by block, on the same random weights.

    python tests/parity/vq16.py original --source LLAMAGEN --out DIR [--small]
    python tests/parity/vq16.py compare DIR

The first needs PyTorch and a checkout of FoundationVision/LlamaGen and nothing of ours; the second
needs this package and no PyTorch. Of the original run are kept the weights (`weights.pth`, as the
released files are) and in `activations.safetensors` the image and what every block makes of it: the
blocks are a chain, each reads what the one before it wrote. `--small` made `fixtures/vq16`, with
half-precision weights in `weights.safetensors`.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import common
import numpy as np
import safetensors
import safetensors.numpy
from common import BLOCK_LIMIT, END_TO_END_LIMIT, TIE, Row, picture, relative_l2

SEED = 0


def original(source: Path, out: Path, small: bool) -> None:
    """Runs LlamaGen's VQ-16, or a small model of its classes, and saves what `compare` reads."""
    import torch

    sys.path.insert(0, str(source))
    vq = importlib.import_module("tokenizer.tokenizer_image.vq_model")
    torch.manual_seed(SEED)
    if small:
        sizes: dict[str, Any] = dict(ch=32, ch_mult=(2, 1), num_res_blocks=1, z_channels=16)
        model = vq.VQModel(vq.ModelArgs(codebook_size=64, z_channels=16))
        model.encoder, model.decoder = vq.Encoder(**sizes), vq.Decoder(**sizes)
        model.quantize.codebook_used = model.quantize.codebook_used[:64]
    else:
        model = vq.VQ_16()
    model.eval()

    rng = np.random.default_rng(SEED)
    images = picture(rng, *((2, 8) if small else (1, 256)))
    weights = {n: random_weight(rng, n, tuple(w.shape)) for n, w in model.state_dict().items()}
    kept = {n: torch.from_numpy(w) for n, w in weights.items()}
    if small:  # half the file: the model has the values that half precision can tell
        kept = {n: w.half() for n, w in kept.items()}
    model.load_state_dict({n: w.float() for n, w in kept.items()})

    with torch.no_grad():
        x = torch.from_numpy(images.transpose(0, 3, 1, 2))
        if not small:  # spread over the sphere, the vectors choose many different codes
            z = model.quant_conv(model.encoder(x))
            kept["quant_conv.bias"] -= z.mean(dim=(0, 2, 3))
            model.quant_conv.bias -= z.mean(dim=(0, 2, 3))
        written = record(model, x)
        tokens = model.encode(x)[2][2]
        again = model.double()
        z64 = again.quant_conv(again.encoder(x.double()))
        codes = torch.from_numpy(written["quantize"].transpose(0, 3, 1, 2)).double()
        exact = {"encoder": z64, "decoder": again.decode(codes)}
        book = torch.nn.functional.normalize(again.quantize.embedding.weight, dim=-1)
    z = written["quant_conv"].reshape(-1, book.shape[1]).astype(np.float64)
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    distances = 2 - 2 * np.sort(z @ book.numpy().T, axis=-1)[:, ::-1]
    arrays = {
        "images": images,
        "tokens": tokens.numpy().astype(np.int32).reshape(*written["quantize"].shape[:3]),
        "margins": (distances[:, 1] - distances[:, 0]).reshape(written["quantize"].shape[:3]),
    } | {f"written.{i:02}.{name}": array for i, (name, array) in enumerate(written.items())}
    own = {
        "encoder": relative_l2(written["quant_conv"], nhwc(exact["encoder"])),
        "decoder": relative_l2(written["decoder.conv_out"], nhwc(exact["decoder"])),
    }
    facts = {
        "float32 against float64": own,
        "distinct tokens": len(np.unique(arrays["tokens"])),
        "tokens": arrays["tokens"].size,
        "smallest margin": arrays["margins"].min(),
        "rms": {name: float(np.sqrt(np.mean(array**2))) for name, array in written.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    out.mkdir(parents=True, exist_ok=True)
    if small:
        safetensors.numpy.save_file(
            {n: w.numpy() for n, w in kept.items()}, out / "weights.safetensors"
        )
    else:
        torch.save({"model": kept}, out / "weights.pth")
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    facts = {key: json.dumps(value) for key, value in facts.items()}
    safetensors.numpy.save_file(arrays, out / "activations.safetensors", metadata=facts)
    for key, value in facts.items():
        print(f"{key}: {value}")


def random_weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values that keep activations near 1, with no weight of a norm at its start."""
    if name == "quantize.codebook_used":
        values = np.zeros(shape)
    elif "norm" in name:
        values = rng.normal(float(name.endswith("weight")), 0.2, shape)
    elif name.endswith("bias"):
        values = rng.normal(0, 0.1, shape)
    else:  # the convolutions and the codebook, whose lengths do not count
        values = rng.normal(0, np.prod(shape[1:]) ** -0.5, shape)
    return values.astype(np.float32)


def nhwc(x: Any) -> np.ndarray:
    return np.ascontiguousarray(x.detach().numpy().transpose(0, 2, 3, 1))


def record(model: Any, x: Any) -> dict[str, np.ndarray]:
    """What the blocks wrote, NHWC, in the order in which they ran."""
    written, hooks = {}, []
    kinds = ("ResnetBlock", "AttnBlock", "Downsample", "Upsample", "VectorQuantizer")
    outer = ("conv_in", "conv_out", "quant_conv", "post_quant_conv")
    for name, module in model.named_modules():
        if type(module).__name__ in kinds or name.split(".")[-1] in outer:

            def keep(module, inputs, output, name=name):
                written[name] = nhwc(output[0] if isinstance(output, tuple) else output)

            hooks.append(module.register_forward_hook(keep))
    model(x)
    for hook in hooks:
        hook.remove()
    return written


def compare(folder: Path) -> list[Row]:
    """A row for every block, for both halves and for the tokens, of what `original` saved."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from fourdstar_jax import sharding

    arrays = safetensors.numpy.load_file(folder / "activations.safetensors")
    images, their_tokens = arrays["images"], arrays["tokens"]
    chain = [(n.split(".", 2)[2], arrays[n]) for n in sorted(arrays) if n.startswith("written.")]
    written = dict(chain)
    clear = arrays["margins"] > TIE

    def ours(name: str) -> Any:
        """The function of ours that does what their module does on what the one before wrote."""
        if name == "quantize":
            return lambda m, x: m.quantizer.codes(m.quantizer.encode(x))

        def run(m, x):
            block = m
            if name.endswith(".conv_out"):  # they keep the picture before the norm
                half = getattr(m, name.split(".")[0])
                return half.conv_out(nnx.silu(half.norm_out(x)))
            for part in name.split("."):
                block = block[int(part)] if part.isdigit() else getattr(block, part)
            return block(x)

        return run

    rows = []

    def row(block: str, value: float, limit: float) -> None:
        rows.append(Row("vq16", block, value, limit))

    def wrong(tokens: Any) -> float:
        """Share of tokens that differ where it is clear which code is nearest."""
        return float(np.mean((np.asarray(tokens).reshape(clear.shape) != their_tokens)[clear]))

    with jax.default_matmul_precision("highest"), sharding.use_mesh(devices=jax.devices()[:1]):
        model = load(folder, images.shape[1])
        before = images
        for name, theirs in chain:
            mine = np.asarray(jax.jit(ours(name))(model, jnp.asarray(before)))
            pixels = clear if name == "quantize" else np.ones(theirs.shape[:3], bool)
            row(name, relative_l2(mine[pixels], theirs[pixels]), BLOCK_LIMIT)
            before = theirs

        z = written["quant_conv"]
        flat = written["quantize"].reshape(len(z), -1, z.shape[-1])
        features = jax.jit(lambda m, x: m._features(x))(model, images)
        row("encoder", relative_l2(features, z.reshape(flat.shape)), END_TO_END_LIMIT)
        decoded = jax.jit(lambda m, x: m._images(x))(model, flat)
        last = written["decoder.conv_out"]
        row("decoder", relative_l2(decoded, last), END_TO_END_LIMIT)
        # Theirs take and give pictures in [-1, 1], ours in [0, 1].
        tokens = jax.jit(lambda m, x: m.encode((x + 1) / 2))(model, images)
        near = jax.jit(lambda m, x: m.quantizer.encode(x))(model, z)
        row("quantize: wrong tokens", wrong(near), 0.0)
        row("images to tokens: wrong tokens", wrong(tokens), 0.0)
        # Where a tie fell the other way the pictures may differ by right.
        if np.array_equal(np.asarray(tokens).reshape(clear.shape), their_tokens):
            again = jax.jit(lambda m, x: 2 * m.decode(x) - 1)(model, tokens)
            value = relative_l2(again, np.clip(last, -1, 1))
            row("images to tokens to images", value, END_TO_END_LIMIT)
    return rows


def load(folder: Path, resolution: int) -> Any:
    """Our tokenizer with the weights that `original` saved."""
    file = folder / "weights.pth"
    file = file if file.exists() else folder / "weights.safetensors"
    return common.load("vq16", file, resolution=resolution)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("original")
    command.add_argument("--source", type=Path, required=True, help="checkout of LlamaGen")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--small", action="store_true", help="a model of half a megabyte")
    commands.add_parser("compare").add_argument("folder", type=Path)
    parsed = parser.parse_args(arguments)
    if parsed.command == "original":
        original(parsed.source, parsed.out, parsed.small)
        return 0
    with safetensors.safe_open(parsed.folder / "activations.safetensors", "np") as file:
        print("the original, float32 against float64:", file.metadata()["float32 against float64"])
    return common.print_rows(compare(parsed.folder))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
