"""A second kind of motion for the tiny model: shapes that turn as they go, along an arc of 14 pixels to the right.

    python -m tools.finetune.arcs write runs/arcs/clips          200 clips, and the motion bucket of each
    python -m tools.finetune.arcs measure runs/arcs/model        how far generated shapes end from their arcs

The clips look as those of `tools.tiny.scenes`, from which the shipped model learnt that all things move straight.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import minisvd
from minisvd.video import Video
from tools.measure.metrics import bootstrap_interval
from tools.output import write_json
from tools.tiny import scenes
from tools.tiny.evaluate import HELD_OUT_SEED, generate

RADIUS = 14.0  # pixels


def arc(scene: scenes.Scene, travelled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions [t, 2] and headings [t] after `travelled` [t] pixels: the heading turns by travelled / RADIUS."""
    heading = scene.heading + travelled / RADIUS
    x = scene.x + RADIUS * (np.sin(heading) - np.sin(scene.heading))
    y = scene.y - RADIUS * (np.cos(heading) - np.cos(scene.heading))
    return np.stack([x, y], axis=1), heading


def random_clip(rng: np.random.Generator) -> tuple[scenes.Scene, int, int, np.ndarray]:
    """A scene whose arc stays in frame, its fps, its motion bucket, and the uint8 frames [t, 3, 64, 64]."""
    scene, fps, bucket, _ = scenes.random_clip(rng)
    longest, _ = arc(replace(scene, x=0.0, y=0.0), np.linspace(0, scenes.REACH))
    x, y = rng.uniform(scenes.MARGIN - longest.min(0), scenes.SIZE - scenes.MARGIN - longest.max(0))
    scene = replace(scene, x=float(x), y=float(y))
    places = zip(*arc(scene, travelled(fps, bucket)), strict=True)
    frames = [scenes.render(replace(scene, heading=heading), position[None]) for position, heading in places]
    return scene, fps, bucket, np.concatenate(frames)


def travelled(fps: float, bucket: float) -> np.ndarray:
    """Pixels from the start, in each frame."""
    return scenes.speed(bucket) / fps * np.arange(scenes.FRAMES)


def write(folder: Path, count: int, seed: int = 0) -> None:
    """Clips as .mp4 files, and `buckets.json` with the motion bucket of each."""
    folder.mkdir(parents=True)
    rng, buckets = np.random.default_rng(seed), {}
    for i in range(count):
        _, fps, bucket, frames = random_clip(rng)
        Video(torch.from_numpy(frames) / 255, fps).save(folder / f"arc-{i:03}.mp4")
        buckets[f"arc-{i:03}.mp4"] = bucket
    write_json(folder / "buckets.json", buckets)


def measure(model: Path | str, count: int) -> str:
    """How far from the end of its arc each generated shape ends, and how many end nearer to it than to straight on."""
    rng = np.random.default_rng(HELD_OUT_SEED)
    clips = [random_clip(rng) for _ in range(count)]
    from_arc, nearer = [], []
    for video, (scene, fps, bucket, _) in zip(generate(minisvd.load(model), clips), clips, strict=True):
        path = travelled(fps, bucket)
        end, straight = arc(scene, path)[0][-1], scenes.path(scene, bucket, fps)[-1]
        found = scenes.track(video.numpy(), scene).positions[-1]
        from_arc.append(float(np.nan_to_num(np.hypot(*(found - end)), nan=scenes.SIZE)))
        if np.hypot(*(end - straight)) > 4:  # pixels: where the two ends can be told apart
            nearer.append(from_arc[-1] < np.nan_to_num(np.hypot(*(found - straight)), nan=0))
    low, high = bootstrap_interval(from_arc, np.median)
    return (
        f"{count} unseen arcs: the shape ends {np.median(from_arc):.1f} pixels from its place (median, 95 % interval "
        f"{low:.1f} to {high:.1f}); of {len(nearer)} that turn enough to tell, {np.mean(nearer):.0%} turned"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("write", "measure"))
    parser.add_argument("path", help="the clips' new folder; or the model's folder")
    parser.add_argument("--count", type=int, default=200)
    args = parser.parse_args()
    if args.what == "measure":
        print(measure(args.path, args.count))
    elif Path(args.path).exists():
        parser.error(f"{args.path} exists: name a new folder")
    else:
        write(Path(args.path), args.count)


if __name__ == "__main__":
    main()
