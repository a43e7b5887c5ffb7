"""Theorem: what the README says to run runs, from a checkout, as it stands."""

import os
import re
import shlex
import shutil
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
    shutil.copytree(ROOT / "weights", tmp_path / "weights")
    return tmp_path


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PATH": path})


@pytest.mark.slow
def test_first_command_makes_a_video(checkout):
    """The half of it after the installation."""
    install, generate = blocks("sh")[0].strip().split(" && ")
    assert install == "pip install ."
    done = run(shlex.split(generate), checkout)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "clip.mp4\n"
    assert done.stderr == ""  # bars are for terminals, and the example is a picture that the model knows
    assert (checkout / "clip.mp4").read_bytes()[4:8] == b"ftyp"
    assert run(shlex.split(generate.replace("example", "missing")), checkout).returncode == 2  # control


@pytest.mark.slow
def test_python_block_runs(checkout):
    first, embedding, _quoted = blocks("python")
    done = run([sys.executable, "-c", first + embedding], checkout)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([8, 3, 64, 64]) 7.0" in done.stdout
    assert (checkout / "fast.gif").read_bytes()[:6] == b"GIF89a"
    assert (checkout / "folded/config.json").is_file()


FOLDERS = ("", "tools", "tools/teach", "weights", "weights/tiny", "weights/tiny-etc")
READMES = {ROOT / folder / "README.md" for folder in FOLDERS}
READMES |= {ROOT / "tools/embedding.md"}


def test_linked_files_exist():
    texts = {readme.parent: readme.read_text(encoding="utf-8") for readme in READMES}
    links = [(folder, link) for folder, text in texts.items() for link in re.findall(r"\]\(([^)]+)\)", text)]
    links = [folder / link for folder, link in links if not link.startswith("http")]
    assert len(links) >= 8
    assert [link for link in links if not link.exists()] == []


def test_quoted_block_is_the_code():
    *_run, quoted = blocks("python")
    source = (ROOT / "minisvd/attention.py").read_text(encoding="utf-8")
    first, body = quoted.split("\n", 1)
    assert first == "class BasicTransformerBlock(nn.Module):"
    assert "def forward" in body
    assert body in source[source.index(first) :]
    assert body.replace("norm2", "norm3") not in source  # control


def test_the_picture_of_the_u_is_what_the_command_draws(tmp_path):
    drawn = tmp_path / "tree.svg"
    done = run([sys.executable, "-m", "tools.cost.tree", "--out", str(drawn)], ROOT)
    assert done.returncode == 0, done.stderr
    assert drawn.read_text() == (ROOT / "tools/results/tree.svg").read_text()
    assert "1,524,623,082" in drawn.read_text()


def test_every_command_is_a_program_and_every_program_is_on_the_map():
    """The map is tools/README.md. `python tools/x.py` would be no command: the programs are run as modules."""
    programs = {path for path in TOOLS.rglob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in programs}
    named = {word for r in READMES for word in re.findall(r"python (?:-m )?(tools[./]\w[./\w]*)", r.read_text("utf-8"))}
    assert named == modules
    rows = re.findall(r"^\| `python -m ([.\w]+)", (TOOLS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(modules)
    assert TOOLS / "output.py" not in programs  # control
