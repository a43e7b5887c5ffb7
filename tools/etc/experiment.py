"""What of ETC's claims holds at a tiny scale: arms that differ in one thing, the same clips, noise and steps for all.

    python -m tools.etc.experiment                  all arms; stop it at will, the same command goes on
    python -m tools.etc.experiment --arms A B B0    some of them; the report is of what is there

First, for each seed, a network learns captioned images: the paper's claim is about fine-tuning one. Then each arm:

    A   the grid                                     E   A without the mixed embedding
    B   temporal layers, at random at first          F   A on few clips of half the pairs, and triple data
    B0  temporal layers, identities at first         A1  those few clips alone, for as many steps
    C   A from nothing                               G   A with attention masked to frames
    D   B from nothing                               H   frames alone, the floor

Beside them: the paper's filter on a pool of which 30 % are miscaptioned, and attention from frame to frame.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

import minisvd
from minisvd.etc import SpatialUNet, to_grid
from tools.etc.clips import PAIRS, RATES, Pool, clip, draw, make_pool
from tools.etc.model import (
    GENERATION,
    FrameByFrame,
    Network,
    config_for,
    ids_of,
    load_text,
    load_vae,
    masked_to_frames,
    new_image_network,
    v_loss,
    with_time,
)
from tools.etc.train import IMAGES, batch_of, drawn_loss, measure, scaled, train_images, videos_of
from tools.output import as_image, atomic, plotting, save_png, table, write_json
from tools.tiny import scenes
from tools.tiny.captions import tokens
from tools.tiny.evaluate import load_pair
from tools.tiny.fit import Run, Stage, fit, muon_and_adamw

BASE = replace(IMAGES, name="base", steps=3500)
ARM = Stage("arm", steps=1600, batch=16, lr=1e-3, report=50)
# Of the 32 pairs of colour and shape, those that the clips of F and A1 show: half of each colour's and of each shape's.
SEEN = [pair for i, pair in enumerate(PAIRS) if (i // len(scenes.SHAPES) + i) % 2 == 0]
POOLS = {"clips": 3000, "few": 300, "labels": 400, "stills": 400}
LEVELS = (50, 250, 500, 750, 950)
WRONG = 0.3  # of the filter's pool
HELD_OUT = 4_000_037
LOSS = "held-out v-loss"
SHOWN, SHOWN_FPS = "a red star moving up right over a navy gradient", 2  # what the picture of the arms shows


@dataclass(frozen=True)
class Arm:
    """`build` makes the network of the base; `shares` of each pool; `unseen`: measured on pairs that no clip shows."""

    name: str
    asks: str
    build: Callable[[SpatialUNet], Network]
    shares: dict[str, float]
    seeds: int = 1
    unseen: bool = False


def rebased(kind: type[SpatialUNet], mixed: bool = True) -> Callable[[SpatialUNet], SpatialUNet]:
    """The base's weights in a network of this kind."""

    def build(base: SpatialUNet) -> SpatialUNet:
        unet = kind(base.config, mixed)
        unet.load_state_dict(base.state_dict())
        return unet

    return build


CLIPS = {"clips": 1.0}
ARMS = {
    arm.name: arm
    for arm in (
        Arm("A", "the grid", rebased(SpatialUNet), CLIPS, 3),
        Arm("B", "temporal layers, random", lambda base: with_time(base, identity=False), CLIPS, 3),
        Arm("B0", "temporal layers, identities", lambda base: with_time(base, identity=True), CLIPS, 3),
        Arm("C", "A from nothing", lambda base: new_image_network(base.config), CLIPS),
        Arm("D", "B from nothing", lambda base: with_time(new_image_network(base.config), identity=False), CLIPS),
        Arm("E", "A without mixed embedding", rebased(SpatialUNet, mixed=False), CLIPS),
        Arm(
            "F",
            "few clips and triple data",
            rebased(SpatialUNet),
            {"few": 0.5, "labels": 0.25, "stills": 0.25},
            1,
            True,
        ),
        Arm("A1", "few clips alone", rebased(SpatialUNet), {"few": 1.0}, 1, True),
        Arm("G", "attention within frames", lambda base: masked_to_frames(rebased(SpatialUNet)(base)), CLIPS),
        Arm("H", "frames alone", rebased(FrameByFrame), CLIPS),
    )
}


def held_out_loss(unet: Network, pool: Pool, text: nn.Module) -> float:
    """The mean v-loss at LEVELS on the pool's clips, with noise that is the same for every arm and step."""
    generator, losses = torch.Generator().manual_seed(HELD_OUT), []
    clips, keys = pool.clips.float(), text(pool.ids)
    for level in LEVELS:
        noise = torch.randn(clips.shape, generator=generator)
        with torch.no_grad():
            losses.append(v_loss(unet, clips, torch.full((len(clips),), level), noise, keys, pool.fps).mean().item())
    return float(np.mean(losses))


def train_arm(
    arm: Arm, seed: int, base: SpatialUNet, stage: Stage, work: Path, pools: dict[str, Pool], text: nn.Module
):
    """The arm's network, and its held-out losses by step, which are read from its log."""
    (folder := work / f"{arm.name}-{seed}").mkdir(parents=True, exist_ok=True)
    run, empty = Run(folder, (stage,), torch.device("cpu"), seed), text(ids_of([""]))

    def loss(unet: Network, rng: np.random.Generator, b: int) -> Tensor:
        clips, ids, fps = batch_of(pools, rng, b, arm.shares)
        return drawn_loss(unet, clips.float(), text(ids), empty, fps)

    def report(unet: Network) -> str:
        return f"held-out {held_out_loss(unet, pools['held'], text):.6f}"

    torch.manual_seed(seed)
    unet = fit(run, stage, lambda: arm.build(base), loss, report, muon_and_adamw)
    lines = (folder / "train.log").read_text()
    curve = {int(step): float(value) for step, value in re.findall(r"step (\d+), .* held-out ([\d.]+)", lines)}
    return unet, curve


# --- beside the arms ------------------------------------------------------------------------------------------------


def filter_auc(base: Path, count: int) -> float:
    """How well Eq. 5, the mean over frames of 14.286 cos(image, caption) of the tiny model's encoders, tells clips with
    their own captions from those with another's: the chance that it gives a right one more. 0.5 is none."""
    rng = np.random.default_rng(HELD_OUT)
    drawn = [draw(rng) for _ in range(count)]
    said, wrong = [scenes.caption(scene) for scene in drawn], rng.random(count) < WRONG
    shuffled = [said[(i + 1) % count] if wrong[i] else said[i] for i in range(count)]
    pair, scores = load_pair(minisvd.load(base), base), []
    with torch.no_grad():
        for i, scene in enumerate(drawn):
            frames = torch.from_numpy(scenes.to_unit(clip(scene, RATES[i % len(RATES)])))
            image, caption = pair(frames, tokens([shuffled[i]]))
            scores.append(14.286 * (image @ caption.T).mean().item())
    kept, out = np.array(scores)[~wrong], np.array(scores)[wrong]
    return float((kept[:, None] > out).mean()) if len(out) and len(kept) else float("nan")


@torch.no_grad()
def frame_to_frame(unet: SpatialUNet, pool: Pool, text: nn.Module) -> np.ndarray:
    """Fig. 11: [t,t], what share of the attention of one frame's tokens goes to each frame, in the middle of the U, the
    mean over heads, tokens and clips at half the noise levels, with noise that is always the same."""
    seen: list[Tensor] = []
    attention: Any = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")
    hook = attention.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    clips = pool.clips.float()
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(HELD_OUT))
    unet(clips + 1.6 * noise, torch.tensor(500), text(pool.ids), pool.fps)
    hook.remove()
    x, n = seen[0], attention.num_heads
    q, k = (layer(x).unflatten(2, (n, -1)).transpose(1, 2) for layer in (attention.to_q, attention.to_k))  # pyright: ignore
    weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1).mean((0, 1))
    one = nn.functional.one_hot(frames_of(len(weights))).float()
    return (one.T @ weights @ one / one.sum(0)[:, None]).numpy()


def frames_of(tokens_in_all: int) -> Tensor:
    """[s]: the frame that each token of a grid belongs to."""
    side = int((tokens_in_all // scenes.FRAMES) ** 0.5)
    numbers = torch.arange(scenes.FRAMES).view(1, -1, 1, 1, 1).expand(1, -1, 1, side, side)
    return to_grid(numbers).flatten()


# --- the report -----------------------------------------------------------------------------------------------------


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return f"{100 * value[0]:.0f} [{100 * value[1]:.0f}, {100 * value[2]:.0f}]"
    return f"{value:.3f}"


def measures(runs: dict[str, Any], names: list[str]) -> str:
    """A table of these measures, a row for each arm and seed."""
    rows = [[key, run["asks"], *(cell(run["figures"].get(name)) for name in names)] for key, run in runs.items()]
    return table(["arm-seed", "what it is", *names], "ll" + "r" * len(names), rows)


def markdown(found: dict[str, Any], reading: str) -> str:
    """Every arm and seed with its measures; percentages with 95 % intervals."""
    ends = {key: list(run["curve"].values())[-1] for key, run in found["runs"].items()}
    runs = {key: run | {"figures": {LOSS: ends[key]} | run["figures"]} for key, run in found["runs"].items()}
    names = list(dict.fromkeys(name for run in runs.values() for name in run["figures"]))
    main = [name for name in names if name in (LOSS, "colour", "shape", "heading") or name.startswith("pace")]
    beside = [f"The filter tells right captions from wrong ones with an AUC of {found['filter_auc']:.3f}."]
    for key, share in found["attention"].items():
        uniform = (scenes.FRAMES - 1) / scenes.FRAMES
        beside.append(f"Attention of {key} to other frames: {share:.3f} of it; if it were uniform, {uniform:.3f}.")
    pictures = [
        "![Held-out loss by step, a line for each arm and seed](curves.png)",
        f"![What each arm of the first seed makes of “{SHOWN}” at {SHOWN_FPS} frames a second](arms.png)",
    ]
    rest = measures(runs, [name for name in names if name not in main])
    parts = ["# ETC's claims at a tiny scale", found["made"], reading, measures(runs, main), *pictures, rest, *beside]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def draw_arms(shown: dict[str, np.ndarray], path: Path) -> None:
    """A row of frames [t,3,H,W] for each arm."""
    figure = plotting()(figsize=(9, 1.1 * len(shown)), layout="constrained")
    rows = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, (name, frames) in zip(rows, shown.items(), strict=True):
        axes.imshow(rearrange(frames, "t c h w -> h (t w) c"), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    with atomic(path) as file:
        figure.savefig(file, dpi=100, format="png")


def draw_curves(found: dict[str, Any], path: Path) -> None:
    """Held-out loss by step, a line for each arm and seed."""
    figure = plotting()(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    arms = list(dict.fromkeys(key.split("-")[0] for key in found["runs"]))
    for key, run in found["runs"].items():
        steps, arm = [int(step) for step in run["curve"]], key.split("-")[0]
        label = arm if key.endswith("-0") else None
        axes.plot(steps, list(run["curve"].values()), color=f"C{arms.index(arm)}", label=label, linewidth=1)
    axes.set(xlabel="step", ylabel="held-out v-loss", yscale="log")
    axes.legend(ncols=2)
    with atomic(path) as file:
        figure.savefig(file, dpi=120, format="png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="ETC's claims at a tiny scale.")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of A, B, B0; else 0 alone")
    parser.add_argument("--base", type=Path, default=Path("weights/tiny"), help="the folder of VAE and encoders")
    parser.add_argument("--work", type=Path, default=Path("runs/etc-experiment"), help="pools, checkpoints, results")
    parser.add_argument("--out", type=Path, default=Path("tools/results/etc"), help="report, figures and pictures")
    parser.add_argument("--share", type=float, default=1.0, help="of all steps and clips alike (default: all)")
    parser.add_argument("--measured", type=int, default=200, help="captions an arm (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="of sampling (default: %(default)s)")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    begun = args.work / "share"
    if not begun.exists():
        with atomic(begun) as file:
            file.write_text(str(args.share))
    if float(begun.read_text()) != args.share:  # whole or absent: another process may just begin, too
        parser.error(f"{args.work} was begun with --share {begun.read_text()}: give that, or another --work")
    text, vae = load_text(args.base), load_vae(args.base)
    pools = {}
    for name in sorted({"clips"}.union(*(ARMS[arm].shares for arm in args.arms))):  # clips are the base's too
        kind, pairs = ("clips", SEEN) if name == "few" else (name, PAIRS)
        pools[name] = make_pool(args.work / f"{name}.pt", vae, kind, max(8, int(POOLS[name] * args.share)), 0, pairs)
    pools["held"] = make_pool(args.work / "held.pt", vae, "clips", 32 if args.share >= 0.1 else 4, HELD_OUT)
    stage = scaled(ARM, args.share)
    runs, shown, attention, stage = {}, {}, {}, replace(stage, report=max(1, min(stage.report, stage.steps // 12)))
    for seed in args.seeds:
        wanted = [ARMS[name] for name in args.arms if seed < ARMS[name].seeds]
        if not wanted:
            continue
        (folder := args.work / f"base-{seed}").mkdir(exist_ok=True)
        run = Run(folder, (scaled(BASE, args.share),), torch.device("cpu"), seed)
        torch.manual_seed(seed)
        base = train_images(
            run, run.stages[0], text, pools["clips"], new_image_network(config_for(vae.config), mixed=False)
        )
        for arm in wanted:
            unet, curve = train_arm(arm, seed, base, stage, args.work, pools, text)
            result = args.work / f"{arm.name}-{seed}/figures-{args.measured}-{args.steps}.json"
            if not result.exists():
                pairs = [pair for pair in PAIRS if pair not in SEEN] if arm.unseen else PAIRS
                write_json(result, measure(unet, vae, text, args.measured, args.steps, pairs=pairs))
            if seed == args.seeds[0]:
                scale = GENERATION.guidance[1]
                shown[arm.name] = videos_of(unet, vae, text, [SHOWN], SHOWN_FPS, args.steps, scale)[0]
            runs[f"{arm.name}-{seed}"] = {"asks": arm.asks, "curve": curve, "figures": json.loads(result.read_text())}
            if arm.name in ("A", "E") and isinstance(unet, SpatialUNet):
                shares = frame_to_frame(unet, pools["held"], text)
                attention[f"{arm.name}-{seed}"] = float(1 - np.diag(shares).mean())
                grey = torch.from_numpy(shares / shares.max())[..., None].expand(-1, -1, 3)
                save_png(as_image(grey.float(), zoom=24), args.out / f"attention-{arm.name}-{seed}.png")
    made = (
        f"{scaled(BASE, args.share).steps} steps of {BASE.batch} frames, then {stage.steps} of {stage.batch} clips an "
        f"arm, from {len(pools['clips'].fps)} clips; {args.measured} captions, {args.steps} steps of sampling."
    )
    found = {"made": made, "runs": runs, "attention": attention, "filter_auc": filter_auc(args.base, args.measured)}
    write_json(args.out / "experiment.json", found)
    own = args.out / "reading.md"
    report = markdown(found, own.read_text(encoding="utf-8") if own.is_file() else "")
    with atomic(args.out / "experiment.md") as file:
        file.write_text(report, encoding="utf-8")
    draw_curves(found, args.out / "curves.png")
    draw_arms(shown, args.out / "arms.png")
    print(report)


if __name__ == "__main__":
    main()
