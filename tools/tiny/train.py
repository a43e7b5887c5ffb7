"""Train the tiny model from nothing: `python -m tools.tiny.train`. Stop it at will; the same command goes on.

Stages, each from the last one's result: the VAE on single frames, its temporal decoder on clips, the image encoder
against captions, the UNet with the EDM v-loss on latents, the decoder again, on what the UNet samples. The data are the
endless clips of `scenes.py`. At the end come held-out figures and the folder, in the layout of the published models.

Axes: b batch, t frames, c channels, h w latent grid, H W pixels.
"""

import argparse
import copy
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from open_clip.loss import ClipLoss
from safetensors.torch import save_file
from torch import Tensor, distributed, multiprocessing, nn
from torch.func import functional_call
from tqdm import tqdm

from minisvd.attention import SpatioTemporalTransformer
from minisvd.clip import ImageEncoder
from minisvd.config import NUM_GROUPS, ClipConfig, GenerationConfig, UNetConfig, VAEConfig
from minisvd.pipeline import StableVideoDiffusion
from minisvd.sampler import GuidanceSchedule, edm_sigmas, preconditioning
from minisvd.unet import ResnetBlock2D, SpatioTemporalUNet, TemporalResnetBlock, Upsample
from minisvd.vae import (
    AsymmetricDownsample,
    AutoencoderKLTemporalDecoder,
    ResnetBlock,
    ResnetBlockOverTime,
    SpatialAttention,
)
from tools.measure.metrics import against_truth, psnr
from tools.output import as_image, atomic, save_png
from tools.tiny import scenes
from tools.tiny.captions import TEXT_ENCODER, CaptionedImages, draw_captioned, tokens
from tools.tiny.evaluate import BATCH, HELD_OUT_SEED, draw_clips, evaluate, generate, table, video_figures
from tools.tiny.fit import Run, Stage, fit, half, muon_and_adamw, written_out_attention

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
    num_frames=scenes.FRAMES, steps=3, guidance=(1.0, 1.0), size=(scenes.SIZE, scenes.SIZE), decode_chunk=8
)

KL_WEIGHT = 1e-4  # of the KL divergence per latent number, against the loss per colour value
LATENT_NOISE = 0.03  # on unit-variance latents, when the temporal decoder learns: sampled ones are not exact either
SIGMA_MEAN, SIGMA_STD = 1.0, 1.6  # of ln sigma (arXiv 2311.15127, appendix D)
WIDE_SIGMA_MEAN = 1.6  # of the last stage: what is wrong with the form is so at all levels above 1
NOISE_AUG_MEAN, NOISE_AUG_STD = -3.0, 0.5  # of ln noise_aug
CONDITION_DROPOUT = 0.1
POOL, FAST_POOL, WIDE_POOL = 6000, 8000, 12000  # clips whose latents the UNet learns from, for each of its stages
MISTAKEN, MISTAKEN_POOL = 0.3, 4000  # of the study's second model: the share under another clip's condition; its clips
DRAWN, FAINT = 0.1, 0.12  # shares of the wide: drawings on dark grounds, and scenes whose nose and tail hardly show
FAINTEST, BRIGHTEST = (0.02, 0.5), 1.05  # range of their opacity; of a drawing's ground, near and far colours' sum
NOISE_DRAWS = 2  # of noise augmentation, for each of them
SAMPLED_POOL, ENCODED = 1600, 0.25  # videos that the decoder learns from last; the share of steps on encoded ones
AUGMENTED = 0.02  # noise_aug of those videos, as people ask for them
LATENTS = (scenes.FRAMES, VAE.latent_channels, scenes.SIZE // VAE.factor, scenes.SIZE // VAE.factor)

VAE_FRAMES = Stage("vae-frames", steps=1150, batch=8, lr=1.5e-3, report=230)
VAE_VIDEO = Stage("vae-video", steps=160, batch=2, lr=5e-4, report=40)
CLIP_CAPTIONS = Stage("clip", steps=450, batch=256, lr=1e-3, report=100)
UNET_VIDEO = Stage("unet", steps=3200, batch=16, lr=1e-3, report=800)
UNET_FAST = Stage("unet-fast", steps=3200, batch=16, lr=1e-3, report=800, hold=0.4)
UNET_WIDE = Stage("unet-wide", steps=7000, batch=16, lr=1e-3, report=1000, hold=0.3)
UNET_MISTAKEN = Stage("unet-mistaken", steps=2400, batch=16, lr=8e-4, report=600, hold=0.2)
VAE_SAMPLED = Stage("vae-sampled", steps=900, batch=2, lr=1e-4, report=150, hold=0.2)
STAGES = (VAE_FRAMES, VAE_VIDEO, CLIP_CAPTIONS, UNET_VIDEO, UNET_FAST, UNET_WIDE, UNET_MISTAKEN, VAE_SAMPLED)
DrawClip = Callable[[np.random.Generator], tuple[scenes.Scene, int, float, np.ndarray]]  # as `scenes.random_clip`


# The VAE: frames alone first, then the temporal decoder.


def new_vae() -> AutoencoderKLTemporalDecoder:
    """An autoencoder that starts as a linear one (`linear_start`) and whose temporal layers start as identities."""
    vae = AutoencoderKLTemporalDecoder(VAE)
    linear_start(vae)
    for module in vae.modules():
        if isinstance(module, ResnetBlockOverTime):
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
        if isinstance(module, ResnetBlock):
            zero(module.conv2)
            constants(module.conv1)
            if isinstance(module.conv_shortcut, nn.Conv2d):
                zero(module.conv_shortcut)
                c_out, c_in = module.conv_shortcut.weight.shape[:2]
                module.conv_shortcut.weight[:: c_out // NUM_GROUPS, :: c_in // NUM_GROUPS, 0, 0] = torch.eye(NUM_GROUPS)
                constants(module.conv_shortcut)
        elif isinstance(module, SpatialAttention):
            zero(module.to_out)
        elif isinstance(module, AsymmetricDownsample):
            zero(module.conv)
            module.conv.weight[:, :, :2, :2] = torch.eye(module.conv.in_channels)[:, :, None, None] / 4
        elif isinstance(module, Upsample):
            zero(conv := module.get_submodule("conv"))
            nn.init.dirac_(conv.get_parameter("weight"))
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
    first, second = (module for module in mid.modules() if isinstance(module, ResnetBlock))
    x = second(mid.attentions[0](first(decoder.conv_in(z))))
    for module in decoder.up_blocks.modules():
        if isinstance(module, (ResnetBlock, Upsample)):
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


def draw_videos(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole clips [b,t,3,H,W], uint8, and the shapes' silhouettes [b,t,H,W]."""
    clips = [scenes.random_clip(rng) for _ in range(count)]
    silhouettes = [scenes.silhouette(scene, scenes.path(scene, bucket, fps)) for scene, fps, bucket, _ in clips]
    return np.stack([frames for *_, frames in clips]), np.stack(silhouettes)


def fast_clip(rng: np.random.Generator) -> tuple[scenes.Scene, int, float, np.ndarray]:
    """As `scenes.random_clip`, but the pixels per frame are drawn, mostly many, and then an fps that allows them.

    Of clips as they are asked for, half move by less than a third of what the fastest do, and are nearly still.
    """
    return at_a_pace((scenes.random_scene(rng),), rng)


def wide_clip(rng: np.random.Generator) -> tuple[scenes.Scene, int, float, np.ndarray]:
    """As `drawn_clip`, but of some the nose and tail hardly show.

    Where they do not, the heading is anybody's guess, which was to give guidance something to do, and did not.
    """
    if rng.random() < FAINT:
        return at_a_pace((replace(scenes.random_scene(rng), cues=float(np.exp(rng.uniform(*np.log(FAINTEST))))),), rng)
    return drawn_clip(rng)


def drawn_clip(rng: np.random.Generator) -> tuple[scenes.Scene, int, float, np.ndarray]:
    """As `fast_clip`, but some are drawings on dark grounds."""
    if rng.random() >= DRAWN:
        return fast_clip(rng)
    drawing = scenes.random_drawing(rng)
    while sum(drawing[0].background.near + drawing[0].background.far) > BRIGHTEST:
        drawing = scenes.random_drawing(rng)
    return at_a_pace(drawing, rng)


def at_a_pace(drawn: tuple[scenes.Scene, ...], rng: np.random.Generator) -> tuple[scenes.Scene, int, float, np.ndarray]:
    """The clip of these shapes at one random pace; the scene is the first's."""
    pace = scenes.TOP_SPEED / scenes.FPS[0] * rng.random() ** 0.75
    fastest = min(scenes.FPS[1], int(scenes.TOP_SPEED / pace))
    fps = int(rng.integers(scenes.FPS[0], fastest + 1))
    bucket = 255 * pace * fps / scenes.TOP_SPEED
    return drawn[0], fps, bucket, scenes.render_together(drawn, [scenes.path(scene, bucket, fps) for scene in drawn])


def posterior(vae: AutoencoderKLTemporalDecoder, image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of q(z | image), unscaled, float32."""
    mean, log_variance = vae.quant_conv(vae.encoder(image)).float().chunk(2, dim=1)
    return mean, log_variance.clamp(-20, 10)


def reconstruction_loss(output: Tensor, target: Tensor, silhouette: Tensor) -> Tensor:
    """L1 + L2, the shape and its surroundings weighted five times: a shape is a tenth of its frame."""
    weight = 1 + 4 * F.max_pool2d(silhouette, 5, stride=1, padding=2)[:, None]
    error = output.float() - target
    return (weight * (error.abs() + error.square())).mean()


def mean_psnr(output: Tensor, target: Tensor) -> float:
    """Mean over images [...,3,H,W] in [-1, 1] of their PSNR, in dB."""
    pair = (rearrange((x.float().clamp(-1, 1) + 1) / 2, "... c h w -> (...) c h w") for x in (output, target))
    return float(np.mean([psnr(a, b) for a, b in zip(*pair, strict=True)]))


def save_sheet(path: Path, *rows: Tensor, zoom: int = 2) -> None:
    """A picture of rows of images [n,3,H,W] in [-1, 1], enlarged."""
    sheet = torch.cat([rearrange(row.float().cpu().clamp(-1, 1), "n c h w -> h (n w) c") for row in rows])
    save_png(as_image((sheet + 1) / 2, zoom), path)


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
        return f"held-out PSNR {mean_psnr(output, held_out):.2f} dB, posterior noise over latent std {noises}"

    vae = fit(run, VAE_FRAMES, new_vae, loss, report, muon_and_adamw)
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
    clips, _ = draw_videos(np.random.default_rng(HELD_OUT_SEED), 6)
    held_out = run.unit(clips)

    def decode(vae: AutoencoderKLTemporalDecoder, video: Tensor, noise: float) -> Tensor:
        z = encode_video(run, vae, video)
        return decode_video(run, vae, z + noise * torch.randn_like(z))

    def loss(vae: AutoencoderKLTemporalDecoder, rng: np.random.Generator, batch: int) -> Tensor:
        frames, silhouettes = draw_videos(rng, batch)
        video, silhouette = run.unit(frames), torch.from_numpy(silhouettes).to(run.device)
        output = decode(vae, video, LATENT_NOISE)
        return reconstruction_loss(output.flatten(0, 1), video.flatten(0, 1), silhouette.flatten(0, 1))

    def report(vae: AutoencoderKLTemporalDecoder) -> str:
        clean, noisy = (decode(vae, held_out, noise) for noise in (0.0, LATENT_NOISE))
        save_sheet(run.work / "vae-video.png", held_out[0], clean[0], held_out[1], clean[1])
        exact, rough = (f"{mean_psnr(output, held_out):.2f} dB" for output in (clean, noisy))
        return f"held-out PSNR {exact}, from noisy latents {rough}"

    return fit(run, VAE_VIDEO, lambda: decoder_alone(vae), loss, report, muon_and_adamw)


def train_vae_sampled(
    run: Run, unet: SpatioTemporalUNet, vae: AutoencoderKLTemporalDecoder, clip: ImageEncoder
) -> AutoencoderKLTemporalDecoder:
    """The decoder once more, on the latents of videos that the UNet made, against the frames that they should have had.

    Such latents are wrong in their own way: corners that fade, the later the more. A decoder that sees all frames can
    learn to put them back; the encoder's latents, in one step of four, keep it an autoencoder's.
    """
    clips, _ = draw_videos(np.random.default_rng(HELD_OUT_SEED), 6)
    held_out = run.unit(clips)
    pool = cache(partial(sampled_pool, run, StableVideoDiffusion(unet, copy.deepcopy(vae), clip, GENERATION)))

    def loss(vae: AutoencoderKLTemporalDecoder, rng: np.random.Generator, batch: int) -> Tensor:
        videos = pool()
        rows = torch.from_numpy(rng.integers(len(videos["frames"]), size=batch))
        frames, silhouettes, z = (videos[name][rows] for name in ("frames", "silhouettes", "latents"))
        video = frames.float() / 127.5 - 1
        if rng.random() < ENCODED:
            z = encode_video(run, vae, video)
            z = z + LATENT_NOISE * torch.randn_like(z)
        output = decode_video(run, vae, z)
        return reconstruction_loss(output.flatten(0, 1), video.flatten(0, 1), silhouettes.float().flatten(0, 1))

    def report(vae: AutoencoderKLTemporalDecoder) -> str:
        exact = decode_video(run, vae, encode_video(run, vae, held_out))
        return f"held-out PSNR {mean_psnr(exact, held_out):.2f} dB, {quick_look(run, unet, vae, clip)}"

    return fit(run, VAE_SAMPLED, lambda: decoder_alone(vae), loss, report, muon_and_adamw)


@torch.no_grad()
def sampled_pool(run: Run, svd: StableVideoDiffusion) -> dict[str, Tensor]:
    """This process's share of `SAMPLED_POOL` videos, made once: true frames [n,t,3,H,W], uint8, their silhouettes
    [n,t,H,W], and the latents [n,t,4,h,w] that the model samples from the first frame, as shipped."""
    file = run.work / f"sampled-{run.rank}-of-{run.processes}.pt"
    if file.exists():
        return torch.load(file, map_location=run.device)
    torch.manual_seed(run.seed + run.rank)
    rng, rows = np.random.default_rng([run.seed, *b"sampled", run.rank]), []
    schedule, sigmas = GuidanceSchedule(*GENERATION.guidance), edm_sigmas(GENERATION.steps)
    for _ in tqdm(range(SAMPLED_POOL // run.processes // BATCH), "videos of the model's", disable=run.rank > 0):
        drawn = [drawn_clip(rng) for _ in range(BATCH)]
        frames = np.stack([frames for *_, frames in drawn])
        paths = [scenes.path(scene, bucket, fps) for scene, fps, bucket, _ in drawn]
        silhouettes = np.stack([scenes.silhouette(clip[0], path) for clip, path in zip(drawn, paths, strict=True)])
        image = run.unit(frames[:, 0])
        ids = torch.tensor([[fps - 1, bucket, AUGMENTED] for _, fps, bucket, _ in drawn]).to(run.device)
        noises = [torch.randn(shape, device=run.device) for shape in (image.shape, (BATCH, *LATENTS))]
        settings = {"sigmas": sigmas, "schedule": schedule, "callback": None, "progress": False}
        latents = svd.sample(image, ids, *noises, **settings)
        rows.append((torch.from_numpy(frames), torch.from_numpy(silhouettes), latents))
    names = ("frames", "silhouettes", "latents")
    columns = zip(*rows, strict=True)
    pool = {name: torch.cat(column).to(run.device) for name, column in zip(names, columns, strict=True)}
    with atomic(file) as path:
        torch.save(pool, path)
    return pool


def decoder_alone(vae: AutoencoderKLTemporalDecoder) -> AutoencoderKLTemporalDecoder:
    """With the encoder frozen: latents stay what they are."""
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    return vae


def decode_video(run: Run, vae: AutoencoderKLTemporalDecoder, z: Tensor) -> Tensor:
    """Scaled latents [b,t,4,h,w] -> frames [b,t,3,H,W] in [-1,1], in `half` on float32 weights."""
    weights = {name: weight.to(half(run.device)) for name, weight in vae.decoder.named_parameters()}
    return functional_call(vae.decoder, weights, ((z / VAE.scaling_factor).to(half(run.device)),))


@torch.no_grad()
def encode_video(run: Run, vae: AutoencoderKLTemporalDecoder, video: Tensor) -> Tensor:
    """Frames [b,t,3,H,W] in [-1,1] -> scaled latents [b,t,4,h,w], of unit variance."""
    with run.autocast():
        latents, _ = posterior(vae, rearrange(video, "b t c h w -> (b t) c h w"))
    return rearrange(VAE.scaling_factor * latents, "(b t) c h w -> b t c h w", b=len(video))


# The image encoder, against captions.


def train_clip(run: Run) -> CaptionedImages:
    """Contrastively: each image's own caption among a batch's, and each caption's own image."""
    contrast = ClipLoss()
    frames, captions = draw_captioned(np.random.default_rng(HELD_OUT_SEED), 1000, distinct=True)
    held_out = run.unit(frames)

    def loss(model: CaptionedImages, rng: np.random.Generator, batch: int) -> Tensor:
        frames, captions = draw_captioned(rng, batch)
        with run.autocast():
            image, text = model(run.unit(frames), tokens(captions).to(run.device))
        return contrast(image.float(), text.float(), model.logit_scale.exp().clamp(max=100))

    def report(model: CaptionedImages) -> str:
        image, text = model(held_out, tokens(captions).to(run.device))
        groups = zip(image.split(100), text.split(100), strict=True)
        hits = torch.cat([(i @ t.T).argmax(1) == torch.arange(len(i), device=i.device) for i, t in groups])
        return f"held-out images that find their caption among 100: {hits.float().mean():.1%}"

    return fit(run, CLIP_CAPTIONS, lambda: CaptionedImages(CLIP), loss, report)


# The UNet.


def new_unet() -> SpatioTemporalUNet:
    """A UNet that starts at F = 0, each residual branch at zero gain."""
    unet = SpatioTemporalUNet(UNET)
    zero(unet.conv_out)
    for module in unet.modules():
        if isinstance(module, (ResnetBlock2D, TemporalResnetBlock)):
            zero(module.conv2)
        elif isinstance(module, SpatioTemporalTransformer):
            zero(module.proj_out)
    return unet


def clip_pool(
    run: Run, name: str, draw: DrawClip, count: int, vae: AutoencoderKLTemporalDecoder, clip: ImageEncoder
) -> dict[str, Tensor]:
    """This process's share of `count` clips, made once: latents [n,t,4,h,w], image embeddings [n,1,d], ids [n,2], and
    of the first frame, `NOISE_DRAWS` times with noise added before it is encoded, latents [n,k,4,h,w] and the noise's
    deviation [n,k], log-normal."""
    file = run.work / f"{name}-{run.rank}-of-{run.processes}.pt"
    if file.exists():
        return torch.load(file, map_location=run.device)
    torch.manual_seed(run.seed + run.rank)
    rng, rows = np.random.default_rng([run.seed, *name.encode(), run.rank]), []
    vae = copy.deepcopy(vae)
    vae.encoder.to(memory_format=torch.channels_last)  # a third faster on a CPU
    for _ in tqdm(range(count // run.processes), name, disable=run.rank > 0):
        _, fps, bucket, frames = draw(rng)
        video = run.unit(frames)
        noise_aug = (NOISE_AUG_MEAN + NOISE_AUG_STD * torch.randn(NOISE_DRAWS, device=run.device)).exp()
        first = video[0] + noise_aug[:, None, None, None] * torch.randn(NOISE_DRAWS, *video[0].shape, device=run.device)
        images = torch.cat([video, first]).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), run.autocast():
            latents, _ = posterior(vae, images)
        with torch.no_grad():
            embeds = clip(video[:1])
        row = (VAE.scaling_factor * latents[: len(video)], embeds[0], torch.tensor([fps - 1.0, bucket]).to(run.device))
        rows.append((*row, latents[len(video) :], noise_aug))
    names = ("latents", "embeds", "ids", "first", "noise_aug")
    pool = {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    with atomic(file) as path:
        torch.save(pool, path)
    return pool


def v_loss(
    run: Run,
    clips: Callable[[], dict[str, Tensor]],
    sigma_mean: float,
    mistaken: float,
    unet: SpatioTemporalUNet,
    rng: np.random.Generator,
    batch: int,
) -> Tensor:
    """EDM's |F(c_in x, c_noise) - (y - c_skip x) / c_out|^2 at x = y + sigma n, ln sigma normal around a mean.

    A batch's noise levels are one of each of as many equally likely parts of that normal distribution.
    The condition frame has noise of a log-normal deviation, which is told; the whole condition is dropped, embedding
    and latent together, from one clip in ten, for guidance. Of a share `mistaken` it is another clip's, told as if it
    were this one's: where the noise hides which, the network then trusts it by no more than 1 - mistaken, and guidance
    by 1 / (1 - mistaken) is what makes up for that. The network runs in `half`, on float32 weights.
    """
    pool = clips()
    rows = torch.from_numpy(rng.integers(len(pool["latents"]), size=batch))
    draw = torch.from_numpy(rng.integers(NOISE_DRAWS, size=batch))
    y, ids = (pool[name][rows] for name in ("latents", "ids"))
    told = torch.where(torch.rand(batch) < mistaken, rows.roll(1), rows)
    embeds, latent, noise_aug = pool["embeds"][told], pool["first"][told, draw], pool["noise_aug"][told, draw]
    keep = (torch.rand(batch, device=run.device) >= CONDITION_DROPOUT).float()
    latent, embeds = latent * keep[:, None, None, None], embeds * keep[:, None, None]
    spread = (torch.arange(batch, device=run.device) + torch.rand(batch, device=run.device)) / batch
    sigma = (sigma_mean + SIGMA_STD * torch.special.ndtri(spread)).exp()
    c_skip, c_out, c_in, c_noise = preconditioning(sigma[:, None, None, None, None])
    x = y + sigma[:, None, None, None, None] * torch.randn_like(y)
    sample = torch.cat([c_in * x, repeat(latent, "b c h w -> b t c h w", t=y.shape[1])], dim=2)
    ids = torch.cat([ids, noise_aug[:, None]], dim=1)
    dtype = half(run.device)
    weights = {name: weight.to(dtype) for name, weight in unet.named_parameters()}
    with written_out_attention(run.device):
        output = functional_call(unet, weights, (sample.to(dtype), c_noise.flatten(), embeds.to(dtype), ids))
    return (output.float() - (y - c_skip * x) / c_out).square().mean()


def train_unet(run: Run, vae: AutoencoderKLTemporalDecoder, clip: ImageEncoder) -> SpatioTemporalUNet:
    """On clips as they are asked for; from there, on more, most of which move fast; from there, on more and wider."""
    unet = unet_stage(run, UNET_VIDEO, new_unet, scenes.random_clip, POOL, SIGMA_MEAN, vae, clip)
    fast = unet_stage(run, UNET_FAST, lambda: unet, fast_clip, FAST_POOL, SIGMA_MEAN, vae, clip)
    return unet_stage(run, UNET_WIDE, lambda: fast, wide_clip, WIDE_POOL, WIDE_SIGMA_MEAN, vae, clip)


def train_mistaken(
    run: Run, unet: SpatioTemporalUNet, vae: AutoencoderKLTemporalDecoder, clip: ImageEncoder
) -> SpatioTemporalUNet:
    """From there, under conditions of which a share is another clip's: a network that needs guidance, for the study."""
    return unet_stage(run, UNET_MISTAKEN, lambda: unet, drawn_clip, MISTAKEN_POOL, WIDE_SIGMA_MEAN, vae, clip, MISTAKEN)


def unet_stage(
    run: Run,
    stage: Stage,
    build: Callable[[], SpatioTemporalUNet],
    draw: DrawClip,
    count: int,
    sigma_mean: float,
    vae: AutoencoderKLTemporalDecoder,
    clip: ImageEncoder,
    mistaken: float = 0.0,
) -> SpatioTemporalUNet:
    """What `build` returns, trained on `count` clips, which are drawn and encoded if there is still a step to do."""
    pool = cache(partial(clip_pool, run, f"{stage.name}-clips", draw, count, vae, clip))
    loss = partial(v_loss, run, pool, sigma_mean, mistaken)
    return fit(run, stage, build, loss, lambda unet: quick_look(run, unet, vae, clip), muon_and_adamw)


# Held-out figures, and the folder.


def quick_look(run: Run, unet: SpatioTemporalUNet, vae: AutoencoderKLTemporalDecoder, clip: ImageEncoder) -> str:
    """The figures of one batch of held-out videos, and a picture of them below the true ones."""
    svd, clips = StableVideoDiffusion(unet, vae, clip, GENERATION), draw_clips(BATCH)
    videos = list(generate(svd, clips, progress=False))
    truth = run.unit(np.stack([frames for *_, frames in clips]))
    save_sheet(run.work / "unet.png", *(row for a, b in zip(truth, videos, strict=True) for row in (a, 2 * b - 1)))
    pairs = zip(videos, clips, strict=True)
    measured = [against_truth(video, scene, bucket, fps) for video, (scene, fps, bucket, _) in pairs]
    return ", ".join(map(str, video_figures(measured)))


def export(out: Path, unet: SpatioTemporalUNet, vae: AutoencoderKLTemporalDecoder, pair: CaptionedImages) -> str:
    """Write the folder, float16, the captions' encoder with it, and an unseen scene as its example."""
    with tempfile.TemporaryDirectory() as temporary:
        StableVideoDiffusion(unet, vae, pair.image, GENERATION).save(folder := Path(temporary) / "model", torch.float16)
        for file in filter(Path.is_file, folder.rglob("*")):
            with atomic(out / file.relative_to(folder)) as path:
                shutil.copyfile(file, path)
    with atomic(out / TEXT_ENCODER) as path:
        save_file({name: tensor.cpu().half().contiguous() for name, tensor in pair.text.state_dict().items()}, path)
    frames, _ = draw_captioned(np.random.default_rng(HELD_OUT_SEED), 1)
    save_sheet(out / "example.png", torch.from_numpy(scenes.to_unit(frames)), zoom=1)
    return f"wrote {out}, {sum(path.stat().st_size for path in out.rglob('*.safetensors')) / 1e6:.1f} MB of weights"


def train(rank: int, args: argparse.Namespace) -> None:
    """Every stage in turn, as process `rank` of `args.processes`."""
    if args.processes > 1:
        torch.set_num_threads(1)
        rendezvous = f"file://{(args.work / 'rendezvous').resolve()}"
        distributed.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=args.processes, timeout=timedelta(hours=3)
        )
    run = Run(args.work, STAGES, torch.device(args.device), args.seed, args.finish, rank, args.processes)
    vae = train_vae_frames(run)
    vae = train_vae_video(run, vae)
    clip = train_clip(run)
    unet = train_unet(run, vae, clip.image)
    mistaken = train_mistaken(run, copy.deepcopy(unet), vae, clip.image) if args.mistaken else None
    vae = train_vae_sampled(run, unet, vae, clip.image)
    if rank == 0:
        torch.set_num_threads(args.processes)
        run.log(export(args.out, unet, vae, clip))
        figures, _ = evaluate(args.out, count=200)
        run.log(f"200 unseen scenes\n\n{table(figures)}\n")
        if mistaken is not None:
            run.log(export(args.work / "mistaken", mistaken, vae, clip))


def main(argv: list[str] | None = None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cores = min(os.cpu_count() or 1, 2) if device == "cpu" else 1
    parser = argparse.ArgumentParser(description="Train the tiny model.")
    parser.add_argument("--out", type=Path, default=Path("weights/tiny"), help="the folder of the finished model")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="checkpoints, pictures and the log")
    parser.add_argument("--device", default=device)
    parser.add_argument("--processes", type=int, default=cores, help="share each batch among so many processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--finish", action="store_true", help="train no more: measure and write what there is")
    parser.add_argument(
        "--mistaken", action="store_true", help="then train the study's second model, into the folder WORK/mistaken"
    )
    args = parser.parse_args(argv)
    args.processes = 1 if args.finish else args.processes
    if args.processes < 1:
        parser.error(f"--processes is {args.processes}; need at least 1")
    asked = (UNET_VIDEO, UNET_MISTAKEN) if args.mistaken else (UNET_VIDEO,)
    for stage in asked if args.finish else ():
        if not (args.work / f"{stage.name}.pt").exists():
            parser.error(f"--finish has nothing to finish: {args.work} holds no {stage.name}.pt")
    args.work.mkdir(parents=True, exist_ok=True)
    seed = args.work / "seed"
    if seed.exists() and seed.read_text() != f"{args.seed}\n":
        parser.error(f"{args.work} was begun with --seed {seed.read_text().strip()}: give that, or another --work")
    seed.write_text(f"{args.seed}\n")
    (args.work / "rendezvous").unlink(missing_ok=True)
    try:
        multiprocessing.spawn(train, (args,), nprocs=args.processes)
    except KeyboardInterrupt:
        sys.exit("interrupted: run it again to go on")


if __name__ == "__main__":
    main()
