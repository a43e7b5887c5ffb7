"""Drawings by hand, as the tiny model moves them: `python -m tools.tiny.drawings` prints figures, writes a picture.

The drawings are Pillow's, not those of `scenes.py`, with lines as uneven as a hand's. Each is drawn once more for every
frame, moved along: that is the truth. A row of the picture is the drawing, then what the model makes of it.

Axes: t frames, c channels, H W pixels. Lengths are pixels of the 64x64 frame.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw

import minisvd
from tools.output import as_image, save_png, table
from tools.tiny import scenes

FINE = 8  # drawn so many times as large, then shrunk
FPS, BUCKET = 7, 150
BLACK, WHITE, DARK = (0, 0, 0), (255, 255, 255), (24, 28, 56)
RED, BLUE, GREEN, YELLOW = (220, 40, 40), (40, 80, 220), (40, 160, 60), (245, 215, 60)


@dataclass(frozen=True)
class Figure:
    """One drawn thing: corners around its middle, where it starts, and where it goes, in radians from right to down."""

    corners: list[tuple[float, float]]
    colour: tuple[int, int, int]
    x: float
    y: float
    heading: float
    nose: tuple[int, int, int] | None = WHITE
    tail: bool = True
    line: tuple[int, int, int] | None = None


def blob(radius: float, corners: int = 40, unevenness: float = 0.5, seed: int = 0) -> list[tuple[float, float]]:
    """A closed line around a middle, each corner off by about `unevenness` pixels, smoothly along the line."""
    rng = np.random.default_rng(seed)
    slow = np.fft.irfft(np.fft.rfft(rng.standard_normal(corners)) * (np.arange(corners // 2 + 1) < 5), corners)
    radii = radius + unevenness * slow / max(slow.std(), 1e-9) if corners > 8 else radius + unevenness * slow
    turns = 2 * math.pi * np.arange(corners) / corners - math.pi / 2
    return [(float(r * math.cos(a)), float(r * math.sin(a))) for r, a in zip(radii, turns, strict=True)]


HOUSE = [(-7.0, 8.0), (-7.4, -2.0), (0.3, -9.0), (7.2, -2.2), (7.0, 7.6)]
FISH = [(9.0, 0.0), (4.0, -5.0), (-3.0, -4.0), (-9.0, -6.0), (-7.0, 0.0), (-9.0, 5.5), (-3.0, 4.5), (4.0, 5.0)]
DRAWINGS: dict[str, tuple[tuple[int, int, int], list[Figure]]] = {
    "circle on a dark ground": (DARK, [Figure(blob(8), RED, 20, 34, 0.1)]),
    "circle without a nose": (DARK, [Figure(blob(8, seed=1), RED, 22, 34, 0.1, nose=None)]),
    "circle without a tail": (DARK, [Figure(blob(8, seed=2), RED, 20, 30, 0.3, tail=False)]),
    "circle on white": (WHITE, [Figure(blob(8, seed=3), RED, 20, 34, -0.2, nose=BLACK)]),
    "outlined square on white": (WHITE, [Figure(blob(10, 4), YELLOW, 22, 22, 0.6, nose=BLACK, line=BLACK)]),
    "small triangle": (DARK, [Figure(blob(7, 3), GREEN, 44, 40, math.pi)]),
    "house on white": (WHITE, [Figure(HOUSE, BLUE, 20, 34, 0.0, nose=BLACK)]),
    "fish": (DARK, [Figure(FISH, YELLOW, 18, 32, 0.0, tail=False)]),
    "two that part": (DARK, [Figure(blob(7, seed=4), RED, 36, 20, 0.0), Figure(blob(8, 4), BLUE, 28, 46, math.pi)]),
}
PAIR = ("circle on a dark ground", "house on white")  # draw this, not that: the README's


def draw(ground: tuple[int, int, int], figures: list[Figure], travelled: float) -> np.ndarray:
    """[64,64,3], uint8: the figures, each moved so many pixels along its heading."""
    image = Image.new("RGB", (FINE * scenes.SIZE, FINE * scenes.SIZE), ground)
    pen = ImageDraw.Draw(image)
    for figure in figures:
        cos, sin = math.cos(figure.heading), math.sin(figure.heading)
        x, y, r = figure.x + travelled * cos, figure.y + travelled * sin, max(math.hypot(*c) for c in figure.corners)

        def at(along: float, across: float, x=x, y=y, cos=cos, sin=sin) -> tuple[float, float]:
            return FINE * (x + along * cos - across * sin), FINE * (y + along * sin + across * cos)

        if figure.tail:
            dark = tuple(int(0.45 * value) for value in figure.colour)
            pen.polygon([at(0, -0.7 * r), at(-2.2 * r, 0.3), at(0, 0.6 * r)], fill=dark)
        outline = [(FINE * (x + dx), FINE * (y + dy)) for dx, dy in figure.corners]
        pen.polygon(outline, fill=figure.colour)
        if figure.line:
            pen.line([*outline, outline[0]], fill=figure.line, width=round(1.6 * FINE), joint="curve")
        if figure.nose:
            (nx, ny), size = at(0.8 * r, 0), 0.33 * r * FINE
            pen.ellipse([nx - size, ny - size, nx + size, ny + size], fill=figure.nose)
    return np.asarray(image.resize((scenes.SIZE, scenes.SIZE), Image.Resampling.BOX))


def overlaps(frames: np.ndarray, truth: np.ndarray, colour: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """[t]: as `scenes.same_place`, for frames [t,3,64,64] in [0,1]."""
    half_way = np.linalg.norm(colour - ground) / 2
    found, expected = (np.linalg.norm(clip - colour[:, None, None], axis=1) < half_way for clip in (frames, truth))
    return (found & expected).sum((1, 2)) / (found | expected).sum((1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description="Figures and a picture of the tiny model on drawings by hand.")
    parser.add_argument("--model", type=Path, default=Path("weights/tiny"), help="the folder")
    parser.add_argument("--out", type=Path, default=Path("weights/tiny/drawings.png"))
    args = parser.parse_args()
    travelled = scenes.speed(BUCKET) / FPS * np.arange(scenes.FRAMES)
    clips = [[draw(ground, figures, far) for far in travelled] for ground, figures in DRAWINGS.values()]
    truth = np.array(clips).transpose(0, 1, 4, 2, 3).astype(np.float32) / 255
    videos = minisvd.load(args.model)(torch.from_numpy(2 * truth[:, 0] - 1), fps=FPS, motion_bucket=BUCKET)
    made = np.stack([video.frames.numpy() for video in videos])
    rows = []
    for (name, (ground, figures)), video, clip in zip(DRAWINGS.items(), made, truth, strict=True):
        look = [np.array(colour, np.float32) / 255 for colour in (*(f.colour for f in figures), ground)]
        each = np.mean([overlaps(video, clip, colour, look[-1]) for colour in look[:-1]], axis=0)
        rows.append([name, *(f"{value:.2f}" for value in (each[0], each.mean(), each[-1]))])
    print(table(["drawing", "overlap in the first frame", "in all", "in the last"], "lrrr", rows))
    sheet = np.concatenate([truth[:, :1], np.ones_like(truth[:, :1]), made], axis=1)
    pair = sheet[[list(DRAWINGS).index(name) for name in PAIR]]
    for rows_shown, path in ((sheet, args.out), (pair, args.out.with_name(f"{args.out.stem}-pair.png"))):
        save_png(as_image(torch.from_numpy(rearrange(rows_shown, "r t c h w -> (r h) (t w) c")), zoom=2), path)
        print(path)


if __name__ == "__main__":
    main()
