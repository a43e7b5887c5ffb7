"""What do the paper's cuts change, where the right answer is known? Its questions, asked of the tiny model.

    python -m tools.study.run                           everything; stop it at will, the same command goes on
    python -m tools.study.run --families builds cuts    some of it

Each unseen scene has its own fps, motion bucket and noise, the same in every arm. The families of arms:

    builds     no cut: vcut False (the baseline of all arms), "lossless" (the exact control), True (TCA omitted)
    cuts       vcut=True, guided before step c, one branch from there on, in three forms (Table IV)
    panels     conditioned on the image's CLIP embedding in all steps, before c, from c on, never (Figure 2)
    control    vcut="lossless" with the same cut steps: cutting guidance without omitting anything

Arms that begin alike share their first steps, which changes no bit. `--work` keeps a file of measures for each family
and batch of scenes; `--out` gets study.json, study.md and the pictures. Then each arm is timed alone, in full.

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
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import minisvd
from minisvd.accounting import BUILDS, RunCost, run_cost
from minisvd.config import Vcut
from minisvd.sampler import (
    Denoise,
    GuidanceSchedule,
    Stage2,
    edm_sigmas,
    euler_steps,
    guided_denoiser,
    initial_latents,
    sample_euler,
)
from tools.measure import metrics
from tools.output import plotting, write_json
from tools.study import report as study_report
from tools.tiny import scenes
from tools.tiny.evaluate import HELD_OUT_SEED, Clip, images

SEED = 240_719_205
TAKEN = (0, HELD_OUT_SEED)  # seeds of training, and of the scenes that it is measured on
NOISE_AUG = 0.02
BATCH = 8
EQUAL_PSNR = 100.0  # decibels that equal frames count as; the rounding of bfloat16 leaves fewer to all others
PICTURED = 3  # scenes in the picture of the panels, each with a motion bucket of at least
LIVELY = 130

Row = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way to make the videos.

    build       the UNet's `vcut`
    cut_step    guided before it, one branch from it on; None: guided in every step
    stage2      that one branch's share of the embedding: see GuidanceSchedule
    embedding   the steps conditioned on the image's CLIP embedding: "all", those "before" `switch`, those "from" it
                on, or "never". In the others it is zero for both branches; the image's latent stays.
    """

    build: Vcut
    cut_step: int | None = None
    stage2: Stage2 = "mean"
    embedding: Literal["all", "before", "from", "never"] = "all"
    switch: int | None = None

    @property
    def name(self) -> str:
        cut = "" if self.cut_step is None else f" c={self.cut_step} {self.stage2}"
        switch = "" if self.switch is None else f" {self.switch}"
        return f"{self.build}{cut}" + ("" if self.embedding == "all" else f" embedding {self.embedding}{switch}")

    def conditioned(self, step: int) -> bool:
        """Is this step (from 1) conditioned on the embedding?"""
        late = self.switch is not None and step >= self.switch
        return {"all": True, "before": not late, "from": late, "never": False}[self.embedding]

    def origin(self) -> tuple["Arm", int]:
        """The arm that goes the same way at first, and the first step that is this one's own."""
        if self.cut_step is not None:
            return Arm(self.build), self.cut_step
        if self.switch is not None:
            return Arm(self.build, embedding="all" if self.embedding == "before" else "never"), self.switch
        return self, 1


BASELINE = Arm(False)


@dataclass(frozen=True)
class Plan:
    """All that the measures of a scene depend on, but the weights. `cuts` are steps from 1, as is `switch`."""

    model: str = "tiny"
    seed: int = SEED
    steps: int = 25
    cuts: tuple[int, ...] = (5, 10, 13, 15, 17, 20)
    switch: int = 13

    def families(self) -> dict[str, list[Arm]]:
        """The arms, each in the family that runs it. `builds` has the uncut ones, which all others are shown beside."""
        return {
            "builds": [BASELINE, Arm("lossless"), Arm(True)],
            "cuts": [Arm(True, c, stage2) for c in self.cuts for stage2 in ("mean", "cond", "uncond")],
            "panels": [
                Arm(False, embedding="before", switch=self.switch),
                Arm(False, embedding="from", switch=self.switch),
                Arm(False, embedding="never"),
            ],
            "control": [Arm("lossless", c) for c in self.cuts],
        }


FAMILIES = tuple(Plan().families())


class Bench:
    """A model in its three builds, and what measures its videos: one for each process.

    Sampling is in float32. Frames are decoded in bfloat16, alike for every arm: decoding is half of the work.
    Raises ValueError for a model of other pictures than the scenes', and what `minisvd.load` raises.
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
        self.decoder = copy.deepcopy(self.svd.vae).bfloat16()
        self.features = metrics.tiny_features()
        self.sigmas = edm_sigmas(plan.steps)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [t,4,h,w] -> frames [t,3,H,W] in [0,1]."""
        return ((self.decoder.decode(latents[None])[0].float() + 1) / 2).clamp(0, 1)

    def macs(self, arm: Arm) -> RunCost:
        """The UNet's work for one video."""
        side = scenes.SIZE // self.svd.vae.config.factor
        config, frames = self.svd.unet.config, self.svd.generation.num_frames
        return run_cost(config, frames, (side, side), self.plan.steps, arm.cut_step, BUILDS[arm.build])

    def weights(self) -> str:
        """A hash of all weights."""
        digest = hashlib.sha256()
        for part in (self.svd.unet, self.svd.vae, self.svd.clip):
            for tensor in part.state_dict().values():
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Batch:
    """Scenes by number: their true clips, what the UNet is told of them, and the noise that every arm starts from."""

    numbers: range
    clips: list[Clip]
    image: Tensor  # [b,3,H,W] in [-1,1]
    embeds: Tensor
    latent: Tensor
    ids: Tensor
    noise: Tensor  # [b,t,4,h,w]


@torch.inference_mode()
def draw(bench: Bench, numbers: range) -> Batch:
    """All that is random about a scene, its noise too, comes of the seed and its number."""
    side, generation = scenes.SIZE // bench.svd.vae.config.factor, bench.svd.generation
    clips, aug_noise, noise = [], [], []
    for number in numbers:
        rng = np.random.default_rng([bench.plan.seed, number])
        clips.append(scenes.random_clip(rng))
        aug_noise.append(rng.standard_normal((3, scenes.SIZE, scenes.SIZE), dtype=np.float32))
        noise.append(rng.standard_normal((generation.num_frames, 4, side, side), dtype=np.float32))
    image = images(clips)
    augmented = image + NOISE_AUG * torch.from_numpy(np.stack(aug_noise))
    ids = torch.tensor([[fps - 1, bucket, NOISE_AUG] for _, fps, bucket, _ in clips])
    embeds, latent = bench.svd.clip(image), bench.svd.vae.encode(augmented)
    return Batch(numbers, clips, image, embeds, latent, ids, torch.from_numpy(np.stack(noise)))


def denoiser(bench: Bench, batch: Batch, arm: Arm) -> Denoise:
    """D(x; sigma) of an arm. In steps not conditioned on the embedding, both branches have the zero one."""
    schedule = GuidanceSchedule(*bench.svd.generation.guidance, arm.cut_step, arm.stage2)

    def given(embeds: Tensor) -> Denoise:
        return guided_denoiser(bench.unets[arm.build], embeds, batch.latent, batch.ids, schedule)

    conditioned = given(batch.embeds)
    if arm.embedding == "all":
        return conditioned
    unconditioned = given(torch.zeros_like(batch.embeds))
    return lambda x, sigma, step: (conditioned if arm.conditioned(step) else unconditioned)(x, sigma, step)


class Walks:
    """The ways from noise to latents that the arms take over one batch, each step of them taken once."""

    def __init__(self, bench: Bench, batch: Batch) -> None:
        self.bench, self.batch = bench, batch
        self.taken: dict[Arm, list[Tensor]] = {}

    def walk(self, arm: Arm) -> list[Tensor]:
        """Latents [b,t,4,h,w] at the start and after each step."""
        if arm not in self.taken:
            trunk, first = arm.origin()
            sigmas = self.bench.sigmas
            shared = [initial_latents(self.batch.noise, sigmas)] if trunk == arm else self.walk(trunk)[:first]
            own = euler_steps(denoiser(self.bench, self.batch, arm), shared[-1], sigmas, first)
            self.taken[arm] = [*shared, *(step.latents for step in own)]
        return self.taken[arm]

    @cached_property
    def reference(self) -> list[Tensor]:
        """Each scene's frames in the baseline."""
        return [self.bench.decode(latents) for latents in self.walk(BASELINE)[-1]]


@torch.inference_mode()
def measure(walks: Walks, arm: Arm, advance: Callable[[], object]) -> Iterator[Row]:
    """An arm's videos, one row for each scene of the batch."""
    bench, batch = walks.bench, walks.batch
    ends = zip(walks.walk(arm)[-1], walks.walk(BASELINE)[-1], strict=True)
    for i, (latents, baseline) in enumerate(ends):
        reference, (scene, fps, bucket, _) = walks.reference[i], batch.clips[i]
        frames = reference if arm == BASELINE else bench.decode(latents)
        image = (batch.image[i] + 1) / 2
        alike = metrics.consistencies(frames, image, subject=bench.features, background=metrics.pixel_features)
        motion = metrics.dynamics(frames)
        yield {
            "scene": batch.numbers[i],
            "arm": arm.name,
            **asdict(metrics.against_truth(frames, scene, bucket, fps)),
            "paired_psnr": min(metrics.psnr(frames, reference), EQUAL_PSNR),
            "paired_ssim": metrics.ssim(frames, reference),
            "latent_difference": (latents - baseline).abs().max().item(),
            **{f"{name}_consistency": value for name, value in asdict(alike).items()},
            "motion": motion.pixels,
            "moving": motion.moving,
        }
        advance()


@torch.inference_mode()
def run_batch(bench: Bench, work: Path, families: list[str], numbers: range, advance: Callable[[], object]) -> None:
    """Measure the families that have no file yet for these scenes, and write one for each."""
    missing = [family for family in families if not rows_file(work, family, numbers).exists()]
    if not missing:
        return
    walks = Walks(bench, draw(bench, numbers))
    for family in missing:
        rows = [row for arm in bench.plan.families()[family] for row in measure(walks, arm, advance)]
        write_json(rows_file(work, family, numbers), rows)


def rows_file(work: Path, family: str, numbers: range) -> Path:
    return work / f"{family}-{numbers.start:04d}-{numbers.stop:04d}.json"


# All batches, in processes that share nothing but a count of videos for the progress bar.


def run_all(bench: Bench, work: Path, families: list[str], batches: list[range], processes: int) -> None:
    """Every batch that is not done."""
    arms = bench.plan.families()
    todo = {
        numbers: len(numbers) * sum(len(arms[f]) for f in families if not rows_file(work, f, numbers).exists())
        for numbers in batches
    }
    todo = {numbers: videos for numbers, videos in todo.items() if videos}
    with tqdm(total=sum(todo.values()), desc="videos", unit="video", disable=not todo) as bar:
        if processes == 1:
            for numbers in todo:
                run_batch(bench, work, families, numbers, bar.update)
            return
        context = get_context("spawn")
        count = context.Value("l", 0)
        pool = ProcessPoolExecutor(processes, context, start, (bench.plan, count))
        try:
            pending = {pool.submit(run_here, work, families, numbers) for numbers in todo}
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


def run_here(work: Path, families: list[str], numbers: range) -> None:
    def advance() -> None:
        with HERE["count"].get_lock():
            HERE["count"].value += 1

    run_batch(HERE["bench"], work, families, numbers, advance)


# The time of a video, each arm alone and in full.


@torch.inference_mode()
def time_arms(bench: Bench, arms: list[Arm], rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time to denoise one video, by arm's name: the arms in turn, every other round backwards."""
    batch = draw(bench, range(1))

    def seconds(arm: Arm) -> float:
        begin = time.process_time()
        sample_euler(denoiser(bench, batch, arm), batch.noise, bench.sigmas)
        return time.process_time() - begin

    seconds(BASELINE)
    found: dict[str, list[float]] = {arm.name: [] for arm in arms}
    with tqdm(total=rounds * len(arms), desc="timing", unit="video") as bar:
        for turn in range(rounds):
            for arm in arms if turn % 2 == 0 else reversed(arms):
                found[arm.name].append(seconds(arm))
                bar.update()
    return found


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise SystemExit(f"study: {file} is broken ({error}): delete it, and it is made again") from error


def timings(bench: Bench, work: Path, arms: list[Arm], rounds: int) -> dict[str, list[float]]:
    """As `time_arms`, from the work folder where it has them."""
    file = work / "timing.json"
    found = read_json(file) if file.exists() else {}
    if any(len(found.get(arm.name, [])) != rounds for arm in arms):
        found = time_arms(bench, arms, rounds)
        write_json(file, found)
    return found


# The report.


def report(bench: Bench, rows: list[Row], families: list[str], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """study.json, but for its heading: every arm with its cost, measures and differences from the baseline."""
    baseline, entries = bench.macs(BASELINE).macs, []
    for family in families:
        for arm in bench.plan.families()[family]:
            times = seconds.get(arm.name)
            macs = bench.macs(arm).macs
            entries.append({
                "name": arm.name, "family": family, **asdict(arm),
                "macs": macs, "relative_macs": macs / baseline,
                "seconds": statistics.median(times) if times else None,
            })  # fmt: skip
    return {"arms": study_report.summarise(entries, rows)}


@torch.inference_mode()
def panels_picture(bench: Bench, scenes_drawn: int, path: Path) -> None:
    """Figure 2: the truth and the four panels, for the first lively scenes."""
    numbers = [n for n in range(scenes_drawn) if draw_bucket(bench.plan, n) >= LIVELY][:PICTURED] or [0]
    rows: dict[str, list[Tensor]] = {"truth": []}
    for number in numbers:
        walks = Walks(bench, draw(bench, range(number, number + 1)))
        rows["truth"].append(torch.from_numpy(walks.batch.clips[0][3]).float() / 255)
        for arm in (BASELINE, *bench.plan.families()["panels"]):
            title = study_report.panel_title(arm.embedding, arm.switch)
            rows.setdefault(title, []).append(bench.decode(walks.walk(arm)[-1][0]))
    study_report.frames_picture(rows, path)


def draw_bucket(plan: Plan, number: int) -> int:
    return scenes.random_clip(np.random.default_rng([plan.seed, number]))[2]


def check_work(work: Path, plan: Plan, weights: str) -> None:
    """Raise ValueError if the work folder was begun with another plan, or other weights."""
    file, mine = work / "plan.json", asdict(plan) | {"cuts": list(plan.cuts), "weights": weights}
    if not file.exists():
        write_json(file, mine)
    for name, value in read_json(file).items():
        if value != mine.get(name):
            raise ValueError(f"{work} was begun with {name} {value}, not {mine.get(name)}; give --work another folder")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a model of the scenes' 64x64 (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES, help="builds are always in")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("tools/results"), help="default: %(default)s")
    parser.add_argument("--timing-rounds", type=int, default=5, help="0 times nothing (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="of the scenes and noise (default: %(default)s)")
    args = parser.parse_args()
    for name, value, least in (
        ("--scenes", args.scenes, 2),
        ("--processes", args.processes, 1),
        ("--timing-rounds", args.timing_rounds, 0),
        ("--seed", args.seed, 0),
    ):
        if value < least:
            parser.error(f"{name} is {value}; need at least {least}")
    if args.seed in TAKEN:
        parser.error(f"--seed is {args.seed}, which training drew its scenes from; give another")
    args.families = [family for family in FAMILIES if family == "builds" or family in args.families]
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    try:
        plotting()  # before any long work
        bench = Bench(replace(Plan(), model=args.model, seed=args.seed))
        check_work(args.work, bench.plan, bench.weights())
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"study: {error}") from error
    batches = [range(i, min(i + BATCH, args.scenes)) for i in range(0, args.scenes, BATCH)]
    run_all(bench, args.work, args.families, batches, args.processes)
    files = [rows_file(args.work, family, numbers) for family in args.families for numbers in batches]
    rows = [row for file in files for row in read_json(file)]
    timed = [arm for family in args.families if family != "panels" for arm in bench.plan.families()[family]]
    seconds = timings(bench, args.work, timed, args.timing_rounds) if args.timing_rounds else {}
    heading = {
        "command": " ".join(["python -m tools.study.run", *sys.argv[1:]]),
        "scenes": args.scenes,
        "plan": asdict(bench.plan),
        "weights": bench.weights(),
        "guidance": bench.svd.generation.guidance,
        "noise_aug": NOISE_AUG,
        "timing_rounds": args.timing_rounds,
        "versions": {"minisvd": minisvd.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "cores": os.cpu_count(),
    }
    study = heading | report(bench, rows, args.families, seconds)
    write_json(args.out / "study.json", study)
    study_report.plot(study, args.out / "study.png")
    if "panels" in args.families:
        panels_picture(bench, args.scenes, args.out / "study-panels.png")
    study_report.write_markdown(study, args.out)
    print(args.out / "study.md")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("study: interrupted: run it again to go on")
