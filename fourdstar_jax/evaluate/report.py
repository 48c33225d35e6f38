"""Results as tables (Markdown, LaTeX), and the comparison of two results on the same objects."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fourdstar_jax.evaluate.metrics import bootstrap_interval
from fourdstar_jax.evaluate.protocols import Metric, find
from fourdstar_jax.outside import SHA256, Fields

ARROWS = {"higher": "↑", "lower": "↓"}
TEX_ARROWS = {"higher": r"$\uparrow$", "lower": r"$\downarrow$"}


def compare(result: dict[str, Any], other: Fields) -> dict[str, Any]:
    """Mean differences (result less other) over the same objects, with paired 95 % intervals.

    `better` is the share of objects on which the result is better. Raises ValueError if the other
    file's protocol, objects or truths are not the same.
    """
    told, ours = other.part("protocol"), result["protocol"]
    found = told.text("name"), told.integer("version", 0, 10**6)
    if found != (ours["name"], ours["version"]):
        raise ValueError(
            f"{other.where}: scored by {found[0]} version {found[1]}, not by {ours['name']} "
            f"version {ours['version']}: their numbers do not compare"
        )
    truths = other.part("truths")
    hashes = truths.text("frames_sha256", pattern=SHA256), result["truths"]["frames_sha256"]
    if hashes[0] != hashes[1] and not _one_recipe(truths.values, result["truths"]):
        raise ValueError(
            f"{other.where}: its truths are others, of hash {hashes[0]}, not {hashes[1]}: their "
            "numbers do not compare"
        )
    theirs = {}
    for row in other.parts("objects"):
        metrics = row.part("metrics")
        theirs[row.text("object")] = {m: metrics.number(m, -1e12, 1e12) for m in metrics}
    names = [row["object"] for row in result["objects"]]
    if unlike := sorted(set(names) ^ set(theirs)):
        raise ValueError(f"{other.where}: object {unlike[0]} is in one of the two results only")
    out: dict[str, Any] = {"path": other.where, "metrics": {}}
    if hashes[0] != hashes[1]:
        out["note"] = "the true frames were rendered by the same recipe, but not in one rendering"
    protocol = find(ours["name"])
    for name in dict.fromkeys(m for row in result["objects"] for m in row["metrics"]):
        rows = [
            row
            for row in result["objects"]
            if name in row["metrics"] and name in theirs[row["object"]]
        ]
        if not rows:
            continue
        groups = np.array([row["group"] for row in rows])
        differences = np.array([r["metrics"][name] - theirs[r["object"]][name] for r in rows])
        sign = 1 if protocol.metric(name).better == "higher" else -1
        interval = None
        if len(set(groups)) > 1:
            interval = list(bootstrap_interval(differences, groups=groups)[1:])
        out["metrics"][name] = {
            "difference": float(differences.mean()),
            "interval_95": interval,
            "better": float(np.mean(sign * differences > 0)),
            "objects": len(rows),
        }
    return out


def _one_recipe(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two truths are the same clips of one data set, but for how a machine rendered it."""
    told = ("recipe_sha256", "split", "min_frames", "frames")
    return bool(first.get(told[0])) and all(first.get(k) == second.get(k) for k in told)


def _columns(result: dict[str, Any]) -> list[Metric]:
    protocol = find(result["protocol"]["name"])
    return [m for m in protocol.metrics if m.name in result["summary"]]


def summary(result: dict[str, Any], columns: list[Metric], mean: str, interval: str) -> list[str]:
    """The figures over all objects, in the forms of a table."""
    cells = []
    for m in columns:
        figure = result["summary"][m.name]
        text = mean.format(f"{figure['value']:.{m.digits}f}")
        if figure["interval_95"] is not None:
            text += interval.format(*(f"{x:.{m.digits}f}" for x in figure["interval_95"]))
        cells.append(text)
    return cells


def markdown(result: dict[str, Any]) -> str:
    """The table of a result, each object a row, with the protocol below."""
    columns = _columns(result)
    head = ["object", *(f"{m.label} {ARROWS[m.better]}" for m in columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in result["objects"]:
        cells = [f"{row['metrics'][m.name]:.{m.digits}f}" if m.name in row["metrics"] else ""
                 for m in columns]  # fmt: skip
        lines.append("| " + " | ".join([row["object"].replace("|", r"\|"), *cells]) + " |")
    cells = summary(result, columns, "**{}**", " [{}, {}]")
    lines.append("| " + " | ".join([f"all {result['num_objects']}", *cells]) + " |")
    if "against" in result:
        lines += ["", *_against(result, columns)]
    lines += ["", *(f"- {line}" for line in notes(result))]
    return "\n".join(lines) + "\n"


def _against(result: dict[str, Any], columns: list[Metric]) -> list[str]:
    against = result["against"]
    lines = [
        f"Less those of {against['path']}, object by object:",
        "",
        "| metric | difference | 95 % | better on |",
        "| --- | --- | --- | --- |",
    ]
    if "note" in against:
        lines[1:1] = ["", f"({against['note']})"]
    for m in columns:
        if m.name not in against["metrics"]:
            continue
        found = against["metrics"][m.name]
        interval = found["interval_95"]
        shown = "" if interval is None else "[{:+.{d}f}, {:+.{d}f}]".format(*interval, d=m.digits)
        lines.append(
            f"| {m.label} {ARROWS[m.better]} | {found['difference']:+.{m.digits}f} | {shown} "
            f"| {100 * found['better']:.0f} % of objects |"
        )
    return lines


def latex(result: dict[str, Any]) -> str:
    """One row of figures under its head, for a paper; needs booktabs."""
    columns = _columns(result)
    head = " & ".join(["", *(f"{m.label} {TEX_ARROWS[m.better]}" for m in columns)])
    cells = summary(result, columns, "{}", r" {{\scriptsize [{}, {}]}}")
    p = result["protocol"]
    comment = f"% protocol {p['name']}, version {p['version']}, {result['num_objects']} objects"
    return "\n".join(
        [
            comment,
            rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
            r"\toprule",
            head + r" \\",
            r"\midrule",
            " & ".join(["ours", *cells]) + r" \\",
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def notes(result: dict[str, Any]) -> list[str]:
    """What must stand beside the numbers: the protocol, weights, warnings, what is left out."""
    lines = list(result["protocol"]["text"])
    lines += [f"left out: {name}: {why}" for name, why in result["protocol"]["left_out"].items()]
    for name, figure in result["summary"].items():
        if "warning" in figure:
            lines.append(f"warning: {name}: {figure['warning']}")
        if "interval" in figure:
            lines.append(f"the interval of {name} is {figure['interval']}")
    for about in result["weights"].values():
        lines.append(f"weights of {about['network']}: {about['file']}, digest {about['digest']}")
    if made := result["generation"]:
        seconds, peak = made["seconds"], made["peak_memory_bytes"]
        line = f"generation: {seconds['mean']:.1f} s an object (median {seconds['median']:.1f})"
        line += "" if peak is None else f", at most {peak / 2**30:.2f} GiB of device memory"
        devices = ", ".join(made["devices"]) or "a device not told"
        lines.append(f"{line}, on {devices}; {made['objects']} objects say so")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return [*lines, f"{versions}; {result['device']}; {result['seconds']:.0f} s"]
