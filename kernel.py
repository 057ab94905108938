"""Mixture-of-Depths Attention (MoDA, arXiv 2603.15619): the operator.

Query t of head h looks, under ONE softmax, at two sets of keys:

    z_t = scale * [ q_t . k_0 ... q_t . k_t | q_t . k^0_t ... q_t . k^{S-1}_t ]      (sequence | depth)
    o_t = softmax(z_t) . [ v_0 ... v_t | v^0_t ... v^{S-1}_t ]

the causal *sequence* KV of its own layer, and the *depth* KV: what S earlier sublayers wrote at the very same
position t. Shapes, here and everywhere in this repository:

    q                  (B, n_head,    T_q,  head_dim)
    k, v               (B, n_kv_head, T_kv, head_dim)         head h reads kv head h // group
    depth_k, depth_v   (n_slot, B, n_kv_head, T_q, head_dim)  slot-major: a slot is the K or V one sublayer wrote
    lse                (B, n_head, T_q)                       log-sum-exp of z, natural logarithm

with group = n_head // n_kv_head. `moda_attention` at the bottom is what to call. Read top to bottom: the equation;
the sequence half, left to PyTorch's fused attention; the depth half in plain PyTorch; the depth half and the whole of
the paper's Algorithm 1 in Triton; the operator.
"""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: everything but the Triton kernels works
    triton, tl = None, SimpleNamespace(constexpr=None)  # their signatures still have to read

aten = torch.ops.aten
# asked for once: torch.compile cannot trace the question everywhere
AUTOCAST_DEVICES = [name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name)]
INTERPRET = triton is not None and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on CPU tensors


# ------------------------------------------------------------------------------------------------ the equation


def _full_precision(x):
    """A context without autocast on x's device: where there is float32 in this file, it is meant."""
    return torch.autocast(x.device.type, enabled=False) if x.device.type in AUTOCAST_DEVICES else nullcontext()


def moda_attention_weights(q, k, depth_k=None, *, causal=True, scale=None):
    """The joint softmax of MoDA, as a matrix. For looking, and for the reference; needs O(T_q * T_kv) memory.

    Arguments and errors as in `moda_attention`. Returns (p, lse): p (B, n_head, T_q, T_kv + n_slot), whose rows sum to
    1, sequence columns first; lse (B, n_head, T_q). Both in float32, or in float64 for float64 inputs.
    """
    _check(q, k, k, depth_k, depth_k, causal)
    n_head, T_q, head_dim = q.shape[1:]
    n_kv_head, T_kv = k.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    with _full_precision(q):
        q = q.to(dtype).unflatten(1, (n_kv_head, n_head // n_kv_head))  # (B, n_kv_head, group, T_q, head_dim)
        z = q @ k.to(dtype).mT.unsqueeze(2) * scale  # (B, n_kv_head, group, T_q, T_kv)
        if causal:  # the queries are the last T_q of the T_kv positions
            visible = torch.ones(T_q, T_kv, dtype=torch.bool, device=q.device).tril(T_kv - T_q)
            z = z.masked_fill(~visible, float("-inf"))
        if depth_k is not None:
            z_depth = torch.einsum("bkgtd,sbktd->bkgts", q, depth_k.to(dtype)) * scale
            z = torch.cat([z, z_depth], dim=-1)  # (B, n_kv_head, group, T_q, T_kv + n_slot)
    return z.softmax(-1).flatten(1, 2), z.logsumexp(-1).flatten(1, 2)


def moda_attention_reference(q, k, v, depth_k=None, depth_v=None, *, causal=True, scale=None, return_lse=False):
    """The equation at the top of this file, written out. Arguments, result and errors as in `moda_attention`.

    The oracle of every test: run it in float64. Differentiable by plain autograd.
    """
    _check(q, k, v, depth_k, depth_v, causal)
    p, lse = moda_attention_weights(q, k, depth_k, causal=causal, scale=scale)
    p = p.unflatten(1, (k.shape[1], -1))  # (B, n_kv_head, group, T_q, T_kv + n_slot)
    p_seq, p_depth = p.split([k.shape[2], p.shape[-1] - k.shape[2]], dim=-1)
    with _full_precision(q):
        o = p_seq @ v.to(p.dtype).unsqueeze(2)  # (B, n_kv_head, group, T_q, head_dim)
        if depth_v is not None:
            o = o + torch.einsum("bkgts,sbktd->bkgtd", p_depth, depth_v.to(p.dtype))
    o = o.flatten(1, 2).to(q.dtype)  # (B, n_head, T_q, head_dim)
    return (o, lse.detach()) if return_lse else o


def _check(q, k, v, depth_k, depth_v, causal):
    """One sentence for whoever passed the wrong tensor. Raises ValueError."""
    if (depth_k is None) != (depth_v is None):
        raise ValueError("depth_k and depth_v go together: pass both or neither")
    tensors = {"q": q, "k": k, "v": v} | ({} if depth_k is None else {"depth_k": depth_k, "depth_v": depth_v})
    for name, x in tensors.items():
        rank = 5 if name.startswith("depth") else 4
        if not isinstance(x, torch.Tensor) or x.dim() != rank:
            got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor of rank {rank}, got {got}")
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise ValueError(f"all tensors must have one floating dtype: q is {q.dtype}, {name} is {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"all tensors must be on one device: q is on {q.device}, {name} on {x.device}")
    (B, n_head, T_q, head_dim), (n_kv_head, T_kv) = q.shape, k.shape[1:3]
    if 0 in q.shape or 0 in k.shape:  # an empty tensor crashes PyTorch's CPU kernel (SIGFPE), so it must not get there
        raise ValueError(f"empty input: q {tuple(q.shape)}, k {tuple(k.shape)}")
    if n_head % n_kv_head:
        raise ValueError(f"n_head ({n_head}) must be a multiple of n_kv_head ({n_kv_head})")
    if causal and T_q > T_kv:
        raise ValueError(f"causal attention needs T_q <= T_kv, got T_q = {T_q}, T_kv = {T_kv}")
    expect = {"k": (B, n_kv_head, T_kv, head_dim), "v": (B, n_kv_head, T_kv, head_dim)}
    if depth_k is not None:
        expect |= dict.fromkeys(("depth_k", "depth_v"), (depth_k.shape[0], B, n_kv_head, T_q, head_dim))
    for name, shape in expect.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name} must be {shape} to go with q {tuple(q.shape)}, got {tuple(tensors[name].shape)}")


# ------------------------------------------------------------------- the sequence half: PyTorch's fused attention
#
# FlashAttention returns (o, lse). That is an online-softmax state: running maximum lse, denominator 1, accumulator o.
# So a loop over more keys, here the depth slots, can simply go on from it. The backward needs even less: it recomputes
# P = exp(z - lse) and delta = rowsum(do * o) from the o and lse it is GIVEN. Give it the JOINT o and lse, and its
# dq, dk, dv are the sequence half of MoDA's gradients.


def _has_fused(q):
    """Whether PyTorch has a fused attention that returns its lse for the device, dtype and head_dim of q."""
    if q.device.type == "cpu":
        return q.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return q.device.type == "cuda" and q.dtype != torch.float64 and q.shape[-1] <= 256


def _backend(q, k, v, causal):
    """The fastest of PyTorch's fused attentions that takes these inputs; `torch.nn.attention.sdpa_kernel` limits it."""
    if q.device.type == "cpu":
        return "cpu"
    params = SDPAParams(q, k, v, None, 0.0, causal, q.shape[1] != k.shape[1])
    # cuDNN builds a plan for every new shape, which takes longer than attention itself: for shapes that recur only
    steady = q.shape[2] == k.shape[2] and q.shape[2] % 64 == 0 and q.shape[3] <= 128
    if steady and can_use_cudnn_attention(params):
        return "cudnn"
    return "flash" if can_use_flash_attention(params) else "efficient"


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
    """The keys as [(start, stop, is_causal)]: `is_causal` in PyTorch aligns its triangle to the TOP left, so fewer
    queries than keys need an unmasked prefix and a causal square; a single query sees everything."""
    if not causal or T_q == 1:
        return [(0, T_kv, False)]
    square = (T_kv - T_q, T_kv, True)
    return [square] if T_q == T_kv else [(0, T_kv - T_q, False), square]


def _sequence_forward(q, k, v, causal, scale):
    state = None
    for start, stop, is_causal in _key_blocks(q.shape[2], k.shape[2], causal):
        o, lse = _sdpa_forward(q, k[:, :, start:stop], v[:, :, start:stop], is_causal, scale)
        if state is not None:  # merge two softmax states by their weights
            both = torch.logaddexp(state[1], lse)
            w_old, w_new = (state[1] - both).exp().unsqueeze(-1), (lse - both).exp().unsqueeze(-1)
            o, lse = (state[0] * w_old + o * w_new).to(q.dtype), both
        state = o, lse
    return state


def _sequence_backward(do, q, k, v, o, lse, causal, scale):
    dq, dk, dv = [], [], []
    for start, stop, is_causal in _key_blocks(q.shape[2], k.shape[2], causal):
        block = _sdpa_backward(do, q, k[:, :, start:stop], v[:, :, start:stop], o, lse, is_causal, scale)
        for grads, grad in zip((dq, dk, dv), block, strict=True):
            grads.append(grad)
    return (sum(dq[1:], dq[0]), *(g[0] if len(g) == 1 else torch.cat(g, dim=2) for g in (dk, dv)))


# ----------------------------------------------------------------------- the depth half, portable: plain PyTorch
#
# One small matrix product per token: its `group` query rows against its n_slot keys. O(T * n_slot) memory.


def _by_token(x, n_kv_head):
    """(B, n_head, T_q, ...) -> (B, n_kv_head, T_q, group, ...) in float32 or wider."""
    return x.unflatten(1, (n_kv_head, -1)).transpose(2, 3).to(torch.promote_types(x.dtype, torch.float32))


def _slots_by_token(x):
    """(n_slot, B, n_kv_head, T_q, head_dim) -> (B, n_kv_head, T_q, n_slot, head_dim) in float32 or wider."""
    return x.permute(1, 2, 3, 0, 4).to(torch.promote_types(x.dtype, torch.float32))


def _depth_forward_torch(q, depth_k, depth_v, o, lse, scale):
    """Continue the softmax state (o, lse) over the depth slots. Returns the joint (o, lse)."""
    n_kv_head = depth_k.shape[2]
    z = _by_token(q, n_kv_head) @ _slots_by_token(depth_k).mT * scale  # (B, n_kv_head, T_q, group, n_slot)
    lse = _by_token(lse, n_kv_head)  # (B, n_kv_head, T_q, group)
    joint = torch.logaddexp(lse, z.logsumexp(-1))
    o = _by_token(o, n_kv_head) * (lse - joint).exp().unsqueeze(-1)
    o = o + (z - joint.unsqueeze(-1)).exp() @ _slots_by_token(depth_v)  # (B, n_kv_head, T_q, group, head_dim)
    return o.transpose(2, 3).flatten(1, 2).to(q.dtype), joint.transpose(2, 3).flatten(1, 2)


def _depth_backward_torch(do, q, depth_k, depth_v, o, lse, scale):
    """dq (the depth part), ddepth_k, ddepth_v from the joint o and lse."""
    n_kv_head = depth_k.shape[2]
    q_, do_ = _by_token(q, n_kv_head), _by_token(do, n_kv_head)  # (B, n_kv_head, T_q, group, head_dim)
    k_, v_ = _slots_by_token(depth_k), _slots_by_token(depth_v)  # (B, n_kv_head, T_q, n_slot, head_dim)
    delta = (do_ * _by_token(o, n_kv_head)).sum(-1, keepdim=True)  # (B, n_kv_head, T_q, group, 1)
    p = (q_ @ k_.mT * scale - _by_token(lse, n_kv_head).unsqueeze(-1)).exp()  # (B, n_kv_head, T_q, group, n_slot)
    dz = p * (do_ @ v_.mT - delta) * scale
    ddepth_k, ddepth_v = ((x.mT @ y).permute(3, 0, 1, 2, 4).to(q.dtype) for x, y in ((dz, q_), (p, do_)))
    return (dz @ k_).transpose(2, 3).flatten(1, 2).to(q.dtype), ddepth_k, ddepth_v


# ------------------------------------------------------------------------------------------- Algorithm 1, in Triton
#
# A program owns BLOCK_M rows of q that read one kv head: the `group` heads of one token side by side, so that row i
# belongs to token t0 + i // GROUP, and one load of a key serves all the heads that read it. For the slots of its
# tokens the columns are counted slot by slot: column c is slot c // BLOCK_T of token t0 + c % BLOCK_T. A row wants
# one column in BLOCK_T; the others are computed and masked. So a small tile wastes least, and 16 rows, the fewest
# that a matrix unit takes, are enough: the depth half does little arithmetic on many bytes.
#
# `jit` is an identity where there is no Triton, so that this file imports everywhere. It compiles a kernel anew for
# numbers that are 1 or multiples of 16: strides profit from that, numbers of slots and readers only multiply the
# kernels, so all but n_slot itself are excepted.

jit = triton.jit if triton else lambda fn=None, **_: fn or (lambda fn: fn)


@jit
def _softmax_step(z, v, m, acc, o):
    """One step of the online softmax: logits z (BLOCK_M, BLOCK_N) in base 2, values v (BLOCK_N, D)."""
    m_new = tl.maximum(m, tl.max(z, 1))
    p, rescale = tl.exp2(z - m_new[:, None]), tl.exp2(m - m_new)
    return m_new, acc * rescale + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, o * rescale[:, None], input_precision="ieee")


@jit
def _forward_kernel(
    q, k, v, depth_k, depth_v, o, lse,  # pointers; o and lse are read too, if CONTINUE
    q_stride, k_stride, v_stride, depth_k_stride, depth_v_stride, o_stride,  # without the last dimension, whose is 1
    n_head, T_q, T_kv, n_slot, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,  # D: head_dim rounded up to a power of two
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, CONTINUE: tl.constexpr,
):  # fmt: skip
    """The paper's Algorithm 1: sequence keys without mask, boundary keys with the causal mask, depth slots with the
    same-token mask, all into one state (m, acc, o). With CONTINUE the state is FlashAttention's, and only the third
    loop runs. The last blocks have the most keys, so they go first."""
    LN2: tl.constexpr = 0.6931471805599453
    BLOCK_T: tl.constexpr = BLOCK_M // GROUP  # tokens of this program
    t0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_T
    n_kv_head = n_head // GROUP
    b, kv_head = (tl.program_id(1) // n_kv_head).to(tl.int64), (tl.program_id(1) % n_kv_head).to(tl.int64)

    row, col, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    token, head = (t0 + row // GROUP).to(tl.int64), kv_head * GROUP + row % GROUP
    in_dim = dim < HEAD_DIM
    in_row = (row < BLOCK_T * GROUP) & (token < T_q)
    in_tile = in_row[:, None] & in_dim[None, :]

    q_row = q + b * q_stride[0] + head * q_stride[1] + token * q_stride[2]
    o_row = o + b * o_stride[0] + head * o_stride[1] + token * o_stride[2]
    lse_row = lse + (b * n_head + head) * T_q + token
    q_tile = tl.load(q_row[:, None] + dim[None, :], mask=in_tile, other=0.0)  # (BLOCK_M, D)

    if CONTINUE:
        m = tl.load(lse_row, mask=in_row, other=0.0) / LN2
        acc = tl.full([BLOCK_M], 1.0, tl.float32)
        o_tile = tl.load(o_row[:, None] + dim[None, :], mask=in_tile, other=0.0).to(tl.float32)
    else:
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        acc = tl.zeros([BLOCK_M], tl.float32)
        o_tile = tl.zeros([BLOCK_M, D], tl.float32)
        k_head = k + b * k_stride[0] + kv_head * k_stride[1]
        v_head = v + b * v_stride[0] + kv_head * v_stride[1]
        position = token + (T_kv - T_q)  # the queries are the last T_q positions
        if CAUSAL:
            n_seen = tl.minimum(t0 + (T_kv - T_q) + BLOCK_T, T_kv)  # by the last token of the block
            n_full = (t0 + (T_kv - T_q) + 1) // BLOCK_N * BLOCK_N  # whole blocks that its first token sees
        else:
            n_seen = T_kv
            n_full = T_kv // BLOCK_N * BLOCK_N

        for start in range(0, n_full, BLOCK_N):  # (1) no mask
            at = (start + col).to(tl.int64)
            k_tile = tl.load(k_head + at[None, :] * k_stride[2] + dim[:, None], mask=in_dim[:, None], other=0.0)
            v_tile = tl.load(v_head + at[:, None] * v_stride[2] + dim[None, :], mask=in_dim[None, :], other=0.0)
            z = tl.dot(q_tile, k_tile, input_precision="ieee") * scale_log2  # (BLOCK_M, BLOCK_N)
            m, acc, o_tile = _softmax_step(z, v_tile, m, acc, o_tile)

        for start in range(n_full, n_seen, BLOCK_N):  # (2) the boundary
            at = (start + col).to(tl.int64)
            seen = at < T_kv
            in_k, in_v = in_dim[:, None] & seen[None, :], in_dim[None, :] & seen[:, None]
            k_tile = tl.load(k_head + at[None, :] * k_stride[2] + dim[:, None], mask=in_k, other=0.0)
            v_tile = tl.load(v_head + at[:, None] * v_stride[2] + dim[None, :], mask=in_v, other=0.0)
            z = tl.dot(q_tile, k_tile, input_precision="ieee") * scale_log2
            visible = seen[None, :] & (position[:, None] >= at[None, :]) if CAUSAL else seen[None, :]
            m, acc, o_tile = _softmax_step(tl.where(visible, z, float("-inf")), v_tile, m, acc, o_tile)

    k_slots = depth_k + b * depth_k_stride[1] + kv_head * depth_k_stride[2]
    v_slots = depth_v + b * depth_v_stride[1] + kv_head * depth_v_stride[2]
    for start in range(0, n_slot * BLOCK_T, BLOCK_N):  # (3) the depth slots
        slot, source = ((start + col) // BLOCK_T).to(tl.int64), (t0 + (start + col) % BLOCK_T).to(tl.int64)
        seen = (slot < n_slot) & (source < T_q)
        in_k, in_v = in_dim[:, None] & seen[None, :], in_dim[None, :] & seen[:, None]
        k_col = k_slots + slot * depth_k_stride[0] + source * depth_k_stride[3]
        v_col = v_slots + slot * depth_v_stride[0] + source * depth_v_stride[3]
        k_tile = tl.load(k_col[None, :] + dim[:, None], mask=in_k, other=0.0)  # (D, BLOCK_N)
        v_tile = tl.load(v_col[:, None] + dim[None, :], mask=in_v, other=0.0)  # (BLOCK_N, D)
        z = tl.dot(q_tile, k_tile, input_precision="ieee") * scale_log2
        same_token = seen[None, :] & (token[:, None] == source[None, :])
        m, acc, o_tile = _softmax_step(tl.where(same_token, z, float("-inf")), v_tile, m, acc, o_tile)

    tl.store(o_row[:, None] + dim[None, :], (o_tile / acc[:, None]).to(o.dtype.element_ty), mask=in_tile)
    tl.store(lse_row, (m + tl.log2(acc)) * LN2, mask=in_row)


@jit(do_not_specialize=["first"])
def _backward_kernel(
    do, q, depth_k, depth_v, o, lse,  # pointers
    dq, delta, ddepth_k, ddepth_v, reader,  # pointers to results; dq holds the sequence half already
    do_stride, q_stride, depth_k_stride, depth_v_stride, o_stride, dq_stride, ddepth_k_stride, ddepth_v_stride,
    n_head, T_q, n_slot, first, scale, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Gradients of the depth half, in one pass over the slots: a slot's K and V at a token are read by that token's
    own rows only, all of them in this program, so dK and dV are finished and stored as they are met, with no atomics,
    and dq is added to the sequence half's. Without SLOTS only dq, and what `_slots_backward_kernel` needs: delta and,
    in `reader`, where this layer's tensors are, and `first`, the number of the first slot that it read."""
    LN2: tl.constexpr = 0.6931471805599453
    BLOCK_T: tl.constexpr = BLOCK_M // GROUP
    t0 = tl.program_id(0) * BLOCK_T
    n_kv_head = n_head // GROUP
    b, kv_head = (tl.program_id(1) // n_kv_head).to(tl.int64), (tl.program_id(1) % n_kv_head).to(tl.int64)

    row, col, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    token, head = (t0 + row // GROUP).to(tl.int64), kv_head * GROUP + row % GROUP
    in_dim = dim < HEAD_DIM
    in_row = (row < BLOCK_T * GROUP) & (token < T_q)
    in_tile = in_row[:, None] & in_dim[None, :]

    q_row = q + b * q_stride[0] + head * q_stride[1] + token * q_stride[2]
    o_row = o + b * o_stride[0] + head * o_stride[1] + token * o_stride[2]
    do_row = do + b * do_stride[0] + head * do_stride[1] + token * do_stride[2]
    dq_row = dq + b * dq_stride[0] + head * dq_stride[1] + token * dq_stride[2]
    q_tile = tl.load(q_row[:, None] + dim[None, :], mask=in_tile, other=0.0)  # (BLOCK_M, D)
    do_tile = tl.load(do_row[:, None] + dim[None, :], mask=in_tile, other=0.0)
    o_tile = tl.load(o_row[:, None] + dim[None, :], mask=in_tile, other=0.0)
    dq_tile = tl.load(dq_row[:, None] + dim[None, :], mask=in_tile, other=0.0).to(tl.float32)
    lse_log2 = tl.load(lse + (b * n_head + head) * T_q + token, mask=in_row, other=0.0) / LN2
    delta_tile = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)  # (BLOCK_M,)

    k_slots = depth_k + b * depth_k_stride[1] + kv_head * depth_k_stride[2]
    v_slots = depth_v + b * depth_v_stride[1] + kv_head * depth_v_stride[2]
    dk_slots = ddepth_k + b * ddepth_k_stride[1] + kv_head * ddepth_k_stride[2]
    dv_slots = ddepth_v + b * ddepth_v_stride[1] + kv_head * ddepth_v_stride[2]
    for start in range(0, n_slot * BLOCK_T, BLOCK_N):
        slot, source = ((start + col) // BLOCK_T).to(tl.int64), (t0 + (start + col) % BLOCK_T).to(tl.int64)
        seen = (slot < n_slot) & (source < T_q)
        in_kv = seen[:, None] & in_dim[None, :]
        k_col = k_slots + slot * depth_k_stride[0] + source * depth_k_stride[3]
        v_col = v_slots + slot * depth_v_stride[0] + source * depth_v_stride[3]
        k_tile = tl.load(k_col[:, None] + dim[None, :], mask=in_kv, other=0.0)  # (BLOCK_N, D)
        v_tile = tl.load(v_col[:, None] + dim[None, :], mask=in_kv, other=0.0)
        z = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale_log2  # (BLOCK_M, BLOCK_N)
        same_token = seen[None, :] & (token[:, None] == source[None, :])
        p = tl.exp2(tl.where(same_token, z - lse_log2[:, None], float("-inf")))
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        dz = (p * (dp - delta_tile[:, None]) * scale).to(k_tile.dtype)
        dq_tile = tl.dot(dz, k_tile, dq_tile, input_precision="ieee")
        if SLOTS:
            dk_tile = tl.dot(tl.trans(dz), q_tile, input_precision="ieee")  # (BLOCK_N, D)
            dv_tile = tl.dot(tl.trans(p.to(do_tile.dtype)), do_tile, input_precision="ieee")
            dk_col = dk_slots + slot * ddepth_k_stride[0] + source * ddepth_k_stride[3]
            dv_col = dv_slots + slot * ddepth_v_stride[0] + source * ddepth_v_stride[3]
            tl.store(dk_col[:, None] + dim[None, :], dk_tile.to(k_tile.dtype), mask=in_kv)
            tl.store(dv_col[:, None] + dim[None, :], dv_tile.to(k_tile.dtype), mask=in_kv)

    if not SLOTS:  # noqa: SIM102 (the compiler decides this one)
        if tl.program_id(0) + tl.program_id(1) == 0:
            tl.store(reader, q.to(tl.int64))
            tl.store(reader + 1, do.to(tl.int64))
            tl.store(reader + 2, lse.to(tl.int64))
            tl.store(reader + 3, delta.to(tl.int64))
            tl.store(reader + 4, first)
    tl.store(delta + (b * n_head + head) * T_q + token, delta_tile, mask=in_row)
    tl.store(dq_row[:, None] + dim[None, :], dq_tile.to(q_tile.dtype), mask=in_tile)


@jit(do_not_specialize=["first", "last", "sum_first", "n_reader"])
def _slots_backward_kernel(
    table,  # pointer: for each reader a row of 8 numbers, written by `_backward_kernel`
    depth_k, depth_v, sum_k, sum_v, out_k, out_v,  # pointers
    q_stride, do_stride, slot_stride, sum_stride, out_stride,  # K and V of a kind are laid out alike
    n_head, T, first, last, sum_first, n_reader, scale, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, N_READER: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """FlashAttention's dK, dV loop, along depth: gradients of the slots first..last-1, summed over the layers that read
    them. The rows of N_READER readers make one tile, as if they were more heads of the group. With SUMMED the sums
    begin at what an earlier call put out: slot s at sum[s - sum_first]. Slot s goes to out[s - first]."""
    LN2: tl.constexpr = 0.6931471805599453
    BLOCK_T: tl.constexpr = BLOCK_M // (GROUP * N_READER)
    t0 = tl.program_id(0) * BLOCK_T
    n_kv_head = n_head // GROUP
    b, kv_head = (tl.program_id(1) // n_kv_head).to(tl.int64), (tl.program_id(1) % n_kv_head).to(tl.int64)

    row, col, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    token, head = (t0 + row // GROUP % BLOCK_T).to(tl.int64), kv_head * GROUP + row % GROUP
    in_dim = dim < HEAD_DIM
    q_at = b * q_stride[0] + head * q_stride[1] + token * q_stride[2]
    do_at = b * do_stride[0] + head * do_stride[1] + token * do_stride[2]
    lse_at = (b * n_head + head) * T + token

    for begin in range(first * BLOCK_T, last * BLOCK_T, BLOCK_N):
        slot, source = ((begin + col) // BLOCK_T).to(tl.int64), (t0 + (begin + col) % BLOCK_T).to(tl.int64)
        in_kv = ((slot < last) & (source < T))[:, None] & in_dim[None, :]
        kv_at = slot * slot_stride[0] + b * slot_stride[1] + kv_head * slot_stride[2] + source * slot_stride[3]
        k_tile = tl.load(depth_k + kv_at[:, None] + dim[None, :], mask=in_kv, other=0.0)  # (BLOCK_N, D)
        v_tile = tl.load(depth_v + kv_at[:, None] + dim[None, :], mask=in_kv, other=0.0)
        if SUMMED:
            sum_slot = (slot - sum_first) * sum_stride[0]
            sum_at = sum_slot + b * sum_stride[1] + kv_head * sum_stride[2] + source * sum_stride[3]
            dk_tile = tl.load(sum_k + sum_at[:, None] + dim[None, :], mask=in_kv, other=0.0)
            dv_tile = tl.load(sum_v + sum_at[:, None] + dim[None, :], mask=in_kv, other=0.0)
        else:
            dk_tile = tl.zeros([BLOCK_N, D], tl.float32)
            dv_tile = tl.zeros([BLOCK_N, D], tl.float32)
        for chunk in range(0, n_reader, N_READER):
            number = chunk + row // (BLOCK_T * GROUP)
            in_row = (row < N_READER * BLOCK_T * GROUP) & (number < n_reader) & (token < T)
            in_tile = in_row[:, None] & in_dim[None, :]
            reader = table + number * 8
            q_row = tl.load(reader, mask=in_row, other=0).to(depth_k.dtype) + q_at
            do_row = tl.load(reader + 1, mask=in_row, other=0).to(depth_k.dtype) + do_at
            lse_row = tl.load(reader + 2, mask=in_row, other=0).to(sum_k.dtype) + lse_at
            delta_row = tl.load(reader + 3, mask=in_row, other=0).to(sum_k.dtype) + lse_at
            first_read = tl.load(reader + 4, mask=in_row, other=0)
            # a pointer made of a number has forgotten that rows start at multiples of 16 bytes, and loads 2 by 2
            q_row, do_row = tl.multiple_of(q_row, 16), tl.multiple_of(do_row, 16)
            q_tile = tl.load(q_row[:, None] + dim[None, :], mask=in_tile, other=0.0)  # (BLOCK_M, D)
            do_tile = tl.load(do_row[:, None] + dim[None, :], mask=in_tile, other=0.0)
            lse_log2 = tl.load(lse_row, mask=in_row, other=0.0) / LN2
            delta_tile = tl.load(delta_row, mask=in_row, other=0.0)
            z = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale_log2  # (BLOCK_M, BLOCK_N)
            read = (slot[None, :] >= first_read[:, None]) & (token[:, None] == source[None, :]) & in_row[:, None]
            p = tl.exp2(tl.where(read, z - lse_log2[:, None], float("-inf")))
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
            dz = (p * (dp - delta_tile[:, None]) * scale).to(k_tile.dtype)
            dk_tile = tl.dot(tl.trans(dz), q_tile, dk_tile, input_precision="ieee")
            dv_tile = tl.dot(tl.trans(p.to(do_tile.dtype)), do_tile, dv_tile, input_precision="ieee")
        out_slot = (slot - first) * out_stride[0]
        out_at = out_slot + b * out_stride[1] + kv_head * out_stride[2] + source * out_stride[3]
        tl.store(out_k + out_at[:, None] + dim[None, :], dk_tile.to(out_k.dtype.element_ty), mask=in_kv)
        tl.store(out_v + out_at[:, None] + dim[None, :], dv_tile.to(out_v.dtype.element_ty), mask=in_kv)


def _launch(kernel, q, n_kv_head, rows, cols, args, n_reader=1, **meta):
    """Start `kernel` on ceil(T_q / tokens of a block) x (B * n_kv_head) programs, whose tiles of logits have at least
    `rows` rows, n_reader * group for each token, and at most `cols` columns."""
    B, n_head, T_q, head_dim = q.shape
    group = n_head // n_kv_head
    BLOCK_M = max(rows, triton.next_power_of_2(group * n_reader))
    D = max(16, triton.next_power_of_2(head_dim))
    BLOCK_N = max(16, min(cols, 16384 // (D * q.element_size())))  # a tile of keys takes at most 16 KB
    grid = (triton.cdiv(T_q, BLOCK_M // (group * n_reader)), B * n_kv_head)
    sizes = {"GROUP": group, "HEAD_DIM": head_dim, "D": D, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
    with torch.cuda.device(q.device if q.is_cuda else -1):
        kernel[grid](*args, **(sizes | meta))


def _depth_forward_triton(q, depth_k, depth_v, o, lse, scale):
    """`_depth_forward_torch` by the kernel. Overwrites o and lse."""
    (o,), lse = _readable(o), lse.contiguous()
    n_slot, _, n_kv_head = depth_k.shape[:3]
    n_head, T_q = q.shape[1:3]
    strides = [x.stride()[:-1] for x in (q, q, q, depth_k, depth_v, o)]
    args = (q, q, q, depth_k, depth_v, o, lse, *strides, n_head, T_q, T_q, n_slot, scale / math.log(2))
    _launch(_forward_kernel, q, n_kv_head, 16, 64, args, CAUSAL=True, CONTINUE=True, num_warps=4)
    return o, lse


def _fused_forward(q, k, v, depth_k, depth_v, causal, scale, rows=128):
    """The whole of Algorithm 1 in one kernel, `rows` rows a program (fewer where they would not fit). Returns the joint
    (o, lse)."""
    if depth_k is None:
        depth_k = depth_v = q.new_empty(0, q.shape[0], k.shape[1], q.shape[2], q.shape[3])
    (o,), lse = _readable(torch.empty_like(q)), q.new_empty(q.shape[:3], dtype=torch.float32)
    n_head, T_q = q.shape[1:3]
    strides = [x.stride()[:-1] for x in (q, k, v, depth_k, depth_v, o)]
    scale_log2 = scale / math.log(2)
    args = (q, k, v, depth_k, depth_v, o, lse, *strides, n_head, T_q, k.shape[2], depth_k.shape[0], scale_log2)
    if q.dtype == torch.float32:  # without tensor cores; it is for checking, and large tiles take minutes to compile
        rows = 16
    elif q.shape[3] > 128:
        rows = min(rows, 64)
    num_warps = 8 if rows >= 128 else 4
    _launch(_forward_kernel, q, k.shape[1], rows, 64, args, CAUSAL=causal, CONTINUE=False, num_warps=num_warps)
    return o, lse


def _depth_backward_triton(do, q, depth_k, depth_v, o, lse, scale, dq, rows=16, reader=None, first=0):
    """Adds the depth part to dq in place; returns (ddepth_k, ddepth_v). Or, given a row `reader` for `slots_backward`
    to find, and the number of the first slot: fills it, leaves those to it and returns delta (B, n_head, T_q)."""
    ddepth_k = ddepth_v = dq  # to point anywhere
    if reader is None:
        ddepth_k, ddepth_v = _readable(torch.empty_like(depth_k), torch.empty_like(depth_v))
    delta = torch.empty_like(lse)
    n_slot, _, n_kv_head = depth_k.shape[:3]
    n_head, T_q = q.shape[1:3]
    strides = [x.stride()[:-1] for x in (do, q, depth_k, depth_v, o, dq, ddepth_k, ddepth_v)]
    args = (do, q, depth_k, depth_v, o, lse, dq, delta, ddepth_k, ddepth_v, delta if reader is None else reader)
    args += (*strides, n_head, T_q, n_slot, first, scale, scale / math.log(2))
    cols, num_warps = (64, 4) if n_head // n_kv_head <= 8 else (32, 2)  # wider is slower with 16 heads and more
    _launch(_backward_kernel, q, n_kv_head, rows, cols, args, SLOTS=reader is None, num_warps=num_warps)
    return (ddepth_k, ddepth_v) if reader is None else delta


def slots_backward(readers, table, depth_k, depth_v, first, last, dtype, sums, sum_first, scale):
    """-> dk, dv (last - first, B, n_kv_head, T, head_dim) of the slots first..last-1, summed over their readers.

    readers: (q, do, lse, delta, start) of each, deepest first, q, do (B, n_head, T, head_dim), lse, delta (B, n_head,
    T), of layers that read the slots from `start` to at least last-1, all laid out alike, rows at multiples of 16
    bytes; table (n_reader, 8): the rows that `_depth_backward_triton` filled for them. depth_k, depth_v (n_all, B,
    n_kv_head, T, head_dim). sums: two in float32, of the slots from `sum_first` on, to begin with, or None.
    """
    if not readers:  # all of them are in sums
        return [x[first - sum_first : last - sum_first].to(dtype) for x in sums]
    n_out, unread = last - first, sum(start >= last for *_, start in readers)  # their windows have moved on
    readers, table = readers[unread:], table[unread:]
    q, do, lse = readers[0][:3]
    n_head, T, n_kv_head = *q.shape[1:3], depth_k.shape[2]
    out = [x.new_empty(n_out, *x.shape[1:], dtype=dtype) for x in (depth_k, depth_v)]
    # What was fastest with 1 to 4 heads a group (results/NOTES.md): for a layer's own slots about 8 tokens, so that one
    # tile of 16 columns holds them all, for a block's about 2, and as many readers as make 32 or 64 rows of that.
    group = n_head // n_kv_head
    padded = triton.next_power_of_2(group)
    if n_out <= 2:
        n_reader = triton.next_power_of_2(triton.cdiv(4, group))
        rows, cols, num_warps, num_stages = 32, 16, 1, 3
    else:
        n_reader = min(16, max(1, (32 if q.shape[3] <= 128 else 16) // padded))
        rows, cols, num_warps, num_stages = 2 * padded * n_reader, 16 if n_out <= 8 else 32, 2, 2
    if q.dtype == torch.float32:  # without tensor cores, where large tiles take minutes to compile
        n_reader, rows = max(1, 16 // padded), 16
    if q.dtype == torch.float32 or q.shape[3] > 64:  # or the registers of fewer warps overflow
        num_warps, num_stages = 4, 1
    sum_k, sum_v = (lse, lse) if sums is None else sums  # to point anywhere, in float32
    strides = [x.stride()[:-1] for x in (q, do, depth_k, depth_k if sums is None else sum_k, out[0])]
    args = (table, depth_k, depth_v, sum_k, sum_v, *out, *strides)
    args += (n_head, T, first, last, sum_first, len(readers), scale, scale / math.log(2))
    meta = {"N_READER": n_reader, "SUMMED": sums is not None, "num_warps": num_warps, "num_stages": num_stages}
    _launch(_slots_backward_kernel, q, n_kv_head, rows, cols, args, n_reader, **meta)
    return out


# ------------------------------------------------------------------------------------------------- the operator
#
# Two opaque operators, so that torch.compile neither breaks its graph here nor looks inside. Their outputs are laid out
# in memory like `torch.empty_like` of the input they belong to, which is what the fake versions promise the compiler.


def _readable(*tensors):
    """The tensors, copied where a kernel could not read them: it wants the last dimension in a row, and on CUDA each
    row at a multiple of 16 bytes. PyTorch's operators do not check that: one answers wrongly, another crashes."""

    def can_read(x):
        steps = (x.data_ptr(), *(n * x.element_size() for n in x.stride()[:-1]))
        return x.stride(-1) == 1 and not (x.is_cuda and any(n % 16 for n in steps))

    return tuple(x if x is None or can_read(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors)


def _laid_out(x, like):
    """x, copied if it has to be, with the strides of `torch.empty_like(like)`."""
    if x.stride() == torch.empty_like(like, device="meta").stride():
        return x
    return torch.empty_like(like).copy_(x)


def _forward_mode():
    """Whether tangents are computed (torch.func.jvp), which an opaque operator or a kernel would drop, silently."""
    return forward_ad._current_level >= 0


def _why_not_triton(q):
    """Why the Triton kernels cannot run on q, as the end of a sentence, or None if they can."""
    if triton is None:
        return "Triton is not installed"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels take float16, bfloat16 and float32, not {q.dtype}"
    if q.shape[-1] > 256:
        return f"the kernels take head_dim up to 256, not {q.shape[-1]}"
    if INTERPRET:
        return "Triton's interpreter computes bfloat16 wrongly" if q.dtype == torch.bfloat16 else None
    if q.device.type != "cuda":
        return f"q is on {q.device}: it takes a CUDA GPU, or TRITON_INTERPRET=1 in the environment"
    if torch.cuda.get_device_properties(q.device).major < 8:
        return "it takes a GPU of compute capability 8.0 or more"
    return None


def attention_forward(q, k, v, depth_k, depth_v, causal, scale, impl):
    """(o, lse) as `moda_attention`, for tensors that it has checked and an impl that it has chosen; no autograd."""
    q_read, k, v, depth_k, depth_v = _readable(q, k, v, depth_k, depth_v)
    with _full_precision(q):
        if impl == "fused":
            o, lse = _fused_forward(q_read, k, v, depth_k, depth_v, causal, scale)
        else:
            o, lse = _sequence_forward(q_read, k, v, causal, scale)
            if depth_k is not None:
                depth_forward = _depth_forward_torch if impl == "torch" else _depth_forward_triton
                o, lse = depth_forward(q_read, depth_k, depth_v, o, lse, scale)
    return _laid_out(o, q), lse.contiguous()


def attention_backward(do, q, k, v, depth_k, depth_v, o, lse, causal, scale, impl):
    """[dq, dk, dv] and, if there are slots, ddepth_k, ddepth_v, from what `attention_forward` took and returned."""
    inputs = [x for x in (q, k, v, depth_k, depth_v) if x is not None]
    q, k, v, depth_k, depth_v = _readable(q, k, v, depth_k, depth_v)
    do, o = _laid_out(do, q), _laid_out(o, q)
    with _full_precision(q):
        dq, dk, dv = _sequence_backward(do, q, k, v, o, lse, causal, scale)
        ddepth = ()
        if depth_k is not None and impl == "torch":
            dq_depth, *ddepth = _depth_backward_torch(do, q, depth_k, depth_v, o, lse, scale)
            dq = dq + dq_depth
        elif depth_k is not None:
            (dq,) = _readable(dq)
            ddepth = _depth_backward_triton(do, q, depth_k, depth_v, o, lse, scale, dq)
    return [_laid_out(grad, x) for grad, x in zip((dq, dk, dv, *ddepth), inputs, strict=True)]


@torch.library.custom_op("moda::attention", mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    depth_k: torch.Tensor | None,
    depth_v: torch.Tensor | None,
    causal: bool,
    scale: float,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return attention_forward(q, k, v, depth_k, depth_v, causal, scale, impl)


@_attention.register_fake
def _(q, k, v, depth_k, depth_v, causal, scale, impl):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("moda::attention_backward", mutates_args=())
def _attention_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    depth_k: torch.Tensor | None,
    depth_v: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
    impl: str,
) -> list[torch.Tensor]:
    return attention_backward(do, q, k, v, depth_k, depth_v, o, lse, causal, scale, impl)


@_attention_backward.register_fake
def _(do, q, k, v, depth_k, depth_v, o, lse, causal, scale, impl):
    return [torch.empty_like(x) for x in (q, k, v, depth_k, depth_v) if x is not None]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.causal, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, do, _):
    *inputs, o, lse = ctx.saved_tensors
    grads = _attention_backward(do, *inputs, o, lse, ctx.causal, ctx.scale, ctx.impl)
    return (*grads, *[None] * (8 - len(grads)))


_attention.register_autograd(_backward, setup_context=_setup_context)

IMPLS = ("reference", "torch", "triton", "fused")


def moda_attention(q, k, v, depth_k=None, depth_v=None, *, causal=True, scale=None, impl=None, return_lse=False):
    """Mixture-of-Depths Attention (paper, section 3 and Algorithm 1): one softmax over [sequence | depth].

    q (B, n_head, T_q, head_dim); k, v (B, n_kv_head, T_kv, head_dim); depth_k, depth_v (n_slot, B, n_kv_head, T_q,
    head_dim), or None for plain attention. One floating dtype and one device for all; any strides. Head h reads kv
    head h // (n_head // n_kv_head). With T_q < T_kv the queries are the last T_q positions (decoding).

    causal: query t sees sequence keys up to its own position. The depth slots are those of its own position always.
    scale: a number that multiplies the logits; None is head_dim ** -0.5.
    impl: None, the fastest that can run here, or one of `IMPLS`:
        "reference"  the equation with its (T_q, T_kv) matrix, differentiated by autograd
        "torch"      PyTorch's fused attention, continued over depth in plain PyTorch; O(T * n_slot) memory.
                     Where PyTorch has no fused attention for the device, dtype or head_dim (over 256 on CUDA), this is
                     the reference.
        "triton"     PyTorch's fused attention, continued over depth by the kernels above
        "fused"      forward all in one kernel, the paper's Algorithm 1; backward as "triton"
    return_lse: also return the joint log-sum-exp (B, n_head, T_q), float32 or wider, not differentiable.

    Returns out (B, n_head, T_q, head_dim) in q's dtype, or (out, lse). Differentiable, once, in all five tensors; in
    forward mode (torch.func.jvp) every impl is the reference.
    A NaN or infinity in a slot may spread to neighbouring positions: the kernels multiply what they mask by 0. Without
    slots, PyTorch's attention on the CPU makes zeros of a query of NaN.
    Under autocast the inputs are cast as those of PyTorch's own attention are.
    Raises ValueError for shapes, dtypes or devices that do not fit, for T_q > T_kv with causal, for empty tensors,
    for a tensor as scale (it would get no gradient), and for an `impl` that is unknown or cannot run here.
    """
    device_type = q.device.type if isinstance(q, torch.Tensor) else "cpu"
    if device_type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type):
        dtype, casts = torch.get_autocast_dtype(device_type), (torch.float32, torch.float16, torch.bfloat16)
        q, k, v, depth_k, depth_v = (
            x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype in casts else x for x in (q, k, v, depth_k, depth_v)
        )
    _check(q, k, v, depth_k, depth_v, causal)
    if isinstance(scale, torch.Tensor):
        raise ValueError("scale must be a number: as a tensor it would get no gradient")
    if impl not in (None, *IMPLS):
        raise ValueError(f"unknown impl {impl!r}: choose None or one of {', '.join(map(repr, IMPLS))}")
    why_not = _why_not_triton(q)
    if impl in ("triton", "fused") and why_not:
        raise ValueError(f"impl={impl!r} cannot run here: {why_not}")
    if impl is None:
        impl = "triton" if q.is_cuda and not why_not else "torch"
    if depth_k is not None and depth_k.shape[0] == 0:
        depth_k = depth_v = None
    if impl == "reference" or not _has_fused(q) or _forward_mode():
        return moda_attention_reference(q, k, v, depth_k, depth_v, causal=causal, scale=scale, return_lse=return_lse)
    head_dim = q.shape[-1]
    scale = head_dim**-0.5 if scale is None else float(scale)
    if scale <= 0:  # PyTorch's CPU kernel masks before it scales: -inf would become +inf or NaN
        q, scale = q * scale, 1.0
    pad = -head_dim % 8 if q.is_cuda else 0  # CUDA's fused attentions read rows in steps of 16 bytes
    if pad:
        q, k, v, depth_k, depth_v = (x if x is None else F.pad(x, (0, pad)) for x in (q, k, v, depth_k, depth_v))
    o, lse = _attention(q, k, v, depth_k, depth_v, causal, scale, impl)
    o = o[..., :head_dim] if pad else o
    return (o, lse.detach()) if return_lse else o
