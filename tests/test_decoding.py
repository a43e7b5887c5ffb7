"""Theorem: how much of a video the decoder holds, and where, changes its memory and not its frames.

The plain forward, on the whole video, says what the frames are. The control takes each norm's statistics from the
first part of a video alone, as decoding in chunks without more ado does.
"""

from typing import get_args

import pytest
import torch
from torch import Tensor

import minisvd.vae
from conftest import randomised, relative_error
from minisvd import AutoencoderKLTemporalDecoder, VAEConfig
from minisvd.vae import Hold

SMALL = VAEConfig(block_out_channels=(32, 32, 64, 64))


SHAPES = [(1, 5, 4, 3, 2), (2, 2, 4, 7, 1), (1, 1, 4, 1, 3)]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=[*((SMALL, shape) for shape in SHAPES), (VAEConfig(), SHAPES[0])])
def plain(request) -> tuple[AutoencoderKLTemporalDecoder, Tensor, Tensor]:
    """A small VAE or the released one, latents, and the plain forward's frames."""
    config, shape = request.param
    torch.manual_seed(0)
    vae, latents = randomised(AutoencoderKLTemporalDecoder(config)), noise(*shape)
    with torch.no_grad():
        return vae, latents, vae.decoder(latents / vae.config.scaling_factor)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("hold", get_args(Hold))
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_frames_equal_the_plain_forward(plain, hold, chunk, monkeypatch):
    """To 1e-5, whether or not chunks divide the frames and strips the rows, for one video and for two."""
    vae, latents, expected = plain
    error = relative_error(vae.decode(latents, chunk, hold), expected)
    print(f"relative error {error:.1e}")
    assert error <= 1e-5
    assert torch.equal(latents, noise(*latents.shape)), "decoding works in place, but on what is its own"

    whole = minisvd.vae.over_video
    monkeypatch.setattr(minisvd.vae, "over_video", lambda norm, parts: whole(norm, [next(iter(parts))]))
    control = relative_error(vae.decode(latents, chunk, hold), expected)
    assert control > 1e-3


def test_gradients_take_the_plain_forward():
    """decode's gradient is the decoder's; without gradients on, nothing is kept for one."""
    vae = randomised(AutoencoderKLTemporalDecoder(SMALL)).double()
    latents = noise(1, 3, 4, 2, 2).double().requires_grad_()
    frames = vae.decode(latents, 1, "one")
    frames.square().sum().backward()
    (expected,) = torch.autograd.grad(vae.decoder(latents / vae.config.scaling_factor).square().sum(), latents)
    assert latents.grad is not None
    assert relative_error(latents.grad, expected) <= 1e-12
    assert all(parameter.grad is not None for parameter in vae.decoder.parameters())
    with torch.no_grad():
        assert not vae.decode(latents, 1, "one").requires_grad  # control


@torch.no_grad()
def test_progress_is_told_once_a_block():
    vae, calls = AutoencoderKLTemporalDecoder(SMALL), []
    vae.decode(noise(1, 2, 4, 1, 1), 1, callback=lambda: calls.append(None))
    assert len(calls) == 2 + 4 * 3


def test_an_unknown_hold_is_refused():
    with pytest.raises(ValueError, match="hold is 'none'; need one of two, one, host"):
        AutoencoderKLTemporalDecoder(SMALL).decode(noise(1, 2, 4, 1, 1), hold="none")  # pyright: ignore[reportArgumentType]
