"""The tables of the documents, made from files of docs/results: `make.py` puts them in."""

import functools
import json
import re
from collections.abc import Callable
from typing import Any

from figures import IN_PAIRS, RESULTS, ROOT, parity, results

from fourdstar_jax.cli import read_config
from fourdstar_jax.evaluate import protocols, report

BUNDLED_RESULTS = ("small_unseen_clip", "small_unseen_object")  # of the bundled model


def table(*rows: list[str]) -> str:
    """Markdown of rows, the first of which is the head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join(re.sub(r"  +", " ", f"| {' | '.join(line)} |\n") for line in lines)


PICTURES = ("psnr", "psnr_in_mask", "alpha_iou", "lpips")
SMALL_FIGURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "the tokenizer's own decode": ("tokenizer", ("psnr", "psnr_in_mask", "lpips")),
    "4D VQ-VAE on true tokens, the three other views": ("ceiling", PICTURES),
    "generation from the video alone, the same views": ("generation", PICTURES),
    "the video's first frame as a flat card": ("flat_card", PICTURES),
    "the training clip whose video is nearest": ("nearest_clip", PICTURES),
}


def small_table() -> str:
    """The bundled model's pictures beside what costs nothing, of unseen clips / unseen objects."""
    found = [results(name)["figures"] for name in BUNDLED_RESULTS]

    def shown(row: str, name: str, digits: int) -> str:
        values = [figures.get(f"{row}_{name}") for figures in found]
        return " / ".join(f"{value:.{digits}f}" for value in values if value is not None)

    digits = {"psnr": 1, "psnr_in_mask": 1, "alpha_iou": 2, "lpips": 3}
    rows = [
        [label, *(shown(row, name, n) if name in names else "" for name, n in digits.items())]
        for label, (row, names) in SMALL_FIGURES.items()
    ]
    return table(["", "PSNR", "in the mask", "alpha IoU", "LPIPS (Alex)"], *rows)


def _went_on(name: str, part: str) -> str:
    """A row's name, of a training that went on from another's weights."""
    return {
        "vqvae_on": f"{name}, on",
        "star_on": f"{name}, on",
        "star_muon": f"{name}, by Muon",
        "vqvae_sides": f"{name}, three sides",
        "star_decayed": f"{name}, three sides",
    }.get(part, name)


def small_training_table() -> str:
    """The bundled model's training: what was measured of it on the way."""
    found = results("small_training_h200")
    rows = [
        ["tokenizer, unseen clips", f"{r['step']:,}", f"{r['psnr']:.1f} ({r['psnr_in_mask']:.1f})"]
        + [f"{r['lpips']:.3f}", "", ""]
        for r in (found["tokenizer"]["eval"][i] for i in (0, 2, -1))
    ]
    for part in ("vqvae", "vqvae_on", "vqvae_sides"):
        for r in found[part]["log"][slice(0 if part == "vqvae_sides" else 1, None, 2)]:
            rows.append([_went_on("4D VQ-VAE, its batches", part), f"{r['step']:,}"])
            rows[-1] += [f"{r['psnr']:.1f}", f"{r['lpips']:.3f}", "", ""]
    for part in ("star", "star_on", "star_muon", "star_decayed"):
        evaluated = found[part].get("eval") or found[part]["eight timesteps"]["eval"]
        for r in evaluated if len(evaluated) < 4 else evaluated[part == "star_on" :: 2]:
            after = [r[f"nll_group{i}"] for i in range(2, 9)]
            nats = f"{r['nll_group1']:.2f} / {sum(after) / len(after):.2f}"
            rows.append([_went_on("STAR, unseen clips", part), f"{r['step']:,}", "", "", nats])
            rows[-1].append(f"{100 * r['accuracy']:.0f} %")
    head = ["", "step", "PSNR (inside the mask)", "LPIPS (VGG)"]
    return table([*head, "NLL at t = 1 / after it", "right codes"], *rows)


def tiny_table() -> str:
    """Figures of a tiny model on clips and objects that it has not seen."""
    both = [results("tiny_unseen_clip"), results("tiny_unseen_object")]

    def row(name: str, tell: Callable[[dict, dict], str]) -> list[str]:
        return [name, *(tell(r["reconstruction"], r["likelihood"]) for r in both)]

    def interval(values: list[float], digits: int) -> str:
        mean, low, high = (f"{x:+.{digits}f}" for x in values)
        return f"{mean} [{low}, {high}]"

    def psnr(key: str) -> Callable[[dict, dict], str]:
        return lambda r, _: f"{r[f'{key}_psnr']:.2f} ({r[f'{key}_psnr_in_mask']:.2f})"

    return table(
        ["", *(f"{r['num_clips']} clips, {r['split']}" for r in both)],
        row("4D VQ-VAE, PSNR (inside the mask)", psnr("model")),
        row("mean training image of each view", psnr("mean_image")),
        row("the tokenizer's own decoder, view by view", psnr("tokenizer")),
        row("gain over the mean image", lambda r, _: interval(r["gain_over_mean_image_psnr"], 2)),
        row(
            "the same inside the mask",
            lambda r, _: interval(r["gain_over_mean_image_psnr_in_mask"], 2),
        ),
        row(
            "gain of the offsets over the coarse Gaussians",
            lambda r, _: interval(r["gain_of_offsets_psnr"], 2),
        ),
        row("STAR, NLL of the novel views' codes", lambda _, x: f"{x['nll_novel'][0]:.3f}"),
        row(
            "count model (codebook, previous token in the row)",
            lambda _, x: f"{x['count_model_nll_novel'][0]:.3f}",
        ),
        row("STAR minus count model", lambda _, x: interval(x["star_minus_count_model"], 3)),
        row(
            "rise with another clip's video", lambda _, x: interval(x["rise_with_another_video"], 3)
        ),
        row(
            "rise with another object's container",
            lambda _, x: interval(x["rise_with_another_container"], 4),
        ),
        row("rise with swapped captions", lambda _, x: interval(x["rise_with_another_text"], 4)),
    )


DECODERS = {
    "as before": "as before: MSE of colour and alpha",
    "as before, lpips, foreground": "LPIPS 0.2, foreground weight 1",
    "plane+own+limits": "the same, own depth and opacity until 60 %, scale limits (a)",
    "full": "(a), position = ray x depth, small residual beside the ray",
    "full-no-decay": "that one, own losses at full weight to the end",
    "ray": "that one without own losses",
    "full-free-scales": "that one without scale limits",
    "color": "(a) and own colours",
    "color-floor0.2": "that one, own losses to a fifth at the end",
    "color-2rig+4novel": "(a) and own colours, two rig views and four others a step",
}


def decoder_table() -> str:
    """Decoders of the 4D VQ-VAE on novel views of unseen clips."""
    variants = results("decoder_h200")["variants"]
    rows = []
    for key, name in DECODERS.items():
        r = variants[key]["unseen_clip"]
        ratio = f"{r['axis_ratio']:,.0f}" if r["axis_ratio"] > 10 else f"{r['axis_ratio']:.1f}"
        rows.append(
            [name, f"{r['novel_lpips']:.3f}", f"{r['novel_masked']:.1f}"]
            + [f"{r['depth_error_median']:.3f}", f"{100 * r['covered']:.0f} %", ratio]
        )
    return table(["", "LPIPS", "PSNR in mask", "depth error", "covered", "axis ratio"], *rows)


def star_table() -> str:
    """What STAR at size small loses without each of its conditions."""
    splits = [results("star_small_h200")[name] for name in ("unseen_clip", "unseen_object")]
    names = {
        "true": "its own",
        "other_history": "the container of another object",
        "other_video": "another clip's video",
        "reversed_video": "its video reversed",
        "zero_times": "all times zero",
        "wrong_camera": "left and right views exchanged",
    }
    rows = []
    for key, name in names.items():
        nll = [(r[key]["obj_t2"], r[key]["obj_t2"] - r["true"]["obj_t2"]) for r in splits]
        rows.append([name, *(f"{x:.2f}" + (f" ({rise:+.2f})" if rise else "") for x, rise in nll)])
    return table(["what STAR is given", "unseen clips", "unseen objects"], *rows)


def offsets_table() -> str:
    """What the offsets gain at a tenth of wrong codes, by how they were trained."""
    names = {"base": "all places and times", "time": "its place at all times (`small`)"}
    kinds = {"clip": "unseen clips", "object": "unseen objects"}
    rows = []
    for key, name in names.items():
        for kind, told in kinds.items():
            r = results("offsets_h200")["variants"][key][kind]["0.1"]
            row = [f"{name}, {told}"]
            for part in ("temporal_error", "warping_error", "temporal_lpips", "lpips"):
                mean, low, high = (100 * x for x in r[part]["gain_share"])
                row.append(f"{mean:.1f} % [{low:.1f}, {high:.1f}]")
            mean, low, high = (-x for x in r["psnr_in_mask"]["gain"])
            rows.append([*row, f"{mean:+.2f} dB [{high:+.2f}, {low:+.2f}]"])
    head = ["queries attend to; seen on", "temporal error", "warping error", "temporal LPIPS"]
    return table([*head, "LPIPS", "PSNR in mask"], *rows)


ABLATIONS = {
    "baseline": ["Baseline", "all their tokens, by attention; no container"],
    "average": ["B, temporal average pooling", "at each place the mean of its features over time"],
    "merging": [
        "C, learned token merging",
        "at each place a mean weighed by an MLP's scores, then an MLP",
    ],
    "explicit": [
        "A, explicit state propagation",
        "at each place the feature of the token a timestep before, and no more",
    ],
    "": ["ours", "the container, a slot for every third place"],
    "slots": ["", "the container, a slot a place"],
}


def ablations_table() -> str:
    """The ablations of Table 4, how to train each, and what it costs."""
    counted, timed = results("ablations"), results("ablations_cpu")["rows"]
    trained = results("tables_small_h200")["star"]
    rows = []
    for name, (paper, knows) in ABLATIONS.items():
        r = counted[name or "ours"]
        cells = [f"{r['parameters'] / 1e6:.1f}", f"{r['forward_flop'] / 1e9:.1f}"]
        cells += [" / ".join(f"{seed['nll']:.3f}" for seed in trained[name or "ours"]["unseen"])]
        if tiny := timed.get(name or "ours"):
            cells += [f"{tiny['forward_gflop']:.2f}", f"{tiny['waited_s']:.2f}"]
            cells += [f"{tiny['waited_s'] / timed['ours']['waited_s']:.2f}"]
        cells += [""] * (6 - len(cells))
        rows.append([paper, name and f"`{name}`", knows, *cells])
    head = ["paper", "NAME", "what a group knows of those before", "M parameters", "GFLOP"]
    return table([*head, "nats a code", "`tiny`: GFLOP", "s a step", "of ours"], *rows)


def compared_tables(number: int, split: str) -> str:
    """The paper's Table 3 or 4 on our data, and the differences of its rows from ours in pairs."""
    r = results("tables_small_h200")[f"table{number}"][split]
    config = read_config(f"{ROOT}/configs/tables/{'stop' if number == 3 else 'state'}.py", [])
    labels = {name: config.rows[name].label for name in config.order if name in r["rows"]}
    metrics = protocols.find(r["protocol"][0]).metrics

    def head(shown: list[protocols.Metric]) -> list[str]:
        return ["", *(f"{m.label} {report.ARROWS[m.better]}" for m in shown)]

    shown = [m for m in metrics if m.name in r["rows"][config.against]]
    rows = [
        [label, *(f"{r['rows'][name][m.name]['value']:.{m.digits}f}" for m in shown)]
        for name, label in labels.items()
    ]
    differences = r["differences"][config.against]
    paired = [m for m in shown if m.name in IN_PAIRS]
    less = [
        [f"{label} less {labels[config.against]}"]
        + [_difference(differences[name][m.name], m.digits) for m in paired]
        for name, label in labels.items()
        if name != config.against
    ]
    return table(head(shown), *rows) + "\n" + table(head(paired), *less)


def _difference(found: dict[str, Any], digits: int) -> str:
    """With its interval, and bold where zero is outside."""
    numbers = (f"{x:+.{digits}f}" for x in (found["difference"], *found["interval_95"]))
    text = "{} [{}, {}]".format(*numbers)
    return f"**{text}**" if found["interval_95"][0] * found["interval_95"][1] > 0 else text


def sizes_table() -> str:
    """Parameters of every config, and what training keeps of STAR's."""
    rows = []
    for scale, r in results("sizes").items():
        counts = [r[stage] / 1e6 for stage in ("tokenizer", "vqvae", "star")]
        rows.append(
            [f"`{scale}`", f"{r['pixels']}x{r['pixels']}", str(r["timesteps"])]
            + [f"{count:,.{1 if count < 100 else 0}f}" for count in counts]
            + [f"{r['state_bytes'] * r['star'] / 1e9:.2f}"]
        )
    head = ["config", "pictures", "timesteps", "tokenizer, M", "4D VQ-VAE, M", "STAR, M"]
    return table([*head, "STAR's state in training, GB"], *rows)


def training_table() -> str:
    """Every training step that was measured, by `fourdstar bench train` or in a training."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        r = json.loads(path.read_text())
        if not isinstance(r, dict) or not r.get("step") or r.get("stage") not in ("vqvae", "star"):
            continue
        s = r["step"]
        cards = f"{r['devices']} x {r['device']}" if r.get("devices", 1) > 1 else r["device"]
        share = f" ({100 * s['mfu']:.0f} % of the peak)" if s.get("mfu") else ""
        rows.append(
            [f"[{r['stage']}, {r['size']}](results/{path.name})", cards]
            + [f"{r['objects']} x {r['timesteps']} x {r['views']}", f"{s['step_s']:.3g}"]
            + [f"{s['program_bytes'] / 1e9:.1f}" if s.get("program_bytes") else ""]
            + [f"{s['tflops']:.0f}{share}", f"{s['trace_s'] + s['compile_s']:.0f}"]
        )
    star, decoder = results("star_small_h200"), results("decoder_h200")
    rows.append(
        ["[star, small (1,200 steps of training)](results/star_small_h200.json)", star["device"]]
        + [f"{star['batch']} x 6 x 4", f"{star['ms_step'] / 1e3:.3g}", "", "", ""]
    )
    chosen = decoder["variants"]["color-2rig+4novel"]
    rows.append(
        ["[vqvae, small (static decoder alone)](results/decoder_h200.json)", "NVIDIA H200"]
        + ["16 x 1 x 4", f"{chosen['ms_step'] / 1e3:.3g}", "", "", f"{chosen['compile_s']:.0f}"]
    )
    head = ["stage, config", "card", "objects x timesteps x views", "s a step", "GB"]
    return table([*head, "TFLOP/s", "s to trace and compile"], *rows)


def inference_table() -> str:
    """UniTok at its released size, and the demo."""
    r, demo = results("tokenizer_h200"), results("demo_cpu")
    rows = [
        [f"UniTok, {name} ({r['dtype']}, batch {r['batch']})", r["device"]]
        + [f"{x['images_per_s']:,.0f} pictures/s", f"{x['program_bytes'] / 1e9:.1f}"]
        for name, x in r["ours"].items()
    ]
    rows.append(
        [f"`fourdstar demo`, whole ({(n := demo['timesteps'])} timesteps, 72 + 4 x {n} pictures)"]
        + [demo["device"]]
        + [f"{demo['demo_s']:.0f} s", f"{demo['demo_peak_bytes'] / 1e9:.1f}"]
    )
    rows.append(
        ["`./launch/demo.sh` in a fresh clone, with the installation", demo["device"]]
        + [f"{demo['fresh_clone_s']:.0f} s", ""]
    )
    return table(["what", "on", "speed", "GB"], *rows)


def scoring_table() -> str:
    """`fourdstar evaluate --protocol`, from its start to its end."""
    head = ["protocol", "metrics", "objects x views x frames", "on", "s", "GB of the host's memory"]
    rows = []
    for r in results("scoring")["runs"]:
        names = {m.name: m.label for m in protocols.find(r["protocol"]).metrics}
        rows.append(
            [f"`{r['protocol']}`", ", ".join(names[m] for m in r["metrics"])]
            + [f"{r['objects']} x {r['views']} x {r['frames']}, {r['size']}x{r['size']}"]
            + [", ".join(filter(None, (r["device"], r.get("note")))), f"{r['seconds']:.0f}"]
            + [f"{r['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in r else ""]
        )
    return table(head, *rows)


def rasterizer_table() -> str:
    from fourdstar_jax.kernels.rasterize import bench_table

    return bench_table.table(RESULTS / "rasterize_h200.json")


def parity_table() -> str:
    """The ports against the originals: the largest error of a block, and of the whole."""
    rows = []
    for part, errors in parity().items():
        whole = {"encoder", "decoder", "end_to_end", "images to tokens to images"}
        tokens = {name for name in errors if "wrong tokens" in name}
        blocks = {name: x for name, x in errors.items() if name not in whole | tokens}
        worst = max(blocks, key=blocks.__getitem__)
        ends = ", ".join(f"{name} {errors[name]:.1e}" for name in errors if name in whole)
        wrong = f"{sum(errors[name] for name in tokens):.0f}" if tokens else "none here"
        rows.append([part, f"{blocks[worst]:.1e} (`{worst}`)", ends, wrong])
    head = ["part", "largest error of a block", "from end to end", "wrong tokens"]
    return table(head, *rows)


TABLES: dict[str, Callable[[], str]] = {
    "small": small_table,
    "small_training": small_training_table,
    "tiny": tiny_table,
    "decoder_h200": decoder_table,
    "star_small_h200": star_table,
    "offsets_h200": offsets_table,
    "ablations": ablations_table,
    "sizes": sizes_table,
    "table3_clips": functools.partial(compared_tables, 3, "unseen_clip"),
    "table3_objects": functools.partial(compared_tables, 3, "unseen_object"),
    "table4_clips": functools.partial(compared_tables, 4, "unseen_clip"),
    "table4_objects": functools.partial(compared_tables, 4, "unseen_object"),
    "training": training_table,
    "inference": inference_table,
    "scoring": scoring_table,
    "rasterize_h200": rasterizer_table,
    "parity": parity_table,
}
