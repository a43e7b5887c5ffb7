"""Peak memory of one video at any size, counted without a GPU: `python -m tools.cost.memory --model svd-xt`.

The released network runs on tensors that have shapes and no data, and every storage is counted from the operation
that makes it until its last reference goes: a view is no new storage, nor is what works in place. What is moved to
the host leaves the count, and enters it again as it comes back. Attention counts as a fused kernel's: its output and
nothing else. Not counted is what a device's libraries take: the context, convolution workspaces, fragmentation.
"""

import argparse
import weakref
from dataclasses import replace
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


def fused(q: Tensor, *_: Tensor) -> Tensor:
    """What a fused attention kernel allocates."""
    return torch.empty_like(q)


@torch.inference_mode()
def peaks(
    generation: GenerationConfig, dtype: torch.dtype, guided: bool = True, economy: Economy = ECONOMIES[0]
) -> dict[str, float]:
    """Gigabytes: the weights of all three parts, the peak of what each stage allocates on top of those that it finds
    on the device, and the largest sum of the two."""
    (width, height), t = generation.size, generation.num_frames
    with torch.device("meta"):
        unet = SpatioTemporalUNet(UNetConfig()).to(dtype)
        vae = AutoencoderKLTemporalDecoder(VAEConfig()).to(dtype)
        clip = ImageEncoder(ClipConfig()).to(dtype)
        b, h, w = 1 + (guided and not economy.in_turn), height // 8, width // 8
        image = torch.empty(1, 3, height, width)
        sample, latents = torch.empty(b, t, 8, h, w, dtype=dtype), torch.empty(1, t, 4, h, w)
        embeds, c_noise, ids = torch.empty(b, 1, 1024, dtype=dtype), torch.empty(()), torch.empty(b, 3)
    stages = {
        "encode": lambda: vae.encode(image),
        "one step": lambda: sliced(unet, economy.slices)(sample, c_noise, embeds, ids),
        "decode": lambda: vae.decode(latents, generation.decode_chunk, economy.hold),
    }
    weights = {part: sum(p.nbytes for p in part.parameters()) / 1e9 for part in (unet, vae, clip)}
    everything = sum(weights.values())
    there = [weights[part] if economy.visiting else everything for part in (vae, unet, vae)]
    result = {"weights": everything}
    original, F.scaled_dot_product_attention = F.scaled_dot_product_attention, fused
    try:
        for name, stage in stages.items():
            with LiveBytes() as live:
                stage()
            result[name] = live.peak / 1e9
    finally:
        F.scaled_dot_product_attention = original
    return result | {"largest sum": max(map(sum, zip(there, [*result.values()][1:], strict=True)))}


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
