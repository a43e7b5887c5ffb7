"""The command line: `minisvd generate` makes videos, `info` says what a model is made of, `verify` checks its theorem.

Results go to stdout, bars and complaints to stderr. What a user can get wrong is checked before a model is loaded and
ends with status 2 and one sentence; a model that fails `verify` with 1, Ctrl-C with 130. torch is imported only by
what needs it, so `--help` is instant.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from minisvd import __version__
from minisvd.video import check_output

if TYPE_CHECKING:
    from minisvd.config import GenerationConfig, UNetConfig, Vcut
    from minisvd.pipeline import StableVideoDiffusion
    from minisvd.triviality import Site

VCUT = {None: None, "off": False, "on": True, "lossless": "lossless"}  # None: as the source was built
OUT_OF_MEMORY = "out of memory: try --decode-chunk 1, a smaller --size, fewer --frames, or --dtype float16"


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (by default the process's own) and return its exit status: 0, 1, 2 or 130."""
    args = parser().parse_args(argv)
    warned: set[str] = set()

    def warn(message: Warning | str, *_: Any) -> None:
        if str(message) not in warned:
            print(f"minisvd: warning: {message}", file=sys.stderr)
        warned.add(str(message))

    with warnings.catch_warnings():
        warnings.showwarning = warn
        try:
            return args.run(args) or 0
        except KeyboardInterrupt:
            print("minisvd: interrupted", file=sys.stderr)
            return 130
        except MemoryError:
            return complain(OUT_OF_MEMORY)
        except RuntimeError as error:  # torch has no one class for this on every device
            if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
                raise
            return complain(OUT_OF_MEMORY)
        except (OSError, ValueError) as error:
            return complain(str(error))


def complain(sentence: str) -> int:
    """Say what is wrong, in one line, and return the exit status of a user's error."""
    print(f"minisvd: error: {' '.join(sentence.split())}", file=sys.stderr)
    return 2


# --- generate -----------------------------------------------------------------------------------------------------


def generate(args: argparse.Namespace) -> None:
    """One video for each image. Prints their paths, or with --json one object that also says how they were made."""
    began = time.perf_counter()
    outputs = output_paths(args.image, args.output)
    settings = {
        "num_frames": args.frames,
        "steps": args.steps,
        "fps": args.fps,
        "motion_bucket": args.motion_bucket,
        "noise_aug": args.noise_aug,
        "guidance": args.guidance and tuple(args.guidance),
        "cut_step": args.cut_step,
        "stage2": args.stage2,
        "size": args.size,
        "fit": args.fit,
        "decode_chunk": args.decode_chunk,
    }
    from minisvd.images import open_image
    from minisvd.pipeline import check_settings

    check_settings(**settings)
    for image in args.image:
        open_image(image)
    svd = load(args)

    videos = []
    for image, output in zip(args.image, outputs, strict=True):
        started = time.perf_counter()
        video = svd(image, seed=args.seed, **settings)
        video.save(output)
        videos.append({"image": str(image), "path": str(output), "seconds": round(time.perf_counter() - started, 3)})
        if not args.json:
            print(output, flush=True)
    if args.json:
        preset = asdict(svd.generation)
        used = {name: preset[name] if value is None and name in preset else value for name, value in settings.items()}
        report = {"videos": videos, "model": args.model, **placement(svd), "seed": args.seed}
        report |= {"frames": used.pop("num_frames"), **used}
        print(json.dumps(report | {"seconds": round(time.perf_counter() - began, 3), "versions": versions()}))


def output_paths(images: list[Path], output: Path) -> list[Path]:
    """Where each image's video goes: `output` with {stem} filled in, STEM.mp4 in it if it is a folder, or itself.

    Raises what `check_output` raises, and ValueError where a video would replace another or one of the images.
    """
    if "{stem}" in str(output):
        paths = [Path(str(output).replace("{stem}", image.stem)) for image in images]
    elif output.is_dir():
        paths = [output / f"{image.stem}.mp4" for image in images]
    elif len(images) == 1:
        paths = [output]
    else:
        raise ValueError(
            f"-o {output} is one name for {len(images)} images: give an existing folder, or put {{stem}} in it"
        )
    for i, path in enumerate(paths):
        check_output(path)
        if path in paths[:i]:
            raise ValueError(f"two images would be written to {path}: rename one, or run them one by one")
        if path.resolve() in (image.resolve() for image in images):
            raise ValueError(f"{path} is one of the images: choose another output")
    return paths


# --- info ---------------------------------------------------------------------------------------------------------


def info(args: argparse.Namespace) -> None:
    """Load a model and say what it is: source, layout, parameters of each part, and the settings it comes with."""
    svd = load(args)
    parts = {name: sum(p.numel() for p in getattr(svd, name).parameters()) for name in ("unet", "vae", "clip")}
    generation = asdict(svd.generation)
    if args.json:
        report = {"source": svd.source, "layout": svd.layout, **placement(svd), "parameters": parts}
        print(json.dumps(report | {"generation": generation, "versions": versions()}))
        return
    rows = {"source": svd.source, "layout": svd.layout, **placement(svd)}
    rows |= {
        name: f"{parameters:,} parameters" for name, parameters in (parts | {"total": sum(parts.values())}).items()
    }
    rows |= {name: value for name, value in generation.items() if value is not None}
    for name, value in rows.items():
        print(f"{name:<12}{value}")


# --- verify -------------------------------------------------------------------------------------------------------


def verify(args: argparse.Namespace) -> int:
    """Check every cross-attention of a UNet, in float64 on the CPU. Returns 1 if one is not its linear map, else 0."""
    from tqdm import tqdm

    from minisvd.attention import CachedCondLinear
    from minisvd.checkpoint import load_unet
    from minisvd.triviality import check_site, cross_attentions

    unet = load_unet(args.model, variant=args.variant, revision=args.revision, offline=args.offline)
    attentions = cross_attentions(unet)
    bar = tqdm(attentions.items(), desc="sites", leave=False)
    sites = [check_site(name, attention) for name, attention in bar]
    holding = sum(site.holds for site in sites)
    parameters = sum(p.numel() for p in unet.parameters())
    if args.json:
        rows = [asdict(site) | {"holds": site.holds} for site in sites]
        report = {"model": args.model, "vcut": unet.vcut, "sites": rows, "hold": holding, "parameters": parameters}
        report |= {"dead_parameters": sum(site.report.dead.numel for site in sites), "versions": versions()}
        print(json.dumps(report))
    elif not sites:
        linear = sum(isinstance(module, CachedCondLinear) for module in unet.modules())
        print(f"nothing to check: the UNet is built with vcut={unet.vcut!r}, {linear} sites are linear maps already")
    else:
        print_sites(sites, holding, parameters)
    return int(holding < len(sites))


def print_sites(sites: list[Site], holding: int, parameters: int) -> None:
    """The table of `verify`, differences relative to the largest |attention|, and its totals.

    SCA and TCA are the spatial and the temporal cross-attention; "two keys" is the control, the query's effect then.
    """
    print(f"{'site':<27} kind  width  |attention - linear|  query sensitivity  two keys  dead parameters")
    for site in sites:
        place, kind = ".".join(site.name.split(".")[:-3]), "TCA" if "temporal" in site.name else "SCA"
        dead = f"{site.report.dead.numel:,} {', '.join(site.report.dead.names)}".replace(".weight", "")
        query, control = (q.relative for q in (site.report.query, site.report.control.query))
        numbers = f"{site.width:>5}  {site.relative:>20.1e}  {query:>17.1e}  {control:>8.1e}"
        print(f"{place:<27} {kind:<4}  {numbers}  {dead}{'' if site.holds else '  FAILS'}")
    error, query = (max(values) for values in zip(*((s.relative, s.report.query.relative) for s in sites), strict=True))
    print(f"{holding} of {len(sites)} sites hold: |attention - linear| <= {error:.1e}, query <= {query:.1e}")
    dead = sum(site.report.dead.numel for site in sites)
    print(f"{dead:,} of the UNet's {parameters:,} parameters are dead in them ({dead / parameters:.1%})")


# --- account ------------------------------------------------------------------------------------------------------


def account(args: argparse.Namespace) -> None:
    """Parameters and MACs of a model's UNet, from its configuration alone: no weights, no network, no compute."""
    from minisvd.accounting import BUILDS, by_kind, opened, run_cost, total, tree, unet_blocks

    config, factor, generation, own_vcut = configuration(args.model)
    vcut = own_vcut if args.vcut is None else VCUT[args.vcut]
    frames = generation.num_frames if args.frames is None else args.frames
    steps = generation.steps if args.steps is None else args.steps
    width, height = args.size or generation.size
    pixels = config.stride * factor
    if min(width, height) < 1 or width % pixels or height % pixels:
        raise ValueError(f"size is {width}x{height}; need multiples of {pixels} pixels")
    latent, build = (width // factor, height // factor), BUILDS[vcut]

    run = run_cost(config, frames, latent, steps, args.cut_step, build)
    branches = 2 if run.guided else 1
    blocks = list(unet_blocks(config, frames, latent, branches, build))
    sites = [site for block in blocks for site in block.sites]
    cost, kinds = total(sites), by_kind(sites)
    asked = {"model": args.model, "vcut": vcut, "frames": frames, "size": (width, height), "steps": steps}
    asked |= {"cut_step": args.cut_step, "branches": branches}
    if args.json:
        report = {"kinds": {kind: asdict(each) for kind, each in kinds.items()}, "total": asdict(cost)}
        report |= {"blocks": [asdict(block) for block in blocks]} if args.tree else {}
        print(json.dumps({**asked, **report, "run": asdict(run)}))
        return

    step = f"one {'guided' if run.guided else 'single'} step, {branches} x {frames} frames of {width}x{height}"
    print(f"UNet of {args.model}, vcut={vcut!r}: {step}\n")
    if args.tree:
        first = {block.name.split(".")[-2]: block for block in reversed(blocks) if "." in block.name}
        print(tree(blocks), opened(first["resnets"]), opened(first["attentions"]), sep="\n\n")
    else:
        print(f"{'kind (G = 10^9 MACs)':<24}{'parameters':>14}{'G a step':>12}{'q k^T, a v':>12}{'G once':>9}")
        for name, each in [*kinds.items(), ("total", cost)]:
            macs = "".join(f"{n / 1e9:>{wide},.2f}" for n, wide in ((each.macs, 12), (each.matmul, 12), (each.once, 9)))
            print(f"{name:<24}{each.parameters:>14,}{macs}")
    print(f"\n{steps} steps, {run.guided} guided and {run.single} on one branch (T = 10^12 MACs)")
    ledger = {
        "as diffusers runs it, every step guided": run.full,
        "saved: a video's conditions projected once": -run.by_sharing,
        "saved: cross-attentions folded or omitted": -run.by_build,
        "saved: guidance dropped": -run.by_guidance,
        "this run": run.macs,
    }
    for name, macs in ledger.items():
        print(f"{name:<44}{macs / 1e12:>10,.2f} T{macs / run.full:>9.2%}")


def configuration(source: str) -> tuple[UNetConfig, int, GenerationConfig, Vcut]:
    """A model's UNet, pixels per latent cell, settings and build, from its name or a folder's config.json files.

    Raises FileNotFoundError for a folder without them and ValueError for a source that would need weights to be read.
    """
    from minisvd.config import PRESETS, UNetConfig, VAEConfig

    if source in PRESETS and not Path(source).exists():
        return UNetConfig(), VAEConfig().factor, PRESETS[source].generation, False
    from minisvd.checkpoint import locate
    from minisvd.folder import read_config, read_generation, read_vcut

    path = locate(source)
    if path is None or not path.is_dir():
        names = ", ".join(["tiny", *PRESETS])
        raise ValueError(f"account reads no weights and no hub, so not {source}: give one of {names}, or a folder")
    return read_config("unet", path), read_config("vae", path).factor, read_generation(path, None), read_vcut(path)


# --- what all need -----------------------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> StableVideoDiffusion:
    """The model of --model, on --device in --dtype. Raises what `minisvd.load` raises."""
    import torch

    from minisvd.pipeline import load

    if args.device is not None:
        device = args.device
    elif torch.cuda.is_available():
        device = "cuda"
    else:
        device = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device {device!r} cannot be used on this machine: use cpu, or leave --device out") from error
    dtype = args.dtype or ("float16" if torch.device(device).type == "cuda" else "float32")
    source = {"variant": args.variant, "revision": args.revision, "offline": args.offline}
    source["vcut"] = VCUT[args.vcut]
    return load(args.model, device=device, dtype=getattr(torch, dtype), **source)


def placement(svd: StableVideoDiffusion) -> dict[str, str]:
    """Where the model is and what its numbers are."""
    weight = next(svd.unet.parameters())
    return {"device": str(weight.device), "dtype": str(weight.dtype).removeprefix("torch.")}


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
    if not (text.isdecimal() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**63 - 1")
    return int(text)


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
    dtypes = ("float32", "float16", "bfloat16")
    group.add_argument("--dtype", choices=dtypes, help="default: float16 on cuda, else float32")
    vcut = "cross-attentions as released (off), folded (lossless), folded and those along time omitted (on)"
    group.add_argument("--vcut", choices=[*filter(None, VCUT)], help=f"{vcut} (default: as the model was saved)")

    top = Parser("minisvd", description="Stable Video Diffusion: one image in, a short video out.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"minisvd {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    about = "make a video from each image"
    both = [model, placed]
    command = commands.add_parser("generate", parents=both, help=about, description=about, allow_abbrev=False)
    command.set_defaults(run=generate)
    add = command.add_argument
    add("image", nargs="+", type=Path, metavar="IMAGE", help="what Pillow can open: PNG, JPEG, WebP, ...")
    out = ".mp4, .gif, .webp, or no extension for a new folder of PNGs; for several images an existing folder, \
or a name with {stem} in it"
    add("-o", "--output", required=True, type=Path, metavar="OUT", help=out)
    add("--frames", type=int, metavar="N", help="frames to make (default: the model's)")
    add("--size", type=parse_size, metavar="WxH", help="pixels, such as 1024x576 (default: the model's)")
    add("--fit", choices=("crop", "pad", "stretch"), default="crop", help="how an image of another shape gets there")
    add("--fps", type=int, default=7, metavar="N", help="frames per second, also told to the model (default: 7)")
    motion = "0 (still) to 255 (fast) (default: 127)"
    add("--motion-bucket", type=int, default=127, metavar="N", help=motion)
    noise_aug = "noise added to the image, which frees the motion from it (default: 0.02)"
    add("--noise-aug", type=float, default=0.02, metavar="X", help=noise_aug)
    add("--steps", type=int, metavar="N", help="noise levels to walk through (default: the model's)")
    guidance = "scale at the first and the last frame; 1 1 is none (default: the model's)"
    add("--guidance", type=float, nargs=2, metavar=("MIN", "MAX"), help=guidance)
    cut_step = "guide only the steps before C, the first being 1 (default: guide all)"
    add("--cut-step", type=int, metavar="C", help=cut_step)
    stages = ("mean", "cond", "uncond")
    add("--stage2", choices=stages, default="mean", help="what the image says in the branch from C on (default: mean)")
    add("--seed", type=parse_seed, default=0, metavar="N", help="the same seed gives the same video (default: 0)")
    add("--decode-chunk", type=int, metavar="N", help="frames decoded at a time: less memory, the same video")

    about = "load a model and say what it is made of"
    command = commands.add_parser("info", parents=both, help=about, description=about, allow_abbrev=False)
    command.set_defaults(run=info)

    about = "check that every cross-attention is a linear map of the image's embedding, whatever the query"
    command = commands.add_parser("verify", parents=[model], help=about, description=about, allow_abbrev=False)
    command.set_defaults(run=verify)

    about = "count parameters and multiply-accumulates of a UNet, without its weights"
    command = commands.add_parser("account", help=about, description=about, allow_abbrev=False)
    command.set_defaults(run=account)
    add = command.add_argument
    add("--model", default="svd", metavar="M", help="svd (default), svd-xt, svd-xt-1-1, tiny, or a folder")
    add("--vcut", choices=("off", "on", "lossless"), help="the UNet's build (default: the folder's, else off)")
    add("--frames", type=int, metavar="N", help="frames (default: the model's)")
    add("--size", type=parse_size, metavar="WxH", help="pixels, such as 1024x576 (default: the model's)")
    add("--cut-step", type=int, metavar="C", help=cut_step)
    add("--steps", type=int, metavar="N", help="noise levels to walk through (default: the model's)")
    add("--tree", action="store_true", help="draw the U as it runs, block by block")
    add("--json", action="store_true", help="print one JSON object")
    return top
