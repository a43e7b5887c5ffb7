"""Theorem: the package reads as it is meant to: short files, one class to a name, one base to a class, no cycles.

Everything here is seen in the sources alone, but for the last test, which runs a copy of the model's three files.
"""

import ast
import graphlib
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minisvd"
SOURCES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.glob("*.py")}
COPIED = ("attention.py", "unet.py", "config.py")


def lines(*paths: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


@pytest.mark.parametrize(
    ("files", "most"),
    [
        (["minisvd/attention.py", "minisvd/unet.py"], 480),
        (["minisvd/cli.py"], 400),
        (["README.md"], 170),
        ([f"minisvd/{name}.py" for name in SOURCES], 5000),
    ],
    ids=["model", "cli", "README", "package"],
)
def test_files_are_short(files, most):
    found = lines(*(ROOT / file for file in files))
    print(f"{found} lines of at most {most}")
    assert found <= most


def classes(*modules: str) -> list[ast.ClassDef]:
    return [node for module in modules for node in ast.walk(SOURCES[module]) if isinstance(node, ast.ClassDef)]


def test_no_class_of_the_model_has_two_bases():
    found = classes("attention", "unet")
    assert len(found) > 15
    assert [node.name for node in found if len(node.bases) > 1] == []


def test_no_two_classes_of_the_package_have_one_name():
    counts = Counter(node.name for node in classes(*SOURCES))
    assert len(counts) > 40
    assert [name for name, times in counts.items() if times > 1] == []


def imports(module: str) -> set[str]:
    """The modules of the package that one imports as it is itself imported: not inside functions, not for types."""
    found: set[str] = set()
    for node in SOURCES[module].body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names if alias.name in SOURCES}
    return found


def test_imports_have_no_cycle_and_stay_inside():
    order = list(graphlib.TopologicalSorter({module: imports(module) for module in SOURCES}).static_order())
    print(" ".join(order))
    assert order.index("config") < order.index("attention") < order.index("unet") < order.index("pipeline")
    absolute = [node for tree in SOURCES.values() for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert [node.module for node in absolute if node.level == 0 and (node.module or "").startswith("minisvd")] == []
    with pytest.raises(graphlib.CycleError):  # control
        list(graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


RUN = """
import sys, torch
from {folder}.config import UNetConfig
from {folder}.unet import SpatioTemporalUNet

config = UNetConfig(block_out_channels=(32, 64), attention=(True, False), num_attention_heads=(2, 4))
unet = SpatioTemporalUNet(config, vcut="lossless")
out = unet(torch.randn(1, 2, 8, 4, 4), torch.tensor(0.5), torch.randn(1, 1, 1024), torch.tensor([[6, 127, 0.02]]))
print(tuple(out.shape), "minisvd" in sys.modules)
"""


@pytest.mark.slow
def test_the_model_runs_from_any_folder_that_its_three_files_are_copied_to(tmp_path):
    folder = tmp_path / "borrowed"
    folder.mkdir()
    for name in COPIED:
        shutil.copy(PACKAGE / name, folder / name)

    def run() -> subprocess.CompletedProcess:
        code = RUN.format(folder=folder.name)
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)

    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(1, 2, 4, 4, 4) False\n"
    (folder / "config.py").unlink()  # control
    assert run().returncode == 1
