"""The start scripts: what is missing is said in one line."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("bash", "cat", "dirname", "env", "sha256sum")


@pytest.fixture
def checkout(tmp_path):
    """A folder with setup.sh and a PATH that has no Python."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "launch" / "setup.sh", tmp_path / "launch")
    for name in ("requirements.txt", "pyproject.toml"):
        (tmp_path / name).write_text("")
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    return tmp_path


def setup(checkout, *argv, **environment):
    result = subprocess.run(
        ["bash", str(checkout / "launch" / "setup.sh"), *argv],
        capture_output=True,
        text=True,
        env={"PATH": str(checkout / "bin"), "HOME": str(checkout), **environment},
    )
    return result.returncode, result.stderr.strip().splitlines()


def fake_python(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_no_python(checkout):
    code, lines = setup(checkout)
    assert code == 1 and len(lines) == 1
    assert "no Python 3.12 or 3.13" in lines[0] and "apt-get install" in lines[0]
    assert not (checkout / ".venv").exists()


def test_a_shim_that_does_not_run_and_an_old_python_do_not_count(checkout):
    fake_python(checkout / "bin" / "python3.13", "exit 127")
    fake_python(checkout / "bin" / "python3", "exit 1")  # what the version check of 3.11 gives
    code, lines = setup(checkout)
    assert code == 1 and len(lines) == 1 and "no Python 3.12 or 3.13" in lines[0]


def test_named_python_that_is_not_suitable(checkout):
    old = fake_python(checkout / "old", "exit 1")
    code, lines = setup(checkout, PYTHON=str(old))
    assert code == 1 and lines == [f"setup: PYTHON={old} is not Python 3.12 or 3.13"]


def test_python_without_venv(checkout):
    body = f'case "$*" in *ensurepip*) exit 1 ;; esac\nexec {sys.executable} "$@"'
    fake_python(checkout / "bin" / "python3", body)
    code, lines = setup(checkout)
    version = "{}.{}".format(*sys.version_info)
    assert code == 1 and len(lines) == 1
    assert f"apt-get install python{version}-venv" in lines[0]


def test_pyenv_is_searched(checkout):
    """It is found there, and only then does the making of the environment start (and fail)."""
    folder = checkout / ".pyenv" / "versions" / "3.12.9" / "bin"
    folder.mkdir(parents=True)
    body = f'case "$*" in "-m venv"*) exit 9 ;; esac\nexec {sys.executable} "$@"'
    fake_python(folder / "python", body)
    code, lines = setup(checkout)
    assert code == 9 and lines == [f"setup: making .venv with Python {sys.version.split()[0]}"]


def test_a_finished_installation_is_left_alone(checkout):
    """With the stamp of this lock nothing is installed: there is no pip to do it with."""
    (checkout / ".venv" / "bin").mkdir(parents=True)
    fake_python(checkout / ".venv" / "bin" / "python", "exit 0")
    hashed = subprocess.run(
        "cat requirements.txt pyproject.toml launch/setup.sh | sha256sum",
        shell=True, capture_output=True, text=True, cwd=checkout,
    ).stdout  # fmt: skip
    (checkout / ".venv" / ".fourdstar-run").write_text(hashed)
    assert setup(checkout, "run") == (0, [])


def test_unknown_profile(checkout):
    code, lines = setup(checkout, "everything")
    assert code == 1 and len(lines) == 1 and "run or dev" in lines[0]


@pytest.mark.parametrize("script", ["setup.sh", "test.sh", "demo.sh"])
def test_scripts_can_be_run(script):
    path = ROOT / "launch" / script
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


def test_requirements_are_pins():
    """Pins only, with no index of packages named, and all that pyproject.toml pins itself."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line.split(" ;")[0].split("==") for line in lines]
    assert all(len(pin) == 2 for pin in pins) and len(pins) > 50
    assert {"jax", "flax", "grain", "pytest"} <= {name for name, _ in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["train"]
    for name, version in (x.split("==") for x in wanted if "==" in x):
        assert [name, version] in pins, name
