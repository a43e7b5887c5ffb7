"""What tools/study/run.py found, as numbers, tables, sentences and pictures.

A row is one video: its `scene`, its `arm` and its measures, None where there was nothing to measure. An entry is one
arm of study.json. Intervals hold 95 %; a difference is that of an arm from the baseline, scene by scene.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tools.measure.metrics import bootstrap_interval, paired_difference, wilson_interval
from tools.output import as_image, atomic, plotting, save_png, table
from tools.tiny import scenes

Row = dict[str, Any]
Entry = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """How a measure is summed up and shown: `summary` is "mean", "median", "share" (of true) or "largest"."""

    key: str
    title: str
    summary: str = "mean"
    unit: str = ""
    digits: int = 3


TRUTH = (  # against the one right answer
    Measure("right", "right", "share", "%", 1),
    Measure("shape_kept", "shape kept", "share", "%", 1),
    Measure("found", "frames with shape", "mean", "%", 1),
    Measure("heading_error", "heading error", "median", "°", 2),
    Measure("speed_error", "speed error", "median", "%", 1),
    Measure("last_position_error", "last position", "mean", "px", 2),
    Measure("colour_error", "colour error"),
    Measure("first_frame_psnr", "first frame's PSNR", "mean", "dB", 2),
    Measure("psnr", "PSNR", "mean", "dB", 2),
)
ALONE = (  # of the video, or of it and its image
    Measure("subject_consistency", "subject consistency", digits=4),
    Measure("background_consistency", "background consistency", digits=4),
    Measure("image_subject_consistency", "image-subject consistency", digits=4),
    Measure("image_background_consistency", "image-background consistency", digits=4),
    Measure("motion", "motion", "mean", "px", 3),
    Measure("moving", "moving", "share", "%", 1),
)
PAIRED = (  # against the same scene's video in the baseline
    Measure("paired_psnr", "PSNR", "mean", "dB", 2),
    Measure("paired_ssim", "SSIM", digits=4),
    Measure("latent_difference", "largest latent difference", "largest", digits=6),
)
SUMMARIES: dict[str, Callable[[np.ndarray], float]] = {
    "mean": lambda values: float(np.mean(values)),
    "median": lambda values: float(np.median(values)),
    "share": lambda values: float(np.mean(values)),
    "largest": lambda values: float(np.max(values)),
}


# Numbers.


BASELINE = "False"  # the name of the arm that all are compared with: no cut, guided in every step


def summarise(entries: list[Entry], rows: list[Row]) -> list[Entry]:
    """The entries with `measures` (value, low, high, n) and `differences` from the baseline (mean, low, high, beyond).

    frontier_right and frontier_paired_psnr: is it on that frontier, among the arms conditioned on the embedding in
    every step? The baseline, which has no PSNR to itself, is not a rival for the second.
    """
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        found.setdefault(row["arm"], {})[row["scene"]] = row
    full = []
    for entry in entries:
        mine, theirs = found[entry["name"]], found[BASELINE]
        measures = {m.key: summary(m, [row[m.key] for row in mine.values()]) for m in (*TRUTH, *ALONE, *PAIRED)}
        differences = {
            m.key: difference([(mine[scene][m.key], theirs[scene][m.key]) for scene in mine])
            for m in (*TRUTH, *ALONE)
            if entry["name"] != BASELINE
        }
        full.append(entry | {"measures": measures, "differences": differences})
    for quality in ("right", "paired_psnr"):
        rivals = [entry for entry in full if entry["embedding"] == "all"]
        rivals = [entry for entry in rivals if quality == "right" or entry["name"] != BASELINE]
        points = [(entry["relative_macs"], entry["measures"][quality]["value"]) for entry in rivals]
        for entry, best in zip(rivals, frontier(points), strict=True):
            entry[f"frontier_{quality}"] = best
    return full


def summary(measure: Measure, values: list[float | None]) -> dict[str, float | None]:
    """A measure over the scenes where there was something to measure, with its 95 % interval."""
    kept = np.array([value for value in values if value is not None], dtype=float)
    if not len(kept):
        return {"value": None, "low": None, "high": None, "n": 0}
    value = SUMMARIES[measure.summary](kept)
    if measure.summary == "share":
        low, high = wilson_interval(int(kept.sum()), len(kept))
    elif measure.summary == "largest":
        low, high = None, None
    else:
        low, high = bootstrap_interval(kept, SUMMARIES[measure.summary])
    return {"value": value, "low": low, "high": high, "n": len(kept)}


def difference(pairs: list[tuple[float | None, float | None]]) -> dict[str, float | None]:
    """The mean of arm less baseline over the scenes that have both, and its interval; `beyond`: it leaves out 0."""
    kept = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not kept:
        return {"mean": None, "low": None, "high": None, "beyond": False}
    found = paired_difference([float(a) for a, _ in kept], [float(b) for _, b in kept])
    return {"mean": found.mean, "low": found.low, "high": found.high, "beyond": not found.low <= 0 <= found.high}


def frontier(points: list[tuple[float, float]]) -> list[bool]:
    """Of points (cost, quality): is there none that costs at most as much, is at least as good, and differs?"""
    return [
        not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points) for cost, quality in points
    ]


# Markdown.


def write_markdown(study: dict[str, Any], out: Path) -> None:
    """study.md in the folder, with the folder's reading.md, which a person wrote, at its end."""
    reading = out / "reading.md"
    with atomic(out / "study.md") as path:
        path.write_text(markdown(study, reading.read_text() if reading.exists() else ""))


def markdown(study: dict[str, Any], reading: str = "") -> str:
    plan, arms = study["plan"], study["arms"]
    families = list(dict.fromkeys(entry["family"] for entry in arms))
    blocks = [
        f"# The cuts, measured where the right answer is known\n\nMade by `{study['command']}`. {settings(study)}",
        HOW,
    ]
    for family in families:
        entries = [entry for entry in arms if entry["family"] == family]
        whole = [arm for arm in arms if arm["family"] == "builds" and arm["build"] in (False, entries[0]["build"])]
        shown = entries if family == "builds" else [*whole, *entries]
        blocks += [f"## {HEADINGS[family].format(switch=plan['switch'])}"]
        if family == "panels":
            blocks += ["![The frames of a few scenes in the four panels](study-panels.png)"]
        blocks += [measures_table(shown, TRUTH, "truth"), measures_table(shown, (*PAIRED, *ALONE), "pairs")]
        if family != "panels":
            blocks += [cost_table(shown)]
        blocks += ["\n".join(cut_sentences(entries) if entries[0]["cut_step"] else sentences(entries))]
    blocks += ["## Quality against cost", PLOT, "\n".join(frontier_sentences(arms))]
    if reading:
        blocks += [reading.strip()]
    return "\n\n".join(blocks) + "\n"


def settings(study: dict[str, Any]) -> str:
    plan, versions, (low, high) = study["plan"], study["versions"], study["guidance"]
    return (
        f"{study['scenes']} scenes that training never drew (seed {plan['seed']}), each with its own fps, motion "
        f"bucket and noise, the same in every arm. Model `{plan['model']}`, weights {study['weights']}, "
        f"{plan['steps']} steps, guidance {low:g} to {high:g}, noise augmentation {study['noise_aug']:g}. "
        f"minisvd {versions['minisvd']}, torch {versions['torch']}, Python {versions['python']}, "
        f"a machine of {study['cores']} cores. Seconds are processor time of the denoising of one video, on one "
        f"thread, each arm in full and in turn, the median of {study['timing_rounds']}."
    )


HOW = """
Every number in brackets is a 95 % interval over the scenes: Wilson's for a share, the bootstrap's for a mean or
median. A difference is the mean, over scenes, of the arm's figure less the baseline's for the same scene and noise. It
is **bold** where its interval leaves out zero: "beyond the interval" below. One in twenty would be so by chance, and
there are many. The baseline is `vcut=False`, guided in every step. Sampling is in float32; frames are decoded in
bfloat16, alike in every arm, which bounds how near two videos can come in PSNR; 100 dB are equal frames.

*Right*: the shape is in every frame, its heading is within 30 degrees where it travels at least 4 pixels, its colour
within 0.1 (RGB) and its form the true one. Heading and speed errors are medians, over the scenes that travel so far.
*Largest latent difference* is the largest of any number in any scene's latents, whose standard deviation is about 1.
Consistencies are VBench's formulas (tools/measure/metrics.py), the subject's with the tiny model's image encoder, the
background's with the pixels themselves; motion is the mean length of the largest 5 % of a Lucas-Kanade flow.
""".strip()

HEADINGS = {
    "builds": "What does omitting the temporal cross-attention change?",
    "cuts": "At which step may guidance be cut? (vcut=True)",
    "panels": "When does the CLIP embedding matter? (vcut=False; before and from step {switch})",
    "control": 'The same cuts on the exact build (vcut="lossless")',
}
PLOT = "![Share of right videos, and PSNR to the baseline, against the work of the UNet](study.png)"


def measures_table(entries: list[Entry], measures: tuple[Measure, ...], corner: str) -> str:
    """A line for each arm; the second line of a cell, if there is one, is the difference from the baseline."""
    corners = {"truth": "against the truth", "pairs": "against the baseline, and alone"}
    titles = [corners[corner], *(f"{m.title}{f', {m.unit}' if m.unit else ''}" for m in measures)]
    rows = [[entry_title(e), *(cell(e, m) for m in measures)] for e in entries]
    return table(titles, "l" + "r" * len(measures), rows)


def cell(entry: Entry, measure: Measure) -> str:
    """Value [interval]<br>difference."""
    found, delta = entry["measures"][measure.key], entry["differences"].get(measure.key)
    if found["value"] is None or (entry["name"] == BASELINE and measure in PAIRED):
        return "-"
    text = number(measure, found["value"])
    if found["low"] is not None:
        text += f" [{number(measure, found['low'])}, {number(measure, found['high'])}]"
    if delta is None or delta["mean"] is None:
        return text
    change = number(measure, delta["mean"], signed=True)
    return f"{text}<br>{f'**{change}**' if delta['beyond'] else change}"


def number(measure: Measure, value: float, signed: bool = False) -> str:
    scale = 100 if measure.unit == "%" else 1
    return f"{scale * value:{'+' if signed else ''}.{measure.digits}f}"


def cost_table(entries: list[Entry]) -> str:
    first = entries[0]["seconds"]
    titles, rows = ("cost", "MACs of the UNet", "of the baseline's", "seconds", "of the baseline's"), []
    for entry in entries:
        seconds = entry["seconds"]
        timed = ("-", "-") if seconds is None or first is None else (f"{seconds:.2f}", f"{seconds / first:.3f}")
        rows.append((entry_title(entry), f"{entry['macs'] / 1e9:.2f} G", f"{entry['relative_macs']:.3f}", *timed))
    return table(titles, "lrrrr", rows)


def entry_title(entry: Entry) -> str:
    """An arm in the words of the tables."""
    build = f"`vcut={entry['build']!r}`".replace("'", '"')
    if entry["embedding"] != "all":
        return f"embedding {panel_title(entry['embedding'], entry['switch'])}"
    return build if entry["cut_step"] is None else f"{build}, c={entry['cut_step']}, {entry['stage2']}"


def panel_title(embedding: str, switch: int | None) -> str:
    return {"all": "in all steps", "before": f"only before {switch}", "from": f"only from {switch}"}.get(
        embedding, "never"
    )


def sentences(entries: list[Entry]) -> list[str]:
    """For each arm but the baseline, what is different from it beyond the interval, and what is not."""
    lines = []
    for entry in (entry for entry in entries if entry["name"] != BASELINE):
        beyond = [m for m in (*TRUTH, *ALONE) if entry["differences"][m.key]["beyond"]]
        within = [m.title for m in (*TRUTH, *ALONE) if m not in beyond]
        changes = ", ".join(f"{m.title} {change(entry, m)}" for m in beyond)
        lines.append(f"- {entry_title(entry)}. Different beyond the interval: {changes or 'nothing'}. "
                     f"Not: {', '.join(within) or 'nothing'}.")  # fmt: skip
    return lines


def cut_sentences(entries: list[Entry]) -> list[str]:
    """For each form of the one branch, the cut steps at which a measure is different from the baseline's."""
    lines = []
    for stage2 in dict.fromkeys(entry["stage2"] for entry in entries):
        cuts = [entry for entry in entries if entry["stage2"] == stage2]
        by_steps: dict[tuple[int, ...], list[str]] = {}
        for m in (*TRUTH, *ALONE):
            steps = tuple(entry["cut_step"] for entry in cuts if entry["differences"][m.key]["beyond"])
            by_steps.setdefault(steps, []).append(m.title)
        never = by_steps.pop((), ["nothing"])
        parts = []
        for steps, titles in sorted(by_steps.items(), key=lambda item: -len(item[0])):
            where = "every c" if len(steps) == len(cuts) else f"c={', '.join(map(str, steps))}"
            parts.append(f"{', '.join(titles)} (at {where})")
        lines.append(f"- {stage2}. Different beyond the interval: {'; '.join(parts) or 'nothing'}. "
                     f"At no c: {', '.join(never)}.")  # fmt: skip
    return lines


def change(entry: Entry, measure: Measure) -> str:
    """+1.5 % [+0.5, +2.4]."""
    delta = entry["differences"][measure.key]
    mean, low, high = (number(measure, delta[key], signed=True) for key in ("mean", "low", "high"))
    return f"{mean}{f' {measure.unit}' if measure.unit else ''} [{low}, {high}]"


def frontier_sentences(arms: list[Entry]) -> list[str]:
    lines = []
    for key, words in (("right", "share of right videos"), ("paired_psnr", "PSNR to the baseline")):
        best = sorted((e for e in arms if e.get(f"frontier_{key}")), key=lambda e: e["relative_macs"])
        measure = next(m for m in (*TRUTH, *PAIRED) if m.key == key)
        names = "; ".join(
            f"{entry_title(e)} ({e['relative_macs']:.3f} of the work, {number(measure, e['measures'][key]['value'])} "
            f"{measure.unit})"
            for e in best
        )
        lines.append(f"- No other arm costs at most as much and has at least the same {words}: {names}.")
    return lines


# Pictures.

COLOURS = {"mean": "#0072B2", "cond": "#D55E00", "uncond": "#009E73", "none": "#333333"}  # Okabe and Ito's
FRONTIER = "#c4c4c4"
MARKERS = {False: "s", "lossless": "D", True: "o"}


def plot(study: dict[str, Any], path: Path) -> None:
    """Quality against cost: the share of right videos, and PSNR to the baseline; the frontier is a line."""
    figure = plotting()(figsize=(11, 5), layout="constrained")
    arms = [entry for entry in study["arms"] if entry["embedding"] == "all"]
    axes = figure.subplots(1, 2)
    panels = (("right", "right videos, %", 100), ("paired_psnr", "PSNR to the baseline, dB", 1))
    for axis, (key, title, scale) in zip(axes, panels, strict=True):
        shown = [entry for entry in arms if f"frontier_{key}" in entry]
        if key == "paired_psnr":  # the exact build is far above all others, and says so in words
            exact = [entry for entry in shown if entry["build"] == "lossless" and entry["cut_step"] is None]
            shown = [entry for entry in shown if entry not in exact]
            words = "\n".join(f'vcut="lossless", guided: {e["measures"][key]["value"]:.0f} dB \u2191' for e in exact)
            axis.annotate(words, (1, 0.03), xycoords="axes fraction", ha="right")
        best = sorted((place(e), scale * e["measures"][key]["value"]) for e in shown if e[f"frontier_{key}"])
        axis.plot(*zip(*best, strict=True), "o", color=FRONTIER, markersize=17, zorder=1)
        edge = [(x, y) for x, y in best if y == max(y for _, y in best[: best.index((x, y)) + 1])]
        axis.plot(*zip(*edge, strict=True), color=FRONTIER, linewidth=1.5, zorder=1)
        for entry in shown:
            draw_arm(axis, entry, key, scale)
        for x, cut_step in {round(e["relative_macs"], 3): e["cut_step"] for e in shown if e["cut_step"]}.items():
            axis.annotate(f"c={cut_step}", (x, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom")
        axis.set_xlabel("work of the UNet, relative to the baseline")
        axis.set_title(title, loc="left", pad=22)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
    figure.legend(handles=legend(), loc="outside lower center", ncols=4, frameon=False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)


def draw_arm(axis: Any, entry: Entry, key: str, scale: float) -> None:
    """An arm with its interval."""
    found = {name: scale * value for name, value in entry["measures"][key].items() if name != "n"}
    axis.errorbar(
        place(entry),
        found["value"],
        yerr=[[max(0, found["value"] - found["low"])], [max(0, found["high"] - found["value"])]],
        color=COLOURS[entry["stage2"] if entry["cut_step"] else "none"],
        marker=MARKERS[entry["build"]],
        markerfacecolor="white" if entry["build"] == "lossless" else None,
        markersize=7,
        elinewidth=1,
    )


def place(entry: Entry) -> float:
    """An arm's cost, a little aside where others have the same."""
    if entry["build"] == "lossless":
        return entry["relative_macs"] - 0.007
    return entry["relative_macs"] + {"mean": 0.0, "cond": 0.007, "uncond": 0.014}[entry["stage2"]]


def legend() -> list[Any]:
    from matplotlib.lines import Line2D  # pyright: ignore[reportMissingImports]  # of the extra `study`

    colours = {"mean": "one branch: mean", "cond": "conditional", "uncond": "unconditional", "none": "no cut"}
    builds: dict[Any, str] = {False: "vcut=False", "lossless": 'vcut="lossless"', True: "vcut=True"}
    handles = [Line2D([], [], color=COLOURS[key], linewidth=4, label=label) for key, label in colours.items()]
    handles += [
        Line2D([], [], color="#333333", marker=MARKERS[build], linestyle="", label=label,
                   markerfacecolor="white" if build == "lossless" else None)
        for build, label in builds.items()
    ]  # fmt: skip
    return [*handles, Line2D([], [], color=FRONTIER, marker="o", markersize=14, label="frontier")]


ZOOM, GAP, LABEL = 2, 12, 210  # pixels of the picture: a pixel's side, between scenes and rows, for the titles
SHOWN = (0, 2, 4, 7)  # frames


def frames_picture(rows: dict[str, list[Tensor]], path: Path) -> None:
    """Titled rows of frames: for each title, a clip [t,3,H,W] in [0,1] of each scene, some of its frames."""
    side = ZOOM * scenes.SIZE
    wide = len(SHOWN) * side + GAP
    columns = len(next(iter(rows.values())))
    picture = Image.new("RGB", (LABEL + columns * wide - GAP, len(rows) * (side + GAP) - GAP), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(28)
    for i, (title, clips) in enumerate(rows.items()):
        top = i * (side + GAP)
        draw.text((LABEL - 14, top + side / 2), title, "black", font, anchor="rm")
        for j, clip in enumerate(clips):
            strip = rearrange(clip[list(SHOWN)], "t c h w -> h (t w) c")
            picture.paste(as_image(strip, ZOOM), (LABEL + j * wide, top))
    save_png(picture, path)
