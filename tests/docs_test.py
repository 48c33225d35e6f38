"""The documents: what they name is there, links lead somewhere, the README stays short."""

import ast
import functools
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from fourdstar_jax.cli import read_config
from fourdstar_jax.cli.main import make_parser

pytestmark = pytest.mark.central

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def making():
    """docs/make.py and docs/figures.py."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        yield importlib.import_module("make"), importlib.import_module("figures")
    finally:
        sys.path.remove(str(ROOT / "docs"))


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
    assert (ROOT / "docs" / "images" / "small.webp").stat().st_size <= 2 << 20


def test_what_is_made_is_current(making):
    """`python docs/make.py` mends it: pages of commands, the Python API, tables of results."""
    make, _ = making
    old = [p.name for p, text in make.made().items() if not p.is_file() or p.read_text() != text]
    assert old == []
    pages = {path.name for path in (ROOT / "docs" / "commands").iterdir()}
    assert pages == set(make.command_pages())


def test_every_figure_comes_from_the_results(making):
    assert making[1].problems() == []


def test_a_figure_of_nowhere_or_one_that_has_changed_is_found(making, monkeypatch, tmp_path):
    _, figures = making
    (tmp_path / "A.md").write_text(
        "It takes 3.1 ms.\n\n<!-- t: begin -->\n| 5 dB |\n<!-- t: end -->\n\n```\n7 s\n```\n"
        "In 40 % of all cases\nit is 2.5 times as fast, off by 3e-7."
    )
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "sources", lambda: [tmp_path / "A.md"])
    monkeypatch.setattr(figures, "CHOSEN", {"A.md": ["40 % of all cases it"]})
    monkeypatch.setattr(figures, "sentences", lambda: {"A.md": ["takes 3.2 ms", "by 3e-7"]})
    said, *rest = figures.problems()
    assert said == "A.md: should say 'takes 3.2 ms', as the results do"
    assert [line.split("'")[1] for line in rest] == ["3.1 ms", "2.5 times as"]


def commands(text):
    """Lines of code blocks that call `fourdstar`, as words."""
    for block in re.findall(r"```(?:bash)?\n(.*?)```|((?:^    .*\n)+)", text, re.S | re.M):
        for line in re.sub(r"\\+\n", " ", "".join(block)).splitlines():
            if line.strip().startswith("fourdstar "):
                yield shlex.split(line, comments=True)[1:]


def test_commands_in_documents_are_understood():
    """Flags, values and configs are there: what is run by the parser stops before it does."""
    parser, seen = make_parser(), 0
    sources = [*DOCUMENTS, ROOT / "launch" / "README.md", *sorted((ROOT / "configs").glob("*.py"))]
    for source in sources:
        for words in commands(source.read_text()):
            if "..." in words:
                continue
            arguments, extra = parser.parse_known_args(words)
            assert not extra or all(word.startswith("--config.") for word in extra), (source, words)
            if config := getattr(arguments, "config", None):
                assert read_config(config, extra), words
            seen += 1
    assert seen >= 25


@pytest.mark.parametrize(
    ("document", "check"),
    {
        "RASTERIZER": lambda scope: scope["images"].renders.shape == (2, 128, 128, 3),
        "CLUSTERING": lambda scope: (
            [20] * 3 == sorted((scope["clusters"].assignment == i).sum() for i in range(3))
        ),
    }.items(),
)
def test_examples_run(document, check):
    text = (ROOT / "docs" / f"{document}.md").read_text()
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], scope := {})
    assert check(scope)
