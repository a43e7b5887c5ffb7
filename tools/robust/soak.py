"""Many tiny jobs over several processes that are killed, and whose disk fills up, until all are done.

    python -m tools.robust.soak --jobs 2000 --processes 3

Processes are ranks of one run of `minisvd generate`, as torchrun starts them: they share a store, and when one dies the
others are ended and all begin again. A round ends when a rank, or all of them, are ended by SIGKILL, at a random time
within --every seconds; in some, a rank may write no file beyond a random size, as on a full disk. The last round has no
fault, and makes what is left. Model and images are random numbers. The last line on stdout is JSON:

    done      videos that are there, whole, with a record, of those asked for
    lost      that were said to be made and are not there
    doubled   that were said to be made twice
    broken    that are not what their record says, cannot be decoded, or are not what one undisturbed process makes
    growth    of a process's memory: its median in the last quarter of its life over that in the second, less 1, in the
              longest of all lives
    hidden    unfinished files that SIGKILL left, by hidden names; harmless
    seconds, rounds, kills, full
"""

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.distributed import TCPStore

import minisvd.__main__
from minisvd import AutoencoderKLTemporalDecoder, GenerationConfig, ImageEncoder, SpatioTemporalUNet
from minisvd.config import ClipConfig, UNetConfig, VAEConfig
from minisvd.jobs import digest, read_record
from minisvd.save import save_folder

UNET = UNetConfig(
    block_out_channels=(32,), attention=(True,), num_attention_heads=(1,), layers_per_block=1, cross_attention_dim=8,
    addition_time_embed_dim=8,
)  # fmt: skip
VAE = VAEConfig(block_out_channels=(32, 32))
CLIP = ClipConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, patch_size=16, image_size=32,
    projection_dim=8,
)  # fmt: skip
GENERATION = GenerationConfig(num_frames=2, steps=1, size=(16, 16))
SAMPLED = 20  # videos that are made once more by an undisturbed process
ENDS = (0, 1, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)  # of a rank that met no bug
EACH = 0.05  # seconds between looks at the ranks


def write_model(folder: Path) -> None:
    """A model of random numbers, as small as one can be: 0.1 seconds a video."""
    torch.manual_seed(0)
    save_folder(folder, SpatioTemporalUNet(UNET), AutoencoderKLTemporalDecoder(VAE), ImageEncoder(CLIP), GENERATION)


def write_jobs(folder: Path, jobs: int) -> None:
    """Ten images of noise, and a manifest of a row a job, each with its own seed."""
    pixels = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(pixels.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    rows = ({"image": f"{i % 10}.png", "name": f"{i:05}.gif", "seed": i} for i in range(jobs))
    (folder / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def start(folder: Path, out: str, said: int, environment: dict[str, str], limit: int | None) -> int:
    """A rank as a fork of this process, which has imported all that it needs; `said` is its stdout. Returns its id."""
    sys.stdout.flush()
    if process := os.fork():
        return process
    os.dup2(said, 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (not the parent's, which may be a file)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.environ.update(environment)
    if limit is not None:  # Python ignores the signal, so that a write fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["minisvd", "generate", "--manifest", f"{folder}/jobs.jsonl", "-o", f"{folder}/{out}"]
    sys.argv += ["--model", f"{folder}/model", "--device", "cpu"]
    status = 70
    try:
        status = minisvd.__main__.main()
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else 70
    finally:
        os._exit(status)


def memory(process: int) -> float:
    """Resident megabytes, or 0 of one that has ended."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * resource.getpagesize() / 2**20


def growth(samples: list[float]) -> float:
    quarter = len(samples) // 4
    return statistics.median(samples[-quarter:]) / statistics.median(samples[quarter : 2 * quarter]) - 1


def run_round(ranks: list[int], fault: float | None, victims: list[int], lives: list[list[float]]) -> None:
    """Until all ranks end: `victims` are killed after `fault` seconds; when one has died, the others are ended too."""
    began, alive, samples = time.monotonic(), set(ranks), {rank: [] for rank in ranks}
    while alive:
        time.sleep(EACH)
        for process in list(alive):
            samples[process].append(memory(process))
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                alive.discard(process)
                if (code := os.waitstatus_to_exitcode(status)) not in ENDS:
                    raise RuntimeError(f"a rank ended with status {code}: run the same by hand to see why")
                if code not in (0, 1):
                    for other in alive:
                        os.kill(other, signal.SIGTERM)
        if fault is not None and time.monotonic() - began > fault:
            fault = None
            for victim in set(victims) & alive:
                os.kill(victim, signal.SIGKILL)
    lives += [[size for size in life if size] for life in samples.values()]


def soak(folder: Path, jobs: int, processes: int, seed: int, every: float, longest: float) -> dict[str, Any]:
    """See the top of this file. The round that is running after `longest` seconds is the last but one."""
    began, dice = time.monotonic(), random.Random(seed)
    torch.set_num_threads(1)
    write_model(folder / "model")
    write_jobs(folder, jobs)
    for name in ("out", "alone"):
        (folder / name).mkdir()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    said, lives, counts, rounds = Counter(), [], Counter(), 0
    last = False
    while True:
        kind = "none" if last else dice.choices(["kill", "kill all", "full"], [6, 2, 3])[0]
        full = dice.randrange(processes) if kind == "full" else None
        ranks = []
        for rank in range(processes):
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
            environment |= {"TORCHELASTIC_RUN_ID": "soak", "TORCHELASTIC_USE_AGENT_STORE": "True"}
            environment |= {"TORCHELASTIC_RESTART_COUNT": str(rounds)}
            limit = dice.randrange(2000) if rank == full else None
            ranks.append(start(folder, "out", writer, environment, limit))
        killed = ranks if kind == "kill all" else [dice.choice(ranks)]
        run_round(ranks, None if last else dice.uniform(0, every), killed, lives)
        rounds += 1
        counts[kind] += 1
        with contextlib.suppress(BlockingIOError):  # nothing was said
            said.update(os.read(reader, 2**20).decode().split())
        videos = [folder / f"out/{i:05}.gif" for i in range(jobs)]
        done = sum(bool(read_record(video)) and video.is_file() for video in videos)
        print(f"round {rounds}: {kind}, {done} of {jobs} done after {time.monotonic() - began:.0f} s", file=sys.stderr)
        if last:
            break
        last = done == jobs or time.monotonic() - began > longest

    some = sorted(dice.sample(range(jobs), min(SAMPLED, jobs)))
    rows = (folder / "jobs.jsonl").read_text().splitlines(keepends=True)
    (folder / "jobs.jsonl").write_text("".join(rows[i] for i in some))
    run_round([start(folder, "alone", os.open(os.devnull, os.O_WRONLY), {}, None)], None, [], [])
    whole = {video.name for video in videos if is_whole(video)}
    there = {video.name for video in videos if video.is_file()}
    other = {name for i in some if (name := f"{i:05}.gif") in there and not same(folder, name)}
    grown = [growth(life) for life in sorted(lives, key=len)[-1:] if len(life) >= 20]
    return {
        "jobs": jobs,
        "done": len(whole - other),
        "lost": sum(Path(path).name not in there for path in said),
        "doubled": sum(times > 1 for times in said.values()),
        "broken": len({video.name for video in videos if video.is_file() and read_record(video)} - whole | other),
        "growth": round(max(grown, default=0.0), 4),
        "hidden": sum(path.name.startswith(".") for path in (folder / "out").iterdir()),
        "rounds": rounds,
        "kills": counts["kill"] + counts["full"] + counts["kill all"] * processes,
        "full": counts["full"],
        "seconds": round(time.monotonic() - began, 1),
    }


def is_whole(video: Path) -> bool:
    """Are there a record, the bytes that it speaks of, and every frame?"""
    record = read_record(video)
    if not record or not video.is_file() or record["video_sha256"] != digest(video):
        return False
    with Image.open(video) as frames:
        for i in range(GENERATION.num_frames):
            frames.seek(i)
            frames.load()
    return True


def same(folder: Path, name: str) -> bool:
    return (folder / "out" / name).read_bytes() == (folder / "alone" / name).read_bytes()


def main() -> None:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--jobs", type=int, default=2000, metavar="N", help="videos to make (default: 2000)")
    parser.add_argument("--processes", type=int, default=3, metavar="N", help="ranks that make them (default: 3)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the faults (default: 0)")
    parser.add_argument("--every", type=float, default=30, metavar="S", help="seconds to a kill at most (default: 30)")
    parser.add_argument("--longest", type=float, default=3600, metavar="S", help="seconds, then one last round")
    args = parser.parse_args()
    if args.jobs < 1 or args.processes < 1:
        parser.error("--jobs and --processes are at least 1")
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        result = soak(Path(folder), args.jobs, args.processes, args.seed, args.every, args.longest)
    print(json.dumps(result))
    sys.exit(int(any(result[name] for name in ("lost", "doubled", "broken")) or result["done"] < args.jobs))


if __name__ == "__main__":
    main()
