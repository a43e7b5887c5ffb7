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
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .config import CHOICES, SETTINGS, VCUT, check, shown
from .video import check_output, check_zoom, is_written

if TYPE_CHECKING:
    from argparse import Namespace

STATES = {  # of what is at a job's place
    "new": "new",
    "different": "different, made again",
    "broken": "broken, made again",
    "finished": "finished with the same settings, skipped",
    "exists": "skipped, which exist",
}
PLACEHOLDERS = ("{stem}", "{seed}", "{index}")  # in a video's name: of the image's; the seed; its place in --seeds


class Job(NamedTuple):
    """A video to make, where it goes, the settings that are its own or all of them, and what decides its frames."""

    image: str
    seed: int
    path: str
    settings: dict[str, Any] = {}  # noqa: RUF012 (none is changed)
    made: dict[str, Any] = {}  # noqa: RUF012


Row = tuple[Path, str, dict[str, Any]]  # an image, the name of its video or "", and settings of its own


def find_images(given: list[Path]) -> list[Path]:
    """`given`, with each folder replaced by the images in it, sorted: files with an extension that Pillow opens.

    A pattern with *, ? or [ stands for what matches it. Hidden files are left out, folders inside are not searched.
    Raises FileNotFoundError for a folder without images.
    """
    from PIL import Image

    from .images import FORMATS

    extensions = {name for name, kind in Image.registered_extensions().items() if kind in FORMATS}
    images = []
    for path in given:
        inside = sorted(path.iterdir()) if path.is_dir() else []
        found = [p for p in inside if p.suffix.lower() in extensions and p.is_file() and not p.name.startswith(".")]
        if path.is_dir() and not found:
            raise FileNotFoundError(f"there are no images in {path} itself: give another folder, or name the files")
        matching = [] if os.path.lexists(path) else sorted(map(Path, glob.glob(str(path))))
        images += found or matching or [path]
    return images


def read_manifest(path: Path) -> list[Row]:
    """The rows of a .jsonl file, an object a line, or of a .csv file with a header: `image`, relative to the manifest's
    folder, and, where they are to differ from the command line's, `name` of the video and any setting of a call.

    A cell of a .csv is a number, a list in brackets or a word; an empty one, as a null, is not given. Raises ValueError
    with the line for what cannot be meant, and FileNotFoundError.
    """
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"the manifest is {path}: give a .jsonl or .csv file")
    if not path.is_file():
        raise FileNotFoundError(f"there is no manifest {path}: check the path")
    rows = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        table = (
            map(of_cells, csv.DictReader(file, strict=True))
            if path.suffix == ".csv"
            else (json.loads(line) for line in file if line.strip())
        )
        try:
            for fields in table:
                rows.append(checked_row(fields, path.parent))
        except (ValueError, RecursionError, csv.Error) as error:
            raise ValueError(f"{path}, row {len(rows) + 1}: {error}") from error
    if not rows:
        raise ValueError(f"the manifest {path} is empty: give it a line for each image")
    return rows


def of_cells(row: dict[str, Any]) -> dict[str, Any]:
    """What the cells of a .csv say, paths and words as they are; empty ones are left out."""
    fields = {name: cell for name, cell in row.items() if cell}
    for name in fields.keys() - {"image", "name", *CHOICES}:
        with suppress(TypeError, ValueError):
            fields[name] = json.loads(fields[name])
    return fields


def checked_row(fields: Any, folder: Path) -> Row:
    if not isinstance(fields, dict):
        raise ValueError(f"{shown(fields)} is no object of settings")
    own = {name: value for name, value in fields.items() if value is not None}
    image, name = own.pop("image", ""), own.pop("name", "")
    if not isinstance(image, str) or not isinstance(name, str) or not image:
        raise ValueError(f"image is {shown(image)} and name {shown(name)}; need the path of an image and a file's name")
    for key, value in own.items():
        if key == "sigmas":
            from .pipeline import checked_sigmas

            own[key] = checked_sigmas(key, value).tolist()
        elif key in SETTINGS or key in CHOICES:
            own[key] = check(key, value)
        else:
            raise ValueError(f"{shown(key)} is no setting; use image, name, sigmas, {', '.join((*SETTINGS, *CHOICES))}")
    return folder / image, name, own


def naming(output: Path, template: str | None, default: str, images: int, seeds: int) -> tuple[Path, str]:
    """The folder that the videos go to, and the template of their names in it.

    `template` itself, in the folder `output`; or if it is None, `default` in that folder; or `output` if it is none.
    Raises ValueError for a template that no video, or only one of several, could be named by, and FileNotFoundError for
    one without its folder.
    """
    folder, remedy = output, ""
    if template is not None:
        if not template or Path(template).name != template:
            raise ValueError(f"--name-template is {template!r}; need the name of a file, whose folder is that of -o")
        if not output.is_dir():
            raise FileNotFoundError(f"there is no folder {output} to name videos in: create it first")
    elif output.is_dir():
        template = default
    else:
        folder, template, remedy = Path(), str(output), "give an existing folder, or "
    for placeholder in re.findall(r"\{[^{}]*\}", Path(template).name):
        if placeholder not in PLACEHOLDERS:
            raise ValueError(f"{placeholder} in {template} means nothing: use {', '.join(PLACEHOLDERS)}")
    if images > 1 and "{stem}" not in template:
        raise ValueError(f"{template} is one name for {images} images: {remedy}put {{stem}} in it")
    if seeds > 1 and "{seed}" not in template and "{index}" not in template:
        raise ValueError(f"{template} is one name for {seeds} seeds: {remedy}put {{seed}} in it")
    return folder, template


def plan(rows: list[Row], seeds: list[int], folder: Path, template: str) -> list[Job]:
    """What is asked for, row by row and seed by seed. A row's own name is the template of its videos in the folder.

    Raises what `check_output` raises, and ValueError where a video would replace another, one of the images, or lie
    outside of its folder.
    """
    jobs, taken, sources = [], set(), {image.resolve() for image, _, _ in rows}
    for image, name, own in rows:
        for index, seed in enumerate([own["seed"]] if "seed" in own else seeds):
            path = folder / fill(name or template, stem=image.stem, seed=seed, index=index)
            if name and path.resolve().parent != folder.resolve():
                raise ValueError(f"{path} does not lie in {folder}: give the name of a file alone")
            if not is_written(path):
                check_output(path)
            if path in taken:
                raise ValueError(f"two images would be written to {path}: rename one, or run them one by one")
            if path.resolve() in sources:
                raise ValueError(f"{path} is one of the images: choose another output")
            taken.add(path)
            settings = {key: value for key, value in own.items() if key != "seed"}
            jobs.append(Job(str(image), seed, str(path), settings))
    return jobs


def fill(template: str, **values: object) -> str:
    """`template` with each {name} replaced by its value, at once, so that a value with braces stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda match: str(values.get(match[1], match[0])), template)


# --- what is there ------------------------------------------------------------------------------------------------


def record_of(path: Path) -> Path:
    """Where the record of a video lies."""
    return path.with_name(f"{path.name}.json")


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, or of those of the files in a folder, one after another."""
    sha = hashlib.sha256()
    for part in sorted(path.iterdir()) if path.is_dir() else [path]:
        with open(part, "rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()


def state(path: Path, made: dict[str, Any]) -> str:
    """What is at `path`: nothing ("new"); a video with a record that says `made`, of these very bytes ("finished") or
    of others ("broken"); or one of other settings, or without a record ("different")."""
    if not is_written(path):
        return "broken" if path.is_file() else "new"
    try:
        record = json.loads(record_of(path).read_bytes())
        if record["made"] != made:
            return "different"
        return "finished" if record["video_sha256"] == digest(path) else "broken"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return "different"


def write_record(path: Path, content: dict[str, Any]) -> None:
    """The record of the video at `path`, whole or not at all, as the video."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name[:100]}-") as temporary:
        part = Path(temporary) / "record.json"
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(part, record_of(path))


def prepare(
    args: Namespace, dtype: str, explain: Callable[[Exception], str], tell: Callable[[str], None]
) -> tuple[list[Job], dict[str, Any]]:
    """What a command line of `minisvd generate` leaves to be made, and what --json says of all of it.

    What is wrong with a setting, a name or the model is raised; an image that is none fails alone, if there are others.
    """
    from .checkpoint import resolve
    from .images import open_image
    from .pipeline import PER_IMAGE, check_settings

    rows, listed = [(i, "", {}) for i in find_images(args.image)], read_manifest(args.manifest) if args.manifest else []
    if not rows + listed:
        raise ValueError("there is nothing to make: name an image, a folder of images, or a --manifest")
    seeds, default = (args.seeds, "{stem}-{seed}.mp4") if args.seeds else ([args.seed or 0], "{stem}.mp4")
    template = default if args.manifest and args.name_template is None else args.name_template
    unnamed = len(rows) + sum(not name for _, name, _ in listed)
    folder, template = naming(args.output, template, default, unnamed, len(seeds))
    jobs = plan(rows + [(image, name or template, own) for image, name, own in listed], seeds, folder, template)
    given: dict[str, Any] = {
        name: getattr(args, name) for name in ("sigmas", *SETTINGS, *CHOICES) if name not in ("seed", "zoom")
    }
    given = {name: value[0] if name in PER_IMAGE else value for name, value in check_settings(**given).items()}
    given |= {"sigmas": args.sigmas and given["sigmas"].tolist(), "zoom": args.zoom}
    check_zoom(args.zoom, args.size or (1, 1))

    there = [args.skip_existing and is_written(Path(job.path)) for job in jobs]
    states, tasks, made, bad = ["exists" if here else "new" for here in there], [], {"dtype": dtype}, {}
    if not all(there):
        weights = resolve(args.model, variant=args.variant, revision=args.revision, offline=args.offline)
        preset = asdict(weights.generation)
        given = {name: preset.get(name) if value is None else value for name, value in given.items()}
        files = {} if args.no_sidecar else {path: digest(path) for path in set(weights.files.values())}
        made |= {"vcut": weights.configs["unet"].vcut if args.vcut is None else VCUT[args.vcut]}
        made |= {"weights": {part: files.get(path) for part, path in weights.files.items()}}
    for i, job in enumerate(jobs):
        if there[i]:
            continue
        settings, image, path = given | job.settings, Path(job.image), Path(job.path)
        check_zoom(settings["zoom"], settings["size"])
        used = {name: value for name, value in settings.items() if name != "decode_chunk"} | made | {"seed": job.seed}
        if not args.no_sidecar:
            used = json.loads(json.dumps(used | {"image": digest(image) if image.is_file() else None}))
            states[i] = state(path, used)
        if states[i] != "finished":
            check_output(path)  # what is to be replaced, too
            tasks.append(job._replace(settings=settings, made=used))
    for image in dict.fromkeys(job.image for job in tasks):
        try:
            open_image(image)
        except (OSError, ValueError) as error:
            if args.fail_fast or len(jobs) == 1:
                raise
            bad[image] = explain(error)
            tell(f"minisvd: error: {bad[image]}")
    if set(states) != {"new"}:
        counts = [f"{states.count(name)} {what}" for name, what in STATES.items() if name in states]
        tell(f"minisvd: of {len(jobs)} videos {', '.join(counts)}")
    report = {"model": args.model} | ({"seeds": seeds} if args.seeds else {"seed": seeds[0]})
    report |= {"frames" if name == "num_frames" else name: value for name, value in given.items()}
    failed = [{**job._asdict(), "error": bad[job.image]} for job in tasks if job.image in bad]
    report["failed"] = [{k: end[k] for k in ("image", "seed", "path", "error")} for end in failed]
    report["skipped"] = [job.path for job, found in zip(jobs, states, strict=True) if found in ("exists", "finished")]
    return [job for job in tasks if job.image not in bad], report
