"""Shared ground: a small random model of ours, and one of diffusers, imported only by tests that compare with it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the network
if "PYTEST_XDIST_WORKER" in os.environ:  # `pytest -n 2`: a thread for each of the processes
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from einops import rearrange, repeat

from minisvd import AutoencoderKLTemporalDecoder, ImageEncoder, SpatioTemporalUNet
from minisvd.config import ClipConfig, GenerationConfig, UNetConfig, VAEConfig
from minisvd.save import save_folder
from tools.teach.browse import found_browser

if TYPE_CHECKING:
    from diffusers import StableVideoDiffusionPipeline
    from diffusers import UNetSpatioTemporalConditionModel as DiffusersUNet

Module = TypeVar("Module", bound=torch.nn.Module)
ELSEWHERE = {  # markers, and where their tests cannot run
    "linux": sys.platform != "linux",
    "posix": os.name != "posix",
    "browser": found_browser() is None,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, and count as deselected, what this system has no way to run."""
    out = [item for item in items if any(away and item.get_closest_marker(name) for name, away in ELSEWHERE.items())]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


UNET: dict[str, Any] = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal",) * 2 + ("DownBlockSpatioTemporal",),
    "up_block_types": ("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * 2,
    "num_attention_heads": (2, 4, 4),
    "cross_attention_dim": 48,
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 48,
    "num_frames": 3,
}
UNET_CONFIG = UNetConfig(
    block_out_channels=UNET["block_out_channels"],
    attention=(True, True, False),
    num_attention_heads=UNET["num_attention_heads"],
    cross_attention_dim=UNET["cross_attention_dim"],
    addition_time_embed_dim=UNET["addition_time_embed_dim"],
)
VAE: dict[str, Any] = {
    "block_out_channels": (32, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "force_upcast": False,
}
CLIP: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 224,  # diffusers resizes to nothing else
    "patch_size": 56,
    "projection_dim": 48,
    "hidden_act": "gelu",
}


def randomised(module: Module) -> Module:
    """Leave no parameter at zero or one, where a wrong use of it would not show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def filled(module: Module) -> Module:
    """A module that was made on "meta", with random numbers: one draw again and again, for there may be billions."""
    numbers = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in module.to_empty(device="cpu").named_parameters():
            for part in parameter.view(-1).split(len(numbers)):
                part.copy_(numbers[: len(part)])
            if parameter.ndim == 1 and name.endswith("weight"):  # a norm's
                parameter += 1
    return module.eval()


def einops_in_graphs(whole: bool) -> None:
    """Does torch.compile take einops' functions whole, as svd.compile() has it, or trace through them, as it does?"""
    from torch._dynamo.trace_rules import _allowed_callable_ids as allowed

    for function in (rearrange, repeat):
        if whole:
            torch.compiler.allow_in_graph(function)
        elif id(function) in allowed():
            allowed.remove(id(function))


def original_eps(unet: DiffusersUNet) -> DiffusersUNet:
    """The eps of the original training code in every residual block; diffusers runs most of them at 1e-6."""
    from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock

    for module in unet.modules():
        if isinstance(module, ResnetBlock2D | TemporalResnetBlock):
            module.norm1.eps = module.norm2.eps = 1e-5
    return unet


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over largest magnitude."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of ours as a folder: 64x64 pixels fit it, sides are multiples of 32."""
    torch.manual_seed(0)
    parts = (
        randomised(SpatioTemporalUNet(UNET_CONFIG)),
        randomised(AutoencoderKLTemporalDecoder(VAEConfig(block_out_channels=VAE["block_out_channels"]))),
        randomised(ImageEncoder(ClipConfig(**CLIP))),
    )
    folder = tmp_path_factory.mktemp("tiny")
    save_folder(folder, *parts, GenerationConfig(num_frames=3))
    (folder / "generation_config.json").unlink()  # as published: the settings are those of the release
    return folder


@pytest.fixture(scope="session")
def diffusers_pipeline() -> StableVideoDiffusionPipeline:
    from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, StableVideoDiffusionPipeline
    from diffusers import UNetSpatioTemporalConditionModel as DiffusersUNet
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    pipeline = StableVideoDiffusionPipeline(
        vae=randomised(AutoencoderKLTemporalDecoder(**VAE)),
        image_encoder=randomised(CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP))),
        unet=original_eps(randomised(DiffusersUNet(**UNET))),
        scheduler=EulerDiscreteScheduler(
            prediction_type="v_prediction", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0,
            timestep_type="continuous", timestep_spacing="leading", interpolation_type="linear",
        ),
        feature_extractor=CLIPImageProcessor(),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def diffusers_folder(
    diffusers_pipeline: StableVideoDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same pipeline as diffusers saves it: 64x64 pixels fit it, sides are multiples of 32."""
    folder = tmp_path_factory.mktemp("diffusers")
    diffusers_pipeline.save_pretrained(folder)
    return folder
