"""`fourdstar doctor`: versions, devices, what is missing, and usual mistakes."""

import argparse
import importlib.util
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import fourdstar_jax
from fourdstar_jax.cli.common import BUNDLED_MODEL, INSTALL_TRAINING, TRAINING_PACKAGES

SUMMARY = "tell versions, devices, what is missing and usual mistakes"
LITTLE_DISK = 20  # GiB
OPTIONAL = ("s3fs", "gcsfs", "wandb", "pillow-heif", "scikit-learn", "libtpu")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--licenses",
        action="store_true",
        help="list code, weights, data and every installed package with licence and commercial use",
    )


def run(arguments: argparse.Namespace) -> None:
    import ctypes
    import importlib.metadata
    import platform

    if arguments.licenses:
        from fourdstar_jax.cli import inventory

        for entry in (*inventory.OTHERS, *inventory.packages()):
            print(entry)
        return
    print(f"fourdstar_jax {fourdstar_jax.__version__}")
    print(f"python {platform.python_version()} on {platform.platform()}")
    needed = ("jax", "jaxlib", "flax", "numpy", "av", "pillow", "safetensors")
    groups = (("", needed), (" (for training)", TRAINING_PACKAGES), (" (optional)", OPTIONAL))
    for kind, names in groups:
        for name in names:
            try:
                print(f"{name} {importlib.metadata.version(name)}{kind}")
            except importlib.metadata.PackageNotFoundError:
                print(f"{name} missing{kind}")
    try:
        ctypes.CDLL("libEGL.so.1")
        print("libEGL there (for prepare)")
    except OSError:
        print("libEGL missing (for prepare): apt-get install libegl1 libgl1-mesa-dri")
    print(f"bundled model {'there' if BUNDLED_MODEL.exists() else 'missing'}: {BUNDLED_MODEL}")
    print(f"{os.cpu_count()} processors, {free_gib('.'):.0f} GiB free here")
    import jax

    from fourdstar_jax import timing

    for device in jax.devices():
        print(f"device {device.id}: {device.platform} ({device.device_kind})")
    if driver := timing.describe()["driver"]:
        print(f"driver {driver}")
    for line in processes_told():
        print(line)
    for line in mistakes(jax.default_backend()):
        print(f"note: {line}")


def free_gib(folder: str | os.PathLike[str]) -> float:
    """Free room of the disk that a folder is, or would be, on."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free / 2**30


def processes_told() -> Iterator[str]:
    """Where this process stands in a run of many, and whether the coordinator's port is usable."""
    from fourdstar_jax import processes

    try:
        place = processes.find()
    except ValueError as error:
        yield f"processes: {error}"
        return
    if place is None:
        yield "processes: one"
        return
    host, _, port = place.coordinator.rpartition(":")
    yield f"processes: this is {place.index} of {place.count}, coordinator {place.coordinator}"
    try:
        if place.index == 0:
            with socket.create_server(("", int(port))):
                yield f"port {port} is free"
        else:
            socket.getaddrinfo(host, int(port))
            yield f"host {host} has an address"
    except OSError as error:
        yield f"coordinator {place.coordinator}: {error.strerror or error}"


def mistakes(backend: str) -> Iterator[str]:
    """What often goes wrong and can be seen from here."""
    from fourdstar_jax import remote

    if any(importlib.util.find_spec(module) is None for module in TRAINING_PACKAGES.values()):
        yield f"packages that training needs are missing: {INSTALL_TRAINING}"
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if backend == "cpu" and shutil.which("nvidia-smi"):
        why = f"JAX_PLATFORMS={platforms}" if platforms else "pip install 'fourdstar-jax[cuda]'"
        yield f"there is an NVIDIA driver, but JAX uses the CPU: {why}"
    elif backend == "cpu" and Path("/dev/accel0").exists():
        yield "there is a TPU, but JAX uses the CPU: pip install 'fourdstar-jax[tpu]'"
    if backend == "gpu" and os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") == "false":
        yield "XLA_PYTHON_CLIENT_PREALLOCATE=false lets memory fragment in long trainings"
    for name, folder in (("this folder", "."), ("the cache of object stores", remote.cache())):
        if free_gib(folder) < LITTLE_DISK:
            yield f"{name} has {free_gib(folder):.0f} GiB left: checkpoints and data need more"
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).total < 1 << 30:
        yield "/dev/shm has less than 1 GiB: loader workers need more (docker run --shm-size=8g)"
    if "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ:
        yield "this is a Slurm job, but not a step of it: start training by srun"
