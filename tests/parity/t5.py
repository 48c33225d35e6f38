"""Our T5 encoder against transformers' T5EncoderModel, block by block, with random weights.

    python tests/parity/t5.py original --out DIR    # by a Python with torch and transformers
    python tests/parity/t5.py original --out DIR --layers 1 --width xl
    python tests/parity/t5.py compare DIR           # ours, through convert/t5.py

`original` writes DIR/weights.bin (the state dict as torch saves it, aliases of the table included)
and activations.safetensors: input and output of every block and
sublayer for padded captions, the position bias, buckets of distances, and `error/<block>`, by how
much the original's own float32 differs from its float64. `--small` is what tests/parity/fixtures/t5
was made with; its weights are half-precision numbers.
"""

import argparse
import gzip
import json
import sys
from pathlib import Path

import numpy as np
from common import BLOCK_LIMIT, END_TO_END_LIMIT, Row, load, relative_l2

CAPTIONS = [
    "generate object of the following video",
    "a bull, attack headbutt",
    "a robot with three legs, walking slowly in a circle",
    "an apple",
]
SMALL = dict(d_model=64, num_heads=4, d_kv=16, d_ff=128, vocab_size=211)
WIDTHS = {
    "small": SMALL,
    "base": dict(d_model=768, num_heads=12, d_kv=64, d_ff=2048, vocab_size=32128),
    "xl": dict(d_model=2048, num_heads=32, d_kv=64, d_ff=5120, vocab_size=32128),
}
LENGTH, SMALL_LENGTH = 120, 14
DISTANCES = np.arange(-200, 201)


def fold(ids, vocab_size: int):
    """T5's ids in a small vocabulary; padding and end mark stay."""
    return np.where(ids > 1, 2 + ids % (vocab_size - 2), ids) if vocab_size < 32100 else ids


def original(out: Path, *, width: str, layers: int) -> None:
    """Runs transformers' encoder and saves its weights and activations."""
    import safetensors.numpy
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    small = width == "small"
    length = SMALL_LENGTH if small else LENGTH
    sizes = WIDTHS[width]
    torch.manual_seed(0)
    config = T5Config(
        **sizes,
        num_layers=layers,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        attn_implementation="eager",
    )
    model = T5EncoderModel(config).eval()
    with torch.no_grad():
        # transformers' initialisation keeps activations O(1); scales of one and a tiny bias would
        # hide mistakes
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            if "relative" in name:
                parameter.normal_()
            if small:
                parameter.copy_(parameter.half().float())

    file = Path(__file__).resolve().parents[2] / "fourdstar_jax/text/t5_tokenizer.json.gz"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(gzip.decompress(file.read_bytes()).decode()),
        pad_token="<pad>",
        eos_token="</s>",
    )
    encoded = tokenizer(
        CAPTIONS, padding="max_length", max_length=length, truncation=True, return_tensors="np"
    )
    tokens, mask = encoded["input_ids"], encoded["attention_mask"]
    ids = fold(tokens, sizes["vocab_size"])
    saved = {
        "tokens": tokens.astype(np.int32),
        "ids": ids.astype(np.int32),
        "mask": mask.astype(np.int32),
    }

    blocks = {"embed": model.encoder.embed_tokens, "final_norm": model.encoder.final_layer_norm}
    for i, block in enumerate(model.encoder.block):
        blocks |= {f"block{i}": block, f"block{i}/attention": block.layer[0]}
        blocks |= {f"block{i}/feed_forward": block.layer[1]}
    calls = {}

    def keep(name):
        def hook(module, args, kwargs, result):
            calls[name] = (args, kwargs, result)

        return hook

    def first(result):
        return result[0] if isinstance(result, tuple) else result

    handles = [m.register_forward_hook(keep(n), with_kwargs=True) for n, m in blocks.items()]
    ids, mask = torch.as_tensor(ids), torch.as_tensor(mask)
    with torch.no_grad():
        end = model(input_ids=ids, attention_mask=mask).last_hidden_state
        for handle in handles:
            handle.remove()
        attention = model.encoder.block[0].layer[0].SelfAttention
        saved["bias"] = attention.compute_bias(length, length)[0].numpy()
        buckets = attention._relative_position_bucket(
            torch.as_tensor(DISTANCES), bidirectional=True
        )
        saved["buckets"] = buckets.numpy().astype(np.int32)
        for name, (args, _, result) in calls.items():
            if name != "embed":
                saved[f"{name}/input"] = args[0].numpy()
            saved[f"{name}/output"] = first(result).numpy()
        saved["end_to_end/output"] = end.numpy()
        state = dict(model.state_dict())
        state["encoder.embed_tokens.weight"] = state["decoder.embed_tokens.weight"] = state[
            "shared.weight"
        ]
        if small:
            table = state["shared.weight"].half()
            state = {n: table if "embed" in n else x.half() for n, x in state.items()}
            state["shared.weight"] = table
        out.mkdir(parents=True, exist_ok=True)
        torch.save(state, out / "weights.bin")

        # the same calls in float64
        model.double()

        def doubled(x):
            if isinstance(x, tuple):
                return tuple(map(doubled, x))
            return x.double() if torch.is_tensor(x) and x.is_floating_point() else x

        for name, (args, kwargs, result) in calls.items():
            kwargs = {key: doubled(value) for key, value in kwargs.items()}
            exact = first(blocks[name](*doubled(args), **kwargs))
            error = relative_l2(first(result).numpy(), exact.numpy())
            saved[f"error/{name}"] = np.array(error)
        exact = model(input_ids=ids, attention_mask=mask).last_hidden_state
        saved["error/end_to_end"] = np.array(relative_l2(end.numpy(), exact.numpy()))
    saved = {name: np.ascontiguousarray(x) for name, x in saved.items()}
    about = {"width": width, "layers": layers, "captions": CAPTIONS, "torch": torch.__version__}
    safetensors.numpy.save_file(
        saved, out / "activations.safetensors", metadata={"about": json.dumps(about)}
    )
    scale = {n: round(float(np.std(x)), 3) for n, x in saved.items() if n.endswith("put")}
    print(f"{out}: standard deviations {scale}")


def compare(folder: str | Path) -> list[Row]:
    """A row for every block, sublayer and the whole encoder, each fed with the original's input."""
    import jax
    import jax.numpy as jnp
    import safetensors

    from fourdstar_jax.text import pieces, t5

    folder = Path(folder)
    file = folder / "weights.bin"
    encoder = load("t5", file if file.exists() else folder / "weights.safetensors")
    with safetensors.safe_open(folder / "activations.safetensors", "numpy") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}
        about = json.loads(file.metadata()["about"])
    ids, mask = jnp.asarray(saved["ids"]), jnp.asarray(saved["mask"]).astype(bool)
    bias = encoder.bias(ids.shape[1])
    name = f"t5 {about['width']} x{about['layers']}"
    tokens, seen = pieces.tokenize(about["captions"], ids.shape[1])
    rows = []

    def row(block, ours, theirs, limit=BLOCK_LIMIT):
        rows.append(Row(name, block, relative_l2(ours, theirs), limit))

    row("tokens", tokens, saved["tokens"], 0.0)
    row("mask", seen, saved["mask"], 0.0)
    row("buckets", t5.relative_buckets(DISTANCES), saved["buckets"], 0.0)
    row("position_bias", bias, saved["bias"])
    row("embed", encoder.table[...][ids], saved["embed/output"])
    with jax.default_matmul_precision("highest"):
        functions = {
            "": jax.jit(lambda layer, x: layer(x, bias, mask)),
            "/attention": jax.jit(lambda layer, x: layer.attend(x, bias, mask)),
            "/feed_forward": jax.jit(lambda layer, x: layer.feed_forward(x)),
        }
        for i in range(about["layers"]):
            layer = jax.tree.map(lambda x, i=i: x[i], encoder.layers)
            for part, function in functions.items():
                block = f"block{i}{part}"
                x = jnp.asarray(saved[f"{block}/input"])
                row(block, function(layer, x), saved[f"{block}/output"])
        x = jnp.asarray(saved["final_norm/input"])
        row("final_norm", encoder.norm(x), saved["final_norm/output"])
        whole = jax.jit(lambda encoder, ids, mask: encoder(ids, mask))(encoder, ids, mask)
        row("end_to_end", whole, saved["end_to_end/output"], END_TO_END_LIMIT)
    return rows


def own_errors(folder: str | Path) -> dict[str, float]:
    """The original's float32 against its float64, by block."""
    import safetensors

    with safetensors.safe_open(Path(folder) / "activations.safetensors", "numpy") as file:
        names = [name for name in file.keys() if name.startswith("error/")]
        return {name.removeprefix("error/"): file.get_tensor(name).item() for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    mode = modes.add_parser("original")
    mode.add_argument("--out", type=Path, required=True)
    mode.add_argument("--small", action="store_true", help="the fixture's sizes")
    mode.add_argument("--layers", type=int, default=2)
    mode.add_argument("--width", choices=["base", "xl"], default="base")
    mode = modes.add_parser("compare")
    mode.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.mode == "original":
        width = "small" if arguments.small else arguments.width
        original(arguments.out, width=width, layers=arguments.layers)
        return 0
    rows, own = compare(arguments.folder), own_errors(arguments.folder)
    for row in rows:
        error = f"{own[row.block]:9.1e}" if row.block in own else " " * 9
        verdict = "ok" if row.relative_l2 <= row.limit else "FAILED"
        line = f"{row.model:12} {row.block:22} {row.relative_l2:9.1e}  limit {row.limit:7.0e}"
        print(f"{line}  original's own {error}  {verdict}")
    return int(any(not row.relative_l2 <= row.limit for row in rows))


if __name__ == "__main__":
    sys.exit(main())
