"""Theorem: the figures of `tools/tiny/evaluate.py` call right clips right and wrong ones wrong, each by its measure."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minisvd
from minisvd.config import ClipConfig
from tools.measure.metrics import against_truth
from tools.tiny import scenes
from tools.tiny.captions import CaptionedImages, draw_captioned, tokens
from tools.tiny.evaluate import (
    Figure,
    by_scale,
    curves,
    draw_clips,
    evaluate,
    generate,
    images,
    retrieval,
    scale_picture,
    scale_table,
    share_figure,
    table,
    video_figures,
)

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent.parent / "weights" / "tiny"
CLIPS = draw_clips(40, seed=5)


def figures(change=lambda frames: frames) -> dict[str, Figure]:
    """Of the true clips, changed, and every colour off by a 255th."""
    videos = [(torch.from_numpy(change(frames).copy()).float() + 1).clamp(max=254) / 255 for *_, frames in CLIPS]
    pairs = zip(videos, CLIPS, strict=True)
    return {
        figure.name: figure
        for figure in video_figures([against_truth(v, scene, bucket, fps) for v, (scene, fps, bucket, _) in pairs])
    }


def missed(result: dict[str, Figure]) -> set[str]:
    return {name for name, figure in result.items() if not figure.met}


def test_true_clips_meet_every_bar():
    result = figures()
    print(table(list(result.values())))
    assert missed(result) == set()
    assert all(figure.low - 1e-9 <= figure.value <= figure.high + 1e-9 for figure in result.values())


HEADING, SPEARMAN, SPEED = (
    "heading error, median",
    "speed against the asked one, Spearman",
    "relative error of the speed, median",
)
FIRST, COLOUR = "first frame against the image, PSNR", "colour within 0.1 (RGB, L2)"
FOUND, SHAPE = "frames in which the shape is found", "shape class kept"
LAST_CLASS, EVERY_CLASS = "class right in the last frame", "class right in every frame"
LAST, FASTER = "overlap in the last frame", "overlap in the last frame, faster half"
RIGHT = "right in every frame"
FORM = {LAST_CLASS, EVERY_CLASS, LAST, FASTER, RIGHT}


def redrawn(change, since: int = 0):
    """Changes a clip: from frame `since` on, what `change` of its scene and places gives."""
    clips = iter(CLIPS)

    def changed(frames: np.ndarray) -> np.ndarray:
        scene, fps, bucket, _ = next(clips)
        other, places = change(scene, scenes.path(scene, bucket, fps))
        return np.concatenate([frames[:since], scenes.render(other, places)[since:]])

    return changed


def morphed(scene: scenes.Scene, places: np.ndarray) -> tuple[scenes.Scene, np.ndarray]:
    other = {"circle": "star", "square": "triangle", "triangle": "square", "star": "circle"}[scene.shape]
    return replace(scene, shape=other), places


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda frames: frames[::-1], {HEADING, LAST, FASTER, RIGHT}),
        (lambda frames: np.repeat(frames[:1], 8, axis=0), {SPEED, SPEARMAN}),
        (lambda frames: frames // 2, {FOUND, COLOUR, FIRST, HEADING, SPEED}),
    ],
    ids=["backwards", "still", "dark"],
)
def test_wrong_clips_miss_the_bars_they_should(change, names):
    assert names <= missed(figures(change))


@pytest.mark.parametrize(
    ("change", "since", "names"),
    [
        (morphed, len(CLIPS[0][-1]) - 2, FORM),
        (lambda scene, places: (replace(scene, radius=0.9 * scene.radius), places), 0, {LAST, FASTER}),
        (lambda scene, places: (scene, places + np.array([1, 0])), 0, {LAST, FASTER}),
        (lambda scene, places: (scene, places + np.array([0, -1])), 0, {LAST, FASTER}),
    ],
    ids=["morphs in the last two frames", "a tenth too small", "a pixel to the right", "a pixel up"],
)
def test_what_a_vote_over_all_frames_forgives_is_missed_frame_by_frame(change, since, names):
    """Control: all four reach the bars of the measures over all frames, but for the class of a shape too small."""
    result = figures(redrawn(change, since))
    print(table([figure for figure in result.values() if figure.name in FORM]))
    assert names <= missed(result) <= FORM | ({SHAPE} if since == 0 else set())


def test_faint_cues_leave_all_but_nose_and_tail():
    """The same scenes and numbers; what differs from a picture without cues is a tenth of what it was."""
    for (scene, fps, bucket, frames), (faint, *same, fainter) in zip(
        CLIPS, draw_clips(8, seed=5, cues=0.1), strict=False
    ):
        assert [fps, bucket] == same
        assert replace(faint, cues=1.0) == scene
        bare = scenes.render(replace(scene, nose=False, tail=False), scenes.path(scene, bucket, fps)).astype(int)
        before, after = (np.abs(clip - bare).max() for clip in (frames, fainter))
        assert 0 < after <= 0.1 * before + 1
        assert before > 50  # control


def test_figures_against_the_scale_are_of_that_scale_s_videos(tmp_path, monkeypatch):
    """Where one scale gives the true clips and another gives each the next one's, one column is right."""
    clips = CLIPS[:4]
    true = [(torch.from_numpy(frames).float() + 1).clamp(max=254) / 255 for *_, frames in clips]
    made = {1.0: true, 3.0: [*true[1:], true[0]]}
    monkeypatch.setattr("tools.tiny.evaluate.generate", lambda _svd, _clips, scale: made[scale])
    columns, videos = by_scale(None, clips, [1.0, 3.0])  # pyright: ignore[reportArgumentType]
    found = scale_table(columns, [1.0, 3.0]).splitlines()[-1]
    assert found == "| right in every frame | 100.0 % | 0.0 % |"
    scale_picture(tmp_path / "scales.png", [1.0, 3.0], {1.0: (columns, videos, clips)})
    with Image.open(tmp_path / "scales.png") as picture:
        assert picture.size == (1100, 500)


def test_curves_show_where_it_goes_wrong():
    """A clip that morphs after frame 6: its class is right in six columns, its overlap falls in the last two."""
    change = redrawn(morphed, 6)
    videos = [torch.from_numpy(change(frames)).float() / 255 for *_, frames in CLIPS]
    pairs = zip(videos, CLIPS, strict=True)
    shown = curves([against_truth(video, scene, bucket, fps) for video, (scene, fps, bucket, _) in pairs])
    overlap, classes = ([line.split(" | ")[1:] for line in part.split("\n")[2:]] for part in shown.split("\n\n"))
    assert len(overlap) == len(classes) == 5
    for row in overlap:
        values = [float(value.strip(" |")) for value in row]
        assert values[:6] == [1.0] * 6
        assert max(values[6:]) < 0.85
    for row in classes:
        values = [float(value.strip(" |")) for value in row]
        assert values[:6] == [100.0] * 6
        assert max(values[6:]) < 10


def test_other_clips_miss_nearly_all():
    rolled = iter(np.roll(np.stack([frames for *_, frames in CLIPS]), 1, axis=0))
    assert missed(figures(lambda _: next(rolled))) >= {FIRST, HEADING, SPEARMAN, COLOUR}


def test_a_figure_is_held_to_its_bar():
    assert share_figure("share", [True] * 95 + [False] * 5, 0.95).met
    assert not share_figure("share", [True] * 94 + [False] * 6, 0.95).met
    assert Figure("error", "degrees", 15.0, 1, 20, 15, at_least=False).met
    assert not Figure("error", "degrees", 15.1, 1, 20, 15, at_least=False).met
    low = share_figure("share", [True] * 94 + [False] * 6, 0.95)
    assert "| share | 94.0 % | 87.5 to 97.2 | at least 95 % | no |" in table([low])


def test_captions_are_told_apart_by_their_words():
    _, captions = draw_captioned(np.random.default_rng(0), 100, distinct=True)
    assert len({tuple(row) for row in tokens(captions).tolist()}) == len(set(captions)) == 100
    config = ClipConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, patch_size=16,
                        image_size=64, projection_dim=16)  # fmt: skip
    torch.manual_seed(0)
    assert sum(retrieval(CaptionedImages(config).eval(), 200)) <= 20  # control: untrained, one in a hundred


@pytest.mark.slow
def test_videos_are_reproducible_and_follow_their_own_numbers():
    svd = minisvd.load("tiny")
    svd.generation = replace(svd.generation, steps=8)
    once, again = (torch.stack(list(generate(svd, CLIPS[:2], progress=False))) for _ in range(2))
    assert torch.equal(once, again)
    (alone,) = svd(images(CLIPS[1:2]), fps=CLIPS[1][1], motion_bucket=CLIPS[1][2], seed=1, progress=False)
    difference = (alone.frames - once[1]).abs().max().item()
    print(f"alone against in a batch: {difference:.1e}")
    assert difference < 1e-3
    (other,) = svd(images(CLIPS[1:2]), fps=CLIPS[1][1], motion_bucket=CLIPS[1][2], seed=0, progress=False)
    assert (other.frames - once[1]).abs().max() > 1e-2  # control: another seed


@pytest.mark.slow
def test_the_shipped_folder_evaluates():
    """Over four scenes, so no figure is held to its bar but those that training reached by far."""
    result, measured = evaluate(FOLDER, 4, progress=False)
    assert len(measured) == 4
    assert {figure.name for figure in result if not figure.met} <= {SHAPE, SPEARMAN} | FORM
