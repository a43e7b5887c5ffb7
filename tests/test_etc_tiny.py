"""Theorem: the tiny ETC that ships makes what a sentence says, as read from pixels alone, at the pace that fps says.

Captions from a seed that training never used. Controls: each other's captions, and another rate.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from minisvd.cli import main
from minisvd.text import TextToVideo
from tools.etc.clips import draw
from tools.etc.model import load_text, load_vae
from tools.etc.reader import agrees, read
from tools.etc.train import videos_of
from tools.tiny import scenes

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent.parent / "weights/tiny-etc"
COUNT = 10


@pytest.fixture(scope="module")
def model() -> TextToVideo:
    return TextToVideo()


def test_colour_and_shape_and_heading_are_what_the_caption_says(model: TextToVideo):
    """Of 10 videos at 2 frames a second, at least 8 each; every other caption leaves out the ground."""
    rng = np.random.default_rng(5_000_011)
    drawn = [scenes.caption(draw(rng)) for _ in range(COUNT)]
    said = [caption.split(" over ")[0] if i % 2 else caption for i, caption in enumerate(drawn)]
    text = load_text(FOLDER.with_name("tiny"))
    made = videos_of(model.unet, load_vae(FOLDER), text, said, 2, 25, model.generation.guidance[1])
    readings = [read(frames) for frames in made]
    own = [agrees(reading, caption, 2) for reading, caption in zip(readings, drawn, strict=True)]
    others = [agrees(readings[i - 1], caption, 2) for i, caption in enumerate(drawn)]
    for name in ("colour", "shape", "heading"):
        right, wrong = (sum(row[name] for row in rows) for rows in (own, others))
        print(f"{name}: {right} of {COUNT} right, {wrong} with another's caption")
        assert right >= 8
        assert wrong <= 6  # control
    whole = [all(row[name] for name in ("colour", "shape", "heading")) for row in others]
    assert sum(whole) <= 1  # control
    assert np.mean([reading.errors for reading in readings]) < 0.05


def test_fewer_frames_a_second_are_a_faster_shape(model: TextToVideo):
    """One caption, one noise: the pace falls with the rate."""
    paces = [read(model("a red star moving right", fps=fps, steps=25).frames.numpy()).pace for fps in (1, 4, 30)]
    print("pixels a frame:", [f"{pace:.2f}" for pace in paces])
    assert paces[0] > 2 * paces[1] > 4 * paces[2]


def test_the_folder_is_small_and_its_latents_are_the_small_models(model: TextToVideo):
    """One encoder. Control: the decoders differ, as the small model's has learned from its own UNet since."""
    size = sum(file.stat().st_size for name in ("tiny", "tiny-etc") for file in FOLDER.with_name(name).rglob("*.safe*"))
    print(f"{size / 1e6:.1f} MB")
    assert size < 45e6
    state, own = load_vae(FOLDER.with_name("tiny")).state_dict(), model.vae.state_dict()
    same = {name: torch.equal(own[name], tensor) for name, tensor in state.items()}
    assert all(equal for name, equal in same.items() if not name.startswith("decoder."))
    assert not all(same.values())


def test_the_command_needs_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "clip.mp4"
    argv = ["generate", "--text", "a red star moving up right", "--steps", "2", "-o", str(out), "--device", "cpu"]
    assert main(argv) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes()[4:8] == b"ftyp"
    assert main([*argv[:2], "a red whale", *argv[3:]]) == 2  # control
    assert "the model does not know 'whale'" in capsys.readouterr().err
