"""`fourdstar evaluate`: predictions by a protocol, or a bundle on unseen clips."""

import argparse
import functools
import sys
from pathlib import Path

from fourdstar_jax.arguments import counted
from fourdstar_jax.cli.common import load_model, model_flag, there_is_a_bundle, whole
from fourdstar_jax.outside import MAX_SEED

SUMMARY = "score predictions by a named protocol, or a bundle on the unseen clips of a dataset"
DESCRIPTION = """With --protocol, score the folder --pred against --gt: OBJECT/VIEW/0.png ... or
OBJECT/VIEW.mp4, objects that `fourdstar generate` or `reconstruct` made, and for --gt a prepared
dataset as well. Without, measure the bundle --model on a split of --data."""
PROTOCOLS = (
    "consistent4d-legacy",
    "4dstar-reconstruction",
    "4dstar-video-to-4d",
    "set-fvd",
    "fourdstar-open-v2",
)
SYSTEMS = ("l4gm", "stag4d", "sv4d2", "gvfdiffusion", "actionmesh", "motion324")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--protocol", choices=PROTOCOLS, help="what exactly is computed")
    parser.add_argument("--pred", type=Path, metavar="DIR", help="predictions (--protocol)")
    parser.add_argument(
        "--reader", choices=SYSTEMS, help="of --pred as this system's scripts write it"
    )
    parser.add_argument("--gt", type=Path, metavar="DIR", help="truths (--protocol)")
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="DIR",
        help="the measuring networks' .npz; with --model default `weights`, if there",
    )
    parser.add_argument(
        "--metrics", nargs="+", default=(), metavar="NAME", help="only these of the protocol's"
    )
    parser.add_argument(
        "--background", choices=["white"], help="of transparent pictures, if the protocol has none"
    )
    parser.add_argument(
        "--azimuths",
        type=float,
        nargs="+",
        metavar="DEGREES",
        help="views of datasets and of objects that are rendered; default the protocol's first",
    )
    parser.add_argument(
        "--min-frames",
        "--min_frames",
        type=whole(1, 1 << 16),
        default=1,
        metavar="N",
        help="clips of a dataset --gt with fewer are passed over",
    )
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="an earlier --out, to be compared with"
    )
    parser.add_argument(
        "--batch", type=whole(1, 1 << 12), default=8, help="frames at once (--protocol)"
    )
    parser.add_argument(
        "--self-check",
        "--self_check",
        action="store_true",
        help="score made pictures with known answers; with --weights by the networks as well",
    )
    parser.add_argument(
        "--pairs",
        type=Path,
        nargs=2,
        metavar=("A", "B"),
        help="two folders as --pred: write --out PAGE.html, by which people say which is better",
    )
    parser.add_argument(
        "--table",
        metavar="FILE",
        help="a table of the paper (configs/tables/*.py) on --data; --out is a folder",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        default=(),
        metavar="ROW=PATH",
        help="bundles and folders (--table); a row given twice was trained twice",
    )
    parser.add_argument(
        "--seeds",
        type=whole(0, MAX_SEED),
        nargs="+",
        default=None,
        metavar="N",
        help="each row that generates does so by each of these (--table); default 0",
    )
    parser.add_argument(
        "--sheet",
        type=Path,
        metavar="FILE.webp",
        help="draw input | four views | truth, moving, of clips that --model generates of --data, "
        "or of --pred: with --gt, or without of a user's videos",
    )
    parser.add_argument("--seed", type=whole(0, MAX_SEED), default=0, help="of the order (--pairs)")
    parser.add_argument(
        "--frames",
        type=whole(1, 1 << 12),
        metavar="N",
        help="the first N of each clip (--table); default the table's",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared dataset (--model)")
    parser.add_argument(
        "--clips", type=whole(1, 1 << 16), help="how many are generated (--model); default 16"
    )
    parser.add_argument("--split", help="of a dataset; default unseen_clip")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the figures as JSON, with --model after each part; with --protocol tables as .md and "
        ".tex beside it",
    )
    model_flag(parser)


def run(arguments: argparse.Namespace) -> None:
    if arguments.self_check:
        return _self_check(arguments)
    if arguments.pairs is not None:
        return _pairs(arguments)
    if arguments.table is not None:
        return _table(arguments)
    if arguments.sheet is not None:
        return _sheet(arguments)
    for flag in ("rows", "seeds", "frames"):
        if getattr(arguments, flag):
            raise ValueError(f"--{flag} needs --table")
    if arguments.protocol is not None:
        return _score(arguments)
    for flag in ("pred", "gt", "reader", "against", "metrics", "background", "azimuths"):
        if getattr(arguments, flag):
            raise ValueError(f"--{flag} needs --protocol")
    if arguments.data is None:
        raise ValueError("give --protocol with --pred and --gt, or --data for the bundle --model")
    there_is_a_bundle(arguments.model)
    import json

    from fourdstar_jax import bars
    from fourdstar_jax.folders import replace_file

    with bars.waiting("loading"):
        from fourdstar_jax.evaluate import unseen

        load_model(arguments.model)  # says what is wrong with it before the data is read
    lpips, why = _lpips(arguments.weights)

    def written(report: dict) -> str:
        text = json.dumps(report, indent=1)
        if arguments.out is not None:
            replace_file(arguments.out, f"{text}\n".encode())
        return text

    found = unseen.evaluate(
        arguments.model,
        arguments.data,
        arguments.split or "unseen_clip",
        lpips=lpips,
        sampled=arguments.clips or unseen.SAMPLED,
        log=functools.partial(print, file=sys.stderr, flush=True),
        keep=written,
    )
    if why:
        found["lpips"] = {"left_out": why}
    print(written(found))


def _lpips(folder: Path | None) -> tuple[Path | None, str]:
    """LPIPS' weights with AlexNet, or VGG16; without any in the default folder, why."""
    from fourdstar_jax.evaluate.networks import Networks

    why = ""
    for name in ("lpips_alex", "lpips_vgg"):
        try:
            return Networks(Path("weights") if folder is None else folder).check(name), ""
        except ValueError as error:
            why = why or str(error).removesuffix("; or choose --metrics")
    if folder is not None:
        raise ValueError(why)
    print(f"LPIPS is left out: {why}", file=sys.stderr)
    return None, why


def _score(arguments: argparse.Namespace) -> None:
    if arguments.clips is not None:
        raise ValueError("--clips goes with --data, without --protocol")
    if arguments.pred is None or arguments.gt is None:
        raise ValueError("--protocol needs --pred DIR and --gt DIR")
    import dataclasses
    import json

    from fourdstar_jax import outside
    from fourdstar_jax.evaluate import clips, protocols, readers, report, score
    from fourdstar_jax.evaluate.networks import Networks
    from fourdstar_jax.export import read_splats
    from fourdstar_jax.folders import replace_file

    protocol = protocols.find(arguments.protocol)
    if arguments.background is not None:
        protocol = dataclasses.replace(protocol, background=arguments.background)
    azimuths = None if arguments.azimuths is None else tuple(arguments.azimuths)
    if azimuths and protocol.azimuths_deg and azimuths not in protocol.azimuths_deg:
        allowed = " or ".join(" ".join(f"{a:g}" for a in w) for w in protocol.azimuths_deg)
        raise ValueError(f"--azimuths of {protocol.name} are {allowed}")
    other = None if arguments.against is None else outside.read(arguments.against)
    options = {"read_splats": read_splats, "split": arguments.split or "unseen_clip"}
    truths = clips.open_source(
        arguments.gt, protocol, azimuths=azimuths, min_frames=arguments.min_frames, **options
    )
    azimuths = truths.azimuths
    if arguments.reader is None:
        predictions = clips.open_source(arguments.pred, protocol, azimuths=azimuths, **options)
    else:
        predictions = readers.open_source(
            arguments.pred, arguments.reader, protocol, azimuths=azimuths
        )
    result = score.score(
        protocol,
        predictions,
        truths,
        Networks(arguments.weights, batch=arguments.batch),
        metrics=arguments.metrics,
        log=lambda line: print(line, file=sys.stderr),
    )
    if other is not None:
        result["against"] = report.compare(result, other)
    table = report.markdown(result)
    print(table, end="")
    if arguments.out is not None:
        replace_file(arguments.out, f"{json.dumps(result, indent=1)}\n".encode())
        replace_file(arguments.out.with_suffix(".md"), table.encode())
        replace_file(arguments.out.with_suffix(".tex"), report.latex(result).encode())


def _table(arguments: argparse.Namespace) -> None:
    for flag in ("pred", "reader", "against", "gt"):
        if getattr(arguments, flag):
            raise ValueError(f"--{flag} does not go with --table")
    if arguments.data is None or arguments.out is None:
        raise ValueError("--table needs --data DIR and --out DIR")
    if wrong := [row for row in arguments.rows if not all(row.partition("=")[::2])]:
        raise ValueError(f"--rows {wrong[0]} must be ROW=PATH")
    from fourdstar_jax.cli.train import read_config
    from fourdstar_jax.evaluate import tables
    from fourdstar_jax.evaluate.networks import Networks
    from fourdstar_jax.export import read_splats

    paths: dict[str, list[str]] = {}
    for row in arguments.rows:
        name, _, path = row.partition("=")
        paths.setdefault(name, []).append(path)
    table = tables.run(
        read_config(arguments.table, []).to_dict(),
        arguments.data,
        arguments.out,
        Networks(arguments.weights, batch=arguments.batch),
        read_splats=read_splats,
        paths=paths,
        seeds=tuple(dict.fromkeys(arguments.seeds or (0,))),
        protocol_name=arguments.protocol,
        frames=arguments.frames,
        split=arguments.split,
        metrics=arguments.metrics,
        log=lambda line: print(line, file=sys.stderr),
    )
    print(table, end="")


def _sheet(arguments: argparse.Namespace) -> None:
    for flag in ("protocol", "reader", "against", "metrics", "out", "rows"):
        if getattr(arguments, flag):
            raise ValueError(f"--{flag} does not go with --sheet")
    if arguments.sheet.suffix.lower() != ".webp":
        raise ValueError(f"--sheet {arguments.sheet} must end in .webp: it moves")
    if (arguments.pred is None) == (arguments.data is None):
        raise ValueError("--sheet needs --pred DIR, or --data DIR for the bundle --model")
    from fourdstar_jax.evaluate import clips
    from fourdstar_jax.evaluate.networks import Networks
    from fourdstar_jax.export import contact, read_splats

    networks = Networks(arguments.weights, batch=arguments.batch)
    log = functools.partial(print, file=sys.stderr)
    if arguments.data is not None:
        load_model(arguments.model)
        parts = () if arguments.split is None else (arguments.split,)
        count = arguments.clips or contact.CLIPS
        rows = contact.of_model(
            arguments.model, arguments.data, networks, parts=parts, count=count, log=log
        )
    elif arguments.gt is None:
        rows = contact.of_objects(arguments.pred)
    else:
        options = {"read_splats": read_splats, "split": arguments.split or "unseen_clip"}
        azimuths = None if arguments.azimuths is None else tuple(arguments.azimuths)
        truths = clips.open_source(arguments.gt, contact.PROTOCOL, azimuths=azimuths, **options)
        predictions = clips.open_source(
            arguments.pred, contact.PROTOCOL, azimuths=truths.azimuths, **options
        )
        rows = contact.of_sources(predictions, truths, networks, log=log)
    contact.write(arguments.sheet, rows)
    print(f"{len(rows)} rows: {arguments.sheet}")


def _pairs(arguments: argparse.Namespace) -> None:
    for flag in ("pred", "reader", "against", "metrics", "weights", "data"):
        if getattr(arguments, flag):
            raise ValueError(f"--{flag} does not go with --pairs")
    if arguments.out is None or arguments.out.suffix.lower() != ".html":
        raise ValueError("--pairs needs --out PAGE.html")
    from fourdstar_jax.evaluate import clips, pairs, protocols
    from fourdstar_jax.export import read_splats

    protocol = protocols.find(arguments.protocol or "fourdstar-open-v2")
    azimuths = None if arguments.azimuths is None else tuple(arguments.azimuths)
    options = {"read_splats": read_splats, "split": arguments.split or "unseen_clip"}
    truths = None
    if arguments.gt is not None:
        truths = clips.open_source(arguments.gt, protocol, azimuths=azimuths, **options)
        azimuths = truths.azimuths
    first, second = (
        clips.open_source(path, protocol, azimuths=azimuths, **options) for path in arguments.pairs
    )
    count = pairs.write(arguments.out, first, second, protocol, truths=truths, seed=arguments.seed)
    print(f"{counted(count, 'pairs')}: {arguments.out}")


def _self_check(arguments: argparse.Namespace) -> None:
    from fourdstar_jax.evaluate import self_check

    wrong = 0
    for case in self_check.cases(arguments.weights):
        wrong += not case.right
        verdict = "ok" if case.right else "WRONG"
        print(f"{verdict:5} {case.name}: {case.found:.6g}, known {case.wanted:.6g}")
    if wrong:
        raise ValueError(f"{wrong} figures are not the known ones")
