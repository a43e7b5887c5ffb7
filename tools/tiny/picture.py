"""The README's pictures: what the shipped model makes from scenes that it has not seen.

python -m tools.tiny.picture          writes frames.png, rows of frames, and moving.gif, the same videos as they move
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

import minisvd
from tools.output import as_image, save_png
from tools.tiny import scenes

SEED = 7
ROWS = ((230, 0), (230, 1), (130, 2), (60, 3))  # motion bucket, scene
HOLD = 5  # frames for which the moving picture stands still at its end


def videos() -> tuple[Tensor, Tensor]:
    """First frames [r,3,H,W] in [0,1], and the videos [r,t,3,H,W] that the model makes of them."""
    rng = np.random.default_rng(SEED)
    drawn = [scenes.random_scene(rng) for _ in range(4)]
    first = np.concatenate([scenes.render(drawn[i], np.array([[drawn[i].x, drawn[i].y]])) for _, i in ROWS])
    images = torch.from_numpy(scenes.to_unit(first))
    made = minisvd.load("tiny")(images, motion_bucket=[bucket for bucket, _ in ROWS], seed=0)
    return (images + 1) / 2, torch.stack([video.frames for video in made])


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The shipped model's videos as a picture that stands and one that moves."
    )
    parser.add_argument("--out", type=Path, default=Path("weights/tiny"), help="a folder")
    parser.add_argument("--zoom", type=int, default=3)
    args = parser.parse_args()
    images, frames = videos()
    gap = torch.ones(len(ROWS), 1, 3, scenes.SIZE, scenes.SIZE // 4)
    left = torch.cat([images[:, None], gap], dim=-1)
    rows = [rearrange(left, "r 1 c h w -> (r h) w c"), rearrange(frames, "r t c h w -> (r h) (t w) c")]
    save_png(as_image(torch.cat(rows, dim=1), zoom=2), args.out / "frames.png")
    held = torch.cat([frames, frames[:, -1:].expand(-1, HOLD, -1, -1, -1)], dim=1)
    grid = repeat(held, "r t c h w -> t c (h y) (r w x)", y=args.zoom, x=args.zoom)
    minisvd.Video(grid, fps=7).save(args.out / "moving.gif")
    print(args.out / "frames.png", args.out / "moving.gif", sep="\n")


if __name__ == "__main__":
    main()
