"""Writes what of the documents is made from other files, and checks the figures in their prose.

    python docs/make.py            # pages of commands, tables, the bundled model's card
    python docs/make.py --check    # changes nothing; tells what is not current

Tables, from `tables.py`, stand between `<!-- NAME: begin -->` and `<!-- NAME: end -->`; figures in
prose are in `figures.py`.
"""

import argparse
import ast
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import figures
from figures import DOCS, RESULTS, ROOT
from tables import ABLATIONS, BUNDLED_RESULTS, TABLES, table

import fourdstar_jax
from fourdstar_jax.cli import read_config
from fourdstar_jax.cli.common import BUNDLED_MODEL
from fourdstar_jax.cli.main import COMMANDS, make_parser
from fourdstar_jax.evaluate import card

SCALES = ("tiny", "small", "base", "paper", "base,vq16", "paper,vq16")


# Pages of commands


def command_pages() -> dict[str, str]:
    """Files of docs/commands by name: a page a subcommand, and a list of them."""
    pages, rows = {}, []
    for command, parser in _subparsers(make_parser()):
        name = parser.prog
        pages[f"{command}.md"] = (
            f"# {name}\n\n"
            + _described(parser)
            + "".join(
                f"\n## {below.prog}\n\n{_described(below)}" for _, below in _subparsers(parser)
            )
        )
        summary = next(
            c.SUMMARY for c in COMMANDS if c.__name__.endswith(command.replace("-", "_"))
        )
        rows.append([f"[`{name}`]({command}.md)", summary])
    head = "# The command, page by page\n\n`python docs/make.py` makes these from the parsers, "
    head += "which `--help` shows, too.\n\n"
    return {"README.md": head + table(["command", "what it does"], *rows), **pages}


def _subparsers(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def _described(parser: argparse.ArgumentParser) -> str:
    """Description and flags of a parser, without those of the commands below it."""
    text = re.sub(r"\n(?=[^\n])", " ", (parser.description or "").strip()).replace("\n ", "\n\n")
    text += "\n"
    formatter = parser._get_formatter()
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        value = formatter._format_args(action, formatter._get_default_metavar_for_optional(action))
        if not action.option_strings:
            flag = formatter._format_args(action, action.metavar or action.dest)
        else:
            flag = f"{', '.join(action.option_strings)} {value}".strip()
        told = formatter._expand_help(action) if action.help else ""
        if action.required and action.option_strings:
            told += " (needed)"
        rows.append([f"`{flag}`".replace("|", "\\|"), told.replace("|", "\\|")])
    if rows:
        text += "\n" + table(["flag", "what"], *rows)
    for group in parser._mutually_exclusive_groups:
        if group.required:
            flags = " and ".join(f"`{a.option_strings[0]}`" for a in group._group_actions)
            text += f"\nOne of {flags} is needed.\n"
    if parser.get_default("takes_overrides"):
        text += "\n`--config.KEY=VALUE` sets any value of the config.\n"
    return text


# The Python API


def api_page() -> str:
    """What `import fourdstar_jax as fs` offers: signatures and docstrings, from the source."""
    text = (
        "# The Python API\n\n`python docs/make.py` makes this page from the source. Names are "
        "imported where they are first used,\nso that `import fourdstar_jax` costs nothing. Public "
        "modules besides: `fourdstar_jax.export` (`write`,\n`write_ply`, `read_ply`, "
        "`write_splats`, `read_splats`), `fourdstar_jax.bundle` (`read`, `save_stage`),\n"
        "`fourdstar_jax.geometry` (cameras, rays, rotations).\n"
    )
    for name in fourdstar_jax.__all__:
        if name == "__version__":
            continue
        module = getattr(fourdstar_jax, name).__module__
        source = Path(importlib.import_module(module).__file__ or "")
        node = next(x for x in ast.parse(source.read_text()).body if getattr(x, "name", "") == name)
        place = source.relative_to(ROOT)
        text += f"\n## {name}\n\n`{place}`\n\n{_documented(node)}"
        if isinstance(node, ast.ClassDef):
            fields = [x for x in node.body if isinstance(x, ast.AnnAssign)]
            lines = source.read_text().splitlines()
            shown = [lines[x.lineno - 1].strip() for x in fields]
            if shown:
                text += "\n```python\n" + "\n".join(shown) + "\n```\n"
            for below in node.body:
                if isinstance(below, ast.FunctionDef) and (
                    not below.name.startswith("_") or below.name in ("__init__", "__call__")
                ):
                    told = ast.get_docstring(below)
                    if told or below.name == "__init__":
                        text += f"\n### {name}.{below.name}\n\n{_documented(below)}"
    return text


def _documented(node: ast.AST) -> str:
    """The signature of a function, and the docstring of a function or class."""
    text = ""
    if isinstance(node, ast.FunctionDef) and not any(
        "property" in ast.unparse(x) for x in node.decorator_list
    ):
        returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        given = _given(node.args)
        call = f"{node.name}({', '.join(given)}){returned}"
        if len(call) > 96:
            lines = "".join(f"    {x},\n" for x in given)
            call = f"{node.name}(\n{lines}){returned}"
        text += f"```python\n{call}\n```\n\n"
    doc = ast.get_docstring(node)  # pyright: ignore[reportArgumentType]
    if doc:
        # what is indented (arguments, shapes) stays as it stands
        parts = [
            f"```text\n{part}\n```" if re.search(r"^ +\S", part, re.M) else part
            for part in doc.split("\n\n")
        ]
        text += "\n\n".join(parts) + "\n"
    return text


def _given(arguments: ast.arguments) -> list[str]:
    """The arguments of a function as they are written, without self."""
    places = arguments.posonlyargs + arguments.args
    found = [
        *zip(
            places,
            [None] * (len(places) - len(arguments.defaults)) + arguments.defaults,
            strict=True,
        ),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    texts = [f"{ast.unparse(x)} = {ast.unparse(y)}" if y else ast.unparse(x) for x, y in found]
    if arguments.kwonlyargs:
        texts.insert(len(places), f"*{ast.unparse(arguments.vararg) if arguments.vararg else ''}")
    if arguments.kwarg:
        texts.append(f"**{ast.unparse(arguments.kwarg)}")
    return [text.replace("'", '"') for text in texts if text != "self"]


# Counts


def count_sizes() -> dict[str, dict[str, int]]:
    """Parameters of every config by stage, and what its pictures and clips are."""
    from fourdstar_jax import bundle, nn

    found: dict[str, dict[str, int]] = {}
    for scale in SCALES:
        found[scale] = {}
        for stage in ("tokenizer", "vqvae", "star"):
            config = read_config(f"{ROOT}/configs/{stage}.py:{scale}", [])
            sizes = config.model.to_dict()
            if stage == "star":
                sizes.setdefault("text_vocab", 100)  # as tests/configs_test.py, which compares
                found[scale] |= dict(pixels=sizes["resolution"], timesteps=config.data.timesteps)
                # float32: weights, two moments of Adam, the average where there is one
                found[scale]["state_bytes"] = 4 * (3 + bool(config.optim.get("average")))
            found[scale][stage] = nn.count_parameters(bundle.shapes(stage, sizes))
    return found


def count_ablations() -> dict[str, dict[str, float]]:
    """Parameters and operations of STAR at `small` with other ways of the past."""
    from fourdstar_jax import bundle, nn
    from fourdstar_jax.train.work import forward_flops

    found = {}
    dims = dict(objects=1, timesteps=8, views=4, groups=8)
    for name in ABLATIONS:
        config = read_config(f"{ROOT}/configs/star.py:small{name and ',' + name}", [])
        shapes = bundle.shapes("star", config.model.to_dict() | {"text_vocab": 100})
        flops = forward_flops(shapes, text=config.model.text_length, **dims)
        found[name or "ours"] = dict(
            parameters=nn.count_parameters(shapes), forward_flop=sum(flops.values())
        )
    return found


def main(argv: list[str] | None = None) -> int:
    """Writes what is not current, or tells it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if not current"
    )
    parser.add_argument("--sizes", action="store_true", help="count the configs' parameters anew")
    arguments = parser.parse_args(argv)
    check = arguments.check
    if arguments.sizes:
        for name, counted in (("sizes", count_sizes()), ("ablations", count_ablations())):
            (RESULTS / f"{name}.json").write_text(json.dumps(counted, indent=1) + "\n")
    wrong = 0
    for path, text in made().items():
        if path.is_file() and path.read_text() == text:
            continue
        print(f"{path.relative_to(ROOT)}: {'not current' if check else 'written'}")
        wrong += check
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for problem in figures.problems():
        print(problem)
        wrong += 1
    return int(wrong > 0)


def made() -> dict[Path, str]:
    """All files that are made here, whole or in part, with the text they should have."""
    texts = {DOCS / "commands" / name: text for name, text in command_pages().items()}
    texts[DOCS / "API.md"] = api_page()
    texts[BUNDLED_MODEL / "README.md"] = card.card(
        BUNDLED_MODEL, results=[RESULTS / f"{name}.json" for name in BUNDLED_RESULTS]
    )
    for path in figures.documents():
        text = texts.get(path) or path.read_text()
        for name in re.findall(r"<!-- (\w+): begin -->", text):
            begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
            before, _, rest = text.partition(begin)
            text = before + begin + TABLES[name]() + end + rest.partition(end)[2]
        texts[path] = text
    return texts


if __name__ == "__main__":
    sys.exit(main())
