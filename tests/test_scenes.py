"""Proposition: the right video is knowable. `scenes.track` recovers from the frames alone what a clip was made with:
the shape's path to a pixel, its colour, its class, its heading and its speed, over the whole range of scenes.

Controls: on a clip in another order, or of the backdrop alone, the same measurement does not.
"""

import numpy as np
import pytest

from tools.tiny import scenes

pytestmark = pytest.mark.slow


def clips(count: int, seed: int) -> list[tuple[scenes.Scene, int, int, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [scenes.random_clip(rng) for _ in range(count)]


def test_track_recovers_the_truth() -> None:
    place, colour, turn, pace = [], [], [], []
    for scene, fps, bucket, frames in clips(200, seed=1):
        truth, found = scenes.path(scene, bucket, fps), scenes.track(frames, scene)
        place.append(np.abs(found.positions - truth).max())
        colour.append(np.abs(found.rgb - scene.rgb).max())
        pace.append(abs(found.speed - scenes.speed(bucket) / fps))
        assert found.shape == scene.shape
        if bucket > 50:  # a shape that hardly moves shows its heading by its nose, not by its path
            turn.append(scenes.angle_between(found.heading, scene.heading))
    print(
        f"largest errors: {max(place):.2f} px, colour {max(colour):.4f}, {max(turn):.3f} rad, {max(pace):.3f} px/frame"
    )
    assert max(place) < 1
    assert max(colour) < 0.01
    assert max(turn) < 0.1
    assert max(pace) < 0.15


def test_a_shuffled_clip_loses_heading_and_speed() -> None:
    order = [3, 0, 6, 1, 7, 2, 5, 4]
    fast = [(scene, frames) for scene, _, bucket, frames in clips(100, seed=2) if bucket > 50]
    shuffled = [scenes.track(frames[order], scene) for scene, frames in fast]
    turns = [
        scenes.angle_between(found.heading, scene.heading) for found, (scene, _) in zip(shuffled, fast, strict=True)
    ]
    paces = [
        found.speed / scenes.track(frames, scene).speed for found, (scene, frames) in zip(shuffled, fast, strict=True)
    ]
    print(f"smallest slowing by shuffling: to {max(paces):.2f} of the speed")
    assert max(paces) < 0.7
    reverse = [scenes.angle_between(scenes.track(frames[::-1], scene).heading, scene.heading) for scene, frames in fast]
    assert min(reverse) > np.pi - 0.1 > max(turns)


def test_an_empty_backdrop_has_no_shape() -> None:
    for scene, *_ in clips(50, seed=3):
        empty = scenes.render(scene, np.full((scenes.FRAMES, 2), 1000.0))
        found = scenes.track(empty, scene)
        assert np.isnan(found.positions).all()
        assert found.shape is None


def test_every_path_stays_in_frame() -> None:
    rng = np.random.default_rng(4)
    for _ in range(1000):
        places = scenes.path(scenes.random_scene(rng), motion_bucket=255, fps=scenes.FPS[0])
        assert places.min() >= scenes.MARGIN - 1e-6
        assert places.max() <= scenes.SIZE - scenes.MARGIN + 1e-6


def test_the_heading_is_in_the_first_frame() -> None:
    """Turning a scene's heading changes its first frame; the fps and the bucket, which no still shows, do not."""
    for scene, fps, bucket, frames in clips(20, seed=5):
        still = scenes.render(scene, scenes.path(scene, 0, fps)[:1])
        assert np.array_equal(frames[:1], still), (fps, bucket)
        turned = scenes.render(scenes.replace(scene, heading=scene.heading + np.pi / 4), scenes.path(scene, 0, fps)[:1])
        assert np.abs(turned.astype(int) - still).max() > 100


def test_captions_name_what_is_seen() -> None:
    scene = scenes.random_scene(np.random.default_rng(6))
    named = scenes.replace(scene, shape="star", colour="orange", heading=-3 * np.pi / 4)
    assert scenes.caption(named).startswith("an orange star moving up left over a")


def test_drawings_stay_in_frame_stand_out_and_show_where_they_go() -> None:
    """Of 300: centres keep their margin at any speed, colours differ from the ground's, nose or tail is there."""
    rng = np.random.default_rng(7)
    drawings = [scenes.random_drawing(rng) for _ in range(300)]
    for drawn in drawings:
        for scene in drawn:
            places = scenes.path(scene, motion_bucket=255, fps=scenes.FPS[0])
            assert places.min() >= scenes.MARGIN - 1e-6
            assert places.max() <= scenes.SIZE - scenes.MARGIN + 1e-6
            ground = (np.array(scene.background.near) + scene.background.far) / 2
            assert np.linalg.norm(np.array(scene.rgb) - ground) >= 0.5
            assert scene.nose or scene.tail
            assert scene.background == drawn[0].background
    flat = [scene for drawn in drawings for scene in drawn]
    assert 30 < sum(len(drawn) == 2 for drawn in drawings) < 120
    assert sum(not scene.nose for scene in flat) > 30
    assert sum(not scene.tail for scene in flat) > 30
    assert sum(min(scene.background.near) > 0.7 for scene in flat) > 30  # light grounds


def test_each_widening_is_seen_and_none_touches_the_standard_scenes() -> None:
    """Each field beyond a standard scene's changes its picture; with the defaults nothing does."""
    scene, *_ = clips(1, seed=8)[0]
    at = scenes.path(scene, 0, 1, frames=1)
    plain = scenes.render(scene, at).astype(int)
    changes = {
        "nose": False,
        "tail": False,
        "nose_rgb": (0.0, 0.0, 0.0),
        "turn": 0.5,
        "wobble": ((3, 0.2, 0.0),),
        "line": 2.0,
        "cues": 0.1,
    }
    for name, value in changes.items():
        assert np.abs(scenes.render(scenes.replace(scene, **{name: value}), at).astype(int) - plain).max() > 50, name
    for scene, *_ in clips(20, seed=9):
        assert scenes.Scene(*(getattr(scene, name) for name in list(vars(scene))[:8])) == scene


def test_two_shapes_share_a_frame() -> None:
    """Each is where it is alone, and the ground is the first's."""
    (one, _, _, _), (other, _, _, _) = clips(2, seed=10)
    one, other = scenes.replace(one, x=16.0, y=16.0), scenes.replace(other, x=48.0, y=48.0)
    places = [scenes.path(scene, 0, 1, frames=1) for scene in (one, other)]
    both = scenes.render_together((one, other), places)
    seen = scenes.silhouette(other, places[1])
    assert np.array_equal(
        both[seen[:, None].repeat(3, 1) == 0], scenes.render(one, places[0])[seen[:, None].repeat(3, 1) == 0]
    )
    alone = scenes.render(scenes.replace(other, background=one.background), places[1])
    inside = seen[:, None].repeat(3, 1) == 1
    assert np.array_equal(both[inside], alone[inside])
    assert not np.array_equal(both, scenes.render(one, places[0]))  # control
