"""Theorem: of a cross-attention only W c + b matters: "lossless" keeps it and the function, True omits it along time.

The linear replacement is an identity; omitting the temporal term is an approximation, whose size is printed.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minisvd
from checkpoint_files import small_modules, write_folder, write_single_file
from conftest import einops_in_graphs, filled, relative_error
from minisvd import GuidanceSchedule, SpatioTemporalUNet, UNetConfig, edm_sigmas, fold, guided_denoiser, sample_euler
from minisvd.attention import Attention, CachedCondLinear
from minisvd.checkpoint import resolve
from minisvd.cli import main
from minisvd.images import load_image
from tools.folder.convert import main as convert

CONFIG = UNetConfig(
    block_out_channels=(32, 64), attention=(True, False), num_attention_heads=(2, 4), cross_attention_dim=48
)
DEAD = re.compile(r".*transformer_blocks\.0\.(norm2\.(weight|bias)|attn2\.to_[qk]\.weight)")
ROOT = Path(__file__).parent.parent


def released(config: UNetConfig = CONFIG) -> SpatioTemporalUNet:
    torch.manual_seed(0)
    return SpatioTemporalUNet(config).eval()


def inputs(b: int = 2, h: int = 4, c_context: int = 48) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    ids = torch.tensor([[6, 127, 0.02], [11, 20, 0.1]])[:b]
    return torch.randn(b, 2, 8, h, h), torch.linspace(-1, 1, b), torch.randn(b, 1, c_context), ids


def redraw(unet: nn.Module, pattern: re.Pattern[str]) -> int:
    """New random numbers for every parameter whose name matches; how many numbers that was."""
    count = 0
    for name, parameter in unet.named_parameters():
        if pattern.fullmatch(name):
            nn.init.normal_(parameter)
            count += parameter.numel()
    return count


# --- structure ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vcut", "parameters", "cached"),
    [(False, 1_524_623_082, 0), ("lossless", 1_449_452_522, 32), (True, 1_436_660_522, 16)],
)
def test_parameter_counts(vcut, parameters, cached):
    with torch.device("meta"):
        unet = SpatioTemporalUNet(UNetConfig(), vcut)
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert sum(isinstance(module, CachedCondLinear) for module in unet.modules()) == cached
    assert ("CachedCondLinear" in repr(unet)) == (cached > 0)


def test_no_parameter_of_vcut_is_of_a_temporal_cross_attention():
    temporal = re.compile(r".*\.temporal_transformer_blocks\.0\.(norm2|attn2)\..*")
    names = {vcut: list(SpatioTemporalUNet(CONFIG, vcut).state_dict()) for vcut in (False, "lossless", True)}
    assert not any(temporal.fullmatch(name) for name in names[True])
    assert any(temporal.fullmatch(name) for name in names["lossless"])  # control
    sites = [name for name in names[True] if ".attn2." in name]
    assert {name.rsplit(".", 1)[1] for name in sites} == {"weight", "bias"}
    assert not any(".norm2." in name and "transformer_blocks" in name for name in names[True])


def test_an_unknown_build_is_refused():
    with pytest.raises(ValueError, match="vcut is 'on'; need False, True or 'lossless'"):
        SpatioTemporalUNet(CONFIG, "on")  # pyright: ignore[reportArgumentType]


# --- the whole network --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_dead_parameters_leave_the_output_bit_identical():
    """Every to_q, to_k and norm2 of the cross-attentions, redrawn."""
    unet = released()
    before = unet(*inputs())
    count = redraw(unet, DEAD)
    print(f"{count:,} dead parameters redrawn")
    assert count > 0
    assert torch.equal(unet(*inputs()), before)
    redraw(unet, re.compile(r".*attn2\.to_v\.weight"))  # control: a parameter that is not dead
    assert not torch.equal(unet(*inputs()), before)


@torch.no_grad()
def test_lossless_is_the_released_function_and_vcut_is_not():
    unet = released()
    expected = unet(*inputs())
    error = relative_error(fold(unet, "lossless")(*inputs()), expected)
    omitted = relative_error(fold(unet, True)(*inputs()), expected)
    print(f"lossless: relative error {error:.1e}; temporal cross-attention omitted: {omitted:.1e}")
    assert error <= 1e-5
    assert omitted > 100 * error


@torch.no_grad()
@pytest.mark.slow
def test_the_full_configuration_too():
    """1.5 billion random parameters; both builds share all that is not folded."""
    with torch.device("meta"):
        unet = SpatioTemporalUNet(UNetConfig())
    unet, given = filled(unet), inputs(b=1, h=8, c_context=1024)
    expected = unet(*given)
    lossless = fold(unet, "lossless")
    shared = {p.data_ptr() for p in unet.parameters()}
    assert sum(p.data_ptr() in shared for p in lossless.parameters()) == len(list(lossless.parameters())) - 32
    error = relative_error(lossless(*given), expected)
    omitted = relative_error(fold(unet, True)(*given), expected)
    print(f"full size: lossless {error:.1e}, temporal cross-attention omitted {omitted:.1e}")
    assert error <= 1e-5
    assert omitted > 100 * error
    redraw(unet, DEAD)
    assert torch.equal(unet(*given), expected)


@pytest.mark.slow
def test_25_guided_steps_of_the_shipped_model():
    """lossless: latents within 1e-5 relative and frames within one 8-bit level; True: the difference is stated."""
    example = Path(__file__).parent.parent / "weights/tiny/example.png"
    latents: dict[object, Tensor] = {}
    videos = {}
    for vcut in (False, "lossless", True):
        svd = minisvd.load("tiny", vcut=vcut)

        def keep(_step: int, _sigma: Tensor, x: Tensor, _denoised: Tensor, vcut: object = vcut) -> None:
            latents[vcut] = x

        videos[vcut] = svd(str(example), steps=25, guidance=(1.0, 3.0), callback=keep, progress=False)
    error, omitted = (relative_error(latents[vcut], latents[False]) for vcut in ("lossless", True))
    levels = {v: abs(videos[v].numpy().astype(int) - videos[False].numpy()).max() for v in ("lossless", True)}
    print(f"lossless: {error:.1e}, {levels['lossless']} levels; True: {omitted:.1e}, {levels[True]} levels")
    assert error <= 1e-5
    assert levels["lossless"] <= 1
    assert omitted > 100 * error


# --- the cache ----------------------------------------------------------------------------------------------------


def run(unet: SpatioTemporalUNet, embeds: Tensor, latent: Tensor, **schedule) -> Tensor:
    """Four steps from fixed noise, b = 1."""
    denoise = denoiser(unet, embeds, latent, **schedule)
    return sample_euler(denoise, start(), edm_sigmas(4))


def denoiser(unet: SpatioTemporalUNet, embeds: Tensor, latent: Tensor, **schedule):
    ids = torch.tensor([[6, 127, 0.02]])
    return guided_denoiser(unet, embeds, latent, ids, GuidanceSchedule(1.0, 2.0, **schedule))


def start() -> Tensor:
    return torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(2))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("vcut", ["lossless", True])
def test_two_interleaved_runs_equal_separate_runs(vcut):
    unet = fold(released(), vcut)
    conditions = [(torch.randn(1, 1, 48), torch.randn(1, 4, 4, 4)) for _ in range(2)]
    separate = [run(unet, *condition) for condition in conditions]
    denoisers, x, sigmas = [denoiser(unet, *condition) for condition in conditions], [None, None], edm_sigmas(4)
    states = [start() * (1 + sigmas[0] ** 2).sqrt() for _ in x]
    for i in range(4):
        for j, denoise in enumerate(denoisers):
            d = (states[j] - denoise(states[j], sigmas[i], i + 1)) / sigmas[i]
            states[j] = states[j] + d * (sigmas[i + 1] - sigmas[i])
    assert torch.equal(states[0], separate[0])
    assert torch.equal(states[1], separate[1])
    assert not torch.equal(states[0], states[1])  # control


@torch.no_grad()
def test_a_new_image_batch_or_dtype_recomputes():
    """One network, in turn: another image, a batch of two, float64: each as in a fresh network."""
    unet = fold(released(), "lossless")
    sample, c_noise, embeds, ids = inputs()
    for given in ((sample, c_noise, embeds, ids), (sample, c_noise, embeds.flip(0), ids), inputs(b=1)):
        assert torch.equal(unet(*given), fold(released(), "lossless")(*given))
    wide = unet.double()(*(tensor.double() for tensor in (sample, c_noise, embeds, ids)))
    assert wide.dtype == torch.float64
    assert relative_error(wide.float(), fold(released(), "lossless")(sample, c_noise, embeds, ids)) < 1e-4


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("schedule", "stages"),
    [({}, 1), ({"cut_step": 3}, 2), ({"cut_step": 1}, 1), ({"cut_step": 2, "stage2": "uncond"}, 2)],
)
def test_each_cached_linear_is_computed_once_for_each_stage_of_a_video(schedule, stages, monkeypatch):
    """And read in each of the four steps."""
    unet, computed, read = fold(released(), "lossless"), Counter(), Counter()
    sites = [module for module in unet.modules() if isinstance(module, CachedCondLinear)]
    condition = CachedCondLinear.condition

    def counted(site: CachedCondLinear, context: Tensor) -> Tensor:
        computed[site] += 1
        return condition(site, context)

    monkeypatch.setattr(CachedCondLinear, "condition", counted)
    for site in sites:
        site.register_forward_hook(lambda site, *_: read.update([site]))
    run(unet, torch.randn(1, 1, 48), torch.randn(1, 4, 4, 4), **schedule)
    assert computed == dict.fromkeys(sites, stages)
    assert read == dict.fromkeys(sites, 4)


def test_the_state_dict_holds_no_cache():
    unet = fold(released(), "lossless")
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with torch.no_grad():
        run(unet, torch.randn(1, 1, 48), torch.randn(1, 4, 4, 4))
    assert [name for name, _ in unet.named_buffers()] == []
    after = unet.state_dict()
    assert all(torch.equal(a, after[name]) for name, a in before.items())
    assert before.keys() == after.keys()


def test_gradients_reach_weight_bias_and_embedding():
    unet = fold(released(), True)
    sample, c_noise, embeds, ids = inputs()
    unet(sample, c_noise, embeds.requires_grad_(), ids).square().sum().backward()
    assert embeds.grad is not None
    assert embeds.grad.abs().min() > 0
    for module in unet.modules():
        if isinstance(module, CachedCondLinear):
            assert module.weight.grad is not None
            assert module.bias.grad is not None
            assert module.weight.grad.abs().sum() > 0
            assert module.bias.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.slow
def test_compile_has_no_graph_break_and_one_graph_for_all_steps():
    unet = fold(released(replace(CONFIG, block_out_channels=(32,), attention=(True,), num_attention_heads=(2,))), True)
    sample, _, embeds, ids = inputs()
    conditions, graphs = unet.condition(embeds), []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    einops_in_graphs(whole=True)
    compiled = torch.compile(unet, fullgraph=True, backend=backend)
    for sigma in (700.0, 10.0, 0.5, 0.002):
        c_noise = 0.25 * torch.tensor(sigma).log()
        assert (
            relative_error(compiled(sample, c_noise, embeds, ids, conditions), unet(sample, c_noise, embeds, ids))
            <= 1e-5
        )
    assert len(graphs) == 1
    compiled(
        sample[:1], c_noise, embeds[:1], ids[:1], unet.condition(embeds[:1])
    )  # control: another batch is another graph
    assert len(graphs) > 1


# --- two stages ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("vcut", [False, "lossless", True])
def test_the_mean_of_both_outputs_is_the_output_for_half_the_embedding(vcut):
    """(A(0) + A(c)) / 2 = A(c / 2) for every site of every build, attention included."""
    unet = fold(released(), vcut) if vcut else released()
    embeds, seen = torch.randn(1, 1, 48), []
    sites: list[Any] = [
        module
        for name, module in unet.named_modules()
        if isinstance(module, Attention if vcut is False else CachedCondLinear) and name.endswith("attn2")
    ]
    for site in sites:
        x = torch.randn(3, 5, site.to_q.in_features) if vcut is False else None
        zero, image, half = (
            site(x, c) if vcut is False else site.condition(c) for c in (torch.zeros_like(embeds), embeds, embeds / 2)
        )
        seen.append(relative_error((zero + image) / 2, half))
        assert relative_error(image, half) > 1e-2  # control
    print(f"largest relative error over {len(seen)} sites: {max(seen):.1e}")
    assert max(seen) <= 1e-5


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("stage2", ["mean", "cond", "uncond"])
def test_stage_two_is_the_same_in_the_released_and_the_lossless_build(stage2):
    unet, embeds, latent = released(), torch.randn(1, 1, 48), torch.randn(1, 4, 4, 4)
    results = [run(build, embeds, latent, cut_step=3, stage2=stage2) for build in (unet, fold(unet, "lossless"))]
    assert relative_error(results[1], results[0]) <= 1e-4
    guided = run(unet, embeds, latent)
    assert relative_error(results[0], guided) > 1e-3  # control: the cut matters


@torch.no_grad()
def test_a_cut_beyond_the_end_is_no_cut_bit_for_bit():
    unet, embeds, latent = fold(released(), True), torch.randn(1, 1, 48), torch.randn(1, 4, 4, 4)
    assert torch.equal(run(unet, embeds, latent), run(unet, embeds, latent, cut_step=5))
    assert not torch.equal(run(unet, embeds, latent), run(unet, embeds, latent, cut_step=4))


# --- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("vcut", ["lossless", True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_at_load_is_the_float64_product_rounded_once(tiny_folder, vcut, dtype):
    source = minisvd.load_unet(tiny_folder).state_dict()
    unet = minisvd.load_unet(tiny_folder, vcut=vcut, dtype=dtype)
    assert unet.config.vcut == vcut
    checked = 0
    for name, tensor in unet.state_dict().items():
        site, _, kind = name.rpartition(".")
        if site.endswith("attn2") and kind == "weight":
            exact = source[f"{site}.to_out.0.weight"].double() @ source[f"{site}.to_v.weight"].double()
            assert torch.equal(tensor, exact.to(dtype))
            checked += 1
        elif site.endswith("attn2"):
            assert torch.equal(tensor, source[f"{site}.to_out.0.bias"].to(dtype))
        else:
            assert torch.equal(tensor, source[name].to(dtype))
    assert checked == sum(isinstance(m, CachedCondLinear) for m in unet.modules())


@pytest.mark.slow
@pytest.mark.parametrize("vcut", [False, "lossless", True])
def test_both_layouts_fold_to_the_same_network(tmp_path, vcut):
    modules = small_modules()
    file, folder = write_single_file(tmp_path / "s.safetensors", modules), write_folder(tmp_path / "f", modules)
    config = modules["unet"].config
    assert isinstance(config, UNetConfig)
    a = minisvd.load_unet(file, config=config, vcut=vcut).state_dict()
    b = minisvd.load_unet(folder, vcut=vcut).state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_the_tensors_that_a_fold_drops_are_exactly_the_dead_ones(tiny_folder):
    """And, for True, all of the temporal cross-attentions. A file that lacks a dead one is still an incomplete file."""
    found = resolve(tiny_folder, parts=["unet"])
    names = set(found.headers["unet"])
    temporal = re.compile(r".*\.temporal_transformer_blocks\.0\.(norm2|attn2)\..*")
    for vcut in ("lossless", True):
        plan = found.plan("unet", found.build("unet", vcut))
        dropped = names - {source for sources, _ in plan.values() for source in sources}
        dead = {n for n in names if DEAD.fullmatch(n)}
        assert dropped == (dead | {n for n in names if vcut is True and temporal.fullmatch(n)})
    victim = next(n for n in names if DEAD.fullmatch(n))
    del found.headers["unet"][victim]
    with pytest.raises(ValueError, match=re.escape(victim)):
        found.load(vcut=True)


@pytest.mark.parametrize("vcut", ["lossless", "on"])
@pytest.mark.slow
def test_convert_writes_a_smaller_folder_that_loads_the_same(tiny_folder, tmp_path, capsys, vcut):
    """Once as a program, once by its `main`."""
    build = {"lossless": "lossless", "on": True}[vcut]
    out = tmp_path / "converted"
    argv = [str(tiny_folder), str(out), "--vcut", vcut, "--dtype", "float32"]
    if vcut == "lossless":
        command = [sys.executable, "-m", "tools.folder.convert", *argv]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    else:
        assert convert(argv) == 0
        assert capsys.readouterr().out == f"{out}\n"
    assert json.loads((out / "unet/config.json").read_text())["vcut"] == build
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (out / weights).stat().st_size < (tiny_folder / weights).stat().st_size
    converted, folded = minisvd.load(out), minisvd.load(tiny_folder, vcut=build)
    assert converted.unet.config.vcut == build
    for part in ("unet", "vae", "clip"):
        ours, theirs = (getattr(svd, part).state_dict() for svd in (converted, folded))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    with pytest.raises(ValueError, match=f"built with vcut={build!r}; it cannot become False"):
        minisvd.load(out, vcut=False)
    assert convert(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "exists" in err


@pytest.mark.slow
@pytest.mark.parametrize("key", ["zeros", "weights/tiny/example.png"])
@torch.no_grad()
def test_convert_folds_a_constant_key_into_biases(key, tmp_path, capsys):
    """The UNet alone, equal to the released build that hears that key; `verify` says what it is."""
    svd, out = minisvd.load("tiny"), tmp_path / "constant"
    assert convert(["tiny", str(out), "--vcut", "lossless", "--dtype", "float32", "--key", key]) == 0
    heard = torch.zeros(1, 1, 128) if key == "zeros" else svd.clip(load_image(key, svd.generation.size))
    sample, level, ids = torch.randn(1, 8, 8, 8, 8), torch.tensor(0.5), torch.tensor([[6, 127, 0.02]])
    expected, constant = svd.unet(sample, level, heard, ids), minisvd.load_unet(out)
    assert relative_error(constant(sample, level, torch.empty(1, 1, 0), ids), expected) < 1e-5
    assert relative_error(svd.unet(sample, level, heard + 0.1, ids), expected) > 1e-4  # control
    assert sum(p.numel() for n, p in constant.named_parameters() if n.endswith("attn2.weight")) == 0
    capsys.readouterr()
    assert main(["verify", "--model", str(out)]) == 0
    assert "14 sites are biases: a constant key was folded in" in capsys.readouterr().out


def test_convert_refuses_a_key_without_a_fold(tmp_path, capsys):
    assert convert(["tiny", str(tmp_path / "out"), "--key", "zeros"]) == 2
    assert "need [128] and a folded build" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
