"""Fine-tune a model on a folder of videos: `python -m tools.finetune.train VIDEOS OUT`. Stop it at will; it goes on.

    python -m tools.finetune.train clips/ my-model/ --model svd-xt --train temporal_transformer_block --checkpointing
    minisvd generate photo.png -o clip.mp4 --model my-model

Each video is cut into clips of as many frames as the model makes. Their latents and embeddings are computed once. The
loss is EDM's for v-prediction; ln sigma, the noise on the condition and what of it is dropped are drawn for every row.
Held-out loss and motion score are told before and after; OUT appears whole, at the end.

`buckets.json` in VIDEOS, {file name: motion bucket}, says how fast each moves. Without it the bucket is the rank of the
clip's motion score in the folder, 0 to 255.

Axes: b batch, t frames, c channels, h w latent grid, H W pixels.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import minisvd
from minisvd.attention import AlphaBlender, SpatioTemporalTransformer
from minisvd.images import load_image
from minisvd.pipeline import StableVideoDiffusion
from minisvd.sampler import preconditioning
from minisvd.triviality import cross_attentions
from minisvd.unet import SpatioTemporalResBlock, SpatioTemporalUNet
from tools.folder.layout import write_folder
from tools.measure.metrics import dynamics
from tools.output import as_image, atomic, save_png, write_json
from tools.tiny.fit import Run, Stage, fit

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
NOISE_AUG_MEAN, NOISE_AUG_STD = -3.0, 0.5  # of ln noise_aug (arXiv 2311.15127, appendix D)
DROPOUT = 0.1  # each: embedding alone, both, latent alone
HELD_OUT_DRAWS = 64  # at most so many clips are drawn for the held-out loss
SAMPLES = 8  # at most so many held-out clips are generated, before and after

Clip = dict[str, Tensor]
"""latents [t,4,h,w] scaled, embeds [1,c'], first [3,H,W] in bytes, numbers [3]: fps - 1, motion bucket, motion score."""


# The clips.


def read_frames(path: Path, every: int) -> Iterator[np.ndarray]:
    """Every so many-th frame of a video, uint8 [H,W,3]. Raises ValueError for a file that cannot be decoded."""
    try:
        with av.open(str(path)) as container:
            for frame in islice(container.decode(video=0), 0, None, every):
                yield frame.to_ndarray(format="rgb24")
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} is not a video that can be decoded ({error}): remove or convert it") from error


def frame_rate(path: Path) -> float:
    with av.open(str(path)) as container:
        return float(container.streams.video[0].average_rate or 0)


def motion_score(frames: Tensor, fps: float) -> float:
    """How fast the fastest twentieth of the picture moves, in shorter sides a second; frames [t,3,H,W] in [-1,1]."""
    scale = min(1.0, 128 / min(frames.shape[-2:]))
    small = F.interpolate((frames + 1) / 2, scale_factor=scale, mode="bilinear", antialias=True) if scale < 1 else frames
    return dynamics(small).relative * fps


@torch.no_grad()
def cache_clips(run: Run, svd: StableVideoDiffusion, args: argparse.Namespace) -> list[Path]:
    """A file for each clip of each video, made where it is not yet there; in the order of the videos' names."""
    files = []
    for path in tqdm(args.files, "videos", disable=len(args.files) == len(list(run.work.glob("clips/*.done")))):
        done = run.work / "clips" / f"{path.name}.done"
        if not done.exists():
            frames, fps = read_frames(path, args.every), frame_rate(path) / args.every
            clips = iter(lambda frames=frames: list(islice(frames, args.frames)), [])
            whole = [clip for clip in clips if len(clip) == args.frames]
            if whole and not 2 <= fps < 1000:
                raise ValueError(f"{path} plays {fps:g} frames a second; need at least 2: lower --every")
            for i, clip in enumerate(whole):
                video = torch.cat([load_image(frame, args.size, args.fit) for frame in clip]).to(run.device)
                with run.autocast():
                    latents = torch.cat([svd.vae.encode(part) for part in video.split(8)]).float()
                numbers = torch.tensor([fps - 1, args.buckets.get(path.name, -1), motion_score(video.cpu(), fps)])
                first = ((video[0] + 1) * 127.5).round().byte()
                row = {"latents": latents * svd.vae.config.scaling_factor, "embeds": svd.clip(video[:1])[0]}
                with atomic(run.work / "clips" / f"{path.name}-{i:04}.safetensors") as file:
                    save_file({k: v.cpu().contiguous() for k, v in (row | {"first": first, "numbers": numbers}).items()}, file)
            with atomic(done) as file:
                file.write_text(f"{len(whole)}\n")
        files += [run.work / "clips" / f"{path.name}-{i:04}.safetensors" for i in range(int(done.read_text()))]
    if len(files) < 2:
        raise ValueError(f"{args.videos} has {len(files)} clips of {args.frames} frames; need at least 2: lower --frames")
    return files


def ranked(clips: list[Clip]) -> None:
    """Put the rank of the motion score, 0 to 255, where no bucket is known."""
    scores = torch.tensor([clip["numbers"][2] for clip in clips])
    for clip, rank in zip(clips, scores.argsort().argsort().tolist(), strict=True):
        if clip["numbers"][1] < 0:
            clip["numbers"][1] = 255 * rank / (len(clips) - 1)


# The loss.


def edm_loss(run: Run, unet: SpatioTemporalUNet, y: Tensor, n: Tensor, sigma: Tensor, *condition: Tensor) -> Tensor:
    """|F(c_in x, c_noise) - (y - c_skip x) / c_out|^2 at x = y + sigma n, the mean of each row [b].

    The target is (n - sigma y) / sqrt(sigma^2 + 1), so that this is EDM's weight (sigma^2 + 1) / sigma^2 on y.
    y, n [b,t,4,h,w], sigma [b]; condition: latent [b,4,h,w] unscaled, embeds [b,1,c'], added_time_ids [b,3].
    """
    latent, embeds, ids = condition
    c_skip, c_out, c_in, c_noise = preconditioning(rearrange(sigma, "b -> b 1 1 1 1"))
    x = y + rearrange(sigma, "b -> b 1 1 1 1") * n
    sample = torch.cat([c_in * x, repeat(latent, "b c h w -> b t c h w", t=y.shape[1])], dim=2)
    with run.autocast():
        out = unet(sample, c_noise.flatten(), embeds, ids)
    return (out.float() - (y - c_skip * x) / c_out).square().mean((1, 2, 3, 4))


def condition(run: Run, svd: StableVideoDiffusion, rows: list[Clip], noise_aug: Tensor, keep: Tensor) -> list[Tensor]:
    """Latent (the posterior's mode), embedding and numbers, the first frame with noise of deviation `noise_aug` [b].

    keep [2,b]: 0 where the latent, the embedding are dropped.
    """
    first = torch.stack([row["first"] for row in rows]).to(run.device) / 127.5 - 1
    with torch.no_grad(), run.autocast():
        latent = svd.vae.encode(first + rearrange(noise_aug, "b -> b 1 1 1") * torch.randn_like(first)).float()
    embeds = torch.stack([row["embeds"] for row in rows]).to(run.device)
    numbers = torch.stack([row["numbers"][:2] for row in rows]).to(run.device)
    ids = torch.cat([numbers, noise_aug[:, None]], dim=1)
    return [latent * rearrange(keep[0], "b -> b 1 1 1"), embeds * rearrange(keep[1], "b -> b 1 1"), ids]


def drawn_loss(
    run: Run, svd: StableVideoDiffusion, rows: list[Clip], log_sigma: Tensor, unet: SpatioTemporalUNet, q: float
) -> Tensor:
    """The loss of each row under fresh noise; embedding dropped if p < 2q, latent if q <= p < 3q."""
    y, b = torch.stack([row["latents"] for row in rows]).to(run.device), len(rows)
    p = torch.rand(b, device=run.device)
    keep = torch.stack([(p < q) | (p >= 3 * q), p >= 2 * q]).float()
    noise_aug = (NOISE_AUG_MEAN + NOISE_AUG_STD * torch.randn(b, device=run.device)).exp()
    given = condition(run, svd, rows, noise_aug, keep)
    return edm_loss(run, unet, y, torch.randn_like(y), log_sigma.to(run.device).exp(), *given)


# The network.


def choose_trained(run: Run, unet: SpatioTemporalUNet, pattern: str) -> None:
    """Freeze all but the parameters whose names the pattern is found in, and of these the dead ones.

    A cross-attention to one key has a softmax of 1: its queries, keys and the norm before them get no gradient.
    Raises ValueError if nothing is left.
    """
    dead = set()
    for name in cross_attentions(unet):
        norm = name.replace("attn2", "norm2")
        dead |= {f"{name}.to_q.weight", f"{name}.to_k.weight", f"{norm}.weight", f"{norm}.bias"}
    named = [name for name, _ in unet.named_parameters() if re.search(pattern, name)]
    if still := [name for name in named if name in dead]:
        run.log(f"warning: {len(still)} of {len(named)} chosen parameters can never learn and stay: {still[0]}, ...")
    if not set(named) - dead:
        raise ValueError(f"--train {pattern!r} chooses no parameter that can learn; try temporal_transformer_block or .")
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name in named and name not in dead)


def prepare(unet: SpatioTemporalUNet, checkpointing: bool) -> None:
    """Blends in float32, which autocast needs; with `checkpointing` blocks that compute their inside again."""
    for module in unet.modules():
        if isinstance(module, AlphaBlender):
            module.register_forward_pre_hook(lambda _, pair: tuple(x.float() for x in pair))
        if checkpointing and isinstance(module, SpatioTemporalResBlock | SpatioTemporalTransformer):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


# What is told of it.


@torch.no_grad()
def held_out_loss(run: Run, svd: StableVideoDiffusion, rows: list[Clip], args: argparse.Namespace, unet: Any) -> float:
    """The mean loss under the whole condition, at levels spread evenly over their distribution: the same each time."""
    rows = (rows * HELD_OUT_DRAWS)[:HELD_OUT_DRAWS]
    mean, std = args.sigma
    places = (torch.arange(HELD_OUT_DRAWS) * 0.618034 + 0.5 / HELD_OUT_DRAWS) % 1  # any few of them are spread too
    log_sigma = mean + std * 2**0.5 * torch.erfinv(2 * places - 1)
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        parts = zip(range(0, HELD_OUT_DRAWS, args.batch), log_sigma.split(args.batch), strict=True)
        losses = [drawn_loss(run, svd, rows[i : i + args.batch], levels, unet, 0) for i, levels in parts]
    return torch.cat(losses).mean().item()


def sample(svd: StableVideoDiffusion, rows: list[Clip], args: argparse.Namespace) -> Tensor:
    """A video of each held-out clip's first frame, fps and bucket: [n,t,3,H,W] in [0,1]."""
    videos = []
    for i, row in enumerate(tqdm(rows, "samples")):
        fps, bucket = float(row["numbers"][0]) + 1, float(row["numbers"][1])
        image = (row["first"] / 127.5 - 1)[None]
        given = {"num_frames": args.frames, "size": args.size, "progress": False, "seed": i}
        videos.append(svd(image, fps=fps, motion_bucket=bucket, **given)[0].frames)
    return torch.stack(videos)


def tell(run: Run, when: str, videos: Tensor, rows: list[Clip], loss: float) -> None:
    """Held-out loss, and how fast the samples move beside the clips whose first frames they start from."""
    scores = [motion_score(2 * v - 1, float(row["numbers"][0]) + 1) for v, row in zip(videos, rows, strict=True)]
    true = np.mean([float(row["numbers"][2]) for row in rows])
    run.log(f"{when}: held-out loss {loss:.5f}; motion score of samples {np.mean(scores):.3f}, of the clips {true:.3f}")


# The program.


def check(args: argparse.Namespace, run: Run) -> None:
    """Everything that can be seen before the first video is opened; then note the run, or find it as noted."""
    if args.out.exists():
        raise FileExistsError(f"{args.out} exists: name a new folder")
    if not args.videos.is_dir():
        raise FileNotFoundError(f"{args.videos} is not a folder of videos")
    for name in ("steps", "batch", "every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; need at least 1")
    if not 0 < args.lr < 1 or not args.sigma[1] > 0:
        raise ValueError(f"--lr is {args.lr:g} and --sigma {args.sigma}; need 0 < lr < 1 and a positive deviation")
    try:
        re.compile(args.train)
    except re.error as error:
        raise ValueError(f"--train {args.train!r} is not a regular expression: {error}") from error
    args.files = sorted(path for path in args.videos.iterdir() if path.suffix.lower() in VIDEOS)
    if len(args.files) < 2:
        raise ValueError(f"{args.videos} has {len(args.files)} videos ({', '.join(VIDEOS)}); need at least 2")
    listed, args.buckets = args.videos / "buckets.json", {}
    if listed.exists():
        args.buckets = json.loads(listed.read_text())
    if missing := [path.name for path in args.files if args.buckets and path.name not in args.buckets]:
        raise ValueError(f"{listed} has no motion bucket for {missing[0]}: give one for each video, or none at all")
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "work", "device", "dtype", "buckets")}
    settings |= {"files": [[path.name, path.stat().st_size] for path in args.files], "buckets": args.buckets}
    settings = json.loads(json.dumps(settings, default=str))
    noted = run.work / "settings.json"
    if noted.exists():
        past = json.loads(noted.read_text())
        if other := [name for name in settings if settings[name] != past.get(name)]:
            raise ValueError(f"{run.work} holds a run with another {other[0]}: name another --work")
    write_json(noted, settings)


def train(args: argparse.Namespace) -> None:
    run = Run(args.work, (), torch.device(args.device), args.seed)
    run = Run(run.work, (Stage("unet", args.steps, args.batch, args.lr, max(1, args.steps // 10)),), run.device, run.seed)
    svd = minisvd.load(args.model, device=args.device, vcut=False if args.model == "tiny" else None)
    args.frames = args.frames or svd.generation.num_frames
    args.size = tuple(args.size or svd.generation.size)
    svd.check_size(args.size)
    check(args, run)
    unet = svd.unet
    choose_trained(run, unet, args.train)
    clips = [load_file(file) for file in cache_clips(run, svd, args)]
    ranked(clips)
    order = np.random.default_rng(args.seed).permutation(len(clips))
    held = max(1, round(args.held_out * len(clips)))
    held_out, training = [clips[i] for i in order[:held]], [clips[i] for i in order[held:]]
    shown = held_out[:SAMPLES]
    prepare(unet, args.checkpointing)

    before = run.work / "before.safetensors"
    if not before.exists():
        videos = sample(svd, shown, args)
        tell(run, "before", videos, shown, held_out_loss(run, svd, held_out, args, unet))
        with atomic(before) as path:
            save_file({"videos": videos}, path)

    def loss(unet: SpatioTemporalUNet, rng: np.random.Generator, batch: int) -> Tensor:
        rows = [training[i] for i in rng.integers(len(training), size=batch)]
        log_sigma = args.sigma[0] + args.sigma[1] * torch.randn(batch)
        return drawn_loss(run, svd, rows, log_sigma, unet, DROPOUT).mean()

    def report(unet: SpatioTemporalUNet) -> str:
        return f"held-out loss {held_out_loss(run, svd, held_out, args, unet):.5f}"

    svd.unet = fit(run, run.stages[0], lambda: unet, loss, report).eval()
    after = sample(svd, shown, args)
    tell(run, "after", after, shown, held_out_loss(run, svd, held_out, args, svd.unet))
    true = [svd.vae.decode(row["latents"][None].to(run.device), 2)[0].cpu() for row in shown]
    rows = [torch.stack([(x + 1) / 2 for x in true]).clamp(0, 1), load_file(before)["videos"], after]
    save_png(as_image(rearrange(torch.stack(rows), "k n t c h w -> (n k h) (t w) c")), run.work / "samples.png")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=f".{args.out.name}-") as temporary:
        folder = Path(temporary) / args.out.name
        write_folder(folder, svd.unet, svd.vae, svd.clip, svd.generation, getattr(torch, args.dtype))
        os.replace(folder, args.out)
    run.log(f"wrote {args.out}; {run.work / 'samples.png'} shows clips, samples before, samples after")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path, help="a folder of " + ", ".join(VIDEOS))
    parser.add_argument("out", type=Path, help="the new model's folder")
    parser.add_argument("--model", default="tiny", help="preset, folder, .safetensors file or hub id")
    parser.add_argument("--work", type=Path, default=Path("runs/finetune"), help="clips, checkpoints, log and pictures")
    parser.add_argument("--train", default="temporal_transformer_block", help="regular expression, found in names")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--sigma", type=float, nargs=2, default=(0.7, 1.6), help="mean and deviation of ln sigma")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations twice, and keep few of them")
    parser.add_argument("--frames", type=int, help="of a clip (default: the model's)")
    parser.add_argument("--size", type=int, nargs=2, help="width and height (default: the model's)")
    parser.add_argument("--fit", choices=("crop", "pad", "stretch"), default="crop")
    parser.add_argument("--every", type=int, default=1, help="take every so many-th frame of a video")
    parser.add_argument("--held-out", type=float, default=0.1, help="this share of the clips")
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
