"""What a model is made of, as data: three frozen dataclasses, and what each published model is called with.

The defaults are the released Stable Video Diffusion (14 frames). A preset is where the weights are and the
settings its authors generate with; nothing else differs between `svd`, `svd-xt` and `svd-xt-1-1`.
"""

from dataclasses import dataclass
from typing import Literal

Vcut = Literal[False, True, "lossless"]
"""What stands for the cross-attentions: themselves, only linear maps within frames, or linear maps everywhere."""
Stage2 = Literal["mean", "cond", "uncond"]  # the share of the embedding in stage two: half, all, none
Fit = Literal["crop", "pad", "stretch"]  # how an image of another shape gets to the model's

VCUT: dict[str, Vcut] = {"off": False, "on": True, "lossless": "lossless"}  # as the command line spells it
DTYPES = ("float32", "float16", "bfloat16")  # that a model runs in

NUM_GROUPS = 32  # of every GroupNorm, so that every width is a multiple of it


def check_widths(widths: tuple[int, ...]) -> None:
    if not widths or any(w < 1 or w % NUM_GROUPS for w in widths):
        raise ValueError(
            f"block_out_channels is {widths}; need positive multiples of {NUM_GROUPS} (GroupNorm's groups)"
        )


def check_vcut(vcut: object) -> None:
    if not isinstance(vcut, bool) and vcut != "lossless":
        raise ValueError(f"vcut is {vcut!r}; need False, True or 'lossless'")


@dataclass(frozen=True)
class UNetConfig:
    """The spatio-temporal UNet. The defaults give the released 1,524,623,082 parameters.

    One entry per level of the U, outermost first: `block_out_channels`, `num_attention_heads` and `attention`
    (does that level have transformers; the released innermost level has none). `vcut` chooses what stands at the
    cross-attentions (attention.CROSS); the published files do not have the field, ours do unless it is False.
    Raises ValueError for a field that no such UNet can have.
    Source: arXiv 2311.15127, appendix D; names as in the `unet/config.json` of the published folders.
    """

    in_channels: int = 8
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)
    num_attention_heads: tuple[int, ...] = (5, 10, 20, 20)
    layers_per_block: int = 2
    cross_attention_dim: int = 1024
    addition_time_embed_dim: int = 256
    vcut: Vcut = False

    def __post_init__(self) -> None:
        check_widths(self.block_out_channels)
        check_vcut(self.vcut)
        levels = len(self.block_out_channels)
        for name in ("attention", "num_attention_heads"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name} is {getattr(self, name)}; need one entry for each of {levels} levels")
        for heads, width in zip(self.num_attention_heads, self.block_out_channels, strict=True):
            if heads < 1 or width % heads:
                raise ValueError(f"num_attention_heads has {heads} at width {width}; need a divisor of the width")
        for name in ("in_channels", "out_channels", "layers_per_block", "cross_attention_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; need at least 1")
        if self.addition_time_embed_dim < 2 or self.addition_time_embed_dim % 2:
            raise ValueError(f"addition_time_embed_dim is {self.addition_time_embed_dim}; need an even number")

    @property
    def stride(self) -> int:
        """Latent cells per cell of the innermost level: latent sides must be multiples of it."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class VAEConfig:
    """The image encoder and temporal decoder, 97,742,847 parameters as released (`vae/config.json`).

    Raises ValueError for a field that no such VAE can have.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    latent_channels: int = 4
    scaling_factor: float = 0.18215  # makes the latents that are denoised of unit variance; the image's stays unscaled

    def __post_init__(self) -> None:
        check_widths(self.block_out_channels)
        if self.latent_channels < 1 or not self.scaling_factor > 0:
            raise ValueError(
                f"latent_channels is {self.latent_channels}, scaling_factor {self.scaling_factor}; need both positive"
            )

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class ClipConfig:
    """The CLIP vision tower, ViT-H/14 as released (`image_encoder/config.json`).

    Lengths in pixels: `image_size` and `patch_size`. `mean` and `std` are those CLIP was trained with.
    Raises ValueError for a field that no such tower can have.
    """

    hidden_size: int = 1280
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    intermediate_size: int = 5120
    patch_size: int = 14
    image_size: int = 224
    projection_dim: int = 1024
    hidden_act: str = "gelu"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"num_attention_heads is {self.num_attention_heads}; need a divisor of {self.hidden_size}")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size is {self.patch_size}; need a divisor of image_size {self.image_size}")
        if self.hidden_act not in ("gelu", "quick_gelu"):
            raise ValueError(f"hidden_act is {self.hidden_act!r}; need 'gelu' or 'quick_gelu'")


@dataclass(frozen=True)
class GenerationConfig:
    """What a call leaves to the model: frames, steps, guidance (min, max), size (width, height) in pixels, and how
    many frames the decoder has in work at a time.

    A folder may state its own in `generation_config.json`, with these field names.
    """

    num_frames: int = 14
    steps: int = 25
    guidance: tuple[float, float] = (1.0, 2.5)  # as svd's authors sample; arXiv 2407.19205 has (1.0, 3.0) for all
    size: tuple[int, int] = (1024, 576)
    decode_chunk: int = 2


@dataclass(frozen=True)
class Preset:
    """A name for published weights: `source` is a hub id, `generation` the authors' settings."""

    source: str
    generation: GenerationConfig


XT = GenerationConfig(num_frames=25, steps=30, guidance=(1.5, 3.0))  # as the authors sample svd-xt

PRESETS = {
    "svd": Preset("stabilityai/stable-video-diffusion-img2vid", GenerationConfig()),
    "svd-xt": Preset("stabilityai/stable-video-diffusion-img2vid-xt", XT),
    "svd-xt-1-1": Preset("stabilityai/stable-video-diffusion-img2vid-xt-1-1", XT),
}
"""`tiny` is the fourth name that `minisvd.load` knows: the trained folder that ships with the package."""
