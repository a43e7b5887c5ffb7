"""A UNet in memory made into another: folded, or with more input channels, or trained in less memory.

The new network shares the memory of every tensor that it has in common with the old one.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .attention import SpatioTemporalTransformer
from .checkpoint import FOLDS, on_meta
from .config import Vcut
from .layouts import FOLD_GATHER, sources
from .unet import SpatioTemporalResBlock, SpatioTemporalUNet


def rebuilt(unet: SpatioTemporalUNet, state: dict[str, Tensor], **changes: Any) -> SpatioTemporalUNet:
    """The network of `state`, with `changes` to the config: in the mode of `unet`, and trainable where that is."""
    new = on_meta(SpatioTemporalUNet, replace(unet.config, **changes))
    new.load_state_dict(state, assign=True)
    old = dict(unet.named_parameters())
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(name not in old or old[name].requires_grad)
    return new.train(unet.training)


@torch.no_grad()
def fold(unet: SpatioTemporalUNet, vcut: Vcut, key: Tensor | None = None) -> SpatioTemporalUNet:
    """The same weights in another build: each cross-attention becomes W = to_out.weight to_v.weight, b = to_out.bias.

    W is multiplied in float64 and rounded once to the weights' dtype, as `load(..., vcut=)` does it.

    `key` [c'], if given, is the one embedding that this network will ever hear (a zero one, or an empty image's). Then
    each site is a bias alone, b + W key: the result's cross_attention_dim is 0, and it takes image_embeds [b, 1, 0].
    Raises ValueError for a build that `unet` cannot become, and for a key of another size.
    """
    built, c = unet.config.vcut, unet.config.cross_attention_dim
    if (built, vcut) not in FOLDS and built != vcut:
        raise ValueError(f"the UNet is built with vcut={built!r}; it cannot become {vcut!r}")
    if key is not None and (vcut is False or key.shape != (c,)):
        raise ValueError(f"key has shape {list(key.shape)} and vcut is {vcut!r}; need [{c}] and a folded build")
    given, state = unet.state_dict(), {}
    for name in on_meta(SpatioTemporalUNet, replace(unet.config, vcut=vcut)).state_dict():
        read, join = sources(name, FOLD_GATHER if built is False and vcut is not False else [], [])
        state[name] = join(*(given[one] for one in read)).to(given[read[0]].dtype)
    if key is None:
        return rebuilt(unet, state, vcut=vcut)
    for name in [name for name in state if name.endswith("attn2.weight")]:
        weight, bias = state[name], state[site := name.replace("weight", "bias")]
        state[site] = (bias.double() + weight.double() @ key.to(weight).double()).to(bias)
        state[name] = weight[:, :0]
    return rebuilt(unet, state, vcut=vcut, cross_attention_dim=0)


@torch.no_grad()
def widen_conv_in(unet: SpatioTemporalUNet, channels: int) -> SpatioTemporalUNet:
    """The same network with `channels` input channels, the new ones last and with weights of zero: the output is what
    it was, whatever they hold, until they are trained. Raises ValueError for fewer channels than there are."""
    more = channels - unet.config.in_channels
    if more < 0:
        raise ValueError(f"channels is {channels}, but conv_in has {unet.config.in_channels} already")
    state = unet.state_dict()
    state["conv_in.weight"] = F.pad(state["conv_in.weight"], (0, 0, 0, 0, 0, more))
    return rebuilt(unet, state, in_channels=channels)


AGAIN = partial(checkpoint, use_reentrant=False)


def checkpoint_activations(unet: SpatioTemporalUNet, by: Callable[..., Any] | None = AGAIN) -> SpatioTemporalUNet:
    """Train in less memory and more time: every residual block and every transformer keeps its input alone and is
    computed again in the backward pass, `by` torch's function for that; None undoes it. Same outputs, gradients and
    parameter names; returns `unet`, changed."""
    for module in unet.modules():
        if isinstance(module, SpatioTemporalResBlock | SpatioTemporalTransformer):
            module.__dict__.pop("forward", None)
            if by is not None:
                module.forward = partial(by, module.forward)
    return unet
