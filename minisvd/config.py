"""What a model is made of, as data: three frozen dataclasses, and what each published model is called with.

The defaults are the released Stable Video Diffusion (14 frames). A preset is where the weights are and the
settings its authors generate with; nothing else differs between `svd`, `svd-xt` and `svd-xt-1-1`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

# What stands for the cross-attentions: themselves, only linear maps within frames, or linear maps everywhere
Vcut = Literal[False, True, "lossless"]
Stage2 = Literal["mean", "cond", "uncond"]  # the share of the embedding in stage two: half, all, none
Schedule = Literal["karras", "ays"]  # of the noise levels: EDM's formula, or the ten that were optimised for SVD
Fit = Literal["crop", "pad", "stretch"]  # how an image of another shape gets to the model's
Size = tuple[int, int]  # (width, height)

VCUT: dict[str, Vcut] = {"off": False, "on": True, "lossless": "lossless"}  # as the command line spells it
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}  # that a model runs in, and how many bytes a number takes

NUM_GROUPS = 32  # of every GroupNorm, so that every width is a multiple of it


@dataclass(frozen=True)
class Setting:
    """What a number may be: whole or not, from `low` to `high`, both included; or several such, `parts`, as a tuple."""

    whole: bool
    low: float
    high: float
    parts: tuple[str, ...] = ()
    rising: bool = False
    why: str = ""

    @property
    def need(self) -> str:
        """The remedy, in words."""
        kind = "whole number" if self.whole else "number"
        number = f"{len(self.parts)} {kind}s, ({', '.join(self.parts)})," if self.parts else f"a {kind}"
        rising = f", {' <= '.join(self.parts)}" if self.rising else ""
        return f"{number} from {self.low:,} to {self.high:,}{rising}{self.why}"

    def check(self, name: str, value: Any) -> Any:
        """`value` as Python's own int, float or tuple of them, also from numpy and torch. Raises ValueError that says
        what `name` is and what it needs to be."""
        value = plain(value)
        values = list(value) if self.parts and is_list(value) else [value]
        kind = Integral if self.whole else Real
        numbers = len(values) == max(1, len(self.parts)) and all(isinstance(v, kind) for v in values)
        inside = numbers and all(self.low <= v <= self.high and not isinstance(v, bool) for v in values)
        if not inside or (self.rising and values != sorted(values)):
            raise ValueError(f"{name} is {shown(value)}; need {self.need}")
        checked = tuple(int(v) if self.whole else float(v) for v in values)
        return checked if self.parts else checked[0]

    def check_each(self, name: str, value: Any) -> list[Any]:
        """The same for one value, or for a list or array of one or more. Returns a list."""
        value = plain(value)
        if is_list(value) and not value:
            raise ValueError(f"{name} is empty; need {self.need}, or one for each image")
        return [self.check(name, one) for one in (value if is_list(value) else [value])]


def plain(value: Any) -> Any:
    """Python's own numbers and lists, for what numpy and torch have."""
    return value.tolist() if hasattr(value, "tolist") else value


def is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def shown(value: Any) -> str:
    """repr(value), at most 60 characters of it."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


SETTINGS = {  # of a call, of the command line and of generation_config.json alike
    "num_frames": Setting(True, 1, 10_000),
    "steps": Setting(True, 1, 100_000),
    "decode_chunk": Setting(True, 1, 10_000),
    "fps": Setting(False, 2, 1000, why=", because the model is told fps minus one"),
    "motion_bucket": Setting(False, 0, 10_000, why="; 0 is still, 255 fast"),
    "noise_aug": Setting(False, 0, 1000, why=", a standard deviation, usually 0.02"),
    "guidance": Setting(False, -1000, 1000, ("min", "max"), rising=True),
    "guidance_interval": Setting(False, 0, 1e9, ("low", "high"), rising=True, why=", in units of sigma"),
    "cut_step": Setting(True, 1, 1_000_000, why="; steps count from 1"),
    "size": Setting(True, 1, 4096, ("width", "height"), why=" pixels"),
    "seed": Setting(True, 0, 2**32 - 1, why=", of which the generator uses all 32 bits"),
    "zoom": Setting(True, 1, 8192),
}
CHOICES = {"stage2": get_args(Stage2), "fit": get_args(Fit), "schedule": get_args(Schedule)}
COUNT, MANY, WIDTH = Setting(True, 1, 32), Setting(True, 1, 1024), Setting(True, 1, 2**16)  # of layers, and of channels


def check(name: str, value: Any) -> Any:
    """The value of a setting of a call in its plain form. Raises ValueError with the value and the remedy."""
    if name not in CHOICES:
        return SETTINGS[name].check(name, value)
    if not isinstance(value, str) or value not in CHOICES[name]:
        raise ValueError(f"{name} is {shown(value)}; need one of {', '.join(CHOICES[name])}")
    return value


def check_widths(widths: tuple[int, ...]) -> None:
    if not 1 <= len(widths) <= 8 or any(WIDTH.check("block_out_channels", w) % NUM_GROUPS for w in widths):
        need = f"up to 8 multiples of {NUM_GROUPS} (GroupNorm's groups)"
        raise ValueError(f"block_out_channels is {shown(widths)}; need {need}")


@dataclass(frozen=True)
class UNetConfig:
    """The spatio-temporal UNet. The defaults give the released 1,524,623,082 parameters.

    One entry per level of the U, outermost first: `block_out_channels`, `num_attention_heads` and `attention`
    (does that level have transformers; the released innermost level has none). `vcut` chooses what stands at the
    cross-attentions (attention.CROSS); the published files do not have the field, ours do unless it is False.
    `num_time_ids` is how many numbers are embedded beside the noise level; the files state it as the width
    projection_class_embeddings_input_dim = num_time_ids * addition_time_embed_dim. A `cross_attention_dim` of 0 is that
    of a UNet folded for one constant embedding, at whose cross-attentions a bias alone is left.
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
    num_time_ids: int = 3

    def __post_init__(self) -> None:
        check_widths(self.block_out_channels)
        if not isinstance(self.vcut, bool) and self.vcut != "lossless":
            raise ValueError(f"vcut is {self.vcut!r}; need False, True or 'lossless'")
        levels = len(self.block_out_channels)
        for name in ("attention", "num_attention_heads"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name} is {getattr(self, name)}; need one entry for each of {levels} levels")
        for heads, width in zip(self.num_attention_heads, self.block_out_channels, strict=True):
            if heads < 1 or width % heads:
                raise ValueError(f"num_attention_heads has {heads} at width {width}; need a divisor of the width")
        COUNT.check("layers_per_block", self.layers_per_block)
        for name in ("in_channels", "out_channels", "num_time_ids"):
            MANY.check(name, getattr(self, name))
        if self.cross_attention_dim != 0 or self.vcut is False:  # 0 in a folded UNet
            WIDTH.check("cross_attention_dim", self.cross_attention_dim)
        if WIDTH.check("addition_time_embed_dim", self.addition_time_embed_dim) % 2:
            raise ValueError(f"addition_time_embed_dim is {self.addition_time_embed_dim}; need an even number")

    @property
    def stride(self) -> int:
        """Latent cells per cell of the innermost level: latent sides must be multiples of it."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class VAEConfig:
    """The image encoder and temporal decoder, 97,742,847 parameters as released (`vae/config.json`). Raises ValueError
    for a field that no such VAE can have."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    latent_channels: int = 4
    scaling_factor: float = 0.18215  # makes the latents that are denoised of unit variance; the image's stays unscaled

    def __post_init__(self) -> None:
        check_widths(self.block_out_channels)
        MANY.check("latent_channels", self.latent_channels)
        Setting(False, 1e-3, 1e3).check("scaling_factor", self.scaling_factor)

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class ClipConfig:
    """The CLIP vision tower, ViT-H/14 as released (`image_encoder/config.json`). Lengths in pixels: `image_size` and
    `patch_size`. `mean` and `std` are those CLIP was trained with. Raises ValueError for a field that no such tower can
    have."""

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
        for name in ("hidden_size", "intermediate_size", "projection_dim", "image_size", "patch_size"):
            WIDTH.check(name, getattr(self, name))
        for name in ("num_hidden_layers", "num_attention_heads"):
            MANY.check(name, getattr(self, name))
        Setting(False, -10, 10, ("red", "green", "blue")).check("mean", self.mean)
        Setting(False, 1e-3, 10, ("red", "green", "blue")).check("std", self.std)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"num_attention_heads is {self.num_attention_heads}; need a divisor of {self.hidden_size}")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size is {self.patch_size}; need a divisor of image_size {self.image_size}")
        if self.hidden_act not in ("gelu", "quick_gelu"):
            raise ValueError(f"hidden_act is {self.hidden_act!r}; need 'gelu' or 'quick_gelu'")


@dataclass(frozen=True)
class GenerationConfig:
    """What a call leaves to the model: frames, steps, guidance (min, max), size (width, height) in pixels, and how many
    frames the decoder has in work at a time. A folder may state its own in `generation_config.json`, with these field
    names. Raises ValueError as `check` does."""

    num_frames: int = 14
    steps: int = 25
    guidance: tuple[float, float] = (1.0, 2.5)  # as svd's authors sample; arXiv 2407.19205 has (1.0, 3.0) for all
    size: tuple[int, int] = (1024, 576)
    decode_chunk: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, check(name, value))


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
