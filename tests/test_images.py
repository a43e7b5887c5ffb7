"""Theorem: whatever kind of image a user gives, the tensor holds the pixels an eye would see, or a sentence says no."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minisvd.config import CHOICES
from minisvd.images import load_image


def pixels(tensor: torch.Tensor) -> np.ndarray:
    """[1,3,h,w] in [-1,1] -> float bytes [h,w,3]."""
    assert tensor.dtype == torch.float32
    assert tensor.ndim == 4
    assert len(tensor) == 1
    return ((tensor[0] + 1) * 127.5).movedim(0, -1).numpy()


def largest_difference(tensor: torch.Tensor, expected: object) -> float:
    """In bytes."""
    return np.abs(pixels(tensor) - np.asarray(expected, dtype=float)).max().item()


RANDOM = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)  # h=6, w=4


# --- identity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", CHOICES["fit"])
def test_an_image_of_the_right_size_is_taken_as_it_is(tmp_path: Path, fit: str) -> None:
    """Bit for bit v / 127.5 - 1, from a file, a Pillow image, an array and a tensor; one pixel more and it is not."""
    expected = torch.from_numpy(RANDOM).movedim(-1, 0)[None].float() / 127.5 - 1
    Image.fromarray(RANDOM).save(tmp_path / "a.png")
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(RANDOM), RANDOM, expected, expected[0]):
        assert torch.equal(load_image(image, (4, 6), fit), expected)
    other = load_image(RANDOM, (5, 7), fit)
    assert other.shape == (1, 3, 7, 5)
    assert not torch.equal(other[..., :6, :4], expected)


def test_a_batch_stays_a_batch() -> None:
    """[b,3,h,w] comes back as it went in; each row is what it would be alone, also when resampled."""
    batch = torch.rand(3, 3, 6, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(load_image(batch, (4, 6)), batch)
    together = load_image(batch, (8, 8))
    alone = torch.cat([load_image(row, (8, 8)) for row in batch])
    assert torch.equal(together, alone)
    assert not torch.equal(together[0], together[1])


def test_a_float_array_is_the_tensor_it_means() -> None:
    """[h,w,3] in [0,1] becomes 2 v - 1, without a detour through bytes."""
    values = np.random.default_rng(0).random((6, 4, 3))
    expected = torch.from_numpy(values.astype(np.float32)).movedim(-1, 0)[None] * 2 - 1
    assert torch.equal(load_image(values, (4, 6)), expected)
    assert (expected - load_image((values * 255).round().astype(np.uint8), (4, 6))).abs().max() > 1e-3


# --- modes ----------------------------------------------------------------------------------------------------------


def test_grey_is_three_equal_colours() -> None:
    """Modes L and 1, and arrays [h,w] and [h,w,1]."""
    grey = RANDOM[..., 0]
    expected = np.repeat(grey[..., None], 3, -1)
    for image in (Image.fromarray(grey), grey, grey[..., None]):
        assert largest_difference(load_image(image, (4, 6)), expected) < 1e-4
    bits = Image.fromarray((grey > 99).astype(np.uint8) * 255).convert("1", dither=Image.Dither.NONE)
    assert largest_difference(load_image(bits, (4, 6)), 255 * (expected > 99)) < 1e-4


def test_what_is_transparent_shows_the_background() -> None:
    """alpha c + (1 - alpha) background, within one byte: white by default, any colour on request, for RGBA and LA.

    The control drops alpha, as a plain conversion to RGB would.
    """
    alpha = np.linspace(0, 255, 24).round().astype(np.uint8).reshape(6, 4, 1)
    a = alpha / 255.0
    rgba = Image.fromarray(np.concatenate([RANDOM, alpha], -1))
    assert largest_difference(load_image(rgba, (4, 6)), a * RANDOM + (1 - a) * 255) <= 1
    assert largest_difference(load_image(rgba, (4, 6), background="black"), a * RANDOM) <= 1
    blue = np.array((0, 0, 255))
    assert largest_difference(load_image(rgba, (4, 6), background=(0, 0, 255)), a * RANDOM + (1 - a) * blue) <= 1
    grey = np.concatenate([RANDOM[..., :1], alpha], -1)
    for image in (Image.fromarray(grey), grey):
        assert largest_difference(load_image(image, (4, 6)), a * RANDOM[..., :1] + (1 - a) * np.full(3, 255)) <= 1
    assert largest_difference(load_image(rgba.convert("RGB"), (4, 6)), a * RANDOM + (1 - a) * 255) > 50


def test_a_palette_gives_its_colours_and_its_transparency(tmp_path: Path) -> None:
    """Mode P: entry 1 is its colour, entry 0 is marked transparent in the PNG and shows the background."""
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.putdata([0, 1])
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "transparent.png", transparency=0)
    assert largest_difference(load_image(tmp_path / "opaque.png", (2, 1)), [[(0, 0, 0), (200, 100, 50)]]) < 1e-4
    assert largest_difference(load_image(tmp_path / "transparent.png", (2, 1)), [[(255,) * 3, (200, 100, 50)]]) < 1e-4


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    """A gradient 0..65535 becomes 0..255 within half a byte, from PNG, TIFF, mode I and arrays.

    The control is Pillow's own conversion, which clips nearly all of it to white.
    """
    gradient = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    image = Image.fromarray(gradient)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.tiff")
    expected = np.repeat(gradient[..., None] / 257, 3, -1)
    wide = Image.fromarray(gradient.astype(np.int32))
    assert wide.mode == "I"
    for given in (
        image,
        tmp_path / "a.png",
        tmp_path / "a.tiff",
        wide,
        gradient,
        np.repeat(gradient[..., None], 3, -1),
    ):
        assert largest_difference(load_image(given, (8, 8)), expected) <= 0.5 + 1e-4
    assert largest_difference(load_image(wide.convert("L"), (8, 8)), expected) > 200


def test_cmyk_is_ink() -> None:
    """Full cyan takes all red; no ink is white; full black is black."""
    image = Image.new("CMYK", (3, 1))
    image.putdata([(255, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 255)])
    assert largest_difference(load_image(image, (3, 1)), [[(0, 255, 255), (255,) * 3, (0,) * 3]]) < 1e-4


def test_the_camera_was_held_as_exif_says(tmp_path: Path) -> None:
    """Orientation 6 (turn clockwise): the top left pixel goes to the top right, and 4x6 becomes 6x4."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RANDOM).save(tmp_path / "turned.png", exif=exif)
    assert largest_difference(load_image(tmp_path / "turned.png", (6, 4)), np.rot90(RANDOM, -1)) < 1e-4
    assert (pixels(load_image(tmp_path / "turned.png", (6, 4)))[0, -1].round() == RANDOM[0, 0]).all()


def test_of_an_animation_the_first_frame_counts(tmp_path: Path) -> None:
    """A gif of red, then blue, is red."""
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert largest_difference(load_image(tmp_path / "a.gif", (4, 4)), np.full((4, 4, 3), (255, 0, 0))) < 1e-4


# --- geometry -------------------------------------------------------------------------------------------------------


def stripes() -> np.ndarray:
    """48 wide, 16 high: a red, a green and a blue square, side by side."""
    return np.repeat(np.repeat(np.eye(3, dtype=np.uint8)[None] * 255, 16, 1), 16, 0)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_each_fit_keeps_what_it_says(as_tensor: bool) -> None:
    """48x16 to 32x32, away from where colours meet: crop keeps the green middle; pad shows all between black bars;
    stretch shows all at full height. Pictures and tensors agree.
    """
    image = torch.from_numpy(stripes()).movedim(-1, 0) / 127.5 - 1 if as_tensor else stripes()
    crop, pad, stretch = (pixels(load_image(image, (32, 32), fit)) for fit in CHOICES["fit"])
    green, rgb, black = np.array((0, 255, 0)), np.eye(3) * 255, np.zeros(3)
    assert np.abs(crop[:, 8:-8] - green).max() < 1e-3
    assert np.abs(stretch[:, [5, 16, 26]] - rgb).max() < 12  # Lanczos rings; 12 of 255
    assert np.abs(pad[15:17, [5, 16, 26]] - rgb).max() < 12
    assert np.abs(pad[:10] - black).max() < 1e-3
    assert np.abs(pad[-11:] - black).max() < 1e-3
    assert pad[10:21].max(-1).min() > 100  # 32 / 48 * 16 = 10.67 rows of picture, rounded to 11


@pytest.mark.parametrize("as_tensor", [False, True])
def test_crop_and_pad_are_centred_and_keep_squares_square(as_tensor: bool) -> None:
    """A white square in the middle of a wide black picture stays in the middle, and square, under crop and pad; under
    stretch it does not stay square.
    """
    array = np.zeros((40, 80, 3), dtype=np.uint8)
    array[10:30, 30:50] = 255
    image = torch.from_numpy(array).movedim(-1, 0) / 127.5 - 1 if as_tensor else array

    def extent(fit: str) -> tuple[int, int, int, int]:
        rows, columns = np.nonzero(pixels(load_image(image, (64, 64), fit))[..., 0] > 127)
        return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1

    assert extent("crop") == (16, 16, 48, 48)
    assert extent("pad") == (24, 24, 40, 40)
    assert extent("stretch") == (24, 16, 40, 48)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_shrinking_is_antialiased(as_tensor: bool) -> None:
    """White columns, one in eight, shrink to an eighth of white, within 12; reading single pixels gives 0 or 255."""
    array = np.zeros((64, 64, 3), dtype=np.uint8)
    array[:, 3::8] = 255
    image = torch.from_numpy(array).movedim(-1, 0) / 127.5 - 1 if as_tensor else array
    small = load_image(image, (8, 8))
    assert largest_difference(small, np.full((8, 8, 3), 255 / 8)) < 12
    assert np.abs(array[::8, 3::8] - 255 / 8).min() > 200


@pytest.mark.parametrize("fit", CHOICES["fit"])
@pytest.mark.parametrize("have", [(1, 1), (1, 500), (500, 1), (3, 2), (127, 65)])
def test_any_size_fits(have: tuple[int, int], fit: str) -> None:
    """White stays white (but for bars), within [-1,1], at exactly the size asked for; pictures and tensors alike."""
    white = np.full((have[1], have[0], 3), 255, dtype=np.uint8)
    for image in (white, torch.ones(3, have[1], have[0])):
        tensor = load_image(image, (64, 32), fit)
        assert tensor.shape == (1, 3, 32, 64)
        assert tensor.abs().max() <= 1
        assert tensor.max() > 0.999
        assert fit == "pad" or tensor.min() > 0.999


# --- at the door ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"torch.uint8 \[3, 8, 8\]: give a float tensor"),
        (torch.zeros(8, 8, 3), r"\[8, 8, 3\]: give a float tensor \[3,h,w\]"),
        (torch.zeros(8, 8), r"\[8, 8\]: give a float tensor"),
        (torch.zeros(0, 3, 8, 8), r"\[0, 3, 8, 8\]: give a float tensor"),
        (torch.full((3, 8, 8), 255.0), r"from 255 to 255: bring it to \[-1, 1\]"),
        (torch.full((3, 8, 8), torch.nan), "from nan to nan"),
        (np.full((8, 8, 3), 255.0), r"from 255 to 255: give \[h,w,3\] in \[0, 1\]"),
        (np.full((8, 8, 3), -1.0), "from -1 to -1"),
        (np.zeros((3, 8, 8)), r"\[3, 8, 8\] from 0 to 0: give \[h,w,3\]"),
        (np.zeros((3, 8, 8), dtype=np.uint8), r"\[3, 8, 8\]: give \[h,w\] or \[h,w,c\]"),
        (np.zeros((1, 8, 8, 3), dtype=np.uint8), r"\[1, 8, 8, 3\]"),
        (np.zeros((8, 8, 3), dtype=np.int64), "array is int64"),
        (np.zeros((0, 8, 3), dtype=np.uint8), r"\[0, 8, 3\]"),
        (Image.new("RGB", (0, 8)), "0x8: it has no pixels"),
        (Image.new("F", (8, 8)), "mode F"),
    ],
)
def test_what_is_no_image_is_refused(image: object, message: str) -> None:
    """ValueError names type, shape or range, and what to give instead."""
    with pytest.raises(ValueError, match=message):
        load_image(image, (8, 8))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("suffix", [".tiff", ".png", ".pgm"])
def test_32_bits_that_hold_bytes_are_bytes(tmp_path: Path, suffix: str) -> None:
    """A TIFF of int32 from 0 to 255 is what it is as uint8. A PNG or PGM of 16 bits is not: it says what white is."""
    grey = np.arange(64, dtype=np.int32).reshape(8, 8) * 4
    if suffix == ".tiff":
        Image.fromarray(grey).save(tmp_path / "image.tiff")
        Image.fromarray(grey * 200).save(tmp_path / "more.tiff")
        expected, more = grey.astype(np.uint8), np.round(grey * 200 / 257).astype(np.uint8)
        assert torch.equal(load_image(tmp_path / "more.tiff", (8, 8)), load_image(more, (8, 8)))  # control
        for wrong in (grey - 1, grey * 1000):
            Image.fromarray(wrong).save(tmp_path / "wrong.tiff")
            with pytest.raises(ValueError, match="holds whole numbers from"):
                load_image(tmp_path / "wrong.tiff", (8, 8))
    else:
        Image.fromarray(grey.astype(np.uint16)).save(tmp_path / f"image{suffix}")
        expected = np.round(grey / 257).astype(np.uint8)
    assert torch.equal(load_image(tmp_path / f"image{suffix}", (8, 8)), load_image(expected, (8, 8)))


def test_no_program_is_run_for_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript under a picture's name is refused without Ghostscript being asked, which would run what it says."""
    (tmp_path / "photo.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("ran a program"))
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("ran a program"))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    with pytest.raises(ValueError, match=r"photo\.png is not an image"):
        load_image(tmp_path / "photo.png", (8, 8))


@pytest.mark.posix
def test_a_pipe_or_device_is_refused_at_once(tmp_path: Path) -> None:
    """Reading one would wait for whoever writes it, or never end."""
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(ValueError, match="is no file: name an image"):
            load_image(path, (8, 8))


def test_an_unknown_fit_is_refused() -> None:
    """The sentence lists those there are."""
    with pytest.raises(ValueError, match="fit is 'cover'; need one of crop, pad, stretch"):
        load_image(RANDOM, (8, 8), "cover")


def test_a_file_that_is_no_image_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, a folder, text, cut short (PNG, JPEG), too large to be safe: each names the file and the remedy."""
    with pytest.raises(FileNotFoundError, match=r"no image at .*none\.png"):
        load_image(tmp_path / "none.png", (8, 8))
    with pytest.raises(ValueError, match="is a folder: name an image in it"):
        load_image(tmp_path, (8, 8))
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"text\.png is not an image"):
        load_image(tmp_path / "text.png", (8, 8))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("whole.png", "whole.jpg"):
        noise.save(tmp_path / name)
        load_image(tmp_path / name, (8, 8))
        cut = tmp_path / name.replace("whole", "cut")
        cut.write_bytes((tmp_path / name).read_bytes()[:2000])
        with pytest.raises(ValueError, match=rf"{cut.name} is damaged"):
            load_image(cut, (8, 8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)  # Pillow's warning, an error in these tests
    with pytest.raises(ValueError, match=r"whole\.png has too many pixels"):
        load_image(tmp_path / "whole.png", (8, 8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 3)
    with pytest.raises(ValueError, match=r"whole\.png has too many pixels"):
        load_image(tmp_path / "whole.png", (8, 8))

    def forbidden(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", forbidden)  # root may read any file
    with pytest.raises(PermissionError, match=r"whole\.png may not be read: check its permissions"):
        load_image(tmp_path / "whole.png", (8, 8))
