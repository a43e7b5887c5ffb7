"""What tools/study/run.py found, as tables and sentences: study.md, frontier.md and the README's table.

No figure stands in a sentence here but by way of study.json, so that other numbers make other sentences.
"""

import re
import textwrap
from pathlib import Path
from typing import Any

from tools.output import atomic, table
from tools.study.paper import COLUMNS, ROWS, PaperRow
from tools.study.summary import (
    ALONE,
    COMPARED,
    MEASURES,
    PAIRED,
    QUALITIES,
    TRUTH,
    Entry,
    Measure,
    Study,
    by_family,
    by_work,
    choices,
    uncut,
)


def write_markdown(study: Study, out: Path) -> None:
    """study.md and frontier.md in the folder; the first ends with the folder's reading.md, which a person wrote."""
    file = out / "reading.md"
    reading = file.read_text(encoding="utf-8") if file.exists() else ""
    texts = {"study.md": markdown(study, reading)}
    if {"headline", "frontier"} <= {entry["family"] for entry in study["arms"]}:
        texts["frontier.md"] = fragment(study)
    for name, text in texts.items():
        with atomic(out / name) as path:
            path.write_text(text, encoding="utf-8")


def markdown(study: Study, reading: str = "") -> str:
    plan, families, plain = study["plan"], by_family(study), "guidance {:g} to {:g}".format(*study["guidance"])
    blocks = [
        f"# The shortcuts, measured where the right answer is known\n\nMade by `{study['command']}`. {settings(study)}",
        HOW.format(**plan),
    ]
    if "frontier" in families:
        blocks += ["## All shortcuts, on one frontier", FRONTIER_PLOT, frontier_table(families["frontier"])]
        blocks += ["\n".join(choice_sentences(families["frontier"]) + frontier_sentences(families["frontier"]))]
    if "headline" in families:
        entries = families["headline"]
        blocks += ["## The headline rows", run_words(entries), measures_table(entries, TRUTH), smallest_table(entries)]
        blocks += [measures_table(entries, (*PAIRED, *ALONE)), cost_table(entries), "\n".join(sentences(entries))]
    if {"builds-paper", "cuts-paper"} <= set(families):
        blocks += ["## The paper's tables beside ours", PAPER_WORDS, paper_table(study), directions_table(study)]
        blocks += ["\n".join(direction_sentences(study))]
    for family, entries in families.items():
        if family.removesuffix("-paper") not in HEADINGS:
            continue
        where = "guidance 1 to 3, as the paper's" if family.endswith("-paper") else plain
        title = HEADINGS[family.removesuffix("-paper")].format(switch=plan["switch"])
        blocks += [f"## {title} {where[0].upper()}{where[1:]}", run_words(entries)]
        if family == "panels-paper":
            blocks += ["![The frames of a few scenes in the four panels](study-panels.png)"]
        blocks += [measures_table(entries, TRUTH), measures_table(entries, (*PAIRED, *ALONE))]
        blocks += ["\n".join(cut_sentences(entries) if family.startswith("cuts") else sentences(entries))]
    if "estimates" in families:
        entries = families["estimates"]
        blocks += ["## When is what decided?", run_words(entries), ESTIMATES, estimates_table(entries[1:])]
        blocks += ["\n".join(decided_sentences(entries))]
    return "\n\n".join([*blocks, read(reading, study)]) + "\n"


def settings(study: Study) -> str:
    plan, versions, (low, high) = study["plan"], study["versions"], study["guidance"]
    return (
        f"Scenes that training never drew (seed {plan['seed']}), each with its own fps, motion bucket and noises, the "
        f"same in every arm. Model `{plan['model']}`, weights {study['weights']}, {plan['steps']} steps where nothing "
        f"else is said, guidance {low:g} to {high:g}, noise augmentation {study['noise_aug']:g}. "
        f"minisvd {versions['minisvd']}, torch {versions['torch']}, Python {versions['python']}, "
        f"a machine of {study['cores']} cores. Seconds are processor time of the denoising of one video, on one "
        f"thread, each arm in full and in turn, the median of {study['timing_rounds']}."
    )


HOW = """
Brackets are 95 % intervals, clustered by scene: whole scenes are drawn with all their noises (the bootstrap), and a
share has Wilson's interval for as many trials as its scenes are worth. The second line of a cell is the difference: the
mean of the arm's figure less the baseline's for the same scene and noise. It is **bold** where it is "found": its p by
Student's t over the scenes is at most 0.05 after Holm's correction for all comparisons of its family, so that of all
bold figures of a family, at a chance of 95 %, none is an accident. The baseline is `vcut="lossless"`, guided in every
step: the released function. Work is multiply-accumulates of the UNet by minisvd's formulas, over those of `vcut=False`.
Sampling is in float32; frames are decoded in bfloat16 where the processor multiplies it, alike in every arm, which
bounds how near two videos can come in PSNR; 100 dB are equal frames.

*Right*: the shape is in every frame, of the true form in each one and with an overlap of at least 0.7; its heading is
within 30 degrees where it travels at least 4 pixels, its colour within 0.1 (RGB). Overlap is intersection over union
with the true shape. Heading and speed errors are medians, over the scenes that travel so far; what was not found counts
as worst. *Largest latent difference* is that of any number in any scene's latents, whose standard deviation is about 1.
Consistencies are Eq. 5 to 8 of arXiv 2407.19205, the subject's with the encoder `{subject}`, the background's with
`{background}` (`tiny` is the model's image encoder, `pixels` the frames themselves); motion is the mean length of the
largest 5 % of a Lucas-Kanade flow, and a video moves where VBench's dynamic degree says so of that flow. These, and
smoothness, are measured on the first {few} scenes with their first noise, whatever else a table is made of.
""".strip()

HEADINGS = {
    "builds": "What does omitting the temporal cross-attention change?",
    "cuts": "At which step may guidance be cut? (vcut=True)",
    "control": 'The same cuts on the exact build (vcut="lossless")',
    "panels": "When does the CLIP embedding matter? (before and from step {switch})",
}
FRONTIER_PLOT = "![Right videos, overlap in the last frame, PSNR to truth and to the uncut run, by cost](study.png)"
PAPER_WORDS = (
    "Each cell: the paper's SVD / its SVD-XT / ours, in percent. Not to be had here: aesthetics (LAION's predictor) "
    "and imaging quality (MUSIQ), which judge photographs. Smoothness and dynamic degree are by a Lucas-Kanade flow in "
    "place of AMT and RAFT, so heights do not compare, directions do; the paper gives no intervals, and what differs "
    "by less than half a point in both of its models counts as no difference there. Time is the paper's seconds over "
    "its first row's, and our measured ones over those of vcut=False."
)
ESTIMATES = """
![Denoised estimates of a few scenes, step by step](study-estimates.png)

![Colour, form and motion of the estimates, less the finished video's, against the noise level](study-decided.png)
""".strip()


def run_words(entries: list[Entry]) -> str:
    return f"{entries[0]['scenes']} scenes, {noises(entries[0])} each. Differences are from the first row."


def noises(entry: Entry) -> str:
    return "one noise" if entry["noises"] == 1 else f"{entry['noises']} noises"


def measures_table(entries: list[Entry], measures: tuple[Measure, ...]) -> str:
    """A line for each arm; the second line of a cell, if there is one, is the difference from the first arm."""
    known = [m for m in measures if any(e["measures"][m.key]["value"] is not None for e in entries)]
    titles = ["arm", *(f"{m.title}{f', {m.unit}' if m.unit else ''}" for m in known)]
    rows = [[entry_title(e), *(cell(e, m, e is entries[0]) for m in known)] for e in entries]
    return table(titles, "l" + "r" * len(known), rows)


def cell(entry: Entry, measure: Measure, baseline: bool = False) -> str:
    """Value [interval]<br>difference."""
    found, delta = entry["measures"][measure.key], entry["differences"].get(measure.key)
    if found["value"] is None or (baseline and measure in PAIRED):
        return "-"
    text = number(measure, found["value"])
    if found["low"] is not None:
        text += f" [{number(measure, found['low'])}, {number(measure, found['high'])}]"
    return f"{text}<br>{delta_text(measure, delta)}" if delta else text


def delta_text(measure: Measure, delta: dict[str, Any]) -> str:
    change = number(measure, delta["mean"], signed=True)
    return f"**{change}**" if delta.get("beyond") else change


def number(measure: Measure, value: float, signed: bool = False) -> str:
    scale = 100 if measure.unit == "%" else 1
    return f"{scale * value:{'+' if signed else ''}.{measure.digits}f}"


def cost_table(entries: list[Entry]) -> str:
    titles, rows = ("cost", "MACs of the UNet", "of vcut=False's", "seconds", "of vcut=False's"), []
    for e in entries:
        timed = ("-", "-") if e["seconds"] is None else (f"{e['seconds']:.2f}", relative(e["relative_seconds"]))
        rows.append((entry_title(e), f"{e['macs'] / 1e9:.2f} G", relative(e["relative_macs"]), *timed))
    return table(titles, "lrrrr", rows)


def relative(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def smallest_table(entries: list[Entry]) -> str:
    """The effects that this many scenes show."""
    rows, n = [], entries[0]["scenes"]
    for entry in entries[1:]:
        cells = []
        for m in TRUTH:
            delta = entry["differences"][m.key]
            cells.append("-" if delta is None else f"< {300 / n:.1f}" if delta["smallest"] is None and m.unit == "%"
                         else "-" if delta["smallest"] is None else number(m, delta["smallest"]))  # fmt: skip
        rows.append([entry_title(entry), *cells])
    titles = ["smallest effect", *(f"{m.title}{f', {m.unit}' if m.unit else ''}" for m in TRUTH)]
    m = entries[1]["differences"]["psnr"]["comparisons"]
    words = (
        f"The smallest true difference that a study of this size finds in four of five repetitions, by the spread "
        f"over the scenes and at the level of {m} comparisons. Where no scene differs at all, `<` is what {n} scenes "
        f"without one leave open at 95 %."
    )
    return f"{words}\n\n{table(titles, 'l' + 'r' * len(TRUTH), rows)}"


def entry_title(entry: Entry) -> str:
    """An arm in the words of the tables."""
    parts = [f"`vcut={entry['build']!r}`".replace("'", '"')]
    if entry["steps"] is not None:
        parts.append(f"{entry['steps']} steps")
    if entry["levels"] != "EDM":
        parts.append(f"levels {entry['levels']}")
    if entry["reuse"] is not None:
        parts.append(f"reuse {entry['reuse']}")
    if entry["interval"]:
        stop, start = entry["interval"]
        parts.append(f"guided from {start:g} to {stop:g}, {entry['stage2']}")
    if entry["cut_step"] is not None:
        parts.append(f"c={entry['cut_step']}, {entry['stage2']}")
    if entry["embedding"] != "all":
        parts.append(f"embedding {panel_title(entry['embedding'], entry['switch'])}")
    if entry["estimate"] is not None:
        parts.append(f"D of step {entry['estimate']}")
    return ", ".join(parts)


def panel_title(embedding: str, switch: int | None) -> str:
    return {"all": "in all steps", "before": f"only before {switch}", "from": f"only from {switch}"}.get(
        embedding, "never"
    )


# The frontier.


def frontier_table(entries: list[Entry]) -> str:
    """The family's arms by their work; a star for each cost at which the arm is on the quality's frontier."""
    shown = [MEASURES[key] for key in QUALITIES]
    titles = ["", "setting", "work", "time", *(f"{m.title}{f', {m.unit}' if m.unit else ''}" for m in shown)]
    rows = []
    for n, entry in enumerate(by_work(entries), 1):
        cells = []
        for m in shown:
            stars = r"\*" * sum(m.key in best for best in entry["best"].values())
            first, *second = cell(entry, m, uncut(entry)).split("<br>")
            cells.append("<br>".join([f"{first} {stars}".strip(), *second]))
        costs = relative(entry["relative_macs"]), relative(entry["relative_seconds"])
        rows.append([str(n), entry_title(entry), *costs, *cells])
    words = run_words(entries).replace("the first row", entry_title(entries[0]))
    return f"{words} {STARS}\n\n{table(titles, 'rl' + 'r' * (len(shown) + 2), rows)}"


STARS = (
    "A star for each cost, work and time, at which no other arm costs at most as much and has at least the same "
    "figure. `reuse k` is DeepCache (arXiv 2312.00858): in every second step what lies deeper than skip k is as the "
    "step before had it. Noise levels are EDM's, or those of `levels`: AYS (arXiv 2404.14507), equal ratios (log), "
    "equal turns of v-prediction's angle, EDM's from 80 down."
)


def choice_sentences(entries: list[Entry]) -> list[str]:
    """Which settings a user would choose, and at which loss."""
    lines = []
    for loss, entry in choices(entries):
        right, overlap = (
            cell(entry, MEASURES[key]).replace("<br>", ", difference ") for key in ("right", "overlap_last")
        )
        lines.append(
            f"- At most {loss:g} dB of PSNR to the truth lost (by its interval), the cheapest is {entry_title(entry)}: "
            f"{relative(entry['relative_macs'])} of the work, {relative(entry['relative_seconds'])} of the time, PSNR "
            f"{change(entry, MEASURES['psnr'])}, right {right} %, overlap in the last frame {overlap}."
        )
    return lines


def change(entry: Entry, measure: Measure) -> str:
    """+1.5 % [+0.5, +2.4], or nothing to say of the baseline."""
    delta = entry["differences"].get(measure.key)
    if not delta:
        return "as the baseline's"
    mean, low, high = (number(measure, delta[key], signed=True) for key in ("mean", "low", "high"))
    return f"{mean}{f' {measure.unit}' if measure.unit else ''} [{low}, {high}]"


def frontier_sentences(entries: list[Entry]) -> list[str]:
    lines = []
    for key in QUALITIES:
        for cost, word in (("relative_macs", "work"), ("relative_seconds", "time")):
            best = sorted((e for e in entries if key in e["best"].get(cost, [])), key=lambda e: e[cost])
            names = "; ".join(f"{entry_title(e)} ({e[cost]:.3f}, {shown(e, key)})" for e in best)
            if names:
                lines.append(f"- Frontier of {MEASURES[key].title} by {word}: {names}.")
    return lines


def shown(entry: Entry, key: str) -> str:
    measure = MEASURES[key]
    return f"{number(measure, entry['measures'][key]['value'])} {measure.unit}".strip()


# What differs.


def sentences(entries: list[Entry]) -> list[str]:
    """For each arm but the first, what is found to differ from it, and what is not."""
    lines = []
    for entry in entries[1:]:
        known = [m for m in COMPARED if entry["differences"][m.key]]
        beyond = [m for m in known if entry["differences"][m.key].get("beyond")]
        changes = ", ".join(f"{m.title} {change(entry, m)}" for m in beyond)
        others = ", ".join(m.title for m in known if m not in beyond)
        lines.append(f"- {entry_title(entry)}. Found: {changes or 'nothing'}. Not: {others or 'nothing'}.")
    return lines


def cut_sentences(entries: list[Entry]) -> list[str]:
    """For each form of the one branch, the cut steps at which a measure is found to differ."""
    lines = []
    for stage2 in dict.fromkeys(entry["stage2"] for entry in entries if entry["cut_step"]):
        cuts = [entry for entry in entries if entry["cut_step"] and entry["stage2"] == stage2]
        by_steps: dict[tuple[int, ...], list[str]] = {}
        for m in COMPARED:
            steps = tuple(e["cut_step"] for e in cuts if (e["differences"][m.key] or {}).get("beyond"))
            by_steps.setdefault(steps, []).append(m.title)
        never = by_steps.pop((), ["nothing"])
        parts = []
        for steps, titles in sorted(by_steps.items(), key=lambda item: -len(item[0])):
            where = "every c" if len(steps) == len(cuts) else f"c={', '.join(map(str, steps))}"
            parts.append(f"{', '.join(titles)} (at {where})")
        lines.append(f"- {stage2}. Found: {'; '.join(parts) or 'nothing'}. At no c: {', '.join(never)}.")
    return lines


# The paper's.


def paired_rows(study: Study) -> list[tuple[PaperRow, Entry]]:
    """The paper's rows that the study has too."""
    paper = ("builds-paper", "cuts-paper")
    ours = {entry["name"]: entry for entry in study["arms"] if entry["family"] in paper}
    return [(row, ours[row.arm]) for row in ROWS if row.arm in ours]


def paper_table(study: Study) -> str:
    timed = {entry["name"]: entry["relative_seconds"] for entry in study["arms"] if entry["relative_seconds"]}
    rows, first = [], ROWS[0]
    for row, entry in paired_rows(study):
        cells = []
        for i, key in enumerate(COLUMNS.values()):
            ours = entry["measures"][key]["value"]
            cells.append(f"{row.svd[i]:.2f} / {row.xt[i]:.2f} / {'-' if ours is None else f'{100 * ours:.2f}'}")
        theirs = [
            "-" if own is None or whole is None else f"{own / whole:.3f}"
            for own, whole in ((row.svd_seconds, first.svd_seconds), (row.xt_seconds, first.xt_seconds))
        ]
        ours = timed.get(entry["name"].replace(" guidance 1 3", ""))
        rows.append([row.title, *cells, f"{' / '.join(theirs)} / {relative(ours)}"])
    return table(["row", *COLUMNS, "time"], "l" + "r" * (len(COLUMNS) + 1), rows)


SMALL = 0.5  # points: less than this, of both of its models, counts as no difference of the paper's


def direction(theirs: tuple[float, float], delta: dict[str, Any]) -> str:
    """Whether the paper's two differences and ours go one way. The paper gives no intervals: hence SMALL."""
    theirs_found = max(abs(each) for each in theirs) >= SMALL
    if not delta["beyond"]:
        return "not found here" if theirs_found else "none in either"
    if not theirs_found:
        return "only here"
    if theirs[0] * theirs[1] <= 0:
        return "the paper's two differ"
    return "same" if theirs[0] * delta["mean"] > 0 else "opposite"


def compared(study: Study) -> list[tuple[PaperRow, str, tuple[float, float], Entry, dict[str, Any], str]]:
    """Row, column, the paper's two differences from its first row in points, our entry, difference and direction."""
    found = []
    for row, entry in paired_rows(study)[1:]:
        for i, (column, key) in enumerate(COLUMNS.items()):
            theirs = row.svd[i] - ROWS[0].svd[i], row.xt[i] - ROWS[0].xt[i]
            delta = entry["differences"][key]
            if delta:
                found.append((row, column, theirs, entry, delta, direction(theirs, delta)))
    return found


def directions_table(study: Study) -> str:
    rows = []
    for row, column, (svd, xt), _, delta, verdict in compared(study):
        ours = f"{100 * delta['mean']:+.2f} [{100 * delta['low']:+.2f}, {100 * delta['high']:+.2f}]"
        rows.append(
            [row.title, column, f"{svd:+.2f}", f"{xt:+.2f}", f"**{ours}**" if delta["beyond"] else ours, verdict]
        )
    titles = ["less the first row, in points", "measure", "paper, SVD", "paper, SVD-XT", "ours", "direction"]
    return table(titles, "llrrrl", rows)


def direction_sentences(study: Study) -> list[str]:
    lines = []
    for title in dict.fromkeys(row.title for row, *_ in compared(study)):
        verdicts: dict[str, list[str]] = {}
        for row, column, *_, verdict in compared(study):
            if row.title == title:
                verdicts.setdefault(verdict, []).append(re.sub(r" \(.*\)", "", column))
        lines.append(f"- {title}: " + "; ".join(f"{v}: {', '.join(columns)}" for v, columns in verdicts.items()) + ".")
    for row, column, (svd, xt), _, delta, _verdict in compared(study):
        if row.title == "c = 10" and "Eq. 5" in column:
            lines.append(
                f"- The paper's c = 10 changes {column} by {svd:+.2f} and {xt:+.2f} points; ours by "
                f"{100 * delta['mean']:+.2f} [{100 * delta['low']:+.2f}, {100 * delta['high']:+.2f}], "
                f"{'found' if delta['beyond'] else 'not found'} after the correction."
            )
    return lines


# When what is decided.

DECIDED = {  # what: measure of the estimate's error, or of its rightness
    "colour": "colour_error",
    "form": "overlap_mean",
    "motion": "last_position_error",
}
NEAR = 0.1  # of the largest difference


def estimates_table(entries: list[Entry]) -> str:
    shown = [MEASURES[key] for key in (*DECIDED.values(), "class_every", "heading_error", "psnr")]
    titles = ["estimate D of step", "sigma", *(f"{m.title}{f', {m.unit}' if m.unit else ''}" for m in shown)]
    rows = [[str(e["estimate"]), f"{e['sigma']:.3g}", *(cell(e, m).split("<br>")[0] for m in shown)] for e in entries]
    return table(titles, "rr" + "r" * len(shown), rows)


def decided(estimates: list[Entry], key: str) -> Entry | None:
    """The first estimate from which on the measure is the finished video's: their difference is at most NEAR of the
    largest, or its interval holds 0. None if that of the last is not."""
    deltas = [entry["differences"][key] for entry in estimates]
    reach = NEAR * max(abs(delta["mean"]) for delta in deltas)
    far = [i for i, d in enumerate(deltas) if abs(d["mean"]) > reach and not d["low"] <= 0 <= d["high"]]
    after = far[-1] + 1 if far else 0
    return estimates[after] if after < len(estimates) else None


def decided_sentences(entries: list[Entry]) -> list[str]:
    end, estimates, lines = entries[0], entries[1:], []
    for what, key in DECIDED.items():
        first, there = estimates[0], decided(estimates, key)
        when = f"step {there['estimate']}, sigma {there['sigma']:.3g}" if there else "the end"
        lines.append(
            f"- {what.capitalize()}: {MEASURES[key].title} is {shown(first, key)} in the first estimate (sigma "
            f"{first['sigma']:.3g}) and {shown(end, key)} in the video; from {when} on it is the video's, to a tenth "
            f"of the largest difference or within its interval."
        )
    return lines


# For the README, and by hand.

BEGIN, END = "<!-- study: begin -->\n", "<!-- study: end -->\n"


def fragment(study: Study) -> str:
    """frontier.md: a table of the headline rows and of what a user would choose, with what it needs to be read."""
    families = by_family(study)
    headline, others = families["headline"], families["frontier"]
    known = {entry["name"] for entry in headline}
    extra = {entry["name"]: entry for _, entry in choices(others) if entry["name"] not in known}
    shown = [MEASURES[key] for key in QUALITIES]
    titles = ["setting", "work", "time", *(f"{m.title}{f', {m.unit}' if m.unit else ''}" for m in shown)]
    rows = []
    for e in [*headline, *by_work(list(extra.values()))[::-1]]:
        costs = relative(e["relative_macs"]), relative(e["relative_seconds"])
        mark = "" if e["family"] == "headline" else " \\*"
        rows.append([entry_title(e) + mark, *costs, *(cell(e, m, uncut(e)).split("<br>")[0] for m in shown)])
    first, c = headline[0], others[0]
    words = (
        f"{first['scenes']} unseen scenes, {noises(first)} each, the same in every row (\\*: {c['scenes']}, "
        f"{noises(c)}); 95 % intervals by scene. *Right*: in every frame the form is the true one and overlaps it "
        f"by 0.7; heading within 30 degrees, colour within 0.1 (RGB). Work and time are over those of "
        f"`vcut=False`. All of it, by `{study['command']}`: [study.md](tools/results/study.md)."
    )
    psnr = MEASURES["psnr"]
    found = [e for e in headline[1:] if e["differences"]["psnr"]["beyond"]]
    changes = "; ".join(f"{entry_title(e)} {change(e, psnr)}" for e in found) or "in no row"
    smallest = max(e["differences"]["psnr"]["smallest"] or 0.0 for e in headline[1:])
    after = (
        f"PSNR differs from the first row's, corrected for many comparisons: {changes}. The smallest difference that "
        f"these rows could show is {smallest:.2f} dB."
    )
    table_ = table(titles, "l" + "r" * (len(shown) + 2), rows)
    return f"{wrapped(words)}\n\n{table_}\n\n{wrapped(after)}\n"


def wrapped(words: str) -> str:
    return textwrap.fill(words, 120, break_long_words=False, break_on_hyphens=False)


def filled(text: str, content: str) -> str:
    """A text with `content` between its two marks. Raises ValueError unless it has both, once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"need one line {BEGIN.strip()} and after it one line {END.strip()}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{content}{END}{rest.split(END)[1]}"


WRITTEN_FOR = re.compile(r"\A<!-- weights (\w+) -->\n+")
QUOTED = re.compile(r"\{\{(.+?)\}\}")
NOT_READ = "## Reading\n\nNobody has read these figures yet: reading.md was written for other weights, or is not there."


def read(reading: str, study: Study) -> str:
    """What a person wrote, if it was for these weights, with each `{{family | arm | measure}}` filled in.

    `measure` is a key of MEASURES, for the figure with its interval, or `work`, `time`; `measure difference` is the
    difference. Raises ValueError, with the place, for a name that the study has not.
    """
    found = WRITTEN_FOR.match(reading)
    if not found or found[1] != study["weights"]:
        return NOT_READ
    entries = {(entry["family"], entry["name"]): entry for entry in study["arms"]}

    def quoted(match: re.Match[str]) -> str:
        try:
            family, arm, asked = (part.strip() for part in match[1].split("|"))
            return figure(entries[family, arm], asked)
        except (ValueError, KeyError) as error:
            raise ValueError(f"reading.md asks for {match[0]}, which the study has not: {error}") from error

    return QUOTED.sub(quoted, reading[found.end() :].strip())


def figure(entry: Entry, asked: str) -> str:
    """The words for one figure of one row."""
    costs = {"work": "relative_macs", "time": "relative_seconds"}
    if asked in costs:
        return relative(entry[costs[asked]])
    key, _, kind = asked.partition(" ")
    measure = MEASURES[key]
    if kind == "difference":
        return change(entry, measure)
    if kind:
        raise ValueError(f"{kind!r} is no kind of figure")
    found = entry["measures"][key]
    unit = f" {measure.unit}".rstrip()
    interval = (
        f" [{number(measure, found['low'])}, {number(measure, found['high'])}]" if found["low"] is not None else ""
    )
    return f"{number(measure, found['value'])}{unit}{interval}"
