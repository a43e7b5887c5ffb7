"""Train the tiny model from nothing: `python tools/train_tiny.py`. Stop it at will; the same command goes on.

Four stages, each from the last one's result: the VAE on single frames, its temporal decoder on clips, the image
encoder against captions, the UNet with the EDM v-loss on latents. The data are the endless clips of `scenes.py`.

Axes: b batch, t frames, c channels, h w grid.
"""

import argparse
import contextlib
import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import scenes
from minisvd.config import NUM_GROUPS, VAEConfig
from minisvd.vae import (
    AutoencoderKLTemporalDecoder,
    Downsample,
    ResnetBlock2D,
    SpatialAttention,
    SpatioTemporalResBlock,
    TemporalResnetBlock,
    UpBlock,
    Upsample,
)

VAE = VAEConfig(block_out_channels=(96, 64, 64, 96))  # three channels to a group of the last norms: see `linear_start`
HELD_OUT_SEED = 1_000_003
KL_WEIGHT = 1e-4  # of the KL divergence per latent number, against the loss per colour value
EMA_DECAY = 0.999


@dataclass(frozen=True)
class Stage:
    """How long and how fast: `steps` of `batch` items, peak learning rate `lr`; a report every `report` steps."""

    name: str
    steps: int
    batch: int
    lr: float
    report: int = 200


VAE_FRAMES = Stage("vae-frames", steps=6000, batch=8, lr=1.5e-3)
VAE_VIDEO = Stage("vae-video", steps=600, batch=2, lr=5e-4, report=200)
STAGES = (VAE_FRAMES, VAE_VIDEO)


@dataclass
class Run:
    """Where a run works and on what: `work` holds checkpoints and the log."""

    work: Path
    device: torch.device
    seed: int

    def log(self, line: str) -> None:
        """Show a line above the progress bar and append it to the log."""
        tqdm.write(line)
        with (self.work / "train.log").open("a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {line}\n")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def unit(self, frames: np.ndarray) -> Tensor:
        """uint8 frames to a tensor in [-1, 1] on the device."""
        return torch.from_numpy(scenes.to_unit(frames)).to(self.device)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write to the yielded temporary path; it takes the place of `path` only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    yield temporary
    os.replace(temporary, path)


def fit(
    run: Run,
    stage: Stage,
    model: nn.Module,
    loss: Callable[[nn.Module, np.random.Generator], Tensor],
    report: Callable[[nn.Module], str],
) -> nn.Module:
    """Train `model` for the stage's steps and return its moving average; goes on where a checkpoint ends.

    AdamW, gradient norm at most 1, learning rate linear up over 100 steps and a cosine down to zero. `loss` draws
    its batch from the generator it is given, whose state is in the checkpoint, so a stopped run repeats no batch.
    """
    checkpoint = run.work / f"{stage.name}.pt"
    ema = copy.deepcopy(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    averaged = [a for a, p in zip(ema.parameters(), model.parameters(), strict=True) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, betas=(0.9, 0.99), weight_decay=0.01)
    rng, first = np.random.default_rng([run.seed, STAGES.index(stage)]), 0
    torch.manual_seed(run.seed)
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=run.device, weights_only=False)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        rng.bit_generator.state = state["rng"]
        torch.set_rng_state(state["torch_rng"].cpu())
        first = state["step"]
    if first >= stage.steps:
        return ema

    def save(step: int) -> None:
        with atomic(checkpoint) as path:
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step, "rng": rng.bit_generator.state, "torch_rng": torch.get_rng_state()}, path)

    run.log(f"{stage.name}: from step {first} of {stage.steps}, {sum(p.numel() for p in parameters):,} parameters")
    saved, losses = time.monotonic(), []
    for step in (bar := tqdm(range(first + 1, stage.steps + 1), stage.name, initial=first, total=stage.steps)):
        lr = stage.lr * min(step / 100, 0.5 + 0.5 * math.cos(math.pi * step / stage.steps))
        optimizer.param_groups[0]["lr"] = lr
        value = loss(model, rng)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, 1 - min(EMA_DECAY, step / (step + 10)))
        losses.append(value.item())
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}", refresh=False)
        if step % stage.report == 0 or step == stage.steps:
            with torch.no_grad():
                run.log(f"{stage.name}: step {step}, loss {np.mean(losses):.5f}, {report(ema)}")
            losses = []
        if time.monotonic() - saved > 60 or step == stage.steps:
            save(step)
            saved = time.monotonic()
    return ema


# The VAE: frames alone first, then the temporal decoder.


def new_vae() -> AutoencoderKLTemporalDecoder:
    """An autoencoder that starts as a linear one (`linear_start`) and whose temporal layers start as identities."""
    vae = AutoencoderKLTemporalDecoder(VAE)
    linear_start(vae)
    for module in vae.modules():
        if isinstance(module, TemporalResnetBlock):
            zero(module.conv2)
    nn.init.dirac_(vae.decoder.time_conv_out.weight)
    return vae


def zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


@torch.no_grad()
def linear_start(vae: AutoencoderKLTemporalDecoder, level: float = 2.0) -> None:
    """Start as average pooling and nearest upsampling of the colours, with the residual branches at zero gain.

    A norm takes away the mean and the deviation of a group, and a group here is two or three channels: from a random
    start the level and contrast of a picture, so its colours, come last. So of each group the first channel carries
    a mixture u of the colours and the others the constants +level and -level, which keep the group's mean near zero
    and its deviation near `level`. Neighbouring groups carry u and -u: silu(u) - silu(-u) = u, so that both ends,
    which are norm, silu and convolution, start linear too.
    """
    sign = torch.tensor([1.0, -1.0]).repeat(NUM_GROUPS // 2)

    def constants(layer: nn.Conv2d) -> None:
        slots = torch.tensor([0.0, level, -level])[: layer.out_channels // NUM_GROUPS]
        layer.bias.copy_(slots.repeat(NUM_GROUPS))  # pyright: ignore[reportOptionalMemberAccess]

    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            zero(module.conv2)
            constants(module.conv1)
            if isinstance(module.conv_shortcut, nn.Conv2d):
                zero(module.conv_shortcut)
                c_out, c_in = module.conv_shortcut.weight.shape[:2]
                module.conv_shortcut.weight[:: c_out // NUM_GROUPS, :: c_in // NUM_GROUPS, 0, 0] = torch.eye(NUM_GROUPS)
                constants(module.conv_shortcut)
        elif isinstance(module, SpatialAttention):
            zero(module.to_out)
        elif isinstance(module, Downsample):
            zero(module.conv)
            module.conv.weight[:, :, :2, :2] = torch.eye(module.conv.in_channels)[:, :, None, None] / 4
        elif isinstance(module, Upsample):
            zero(module.conv)
            nn.init.dirac_(module.conv.weight)
    for coder, c_in, c_out in ((vae.encoder, 3, VAE.latent_channels), (vae.decoder, VAE.latent_channels, 3)):
        mix = F.normalize(torch.randn(NUM_GROUPS // 2, c_in)).repeat_interleave(2, dim=0) * sign[:, None]
        coder.conv_in.weight.mul_(0.1)
        coder.conv_in.weight[:: coder.conv_in.out_channels // NUM_GROUPS, :, 1, 1] = mix
        constants(coder.conv_in)
        nn.init.constant_(coder.conv_norm_out.weight, level)
        zero(coder.conv_out)
        unmix = 2 * torch.linalg.pinv(mix)[: min(c_in, c_out)]
        coder.conv_out.weight[: len(unmix), :: coder.conv_out.in_channels // NUM_GROUPS, 1, 1] = unmix
    zero(vae.quant_conv)
    nn.init.dirac_(vae.quant_conv.weight)
    vae.quant_conv.bias[VAE.latent_channels :] = -8.0  # pyright: ignore[reportOptionalSubscript]  # log-variance


def temporal_blocks(vae: AutoencoderKLTemporalDecoder) -> list[SpatioTemporalResBlock]:
    return [module for module in vae.modules() if isinstance(module, SpatioTemporalResBlock)]


def decode_frames(vae: AutoencoderKLTemporalDecoder, z: Tensor) -> Tensor:
    """The decoder's spatial path alone: unscaled latents [b,4,h,w] -> frames [b,3,H,W]."""
    decoder, mid = vae.decoder, vae.decoder.mid_block
    x = mid.resnets[0].spatial_res_block(decoder.conv_in(z))
    x = mid.resnets[1].spatial_res_block(mid.attentions[0](x))
    for block in decoder.up_blocks:
        assert isinstance(block, UpBlock)
        for resnet in block.resnets:
            x = resnet.spatial_res_block(x)
        for upsampler in block.upsamplers:
            x = upsampler(x)
    return decoder.conv_out(F.silu(decoder.conv_norm_out(x)))


def draw_frames(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Single frames [b,3,H,W], uint8, each somewhere on a fresh scene's path; and the shapes' silhouettes [b,H,W]."""
    frames, silhouettes = [], []
    for _ in range(count):
        scene = scenes.random_scene(rng)
        at = scenes.path(scene, rng.uniform(0, 255), scenes.FPS[0])[-1:]
        frames.append(scenes.render(scene, at))
        silhouettes.append(scenes.silhouette(scene, at))
    return np.concatenate(frames), np.concatenate(silhouettes)


def draw_clips(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole clips [b,t,3,H,W], uint8, and the shapes' silhouettes [b,t,H,W]."""
    clips = [scenes.random_clip(rng) for _ in range(count)]
    silhouettes = [scenes.silhouette(scene, scenes.path(scene, bucket, fps)) for scene, fps, bucket, _ in clips]
    return np.stack([frames for *_, frames in clips]), np.stack(silhouettes)


def posterior(vae: AutoencoderKLTemporalDecoder, image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of q(z | image), unscaled, float32."""
    mean, log_variance = vae.quant_conv(vae.encoder(image)).float().chunk(2, dim=1)
    return mean, log_variance.clamp(-20, 10)


def reconstruction_loss(output: Tensor, target: Tensor, silhouette: Tensor) -> Tensor:
    """L1 + L2, the shape and its surroundings weighted five times: a shape is a tenth of its frame."""
    weight = 1 + 4 * F.max_pool2d(silhouette, 5, stride=1, padding=2)[:, None]
    error = output.float() - target
    return (weight * (error.abs() + error.square())).mean()


def psnr(output: Tensor, target: Tensor) -> float:
    """Mean over images of 10 log10(4 / mean squared error), images in [-1, 1], in dB."""
    error = (output.float().clamp(-1, 1) - target).square().flatten(-3).mean(-1)
    return (10 * torch.log10(4 / error)).mean().item()


def save_sheet(path: Path, *rows: Tensor, zoom: int = 2) -> None:
    """A picture of rows of images [n,3,H,W] in [-1, 1], enlarged."""
    sheet = torch.cat([rearrange(row.float().cpu().clamp(-1, 1), "n c h w -> h (n w) c") for row in rows])
    image = Image.fromarray(((sheet + 1) * 127.5).round().byte().numpy())
    with atomic(path) as temporary:
        image.resize((zoom * image.width, zoom * image.height), Image.Resampling.NEAREST).save(temporary, "PNG")


def train_vae_frames(run: Run) -> AutoencoderKLTemporalDecoder:
    """Encoder and spatial decoder on single frames; then scale the latents so that 0.18215 makes them unit variance."""
    held_out = run.unit(draw_frames(np.random.default_rng(HELD_OUT_SEED), 96)[0])

    def loss(vae: nn.Module, rng: np.random.Generator) -> Tensor:
        assert isinstance(vae, AutoencoderKLTemporalDecoder)
        frames, silhouettes = draw_frames(rng, VAE_FRAMES.batch)
        image = run.unit(frames)
        with run.autocast():
            mean, log_variance = posterior(vae, image)
            output = decode_frames(vae, mean + (0.5 * log_variance).exp() * torch.randn_like(mean))
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return reconstruction_loss(output, image, torch.from_numpy(silhouettes).to(run.device)) + KL_WEIGHT * kl

    def report(vae: nn.Module) -> str:
        assert isinstance(vae, AutoencoderKLTemporalDecoder)
        with run.autocast():
            mean, log_variance = posterior(vae, held_out)
            output = decode_frames(vae, mean)
        save_sheet(run.work / "vae-frames.png", held_out[:12], output[:12], held_out[12:24], output[12:24])
        noise = (0.5 * log_variance).exp().mean((0, 2, 3)) / mean.std((0, 2, 3))
        noises = ", ".join(f"{x:.3f}" for x in noise.tolist())
        return f"held-out PSNR {psnr(output, held_out):.2f} dB, posterior noise over latent std {noises}"

    vae = fit(run, VAE_FRAMES, new_vae().to(run.device), loss, report)
    assert isinstance(vae, AutoencoderKLTemporalDecoder)
    normalise_latents(run, vae)
    return vae


@torch.no_grad()
def normalise_latents(run: Run, vae: AutoencoderKLTemporalDecoder) -> None:
    """Rescale each latent channel to standard deviation 1 / scaling_factor, in the convolutions on its either side."""
    image = run.unit(draw_frames(np.random.default_rng(run.seed), 512)[0])
    mean = torch.cat([posterior(vae, part)[0] for part in image.split(64)])
    scale = 1 / (VAE.scaling_factor * mean.std((0, 2, 3)))
    channels = VAE.latent_channels
    bias = vae.quant_conv.bias
    assert bias is not None
    vae.quant_conv.weight[:channels] *= scale[:, None, None, None]
    bias[:channels] *= scale
    bias[channels:] += 2 * scale.log()
    vae.decoder.conv_in.weight /= scale[:, None, None]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny model.")
    parser.add_argument("--out", type=Path, default=Path("weights/tiny"), help="the folder of the finished model")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="checkpoints, pictures and the log")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    run = Run(args.work, torch.device(args.device), args.seed)
    train_vae_frames(run)


if __name__ == "__main__":
    main()
