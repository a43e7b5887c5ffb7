"""Theorem: what `Video.save` writes reads back, in another decoder, as what it was given, and is whole or absent."""

import base64
import math
import os
import stat
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from minisvd import video as video_module
from minisvd.video import Video, check_output

NAMES = ("clip.mp4", "clip.gif", "clip.webp", "clip")


def moving_disc(t: int = 5, h: int = 64, w: int = 64) -> torch.Tensor:
    """A soft grey-blue disc that moves over a gradient, far enough for two frames never to be alike."""
    y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
    frames = []
    for i in range(t):
        disc = torch.sigmoid(30 * (0.2 - ((x - 0.2 - 0.6 * i / t) ** 2 + (y - 0.5) ** 2).sqrt()))
        frames.append(torch.stack([x * (1 - disc), y * (1 - disc), 0.5 + 0.4 * disc]))
    return torch.stack(frames)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """10 log10(255^2 / mean squared error), in decibels, of bytes."""
    assert a.shape == b.shape
    return 10 * math.log10(255**2 / np.square(a.astype(float) - b).mean())


def decoded(path: Path) -> np.ndarray:
    """All frames of an mp4 as uint8 [t,h,w,3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def animation(path: Path) -> tuple[np.ndarray, list[int], int]:
    """The frames of a gif or webp as uint8 [t,h,w,3], how long each stays in ms, how often it plays (0: forever)."""
    with Image.open(path) as image:
        pairs = [(np.asarray(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(image)]
    return np.stack([frame for frame, _ in pairs]), [duration for _, duration in pairs], image.info["loop"]


# --- what is written is what was given ------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "fps"), [(5, 7), (1, 7), (4, 29.97), (3, 2)])
def test_mp4_decodes_to_the_same_frames_at_the_same_rate(tmp_path: Path, t: int, fps: float) -> None:
    """Every frame comes back above 35 dB, at the given rate and duration; the control, one frame late, is below 30."""
    video = Video(moving_disc(t), fps)
    path = video.save(tmp_path / "clip.mp4")
    frames = decoded(path)
    quality = psnr(frames, video.numpy())
    assert quality > 35, f"{quality:.1f} dB"
    if t > 1:
        late = psnr(frames[1:], video.numpy()[:-1])
        assert late < 30, f"{late:.1f} dB"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate is not None
        assert float(stream.average_rate) == pytest.approx(fps, abs=1e-3)
        assert stream.duration is not None
        assert stream.time_base is not None
        assert float(stream.duration * stream.time_base) == pytest.approx(t / fps, abs=1e-3)


@pytest.mark.slow
def test_the_same_frames_are_the_same_file(tmp_path: Path) -> None:
    """Byte for byte, 20 times over, in every format: noise that moves, which leaves the encoder most to decide."""
    frames = torch.rand(25, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    video = Video((frames + 3 * moving_disc(25)) / 4, 7)
    once = [video.save(tmp_path / f"{i}.mp4").read_bytes() for i in range(20)]
    assert len(set(once)) == 1
    for name in NAMES[1:3]:
        assert video.save(tmp_path / name).read_bytes() == video.save(tmp_path / f"again-{name}").read_bytes()
    assert Video(video.frames.flip(0), 7).save(tmp_path / "other.mp4").read_bytes() != once[0]  # control


@pytest.mark.posix
@pytest.mark.parametrize("name", ["12:30.mp4", "file:x.mp4", "tee:x.mp4", "concat:a|b.mp4", "pipe:1.mp4", "%d {x}.mp4"])
def test_a_name_is_a_name_and_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Of libav, which knows file:, tee:, pipe: and more: the file lies in the folder under just this name."""
    monkeypatch.chdir(tmp_path)
    Video(moving_disc(2), 7).save(name)
    assert os.listdir() == [name]
    assert len(decoded(tmp_path / name if ":" not in name else (tmp_path / name).rename("plain.mp4"))) == 2


@pytest.mark.parametrize("name", NAMES[1:3])
def test_equal_neighbours_become_one_frame_that_stays_as_long(tmp_path: Path, name: str) -> None:
    """In gif and webp: 6 frames in pairs are 3, and the times add up; mp4 and PNGs keep all 6."""
    video = Video(moving_disc(3).repeat_interleave(2, 0), 10)
    frames, durations, _ = animation(video.save(tmp_path / name))
    assert (len(frames), durations) == (3, [200] * 3)
    assert len(decoded(video.save(tmp_path / "clip.mp4"))) == len(list(video.save(tmp_path / "clip").iterdir())) == 6


def test_mp4_is_of_the_kind_that_browsers_play(tmp_path: Path) -> None:
    """H.264, yuv420p, tagged as limited-range BT.709, with the index (moov) before the pictures (mdat)."""
    path = Video(moving_disc(), 7).save(tmp_path / "clip.mp4")
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.profile) == ("h264", "yuv420p", "High")
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
    data = path.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")


@pytest.mark.parametrize("colour", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (0, 0, 0), (0.5, 0.5, 0.5)])
def test_mp4_luma_is_that_of_bt709(tmp_path: Path, colour: tuple[float, float, float]) -> None:
    """Y = 16 + 219 (0.2126 R + 0.7152 G + 0.0722 B), within one step: the colours are converted as they are tagged.

    BT.601, the usual slip, puts red at 81 instead of 63.
    """
    path = Video(torch.tensor(colour, dtype=torch.float32).reshape(1, 3, 1, 1).expand(2, 3, 16, 16), 7).save(
        tmp_path / "clip.mp4"
    )
    with av.open(str(path)) as container:
        luma = next(container.decode(video=0)).to_ndarray()[:16]
    expected = 16 + 219 * np.dot((0.2126, 0.7152, 0.0722), colour)
    assert np.abs(luma - expected).max() <= 1, (luma.mean(), expected)


def test_mp4_pads_odd_sides_with_their_last_row_and_column(tmp_path: Path) -> None:
    """63x61 becomes 64x62: the picture is where it was, and what is added continues the edge."""
    video = Video(moving_disc(3, h=61, w=63), 7)
    frames = decoded(video.save(tmp_path / "clip.mp4"))
    assert frames.shape == (3, 62, 64, 3)
    assert psnr(frames[:, :61, :63], video.numpy()) > 35
    edge = psnr(frames[:, 61, :63], video.numpy()[:, 60])
    assert edge > 32, f"{edge:.1f} dB"


def test_gif_keeps_frames_times_and_loops(tmp_path: Path) -> None:
    """A 256-colour copy above 30 dB, frame by frame; 7 fps is 14, 15, 14, ... hundredths; it loops forever."""
    video = Video(moving_disc(8), 7)
    frames, durations, loop = animation(video.save(tmp_path / "clip.gif"))
    quality = [psnr(a, b) for a, b in zip(frames, video.numpy(), strict=True)]
    assert min(quality) > 30, quality
    assert sum(durations) == 1140
    assert set(durations) == {140, 150}
    assert loop == 0


@pytest.mark.parametrize(("fps", "milliseconds"), [(2, 500), (10, 100), (50, 20), (100, 20), (240, 20)])
def test_gif_times_are_whole_hundredths_and_at_least_two(tmp_path: Path, fps: float, milliseconds: int) -> None:
    """1/fps where the format can say so; above 50 fps two hundredths, as browsers slow down anything shorter."""
    _, durations, _ = animation(Video(moving_disc(3), fps).save(tmp_path / "clip.gif"))
    assert durations == [milliseconds] * 3


def test_webp_is_lossless(tmp_path: Path) -> None:
    """Equal byte for byte, and no frame starts more than half a millisecond off."""
    video = Video(moving_disc(8), 7)
    frames, durations, loop = animation(video.save(tmp_path / "clip.webp"))
    assert np.array_equal(frames, video.numpy())
    starts = np.cumsum([0, *durations])
    assert np.abs(starts - np.arange(9) * 1000 / 7).max() <= 0.5
    assert loop == 0


def test_folder_holds_the_frames_in_order(tmp_path: Path) -> None:
    """PNGs equal byte for byte, whose names sort as the frames do; the folder may exist, if it is empty."""
    video = Video(moving_disc(12, h=8, w=8), 7)
    (tmp_path / "clip").mkdir()
    folder = video.save(tmp_path / "clip")
    names = sorted(p.name for p in folder.iterdir())
    assert names == [f"frame_{i:04d}.png" for i in range(12)]
    assert np.array_equal(np.stack([np.asarray(Image.open(folder / name)) for name in names]), video.numpy())


def test_bytes_are_the_nearest_to_the_values() -> None:
    """numpy() inverts v / 255 for every byte, in float32 and in float16, of which truncation would lose some."""
    values, half = torch.arange(256) / 255, (torch.arange(256) / 255).half()
    for given in (values, half):
        frames = given.reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
        assert np.array_equal(Video(frames, 7).numpy()[0, ..., 0].ravel(), np.arange(256))
    assert not np.array_equal((half.float() * 255).byte().numpy(), np.arange(256))


# --- whole or absent ------------------------------------------------------------------------------------------------


def breaks_at_call(number: int, function: Callable[..., Any], error: type[BaseException]) -> Callable[..., Any]:
    """`function`, except that its call of that number does its work and then raises."""
    calls = count(1)

    def breaking(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if next(calls) == number:
            raise error("in the middle")
        return result

    return breaking


def break_writer(monkeypatch: pytest.MonkeyPatch, name: str, error: type[BaseException]) -> None:
    """Make the writer of `name` fail: mp4, gif and PNG at the third frame, webp when written but not in place."""
    if name == "clip.mp4":
        from_ndarray = staticmethod(breaks_at_call(3, av.VideoFrame.from_ndarray, error))
        monkeypatch.setattr(video_module.av, "VideoFrame", type("VideoFrame", (), {"from_ndarray": from_ndarray}))
    else:
        method, number = {"clip.gif": ("quantize", 3), "clip.webp": ("save", 1), "clip": ("save", 3)}[name]
        monkeypatch.setattr(Image.Image, method, breaks_at_call(number, getattr(Image.Image, method), error))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("name", NAMES)
def test_a_broken_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: type[BaseException]
) -> None:
    """Failure or Ctrl-C in the middle: no target, no temporary file."""
    break_writer(monkeypatch, name, error)
    with pytest.raises(error, match="in the middle"):
        Video(moving_disc(), 7).save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.posix
@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_leaves_nothing(tmp_path: Path, name: str) -> None:
    """The system refuses to write more than 100 bytes to a file: OSError, no target, no temporary file."""
    import resource  # there is none on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    video = Video(moving_disc(), 7)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            video.save(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_broken_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A good file survives a failed attempt to replace it, byte for byte; an attempt that succeeds replaces it."""
    path = Video(moving_disc(), 7).save(tmp_path / name)
    before = path.read_bytes()
    with monkeypatch.context() as broken:
        break_writer(broken, name, OSError)
        with pytest.raises(OSError, match="in the middle"):
            Video(moving_disc().flip(0), 7).save(path)
    assert path.read_bytes() == before
    Video(moving_disc().flip(0), 7).save(path)
    assert path.read_bytes() != before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", NAMES)
def test_a_written_file_can_be_read_by_those_who_may_read_new_files(tmp_path: Path, name: str) -> None:
    """The permissions are those of any new file, not those of a temporary one."""
    plain = tmp_path / "plain"
    plain.mkdir() if name == "clip" else plain.touch()
    path = Video(moving_disc(), 7).save(tmp_path / name)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


# --- at the door ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip.avi", "clip.mp4.part", "v1.2"])
def test_an_unknown_extension_is_refused_with_those_that_work(tmp_path: Path, name: str) -> None:
    """The sentence names the path and all four ways out."""
    with pytest.raises(ValueError, match=r"\.mp4, \.gif or \.webp, or no extension") as refusal:
        check_output(tmp_path / name)
    assert name in str(refusal.value)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """A missing folder, a folder where a file should go, a file or a full folder where PNGs should go; before work."""
    video = Video(moving_disc(1), 7)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "holiday.png").touch()
    (tmp_path / "dir.mp4").mkdir()
    (tmp_path / "file").touch()
    for attempt in (check_output, video.save):
        wrongs: list[Any] = [5, None, b"clip.mp4"]
        for wrong in wrongs:
            with pytest.raises(ValueError, match=f"cannot write {wrong!r}: give a path"):
                attempt(wrong)
        with pytest.raises(FileNotFoundError, match=r"the folder .*/none does not exist"):
            attempt(tmp_path / "none" / "clip.mp4")
        with pytest.raises(FileExistsError, match="it is a folder"):
            attempt(tmp_path / "dir.mp4")
        for name in ("full", "file"):
            with pytest.raises(FileExistsError, match="not an empty folder"):
                attempt(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dir.mp4", "file", "full"]
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["holiday.png"]


@pytest.mark.posix
def test_a_link_is_followed_and_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A link to a file stays, and its file is the new video; a pipe, a device, a link to nothing: before any work."""
    video = Video(moving_disc(1), 7)
    (tmp_path / "there").mkdir()
    old = tmp_path / "there" / "old.mp4"
    old.write_bytes(b"old")
    (tmp_path / "link.mp4").symlink_to(old)
    assert video.save(tmp_path / "link.mp4") == tmp_path / "link.mp4"
    assert (tmp_path / "link.mp4").is_symlink()
    assert len(decoded(old)) == 1
    os.mkfifo(tmp_path / "pipe.mp4")
    for name in ("nothing.mp4", "nothing"):
        (tmp_path / name).symlink_to(tmp_path / "none")
    before = sorted(tmp_path.rglob("*"))
    for name in ("pipe.mp4", "nothing.mp4", "nothing", "/dev/null"):
        with pytest.raises(
            (FileExistsError, PermissionError), match=r"link to nothing|not an empty folder|in its fold"
        ):
            check_output(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.linux
def test_a_folder_that_nobody_can_write_to_is_refused_by_trying(tmp_path: Path) -> None:
    """/proc, which says to root that it can be written to."""
    with pytest.raises((PermissionError, FileNotFoundError), match=r"cannot write /proc/clip.mp4"):
        check_output("/proc/clip.mp4")
    check_output(tmp_path / "clip.mp4")  # control


def test_only_what_holds_a_video_counts_as_written(tmp_path: Path) -> None:
    """Not an empty file, and no folder without its first frame, such as one that a file manager has looked into."""
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "looked").mkdir()
    (tmp_path / "looked" / ".DS_Store").write_bytes(b"x")
    assert not any(video_module.is_written(tmp_path / name) for name in ("empty.mp4", "looked", "none.mp4", "none"))
    for name in NAMES:
        assert video_module.is_written(Video(moving_disc(2), 7).save(tmp_path / name))


def test_a_folder_without_write_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PermissionError names the folder. (The answer of `os.access` is given, because root may write anywhere.)"""
    check_output(tmp_path / "clip.mp4")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match=f"{tmp_path.name} is not writable"):
        check_output(tmp_path / "clip.mp4")


@pytest.mark.parametrize("name", [*NAMES, "clip.MP4"])
def test_check_output_accepts_what_save_can_write_and_writes_nothing(tmp_path: Path, name: str) -> None:
    """It returns the path and leaves the folder empty; saving there then works."""
    path = check_output(str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []
    assert Video(moving_disc(2), 7).save(path) == path
    assert path.exists()


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (torch.zeros(3, 8, 8), 7, r"\[3, 8, 8\]"),
        (torch.zeros(2, 4, 8, 8), 7, r"\[2, 4, 8, 8\]"),
        (torch.zeros(0, 3, 8, 8), 7, r"\[0, 3, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 7, "torch.uint8"),
        (torch.full((1, 3, 8, 8), 2.0), 7, "from 2 to 2: clamp"),
        (torch.full((1, 3, 8, 8), -0.5), 7, "from -0.5 to -0.5: clamp"),
        (torch.full((1, 3, 8, 8), torch.nan), 7, "nan to nan: give numbers"),
        (torch.zeros(1, 3, 8, 8), 0, "fps is 0"),
        (torch.zeros(1, 3, 8, 8), -7, "fps is -7"),
        (torch.zeros(1, 3, 8, 8), torch.inf, "fps is inf"),
    ],
)
def test_what_is_no_video_is_refused(frames: torch.Tensor, fps: float, message: str) -> None:
    """The constructor names the value."""
    with pytest.raises(ValueError, match=message):
        Video(frames, fps)


# --- in a notebook --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "shown", "pixelated"), [(64, 384, True), (400, 400, False)])
def test_a_notebook_shows_the_mp4_and_enlarges_a_small_one(side: int, shown: int, pixelated: bool) -> None:
    """The page holds the very file that save writes, at a whole multiple of its size."""
    video = Video(moving_disc(2, side, side), 7)
    html = video._repr_html_()
    data = base64.b64decode(html.split("base64,")[1].split('"')[0])
    assert data[4:8] == b"ftyp"
    assert f'width="{shown}" height="{shown}"' in html
    assert ("pixelated" in html) == pixelated
    assert repr(video) == f"Video(2 frames of {side}x{side}, 7 fps, 0.29 s)"
