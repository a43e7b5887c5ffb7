"""Clips with captions, of scenes whose right answer is known, at the seven rates that ETC's paper trains on.

Pace is fixed by fps alone: 28 / (6 fps) pixels a frame, 4.67 at fps 1 and 0.08 at fps 60; no caption tells it. Beside
clips there are the two other kinds of the paper's triple data (Eq. 6): fps 0, as many different images of one label,
here of one colour and shape; fps 120, one captioned image as many times.

Axes: t frames, c channels, h w latent grid, H W pixels.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minisvd import AutoencoderKLTemporalDecoder
from tools.output import atomic
from tools.tiny import scenes
from tools.tiny.captions import tokens
from tools.tiny.fit import autocast

RATES = (1, 2, 4, 8, 15, 30, 60)
LABEL, STILL = 0, 120  # the two rates that are none: images of one label, and one image
BUCKET, SLOWED = 255, 6  # `scenes.path(scene, BUCKET, SLOWED * fps)` stays in frame at every rate
PAIRS = [(colour, shape) for colour in scenes.COLOURS for shape in scenes.SHAPES]


def pace(fps: float) -> float:
    """Pixels a frame."""
    return scenes.speed(BUCKET) / (SLOWED * fps)


def clip(scene: scenes.Scene, fps: float, frames: int = scenes.FRAMES) -> np.ndarray:
    """The frames [t,3,H,W], uint8."""
    return scenes.render(scene, scenes.path(scene, BUCKET, SLOWED * fps, frames))


def draw(rng: np.random.Generator, pairs: list[tuple[str, str]] = PAIRS) -> scenes.Scene:
    """A scene of one of these colours and shapes."""
    scene = scenes.random_scene(rng)
    colour, shape = pairs[rng.integers(len(pairs))]
    shift = np.array(scene.rgb) - scenes.COLOURS[scene.colour]  # as far from the colour's name as it was
    red, green, blue = np.clip(np.array(scenes.COLOURS[colour]) + shift, 0, 1).tolist()
    return replace(scene, colour=colour, shape=shape, rgb=(red, green, blue))


@dataclass(frozen=True)
class Pool:
    """`clips` [n,t,c,h,w] in half precision with their rate [n] and caption's ids [n,k]; what training draws from."""

    clips: Tensor
    fps: Tensor
    ids: Tensor


@torch.no_grad()
def encoded(vae: AutoencoderKLTemporalDecoder, frames: np.ndarray) -> Tensor:
    """Frames [t,3,H,W], uint8, one by one -> scaled latents [t,c,h,w]; channels innermost, in `half`: twice as fast."""
    vae.encoder.to(memory_format=torch.channels_last)
    images = torch.from_numpy(scenes.to_unit(frames)).contiguous(memory_format=torch.channels_last)
    with autocast(images.device):
        return vae.config.scaling_factor * vae.encode(images).contiguous()


def label(scene: scenes.Scene) -> str:
    """`a red star`: what the images at fps 0 have in common."""
    return " ".join(scenes.caption(scene).split()[:3])


def make_pool(
    file: Path,
    vae: AutoencoderKLTemporalDecoder,
    kind: str,
    count: int,
    seed: int,
    pairs: list[tuple[str, str]] = PAIRS,
    rates: tuple[int, ...] = RATES,
) -> Pool:
    """Of `kind` "clips", at these rates, "labels" (fps 0) or "stills" (fps 120); made once, into `file`."""
    if not file.exists():
        rng, rows = np.random.default_rng([seed, len(kind)]), []
        for _ in tqdm(range(count), f"{count} {kind}"):
            scene = draw(rng, pairs)
            fps, said = {"clips": int(rng.choice(rates)), "labels": LABEL, "stills": STILL}[kind], scenes.caption(scene)
            frames = clip(scene, max(1, fps), scenes.FRAMES if kind == "clips" else 1)
            if kind == "labels":
                said = label(scene)
                drawn = [draw(rng, [(scene.colour, scene.shape)]) for _ in range(scenes.FRAMES)]
                frames = np.concatenate([clip(one, 1, 1) for one in drawn])
            latents = encoded(vae, frames).expand(scenes.FRAMES, -1, -1, -1)  # of a still, one frame as often
            rows.append((latents.half(), torch.tensor(fps), tokens([said])[0]))
        with atomic(file) as path:
            torch.save([torch.stack(column) for column in zip(*rows, strict=True)], path)
    return Pool(*torch.load(file))
