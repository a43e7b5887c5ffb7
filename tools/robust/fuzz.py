"""Files as nobody should write them: each is read, or refused in one sentence.

    python -m tools.robust.fuzz --examples 10000 manifest image

Kinds are the config.json of each part and generation_config.json, safetensors files, manifests and images. hypothesis
makes the files out of good ones by changing, cutting and inventing. A file may be refused by ValueError or OSError in
one line; anything else is a crash. Besides, nothing that a manifest names lies outside the output folder, and reading
takes no more memory than ROOM beyond what a file's own size and pixels account for. A crash is made as small as
hypothesis can, and kept in tests/cases/, whose files the tests read again. The last line is JSON.
"""

import argparse
import ctypes
import hashlib
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from minisvd.checkpoint import load_unet, read_header
from minisvd.config import CHOICES, SETTINGS, ClipConfig, GenerationConfig, UNetConfig, VAEConfig
from minisvd.folder import CONFIG_FILES, GENERATION_FILE, read_config, read_generation
from minisvd.images import load_image
from minisvd.jobs import plan, read_manifest
from minisvd.save import clip_config, unet_config, vae_config
from minisvd.unet import SpatioTemporalUNet

CASES = Path(__file__).parents[2] / "tests" / "cases"
ROOM = 400  # megabytes: Pillow opens what has up to 179 million pixels with a warning, and that is an error here
UNET = UNetConfig(
    block_out_channels=(32,), attention=(True,), num_attention_heads=(1,), layers_per_block=1, cross_attention_dim=8,
    addition_time_embed_dim=8,
)  # fmt: skip
NAMES = [
    "../a.gif",
    "/fuzz-a.gif",
    "inner/a.gif",
    "..",
    ".",
    "link.gif",
    "a\0.gif",
    "a" * 300 + ".gif",
    "{stem}.gif",
]
NAMES += ["{seed}", "~/a.gif", "a.gif", "b.gif", "", "c.exe", "..\\a.gif", "{", "a.gif/", "./a.gif", "CON", "ü.webp"]

numbers = st.sampled_from([0, -1, 1, 2, 7, 10**6, 10**30, 2**31, 2**63, 1e300, -1e300, 0.5, float("nan"), float("inf")])
values = st.recursive(
    numbers | st.booleans() | st.none() | st.text(max_size=8) | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


class Kind(NamedTuple):
    """Of file: what its name ends in, how one is made, and what reads it."""

    suffix: str
    files: st.SearchStrategy[bytes]
    read: Callable[[Path], object]


@st.composite
def changed(draw: st.DrawFn, good: bytes) -> bytes:
    """Good bytes, of which some are other ones, left out, or there twice."""
    content = bytearray(good)
    for _ in range(draw(st.integers(0, 6))):
        start, stop = sorted((draw(st.integers(0, len(content))), draw(st.integers(0, len(content)))))
        match draw(st.integers(0, 3)):
            case 0:
                content[start : start + 4] = draw(st.binary(min_size=4, max_size=4))
            case 1:
                del content[start:stop]
            case 2:
                content[start:start] = content[start : min(stop, start + 64)]
            case _:
                del content[start:]
    return bytes(content)


@st.composite
def stated(draw: st.DrawFn, good: dict[str, Any]) -> bytes:
    """JSON of a good object with other values, without some, or with more; or something else."""
    content = dict(good)
    for name in draw(st.lists(st.sampled_from(sorted(good)), max_size=4)):
        content[name] = draw(values)
    for name in draw(st.lists(st.sampled_from(sorted(good)), max_size=2)):
        content.pop(name, None)
    content |= draw(st.dictionaries(st.text(max_size=6), values, max_size=1))
    text = json.dumps(content).encode()
    nested = st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b"", b"null", b"[]", b"9" * 10_000])
    return draw(st.just(text) | st.just(text) | changed(text) | nested)


@st.composite
def tensors(draw: st.DrawFn, good: bytes) -> bytes:
    """A safetensors file whose header says something else than it holds."""
    length = int.from_bytes(good[:8], "little")
    header, data = json.loads(good[8 : 8 + length]), good[8 + length :]
    names = sorted(header)
    for name in draw(st.lists(st.sampled_from(names), max_size=3)):
        entry = dict(header[name]) if isinstance(header[name], dict) else {}
        entry[draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))] = draw(values | st.just([2**40, 2**40]))
        header[draw(st.sampled_from([name, "other"]))] = draw(st.just(entry) | st.just(entry) | values)
    text = json.dumps(header).encode()
    size = draw(st.just(len(text)) | st.just(len(text)) | st.sampled_from([0, 2**20, 2**40, 2**63, len(text) + 8]))
    return draw(st.just(size.to_bytes(8, "little") + text + data) | changed(good))


@st.composite
def manifests(draw: st.DrawFn) -> bytes:
    """A manifest, .jsonl or, by its first letter, .csv, with any names and settings."""
    some = st.sampled_from(NAMES) | st.text(max_size=12)
    keys = st.sampled_from([*SETTINGS, *CHOICES, "sigmas", "model", "output", ""]) | st.text(max_size=5)
    table = draw(st.booleans())
    rows = []
    for _ in range(draw(st.integers(0, 4))):
        row = draw(st.dictionaries(keys, values, max_size=3))
        row |= {"image": draw(st.sampled_from(["a.png", "b.png"]) | some), "name": draw(some | values)}
        rows.append(row)
    if table:
        head = sorted({key for row in rows for key in row})
        cells = [head, *([str(row.get(key, "")) for key in head] for row in rows)]
        text = "\n".join(",".join(f'"{cell}"' if draw(st.booleans()) else cell for cell in line) for line in cells)
        return b"c" + text.encode("utf-8", "surrogatepass")
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return b"j" + draw(st.just(text) | changed(text))


def read_rows(path: Path) -> None:
    """Plan what a manifest asks for, in a folder with an inner one and a link out of it. AssertionError for a path that
    is written and lies elsewhere."""
    content = path.read_bytes()
    folder = path.parent / "out"
    for name in ("out", "out/inner"):
        (path.parent / name).mkdir(exist_ok=True)
    (folder / "link.gif").unlink(missing_ok=True)
    (folder / "link.gif").symlink_to("../elsewhere.gif")
    manifest = path.with_name("jobs.csv" if content[:1] == b"c" else "jobs.jsonl")
    manifest.write_bytes(content[1:])
    before = sorted(path.parent.rglob("*"))
    try:
        rows = read_manifest(manifest)
        jobs = plan([(image, name or "{stem}.gif", own) for image, name, own in rows], [0, 1], folder, "{stem}.gif")
        for job in jobs:
            assert Path(job["path"]).resolve().parent == folder.resolve(), job["path"]
    finally:
        assert sorted(path.parent.rglob("*")) == before, "planning wrote something"


def read_part(part: str, path: Path) -> None:
    place = path.parent / CONFIG_FILES[part]
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(path.read_bytes())
    read_config(part, path.parent)


def read_settings(path: Path) -> None:
    (path.parent / GENERATION_FILE).write_bytes(path.read_bytes())
    read_generation(path.parent, GenerationConfig())


def read_weights(path: Path) -> None:
    """The header alone, then as the weights of the UNet that the good file holds."""
    read_header(path)
    (path.parent / "unet").mkdir(exist_ok=True)
    (path.parent / CONFIG_FILES["unet"]).write_text(json.dumps(unet_config(UNET, 2)))
    (path.parent / "unet/diffusion_pytorch_model.safetensors").write_bytes(path.read_bytes())
    load_unet(path.parent)


def pictures() -> st.SearchStrategy[bytes]:
    good = []
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "ICO", "PCX", "JPEG2000"):
        for mode in ("RGB", "P", "L"):
            try:
                pixels.convert(mode).save(file := BytesIO(), kind)
            except (OSError, ValueError, KeyError):  # not of this kind, or not built into this Pillow
                continue
            good.append(file.getvalue())
    return st.sampled_from(good).flatmap(changed)


def kinds() -> dict[str, Kind]:
    """By name; building them takes a second."""
    torch.manual_seed(0)
    weights = save({name: tensor.contiguous() for name, tensor in SpatioTemporalUNet(UNET).state_dict().items()})
    configs = {"unet": unet_config(UNET, 2), "vae": vae_config(VAEConfig()), "clip": clip_config(ClipConfig())}
    found = {part: Kind(".json", stated(good), partial(read_part, part)) for part, good in configs.items()}
    found["generation"] = Kind(".json", stated(asdict(GenerationConfig())), read_settings)
    found["weights"] = Kind(".safetensors", tensors(weights), read_weights)
    found["manifest"] = Kind(".txt", manifests(), read_rows)
    found["image"] = Kind(".png", pictures(), lambda path: load_image(path, (16, 16)))
    return found


def peak(new: bool = False) -> float:
    """The most megabytes that this process has held, since a `new` count was begun."""
    if new:
        with suppress(OSError, AttributeError):  # what was freed goes back, or a file could take it unseen
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def try_file(kind: Kind, content: bytes) -> bool:
    """Whether the file is read, or refused as it should be. Raises what is a crash."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow says of odd files
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        path = Path(folder) / f"file{kind.suffix}"
        path.write_bytes(content)
        before = peak(new=True)
        try:
            kind.read(path)
            read = True
        except (ValueError, OSError) as error:
            read, said = False, str(error)
            if not said or "\n" in said:
                raise AssertionError(f"{type(error).__name__} is no sentence: {said}") from error
        grown = peak() - before
        assert grown < ROOM + len(content) / 2**20, f"{grown:.0f} MB for a file of {len(content):,} bytes"
        return read


def fuzz(name: str, kind: Kind, examples: int, seed: int, cases: Path) -> dict[str, Any]:
    """Try files of a kind, and keep the smallest that crashes, if one does."""
    tried: list[bool] = []
    last = b""

    @seeded(seed)
    @settings(
        max_examples=examples, database=None, deadline=None, report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(kind.files)
    def run(content: bytes) -> None:
        nonlocal last
        last = content  # hypothesis ends with the smallest
        tried.append(try_file(kind, content))

    result: dict[str, Any] = {"crash": None}
    try:
        run()
    except Exception as error:
        cases.mkdir(parents=True, exist_ok=True)
        case = cases / f"{name}-{hashlib.sha256(last).hexdigest()[:12]}"
        case.write_bytes(last)
        result["crash"] = f"{case}: {type(error).__name__}: {error}"
    return {"examples": len(tried), "read": sum(tried), **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", nargs="*", help="unet, vae, clip, generation, weights, manifest, image (default: all)")
    parser.add_argument("--examples", type=int, default=2000, metavar="N", help="files of each kind (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, other files (default: 0)")
    args = parser.parse_args()
    known = kinds()
    if unknown := sorted(set(args.kind) - set(known)):
        parser.error(f"{unknown[0]} is none of {', '.join(known)}")
    began, results = time.monotonic(), {}
    for name in args.kind or known:
        results[name] = fuzz(name, known[name], args.examples, args.seed, CASES)
        print(f"{name}: {results[name]}", file=sys.stderr)
    crashes = [result["crash"] for result in results.values() if result["crash"]]
    total = sum(result["examples"] for result in results.values())
    print(json.dumps({"examples": total, "crashes": crashes, "seconds": round(time.monotonic() - began, 1)}))
    sys.exit(int(bool(crashes)))


if __name__ == "__main__":
    main()
