"""Held-out figures of the tiny model: `python -m tools.tiny.evaluate` prints them as a table, with 95 % intervals.

Each scene is one that training never drew, with its own fps and motion bucket; what is right in every frame is known.
Videos are made as any user makes them, by `svd(image, ...)` with the folder's own settings. The captions' text encoder
lies beside the three parts, in `text_encoder/`; nothing else reads it.

Axes: b batch, t frames, c channels, H W pixels.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import minisvd
from minisvd import StableVideoDiffusion
from tools import output
from tools.measure.metrics import TRAVEL, Measured, against_truth, bootstrap_interval, psnr, spearman, wilson_interval
from tools.tiny import scenes
from tools.tiny.captions import TEXT_ENCODER, CaptionedImages, draw_captioned, tokens

HELD_OUT_SEED = 1_000_003
BATCH = 8
CHOICES = 100  # captions that an image is compared with
SHOWN = ("overlap in the last frame", "right in every frame")  # against the guidance scale

Clip = tuple[scenes.Scene, int, int, np.ndarray]  # scene, fps, motion bucket, true frames [t,3,H,W] as uint8


@dataclass(frozen=True)
class Figure:
    """A measure over the held-out scenes, its 95 % interval, and the bar it is held to: at least, or at most."""

    name: str
    unit: str
    value: float
    low: float
    high: float
    bar: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    def shown(self, value: float) -> str:
        """A number of this measure, without its unit."""
        return f"{100 * value if self.unit == '%' else value:.{1 if self.unit else 3}f}"

    def __str__(self) -> str:
        return f"{self.name} {self.shown(self.value)} {self.unit}".rstrip()

    def row(self) -> tuple[str, ...]:
        """The cells of a table, under TITLES."""
        value, low, high, bar = (self.shown(x) for x in (self.value, self.low, self.high, self.bar))
        unit = f" {self.unit}".rstrip()
        wanted = f"{'at least' if self.at_least else 'at most'} {bar.removesuffix('.0')}{unit}"
        return self.name, f"{value}{unit}", f"{low} to {high}", wanted, "yes" if self.met else "no"


TITLES = ("measure", "figure", "95 % interval", "wanted", "met")


def draw_clips(count: int, seed: int = HELD_OUT_SEED, cues: float = 1.0) -> list[Clip]:
    """Unseen scenes, each with its fps, its motion bucket and its true frames; nose and tail of an opacity `cues`."""
    rng = np.random.default_rng(seed)
    drawn = [scenes.random_clip(rng) for _ in range(count)]
    if cues == 1.0:
        return drawn
    faint = [(replace(scene, cues=cues), fps, bucket) for scene, fps, bucket, _ in drawn]
    return [(*clip, scenes.render(clip[0], scenes.path(clip[0], clip[2], clip[1]))) for clip in faint]


def images(clips: list[Clip]) -> Tensor:
    """The clips' first frames [b,3,H,W] in [-1,1]: what a model is given."""
    return torch.from_numpy(scenes.to_unit(np.stack([frames[0] for *_, frames in clips])))


def generate(
    svd: StableVideoDiffusion, clips: list[Clip], progress: bool = True, scale: float | None = None
) -> Iterator[Tensor]:
    """A video [t,3,H,W] in [0,1] for each clip's first frame, fps and motion bucket; clip i draws from seed i.

    `scale` is the guidance of all frames, the model's own where it is None; 0 gives the unconditional branch alone.
    """
    guidance = None if scale is None else (scale, scale)
    with tqdm(total=len(clips), desc="videos", disable=not progress) as bar:
        for start in range(0, len(clips), BATCH):
            part = clips[start : start + BATCH]
            seeds = list(range(start, start + len(part)))
            fps, buckets = [clip[1] for clip in part], [clip[2] for clip in part]
            settings = {"fps": fps, "motion_bucket": buckets, "seed": seeds, "guidance": guidance}
            for video in svd(images(part), **settings, progress=False):
                yield video.frames
                bar.update()


@torch.inference_mode()
def reconstructions(svd: StableVideoDiffusion, clips: list[Clip], progress: bool = True) -> list[float]:
    """PSNR in dB of each whole clip after the VAE's encoder and its temporal decoder."""
    results = []
    for *_, frames in tqdm(clips, "reconstructions", disable=not progress):
        truth = torch.from_numpy(scenes.to_unit(frames))
        latents = svd.vae.encode(truth)[None] * svd.vae.config.scaling_factor
        decoded = svd.vae.decode(latents, svd.generation.decode_chunk)[0]
        results.append(psnr(((decoded + 1) / 2).clamp(0, 1), (truth + 1) / 2))
    return results


@torch.inference_mode()
def retrieval(pair: CaptionedImages, count: int) -> list[bool]:
    """Does each image find its own caption among `CHOICES` different ones?"""
    rng, hits = np.random.default_rng(HELD_OUT_SEED), []
    for _ in range(0, count, CHOICES):
        frames, captions = draw_captioned(rng, CHOICES, distinct=True)
        image, text = pair(torch.from_numpy(scenes.to_unit(frames)), tokens(captions))
        hits += ((image @ text.T).argmax(1) == torch.arange(CHOICES)).tolist()
    return hits


def load_pair(svd: StableVideoDiffusion, folder: Path) -> CaptionedImages:
    """The model's image encoder beside the text encoder that it was trained with."""
    pair = CaptionedImages(svd.clip.config)
    pair.image = svd.clip
    pair.text.load_state_dict({name: value.float() for name, value in load_file(folder / TEXT_ENCODER).items()})
    return pair.eval()


def mean_figure(
    name: str, unit: str, values: list[float] | np.ndarray, bar: float, statistic: Callable = np.mean
) -> Figure:
    """A mean or median with its bootstrap interval; decibels are to be many, errors few."""
    return Figure(name, unit, float(statistic(values)), *bootstrap_interval(values, statistic), bar, unit == "dB")


def share_figure(name: str, hits: list[bool], bar: float) -> Figure:
    """A proportion with Wilson's interval."""
    return Figure(name, "%", float(np.mean(hits)), *wilson_interval(sum(hits), len(hits)), bar, True)


def video_figures(measured: list[Measured]) -> list[Figure]:
    """The figures of generated videos. A shape that moves, but is not found, has the worst heading and no speed."""
    moving = [one for one in measured if one.asked_speed * (scenes.FRAMES - 1) >= TRAVEL]
    turns = np.nan_to_num([one.heading_error for one in moving], nan=180)
    slips = np.nan_to_num([one.speed_error for one in moving], nan=1)
    pace = np.array([(one.asked_speed, np.nan_to_num(one.speed)) for one in measured])
    found = [one.found for one in measured]
    last, faster = [one.overlap[-1] for one in measured], [one.overlap[-1] for one in faster_half(measured)]
    ranks = bootstrap_interval(pace, lambda rows: spearman(rows[:, 0], rows[:, 1]))
    return [
        mean_figure("first frame against the image, PSNR", "dB", [one.first_frame_psnr for one in measured], 26),
        Figure("frames in which the shape is found", "%", float(np.mean(found)),
               *bootstrap_interval(np.array(found), np.mean), 0.98, True),
        mean_figure("heading error, median", "degrees", turns, 15, np.median),
        Figure("speed against the asked one, Spearman", "", spearman(pace[:, 0], pace[:, 1]), *ranks, 0.9, True),
        mean_figure("relative error of the speed, median", "%", slips, 0.25, np.median),
        share_figure("colour within 0.1 (RGB, L2)", [one.colour_error <= 0.1 for one in measured], 0.95),
        share_figure("shape class kept", [one.shape_kept for one in measured], 0.95),
        share_figure("class right in the last frame", [one.class_right[-1] for one in measured], 0.97),
        share_figure("class right in every frame", [all(one.class_right) for one in measured], 0.95),
        Figure("overlap in the last frame", "", float(np.mean(last)), *bootstrap_interval(last, np.mean), 0.88, True),
        Figure("overlap in the last frame, faster half", "", float(np.mean(faster)),
               *bootstrap_interval(faster, np.mean), 0.85, True),
        share_figure("right in every frame", [one.right_in_every_frame for one in measured], 0.9),
    ]  # fmt: skip


def faster_half(measured: list[Measured]) -> list[Measured]:
    """The videos that are asked to go faster than the median."""
    return sorted(measured, key=lambda one: one.asked_speed)[len(measured) // 2 :]


def curves(measured: list[Measured]) -> str:
    """Overlap with the true shape (mean) and right class (share) in each frame, over speed, as two Markdown tables."""
    by_speed = sorted(measured, key=lambda one: one.asked_speed)
    bounds = np.linspace(0, len(measured), 5).astype(int)
    quarters = [by_speed[a:b] for a, b in pairwise(bounds)]
    speeds = [f"{part[0].asked_speed:.1f} to {part[-1].asked_speed:.1f}" for part in quarters]
    rows = [("all", by_speed), *zip(speeds, quarters, strict=True)]
    tables = []
    for title, shown in (
        ("overlap, by asked speed in pixels a frame", lambda part: np.mean([one.overlap for one in part], axis=0)),
        ("class right, %", lambda part: 100 * np.mean([one.class_right for one in part], axis=0)),
    ):
        frames, digits = len(measured[0].overlap), 1 if "%" in title else 3
        lines = [[name, *(f"{value:.{digits}f}" for value in shown(part))] for name, part in rows]
        titles = [title, *(f"frame {i + 1}" for i in range(frames))]
        tables.append(output.table(titles, "l" + "r" * frames, lines))
    return "\n\n".join(tables)


def evaluate(folder: Path, count: int, progress: bool = True) -> tuple[list[Figure], list[Measured]]:
    """Every figure of the model in `folder` over `count` scenes, and the videos' own measures."""
    svd = minisvd.load(folder)
    clips = draw_clips(count)
    parts = [
        mean_figure("VAE reconstruction, PSNR", "dB", reconstructions(svd, clips, progress), 32),
        share_figure(f"image finds its caption among {CHOICES}", retrieval(load_pair(svd, folder), 1000), 0.9),
    ]
    videos = zip(generate(svd, clips, progress), clips, strict=True)
    measured = [against_truth(video, scene, bucket, fps) for video, (scene, fps, bucket, _) in videos]
    return parts + video_figures(measured), measured


def table(figures: list[Figure]) -> str:
    return output.table(TITLES, "lrrrl", [figure.row() for figure in figures])


def by_scale(
    svd: StableVideoDiffusion, clips: list[Clip], scales: list[float]
) -> tuple[list[list[Figure]], list[list[Tensor]]]:
    """The video figures at each guidance scale, and the videos that they are of."""
    made = [list(generate(svd, clips, scale=scale)) for scale in scales]
    measured = [
        [against_truth(video, scene, bucket, fps) for video, (scene, fps, bucket, _) in zip(videos, clips, strict=True)]
        for videos in made
    ]
    return [video_figures(each) for each in measured], made


def scale_table(columns: list[list[Figure]], scales: list[float]) -> str:
    """The figures against the guidance scale, as a Markdown table."""
    rows = [
        [row[0].name, *(f"{figure.shown(figure.value)} {figure.unit}".strip() for figure in row)]
        for row in zip(*columns, strict=True)
    ]
    return output.table(["measure", *(f"scale {scale:g}" for scale in scales)], "l" + "r" * len(scales), rows)


def scale_picture(
    path: Path, scales: list[float], found: dict[float, tuple[list[list[Figure]], list[list[Tensor]], list[Clip]]]
) -> None:
    """Two figures against the scale, a line for each opacity of the cues; last frames with the faintest, a row for each
    scale, under the true ones."""
    figure = output.plotting()(figsize=(11, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.6))
    for axes, name in zip(left.subplots(2, 1, sharex=True), SHOWN, strict=True):
        for cues, (columns, _, _) in found.items():
            row = [next(one for one in column if one.name == name) for column in columns]
            values, low, high = ([getattr(one, key) for one in row] for key in ("value", "low", "high"))
            axes.plot(scales, values, marker="o", label=f"nose and tail at {cues:.0%}")
            axes.fill_between(scales, low, high, alpha=0.2)
        axes.set(ylabel=name.replace(", ", ",\n"))
        axes.grid(alpha=0.3)
    axes.set(xlabel="guidance scale; 0 is unconditional")
    left.axes[0].legend()
    _, made, clips = found[min(found)]
    truth = [torch.from_numpy(frames).float() / 255 for *_, frames in clips[:BATCH]]
    rows = [torch.cat([video[-1] for video in videos[:BATCH]], dim=2) for videos in (truth, *made)]
    axes = right.subplots()
    axes.imshow(torch.cat(rows, dim=1).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[scenes.SIZE * (i + 0.5) for i in range(len(rows))], title="last frames, faintest cues")
    axes.set_yticklabels(["true", *(f"{scale:g}" for scale in scales)])
    with output.atomic(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out figures of the tiny model.")
    parser.add_argument("--model", type=Path, default=Path("weights/tiny"), help="the folder")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures and every video's measures")
    parser.add_argument(
        "--scales", type=float, nargs="+", metavar="S", help="only figures against these guidance scales"
    )
    parser.add_argument(
        "--cues", type=float, nargs="+", default=[1.0], metavar="A", help="opacities of nose and tail (default: 1)"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="the figures against the scales, drawn")
    args = parser.parse_args()
    if args.scenes < 4:
        parser.error(f"--scenes is {args.scenes}; need at least 4, one for each quarter of the speeds")
    if not (args.model / TEXT_ENCODER).is_file():
        parser.error(f"{args.model} has no {TEXT_ENCODER}: give a folder that tools.tiny.train wrote")
    if args.scales:
        svd, found = minisvd.load(args.model), {}
        for cues in args.cues:
            clips = draw_clips(args.scenes, cues=cues)
            found[cues] = (*by_scale(svd, clips, args.scales), clips)
            print(f"nose and tail at {cues:.0%}\n\n{scale_table(found[cues][0], args.scales)}\n")
        if args.picture is not None:
            scale_picture(args.picture, args.scales, found)
        return
    figures, measured = evaluate(args.model, args.scenes)
    print(
        f"{args.scenes} unseen scenes, {minisvd.load(args.model).generation}\n\n{table(figures)}\n\n{curves(measured)}"
    )
    if args.json is not None:
        report = {"figures": [asdict(figure) for figure in figures], "videos": [asdict(one) for one in measured]}
        output.write_json(args.json, report)


if __name__ == "__main__":
    main()
