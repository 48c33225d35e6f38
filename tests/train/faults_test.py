"""Real runs of `fourdstar train`, killed, spread over processes and continued."""

import contextlib
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from fourdstar_jax import bundle, processes, timing
from fourdstar_jax.data import prepare
from fourdstar_jax.train import ending

CONFIG = "tests/helpers/small_tokenizer.py"
STEPS = 12
# What differs between two runs.
CLOCKS = ("steps_per_s", "data_wait", "objects_per_s", "tokens_per_s", "tflops")
CLOCKS += ("goodput", "time", "kept_s")
LIMIT_S = 300.0  # for a run on a busy machine


@pytest.fixture(scope="module")
def data_dir(objects_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("faults") / "data"
    prepare.prepare(
        objects_dir, out, image_size=16, views=2, extra_views=1, max_frames=3, workers=0,
        log=lambda line: None,
    )  # fmt: skip
    return out


@contextlib.contextmanager
def started(data_dir, workdir, *, count=1, config=()):
    """The processes of a run, each with one device."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    run = []
    for index in range(count):
        environ = {
            **os.environ,
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
            "PYTHONUNBUFFERED": "1",
        }
        if count > 1:
            environ |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
        words = ["train", f"--config={CONFIG}", f"--config.data.dir={data_dir}", *config]
        words = [sys.executable, "-m", "fourdstar_jax.cli", *words, f"--workdir={workdir}"]
        pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        run.append(subprocess.Popen(words, env=environ, **pipes))
    try:
        yield run
    finally:
        for process in run:
            process.kill()
            process.communicate()


def ended(run):
    """Exit codes and error streams."""
    errors = [process.communicate(timeout=LIMIT_S)[1] for process in run]
    return [process.returncode for process in run], errors


def rows(workdir):
    """Metrics of each step; of one that was done twice, those of the last time."""
    path, found = workdir / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):  # it was killed while it wrote
            row = json.loads(line)
            found.setdefault(row["step"], {}).update(row)
    return found


def curve(workdir):
    return {
        step: {name: x for name, x in row.items() if name.partition("/")[2] not in CLOCKS}
        for step, row in rows(workdir).items()
    }


def reaches(run, workdir, step):
    """Waits until a run has done a step; fails if it ends before."""
    begun = time.monotonic()
    while max(rows(workdir), default=0) < step:
        assert all(process.poll() is None for process in run), ended(run)
        assert time.monotonic() - begun < LIMIT_S, "it never came that far"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    with started(data_dir, workdir) as run:
        assert ended(run)[0] == [0]
    assert sorted(rows(workdir)) == list(range(1, STEPS + 1))
    return workdir


def weights(workdir):
    return bundle.read(workdir / "bundle").weights_sha256()["tokenizer"]


def killed_and_continued(data_dir, workdir, kills, config):
    """The last step in its log at each kill before it came to its end."""
    rng, reached = random.Random(0), []
    for _ in range(kills):
        with started(data_dir, workdir, config=config) as (process,):
            before = max(rows(workdir), default=0)
            begun = time.monotonic()
            while process.poll() is None and max(rows(workdir), default=0) <= before:
                assert time.monotonic() - begun < LIMIT_S
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.6))
            process.send_signal(signal.SIGKILL)
            if process.wait(LIMIT_S) == 0:
                break
            reached.append(max(rows(workdir), default=0))
    return reached


def record(name, **figures):
    """Leaves figures of a test, and what they were measured with, in the folder RESULTS names."""
    if folder := os.environ.get("RESULTS"):
        path = pathlib.Path(folder) / f"{name}.json"
        path.write_text(json.dumps(timing.describe() | figures, indent=1) + "\n")


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_comes_to_the_same_end(
    kills, data_dir, undisturbed, tmp_path
):
    """Bit for bit. Many kills need a longer run, which is compared with one of its own."""
    config, straight = (), undisturbed
    if kills > 3:
        config, straight = (f"--config.steps={4 * kills}",), tmp_path / "straight"
        with started(data_dir, straight, config=config) as run:
            assert ended(run)[0] == [0]
    again, begun = tmp_path / "again", time.monotonic()
    reached = killed_and_continued(data_dir, again, kills, config)
    assert len(reached) > 0.6 * kills
    with started(data_dir, again, config=config) as run:
        assert ended(run)[0] == [0]
    assert curve(again) == curve(straight)
    assert weights(again) == weights(straight)
    if kills > 3:
        record(
            "kills_cpu",
            what="SIGKILL at random moments of a run that saves every second step",
            kills=len(reached),
            last_logged_step_at_each=reached,
            steps=max(rows(again)),
            seconds=round(time.monotonic() - begun),
            curve_and_weights_bit_equal_to_an_undisturbed_run=True,
            weights_sha256=weights(again),
        )


@pytest.mark.parametrize("then", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_two_processes_are_as_one_and_another_number_goes_on(then, data_dir, undisturbed, tmp_path):
    """Two processes until one of them dies after the fifth step; then one, or three."""
    with started(data_dir, tmp_path, count=2) as run:
        reaches(run, tmp_path, 5)
        run[1].send_signal(signal.SIGKILL)
        begun = time.monotonic()
        codes, errors = ended(run)
        assert time.monotonic() - begun < 30
        assert codes == [processes.EXIT_LOST, -signal.SIGKILL]
        assert f"process 1 of 2 ({socket.gethostname()}, pid {run[1].pid}) is gone" in errors[0]
        assert "Traceback" not in errors[0]
    with started(data_dir, tmp_path, count=then) as run:
        codes, errors = ended(run)
        assert codes == [0] * then, errors
    found, wanted = rows(tmp_path), rows(undisturbed)
    assert sorted(found) == sorted(wanted)
    for step, row in wanted.items():
        np.testing.assert_allclose(found[step]["train/loss"], row["train/loss"], rtol=1e-5)


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_signal_saves_and_the_run_goes_on(count, data_dir, tmp_path):
    """To one of the processes; all of them save the same step."""
    config = ("--config.checkpoint_every=1000", "--config.steps=150")
    with started(data_dir, tmp_path, count=count, config=config) as run:
        reaches(run, tmp_path, 3)
        run[-1].send_signal(signal.SIGTERM)
        codes, errors = ended(run)
    assert codes == [143] * count
    assert "terminated: saves, then ends" in errors[-1]
    saved = [int(re.search(r"^saved step (\d+) in ", text, re.M)[1]) for text in errors]
    assert len(set(saved)) == 1 and saved[0] == max(rows(tmp_path))
    with started(data_dir, tmp_path, config=(config[0], f"--config.steps={saved[0] + 2}")) as run:
        assert ended(run)[0] == [0]
    assert sorted(rows(tmp_path)) == list(range(1, saved[0] + 3))


HANGS = """
import time, jax
from fourdstar_jax import sharding
from fourdstar_jax.train import ending
ending.LEAST_S = 1
with sharding.use_mesh(devices=jax.devices()[:1]) as mesh:
    watched = ending.Ending(mesh, times=10)
    for step in range(12):
        watched.begin()
        time.sleep(1.5 if step == 0 else 0.01)  # the first one compiles
        assert watched.asked() == 0
    time.sleep(2)  # an evaluation
    watched.begin()
    def stands_still():
        time.sleep(60)
    stands_still()
"""


def test_a_step_that_hangs_ends_the_run_with_its_stacks():
    result = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True)
    assert result.returncode == ending.EXIT_HUNG
    assert re.search(r"a step has taken \d s, where 0.01\d* s is usual", result.stderr)
    assert "in stands_still" in result.stderr


def test_a_reader_that_is_killed_ends_the_run(data_dir, tmp_path):
    """In one line that tells of it, and no reader stays behind."""
    config = ["--config.data.workers=2", "--config.steps=1000000"]
    with started(data_dir, tmp_path / "w", config=config) as run:
        reaches(run, tmp_path / "w", 2)
        (main,) = run
        listed = subprocess.run(
            ["ps", "-ww", "--ppid", str(main.pid), "-o", "pid=,args="],
            capture_output=True, text=True,
        )  # fmt: skip
        readers = [int(x.split()[0]) for x in listed.stdout.splitlines() if "spawn_main" in x]
        os.kill(readers[0], signal.SIGKILL)
        (code,), (error,) = ended(run)
    assert len(readers) == 2
    begun = time.monotonic()
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in readers):
        assert time.monotonic() - begun < LIMIT_S
        time.sleep(0.1)
    told = [line for line in error.splitlines() if line.startswith("fourdstar: ")]
    assert code == 2 and len(told) == 1  # Orbax may say more, if a save is under way
    assert "a process that reads the data is gone" in told[0] and "exit code -9" in told[0]
