"""One page that shows what a model does with an image: its U, its steps, its attention, its builds and its cost.

    python -m tools.teach.explain weights/tiny/example.png -o page.html --steps 10 --guidance 1.5 1.5

The page needs no network and no server. It is page.html, filled with what was measured and drawn here; page.js computes
in it. The model is run once in each of its three builds, on the same noise.
"""

import argparse
import base64
import io
import json
import math
import sys
import zlib
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import reduce
from PIL import Image
from torch import Tensor

import minisvd
from minisvd.attention import Attention
from minisvd.config import PRESETS, UNetConfig, VAEConfig, Vcut
from minisvd.pipeline import StableVideoDiffusion
from minisvd.sampler import SIGMAS
from tools.cost.accounting import BUILDS, PUBLISHED, Block, by_kind, ledger, run_cost, unet_blocks, unet_cost
from tools.output import atomic
from tools.teach.look import strip
from tools.teach.maps import Seen, attentions, watched, weights
from tools.teach.pictures import DARK, LIGHT, PAPER_CUT, numbers, shape, sort_of, u

SIDE, CELLS, FRAMES = 128, 16, 25  # the most pixels a side, cells of a map a side, and frames, that a page shows
PIXELS = 1_800_000  # of all frames of all steps
MAPS, MAPPED = 1_200_000, 12  # bytes of maps, before they are packed, and of how many steps at most
LARGE = 6_000_000  # bytes of a page
SPACE, TIME = "transformer_blocks.0", "temporal_transformer_blocks.0"


# --- numbers and pictures as text -----------------------------------------------------------------------------------


def packed(x: Tensor, kind: str) -> dict[str, Any]:
    """Numbers as deflated bytes in base64: u8 and f32 as they are, i8 and i16 as parts of the largest."""
    x, scale = x.detach().cpu(), 1.0
    if kind in ("i8", "i16"):
        levels = 127 if kind == "i8" else 32767
        scale = x.abs().max().item() / levels or 1.0
        x = (x.double() / scale).round()
    kinds = {"u8": torch.uint8, "f32": torch.float32, "i8": torch.int8, "i16": torch.int16}
    data = zlib.compress(x.to(kinds[kind]).contiguous().numpy().tobytes(), 9)
    return {"type": kind, "scale": scale, "data": base64.b64encode(data).decode()}


def picture(image: Image.Image) -> str:
    """A data: address."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=90, method=6)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def small(frames: Tensor, steps: int) -> Tensor:
    """Frames [t,3,H,W], of at most `SIDE` pixels a side and, for so many steps, of `PIXELS` in all: each pixel the mean
    of those that it stands for."""
    t, _, height, width = frames.shape
    times = max(max(height, width) / SIDE, math.sqrt(steps * t * height * width / PIXELS))
    sides = [max(1, round(side / times)) for side in (height, width)]
    return frames if times <= 1 else F.interpolate(frames, size=sides, mode="area")


def some(count: int, most: int) -> list[int]:
    """At most `most` of the first `count` numbers, evenly spaced, with the first and the last."""
    return sorted({round(i * (count - 1) / max(1, min(count, most) - 1)) for i in range(min(count, most))})


# --- maps -----------------------------------------------------------------------------------------------------------


def cells(h: int, w: int) -> int:
    """How many tokens a side one cell of a map stands for: the fewest that divide both sides into `CELLS` or fewer."""
    whole = [f for f in range(1, min(h, w) + 1) if h % f == w % f == 0]
    return next((f for f in whole if max(h, w) <= f * CELLS), whole[-1])


def middles(h: int, w: int) -> Tensor:
    """The numbers of the tokens in the middle of each cell, row by row."""
    f = cells(h, w)
    return torch.arange(h * w).view(h, w)[f // 2 :: f, f // 2 :: f].flatten()


def levelled(rows: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights [..., k] as bytes of which the largest of each row is 255, and what the largest are."""
    top = rows.amax(dim=-1, keepdim=True)
    return packed((255 * rows / top).round(), "u8"), packed(top, "f32")


def maps_of(unet: torch.nn.Module, block: Block, seen: Seen, shown: list[int], t: int) -> dict[str, Any]:
    """Of one transformer in the latest call: who looks at what, as the mean over heads, in the conditional branch.

    space [t', q, cells]: a query in the middle of each cell, and the sum of its weights over each cell.
    time [q, t', t']: the same queries' weights over the frames.
    """
    (_, h, w), each = block.leaves, attentions(unet)
    f, queries = cells(h, w), middles(h, w)
    in_space = f"{block.name}.{SPACE}.attn1"
    x = seen[in_space][0][-t:]
    rows = [weights(each[in_space], x[[i]], x[[i]], queries)[0].mean(0) for i in shown]
    space = reduce(torch.stack(rows), "t q (y fy x fx) -> t q (y x)", "sum", fy=f, fx=f, x=w // f, y=h // f)
    in_time = f"{block.name}.{TIME}.attn1"
    x = seen[in_time][0][-h * w :][queries]
    time = weights(each[in_time], x, x).mean(1)[:, shown][:, :, shown]
    found = {}
    for name, part in (("space", space), ("time", time)):
        found[name], found[f"{name}_top"] = levelled(part.float().cpu())
    return found


def sites_shown(blocks: list[Block], frames: int) -> list[Block]:
    """Transformers whose maps are shown: of each level the first on the way down and the last on the way up, and the
    middle's; fewer if their maps would not fit."""
    found = [block for block in blocks if sort_of(block) == "attentions"]
    groups: dict[str, list[Block]] = {}
    for block in found:
        groups.setdefault(block.name.split(".attentions")[0], []).append(block)
    sites = [group[-1 if name.startswith("up") else 0] for name, group in groups.items()]
    while len(sites) > 1 and sum(bytes_of(block, frames) for block in sites) > MAPS:
        sites.pop()
    return sites


def bytes_of(block: Block, frames: int) -> int:
    q = len(middles(*block.leaves[1:]))
    return frames * q * q + q * frames * frames


# --- the parts of the page ------------------------------------------------------------------------------------------


def costs(config: UNetConfig, frames: int, size: tuple[int, int], steps: int) -> dict[str, Any]:
    """What `run_cost` is made of, so that the page can do its sum for any c."""

    def forward(branches: int, vcut: Vcut) -> dict[str, int]:
        cost = unet_cost(config, frames, size, branches, BUILDS[vcut])
        return {"macs": cost.macs, "once": cost.once}

    full, shared = (unet_cost(config, frames, size, 2, build).macs for build in (PUBLISHED, BUILDS[False]))
    counts = {vcut: unet_cost(config, frames, size, build=build).parameters for vcut, build in BUILDS.items()}
    builds = {
        repr(vcut): {"parameters": counts[vcut], "two": forward(2, vcut), "one": forward(1, vcut)} for vcut in BUILDS
    }
    return {"steps": steps, "full": full, "shared": shared, "builds": builds}


def all_costs(name: str, config: UNetConfig, frames: int, size: tuple[int, int], steps: int) -> dict[str, Any]:
    """The model's own, and those of the released ones at their own sizes."""
    found, factor = {name: costs(config, frames, size, steps)}, VAEConfig().factor
    for preset, published in PRESETS.items():
        given = published.generation
        latent = given.size[0] // factor, given.size[1] // factor
        found.setdefault(preset, costs(UNetConfig(), given.num_frames, latent, given.steps))
    return found


def described(blocks: list[Block]) -> list[dict[str, Any]]:
    """Blocks as the page lists them."""
    made = []
    for block in blocks:
        kinds = [
            {"kind": kind, "parameters": cost.parameters, "macs": cost.macs, "once": cost.once}
            for kind, cost in by_kind(block.sites).items()
            if cost.parameters
        ]
        made.append({"name": block.name, "shape": shape(block), "numbers": numbers(block), "kinds": kinds})
    return made


@torch.no_grad()
def cross_attention(name: str, attention: Attention, x: Tensor, key: Tensor) -> dict[str, Any]:
    """One site with its weights, the tokens [q, c] that ask and the key [c'] that they hear."""
    named = {"to_q": attention.to_q.weight, "to_k": attention.to_k.weight, "to_v": attention.to_v.weight}
    named |= {"to_out": attention.get_parameter("to_out.0.weight"), "bias": attention.get_parameter("to_out.0.bias")}
    about = {"name": name, "c": x.shape[-1], "c_key": key.shape[-1], "heads": attention.num_heads}
    tensors: dict[str, Any] = {"key": packed(key, "f32"), "tokens": packed(x, "i16")}
    returned = attention(x[None, :1], key[None, None])[0, 0]
    return {**about, **{k: packed(v, "i16") for k, v in named.items()}, **tensors, "returned": packed(returned, "f32")}


class Watch:
    """A callback that keeps the estimate D of each step, and of some steps the maps."""

    def __init__(self, unet: torch.nn.Module, sites: list[Block], shown: list[int], t: int, mapped: list[int]) -> None:
        self.unet, self.sites, self.shown, self.t, self.mapped = unet, sites, shown, t, mapped
        self.denoised: list[Tensor] = []
        self.maps: dict[str, list[dict[str, Any]]] = {block.name: [] for block in sites}
        self.site: dict[str, Any] = {}
        self.seen: Seen = {}

    def __call__(self, step: int, _sigma: Tensor, _latents: Tensor, denoised: Tensor) -> None:
        self.denoised.append(denoised)
        if step not in self.mapped:
            return
        for block in self.sites:
            self.maps[block.name].append(maps_of(self.unet, block, self.seen, self.shown, self.t))
        if step == self.mapped[len(self.mapped) // 2]:
            block = self.sites[0]
            name = f"{block.name}.{SPACE}.attn2"
            x, context = self.seen[name]
            tokens = x[-self.t][middles(*block.leaves[1:])]
            self.site = cross_attention(name, attentions(self.unet)[name], tokens, context[-1, 0])


@torch.no_grad()
def steps_shown(svd: StableVideoDiffusion, denoised: list[Tensor], shown: list[int]) -> list[dict[str, Any]]:
    """The estimate D of each step, decoded, between which levels it led, and how far it is from the last."""
    levels, given, made = SIGMAS["karras"](len(denoised)).tolist(), svd.generation, []
    branches = "one branch" if given.guidance == (1.0, 1.0) else "two branches, guided"
    for i, latents in enumerate(denoised):
        frames = (svd.vae.decode(latents, given.decode_chunk)[0, shown].float().cpu() + 1) / 2
        about = {"number": i + 1, "left": f"{levels[i]:.3g}", "reached": f"{levels[i + 1]:.3g}", "branches": branches}
        away = (latents - denoised[-1]).square().mean().sqrt().item()
        made.append({**about, "away": f"{away:.3f}", "strip": picture(strip(small(frames.clamp(0, 1), len(denoised))))})
    return made


def maps_shown(watch: "Watch") -> dict[str, Any]:
    """The maps of all sites, and the place to begin with: that whose final latent differs most from the others."""
    grids = {b.name: [side // cells(*b.leaves[1:]) for side in b.leaves[1:]] for b in watch.sites}
    end, outer = watch.denoised[-1][0, 0], cells(*watch.sites[0].leaves[1:])
    differs = (end - end.mean((1, 2), keepdim=True)).square().sum(0)
    start = [place // outer for place in divmod(int(differs.argmax()), differs.shape[1])]
    sites = [{"name": name, "grid": grids[name], "steps": steps} for name, steps in watch.maps.items()]
    return {"steps": watch.mapped, "start": start, "sites": sites}


def gather(
    source: str, image: Path, steps: int | None, guidance: tuple[float, float] | None, seed: int, device: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Run the model; what the page computes with, and what it says."""
    svd = minisvd.load(source, vcut=False, device=device)
    asked = {name: value for name, value in (("steps", steps), ("guidance", guidance)) if value is not None}
    svd.generation = given = replace(svd.generation, **asked)
    config, name = svd.unet.config, Path(source).name
    t, (width, height), n = given.num_frames, given.size, given.steps
    latent, shown = (width // svd.vae.config.factor, height // svd.vae.config.factor), some(t, FRAMES)
    blocks = list(unet_blocks(config, t, latent))
    sites = sites_shown(blocks, len(shown))
    fit = MAPS // sum(bytes_of(block, len(shown)) for block in sites)
    watch = Watch(svd.unet, sites, shown, t, [i + 1 for i in some(n, min(max(fit, 1), MAPPED))])
    with watched(svd.unet) as watch.seen:
        first = svd(image, callback=watch, seed=seed)
    builds = []
    for vcut in BUILDS:
        build = StableVideoDiffusion(minisvd.fold(svd.unet, vcut), svd.vae, svd.clip, given)
        frames = first.frames if vcut is False else build(image, seed=seed).frames
        builds.append(built(vcut, frames[shown], first.frames[shown], n))

    words = [line[:44].strip() for line in ledger(run_cost(config, t, latent, n)).splitlines()[1:]]
    data = {
        "frames": t,
        "shown": shown,
        "size": list(small(first.frames[shown], n).shape[:1:-1]),
        "fps": first.fps,
        "cut": PAPER_CUT,
        "blocks": described(blocks),
        "steps": steps_shown(svd, watch.denoised, shown),
        "maps": maps_shown(watch),
        "builds": builds,
        "site": watch.site,
        "ledger": list(zip(("full", "by_sharing", "by_build", "by_guidance", "macs"), words, strict=True)),
        "costs": all_costs(name, config, t, latent, n),
    }
    count = sum(p.numel() for p in svd.unet.parameters())
    about = f"{name} has {count:,} parameters in its UNet. Of this image it made {t} frames of {width}x{height} pixels"
    made = f"minisvd {minisvd.__version__}, torch {torch.__version__}"
    texts = {
        "TITLE": escape(f"What {name} does with {image.name}"),
        "ABOUT": escape(f"{about} in {n} steps, seed {seed}."),
        "SITES": f"{2 * sum(sort_of(block) == 'attentions' for block in blocks)}",
        "MADE": escape(f"Made by python -m tools.teach.explain with {made}."),
        "U": drawn_u(config, t, latent, f"The U of {name}: {t} frames of {width}x{height}, guided"),
    }
    return data, texts


def drawn_u(config: UNetConfig, frames: int, size: tuple[int, int], title: str) -> str:
    """The U as a group, whose blocks can be reached one by one."""
    return u(config, frames, size, title).replace('role="img"', 'role="group"', 1)


def built(vcut: Vcut, frames: Tensor, first: Tensor, n: int) -> dict[str, Any]:
    """A build's frames, and how they differ from the first's; of `n` steps, as small as the steps'."""
    made: dict[str, Any] = {"name": repr(vcut), "strip": picture(strip(small(frames, n)))}
    made["said"] = "the released function"
    if vcut is not False:
        error = (frames - first).square().mean().item()
        near = f"{-10 * math.log10(error):.1f} dB" if error else "equal"
        made["said"] = f"largest difference {(frames - first).abs().max().item():.2g} of 1; {near} to the first (PSNR)"
        made["difference"] = packed(small(frames, n) - small(first, n), "i8")
    return made


def page(data: dict[str, Any], texts: dict[str, str]) -> str:
    """page.html, filled."""
    folder = Path(__file__).parent
    html, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.js"))
    colours = {"LIGHT": LIGHT, "DARK": DARK}
    filled = {name: "; ".join(f"--{k}: {v}" for k, v in each.items()) for name, each in colours.items()}
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    for name, text in {**filled, **texts, "SCRIPT": script, "DATA": content}.items():
        html = html.replace(f"%{name}%", text)
    return html


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.teach.explain", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("image", type=Path, metavar="IMAGE")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="PAGE", help="such as page.html")
    parser.add_argument("--model", default="tiny", metavar="M", help="a preset, folder, file or hub id (default: tiny)")
    parser.add_argument("--steps", type=int, metavar="N", help="noise levels to walk through (default: the model's)")
    parser.add_argument("--guidance", type=float, nargs=2, metavar=("MIN", "MAX"), help="default: the model's")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", metavar="D", help="default: %(default)s")
    args = parser.parse_args(argv)
    guidance = args.guidance and tuple(args.guidance)
    text = page(*gather(args.model, args.image, args.steps, guidance, args.seed, args.device))
    with atomic(args.out) as path:
        path.write_text(text, encoding="utf-8")
    print(args.out)
    if len(text) > LARGE:
        print(f"{args.out} has {len(text):,} bytes; fewer --steps make it smaller", file=sys.stderr)


if __name__ == "__main__":
    main()
