"""Theorem: a program written for diffusers' UNet runs on ours after one line of import is changed, to the same results.

Relative errors are the largest difference over the largest magnitude, in float32. diffusers' UNet has the original
eps (conftest) wherever it is the one that is compared with, but for the one test that says how much that changes.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from diffusers import UNetSpatioTemporalConditionModel as DiffusersUNet
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import minisvd
from conftest import original_eps, relative_error
from minisvd.diffusers import UNetSpatioTemporalConditionModel

pytestmark = pytest.mark.slow

VIDEO: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 3, "num_inference_steps": 5, "decode_chunk_size": 3}
HELD_BY_BOTH = ("conv_in", "conv_out", "conv_norm_out", "time_embedding", "add_embedding", "mid_block", "down_blocks")


@pytest.fixture(scope="module")
def folder(diffusers_pipeline: StableVideoDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as diffusers saves it."""
    path = tmp_path_factory.mktemp("published")
    diffusers_pipeline.save_pretrained(path)
    return path


def load(folder: Path, **options) -> UNetSpatioTemporalConditionModel:
    return UNetSpatioTemporalConditionModel.from_pretrained(folder, subfolder="unet", **options)


def inputs(b: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(b, 3, 8, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(b, 1, 48, generator=generator),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02], [11.0, 30.0, 0.1]])[:b],
    }


def frames(pipeline: StableVideoDiffusionPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    image = Image.fromarray(torch.randint(256, (64, 64, 3), generator=generator, dtype=torch.uint8).numpy())
    output: Any = pipeline(image, **VIDEO, output_type="pt", generator=generator)
    return output.frames[0]


def piped(folder: Path, unet: nn.Module) -> StableVideoDiffusionPipeline:
    pipeline = StableVideoDiffusionPipeline.from_pretrained(folder, unet=unet)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("vcut", [None, "lossless"])
def test_the_pipeline_makes_the_same_frames(diffusers_pipeline, folder, vcut):
    """In diffusers' own pipeline, with diffusers' other parts, whether folded or not."""
    theirs = frames(diffusers_pipeline)
    error = relative_error(frames(piped(folder, load(folder, vcut=vcut))), theirs)
    print(f"vcut {vcut}: frames {error:.1e} apart")
    assert error < 1e-5
    assert relative_error(frames(piped(folder, load(folder, vcut=True))), theirs) > 1e-2  # control


def test_the_eps_that_diffusers_runs_at_changes_little(diffusers_pipeline, folder):
    """The one known difference: 1e-6 for 1e-5 in most residual blocks."""
    as_released = piped(folder, DiffusersUNet.from_pretrained(folder, subfolder="unet"))
    error = relative_error(frames(as_released), frames(diffusers_pipeline))
    print(f"frames {error:.1e} apart")
    assert 1e-5 < error < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("timestep", [0.5, 1, torch.tensor(0.5), torch.tensor([0.5, -1.25])], ids=str)
def test_every_way_to_call_it(diffusers_pipeline, folder, timestep):
    ours, given = load(folder), inputs()
    theirs = diffusers_pipeline.unet(timestep=timestep, **given).sample
    assert relative_error(ours(timestep=timestep, **given).sample, theirs) < 1e-5
    sample, embeds, ids = given.values()
    assert relative_error(ours(sample, timestep, embeds, ids, return_dict=False)[0], theirs) < 1e-5
    assert relative_error(ours(sample, timestep, embeds, ids.flip(0)).sample, theirs) > 1e-3  # control


@torch.no_grad()
@pytest.mark.parametrize("vcut", [None, "lossless", True])
def test_a_key_per_frame_as_copies_of_their_unet_take_it(folder, vcut):
    """[b*t,1,c'], video by video: the network's own [b,t,1,c'], which test_embedding.py holds to diffusers' layers."""
    ours, given = load(folder, vcut=vcut), inputs()
    keys = torch.randn(6, 1, 48, generator=torch.Generator().manual_seed(2))
    out = ours(timestep=0.5, **given | {"encoder_hidden_states": keys}).sample
    sample, embeds, ids = given.values()
    assert torch.equal(out, ours.network(sample, torch.tensor([0.5]), keys.view(2, 3, 1, 48), ids))
    assert relative_error(out, ours(timestep=0.5, **given).sample) > 1e-3  # control
    ours, given = ours.double(), {name: x.double() for name, x in given.items()}
    shared = given | {"encoder_hidden_states": embeds.double().repeat_interleave(3, dim=0)}
    assert relative_error(ours(timestep=0.5, **shared).sample, ours(timestep=0.5, **given).sample) < 1e-13


def test_the_surface_that_projects_use(diffusers_pipeline, folder):
    ours, theirs = load(folder), diffusers_pipeline.unet
    for name, value in json.loads(theirs.to_json_string()).items():
        assert name == "_name_or_path" or getattr(ours.config, name) == value, name
    assert ours.add_embedding.linear_1.in_features == theirs.add_embedding.linear_1.in_features == 48
    assert ours.dtype == torch.float32
    assert torch.equal(ours.time_proj(torch.tensor([0.5])), theirs.time_proj(torch.tensor([0.5])))
    for part in HELD_BY_BOTH:  # as a ControlNet's from_unet copies them
        copy.deepcopy(theirs.get_submodule(part)).load_state_dict(ours.get_submodule(part).state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys() == dict(ours.named_parameters()).keys()
    ours.load_state_dict(theirs.state_dict())
    copy.deepcopy(theirs).load_state_dict(ours.state_dict())
    ours.enable_xformers_memory_efficient_attention()
    for refused in (lambda: ours.attn_processors, lambda: ours.set_attn_processor(None)):
        with pytest.raises(NotImplementedError, match="replace the module"):
            refused()


def test_a_layer_replaced_is_the_layer_that_runs(folder):
    """As those do who widen the first convolution: what stands at a name is what the network inside uses."""
    ours, given = load(folder), inputs()
    ours.conv_in = nn.Conv2d(9, 32, 3, padding=1)
    wider = torch.cat([given.pop("sample"), torch.ones(2, 3, 1, 8, 8)], dim=2)
    with pytest.raises(Exception, match="8"):  # the config must say so too
        ours(wider, 0.5, **given)
    ours = load(folder, in_channels=9, ignore_mismatched_sizes=True)
    assert ours(wider, 0.5, **given).sample.shape == (2, 3, 4, 8, 8)
    twin = copy.deepcopy(ours)
    twin.conv_in = nn.Conv2d(9, 32, 3, padding=1)
    assert twin.network.conv_in is twin.conv_in is not ours.conv_in


@torch.no_grad()
@pytest.mark.parametrize("vcut", [None, "lossless", True])
def test_saved_folders_load_again(diffusers_pipeline, folder, tmp_path, vcut):
    """In the drop-in and in minisvd; a folder without `vcut`, in diffusers too."""
    ours, given = load(folder, vcut=vcut), inputs()
    ours.save_pretrained(tmp_path / "unet")
    out = ours(timestep=0.5, **given).sample
    assert torch.equal(load(tmp_path)(timestep=0.5, **given).sample, out)
    sample, embeds, ids = given.values()
    assert torch.equal(minisvd.load_unet(tmp_path)(sample, torch.tensor([0.5, 0.5]), embeds, ids), out)
    stated = json.loads((tmp_path / "unet/config.json").read_text())
    assert stated.get("vcut") == vcut
    if vcut is None:
        theirs = original_eps(DiffusersUNet.from_pretrained(tmp_path, subfolder="unet"))
        assert relative_error(theirs(timestep=0.5, **given).sample, out) < 1e-5
    else:
        with pytest.raises(ValueError, match=f"vcut={vcut!r}; it cannot become False"):
            load(tmp_path, vcut=False)
    assert relative_error(out, diffusers_pipeline.unet(timestep=0.5, **given).sample) < 1e-5 or vcut is True


def test_from_config_and_load_config(folder):
    config: Any = UNetSpatioTemporalConditionModel.load_config(folder, subfolder="unet")
    built: Any = UNetSpatioTemporalConditionModel.from_config(config, vcut="lossless")
    assert built.config.cross_attention_dim == 48
    assert built.state_dict().keys() == load(folder, vcut="lossless").state_dict().keys()
    with torch.device("meta"):
        released = UNetSpatioTemporalConditionModel()
    assert sum(p.numel() for p in released.parameters()) == 1_524_623_082


def test_gradient_checkpointing_keeps_the_gradients_and_less_else(folder):
    ours, given = load(folder).train(), inputs()

    def gradients() -> tuple[list[Tensor], int]:
        held, ours_grad = [], list(ours.parameters())
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):
            loss = ours(timestep=0.5, **given).sample.square().mean()
        return list(torch.autograd.grad(loss, ours_grad, allow_unused=True)), sum(held)

    plain, all_held = gradients()
    ours.enable_gradient_checkpointing()
    assert ours.is_gradient_checkpointing
    checkpointed, held = gradients()
    print(f"numbers held for the backward pass: {all_held:,}, checkpointed {held:,}")
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert held < all_held / 3
    ours.disable_gradient_checkpointing()
    assert not ours.is_gradient_checkpointing
    assert gradients()[1] == all_held


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sample": torch.zeros(2, 3, 8, 6, 8)}, "multiples of 4"),
        ({"encoder_hidden_states": torch.zeros(4, 1, 48)}, "one row a video, 2, or a frame, 6"),
        ({"added_time_ids": torch.zeros(3, 3)}, "do not agree"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_sentence(folder, change, words):
    with pytest.raises(ValueError, match=words):
        load(folder)(timestep=0.5, **inputs() | change)


SCRIPT = """
import torch
from diffusers import UNetSpatioTemporalConditionModel

unet = UNetSpatioTemporalConditionModel.from_pretrained(FOLDER, subfolder="unet", low_cpu_mem_usage=False)
unet.enable_xformers_memory_efficient_attention() if torch.cuda.is_available() else None
unet.enable_gradient_checkpointing()
unet.requires_grad_(False)
trained = [p for name, p in unet.named_parameters() if "temporal_transformer_block" in name]
for p in trained:
    p.requires_grad_(True)
optimizer = torch.optim.AdamW(trained, lr=1e-4)

ids = torch.tensor([[6.0, 127.0, 0.02]])
expected = unet.add_embedding.linear_1.in_features
if unet.config.addition_time_embed_dim * ids.shape[1] != expected:
    raise ValueError(f"the model expects ids of width {expected}")
frames, side, channels = unet.config.num_frames, 8, unet.config.in_channels // 2
generator = torch.Generator().manual_seed(0)
losses = []
for step in range(3):
    latents = torch.randn(1, frames, channels, side, side, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    embeds = torch.randn(1, 1, unet.config.cross_attention_dim, generator=generator)
    sigma = torch.randn(1, generator=generator).mul(1.6).add(0.7).exp()
    s = sigma[:, None, None, None, None]
    noisy = (latents + s * noise) / (s**2 + 1) ** 0.5
    condition = latents[:, :1].expand_as(latents) / 0.18215
    pred = unet(
        torch.cat([noisy, condition], dim=2), 0.25 * sigma.log(), encoder_hidden_states=embeds, added_time_ids=ids
    ).sample
    denoised = pred * (-s / (s**2 + 1) ** 0.5) + (latents + s * noise) / (s**2 + 1)
    loss = ((s**2 + 1) / s**2 * (denoised - latents) ** 2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
unet.save_pretrained(OUT)
"""


def test_one_line_of_a_script_is_changed(folder, tmp_path):
    """A training script as projects have it, run both ways: the same losses, and the same weights in its folder."""
    changed = SCRIPT.replace("from diffusers import", "from minisvd.diffusers import")
    assert sum(a != b for a, b in zip(SCRIPT.splitlines(), changed.splitlines(), strict=True)) == 1

    def run(script: str, out: Path) -> tuple[list[float], dict[str, Tensor]]:
        scope = {"FOLDER": folder, "OUT": out}
        exec(compile(script, out.name, "exec"), scope)
        return scope["losses"], load_file(out / "diffusion_pytorch_model.safetensors")

    (theirs, their_weights), (ours, our_weights) = run(SCRIPT, tmp_path / "a"), run(changed, tmp_path / "b")
    print("losses", theirs, ours)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours != pytest.approx([ours[0]] * 3, rel=1e-4)  # control: the steps differ
    start = load(folder).state_dict()
    moved = {name: (our_weights[name] - start[name]).abs().max() for name in start}
    assert {name for name in moved if moved[name] > 0} <= {name for name in start if "temporal_transformer_b" in name}
    apart = {name: (our_weights[name] - their_weights[name]).abs().mean() for name in start}
    largest = max(apart, key=lambda name: apart[name])
    print(f"weights moved by up to {max(moved.values()):.1e}, the two by {apart[largest]:.1e} in {largest}")
