"""Proposition: ETC's A.1 as corrected is what torch counts, and as printed it is not; its figures follow from that.

Counted on tensors without data.
"""

from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minisvd.attention import Attention
from tools.etc.cost import CASES, field_cost, grid_over_both, main, parameters, printed, right

SHAPES = [(1, 64, 32), (3, 10, 64), (16, 100, 320), (7, 1, 48)]


def counted(b: int, length: int, c: int) -> int:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        x = torch.empty(b, length, c)
        Attention(c, 4, c)(x, x)
    return counter.get_total_flops()


@pytest.mark.parametrize(("b", "length", "c"), SHAPES)
def test_the_right_formula_is_torch_s_count(b, length, c):
    expected = counted(b, length, c)
    assert right(b, length, c).total == expected == 4 * b * length * c * (2 * c + length)
    assert printed(b, length, c).total == 2 * b * length * c * (4 * c + length) != expected  # control: as printed
    with torch.device("meta"):
        own = sum(p.numel() for name, p in Attention(c, 4, c).named_parameters() if name.endswith("weight"))
    assert parameters(c) == own
    assert own not in (3 * c * c, 6 * c * c)  # as A.1.2 and A.1.3 have it


def test_the_ratios_of_the_grid_to_both_halves():
    """(2C + THW)/(4C + HW + T), by torch's count too; the paper's formula and channels give its 15.95 nearly."""
    found = {(c, hw): (grid_over_both(c, hw, t, printed), grid_over_both(c, hw, t)) for c, hw, t in CASES}
    print({key: [round(ratio, 2) for ratio in pair] for key, pair in found.items()})
    rounded = {key: tuple(round(ratio, 2) for ratio in pair) for key, pair in found.items()}
    assert rounded == {
        (4, 1024): (15.30, 15.52), (320, 1024): (4.91, 7.34), (640, 256): (1.23, 1.90),
        (1280, 64): (0.60, 0.69), (1280, 16): (0.52, 0.55),
    }  # fmt: skip
    for c, hw, t in CASES[1:]:
        assert grid_over_both(c, hw, t) == pytest.approx((2 * c + t * hw) / (4 * c + hw + t))
        by_torch = counted(1, t * hw, c) / (counted(t, hw, c) + counted(hw, t, c))
        assert by_torch == pytest.approx(grid_over_both(c, hw, t))
        assert by_torch != pytest.approx(grid_over_both(c, hw, t, printed), rel=0.01)  # control
    assert round(grid_over_both(4, 128**2, 16, printed), 2) == 15.95  # where the paper's own number comes from


def test_the_cost_falls_with_every_cut_of_the_receptive_field():
    """Fig. 10: 12.54 % at an eighth, 0.146 % at a 1024th, with either formula and without a minimum."""
    blocks = [2**i for i in range(11)]
    for cost in (right, printed):
        curve = [field_cost(n, 16384, 4, cost) for n in blocks]
        assert curve[0] == 1
        assert all(a > b for a, b in pairwise(curve))
    assert (round(100 * field_cost(8, 16384, 4), 2), round(100 * field_cost(1024, 16384, 4), 3)) == (12.54, 0.146)


def test_every_table_is_printed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tools.etc.cost.MEASURED", ((32, 16, 4),))
    monkeypatch.setattr("sys.argv", ["cost.py", "--repeats", "1", "--json", str(tmp_path / "cost.json")])
    main()
    out = capsys.readouterr().out
    for row in ("| 4, 1024, 16 | 15.30 | 15.52 |", "| 16 frames of 256 | 2.07 | 15.52 | 15.52 |", "| 1/8 | 12.585 %"):
        assert row in out
    assert "threads, float32, torch" in out
    assert (tmp_path / "cost.json").is_file()
