"""SIGTERM and SIGINT end every command within seconds, its processes and partial folders too."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fourdstar_jax.cli import BUNDLED_MODEL
from tests.helpers import glb

LIMIT_S = 5.0
SIGNALS = [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]


def processes():
    """pid -> parent's pid, of all that run."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            found[int(stat.parent.name)] = int(parent)
    return found


def below(pid):
    parents = processes()
    found, more = set(), {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in more}
        found |= more
    return found


def end(argv, number, *, when, timeout_s=60.0):
    """Starts a command, sends it the signal as soon as `when()`: exit code, stderr, seconds."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fourdstar_jax.cli", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    begun = time.monotonic()
    while process.poll() is None and not when(process.pid):
        assert time.monotonic() - begun < timeout_s, "it never came that far"
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    family = below(process.pid)
    start = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    took = time.monotonic() - start
    time.sleep(0.2)  # for the kernel to take away what was killed
    left = {pid for pid in family if pid in processes()}
    return process.returncode, errors.strip().splitlines(), took, family, left


def check(result, code, word):
    returned, lines, took, _, left = result
    assert (returned, lines[-1:], left) == (code, [f"fourdstar: {word}"], set())
    # a bar or a clock may be there already, or what a training begins with
    other = re.compile(r"^$|^the run |step/s|^loading: |^encoding: ")
    said = [line for line in lines if not other.search(line)]
    assert len(said) == 1 and took < LIMIT_S


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Many files that move, so that rendering them takes a while."""
    folder = tmp_path_factory.mktemp("assets")
    data = glb.moving_box()
    for i in range(400):
        (folder / f"box_{i}.glb").write_bytes(data)
    return folder


@pytest.mark.parametrize("number, code, word", SIGNALS)
def test_prepare_with_workers(assets, tmp_path, number, code, word):
    argv = ["prepare", "--assets", assets, "--out", tmp_path / "o", "--workers", "2"]
    argv += ["--image_size", "512"]
    result = end(
        argv, number, when=lambda pid: list(tmp_path.glob(".o.partial*/work/done/*/*/*.npz"))
    )
    check(result, code, word)
    assert len(result[3]) >= 2 and list(tmp_path.iterdir()) == []


def test_prepare_that_is_killed_leaves_no_workers(assets, tmp_path):
    argv = ["prepare", "--assets", assets, "--out", tmp_path / "o", "--workers", "2"]
    result = end(
        argv,
        signal.SIGKILL,
        when=lambda pid: list(tmp_path.glob(".o.partial*/work/done/*/*/*.npz")),
    )
    assert result[0] == -signal.SIGKILL and len(result[3]) >= 2 and result[4] == set()


@pytest.mark.parametrize("number, code, word", SIGNALS)
def test_generate_while_it_loads_and_compiles(tmp_path, number, code, word):
    """Python gets no turn in the main thread while that compiles."""
    argv = ["generate", "--video", BUNDLED_MODEL / "example.mp4", "--out", tmp_path / "o"]
    begun = []

    def when(pid):
        if not begun and list(tmp_path.glob(".o.partial*")):
            begun.append(time.monotonic())
        return begun and time.monotonic() - begun[0] > (2 if number == signal.SIGINT else 5)

    check(end(argv, number, when=when), code, word)
    assert list(tmp_path.iterdir()) == []


def test_train(dataset_dir, tmp_path):
    argv = ["train", "--config=configs/tokenizer.py:tiny", f"--workdir={tmp_path / 'o'}"]
    argv += [f"--config.data.dir={dataset_dir}", "--config.batch_size=2"]
    result = end(argv, signal.SIGTERM, when=lambda pid: (tmp_path / "o").exists())
    check(result, 143, "terminated")
    assert result[2] < LIMIT_S and result[4] == set()


def test_what_a_library_would_swallow_still_ends_it(tmp_path):
    """A signal in a callback of C code, of which Python prints and forgets the exceptions."""
    script = tmp_path / "swallow.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from fourdstar_jax import signals\n"
        "class Swallows:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(0.1)\n"
        "with signals.ending():\n"
        "    x = Swallows()\n"
        "    del x\n"
        "    time.sleep(30)\n"
    )
    start = time.monotonic()
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (130, "fourdstar: interrupted\n")
    assert time.monotonic() - start < LIMIT_S


ANSWERS = """
import os, signal, sys, time
from fourdstar_jax import signals
with signals.ending(), signals.answered() as request:
    signals.answer()
    for step in range(1000):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        if request.number and step == 10:
            print("saved")
            raise signals.Stopped(request.number)
"""


@pytest.mark.parametrize(("second", "saved"), [(-1, "saved\n"), (5, "")])
def test_a_signal_can_be_answered_and_a_second_one_ends(second, saved):
    command = [sys.executable, "-c", ANSWERS, str(second)]
    start = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True)
    assert time.monotonic() - start < LIMIT_S
    assert result.returncode == 143 and result.stdout == saved
    first, last = result.stderr.splitlines()
    assert "saves, then ends" in first and last == "fourdstar: terminated"
