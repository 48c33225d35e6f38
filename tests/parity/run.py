"""Remakes the table of how far our ports are from the original PyTorch modules, at full size.

    python tests/parity/run.py --python PYTORCH_PYTHON --unitok CHECKOUT --llamagen CHECKOUT

`--python` is an interpreter with PyTorch, timm 1.0.8, transformers, safetensors and tokenizers;
the checkouts are of FoundationVision/UniTok and FoundationVision/LlamaGen. Each original runs there
with random weights at the released size, then ours runs here in float32 on what it saved. Without
`--out` the table goes to tests/parity/tokenizers.md. About five minutes on two cores.
"""

import argparse
import importlib
import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

import common

HERE = Path(__file__).parent
HEAD = """# The ports against the original PyTorch modules

Random weights at the released sizes, float32 on a CPU ({versions}). Every block is given what
the original's block before it wrote. Remade by `tests/parity/run.py`, which says what it needs.
Relative L2 error; the limits are 1e-5 for a block, 5e-5 for a whole half, and no token may differ
where the two best codes are more than 1e-5 apart.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="interpreter with PyTorch")
    parser.add_argument("--unitok", type=Path, required=True, help="checkout of UniTok")
    parser.add_argument("--llamagen", type=Path, required=True, help="checkout of LlamaGen")
    parser.add_argument("--out", type=Path, default=HERE / "tokenizers.md")
    parsed = parser.parse_args()
    runs = {
        "UniTok": ("unitok", ["--source", str(parsed.unitok)]),
        "VQ-16": ("vq16", ["--source", str(parsed.llamagen)]),
        "T5, base width, two layers": ("t5", ["--layers", "2", "--width", "base"]),
        "T5, XL width, one layer": ("t5", ["--layers", "1", "--width", "xl"]),
    }
    versions = subprocess.run(
        [parsed.python, "-c", "import torch; print('torch', torch.__version__.split('+')[0])"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    versions += "".join(f", {n} {importlib.metadata.version(n)}" for n in ("jax", "flax"))
    lines, failures = [HEAD.format(versions=versions)], 0
    for title, (script, options) in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [parsed.python, str(HERE / f"{script}.py"), "original", "--out", folder]
            subprocess.run([*command, *options], check=True)
            rows = importlib.import_module(script).compare(Path(folder))
        print(title)
        failures += common.print_rows(rows)
        lines += [f"## {title}\n", "| block | error | limit |", "| --- | --- | --- |"]
        lines += [f"| {r.block} | {r.relative_l2:.1e} | {r.limit:.0e} |" for r in rows]
        lines.append("")
    parsed.out.write_text("\n".join(lines))
    print(f"{failures} above their limits: {parsed.out}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
