"""Peak memory of one video at any size, counted without a GPU: `python -m tools.cost.memory --model svd-xt`.

The released network runs on tensors that have shapes and no data, and every storage is counted from the operation
that makes it until its last reference goes: a view is no new storage, nor is what works in place. What is moved to
the host leaves the count, and enters it again as it comes back. Attention counts as a fused kernel's: its output and
nothing else. Not counted is what a device's libraries take: the context, convolution workspaces, fragmentation.
"""

import argparse
import weakref
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from typing_extensions import Self

from minisvd import (
    PRESETS,
    AutoencoderKLTemporalDecoder,
    ClipConfig,
    GenerationConfig,
    ImageEncoder,
    SpatioTemporalUNet,
    UNetConfig,
    VAEConfig,
)
from minisvd.memory import ECONOMIES, Economy, sliced
from minisvd.vae import Hold
from tools.output import table


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
        result = func(*args, **(kwargs or {}))
        results = [result] if isinstance(result, Tensor) else tree_iter(result)
        storages = [tensor.untyped_storage() for tensor in results if isinstance(tensor, Tensor)]
        if new := [storage for storage in storages if storage._cdata not in self.sizes]:
            tensors = [tensor for tensor in tree_iter(args) if isinstance(tensor, Tensor)]
            given = {tensor.untyped_storage()._cdata for tensor in tensors}
            on_host = self.moving_to == "cpu" if self.moving_to else any(map(self.is_on_host, tensors))
            for storage in new:  # what was there before, a weight, may come back as itself or as a view
                if storage._cdata not in given:
                    self.count(storage, on_host)
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
        device = args[1] if func is Tensor.to and isinstance((*args, None)[1], torch.device) else None
        if device is None or not args[0].is_meta:
            return func(*args, **(kwargs or {}))
        if (device.type == "cpu") == self.live.is_on_host(args[0]):
            return args[0]
        self.live.moving_to = device.type
        copy = args[0].clone()
        self.live.moving_to = None
        return copy


def fused(q: Tensor, *_: Any, **__: Any) -> Tensor:
    """What a fused attention kernel allocates."""
    return torch.empty_like(q)


@cache
def released(dtype: torch.dtype) -> tuple[SpatioTemporalUNet, AutoencoderKLTemporalDecoder, ImageEncoder]:
    """The released networks without their data."""
    with torch.device("meta"):
        parts = SpatioTemporalUNet(UNetConfig()), AutoencoderKLTemporalDecoder(VAEConfig()), ImageEncoder(ClipConfig())
    return parts[0].to(dtype), parts[1].to(dtype), parts[2].to(dtype)


@cache
@torch.inference_mode()
def peak_of(stage: str, dtype: torch.dtype, size: tuple[int, int], t: int, *how: Any) -> float:
    """Gigabytes that a stage allocates at most: "encode"; "one step" of so many rows, in so many slices; "decode" in
    such chunks, with such a hold."""
    unet, vae, _ = released(dtype)
    h, w = size[1] // 8, size[0] // 8
    with torch.device("meta"):
        if stage == "encode":
            run = partial(vae.encode, torch.empty(1, 3, size[1], size[0]))
        elif stage == "decode":
            run = partial(vae.decode, torch.empty(1, t, 4, h, w), *how)
        else:
            b, slices = how
            sample, embeds = torch.empty(b, t, 8, h, w, dtype=dtype), torch.empty(b, 1, 1024, dtype=dtype)
            run = partial(sliced(unet, slices), sample, torch.empty(()), embeds, torch.empty(b, 3))
    original, F.scaled_dot_product_attention = F.scaled_dot_product_attention, fused
    try:
        with LiveBytes() as live:
            run()
    finally:
        F.scaled_dot_product_attention = original
    return live.peak / 1e9


def peaks(
    generation: GenerationConfig, dtype: torch.dtype, guided: bool = True, economy: Economy = ECONOMIES[0]
) -> dict[str, float]:
    """Gigabytes: the weights of all three parts, the peak of what each stage allocates on top of those that it finds
    on the device, and the largest sum of the two."""
    unet, vae, clip = released(dtype)
    rows = 1 + (guided and not economy.in_turn)
    stages = {
        "encode": (),
        "one step": (rows, economy.slices),
        "decode": (generation.decode_chunk, economy.hold),
    }
    weights = {part: sum(p.nbytes for p in part.parameters()) / 1e9 for part in (unet, vae, clip)}
    everything = sum(weights.values())
    there = [weights[part] if economy.visiting else everything for part in (vae, unet, vae)]
    found = {
        stage: peak_of(stage, dtype, generation.size, generation.num_frames, *how) for stage, how in stages.items()
    }
    largest = max(map(sum, zip(there, found.values(), strict=True)))
    return {"weights": everything} | found | {"largest sum": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of one video, counted without a GPU.")
    parser.add_argument("--model", choices=PRESETS, default="svd-xt")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--decode-chunk", type=int, nargs="+", default=[GenerationConfig.decode_chunk])
    parser.add_argument("--decode-hold", choices=get_args(Hold), nargs="+", default=["two"])
    parser.add_argument("--economies", action="store_true", help="every setting of minisvd.memory, to --low-memory")
    args = parser.parse_args()
    titles = (
        "model",
        "dtype",
        "decode chunk",
        "setting",
        "weights",
        "encode",
        "a guided step",
        "decode",
        "largest sum",
    )
    rows = []
    holds = [Economy(f"hold {hold}", hold=hold) for hold in args.decode_hold]
    for chunk, economy in product(args.decode_chunk, ECONOMIES if args.economies else holds):
        generation = replace(PRESETS[args.model].generation, decode_chunk=chunk)
        found = peaks(generation, getattr(torch, args.dtype), economy=economy)
        rows.append((args.model, args.dtype, str(chunk), economy.name, *(f"{each:.1f} GB" for each in found.values())))
    print(table(titles, "llrlrrrrr", rows))


if __name__ == "__main__":
    main()
