"""What a model's UNet costs, as closed formulas: a step by kinds of work or block by block, a whole run, its memory.

    python -m tools.cost.account                             svd, 25 guided steps at 1024x576
    python -m tools.cost.account --vcut on --cut-step 17     and where the rest of the work went
    python -m tools.cost.account --tree                      the U as it runs, its skips as brackets
    python -m tools.cost.account --memory float16            the peak on the device, from full speed to --low-memory

Nothing is computed and no weights are read. `minisvd account` counts one forward as torch does, in a second or two.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace

from minisvd.cli import Parser, complain, parse_size, sentence
from minisvd.config import DTYPES, VCUT, check
from minisvd.folder import resolve_configs
from tools.cost.accounting import (
    BUILDS,
    by_kind,
    drawn_in,
    ledger,
    opened,
    run_cost,
    table,
    total,
    tree,
    unet_blocks,
)


def account(args: argparse.Namespace) -> None:
    """Parameters and MACs of a model's UNet, from its configuration alone."""
    configs, generation = resolve_configs(args.model, args.offline)
    config, factor = configs["unet"], configs["vae"].factor
    vcut = config.vcut if args.vcut is None else VCUT[args.vcut]
    frames = check("num_frames", generation.num_frames if args.frames is None else args.frames)
    steps = check("steps", generation.steps if args.steps is None else args.steps)
    width, height = check("size", args.size or generation.size)
    pixels = config.stride * factor
    if width % pixels or height % pixels:
        raise ValueError(f"size is {width}x{height}; need multiples of {pixels} pixels")
    latent, build = (width // factor, height // factor), BUILDS[vcut]

    run = run_cost(config, frames, latent, steps, args.cut_step, build)
    branches = 2 if run.guided else 1
    blocks = list(unet_blocks(config, frames, latent, branches, build))
    sites = [site for block in blocks for site in block.sites]
    needs, configs["unet"] = {}, replace(config, vcut=vcut)
    if args.memory:
        from minisvd.memory import ECONOMIES, peaks  # and with it torch, which nothing else needs

        chosen, bytes_each = replace(generation, num_frames=frames, size=(width, height)), DTYPES[args.memory]
        needs = {
            of.name: need for of, need in zip(ECONOMIES, peaks(configs, chosen, bytes_each, branches), strict=True)
        }
    if args.json:
        asked = {"model": args.model, "vcut": vcut, "frames": frames, "size": (width, height), "steps": steps}
        asked |= {"cut_step": args.cut_step, "branches": branches, "memory": needs}
        kinds = {kind: asdict(cost) for kind, cost in by_kind(sites).items()}
        drawn = {"blocks": [asdict(block) for block in blocks]} if args.tree else {}
        print(json.dumps({**asked, "kinds": kinds, "total": asdict(total(sites)), **drawn, "run": asdict(run)}))
        return
    step = f"one {'guided' if run.guided else 'single'} step, {branches} x {frames} frames of {width}x{height}"
    parts = [table(sites)]
    if args.tree:
        first = {block.name.split(".")[-2]: block for block in reversed(blocks) if "." in block.name}
        parts = [tree(blocks), opened(first["resnets"]), opened(first["attentions"])]
    parts += ["\n".join(f"{need / 1e9:7.1f} GB on the device, {name}" for name, need in needs.items())] if needs else []
    text = "\n\n".join([f"UNet of {args.model}, vcut={vcut!r}: {step}", *parts, ledger(run)])
    print(drawn_in(text, sys.stdout.encoding or "utf-8"))


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 with one sentence for what a user has got wrong."""
    parser = Parser("account", description="What a model's UNet costs, as closed formulas.", allow_abbrev=False)
    add = parser.add_argument
    names = "svd (default), svd-xt, svd-xt-1-1, tiny, a folder, a .safetensors file, or a hub id"
    add("--model", default="svd", metavar="M", help=names)
    add("--offline", action="store_true", help="use only what was downloaded before")
    add("--vcut", choices=VCUT, help="the UNet's build (default: the folder's, else off)")
    add("--frames", type=int, metavar="N", help="frames (default: the model's)")
    add("--size", type=parse_size, metavar="WxH", help="pixels, such as 1024x576 (default: the model's)")
    add("--cut-step", type=int, metavar="C", help="guide only the steps before C, the first being 1 (default: all)")
    add("--steps", type=int, metavar="N", help="noise levels to walk through (default: the model's)")
    add("--memory", choices=DTYPES, help="count the peak on the device too, from full speed to --low-memory")
    add("--tree", action="store_true", help="draw the U as it runs, block by block")
    add("--json", action="store_true", help="print one JSON object")
    try:
        account(parser.parse_args(argv))
    except (OSError, ValueError) as error:
        return complain(sentence(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
