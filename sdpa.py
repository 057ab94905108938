"""The sequence half of MoDA: PyTorch's fused attentions, with their log-sum-exp, and their backward from any (o, lse).

FlashAttention returns an output and a log-sum-exp. That pair IS a state of the online softmax: running maximum lse,
denominator 1, accumulator o. A loop over more keys, here the depth slots, simply goes on from it. The backward needs
even less. It recomputes P = exp(z - lse) and delta = rowsum(do * o) from the o and lse it is GIVEN. So give it the
joint o and lse of [sequence | depth]. The dq, dk, dv that it returns are then the sequence half of MoDA's gradients.
PyTorch merges attention over several devices in the same way (torch/distributed/tensor/experimental/_context_parallel).

kernel.py needs `has_fused`, `sequence_forward` and `sequence_backward`. Shapes as there.
"""

import torch
import torch.nn.functional as F
from torch.backends import cuda

aten = torch.ops.aten


def has_fused(q):
    """Whether PyTorch has a fused attention that returns its lse for q, and `torch.nn.attention.sdpa_kernel` allows
    one. On CUDA they take head_dim up to 256, and batch and heads are axes of a grid."""
    if q.device.type == "cpu":
        return q.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if q.device.type != "cuda" or q.dtype == torch.float64 or q.shape[3] > 256 or max(q.shape[:2]) > 65_535:
        return False
    if torch.compiler.is_compiling():  # which cannot trace the questions below
        return True
    return cuda.cudnn_sdp_enabled() or cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled()


def _backend(q, k, v, causal):
    """The fastest of PyTorch's fused attentions that takes these inputs and that `sdpa_kernel` allows."""
    if q.device.type == "cpu":
        return "cpu"
    params = cuda.SDPAParams(q, k, v, None, 0.0, causal, q.shape[1] != k.shape[1])
    cudnn = cuda.can_use_cudnn_attention(params)
    # cuDNN builds a plan for every new shape, which takes longer than attention itself: for shapes that recur only
    if cudnn and q.shape[2] == k.shape[2] and q.shape[2] % 64 == 0 and q.shape[3] <= 128:
        return "cudnn"
    if cuda.can_use_flash_attention(params):
        return "flash"
    return "cudnn" if cudnn and not cuda.mem_efficient_sdp_enabled() else "efficient"


def laid_out(x, like):
    """x, copied if it has to be, with the strides of `torch.empty_like(like)`."""
    is_so = x.stride() == torch.empty_like(like, device="meta").stride()
    return x if is_so else torch.empty_like(like).copy_(x)


# cuDNN's plans are cached by the shapes and strides of q, k, v, but (seen with torch 2.11) not by those of o and do:
# whoever comes second with other strides silently gets wrong gradients. So o and do always go in laid out like q, and
# the plans are our own: the dropout probability is part of the key byte by byte, where -0.0, just as much no dropout,
# differs from everybody else's 0.0.
_CUDNN_DROPOUT = -0.0


def _sdpa_forward(q, k, v, causal, scale):
    """o (B, n_head, T_q, head_dim), lse (B, n_head, T_q) of attention on the sequence keys alone."""
    match _backend(q, k, v, causal):
        case "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        case "cudnn":
            dropout = _CUDNN_DROPOUT
            o, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, dropout, causal, scale=scale)[:2]
            return o, lse.squeeze(-1)
        case "flash":
            return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
        case "efficient":  # knows no grouped heads, and pads its lse
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            o, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
            return o, lse[:, :, : q.shape[2]]


def _sdpa_backward(do, q, k, v, o, lse, causal, scale):
    """dq, dk, dv through P = exp(z - lse) and delta = rowsum(do * o), whatever softmax o and lse came from."""
    T_q, T_kv = q.shape[2], k.shape[2]
    seed = torch.empty(0, dtype=torch.int64, device=q.device)  # of the dropout that nobody does
    match _backend(q, k, v, causal):
        case "cpu":
            op = aten._scaled_dot_product_flash_attention_for_cpu_backward
            return op(do, q, k, v, o, lse, 0.0, causal, scale=scale)
        case "cudnn":
            op = aten._scaled_dot_product_cudnn_attention_backward
            args = (seed, seed, None, None, None, T_q, T_kv, _CUDNN_DROPOUT, causal)
            return op(do, q, k, v, o, lse.unsqueeze(-1), *args, scale=scale)
        case "flash":
            op = aten._scaled_dot_product_flash_attention_backward
            return op(do, q, k, v, o, lse, None, None, T_q, T_kv, 0.0, causal, seed, seed, scale=scale)
        case "efficient":
            op = aten._scaled_dot_product_efficient_attention_backward
            group = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
            lse = F.pad(lse, (0, -T_q % 32))
            do, o = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (do, o))  # it takes no other layout
            grads = op(do, q, k, v, None, o, lse, seed, seed, 0.0, [True, True, True, False], causal, scale=scale)
            return grads[0], *(g.unflatten(1, (-1, group)).sum(2) for g in grads[1:3])


def _key_blocks(T_q, T_kv, causal):
    """The keys as [(start, stop, is_causal)]. PyTorch's `is_causal` aligns its triangle to the TOP left, so fewer
    queries than keys need an unmasked prefix and a causal square; a single query sees everything."""
    if not causal or T_q == 1:
        return [(0, T_kv, False)]
    square = (T_kv - T_q, T_kv, True)
    return [square] if T_q == T_kv else [(0, T_kv - T_q, False), square]


def sequence_forward(q, k, v, causal, scale):
    """o (B, n_head, T_q, head_dim), lse (B, n_head, T_q) over the sequence keys; the queries are the last T_q of the
    T_kv positions."""
    state = None
    for start, stop, is_causal in _key_blocks(q.shape[2], k.shape[2], causal):
        o, lse = _sdpa_forward(q, k[:, :, start:stop], v[:, :, start:stop], is_causal, scale)
        if state is not None:  # merge two softmax states by their weights
            both = torch.stack([state[1], lse])
            w_old, w_new = both.softmax(0).unsqueeze(-1)
            o, lse = (state[0] * w_old + o * w_new).to(q.dtype), both.logsumexp(0)
        state = o, lse
    return state


def sequence_backward(do, q, k, v, o, lse, causal, scale):
    """The sequence half of dq, and dk, dv, from the joint o and lse. o and do are laid out like q."""
    dq, dk, dv = [], [], []
    for start, stop, is_causal in _key_blocks(q.shape[2], k.shape[2], causal):
        block = _sdpa_backward(do, q, k[:, :, start:stop], v[:, :, start:stop], o, lse, is_causal, scale)
        for grads, grad in zip((dq, dk, dv), block, strict=True):
            grads.append(grad)
    return (sum(dq[1:], dq[0]), *(g[0] if len(g) == 1 else torch.cat(g, dim=2) for g in (dk, dv)))
