"""Theorem: the page of an image says what the model did, and computes in the page what the package computes.

Its script runs in V8 here, without a document; where a browser is at hand, all of the page is tried in it.
"""

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from py_mini_racer import MiniRacer
from torch import Tensor

from conftest import CLIP, UNET_CONFIG, VAE, randomised
from minisvd import AutoencoderKLTemporalDecoder, ImageEncoder, SpatioTemporalUNet, UNetConfig
from minisvd.attention import Attention
from minisvd.config import ClipConfig, GenerationConfig, VAEConfig
from minisvd.folder import resolve_configs
from minisvd.save import save_folder
from minisvd.triviality import linear_map
from tools.cost.accounting import BUILDS, run_cost, unet_blocks
from tools.teach import browse, explain

ROOT = Path(__file__).parent.parent

TINY = UNetConfig(block_out_channels=(32, 64), attention=(True, False), num_attention_heads=(2, 4))
KINDS = {"u8": np.uint8, "f32": np.float32, "i8": np.int8, "i16": np.int16}


@pytest.fixture(scope="module")
def script() -> MiniRacer:
    context = MiniRacer()
    context.eval((Path(explain.__file__).parent / "page.js").read_text(encoding="utf-8"))
    return context


def unpacked(array: dict[str, Any]) -> Tensor:
    data = zlib.decompress(base64.b64decode(array["data"]))
    return torch.tensor(np.frombuffer(data, KINDS[array["type"]])).double() * array["scale"]


def test_the_ledger_of_the_page_is_that_of_accounting(script):
    for config, frames, size, steps in ((UNetConfig(), 14, (128, 72), 25), (TINY, 3, (8, 8), 4)):
        costs = explain.costs(config, frames, size, steps)
        for vcut, build in BUILDS.items():
            for c in range(1, steps + 2):
                run = run_cost(config, frames, size, steps, c, build)
                found = script.call("ledger", costs, steps, c, repr(vcut))
                assert found == vars(run), (vcut, c)
    assert script.call("ledger", costs, steps, 2, "True") != vars(run)  # control


def test_the_attention_of_the_page_is_the_package_s(script):
    """Over one key and over two, and W as well; with weights of 16 bits, to a ten-thousandth."""
    torch.manual_seed(0)
    attention, x, keys = randomised(Attention(32, 4, 24)), torch.randn(1, 3, 32), torch.randn(1, 2, 24)
    site = explain.cross_attention("a site", attention, x[0], keys[0, 0])
    names = ("to_q", "to_k", "to_v", "to_out", "bias")
    given = {**site, **{name: unpacked(site[name]).tolist() for name in names}}
    for count in (1, 2):
        truth = attention(x, keys[:, :count])[0]
        asked = json.dumps([given, x[0, 0].tolist(), keys[0, :count].tolist()])
        found = json.loads(script.eval(f"a = attention(...{asked}); JSON.stringify([a.weights, [...a.out]])"))
        assert found[0] == [[1.0]] * 4 or count == 2
        torch.testing.assert_close(torch.tensor(found[1]), truth[0].detach(), atol=1e-4, rtol=1e-3)
    W, bias = linear_map(attention)
    found = json.loads(script.eval(f"JSON.stringify([...linearMap({json.dumps(given)})])"))
    torch.testing.assert_close(torch.tensor(found).view(32, 24).double(), W, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(
        W @ keys[0, 0].double() + bias, attention(x, keys[:, :1])[0, 0].double(), atol=1e-5, rtol=1e-4
    )
    assert torch.equal(unpacked(site["key"]).float(), keys[0, 0])


def test_numbers_are_said_as_they_are(script):
    said = {"999": "999", "1524": "1.524 k", "-2745600000000": "-2.746 T", "0": "0"}
    assert {n: script.eval(f"counted({n})") for n in said} == said
    assert [script.eval(f"share({x})") for x in (0.5, 0.0025, 0)] == ["50.0 %", "0.250 %", "0.0 %"]
    assert [script.eval(f"ratio({x})") for x in (0, 1e-9, 0.1)] == ["0, to the bit", "1.0e-9", "10.0 %"]
    assert script.call("nearest", [1, 5, 9], 6) == 1
    assert [script.call("amplified", d, 100) for d in (0, 1, -1, 0.005)] == [128, 255, 0, 192]
    assert json.loads(script.eval("JSON.stringify([heat(0), heat(0.5), heat(1)])")) == [
        [13, 18, 41],
        [217, 89, 26],
        [255, 242, 191],
    ]


def test_maps_of_a_large_grid_are_those_of_few_cells():
    assert [explain.cells(*grid) for grid in ((8, 8), (72, 128), (36, 64), (9, 16), (7, 40))] == [1, 8, 4, 1, 1]
    assert explain.middles(4, 4).tolist() == list(range(16))
    assert len(explain.middles(72, 128)) == 9 * 16
    assert explain.some(25, 3) == [0, 12, 24]
    assert explain.some(2, 7) == [0, 1]


def content(html: str) -> dict[str, Any]:
    """The data of a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A page of a random model that is not square, and what is in it."""
    torch.manual_seed(0)
    parts = (
        randomised(SpatioTemporalUNet(UNET_CONFIG)),
        randomised(AutoencoderKLTemporalDecoder(VAEConfig(block_out_channels=VAE["block_out_channels"]))),
        randomised(ImageEncoder(ClipConfig(**CLIP))),
    )
    folder = tmp_path_factory.mktemp("page")
    save_folder(folder / "random", *parts, GenerationConfig(num_frames=3, steps=2, size=(320, 64), guidance=(1.0, 1.0)))
    path = folder / "page.html"
    asked = ["--steps", "3", "--guidance", "1", "2"]  # not the model's own
    explain.main(["weights/tiny/example.png", "-o", str(path), "--model", str(folder / "random"), *asked])
    html = path.read_text(encoding="utf-8")
    return path, content(html)


@pytest.mark.slow
def test_the_page_is_whole_and_alone(made):
    path, _ = made
    html = path.read_text(encoding="utf-8")
    assert not re.search(r"%[A-Z]+%", html)
    assert set(re.findall(r"https?://[^\"' ]+", html)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert path.stat().st_size < 6e6
    assert str(path.parent) not in html


@pytest.mark.slow
def test_maps_are_weights_that_sum_to_one(made):
    _, data = made
    sites, frames = data["maps"]["sites"], len(data["shown"])
    assert frames == 3
    assert len(sites) == 5
    assert sites[0]["grid"] == [2, 10]  # 8x40 tokens, sixteen to a cell
    for site in sites:
        cells = site["grid"][0] * site["grid"][1]
        assert len(site["steps"]) == len(data["maps"]["steps"])
        for step in site["steps"]:
            for kind, width in (("space", cells), ("time", frames)):
                rows = unpacked(step[kind]).view(-1, width) / 255 * unpacked(step[f"{kind}_top"])[:, None]
                assert rows.shape[0] == cells * frames
                assert (rows.sum(-1) - 1).abs().max() < 0.002 * width


@pytest.mark.slow
def test_what_is_shown_was_measured(made, script):
    """Steps fall to 0 and to their end; the lossless build is the first to rounding, and the one without TCA is not;
    what the model returned at the site is what the script makes of its weights."""
    _, data = made
    assert [step["number"] for step in data["steps"]] == [1, 2, 3]
    assert {step["branches"] for step in data["steps"]} == {"two branches, guided"}
    assert data["steps"][-1]["reached"] == "0"
    assert data["steps"][-1]["away"] == "0.000"
    first, lossless, omitted = data["builds"]
    assert (first["name"], lossless["name"], omitted["name"]) == ("False", "'lossless'", "True")
    assert unpacked(lossless["difference"]).abs().max() < 1e-4 < unpacked(omitted["difference"]).abs().max()
    site = data["site"]
    arrays = {k: unpacked(v).tolist() for k, v in site.items() if isinstance(v, dict)}
    asked = json.dumps([{**site, **arrays}, arrays["tokens"][: site["c"]], [arrays["key"]]])
    found = json.loads(script.eval(f"JSON.stringify([...attention(...{asked}).out])"))
    assert (torch.tensor(found).double() - unpacked(site["returned"])).abs().max() < 1e-3
    assert list(data["costs"])[:2] == ["random", "svd"]
    assert [words for _, words in data["ledger"]][-1] == "this run"


@pytest.mark.slow
@pytest.mark.browser
def test_every_control_moves_what_it_says(made):
    path, _ = made
    found = browse.browse(path)
    assert len(found) > 100
    assert [name for name, holds in found if not holds] == []
    broken = path.with_name("broken.html")
    broken.write_text(
        path.read_text("utf-8").replace('range("cut", 1, 2, 1, show)', 'range("cut", 1, 2, 1, () => {})'), "utf-8"
    )
    failed = [name for name, holds in browse.browse(broken) if not holds]  # control
    assert failed[:2] == ["light: cut moves #cut-said", "light: cut moves #ledger"]


def test_the_shown_page_is_what_the_code_makes_of_what_was_measured():
    """The page of the example that is linked: its script, its formulas and its U are those of this code."""
    html = (ROOT / "tools/results/page.html").read_text(encoding="utf-8")
    data, (configs, given) = content(html), resolve_configs("tiny")
    config, t, latent = configs["unet"], given.num_frames, (8, 8)
    blocks = list(unet_blocks(config, t, latent))
    assert data["blocks"] == explain.described(blocks)
    assert data["costs"] == explain.all_costs("tiny", config, t, latent, len(data["steps"]))
    texts = {"U": explain.drawn_u(config, t, latent, "The U of tiny: 8 frames of 64x64, guided"), "SITES": "14"}
    for name, pattern in {
        "TITLE": "<h1>(.*?)</h1>",
        "ABOUT": "</h1>\n<p>(.*?)</p>",
        "MADE": "(Made by .*?)</p>",
    }.items():
        found = re.search(pattern, html)
        assert found is not None
        texts[name] = found[1]
    assert explain.page(data, texts) == html
    assert len(html) < 2e6


def test_the_page_of_a_large_model_stays_small():
    """Frames, maps and weights of the released sizes, all of them noise, which packs worst, are less than 6 MB."""
    generator = torch.Generator().manual_seed(0)
    for frames, steps in ((14, 25), (25, 30)):
        sites = explain.sites_shown(list(unet_blocks(UNetConfig(), frames, (128, 72))), frames)
        assert sites
        parts = [explain.bytes_of(site, frames) * 4 / 3 for site in sites]
        with torch.no_grad():
            attention = Attention(320, 5, 1024)
        parts += [len(json.dumps(explain.cross_attention("", attention, torch.randn(144, 320), torch.randn(1024))))]
        coarse = torch.rand(frames, 3, 18, 32, generator=generator)
        shown = explain.small(
            torch.nn.functional.interpolate(coarse, size=(576, 1024), mode="bicubic").clamp(0, 1), steps
        )
        parts += [(steps + 3) * len(explain.picture(explain.strip(shown))), 2 * shown.numel() * 4 / 3]
        print(*(f"{part / 1e6:.2f}" for part in parts), "MB")
        assert sum(parts) < explain.LARGE
    assert explain.small(torch.rand(8, 3, 64, 64), 25).shape[-1] == 64  # what is small stays as it is
