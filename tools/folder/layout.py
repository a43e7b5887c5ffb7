"""Write a model as a folder of the published layout: what `minisvd.load`, diffusers and transformers read."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minisvd.clip import ImageEncoder
from minisvd.config import ClipConfig, GenerationConfig, UNetConfig, VAEConfig
from minisvd.folder import CONFIG_FILES, FIXED, GENERATION_FILE, PREPROCESSOR_FILE, STEMS
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
    for part, state in {"unet": unet.state_dict(), "vae": vae.state_dict(), "clip": clip_state(clip)}.items():
        with atomic(out / f"{STEMS[part]}.safetensors") as path:
            save_file({k: v.cpu().to(dtype).contiguous() for k, v in state.items()}, path, metadata={"format": "pt"})
    for name, content in {
        CONFIG_FILES["unet"]: unet_config(unet.config, generation.num_frames),
        CONFIG_FILES["vae"]: vae_config(vae.config),
        CONFIG_FILES["clip"]: clip_config(clip.config),
        PREPROCESSOR_FILE: extractor_config(clip.config),
        "scheduler/scheduler_config.json": SCHEDULER,
        "model_index.json": INDEX,
        GENERATION_FILE: asdict(generation),
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


# The fields of each config.json, as the published folders spell them; `minisvd.folder` reads them back.


def unet_config(config: UNetConfig, num_frames: int) -> dict[str, Any]:
    kinds = ["CrossAttn" if attention else "" for attention in config.attention]
    stated = FIXED["unet"] | {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": [f"{kind}DownBlockSpatioTemporal" for kind in kinds],
        "up_block_types": [f"{kind}UpBlockSpatioTemporal" for kind in reversed(kinds)],
        "block_out_channels": config.block_out_channels,
        "addition_time_embed_dim": config.addition_time_embed_dim,
        "projection_class_embeddings_input_dim": config.num_time_ids * config.addition_time_embed_dim,
        "layers_per_block": config.layers_per_block,
        "cross_attention_dim": config.cross_attention_dim,
        "num_attention_heads": config.num_attention_heads,
        "num_frames": num_frames,
    }
    return stated | ({} if config.vcut is False else {"vcut": config.vcut})


def vae_config(config: VAEConfig) -> dict[str, Any]:
    return FIXED["vae"] | {
        "down_block_types": ["DownEncoderBlock2D"] * len(config.block_out_channels),
        "block_out_channels": config.block_out_channels,
        "latent_channels": config.latent_channels,
        "scaling_factor": config.scaling_factor,
        "force_upcast": True,
    }


def clip_config(config: ClipConfig) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(config).items() if name not in ("mean", "std")}
    return FIXED["clip"] | fields | {"architectures": ["CLIPVisionModelWithProjection"]}


def extractor_config(config: ClipConfig) -> dict[str, Any]:
    side = config.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": config.mean,
        "image_std": config.std,
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
