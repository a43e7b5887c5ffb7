"""The tiny ETC's picture: what it makes of sentences, as frames and as the grid that its network sees.

python -m tools.etc.picture          writes weights/tiny-etc/frames.png
"""

import argparse
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from minisvd.etc import to_grid
from minisvd.text import TextToVideo
from tools.output import atomic, plotting

SAID = (  # a caption, frames per second, seed
    ("a red star moving up right", 2, 0),
    ("a cyan circle moving down left over a plum gradient", 1, 1),
    ("a yellow square moving left over a teal glow", 4, 2),
    ("a green triangle moving right over a navy vignette", 30, 3),
)


def latent_colours(latents: Tensor) -> Tensor:
    """Latents [t,c,h,w], laid out as their grid, as colours [y,x,3]: the first three channels, each from its least to
    its largest value."""
    grid = to_grid(latents[None, :, :3])[0]
    low, high = grid.amin((1, 2), keepdim=True), grid.amax((1, 2), keepdim=True)
    return rearrange((grid - low) / (high - low), "c y x -> y x c")


def main() -> None:
    parser = argparse.ArgumentParser(description="What the tiny ETC makes of sentences, as frames and as a grid.")
    parser.add_argument("--model", default="tiny-etc", help="as for minisvd generate --text (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("weights/tiny-etc/frames.png"))
    args = parser.parse_args()
    model = TextToVideo(args.model)
    figure = plotting()(figsize=(11, 1.65 * len(SAID)), layout="constrained")
    for row, (caption, fps, seed) in zip(figure.subplots(len(SAID), 2, width_ratios=(2.1, 8)), SAID, strict=True):
        frames = model(caption, fps=fps, seed=seed).frames
        latents = model.vae.encode(2 * frames - 1).detach()
        pictures = latent_colours(latents), rearrange(frames, "t c h w -> h (t w) c")
        for axes, picture in zip(row, pictures, strict=True):
            axes.imshow(picture.numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        row[1].set_title(f"“{caption}”, {fps} fps", fontsize=10)
        row[0].set_title("the grid of its latents", fontsize=9)
    with atomic(args.out) as path, torch.no_grad():
        figure.savefig(path, dpi=100, format="png")
    print(args.out)


if __name__ == "__main__":
    main()
