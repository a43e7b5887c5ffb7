"""Write a model as a folder of the published layout: what `minisvd.load`, diffusers and transformers read."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minisvd.clip import ImageEncoder
from minisvd.config import GenerationConfig
from minisvd.layouts import CLIP_FOLDER_GATHER, CLIP_FOLDER_RENAME, sources
from minisvd.unet import SpatioTemporalUNet
from minisvd.vae import AutoencoderKLTemporalDecoder
from tools.output import atomic, write_json


def write_folder(
    out: Path,
    unet: SpatioTemporalUNet,
    vae: AutoencoderKLTemporalDecoder,
    clip: ImageEncoder,
    generation: GenerationConfig,
    dtype: torch.dtype,
) -> None:
    """Weights in `dtype`, one file a part, and every config. A UNet built with vcut says so in its config.json, as
    `vcut`; only minisvd reads that one."""
    for name, state in {
        "unet/diffusion_pytorch_model.safetensors": unet.state_dict(),
        "vae/diffusion_pytorch_model.safetensors": vae.state_dict(),
        "image_encoder/model.safetensors": clip_state(clip),
    }.items():
        with atomic(out / name) as path:
            save_file({k: v.cpu().to(dtype).contiguous() for k, v in state.items()}, path, metadata={"format": "pt"})
    for name, content in {
        "unet/config.json": unet_config(unet, generation.num_frames),
        "vae/config.json": vae_config(vae),
        "image_encoder/config.json": clip_config(clip),
        "feature_extractor/preprocessor_config.json": extractor_config(clip),
        "scheduler/scheduler_config.json": SCHEDULER,
        "model_index.json": INDEX,
        "generation_config.json": asdict(generation),
    }.items():
        write_json(out / name, content, indent=2)


def clip_state(clip: ImageEncoder) -> dict[str, Tensor]:
    """The image encoder's tensors under the folder's names: the loader's own tables, read backwards."""
    state = {}
    for name, tensor in clip.state_dict().items():
        names, _ = sources(name, CLIP_FOLDER_GATHER, CLIP_FOLDER_RENAME)
        tensor = tensor.T if name == "visual.proj" else tensor
        state |= dict(zip(names, tensor.chunk(len(names)), strict=True))
    return state


def unet_config(unet: SpatioTemporalUNet, num_frames: int) -> dict[str, Any]:
    config = unet.config
    kinds = ["CrossAttn" if attention else "" for attention in config.attention]
    stated = {
        "_class_name": "UNetSpatioTemporalConditionModel",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": [f"{kind}DownBlockSpatioTemporal" for kind in kinds],
        "up_block_types": [f"{kind}UpBlockSpatioTemporal" for kind in reversed(kinds)],
        "block_out_channels": config.block_out_channels,
        "addition_time_embed_dim": config.addition_time_embed_dim,
        "projection_class_embeddings_input_dim": 3 * config.addition_time_embed_dim,
        "layers_per_block": config.layers_per_block,
        "cross_attention_dim": config.cross_attention_dim,
        "transformer_layers_per_block": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_frames": num_frames,
    }
    return stated | ({} if unet.vcut is False else {"vcut": unet.vcut})


def vae_config(vae: AutoencoderKLTemporalDecoder) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKLTemporalDecoder",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * len(vae.config.block_out_channels),
        "block_out_channels": vae.config.block_out_channels,
        "layers_per_block": 2,
        "latent_channels": vae.config.latent_channels,
        "scaling_factor": vae.config.scaling_factor,
        "force_upcast": True,
    }


def clip_config(clip: ImageEncoder) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(clip.config).items() if name not in ("mean", "std")}
    return fields | {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "num_channels": 3,
        "layer_norm_eps": 1e-5,
    }


def extractor_config(clip: ImageEncoder) -> dict[str, Any]:
    side = clip.config.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": clip.config.mean,
        "image_std": clip.config.std,
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
    }


INDEX = {
    "_class_name": "StableVideoDiffusionPipeline",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
    "vae": ["diffusers", "AutoencoderKLTemporalDecoder"],
}
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "prediction_type": "v_prediction",
    "timestep_type": "continuous",
    "timestep_spacing": "leading",
    "sigma_min": 0.002,
    "sigma_max": 700.0,
    "use_karras_sigmas": True,
}
