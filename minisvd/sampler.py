"""From noise to latents: EDM's noise levels, preconditioning, guidance and Euler steps, as plain functions.

Nothing here draws random numbers. Latents, noise levels and guidance are float32 whatever the model's dtype.
Axes: b batch, t frames, c channels, h w latent grid. sigma is a standard deviation, in units of the data's own.

Source: arXiv 2206.00364 (EDM: Eq. 5, Eq. 7, Algorithm 1 without the correction), arXiv 2311.15127, appendix D
(guidance that grows over the frames), arXiv 2407.19205, section III (guidance only before a cut step; Eq. 4).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor

from minisvd.attention import Context

Denoise = Callable[[Tensor, Tensor, int], Tensor]
"""(x, sigma, step) -> D(x; sigma): denoised latents. Steps count from 1."""


def edm_sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = 700.0, rho: float = 7.0) -> Tensor:
    """EDM's noise levels [n+1], falling from sigma_max to sigma_min, then 0 (Eq. 5).

    sigma_i = (sigma_max^(1/rho) + i/(n-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho.
    Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"number of steps is {n}; need at least 1")
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def preconditioning(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in, c_noise) of D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (Eq. 7, v-prediction)."""
    c_skip = 1 / (sigma**2 + 1)
    c_out = -sigma / (sigma**2 + 1).sqrt()
    c_in = 1 / (sigma**2 + 1).sqrt()
    c_noise = 0.25 * sigma.log()
    return c_skip, c_out, c_in, c_noise


Contexts = list[list[Context]]
Stage2 = Literal["mean", "cond", "uncond"]

STAGE_TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of (unconditional, conditional)
    "mean": lambda zero, image: (zero + image) / 2,
    "cond": lambda _zero, image: image,
    "uncond": lambda zero, _image: zero,
}


class Network(Protocol):
    """What the sampler needs of a UNet: the embedding's part, made once, and a forward that takes it."""

    def condition(self, image_embeds: Tensor) -> Contexts: ...
    def denoise(self, sample: Tensor, c_noise: Tensor, contexts: Contexts, added_time_ids: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class GuidanceSchedule:
    """Which steps are guided, how strongly each frame is, and what runs once guidance is cut.

    The scale grows linearly over the frames from `min_scale` to `max_scale`. Steps count from 1. Stage one, step <
    cut_step: classifier-free guidance, a batch of two; None: throughout. Stage two, step >= cut_step: one branch,
    with the image's latent, in which each cross-attention gives what `stage2` says: "mean", of its unconditional and
    conditional outputs (Eq. 4), which by linearity is its output for half the embedding; "cond"; "uncond".
    In stage one a scale of 1 in every frame is the conditional branch itself, which then runs alone.
    Raises ValueError unless min_scale <= max_scale, for cut_step < 1 and for another `stage2`.
    """

    min_scale: float
    max_scale: float
    cut_step: int | None = None
    stage2: Stage2 = "mean"

    def __post_init__(self) -> None:
        if not self.min_scale <= self.max_scale < float("inf"):
            raise ValueError(f"guidance is ({self.min_scale}, {self.max_scale}); need finite min <= max")
        if self.cut_step is not None and self.cut_step < 1:
            raise ValueError(f"cut_step is {self.cut_step}; steps count from 1, so need at least 1")
        if self.stage2 not in STAGE_TWO:
            raise ValueError(f"stage2 is {self.stage2!r}; need one of {', '.join(STAGE_TWO)}")

    def guided(self, step: int) -> bool:
        """Does this step (from 1) run both branches?"""
        return self.stage(step) == 1 and not self.min_scale == self.max_scale == 1

    def stage(self, step: int) -> int:
        """1 before the cut step, 2 from it on."""
        return 1 if self.cut_step is None or step < self.cut_step else 2

    def scales(self, num_frames: int) -> Tensor:
        """[t]: the scale of each frame."""
        return torch.linspace(self.min_scale, self.max_scale, num_frames)


def guided_denoiser(
    unet: Network, image_embeds: Tensor, image_latent: Tensor, added_time_ids: Tensor, schedule: GuidanceSchedule
) -> Denoise:
    """D(x; sigma) of a UNet under a condition, with classifier-free guidance where the schedule says so.

    guided:  D = D_0 + scale (D_c - D_0), from one forward on both;   else:  D of the one branch.
    D_0 has a zero embedding and a zero image latent, and keeps the numbers.
    All that depends on the embedding is computed here, once, for both stages; the denoiser that returns owns it.

    image_embeds [b,1,c'], image_latent [b,4,h,w] unscaled, added_time_ids [b,3].
    """

    def both(x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x), x])

    def predict(x: Tensor, sigma: Tensor, contexts: Contexts, latent: Tensor, ids: Tensor) -> Tensor:
        c_skip, c_out, c_in, c_noise = preconditioning(sigma)
        frames = repeat(latent, "b c h w -> b t c h w", t=x.shape[1])
        sample = torch.cat([(c_in * x).to(latent.dtype), frames], dim=2)
        return c_skip * x + c_out * unet.denoise(sample, c_noise, contexts, ids).float()

    contexts = unet.condition(both(image_embeds))
    pair = (contexts, both(image_latent), torch.cat([added_time_ids, added_time_ids]))
    alone = {  # the one branch of each stage
        1: (single_branch(contexts, STAGE_TWO["cond"]), image_latent, added_time_ids),
        2: (single_branch(contexts, STAGE_TWO[schedule.stage2]), image_latent, added_time_ids),
    }

    def denoise(x: Tensor, sigma: Tensor, step: int) -> Tensor:
        if not schedule.guided(step):
            return predict(x, sigma, *alone[schedule.stage(step)])
        d_0, d_c = predict(torch.cat([x, x]), sigma, *pair).chunk(2)
        scale = rearrange(schedule.scales(x.shape[1]).to(x.device), "t -> t 1 1 1")
        return d_0 + scale * (d_c - d_0)

    return denoise


def single_branch(contexts: Contexts, choose: Callable[[Tensor, Tensor], Tensor]) -> Contexts:
    """Of contexts for (unconditional, conditional), batches of 2b, one context for each video: batches of b."""
    return [[tuple(choose(*both.chunk(2)) for both in context) for context in block] for block in contexts]


def sample_euler(
    denoise: Denoise,
    noise: Tensor,
    sigmas: Tensor,
    callback: Callable[[int, Tensor, Tensor], object] | None = None,
) -> Tensor:
    """Solve dx/dsigma = (x - D(x; sigma)) / sigma by Euler's method, from sigmas[0] to sigmas[-1].

    noise [b,t,c,h,w] has unit variance; the start is noise * sqrt(1 + sigmas[0]^2), in float32.
    `callback(step, sigma, latents)` sees every step: its number from 1, the level it reached, the latents there.
    """
    sigmas = sigmas.to(noise.device, torch.float32)
    x = noise.float() * (1 + sigmas[0] ** 2).sqrt()
    for i in range(len(sigmas) - 1):
        d = (x - denoise(x, sigmas[i], i + 1)) / sigmas[i]
        x = x + d * (sigmas[i + 1] - sigmas[i])
        if callback is not None:
            callback(i + 1, sigmas[i + 1], x)
    return x
