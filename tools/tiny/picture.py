"""The README's picture: rows of frames that the shipped model makes from scenes that it has not seen.

python -m tools.tiny.picture          writes weights/tiny/frames.png
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

import minisvd
from tools.output import as_image, save_png
from tools.tiny import scenes

SEED = 7
ROWS = ((230, 0), (230, 1), (130, 2), (60, 3))  # motion bucket, scene


def main() -> None:
    parser = argparse.ArgumentParser(description="Frames of the shipped model's videos as one picture.")
    parser.add_argument("--out", type=Path, default=Path("weights/tiny/frames.png"))
    parser.add_argument("--zoom", type=int, default=2)
    args = parser.parse_args()
    rng = np.random.default_rng(SEED)
    drawn = [scenes.random_scene(rng) for _ in range(4)]
    first = np.concatenate([scenes.render(drawn[i], np.array([[drawn[i].x, drawn[i].y]])) for _, i in ROWS])
    images = torch.from_numpy(scenes.to_unit(first))
    videos = minisvd.load("tiny")(images, motion_bucket=[bucket for bucket, _ in ROWS], seed=0)
    frames = torch.stack([video.frames for video in videos])
    gap = torch.ones(len(ROWS), 1, 3, scenes.SIZE, scenes.SIZE // 4)
    left = torch.cat([(images[:, None] + 1) / 2, gap], dim=-1)
    rows = [rearrange(left, "r 1 c h w -> (r h) w c"), rearrange(frames, "r t c h w -> (r h) (t w) c")]
    save_png(as_image(torch.cat(rows, dim=1), args.zoom), args.out)
    print(args.out)


if __name__ == "__main__":
    main()
