"""Stable Video Diffusion in a few readable files. Start with `attention.py`, then `unet.py`.

import minisvd

svd = minisvd.load("tiny")
svd("photo.png", seed=0).save("clip.mp4")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

HOME = {  # the module of each public name; torch is imported by the first name that is used
    "PRESETS": "config",
    "AutoencoderKLTemporalDecoder": "vae",
    "ClipConfig": "config",
    "ECONOMIES": "memory",
    "Economy": "memory",
    "GenerationConfig": "config",
    "GuidanceSchedule": "sampler",
    "ImageEncoder": "clip",
    "SpatioTemporalUNet": "unet",
    "StableVideoDiffusion": "pipeline",
    "UNetConfig": "config",
    "VAEConfig": "config",
    "Video": "video",
    "check": "triviality",
    "check_model": "sites",
    "checkpoint_activations": "adapt",
    "dead_names": "sites",
    "edm_sigmas": "sampler",
    "fold": "adapt",
    "guided_denoiser": "sampler",
    "load": "pipeline",
    "load_unet": "checkpoint",
    "preconditioning": "sampler",
    "sample_euler": "sampler",
    "slice_feed_forwards": "adapt",
    "widen_conv_in": "adapt",
}

if TYPE_CHECKING:  # the same for type checkers and editors
    from .adapt import checkpoint_activations as checkpoint_activations
    from .adapt import fold as fold
    from .adapt import slice_feed_forwards as slice_feed_forwards
    from .adapt import widen_conv_in as widen_conv_in
    from .checkpoint import load_unet as load_unet
    from .clip import ImageEncoder as ImageEncoder
    from .config import PRESETS as PRESETS
    from .config import ClipConfig as ClipConfig
    from .config import GenerationConfig as GenerationConfig
    from .config import UNetConfig as UNetConfig
    from .config import VAEConfig as VAEConfig
    from .memory import ECONOMIES as ECONOMIES
    from .memory import Economy as Economy
    from .pipeline import StableVideoDiffusion as StableVideoDiffusion
    from .pipeline import load as load
    from .sampler import GuidanceSchedule as GuidanceSchedule
    from .sampler import edm_sigmas as edm_sigmas
    from .sampler import guided_denoiser as guided_denoiser
    from .sampler import preconditioning as preconditioning
    from .sampler import sample_euler as sample_euler
    from .sites import check_model as check_model
    from .sites import dead_names as dead_names
    from .triviality import check as check
    from .unet import SpatioTemporalUNet as SpatioTemporalUNet
    from .vae import AutoencoderKLTemporalDecoder as AutoencoderKLTemporalDecoder
    from .video import Video as Video


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module 'minisvd' has no attribute {name!r}")
    return getattr(import_module(f"minisvd.{HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *HOME})
