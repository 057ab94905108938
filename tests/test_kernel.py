"""The operator: every implementation against the equation in float64, for the output, lse and all five gradients.

The oracle is `moda_attention_reference` in float64, which is itself checked against loops over single numbers.
A test below runs once for every (impl, device) of RUNS: a new implementation is one more line there.
"""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import kernel
import sdpa
from experiments import bench
from kernel import moda_attention, moda_attention_reference, moda_attention_weights

# what is tested: (impl, device, the dtypes it is tested in)
RUNS = [
    ("torch", "cpu", (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    ("reference", "cpu", (torch.float64, torch.float32, torch.bfloat16)),
    ("triton", "cpu", (torch.float32, torch.float16)),  # in Triton's interpreter
    ("fused", "cpu", (torch.float32, torch.float16)),
    ("torch", "cuda", (torch.float32, torch.bfloat16, torch.float16)),
    ("triton", "cuda", (torch.float32, torch.bfloat16, torch.float16)),
    ("fused", "cuda", (torch.float32, torch.bfloat16, torch.float16)),
]

# Largest relative error ||x - ref|| / ||ref||. A dtype rounds with an error of at most u = eps / 2 (float64 1.1e-16,
# float32 6.0e-8, bf16 2.0e-3, fp16 2.4e-4). The half types are read exactly, summed in float32 and rounded a few times:
# P, o and each gradient, so a small multiple of u. The wide types round in every addition of a dot product and in z,
# whose error exp() turns into a relative error |z| u: some 100 u.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 2e-3}

# the fixture `poison` below asks for determinism, but only for the sake of its NaN
pytestmark = pytest.mark.filterwarnings("ignore:.*defaults to a non-deterministic algorithm:UserWarning")

NAMES = ("q", "k", "v", "depth_k", "depth_v")


def dtypes_of(impl, device):
    return next(dtypes for *run, dtypes in RUNS if run == [impl, device])


def one_test_for(*arguments):
    names = [str(x).removeprefix("torch.") for x in arguments]
    marks = [pytest.mark.gpu] if "cuda" in arguments else []
    if {"triton", "fused"} & set(arguments):
        marks.append(pytest.mark.skipif(kernel.triton is None, reason="needs Triton"))
    return pytest.param(*arguments, id="-".join(names), marks=marks)


each_run = pytest.mark.parametrize("impl, device", [one_test_for(impl, device) for impl, device, _ in RUNS])
each_run_and_dtype = pytest.mark.parametrize(
    "impl, device, dtype", [one_test_for(impl, device, dtype) for impl, device, dtypes in RUNS for dtype in dtypes]
)


@pytest.fixture(autouse=True, scope="module")
def poison():
    """Fill the memory that torch.empty and its kin hand out with NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# ------------------------------------------------------------------------------------------------ inputs and comparing


def sizes(**arguments):
    """Arguments of random_inputs."""
    return arguments


def random_inputs(
    B=2, n_kv_head=2, group=2, T_q=7, T_kv=None, head_dim=16, n_slot=3, dtype=torch.float64, device="cpu"
):
    """[q, k, v, depth_k, depth_v], leaves that require a gradient; n_slot=None leaves out the depth."""
    T_kv = T_q if T_kv is None else T_kv
    shapes = [(B, n_kv_head * group, T_q, head_dim), *[(B, n_kv_head, T_kv, head_dim)] * 2]
    if n_slot is not None:
        shapes += [(n_slot, B, n_kv_head, T_q, head_dim)] * 2
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]


def random_like(x):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x)


def strided(x, layout):
    """The values of x (..., T, head_dim) with other strides."""
    if layout == "transposed heads":  # the heads were split off the last dimension, as in any model
        y = x.transpose(-3, -2).contiguous().transpose(-3, -2)
    elif layout == "sliced":  # out of a larger buffer, whose other elements must not be read
        buffer = x.new_full([n + 2 for n in x.shape], float("nan"))
        y = buffer[tuple(slice(1, n + 1) for n in x.shape)]
        y.copy_(x)
    elif layout == "every second":  # head_dim is not the fastest dimension either
        buffer = x.new_full([2 * n for n in x.shape], float("nan"))
        y = buffer[(slice(None, None, 2),) * x.dim()]
        y.copy_(x)
    elif layout == "expanded":  # the same row at every position: stride 0
        y = x[..., :1, :].expand_as(x)
    else:
        y = x.clone()
    return y.detach().requires_grad_()


def results(function, inputs, do=None, **kwargs):
    """{"o", "lse", "dq", "dk", ...} of one forward and backward."""
    o, lse = function(*inputs, return_lse=True, **kwargs)
    do = torch.ones_like(o) if do is None else do
    grads = torch.autograd.grad(o, inputs, do, materialize_grads=True)  # zeros for depth tensors without a slot
    return {"o": o.detach(), "lse": lse} | {f"d{name}": grad for name, grad in zip(NAMES, grads, strict=False)}


def oracle(inputs, do=None, **kwargs):
    """`results` of the equation in float64, fed the same (rounded) inputs."""
    wide = [x.detach().cpu().double().requires_grad_() for x in inputs]
    return results(moda_attention_reference, wide, None if do is None else do.cpu().double(), **kwargs)


def before_cancelling(inputs, do, want, causal):
    """{gradient: norm of its terms, dz times a key or a query, added like independent errors}. A term's error is in
    proportion to itself and, as delta = rowsum(do * o) is made of a rounded o, to p times the norm of do * o."""
    q, k, v, *depth = (x.detach().cpu().double() for x in inputs)
    n_kv_head, T_kv, scale, do, o = *k.shape[1:3], q.shape[-1] ** -0.5, do.cpu().double(), want["o"]
    k, v, *depth = (x.repeat_interleave(q.shape[1] // n_kv_head, dim=-3) for x in (k, v, *depth))
    p = moda_attention_weights(q, k, depth[0] if depth else None, causal=causal)[0]  # (B, n_head, T_q, T_kv + n_slot)
    dp = do @ v.mT
    if depth:
        dp = torch.cat([dp, torch.einsum("bhtd,sbhtd->bhts", do, depth[1])], -1)
    products = do * o
    term = (p * scale) ** 2 * ((dp - products.sum(-1, keepdim=True)) ** 2 + products.square().sum(-1, keepdim=True))
    sequence, slots = term[..., :T_kv], term[..., T_kv:]
    squares = {"dq": (sequence @ k**2).sum(), "dk": (sequence.mT @ q**2).sum()}
    if depth:
        squares["dq"] += torch.einsum("bhts,sbhtd->", slots, depth[0] ** 2)
        squares["ddepth_k"] = torch.einsum("bhts,bhtd->", slots, q**2)
    return {name: square.sqrt().item() for name, square in squares.items()}


def assert_close(got, want, tolerance, at_least=()):
    """Relative errors; of the results in the dict at_least, relative to that number where the result is smaller."""
    assert got.keys() == want.keys()
    for name, ref in want.items():
        x, ref = got[name].cpu().double(), ref.cpu().double()
        assert x.shape == ref.shape, name
        # a gradient may vanish altogether (one position without depth: softmax of one logit), and lse may cross zero
        norm = ref.norm().item()
        unit = ref.numel() ** 0.5
        scale = max(norm, unit) if name == "lse" else norm if norm > 1e-10 * unit else unit
        scale = max(scale, dict(at_least).get(name, 0.0))
        error = (x - ref).norm().item() / scale if ref.numel() else 0.0
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"  # false for NaN too


def check(impl, inputs, do=None, slack=1, **kwargs):
    """o, lse and all gradients of `impl` against the oracle."""
    dtype = inputs[0].dtype
    got = results(moda_attention, inputs, do, impl=impl, **kwargs)
    assert got["lse"].dtype == torch.promote_types(dtype, torch.float32)
    assert all(x.dtype == dtype for name, x in got.items() if name != "lse")
    assert_close(got, oracle(inputs, do, **kwargs), slack * TOLERANCE[dtype])


def loops(q, k, v, depth_k=None, depth_v=None, *, causal=True, scale=None, return_lse=True):
    """The equation, one number at a time. Knows nothing of kernel.py."""
    B, n_head, T_q, head_dim = q.shape
    n_kv_head, T_kv = k.shape[1], k.shape[2]
    scale = 1 / head_dim**0.5 if scale is None else scale
    o, lse = torch.zeros_like(q), q.new_zeros(B, n_head, T_q)
    for b in range(B):
        for h in range(n_head):
            kv = h // (n_head // n_kv_head)
            for t in range(T_q):
                position = T_kv - T_q + t  # the queries are the last T_q positions
                seen = [j for j in range(T_kv) if j <= position or not causal]
                slots = [] if depth_k is None else range(len(depth_k))
                keys = [k[b, kv, j] for j in seen] + [depth_k[s, b, kv, t] for s in slots]
                values = [v[b, kv, j] for j in seen] + [depth_v[s, b, kv, t] for s in slots]
                weights = [torch.exp(scale * (q[b, h, t] * key).sum()) for key in keys]
                o[b, h, t] = sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
                lse[b, h, t] = torch.log(sum(weights))
    return o, lse


# ------------------------------------------------------------------------------------------------ the oracle itself


@pytest.mark.parametrize(
    "shape, kwargs",
    [
        (sizes(group=1, T_q=3), {}),
        (sizes(group=2, T_q=4), {"causal": False}),
        (sizes(group=3, T_q=2, T_kv=5), {}),
        (sizes(group=3, T_q=2, T_kv=5), {"causal": False}),
        (sizes(group=2, T_q=5, T_kv=2, n_slot=2), {"causal": False}),
        (sizes(group=2, T_q=1, T_kv=4, n_slot=5), {"scale": 0.7}),
        (sizes(group=4, T_q=4, n_slot=1, n_kv_head=3, B=1), {"scale": -0.3}),
        (sizes(group=2, T_q=4, n_slot=None), {}),
        (sizes(group=2, T_q=4, n_slot=0), {}),
    ],
    ids=str,
)
def test_reference_is_the_equation(shape, kwargs):
    inputs = random_inputs(**{"head_dim": 4, **shape})
    want = results(loops, inputs[: 5 if shape.get("n_slot", 3) else 3], **kwargs)
    got = results(moda_attention_reference, inputs, **kwargs)
    for name in got.keys() - want.keys():  # n_slot = 0: gradients without an element
        assert got.pop(name).numel() == 0
    assert_close(got, want, 1e-13)
    assert_close(results(moda_attention, inputs, impl="reference", **kwargs), oracle(inputs, **kwargs), 0.0)


@pytest.mark.parametrize("n_slot", [None, 0, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_weights_are_the_softmax(n_slot, causal):
    q, k, v, *depth = random_inputs(T_q=3, T_kv=5, n_slot=n_slot, group=2)
    p, lse = moda_attention_weights(q, k, *depth[:1], causal=causal)
    assert p.shape == (2, 4, 3, 5 + (n_slot or 0))
    torch.testing.assert_close(p.sum(-1), torch.ones_like(lse))
    for t in range(3):
        assert (p[:, :, t, :5] > 0).all(dim=(0, 1)).tolist() == [j <= 2 + t or not causal for j in range(5)]
    values = v.repeat_interleave(2, dim=1)  # head h reads kv head h // group
    o = p[..., :5] @ values
    for s in range(n_slot or 0):
        o = o + p[..., 5 + s, None] * depth[1][s].repeat_interleave(2, dim=1)
    want = loops(q, k, v, *(depth if n_slot else ()), causal=causal)
    assert_close({"o": o, "lse": lse}, dict(zip(("o", "lse"), want, strict=True)), 1e-13)
    with pytest.raises(ValueError, match="T_q <= T_kv"):
        moda_attention_weights(q, k[:, :, :2])


# ------------------------------------------------------------------------------------- every implementation, against it

GROUPS, HEAD_DIMS, SLOTS = (1, 2, 3, 4, 8), (16, 48, 64, 80, 128), (0, 1, 5, 33)
LENGTHS = [  # T_q, T_kv, causal
    (7, 7, True),
    (1, 1, True),
    (13, 13, False),
    (5, 12, True),
    (1, 9, True),
    (33, 33, True),
    (5, 12, False),
]


def covering_shapes():
    """All pairs of group and head_dim; the other lists go round beside them, with other periods."""
    for i in range(len(GROUPS) * len(HEAD_DIMS)):
        group, head_dim = GROUPS[i // len(HEAD_DIMS)], HEAD_DIMS[i % len(HEAD_DIMS)]
        (T_q, T_kv, causal), n_slot = LENGTHS[i % len(LENGTHS)], SLOTS[i % len(SLOTS)]
        B = 16 if T_q == 1 else 1 + i % 3  # enough rows for an error that is an average
        shape = sizes(B=B, n_kv_head=1 + i % 2, group=group, T_q=T_q, T_kv=T_kv, head_dim=head_dim, n_slot=n_slot)
        yield pytest.param(
            shape, causal, id=f"G{group}-d{head_dim}-T{T_q}/{T_kv}-S{n_slot}-{'causal' if causal else 'full'}"
        )


@each_run_and_dtype
@pytest.mark.parametrize("shape, causal", list(covering_shapes()))
def test_matches_oracle(shape, causal, impl, device, dtype):
    inputs = random_inputs(**shape, dtype=dtype, device=device)
    check(impl, inputs, random_like(inputs[0]), causal=causal)


@each_run_and_dtype
@pytest.mark.parametrize(
    "shape, kwargs",
    [
        (sizes(B=1, n_kv_head=1, T_q=601, n_slot=2), {}),  # longer than any block of any implementation, and odd
        (sizes(B=1, n_kv_head=1, T_q=70, T_kv=601, n_slot=2), {}),
        (sizes(B=1, n_kv_head=1, T_q=70, T_kv=601, n_slot=2), {"causal": False}),
        (sizes(T_q=11, T_kv=4), {"causal": False}),  # more queries than keys
        (sizes(T_q=5), {"scale": 0.5}),
        (sizes(T_q=5, T_kv=8, head_dim=2), {"scale": 1}),  # a whole number
        (sizes(T_q=5, head_dim=4), {"scale": -0.3}),
        (sizes(T_q=5), {"scale": -0.1, "causal": False}),
        (sizes(T_q=5), {"scale": 0.0}),
        (sizes(group=6, head_dim=24, T_q=17), {}),
        (sizes(group=2, head_dim=256, T_q=9), {}),
        (sizes(head_dim=1, T_q=9), {}),
        (sizes(T_q=9, n_slot=None), {}),
        (sizes(B=1, n_kv_head=1, T_q=5, n_slot=512), {}),
        (sizes(B=1, n_kv_head=1, group=9, T_q=13, n_slot=65), {}),  # one token a program, one slot in the last block
    ],
    ids=str,
)
def test_matches_oracle_beyond_the_grid(shape, kwargs, impl, device, dtype):
    inputs = random_inputs(**shape, dtype=dtype, device=device)
    # PyTorch's CPU kernel adds up blocks of dk, dv in bf16
    slack = 1.5 if device == "cpu" and shape["T_q"] > 512 else 1
    if shape.get("head_dim", 16) < 4:  # few channels: the rounding of o does not average out in delta
        slack = 2
    check(impl, inputs, random_like(inputs[0]), slack, **kwargs)


@each_run_and_dtype
@pytest.mark.parametrize("layout", ["transposed heads", "sliced", "every second", "expanded"])
@pytest.mark.parametrize("T_q", [9, 4])  # against 9 keys
def test_any_strides(T_q, layout, impl, device, dtype):
    """Non-contiguous inputs (sliced ones have NaN beside them, in slots past the end too) and gradients do."""
    plain = random_inputs(T_q=T_q, T_kv=9, dtype=dtype, device=device)
    do = random_like(plain[0])
    slack = 2 if layout == "expanded" else 1  # equal keys: the gradients of q are differences of nearly equal numbers
    for which in [(0,), (1,), (2, 3), (4,), (0, 1, 2, 3, 4)]:  # K and V apart
        inputs = [strided(x, layout if i in which else "contiguous") for i, x in enumerate(plain)]
        check(impl, inputs, do, slack)
    check(impl, plain, strided(do, layout).detach())
    check(impl, plain, do.new_ones(()).expand_as(do))  # what out.sum().backward() passes


@each_run_and_dtype
def test_right_after_plain_attention(impl, device, dtype):
    """PyTorch's cuDNN backward reuses plans of calls of the same shape, whatever strides their o and do had."""
    inputs = random_inputs(B=1, T_q=128, head_dim=64, dtype=dtype, device=device)
    for layout in ("contiguous", "transposed heads", "expanded"):
        for do_layout in ("contiguous", "transposed heads", "expanded"):
            q, k, v = (strided(x, layout) for x in inputs[:3])
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH], set_priority=True):
                o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            o.backward(strided(random_like(o), do_layout).detach())
        check(impl, inputs, random_like(inputs[0]))
        check(impl, [strided(x, "transposed heads") for x in inputs], strided(random_like(o), layout).detach())


@each_run
def test_gradcheck(impl, device):
    if torch.float64 not in dtypes_of(impl, device):
        pytest.skip("needs float64")
    for shape, causal in [
        (sizes(group=3, n_slot=2, T_q=3, T_kv=4), True),
        (sizes(n_slot=1, T_q=2), False),
        (sizes(n_slot=0), True),
    ]:
        inputs = random_inputs(B=1, **{"head_dim": 2, "T_q": 3, **shape}, device=device)
        assert torch.autograd.gradcheck(lambda *x, c=causal: moda_attention(*x, causal=c, impl=impl), inputs)


@each_run_and_dtype
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_random_shapes(data, impl, device, dtype):
    n_kv_head, group, n_slot = (data.draw(st.integers(low, high)) for low, high in ((1, 3), (1, 9), (0, 19)))
    T_kv, head_dim, causal = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 66)), data.draw(st.booleans())
    T_q = data.draw(st.integers(1, T_kv))
    layout = data.draw(st.sampled_from(["contiguous", "transposed heads", "sliced"]))
    shape = sizes(B=2, n_kv_head=n_kv_head, group=group, T_q=T_q, T_kv=T_kv, head_dim=head_dim, n_slot=n_slot)
    inputs = [strided(x, layout) for x in random_inputs(**shape, dtype=dtype, device=device)]
    do = random_like(inputs[0])
    want = oracle(inputs, do, causal=causal)
    got = results(moda_attention, inputs, do, causal=causal, impl=impl)
    # twice, as few rows average nothing out: with one head of one channel, a result is a single rounding
    assert_close(got, want, 2 * TOLERANCE[dtype], before_cancelling(inputs, do, want, causal))


# ------------------------------------------------------------------------------------------------ what it must not do


@each_run_and_dtype
@pytest.mark.parametrize("n_slot", [0, None])
@pytest.mark.parametrize("causal", [True, False])
def test_without_slots_it_is_sdpa(causal, n_slot, impl, device, dtype):
    inputs = random_inputs(n_slot=n_slot, T_q=9, group=3, dtype=dtype, device=device)
    got = results(moda_attention, inputs, causal=causal, impl=impl)
    sdpa = F.scaled_dot_product_attention(*inputs[:3], is_causal=causal, enable_gqa=True)
    want = dict(
        zip(("o", "dq", "dk", "dv"), (sdpa.detach(), *torch.autograd.grad(sdpa.sum(), inputs[:3])), strict=True)
    )
    assert_close({name: got[name] for name in want}, want, 2 * TOLERANCE[dtype])
    if n_slot == 0:
        assert got["ddepth_k"].shape == got["ddepth_v"].shape == (0, 2, 2, 9, 16)


@each_run
def test_depth_is_read_at_its_own_position_only(impl, device):
    """A slot's element (s, b, kv head, t) reaches batch b, the heads of that kv head, position t. No other output."""
    B, n_kv_head, group, T, n_slot = 2, 2, 3, 6, 4
    q, k, v, depth_k, depth_v = random_inputs(B, n_kv_head, group, T, n_slot=n_slot, dtype=torch.float32, device=device)
    before = moda_attention(q, k, v, depth_k, depth_v, impl=impl)
    for s, b, h, t in [(0, 0, 0, 0), (1, 1, 1, 2), (3, 0, 1, 3), (2, 1, 0, 5)]:
        here = torch.zeros(B, n_kv_head * group, T, dtype=torch.bool, device=device)
        here[b, h * group : (h + 1) * group, t] = True
        for i in (3, 4):
            changed = [x.detach().clone() for x in (q, k, v, depth_k, depth_v)]
            changed[i][s, b, h, t] += 1.0
            after = moda_attention(*changed, impl=impl)
            assert ((after != before).any(-1) == here).all()
        for grad in torch.autograd.grad(before[here].sum(), (depth_k, depth_v), retain_graph=True):
            nonzero = (grad != 0).any(-1)  # (n_slot, B, n_kv_head, T)
            assert nonzero[:, b, h, t].all()
            assert nonzero.sum() == n_slot


@each_run
def test_sequence_is_causal(impl, device):
    q, k, v, depth_k, depth_v = (x.detach() for x in random_inputs(T_q=5, T_kv=8, dtype=torch.float32, device=device))
    before = moda_attention(q, k, v, depth_k, depth_v, impl=impl)
    for j in range(8):
        for i in (1, 2):
            changed = [q, k.clone(), v.clone(), depth_k, depth_v]
            changed[i][:, :, j] += 1.0
            after = moda_attention(*changed, impl=impl)
            assert (after != before).any(dim=3).all(dim=(0, 1)).tolist() == [j <= 3 + t for t in range(5)]
            assert (after != before).any(dim=(0, 1, 3)).tolist() == [j <= 3 + t for t in range(5)]


@each_run
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # Triton's interpreter, in elements that are masked later
@pytest.mark.parametrize("winner", ["sequence", "depth"])
def test_huge_logits(winner, impl, device):
    """exp of neither half may overflow, and the half that loses gets weight 0, not NaN."""
    q, k, v, depth_k, depth_v = random_inputs(B=1, T_q=4, dtype=torch.float32, device=device)
    strong, weak = (k, depth_k) if winner == "sequence" else (depth_k, k)
    with torch.no_grad():
        strong.copy_(q[:, ::2] * 1e3)  # kv head h gets query head 2 h, so every query head 2 h has a logit far above 0
        weak.copy_(-q[:, ::2] * 1e3)
    inputs = [q, k, v, depth_k, depth_v]
    got, want = results(moda_attention, inputs, impl=impl), oracle(inputs)
    assert want["lse"].max() > 1e3
    assert all(torch.isfinite(x).all() for x in got.values())
    linear = ("o", "lse", "dv", "ddepth_v")  # the others are differences of nearly equal numbers here
    assert_close({n: got[n] for n in linear}, {n: want[n] for n in linear}, 1e-3)  # float32 rounds z to 1e-4


@each_run
@pytest.mark.parametrize("T_kv", [5, 8])
def test_weights_sum_to_one(T_kv, impl, device):
    """However large the logits. exp(z - lse) does not, as lse is rounded; then delta does not cancel what it should,
    and a query that sees one key only gets a gradient."""
    inputs = random_inputs(T_q=5, T_kv=T_kv, dtype=torch.float32, device=device)
    q, k, v, depth_k, depth_v = (x.detach() for x in inputs)
    for size in (1, 30, 1e3):
        o = moda_attention(q * size, k, torch.ones_like(v), depth_k, torch.ones_like(depth_v), impl=impl)
        assert (o - 1).abs().max() <= (T_kv + 3) * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("impl", [None, "torch"])
def test_cpu_runs_the_fused_path(impl, dtype, monkeypatch):
    inputs = random_inputs(T_q=4, T_kv=6, dtype=dtype)
    want = oracle(inputs)

    def forbidden(*args, **kwargs):
        raise AssertionError("the fused path was to run")

    monkeypatch.setattr(kernel, "moda_attention_reference", forbidden)
    monkeypatch.setattr(kernel, "moda_attention_weights", forbidden)
    assert_close(results(moda_attention, inputs, impl=impl), want, TOLERANCE[dtype])
    with pytest.raises(AssertionError, match="was to run"):
        moda_attention(*inputs, impl="reference")


def largest_allocation(function):
    """The largest number of bytes that is allocated at once while `function` runs, inside PyTorch's kernels too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize("T_q", [2048, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_allocates_no_score_matrix(T_q, dtype):
    T_kv = 2048
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # PyTorch's kernel has a block of scores for every thread
    try:
        inputs = random_inputs(B=1, n_kv_head=1, group=2, T_q=T_q, T_kv=T_kv, n_slot=2, dtype=dtype)
        sizes = {
            impl: largest_allocation(lambda impl=impl: moda_attention(*inputs, impl=impl).sum().backward())
            for impl in ("torch", "reference")
        }
    finally:
        torch.set_num_threads(threads)
    matrix = T_q * T_kv * dtype.itemsize
    assert sizes["reference"] >= matrix  # so the measurement sees it
    assert sizes["torch"] <= matrix / 4


# -------------------------------------------------------------------------------------------- as a citizen of PyTorch


@each_run
def test_gradients_of_some_inputs_only(impl, device):
    inputs = random_inputs(T_q=4, T_kv=6, dtype=torch.float32, device=device)
    all_grads = torch.autograd.grad(moda_attention(*inputs, impl=impl).sum(), inputs)
    for i, want in enumerate(all_grads):
        some = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
        (got,) = torch.autograd.grad(moda_attention(*some, impl=impl).sum(), some[i])
        assert torch.equal(got, want)
    with torch.no_grad():
        assert not moda_attention(*inputs, impl=impl).requires_grad


@each_run
def test_lse_is_not_differentiable(impl, device):
    o, lse = moda_attention(*random_inputs(dtype=torch.float32, device=device), impl=impl, return_lse=True)
    assert o.requires_grad and not lse.requires_grad


def test_second_derivative_is_refused():
    """Better an error than a wrong number."""
    inputs = random_inputs()
    (dq,) = torch.autograd.grad(moda_attention(*inputs, impl="torch").square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivatives: impl="reference"'):
        torch.autograd.grad(dq.sum(), inputs)


@each_run
@pytest.mark.parametrize("with_grad", [True, False])
def test_forward_mode(with_grad, impl, device):
    """torch.func.jvp along every input, against (u, J t) = (J^T u, t) of the reference's backward."""
    inputs = random_inputs(dtype=torch.float32, device=device)
    tangents = [random_like(x) for x in inputs]
    o = moda_attention_reference(*inputs)
    u = torch.randn(o.shape, generator=torch.Generator().manual_seed(2)).to(device)
    grads = torch.autograd.grad(o, inputs, u)
    with torch.set_grad_enabled(with_grad):
        detached = tuple(x.detach() for x in inputs)
        tangent = torch.func.jvp(lambda *x: moda_attention(*x, impl=impl), detached, tuple(tangents))[1]
    want = sum((grad * t).sum().item() for grad, t in zip(grads, tangents, strict=True))
    assert abs(want) > 1 and (tangent * u).sum().item() == pytest.approx(want, rel=1e-4)


@each_run
@pytest.mark.parametrize("n_slot", [None, 3])
def test_compiled_equals_eager(n_slot, impl, device):
    """Without a graph break, in a use like the model's: the sequence KV is a slot too, and some gradients are equal."""
    inputs = random_inputs(B=1, T_q=5, n_slot=n_slot, dtype=torch.float32, device=device)

    def two_layers(q, k, v, depth_k=None, depth_v=None):
        o = moda_attention(q, k, v, depth_k, depth_v, impl=impl)
        depth_k = k[None] if depth_k is None else torch.cat([depth_k, k[None]])
        depth_v = v[None] if depth_v is None else torch.cat([depth_v, v[None]])
        return moda_attention(o, k, v, depth_k, depth_v, impl=impl).transpose(1, 2).flatten(2)  # (B, T_q, n_embd)

    torch._dynamo.reset()  # the runs before this one must not count against the limit of recompilations
    compiled = torch.compile(two_layers, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    do = torch.randn(1, 5, inputs[0].shape[1] * 16, device=device)
    for x in (inputs, [strided(x, "transposed heads") for x in inputs]):
        want, got = ((y := f(*x), *torch.autograd.grad(y, x, do)) for f in (two_layers, compiled))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@each_run
@pytest.mark.parametrize("n_slot", [0, 1, 5])
def test_slots_as_a_list(n_slot, impl, device):
    """As the model hands them over: one tensor a slot, a gradient for each, and nothing saved but the slots."""
    q, k, v, depth_k, depth_v = random_inputs(T_q=6, n_slot=n_slot, dtype=torch.float32, device=device)
    lists = [[x.detach().requires_grad_() for x in slots] for slots in (depth_k, depth_v)]
    do = random_like(q)
    want, kept = results(moda_attention, [q, k, v, depth_k, depth_v], do, impl=impl), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (kept.append(x.untyped_storage().data_ptr()), x)[1], lambda x: x
    ):
        o, lse = moda_attention(q, k, v, *lists, impl=impl, return_lse=True)
    leaves = [q, k, v, *lists[0], *lists[1]]
    grads = torch.autograd.grad(o, leaves, do)
    assert torch.equal(o, want["o"]) and torch.equal(lse, want["lse"])
    for got, name in zip((*grads[:3], torch.stack(grads[3 : 3 + n_slot]) if n_slot else None), NAMES, strict=False):
        assert got is None or torch.equal(got, want[f"d{name}"])
    if n_slot:
        assert torch.equal(torch.stack(grads[3 + n_slot :]), want["ddepth_v"])
    if impl != "reference":
        assert set(kept) <= {x.untyped_storage().data_ptr() for x in (*leaves, o, lse)}


@each_run
@pytest.mark.parametrize("n_slot, as_list", [(None, False), (3, False), (3, True)])
def test_opcheck(n_slot, as_list, impl, device):
    """Fake implementations (shapes, strides, dtypes), schema, aliasing and autograd, by PyTorch's own checks."""
    if impl == "reference":
        pytest.skip("plain PyTorch, no operator")
    for layout in ("contiguous", "transposed heads", "expanded"):
        inputs = random_inputs(B=1, T_q=3, T_kv=4, n_slot=n_slot, dtype=torch.float32, device=device)
        q, k, v, *slots = (strided(x, layout) for x in inputs)
        slots = [[x.detach().requires_grad_() for x in y] if as_list else [y] for y in slots] or [[], []]
        tensors = (q, k, v, *slots)
        options = (True, 0.25, impl)  # causal, scale, impl
        torch.library.opcheck(torch.ops.moda.attention.default, (*tensors, *options), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            o, lse = torch.ops.moda.attention(*tensors, *options)
            args = (torch.ones_like(o), *tensors, o, lse, *options)
            torch.library.opcheck(torch.ops.moda.attention_backward.default, args)


@each_run
def test_checkpointing(impl, device):
    inputs = random_inputs(dtype=torch.float32, device=device)

    def layer(*inputs):
        return moda_attention(*inputs, impl=impl).square()

    want = torch.autograd.grad(layer(*inputs).sum(), inputs)
    got = torch.autograd.grad(checkpoint(layer, *inputs, use_reentrant=False).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@each_run
def test_autocast(impl, device):
    """Inputs are cast as PyTorch's own attention casts them: mixed types become the autocast type, float64 stays."""
    half = torch.bfloat16 if torch.bfloat16 in dtypes_of(impl, device) else torch.float16
    inputs = random_inputs(dtype=torch.float32, device=device)
    rounded = [x.detach().to(half).requires_grad_() for x in inputs]
    want = moda_attention(*rounded, impl=impl)
    with torch.autocast(device, half):
        o = moda_attention(*inputs, impl=impl)
        mixed = moda_attention(inputs[0], *rounded[1:], impl=impl)
        lists = moda_attention(*inputs[:3], [*inputs[3]], [*inputs[4]], impl=impl)
    assert o.dtype == half
    assert torch.equal(o, want) and torch.equal(mixed, want) and torch.equal(lists, want)
    want_grads = torch.autograd.grad(want.sum(), rounded)
    for grad, want_grad in zip(torch.autograd.grad(o.sum(), inputs), want_grads, strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, want_grad.float())
    with torch.autocast(device, half), torch.autocast(device, enabled=False):
        assert moda_attention(*inputs, impl=impl).dtype == torch.float32


def test_autocast_leaves_float64_alone():
    inputs = random_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(*inputs[:3], enable_gqa=True).dtype == torch.float64
        check("torch", inputs)


@pytest.mark.parametrize(
    ("B", "T", "group", "n_slot", "short"),
    [
        (1, 512, 8, 32, True),
        (1, 512, 8, 33, False),
        (2, 512, 8, 32, False),
        (4, 4096, 16, 8, True),
        (1, 512, 7, 8, False),
        (1, 512, 8, 0, False),
        (1, 8192, 8, 1, False),
    ],
)
def test_which_inputs_are_short(B, T, group, n_slot, short):
    q, k = (torch.empty(B, n, T, 64, dtype=torch.bfloat16, device="meta") for n in (2 * group, 2))
    assert kernel._is_short(q, k, n_slot, True) == short and not kernel._is_short(q, k, n_slot, False)
    for other in ((q.float(), k.float()), (q[:, :, 1:], k), (q.repeat(1, 1, 1, 2), k.repeat(1, 1, 1, 2))):
        assert not kernel._is_short(*other, n_slot, True)


AHEAD_OF_TIME = """
import re
import kernel, slots, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KINDS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", int: "i32", float: "fp32"}

class Compile:  # stands in for a kernel: compiles what it is launched with, for compute capability 9.0
    def __init__(self, fn):
        self.fn = fn

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **meta):
        options = {name: meta.pop(name) for name in ("num_warps", "num_stages") if name in meta}
        names = self.fn.arg_names
        kinds = [("i32",) * len(x) if isinstance(x, tuple) else KINDS[getattr(x, "dtype", type(x))] for x in args]
        signature = dict(zip(names, kinds)) | dict.fromkeys(meta, "constexpr")
        constexprs = {(names.index(name),): value for name, value in meta.items()}
        source = ASTSource(fn=self.fn, signature={name: signature[name] for name in names}, constexprs=constexprs)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        known = dict(re.findall(r"mov\\.b32\\s+(%r\\d+), (-?\\d+);", ptx))
        for pair in re.findall(r"\\.[su]16x2\\s+%r\\d+, (%r\\d+), (%r\\d+);", ptx):
            for number in (int(known[x]) for x in pair if x in known):
                # with one half empty, ptxas up to 13.0 drops the constant: see experiments/traps/ptxas-packed-halves.md
                assert number & 0xFFFF and number >> 16 & 0xFFFF, (self.fn.__name__, meta)
        print("compiled", self.fn.__name__, meta)

for module, name in (
    (kernel, "_forward_kernel"),
    (kernel, "_backward_kernel"),
    (slots, "_slots_backward_kernel"),
    (slots, "_addresses_kernel"),
    (slots, "_place_kernel"),
):
    setattr(module, name, Compile(getattr(module, name)))

for dtype, head_dim, group in (
    (torch.bfloat16, 48, 1),
    (torch.bfloat16, 48, 3),
    (torch.bfloat16, 48, 8),
    (torch.bfloat16, 256, 3),
    (torch.float32, 48, 3),
):
    q, do, o, dq = (torch.empty(1, 2 * group, 8, head_dim, dtype=dtype) for _ in range(4))
    k, v = (torch.empty(1, 2, 8, head_dim, dtype=dtype) for _ in range(2))
    depth = [torch.empty(20, 1, 2, 8, head_dim, dtype=dtype) for _ in range(2)]
    sums = [torch.empty(x.shape) for x in depth]
    lse, addresses = torch.empty(q.shape[:3]), torch.empty(8, 8, dtype=torch.int64)
    kernel._forward_triton(q, k, v, *depth, True, 1.0, (o, lse))
    kernel._depth_backward_triton(do, q, *depth, o, lse, 1.0, dq, slots=False)
    for causal in (True, False) if group == 3 and head_dim == 48 else ():
        kernel._forward_triton(q, k, v, *depth, causal, 1.0)
    kernel._depth_backward_triton(do, q, *depth, o, lse, 1.0, dq)
    slots._addresses_kernel[(1,)](addresses[0], q, do, lse, lse, 0)
    readers = [(q, do, lse, lse, 0)]
    slots.slots_backward(readers, addresses, *depth, 2, 4, dtype, sums, 0, 1.0)
    for n_reader in (1, 8):
        slots.slots_backward(readers * n_reader, addresses, *depth, 2, 18, torch.float32, None, 0, 1.0)
    x, to, rope = q[:, 0, :1].repeat(1, 1, 2), k.expand(3, -1, -1, -1, -1), torch.empty(2, 8, head_dim // 2).unbind()
    norm, position = torch.nn.RMSNorm(head_dim, eps=1e-6, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    slots.place(x, x, norm, rope, position, (to, to), (1, 3), 4, 0, 5)
    slots.place(x, None, torch.nn.Identity(), None, position, (to, None), (0, 1), 0)
"""


@pytest.mark.skipif(kernel.triton is None or platform.machine() != "x86_64", reason="needs Triton and its assembler")
def test_kernels_compile_for_a_gpu():
    """The interpreter takes what the compiler refuses. Compiling needs no GPU: here for compute capability 9.0."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", AHEAD_OF_TIME]
    run = subprocess.run(command, env=environment, cwd=Path(kernel.__file__).parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("compiled") == 49


# ---------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed heads"])
def test_every_backend(layout, backend):
    inputs = [strided(x, layout) for x in random_inputs(T_q=256, head_dim=64, dtype=torch.bfloat16, device="cuda")]
    with sdpa_kernel(getattr(SDPBackend, backend)):
        assert sdpa._backend(*inputs[:3], True) == backend.split("_")[0].lower()
        check("triton", inputs, strided(random_like(inputs[0]), "transposed heads").detach())


@pytest.mark.gpu
def test_no_backend_is_allowed(monkeypatch):
    """`sdpa_kernel(MATH)`: no fused attention runs, forward or backward."""
    inputs = random_inputs(T_q=64, head_dim=64, dtype=torch.bfloat16, device="cuda")
    monkeypatch.setattr(kernel, "sequence_forward", None)
    with sdpa_kernel(SDPBackend.MATH):
        check("triton", inputs, random_like(inputs[0]))


@pytest.mark.gpu
@pytest.mark.parametrize("B, n_kv_head", [(32_768, 4), (70_000, 1)])
def test_many_sequences(B, n_kv_head):
    """More than one axis of a CUDA grid takes, as a product and alone."""
    inputs = random_inputs(
        B=B, n_kv_head=n_kv_head, group=1, T_q=2, head_dim=16, n_slot=2, dtype=torch.bfloat16, device="cuda"
    )
    check(None if B > 65_535 else "triton", inputs, random_like(inputs[0]))


@pytest.mark.gpu
def test_cuda_runs_the_kernels(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("the kernels were to run")

    for name in ("moda_attention_reference", "_depth_forward_torch", "_depth_backward_torch"):
        monkeypatch.setattr(kernel, name, forbidden)
    for dtype in (torch.bfloat16, torch.float32):
        moda_attention(*random_inputs(dtype=dtype, device="cuda")).sum().backward()


@pytest.mark.gpu
def test_long_and_wide():
    """Offsets beyond 2**31 elements: T = 65536, 8 kv heads, 66 slots. Sampled rows against the equation."""
    inputs = bench.random_inputs(65_536, group=2, n_slot=66)
    do = torch.randn_like(inputs[0])
    assert inputs[3].numel() > 2**31
    o, lse = moda_attention(*inputs, return_lse=True)
    grads = torch.autograd.grad(o, inputs, do)
    assert bench.largest_error(*(x.detach() for x in inputs), do, o.detach(), lse, grads) <= TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_memory():
    """Beyond inputs, outputs and gradients: a few tensors like q, nothing like T * T, nothing like the slots."""
    inputs = random_inputs(
        B=1, n_kv_head=2, group=4, T_q=8192, head_dim=64, n_slot=64, dtype=torch.bfloat16, device="cuda"
    )
    q, slots = inputs[0], inputs[3]
    moda_attention(*inputs).sum().backward()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grads = torch.autograd.grad(moda_attention(*inputs), inputs, torch.ones_like(q))
    peak = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in grads)
    assert peak < 8 * q.nbytes < min(slots.nbytes, q.shape[2] ** 2 * q.itemsize)


# -------------------------------------------------------------------------------------------------------------- errors

BASE = sizes(B=2, n_kv_head=2, group=2, T_q=4, T_kv=6, head_dim=8, n_slot=3, dtype=torch.float32)  # 4 query heads

ERRORS = [  # what is wrong, what the message must say, the changed tensors (from the right ones)
    ("q rank", "q must be a tensor of rank 4", lambda a: a | {"q": a["q"][0]}),
    ("k rank", "k must be a tensor of rank 4", lambda a: a | {"k": a["k"][None]}),
    ("v rank", "v must be a tensor of rank 4", lambda a: a | {"v": a["v"][..., 0]}),
    ("depth_k rank", "depth_k must be a tensor of rank 5", lambda a: a | {"depth_k": a["depth_k"][0]}),
    ("depth_v rank", "depth_v must be a tensor of rank 5", lambda a: a | {"depth_v": a["depth_v"][0]}),
    ("q no tensor", "q must be a tensor.*list", lambda a: a | {"q": [1.0]}),
    ("v no tensor", "v must be a tensor.*NoneType", lambda a: a | {"v": None}),
    ("depth_v no tensor", "depth_v must be a tensor.*int", lambda a: a | {"depth_v": 1}),
    ("depth_k alone", "depth_k and depth_v", lambda a: a | {"depth_v": None}),
    ("depth_v alone", "depth_k and depth_v", lambda a: a | {"depth_k": None}),
    ("k batch", r"k must be \(2, 2, 6, 8\)", lambda a: a | {"k": a["k"][:1]}),
    ("k head_dim", "k must be", lambda a: a | {"k": a["k"][..., :4]}),
    ("v batch", "v must be", lambda a: a | {"v": a["v"][:1]}),
    ("v heads", "v must be", lambda a: a | {"v": a["v"][:, :1]}),
    ("v length", "v must be", lambda a: a | {"v": a["v"][:, :, :5]}),
    ("v head_dim", "v must be", lambda a: a | {"v": a["v"][..., :4]}),
    ("depth_k batch", "depth_k must be", lambda a: a | {"depth_k": a["depth_k"][:, :1]}),
    ("depth_k heads", "depth_k must be", lambda a: a | {"depth_k": a["depth_k"][:, :, :1]}),
    ("depth_k length", r"depth_k must be \(3, 2, 2, 4, 8\)", lambda a: a | {"depth_k": a["depth_k"][:, :, :, :3]}),
    ("depth_k head_dim", "depth_k must be", lambda a: a | {"depth_k": a["depth_k"][..., :4]}),
    ("depth_v slots", "as many slots, got 3 and 2", lambda a: a | {"depth_v": a["depth_v"][:2]}),
    ("a list and a tensor", "depth_k and depth_v", lambda a: a | {"depth_k": list(a["depth_k"])}),
    (
        "a list of slots",
        r"depth_k\[1\] must be \(2, 2, 4, 8\)",
        lambda a: a | {"depth_k": [a["depth_k"][0], *a["depth_k"][1:, :1]], "depth_v": list(a["depth_v"])},
    ),
    (
        "a list of no tensors",
        r"depth_v\[0\] must be a tensor.*float",
        lambda a: a | {"depth_k": list(a["depth_k"]), "depth_v": [1.0, 2.0, 3.0]},
    ),
    ("depth_v length", "depth_v must be", lambda a: a | {"depth_v": a["depth_v"][:, :, :, :3]}),
    (
        "no slots, other length",
        "depth_k must be",
        lambda a: a | {n: a[n][:0, :, :, :3] for n in ("depth_k", "depth_v")},
    ),
    *((f"{n} dtype", rf"dtype.*{n} has torch.float64", lambda a, n=n: a | {n: a[n].double()}) for n in NAMES[1:]),
    ("q dtype", "dtype.*q has torch.float64", lambda a: a | {"q": a["q"].double()}),
    ("whole numbers", "floating dtype.*int64", lambda a: {n: x.long() for n, x in a.items()}),
    *(
        (f"{n} device", rf"device.*{n} has torch.float32 on meta", lambda a, n=n: a | {n: a[n].to("meta")})
        for n in NAMES[1:]
    ),
    ("q device", "device.*q has torch.float32 on meta", lambda a: a | {"q": a["q"].to("meta")}),
    ("heads", r"n_head \(3\) must be a multiple of n_kv_head \(2\)", lambda a: a | {"q": a["q"][:, :3]}),
    ("fewer heads", r"n_head \(1\) must be a multiple of n_kv_head \(2\)", lambda a: a | {"q": a["q"][:, :1]}),
    ("T_q > T_kv", "T_q = 4, T_kv = 3", lambda a: a | {n: a[n][:, :, :3] for n in ("k", "v")}),
    ("no batch", "empty.*q", lambda a: {n: x[:, :0] if n in NAMES[3:] else x[:0] for n, x in a.items()}),
    ("no heads", "empty.*q", lambda a: a | {"q": a["q"][:, :0]}),
    ("no kv heads", "empty.*k", lambda a: a | {n: a[n][:, :0] for n in ("k", "v")}),
    ("no queries", "empty.*q", lambda a: a | {n: a[n][..., :0, :] for n in ("q", "depth_k", "depth_v")}),
    ("no keys", "empty.*k", lambda a: a | {n: a[n][:, :, :0] for n in ("k", "v")}),
    ("no head_dim", "empty.*q", lambda a: {n: x[..., :0] for n, x in a.items()}),
]


@pytest.mark.parametrize("function", ["moda_attention_reference", None, "reference", "torch"])
@pytest.mark.parametrize("message, change", [pytest.param(*e[1:], id=e[0]) for e in ERRORS])
def test_errors(message, change, function):
    arguments = change({n: x.detach() for n, x in zip(NAMES, random_inputs(**BASE), strict=True)})
    with pytest.raises(ValueError, match=message):
        if function == "moda_attention_reference":
            moda_attention_reference(**arguments)
        else:
            moda_attention(**arguments, impl=function)


def test_a_scale_that_would_get_no_gradient():
    with pytest.raises(ValueError, match="scale must be a number"):
        moda_attention(*random_inputs(**BASE), scale=torch.tensor(0.3, requires_grad=True))


@pytest.mark.parametrize("impl", ["flash", "Torch", "", 0, True])
def test_unknown_impl(impl):
    with pytest.raises(ValueError, match=rf"impl {re.escape(repr(impl))}.*'reference', 'torch'"):
        moda_attention(*random_inputs(**BASE), impl=impl)


@pytest.mark.skipif(kernel.triton is None, reason="needs Triton")
def test_too_many_sequences_for_the_grid():
    inputs = [x.detach().expand(70_000, *x.shape[1:]) for x in random_inputs(B=1, T_q=1, dtype=torch.float32)[:3]]
    with pytest.raises(ValueError, match="up to 65,535 sequences"):
        moda_attention(*inputs, impl="triton")
    assert moda_attention(*inputs).shape == inputs[0].shape


@pytest.mark.parametrize("impl", ["triton", "fused"])
def test_impl_that_cannot_run_here(impl):
    with pytest.raises(ValueError, match=f"impl='{impl}' cannot run here: .*(float64|not installed)"):
        moda_attention(*random_inputs(), impl=impl)


@pytest.mark.parametrize("impl", [None, "torch", "reference"])
def test_meta_device(impl):
    """No fused attention there: the reference runs, and shapes come out (for counting FLOPs without weights)."""
    inputs = [x.detach().to("meta") for x in random_inputs(**BASE)]
    o, lse = moda_attention(*inputs, impl=impl, return_lse=True)
    assert o.device.type == "meta" and o.shape == inputs[0].shape and lse.shape == o.shape[:3]
