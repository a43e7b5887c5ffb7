"""What attention costs on a grid of frames, and frame by frame and then along time, as ETC's paper prints it and right.

    python -m tools.etc.cost                 A.1's ratios, Table 3 by formula and measured here, Fig. 10 both ways
    python -m tools.etc.cost --json out.json  the same as one JSON file

FLOPs are 2 per multiply-accumulate, tokens [b, l, c]. The paper (OpenReview 0lVQBMhsPG), A.1, slips in scores x V,
which is 2BL^2C and not 2BLC^2, and leaves out W_O; then it puts c = 4, the latents' channels, where no attention runs.
Its own seconds are of another machine and are shown as its own.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from minisvd.attention import Attention
from tools.output import table, write_json

CASES = ((4, 1024, 16), (320, 1024, 16), (640, 256, 16), (1280, 64, 16), (1280, 16, 16))  # c, h*w, t
TABLE_3 = {  # (frames, pixels): the paper's seconds of 1,000 passes, on the grid, in space, along time
    (16, 256): (6.453, 2.166, 0.947), (32, 256): (24.710, 4.209, 0.941),
    (16, 512): (24.71, 9.196, 0.971), (32, 512): (99.212, 18.252, 1.571),
}  # fmt: skip
MEASURED = ((64, 64, 16), (64, 256, 16), (320, 64, 16), (320, 256, 16))  # c, h*w, t; small enough for two cores


@dataclass(frozen=True)
class AttentionCost:
    """FLOPs of the four products of one self-attention over tokens [b, l, c]: q k v, q k^T, scores x v, and W_O."""

    qkv: int
    scores: int
    values: int
    out: int

    @property
    def total(self) -> int:
        return self.qkv + self.scores + self.values + self.out


def right(b: int, l: int, c: int) -> AttentionCost:  # noqa: E741
    """6BLC^2, 2BL^2C, 2BL^2C, 2BLC^2: in all 4BLC(2C + L)."""
    return AttentionCost(6 * b * l * c * c, 2 * b * l * l * c, 2 * b * l * l * c, 2 * b * l * c * c)


def printed(b: int, l: int, c: int) -> AttentionCost:  # noqa: E741
    """As A.1 has it: 6BLC^2, 2BL^2C, 2BLC^2, and no W_O: in all 2BLC(4C + L)."""
    return AttentionCost(6 * b * l * c * c, 2 * b * l * l * c, 2 * b * l * c * c, 0)


def parameters(c: int) -> int:
    """4C^2, without biases, with W_O. The paper has 3C^2 in A.1.2 and 6C^2 in A.1.3."""
    return 4 * c * c


def grid_over_both(c: int, hw: int, t: int, cost: Callable[[int, int, int], AttentionCost] = right) -> float:
    """One attention over t * hw tokens against t attentions over hw and hw attentions over t; (2C + THW)/(4C + HW + T)
    where `cost` is `right`."""
    return cost(1, t * hw, c).total / (cost(t, hw, c).total + cost(hw, t, c).total)


def field_cost(blocks: int, length: int, c: int, cost: Callable[[int, int, int], AttentionCost] = right) -> float:
    """Fig. 10: the cost of attention within `blocks` parts of the tokens, so a receptive field of 1/blocks, against
    that over all. It falls with every cut."""
    return cost(blocks, length // blocks, c).total / cost(1, length, c).total


@torch.inference_mode()
def measured(c: int, hw: int, t: int, repeats: int) -> dict[str, float]:
    """Median seconds of one pass of our attention on the grid, in space and along time, on random numbers."""
    torch.manual_seed(0)
    attention = Attention(c, max(1, c // 64), c).eval()
    grid = torch.randn(1, t * hw, c)
    space = rearrange(grid, "1 (t s) c -> t s c", t=t)
    layouts = {"grid": grid, "space": space, "time": rearrange(space, "t s c -> s t c").contiguous()}

    def seconds(x: Tensor) -> float:
        attention(x, x)
        spans = []
        for _ in range(repeats):
            began = time.perf_counter()
            attention(x, x)
            spans.append(time.perf_counter() - began)
        return statistics.median(spans)

    return {name: seconds(x) for name, x in layouts.items()}


def hardware() -> str:
    """What the seconds are of."""
    names = [line.partition(":")[2].strip() for line in cpu_lines() if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, float32, torch {torch.__version__}"


def cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def report(repeats: int) -> dict[str, object]:
    """Every figure, as data."""
    ratios = [
        {"c": c, "hw": hw, "t": t, "printed": grid_over_both(c, hw, t, printed), "right": grid_over_both(c, hw, t)}
        for c, hw, t in CASES
    ]
    table_3 = []
    for (t, side), (grid, space, along) in TABLE_3.items():
        hw = (side // 8) ** 2
        theirs = {"paper_measured": grid / (space + along), "paper_tokens": {256: 1024, 512: 2048}[side]}
        by_formula = {
            "right": grid_over_both(4, hw, t),
            "right_at_their_tokens": grid_over_both(4, theirs["paper_tokens"], t),
        }
        table_3.append({"t": t, "side": side, "hw": hw, **theirs, **by_formula})
    here = []
    for c, hw, t in MEASURED:
        spans = measured(c, hw, t, repeats)
        ratio = spans["grid"] / (spans["space"] + spans["time"])
        here.append({"c": c, "hw": hw, "t": t, **spans, "ratio": ratio, "right": grid_over_both(c, hw, t)})
    curve = [
        {"blocks": n, "right": field_cost(n, 16384, 4), "printed": field_cost(n, 16384, 4, printed),
         "right_at_320": field_cost(n, 16384, 320)}
        for n in (1, 2, 4, 8, 16, 64, 256, 1024)
    ]  # fmt: skip
    return {"ratios": ratios, "table_3": table_3, "measured": here, "fig_10": curve, "hardware": hardware()}


def markdown(found: dict) -> str:
    """The report as tables."""
    ratios = [[f"{r['c']}, {r['hw']}, {r['t']}", f"{r['printed']:.2f}", f"{r['right']:.2f}"] for r in found["ratios"]]
    table_3 = [
        [
            f"{r['t']} frames of {r['side']}",
            f"{r['paper_measured']:.2f}",
            f"{r['right_at_their_tokens']:.2f}",
            f"{r['right']:.2f}",
        ]
        for r in found["table_3"]
    ]
    here = [
        [
            f"{r['c']}, {r['hw']}, {r['t']}",
            *(f"{1e3 * r[name]:.2f}" for name in ("grid", "space", "time")),
            f"{r['ratio']:.2f}",
            f"{r['right']:.2f}",
        ]
        for r in found["measured"]
    ]
    curve = [
        [f"1/{r['blocks']}", *(f"{100 * r[name]:.3f} %" for name in ("printed", "right", "right_at_320"))]
        for r in found["fig_10"]
    ]
    return "\n\n".join(
        [
            "Attention on the grid over attention in space and along time, in FLOPs (A.1).",
            table(["c, h*w, t", "as printed", "right"], "lrr", ratios),
            "The same for Table 3's shapes at c = 4: the paper's seconds, FLOPs with its 2,048 tokens a frame of 512 "
            "pixels, and with the 4,096 that such a frame has.",
            table(["", "the paper's seconds", "FLOPs, its tokens", "FLOPs"], "lrrr", table_3),
            f"Measured here, milliseconds of one pass ({found['hardware']}).",
            table(["c, h*w, t", "grid", "space", "time", "ratio", "FLOPs"], "lrrrrr", here),
            "Fig. 10: receptive field, and cost against attention over all 16,384 tokens.",
            table(["field", "printed, c = 4", "right, c = 4", "right, c = 320"], "lrrr", curve),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What attention on a grid of frames costs.")
    parser.add_argument("--repeats", type=int, default=5, help="passes of each measurement (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args()
    found = report(args.repeats)
    if args.json:
        write_json(args.json, found)
    print(markdown(found))


if __name__ == "__main__":
    main()
