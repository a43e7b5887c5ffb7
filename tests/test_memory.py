"""Theorem: what `tools.cost.memory` counts by shapes is what a run allocates, and what decoding may hold bounds it."""

from functools import cache

import pytest
import torch

from minisvd import AutoencoderKLTemporalDecoder, VAEConfig
from minisvd.vae import Hold
from tools.cost.memory import LiveBytes

SMALL = VAEConfig(block_out_channels=(32, 32, 64, 64))
HOST, META = torch.device("cpu"), torch.device("meta")


def test_views_places_and_frees_are_counted_as_they_are():
    """A kilobyte is 256 float32 numbers; on the host it is none, and from there it is one again."""
    with LiveBytes() as live:
        x = torch.empty(256, device=META)
        x.view(16, 16)[:8].mul_(2)
        assert (live.now, live.peak) == (1024, 1024)
        y = x + x
        assert live.now == 2048
        del x
        assert (live.now, live.peak) == (1024, 2048)
        parts = y.to(HOST).split(128)
        del y
        assert live.now == 0
        both = torch.cat(parts)
        both[:8] += 1
        assert (live.now, live.peak) == (0, 2048)
        back = both.to(META)
        assert live.now == 1024
        assert back.to(META) is back


@cache
def peak(device: torch.device, hold: Hold, chunk: int, frames: int = 6) -> int:
    with device:
        vae, latents = AutoencoderKLTemporalDecoder(SMALL), torch.zeros(1, frames, 4, 4, 12)
    with torch.inference_mode(), LiveBytes() as live:
        vae.decode(latents, chunk, hold)
    return live.peak


@pytest.mark.slow
@pytest.mark.parametrize("hold", ["two", "one"])
def test_shapes_alone_count_what_a_run_makes(hold):
    """To the byte, between tensors without data and tensors with."""
    counted, run = peak(META, hold, 1), peak(HOST, hold, 1)
    print(f"{counted} bytes by shapes, {run} in a run")
    assert counted == run
    assert counted != peak(META, hold, 2)  # control


@pytest.mark.slow
def test_what_is_held_bounds_the_memory():
    """Two activations of the widest level, one, and none of the video, and on top what a chunk and a strip need."""
    frames = 24
    video = frames * SMALL.block_out_channels[0] * 32 * 96 * 4
    two, one, host = (peak(META, hold, 1, frames) for hold in ("two", "one", "host"))
    print(*(f"{value / video:.2f}" for value in (two, one, host)), "videos")
    assert 2 <= two / video <= 2.2
    assert 1 <= one / video <= 1.35
    assert host / video <= 0.4
    assert peak(META, "two", frames, frames) > 3 * video  # control: all frames in work at a time
