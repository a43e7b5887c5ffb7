"""Theorem: what tools/embedding.md says to run runs, from a checkout, in the order in which it stands there."""

import inspect
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from onnxruntime import InferenceSession

import minisvd
from conftest import relative_error
from minisvd import SpatioTemporalUNet, UNetConfig

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "tools/embedding.md").read_text(encoding="utf-8")
FEWER = (
    ("--count 200", "--count 4"),
    ("--count 50", "--count 2"),
    ("--steps 200", "--steps 1"),
    ("--batch 12", "--batch 2"),
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("weights", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shallow(config: UNetConfig) -> SpatioTemporalUNet:
    """Random, of the two outermost levels, with a transformer between them alone."""
    torch.manual_seed(0)
    widths, heads = config.block_out_channels[:2], config.num_attention_heads[:2]
    two = replace(config, block_out_channels=widths, num_attention_heads=heads, attention=(False, False))
    return SpatioTemporalUNet(two)


@pytest.mark.slow
def test_python_blocks_run(checkout):
    """And the ONNX file that they write holds for another batch, number of frames and size: of two levels and one
    transformer here, as all of the shipped network take minutes."""
    code, folds = "\n".join(blocks("python")), "torch.onnx.export(folded,"
    assert folds in code
    code = code.replace(folds, "torch.onnx.export(shallow(folded.config),")
    names = "from dataclasses import replace\nfrom minisvd import SpatioTemporalUNet, UNetConfig\nimport torch"
    said = run([sys.executable, "-c", f"{names}\n{inspect.getsource(shallow)}\n{code}"], checkout).splitlines()
    video = "torch.Size([2, 8, 4, 16, 16])"
    fine = [
        f"{video} {video}",
        "tensor(True)",
        video,
        f"{video} lossless",
        "8 96 torch.float32",
        "torch.bfloat16",
        video,
    ]
    assert [line for line in said if not line.startswith("[torch.onnx]")] == [*fine, f"{video} {video} 56"]
    folded = minisvd.load_unet(checkout / "folded")
    assert minisvd.load_unet(checkout / "dropped-in").config.vcut == folded.config.vcut == "lossless"

    session = InferenceSession(checkout / "unet.onnx")
    given = torch.randn(3, 5, 8, 8, 12), torch.randn(3), torch.randn(3, 1, 128), torch.tensor([[6, 90, 0.1]] * 3)
    named = {value.name: x.numpy() for value, x in zip(session.get_inputs(), given, strict=True)}
    (out,) = session.run(None, named)
    with torch.no_grad():
        assert relative_error(torch.from_numpy(out), shallow(folded.config)(*given)) <= 1e-5


@pytest.mark.slow
def test_commands_run(checkout):
    """With fewer clips and steps than the page has."""
    (commands,) = blocks("sh")
    for full, fewer in FEWER:
        assert full in commands
        commands = commands.replace(full, fewer)
    said = run(["sh", "-ec", commands], checkout).splitlines()
    assert said[-1] == "arc.mp4"
    assert said[-2].startswith("2 unseen arcs: the shape ends ")
    assert minisvd.load(checkout / "runs/arcs/model").unet.config == minisvd.load("tiny").unet.config
