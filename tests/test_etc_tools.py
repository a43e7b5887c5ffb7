"""Proposition: the tiny ETC's programs measure what they say, their arms start where they should, and runs go on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import relative_error
from minisvd.config import UNetConfig
from minisvd.text import TextToVideo, load_sd
from tools.etc import experiment, train
from tools.etc.clips import LABEL, PAIRS, RATES, STILL, clip, draw, encoded, make_pool, pace
from tools.etc.model import (
    FrameByFrame,
    load_text,
    load_vae,
    masked_to_frames,
    new_image_network,
    sample,
    v_loss,
    v_of,
    with_time,
)
from tools.etc.reader import RIGHT, agrees, drift, parts, read, validate
from tools.tiny import scenes
from tools.tiny.captions import tokens

CONFIG = UNetConfig(4, 4, (64, 64), (True, False), (2, 2), 1, 16, 64, num_time_ids=1)
BASE = Path(__file__).parent.parent / "weights/tiny"


# --- the reader -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_read_of_true_clips_is_right_and_disagrees_with_other_captions():
    own, others = validate(42)
    print({name: (own[name], round(others[name], 2)) for name in own})
    assert min(own.values()) >= RIGHT
    assert max(others[name] for name in ("colour", "shape", "heading")) < 0.5  # control
    assert others["pace"] < 0.7


@pytest.mark.slow
def test_more_true_clips_are_read_right():
    """Thirty of each rate; `python -m tools.etc.reader` reads 500."""
    own, others = validate(210)
    print({name: (own[name], round(others[name], 2)) for name in own})
    assert min(own.values()) >= RIGHT
    assert max(others[name] for name in ("colour", "shape", "heading")) < 0.5  # control


def test_frames_without_one_whole_body_are_errors():
    scene = draw(np.random.default_rng(0))
    frames = clip(scene, 30).astype(np.float32) / 255
    assert read(frames).errors == 0
    broken = frames.copy()
    broken[1] = 0.1  # no body
    broken[2, :, :, :32] = broken[2, :, :, 32:] = frames[2][:, :, 20:52]  # two, or two halves
    assert read(broken).errors == 2 / len(frames)
    mask = np.zeros((64, 64), bool)
    mask[3:10, 3:10] = mask[20:26, 20:26] = mask[40, 40] = True
    assert [part.sum() for part in parts(mask)] == [49, 36]


def test_a_ground_that_changes_its_colour_drifts():
    """By as much as it changes. Control: in true clips it does not."""
    for i in range(8):
        frames = clip(draw(np.random.default_rng(i)), 4).astype(np.float32) / 255
        assert drift(frames) < 0.02
        frames[-1] += np.array([0.1, 0, 0], np.float32)[:, None, None]
        assert drift(frames) == pytest.approx(0.1, abs=0.02)


def test_the_rate_alone_fixes_the_pace():
    scene = draw(np.random.default_rng(1))
    assert [round(pace(fps), 2) for fps in RATES] == [4.67, 2.33, 1.17, 0.58, 0.31, 0.16, 0.08]
    for fps in (1, 2, 4):
        reading = read(clip(scene, fps).astype(np.float32) / 255)
        assert reading.pace == pytest.approx(pace(fps), rel=0.1)
        assert all(agrees(reading, scenes.caption(scene), fps).values())
        assert not agrees(reading, scenes.caption(scene), 60)["pace"]  # control


def test_a_shortened_caption_is_the_caption_without_its_ground():
    """And one that names none, or that is not chosen, stays as it is."""
    said = ["a red star moving up left over a navy gradient", "a red star", "a blue circle moving up over a teal glow"]
    wanted = ["a red star moving up left", "a red star", said[2]]
    rows = torch.tensor([True, True, False])
    assert torch.equal(train.shortened(tokens(said), rows), tokens(wanted))
    assert not torch.equal(train.shortened(tokens(said), ~rows), tokens(wanted))  # control


def test_a_still_is_one_frame_as_often_as_a_clip_has_frames(tmp_path: Path):
    """And the images of a label differ; latents are the float32 encoder's to a hundredth of their spread."""
    vae = load_vae(BASE)
    stills, labels = (make_pool(tmp_path / f"{kind}.pt", vae, kind, 2, 0) for kind in ("stills", "labels"))
    assert stills.clips.shape == labels.clips.shape == (2, scenes.FRAMES, 4, 8, 8)
    assert (stills.clips == stills.clips[:, :1]).all()
    assert not (labels.clips == labels.clips[:, :1]).all()  # control
    frames = clip(draw(np.random.default_rng(1)), 2)
    exact = vae.config.scaling_factor * vae.encode(torch.from_numpy(scenes.to_unit(frames)))
    error = (encoded(vae, frames) - exact).std() / exact.std()
    print(f"relative error of the latents {error:.1e}")
    assert error < 1e-2
    assert (encoded(vae, frames[::-1].copy()) - exact).std() / exact.std() > 1e-2  # control


# --- networks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def base():
    torch.manual_seed(0)
    unet = new_image_network(CONFIG, mixed=False)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if not name.startswith("fps_embedding"):
                parameter += 0.05 * torch.randn(parameter.shape)
    return unet.eval()


@torch.no_grad()
def test_temporal_layers_that_start_as_identities_change_nothing(base):
    """B0 is the base, frame by frame; B is not."""
    x, level, text, fps = (
        torch.randn(2, 8, 4, 4, 4),
        torch.tensor([900, 20]),
        torch.randn(2, 5, 16),
        torch.tensor([1, 8]),
    )
    alone = FrameByFrame(CONFIG, mixed=False)
    alone.load_state_dict(base.state_dict())
    expected = v_of(alone, x, level, text, fps)
    error = relative_error(v_of(with_time(base, identity=True), x, level, text, fps), expected)
    print(f"relative error {error:.1e}")
    assert error <= 1e-5
    assert relative_error(v_of(with_time(base, identity=False), x, level, text, fps), expected) > 1e-2  # control
    assert relative_error(v_of(base, x, level, text, fps), expected) > 1e-2  # and the grid is another function


@torch.no_grad()
def test_frames_alone_see_nothing_of_each_other_and_masked_attention_is_another_network(base):
    """H: a change of frame 7 changes frame 7 alone, in the grid all; G differs from A."""
    x, text = torch.randn(1, 8, 4, 4, 4), torch.randn(1, 5, 16)
    other = x.clone()
    other[:, 7] += 1
    alone = FrameByFrame(CONFIG, mixed=False)
    alone.load_state_dict(base.state_dict())

    def changed(unet) -> list[bool]:
        change = unet(x, torch.tensor(500), text, torch.tensor(8)) - unet(
            other, torch.tensor(500), text, torch.tensor(8)
        )
        return (change.abs().amax((0, 2, 3, 4)) > 1e-6).tolist()

    assert changed(alone) == [False] * 7 + [True]
    assert changed(base) == [True] * 8  # control
    before = base(x, torch.tensor(500), text, torch.tensor(8))
    assert relative_error(masked_to_frames(base)(x, torch.tensor(500), text, torch.tensor(8)), before) > 1e-4


def test_the_masked_attention_is_attention_within_frames(base):
    """Equal to the attention run on each frame's tokens alone."""
    from einops import rearrange

    from minisvd.etc import to_frames, to_grid
    from tools.etc.model import WithinFrames

    attention = base.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1")
    video = torch.randn(2, 8, 64, 4, 4)
    tokens = rearrange(to_grid(video), "b c h w -> b (h w) c")
    out = WithinFrames(attention, 8)(tokens, tokens)
    out = to_frames(rearrange(out, "b (h w) c -> b c h w", h=8), 8)
    each = rearrange(video, "b t c h w -> (b t) (h w) c")
    expected = rearrange(attention(each, each), "(b t) (h w) c -> b t c h w", b=2, h=4)
    error = relative_error(out, expected)
    print(f"relative error {error:.1e}")
    assert error <= 1e-5
    assert relative_error(attention(tokens, tokens).reshape(-1), expected.reshape(-1)) > 1e-3  # control


@torch.no_grad()
def test_the_loss_of_the_true_v_is_zero(base):
    """For a network that knows the clean video; the base's is not."""
    clean, noise = torch.randn(3, 8, 4, 4, 4), torch.randn(3, 8, 4, 4, 4)
    timestep, text, fps = torch.tensor([5, 500, 990]), torch.randn(3, 5, 16), torch.tensor([1, 8, 60])

    class Knows(torch.nn.Module):
        def forward(self, x, timestep, _text, _fps):
            from minisvd.etc import sd_sigmas

            sigma = sd_sigmas()[timestep.long()][:, None, None, None, None]
            signal = (1 + sigma**2).rsqrt()
            return (x - signal * clean) / sigma - signal * sigma * clean

    assert v_loss(Knows(), clean, timestep, noise, text, fps).max() < 1e-6  # pyright: ignore[reportArgumentType]
    assert v_loss(base, clean, timestep, noise, text, fps).min() > 0.1  # control


# --- data and programs ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_three_kinds_of_data_are_what_they_say(tmp_path: Path):
    """Clips move, stills do not, labels are different images of one colour and shape; made once."""
    vae = load_vae(BASE)
    for kind, fps in (("clips", None), ("labels", LABEL), ("stills", STILL)):
        pool = make_pool(tmp_path / f"{kind}.pt", vae, kind, 3, seed=0)
        assert pool.clips.shape == (3, 8, 4, 8, 8)
        assert fps is None or (pool.fps == fps).all()
        assert (pool.clips[:, :1] == pool.clips).all().item() == (kind == "stills")
        assert torch.equal(make_pool(tmp_path / f"{kind}.pt", vae, kind, 3, seed=1).clips, pool.clips)
    fast = make_pool(tmp_path / "fast.pt", vae, "clips", 3, seed=0, rates=(4,))
    assert set(fast.fps.tolist()) == {4} != set(make_pool(tmp_path / "clips.pt", vae, "clips", 3, seed=0).fps.tolist())
    assert {draw(np.random.default_rng(i), PAIRS[:1]).colour for i in range(5)} == {PAIRS[0][0]}


@torch.no_grad()
def test_both_kinds_of_network_are_sampled_alike():
    """The loop for temporal networks is `text_denoiser`'s: for one that gives the same v, the same video."""
    torch.manual_seed(0)
    vae, text = load_vae(BASE), load_text(BASE)
    config = UNetConfig(4, 4, (64, 64), (True, False), (2, 2), 1, 128, 64, num_time_ids=1)
    base = new_image_network(config, mixed=False)
    torch.nn.init.normal_(base.conv_out.weight, std=0.02)
    alone = FrameByFrame(config, mixed=False)
    alone.load_state_dict(base.state_dict())
    keys, empty = text(torch.ones(1, 12, dtype=torch.long)), text(torch.zeros(1, 12, dtype=torch.long))
    a, b = (
        sample(unet, vae, keys, empty, 8.0, seed=0, steps=2, scale=3.0)
        for unet in (alone, with_time(base, identity=True))
    )
    print(f"largest difference {np.abs(a - b).max():.1e}")
    assert a.shape == (1, 8, 3, 64, 64)
    assert np.abs(a - b).max() < 1e-4


@pytest.mark.slow
def test_training_writes_a_folder_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two steps of each stage and a round of two more, of small batches. The second run trains nothing, and what it
    wrote makes a video; `--more` makes another of it. A round ends with the mean of what it was and what it became."""
    for name in ("IMAGES", "CLIPS", "MORE"):
        monkeypatch.setattr(train, name, replace(getattr(train, name), batch=2))
    monkeypatch.setattr(train, "MORE", replace(train.MORE, lr=0.5))  # of which the first steps take a hundredth
    monkeypatch.setattr(train, "ROUNDS", 1)
    work, given = tmp_path / "work", ["--share", "0.0001", "--measured", "1", "--base", str(BASE)]
    command = [*given, "--work", str(work), "--out", str(tmp_path / "model")]
    train.main(command)
    logs = [(work / name).read_text() for name in ("train.log", "more-1/train.log")]
    assert [log.count("from step 0 of 2") for log in logs] == [2, 1]
    weights = (tmp_path / "model/unet/diffusion_pytorch_model.safetensors").read_bytes()
    train.main(command)
    assert [(work / name).read_text() for name in ("train.log", "more-1/train.log")] == logs
    assert (tmp_path / "model/unet/diffusion_pytorch_model.safetensors").read_bytes() == weights
    was, became = (torch.load(work / name)["ema"] for name in ("etc-clips.pt", "more-1/etc-more.pt"))
    mean = load_sd(tmp_path / "model", dtype="float32")[0].state_dict()
    error = max((mean[name] - (was[name] + became[name]) / 2).abs().max().item() for name in was)
    moved = max((became[name] - was[name]).abs().max().item() for name in was)
    print(f"from the mean {error:.1e}, from one to the other {moved:.1e}")
    assert error < 0.1 * moved
    further = ["--more", str(tmp_path / "model"), "--work", str(tmp_path / "more"), "--out", str(tmp_path / "further")]
    train.main([*given, *further])
    assert (tmp_path / "further/unet/diffusion_pytorch_model.safetensors").read_bytes() != weights
    for folder in ("model", "further"):
        video = TextToVideo(tmp_path / folder)("a red star moving up right", fps=8, steps=1)
        assert video.frames.shape == (8, 3, 64, 64)


def test_what_was_not_begun_is_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A sentence names the missing checkpoint, and no model is written. Control: another stage's does not do."""
    given = ["--work", str(tmp_path), "--out", str(tmp_path / "out"), "--finish"]
    (tmp_path / f"{train.IMAGES.name}.pt").touch()
    for further, stage in (([], train.CLIPS), (["--more", "weights/tiny-etc"], train.MORE)):
        with pytest.raises(SystemExit):
            train.main([*given, *further])
        assert f"{tmp_path} holds no {stage.name}.pt" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_what_few_clips_show_has_every_colour_and_every_shape():
    """And so has what they leave out: what is new there is the pair. Control: every second pair has half the shapes."""
    rest = [pair for pair in PAIRS if pair not in experiment.SEEN]
    for pairs in (experiment.SEEN, rest):
        assert len(pairs) == len(PAIRS) / 2
        assert {colour for colour, _ in pairs} == set(scenes.COLOURS)
        assert {shape for _, shape in pairs} == set(scenes.SHAPES)
    assert {shape for _, shape in PAIRS[::2]} != set(scenes.SHAPES)  # control


@pytest.mark.slow
def test_the_experiment_reports_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two arms, one seed, small batches; the second run finds all done and writes the same report."""
    for name in ("BASE", "ARM"):
        monkeypatch.setattr(experiment, name, replace(getattr(experiment, name), batch=2))
    given = ["--share", "0.0005", "--measured", "7", "--steps", "1", "--seeds", "0", "--arms", "A", "B0"]
    given += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--base", str(BASE)]
    experiment.main(given)
    report = (tmp_path / "out/experiment.md").read_text()
    found = json.loads((tmp_path / "out/experiment.json").read_text())
    assert list(found["runs"]) == ["A-0", "B0-0"]
    assert all(len(run["curve"]) == 2 for run in found["runs"].values())
    assert 0 < found["attention"]["A-0"] < 1
    assert found["filter_auc"] > 0.9
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"arms.png", "curves.png", "attention-A-0.png"}
    (tmp_path / "out/reading.md").write_text("What a person says of it.\n")
    experiment.main(given)
    made, rest = report.split("\n\n")[1], report.split("\n\n")[2]
    said = f"{made}\n\nWhat a person says of it.\n\n{rest}"
    assert (tmp_path / "out/experiment.md").read_text() == report.replace(f"{made}\n\n{rest}", said)
    with pytest.raises(SystemExit):  # pools and checkpoints of another share
        experiment.main([*given, "--share", "0.0006"])
