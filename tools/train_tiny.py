"""Train the tiny model from nothing: `python tools/train_tiny.py`. Stop it at will; the same command goes on.

Four stages, each from the last one's result: the VAE on single frames, its temporal decoder on clips, the image
encoder against captions, the UNet with the EDM v-loss on latents. The data are the endless clips of `scenes.py`.
At the end come held-out figures and the folder, in the layout of the published models.

Axes: b batch, t frames, c channels, h w latent grid, H W pixels.
"""

import argparse
import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from open_clip.loss import ClipLoss
from open_clip.transformer import TextTransformer
from PIL import Image
from torch import Tensor, distributed, multiprocessing, nn
from torch.func import functional_call
from tqdm import tqdm

import scenes
from folder_layout import atomic, write_folder
from minisvd.attention import SpatialTransformer
from minisvd.clip import ImageEncoder
from minisvd.config import NUM_GROUPS, ClipConfig, GenerationConfig, UNetConfig, VAEConfig
from minisvd.sampler import GuidanceSchedule, edm_sigmas, guided_denoiser, preconditioning, sample_euler
from minisvd.unet import ResnetBlock2D as UNetResnetBlock2D
from minisvd.unet import SpatioTemporalUNet
from minisvd.unet import TemporalResnetBlock as UNetTemporalResnetBlock
from minisvd.vae import (
    AutoencoderKLTemporalDecoder,
    Downsample,
    ResnetBlock2D,
    SpatialAttention,
    TemporalResnetBlock,
    Upsample,
)

VAE = VAEConfig(block_out_channels=(96, 64, 64, 96))  # three channels to a group of the last norms: see `linear_start`
CLIP = ClipConfig(
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=512,
    patch_size=8,
    image_size=scenes.SIZE,
    projection_dim=128,
)
UNET = UNetConfig(
    block_out_channels=(64, 96, 96),
    attention=(True, True, False),
    num_attention_heads=(2, 3, 3),
    layers_per_block=1,
    cross_attention_dim=CLIP.projection_dim,
    addition_time_embed_dim=32,
)
GENERATION = GenerationConfig(
    num_frames=scenes.FRAMES, guidance=(1.5, 1.5), size=(scenes.SIZE, scenes.SIZE), decode_chunk=8
)

HELD_OUT_SEED = 1_000_003
EMA_DECAY = 0.999
KL_WEIGHT = 1e-4  # of the KL divergence per latent number, against the loss per colour value
LATENT_NOISE = 0.3  # at most, on unit-variance latents, when the temporal decoder learns: sampled ones are not exact
SIGMA_MEAN, SIGMA_STD = 1.0, 1.6  # of ln sigma (arXiv 2311.15127, appendix D)
NOISE_AUG_MEAN, NOISE_AUG_STD = -3.0, 0.5  # of ln noise_aug
CONDITION_DROPOUT = 0.1
POOL = 6000  # clips whose latents the UNet learns from

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Stage:
    """How long and how fast: `steps` of `batch` items, peak learning rate `lr`; a report every `report` steps."""

    name: str
    steps: int
    batch: int
    lr: float
    report: int


VAE_FRAMES = Stage("vae-frames", steps=1700, batch=8, lr=1.5e-3, report=340)
VAE_VIDEO = Stage("vae-video", steps=250, batch=2, lr=5e-4, report=50)
CLIP_CAPTIONS = Stage("clip", steps=450, batch=256, lr=1e-3, report=100)
UNET_VIDEO = Stage("unet", steps=4000, batch=8, lr=8e-4, report=1000)
STAGES = (VAE_FRAMES, VAE_VIDEO, CLIP_CAPTIONS, UNET_VIDEO)


@dataclass(frozen=True)
class Run:
    """Where a run works and on what: `work` holds checkpoints and the log; this is process `rank` of `processes`.

    With `finish`, a stage that was begun counts as done where its checkpoint is.
    """

    work: Path
    device: torch.device
    seed: int
    finish: bool = False
    rank: int = 0
    processes: int = 1

    def log(self, line: str) -> None:
        """Show a line above the progress bar and append it to the log; the first process only."""
        if self.rank == 0:
            tqdm.write(line)
            with (self.work / "train.log").open("a") as file:
                file.write(f"{time.strftime('%H:%M:%S')} {line}\n")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def unit(self, frames: np.ndarray) -> Tensor:
        """uint8 frames to a tensor in [-1, 1] on the device."""
        return torch.from_numpy(scenes.to_unit(frames)).to(self.device)

    def average(self, parameters: list[Tensor]) -> None:
        """Average the parameters' gradients over the processes."""
        if self.processes > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            distributed.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient) / self.processes)


def fit(
    run: Run,
    stage: Stage,
    build: Callable[[], M],
    loss: Callable[[M, np.random.Generator, int], Tensor],
    report: Callable[[M], str],
) -> M:
    """Train what `build` returns for the stage's steps and return its moving average; goes on where a checkpoint ends.

    AdamW, gradient norm at most 1, learning rate linear up over 100 steps and a cosine down to zero. `loss` draws its
    share of the batch from a generator that only seed, stage, step and process fix: a stopped run goes on as it would.
    """
    checkpoint = run.work / f"{stage.name}.pt"
    torch.manual_seed(run.seed)
    model = build().to(run.device)
    ema = copy.deepcopy(model)
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    averaged: list[Tensor] = [a for a, p in zip(ema.parameters(), model.parameters(), strict=True) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, betas=(0.9, 0.99), weight_decay=0.01)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=run.device)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    if run.processes > 1:
        distributed.barrier()  # nobody writes a checkpoint before everybody has read it
    if first >= stage.steps or (run.finish and first > 0):
        return ema
    run.log(f"{stage.name}: from step {first} of {stage.steps}, {sum(p.numel() for p in parameters):,} parameters")
    saved, losses = time.monotonic(), []
    bar = tqdm(range(first + 1, stage.steps + 1), stage.name, stage.steps, initial=first, disable=run.rank > 0)
    for step in bar:
        where = [run.seed, STAGES.index(stage), step, run.rank]
        rng = np.random.default_rng(where)
        torch.manual_seed(int(rng.integers(2**32)))
        lr = stage.lr * min(step / 100, 0.5 + 0.5 * math.cos(math.pi * step / stage.steps))
        optimizer.param_groups[0]["lr"] = lr
        value = loss(model, rng, stage.batch // run.processes)
        optimizer.zero_grad()
        value.backward()
        run.average(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, 1 - min(EMA_DECAY, step / (step + 10)))
        losses.append(value.item())
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}", refresh=False)
        done = step == stage.steps
        if run.rank == 0 and (step % stage.report == 0 or done):
            with torch.no_grad():
                run.log(f"{stage.name}: step {step}, loss {np.mean(losses):.5f}, {report(ema)}")
            losses = []
        if run.rank == 0 and (time.monotonic() - saved > 60 or done):
            with atomic(checkpoint) as path:
                state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state | {"step": step}, path)
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
    zero(vae.decoder.time_conv_out)
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


def decode_frames(vae: AutoencoderKLTemporalDecoder, z: Tensor) -> Tensor:
    """The decoder's spatial path alone: unscaled latents [b,4,h,w] -> frames [b,3,H,W]."""
    decoder, mid = vae.decoder, vae.decoder.mid_block
    first, second = (module for module in mid.modules() if isinstance(module, ResnetBlock2D))
    x = second(mid.attentions[0](first(decoder.conv_in(z))))
    for module in decoder.up_blocks.modules():
        if isinstance(module, (ResnetBlock2D, Upsample)):
            x = module(x)
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

    def loss(vae: AutoencoderKLTemporalDecoder, rng: np.random.Generator, batch: int) -> Tensor:
        frames, silhouettes = draw_frames(rng, batch)
        image = run.unit(frames)
        with run.autocast():
            mean, log_variance = posterior(vae, image)
            output = decode_frames(vae, mean + (0.5 * log_variance).exp() * torch.randn_like(mean))
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return reconstruction_loss(output, image, torch.from_numpy(silhouettes).to(run.device)) + KL_WEIGHT * kl

    def report(vae: AutoencoderKLTemporalDecoder) -> str:
        with run.autocast():
            mean, log_variance = posterior(vae, held_out)
            output = decode_frames(vae, mean)
        save_sheet(run.work / "vae-frames.png", held_out[:12], output[:12], held_out[12:24], output[12:24])
        noise = (0.5 * log_variance).exp().mean((0, 2, 3)) / mean.std((0, 2, 3))
        noises = ", ".join(f"{x:.3f}" for x in noise.tolist())
        return f"held-out PSNR {psnr(output, held_out):.2f} dB, posterior noise over latent std {noises}"

    vae = fit(run, VAE_FRAMES, new_vae, loss, report)
    normalise_latents(run, vae)
    return vae


@torch.no_grad()
def normalise_latents(run: Run, vae: AutoencoderKLTemporalDecoder) -> None:
    """Rescale each latent channel to standard deviation 1 / scaling_factor, in the convolutions on its either side."""
    image = run.unit(draw_frames(np.random.default_rng(run.seed), 512)[0])
    mean = torch.cat([posterior(vae, part)[0] for part in image.split(64)])
    scale = 1 / (VAE.scaling_factor * mean.std((0, 2, 3)))
    channels, bias = VAE.latent_channels, vae.quant_conv.bias
    assert bias is not None
    vae.quant_conv.weight[:channels] *= scale[:, None, None, None]
    bias[:channels] *= scale
    bias[channels:] += 2 * scale.log()
    vae.decoder.conv_in.weight /= scale[:, None, None]


def train_vae_video(run: Run, vae: AutoencoderKLTemporalDecoder) -> AutoencoderKLTemporalDecoder:
    """The whole decoder on clips, from the latents of a fixed encoder with a little noise on them."""
    clips, _ = draw_clips(np.random.default_rng(HELD_OUT_SEED), 6)
    held_out = run.unit(clips)

    def build() -> AutoencoderKLTemporalDecoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        return vae

    def decode(vae: AutoencoderKLTemporalDecoder, video: Tensor, noise: Tensor) -> Tensor:
        z = encode_video(run, vae, video)
        z = (z + noise[:, None, None, None, None] * torch.randn_like(z)) / VAE.scaling_factor
        weights = {name: weight.bfloat16() for name, weight in vae.decoder.named_parameters()}
        return functional_call(vae.decoder, weights, (z.bfloat16(), video.shape[1]))

    def loss(vae: AutoencoderKLTemporalDecoder, rng: np.random.Generator, batch: int) -> Tensor:
        frames, silhouettes = draw_clips(rng, batch)
        video, silhouette = run.unit(frames), torch.from_numpy(silhouettes).to(run.device)
        output = decode(vae, video, LATENT_NOISE * torch.rand(batch, device=run.device))
        return reconstruction_loss(output.flatten(0, 1), video.flatten(0, 1), silhouette.flatten(0, 1))

    def report(vae: AutoencoderKLTemporalDecoder) -> str:
        clean, noisy = (decode(vae, held_out, torch.full((6,), noise)) for noise in (0.0, LATENT_NOISE))
        save_sheet(run.work / "vae-video.png", held_out[0], clean[0], held_out[1], clean[1])
        return f"held-out PSNR {psnr(clean, held_out):.2f} dB, from noisy latents {psnr(noisy, held_out):.2f} dB"

    return fit(run, VAE_VIDEO, build, loss, report)


@torch.no_grad()
def encode_video(run: Run, vae: AutoencoderKLTemporalDecoder, video: Tensor) -> Tensor:
    """Frames [b,t,3,H,W] in [-1,1] -> scaled latents [b,t,4,h,w], of unit variance."""
    with run.autocast():
        latents, _ = posterior(vae, rearrange(video, "b t c h w -> (b t) c h w"))
    return rearrange(VAE.scaling_factor * latents, "(b t) c h w -> b t c h w", b=len(video))


# The image encoder, against captions.

WORDS = sorted({word for name in (*scenes.HEADINGS, *scenes.COLOURS, *scenes.SHAPES) for word in name.split()})
WORDS += ["a", "an", "moving", "over", *scenes.TONES, *scenes.BACKGROUNDS]
CAPTION_LENGTH = 12  # words, and an end


class CaptionedImages(nn.Module):
    """The image encoder beside a small text encoder, which only its training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.image = ImageEncoder(CLIP)
        self.text = TextTransformer(
            context_length=CAPTION_LENGTH,
            vocab_size=len(WORDS) + 2,  # 0 pads, the last one ends
            width=128,
            heads=4,
            layers=2,
            output_dim=CLIP.projection_dim,
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors [b, d] of images and of captions."""
        return F.normalize(self.image(image)[:, 0], dim=-1), F.normalize(self.text(tokens), dim=-1)


def tokens(captions: list[str]) -> Tensor:
    """[b, CAPTION_LENGTH], by words."""
    ids = torch.zeros(len(captions), CAPTION_LENGTH, dtype=torch.long)
    for row, caption in zip(ids, captions, strict=True):
        words = [1 + WORDS.index(word) for word in caption.split()]
        row[: len(words) + 1] = torch.tensor([*words, len(WORDS) + 1])
    return ids


def draw_captioned(rng: np.random.Generator, count: int, distinct: bool = False) -> tuple[np.ndarray, list[str]]:
    """First frames [b,3,H,W], uint8, and their captions; `distinct` allows no caption twice."""
    frames, captions = [], []
    while len(captions) < count:
        scene = scenes.random_scene(rng)
        if not (distinct and scenes.caption(scene) in captions):
            frames.append(scenes.render(scene, scenes.path(scene, 0, 1, frames=1)))
            captions.append(scenes.caption(scene))
    return np.concatenate(frames), captions


def train_clip(run: Run) -> ImageEncoder:
    """Contrastively: each image's own caption among a batch's, and each caption's own image."""
    contrast = ClipLoss()
    frames, captions = draw_captioned(np.random.default_rng(HELD_OUT_SEED), 1000, distinct=True)
    held_out = run.unit(frames)

    def loss(model: CaptionedImages, rng: np.random.Generator, batch: int) -> Tensor:
        frames, captions = draw_captioned(rng, batch)
        image, text = model(run.unit(frames), tokens(captions).to(run.device))
        return contrast(image, text, model.logit_scale.exp().clamp(max=100))

    def report(model: CaptionedImages) -> str:
        image, text = model(held_out, tokens(captions).to(run.device))
        groups = zip(image.split(100), text.split(100), strict=True)
        hits = torch.cat([(i @ t.T).argmax(1) == torch.arange(len(i), device=i.device) for i, t in groups])
        return f"held-out images that find their caption among 100: {hits.float().mean():.1%}"

    return fit(run, CLIP_CAPTIONS, CaptionedImages, loss, report).image


# The UNet.


@dataclass
class Parts:
    """The three parts of a model, as in the published folders."""

    unet: SpatioTemporalUNet
    vae: AutoencoderKLTemporalDecoder
    clip: ImageEncoder


def new_unet() -> SpatioTemporalUNet:
    """A UNet that starts at F = 0, each residual branch at zero gain."""
    unet = SpatioTemporalUNet(UNET)
    zero(unet.conv_out)
    for module in unet.modules():
        if isinstance(module, (UNetResnetBlock2D, UNetTemporalResnetBlock)):
            zero(module.conv2)
        elif isinstance(module, SpatialTransformer):
            zero(module.proj_out)
    return unet


def clip_pool(run: Run, vae: AutoencoderKLTemporalDecoder, clip: ImageEncoder) -> dict[str, Tensor]:
    """This process's share of `POOL` clips, made once: latents [n,t,4,h,w], image embeddings [n,1,d], ids [n,2], and
    the first frames [n,3,H,W] as uint8, because noise is added to them before they are encoded."""
    file = run.work / f"pool-{run.rank}-of-{run.processes}.pt"
    if file.exists():
        return torch.load(file, map_location=run.device)
    rng, rows = np.random.default_rng([run.seed, len(STAGES), run.rank]), []
    for _ in tqdm(range(POOL // run.processes), "clips for the unet", disable=run.rank > 0):
        _, fps, bucket, frames = scenes.random_clip(rng)
        video = run.unit(frames)[None]
        with torch.no_grad():
            latents, embeds = encode_video(run, vae, video), clip(video[:, 0])
        rows.append((latents, embeds, torch.tensor([[fps - 1.0, bucket]]).to(run.device), torch.from_numpy(frames[:1])))
    latents, embeds, ids, first = (torch.cat(column) for column in zip(*rows, strict=True))
    pool = {"latents": latents, "embeds": embeds, "ids": ids, "first": first}
    with atomic(file) as path:
        torch.save(pool, path)
    return pool


def train_unet(run: Run, vae: AutoencoderKLTemporalDecoder, clip: ImageEncoder) -> SpatioTemporalUNet:
    """EDM's v-loss |F(c_in x, c_noise) - (y - c_skip x) / c_out|^2 at x = y + sigma n, ln sigma normal.

    The condition frame has noise of a log-normal deviation, which is told; the whole condition is dropped, embedding
    and latent together, from one clip in ten, for guidance.
    """
    pool = {} if run.finish else clip_pool(run, vae, clip)

    def loss(unet: SpatioTemporalUNet, rng: np.random.Generator, batch: int) -> Tensor:
        rows = torch.from_numpy(rng.integers(len(pool["latents"]), size=batch))
        y, embeds, ids = (pool[name][rows] for name in ("latents", "embeds", "ids"))
        noise_aug = (NOISE_AUG_MEAN + NOISE_AUG_STD * torch.randn(batch, device=run.device)).exp()
        image = run.unit(pool["first"][rows].cpu().numpy())
        keep = (torch.rand(batch, device=run.device) >= CONDITION_DROPOUT).float()
        with torch.no_grad(), run.autocast():
            latent, _ = posterior(vae, image + noise_aug[:, None, None, None] * torch.randn_like(image))
        latent, embeds = latent * keep[:, None, None, None], embeds * keep[:, None, None]
        sigma = (SIGMA_MEAN + SIGMA_STD * torch.randn(batch, device=run.device)).exp()
        c_skip, c_out, c_in, c_noise = preconditioning(sigma[:, None, None, None, None])
        x = y + sigma[:, None, None, None, None] * torch.randn_like(y)
        sample = torch.cat([c_in * x, repeat(latent, "b c h w -> b t c h w", t=y.shape[1])], dim=2)
        output = unet(sample, c_noise.flatten(), embeds, torch.cat([ids, noise_aug[:, None]], dim=1))
        return (output - (y - c_skip * x) / c_out).square().mean()

    def report(unet: SpatioTemporalUNet) -> str:
        return measure(run, Parts(unet, vae, clip), count=8)

    return fit(run, UNET_VIDEO, new_unet, loss, report)


# Held-out figures, and the folder.


@torch.no_grad()
def generate(run: Run, parts: Parts, image: Tensor, fps: Tensor, bucket: Tensor, noise_aug: float = 0.02) -> Tensor:
    """Videos [b,t,3,H,W] in [-1,1] from images [b,3,H,W], with the settings that the folder will state."""
    generator = torch.Generator().manual_seed(run.seed)
    aug_noise = torch.randn(image.shape, generator=generator).to(run.device)
    latent = parts.vae.encode(image + noise_aug * aug_noise)
    ids = torch.stack([fps - 1, bucket, torch.full_like(fps, noise_aug)], dim=1).float()
    schedule = GuidanceSchedule(*GENERATION.guidance)
    denoise = guided_denoiser(parts.unet, parts.clip(image), latent, ids.to(run.device), schedule)
    noise = torch.randn((len(image), scenes.FRAMES, *latent.shape[1:]), generator=generator).to(run.device)
    return parts.vae.decode(sample_euler(denoise, noise, edm_sigmas(GENERATION.steps))).clamp(-1, 1)


def measure(run: Run, parts: Parts, count: int) -> str:
    """Generate from `count` unseen first frames, and measure the videos against what the scenes and numbers say.

    A heading is measured where the shape should travel at least 4 pixels.
    """
    rng = np.random.default_rng(HELD_OUT_SEED)
    turns, paces, places, colours, kept, found = [], [], [], [], [], []
    for start in range(0, count, 8):
        clips = [scenes.random_clip(rng) for _ in range(min(8, count - start))]
        truth = run.unit(np.stack([frames for *_, frames in clips]))
        fps, bucket = (torch.tensor([clip[i] for clip in clips]) for i in (1, 2))
        videos = generate(run, parts, truth[:, 0], fps, bucket)
        if start == 0:
            pairs = [row for pair in zip(truth, videos, strict=True) for row in pair]
            save_sheet(run.work / "unet.png", *pairs)
        for (scene, fps, bucket, _), video in zip(clips, (videos.cpu().numpy() + 1) / 2, strict=True):
            track, path = scenes.track(video, scene), scenes.path(scene, bucket, fps)
            found.append(not np.isnan(track.positions).any())
            kept.append(track.shape == scene.shape)
            colours.append(np.abs(track.rgb - scene.rgb).max())
            places.append(np.linalg.norm(track.positions[-1] - path[-1]))
            paces.append((scenes.speed(bucket) / fps, np.nan_to_num(track.speed)))
            if np.linalg.norm(path[-1] - path[0]) >= 4:
                turns.append(np.degrees(scenes.angle_between(track.heading, scene.heading)))
    ranks = np.argsort(np.argsort(np.array(paces), axis=0), axis=0)
    return (
        f"{count} held-out videos: heading error median {np.nanmedian(turns):.1f} degrees, "
        f"speed Spearman {np.corrcoef(ranks.T)[0, 1]:.3f}, last position off by {np.nanmedian(places):.2f} pixels, "
        f"colour within 0.1 in {np.mean(np.array(colours) < 0.1):.0%}, shape kept in {np.mean(kept):.0%}, "
        f"found in every frame in {np.mean(found):.0%}"
    )


def export(run: Run, parts: Parts, out: Path) -> None:
    """Write the folder, float16, with an unseen scene as its example."""
    write_folder(out, parts.unet, parts.vae, parts.clip, GENERATION, torch.float16)
    save_sheet(out / "example.png", run.unit(draw_captioned(np.random.default_rng(HELD_OUT_SEED), 1)[0]), zoom=1)
    size = sum(path.stat().st_size for path in out.rglob("*.safetensors")) / 1e6
    run.log(f"wrote {out}, {size:.1f} MB of weights")


def train(rank: int, args: argparse.Namespace) -> None:
    """Every stage in turn, as process `rank` of `args.processes`."""
    if args.processes > 1:
        torch.set_num_threads(1)
        rendezvous = f"file://{(args.work / 'rendezvous').resolve()}"
        distributed.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=args.processes, timeout=timedelta(hours=3)
        )
    run = Run(args.work, torch.device(args.device), args.seed, args.finish, rank, args.processes)
    vae = train_vae_frames(run)
    vae = train_vae_video(run, vae)
    clip = train_clip(run)
    unet = train_unet(run, vae, clip)
    if rank == 0:
        parts = Parts(unet, vae, clip)
        export(run, parts, args.out)
        run.log(measure(run, parts, count=100))


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cores = min(os.cpu_count() or 1, 2) if device == "cpu" else 1
    parser = argparse.ArgumentParser(description="Train the tiny model.")
    parser.add_argument("--out", type=Path, default=Path("weights/tiny"), help="the folder of the finished model")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="checkpoints, pictures and the log")
    parser.add_argument("--device", default=device)
    parser.add_argument("--processes", type=int, default=cores, help="share each batch among so many processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--finish", action="store_true", help="train no more: measure and write what there is")
    args = parser.parse_args()
    args.processes = 1 if args.finish else args.processes
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "rendezvous").unlink(missing_ok=True)
    multiprocessing.spawn(train, (args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
