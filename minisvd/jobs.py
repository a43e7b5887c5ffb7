"""Which videos a command line asks for, where each goes, and whether it is there already: images, manifests, names.

Beside each video lies its record, VIDEO.json: every setting, hashes of the image, the weights and the video, timings.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import os
import re
import warnings
from argparse import Namespace
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import groupby
from mimetypes import guess_type
from pathlib import Path
from typing import Any

from PIL import Image

from .checkpoint import resolve
from .config import CHOICES, MANY, SETTINGS, VCUT, check, shown
from .images import FORMATS, open_image
from .pipeline import OPTIONAL, PER_IMAGE, checked_sigmas
from .video import check_output, check_zoom, is_written

PLACEHOLDERS = ("{stem}", "{seed}", "{index}")  # in a video's name: of the image's; the seed; its place in --seeds
NAMES = ("sigmas", *SETTINGS, *CHOICES)  # of the settings that a row of a manifest may have
Job = dict[str, Any]  # image, seed, path and settings; at the end also its state, and seconds or an error
Row = tuple[Path, str, dict[str, Any]]  # an image, the name of its video or "", and settings of its own


def find_images(given: list[Path]) -> list[Path]:
    """`given`, with each folder replaced by the images in it, sorted, and each pattern by what matches. Hidden files,
    videos of ours and folders inside are left out. Warns of a picture that Pillow does not open. Raises
    FileNotFoundError for a folder without images."""
    extensions = {name for name, kind in Image.registered_extensions().items() if kind in FORMATS}
    images = []
    for path in given:
        inside = [p for p in sorted(path.iterdir()) if p.is_file() and p.name[0] != "."] if path.is_dir() else []
        found = [p for p in inside if p.suffix.lower() in extensions and not read_record(p)]
        for p in inside:
            if p.suffix.lower() not in extensions and (guess_type(p.name)[0] or "").startswith("image/"):
                warnings.warn(f"{p} is left out, as Pillow does not open such files: make it a PNG", stacklevel=2)
        if path.is_dir() and not found:
            raise FileNotFoundError(f"there are no images in {path} itself: give another folder, or name the files")
        images += found or ([] if os.path.lexists(path) else sorted(map(Path, glob.glob(str(path))))) or [path]
    return images


def read_manifest(path: Path) -> list[Row]:
    """The rows of a .jsonl file, an object a line, or of a .csv file with a header: `image`, relative to the manifest's
    folder, and where they differ from the command line's, `name` of the video and any setting of a call. What is empty
    or null is not given. Raises ValueError, with the row, for what cannot be meant."""
    if path.suffix not in (".csv", ".jsonl") or not path.is_file():
        raise ValueError(f"{path} is no .jsonl or .csv file: check the path of the manifest")
    rows = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = filter(str.strip, file)
        try:
            for fields in csv.DictReader(lines, strict=True) if path.suffix == ".csv" else map(json.loads, lines):
                if not isinstance(fields, dict):
                    raise ValueError(f"{shown(fields)} is no object of settings")
                own = {name: value for name, value in fields.items() if value not in (None, "")}
                image, name = own.pop("image", ""), own.pop("name", "")
                if not (isinstance(image, str) and isinstance(name, str) and image):
                    raise ValueError(f"image is {shown(image)} and name {shown(name)}; need a path, and a file's name")
                rows.append((path.parent / image, name, as_settings(own)))
        except (ValueError, RecursionError, csv.Error) as error:
            raise ValueError(f"{path}, row {len(rows) + 1}: {error}") from error
    return rows


def as_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Settings in plain form, as JSON has them; a string for a number, as a .csv has it, is read as JSON. Raises
    ValueError for a name that is none, or a value that cannot be."""
    settings = {}
    for name, value in given.items():
        if name not in NAMES:
            raise ValueError(f"{shown(name)} is no setting; use image, name, {', '.join(NAMES)}")
        if isinstance(value, str) and name not in CHOICES:
            with suppress(ValueError):
                value = json.loads(value)
        settings[name] = checked_sigmas(name, value).tolist() if name == "sigmas" else check(name, value)
    return settings


def naming(output: Path, template: str | None, default: str) -> tuple[Path, str]:
    """The folder that the videos go to, and the template of their names in it: `template`, or if it is None `default`,
    in the folder `output`; or `output` itself, if it is none, or frames of ours. Raises ValueError for others."""
    inside = output.is_dir() and not is_ours(output)
    if template is not None and not (inside and template and Path(template).name == template):
        raise ValueError(f"videos cannot be named {template!r} in {output}: need a file's name, and a folder there")
    folder, template = (output, template or default) if inside else (Path(), str(output))
    for placeholder in re.findall(r"\{[^{}]*\}", Path(template).name):
        if placeholder not in PLACEHOLDERS:
            raise ValueError(f"{placeholder} in {template} means nothing: use {', '.join(PLACEHOLDERS)}")
    return folder, template


def plan(rows: list[Row], seeds: list[int], folder: Path, template: str, skip_existing: bool = False) -> list[Job]:
    """What is asked for, row by row and seed by seed. A row's own name is the template of its videos in the folder.
    Raises what `check_output` raises, and ValueError where one would replace another or an image, or lie outside."""
    jobs, taken, sources = [], set(), {os.path.realpath(image) for image, _, _ in rows}
    for image, name, own in rows:
        for index, seed in enumerate([own["seed"]] if "seed" in own else seeds):
            path = folder / fill(name or template, stem=image.stem, seed=seed, index=index)
            if name and os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder):
                raise ValueError(f"{path} does not lie in {folder}: give the name of a file alone")
            if not (is_written(path) and (skip_existing or read_record(path))):  # else it may be left alone
                check_output(path, is_ours(path))
            if path in taken:
                raise ValueError(f"two videos would be written to {path}: give a folder, or add {{stem}} and {{seed}}")
            if os.path.realpath(path) in sources:
                raise ValueError(f"{path} is one of the images: choose another output")
            taken.add(path)
            jobs.append({"image": str(image), "seed": seed, "path": str(path), "settings": own | {"seed": seed}})
    return jobs


def fill(template: str, **values: object) -> str:
    """`template` with each {name} replaced by its value, at once, so that a value with braces stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda match: str(values.get(match[1], match[0])), template)


def gather(args: Namespace, dtype: str) -> tuple[list[list[Job]], dict[str, Any], dict[str, Any]]:
    """The videos that a command line of `minisvd generate` asks for, in batches of --batch that differ in nothing but
    what each image may have of its own; what else decides their frames: the build and the weights, by their hashes; and
    the settings of the command line. Raises ValueError or OSError for what no video could be made of."""
    listed = read_manifest(args.manifest) if args.manifest else []
    rows: list[Row] = [(image, "", {}) for image in find_images(args.image)]
    if not rows + listed:
        raise ValueError("there is nothing to make: name an image, a folder of images, or a --manifest with rows")
    seeds, default = (args.seeds, "{stem}-{seed}.mp4") if args.seeds else ([args.seed or 0], "{stem}.mp4")
    template = default if listed and args.name_template is None else args.name_template
    folder, template = naming(args.output, template, default)
    rows += [(image, name or template, own) for image, name, own in listed]
    jobs = plan(rows, seeds, folder, template, args.skip_existing)
    given = as_settings({name: value for name in NAMES if (value := getattr(args, name)) is not None})
    for job in jobs if len(jobs) == 1 or args.fail_fast else []:
        open_image(job["image"])
    weights = resolve(args.model, variant=args.variant, revision=args.revision, offline=args.offline)
    given = dict.fromkeys(OPTIONAL) | asdict(weights.generation) | given
    for job in jobs:
        job["settings"] = given | job["settings"]
        check_zoom(job["settings"]["zoom"], job["settings"]["size"])
        record = f"{job['path']}.json"
        if not args.no_sidecar and os.path.lexists(record) and not read_record(Path(job["path"])):
            raise FileExistsError(f"{record} is there and no record of a video: move it, or add --no-sidecar")
    hashes = {} if args.no_sidecar else {path: digest(path) for path in set(weights.files.values())}
    made: dict[str, Any] = {"dtype": dtype, "weights": {part: hashes.get(path) for part, path in weights.files.items()}}
    made["vcut"] = weights.configs["unet"].vcut if args.vcut is None else VCUT[args.vcut]
    MANY.check("batch", args.batch)
    batches = []
    for _, alike in groupby(jobs, lambda job: {k: v for k, v in job["settings"].items() if k not in PER_IMAGE}):
        alike = list(alike)
        batches += [alike[i : i + args.batch] for i in range(0, len(alike), args.batch)]
    given |= {"seeds": seeds} if args.seeds else {"seed": seeds[0]}
    return batches, made, given


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, or of those of the frames in a folder, one after another."""
    sha = hashlib.sha256()
    for part in sorted(path.glob("frame_*.png")) if path.is_dir() else [path]:
        with open(part, "rb") as file:
            for block in iter(partial(file.read, 1 << 20), b""):
                sha.update(block)
    return sha.hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """The record of the video at `path`; nothing, if there is none of ours."""
    with suppress(OSError, ValueError, RecursionError):
        record = json.loads(Path(f"{path}.json").read_bytes())
        return record if isinstance(record, dict) and {"made", "video_sha256"} <= record.keys() else {}
    return {}


def is_ours(path: Path) -> bool:
    """A folder of PNGs that may be replaced: its record is beside it, and in it nothing but frames that this counts."""
    with suppress(KeyError, TypeError, ValueError):
        count = check("num_frames", read_record(path)["made"]["num_frames"])
        names = {".DS_Store", *(f"frame_{i:04d}.png" for i in range(count))}
        return path.is_dir() and not path.is_symlink() and all(p.is_file() and p.name in names for p in path.iterdir())
    return False


def state(path: Path, made: dict[str, Any]) -> str:
    """What becomes of a job whose place is `path`, in the words of the summary: a video there is left alone if its
    record says `made`, which decides its frames, and has its hash."""
    record = read_record(path)
    same = record.get("made") == made
    if not is_written(path) or (same and record["video_sha256"] != digest(path)):
        return "made again, which were broken" if path.is_file() or is_ours(path) else "made"
    return "skipped, finished with the same settings" if same else "made again with other settings"
