"""Many videos, by one process or by many: batches have numbers, and whoever is free takes the next.

The numbers are a counter in torch.distributed's store, which torchrun keeps; a process alone has a store of its own. A
rank that dies takes nothing finished along; a rerun, which torchrun --max-restarts begins by itself, makes the rest.
"""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import HashStore, PrefixStore, Store, is_torchelastic_launched
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from .cli import sentence, tell
from .images import load_image, open_image
from .jobs import Job, digest, is_ours, state
from .memory import settle
from .pipeline import FAMILIAR, PER_IMAGE, StableVideoDiffusion
from .video import check_output, is_written, replacing

Model = Callable[[], StableVideoDiffusion]  # loads it, when it is first needed
STRANGE = "is not what the small model knows, one shape on a plain ground: take --model svd-xt, the official weights"


def join() -> tuple[Store, int]:
    """The store of this run, and the rank of this process in it."""
    if not is_torchelastic_launched():
        return HashStore(), 0
    store, rank, _ = next(rendezvous("env://"))  # which outlives a restart, after which counting begins anew
    return PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store), rank


def work(args: Namespace, store: Store, rank: int, model: Model, about: dict[str, Any]) -> list[Job]:
    """Make what is planned until nothing is left, and say the path of each video on stdout. Returns the jobs with what
    they came to, `state` and `seconds` or `error`, on rank 0, which waits for the others; elsewhere nothing. What a
    user has got wrong fails one job; a bug, or any error with --fail-fast or in the only job, ends the run. One bar
    shows the progress of several videos; of a single one, one the steps and one the decoding. Records hold `about`."""
    while not store.check(["plan"]):
        time.sleep(0.1)  # and not inside the store, where no signal is heard
    batches, total, about["made"] = json.loads(store.get("plan"))
    shown = rank == 0 and not args.json and sys.stderr.isatty()
    with tqdm(total=total, desc="videos", unit="video", disable=total == 1 or not shown) as bar:

        def attempt(jobs: list[Job]) -> None:
            try:
                make(jobs, args, store, model, about, bar, progress=shown and total == 1)
            except Exception as error:
                if total == 1 or args.fail_fast or not (why := sentence(error)):
                    raise
                for job in jobs if jobs[1:] else []:
                    attempt([job])
                if not jobs[1:]:
                    jobs[0] |= {"state": "failed", "error": why}
                    tell(f"minisvd: error: {jobs[0]['path']} is not made: {why}")

        while (number := store.add("taken", 1) - 1) < batches:
            jobs = json.loads(store.get(f"batch {number}"))
            attempt(jobs)
            store.set(f"batch {number}", json.dumps(jobs))
            bar.update(store.add("ended", len(jobs)) - bar.n)
            with bar.external_write_mode():
                for path in [job["path"] for job in jobs if "seconds" in job and not args.json]:
                    print(path, flush=True)
        while rank == 0 and (done := store.add("ended", 0)) < total:
            bar.update(done - bar.n)
            time.sleep(0.1)
        bar.update(total - bar.n)
    return [job for number in range(batches * (rank == 0)) for job in json.loads(store.get(f"batch {number}"))]


def make(jobs: list[Job], args: Namespace, store: Store, model: Model, about: dict, bar: tqdm, progress: bool) -> None:
    """Make of a batch what is not there, as one call, and write it with its records, each file whole or not at all.
    Raises what any job of it raises; what was written before that has its `seconds`."""
    ready = []
    for job in jobs:
        path, settings = Path(job["path"]), job["settings"]
        if args.skip_existing and is_written(path):
            job["state"] = job.get("state", "skipped, which exist")
        elif "seconds" not in job:
            picture = open_image(job["image"])
            used = settings | about["made"] | {"image": digest(Path(job["image"]))}
            del used["decode_chunk"]  # which decides nothing
            job["state"] = "made" if args.no_sidecar else state(path, used)
            if not job["state"].startswith("skipped"):
                check_output(path, is_ours(path))
                ready.append((job, used, load_image(picture, settings["size"], settings["fit"])))
    if not ready:
        return
    svd, began, name = model(), time.perf_counter(), ready[0][0]["path"]
    strange = [job["image"] for job, _, image in ready if svd.ships and svd.familiarity(image) < FAMILIAR]
    if strange and store.add("strange", 1) == 1:
        tell(f"minisvd: {strange[0]} {STRANGE}")
    line = "" if args.low_memory else settle(svd, ready[0][0]["settings"], len(ready))
    if line and store.add(line, 1) == 1:
        tell(f"minisvd: {line}")
    settings = ready[0][0]["settings"] | {name: [used[name] for _, used, _ in ready] for name in PER_IMAGE}
    zoom, show = settings.pop("zoom"), lambda step, *_: bar.set_postfix_str(f"step {step}, {name}")
    videos = svd(torch.cat([image for *_, image in ready]), callback=show, progress=progress, **settings)
    compute = (time.perf_counter() - began) / len(ready)
    for (job, used, _), video in zip(ready, videos, strict=True):
        path, began = Path(job["path"]), time.perf_counter()
        with replacing(path) as whole:  # once there is its record, which no folder of ours ever lacks
            video.enlarged(zoom).save(whole)
            seconds, ours = {"compute": compute, "write": time.perf_counter() - began}, is_ours(path)
            if not args.no_sidecar:
                record = about | {"image": job["image"], "made": used, "video_sha256": digest(whole)}
                with replacing(Path(f"{path}.json")) as part:
                    record |= {"batch": len(ready), "seconds": seconds}
                    part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            if ours:
                path.rename(whole.with_name(f"old-{whole.name}"))
        job["memory"] = svd.economy.name
        job["seconds"] = round(sum(seconds.values()), 3)
