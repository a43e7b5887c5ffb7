"""Stable Video Diffusion in a few readable files. Start with `attention.py`, then `unet.py`.

    import minisvd

    svd = minisvd.load("tiny")
    svd("photo.png", seed=0).save("clip.mp4")
"""

from minisvd.checkpoint import load_unet
from minisvd.clip import ImageEncoder
from minisvd.config import PRESETS, ClipConfig, GenerationConfig, UNetConfig, VAEConfig
from minisvd.pipeline import StableVideoDiffusion, load
from minisvd.sampler import GuidanceSchedule, edm_sigmas, guided_denoiser, preconditioning, sample_euler
from minisvd.unet import SpatioTemporalUNet
from minisvd.vae import AutoencoderKLTemporalDecoder
from minisvd.video import Video

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "AutoencoderKLTemporalDecoder",
    "ClipConfig",
    "GenerationConfig",
    "GuidanceSchedule",
    "ImageEncoder",
    "SpatioTemporalUNet",
    "StableVideoDiffusion",
    "UNetConfig",
    "VAEConfig",
    "Video",
    "edm_sigmas",
    "guided_denoiser",
    "load",
    "load_unet",
    "preconditioning",
    "sample_euler",
]
