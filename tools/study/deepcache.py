"""DeepCache (arXiv 2312.00858) on our UNet: in every second step, the deep part of the U is what it was in the last.

The U as a list of layers, by name: down layer i makes skip i (layer 0 is conv_in), and the up layer that takes skip k
is the (k+1)th from the end. What enters that layer from below is kept; a step that reuses it runs only the down layers
up to k and the up layers from that one on. Nothing of it is in the model: a layer is looked up by its name, and the
same names count its multiply-accumulates.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minisvd.config import Size, UNetConfig
from minisvd.unet import Conditions, SpatioTemporalUNet
from tools.cost.accounting import Build, unet_blocks

EVERY = 2  # steps; the first of them is whole
Layer = tuple[str, ...]  # the names of its modules, in running order


def down_layers(config: UNetConfig) -> list[Layer]:
    """What makes each skip after the first, which conv_in makes."""
    layers: list[Layer] = []
    last = len(config.block_out_channels) - 1
    for level in range(last + 1):
        block = f"down_blocks.{level}"
        layers += [(f"{block}.resnets.{i}", f"{block}.attentions.{i}") for i in range(config.layers_per_block)]
        layers += [(f"{block}.downsamplers.0",)] if level < last else []
    return layers


def up_layers(config: UNetConfig) -> list[Layer]:
    """What takes each skip, the last made first."""
    layers: list[Layer] = []
    last = len(config.block_out_channels) - 1
    for up in range(last + 1):
        block, depth = f"up_blocks.{up}", config.layers_per_block + 1
        level: list[Layer] = [(f"{block}.resnets.{i}", f"{block}.attentions.{i}") for i in range(depth)]
        level[-1] = (*level[-1], f"{block}.upsamplers.0") if up < last else level[-1]
        layers += level
    return layers


def reused_macs(config: UNetConfig, frames: int, size: Size, batch: int, build: Build, skip: int) -> int:
    """Multiply-accumulates of a step that reuses what enters the up layer of skip number `skip`."""
    ends = ("time_embedding", "add_embedding", "conv_in", "conv_norm_out", "conv_out")
    layers = down_layers(config)[:skip] + up_layers(config)[-skip - 1 :]
    run = {name for layer in layers for name in layer} | set(ends)
    blocks = (block for block in unet_blocks(config, frames, size, batch, build) if block.name in run)
    return sum(site.macs for block in blocks for site in block.sites)


class DeepCache:
    """A UNet for one sampling run (a `sampler.Network`) that is whole in one call and reuses in the next, in turn.

    `skip` says where, 0 outermost. A call under other conditions than the last, as where guidance is cut, is whole.
    Raises ValueError for a skip that the UNet has not.
    """

    def __init__(self, unet: SpatioTemporalUNet, skip: int) -> None:
        self.unet, self.skip = unet, skip
        self.downs, self.ups = down_layers(unet.config), up_layers(unet.config)
        if not 0 <= skip < len(self.ups):
            raise ValueError(f"skip is {skip}; need 0 to {len(self.ups) - 1}, as this UNet has {len(self.ups)} of them")
        self.calls, self.conditions, self.kept = 0, None, torch.empty(0)

    def condition(self, image_embeds: Tensor) -> Conditions:
        return self.unet.condition(image_embeds)

    def __call__(
        self, sample: Tensor, c_noise: Tensor, image_embeds: Tensor, added_time_ids: Tensor, conditions: Conditions
    ) -> Tensor:
        unet = self.unet
        x, emb, _ = unet.embed(sample, c_noise, image_embeds, added_time_ids, conditions)
        self.calls = self.calls + 1 if conditions is self.conditions else 0
        self.conditions, whole = conditions, self.calls % EVERY == 0
        skips = [x]
        for layer in self.downs if whole else self.downs[: self.skip]:
            skips.append(self.run(layer, skips[-1], emb, conditions))
        x = unet.middle(skips[-1], emb, conditions) if whole else self.kept
        for below in reversed(range(len(skips))):  # the skip that is taken
            if whole and below == self.skip:
                self.kept = x
            x = self.run(self.ups[-below - 1], torch.cat([x, skips[below]], dim=1), emb, conditions)
        x = unet.conv_out(F.silu(unet.conv_norm_out(x)))
        return rearrange(x, "(b t) c h w -> b t c h w", b=emb.shape[0])

    def run(self, layer: Layer, x: Tensor, emb: Tensor, conditions: Conditions) -> Tensor:
        for name in layer:
            side, number, kind, i = name.split(".")
            block = int(number) + (side == "up_blocks") * (len(self.unet.down_blocks) + 1)
            module: Any = self.unet.get_submodule(name)
            if kind == "resnets":
                x = module(x, emb)
            elif kind == "attentions":
                x = module(x, conditions[block][int(i)], emb.shape[0])
            else:
                x = module(x)
        return x
