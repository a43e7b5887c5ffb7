"""The tiny ETC's networks, and those it is compared with: built, trained by one loss, sampled, written as a folder.

All see latents [b,t,c,h,w] of the tiny model's VAE, whose factor and channels decide the sizes, and hear the keys
[b,k,c'] of its captions' encoder, the last block but one.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from minisvd.attention import Attention, SpatioTemporalTransformer
from minisvd.checkpoint import resolve
from minisvd.config import GenerationConfig, UNetConfig, VAEConfig
from minisvd.etc import SpatialUNet, ddim_sigmas, grid_shape, sd_sigmas, text_denoiser
from minisvd.sampler import sample_euler
from minisvd.save import clip_state, vae_config, write_json
from minisvd.text import NETWORK, SCHEDULER, TextConfig, TextEncoder
from minisvd.unet import ResnetBlock2D, SpatioTemporalUNet, TemporalResnetBlock
from minisvd.vae import AutoencoderKLTemporalDecoder
from tools.output import atomic
from tools.tiny import scenes
from tools.tiny.captions import CAPTION_LENGTH, TEXT_ENCODER, WORDS, tokens
from tools.tiny.fit import half, written_out_attention

DROPPED = 0.1  # of the captions, for guidance
TEXT = TextConfig(128, 1, 4, 512, CAPTION_LENGTH, len(WORDS) + 2)
GENERATION = GenerationConfig(
    num_frames=scenes.FRAMES, steps=50, guidance=(1.0, 3.0), size=(scenes.SIZE, scenes.SIZE), decode_chunk=8
)
Network = SpatialUNet | SpatioTemporalUNet


def load_text(folder: Path) -> TextEncoder:
    """The captions' encoder of the tiny model's folder, less its last block and its projection."""
    text, state = TextEncoder(TEXT), load_file(folder / TEXT_ENCODER)
    kept = {name: state[name.removeprefix("text.")].float() for name in text.state_dict()}
    text.load_state_dict(kept)
    return text.eval().requires_grad_(False)


def load_vae(folder: Path) -> AutoencoderKLTemporalDecoder:
    return resolve(folder, parts=["vae"]).load()["vae"].requires_grad_(False)


def config_for(vae: VAEConfig) -> UNetConfig:
    """The tiny SVD's widths. Latents of 8x8 have attention at 8x8 and 4x4, those of 16x16 at 8x8 and 4x4, too."""
    attention = (True, True, False) if scenes.SIZE // vae.factor == 8 else (False, True, True)
    channels = vae.latent_channels
    return UNetConfig(channels, channels, (64, 96, 96), attention, (2, 3, 3), 1, TEXT.hidden_size, 64, num_time_ids=1)


def zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def new_image_network(config: UNetConfig, mixed: bool = True) -> SpatialUNet:
    """At first v = 0, with each residual branch at zero gain."""
    unet = SpatialUNet(config, mixed)
    zero(unet.conv_out)
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            zero(module.conv2)
    return unet


def with_time(images: SpatialUNet, identity: bool) -> SpatioTemporalUNet:
    """The same network frame by frame, with temporal layers between: at random, or such that they change nothing."""
    unet = SpatioTemporalUNet(images.config)
    inside = {"spatial_res_block.": "", "add_embedding.": "nothing."}
    given, own = images.state_dict(), unet.state_dict()
    for name in own:
        source = name
        for ours, theirs in inside.items():
            source = source.replace(ours, theirs)
        if source in given:
            own[name] = given[source]
    unet.load_state_dict(own)
    for module in unet.modules() if identity else ():
        if isinstance(module, TemporalResnetBlock):
            zero(module.conv2)
        elif isinstance(module, SpatioTemporalTransformer):
            time: Any = module.temporal_transformer_blocks[0]
            for layer in (time.ff_in.net[2], time.ff.net[2], time.attn1.to_out, time.attn2.to_out):
                zero(layer)
            zero(module.time_pos_embed[2])
    if identity:
        zero(unet.add_embedding[2])
    return unet


class WithinFrames(nn.Module):
    """The self-attention of a grid, masked to frames: arm G, and Attention's parameters by their names."""

    def __init__(self, attention: Attention, frames: int) -> None:
        super().__init__()
        self.num_heads, self.frames = attention.num_heads, frames
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out = attention.to_out

    def forward(self, x: Tensor, _context: Tensor) -> Tensor:
        rows, cols = grid_shape(self.frames)
        b, s, _ = x.shape
        side = math.isqrt(s // self.frames)
        y, at = torch.arange(rows * side, device=x.device) // side, torch.arange(cols * side, device=x.device) // side
        frame = (y[:, None] * cols + at).flatten()
        heads = (
            layer(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        out = nn.functional.scaled_dot_product_attention(*heads, attn_mask=frame[:, None] == frame)
        return self.to_out(out.transpose(1, 2).reshape(b, s, -1))


def masked_to_frames(unet: SpatialUNet) -> SpatialUNet:
    """The network whose tokens attend to those of their own frame; convolutions and norms still cross borders."""
    for module in list(unet.modules()):
        if isinstance(getattr(module, "attn1", None), Attention):
            module.attn1 = WithinFrames(module.attn1, scenes.FRAMES)  # pyright: ignore
    return unet


class FrameByFrame(SpatialUNet):
    """A network that sees each frame alone: arm H, the floor."""

    def forward(self, video: Tensor, timestep: Tensor, text: Tensor, fps: Tensor, conditions: object = ()) -> Tensor:  # noqa: ARG002  # fmt: skip  # pyright: ignore
        b, t = video.shape[:2]
        each = (torch.as_tensor(n).reshape(-1).expand(b).repeat_interleave(t) for n in (timestep, fps))
        level, rate = each
        out = super().forward(video.flatten(0, 1)[:, None], level, text.repeat_interleave(t, 0), rate)
        return out[:, 0].unflatten(0, (b, t))


def v_of(
    unet: Network, x: Tensor, timestep: Tensor, text: Tensor, fps: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The prediction [b,t,c,h,w] of either kind of network, computed in this dtype, on float32 weights."""
    given = x, timestep, text, fps
    if not isinstance(unet, SpatialUNet):
        given = x, timestep.float(), text, fps.float()[:, None]
    weights = {name: weight.to(dtype) for name, weight in unet.named_parameters()}
    return functional_call(unet, weights, (x.to(dtype), given[1], text.to(dtype), given[3])).float()


def v_loss(
    unet: Network,
    clean: Tensor,
    timestep: Tensor,
    noise: Tensor,
    text: Tensor,
    fps: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """|v - (sqrt(a) noise - sqrt(1 - a) x_0)|^2 at x = sqrt(a) x_0 + sqrt(1 - a) noise, mean over a clip: [b]."""
    sigma = sd_sigmas().to(clean.device)[timestep][:, None, None, None, None]
    signal = (1 + sigma**2).rsqrt()  # sqrt(a)
    x = signal * (clean + sigma * noise)
    return (v_of(unet, x, timestep, text, fps, dtype) - signal * (noise - sigma * clean)).square().mean((1, 2, 3, 4))


def drawn_loss(unet: Network, clean: Tensor, text: Tensor, empty: Tensor, fps: Tensor) -> Tensor:
    """The mean of `v_loss` at uniform timesteps, captions dropped from one clip in ten."""
    b = len(clean)
    text = torch.where(torch.rand(b, 1, 1) < DROPPED, empty, text)
    with written_out_attention(clean.device):
        timestep, noise = torch.randint(1000, (b,)), torch.randn_like(clean)
        return v_loss(unet, clean, timestep, noise, text, fps, half(clean.device)).mean()


@torch.no_grad()
def sample(unet: Network, vae: AutoencoderKLTemporalDecoder, text: Tensor, empty: Tensor, fps: float, seed: int,
           steps: int, scale: float) -> np.ndarray:  # fmt: skip
    """Videos [b,t,3,H,W] in [0,1] of the keys [b,k,c]."""
    side, c = scenes.SIZE // vae.config.factor, vae.config.latent_channels
    noise = torch.randn(len(text), scenes.FRAMES, c, side, side, generator=torch.Generator().manual_seed(seed))
    levels = sd_sigmas()

    def denoised(x: Tensor, sigma: Tensor, _step: int) -> Tensor:
        timestep = (levels - sigma).abs().argmin().expand(2 * len(x))
        signal = (1 + sigma**2).rsqrt()
        both, rates = torch.cat([empty.expand_as(text), text]), torch.full((2 * len(x),), fps)
        v_0, v_c = v_of(unet, torch.cat([signal * x] * 2), timestep, both, rates).chunk(2)
        return signal**2 * x - sigma * signal * (v_0 + scale * (v_c - v_0))

    denoise: Callable = denoised
    if isinstance(unet, SpatialUNet):
        denoise = text_denoiser(unet, text, empty, fps, scale)
    latents = sample_euler(denoise, noise, ddim_sigmas(steps))
    return ((vae.decode(latents) + 1) / 2).clamp(0, 1).numpy()


def ids_of(captions: list[str]) -> Tensor:
    return tokens(captions)


def export(out: Path, unet: SpatialUNet, text: TextEncoder, vae: AutoencoderKLTemporalDecoder) -> None:
    """The folder that `minisvd generate --text` reads, in Stable Diffusion 2.1's layout, weights in half precision."""
    config = unet.config
    kinds = ["CrossAttn" if here else "" for here in config.attention]
    sizes = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "cross_attention_dim")
    stated = NETWORK | {name: getattr(config, name) for name in sizes}
    stated["attention_head_dim"] = list(config.num_attention_heads)
    stated["down_block_types"] = [f"{kind}DownBlock2D" for kind in kinds]
    stated["up_block_types"] = [f"{kind}UpBlock2D" for kind in reversed(kinds)]
    contents = {
        "unet/config.json": stated,
        "text_encoder/config.json": {"model_type": "clip_text_model", **vars(TEXT)},
        "text_encoder/words.json": {"words": list(WORDS)},
        "scheduler/scheduler_config.json": SCHEDULER,
        "vae/config.json": vae_config(vae.config),
        "generation_config.json": json.loads(json.dumps(vars(GENERATION))),
    }
    tensors = {
        "unet/diffusion_pytorch_model": unet.state_dict(),
        "text_encoder/model": clip_state(text),  # pyright: ignore[reportArgumentType]
        "vae/diffusion_pytorch_model": vae.state_dict(),
    }
    for name, content in contents.items():
        write_json(out / name, content)
    for name, state in tensors.items():
        with atomic(out / f"{name}.safetensors") as path:
            save_file({key: tensor.detach().half().contiguous() for key, tensor in state.items()}, path)
