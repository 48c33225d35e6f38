"""The original UniTok's side of `bench.py`: a script that needs torch and timm, not this package.

    python fourdstar_jax/tokenizer/bench_original.py UNITOK --batch 64 --repeats 20

UNITOK is a checkout of github.com/FoundationVision/UniTok, whose own modules it builds with random
weights and runs as `UniTok.forward` does: the encoder and the decoder under bfloat16 autocast,
projections and quantiser in float32 (TF32 products allowed, as in its training config), no
gradients, each direction under `torch.compile`. `--layouts` are tried in turn and the fastest of
each direction is reported. The last line of its output is JSON.

`measure` is the protocol of both sides.
"""

import argparse
import json
import platform
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

# By its path: the Python that runs this script need not have the package.
time_calls = runpy.run_path(str(Path(__file__).resolve().parents[1] / "timing.py"))["time_calls"]

WARM_UP = 3  # calls
ROUNDS = 5
LAYOUTS = ("contiguous", "channels_last")
# Imported by the original's modules, not used by what is timed.
UNUSED = (
    *("torchvision", "torchvision.transforms", "torchvision.transforms.functional"),
    *("torchvision.datasets", "torchvision.models", "torchvision.models.feature_extraction"),
    *("torchvision.ops", "torchvision.ops.misc", "tap", "pytz", "open_clip", "open_clip.model"),
)


def measure(
    call: Callable[[], Any], wait: Callable[[Any], Any], *, repeats: int, batch: int
) -> dict[str, Any]:
    """Times of one call after warm-up, and images a second.

    back_to_back_ms: of `repeats` calls with one wait after the last; the median of five rounds.
    sync_ms: with a wait after every call; the median of `repeats`.
    """
    times = time_calls(call, wait, warm_up=WARM_UP, repeats=repeats, rounds=ROUNDS)
    return dict(
        back_to_back_ms=times.back_to_back_ms,
        back_to_back_range_ms=[min(times.rounds), max(times.rounds)],
        sync_ms=times.sync_ms,
        images_per_s=1e3 * batch / times.back_to_back_ms,
    )


def _stub_missing() -> list[str]:
    stubbed = []
    for name in UNUSED:
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = mock.MagicMock()
            stubbed.append(name)
    if "tap" in stubbed:
        vars(sys.modules["tap"])["Tap"] = object  # a base class of its config
    return stubbed


def build(checkout: Path, device: str) -> tuple[Any, list[str]]:
    """The parts of the released model as `UniTok.__init__` makes them, and what was stubbed."""
    stubbed = _stub_missing()  # before timm, which imports torchvision
    import timm  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]

    sys.path.insert(0, str(checkout))
    from models.quant import VectorQuantizerM  # pyright: ignore[reportMissingImports]
    from models.vitamin import GeGluMlp, ViTaminDecoder  # pyright: ignore[reportMissingImports]
    from models.vqvae import AttnProjection  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    model = nn.Module()
    model.encoder = timm.create_model(
        "vitamin_large",
        patch_size=1,
        fc_norm=False,
        drop_rate=0.0,
        num_classes=0,
        global_pool="",
        pos_embed="none",
        class_token=False,
        mlp_layer=GeGluMlp,
        reg_tokens=0,
        img_size=256,
        drop_path_rate=0.1,
    )
    width, code = model.encoder.embed_dim, 64
    model.encoder.pos_embed = nn.Parameter(torch.zeros(1, 1, width), requires_grad=False)
    model.quant_proj = AttnProjection(width, code, width // code)
    model.quantizer = VectorQuantizerM(vocab_size=32768, vocab_width=code, num_codebooks=8)
    model.post_quant_proj = AttnProjection(code, width, width // code)
    model.decoder = ViTaminDecoder(
        "vitamin_large", num_query=0, img_size=256, drop_path=0.1, grad_ckpt=False
    )
    return model.eval().requires_grad_(False).to(device), stubbed


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch  # pyright: ignore[reportMissingImports]

    cuda = arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device")
    torch.set_float32_matmul_precision("high")
    model, stubbed = build(arguments.checkout, arguments.device)
    timm_version = sys.modules["timm"].__version__
    half = arguments.dtype == "bfloat16"

    def autocast():
        return torch.autocast(arguments.device, torch.bfloat16, enabled=half)

    def encode(images):
        with autocast():
            features = model.encoder(images)
        return model.quantizer.f_to_idx(model.quant_proj(features.float()))

    def decode(tokens):
        features = model.post_quant_proj(model.quantizer.idx_to_f(tokens))
        with autocast():
            images = model.decoder(features)
        return images.float().clamp(-1, 1)

    def wait(_):
        if cuda:
            torch.cuda.synchronize()

    tried: dict[str, dict[str, Any]] = {"encode": {}, "decode": {}}
    with torch.no_grad():
        for layout in arguments.layouts:
            form = getattr(
                torch, "contiguous_format" if layout == "contiguous" else "channels_last"
            )
            for parameter in model.parameters():
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=form)
            images = torch.rand(arguments.batch, 3, 256, 256, device=arguments.device) * 2 - 1
            tokens = torch.randint(0, 4096, (arguments.batch, 8, 256), device=arguments.device)
            images = images.contiguous(memory_format=form)
            for name, function, value in (("encode", encode, images), ("decode", decode, tokens)):
                if not arguments.no_compile:
                    torch.compiler.reset()
                    function = torch.compile(function)
                if cuda:
                    torch.cuda.empty_cache()
                start = time.perf_counter()
                wait(result := function(value))
                first_s = time.perf_counter() - start
                assert torch.isfinite(result).all(), name
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                line = measure(
                    lambda function=function, value=value: function(value),
                    wait,
                    repeats=arguments.repeats,
                    batch=arguments.batch,
                )
                line["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
                line["first_call_s"] = first_s
                tried[name][layout] = line
                print(
                    f"{name} {layout}: {line['images_per_s']:.1f} images/s, "
                    f"{line['back_to_back_ms']:.2f} ms, first call {first_s:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    results = {}
    for name, lines in tried.items():
        layout = min(lines, key=lambda k: lines[k]["back_to_back_ms"])
        results[name] = dict(lines[layout], layout=layout)
    return dict(
        **results,
        compiled=not arguments.no_compile,
        tried={
            name: {k: x["images_per_s"] for k, x in lines.items()} for name, lines in tried.items()
        },
        device=torch.cuda.get_device_name() if cuda else "cpu",
        stubbed=stubbed,
        versions=dict(
            torch=torch.__version__, timm=timm_version, torch_python=platform.python_version()
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    del sys.path[0]  # the folder of this script, whose modules are not the original's
    try:
        results = run(arguments)
    except ValueError as error:
        sys.exit(str(error))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
