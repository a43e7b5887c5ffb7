"""What a run can do to take less memory, the peak that it then has, and which of it a device needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .attention import FeedForward
from .clip import ImageEncoder
from .config import ClipConfig, GenerationConfig
from .unet import SpatioTemporalUNet
from .vae import AutoencoderKLTemporalDecoder, Hold

if TYPE_CHECKING:
    from .pipeline import StableVideoDiffusion


class Economy(NamedTuple):
    """What a run does to take less memory, for more time. Its frames are the same, to rounding."""

    name: str
    slices: int = 1  # of the tokens, which feed-forwards take one after the other
    hold: Hold = "two"  # of a video, while it is decoded
    visiting: bool = False  # each part is on the device only while it works, else on the host
    in_turn: bool = False  # rows of a batch, and so the two branches of a guided step, run one after the other


ECONOMIES = (  # from the gentlest to the last, which is `low_memory=True`
    Economy("full speed"),
    Economy("feed-forwards in slices, decoding twice over", 8, "one"),
    Economy("the same and each part on the device only while it works", 8, "one", visiting=True),
    Economy("the same and one branch at a time", 8, "one", visiting=True, in_turn=True),
    Economy("low memory: the same and decoding from the host", 8, "host", visiting=True, in_turn=True),
)


def sliced(unet: SpatioTemporalUNet, slices: int) -> SpatioTemporalUNet:
    """The UNet, from now on with feed-forwards in so many slices."""
    for module in unet.modules():
        if isinstance(module, FeedForward):
            module.slices = slices
    return unet


def peaks(
    configs: Mapping[str, Any], generation: GenerationConfig, size: int, branches: int = 2, rows: int = 1
) -> Iterator[int]:
    """Bytes on the device at most under each of ECONOMIES: weights, and so many times the widest activation.

    How many was counted on the released networks by `tools.cost.memory`, which says what it leaves out. `size` is that
    of a number, in bytes; `branches` is 1 for a run without guidance, `rows` the batch's.
    """
    with torch.device("meta"):
        clip = ImageEncoder(configs.get("clip", ClipConfig()))
        parts = clip, AutoencoderKLTemporalDecoder(configs["vae"]), SpatioTemporalUNet(configs["unet"])
    clip, vae, unet = (size * sum(p.numel() for p in part.parameters()) for part in parts)
    t, chunk, pixels = generation.num_frames, generation.decode_chunk, generation.size[0] * generation.size[1]
    frame = rows * size * pixels * configs["vae"].block_out_channels[0]
    tokens = size * t * pixels // configs["vae"].factor ** 2 * configs["unet"].block_out_channels[0]
    for _, slices, hold, visiting, in_turn in ECONOMIES:
        step = (25.1 if slices == 1 else 16.1) * (1 if in_turn else branches * rows) * tokens
        held = {"two": 2, "one": 1, "host": 0}[hold] * t
        decode = max(min(held, t) + 5.3 * chunk, held + 2.2) * frame
        encode = 4 * (5 * frame + 0.35 * vae) / size  # in float32
        there = (unet, vae) if visiting else (clip + vae + unet,) * 2
        yield int(max(there[0] + step, there[1] + max(decode, encode)))


MARGIN = 0.9  # of what a device has; the rest is left to what is not counted


def room(device: torch.device) -> int | None:
    """Bytes that torch can have on a device, with those that it has already; None where nobody says."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) if device.type == "cuda" else None


def settle(svd: StableVideoDiffusion, used: Mapping[str, Any], rows: int = 1) -> str:
    """Give a model the gentlest economy that fits on its device for the settings in use; a line on it, if it saves."""
    if (has := room(svd.device)) is None:
        return ""
    generation = GenerationConfig(**{name: used[name] for name in vars(svd.generation)})
    branches = 1 if used["cut_step"] == 1 or set(generation.guidance) == {1} else 2
    configs = {part: getattr(svd, part).config for part in ("unet", "vae", "clip")}
    economy, line = fitting(peaks(configs, generation, svd.vae.quant_conv.weight.itemsize, branches, rows), has)
    svd.economise(economy)
    return line


def fitting(needs: Iterable[int], has: int) -> tuple[Economy, str]:
    """The gentlest of ECONOMIES with these `peaks` that fits a device of so many bytes; a line on it, if it saves."""
    needs = list(needs)
    full, at = needs[0], next((i for i, need in enumerate(needs) if need <= MARGIN * has), len(needs) - 1)
    economy, need = ECONOMIES[at], needs[at]
    remedy = "" if need <= MARGIN * has else ", too much too: lower --frames or --size"
    free = f"full speed needs {full / 1e9:.1f} GB, free are {has / 1e9:.1f}"
    return economy, "" if need == full and not remedy else f"{free}: {economy.name}, {need / 1e9:.1f} GB{remedy}"
