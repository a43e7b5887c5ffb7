"""Parameters and multiply-accumulates (MACs) of the UNet as closed formulas: no weights, no compute, no torch.

`unet_blocks` walks the U in the order in which it runs and yields its blocks, each a list of sites: a site is one
weight, norm or pair of attention matmuls. Every number that this module gives is a sum over that walk.

    linear        rows * c_in * c_out                    (a row is a token, or one video's condition)
    convolution   cells * taps * c_in * c_out            (cells of the output; taps beyond the border count too)
    q k^T, a v    2 * queries * keys * c                 (over all heads)

Norms, activations, sums and the sinusoids are not counted, as in torch's FlopCounterMode, whose FLOPs are 2 MACs.
Axes as in attention.py: b batch (2 in a guided step), t frames, c channels, h w latent grid, s = h*w tokens.

Source of the figures to compare with: arXiv 2407.19205, Tables II and III; its counter does not see the matmuls.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from minisvd.config import Size, UNetConfig, Vcut, check

SPATIAL_TAPS, TEMPORAL_TAPS = 9, 3  # kernels 3x3 and 3x1x1
KINDS = (  # what a site is there for; a norm belongs to the kind that it comes before
    "embedding", "convolution", "temporal convolution", "projection", "self-attention", "temporal self-attention",
    "SCA", "TCA", "feed-forward", "temporal feed-forward", "blend",
)  # fmt: skip


@dataclass(frozen=True)
class Build:
    """What stands at the cross-attentions in space (SCA) and along time (TCA): "attention", "linear" (a
    CachedCondLinear, outside of the step) or "none". `repeated`: noise level, frame number and image are projected anew
    for every frame, and for TCA every place, that they serve, as diffusers does; minisvd projects them once a video."""

    sca: str
    tca: str
    repeated: bool = False


BUILDS: dict[Vcut, Build] = {  # by the `vcut` of SpatioTemporalUNet
    False: Build("attention", "attention"),
    "lossless": Build("linear", "linear"),
    True: Build("linear", "none"),
}
PUBLISHED = Build("attention", "attention", repeated=True)  # the released model as diffusers runs it


@dataclass(frozen=True)
class Cost:
    """Sums over sites: MACs of one forward, the part of them in q k^T and a v, and those that come once a video."""

    parameters: int
    macs: int
    matmul: int
    once: int


@dataclass(frozen=True)
class Site:
    """One place of the network that holds parameters or multiplies; `name` is its module's, the numbers as in Cost."""

    name: str
    kind: str
    parameters: int = 0
    macs: int = 0
    matmul: int = 0
    once: int = 0


Sites = Iterator[Site]


@dataclass(frozen=True)
class Block:
    """A stretch of the U. `enters` and `leaves` are (c, h, w) of each frame, or (c,) of each video's condition."""

    name: str
    level: int  # how deep in the U, 0 outermost
    enters: tuple[int, ...]
    leaves: tuple[int, ...]
    sites: tuple[Site, ...]
    skip: int = 0  # channels of the skip that joins those of `enters`
    keeps: bool = False  # is what leaves kept as a skip?


def total(sites: Iterable[Site]) -> Cost:
    """The sum over sites, field by field."""
    rows = [(site.parameters, site.macs, site.matmul, site.once) for site in sites]
    return Cost(*(sum(column) for column in zip((0, 0, 0, 0), *rows, strict=True)))


def unet_cost(config: UNetConfig, frames: int, size: Size, batch: int = 2, build: Build = BUILDS[False]) -> Cost:
    """Parameters, and MACs of one forward. `size` is (w, h) in latent cells; raises what `unet_blocks` raises."""
    return total(site for block in unet_blocks(config, frames, size, batch, build) for site in block.sites)


def by_kind(sites: Iterable[Site]) -> dict[str, Cost]:
    """The sum over the sites of each kind, in the order of KINDS."""
    sites = list(sites)
    return {kind: total(site for site in sites if site.kind == kind) for kind in KINDS}


@dataclass(frozen=True)
class RunCost:
    """MACs of the UNet in one sampling run, and where the rest went: full = by_sharing + by_build + by_guidance + macs.
    A folded attention costs nothing in a step, so the build True saves hardly more work than "lossless"."""

    guided: int
    single: int
    full: int  # PUBLISHED, every step guided
    by_sharing: int  # saved by projecting each condition once for all frames and places that it serves
    by_build: int  # saved by the build: the cross-attentions of every step, less what its linears cost once a video
    by_guidance: int  # saved by running one branch instead of two from cut_step on
    macs: int


def run_cost(
    config: UNetConfig, frames: int, size: Size, steps: int, cut_step: int | None = None, build: Build = BUILDS[False]
) -> RunCost:
    """One video in `steps` steps, those before `cut_step` guided (arXiv 2407.19205, two-stage guidance).

    A guided step is one forward on two branches, a single one on half of that. The linears are computed once for the
    two branches and once for the single one. Raises ValueError for fewer than one step, a cut_step below 1, and what
    `unet_blocks` raises.
    """
    steps = check("steps", steps)
    guided = steps if cut_step is None else min(check("cut_step", cut_step) - 1, steps)
    full, shared = (steps * unet_cost(config, frames, size, 2, each).macs for each in (PUBLISHED, BUILDS[False]))
    two, one = (unet_cost(config, frames, size, branches, build) for branches in (2, 1))
    built = steps * two.macs + two.once
    macs = guided * two.macs + (steps - guided) * one.macs + (guided > 0) * two.once + (guided < steps) * one.once
    return RunCost(guided, steps - guided, full, full - shared, shared - built, built - macs, macs)


def table(sites: Iterable[Site]) -> str:
    """What each kind costs, and all of them. G is 10^9 MACs, of one forward or once a video."""
    sites = list(sites)
    lines = [f"{'kind (G = 10^9 MACs)':<24}{'parameters':>14}{'G a step':>12}{'q k^T, a v':>12}{'G once':>9}"]
    for name, cost in (by_kind(sites) | {"total": total(sites)}).items():
        macs = f"{cost.macs / 1e9:>12,.2f}{cost.matmul / 1e9:>12,.2f}{cost.once / 1e9:>9,.2f}"
        lines.append(f"{name:<24}{cost.parameters:>14,}{macs}")
    return "\n".join(lines)


def ledger(run: RunCost) -> str:
    """Where the MACs of a run went, from the full ones down to its own. T is 10^12."""
    head = f"{run.guided + run.single} steps, {run.guided} guided and {run.single} on one branch (T = 10^12 MACs)"
    rows = {
        "as diffusers runs it, every step guided": run.full,
        "saved: a video's conditions projected once": -run.by_sharing,
        "saved: cross-attentions folded or omitted": -run.by_build,
        "saved: guidance dropped": -run.by_guidance,
        "this run": run.macs,
    }
    lines = (f"{name:<44}{macs / 1e12:>10,.2f} T{macs / run.full:>9.2%}" for name, macs in rows.items())
    return "\n".join([head, *lines])


def drawn_in(text: str, encoding: str) -> str:
    """`text` with ASCII lines and arrows for a terminal whose encoding has no others."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(str.maketrans("╭╰│─▶→", ",'|->>"))
    return text


def tree(blocks: Iterable[Block]) -> str:
    """The U as it runs, a line for each block: skips as brackets on the left, depth as indentation. Channels are those
    that enter, + the skip's, → those that leave; h x w is the grid that leaves, of each frame; G is 10^9 MACs of one
    forward."""
    blocks = list(blocks)
    names = list(under_heads(block.name for block in blocks))
    width, held = sum(block.keeps for block in blocks), 0
    wide = max(len(name) + 2 * block.level for (_, name), block in zip(names, blocks, strict=True))
    high = max(len(grid(block)) for block in blocks)
    head = f"{'':<{width + 1}} {'block':<{wide}} {'channels':>16} {'h x w':>{high}} {'parameters':>11} {'G':>8}"
    lines = [head]
    for (stage, name), block in zip(names, blocks, strict=True):
        indent, cost = "  " * block.level, total(block.sites)
        if stage:
            lines.append(f"{'│' * held:<{width + 1}} {indent}{stage}")
        held -= block.skip > 0
        corner, line, end = ("╭", "─", "─") if block.keeps else ("╰", "─", "▶") if block.skip else (" ", " ", " ")
        margin = ("│" * held + corner + line * (width - held - 1) + end)[: width + 1]
        held += block.keeps
        enters = f"{block.enters[0]}+{block.skip}" if block.skip else f"{block.enters[0]}"
        shape = f"{enters:>9} → {block.leaves[0]:<4} {grid(block):>{high}}"
        lines.append(f"{margin} {indent + name:<{wide}} {shape} {cost.parameters:>11,} {cost.macs / 1e9:>8,.2f}")
    everything = total(site for block in blocks for site in block.sites)
    label, numbers = f"{'':<{width + 1}} total", f"{everything.parameters:,} {everything.macs / 1e9:,.2f}"
    return "\n".join([*lines, f"{label}{numbers:>{len(head) - len(label)}}"])


def grid(block: Block) -> str:
    """h x w of what leaves a block, or nothing if that has no place."""
    return "x".join(map(str, block.leaves[1:]))


def opened(block: Block) -> str:
    """A block's sites in running order; G is 10^9 MACs of one forward, M 10^6 once a video."""
    head = f"{'site':<24} {'kind':<23} {'parameters':>10} {'G':>8} {'M once':>7}"
    lines = [f"inside {block.name}:", head]
    names = (site.name.removeprefix(block.name + ".") for site in block.sites)
    for (part, name), site in zip(under_heads(names), block.sites, strict=True):
        name += ": q k^T, a v" if site.matmul else ""
        numbers = f"{site.parameters:>10,} {site.macs / 1e9:>8,.2f} {site.once / 1e6:>7.2f}"
        lines += [part] * bool(part) + [f"{name:<24} {site.kind:<23} {numbers}"]
    return "\n".join(lines)


def under_heads(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each name as (the line to come before it, or "", and what is left of it): (down_blocks.0, "  resnets.0")."""
    last = ""
    for name in names:
        match = re.fullmatch(r"(\w+_blocks?(?:\.\d+)?)\.(.+)", name)
        head, rest = match.groups() if match else ("", name)
        yield (head if head != last else ""), ("  " + rest if head else rest)
        last = head


# --- the walk -----------------------------------------------------------------------------------------------------


def unet_blocks(
    config: UNetConfig, frames: int, size: Size, batch: int = 2, build: Build = BUILDS[False]
) -> Iterator[Block]:
    """The blocks of SpatioTemporalUNet in running order, for `batch` videos of `frames` frames.

    `size` is (w, h) in latent cells, an eighth of the pixels. Raises ValueError for a size that is no multiple of
    `config.stride`, and for fewer than one frame or video.
    """
    (w, h), widths, c_emb = size, config.block_out_channels, 4 * config.block_out_channels[0]
    if min(w, h) < 1 or w % config.stride or h % config.stride:
        raise ValueError(f"size is {w}x{h} latent cells; need multiples of {config.stride}")
    for name, count in (("frames", frames), ("batch", batch)):
        if count < 1:
            raise ValueError(f"{name} is {count}; need at least 1")
    grids = [(h >> level, w >> level) for level in range(len(widths))]

    def convolved(name: str, level: int, c_in: int, c: int, to: int, keeps: bool = False) -> Block:
        cells = batch * frames * grids[to][0] * grids[to][1]
        site = conv(name, "convolution", cells, SPATIAL_TAPS, c_in, c)
        return Block(name.removesuffix(".conv"), level, (c_in, *grids[level]), (c, *grids[to]), (site,), keeps=keeps)

    def residual(name: str, level: int, c_in: int, skip: int = 0, keeps: bool = False) -> Block:
        grid, c = grids[level], widths[level]
        sites = residual_sites(name, c_in + skip, c, c_emb, batch, frames, grid[0] * grid[1], build)
        return Block(name, level, (c_in, *grid), (c, *grid), tuple(sites), skip, keeps)

    def transformer(name: str, level: int, keeps: bool = False) -> Block:
        grid, c = grids[level], widths[level]
        sites = transformer_sites(name, c, config.cross_attention_dim, batch, frames, grid[0] * grid[1], build)
        return Block(name, level, (c, *grid), (c, *grid), tuple(sites), keeps=keeps)

    ids = config.num_time_ids * config.addition_time_embed_dim
    for name, c in (("time_embedding", widths[0]), ("add_embedding", ids)):
        yield Block(name, 0, (c,), (c_emb,), tuple(embedding(name, batch, c, c_emb, c_emb)))
    yield convolved("conv_in", 0, config.in_channels, widths[0], to=0, keeps=True)
    x, skips, last = widths[0], [widths[0]], len(widths) - 1
    for level, c in enumerate(widths):
        for i in range(config.layers_per_block):
            yield residual(f"down_blocks.{level}.resnets.{i}", level, x, keeps=not config.attention[level])
            if config.attention[level]:
                yield transformer(f"down_blocks.{level}.attentions.{i}", level, keeps=True)
            x = c
            skips.append(x)
        if level < last:
            yield convolved(f"down_blocks.{level}.downsamplers.0.conv", level, x, x, to=level + 1, keeps=True)
            skips.append(x)
    yield residual("mid_block.resnets.0", last, x)
    yield transformer("mid_block.attentions.0", last)
    yield residual("mid_block.resnets.1", last, x)
    for up, level in enumerate(reversed(range(len(widths)))):
        for i in range(config.layers_per_block + 1):
            yield residual(f"up_blocks.{up}.resnets.{i}", level, x, skip=skips.pop())
            x = widths[level]
            if config.attention[level]:
                yield transformer(f"up_blocks.{up}.attentions.{i}", level)
        if level > 0:
            yield convolved(f"up_blocks.{up}.upsamplers.0.conv", level, x, x, to=level - 1)
    yield Block("conv_norm_out", 0, (x, *grids[0]), (x, *grids[0]), (norm("conv_norm_out", "convolution", x),))
    yield convolved("conv_out", 0, x, config.out_channels, to=0)


def residual_sites(name: str, c_in: int, c: int, c_emb: int, b: int, t: int, s: int, build: Build) -> Sites:
    """SpatioTemporalResBlock: in space from c_in to c, then along time, then blended."""
    space, time, rows = f"{name}.spatial_res_block", f"{name}.temporal_res_block", b * t if build.repeated else b
    twins = (space, "convolution", SPATIAL_TAPS, c_in), (time, "temporal convolution", TEMPORAL_TAPS, c)
    for twin, kind, taps, width in twins:
        yield norm(f"{twin}.norm1", kind, width)
        yield conv(f"{twin}.conv1", kind, b * t * s, taps, width, c)
        yield linear(f"{twin}.time_emb_proj", "embedding", rows, c_emb, c)
        yield norm(f"{twin}.norm2", kind, c)
        yield conv(f"{twin}.conv2", kind, b * t * s, taps, c, c)
        if width != c:
            yield conv(f"{twin}.conv_shortcut", kind, b * t * s, 1, width, c)
    yield Site(f"{name}.time_mixer", "blend", parameters=1)


def transformer_sites(name: str, c: int, c_context: int, b: int, t: int, s: int, build: Build) -> Sites:
    """SpatioTemporalTransformer: within a frame over its s tokens, then along time over the t tokens of a place."""
    space, time, tokens = f"{name}.transformer_blocks.0", f"{name}.temporal_transformer_blocks.0", b * t * s
    yield norm(f"{name}.norm", "projection", c)
    yield linear(f"{name}.proj_in", "projection", tokens, c, c)
    yield from attention(space, 1, "self-attention", c, tokens, s, tokens, c)
    yield from cross_attention(space, "SCA", build.sca, c, tokens, b, b * t if build.repeated else b, c_context)
    yield from feed_forward(space, "norm3", "ff", "feed-forward", tokens, c)
    yield from embedding(f"{name}.time_pos_embed", b * t if build.repeated else t, c, 4 * c, c)
    yield from feed_forward(time, "norm_in", "ff_in", "temporal feed-forward", tokens, c)
    yield from attention(time, 1, "temporal self-attention", c, tokens, t, tokens, c)
    yield from cross_attention(time, "TCA", build.tca, c, tokens, b, b * s if build.repeated else b, c_context)
    yield from feed_forward(time, "norm3", "ff", "temporal feed-forward", tokens, c)
    yield Site(f"{name}.time_mixer", "blend", parameters=1)
    yield linear(f"{name}.proj_out", "projection", tokens, c, c)


def cross_attention(block: str, kind: str, form: str, c: int, queries: int, b: int, rows: int, c_context: int) -> Sites:
    """A transformer block's norm2 and attn2 on one key, in the form that the build gives it."""
    if form == "attention":
        yield from attention(block, 2, kind, c, queries, 1, rows, c_context)
    elif form == "linear":
        yield Site(f"{block}.attn2", kind, parameters=c_context * c + c, once=b * c_context * c)


def attention(block: str, i: int, kind: str, c: int, queries: int, keys: int, rows: int, c_context: int) -> Sites:
    """A block's norm and attention i, of `queries` tokens to `keys` keys each, out of `rows` context tokens in all."""
    name = f"{block}.attn{i}"
    yield norm(f"{block}.norm{i}", kind, c)
    yield linear(f"{name}.to_q", kind, queries, c, c, bias=False)
    yield linear(f"{name}.to_k", kind, rows, c_context, c, bias=False)
    yield linear(f"{name}.to_v", kind, rows, c_context, c, bias=False)
    yield Site(name, kind, macs=2 * queries * keys * c, matmul=2 * queries * keys * c)
    yield linear(f"{name}.to_out.0", kind, queries, c, c)


def feed_forward(block: str, norm_name: str, name: str, kind: str, tokens: int, c: int) -> Sites:
    """A norm, then GEGLU to 4c, of which the gate is as much again, and back."""
    yield norm(f"{block}.{norm_name}", kind, c)
    yield linear(f"{block}.{name}.net.0.proj", kind, tokens, c, 8 * c)
    yield linear(f"{block}.{name}.net.2", kind, tokens, 4 * c, c)


def embedding(name: str, rows: int, c_in: int, c_hidden: int, c_out: int) -> Sites:
    yield linear(f"{name}.linear_1", "embedding", rows, c_in, c_hidden)
    yield linear(f"{name}.linear_2", "embedding", rows, c_hidden, c_out)


def linear(name: str, kind: str, rows: int, c_in: int, c_out: int, bias: bool = True) -> Site:
    return Site(name, kind, parameters=c_in * c_out + bias * c_out, macs=rows * c_in * c_out)


def conv(name: str, kind: str, cells: int, taps: int, c_in: int, c_out: int) -> Site:
    return Site(name, kind, parameters=taps * c_in * c_out + c_out, macs=cells * taps * c_in * c_out)


def norm(name: str, kind: str, c: int) -> Site:
    return Site(name, kind, parameters=2 * c)
