"""Theorem: the study compares what it says it compares, and its shortcuts change no bit.

Two scenes of the study on the shipped model, in four steps. Every way that shares steps is held against a full run that
is built here of the package's own parts.
"""

import copy
import json
import sys
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from minisvd.accounting import BUILDS, unet_cost
from minisvd.sampler import GuidanceSchedule, edm_sigmas, guided_denoiser, sample_euler
from minisvd.unet import SpatioTemporalUNet
from tools.output import plotting
from tools.study import report as study_report
from tools.study import run as study
from tools.study.run import BASELINE, Arm, Batch, Bench, Plan, Walks
from tools.tiny.evaluate import HELD_OUT_SEED

pytestmark = pytest.mark.slow

PLAN = Plan(steps=4, cuts=(1, 3, 5), switch=3)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(PLAN)


@pytest.fixture(scope="module")
def batch(bench) -> Batch:
    return study.draw(bench, range(2))


@pytest.fixture(scope="module")
def walks(bench, batch) -> Walks:
    return Walks(bench, batch)


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def full_run(unet: SpatioTemporalUNet, batch: Batch, schedule: GuidanceSchedule, embeds: Tensor) -> Tensor:
    """All steps, by the package alone."""
    return sample_euler(guided_denoiser(unet, embeds, batch.latent, batch.ids, schedule), batch.noise, edm_sigmas(4))


def largest(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("arm", [*PLAN.families()["cuts"], PLAN.families()["control"][1]], ids=lambda arm: arm.name)
def test_a_cut_arm_that_shares_its_first_steps_ends_where_a_full_run_does(bench, batch, walks, arm):
    """Bit for bit; c = 1 shares nothing, c = 5 of 4 steps shares all."""
    low, high = bench.svd.generation.guidance
    schedule = GuidanceSchedule(low, high, arm.cut_step, arm.stage2)
    full = full_run(bench.unets[arm.build], batch, schedule, batch.embeds)
    shared = walks.walk(arm)[-1]
    print(f"largest difference {largest(shared, full):.1e}")
    assert len(walks.walk(arm)) == 5
    assert torch.equal(shared, full)
    if arm.cut_step == 3:  # control: a cut one step later ends elsewhere
        assert largest(shared, walks.walk(replace(arm, cut_step=4))[-1]) > 1e-3


def test_steps_are_numbered_from_one_wherever_a_walk_begins():
    seen = []

    def denoise(x: Tensor, sigma: Tensor, step: int) -> Tensor:
        seen.append((step, sigma.item()))
        return x / 2

    sigmas = torch.tensor([4.0, 2.0, 1.0, 0.0])
    ends = list(study.euler_steps(denoise, torch.ones(1), sigmas, first=2))
    assert seen == [(2, 2.0), (3, 1.0)]
    assert len(ends) == 2


def test_every_arm_starts_from_the_same_noise_and_a_scene_is_the_same_in_any_batch(bench, batch, walks):
    arms = [arm for family in PLAN.families().values() for arm in family]
    starts = [walks.walk(arm)[0] for arm in arms]
    assert all(torch.equal(start, starts[0]) for start in starts)
    assert torch.equal(starts[0], batch.noise * (1 + edm_sigmas(4)[0] ** 2).sqrt())

    alone = study.draw(bench, range(1, 2))
    for name in ("noise", "image", "ids"):
        assert torch.equal(getattr(alone, name)[0], getattr(batch, name)[1])
    assert largest(alone.latent[0], batch.latent[1]) < 1e-4
    assert largest(batch.noise[0], batch.noise[1]) > 1  # control: another scene, another noise


def test_the_lossless_build_is_the_baseline_and_omitting_tca_is_not(walks):
    """In latents of standard deviation 1, after all steps."""
    exact, cut = (largest(walks.walk(arm)[-1], walks.walk(BASELINE)[-1]) for arm in (Arm("lossless"), Arm(True)))
    print(f"lossless {exact:.1e}, True {cut:.1e}")
    assert exact < 1e-3
    assert cut > 10 * exact


def test_the_panels_are_conditioned_in_the_steps_they_name(bench, batch, walks):
    """In all: the plain guided run. Never: the run on a zero embedding. The others are their own full runs."""
    schedule = GuidanceSchedule(*bench.svd.generation.guidance)
    before, after, never = PLAN.families()["panels"]
    assert torch.equal(walks.walk(BASELINE)[-1], full_run(bench.svd.unet, batch, schedule, batch.embeds))
    zero = full_run(bench.svd.unet, batch, schedule, torch.zeros_like(batch.embeds))
    assert torch.equal(walks.walk(never)[-1], zero)
    for arm in (before, after):
        full = sample_euler(study.denoiser(bench, batch, arm), batch.noise, edm_sigmas(4))
        assert torch.equal(walks.walk(arm)[-1], full)
    assert [before.conditioned(step) for step in range(1, 5)] == [True, True, False, False]
    assert [after.conditioned(step) for step in range(1, 5)] == [False, False, True, True]

    ends = [walks.walk(arm)[-1] for arm in (BASELINE, before, after, never)]
    apart = [largest(a, b) for i, a in enumerate(ends) for b in ends[:i]]
    print("panels apart by", [f"{value:.3f}" for value in apart])
    assert min(apart) > 1e-3  # control: no two are the same


def test_a_lost_file_is_made_again_and_no_other(bench, tmp_path):
    bench = copy.copy(bench)
    bench.plan = replace(PLAN, cuts=(3,))

    def run() -> None:
        study.run_batch(bench, tmp_path, ["builds", "control"], range(1), lambda: None)

    run()
    kept, lost = (study.rows_file(tmp_path, family, range(1)) for family in ("builds", "control"))
    first, written = lost.read_text(), kept.stat().st_mtime_ns
    lost.unlink()
    run()
    assert lost.read_text() == first
    assert kept.stat().st_mtime_ns == written

    rows = {row["arm"]: row for file in (kept, lost) for row in json.loads(file.read_text())}
    assert rows["False"]["paired_psnr"] == study.EQUAL_PSNR
    assert rows["False"]["latent_difference"] == 0
    assert rows["True"]["paired_psnr"] < rows["lossless"]["paired_psnr"]
    assert 0 < rows["lossless"]["latent_difference"] < rows["True"]["latent_difference"]


def test_the_work_of_an_arm_is_that_of_its_guided_and_single_steps(bench):
    config = bench.svd.unet.config
    for arm in (BASELINE, *PLAN.families()["cuts"], *PLAN.families()["control"]):
        two, one = (unet_cost(config, 8, (8, 8), branches, BUILDS[arm.build]) for branches in (2, 1))
        guided = 4 if arm.cut_step is None else arm.cut_step - 1
        once = (guided > 0) * two.once + (guided < 4) * one.once
        assert bench.macs(arm).macs == guided * two.macs + (4 - guided) * one.macs + once
    assert bench.macs(Arm(True, 3)).macs < bench.macs(Arm(True)).macs < bench.macs(BASELINE).macs


def test_the_frontier_is_what_nothing_beats():
    points = [(1.0, 5.0), (2.0, 5.0), (2.0, 7.0), (3.0, 6.0), (4.0, 8.0), (4.0, 9.0), (4.0, 9.0)]
    assert study_report.frontier(points) == [True, False, True, False, False, True, True]
    assert study_report.frontier([(1.0, 1.0)]) == [True]


@pytest.fixture(scope="module")
def found() -> dict:
    """A study of 40 scenes in which the uncut vcut=True turns each heading by a degree more, and nothing else."""
    arms = {name: family for name, family in Plan(cuts=(5, 13)).families().items() if name != "control"}
    rows, entries = [], []
    for family, members in arms.items():
        for arm in members:
            entries.append(
                {"name": arm.name, "family": family, **asdict(arm), "macs": 10**9, "relative_macs": 1.0, "seconds": 1.0}
            )
            for scene in range(40):
                row: study.Row = {
                    m.key: m.summary == "share" or scene / 40 for m in (*study_report.TRUTH, *study_report.ALONE)
                }
                row |= {m.key: 0.5 for m in study_report.PAIRED}
                row["heading_error"] = None if scene % 4 == 0 else scene + (arm == Arm(True))
                rows.append(row | {"scene": scene, "arm": arm.name})
    heading = {"command": "python -m tools.study.run", "scenes": 40, "plan": asdict(Plan()), "weights": "0", "cores": 2}
    heading |= {"versions": dict.fromkeys(("minisvd", "torch", "python"), "1"), "guidance": (1.0, 2.0)}
    return heading | {"noise_aug": 0.02, "timing_rounds": 1, "arms": study_report.summarise(entries, rows)}


def test_the_report_calls_different_what_is_and_nothing_else(found, tmp_path):
    entries = {entry["name"]: entry for entry in found["arms"]}
    beyond = {(name, key) for name, e in entries.items() for key, delta in e["differences"].items() if delta["beyond"]}
    assert beyond == {("True", "heading_error")}
    assert entries["True"]["measures"]["heading_error"]["n"] == 30
    assert entries["True"]["differences"]["heading_error"]["mean"] == pytest.approx(1)

    (tmp_path / "reading.md").write_text("## Reading\n\nBy hand.\n")
    study_report.write_markdown(found, tmp_path)
    text = (tmp_path / "study.md").read_text()
    assert "Made by `python -m tools.study.run`." in text.split("\n\n")[1]
    assert "- `vcut=True`. Different beyond the interval: heading error +1.00 ° [+1.00, +1.00]. Not: right," in text
    assert '- `vcut="lossless"`. Different beyond the interval: nothing.' in text
    assert "- mean. Different beyond the interval: nothing." in text
    assert text.endswith("## Reading\n\nBy hand.\n")


def test_the_plot_and_the_frames_are_pictures(found, tmp_path):
    study_report.plot(found, tmp_path / "study.png")
    study_report.frames_picture({"truth": [torch.rand(8, 3, 64, 64)] * 2, "never": [torch.rand(8, 3, 64, 64)] * 2},
                                tmp_path / "panels.png")  # fmt: skip
    for name in ("study.png", "panels.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_errors_are_one_sentence_with_the_remedy(bench, tmp_path, monkeypatch, capsys):
    for line, words in (
        ("--scenes 1", "--scenes is 1; need at least 2"),
        ("--seed 0", "training drew its scenes from; give another"),
        (f"--seed {HELD_OUT_SEED}", "training drew its scenes from; give another"),
    ):
        monkeypatch.setattr(sys, "argv", ["study.py", *line.split()])
        with pytest.raises(SystemExit):
            study.arguments()
        assert words in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["study.py", "--families", "panels"])
    assert study.arguments().families == ["builds", "panels"]

    study.check_work(tmp_path, bench.plan, "weights")
    study.check_work(tmp_path, bench.plan, "weights")
    with pytest.raises(ValueError, match=r"was begun with seed .*; give --work another folder"):
        study.check_work(tmp_path, replace(bench.plan, seed=1), "weights")
    with pytest.raises(ValueError, match="was begun with weights weights, not others"):
        study.check_work(tmp_path, bench.plan, "others")
    (tmp_path / "plan.json").write_text('{"another program": 1}')
    with pytest.raises(ValueError, match="was begun with another program 1, not None"):
        study.check_work(tmp_path, bench.plan, "weights")
    for name, read in (
        ("plan.json", lambda: study.check_work(tmp_path, bench.plan, "weights")),
        ("timing.json", lambda: study.timings(bench, tmp_path, [BASELINE], 1)),
    ):
        (tmp_path / name).write_text('{"half')
        with pytest.raises(SystemExit, match=rf"study: .*{name} is broken .*: delete it, and it is made again"):
            read()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"a plot needs matplotlib: pip install 'minisvd\[study\]'"):
        plotting()


def test_the_arms_are_timed_in_turn(bench):
    seconds = study.time_arms(bench, [BASELINE, Arm(True, 1)], rounds=2)
    assert set(seconds) == {"False", "True c=1 mean"}
    assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())
