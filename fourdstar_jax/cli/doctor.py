"""`fourdstar doctor`: versions, devices and what is missing."""

import argparse

import fourdstar_jax
from fourdstar_jax.cli.common import BUNDLED_MODEL, TRAINING_PACKAGES

SUMMARY = "tell versions, devices and what is missing"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(arguments: argparse.Namespace) -> None:
    import ctypes
    import importlib.metadata
    import os
    import platform
    import shutil

    print(f"fourdstar_jax {fourdstar_jax.__version__}")
    print(f"python {platform.python_version()} on {platform.platform()}")
    needed = ("jax", "jaxlib", "flax", "numpy", "av", "pillow", "safetensors")
    for kind, names in (("", needed), (" (for training)", TRAINING_PACKAGES)):
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
    free = shutil.disk_usage(".").free / 2**30
    print(f"{os.cpu_count()} processors, {free:.0f} GiB free here")
    import jax

    for device in jax.devices():
        print(f"device {device.id}: {device.platform} ({device.device_kind})")
