"""Theorem: one run of `tools.cost.benchmark` compares every part with diffusers' and says it in one JSON object."""

import json

import numpy as np
import pytest
import torch

from tools.cost import benchmark
from tools.cost.accounting import unet_cost
from tools.cost.benchmark import CONFIGS, PARTS, beside_the_first, main, matmul_rate, measured_peak, ratio, rounds

# Of 64x64 the deepest level would be one pixel: a norm of two channels there magnifies rounding a hundredfold.
TINY = {"config": "tiny", "size": "128x64", "frames": 2, "repeats": 1}
QUICK = TINY | {"video-repeats": 1, "steps": 2, "cut-step": 2}


@pytest.mark.slow
def test_a_quick_run_has_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    main([f"--{name}={value}" for name, value in QUICK.items()])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = report["rows"]
    assert list(dict.fromkeys(row["part"] for row in rows)) == list(PARTS)
    for part in PARTS:
        names = [row["name"] for row in rows if row["part"] == part]
        assert names[0] == "diffusers"
        assert len(names) >= 2
    steps = [row["name"] for row in rows if row["part"] == "guided"]
    assert {"minisvd", "minisvd, lossless", "minisvd, True"} < set(steps)
    assert "minisvd, True, cut at 2" in [row["name"] for row in rows]
    for row in rows:
        assert row["seconds"] > 0
        assert row["interval"][0] <= row["ratio"] <= row["interval"][1]
        assert (row["part"] in ("guided", "single")) == ("flops" in row)
        if row["part"] in ("guided", "single", "encode", "decode"):
            assert row["counted"] > 0
    guided, single = (next(row for row in rows if row["part"] == part) for part in ("guided", "single"))
    macs = unet_cost(CONFIGS["tiny"], 2, (16, 8), 2).macs
    assert guided["flops"] == pytest.approx(2 * macs / guided["seconds"])
    assert guided["share"] == pytest.approx(guided["flops"] / report["matmul"]["float32"])
    assert guided["counted"] > 1.5 * single["counted"]
    decoding = {row["name"]: row["counted"] for row in rows if row["part"] == "decode"}
    assert decoding["minisvd, chunk 1, hold host"] < decoding["minisvd, chunk 2, hold one"] < decoding["diffusers"]


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_with_the_same_settings_alone(tmp_path, monkeypatch, capsys):
    """What is in the file is not measured again; another part is, and another setting is refused with its name."""
    command = [f"--{name}={value}" for name, value in TINY.items()] + [f"--save={tmp_path / 'runs/found.json'}"]
    main([*command, "--part", "encode", "--dtype", "float32", "bfloat16"])
    first = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["dtype"], row["to_first"] is None) for row in first] == [("float32", True)] * 2 + [
        ("bfloat16", False)
    ] * 2
    measured = []
    monkeypatch.setattr(benchmark, "compare", lambda part, *_: measured.append(part) or [])
    main([*command, "--part", "encode", "decode"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == first[:2]
    assert measured == ["decode"]  # control
    with pytest.raises(SystemExit, match=r"found.json is of a run with repeats 1, not 2: name another"):
        main([*command, "--part", "encode", "--repeats", "2"])


def test_the_second_ratio_is_to_diffusers_in_the_first_dtype():
    about = {"part": "guided", "frames": 8}
    rows = [
        about | {"dtype": dtype, "name": name, "times": times}
        for dtype, name, times in (
            ("float32", "diffusers", [4.0, 4.0]),
            ("float32", "minisvd", [3.0, 3.0]),
            ("bfloat16", "diffusers", [2.0, 2.0]),
            ("bfloat16", "minisvd", [1.0, 1.0]),
        )
    ]
    beside_the_first(rows, "float32")
    assert [row["to_first"] for row in rows] == [None, None, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)]


def test_rounds_alternate_and_the_ratio_is_of_medians() -> None:
    order: list[str] = []
    times = rounds([lambda: order.append("a") or torch.zeros(1), lambda: order.append("b") or torch.zeros(1)], 4, "cpu")
    assert "".join(order) == "abbaabba"
    assert times.shape == (4, 2)
    middle, low, high = ratio(np.array([[2.0, 1.0], [4.0, 2.0], [90.0, 3.0]]))
    assert middle == 2
    assert low <= middle <= high


@pytest.mark.linux
def test_memory_and_the_matrix_product_are_measured() -> None:
    """200 MB, of which 50 stay: the peak is the 200; a product is slower in float64."""
    grown = measured_peak(lambda: torch.ones(50_000_000)[:12_500_000].clone(), "cpu")
    print(f"{grown / 1e6:.0f} MB")
    assert 150e6 <= grown <= 270e6
    assert measured_peak(lambda: torch.ones(1), "cpu") < 50e6  # control
    assert matmul_rate("cpu", torch.float32) > 1e9
