"""Theorem: the sampler is EDM's: closed-form noise levels, a first-order solver of the right ODE, a linear ramp."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from minisvd import GuidanceSchedule, edm_sigmas, guided_denoiser, preconditioning, sample_euler
from minisvd.sampler import AYS, ays_sigmas


def test_sigmas_are_the_closed_form():
    """sigma_i = (max^(1/7) + i/(n-1) (min^(1/7) - max^(1/7)))^7, then 0."""
    n = 25
    closed = [(700 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 700 ** (1 / 7))) ** 7 for i in range(n)]
    sigmas = edm_sigmas(n)
    assert sigmas.dtype == torch.float32
    assert torch.equal(sigmas, torch.tensor([*closed, 0.0], dtype=torch.float64).float())
    assert not torch.allclose(sigmas, edm_sigmas(n, rho=6.0))  # control: another rho


def test_one_step_starts_at_the_top():
    assert edm_sigmas(1).tolist() == [700.0, 0.0]


def test_align_your_steps_are_the_published_levels_and_lines_between_their_logarithms():
    assert ays_sigmas(10).tolist() == torch.tensor([*AYS, 0.0]).tolist()
    assert AYS[::9] == (700.0, 0.034)
    nineteen = ays_sigmas(19)
    torch.testing.assert_close(nineteen[:-1:2], ays_sigmas(10)[:-1])
    torch.testing.assert_close(nineteen[1:-1:2], (nineteen[:-2:2] * nineteen[2:-1:2]).sqrt())
    assert not torch.allclose(nineteen[1:-1:2], (nineteen[:-2:2] + nineteen[2:-1:2]) / 2, rtol=0.1)  # control
    for n in (1, 2, 3, 25, 1000):
        levels = ays_sigmas(n)
        assert len(levels) == n + 1
        assert (levels.diff() < 0).all()
        assert (levels[0], levels[-1]) == (pytest.approx(700), 0)


def test_preconditioning_is_v_prediction():
    """c_skip = c_in^2, c_out = -sigma c_in, c_noise = ln(sigma) / 4; so (c_in, c_out) is a unit vector."""
    sigma = torch.tensor([0.002, 0.5, 1.0, 30.0, 700.0], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = preconditioning(sigma)
    torch.testing.assert_close(c_skip, c_in**2)
    torch.testing.assert_close(c_out, -sigma * c_in)
    torch.testing.assert_close(c_noise, sigma.log() / 4)
    torch.testing.assert_close(c_in**2 + c_out**2, torch.ones_like(sigma))  # a rotation by atan(sigma)


def gaussian_error(n: int, *, data_std: float = 0.5, wrong: float = 0.0) -> float:
    """Relative error at the end of n Euler steps for data N(0, s^2), whose denoiser is D = x s^2 / (s^2 + sigma^2).

    dx/dsigma = x sigma / (s^2 + sigma^2) has the solution x(sigma) = x(m) sqrt((s^2 + sigma^2) / (s^2 + m^2)).
    """

    def denoise(x: Tensor, sigma: Tensor, _step: int) -> Tensor:
        return x * data_std**2 / (data_std**2 + sigma**2) * (1 + wrong)

    noise = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    sigmas = edm_sigmas(n, sigma_max=80.0)
    start = noise * math.sqrt(1 + 80.0**2)
    exact = start * data_std / math.sqrt(data_std**2 + 80.0**2)
    return ((sample_euler(denoise, noise, sigmas) - exact).norm() / exact.norm()).item()


def test_euler_solves_the_ode_at_first_order():
    """Twice the steps, half the error: the slope of log error over log steps is -1 within 0.1."""
    steps = [64, 128, 256, 512]
    errors = [gaussian_error(n) for n in steps]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    print("errors", errors, "orders", slopes)
    assert all(abs(slope - 1) < 0.1 for slope in slopes)
    assert gaussian_error(512, wrong=0.05) > 5 * errors[-1]  # control: a denoiser that is 5 % off does not converge


def test_every_step_is_seen_and_nothing_else_is_random():
    seen: list[tuple[int, float]] = []

    def keep(step: int, sigma: Tensor, _latents: Tensor, _denoised: Tensor) -> None:
        seen.append((step, sigma.item()))

    state = torch.random.get_rng_state()
    noise = torch.randn(1, 2, 4, 2, 2, generator=torch.Generator().manual_seed(0))

    def run() -> Tensor:
        return sample_euler(lambda x, _s, _i: 0.5 * x, noise, edm_sigmas(4), keep)

    first = run()
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert [sigma for _, sigma in seen] == edm_sigmas(4)[1:].tolist()
    assert torch.equal(first, run())
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.dtype == torch.float32


class LinearUNet:
    """A real, if small, network that is called as the UNet is, and records how."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self.conditions = 0

    def condition(self, image_embeds: Tensor) -> Tensor:
        self.conditions += 1
        return image_embeds.clone()

    def __call__(
        self, sample: Tensor, c_noise: Tensor, image_embeds: Tensor, added_time_ids: Tensor, conditions: Tensor
    ) -> Tensor:
        assert torch.equal(conditions, image_embeds)
        self.calls.append((sample, image_embeds, added_time_ids))
        scale = 1 + image_embeds.mean(dim=(1, 2)) + added_time_ids.sum(dim=1) + c_noise
        return sample[:, :, :4] * scale[:, None, None, None, None] + sample[:, :, 4:]


def condition(b: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(b, 1, 6, generator=generator), torch.randn(b, 4, 2, 2, generator=generator), torch.rand(b, 3)


def test_scale_grows_linearly_over_the_frames():
    """D = D_0 + scale (D_c - D_0): the ramp is read back from the guided output, frame by frame."""
    schedule = GuidanceSchedule(1.0, 3.0)
    assert schedule.scales(5).tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]
    x, sigma = torch.randn(1, 5, 4, 2, 2, generator=torch.Generator().manual_seed(1)), torch.tensor(2.0)
    embeds, latent, ids = condition()
    conditional = guided_denoiser(LinearUNet(), embeds, latent, ids, GuidanceSchedule(1.0, 1.0))(x, sigma, 1)
    zero = guided_denoiser(
        LinearUNet(), torch.zeros_like(embeds), torch.zeros_like(latent), ids, GuidanceSchedule(1.0, 1.0)
    )(x, sigma, 1)
    guided = guided_denoiser(LinearUNet(), embeds, latent, ids, schedule)(x, sigma, 1)
    ramp = ((guided - zero) / (conditional - zero)).mean(dim=(0, 2, 3, 4))
    torch.testing.assert_close(ramp, torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0]), rtol=1e-3, atol=1e-3)


def test_unconditional_branch_has_zero_embedding_and_latent_and_keeps_the_numbers():
    unet = LinearUNet()
    embeds, latent, ids = condition(2)
    x = torch.randn(2, 3, 4, 2, 2)
    guided_denoiser(unet, embeds, latent, ids, GuidanceSchedule(1.0, 2.0))(x, torch.tensor(1.0), 1)
    ((sample, seen_embeds, seen_ids),) = unet.calls
    assert sample.shape == (4, 3, 8, 2, 2)
    assert not seen_embeds[:2].any()
    assert not sample[:2, :, 4:].any()
    assert torch.equal(seen_embeds[2:], embeds)
    assert torch.equal(sample[2:, 0, 4:], latent)
    assert torch.equal(seen_ids, torch.cat([ids, ids]))


@pytest.mark.parametrize(("cut_step", "guided"), [(None, 6), (1, 0), (4, 3), (6, 5), (7, 6), (99, 6)])
def test_guidance_stops_at_the_cut_step(cut_step, guided):
    """The UNet sees a batch of two in steps 1..c-1 and of one in steps c..N."""
    unet = LinearUNet()
    denoise = guided_denoiser(unet, *condition(), GuidanceSchedule(1.0, 2.0, cut_step))
    sample_euler(denoise, torch.randn(1, 3, 4, 2, 2), edm_sigmas(6))
    assert [len(sample) for sample, _, _ in unet.calls] == [2] * guided + [1] * (6 - guided)


@pytest.mark.parametrize("cut_step", [1, 4, 6])
def test_a_cut_is_a_stop_at_the_level_that_its_step_leaves(cut_step):
    """Bit for bit; and an interval leaves out both ends, its lower level included among them."""
    unet, sigmas, noise = LinearUNet(), edm_sigmas(6), torch.randn(1, 3, 4, 2, 2)
    given, stop = condition(), sigmas[cut_step - 1].item()

    def sampled(**schedule) -> Tensor:
        return sample_euler(guided_denoiser(unet, *given, GuidanceSchedule(1.0, 2.0, **schedule)), noise, sigmas)

    assert torch.equal(sampled(cut_step=cut_step), sampled(stop=stop))
    assert not torch.equal(sampled(cut_step=cut_step), sampled(stop=0.99 * stop))  # control
    unet.calls.clear()
    sampled(start=sigmas[1].item(), stop=sigmas[4].item())
    assert [len(sample) for sample, _, _ in unet.calls] == [1, 2, 2, 2, 1, 1]


@pytest.mark.parametrize(("stage2", "share"), [("mean", 0.5), ("cond", 1.0), ("uncond", 0.0)])
def test_stage_two_is_conditioned_on_its_share_of_the_embedding(stage2, share):
    """From the cut step on: the embedding times 1/2, 1 or 0, the image's latent and the numbers as they are."""
    unet, (embeds, latent, ids) = LinearUNet(), condition()
    denoise = guided_denoiser(unet, embeds, latent, ids, GuidanceSchedule(1.0, 2.0, 3, stage2))
    sample_euler(denoise, torch.randn(1, 3, 4, 2, 2), edm_sigmas(5))
    for sample, seen, numbers in unet.calls[2:]:
        torch.testing.assert_close(seen, share * embeds)
        assert torch.equal(sample[:, 0, 4:], latent)
        assert torch.equal(numbers, ids)
    assert torch.equal(unet.calls[1][1][1:], embeds)  # control: in stage one the conditional row has all of it
    assert unet.conditions == 2  # once for each stage


def test_no_cut_is_a_cut_beyond_the_end_bit_for_bit():
    noise = torch.randn(1, 3, 4, 2, 2, generator=torch.Generator().manual_seed(3))

    def run(cut_step: int | None) -> Tensor:
        return sample_euler(
            guided_denoiser(LinearUNet(), *given, GuidanceSchedule(1.0, 2.0, cut_step)), noise, edm_sigmas(6)
        )

    given = condition()
    assert torch.equal(run(None), run(7))
    assert not torch.equal(run(None), run(6))  # control


def test_bad_schedules_are_refused():
    with pytest.raises(ValueError, match=r"guidance is \(3.0, 1.0\)"):
        GuidanceSchedule(3.0, 1.0)
    with pytest.raises(ValueError, match="guidance"):
        GuidanceSchedule(float("nan"), 1.0)
    with pytest.raises(ValueError, match="cut_step is 0"):
        GuidanceSchedule(1.0, 2.0, 0)
    with pytest.raises(ValueError, match="stage2 is 'both'; need one of mean, cond, uncond"):
        GuidanceSchedule(1.0, 2.0, 3, "both")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="steps is 0"):
        edm_sigmas(0)
