"""Stable Video Diffusion in a few readable files. Start with `attention.py`, then `unet.py`.

import minisvd

svd = minisvd.load("tiny")
svd("photo.png", seed=0).save("clip.mp4")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

PUBLIC = {  # of each module; torch is imported by the first name that is used
    "adapt": "checkpoint_activations fold widen_conv_in",
    "checkpoint": "load_unet",
    "clip": "ImageEncoder",
    "config": "ClipConfig GenerationConfig PRESETS UNetConfig VAEConfig",
    "pipeline": "StableVideoDiffusion load",
    "sampler": "GuidanceSchedule edm_sigmas guided_denoiser preconditioning sample_euler",
    "sites": "check_model dead_names",
    "triviality": "check",
    "unet": "SpatioTemporalUNet",
    "vae": "AutoencoderKLTemporalDecoder",
    "video": "Video",
}
HOME = {name: module for module, names in PUBLIC.items() for name in names.split()}

if TYPE_CHECKING:  # the same for type checkers and editors
    from .adapt import checkpoint_activations as checkpoint_activations
    from .adapt import fold as fold
    from .adapt import widen_conv_in as widen_conv_in
    from .checkpoint import load_unet as load_unet
    from .clip import ImageEncoder as ImageEncoder
    from .config import PRESETS as PRESETS
    from .config import ClipConfig as ClipConfig
    from .config import GenerationConfig as GenerationConfig
    from .config import UNetConfig as UNetConfig
    from .config import VAEConfig as VAEConfig
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
