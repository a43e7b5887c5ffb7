"""Is minisvd as fast as diffusers? Both run in turn, in one process, on the same weights and inputs.

    python -m tools.cost.benchmark                                                        the ratio, on the CPU
    python -m tools.cost.benchmark --device cuda --dtype float16 --config full --frames 14 --size 1024x576
    python -m tools.cost.benchmark --part decode --config full --size 192x128 --repeats 5

The part is a forward of the UNet, or decoding: diffusers' of all frames at once, ours with several settings.
First the outputs are compared (the UNet with diffusers' residual eps set to the original 1e-5), which warms up; then
A B B A A B B A ... are timed, a forward each. The ratio is median(minisvd) / median(diffusers): below 1, minisvd is
faster. Its interval holds the middle 95 % of ratios of medians over resampled rounds (bootstrap).

A GPU is timed by the wall clock, and its name and times are printed. A CPU runs on one thread and is timed in processor
time, of which other programs take less away; its times say little about another CPU, so only the ratio is printed.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKLTemporalDecoder as DiffusersVAE
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from torch import Tensor, nn
from tqdm import trange

import minisvd.diffusers
from minisvd.adapt import fold
from minisvd.config import GenerationConfig, UNetConfig, VAEConfig
from minisvd.unet import SpatioTemporalUNet
from minisvd.vae import AutoencoderKLTemporalDecoder, Hold
from tools.measure.metrics import bootstrap_interval
from tools.output import table

CONFIGS = {
    "tiny": UNetConfig(block_out_channels=(32, 64, 64, 64), num_attention_heads=(1, 2, 2, 2), cross_attention_dim=64),
    "small": UNetConfig(block_out_channels=(64, 128, 256, 256), num_attention_heads=(2, 4, 8, 8)),
    "full": UNetConfig(),
}
VAE_WIDTHS = {"tiny": (32, 32, 64, 64), "small": (64, 128, 256, 256), "full": VAEConfig().block_out_channels}
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


def rounds(forwards: Sequence[Callable[[], Tensor]], repeats: int, device: str) -> np.ndarray:
    """Seconds [repeats, forwards]: each forward once a round, in the opposite order every other round."""
    times = np.empty((repeats, len(forwards)))
    for i in trange(repeats, desc="rounds", disable=None):
        for j in range(len(forwards))[:: 1 if i % 2 == 0 else -1]:
            times[i, j] = seconds(forwards[j], device)
    return times


def ratio(times: np.ndarray) -> str:
    """Median of the first column over that of the second, with its interval."""
    low, high = bootstrap_interval(times, lambda rows: float(np.divide(*np.median(rows, axis=0))))
    return f"{np.divide(*np.median(times, axis=0)):.3f}  [{low:.3f}, {high:.3f}]"


def unet_forwards(args: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """diffusers' UNet on one input, ours in the two builds that are the same function, and our drop-in."""
    dtype, config = DTYPES[args.dtype], CONFIGS[args.config]
    w, h = (int(side) // 8 for side in args.size.split("x"))
    ours, theirs = both_unets(config, args.device, dtype)
    inputs = example_inputs(config, args.frames, w, h, args.device, dtype)
    folded = fold(ours, "lossless")
    with torch.device("meta"):
        dropped_in: Any = minisvd.diffusers.UNetSpatioTemporalConditionModel.from_config(theirs.config)
    dropped_in.adopt(folded)
    return {
        "diffusers": lambda: theirs(*inputs, return_dict=False)[0],
        "minisvd": lambda: ours(*inputs),
        "minisvd, lossless": lambda: folded(*inputs),
        "minisvd.diffusers, lossless": lambda: dropped_in(*inputs, return_dict=False)[0],  # as their pipeline calls it
    }


def decode_forwards(args: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """diffusers' decoding of all frames at once, and ours at several settings, the default first."""
    dtype, widths = DTYPES[args.dtype], VAE_WIDTHS[args.config]
    w, h = (int(side) // 8 for side in args.size.split("x"))
    torch.manual_seed(0)
    kinds: Any = ("DownEncoderBlock2D",) * len(widths)
    theirs = DiffusersVAE(block_out_channels=widths, down_block_types=kinds, layers_per_block=2)
    nn.Module.to(theirs, args.device, dtype).eval()
    with torch.device("meta"):
        ours = AutoencoderKLTemporalDecoder(VAEConfig(block_out_channels=widths)).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    latents = torch.randn(1, args.frames, 4, h, w, generator=torch.Generator().manual_seed(1)).to(args.device, dtype)

    def setting(chunk: int, hold: Hold) -> Callable[[], Tensor]:
        return lambda: ours.decode(latents, chunk, hold)[0]

    default = GenerationConfig.decode_chunk
    settings: list[tuple[int, Hold]] = [(default, "two"), (1, "two"), (args.frames, "two"), (default, "one")]
    z = latents[0] / ours.config.scaling_factor
    forwards = {"diffusers": lambda: theirs.decode(z, args.frames, return_dict=False)[0]}
    return forwards | {f"minisvd, chunk {chunk}, hold {hold}": setting(chunk, hold) for chunk, hold in settings}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("unet", "decode"), default="unet")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--config", choices=CONFIGS, default="small")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", default="256x256", help="pixels, WxH, multiples of 64 (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="forwards of each (default: %(default)s)")
    args = parser.parse_args()

    torch.set_num_threads(1)
    forwards = {"unet": unet_forwards, "decode": decode_forwards}[args.part](args)
    theirs = forwards["diffusers"]()
    errors = {name: relative_error(forward(), theirs) for name, forward in forwards.items()}
    if not max(errors.values()) <= TOLERANCE[DTYPES[args.dtype]]:
        raise SystemExit(f"the outputs differ, relative to the largest: {errors}; need {TOLERANCE[DTYPES[args.dtype]]}")

    times = rounds([*forwards.values()], args.repeats, args.device)
    gpu = args.device.startswith("cuda")
    where = torch.cuda.get_device_name(args.device) if gpu else "CPU"
    print(f"{args.part}, {args.config} configuration, {args.frames} frames of {args.size}, {args.dtype}, {where},")
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, {args.repeats} forwards of each")
    titles = ("against diffusers", "largest difference", *(["median"] if gpu else []), "/ diffusers", "95 % interval")
    rows = []
    for i, name in list(enumerate(forwards))[1:]:
        median = [f"{np.median(times[:, i]) * 1e3:.1f} ms"] if gpu else []
        rows.append((name, f"{errors[name]:.1e}", *median, *ratio(times[:, [i, 0]]).split("  ")))
    print(table(titles, "l" + "r" * (len(titles) - 1), rows))


if __name__ == "__main__":
    main()
