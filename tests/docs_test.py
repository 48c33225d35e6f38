"""The documents: what they name is there, links lead somewhere, the README stays short."""

import ast
import functools
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.central

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@functools.cache
def names_in(path):
    """Functions, classes and constants at the top of a Python file."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {
                name.id for t in targets for name in ast.walk(t) if isinstance(name, ast.Name)
            }
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_names_and_links_are_there(document):
    text = document.read_text()
    pattern = r"`((?:fourdstar_jax|configs|tests|launch)/[\w/.]+?)(?:: (\w+))?`"
    for file, name in re.findall(pattern, text):
        path = ROOT / file
        assert path.exists(), file
        if name:
            assert name in names_in(path), f"{file} has no {name}"
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_every_part_of_the_paper_has_a_place():
    rows = re.findall(r"^\| (3\.\d[^|]*|4\.1|5) \|", (ROOT / "docs" / "PAPER.md").read_text(), re.M)
    assert len(rows) >= 18


def test_the_readme_is_short_and_its_picture_small():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100
    assert (ROOT / "docs" / "images" / "tiny.webp").stat().st_size <= 2 << 20


def test_the_example_of_the_rasterizer_runs():
    text = (ROOT / "docs" / "RASTERIZER.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    exec(code, scope := {})
    assert scope["images"].renders.shape == (2, 128, 128, 3)
