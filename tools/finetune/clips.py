"""A folder of videos as clips to learn from: latents and embeddings computed once, a file for each clip.

`buckets.json` in the folder, {file name: motion bucket}, says how fast each video moves. Without it a clip's bucket is
the rank of its motion score, 0 to 255.

Axes: t frames, c channels, h w latent grid, H W pixels.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from minisvd.images import load_image
from minisvd.pipeline import StableVideoDiffusion
from tools.measure.metrics import dynamics
from tools.output import atomic
from tools.tiny.fit import Run

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")

Clip = dict[str, Tensor]
"""latents [t,4,h,w], scaled; embeds [1,c']; first [3,H,W], the first frame's bytes; numbers [2]: fps, motion bucket."""


def motion_score(frames: Tensor, fps: float) -> float:
    """How fast the fastest twentieth of a picture moves, in shorter sides a second; frames [t,3,H,W] in [0,1]."""
    scale = min(1.0, 128 / min(frames.shape[-2:]))  # flow in small pictures is as good, and fast
    return dynamics(F.interpolate(frames, scale_factor=scale, mode="bilinear", antialias=True)).relative * fps


def find_videos(folder: Path) -> tuple[list[Path], dict[str, float]]:
    """The videos by name, and their motion buckets if the folder states them. Raises for a folder that will not do."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of videos")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEOS)
    if len(files) < 2:
        raise ValueError(f"{folder} has {len(files)} videos ({', '.join(VIDEOS)}); need at least 2, one to be held out")
    stated = folder / "buckets.json"
    try:
        buckets = {k: float(v) for k, v in json.loads(stated.read_text()).items()} if stated.exists() else {}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{stated} does not map file names to motion buckets: {error}") from error
    if missing := [path.name for path in files if buckets and path.name not in buckets]:
        raise ValueError(f"{stated} has no motion bucket for {missing[0]}: give one for each video, or no such file")
    return files, buckets


def read_frames(path: Path, every: int) -> tuple[float, Iterator[np.ndarray]]:
    """Frames a second, and every so many-th frame, uint8 [H,W,3]. Raises ValueError for what cannot be decoded."""

    def frames() -> Iterator[np.ndarray]:
        try:
            with av.open(str(path)) as container:
                for frame in islice(container.decode(video=0), 0, None, every):
                    yield frame.to_ndarray(format="rgb24")
        except av.FFmpegError as error:
            raise unreadable from error

    unreadable = ValueError(f"{path} is not a video that can be decoded: convert it, or take it out of the folder")
    try:
        with av.open(str(path)) as container:
            fps = float(container.streams.video[0].average_rate or 0) / every
    except (av.FFmpegError, IndexError) as error:
        raise unreadable from error
    if not 2 <= fps < 1000:
        raise ValueError(f"{path} gives {fps:g} frames a second; need at least 2, because the model is told fps - 1")
    return fps, frames()


def clips_of(run: Run, svd: StableVideoDiffusion, path: Path, bucket: float | None, args: Any) -> list[Clip]:
    """A video cut into clips of `args.frames` frames one after another; what is left at its end is left out."""
    fps, frames = read_frames(path, args.every)
    clips = []
    while len(part := list(islice(frames, args.frames))) == args.frames:
        video = torch.cat([load_image(frame, args.size, args.fit) for frame in part]).to(run.device)
        with torch.no_grad(), run.autocast():
            latents = torch.cat([svd.vae.encode(few) for few in video.split(4)]).float()
        with torch.no_grad():
            embeds = svd.clip(video[:1])[0]
        score = bucket if bucket is not None else -motion_score((video.cpu() + 1) / 2, fps)
        row = {"latents": svd.vae.config.scaling_factor * latents, "embeds": embeds}
        row |= {"first": ((video[0] + 1) * 127.5).round().byte(), "numbers": torch.tensor([fps, score])}
        clips.append({name: tensor.cpu().contiguous() for name, tensor in row.items()})
    return clips


def cached_clips(run: Run, svd: StableVideoDiffusion, args: Any) -> list[list[Clip]]:
    """The clips of each video that has any, computed for those that have no file yet."""
    videos, files = [], [run.work / "clips" / f"{path.name}.safetensors" for path in args.files]
    for path, file in tqdm(list(zip(args.files, files, strict=True)), "videos"):
        if not file.exists():
            clips = clips_of(run, svd, path, args.buckets.get(path.name), args)
            with atomic(file) as temporary:
                save_file({f"{i}.{k}": v for i, clip in enumerate(clips) for k, v in clip.items()}, temporary)
        tensors = load_file(file)
        names = ("latents", "embeds", "first", "numbers")
        videos.append([{name: tensors[f"{i}.{name}"] for name in names} for i in range(len(tensors) // len(names))])
    videos = [clips for clips in videos if clips]
    if len(videos) < 2:
        raise ValueError(f"{len(videos)} videos of {args.videos} have {args.frames} frames; need 2: lower --frames")
    if len(videos) < len(files):
        run.log(f"warning: {len(files) - len(videos)} videos are shorter than {args.frames} frames and left out")
    scored = [clip["numbers"] for clips in videos for clip in clips if clip["numbers"][1] < 0]
    for rank, numbers in enumerate(sorted(scored, key=lambda numbers: -numbers[1].item())):
        numbers[1] = 255 * rank / max(1, len(scored) - 1)
    return videos
