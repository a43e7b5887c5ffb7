"""Fine-tune a model on a folder of videos: `python -m tools.finetune.train VIDEOS OUT`. Stop it at will; it goes on.

    python -m tools.finetune.train clips/ my-model/ --model svd-xt --checkpointing
    minisvd generate photo.png -o clip.mp4 --model my-model

Every video is cut into clips; `clips.py` says what their motion buckets are. The loss is EDM's for v-prediction. Each
row draws its own ln sigma, noise on its condition, and what of that is dropped. Held-out loss, motion scores and a
picture are made before and after. OUT appears whole, at the end.

Axes: b batch, t frames, c channels, h w latent grid, H W pixels.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import minisvd
from minisvd.pipeline import StableVideoDiffusion
from minisvd.sampler import preconditioning
from minisvd.unet import SpatioTemporalUNet
from tools.finetune.clips import VIDEOS, Clip, cached_clips, find_videos, motion_score
from tools.output import as_image, atomic, save_png, write_json
from tools.tiny.fit import Run, Stage, fit

NOISE_AUG_MEAN, NOISE_AUG_STD = -3.0, 0.5  # of ln noise_aug
DROPOUT = 0.1  # of each: embedding alone, both, latent alone
HELD_OUT_DRAWS = 64  # noise levels of the held-out loss
SAMPLES = 8  # held-out clips, at most, that are generated before and after
ELSEWHERE = ("out", "work", "device", "dtype")  # what a run that goes on may be given anew


def edm_loss(
    run: Run, unet: SpatioTemporalUNet, y: Tensor, n: Tensor, sigma: Tensor, condition: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """[b]: each row's mean of |F(c_in x, c_noise) - (y - c_skip x) / c_out|^2 at x = y + sigma n.

    The target is (n - sigma y) / sqrt(sigma^2 + 1), so that an error of D counts (sigma^2 + 1) / sigma^2 times.
    y, n [b,t,4,h,w], sigma [b]; condition: latent [b,4,h,w] unscaled, embeds [b,1,c'], added_time_ids [b,3].
    """
    latent, embeds, ids = condition
    c_skip, c_out, c_in, c_noise = preconditioning(rearrange(sigma, "b -> b 1 1 1 1"))
    x = y + rearrange(sigma, "b -> b 1 1 1 1") * n
    sample = torch.cat([c_in * x, repeat(latent, "b c h w -> b t c h w", t=y.shape[1])], dim=2)
    with run.autocast():
        out = unet(sample, c_noise.flatten(), embeds, ids)
    return (out.float() - (y - c_skip * x) / c_out).square().mean((1, 2, 3, 4))


def drawn_loss(run: Run, svd: StableVideoDiffusion, unet: Any, rows: list[Clip], ln_sigma: Tensor, q: float) -> Tensor:
    """[b]: the loss under draws of their own for each row. With p uniform, the embedding is dropped if p < 2q, the
    latent (the posterior's mode for the noised first frame) if q <= p < 3q."""
    y, embeds, first, numbers = (
        torch.stack([row[name] for row in rows]).to(run.device) for name in ("latents", "embeds", "first", "numbers")
    )
    p = torch.rand(len(rows), device=run.device)
    noise_aug = (NOISE_AUG_MEAN + NOISE_AUG_STD * torch.randn_like(p)).exp()
    pixels = first / 127.5 - 1
    with torch.no_grad(), run.autocast():
        latent = svd.vae.encode(pixels + rearrange(noise_aug, "b -> b 1 1 1") * torch.randn_like(pixels)).float()
    latent = latent * rearrange((p < q) | (p >= 3 * q), "b -> b 1 1 1")
    embeds = embeds * rearrange(p >= 2 * q, "b -> b 1 1")
    ids = torch.stack([numbers[:, 0] - 1, numbers[:, 1], noise_aug], dim=1)
    return edm_loss(run, unet, y, torch.randn_like(y), ln_sigma.to(run.device).exp(), (latent, embeds, ids))


@torch.no_grad()
def held_out_loss(run: Run, svd: StableVideoDiffusion, unet: Any, rows: list[Clip], args: Any) -> float:
    """Under the whole condition, at noise levels spread evenly over their distribution: the same draws each time."""
    rows = (rows * HELD_OUT_DRAWS)[:HELD_OUT_DRAWS]
    places = (torch.arange(HELD_OUT_DRAWS) * 0.618034 + 0.5 / HELD_OUT_DRAWS) % 1  # so that each row's are spread too
    ln_sigma = args.sigma[0] + args.sigma[1] * 2**0.5 * torch.erfinv(2 * places - 1)
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        parts = zip(range(0, HELD_OUT_DRAWS, args.batch), ln_sigma.split(args.batch), strict=True)
        losses = [drawn_loss(run, svd, unet, rows[i : i + args.batch], part, 0) for i, part in parts]
    return torch.cat(losses).mean().item()


def freeze(run: Run, unet: SpatioTemporalUNet, pattern: str) -> None:
    """Freeze all parameters but those in whose names the pattern is found, and of these the dead ones.

    Raises ValueError if none is left.
    """
    dead = minisvd.dead_names(unet)
    chosen = {name for name, _ in unet.named_parameters() if re.search(pattern, name)}
    if not chosen - dead:
        raise ValueError(f"--train {pattern!r} finds no parameter that can learn; try temporal_transformer_block, or .")
    if still := sorted(chosen & dead):
        run.log(f"warning: {len(still)} of {len(chosen)} parameters to train can never learn and stay, as {still[0]}")
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name in chosen - dead)


def sample(svd: StableVideoDiffusion, rows: list[Clip], args: Any) -> Tensor:
    """A video of each clip's first frame, fps and motion bucket: [n,t,3,H,W] in [0,1]."""
    settings: Any = {"num_frames": args.frames, "size": args.size, "progress": False}
    videos = []
    for i, row in enumerate(tqdm(rows, "samples")):
        (fps, bucket), image = row["numbers"].tolist(), row["first"] / 127.5 - 1
        videos.append(svd(image, fps=fps, motion_bucket=bucket, seed=i, **settings).frames)
    return torch.stack(videos)


def mean_score(videos: Tensor, rows: list[Clip]) -> float:
    return float(np.mean([motion_score(v, row["numbers"][0].item()) for v, row in zip(videos, rows, strict=True)]))


def check(args: argparse.Namespace) -> None:
    """What can be seen before a model is loaded: the arguments, the folder, and whether the run is the noted one."""
    if args.out.exists():
        raise FileExistsError(f"{args.out} exists: name a new folder")
    for name in ("steps", "batch", "every", "frames"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; need at least 1")
    for name, value in (("lr", args.lr), ("held-out", args.held_out)):
        if not 0 < value < 1:
            raise ValueError(f"--{name} is {value}; need a number between 0 and 1")
    if not args.sigma[1] > 0:
        raise ValueError(f"--sigma has the deviation {args.sigma[1]}; need a positive one")
    try:
        re.compile(args.train)
    except re.error as error:
        raise ValueError(f"--train {args.train!r} is not a regular expression: {error}") from error
    args.files, args.buckets = find_videos(args.videos)
    noted, settings = args.work / "settings.json", {k: v for k, v in vars(args).items() if k not in ELSEWHERE}
    settings["files"] = [[path.name, path.stat().st_size] for path in args.files]
    settings = json.loads(json.dumps(settings, default=str))
    past = json.loads(noted.read_text()) if noted.exists() else settings
    if other := [name for name in settings if settings[name] != past.get(name)]:
        raise ValueError(f"{args.work} holds a run with another --{other[0]}: name another --work")
    write_json(noted, settings)


def train(args: argparse.Namespace) -> None:
    check(args)
    stage = Stage("unet", args.steps, args.batch, args.lr, report=max(1, args.steps // 5))
    run = Run(args.work, (stage,), torch.device(args.device), args.seed)
    svd = minisvd.load(args.model, device=args.device)
    args.frames, args.size = args.frames or svd.generation.num_frames, args.size or svd.generation.size
    svd.check_size(args.size)
    freeze(run, svd.unet, args.train)
    videos = cached_clips(run, svd, args)
    order = np.random.default_rng(args.seed).permutation(len(videos))
    held = min(len(videos) - 1, max(1, round(args.held_out * len(videos))))
    held_out, training = ([clip for i in part for clip in videos[i]] for part in (order[:held], order[held:]))
    shown = held_out[:SAMPLES]

    before = run.work / "before.safetensors"
    if not before.exists():
        with atomic(before) as path:
            save_file({"videos": sample(svd, shown, args)}, path)
    if args.checkpointing:
        minisvd.checkpoint_activations(svd.unet)
    losses = [held_out_loss(run, svd, svd.unet, held_out, args)]  # before, and in every report

    def loss(unet: SpatioTemporalUNet, rng: np.random.Generator, batch: int) -> Tensor:
        rows = [training[i] for i in rng.integers(len(training), size=batch)]
        return drawn_loss(run, svd, unet, rows, args.sigma[0] + args.sigma[1] * torch.randn(batch), DROPOUT).mean()

    def report(unet: SpatioTemporalUNet) -> str:
        losses.append(held_out_loss(run, svd, unet, held_out, args))
        return f"held-out loss {losses[-1]:.5f}"

    unet = svd.unet
    svd.unet = fit(run, stage, lambda: unet, loss, report).eval()
    if len(losses) == 1:  # trained by an earlier run
        losses.append(held_out_loss(run, svd, svd.unet, held_out, args))
    with torch.no_grad():
        decoded = [svd.vae.decode(row["latents"][None].to(run.device), svd.generation.decode_chunk)[0] for row in shown]
    true = ((torch.stack(decoded).float().cpu() + 1) / 2).clamp(0, 1)
    rows = [true, load_file(before)["videos"], sample(svd, shown, args)]
    save_png(as_image(rearrange(rows, "k n t c h w -> (n k h) (t w) c")), run.work / "samples.png")
    scores = [f"{mean_score(videos, shown):.3f}" for videos in rows]
    run.log(f"held-out loss {losses[0]:.5f}, after {losses[-1]:.5f}")
    run.log("motion score of held-out clips {}, of samples before {}, after {}".format(*scores))
    svd.save(args.out, getattr(torch, args.dtype))
    run.log(f"wrote {args.out}; {run.work}/samples.png has held-out clips, below each what was made before and after")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path, help="a folder of " + ", ".join(VIDEOS))
    parser.add_argument("out", type=Path, help="the new model's folder")
    parser.add_argument("--model", default="tiny", help="preset, folder, .safetensors file or hub id")
    parser.add_argument("--work", type=Path, default=Path("runs/finetune"), help="clips, checkpoints, log and picture")
    parser.add_argument("--train", default="temporal_transformer_block", help="regular expression, found in names")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--sigma", type=float, nargs=2, default=(0.7, 1.6), help="mean and deviation of ln sigma")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations twice, and keep few of them")
    parser.add_argument("--frames", type=int, help="of a clip (default: the model's)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="default: the model's")
    parser.add_argument("--fit", choices=("crop", "pad", "stretch"), default="crop")
    parser.add_argument("--every", type=int, default=1, help="take every so many-th frame of a video")
    parser.add_argument("--held-out", type=float, default=0.1, help="this share of the videos")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16", help="of the folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        train(args)
    except (OSError, ValueError) as error:
        print(f"finetune: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
