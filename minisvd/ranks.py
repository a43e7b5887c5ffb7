"""Many videos, by one process or by many: jobs have numbers, and whoever is free takes the next.

The numbers are a counter in torch.distributed's store, which torchrun keeps; a process that is alone has a store of its
own. Each rank writes its videos whole and tells the store; one that dies takes none of them along, and a rerun, which
torchrun --max-restarts begins by itself, makes what is not finished.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed import HashStore, PrefixStore, Store, is_torchelastic_launched
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from .jobs import Job, digest, write_record
from .video import check_output

if TYPE_CHECKING:
    from .pipeline import StableVideoDiffusion

POLL = 0.1  # seconds between looks at what the others do


def join() -> tuple[Store, bool]:
    """The store of this run, and whether this process is the first of it."""
    if not is_torchelastic_launched():
        return HashStore(), True
    store, rank, _ = next(rendezvous("env://"))  # which outlives a restart, after which counting begins anew
    return PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store), rank == 0


def publish(store: Store, jobs: list[Job]) -> None:
    """Say what there is to do, on the first rank."""
    for number, job in enumerate(jobs):
        store.set(f"job {number}", json.dumps(job))
    store.set("jobs", str(len(jobs)))


def work(
    store: Store,
    model: Callable[[], StableVideoDiffusion],
    explain: Callable[[Exception], str],
    tell: Callable[[str], None],
    about: dict[str, Any] | None,
    *,
    first: bool,
    say: bool,
    fail_fast: bool,
) -> list[dict[str, Any]]:
    """Make what is published until nothing is left, and `say` the path of each video on stdout. Returns what each job
    came to, on the first rank, which waits for the others; elsewhere nothing.

    `explain` says in a sentence what a user has got wrong: that fails one job; a bug, or any error with `fail_fast` or
    in the only job, ends the run. Records hold `about` besides; None: there are none. One bar shows the progress of
    several videos; of a single one, a bar for the steps and another for decoding; if `say`, and stderr is a terminal.
    """
    while not store.check(["jobs"]):
        time.sleep(POLL)  # and not inside the store, where no signal is heard
    total = int(store.get("jobs"))
    shown, single = first and say and sys.stderr.isatty(), total == 1
    with tqdm(total=total, desc="videos", unit="video", disable=single or not shown) as bar:
        while (number := store.add("taken", 1) - 1) < total:
            job, svd = Job(*json.loads(store.get(f"job {number}"))), model()
            result = {"image": job.image, "seed": job.seed, "path": job.path}
            try:
                result |= {"seconds": make(svd, job, about, bar, single and shown)}
            except Exception as error:
                if single or fail_fast or not (why := explain(error)):
                    raise
                result |= {"error": why}
                tell(f"minisvd: error: {job.path} is not made: {why}")
            store.set(f"result {number}", json.dumps(result))
            bar.update(store.add("results", 1) - bar.n)
            if say and "error" not in result:
                with bar.external_write_mode():
                    print(job.path, flush=True)
        while first and (done := store.add("results", 0)) < total:
            bar.update(done - bar.n)
            time.sleep(POLL)
        bar.update(total - bar.n)
    return [json.loads(store.get(f"result {number}")) for number in range(total)] if first else []


def make(svd: StableVideoDiffusion, job: Job, about: dict[str, Any] | None, bar: tqdm, progress: bool) -> float:
    """One video and its record. Returns the seconds, and raises what the call and `Video.save` raise."""
    path, began, settings = check_output(job.path), time.perf_counter(), job.settings
    steps = len(settings["sigmas"]) - 1 if settings["sigmas"] else settings["steps"]

    def show(step: int, *_: object) -> None:
        bar.set_postfix_str(f"step {step} of {steps}, seed {job.seed}, {Path(job.image).name}")

    zoom = settings.pop("zoom")
    video = svd(job.image, seed=job.seed, callback=show, progress=progress, **settings)
    computed = time.perf_counter()
    video.enlarged(zoom).save(path)
    ended = time.perf_counter()
    if about is not None:
        seconds = {"compute": round(computed - began, 3), "write": round(ended - computed, 3)}
        made = {"image": job.image, "made": job.made, "video_sha256": digest(path)}
        write_record(path, made | about | {"seconds": seconds})
    return round(ended - began, 3)
