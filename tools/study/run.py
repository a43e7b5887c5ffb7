"""What do the shortcuts change, where the right answer is known? The paper's questions, and others', of the tiny model.

    python -m tools.study.run                                everything; stop it at will, the same command goes on
    python -m tools.study.run --families builds cuts         some of it
    python -m tools.study.run --scenes 8 --noises 1 --few 8  little of it

Each unseen scene has its own fps, motion bucket and noises, the same in every arm (tools/study/arms.py). The families:

    headline   the exact build, the paper's, both with guidance cut, and ten steps: --scenes scenes, --noises noises
    frontier   every shortcut: fewer steps, other noise levels, guidance cut or in an interval, deep features reused
    builds     no cut: "lossless" (the baseline), vcut=False (that it is the same), vcut=True (TCA omitted)
    cuts       vcut=True, guided before step c, one branch from there on, in three forms (Table IV)
    control    vcut="lossless" with the same cut steps: cutting guidance without omitting anything
    panels     conditioned on the image's CLIP embedding in all steps, before c, from c on, never (Figure 2)
    estimates  the denoised estimate D of every other step: when is what decided?

All but the first are run on --few scenes, with one noise; the four in the middle again as NAME-paper, at the paper's
guidance of 1 to 3. Arms that begin alike share their first steps, which changes no bit. `--work` keeps a file of
measures for each arm and batch of scenes; `--out` gets study.json, study.md, frontier.md and the pictures.

Axes: b batch, t frames, c channels, h w latent grid, H W pixels.
"""

import argparse
import copy
import hashlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import minisvd
from minisvd.config import Vcut
from minisvd.sampler import Denoise, euler_steps, guided_denoiser, initial_latents, sample_euler
from tools.measure import metrics
from tools.measure.embedding_similarity import split
from tools.output import atomic, plotting, write_json
from tools.study import figures, summary
from tools.study import report as study_report
from tools.study.arms import BASELINE, FAMILIES, RELEASED, Arm, Family, Plan
from tools.study.deepcache import DeepCache
from tools.tiny import scenes
from tools.tiny.evaluate import HELD_OUT_SEED, Clip, images
from tools.tiny.fit import half

TAKEN = (0, HELD_OUT_SEED)  # seeds of training, and of the scenes that it is measured on
NOISE_AUG = 0.02
BATCH = 8
EQUAL_PSNR = 100.0  # decibels that equal frames count as; rounding leaves fewer to all others
TIMED = ("headline", "frontier", "builds")  # families
PICTURED = 3  # scenes in the pictures, each with a motion bucket of at least
LIVELY = 130
NOT_FOUND = {"heading_error": 180.0, "speed_error": 1.0, "colour_error": 3**0.5, "last_position_error": 64.0 * 2**0.5}

Row = dict[str, Any]


def encoder(spec: str) -> metrics.Features:
    """The features that a Plan's `subject` or `background` names. Raises ValueError, as the encoders do."""
    kind, _, name = spec.partition(":")
    if spec == "pixels":
        return metrics.pixel_features
    if spec == "tiny":
        return metrics.tiny_features()
    if kind not in ("clip", "dino") or not name:
        raise ValueError(f"the encoder is {spec!r}; need tiny, pixels, clip:NAME[:TAG|FILE] or dino:NAME[:FILE]")
    return (metrics.open_clip_features if kind == "clip" else metrics.timm_features)(*split(name))


class Bench:
    """A model in its three builds, and what measures its videos: one for each process.

    Sampling is in float32. Frames are decoded in `half`, alike for every arm: decoding is much of the work.
    Raises ValueError for a model of other pictures than the scenes', for an unknown encoder, and what `minisvd.load`
    raises.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.svd = minisvd.load(plan.model, vcut=False)
        if self.svd.generation.size != (scenes.SIZE, scenes.SIZE):
            w, h = self.svd.generation.size
            raise ValueError(f"{plan.model} makes {w}x{h}; need {scenes.SIZE}x{scenes.SIZE}, as tools.tiny.train's do")
        self.unets: dict[Vcut, minisvd.SpatioTemporalUNet] = {
            False: self.svd.unet,
            "lossless": minisvd.load_unet(plan.model, vcut="lossless"),
            True: minisvd.load_unet(plan.model, vcut=True),
        }
        self.decoder = copy.deepcopy(self.svd.vae).to(half(torch.device("cpu")))
        for module in self.decoder.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # two thirds of the time on a CPU
        self.subject, self.background = encoder(plan.subject), encoder(plan.background)
        self.guidance = plan.guidance
        side = scenes.SIZE // self.svd.vae.config.factor
        self.grid = side, side

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [t,4,h,w] -> frames [t,3,H,W] in [0,1]."""
        return ((self.decoder.decode(latents[None])[0].float() + 1) / 2).clamp(0, 1)

    def macs(self, arm: Arm) -> int:
        """The UNet's work for one video."""
        config, frames = self.svd.unet.config, self.svd.generation.num_frames
        return arm.macs(config, frames, self.grid, self.plan.steps, self.guidance)

    def weights(self) -> str:
        """A hash of all weights."""
        digest = hashlib.sha256()
        for part in (self.svd.unet, self.svd.vae, self.svd.clip):
            for tensor in part.state_dict().values():
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Unit:
    """The videos of a batch of scenes from one of their noises, by number: what a process does at a time."""

    noise: int
    start: int
    stop: int

    @property
    def numbers(self) -> range:
        return range(self.start, self.stop)

    def folder(self, work: Path) -> Path:
        return work / f"noise-{self.noise}" / f"scenes-{self.start:04d}-{self.stop:04d}"

    def file(self, work: Path, arm: Arm) -> Path:
        return self.folder(work) / f"{arm.name.replace(' ', '_')}.json"

    def arms(self, families: dict[str, Family]) -> list[Arm]:
        """All that any family runs on these scenes."""
        covering = (family for family in families.values() if family.covers(self.start, self.noise))
        return list(dict.fromkeys(arm for family in covering for arm in family.arms))


@dataclass(frozen=True)
class Batch:
    """A unit's scenes: their true clips, what the UNet is told of them, and the noise that every arm starts from."""

    unit: Unit
    clips: list[Clip]
    image: Tensor  # [b,3,H,W] in [-1,1]
    embeds: Tensor
    latent: Tensor
    ids: Tensor
    noise: Tensor  # [b,t,4,h,w]


@torch.inference_mode()
def draw(bench: Bench, unit: Unit) -> Batch:
    """All that is random about a scene comes of the seed and its number, its noises of their own numbers too."""
    (h, w), generation = bench.grid, bench.svd.generation
    clips, aug_noise, noise = [], [], []
    for number in unit.numbers:
        clips.append(scenes.random_clip(np.random.default_rng([bench.plan.seed, number])))
        rng = np.random.default_rng([bench.plan.seed, number, unit.noise])
        aug_noise.append(rng.standard_normal((3, scenes.SIZE, scenes.SIZE), dtype=np.float32))
        noise.append(rng.standard_normal((generation.num_frames, 4, h, w), dtype=np.float32))
    image = images(clips)
    augmented = image + NOISE_AUG * torch.from_numpy(np.stack(aug_noise))
    ids = torch.tensor([[fps - 1, bucket, NOISE_AUG] for _, fps, bucket, _ in clips])
    embeds, latent = bench.svd.clip(image), bench.svd.vae.encode(augmented)
    return Batch(unit, clips, image, embeds, latent, ids, torch.from_numpy(np.stack(noise)))


def denoiser(bench: Bench, batch: Batch, arm: Arm) -> Denoise:
    """D(x; sigma) of an arm, for one run. In steps without the embedding, both branches have the zero one."""
    schedule, unet = arm.schedule(bench.guidance), bench.unets[arm.build]
    network = unet if arm.reuse is None else DeepCache(unet, arm.reuse)

    def given(embeds: Tensor) -> Denoise:
        return guided_denoiser(network, embeds, batch.latent, batch.ids, schedule)

    conditioned = given(batch.embeds)
    if arm.embedding == "all":
        return conditioned
    unconditioned = given(torch.zeros_like(batch.embeds))
    return lambda x, sigma, step: (conditioned if arm.conditioned(step) else unconditioned)(x, sigma, step)


@dataclass(frozen=True)
class Walk:
    """Latents [b,t,4,h,w] at the start and after each step, and the estimate D of each step."""

    latents: list[Tensor]
    denoised: list[Tensor]


class Walks:
    """The ways from noise to latents that the arms take over one batch. What others begin with is taken once, and kept:
    up to half a gigabyte for eight scenes of 16x16 latents."""

    def __init__(self, bench: Bench, batch: Batch) -> None:
        self.bench, self.batch = bench, batch
        self.taken: dict[Arm, Walk] = {}
        self.references: dict[Arm, list[Tensor]] = {}

    def walk(self, arm: Arm) -> Walk:
        """All of an arm's way."""
        if arm in self.taken:
            return self.taken[arm]
        trunk, first = arm.origin()
        sigmas = arm.sigmas(self.bench.plan.steps)
        shared = Walk([initial_latents(self.batch.noise, sigmas)], []) if trunk == arm else self.walk(trunk)
        latents, denoised = shared.latents[:first], shared.denoised[: first - 1]
        for step in euler_steps(denoiser(self.bench, self.batch, arm), latents[-1], sigmas, first):
            latents.append(step.latents)
            denoised.append(step.denoised)
        found = Walk(latents, denoised)
        if trunk == arm:
            self.taken[arm] = found
        return found

    def end(self, arm: Arm) -> Tensor:
        """The latents [b,t,4,h,w] that are decoded."""
        if arm.estimate is not None:
            return self.walk(replace(arm, estimate=None)).denoised[arm.estimate - 1]
        return self.walk(arm).latents[-1]

    def reference(self, arm: Arm) -> list[Tensor]:
        """Each scene's frames in the baseline of this arm's guidance."""
        baseline = replace(BASELINE, guidance=arm.guidance)
        if baseline not in self.references:
            self.references[baseline] = [self.bench.decode(latents) for latents in self.end(baseline)]
        return self.references[baseline]


@torch.inference_mode()
def measure(walks: Walks, arm: Arm, advance: Callable[[], object]) -> Iterator[Row]:
    """An arm's videos, one row for each scene of the batch. What is measured of a video alone is so for the few scenes'
    first noise only, and not of estimates. What was not found counts as worst."""
    bench, batch = walks.bench, walks.batch
    unit, baseline = batch.unit, replace(BASELINE, guidance=arm.guidance)
    for i, (latents, uncut) in enumerate(zip(walks.end(arm), walks.end(baseline), strict=True)):
        reference, (scene, fps, bucket, _) = walks.reference(arm)[i], batch.clips[i]
        frames = reference if arm == baseline else bench.decode(latents)
        found = metrics.against_truth(frames, scene, bucket, fps)
        row = asdict(found) | {
            "scene": unit.numbers[i],
            "noise": unit.noise,
            "right": found.right_in_every_frame,
            "class_every": all(found.class_right),
            "class_last": found.class_right[-1],
            "overlap_mean": statistics.fmean(found.overlap),
            "overlap_last": found.overlap[-1],
            "paired_psnr": min(metrics.psnr(frames, reference), EQUAL_PSNR),
            "paired_ssim": metrics.ssim(frames, reference),
            "latent_difference": (latents - uncut).abs().max().item(),
        }
        slow = found.asked_speed * (len(frames) - 1) < metrics.TRAVEL  # heading and speed are not measured
        for name, worst in NOT_FOUND.items():
            if np.isnan(row[name]) and not (slow and name in ("heading_error", "speed_error")):
                row[name] = worst
        if unit.noise == 0 and unit.start < bench.plan.few and arm.estimate is None:
            image = (batch.image[i] + 1) / 2
            alike = metrics.consistencies(frames, image, subject=bench.subject, background=bench.background)
            motion = metrics.dynamics(frames)
            row |= {f"{name}_consistency": value for name, value in asdict(alike).items()}
            row |= {"smoothness": metrics.smoothness(frames), "motion": motion.pixels, "moving": motion.moving}
        yield {key: row.get(key) for key in ("scene", "noise", *summary.KEYS)}
        advance()


@torch.inference_mode()
def run_unit(bench: Bench, work: Path, arms: list[Arm], unit: Unit, advance: Callable[[], object]) -> None:
    """Measure the arms that have no file yet for these scenes and noise, and write one for each."""
    missing = [arm for arm in arms if not unit.file(work, arm).exists()]
    if not missing:
        return
    walks = Walks(bench, draw(bench, unit))
    for arm in missing:
        write_json(unit.file(work, arm), list(measure(walks, arm, advance)))


# All units, in processes that share nothing but a count of videos for the progress bar.


def units(scenes_drawn: int, noises: int) -> list[Unit]:
    starts = range(0, scenes_drawn, BATCH)
    return [Unit(noise, start, min(start + BATCH, scenes_drawn)) for noise in range(noises) for start in starts]


def missing(work: Path, families: dict[str, Family], every: list[Unit]) -> dict[Unit, list[Arm]]:
    """What has no file yet."""
    found = {unit: [arm for arm in unit.arms(families) if not unit.file(work, arm).exists()] for unit in every}
    return {unit: arms for unit, arms in found.items() if arms}


def amount(bench: Bench, todo: dict[Unit, list[Arm]]) -> tuple[int, int]:
    """Calls of the network on one clip that `todo` takes, a guided step being two, and videos to decode and measure."""
    calls = videos = 0
    for unit, arms in todo.items():
        walked: set[Arm] = set()
        for arm in arms:
            way = replace(arm, estimate=None)
            while way not in walked:
                walked.add(way)
                trunk, first = way.origin()
                own = way.calls(bench.plan.steps, bench.guidance)[first - 1 :]
                calls += len(unit.numbers) * sum(branches for _, branches, _ in own)
                way = trunk
        videos += len(unit.numbers) * len(arms)
    return calls, videos


@torch.inference_mode()
def expected_minutes(bench: Bench, todo: dict[Unit, list[Arm]], processes: int) -> float:
    """Minutes that `todo` takes here, by the time of one guided step and of one video's decoding and measures. A call
    that reuses deep features counts as a whole one."""
    steps, levels = bench.plan.steps, BASELINE.sigmas(bench.plan.steps)
    batch = draw(bench, Unit(0, 0, BATCH))
    denoise, x = denoiser(bench, batch, BASELINE), initial_latents(batch.noise, levels)
    alone = Walks(bench, draw(bench, Unit(0, 0, 1)))
    alone.taken = {BASELINE: Walk([x[:1]] * (steps + 1), [])}

    def seconds(work: Callable[[], object]) -> float:
        work()
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    def one_video() -> None:
        alone.references.clear()
        next(measure(alone, BASELINE, lambda: None))

    calls, videos = amount(bench, todo)
    a_call, a_video = seconds(lambda: denoise(x, levels[0], 1)) / BATCH / 2, seconds(one_video)
    return (calls * a_call + videos * a_video) / 60 / processes


def run_all(bench: Bench, work: Path, todo: dict[Unit, list[Arm]], processes: int) -> None:
    """Every unit that is not done."""
    videos = sum(len(unit.numbers) * len(arms) for unit, arms in todo.items())
    with tqdm(total=videos, desc="videos", unit="video", disable=not todo) as bar:
        if processes == 1:
            for unit, arms in todo.items():
                run_unit(bench, work, arms, unit, bar.update)
            return
        context = get_context("spawn")
        count = context.Value("l", 0)
        pool = ProcessPoolExecutor(processes, context, start, (bench.plan, count))
        try:
            pending = {pool.submit(run_here, work, arms, unit) for unit, arms in todo.items()}
            while pending:
                done, pending = wait(pending, timeout=1, return_when=FIRST_EXCEPTION)
                bar.update(count.value - bar.n)
                for future in done:
                    future.result()
        finally:
            pool.shutdown(cancel_futures=True)


HERE: dict[str, Any] = {}  # of a process of `run_all`: its bench and the count


def start(plan: Plan, count: Any) -> None:
    torch.set_num_threads(1)
    HERE.update(bench=Bench(plan), count=count)


def run_here(work: Path, arms: list[Arm], unit: Unit) -> None:
    def advance() -> None:
        with HERE["count"].get_lock():
            HERE["count"].value += 1

    run_unit(HERE["bench"], work, arms, unit, advance)


# The time of a video, each arm alone and in full.


@torch.inference_mode()
def time_arms(bench: Bench, arms: list[Arm], rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time to denoise one video, by arm's name: the arms in turn, every other round backwards."""
    batch = draw(bench, Unit(0, 0, 1))

    def seconds(arm: Arm) -> float:
        begin = time.process_time()
        sample_euler(denoiser(bench, batch, arm), batch.noise, arm.sigmas(bench.plan.steps))
        return time.process_time() - begin

    seconds(BASELINE)
    found: dict[str, list[float]] = {arm.name: [] for arm in arms}
    with tqdm(total=rounds * len(arms), desc="timing", unit="video") as bar:
        for turn in range(rounds):
            for arm in arms if turn % 2 == 0 else reversed(arms):
                found[arm.name].append(seconds(arm))
                bar.update()
    return found


def stored(file: Path) -> Any:
    """What a file of the work folder holds. SystemExit, with the remedy, if it is no JSON."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise SystemExit(f"study: {file} is broken ({error}): delete it, and it is made again") from error


def timings(bench: Bench, work: Path, arms: list[Arm], rounds: int) -> dict[str, list[float]]:
    """As `time_arms`, from the work folder where it has them."""
    file = work / "timing.json"
    found = stored(file) if file.exists() else {}
    if any(len(found.get(arm.name, [])) != rounds for arm in arms):
        found = time_arms(bench, arms, rounds)
        write_json(file, found)
    return found


# The report.


def entries(
    bench: Bench, families: dict[str, Family], rows: list[Row], seconds: dict[str, list[float]]
) -> list[summary.Entry]:
    """Every arm of every family, with its cost, for study.json."""
    released, found = bench.macs(RELEASED), []
    whole = statistics.median(seconds[RELEASED.name]) if RELEASED.name in seconds else None
    for name, family in families.items():
        for arm in family.arms:
            times, macs = seconds.get(arm.name), bench.macs(arm)
            median = statistics.median(times) if times else None
            found.append({
                "name": arm.name, "family": name, **asdict(arm),
                "scenes": family.scenes, "noises": family.noises,
                "macs": macs, "relative_macs": macs / released, "seconds": median,
                "relative_seconds": median / whole if median and whole else None,
                "sigma": None if arm.estimate is None else arm.sigmas(bench.plan.steps)[arm.estimate - 1].item(),
            })  # fmt: skip
    return summary.summarise(found, rows)


@torch.inference_mode()
def pictures(bench: Bench, families: dict[str, Family], scenes_drawn: int, out: Path) -> None:
    """Figures 1 and 2: the truth and the panels, and the estimates step by step, for the first lively scenes."""
    lively = [n for n in range(scenes_drawn) if draw_bucket(bench.plan, n) >= LIVELY][:PICTURED] or [0]
    walks = [Walks(bench, draw(bench, Unit(0, number, number + 1))) for number in lively]
    truth = [torch.from_numpy(each.batch.clips[0][3]).float() / 255 for each in walks]
    for name in set(figures.FRAMES) & set(families):
        rows = {"truth": truth}
        for arm in families[name].arms:
            if arm.estimate is None and name == "estimates":
                continue
            title = figures.row_title(asdict(arm), arm.sigmas(bench.plan.steps).tolist())
            rows[title] = [bench.decode(each.end(arm)[0]) for each in walks]
        figures.frames_picture(rows, out / figures.FRAMES[name])


def draw_bucket(plan: Plan, number: int) -> int:
    return scenes.random_clip(np.random.default_rng([plan.seed, number]))[2]


def check_work(work: Path, plan: Plan, weights: str) -> None:
    """Raise ValueError if the work folder was begun with another plan, or other weights."""
    file, mine = work / "plan.json", asdict(plan) | {"weights": weights}
    if not file.exists():
        write_json(file, mine)
    mine = json.loads(json.dumps(mine))  # lists for tuples, as in the file
    for name, value in stored(file).items():
        if value != mine.get(name):
            raise ValueError(f"{work} was begun with {name} {value}, not {mine.get(name)}; give --work another folder")


def arguments() -> argparse.Namespace:
    plan = Plan()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=plan.model, help="a model of the scenes' 64x64 (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=200, help="of the headline rows (default: %(default)s)")
    parser.add_argument("--noises", type=int, default=3, help="of each of those scenes (default: %(default)s)")
    parser.add_argument(
        "--few", type=int, default=plan.few, help=f"scenes of the rest, {BATCH}s (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=plan.steps, help="where an arm has no other (default: %(default)s)"
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES, help="default: all")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("tools/results"), help="default: %(default)s")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="also put frontier.md between this file's marks")
    parser.add_argument("--timing-rounds", type=int, default=3, help="0 times nothing (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=plan.seed, help="of the scenes and noise (default: %(default)s)")
    encoders = "tiny, pixels, clip:NAME[:TAG|FILE] or dino:NAME[:FILE] (default: %(default)s)"
    parser.add_argument("--subject", default=plan.subject, help=f"encoder of Eq. 5 and 6: {encoders}")
    parser.add_argument("--background", default=plan.background, help=f"of Eq. 7 and 8: {encoders}")
    args = parser.parse_args()
    for name, value, least in (
        ("--scenes", args.scenes, 2),
        ("--noises", args.noises, 1),
        ("--few", args.few, BATCH),
        ("--steps", args.steps, 2),
        ("--processes", args.processes, 1),
        ("--timing-rounds", args.timing_rounds, 0),
        ("--seed", args.seed, 0),
    ):
        if value < least:
            parser.error(f"{name} is {value}; need at least {least}")
    if args.few % BATCH:
        parser.error(f"--few is {args.few}; need a multiple of {BATCH}, the scenes that are run together")
    if args.seed in TAKEN:
        parser.error(f"--seed is {args.seed}, which training drew its scenes from; give another")
    if args.readme is not None:
        try:
            study_report.filled(args.readme.read_text(encoding="utf-8"), "")
        except (OSError, ValueError) as error:
            parser.error(f"--readme {args.readme}: {error}")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    chosen = {field.name: getattr(args, field.name) for field in fields(Plan) if hasattr(args, field.name)}
    try:
        plotting()  # before any long work
        bench = Bench(replace(Plan(), **chosen))
        check_work(args.work, bench.plan, bench.weights())
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"study: {error}") from error
    every = bench.plan.families(args.scenes, args.noises)
    families = {name: family for name, family in every.items() if name in args.families}
    todo = missing(args.work, families, units(args.scenes, args.noises))
    if todo:
        print(f"study: about {expected_minutes(bench, todo, args.processes):.0f} minutes, then timing and pictures")
    run_all(bench, args.work, todo, args.processes)
    rows = [
        row | {"arm": arm.name}
        for unit in units(args.scenes, args.noises)
        for arm in unit.arms(families)
        for row in stored(unit.file(args.work, arm))
    ]
    timed = [arm for name in TIMED if name in families for arm in families[name].arms]
    timed = list(dict.fromkeys([RELEASED, *timed]))
    seconds = timings(bench, args.work, timed, args.timing_rounds) if args.timing_rounds else {}
    study = {
        "command": " ".join(["python -m tools.study.run", *sys.argv[1:]]),
        "scenes": args.scenes,
        "noises": args.noises,
        "plan": asdict(bench.plan),
        "weights": bench.weights(),
        "guidance": bench.guidance,
        "noise_aug": NOISE_AUG,
        "timing_rounds": args.timing_rounds,
        "versions": {"minisvd": minisvd.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "cores": os.cpu_count(),
        "sigmas": BASELINE.sigmas(bench.plan.steps).tolist(),
        "arms": entries(bench, families, rows, seconds),
    }
    write_json(args.out / "study.json", summary.rounded(study))
    figures.plots(study, args.out)
    pictures(bench, families, args.scenes, args.out)
    study_report.write_markdown(study, args.out)
    if args.readme is not None and "headline" in families and "frontier" in families:
        fragment = (args.out / "frontier.md").read_text(encoding="utf-8")
        text = study_report.filled(args.readme.read_text(encoding="utf-8"), fragment)
        with atomic(args.readme) as path:
            path.write_text(text, encoding="utf-8")
    print(args.out / "study.md")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("study: interrupted: run it again to go on")
