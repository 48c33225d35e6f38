"""The notebook: as it was written, nothing of its outputs kept; every cell runs, in order."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fourdstar_jax

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "first_object.ipynb"
# What a notebook has and an interpreter has not, as far as the last cell uses it.
STUB = """
import sys, types
display = types.ModuleType("IPython.display")
display.HTML = lambda text: text
sys.modules["IPython"], sys.modules["IPython.display"] = types.ModuleType("IPython"), display
"""


def cells():
    content = json.loads(NOTEBOOK.read_text())
    assert content["nbformat"] == 4
    return [c for c in content["cells"] if c["cell_type"] == "code"]


def test_it_is_clean_and_names_what_is_there():
    seen = set()
    for cell in cells():
        assert cell["outputs"] == [] and cell["execution_count"] is None
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            match node:
                case ast.Attribute(value=ast.Name(id="fs"), attr=name) if name != "__file__":
                    assert name in fourdstar_jax.__all__
                    seen.add(name)
    assert {"load", "rasterize", "cluster_dpc_knn"} <= seen


@pytest.mark.slow
def test_it_runs(tmp_path):
    """In a process of its own, without this session's checks: a minute."""
    *most, last = ["".join(cell["source"]) for cell in cells()]
    page = last.rpartition("\n")[2]  # the last expression, which a notebook shows
    script = [*most, STUB, last.removesuffix(page), f"shown_page = {page}"]
    script += ["assert losses[-1] < 0.3 * losses[0], losses"]
    script += ["assert pictures.shape == (7, 4, 128, 128, 3) and 'srcdoc' in shown_page"]
    keep = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(script)],
        cwd=tmp_path, env=keep | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
