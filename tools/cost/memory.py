"""Peak memory of one video at any size, counted without a GPU: `python -m tools.cost.memory --model svd-xt`.

The released network runs on tensors that have shapes and no data, and every storage is counted from the operation
that makes it until its last reference goes. Attention counts as a fused kernel's: its output and nothing else. What
is not counted is what a device's libraries take for themselves: the context, convolution workspaces, fragmentation.
"""

import argparse
import weakref
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

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
from tools.output import table


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make, while they live: `now` and their largest sum, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def fused(q: Tensor, *_: Tensor) -> Tensor:
    """What a fused attention kernel allocates."""
    return torch.empty_like(q)


@torch.inference_mode()
def peaks(generation: GenerationConfig, dtype: torch.dtype, guided: bool = True) -> dict[str, float]:
    """Gigabytes: the weights of all three parts, and the peak of what each stage allocates on top of them."""
    (width, height), t = generation.size, generation.num_frames
    with torch.device("meta"):
        unet = SpatioTemporalUNet(UNetConfig()).to(dtype)
        vae = AutoencoderKLTemporalDecoder(VAEConfig()).to(dtype)
        clip = ImageEncoder(ClipConfig()).to(dtype)
        b, h, w = 1 + guided, height // 8, width // 8
        image = torch.empty(1, 3, height, width)
        sample, latents = torch.empty(b, t, 8, h, w, dtype=dtype), torch.empty(1, t, 4, h, w)
        embeds, c_noise, ids = torch.empty(b, 1, 1024, dtype=dtype), torch.empty(()), torch.empty(b, 3)
    stages = {
        "encode": lambda: vae.encode(image),
        "one step": lambda: unet(sample, c_noise, embeds, ids),
        "decode": lambda: vae.decode(latents, generation.decode_chunk),
    }
    result = {"weights": sum(p.nbytes for part in (unet, vae, clip) for p in part.parameters()) / 1e9}
    original, F.scaled_dot_product_attention = F.scaled_dot_product_attention, fused
    try:
        for name, stage in stages.items():
            with LiveBytes() as live:
                stage()
            result[name] = live.peak / 1e9
    finally:
        F.scaled_dot_product_attention = original
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of one video, counted without a GPU.")
    parser.add_argument("--model", choices=PRESETS, default="svd-xt")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--decode-chunk", type=int, nargs="+", default=[GenerationConfig.decode_chunk])
    args = parser.parse_args()
    titles = ("model", "dtype", "decode chunk", "weights", "encode", "one guided step", "decode", "largest sum")
    rows = []
    for chunk in args.decode_chunk:
        generation = replace(PRESETS[args.model].generation, decode_chunk=chunk)
        found = peaks(generation, getattr(torch, args.dtype))
        total = found["weights"] + max(value for name, value in found.items() if name != "weights")
        rows.append((args.model, args.dtype, str(chunk), *(f"{value:.1f} GB" for value in (*found.values(), total))))
    print(table(titles, "llrrrrrr", rows))


if __name__ == "__main__":
    main()
