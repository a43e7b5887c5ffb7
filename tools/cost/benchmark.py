"""Is minisvd as fast and as small as diffusers? Both run in turn, in one process, on the same weights and inputs.

The ratios, on a CPU, quickly; the released network, on a quiet one, part by part; its steps compiled; on a GPU:

    python -m tools.cost.benchmark
    python -m tools.cost.benchmark --config full --size 128x64 --video-size 64x64 --video-frames 4 --repeats 3 \\
        --dtype float32 bfloat16 --save runs/benchmark.json
    python -m tools.cost.benchmark --config full --size 128x64 --repeats 3 --part guided --compile
    python -m tools.cost.benchmark --device cuda --config full --size 1024x576 --frames 14 25 --dtype float16 bfloat16

Parts: a guided step (a batch of two) and a single one, encoding, decoding at several chunks, a whole video of --steps
with and without the cut, loading a UNet from a local folder; with --compile the steps as torch.compile makes them, too.
First the outputs are compared (diffusers' residual eps set to the original 1e-5; vcut=True is another function, and a
video draws its own noise), which warms up; then A B B A A B B A ... are timed. A ratio is median(minisvd) / median
(diffusers): below 1, minisvd is faster. Its interval holds the middle 95 % of ratios of medians over resampled rounds.
Rows in another than the first --dtype have a second ratio, to diffusers in the first, which was timed before or after.
A video is warmed up, and its memory measured, in two steps, as all of them take the same; --video-size and
--video-frames make it a smaller one than the rest. What a part finds is written to --save FILE when it ends, and the
same command goes on from there, with the same settings, versions and processor alone.

A GPU is timed by the wall clock; a CPU runs on one thread and is timed in processor time, of which other programs take
less away. "counted" is the peak of live tensors on top of the weights, by their shapes (`tools.cost.memory`);
"measured" what the device's allocator, or the process's resident set on Linux, grew by. TFLOP/s are those of diffusers'
arithmetic, so a build that computes less has more; the share is of the rate of a large matrix product, measured.
Loading is timed by the wall clock in a process of its own, whose memory is that of its own (not of the mapped file).
The last line is one JSON object with everything.
"""

import argparse
import ctypes
import gc
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLTemporalDecoder as DiffusersVAE
from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm, trange
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import minisvd.diffusers
from minisvd import ClipConfig, GenerationConfig, ImageEncoder, StableVideoDiffusion
from minisvd.adapt import fold
from minisvd.config import UNetConfig, VAEConfig
from minisvd.unet import SpatioTemporalUNet
from minisvd.vae import AutoencoderKLTemporalDecoder, Hold
from tools.cost.accounting import unet_cost
from tools.cost.memory import LiveBytes, fused
from tools.cost.resident import resident
from tools.measure.metrics import bootstrap_interval
from tools.output import table, write_json

CONFIGS = {
    "tiny": UNetConfig(block_out_channels=(32, 64, 64, 64), num_attention_heads=(1, 2, 2, 2), cross_attention_dim=64),
    "small": UNetConfig(block_out_channels=(64, 128, 256, 256), num_attention_heads=(2, 4, 8, 8)),
    "full": UNetConfig(),
}
VAE_WIDTHS = {"tiny": (32, 32, 64, 64), "small": (64, 128, 256, 256), "full": VAEConfig().block_out_channels}
CLIP = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "patch_size": 56}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}  # relative to the largest output
PARTS = ("guided", "single", "encode", "decode", "video", "load")
LOADERS = {
    "diffusers": "from diffusers import UNetSpatioTemporalConditionModel as U; load = U.from_pretrained",
    "minisvd": "from minisvd import load_unet as load",
}
LOADING = """
import time, torch
{loader}
from tools.cost.resident import own_memory
before, began = own_memory(), time.perf_counter()
unet = load({folder!r})
print(time.perf_counter() - began, own_memory() - before)
"""

Forwards = dict[str, Callable[..., Tensor]]  # those of videos may be given a number of steps


@dataclass(frozen=True)
class Setting:
    """What is the same for all that is compared: where, in what numbers, and how much of it."""

    device: str
    dtype: torch.dtype
    config: str
    frames: int
    size: tuple[int, int]
    steps: int = 25
    cut_step: int = 17
    compile: bool = False

    @property
    def latent(self) -> tuple[int, int]:
        return self.size[0] // 8, self.size[1] // 8


# --- what is compared ---------------------------------------------------------------------------------------------


def both_unets(setting: Setting) -> tuple[SpatioTemporalUNet, UNetSpatioTemporalConditionModel]:
    """minisvd's and diffusers' UNet around one copy of random weights."""
    config = CONFIGS[setting.config]
    torch.manual_seed(0)
    with torch.device(setting.device):
        theirs = UNetSpatioTemporalConditionModel(
            block_out_channels=config.block_out_channels,
            num_attention_heads=config.num_attention_heads,
            cross_attention_dim=config.cross_attention_dim,
        )
    nn.Module.to(theirs, setting.device, setting.dtype).eval()  # diffusers' own `to` warns of nothing
    for module in theirs.modules():
        if isinstance(module, ResnetBlock2D | TemporalResnetBlock):
            module.norm1.eps = module.norm2.eps = 1e-5
    return adopted(SpatioTemporalUNet, config, theirs), theirs


def both_vaes(setting: Setting) -> tuple[AutoencoderKLTemporalDecoder, DiffusersVAE]:
    """The same for the VAE."""
    widths = VAE_WIDTHS[setting.config]
    torch.manual_seed(0)
    kinds: Any = ("DownEncoderBlock2D",) * len(widths)
    with torch.device(setting.device):
        theirs = DiffusersVAE(block_out_channels=widths, down_block_types=kinds, layers_per_block=2)
    nn.Module.to(theirs, setting.device, setting.dtype).eval()
    return adopted(AutoencoderKLTemporalDecoder, VAEConfig(block_out_channels=widths), theirs), theirs


def adopted(kind: Any, config: Any, theirs: nn.Module) -> Any:
    """A module of ours on the weights of theirs."""
    with torch.device("meta"):
        ours = kind(config)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours.eval()


def example_inputs(setting: Setting, branches: int) -> tuple[Tensor, ...]:
    """sample [b,t,8,h,w], c_noise [b], image_embeds [b,1,c'], added_time_ids [b,3]."""
    config, generator, (w, h) = CONFIGS[setting.config], torch.Generator().manual_seed(1), setting.latent
    sample = torch.randn(branches, setting.frames, config.in_channels, h, w, generator=generator)
    embeds = torch.randn(branches, 1, config.cross_attention_dim, generator=generator)
    ids, c_noise = torch.tensor([[6.0, 127.0, 0.02]]).expand(branches, -1), torch.full((branches,), 0.5)
    return tuple(x.to(setting.device, setting.dtype) for x in (sample, c_noise, embeds, ids))


def step_forwards(setting: Setting, branches: int) -> Forwards:
    """diffusers' UNet on one input, ours in each build with its conditions computed once, as in a run, our drop-in, and
    with `compile` theirs and ours compiled."""
    ours, theirs = both_unets(setting)
    inputs = example_inputs(setting, branches)
    with torch.device("meta"):
        dropped_in: Any = minisvd.diffusers.UNetSpatioTemporalConditionModel.from_config(theirs.config)
    builds: dict[str, Any] = {
        "minisvd": ours,
        "minisvd, lossless": fold(ours, "lossless"),
        "minisvd, True": fold(ours, True),
    }
    dropped_in.adopt(builds["minisvd, lossless"])
    if setting.compile:
        builds["minisvd, lossless, compiled"] = torch.compile(builds["minisvd, lossless"])

    def step(unet: Any) -> Callable[[], Tensor]:
        conditions = unet.condition(inputs[2])
        return lambda: unet(*inputs, conditions)

    def theirs_step(unet: Any) -> Callable[[], Tensor]:
        return lambda: unet(*inputs, return_dict=False)[0]

    forwards = {"diffusers": theirs_step(theirs)} | {name: step(unet) for name, unet in builds.items()}
    forwards["minisvd.diffusers, lossless"] = theirs_step(dropped_in)  # as their pipeline calls it
    return forwards | ({"diffusers, compiled": theirs_step(torch.compile(theirs))} if setting.compile else {})


def encode_forwards(setting: Setting) -> Forwards:
    """The mode of one image's latent, on both sides in float32, as both pipelines compute it."""
    ours, theirs = both_vaes(replace(setting, dtype=torch.float32))
    (width, height), generator = setting.size, torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, height, width, generator=generator).to(setting.device) * 2 - 1
    return {"diffusers": lambda: theirs.encode(image).latent_dist.mode(), "minisvd": lambda: ours.encode(image)}  # pyright: ignore


def decode_forwards(setting: Setting) -> Forwards:
    """diffusers' decoding of all frames at once, and ours at several settings, the default first."""
    ours, theirs = both_vaes(setting)
    (w, h), generator = setting.latent, torch.Generator().manual_seed(1)
    latents = torch.randn(1, setting.frames, 4, h, w, generator=generator).to(setting.device, setting.dtype)

    def decode(chunk: int, hold: Hold) -> Callable[[], Tensor]:
        return lambda: ours.decode(latents, chunk, hold)[0]

    default, z = GenerationConfig.decode_chunk, latents[0] / ours.config.scaling_factor
    settings: list[tuple[int, Any]] = [(chunk, "two") for chunk in dict.fromkeys((default, 1, 8, setting.frames))]
    settings += [(default, "one"), (1, "host")]
    forwards = {"diffusers": lambda: theirs.decode(z, setting.frames, return_dict=False)[0]}
    return forwards | {f"minisvd, chunk {chunk}, hold {hold}": decode(chunk, hold) for chunk, hold in settings}


def video_forwards(setting: Setting) -> Forwards:
    """Whole calls, image to frames, from the same UNet and VAE, the folded builds with the cut and one without it; the
    image encoders are as large as each other."""
    (our_unet, their_unet), (our_vae, their_vae) = both_unets(setting), both_vaes(setting)
    width, height = setting.size
    sizes: dict[str, Any] = {} if setting.config == "full" else CLIP
    clip = ClipConfig(**sizes, projection_dim=CONFIGS[setting.config].cross_attention_dim)
    named = {"image_size", "hidden_act", *CLIP, "projection_dim"}
    with torch.device(setting.device):
        encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**{name: getattr(clip, name) for name in named}))
        our_clip = ImageEncoder(clip).to(setting.dtype).eval()
    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0,
        timestep_type="continuous", timestep_spacing="leading", interpolation_type="linear",
    )  # fmt: skip
    nn.Module.to(encoder, setting.dtype).eval()
    processor: Any = CLIPImageProcessor()
    pipeline = StableVideoDiffusionPipeline(their_vae, encoder, their_unet, scheduler, processor)
    pipeline.set_progress_bar_config(disable=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    shape: dict[str, Any] = {
        "num_frames": setting.frames,
        "decode_chunk_size": setting.frames,
        "width": width,
        "height": height,
    }

    def theirs(steps: int = setting.steps) -> Tensor:
        made: Any = pipeline(picture, **shape, num_inference_steps=steps, output_type="pt")
        return made.frames

    def ours(unet: SpatioTemporalUNet, cut_step: int | None) -> Callable[..., Tensor]:
        svd = StableVideoDiffusion(
            unet, our_vae, our_clip, GenerationConfig(num_frames=setting.frames, size=setting.size)
        )
        call: dict[str, Any] = {"guidance": (1.0, 3.0), "cut_step": cut_step, "progress": False}
        return lambda steps=setting.steps: svd(picture, steps=steps, **call).frames

    cut, builds = setting.cut_step, {"lossless": fold(our_unet, "lossless"), "True": fold(our_unet, True)}
    forwards: Forwards = {"diffusers": theirs, "minisvd, lossless": ours(builds["lossless"], None)}
    return forwards | {f"minisvd, {name}, cut at {cut}": ours(unet, cut) for name, unet in builds.items()}


def forwards_of(part: str, setting: Setting) -> Forwards:
    """Of a part, by name; diffusers' first."""
    if part in ("guided", "single"):
        return step_forwards(setting, 2 if part == "guided" else 1)
    return {"encode": encode_forwards, "decode": decode_forwards, "video": video_forwards}[part](setting)


# --- how it is measured -------------------------------------------------------------------------------------------


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over largest magnitude."""
    return ((ours - theirs).float().abs().max() / theirs.float().abs().max()).item()


def seconds(forward: Callable[[], Tensor], device: str) -> float:
    """How long one forward takes: wall clock on a GPU, processor time on a CPU."""
    if not device.startswith("cuda"):
        start = time.process_time()
        forward()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    forward()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def rounds(forwards: Sequence[Callable[[], Tensor]], repeats: int, device: str) -> np.ndarray:
    """Seconds [repeats, forwards]: each forward once a round, in the opposite order every other round."""
    times = np.empty((repeats, len(forwards)))
    for i in trange(repeats, desc="rounds", disable=None):
        for j in range(len(forwards))[:: 1 if i % 2 == 0 else -1]:
            times[i, j] = seconds(forwards[j], device)
    return times


def ratio(times: np.ndarray) -> tuple[float, float, float]:
    """Median of the first column over that of the second, and its interval."""
    low, high = bootstrap_interval(times, lambda rows: float(np.divide(*np.median(rows, axis=0))))
    return float(np.divide(*np.median(times, axis=0))), low, high


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large square product: the median of ten, after one that warms up."""
    n = 8192 if device.startswith("cuda") else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    _ = a @ b
    return 2 * n**3 / float(np.median([seconds(lambda: a @ b, device) for _ in range(10)]))


def measured_peak(forward: Callable[[], Tensor], device: str) -> float:
    """Bytes by which memory grew at most while a forward ran."""
    gc.collect()
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        forward()
        return torch.cuda.max_memory_allocated(device) - before
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, or the next forward would not be seen to take it
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    except OSError:
        return float("nan")
    before = resident("VmRSS")
    forward()
    return resident("VmHWM") - before


def counted_peaks(part: str, setting: Setting) -> dict[str, float]:
    """Bytes of live tensors at the most, by shapes, of every forward that shapes alone can run."""
    shapes = replace(setting, device="meta", compile=False)
    original, F.scaled_dot_product_attention = F.scaled_dot_product_attention, fused
    found: dict[str, float] = {}
    try:
        for name, forward in forwards_of(part, shapes).items():
            with LiveBytes() as live:
                forward()
            found[name] = float(live.peak)
    finally:
        F.scaled_dot_product_attention = original
    return found


def compare(part: str, setting: Setting, repeats: int, rate: float) -> list[dict[str, Any]]:
    """A row for each forward of a part. Raises SystemExit if two that are one function differ."""
    forwards, errors = forwards_of(part, setting), {}
    first = {name: partial(forward, min(2, setting.steps)) for name, forward in forwards.items()}
    first = first if part == "video" else forwards
    theirs = first["diffusers"]()
    for name, forward in first.items():
        tqdm.write(f"{part}: {name}{', which compiles, for minutes' if 'compiled' in name else ''}", file=sys.stderr)
        out, same = forward(), part != "video" and not name.startswith("minisvd, True")
        errors[name] = relative_error(out, theirs) if same else None
    allowed = TOLERANCE[setting.dtype]
    if wrong := {name: error for name, error in errors.items() if error is not None and not error <= allowed}:
        raise SystemExit(f"{part}: the outputs differ, relative to the largest: {wrong}; need {allowed}")
    grown = {name: measured_peak(forward, setting.device) for name, forward in first.items()}
    times = rounds([*forwards.values()], repeats, setting.device)
    counted = counted_peaks(part, setting) if part != "video" else {}
    branches = {"guided": 2, "single": 1}.get(part, 0)
    macs = unet_cost(CONFIGS[setting.config], setting.frames, setting.latent, branches).macs if branches else 0
    rows = []
    for i, (name, seen) in enumerate(errors.items()):
        median = float(np.median(times[:, i]))
        middle, low, high = ratio(times[:, [i, 0]])
        row = {"part": part, "frames": setting.frames, "dtype": str(setting.dtype).removeprefix("torch."), "name": name}
        row |= {"seconds": median, "ratio": middle, "interval": (low, high), "error": seen, "times": [*times[:, i]]}
        row |= {"counted": counted.get(name), "measured": grown[name]}
        rows.append(row | ({"flops": 2 * macs / median, "share": 2 * macs / median / rate} if macs else {}))
    return rows


def compare_loading(setting: Setting, repeats: int) -> list[dict[str, Any]]:
    """The same for loading a UNet in float32 from a local folder, each time in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        both_unets(replace(setting, device="cpu", dtype=torch.float32))[1].save_pretrained(folder)
        times = np.empty((2, repeats, 2))  # seconds and bytes
        for i in range(repeats):
            for j in (0, 1) if i % 2 == 0 else (1, 0):
                script = LOADING.format(loader=[*LOADERS.values()][j], folder=folder)
                run = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
                times[:, i, j] = [float(number) for number in run.stdout.split()[-2:]]
    rows = []
    for j, name in enumerate(LOADERS):
        middle, low, high = ratio(times[0][:, [j, 0]])
        row = {
            "part": "load",
            "frames": None,
            "dtype": "float32",
            "name": name,
            "seconds": float(np.median(times[0, :, j])),
        }
        row |= {"ratio": middle, "interval": (low, high), "error": None, "counted": None, "times": [*times[0, :, j]]}
        rows.append(row | {"measured": float(np.median(times[1, :, j]))})
    return rows


class Found:
    """The rows so far: in a file, if there is one, whole after each part, for a run that goes on."""

    def __init__(self, file: Path | None, same: dict[str, Any]) -> None:
        """Raises SystemExit for a file of a run that was not `same`."""
        self.file, self.same, self.rows = file, same, []
        if file and file.exists():
            kept = json.loads(file.read_text(encoding="utf-8"))
            for name, value in json.loads(json.dumps(same)).items():
                if kept["same"].get(name) != value:
                    raise SystemExit(
                        f"{file} is of a run with {name} {kept['same'].get(name)}, not {value}: name another"
                    )
            self.rows = kept["rows"]

    def of(self, part: str, frames: int | None, dtype: str, measure: Callable[[], list[dict[str, Any]]]) -> list[Any]:
        """The rows of a part, measured if they are not there."""
        about = {"part": part, "frames": frames, "dtype": dtype}
        if not (here := [row for row in self.rows if about.items() <= row.items()]):
            self.rows += (here := finite(measure()))
            if self.file:
                write_json(self.file, {"same": self.same, "rows": self.rows})
        return here


def beside_the_first(rows: list[dict[str, Any]], first: str) -> None:
    """To each row `to_first`: the ratio, with its interval, to diffusers in the dtype that was named first."""
    for row in rows:
        about = {"part": row["part"], "frames": row["frames"], "dtype": first, "name": "diffusers"}
        base = next((other for other in rows if about.items() <= other.items()), row)
        row["to_first"] = None
        if row["dtype"] != base["dtype"]:
            n = min(len(row["times"]), len(base["times"]))
            row["to_first"] = ratio(np.array([row["times"][:n], base["times"][:n]]).T)


# --- what is said of it -------------------------------------------------------------------------------------------


def shown(rows: list[dict[str, Any]], gpu: bool) -> str:
    """The rows as a table. A CPU's seconds say little about another, so only ratios and loading's seconds are in it."""

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        time = f"{row['seconds'] * 1e3:.1f} ms" if gpu or row["part"] == "load" else ""
        low, high = row["interval"]
        sizes = (f"{row[kind] / 1e9:.2f} GB" if row[kind] is not None else "" for kind in ("counted", "measured"))
        rate = f"{row['flops'] / 1e12:.2f}, {row['share']:.0%}" if "flops" in row else ""
        frames, error = str(row["frames"] or ""), "" if row["error"] is None else f"{row['error']:.1e}"
        interval = f"{low:.3f} to {high:.3f}"
        about, first = (row["part"], frames, row["dtype"], row["name"]), row["to_first"]
        second = "" if first is None else f"{first[0]:.3f} ({first[1]:.3f} to {first[2]:.3f})"
        return *about, time, f"{row['ratio']:.3f}", interval, second, *sizes, rate, error

    titles = ("part", "frames", "dtype", "", "median", "/ diffusers", "95 % interval", "/ in the first dtype")
    return table((*titles, "counted", "measured", "TFLOP/s, share", "difference"), "lrllrrrrrrrr", map(cells, rows))


def hardware(device: str) -> str:
    """What it ran on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        rows = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(row.split(":", 1)[1].strip() for row in rows if row.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@contextmanager
def imports_set_aside() -> Iterator[None]:
    """So that looking for garbage, before memory is measured, does not go through all that is imported."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@imports_set_aside()
@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"])
    parser.add_argument("--config", choices=CONFIGS, default="small")
    parser.add_argument("--frames", type=int, nargs="+", default=[8])
    parser.add_argument("--size", default="128x128", help="pixels, WxH, multiples of 64 (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="forwards of each (default: %(default)s)")
    parser.add_argument("--video-repeats", type=int, default=2, help="of whole videos (default: %(default)s)")
    parser.add_argument("--video-size", metavar="WxH", help="pixels of a video (default: --size)")
    parser.add_argument("--video-frames", type=int, nargs="+", metavar="N", help="of a video (default: --frames)")
    parser.add_argument("--steps", type=int, default=25, help="of a video (default: %(default)s)")
    parser.add_argument("--cut-step", type=int, default=17, help="of a video with the cut (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="the steps compiled, too")
    parser.add_argument("--save", type=Path, metavar="FILE", help="what was found, to go on from")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    where = hardware(args.device)
    versions = {
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
    any_run = {"part", "dtype", "frames", "save"}
    same = {"hardware": where, "versions": versions} | {k: v for k, v in vars(args).items() if k not in any_run}
    found, rows = Found(args.save, same), []
    rates = {name: matmul_rate(args.device, DTYPES[name]) for name in args.dtype}
    for name in args.dtype:
        chosen: dict[str, Any] = {"steps": args.steps, "cut_step": args.cut_step, "compile": args.compile}
        for part in (part for part in args.part if part != "load"):
            size, counts, repeats = args.size, args.frames, args.repeats
            if part == "video":
                size, counts, repeats = args.video_size or size, args.video_frames or counts, args.video_repeats
            for frames in counts:
                width, height = (int(side) for side in size.split("x"))
                setting = Setting(args.device, DTYPES[name], args.config, frames, (width, height), **chosen)
                rows += found.of(part, frames, name, partial(compare, part, setting, repeats, rates[name]))
    if "load" in args.part:
        setting = Setting("cpu", torch.float32, args.config, 1, (64, 64))
        rows += found.of("load", None, "float32", partial(compare_loading, setting, args.repeats))
    beside_the_first(rows, args.dtype[0])

    rated = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in rates.items())
    print(f"{args.config} configuration, {args.size}, {where}, {versions}, a large product in TFLOP/s: {rated}")
    print(f"{args.repeats} forwards of each, {args.video_repeats} videos of {args.steps} steps\n")
    print(shown(rows, args.device.startswith("cuda")))
    print(
        json.dumps(
            {"hardware": where, "versions": versions, "asked": vars(args), "matmul": rates, "rows": rows},
            default=str,
        )
    )


def finite(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON has no word for what is not a number: None."""
    return [{key: None if value != value else value for key, value in row.items()} for row in rows]


if __name__ == "__main__":
    main()
