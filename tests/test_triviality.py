"""Proposition: `minisvd.check` tells the truth, in numbers, about attention that is trivial and that is not.

Ours and diffusers' over one key are; over two keys, under a gate of the query, or where a mask leaves some queries
two keys, they are not. `minisvd verify` says so of every site of a model.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention as DiffusersAttention
from torch import Tensor, nn

import minisvd
from conftest import randomised
from minisvd import check, check_model, sites, triviality
from minisvd.attention import Attention
from minisvd.cli import main
from minisvd.sites import cross_attentions
from minisvd.triviality import context_effect, dead_parameters, folded, linear_map, query_effect
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
    assert report.query == 0
    assert report.affinity <= (1e-14 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps)
    assert report.dead == {"to_q.weight": C * C, "to_k.weight": C * C_CONTEXT}
    assert report.control is not None
    assert report.control.dead == {}
    assert min(report.control.query, report.control.affinity) > 0.1


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
    assert report.query == 0
    assert list(report.dead) == ["to_q.weight", "to_q.bias", "to_k.weight", "to_k.bias"]
    assert report.control is not None
    assert list(report.control.dead) == ["to_k.bias"]


def test_two_keys_of_which_a_mask_hides_one_are_trivial():
    """One key that is seen is one key; the control's third key is seen."""
    report = check(Masked(lambda _query, key: (key != 1)[None]), *inputs(keys=2))
    print(report)
    assert report.holds
    assert report.query == 0


# --- what is not ----------------------------------------------------------------------------------------------------


def test_two_keys_are_not_trivial():
    report = check(ours(), *inputs(keys=2))
    assert not report.holds
    assert report.query > 0.1
    assert report.affinity > 0.1
    assert report.dead == {}


def test_a_mask_that_leaves_one_query_two_keys_is_not_trivial():
    """All queries see the first key, the last query sees both: the change is that query's, and as large as unmasked."""
    module = Masked(lambda query, key: (key == 0) | (query == 4))
    report = check(module, *inputs(keys=2))
    assert not report.holds
    x, context = inputs(keys=2)
    assert query_effect(module, x[:, :4], context) == 0  # control: without the last query
    assert report.query > 0.1


@pytest.mark.parametrize("strength", [1.0, 1e-3])
def test_a_gate_of_the_query_is_found_and_measured(strength):
    """However weak, and in proportion. The output is still affine in the context, the attention's to_q still dead."""
    x, context = (t.double() for t in inputs())
    report = check(Gated(strength).double(), x, context)
    print(report)
    assert not report.holds
    assert 0.1 * strength < report.query < 20 * strength
    assert report.affinity <= report.tolerance
    assert list(report.dead) == ["attention.to_q.weight", "attention.to_k.weight"]


def test_a_map_that_is_not_affine_is_found_and_measured():
    """c + 0.01 c^2 deviates by 0.01 a (1 - a) (c' - c)^2, at a = 2 and -1 the most."""
    x, context = (t.double() for t in inputs())
    redraw, defects, ends = triviality.Redraw(), [], []
    for a in (-1.0, 0.5, 2.0):
        other = redraw(context)
        defects.append(0.01 * abs(a * (1 - a)) * (other - context).square().max().item())
        ends.append(((1 - a) * (context + 0.01 * context**2)).abs() + (a * (other + 0.01 * other**2)).abs())
    _, found = context_effect(lambda _x, c: c + 0.01 * c**2, x, context)
    assert found == pytest.approx(max(defects) / torch.stack(ends).max().item())
    report = check(lambda _x, c: c + 0.01 * c**2, x, context)
    assert report.finding[0] == "not trivial"
    assert "off a linear map" in report.finding[1]


def test_a_linear_map_is_no_attention_and_the_report_says_why():
    """It passes what it should, but no second key makes it fail: that, and nothing else, is said in the first line."""
    linear = nn.Linear(C_CONTEXT, C)
    report = check(lambda _x, context: linear(context), *inputs(), linear)
    assert report.query <= report.tolerance >= report.affinity
    assert report.dead == {}
    assert not report.holds
    assert str(report).startswith("undecided: only the control failed: a second key brings in no query: linear")
    mean = check(lambda _x, context: linear(context).mean(dim=1, keepdim=True), *inputs(), linear)
    assert "brings in no query" in mean.finding[1]

    x, context = inputs()

    def added(x: Tensor, context: Tensor) -> Tensor:
        return (context.shape[1] > 1) * x + linear(context).mean(dim=1, keepdim=True)

    assert "it stays linear in two keys" in check(added, x, context, linear).finding[1]  # one of the two is not enough


def test_dead_needs_both_no_gradient_and_no_influence():
    """round(s) has influence without gradient; p - detach(p) has gradient without influence; q has neither."""

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.q = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([2.0]))
            self.s, self.zero_d = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor(2.0))

        def forward(self, _x: Tensor, context: Tensor) -> Tensor:
            return context * (self.p - self.p.detach()) + context * (8 * self.s).round() + 0 * context

    toy = Toy()
    assert dead_parameters(toy, *inputs(), toy) == {"q": 1, "zero_d": 1}


def test_behind_a_zero_projection_all_but_it_is_dead():
    """At these weights; the control says that a second key would not show, and why."""
    attention = ours()
    nn.init.zeros_(attention.to_out.get_parameter("0.weight"))
    report = check(attention, *inputs())
    assert list(report.dead) == [*DEAD, "to_v.weight"]
    assert str(report).startswith("undecided: only the control failed: the output is one constant, as behind a projec")
    nn.init.zeros_(attention.to_out.get_parameter("0.bias"))
    assert check(attention, *inputs()).finding == report.finding


# --- what is lost in rounding, and what is no proof ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_residual_added_and_taken_off_is_trivial_to_rounding(dtype):
    """cross(x) - x, where cross adds x: some eps are left of the query, but no more; and of two keys all of it."""
    attention, (x, context) = ours().to(dtype), (t.to(dtype) for t in inputs())
    report = check(lambda x, c: (attention(x, c) + x) - x, x, context, attention)
    print(report)
    assert report.holds
    assert 0 < report.query < 32 * torch.finfo(dtype).eps
    assert str(report).splitlines()[0].endswith("to rounding")
    assert str(check(attention, x, context)).splitlines()[0].endswith("to the bit")  # control
    x, two = (t.to(dtype) for t in inputs(keys=2))
    assert check(lambda x, c: (attention(x, c) + x) - x, x, two, attention).verdict == "not trivial"


def test_packed_queries_and_keys_are_dead_rows():
    """Of torch's MultiheadAttention: rows 0 to 2c of its weight and of its bias; with two keys the key's bias alone."""
    attention = randomised(nn.MultiheadAttention(C, HEADS, batch_first=True))
    x, context = noise(2, 5, C), noise(2, 1, C, seed=1)
    report = check(lambda x, c: attention(x, c, c)[0], x, context, attention)
    print(report)
    assert report.holds
    assert report.dead == {f"in_proj_weight[0:{2 * C}]": 2 * C * C, f"in_proj_bias[0:{2 * C}]": 2 * C}
    assert report.control is not None
    assert report.control.dead == {f"in_proj_bias[{C}:{2 * C}]": C}


def test_a_bias_of_the_keys_is_dead_with_two_keys_too():
    """Softmax cancels it: what is left is rounding, with which it would count as alive."""
    attention = randomised(DiffusersAttention(C, C_CONTEXT, heads=HEADS, dim_head=C // HEADS, bias=True)).double()
    x, context = (t.double() for t in inputs(keys=2))

    def attend(x: Tensor, context: Tensor) -> Tensor:
        return attention(x, encoder_hidden_states=context)

    assert check(attend, x, context, attention).dead == {"to_k.bias": C}
    assert dead_parameters(attend, x, context, attention, tolerance=0.0) == {}  # control: no number is left at zero


def test_tensors_of_a_run_under_inference_mode_are_taken():
    attention = ours()
    with torch.inference_mode():
        x, context = (t + 0 for t in inputs())
        inside = check(attention, x, context)
        loaded = copy.deepcopy(attention)
    assert x.is_inference()
    assert check(attention, x, context) == inside == check(attention, *inputs())
    assert next(loaded.parameters()).is_inference()
    assert check_model(loaded, x, context).holds


def test_a_module_that_insists_on_one_key_is_checked_without_control():
    attention = ours()

    def insists(x: Tensor, context: Tensor) -> Tensor:
        if context.shape[1] > 1:
            raise ValueError("one key")
        return attention(x, context)

    with pytest.raises(ValueError, match=r"a key more cannot be given \(one key\): leave it out, control=False"):
        check(insists, *inputs(), attention)
    report = check(insists, *inputs(), attention, control=False)
    assert report.holds
    assert report.control is None
    assert "no control was run: a linear layer is that too" in str(report).splitlines()[0]


@pytest.mark.parametrize("keys", [1, 2])
def test_a_report_is_five_short_lines_verdict_first_and_has_a_form_for_notebooks(keys):
    """With the largest numbers that there are, too."""
    attention = nn.MultiheadAttention(C, HEADS).eval()
    x, context = noise(5, 2, C), noise(keys, 2, C)
    report = check_model(attention, x, context, context, control=False).sites[0]
    large = {"parameters": 10**7, "macs": 10**11, "saves": (10**7, 10**11)}
    wide = [triviality.Report(**{**vars(report), **large, "control": more}) for more in (report, None)]
    assert any("a fold saves" in str(each) for each in wide) == (keys == 1)
    for each in (report, *wide):
        lines = str(each).splitlines()
        print(each)
        assert len(lines) <= 5
        assert max(map(len, lines)) <= 100
        assert lines[0].startswith(f"{each.verdict}: {each.finding[1]}")
        assert each._repr_html_().startswith(f"<details open><summary><b>{each.verdict}: ")
    strange = check(ours(), *inputs(), nn.ModuleDict({"<b>": nn.Linear(2, 2)}))
    assert "&lt;b&gt;" in strange._repr_html_()
    assert "<b>.weight" not in strange._repr_html_()


# --- what one can do with it ------------------------------------------------------------------------------------------


def test_a_trivial_attention_folds_to_the_linear_map_of_its_weights():
    """Asked of the function alone; and what the fold saves is what the two have, and multiply, less than it."""
    attention, (x, context) = ours().double(), (t.double() for t in inputs())
    linear, (weight, bias) = folded(attention, x, context), linear_map(attention)
    assert (linear.weight - weight).abs().max() <= 1e-13 > (linear.bias - bias).abs().max()
    assert (linear(context) - attention(x, context)).abs().max() <= 1e-13
    assert (folded(attention, x, context.expand(-1, 77, -1)).weight - weight).abs().max() <= 1e-12

    report, (b, s, _) = check(attention, x, context), x.shape
    assert (
        report.macs == 2 * b * s * C * C + 2 * b * C_CONTEXT * C + 2 * b * s * C
    )  # to_q, to_out; to_k, to_v; q k, a v
    kept = sum(p.numel() for p in linear.parameters())
    assert report.saves == (sum(p.numel() for p in attention.parameters()) - kept, report.macs - b * C_CONTEXT * C)
    assert f"a fold saves: {report.saves[0]:,} of {report.parameters:,} parameters" in str(report)
    two = check(attention, x, torch.cat([context, context + 1], dim=1))  # control
    assert two.saves == (0, 0)
    assert "fold" not in str(two)


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
    assert "dead: not looked for" in str(check(lambda x, context: attention(x, context), x, context))
    with pytest.raises(ValueError, match="attend returns a tuple"):
        check(lambda x, context: (attention(x, context),), x, context, attention)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="not finite"):
        check(attention, x, context / 0)
    with pytest.raises(ValueError, match=r"from call to call: call \.eval\(\)"):
        check(lambda x, context: F.dropout(attention(x, context)), x, context, attention)


# --- the sites of a model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "heads"), [(320, 5), (1280, 20)])
def test_a_site_of_the_released_size_holds(width, heads):
    site = check_model(Attention(width, heads, 1024), noise(6, 4, width), noise(2, 1, 1024)).sites[0]
    print(site)
    assert site.holds
    assert list(site.dead) == list(DEAD)
    assert 0 < site.affinity <= 1e-14


def test_the_released_unet_has_32_sites_and_a_cut_one_none():
    with torch.device("meta"):
        counts = [len(cross_attentions(SpatioTemporalUNet(UNetConfig(), vcut))) for vcut in (False, True, "lossless")]
    assert counts == [32, 0, 0]


def test_verify_checks_every_site(tiny_folder: Path, capsys: pytest.CaptureFixture[str]):
    """The totals, then a row for each site; status 0. Nothing but the bar on stderr."""
    assert main(["verify", "--model", str(tiny_folder)]) == 0
    out = capsys.readouterr().out
    print(out)
    holding, dead, share, saved, head, *rows = out.splitlines()
    assert holding == "22 of 22 sites are trivial"
    assert dead == "dead in them: to_k, to_q"
    assert share.startswith("that is 111,616 of ")
    assert saved.startswith("a fold saves 171,008 of them and ")
    assert head.split()[:4] == ["site", "keys", "verdict", "query"]
    assert len(rows) == 22
    assert len({row.split()[0] for row in rows}) == 22
    assert [row.split()[0] for row in rows[:2]] == ["down.0.attentions.0.0", "down.0.attentions.0.temporal.0"]
    assert all(row.split()[1:3] == ["1", "trivial"] for row in rows)


def test_what_a_fold_saves_is_what_the_fold_leaves_out(tiny_folder: Path):
    """But for the norms before, which our fold takes out as well, and which no attention knows of."""
    unet = minisvd.load_unet(tiny_folder)
    small = minisvd.fold(unet, "lossless")
    norms = sum(p.numel() for name, p in unet.named_parameters() if "norm2" in name and "transformer" in name)
    before, after = (sum(p.numel() for p in module.parameters()) for module in (unet, small))
    report = check_model(unet)
    assert norms > 0
    assert sum(site.saves[0] for site in report.sites) == before - after - norms
    assert not check_model(small).sites  # control


def test_verify_as_json_has_every_number(tiny_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "--model", str(tiny_folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    table = report["sites"]
    assert report["hold"] == len(table) == 22
    assert report["vcut"] is False
    assert all(row["holds"] and row["query"] == 0 and row["keys"] == 1 for row in table)
    assert all(row["affinity"] <= 1e-12 and row["control"]["query"] > 0.01 for row in table)
    assert report["dead_parameters"] == sum(sum(row["dead"].values()) for row in table) == 111_616


@pytest.mark.slow
@pytest.mark.parametrize("power", [0, 1])
def test_verify_fails_with_1_where_a_site_is_not_its_linear_map(
    power, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """One site that is a billionth off, with (1) or without (0) its query: its row says so."""

    class Leaky(Attention):
        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return super().forward(x, context) + 1e-9 * x**power

    def leak(source: str, **options: Any) -> tuple[Any, int]:
        unet = minisvd.load_unet(source, **options)
        next(iter(cross_attentions(unet).values())).__class__ = Leaky
        return unet, 1

    monkeypatch.setattr(sites, "load_any", leak)
    assert main(["verify", "--model", str(tiny_folder)]) == 1
    holding, _, _, _, _, first, second, *_ = capsys.readouterr().out.splitlines()
    assert holding == "21 of 22 sites are trivial"
    assert "not trivial" in first
    assert "not trivial" not in second


@pytest.mark.parametrize(("vcut", "linear"), [(True, 11), ("lossless", 22)])
def test_verify_says_that_a_cut_model_is_linear_already(vcut, linear, capsys, monkeypatch):
    unet = SpatioTemporalUNet(UNetConfig(8, 4, (32, 64, 64), (True, True, False), (2, 4, 4), 2, C_CONTEXT, 16), vcut)
    monkeypatch.setattr(sites, "load_unet", lambda *_args, **_kwargs: unet)
    assert main(["verify"]) == 0
    built = f"the UNet is built with vcut={vcut!r}, {linear} sites are linear maps already"
    said = f"nothing to check: {built}; give the model that it was converted from\n"
    assert capsys.readouterr().out == said
