"""What the study compares: each way to make the videos is an arm, and the arms of one question are a family.

The baseline of every comparison is `vcut="lossless"`, guided in every step: the released function, at less work. That
`vcut=False` gives the same videos is itself an arm, of the family `builds`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from minisvd.config import Size, UNetConfig, Vcut
from minisvd.sampler import GuidanceSchedule, Stage2, ays_sigmas, edm_sigmas
from tools.cost.accounting import BUILDS, unet_cost
from tools.study.deepcache import EVERY, reused_macs

Scales = tuple[float, float]  # guidance of the first and of the last frame
PAPER_GUIDANCE: Scales = (1.0, 3.0)  # arXiv 2407.19205, section IV-A
PAPER_CUTS = (10, 17, 20)  # its Tables I and IV
HIGH, LOW = 700.0, 0.002  # SVD's largest and smallest noise level


def even_sigmas(to: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], n: int) -> Tensor:
    """Noise levels [n+1] at equal distances of `to`(sigma), from HIGH to LOW, then 0; `back` is its inverse."""
    high, low = (to(torch.tensor(sigma, dtype=torch.float64)) for sigma in (HIGH, LOW))
    return F.pad(back(torch.linspace(0, 1, n, dtype=torch.float64) * (low - high) + high), (0, 1)).float()


LEVELS: dict[str, Callable[[int], Tensor]] = {
    "EDM": edm_sigmas,
    "AYS": ays_sigmas,
    "EDM from 80": partial(edm_sigmas, sigma_max=80.0),  # EDM's own sigma_max
    "log": partial(even_sigmas, torch.log, torch.exp),  # equal ratios
    "angle": partial(even_sigmas, torch.atan, torch.tan),  # equal turns of (signal, noise): v-prediction's angle
}


@dataclass(frozen=True)
class Arm:
    """One way to make the videos.

    build       the UNet's `vcut`
    cut_step    guided before it, one branch from it on; None: guided in every step
    stage2      that one branch's share of the embedding: see GuidanceSchedule
    guidance    the scales of the first and last frame; None: the plan's
    steps       None: the plan's
    levels      the noise levels' rule, of LEVELS
    interval    guided only for levels of stop < sigma <= start, (stop, start); else one branch
    reuse       the skip from which `DeepCache` reuses what lies deeper in every second step; None: nothing is reused
    embedding   the steps conditioned on the image's CLIP embedding: "all", those "before" `switch`, those "from" it
                on, or "never". In the others it is zero for both branches; the image's latent stays.
    estimate    the video is the estimate D(x; sigma) of this step instead of the end; None: the end
    """

    build: Vcut = "lossless"
    cut_step: int | None = None
    stage2: Stage2 = "mean"
    guidance: Scales | None = None
    steps: int | None = None
    levels: str = "EDM"
    interval: tuple[float, float] | None = None
    reuse: int | None = None
    embedding: Literal["all", "before", "from", "never"] = "all"
    switch: int | None = None
    estimate: int | None = None

    @property
    def name(self) -> str:
        """Short, and of this arm alone."""
        switch = "" if self.switch is None else f" {self.switch}"
        stop, start = self.interval or (0.0, math.inf)
        parts = {
            f"{self.build}": True,
            f"{self.steps} steps": self.steps,
            f"{self.levels}": self.levels != "EDM",
            f"reuse {self.reuse}": self.reuse is not None,
            f"interval {stop:g} {start:g} {self.stage2}": self.interval,
            f"c={self.cut_step} {self.stage2}": self.cut_step,
            f"embedding {self.embedding}{switch}": self.embedding != "all",
            "guidance {:g} {:g}".format(*self.guidance or (0, 0)): self.guidance,
            f"estimate {self.estimate}": self.estimate,
        }
        return " ".join(part for part, there in parts.items() if there)

    def conditioned(self, step: int) -> bool:
        """Is this step (from 1) conditioned on the embedding?"""
        late = self.switch is not None and step >= self.switch
        return {"all": True, "before": not late, "from": late, "never": False}[self.embedding]

    def origin(self) -> tuple["Arm", int]:
        """The arm that goes the same way at first, and the first step that is this one's own."""
        if self.cut_step is not None and self.interval is None:
            return replace(self, cut_step=None, stage2="mean"), self.cut_step
        if self.switch is not None:
            start = "all" if self.embedding == "before" else "never"
            return replace(self, embedding=start, switch=None), self.switch
        return self, 1

    def sigmas(self, steps: int) -> Tensor:
        """The noise levels [n+1]; `steps` is the plan's."""
        return LEVELS[self.levels](self.steps or steps)

    def schedule(self, own: Scales) -> GuidanceSchedule:
        """Its guidance, where `own` is the plan's."""
        stop, start = self.interval or (0.0, math.inf)
        return GuidanceSchedule(*self.guidance or own, self.cut_step, self.stage2, start, stop)

    def calls(self, steps: int, own: Scales) -> list[tuple[int, int, bool]]:
        """For each step: GuidanceSchedule's stage, how many branches run, and whether the U is walked whole."""
        schedule, found = self.schedule(own), []
        run = 0  # steps of this stage so far
        for step, sigma in enumerate(self.sigmas(steps)[:-1].tolist(), 1):
            stage = schedule.stage(step, sigma)
            run = run + 1 if found and found[-1][0] == stage else 0
            branches = 2 if stage == 1 and schedule.guides else 1
            found.append((stage, branches, self.reuse is None or run % EVERY == 0))
        return found

    def macs(self, config: UNetConfig, frames: int, size: Size, steps: int, own: Scales) -> int:
        """The UNet's multiply-accumulates for one video, by minisvd's formulas: what each step runs, and what each
        condition is projected to once. `size` is (w, h) in latent cells."""
        build, calls = BUILDS[self.build], self.calls(steps, own)
        costs = {branches: unet_cost(config, frames, size, branches, build) for branches in (1, 2)}
        once = sum(costs[branches].once for _, branches in {(stage, branches) for stage, branches, _ in calls})
        for _, branches, whole in calls:
            reused = 0 if whole else reused_macs(config, frames, size, branches, build, self.reuse or 0)
            once += costs[branches].macs if whole else reused
        return once


BASELINE = Arm()
RELEASED = Arm(False)  # whose work and time the others' are relative to


@dataclass(frozen=True)
class Family:
    """Arms that are run on the same scenes and noise; the first is what the others are compared with."""

    arms: tuple[Arm, ...]
    scenes: int
    noises: int = 1

    def covers(self, scene: int, noise: int) -> bool:
        return scene < self.scenes and noise < self.noises


@dataclass(frozen=True)
class Plan:
    """All that the measures of a scene depend on, but the weights. `cuts` are steps from 1, as is `switch`.

    guidance    the scales where an arm has none of its own, so that there is something to cut
    few         scenes of every family but `headline`, each with its first noise
    intervals   guided noise levels: as low as arXiv 2404.07724 finds best for images, and up to ten times as high
    subject     encoders of Eq. 5 to 8: "tiny", "pixels", "clip:NAME[:TAG|FILE]" or "dino:NAME[:FILE]"
    """

    model: str = "tiny"
    seed: int = 240_719_205
    steps: int = 25
    guidance: Scales = (1.5, 1.5)
    cuts: tuple[int, ...] = PAPER_CUTS
    switch: int = 13
    few: int = 24
    intervals: tuple[tuple[float, float], ...] = ((0.28, 2.9), (0.28, 29.0))
    subject: str = "tiny"
    background: str = "pixels"

    def families(self, scenes: int, noises: int) -> dict[str, Family]:
        """Each question's arms, on how many scenes and noises; `scenes` and `noises` are those of `headline`."""
        few = min(self.few, scenes)
        found = {"headline": Family(self.headline(), scenes, noises), "frontier": Family(self.frontier(), few)}
        for suffix, guidance in (("", None), ("-paper", PAPER_GUIDANCE)):
            base = replace(BASELINE, guidance=guidance)
            cut = replace(base, build=True)
            forms: tuple[Stage2, ...] = ("mean", "cond", "uncond")
            cuts = [replace(cut, cut_step=c, stage2=form) for c in self.cuts for form in forms]
            panels = [replace(base, embedding=which, switch=self.switch) for which in ("before", "from")]
            families = {
                "builds": [base, replace(base, build=False), cut],
                "cuts": [base, cut, *cuts],
                "control": [base, *(replace(base, cut_step=c) for c in self.cuts)],
                "panels": [base, *panels, replace(base, embedding="never")],
            }
            found |= {f"{name}{suffix}": Family(tuple(arms), few) for name, arms in families.items()}
        guided = replace(BASELINE, guidance=PAPER_GUIDANCE)
        estimates = [replace(guided, estimate=step) for step in range(1, self.steps + 1, 2)]
        return found | {"estimates": Family((guided, *estimates), (few + 1) // 2)}

    def headline(self) -> tuple[Arm, ...]:
        """The exact build, the paper's, the paper's cut on both, and the plainest rival: fewer steps."""
        c = self.cuts[len(self.cuts) // 2]
        return BASELINE, Arm(True), Arm(True, c), Arm(cut_step=c), Arm(steps=self.fewer(10))

    def fewer(self, of_25: int) -> int:
        """So many steps of 25, in proportion to the plan's."""
        return max(1, round(of_25 * self.steps / 25))

    def frontier(self) -> tuple[Arm, ...]:
        """Every shortcut, alone and with others. Only the exact build and the paper's: the rest can go with either."""
        early, late, last = self.cuts[0], self.cuts[len(self.cuts) // 2], self.cuts[-1]
        ten = self.fewer(10)
        seven = self.fewer(7)  # of ten steps, where the later cut is of 25
        arms = [
            *self.headline(), RELEASED,
            *(Arm(cut_step=c) for c in (early, last)), Arm(cut_step=early, stage2="cond"),
            Arm(cut_step=late, stage2="cond"), Arm(cut_step=1, stage2="cond"),
            *(Arm(steps=self.fewer(n)) for n in (15, 8, 5)),
            *(Arm(steps=ten, levels=levels) for levels in ("AYS", "log", "angle", "EDM from 80")),
            Arm(steps=self.fewer(5), levels="AYS"),
            *(Arm(interval=interval, stage2="cond") for interval in self.intervals),
            Arm(steps=ten, interval=self.intervals[-1], stage2="cond"),
            Arm(reuse=0), Arm(reuse=1), Arm(reuse=1, cut_step=late), Arm(steps=ten, reuse=1),
            Arm(steps=ten, cut_step=seven), Arm(steps=ten, cut_step=seven, stage2="cond"),
            Arm(steps=ten, cut_step=1, stage2="cond"), Arm(steps=self.fewer(5), cut_step=1, stage2="cond"),
            Arm(True, steps=ten), Arm(True, steps=ten, cut_step=seven),
        ]  # fmt: skip
        return tuple(dict.fromkeys(arms))


FAMILIES = tuple(Plan().families(1, 1))
