"""The autoencoder: an image encoder, and a decoder that mixes every spatial layer with its neighbours in time.

    image [b,3,H,W] -> encode -> latent mode [b,4,h,w]                       one image at a time, as in Stable Diffusion
    latents [b,t,4,h,w] -> decode -> frames [b,t,3,H,W]                      all frames of a video together

Axes: b batch, t frames, c channels, h w grid, g groups of channels, s = h*w tokens.

What differs from Stable Diffusion's VAE: after each residual block of the decoder comes a second one whose
kernels reach one frame back and one ahead, and a learned sigmoid blends the two (here its weight is on the
TEMPORAL branch). The forwards of the modules are the plain equations, on whole videos. `decode` computes the same in
little memory: spatial layers see frames one by one anyway, temporal ones places; only norms need all of a video.

Source: arXiv 2311.15127, appendix D; arXiv 2304.08818 (temporal decoder).
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from .attention import AlphaBlender
from .config import NUM_GROUPS, VAEConfig
from .unet import Upsample

SPATIAL_EPS, TEMPORAL_EPS = 1e-6, 1e-5
Advance = Callable[[], object]  # called when a residual block is done
# What decoding holds of a video: two activations, or one, which costs a second temporal convolution, or one on the host
Hold = Literal["two", "one", "host"]


def framewise(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply an image module to every frame: [b,t,c,h,w] -> [b,t,c',h',w']."""
    return rearrange(module(rearrange(x, "b t c h w -> (b t) c h w")), "(b t) c h w -> b t c h w", b=len(x))


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on the skip where the width changes."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(NUM_GROUPS, c_in, SPATIAL_EPS), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(NUM_GROUPS, c_out, SPATIAL_EPS), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:  # [b,c,h,w]
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return self.conv_shortcut(x) + h


class TemporalConv(nn.Conv3d):
    """A convolution of kernel 3x1x1 along time, zeros beyond the video's ends: [b,c,t,s] -> [b,c,t,s]. Computed as a 2D
    one over frames and places: the same sums, for which every device has a fast kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[..., 0], self.bias, padding=(1, 0))


class ResnetBlockOverTime(nn.Module):
    """The same equation along time: kernels 3x1x1, and each norm's statistics over all frames of a video."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(NUM_GROUPS, c, TEMPORAL_EPS), TemporalConv(c, c, (3, 1, 1))
        self.norm2, self.conv2 = nn.GroupNorm(NUM_GROUPS, c, TEMPORAL_EPS), TemporalConv(c, c, (3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:  # [b,c,t,s]
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class VideoResBlock(nn.Module):
    """Spatial residual block, then the temporal one, blended: a * temporal + (1 - a) * spatial."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.spatial_res_block = ResnetBlock(c_in, c_out)
        self.temporal_res_block = ResnetBlockOverTime(c_out)
        self.time_mixer = AlphaBlender(0.0)

    def forward(self, x: Tensor) -> Tensor:  # [b,t,c,h,w]
        space = rearrange(framewise(self.spatial_res_block, x), "b t c h w -> b c t (h w)")
        mixed = self.time_mixer(self.temporal_res_block(space), space)
        return rearrange(mixed, "b c t (h w) -> b t c h w", w=x.shape[-1])


class SpatialAttention(nn.Module):
    """One head of self-attention over a frame's tokens, with its norm and residual."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(NUM_GROUPS, c, SPATIAL_EPS)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.Sequential(nn.Linear(c, c))

    def forward(self, x: Tensor) -> Tensor:  # [b,c,h,w], or [b,t,c,h,w]
        tokens = rearrange(self.group_norm(x.flatten(0, -4)), "b c h w -> b 1 (h w) c")
        out = self.to_out(F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)))
        return x + rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[-2]).view_as(x)


class AsymmetricDownsample(nn.Sequential):
    """Halve the grid by a strided convolution that looks right and down: one row and column of zeros there."""

    conv: nn.Conv2d

    def __init__(self, c: int) -> None:
        super().__init__(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2)))


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
    """Three spatio-temporal residual blocks, then twice the grid, except at the outermost level."""

    def __init__(self, c_in: int, c_out: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([VideoResBlock(c, c_out) for c in (c_in, c_out, c_out)])
        self.upsamplers = nn.ModuleList([] if last else [Upsample(c_out)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for upsampler in self.upsamplers:
            x = framewise(upsampler, x)
        return x


class InnermostBlock(nn.Module):
    """Residual block, attention within each frame, residual block: of images [b,c,h,w], or videos [b,t,c,h,w]."""

    def __init__(self, c: int, block: type[ResnetBlock] | type[VideoResBlock]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([block(c, c), block(c, c)])
        self.attentions = nn.ModuleList([SpatialAttention(c)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Image [b,3,H,W] -> [b,2*latent_channels,h,w]: mean and log-variance, before `quant_conv`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        pairs, last = pairwise((widths[0], *widths)), len(widths) - 1
        self.down_blocks = nn.ModuleList(DownEncoderBlock(*ab, i == last) for i, ab in enumerate(pairs))
        self.mid_block = InnermostBlock(widths[-1], ResnetBlock)
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
        self.mid_block = InnermostBlock(widths[0], VideoResBlock)
        pairs, last = pairwise((widths[0], *widths)), len(widths) - 1
        self.up_blocks = nn.ModuleList(UpBlockTemporalDecoder(*ab, i == last) for i, ab in enumerate(pairs))
        self.conv_norm_out = nn.GroupNorm(NUM_GROUPS, widths[-1], SPATIAL_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)
        self.time_conv_out = nn.Conv3d(3, 3, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(framewise(self.conv_in, z))
        for block in self.up_blocks:
            x = block(x)
        return self.last(framewise(self.to_colours, x))

    def to_colours(self, x: Tensor) -> Tensor:  # [b,c,H,W] -> [b,3,H,W]
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def last(self, x: Tensor) -> Tensor:  # [b,t,3,H,W]
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
        """The mode of q(z | image): [b,3,H,W] in [-1,1] -> [b,4,H/8,W/8], NOT scaled. Computed in float32 whatever the
        weights' dtype: the released encoder's activations leave float16's range. Raises ValueError if the rank, the
        channels or the sides (multiples of `config.factor`) are wrong."""
        factor, shape = self.config.factor, tuple(image.shape)
        if image.ndim != 4 or shape[1] != 3 or shape[2] % factor or shape[3] % factor or 0 in shape:
            raise ValueError(f"image has shape {shape}; need [b,3,H,W] with H and W multiples of {factor}")
        h = in_float32(self.quant_conv, in_float32(self.encoder, image.float()))
        return h[:, : self.config.latent_channels].to(self.quant_conv.weight.dtype)

    def decode(
        self, latents: Tensor, chunk: int | None = None, hold: Hold = "two", callback: Advance | None = None
    ) -> Tensor:
        """Scaled latents [b,t,4,h,w] -> frames [b,t,3,8h,8w], about [-1,1]: decoder(latents / scaling_factor).

        `chunk` frames are in spatial work at a time, all by default, and `hold` says what is held of the video beside
        them: less memory, the same frames (to rounding). `callback` is called after each of the decoder's residual
        blocks. With gradients on, the plain forward runs: all is held, and the last three arguments say nothing.
        Raises ValueError for another rank or channel count, for chunk < 1 and for another `hold`.
        """
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[2] != channels:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; need [b,t,{channels},h,w]")
        if chunk is not None and chunk < 1:
            raise ValueError(f"decode chunk is {chunk}; need at least 1 frame")
        if hold not in get_args(Hold):
            raise ValueError(f"hold is {hold!r}; need one of {', '.join(get_args(Hold))}")
        z = latents.to(self.quant_conv.weight.dtype) / self.config.scaling_factor
        if torch.is_grad_enabled():
            return self.decoder(z)
        return Stream(self.decoder, chunk or latents.shape[1], hold, callback or (lambda: None))(z)


# --- decoding in little memory ----------------------------------------------------------------------------------------


class Stream:
    """The decoder's forward, exactly, on a video held as a list of frames [b,c,h,w], each replaced as it is used up.
    Spatial layers take `chunk` frames at a time. Temporal ones take a strip of rows of all frames, half a frame in all,
    in place: their kernels see one place at a time, their norms need statistics of the whole before the first value."""

    def __init__(self, decoder: TemporalDecoder, chunk: int, hold: Hold, advance: Advance) -> None:
        self.decoder, self.chunk, self.hold, self.advance = decoder, chunk, hold, advance

    def __call__(self, z: Tensor) -> Tensor:
        decoder, mid, self.device = self.decoder, self.decoder.mid_block, z.device
        self.store = torch.device("cpu") if self.hold == "host" else z.device
        self.layout = torch.channels_last if z.device.type == "cpu" else torch.preserve_format  # faster where measured
        frames = [frame.to(self.store) for frame in z.unbind(1)]
        self.spatial(decoder.conv_in, frames)
        self.both(nn.Identity(), mid.resnets[0], frames)
        self.both(mid.attentions[0], mid.resnets[1], frames)
        before: nn.Module = nn.Identity()
        for block in decoder.up_blocks:
            assert isinstance(block, UpBlockTemporalDecoder)
            for resnet in block.resnets:
                self.both(before, resnet, frames)
                before = nn.Identity()
            before = nn.Sequential(*block.upsamplers)
        self.spatial(decoder.to_colours, frames)
        return decoder.last(torch.stack([frame.to(self.device) for frame in frames], dim=1))

    def both(self, before: nn.Module, block: nn.Module, frames: list[Tensor]) -> None:
        """A block in space and time, after what comes `before` it: so an enlarged video never exists whole."""
        assert isinstance(block, VideoResBlock)
        self.spatial(nn.Sequential(before, block.spatial_res_block), frames)
        self.temporal(block.temporal_res_block, block.time_mixer.mix_factor.sigmoid(), frames)
        self.advance()

    def spatial(self, module: Callable[[Tensor], Tensor], frames: list[Tensor]) -> None:
        """frames <- module(frames)."""
        b = len(frames[0])
        for start in range(0, len(frames), self.chunk):
            part = torch.cat(frames[start : start + self.chunk]).to(self.device, memory_format=self.layout)
            frames[start : start + self.chunk] = module(part).to(self.store).split(b)

    def temporal(self, block: ResnetBlockOverTime, a: Tensor, frames: list[Tensor]) -> None:
        """frames <- a * block(frames) + (1 - a) * frames, that is frames + a * (block(frames) - frames)."""
        t, h = len(frames), frames[0].shape[2]
        rows = max(1, h // (2 * t))
        strips = [slice(start, start + rows) for start in range(0, h, rows)]
        norm1 = over_video(block.norm1, (frame.to(self.device)[:, :, None].flatten(3) for frame in frames))

        def hidden(strip: slice) -> Tensor:
            x = torch.stack([frame[:, :, strip].movedim(1, -1) for frame in frames], dim=1)  # [b,t,r,w,c]
            x = x.flatten(2, 3).movedim(-1, 1).to(self.device)  # [b,c,t,s]
            return block.conv1(F.silu(norm1(x), inplace=True))

        held = [hidden(strip) for strip in strips] if self.hold == "two" else []
        norm2 = over_video(block.norm2, held or map(hidden, strips))
        for strip in strips:
            x = held.pop(0) if held else hidden(strip)
            x = (a * block.conv2(F.silu(norm2(x), inplace=True))).unflatten(3, (-1, frames[0].shape[3])).to(self.store)
            for frame, change in zip(frames, x.unbind(2), strict=True):
                frame[:, :, strip] += change


def over_video(norm: nn.GroupNorm, parts: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """GroupNorm whose statistics are those of all parts [b,c,t,s] of a video together, as a scale and a shift. By the
    law of total variance: var(x) = E_i[var(x_i)] + var_i(E[x_i]), from mean and variance of each channel of a part."""
    moments, sizes, c = [], [], norm.num_channels // NUM_GROUPS
    for part in parts:
        x = part.float()
        mean = x.mean((2, 3), keepdim=True)  # with the next line several times as fast as torch.var_mean on a CPU
        moments.append(torch.stack([(x - mean).square_().mean((2, 3)), mean.flatten(1)]))
        sizes.append(part.shape[2] * part.shape[3])
    share = torch.tensor(sizes * c, dtype=torch.float32, device=moments[0].device) / sum(sizes) / c
    var, mean = rearrange(moments, "i m b (g c) -> m b g (c i)", g=NUM_GROUPS)
    total = (mean * share).sum(-1)
    std = ((var + (mean - total[..., None]).square()) * share).sum(-1).add(norm.eps).sqrt()
    scale = rearrange(norm.weight, "c -> 1 c 1 1") / repeat(std, "b g -> b (g c) 1 1", c=c)
    shift = rearrange(norm.bias, "c -> 1 c 1 1") - repeat(total, "b g -> b (g c) 1 1", c=c) * scale
    return lambda x: torch.addcmul(shift.to(x.dtype), x, scale.to(x.dtype))


def in_float32(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) with every parameter widened to float32 for this call."""
    return torch.func.functional_call(module, {k: p.float() for k, p in module.named_parameters()}, (x,))
