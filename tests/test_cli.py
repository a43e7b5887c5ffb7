"""Theorem: the command line writes what `minisvd.load(...)(image)` gives, or says in one line why it writes nothing."""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import minisvd
from minisvd import StableVideoDiffusion
from minisvd import video as video_module
from minisvd.cli import main
from minisvd.pipeline import FAMILIAR
from minisvd.sampler import ays_sigmas
from tools.tiny import scenes

SMALL = minisvd.load("tiny")
FAST = ("--device", "cpu", "--frames", "2", "--steps", "1", "--size", "64x64")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A 40x30 picture of noise, the only thing in its folder."""
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return path


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line on stderr with which `argv` is refused: status 2, nothing on stdout, no new file."""
    before = sorted(Path().rglob("*"))
    try:
        status = main([str(argument) for argument in argv])
    except SystemExit as exit:  # argparse leaves this way
        status = exit.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, ""), err
    assert err.startswith("minisvd: error: ")
    assert err.count("\n") == 1, err
    assert sorted(Path().rglob("*")) == before
    return err


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- what works -----------------------------------------------------------------------------------------------------


def test_generate_writes_what_the_library_gives(
    tiny_folder: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same frames, byte for byte, as `load(folder)(photo, ...)`; the path alone on stdout; another seed differs."""
    svd = minisvd.load(tiny_folder)
    settings: dict[str, Any] = {"num_frames": 2, "steps": 1, "size": (64, 64), "fps": 5, "guidance": (1.0, 2.0)}
    settings |= {"motion_bucket": 9, "noise_aug": 0.1, "fit": "pad", "decode_chunk": 1, "progress": False}
    expected = svd(photo, seed=3, **settings).numpy()
    other = svd(photo, seed=4, **settings).numpy()
    flags = ("--fps", "5", "--guidance", "1", "2", "--motion-bucket", "9", "--noise-aug", "0.1", "--fit", "pad")
    flags += ("--decode-chunk", "1", "--seed", "3", "--model", str(tiny_folder))
    assert main(["generate", str(photo), "-o", "frames", *FAST, *flags]) == 0
    written = np.stack([np.asarray(Image.open(path)) for path in sorted(Path("frames").iterdir())])
    assert np.array_equal(written, expected)
    assert not np.array_equal(written, other)
    assert capsys.readouterr().out == "frames\n"


@pytest.mark.slow
def test_noise_levels_and_where_they_are_guided_are_settings_too(
    tiny_folder: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--schedule ays --steps 10` and its levels as `--sigmas` are one video; the JSON says which; others differ."""
    levels = [str(level) for level in ays_sigmas(2).tolist()]
    asked = [["--schedule", "ays", "--steps", "2"], ["--sigmas", *levels], ["--steps", "2"]]
    asked += [["--steps", "2", "--guidance-interval", "1", "1000"], ["--steps", "2", "--cut-step", "2"]]
    frames, reports = [], []
    for i, flags in enumerate(asked):
        model = ["--model", str(tiny_folder), "--frames", "2", "--size", "64x64", "--json"]
        assert main(["generate", str(photo), "-o", f"frames-{i}", *model, *flags]) == 0
        frames.append([path.read_bytes() for path in sorted(Path(f"frames-{i}").iterdir())])
        reports.append(json.loads(capsys.readouterr().out))
    ays, same, karras, inside, cut = frames
    assert ays == same != karras
    assert inside == cut != karras
    assert [reports[0]["schedule"], reports[2]["schedule"]] == ["ays", "karras"]
    assert reports[1]["sigmas"] == ays_sigmas(2).tolist()
    assert main(["generate", str(photo), "-o", "no.mp4", "--sigmas", "1", "2", "0"]) == 2
    assert "need at least two finite levels that fall strictly to 0" in capsys.readouterr().err


def test_json_is_one_object_that_says_how_to_do_it_again(
    tiny_folder: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several images go into a folder as STEM.mp4; stdout is one JSON object whose settings are those that were used,
    the model's own where none was given.
    """
    photo.with_name("other.png").write_bytes(photo.read_bytes())
    Path("out").mkdir()
    images = ["photo.png", "other.png"]
    argv = ["generate", *images, "-o", "out", "--model", str(tiny_folder), "--json", *FAST, "--cut-step", "1"]
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(video["image"], video["path"]) for video in report["videos"]] == [
        ("photo.png", "out/photo.mp4"),
        ("other.png", "out/other.mp4"),
    ]
    assert all(Path(video["path"]).stat().st_size > 500 for video in report["videos"])
    generation = minisvd.load(tiny_folder).generation
    expected = {"model": str(tiny_folder), "device": "cpu", "dtype": "float32", "seed": 0, "frames": 2, "steps": 1}
    expected |= {"fps": 7, "motion_bucket": 127, "noise_aug": 0.02, "guidance": list(generation.guidance)}
    expected |= {"cut_step": 1, "stage2": "mean", "size": [64, 64], "fit": "crop"}
    assert {key: report[key] for key in expected} == expected
    assert report["seconds"] >= sum(video["seconds"] for video in report["videos"]) > 0
    assert report["versions"]["minisvd"] == minisvd.__version__


@pytest.mark.slow
@pytest.mark.parametrize(
    ("output", "written"), [("clip.gif", "clip.gif"), ("{stem}-a.webp", "photo-a.webp"), ("old", "old/photo.mp4")]
)
def test_one_image_goes_where_it_is_sent(
    tiny_folder: Path, photo: Path, capsys: pytest.CaptureFixture[str], output: str, written: str
) -> None:
    """To a file, to a name with its stem, into a folder that exists; no bar is drawn where nobody looks."""
    Path("old").mkdir()
    assert main(["generate", photo.name, "-o", output, "--model", str(tiny_folder), *FAST]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{written}\n"
    assert captured.err == ""
    assert Path(written).is_file()


def test_info_counts_the_parameters(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the modules do; JSON and text agree."""
    svd = minisvd.load(tiny_folder)
    assert main(["info", "--model", str(tiny_folder), "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"] == {
        name: sum(p.numel() for p in part.parameters())
        for name, part in (("unet", svd.unet), ("vae", svd.vae), ("clip", svd.clip))
    }
    assert (report["layout"], report["dtype"], report["source"]) == ("folder", "float32", str(tiny_folder))
    assert main(["info", "--model", str(tiny_folder), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert all(f"{number:,} parameters" in text for number in report["parameters"].values())


@pytest.mark.slow
def test_bars_are_drawn_on_a_terminal_and_never_beside_json(
    tiny_folder: Path, photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    argv = ["generate", photo.name, "-o", "clip.gif", "--model", str(tiny_folder), *FAST]
    assert main(argv) == 0
    assert "denoising" in capsys.readouterr().err
    assert main([*argv, "--json", "-o", "other.gif"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["verify", "--model", str(tiny_folder), "--json"]) == 0
    assert capsys.readouterr().err == ""


def test_columns_of_info_are_apart_and_verify_fits_80_columns(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "--model", str(tiny_folder), "--device", "cpu"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert "decode_chunk  2" in rows
    assert all(len(row.split()) > 1 for row in rows)
    assert main(["verify", "--model", str(tiny_folder)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.slow
def test_zoom_makes_each_pixel_a_square(tiny_folder: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--zoom 3` is the same video, nearest neighbours; what is no zoom is refused before any work."""
    argv = ["generate", photo.name, "--model", str(tiny_folder), *FAST]
    assert main([*argv, "-o", "plain"]) == 0
    assert main([*argv, "-o", "large", "--zoom", "3"]) == 0
    capsys.readouterr()
    plain, large = (np.asarray(Image.open(f"{folder}/frame_0001.png")) for folder in ("plain", "large"))
    assert np.array_equal(large, plain.repeat(3, axis=0).repeat(3, axis=1))
    assert not np.array_equal(large[:64, :64], plain)  # control
    for zoom, sentence in (("0", "zoom is 0"), ("129", "zoom is 129, for a side of 8256 pixels; need at most 128")):
        assert sentence in refusal(capsys, *argv, "-o", "other", "--zoom", zoom)


@pytest.mark.slow
def test_the_small_model_says_what_it_is_to_pictures_that_it_does_not_know(
    photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line for a picture of noise, none for its own example, and none from another model."""
    example = Path(minisvd.__file__).parents[1] / "weights/tiny/example.png"
    fast = ("--device", "cpu", "--frames", "1", "--steps", "1")
    assert main(["generate", photo.name, "-o", "a.gif", *fast]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("minisvd: photo.png is not what the small model knows")
    assert "--model svd-xt, the official weights" in said
    assert main(["generate", str(example), "-o", "b.gif", *fast]) == 0
    assert capsys.readouterr().err == ""
    assert main(["generate", photo.name, "-o", "c.gif", "--model", str(example.parent), *fast]) == 0
    assert capsys.readouterr().err == said


@pytest.mark.slow
def test_scenes_are_known_to_the_small_model() -> None:
    """Each of 24; the same pictures with their pixels shuffled are not."""
    rng = np.random.default_rng(5)
    drawn = [scenes.random_clip(rng)[3][0] for _ in range(24)]
    known = [SMALL.familiarity(torch.from_numpy(scenes.to_unit(frame[None]))) >= FAMILIAR for frame in drawn]
    assert all(known)
    shuffled = [rng.permutation(frame.reshape(3, -1), axis=1).reshape(frame.shape) for frame in drawn[:4]]
    known = [SMALL.familiarity(torch.from_numpy(scenes.to_unit(frame[None]))) >= FAMILIAR for frame in shuffled]
    assert not any(known)


def test_a_strange_setting_warns_once(tiny_folder: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Motion bucket 300 works and says so on stderr, in one line, although it is checked before and after loading."""
    argv = ["generate", photo.name, "-o", "clip.mp4", "--model", str(tiny_folder), *FAST, "--motion-bucket", "300"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [])
        assert main(argv) == 0
    err = capsys.readouterr().err
    assert err.count("minisvd: warning: motion_bucket is 300") == 1
    assert Path("clip.mp4").is_file()


# --- what a user can get wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("generate photo.png -o clip.avi", "cannot write clip.avi: use .mp4, .gif or .webp"),
        ("generate photo.png -o none/clip.mp4", "the folder none does not exist"),
        ("generate photo.png -o photo.png", "cannot write photo.png: use .mp4"),
        ("generate moving.gif -o moving.gif", "moving.gif is one of the images"),
        (
            "generate photo.png text.png -o clip.mp4",
            "two videos would be written to clip.mp4: give a folder, or add {stem} and {seed}",
        ),
        ("generate photo.png photo.png -o {stem}.mp4", "two videos would be written to photo.mp4"),
        ("generate none.png -o clip.mp4", "no image at none.png"),
        ("generate text.png -o clip.mp4", "text.png is not an image"),
        ("generate photo.png text.png -o . --fail-fast", "text.png is not an image"),
        ("generate . -o clip.mp4", "two videos would be written to clip.mp4"),
        ("generate -o clip.mp4", "there is nothing to make: name an image, a folder of images, or a --manifest"),
        ("generate photo.png --output= ", "one of the arguments is empty: give it a value, or leave it out"),
        ("generate photo.png -o clip.mp4 --guidance 3e0 -1e0", "guidance is [3.0, -1.0]; need 2 numbers"),
        ("generate photo.png", "the following arguments are required: -o/--output"),
        ("generate photo.png -o clip.mp4 --size 64", "'64' is not WIDTHxHEIGHT in pixels, such as 1024x576"),
        ("generate photo.png -o clip.mp4 --size -64x64", "'-64x64' is not WIDTHxHEIGHT in pixels"),
        ("generate photo.png -o clip.mp4 --size 0x64", "size is (0, 64)"),
        ("generate photo.png -o clip.mp4 --size 64x1000000", "size is (64, 1000000)"),
        ("generate photo.png -o clip.mp4 --seed -1", "'-1' is not a whole number from 0"),
        ("generate photo.png -o clip.mp4 --seed 99999999999999999999", "is not a whole number from 0"),
        ("generate photo.png -o clip.mp4 --frames 0", "num_frames is 0"),
        ("generate photo.png -o clip.mp4 --steps 0", "steps is 0"),
        ("generate photo.png -o clip.mp4 --steps x", "invalid int value: 'x'"),
        ("generate photo.png -o clip.mp4 --decode-chunk 0", "decode_chunk is 0"),
        ("generate photo.png -o clip.mp4 --fps 1", "fps is 1"),
        ("generate photo.png -o clip.mp4 --motion-bucket -1", "motion_bucket is -1"),
        ("generate photo.png -o clip.mp4 --noise-aug nan", "noise_aug is nan"),
        ("generate photo.png -o clip.mp4 --guidance 3 1", "3"),
        ("generate photo.png -o clip.mp4 --cut-step 0", "cut_step"),
        ("generate photo.png -o clip.mp4 --stage2 both", "--stage2: invalid choice: 'both'"),
        ("generate photo.png -o clip.mp4 --fit cover", "--fit: invalid choice: 'cover'"),
        ("generate photo.png -o clip.mp4 --frame 3", "unrecognized arguments: --frame 3"),
        ("generate photo.png -o clip.mp4 --device gpu", "device 'gpu' cannot be used on this machine: use cpu"),
        ("generate photo.png -o clip.mp4 --device cuda:99", "device 'cuda:99' cannot be used on this machine"),
        ("generate photo.png -o clip.mp4 --device meta", "device 'meta' cannot be used on this machine"),
        ("generate photo.png -o clip.mp4 --dtype int8", "--dtype: invalid choice: 'int8'"),
        ("generate photo.png -o clip.mp4 --device cpu --model ./none", "./none"),
        ("info --device cpu --model ./none", "./none"),
        ("frobnicate", "invalid choice: 'frobnicate'"),
        ("", "the following arguments are required: COMMAND"),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: str, says: str
) -> None:
    """Status 2, the value and the remedy; nothing is written, and no weight is read: loading would raise here."""
    Image.open(photo).save("moving.gif")
    Path("text.png").write_text("no image")
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("loaded"))
    assert says in refusal(capsys, *argv.split())


def test_what_only_the_model_knows_is_refused_too(
    tiny_folder: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A size that is no multiple of this model's stride; a video that no memory holds."""
    model = ("--model", tiny_folder, *FAST)
    assert "size is 64x72" in refusal(capsys, "generate", photo.name, "-o", "clip.mp4", *model, "--size", "64x72")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableVideoDiffusion, "sample", lambda *_, **__: torch.empty(2**60))
        err = refusal(capsys, "generate", photo.name, "-o", "c.mp4", *model)
    assert "out of memory: try --low-memory" in err


def test_a_bug_keeps_its_traceback(tiny_folder: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: an error that no user can cause is not dressed up as one."""

    def bug(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setitem(video_module.WRITERS, ".mp4", bug)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(["generate", photo.name, "-o", "clip.mp4", "--model", str(tiny_folder), *FAST])


def test_ctrl_c_while_writing_leaves_the_old_video(
    tiny_folder: Path, photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 130, no traceback, the old file untouched and no new one."""

    def interrupted(_: object, path: Path) -> None:
        path.write_bytes(b"half a video")
        raise KeyboardInterrupt

    Path("clip.mp4").write_bytes(b"the old video")
    monkeypatch.setitem(video_module.WRITERS, ".mp4", interrupted)
    assert main(["generate", photo.name, "-o", "clip.mp4", "--model", str(tiny_folder), *FAST]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("minisvd: interrupted\n")
    assert "Traceback" not in err
    assert Path("clip.mp4").read_bytes() == b"the old video"
    assert sorted(os.listdir()) == ["clip.mp4", "photo.png"]


# --- as a program ---------------------------------------------------------------------------------------------------


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    """`minisvd --version`, alone on stdout."""
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr() == (f"minisvd {minisvd.__version__}\n", "")


def run(argv: list[Any], **options: Any) -> subprocess.CompletedProcess:
    """`python -m minisvd` as a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(Path(minisvd.__file__).parents[1])} | options.pop("env", {})
    return subprocess.run([sys.executable, "-m", "minisvd", *argv], env=environment, timeout=200, **options)


@pytest.mark.posix
@pytest.mark.slow
@pytest.mark.parametrize("stderr", ["closed", "/dev/full"])
def test_a_stderr_that_takes_nothing_ends_no_run(tiny_folder: Path, photo: Path, stderr: str) -> None:
    """With a warning to say, the video is made all the same, and its name alone is on stdout."""
    argv = ["generate", photo.name, "-o", "clip.mp4", "--model", tiny_folder, *FAST, "--motion-bucket", "300"]
    if stderr == "closed":
        done = run(argv, stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2))
    else:
        with open(stderr, "w") as full:
            done = run(argv, stdout=subprocess.PIPE, stderr=full)
    assert (done.returncode, done.stdout) == (0, b"clip.mp4\n")
    assert Path("clip.mp4").stat().st_size > 500


@pytest.mark.posix
@pytest.mark.slow
def test_a_name_that_the_terminal_cannot_spell_is_escaped(tiny_folder: Path, photo: Path) -> None:
    """The video has the name, and stdout, which is ASCII, an escape of it: status 0."""
    argv = ["generate", photo.name, "-o", "\u0416\udcff.gif", "--model", tiny_folder, *FAST]
    done = run(argv, capture_output=True, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\u0416\\udcff.gif\n", b"")
    assert Path("\u0416\udcff.gif").is_file()


@pytest.mark.slow
@pytest.mark.posix
def test_a_reader_that_goes_is_no_mistake() -> None:
    """As in `minisvd account --tree | head -1`: status 141, which is that of others in a pipe, and not a word."""
    reader, writer = os.pipe()
    os.close(reader)
    done = run(["account", "--tree"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.slow
def test_ctrl_c_while_the_program_is_still_being_imported_is_one_line() -> None:
    """Status 130, as later. Control: an import that is not interrupted."""
    code = """import sys, minisvd.__main__
class Finder:
    @staticmethod
    def find_spec(name, *_):
        if name == {name!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder)
sys.argv = ["minisvd", "account"]
sys.exit(minisvd.__main__.main())"""
    environment = os.environ | {"PYTHONPATH": str(Path(minisvd.__file__).parents[1])}
    for name, ends in (("minisvd.cli", (130, "minisvd: interrupted\n")), ("none", (0, ""))):
        argv = [sys.executable, "-c", code.format(name=name)]
        done = subprocess.run(argv, capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stderr) == ends


@pytest.mark.posix
@pytest.mark.slow
def test_a_real_ctrl_c_while_sampling_ends_with_130(tiny_folder: Path, photo: Path) -> None:
    """`python -m minisvd`, SIGINT in the middle of 100,000 steps: status 130, no traceback, nothing written."""
    argv = ["generate", photo.name, "-o", "clip.mp4", "--model", str(tiny_folder), *FAST, "--steps", "100000"]
    environment = os.environ | {"PYTHONPATH": str(Path(minisvd.__file__).parents[1])}
    import fcntl  # there are no terminals like these on Windows
    import termios

    terminal, stderr = os.openpty()  # no bar would say that sampling began, were it no terminal, of a size
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "minisvd", *argv],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=stderr,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background would ignore it
    )
    os.close(stderr)  # so that reading ends with the process
    err, interrupted = "", False
    with contextlib.suppress(OSError):  # how Linux says that nobody writes to a terminal any more
        while data := os.read(terminal, 1000):
            err += data.decode(errors="replace")
            if "denoising" in err and not interrupted:
                process.send_signal(signal.SIGINT)
                interrupted = True
    out, _ = process.communicate(timeout=100)
    assert (process.returncode, out) == (130, ""), err
    assert err.endswith("minisvd: interrupted\r\n")
    assert "Traceback" not in err
    assert os.listdir() == ["photo.png"]
