"""Pictures for slides, as SVGs that any browser shows, light or dark as the reader's.

    python -m tools.teach.pictures                  writes tools/results/u.svg, stages.svg and theorem.svg

u.svg        the U of a released network, each block in its spatial and its temporal half, and where each build cuts
stages.svg   the two-stage schedule: noise levels, the branches that run, what they cost
theorem.svg  weights of real queries over one key and over two, in a cross-attention of the small model
"""

import argparse
import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from minisvd import load
from minisvd.config import GenerationConfig, UNetConfig, Vcut
from minisvd.folder import resolve_configs
from minisvd.images import load_image
from minisvd.sampler import SHARE, edm_sigmas, preconditioning
from tools.cost.accounting import BUILDS, Block, by_kind, run_cost, total, unet_blocks, unet_cost
from tools.output import atomic
from tools.teach.maps import watched, weights

LIGHT = {"ground": "#ffffff", "ink": "#1f2328", "faint": "#59636e", "line": "#8c959f", "space": "#cfe3ff"}
LIGHT |= {"time": "#ffddc2", "sca": "#0b5cd5", "tca": "#b34700", "mark": "#ffffff", "edge": "#59636e"}
DARK = {"ground": "#0d1117", "ink": "#e6edf3", "faint": "#9198a1", "line": "#6e7681", "space": "#1c3a66"}
DARK |= {"time": "#5c3310", "sca": "#79b8ff", "tca": "#ffab70", "mark": "#0d1117", "edge": "#9198a1"}
PAPER_CUT = 17  # of 25, the step at which arXiv 2407.19205 cuts guidance at no visible cost
STROKES = ("line", "edge", "sca", "tca", "ink", "faint")


def style(scope: str = "") -> str:
    """Classes `f-NAME` that fill and `s-NAME` that stroke with a colour, in light and in dark."""

    def rules(colours: dict[str, str]) -> str:
        fills = [f"{scope}.f-{name}{{fill:{colour}}}" for name, colour in colours.items()]
        return " ".join(fills + [f"{scope}.s-{name}{{stroke:{colours[name]}}}" for name in STROKES])

    type_ = f"{scope}text{{font-family:system-ui,'Segoe UI',Helvetica,Arial,sans-serif}}"
    return f"{type_} {rules(LIGHT)} @media (prefers-color-scheme: dark){{{rules(DARK)}}}"


class Drawing:
    """Shapes in the order in which they are drawn. Lengths in pixels, y downwards."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height, self.title, self.parts = width, height, title, []

    def text(
        self, x: float, y: float, words: str, size: float = 12, fill: str = "ink", at: str = "start", bold: bool = False
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{at}" font-size="{size:g}"'
        self.parts.append(f'<text class="f-{fill}" {place}{weight}>{escape(words)}</text>')

    def rect(
        self, x: float, y: float, w: float, h: float, fill: str = "", stroke: str = "", r: float = 2, more: str = ""
    ) -> None:
        paint = " ".join(f"{kind}-{name}" for kind, name in (("f", fill), ("s", stroke)) if name)
        none = "" if fill else ' fill="none"'
        box = f'x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{r:g}"'
        self.parts.append(f'<rect class="{paint}" {box}{none}{more}/>')

    def path(self, d: str, stroke: str = "line", width: float = 1.2, arrow: bool = False, more: str = "") -> None:
        end = ' marker-end="url(#arrow)"' if arrow else ""
        self.parts.append(f'<path class="s-{stroke}" d="{d}" fill="none" stroke-width="{width:g}"{end}{more}/>')

    def open(self, title: str, more: str = "") -> None:
        """Begin a group that says `title` under the pointer."""
        self.parts.append(f"<g{more}><title>{escape(title)}</title>")

    def close(self) -> None:
        self.parts.append("</g>")

    def svg(self, css: str = "") -> str:
        size = f'width="{self.width:.0f}" height="{self.height:.0f}" viewBox="0 0 {self.width:.0f} {self.height:.0f}"'
        arrow = '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        arrow += '<path class="f-line" d="M0 0L8 4L0 8z"/></marker>'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{escape(self.title)}</title>'
        ground = '<rect class="f-ground" width="100%" height="100%"/>'
        parts = [head, f"<style>{css or style()}</style><defs>{arrow}</defs>", ground, *self.parts, "</svg>", ""]
        return "\n".join(parts)


# --- the U ----------------------------------------------------------------------------------------------------------

HALF, GAP, ROW, INDENT = 26, 7, 118, 84  # height of a half block; between blocks; from level to level; a level's shift
WIDTHS = {"resnets": 30, "attentions": 46}  # of blocks; others, which have no temporal half, are narrow
NARROW = 18


def shape(block: Block) -> str:
    """Channels that enter and leave, and the grid that leaves."""
    skip = f" + {block.skip}" if block.skip else ""
    grid = "".join(f", {'x'.join(map(str, block.leaves[1:]))}" for _ in block.leaves[1:2])
    return f"{block.enters[0]}{skip} → {block.leaves[0]} channels{grid}"


def numbers(block: Block) -> str:
    cost = total(block.sites)
    return f"{cost.parameters:,} parameters, {cost.macs / 1e9:,.2f} G MACs a step"


def counted(macs: float) -> str:
    """In T = 10^12, G or M, three digits of it or more."""
    size, unit = next(((s, u) for s, u in ((1e12, "T"), (1e9, "G")) if macs >= s), (1e6, "M"))
    return f"{macs / size:,.0f} {unit}" if macs >= 100 * size else f"{macs / size:.3g} {unit}"


def sort_of(block: Block) -> str:
    """resnets, attentions, downsamplers, ..., or the name of one that is alone."""
    return block.name.split(".")[-2] if "." in block.name else block.name


def halves(block: Block) -> tuple[bool, bool]:
    """Has it a spatial half, a temporal half?"""
    temporal = any("temporal" in site.kind or site.kind == "TCA" for site in block.sites)
    return True, temporal


def cross_attentions(block: Block) -> list[str]:
    """Kinds of its cross-attentions: SCA, TCA, one of them or none."""
    return [kind for kind, cost in by_kind(block.sites).items() if kind in ("SCA", "TCA") and cost.parameters]


def rows(blocks: Sequence[Block]) -> tuple[list[list[Block]], list[list[Block]], list[Block]]:
    """Blocks of each level on the way down and on the way up, and those of the middle; each on the grid it leaves."""
    last = max(block.level for block in blocks)
    down: list[list[Block]] = [[] for _ in range(last + 1)]
    up: list[list[Block]] = [[] for _ in range(last + 1)]
    middle = []
    for block in blocks:
        if block.name.startswith("mid_block"):
            middle.append(block)
        elif block.name.startswith("up_") or block.name in ("conv_norm_out", "conv_out"):
            up[block.level - ("upsamplers" in block.name)].append(block)
        elif len(block.leaves) == 3:
            down[block.level + ("downsamplers" in block.name)].append(block)
    return down, up, middle


def width_of(line: Sequence[Block]) -> float:
    return sum(WIDTHS.get(sort_of(block), NARROW) + GAP for block in line) - GAP


def draw_block(d: Drawing, block: Block, x: float, y: float, first: int, index: int) -> float:
    """One block at (x, y); `first` is the number of its cross-attentions. Returns its width."""
    w = WIDTHS.get(sort_of(block), NARROW)
    d.open(f"{block.name}: {shape(block)}, {numbers(block)}", f' class="block" data-block="{index}"')
    spatial_only = not halves(block)[1]
    d.rect(x, y, w, HALF, "space", "edge")
    if not spatial_only:
        d.rect(x, y + HALF, w, HALF, "time", "edge")
    for kind in cross_attentions(block):
        top = y + 4 + (HALF if kind == "TCA" else 0)
        d.rect(x + w / 2 - 10, top, 20, HALF - 8, kind.lower())
        d.text(x + w / 2, top + 13.5, str(first), 11, "mark", "middle", bold=True)
    d.close()
    return w


def draw_u(d: Drawing, blocks: Sequence[Block], top: float) -> float:
    """The U at the left edge, from y = `top` down. Returns where it ends."""
    down, up, middle = rows(blocks)
    order = {block.name: i for i, block in enumerate(blocks)}
    sites = {b.name: n for n, b in enumerate((b for b in blocks if sort_of(b) == "attentions"), start=1)}
    place: dict[str, tuple[float, float]] = {}

    def line(row: Sequence[Block], x: float, y: float) -> None:
        for before, block in zip([None, *row], row, strict=False):
            if before is not None:
                d.path(f"M{x - GAP:.1f} {y + HALF / 2:.1f}h{GAP}")
            place[block.name] = (x, y)
            x += draw_block(d, block, x, y, sites.get(block.name, 0), order[block.name]) + GAP

    ends: list[tuple[Block, Block]] = []
    for level, (left, right) in enumerate(zip(down, up, strict=True)):
        y = top + level * ROW
        line(left, 20 + level * INDENT, y)
        line(right, d.width - 20 - level * INDENT - width_of(right), y)
        kept = [block for block in left if block.keeps]
        taken = [block for block in right if block.skip]
        for k, (one, other) in enumerate(zip(reversed(kept), taken, strict=True)):  # last in, first out
            (x_1, _), (x_2, _) = place[one.name], place[other.name]
            x_1, x_2 = x_1 + WIDTHS.get(sort_of(one), NARROW) / 2, x_2 + WIDTHS["resnets"] / 2
            d.path(f"M{x_1:.1f} {y:.1f}v{-10 - 7 * k}H{x_2:.1f}V{y - 2:.1f}", arrow=True)
        cost = total(site for block in (*left, *right) for site in block.sites)
        middle_x = (place[left[-1].name][0] + WIDTHS["attentions"] + place[right[0].name][0]) / 2
        c, h, w = left[-1].leaves
        d.text(middle_x, y + 16, f"{c} channels, {h}x{w}", 13, "ink", "middle", True)
        d.text(middle_x, y + 33, f"{cost.parameters / 1e6:,.1f} M parameters", 12, "faint", "middle")
        d.text(middle_x, y + 48, f"{counted(cost.macs)} MACs a step", 12, "faint", "middle")
        if level + 1 < len(down):
            ends.append((left[-1], down[level + 1][0]))
            ends.append((up[level + 1][-1], right[0]))
    for one, other in ends:
        (x_1, y_1), (x_2, y_2) = place[one.name], place[other.name]
        w_1, w_2 = (WIDTHS.get(sort_of(block), NARROW) for block in (one, other))
        way = f"V{y_2 - 34:.1f}H{x_2 + 5:.1f}V{y_2 - 2:.1f}"  # down onto the next row's first block
        if y_2 < y_1:  # or up into this row's first
            way = f"V{y_2 + 2 * HALF + 14:.1f}H{x_2 + w_2 / 2:.1f}V{y_2 + HALF + 2:.1f}"
        d.path(f"M{x_1 + w_1:.1f} {y_1 + HALF / 2:.1f}h8{way}", arrow=True)
    y = top + len(down) * ROW
    left_end, right_start = place[down[-1][-1].name], place[up[-1][0].name]
    x = (left_end[0] + right_start[0] + WIDTHS["resnets"] - width_of(middle)) / 2
    line(middle, x, y)
    d.path(f"M{left_end[0] + 30:.1f} {left_end[1] + HALF / 2:.1f}h8V{y + HALF / 2:.1f}H{x - 2:.1f}", arrow=True)
    end = x + width_of(middle)
    d.path(f"M{end:.1f} {y + HALF / 2:.1f}H{right_start[0] - 12:.1f}V{right_start[1] + HALF / 2:.1f}h10", arrow=True)
    return y + 2 * HALF


def u(config: UNetConfig, frames: int, size: tuple[int, int], title: str, css: str = "") -> str:
    """The U on `size` (w, h) latent cells, guided, and one transformer opened in each build."""
    blocks = list(unet_blocks(config, frames, size))
    down, up, _ = rows(blocks)
    width = max(1060.0, width_of(down[0]) + width_of(up[0]) + 260)
    d = Drawing(width, 0, title)
    d.text(20, 28, title, 16, bold=True)
    sites = sum(sort_of(block) == "attentions" for block in blocks)
    x = 20.0
    legend = {"space": "spatial half: within each frame", "time": "temporal half: along time"}
    legend |= {kind: f"{kind.upper()}, 1 to {sites}: from the image" for kind in ("sca", "tca")}
    for fill, words in legend.items():
        d.rect(x, 42, 14, 14, fill, "edge")
        d.text(x + 20, 54, words, 12)
        x += 44 + 6.3 * len(words)
    bottom = draw_u(d, blocks, 106)
    names = [block for block in blocks if len(block.leaves) == 1]
    y = bottom - 2 * HALF
    for i, block in enumerate(names):
        d.open(f"{block.name}: {shape(block)}, {numbers(block)}", f' class="block" data-block="{blocks.index(block)}"')
        d.rect(20, y + 28 * i, 184, 22, "ground", "edge")
        d.text(28, y + 28 * i + 15, f"{block.name} {block.enters[0]} → {block.leaves[0]}", 11)
        d.close()
    d.height = draw_builds(d, config, frames, size, bottom + 44) + 16
    return d.svg(css)


def draw_builds(d: Drawing, config: UNetConfig, frames: int, size: tuple[int, int], y: float) -> float:
    """Where each build cuts: the kinds of sites of one transformer, in running order, and what the whole then costs."""
    d.text(20, y, "One transformer in each build", 14, bold=True)
    y += 14
    released = next(block for block in unet_blocks(config, frames, size) if sort_of(block) == "attentions")
    names = [site.name.removeprefix(f"{released.name}.") for site in released.sites]
    found = zip(names, released.sites, strict=True)
    kinds = [(name.startswith("temporal_"), site.kind) for name, site in found if "transformer_blocks" in name]
    chain = [kinds[0], *(b for a, b in pairwise(kinds) if a != b)]
    w = 104.0
    for build, form in BUILDS.items():
        cost = unet_cost(config, frames, size, build=form)
        d.text(20, y + 20, f"vcut={build!r}", 13, bold=True)
        d.text(20, y + 36, f"{cost.parameters:,} parameters", 11, "faint")
        d.text(20, y + 50, f"{counted(cost.macs)} MACs a step", 11, "faint")
        x = 190.0
        for i, (temporal, kind) in enumerate(chain, start=1):
            stands = {"SCA": form.sca, "TCA": form.tca}.get(kind, "")
            words = kind.removeprefix("temporal ")
            paint = kind.lower() if stands == "attention" else "time" if temporal else "space"
            if stands in ("linear", "none"):
                dash = ' stroke-dasharray="4 3"' if stands == "none" else ' stroke-width="2"'
                d.rect(x, y + 8, w, 40, "", kind.lower(), 3, dash)
                d.text(x + w / 2, y + 24, words, 12, kind.lower(), "middle", True)
                d.text(x + w / 2, y + 40, "W c + b" if stands == "linear" else "omitted", 12, kind.lower(), "middle")
            else:
                d.rect(x, y + 8, w, 40, paint, "edge", 3)
                d.text(x + w / 2, y + 32, words, 12, "mark" if stands else "ink", "middle", bool(stands))
            if i < len(chain):
                d.path(f"M{x + w:.1f} {y + 28:.1f}h{GAP + 2}", arrow=True)
            x += w + GAP + 3
        y += 64
    return y


# --- the two stages -------------------------------------------------------------------------------------------------


def stages(name: str, config: UNetConfig, generation: GenerationConfig, factor: int, cut_step: int) -> str:
    """Noise levels on a logarithmic scale; below each step the branches that run in it, and the cost of both ways."""
    steps, size = generation.steps, (generation.size[0] // factor, generation.size[1] // factor)
    levels = edm_sigmas(steps)[:-1].tolist()
    title = f"Two stages: {name}, {steps} steps, guided before step c = {cut_step}"
    left, pitch, top, high = 118.0, 32.0, 62.0, 150.0
    d = Drawing(left + pitch * steps + 30, 430, title)
    d.text(20, 28, title, 16, bold=True)

    def x_of(step: int) -> float:
        return left + pitch * (step - 0.5)

    def y_of(sigma: float) -> float:
        low, up = math.log(levels[-1]), math.log(levels[0])
        return top + high * (1 - (math.log(sigma) - low) / (up - low))

    cut = left + pitch * (cut_step - 1)
    d.text(20, y_of(levels[0]) + 4, f"sigma = {levels[0]:g}", 12)
    d.text(20, y_of(levels[-1]) + 4, f"sigma = {levels[-1]:.3g}", 12)
    d.text(20, y_of(1.0) + 4, "sigma = 1", 12, "faint")
    d.path(f"M{left} {y_of(1.0):.1f}H{left + pitch * steps}", more=' stroke-dasharray="2 4"')
    d.path("M" + "L".join(f"{x_of(i):.1f} {y_of(s):.1f}" for i, s in enumerate(levels, start=1)), "ink", 1.5)
    for i, sigma in enumerate(levels, start=1):
        place, said = f'cx="{x_of(i):.1f}" cy="{y_of(sigma):.1f}"', f"step {i}: sigma = {sigma:.4g}"
        d.parts.append(f'<circle class="f-ink" {place} r="3"><title>{said}</title></circle>')
    branch = top + high + 26
    for words, row in (("conditional", 0), ("unconditional", 1)):
        d.text(20, branch + 17 + 28 * row, words, 11.5)
    for i in range(1, steps + 1):
        guided = i < cut_step
        d.rect(x_of(i) - 13, branch, 26, 24, "sca" if guided else "tca", "", 3)
        d.text(x_of(i), branch + 16, str(i), 11, "mark", "middle", True)
        if guided:
            d.rect(x_of(i) - 13, branch + 28, 26, 24, "", "sca", 3)
            d.text(x_of(i), branch + 44, str(i), 11, "sca", "middle")
    d.path(f"M{cut:.1f} {top - 8}V{branch + 62}", "ink", 1.5, more=' stroke-dasharray="5 4"')
    d.text(cut - 8, top + 4, "stage one: two branches, guided", 12, "sca", "end", True)
    d.text(cut + 8, top + 4, f"stage two: one, at {SHARE['mean']:g} of the embedding", 12, "tca", "start", True)
    y = branch + 82
    full = run_cost(config, generation.num_frames, size, steps).full
    bar = pitch * steps - 330
    d.text(left, y, f"UNet, {generation.num_frames} frames of {generation.size[0]}x{generation.size[1]}", 12, "faint")
    lines = [("as diffusers runs it, guided throughout", full, "ink")]
    ways: list[tuple[Vcut, int | None]] = [(False, None), ("lossless", None), ("lossless", cut_step), (True, cut_step)]
    for vcut, c in ways:
        macs = run_cost(config, generation.num_frames, size, steps, c, BUILDS[vcut]).macs
        lines.append((f"vcut={vcut!r}, " + (f"c = {c}" if c else "guided throughout"), macs, "tca" if c else "sca"))
    for words, macs, fill in lines:
        y += 22
        d.text(20, y + 4, words, 11.5)
        d.rect(left + 250, y - 7, bar * macs / full, 14, fill, "", 2)
        d.text(left + 256 + bar * macs / full, y + 4, f"{counted(macs)} ({macs / full:.1%})", 11.5)
    d.height = y + 24
    return d.svg()


# --- the theorem ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def measured(model: str, image: str | Path, queries: int) -> tuple[str, list[Tensor], list[float]]:
    """The name of a spatial cross-attention; weights [queries, k] of its first head over the image's key, and over that
    and the null key; how far each output moves from query to query, of its size."""
    svd = load(model)
    pixels = load_image(image, svd.generation.size)
    embeds, latent, sigma = svd.clip(pixels), svd.vae.encode(pixels), torch.tensor(1.0)
    t = svd.generation.num_frames
    noise = torch.randn(1, t, 4, *latent.shape[2:], generator=torch.Generator().manual_seed(0))
    c_in, c_noise = preconditioning(sigma)[2:]
    sample = torch.cat([c_in * sigma * noise, latent[:, None].expand(-1, t, -1, -1, -1)], dim=2)
    with watched(svd.unet) as seen:
        svd.unet(sample, c_noise, embeds, torch.tensor([[6, 127, 0.02]]))
    name = next(name for name in seen if name.endswith(".transformer_blocks.0.attn2"))
    attention, (x, key) = svd.unet.get_submodule(name), seen[name]
    tokens = x[:1, :: x.shape[1] // queries][:, :queries]
    found, moved = [], []
    for keys in (key, torch.cat([key, torch.zeros_like(key)], dim=1)):
        found.append(weights(attention, tokens, keys)[0, 0])  # pyright: ignore[reportArgumentType]
        out = attention(tokens, keys)
        moved.append(((out - out[:, :1]).abs().max() / out.abs().max()).item())
    return name, found, moved


def theorem(model: str, image: str | Path) -> str:
    """A row for each query: its weights over the keys, one and two, and by how much the output then moves."""
    name, (one, two), moved = measured(model, image, 8)
    title = "A softmax over one key is 1, whatever the query"
    d = Drawing(880, 424, title)
    d.text(24, 34, title, 18, bold=True)
    d.text(24, 56, f"weights of {len(one)} queries over their keys, head 1 of {name} in the {model} model", 12, "faint")
    ends = ["to_out(1 · v) = W c + b: one linear map of the key", "to_out(a v + a' v'): the query has its say"]
    for x, found, words, keys, move, end in (
        (24.0, one, "one key: the image", ["c"], moved[0], ends[0]),
        (452.0, two, "two keys: the image, and zeros", ["c", "0"], moved[1], ends[1]),
    ):
        d.text(x, 90, words, 14, "ink", bold=True)
        width, left = 280.0 / len(keys), x + 62
        for k, key in enumerate(keys):
            d.text(left + width * (k + 0.5), 112, f"key {key}", 12, "faint", "middle")
        for i, row in enumerate(found.tolist()):
            y = 122 + 27 * i
            d.text(x, y + 16, f"query {i + 1}", 12)
            for k, weight in enumerate(row):
                d.rect(left + width * k, y, width - 4, 22, "ground", "line", 2)
                d.rect(left + width * k, y, (width - 4) * weight, 22, "space" if k == 0 else "time", "", 2)
                d.text(left + width * (k + 0.5) - 2, y + 15.5, f"{weight:.4f}", 12, "ink", "middle")
        d.text(x, 364, end, 13.5, "sca" if len(keys) == 1 else "tca", bold=True)
        moves = "not at all, to the bit" if move == 0 else f"by {move:.1%} of its size"
        d.text(x, 386, f"from query to query the output moves {moves}", 12.5)
    return d.svg()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.teach.pictures", description=(__doc__ or "").split("\n")[0])
    source = "of u.svg and stages.svg: a preset, folder, file or hub id (default: %(default)s)"
    parser.add_argument("--model", default="svd", metavar="M", help=source)
    parser.add_argument("--cut-step", type=int, default=PAPER_CUT, metavar="C", help="default: %(default)s")
    parser.add_argument("--image", type=Path, default=Path("weights/tiny/example.png"), help="of theorem.svg")
    parser.add_argument("-o", "--out", type=Path, default=Path("tools/results"), help="a folder (default: %(default)s)")
    args = parser.parse_args(argv)
    configs, generation = resolve_configs(args.model)
    config, factor, name = configs["unet"], configs["vae"].factor, Path(args.model).name
    (w, h), t = generation.size, generation.num_frames
    title = f"The U of {name}: {t} frames of {w}x{h}, guided"
    for file, picture in (
        ("u.svg", u(config, t, (w // factor, h // factor), title)),
        ("stages.svg", stages(name, config, generation, factor, args.cut_step)),
        ("theorem.svg", theorem("tiny", args.image)),
    ):
        with atomic(args.out / file) as path:
            path.write_text(picture, encoding="utf-8")
        print(args.out / file)


if __name__ == "__main__":
    main()
