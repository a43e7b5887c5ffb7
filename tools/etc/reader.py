"""What a video shows, read from its pixels alone: colour, shape, heading, pace, and whether each frame has one body.

`scenes.track` needs the exact scene; here only the names are known that any caption is made of. `python -m
tools.etc.reader` reads 500 true clips, which it must read right, and compares them with each other's captions, with
which it must not agree.

Axes: t frames, y rows, x columns. Lengths are pixels of a 64x64 frame.
"""

import argparse
import sys
from dataclasses import dataclass, replace

import numpy as np

from tools.etc.clips import RATES, clip, draw, pace
from tools.output import table
from tools.tiny import scenes

NEAR = 0.3  # how far a pixel of the body may be from its colour's name, in RGB
TRAVEL = 4.0  # pixels, from which on a heading is read
LEAST = 25  # pixels of a body
RADII = (7.0, 8.0, 9.0)
RIGHT = 0.97  # of what is read of true clips
SEED = 2_000_003


@dataclass(frozen=True)
class Reading:
    """`heading` is one of the eight names, None where the travel is short; `pace` pixels a frame; `bodies` [t], how
    many there are in each frame, -1 where one is cut by the border."""

    colour: str | None
    shape: str | None
    heading: str | None
    pace: float
    bodies: tuple[int, ...]

    @property
    def errors(self) -> float:
        """The share of frames with no body, two, or a cut one: the paper's Err."""
        return float(np.mean([count != 1 for count in self.bodies]))


def parts(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask [y,x] that have LEAST pixels, the largest first."""
    left, found = mask.copy(), []
    while left.any():
        part = np.zeros_like(left)
        part[np.unravel_index(left.argmax(), left.shape)] = True
        while True:
            grown = part.copy()
            for axis in (0, 1):
                for way in (1, -1):
                    moved = np.roll(part, way, axis)
                    edge = [slice(None), slice(None)]
                    edge[axis] = slice(0, 1) if way == 1 else slice(-1, None)
                    moved[tuple(edge)] = False
                    grown |= moved
            grown &= left
            if (grown == part).all():
                break
            part = grown
        left &= ~part
        if part.sum() >= LEAST:
            found.append(part)
    return sorted(found, key=lambda part: -part.sum())


def centre(mask: np.ndarray) -> np.ndarray:
    """(x, y) of the mask's middle."""
    y, x = np.nonzero(mask)
    return np.array([x.mean() + 0.5, y.mean() + 0.5])


def read(frames: np.ndarray) -> Reading:
    """Of frames [t,3,64,64], floats in [0,1]."""
    names = list(scenes.COLOURS)
    palette = np.array([scenes.COLOURS[name] for name in names])
    distance = np.linalg.norm(frames[:, None] - palette[None, :, :, None, None], axis=2)  # [t, colours, y, x]
    named = np.where(distance.min(1) < NEAR, distance.argmin(1), -1)
    areas = [(named == i).sum() for i in range(len(names))]
    colour = int(np.argmax(areas))
    bodies, masks = [], []
    for mask in named == colour:
        found = parts(mask)
        cut = bool(found) and bool(found[0][0].any() or found[0][-1].any() or found[0][:, [0, -1]].any())
        bodies.append(-1 if cut and len(found) == 1 else len(found))
        masks.append(found[0] if found else np.zeros_like(mask))
    there = np.array([mask.any() for mask in masks])
    if there.sum() < 2:
        return Reading(None, None, None, float("nan"), tuple(bodies))
    centres = np.array([centre(mask) for mask, here in zip(masks, there, strict=True) if here])
    velocity = np.polyfit(np.flatnonzero(there), centres, 1)[0]
    speed = float(np.hypot(*velocity))
    turned = nearest_heading(np.arctan2(velocity[1], velocity[0]))
    heading = turned if speed * (len(frames) - 1) >= TRAVEL else None
    kept = [mask for mask, here in zip(masks, there, strict=True) if here]
    white = [noses(frame) for frame, here in zip(frames, there, strict=True) if here]
    return Reading(names[colour], shape_of(kept, white, names[colour]), heading, speed, tuple(bodies))


def drift(frames: np.ndarray) -> float:
    """How far the border's median colour gets from the first frame's at most, in RGB, over frames [t,3,64,64].

    The noise that sampling starts with does not hide the mean of a whole grid, so grounds may differ between frames.
    """
    border = np.concatenate([frames[..., 0, :], frames[..., -1, :], frames[..., 0], frames[..., -1]], axis=-1)
    colours = np.median(border, axis=-1)
    return float(np.linalg.norm(colours - colours[0], axis=1).max())


def nearest_heading(angle: float) -> str:
    """The nearest of the eight."""
    return scenes.HEADINGS[round(angle / (np.pi / 4)) % 8]


def noses(frame: np.ndarray) -> np.ndarray:
    """White pixels [y,x] of a frame [3,y,x]."""
    return frame.min(0) > 0.7


def shape_of(masks: list[np.ndarray], white: list[np.ndarray], colour: str) -> str:
    """The shape whose drawing, at the best of RADII with its nose where the frames' is, covers the masks best."""
    ground = scenes.Background("gradient", "navy", (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), 0.0, 0.0, 0.0)
    some = list(range(0, len(masks), max(1, len(masks) // 4)))  # a few frames tell it
    seen, middles = np.array([masks[i] for i in some]), np.array([centre(masks[i]) for i in some])
    noses_at = [centre(white[i]) - middle for i, middle in zip(some, middles, strict=True) if white[i].any()]
    x, y = np.sum(noses_at or [(1.0, 0.0)], axis=0)
    plain = scenes.Scene("circle", colour, scenes.COLOURS[colour], 8.0, 32.0, 32.0, float(np.arctan2(y, x)), ground)
    scores = {}
    for shape in scenes.SHAPES:
        each = []
        for radius in RADII:
            scene = replace(plain, shape=shape, radius=radius)
            hidden = np.array([centre(drawn) for drawn in bodies(scene, middles)]) - middles  # by the nose
            drawn = bodies(scene, middles - hidden)
            each.append((drawn & seen).sum((1, 2)) / (drawn | seen).sum((1, 2)))
        scores[shape] = np.max(each, axis=0).sum()
    return max(scores, key=lambda shape: scores[shape])


def bodies(scene: scenes.Scene, places: np.ndarray) -> np.ndarray:
    """The pixels [t,y,x] of the body's colour, the scene's shape being at `places` [t,2]."""
    frames = scenes.render(scene, places) / 255
    return np.linalg.norm(frames - np.array(scene.rgb)[:, None, None], axis=1) < NEAR


def agrees(reading: Reading, caption: str, fps: float) -> dict[str, bool]:
    """Colour, shape, heading (where the rate has one that can be seen) and pace (to a quarter, or half a pixel) as the
    caption and the rate say."""
    _, colour, shape, _, *rest = caption.split()
    right = {"colour": reading.colour == colour, "shape": reading.shape == shape}
    if pace(fps) * (scenes.FRAMES - 1) >= 1.5 * TRAVEL:
        right["heading"] = reading.heading == " ".join(rest[: rest.index("over")])
    right["pace"] = bool(abs(reading.pace - pace(fps)) <= max(0.25 * pace(fps), 0.5))
    return right


def validate(count: int) -> tuple[dict[str, float], dict[str, float]]:
    """Shares right of `count` true clips: with their own captions, and with the next one's."""
    rng = np.random.default_rng(SEED)
    rows = []
    for i in range(count):
        scene, fps = draw(rng), RATES[i % len(RATES)]
        rows.append((read(clip(scene, fps).astype(np.float32) / 255), scenes.caption(scene), fps))
    own = [agrees(reading, said, fps) for reading, said, fps in rows]
    others = [agrees(rows[i - 1][0], said, fps) for i, (_, said, fps) in enumerate(rows)]
    return share(own), share(others)


def share(rows: list[dict[str, bool]]) -> dict[str, float]:
    """Of the rows that have it, how many are right; NaN where none has."""
    names = ("colour", "shape", "heading", "pace")
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Is what is read of true clips right?")
    parser.add_argument("--count", type=int, default=500, help="clips (default: %(default)s)")
    args = parser.parse_args(argv)
    own, others = validate(args.count)
    rows = [[name, f"{own[name]:.1%}", f"{others[name]:.1%}"] for name in own]
    print(table(["of true clips", "right", "with another's caption"], "lrr", rows))
    return int(min(own.values()) < RIGHT)


if __name__ == "__main__":
    sys.exit(main())
