"""Peak memory of one video at any size, counted without a GPU: `python -m tools.cost.memory --model svd-xt`.

A row for each setting that is asked for, or with --low-memory for the last of minisvd.memory.ECONOMIES. How it is
counted, and what is not, is said there.
"""

import argparse
from itertools import product
from typing import get_args

import torch

from minisvd import PRESETS, GenerationConfig, UNetConfig, VAEConfig
from minisvd.memory import ECONOMIES, Economy, peaks
from minisvd.vae import Hold
from tools.output import table


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of one video, counted without a GPU.")
    parser.add_argument("--model", choices=PRESETS, default="svd-xt")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--decode-chunk", type=int, nargs="+", default=[GenerationConfig.decode_chunk])
    parser.add_argument("--decode-hold", choices=get_args(Hold), nargs="+", default=["two"])
    parser.add_argument("--slices", action="store_true", help="feed-forwards in slices of tokens")
    parser.add_argument("--in-turn", action="store_true", help="one branch of a guided step at a time")
    parser.add_argument("--low-memory", action="store_true", help="the least that there is, instead of these settings")
    args = parser.parse_args()
    generation, holds = PRESETS[args.model].generation, product(args.decode_chunk, args.decode_hold)
    asked = [Economy(args.slices, hold, in_turn=args.in_turn, chunk=chunk) for chunk, hold in holds]
    economies = [ECONOMIES[-1]] if args.low_memory else asked
    found = peaks({"unet": UNetConfig(), "vae": VAEConfig()}, generation, getattr(torch, args.dtype), economies)
    rows = []
    for economy, peak in zip(economies, found, strict=True):
        sizes = (f"{value / 1e9:.1f} GB" for value in (peak.weights, *peak.stages.values(), peak.largest))
        rows.append((args.model, args.dtype, str(economy.chunk), economy.hold, *sizes))
    titles = ("model", "dtype", "decode chunk", "hold", "weights", "embed", "encode", "one guided step", "decode")
    print(table((*titles, "largest sum"), "llrlrrrrrr", rows))


if __name__ == "__main__":
    main()
