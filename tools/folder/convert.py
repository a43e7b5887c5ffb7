"""Write any model as a folder, in another dtype or build.

    python -m tools.folder.convert svd-xt svd-xt-vcut --vcut on

The folder loads directly, with no fold left to do: a smaller file, read faster. Its unet/config.json has a field
`vcut` where the build is not the released one; such a UNet only minisvd can read.

    python -m tools.folder.convert my-depth-model my-depth-unet --vcut lossless --key zeros

A network that only ever hears one embedding, zeros or that of one picture, needs no linear maps either: with `--key`
the UNet alone is written, each of its cross-attentions a bias.
"""

import argparse
import sys
from pathlib import Path

import torch

import minisvd
from minisvd.config import VCUT
from minisvd.images import load_image
from minisvd.pipeline import StableVideoDiffusion


def key_of(svd: StableVideoDiffusion, what: str) -> torch.Tensor:
    """[c']: zeros, or the embedding of a picture as `generate` would hear it."""
    if what == "zeros":
        return torch.zeros(svd.clip.config.projection_dim)
    with torch.no_grad():
        return svd.clip(load_image(what, svd.generation.size))[0, 0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write any model as a folder, in another dtype or build.")
    parser.add_argument("source", help="preset, folder, .safetensors file or hub id")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16")
    parser.add_argument("--vcut", choices=VCUT, help="default: the source's own build")
    parser.add_argument(
        "--key", metavar="zeros|IMAGE", help="the one embedding that the UNet will hear: the UNet alone"
    )
    parser.add_argument("--variant")
    parser.add_argument("--revision")
    parser.add_argument("--offline", action="store_true")
    args = parser.parse_args(argv)
    try:
        if args.out.exists():
            raise FileExistsError(f"{args.out} exists: name a new folder")
        dtype = getattr(torch, args.dtype)
        where = {"variant": args.variant, "revision": args.revision, "offline": args.offline}
        svd = minisvd.load(args.source, dtype=dtype, vcut=VCUT.get(args.vcut or ""), **where)
        if args.key is None:
            svd.save(args.out, dtype)
        else:
            minisvd.fold(svd.unet, svd.unet.config.vcut, key_of(svd, args.key)).save(args.out)
    except (OSError, ValueError) as error:
        print(f"convert: error: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
