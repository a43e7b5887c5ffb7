"""Theorem: the study compares what it says it compares, its shortcuts change no bit, and its words follow its numbers.

Two scenes of the study on a small random model of the scenes' size, in four steps. Every way that shares steps is held
against a full run that is built here of the package's own parts.
"""

import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minisvd.clip import ImageEncoder
from minisvd.config import ClipConfig, GenerationConfig, UNetConfig, VAEConfig
from minisvd.sampler import GuidanceSchedule, edm_sigmas, guided_denoiser, sample_euler
from minisvd.save import save_folder
from minisvd.unet import SpatioTemporalUNet
from minisvd.vae import AutoencoderKLTemporalDecoder
from tools.cost.accounting import BUILDS, run_cost, unet_cost
from tools.output import plotting
from tools.study import figures, summary
from tools.study import report as study_report
from tools.study import run as study
from tools.study.arms import BASELINE, LEVELS, RELEASED, Arm, Family, Plan
from tools.study.deepcache import DeepCache, reused_macs
from tools.study.paper import COLUMNS, ROWS
from tools.study.run import Batch, Bench, Unit, Walks
from tools.tiny.evaluate import HELD_OUT_SEED

pytestmark = pytest.mark.slow

PLAN = Plan(steps=4, cuts=(1, 3, 5), switch=3, few=8, subject="pixels")
OWN = (1.5, 2.0)  # guidance, where an arm has none of its own
UNIT = Unit(0, 0, 2)
UNET = UNetConfig(
    block_out_channels=(32, 64),
    attention=(True, False),
    layers_per_block=1,
    num_attention_heads=(1, 2),
    cross_attention_dim=24,
    addition_time_embed_dim=8,
)
CLIP = ClipConfig(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    patch_size=16,
    image_size=64,
    projection_dim=24,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random model that makes eight frames of 64x64; no blend or bias is 0."""
    torch.manual_seed(0)
    parts = SpatioTemporalUNet(UNET), AutoencoderKLTemporalDecoder(VAEConfig(block_out_channels=(32,) * 4))
    for module in parts:
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("study") / "model"
    save_folder(folder, *parts, ImageEncoder(CLIP), GenerationConfig(num_frames=8, size=(64, 64)))
    return folder


@pytest.fixture(scope="module")
def plan(model) -> Plan:
    return replace(PLAN, model=str(model), guidance=OWN)


@pytest.fixture(scope="module")
def bench(plan) -> Bench:
    return Bench(plan)


@pytest.fixture(scope="module")
def batch(bench) -> Batch:
    return study.draw(bench, UNIT)


@pytest.fixture(scope="module")
def walks(bench, batch) -> Walks:
    return Walks(bench, batch)


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def full_run(unet: Any, batch: Batch, schedule: GuidanceSchedule, embeds: Tensor, sigmas: Tensor) -> Tensor:
    """All steps, by the package alone."""
    return sample_euler(guided_denoiser(unet, embeds, batch.latent, batch.ids, schedule), batch.noise, sigmas)


def largest(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


FAMILIES = PLAN.families(2, 1)
SHARING = [*FAMILIES["cuts"].arms[2:], FAMILIES["control-paper"].arms[2], Arm(reuse=1, cut_step=3)]


@pytest.mark.parametrize("arm", SHARING, ids=lambda arm: arm.name)
def test_a_cut_arm_that_shares_its_first_steps_ends_where_a_full_run_does(bench, batch, walks, arm):
    """Bit for bit; c = 1 shares nothing, c = 5 of 4 steps shares all, and reuse begins anew at the cut."""
    low, high = arm.guidance or OWN
    schedule = GuidanceSchedule(low, high, arm.cut_step, arm.stage2)
    unet = bench.unets[arm.build] if arm.reuse is None else DeepCache(bench.unets[arm.build], arm.reuse)
    full = full_run(unet, batch, schedule, batch.embeds, edm_sigmas(4))
    shared = walks.end(arm)
    print(f"largest difference {largest(shared, full):.1e}")
    assert len(walks.walk(arm).latents) == 5
    assert torch.equal(shared, full)
    if arm.cut_step == 3:  # control: a cut one step later ends elsewhere
        assert largest(shared, walks.end(replace(arm, cut_step=4))) > 1e-4


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
    """Whatever its steps and levels, in units of the first level; another noise is another, of the same scene."""
    for arm in (BASELINE, Arm(True, 3), Arm(steps=2, levels="AYS"), Arm(steps=2, levels="EDM from 80")):
        start, sigma = walks.walk(arm).latents[0], arm.sigmas(4)[0]
        assert torch.equal(start, batch.noise * (1 + sigma**2).sqrt())

    alone, again = study.draw(bench, Unit(0, 1, 2)), study.draw(bench, Unit(1, 0, 2))
    for name in ("noise", "image", "ids"):
        assert torch.equal(getattr(alone, name)[0], getattr(batch, name)[1])
    assert largest(alone.latent[0], batch.latent[1]) < 1e-4
    assert torch.equal(again.image, batch.image)
    assert largest(again.noise, batch.noise) > 1  # controls: another noise, and another scene's
    assert largest(batch.noise[0], batch.noise[1]) > 1


def test_the_baseline_is_the_released_build_and_omitting_tca_is_not(walks):
    """In latents of standard deviation 1, after all steps."""
    exact, cut = (largest(walks.end(arm), walks.end(BASELINE)) for arm in (RELEASED, Arm(True)))
    print(f"False {exact:.1e}, True {cut:.1e}")
    assert exact < 1e-4
    assert cut > 10 * exact


def test_the_mean_form_is_equation_4_to_the_letter(bench, batch):
    """Each site the mean of its two linears: the network on those means is the network on half of the embedding.
    Control: on the whole of it, it is not."""
    unet = bench.unets[True]
    given = torch.cat([batch.noise, batch.noise], dim=2), torch.tensor(0.5), batch.embeds, batch.ids
    zero, image = (unet.condition(share * batch.embeds) for share in (0.0, 1.0))
    sites = [site for block in image for site in block]
    means = [
        [tuple((a + b) / 2 for a, b in zip(*pair, strict=True)) for pair in zip(*blocks, strict=True)]
        for blocks in zip(zero, image, strict=True)
    ]
    literal, half = unet(*given, means), unet(*given, unet.condition(batch.embeds / 2))
    print(f"{len(sites)} sites, largest difference {largest(literal, half):.1e}")
    assert largest(literal, half) < 1e-5
    assert largest(literal, unet(*given, image)) > 1e-4


def test_the_panels_are_conditioned_in_the_steps_they_name(bench, batch, walks):
    """In all: the plain guided run. Never: the run on a zero embedding. The others are their own full runs."""
    schedule = GuidanceSchedule(*OWN)
    baseline, before, after, never = FAMILIES["panels"].arms
    unet, sigmas = bench.unets["lossless"], edm_sigmas(4)
    assert torch.equal(walks.end(baseline), full_run(unet, batch, schedule, batch.embeds, sigmas))
    zero = full_run(unet, batch, schedule, torch.zeros_like(batch.embeds), sigmas)
    assert torch.equal(walks.end(never), zero)
    for arm in (before, after):
        full = sample_euler(study.denoiser(bench, batch, arm), batch.noise, sigmas)
        assert torch.equal(walks.end(arm), full)
    assert [before.conditioned(step) for step in range(1, 5)] == [True, True, False, False]
    assert [after.conditioned(step) for step in range(1, 5)] == [False, False, True, True]

    ends = [walks.end(arm) for arm in (baseline, before, after, never)]
    apart = [largest(a, b) for i, a in enumerate(ends) for b in ends[:i]]
    print("panels apart by", [f"{value:.5f}" for value in apart])
    assert min(apart) > 1e-6  # control: no two are the same


def test_an_estimate_is_what_the_network_said_in_that_step(bench, batch, walks):
    """The last is where the run ends, for it goes to sigma 0; the first is D of the noise. They differ."""
    first, last = (walks.end(Arm(estimate=step)) for step in (1, 4))
    noise = walks.walk(BASELINE).latents[0]
    assert torch.equal(first, study.denoiser(bench, batch, BASELINE)(noise, edm_sigmas(4)[0], 1))
    assert largest(last, walks.end(BASELINE)) < 1e-5
    assert largest(first, last) > 1e-3


def test_guidance_in_an_interval_is_guided_there_alone(batch, bench, walks):
    """Between levels 2 and 3 of 4 it is a run of two conditional steps, one guided and one conditional."""
    levels = edm_sigmas(4)
    arm = Arm(interval=(levels[3].item(), levels[2].item()), stage2="cond")
    assert [branches for _, branches, _ in arm.calls(4, OWN)] == [1, 1, 2, 1]
    assert [branches for _, branches, _ in Arm(cut_step=3).calls(4, OWN)] == [2, 2, 1, 1]
    guided, alone = (study.denoiser(bench, batch, each) for each in (BASELINE, Arm(cut_step=1, stage2="cond")))
    expected = sample_euler(
        lambda x, sigma, step: (guided if step == 3 else alone)(x, sigma, step), batch.noise, levels
    )
    assert torch.equal(walks.end(arm), expected)
    assert largest(expected, walks.end(BASELINE)) > 1e-6  # control


@pytest.mark.parametrize("name", LEVELS)
def test_noise_levels_fall_from_the_top_to_zero(name):
    """The even ones are even in what they say: log in the logarithm, angle in the arc tangent."""
    for n in (2, 5, 25):
        sigmas = LEVELS[name](n)
        assert len(sigmas) == n + 1
        assert (sigmas.diff() < 0).all()
        assert sigmas[-1] == 0
        assert sigmas[0].item() == pytest.approx(80 if name == "EDM from 80" else 700, rel=1e-4)
    even = {"log": torch.log, "angle": torch.atan}.get(name)
    gaps = (even or torch.sqrt)(LEVELS[name](10)[:-1].double()).diff()
    assert (gaps.max() - gaps.min() < 1e-3 * gaps.abs().max()) == (even is not None)


# DeepCache.


def given(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sample, embeds = (torch.randn(shape, generator=generator) for shape in ((2, 3, 8, 8, 8), (2, 1, 24)))
    return sample, torch.tensor(0.3), embeds, torch.tensor([[6.0, 127.0, 0.02]])


@pytest.mark.parametrize("build", BUILDS)
def test_every_second_call_reuses_and_the_others_are_the_model(bench, build):
    """Bit for bit, at every skip. A reusing call on the same input is the model too, for nothing has changed; on
    another input (control) it is not, the less so the more it runs. Other conditions make the next call whole."""
    unet, one, other = bench.unets[build], given(0), given(1)
    conditions, off = unet.condition(one[2]), []
    whole, moved = unet(*one, conditions), unet(*other[:2], *one[2:], conditions)
    for skip in range(4):
        network = DeepCache(unet, skip)
        assert torch.equal(network(*one, conditions), whole)
        assert largest(network(*one, conditions), whole) < 1e-5
        assert torch.equal(network(*other[:2], *one[2:], conditions), moved)
        off.append(largest(network(*one, conditions), whole))
        assert torch.equal(network(*one, unet.condition(one[2])), whole)
    print("reused, off by", [f"{value:.1e}" for value in off])
    assert off[0] > off[-1] > 0
    with pytest.raises(ValueError, match="skip is 4; need 0 to 3"):
        DeepCache(unet, 4)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_work_of_a_reusing_call_is_what_it_multiplies(layers):
    """As torch counts it, at every skip, also with attention at each level and two layers a block; it grows with the
    skip, and is less than the whole."""
    config = replace(UNET, layers_per_block=layers, attention=(True, layers == 2))
    unet, one = SpatioTemporalUNet(config, vcut="lossless").eval(), given(0)
    conditions, whole = unet.condition(one[2]), unet_cost(config, 3, (8, 8), 2, BUILDS["lossless"]).macs
    found = []
    for skip in range(2 * layers + 2):
        network = DeepCache(unet, skip)
        network(*one, conditions)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # some torch count no fused one
            network(*one, conditions)
        found.append(reused_macs(config, 3, (8, 8), 2, BUILDS["lossless"], skip))
        assert found[-1] == counter.get_total_flops() // 2
    assert sorted(found) == found
    assert found[-1] < whole


def test_the_work_of_an_arm_is_that_of_its_calls(bench):
    """run_cost's where only guidance is cut; half of the calls at the price of reusing ones; that of its own steps."""
    config = bench.svd.unet.config
    for arm in (RELEASED, BASELINE, *FAMILIES["cuts"].arms, *FAMILIES["control"].arms):
        expected = run_cost(config, 8, bench.grid, 4, arm.cut_step, BUILDS[arm.build]).macs
        assert bench.macs(arm) == expected
    two = unet_cost(config, 8, bench.grid, 2, BUILDS["lossless"])
    reused = reused_macs(config, 8, bench.grid, 2, BUILDS["lossless"], 1)
    assert bench.macs(Arm(reuse=1)) == 2 * two.macs + 2 * reused + two.once
    assert bench.macs(Arm(steps=2)) == 2 * two.macs + two.once
    assert bench.macs(Arm(True, 3)) < bench.macs(Arm(True)) < bench.macs(RELEASED)


# The work folder.


def test_a_lost_file_is_made_again_and_no_other(bench, tmp_path):
    """To the byte. Two noises are two files; what is measured of a video alone is in that of the first noise only."""
    arms, first_scene = [BASELINE, RELEASED, Arm(True, 3)], Unit(0, 0, 1)

    def run(unit: Unit) -> None:
        study.run_unit(bench, tmp_path, arms, unit, lambda: None)

    run(first_scene)
    kept, lost = (first_scene.file(tmp_path, arm) for arm in (BASELINE, arms[2]))
    first, written = lost.read_text(), kept.stat().st_mtime_ns
    lost.unlink()
    run(first_scene)
    assert lost.read_text() == first
    assert kept.stat().st_mtime_ns == written

    rows = {arm.name: json.loads(first_scene.file(tmp_path, arm).read_text()) for arm in arms}
    uncut, released, cut = (rows[arm.name][0] for arm in arms)
    assert uncut["paired_psnr"] == study.EQUAL_PSNR
    assert uncut["latent_difference"] == 0
    assert cut["paired_psnr"] < released["paired_psnr"]
    assert 0 < released["latent_difference"] < cut["latent_difference"]
    assert uncut["smoothness"] is not None
    later = Unit(1, 0, 1)
    study.run_unit(bench, tmp_path, [BASELINE], later, lambda: None)
    (row,) = json.loads(later.file(tmp_path, BASELINE).read_text())
    assert row["psnr"] is not None
    assert row["smoothness"] is None
    assert row["psnr"] != uncut["psnr"]


def test_units_run_what_their_families_ask_for_and_nothing_twice(tmp_path):
    families = {"a": Family((BASELINE, Arm(True)), 10, 2), "b": Family((BASELINE, Arm(cut_step=3)), 8)}
    every = study.units(10, 2)
    assert every == [Unit(0, 0, 8), Unit(0, 8, 10), Unit(1, 0, 8), Unit(1, 8, 10)]
    assert [len(unit.arms(families)) for unit in every] == [3, 2, 2, 2]
    todo = study.missing(tmp_path, families, every)
    study.write_json(every[1].file(tmp_path, BASELINE), [])
    less = study.missing(tmp_path, families, every)
    assert sum(map(len, todo.values())) == 9
    assert less == todo | {every[1]: [Arm(True)]}


def test_every_arm_of_the_plan_has_a_name_of_its_own_and_every_family_its_baseline_first():
    families = Plan().families(200, 3)
    arms = {arm for family in families.values() for arm in family.arms}
    assert len({arm.name for arm in arms}) == len(arms) > 60
    assert {replace(family.arms[0], guidance=None) for family in families.values()} == {BASELINE}
    assert {name for name, family in families.items() if family.noises > 1} == {"headline"}
    assert set(families["headline"].arms) < set(families["frontier"].arms)
    ours = {arm.name for name in ("builds-paper", "cuts-paper") for arm in families[name].arms}
    assert {row.arm for row in ROWS} <= ours
    assert all(len(row.svd) == len(row.xt) == len(COLUMNS) for row in ROWS)


# The report.


def test_the_frontier_is_what_nothing_beats():
    points = [(1.0, 5.0), (2.0, 5.0), (2.0, 7.0), (3.0, 6.0), (4.0, 8.0), (4.0, 9.0), (4.0, 9.0)]
    assert summary.frontier(points) == [True, False, True, False, False, True, True]
    assert summary.frontier([(1.0, 1.0)]) == [True]


SCENES = 16


def made_up(changed: dict[str, tuple[str, float]]) -> dict:
    """A study of 16 scenes, two noises in the headline, in which nothing differs but what `changed` names: for an arm
    a measure and by how much, in each scene with a little of its own."""
    plan, rows, entries, seen = Plan(few=16), [], [], set()
    for name, family in plan.families(SCENES, 2).items():
        for arm in family.arms:
            cost = 0.5 if arm.steps else 1.0
            entry = {"name": arm.name, "family": name, **asdict(arm), "scenes": family.scenes, "noises": family.noises}
            sigma = None if arm.estimate is None else 1.0 / arm.estimate
            entries.append(
                entry
                | {"macs": 10**9, "relative_macs": cost, "seconds": cost, "relative_seconds": cost, "sigma": sigma}
            )
            for scene, noise in ((s, k) for s in range(family.scenes) for k in range(family.noises)):
                if (arm, scene, noise) in seen:
                    continue
                seen.add((arm, scene, noise))
                row: study.Row = {m.key: m.summary == "share" or scene / SCENES for m in summary.COMPARED}
                row |= {m.key: 0.5 for m in summary.PAIRED} | {"scene": scene, "noise": noise, "arm": arm.name}
                row["heading_error"] = None if scene % 4 == 0 else float(scene)
                if arm.estimate:
                    row["colour_error"] = 1.0 if arm.estimate < 9 else scene / SCENES
                if arm.name in changed:
                    key, by = changed[arm.name]
                    row[key] += by * (1 + 0.01 * scene + 0.005 * noise)
                rows.append(row)
    heading = {"command": "python -m tools.study.run", "scenes": SCENES, "noises": 2, "plan": asdict(plan)}
    heading |= {"weights": "abc", "cores": 2, "versions": dict.fromkeys(("minisvd", "torch", "python"), "1")}
    heading |= {"guidance": OWN, "noise_aug": 0.02, "timing_rounds": 1}
    return heading | {"arms": summary.summarise(entries, rows)}


CHANGED = {"True": ("overlap_last", -0.1), "True c=10 mean guidance 1 3": ("subject_consistency", -0.05),
           "lossless 10 steps": ("psnr", -0.3)}  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict:
    return made_up(CHANGED)


def test_the_report_calls_different_what_is_and_nothing_else(found, tmp_path):
    tested = [entry for entry in found["arms"] if entry["family"] != "estimates"]
    beyond = {(e["name"], key) for e in tested for key, delta in e["differences"].items() if delta and delta["beyond"]}
    assert beyond == {(name, key) for name, (key, _) in CHANGED.items()}
    entries = {(entry["family"], entry["name"]): entry for entry in found["arms"]}
    headline = entries["headline", "True"]
    assert headline["measures"]["heading_error"]["n"] == 12
    assert headline["differences"]["overlap_last"]["mean"] == pytest.approx(-0.1 * 1.0775)
    assert headline["differences"]["overlap_last"]["comparisons"] == 4 * len(summary.COMPARED)

    study_report.write_markdown(found, tmp_path)
    text = (tmp_path / "study.md").read_text()
    assert "Made by `python -m tools.study.run`." in text
    assert "- `vcut=True`. Found: overlap, last frame -0.108 [" in text
    assert "- `vcut=True`, c=17, mean. Found: nothing." in text
    assert "- mean. Found: subject consistency (at c=10)." in text
    assert "- c = 10: same: subject consistency; not found here: background consistency" in text
    assert "- Colour: colour error is 1.000 in the first estimate (sigma 1) and 0.219 in the video; from step 9" in text
    assert 'by its interval), the cheapest is `vcut="lossless"`, 10 steps: 0.500 of the work' in text
    assert text.count("|--:|") > 10


def test_no_figure_of_one_study_stands_in_the_text_of_another(found):
    """Other numbers, other sentences: what the first text says of the changed measures, the second does not."""
    other = made_up({"True": ("psnr", 2.0), "lossless 10 steps": ("psnr", -3.0)})
    one, two = (study_report.markdown(each) for each in (found, other))
    assert "Found: overlap, last frame -0.108" in one
    assert "Found: overlap, last frame" not in two
    assert "- c = 10: not found here: subject consistency" in two
    costly = [re.findall(r"At most 0.5 dB .*? the cheapest is (.*?): ", text)[0] for text in (one, two)]
    assert costly[0] == '`vcut="lossless"`, 10 steps'
    assert costly[1] != costly[0]


def test_the_reading_is_of_these_weights_and_its_figures_are_the_studys(found):
    """Each is named by family, row and measure. What the study has not is an error; other weights' text is left out."""
    overlap, work = "{{headline | True | overlap_last difference}}", "{{frontier | lossless 10 steps | work}}"
    sentence = f"Overlap falls by {overlap} at {work} of {{{{headline | lossless | right}}}}."
    reading = f"<!-- weights abc -->\n\n## Reading\n\n{sentence}\n"
    text = study_report.read(reading, found)
    assert re.fullmatch(r"## Reading\n\nOverlap falls by -0\.108 \[.*\] at 0\.500 of 100\.0 % \[.*, 100\.0\]\.", text)
    assert study_report.read(reading.replace("abc", "def"), found) == study_report.NOT_READ
    assert study_report.read("", found) == study_report.NOT_READ
    for wrong in (
        "headline | True | beauty",
        "headline | none | right",
        "headline | True",
        "headline | True | psnr sum",
    ):
        with pytest.raises(ValueError, match=r"reading\.md asks for"):
            study_report.read(f"<!-- weights abc -->\n{{{{{wrong}}}}}", found)


def test_the_reading_that_ships_asks_for_what_the_study_has(found):
    """Whatever weights it was written for, and in whatever form: no place is left unfilled."""
    reading = (Path(study.__file__).parents[1] / "results/reading.md").read_text(encoding="utf-8")
    (weights,) = study_report.WRITTEN_FOR.findall(reading)
    text = study_report.read(reading.replace(weights, "abc", 1), found)
    assert text.startswith("## Reading")
    assert "{{" in reading
    assert "{{" not in text


def test_the_readme_gets_the_fragment_between_its_marks(found, tmp_path):
    study_report.write_markdown(found, tmp_path)
    fragment = (tmp_path / "frontier.md").read_text()
    assert fragment.startswith("16 unseen scenes, 2 noises each")
    assert max(len(line) for line in fragment.splitlines() if line[:1] != "|") <= 120
    text = f"before\n{study_report.BEGIN}old\n{study_report.END}after\n"
    filled = study_report.filled(text, fragment)
    assert filled == text.replace("old\n", fragment)
    assert study_report.filled(filled, fragment) == filled
    with pytest.raises(ValueError, match="need one line <!-- study: begin -->"):
        study_report.filled("before\nafter\n", fragment)


def test_the_plots_and_the_frames_are_pictures(found, tmp_path):
    figures.plots(found, tmp_path)
    figures.frames_picture({"truth": [torch.rand(8, 3, 64, 64)] * 2, "never": [torch.rand(8, 3, 64, 64)] * 2},
                           tmp_path / "panels.png")  # fmt: skip
    for name in ("study.png", "study-decided.png", "panels.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


# The command.


def test_one_command_makes_all_of_it_and_goes_on_after_a_loss(model, tmp_path, monkeypatch, capsys):
    """Two scenes in two steps: study, text and pictures. After a loss, only that is done; study.json is the same."""
    few = ["--model", str(model), "--scenes", "2", "--noises", "1", "--few", "8", "--steps", "2", "--processes", "1"]
    few += ["--families", "headline", "estimates", "--subject", "pixels", "--timing-rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["run", *few, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")])
    study.main()
    assert re.search(r"study: about \d+ minutes", capsys.readouterr().out)
    first = json.loads((tmp_path / "out/study.json").read_text())
    assert {entry["family"] for entry in first["arms"]} == {"headline", "estimates"}
    for name in ("study.md", "study-decided.png", "study-estimates.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    lost = next((tmp_path / "work").rglob("True_c=*.json"))
    lost.unlink()
    study.main()
    assert json.loads((tmp_path / "out/study.json").read_text()) == first
    assert lost.exists()


def test_errors_are_one_sentence_with_the_remedy(bench, plan, tmp_path, monkeypatch, capsys):
    for line, words in (
        ("--scenes 1", "--scenes is 1; need at least 2"),
        ("--noises 0", "--noises is 0; need at least 1"),
        ("--few 12", "--few is 12; need a multiple of 8"),
        ("--seed 0", "training drew its scenes from; give another"),
        (f"--seed {HELD_OUT_SEED}", "training drew its scenes from; give another"),
        (f"--readme {tmp_path / 'none.md'}", "No such file"),
    ):
        monkeypatch.setattr(sys, "argv", ["study.py", *line.split()])
        with pytest.raises(SystemExit):
            study.arguments()
        assert words in capsys.readouterr().err
    for spec in ("vgg", "clip:", "dino"):
        with pytest.raises(ValueError, match=rf"the encoder is '{spec}'; need tiny, pixels, clip:NAME"):
            study.encoder(spec)

    study.check_work(tmp_path, plan, "weights")
    study.check_work(tmp_path, plan, "weights")
    with pytest.raises(ValueError, match=r"was begun with seed .*; give --work another folder"):
        study.check_work(tmp_path, replace(plan, seed=1), "weights")
    with pytest.raises(ValueError, match="was begun with weights weights, not others"):
        study.check_work(tmp_path, plan, "others")
    (tmp_path / "plan.json").write_text('{"another program": 1}')
    with pytest.raises(ValueError, match="was begun with another program 1, not None"):
        study.check_work(tmp_path, plan, "weights")
    for name, read in (
        ("plan.json", lambda: study.check_work(tmp_path, plan, "weights")),
        ("timing.json", lambda: study.timings(bench, tmp_path, [BASELINE], 1)),
    ):
        (tmp_path / name).write_text('{"half')
        with pytest.raises(SystemExit, match=rf"study: .*{name} is broken .*: delete it, and it is made again"):
            read()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"a plot needs matplotlib: pip install 'minisvd\[study\]'"):
        plotting()


def test_the_arms_are_timed_in_turn(bench):
    seconds = study.time_arms(bench, [BASELINE, Arm(True, 1), Arm(reuse=0)], rounds=2)
    assert set(seconds) == {"lossless", "True c=1 mean", "lossless reuse 0"}
    assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())


def test_the_expected_time_counts_the_calls_that_are_made(bench):
    """As a hook on the networks counts clips: of arms that share steps, each step once. Nothing to do is no call."""
    arms = [Arm(True, 3, "cond"), BASELINE, Arm(cut_step=3), Arm(estimate=3), Arm(steps=2), RELEASED]
    seen, unit = [], Unit(0, 0, 1)
    hooks = [
        unet.register_forward_hook(lambda _module, given, _out: seen.append(len(given[0])))
        for unet in bench.unets.values()
    ]
    walks = Walks(bench, study.draw(bench, unit))
    for arm in arms:
        walks.end(arm)
    for hook in hooks:
        hook.remove()
    calls, videos = study.amount(bench, {unit: arms})
    print(f"{calls} calls, {videos} videos")
    assert calls == sum(seen) == (8 + 2) + 8 + 2 + 4 + 8
    assert videos == len(arms)
    assert study.amount(bench, {}) == (0, 0)
