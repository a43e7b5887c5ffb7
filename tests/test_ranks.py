"""Theorem: what torchrun's processes make together is what one makes alone, each video once; and one that is killed
takes none of those along that were finished.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import minisvd
from test_cli import FAST

pytestmark = pytest.mark.slow

SETTINGS = ["--seeds", "0-2", "--name-template", "{stem}-{seed}.gif", *FAST]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
TOGETHER = """
import os, signal, sys, time
from pathlib import Path
from minisvd import StableVideoDiffusion
from minisvd.__main__ import main

rank, world, call = os.environ["RANK"], int(os.environ["WORLD_SIZE"]), StableVideoDiffusion.__call__

def together(*args, **settings):  # the first video of each begins when all have one to begin
    Path(f"began-{rank}").touch()
    while len(list(Path().glob("began-*"))) < world:
        time.sleep(0.05)
    if Path("kill").exists() and rank == "1":
        while not list(Path("out").glob("*.gif")):  # until another has finished one
            time.sleep(0.05)
        Path("kill").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*args, **settings)

StableVideoDiffusion.__call__ = together
sys.exit(main())
"""


def prepare(folder: Path) -> None:
    """A folder of two pictures of noise, an empty one, and the program."""
    for name in ("photos", "out"):
        (folder / name).mkdir()
    generator = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / f"photos/{name}.png")
    (folder / "together.py").write_text(TOGETHER)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what one process makes, which is rank 0."""
    folder = tmp_path_factory.mktemp("alone")
    prepare(folder)
    done = run(tiny_folder, "out", "-m", "minisvd", folder=folder)
    assert done.returncode == 0, done.stderr
    assert set(ranks(folder / "out")) == {0}
    return folder / "out"


def run(tiny_folder: Path, out: str, *program: str, folder: Path | None = None) -> subprocess.CompletedProcess:
    argv = ["generate", "photos", "-o", out, "--model", str(tiny_folder), *SETTINGS]
    environment = os.environ | {"PYTHONPATH": str(Path(minisvd.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *program, *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=folder)


def videos(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.gif")}


def ranks(folder: str | Path) -> list[int]:
    return [json.loads(path.read_text())["rank"] for path in Path(folder).glob("*.json")]


def run_on_two_nodes(tiny_folder: Path) -> subprocess.CompletedProcess:
    """The same command on both, one with two processes, as tools/README.md has it. What both say, one after another."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["-m", "torch.distributed.run", "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    with ThreadPoolExecutor(2) as pool:
        both = list(
            pool.map(lambda n: run(tiny_folder, "out", *command, f"--nproc-per-node={n}", "together.py"), (1, 2))
        )
    words = "".join(done.stdout for done in both), "".join(done.stderr for done in both)
    return subprocess.CompletedProcess(command, max(done.returncode for done in both), *words)


def test_ranks_make_what_one_process_makes(tiny_folder: Path, alone: Path) -> None:
    """Three of them, on two nodes: bit for bit, every rank a part, no video twice; one summary, of all. Control: the
    one process is rank 0."""
    done = run_on_two_nodes(tiny_folder)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == sorted(f"out/{name}" for name in videos(alone))
    assert videos("out") == videos(alone)
    assert set(ranks("out")) == {0, 1, 2}
    assert done.stderr.count("minisvd: ") == 1
    assert "minisvd: of 6 videos 6 made" in done.stderr


def test_ranks_make_what_is_missing_and_say_what_cannot_be_made(tiny_folder: Path, alone: Path) -> None:
    """Of what one process has made; the rest is skipped. A bad image: status 1."""
    shutil.copytree(alone, "out", dirs_exist_ok=True)
    Path("out/a-1.gif").unlink()
    Path("photos/c.png").write_text("no image")
    done = run(tiny_folder, "out", *TORCHRUN, "2", "-m", "minisvd")
    assert done.returncode == 1
    assert done.stdout == "out/a-1.gif\n"
    assert "minisvd: of 9 videos 3 failed, 1 made, 5 skipped, finished with the same settings" in done.stderr
    assert videos("out") == videos(alone)


@pytest.mark.posix
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_rank_that_dies_loses_nothing_that_was_finished(tiny_folder: Path, alone: Path, restarts: int) -> None:
    """Killed with a job in hand: what others finished stays, whole, and a rerun makes the rest; with --max-restarts 1
    torchrun does that by itself.
    """
    Path("kill").touch()
    done = run(tiny_folder, "out", *TORCHRUN, "2", f"--max-restarts={restarts}", "together.py")
    assert not Path("kill").exists()
    assert (done.returncode == 0) == bool(restarts), done.stderr
    kept = len(videos("out"))
    if not restarts:
        assert 1 <= kept < 6
        done = run(tiny_folder, "out", "-m", "minisvd")
        assert done.returncode == 0
        assert f"{kept} skipped, finished with the same settings" in done.stderr
        assert len(done.stdout.split()) == 6 - kept
    assert "skipped, finished with the same settings" in done.stderr
    assert videos("out") == videos(alone)
    assert sorted(path.suffix for path in Path("out").iterdir()) == [".gif"] * 6 + [".json"] * 6


def test_a_plan_is_larger_than_what_the_store_takes_at_once() -> None:
    """10,000 videos of long names are over 8 MB of JSON, which the store refuses at once. All are skipped."""
    name = "a" * 220
    Path("photos/a.png").rename(f"{name}.png")
    for seed in range(10_000):
        Path(f"out/{name}-{seed}.gif").write_bytes(b"a video")
    argv = ["generate", f"{name}.png", "-o", "out", "--seeds", "0-9999", "--name-template", "{stem}-{seed}.gif"]
    command = [sys.executable, *TORCHRUN, "1", "-m", "minisvd", *argv, "--skip-existing"]
    environment = os.environ | {"PYTHONPATH": str(Path(minisvd.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "minisvd: of 10000 videos 10000 skipped, which exist" in done.stderr
