"""The sequence half: PyTorch's fused attentions as one part of a larger softmax, against plain autograd in float64."""

import pytest
import torch

from kernel import moda_attention_reference
from sdpa import has_fused, sequence_backward, sequence_forward

SHAPES = [(6, 6, True), (6, 6, False), (4, 9, True), (1, 9, True), (4, 9, False), (65, 130, True)]  # T_q, T_kv, causal


def inputs(T_q, T_kv, n_head=6, n_kv_head=2, head_dim=16):
    generator = torch.Generator().manual_seed(0)
    shapes = (n_head, T_q), (n_kv_head, T_kv), (n_kv_head, T_kv)
    return [torch.randn(2, *s, head_dim, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("T_q, T_kv, causal", SHAPES)
def test_forward_returns_output_and_log_sum_exp(T_q, T_kv, causal):
    q, k, v = inputs(T_q, T_kv)
    want = moda_attention_reference(q, k, v, causal=causal, scale=0.3, return_lse=True)
    torch.testing.assert_close(sequence_forward(*(x.detach() for x in (q, k, v)), causal, 0.3), want)


@pytest.mark.parametrize("T_q, T_kv, causal", SHAPES)
def test_backward_from_the_state_of_a_larger_softmax(T_q, T_kv, causal):
    """Given the joint o and lse of these keys and others, it returns the joint softmax's gradients for these keys, and
    their share of dq."""
    q, k, v = inputs(T_q, T_kv)
    others = torch.randn(2, 3, 2, 2, T_q, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    o, lse = moda_attention_reference(q, k, v, *others, causal=causal, scale=0.3, return_lse=True)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    dk, dv = torch.autograd.grad(o, (k, v), do)
    got = sequence_backward(do, *(x.detach() for x in (q, k, v, o, lse)), causal, 0.3)
    torch.testing.assert_close(got[1:], (dk, dv))
    fixed = q.detach()  # the share of dq: what a query gets through the logits of these keys alone
    z = torch.einsum("bkgtd,bkjd->bkgtj", q.unflatten(1, (2, 3)), k.detach()) * 0.3
    visible = torch.ones(T_q, T_kv, dtype=torch.bool).tril(T_kv - T_q) if causal else torch.ones(T_q, T_kv, dtype=bool)
    z_others = torch.einsum("bkgtd,sbktd->bkgts", fixed.unflatten(1, (2, 3)), others[0]) * 0.3
    p = torch.cat([z.masked_fill(~visible, float("-inf")), z_others], -1).softmax(-1)
    out = torch.einsum("bkgtj,bkjd->bkgtd", p[..., :T_kv], v.detach())
    out = out + torch.einsum("bkgts,sbktd->bkgtd", p[..., T_kv:], others[1])
    torch.testing.assert_close(got[0], torch.autograd.grad(out.flatten(1, 2), q, do)[0])


def test_has_fused():
    q = torch.empty(1, 2, 3, 16)
    assert all(has_fused(q.to(dtype)) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16))
    assert not has_fused(q.to("meta"))
