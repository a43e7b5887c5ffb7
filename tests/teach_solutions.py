"""Solutions of tools/teach/exercises.py, for the test that its checkers can be passed."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from minisvd import SpatioTemporalUNet, dead_names
from minisvd.attention import Attention

GATE = torch.linspace(-1, 1, 32, dtype=torch.float64)


def without_gradient(unet: SpatioTemporalUNet) -> set[str]:
    ends = ".attn2.to_q.weight", ".attn2.to_k.weight", ".norm2.weight", ".norm2.bias"
    return {name for name, _ in unet.named_parameters() if "transformer_blocks" in name and name.endswith(ends)}


def trained(unet: SpatioTemporalUNet) -> list[nn.Parameter]:
    return [parameter for name, parameter in unet.named_parameters() if name not in dead_names(unet)]


def linear_map(attention: Attention) -> tuple[Tensor, Tensor]:
    out, bias = (attention.to_out.get_parameter(name) for name in ("0.weight", "0.bias"))
    return out @ attention.to_v.weight, bias


def conditioning(embedding: Tensor) -> Tensor:
    return torch.cat([embedding, torch.zeros_like(embedding)], dim=1)


def shared_key(embedding: Tensor) -> Tensor:
    return embedding / 2


def attention_macs(queries: int, keys: int, c: int, c_context: int) -> int:
    return 2 * queries * c * c + 2 * keys * c_context * c + 2 * queries * keys * c


def gated(attention: Attention, x: Tensor, context: Tensor) -> Tensor:
    return torch.sigmoid(x @ GATE)[..., None] * attention(x, context)


def sigmas(n: int) -> Tensor:
    ramp = torch.linspace(0, 1, n)
    return torch.cat([(700 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 700 ** (1 / 7))) ** 7, torch.zeros(1)])


def denoised(out: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    return (x - sigma * (sigma**2 + 1).sqrt() * out) / (sigma**2 + 1)


def sample(denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, levels: Tensor) -> Tensor:
    for here, there in pairwise(levels):
        x = x + (there - here) * (x - denoise(x, here)) / here
    return x
