"""ETC: a video by a network for images alone. The frames lie side by side as ONE image, a grid, for the U of unet.py
without its layers along time: attention sees all frames at once, and hears the 77 keys of a sentence.

    ids [b,77] ─ TextEncoder ─ text [b,77,1024] ───────────┐
    video [b,t,4,h,w] ─ to_grid, + mixed_embedding ─ the U ┴─ to_frames ─ v [b,t,4,h,w]

What differs from Stable Diffusion 2.1, whose weights it takes: the grid, an embedding of each cell's place and frame,
and an embedding of the frames per second, which changes nothing at first. Against SVD: no temporal layer, no image.
Axes as in attention.py; a grid has rows and cols of frames, in reading order.

Source: "ETC" (OpenReview 0lVQBMhsPG); no code of it was found. Where it errs, a docstring says what holds.
"""

from dataclasses import replace
from functools import cache, partial
from math import isqrt

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from .attention import CROSS, BasicTransformerBlock, sinusoidal_embedding
from .config import NUM_GROUPS, Setting, UNetConfig, Vcut
from .sampler import Denoise, preconditioning
from .unet import Conditions, ResnetBlock2D, SpatioTemporalUNet
from .vae import in_float32

SD21 = UNetConfig(in_channels=4, num_time_ids=1)  # Stable Diffusion 2.1's; the one number is the fps


def grid_shape(t: int) -> tuple[int, int]:
    """(rows, cols) of t frames: rows * cols = t, as near to a square as t allows, no more rows than columns."""
    rows = max(n for n in range(1, isqrt(t) + 1) if t % n == 0)
    return rows, t // rows


def to_grid(video: Tensor) -> Tensor:
    """Frames in reading order as one image (Eq. 1, by rows, as Eq. 3 has it): [b,t,c,h,w] -> [b,c,rows*h,cols*w]."""
    rows, _ = grid_shape(video.shape[1])
    return rearrange(video, "b (rows cols) c h w -> b c (rows h) (cols w)", rows=rows)


def to_frames(grid: Tensor, t: int) -> Tensor:
    """`to_grid` undone: [b,c,rows*h,cols*w] -> [b,t,c,h,w]."""
    rows, cols = grid_shape(t)
    return rearrange(grid, "b c (rows h) (cols w) -> b (rows cols) c h w", rows=rows, cols=cols)


def mixed_embedding(t: int, c: int, h: int, w: int, device: torch.device | None = None) -> Tensor:
    """Where and when a cell is (Eq. 20, 21, 25), [t,c,h,w] in float32, c even; no two cells are alike.

    sin(y / theta_k) + cos(x / theta_k) for k < c/2, and sin(n / theta_k) + cos(n / theta_k) in the other half, with
    theta_k = 10000^(k/c): row y and column x inside the frame, number n of the frame. The paper's Algorithm 1 takes a
    remainder where Eq. 21 takes a floor, and with it frames above each other would be alike; the equations hold here.
    """
    theta = 10000 ** (torch.arange(c // 2, device=device) / c)
    n, y, x = (torch.arange(size, device=device)[:, None] / theta for size in (t, h, w))
    place = rearrange(y.sin(), "h c -> c h 1") + rearrange(x.cos(), "w c -> c 1 w")
    time = repeat(n.sin() + n.cos(), "t c -> t c h w", h=h, w=w)
    return torch.cat([place.expand(t, -1, -1, -1), time], dim=1)


class FPSEmbedding(nn.Sequential):
    """Three layers, c to 4c to 4c to c with silu between, on the embedded frames per second. The last one starts at
    zero: a network that never heard of fps stays what it is."""

    def __init__(self, c: int) -> None:
        super().__init__(nn.Linear(c, 4 * c), nn.SiLU(), nn.Linear(4 * c, 4 * c), nn.SiLU(), nn.Linear(4 * c, c))
        for parameter in self[-1].parameters():
            nn.init.zeros_(parameter)


class SpatialTransformer(nn.Module):
    """x + proj_out(block(proj_in(norm(x)))) over all tokens of a grid: [b,c,h,w] -> the same."""

    def __init__(self, c: int, num_heads: int, c_context: int, vcut: Vcut) -> None:
        super().__init__()
        self.norm, self.proj_in = nn.GroupNorm(NUM_GROUPS, c, eps=1e-6), nn.Linear(c, c)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(c, num_heads, c_context, CROSS[vcut][0])])
        self.proj_out = nn.Linear(c, c)

    def condition(self, context: Tensor) -> tuple[Tensor]:
        """The keys [b,1,k,c'] as they are: many of them are no linear map."""
        return (context,)

    def forward(self, x: Tensor, conditions: tuple[Tensor], _b: int) -> Tensor:
        tokens = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        tokens = self.transformer_blocks[0](tokens, conditions[0].flatten(0, 1))
        return x + rearrange(self.proj_out(tokens), "b (h w) c -> b c h w", h=x.shape[2])


class SpatialUNet(SpatioTemporalUNet):
    """v = sqrt(a) noise - sqrt(1 - a) x_0, predicted for all frames as one image (v-prediction, arXiv 2202.00512).

    video     [b, t, 4, h, w]  noisy latents, encoded frame by frame, of variance 1
    timestep  scalar or [b]    0 to 999
    text      [b, k, 1024]     what the text encoder makes of a caption, k = 77
    fps       scalar or [b]    frames per second; 120: one image t times; 0: t images of one kind
    returns   [b, t, 4, h, w]

    Timestep and fps go through one `time_embedding` E: emb = E(timestep) + fps_embedding(E(fps)). `mixed=False` leaves
    out the mixed embedding, which is added, and met by the first convolution, in float32: bfloat16 would lose it.
    The U's walk is inherited; `conditions` as there. Raises ValueError, with all sizes, where they do not agree.
    """

    def __init__(self, config: UNetConfig = SD21, mixed: bool = True) -> None:
        super().__init__(replace(config, num_time_ids=1, vcut=False), layers=(ResnetBlock2D, SpatialTransformer))
        del self.add_embedding
        self.fps_embedding, self.mixed = FPSEmbedding(4 * config.block_out_channels[0]), float(mixed)

    def embed(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, video: Tensor, timestep: Tensor, text: Tensor, fps: Tensor, conditions: Conditions = ()
    ) -> tuple[Tensor, Tensor, Conditions]:  # in the comments, 16 frames of 256x256: video [1,16,4,32,32]
        """x, the grid after conv_in; emb [b,1,c_e], after the silu that every block would apply; conditions."""
        config, m, given = self.config, self.config.stride, (video, timestep, text, fps)
        try:
            b, t, c, h, w = video.shape
            rearrange(video, "b t c (h m) (w n) -> b t c h m w n", c=config.in_channels, m=m, n=m)
            text.expand(b, -1, config.cross_attention_dim)
            level, rate = (torch.as_tensor(each, device=video.device).reshape(-1).expand(b) for each in (timestep, fps))
        except (RuntimeError, ValueError) as error:
            sizes = ", ".join(f"{list(torch.as_tensor(each).shape)}" for each in given)
            need = f"[b, t, {config.in_channels}, h, w] with h and w multiples of {m}, one timestep and fps"
            need += f" or b of them, and [b, k, {config.cross_attention_dim}]"
            raise ValueError(f"video, timestep, text, fps do not agree: {sizes}; need {need}") from error
        dtype, width = self.conv_in.weight.dtype, config.block_out_channels[0]
        x = to_grid(video.float() + self.mixed * mixed_embedding(t, c, h, w, video.device))  # [1,4,128,128]
        e_t, e_fps = (self.time_embedding(sinusoidal_embedding(n, width).to(dtype)) for n in (level, rate))
        emb = F.silu(e_t + self.fps_embedding(e_fps))[:, None]  # [1,1,1280]
        return in_float32(self.conv_in, x).to(dtype), emb, conditions or self.condition(text[:, None])

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, video: Tensor, timestep: Tensor, text: Tensor, fps: Tensor, conditions: Conditions = ()
    ) -> Tensor:
        x, emb, conditions = self.embed(video, timestep, text, fps, conditions)
        x, skips = self.down(x, emb, conditions)
        v = self.up(self.middle(x, emb, conditions), skips, emb, conditions)  # [1,1,4,128,128]: a video of one frame
        return to_frames(v[:, 0], video.shape[1])


def sd_sigmas() -> Tensor:
    """Stable Diffusion's noise levels by timestep, [1000], rising from 0.029167 to 14.614641: sqrt((1 - a) / a) with a
    the product of 1 - beta so far, sqrt(beta) linear from sqrt(0.00085) to sqrt(0.012)."""
    a = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64, device="cpu") ** 2).cumprod(0)
    return ((1 - a) / a).sqrt().float()


def ddim_sigmas(n: int) -> Tensor:
    """The levels [n+1] of n steps of DDIM as diffusers takes them ("leading", offset 1): at timesteps 1 + i (1000 // n)
    from the last i down, then the first level of all, not 0. Raises ValueError for n < 1 or n > 999."""
    n = Setting(True, 1, 999, why=", as the model knows 1000 noise levels").check("number of steps", n)
    levels = sd_sigmas()
    return torch.cat([levels[1 + torch.arange(n - 1, -1, -1, device="cpu") * (1000 // n)], levels[:1]])


def text_denoiser(unet: SpatialUNet, text: Tensor, empty: Tensor, fps: float, scale: float = 7.0) -> Denoise:
    """D(x; sigma) = c_skip x + c_out v with v = v_0 + scale (v_c - v_0), from one forward on the empty caption's text
    [1,k,c'] and the caption's [b,k,c']. The network is told the timestep whose level is nearest to sigma.

    `sample_euler` then makes what DDIM makes, times sqrt(1 + s^2) where s is the last level.
    """
    both, levels = torch.cat([empty.expand_as(text), text]), sd_sigmas().to(text.device)
    conditions = cache(partial(unet.condition, both[:, None]))

    def denoised(x: Tensor, sigma: Tensor, _step: int) -> Tensor:
        c_skip, c_out, c_in, _ = preconditioning(sigma)
        timestep = (levels - sigma).abs().argmin()
        v_0, v_c = unet(torch.cat([c_in * x] * 2), timestep, both, torch.tensor(fps), conditions()).float().chunk(2)
        return c_skip * x + c_out * (v_0 + scale * (v_c - v_0))

    return denoised
