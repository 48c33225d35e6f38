"""The command: bad input is one line and exit code 2, with nothing left behind."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import time
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fourdstar_jax as fs
from fourdstar_jax import arguments, bundle, cli, tokenizer
from fourdstar_jax.cli import doctor, inventory
from fourdstar_jax.cli.common import TRAINING_PACKAGES

ROOT = Path(__file__).resolve().parents[1]
MAIN = importlib.import_module("fourdstar_jax.cli.main")  # the package has a function so called


@pytest.fixture(autouse=True)
def mesh():
    """None, as for users; and what one test has compiled serves the next."""


def run(capsys, *argv):
    """Exit code, stdout and the lines of stderr of a call."""
    try:
        code = cli.main([str(word) for word in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err.strip().splitlines()


def picture(path, size=(40, 40)):
    image = np.full((*size, 3), 255, np.uint8)
    image[10:30, 12:28] = (180, 40, 40)
    Image.fromarray(image).save(path)
    return path


def test_help_is_there_in_a_second():
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", "fourdstar_jax.cli", "--help"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    elapsed = time.perf_counter() - start
    assert result.returncode == 0
    for command in MAIN.COMMANDS:
        assert command.SUMMARY.split()[0] in result.stdout
    assert "encode-text" in result.stdout
    # The process imports nothing slow; the margin is for a busy machine.
    assert elapsed < 5
    code = "import sys, fourdstar_jax.cli; print({'jax', 'numpy', 'flax'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "set()"


def test_a_command_is_a_module_and_a_line_of_the_table(capsys, monkeypatch):
    seen = []
    module = types.ModuleType("somewhere.count_views")
    module.SUMMARY = "count the views"
    module.add_flags = lambda parser: parser.add_argument("--views", type=int)
    module.run = lambda arguments: seen.append(arguments.views)
    monkeypatch.setattr(MAIN, "COMMANDS", (*MAIN.COMMANDS, module))
    assert run(capsys, "count-views", "--views", "3")[0] == 0 and seen == [3]
    code, _, lines = run(capsys, "count-views", "--vews", "3")
    assert code == 2 and "--vews" in lines[0]


def test_every_command_has_flags_and_a_run_of_its_own():
    files = {path.stem for path in Path(MAIN.__file__).parent.glob("*.py")}
    named = {command.__name__.split(".")[-1] for command in MAIN.COMMANDS}
    helpers = {"common", "inventory"}  # what commands share, and what `doctor` tells of licences
    assert files - helpers - {"__init__", "__main__", "main"} <= named
    assert all(callable(getattr(command, "add_flags", None)) for command in MAIN.COMMANDS)


def test_training_packages_are_the_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {re.split("[<>=]", line)[0] for line in project["optional-dependencies"]["train"]}
    assert extra == set(TRAINING_PACKAGES)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["unknown"],
        ["generate", "--out", "x"],
        ["generate", "--video", "a", "--image", "b", "--out", "x"],
        ["generate", "--video", "a", "--out", "x", "--unknown", "3"],
        ["generate", "--video", "a", "--out", "x", "--seed", "many"],
    ],
)
def test_wrong_usage(capsys, argv):
    code, _, lines = run(capsys, *argv)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("fourdstar")


def test_generate_writes_a_whole_output_and_again_the_same(capsys, tmp_path, tiny_bundle):
    source = picture(tmp_path / "a.png")
    arguments = ["generate", "--image", source, "--model", tiny_bundle, "--size", 32, "--seed", 5]
    code, out, _ = run(capsys, *arguments, "--out", tmp_path / "one", "--text", "a dog")
    assert code == 0 and "device: cpu" in out and "1 timestep of" in out
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest["seed"] == 5 and manifest["text"] == "a dog" and manifest["timesteps"] == 1
    assert set(manifest["model"]["weights_sha256"]) == {"tokenizer", "vqvae", "star"}
    assert manifest["versions"]["jax"] and manifest["input"]["name"] == "a.png"
    assert (tmp_path / "one" / "ply" / "frame_0000.ply").is_file()
    assert "generation" not in manifest
    code, _, _ = run(capsys, *arguments, "--out", tmp_path / "timed", "--timing")
    manifest = json.loads((tmp_path / "timed" / "manifest.json").read_text())
    assert code == 0 and manifest["generation"]["seconds"] > 0

    code, _, lines = run(capsys, *arguments, "--out", tmp_path / "one", "--text", "a dog")
    assert code == 2 and "not empty" in lines[0] and len(lines) == 1
    (tmp_path / "one").rename(tmp_path / "first")
    (tmp_path / "one").mkdir()
    earlier = {"timesteps": 1, "gaussians": 2, "files": {}}
    (tmp_path / "one" / "manifest.json").write_text(json.dumps(earlier))
    code, _, _ = run(
        capsys, *arguments, "--out", tmp_path / "one", "--text", "a dog", "--overwrite"
    )
    assert code == 0
    for file in (tmp_path / "first").rglob("*"):
        if file.is_file():
            other = tmp_path / "one" / file.relative_to(tmp_path / "first")
            assert file.read_bytes() == other.read_bytes(), file.name


def test_command_and_python_take_the_same(tiny_bundle, capsys):
    """Each flag that is an argument of `Model.generate`, at its bounds and beyond them."""
    model, wide = fs.load(tiny_bundle), 1 + 1e-6
    for name, (low, high) in {
        "seed": arguments.SEEDS,
        "temperature": arguments.TEMPERATURES,
        "top_k": arguments.TOP_K,
        "cfg": arguments.GUIDANCE,
        "history_cfg": arguments.GUIDANCE,
        "start": arguments.START_S,
        "fps": arguments.FPS,
        "folder_fps": arguments.FPS,
        "max_frames": arguments.FRAMES,
    }.items():
        below, above = (low - 1, high + 1) if isinstance(high, int) else (low - 1e-6, high * wide)
        for value, allowed in ((low, True), (high, True), (below, False), (above, False)):
            with pytest.raises(ValueError) as error:
                model.generate("nowhere.mp4", **{name: value})
            refused = f"{name}={value} must be a" in str(error.value)
            assert refused != allowed and ("does not exist" in str(error.value)) == allowed
            code, _, lines = run(capsys, "generate", "--video=nowhere.mp4", f"--{name}={value}")
            assert code == 2 and ("does not exist" in lines[0]) == allowed, lines
    for fit in arguments.FITS:
        assert "does not exist" in run(capsys, "generate", "--video=no.mp4", "--fit", fit)[2][0]


def test_what_cannot_be_used_is_told_before_jax_is_imported(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    (tmp_path / "empty").mkdir()
    clip = ["generate", "--out", "x", "--video", str(cli.BUNDLED_MODEL / "example.mp4")]
    pictures = ["reconstruct", "--out", "x", "--tokenizer", "local", "--input"]
    commands = {
        "a.mp4 is not a video": ["generate", "--video", "a.mp4", "--out", "x"],
        "empty holds no pictures": ["generate", "--video", "empty", "--out", "x"],
        "before start = 99": [*clip, "--start", "99"],
        "masks nowhere do not exist": [*clip, "--masks", "nowhere"],
        "empty is not a model bundle: it has no": [*clip, "--model", "empty"],
        "nowhere.txt cannot be read": ["generate", "--videos", "nowhere.txt", "--out", "x"],
        "a.mp4 is not a video or picture": [*pictures, "a.mp4"],
        "empty holds no picture or video": [*pictures, "empty"],
        "is local, not vq16": [*pictures, "a.mp4", "--tokenizer", "vq16"],
        "the dataset a.mp4 is a file": ["reconstruct", "--data", "a.mp4", "--out", "x"],
        "the dataset empty has no manifest.json": ["reconstruct", "--data=empty", "--out=x"],
        "empty is no output of": ["view", "empty"],
        "a.mp4 is no output of": ["export", "a.mp4", "--to", "ply", "--out", "x"],
    }
    code = "import json, sys; from fourdstar_jax import cli\n"
    code += "for argv in json.loads(sys.argv[1]): assert cli.main(argv) == 2\n"
    code += "print({'jax', 'flax', 'tensorflow'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(list(commands.values()))],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.stdout.strip() == "set()", result.stderr
    for words, line in zip(commands, result.stderr.strip().splitlines(), strict=True):
        assert words in line
    assert not (tmp_path / "x").exists()


def test_demo_is_generate_with_the_package_s_clip(monkeypatch, capsys, tmp_path):
    called = []
    monkeypatch.setattr(MAIN.generate, "run", called.append)
    assert run(capsys, "demo", "--out", tmp_path / "a", "--seed", 3)[0] == 0
    (words,) = called
    assert words.video == cli.BUNDLED_MODEL / "example.mp4" and words.video.is_file()
    assert words.model == cli.BUNDLED_MODEL and words.fit == "none" and words.image is None
    assert words.out == tmp_path / "a" and words.seed == 3 and not words.overwrite
    assert run(capsys, "demo", "--video", "a.mp4")[0] == 2


def make_frames(folder):
    folder.mkdir()
    for i in range(3):
        picture(folder / f"{i}.png")


def object_seen(frame):
    """Columns of what is not white, from the first to the last."""
    columns = np.flatnonzero((frame < 128).any(axis=(0, 2)))
    return columns[0], columns[-1]


@pytest.mark.parametrize(
    "make, found",
    [
        ("white", "object found by its plain background, 20.0 % of the frame"),
        ("clear", "object found by its alpha, 20.0 % of the frame"),
        ("noise", None),
    ],
)
def test_generate_says_what_it_uses_before_it_starts(capsys, tmp_path, tiny_bundle, make, found):
    folder = tmp_path / "frames"
    folder.mkdir()
    for index in range(10):
        path = picture(folder / f"{index}.png")
        if make == "noise":
            noise = np.random.default_rng(index).integers(0, 255, (40, 40, 3), np.uint8)
            Image.fromarray(noise).save(path)
        elif make == "clear":
            image = np.asarray(Image.open(path).convert("RGBA")).copy()
            image[..., 3] = np.where(image[..., 1] == 255, 0, 255)
            Image.fromarray(image).save(path)
    code, out, lines = run(
        capsys, "generate", "--video", folder, "--model", tiny_bundle, "--size", 32,
        "--out", tmp_path / "out", "--preview", tmp_path / "a.png", "--start", 0.5, "--fps", 2,
        "--folder_fps", 5,
    )  # fmt: skip
    assert code == 0, lines
    said = out[: out.index("device:")]
    assert f"{folder}: folder of 40x40 pixels: 1.00 of 2.00 s, from 0.50 s on at 2 frames" in said
    assert "2 timesteps" in said and str(tmp_path / "a.png") in said
    warnings = [line for line in lines if "the whole frame counts as the object" in line]
    assert len(warnings) == (found is None) and all(str(folder) in line for line in warnings)
    assert (found or "frames") in said
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["fps"] == 2  # so that the object moves as fast as the clip
    wanted = {"white": "plain background", "clear": "alpha", "noise": None}[make]
    expected = {"start": 0.5, "fps": 2, "seconds": 2, "seconds_read": 1, "timesteps": 2}
    assert {**manifest["input"], **expected, "object": wanted} == manifest["input"]
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (20, 38, 3)  # two frames of 16 pixels between seams of 2


def test_a_preview_needs_no_output_and_replaces_nothing(capsys, tmp_path, tiny_bundle):
    source = picture(tmp_path / "a.png")
    before = source.read_bytes()

    def preview(path, *more):
        return run(
            capsys, "generate", "--image", source, "--model", tiny_bundle, "--preview", path, *more
        )

    code, out, _ = preview(tmp_path / "b.png")
    assert code == 0 and "picture of 40x40" in out and "device" not in out
    sheet = np.asarray(Image.open(tmp_path / "b.png"))
    assert sheet.shape == (20, 20, 3) and (sheet[2:4, 2:18] > 250).all()
    left, right = object_seen(sheet[2:18, 2:18])
    assert 3 <= left < 7 and 9 <= right < 13
    for path, words in {
        tmp_path / "b.png": "b.png exists",
        tmp_path / "b.txt": "must end in .png",
        tmp_path / "nowhere" / "b.png": "there is no folder",
    }.items():
        code, _, lines = preview(path)
        assert code == 2 and len(lines) == 1 and words in lines[0], lines
    assert preview(tmp_path / "b.png", "--overwrite")[0] == 0
    for path, more in {
        source: ["--overwrite"],
        tmp_path / "out" / "b.png": ["--out", tmp_path / "out"],
    }.items():
        (tmp_path / "out").mkdir(exist_ok=True)
        code, _, lines = preview(path, *more)
        assert code == 2 and "must lie outside" in lines[0], lines
    assert source.read_bytes() == before and not list((tmp_path / "out").iterdir())
    code, _, lines = run(capsys, "generate", "--image", source, "--model", tiny_bundle)
    assert code == 2 and "--out DIR" in lines[0] and len(lines) == 1


def make_sizes(folder):
    folder.mkdir()
    picture(folder / "0.png")
    picture(folder / "1.png", (50, 40))


BAD_INPUT = {
    "missing.mp4": (lambda p: None, "does not exist"),
    "text.mp4": (lambda p: p.write_text("no video"), "not a video"),
    "empty.mp4": (lambda p: p.write_bytes(b""), "empty"),
    "dot.png": (lambda p: picture(p).unlink() or Image.new("1", (1, 1)).save(p), "1x1"),
    "huge.png": (lambda p: Image.new("1", (20_000, 20_000)).save(p), "max_pixels"),
    "one_frame.gif": (lambda p: Image.new("L", (40, 40)).save(p), "no object"),
    "sizes": (make_sizes, "1.png is 40x50 pixels, the pictures before it 40x40"),
    "no_frames": (lambda p: p.mkdir(), "no pictures"),
    "too_many": (make_frames, "max_frames = 2"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(capsys, tmp_path, tiny_bundle, name):
    make, words = BAD_INPUT[name]
    make(tmp_path / name)
    before = sorted(tmp_path.iterdir())
    code, _, lines = run(
        capsys, "generate", "--video", tmp_path / name, "--model", tiny_bundle,
        "--out", tmp_path / "out", "--max_frames", 2,
    )  # fmt: skip
    assert code == 2 and len(lines) == 1 and lines[0].startswith("fourdstar: "), lines
    assert words in lines[0] and str(tmp_path / name) in lines[0]
    assert sorted(tmp_path.iterdir()) == before


def test_bad_bundle_and_bad_numbers(capsys, tmp_path, tiny_bundle):
    source = picture(tmp_path / "a.png")
    out = tmp_path / "out"

    def refused(words, *more):
        code, _, lines = run(capsys, "generate", "--video", source, "--out", out, *more)
        assert code == 2 and len(lines) == 1 and words in lines[0], lines
        assert not out.exists() and len(list(tmp_path.iterdir())) == 1

    refused("there is no such folder", "--model", tmp_path / "nowhere")
    refused("not a model bundle", "--model", tmp_path)
    refused("timesteps=99", "--model", tiny_bundle, "--frames", 99)
    refused("temperature", "--model", tiny_bundle, "--temperature", -1)
    refused("--top_k: must be a whole number", "--model", tiny_bundle, "--top_k", 0)
    refused("--size", "--model", tiny_bundle, "--size", 4)
    refused("--fps: must be a number", "--model", tiny_bundle, "--fps", 0)
    description = json.loads((tiny_bundle / "model.json").read_text())
    description["stages"]["star"]["model"]["dim"] = 14
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in tiny_bundle.glob("*.safetensors"):
        (changed / file.name).write_bytes(file.read_bytes())
    (changed / "model.json").write_text(json.dumps(description))
    code, _, lines = run(capsys, "generate", "--video", source, "--out", out, "--model", changed)
    assert code == 2 and len(lines) == 1 and "another shape" in lines[0]
    assert not out.exists()


def test_unexpected_errors_keep_their_traceback(monkeypatch, capsys):
    code = "def surprise(arguments): int('x')"  # a check of nobody's
    exec(code, {"__name__": "library"}, scope := {})
    monkeypatch.setattr(doctor, "run", scope["surprise"])
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["doctor"])


def test_own_warnings_are_a_line_and_names_are_told_in_any_encoding(tmp_path):
    """A library's warning keeps its place; what stdout cannot spell does not end a command."""
    script = tmp_path / "warns.py"
    script.write_text(
        "import sys, types, warnings\n"
        "from fourdstar_jax import cli, signals\n"
        "from fourdstar_jax.cli import doctor\n"
        "def run(arguments):\n"
        "    warnings.warn_explicit('of ours', UserWarning, signals.__file__, 7)\n"
        "    warnings.warn_explicit('of others', UserWarning, 'library.py', 7)\n"
        "    print('caf\\udce9')\n"
        "doctor.run = run\n"
        "sys.exit(cli.main(['doctor']))\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    result = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment
    )
    assert (result.returncode, result.stdout) == (0, "caf\\udce9\n")
    assert result.stderr == "warning: of ours\nlibrary.py:7: UserWarning: of others\n"


CONFIG = """
from ml_collections import ConfigDict

def get_config(scale="small"):
    if scale not in ("tiny", "small"):
        raise ValueError(f"{scale=} is not known")
    config = ConfigDict()
    config.stage = "star"
    config.scale = scale
    config.steps = 10
    config.optim = ConfigDict(dict(lr=1e-4, name="adam", betas=(0.9, 0.95)))
    return config
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "star.py").write_text(CONFIG)
    return tmp_path / "configs" / "star.py"


def test_config_overrides(config):
    result = cli.read_config(
        f"{config}:tiny", ["--config.optim.lr=1e-3", "--config.steps", "7", "--config.optim.name=x"]
    )
    assert result.scale == "tiny" and result.steps == 7
    assert result.optim.lr == 1e-3 and result.optim.name == "x"
    assert result.is_locked
    assert cli.read_config(str(config), []).scale == "small"


@pytest.mark.parametrize(
    "suffix, overrides, words",
    [
        (":tiny", ["--config.optim.lrr=1"], "did you mean optim.lr?"),
        (":tiny", ["--config.stepz=1"], "did you mean steps"),
        (
            ":tiny",
            ["--config.optim.learning=1"],
            "(config.optim has optim.betas, optim.lr, optim.n",
        ),
        (":tiny", ["--config.optim=1"], "config.optim is a group (config.optim has optim.betas"),
        (":tiny", ["--config.steps=many"], "steps"),
        (":tiny", [f"--config.steps={'9' * 20}"], "config.steps must be from 1 to 1000000000"),
        (":tiny", ["--config.optim.lr=nan"], "config.optim.lr must be from -1"),
        (":tiny", ["--config.optim.betas[1]=2"], "(in: optim.betas[1])"),
        (":huge", [], "scale='huge' is not known"),
        (":tiny", ["--learning_rate=1"], "--learning_rate=1"),
        (":tiny", ["more"], "more"),
    ],
)
def test_wrong_configs(capsys, config, tmp_path, suffix, overrides, words):
    code, _, lines = run(
        capsys, "train", f"--config={config}{suffix}", "--workdir", tmp_path / "run", *overrides
    )
    assert code == 2 and len(lines) == 1 and words in lines[0], lines
    assert not (tmp_path / "run").exists()


def test_config_files_that_are_not_there(capsys):
    code, _, lines = run(capsys, "train", "--config=nowhere.py", "--workdir=x")
    assert code == 2 and lines == ["fourdstar: config file nowhere.py does not exist"]
    code, _, lines = run(capsys, "train", "--config=https://a.b/c.py", "--workdir=x")
    assert code == 2 and "network" in lines[0]


@pytest.mark.parametrize("stage", ["tokenizer", "vqvae", "star"])
def test_the_checkouts_configs_are_found_from_anywhere(monkeypatch, tmp_path, stage):
    monkeypatch.chdir(tmp_path)
    config = cli.read_config(f"configs/{stage}.py:tiny", ["--config.seed=3"])
    assert config.stage == stage and config.seed == 3


def test_an_installed_package_has_the_configs_inside(monkeypatch, tmp_path, config):
    monkeypatch.chdir(tmp_path)
    inside = tmp_path / "site-packages" / "fourdstar_jax"
    (inside / "cli").mkdir(parents=True)
    config.parent.rename(inside / "configs")
    module = importlib.import_module("fourdstar_jax.cli.train")
    monkeypatch.setattr(module, "__file__", str(inside / "cli" / "train.py"))
    assert cli.read_config("configs/star.py:tiny", []).scale == "tiny"


def test_prepare_needs_its_folders(capsys, tmp_path):
    code, _, lines = run(capsys, "prepare", "--out", tmp_path / "out")
    assert code == 2 and "--assets" in lines[0]
    code, _, lines = run(
        capsys, "prepare", "--assets", tmp_path / "none", "--out", tmp_path / "out"
    )
    assert code == 2 and "not a folder" in lines[0]
    code, _, lines = run(capsys, "prepare", "--tokens", "--out", tmp_path / "out")
    assert code == 2 and "--bundle" in lines[0]
    assert not (tmp_path / "out").exists()
    code, _, lines = run(capsys, "prepare", "--assets", tmp_path, "--shard", "0/2")
    assert code == 2 and "--shard needs --work DIR and no --out" in lines[0]
    code, _, lines = run(capsys, "prepare", "--assets", tmp_path, "--shard", "2/2")
    assert code == 2 and "argument --shard: must be I/N" in lines[0]
    code, _, lines = run(capsys, "prepare", "--assets", tmp_path)
    assert code == 2 and "--out DIR is needed" in lines[0]
    describe = ("prepare", "--describe", "m", "--out", tmp_path / "c.csv")
    for more, words in (
        ([], "--describe needs --data DIR and --out CSV"),
        (["--data", tmp_path, "--tokens"], "one of --tokens, --text_features and --describe"),
        (["--data", tmp_path / "none"], "none is not there: `fourdstar prepare` makes datasets"),
    ):
        code, _, lines = run(capsys, *describe, *more)
        assert code == 2 and len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "c.csv").exists()


def test_reconstruct_needs_a_dataset(capsys, tmp_path, tiny_bundle):
    code, _, lines = run(
        capsys, "reconstruct", "--data", tmp_path, "--out", tmp_path / "o", "--model", tiny_bundle
    )
    assert code == 2 and len(lines) == 1 and "manifest.json" in lines[0]
    assert not list(tmp_path.iterdir())


def test_inspect(capsys, tiny_bundle, tmp_path):
    code, out, _ = run(capsys, "inspect", cli.BUNDLED_MODEL)
    assert code == 0 and max(map(len, out.splitlines())) < 250
    assert "words: max_len 24, t5_vocabulary (396 values)" in out
    code, out, _ = run(capsys, "inspect", tiny_bundle)
    assert code == 0
    for words in ("tokenizer", "vqvae", "star", "vocab_size 5", "max_timesteps", "jax"):
        assert words in out
    assert "not there yet" not in out  # its star has words and needs no text encoder
    code, _, lines = run(capsys, "inspect", tmp_path)
    assert code == 2 and len(lines) == 1


@pytest.mark.parametrize(
    ("name", "value"), [("num_blocks", 3_000_000), ("dim", 0), ("dtype", "foo"), ("grid", 1e999)]
)
def test_impossible_sizes_are_told_before_anything_large_is_imported(
    name, value, tiny_bundle, tmp_path
):
    description = json.loads((tiny_bundle / "model.json").read_text())
    description["stages"]["vqvae"]["model"][name] = value
    (tmp_path / "model.json").write_text(json.dumps(description))
    program = (
        "import sys; from fourdstar_jax.cli.main import main\n"
        "try: main(['inspect', sys.argv[1]])\n"
        "finally: print('jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == "False\n"
    [line] = done.stderr.splitlines()
    assert str(tmp_path / "model.json") in line
    assert value == 1e999 or f"stages.vqvae.model.{name} must be" in line


def test_numbers_that_may_be_fractions_are_not_taken_for_sizes():
    modules = [*map(tokenizer.class_of, tokenizer.FAMILIES)]
    modules += [module for name, module in bundle.STAGES.items() if name != "tokenizer"]
    parameters = {
        n: p for m in modules for n, p in inspect.signature(m.__init__).parameters.items()
    }
    fractions = {name for name, p in parameters.items() if p.annotation in (float, float | None)}
    assert fractions == set(arguments.NOT_WHOLE)


def test_bench_rasterize(capsys, tmp_path):
    file = tmp_path / "new" / "results.json"
    code, out, _ = run(
        capsys, "bench", "rasterize", "tiny", "--repeats", 1, "--json", file, "--commit", "abc"
    )
    assert code == 0 and out.startswith("tiny") and "copy on the device" in out
    results = json.loads(file.read_text())
    assert results["commit"] == "abc" and results["versions"]["jax"]
    assert [entry["scene"] for entry in results["scenes"]] == ["tiny"]
    code, out, _ = run(capsys, "bench", "rasterize", "--table", file)
    assert code == 0 and "| tiny: 4 x 1,024 Gaussians" in out and "commit abc" in out


def test_bench_tokenizer(capsys, tmp_path, tiny_bundle):
    file = tmp_path / "new" / "results.json"
    flags = ("--batch", 2, "--repeats", 1, "--json", file, "--commit", "abc")
    tiny = ("--size", "tiny", "--dtype", "float32")
    code, out, _ = run(capsys, "bench", "tokenizer", *tiny, *flags)
    assert code == 0 and "encode  ours" in out and "decode  ours" in out
    results = json.loads(file.read_text())
    assert results["commit"] == "abc" and results["weights"] == "random"
    assert (results["size"], results["dtype"], results["batch"]) == ("tiny", "float32", 2)
    code, out, _ = run(capsys, "bench", "tokenizer", "--bundle", tiny_bundle, *flags)
    assert code == 0 and "bundle weights" in out
    results = json.loads(file.read_text())
    assert (results["weights"], results["size"]) == ("bundle", "other")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["bench"], "OPERATION"),
        (["bench", "unknown"], "unknown"),
        (["bench", "rasterize", "Z"], "no scene 'Z'"),
        (["bench", "rasterize", "--implementations", "fast"], "'fast'"),
        (["bench", "rasterize", "--repeats", "0"], "--repeats: must be"),
        (["bench", "rasterize", "--table", "nowhere.json"], "does not exist"),
        (["bench", "tokenizer", "--size", "large"], "'large'"),
        (["bench", "tokenizer", "--dtype", "int8"], "'int8'"),
        (["bench", "tokenizer", "--batch", "0"], "--batch: must be"),
        (["bench", "tokenizer", "--repeats", "0"], "--repeats: must be"),
        (["bench", "tokenizer", "--bundle", "nowhere"], "nowhere is not a model bundle"),
        (["bench", "tokenizer", "--bundle", ".", "--size", "tiny"], "--size"),
        (["bench", "tokenizer", "--bundle", ".", "--dtype", "float32"], "--dtype"),
        (["bench", "tokenizer", "--against", "nowhere"], "no checkout of UniTok"),
        (["bench", "tokenizer", "--size", "tiny", "--against", "."], "size='tiny'"),
        (["bench", "train", "nothing"], "invalid choice: 'nothing'"),
        (["bench", "train", "vqvae", "--size", "huge"], "'huge'"),
        (
            ["bench", "train", "vqvae", "--parts", "lpips"],
            "'lpips' of a step; there are generation",
        ),
        (["bench", "train", "vqvae", "--config.model.depth=3"], "config.model.depth: "),
    ],
)
def test_wrong_benchmarks(capsys, argv, words):
    code, _, lines = run(capsys, *argv)
    assert code == 2 and len(lines) == 1 and words in lines[0], lines


def test_doctor(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for words in ("jax ", "python ", "device 0: cpu", "bundled model", "processes: one"):
        assert words in out


def test_doctor_tells_processes_and_mistakes(monkeypatch):
    for name, value in dict(COORDINATOR_ADDRESS="localhost:0", NUM_PROCESSES="2").items():
        monkeypatch.setenv(f"JAX_{name}", value)
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    told = list(doctor.processes_told())
    assert told == ["processes: this is 0 of 2, coordinator localhost:0", "port 0 is free"]
    monkeypatch.delenv("JAX_PROCESS_ID")
    assert list(doctor.processes_told()) == [
        "processes: JAX_NUM_PROCESSES is 2, but JAX_PROCESS_ID is not set"
    ]
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(doctor, "free_gib", lambda folder: 3.2)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setitem(doctor.TRAINING_PACKAGES, "of-training", "there_is_no_such_module")
    notes = "\n".join(doctor.mistakes("cpu"))
    for words in (
        "JAX uses the CPU: JAX_PLATFORMS=cpu",
        "3 GiB left",
        "by srun",
        "launch/setup.sh dev",
    ):
        assert words in notes


def test_the_licences_of_everything(capsys):
    code, out, _ = run(capsys, "doctor", "--licenses")
    lines = [line.split() for line in out.splitlines()]
    names = {line[1].lower() for line in lines if line[0] == "package"}
    assert code == 0 and {"jax", "flax", "numpy", "av"} <= names
    assert {line[0] for line in lines} == {"code", "weights", "data", "package"}
    assert inventory.commercial("MIT License") == "yes"
    assert inventory.commercial("CC-BY-NC-4.0") == "no"
    assert inventory.commercial("GPL-3.0-only").startswith("yes; what is handed out")
    assert inventory.commercial("MPL-2.0").startswith("yes; changes")
    assert inventory.commercial("whatever").startswith("ask")


NUMBERS = {
    "generate --video a --out b": ["seed", "frames", "fps", "start", "folder_fps"]
    + ["temperature", "top_k", "cfg", "history_cfg", "size"],
    "prepare --assets a --out b": ["image_size", "views", "extra_views", "max_frames", "fps"]
    + ["limit", "workers", "batch", "frames", "timeout", "memory", "samples"],
    "reconstruct --data a --out b": ["clip", "batch", "fps", "start", "size"],
    "encode-text --data a --bundle b --out c": ["batch"],
    "bench tokenizer": ["batch", "repeats"],
    "bench rasterize": ["repeats"],
    "bench sampling --data a": ["clips", "temperature", "top_k", "cfg", "history_cfg"],
    "bench train vqvae": ["batch", "views", "repeats"],
}


@pytest.mark.parametrize("value", ["99999999999999999999", "-1001", "nan", "inf", "1e999", "x", ""])
@pytest.mark.parametrize("command", NUMBERS)
def test_numbers_out_of_range_are_told_with_their_range(capsys, command, value):
    for flag in NUMBERS[command]:
        code, _, lines = run(capsys, *command.split(), f"--{flag}={value}")
        assert code == 2 and len(lines) == 1, lines
        assert f"argument --{flag}: must be a " in lines[0] and " from " in lines[0]
        assert f"not {value!r}" in lines[0]


@pytest.mark.parametrize("stage", ["tokenizer", "vqvae", "star"])
def test_what_the_help_of_train_shows_works(capsys, stage):
    code, out, _ = run(capsys, "train", "--help")
    words = [word for word in out.split() if word.startswith("--config.")]
    assert code == 0 and len(words) == 1
    path, _, value = words[0].rstrip(".").removeprefix("--config.").partition("=")
    config = cli.read_config(f"configs/{stage}.py:tiny", [words[0].rstrip(".")])
    for name in path.split("."):
        config = config[name]
    assert config == float(value)


def test_a_rate_by_its_short_name():
    with pytest.raises(ValueError) as error:
        cli.read_config("configs/star.py:tiny", ["--config.optim.lr=1e-3"])
    assert "has no optim.lr; did you mean schedule.learning_rate?" in str(error.value)
    assert (
        "(config.optim has optim.average, optim.b1, optim.b2, optim.clip_norm, optim.muon, "
        "optim.weight_decay)" in str(error.value)
    )
