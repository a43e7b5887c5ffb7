"""Weights in either published layout -> modules.

    resolve     folder | .safetensors file | preset | hub id -> Checkpoint: files found, headers and configs checked
    load        Checkpoint -> modules, built on `meta` and filled tensor by tensor
    load_unet   both, for the UNet alone

Everything that can be wrong with a name, a shape or a config is found before the first tensor is read.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from io import BufferedReader
from itertools import repeat
from mmap import ACCESS_COPY, mmap
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import folder
from .clip import ImageEncoder
from .config import PRESETS, XT, ClipConfig, GenerationConfig, UNetConfig, VAEConfig, Vcut, shown
from .layouts import DROPPED, FOLDER, OWNED, SINGLE_FILE, Join, rules, sources
from .unet import SpatioTemporalUNet
from .vae import AutoencoderKLTemporalDecoder

MODULES = {"unet": SpatioTemporalUNet, "vae": AutoencoderKLTemporalDecoder, "clip": ImageEncoder}
RELEASED = {"unet": UNetConfig(), "vae": VAEConfig(), "clip": ClipConfig()}
BROKEN = "has values that are infinite or not numbers: get or train it again"
TIMEOUT = 10  # seconds for each answer of the hub
FOLDS = ((False, "lossless"), (False, True), ("lossless", True))  # builds, from a file's to a UNet's
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Entry(NamedTuple):
    """One tensor of a file: its dtype as safetensors spells it, its shape, its bytes' place."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, none of them read. Raises ValueError for any other or broken file."""
    if path.suffix in folder.PICKLES:
        raise ValueError(folder.pickle_refusal(path))
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a .safetensors file, the only format that is read")
    with open(path, "rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            raise ValueError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` in its folder")
        try:
            with safe_open(path, framework="pt"):  # the format's own checks: lengths, offsets, no holes
                pass
        except SafetensorError as error:
            size = path.stat().st_size
            raise ValueError(f"{path} ({size:,} bytes) is cut off or corrupt ({error}): download it again") from error
        header = json.loads(file.read(int.from_bytes(start, "little")))
        data = file.tell()
    header.pop("__metadata__", None)
    return {
        name: Entry(entry["dtype"], tuple(entry["shape"]), *(data + offset for offset in entry["data_offsets"]))
        for name, entry in header.items()
    }


def read_tensor(file: BufferedReader, entry: Entry, pages: mmap | None = None) -> Tensor:
    """The file's own `pages`, if given and aligned; else read into memory of its own. What is to be converted is better
    read: mapped, every page of it would count until the mapping's end."""
    dtype, size = DTYPES[entry.dtype], entry.stop - entry.start
    if pages is not None and size and entry.start % dtype.itemsize == 0:
        buffer = torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=entry.start)
    else:
        buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        file.seek(entry.start)
        file.readinto(buffer.numpy().data)
    return buffer.view(dtype).reshape(entry.shape)


@dataclass(frozen=True)
class Checkpoint:
    """Weights that were found and whose headers are sound; nothing is read yet. `layout` is "folder" or "single file";
    `path` is that folder or file; `files` and `configs` have one entry per part asked for ("unet", "vae", "clip");
    `generation` is what a call leaves to the model."""

    layout: str
    path: Path
    files: dict[str, Path]
    headers: dict[str, dict[str, Entry]]
    configs: dict[str, Any]
    generation: GenerationConfig

    def load(
        self, *, device: torch.device | str = "cpu", dtype: torch.dtype | str = torch.float32,
        vcut: Vcut | None = None, copy: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """Every part as a module in eval mode: {"unet": ..., "vae": ..., "clip": ...}.

        `vcut` is the UNet's build, None that of its config. From attention to `CachedCondLinear` each weight is folded,
        W = to_out.weight to_v.weight and b = to_out.bias, in float64 and rounded once to `dtype`.

        Every name, shape and dtype of every part is settled before the first tensor is read. Peak memory is that
        of the weights in `dtype` and of the one tensor being converted.

        On the CPU, tensors that a file holds in `dtype` are its pages, mapped: none is read before it is used, and
        training changes the process's copy of a page, never the file. A file that is replaced or deleted lives on
        until then (Windows refuses); one that is cut ends the process with SIGBUS at the next unread page, and one that
        is written over in place may show. `copy` reads everything at once instead and needs the file no more.
        What is read is looked through for values that are no finite numbers; of what is mapped the pipeline says it,
        when a step's latents are none.
        Raises ValueError for a tensor that is missing, left over, misshapen or not finite, for a `dtype` without
        fractions and for a device that is not there.
        """
        device = checked_device(device)
        dtype = checked_dtype(dtype, device)
        modules = {part: self.build(part, vcut) for part in self.configs}
        plans = {part: self.plan(part, module) for part, module in modules.items()}
        mapped = not copy and device.type == "cpu"
        for part, module in modules.items():
            header, state = self.headers[part], {}
            with open(self.files[part], "rb") as file:
                pages = mmap(file.fileno(), 0, access=ACCESS_COPY) if mapped else None
                for name, (names, join) in plans[part].items():
                    entries = [header[source] for source in names]
                    kept = [pages if DTYPES[entry.dtype] == dtype else None for entry in entries]
                    state[name] = join(*map(read_tensor, repeat(file), entries, kept)).to(device, dtype).contiguous()
                    if (len(entries) > 1 or kept[0] is None) and not finite(state[name]):
                        whole = all(finite(read_tensor(file, entry)) for entry in entries)
                        why = f"does not fit in {dtype}: load it in float32 or bfloat16" if whole else BROKEN
                        raise ValueError(f"{self.files[part]}: {some(names)} {why}")
            module.load_state_dict(state, strict=True, assign=True)
            module.eval()
        return modules

    def build(self, part: str, vcut: Vcut | None = None) -> nn.Module:
        """A part without data, a UNet built with `vcut`. Raises ValueError if the file's build does not lead to it."""
        config = self.configs[part]
        if isinstance(config, UNetConfig) and vcut is not None and vcut != config.vcut:
            built, config = config.vcut, replace(config, vcut=vcut)
            if (built, vcut) not in FOLDS:
                raise ValueError(f"{self.path} holds a UNet built with vcut={built!r}; it cannot become {vcut!r}")
        return on_meta(MODULES[part], config)

    def plan(self, part: str, module: nn.Module) -> dict[str, tuple[list[str], Join]]:
        """For each parameter of `module` its sources, all of which exist and fit; every other tensor is accounted for.
        The file must hold the whole of its own build; a folded UNet leaves out just what has no effect on it. Raises
        ValueError naming the first tensor that is missing, unknown, of an unreadable dtype or misshapen."""
        where, header = self.files[part], self.headers[part]
        layout, config = self.layout, self.configs[part]
        fold = isinstance(module, SpatioTemporalUNet) and config.vcut is False and module.config.vcut is not False
        plan = {name: sources(name, *rules(part, layout, config, fold)) for name in module.state_dict()}
        whole = module if module.config == config else self.build(part)
        used = {source for name in whole.state_dict() for source in sources(name, *rules(part, layout, config))[0]}

        known = [DROPPED[self.layout]]
        if self.layout == SINGLE_FILE:
            known += [pattern for owner, pattern in OWNED.items() if owner != part]
        unknown = [name for name in header if name not in used and not re.match("|".join(known), name)]
        if missing := sorted(used - header.keys()):
            raise ValueError(f"{where} lacks {some(missing)}: it is not the {part} that its config describes")
        if unknown:
            raise ValueError(f"{where} has {some(unknown)}, which the {part} that its config describes has no use for")
        for name, target in module.state_dict().items():
            names, join = plan[name]
            for source in names:
                if header[source].dtype not in DTYPES:
                    raise ValueError(f"{where}: {source} is {header[source].dtype}; can read {', '.join(DTYPES)}")
            try:
                shape = join(*(torch.empty(header[source].shape, device="meta") for source in names)).shape
            except RuntimeError:  # einops' and torch's alike: these shapes do not even join
                shape = None
            if shape != target.shape:
                have = ", ".join(f"{source} {list(header[source].shape)}" for source in names)
                raise ValueError(f"{where}: {have} cannot fill {name} {list(target.shape)} of the {part}")
        return plan


def checked_dtype(dtype: Any, device: torch.device) -> torch.dtype:
    """The dtype of a name such as "float16", or that dtype. Raises ValueError unless it has fractions. "auto": float16
    on cuda; bfloat16 on a CPU that multiplies it (AVX-512 BF16 or AMX); else float32. Products are then several times
    as fast, and the small model's frames 56 dB (PSNR) from those in float32."""
    if dtype == "auto":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        dtype = {"cuda": torch.float16, "cpu": torch.bfloat16 if fast else torch.float32}.get(device.type, "float32")
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(f"dtype is {shown(dtype)}; need a floating-point one such as torch.float16")
    return named


def checked_device(device: Any) -> torch.device:
    """Raises ValueError unless a number can be put there and got back."""
    try:
        torch.zeros(1, device=device).item()
        return torch.device(device)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} cannot be used on this machine: use cpu, or leave it out") from error


def finite(x: Tensor) -> bool:
    """No value infinite or not a number: seen in the extremes, in a thirtieth of the time that `isfinite` takes."""
    return x.numel() == 0 or bool(torch.stack(torch.aminmax(x)).isfinite().all())


class Uninitialised(TorchFunctionMode):
    """Leaves out what `torch.nn.init` would do: numbers that nobody reads, and a warning of those that are none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return kwargs["tensor"] if getattr(func, "__module__", "") == "torch.nn.init" else func(*args, **(kwargs or {}))


def on_meta(kind: type[nn.Module], config: Any) -> Any:
    """A module without data."""
    with torch.device("meta"), Uninitialised():
        return kind(config)


def some(names: list[str]) -> str:
    """The first name, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"


def resolve(
    source: str | Path, *, parts: Sequence[str] = folder.PARTS, configs: Mapping[str, Any] | None = None,
    variant: str | None = None, revision: str | None = None, offline: bool = False,
) -> Checkpoint:  # fmt: skip
    """Find the weights of `parts`, download them if need be, and check their headers and configs.

    `source` is, tried in this order: a preset ("tiny", "svd", "svd-xt", "svd-xt-1-1"; a folder of that name is ./tiny);
    a folder or a .safetensors file that exists; a hub id "owner/name". `configs` replaces what a part's config.json
    says, or for a single file, which has none, the released sizes. `variant` is the middle of a file name, as in
    model.fp16.safetensors; None means the plain files, or the fp16 ones where there are no plain ones. `revision` is a
    branch, tag or commit of a hub id. `offline` (or HF_HUB_OFFLINE=1) looks no further than the local cache.

    The generation settings are the preset's; for other folders those of svd-xt if the UNet has 25 frames, else of svd
    with the UNet's number. Fields of a generation_config.json in the folder win. A single file states nothing: svd-xt's
    if "xt" is in its name, else svd's.

    Raises FileNotFoundError for what is not there and ValueError for what cannot be used, each with the remedy.
    """
    for name, value in (("variant", variant), ("revision", revision)):
        if not isinstance(value, str | None):
            raise ValueError(f"{name} is {shown(value)}; need a name, or None")
    configs, released, path = dict(configs or {}), None, locate(source)
    if path is None:
        hub_id = PRESETS[str(source)].source if str(source) in PRESETS else str(source)
        released = next((preset.generation for preset in PRESETS.values() if preset.source == hub_id), None)
        path = download(hub_id, parts, variant, revision, offline)
    elif revision is not None:
        raise ValueError(f"revision {revision!r} is for a hub id, but {path} is local: leave it out")
    if path.is_dir():
        alone = (path / "config.json").is_file() and not (path / folder.CONFIG_FILES["unet"]).is_file()
        inside = "unet/" if alone and list(parts) == ["unet"] else ""  # where the files of a `unet/` folder would be
        there = sorted(p.relative_to(path).as_posix() for p in (*path.glob("*"), *path.glob("*/*")) if p.is_file())
        names = folder.choose([inside + name for name in there], parts, variant, str(path))
        layout, files = FOLDER, {part: path / name.removeprefix(inside) for part, name in names.items()}
        stated = {part: folder.CONFIG_FILES[part].removeprefix(inside) for part in parts if part not in configs}
        configs |= {part: folder.read_config(part, path, name) for part, name in stated.items()}
        generation = folder.read_generation(path, released)
    elif variant is not None:
        raise ValueError(f"variant {variant!r} chooses among a folder's files, but {path} is a file: leave it out")
    else:
        layout, files = SINGLE_FILE, dict.fromkeys(parts, path)
        configs = {part: configs.get(part, RELEASED[part]) for part in parts}
        generation = XT if "xt" in path.name.lower() else GenerationConfig()
    folder.check_together(configs)
    headers = {file: read_header(file) for file in dict.fromkeys(files.values())}
    return Checkpoint(layout, path, files, {part: headers[files[part]] for part in parts}, configs, generation)


def locate(source: str | Path) -> Path | None:
    """The local folder or file that `source` means, or None if it is on the hub."""
    if not isinstance(source, str | PathLike) or not str(source):
        raise ValueError(f"the model is {shown(source)}; need a name, a path or a hub id")
    name, path = str(source), Path(os.path.expanduser(source))
    preset = isinstance(source, str) and name in ("tiny", *PRESETS)
    if path.exists() and not preset:
        if not (path.is_file() or path.is_dir()):  # a pipe or a device would be waited for
            raise ValueError(f"{path} is neither a file nor a folder: check the path")
        return path
    if name == "tiny":
        package = Path(__file__).parent
        for place in (package / "weights/tiny", package.parent / "weights/tiny"):  # in a wheel; in a checkout
            if place.is_dir():
                return place
        raise FileNotFoundError(f"the weights of tiny, weights/tiny, are neither in nor beside {package}: reinstall")
    if isinstance(source, Path) or name.startswith((".", "/", "~")) or path.suffix in (".safetensors", *folder.PICKLES):
        raise FileNotFoundError(f"there is no file or folder {name}: check the path")
    if name not in PRESETS and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        names = ["tiny", *PRESETS]
        hint = "".join(f"did you mean {close!r}? Else " for close in get_close_matches(name, names, n=1))
        hint += f"give one of {', '.join(names)}, a path, or a hub id owner/name"
        raise ValueError(f"unknown model {name!r}: {hint}")
    return None


def download(hub_id: str, parts: Sequence[str], variant: str | None, revision: str | None, offline: bool) -> Path:
    """The local snapshot of a hub repository: its configs and, of `parts`, one variant of the weights."""
    import huggingface_hub as hub  # slow to import
    from huggingface_hub import constants, errors

    page, names, commit, said = f"{constants.ENDPOINT}/{hub_id}", [], "", ""
    preset = any(hub_id == preset.source for preset in PRESETS.values())
    or_path = "" if preset else f"; if {hub_id} is a path, there is nothing there"
    patterns = [*folder.CONFIG_FILES.values(), folder.PREPROCESSOR_FILE, folder.GENERATION_FILE]
    try:
        try:
            if not offline:
                found = hub.HfApi().model_info(hub_id, revision=revision, timeout=TIMEOUT)
                names, commit = [file.rfilename for file in found.siblings or []], found.sha or "unknown"
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            raise
        except Exception as error:  # no connection, in the words of whichever HTTP library the hub's client uses
            said = f" ({shown_error(error)})"
        if names:
            patterns += folder.choose(names, parts, variant, hub_id).values()
        for name in [name for name in names if name in patterns] or names[:1]:  # one by one, each with a time limit
            if commit not in str(hub.try_to_load_from_cache(hub_id, name, revision=revision)):
                # Asked here first, because the download would repeat its first question for six minutes
                hub.get_hf_file_metadata(hub.hf_hub_url(hub_id, name, revision=revision), timeout=TIMEOUT)
                hub.hf_hub_download(hub_id, name, revision=revision, etag_timeout=TIMEOUT)
        return Path(hub.snapshot_download(hub_id, revision=revision, allow_patterns=patterns, local_files_only=True))
    except errors.GatedRepoError as error:
        raise ValueError(f"{hub_id} is gated: accept its licence at {page} and run `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        remedy = f"check the name, or run `hf auth login`{or_path}"
        raise ValueError(f"{page} does not exist or is private: {remedy}") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{hub_id} has no revision {revision!r}: see {page}/tree/main for those it has") from error
    except errors.LocalEntryNotFoundError as error:
        remedy = f"run once with {constants.ENDPOINT} in reach, not offline{or_path}{said}"
        raise FileNotFoundError(f"{hub_id} is not in the local cache: {remedy}") from error
    except (ValueError, FileNotFoundError):  # what is there cannot be used
        raise
    except Exception as error:
        why = shown_error(error)
        raise ConnectionError(f"{hub_id} was not downloaded whole ({why}): run again, what came is kept") from error


def shown_error(error: Exception) -> str:
    """What the hub or the connection said, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def load_unet(
    source: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | str = torch.float32,
    config: UNetConfig | None = None, vcut: Vcut | None = None,
    variant: str | None = None, revision: str | None = None, offline: bool = False, copy: bool = False,
) -> SpatioTemporalUNet:  # fmt: skip
    """The UNet alone, in eval mode; of a hub id only the UNet is downloaded. Arguments and errors as for `resolve`.
    `config` replaces what config.json says, or the released sizes for a single file. `vcut` is the build and `copy`
    keeps no file mapped, as for `Checkpoint.load`."""
    configs = {"unet": config} if config else None
    found = resolve(source, parts=["unet"], configs=configs, variant=variant, revision=revision, offline=offline)
    return found.load(device=device, dtype=dtype, vcut=vcut, copy=copy)["unet"]
