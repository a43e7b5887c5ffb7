"""Write a model as a folder of the published layout: what `minisvd.load`, diffusers and transformers read.

A folder appears whole or not at all: it is written beside its place, under a hidden name, and renamed at the end.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import BROKEN, finite
from .clip import ImageEncoder
from .config import ClipConfig, GenerationConfig, UNetConfig, VAEConfig
from .folder import CONFIG_FILES, FIXED, GENERATION_FILE, PREPROCESSOR_FILE, STEMS
from .layouts import CLIP_FOLDER_GATHER, CLIP_FOLDER_RENAME, sources
from .unet import SpatioTemporalUNet
from .vae import AutoencoderKLTemporalDecoder
from .video import replacing


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes its place when all is written. Raises FileExistsError unless that is free."""
    folder = Path(folder).expanduser().absolute()
    if folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists: name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as part:
        part.mkdir()
        yield part


def save_unet(unet: SpatioTemporalUNet, folder: str | Path, num_frames: int, dtype: torch.dtype | None = None) -> None:
    """config.json and the weights, as `dtype` or as they are: a `unet/` folder, which can also be loaded alone."""
    with new_folder(folder) as part:
        write_json(part / Path(CONFIG_FILES["unet"]).name, unet_config(original(unet).config, num_frames))
        write_tensors(part / Path(STEMS["unet"]).name, original(unet).state_dict(), dtype)


def save_folder(
    folder: str | Path, unet: SpatioTemporalUNet, vae: AutoencoderKLTemporalDecoder, clip: ImageEncoder,
    generation: GenerationConfig, dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """All parts, with their weights as `dtype` or as they are, and every config. A UNet built with vcut says so in its
    config.json, as `vcut`; only minisvd reads that one."""
    unet = original(unet)
    tensors = {"unet": unet.state_dict(), "vae": vae.state_dict(), "clip": clip_state(clip)}
    contents = {
        CONFIG_FILES["unet"]: unet_config(unet.config, generation.num_frames),
        CONFIG_FILES["vae"]: vae_config(vae.config),
        CONFIG_FILES["clip"]: clip_config(clip.config),
        PREPROCESSOR_FILE: extractor_config(clip.config),
        "scheduler/scheduler_config.json": SCHEDULER,
        "model_index.json": INDEX,
        GENERATION_FILE: asdict(generation),
    }
    with new_folder(folder) as out:
        for part, state in tensors.items():
            write_tensors(out / STEMS[part], state, dtype)
        for name, content in contents.items():
            write_json(out / name, content)


def original(module: Any) -> Any:
    """The module itself, if it is one that torch.compile has wrapped."""
    return getattr(module, "_orig_mod", module)


def write_tensors(stem: Path, state: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in state.items()}
    for name, tensor in tensors.items():
        if not finite(tensor):
            why = BROKEN if tensor.dtype == state[name].dtype else f"does not fit in {dtype}: take float32 or bfloat16"
            raise ValueError(f"{stem}: {name} {why}")
    try:
        save_file(tensors, f"{stem}.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk
        raise OSError(f"cannot write {stem}.safetensors ({error}): make room, or choose another place") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
    own = asdict(config)
    attention, vcut, ids = (own.pop(name) for name in ("attention", "vcut", "num_time_ids"))
    kinds = ["CrossAttn" if here else "" for here in attention]
    own["down_block_types"] = [f"{kind}DownBlockSpatioTemporal" for kind in kinds]
    own["up_block_types"] = [f"{kind}UpBlockSpatioTemporal" for kind in reversed(kinds)]
    own["projection_class_embeddings_input_dim"] = ids * config.addition_time_embed_dim
    return FIXED["unet"] | own | {"num_frames": num_frames} | ({} if vcut is False else {"vcut": vcut})


def vae_config(config: VAEConfig) -> dict[str, Any]:
    kinds = ["DownEncoderBlock2D"] * len(config.block_out_channels)
    return FIXED["vae"] | {"down_block_types": kinds} | asdict(config) | {"force_upcast": True}


def clip_config(config: ClipConfig) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(config).items() if name not in ("mean", "std")}
    return FIXED["clip"] | fields | {"architectures": ["CLIPVisionModelWithProjection"]}


def extractor_config(config: ClipConfig) -> dict[str, Any]:
    side = config.image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return {"image_processor_type": "CLIPImageProcessor", "image_mean": config.mean, "image_std": config.std} | sizes


INDEX = {
    "_class_name": "StableVideoDiffusionPipeline",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
    "vae": ["diffusers", "AutoencoderKLTemporalDecoder"],
}
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction", "timestep_type": "continuous",
    "timestep_spacing": "leading", "sigma_min": 0.002, "sigma_max": 700.0, "use_karras_sigmas": True,
}  # fmt: skip
