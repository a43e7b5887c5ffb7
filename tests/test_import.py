"""Theorem: importing minisvd does no work: it loads no framework, prints nothing, and costs little over torch."""

import ast
import inspect
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minisvd
from minisvd.pipeline import Settings, StableVideoDiffusion

HEAVY = ("diffusers", "transformers", "open_clip", "torchvision", "huggingface_hub")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.slow
def test_import_loads_nothing_heavy():
    """Bare import: not even torch. With every public name: torch, but none of the heavy libraries."""
    assert run("import minisvd, sys; print('torch' in sys.modules)") == "False"
    everything = "import minisvd, sys; [getattr(minisvd, name) for name in minisvd.HOME];"
    probed = (*HEAVY, "torch")  # the last a control: the probe can see a module
    assert run(f"{everything} print([m for m in {probed} if m in sys.modules])") == "['torch']"


@pytest.mark.slow
def test_every_public_name_costs_a_quarter_of_torch_at_most():
    """In processor time of one process, so that it holds on slow machines, too."""
    code = (
        "import time; start = time.process_time(); import torch; torch_s = time.process_time() - start; import minisvd;"
        "[getattr(minisvd, name) for name in minisvd.HOME]; print((time.process_time() - start) / torch_s - 1)"
    )
    shares = [float(run(code))]
    while shares[-1] > 0.25 and len(shares) < 3:  # the least of three, if the first is not enough
        shares.append(float(run(code)))
    print(*(f"{each:.2f}" for each in shares), "of what torch costs")
    assert 0 < shares[-1] <= 0.25


def test_help_and_version_do_not_import_torch():
    code = "import sys, contextlib\nfrom minisvd.cli import main\n"
    code += "with contextlib.suppress(SystemExit):\n    main(['--version'])\nprint('torch' in sys.modules)"
    assert run(code).splitlines()[-1] == "False"


def test_public_names_exist_and_others_do_not():
    assert set(minisvd.HOME) <= set(dir(minisvd))
    assert minisvd.Video.__name__ == "Video"
    assert not hasattr(minisvd, "no_such_name")


TYPED = """
from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from PIL import Image

import minisvd
from minisvd import SpatioTemporalUNet, StableVideoDiffusion, UNetConfig, Video

svd = minisvd.load("tiny")
assert_type(svd, StableVideoDiffusion)
assert_type(svd("photo.png", seed=0), Video)
assert_type(svd(Path("photo.png"), steps=3), Video)
assert_type(svd(Image.new("RGB", (64, 64))), Video)
assert_type(svd(["photo.png", "other.png"], progress=False), list[Video])
unet = SpatioTemporalUNet(UNetConfig(), vcut="lossless")
assert_type(unet(torch.zeros(1, 2, 8, 8, 8), torch.zeros(1), torch.zeros(1, 1, 1024), torch.zeros(1, 3)), torch.Tensor)
"""


def files_with_errors(folder: Path) -> set[str]:
    """Among those of a folder, in one run of pyright, which reads torch once."""
    names = sorted(path.name for path in folder.glob("*.py"))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--pythonversion", "3.11", *names]
    done = subprocess.run([*command, "--outputjson"], cwd=folder, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == len(names)
    return {Path(found["file"]).name for found in report["generalDiagnostics"] if found["severity"] == "error"}


@pytest.mark.slow
def test_an_editor_knows_what_a_call_returns(tmp_path: Path) -> None:
    (tmp_path / "typed.py").write_text(TYPED)
    wrongs = "svd('a.png', steps='3')", "svd('a.png', stage2='half')", "svd('a.png')[0]"  # controls
    for i, wrong in enumerate(wrongs):
        (tmp_path / f"wrong{i}.py").write_text(f"import minisvd\n\nsvd = minisvd.load('tiny')\n{wrong}\n")
    assert files_with_errors(tmp_path) == {f"wrong{i}.py" for i in range(len(wrongs))}


def test_the_keywords_that_an_editor_knows_are_those_of_the_call() -> None:
    keywords = {
        name: parameter.annotation
        for name, parameter in inspect.signature(StableVideoDiffusion.__call__).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert {name: hint.__forward_arg__ for name, hint in Settings.__annotations__.items()} == keywords


SAYS = {"cli", "__main__", "ranks"}  # the modules of the command line, which may write on stdout and stderr


def test_the_library_prints_nothing_and_logs_what_it_loads(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """No `print` and no handler but in the command line's modules; a loaded model is a record of level INFO."""
    package = Path(minisvd.__file__).parent
    prints = {
        path.stem
        for path in package.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and node.id == "print"
    }
    assert prints == SAYS
    assert not logging.getLogger("minisvd").handlers
    with caplog.at_level(logging.INFO, "minisvd"):
        svd = minisvd.load("tiny")
        svd(torch.zeros(3, 64, 64), steps=1, num_frames=1, progress=False)
    assert [record.name for record in caplog.records] == ["minisvd.pipeline"]
    assert "weights/tiny, a folder, on cpu in torch.float32" in caplog.text
    assert capsys.readouterr() == ("", "")


BESIDE = """
import logging, sys, warnings

def state():
    import torch
    return (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.initial_seed(),
        warnings.filters[:], logging.getLogger().handlers[:], torch.backends.cuda.matmul.allow_tf32, sys.path[:])

import diffusers
from diffusers import UNetSpatioTemporalConditionModel as theirs
forward, seen = theirs.forward, state()
import minisvd, minisvd.diffusers
[getattr(minisvd, name) for name in minisvd.HOME]
from minisvd import StableVideoDiffusion
assert diffusers.UNetSpatioTemporalConditionModel is theirs and theirs.forward is forward
assert minisvd.diffusers.UNetSpatioTemporalConditionModel is not theirs
print(state() == seen)
warnings.simplefilter("error")
print(state() == seen)
"""


@pytest.mark.slow
def test_importing_beside_diffusers_changes_nothing_of_it_nor_of_torch() -> None:
    """Its classes and torch's, Python's and the log's settings are what they were. Control: the probe sees a filter."""
    assert run(BESIDE).splitlines()[-2:] == ["True", "False"]
