"""The pictures of the study: quality against cost, errors of the estimates against noise, and frames in rows."""

from pathlib import Path
from typing import Any

from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tools.output import as_image, atomic, plotting, save_png
from tools.study import report
from tools.study.report import DECIDED
from tools.study.summary import MEASURES, QUALITIES, Entry, Study, by_family, by_work, uncut
from tools.tiny import scenes

KINDS = {  # of a shortcut: colour (Okabe and Ito's) and marker
    "uncut": ("#333333", "s"),
    "guidance in some steps": ("#0072B2", "o"),
    "fewer steps": ("#D55E00", "^"),
    "deep features reused": ("#009E73", "D"),
    "fewer steps, and that": ("#CC79A7", "v"),
}
FRONTIER = "#c4c4c4"
FRAMES = {"panels-paper": "study-panels.png", "estimates": "study-estimates.png"}  # of families


def plots(study: Study, out: Path) -> None:
    families = by_family(study)
    if "frontier" in families:
        frontier_plot(families["frontier"], out / "study.png")
    if "estimates" in families:
        decided_plot(families["estimates"][1:], out / "study-decided.png")


def kind(entry: Entry) -> str:
    if entry["steps"] is not None:
        plain = entry["cut_step"] is None and entry["interval"] is None and entry["reuse"] is None
        return "fewer steps" if plain else "fewer steps, and that"
    if entry["reuse"] is not None:
        return "deep features reused"
    return "uncut" if entry["cut_step"] is None and entry["interval"] is None else "guidance in some steps"


def frontier_plot(entries: list[Entry], path: Path) -> None:
    """How each quality differs from the uncut run's, with the interval over scenes, against work and against time.

    Numbers are the rows of study.md's table, and of the list at the side; open markers are vcut=True.
    """
    costs = {"relative_macs": "work of the UNet", "relative_seconds": "measured time"}
    costs = {cost: words for cost, words in costs.items() if all(entry[cost] is not None for entry in entries)}
    figure = plotting()(figsize=(17, 9), layout="constrained")
    plots, key = figure.subfigures(1, 2, width_ratios=(3.6, 1))
    grid = plots.subplots(len(costs), len(QUALITIES), squeeze=False)
    for line, (cost, words) in zip(grid, costs.items(), strict=True):
        for axis, quality in zip(line, QUALITIES, strict=True):
            draw_quality(axis, entries, quality, cost)
        line[0].set_ylabel(f"by {words}, over that of vcut=False", fontsize=10)
    plots.legend(handles=legend(), loc="outside lower center", ncols=6, frameon=False)
    rows = [f"{n:2}  {short(entry)}" for n, entry in enumerate(by_work(entries), 1)]
    key.text(0, 0.98, "\n".join(rows), va="top", fontsize=9.5, linespacing=1.45)
    save(figure, path)


def draw_quality(axis: Any, entries: list[Entry], key: str, cost: str) -> None:
    measure, paired = MEASURES[key], key == "paired_psnr"
    scale = 100 if measure.unit == "%" else 1
    best = []
    for n, entry in enumerate(by_work(entries), 1):
        if paired and uncut(entry):
            continue
        zero = {"mean": 0.0, "low": 0.0, "high": 0.0}
        found = entry["measures"][key] if paired else entry["differences"].get(key) or zero
        x, y = entry[cost], scale * found["value" if paired else "mean"]
        spread = [[max(0, y - scale * found["low"])], [max(0, scale * found["high"] - y)]]
        colour, marker = KINDS[kind(entry)]
        face = "white" if entry["build"] is True else colour
        axis.errorbar(
            x, y, yerr=spread, color=colour, marker=marker, markersize=6, elinewidth=0.8, markerfacecolor=face
        )
        if key in entry["best"].get(cost, []):
            best.append((x, y))
            axis.annotate(str(n), (x, y), (-3, 6), textcoords="offset points", fontsize=8.5, ha="right")
    axis.plot(*zip(*sorted(best), strict=True), color=FRONTIER, linewidth=5, solid_capstyle="round", zorder=0)
    unit = "points" if measure.unit == "%" else measure.unit
    title = measure.title if paired else f"{measure.title}, less the uncut run's"
    axis.set_title(f"{title}{f', {unit}' if unit else ''}", loc="left", fontsize=11)
    axis.margins(x=0.08, y=0.12)
    plain(axis)


def short(entry: Entry) -> str:
    """An arm in a plot: only what is not the baseline's."""
    title = report.entry_title(entry).replace('`vcut="lossless"`', "").replace("`vcut=", "").replace("`", "")
    return {"": "uncut, exact", "False": "uncut, as released"}.get(title.strip(", "), title.strip(", "))


def plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)


def legend() -> list[Any]:
    from matplotlib.lines import Line2D  # pyright: ignore[reportMissingImports]  # of the extra `study`

    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", markersize=8, label=label)
        for label, (colour, marker) in KINDS.items()
    ]
    return [*handles, Line2D([], [], color=FRONTIER, linewidth=5, label="frontier (open: vcut=True)")]


def decided_plot(estimates: list[Entry], path: Path) -> None:
    """How the estimates D differ from the finished video, against sigma; a line from which on they do not."""
    figure = plotting()(figsize=(5 * len(DECIDED), 4), layout="constrained")
    for axis, (what, key) in zip(figure.subplots(1, len(DECIDED)), DECIDED.items(), strict=True):
        measure, deltas = MEASURES[key], [entry["differences"][key] for entry in estimates]
        sigmas = [entry["sigma"] for entry in estimates]
        axis.axhline(0, color="#333333", linewidth=0.8)
        axis.fill_between(sigmas, [d["low"] for d in deltas], [d["high"] for d in deltas], color="#0072B2", alpha=0.2)
        axis.plot(sigmas, [d["mean"] for d in deltas], "o-", color="#0072B2", markersize=4)
        if there := report.decided(estimates, key):
            axis.axvline(there["sigma"], color="#D55E00", linewidth=1.2)
        axis.set_xscale("log")
        axis.invert_xaxis()
        axis.set_xlabel("sigma of the step")
        unit = f", {measure.unit}" if measure.unit else ""
        axis.set_title(f"{what}: {measure.title} of D, less the video's{unit}", loc="left", fontsize=11)
        plain(axis)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


ZOOM, GAP, LABEL = 2, 12, 250  # pixels of the picture: a pixel's side, between scenes and rows, for the titles
SHOWN = (0, 2, 4, 7)  # frames


def row_title(arm: dict[str, Any], sigmas: list[float]) -> str:
    """What stands before an arm's row of frames."""
    if arm["estimate"] is not None:
        return f"D, sigma {sigmas[arm['estimate'] - 1]:.3g}"
    return report.panel_title(arm["embedding"], arm["switch"])


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
