"""What a published folder says of itself: which files hold which part, and its config.json files as our configs.

A field of a config.json is one of ours, or fixed to the one value that these modules have, or known to change
nothing; any other is an error that names it, because what it changes could not be loaded.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

from .config import PRESETS, XT, ClipConfig, GenerationConfig, UNetConfig, VAEConfig, shown

PARTS = ("unet", "vae", "clip")
STEMS = {"unet": "unet/diffusion_pytorch_model", "vae": "vae/diffusion_pytorch_model", "clip": "image_encoder/model"}
CONFIG_FILES = {"unet": "unet/config.json", "vae": "vae/config.json", "clip": "image_encoder/config.json"}
PREPROCESSOR_FILE, GENERATION_FILE = "feature_extractor/preprocessor_config.json", "generation_config.json"
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")

FIXED = {  # fields that may be stated, with the one value that these modules have
    "unet": {"_class_name": "UNetSpatioTemporalConditionModel", "transformer_layers_per_block": 1},
    "vae": {"_class_name": "AutoencoderKLTemporalDecoder", "in_channels": 3, "out_channels": 3, "layers_per_block": 2},
    "clip": {"model_type": "clip_vision_model", "num_channels": 3, "layer_norm_eps": 1e-5},
}
IGNORED = {  # fields that change nothing here: training, bookkeeping, a default size
    "unet": ("num_frames", "sample_size"),
    "vae": ("force_upcast", "sample_size"),
    "clip": ("architectures", "attention_dropout", "dropout", "dtype", "initializer_factor", "initializer_range",
             "torch_dtype", "transformers_version"),
}  # fmt: skip


def pickle_refusal(path: str | Path) -> str:
    return f"{path} is a pickle, which can run any code when it is opened: convert it to .safetensors first"


def choose(names: Sequence[str], parts: Sequence[str], variant: str | None, where: str) -> dict[str, str]:
    """Which of a folder's files holds each part. Raises for parts without one, naming every file that is missing."""
    tried = [variant] if variant else [None, "fp16"]
    chosen, missing = {}, [CONFIG_FILES[part] for part in parts if CONFIG_FILES[part] not in names]
    for part in parts:
        wanted = [".".join(filter(None, (STEMS[part], v, "safetensors"))) for v in tried]
        chosen[part] = next((name for name in wanted if name in names), None)
        if chosen[part] is None:
            missing.append(wanted[0])
            inside = [name for name in names if name.startswith(CONFIG_FILES[part].split("/")[0] + "/")]
            pickles = [name for name in inside if name.endswith(PICKLES)]
            if pickles and not any(name.endswith(".safetensors") for name in inside):
                raise ValueError(pickle_refusal(f"{where}/{pickles[0]}"))
    if missing:
        have = ", ".join(name for name in names if name.endswith(".safetensors")) or "no .safetensors file at all"
        raise FileNotFoundError(f"{where} lacks {', '.join(missing)}; it has {have}")
    return chosen


def read_json(path: Path) -> dict[str, Any]:
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(stated, dict):
        raise ValueError(f"{path} holds a {type(stated).__name__}; need a JSON object")
    return stated


def read_config(part: str, folder: Path, name: str | None = None) -> Any:
    """The config of a part of a folder, or its file `name`. Raises ValueError naming the first field that these modules
    cannot have."""
    parsers: dict[str, Callable[[dict[str, Any]], Any]] = {"unet": unet_config, "vae": vae_config}
    parsers["clip"] = lambda stated: clip_config(stated, folder / PREPROCESSOR_FILE)
    return parsed(folder / (name or CONFIG_FILES[part]), parsers[part])


def parsed(path: Path, parse: Callable[[dict[str, Any]], Any]) -> Any:
    """parse(what the file states), whose errors name the file."""
    stated = read_json(path)
    try:
        return parse(stated)
    except KeyError as error:
        raise ValueError(f"{path} lacks the field {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def unet_config(stated: dict[str, Any]) -> UNetConfig:
    """Block types become `attention`; a number of heads for all levels becomes one for each, equal widths one."""
    down, up = (stated.pop(f"{way}_block_types") for way in ("down", "up"))
    kinds = ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")
    if not isinstance(down, list) or any(kind not in kinds for kind in down):
        raise ValueError(f"down_block_types is {down}; need a list of {' and '.join(kinds)}")
    if up != (mirrored := [kind.replace("Down", "Up") for kind in reversed(down)]):
        raise ValueError(f"up_block_types is {up}; need down_block_types mirrored, {mirrored}")
    for name in ("cross_attention_dim", "layers_per_block", "transformer_layers_per_block"):
        value = stated.get(name)
        if isinstance(value, list) and value and value == value[:1] * len(down):
            stated[name] = value[0]
    if isinstance(heads := stated["num_attention_heads"], int):
        stated["num_attention_heads"] = [heads] * len(down)
    ids_width, vcut = stated.pop("projection_class_embeddings_input_dim"), stated.pop("vcut", False)
    ours = {"attention": [kind == kinds[0] for kind in down], "vcut": False, "num_time_ids": UNetConfig.num_time_ids}
    constant = stated.get("cross_attention_dim") == 0 and vcut is not False
    config = as_config(UNetConfig, {**stated, **ours} | ({"cross_attention_dim": 1} if constant else {}), "unet")
    dim = config.addition_time_embed_dim
    if type(ids_width) is not int or ids_width < 1 or ids_width % dim:
        need = f"need a multiple of addition_time_embed_dim, {dim}"
        raise ValueError(f"projection_class_embeddings_input_dim is {ids_width}; {need}")
    c_context = 0 if constant else config.cross_attention_dim
    return replace(config, vcut=vcut, num_time_ids=ids_width // dim, cross_attention_dim=c_context)


def vae_config(stated: dict[str, Any]) -> VAEConfig:
    kinds = stated.pop("down_block_types")
    config = as_config(VAEConfig, stated, "vae")
    if kinds != ["DownEncoderBlock2D"] * len(config.block_out_channels):
        raise ValueError(f"down_block_types is {kinds}; need DownEncoderBlock2D, one for each of block_out_channels")
    return config


def clip_config(stated: dict[str, Any], preprocessor: Path) -> ClipConfig:
    """`mean` and `std` are stated in another file, if at all."""
    pixels = read_json(preprocessor) if preprocessor.is_file() else {}
    mean, std = pixels.get("image_mean", [*ClipConfig.mean]), pixels.get("image_std", [*ClipConfig.std])
    return as_config(ClipConfig, {**stated, "mean": mean, "std": std}, "clip")


def as_config(cls: Any, stated: dict[str, Any], part: str) -> Any:
    """The dataclass, all of whose fields must be stated, and nothing else that matters."""
    known = {field.name: field for field in fields(cls)}
    for name, value in stated.items():
        if name in FIXED[part] and value != FIXED[part][name]:
            raise ValueError(f"{name} is {value!r}; need {FIXED[part][name]!r}")
        if not (name in known or name in FIXED[part] or name in IGNORED[part] or name.startswith("_")):
            raise ValueError(f"{shown(name)[1:-1]} is {shown(value)}; no such field is known, nor what it changes")
    return cls(**{name: typed(field, stated[name]) for name, field in known.items()})


def typed(field: Any, value: Any) -> Any:
    """A JSON value as the field of a config has it: lists become tuples. Raises ValueError for any other kind."""
    default = field.default if isinstance(field.default, tuple) else (field.default,)
    values, kind = value if isinstance(field.default, tuple) else [value], type(default[0])
    any_length = get_args(field.type)[-1:] == (...,)
    kinds = {kind, int} if kind is float else {kind}
    fits = isinstance(values, list) and all(type(v) in kinds for v in values)
    if not fits or not (any_length or len(values) == len(default)) or (kind is int and min(values, default=1) < 1):
        raise ValueError(f"{field.name} is {shown(value)}; need a value such as {field.default!r}")
    return tuple(kind(v) for v in values) if isinstance(field.default, tuple) else kind(value)


def read_generation(folder: Path, released: GenerationConfig | None) -> GenerationConfig:
    """Those of the release, or of the one with as many frames; then what the folder itself states."""
    known = [field.name for field in fields(GenerationConfig)]
    unet, own, stated = folder / CONFIG_FILES["unet"], folder / GENERATION_FILE, {}
    if released is None and unet.is_file():
        stated["num_frames"] = read_json(unet).get("num_frames", GenerationConfig.num_frames)
    base = released or (XT if stated.get("num_frames") == XT.num_frames else GenerationConfig())
    stated |= read_json(own) if own.is_file() else {}
    try:
        if unknown := sorted(stated.keys() - set(known)):
            raise ValueError(f"{shown(unknown[0])[1:-1]} is none of {', '.join(known)}")
        return replace(base, **stated)
    except ValueError as error:
        raise ValueError(f"{own if own.is_file() else unet}: {error}") from error


def resolve_configs(source: str, offline: bool = False) -> tuple[dict[str, Any], GenerationConfig]:
    """The configs of "unet" and "vae", of "clip" if it is there, and the settings, of a source without its weights. A
    preset's are known. Of a hub id only the config.json files are downloaded; of a single file the header is read,
    which has to be that of the released UNet. Raises FileNotFoundError or ValueError for a source without them."""
    if source in PRESETS:
        return {"unet": UNetConfig(), "vae": VAEConfig()}, PRESETS[source].generation
    from .checkpoint import download, locate, resolve  # and with it torch, which a preset does not need

    path, released = locate(source), None
    if path is None:
        path = download(source, [], None, None, offline)
        released = next((preset.generation for preset in PRESETS.values() if preset.source == source), None)
    if path.is_file():
        found = resolve(path, parts=["unet", "vae"])
        found.plan("unet", found.build("unet"))
        return found.configs, found.generation
    if missing := [CONFIG_FILES[part] for part in ("unet", "vae") if not (path / CONFIG_FILES[part]).is_file()]:
        raise FileNotFoundError(f"{source} has no {missing[0]}: give a folder that has, or a .safetensors file")
    there = [part for part in PARTS if (path / CONFIG_FILES[part]).is_file()]
    return {part: read_config(part, path) for part in there}, read_generation(path, released)


def check_together(configs: Mapping[str, Any]) -> None:
    """Raise ValueError unless the parts fit: the image's latent and noise into the UNet, the embedding into its TCA."""
    unet, vae, clip = (configs.get(part) for part in PARTS)
    pairs = []
    if unet and vae:
        pairs += [("in_channels", unet.in_channels, "twice the VAE's latent_channels", 2 * vae.latent_channels)]
        pairs += [("out_channels", unet.out_channels, "the VAE's latent_channels", vae.latent_channels)]
        width, dim = "projection_class_embeddings_input_dim", unet.addition_time_embed_dim
        pairs += [(width, unet.num_time_ids * dim, "three times addition_time_embed_dim", 3 * dim)]
    if unet and clip:
        pairs += [("cross_attention_dim", unet.cross_attention_dim, "CLIP's projection_dim", clip.projection_dim)]
    for name, value, other, needed in pairs:
        if value != needed:
            raise ValueError(f"the UNet's {name} is {value}; need {other}, {needed}")
