"""The roll of a run's processes, by real processes without JAX; and JAX joined by it."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from fourdstar_jax import processes
from fourdstar_jax.processes import Place

SCRIPT = """
import sys, time
from fourdstar_jax import processes
index, count, port, timeout = map(int, sys.argv[1:5])
processes.GRACE_S = 0.2
place = processes.Place(index, count, f"localhost:{port}")
try:
    roll = processes.Roll(place, timeout_s=timeout)
except ValueError as error:
    print(error)
    sys.exit(2)
print("all here", flush=True)
if len(sys.argv) > 5:
    roll.close()
else:
    time.sleep(60)
"""
LIMIT_S = 15.0  # of a busy machine


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start(index, count, port, *more, timeout=3, script=SCRIPT):
    words = [sys.executable, "-c", script, *map(str, (index, count, port, timeout, *more))]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process):
    out, errors = process.communicate(timeout=LIMIT_S)
    return process.returncode, out, errors


def test_who_is_missing_is_named_to_all():
    port = free_port()
    came = [start(index, 4, port) for index in (0, 2)]
    for process in came:
        code, out, errors = end(process)
        assert code == 2 and errors == ""
        assert f"processes 1, 3 of 4 did not come to localhost:{port} within 3 s" in out
        assert f"(came: 2 on {socket.gethostname()}, pid {came[1].pid})" in out


def test_without_process_0_the_address_is_named():
    port = free_port()
    code, out, _ = end(start(1, 2, port, timeout=1))
    assert code == 2 and f"process 1 of 2 found no process 0 at localhost:{port}" in out
    assert "Connection refused" in out


def test_counts_and_numbers_must_agree():
    port = free_port()
    outs = [end(process)[1] for process in [start(0, 2, port), start(1, 3, port)]]
    assert all("says that there are 3 processes, process 0 that there are 2" in out for out in outs)
    port = free_port()
    outs = [end(process)[1] for process in [start(i, 3, port) for i in (0, 1, 1)]]
    assert all("there are two processes 1: on" in out for out in outs), outs


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        code, out, _ = end(start(0, 2, port))
    assert code == 2 and f"cannot listen at port {port}" in out and "in use" in out


@pytest.mark.parametrize("victim", [0, 2])
def test_the_others_end_when_one_dies_and_name_it(victim):
    port = free_port()
    all_of_them = [start(index, 3, port, timeout=LIMIT_S.__int__()) for index in range(3)]
    for process in all_of_them:
        assert process.stdout.readline() == "all here\n"
    all_of_them[victim].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    for index, process in enumerate(all_of_them):
        code, _, errors = end(process)
        if index == victim:
            assert code == -signal.SIGKILL
        else:
            pid = all_of_them[victim].pid
            assert code == processes.EXIT_LOST
            assert f"process {victim} of 3 ({socket.gethostname()}, pid {pid}) is gone" in errors
    assert time.monotonic() - begun < 5


def test_one_that_is_done_is_not_missed():
    port = free_port()
    done = [start(index, 3, port, "close") for index in (1, 2)]
    first = start(0, 3, port)
    for process in done:
        assert end(process) == (0, "all here\n", "")
    assert first.stdout.readline() == "all here\n"
    time.sleep(0.5)
    assert first.poll() is None
    first.kill()
    first.communicate()


JOINS = """
import sys
from fourdstar_jax import processes
index, count, port, timeout = map(int, sys.argv[1:5])
with processes.joined(processes.Place(index, count, f"localhost:{port}"), timeout_s=timeout):
    import jax
    from jax.experimental import multihost_utils
    print(multihost_utils.process_allgather(jax.numpy.array([index])).ravel().tolist(), flush=True)
    if len(sys.argv) > 5:
        if index:
            raise ValueError("no such thing")
        multihost_utils.sync_global_devices("never")
"""


def test_jax_is_joined_by_it(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    port = free_port()
    for process in [start(index, 2, port, timeout=60, script=JOINS) for index in (0, 1)]:
        code, out, _ = end(process)
        assert code == 0 and "[0, 1]" in out


def test_an_error_in_one_ends_all(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    port = free_port()
    pair = [start(index, 2, port, "raise", timeout=60, script=JOINS) for index in (0, 1)]
    codes, _, errors = zip(*map(end, pair), strict=True)
    assert codes == (processes.EXIT_LOST, processes.EXIT_FAILED)
    assert "process 1 of 2" in errors[0] and "ValueError: no such thing" in errors[1]


@pytest.fixture
def environ(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "JAX_", "OMPI_", "KUBERNETES_")):
            monkeypatch.delenv(name)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lambda **values: [monkeypatch.setenv(name, str(value)) for name, value in values.items()]


TOLD = {"JAX_NUM_PROCESSES": 4, "JAX_COORDINATOR_ADDRESS": "first:1234"}
SLURM = {
    "SLURM_JOB_ID": 4097,
    "SLURM_NTASKS": 8,
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": 5,
    "SLURM_LOCALID": 1,
}


def test_places_are_found(environ):
    assert processes.find() is None
    environ(**TOLD, JOB_COMPLETION_INDEX=2)
    assert processes.find() == Place(2, 4, "first:1234")
    environ(JAX_PROCESS_ID=3)
    assert processes.find() == Place(3, 4, "first:1234")
    environ(JAX_NUM_PROCESSES=1)
    assert processes.find() is None


def test_a_slurm_task_is_found(environ):
    environ(**SLURM)
    assert processes.find() == Place(5, 8, "gpu07:61441", (1,))
    environ(CUDA_VISIBLE_DEVICES="1")  # bound by Slurm: it is the only one
    assert processes.find() == Place(5, 8, "gpu07:61441")
    environ(CUDA_VISIBLE_DEVICES="0,1,2,3", SLURM_STEP_TASKS_PER_NODE="1(x8)")
    assert processes.find() == Place(5, 8, "gpu07:61441")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"SLURM_JOB_ID": 1, "SLURM_NTASKS": 8}, "start it by `srun"),
        ({**TOLD}, "JAX_PROCESS_ID is not set"),
        ({**TOLD, "JAX_PROCESS_ID": 4}, "JAX_PROCESS_ID is 4, and JAX_NUM_PROCESSES 4"),
        ({**TOLD, "JAX_PROCESS_ID": "two"}, "JAX_PROCESS_ID is 'two'"),
        ({**TOLD, "JAX_PROCESS_ID": 1, "JAX_COORDINATOR_ADDRESS": "first"}, "HOST:PORT"),
    ],
)
def test_what_does_not_go_together_is_told(environ, values, message):
    environ(**values)
    with pytest.raises(ValueError, match=message):
        processes.find()
