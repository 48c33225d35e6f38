"""Imports go down the floors; using a model needs nothing that only training uses."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import fourdstar_jax
from fourdstar_jax.cli.common import TRAINING_PACKAGES

pytestmark = pytest.mark.central


ROOT = Path(fourdstar_jax.__file__).parent

# Every module or package of fourdstar_jax and its floor. A module may import from lower floors
# and from its own package.
FLOORS = [
    {"outside", "remote", "bars"},
    {"types", "timing", "folders", "arguments", "lists", "serve"},
    {"geometry", "signals", "shards"},
    {"processes"},
    {"kernels", "sharding"},
    {"nn"},
    {"text", "perceptual"},
    {"data"},
    {"tokenizer", "vqvae", "star"},  # none imports another
    {"bundle"},
    {"convert"},
    {"train"},
    {"generate"},
    {"evaluate"},
    {"export"},
    {"batch"},
    {"cli"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imported(path):
    """Units of this package that a file imports anywhere in it, also within functions."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "fourdstar_jax" and len(parts) > 1 and parts[1] in FLOOR:
                yield parts[1]


def climbing(root):
    """Every import that goes up or sideways, as text."""
    for path in sorted(root.rglob("*.py")):
        unit = path.relative_to(root).parts[0].removesuffix(".py")
        if unit == "__init__":
            continue
        assert unit in FLOOR, f"{unit} has no floor"
        for other in imported(path):
            if other != unit and FLOOR[other] >= FLOOR[unit]:
                yield f"{path.relative_to(root)} imports {other}"


def test_no_import_climbs():
    assert list(climbing(ROOT)) == []


def test_the_walk_finds_climbers(tmp_path):
    (tmp_path / "star").mkdir()
    (tmp_path / "star" / "model.py").write_text(
        "from fourdstar_jax.vqvae.model import x\ndef f():\n    from fourdstar_jax import cli\n"
    )
    (tmp_path / "nn.py").write_text(
        "import fourdstar_jax.types\nimport fourdstar_jax.train.state\n"
    )
    assert list(climbing(tmp_path)) == [
        "nn.py imports train",
        "star/model.py imports vqvae",
        "star/model.py imports cli",
    ]


def modules():
    """Every module of the package by name, with its file."""
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        yield ".".join(parts).removesuffix(".__init__"), path


def circles(files):
    """Groups of modules that import one another, imports for type checkers included."""
    files = dict(files)
    graph = {}
    for name, path in files.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                wanted = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for target in wanted:
                while target and target not in files:
                    target = target.rpartition(".")[0]
                found |= {target} - {"", name}
        graph[name] = found

    def reached(start):
        seen, todo = set(), [start]
        while todo:
            for other in graph[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        return seen

    ways = {name: reached(name) for name in graph}
    return sorted(name for name in graph if name in ways[name])


def test_no_module_imports_itself_by_way_of_others(tmp_path):
    assert circles(modules()) == []
    (tmp_path / "a.py").write_text("if TYPE_CHECKING:\n    from p.b import x\n")
    (tmp_path / "b.py").write_text("def f():\n    import p.a\n")
    (tmp_path / "c.py").write_text("import p.a\n")
    assert circles((f"p.{x}", tmp_path / f"{x}.py") for x in "abc") == ["p.a", "p.b"]


def test_files_are_short():
    long = {
        name: count
        for name, path in modules()
        if (count := len(path.read_text().split("\n"))) > 600
    }
    assert long == {}


# optax is not among them: flax.nnx itself imports it.
TRAINING = [*(set(TRAINING_PACKAGES.values()) - {"optax"}), "tensorflow"]
BLOCKED = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {TRAINING!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
"""


def python(code, *argv):
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code, *map(str, argv)],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
    )


def test_data_needs_no_flax():
    """Its worker processes would otherwise import it each; nor does reading tokens or captions."""
    code = """
import pkgutil, importlib
from fourdstar_jax import data
for module in pkgutil.walk_packages(data.__path__, "fourdstar_jax.data."):
    # the second runs in Blender's Python
    if module.name.split(".")[-1] not in ("untrusted", "blender_script"):
        importlib.import_module(module.name)
assert "flax" not in sys.modules
"""
    blocked = BLOCKED.replace(repr(TRAINING), repr(["flax", "optax"]))
    result = subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_everything_public_without_the_training_packages():
    code = """
import fourdstar_jax as fs
assert not {"jax", "numpy"} & set(sys.modules)
for name in fs.__all__:
    value = getattr(fs, name)
    assert name == "__version__" or value.__doc__, name
assert set(fs.__all__) <= set(dir(fs))
try:
    fs.unknown
except AttributeError as error:
    print(error)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert "unknown" in result.stdout


def test_generating_without_the_training_packages(tiny_bundle):
    code = """
import numpy as np
import fourdstar_jax as fs
frames = np.full((1, 20, 20, 3), 255, np.uint8)
frames[:, 5:15, 5:15] = 90
object4d = fs.load(sys.argv[1]).generate(frames, seed=0)
print(object4d.gaussians.means.shape)
"""
    result = python(code, tiny_bundle)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(1, 32, 3)"


def test_training_without_its_packages_says_what_to_install(tmp_path):
    code = """
from fourdstar_jax import cli
sys.exit(cli.main(["train", "--config=configs/tokenizer.py:tiny", "--workdir", sys.argv[1]]))
"""
    result = python(code, tmp_path / "run")
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert "fourdstar-jax[train]" in lines[-1], result.stderr


def test_the_version_is_the_projects():
    assert importlib.metadata.version("fourdstar-jax") == fourdstar_jax.__version__


@pytest.mark.parametrize("name", fourdstar_jax.__all__)
def test_public_names(name):
    assert getattr(fourdstar_jax, name) is not None
