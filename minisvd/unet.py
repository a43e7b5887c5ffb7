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

Axes as in attention.py; (b t) is a batch of frames, video by video. A block finds b as the length of `emb` [b, f, c_e],
the embedded noise level and numbers; f is 1, or t where they differ from frame to frame.

Source: arXiv 2311.15127, appendix D; names as in the published `unet/` folders.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from .attention import KEYS, AlphaBlender, SpatioTemporalTransformer, TimestepEmbedding, sinusoidal_embedding
from .config import NUM_GROUPS, UNetConfig, Vcut

Conditions = Sequence[list[tuple[Tensor, ...]]]  # of each block in turn: what its transformers take of the embedding


class ResnetBlock2D(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + time_emb_proj(emb)))), frame by frame: [(b t),c,h,w].

    The norms' eps is 1e-5, as trained. diffusers runs 18 of the 22 residual blocks at 1e-6.
    """

    def __init__(self, c_in: int, c_out: int, c_emb: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(NUM_GROUPS, c_in, eps=1e-5), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_emb, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(NUM_GROUPS, c_out, eps=1e-5), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + repeat(self.time_emb_proj(emb.flatten(0, 1)), "b c -> (b r) c 1 1", r=x.shape[0] // emb[..., 0].numel())
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class TemporalResnetBlock(nn.Module):
    """The same equation along time: kernels 3x1x1, norms over all frames of a video: [b,c,t,h,w]."""

    def __init__(self, c: int, c_emb: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(NUM_GROUPS, c, eps=1e-5), nn.Conv3d(c, c, (3, 1, 1), padding=(1, 0, 0))
        self.time_emb_proj = nn.Linear(c_emb, c)
        self.norm2, self.conv2 = nn.GroupNorm(NUM_GROUPS, c, eps=1e-5), nn.Conv3d(c, c, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + rearrange(self.time_emb_proj(emb), "b f c -> b c f 1 1")
        return x + self.conv2(F.silu(self.norm2(h)))


class SpatioTemporalResBlock(nn.Module):
    """blend(space, time) with space = ResnetBlock2D(x) and time = TemporalResnetBlock(space): [(b t),c,h,w]."""

    def __init__(self, c_in: int, c_out: int, c_emb: int) -> None:
        super().__init__()
        self.spatial_res_block = ResnetBlock2D(c_in, c_out, c_emb)
        self.temporal_res_block = TemporalResnetBlock(c_out, c_emb)
        self.time_mixer = AlphaBlender(0.5)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        space = rearrange(self.spatial_res_block(x, emb), "(b t) c h w -> b c t h w", b=emb.shape[0])
        return rearrange(self.time_mixer(space, self.temporal_res_block(space, emb)), "b c t h w -> (b t) c h w")


class Upsample(nn.Sequential):
    """Twice the grid: each cell repeated, then a convolution."""

    def __init__(self, c: int) -> None:
        super().__init__(OrderedDict(twice=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(c, c, 3, padding=1)))


class NoTransformer(nn.Identity):
    """x: stands where a level has no transformers."""

    def condition(self, _context: Tensor) -> tuple[Tensor, ...]:
        return ()

    def forward(self, x: Tensor, *_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x


LAYERS: tuple[Any, Any] = SpatioTemporalResBlock, SpatioTemporalTransformer  # of this U; etc.py has one of others


def transformers(config: UNetConfig, level: int, depth: int, transformer: Any) -> nn.ModuleList:
    """What follows each of a level's `depth` residual blocks."""
    sizes = config.block_out_channels[level], config.num_attention_heads[level], config.cross_attention_dim
    kind = (NoTransformer, transformer)[config.attention[level]]
    return nn.ModuleList(kind(*sizes, config.vcut) for _ in range(depth))


class DownBlock(nn.Module):
    """A level on the way down: (residual block, transformer) twice, then half the grid."""

    def __init__(self, config: UNetConfig, level: int, layers: tuple[Any, Any] = LAYERS) -> None:
        super().__init__()
        widths, depth = config.block_out_channels, config.layers_per_block
        c, above = widths[level], (widths[0], *widths)[level]
        widths_in = [above] + [c] * (depth - 1)
        self.resnets = nn.ModuleList(layers[0](c_in, c, 4 * widths[0]) for c_in in widths_in)
        self.attentions = transformers(config, level, depth, layers[1])
        self.downsamplers = nn.ModuleList([nn.Sequential(OrderedDict(conv=nn.Conv2d(c, c, 3, stride=2, padding=1)))])

    def forward(self, x: Tensor, emb: Tensor, conditions: list[tuple[Tensor, ...]]) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for resnet, attention, condition in zip(self.resnets, self.attentions, conditions, strict=True):
            x = attention(resnet(x, emb), condition, emb.shape[0])
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """The bottom of the U: residual block, transformer, residual block."""

    def __init__(self, config: UNetConfig, layers: tuple[Any, Any] = LAYERS) -> None:
        super().__init__()
        c, c_emb = config.block_out_channels[-1], 4 * config.block_out_channels[0]
        sizes = c, config.num_attention_heads[-1], config.cross_attention_dim
        self.resnets = nn.ModuleList(layers[0](c, c, c_emb) for _ in range(2))
        self.attentions = nn.ModuleList([layers[1](*sizes, config.vcut)])

    def forward(self, x: Tensor, emb: Tensor, conditions: list[tuple[Tensor, ...]]) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, emb), conditions[0], emb.shape[0])
        return self.resnets[1](x, emb)


class UpBlock(nn.Module):
    """A level on the way up: (take a skip, residual block, transformer) three times, then twice the grid.
    The last skip is what entered the level on the way down."""

    def __init__(self, config: UNetConfig, level: int, layers: tuple[Any, Any] = LAYERS) -> None:
        super().__init__()
        widths, depth = config.block_out_channels, config.layers_per_block + 1
        c, above, below = widths[level], (widths[0], *widths)[level], (*widths, widths[-1])[level + 1]
        widths_in = [below + c] + [c + c] * (depth - 2) + [c + above]
        self.resnets = nn.ModuleList(layers[0](c_in, c, 4 * widths[0]) for c_in in widths_in)
        self.attentions = transformers(config, level, depth, layers[1])
        self.upsamplers = nn.ModuleList([Upsample(c)])

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor, conditions: list[tuple[Tensor, ...]]) -> Tensor:
        layers = zip(skips[::-1], self.resnets, self.attentions, conditions, strict=True)
        for skip, resnet, attention, condition in layers:
            x = resnet(torch.cat([x, skip], dim=1), emb)
            x = attention(x, condition, emb.shape[0])
        for upsampler in self.upsamplers:
            x = upsampler(x)
        return x


class SpatioTemporalUNet(nn.Module):
    """F(c_in * x, c_noise; image, numbers): the network of Stable Video Diffusion.

    sample          [b, t, 8, h, w]        4 noisy channels, scaled by c_in, then the image's latent in every frame
    c_noise         scalar, [b] or [b, t]  0.25 ln(sigma)
    image_embeds    [b, 1, 1024]           CLIP embedding of the image; [b, t, 1, 1024] if each frame has its own
    added_time_ids  [b, 3] or [b, t, 3]    fps - 1, motion bucket, noise augmentation
    conditions      what `condition(image_embeds)` returned, so that many calls need it only once
    returns         [b, t, 4, h, w]

    The last four may have one row for all b; rows never mix. h and w are multiples of `config.stride`. Sinusoids are
    float32, all else in the weights' dtype. `vcut`, if given, replaces the config's. `embed`, `down`, `middle` and `up`
    are the call in parts. Raises ValueError, with all sizes, where they do not agree.
    """

    __call__: Callable[..., Tensor]

    def __init__(self, config: UNetConfig, vcut: Vcut | None = None, layers: tuple[Any, Any] = LAYERS) -> None:
        super().__init__()
        self.config = config = (vcut is not None and replace(config, vcut=vcut)) or config
        widths = config.block_out_channels
        c_emb, c_ids = 4 * widths[0], config.num_time_ids * config.addition_time_embed_dim
        self.time_embedding = TimestepEmbedding(widths[0], c_emb, c_emb)
        self.add_embedding = TimestepEmbedding(c_ids, c_emb, c_emb)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        levels = range(len(widths))
        self.down_blocks = nn.ModuleList(DownBlock(config, level, layers) for level in levels)
        self.down_blocks[-1].downsamplers = nn.ModuleList()  # the innermost level is not halved,
        self.mid_block = MidBlock(config, layers)
        self.up_blocks = nn.ModuleList(UpBlock(config, level, layers) for level in reversed(levels))
        self.up_blocks[-1].upsamplers = nn.ModuleList()  # and the outermost not doubled
        self.conv_norm_out = nn.GroupNorm(NUM_GROUPS, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def condition(self, image_embeds: Tensor) -> Conditions:
        """All that the network will ever ask of the embedding, block by block: once per video. The caller keeps it."""
        k, c = KEYS[self.config.vcut], self.config.cross_attention_dim
        try:
            context = rearrange(image_embeds, f"b ... {k} c -> b (...) {k} c", c=c)
        except RuntimeError as error:
            need = f"[b, 1, {c}] or [b, t, 1, {c}]; more keys than one are for vcut=False: the fold holds for one alone"
            raise ValueError(f"image_embeds is {list(image_embeds.shape)}; need {need}") from error
        blocks: list[Any] = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [[attention.condition(context) for attention in block.attentions] for block in blocks]

    def embed(
        self, sample: Tensor, c_noise: Tensor, image_embeds: Tensor, added_time_ids: Tensor, conditions: Conditions = ()
    ) -> tuple[Tensor, Tensor, Conditions]:  # in the comments, svd-xt's shapes with guidance: sample [2,25,8,72,128]
        """x, the frames after conv_in; emb [b, f, c_e], after the silu that every block would apply; conditions."""
        config, m, conditions = self.config, 2 ** (len(self.up_blocks) - 1), conditions or self.condition(image_embeds)
        try:  # views that fail, not an `if`: compile, export, vmap and autocast run straight through
            x = rearrange(sample, "b t c (h m) (w n) -> (b t) c (h m) (w n)", c=config.in_channels, m=m, n=m)
            level = rearrange(torch.atleast_1d(c_noise), "b ... -> b (...)")
            ids = rearrange(added_time_ids, "b ... i -> b (...) i", i=config.num_time_ids)
            for each in (level, ids, *conditions[len(self.down_blocks)][0]):
                each.expand(*sample.shape[:2], *each.shape[2:])
        except RuntimeError as error:
            sizes = ", ".join(f"{list(x.shape)}" for x in (sample, c_noise, image_embeds, added_time_ids))
            need = f"need [b, t, {config.in_channels}, h, w], h and w multiples of {m}; one row, or one for each b"
            raise ValueError(f"sample, c_noise, image_embeds, added_time_ids do not agree: {sizes}; {need}") from error
        level = sinusoidal_embedding(level.expand(sample.shape[0], -1), config.block_out_channels[0])
        ids = sinusoidal_embedding(ids.expand(sample.shape[0], -1, -1), config.addition_time_embed_dim).flatten(2)
        emb = F.silu(self.time_embedding(level.to(x.dtype)) + self.add_embedding(ids.to(x.dtype)))  # [2,1,1280]
        return self.conv_in(x), emb, conditions  # [50,320,72,128]

    def down(self, x: Tensor, emb: Tensor, conditions: Conditions) -> tuple[Tensor, list[Tensor]]:
        """The bottom's x and the skips, 12 in the released model: x itself and what each layer below it returns."""
        skips = [x]
        for block, condition in zip(self.down_blocks, conditions[: len(self.down_blocks)], strict=True):
            x, more = block(x, emb, condition)  # [50,320,36,64], [50,640,18,32], [50,1280,9,16], [50,1280,9,16]
            skips += more
        return x, skips

    def middle(self, x: Tensor, emb: Tensor, conditions: Conditions) -> Tensor:
        return self.mid_block(x, emb, conditions[len(self.down_blocks)])  # [50,1280,9,16]

    def up(self, x: Tensor, skips: list[Tensor], emb: Tensor, conditions: Conditions) -> Tensor:
        """F, of the middle's x and the skips, last in first out."""
        for block, condition in zip(self.up_blocks, conditions[len(self.down_blocks) + 1 :], strict=True):
            own, skips = skips[-len(condition) :], skips[: -len(condition)]
            x = block(x, own, emb, condition)  # [50,1280,18,32], [50,1280,36,64], [50,640,72,128], [50,320,72,128]
        x = self.conv_out(F.silu(self.conv_norm_out(x)))  # [50,4,72,128]
        return rearrange(x, "(b t) c h w -> b t c h w", b=emb.shape[0])  # [2,25,4,72,128]

    def save(self, folder: Any, num_frames: int = 14) -> None:
        """Write config.json and diffusion_pytorch_model.safetensors into a new folder, whole or not at all."""
        from .save import save_unet  # in here, so that the model needs attention.py and config.py alone

        save_unet(self, folder, num_frames)

    def forward(
        self, sample: Tensor, c_noise: Tensor, image_embeds: Tensor, added_time_ids: Tensor, conditions: Conditions = ()
    ) -> Tensor:
        x, emb, conditions = self.embed(sample, c_noise, image_embeds, added_time_ids, conditions)
        x, skips = self.down(x, emb, conditions)
        return self.up(self.middle(x, emb, conditions), skips, emb, conditions)
