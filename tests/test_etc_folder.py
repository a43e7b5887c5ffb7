"""Proposition: a folder of Stable Diffusion 2.1's layout is loaded whole or refused, and no site of it is trivial.

The files are diffusers' and transformers' own, with random numbers: the official weights were not at hand.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from conftest import VAE, randomised, relative_error
from minisvd import AutoencoderKLTemporalDecoder, VAEConfig, check, check_model
from minisvd.cli import main
from minisvd.etc import SpatialUNet, mixed_embedding, to_frames, to_grid
from minisvd.folder import FIXED
from minisvd.save import vae_config, write_json
from minisvd.text import TextToVideo, load_sd
from test_etc import SMALL, TEXT, THEIRS

SCHEDULER: dict[str, Any] = {
    "prediction_type": "v_prediction", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
}  # fmt: skip


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three levels in place of four, with 16 cross-attentions all the same: 2 x 3 down, 1 in the middle, 3 x 3 up."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sd")
    sizes: dict[str, Any] = {**THEIRS, "block_out_channels": (64, 64, 64), "cross_attention_dim": 64}
    sizes |= {f"{way.lower()}_block_types": (f"CrossAttn{way}Block2D",) * 3 for way in ("Down", "Up")}
    unet = UNet2DConditionModel(**sizes)
    randomised(unet).save_pretrained(folder / "unet")
    text = CLIPTextModel(CLIPTextConfig(**TEXT, hidden_act="gelu", bos_token_id=1, eos_token_id=2))
    randomised(text).save_pretrained(folder / "text_encoder")
    DDIMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    published = folder / "text_encoder/model.safetensors"
    state = {re.sub(r"^(?!text_model\.)", "text_model.", name): x for name, x in load_file(published).items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # an index buffer, as older files have it
    save_file(state, published)
    return folder


def copied(folder: Path, to: Path, **files: dict[str, Any]) -> Path:
    """A folder of links, but for config files, by their part, in which some fields differ (None: are absent)."""
    for file in folder.rglob("*.*"):
        (to / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        if changes := files.get(file.parent.name if file.suffix == ".json" else ""):
            stated = json.loads(file.read_text()) | changes
            (to / file.relative_to(folder)).write_text(json.dumps({k: v for k, v in stated.items() if v is not None}))
        else:
            (to / file.relative_to(folder)).symlink_to(file)
    return to


@torch.no_grad()
def test_the_loaded_networks_equal_diffusers_and_transformers(sd_folder: Path):
    unet, text = load_sd(sd_folder)
    theirs = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    ids = torch.randint(99, (2, 77))
    keys = text(ids)
    assert keys.shape == (2, 77, 64)
    error = relative_error(keys, CLIPTextModel.from_pretrained(sd_folder / "text_encoder")(ids).last_hidden_state)
    video = torch.randn(2, 4, 4, 8, 8)
    grid = to_grid(video + mixed_embedding(4, 4, 8, 8))
    expected = to_frames(theirs(grid, 300, keys, return_dict=False)[0], 4)
    ours = unet(video, torch.tensor(300), keys, torch.tensor(30))
    print(f"relative error of the text {error:.1e}, of the network {relative_error(ours, expected):.1e}")
    assert max(error, relative_error(ours, expected)) <= 1e-5
    assert relative_error(unet(video, torch.tensor(310), keys, torch.tensor(30)), expected) > 1e-5  # controls
    assert relative_error(unet(video, torch.tensor(300), keys + 1, torch.tensor(30)), expected) > 1e-5
    assert not unet.training
    assert not unet.get_parameter("fps_embedding.4.weight").any()


def test_a_trained_fps_embedding_is_read(sd_folder: Path, tmp_path: Path):
    """All of it, or none: part of it is refused."""
    unet, _ = load_sd(sd_folder)
    own = {name: torch.full_like(p, 0.01) for name, p in unet.state_dict().items() if name.startswith("fps_embedding.")}
    file = Path("unet/diffusion_pytorch_model.safetensors")
    copied(sd_folder, tmp_path)
    state = load_file(sd_folder / file)
    for given, message in ((own, ""), (dict([*own.items()][1:]), "lacks fps_embedding.0.")):
        (tmp_path / file).unlink()
        save_file(state | given, tmp_path / file)
        if message:
            with pytest.raises(ValueError, match=message):
                load_sd(tmp_path)
        else:
            assert load_sd(tmp_path)[0].get_parameter("fps_embedding.4.bias").unique().item() == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet": {"_class_name": "UNet3DConditionModel"}}, "_class_name is 'UNet3DConditionModel'; need 'UNet2DCond"),
        ({"unet": {"use_linear_projection": False}}, "use_linear_projection is False; need True"),
        ({"unet": {"use_linear_projection": None}}, "use_linear_projection is None; need True"),
        ({"unet": {"attention_head_dim": [1, 2, 3]}}, "num_attention_heads has 3 at width 64; need a divisor"),
        ({"unet": {"attention_head_dim": None}}, "lacks the field attention_head_dim"),
        ({"unet": {"block_out_channels": [64, 64, 96]}}, "lacks down_blocks.2.resnets.0.conv_shortcut.bias and 1 more"),
        ({"unet": {"cross_attention_dim": 32}}, "[64, 64] cannot fill"),
        ({"unet": {"down_block_types": ["AttnDownBlock2D"] * 3}}, "down_block_types is"),
        ({"scheduler": {"prediction_type": "epsilon"}}, "prediction_type is 'epsilon'; need 'v_prediction'"),
        ({"scheduler": {"prediction_type": None}}, "prediction_type is None; need 'v_prediction'"),
        ({"scheduler": {"beta_schedule": "linear"}}, "beta_schedule is 'linear'; need 'scaled_linear'"),
        ({"text_encoder": {"model_type": "clip"}}, "model_type is 'clip'; need 'clip_text_model'"),
        ({"text_encoder": {"num_hidden_layers": 2}}, "has text_model.encoder.layers.2.* and 15 more tensors"),
        ({"text_encoder": {"num_hidden_layers": 4}}, "lacks text_model.encoder.layers.3.* and 15 more tensors"),
    ],
)
def test_what_is_another_network_is_refused(sd_folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\*", ".*")) as refusal:
        load_sd(copied(sd_folder, tmp_path, **changes))
    assert str(tmp_path) in str(refusal.value)


def test_a_file_that_is_not_there_is_named(sd_folder: Path, tmp_path: Path):
    for name in ("scheduler/scheduler_config.json", "text_encoder/model.safetensors"):
        folder = copied(sd_folder, tmp_path / Path(name).parent)
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"there is no .*{Path(name).name}: give a folder of Stable Diff"):
            load_sd(folder)
    load_sd(copied(sd_folder, tmp_path / "whole"))  # control


# --- triviality -----------------------------------------------------------------------------------------------------


def test_verify_finds_no_site_of_it_trivial(sd_folder: Path, capsys: pytest.CaptureFixture[str]):
    """0 of 16, each by more than 1e-3, on 77 keys; on one key all 16 are."""
    assert main(["verify", "--model", str(sd_folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    moved = [site["query"] for site in report["sites"]]
    off = [site["affinity"] for site in report["sites"]]
    print(f"{report['hold']} of {len(moved)} hold; moved by the query {min(moved):.1e}, off linear {min(off):.1e}")
    assert (report["hold"], len(moved), {site["keys"] for site in report["sites"]}) == (0, 16, {77})
    assert min(moved) > 1e-3
    assert min(off) > 1e-3
    assert main(["verify", "--model", str(sd_folder), "--keys", "1"]) == 0  # control
    assert "16 of 16 sites are trivial" in capsys.readouterr().out


def test_77_copies_of_one_key_are_one_key(sd_folder: Path):
    """So it is the number of DIFFERENT keys that counts, not the text."""
    unet, _ = load_sd(sd_folder)
    video, one = torch.randn(1, 4, 4, 8, 8), torch.randn(1, 1, 64)
    given = torch.tensor(500), one.expand(1, 77, 64), torch.tensor(8)
    found = check_model(unet, video, *given)
    print(f"77 copies: moved by the query at most {max(site.query for site in found.sites):.1e}")
    assert (len(found.sites), found.holds) == (16, True)
    assert max(site.query for site in found.sites) < 1e-12
    other = torch.cat([given[1][:, :-1], torch.randn(1, 1, 64)], dim=1)  # control: one of 77 is another
    assert not any(site.holds for site in check_model(unet, video, given[0], other, given[2]).sites)


def test_the_theorem_of_etc_s_paper_has_a_counterexample():
    """It says that for A X B there is an A' with A X B = A' X for all X. With A = 1, B = [[0, b], [c, 0]], b != c, X B
    swaps and scales the two entries of X [1,2], which no A' [1,1] does: the best of all A' leaves a residual.
    Control: for B = b I there is one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 2, generator=generator, dtype=torch.float64)

    def residual(b: torch.Tensor) -> float:
        y = x @ b
        a = (x * y).sum() / (x * x).sum()  # least squares over all X at once
        return ((y - a * x).norm() / y.norm()).item()

    swap = residual(torch.tensor([[0.0, 2.0], [3.0, 0.0]], dtype=torch.float64))
    same = residual(2 * torch.eye(2, dtype=torch.float64))
    print(f"residual {swap:.3f}, for a multiple of the identity {same:.1e}")
    assert swap > 0.9
    assert same < 1e-15


def test_no_map_shared_by_frames_swaps_two_of_them():
    """B.2 says that a temporal layer is a matrix W on each frame's tokens. Swapping two frames is temporal; the best W
    shared by both frames leaves nearly all of it, a matrix over the tokens of both leaves nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(
        2, 4, 4000, generator=generator, dtype=torch.float64
    )  # [t, s, c]: many channels, so W is determined
    y = x.flip(0)

    def residual(given: torch.Tensor, wanted: torch.Tensor) -> float:
        w = torch.linalg.lstsq(given.T, wanted.T).solution.T
        return ((wanted - w @ given).norm() / wanted.norm()).item()

    shared = residual(torch.cat([*x], dim=1), torch.cat([*y], dim=1))
    both = residual(x.flatten(0, 1), y.flatten(0, 1))
    print(f"residual of one W for each frame {shared:.3f}, of a matrix over both {both:.1e}")
    assert shared > 0.99
    assert both < 1e-12


def test_convolutions_reach_across_frames_and_norms_over_all():
    """On a grid: the Jacobian of one cell at a frame's border reaches into the next frame through a 3x3 convolution,
    through a GroupNorm into every cell; frame by frame neither does. So not attention alone carries time."""
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.GroupNorm(2, 4)
    video = torch.randn(1, 4, 4, 6, 6)

    def reached(module: torch.nn.Module, stitched: bool) -> list[int]:
        """How many cells of each frame the last cell of frame 0's first row depends on."""
        x = video.clone().requires_grad_(True)
        out = to_frames(module(to_grid(x)), 4) if stitched else module(x.flatten(0, 1)).unflatten(0, (1, 4))
        (gradient,) = torch.autograd.grad(out[0, 0, 0, 0, -1], x)
        return (gradient[0].abs().amax(1) > 0).sum((1, 2)).tolist()

    assert reached(conv, stitched=True) == [4, 2, 0, 0]
    assert reached(conv, stitched=False) == [4, 0, 0, 0]
    assert reached(norm, stitched=True) == [36, 36, 36, 36]
    assert reached(norm, stitched=False) == [36, 0, 0, 0]


def test_the_receptive_field_of_the_network_is_the_whole_video(sd_folder: Path):
    """By Jacobian: one cell depends on every cell of every frame, and frame by frame on its own frame alone."""
    unet, _ = load_sd(sd_folder)
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, 77, 64, generator=generator)

    def share(frames: int) -> list[float]:
        """Of each frame's cells, the share that cell (0, 0) of frame 0 depends on, made `frames` at a time."""
        x = torch.randn(1, 4, 4, 8, 8, generator=generator).requires_grad_(True)
        part = unet(x[:, :frames], torch.tensor(500), text, torch.tensor(8))
        (gradient,) = torch.autograd.grad(part[0, 0, 0, 0, 0], x)
        return (gradient[0].abs().amax(1) > 0).double().mean((1, 2)).tolist()

    whole, alone = share(4), share(1)
    print(f"share of cells seen in each frame: {whole}, alone {alone}")
    assert whole == [1.0] * 4
    assert alone == [1.0, 0.0, 0.0, 0.0]


def test_attention_alone_on_many_keys_is_not_trivial():
    """What `check` says of one attention of the network, by its reason."""
    unet = SpatialUNet(SMALL).eval()
    attend = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
    report = check(attend, torch.randn(1, 5, 64), torch.randn(1, 77, 48))  # pyright: ignore[reportArgumentType]
    assert report.verdict == "not trivial"
    assert report.dead == {}


# --- a sentence -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoken(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a VAE, words and settings: what `minisvd generate --text` takes."""
    folder = copied(sd_folder, tmp_path_factory.mktemp("spoken"))
    vae = randomised(AutoencoderKLTemporalDecoder(config := VAEConfig(block_out_channels=VAE["block_out_channels"])))
    write_json(folder / "vae/config.json", FIXED["vae"] | vae_config(config))
    save_file(vae.state_dict(), folder / "vae/diffusion_pytorch_model.safetensors")
    write_json(folder / "text_encoder/words.json", {"words": ["a", "red", "star", "moving", "up"]})
    settings = {"num_frames": 4, "steps": 2, "guidance": [1.0, 3.0], "size": [64, 64], "decode_chunk": 4}
    write_json(folder / "generation_config.json", settings)
    return folder


def test_a_sentence_becomes_a_video(spoken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """By the command line and by Python the same; another word, fps or seed is another video."""
    model = TextToVideo(spoken)
    with torch.no_grad():
        model.unet.get_parameter("fps_embedding.4.weight").add_(0.05)
    video = model("a red star moving up", fps=8)
    assert (video.frames.shape, video.fps) == ((4, 3, 64, 64), 8)
    assert torch.equal(video.frames, model("a red star moving up", fps=8).frames)
    for other in (model("a star", fps=8), model("a red star moving up", fps=30), model("a red star moving up", seed=1)):
        assert not torch.equal(video.frames, other.frames)
    out = tmp_path / "clip.gif"
    given = ["generate", "--model", str(spoken), "--fps", "8", "-o", str(out), "--device", "cpu", "--json"]
    assert main([*given, "--text", "a red star moving up", "--frames", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["fps"] == 8
    assert out.read_bytes()[:3] == b"GIF"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--text", "a blue star"], "the model does not know 'blue'; need at most 76 of: a red star moving up"),
        (["--text", "a " * 77], "the text has 77 words; need at most 76"),
        (["--text", "a star", "--fps", "0"], "fps is 0; need a number from 1 to 60, in frames per second"),
        (["--text", "a star", "--steps", "2000"], "number of steps is 2000; need a whole number from 1 to 999, as"),
        (["--text", "a star", "x.png"], "a video is made of an image or of a --text: leave one of them out"),
    ],
)
def test_what_cannot_be_said_is_one_sentence(spoken, tmp_path, capsys, argv, sentence):
    assert main(["generate", "--model", str(spoken), "-o", str(tmp_path / "x.gif"), "--device", "cpu", *argv]) == 2
    assert capsys.readouterr().err.startswith(f"minisvd: error: {sentence}")
