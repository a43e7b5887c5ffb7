"""From noise to latents: EDM's noise levels, preconditioning, guidance and Euler steps, as plain functions.

Nothing here draws random numbers. Latents, noise levels and guidance are float32 whatever the model's dtype.
Axes: b batch, t frames, c channels, h w latent grid. sigma is a standard deviation, in units of the data's own.

Source: arXiv 2206.00364 (EDM: Eq. 5, Eq. 7, Algorithm 1 without the correction), arXiv 2311.15127, appendix D
(guidance that grows over the frames), arXiv 2407.19205, section III (guidance only before a cut step; Eq. 4),
arXiv 2404.14507 (align your steps), arXiv 2404.07724 (guidance in an interval of noise levels).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from .config import SETTINGS, Schedule, Stage2, check

Denoise = Callable[[Tensor, Tensor, int], Tensor]  # (x, sigma, step) -> D(x; sigma): denoised; steps count from 1
Callback = Callable[[int, Tensor, Tensor, Tensor], object]  # takes the fields of an EulerStep


def edm_sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = 700.0, rho: float = 7.0) -> Tensor:
    """EDM's noise levels [n+1], falling from sigma_max to sigma_min, then 0 (Eq. 5).

    sigma_i = (sigma_max^(1/rho) + i/(n-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho.
    700 is Stable Video Diffusion's, EDM has 80: arXiv 2311.15127 moves towards more noise for more pixels and frames.
    Raises ValueError for n < 1.
    """
    n = SETTINGS["steps"].check("number of steps", n)
    ramp = torch.linspace(0, 1, n, dtype=torch.float64, device="cpu")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return F.pad((high + ramp * (low - high)) ** rho, (0, 1)).float()


AYS = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034)


def ays_sigmas(n: int) -> Tensor:
    """The noise levels [n+1] of "align your steps" for SVD: `AYS` for n = 10, else of as many on the lines between
    their logarithms, at equal distances; then 0. Raises ValueError for n < 1."""
    n = SETTINGS["steps"].check("number of steps", n)
    at = torch.linspace(0, len(AYS) - 1, n, dtype=torch.float64, device="cpu")
    logs = torch.tensor(AYS, dtype=torch.float64, device="cpu").log()
    left = at.long().clamp(max=len(AYS) - 2)
    return F.pad(torch.lerp(logs[left], logs[left + 1], at - left).exp(), (0, 1)).float()


SIGMAS: dict[Schedule, Callable[[int], Tensor]] = {"karras": edm_sigmas, "ays": ays_sigmas}


def preconditioning(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in, c_noise) of D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (Eq. 7, v-prediction)."""
    c_skip = 1 / (sigma**2 + 1)
    c_out = -sigma / (sigma**2 + 1).sqrt()
    c_in = 1 / (sigma**2 + 1).sqrt()
    c_noise = 0.25 * sigma.log()
    return c_skip, c_out, c_in, c_noise


SHARE: dict[Stage2, float] = {"mean": 0.5, "cond": 1.0, "uncond": 0.0}
"""Of the embedding, in stage two. An attention to one key is affine in it, so at half the key it gives the mean of what
it gives at the key and at zero: Eq. 4 of arXiv 2407.19205."""


class Network(Protocol):
    """What the sampler needs of a UNet: a call, and what the call would compute of the embedding each time anew."""

    def condition(self, image_embeds: Tensor) -> Any: ...
    def __call__(
        self, sample: Tensor, c_noise: Tensor, image_embeds: Tensor, added_time_ids: Tensor, conditions: Any
    ) -> Tensor: ...


@dataclass(frozen=True)
class GuidanceSchedule:
    """Which steps are guided, how strongly each frame is, and what runs once guidance is cut.

    The scale grows linearly over the frames from `min_scale` to `max_scale`. Steps count from 1.

    Stage one, step < cut_step (None: all steps) from a level of stop < sigma <= start: classifier-free guidance, on a
    batch of two. A scale of 1 in every frame is the conditional branch itself, which then runs alone.
    Stage two, all other steps: one branch, conditioned on the image's latent and on a share of its embedding: half of
    it for `stage2` "mean", which gives each cross-attention the mean of its two outputs; all for "cond"; none for
    "uncond". A cut at step C is a stop at the level that step C leaves, sigmas[C - 1].

    Raises ValueError as `config.check` does: unless min_scale <= max_scale and stop <= start, for cut_step < 1, for
    another `stage2`.
    """

    min_scale: float
    max_scale: float
    cut_step: int | None = None
    stage2: Stage2 = "mean"
    start: float = math.inf
    stop: float = 0.0

    def __post_init__(self) -> None:
        check("guidance", (self.min_scale, self.max_scale))
        if self.cut_step is not None:
            check("cut_step", self.cut_step)
        check("stage2", self.stage2)
        check("guidance_interval", (self.stop, min(self.start, SETTINGS["guidance_interval"].high)))

    @property
    def guides(self) -> bool:
        """Does stage one run both branches?"""
        return not self.min_scale == self.max_scale == 1

    def stage(self, step: int, sigma: float | Tensor) -> int:
        """1 before the cut step and inside the interval, else 2."""
        everywhere = self.stop == 0 and self.start == math.inf  # then the level is not asked for: it may be on a device
        inside = everywhere or self.stop < float(sigma) <= self.start
        return 1 if inside and (self.cut_step is None or step < self.cut_step) else 2

    def scales(self, num_frames: int) -> Tensor:
        """[t]: the scale of each frame."""
        return torch.linspace(self.min_scale, self.max_scale, num_frames, dtype=torch.float32, device="cpu")


def guided_denoiser(
    unet: Network, image_embeds: Tensor, image_latent: Tensor, added_time_ids: Tensor, schedule: GuidanceSchedule
) -> Denoise:
    """D(x; sigma) of a UNet under a condition, with classifier-free guidance where the schedule says so.

    guided:  D = D_0 + scale (D_c - D_0), from one forward on both;   else:  D of the one branch.
    D_0 has a zero embedding and a zero image latent, and keeps the numbers.
    What the network makes of an embedding is computed once for each stage, in its first step; the result owns it.

    image_embeds [b,1,c'], image_latent [b,4,h,w] unscaled (the VAE's mode, not times 0.18215: trained so),
    added_time_ids [b,3].
    """

    def conditioned_on(embeds: Tensor, latent: Tensor, ids: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        conditions = cache(partial(unet.condition, embeds))

        def denoised(x: Tensor, sigma: Tensor) -> Tensor:
            c_skip, c_out, c_in, c_noise = preconditioning(sigma)
            frames = repeat(latent, "b c h w -> b t c h w", t=x.shape[1])
            sample = torch.cat([(c_in * x).to(latent.dtype), frames], dim=2)
            return c_skip * x + c_out * unet(sample, c_noise, embeds, ids, conditions()).float()

        return denoised

    zero_and_given = (torch.cat([torch.zeros_like(x), x]) for x in (image_embeds, image_latent))
    two = conditioned_on(*zero_and_given, torch.cat([added_time_ids, added_time_ids]))

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        d_0, d_c = two(torch.cat([x, x]), sigma).chunk(2)
        scale = rearrange(schedule.scales(x.shape[1]).to(x.device), "t -> t 1 1 1")
        return d_0 + scale * (d_c - d_0)

    conditional = conditioned_on(image_embeds, image_latent, added_time_ids)
    shared = conditioned_on(SHARE[schedule.stage2] * image_embeds, image_latent, added_time_ids)
    stages = {1: guided if schedule.guides else conditional, 2: shared}

    return lambda x, sigma, step: stages[schedule.stage(step, sigma)](x, sigma)


class EulerStep(NamedTuple):
    """One step done: its `number` from 1, the level `sigma` that it reached, the latents x there, and D(x; sigma) of
    the level it left: the estimate of the clean latents that it followed."""

    number: int
    sigma: Tensor
    latents: Tensor
    denoised: Tensor


def euler_steps(denoise: Denoise, x: Tensor, sigmas: Tensor, first: int = 1) -> Iterator[EulerStep]:
    """Euler's method for dx/dsigma = (x - D(x; sigma)) / sigma, step by step from the `first` on; x is where it starts.

    x <- x + (x - D(x; sigma_i)) / sigma_i * (sigma_i+1 - sigma_i)
    """
    for i in range(first - 1, len(sigmas) - 1):
        denoised = denoise(x, sigmas[i], i + 1)
        d = (x - denoised) / sigmas[i]
        x = x + d * (sigmas[i + 1] - sigmas[i])
        yield EulerStep(i + 1, sigmas[i + 1], x, denoised)


def initial_latents(noise: Tensor, sigmas: Tensor) -> Tensor:
    """noise * sqrt(1 + sigmas[0]^2), in float32: unit noise [b,t,c,h,w] at the first level, over data of variance 1."""
    return noise.float() * (1 + sigmas[0].to(noise.device, torch.float32) ** 2).sqrt()


def sample_euler(denoise: Denoise, noise: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """All of `euler_steps`, from unit noise [b,t,c,h,w] at sigmas[0] to sigmas[-1]: the latents there.

    `callback(step, sigma, latents, denoised)` sees every step: the fields of its `EulerStep`.
    """
    x = initial_latents(noise, sigmas)
    for step in euler_steps(denoise, x, sigmas.to(noise.device, torch.float32)):
        x = step.latents
        if callback is not None:
            callback(*step)
    return x
