"""Theorem: what the README says to run runs, from a checkout, as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like the checkout to a command that reads `weights/`, and may be written to."""
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    return tmp_path


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PATH": path})


def test_first_command_makes_a_video(checkout):
    """The half of it after the installation."""
    install, generate = blocks("sh")[0].strip().split(" && ")
    assert install == "pip install ."
    done = run(["sh", "-c", generate], checkout)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "clip.mp4\n"
    assert "denoising" in done.stderr
    assert (checkout / "clip.mp4").read_bytes()[4:8] == b"ftyp"
    assert run(["sh", "-c", generate.replace("example", "missing")], checkout).returncode == 2  # control


def test_python_block_runs(checkout):
    (block,) = blocks("python")
    done = run([sys.executable, "-c", block], checkout)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([8, 3, 64, 64]) 7.0" in done.stdout
    assert (checkout / "fast.gif").read_bytes()[:6] == b"GIF89a"


def test_linked_files_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) >= 8
    missing = [link for link in links if not (ROOT / link).exists()]
    assert missing == []
