"""Proposition: ETC's network is Stable Diffusion 2.1's on a grid of frames, its embeddings and sampler the paper's.

Compared with diffusers and transformers on the same random weights, in float32; differences are printed.
"""

import json
import math
import re
import shutil
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from conftest import randomised, relative_error
from minisvd.checkpoint import on_meta
from minisvd.cli import main
from minisvd.config import VCUT, UNetConfig
from minisvd.etc import (
    SD21,
    FPSEmbedding,
    SpatialUNet,
    ddim_sigmas,
    grid_shape,
    mixed_embedding,
    sd_sigmas,
    text_denoiser,
    to_frames,
    to_grid,
)
from minisvd.layouts import CLIP_FOLDER_GATHER, CLIP_FOLDER_RENAME, sources
from minisvd.sampler import sample_euler
from minisvd.save import write_json
from minisvd.text import TextConfig, TextEncoder
from tools.cost.accounting import BUILDS, run_cost, unet_cost

RELEASED: dict[str, Any] = {  # Stable Diffusion 2.1's, as diffusers spells it
    "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
}  # fmt: skip
THEIRS: dict[str, Any] = {
    "block_out_channels": (32, 64, 64), "attention_head_dim": (2, 4, 4), "cross_attention_dim": 48,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), "use_linear_projection": True,
}  # fmt: skip
SMALL = UNetConfig(4, 4, (32, 64, 64), (True, True, False), (2, 4, 4), 2, 48, 256, num_time_ids=1)


def taken_over(theirs: UNet2DConditionModel, config: UNetConfig, mixed: bool = True) -> SpatialUNet:
    """Ours with their weights, in one copy."""
    with torch.device("meta"):
        ours = SpatialUNet(config, mixed)
    own = FPSEmbedding(4 * config.block_out_channels[0]).state_dict()
    state = theirs.state_dict() | {f"fps_embedding.{name}": tensor for name, tensor in own.items()}
    ours.load_state_dict(state, assign=True)
    return ours.eval()


def inputs(b: int, t: int, side: int, c_context: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    video, text = (torch.randn(*shape, generator=generator) for shape in ((b, t, 4, side, side), (b, 77, c_context)))
    return video, torch.tensor([500, 20])[:b], text, torch.tensor([8.0, 30.0])[:b]


def on_the_grid(theirs: UNet2DConditionModel, video: Tensor, timestep: Tensor, text: Tensor, mixed: bool) -> Tensor:
    """Their network on the stitched frames, cut again."""
    _, t, c, h, w = video.shape
    grid = to_grid(video + mixed * mixed_embedding(t, c, h, w))
    return to_frames(theirs(grid, timestep, text, return_dict=False)[0], t)


@torch.no_grad()
@pytest.mark.parametrize("mixed", [True, False])
def test_the_network_equals_diffusers(mixed):
    """To 1e-5, with the mixed embedding added to their input or without; one changed weight is seen, and fps is not."""
    torch.manual_seed(0)
    theirs = randomised(UNet2DConditionModel(**THEIRS))
    ours = taken_over(theirs, SMALL, mixed)
    video, timestep, text, fps = inputs(2, 8, 8, 48)
    expected = on_the_grid(theirs, video, timestep, text, mixed)
    error = relative_error(ours(video, timestep, text, fps), expected)
    print(f"small, mixed={mixed}: relative error {error:.1e}")
    assert error <= 1e-5
    assert (
        relative_error(ours(video, timestep, text, fps), on_the_grid(theirs, video, timestep, text, not mixed)) > 1e-3
    )
    ours.get_parameter("up_blocks.1.attentions.0.proj_in.weight")[0] += 0.1  # control: one weight
    assert relative_error(ours(video, timestep, text, fps), expected) > 1e-5


@torch.no_grad()
@pytest.mark.slow
def test_the_network_at_full_size_equals_diffusers():
    """865,910,724 parameters, 686 tensors, names and shapes theirs; to 1e-5 in 4 frames of 16x16 cells."""
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**RELEASED).eval()
    ours = taken_over(theirs, SD21)
    given = inputs(1, 4, 16, 1024)
    expected = on_the_grid(theirs, *given[:3], mixed=True)
    error = relative_error(ours(*given), expected)
    print(f"full size: relative error {error:.1e}")
    assert error <= 1e-5
    assert relative_error(ours(given[0], given[1] + 1, *given[2:]), expected) > 1e-5  # control


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        theirs = {name: p.shape for name, p in UNet2DConditionModel(**RELEASED).state_dict().items()}
    all_of_ours = {name: p.shape for name, p in on_meta(SpatialUNet, SD21).state_dict().items()}
    shared = {name: shape for name, shape in all_of_ours.items() if not name.startswith("fps_embedding.")}
    assert shared == theirs
    counts = [sum(math.prod(shape) for shape in shapes.values()) for shapes in (shared, all_of_ours)]
    print(f"{counts[0]:,} and {counts[1]:,} parameters, {len(shared)} and {len(all_of_ours)} tensors")
    assert (counts, len(shared)) == ([865_910_724, 905_243_844], 686)


def test_a_clip_may_be_told_once_or_by_row_and_rows_never_mix():
    torch.manual_seed(0)
    unet = randomised(SpatialUNet(SMALL))
    video, timestep, text, fps = inputs(2, 4, 8, 48)
    with torch.no_grad():
        both = unet(video, timestep, text, fps)
        for i in range(2):
            alone = unet(video[i : i + 1], timestep[i], text[i : i + 1], fps[i])
            assert relative_error(alone, both[i : i + 1]) <= 1e-5
    assert relative_error(both[:1], both[1:]) > 1e-3  # control


# --- the grid -------------------------------------------------------------------------------------------------------


def test_the_grid_goes_there_and_back():
    assert [grid_shape(t) for t in (1, 2, 7, 8, 12, 16, 36)] == [(1, 1), (1, 2), (1, 7), (2, 4), (3, 4), (4, 4), (6, 6)]
    for t in (1, 6, 8, 16):
        video = torch.randn(2, t, 3, 4, 5)
        grid = to_grid(video)
        rows, cols = grid_shape(t)
        assert grid.shape == (2, 3, rows * 4, cols * 5)
        assert torch.equal(to_frames(grid, t), video)
        n = t - 1  # the last frame is at the bottom right, its first cell where raster order says
        assert torch.equal(grid[:, :, 4 * (n // cols) :, 5 * (n % cols) :], video[:, n])
    assert not torch.equal(to_frames(to_grid(video), 4).flatten(), video.flatten())  # control: other frames


# --- the embeddings -------------------------------------------------------------------------------------------------


def distances(embedding: Tensor) -> tuple[float, int]:
    """The smallest distance of two cells' embeddings [t,c,h,w], and how many pairs have none."""
    cells = embedding.movedim(1, -1).flatten(0, 2).double()
    smallest, alike = math.inf, 0
    for start in range(0, len(cells), 1024):
        some, rest = cells[start : start + 1024], cells[start:]
        apart = torch.cdist(some, rest, compute_mode="donot_use_mm_for_euclid_dist")
        earlier = torch.ones_like(apart, dtype=torch.bool).tril()  # itself, too
        apart.masked_fill_(earlier, math.inf)
        smallest = min(smallest, apart.min().item())
        alike += int((apart == 0).sum())
    return smallest, alike


@pytest.mark.parametrize(("t", "side"), [(8, 8), (16, 16)])
def test_no_two_cells_are_alike(t, side):
    """By distance, in float32. Control: the paper's Algorithm 1 taken literally, whose frame number is the column's."""
    c, (_, cols) = 4, grid_shape(t)
    embedding = mixed_embedding(t, c, side, side)
    smallest, alike = distances(embedding)
    print(f"{t} x {side}x{side}: smallest distance {smallest:.1e}, rms {embedding.square().mean().sqrt():.2f}")
    assert embedding.dtype == torch.float32
    assert (smallest > 1e-3, alike) == (True, 0)
    literal = torch.cat([embedding[:, : c // 2], embedding[torch.arange(t) % cols][:, c // 2 :]], dim=1)
    pairs = sum(t // cols * (t // cols - 1) // 2 for _ in range(cols)) * side * side
    assert distances(literal) == (0, pairs)


@pytest.mark.slow
def test_no_two_cells_are_alike_at_the_paper_s_size():
    """16 frames of 32x32 cells; the literal algorithm has 24,576 pairs that are alike, bfloat16 moves
    cells further than the nearest two lie apart."""
    smallest, alike = distances(embedding := mixed_embedding(16, 4, 32, 32))
    print(f"16 x 32x32: smallest distance {smallest:.1e}")
    assert (smallest > 4e-3, alike) == (True, 0)
    literal = torch.cat([embedding[:, :2], embedding[torch.arange(16) % 4][:, 2:]], dim=1)
    assert distances(literal)[1] == 24_576
    lost = (embedding.bfloat16() - embedding).square().sum(1).sqrt().max()
    print(f"bfloat16 moves a cell by up to {lost:.1e}")
    assert lost > smallest


def test_the_mixed_embedding_is_the_equations():
    """Values of each half, by hand: at row 3, column 2 of frame 5, with theta 1 and 10000^(1/4) = 10."""
    embedding = mixed_embedding(8, 4, 8, 8)
    assert embedding[5, 1, 3, 2].item() == pytest.approx(math.sin(3 / 10) + math.cos(2 / 10), abs=1e-6)
    assert embedding[5, 3, 3, 2].item() == pytest.approx(math.sin(5 / 10) + math.cos(5 / 10), abs=1e-6)
    assert embedding[5, 0, 3, 2].item() == pytest.approx(math.sin(3) + math.cos(2), abs=1e-6)


def test_fps_changes_nothing_at_first():
    """To the bit; once its last layer has learned, it does."""
    torch.manual_seed(0)
    unet = SpatialUNet(SMALL).eval()
    video, timestep, text, fps = inputs(1, 4, 8, 48)
    with torch.no_grad():
        before = unet(video, timestep, text, fps)
        assert torch.equal(before, unet(video, timestep, text, torch.tensor(120)))
        unet.get_parameter("fps_embedding.4.weight").add_(0.01)  # control
        moved = unet(video, timestep, text, torch.tensor(120)) - unet(video, timestep, text, fps)
    print(f"then it moves the output by {moved.abs().max():.1e}")
    assert moved.abs().max() > 1e-4


def test_sizes_that_do_not_agree_are_refused():
    unet = SpatialUNet(SMALL)
    video, timestep, text, fps = inputs(2, 4, 8, 48)
    wrongs: list[tuple[Any, ...]] = [
        (video[..., :6], timestep, text, fps),
        (video[:, :, :3], timestep, text, fps),
        (video[0], timestep, text, fps),
        (video, timestep, text[..., :40], fps),
        (video, torch.zeros(3), text, fps),
        (video, timestep, text, torch.zeros(3)),
    ]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"do not agree: .*; need \[b, t, 4, h, w\] with h and w multiples of 4"):
            unet(*wrong)
    unet(video, timestep, text, fps)  # control


# --- the text -------------------------------------------------------------------------------------------------------

TEXT: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
    "max_position_embeddings": 77, "vocab_size": 99,
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_the_text_encoder_equals_transformers(act):
    """Its last state, normed, pads included: to 1e-5; one layer more or the other activation is not it."""
    torch.manual_seed(0)
    theirs: Any = randomised(CLIPTextModel(CLIPTextConfig(**TEXT, hidden_act=act)))
    state = theirs.state_dict()
    state = {name if name.startswith("text_model.") else f"text_model.{name}": x for name, x in state.items()}

    def ours(**changes: Any) -> TextEncoder:
        encoder = TextEncoder(TextConfig(**{**TEXT, "hidden_act": act, **changes}))
        own = {}
        for name in encoder.state_dict():
            names, join = sources(name, CLIP_FOLDER_GATHER, CLIP_FOLDER_RENAME)
            own[name] = join(*(state[one] for one in names))
        encoder.load_state_dict(own)
        return encoder.eval()

    ids = torch.randint(99, (2, 77))
    ids[1, 9:] = 0
    expected = theirs(ids).last_hidden_state
    error = relative_error(ours()(ids), expected)
    print(f"{act}: relative error {error:.1e}")
    assert error <= 1e-5
    assert relative_error(ours(num_hidden_layers=2)(ids), expected) > 1e-3
    other = {"gelu": "quick_gelu", "quick_gelu": "gelu"}[act]
    assert relative_error(ours(hidden_act=other)(ids), expected) > 1e-5
    assert sum(p.numel() for p in on_meta(TextEncoder, TextConfig()).parameters()) == 340_387_840


@torch.no_grad()
def test_a_tower_less_its_last_block_is_its_penultimate_layer():
    """Equal to what open_clip's tower with that block gives for the layer before, normed."""
    from open_clip.transformer import TextTransformer

    torch.manual_seed(0)
    whole = randomised(TextTransformer(77, 99, 64, 4, 3, 1.5, output_dim=None))
    ours = TextEncoder(TextConfig(**{**TEXT, "num_hidden_layers": 2})).eval()
    ours.text.load_state_dict(whole.state_dict(), strict=False)
    ids = torch.randint(99, (2, 77))
    how: dict[str, Any] = {"normalize_intermediates": True, "intermediates_only": True, "output_fmt": "NLC"}
    last_but_one, last = whole.forward_intermediates(ids, indices=[1, 2], **how)["text_intermediates"]
    error = relative_error(ours(ids), last_but_one)
    print(f"relative error {error:.1e}")
    assert error <= 1e-5
    assert relative_error(ours(ids), last) > 1e-3  # control


# --- the sampler ----------------------------------------------------------------------------------------------------


def test_the_noise_levels_are_stable_diffusion_s():
    levels = sd_sigmas()
    print(f"{levels[0]:.6f} to {levels[-1]:.6f}")
    assert levels.shape == (1000,)
    assert levels[[0, -1]].tolist() == pytest.approx([0.029167, 14.614641], abs=2e-6)
    assert all(a > b for a, b in pairwise(ddim_sigmas(50).tolist()))
    for wrong in (0, 1000, 2.5):
        with pytest.raises(ValueError, match="number of steps is"):
            ddim_sigmas(wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("steps", [5, 50])
def test_a_run_equals_diffusers_ddim(steps):
    """With guidance 7, to 1e-5 of the result, less the factor of the last level; one step's level off, it is not."""
    torch.manual_seed(0)
    unet = randomised(SpatialUNet(UNetConfig(4, 4, (32, 32), (True, False), (1, 2), 1, 16, 256, num_time_ids=1)))
    noise, text, empty = torch.randn(1, 4, 4, 4, 4), 5 * torch.randn(1, 5, 16), torch.randn(1, 5, 16)
    scheduler: Any = DDIMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        prediction_type="v_prediction", timestep_spacing="leading",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        v_0, v_c = (unet(x, t, each, torch.tensor(8.0)) for each in (empty, text))
        x = scheduler.step(v_0 + 7 * (v_c - v_0), int(t), x).prev_sample

    def error(scale: float) -> float:
        sigmas = ddim_sigmas(steps)
        ours = sample_euler(text_denoiser(unet, text, empty, fps=8.0, scale=scale), noise, sigmas)
        return relative_error(ours / (1 + sigmas[-1] ** 2).sqrt(), x)

    print(f"{steps} steps: relative error {error(7.0):.1e}, at another scale {error(6.0):.1e}")
    assert error(7.0) <= 1e-5
    assert error(6.0) > 1e-4  # control


# --- what it costs --------------------------------------------------------------------------------------------------


def account(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["account", "--json", *argv]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_account_counts_it_and_svd_alike(capsys):
    """16 frames of 256x256 on one branch: 2.338 T MACs, of 905,243,844 parameters; the tree's blocks add up. SVD's
    count is that of the closed formulas."""
    etc = account(capsys, "--model", "etc", "--cut-step", "1", "--tree")
    assert (etc["total"]["parameters"], round(etc["total"]["macs"] / 1e12, 3)) == (905_243_844, 2.338)
    rows = {row["name"]: row for row in etc["modules"]}
    for key in ("parameters", "macs"):
        whole = [name for name in rows if re.fullmatch(r"\w+|\w+\.\d+", name)]
        assert sum(rows[name][key] for name in whole) == etc["total"][key]
        assert sum(rows[name][key] for name in whole[1:]) != etc["total"][key] or key == "macs"  # control
        inside = [name for name in rows if re.fullmatch(r"down_blocks\.0\.\w+\.\d+", name)]
        assert sum(rows[name][key] for name in inside) == rows["down_blocks.0"][key]
    for vcut in ("off", "on", "lossless"):
        svd = account(capsys, "--vcut", vcut)["total"]
        expected = unet_cost(UNetConfig(), 14, (128, 72), 2, BUILDS[VCUT[vcut]])
        assert (svd["parameters"], svd["macs"]) == (expected.parameters, expected.macs)
    print(f"{etc['total']['parameters']:,} parameters, {etc['total']['macs'] / 1e12:.3f} T MACs")


@pytest.mark.slow
@pytest.mark.parametrize(("cut", "guided"), [(None, 25), (17, 16), (1, 0), (40, 25)])
def test_account_counts_a_run(capsys, tmp_path, cut, guided):
    """Guided steps before the cut, on two branches: the closed formulas' MACs, and the peak of as many branches.
    Controls: the formulas of the run that is not cut, unless it is that run; and the folder as it is, which guides no
    step."""
    shutil.copytree("weights/tiny", folder := tmp_path / "guided")
    settings = json.loads((folder / "generation_config.json").read_text("utf-8"))
    write_json(folder / "generation_config.json", settings | {"guidance": [1.0, 3.0]})
    assert account(capsys, "--model", "weights/tiny", "--steps", "25")["run"]["guided"] == 0
    argv = [
        "--model",
        str(folder),
        "--steps",
        "25",
        "--memory",
        "float16",
        *(["--cut-step", str(cut)] if cut else []),
    ]
    counted = account(capsys, *argv)
    config = UNetConfig(8, 4, (64, 96, 96), (True, True, False), (2, 3, 3), 1, 128, 32)
    expected, uncut = (run_cost(config, 8, (8, 8), 25, step).macs for step in (cut, None))
    assert counted["run"] == {"guided": guided, "single": 25 - guided, "macs": expected}
    assert (expected == uncut) == (guided == 25)
    peaks = list(counted["memory"].values())
    assert len(peaks) == 5
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > peaks[-1]


def test_account_prints_a_line_for_each_block(capsys):
    assert main(["account", "--model", "etc", "--frames", "4", "--size", "64x64", "--tree"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "UNet of etc: 2 x 4 frames of 64x64; G = 10^9 MACs a step"
    assert [line.split()[0] for line in lines[1:6]] == [
        "time_embedding", "conv_in", "down_blocks.0", "down_blocks.0.resnets.0", "down_blocks.0.resnets.1",
    ]  # fmt: skip
    assert lines[-2].split()[:2] == ["total", "905,243,844"]
    assert lines[-1].startswith("25 guided steps, of two branches, and 0 single: ")
    assert max(map(len, lines)) <= 80
    assert main(["account", "--model", "etc", "--size", "100x64"]) == 2
    assert "need multiples of 64 pixels" in capsys.readouterr().err
