"""The start scripts: what is missing is said in one line."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from fourdstar_jax.cli import read_config
from fourdstar_jax.cli.main import make_parser

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


def test_the_demo_takes_paths_from_where_it_is_called(checkout):
    shutil.copy(ROOT / "launch" / "demo.sh", checkout / "launch")
    (checkout / "launch" / "setup.sh").write_text("#!/bin/sh\n")
    (checkout / ".venv" / "bin").mkdir(parents=True)
    fake_python(checkout / ".venv" / "bin" / "fourdstar", 'pwd; echo "$@"')
    (elsewhere := checkout / "else where").mkdir()
    said = subprocess.run(
        ["bash", "../launch/demo.sh", "--video", "a b.mp4"],
        capture_output=True, text=True, check=True, cwd=elsewhere,
    ).stdout  # fmt: skip
    assert said == f"{elsewhere}\ngenerate --out out/demo --overwrite --video a b.mp4\n"


@pytest.mark.parametrize(
    "script",
    [
        "setup.sh",
        "test.sh",
        "demo.sh",
        "tiny.sh",
        "small.sh",
        "tables.sh",
        "wheel.sh",
        "release.sh",
        "slurm/train.sh",
        "slurm/prepare.sh",
        "tpu/train.sh",
        "tpu/verify.sh",
    ],
)
def test_scripts_can_be_run(script):
    path = ROOT / "launch" / script
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


def commands_of(folder, script, *argv, **environment):
    """What a script gives to `fourdstar`, which does nothing; read as `fourdstar` reads it."""
    (folder / ".venv/bin").mkdir(parents=True, exist_ok=True)
    (folder / "launch").mkdir(exist_ok=True)
    shutil.copy(ROOT / "launch" / script, folder / "launch")
    fake_python(folder / "launch/setup.sh", "exit 0")
    fake_python(folder / ".venv/bin/python", "exit 0")
    log = folder / f"{script}.log"
    fake_python(folder / ".venv/bin/fourdstar", f'printf "%s\\n" "$@" "" >> {log}')
    subprocess.run(
        ["bash", f"launch/{script}", *argv], cwd=folder, check=True, capture_output=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    commands = [words.split("\n") for words in log.read_text().strip("\n").split("\n\n")]
    for words in commands:
        arguments, more = make_parser().parse_known_args(words)
        if words[0] == "train":
            read_config(arguments.config, more)
        else:
            assert more == []
    return commands


def test_small_and_its_tables_give_flags_that_there_are(tmp_path):
    (tmp_path / "glb").mkdir()
    (tmp_path / "lpips.npz").touch()
    (tmp_path / "out/data").mkdir(parents=True)
    commands = commands_of(tmp_path, "small.sh", "glb", "lpips.npz", "out")
    assert [words[0] for words in commands] == (
        ["prepare"] * 2 + ["train"] * 2 + ["prepare", "train", "evaluate", "train"]
    )
    for part in ("data/manifest.json", "videos/manifest.json", "tokenizer/bundle", "vqvae/bundle"):
        (tmp_path / "out" / part).mkdir(parents=True)
    commands = commands_of(tmp_path, "tables.sh", "lpips.npz", "glb", "out", SEEDS="0 1")
    runs = [next(word for word in words if "workdir" in word) for words in commands[:4]]
    assert runs[1] == "--workdir=out/tables/vqvae_without_0" and len(set(runs)) == 4
    offsets = ["--config.model.offsets=" + value for value in ("True", "False")]
    assert all(offsets[i % 2] in commands[i] for i in range(4))
    tables = [words for words in commands if words[0] == "evaluate"]
    rows = [words[words.index("--rows") + 1 :] for words in tables]
    assert len(commands) == 4 + 12 + 2 + 2 and [len(row) for row in rows] == [4, 4, 12, 12]
    assert rows[2][8] == "baseline=out/tables/star_baseline_1/bundle"


def test_tables_spread_over_gpus_and_name_what_failed(tmp_path):
    """Two trainings on each of two at once, and none more; no table of what is not whole."""
    for part in ("data/manifest.json", "videos/manifest.json", "tokenizer/bundle", "vqvae/bundle"):
        (tmp_path / "out" / part).mkdir(parents=True)
    for folder in ("launch", "weights", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "lpips.npz").touch()
    script = shutil.copy(ROOT / "launch" / "tables.sh", tmp_path / "launch")
    fake_python(
        tmp_path / ".venv/bin/fourdstar",
        'echo "$CUDA_VISIBLE_DEVICES $XLA_PYTHON_CLIENT_MEM_FRACTION $*" >> log\n'
        "touch busy.$$; ls busy.* | wc -l >> busy; sleep 2; rm busy.$$\n"
        'case "$*" in *star_average_0*) exit 1; esac',
    )
    result = subprocess.run(
        ["bash", script, "lpips.npz", "weights", "out"], capture_output=True, text=True,
        cwd=tmp_path,
        env={
            **os.environ, "GPUS": "0 1", "EACH": "2", "SEEDS": "0", "TABLES": "4",
            "STAR": "--config.steps=5",
        },
    )  # fmt: skip
    said = "tables: star_average_0 failed, see out/tables/star_average_0.log\n"
    assert (result.returncode, result.stderr) == (1, said)
    commands = (tmp_path / "log").read_text().splitlines()
    where = [line[:6] for line in commands]
    assert sorted(where[:4]) == ["0 0.45"] * 2 + ["1 0.45"] * 2 and len(where) == 6
    assert all("train" in line and line.endswith("--config.steps=5") for line in commands)
    assert max(map(int, (tmp_path / "busy").read_text().split())) == 4


def test_a_release_stops_at_what_does_not_hold(tmp_path):
    """Before anything is installed: the tree, the version, its tag, the changelog."""
    for name in ("launch", "fourdstar_jax"):
        (tmp_path / name).mkdir()
    script = shutil.copy(ROOT / "launch" / "release.sh", tmp_path / "launch")
    version = tmp_path / "fourdstar_jax" / "__init__.py"
    changelog = tmp_path / "CHANGELOG.md"
    version.write_text('__version__ = "1.2"\n')
    changelog.write_text("# Changelog\n\n## Unreleased\n\n- New.\n\n## 1.2.3 - 2026-01-02\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]

    def refused(words, commit=True):
        if commit:
            subprocess.run([*git, "add", "-A"], check=True)
            subprocess.run([*git, "commit", "-qm", "x", "--allow-empty"], check=True)
        result = subprocess.run(
            ["bash", script, "--quick"], capture_output=True, text=True, cwd=tmp_path
        )
        assert result.returncode == 1 and result.stderr.count("\n") == 1, result
        assert words in result.stderr, result.stderr

    subprocess.run([*git, "init", "-q"], check=True)
    refused("not committed: ?? CHANGELOG.md", commit=False)
    refused("version '1.2' of")
    version.write_text('__version__ = "1.2.4"\n')
    refused("no section '## 1.2.4 - YYYY-MM-DD'")
    version.write_text('__version__ = "1.2.3"\n')
    refused("has 1 lines under Unreleased")
    subprocess.run([*git, "tag", "v1.2.3"], check=True)
    refused("tag v1.2.3 is there already")


@pytest.mark.slow
def test_the_wheel_works_by_itself(tmp_path):
    """Of a copy, so that no dist/ is left here."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    result = subprocess.run(
        [tmp_path / "launch" / "wheel.sh"], capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "works" in result.stdout.splitlines()[-1]


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


def dry_run(tmp_path, script, argv, fakes, **environment):
    """Exit code, calls of fake commands with their arguments, and stderr of a script."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    log = tmp_path / "calls"
    for tool in (*TOOLS, "git", "gzip", "mktemp", "rm"):
        if not (tmp_path / "bin" / tool).exists():
            (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    for name, body in fakes.items():
        fake_python(
            tmp_path / "bin" / name, f'printf "%s|" {name} "$@" >> {log}; echo >> {log}\n{body}'
        )
    result = subprocess.run(
        ["bash", str(ROOT / "launch" / script), *argv],
        capture_output=True, text=True, cwd=tmp_path,
        env={"PATH": str(tmp_path / "bin"), **environment},
    )  # fmt: skip
    calls = [line.split("|")[:-1] for line in log.read_text().splitlines()] if log.exists() else []
    return result.returncode, calls, result.stderr


RUN = {"CONFIG": "configs/star.py:paper", "WORKDIR": "/shared/run"}


@pytest.mark.parametrize(("code", "again"), [(0, False), (2, False), (75, True), (143, True)])
def test_slurm_starts_each_task_and_requeues_what_can_go_on(tmp_path, code, again):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    fake_python(tmp_path / ".venv/bin/fourdstar", "exit 0")
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "17"}
    found, calls, _ = dry_run(
        tmp_path, "slurm/train.sh", ["--config.seed=3"],
        {"srun": f"exit {code}", "scontrol": "exit 0"}, **slurm, **RUN,
    )  # fmt: skip
    words = ["train", "--config=configs/star.py:paper", "--workdir=/shared/run", "--config.seed=3"]
    assert found == code
    assert calls[0] == ["srun", "--kill-on-bad-exit=1", ".venv/bin/fourdstar", *words]
    assert calls[1:] == ([["scontrol", "requeue", "17"]] if again else [])


@pytest.mark.parametrize("script", ["slurm/train.sh", "tpu/train.sh"])
def test_launchers_say_in_one_line_what_is_missing(tmp_path, script):
    environment = {"SLURM_SUBMIT_DIR": str(tmp_path), "NAME": "pod", "ZONE": "z"}
    code, _, errors = dry_run(tmp_path, script, [], {}, **environment)
    assert code != 0 and "CONFIG: names the config" in errors and len(errors.splitlines()) == 1
    code, _, errors = dry_run(tmp_path, script, [], {}, **environment, **RUN)
    assert code == 2 and len(errors.splitlines()) == 1
    assert ("no .venv here" if "slurm" in script else "gcloud is missing") in errors


def test_tpu_starts_one_command_on_all_workers(tmp_path):
    code, calls, errors = dry_run(
        tmp_path, "tpu/train.sh", ["--config.data.dir=/mnt/my tokens"], {"gcloud": "exit 0"},
        NAME="pod", ZONE="z", **RUN,
    )  # fmt: skip
    assert code == 0, errors
    assert [call[4] for call in calls] == ["scp", "ssh", "ssh"]
    assert all("--worker=all" in call and "--zone=z" in call for call in calls)
    command = calls[-1][-1].removeprefix("--command=")
    assert command.startswith("cd fourdstar && .venv/bin/fourdstar train --config=configs/star.py")
    assert command.rstrip().endswith(r"--config.data.dir=/mnt/my\ tokens")


def filled(name, **values):
    text = (ROOT / "launch" / name).read_text()
    for key, value in values.items():
        text = text.replace("${" + key + "}", value)
    return text


def test_a_jobset_is_one_run_of_all_its_pods():
    values = dict(
        NAME="run", QUEUE="q", IMAGE="i", CLAIM="c", PODS="4", GPUS="8", WORKDIR="/data/run",
        ACCELERATOR="nvidia-h100-80gb", DATA="/data/tokens", CONFIG="configs/star.py:paper",
    )  # fmt: skip
    text = filled("gke/jobset.yaml", **values)
    assert "${" not in text
    jobset = yaml.safe_load(text)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 4 and spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    # a pod's name is JOBSET-JOB-REPLICA-INDEX, and the set's name is its domain
    assert environment == {
        "JAX_COORDINATOR_ADDRESS": f"run-{job['name']}-0-0.run:8476", "JAX_NUM_PROCESSES": "4",
    }  # fmt: skip
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    arguments = make_parser().parse_known_args(container["args"])[0]
    assert arguments.config == "configs/star.py:paper" and arguments.workdir == "/data/run"


def test_prepare_is_an_array_of_shards(tmp_path):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    fake_python(tmp_path / ".venv/bin/fourdstar", "exit 0")
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_PER_TASK": "16"}
    slurm |= {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MAX": "63"}
    folders = {"ASSETS": "/shared/my glb", "WORK": "/shared/work"}
    code, calls, _ = dry_run(
        tmp_path, "slurm/prepare.sh", ["--rigs", "2"], {"srun": "exit 0"}, **slurm, **folders
    )
    words = ["prepare", "--assets", "/shared/my glb", "--work", "/shared/work", "--shard", "3/64"]
    words += ["--workers", "16", "--rigs", "2"]
    assert code == 0 and calls == [["srun", ".venv/bin/fourdstar", *words]]
    assert make_parser().parse_args(words).shard == (3, 64)
    code, _, errors = dry_run(tmp_path, "slurm/prepare.sh", [], {}, **slurm)
    assert code != 0 and "ASSETS: names the folder" in errors


def test_prepare_is_a_job_with_an_index():
    values = dict(NAME="n", IMAGE="i", CLAIM="c", SHARDS="4", CPUS="8", ASSETS="/data/glb")
    text = filled("gke/prepare.yaml", **values, WORK="/data/work", SIZE="256")
    assert "${" not in text
    job = yaml.safe_load(text)
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"], spec["completionMode"]) == (
        "batch/v1",
        "Job",
        "Indexed",
    )
    assert spec["parallelism"] == spec["completions"] == 4
    (container,) = spec["template"]["spec"]["containers"]
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "2") for word in container["args"]]
    arguments = make_parser().parse_args(words)
    assert arguments.shard == (2, 4) and (arguments.workers, arguments.image_size) == (8, 256)


def test_prepare_keeps_its_work_in_a_bucket(tmp_path):
    """What was kept comes back first; at the end nothing is named before it is there."""
    task = yaml.safe_load(filled("skypilot/prepare.yaml", BUCKET="b"))
    script = task["run"].replace("/data", str(tmp_path)).replace("/tmp/work", str(tmp_path / "w"))
    kept = tmp_path / "work" / "1"
    kept.mkdir(parents=True)
    (kept / "settings.json").touch()
    log = tmp_path / "log"
    script = f'rsync() {{ echo rsync "$@" >> {log}; }}; sleep() {{ exit 0; }}\n' + script
    script = script.replace(".venv/bin/fourdstar", f"echo fourdstar >> {log}; echo")
    environment = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "PATH": os.environ["PATH"]}
    environment |= {name: str(value) for name, value in task["envs"].items()}
    result = subprocess.run(
        ["bash", "-euc", script], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    arguments = make_parser().parse_args(result.stdout.split())
    assert arguments.shard == (1, 2) and arguments.image_size == 256
    back, _, first, second = log.read_text().splitlines()
    assert back == f"rsync -r {kept}/ {tmp_path}/w"
    assert "--exclude=result.json" in first and "--exclude=result.json" not in second


def test_skypilot_names_its_nodes():
    task = yaml.safe_load(filled("skypilot/train.yaml", BUCKET="b"))
    assert set(task) <= {
        "name", "num_nodes", "resources", "envs", "workdir", "file_mounts", "setup", "run",
    }  # fmt: skip
    script = task["run"].replace(".venv/bin/fourdstar", "env | grep JAX_; echo")
    environment = {
        "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "PATH": os.environ["PATH"],
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    } | {name: str(value) for name, value in task["envs"].items()}  # fmt: skip
    out = subprocess.run(
        ["bash", "-euc", script], capture_output=True, text=True, env=environment
    ).stdout.splitlines()
    assert sorted(out[:3]) == [
        "JAX_COORDINATOR_ADDRESS=10.0.0.1:8476", "JAX_NUM_PROCESSES=2", "JAX_PROCESS_ID=1",
    ]  # fmt: skip
    assert out[3] == (
        "train --config=configs/star.py:paper --config.data.dir=/data/tokens "
        "--workdir=/data/runs/star"
    )


def test_the_image_copies_what_there_is():
    lines = (ROOT / "launch/gke/Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert all((ROOT / name).exists() for name in copied) and "fourdstar_jax" in copied
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert {"cuda", "tpu", "train"} <= set(extras)
