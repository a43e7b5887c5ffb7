"""READ FIRST. Attention within a frame, to the image, and along time: the transformer at each level of the U.

    SpatioTemporalTransformer           one layer, in at [(b t),c,h,w] and out again
      BasicTransformerBlock             each frame's tokens among themselves:        [(b t), s, c]
      TemporalBasicTransformerBlock     each place's tokens over the frames:         [(b s), t, c]
      AlphaBlender                      sigmoid(mix) * spatial + (1 - sigmoid(mix)) * temporal

Axes, here and in unet.py: b batch, t frames, c channels, h w latent grid, s = h*w tokens, n heads, d head width,
k keys, r rows of queries that share one row of keys (t frames in space, s places in time).

What differs from the textbook transformer: norms come first, the feed-forward is gated (GEGLU), and every block's
cross-attention (`attn2`: SCA within frames, TCA along time) has ONE key, the CLIP embedding of the image. A softmax
over one key is 1, so it is a linear map of that key, whatever the query. `vcut` chooses what stands there: CROSS.
The context of an attention is its keys; a condition is what an attn2 makes of the context once per video. Both have
an axis f: 1, or t where each frame has keys of its own. In space each frame hears its own, in time all hear frame 0's.

Source: arXiv 2311.15127, appendix D; arXiv 2304.08818, section 3.1 (temporal layers); names as published.
"""

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from .config import NUM_GROUPS, Vcut


class Attention(nn.Module):
    """to_out(softmax(q k^T / sqrt(d)) v), q from x, k and v from context, over n heads of width d = c / n.

    x [(b r), s, c], context [b, k, c'] -> [(b r), s, c]. Self-attention is the case context = x, r = 1.
    """

    def __init__(self, c: int, num_heads: int, c_context: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k, self.to_v = nn.Linear(c_context, c, bias=False), nn.Linear(c_context, c, bias=False)
        self.to_out = nn.Sequential(nn.Linear(c, c))

    def condition(self, context: Tensor) -> Tensor:
        return context

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        n, b, r = self.num_heads, context.shape[0], x.shape[0] // context.shape[0]
        q = rearrange(self.to_q(x), "(b r) s (n d) -> b n (r s) d", b=b, n=n)
        k = rearrange(self.to_k(context), "b k (n d) -> b n k d", n=n)
        v = rearrange(self.to_v(context), "b k (n d) -> b n k d", n=n)
        out = F.scaled_dot_product_attention(q, k, v)
        del q, k, v  # here and below, a name that is not needed is not kept: each holds all tokens of a video
        return self.to_out(rearrange(out, "b n (r s) d -> (b r) s (n d)", r=r))


class GEGLU(nn.Module):
    """a * gelu(g) with (a, g) = proj(x), gelu exact (erf): the gated half of the feed-forward (arXiv 2002.05202)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        a, g = self.proj(x).chunk(2, dim=-1)
        return F.gelu(g).mul_(a)  # in place, for this is the widest tensor there is


class FeedForward(nn.Module):
    """Linear(GEGLU(x)), 4 or 8 times as wide inside. `net.1` was dropout in training and holds nothing."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.net, self.slices = nn.Sequential(GEGLU(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c)), 1  # of x, in turn

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(part) for part in x.tensor_split(self.slices)])


class BasicTransformerBlock(nn.Module):
    """Within a frame: self-attention among its s tokens, cross-attention to the image (SCA), feed-forward."""

    def __init__(self, c: int, num_heads: int, c_context: int, cross: tuple[Any, Any]) -> None:
        super().__init__()
        norm, attention = cross  # one of the pairs in CROSS
        self.norm1, self.attn1 = nn.LayerNorm(c), Attention(c, num_heads, c)
        self.norm2, self.attn2 = norm(c), attention(c, num_heads, c_context)
        self.norm3, self.ff = nn.LayerNorm(c), FeedForward(c)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # x [(b t), s, c], condition [(b f), ...]
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), condition)
        return x + self.ff(self.norm3(x))


class TemporalBasicTransformerBlock(nn.Module):
    """Along time: a feed-forward first, then as within a frame, but over the t tokens of one place (with TCA)."""

    def __init__(self, c: int, num_heads: int, c_context: int, cross: tuple[Any, Any]) -> None:
        super().__init__()
        norm, attention = cross
        self.norm_in, self.ff_in = nn.LayerNorm(c), FeedForward(c)
        self.norm1, self.attn1 = nn.LayerNorm(c), Attention(c, num_heads, c)
        self.norm2, self.attn2 = norm(c), attention(c, num_heads, c_context)
        self.norm3, self.ff = nn.LayerNorm(c), FeedForward(c)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # x [(b s), t, c], condition [b, ...]
        x = x + self.ff_in(self.norm_in(x))
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), condition)
        return x + self.ff(self.norm3(x))


# What else can stand at attn2. `condition` is called once per video, `forward` in every step.
class CachedCondLinear(nn.Linear):
    """W c + b: all that a cross-attention to one key c computes, with W = to_out.weight to_v.weight, b = to_out.bias.

    softmax(q k^T / sqrt(d)) over one key is 1, so to_out(1 * to_v(c)) = W c + b for every query q (arXiv 2407.19205,
    section III). Context [b, f, 1, c'] -> [b, f, 1, c]: the caller keeps the result, the module keeps none.
    """

    def __init__(self, c: int, _num_heads: int, c_context: int) -> None:
        super().__init__(c_context, c)

    def condition(self, context: Tensor) -> Tensor:
        return super().forward(context)

    def forward(self, x: Tensor, value: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return repeat(value, "b 1 c -> (b r) 1 c", r=x.shape[0] // value.shape[0])  # whatever x [(b r), s, c] is


class OmittedCrossAttention(nn.Identity):
    """0: the image has no part here, which is an approximation (arXiv 2407.19205 omits all of TCA). No parameters."""

    condition = Attention.condition

    def forward(self, _x: Tensor, _context: Tensor) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 0


RELEASED, LINEAR = (nn.LayerNorm, Attention), (nn.Identity, CachedCondLinear)  # norm2, attn2
OMITTED = (nn.Identity, OmittedCrossAttention)

CROSS: dict[Vcut, tuple[tuple[Any, Any], tuple[Any, Any]]] = {  # vcut: (SCA, TCA)
    False: (RELEASED, RELEASED),
    "lossless": (LINEAR, LINEAR),  # the same function
    True: (LINEAR, OMITTED),  # arXiv 2407.19205
}
KEYS: dict[Vcut, str] = {False: "k", "lossless": "1", True: "1"}  # of the embedding: the fold holds for one alone


def sinusoidal_embedding(x: Tensor, dim: int) -> Tensor:
    """[cos(x w_0..), sin(x w_0..)] with w_i = 10000^(-2i/dim), in float32: [...] -> [..., dim]."""
    w = torch.exp(torch.arange(dim // 2, device=x.device) * (-2 * math.log(10000) / dim))
    angles = x[..., None].float() * w
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Sequential):
    """linear_2(silu(linear_1(sinusoid))): from a sinusoidal embedding [..., c_in] to [..., c_out]."""

    def __init__(self, c_in: int, c_hidden: int, c_out: int) -> None:
        linear_1, linear_2 = nn.Linear(c_in, c_hidden), nn.Linear(c_hidden, c_out)
        super().__init__(OrderedDict(linear_1=linear_1, silu=nn.SiLU(), linear_2=linear_2))


class AlphaBlender(nn.Module):
    """sigmoid(mix_factor) * x + (1 - sigmoid(mix_factor)) * y."""

    def __init__(self, mix_factor: float) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([mix_factor]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.lerp(y, x.to(y.dtype), self.mix_factor.sigmoid().to(y.dtype))  # casts: autocast may mix dtypes


class SpatioTemporalTransformer(nn.Module):
    """x + proj_out(blend(space, time)) over the tokens of proj_in(norm(x)): [(b t),c,h,w] -> the same.

    The temporal block starts from the spatial one's output plus an embedding of the frame's number.
    """

    def __init__(self, c: int, num_heads: int, c_context: int, vcut: Vcut) -> None:
        super().__init__()
        in_space, in_time = CROSS[vcut]
        self.norm, self.proj_in = nn.GroupNorm(NUM_GROUPS, c, eps=1e-6), nn.Linear(c, c)
        space = BasicTransformerBlock(c, num_heads, c_context, in_space)
        time = TemporalBasicTransformerBlock(c, num_heads, c_context, in_time)
        self.transformer_blocks, self.temporal_transformer_blocks = nn.ModuleList([space]), nn.ModuleList([time])
        self.time_pos_embed, self.time_mixer = TimestepEmbedding(c, 4 * c, c), AlphaBlender(0.5)
        self.proj_out = nn.Linear(c, c)

    def condition(self, context: Tensor) -> tuple[Tensor, ...]:
        """The conditions of the two blocks, of the context [b, f, k, c']: once per video."""
        blocks: list[Any] = [*self.transformer_blocks, *self.temporal_transformer_blocks]
        return tuple(block.attn2.condition(keys) for block, keys in zip(blocks, (context, context[:, :1]), strict=True))

    def forward(self, x: Tensor, conditions: tuple[Tensor, ...], b: int) -> Tensor:
        in_space, in_time = (condition.expand(b, -1, -1, -1).flatten(0, 1) for condition in conditions)
        bt, c, h, _ = x.shape
        frames = sinusoidal_embedding(torch.arange(bt // b, device=x.device), c)
        position = self.time_pos_embed(frames.to(x.dtype))  # [t, c]

        tokens = self.proj_in(rearrange(self.norm(x), "bt c h w -> bt (h w) c"))
        tokens = self.transformer_blocks[0](tokens, in_space)
        time = rearrange(tokens, "(b t) s c -> (b s) t c", b=b) + position
        time = self.temporal_transformer_blocks[0](time, in_time)
        tokens = self.time_mixer(tokens, rearrange(time, "(b s) t c -> (b t) s c", b=b))
        return x + rearrange(self.proj_out(tokens), "bt (h w) c -> bt c h w", h=h)
