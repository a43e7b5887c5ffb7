"""Proposition: the UNet can be built on: what is wrong is refused at the door, what differs by frame is heard by frame,
and all that torch offers works on it. Equal to diffusers where diffusers has the same.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minisvd
from conftest import UNET, original_eps, randomised, relative_error
from minisvd import SpatioTemporalUNet, UNetConfig, fold, load_unet, widen_conv_in
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


# --- what a UNet in memory becomes --------------------------------------------------------------------------------


@pytest.mark.parametrize("vcut", ["lossless", True])
@torch.no_grad()
def test_fold_is_the_loaders_fold(tiny_folder, vcut):
    ours, loaded = fold(load_unet(tiny_folder), vcut), load_unet(tiny_folder, vcut=vcut)
    assert ours.config == loaded.config
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    again = fold(fold(load_unet(tiny_folder), "lossless"), vcut)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_a_fold_keeps_mode_and_what_trains_and_a_folded_unet_has_no_way_back():
    released = small().train()
    released.conv_in.requires_grad_(False)
    folded = fold(released, "lossless")
    assert folded.training
    assert not folded.conv_in.weight.requires_grad
    assert folded.conv_out.weight.requires_grad
    with pytest.raises(ValueError, match="built with vcut='lossless'; it cannot become False"):
        fold(folded, False)


@pytest.mark.parametrize("vcut", ["lossless", True])
@torch.no_grad()
def test_a_constant_key_folds_into_biases(vcut, tmp_path):
    released, (sample, c_noise, _, ids) = small(), inputs()
    key, nothing = torch.randn(48), torch.empty(1, 1, 0)
    expected = fold(released, vcut)(sample, c_noise, key.expand(1, 1, 48), ids)
    constant = fold(released, vcut, key)
    assert relative_error(constant(sample, c_noise, nothing, ids), expected) <= 1e-5
    other = fold(released, vcut, torch.zeros(48))
    assert relative_error(other(sample, c_noise, nothing, ids), expected) > 1e-3  # control
    sites = {name: p.numel() for name, p in constant.named_parameters() if "attn2" in name}
    assert {name.rsplit(".", 1)[1] for name, numel in sites.items() if numel} == {"bias"}
    constant.save(tmp_path / "constant")
    assert torch.equal(
        load_unet(tmp_path / "constant")(sample, c_noise, nothing, ids), constant(sample, c_noise, nothing, ids)
    )
    with pytest.raises(ValueError, match=re.escape("key has shape [40] and vcut is")):
        fold(released, vcut, torch.zeros(40))
    with pytest.raises(ValueError, match=re.escape("image_embeds is [2, 1, 48]; need [b, 1, 0]")):
        constant(*inputs())


@pytest.mark.parametrize("vcut", BUILDS)
@torch.no_grad()
def test_a_saved_unet_loads_as_it_was(vcut, tmp_path):
    unet = small(vcut, in_channels=9, num_time_ids=5)
    unet.save(tmp_path / "unet")
    assert sorted(path.name for path in (tmp_path / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    for folder in (tmp_path, tmp_path / "unet"):  # as a part, and by itself
        loaded = load_unet(folder)
        assert loaded.config == unet.config
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in unet.state_dict().items())
    with pytest.raises(FileExistsError, match="name a new folder"):
        unet.save(tmp_path / "unet")


@torch.no_grad()
def test_diffusers_loads_a_saved_unet(tmp_path):
    from diffusers import UNetSpatioTemporalConditionModel as DiffusersUNet

    unet = small()
    unet.save(tmp_path / "unet", num_frames=3)
    theirs, info = DiffusersUNet.from_pretrained(tmp_path / "unet", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    sample, c_noise, embeds, ids = inputs()
    expected = original_eps(theirs)(sample, c_noise, embeds, ids, return_dict=False)[0]
    assert relative_error(unet(sample, c_noise, embeds, ids), expected) <= 1e-5


def test_a_saved_model_is_whole_or_absent(tiny_folder, tmp_path, monkeypatch):
    """And loads in minisvd with every bit, and in diffusers."""
    from diffusers import StableVideoDiffusionPipeline

    svd = minisvd.load(tiny_folder)
    svd.save(tmp_path / "new" / "whole")
    again = minisvd.load(tmp_path / "new" / "whole")
    assert again.generation == svd.generation
    for part in ("unet", "vae", "clip"):
        before, after = getattr(svd, part).state_dict(), getattr(again, part).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    theirs = StableVideoDiffusionPipeline.from_pretrained(tmp_path / "new" / "whole")
    assert theirs.unet.config["num_frames"] == svd.generation.num_frames

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("minisvd.save.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        svd.save(tmp_path / "new" / "half")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["whole"]


@pytest.mark.parametrize("channels", [9, 16, 24])
@torch.no_grad()
def test_widened_input_leaves_the_output_as_it_was(channels, tmp_path):
    unet, (sample, *given) = small(), inputs()
    wide = widen_conv_in(unet, channels)
    assert wide.config.in_channels == channels
    more = torch.cat([sample, torch.randn(2, 3, channels - 8, 8, 8)], dim=2)
    assert relative_error(wide(more, *given), unet(sample, *given)) <= 1e-6
    wide.save(tmp_path / "wide")
    assert torch.equal(load_unet(tmp_path / "wide")(more, *given), wide(more, *given))
    nn.init.normal_(wide.conv_in.weight)
    assert relative_error(wide(more, *given), unet(sample, *given)) > 1e-3  # control
    with pytest.raises(ValueError, match="channels is 4, but conv_in has 8"):
        widen_conv_in(unet, 4)


@torch.no_grad()
def test_any_number_of_numbers(tmp_path):
    """Five of them, as SV3D's folders state them: by the width of what they are embedded into."""
    unet, (sample, c_noise, embeds, _) = small(num_time_ids=5), inputs()
    ids = torch.rand(2, 5)
    assert unet(sample, c_noise, embeds, ids).shape == (2, 3, 4, 8, 8)
    unet.save(tmp_path / "unet")
    stated = json.loads((tmp_path / "unet/config.json").read_text())
    assert stated["projection_class_embeddings_input_dim"] == 5 * 16
    (tmp_path / "unet/config.json").write_text(json.dumps(stated | {"projection_class_embeddings_input_dim": 81}))
    with pytest.raises(ValueError, match="need a multiple of addition_time_embed_dim, 16"):
        load_unet(tmp_path)
