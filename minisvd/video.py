"""A finished video: frames and their rate, written as an H.264 .mp4, a .gif, a .webp, or a folder of PNGs.

Axes: t frames, c = 3 colours (RGB), h w pixels. A written file is whole or absent: it is made in a temporary folder
beside its target and moved into place at the end, so a failure or Ctrl-C leaves the folder as it was.
"""

from __future__ import annotations

import base64
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from PIL import Image

from .config import Setting, check, shown

if TYPE_CHECKING:  # torch takes seconds to import, and `check_output` is to answer at once
    from torch import Tensor

BT709 = 1  # the colour matrix, primaries and transfer of HD video, as H.264 numbers them
FPS = Setting(False, 0.01, 1000, why=", in frames per second")  # a model's begin at 2
LONGEST_SIDE = 8192  # pixels of an enlarged video
NOTEBOOK_PIXELS = 384  # a video smaller than this is enlarged in a notebook


@dataclass(frozen=True, eq=False, repr=False)
class Video:
    """`frames`, a float tensor [t,3,h,w] in [0,1], shown at `fps` frames per second. ValueError: another shape or
    dtype, a value outside [0,1] (or not a number), no frame, an fps that no format holds."""

    frames: Tensor
    fps: float

    def __post_init__(self) -> None:
        if isinstance(self.frames, np.ndarray):
            import torch

            object.__setattr__(self, "frames", torch.from_numpy(np.array(self.frames)))
        if not hasattr(self.frames, "is_floating_point"):
            raise ValueError(f"frames are {type(self.frames)}: give a float tensor [t,3,h,w]")
        shape = list(self.frames.shape)
        if len(shape) != 4 or shape[1] != 3 or 0 in shape or not self.frames.is_floating_point():
            raise ValueError(f"frames are {self.frames.dtype} {shape}: give a float tensor [t,3,h,w] with t, h, w >= 1")
        low, high = self.frames.min().item(), self.frames.max().item()
        if not (low >= 0 and high <= 1):
            remedy = "give numbers from 0 to 1" if math.isnan(low) else "clamp or rescale them to [0, 1]"
            raise ValueError(f"frames range from {low:g} to {high:g}: {remedy}")
        object.__setattr__(self, "fps", FPS.check("fps", self.fps))

    def __repr__(self) -> str:
        t, _, h, w = self.frames.shape
        return f"Video({t} frames of {w}x{h}, {self.fps:g} fps, {t / self.fps:.2f} s)"

    def numpy(self) -> np.ndarray:
        """The frames as bytes: uint8 [t,h,w,3], each the nearest to 255 times its value."""
        return self.frames.detach().movedim(1, -1).float().mul(255).round().cpu().numpy().astype(np.uint8)

    def pil_images(self) -> list[Image.Image]:
        """The frames as Pillow images, mode RGB."""
        return [Image.fromarray(frame) for frame in self.numpy()]

    def enlarged(self, zoom: int) -> Video:
        """The same video `zoom` times as wide and high, each pixel a square. Raises what `check_zoom` raises."""
        check_zoom(zoom, self.frames.shape[:1:-1])
        return Video(self.frames.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1), self.fps)

    def save(self, path: str | Path) -> Path:
        """Write the video and return where it is. The name decides the format:

        .mp4   H.264 yuv420p, which every browser and player shows; an odd side repeats its last row or column
        .gif   256 colours per frame, dithered; times are whole hundredths of a second, at least two
        .webp  animated and lossless; times are whole milliseconds
               (in both, frames that are equal and follow each other become one, shown for as long as they were)
        none   a folder of lossless frame_0000.png, frame_0001.png, ...

        An existing file is replaced, whole, at the end. Raises what `check_output` raises, before any work.
        """
        path = check_output(path)
        with replacing(path) as part:
            WRITERS[path.suffix.lower()](self, part)
        return path

    def _repr_html_(self) -> str:
        """The mp4 inside the page, looping; a small video is enlarged by a whole factor, its pixels kept square."""
        with tempfile.TemporaryDirectory() as temporary:
            data = base64.b64encode(self.save(Path(temporary) / "video.mp4").read_bytes()).decode()
        h, w = self.frames.shape[-2:]
        factor = max(1, NOTEBOOK_PIXELS // max(h, w))
        size = f'width="{w * factor}" height="{h * factor}"' + ' style="image-rendering: pixelated"' * (factor > 1)
        return f'<video controls loop autoplay muted playsinline {size} src="data:video/mp4;base64,{data}"></video>'


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of `path` when it is whole; hidden, beside it."""
    target = Path(os.path.realpath(path))  # what a link is to is replaced, and the link stays
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{path.name[:100]}-") as temporary:
        yield (part := Path(temporary) / path.name)
        if target.is_dir():  # an empty one; not every system replaces it
            target.rmdir()
        os.replace(part, target)


def check_zoom(zoom: int, size: Sequence[int]) -> None:
    """Raise ValueError for no whole number, one below 1, or one that makes a side of `size` over LONGEST_SIDE."""
    check("zoom", zoom)
    if max(size) * zoom > LONGEST_SIDE:
        most = LONGEST_SIDE // max(size)
        raise ValueError(f"zoom is {zoom}, for a side of {max(size) * zoom} pixels; need at most {most}")


def check_output(path: str | Path, ours: bool = False) -> Path:
    """`path` as a Path, if a video can be written there: to be asked before the long work that makes one.

    ValueError: an extension that is not .mp4, .gif, .webp or none. FileNotFoundError: the folder it would lie in does
    not exist. FileExistsError: the target is a folder with something in it, not `ours`, or not of the name's kind.
    PermissionError: the folder cannot be written to.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"cannot write {shown(path)}: give a path")
    path = Path(path)
    if path.suffix.lower() not in WRITERS:
        raise ValueError(f"cannot write {path}: use .mp4, .gif or .webp, or no extension for a folder of PNGs")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist, create it first")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: the folder {path.parent} is not writable, choose another")
    try:  # some systems say so only when it is tried
        tempfile.TemporaryFile(dir=Path(os.path.realpath(path)).parent).close()
    except OSError as error:
        raise PermissionError(f"cannot write {path}: {error.strerror} in its folder, choose another") from error
    if path.suffix and path.is_dir():
        raise FileExistsError(f"cannot write {path}: it is a folder, choose another name")
    if os.path.lexists(path) and not (path.is_file() or path.is_dir()):
        raise FileExistsError(f"cannot write {path}: it is a pipe, a device or a link to nothing, choose another name")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"cannot write {path}: it is there and may not be changed, choose another name")
    if not (path.suffix or ours) and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"cannot write PNGs to {path}: it exists and is not an empty folder, choose another name")
    return path


def is_written(path: Path) -> bool:
    """Whether a video is at `path`. If so it is whole, because `Video.save` moves it there at the end."""
    first = path if path.suffix else path / "frame_0000.png"
    return path.suffix.lower() in WRITERS and first.is_file() and first.stat().st_size > 0


def _write_mp4(video: Video, path: Path) -> None:
    frames = video.numpy()
    h, w = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")  # yuv420p halves both sides
    # faststart puts the index before the pictures, so that a browser can start before it has the whole file
    # "file:", or libav would take a name such as 12:30.mp4 or tee:x.mp4 for a protocol's
    with av.open(f"file:{path.absolute()}", "w", format="mp4", options={"movflags": "faststart"}) as container:
        rate = Fraction(video.fps).limit_denominator(1001)
        options = {"crf": "17", "x264-params": "mbtree=0"}  # whose threads make another file of the same frames
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _write_gif(video: Video, path: Path) -> None:
    # A palette per frame: one for all frames costs 8 dB when the colours move
    palette = Image.Quantize.MAXCOVERAGE
    frames = [frame.quantize(palette=frame.quantize(method=palette)) for frame in video.pil_images()]
    durations = [10 * max(2, d) for d in _durations(video, 100)]  # browsers slow down anything faster than 50 fps
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _write_webp(video: Video, path: Path) -> None:
    first, *rest = video.pil_images()
    first.save(path, save_all=True, append_images=rest, duration=_durations(video, 1000), loop=0, lossless=True)


def _write_pngs(video: Video, path: Path) -> None:
    path.mkdir()
    for i, frame in enumerate(video.pil_images()):
        frame.save(path / f"frame_{i:04d}.png")


def _durations(video: Video, ticks: int) -> list[int]:
    """How long each frame stays, in whole 1/ticks seconds: rounded so that no frame starts half a tick off."""
    starts = [round(i * ticks / video.fps) for i in range(len(video.frames) + 1)]
    return [after - before for before, after in pairwise(starts)]


WRITERS = {".mp4": _write_mp4, ".gif": _write_gif, ".webp": _write_webp, "": _write_pngs}
