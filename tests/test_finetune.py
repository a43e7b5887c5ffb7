"""Theorem: fine-tuning minimises EDM's loss over what is chosen and can learn, goes on as it would, breaks nothing."""

import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import minisvd
from minisvd.sampler import preconditioning
from tools.finetune import train as program
from tools.finetune.arcs import RADIUS, arc, random_clip, travelled, write
from tools.finetune.clips import Clip, motion_score, read_frames
from tools.finetune.train import DROPOUT, drawn_loss, edm_loss, main
from tools.tiny.fit import Run

pytestmark = pytest.mark.slow

RUN = Run(Path("unused"), (), torch.device("cpu"), 0)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "videos"
    write(folder, 3)
    return folder


def finetune(model: Path, videos: Path, folder: Path, *more: str) -> int:
    given = ["--model", str(model), "--work", str(folder / "work"), "--size", "64", "64", "--frames", "3"]
    return main([str(videos), str(folder / "out"), *given, "--steps", "4", "--batch", "2", "--lr", "1e-2", *more])


@pytest.fixture(scope="module", autouse=True)
def quick() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "HELD_OUT_DRAWS", 4)
        patch.setattr(program, "SAMPLES", 1)
        patch.setattr("minisvd.config.GenerationConfig.steps", 2)
        patch.setattr("tools.tiny.fit.SAVE_EVERY", 0)
        yield


@pytest.fixture(scope="module")
def done(tiny_folder: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert finetune(tiny_folder, videos, folder) == 0
    return folder


def weights(model: Path) -> dict[str, Tensor]:
    return minisvd.load(model).unet.state_dict()


def test_what_was_chosen_and_can_learn_has_changed_and_nothing_else(done, tiny_folder):
    before, after = weights(tiny_folder), weights(done / "out")
    unet = minisvd.load(tiny_folder).unet
    dead = minisvd.dead_names(unet)
    changed = {name for name in before if not torch.equal(before[name].half(), after[name].half())}
    assert changed == {name for name in before if "temporal_transformer_block" in name} - dead
    log = (done / "work/train.log").read_text()
    named = sum("temporal_transformer_block" in name for name in before)
    assert f"warning: {len(dead) // 2} of {named} parameters to train can never learn" in log  # half are spatial
    assert "held-out loss" in log
    assert "motion score" in log
    assert (done / "work/samples.png").is_file()


def test_the_checkpoint_holds_what_is_trained_alone(done, tiny_folder):
    state = torch.load(done / "work/unet.pt")
    trained = {name for name in weights(tiny_folder) if "temporal_transformer_block" in name}
    assert set(state["model"]) == set(state["ema"]) < trained
    assert len(state["model"]) > 100


def test_a_stopped_run_goes_on_as_it_would(done, tiny_folder, videos, tmp_path, monkeypatch):
    calls = []

    def stopping(*given):
        calls.append(1)
        if len(calls) == 9:  # two for a held-out loss; one before, one after each step
            raise KeyboardInterrupt
        return drawn_loss(*given)

    with monkeypatch.context() as patch:
        patch.setattr(program, "drawn_loss", stopping)
        with pytest.raises(KeyboardInterrupt):
            finetune(tiny_folder, videos, tmp_path)
    assert torch.load(tmp_path / "work/unet.pt")["step"] == 2
    assert not (tmp_path / "out").exists()
    assert finetune(tiny_folder, videos, tmp_path) == 0
    whole, parts = weights(done / "out"), weights(tmp_path / "out")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_loss_is_edms(tiny_folder):
    """Plain on F, whose target is (n - sigma y) / sqrt(sigma^2 + 1); (sigma^2 + 1) / sigma^2 times that of D."""
    unet = minisvd.load_unet(tiny_folder)
    y, n = torch.randn(2, 2, 3, 4, 8, 8).unbind()
    sigma, s = torch.tensor([0.3, 4.0]), torch.tensor([0.3, 4.0])[:, None, None, None, None]
    condition = torch.randn(2, 4, 8, 8), torch.randn(2, 1, 48), torch.tensor([[6.0, 127, 0.02], [7, 9, 0.1]])
    outputs: list[Tensor] = []
    unet.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.float()))
    with torch.no_grad():
        loss = edm_loss(RUN, unet, y, n, sigma, condition)
    c_skip, c_out, *_ = preconditioning(s)
    denoised = c_skip * (y + s * n) + c_out * outputs[0]
    weighted = ((s**2 + 1) / s**2 * (denoised - y) ** 2).mean((1, 2, 3, 4))
    plain = ((outputs[0] - (n - s * y) / (s**2 + 1).sqrt()) ** 2).mean((1, 2, 3, 4))
    assert torch.allclose(loss, weighted, rtol=1e-4)
    assert torch.allclose(loss, plain, rtol=1e-4)
    assert not torch.allclose(loss, ((denoised - y) ** 2).mean((1, 2, 3, 4)), rtol=1e-2)  # control


def some_clip() -> Clip:
    first = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    return {
        "latents": torch.randn(1, 4, 8, 8),
        "embeds": torch.randn(1, 48),
        "first": first,
        "numbers": torch.tensor([7.0, 100.0]),
    }


@torch.no_grad()
def test_every_row_has_draws_of_its_own(tiny_folder):
    """200 times the same clip: as many noise levels, noises on the image, and the three ways to drop a condition."""
    torch.manual_seed(0)
    svd, rows = minisvd.load(tiny_folder), 200
    seen: list[tuple[Tensor, ...]] = []
    svd.unet.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs))
    drawn_loss(RUN, svd, svd.unet, [some_clip()] * rows, torch.randn(rows), DROPOUT)
    sample, c_noise, embeds, ids = seen[0]
    assert (ids[:, :2] == torch.tensor([6.0, 100.0])).all()  # fps - 1, bucket
    assert len(ids[:, 2].unique()) == len(c_noise.unique()) == rows
    assert abs(ids[:, 2].log().mean() + 3) < 0.15
    no_latent, no_embeds = (sample[:, :, 4:] == 0).all(-1).all(-1).all(-1)[:, 0], (embeds == 0).all(-1)[:, 0]
    shares = [float(x.float().mean()) for x in (no_latent & ~no_embeds, no_latent & no_embeds, no_embeds & ~no_latent)]
    print("latent alone, both, embedding alone dropped:", shares)
    assert all(0.04 < share < 0.17 for share in shares)
    kept = sample[~no_latent, 0, 4:]
    assert len({float(row.sum()) for row in kept}) == len(kept)

    drawn_loss(
        RUN, svd, svd.unet, [some_clip()] * 20, torch.randn(20), 0
    )  # control: nothing is dropped without dropout
    assert (seen[1][2] != 0).all()


def test_motion_score_orders_speeds():
    still, slow, fast = (torch.zeros(3, 3, 64, 64) for _ in range(3))
    for frames, step in ((still, 0), (slow, 1), (fast, 4)):
        for i in range(3):
            frames[i, :, 20:30, 10 + step * i : 20 + step * i] = 1
    scores = [motion_score(frames, 8) for frames in (still, slow, fast)]
    print("0, 1 and 4 pixels a frame:", scores)
    assert scores[0] < 0.01 < scores[1] < scores[2]
    assert motion_score(fast, 16) == pytest.approx(2 * scores[2])


def test_arcs_are_arcs():
    """Circles of the stated radius and length that begin along the heading."""
    scene, fps, bucket, frames = random_clip(np.random.default_rng(0))
    path = travelled(fps, bucket)
    positions, heading = arc(scene, path)
    centre = np.array([scene.x - RADIUS * np.sin(scene.heading), scene.y + RADIUS * np.cos(scene.heading)])
    assert np.allclose(np.hypot(*(positions - centre).T), RADIUS)
    assert np.allclose(heading - scene.heading, path / RADIUS)
    fine, _ = arc(scene, np.linspace(0, path[-1], 1000))
    assert np.hypot(*np.diff(fine, axis=0).T).sum() == pytest.approx(path[-1], rel=1e-3)
    assert np.allclose(
        np.diff(fine, axis=0)[0] / path[-1] * 999, [np.cos(scene.heading), np.sin(scene.heading)], atol=0.01
    )
    assert frames.shape == (8, 3, 64, 64)


def test_frames_are_read_as_they_were_written(videos):
    fps, frames = read_frames(videos / "arc-000.mp4", every=1)
    _, fewer = read_frames(videos / "arc-000.mp4", every=3)
    _, true_fps, _, drawn = random_clip(np.random.default_rng(0))
    read = np.stack(list(frames)).transpose(0, 3, 1, 2)
    assert fps == pytest.approx(true_fps)
    assert np.abs(read.astype(int) - drawn).mean() < 4
    assert [np.array_equal(a.transpose(2, 0, 1), b) for a, b in zip(fewer, read[::3], strict=True)] == [True] * 3


def broken(folder: Path) -> list[str]:
    (folder / "arc-001.mp4").write_bytes(b"no video" * 100)
    return []


def silent(folder: Path) -> list[str]:
    with wave.open(str(folder / "arc-001.mp4"), "wb") as file:  # FFmpeg goes by what is inside
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    return []


def one_left(folder: Path) -> list[str]:
    for name in ("arc-001.mp4", "arc-002.mp4"):
        (folder / name).unlink()
    return []


def a_bucket_short(folder: Path) -> list[str]:
    (folder / "buckets.json").write_text(json.dumps({"arc-000.mp4": 1}))
    return []


def no_buckets_at_all(folder: Path) -> list[str]:
    (folder / "buckets.json").write_text("[1, 2]")
    return []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (broken, "arc-001.mp4 is not a video that can be decoded"),
        (silent, "arc-001.mp4 is not a video that can be decoded"),
        (one_left, "has 1 videos"),
        (a_bucket_short, "no motion bucket for arc-001.mp4"),
        (no_buckets_at_all, "does not map file names to motion buckets"),
        (lambda _: ["--train", "("], "is not a regular expression"),
        (lambda _: ["--train", "attn2.to_q"], "finds no parameter that can learn"),
        (lambda _: ["--frames", "9"], "have 9 frames; need 2: lower --frames"),
        (lambda _: ["--every", "4"], "need at least 2, because the model is told fps - 1"),
        (lambda _: ["--size", "60", "64"], "need multiples of 32"),
        (lambda _: ["--steps", "0"], "--steps is 0; need at least 1"),
        (lambda _: ["--lr", "nan"], "--lr is nan; need a number between 0 and 1"),
        (lambda _: ["--model", "no/such/model"], "no/such/model"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(tiny_folder, videos, tmp_path, capsys, spoil, words):
    folder = tmp_path / "videos"
    folder.mkdir()
    for path in videos.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert finetune(tiny_folder, folder, tmp_path, *spoil(folder)) == 2
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert said.startswith("finetune: error: ")
    assert words in said
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_mixed_with_another(done, tiny_folder, videos, capsys):
    assert finetune(tiny_folder, videos, done) == 2
    assert "exists: name a new folder" in capsys.readouterr().err
    (done / "out").rename(done / "first")
    assert finetune(tiny_folder, videos, done, "--seed", "1") == 2
    assert "holds a run with another --seed: name another --work" in capsys.readouterr().err
    (done / "first").rename(done / "out")
