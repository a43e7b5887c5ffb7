"""Tensors as pictures that a notebook shows: frames in a row, maps in grey or heat, several under names."""

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from tools.output import as_image

GAP, LINE = 4, 14  # pixels between pictures, and for a name above one


def strip(frames: Tensor, zoom: int = 1) -> Image.Image:
    """Frames [t,3,h,w] in [0,1] side by side."""
    return as_image(torch.cat(list(frames.permute(0, 2, 3, 1)), dim=1).contiguous(), zoom)


def grey(channel: Tensor, zoom: int = 1) -> Image.Image:
    """A map [h,w], its lowest value black, its highest white."""
    low, high = channel.min(), channel.max()
    return as_image(((channel - low) / (high - low).clamp(min=1e-12))[..., None].expand(-1, -1, 3).contiguous(), zoom)


def heat(weights: Tensor, zoom: int = 1, mark: tuple[int, int] | None = None) -> Image.Image:
    """Weights [h,w] from 0 (dark) to their largest (bright), and a frame around the one at `mark`, (row, column)."""
    share = (weights / weights.max().clamp(min=1e-12)).clamp(0, 1)[..., None]
    dark, warm, bright = (torch.tensor(c) for c in ((0.05, 0.07, 0.16), (0.85, 0.35, 0.10), (1.0, 0.95, 0.75)))
    low = dark + (warm - dark) * (2 * share).clamp(max=1)
    image = as_image((low + (bright - warm) * (2 * share - 1).clamp(min=0)).contiguous(), zoom)
    if mark is not None:
        y, x = mark
        box = (x * zoom, y * zoom, (x + 1) * zoom - 1, (y + 1) * zoom - 1)
        ImageDraw.Draw(image).rectangle(box, outline=(80, 220, 255), width=max(1, zoom // 8))
    return image


def beside(pictures: dict[str, Image.Image], columns: int = 8) -> Image.Image:
    """Pictures under their names, in rows."""
    images = list(pictures.values())
    w = max(max(image.width, 6 * len(name)) for name, image in pictures.items()) + GAP
    h = max(image.height for image in images) + LINE + GAP
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (w * min(columns, len(images)), h * rows), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, image) in enumerate(pictures.items()):
        x, y = i % columns * w, i // columns * h
        draw.text((x, y), name, fill="black")
        sheet.paste(image, (x, y + LINE))
    return sheet
