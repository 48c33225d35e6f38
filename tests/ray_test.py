"""launch/ray: each output there, once, though an actor is killed; skipped without Ray."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fourdstar_jax import signals
from fourdstar_jax.folders import OBJECT, is_of_kind

pytest.importorskip("ray.data", reason="Ray is not installed: pip install 'ray[data]'")
SCRIPT = Path(__file__).parents[1] / "launch" / "ray" / "generate.py"
ACTORS = 2


def actors(pid):
    """Numbers of the processes that generate, of a running script."""
    for child in signals._descendants(pid):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{child}/cmdline").read_bytes()
            if b"MapWorker(Map(Generator)" in words:
                yield child


@pytest.mark.slow
def test_an_actor_is_killed_and_a_video_is_bad(tmp_path, tiny_bundle):
    names = [f"box_{i}" for i in range(8)]
    for i, name in enumerate(names):
        image = np.full((24, 24, 3), 255, np.uint8)
        image[6 : 15 + i % 4, 8:16] = (200, 10 * i, 0)
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    bad = tmp_path / "box_5.png"
    bad.write_bytes(bad.read_bytes()[:-30])
    (tmp_path / "list.txt").write_text("".join(f"{name}.png\n" for name in names))
    out = tmp_path / "out"
    argv = [SCRIPT, "--videos", tmp_path / "list.txt", "--out", out, "--model", tiny_bundle]
    argv = [sys.executable, *map(str, argv), "--actors", str(ACTORS), "--gpus", "0", "--size=16"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while len([name for name in names if (out / name).is_dir()]) < 2:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        there = list(actors(process.pid))
        assert len(there) == ACTORS
        os.kill(there[0], signal.SIGKILL)
        said, _ = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 0, said
    made = {p.name: p.stat().st_mtime_ns for p in out.iterdir() if is_of_kind(p, OBJECT)}
    assert sorted(made) == [name for name in names if name != "box_5"]
    told = json.loads((out / "quarantined" / "box_5.json").read_text())
    assert "cannot be read" in told["reason"] and "7 made, 1 quarantined" in said
    again = subprocess.run(argv, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0 and again.stdout == "8 of 8 are done already\n"
    assert made == {p.name: p.stat().st_mtime_ns for p in out.iterdir() if p.name in made}
