"""Train the tiny ETC. Stop it at will; the same command goes on.

    python -m tools.etc.train                                       from nothing
    python -m tools.etc.train --more weights/tiny-etc --seed 3      a finished one a round further, on fresh clips

First the network learns captioned images, one frame at a time, then clips as grids, with the rates and the two other
kinds of triple data; the VAE and the captions' encoder are the tiny model's. Then it is trained further in rounds, on
clips most of which are slow to learn. At the end it is measured on 200 unseen captions, and the folder is written.
"""

import argparse
import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisvd.etc import SpatialUNet
from minisvd.text import load_sd
from tools.etc.clips import LABEL, PAIRS, RATES, STILL, Pool, draw, make_pool, pace
from tools.etc.model import (
    GENERATION,
    Network,
    config_for,
    drawn_loss,
    export,
    ids_of,
    load_text,
    load_vae,
    new_image_network,
    sample,
)
from tools.etc.reader import Reading, agrees, drift, read, share
from tools.measure.metrics import spearman, wilson_interval
from tools.output import table, write_json
from tools.tiny import scenes
from tools.tiny.captions import WORDS
from tools.tiny.fit import Run, Stage, fit, midway, muon_and_adamw

IMAGES = Stage("etc-images", steps=2500, batch=128, lr=1.5e-3, report=500, hold=0.3)
CLIPS = Stage("etc-clips", steps=5000, batch=16, lr=1e-3, report=500, hold=0.3)
COUNTS = {"clips": 4000, "labels": 500, "stills": 500}
MORE = Stage("etc-more", steps=1500, batch=16, lr=5e-4, report=250, hold=0.2)
ROUNDS = 2  # of it
MORE_COUNTS = {"clips": 1500, "labels": 300, "stills": 300}
MORE_RATES = (1, 2, 4, *RATES)  # the three at which what goes wrong goes wrong, twice as often
SHARES = {"clips": 0.7, "labels": 0.15, "stills": 0.15}  # the paper names none
SHORT = 0.3  # of the captions: those that leave the ground to chance, as people do
CPU = torch.device("cpu")
OVER, END = 1 + WORDS.index("over"), len(WORDS) + 1
HELD_OUT = 3_000_017


def batch_of(pools: dict[str, Pool], rng: np.random.Generator, b: int, shares: dict[str, float]) -> tuple[Tensor, ...]:
    """Latents [b,t,c,h,w], ids [b,k] and rates [b], of each kind its share."""
    kinds = rng.choice(list(shares), size=b, p=list(shares.values()))
    rows = [(pools[kind], rng.integers(len(pools[kind].fps))) for kind in kinds]
    return tuple(torch.stack([getattr(pool, name)[i] for pool, i in rows]) for name in ("clips", "ids", "fps"))


def shortened(ids: Tensor, rows: Tensor) -> Tensor:
    """Ids [b,k] of captions, in which these rows [b] end before `over`; a caption without it stays as it is."""
    after = (ids == OVER).cumsum(1) > 0
    first = (ids == OVER) & rows[:, None]
    return ids.masked_fill(after & rows[:, None], 0).masked_fill(first, END)


def train_images(run: Run, stage: Stage, text: torch.nn.Module, pool: Pool, network: SpatialUNet) -> SpatialUNet:
    """One frame at a time, of any clip, with its caption; what is said of fps is not trained yet."""
    empty = text(ids_of([""]))

    def build() -> SpatialUNet:
        network.fps_embedding.requires_grad_(False)
        return network

    def loss(unet: SpatialUNet, rng: np.random.Generator, b: int) -> Tensor:
        rows, frames = rng.integers(len(pool.fps), size=b), rng.integers(pool.clips.shape[1], size=b)
        frame = pool.clips[rows, frames][:, None].float()
        said = text(shortened(pool.ids[rows], torch.rand(b) < SHORT))
        return drawn_loss(unet, frame, said, empty, torch.full((b,), STILL))

    trained = fit(run, stage, build, loss, lambda _: "", muon_and_adamw)
    return trained.requires_grad_(True)


def train_clips(
    run: Run, stage: Stage, text: torch.nn.Module, pools: dict[str, Pool], network: SpatialUNet
) -> SpatialUNet:
    """All frames of a clip, with its caption and its rate."""
    empty = text(ids_of([""]))

    def loss(unet: SpatialUNet, rng: np.random.Generator, b: int) -> Tensor:
        clips, ids, fps = batch_of(pools, rng, b, SHARES)
        return drawn_loss(unet, clips.float(), text(shortened(ids, torch.rand(b) < SHORT)), empty, fps)

    return fit(run, stage, lambda: network, loss, lambda _: "", muon_and_adamw)


def train_further(
    network: SpatialUNet, text: torch.nn.Module, vae: Any, work: Path, seed: int, args: Any
) -> SpatialUNet:
    """A round on fresh clips. It ends midway between what the network was and what it became; the next begins there."""
    if args.finish and not (work / f"{MORE.name}.pt").exists():
        return network
    was, stage = copy.deepcopy(network), scaled(MORE, args.share)
    pools = pools_in(work, vae, MORE_COUNTS, seed, args.share, MORE_RATES)
    run = Run(work, (stage,), CPU, seed, args.finish)
    return midway(train_clips(run, stage, text, pools, network), was)


def pools_in(
    work: Path, vae: Any, counts: dict[str, int], seed: int, share: float, rates: tuple[int, ...] = RATES
) -> dict[str, Pool]:
    """A pool of each kind, of a share of its count, kept in the folder."""
    work.mkdir(parents=True, exist_ok=True)
    return {
        kind: make_pool(work / f"{kind}.pt", vae, kind, max(4, int(count * share)), seed, rates=rates)
        for kind, count in counts.items()
    }


def videos_of(
    unet: Network,
    vae: Any,
    text: Any,
    said: list[str],
    fps: float,
    steps: int,
    scale: float,
    seed: int = 0,
    batch: int = 20,
) -> list[np.ndarray]:
    """A video [t,3,H,W] of each caption, at one rate."""
    keys, empty, made = text(ids_of(said)), text(ids_of([""])), []
    for i in range(0, len(said), batch):
        made += list(sample(unet, vae, keys[i : i + batch], empty, fps, seed + i, steps, scale))
    return made


def measure(
    unet: Network, vae: Any, text: Any, count: int, steps: int = 50, pairs: list[tuple[str, str]] = PAIRS
) -> dict[str, object]:
    """Of `count` unseen captions, spread over the rates: shares right with their intervals, Err., the rank correlation
    of pace with the rate's, the same with the rates shuffled (which it must not survive), how far the ground's colour
    drifts, travel at fps 120, how many colours and shapes are the label's in images at fps 0, and how far these are
    apart."""
    scale, rng = GENERATION.guidance[1], np.random.default_rng(HELD_OUT)
    said = [scenes.caption(draw(rng, pairs)) for _ in range(count)]
    rows: list[tuple[Reading, str, float]] = []
    drifts: list[float] = []
    for i, fps in enumerate(RATES):
        mine = said[i :: len(RATES)]
        made = videos_of(unet, vae, text, mine, fps, steps, scale, seed=1000 * i) if mine else []
        rows += [(read(frames), caption, fps) for frames, caption in zip(made, mine, strict=True)]
        drifts += [drift(frames) for frames in made]
    right = [agrees(reading, caption, fps) for reading, caption, fps in rows]
    figures: dict[str, object] = {}
    for name, value in share(right).items():
        n = sum(name in row for row in right)
        figures[name] = [value, *(wilson_interval(round(value * n), n) if n else (0.0, 1.0))]
    seen = [(reading.pace, pace(fps)) for reading, _, fps in rows if math.isfinite(reading.pace)]
    paces, wanted = [own for own, _ in seen], [of for _, of in seen]
    figures["pace by rank"] = spearman(paces, wanted) if len(set(paces)) > 1 else None
    figures["pace by rank, rates shuffled"] = spearman(paces, rng.permutation(wanted)) if len(set(paces)) > 1 else None
    figures["drift of the ground's colour"] = float(np.mean(drifts))
    figures["Err."] = float(np.mean([row[0].errors for row in rows]))
    few = said[: max(1, count // 10)]
    still = videos_of(unet, vae, text, few, STILL, steps, scale, seed=8000)
    moved = [own for frames in still if math.isfinite(own := read(frames).pace)]
    figures["travel at fps 120"] = float(np.mean(moved)) * (scenes.FRAMES - 1) if moved else None
    labels = videos_of(unet, vae, text, [" ".join(caption.split()[:3]) for caption in few], LABEL, steps, scale, 9000)
    alone = [
        (read(np.repeat(frame[None], 2, 0)), caption)
        for clip, caption in zip(labels, few, strict=True)
        for frame in clip
    ]
    kept = [reading.colour == caption.split()[1] and reading.shape == caption.split()[2] for reading, caption in alone]
    figures["label kept at fps 0"] = float(np.mean(kept))
    figures["apart at fps 0"] = float(np.mean([np.abs(clip - clip[:1]).mean() for clip in labels]))
    return figures


def shown(figures: dict[str, object]) -> str:
    """As a table."""
    rows = []
    for name, value in figures.items():
        if isinstance(value, list):
            rows.append([name, f"{100 * value[0]:.1f} % [{100 * value[1]:.1f}, {100 * value[2]:.1f}]"])
        else:
            rows.append([name, "" if value is None else f"{value:.3f}"])
    return table(["measure", "figure"], "lr", rows)


def scaled(stage: Stage, share_of: float) -> Stage:
    """A stage with a share of its steps, at least two."""
    return replace(stage, steps=max(2, int(stage.steps * share_of)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the tiny ETC.")
    parser.add_argument("--base", type=Path, default=Path("weights/tiny"), help="the folder of VAE and text encoder")
    parser.add_argument("--out", type=Path, default=Path("weights/tiny-etc"), help="the folder of the finished model")
    parser.add_argument("--work", type=Path, help="pools, checkpoints, log (default: runs/etc, runs/etc-more)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", type=Path, help="the folder of a finished model, to be trained further")
    parser.add_argument("--share", type=float, default=1.0, help="of steps and clips, for a trial (default: all)")
    parser.add_argument("--measured", type=int, default=200, help="unseen captions (default: %(default)s)")
    parser.add_argument("--finish", action="store_true", help="train no more: measure and write what there is")
    args = parser.parse_args(argv)
    work = args.work or Path("runs/etc-more" if args.more else "runs/etc")  # the pools of one are not the other's
    needed = work / f"{(MORE if args.more else CLIPS).name}.pt"
    if args.finish and not needed.exists():
        parser.error(f"--finish has nothing to finish: {work} holds no {needed.name}")
    text, vae = load_text(args.base), load_vae(args.base)
    if args.more:
        unet = load_sd(args.more, dtype="float32")[0].requires_grad_(True)
        rounds = [(work, args.seed)]
    else:
        stages = scaled(IMAGES, args.share), scaled(CLIPS, args.share)
        run, pools = Run(work, stages, CPU, args.seed, args.finish), pools_in(work, vae, COUNTS, args.seed, args.share)
        network = train_images(run, stages[0], text, pools["clips"], new_image_network(config_for(vae.config)))
        unet = train_clips(run, stages[1], text, pools, network)
        rounds = [(work / f"more-{i}", args.seed + i) for i in range(1, ROUNDS + 1)]
    for folder, seed in rounds:
        unet = train_further(unet, text, vae, folder, seed, args)
    export(args.out, unet, text, vae)
    figures = measure(unet, vae, text, args.measured, steps=GENERATION.steps if args.share == 1 else 3)
    write_json(work / "figures.json", figures)
    print(f"wrote {args.out}\n\n{shown(figures)}\n")


if __name__ == "__main__":
    main()
