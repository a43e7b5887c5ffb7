"""Peak memory of a run, counted without a GPU; what a run can do to take less; and which of it a device needs.

The network runs on tensors that have shapes and no data, and every storage is counted from the operation that makes
it until its last reference goes: a view is no new storage, nor is what works in place. What is moved to the host
leaves the count, and enters it again as it comes back. Attention counts as a fused kernel's: its output and nothing
else. Not counted is what a device's libraries take: the context, convolution workspaces, fragmentation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from typing_extensions import Self

from .adapt import SLICE, slice_feed_forwards
from .checkpoint import checked_dtype
from .clip import ImageEncoder
from .config import ClipConfig, GenerationConfig
from .unet import SpatioTemporalUNet
from .vae import AutoencoderKLTemporalDecoder, Hold

if TYPE_CHECKING:
    from .pipeline import StableVideoDiffusion


@dataclass(frozen=True)
class Economy:
    """What a run does to take less memory, for more time. Its frames are the same, to rounding.

    slices    feed-forwards take 65,536 tokens at a time, at which no time was lost on a CPU
    hold      what decoding holds of a video: `vae.Hold`
    visiting  each part is on the device only while it works, else on the host
    in_turn   the two branches of a guided step run one after the other
    chunk     frames decoded at a time at most; None: as many as the call says
    """

    slices: bool = False
    hold: Hold = "two"
    visiting: bool = False
    in_turn: bool = False
    chunk: int | None = None

    def __str__(self) -> str:
        said = {
            "feed-forwards in slices": self.slices,
            "weights on the device only while they work": self.visiting,
            "one branch at a time": self.in_turn,
            f"decoding with hold={self.hold!r}": self.hold != "two",
        }
        return ", ".join(words for words, done in said.items() if done) or "full speed"


ECONOMIES = (
    Economy(),
    Economy(slices=True, hold="one", chunk=1),
    Economy(slices=True, hold="one", chunk=1, visiting=True),
    Economy(slices=True, hold="one", chunk=1, visiting=True, in_turn=True),
    Economy(slices=True, hold="host", visiting=True, in_turn=True, chunk=1),
)
"""From the gentlest, which is full speed, to the last, which is `low_memory=True`."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make, while they live: `now` and their largest sum, `peak`.

    Shapes without data are all on one device, "meta". Which of them stand for something on the host, and so are not
    counted, is kept here: copies to it, by `Moves`, and what operations make of what is there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}  # of each storage, as counted: 0 on the host
        self.moving_to: str | None = None

    def __enter__(self) -> Self:
        self.moves = Moves(self)
        self.moves.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.moves.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_host = any(self.is_on_host(tensor) for tensor in tree_iter(args) if isinstance(tensor, Tensor))
        if self.moving_to:
            on_host = self.moving_to == "cpu"
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage(), on_host)
        self.peak = max(self.peak, self.now)
        return result

    def is_on_host(self, tensor: Tensor) -> bool:
        return self.sizes.get(tensor.untyped_storage()._cdata) == 0

    def count(self, storage: torch.UntypedStorage, on_host: bool) -> None:
        key, size = storage._cdata, 0 if on_host else storage.nbytes()
        if key not in self.sizes:
            self.sizes[key] = size
            self.now += size
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class Moves(TorchFunctionMode):
    """Between shapes, makes a copy of `tensor.to(device)` where it would be one between host and device."""

    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self.live = live

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = args[1] if func is Tensor.to and isinstance(args[1], torch.device) else None
        if device is None or not args[0].is_meta:
            return func(*args, **(kwargs or {}))
        if (device.type == "cpu") == self.live.is_on_host(args[0]):
            return args[0]
        self.live.moving_to = device.type
        copy = args[0].clone()
        self.live.moving_to = None
        return copy


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention that allocates what a fused kernel does: its output."""
    original, F.scaled_dot_product_attention = F.scaled_dot_product_attention, lambda q, *_, **__: torch.empty_like(q)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


@dataclass(frozen=True)
class Peak:
    """Bytes: all weights; what each stage allocates on top of those that it finds; and the largest sum of the two."""

    weights: int
    stages: dict[str, int]
    largest: int


def peaks(
    configs: Mapping[str, Any],
    generation: GenerationConfig,
    dtype: torch.dtype | str,
    economies: Sequence[Economy] = ECONOMIES,
    branches: int = 2,
) -> Iterator[Peak]:
    """What one video takes on the device under each of `economies`, for parts of `configs` with weights in `dtype`.

    `branches` is 1 for a run without guidance. The latents and the finished frames, a hundredth of it, are left out.
    """
    dtype = checked_dtype(dtype, torch.device("cpu"))
    unet_config, vae_config, t = configs["unet"], configs["vae"], generation.num_frames
    width, height = generation.size
    h, w, c = height // vae_config.factor, width // vae_config.factor, unet_config.in_channels
    with torch.device("meta"):
        clip = ImageEncoder(configs.get("clip", ClipConfig())).to(dtype)
        vae = AutoencoderKLTemporalDecoder(vae_config).to(dtype)
        unet = SpatioTemporalUNet(unet_config).to(dtype)
        image, c_noise = torch.empty(1, 3, height, width), torch.empty(())
        latents = torch.empty(1, t, vae_config.latent_channels, h, w)
        sample = torch.empty(branches, t, c, h, w, dtype=dtype)
        embeds = torch.empty(branches, 1, unet_config.cross_attention_dim, dtype=dtype)
        ids = torch.empty(branches, unet_config.num_time_ids)

    def step(b: int, slices: bool) -> Tensor:
        return slice_feed_forwards(unet, SLICE if slices else None)(sample[:b], c_noise, embeds[:b], ids[:b])

    owners = {"embed": clip, "encode": vae, "one step": unet, "decode": vae}
    run: dict[str, Callable[..., Tensor]] = {
        "embed": lambda: clip(image),
        "encode": lambda: vae.encode(image),
        "one step": step,
        "decode": lambda chunk, hold: vae.decode(latents, chunk, hold),
    }

    @cache
    def count(stage: str, *how: Any) -> int:
        with torch.inference_mode(), fused_attention(), LiveBytes() as live:
            run[stage](*how)
        return live.peak

    weights = {part: sum(p.nbytes for p in part.parameters()) for part in (unet, vae, clip)}
    for economy in economies:
        chunk, b = economy.chunk or generation.decode_chunk, 1 if economy.in_turn else branches
        how = {"one step": (b, economy.slices), "decode": (chunk, economy.hold)}
        stages = {stage: count(stage, *how.get(stage, ())) for stage in run}
        there = {stage: weights[owners[stage]] if economy.visiting else sum(weights.values()) for stage in run}
        yield Peak(sum(weights.values()), stages, max(there[stage] + stages[stage] for stage in run))


def room(device: torch.device) -> int | None:
    """Bytes that torch can have on a device, with those that it has already; None where nobody says."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


MARGIN = 0.9  # of the room; the rest is left to what is not counted


def choose(svd: StableVideoDiffusion, used: Mapping[str, Any]) -> tuple[Economy, str]:
    """The gentlest of ECONOMIES that fits on the model's device for the settings in use; a line on it, if it saves."""
    has = room(svd.device)
    if has is None:
        return ECONOMIES[0], ""
    configs = {part: getattr(svd, part).config for part in ("unet", "vae", "clip")}
    generation = GenerationConfig(**{name: used[name] for name in vars(svd.generation)})
    branches = 1 if used["cut_step"] == 1 or set(generation.guidance) == {1} else 2
    return fitting(peaks(configs, generation, svd.vae.quant_conv.weight.dtype, branches=branches), has)


def fitting(needs: Iterable[Peak], has: int) -> tuple[Economy, str]:
    """The same of what each of ECONOMIES needs, gentlest first, on a device that has so many bytes."""
    seen: list[int] = []
    for need in needs:
        seen.append(need.largest)
        if seen[-1] <= MARGIN * has:
            break
    economy = ECONOMIES[len(seen) - 1]
    if economy == ECONOMIES[0]:
        return economy, ""
    fits = "" if seen[-1] <= MARGIN * has else ", too much too: lower --frames or --size"
    room = f"full speed needs {seen[0] / 1e9:.1f} GB and {has / 1e9:.1f} GB are free"
    return economy, f"{room}; so {economy}, in {seen[-1] / 1e9:.1f} GB{fits}"


def memory_table(weighed: Mapping[str, Peak]) -> str:
    """A line for each economy: GB that each stage allocates, and with the weights that are there the most at once."""
    stages = list(next(iter(weighed.values())).stages)
    lines = ["memory on the device, GB: " + ", ".join([*stages, "and with weights the most at once"])]
    for name, peak in weighed.items():
        numbers = "".join(f"{size / 1e9:>6.1f}" for size in (*peak.stages.values(), peak.largest))
        lines.append(f"{numbers}  {name}")
    return "\n".join(lines)
