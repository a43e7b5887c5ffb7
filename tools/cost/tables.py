"""Tables II and III of "Faster Image2Video Generation" (arXiv 2407.19205) beside the closed formulas of minisvd.

    python -m tools.cost.tables          two Markdown tables, then a sentence for each way in which they differ
    python -m tools.cost.tables --json   one JSON object

MACs (T = 10^12) of the UNet at 1024x576, 25 steps for all three models, without the two matmuls of attention, q k^T
and a v, which the paper's counter does not see. Of the paper only the figures in PARAMETERS, STEP and RUN were at hand:
every other cell is a dash. They are by number of frames, and svd-xt and svd-xt-1-1 share their configuration, so that
these two share their rows.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from minisvd.config import PRESETS, UNetConfig
from tools.cost.accounting import BUILDS, PUBLISHED, Build, unet_cost
from tools.output import table

STEPS, SIZE, CUTS = 25, (128, 72), (None, 17, 20)  # SIZE is (w, h) in latent cells; None guides every step
TCA_REMOVED = "TCA removed only"
ROWS = {
    "as published": PUBLISHED,
    "vcut=False": BUILDS[False],
    TCA_REMOVED: Build("attention", "none", repeated=True),
    'vcut="lossless"': BUILDS["lossless"],
    "vcut=True": BUILDS[True],
}

# The paper's figures: for the released model, and for its own, which every other row is compared with.
RELEASED = ("as published", "vcut=False")
PARAMETERS = {False: None, True: 1.474}  # 10^9; by "is it the paper's own model?"
STEP = {(14, False): 36.11, (25, False): 64.41, (25, True): 62.86}  # T in one guided step
RUN = {  # T in 25 steps, by frames and cut step
    (14, None): 903,
    (14, 17): 719,
    (14, 20): 772,
    (25, None): 1610,
    (25, 17): 1288,
    (25, 20): 1382,
}


@dataclass(frozen=True)
class Cell:
    """A figure of ours and the paper's, in one unit; None where the paper's is not at hand or the paper has none."""

    models: str
    row: str
    quantity: str
    ours: float
    paper: float | None

    @property
    def percent(self) -> float | None:
        """How much ours is above the paper's."""
        return None if self.paper is None else 100 * (self.ours / self.paper - 1)


def models_by_frames() -> dict[int, str]:
    """The presets that make as many frames, in one string."""
    frames: dict[int, list[str]] = {}
    for name, preset in PRESETS.items():
        frames.setdefault(preset.generation.num_frames, []).append(name)
    return {number: ", ".join(names) for number, names in frames.items()}


def table_2() -> Iterator[Cell]:
    """Parameters and one guided step, of every row and model."""
    for frames, models in models_by_frames().items():
        for row, build in ROWS.items():
            cost, cut = unet_cost(UNetConfig(), frames, SIZE, 2, build), row not in RELEASED
            yield Cell(models, row, "parameters, 10^9", cost.parameters / 1e9, PARAMETERS[cut])
            yield Cell(models, row, "one guided step, T", (cost.macs - cost.matmul) / 1e12, STEP.get((frames, cut)))


def table_3() -> Iterator[Cell]:
    """25 steps guided throughout or up to the cut step c: c - 1 guided steps, the others on half the batch.

    The paper's full schedule is the released model's, its cut ones are its own model's.
    """
    for frames, models in models_by_frames().items():
        for row, build in ROWS.items():
            for cut_step in CUTS:
                guided = STEPS if cut_step is None else cut_step - 1
                two, one = (unet_cost(UNetConfig(), frames, SIZE, branches, build) for branches in (2, 1))
                macs = guided * (two.macs - two.matmul) + (STEPS - guided) * (one.macs - one.matmul) + two.once
                comparable = (row in RELEASED) == (cut_step is None)
                quantity = "full" if cut_step is None else f"c={cut_step}"
                yield Cell(models, row, quantity, macs / 1e12, RUN[frames, cut_step] if comparable else None)


def markdown(cells: list[Cell]) -> str:
    """A line for each row of the table, a column for each quantity: ours (the paper's, difference)."""
    quantities = list(dict.fromkeys(cell.quantity for cell in cells))
    rows = []
    for models, row in dict.fromkeys((cell.models, cell.row) for cell in cells):
        found = {cell.quantity: entry(cell) for cell in cells if (cell.models, cell.row) == (models, row)}
        rows.append((models, row, *(found[quantity] for quantity in quantities)))
    return table(("model", "build", *quantities), "ll" + "r" * len(quantities), rows)


def entry(cell: Cell) -> str:
    """36.10 (36.11, -0.04 %), with the decimals that the paper gives; a dash for what it does not give."""
    if cell.paper is None or cell.percent is None:
        digits = 3 if "parameters" in cell.quantity else 2
        return f"{cell.ours:,.{digits}f} (-)"
    digits = len(str(cell.paper).partition(".")[2])
    return f"{cell.ours:.{digits}f} ({cell.paper}, {cell.percent:+.2f} %)"


REMARKS = """
- "As published" and "TCA removed only" project each condition anew for every frame, and for TCA every place, that it
  serves, as diffusers does. They are within 0.1 % of the paper in every cell but two. So the paper's 1.474 B parameters
  and 62.86 T are TCA removed and SCA left as attention.
- The two cells are 14 frames at c=17 and c=20, 0.3 % above the paper. Either of its figures comes to about 35.1 T a
  guided step, 1.0 T below its 36.11 T, where removing TCA takes away 0.9 T by these formulas. No build here gives
  that, and nothing at hand says why.
- The differences below 0.1 %: what the paper's counter sees in the smallest layers is not known (norms are not
  counted here), and its figures are rounded.
- vcut=False differs by what it saves without a change of the result: a video's conditions are projected once.
- The two builds with linears are 1.6 to 2.6 % below the paper's model, because SCA leaves the step too, 0.8 T of it at
  14 frames and 1.4 T at 25, and so do its parameters but one matrix and bias. Lossless costs as much a step as
  vcut=True: what it has more, 12,792,000 parameters, runs once a video.
""".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    tables = {"table_2": list(table_2()), "table_3": list(table_3())}
    if parser.parse_args().json:
        rows = {name: [asdict(cell) | {"percent": cell.percent} for cell in cells] for name, cells in tables.items()}
        print(json.dumps(rows))
        return
    print("Table II. Ours (the paper's, difference); T without the two attention matmuls.\n")
    print(markdown(tables["table_2"]))
    print(f"\nTable III. T in {STEPS} steps, guided throughout or before step c.\n")
    print(markdown(tables["table_3"]), REMARKS, sep="\n\n")


if __name__ == "__main__":
    main()
