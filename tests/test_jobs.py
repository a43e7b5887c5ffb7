"""Theorem: a manifest says what each video is made with and writes nowhere but in the folder; one bad image stops no
other; and a second run makes what is not there with the same settings, no more and no less, and says how many of each.
"""

import hashlib
import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minisvd.cli import main
from minisvd.jobs import find_images, read_manifest
from minisvd.video import check_output
from test_cli import FAST, refusal
from test_cli_folder import contents, photos, run  # noqa: F401 (photos is a fixture that all of these use)


def manifest(*rows: dict, name: str = "jobs.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def test_rows_of_a_manifest_are_runs_of_their_own(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit for bit what the same settings give on the command line, which says what a row leaves out; a CSV too."""
    rows = [{"image": "photos/a.png", "name": "slow.gif", "motion_bucket": 9, "guidance": [1, 2]}]
    rows += [{"image": "photos/b.JPG", "seed": 3, "noise_aug": None}, {"image": "photos/a.png"}]
    assert run(tiny_folder, "--manifest", manifest(*rows), "-o", "out", "--seed", "1") == 0
    assert capsys.readouterr().out.splitlines() == ["out/slow.gif", "out/b.mp4", "out/a.mp4"]
    Path("alone").mkdir()
    for argv in (
        ("photos/a.png", "-o", "alone/slow.gif", "--seed", "1", "--motion-bucket", "9", "--guidance", "1", "2"),
        ("photos/b.JPG", "-o", "alone", "--seed", "3"),
        ("photos/a.png", "-o", "alone", "--seed", "1"),
    ):
        assert run(tiny_folder, *argv) == 0
    assert contents("out") == contents("alone")
    assert len(set(contents("out").values())) == 3  # control

    Path("jobs.csv").write_text(
        "image,name,motion_bucket,guidance,seed\n"
        'photos/a.png,slow.gif,9,"[1, 2]",\nphotos/b.JPG,,,,3\nphotos/a.png,,,,\n'
    )
    assert read_manifest(Path("jobs.csv")) == read_manifest(Path("jobs.jsonl"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "there is nothing to make"),
        ("[]", "row 1: [] is no object of settings"),
        ('{"image": "photos/a.png"}\n\n{"image"', "jobs.jsonl, row 2: "),
        ('{"name": "a.mp4"}', "row 1: image is '' and name 'a.mp4'; need a path, and a file's name"),
        ('{"image": 5}', "image is 5"),
        ('{"image": "photos/a.png", "step": 5}', "'step' is no setting; use image, name, sigmas, num_frames"),
        ('{"image": "photos/a.png", "steps": "five"}', "steps is 'five'; need a whole number"),
        ('{"image": "photos/a.png", "fps": [7, 8]}', "fps is [7, 8]"),
        ('{"image": "photos/a.png", "seed": 1e999}', "seed is inf"),
        ('{"image": "photos/a.png", "sigmas": [1, 2]}', "sigmas are [1.0, 2.0]; need at least two"),
        ("[" * 100_000, "row 1: "),
        ("\xff", "is no object of settings"),
        ('{"image": "photos/a.png", "name": "../a.mp4"}', "out/../a.mp4 does not lie in out"),
        ('{"image": "photos/a.png", "name": "/a.mp4"}', "/a.mp4 does not lie in out"),
        ('{"image": "photos/a.png", "name": "inner/a.mp4"}', "out/inner/a.mp4 does not lie in out"),
        ('{"image": "photos/a.png", "name": ".."}', "out/.. does not lie in out"),
        ('{"image": "photos/a.png", "name": "."}', "out does not lie in out"),
        ('{"image": "photos/a.png", "name": "link.mp4"}', "out/link.mp4 does not lie in out"),
        ('{"image": "photos/link.png"}', "out/link.mp4 does not lie in out"),
        ('{"image": "photos/a.png", "name": "a\\u0000.mp4"}', "null"),
        ('{"image": "photos/a.png", "name": "%s.mp4"}' % ("a" * 300), "File name too long"),
        ('{"image": "photos/a.png"}\n{"image": "photos/a.png"}', "two videos would be written to out/a.mp4"),
    ],
)
def test_a_manifest_that_cannot_be_meant_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str, says: str
) -> None:
    """With its row; nothing is written, in the folder or outside of it, and no weight is read."""
    Path("jobs.jsonl").write_text('"\xff"' if text == "\xff" else text, encoding="utf-8")
    Path("elsewhere.mp4").write_bytes(b"a video of someone's")
    Path("out/inner").mkdir()
    os.symlink("../elsewhere.mp4", "out/link.mp4")
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("loaded"))
    assert says in refusal(capsys, "generate", "--manifest", "jobs.jsonl", "-o", "out")
    assert Path("elsewhere.mp4").read_bytes() == b"a video of someone's"


@pytest.mark.posix
def test_links_to_themselves_are_no_images(capsys: pytest.CaptureFixture[str]) -> None:
    """Nor videos, on the command line and in a manifest: one line that names them. Controls: all the other tests."""
    os.symlink("loop.png", "loop.png")
    os.symlink("loop.mp4", "out/loop.mp4")
    name = manifest({"image": "photos/a.png", "name": "loop.mp4"})
    assert "no image at loop.png" in refusal(capsys, "generate", "loop.png", "-o", "again.mp4")
    said = "cannot write out/loop.mp4: it is a pipe, a device or a link to nothing"
    assert said in refusal(capsys, "generate", "--manifest", name, "-o", "out")


def test_where_a_manifest_is_and_goes(capsys: pytest.CaptureFixture[str]) -> None:
    name = manifest({"image": "photos/a.png", "name": "a.mp4"})
    for argv, says in (
        (("--manifest", "none.jsonl", "-o", "out"), "none.jsonl is no .jsonl or .csv file"),
        (("--manifest", "photos", "-o", "out"), "photos is no .jsonl or .csv file"),
        (
            ("--manifest", name, "-o", "new.mp4"),
            "videos cannot be named '{stem}.mp4' in new.mp4: need a file's name, and a folder there",
        ),
    ):
        assert says in refusal(capsys, "generate", *argv)


def test_one_bad_image_stops_no_other(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 1, a line for each that failed, whether before a model is loaded or by what the model cannot do; the
    others are what they are alone. Control: --fail-fast ends at the first.
    """
    rows = [{"image": "photos/none.png"}, {"image": "photos/notes.txt"}, {"image": "photos/a.png"}]
    rows += [{"image": "photos/b.JPG", "size": [64, 72]}]
    argv = ("--manifest", manifest(*rows), "-o", "out", "--json")
    assert run(tiny_folder, *argv, "--fail-fast") == 2
    assert "no image at photos/none.png" in capsys.readouterr().err
    assert os.listdir("out") == []
    assert run(tiny_folder, *argv) == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert [video["path"] for video in report["videos"]] == ["out/a.mp4"]
    assert [Path(video["image"]).name for video in report["failed"]] == ["none.png", "notes.txt", "b.JPG"]
    assert "size is 64x72" in report["failed"][2]["error"]
    assert err.count("minisvd: error: ") == 3
    assert err.endswith("minisvd: of 4 videos 3 failed, 1 made\n")
    assert sorted(os.listdir("out")) == ["a.mp4", "a.mp4.json"]


def test_the_record_says_how_a_video_was_made(tiny_folder: Path) -> None:
    """Every setting, the model's own where none was given; hashes that can be checked; timings. --no-sidecar: none."""
    assert run(tiny_folder, "photos/a.png", "-o", "out", "--fps", "5") == 0
    record = json.loads(Path("out/a.mp4.json").read_text())

    def sha256(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    made = record["made"]
    assert (made["fps"], made["steps"], made["num_frames"], made["size"], made["seed"]) == (5, 1, 2, [64, 64], 0)
    assert made["image"] == sha256(Path("photos/a.png"))
    assert made["weights"]["unet"] == sha256(tiny_folder / "unet/diffusion_pytorch_model.safetensors")
    assert record["video_sha256"] == sha256(Path("out/a.mp4"))
    assert record["versions"]["torch"] == torch.__version__
    assert record["seconds"]["compute"] > 0
    assert run(tiny_folder, "photos/a.png", "-o", "out/plain.mp4", "--fps", "5", "--no-sidecar") == 0
    assert sorted(os.listdir("out")) == ["a.mp4", "a.mp4.json", "plain.mp4"]
    assert contents("out")["a.mp4"] == contents("out")["plain.mp4"]


@pytest.mark.slow
def test_a_second_run_makes_what_is_missing_broken_or_different(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another setting, image, or file at the place is noticed; what is as it was is left alone, and no model is loaded
    for it. Control: --decode-chunk and the place of the image change no frame.
    """
    command = ("photos", "-o", "out", "--seeds", "0-2", "--name-template", "{stem}-{seed}.gif")
    assert run(tiny_folder, *command) == 0
    first = contents("out")
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("loaded"))
        Path("photos").rename("moved")
        assert run(tiny_folder, "moved", *command[1:], "--decode-chunk", "1") == 0
        Path("moved").rename("photos")
    said = "minisvd: of 6 videos 6 skipped, finished with the same settings\n"
    assert capsys.readouterr() == ("", said)

    Path("out/a-0.gif").unlink()  # missing
    Path("out/a-1.gif").write_bytes(b"")  # broken
    Path("out/a-2.gif").write_bytes(first["b-2.gif"])  # broken
    Path("out/b-0.gif.json").unlink()  # of what, nobody knows
    record = json.loads(Path("out/b-1.gif.json").read_text())
    record["made"]["steps"] = 7
    Path("out/b-1.gif.json").write_text(json.dumps(record))  # different
    Path("out/b-2.gif.json").write_text("[" * 100_000)  # no record, but someone's
    assert run(tiny_folder, *command) == 2
    assert "out/b-2.gif.json is there and no record of a video: move it, or" in capsys.readouterr().err
    Path("out/b-2.gif.json").unlink()
    assert run(tiny_folder, *command) == 0
    out, err = capsys.readouterr()
    assert "minisvd: of 6 videos 1 made, 3 made again with other settings, 2 made again, which were broken\n" in err
    assert len(out.splitlines()) == 6
    assert contents("out") == first

    Image.new("RGB", (40, 30), "red").save("photos/a.png")
    assert run(tiny_folder, *command) == 0
    assert "3 made again with other settings, 3 skipped, finished" in capsys.readouterr().err
    changed = contents("out")
    assert {name for name in first if first[name] != changed[name]} == {"a-0.gif", "a-1.gif", "a-2.gif"}


def frames_of(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).glob("*/*.png"))}


@pytest.mark.slow
def test_a_second_run_makes_folders_of_pngs_again_too(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that lack a frame, or have another one, or were made otherwise, with more frames; and it leaves no other
    folder behind. What an operating system adds breaks nothing.
    """
    command = ("photos", "-o", "out", "--seeds", "0-2", "--name-template", "{stem}-{seed}")
    assert run(tiny_folder, *command) == 0
    first = frames_of("out")
    assert len(first) == 12
    Path("out/a-0/.DS_Store").write_bytes(b"what Finder says of a folder")
    capsys.readouterr()
    assert run(tiny_folder, *command) == 0
    assert "minisvd: of 6 videos 6 skipped, finished with the same settings\n" in capsys.readouterr().err

    Path("out/a-0/frame_0000.png").unlink()
    Path("out/a-1/frame_0001.png").write_bytes(b"")
    Path("out/a-2/frame_0001.png").unlink()
    shutil.rmtree("out/b-0")
    four = ["--model", str(tiny_folder), *FAST, "--frames", "4"]
    assert main(["generate", "photos/b.JPG", "-o", "out/b-1", "--seed", "1", *four]) == 0
    assert len(frames_of("out")) == 10
    capsys.readouterr()
    assert run(tiny_folder, *command) == 0
    said = "1 made, 1 made again with other settings, 3 made again, which were broken, 1 skipped, finished with"
    assert f"minisvd: of 6 videos {said} the same settings\n" in capsys.readouterr().err
    assert frames_of("out") == first
    assert not [name for name in os.listdir("out") if name.startswith(".")]

    for said in ("", "minisvd: of 1 videos 1 skipped, finished with the same settings\n"):
        assert run(tiny_folder, "photos/a.png", "-o", "alone") == 0  # which is a folder the second time
        assert capsys.readouterr().err.endswith(said)
    assert sorted(os.listdir("alone")) == ["frame_0000.png", "frame_0001.png"]


@pytest.mark.slow
@pytest.mark.parametrize("why", ["no record", "a record of nothing", "more frames", "another file", "a folder", "link"])
def test_a_folder_that_holds_what_no_run_wrote_is_never_replaced(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], why: str
) -> None:
    """Its run fails, in one line, and the others go on. Control: the test above."""
    command = ("photos", "-o", "out", "--name-template", "{stem}")
    assert run(tiny_folder, *command) == 0
    Path("out/b/frame_0001.png").unlink()
    if why == "no record":
        Path("out/b.json").unlink()
    elif why == "a record of nothing":
        Path("out/b.json").write_text('{"made": {"num_frames": "all"}, "video_sha256": ""}')
    elif why == "more frames":
        Path("out/b/frame_0002.png").write_bytes(b"someone's")
    elif why == "another file":
        Path("out/b/notes.txt").write_bytes(b"someone's")
    elif why == "a folder":
        Path("out/b/frame_0001.png").mkdir()
    else:
        Path("out/b").rename("photos/b")
        os.symlink("../photos/b", "out/b")
    before = contents("out/b")
    capsys.readouterr()
    assert run(tiny_folder, *command) in (1, 2)
    says = "Is a directory: 'out/b/frame_0001.png'" if why == "a folder" else "it exists and is not an empty folder"
    assert says in capsys.readouterr().err
    assert contents("out/b") == before


def test_a_folder_of_frames_has_its_record_before_it_is_there(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that a run which is ended in between, here as its last file is moved, does not block the next one."""
    moved, move = [], os.replace

    def ended(source: str, target: str) -> None:
        moved.append(os.path.relpath(target))
        if moved[-1] == "out/a":
            raise KeyboardInterrupt
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", ended)
        assert run(tiny_folder, "photos/a.png", "-o", "out/a") == 130
    assert moved[-2:] == ["out/a.json", "out/a"]
    assert os.listdir("out") == ["a.json"]
    capsys.readouterr()
    assert run(tiny_folder, "photos/a.png", "-o", "out/a") == 0
    assert capsys.readouterr().out == "out/a\n"


def test_other_weights_are_other_settings(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_folder, "photos/a.png", "-o", "out") == 0
    assert main(["generate", "photos/a.png", "-o", "out", *FAST]) == 0
    assert "minisvd: of 1 videos 1 made again with other settings\n" in capsys.readouterr().err


@pytest.mark.slow
def test_a_batch_is_what_its_videos_are_alone_to_rounding(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--batch 3 puts what differs in nothing but image, seed, fps, bucket and noise into one call, whose frames are a
    byte at most from those alone, as its --help says, and its records; a bad image fails alone, and the others are
    then made one by one. A second run, with another --batch, makes nothing.
    """
    rows = [{"image": f"photos/{n}", "fps": fps, "seed": fps} for n, fps in (("a.png", 5), ("b.JPG", 6), ("a.png", 7))]
    rows += [{"image": "photos/a.png", "motion_bucket": 5}, {"image": "photos/b.JPG", "steps": 2}]
    name = manifest(*(row | {"name": f"{i}"} for i, row in enumerate(rows)))
    for folder, batch in (("out", "3"), ("alone", "1")):
        Path(folder).mkdir(exist_ok=True)
        assert run(tiny_folder, "--manifest", name, "-o", folder, "--batch", batch) == 0
    sizes = [json.loads(Path(f"out/{i}.json").read_text())["batch"] for i in range(5)]
    assert sizes == [3, 3, 3, 1, 1]
    assert json.loads(Path("alone/0.json").read_text())["batch"] == 1

    def pixels(path: str) -> np.ndarray:
        return np.asarray(Image.open(path)).astype(int)

    frames = [f"{i}/frame_0001.png" for i in range(5)]
    differences = [abs(pixels(f"out/{frame}") - pixels(f"alone/{frame}")).max() for frame in frames]
    print("largest differences", differences)
    assert max(differences) <= 1
    assert abs(pixels(f"out/{frames[0]}") - pixels(f"out/{frames[1]}")).max() > 20  # control
    capsys.readouterr()
    assert run(tiny_folder, "--manifest", name, "-o", "out", "--batch", "2") == 0
    assert "5 skipped, finished with the same settings" in capsys.readouterr().err

    Path("photos/bad.png").write_text("no image")
    assert run(tiny_folder, "photos", "-o", "out", "--batch", "3") == 1
    assert "minisvd: of 3 videos 1 failed, 2 made" in capsys.readouterr().err
    assert {"a.mp4", "b.mp4"} < set(os.listdir("out"))
    assert "need a whole number from 1 to" in refusal(capsys, "generate", "photos", "-o", "out", "--batch", "0", *FAST)


def test_a_folder_of_images_and_other_things() -> None:
    """A picture that Pillow does not open is named in a line; what is no picture is none, though Pillow has a name for
    it; videos that were written beside the images are none on the second run, by their records.
    """
    for name in ("d.heic", "results.h5", "e.HEIF", "f.txt"):
        Path("photos", name).write_bytes(b"something")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = find_images([Path("photos")])
    assert [path.name for path in found] == ["a.png", "b.JPG"]
    assert [str(warning.message).split()[0] for warning in caught] == ["photos/d.heic", "photos/e.HEIF"]
    for name in ("d.heic", "e.HEIF"):
        Path("photos", name).unlink()
    Image.new("RGB", (8, 8)).save("photos/c.webp")
    assert [path.name for path in find_images([Path("photos")])] == ["a.png", "b.JPG", "c.webp"]
    Path("photos/c.webp.json").write_text('{"title": "a picture of mine"}')
    assert len(find_images([Path("photos")])) == 3
    Path("photos/c.webp.json").write_text('{"made": {}, "video_sha256": ""}')
    assert len(find_images([Path("photos")])) == 2
    assert [path.name for path in find_images([Path("photos/[ab].*")])] == ["a.png", "b.JPG"]


@pytest.mark.slow
def test_videos_beside_their_images_are_not_images_of_the_next_run(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("photos", "-o", "photos", "--name-template", "{stem}.webp")
    for status in ("2 made", "2 skipped, finished with the same settings"):
        assert run(tiny_folder, *command) == 0
        assert f"minisvd: of 2 videos {status}\n" in capsys.readouterr().err


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A file that may not be changed, by root neither."""
    root = os.geteuid() == 0
    subprocess.run(["chattr", "+i", path] if root else ["chmod", "a-w", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", path] if root else ["chmod", "u+w", path], check=True)


@pytest.mark.linux
def test_a_target_that_may_not_be_changed_is_refused_before_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shutil.which("chattr")
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("loaded"))
    Path("old.mp4").write_bytes(b"old")
    assert check_output("old.mp4") == Path("old.mp4")  # control
    with locked(Path("old.mp4")):
        said = refusal(capsys, "generate", "photos/a.png", "-o", "old.mp4", *FAST)
    assert "cannot write old.mp4: it is there and may not be changed, choose another name" in said
