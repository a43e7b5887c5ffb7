"""Proposition: `minisvd.triviality` tells the truth, in numbers, about attention that is trivial and that is not.

Ours and diffusers' over one key are; over two keys, under a gate of the query, or where a mask leaves some queries
two keys, they are not. `minisvd verify` says so of every site of a model.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention as DiffusersAttention
from torch import Tensor, nn

from conftest import randomised
from minisvd import checkpoint, triviality
from minisvd.attention import Attention
from minisvd.cli import main
from minisvd.triviality import (
    affinity,
    check,
    check_site,
    cross_attentions,
    dead_parameters,
    query_sensitivity,
    two_key_control,
)
from minisvd.unet import SpatioTemporalUNet, UNetConfig

C, HEADS, C_CONTEXT = 64, 4, 48
DEAD = ("to_q.weight", "to_k.weight")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ours() -> Attention:
    return randomised(Attention(C, HEADS, C_CONTEXT))


def inputs(keys: int = 1) -> tuple[Tensor, Tensor]:
    return noise(2, 5, C), noise(2, keys, C_CONTEXT, seed=1)


class Masked(nn.Module):
    """Our attention under a mask [s, k] made for the number of keys by `rule`: True may be seen."""

    def __init__(self, rule: Any) -> None:
        super().__init__()
        self.attention, self.rule = ours(), rule

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        a = self.attention
        q, k, v = (
            to(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for to, tokens in ((a.to_q, x), (a.to_k, context), (a.to_v, context))
        )
        mask = self.rule(torch.arange(x.shape[1])[:, None], torch.arange(context.shape[1]))
        return a.to_out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """sigmoid(strength * gate(x)) * attention(x, context)."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.attention, self.gate, self.strength = ours(), randomised(nn.Linear(C, 1)), strength

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return torch.sigmoid(self.strength * self.gate(x)) * self.attention(x, context)


# --- what is trivial ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_our_attention_over_one_key_is_trivial(dtype):
    """The query moves nothing, to the bit; the context moves it affinely, to rounding; to_q and to_k are dead."""
    x, context = (t.to(dtype) for t in inputs())
    report = check(ours().to(dtype), x, context)
    print(report)
    assert report.holds
    assert report.query.change == report.query.gradient == 0
    assert report.affinity.relative <= (1e-14 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps)
    assert report.dead.names == DEAD
    assert report.dead.numel == C * C + C * C_CONTEXT
    assert report.control.dead.names == ()
    assert min(report.control.query.relative, report.control.affinity.relative) > 0.1


@pytest.mark.parametrize("fused", [True, False])
def test_diffusers_attention_over_one_key_is_trivial(fused):
    """Adapted by a lambda, with either of its kernels; a key's bias is dead even with two keys, a query's is not."""
    attn = randomised(DiffusersAttention(C, C_CONTEXT, heads=HEADS, dim_head=C // HEADS, bias=True))
    if not fused:
        from diffusers.models.attention_processor import AttnProcessor

        attn.set_processor(AttnProcessor())
    x, context = inputs()
    report = check(lambda x, context: attn(x, encoder_hidden_states=context), x, context, attn)
    print(report)
    assert report.holds
    assert report.query.change == report.query.gradient == 0
    assert report.dead.names == ("to_q.weight", "to_q.bias", "to_k.weight", "to_k.bias")
    rounding = two_key_control(
        lambda x, context: attn(x, encoder_hidden_states=context), x, context, attn, tolerance=1e-6
    )
    assert rounding.dead.names == ("to_k.bias",)


def test_two_keys_of_which_a_mask_hides_one_are_trivial():
    """One key that is seen is one key; the control's third key is seen."""
    report = check(Masked(lambda _query, key: (key != 1)[None]), *inputs(keys=2))
    print(report)
    assert report.holds
    assert report.query.change == 0


# --- what is not ----------------------------------------------------------------------------------------------------


def test_two_keys_are_not_trivial():
    report = check(ours(), *inputs(keys=2))
    assert not report.holds
    assert report.query.change > 0.1
    assert report.query.gradient > 0.01
    assert report.affinity.relative > 0.1
    assert report.dead.names == ()


def test_a_mask_that_leaves_one_query_two_keys_is_not_trivial():
    """All queries see the first key, the last query sees both: the change is that query's, and as large as unmasked."""
    module = Masked(lambda query, key: (key == 0) | (query == 4))
    report = check(module, *inputs(keys=2))
    assert not report.holds
    assert not report.query.holds
    x, context = inputs(keys=2)
    unmasked = query_sensitivity(module, x[:, :4], context)  # control: without the last query
    assert unmasked.holds
    assert report.query.change > 0.1 > unmasked.change


@pytest.mark.parametrize("strength", [1.0, 1e-3])
def test_a_gate_of_the_query_is_found_and_measured(strength):
    """However weak, and in proportion. The output is still affine in the context, the attention's to_q still dead."""
    x, context = (t.double() for t in inputs())
    report = check(Gated(strength).double(), x, context)
    print(report)
    assert not report.holds
    assert not report.query.holds
    assert 0.1 * strength < report.query.relative < 20 * strength
    assert report.affinity.holds
    assert report.dead.names == ("attention.to_q.weight", "attention.to_k.weight")


def test_a_map_that_is_not_affine_is_found_and_measured():
    """c + 0.01 c^2 deviates by 0.01 a (1 - a) (c' - c)^2, at a = 2 and -1 the most."""
    x, context = (t.double() for t in inputs())
    found = affinity(lambda _x, c: c + 0.01 * c**2, x, context)
    other = triviality.Redraw()
    largest = max(0.01 * abs(a * (1 - a)) * (other(context) - context).square().max().item() for a in (-1.0, 0.5, 2.0))
    assert not found.holds
    assert found.defect == pytest.approx(largest)


def test_a_linear_map_is_no_attention():
    """It passes what it should, but no second key makes it fail: the control does not hold."""
    linear = nn.Linear(C_CONTEXT, C)
    report = check(lambda _x, context: linear(context), *inputs(), linear)
    assert report.query.holds
    assert report.affinity.holds
    assert report.dead.names == ()
    assert not report.control.holds
    assert not report.holds

    x, context = inputs()
    added = two_key_control(lambda x, context: x + linear(context).mean(dim=1, keepdim=True), x, context, linear)
    assert not added.query.holds
    assert added.affinity.holds
    assert not added.holds  # one of the two is not enough


def test_dead_needs_both_no_gradient_and_no_influence():
    """round(p) has influence without gradient; p - detach(p) has gradient without influence; q has neither."""

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.q = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([2.0]))
            self.s = nn.Parameter(torch.tensor([2.0]))

        def forward(self, _x: Tensor, context: Tensor) -> Tensor:
            return context * (self.p - self.p.detach()) + context * (8 * self.s).round() + 0 * context

    found = dead_parameters(Toy(), *inputs())
    p, q, s = found.parameters
    assert found.names == ("q",)
    assert p.gradient > 0 == p.change
    assert s.gradient == 0 < s.change
    assert q.gradient == q.change == 0


def test_behind_a_zero_projection_all_but_it_is_dead():
    """At these weights, and the control says that a second key would not show."""
    attention = ours()
    nn.init.zeros_(attention.to_out.get_parameter("0.weight"))
    report = check(attention, *inputs())
    assert report.dead.names == (*DEAD, "to_v.weight")
    assert not report.control.holds


# --- how it measures ------------------------------------------------------------------------------------------------


def test_a_check_leaves_the_module_and_torch_as_they_were():
    attention = ours()
    attention.to_q.requires_grad_(False)
    before, state = {k: v.clone() for k, v in attention.state_dict().items()}, torch.get_rng_state()
    with torch.no_grad():
        first, second = check(attention, *inputs()), check(attention, *inputs())
    assert first == second
    assert all(torch.equal(before[k], v) for k, v in attention.state_dict().items())
    assert [p.requires_grad for p in attention.parameters()] == [False, True, True, True, True]
    assert all(p.grad is None for p in attention.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_what_cannot_be_measured_is_refused():
    x, context = inputs()
    attention = ours()
    with pytest.raises(ValueError, match=r"context is \[2, 48\]; need \[b, k, c'\]"):
        check(attention, x, context[:, 0])
    with pytest.raises(ValueError, match="at least one key"):
        check(attention, x, context[:, :0])
    with pytest.raises(ValueError, match="attend is a function"):
        check(lambda x, context: attention(x, context), x, context)
    with pytest.raises(ValueError, match="attend returns a tuple"):
        check(lambda x, context: (attention(x, context),), x, context, attention)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="not finite"):
        check(attention, x, context / 0)
    with pytest.raises(ValueError, match=r"from call to call: call \.eval\(\)"):
        check(lambda x, context: F.dropout(attention(x, context)), x, context, attention)


# --- the sites of a model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "heads"), [(320, 5), (1280, 20)])
def test_a_site_of_the_released_size_holds(width, heads):
    site = check_site("attn2", Attention(width, heads, 1024))
    print(f"width {width}: |attention - linear| {site.relative:.1e}")
    assert site.holds
    assert 0 < site.relative <= 1e-14


def test_the_released_unet_has_32_sites_and_a_cut_one_none():
    with torch.device("meta"):
        counts = [len(cross_attentions(SpatioTemporalUNet(UNetConfig(), vcut))) for vcut in (False, True, "lossless")]
    assert counts == [32, 0, 0]


def test_verify_checks_every_site(tiny_folder: Path, capsys: pytest.CaptureFixture[str]):
    """A row for each site, then the totals; status 0. Nothing but the bar on stderr."""
    assert main(["verify", "--model", str(tiny_folder)]) == 0
    out = capsys.readouterr().out
    print(out)
    head, *rows, holding, dead = out.splitlines()
    assert head.split()[:3] == ["site", "kind", "width"]
    assert len(rows) == 22
    assert all(row.split()[1] in ("SCA", "TCA") and "FAILS" not in row for row in rows)
    assert holding.startswith("22 of 22 sites hold")
    assert dead.startswith("dead in them: to_k, to_q, 111,616 of ")


def test_verify_as_json_has_every_number(tiny_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "--model", str(tiny_folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    table = report["sites"]
    assert report["hold"] == len(table) == 22
    assert report["vcut"] is False
    assert all(row["holds"] and row["report"]["query"]["change"] == 0 for row in table)
    assert all(row["error"] <= 1e-12 * row["magnitude"] for row in table)
    widths = [row["width"] for row in table]
    assert report["dead_parameters"] == sum(c * c + c * C_CONTEXT for c in widths)


@pytest.mark.parametrize("power", [0, 1])
def test_verify_fails_with_1_where_a_site_is_not_its_linear_map(
    power, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """One site that is a billionth off, with (1) or without (0) its query: its row says FAILS and by how much."""

    class Leaky(Attention):
        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return super().forward(x, context) + 1e-9 * x**power

    def leak(unet: nn.Module) -> dict[str, Attention]:
        sites = cross_attentions(unet)
        next(iter(sites.values())).__class__ = Leaky
        return sites

    monkeypatch.setattr(triviality, "cross_attentions", leak)
    assert main(["verify", "--model", str(tiny_folder)]) == 1
    _, first, why, *rows, holding, _ = capsys.readouterr().out.splitlines()
    assert why.strip().startswith("FAILS, dead: ")
    assert "e-09" in first
    assert not any("FAILS" in row for row in rows)
    assert holding.startswith("21 of 22 sites hold")


@pytest.mark.parametrize(("vcut", "linear"), [(True, 11), ("lossless", 22)])
def test_verify_says_that_a_cut_model_is_linear_already(vcut, linear, capsys, monkeypatch):
    unet = SpatioTemporalUNet(UNetConfig(8, 4, (32, 64, 64), (True, True, False), (2, 4, 4), 2, C_CONTEXT, 16), vcut)
    monkeypatch.setattr(checkpoint, "load_unet", lambda *_args, **_kwargs: unet)
    assert main(["verify"]) == 0
    built = f"the UNet is built with vcut={vcut!r}, {linear} sites are linear maps already"
    said = f"nothing to check: {built}; give the model that it was converted from\n"
    assert capsys.readouterr().out == said
