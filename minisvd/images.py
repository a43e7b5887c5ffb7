"""What a user gives as an image -> the tensor that the model takes, float32 [b,3,h,w] in [-1,1].

Axes: b batch, c = 3 colours (RGB), h w pixels. Sizes are (width, height), as everywhere a user writes one.
"""

from os import PathLike
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from .config import Size, check, shown

Image.init()
RASTER = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")
FORMATS = [name for name in RASTER if name in Image.OPEN]  # not PostScript, which Pillow has another program read
ImageLike = Image.Image | str | Path | np.ndarray | Tensor
Colour = str | tuple[int, ...]


def load_image(image: ImageLike, size: Size, fit: str = "crop", background: Colour = "white") -> Tensor:
    """`image`, brought to `size` (width, height) pixels, as a float32 tensor [b,3,h,w] in [-1,1].

    `image` is one of:
        a path or a Pillow image   any mode; EXIF rotation applied, colour profiles ignored
        an array                   uint8 or uint16 [h,w] or [h,w,c], c = 1 to 4; or float [h,w,3] in [0,1]
        a tensor                   float [3,h,w] or [b,3,h,w] in [-1,1]; it stays on its device

    What is transparent shows `background`, a colour by name or by its RGB bytes. An image of 16 bits is scaled, not
    clipped: white is 65535. Of an animation, the first frame counts.

    `fit` is what happens when the aspect ratio differs: "crop" fills the size and cuts equally from both ends, "pad"
    keeps all of the image between black bars, "stretch" distorts. Pictures are resampled with Lanczos windows, tensors
    and float arrays bicubically, both antialiased. An image that already has the size is taken as it is: byte v becomes
    v / 127.5 - 1.

    ValueError: not an image, an image without pixels, a tensor or array of another type, shape or range.
    FileNotFoundError: no such file.
    """
    check("fit", fit)
    if isinstance(image, np.ndarray) and image.dtype.kind == "f":
        image = _unit_array_to_tensor(image)
    if isinstance(image, Tensor):
        return _fit_tensor(_check_tensor(image), size, fit)
    picture = _fit_picture(open_image(image, background), size, fit)
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)[None].float().contiguous() / 127.5 - 1


def open_image(image: Image.Image | str | Path | np.ndarray, background: Colour = "white") -> Image.Image:
    """A path, Pillow image or array of bytes as an upright RGB picture. See `load_image`."""
    if isinstance(image, Image.Image):
        return _to_rgb(image, background)
    if isinstance(image, np.ndarray):
        return _to_rgb(_array_to_picture(image), background)
    if not isinstance(image, str | PathLike):
        raise ValueError(f"the image is {shown(image)}: give a path, a Pillow image, an array or a tensor")
    path = Path(image)
    if not path.exists():
        raise FileNotFoundError(f"no image at {path}: check the path")
    if not path.is_file():  # a pipe or a device would be waited for
        raise ValueError(f"{path} is {'a folder: name an image in it' if path.is_dir() else 'no file: name an image'}")
    try:
        with Image.open(path, formats=FORMATS) as picture:
            return _to_rgb(picture, background)
    except PermissionError as error:
        raise PermissionError(f"{path} may not be read: check its permissions") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image that Pillow can read: convert it to PNG or JPEG") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path} has too many pixels to be opened safely: shrink it first") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise on broken data
        raise ValueError(f"{path} is damaged or of an unusual kind ({error}): save it again as PNG") from error


def _to_rgb(picture: Image.Image, background: Colour) -> Image.Image:
    if 0 in picture.size:
        raise ValueError(f"the image is {picture.width}x{picture.height}: it has no pixels")
    if picture.mode == "F":
        raise ValueError("the image holds floats (mode F) of unknown range: give a float array [h,w,3] in [0, 1]")
    kind = picture.format  # PNG and PPM have 16 bits where Pillow has 32
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255; or 32, of which a file may use just 8
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"the image holds whole numbers from {values.min()} to {values.max()}: give 8 or 16 bits")
        bytes_ = picture.mode == "I" and kind not in ("PNG", "PPM") and values.max() <= 255
        picture = Image.fromarray(values.astype(np.uint8) if bytes_ else _to_bytes(values))
    canvas = Image.new("RGBA", picture.size, background)
    return Image.alpha_composite(canvas, picture.convert("RGBA")).convert("RGB")


def _array_to_picture(array: np.ndarray) -> Image.Image:
    if array.dtype not in (np.uint8, np.uint16) or array.ndim not in (2, 3):
        raise ValueError(f"the array is {array.dtype} {list(array.shape)}: give uint8 [h,w,3] or float in [0, 1]")
    if 0 in array.shape or (array.ndim == 3 and array.shape[-1] > 4):
        raise ValueError(f"the array has shape {list(array.shape)}: give [h,w] or [h,w,c] with c = 1 to 4")
    array = array[..., 0] if array.shape[2:] == (1,) else array
    return Image.fromarray(_to_bytes(array) if array.dtype == np.uint16 else np.ascontiguousarray(array))


def _to_bytes(sixteen_bits: np.ndarray) -> np.ndarray:
    return np.round(sixteen_bits / 257).astype(np.uint8)  # 65535 = 257 * 255


def _unit_array_to_tensor(array: np.ndarray) -> Tensor:
    if array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape or not (array.min() >= 0 and array.max() <= 1):
        span = f" from {array.min():g} to {array.max():g}" if array.size else ""
        raise ValueError(f"the float array is {list(array.shape)}{span}: give [h,w,3] in [0, 1], or bytes as uint8")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).movedim(-1, 0) * 2 - 1


def _check_tensor(image: Tensor) -> Tensor:
    shape = list(image.shape)
    if not image.is_floating_point() or len(shape) not in (3, 4) or shape[-3] != 3 or 0 in shape:
        raise ValueError(f"the tensor is {image.dtype} {shape}: give a float tensor [3,h,w] or [b,3,h,w] in [-1, 1]")
    low, high = image.min().item(), image.max().item()
    if not (low >= -1 and high <= 1):
        raise ValueError(f"the tensor ranges from {low:g} to {high:g}: bring it to [-1, 1], bytes as v / 127.5 - 1")
    return image.reshape(-1, *shape[-3:]).float()


def _fit_picture(picture: Image.Image, size: Size, fit: str) -> Image.Image:
    box, inner = _geometry(picture.size, size, fit)
    canvas = Image.new("RGB", size, "black")
    canvas.paste(picture.resize(inner, Image.Resampling.LANCZOS, box=box), _centred(inner, size))
    return canvas


def _fit_tensor(image: Tensor, size: Size, fit: str) -> Tensor:
    h, w = image.shape[-2:]
    if (w, h) == tuple(size):
        return image
    (left, top, right, bottom), inner = _geometry((w, h), size, fit)
    image = F.interpolate(image[..., top:bottom, left:right], inner[::-1], mode="bicubic", antialias=True).clamp(-1, 1)
    x, y = _centred(inner, size)
    return F.pad(image, (x, size[0] - inner[0] - x, y, size[1] - inner[1] - y), value=-1.0)


def _geometry(have: Size, want: Size, fit: str) -> tuple[tuple[int, int, int, int], Size]:
    """Which box (left, top, right, bottom) of the image is kept, and the size it is brought to."""
    if fit == "crop":
        scale = min(have[0] / want[0], have[1] / want[1])
        kept = max(1, round(want[0] * scale)), max(1, round(want[1] * scale))
        left, top = _centred(kept, have)
        return (left, top, left + kept[0], top + kept[1]), want
    scale = min(want[0] / have[0], want[1] / have[1])
    inner = (max(1, round(have[0] * scale)), max(1, round(have[1] * scale))) if fit == "pad" else want
    return (0, 0, *have), inner


def _centred(inner: Size, outer: Size) -> Size:
    """Where the top left corner of `inner` lies when it is centred in `outer`."""
    return (outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2
