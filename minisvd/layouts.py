"""Where each parameter comes from, in both published layouts, as tables.

The UNet's and VAE's parameters have the folder layout's names; the image encoder's have open_clip's, which are
the single file's. For a parameter, `gather` may split its name into several sources and says how to join them;
then `rename` rewrites each source's name, rule by rule, into the file's.
"""

import re
from collections.abc import Callable
from typing import Any

from einops import rearrange
from torch import Tensor

from .config import UNetConfig, VAEConfig

Join = Callable[..., Tensor]
Gather = tuple[str, tuple[str, ...], Join]  # a parameter, its sources, how to join them
Rename = tuple[str, str | Callable[[re.Match[str]], str]]  # what to look for, what to write instead

FOLDER, SINGLE_FILE = "folder", "single file"

CLIP_FOLDER_GATHER: list[Gather] = [
    (
        r"(.*attn)\.in_proj_(weight|bias)",
        (r"\1.q_proj.\2", r"\1.k_proj.\2", r"\1.v_proj.\2"),
        lambda *qkv: rearrange(list(qkv), "qkv o ... -> (qkv o) ..."),
    ),
    (r"visual\.proj", ("visual_projection.weight",), lambda w: rearrange(w, "o i -> i o")),
]
CLIP_FOLDER_RENAME: list[Rename] = [
    (r"text\.transformer\.resblocks", "text_model.encoder.layers"),
    (r"text\.token_embedding", "text_model.embeddings.token_embedding"),
    (r"text\.positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"text\.ln_final", "text_model.final_layer_norm"),
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"visual\.ln_pre", "vision_model.pre_layrnorm"),  # spelled so in the published files
    (r"visual\.ln_post", "vision_model.post_layernorm"),
    (r"visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"\.ln_([12])", r".layer_norm\1"),
    (r"\.attn\.", ".self_attn."),
    (r"\.c_fc", ".fc1"),
    (r"\.c_proj", ".fc2"),
]
CLIP_FILE_RENAME: list[Rename] = [(r"^", "conditioner.embedders.0.open_clip.model.")]

VAE_FILE_GATHER: list[Gather] = [  # its attention was written with 1x1 convolutions
    (r".*attentions\.0\.to_.*weight", (r"\g<0>",), lambda w: rearrange(w, "o i 1 1 -> o i"))
]

FOLD_GATHER: list[Gather] = [  # a CachedCondLinear from the attention that it stands for, rounded once, at the end
    (r"(.*\.attn2)\.weight", (r"\1.to_out.0.weight", r"\1.to_v.weight"), lambda out, v: out.double() @ v.double()),
    (r"(.*\.attn2)\.bias", (r"\1.to_out.0.bias",), lambda bias: bias),
]

OWNED = {  # the single file holds all three parts, each under names of its own
    "unet": r"model\.diffusion_model\.",
    "vae": r"first_stage_model\.decoder\.|conditioner\.embedders\.3\.encoder\.(encoder|quant_conv)\.",
    "clip": r"conditioner\.embedders\.0\.open_clip\.model\.visual\.",
}
DROPPED = {  # what no part needs: an index buffer; the halves of two VAEs that are never run, CLIP's text half
    FOLDER: r"(text|vision)_model\.embeddings\.position_ids$",
    SINGLE_FILE: r"first_stage_model\.encoder\.|conditioner\.embedders\.3\.encoder\.(decoder|post_quant_conv)\.|"
    r"conditioner\.embedders\.0\.open_clip\.model\."
    r"(ln_final\.(weight|bias)|logit_scale|positional_embedding|text_projection|token_embedding\.weight)$",
}


def numbered(write: Callable[..., str]) -> Callable[[re.Match[str]], str]:
    """A replacement computed from the numbers that were matched."""
    return lambda match: write(*map(int, match.groups()))


def unet_file_rename(config: UNetConfig) -> list[Rename]:
    """The original code numbers all blocks of the U in a row: `n` to a level, after the first convolution."""
    n, attention = config.layers_per_block + 1, config.attention[::-1]
    return [
        (r"^conv_in", "input_blocks.0.0"),
        (r"^down_blocks\.(\d+)\.resnets\.(\d+)", numbered(lambda i, j: f"input_blocks.{1 + n * i + j}.0")),
        (r"^down_blocks\.(\d+)\.attentions\.(\d+)", numbered(lambda i, j: f"input_blocks.{1 + n * i + j}.1")),
        (r"^down_blocks\.(\d+)\.downsamplers\.0\.conv", numbered(lambda i: f"input_blocks.{n + n * i}.0.op")),
        (r"^mid_block\.resnets\.(\d)", numbered(lambda j: f"middle_block.{2 * j}")),
        (r"^mid_block\.attentions\.0", "middle_block.1"),
        (r"^up_blocks\.(\d+)\.resnets\.(\d+)", numbered(lambda i, j: f"output_blocks.{n * i + j}.0")),
        (r"^up_blocks\.(\d+)\.attentions\.(\d+)", numbered(lambda i, j: f"output_blocks.{n * i + j}.1")),
        (r"^up_blocks\.(\d+)\.upsamplers\.0", numbered(lambda i: f"output_blocks.{n * i + n - 1}.{1 + attention[i]}")),
        (r"^conv_norm_out", "out.0"),
        (r"^conv_out", "out.2"),
        (r"^time_embedding", "time_embed"),
        (r"^add_embedding", "label_emb.0"),
        (r"\.linear_1", ".0"),
        (r"\.linear_2", ".2"),
        *res_block_rename(r"res_block", "res_block"),
        (r"\.time_emb_proj", ".emb_layers.1"),
        (r"\.conv_shortcut", ".skip_connection"),
        (r"\.spatial_res_block", ""),
        (r"\.temporal_(res_block|transformer_blocks)", ".time_stack"),
        (r"^", "model.diffusion_model."),
    ]


def vae_file_rename(config: VAEConfig) -> list[Rename]:
    """The decoder's levels are numbered from the outermost; only its temporal blocks have `in_layers`."""
    last = len(config.block_out_channels) - 1
    return [
        (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d+)\.resnets", numbered(lambda i: f"up.{last - i}.block")),
        (r"up_blocks\.(\d+)\.upsamplers\.0", numbered(lambda i: f"up.{last - i}.upsample")),
        (r"mid_block\.resnets\.(\d)", numbered(lambda j: f"mid.block_{1 + j}")),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"\.to_([qkv])", r".\1"),
        (r"\.to_out\.0", ".proj_out"),
        (r"\.group_norm", ".norm"),
        *res_block_rename("temporal_res_block", "time_stack"),
        (r"\.(spatial_res_block|time_mixer)", ""),
        (r"\.conv_shortcut", ".nin_shortcut"),
        (r"\.conv_norm_out", ".norm_out"),
        (r"\.time_conv_out", ".conv_out.time_mix_conv"),
        (r"^decoder", "first_stage_model.decoder"),
        (r"^(encoder|quant_conv)", r"conditioner.embedders.3.encoder.\1"),
    ]


def res_block_rename(block: str, written: str) -> list[Rename]:
    """norm, silu, conv; norm, silu, dropout, conv: the original code has each half in a Sequential."""
    places = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
    return [(rf"{block}\.{name}", f"{written}.{place}") for name, place in places.items()]


def rules(part: str, layout: str, config: Any, fold: bool = False) -> tuple[list[Gather], list[Rename]]:
    """The two tables that lead from a part's parameters to the tensors of a layout. `fold`: the file holds
    cross-attentions, the UNet `CachedCondLinear`s."""
    if part == "unet":
        return FOLD_GATHER if fold else [], unet_file_rename(config) if layout == SINGLE_FILE else []
    if layout == FOLDER:
        return (CLIP_FOLDER_GATHER, CLIP_FOLDER_RENAME) if part == "clip" else ([], [])
    return (VAE_FILE_GATHER, vae_file_rename(config)) if part == "vae" else ([], CLIP_FILE_RENAME)


def sources(name: str, gather: list[Gather], rename: list[Rename]) -> tuple[list[str], Join]:
    """The tensors that the parameter `name` is made of, and the function that makes it of them."""
    names, join = [name], lambda tensor: tensor
    for pattern, templates, function in gather:
        if match := re.fullmatch(pattern, name):
            names, join = [match.expand(template) for template in templates], function
    for pattern, written in rename:
        names = [re.sub(pattern, written, source) for source in names]
    return names, join
