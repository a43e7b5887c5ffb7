"""Theorem: each setting is checked by one table, alike for a call, the command line and generation_config.json."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import minisvd
from minisvd import GenerationConfig, StableVideoDiffusion, Video
from minisvd.cli import main, parser
from minisvd.config import CHOICES, SETTINGS, ClipConfig, UNetConfig, VAEConfig, check
from minisvd.folder import CONFIG_FILES, GENERATION_FILE
from minisvd.pipeline import PER_IMAGE, check_settings

IMAGE = torch.zeros(3, 64, 64)
QUICK: dict[str, Any] = {"num_frames": 2, "steps": 2, "size": (64, 64), "progress": False}
FLAGS = {"num_frames": "--frames", "zoom": "--zoom"}
OUTSIDE = (
    [
        (name, tuple([value] * max(1, len(setting.parts))) if setting.parts else value)
        for name, setting in SETTINGS.items()
        for value in (
            setting.low - 1,
            setting.high + 1,
            10**400,
            float("nan"),
            float("inf"),
            True,
            "5",
            None,
            b"7",
            [[1]],
        )
    ]
    + [(name, 1.5) for name, setting in SETTINGS.items() if setting.whole]
    + [(name, "both") for name in CHOICES]
)


@pytest.fixture(scope="module")
def svd(tiny_folder: Path) -> Any:
    return minisvd.load(tiny_folder)


@pytest.mark.parametrize(("name", "value"), OUTSIDE)
def test_what_is_outside_is_refused_with_the_value_and_the_remedy(name: str, value: Any) -> None:
    """Below, above, not finite, another kind: one short sentence that begins with the name. Controls: both ends."""
    with pytest.raises(ValueError, match=rf"^{name} is .*; need ") as refusal:
        check(name, value)
    assert len(str(refusal.value)) < 200
    for end in (SETTINGS[name].low, SETTINGS[name].high) if name in SETTINGS else ():
        many = tuple([end] * len(SETTINGS[name].parts))
        assert check(name, many or end) == (many or end)


@pytest.mark.parametrize("make", [np.float64, np.float32, np.array, torch.tensor, lambda v: np.array([v])])
def test_numbers_of_numpy_and_torch_are_numbers(make: Any) -> None:
    """As they are written: 0-dimensional ones as one number, lists of one for the settings that have one per image."""
    for name in PER_IMAGE[:3]:
        assert SETTINGS[name].check_each(name, make(8.0)) == [8.0]
    assert check("steps", np.int64(3)) == 3
    assert type(check("steps", torch.tensor(3))) is int
    assert check("size", np.array([64, 32])) == check("size", torch.tensor([64, 32])) == check("size", [64, 32])
    assert check("guidance", np.array([1.0, 2.0])) == (1.0, 2.0)
    with pytest.raises(ValueError, match="steps is"):  # control
        check("steps", make(8.0))


def test_the_command_line_and_a_folder_s_file_are_checked_by_it(
    svd: Any, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same sentence from the call, `minisvd generate`, `info`, `account` and the file."""
    (tmp_path / "model").mkdir()
    for path in tiny_folder.iterdir():
        (tmp_path / "model" / path.name).symlink_to(path)
    own = tmp_path / "model" / GENERATION_FILE
    for name in (field.name for field in fields(GenerationConfig)):
        setting = SETTINGS[name]
        value: Any = [10**30] * len(setting.parts) or 10**30
        with pytest.raises(ValueError, match=f"{name} is") as refusal:
            svd(IMAGE, **QUICK | {name: value})
        with pytest.raises(ValueError, match=f"{name} is"):
            replace(GenerationConfig(), **{name: value})
        own.write_text(json.dumps({name: value}))
        for argv in (["info", "--device", "cpu"], ["account"]):
            assert main([*argv, "--model", str(own.parent)]) == 2
            assert f"{own}: {refusal.value}" in capsys.readouterr().err
    for bad in ('{"guidance": [3, 1]}', '{"guidance": [NaN, 1]}', '{"num_frames": 1e30}', '{"steps": "5"}'):
        own.write_text(bad)
        with pytest.raises(ValueError, match=GENERATION_FILE):
            minisvd.load(own.parent)
    own.write_text('{"guidance": [1, 3]}')  # control
    assert minisvd.load(own.parent).generation.guidance == (1.0, 3.0)


def test_every_setting_of_the_table_is_a_flag_and_is_documented() -> None:
    """--help has each, and the call's docstring each that it takes."""
    command = parser()._subparsers._group_actions[0].choices["generate"]  # pyright: ignore
    flags = {action.dest for action in command._actions}
    assert {*SETTINGS, *CHOICES} <= flags
    text = StableVideoDiffusion.__call__.__doc__ or ""
    assert all(name in text for name in {*SETTINGS, *CHOICES} - {"zoom"})


def test_one_value_for_each_image_may_be_a_list_an_array_or_a_range() -> None:
    given = check_settings(fps=np.array([7.0, 8.0]), seed=range(2), noise_aug=torch.tensor(0.0), motion_bucket=[1])
    assert given == {"fps": [7.0, 8.0], "seed": [0, 1], "noise_aug": [0.0], "motion_bucket": [1.0]}
    with pytest.raises(ValueError, match="fps is empty"):
        check_settings(fps=[])


@pytest.mark.parametrize("seed", [2**32, 1.7, -1, "5", True, [1.5]])
def test_a_seed_that_would_be_another_s_is_refused(svd: Any, seed: Any) -> None:
    """32 bits count: 2**32 would draw what 0 draws. Control: 2**32 - 1 draws something else than 0."""
    with pytest.raises(ValueError, match="seed is"):
        svd(IMAGE, seed=seed, **QUICK)
    generators = [torch.Generator().manual_seed(one) for one in (0, 2**32 - 1)]
    assert not torch.equal(*(torch.randn(4, generator=one) for one in generators))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"fps": np.array([7.0])},
        {"sigmas": [3.0, 1.0, 0.0]},
        {"sigmas": np.array([3.0, 1.0, 0.0])},
        {"decode_chunk": np.int64(2)},
        {"size": [64, 64]},
        {"size": np.array([64, 64])},
        {"guidance": np.array([1.0, 2.0])},
        {"noise": np.zeros((1, 2, 4, 8, 8))},
        {"aug_noise": np.zeros((1, 3, 64, 64))},
        {"seed": np.int64(3)},
    ],
    ids=str,
)
def test_what_is_plainly_meant_is_taken(svd: Any, settings: dict[str, Any]) -> None:
    """Lists, arrays and numpy's scalars give the bits of the tensors and numbers that they stand for."""
    (name, value), *_ = settings.items()
    native = value.tolist() if hasattr(value, "tolist") else value
    native = torch.tensor(native) if name in ("sigmas", "noise", "aug_noise") else native
    expected = svd(IMAGE, **QUICK | {name: native})
    assert torch.equal(svd(IMAGE, **QUICK | settings).frames, expected.frames)


@pytest.mark.parametrize(
    "settings",
    [
        *({"steps": "5"}, {"steps": [2]}, {"guidance": 3}, {"guidance": "ab"}, {"size": 64}, {"size": "64x64"}),
        *({"fps": b"7"}, {"fps": None}, {"fps": "77"}, {"cut_step": 2.5}, {"cut_step": float("nan")}, {"fit": None}),
        *({"stage2": ["mean"]}, {"sigmas": "ab"}, {"sigmas": 3}, {"sigmas": [None]}, {"noise": "ab"}, {"noise": 3}),
        *({"noise": torch.full((1, 2, 4, 8, 8), torch.nan)}, {"callback": 5}, {"motion_bucket": 10**400}),
    ],
    ids=str,
)
def test_another_kind_of_value_is_a_value_error_before_any_work(
    svd: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StableVideoDiffusion, "sample", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises(ValueError, match=next(iter(settings))):
        svd(IMAGE, **QUICK | settings)


@pytest.mark.parametrize("image", [5, None, object(), "", b"x", np.array(["a"]), (1, 2)])
def test_another_kind_of_image_is_a_value_error(svd: Any, image: Any) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=r"image|array|folder"):
        svd(image, **QUICK)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        *((VAEConfig, "scaling_factor", value) for value in (float("inf"), 1e300, 0.0, float("nan"), -1.0)),
        *((ClipConfig, "std", (value,) * 3) for value in (0.0, -1.0, float("inf"), float("nan"))),
        *((ClipConfig, "mean", (value,) * 3) for value in (float("inf"), float("nan"), 1e300)),
        *((UNetConfig, "layers_per_block", value) for value in (10**6, 0, 1.5)),
        *((UNetConfig, "cross_attention_dim", value) for value in (10**12, -1, 0)),
        *((ClipConfig, "num_hidden_layers", value) for value in (10**6, 0)),
        *((ClipConfig, "hidden_size", value) for value in (0, 10**9)),
        (UNetConfig, "block_out_channels", (32 * 10**9, 64, 64, 64)),
        (VAEConfig, "block_out_channels", (32,) * 10**5),
        (VAEConfig, "latent_channels", 10**9),
    ],
)
def test_a_size_or_factor_that_no_model_has_is_refused(config: Any, field: str, value: Any) -> None:
    """Infinite, absurd or not a number: before a module of that size is built. Control: the released configuration."""
    config()
    with pytest.raises(ValueError, match=f"{field} is"):
        config(**{field: value})


def test_json_nested_deeply_is_a_sentence(tiny_folder: Path, tmp_path: Path) -> None:
    for name in CONFIG_FILES.values():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[" * 10**6)
    for path in tiny_folder.rglob("*.safetensors"):
        (tmp_path / path.relative_to(tiny_folder)).symlink_to(path)
    with pytest.raises(ValueError, match="is not valid JSON"):
        minisvd.load(tmp_path)


def test_a_video_is_made_of_an_array_too_and_of_nothing_else() -> None:
    frames = np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)
    assert torch.equal(Video(frames, 7).frames, torch.from_numpy(frames))  # pyright: ignore
    assert Video(torch.zeros(1, 3, 8, 8), np.float32(7)).fps == 7.0  # pyright: ignore
    for bad in ([[1.0]], None, "frames"):
        with pytest.raises(ValueError, match="frames are"):
            Video(bad, 7)  # pyright: ignore
    for fps in (100_000, 3e9, 1e-9, "7", None, True):
        with pytest.raises(ValueError, match="fps is"):
            Video(torch.zeros(1, 3, 8, 8), fps)  # pyright: ignore
