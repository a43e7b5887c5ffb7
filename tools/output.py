"""What the programs write, and how: files that are whole or absent, strict JSON, Markdown tables, pictures, plots."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:  # torch takes seconds to import, and tables need none
    from torch import Tensor


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write to the yielded temporary path; it takes the place of `path` only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any, indent: int = 1) -> None:
    """Strict JSON: what is not finite (nothing to measure, or equal pictures) is null."""

    def strict(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strict(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [strict(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with atomic(path) as temporary:
        temporary.write_text(json.dumps(strict(content), indent=indent, allow_nan=False) + "\n")


def table(titles: Sequence[str], sides: str, rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; `sides` has an l or an r for each column, where its cells are to stand."""
    rule = "".join({"l": "---|", "r": "--:|"}[side] for side in sides)
    return "\n".join([table_row(titles), f"|{rule}", *map(table_row, rows)])


def table_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def as_image(pixels: Tensor, zoom: int = 1) -> Image.Image:
    """Pixels [h,w,3] in [0,1] as a picture, each pixel a square of `zoom`."""
    image = Image.fromarray((pixels * 255).round().byte().numpy())
    return image.resize((zoom * image.width, zoom * image.height), Image.Resampling.NEAREST)


def save_png(image: Image.Image, path: Path) -> None:
    with atomic(path) as temporary:
        image.save(temporary, "PNG")


def plotting() -> Any:
    """matplotlib's Figure, which draws without a display. ImportError, with the remedy, if matplotlib is not there."""
    try:
        from matplotlib.figure import Figure  # an extra, and slow to import: only who plots pays
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'minisvd[study]'") from error
    return Figure
