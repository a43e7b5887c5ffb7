"""Proposition: each measure in `tools/measure/metrics.py` is its formula, and is worse on what it is there to find.

Controls: the same measure on a clip that is scrambled, still, reversed, recoloured or of another shape.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, cast

import numpy as np
import open_clip
import pytest
import timm
import torch
from einops import rearrange
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from torch.nn import functional as F

import minisvd
from tools.measure import metrics
from tools.tiny import scenes

pytestmark = pytest.mark.slow


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# --- consistency ----------------------------------------------------------------------------------------------------

D = torch.tensor([[2.0, 0.0], [0.6, 0.8], [0.0, 5.0]])  # cosines: <1,2> 0.6, <1,3> 0, <2,3> 0.8
X = torch.tensor([0.8, 0.6])  # cosines with them: 0.8, 0.96, 0.6


def eq_5_to_8(features: Tensor, reference: Tensor) -> float:
    """1/(T-1) sum over t = 2..T of 1/2 (<r, d_t> + <d_t-1, d_t>), as it is written in arXiv 2407.19205."""
    d, r = [one / one.norm() for one in features.double()], reference.double() / reference.double().norm()
    total = 0.0
    for t in range(2, len(d) + 1):
        total += 0.5 * ((r * d[t - 1]).sum().item() + (d[t - 2] * d[t - 1]).sum().item())
    return total / (len(d) - 1)


def test_consistency_is_equations_5_to_8() -> None:
    """By hand ((0.6 + 0.6) + (0 + 0.8)) / 2 / 2 = 0.5, and 0.7 for the image; as the loop on random features, whatever
    their lengths. Controls: opposite features count -1, not VBench's 0; another image, another figure."""
    assert metrics.consistency(D) == pytest.approx(0.5, abs=1e-7)
    assert metrics.consistency(D, X) == pytest.approx(((0.96 + 0.6) + (0.6 + 0.8)) / 4, abs=1e-7)
    assert metrics.consistency(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == -1
    features, image = noise(6, 5).double() - 0.4, noise(5, seed=1).double() - 0.4
    assert metrics.consistency(features) == pytest.approx(eq_5_to_8(features, features[0]), abs=1e-12)
    assert metrics.consistency(features, image) == pytest.approx(eq_5_to_8(features, image), abs=1e-12)
    scaled = features * torch.arange(1, 7)[:, None]
    assert metrics.consistency(scaled, 3 * image) == pytest.approx(metrics.consistency(features, image), abs=1e-12)
    assert abs(metrics.consistency(features, features[1]) - metrics.consistency(features, image)) > 0.01
    assert abs(metrics.consistency(features.flip(0)) - metrics.consistency(features)) > 0.01


def mean_colour(frames: Tensor) -> Tensor:
    return frames.mean(dim=(2, 3))


def first_pixel(frames: Tensor) -> Tensor:
    return frames[:, :, 0, 0]


def test_the_four_measures_take_the_right_extractor_and_image() -> None:
    frames, image = noise(4, 3, 8, 8), noise(3, 16, 16, seed=1)
    measured = metrics.consistencies(frames, image, subject=mean_colour, background=first_pixel)
    assert measured == metrics.Consistencies(
        subject=metrics.consistency(mean_colour(frames)),
        background=metrics.consistency(first_pixel(frames)),
        image_subject=metrics.consistency(mean_colour(frames), mean_colour(image[None])[0]),
        image_background=metrics.consistency(first_pixel(frames), first_pixel(image[None])[0]),
    )
    assert len(set(asdict(measured).values())) == 4


@pytest.fixture(scope="module")
def tiny() -> metrics.Features:
    return metrics.tiny_features()


@pytest.mark.parametrize("name", ["pixels", "tiny"])
def test_a_static_clip_is_consistent_and_a_scrambled_one_is_not(name: str, tiny: metrics.Features) -> None:
    """1 on all four, within 1e-6; frames of unrelated scenes, the first of them the image, are below 0.9."""
    features = {"pixels": metrics.pixel_features, "tiny": tiny}[name]
    scrambled = torch.stack([clip(scene)[0] for scene in drawn()])
    image = scrambled[0]
    found = asdict(metrics.consistencies(image.expand(5, -1, -1, -1), image, subject=features, background=features))
    assert list(found.values()) == pytest.approx([1] * 4, abs=1e-6)
    found = asdict(metrics.consistencies(scrambled, image, subject=features, background=features))
    print(f"unrelated scenes, {name}: {found}")
    assert max(found.values()) < 0.9


@pytest.mark.parametrize(("frames", "image"), [((1, 3, 8, 8), (3, 8, 8)), ((2, 3, 8, 8), (1, 3, 8, 8))])
def test_one_frame_or_a_batch_of_images_is_refused(frames: tuple[int, ...], image: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="need"):
        metrics.consistencies(noise(*frames), noise(*image), subject=mean_colour, background=mean_colour)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(bad: float) -> None:
    """By every measure, wherever they are; a mean of the others would look like a result. Control: without them."""
    good = noise(3, 3, 64, 64).clamp(0, 1)
    frames, scene = good.clone(), scenes.random_clip(np.random.default_rng(0))[0]
    frames[1, 0, 5, 5] = bad
    measures: list[Callable[[torch.Tensor], object]] = [
        lambda x: metrics.consistencies(x, good[0], subject=mean_colour, background=mean_colour),
        lambda x: metrics.consistencies(good, x[1], subject=mean_colour, background=mean_colour),
        lambda x: metrics.consistency(metrics.pixel_features(x)),
        lambda x: metrics.consistency(metrics.pixel_features(good), metrics.pixel_features(x)[1]),
        metrics.smoothness,
        metrics.dynamics,
        lambda x: metrics.psnr(x, good),
        lambda x: metrics.ssim(good, x),
        lambda x: metrics.against_truth(x, scene, 127, 7),
    ]
    for measure in measures:
        measure(good)
        with pytest.raises(ValueError, match="infinite or not numbers"):
            measure(frames)


def test_one_frame_and_features_of_two_sizes_are_refused() -> None:
    one, two = noise(1, 12), noise(2, 12)
    for refused in (
        lambda: metrics.consistency(one),
        lambda: metrics.consistency(one, one[0]),
        lambda: metrics.consistency(two, noise(5)),
        lambda: metrics.smoothness(noise(2, 3, 8, 8)),
        lambda: metrics.lucas_kanade(noise(1, 3, 8, 8)),
    ):
        with pytest.raises(ValueError, match="need"):
            refused()
    assert metrics.consistency(two, one[0]) <= 1  # control


# --- feature extractors ---------------------------------------------------------------------------------------------


def test_pixel_features_are_blind_to_brightness_alone() -> None:
    dark = 0.5 * noise(2, 3, 5, 4)
    features = metrics.pixel_features(dark)
    assert features.shape == (2, 60)
    torch.testing.assert_close(metrics.pixel_features(dark + 0.3), features)
    assert not torch.allclose(features[0], features[1])


def test_tiny_features_are_the_shipped_encoder_and_do_not_depend_on_the_batch(tiny: metrics.Features) -> None:
    frames = noise(metrics.BATCH + 3, 3, 64, 64)
    features = tiny(frames)
    with torch.no_grad():
        expected = minisvd.load("tiny").clip(2 * frames - 1)[:, 0]
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert not features.requires_grad


def pictures() -> tuple[Tensor, list[Image.Image]]:
    """Two smooth pictures, 60x40, as frames in [0,1] and as Pillow images."""
    small = F.interpolate(noise(2, 3, 4, 6), (40, 60), mode="bicubic").clamp(0, 1)
    small = small.mul(255).round()
    return small / 255, [Image.fromarray(rearrange(x.byte(), "c h w -> h w c").numpy()) for x in small]


def assert_as_on_pictures(features: metrics.Features, expected: Tensor) -> None:
    """Within 3 % of what tells the two pictures apart; the same pictures stretched to a square are further off."""
    frames, _ = pictures()
    apart = (expected[0] - expected[1]).norm()
    error = (features(frames) - expected).norm(dim=1).max() / apart
    square = (features(F.interpolate(frames, (40, 40), mode="bicubic").clamp(0, 1)) - expected).norm(
        dim=1
    ).min() / apart
    print(f"of the distance between two pictures: {error:.4f}, stretched {square:.4f}")
    assert error < 0.03 < square


TIMM = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of timm's smallest ViT, random, with a classifier."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "weights.pt"
    torch.save(timm.create_model(TIMM).state_dict(), path)
    return path


def test_timm_features_are_the_model_behind_its_own_preprocessing(timm_file: Path) -> None:
    """As timm's model, loaded by timm from the same file, gives behind timm's transform of Pillow images."""
    model: Any = timm.create_model(TIMM, checkpoint_path=timm_file).eval()
    model.reset_classifier(0)
    transform: Any = create_transform(**resolve_model_data_config(model))
    with torch.no_grad():
        expected = model(torch.stack([transform(picture) for picture in pictures()[1]]))
    assert_as_on_pictures(metrics.timm_features(TIMM, timm_file), expected)


CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def clip_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The weights of a small CLIP, random, that open_clip knows as `small`."""
    torch.manual_seed(0)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", CLIP)
    path = tmp_path / "weights.pt"
    torch.save(open_clip.create_model("small").state_dict(), path)
    return path


def test_open_clip_features_are_the_model_behind_its_own_preprocessing(clip_file: Path) -> None:
    """As open_clip's model, loaded by open_clip from the same file, gives behind its transform of Pillow images."""
    model, _, transform = cast(Any, open_clip.create_model_and_transforms)("small", pretrained=str(clip_file))
    with torch.no_grad():
        expected = model.eval().encode_image(torch.stack([transform(picture) for picture in pictures()[1]]))
    assert_as_on_pictures(metrics.open_clip_features("small", str(clip_file)), expected)


def test_a_model_that_is_not_known_is_refused_with_close_names() -> None:
    with pytest.raises(ValueError, match=r"open_clip has no model 'ViT-H14': did you mean .*ViT-H-14"):
        metrics.open_clip_features("ViT-H14")
    with pytest.raises(ValueError, match=r"timm has no model 'vit_base_patch16_224.dyno': .*vit_base_patch16_224.dino"):
        metrics.timm_features("vit_base_patch16_224.dyno")
    with pytest.raises(ValueError, match=r"timm has no model '%%': see timm.list_models"):
        metrics.timm_features("%%")


def test_weights_that_are_not_there_or_do_not_fit_are_refused(clip_file: Path, timm_file: Path) -> None:
    """In one line that names the file; a model without tags asks for a file."""
    with pytest.raises(ValueError, match="ViT-B-32 has no weights 'laion': give openai or "):
        metrics.open_clip_features("ViT-B-32", "laion")
    with pytest.raises(ValueError, match="small has no weights '': give a file of weights"):
        metrics.open_clip_features("small")
    with pytest.raises(ValueError, match=r"has no weights 'none\.pt'"):
        metrics.timm_features(TIMM, "none.pt")
    for extract, name, file in (
        (metrics.open_clip_features, "small", timm_file),
        (metrics.timm_features, TIMM, clip_file),
    ):
        with pytest.raises(ValueError, match=f"cannot load {file} of {name}") as refusal:
            extract(name, str(file))
        assert "\n" not in str(refusal.value)


# --- dynamics -------------------------------------------------------------------------------------------------------


def texture(shift: tuple[float, float], size: int = 64) -> Tensor:
    """Thirty coloured waves, 6 to 24 pixels long, moved by `shift` exactly: [3,size,size] in [0,1]."""
    generator = torch.Generator().manual_seed(0)
    angle, length = 2 * math.pi * torch.rand(30, generator=generator), 6 + 18 * torch.rand(30, generator=generator)
    phase = 2 * math.pi * torch.rand(3, 30, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    along = angle.cos()[:, None, None] * (x - shift[0]) + angle.sin()[:, None, None] * (y - shift[1])
    return (0.5 + 1.5 * torch.sin(2 * math.pi * along / length[:, None, None] + phase).mean(dim=1)).clamp(0, 1)


def moving(x: float, y: float, t: int = 3) -> Tensor:
    return torch.stack([texture((x * i, y * i)) for i in range(t)])


@pytest.mark.parametrize(("x", "y"), [(0.3, -0.2), (1.0, 0.0), (2.5, 1.5), (-4.0, 2.0), (5.0, -5.0)])
def test_flow_finds_a_known_motion(x: float, y: float) -> None:
    """Up to 7 pixels a frame: 0.1 pixel wrong in the mean, 0.12 at worst away from the border; the negative is not."""
    flow = metrics.lucas_kanade(moving(x, y))
    error = (flow - torch.tensor([x, y])[:, None, None]).norm(dim=1)
    inner = error[:, 8:-8, 8:-8].max()
    print(f"({x}, {y}): mean error {error.mean():.3f}, inner {inner:.3f} pixels")
    assert flow.shape == (2, 2, 64, 64)
    assert error.mean() < 0.1
    assert inner < 0.12
    assert (flow + torch.tensor([x, y])[:, None, None]).norm(dim=1).mean() > math.hypot(x, y)


def test_flow_of_odd_sides_is_in_pixels_of_the_frame() -> None:
    """A 51x77 part of the texture, in which both sides are rounded at each level."""
    frames = torch.stack([texture((2.0 * i, 1.0 * i), size=77)[:, :51] for i in range(2)])
    error = (metrics.lucas_kanade(frames) - torch.tensor([2.0, 1.0])[:, None, None]).norm(dim=1)
    assert error.shape == (1, 51, 77)
    assert error.mean() < 0.1, error.mean()


def test_a_still_clip_has_no_dynamics() -> None:
    assert metrics.dynamics(moving(0.0, 0.0)) == metrics.Dynamics(pixels=0.0, relative=0.0, moving=False)
    fast = metrics.dynamics(moving(2.5, 1.5))
    assert fast.pixels == pytest.approx(math.hypot(2.5, 1.5), rel=0.1)
    assert fast.relative == fast.pixels / 64
    assert fast.moving


def test_dynamics_is_the_mean_of_the_largest_five_percent() -> None:
    """Of 200 vectors the 10 longest: five of length 5 and five of 1 make 3; with a still pair the mean is 1.5."""
    flow = torch.zeros(2, 2, 10, 20)
    flow[0, 0, 0, :5], flow[0, 1, 0, :5] = 3, 4
    flow[0, 0, 0, 5:10] = 1
    found = metrics.dynamics(noise(3, 3, 10, 20), flow=lambda _: flow)
    assert found.pixels == pytest.approx(1.5)
    assert found.relative == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("speed", "pairs", "is_moving"), [(6.1, 2, True), (6.1, 1, False), (5.9, 7, False), (6.1, 7, True)]
)
def test_a_clip_moves_if_a_quarter_of_its_frames_pass_six_pixels_in_256(
    speed: float, pairs: int, is_moving: bool
) -> None:
    """In 8 frames of 256x300: two pairs."""
    flow = torch.zeros(7, 2, 256, 300)
    flow[:pairs, 0] = speed
    assert metrics.dynamics(noise(8, 3, 256, 300), flow=lambda _: flow).moving == is_moving


def test_dynamics_ranks_scenes_by_their_speed() -> None:
    """Rank correlation with the true speeds above 0.9 over 12 clips; with those of the clips' neighbours below 0.5."""
    rng = np.random.default_rng(0)
    clips = [scenes.random_clip(rng) for _ in range(12)]
    found = [metrics.dynamics(torch.from_numpy(frames).float() / 255).pixels for *_, frames in clips]
    speeds = [scenes.speed(bucket) / fps for _, fps, bucket, _ in clips]
    rank, control = metrics.spearman(found, speeds), metrics.spearman(found, np.roll(speeds, 1))
    high = np.subtract(found, speeds)
    print(
        f"rank correlation {rank:.3f}, control {control:.3f}; {high.mean():.2f} (at most {high.max():.2f}) pixels high"
    )
    assert rank > 0.9
    assert control < 0.5
    assert (high > 0).all()
    assert high.max() < 1


def test_smoothness_is_that_of_the_dropped_frames() -> None:
    """Steady motion is made again to 0.02; frames 2 and 4 moved by 2 pixels, or swapped, are not. A still clip: 1. The
    last of an even count has one neighbour and counts not."""
    steady = moving(2.0, -1.0, t=5)
    jerky = torch.stack([frame.roll(2 * (i % 2), dims=-1) for i, frame in enumerate(steady)])
    found, control = metrics.smoothness(steady), metrics.smoothness(jerky)
    print(f"steady {found:.4f}, jerky {control:.4f}, swapped {metrics.smoothness(steady[[0, 3, 2, 1, 4]]):.4f}")
    assert found > 0.98
    assert control < found - 0.02
    assert metrics.smoothness(steady[[0, 3, 2, 1, 4]]) < found - 0.02
    assert metrics.smoothness(steady[:1].repeat(4, 1, 1, 1)) == pytest.approx(1, abs=1e-6)
    assert metrics.smoothness(torch.cat([steady, noise(1, 3, 64, 64)])) == found


# --- fidelity -------------------------------------------------------------------------------------------------------


def test_psnr_of_a_known_error() -> None:
    """An error of 0.1 everywhere is 20 dB, half as often 23.01; none is inf; the order does not matter."""
    a = noise(2, 3, 16, 16) / 2
    assert metrics.psnr(a, a + 0.1) == pytest.approx(20, abs=1e-4)
    half = a + 0.1 * (torch.arange(16) % 2)
    assert metrics.psnr(a, half) == metrics.psnr(half, a) == pytest.approx(20 + 10 * math.log10(2), abs=1e-4)
    assert metrics.psnr(a, a) == math.inf
    with pytest.raises(ValueError, match="one shape"):
        metrics.psnr(a, a[:1])


def ssim_place_by_place(a: np.ndarray, b: np.ndarray) -> float:
    """The definition of Wang et al. as written, one window at a time, of one channel [h,w]."""
    offset = np.arange(11) - 5
    window = np.exp(-(offset[:, None] ** 2 + offset**2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mx, my = (window * x).sum(), (window * y).sum()
            sx, sy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            sxy = (window * (x - mx) * (y - my)).sum()
            top = (2 * mx * my + 0.01**2) * (2 * sxy + 0.03**2)
            found.append(top / ((mx**2 + my**2 + 0.01**2) * (sx + sy + 0.03**2)))
    return float(np.mean(found))


def test_ssim_is_its_definition() -> None:
    """Equal within 1e-6 to the sum over windows, averaged over frames and channels; one pixel moved changes it."""
    a = noise(2, 3, 17, 14)
    b = (a + 0.2 * noise(2, 3, 17, 14, seed=1)).clamp(0, 1)
    expected = np.mean([ssim_place_by_place(x, y) for x, y in zip(a.flatten(0, 1).numpy(), b.flatten(0, 1).numpy())])  # noqa: B905
    assert metrics.ssim(a, b) == pytest.approx(expected, abs=1e-6)
    assert metrics.ssim(a, b.roll(1, dims=-1)) < expected - 0.2


def test_ssim_of_an_image_with_itself_and_its_negative() -> None:
    a = noise(1, 3, 32, 32)
    assert metrics.ssim(a, a) == pytest.approx(1, abs=1e-9)
    assert metrics.ssim(a, 1 - a) < -0.5
    with pytest.raises(ValueError, match="at least 11"):
        metrics.ssim(a[..., :10], a[..., :10])


# --- statistics -----------------------------------------------------------------------------------------------------


def test_the_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    """Of 200 samples of 40 normal values, the 80 % interval holds the true mean in 70 to 90 %; the same draws again."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = metrics.bootstrap_interval(rng.normal(3, 2, 40), np.mean, level=0.8, draws=200)
        hits += low < 3 < high
    assert 140 < hits < 180, hits
    values = rng.normal(size=40)
    assert metrics.bootstrap_interval(values, np.mean) == metrics.bootstrap_interval(values, np.mean)
    assert metrics.bootstrap_interval(values, np.mean) != metrics.bootstrap_interval(values, np.mean, seed=1)


def test_the_bootstrap_draws_rows_and_takes_any_statistic() -> None:
    """Of pairs that agree in rank every sample does too; of independent ones the interval holds 0."""
    x = np.random.default_rng(0).normal(size=(60, 2))

    def rank(rows: np.ndarray) -> float:
        return metrics.spearman(rows[:, 0], rows[:, 1])

    alike = np.stack([x[:, 0], np.exp(x[:, 0])], axis=1)
    assert metrics.bootstrap_interval(alike, rank, draws=200) == pytest.approx((1, 1))
    low, high = metrics.bootstrap_interval(x, rank, draws=200)
    assert low < 0 < high


def test_the_paired_difference_keeps_pairs() -> None:
    """Scenes that differ by far more than the two models: the pairs tell them apart, shuffled pairs do not."""
    rng = np.random.default_rng(0)
    scene = 10 * rng.normal(size=30)
    a, b = scene + 0.5 + 0.1 * rng.normal(size=30), scene
    found = metrics.paired_difference(a, b)
    assert found.mean == pytest.approx(np.mean(a) - np.mean(b))
    assert 0.4 < found.low < found.mean < found.high < 0.6
    shuffled = metrics.paired_difference(a, rng.permutation(b))
    assert shuffled.low < 0 < shuffled.high


def test_a_difference_has_the_p_of_students_t() -> None:
    """By the table: t = 2.228 at 10 degrees of freedom, 2.042 at 30, 1 at 1; the sample's own t; no difference: 1."""
    for t, df, p in ((2.2281389, 10, 0.05), (2.0422725, 30, 0.05), (1.0, 1, 0.5), (-3.1692727, 10, 0.01)):
        assert metrics.student_p(t, df) == pytest.approx(p, rel=1e-6)
    assert metrics.student_p(1e4, 30) < 1e-12
    a, b = np.random.default_rng(0).normal(size=(2, 20, 3))
    difference = (a - b).mean(axis=1)
    error = difference.std(ddof=1) / math.sqrt(20)
    found = metrics.paired_difference(a, b)
    assert found.error == pytest.approx(error)
    assert found.p == pytest.approx(metrics.student_p(difference.mean() / error, 19))
    assert metrics.paired_difference(a, a).p == 1
    assert metrics.paired_difference(a + 1, a).p == pytest.approx(0, abs=1e-12)


def test_p_is_uniform_where_nothing_differs_and_holm_keeps_all_of_a_family() -> None:
    """Of 400 families of 20 comparisons without an effect, each of 10 scenes, most have an uncorrected p of at most
    0.05 and 2 to 8 % a corrected one; by hand (0.01, 0.04, 0.03) become (0.03, 0.06, 0.06)."""
    rng = np.random.default_rng(0)
    raw = corrected = 0
    for _ in range(400):
        drawn = rng.normal(size=(20, 10))
        t = drawn.mean(axis=1) / (drawn.std(axis=1, ddof=1) / math.sqrt(10))
        p = [metrics.student_p(value, 9) for value in t]
        raw += min(p) <= 0.05
        corrected += metrics.holm(p).min() <= 0.05
    print(f"of 400 families: {raw} with a p of at most 0.05, {corrected} after the correction")
    assert raw > 200
    assert 8 <= corrected <= 32
    assert metrics.holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert metrics.holm([0.5, 0.9]).tolist() == [1, 1]


def test_the_smallest_effect_is_found_in_four_of_five_studies() -> None:
    """Of 2,000 studies of 100 scenes in which it is true, 77 to 83 % find it at the level of 10 comparisons; half of it
    is found in under a quarter. One comparison by hand: (1.960 + 0.842) times the error."""
    rng, found = np.random.default_rng(0), []
    for share in (1.0, 0.5):
        effect = share * metrics.smallest_effect(0.1, comparisons=10)
        drawn = rng.normal(effect, 1, size=(2000, 100))
        z = drawn.mean(axis=1) / 0.1
        found.append(float(np.mean([2 * (1 - NormalDist().cdf(abs(value))) * 10 <= 0.05 for value in z])))
    print(f"found {found[0]:.3f}, half of it {found[1]:.3f}")
    assert 0.77 < found[0] < 0.83
    assert found[1] < 0.25
    assert metrics.smallest_effect(1.0) == pytest.approx(2.8016, abs=1e-4)


def test_intervals_of_several_noises_a_scene_are_the_scenes() -> None:
    """200 times 30 scenes of 4 values that share most of their spread: the clustered 95 % intervals of mean and share
    hold the truth in 88 to 99 %; controls, the same with each value as a scene of its own, in under 80 %."""
    rng = np.random.default_rng(0)
    hits = {"mean": 0, "alone": 0, "share": 0, "share alone": 0}
    for _ in range(200):
        values = rng.normal(size=(30, 1)) + 0.3 * rng.normal(size=(30, 4))
        right = values > 0.5
        truth = 1 - NormalDist().cdf(0.5 / math.sqrt(1.09))
        for name, found, expected in (
            ("mean", metrics.clustered(values, draws=400), 0.0),
            ("alone", metrics.clustered(values.reshape(-1, 1), draws=400), 0.0),
            ("share", metrics.clustered_share(right), truth),
            ("share alone", metrics.clustered_share(right.reshape(-1, 1)), truth),
        ):
            hits[name] += found[1] <= expected <= found[2]
    print({name: f"{count / 2:.1f} %" for name, count in hits.items()})
    assert 176 <= hits["mean"] <= 198
    assert 176 <= hits["share"] <= 198
    assert max(hits["alone"], hits["share alone"]) < 160
    same = np.ones((50, 3))
    assert metrics.clustered_share(same) == (1.0, *metrics.wilson_interval(50, 50))
    value, low, high = metrics.clustered(np.array([[1.0, 9.0], [2.0, 3.0], [2.0, 2.0], [0.0, 1.0]]), np.median)
    assert low < value == 2 < high


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [(9, 10, (0.5958, 0.9821)), (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (50, 100, (0.4038, 0.5962))],
)
def test_wilson_is_its_formula(successes: int, n: int, expected: tuple[float, float]) -> None:
    """By hand with z = 1.95996; at both ends |s/n - p| is z sqrt(p (1 - p) / n), unless the end is 0 or 1."""
    interval = metrics.wilson_interval(successes, n)
    assert interval == pytest.approx(expected, abs=5e-5)
    for p in interval:
        if 1e-9 < p < 1 - 1e-9:
            assert abs(successes / n - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), rel=1e-5)


def test_spearman_is_pearson_of_mean_ranks() -> None:
    """By hand, ties included: ranks (1, 2.5, 2.5, 4) and (1, 2, 3, 4) give 4.5 / sqrt(4.5 * 5)."""
    assert metrics.spearman([0, 7, 7, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert metrics.spearman([1, 2, 3], [1, 10, 100]) == pytest.approx(1)
    assert metrics.spearman([1, 2, 3], [5, 4, -9]) == pytest.approx(-1)
    assert math.isnan(metrics.spearman([1, 1, 1], [1, 2, 3]))
    a, b = np.random.default_rng(0).integers(0, 6, (2, 50))
    ranks = [[(x < y).sum() + ((x == y).sum() + 1) / 2 for y in x] for x in (a, b)]  # each value against all
    assert metrics.spearman(a, b) == pytest.approx(np.corrcoef(ranks)[0, 1])


def test_samples_that_cannot_be_used_are_refused() -> None:
    for values in ([], [1.0, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="finite"):
            metrics.bootstrap_interval(values, np.mean)
    for a, b in (([1, 2], [1]), ([1], [1, 2])):
        with pytest.raises(ValueError, match="need"):
            metrics.spearman(a, b)
        with pytest.raises(ValueError, match="need"):
            metrics.paired_difference(a, b)
    for successes, n in ((-1, 4), (5, 4), (0, 0)):
        with pytest.raises(ValueError, match="need"):
            metrics.wilson_interval(successes, n)


# --- distance from the right answer ---------------------------------------------------------------------------------

FPS, FAST, SLOW = 7, 230, 10  # bucket FAST goes 25 pixels in 8 frames, SLOW one


def drawn() -> list[scenes.Scene]:
    rng = np.random.default_rng(0)
    return [scenes.random_scene(rng) for _ in range(10)]


def clip(scene: scenes.Scene, bucket: float = FAST) -> Tensor:
    return torch.from_numpy(scenes.render(scene, scenes.path(scene, bucket, FPS))).float() / 255


def wrong_in(measured: metrics.Measured) -> set[str]:
    """Which measures of place, motion and look are not those of the right clip."""
    limits = {"heading_error": 6, "speed_error": 0.06, "last_position_error": 1, "colour_error": 0.01}
    wrong = {name for name, limit in limits.items() if getattr(measured, name) > limit}
    return wrong if measured.shape_kept else wrong | {"shape_kept"}


def test_a_true_clip_is_right_in_every_measure() -> None:
    for scene in drawn():
        measured = metrics.against_truth(clip(scene), scene, FAST, FPS)
        assert measured.right, measured
        assert measured.right_in_every_frame
        assert measured.found == 1
        assert measured.class_right == (True,) * 8
        assert measured.overlap == (1.0,) * 8
        assert measured.psnr == measured.first_frame_psnr == math.inf
        assert measured.asked_speed == pytest.approx(28 * FAST / 255 / FPS)
        assert measured.speed == pytest.approx(measured.asked_speed, rel=0.06)
        assert wrong_in(measured) == set(), measured


def test_a_reversed_clip_is_wrong_in_where_it_goes() -> None:
    """The heading is opposite, the last position off by the whole path, the first frame wrong; nothing else."""
    for scene in drawn():
        measured = metrics.against_truth(clip(scene).flip(0), scene, FAST, FPS)
        assert wrong_in(measured) == {"heading_error", "last_position_error"}, measured
        assert measured.heading_error > 174
        assert measured.last_position_error == pytest.approx(7 * measured.asked_speed, abs=1)
        assert measured.first_frame_psnr < 25
        assert measured.psnr < 25
        assert not measured.right


def test_a_recoloured_clip_is_wrong_in_its_colour() -> None:
    for scene in drawn():
        shifted = tuple(float(v) for v in np.array(scene.rgb) - 0.12 * (np.array(scene.rgb) > 0.4))
        measured = metrics.against_truth(clip(replace(scene, rgb=shifted)), scene, FAST, FPS)
        assert wrong_in(measured) == {"colour_error"}, (scene, measured)
        assert measured.colour_error == pytest.approx(np.linalg.norm(np.subtract(shifted, scene.rgb)), abs=0.01)
        assert measured.right == (measured.colour_error <= 0.1)


def test_a_clip_of_another_shape_is_wrong_in_its_shape() -> None:
    for scene in drawn():
        other = {"circle": "star", "square": "triangle", "triangle": "square", "star": "circle"}[scene.shape]
        measured = metrics.against_truth(clip(replace(scene, shape=other)), scene, FAST, FPS)
        assert wrong_in(measured) - {"last_position_error"} == {"shape_kept"}, (scene, measured)
        assert measured.last_position_error < 2
        assert not measured.right


def test_a_clip_whose_last_frames_are_another_shape_is_not_right_in_every_frame() -> None:
    """It is right, for the class over all frames is kept; that of the last two is not, and there the overlap falls."""
    for scene in drawn():
        other = {"circle": "star", "square": "triangle", "triangle": "square", "star": "circle"}[scene.shape]
        frames = torch.cat([clip(scene)[:6], clip(replace(scene, shape=other))[6:]])
        measured = metrics.against_truth(frames, scene, FAST, FPS)
        assert measured.shape_kept
        assert measured.class_right == (True,) * 6 + (False,) * 2
        assert min(measured.overlap[:6]) == 1
        assert max(measured.overlap[6:]) < 0.85
        assert measured.right
        assert not measured.right_in_every_frame


def test_overlap_is_intersection_over_union_of_the_shape() -> None:
    """Of a square on black, moved by its half: a third; where no pixel of it is left: 0; a colour next to it counts."""
    scene = replace(drawn()[0], rgb=(0.0, 0.8, 0.0))
    backdrop = torch.from_numpy(scenes.render(scene, np.full((1, 2), 1000.0))).float() / 255
    green = torch.tensor(scene.rgb)[:, None, None]

    def square(left: int, colour: Tensor = green) -> np.ndarray:
        frames = backdrop.clone()
        frames[:, :, 20:28, left : left + 8] = colour
        return frames.numpy()

    def overlap(frames: np.ndarray) -> float:
        return float(scenes.same_place(frames, square(20), scene)[0])

    assert overlap(square(20)) == 1
    assert overlap(square(24)) == pytest.approx(1 / 3)
    assert overlap(square(28)) == 0
    assert overlap(backdrop.numpy()) == 0
    middle = backdrop[:, :, 24, 24][0][:, None, None]
    assert overlap(square(20, 0.6 * green + 0.4 * middle)) == 1
    assert overlap(square(20, 0.3 * green + 0.7 * middle)) == 0


def test_a_clip_at_half_the_speed_is_wrong_in_its_speed() -> None:
    """And so in where it ends. It is right, for the speed is no part of that, but not in every frame."""
    for scene in drawn():
        measured = metrics.against_truth(clip(scene, FAST / 2), scene, FAST, FPS)
        assert wrong_in(measured) == {"speed_error", "last_position_error"}, measured
        assert measured.speed_error == pytest.approx(0.5, abs=0.05)
        assert measured.first_frame_psnr == math.inf
        assert measured.class_right == (True,) * 8
        assert measured.overlap[0] == 1 > metrics.RIGHT_OVERLAP > measured.overlap[-1]
        assert measured.right
        assert not measured.right_in_every_frame


def test_where_nothing_moves_heading_and_speed_are_not_measured() -> None:
    """Of a slow clip both are nan, forwards and backwards, and it is right; just above 4 pixels they are numbers."""
    scene = drawn()[0]
    for frames in (clip(scene, SLOW), clip(scene, SLOW).flip(0)):
        measured = metrics.against_truth(frames, scene, SLOW, FPS)
        assert math.isnan(measured.heading_error)
        assert math.isnan(measured.speed_error)
        assert measured.right
        assert measured.right_in_every_frame == (min(measured.overlap) >= metrics.RIGHT_OVERLAP)
        assert all(measured.class_right)
    bucket = 4.01 / 28 * 255 / 7 * FPS
    assert metrics.against_truth(clip(scene, bucket), scene, bucket, FPS).heading_error < 30


def test_a_shape_that_vanishes_is_not_found() -> None:
    scene = drawn()[0]
    empty = torch.from_numpy(scenes.render(scene, np.full((8, 2), 1000.0))).float() / 255
    half = torch.cat([clip(scene)[:4], empty[4:]])
    measured = metrics.against_truth(half, scene, FAST, FPS)
    assert measured.found == 0.5
    assert math.isnan(measured.last_position_error)
    assert not measured.right
    measured = metrics.against_truth(empty, scene, FAST, FPS)
    assert measured.found == 0
    assert math.isnan(measured.colour_error)
    assert not measured.shape_kept
    assert not measured.right
    with pytest.raises(ValueError, match="need"):
        metrics.against_truth(empty[:1], scene, FAST, FPS)
