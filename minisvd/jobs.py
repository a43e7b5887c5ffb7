"""Which videos a command line asks for, and where each goes: images and seeds, names, and what is there already."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from .video import check_output, is_written

PLACEHOLDERS = ("{stem}", "{seed}", "{index}")  # in a video's name: of the image's; the seed; its place in --seeds


class Job(NamedTuple):
    """A video to make, and where it goes."""

    image: Path
    seed: int
    path: Path


def find_images(given: list[Path]) -> list[Path]:
    """`given`, with each folder replaced by the images in it, sorted: files with an extension that Pillow opens.

    Hidden files are left out, folders inside are not searched. Raises FileNotFoundError for a folder without images.
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
        images += found or [path]
    return images


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


def plan(
    images: list[Path], seeds: list[int], folder: Path, template: str, skip_existing: bool
) -> tuple[list[Job], list[Job]]:
    """What is to be made, image by image and seed by seed, and what is there already, if that is to be skipped.

    Raises what `check_output` raises, and ValueError where a video would replace another or one of the images.
    """
    jobs, skipped, taken, sources = [], [], set(), {image.resolve() for image in images}
    for image in images:
        for index, seed in enumerate(seeds):
            path = folder / fill(template, stem=image.stem, seed=seed, index=index)
            there = skip_existing and is_written(path)
            if not there:
                check_output(path)
            if path in taken:
                raise ValueError(f"two images would be written to {path}: rename one, or run them one by one")
            if path.resolve() in sources:
                raise ValueError(f"{path} is one of the images: choose another output")
            taken.add(path)
            (skipped if there else jobs).append(Job(image, seed, path))
    return jobs, skipped


def fill(template: str, **values: object) -> str:
    """`template` with each {name} replaced by its value, at once, so that a value with braces stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda match: str(values.get(match[1], match[0])), template)
