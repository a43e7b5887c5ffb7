"""The autoencoder: an image encoder, and a decoder that mixes every spatial layer with its neighbours in time.

    image [b,3,H,W] -> encode -> latent mode [b,4,h,w]                       one image at a time, as in Stable Diffusion
    latents [b,t,4,h,w] -> decode -> frames [b,t,3,H,W]                      all frames of a video together

Axes: b batch, t frames, c channels, h w grid, g groups of channels, s = h*w tokens.

What differs from Stable Diffusion's VAE: after each residual block of the decoder comes a second one whose
kernels reach one frame back and one ahead, and a learned sigmoid blends the two (here its weight is on the
TEMPORAL branch). Decoding in chunks bounds memory and changes nothing: spatial layers see frames one by one
anyway; temporal ones get the frame beyond each chunk's edge, and norms their statistics over all frames.

Source: arXiv 2311.15127, appendix D; arXiv 2304.08818 (temporal decoder).
"""

from collections.abc import Iterator
from itertools import chain, pairwise

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from .attention import AlphaBlender
from .config import NUM_GROUPS, VAEConfig
from .unet import Upsample

SPATIAL_EPS, TEMPORAL_EPS = 1e-6, 1e-5


def framewise(module: nn.Module, x: Tensor, chunk: int) -> Tensor:
    """Apply an image module to `chunk` frames at a time: [b,t,c,h,w] -> [b,t,c',h',w']."""
    frames = rearrange(x, "b t c h w -> (b t) c h w")
    out = joined((module(part) for part in frames.split(chunk)), len(frames), dim=0)
    return rearrange(out, "(b t) c h w -> b t c h w", b=len(x))


def joined(parts: Iterator[Tensor], length: int, dim: int) -> Tensor:
    """torch.cat of parts that are made one at a time: at no moment are all of them held beside the whole."""
    first = next(parts)
    if first.shape[dim] == length:
        return first
    whole, start = first.new_empty([*first.shape[:dim], length, *first.shape[dim + 1 :]]), 0
    for part in chain([first], parts):
        whole.narrow(dim, start, part.shape[dim]).copy_(part)
        start += part.shape[dim]
    return whole


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on the skip where the width changes."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(NUM_GROUPS, c_in, SPATIAL_EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(NUM_GROUPS, c_out, SPATIAL_EPS)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:  # [b,c,h,w]
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class TemporalConv(nn.Conv3d):
    """A convolution of kernel 3x1x1 along time, which two frames beyond the result's ends must surround.

    Computed as a 2D one, row by row: the same sums, for which every device has a fast kernel.
    """

    def forward(self, x: Tensor) -> Tensor:  # [b,t+2,c,h,w] -> [b,t,c,h,w]
        h = F.conv2d(rearrange(x, "b t c h w -> (b h) c t w"), self.weight[..., 0], self.bias)
        return rearrange(h, "(b h) c t w -> b t c h w", b=len(x))


class ResnetBlockOverTime(nn.Module):
    """The same equation along time: kernels 3x1x1, and each norm's statistics over all frames of a video."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(NUM_GROUPS, c, TEMPORAL_EPS)
        self.conv1 = TemporalConv(c, c, (3, 1, 1))
        self.norm2 = nn.GroupNorm(NUM_GROUPS, c, TEMPORAL_EPS)
        self.conv2 = TemporalConv(c, c, (3, 1, 1))

    def forward(self, x: Tensor, chunk: int) -> Tensor:  # [b,t,c,h,w]
        h = norm_silu_conv(self.norm1, self.conv1, x, chunk)
        h = norm_silu_conv(self.norm2, self.conv2, h, chunk)
        return h.add_(x)  # in place: at full size each of these is gigabytes


def norm_silu_conv(norm: nn.GroupNorm, conv: TemporalConv, x: Tensor, chunk: int) -> Tensor:
    """conv(silu(norm(x))) over time, [b,t,c,h,w] -> [b,t,c,h,w], computed `chunk` frames at a time, exactly."""
    t, (scale, shift) = x.shape[1], norm_over_frames(norm, x, chunk)

    def part(start: int, stop: int) -> Tensor:
        h = F.silu(x[:, max(start - 1, 0) : stop + 1] * scale + shift)  # one frame more on either side, if there is
        h = F.pad(h, (0, 0) * 3 + (int(start == 0), int(stop == t)))  # beyond the video's ends: zeros
        return conv(h)

    return joined((part(start, min(start + chunk, t)) for start in range(0, t, chunk)), t, dim=1)


def norm_over_frames(norm: nn.GroupNorm, x: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """GroupNorm over [t, c/g, h, w] as a scale and a shift [b,1,c,1,1], so that norm(x) = x * scale + shift.

    By the law of total variance: var(x) = E_t[var(x_t)] + var_t(E[x_t]), from each frame's own mean and variance.
    """
    groups = (rearrange(part, "b t (g c) h w -> b t g (c h w)", g=NUM_GROUPS) for part in x.split(chunk, dim=1))
    moments = [var_mean(part.float()) for part in groups]
    var, mean = (torch.cat(parts, dim=1) for parts in zip(*moments, strict=True))  # [b,t,g] each
    std = (var.mean(1) + mean.var(1, correction=0) + norm.eps).sqrt()
    c = norm.num_channels // NUM_GROUPS
    weight, bias = (rearrange(p, "c -> 1 1 c 1 1") for p in (norm.weight, norm.bias))
    scale = weight / repeat(std, "b g -> b 1 (g c) 1 1", c=c)
    shift = bias - repeat(mean.mean(1), "b g -> b 1 (g c) 1 1", c=c) * scale
    return scale.to(x.dtype), shift.to(x.dtype)


def var_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean over the last axis; several times as fast as torch.var_mean on a CPU."""
    mean = x.mean(-1, keepdim=True)
    return (x - mean).square_().mean(-1), mean.squeeze(-1)


class VideoResBlock(nn.Module):
    """Spatial residual block, then the temporal one, blended: a * temporal + (1 - a) * spatial."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.spatial_res_block = ResnetBlock(c_in, c_out)
        self.temporal_res_block = ResnetBlockOverTime(c_out)
        self.time_mixer = AlphaBlender(0.0)

    def forward(self, x: Tensor, chunk: int) -> Tensor:  # [b,t,c,h,w]
        spatial = framewise(self.spatial_res_block, x, chunk)
        return self.time_mixer(self.temporal_res_block(spatial, chunk), spatial)


class SpatialAttention(nn.Module):
    """One head of self-attention over the grid's tokens, with its norm and residual."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(NUM_GROUPS, c, SPATIAL_EPS)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.Sequential(nn.Linear(c, c))

    def forward(self, x: Tensor) -> Tensor:  # [b,c,h,w]
        tokens = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        out = self.to_out(F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)))
        return x + rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2])


class AsymmetricDownsample(nn.Module):
    """Halve the grid by a strided convolution that looks right and down: one row and column of zeros there."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class DownEncoderBlock(nn.Module):
    """Two residual blocks, then half the grid, except at the innermost level."""

    def __init__(self, c_in: int, c_out: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c_in, c_out), ResnetBlock(c_out, c_out)])
        self.downsamplers = nn.ModuleList([] if last else [AsymmetricDownsample(c_out)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlockTemporalDecoder(nn.Module):
    """Three spatio-temporal residual blocks, then twice the grid, except at the outermost level.

    The decoder walks through them itself: a forward here would keep the block's input, gigabytes, to its end.
    """

    def __init__(self, c_in: int, c_out: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([VideoResBlock(c, c_out) for c in (c_in, c_out, c_out)])
        self.upsamplers = nn.ModuleList([] if last else [Upsample(c_out)])


class MidBlockEncoder(nn.Module):
    """Residual block, attention, residual block, at the innermost level of the encoder."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c, c), ResnetBlock(c, c)])
        self.attentions = nn.ModuleList([SpatialAttention(c)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class MidBlockTemporalDecoder(nn.Module):
    """The decoder's: its residual blocks are spatio-temporal, its attention is within a frame."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([VideoResBlock(c, c), VideoResBlock(c, c)])
        self.attentions = nn.ModuleList([SpatialAttention(c)])

    def forward(self, x: Tensor, chunk: int) -> Tensor:
        x = self.resnets[0](x, chunk)
        return self.resnets[1](framewise(self.attentions[0], x, chunk), chunk)


class Encoder(nn.Module):
    """Image [b,3,H,W] -> [b,2*latent_channels,h,w]: mean and log-variance, before `quant_conv`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        pairs, last = pairwise((widths[0], *widths)), len(widths) - 1
        self.down_blocks = nn.ModuleList(DownEncoderBlock(*ab, i == last) for i, ab in enumerate(pairs))
        self.mid_block = MidBlockEncoder(widths[-1])
        self.conv_norm_out = nn.GroupNorm(NUM_GROUPS, widths[-1], SPATIAL_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class TemporalDecoder(nn.Module):
    """Latents [b,t,latent_channels,h,w], unscaled -> frames [b,t,3,H,W]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlockTemporalDecoder(widths[0])
        pairs, last = pairwise((widths[0], *widths)), len(widths) - 1
        self.up_blocks = nn.ModuleList(UpBlockTemporalDecoder(*ab, i == last) for i, ab in enumerate(pairs))
        self.conv_norm_out = nn.GroupNorm(NUM_GROUPS, widths[-1], SPATIAL_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)
        self.time_conv_out = nn.Conv3d(3, 3, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, z: Tensor, chunk: int) -> Tensor:
        x = self.mid_block(framewise(self.conv_in, z, chunk), chunk)
        for block in self.up_blocks:
            assert isinstance(block, UpBlockTemporalDecoder)
            for resnet in block.resnets:
                x = resnet(x, chunk)
            for upsampler in block.upsamplers:
                x = framewise(upsampler, x, chunk)
        x = framewise(nn.Sequential(self.conv_norm_out, nn.SiLU(), self.conv_out), x, chunk)
        return rearrange(self.time_conv_out(rearrange(x, "b t c h w -> b c t h w")), "b c t h w -> b t c h w")


class AutoencoderKLTemporalDecoder(nn.Module):
    """Encoder and temporal decoder; parameter names are those of the published `vae/` folders."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.decoder = TemporalDecoder(config)

    def encode(self, image: Tensor) -> Tensor:
        """The mode of q(z | image): [b,3,H,W] in [-1,1] -> [b,4,H/8,W/8], NOT scaled.

        Computed in float32 whatever the weights' dtype: the released encoder's activations leave float16's range.
        Raises ValueError if the rank, the channels or the sides (multiples of `config.factor`) are wrong.
        """
        factor, shape = self.config.factor, tuple(image.shape)
        if image.ndim != 4 or shape[1] != 3 or shape[2] % factor or shape[3] % factor or 0 in shape:
            raise ValueError(f"image has shape {shape}; need [b,3,H,W] with H and W multiples of {factor}")
        h = in_float32(self.quant_conv, in_float32(self.encoder, image.float()))
        return h[:, : self.config.latent_channels].to(self.quant_conv.weight.dtype)

    def decode(self, latents: Tensor, chunk: int | None = None) -> Tensor:
        """Scaled latents [b,t,4,h,w] -> frames [b,t,3,8h,8w], about [-1,1]: decoder(latents / scaling_factor).

        `chunk` frames are in work at a time, all by default: less memory, the same frames (to rounding).
        Raises ValueError for another rank or channel count, and for chunk < 1.
        """
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[2] != channels:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; need [b,t,{channels},h,w]")
        if chunk is not None and chunk < 1:
            raise ValueError(f"decode chunk is {chunk}; need at least 1 frame")
        z = latents.to(self.quant_conv.weight.dtype) / self.config.scaling_factor
        return self.decoder(z, chunk or latents.shape[1])


def in_float32(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) with every parameter widened to float32 for this call."""
    return torch.func.functional_call(module, {k: p.float() for k, p in module.named_parameters()}, (x,))
