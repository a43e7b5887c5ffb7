"""The command line: `minisvd generate` makes videos, `info` says what a model is made of, `verify` checks its theorem.

Results go to stdout, bars and complaints to stderr. What a user can get wrong is checked before a model is loaded and
ends with status 2 and one sentence; a model that fails `verify` with 1, Ctrl-C with 130. torch is imported only by
what needs it, so `--help` is instant.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .config import CHOICES, DTYPES, SETTINGS, VCUT, check

if TYPE_CHECKING:
    from collections.abc import Callable

    from .pipeline import StableVideoDiffusion

LONGEST_RANGE = 10_000  # seeds; more is a typing error, not a wish
OUT_OF_MEMORY = "out of memory: try --low-memory, a smaller --size, fewer --frames, or --dtype float16"


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (by default the process's own) and return its exit status: 0, 1, 2 or 130."""
    if any(re.fullmatch("(--[^=]+=)?", argument) for argument in (sys.argv[1:] if argv is None else argv)):
        return complain("one of the arguments is empty: give it a value, or leave it out")
    args = parser().parse_args(argv)
    warned: set[str] = set()

    def warn(message: Warning | str, *_: Any) -> None:
        if str(message) not in warned:
            tell(f"minisvd: warning: {message}")
        warned.add(str(message))

    with warnings.catch_warnings():
        warnings.showwarning = warn
        try:
            return args.run(args) or 0
        except KeyboardInterrupt:
            tell("minisvd: interrupted")
            return 130
        except BrokenPipeError:  # whoever read stdout has gone
            raise
        except Exception as error:
            if said := sentence(error):
                return complain(said)
            raise


def sentence(error: Exception) -> str:
    """What a user has got wrong, or ""; for torch has no one class for running out of memory on every device."""
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
        return OUT_OF_MEMORY
    return str(error) or repr(error) if isinstance(error, OSError | ValueError) else ""


def tell(line: str) -> None:
    """Say it on stderr, where the disk that keeps it may be full: no run ends for that."""
    with suppress(OSError):
        print(line, file=sys.stderr)


def complain(sentence: str) -> int:
    """Say what is wrong, in one line, and return the exit status of a user's error."""
    tell(f"minisvd: error: {' '.join(sentence.split())}")
    return 2


# --- generate -----------------------------------------------------------------------------------------------------


def generate(args: argparse.Namespace) -> int:
    """A video for each image and seed. Prints their paths, or with --json one object that says how they were made.
    Returns 1 if some of several could not be made. Under torchrun all ranks make videos; the first plans."""
    from .jobs import gather
    from .ranks import join, work

    if args.text is not None:
        return speak(args)
    began = time.perf_counter()
    store, rank = join()
    device, dtype = place(args)
    if rank == 0:
        batches, made, given = gather(args, dtype)
        for number, jobs in enumerate(batches):  # one by one, as the store takes no more than 8 MB at once
            store.set(f"batch {number}", json.dumps(jobs))
        store.set("plan", json.dumps([len(batches), sum(map(len, batches)), made]))
    about = {"model": args.model, "device": device, "rank": rank, "versions": versions()}
    ends = work(args, store, rank, cache(partial(load, args)), about)
    if rank != 0:
        return 0
    states = Counter(end["state"] for end in ends)
    if len(ends) > 1 or "made" not in states:
        tell(f"minisvd: of {len(ends)} videos {', '.join(f'{n} {state}' for state, n in sorted(states.items()))}")
    if args.json:
        report = {"model": args.model, "device": device, "dtype": dtype, "frames": given.pop("num_frames"), **given}
        report |= {"videos": [end for end in ends if "seconds" in end], "failed": [e for e in ends if "error" in e]}
        report |= {"skipped": [end["path"] for end in ends if not {"seconds", "error"} & end.keys()]}
        print(json.dumps(report | {"seconds": round(time.perf_counter() - began, 3), "versions": versions()}))
    return int("failed" in states)


def speak(args: argparse.Namespace) -> int:
    """A video of what --text says, by the second system, tiny-etc or that of a folder. Prints its path."""
    from .text import TextToVideo
    from .video import check_output

    if args.image or args.manifest:
        raise ValueError("a video is made of an image or of a --text: leave one of them out")
    model = "tiny-etc" if args.model == "tiny" else args.model
    output, (device, dtype) = check_output(args.output), place(args)
    chosen = {"fps": args.fps, "num_frames": args.num_frames, "steps": args.steps, "seed": args.seed or 0}
    video = TextToVideo(model, device=device, dtype=dtype)(args.text, guidance=(args.guidance or [None])[-1], **chosen)
    video.enlarged(args.zoom).save(output)
    print(json.dumps({"model": model, "text": args.text, **chosen, "path": str(output)}) if args.json else output)
    return 0


# --- info ---------------------------------------------------------------------------------------------------------


def info(args: argparse.Namespace) -> None:
    """Load a model and say what it is: source, layout, parameters of each part, and the settings it comes with."""
    svd, (device, dtype) = load(args), place(args)
    parts = {name: sum(p.numel() for p in getattr(svd, name).parameters()) for name in ("unet", "vae", "clip")}
    generation = asdict(svd.generation)
    rows = {"source": svd.source, "layout": svd.layout, "device": device, "dtype": dtype}
    if args.json:
        print(json.dumps(rows | {"parameters": parts, "generation": generation, "versions": versions()}))
        return
    rows |= {name: f"{count:,} parameters" for name, count in {**parts, "total": sum(parts.values())}.items()}
    for name, value in (rows | generation).items():
        print(f"{name:<14}{value}")


# --- verify -------------------------------------------------------------------------------------------------------


def verify(args: argparse.Namespace) -> int:
    """Check every cross-attention of a UNet, in float64 on the CPU. Returns 1 if one is not trivial, else 0."""
    from .attention import CachedCondLinear
    from .sites import check_model, load_any

    unet, keys = load_any(args.model, variant=args.variant, revision=args.revision, offline=args.offline, copy=True)
    vcut = getattr(unet.config, "vcut", False)
    keys = keys if args.keys is None else args.keys
    found = check_model(unet, keys=keys, progress=not args.json) if vcut is False else None
    if args.json:
        sites = [asdict(s) | {"finding": s.finding, "holds": s.holds} for s in (found.sites if found else ())]
        totals = {"hold": sum(site["holds"] for site in sites), "parameters": sum(p.numel() for p in unet.parameters())}
        totals["dead_parameters"] = sum(sum(site["dead"].values()) for site in sites)
        print(json.dumps({"model": args.model, "vcut": vcut, "sites": sites, **totals, "versions": versions()}))
    elif found is None:
        linear = sum(isinstance(module, CachedCondLinear) for module in unet.modules())
        are = "linear maps already" if unet.config.cross_attention_dim else "biases: a constant key was folded in"
        built = f"the UNet is built with vcut={vcut!r}, {linear} sites are {are}"
        print(f"nothing to check: {built}; give the model that it was converted from")
    else:
        print(found)
    return int(found is not None and not found.holds)


# --- account ------------------------------------------------------------------------------------------------------


def account(args: argparse.Namespace) -> None:
    """Parameters and MACs of a UNet, as torch counts them on shapes alone, and of a run. No weights are read."""
    from .accounting import ETC, count
    from .folder import resolve_configs
    from .memory import ECONOMIES, peaks

    grid = args.model == "etc"
    configs, generation = ETC if grid else resolve_configs(args.model, args.offline)
    config = replace(configs["unet"], vcut=VCUT[args.vcut]) if args.vcut else configs["unet"]
    asked = {"num_frames": args.frames, "size": args.size, "steps": args.steps}
    generation = replace(generation, **{name: value for name, value in asked.items() if value is not None})
    t, (width, height), factor = generation.num_frames, generation.size, configs["vae"].factor
    if width % (pixels := config.stride * factor) or height % pixels:
        raise ValueError(f"size is {width}x{height}; need multiples of {pixels} pixels")
    cut = check("cut_step", generation.steps + 1 if args.cut_step is None else args.cut_step)
    guided = min(cut - 1, generation.steps) if set(generation.guidance) != {1} else 0
    calls = {b: n for b, n in ((2, guided), (1, generation.steps - guided)) if n}
    counts = {b: count(config, t, (width // factor, height // factor), b, grid) for b in calls}
    branches, rows = next(iter(counts.items()))
    run = {"guided": guided, "single": calls.get(1, 0), "macs": sum(n * counts[b][0].macs for b, n in calls.items())}
    layer = r"(\.\w+\.\d+)?" if args.tree else ""
    shown = [row for row in rows if re.fullmatch(rf"\w*(?<!_blocks)|\w+_blocks\.\d+{layer}|mid_block{layer}", row.name)]
    names = [economy.name for economy in ECONOMIES if args.memory and not grid]  # ETC's memory is not known
    most = peaks(configs | {"unet": config}, generation, DTYPES[args.memory], branches) if names else []
    memory = dict(zip(names, most, strict=True))
    if args.json:
        asked = {"model": args.model, "vcut": config.vcut, "frames": t, "size": (width, height)}
        asked |= {"total": rows[0]._asdict(), "modules": [row._asdict() for row in shown], "run": run, "memory": memory}
        print(json.dumps(asked))
        return
    print(f"UNet of {args.model}: {branches} x {t} frames of {width}x{height}; G = 10^9 MACs a step")
    for name, parameters, macs in [*shown[1:], shown[0]]:
        print(f"{name or 'total':<29}{parameters:>15,}{macs / 1e9:>12,.2f} G")
    print(f"{guided} guided steps, of two branches, and {run['single']} single: {run['macs'] / 1e12:,.2f} T")
    for name, need in memory.items():
        print(f"{need / 1e9:7.1f} GB on the device, {name}")


# --- what all need -----------------------------------------------------------------------------------------------


def place(args: argparse.Namespace) -> tuple[str, str]:
    """--device, or the first there is, of torchrun's ranks each its own; and --dtype. Raises what `load` raises."""
    import torch

    from .checkpoint import checked_device, checked_dtype

    device = args.device or ("cuda" if torch.cuda.is_available() else "")
    device = device or ("mps" if torch.backends.mps.is_available() else "cpu")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    dtype = args.dtype or ("float16" if device.startswith("cuda") else "float32")
    return device, str(checked_dtype(dtype, checked_device(device))).removeprefix("torch.")


def load(args: argparse.Namespace) -> StableVideoDiffusion:
    """The model of --model, on --device in --dtype. Raises what `minisvd.load` raises."""
    from .pipeline import load

    device, dtype = place(args)
    chosen: Any = {name: getattr(args, name, False) for name in ("variant", "revision", "offline", "low_memory")}
    svd = load(args.model, device=device, dtype=dtype, vcut=args.vcut and VCUT[args.vcut], **chosen)
    return svd.compile() if getattr(args, "compile", False) else svd


def versions() -> dict[str, str]:
    """Of this package and of what decides its numbers."""
    import torch

    return {"minisvd": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


# --- arguments ----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one sentence like all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(complain(f"{message} (see {self.prog} --help)"))


def parse_size(text: str) -> tuple[int, int]:
    """1024x576 -> (1024, 576)."""
    width, x, height = text.lower().partition("x")
    if not (x and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 1024x576")
    return int(width), int(height)


def parse_seed(text: str) -> int:
    """A whole number that a random generator takes."""
    try:
        return check("seed", int(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a {SETTINGS['seed'].need[2:]}") from error


def parse_seeds(text: str) -> list[int]:
    """0,2,5-7 -> [0, 2, 5, 6, 7]."""
    seeds: list[int] = []
    for part in text.split(","):
        if not re.fullmatch(r"\d+(-\d+)?", part):
            raise argparse.ArgumentTypeError(f"{text!r} is not seeds such as 3, 0-4 or 0,2,5-7")
        ends = [parse_seed(end) for end in part.split("-")]
        if not ends[0] <= ends[-1] < ends[0] + LONGEST_RANGE:
            raise argparse.ArgumentTypeError(f"{part!r} is not a range that rises, of at most {LONGEST_RANGE:,} seeds")
        seeds += range(ends[0], ends[-1] + 1)
    if twice := [seed for seed, times in Counter(seeds).items() if times > 1]:
        raise argparse.ArgumentTypeError(f"{text!r} has seed {twice[0]} twice: leave one out")
    return seeds


def parser() -> Parser:
    """Every command and option; None means that the model's own setting is used."""
    model = Parser(add_help=False)
    group = model.add_argument_group("model")
    names = "tiny (default), svd, svd-xt, svd-xt-1-1, a folder, a .safetensors file, or a hub id"
    group.add_argument("--model", default="tiny", metavar="M", help=names)
    group.add_argument("--variant", metavar="V", help="which of a folder's weights, such as fp16")
    group.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    group.add_argument("--offline", action="store_true", help="use only what was downloaded before")
    group.add_argument("--json", action="store_true", help="print one JSON object")

    placed = Parser(add_help=False)
    group = placed.add_argument_group("placement")
    group.add_argument("--device", metavar="D", help="such as cuda, cuda:1, mps or cpu (default: the first there is)")
    group.add_argument("--dtype", choices=(*DTYPES, "auto"), help="auto: half where it is fast (default: on cuda)")
    vcut = "cross-attentions as released (off), folded (lossless), folded and those along time omitted (on)"
    group.add_argument("--vcut", choices=VCUT, help=f"{vcut} (default: as the model was saved)")

    top = Parser("minisvd", description="Stable Video Diffusion: one image in, a short video out.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"minisvd {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def new(run: Callable[[argparse.Namespace], int | None], parents: list[Parser], about: str) -> Parser:
        command = commands.add_parser(run.__name__, parents=parents, help=about, description=about, allow_abbrev=False)
        command.set_defaults(run=run)
        command._negative_number_matcher = re.compile(r"-\.?\d")  # -1e0 is one, too, as it is from Python 3.14 on
        return command

    command = new(generate, [model, placed], "make a video from each image")
    add = command.add_argument
    images = "what Pillow can open: PNG, JPEG, WebP, ...; or a folder, for all images in it"
    add("image", nargs="*", type=Path, metavar="IMAGE", help=images)
    add("--text", metavar="T", help="what the video is to show, in place of an image (--model: tiny-etc, or a folder)")
    add("--manifest", type=Path, metavar="M", help="a .jsonl or .csv file, a row a video: image, name, any setting")
    out = ".mp4, .gif, .webp, or no extension for a new folder of PNGs; for several videos an existing folder, \
or a name with placeholders: {stem} of the image's name, {seed}, and {index}, the seed's place in --seeds from 0"
    add("-o", "--output", required=True, type=Path, metavar="OUT", help=out)
    name = "names in the folder OUT, with the same placeholders (default: {stem}.mp4, with --seeds {stem}-{seed}.mp4)"
    add("--name-template", metavar="T", help=name)
    add("--skip-existing", action="store_true", help="make only what is not there, whatever it was made with")
    add("--no-sidecar", action="store_true", help="write no VIDEO.json, by which a second run knows what is finished")
    add("--batch", type=int, default=1, metavar="N", help="videos at a time; each is what it is alone to rounding")
    add("--fail-fast", action="store_true", help="end at the first video that cannot be made")
    add("--frames", dest="num_frames", type=int, metavar="N", help="frames to make (default: the model's)")
    add("--size", type=parse_size, metavar="WxH", help="pixels, such as 1024x576 (default: the model's)")
    add("--fit", choices=CHOICES["fit"], default="crop", help="how an image of another shape gets there")
    add("--fps", type=int, default=7, metavar="N", help="frames per second, also told to the model (default: 7)")
    add("--motion-bucket", type=int, default=127, metavar="N", help="0 (still) to 255 (fast) (default: 127)")
    add("--noise-aug", type=float, default=0.02, metavar="X", help="noise put on the image (default: 0.02)")
    add("--steps", type=int, metavar="N", help="noise levels to walk through (default: the model's)")
    add("--schedule", choices=CHOICES["schedule"], default="karras", help="of noise levels; ays is made for --steps 10")
    add("--sigmas", type=float, nargs="+", metavar="S", help="the noise levels themselves, falling to 0")
    guidance = "scale at the first and the last frame; 1 1 is none (default: the model's)"
    add("--guidance", type=float, nargs=2, metavar=("MIN", "MAX"), help=guidance)
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guide only at LOW < sigma <= HIGH")
    cut_step = "guide only the steps before C, the first being 1 (default: guide all)"
    add("--cut-step", type=int, metavar="C", help=cut_step)
    add("--stage2", choices=CHOICES["stage2"], default="mean", help="what the image says from C on (default: mean)")
    add_seed = command.add_mutually_exclusive_group().add_argument  # None, as a default that is given is not noticed
    add_seed("--seed", type=parse_seed, metavar="N", help="the same seed gives the same video (default: 0)")
    add_seed("--seeds", type=parse_seeds, metavar="S", help="a video of each image for each, such as 0-4 or 0,2,5-7")
    add("--zoom", type=int, default=1, metavar="N", help="enlarge the result N times, each pixel a square (default: 1)")
    add("--decode-chunk", type=int, metavar="N", help="frames decoded at a time: less memory, the same video")
    add("--low-memory", action="store_true", help="least memory, the same video (default on cuda: what fits)")
    add("--compile", action="store_true", help="compile the UNet, for a GPU: minutes at first; on a CPU slower steps")

    new(info, [model, placed], "load a model and say what it is made of")
    command = new(verify, [model], "check that every cross-attention is a linear map of the image, whatever the query")
    keys = "keys to give a UNet of another architecture (default: as its text encoder, or 1)"
    command.add_argument("--keys", type=int, metavar="K", help=keys)

    command = new(account, [], "count parameters and multiply-accumulates of a UNet, without its weights")
    add = command.add_argument
    names = "svd (default), svd-xt, svd-xt-1-1, tiny, etc, a folder, a .safetensors file, or a hub id"
    add("--model", default="svd", metavar="M", help=names)
    add("--offline", action="store_true", help="use only what was downloaded before")
    add("--vcut", choices=VCUT, help="the UNet's build (default: the folder's, else off)")
    add("--frames", type=int, metavar="N", help="frames (default: the model's)")
    add("--size", type=parse_size, metavar="WxH", help="pixels, such as 1024x576 (default: the model's)")
    add("--cut-step", type=int, metavar="C", help=cut_step)
    add("--steps", type=int, metavar="N", help="noise levels to walk through (default: the model's)")
    add("--memory", choices=DTYPES, help="count the peak on the device too, from full speed to --low-memory")
    add("--tree", action="store_true", help="block by block")
    add("--json", action="store_true", help="print one JSON object")
    return top
