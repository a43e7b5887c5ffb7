"""Theorem: over ONE key, attention is a linear map of that key, whatever the query.

A softmax over one key is 1, so to_out(softmax(q k^T / sqrt(d)) v) = to_out(to_v(c)) = W c + b for every q. One
proposition a test, over random widths, heads, lengths and batches, for torch's attention and for one written out.
Every measure is taken a second time with two keys, where it must fail.
"""

import math
from collections.abc import Callable

import pytest
import torch
from einops import einsum, rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minisvd.attention import Attention, CachedCondLinear
from minisvd.triviality import linear_map

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Attend = Callable[[Attention, Tensor, Tensor], Tensor]


def torchs(attention: Attention, x: Tensor, context: Tensor) -> Tensor:
    """As the model computes it: on a CPU the fused kernel, scaled_dot_product_attention."""
    return attention(x, context)


def written_out(attention: Attention, x: Tensor, context: Tensor) -> Tensor:
    """As the textbook writes it: exp(s) / sum exp(s), s = q k^T / sqrt(d)."""
    n, r = attention.num_heads, len(x) // len(context)
    q = rearrange(attention.to_q(x), "br s (n d) -> br n s d", n=n)
    k, v = (
        rearrange(to(context).repeat_interleave(r, dim=0), "br k (n d) -> br n k d", n=n)
        for to in (attention.to_k, attention.to_v)
    )
    scores = einsum(q, k, "br n s d, br n k d -> br n s k") / math.sqrt(q.shape[-1])
    e = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    out = einsum(e / e.sum(dim=-1, keepdim=True), v, "br n s k, br n k d -> br n s d")
    return attention.to_out(rearrange(out, "br n s d -> br s (n d)"))


both = pytest.mark.parametrize("attend", [torchs, written_out])


@st.composite
def cases(draw: st.DrawFn) -> Callable[[int, torch.dtype], tuple[Attention, Tensor, Tensor]]:
    """Widths, heads, lengths and batches; called with a number of keys and a dtype: attention, x, context."""
    n, d, c_context = draw(st.integers(1, 5)), draw(st.integers(2, 12)), draw(st.integers(2, 70))
    b, r, s, seed = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(0, 99))

    def case(keys: int, dtype: torch.dtype = torch.float64) -> tuple[Attention, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        attention = Attention(n * d, n, c_context).double()
        with torch.no_grad():
            for p in attention.parameters():
                p.copy_(noise(*p.shape) / math.sqrt(p.shape[-1]))
        x, context = noise(b * r, s, n * d), noise(b, keys, c_context)
        return attention.to(dtype), x.to(dtype), context.to(dtype)

    return case


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


def largest(*tensors: Tensor) -> float:
    return max(t.abs().max().item() for t in tensors)


def allowed(attention: Attention, context: Tensor, dtype: torch.dtype) -> float:
    """Rounding of an affine map: 1e-12 in float64, else 2 eps, of the largest |to_out| |to_v| |c| + |b|."""
    names = "to_out.0.weight", "to_v.weight", "to_out.0.bias"
    to_out, to_v, bias = (attention.get_parameter(name).detach().double().abs() for name in names)
    terms = context.double().abs() @ (to_out @ to_v).T + bias
    return (1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps) * largest(terms)


# --- softmax --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_over_one_key_is_exactly_one(dtype):
    """For every finite score, up to the largest number there is; over two equal keys it is 1/2."""
    big = torch.finfo(dtype).max
    scores = torch.cat([torch.linspace(-1e4, 1e4, 2001), torch.randn(2000)]).to(dtype)
    scores = torch.cat([scores, torch.tensor([big, -big, 0.0], dtype=dtype)])[:, None]
    assert (scores.softmax(dim=-1) == 1).all()
    e = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    assert (e / e.sum(dim=-1, keepdim=True) == 1).all()

    two = torch.cat([scores, scores], dim=-1).softmax(dim=-1)  # control
    assert (two == 0.5).all()


# --- what the output does not depend on -----------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", DTYPES)
@examples(10)
@given(case=cases())
def test_output_is_independent_of_the_query(attend: Attend, dtype, case):
    """Bit for bit, at any scale of the query."""

    @torch.no_grad()
    def change(keys: int) -> float:
        attention, x, context = case(keys, dtype)
        out = attend(attention, x, context)
        queries = (torch.zeros_like(x), -x, 10 * x, x.roll(1, dims=-1))
        return largest(*(attend(attention, query, context) - out for query in queries))

    assert change(keys=1) == 0
    assert change(keys=2) > 0  # control


@both
@examples(6)
@given(case=cases())
def test_jacobian_by_the_query_is_zero(attend: Attend, case):
    """Every entry of d out / d x, exactly."""

    def jacobian(keys: int) -> float:
        attention, x, context = case(keys)
        with sdpa_kernel(SDPBackend.MATH):
            entries = torch.func.jacrev(lambda x: attend(attention, x, context))(x[:, :1])
        return largest(entries)

    assert jacobian(keys=1) == 0
    assert jacobian(keys=2) > 1e-6  # control


@both
@pytest.mark.parametrize("name", ["to_q", "to_k", "norm"])
@examples(10)
@given(case=cases())
def test_output_is_independent_of_to_q_to_k_and_the_norm_before(attend: Attend, name, case):
    """Bit for bit, whatever is written into them: zeros, a ramp, or a hundred times as much."""

    @torch.no_grad()
    def change(keys: int) -> float:
        attention, x, context = case(keys)
        norm = nn.LayerNorm(x.shape[-1], dtype=x.dtype)
        weight = {"to_q": attention.to_q, "to_k": attention.to_k, "norm": norm}[name].weight
        out, changes = attend(attention, norm(x), context), []
        ramp = torch.linspace(-2, 2, weight.numel(), dtype=weight.dtype).view_as(weight)
        for value in (torch.zeros_like(weight), ramp, 100 * weight):
            weight.copy_(value)
            changes.append(attend(attention, norm(x), context) - out)
        return largest(*changes)

    assert change(keys=1) == 0
    assert change(keys=2) > 0  # control


# --- gradients ------------------------------------------------------------------------------------------------------


def dead_gradients(attend: Attend, attention: Attention, x: Tensor, context: Tensor) -> tuple[float, float]:
    """Largest gradient of to_q, to_k, the norm's weight and bias, and x; and of what stays alive, to_v and to_out."""
    norm, x = nn.LayerNorm(x.shape[-1], dtype=x.dtype), x.requires_grad_()
    out = attend(attention, norm(x), context)
    dead = [attention.to_q.weight, attention.to_k.weight, norm.weight, norm.bias, x]
    found = torch.autograd.grad(out, [*dead, attention.to_v.weight, *attention.to_out.parameters()], out.detach() + 1)
    return largest(*found[:5]), largest(*found[5:])


@both
@pytest.mark.parametrize("dtype", DTYPES)
@examples(10)
@given(case=cases())
def test_gradients_of_to_q_to_k_and_the_norm_are_zero(attend: Attend, dtype, case):
    """Exactly. The rest of the attention has one."""
    with sdpa_kernel(SDPBackend.MATH):
        dead, alive = dead_gradients(attend, *case(1, dtype))
        assert dead == 0
        assert alive > 0
        assert dead_gradients(attend, *case(2, dtype))[0] > 1e-3  # control


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@examples(20)
@given(case=cases())
def test_a_fused_kernel_leaves_rounding_where_the_gradient_is_zero(dtype, case):
    """The backward of a fused kernel takes the difference of two sums of the same value: some eps instead of zero."""
    dead, alive = dead_gradients(torchs, *case(1, dtype))
    assert dead <= 64 * torch.finfo(dtype).eps * alive
    assert dead_gradients(torchs, *case(2, dtype))[0] > 1e-3  # control


# --- the linear map -------------------------------------------------------------------------------------------------


def folded(attention: Attention) -> CachedCondLinear:
    """The linear map in float64, rounded once to the attention's dtype."""
    weight, bias = linear_map(attention)
    linear = CachedCondLinear(weight.shape[0], attention.num_heads, weight.shape[1]).to(attention.to_v.weight.dtype)
    linear.load_state_dict({"weight": weight, "bias": bias})
    return linear


@both
@pytest.mark.parametrize("dtype", DTYPES)
@examples(20)
@given(case=cases())
@torch.no_grad()
def test_attention_is_the_linear_map(attend: Attend, dtype, case):
    """To 1e-12 in float64, to rounding in the others, every query row having its own context row's value."""
    attention, x, context = case(1, dtype)
    cached = folded(attention)
    linear = cached(x, cached.condition(context))
    bound = allowed(attention, context, dtype)
    assert largest(attend(attention, x, context).double() - linear.double()) <= bound

    attention, x, context = case(2, torch.float64)  # control: the linear map of neither key, nor of their mean
    cached, out = folded(attention), attend(attention, x, context)
    for key in (context[:, :1], context[:, 1:], context.mean(dim=1, keepdim=True)):
        linear = cached(x, cached.condition(key))
        assert largest(out - linear) > 1e-6


@both
@examples(20)
@given(case=cases(), a=st.floats(-3, 3).filter(lambda a: abs(a) > 0.1 and abs(a - 1) > 0.1))
@torch.no_grad()
def test_attention_is_affine_in_the_context(attend: Attend, case, a):
    """f(c + a (c' - c)) = f(c) + a (f(c') - f(c)), for any real a."""

    def defect(keys: int) -> float:
        attention, x, context = case(keys)
        other = context.roll(1, dims=-1) - 0.5
        at_a, f, g = (attend(attention, x, c) for c in (context + a * (other - context), context, other))
        return largest(at_a - f - a * (g - f))

    assert defect(keys=1) <= 1e-11
    assert defect(keys=2) > 1e-6  # control


@both
@examples(20)
@given(case=cases())
@torch.no_grad()
def test_rows_of_a_batch_never_mix(attend: Attend, case):
    """Changing the last context row leaves the other rows' outputs alone; its own r query rows change, all of them."""
    attention, x, context = case(1)
    out, r = attend(attention, x, context), len(x) // len(context)
    context[-1] += 1
    change = (attend(attention, x, context) - out).abs().flatten(1).amax(dim=1)
    assert (change[:-r] <= 1e-14).all()
    assert (change[-r:] > 1e-6).all()
