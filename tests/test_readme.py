"""Theorem: what the README says to run runs, from a checkout, as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOOLS = ROOT / "tools"


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


READMES = {ROOT / folder / "README.md" for folder in ("", "tools", "weights", "weights/tiny")}


def test_linked_files_exist():
    texts = {readme.parent: readme.read_text(encoding="utf-8") for readme in READMES}
    links = [(folder, link) for folder, text in texts.items() for link in re.findall(r"\]\(([^)]+)\)", text)]
    links = [folder / link for folder, link in links if not link.startswith("http")]
    assert len(links) >= 8
    assert [link for link in links if not link.exists()] == []


def test_every_command_is_a_program_and_every_program_is_on_the_map():
    """The map is tools/README.md. `python tools/x.py` would be no command: the programs are run as modules."""
    programs = {path for path in TOOLS.rglob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in programs}
    named = {word for r in READMES for word in re.findall(r"python (?:-m )?(tools[./]\w[./\w]*)", r.read_text("utf-8"))}
    assert named == modules
    rows = re.findall(r"^\| `python -m ([.\w]+)", (TOOLS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(modules)
    assert TOOLS / "output.py" not in programs  # control
