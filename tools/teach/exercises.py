"""Ten exercises on one key, and on the way from noise to a video. Each function runs, and is wrong.

    cp tools/teach/exercises.py mine.py      then change the functions in mine.py
    python -m tools.teach.check mine.py      says of each what is still wrong

The questions are told at length in README.md, beside this file.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minisvd import SpatioTemporalUNet
from minisvd.attention import Attention


def without_gradient(unet: SpatioTemporalUNet) -> set[str]:
    """1. The names of the parameters that no gradient reaches, whatever is learnt, as long as there is one key."""
    return {name for name, _ in unet.named_parameters() if ".attn2." in name}


def trained(unet: SpatioTemporalUNet) -> list[nn.Parameter]:
    """2. What to give Adam, so that it moves what can learn and nothing else, under a fused attention kernel too."""
    return list(unet.parameters())


def linear_map(attention: Attention) -> tuple[Tensor, Tensor]:
    """3. W [c, c'] and b [c] with attention(x, key) = W key + b, from the weights."""
    return attention.to_v.weight, attention.to_out.get_parameter("0.bias")


def conditioning(embedding: Tensor) -> Tensor:
    """4. Of the embedding [b, 1, c'], keys [b, k, c'] over which no cross-attention of the UNet is trivial."""
    return embedding.expand(-1, 2, -1)


def shared_key(embedding: Tensor) -> Tensor:
    """5. The key [b, 1, c'] at which an attention gives the mean of what it gives at the embedding and at zeros."""
    return embedding


def attention_macs(queries: int, keys: int, c: int, c_context: int) -> int:
    """6. Multiply-accumulates of one attention of width c, from its `queries` to `keys` of width c_context."""
    return queries * c * (c + c) + 0 * keys * c_context


def gated(attention: Attention, x: Tensor, context: Tensor) -> Tensor:
    """7. An attention that, over one key, moves with the query x [b, s, c] and is still affine in the context."""
    return attention(x, context)


def sigmas(n: int) -> Tensor:
    """8. EDM's noise levels [n + 1] from 700 to 0.002, then 0: arXiv 2206.00364, Eq. 5, rho = 7."""
    return torch.cat([torch.linspace(700, 0.002, n), torch.zeros(1)])


def denoised(out: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """9. D(x; sigma), of the network's output F(c_in x; c_noise), which predicts v: see `preconditioning`."""
    return x - sigma * out


def sample(denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, levels: Tensor) -> Tensor:
    """10. The end of dx/dsigma = (x - denoise(x, sigma)) / sigma from x at levels[0], in Euler's steps, one a level."""
    return denoise(x, levels[0])
