"""Theorem: the closed formulas of tools/cost/accounting.py are the network, module by module, to the last MAC.

What they are compared with is torch's FlopCounterMode on tensors that have a shape and no data: no weights, no compute.
"""

import json
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel as DiffusersUNet
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from checkpoint_files import published
from conftest import UNET
from minisvd import GuidanceSchedule, SpatioTemporalUNet, UNetConfig, edm_sigmas, guided_denoiser, sample_euler
from minisvd.attention import CachedCondLinear
from minisvd.config import Vcut
from minisvd.layouts import SINGLE_FILE
from tools.cost import tables
from tools.cost.account import main
from tools.cost.accounting import (
    BUILDS,
    KINDS,
    PUBLISHED,
    Block,
    Build,
    by_kind,
    drawn_in,
    run_cost,
    total,
    tree,
    unet_blocks,
)  # fmt: skip
from tools.cost.accounting import unet_cost as cost

ROOT = Path(__file__).parent.parent
RELEASED, NATIVE = UNetConfig(), (128, 72)
SMALL = UNetConfig(8, 4, (32, 64, 64), (True, True, False), (2, 4, 4), 2, 48, 16)
OTHER = UNetConfig(6, 3, (96, 32), (False, True), (3, 1), 1, 20, 6)
DEEP = UNetConfig(8, 4, (32, 32, 64, 96, 64), (True, False, True, False, True), (1, 2, 2, 3, 4), 3, 8, 2)
VCUTS: tuple[Vcut, ...] = (False, "lossless", True)
MINIMAL = UNetConfig(8, 4, (32, 32), (True, False), (1, 2), 1, 8, 2)
TCA_REMOVED = Build("attention", "none")


@dataclass
class Counted:
    """What torch counts: parameters and MACs of each module, and (name, shape entered, shape left) as they ran."""

    parameters: Counter[str]
    macs: Counter[str]
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]]


def inputs(config: UNetConfig, b: int, t: int, size: tuple[int, int]) -> tuple[Tensor, ...]:
    sample = torch.empty(b, t, config.in_channels, size[1], size[0])
    return sample, torch.empty(b), torch.empty(b, 1, config.cross_attention_dim), torch.empty(b, 3)


def macs_of(run: Any, *arguments: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(*arguments)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def count(unet: nn.Module, *arguments: Tensor) -> Counted:
    """One forward under the counter, with a hook on every module."""
    shapes = []

    def saw(name: str):
        def hook(_module: nn.Module, entered: Any, left: Any) -> None:
            if name and isinstance(left, Tensor):
                shapes.append((name, tuple(entered[0].shape), tuple(left.shape)))

        return hook

    for name, module in unet.named_modules():
        module.register_forward_hook(saw(name))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(*arguments)
    flops = counter.get_flop_counts()
    root = type(unet).__name__
    macs = {name.removeprefix(root).removeprefix("."): sum(ops.values()) // 2 for name, ops in flops.items()}
    assert macs.pop("Global") == macs[""]
    parameters = Counter({name: sum(p.numel() for p in m.parameters()) for name, m in unet.named_modules()})
    return Counted(+parameters, +Counter(macs), shapes)


def formulas(blocks: list[Block]) -> tuple[Counter[str], Counter[str]]:
    """Parameters and MACs of every module: the sites whose names it begins. What comes once is the whole UNet's."""
    parameters, macs = Counter[str](), Counter[str]()
    for site in (site for block in blocks for site in block.sites):
        parts = site.name.split(".")
        for name in (".".join(parts[:i]) for i in range(len(parts) + 1)):
            parameters[name] += site.parameters
            macs[name] += site.macs + (site.once if name == "" else 0)
    return +parameters, +macs


# --- one forward ----------------------------------------------------------------------------------------------------

SHAPES = [
    (RELEASED, 2, 14, NATIVE),
    (SMALL, 2, 5, (12, 8)),
    (SMALL, 1, 1, (4, 16)),
    (OTHER, 3, 4, (6, 10)),
    (DEEP, 2, 3, (32, 16)),
]


@pytest.mark.parametrize("vcut", VCUTS)
@pytest.mark.parametrize(("config", "b", "t", "size"), SHAPES, ids=("released", "small", "one frame", "other", "deep"))
@pytest.mark.slow
def test_every_module_is_as_the_formulas_say(config, b, t, size, vcut):
    """Parameters, MACs, order, and the shapes that enter and leave each block."""
    blocks = list(unet_blocks(config, t, size, b, BUILDS[vcut]))
    with torch.device("meta"):
        unet = SpatioTemporalUNet(config, vcut)
        counted = count(unet, *inputs(config, b, t, size))
    parameters, macs = formulas(blocks)
    print(f"{counted.parameters['']:,} parameters, {counted.macs['']:,} MACs in {len(counted.macs)} modules")
    assert parameters == counted.parameters
    assert {name: macs[name] for name in counted.macs} == counted.macs  # all but lists of modules, which do not run
    sites = [site for block in blocks for site in block.sites]
    assert {site.name for site in sites if site.macs} <= counted.macs.keys()
    linears = {name: module for name, module in unet.named_modules() if isinstance(module, CachedCondLinear)}
    context = torch.empty(b, 1, config.cross_attention_dim, device="meta")
    once = {name: macs_of(module.condition, context) for name, module in linears.items()}
    assert once == {site.name: site.once for site in sites if site.once}

    names = {block.name for block in blocks}
    rows = {2: (b, 1), 4: (b * t,)}  # of levels and numbers, of frames
    shapes = [
        (block.name, (*rows[n], block.enters[0] + block.skip, *block.enters[1:]), (*rows[n], *block.leaves))
        for block in blocks
        if (n := 1 + len(block.enters))
    ]
    assert shapes == [seen for seen in counted.shapes if seen[0] in names]

    other = formulas(list(unet_blocks(config, t, size, b, BUILDS[VCUTS[VCUTS.index(vcut) - 1]])))
    assert other != (counted.parameters, counted.macs)  # control: another build


def test_a_changed_layer_is_found_by_name():
    """Control: one kernel of 1 instead of 3 changes just that layer and what contains it."""
    parameters, macs = formulas(list(unet_blocks(SMALL, 3, (8, 8))))
    name = "up_blocks.1.resnets.2.spatial_res_block.conv2"
    with torch.device("meta"):
        unet = SpatioTemporalUNet(SMALL)
        unet.get_submodule(name.removesuffix(".conv2")).conv2 = nn.Conv2d(64, 64, 1)
        counted = count(unet, *inputs(SMALL, 2, 3, (8, 8)))
    parts = name.split(".")
    containing = {".".join(parts[:i]) for i in range(len(parts) + 1)}
    assert {n for n in counted.macs if macs[n] != counted.macs[n]} < containing
    assert {n for n in parameters if parameters[n] != counted.parameters[n]} == containing
    assert macs[name] == 9 * counted.macs[name] == 9 * (2 * 3 * 4 * 4) * 64 * 64


@pytest.mark.slow
def test_no_axis_can_stand_for_another():
    """Control: as many tokens, but other numbers of videos, frames and cells, are not the same work."""
    with torch.device("meta"):
        counted = macs_of(SpatioTemporalUNet(SMALL), *inputs(SMALL, 2, 6, (12, 8)))
    assert cost(SMALL, 6, (12, 8), 2).macs == counted
    for b, t, size in ((3, 4, (12, 8)), (1, 12, (12, 8)), (2, 3, (24, 8)), (4, 6, (12, 4)), (2, 7, (12, 8))):
        assert cost(SMALL, t, size, b).macs != counted


@pytest.mark.slow
@pytest.mark.parametrize("vcut", VCUTS)
def test_what_comes_once_is_what_condition_does(vcut):
    """`once` are the MACs of unet.condition, `macs` those of a call that is given its result."""
    with torch.device("meta"), torch.no_grad():
        unet = SpatioTemporalUNet(SMALL, vcut)
        sample, c_noise, embeds, ids = inputs(SMALL, 2, 3, (8, 8))
        once = macs_of(unet.condition, embeds)
        step = macs_of(unet, sample, c_noise, embeds, ids, unet.condition(embeds))
    expected = cost(SMALL, 3, (8, 8), 2, BUILDS[vcut])
    assert (step, once) == (expected.macs, expected.once)
    assert (once > 0) == (vcut is not False)


@pytest.mark.parametrize(("b", "t"), [(2, 3), (1, 5)])
@pytest.mark.slow
def test_published_is_what_diffusers_runs(b, t):
    """It projects every condition for every frame or place; one video of one frame at a time would hide it."""
    # Attention as its two matmuls: not every release of torch counts those of a fused kernel.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        theirs = DiffusersUNet(**UNET)
        counted = macs_of(theirs, *inputs(SMALL, b, t, (12, 8)))
    assert cost(SMALL, t, (12, 8), b, PUBLISHED).macs == counted
    assert cost(SMALL, t, (12, 8), b).macs < counted


# --- the figures ----------------------------------------------------------------------------------------------------


def tera(macs: int) -> float:
    return round(macs / 1e12, 2)


def test_parameters_of_the_four_builds():
    counts = {vcut: cost(RELEASED, 1, (8, 8), 1, build).parameters for vcut, build in BUILDS.items()}
    assert counts == {False: 1_524_623_082, "lossless": 1_449_452_522, True: 1_436_660_522}
    assert cost(RELEASED, 1, (8, 8), 1, TCA_REMOVED).parameters == 1_474_245_802


@pytest.mark.parametrize(
    ("frames", "published", "unseen", "ours", "folded"),
    [(14, 44.80, 36.10, 44.69, 43.08), (25, 79.95, 64.37, 79.84, 76.95)],
)
def test_one_guided_step_at_1024x576(frames, published, unseen, ours, folded):
    """T MACs: as published; of that without q k^T and a v; with conditions projected once a video; and folded."""
    as_published = cost(RELEASED, frames, NATIVE, 2, PUBLISHED)
    assert tera(as_published.macs) == published
    assert tera(as_published.macs - as_published.matmul) == unseen
    assert tera(cost(RELEASED, frames, NATIVE).macs) == ours
    lossless, vcut = (cost(RELEASED, frames, NATIVE, 2, BUILDS[key]) for key in ("lossless", True))
    assert tera(lossless.macs) == folded
    assert lossless.macs == vcut.macs  # omitting TCA takes nothing more out of a step
    assert lossless.once == 2 * vcut.once


def test_tables_beside_the_paper():
    """Every cell but two that claims to be the paper's network is within 0.1 %; the folded builds are not."""
    cells = [cell for cell in (*tables.table_2(), *tables.table_3()) if cell.percent is not None]
    same = {"as published", tables.TCA_REMOVED}
    apart = {(c.models, c.row, c.quantity) for c in cells if c.row in same and abs(c.percent or 0) > 0.1}
    print("\n".join(f"{c.models:<20}{c.row:<18}{c.quantity:<18}{c.ours:>9.3f} {c.percent:+.2f} %" for c in cells))
    assert apart == {("svd", tables.TCA_REMOVED, "c=17"), ("svd", tables.TCA_REMOVED, "c=20")}
    assert max(abs(c.percent or 0) for c in cells if c.row in same) < 0.35
    assert {c.paper for c in cells} == {1.474, 36.11, 64.41, 62.86, 903, 719, 772, 1610, 1288, 1382}
    folded = [c.percent or 0 for c in cells if c.row in ('vcut="lossless"', "vcut=True")]  # control
    assert (min(folded) > -2.6, max(folded) < -1.6) == (True, True)


def test_tables_print_every_row(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    tables.main()
    out = capsys.readouterr().out
    assert "| svd | as published | 1.525 (-) | 36.10 (36.11, -0.04 %) |" in out
    assert (
        "| svd-xt, svd-xt-1-1 | TCA removed only | 1,570.73 (-) | 1288 (1288, -0.00 %) | 1382 (1382, +0.02 %) |" in out
    )
    assert len(re.findall(r"^\| svd", out, re.MULTILINE)) == 20
    assert all(remark[0] in "- " for remark in tables.REMARKS.splitlines())


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vcut", VCUTS)
@pytest.mark.parametrize("cut_step", [None, 1, 3, 9])
@pytest.mark.slow
def test_a_run_costs_what_sampling_does(cut_step, vcut):
    """Over a whole sampling run of three steps, conditions included."""
    with torch.device("meta"):
        unet = SpatioTemporalUNet(MINIMAL, vcut)

        def sampling() -> None:
            schedule = GuidanceSchedule(1.0, 3.0, cut_step)
            denoise = guided_denoiser(unet, torch.empty(1, 1, 8), torch.empty(1, 4, 8, 8), torch.empty(1, 3), schedule)
            sample_euler(denoise, torch.empty(1, 2, 4, 8, 8), edm_sigmas(3))

        counted = macs_of(sampling)
    run = run_cost(MINIMAL, 2, (8, 8), 3, cut_step, BUILDS[vcut])
    assert run.macs == counted
    assert (run.guided, run.single) == {None: (3, 0), 1: (0, 3), 3: (2, 1), 9: (3, 0)}[cut_step]
    assert run.full == run.by_sharing + run.by_build + run.by_guidance + run.macs
    assert (run.by_build > 0, run.by_guidance > 0) == (vcut is not False, run.single > 0)
    assert run_cost(MINIMAL, 2, (8, 8), 3, 2, BUILDS[vcut]).macs != counted  # control: another schedule


# --- the tree and the command line ----------------------------------------------------------------------------------


@pytest.mark.parametrize("vcut", VCUTS)
def test_the_tree_adds_up_and_its_skips_meet(vcut):
    """Its lines add up to the last; what leaves a block enters the next; brackets close in the order they opened."""
    blocks = list(unet_blocks(RELEASED, 14, NATIVE, 2, BUILDS[vcut]))
    lines = tree(blocks).splitlines()
    assert max(map(len, lines)) <= 80
    assert {len(line) for line in lines if re.search(r"\.\d\d$", line)} == {len(lines[0])}  # columns meet
    *lines, last = [line for line in lines[1:] if re.search(r"\.\d\d$", line)]  # the others name a stage of the U
    everything = cost(RELEASED, 14, NATIVE, 2, BUILDS[vcut])
    parameters, giga = ([line.split()[i].replace(",", "") for line in (*lines, last)] for i in (-2, -1))
    assert sum(map(int, parameters[:-1])) == int(parameters[-1]) == everything.parameters
    assert sum(map(float, giga[:-1])) == pytest.approx(everything.macs / 1e9, abs=0.005 * len(lines))
    assert sum(map(int, parameters[1:-1])) != everything.parameters  # control: without its first line
    kinds = by_kind(site for block in blocks for site in block.sites)
    assert tuple(kinds) == KINDS
    assert total(site for block in blocks for site in block.sites) == everything
    for field in ("parameters", "macs", "matmul", "once"):
        assert sum(getattr(kind, field) for kind in kinds.values()) == getattr(everything, field)

    along = [block for block in blocks if len(block.enters) == 3]
    assert all(a.leaves == b.enters for a, b in pairwise(along))
    skips: list[tuple[int, ...]] = []
    for block, line in zip(blocks, lines, strict=True):
        assert line.startswith(
            "│" * (len(skips) - (block.skip > 0)) + ("╭" if block.keeps else "╰" if block.skip else " ")
        )
        if block.skip:
            assert skips.pop() == (block.skip, *block.enters[1:])
        if block.keeps:
            skips.append(block.leaves)
    assert not skips


def account(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main([*argv]) == 0
    return capsys.readouterr().out


def test_account_says_what_the_formulas_give(capsys):
    report = json.loads(account(capsys, "--vcut", "on", "--cut-step", "17", "--tree", "--json"))
    expected = cost(RELEASED, 14, NATIVE, 2, BUILDS[True])
    assert report["total"] == vars(expected)
    assert report["run"] == vars(run_cost(RELEASED, 14, NATIVE, 25, 17, BUILDS[True]))
    assert sum(site["macs"] for block in report["blocks"] for site in block["sites"]) == expected.macs
    shown = account(capsys, "--vcut", "on", "--cut-step", "17")
    assert re.search(r"^total +1,436,660,522 +43,077.16 ", shown, re.MULTILINE)
    assert re.search(r"^saved: guidance dropped +-193.84 T +-17.31%$", shown, re.MULTILINE)
    drawn = account(capsys, "--vcut", "lossless", "--tree")
    assert max(map(len, drawn.splitlines())) <= 80
    assert drawn_in(drawn, "utf-8") == drawn
    plain = drawn_in(drawn, "cp1252")
    assert plain.isascii()
    assert list(map(len, plain.splitlines())) == list(map(len, drawn.splitlines()))
    assert tree(unet_blocks(RELEASED, 14, NATIVE, 2, BUILDS["lossless"])) in drawn
    assert "2 x 25 frames" in account(capsys, "--model", "svd-xt")
    assert "1 x 25 frames" in account(capsys, "--model", "svd-xt", "--cut-step", "1")


def test_account_of_a_folder_reads_its_configs_alone(capsys, tiny_folder, tmp_path):
    """No tensor file is there; the build is the folder's own unless another is asked for."""
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text((tiny_folder / part / "config.json").read_text())
    settings = ("--model", str(tmp_path), "--size", "64x32", "--json")
    report = json.loads(account(capsys, *settings))
    assert report["total"] == vars(cost(SMALL, UNET["num_frames"], (8, 4)))
    stated = tmp_path / "unet" / "config.json"
    stated.write_text(json.dumps(json.loads(stated.read_text()) | {"vcut": "lossless"}))
    assert json.loads(account(capsys, *settings))["vcut"] == "lossless"
    assert json.loads(account(capsys, *settings, "--vcut", "on"))["vcut"] is True


def header_of_a_release(path: Path, lacks: str = "") -> Path:
    """A .safetensors file with the names and shapes of the released single file, whose bytes are a hole in the disk."""
    header, end = {}, 0
    for name, shape in published(SINGLE_FILE)["unet"].items():
        if name != lacks:
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.mark.slow
def test_account_of_a_single_file_reads_its_header_alone(capsys, tmp_path):
    """It is the release, with svd-xt's frames if its name says so; one tensor less, and it is not."""
    file = header_of_a_release(tmp_path / "my_xt.safetensors")
    assert file.stat().st_size > 4e9 > 1e9 > 512 * file.stat().st_blocks, "there is nothing to be read"
    report = json.loads(account(capsys, "--model", str(file), "--json"))
    expected = json.loads(account(capsys, "--model", "svd-xt", "--json"))
    assert report.pop("model") != expected.pop("model")
    assert report == expected
    name = "model.diffusion_model.out.2.weight"
    assert main(["--model", str(header_of_a_release(tmp_path / "less.safetensors", name))]) == 2
    assert f"less.safetensors lacks {name}" in capsys.readouterr().err


def test_account_imports_no_torch():
    code = "import sys\nfrom tools.cost.account import main\nmain(['--tree'])\nprint('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert out.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--size", "1000x576"], "size is 1000x576; need multiples of 64 pixels"),
        (["--size", "0x576"], "size is (0, 576); need 2 whole numbers, (width, height), from 1 to 4,096 pixels"),
        (["--frames", "0"], "num_frames is 0; need a whole number from 1 to 10,000"),
        (["--steps", "0"], "steps is 0; need a whole number from 1 to 100,000"),
        (["--cut-step", "0"], "cut_step is 0; need a whole number from 1 to 1,000,000; steps count from 1"),
        (["--model", "someone/model"], "someone/model is not in the local cache: run once with"),
        (["--model", "someone/model", "--offline"], "someone/model is not in the local cache: run once with"),
        (["--model", "tests/layouts"], "tests/layouts has no unet/config.json: give a folder that has, or a .safe"),
        (["--model", "README.md"], "README.md is not a .safetensors file"),
        (["--model", "svdd"], "unknown model 'svdd'"),
    ],
)
def test_account_refuses_in_one_sentence(capsys, argv, sentence):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"minisvd: error: {sentence}")


def test_formulas_refuse_what_the_network_cannot_run():
    right: dict[str, Any] = {"frames": 2, "size": (8, 8)}
    assert list(unet_blocks(SMALL, **right))  # control
    wrongs: list[dict[str, Any]] = [{"size": (9, 8)}, {"size": (8, 0)}, {"frames": 0}, {"batch": 0}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="need"):
            list(unet_blocks(SMALL, **right | wrong))
