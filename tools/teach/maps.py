"""Attention maps without a change to the model: what each attention was given in a run, and its softmax, written out.

    with watched(unet) as seen:
        unet(*inputs)
    x, context = seen["down_blocks.0.attentions.0.transformer_blocks.0.attn1"]
    weights(unet.get_submodule(name), x, context)

Axes as in minisvd/attention.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from minisvd.attention import Attention

Seen = dict[str, tuple[Tensor, Tensor]]
"""Name of an attention -> its queries' tokens [(b r), s, c] and its context [b, k, c'], of the latest call."""


def attentions(unet: nn.Module) -> dict[str, Attention]:
    """Every attention that is one, by name, in the order in which they run."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}


@contextmanager
def watched(unet: nn.Module) -> Iterator[Seen]:
    """What the attentions of `unet` are given while it runs in the block."""
    seen: Seen = {}

    def note(name: str, _module: nn.Module, given: tuple[Tensor, Tensor]) -> None:
        seen[name] = given[0].detach(), given[1].detach()

    handles = [module.register_forward_pre_hook(partial(note, name)) for name, module in attentions(unet).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def weights(attention: Attention, x: Tensor, context: Tensor, queries: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) [(b r), n, s, k]: how much each head of each query takes of each key's value.

    `queries` are the numbers of the tokens s that ask, by default all of them.
    """
    n, r = attention.num_heads, x.shape[0] // context.shape[0]
    q = rearrange(attention.to_q(x if queries is None else x[:, queries]), "br s (n d) -> br n s d", n=n)
    k = rearrange(attention.to_k(context), "b k (n d) -> b n d k", n=n).repeat_interleave(r, dim=0)
    return (q @ k / q.shape[-1] ** 0.5).softmax(dim=-1)


@torch.no_grad()
def attended(attention: Attention, weights: Tensor, context: Tensor) -> Tensor:
    """to_out(weights v) [(b r), s, c]: what the attention returns if these are its weights."""
    v = rearrange(attention.to_v(context), "b k (n d) -> b n k d", n=attention.num_heads)
    values = weights @ v.repeat_interleave(weights.shape[0] // context.shape[0], dim=0)
    return attention.to_out(rearrange(values, "br n s d -> br s (n d)"))
