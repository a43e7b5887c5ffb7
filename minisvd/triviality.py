"""Is a cross-attention trivial? Measured, for any callable attend(x, context) -> tokens.

    print(check(attend, x, context))     x [(b r), s, c] query tokens, context [b, k, c'] keys, as attend takes them

    check(lambda x, context: attn(x, encoder_hidden_states=context), x, context, attn)       an Attention of diffusers
    linear = folded(attend, x, context)  a trivial one as what it is, W c + b; minisvd.fold does so for a UNet of ours

A softmax over one key is 1, so attention over one key is an affine map of that key, whatever the query: to_q and to_k
have neither effect nor gradient. Each of these consequences is measured, and again with a key more, the control, where
they must fail. What is measured is this module with these weights at these inputs and at seeded redraws of them.

Exactness. In IEEE arithmetic exp(0) = 1, 1 / 1 = 1 and 1 * v = v, so on a CPU nothing of the query is left, not even
rounding; but a residual that is added and taken off again, or equal keys that are averaged, leave some eps.
Gradients are taken through torch's written-out softmax: a fused kernel's backward gets 0 as the difference of two
sums of one value in two orders, and leaves about eps (which Adam, dividing by its size, makes a full step of).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from textwrap import shorten

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Attend = Callable[[Tensor, Tensor], Tensor]

# --- results --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What was measured of one attention f(x, c); differences are relative to the largest |f|."""

    name: str
    keys: int  # how many there are in c
    alike: bool  # are they several, all the same, as they then stay when redrawn?
    query: float  # largest |f(x', c) - f(x, c)| over redrawn x', or |d <g, f> / dx| for a random g, if that is larger
    context: float  # largest |f(x, c') - f(x, c)| over redrawn c'
    affinity: float  # largest |f(x, (1-a) c + a c') - (1-a) f(x, c) - a f(x, c')| of its terms, a in (-1, 1/2, 2)
    tolerance: float  # up to which query and affinity are rounding
    dead: dict[str, int]  # parameters or rows with neither gradient nor influence: name -> how many numbers
    parameters: int | None  # numbers in the module's parameters, None where it was not given
    saves: tuple[int, int]  # parameters and multiply-accumulates that W c + b in its place saves, if that is the same
    macs: int  # multiply-accumulates of this call, of its matrix products
    control: "Report | None" = None  # the same with one key more, None where it was left out

    @property
    def finding(self) -> tuple[str, str]:
        """The verdict, "trivial", "not trivial" or "undecided", and its reason."""
        keys, more = "1 key" if self.keys == 1 else f"{self.keys} keys", self.control
        over = f"over {keys}, all the same," if self.alike else f"over {keys}"
        if self.query > self.tolerance:
            return "not trivial", f"{over} the output moves with the query, by {self.query:.1e} of its size"
        if self.affinity > self.tolerance:
            return "not trivial", f"{over} the output is off a linear map of them by {self.affinity:.1e} of its size"
        exact = "to the bit" if self.query == 0 else "to rounding"
        if more is None:
            return "trivial", f"{over} it is W c + b, {exact}; no control was run: a linear layer is that too"
        if more.query > self.tolerance and more.affinity > self.tolerance:
            return "trivial", f"{over} the output is W c + b, whatever the query, {exact}"
        why = "a second key brings in no query: linear, but by no softmax"
        if self.context <= self.tolerance:
            why = "the output is one constant, as behind a projection of zeros"
        elif more.query > self.tolerance:
            why = "it stays linear in two keys: no softmax over keys"
        return "undecided", f"only the control failed: {why}"

    @property
    def verdict(self) -> str:
        return self.finding[0]

    @property
    def holds(self) -> bool:
        """Is it trivial, and not with one key more?"""
        return self.verdict == "trivial"

    def __str__(self) -> str:
        of = f"query {self.query:.1e}, context {self.context:.1e}, off linear {self.affinity:.1e}"
        lines = [": ".join(self.finding), f"moved, of its size: {of}; rounding {self.tolerance:.1e}"]
        if self.control is not None:
            there = shorten(", ".join(self.control.dead) or "nothing", 30, placeholder=" ...")
            there = "" if self.parameters is None else f"; dead then: {there}"
            of = f"query {self.control.query:.1e}, off linear {self.control.affinity:.1e}"
            lines.append(f"with a key more: {of}{there}")
        if self.parameters is None:
            return "\n".join([*lines, "dead: not looked for; give the module that the parameters belong to"])
        names = shorten(", ".join(self.dead) or "nothing", 58, placeholder=" ...")
        lines.append(f"dead: {names}; {sum(self.dead.values()):,} of {self.parameters:,} parameters")
        if self.holds and any(self.saves):
            (parameters, macs), of = self.saves, self.parameters
            lines.append(f"a fold saves: {parameters:,} of {of:,} parameters, {macs:,} of {self.macs:,} MACs")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html(str(self))


def html(report: str) -> str:
    """A report for a notebook: its first line, and the others folded out below."""
    head, _, rest = escape(report).partition("\n")
    return f"<details open><summary><b>{head}</b></summary><pre>{rest}</pre></details>"


# --- checks ---------------------------------------------------------------------------------------------------------


def check(
    attend: Attend, x: Tensor, context: Tensor, module: nn.Module | None = None, *,
    control: bool = True, tolerance: float | None = None,
) -> Report:  # fmt: skip
    """Every measure below of attend(x, context), with its keys and with one more.

    Dead parameters are looked for in `module`, by default `attend` itself if it is one, or that of which it is a
    method. `control=False` leaves out the second key, for a module that insists on one. The default tolerance is
    `rounding`; sharpest in float64. Raises ValueError for a `context` that is not [b, k, c'], for an output that is no
    tensor, not finite or not the same twice, and where a key more cannot be given.
    """
    owner = module or getattr(attend, "__self__", attend)
    module = owner if isinstance(owner, nn.Module) else None
    with torch.inference_mode(False):
        x, context = x.detach().clone(), context.detach().clone()  # copies, as autograd refuses inference tensors
        return measured("", attend, attend, x, context, module, control, tolerance)


def measured(
    name: str, branch: Attend, whole: Attend, x: Tensor, context: Tensor,
    module: nn.Module | None, control: bool, tolerance: float | None = None,
) -> Report:  # fmt: skip
    """The report on `branch`, a summand of the module's output `whole`, or all of it."""
    out = first_output(whole, x, context)
    magnitude, parameters = largest(branch(x, context)), None
    if tolerance is None:  # of a branch, what is lost beside the others
        tolerance = rounding(out.dtype) * max(1, ratio(largest(out), magnitude))
    alike = context.shape[1] > 1 and torch.equal(context, context[:, :1].expand_as(context))
    dead, more, saves, macs = {}, None, (0, 0), multiply_accumulates(whole, x, context)
    if module is not None:
        parameters = sum(p.numel() for p in module.parameters())
        dead = dead_parameters(whole, x, context, module, tolerance=tolerance)
    if control:
        longer = torch.cat([context, Redraw()(context[:, :1])], dim=1)
        try:
            whole(x, longer)
        except Exception as error:
            raise ValueError(f"a key more cannot be given ({error}): leave it out, control=False") from error
        more = measured(name, branch, whole, x, longer, module, False, tolerance)
    if branch is not whole:  # the shared parameters are others' as well
        dead = {key: count for key, count in dead.items() if more is None or key not in more.dead}
    elif alike or context.shape[1] == 1:
        b, _, c = context.shape
        saves = max(0, (parameters or 0) - (c + 1) * out.shape[-1]), max(0, macs - b * c * out.shape[-1])
    query = ratio(query_effect(branch, x, context), magnitude)
    moved, affinity = context_effect(branch, x, context)
    moved, counts = ratio(moved, magnitude), (dead, parameters, saves, macs)
    return Report(name, context.shape[1], alike, query, moved, affinity, tolerance, *counts, more)


def query_effect(attend: Attend, x: Tensor, context: Tensor) -> float:
    """How far the output moves as the query is redrawn at 0, 1 and 10 times its scale, or its gradient by the query, if
    that is larger: largest |d <g, f> / dx| for a random g, which misses no Jacobian but by chance zero."""
    out, redraw, leaf = attend(x, context).detach(), Redraw(), x.detach().clone()
    with torch.no_grad():
        change = max(largest(attend(scale * redraw(x), context) - out) for scale in (0, 1, 10))
    (gradient,) = gradients(lambda: attend(leaf, context), [leaf])
    return max(change, largest(gradient))


def context_effect(attend: Attend, x: Tensor, context: Tensor) -> tuple[float, float]:
    """How far the output moves as the context is redrawn, and how far it is from affine in it, relative to its terms.
    Affine: f((1-a) c + a c') = (1-a) f(c) + a f(c'), here for a in (-1, 1/2, 2) and redrawn c'. Keys that are all the
    same stay so: a copy of one key is no key of its own."""
    out, redraw, moved, defect, magnitude = attend(x, context).detach(), Redraw(), 0.0, 0.0, 0.0
    own = context[:, :1] if torch.equal(context, context[:, :1].expand_as(context)) else context
    with torch.no_grad():
        for a in (-1.0, 0.5, 2.0):
            other = redraw(own).expand_as(context)
            there = attend(x, other)
            near, far = (1 - a) * out, a * there
            moved = max(moved, largest(there - out))
            defect = max(defect, largest(attend(x, torch.lerp(context, other, a)) - near - far))
            magnitude = max(magnitude, largest(near.abs() + far.abs()))
    return moved, ratio(defect, magnitude)


def dead_parameters(
    attend: Attend, x: Tensor, context: Tensor, module: nn.Module, *, tolerance: float = 0.0
) -> dict[str, int]:
    """What has no gradient AND no influence, name -> how many numbers: parameters, or rows of them, as name[64:128],
    such as the keys of a packed projection. Rows without gradient (up to `tolerance` of the steepest) are redrawn, the
    others staying as they are, and restored, bit for bit; dead if the output does not move (up to `tolerance` of it).
    At zero weights more is dead than in general: behind a zero to_out, all."""
    out, redraw, dead = attend(x, context).detach(), Redraw(), {}
    tolerance = min(tolerance, rounding(torch.float32))  # half precision has no eye for what is weak
    parameters = {name: p for name, p in module.named_parameters() if p.is_floating_point() and p.numel()}
    steepness = gradients(lambda: attend(x, context), list(parameters.values()))
    steepest = max(map(largest, steepness), default=0.0)
    for (name, parameter), gradient in zip(parameters.items(), steepness, strict=True):
        rows = gradient.abs().reshape(len(parameter) if parameter.ndim else 1, -1).amax(dim=1) <= tolerance * steepest
        if not rows.any():
            continue
        kept, each = parameter.detach().clone(), parameter.numel() // len(rows)
        with torch.no_grad():
            try:
                parameter.copy_(torch.where(rows.repeat_interleave(each).view_as(kept), redraw(kept), kept))
                change = largest(attend(x, context) - out)
            finally:
                parameter.copy_(kept)
        if change <= tolerance * largest(out):
            edges = F.pad(rows.int(), (1, 1)).diff().nonzero()
            spans = ", ".join(f"{a}:{b}" for a, b in edges.view(-1, 2).tolist())
            dead[name if rows.all() else f"{name}[{spans}]"] = int(rows.sum()) * each
    return dead


def multiply_accumulates(attend: Attend, x: Tensor, context: Tensor) -> int:
    """Of the matrix products and convolutions in attend(x, context)."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        attend(x, context)
    return counter.get_total_flops() // 2


@torch.no_grad()
def folded(attend: Attend, x: Tensor, context: Tensor) -> nn.Linear:
    """The W c + b that a trivial attention computes, found by asking it: b of c = 0, W's columns of the unit vectors. x
    [(b r), s, c] and context [b, k, c'] as for `check`, k copies of one key; the result takes [..., c']."""
    c = context.shape[-1]
    asked = torch.cat([torch.zeros(1, c), torch.eye(c)])[:, None].expand(-1, context.shape[1], -1).to(context)
    out = attend(x[:1].expand(c + 1, -1, -1), asked)[:, 0]
    linear = nn.Linear(c, out.shape[-1], device=out.device, dtype=out.dtype)
    linear.weight.copy_((out[1:] - out[0]).T)
    linear.bias.copy_(out[0])
    return linear


def linear_map(attention: nn.Module) -> tuple[Tensor, Tensor]:
    """W = to_out.weight @ to_v.weight, b = to_out.bias, in float64: attention(x, c) = W c + b for one key c."""
    names = "to_out.0.weight", "to_v.weight", "to_out.0.bias"
    to_out, to_v, bias = (attention.get_parameter(name).detach().double() for name in names)
    return to_out @ to_v, bias


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


def gradients(output: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """d <g, output()> / d leaf for a random g, each leaf's requires_grad being left as it was."""
    required = [leaf.requires_grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.requires_grad_(True)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            out = output()
            if not leaves or not out.requires_grad:
                return [torch.zeros_like(leaf) for leaf in leaves]
            found = torch.autograd.grad(out, leaves, Redraw()(torch.ones_like(out)), allow_unused=True)
    finally:
        for leaf, flag in zip(leaves, required, strict=True):
            leaf.requires_grad_(flag)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def largest(difference: Tensor) -> float:
    """Largest absolute value; infinite where one is not a number."""
    value = difference.detach().abs().max().item()
    return math.inf if math.isnan(value) else value


def ratio(difference: float, magnitude: float) -> float:
    """difference / magnitude, and the difference itself where all is zero."""
    return difference / magnitude if magnitude else difference


def rounding(dtype: torch.dtype) -> float:
    """How far apart two orders of computing one affine map may lie: 64 eps in float64 and float32, whose sums of about
    a thousand terms collect it; 8 eps in half precision, whose sums are float32 and only their ends rounded."""
    return (8 if dtype.itemsize < 4 else 64) * torch.finfo(dtype).eps
