"""Theorem: a folder of images and several seeds give the videos that each image and seed give alone, under names that
are settled, or refused in one line, before a model is loaded; and an interrupted run is finished by running it again.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minisvd import pipeline
from minisvd import video as video_module
from minisvd.cli import main, parse_seeds
from minisvd.jobs import find_images, plan, state
from test_cli import FAST, refusal

PROMPT = "A teddy bear, 3-5 years old, climbs over a {seed} fence."  # VBench-I2V's images are called by sentences


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two pictures of noise, a.png and b.JPG, and of what is none of its images, beside an empty `out`."""
    monkeypatch.chdir(tmp_path)
    folder = Path("photos")
    for place in (folder, folder / "inner", folder / "folder.png", Path("out")):
        place.mkdir()
    generator = np.random.default_rng(0)
    for name in ("b.JPG", "a.png"):
        Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / name)
    for name in ("notes.txt", "clip.mp4", "page.pdf", "png", "._a.png", "inner/c.png"):
        (folder / name).write_bytes(b"no image")
    return folder


def run(tiny_folder: Path, *argv: str) -> int:
    return main(["generate", *argv, "--model", str(tiny_folder), *FAST])


def contents(folder: str) -> dict[str, bytes]:
    files = [path for path in Path(folder).rglob("*.*") if path.suffix != ".json" and path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def read_by_vbench_i2v(folder: Path, prompt: str) -> list[str]:
    """The files that VBench-I2V takes for a prompt, restated from `build_full_info_json` of its evaluator: five indices
    from 0, and the extension of whichever file the system lists first.
    """
    names = os.listdir(folder)
    wanted = [f"{prompt}-{index}{Path(names[0]).suffix}" for index in range(5)]
    return [name for name in wanted if name in names]


# --- what works -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_video_is_what_its_image_and_seed_give_alone(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, from one model that is loaded once; other images and seeds differ. Paths on stdout, one bar."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    loads, load = [], pipeline.load
    monkeypatch.setattr(pipeline, "load", lambda *args, **options: loads.append(args) or load(*args, **options))
    assert run(tiny_folder, "photos", "-o", "out", "--seeds", "3,0", "--name-template", "{stem}-{seed}") == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["out/a-3", "out/a-0", "out/b-3", "out/b-0"]
    assert len(loads) == 1
    assert "videos: 100%" in err
    assert "step 1, out/b-3" in err
    assert not any(bar in err for bar in ("denoising", "decoding"))

    assert run(tiny_folder, "photos/b.JPG", "-o", "alone", "--seed", "3") == 0
    out, err = capsys.readouterr()
    assert all(bar in err for bar in ("denoising", "decoding")), "a single video keeps its own bars"
    assert "videos" not in err
    assert contents("out/b-3") == contents("alone")
    assert contents("alone").keys() == {"frame_0000.png", "frame_0001.png"}
    for other in ("out/b-0", "out/a-3"):
        assert contents(other) != contents("alone")


def test_vbench_i2v_finds_every_video(tiny_folder: Path, photos: Path) -> None:
    """Of an image that is called by its prompt, braces and all; nothing else is there. Other seeds need {index}."""
    (photos / "a.png").rename(f"{PROMPT}.png")
    named = ("-o", "out", "--seeds", "0-4", "--name-template", "{stem}-{seed}.mp4", "--no-sidecar")
    assert run(tiny_folder, f"{PROMPT}.png", *named) == 0
    found = read_by_vbench_i2v(Path("out"), PROMPT)
    assert found == [f"{PROMPT}-{index}.mp4" for index in range(5)] == sorted(os.listdir("out"))
    assert all(Path("out", name).read_bytes()[4:8] == b"ftyp" for name in found)
    assert not read_by_vbench_i2v(Path("out"), "another prompt")

    def names(template: str) -> list[str]:
        jobs = plan([(Path(f"{PROMPT}.png"), "", {})], [7, *range(9, 13)], Path("out"), template)
        return [Path(job["path"]).name for job in jobs]

    assert names("{stem}-{index}.mp4") == found
    assert not set(names("{stem}-{seed}.mp4")) & set(found)  # control


@pytest.mark.slow
def test_an_interrupted_run_is_finished_by_running_it_again(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --skip-existing: what is there is left alone, the rest is what an uninterrupted run gives, and once all is
    there no model is loaded. Control: without it, what is there is made again.
    """
    Path("whole").mkdir()
    command = ("photos", "--seeds", "0-1", "--name-template", "{stem}-{index}.gif", "--skip-existing", "-o")
    assert run(tiny_folder, *command, "whole") == 0
    names = ["a-0.gif", "a-1.gif", "b-0.gif", "b-1.gif"]
    assert capsys.readouterr().out.splitlines() == [f"whole/{name}" for name in names]

    write = video_module.WRITERS[".gif"]

    def write_then_interrupt(video: video_module.Video, path: Path) -> None:
        write(video, path)
        if path.name == "b-0.gif":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(video_module.WRITERS, ".gif", write_then_interrupt)
        assert run(tiny_folder, *command, "out") == 130
    assert capsys.readouterr().out.splitlines() == ["out/a-0.gif", "out/a-1.gif"]
    assert sorted(contents("out")) == names[:2], "b-0.gif was not finished"

    Path("out/a-1.gif").write_bytes(b"left alone")
    assert run(tiny_folder, *command, "out", "--json") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert "minisvd: of 4 videos 2 made, 2 skipped, which exist" in err
    assert report["skipped"] == ["out/a-0.gif", "out/a-1.gif"]
    assert [(v["image"], v["seed"], v["path"]) for v in report["videos"]] == [
        ("photos/b.JPG", 0, "out/b-0.gif"),
        ("photos/b.JPG", 1, "out/b-1.gif"),
    ]
    assert (report["seeds"], report["steps"], "seed" in report) == ([0, 1], 1, False)
    assert contents("out") == contents("whole") | {"a-1.gif": b"left alone"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("loaded"))
        assert run(tiny_folder, *command, "out") == 0
        said = "minisvd: of 4 videos 4 skipped, which exist\n"
        assert capsys.readouterr() == ("", said)
        assert run(tiny_folder, *command, "out", "--json") == 0
        assert json.loads(capsys.readouterr().out)["videos"] == []

    again = ("photos/a.png", "--seeds", "1", "--name-template", "{stem}-{seed}.gif", "-o", "out")
    assert run(tiny_folder, *again) == 0
    assert contents("out") == contents("whole")


def test_a_folder_of_frames_is_a_video_and_an_empty_one_is_filled() -> None:
    """As `Video.save` does: it replaces an empty folder and no other."""
    for name in "ab":
        Path("out", name).mkdir()
    Path("out/b/frame_0000.png").write_bytes(b"png")
    rows = [(Path("photos/a.png"), "", {}), (Path("photos/b.JPG"), "", {})]
    jobs = plan(rows, [0], Path("out"), "{stem}", skip_existing=True)
    assert [(job["image"], job["path"]) for job in jobs] == [("photos/a.png", "out/a"), ("photos/b.JPG", "out/b")]
    assert [state(Path(job["path"]), {}) for job in jobs] == ["made", "made again with other settings"]
    with pytest.raises(FileExistsError, match="not an empty folder"):
        plan(rows, [0], Path("out"), "{stem}")


def test_a_folder_stands_for_the_images_in_it(photos: Path) -> None:
    """Sorted, in its place among the others; nothing hidden, nothing deeper, nothing that Pillow would not open."""
    other = Path("other.png")
    assert find_images([other, photos, other]) == [other, photos / "a.png", photos / "b.JPG", other]
    assert find_images([photos / "inner", Path("missing")]) == [photos / "inner" / "c.png", Path("missing")]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("photos -o out", ["out/a.mp4", "out/b.mp4"]),
        ("photos -o out --seed 5", ["out/a.mp4", "out/b.mp4"]),
        ("photos -o out --seeds 5", ["out/a-5.mp4", "out/b-5.mp4"]),
        ("photos/a.png -o out --seeds 8-9,5", ["out/a-8.mp4", "out/a-9.mp4", "out/a-5.mp4"]),
        ("photos/a.png -o out/{index}-{seed}.gif --seeds 8,5", ["out/0-8.gif", "out/1-5.gif"]),
        ("photos/a.png -o clip.mp4 --seeds 8", ["clip.mp4"]),
        ("photos -o out --name-template x{stem}.webp", ["out/xa.webp", "out/xb.webp"]),
    ],
)
def test_where_videos_go(argv: str, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A folder's default names have the seed if --seeds is given, however many there are, so that more can follow.

    With every file there, nothing is left to do, and --json lists them.
    """
    for path in expected:
        Path(path).write_bytes(b"a video")
    assert main(["generate", *argv.split(), "--skip-existing", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["skipped"], report["videos"]) == (expected, [])


def test_seeds_are_numbers_and_ranges() -> None:
    assert parse_seeds("3") == [3]
    assert parse_seeds("0-4") == [0, 1, 2, 3, 4]
    assert parse_seeds("7,0,2-2,3-5") == [7, 0, 2, 3, 4, 5]
    assert parse_seeds(f"{2**32 - 1}") == [2**32 - 1]
    assert len(parse_seeds("0-9999")) == 10_000


# --- what a user can get wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("empty -o out", "there are no images in empty itself: give another folder"),
        ("photos photos/inner/none.png -o out --fail-fast", "no image at photos/inner/none.png"),
        ("photos photos/inner/c.png -o out --fail-fast", "photos/inner/c.png is not an image"),
        (
            "photos -o clip.mp4",
            "two videos would be written to clip.mp4: give a folder, or add {stem} and {seed}",
        ),
        (
            "photos -o out --name-template {seed}.mp4",
            "two videos would be written to out/0.mp4: give a folder, or add {stem} and {seed}",
        ),
        (
            "photos/a.png -o clip.mp4 --seeds 0-1",
            "two videos would be written to clip.mp4: give a folder, or add {stem} and {seed}",
        ),
        ("photos -o out --seeds 0-1 --name-template {stem}.mp4", "two videos would be written to out/a.mp4"),
        (
            "photos photos/a.png -o out",
            "two videos would be written to out/a.mp4: give a folder, or add {stem} and {seed}",
        ),
        (
            "photos photos/a1.png -o out --seeds 0,10 --name-template {stem}{seed}.gif",
            "two videos would be written to out/a10.gif: give a folder, or add {stem} and {seed}",
        ),
        ("photos photos/a.gif -o photos --name-template {stem}.gif", "photos/a.gif is one of the images"),
        ("photos/a.gif -o photos/{stem}.gif --skip-existing", "photos/a.gif is one of the images"),
        (
            "photos -o none --name-template {stem}.mp4",
            "videos cannot be named '{stem}.mp4' in none: need a file's name",
        ),
        ("photos -o none/{stem}.mp4", "the folder none does not exist, create it first"),
        ("photos -o out --name-template {stem}.avi", "cannot write out/a.avi: use .mp4, .gif or .webp"),
        ("photos -o photos --name-template {stem}.png --skip-existing", "cannot write photos/a.png: use .mp4"),
        ("photos -o out --name-template {name}.mp4", "{name} in {name}.mp4 means nothing: use {stem}, {seed}, {index}"),
        ("photos -o out --name-template {stem}-{seed:02d}.mp4", "{seed:02d} in {stem}-{seed:02d}.mp4 means nothing"),
        ("photos -o out/{stem}-{}.mp4", "{} in out/{stem}-{}.mp4 means nothing"),
        (
            "photos -o out --name-template x/{stem}.mp4",
            "videos cannot be named 'x/{stem}.mp4' in out: need a file's name",
        ),
        ("photos -o out --name-template=", "one of the arguments is empty"),
        ("photos -o out --seed 0 --seeds 0-4", "argument --seeds: not allowed with argument --seed"),
        ("photos -o out --seeds x", "argument --seeds: 'x' is not seeds such as 3, 0-4 or 0,2,5-7"),
        ("photos -o out --seeds 0,", "'0,' is not seeds"),
        ("photos -o out --seeds 1-2-3", "'1-2-3' is not seeds"),
        ("photos -o out --seeds=-1", "'-1' is not seeds"),
        ("photos -o out --seeds 4-0", "'4-0' is not a range that rises, of at most 10,000 seeds"),
        ("photos -o out --seeds 0-10000", "'0-10000' is not a range that rises, of at most 10,000 seeds"),
        ("photos -o out --seeds 0-4,3", "'0-4,3' has seed 3 twice"),
        ("photos -o out --seeds 9223372036854775808", "'9223372036854775808' is not a whole number from 0 to"),
        ("photos -o out --frames 0", "num_frames is 0"),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: str, says: str
) -> None:
    """Status 2 and nothing written; no weight is read: loading would raise here."""
    Path("empty").mkdir()
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("loaded"))
    assert says in refusal(capsys, "generate", *argv.split())
