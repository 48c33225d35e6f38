"""The results of `bench.py` as a Markdown table."""

import json
from pathlib import Path

from fourdstar_jax.kernels.rasterize.bench import PASSES


def table(json_file: Path) -> str:
    """A results file as Markdown, as in docs/RASTERIZER.md."""
    results = json.loads(json_file.read_text())
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    driver = f", driver {results['driver']}" if results["driver"] else ""
    lines = [
        f"{results['device']}{driver}; {versions}; commit {results['commit']}; {results['date']}. "
        f"A copy on the device reads and writes {results['copy_bytes_per_s'] / 1e9:.0f} GB/s.",
        "",
        "| scene | | forward, ms | ratio | forward + backward, ms | ratio | peak memory, GB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]

    def numbers(values):
        return " / ".join(f"{x:.{2 if x < 10 else 1 if x < 100 else 0}f}" for x in values)

    for entry in results["scenes"]:
        times = f"{entry['timesteps']} x " if entry["timesteps"] > 1 else ""
        what = f"{entry['scene']}: {times}{entry['num']:,} Gaussians, {entry['views']} views of "
        what += f"{entry['width']}x{entry['height']}"
        for line in entry["results"]:
            cells = [what, line["implementation"]]
            for part in PASSES:
                cells.append(numbers(line[part][k] for k in ("sync_ms", "back_to_back_ms")))
                share = line.get("ratios", {}).get(part, {})
                cells.append(" / ".join(f"{x:.2f}" for x in share.values()))
            share = f" ({line['ratios']['memory']:.1f}x)" if "ratios" in line else ""
            cells.append(f"{line['program_bytes'] / 1e9:.2f}{share}")
            lines.append("| " + " | ".join(cells) + " |")
            what = ""
        if gsplat := entry.get("gsplat"):
            cells = [what, "gsplat"]
            for part in PASSES:
                keys = ("sync_ms", "back_to_back_ms", "kernels_ms")
                cells += [numbers(gsplat[part][k] for k in keys), ""]
            cells.append(f"{gsplat['peak_bytes'] / 1e9:.2f}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
