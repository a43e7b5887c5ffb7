"""A sentence in, a video out: the text encoder, Stable Diffusion 2.1's folder layout, a run of the network of etc.py.

The loading is tested on random numbers under the published names and shapes; official weights were not at hand.
Axes: b batch, t frames, k tokens of a caption, c channels, h w latent grid.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import Checkpoint, locate, on_meta, read_header, resolve
from .config import GenerationConfig, Setting, UNetConfig, Vcut, check, shown
from .etc import FPSEmbedding, SpatialUNet, ddim_sigmas, text_denoiser
from .folder import as_config, parsed, read_json, unet_config
from .layouts import FOLDER
from .sampler import sample_euler
from .video import Video


@dataclass(frozen=True)
class TextConfig:
    """CLIP's text tower, 340,387,840 parameters as Stable Diffusion 2.1 has it: ViT-H/14's, less its last block
    (`text_encoder/config.json`)."""

    hidden_size: int = 1024
    num_hidden_layers: int = 23
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    max_position_embeddings: int = 77
    vocab_size: int = 49408
    hidden_act: str = "gelu"


class TextEncoder(nn.Module):
    """Ids [b,k] -> [b,k,hidden_size]: ln_final of what leaves the last block, each token hearing those before it, pads
    included. The last block here is the last but one of CLIP. `text` is `open_clip.transformer.TextTransformer`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        from open_clip.transformer import QuickGELU, TextTransformer  # slow to import: only who encodes pays

        self.config = config
        self.text = TextTransformer(
            config.max_position_embeddings, config.vocab_size, config.hidden_size, config.num_attention_heads,
            config.num_hidden_layers, config.intermediate_size / config.hidden_size, output_dim=None,
            act_layer={"gelu": nn.GELU, "quick_gelu": QuickGELU}[config.hidden_act],
        )  # fmt: skip
        self.text.attn_mask = None

    def forward(self, ids: Tensor) -> Tensor:
        x = self.text.token_embedding(ids) + self.text.positional_embedding
        mask = x.new_full(ids.shape[1:] * 2, -torch.inf).triu(1)
        return self.text.ln_final(self.text.transformer(x, attn_mask=mask))


SCHEDULER = {"prediction_type": "v_prediction", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}
SCHEDULER |= {"beta_start": 0.00085, "beta_end": 0.012}
NETWORK = {"_class_name": "UNet2DConditionModel", "use_linear_projection": True, "act_fn": "silu"}
NETWORK |= {"flip_sin_to_cos": True, "center_input_sample": False}
OURS = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "cross_attention_dim")
BLOCKS = ("down_block_types", "up_block_types")


def demand(stated: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Raise ValueError naming the first field that differs."""
    for name, value in fixed.items():
        if stated.get(name) != value:
            raise ValueError(f"{name} is {shown(stated.get(name))}; need {value!r}")


def sd_unet_config(stated: dict[str, Any]) -> UNetConfig:
    """Of a UNet2DConditionModel, whose `attention_head_dim` counts heads."""
    demand(stated, NETWORK)
    kinds = {name: [str(kind).replace("2D", "SpatioTemporal") for kind in stated[name]] for name in BLOCKS}
    numbers = {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 256}
    heads = {"num_attention_heads": stated["attention_head_dim"]}
    return unet_config({name: stated[name] for name in OURS} | kinds | numbers | heads)


def text_config(stated: dict[str, Any]) -> TextConfig:
    demand(stated, {"model_type": "clip_text_model"})
    aside = ("model_type", "projection_dim", "bos_token_id", "eos_token_id", "pad_token_id")
    return as_config(TextConfig, {name: value for name, value in stated.items() if name not in aside}, "clip")


class SDCheckpoint(Checkpoint):
    """A UNet, and as "clip" a text encoder. The UNet's file may lack all of `fps_embedding`."""

    def build(self, part: str, vcut: Vcut | None = None) -> nn.Module:  # noqa: ARG002
        module = on_meta({"unet": SpatialUNet, "clip": TextEncoder}[part], self.configs[part])
        if part == "unet" and not any(name.startswith("fps_embedding.") for name in self.headers[part]):
            del module.fps_embedding
        return module


def load_sd(folder: str | Path, **how: Any) -> tuple[SpatialUNet, TextEncoder]:
    """The two networks of a folder of Stable Diffusion 2.1's layout, strictly: every name and shape fits. Without a
    trained `fps_embedding` the UNet has one that changes nothing. `how` is as for `Checkpoint.load`.

    Raises ValueError for another network (Stable Diffusion 1 projects by convolutions), noise schedule or prediction
    (epsilon), and as `Checkpoint.load` does; FileNotFoundError for a file that is not there.
    """
    path = Path(folder).expanduser()
    files = {"unet": path / "unet/diffusion_pytorch_model.safetensors", "clip": path / "text_encoder/model.safetensors"}
    configs = {"unet": path / "unet/config.json", "clip": path / "text_encoder/config.json"}
    scheduler = path / "scheduler/scheduler_config.json"
    if missing := [file for file in (*configs.values(), scheduler, *files.values()) if not file.is_file()]:
        raise FileNotFoundError(f"there is no {missing[0]}: give a folder of Stable Diffusion 2.1's layout")
    parsed(scheduler, lambda stated: demand(stated, SCHEDULER))
    both = {"unet": parsed(configs["unet"], sd_unet_config), "clip": parsed(configs["clip"], text_config)}
    headers = {part: read_header(file) for part, file in files.items()}
    parts = SDCheckpoint(FOLDER, path, files, headers, both, GenerationConfig()).load(**how)
    unet: SpatialUNet = parts["unet"]
    if not hasattr(unet, "fps_embedding"):
        unet.fps_embedding = FPSEmbedding(4 * unet.config.block_out_channels[0]).to(unet.conv_in.weight).eval()
    return unet, parts["clip"]


class TextToVideo:
    """A loaded model: `model(caption) -> Video`. Its parts `unet`, `text` and `vae` can be used alone; `words` are what
    a caption may be made of, whose ids count from 1, then comes an end, then zeros."""

    def __init__(self, folder: str | Path = "tiny-etc", **how: Any) -> None:
        """Of a folder as for `load_sd`, with SVD's `vae/`, `generation_config.json` and `text_encoder/words.json`; by
        default the one beside the weights of tiny. Raises as `load_sd` does."""
        if folder == "tiny-etc" and not (folder := (locate("tiny") or Path()).with_name("tiny-etc")).is_dir():
            raise FileNotFoundError(f"the weights of tiny-etc are not in {folder}: reinstall")
        found = resolve(folder, parts=["vae"])
        self.words: list[str] = read_json(found.path / "text_encoder/words.json")["words"]
        self.unet, self.text = load_sd(found.path, **how)
        self.vae, self.generation = found.load(**how)["vae"], found.generation

    def ids(self, caption: str) -> Tensor:
        """[1,k]. Raises ValueError for a word that is not known, and for too many."""
        said, most = caption.split(), self.text.config.max_position_embeddings - 1
        if (unknown := [word for word in said if word not in self.words]) or len(said) > most:
            what = f"the model does not know {shown(unknown[0])}" if unknown else f"the text has {len(said)} words"
            raise ValueError(f"{what}; need at most {most} of: {' '.join(self.words)}")
        ids = [*(1 + self.words.index(word) for word in said), len(self.words) + 1]
        return torch.tensor([ids + [0] * (most + 1 - len(ids))], device=self.unet.conv_in.weight.device)

    @torch.no_grad()
    def __call__(
        self, caption: str, *, fps: float = 8, num_frames: int | None = None, steps: int | None = None,
        guidance: float | None = None, seed: int = 0,
    ) -> Video:  # fmt: skip
        """A video of what the caption says, played and moving at `fps` frames a second. What is None comes from
        `self.generation`, the guidance's scale from its larger one. Raises ValueError for what cannot be."""
        own, factor = self.generation, self.vae.config.factor
        fps = Setting(False, 1, 60, why=", in frames per second").check("fps", fps)
        t, sigmas = check("num_frames", num_frames or own.num_frames), ddim_sigmas(steps or own.steps)
        keys = self.text(torch.cat([self.ids(caption), self.ids("")]))
        denoise = text_denoiser(self.unet, keys[:1], keys[1:], fps, own.guidance[1] if guidance is None else guidance)
        generator = torch.Generator("cpu").manual_seed(check("seed", seed))
        shape = 1, t, self.unet.config.in_channels, own.size[1] // factor, own.size[0] // factor
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(keys.device)
        with tqdm(total=len(sigmas) - 1, desc="denoising", unit="step", disable=None) as bar:  # on a terminal
            latents = sample_euler(denoise, noise, sigmas, lambda *_: bar.update())
        frames = self.vae.decode(latents / (1 + sigmas[-1].item() ** 2) ** 0.5, own.decode_chunk)[0].float().cpu()
        return Video(((frames + 1) / 2).clamp(0, 1), fps)
