"""From noise to latents: EDM's noise levels, preconditioning, guidance and Euler steps, as plain functions.

Nothing here draws random numbers. Latents, noise levels and guidance are float32 whatever the model's dtype.
Axes: b batch, t frames, c channels, h w latent grid. sigma is a standard deviation, in units of the data's own.

Source: arXiv 2206.00364 (EDM: Eq. 5, Eq. 7, Algorithm 1 without the correction), arXiv 2311.15127, appendix D
(guidance that grows over the frames), arXiv 2407.19205, section III (guidance only before a cut step).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

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


@dataclass(frozen=True)
class GuidanceSchedule:
    """Which steps are guided, and how strongly each frame is.

    The scale grows linearly over the frames from `min_scale` to `max_scale`. Steps count from 1 and are guided
    while step < cut_step; from `cut_step` on, only the conditional branch runs. None: guided throughout. A scale
    of 1 in every frame is the conditional branch itself, which then runs alone.
    Raises ValueError unless min_scale <= max_scale, and for cut_step < 1.
    """

    min_scale: float
    max_scale: float
    cut_step: int | None = None

    def __post_init__(self) -> None:
        if not self.min_scale <= self.max_scale < float("inf"):
            raise ValueError(f"guidance is ({self.min_scale}, {self.max_scale}); need finite min <= max")
        if self.cut_step is not None and self.cut_step < 1:
            raise ValueError(f"cut_step is {self.cut_step}; steps count from 1, so need at least 1")

    def guided(self, step: int) -> bool:
        """Does this step (from 1) run both branches?"""
        return (self.cut_step is None or step < self.cut_step) and not self.min_scale == self.max_scale == 1

    def scales(self, num_frames: int) -> Tensor:
        """[t]: the scale of each frame."""
        return torch.linspace(self.min_scale, self.max_scale, num_frames)


def guided_denoiser(
    unet: nn.Module, image_embeds: Tensor, image_latent: Tensor, added_time_ids: Tensor, schedule: GuidanceSchedule
) -> Denoise:
    """D(x; sigma) of a UNet under a condition, with classifier-free guidance where the schedule says so.

    guided:  D = D_0 + scale (D_c - D_0), from one forward on both;   else:  D = D_c.
    D_0 has a zero embedding and a zero image latent, and keeps the numbers.

    image_embeds [b,1,c'], image_latent [b,4,h,w] unscaled, added_time_ids [b,3].
    """

    def both(x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x), x])

    def predict(x: Tensor, sigma: Tensor, embeds: Tensor, latent: Tensor, ids: Tensor) -> Tensor:
        c_skip, c_out, c_in, c_noise = preconditioning(sigma)
        frames = repeat(latent, "b c h w -> b t c h w", t=x.shape[1])
        sample = torch.cat([(c_in * x).to(latent.dtype), frames], dim=2)
        return c_skip * x + c_out * unet(sample, c_noise, embeds, ids).float()

    conditional = (image_embeds, image_latent, added_time_ids)
    pair = (both(image_embeds), both(image_latent), torch.cat([added_time_ids, added_time_ids]))

    def denoise(x: Tensor, sigma: Tensor, step: int) -> Tensor:
        if not schedule.guided(step):
            return predict(x, sigma, *conditional)
        d_0, d_c = predict(torch.cat([x, x]), sigma, *pair).chunk(2)
        scale = rearrange(schedule.scales(x.shape[1]).to(x.device), "t -> t 1 1 1")
        return d_0 + scale * (d_c - d_0)

    return denoise


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
