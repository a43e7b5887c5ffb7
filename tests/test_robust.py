"""Theorem: files as nobody should write them are read or refused in one sentence; and of many jobs over processes that
are killed and run out of disk, none is lost, none is made twice, and none is broken.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tools.robust import fuzz, soak

KINDS = fuzz.kinds()
ROOT = Path(__file__).parents[1]


@pytest.mark.linux
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KINDS))
def test_files_are_read_or_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    """100 of each kind, of which some are read. `python -m tools.robust.fuzz` tries more."""
    result = fuzz.fuzz(name, KINDS[name], 100, seed=1, cases=tmp_path)
    print(name, result)
    assert result["crash"] is None
    assert 0 < result["read"] < result["examples"]


@pytest.mark.linux
@pytest.mark.parametrize("case", sorted(fuzz.CASES.iterdir()), ids=lambda path: path.name)
def test_what_crashed_once_does_not_again(case: Path) -> None:
    fuzz.try_file(KINDS[case.name.partition("-")[0]], case.read_bytes())


@pytest.mark.linux
def test_the_fuzzer_finds_and_keeps_what_crashes(tmp_path: Path) -> None:
    """Control: a reader that fails at a byte, one that says nothing, and one that takes far more than its file."""

    def fails(path: Path) -> None:
        if b"7" in path.read_bytes():
            raise IndexError("seven")

    def greedy(path: Path) -> None:
        path.write_bytes(bytes(1))
        bytearray(700 * 2**20)

    for read, says in ((fails, "IndexError: seven"), (greedy, "MB for a file"), (silent, "is no sentence")):
        kind = KINDS["generation"]._replace(read=read)
        result = fuzz.fuzz("generation", kind, 60, seed=0, cases=tmp_path)
        assert says in result["crash"]
        kept = Path(result["crash"].partition(": ")[0])
        assert len(kept.read_bytes()) < 400


def silent(_: Path) -> None:
    raise ValueError


@pytest.mark.linux
@pytest.mark.slow
def test_what_is_made_under_kills_and_full_disks_is_whole_and_made_once() -> None:
    """40 jobs over three processes, in its own process, which forks; `python -m tools.robust.soak` has 2,000."""
    command = [sys.executable, "-m", "tools.robust.soak", "--jobs", "40", "--every", "8", "--longest", "10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(result)
    assert (result["done"], result["lost"], result["doubled"], result["broken"]) == (40, 0, 0, 0)
    assert result["kills"] + result["full"] > 0


@pytest.mark.linux
def test_the_soak_tool_sees_a_video_that_is_not_whole() -> None:
    """Control: without its record, of other bytes than it says, or cut."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder, "a.gif")
        frames = [Image.new("L", (8, 8), i * 99) for i in range(2)]
        frames[0].save(video, save_all=True, append_images=frames[1:])
        record = Path(folder, "a.gif.json")
        assert not soak.is_whole(video)
        record.write_text(json.dumps({"made": {}, "video_sha256": soak.digest(video)}))
        assert soak.is_whole(video)
        video.write_bytes(video.read_bytes() + b"x")
        assert not soak.is_whole(video)
    assert soak.growth([1.0] * 40) == 0
    assert soak.growth([float(i) for i in range(40)]) > 1


ENDED = """
import os, signal, sys, time
import torch
import minisvd.__main__, minisvd.cli
from minisvd import video

def write(*_):
    if sys.argv[1] == "default":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

video.WRITERS[".gif"] = write
minisvd.cli.main = lambda: minisvd.Video(torch.zeros(1, 3, 8, 8), 7).save("clip.gif")
sys.exit(minisvd.__main__.main())
"""


@pytest.mark.posix
@pytest.mark.slow
@pytest.mark.parametrize(("handler", "status", "left"), [("ours", 143, 0), ("default", -signal.SIGTERM, 1)])
def test_what_is_ended_by_sigterm_leaves_nothing(tmp_path: Path, handler: str, status: int, left: int) -> None:
    """While it writes a video. Control: with the system's own handler its hidden folder stays."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ENDED, handler], cwd=tmp_path, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (status, b"")
    assert len(os.listdir(tmp_path)) == left
