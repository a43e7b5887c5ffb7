"""What tools/study/run.py found, as numbers: each measure with its interval, each difference with its p, the frontier.

A row is one video: its `scene`, `noise`, `arm` and measures, None where there was nothing to measure. An entry is one
arm of one family of study.json. Intervals hold 95 % and are clustered by scene; a difference is that of an arm from the
first of its family, scene by scene and noise by noise.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.measure.metrics import clustered, clustered_share, holm, paired_difference, smallest_effect

Row = dict[str, Any]
Entry = dict[str, Any]
Study = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """How a measure is summed up and shown: `summary` is "mean", "median", "share" (of true) or "largest"."""

    key: str
    title: str
    summary: str = "mean"
    unit: str = ""
    digits: int = 3


TRUTH = (  # against the one right answer
    Measure("right", "right", "share", "%", 1),
    Measure("class_every", "form right in every frame", "share", "%", 1),
    Measure("class_last", "form right in the last", "share", "%", 1),
    Measure("overlap_mean", "overlap"),
    Measure("overlap_last", "overlap, last frame"),
    Measure("heading_error", "heading error", "median", "°", 2),
    Measure("speed_error", "speed error", "median", "%", 1),
    Measure("last_position_error", "last position's error", "mean", "px", 2),
    Measure("colour_error", "colour error"),
    Measure("first_frame_psnr", "first frame's PSNR", "mean", "dB", 2),
    Measure("psnr", "PSNR", "mean", "dB", 2),
)
ALONE = (  # of the video, or of it and its image
    Measure("subject_consistency", "subject consistency", digits=4),
    Measure("background_consistency", "background consistency", digits=4),
    Measure("image_subject_consistency", "video-image subject", digits=4),
    Measure("image_background_consistency", "video-image background", digits=4),
    Measure("smoothness", "smoothness", digits=4),
    Measure("motion", "motion", "mean", "px", 3),
    Measure("moving", "moving", "share", "%", 1),
)
PAIRED = (  # against the same scene's video in the baseline
    Measure("paired_psnr", "PSNR to the uncut", "mean", "dB", 2),
    Measure("paired_ssim", "SSIM to the uncut", digits=4),
    Measure("latent_difference", "largest latent difference", "largest", digits=6),
)
MEASURES = {m.key: m for m in (*TRUTH, *ALONE, *PAIRED)}
KEYS = tuple(MEASURES)
COMPARED = (*TRUTH, *ALONE)
QUALITIES = ("right", "overlap_last", "psnr", "paired_psnr")  # of the frontier
UNTESTED = ("estimates",)  # families that ask how large, not whether

STATISTICS = {"mean": np.mean, "median": np.median}


def summarise(entries: list[Entry], rows: list[Row]) -> list[Entry]:
    """The entries with `measures` (value, low, high, n) and, but for the first of each family, `differences` from it:
    mean, low, high, p, holm (p corrected for all comparisons of the family), beyond (holm is at most 0.05), smallest
    (the effect that would be found in four of five such studies).

    Of the family `frontier` also `best`: the qualities in which no arm is as cheap and at least as good, in work, and
    in seconds where they were taken.
    """
    found: dict[str, dict[tuple[int, int], Row]] = {}
    for row in rows:
        found.setdefault(row["arm"], {})[row["scene"], row["noise"]] = row
    full: list[Entry] = []
    for family in dict.fromkeys(entry["family"] for entry in entries):
        members = [entry for entry in entries if entry["family"] == family]
        kept = [within(found[entry["name"]], entry["scenes"], entry["noises"]) for entry in members]
        summed = [
            entry | {"measures": {key: summary(m, by_scene(mine, key)) for key, m in MEASURES.items()}}
            for entry, mine in zip(members, kept, strict=True)
        ]
        summed[0]["differences"] = {}
        for entry, mine in zip(summed[1:], kept[1:], strict=True):
            entry["differences"] = {m.key: difference(mine, kept[0], m.key) for m in COMPARED}
        correct([each for entry in summed for each in entry["differences"].values() if each], family in UNTESTED)
        full += summed
    add_frontier([entry for entry in full if entry["family"] == "frontier"])
    return full


def within(rows: dict[tuple[int, int], Row], scenes: int, noises: int) -> dict[tuple[int, int], Row]:
    return {key: row for key, row in rows.items() if key[0] < scenes and key[1] < noises}


def by_scene(rows: dict[tuple[int, int], Row], key: str) -> np.ndarray:
    """[m,k]: the k noises' values of each of the m scenes that have one."""
    values: dict[int, list[float]] = {}
    for (scene, _), row in sorted(rows.items(), key=lambda item: item[0]):
        if row[key] is not None:
            values.setdefault(scene, []).append(float(row[key]))
    return np.array(list(values.values()), dtype=float)


def summary(measure: Measure, values: np.ndarray) -> dict[str, float | None]:
    """A measure over the scenes [m,k] where there was something to measure, with its 95 % interval."""
    if not len(values):
        return {"value": None, "low": None, "high": None, "n": 0}
    if measure.summary == "share":
        value, low, high = clustered_share(values)
    elif measure.summary in STATISTICS:
        value, low, high = clustered(values, STATISTICS[measure.summary])
    else:
        value, low, high = float(values.max()), None, None
    return {"value": value, "low": low, "high": high, "n": len(values)}


def difference(mine: dict[tuple[int, int], Row], theirs: dict[tuple[int, int], Row], key: str) -> dict[str, Any] | None:
    """Mean, interval, error and p of arm less baseline over the scenes that have both; None where none has."""
    a, b = by_scene(mine, key), by_scene(theirs, key)
    if not len(a):
        return None
    found = paired_difference(a, b)
    return {"mean": found.mean, "low": found.low, "high": found.high, "error": found.error, "p": found.p}


def correct(differences: list[dict[str, Any]], untested: bool) -> None:
    """Add to each what Holm's correction over all of them makes of its p, and the smallest effect that it shows."""
    if untested or not differences:
        return
    corrected = holm([each["p"] for each in differences])
    for each, p in zip(differences, corrected.tolist(), strict=True):
        smallest = smallest_effect(each["error"], len(differences)) or None
        each |= {"holm": p, "beyond": p <= 0.05, "smallest": smallest, "comparisons": len(differences)}


def rounded(value: Any) -> Any:
    """Six significant digits of every number: what study.json keeps of them."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def add_frontier(entries: list[Entry]) -> None:
    """To each entry `best`: {cost: qualities in which it is on that cost's frontier}."""
    for entry in entries:
        entry["best"] = {}
    for cost in ("relative_macs", "relative_seconds"):
        for quality in QUALITIES:
            rivals = [e for e in entries if e[cost] is not None and not (quality == "paired_psnr" and uncut(e))]
            points = [(entry[cost], entry["measures"][quality]["value"]) for entry in rivals]
            for entry, best in zip(rivals, frontier(points), strict=True):
                entry["best"].setdefault(cost, []).extend([quality] * best)


def uncut(entry: Entry) -> bool:
    """The function as released, whose PSNR to itself says nothing."""
    return entry["name"].split(" guidance")[0] in ("lossless", "False")


def frontier(points: list[tuple[float, float]]) -> list[bool]:
    """Of points (cost, quality): is there none that costs at most as much, is at least as good, and differs?"""
    return [
        not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points) for cost, quality in points
    ]


def by_work(entries: list[Entry]) -> list[Entry]:
    """The order of the table and of the plot's numbers."""
    return sorted(entries, key=lambda entry: (entry["relative_macs"], entry["name"]))


def choices(entries: list[Entry]) -> list[tuple[float, Entry]]:
    """For losses of 0.1, 0.5 and 1 dB of PSNR to the truth: the cheapest of the entries whose interval excludes a
    greater one. Cheap is what takes the least time, or where that was not measured, work; the released build's never is
    the answer, for the exact one is the same function."""
    cost = "relative_seconds" if all(e["relative_seconds"] is not None for e in entries) else "relative_macs"
    found: list[tuple[float, Entry]] = []
    for loss in (0.1, 0.5, 1.0):
        fit = [e for e in entries if (e["differences"].get("psnr") or {"low": 0.0})["low"] >= -loss]
        found.append((loss, min((e for e in fit if e["build"] is not False), key=lambda e: e[cost])))
    return found


def by_family(study: Study) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in study["arms"]:
        found.setdefault(entry["family"], []).append(entry)
    return found
