"""README's commands, and others', in order, in a fresh checkout without an environment."""

import base64
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from fourdstar_jax.export import page, read_splats
from tests.helpers import glb

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 1800


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def other_documents() -> list[str]:
    """Commands of docs/VIEWER.md, in a form that ends, and those that need nothing."""
    text = (ROOT / "docs" / "VIEWER.md").read_text()
    view, export = re.findall(r"^    (fourdstar .*)$", text, re.M)
    view = f"timeout --preserve-status -s INT 20 {view} --port 0"
    served = f"code=0; {view} || code=$?; [ $code = 130 ] || exit 1"
    return [
        "export PYTHONUNBUFFERED=1", served, export, "fourdstar evaluate --self-check",
        "fourdstar inspect", "fourdstar card", "fourdstar doctor",
    ]  # fmt: skip


@pytest.fixture
def checkout(tmp_path):
    """What git has, and the files that the README takes for the reader's own."""
    folder = tmp_path / "checkout"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("no checkout of git")
    for name in listed.stdout.decode().split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    video = folder / "fourdstar_jax" / "models" / "small" / "example.mp4"
    for name in ("your.mp4", "clip.mp4"):
        shutil.copy(video, folder / name)
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste((200, 60, 20), (20, 12, 44, 52))
    picture.save(folder / "fox.png")
    (folder / "ASSETS").mkdir()
    for i in range(4):
        data = glb.moving_box(0.5 + i / 4, color=(i / 4, 0.5, 1 - i / 4, 1.0))
        (folder / "ASSETS" / f"Box{i}.glb").write_bytes(data)
    rows = "".join(f"Box{i}.glb,CC0-1.0 (made here)\n" for i in range(4))
    (folder / "ASSETS" / "assets.csv").write_text(f"file,licence\n{rows}")
    return folder


def run(folder: Path, script: str, **more: str) -> str:
    keep = {
        k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "XLA_FLAGS")
    }
    keep["JAX_PLATFORMS"] = "cpu"
    keep["JAX_COMPILATION_CACHE_DIR"] = str(folder.parent / "compiled")  # the same model, 5 times
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder, env=keep | more, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert result.returncode == 0, f"{script}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout


def test_the_commands_are_the_ones_that_are_run():
    """A new block has to be thought of below."""
    first = [block.split()[0] for block in blocks("bash")]
    assert (
        first == ["./launch/demo.sh", "source", "./launch/tiny.sh"] and len(blocks("python")) == 1
    )


@pytest.mark.slow
def test_every_command_in_order(checkout):
    try_it, use_it, train_it = blocks("bash")
    run(checkout, try_it)
    assert {path.name for path in (checkout / "out").iterdir()} == {"demo", "yours"}
    gaussians, _ = read_splats(checkout / "out" / "demo" / "splats.safetensors")
    (shown,) = page.objects_in(checkout / "out" / "demo" / "viewer.html")
    # at least 8 times smaller than the 32 bytes of a .splat file's Gaussian
    assert len(base64.b64decode(shown["data"])) * 8 <= 32 * gaussians.opacities.size
    run(checkout, use_it)
    assert (checkout / "out" / "fox" / "splats.safetensors").is_file()
    assert (checkout / "out" / "files" / "spz" / "frame_0000.spz").is_file()
    run(checkout, "\n".join(["source .venv/bin/activate", *other_documents()]))
    assert (checkout / "out" / "fox-files" / "orbit.mp4").is_file()
    (checkout / "readme.py").write_text(blocks("python")[0])
    run(checkout, ".venv/bin/python readme.py")
    assert (checkout / "out" / "clip" / "manifest.json").is_file()
    run(checkout, train_it, STEPS="2")
    assert (checkout / "runs" / "tiny" / "star" / "bundle" / "model.json").is_file()
