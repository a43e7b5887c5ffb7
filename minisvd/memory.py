"""Peak memory of a run, counted without a GPU; what a run can do to take less; and which of it a device needs.

The network runs on shapes without data, and every storage counts from the operation that makes it until its last
reference goes: not views, nor what is done in place or copied to the host. Attention counts as a fused kernel's output.
Not counted is what a device's libraries take: the context, convolution workspaces, fragmentation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .attention import FeedForward
from .clip import ImageEncoder
from .config import ClipConfig, GenerationConfig
from .unet import SpatioTemporalUNet
from .vae import AutoencoderKLTemporalDecoder, Hold

if TYPE_CHECKING:
    from .pipeline import StableVideoDiffusion

HOST = torch.device("cpu")


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


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make, while they live: `now` and their largest sum, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = func is torch.ops.aten._to_copy.default and args[0].is_meta and (kwargs or {}).get("device") == HOST
        result = torch.empty_like(args[0]) if leaves else func(*args, **kwargs or {})
        given = {storage._cdata for storage in storages(args)}  # their views are nothing new
        for storage in storages(result):
            if storage._cdata not in self.live and storage._cdata not in given:
                size = 0 if leaves else storage.nbytes()
                self.change(storage._cdata, size)
                weakref.finalize(storage, self.change, storage._cdata, -size)
        self.peak = max(self.peak, self.now)
        return result

    def change(self, key: int, size: int) -> None:
        self.live ^= {key}
        self.now += size


def sliced(unet: SpatioTemporalUNet, slices: int) -> SpatioTemporalUNet:
    """The UNet, from now on with feed-forwards in so many slices."""
    for module in unet.modules():
        if isinstance(module, FeedForward):
            module.slices = slices
    return unet


def storages(tensors: Any) -> Iterator[torch.UntypedStorage]:
    return (each.untyped_storage() for each in tree_iter(tensors) if isinstance(each, Tensor))


def count(run: Callable[[], object]) -> int:
    """The most bytes that live at once of what `run` makes."""
    fused = patch.object(F, "scaled_dot_product_attention", lambda q, *_: torch.empty_like(q))
    with torch.no_grad(), fused, LiveBytes() as live:
        run()
    return live.peak


def peaks(
    configs: Mapping[str, Any], generation: GenerationConfig, dtype: torch.dtype | str, branches: int = 2
) -> Iterator[dict[str, int]]:
    """Bytes on the device in each stage of one video, weights included, under each of ECONOMIES.

    The parts are those of `configs`, in `dtype`; `branches` is 1 for a run without guidance. The latents and the
    finished frames, a hundredth of it, are left out.
    """
    (width, height), t, factor = generation.size, generation.num_frames, configs["vae"].factor
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with torch.device("meta"):
        clip, vae = ImageEncoder(configs.get("clip", ClipConfig())), AutoencoderKLTemporalDecoder(configs["vae"])
        parts = clip, vae, unet = clip.to(dtype), vae.to(dtype), SpatioTemporalUNet(configs["unet"]).to(dtype)
        image, latents = torch.empty(1, 3, height, width), torch.empty(1, t, 4, height // factor, width // factor)
        c, e, n = unet.config.in_channels, unet.config.cross_attention_dim, unet.config.num_time_ids
        shapes: list[tuple[int, ...]] = [(t, c, *latents.shape[3:]), (), (1, e), (n,)]
        inputs = [torch.empty(branches, *shape, dtype=dtype) for shape in shapes]
    encode = count(partial(vae.encode, image))
    step = cache(lambda b, slices: count(partial(sliced(unet, slices), *(x[:b] for x in inputs))))
    decode = cache(lambda hold: count(partial(vae.decode, latents, generation.decode_chunk, hold)))
    weights = {part: sum(p.nbytes for p in part.parameters()) for part in parts}
    for economy in ECONOMIES:
        there = weights if economy.visiting else dict.fromkeys(weights, sum(weights.values()))
        steps = step(1 if economy.in_turn else branches, economy.slices)
        sums = there[vae] + encode, there[unet] + steps, there[vae] + decode(economy.hold)
        yield dict(zip(("encode", "one step", "decode"), sums, strict=True))


MARGIN = 0.9  # of what a device has; the rest is left to what is not counted


def room(device: torch.device) -> int | None:
    """Bytes that torch can have on a device, with those that it has already; None where nobody says."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) if device.type == "cuda" else None


def settle(svd: StableVideoDiffusion, used: Mapping[str, Any]) -> str:
    """Give a model the gentlest economy that fits on its device for the settings in use; a line on it, if it saves."""
    if (has := room(svd.device)) is None:
        return ""
    generation = GenerationConfig(**{name: used[name] for name in vars(svd.generation)})
    branches = 1 if used["cut_step"] == 1 or set(generation.guidance) == {1} else 2
    configs = {part: getattr(svd, part).config for part in ("unet", "vae", "clip")}
    economy, line = fitting(peaks(configs, generation, svd.vae.quant_conv.weight.dtype, branches), has)
    svd.economise(economy)
    return line


def fitting(needs: Iterable[dict[str, int]], has: int) -> tuple[Economy, str]:
    """The gentlest of ECONOMIES with these `peaks` that fits a device of so many bytes; a line on it, if it saves."""
    full = need = 0
    for economy, stages in zip(ECONOMIES, needs, strict=False):  # noqa: B007, as the last one stays
        need = max(stages.values())
        full = full or need
        if need <= MARGIN * has:
            break
    remedy = "" if need <= MARGIN * has else ", too much too: lower --frames or --size"
    line = (
        f"full speed needs {full / 1e9:.1f} GB, {has / 1e9:.1f} are free: {economy.name}, {need / 1e9:.1f} GB{remedy}"
    )
    return economy, "" if need == full and not remedy else line
