"""How alike are the first and the last frame of a video, to an image encoder?

    python -m tools.measure.embedding_similarity clip.mp4 clips/*.gif frames/     by the tiny model and by pixels
    python -m tools.measure.embedding_similarity clip.mp4 --clip ViT-H-14 --dino vit_base_patch16_224.dino
    python -m tools.measure.embedding_similarity clip.mp4 --clip ViT-H-14:weights.safetensors --curve -o curves.png

Prints one row for each video and the mean, one column for each encoder: the cosine of the last frame's embedding with
the first's, the question of Figure 1 of "Faster Image2Video Generation" (arXiv 2407.19205). A high cosine alone does
not say that an encoder is blind to what changed: read it beside the pixels' column, and beside a static video's 1.

A video is an .mp4, .gif, .webp or a folder of PNGs, whose names are sorted with their numbers as numbers. An encoder is
a model of open_clip (--clip) or timm (--dino), after a colon its weights: a tag of open_clip's, or a file. Without a
tag or file they are downloaded, once.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence
from torch import Tensor

from tools.measure.metrics import HUBS, Features, open_clip_features, pixel_features, timm_features, tiny_features
from tools.output import plotting, table

PICTURES = (".png", ".svg", ".pdf")  # what a plot can be written as


@dataclass(frozen=True)
class Row:
    """One video: for each encoder the cosines of its frames with the first frame, so the last of them is the answer."""

    video: str
    curves: dict[str, list[float]]

    @property
    def similarity(self) -> dict[str, float]:
        """First to last, by encoder."""
        return {name: curve[-1] for name, curve in self.curves.items()}


def measure(videos: Sequence[Path], encoders: dict[str, Features]) -> list[Row]:
    """One row a video. Raises what `read_video` raises, and ValueError for a video of one frame."""
    rows = []
    for path in videos:
        frames = read_video(path)
        if len(frames) == 1:
            raise ValueError(f"{path} has one frame: give a video of at least two")
        rows.append(Row(str(path), {name: curve(encode(frames)) for name, encode in encoders.items()}))
    return rows


def curve(features: Tensor) -> list[float]:
    """The cosine of each of the features [t,d] with the first of them; 1 first of all."""
    return F.cosine_similarity(features[:1].double(), features.double(), dim=-1).tolist()


def mean(rows: Sequence[Row]) -> dict[str, float]:
    """First to last, by encoder, over the videos."""
    return {name: float(np.mean([row.similarity[name] for row in rows])) for name in rows[0].curves}


# --- reading --------------------------------------------------------------------------------------------------------


def read_video(path: Path) -> Tensor:
    """The frames of an .mp4, .gif, .webp or folder of PNGs, float [t,3,h,w] in [0,1].

    Raises what `reader` raises, and ValueError for what is damaged, has no frames, or frames of several sizes.
    """
    read = reader(path)
    try:
        frames = read(path)
    except (OSError, SyntaxError, IndexError, av.FFmpegError) as error:  # Pillow's and FFmpeg's, on broken data
        raise ValueError(f"{path} is damaged or not what its name says: {error}") from error
    if not frames:
        raise ValueError(f"{path} holds no frame: give an .mp4, .gif, .webp or a folder of PNGs")
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError(f"{path} holds frames of several sizes: give frames of one size")
    return torch.from_numpy(np.stack(frames)).movedim(-1, 1).float() / 255


def reader(path: Path) -> Callable[[Path], list[np.ndarray]]:
    """What reads the video at `path`. FileNotFoundError: nothing is there. ValueError: it is of another kind."""
    if not path.exists():
        raise FileNotFoundError(f"there is no video {path}: check the path")
    suffix = "" if path.is_dir() else path.suffix.lower()
    if suffix not in READERS or (path.is_file() and not suffix):
        raise ValueError(f"{path} is of no kind that can be read: give an .mp4, .gif, .webp or a folder of PNGs")
    return READERS[suffix]


def _read_mp4(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def _read_animation(path: Path) -> list[np.ndarray]:
    """Every frame that is stored: of equal frames in a row Pillow's writers store one, which stays longer."""
    with Image.open(path) as image:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]


def _read_pngs(path: Path) -> list[np.ndarray]:
    """A frame a file, in the order of their names, where 9 is before 10."""
    names = sorted(path.glob("*.png"), key=lambda p: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", p.name)])
    return [_read_animation(name)[0] for name in names]


READERS: dict[str, Callable[[Path], list[np.ndarray]]] = {
    ".mp4": _read_mp4, ".gif": _read_animation, ".webp": _read_animation, "": _read_pngs
}  # fmt: skip


# --- encoders -------------------------------------------------------------------------------------------------------


def build_encoders(clips: Sequence[str], dinos: Sequence[str]) -> dict[str, Features]:
    """The encoders by their column's name, as --clip and --dino ask; the tiny model's and pixels if neither does."""
    encoders: dict[str, Features] = {f"CLIP {spec}": open_clip_features(*split(spec)) for spec in clips}
    encoders |= {f"DINO {spec}": timm_features(*split(spec)) for spec in dinos}
    return encoders or {"tiny": tiny_features(), "pixels": pixel_features}


def split(spec: str) -> tuple[str, str | None]:
    """NAME[:WEIGHTS] -> name, weights or None. A name on a hub or in a folder has a colon and its own weights."""
    name, _, weights = (spec, "", "") if spec.startswith(HUBS) else spec.partition(":")
    return name, weights or None


# --- output ---------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    """A line for each video, a column for each encoder, the mean last."""
    names = list(rows[0].curves)
    cells = [(row.video, row.similarity) for row in rows] + [("mean", mean(rows))]
    lines = [[video, *(f"{cosines[name]:.4f}" for name in names)] for video, cosines in cells]
    return table(("video", *names), "l" + "r" * len(names), lines)


def as_dict(rows: Sequence[Row], curves: bool) -> dict[str, Any]:
    """What --json prints."""
    videos = [{"video": row.video, "similarity": row.similarity} for row in rows]
    if curves:
        videos = [entry | {"curve": row.curves} for entry, row in zip(videos, rows, strict=True)]
    return {"videos": videos, "mean": mean(rows)}


def plot(rows: Sequence[Row], path: Path) -> None:
    """A panel for each encoder: a line for each video, cosine with the first frame over the place in the video."""
    figure_class = plotting()
    means = mean(rows)
    figure = figure_class(figsize=(4 * len(means), 3.2), layout="constrained")
    panels = figure.subplots(1, len(means), sharey=True, squeeze=False)[0]
    for panel, (name, average) in zip(panels, means.items(), strict=True):
        for row in rows:
            panel.plot(np.linspace(0, 1, len(row.curves[name])), row.curves[name], linewidth=1, alpha=0.7)
        panel.set_title(f"{name}\nmean first to last {average:.4f}", fontsize=9)
        panel.set_xlabel("place in the video (0 first frame, 1 last)")
    panels[0].set_ylabel("cosine with the first frame")
    figure.savefig(path, dpi=150)


def parse_plot(text: str) -> Path:
    """Where a plot can be written: asked before the long work."""
    path = Path(text)
    if path.suffix.lower() not in PICTURES or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no {', '.join(PICTURES)} file in a folder that exists")
    return path


# --- command line ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", nargs="+", type=Path, help=".mp4, .gif, .webp or a folder of PNGs")
    clip, dino = "a model of open_clip, and its tag or file", "a model of timm, and its file"
    parser.add_argument("--clip", action="append", default=[], metavar="NAME[:TAG|FILE]", help=f"{clip}; repeatable")
    parser.add_argument("--dino", action="append", default=[], metavar="NAME[:FILE]", help=f"{dino}; repeatable")
    parser.add_argument("--curve", action="store_true", help="also every frame's cosine with the first")
    parser.add_argument("-o", "--output", type=parse_plot, metavar="PLOT", help=f"a plot, {', '.join(PICTURES)}")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def run(args: argparse.Namespace) -> None:
    for path in args.video:
        reader(path)  # what is missing is said before the long work
    if args.output:
        plotting()
    rows = measure(args.video, build_encoders(args.clip, args.dino))
    if args.output:
        plot(rows, args.output)
    if args.json:
        print(json.dumps(as_dict(rows, args.curve)))
        return
    print(markdown(rows))
    if args.curve:
        for row in rows:
            for name, cosines in row.curves.items():
                print(f"{row.video}, {name}: {' '.join(f'{cosine:.4f}' for cosine in cosines)}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (by default the process's own); status 2 and one sentence for a user's error."""
    args = parser().parse_args(argv)
    try:
        run(args)
    except (OSError, ValueError, ImportError) as error:
        print(f"embedding_similarity: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
