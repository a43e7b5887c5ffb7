"""Theorem: the pictures for slides show what the formulas, the schedule and the small model say."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from minisvd import PRESETS, UNetConfig, load_unet
from tools.cost.accounting import BUILDS, unet_blocks, unet_cost
from tools.teach import pictures
from tools.teach.maps import attended, attentions, watched, weights

RESULTS = Path(__file__).parent.parent / "tools/results"
SVG = "{http://www.w3.org/2000/svg}"


def words(picture: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(picture).iter(f"{SVG}text")]


@pytest.mark.slow
def test_the_command_draws_what_is_shown(tmp_path):
    command = [sys.executable, "-m", "tools.teach.pictures", "-o", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent.parent)
    assert done.returncode == 0, done.stderr
    for name in ("u.svg", "stages.svg"):
        assert (tmp_path / name).read_text("utf-8") == (RESULTS / name).read_text("utf-8")
    drawn, shown = (
        re.split(r"\d[\d.]*", (folder / "theorem.svg").read_text("utf-8")) for folder in (tmp_path, RESULTS)
    )
    assert drawn == shown  # but for numbers, which another processor rounds otherwise
    said = words((tmp_path / "theorem.svg").read_text("utf-8"))
    assert said.count("1.0000") == 8
    assert [line.split("output ")[1][:14].strip() for line in said if "the output" in line] == [
        "moves not at a",
        "moves by 8.8%",
    ]


@pytest.mark.parametrize("levels", [(True, True, True, False), (True, False)])
def test_the_u_has_every_block_once_and_marks_every_cross_attention(levels):
    """For another U than the released one as well."""
    config = UNetConfig(
        block_out_channels=(32, 64, 64, 64)[: len(levels)],
        attention=levels,
        num_attention_heads=(2,) * len(levels),
        layers_per_block=len(levels) // 2,
    )
    picture, blocks = pictures.u(config, 3, (16, 8), "a U"), list(unet_blocks(config, 3, (16, 8)))
    assert sorted(map(int, re.findall(r'data-block="(\d+)"', picture))) == list(range(len(blocks)))
    for block in blocks:
        assert f"{block.name}: {pictures.shape(block)}, {pictures.numbers(block)}" in picture
    sites = sum("attentions" in block.name for block in blocks)
    marks = [word for word in words(picture) if word.isdecimal()]
    assert sorted(map(int, marks)) == [i for i in range(1, sites + 1) for _ in ("SCA", "TCA")]
    said = " ".join(words(picture))
    for build in BUILDS.values():
        assert f"{unet_cost(config, 3, (16, 8), build=build).parameters:,} parameters" in said
    assert (said.count("W c + b"), said.count("omitted")) == (3, 1)


def test_the_schedule_shows_each_step_once_for_each_branch_that_runs_in_it():
    for cut_step in (1, 17, 26):
        given = PRESETS["svd"].generation
        steps, picture = given.steps, pictures.stages("svd", UNetConfig(), given, 8, cut_step)
        shown = [word for word in words(picture) if word.isdecimal()]
        assert sorted(map(int, shown)) == sorted([*range(1, steps + 1), *range(1, cut_step)])


@torch.no_grad()
def test_the_maps_are_those_that_the_attention_uses():
    """to_out(weights v) is what it returns, at every site; with the weights of other tokens it is not."""
    unet = load_unet("weights/tiny")
    generator, returned = torch.Generator().manual_seed(0), {}
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    for name, module in attentions(unet).items():
        module.register_forward_hook(lambda _module, _given, out, name=name: returned.update({name: out}))
    with watched(unet) as seen:
        unet(draw(2, 3, 8, 8, 8), torch.tensor(0.5), draw(2, 1, 128), torch.tensor([[6, 127, 0.02]]))
    assert list(seen) == list(attentions(unet))
    assert len(seen) == 4 * 7
    for name, (x, context) in seen.items():
        module = attentions(unet)[name]
        found = weights(module, x, context)
        torch.testing.assert_close(attended(module, found, context), returned[name], atol=1e-5, rtol=1e-4)
        some = weights(module, x, context, torch.tensor([1]))
        torch.testing.assert_close(some, found[:, :, 1:2])
        if name.endswith("attn1"):  # control: over one key there are no others
            assert (attended(module, found.flip(2), context) - returned[name]).abs().max() > 1e-3
    count = sum(len(module._forward_pre_hooks) for module in unet.modules())
    assert count == 0
