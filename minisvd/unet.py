"""READ SECOND. The U: down four levels, through the middle, up again, every block with a twin along time.

    sample [b,t,8,h,w] ─ conv_in ─┬─ down 0 ─────────── skips ──────────── up 3 ─┬─ conv_out ─ F [b,t,4,h,w]
                                  └─ down 1 ────────── skips ─────────── up 2 ─┘
                                      └─ down 2 ────── skips ─────── up 1 ─┘
                                          └─ down 3 ── skips ─── up 0 ─┘
                                                 └───── mid ─────┘

F is the raw network of EDM (arXiv 2206.00364, Eq. 7): sampler.py scales its input by c_in and turns its output into
denoised latents. What differs from Stable Diffusion's UNet: each residual block and each transformer is followed
by one that works along time, blended by a learned sigmoid (here its weight is on the SPATIAL branch); and three
numbers, fps - 1, motion bucket and noise augmentation, are embedded next to the noise level.

Axes as in attention.py; (b t) is a batch of frames, video by video. A block finds b as the length of its
conditions: `emb` [b, c_e], the embedded noise level and numbers, and `context`, what the block's transformers take of
the image's CLIP embedding.

Source: arXiv 2311.15127, appendix D; names as in the published `unet/` folders.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minisvd.attention import AlphaBlender, Context, SpatialTransformer, TimestepEmbedding, sinusoidal_embedding
from minisvd.config import NUM_GROUPS, UNetConfig, Vcut


class ResnetBlock2D(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + time_emb_proj(emb)))), frame by frame: [(b t),c,h,w]."""

    def __init__(self, c_in: int, c_out: int, c_emb: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(NUM_GROUPS, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_emb, c_out)
        self.norm2 = nn.GroupNorm(NUM_GROUPS, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        t = len(x) // len(emb)
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(emb).repeat_interleave(t, dim=0)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class TemporalResnetBlock(nn.Module):
    """The same equation along time: kernels 3x1x1, norms over all frames of a video: [b,c,t,h,w]."""

    def __init__(self, c: int, c_emb: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(NUM_GROUPS, c)
        self.conv1 = nn.Conv3d(c, c, (3, 1, 1), padding=(1, 0, 0))
        self.time_emb_proj = nn.Linear(c_emb, c)
        self.norm2 = nn.GroupNorm(NUM_GROUPS, c)
        self.conv2 = nn.Conv3d(c, c, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(emb)[:, :, None, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return x + h


class SpatioTemporalResBlock(nn.Module):
    """blend(space, time) with space = ResnetBlock2D(x) and time = TemporalResnetBlock(space): [(b t),c,h,w]."""

    def __init__(self, c_in: int, c_out: int, c_emb: int) -> None:
        super().__init__()
        self.spatial_res_block = ResnetBlock2D(c_in, c_out, c_emb)
        self.temporal_res_block = TemporalResnetBlock(c_out, c_emb)
        self.time_mixer = AlphaBlender(0.5)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        space = rearrange(self.spatial_res_block(x, emb), "(b t) c h w -> b c t h w", b=len(emb))
        return rearrange(self.time_mixer(space, self.temporal_res_block(space, emb)), "b c t h w -> (b t) c h w")


class NoTransformer(nn.Module):
    """Stands where a level has no transformer: x -> x."""

    def condition(self, _context: Tensor) -> Context:
        return ()

    def forward(self, x: Tensor, _context: Context) -> Tensor:
        return x


class Downsample(nn.Module):
    """Half the grid, by a strided convolution."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the grid: each cell repeated, then a convolution."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def transformers(config: UNetConfig, vcut: Vcut, level: int, depth: int) -> nn.ModuleList:
    """What follows each of a level's `depth` residual blocks."""
    c, heads = config.block_out_channels[level], config.num_attention_heads[level]
    with_attention = config.attention[level]
    return nn.ModuleList(
        SpatialTransformer(c, heads, config.cross_attention_dim, vcut) if with_attention else NoTransformer()
        for _ in range(depth)
    )


class DownBlock(nn.Module):
    """A level on the way down: (residual block, transformer) twice, then half the grid, except at the innermost."""

    def __init__(self, config: UNetConfig, vcut: Vcut, level: int, c_in: int, c_emb: int) -> None:
        super().__init__()
        c, depth, innermost = config.block_out_channels[level], config.layers_per_block, len(config.attention) - 1
        widths_in = [c_in] + [c] * (depth - 1)
        self.resnets = nn.ModuleList(SpatioTemporalResBlock(width, c, c_emb) for width in widths_in)
        self.attentions = transformers(config, vcut, level, depth)
        self.downsamplers = nn.ModuleList([Downsample(c)] * (level < innermost))

    def forward(self, x: Tensor, emb: Tensor, contexts: list[Context]) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for resnet, attention, context in zip(self.resnets, self.attentions, contexts, strict=True):
            x = attention(resnet(x, emb), context)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """The bottom of the U: residual block, transformer, residual block."""

    def __init__(self, config: UNetConfig, vcut: Vcut, c_emb: int) -> None:
        super().__init__()
        c, heads = config.block_out_channels[-1], config.num_attention_heads[-1]
        self.resnets = nn.ModuleList(SpatioTemporalResBlock(c, c, c_emb) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(c, heads, config.cross_attention_dim, vcut)])

    def forward(self, x: Tensor, emb: Tensor, contexts: list[Context]) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, emb), contexts[0])
        return self.resnets[1](x, emb)


class UpBlock(nn.Module):
    """A level on the way up: (take a skip, residual block, transformer) three times, then twice the grid,
    except at the outermost. The last skip is what entered the level on the way down."""

    def __init__(self, config: UNetConfig, vcut: Vcut, level: int, c_in: int, c_skip: int, c_emb: int) -> None:
        super().__init__()
        c, depth = config.block_out_channels[level], config.layers_per_block + 1
        widths_in = [c_in + c] + [c + c] * (depth - 2) + [c + c_skip]
        self.resnets = nn.ModuleList(SpatioTemporalResBlock(width, c, c_emb) for width in widths_in)
        self.attentions = transformers(config, vcut, level, depth)
        self.upsamplers = nn.ModuleList([Upsample(c)] * (level > 0))

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor, contexts: list[Context]) -> Tensor:
        for resnet, attention, context in zip(self.resnets, self.attentions, contexts, strict=True):
            x = torch.cat([x, skips.pop()], dim=1)
            x = attention(resnet(x, emb), context)
        for upsampler in self.upsamplers:
            x = upsampler(x)
        return x


class SpatioTemporalUNet(nn.Module):
    """F(c_in * x, c_noise; image, numbers): the network of Stable Video Diffusion.

    sample          [b, t, 8, h, w]   4 noisy channels, scaled by c_in, then the image's latent, the same in every frame
    c_noise         [b] or scalar     0.25 ln(sigma)
    image_embeds    [b, 1, 1024]      CLIP embedding of the image
    added_time_ids  [b, 3]            fps - 1, motion bucket, noise augmentation
    returns         [b, t, 4, h, w]

    `vcut` chooses the class of every transformer block (attention.BLOCKS), once, here:
    False       as released: 1,524,623,082 parameters at full size
    "lossless"  every cross-attention a `CachedCondLinear`; the same function; 1,449,452,522
    True        those within frames a `CachedCondLinear`, those along time omitted; arXiv 2407.19205; 1,436,660,522

    h and w are multiples of `config.stride`. Rows of a batch never mix. Everything runs in the weights' dtype but
    the sinusoidal embeddings, which are float32.
    """

    def __init__(self, config: UNetConfig, vcut: Vcut = False) -> None:
        super().__init__()
        self.config, self.vcut = config, vcut
        widths, levels = config.block_out_channels, range(len(config.block_out_channels))
        c_emb, c_ids = 4 * widths[0], 3 * config.addition_time_embed_dim
        outer = (widths[0], *widths)  # outer[level]: the width that enters the level on the way down
        self.time_embedding = TimestepEmbedding(widths[0], c_emb, c_emb)
        self.add_embedding = TimestepEmbedding(c_ids, c_emb, c_emb)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(DownBlock(config, vcut, level, outer[level], c_emb) for level in levels)
        self.mid_block = MidBlock(config, vcut, c_emb)
        inner = (*widths[1:], widths[-1])  # inner[level]: the width that comes up into it
        self.up_blocks = nn.ModuleList(
            UpBlock(config, vcut, level, inner[level], outer[level], c_emb) for level in reversed(levels)
        )
        self.conv_norm_out = nn.GroupNorm(NUM_GROUPS, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def condition(self, image_embeds: Tensor) -> list[list[Context]]:
        """All that the network will ever ask of the embedding [b, 1, c'], block by block: once per video.

        The caller owns the result; the network keeps nothing, so that two videos in turn cannot meet.
        """
        blocks: list[Any] = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [[attention.condition(image_embeds) for attention in block.attentions] for block in blocks]

    def forward(self, sample: Tensor, c_noise: Tensor, image_embeds: Tensor, added_time_ids: Tensor) -> Tensor:
        return self.denoise(sample, c_noise, self.condition(image_embeds), added_time_ids)

    def denoise(self, sample: Tensor, c_noise: Tensor, contexts: list[list[Context]], added_time_ids: Tensor) -> Tensor:
        """`forward` with the embedding's part computed before, by `condition`."""
        b = len(sample)
        noise_level = sinusoidal_embedding(c_noise.expand(b), self.config.block_out_channels[0])
        numbers = sinusoidal_embedding(added_time_ids, self.config.addition_time_embed_dim)
        emb = self.time_embedding(noise_level) + self.add_embedding(rearrange(numbers, "b i c -> b (i c)", i=3))
        emb = F.silu(emb)  # every residual block projects it after this

        x = self.conv_in(rearrange(sample, "b t c h w -> (b t) c h w", c=self.config.in_channels))
        context, skips = iter(contexts), [x]
        for block in self.down_blocks:
            x, more = block(x, emb, next(context))
            skips += more
        x = self.mid_block(x, emb, next(context))
        for block in self.up_blocks:
            x = block(x, skips, emb, next(context))
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return rearrange(x, "(b t) c h w -> b t c h w", b=b)
