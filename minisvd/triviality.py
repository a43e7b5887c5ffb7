"""Is a cross-attention trivial? Checks that measure it, for any callable attend(x, context) -> tokens.

    report = check(attend, x, context)       x [(b r), s, c] query tokens, context [b, k, c'] keys, as attend takes them
    report.holds; report.query.change; report.affinity.relative; report.dead.names; print(report)

    check(lambda x, context: attn(x, encoder_hidden_states=context), x, context, attn)       an Attention of diffusers

A softmax over one key is 1, so attention over one key is an affine map of that key, whatever the query: to_q and to_k
have neither effect nor gradient. Each check measures one of these consequences and `control` adds a second key, with
which they must fail. What is measured is this module with these weights at these inputs and at seeded redraws of them.

Exactness. In IEEE arithmetic exp(0) = 1, 1 / 1 = 1 and 1 * v = v, so on a CPU nothing of the query is left, not even
rounding, and the default tolerance is 0. On an accelerator exp may come out of a fused multiply-add: allow a few eps.
Gradients are taken through torch's written-out softmax: a fused kernel's backward gets 0 as the difference of two
sums of one value in two orders, and leaves about eps (which Adam, dividing by its size, makes a full step of).
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention import Attention

Attend = Callable[[Tensor, Tensor], Tensor]


# --- results --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuerySensitivity:
    """How far the output moves with the query; holds if it does not.

    change     largest |attend(x', context) - attend(x, context)| over redrawn queries x'
    gradient   largest |d <g, attend(x, context)> / dx| for a random g, which misses no Jacobian but by chance zero
    magnitude  largest |attend(x, context)|
    tolerance  of change and gradient, relative to magnitude
    """

    change: float
    gradient: float
    magnitude: float
    tolerance: float

    @property
    def relative(self) -> float:
        return ratio(max(self.change, self.gradient), self.magnitude)

    @property
    def holds(self) -> bool:
        return self.relative <= self.tolerance

    def __str__(self) -> str:
        verdict = "independent of the query" if self.holds else "depends on the query"
        return f"{verdict}: change {self.change:.1e}, gradient {self.gradient:.1e}, of {self.magnitude:.1e}"


@dataclass(frozen=True)
class Affinity:
    """How far the output is from affine in the context, f((1-a) c + a c') = (1-a) f(c) + a f(c').

    defect     largest difference of the two sides, over a in (-1, 1/2, 2) and redrawn c'
    magnitude  largest |(1-a) f(c)| + |a f(c')|
    tolerance  of defect, relative to magnitude
    """

    defect: float
    magnitude: float
    tolerance: float

    @property
    def relative(self) -> float:
        return ratio(self.defect, self.magnitude)

    @property
    def holds(self) -> bool:
        return self.relative <= self.tolerance

    def __str__(self) -> str:
        verdict = "affine in the context" if self.holds else "not affine in the context"
        return f"{verdict}: defect {self.defect:.1e} of {self.magnitude:.1e}, allowed {self.tolerance:.1e} of it"


@dataclass(frozen=True)
class Influence:
    """Of one parameter: the largest |d <g, output> / d parameter|, and largest |change| of the output if redrawn."""

    name: str
    numel: int
    gradient: float
    change: float


@dataclass(frozen=True)
class DeadParameters:
    """What each parameter does, the others staying as they are. Dead: no gradient AND no influence.

    magnitude  largest |output|
    tolerance  of a dead parameter's change, relative to magnitude, and gradient, relative to the largest of all
    """

    parameters: tuple[Influence, ...]
    magnitude: float
    tolerance: float

    @property
    def dead(self) -> tuple[Influence, ...]:
        steepest = max((p.gradient for p in self.parameters), default=0.0)
        return tuple(
            p
            for p in self.parameters
            if p.gradient <= self.tolerance * steepest and p.change <= self.tolerance * self.magnitude
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the dead ones."""
        return tuple(p.name for p in self.dead)

    @property
    def numel(self) -> int:
        """How many numbers are dead."""
        return sum(p.numel for p in self.dead)

    def __str__(self) -> str:
        alive = [f"{p.name} {p.gradient:.1e}/{p.change:.1e}" for p in self.parameters if p not in self.dead]
        total = sum(p.numel for p in self.parameters)
        dead = " ".join(self.names) or "none"
        return f"dead: {dead} ({self.numel:,} of {total:,}); gradient/influence of others: {' '.join(alive) or 'none'}"


@dataclass(frozen=True)
class TwoKeyControl:
    """The same measurements with one key more. Holds if the output then depends on the query and is not affine:
    the checks can fail on this module, and it was the single key that made it trivial."""

    query: QuerySensitivity
    affinity: Affinity
    dead: DeadParameters

    @property
    def holds(self) -> bool:
        return not self.query.holds and not self.affinity.holds

    def __str__(self) -> str:
        return f"with one key more: {self.query}; {self.affinity}; {self.dead}"


@dataclass(frozen=True)
class Report:
    """All four. Holds if the module is trivial and would not be with one key more."""

    query: QuerySensitivity
    affinity: Affinity
    dead: DeadParameters
    control: TwoKeyControl

    @property
    def holds(self) -> bool:
        return self.query.holds and self.affinity.holds and self.control.holds

    def __str__(self) -> str:
        return "\n".join(map(str, ("trivial" if self.holds else "not trivial", *vars(self).values())))


# --- checks ---------------------------------------------------------------------------------------------------------


def check(
    attend: Attend, x: Tensor, context: Tensor, module: nn.Module | None = None, *, tolerance: float = 0.0
) -> Report:
    """Every check below on attend(x, context), the parameters being those of `module`, or of `attend` itself.

    Sharpest in float64. Raises ValueError for a `context` that is not [b, k, c'], for an output that is no tensor, not
    finite or not the same twice, and where `attend` is no module and none is given.
    """
    query = query_sensitivity(attend, x, context, tolerance=tolerance)
    dead = dead_parameters(attend, x, context, module, tolerance=tolerance)
    control = two_key_control(attend, x, context, module, tolerance=tolerance)
    return Report(query, affinity(attend, x, context), dead, control)


def query_sensitivity(attend: Attend, x: Tensor, context: Tensor, *, tolerance: float = 0.0) -> QuerySensitivity:
    """Redraw the query at 0, 1 and 10 times its scale, and differentiate by it. Raises as `check` does."""
    out, redraw = first_output(attend, x, context), Redraw()
    with torch.no_grad():
        change = max(largest(attend(scale * redraw(x), context) - out) for scale in (0, 1, 10))
    leaf = x.detach().clone()
    (gradient,) = gradients(lambda: attend(leaf, context), [leaf])
    return QuerySensitivity(change, gradient, largest(out), tolerance)


def affinity(attend: Attend, x: Tensor, context: Tensor, *, tolerance: float | None = None) -> Affinity:
    """Compare the output at points of lines through `context` with the line through two of them.

    The default tolerance is rounding: 64 eps in float64 and float32, whose sums of about a thousand terms collect
    it; 8 eps in half precision, whose sums are float32 and only their ends rounded. Raises as `check` does.
    """
    out, redraw, defect, magnitude = first_output(attend, x, context), Redraw(), 0.0, 0.0
    with torch.no_grad():
        for a in (-1.0, 0.5, 2.0):
            other = redraw(context)
            ends = (1 - a) * out, a * attend(x, other)
            between = attend(x, torch.lerp(context, other, a))
            defect = max(defect, largest(between - ends[0] - ends[1]))
            magnitude = max(magnitude, largest(ends[0].abs() + ends[1].abs()))
    return Affinity(defect, magnitude, rounding(out.dtype) if tolerance is None else tolerance)


def dead_parameters(
    attend: Attend, x: Tensor, context: Tensor, module: nn.Module | None = None, *, tolerance: float = 0.0
) -> DeadParameters:
    """Differentiate by every parameter of `module` (by default `attend`), then redraw one after another.

    Parameters are written to and restored, bit for bit. At zero weights more is dead than in general: behind a zero
    to_out, all. Raises as `check` does.
    """
    module = attend if module is None and isinstance(attend, nn.Module) else module
    if module is None:
        raise ValueError("attend is a function, whose parameters cannot be seen: give the module they belong to")
    out, redraw = first_output(attend, x, context), Redraw()
    parameters = dict(module.named_parameters())
    steepness = gradients(lambda: attend(x, context), list(parameters.values()))
    influences = []
    for (name, parameter), gradient in zip(parameters.items(), steepness, strict=True):
        kept = parameter.detach().clone()
        with torch.no_grad():
            try:
                parameter.copy_(redraw(kept))
                change = largest(attend(x, context) - out)
            finally:
                parameter.copy_(kept)
        influences.append(Influence(name, parameter.numel(), gradient, change))
    return DeadParameters(tuple(influences), largest(out), tolerance)


def two_key_control(
    attend: Attend, x: Tensor, context: Tensor, module: nn.Module | None = None, *, tolerance: float = 0.0
) -> TwoKeyControl:
    """The checks above after a random key was appended to `context`. Raises as `check` does."""
    longer = torch.cat([context, Redraw()(context[:, :1])], dim=1)
    query = query_sensitivity(attend, x, longer, tolerance=tolerance)
    dead = dead_parameters(attend, x, longer, module, tolerance=tolerance)
    return TwoKeyControl(query, affinity(attend, x, longer), dead)


# --- the sites of a UNet --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SiteCheck:
    """One cross-attention of a UNet: its width c, the largest |attention - linear| and |attention|, and the report.

    Holds if the report does, exactly to_q and to_k are dead with one key and nothing is with two, and the attention
    is the linear map to 1e-12 of its magnitude.
    """

    name: str
    width: int
    error: float
    magnitude: float
    report: Report

    @property
    def relative(self) -> float:
        return ratio(self.error, self.magnitude)

    @property
    def holds(self) -> bool:
        dead, revived = self.report.dead.names, not self.report.control.dead.names
        return self.report.holds and dead == ("to_q.weight", "to_k.weight") and revived and self.relative <= 1e-12


def cross_attentions(unet: nn.Module) -> dict[str, Attention]:
    """The sites at which `unet` has a cross-attention: 32 in the released model, none where a vcut build has removed
    or replaced them."""
    return {name: m for name, m in unet.named_modules() if name.split(".")[-1] == "attn2" and isinstance(m, Attention)}


def dead_names(unet: nn.Module) -> set[str]:
    """Parameters that no gradient can reach while each attn2 hears one key: its queries and keys, and the norm before.

    Leave them out of what is trained and of what gets a LoRA; an optimiser's weight decay would still move them.
    """
    sites = cross_attentions(unet)
    projections = {f"{site}.{name}.weight" for site in sites for name in ("to_q", "to_k")}
    return projections | {f"{site[:-5]}norm2.{name}" for site in sites for name in ("weight", "bias")}


def linear_map(attention: nn.Module) -> tuple[Tensor, Tensor]:
    """W = to_out.weight @ to_v.weight, b = to_out.bias, in float64: attention(x, c) = W c + b for one key c."""
    names = "to_out.0.weight", "to_v.weight", "to_out.0.bias"
    to_out, to_v, bias = (attention.get_parameter(name).detach().double() for name in names)
    return to_out @ to_v, bias


def check_site(name: str, attention: Attention) -> SiteCheck:
    """Check a copy of `attention` in float64 on the CPU, where what is left is the theorem, not rounding.

    Two rows of context serve three query rows of four tokens each: enough, since tokens do not see each other.
    """
    attention = copy.deepcopy(attention).cpu().double().eval()
    redraw = Redraw()
    x = redraw(torch.ones(6, 4, attention.to_q.in_features, dtype=torch.float64, device="cpu"))
    context = redraw(torch.ones(2, 1, attention.to_v.in_features, dtype=torch.float64, device="cpu"))
    weight, bias = linear_map(attention)
    with torch.no_grad():
        out = attention(x, context)
        error = largest(out - nn.functional.linear(context, weight, bias).repeat_interleave(3, dim=0))
    return SiteCheck(name, attention.to_q.in_features, error, largest(out), check(attention, x, context))


def table(sites: list[SiteCheck], parameters: int) -> str:
    """A line for each site, differences relative to the largest |attention|, and the totals of a UNet of `parameters`.

    SCA and TCA are the spatial and the temporal cross-attention; "query" is how far the output moves with the query,
    "two keys" the same with one key more, the control.
    """
    lines = ["site                        kind width attn-linear    query  two keys      dead"]
    for site in sites:
        place, kind = ".".join(site.name.split(".")[:-3]), "TCA" if "temporal" in site.name else "SCA"
        query, control = (q.relative for q in (site.report.query, site.report.control.query))
        numbers = f"{site.width:>5} {site.relative:>11.1e} {query:>8.1e} {control:>9.1e} {site.report.dead.numel:>9,}"
        lines.append(f"{place:<27} {kind:<4} {numbers}")
        if not site.holds:
            lines.append(f"    FAILS, dead: {' '.join(site.report.dead.names) or 'nothing'}")
    error, query = (max(values) for values in zip(*((s.relative, s.report.query.relative) for s in sites), strict=True))
    held, dead = sum(site.holds for site in sites), sum(site.report.dead.numel for site in sites)
    names = sorted({name.removesuffix(".weight") for site in sites for name in site.report.dead.names})
    lines.append(f"{held} of {len(sites)} sites hold: |attention - linear| <= {error:.1e}, query <= {query:.1e}")
    share = f"{dead:,} of {parameters:,} parameters ({dead / parameters:.1%})"
    return "\n".join([*lines, f"dead in them: {', '.join(names) or 'nothing'}, {share}"])


# --- measuring ------------------------------------------------------------------------------------------------------


class Redraw:
    """Normal noise of a tensor's shape, dtype, device and root mean square (1 where that is 0); seeded, so that a
    check gives the same numbers twice and leaves torch's own generator alone."""

    def __init__(self) -> None:
        self.generator = torch.Generator("cpu").manual_seed(0)

    def __call__(self, like: Tensor) -> Tensor:
        noise = torch.randn(like.shape, generator=self.generator, dtype=torch.float32, device="cpu").to(like)
        return noise * (like.detach().float().square().mean().sqrt().item() or 1.0)


def first_output(attend: Attend, x: Tensor, context: Tensor) -> Tensor:
    """attend(x, context), once it is known that it can be measured."""
    if context.ndim != 3 or context.shape[1] < 1:
        raise ValueError(f"context is {list(context.shape)}; need [b, k, c'] with at least one key")
    with torch.no_grad():
        out, again = attend(x, context), attend(x, context)
    if not isinstance(out, Tensor):
        raise ValueError(f"attend returns a {type(out).__name__}; wrap it in a function that returns the tokens alone")
    if not out.isfinite().all():
        raise ValueError("attend(x, context) has values that are not finite; check a module in float32 or float64")
    if not torch.equal(out, again):
        raise ValueError(f"attend(x, context) differs by {largest(out - again):.1e} from call to call: call .eval()")
    return out


def gradients(output: Callable[[], Tensor], leaves: list[Tensor]) -> list[float]:
    """Largest |d <g, output()> / d leaf| for a random g, each leaf's requires_grad being left as it was."""
    required = [leaf.requires_grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.requires_grad_(True)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            out = output()
            if not leaves or not out.requires_grad:
                return [0.0] * len(leaves)
            g = Redraw()(torch.ones_like(out))
            found = torch.autograd.grad(out, leaves, g, allow_unused=True)
    finally:
        for leaf, flag in zip(leaves, required, strict=True):
            leaf.requires_grad_(flag)
    return [0.0 if gradient is None else largest(gradient) for gradient in found]


def largest(difference: Tensor) -> float:
    """Largest absolute value; infinite where one is not a number."""
    value = difference.detach().abs().max().item()
    return math.inf if math.isnan(value) else value


def ratio(difference: float, magnitude: float) -> float:
    """difference / magnitude, and the difference itself where all is zero."""
    return difference / magnitude if magnitude else difference


def rounding(dtype: torch.dtype) -> float:
    """How far apart two orders of computing one affine map may lie; `affinity` says why."""
    eps = torch.finfo(dtype).eps
    return 8 * eps if eps > 1e-4 else 64 * eps
