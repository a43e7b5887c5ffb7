"""Theorem: a call is a function of its arguments: batch rows do not meet, seeds reproduce, bad input is refused."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import minisvd
from minisvd import SpatioTemporalUNet, StableVideoDiffusion, UNetConfig, Video

QUICK = {"num_frames": 3, "steps": 2, "size": (64, 64), "progress": False}


@pytest.fixture(scope="module")
def svd(tiny_folder) -> StableVideoDiffusion:
    return minisvd.load(tiny_folder)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_rows_of_a_unet_batch_are_independent():
    """unet(batch of two) = two batches of one, with different images, noise levels and numbers, to rounding."""
    torch.manual_seed(0)
    config = UNetConfig(
        block_out_channels=(32, 64), attention=(True, False), num_attention_heads=(2, 4), cross_attention_dim=48
    )
    unet = SpatioTemporalUNet(config).eval()
    sample, embeds = torch.randn(2, 5, 8, 4, 6), torch.randn(2, 1, 48)
    c_noise, ids = torch.tensor([-1.0, 1.0]), torch.tensor([[6, 127, 0.02], [11, 20, 0.1]])
    together = unet(sample, c_noise, embeds, ids)
    for row in (slice(0, 1), slice(1, 2)):
        alone = unet(sample[row], c_noise[row], embeds[row], ids[row])
        difference = (together[row] - alone).abs().max().item()
        print(f"largest difference: {difference:.1e}")
        assert difference <= 1e-5
    swapped = unet(sample, c_noise, embeds.flip(0), ids)  # control: the other row's image does change a row
    assert (together - swapped).abs().max() > 1e-3


def test_rows_of_a_pipeline_batch_are_independent(svd, images):
    """With their own fps, motion bucket, noise augmentation and seed, as one call and as two."""
    ids = {"fps": [7, 12], "motion_bucket": [127, 20], "noise_aug": [0.02, 0.1], "seed": [3, 4]}
    together = svd(images, guidance=(1.0, 2.0), **QUICK, **ids)
    for row in range(2):
        own = {name: values[row] for name, values in ids.items()}
        alone = svd(images[row], guidance=(1.0, 2.0), **QUICK, **own)
        difference = (together[row].frames - alone.frames).abs().max().item()
        print(f"largest difference: {difference:.1e}")
        assert difference <= 1e-4
        assert together[row].fps == own["fps"]
    other = svd(images[1], guidance=(1.0, 2.0), **QUICK, **{n: v[1] for n, v in ids.items()} | {"motion_bucket": 200})
    assert (together[1].frames - other.frames).abs().max() > 1e-4  # control


def test_a_list_of_images_gives_the_videos_of_each(svd, images):
    videos = svd([images[0], images[1]], **QUICK)
    assert [type(video) for video in videos] == [Video, Video]
    assert torch.equal(videos[1].frames, svd(images[1], **QUICK).frames)
    assert not torch.equal(videos[0].frames, videos[1].frames)


def test_the_same_seed_gives_the_same_bits(svd, images):
    first, again, other = (svd(images[0], seed=seed, **QUICK).frames for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.slow
def test_threads_on_one_model_get_what_each_gets_alone(svd, images):
    """Two at once, six videos each, which begin together: bit for bit, with a cache of conditions for each run."""
    barrier = threading.Barrier(2)

    def run(which: int) -> list[Tensor]:
        barrier.wait()
        return [svd(images[which], seed=seed, **QUICK).frames for seed in range(6)]

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, (0, 1)))
    for which in (0, 1):
        for seed in range(6):
            assert torch.equal(together[which][seed], svd(images[which], seed=seed, **QUICK).frames)
    assert not torch.equal(together[0][0], together[1][0])  # control


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_torch_s_defaults_do_not_change_the_video(svd, tiny_folder, images, dtype):
    """Another default dtype gives the same bits, and stays. Another default device, which is torch's way to watch every
    call and so turns off a fused one in CLIP's tower, gives the same to rounding."""
    expected = svd(images[0], guidance=(1.0, 2.0), **QUICK).frames
    torch.set_default_dtype(dtype)
    try:
        frames = minisvd.load(tiny_folder)(images[0], guidance=(1.0, 2.0), **QUICK).frames
        kept = torch.get_default_dtype()
        torch.set_default_device("meta")
        elsewhere = minisvd.load(tiny_folder)(images[0], guidance=(1.0, 2.0), **QUICK).frames
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(frames, expected)
    assert kept == dtype
    difference = (elsewhere - expected).abs().max().item()
    print(f"largest difference: {difference:.1e}")
    assert difference <= 1e-4  # as between a batch and its rows


def test_latents_that_are_no_numbers_end_the_run_at_their_step(svd, images):
    """The sentence names step and sigma, and the steps that follow are not made."""
    steps, noise = [], torch.full((1, 3, 4, 8, 8), 3e38)
    with pytest.raises(ValueError, match=r"after step 1 of 2, at sigma 0\.002: check guidance and sigmas"):
        svd(images[0], noise=noise, callback=lambda *call: steps.append(call), **QUICK)
    assert steps == []


@pytest.mark.slow
def test_decoding_that_leaves_float16_is_done_in_float32(tiny_folder, images):
    """With one warning; the weights stay float16. Control: bfloat16, which has the range, says nothing."""
    svd = minisvd.load(tiny_folder, dtype="float16")
    svd.vae.decoder.conv_in.weight.data *= 1e5
    with pytest.warns(UserWarning, match=r"decoding left the range of torch\.float16") as warned:
        frames = svd(images[0], **QUICK).frames
    assert len(warned) == 1
    assert frames.isfinite().all()
    assert next(svd.vae.parameters()).dtype == torch.float16
    for part in (svd.unet, svd.vae, svd.clip):
        part.bfloat16()
    svd(images[0], **QUICK)  # a warning would be an error


def test_frames_are_tensors_to_go_on_with(svd, images):
    """They can be part of what is trained, which tensors of inference mode cannot; so can a callback's."""
    seen = []
    frames = svd(images[0], callback=lambda *call: seen.extend(call[2:]), **QUICK).frames
    scale = torch.ones((), requires_grad=True)
    (scale * frames).sum().backward()
    assert scale.grad is not None
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in (frames, *seen))


def test_parts_that_differ_are_a_sentence(tiny_folder, images):
    """One part in another dtype or elsewhere; all three moved alike work."""
    svd = minisvd.load(tiny_folder)
    for part in ("unet", "vae", "clip"):
        getattr(svd, part).bfloat16()
        with pytest.raises(ValueError, match=f"the parts differ, .*{part} torch.bfloat16 on cpu.*: move all three"):
            svd(images[0], **QUICK)
        getattr(svd, part).float()
    for part in (svd.unet, svd.vae, svd.clip):
        part.bfloat16()
    svd(images[0], **QUICK)


def test_given_noise_replaces_the_seed(svd, images):
    noise, aug_noise = torch.randn(1, 3, 4, 8, 8), torch.randn(1, 3, 64, 64)
    first, again = (svd(images[0], seed=s, noise=noise, aug_noise=aug_noise, **QUICK).frames for s in (5, 6))
    assert torch.equal(first, again)


def test_decode_chunk_changes_memory_not_frames(svd, images):
    whole, single = (svd(images[0], decode_chunk=chunk, **QUICK).frames for chunk in (3, 1))
    assert (whole - single).abs().max() <= 1e-4


def test_callback_sees_every_step(svd, images):
    seen = []
    sigmas = torch.tensor([10.0, 1.0, 0.0])
    svd(images[0], sigmas=sigmas, callback=lambda *call: seen.append(call), num_frames=3, size=(64, 64), progress=False)
    assert [(step, sigma.item()) for step, sigma, _, _ in seen] == [(1, 1.0), (2, 0.0)]
    (*_, x, first), (*_, end, last) = seen
    assert x.shape == first.shape == (1, 3, 4, 8, 8)
    torch.testing.assert_close(end, last)  # at sigma 0 the latents are the estimate itself,
    assert (x - first).abs().max() > 0.1  # and before that they are not


def test_bars_are_on_stderr_and_can_be_off(svd, images, capsys):
    svd(images[0], **QUICK | {"progress": True})
    out, err = capsys.readouterr()
    assert out == ""
    assert "denoising" in err
    assert "decoding" in err
    svd(images[0], **QUICK)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_half_precision_runs_and_stays_near(svd, tiny_folder, images):
    """bfloat16 weights, float32 latents: near the float32 frames, but not them."""
    half = minisvd.load(tiny_folder, dtype=torch.bfloat16)
    latents = []
    frames = half(images[0], callback=lambda *call: latents.append(call[2]), **QUICK).frames
    assert latents[0].dtype == torch.float32
    difference = (frames - svd(images[0], **QUICK).frames).abs()
    assert 0 < difference.mean() < 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0; need a whole number from 1 to 100,000"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"num_frames": 2.5}, "num_frames is 2.5"),
        ({"decode_chunk": 0}, "decode_chunk is 0"),
        ({"fps": 1}, "fps is 1; need a number from 2 to 1,000, because the model is told fps minus one"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"noise_aug": -0.1}, "noise_aug is -0.1"),
        ({"noise_aug": float("inf")}, "noise_aug is inf"),
        ({"motion_bucket": -1}, "motion_bucket is -1; need a number from 0"),
        ({"guidance": (3.0, 1.0)}, r"guidance is \(3.0, 1.0\); need 2 numbers, \(min, max\), .*, min <= max"),
        ({"guidance": (1.0,)}, "need 2 numbers"),
        ({"cut_step": 0}, "cut_step is 0"),
        ({"stage2": "both"}, "stage2 is 'both'"),
        ({"fit": "zoom"}, "fit is 'zoom'"),
        ({"size": (100, 64)}, "size is 100x64; need multiples of 32, such as 96x64"),
        ({"size": (100_000, 64)}, r"size is \(100000, 64\)"),
        ({"seed": [1, 2, 3]}, "seed has 3 values for a batch of 1"),
        ({"sigmas": torch.tensor([1.0, 2.0, 0.0])}, "fall strictly to 0"),
        ({"noise": torch.zeros(1, 3, 4, 9, 8)}, r"noise has shape \(1, 3, 4, 9, 8\); need \(1, 3, 4, 8, 8\)"),
        ({"aug_noise": torch.zeros(1, 3, 9, 8)}, "aug_noise has shape"),
    ],
)
def test_bad_settings_are_refused_before_any_work(svd, images, settings, message):
    steps = []
    with pytest.raises(ValueError, match=message):
        svd(images[0], callback=lambda *call: steps.append(call), **QUICK | settings)
    assert steps == []


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ([], ValueError, "list of images is empty"),
        (torch.zeros(64, 64), ValueError, r"\[3,h,w\]"),
        (torch.full((3, 64, 64), 2.0), ValueError, r"\[-1, 1\]"),
        (torch.zeros(1, 4, 64, 64), ValueError, r"\[3,h,w\]"),
        (Path("nowhere.png"), FileNotFoundError, "nowhere.png"),
        ([torch.zeros(3, 64, 64), Path("nowhere.png")], FileNotFoundError, "nowhere.png"),
    ],
)
def test_bad_images_are_refused_before_any_work(svd, image, error, message):
    steps = []
    with pytest.raises(error, match=message):
        svd(image, callback=lambda *call: steps.append(call), **QUICK)
    assert steps == []


def test_a_large_motion_bucket_warns(svd, images):
    with pytest.warns(UserWarning, match="motion_bucket is 300; models were trained on 0 to 255"):
        svd(images[0], motion_bucket=300, **QUICK)


@pytest.mark.slow
def test_each_image_kind_is_the_same_image(svd, tmp_path):
    """A path, a PIL image, an array and a tensor of one picture give one video."""
    picture = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    picture.save(tmp_path / "picture.png")
    tensor = torch.tensor(list(picture.tobytes())).reshape(64, 64, 3).movedim(-1, 0) / 127.5 - 1
    given = [tmp_path / "picture.png", str(tmp_path / "picture.png"), picture, tensor]
    frames = [svd(image, **QUICK).frames for image in given]
    assert all((other - frames[0]).abs().max() <= 1e-5 for other in frames[1:])
    turned = svd(picture.rotate(90), **QUICK).frames  # control
    assert (turned - frames[0]).abs().max() > 1e-3


def test_parts_check_what_they_are_given(svd):
    with pytest.raises(ValueError, match=re.escape("image has shape (1, 3, 60, 64); need [b,3,H,W]")):
        svd.vae.encode(torch.zeros(1, 3, 60, 64))
    with pytest.raises(ValueError, match="latents have shape"):
        svd.vae.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="decode chunk is 0"):
        svd.vae.decode(torch.zeros(1, 2, 4, 8, 8), 0)
    with pytest.raises(ValueError, match="image has shape"):
        svd.clip(torch.zeros(3, 64, 64))


def test_parts_work_alone(svd, images):
    assert svd.clip(images).shape == (2, 1, 48)
    latent = svd.vae.encode(images)
    assert latent.shape == (2, 4, 8, 8)
    assert svd.vae.decode(latent[:, None]).shape == (2, 1, 3, 64, 64)
