"""Parameters and multiply-accumulates (MACs) of a UNet, module by module, as torch counts them on shapes alone."""

from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from .checkpoint import on_meta
from .config import GenerationConfig, Size, UNetConfig, VAEConfig
from .etc import SD21, SpatialUNet
from .unet import SpatioTemporalUNet

ETC = {"unet": SD21, "vae": VAEConfig()}, GenerationConfig(num_frames=16, size=(256, 256))  # configs, settings


class Row(NamedTuple):
    """A module: its name, "" for the network; its parameters; MACs of one forward."""

    name: str
    parameters: int
    macs: int


@torch.no_grad()
def count(config: UNetConfig, frames: int, size: Size, b: int, grid: bool = False) -> list[Row]:
    """Of every module, the network first, in a forward on b videos; `size` is (w, h) in latent cells, `grid` is for
    ETC's network. Norms, activations and sums count as nothing, nor what is made of image or text once a video."""
    unet: Any = on_meta(SpatialUNet if grid else SpatioTemporalUNet, config)
    keys, c_in, numbers = 77 if grid else 1, unet.config.in_channels, unet.config.num_time_ids
    shapes = (b, frames, c_in, *size[::-1]), (b,), (b, keys, config.cross_attention_dim), (b, numbers)
    inputs = [torch.empty(shape, device="meta") for shape in shapes]
    conditions, root = unet.condition(inputs[2][:, None]), type(unet).__name__
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet(*inputs, conditions)
    macs = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    modules = ((name, sum(p.numel() for p in module.parameters())) for name, module in unet.named_modules())
    return [Row(name, size, macs.get(f"{root}.{name}".strip("."), 0)) for name, size in modules]
