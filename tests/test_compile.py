"""Theorem: a compiled model makes the same video from one graph for guided and one for single steps, and no image after
the first adds another; where no compiler works, it says so."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from torch._dynamo.utils import counters

import minisvd
from conftest import einops_in_graphs, randomised
from minisvd.memory import ECONOMIES

QUICK: dict[str, Any] = {"steps": 4, "cut_step": 3, "num_frames": 2, "size": (64, 64), "progress": False}


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_one_graph_for_guided_steps_and_one_for_single_ones(tiny_folder: Path) -> None:
    """Counted by torch, with the feed-forwards in slices; the same frames to rounding. Control: uncut, it is one graph.
    That a step without slices is one graph, and that another size is another, is in test_vcut.py."""
    svd = minisvd.load(tiny_folder, vcut="lossless")
    fewer = {"block_out_channels": (32,), "attention": (True,), "num_attention_heads": (2,)}
    svd.unet = randomised(minisvd.SpatioTemporalUNet(replace(svd.unet.config, layers_per_block=1, **fewer)))
    svd.economise(ECONOMIES[1])
    image = torch.zeros(3, 64, 64)
    plain = svd(image, **QUICK).frames
    torch._dynamo.reset()
    counters.clear()
    einops_in_graphs(whole=False)
    functions: list[set[Any]] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        functions.append({node.target for node in graph.graph.nodes})
        return graph.forward

    svd.compile(backend=backend, fullgraph=True)
    before = graphs()
    uncut: dict[str, Any] = QUICK | {"cut_step": None}
    svd(image, **uncut)
    assert graphs() - before == 1  # control
    assert rearrange in functions[-1]  # whole, so that it need not be traced
    frames = svd(image, **QUICK).frames
    print(f"{graphs() - before} graphs, largest difference {(frames - plain).abs().max():.1e}")
    assert graphs() - before == 2
    assert (frames - plain).abs().max() <= 1e-4
    svd(image + 0.5, seed=1, **QUICK)
    assert graphs() - before == 2


def test_the_bar_says_that_a_step_compiles(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    svd, image = minisvd.load(tiny_folder), torch.zeros(3, 64, 64)
    svd(image, steps=1, num_frames=2, size=(64, 64))
    assert "compiles" not in capsys.readouterr().err  # control
    svd.unet.compile = lambda **_: None
    svd.compile(backend="eager")(image, steps=1, num_frames=2, size=(64, 64))
    assert "denoising, first step of a kind compiles" in capsys.readouterr().err


@pytest.mark.slow
def test_without_a_compiler_it_says_what_to_do(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    svd = minisvd.load(tiny_folder)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=r"torch.compile does not work on cpu: install a C\+\+ compiler"):
        svd.compile()
    torch._dynamo.reset()
    svd.compile(backend="eager")  # control
