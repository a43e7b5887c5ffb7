"""Small checkpoints with real bytes in both published layouts, for tests."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minisvd.checkpoint import MODULES
from minisvd.config import ClipConfig, UNetConfig, VAEConfig
from minisvd.folder import CONFIG_FILES, STEMS
from minisvd.layouts import DROPPED, FOLDER, SINGLE_FILE, rules, sources
from minisvd.save import clip_config, unet_config, vae_config

LAYOUTS = Path(__file__).parent / "layouts"

SMALL: dict[str, Any] = {
    "unet": UNetConfig(
        block_out_channels=(32, 64, 64),
        attention=(True, True, False),
        num_attention_heads=(1, 2, 4),
        cross_attention_dim=24,
        addition_time_embed_dim=8,
    ),
    "vae": VAEConfig(block_out_channels=(32, 64)),
    "clip": ClipConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=80,
        patch_size=8,
        image_size=32,
        projection_dim=24,
    ),
}


def small_modules(seed: int = 0) -> dict[str, nn.Module]:
    """Every part, small; no two of its numbers are alike by construction, not even in norms and biases."""
    torch.manual_seed(seed)
    modules = {part: MODULES[part](config) for part, config in SMALL.items()}
    for module in modules.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    return modules


UNREAD: dict[str, dict[str, Any]] = {  # fields of the published config.json files that no build depends on
    "unet": {"_diffusers_version": "0.24.0.dev0", "sample_size": 96},
    "vae": {"sample_size": 768},
    "clip": {"attention_dropout": 0.0, "torch_dtype": "float16"},
}


def stated_config(part: str, config: Any) -> dict[str, Any]:
    """config.json as the published folders spell it."""
    spelled = {"unet": lambda config: unet_config(config, num_frames=14), "vae": vae_config, "clip": clip_config}
    return json.loads(json.dumps(spelled[part](config) | UNREAD[part]))


def folder_tensors(part: str, module: nn.Module) -> dict[str, Tensor]:
    """A part's parameters under the names of transformers and diffusers, written out without the rule tables."""
    if part != "clip":
        return dict(module.state_dict())
    state, out = module.state_dict(), {}
    ends = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
    }
    ends |= {f"{a}.{kind}": f"{b}.{kind}" for a, b in [("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")]
             for kind in ("weight", "bias")}  # fmt: skip
    for ours, theirs in ends.items():
        out[f"vision_model.{theirs}"] = state[f"visual.{ours}"]
    for i in range(SMALL["clip"].num_hidden_layers):
        block, layer = f"visual.transformer.resblocks.{i}", f"vision_model.encoder.layers.{i}"
        for kind in ("weight", "bias"):
            for name, piece in zip("qkv", state[f"{block}.attn.in_proj_{kind}"].chunk(3), strict=True):
                out[f"{layer}.self_attn.{name}_proj.{kind}"] = piece
            out[f"{layer}.self_attn.out_proj.{kind}"] = state[f"{block}.attn.out_proj.{kind}"]
            out[f"{layer}.layer_norm1.{kind}"] = state[f"{block}.ln_1.{kind}"]
            out[f"{layer}.layer_norm2.{kind}"] = state[f"{block}.ln_2.{kind}"]
            out[f"{layer}.mlp.fc1.{kind}"] = state[f"{block}.mlp.c_fc.{kind}"]
            out[f"{layer}.mlp.fc2.{kind}"] = state[f"{block}.mlp.c_proj.{kind}"]
    out["visual_projection.weight"] = state["visual.proj"].T
    return out


def write_folder(folder: Path, modules: dict[str, nn.Module], variant: str | None = None, **frames: Any) -> Path:
    """The parts as a published folder; `frames` goes into the UNet's config.json."""
    for part, module in modules.items():
        (folder / CONFIG_FILES[part]).parent.mkdir(parents=True, exist_ok=True)
        stated = stated_config(part, module.config)
        (folder / CONFIG_FILES[part]).write_text(json.dumps(stated | (frames if part == "unet" else {})))
        dtype = torch.float16 if variant == "fp16" else torch.float32
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in folder_tensors(part, module).items()}
        save_file(tensors, folder / ".".join(filter(None, (STEMS[part], variant, "safetensors"))))
    return folder


def write_single_file(path: Path, modules: dict[str, nn.Module]) -> Path:
    """The same parts as one file, with the tensors that nobody needs, which are tiny here."""
    tensors = {name: torch.zeros(1) for name in published(SINGLE_FILE)["unet"] if re.match(DROPPED[SINGLE_FILE], name)}
    for part, module in modules.items():
        gather, rename = rules(part, SINGLE_FILE, module.config)
        for name, tensor in module.state_dict().items():
            (source,), _ = sources(name, gather, rename)
            is_conv = part == "vae" and ".to_" in name and tensor.ndim == 2
            tensors[source] = tensor[:, :, None, None].contiguous() if is_conv else tensor
    save_file(tensors, path)
    return path


def published(layout: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Name -> shape of every tensor of a published layout, by part; all three share the tensors of a single file."""
    name = {FOLDER: "diffusers_folder", SINGLE_FILE: "single_file"}[layout]
    listed: dict[str, Any] = json.loads(gzip.decompress((LAYOUTS / f"{name}.json.gz").read_bytes()))
    folders = {"unet": "unet", "vae": "vae", "clip": "image_encoder"}
    by_part = {part: listed[folder] if layout == FOLDER else listed for part, folder in folders.items()}
    return {part: {name: tuple(shape) for name, shape in tensors.items()} for part, tensors in by_part.items()}
