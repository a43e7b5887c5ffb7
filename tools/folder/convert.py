"""Write any model as a folder, in another dtype or build.

    python -m tools.folder.convert svd-xt svd-xt-vcut --vcut on

The folder loads directly, with no fold left to do: a smaller file, read faster. Its unet/config.json has a field
`vcut` where the build is not the released one; such a UNet only minisvd can read.
"""

import argparse
import sys
from pathlib import Path

import torch

import minisvd
from minisvd.cli import VCUT


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write any model as a folder, in another dtype or build.")
    parser.add_argument("source", help="preset, folder, .safetensors file or hub id")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16")
    parser.add_argument("--vcut", choices=[*filter(None, VCUT)], help="default: the source's own build")
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
        svd.save(args.out, dtype)
    except (OSError, ValueError) as error:
        print(f"convert: error: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
