"""READ FIRST. How a pixel's token hears from the rest of its frame, from the image, and from its own past and future.

    SpatialTransformer                  one layer, in at [(b t),c,h,w] and out again
      BasicTransformerBlock             each frame's tokens among themselves:        [(b t), s, c]
      TemporalBasicTransformerBlock     each place's tokens over the frames:         [(b s), t, c]
      AlphaBlender                      sigmoid(mix) * spatial + (1 - sigmoid(mix)) * temporal

Axes, here and in unet.py: b batch, t frames, c channels, h w latent grid, s = h*w tokens, n heads, d head width,
k keys, r query rows per context row.

What differs from the textbook transformer: norms come first, the feed-forward is gated (GEGLU), and the
cross-attentions (`attn2`) see ONE key, the CLIP embedding of the image. A softmax over one key is 1, so each is a
linear map of that embedding, whatever the query. `vcut` says what stands there, by the class of the block:
CrossAttention as released, CachedCross (the linear map, identical), NoCross (nothing, an approximation). A row of
the context serves the r query rows of its video: r = t frames in space, r = s places in time; rows never mix.

Source: arXiv 2311.15127, appendix D; arXiv 2304.08818, section 3.1 (temporal layers); names as published.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minisvd.config import NUM_GROUPS, Vcut


def sinusoidal_embedding(x: Tensor, dim: int) -> Tensor:
    """[cos(x w_0..), sin(x w_0..)] with w_i = 10000^(-2i/dim), in float32: [...] -> [..., dim]."""
    w = torch.exp(torch.arange(dim // 2, device=x.device) * (-2 * math.log(10000) / dim))
    angles = x[..., None].float() * w
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """linear_2(silu(linear_1(sinusoid))): from a sinusoidal embedding [..., c_in] to [..., c_out]."""

    def __init__(self, c_in: int, c_hidden: int, c_out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(c_in, c_hidden)
        self.linear_2 = nn.Linear(c_hidden, c_out)

    def forward(self, sinusoid: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoid.to(self.linear_1.weight.dtype))))


class AlphaBlender(nn.Module):
    """sigmoid(mix_factor) * x + (1 - sigmoid(mix_factor)) * y."""

    def __init__(self, mix_factor: float) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([mix_factor]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.lerp(y, x, self.mix_factor.sigmoid())


class Attention(nn.Module):
    """to_out(softmax(q k^T / sqrt(d)) v), q from x, k and v from context, over n heads of width d = c / n.

    x [(b r), s, c], context [b, k, c'] -> [(b r), s, c]. Self-attention is the case context = x, r = 1.
    """

    def __init__(self, c: int, num_heads: int, c_context: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k = nn.Linear(c_context, c, bias=False)
        self.to_v = nn.Linear(c_context, c, bias=False)
        self.to_out = nn.Sequential(nn.Linear(c, c))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        n, b, r = self.num_heads, len(context), len(x) // len(context)
        q = rearrange(self.to_q(x), "(b r) s (n d) -> b n (r s) d", b=b, n=n)
        k = rearrange(self.to_k(context), "b k (n d) -> b n k d", n=n)
        v = rearrange(self.to_v(context), "b k (n d) -> b n k d", n=n)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(out, "b n (r s) d -> (b r) s (n d)", r=r))


class GEGLU(nn.Module):
    """a * gelu(g) with (a, g) = proj(x): the gated half of the feed-forward (arXiv 2002.05202)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        a, g = self.proj(x).chunk(2, dim=-1)
        return a * F.gelu(g)


class FeedForward(nn.Module):
    """Linear(GEGLU(x)), four times as wide inside. `net.1` was dropout in training and holds nothing."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CachedCondLinear(nn.Linear):
    """W c + b: all that a cross-attention to one key c computes, with W = to_out.weight to_v.weight, b = to_out.bias.
    softmax(q k^T / sqrt(d)) over one key is 1, so to_out(1 * to_v(c)) = W c + b for every query q (arXiv 2407.19205,
    section III). Context [b, 1, c'] -> [b, 1, c], once per video: the caller keeps the result, the module keeps none.
    """


class CrossAttention(nn.Module):
    """How a block hears the image, as released: x + attn2(norm2(x), context)."""

    def add_cross(self, c: int, num_heads: int, c_context: int) -> None:
        self.norm2 = nn.LayerNorm(c)
        self.attn2 = Attention(c, num_heads, c_context)

    def condition(self, context: Tensor) -> Tensor:
        """What `cross` takes, made of the context once per video: here the context itself."""
        return context

    def cross(self, x: Tensor, context: Tensor) -> Tensor:
        return x + self.attn2(self.norm2(x), context)


class CachedCross(nn.Module):
    """The same function in exact arithmetic: x + (W c + b), the bracket computed once per video."""

    def add_cross(self, c: int, _num_heads: int, c_context: int) -> None:
        self.attn2 = CachedCondLinear(c_context, c)

    def condition(self, context: Tensor) -> Tensor:
        return self.attn2(context)

    def cross(self, x: Tensor, cached: Tensor) -> Tensor:
        b, r = len(cached), len(x) // len(cached)
        x = rearrange(x, "(b r) s c -> b (r s) c", b=b) + cached
        return rearrange(x, "b (r s) c -> (b r) s c", r=r)


class NoCross(CrossAttention):
    """An approximation: the image is not heard here (arXiv 2407.19205 omits all temporal cross-attentions)."""

    def add_cross(self, *_sizes: int) -> None:
        pass

    def cross(self, x: Tensor, _context: Tensor) -> Tensor:
        return x


class BasicTransformerBlock(CrossAttention):
    """Within a frame: self-attention among its s tokens, then the image, then feed-forward."""

    def __init__(self, c: int, num_heads: int, c_context: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(c)
        self.attn1 = Attention(c, num_heads, c)
        self.add_cross(c, num_heads, c_context)
        self.norm3 = nn.LayerNorm(c)
        self.ff = FeedForward(c)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # x [(b t), s, c], context [b, 1, c']
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = self.cross(x, context)
        return x + self.ff(self.norm3(x))


class TemporalBasicTransformerBlock(CrossAttention):
    """Along time: a feed-forward first, then as within a frame, but over the t tokens of one place."""

    def __init__(self, c: int, num_heads: int, c_context: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(c)
        self.ff_in = FeedForward(c)
        self.norm1 = nn.LayerNorm(c)
        self.attn1 = Attention(c, num_heads, c)
        self.add_cross(c, num_heads, c_context)
        self.norm3 = nn.LayerNorm(c)
        self.ff = FeedForward(c)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # x [(b s), t, c], context [b, 1, c']
        x = x + self.ff_in(self.norm_in(x))
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = self.cross(x, context)
        return x + self.ff(self.norm3(x))


class CachedBasicTransformerBlock(CachedCross, BasicTransformerBlock):
    """Within a frame, the image heard through a `CachedCondLinear`."""


class CachedTemporalBasicTransformerBlock(CachedCross, TemporalBasicTransformerBlock):
    """Along time, the image heard through a `CachedCondLinear`."""


class UncrossedTemporalBasicTransformerBlock(NoCross, TemporalBasicTransformerBlock):
    """Along time, the image not heard."""


class Builds(dict):
    def __missing__(self, vcut: object) -> None:
        raise ValueError(f"vcut is {vcut!r}; need False, True or 'lossless'")


BLOCKS = Builds({  # vcut: (the block within a frame, the block along time)
    False: (BasicTransformerBlock, TemporalBasicTransformerBlock),
    "lossless": (CachedBasicTransformerBlock, CachedTemporalBasicTransformerBlock),
    True: (CachedBasicTransformerBlock, UncrossedTemporalBasicTransformerBlock),
})  # fmt: skip

Context = tuple[Tensor, ...]  # what one transformer's two blocks take, each [b, 1, ...]


class SpatialTransformer(nn.Module):
    """x + proj_out(blend(space, time)) over the tokens of proj_in(norm(x)): [(b t),c,h,w] -> the same.

    The temporal block starts from the spatial one's output plus an embedding of the frame's number.
    """

    def __init__(self, c: int, num_heads: int, c_context: int, vcut: Vcut) -> None:
        super().__init__()
        in_space, in_time = BLOCKS[vcut]
        self.norm = nn.GroupNorm(NUM_GROUPS, c, eps=1e-6)
        self.proj_in = nn.Linear(c, c)
        self.transformer_blocks = nn.ModuleList([in_space(c, num_heads, c_context)])
        self.temporal_transformer_blocks = nn.ModuleList([in_time(c, num_heads, c_context)])
        self.time_pos_embed = TimestepEmbedding(c, 4 * c, c)
        self.time_mixer = AlphaBlender(0.5)
        self.proj_out = nn.Linear(c, c)

    def condition(self, context: Tensor) -> Context:
        """What the two blocks take, made of the context [b, 1, c'] once per video."""
        blocks: list[Any] = [*self.transformer_blocks, *self.temporal_transformer_blocks]
        return tuple(block.condition(context) for block in blocks)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        b, (bt, c, h, _) = len(context[0]), x.shape
        frame = torch.arange(bt // b, device=x.device)
        position = self.time_pos_embed(sinusoidal_embedding(frame, c))  # [t, c]

        tokens = self.proj_in(rearrange(self.norm(x), "bt c h w -> bt (h w) c"))
        space = self.transformer_blocks[0](tokens, context[0])
        time = rearrange(space, "(b t) s c -> (b s) t c", b=b) + position
        time = self.temporal_transformer_blocks[0](time, context[1])
        tokens = self.time_mixer(space, rearrange(time, "(b s) t c -> (b t) s c", b=b))
        return x + rearrange(self.proj_out(tokens), "bt (h w) c -> bt c h w", h=h)
