"""Proposition: the UNet can be built on: what is wrong is refused at the door, what differs by frame is heard by frame,
and all that torch offers works on it. Equal to diffusers where diffusers has the same.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import UNET, original_eps, randomised, relative_error
from minisvd import SpatioTemporalUNet, UNetConfig, fold
from minisvd.config import Vcut

BUILDS: tuple[Vcut, ...] = (False, "lossless", True)
CONFIG = UNetConfig(
    block_out_channels=UNET["block_out_channels"],
    attention=(True, True, False),
    num_attention_heads=UNET["num_attention_heads"],
    cross_attention_dim=UNET["cross_attention_dim"],
    addition_time_embed_dim=UNET["addition_time_embed_dim"],
)
IDS = torch.tensor([[6, 127, 0.02], [11, 20, 0.1]])


def small(vcut: Vcut = False, **changes: Any) -> SpatioTemporalUNet:
    torch.manual_seed(0)
    released = randomised(SpatioTemporalUNet(UNetConfig(**{**vars(CONFIG), **changes})))
    return released if vcut is False else fold(released, vcut)


def inputs(b: int = 2, t: int = 3, h: int = 8, w: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(b, t, 8, h, w), torch.linspace(-1, 1, b), torch.randn(b, 1, 48), IDS.repeat(b, 1)[:b]


# --- the door -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vcut", BUILDS)
@pytest.mark.parametrize("which", ["image_embeds", "c_noise", "added_time_ids", "all", "conditions"])
@torch.no_grad()
def test_one_row_stands_for_all(vcut, which):
    unet, (sample, *given) = small(vcut), inputs()
    names = ["c_noise", "image_embeds", "added_time_ids"]
    one = [x[:1] if which in (name, "all") else x for name, x in zip(names, given, strict=True)]
    rows = [x.expand(2, *x.shape[1:]).contiguous() for x in one]
    if which == "conditions":
        one[1] = rows[1] = given[1][:1]
        rows[1] = rows[1].repeat(2, 1, 1)
    shared = (unet.condition(one[1]),) if which == "conditions" else ()
    assert relative_error(unet(sample, *one, *shared), unet(sample, *rows)) <= 1e-6
    assert relative_error(unet(sample, *one), unet(sample, *given)) > 1e-3 or which == "conditions"  # control


@pytest.mark.parametrize("vcut", BUILDS)
@pytest.mark.parametrize(
    ("which", "wrong"),
    [
        (0, torch.zeros(2, 3, 9, 8, 8)),
        (0, torch.zeros(2, 3, 8, 8)),
        (1, torch.zeros(3)),
        (1, torch.zeros(2, 2)),
        (2, torch.zeros(3, 1, 48)),
        (2, torch.zeros(4, 1, 48)),
        (2, torch.zeros(6, 1, 48)),
        (2, torch.zeros(2, 2, 1, 48)),
        (2, torch.zeros(2, 1, 40)),
        (2, torch.zeros(2, 48)),
        (3, torch.zeros(3, 3)),
        (3, torch.zeros(2, 4)),
        (3, torch.zeros(2, 2, 3)),
    ],
    ids=lambda value: str(list(value.shape)) if isinstance(value, Tensor) else str(value),
)
@torch.no_grad()
def test_sizes_that_do_not_agree_are_refused_in_one_sentence(vcut, which, wrong):
    given = list(inputs())
    given[which] = wrong
    with pytest.raises(ValueError, match=re.escape(str(list(wrong.shape)))) as caught:
        small(vcut)(*given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("vcut", BUILDS)
def test_conditions_of_another_batch_are_refused(vcut):
    unet = small(vcut)
    sample, c_noise, embeds, ids = inputs(b=4)
    with pytest.raises(ValueError, match="do not agree"):
        unet(sample, c_noise, embeds, ids, unet.condition(embeds[:2]))


# --- what differs from frame to frame -----------------------------------------------------------------------------


@pytest.mark.parametrize("vcut", BUILDS)
@torch.no_grad()
def test_one_key_per_frame_is_one_key_where_all_frames_share_it(vcut):
    unet, (sample, c_noise, embeds, ids) = small(vcut), inputs()
    framewise = embeds[:, None].repeat(1, 3, 1, 1)
    assert relative_error(unet(sample, c_noise, framewise, ids), unet(sample, c_noise, embeds, ids)) <= 1e-6
    framewise[:, 1] = 0
    assert relative_error(unet(sample, c_noise, framewise, ids), unet(sample, c_noise, embeds, ids)) > 1e-3  # control


@torch.no_grad()
def test_in_time_all_frames_hear_frame_0():
    """Cut space off: with the spatial values at zero, only frame 0's key is left to hear."""
    unet, (sample, c_noise, _, ids) = small("lossless"), inputs()
    keys = torch.randn(2, 3, 1, 48)
    for name, parameter in unet.named_parameters():
        if re.fullmatch(r".*\.transformer_blocks\.0\.attn2\.weight", name):
            nn.init.zeros_(parameter)
    before, later = unet(sample, c_noise, keys, ids), keys.clone()
    later[:, 1:] = torch.randn(2, 2, 1, 48)
    assert torch.equal(unet(sample, c_noise, later, ids), before)
    later[:, 0] = 0
    assert not torch.equal(unet(sample, c_noise, later, ids), before)  # control


@torch.no_grad()
def test_one_key_per_frame_equals_diffusers(monkeypatch):
    """With the one line changed that published code changes: that each video's key is not repeated for its frames.
    The temporal context of diffusers is frame 0's key too. "lossless" is the same function, True is not."""
    from diffusers import UNetSpatioTemporalConditionModel as DiffusersUNet

    torch.manual_seed(0)
    theirs = original_eps(randomised(DiffusersUNet(**UNET)))
    ours = SpatioTemporalUNet(CONFIG)
    ours.load_state_dict(theirs.state_dict())
    sample, c_noise, _, ids = inputs()
    keys = torch.randn(2, 3, 1, 48)
    flat, repeat_interleave = keys.flatten(0, 1), Tensor.repeat_interleave
    monkeypatch.setattr(
        Tensor, "repeat_interleave", lambda x, *n, **k: x if x is flat else repeat_interleave(x, *n, **k)
    )
    expected = theirs(sample, c_noise, flat, ids, return_dict=False)[0]
    errors = {vcut: relative_error(fold(ours, vcut)(sample, c_noise, keys, ids), expected) for vcut in BUILDS}
    print(errors)
    assert max(errors[False], errors["lossless"]) <= 1e-5
    assert errors[True] > 1e-3
    assert relative_error(ours(sample, c_noise, keys[:, 0], ids), expected) > 1e-3  # control


@torch.no_grad()
def test_more_keys_than_one_are_for_attention_alone():
    sample, c_noise, _, ids = inputs()
    keys = torch.randn(2, 2, 48)
    both = small()(sample, c_noise, keys, ids)
    assert relative_error(small()(sample, c_noise, keys.flip(1), ids), both) <= 1e-5  # a set of keys has no order
    assert relative_error(small()(sample, c_noise, keys[:, :1], ids), both) > 1e-3
    for vcut in ("lossless", True):
        with pytest.raises(ValueError, match=r"more keys than one are for vcut=False"):
            small(vcut)(sample, c_noise, keys, ids)


@pytest.mark.parametrize("vcut", BUILDS)
@torch.no_grad()
def test_levels_and_numbers_may_differ_from_frame_to_frame(vcut):
    unet, (sample, c_noise, embeds, ids) = small(vcut), inputs()
    expected = unet(sample, c_noise, embeds, ids)
    levels, numbers = c_noise[:, None].repeat(1, 3), ids[:, None].repeat(1, 3, 1)
    for given in ((levels, ids), (c_noise, numbers), (levels, numbers)):
        assert relative_error(unet(sample, given[0], embeds, given[1]), expected) <= 1e-6
    levels[:, 0] = -1.5  # of a clean first frame
    assert relative_error(unet(sample, levels, embeds, ids), expected) > 1e-3  # control


@torch.no_grad()
def test_a_level_per_frame_is_each_frames_own():
    """Without any work along time, a video at three levels is three videos of one frame."""
    unet = small()
    for name, parameter in unet.named_parameters():
        if name.endswith("mix_factor"):
            nn.init.constant_(parameter, 100.0)  # sigmoid(100) is 1: space alone
    (sample, _, embeds, ids), levels = inputs(b=1), torch.tensor([[-1.0, 0.0, 1.0]])
    frames = [unet(sample[:, [i]], levels[:, i], embeds, ids) for i in range(3)]
    assert relative_error(unet(sample, levels, embeds, ids), torch.cat(frames, dim=1)) <= 1e-5
    assert relative_error(unet(sample, levels.flip(1), embeds, ids), torch.cat(frames, dim=1)) > 1e-3  # control
