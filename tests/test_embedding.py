"""Proposition: the UNet can be built on: what is wrong is refused at the door, what differs by frame is heard by frame,
and all that torch offers works on it. Equal to diffusers where diffusers has the same.
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
import re
from functools import cache
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.attention import SDPBackend, sdpa_kernel

import minisvd
from conftest import UNET, UNET_CONFIG, einops_in_graphs, original_eps, randomised, relative_error
from minisvd import SpatioTemporalUNet, UNetConfig, checkpoint_activations, fold, load_unet, widen_conv_in
from minisvd.attention import Attention, BasicTransformerBlock, SpatioTemporalTransformer
from minisvd.config import Vcut

pytestmark = pytest.mark.slow

BUILDS: tuple[Vcut, ...] = (False, "lossless", True)
IDS = torch.tensor([[6, 127, 0.02], [11, 20, 0.1]])


def small(vcut: Vcut = False, **changes: Any) -> SpatioTemporalUNet:
    torch.manual_seed(0)
    released = randomised(SpatioTemporalUNet(UNetConfig(**{**vars(UNET_CONFIG), **changes})))
    return released if vcut is False else fold(released, vcut)


def tiny(vcut: Vcut = False) -> SpatioTemporalUNet:
    return small(
        vcut, block_out_channels=(32, 32), attention=(True, False), num_attention_heads=(2, 2), layers_per_block=1
    )


kept = cache(small)  # for tests that leave it as it is


def one_level() -> SpatioTemporalUNet:
    sizes = {"block_out_channels": (32,), "attention": (True,), "num_attention_heads": (2,), "layers_per_block": 1}
    return small("lossless", **sizes)


def inputs(b: int = 2, t: int = 3, h: int = 8, w: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(b, t, 8, h, w), torch.linspace(-1, 1, b), torch.randn(b, 1, 48), IDS.repeat(b, 1)[:b]


def assert_alike(unet: nn.Module, other: nn.Module) -> None:
    """The same names, in order, and the same numbers."""
    pairs = zip(unet.state_dict().items(), other.state_dict().items(), strict=True)
    assert all(name == its and torch.equal(tensor, number) for (name, tensor), (its, number) in pairs)


# --- the door -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vcut", BUILDS)
@pytest.mark.parametrize("which", ["image_embeds", "c_noise", "added_time_ids", "all", "conditions"])
@torch.no_grad()
def test_one_row_stands_for_all(vcut, which):
    """In float64, as others here: how a processor rounds a product of another shape is no part of it."""
    unet, (sample, *given) = copy.deepcopy(kept(vcut)).double(), (x.double() for x in inputs())
    names = ["c_noise", "image_embeds", "added_time_ids"]
    one = [x[:1] if which in (name, "all") else x for name, x in zip(names, given, strict=True)]
    rows = [x.expand(2, *x.shape[1:]).contiguous() for x in one]
    if which == "conditions":
        one[1] = rows[1] = given[1][:1]
        rows[1] = rows[1].repeat(2, 1, 1)
    shared = (unet.condition(one[1]),) if which == "conditions" else ()
    assert relative_error(unet(sample, *one, *shared), unet(sample, *rows)) <= 1e-13
    assert relative_error(unet(sample, *one), unet(sample, *given)) > 1e-3 or which == "conditions"  # control


@pytest.mark.parametrize("vcut", BUILDS)
@pytest.mark.parametrize(
    ("which", "wrong"),
    [
        (0, torch.zeros(2, 3, 9, 8, 8)),
        (0, torch.zeros(2, 3, 8, 8)),
        (0, torch.zeros(2, 3, 8, 6, 8)),  # 6 cannot be halved twice
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
        kept(vcut)(*given)
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
    unet, (sample, c_noise, embeds, ids) = small(vcut).double(), (x.double() for x in inputs())
    framewise = embeds[:, None].repeat(1, 3, 1, 1)
    assert relative_error(unet(sample, c_noise, framewise, ids), unet(sample, c_noise, embeds, ids)) <= 1e-13
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
    ours = SpatioTemporalUNet(UNET_CONFIG)
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
    """In float64, as the next: how a processor rounds a product of another shape is no part of it."""
    unet, (sample, c_noise, embeds, ids) = small(vcut).double(), (x.double() for x in inputs())
    expected = unet(sample, c_noise, embeds, ids)
    levels, numbers = c_noise[:, None].repeat(1, 3), ids[:, None].repeat(1, 3, 1)
    for given in ((levels, ids), (c_noise, numbers), (levels, numbers)):
        assert relative_error(unet(sample, given[0], embeds, given[1]), expected) <= 1e-13
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
    assert_alike(loaded, ours)
    assert_alike(loaded, fold(fold(load_unet(tiny_folder), "lossless"), vcut))


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
        assert_alike(unet, loaded)
    with pytest.raises(FileExistsError, match="name a new folder"):
        unet.save(tmp_path / "unet")


@torch.no_grad()
def test_diffusers_loads_a_saved_unet(tmp_path):
    from diffusers import UNetSpatioTemporalConditionModel as DiffusersUNet

    unet = small()
    unet.save(tmp_path / "unet", num_frames=3)
    theirs, info = cast(Any, DiffusersUNet).from_pretrained(tmp_path / "unet", output_loading_info=True)
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
    exact = [x.double() for x in (more, sample, *given)]
    both = widen_conv_in(small().double(), channels)(exact[0], *exact[2:]), small().double()(*exact[1:])
    assert relative_error(*both) <= 1e-13
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


# --- the forward in parts: three examples of what published projects do ------------------------------------------


class Control(nn.Module):
    """A ControlNet and its kin: a copy of the way down, which hears `hint` and adds to the skips and the middle.

    Its convolutions are zero at first, so that training starts from the network as it was.
    """

    def __init__(self, unet: SpatioTemporalUNet) -> None:
        super().__init__()
        self.config, self.condition, self.hint = unet.config, unet.condition, 0.0
        self.unet, self.copy = unet.requires_grad_(False), copy.deepcopy(unet).requires_grad_(True)
        c, depth = unet.config.block_out_channels, unet.config.layers_per_block
        widths = [c[0], *(width for width in c for _ in range(depth + 1))][:-1]  # of the skips
        self.zeros = nn.ModuleList(zero_conv(width) for width in [*widths, c[-1]])

    def forward(self, *given: Any) -> Tensor:
        x, emb, conditions = self.unet.embed(*given)
        bottom, more = self.copy.down(x + self.hint, emb, conditions)
        more = [*more, self.copy.middle(bottom, emb, conditions)]
        *added, middle = (zero(one) for zero, one in zip(self.zeros, more, strict=True))
        x, skips = self.unet.down(x, emb, conditions)
        skips = [skip + one for skip, one in zip(skips, added, strict=True)]
        return self.unet.up(self.unet.middle(x, emb, conditions) + middle, skips, emb, conditions)


def zero_conv(c: int) -> nn.Conv2d:
    conv = nn.Conv2d(c, c, 1)
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


class PoseUNet(SpatioTemporalUNet):
    """A pose encoder's features, added after conv_in: `pose` [(b t), c, h, w] is set before the call."""

    pose: Tensor | float = 0.0

    def down(self, x: Tensor, emb: Tensor, conditions: Any) -> tuple[Tensor, list[Tensor]]:
        return super().down(x + self.pose, emb, conditions)


class LookAtFirstFrame(nn.Module):
    """A self-attention replaced: every frame's queries among the tokens of frame 0. Keeps the published weights."""

    def __init__(self, attention: Attention, frames: int) -> None:
        super().__init__()
        self.attention, self.frames = attention, frames

    def forward(self, x: Tensor, _context: Tensor) -> Tensor:
        return self.attention(x, x[:: self.frames])


def look_at_first_frame(unet: SpatioTemporalUNet, frames: int) -> SpatioTemporalUNet:
    blocks: list[Any] = [m for m in unet.modules() if isinstance(m, BasicTransformerBlock)]
    for block in blocks:
        block.attn1 = LookAtFirstFrame(block.attn1, frames)
    return unet


def test_residuals_reach_the_skips_and_the_middle(tiny_folder):
    """Nothing at first; a gradient at every zero; and all of it through the pipeline."""
    unet, given = tiny("lossless").double(), [x.double() for x in inputs(h=4, w=4)]
    plain, control = unet(*given).detach(), Control(unet).double()
    control.hint = 1.0
    assert relative_error(control(*given), plain) <= 1e-13
    control(*given).square().sum().backward()
    assert len(control.zeros) == 4 + 1
    zeros: list[Any] = [*control.zeros]
    for zero in zeros:
        assert zero.weight.grad.abs().max() > 0
        nn.init.normal_(zero.weight)
        assert relative_error(control(*given), plain) > 1e-3
        nn.init.zeros_(zero.weight)
    svd = minisvd.load(tiny_folder)
    svd.unet = through = Control(svd.unet)  # pyright: ignore[reportAttributeAccessIssue]

    def frames() -> Tensor:
        return svd(torch.zeros(3, 64, 64), size=(64, 64), num_frames=2, steps=1, progress=False).frames

    before, through.hint = frames(), 1.0
    assert torch.equal(frames(), before)  # whatever the copy sees
    nn.init.normal_(through.zeros[-1].get_parameter("weight"))
    assert relative_error(frames(), before) > 1e-3  # control


@torch.no_grad()
def test_a_tensor_after_conv_in():
    """A constant one is conv_in's bias moved; any other is heard in each frame."""
    unet, given = tiny(), inputs(h=4, w=4)
    posed = PoseUNet(unet.config)
    posed.load_state_dict(unet.state_dict())
    assert torch.equal(posed(*given), unet(*given))
    posed.pose = torch.randn(6, 32, 4, 4)
    assert relative_error(posed(*given), unet(*given)) > 1e-3
    posed.pose = 0.5
    unet.conv_in.get_parameter("bias").add_(0.5)
    assert relative_error(posed(*given), unet(*given)) <= 1e-5


@pytest.mark.parametrize("vcut", BUILDS)
@torch.no_grad()
def test_a_replaced_self_attention(vcut):
    """A single frame is its own first; of more frames, the first alone decides what is looked at."""
    plain, alone, given = tiny(vcut), inputs(t=1, h=4, w=4), inputs(h=4, w=4)
    replaced = look_at_first_frame(copy.deepcopy(plain), 1)
    assert torch.equal(replaced(*alone), plain(*alone))
    replaced = look_at_first_frame(copy.deepcopy(plain), 3)
    assert relative_error(replaced(*given), plain(*given)) > 1e-4
    first = next(m for m in replaced.modules() if isinstance(m, LookAtFirstFrame))
    x = torch.randn(6, 5, 32)
    apart = [first.attention(x[[i]], x[[i - i % 3]]) for i in range(6)]
    assert relative_error(first(x, x), torch.cat(apart)) <= 1e-5


def test_the_examples_are_short_and_have_no_branch():
    for example in (Control, PoseUNet, LookAtFirstFrame, look_at_first_frame):
        text = inspect.getsource(example)
        assert len(text.splitlines()) <= 25
        assert not [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.If | ast.IfExp)]


# --- what torch offers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vcut", BUILDS)
def test_autocast(vcut):
    """In and out of the region: with conditions made inside, and outside in float32."""
    unet, given = tiny(vcut), inputs(h=4, w=4)
    expected, outside = unet(*given), unet.condition(given[2])
    with torch.autocast("cpu", torch.bfloat16):
        inside, mixed = unet(*given), unet(*given, outside)
    for out in (inside, mixed):
        assert out.dtype == torch.bfloat16
        assert 0 < relative_error(out.float(), expected) < 0.05
    inside.float().square().mean().backward()
    gradients = [p.grad for p in unet.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)
    assert len(gradients) == len(list(unet.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["torch.compile(unet)", "unet.compile()", "hook"])
def test_compile_and_hooks_take_effect_through_the_pipeline(tiny_folder, way):
    """One graph serves every step and image; guidance cut, or another size, is at most one more for each."""
    svd, seen = minisvd.load(tiny_folder), []
    svd.unet = one_level()

    def backend(graph: Any, _inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    def video(svd: Any, value: float = 0.0, side: int = 64, **kwargs: Any) -> Tensor:
        image = torch.full((3, side, side), value)
        return svd(image, size=(side, side), num_frames=2, steps=2, progress=False, **kwargs).frames

    expected = video(svd)
    torch._dynamo.reset()
    einops_in_graphs(whole=way == "torch.compile(unet)")  # which takes a third of the time
    if way == "hook":
        svd.unet.register_forward_hook(lambda *_: seen.append(None))
    elif way == "unet.compile()":
        svd.unet.compile(fullgraph=True, backend=backend)
    else:
        svd.unet = torch.compile(svd.unet, fullgraph=True, backend=backend)  # pyright: ignore[reportAttributeAccessIssue]
    assert relative_error(video(svd), expected) <= 1e-4
    if way == "hook":
        assert len(seen) == 2
        return
    assert len(seen) == 1
    video(svd, 0.5)
    assert len(seen) == 1
    if way == "unet.compile()":  # the same from here on
        return
    video(svd, cut_step=2)
    video(svd, side=128)
    print(f"{len(seen)} graphs")
    assert len(seen) <= 3


def test_export_with_any_batch_frames_and_size():
    """Of one level, for it takes long; tools/embedding.md has three of them made into an ONNX file."""
    from torch.export import Dim, export

    unet, auto = one_level(), Dim.AUTO  # pyright: ignore[reportAttributeAccessIssue]
    rows = {0: auto}
    program = export(unet, inputs(h=4, w=6), dynamic_shapes=({0: auto, 1: auto, 3: auto, 4: auto}, rows, rows, rows))
    for b, t, h, w in ((3, 5, 6, 4), (4, 2, 8, 10)):
        given = inputs(b, t, h, w)
        assert relative_error(program.module()(*given), unet(*given)) <= 1e-5


@pytest.mark.parametrize("vcut", BUILDS)
@pytest.mark.filterwarnings(
    "ignore:There is a performance drop:UserWarning", "ignore:.torch.jit.script. is:FutureWarning"
)
def test_function_transforms(vcut):
    """vmap over videos, the gradient by the parameters as a function, vjp and jvp (which needs the plain attention)."""
    unet, given = tiny(vcut), inputs(h=4, w=4)
    sample, c_noise, embeds, ids = given
    each = torch.func.vmap(lambda *one: unet(*(cast(Any, x)[None] for x in one))[0])(*given)
    assert relative_error(each, unet(*given)) <= 1e-5

    parameters = {name: p.detach() for name, p in unet.named_parameters()}
    loss = torch.func.grad(lambda p: torch.func.functional_call(unet, p, given).square().mean())
    found: Any = loss(parameters)
    unet(*given).square().mean().backward()
    assert max((found[n] - p.grad).abs().max() for n, p in unet.named_parameters()) <= 1e-6  # pyright: ignore

    def f(x: Tensor) -> Tensor:
        return unet(x, c_noise, embeds, ids)

    along = torch.randn_like(sample)
    with sdpa_kernel(SDPBackend.MATH):
        forwards = torch.func.jvp(f, (sample,), (along,))[1]
        out, backwards = torch.func.vjp(f, sample)[:2]
        (back,) = backwards(out)
    assert abs((forwards * out).sum() / (along * back).sum() - 1) <= 1e-3


@pytest.mark.parametrize("vcut", BUILDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
@torch.no_grad()
def test_dynamically_quantised_linears(vcut):
    from torch.ao.quantization import quantize_dynamic

    unet, given = tiny(vcut), inputs(h=4, w=4)
    quantised = quantize_dynamic(unet, {nn.Linear}, dtype=torch.qint8)
    assert sum("quantized" in type(module).__module__ for module in quantised.modules()) > 20
    assert 0 < relative_error(quantised(*given), unet(*given)) < 0.1


@pytest.mark.parametrize("vcut", BUILDS)
@pytest.mark.parametrize("scheme", ["Int8DynamicActivationInt8Weight", "Int8WeightOnly", "Float8WeightOnly"])
@torch.no_grad()
def test_torchao_quantises_every_linear(vcut, scheme):
    """Float8 products need a GPU that has them; on any other device float8 is how the weights are kept."""
    from torchao import quantization

    unet, given = tiny(vcut), inputs(h=4, w=4)
    quantised = copy.deepcopy(unet)
    quantization.quantize_(quantised, getattr(quantization, f"{scheme}Config")())
    linears = [module for module in quantised.modules() if isinstance(module, nn.Linear)]
    assert len(linears) > 90
    assert all(type(linear.weight) is not nn.Parameter for linear in linears)
    assert 1e-4 < relative_error(quantised(*given), unet(*given)) < 0.1


def lora(unet: SpatioTemporalUNet, modules: list[str]) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(cast(Any, unet), LoraConfig(r=4, target_modules=modules, init_lora_weights=False))


@pytest.mark.parametrize("vcut", BUILDS)
def test_lora_learns_where_gradients_reach_and_merges(vcut):
    """On every linear layer but the dead ones, and in folded builds but `attn2`, which is called otherwise."""
    unet, given, dead = tiny(vcut), inputs(h=4, w=4), minisvd.dead_names(tiny(vcut))
    linears = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear)]
    model = lora(unet, [name for name in linears if not name.endswith("attn2") and f"{name}.weight" not in dead])
    model(*given).square().mean().backward()
    gradients = [p.grad.abs().max() for p in model.parameters() if p.requires_grad]
    assert len(gradients) > 150
    assert min(gradients) > 0
    out = model(*given)
    assert relative_error(fold(model.merge_and_unload(), vcut or "lossless")(*given), out) <= 1e-5
    assert relative_error(tiny(vcut)(*given), out) > 1e-2  # control


def test_lora_on_the_dead_matrices_never_learns():
    """Exactly, with the written-out attention; the fused kernel leaves its rounding."""
    unet, (sample, c_noise, key, ids) = tiny(), inputs(h=4, w=4)
    targets = [name.removesuffix(".weight") for name in minisvd.dead_names(unet) if "to_" in name]
    assert len(targets) == 2 * 2 * 4  # queries and keys of SCA and TCA in four transformers
    model = lora(unet, targets)

    def gradients(keys: Tensor) -> list[float]:
        model.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):
            model(sample, c_noise, keys, ids).square().mean().backward()
        return [p.grad.abs().max().item() for p in model.parameters() if p.requires_grad]

    assert max(gradients(key)) == 0
    assert min(gradients(torch.cat([key, key.flip(0)], dim=1))) > 0  # control: with two keys they learn


@pytest.mark.parametrize("vcut", BUILDS)
def test_checkpointed_activations_give_the_same_gradients_in_less_memory(vcut):
    unet, given = tiny(vcut).train(), inputs(h=8, w=8)
    checkpointed, kept = checkpoint_activations(copy.deepcopy(unet)), []
    assert list(checkpointed.state_dict()) == list(unet.state_dict())
    for network in (unet, checkpointed):
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            loss = network(*given).square().mean()
        kept.append(sum(event.self_cpu_memory_usage for event in profile.key_averages()))  # pyright: ignore
        loss.backward()
    print(f"after the forward {kept[0] / 1e6:.2f} MB are kept, checkpointed {kept[1] / 1e6:.2f} MB")
    assert kept[1] < kept[0] / 2
    for ours, theirs in zip(checkpointed.parameters(), unet.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # pyright: ignore[reportArgumentType]


def parallel(rank: int, where: str, builds: tuple[Vcut, ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=2)
    for vcut in builds:
        parallel_build(rank, vcut)
    torch.distributed.destroy_process_group()


def parallel_build(rank: int, vcut: Vcut) -> None:
    """Half the batch on each of two processes, under DDP and under FSDP2: the whole batch's gradients."""
    given, plain = inputs(h=4, w=4), tiny(vcut)
    plain(*given).square().mean().backward()
    mine = [x[[rank]] for x in given]

    replicated = nn.parallel.DistributedDataParallel(tiny(vcut))
    replicated(*mine).square().mean().backward()

    sharded, mesh = tiny(vcut), init_device_mesh("cpu", (2,))
    for transformer in [m for m in sharded.modules() if isinstance(m, SpatioTemporalTransformer)]:
        fully_shard(transformer, mesh=mesh)
        register_fsdp_forward_method(transformer, "condition")  # called outside its forward
    fully_shard(sharded, mesh=mesh)
    sharded(*mine).square().mean().backward()

    largest = max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)
    everywhere: Any = zip(plain.parameters(), replicated.parameters(), sharded.parameters(), strict=True)
    for p, ddp, fsdp in everywhere:
        assert (ddp.grad - p.grad).abs().max() <= 1e-5 * largest, vcut
        assert (fsdp.grad.full_tensor() - p.grad).abs().max() <= 1e-5 * largest, vcut


@pytest.mark.slow
@pytest.mark.posix
def test_data_parallel(tmp_path):
    """Every build, in the same two processes: starting them takes longer than what they do."""
    torch.multiprocessing.spawn(parallel, (str(tmp_path / "rendezvous"), BUILDS), nprocs=2)
