"""Is minisvd's UNet as fast as diffusers'? Both run in turn, in one process, on the same weights and inputs.

    python -m tools.cost.benchmark                                                        the ratio, on the CPU
    python -m tools.cost.benchmark --vcut lossless                                        the same, folded
    python -m tools.cost.benchmark --device cuda --dtype float16 --config full --frames 14 --size 1024x576

First the outputs are compared (diffusers' residual eps is set to the original 1e-5); then, after a warm-up, A B B A
A B B A ... are timed, a forward each. The ratio is median(minisvd) / median(diffusers): below 1, minisvd is faster.
Its interval holds the middle 95 % of ratios of medians over resampled pairs (bootstrap).

A GPU is timed by the wall clock, and its name and times are printed. A CPU runs on one thread and is timed in processor
time, of which other programs take less away; its times say little about another CPU, so only the ratio is printed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import numpy as np
import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from torch import Tensor, nn

from minisvd.adapt import fold
from minisvd.config import UNetConfig
from minisvd.unet import SpatioTemporalUNet
from tools.measure.metrics import bootstrap_interval

CONFIGS = {
    "tiny": UNetConfig(block_out_channels=(32, 64, 64, 64), num_attention_heads=(1, 2, 2, 2), cross_attention_dim=64),
    "small": UNetConfig(block_out_channels=(64, 128, 256, 256), num_attention_heads=(2, 4, 8, 8)),
    "full": UNetConfig(),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}  # relative to the largest output


def both_unets(
    config: UNetConfig, device: str, dtype: torch.dtype
) -> tuple[SpatioTemporalUNet, UNetSpatioTemporalConditionModel]:
    """minisvd's and diffusers' UNet around one copy of random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        theirs = UNetSpatioTemporalConditionModel(
            block_out_channels=config.block_out_channels,
            num_attention_heads=config.num_attention_heads,
            cross_attention_dim=config.cross_attention_dim,
        )
    nn.Module.to(theirs, device, dtype).eval()  # diffusers' own `to` warns of nothing
    for module in theirs.modules():
        if isinstance(module, ResnetBlock2D | TemporalResnetBlock):
            module.norm1.eps = module.norm2.eps = 1e-5
    with torch.device("meta"):
        ours = SpatioTemporalUNet(config)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours.eval(), theirs


def example_inputs(
    config: UNetConfig, frames: int, w: int, h: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """sample [1,t,8,h,w], c_noise [1], image_embeds [1,1,c'], added_time_ids [1,3]."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(1, frames, config.in_channels, h, w, generator=generator)
    embeds = torch.randn(1, 1, config.cross_attention_dim, generator=generator)
    ids = torch.tensor([[6.0, 127.0, 0.02]])
    return tuple(x.to(device, dtype) for x in (sample, torch.tensor([0.5]), embeds, ids))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over largest magnitude."""
    return ((ours - theirs).float().abs().max() / theirs.float().abs().max()).item()


def seconds(forward: Callable[[], Tensor], device: str) -> float:
    """How long one forward takes: wall clock on a GPU, processor time on a CPU."""
    if not device.startswith("cuda"):
        start = time.process_time()
        forward()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    forward()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Timing:
    """Medians in seconds, and their ratio with its interval."""

    ours: float
    theirs: float
    low: float
    high: float

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


def compare(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], repeats: int, device: str) -> Timing:
    """Time two forwards `repeats` times each, in turn; each goes first every other time."""
    for forward in (ours, theirs) * 2:
        forward()
    pairs = []
    for i in range(repeats):
        forwards = (ours, theirs) if i % 2 == 0 else (theirs, ours)
        times = [seconds(forward, device) for forward in forwards]
        pairs.append(times if i % 2 == 0 else times[::-1])
    low, high = bootstrap_interval(np.array(pairs), lambda rows: float(np.divide(*np.median(rows, axis=0))))
    a, b = zip(*pairs, strict=True)
    return Timing(statistics.median(a), statistics.median(b), low, high)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--config", choices=CONFIGS, default="small")
    parser.add_argument("--vcut", choices=("off", "lossless"), default="off", help="minisvd's build; one function")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", default="256x256", help="pixels, WxH, multiples of 64 (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="forwards of each (default: %(default)s)")
    args = parser.parse_args()

    torch.set_num_threads(1)
    dtype, config = DTYPES[args.dtype], CONFIGS[args.config]
    w, h = (int(side) // 8 for side in args.size.split("x"))
    ours, theirs = both_unets(config, args.device, dtype)
    ours = fold(ours, "lossless") if args.vcut == "lossless" else ours
    inputs = example_inputs(config, args.frames, w, h, args.device, dtype)

    error = relative_error(ours(*inputs), theirs(*inputs, return_dict=False)[0])
    if not error <= TOLERANCE[dtype]:
        raise SystemExit(f"the outputs differ by {error:.1e} of the largest; need at most {TOLERANCE[dtype]:.0e}")

    timing = compare(lambda: ours(*inputs), lambda: theirs(*inputs, return_dict=False)[0], args.repeats, args.device)
    where = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "CPU"
    print(f"UNet forward, {args.config} configuration, {args.frames} frames of {args.size}, {args.dtype}, {where},")
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    print(f"{versions}, {args.repeats} forwards of each, vcut {args.vcut}")
    print(f"largest difference of outputs   {error:.1e} of the largest output")
    if args.device.startswith("cuda"):
        print(f"minisvd, median                 {timing.ours * 1e3:.1f} ms")
        print(f"diffusers, median               {timing.theirs * 1e3:.1f} ms")
    print(f"minisvd / diffusers             {timing.ratio:.3f}  [{timing.low:.3f}, {timing.high:.3f}]")


if __name__ == "__main__":
    main()
