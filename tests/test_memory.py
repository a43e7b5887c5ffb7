"""Theorem: what is counted by shapes is what a run allocates, and what a run may hold bounds it."""

import copy
import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import minisvd
from conftest import randomised
from minisvd import (
    ECONOMIES,
    PRESETS,
    AutoencoderKLTemporalDecoder,
    ClipConfig,
    Economy,
    GenerationConfig,
    ImageEncoder,
    SpatioTemporalUNet,
    StableVideoDiffusion,
    UNetConfig,
    VAEConfig,
    memory,
    slice_feed_forwards,
)
from minisvd.adapt import is_sliced
from minisvd.attention import GEGLU
from minisvd.cli import main
from minisvd.memory import MARGIN, LiveBytes, fitting, fused_attention, peaks
from minisvd.vae import Hold

SMALL = VAEConfig(block_out_channels=(32, 32, 64, 64))
SMALL_UNET = UNetConfig(
    block_out_channels=(32, 64),
    attention=(True, False),
    num_attention_heads=(2, 4),
    cross_attention_dim=48,
    addition_time_embed_dim=16,
)
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
        vae, latents = AutoencoderKLTemporalDecoder(SMALL), torch.zeros(1, frames, 4, 8, 6)
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
    video = frames * SMALL.block_out_channels[0] * 64 * 48 * 4
    two, one, host = (peak(META, hold, 1, frames) for hold in ("two", "one", "host"))
    print(*(f"{value / video:.2f}" for value in (two, one, host)), "videos")
    assert 2 <= two / video <= 2.2
    assert 1 <= one / video <= 1.35
    assert host / video <= 0.4
    assert peak(META, "two", frames, frames) > 3 * video  # control: all frames in work at a time


def counted_step(unet: SpatioTemporalUNet, b: int) -> int:
    """Bytes that one step on b branches makes and holds at its peak, 25 frames of 1024x576 in float16."""
    with META:
        sample, embeds = (torch.empty(s, dtype=torch.float16) for s in ((b, 25, 8, 72, 128), (b, 1, 1024)))
        c_noise, ids = torch.empty(()), torch.empty(b, 3)
    with torch.inference_mode(), fused_attention(), LiveBytes() as live:
        unet(sample, c_noise, embeds, ids)
    return live.peak


def test_a_step_of_the_released_network_is_as_small_as_promised():
    """With feed-forwards in slices 5.4 GB for both branches, 2.8 GB for one."""
    with META:
        unet = SpatioTemporalUNet(UNetConfig()).half()
    plain = counted_step(unet, 2)
    two, one = (counted_step(slice_feed_forwards(unet), b) for b in (2, 1))
    print(f"{plain / 1e9:.2f} GB, in slices {two / 1e9:.2f} GB, one branch at a time {one / 1e9:.2f} GB")
    assert two <= 5.4e9
    assert one <= 2.8e9
    assert plain > 7e9  # control
    assert counted_step(slice_feed_forwards(unet, None), 2) == plain


@pytest.mark.parametrize("tokens", [7, 64, 10_000])
def test_feed_forwards_in_slices_are_the_same_function(tokens):
    """To rounding, whether the slices divide the tokens, do not, or are one; with the gradients, and the same names."""
    plain = randomised(SpatioTemporalUNet(SMALL_UNET))
    sliced = copy.deepcopy(plain)
    assert list(slice_feed_forwards(sliced, tokens).state_dict()) == list(plain.state_dict())
    generator = torch.Generator().manual_seed(1)
    sample, embeds = (torch.randn(s, generator=generator) for s in ((2, 3, 8, 8, 8), (2, 1, 48)))
    given, rows = (sample, torch.tensor(0.5), embeds, torch.tensor([[6.0, 127, 0.02]])), []

    def seen(_module: nn.Module, given: tuple[Tensor, ...], _out: Tensor) -> None:
        rows.append(given[0].numel() // given[0].shape[-1])

    for module in sliced.modules():
        if isinstance(module, GEGLU):
            module.register_forward_hook(seen)
    outputs = [unet(*given) for unet in (plain, sliced)]
    for out in outputs:
        out.square().mean().backward()
    gradients = [torch.cat([p.grad.flatten() for p in unet.parameters()]) for unet in (plain, sliced)]  # pyright: ignore
    for ours, theirs in (outputs, gradients):
        error = (ours - theirs).abs().max() / theirs.abs().max()
        print(f"largest difference {error:.1e}, slices of up to {max(rows)} tokens")
        assert error <= 1e-5
    assert max(rows) == min(tokens, 2 * 3 * 64)
    next(m for m in sliced.modules() if isinstance(m, GEGLU)).proj.weight.data *= 1.01  # control
    assert (sliced(*given) - outputs[0]).abs().max() / outputs[0].abs().max() > 1e-5


QUICK = {"num_frames": 3, "steps": 2, "size": (64, 64), "guidance": (1.0, 3.0), "progress": False}


def test_every_economy_makes_the_same_frames(tiny_folder):
    """To rounding, each of them and `low_memory=True`; afterwards the feed-forwards are as they were."""
    svd = minisvd.load(tiny_folder)
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain = svd(image, **QUICK).frames
    for economy in (*ECONOMIES[1:], Economy(slices=True), True):
        difference = (svd(image, low_memory=economy, **QUICK).frames - plain).abs().max().item()
        print(f"{difference:.1e} with {economy}")
        assert difference <= 1e-4
        assert not is_sliced(svd.unet)
    slice_feed_forwards(svd.unet)
    svd(image, low_memory=True, **QUICK)
    assert is_sliced(svd.unet)  # the user's own slices stay
    assert (svd(image, low_memory=True, seed=1, **QUICK).frames - plain).abs().max() > 1e-3  # control
    with pytest.raises(ValueError, match="low_memory is 'yes'"):
        svd(image, low_memory="yes", **QUICK)  # pyright: ignore


MODEL = {"unet": SMALL_UNET, "vae": SMALL, "clip": ClipConfig(64, 3, 4, 96, 56, projection_dim=48)}


@pytest.mark.parametrize("economy", [*ECONOMIES, Economy(visiting=True), Economy(in_turn=True)], ids=str)
def test_a_whole_call_takes_what_was_counted_and_parts_are_where_they_should_be(economy, monkeypatch):
    """A call on shapes alone, its weights among them: which parts are on the device as each begins to work, and the
    peak, which is to 3 % the one that `peaks` foretells from the stages, without the image and the few latents."""
    generation = GenerationConfig(num_frames=8, size=(128, 128))
    for name in ("finite", "Video"):  # shapes have no numbers to look at
        monkeypatch.setattr(f"minisvd.pipeline.{name}", lambda *_, **__: True)
    seen = {name: set() for name in MODEL}
    with LiveBytes() as live, fused_attention(), torch.no_grad():
        with META:
            unet, vae = SpatioTemporalUNet(SMALL_UNET), AutoencoderKLTemporalDecoder(SMALL)
            svd = StableVideoDiffusion(unet, vae, ImageEncoder(MODEL["clip"]), generation)
        parts = {name: getattr(svd, name) for name in MODEL}

        def there() -> tuple[str, ...]:
            return tuple(name for name in parts if not any(map(live.is_on_host, parts[name].parameters())))

        for name, module in {"unet": unet.conv_in, "vae": vae.decoder.time_conv_out, "clip": svd.clip.visual}.items():
            module.register_forward_pre_hook(lambda *_, name=name: seen[name].add(there()))
        live.peak = live.now
        svd(torch.zeros(3, 128, 128), steps=2, guidance=(1.0, 3.0), low_memory=economy, progress=False)
        assert there() == ("unet", "vae", "clip")
    assert seen == {name: {(name,) if economy.visiting else ("unet", "vae", "clip")} for name in MODEL}
    foretold, longer = (
        next(peaks(MODEL, replace(generation, num_frames=frames), torch.float32, [economy])) for frames in (8, 16)
    )
    print(f"{foretold.largest / 1e6:.2f} MB foretold, {live.peak / 1e6:.2f} MB in the call: {economy}")
    assert abs(live.peak - foretold.largest) <= 0.03 * foretold.largest
    assert abs(live.peak - longer.largest) > 0.03 * longer.largest  # control


def test_svd_xt_fits_where_it_should():
    """25 frames of 1024x576 in float16: 13 GB at full speed, 6.5 with low_memory; and whatever the room, the gentlest
    economy that fits in it is chosen, in one line that says so, or says what to lower."""
    found = list(peaks({"unet": UNetConfig(), "vae": VAEConfig()}, PRESETS["svd-xt"].generation, torch.float16))
    needs = [peak.largest for peak in found]
    print(*(f"{need / 1e9:.2f} GB: {economy}" for need, economy in zip(needs, ECONOMIES, strict=True)), sep="\n")
    assert needs == sorted(needs, reverse=True)
    assert needs[0] <= 13e9
    assert needs[-1] <= 6.5e9
    for has in range(4_000_000_000, 24_000_000_000, 500_000_000):
        economy, line = fitting(found, has)
        gentler = needs[: ECONOMIES.index(economy)]
        assert all(need > MARGIN * has for need in gentler)
        assert (line == "") == (economy == ECONOMIES[0])
        assert ("lower --frames or --size" in line) == (needs[-1] > MARGIN * has)
        assert "\n" not in line


def test_the_command_line_counts_chooses_and_says_so(tiny_folder, tmp_path, capsys, monkeypatch):
    """`account --memory` has the bytes of each economy; `generate` takes the one that fits, or what it is told to."""
    size = ("--model", str(tiny_folder), "--frames", "3", "--size", "64x64", "--steps", "1", "--json")
    assert main(["account", *size, "--memory", "float32"]) == 0
    counted = json.loads(capsys.readouterr().out)["memory"]
    assert list(counted) == [str(economy) for economy in ECONOMIES]
    full, *_, least = (peak["largest"] for peak in counted.values())

    def made(room: int | None, *more: str) -> tuple[str, str]:
        monkeypatch.setattr(memory, "room", lambda _device: room)
        Image.new("RGB", (64, 64), "navy").save(tmp_path / "image.png")
        video = str(tmp_path / "video.gif")
        assert main(["generate", str(tmp_path / "image.png"), "-o", video, *size, "--device", "cpu", *more]) == 0
        out, err = capsys.readouterr()
        return json.loads(out)["memory"], err

    assert made(None) == made(2 * full) == (str(ECONOMIES[0]), "")
    assert made(None, "--low-memory") == (str(ECONOMIES[-1]), "")
    economy, line = made(int(1.05 * full))
    assert economy in line
    assert economy != str(ECONOMIES[0])
    assert "lower" not in line
    assert "lower --frames or --size" in made(least)[1]
