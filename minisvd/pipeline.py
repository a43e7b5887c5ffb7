"""Image in, video out: encode the image, walk the noise levels, decode the frames.

Axes: b batch, t frames, c channels, h w latent grid, H W pixels.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, overload

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import BROKEN, checked_device, checked_dtype, finite, locate, resolve
from .clip import ImageEncoder
from .config import SETTINGS, Fit, GenerationConfig, Schedule, Stage2, Vcut, check, shown
from .images import ImageLike, load_image
from .memory import ECONOMIES, Economy, sliced
from .sampler import SIGMAS, GuidanceSchedule, euler_steps, guided_denoiser, initial_latents
from .save import save_folder
from .unet import SpatioTemporalUNet
from .vae import AutoencoderKLTemporalDecoder, VideoResBlock
from .video import Video

if TYPE_CHECKING:
    from typing_extensions import Unpack

HOST, logger = torch.device("cpu"), logging.getLogger(__name__)
FAMILIAR = 10.5  # decibels of `familiarity`: 200 scenes of the small model's kind have 12.7 and up, 26 photos up to 8.8


class Settings(TypedDict, total=False):
    """The keywords of a call, for editors: those of `StableVideoDiffusion.__call__`, which explains them."""

    num_frames: int | None
    steps: int | None
    fps: float | Sequence[float]
    motion_bucket: float | Sequence[float]
    noise_aug: float | Sequence[float]
    guidance: tuple[float, float] | None
    cut_step: int | None
    stage2: Stage2
    guidance_interval: tuple[float, float] | None
    schedule: Schedule
    sigmas: Tensor | Sequence[float] | None
    seed: int | Sequence[int]
    noise: Tensor | np.ndarray | None
    aug_noise: Tensor | np.ndarray | None
    size: tuple[int, int] | None
    fit: Fit
    decode_chunk: int | None
    callback: Callable[[int, Tensor, Tensor, Tensor], object] | None
    progress: bool


PER_IMAGE = ("fps", "motion_bucket", "noise_aug", "seed")  # settings that may have one value for each image
OPTIONAL = ("num_frames", "steps", "guidance", "size", "decode_chunk", "cut_step", "guidance_interval", "sigmas")


def check_settings(**settings: Any) -> dict[str, Any]:
    """`settings` in plain form, those of `PER_IMAGE` as lists, an `OPTIONAL` None as it is. Raises ValueError, with the
    value and the remedy, for one that no model can run with.

    Needs no model, so that it can come before loading one. Warns above motion bucket 255, where training ended.
    """
    checked = {}
    for name, value in settings.items():
        checker = SETTINGS[name].check_each if name in PER_IMAGE else checked_sigmas if name == "sigmas" else check
        checked[name] = None if value is None and name in OPTIONAL else checker(name, value)
    for value in checked.get("motion_bucket", ()):
        if value > 255:
            warnings.warn(f"motion_bucket is {value:g}; models were trained on 0 to 255", stacklevel=3)
    return checked


@contextmanager
def float32_by_default() -> Iterator[None]:
    """The networks' constants go by torch's default dtype: keep them, and with them the video, what they are."""
    default = torch.get_default_dtype()
    if default == torch.float32:
        yield  # and another thread's default is left alone
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


class StableVideoDiffusion:
    """A loaded model: `svd(image) -> Video`. Its parts `unet`, `vae` and `clip` can be used alone.

    `source` and `layout` say where the weights came from; `generation` holds what a call leaves out.
    """

    economy, works_on, doing = ECONOMIES[0], None, "denoising"  # changed by `economise` and `compile`

    def __init__(
        self, unet: SpatioTemporalUNet, vae: AutoencoderKLTemporalDecoder, clip: ImageEncoder,
        generation: GenerationConfig, source: str = "", layout: str = "",
    ) -> None:  # fmt: skip
        self.unet, self.vae, self.clip = unet, vae, clip
        self.generation, self.source, self.layout = generation, source, layout

    @overload
    def __call__(self, image: Image.Image | str | Path | np.ndarray, **settings: Unpack[Settings]) -> Video: ...
    @overload
    def __call__(self, image: list[Any], **settings: Unpack[Settings]) -> list[Video]: ...
    @overload
    def __call__(self, image: Tensor, **settings: Unpack[Settings]) -> Any: ...

    @torch.no_grad()
    def __call__(
        self,
        image: ImageLike | list[Any],
        *,
        num_frames: int | None = None,
        steps: int | None = None,
        fps: float | Sequence[float] = 7,
        motion_bucket: float | Sequence[float] = 127,
        noise_aug: float | Sequence[float] = 0.02,
        guidance: tuple[float, float] | None = None,
        cut_step: int | None = None,
        stage2: Stage2 = "mean",
        guidance_interval: tuple[float, float] | None = None,
        schedule: Schedule = "karras",
        sigmas: Tensor | Sequence[float] | None = None,
        seed: int | Sequence[int] = 0,
        noise: Tensor | np.ndarray | None = None,
        aug_noise: Tensor | np.ndarray | None = None,
        size: tuple[int, int] | None = None,
        fit: Fit = "crop",
        decode_chunk: int | None = None,
        callback: Callable[[int, Tensor, Tensor, Tensor], object] | None = None,
        progress: bool = True,
    ) -> Video | list[Video]:
        """A video of `num_frames` frames that starts from the image.

        image          PIL image, path, array, or float tensor [3,H,W] in [-1,1]: one Video.
                       Tensor [b,3,H,W]: a list of b, sampled as one batch, which are what each is alone to rounding.
                       List: a list, sampled one after another, which are so in every bit.
        fps            frames a second of the result; the model is told fps - 1
        motion_bucket  0 (still) to 255 (fast)
        noise_aug      standard deviation of the noise added to the image in [-1,1] before the VAE; CLIP sees it clean
        guidance       (scale of the first frame, of the last), linear between; (1, 1) is none
        cut_step       guided while step < cut_step, one branch from there on; None: guided throughout
        stage2         what that branch is told of the image: "mean" (half the embedding), "cond" or "uncond"
        guidance_interval  (low, high): guided only at noise levels low < sigma <= high; one branch elsewhere
        schedule       of the noise levels: "karras" (`edm_sigmas`) or "ays" (`ays_sigmas`, made for 10 steps)
        sigmas         noise levels [steps+1] that fall to 0, instead of such a schedule
        seed           of the two draws below, made on the CPU, the same on every device; each row of a batch draws
                       from its own generator, so that it is what it would be alone
        noise          [b,t,4,h,w], unit variance, and aug_noise [b,3,H,W]: instead of the seeded draws
        size           (width, height) in pixels; `fit` is how an image of another shape gets there: crop, pad, stretch
        decode_chunk   frames in the decoder at a time: memory, not result
        callback       (step from 1, sigma reached, latents [b,t,4,h,w] there, denoised: the estimate D they came by)
        progress       bars over steps and decoding, on stderr

        `fps`, `motion_bucket`, `noise_aug` and `seed` may be one value or one for each image. What is None comes from
        `self.generation`. Raises ValueError or FileNotFoundError for any input that cannot work, before any long work.
        """
        given = check_settings(
            num_frames=num_frames, steps=steps, fps=fps, motion_bucket=motion_bucket, noise_aug=noise_aug,
            guidance=guidance, guidance_interval=guidance_interval, cut_step=cut_step, stage2=stage2,
            schedule=schedule, sigmas=sigmas, seed=seed, size=size, fit=fit, decode_chunk=decode_chunk,
        )  # fmt: skip
        chosen = vars(self.generation) | {name: value for name, value in given.items() if value is not None}
        width, height = chosen["size"]
        self.check_size((width, height))
        self.check_parts()
        levels_of = SIGMAS[given["schedule"]]
        noise_levels: Tensor = levels_of(chosen["steps"]) if given["sigmas"] is None else given["sigmas"]
        if callback is not None and not callable(callback):
            raise ValueError(f"callback is {shown(callback)}; need a function of step, sigma, latents and denoised")
        if isinstance(image, list) and not image:
            raise ValueError("the list of images is empty; need at least one")
        batches = [load_image(one, (width, height), fit) for one in (image if isinstance(image, list) else [image])]
        pixels = torch.cat(batches)

        b, factor = len(pixels), self.vae.config.factor
        each_fps, buckets, levels, seeds = (per_row(name, chosen[name], b) for name in PER_IMAGE)
        ids = torch.tensor([each_fps, buckets, levels], dtype=torch.float32, device="cpu").T
        added_time_ids = ids - torch.tensor([1, 0, 0], device="cpu")  # the network was trained on fps - 1
        generators = [torch.Generator("cpu").manual_seed(one) for one in seeds]
        aug_noise = drawn("aug_noise", aug_noise, (3, height, width), generators)
        shape = (chosen["num_frames"], self.unet.config.out_channels, height // factor, width // factor)
        noise = drawn("noise", noise, shape, generators)

        stop, start = given["guidance_interval"] or (0.0, math.inf)
        staged: dict[str, Any] = {name: given[name] for name in ("cut_step", "stage2")} | {"start": start, "stop": stop}
        guide, videos = GuidanceSchedule(*chosen["guidance"], **staged), []
        for rows in torch.arange(b, device="cpu").split([len(batch) for batch in batches]):
            inputs = [tensor[rows].to(self.device) for tensor in (pixels, added_time_ids, aug_noise, noise)]
            latents = self.sample(*inputs, sigmas=noise_levels, schedule=guide, callback=callback, progress=progress)
            blocks = sum(isinstance(module, VideoResBlock) for module in self.vae.modules())
            bar = tqdm(total=blocks, desc="decoding ", unit="block", disable=not progress)
            decoding = latents, chosen["decode_chunk"], self.economy.hold
            with bar, visit(self.vae, latents.device):
                frames = self.vae.decode(*decoding, bar.update)
                if not finite(frames):
                    if broken := self.broken():
                        raise ValueError(f"the frames are no finite numbers: {broken}")
                    left = f"decoding left the range of {frames.dtype} and is done again in float32"
                    warnings.warn(left, stacklevel=3)
                    frames = copy.deepcopy(self.vae).float().decode(*decoding)
            frames = ((frames.to(HOST).float() + 1) / 2).clamp(0, 1)
            videos += [Video(frames[i], fps=each_fps[row]) for i, row in enumerate(rows)]
        return videos if isinstance(image, list) or (isinstance(image, Tensor) and image.ndim == 4) else videos[0]

    @float32_by_default()
    def sample(
        self,
        pixels: Tensor,
        added_time_ids: Tensor,
        aug_noise: Tensor,
        noise: Tensor,
        *,
        sigmas: Tensor,
        schedule: GuidanceSchedule,
        callback: Callable[[int, Tensor, Tensor, Tensor], object] | None,
        progress: bool,
    ) -> Tensor:
        """One batch of images [b,3,H,W] -> latents [b,t,4,h,w], with a bar over the steps."""
        with visit(self.clip, noise.device):
            embeds = self.clip(pixels)
        with visit(self.vae, noise.device):
            latent = self.vae.encode(pixels + added_time_ids[:, 2, None, None, None] * aug_noise)
        unet = sliced(self.unet, self.economy.slices)
        network = RowByRow(unet) if self.economy.in_turn else unet
        denoise = guided_denoiser(network, embeds, latent, added_time_ids, schedule)
        latents = initial_latents(noise, sigmas)
        steps = euler_steps(denoise, latents, sigmas.to(noise.device, torch.float32))
        with visit(self.unet, noise.device):
            for step in tqdm(steps, total=len(sigmas) - 1, desc=self.doing, unit="step", disable=not progress):
                latents = step.latents
                if not finite(latents):
                    remedy = "run in float32 or bfloat16" if embeds.dtype == torch.half else "check guidance and sigmas"
                    where = f"step {step.number} of {len(sigmas) - 1}, at sigma {step.sigma:g}"
                    raise ValueError(f"the latents are no finite numbers after {where}: {self.broken() or remedy}")
                if callback is not None:
                    callback(*step)
        return latents

    def economise(self, economy: Economy, device: torch.device | None = None) -> StableVideoDiffusion:
        """Take less memory from now on, working on `device`, by default the present one. Returns the model, changed."""
        device = device or self.device
        for part in (self.unet, self.vae, self.clip):
            part.to(HOST if economy.visiting else device)
        self.economy, self.works_on = economy, device if economy.visiting else None
        return self

    def compile(self, **how: Any) -> StableVideoDiffusion:
        """torch.compile(..., **how) the UNet, in one graph for guided steps and one for single ones, each made in the
        first that needs it. Returns the model, changed. Raises ValueError where no compiler works."""
        try:
            torch.compile(torch.neg, **how)(torch.zeros(8, device=self.device))
        except Exception as error:  # each backend has its own
            need = "install a C++ compiler, and Triton for cuda, or do not compile"
            raise ValueError(f"torch.compile does not work on {self.device}: {need}") from error
        for shaped in (rearrange, repeat):
            torch.compiler.allow_in_graph(shaped)  # as einops once did: tracing what it does takes most of the wait
        self.unet.compile(**how)
        self.doing = "denoising, first step of a kind compiles"
        return self

    def broken(self) -> str:
        """The first weight that is no finite number, and what to do about it; else nothing."""
        for part in ("unet", "vae", "clip"):
            for name, weight in getattr(self, part).named_parameters():
                if not finite(weight):
                    return f"{part}.{name} {BROKEN}"
        return ""

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a new folder of the published layout, whole or not at all, the weights in `dtype` or as they are.

        `load` reads it in any build; diffusers if the UNet is built with vcut=False. Raises FileExistsError.
        """
        save_folder(folder, self.unet, self.vae, self.clip, self.generation, dtype)

    @property
    def ships(self) -> bool:
        """Is this the small model that comes with the package, whatever name it was loaded by?"""
        path = locate(self.source) if self.source else None
        return path is not None and path.samefile(locate("tiny") or path)

    @torch.inference_mode()
    def familiarity(self, image: Tensor) -> float:
        """10 log10(var(x) / mean (x - y)^2) in dB, with y = decode(encode(x)): how well the VAE says what x shows.

        image [1,3,H,W] in [-1,1]. A picture of another kind than the training's comes back as a blur.
        """
        x = image.to(self.device)
        with visit(self.vae, self.device):
            y = self.vae.decode(self.vae.config.scaling_factor * self.vae.encode(x)[:, None])[:, 0]
        error, spread = (x - y.float()).square().mean(), (x - x.mean((2, 3), keepdim=True)).square().mean()
        return (10 * torch.log10(spread.clamp(min=1e-6) / error)).item()

    @property
    def device(self) -> torch.device:
        """Where the parts work: where the weights are, unless they only visit there."""
        return self.works_on or self.vae.quant_conv.weight.device

    def check_parts(self) -> None:
        """Raise ValueError unless the parts are on one device and in one dtype."""
        parts = {name: next(getattr(self, name).parameters()) for name in ("unet", "vae", "clip")}
        if len({(weight.device, weight.dtype) for weight in parts.values()}) > 1:
            where = ", ".join(f"{name} {weight.dtype} on {weight.device}" for name, weight in parts.items())
            raise ValueError(f"the parts differ, {where}: move all three, or load with the device and dtype wanted")

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ValueError unless both sides of (width, height) are multiples of the model's total stride."""
        stride = self.vae.config.factor * self.unet.config.stride
        if any(side % stride for side in size):
            near = tuple(max(stride, round(side / stride) * stride) for side in size)
            raise ValueError(f"size is {size[0]}x{size[1]}; need multiples of {stride}, such as {near[0]}x{near[1]}")


class RowByRow:
    """A UNet that runs on one row of the batch after the other, and so on one branch of a guided step at a time."""

    def __init__(self, unet: SpatioTemporalUNet) -> None:
        self.unet = unet

    def condition(self, image_embeds: Tensor) -> list[Any]:
        return [self.unet.condition(row) for row in image_embeds.split(1)]

    def __call__(
        self, sample: Tensor, c_noise: Tensor, image_embeds: Tensor, added_time_ids: Tensor, conditions: Any
    ) -> Tensor:
        rows = zip(*(each.split(1) for each in (sample, image_embeds, added_time_ids)), conditions, strict=True)
        return torch.cat([self.unet(row, c_noise, *others) for row, *others in rows])


@contextmanager
def visit(part: nn.Module, device: torch.device) -> Iterator[None]:
    """A part's weights are on the device meanwhile: as copies, if they are elsewhere."""
    tables: list[Any] = [table for module in part.modules() for table in (module._parameters, module._buffers)]
    home = [dict(table) for table in tables]
    try:
        for table in tables:
            table.update({name: x if x is None else x.to(device) for name, x in table.items()})
        yield
    finally:
        for table, weights in zip(tables, home, strict=True):
            table.update(weights)


def per_row(name: str, values: list[Any], b: int) -> list[Any]:
    """One value for each of b rows."""
    if len(values) not in (1, b):
        raise ValueError(f"{name} has {len(values)} values for a batch of {b}; need one, or one for each")
    return values * (b // len(values)) if len(values) == 1 else values


def float32(name: str, value: Any) -> Tensor:
    """Numbers in a list, an array or a tensor, as a float32 tensor. Raises ValueError for anything else."""
    try:
        return torch.as_tensor(value, dtype=torch.float32, device=getattr(value, "device", "cpu"))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is {shown(value)}; need a tensor or an array of numbers") from error


def drawn(name: str, given: Any, shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    """Unit noise of one `shape` a row, in float32: as given, else drawn row by row."""
    if given is None:
        draw = partial(torch.randn, shape, dtype=torch.float32, device="cpu")
        return torch.stack([draw(generator=generator) for generator in generators])
    given = float32(name, given)
    if given.shape != (len(generators), *shape):
        raise ValueError(f"{name} has shape {tuple(given.shape)}; need {(len(generators), *shape)}")
    if not given.isfinite().all():
        raise ValueError(f"{name} has values that are infinite or not numbers; draw it again")
    return given


def checked_sigmas(_name: str, sigmas: Any) -> Tensor:
    """Noise levels that fall strictly, from a finite one to 0."""
    sigmas = float32("sigmas", sigmas)
    if sigmas.ndim != 1 or len(sigmas) < 2 or sigmas[-1] != 0 or not (sigmas.diff() < 0).all() or sigmas[0].isinf():
        levels = shown(sigmas.tolist())
        raise ValueError(f"sigmas are {levels}; need at least two finite levels that fall strictly to 0")
    return sigmas


def load(
    source: str | Path = "tiny", *, device: str | torch.device = "cpu", dtype: torch.dtype | str = torch.float32,
    vcut: Vcut | None = None, variant: str | None = None, revision: str | None = None,
    offline: bool = False, copy: bool = False, low_memory: bool = False,
) -> StableVideoDiffusion:  # fmt: skip
    """Load a whole model: `tiny`, `svd`, `svd-xt`, `svd-xt-1-1`, a folder, a `.safetensors` file or a hub id.

    `dtype` "auto" is the fast half precision of the device, if it has one (`checkpoint.checked_dtype`).
    `vcut` is the UNet's build (see `SpatioTemporalUNet`): False as released, "lossless" the same function with each
    cross-attention folded, True the paper's; None what the source holds. `variant` ("fp16") chooses among a folder's
    files, `revision` among a hub repository's commits; `offline` uses only what was downloaded before. Weights that
    need no conversion are the file's pages, mapped; `copy` reads them, for a file that may change (`Checkpoint.load`).
    `low_memory` takes the least on the device, for the same video to rounding: weights are there only while they work.
    Raises ValueError or FileNotFoundError with one sentence on what to do.
    """
    device = checked_device(device)  # before anything is downloaded
    dtype = checked_dtype(dtype, device)
    checkpoint = resolve(source, variant=variant, revision=revision, offline=offline)
    parts = checkpoint.load(device=HOST if low_memory else device, dtype=dtype, vcut=vcut, copy=copy)
    logger.info("loaded %s, a %s, on %s in %s", checkpoint.path, checkpoint.layout, device, dtype)
    svd = StableVideoDiffusion(**parts, generation=checkpoint.generation, source=str(source), layout=checkpoint.layout)
    return svd.economise(ECONOMIES[-bool(low_memory)], device)
