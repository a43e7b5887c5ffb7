"""Theorem: training is the same bits from the same seed, stopped or not; and Muon's step is what it says.

`fit` trains a small UNet here, with the loss and the optimizers that the shipped one has.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

import minisvd
from minisvd import SpatioTemporalUNet, UNetConfig
from minisvd.config import VAEConfig
from minisvd.vae import AutoencoderKLTemporalDecoder
from tools.cost.benchmark import seconds
from tools.tiny import scenes
from tools.tiny import train as recipe
from tools.tiny.fit import (
    Muon,
    Run,
    Stage,
    fit,
    half,
    midway,
    muon_and_adamw,
    orthogonalised,
    orthogonalised_together,
)
from tools.tiny.train import decode_frames, mean_psnr

pytestmark = pytest.mark.slow

STAGE = Stage("unet", steps=6, batch=2, lr=1e-3, report=100)
CONFIG = UNetConfig(
    block_out_channels=(32, 32),
    attention=(True, False),
    num_attention_heads=(2, 2),
    layers_per_block=1,
    cross_attention_dim=8,
    addition_time_embed_dim=8,
)


def test_half_is_no_slower_than_float32():
    """A CPU without products of bfloat16 computes them a number at a time; training then takes float32."""
    times = {}
    for dtype in (half(torch.device("cpu")), torch.float32, torch.float64):
        a = torch.randn(512, 512).to(dtype)
        _ = a @ a
        times[dtype] = min(seconds(lambda a=a: a @ a, "cpu") for _ in range(5))
    print({str(dtype): f"{1e3 * found:.2f} ms" for dtype, found in times.items()})
    assert times[half(torch.device("cpu"))] < 1.5 * times[torch.float32]
    assert times[torch.float64] > 1.5 * times[torch.float32]  # control: the clock tells them apart
    assert half(torch.device("cuda")) == torch.bfloat16  # whose range training needs, where a run would take float16


class Stopped(Exception):
    """What a stopped process looks like from inside."""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr("tools.tiny.fit.SAVE_EVERY", 0)


def train(work: Path, seed: int = 0, stop_at: int | None = None, finish: bool = False) -> dict[str, Tensor]:
    """The averaged weights after the stage; Stopped while step `stop_at` is under way."""
    work.mkdir(exist_ok=True)
    calls = []

    def loss(unet: nn.Module, rng: np.random.Generator, batch: int) -> Tensor:
        calls.append(1)
        if len(calls) == stop_at:
            raise Stopped
        sample = torch.from_numpy(rng.standard_normal((batch, 2, 8, 8, 8), dtype=np.float32))
        out = unet(sample, torch.zeros(batch), torch.ones(batch, 1, 8), torch.ones(batch, 3))
        return (out - sample[:, :, :4] + torch.randn_like(out)).square().mean()

    run = Run(work, (STAGE,), torch.device("cpu"), seed, finish)
    return fit(run, STAGE, lambda: SpatioTemporalUNet(CONFIG), loss, lambda _: "", muon_and_adamw).state_dict()


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> int:
    return sum(not torch.equal(a[name], b[name]) for name in a)


def test_a_seed_fixes_the_bits(tmp_path):
    weights = train(tmp_path / "a")
    assert differing(weights, train(tmp_path / "b")) == 0
    assert differing(weights, train(tmp_path / "c", seed=1)) > len(weights) / 2  # control


def test_a_stopped_run_goes_on_as_it_would(tmp_path):
    whole = train(tmp_path / "whole")
    with pytest.raises(Stopped):
        train(tmp_path / "parts", stop_at=4)
    assert torch.load(tmp_path / "parts" / "unet.pt")["step"] == 3
    assert differing(whole, train(tmp_path / "parts")) == 0

    with pytest.raises(Stopped):
        train(tmp_path / "forgetful", stop_at=4)
    state = torch.load(tmp_path / "forgetful" / "unet.pt")
    fresh = [optimizer.state_dict() for optimizer in muon_and_adamw(SpatioTemporalUNet(CONFIG), STAGE.lr)]
    torch.save(state | {"optimizers": fresh}, tmp_path / "forgetful" / "unet.pt")
    assert differing(whole, train(tmp_path / "forgetful")) > 0  # control: without the optimizers' past


def test_a_finished_stage_is_not_trained_again(tmp_path):
    weights = train(tmp_path)
    assert differing(weights, train(tmp_path, stop_at=1)) == 0
    (tmp_path / "unet.pt").unlink()
    with pytest.raises(Stopped):  # control
        train(tmp_path, stop_at=1)


def test_to_finish_trains_nothing(tmp_path):
    """Neither a stage that was begun, which is what its checkpoint has, nor one that was not, which is as it begins.
    Control: without it both would take a step."""
    with pytest.raises(Stopped):
        train(tmp_path / "begun", stop_at=4)
    average = torch.load(tmp_path / "begun/unet.pt")["ema"]
    assert differing(average, train(tmp_path / "begun", stop_at=1, finish=True)) == 0
    torch.manual_seed(0)
    fresh = SpatioTemporalUNet(CONFIG).state_dict()
    assert differing(fresh, train(tmp_path / "new", stop_at=1, finish=True)) == 0
    for folder in ("begun", "new"):
        with pytest.raises(Stopped):  # control
            train(tmp_path / folder, stop_at=1)


def test_midway_is_the_mean_of_both_networks():
    """Of every parameter, in the first. Control: they were apart."""
    a, b = (SpatioTemporalUNet(CONFIG) for _ in range(2))
    before = copy.deepcopy(a)
    assert midway(a, b) is a
    for mean, mine, other in zip(a.parameters(), before.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(mean, (mine + other) / 2)
    assert not torch.equal(before.conv_in.weight, b.conv_in.weight)  # control


def test_the_rate_rises_is_held_and_falls_to_nothing():
    """Over 100 steps, to half of all, and along half a wave of the cosine. Control: without a hold it falls at once."""
    held, falling = (Stage("", steps=1000, batch=1, lr=2.0, report=1, hold=hold) for hold in (0.5, 0.0))
    assert [held.lr_at(step) for step in (25, 50, 100, 300, 500)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    assert [held.lr_at(step) for step in (750, 1000)] == pytest.approx([1.0, 0.0])
    assert [falling.lr_at(step) for step in (50, 500, 1000)] == pytest.approx([1.0, 1.0, 0.0])
    assert falling.lr_at(300) < 1.6 < held.lr_at(300)


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16)])
def test_orthogonalised_keeps_directions_and_levels_their_sizes(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = torch.linalg.svdvals(matrices)
    after = torch.linalg.svdvals(orthogonalised(matrices).float())
    print(f"singular values {before.min():.2f} to {before.max():.2f} become {after.min():.2f} to {after.max():.2f}")
    assert ((after > 0.6) & (after < 1.3)).all()
    assert before.max() / before.min() > 2  # control

    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    aligned = torch.linalg.diagonal(u.mT @ orthogonalised(matrices).float() @ vh.mT)
    assert (aligned > 0.6).all()
    u, _, vh = torch.linalg.svd(matrices.roll(1, dims=0), full_matrices=False)
    assert not (torch.linalg.diagonal(u.mT @ orthogonalised(matrices).float() @ vh.mT) > 0.6).any()  # control


def orthogonalise_apart(rank: int, folder: Path, stacks: list[Tensor]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(orthogonalised_together(stacks), folder / f"{rank}.pt")


def test_two_processes_share_the_matrices_and_agree(tmp_path):
    """Each has all, as one process alone has them; one stack has fewer matrices than there are processes."""
    generator = torch.Generator().manual_seed(0)
    stacks = [torch.randn(shape, generator=generator) for shape in ((1, 8, 24), (5, 16, 16), (2, 40, 8))]
    multiprocessing.spawn(orthogonalise_apart, (tmp_path, stacks), nprocs=2)
    alone = orthogonalised_together(stacks)
    for rank in range(2):
        for apart, whole in zip(torch.load(tmp_path / f"{rank}.pt"), alone, strict=True):
            assert (apart - whole).abs().max() < 0.02  # bfloat16
            assert (apart.flip(1) - whole).abs().max() > 0.1  # control


def test_muon_steps_are_as_large_as_stated():
    """Root mean square 0.4 lr for a full-rank gradient, whatever its size; none at all where there is no gradient."""
    for scale in (1e-3, 1.0, 1e3):
        kernel = nn.Parameter(torch.zeros(16, 8, 3, 3))
        kernel.grad = scale * torch.randn(kernel.shape, generator=torch.Generator().manual_seed(0))
        Muon([kernel], lr=0.1).step()
        size = kernel.detach().square().mean().sqrt().item()
        print(f"gradient times {scale:g}: root mean square of the step {size:.4f}")
        assert 0.7 * 0.04 < size < 1.2 * 0.04
    dead = nn.Parameter(torch.zeros(16, 8))
    dead.grad = torch.zeros(16, 8)
    Muon([dead], lr=0.1).step()
    assert (dead == 0).all()


def test_the_psnr_of_the_log_is_of_images_between_minus_one_and_one():
    """The mean over images, which is not the PSNR of all of them at once; what is outside counts as the nearest."""
    target = torch.zeros(2, 3, 3, 4, 4)
    output = target + torch.tensor([0.1, 0.02]).view(2, 1, 1, 1, 1)
    expected = np.mean([10 * np.log10(4 / 0.1**2), 10 * np.log10(4 / 0.02**2)])
    assert mean_psnr(output, target) == pytest.approx(expected, abs=1e-4)
    assert mean_psnr(output[:1], target[:1]) < expected - 5  # control
    assert mean_psnr(torch.full_like(target, 7), target) == mean_psnr(torch.ones_like(target), target)


def test_fast_clips_move_as_their_numbers_say():
    """The frames are those of scene, fps and bucket, which are any that may be asked for, and half of them make a shape
    go faster than nearly all that `random_clip` asks for. Control: another clip's numbers give other frames."""
    rng = np.random.default_rng(0)
    fast = [recipe.fast_clip(rng) for _ in range(300)]
    for (scene, fps, bucket, frames), (_, other_fps, other_bucket, _) in zip(fast, fast[1:] + fast[:1], strict=True):
        assert scenes.FPS[0] <= fps <= scenes.FPS[1]
        assert 0 <= bucket <= 255 + 1e-6
        assert np.array_equal(frames, scenes.render(scene, scenes.path(scene, bucket, fps)))
        other = scenes.render(scene, scenes.path(scene, other_bucket, other_fps))
        assert not np.array_equal(frames, other)
    asked = [scenes.random_clip(rng) for _ in range(300)]
    paces, others = ([scenes.speed(bucket) / fps for _, fps, bucket, _ in clips] for clips in (fast, asked))
    print(f"pixels per frame: median {np.median(paces):.2f} of the fast ones, {np.median(others):.2f} of the others")
    assert np.median(paces) > np.quantile(others, 0.8)


def test_wide_clips_are_some_drawings_and_some_scenes_that_do_not_say_where_they_go():
    """In the shares that are stated. Of a drawing the frames have more than the one scene; no ground is bright."""
    rng = np.random.default_rng(0)
    clips = [recipe.wide_clip(rng) for _ in range(600)]
    faint = [clip for clip in clips if clip[0].cues < 1]
    alone = [np.array_equal(frames, scenes.render(s, scenes.path(s, bucket, fps))) for s, fps, bucket, frames in clips]
    drawn = [clip for clip in clips if not 7 <= clip[0].radius <= 9 or clip[0].wobble or clip[0].line]
    print(f"faint {len(faint) / 600:.1%}, drawn at least {len(drawn) / 600:.1%}, alone {np.mean(alone):.1%}")
    assert abs(len(faint) / 600 - recipe.FAINT) < 0.04
    assert 0.5 * recipe.DRAWN < len(drawn) / 600 < 1.3 * recipe.DRAWN
    assert all(recipe.FAINTEST[0] <= scene.cues <= recipe.FAINTEST[1] for scene, *_ in faint)
    assert 1 - 0.5 * recipe.DRAWN < np.mean(alone) < 1
    assert max(frames[:, :, 0, 0].max() for *_, frames in clips) < 200  # a corner of the ground
    fast = [recipe.fast_clip(rng) for _ in range(200)]
    assert all(scene.cues == 1 for scene, *_ in fast)  # control


class Listener(nn.Module):
    """A network that says nothing and keeps what it is told: rows of embedding, latent, and of the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[Tensor, Tensor, Tensor]] = []
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, sample: Tensor, _level: Tensor, embeds: Tensor, ids: Tensor) -> Tensor:
        self.heard.append((embeds[:, 0, 0], sample[:, 0, 4, 0, 0], ids))
        return self.weight * sample[:, :, :4]


@pytest.mark.parametrize("mistaken", [0.0, 0.3])
def test_a_share_of_the_conditions_is_wholly_another_clips(tmp_path, mistaken):
    """Embedding, latent and its noise are of one clip, the numbers of the clip itself; or the condition is dropped.
    Control: with a share of 0 none is another's."""
    n, clip = 64, torch.arange(64.0) + 1
    pool = {
        "latents": torch.randn(n, 2, 4, 8, 8),
        "embeds": clip.view(n, 1, 1).expand(n, 1, 8),
        "ids": torch.stack([clip, clip], dim=1),
        "first": clip.view(n, 1, 1, 1, 1).expand(n, recipe.NOISE_DRAWS, 4, 8, 8),
        "noise_aug": clip[:, None].expand(n, recipe.NOISE_DRAWS),
    }
    run, listener = Run(tmp_path, (STAGE,), torch.device("cpu"), 0), Listener()
    torch.manual_seed(0)
    for _ in range(20):
        recipe.v_loss(run, lambda: pool, 1.0, mistaken, listener, np.random.default_rng(0), 64)  # pyright: ignore
    embeds, latents, ids = (torch.cat(each) for each in zip(*listener.heard, strict=True))
    kept = embeds > 0
    assert 0 < (~kept).float().mean() < 2 * recipe.CONDITION_DROPOUT
    assert torch.equal(embeds, latents)
    assert torch.equal(embeds[kept], ids[kept, 2])
    wrong = (ids[:, 0] != ids[:, 2]).float().mean()
    print(f"another clip's: {wrong:.1%}")
    assert wrong == 0 if mistaken == 0 else abs(wrong - mistaken) < 0.05


def test_the_decoder_learns_from_videos_that_the_unet_made(tmp_path, monkeypatch):
    """The pool's latents are the model's own: near the encoder's in the first frame, further off in the last. Steps on
    them bring their frames nearer to the true ones; the encoder, so what a latent means, stays. Control: other clips'
    latents are far off in every frame."""
    for name in ("SAMPLED_POOL", "BATCH"):
        monkeypatch.setattr(recipe, name, 4)
    stage = Stage("vae-sampled", steps=5, batch=2, lr=4e-3, report=100)
    monkeypatch.setattr(recipe, "VAE_SAMPLED", stage)
    monkeypatch.setattr(recipe, "quick_look", lambda *_: "")
    run, svd = Run(tmp_path, (stage,), torch.device("cpu"), 0), minisvd.load()
    vae = copy.deepcopy(svd.vae)
    pool = recipe.sampled_pool(run, svd)
    video = pool["frames"].float() / 127.5 - 1
    encoded = recipe.encode_video(run, vae, video)
    off = [(z - encoded).square().mean((0, 2, 3, 4)) for z in (pool["latents"], encoded.roll(1, dims=0))]
    print("mean square, by frame, of the model's latents and of other clips'", *(each.numpy().round(3) for each in off))
    assert off[0][0] < off[0][-1] < 0.5 * off[1].min()

    trained = recipe.train_vae_sampled(run, svd.unet, copy.deepcopy(vae), svd.clip)
    assert torch.equal(recipe.encode_video(run, trained, video), encoded)
    with torch.no_grad():
        errors = [(recipe.decode_video(run, each, pool["latents"]) - video).square().mean() for each in (vae, trained)]
    print(f"mean square error of the frames {errors[0]:.5f}, then {errors[1]:.5f}")
    assert errors[1] < errors[0]
    assert not torch.equal(vae.decoder.conv_in.weight, trained.decoder.conv_in.weight)


def test_every_parameter_has_one_optimizer():
    unet = SpatioTemporalUNet(CONFIG)
    muon, adamw = (group["params"] for each in muon_and_adamw(unet, 1e-3) for group in each.param_groups)
    assert len({id(p) for p in [*muon, *adamw]}) == len(muon) + len(adamw) == len(list(unet.parameters()))
    assert all(p.ndim > 1 for p in muon)
    assert any(p is unet.conv_out.weight for p in adamw)


def test_what_is_frozen_or_unused_stays_as_it_is():
    """As the VAE's stages need: at first the temporal layers are unused, later the encoder is frozen."""
    vae = AutoencoderKLTemporalDecoder(VAEConfig(block_out_channels=(32, 32)))
    vae.encoder.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in vae.named_parameters()}
    optimizers = muon_and_adamw(vae, 1e-2)
    decode_frames(vae, torch.randn(1, 4, 8, 8)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    stay = ("encoder.", "quant_conv.", "temporal", "time_")
    for name, parameter in vae.named_parameters():
        spatial = not any(part in name for part in stay)
        assert torch.equal(parameter, before[name]) != spatial, name  # control: the spatial decoder moves


def test_a_run_that_cannot_be_meant_is_refused_before_it_trains(tmp_path, monkeypatch, capsys):
    """No process; the end of what was not begun; another seed in a work folder, whose weights are the first seed's.
    Controls: the same seed goes on, another folder takes another, and what was begun is finished."""
    begun = []
    monkeypatch.setattr(recipe.multiprocessing, "spawn", lambda _, args, nprocs: begun.append((args[0].seed, nprocs)))
    work, other = ["--work", str(tmp_path / "work")], ["--work", str(tmp_path / "other")]
    begun_unet = ["--work", str(tmp_path / "half")]
    (tmp_path / "half").mkdir()
    (tmp_path / "half/unet.pt").touch()
    recipe.main([*work, "--seed", "3", "--processes", "2"])
    recipe.main([*work, "--seed", "3", "--processes", "1"])
    recipe.main([*other, "--seed", "4", "--processes", "1"])
    assert begun == [(3, 2), (3, 1), (4, 1)]
    for argv, sentence in (
        ([*work, "--seed", "4"], "was begun with --seed 3: give that, or another --work"),
        ([*work, "--seed", "3", "--processes", "0"], "--processes is 0; need at least 1"),
        ([*work, "--finish"], "--finish has nothing to finish"),
        (["--work", str(tmp_path / "none"), "--finish"], "none holds no unet.pt"),
        ([*begun_unet, "--finish", "--mistaken"], "half holds no unet-mistaken.pt"),
    ):
        with pytest.raises(SystemExit):
            recipe.main(argv)
        assert sentence in " ".join(capsys.readouterr().err.split())
    assert len(begun) == 3
    assert not (tmp_path / "none").exists()
    recipe.main([*begun_unet, "--finish"])
    assert begun[3:] == [(0, 1)]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe.multiprocessing, "spawn", interrupted)
    with pytest.raises(SystemExit, match="interrupted: run it again to go on"):
        recipe.main([*work, "--seed", "3"])
