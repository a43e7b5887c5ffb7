"""Proposition: `tools.measure.embedding_similarity` compares a last frame with the first, in any format and encoder.

Controls: a still video's cosine is 1, one that ends in another picture is further off than one that ends in its own.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from minisvd import Video
from tools.measure import embedding_similarity as tool
from tools.measure import metrics
from tools.tiny import scenes

pytestmark = pytest.mark.slow

NAMES = ("clip.mp4", "clip.gif", "clip.webp", "clip")
TIMM = "vit_tiny_patch16_224"


def scene_clip(seed: int, frames: int = 12) -> Tensor:
    """A shape that moves over a backdrop, [t,3,64,64]."""
    scene = scenes.random_scene(np.random.default_rng(seed))
    return torch.from_numpy(scenes.render(scene, scenes.path(scene, 150, 7, frames))).float() / 255


def saved(path: Path, frames: Tensor) -> Path:
    return Video(frames, 7).save(path)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """The weights of timm's smallest ViT, random."""
    torch.manual_seed(0)
    path = tmp_path / "weights.pt"
    torch.save(timm.create_model(TIMM).state_dict(), path)
    return path


def printed(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """What the tool prints on stdout for `argv`, when it succeeds and has nothing to say on stderr."""
    assert tool.main([str(argument) for argument in argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


# --- what works -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_video_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    """All frames in order: equal bytes where the format is lossless, above 28 dB elsewhere; not if reversed."""
    frames = scene_clip(0)
    read = tool.read_video(saved(tmp_path / name, frames))
    assert read.shape == frames.shape
    assert metrics.psnr(read, frames) > (80 if name in ("clip.webp", "clip") else 28)
    assert metrics.psnr(read.flip(0), frames) < 25


def test_pngs_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for i in range(12):
        Image.new("L", (4, 4), color=10 * i).save(tmp_path / f"frame{i}.png")
    assert (tool.read_video(tmp_path)[:, 0, 0, 0] * 255).tolist() == pytest.approx([10 * i for i in range(12)])


def test_the_table_holds_first_to_last_cosines_and_their_mean(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a still clip 1, of a moving one its pixels' cosine, below; of one that ends in another scene less still."""
    moving, other = scene_clip(0), scene_clip(1)
    cut = torch.cat([moving[:6], other[:6]])
    clips = {"a": moving[:1].repeat(2, 1, 1, 1), "b.webp": moving, "c": cut}
    videos = [saved(Path(name), frames) for name, frames in clips.items()]
    header, _, *lines = printed(capsys, *videos).splitlines()
    assert header == "| video | tiny | pixels |"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in cells] == ["a", "b.webp", "c", "mean"]
    values = np.array([[float(cell) for cell in row[1:]] for row in cells])
    assert values[0].tolist() == [1, 1]
    assert (np.diff(values[:3], axis=0) < -0.01).all(), values
    assert values[3] == pytest.approx(values[:3].mean(axis=0), abs=1e-4)
    first, last = metrics.pixel_features(moving[[0, -1]].double())
    assert values[1, 1] == pytest.approx((first @ last / first.norm() / last.norm()).item(), abs=1e-4)


def test_json_and_curve_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """One object; with --curve every frame's cosine with the first, from 1 to the answer."""
    video = saved(Path("clip.webp"), scene_clip(0))
    plain, full = (json.loads(printed(capsys, video, "--json", *extra)) for extra in ([], ["--curve"]))
    assert full["mean"] == plain["mean"] == plain["videos"][0]["similarity"]
    assert set(plain["videos"][0]) == {"video", "similarity"}
    curves = full["videos"][0]["curve"]
    frames = tool.read_video(video)
    each = metrics.pixel_features(frames.double())
    expected = torch.cosine_similarity(each, each[:1])
    assert curves["pixels"] == pytest.approx(expected.tolist())
    for name, curve in curves.items():
        assert (len(curve), curve[0], curve[-1]) == (12, pytest.approx(1), plain["mean"][name])
    lines = printed(capsys, video, "--curve").splitlines()
    assert lines[-1] == "clip.webp, pixels: " + " ".join(f"{value:.4f}" for value in curves["pixels"])


def test_models_of_timm_are_asked_for_by_name_and_file(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A column for each, instead of the default ones, from the weights in the file."""
    frames = scene_clip(0, frames=2)
    found = json.loads(printed(capsys, saved(Path("clip.webp"), frames), "--dino", f"{TIMM}:{weights}", "--json"))
    features = metrics.timm_features(TIMM, weights)(frames)
    assert found["mean"] == {f"DINO {TIMM}:{weights}": pytest.approx(tool.curve(features)[-1], abs=1e-6)}


@pytest.mark.parametrize(
    ("spec", "name", "given"),
    [
        ("ViT-B-32", "ViT-B-32", None),
        ("ViT-B-32:openai", "ViT-B-32", "openai"),
        ("ViT-B-32:a:b.pt", "ViT-B-32", "a:b.pt"),
        ("hf-hub:owner/name", "hf-hub:owner/name", None),
        ("local-dir:folder", "local-dir:folder", None),
    ],
)
def test_a_colon_parts_the_name_from_the_weights(spec: str, name: str, given: str | None) -> None:
    assert tool.split(spec) == (name, given)


@pytest.mark.parametrize(("name", "begins"), [("plot.png", b"\x89PNG"), ("plot.svg", b"<?xml")])
def test_a_plot_is_written(capsys: pytest.CaptureFixture[str], name: str, begins: bytes) -> None:
    """Of videos of different lengths, beside the table."""
    videos = [saved(Path("a.webp"), scene_clip(0)), saved(Path("b.webp"), scene_clip(1, frames=3))]
    assert "| mean |" in printed(capsys, *videos, "-o", name)
    assert Path(name).read_bytes().startswith(begins)


# --- what does not --------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The last line on stderr with which `argv` is refused: status 2, nothing on stdout, no new file."""
    before = sorted(Path().rglob("*"))
    try:
        status = tool.main([str(argument) for argument in argv])
    except SystemExit as exit:  # argparse leaves this way, after its usage
        status = exit.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, ""), err
    assert "Traceback" not in err
    assert sorted(Path().rglob("*")) == before
    *usage, line = err.splitlines()
    assert not usage or usage[0].startswith("usage: "), err
    return line


@pytest.fixture
def broken() -> None:
    """Files and folders that are no video, and one that is."""
    saved(Path("good.webp"), scene_clip(0))
    saved(Path("one.webp"), scene_clip(0, frames=1))
    for name in ("broken.mp4", "broken.gif", "notes.txt", "none"):
        Path(name).write_text("no video")
    for name in ("empty", "sizes"):
        Path(name).mkdir()
    for size in (4, 5):
        Image.new("RGB", (size, 4)).save(f"sizes/{size}.png")


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize(
    ("video", "sentence"),
    [
        ("missing.mp4", "there is no video missing.mp4: check the path"),
        ("notes.txt", "notes.txt is of no kind that can be read: give an .mp4"),
        ("none", "none is of no kind that can be read: give an .mp4"),
        ("broken.mp4", "broken.mp4 is damaged or not what its name says"),
        ("broken.gif", "broken.gif is damaged or not what its name says"),
        ("empty", "empty holds no frame: give"),
        ("sizes", "sizes holds frames of several sizes: give frames of one size"),
        ("one.webp", "one.webp has one frame: give a video of at least two"),
    ],
)
def test_what_is_no_video_is_refused(capsys: pytest.CaptureFixture[str], video: str, sentence: str) -> None:
    """In one sentence with the remedy, also behind a good one."""
    assert refusal(capsys, "good.webp", video).startswith(f"embedding_similarity: error: {sentence}")


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--clip", "ViT-B32"], "open_clip has no model 'ViT-B32': did you mean "),
        (["--clip", "ViT-B-32:opnai"], "ViT-B-32 has no weights 'opnai': give openai or "),
        (["--dino", "vit_tiny_patch16"], "timm has no model 'vit_tiny_patch16': did you mean "),
        (["--dino", f"{TIMM}:none.pt"], f"{TIMM} has no weights 'none.pt': give a file of weights"),
        (["--dino", f"{TIMM}:broken.mp4"], f"cannot load broken.mp4 of {TIMM}, give a file that fits"),
        (["-o", "plot.xyz"], "argument -o/--output: 'plot.xyz' is no .png, .svg, .pdf file in a folder that exists"),
        (["-o", "none/plot.png"], "argument -o/--output: 'none/plot.png' is no "),
    ],
)
def test_what_is_no_option_is_refused(capsys: pytest.CaptureFixture[str], options: list[str], sentence: str) -> None:
    assert f" error: {sentence}" in refusal(capsys, "good.webp", *options)


def test_a_missing_video_is_said_before_a_model_is_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no video missing.mp4" in refusal(capsys, "missing.mp4", "--dino", f"{TIMM}:none.pt")


@pytest.mark.usefixtures("broken")
def test_a_plot_without_matplotlib_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the command that installs it, before any video is read; the table needs none."""
    monkeypatch.setitem(tool.sys.modules, "matplotlib.figure", None)
    assert "pip install 'minisvd[study]'" in refusal(capsys, "one.webp", "-o", "plot.png")
    assert "| mean |" in printed(capsys, "good.webp")
