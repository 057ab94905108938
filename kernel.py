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

with group = n_head // n_kv_head. Below: the equation; the depth half in plain PyTorch; Algorithm 1 of the paper in
Triton; the operator, `moda_attention`. The sequence half is PyTorch's, in sdpa.py: to use MoDA, copy these two files.
"""

import math
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from sdpa import has_fused, laid_out, sequence_backward, sequence_forward

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: everything but the Triton kernels works
    triton, tl = None, SimpleNamespace(constexpr=None)  # their signatures still have to read

# asked once: torch.compile cannot always trace the question
AUTOCAST_DEVICES = [name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name)]
INTERPRET = triton is not None and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on CPU tensors


# ------------------------------------------------------------------------------------------------ the equation


def _full_precision(x):
    """A context without autocast on x's device: where this file says float32, it means it."""
    return torch.autocast(x.device.type, enabled=False) if x.device.type in AUTOCAST_DEVICES else nullcontext()


def moda_attention_weights(q, k, depth_k=None, *, causal=True, scale=None):
    """The joint softmax of MoDA, as a matrix. For looking, and for the reference; needs O(T_q * T_kv) memory.

    Arguments and errors as in `moda_attention`. Returns (p, lse): p (B, n_head, T_q, T_kv + n_slot), whose rows sum to
    1, sequence columns first; lse (B, n_head, T_q). Both in float32, or in float64 for float64 inputs."""
    _check(q, k, k, depth_k, depth_k, causal)
    (n_head, T_q, head_dim), (n_kv_head, T_kv) = q.shape[1:], k.shape[1:3]
    scale, dtype = head_dim**-0.5 if scale is None else scale, torch.promote_types(q.dtype, torch.float32)
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

    The oracle of every test: run it in float64. Differentiable by plain autograd."""
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
    """One sentence for whoever passed the wrong tensor (ValueError): the kernels read memory without asking."""
    if (depth_k is None, isinstance(depth_k, list)) != (depth_v is None, isinstance(depth_v, list)):
        raise ValueError("depth_k and depth_v go together: pass two tensors, two lists or neither")
    named = {"q": q, "k": k, "v": v}
    for name, slots in {"depth_k": depth_k, "depth_v": depth_v}.items():
        if slots is not None:
            named |= {f"{name}[{i}]": x for i, x in enumerate(slots)} if isinstance(slots, list) else {name: slots}
    for name, x in named.items():
        rank = 5 if name in ("depth_k", "depth_v") else 4
        if not isinstance(x, torch.Tensor) or x.dim() != rank:
            got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor of rank {rank}, got {got}")
        if not x.is_floating_point() or (x.dtype, x.device) != (q.dtype, q.device):
            got = f"q has {q.dtype} on {q.device}, {name} has {x.dtype} on {x.device}"
            raise ValueError(f"all tensors must have one floating dtype and be on one device: {got}")
    (B, n_head, T_q, head_dim), (n_kv_head, T_kv) = q.shape, k.shape[1:3]
    if 0 in q.shape or 0 in k.shape:  # an empty tensor crashes PyTorch's CPU kernel (SIGFPE), so it must not get there
        raise ValueError(f"empty input: q {tuple(q.shape)}, k {tuple(k.shape)}")
    if n_head % n_kv_head:
        raise ValueError(f"n_head ({n_head}) must be a multiple of n_kv_head ({n_kv_head})")
    if causal and T_q > T_kv:
        raise ValueError(f"causal attention needs T_q <= T_kv, got T_q = {T_q}, T_kv = {T_kv}")
    if depth_k is not None and len(depth_k) != len(depth_v):
        raise ValueError(f"depth_k and depth_v must be of as many slots, got {len(depth_k)} and {len(depth_v)}")
    for name, x in named.items():
        heads, T = n_head if name == "q" else n_kv_head, T_kv if name in "kv" else T_q
        if x.shape != (wanted := (*x.shape[:-4], B, heads, T, head_dim)):
            raise ValueError(f"{name} must be {wanted} to go with q {tuple(q.shape)}, got {tuple(x.shape)}")


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
    z = torch.cat([_by_token(lse, n_kv_head).unsqueeze(-1), z], dim=-1)  # the sequence is one more key, o its value
    p_seq, p_depth = z.softmax(-1).split([1, len(depth_k)], dim=-1)  # exp(z - lse) would not sum to 1: lse is rounded
    o = p_seq * _by_token(o, n_kv_head) + p_depth @ _slots_by_token(depth_v)  # (B, n_kv_head, T_q, group, head_dim)
    return o.transpose(2, 3).flatten(1, 2).to(q.dtype), z.logsumexp(-1).transpose(2, 3).flatten(1, 2)


def _depth_backward_torch(do, q, depth_k, depth_v, o, lse, scale, dq):
    """Adds the depth part to dq in place -> (ddepth_k, ddepth_v), from the joint o and lse."""
    n_kv_head = depth_k.shape[2]
    q_, do_ = _by_token(q, n_kv_head), _by_token(do, n_kv_head)  # (B, n_kv_head, T_q, group, head_dim)
    k_, v_ = _slots_by_token(depth_k), _slots_by_token(depth_v)  # (B, n_kv_head, T_q, n_slot, head_dim)
    delta = (do_ * _by_token(o, n_kv_head)).sum(-1, keepdim=True)  # (B, n_kv_head, T_q, group, 1)
    p = (q_ @ k_.mT * scale - _by_token(lse, n_kv_head).unsqueeze(-1)).exp()  # (B, n_kv_head, T_q, group, n_slot)
    dz = p * (do_ @ v_.mT - delta) * scale
    dq += (dz @ k_).transpose(2, 3).flatten(1, 2).to(q.dtype)
    return [(x.mT @ y).permute(3, 0, 1, 2, 4).to(q.dtype) for x, y in ((dz, q_), (p, do_))]


# ------------------------------------------------------------------------------------------- Algorithm 1, in Triton
#
# A program owns BLOCK_M rows of q that read one kv head, the `group` heads of a token side by side: row i belongs to
# token t0 + i // GROUP, and one load of a key serves all the heads that read it. Slots are counted slot by slot: column
# c is slot c // BLOCK_T of token t0 + c % BLOCK_T. A row wants one column in BLOCK_T; the others are computed and
# masked. So small tiles waste least, and 16 rows are enough, the fewest that a matrix unit takes.
# The state of the online softmax has Algorithm 1's names: m the running maximum, acc the denominator, o the output
# before it is divided by acc. (FlashAttention calls the last two l and acc.)

jit = triton.jit if triton else lambda fn=None, **_: fn or (lambda fn: fn)  # this file imports without Triton too


@jit
def _softmax_step(z, v, m, acc, o):
    """One step of the online softmax: logits z (BLOCK_M, BLOCK_N) in base 2, values v (BLOCK_N, D)."""
    m_new = tl.maximum(m, tl.max(z, 1))
    p, rescale = tl.exp2(z - m_new[:, None]), tl.exp2(m - m_new)
    return m_new, acc * rescale + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, o * rescale[:, None], input_precision="ieee")


@jit
def _slots_of(columns, t0, n_slot, T_q, BLOCK_T: tl.constexpr):
    """The slot and the token of each column, and whether there are such."""
    slot, source = (columns // BLOCK_T).to(tl.int64), (t0 + columns % BLOCK_T).to(tl.int64)
    return slot, source, (slot < n_slot) & (source < T_q)


@jit
def _forward_kernel(
    q, k, v, depth_k, depth_v, o, lse,  # pointers; o and lse are read too, if CONTINUE
    q_stride, k_stride, v_stride, depth_k_stride, depth_v_stride, o_stride,  # without the last dimension, whose is 1
    T_q, T_kv, n_slot, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,  # D: head_dim rounded up to a power of two
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, CONTINUE: tl.constexpr,
):  # fmt: skip
    """The paper's Algorithm 1: three loops into one state (m, acc, o), over sequence keys without mask, over boundary
    keys with the causal mask, over depth slots with the same-token mask. With CONTINUE the state is FlashAttention's,
    and only the third loop runs. The last blocks have the most keys, so they go first."""
    LN2: tl.constexpr = 0.6931471805599453
    BLOCK_T: tl.constexpr = BLOCK_M // GROUP  # tokens of this program
    t0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_T
    kv_head, b, n_head = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1) * GROUP
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
        n_seen = tl.minimum(t0 + (T_kv - T_q) + BLOCK_T, T_kv) if CAUSAL else T_kv  # by the last token of the block
        n_full = (t0 + (T_kv - T_q) + 1 if CAUSAL else T_kv) // BLOCK_N * BLOCK_N  # whole blocks that its first sees

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
        slot, source, seen = _slots_of(start + col, t0, n_slot, T_q, BLOCK_T)
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


@jit
def _backward_kernel(
    do, q, depth_k, depth_v, o, lse,  # pointers
    dq, delta, ddepth_k, ddepth_v,  # pointers to results; dq holds the sequence half already
    do_stride, q_stride, depth_k_stride, depth_v_stride, o_stride, dq_stride, ddepth_k_stride, ddepth_v_stride,
    T_q, n_slot, scale, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Gradients of the depth half, in one pass over the slots. A slot's K and V at a token are read by that token's own
    rows only, and this program has all of them. So dK and dV are finished and stored as they are met, with no atomics.
    dq is added to the sequence half's. Without SLOTS only dq and delta: slots.py sums dK and dV over layers."""
    LN2: tl.constexpr = 0.6931471805599453
    BLOCK_T: tl.constexpr = BLOCK_M // GROUP
    t0 = tl.program_id(0) * BLOCK_T
    kv_head, b, n_head = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1) * GROUP
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
        slot, source, seen = _slots_of(start + col, t0, n_slot, T_q, BLOCK_T)
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

    tl.store(delta + (b * n_head + head) * T_q + token, delta_tile, mask=in_row)
    tl.store(dq_row[:, None] + dim[None, :], dq_tile.to(q_tile.dtype), mask=in_tile)


def _launch(kernel, q, n_kv_head, rows, cols, args, n_reader=1, **meta):
    """Start `kernel` on ceil(T_q / tokens of a block) x n_kv_head x B programs, whose tiles of logits have at least
    `rows` rows, n_reader * group for each token, and at most `cols` columns."""
    B, n_head, T_q, head_dim = q.shape
    group = n_head // n_kv_head
    BLOCK_M = max(rows, triton.next_power_of_2(group * n_reader))
    D = max(16, triton.next_power_of_2(head_dim))
    BLOCK_N = max(16, min(cols, 16384 // (D * q.element_size())))  # a tile of keys takes at most 16 KB
    grid = (triton.cdiv(T_q, BLOCK_M // (group * n_reader)), n_kv_head, B)
    sizes = {"GROUP": group, "HEAD_DIM": head_dim, "D": D, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
    with torch.cuda.device(q.device if q.is_cuda else -1):
        kernel[grid](*args, **(sizes | meta))


def _forward_triton(q, k, v, depth_k, depth_v, causal, scale, state=None, rows=128):
    """The joint (o, lse). Given the sequence half's as `state`, it goes on from there over the slots, in place; else it
    is the whole of Algorithm 1, `rows` rows a program (fewer where they would not fit)."""
    if state is None:
        o, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        # float32 has no tensor cores: it is for checking, and large tiles take minutes to compile
        rows = 16 if q.dtype == torch.float32 else min(rows, 64) if q.shape[3] > 128 else rows
    else:
        (o, lse), rows = state, 16
    if depth_k is None:
        depth_k = depth_v = k[None, ..., :0, :][:0]  # no slots
    (o,), lse = _readable(o), lse.contiguous()
    strides = [x.stride()[:-1] for x in (q, k, v, depth_k, depth_v, o)]
    args = (q, k, v, depth_k, depth_v, o, lse, *strides, q.shape[2], k.shape[2], len(depth_k), scale / math.log(2))
    meta = {"CAUSAL": causal, "CONTINUE": state is not None, "num_warps": 8 if rows >= 128 else 4}
    _launch(_forward_kernel, q, k.shape[1], rows, 64, args, **meta)
    return o, lse


def _depth_backward_triton(do, q, depth_k, depth_v, o, lse, scale, dq, rows=16, slots=True):
    """Adds the depth part to dq in place -> (ddepth_k, ddepth_v); without `slots`: delta (B, n_head, T_q)."""
    grads = _readable(torch.empty_like(depth_k), torch.empty_like(depth_v)) if slots else (dq[None], dq[None])  # unused
    delta, n_kv_head = torch.empty_like(lse), depth_k.shape[2]
    strides = [x.stride()[:-1] for x in (do, q, depth_k, depth_v, o, dq, *grads)]
    args = (do, q, depth_k, depth_v, o, lse, dq, delta, *grads, *strides)
    args += (q.shape[2], len(depth_k), scale, scale / math.log(2))
    cols, num_warps = (64, 4) if q.shape[1] // n_kv_head <= 8 else (32, 2)  # wider is slower with 16 heads and more
    _launch(_backward_kernel, q, n_kv_head, rows, cols, args, SLOTS=slots, num_warps=num_warps)
    return grads if slots else delta


# ------------------------------------------------------------------------------------------------- the operator
#
# Two opaque operators: torch.compile neither breaks its graph here nor looks inside. Their outputs are laid out like
# `torch.empty_like` of their inputs, as the fake versions promise. They take the slots as a list: [one tensor (n_slot,
# ...)], or one (B, n_kv_head, T_q, head_dim) a slot. These are stacked inside, so that autograd keeps the slots
# themselves, and not a stack of them for every layer that reads them.


def _readable(*tensors):
    """The tensors, copied where a kernel could not read them: it wants the last dimension in a row, and on CUDA each
    row at a multiple of 16 bytes. PyTorch's operators do not check that: one answers wrongly, another crashes."""

    def can_read(x):
        steps = (x.data_ptr(), *(n * x.element_size() for n in x.stride()[:-1]))
        return x.stride(-1) == 1 and not (x.is_cuda and any(n % 16 for n in steps))

    return tuple(x if x is None or can_read(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors)


def _stacked(pieces):
    """The slots as one tensor (n_slot, B, n_kv_head, T_q, head_dim), or None if there are none. Where they are stacked,
    a token's slots lie side by side in memory, as `_slots_by_token` wants them."""
    if not pieces or pieces[0].dim() == 5:
        return pieces[0] if pieces else None
    return torch.stack(pieces, dim=3).permute(3, 0, 1, 2, 4)


def _inputs(q, k, v, depth_k, depth_v):
    """What there is a gradient for: q, k, v, and the stacked slots if there are any."""
    return [x for x in (q, k, v, _stacked(depth_k), _stacked(depth_v)) if x is not None]


def _autocast(x):
    """x, or a list of such, in the dtype that autocast gives to PyTorch's own attention."""
    if isinstance(x, list):
        return [_autocast(y) for y in x]
    device = x.device.type if isinstance(x, torch.Tensor) else None
    enabled = device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
    casts = enabled and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return x.to(torch.get_autocast_dtype(device)) if casts else x


def _transformed():  # in forward mode an opaque operator would drop the tangents, silently; torch.func refuses it
    within = not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
    return within or forward_ad._current_level >= 0


def _why_not_triton(q):
    """Why the Triton kernels cannot run on q, as the end of a sentence, or None if they can."""
    if triton is None:
        return "Triton is not installed"
    if q.dtype.itemsize > 4:
        return f"the kernels take float16, bfloat16 and float32, not {q.dtype}"
    if q.shape[3] > 256 or max(q.shape[:2]) > 65_535:  # batch and heads are axes of the grid
        return f"the kernels take head_dim up to 256 and up to 65,535 sequences, not {tuple(q.shape)}"
    if INTERPRET:
        return "Triton's interpreter computes bfloat16 wrongly" if q.dtype == torch.bfloat16 else None
    if not q.is_cuda:
        return f"q is on {q.device}: it takes a CUDA GPU, or TRITON_INTERPRET=1 in the environment"
    old = torch.cuda.get_device_properties(q.device).major < 8
    return "it takes a GPU of compute capability 8.0 or more" if old else None


def _is_short(q, k, n_slot, causal):
    """Whether "fused", one launch, beats "triton", two: `experiments.bench short`, measured in groups of 8."""
    (B, n_head, T, head_dim), (_, n_kv_head, T_kv, _) = q.shape, k.shape
    is_usual = causal and T_kv == T and head_dim <= 64 and q.dtype.itemsize == 2
    is_little = n_slot > 0 and (n_slot <= 8 or B * T * n_slot <= 16_384)
    return is_usual and n_head >= 8 * n_kv_head and T <= 4096 and is_little


def attention_forward(q, k, v, depth_k, depth_v, causal, scale, impl):
    """(o, lse) as `moda_attention`, without autograd, for what it has checked; depth_k, depth_v: lists, see above."""
    q_read, k, v, depth_k, depth_v = _readable(q, k, v, _stacked(depth_k), _stacked(depth_v))
    with _full_precision(q):
        state = None if impl == "fused" else sequence_forward(q_read, k, v, causal, scale)
        if impl == "fused" or (impl == "triton" and depth_k is not None):
            state = _forward_triton(q_read, k, v, depth_k, depth_v, causal, scale, state)
        elif depth_k is not None:
            state = _depth_forward_torch(q_read, depth_k, depth_v, *state, scale)
    return laid_out(state[0], q), state[1].contiguous()


def attention_backward(do, q, k, v, depth_k, depth_v, o, lse, causal, scale, impl):
    """[dq, dk, dv], and ddepth_k, ddepth_v as one tensor each if there are slots, from the joint o and lse."""
    inputs = _inputs(q, k, v, depth_k, depth_v)
    q, k, v, *depth = _readable(*inputs)
    do, o = laid_out(do, q), laid_out(o, q)
    depth_backward = _depth_backward_torch if impl == "torch" else _depth_backward_triton
    with _full_precision(q):
        dq, dk, dv = sequence_backward(do, q, k, v, o, lse, causal, scale)
        (dq,) = _readable(dq)
        ddepth = depth_backward(do, q, *depth, o, lse, scale, dq) if depth else ()
    return [laid_out(grad, x) for grad, x in zip((dq, dk, dv, *ddepth), inputs, strict=True)]


_SCHEMA = "({}Tensor q, Tensor k, Tensor v, Tensor[] depth_k, Tensor[] depth_v, {}bool causal, float scale, str impl)"
_FORWARD = _SCHEMA.format("", "") + " -> (Tensor, Tensor)"
_BACKWARD = _SCHEMA.format("Tensor do, ", "Tensor o, Tensor lse, ") + " -> Tensor[]"
_operator = partial(torch.library.custom_op, mutates_args=())
_attention = _operator("moda::attention", attention_forward, schema=_FORWARD)
_attention_backward = _operator("moda::attention_backward", attention_backward, schema=_BACKWARD)
_attention.register_fake(
    lambda q, *_: (torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32)))
)
_attention_backward.register_fake(lambda do, *args: [torch.empty_like(x) for x in _inputs(*args[:5])])


def _setup_context(ctx, inputs, output):
    q, k, v, depth_k, depth_v, *ctx.options = inputs
    ctx.n_piece = len(depth_k)
    ctx.save_for_backward(q, k, v, *depth_k, *depth_v, *output)


def _backward(ctx, do, _):
    n, (q, k, v, *depth, o, lse) = ctx.n_piece, ctx.saved_tensors
    dq, dk, dv, *ddepth = _attention_backward(do, q, k, v, depth[:n], depth[n:], o, lse, *ctx.options)
    ddepth = [[grad] if depth[0].dim() == 5 else list(grad.unbind()) for grad in ddepth] or [[], []]
    return dq, dk, dv, *ddepth, None, None, None


def _refuse(ctx, *_):
    raise RuntimeError('this attention has no second derivatives: impl="reference" takes create_graph=True')


_attention.register_autograd(_backward, setup_context=_setup_context)
_attention_backward.register_autograd(_refuse)

IMPLS = ("reference", "torch", "triton", "fused")


def moda_attention(q, k, v, depth_k=None, depth_v=None, *, causal=True, scale=None, impl=None, return_lse=False):
    """Mixture-of-Depths Attention (paper, section 3 and Algorithm 1): one softmax over [sequence | depth].

    q (B, n_head, T_q, head_dim); k, v (B, n_kv_head, T_kv, head_dim); depth_k, depth_v (n_slot, B, n_kv_head, T_q,
    head_dim), or a list of n_slot tensors (B, n_kv_head, T_q, head_dim), or None for plain attention. One floating
    dtype and one device for all; any strides. Head h reads kv head h // (n_head // n_kv_head). With T_q < T_kv the
    queries are the last T_q positions (decoding).

    causal: query t sees sequence keys up to its own position. The depth slots are those of its own position always.
    scale: a number that multiplies the logits; None is head_dim ** -0.5.
    impl: None, the fastest that can run here, or one of `IMPLS`:
        "reference"  the equation with its (T_q, T_kv) matrix, differentiated by autograd
        "torch"      PyTorch's fused attention, continued over depth in plain PyTorch; O(T * n_slot) memory. Where
                     PyTorch has no fused attention for q, or `sdpa_kernel` allows none, this is the reference.
        "triton"     PyTorch's fused attention, continued over depth by the kernels above
        "fused"      forward all in one kernel, the paper's Algorithm 1; backward as "triton"
    return_lse: also return the joint log-sum-exp (B, n_head, T_q), float32 or wider, not differentiable.

    Returns out (B, n_head, T_q, head_dim) in q's dtype, or (out, lse). Differentiable in all five tensors, once.
    The reference can be differentiated again. It takes over in forward mode and within torch.func, and only it exports
    to ONNX. Autocast casts the inputs as for PyTorch's own attention. In float32 a backward knows each weight to 1.2e-7
    times the largest logit. For random tensors dq is off by 1e-6 of its norm where logits reach 30, by 3e-6 at 100, by
    1e-4 at 1,000. At 10,000 softmax picks one key, the true dq nearly vanishes, and rounding can be all there is.
    A NaN or infinity in a slot may spread to neighbouring positions: the kernels multiply what they mask by 0.
    Raises ValueError for shapes, dtypes or devices that do not fit, for T_q > T_kv with causal and for empty tensors;
    for a tensor as scale, which would get no gradient; for an `impl` that is unknown or cannot run here."""
    q, k, v, depth_k, depth_v = (_autocast(x) for x in (q, k, v, depth_k, depth_v))
    _check(q, k, v, depth_k, depth_v, causal)
    if isinstance(scale, torch.Tensor):
        raise ValueError("scale must be a number: as a tensor it would get no gradient")
    if impl not in (None, *IMPLS):
        raise ValueError(f"unknown impl {impl!r}: choose None or one of {', '.join(map(repr, IMPLS))}")
    why_not = _why_not_triton(q)
    if impl in ("triton", "fused") and why_not:
        raise ValueError(f"impl={impl!r} cannot run here: {why_not}")
    if impl is None:
        n_slot = 0 if depth_k is None else len(depth_k)
        impl = "torch" if why_not or not q.is_cuda else "fused" if _is_short(q, k, n_slot, causal) else "triton"
    depth_k, depth_v = (
        x if isinstance(x, list) else [] if x is None or not len(x) else [x] for x in (depth_k, depth_v)
    )
    if impl == "reference" or not has_fused(q) or _transformed():
        args, options = (q, k, v, _stacked(depth_k), _stacked(depth_v)), {"causal": causal, "scale": scale}
        return moda_attention_reference(*args, **options, return_lse=return_lse)
    head_dim = q.shape[-1]
    scale = head_dim**-0.5 if scale is None else float(scale)
    if scale <= 0:  # PyTorch's CPU kernel masks before it scales: -inf would become +inf or NaN
        q, scale = q * scale, 1.0
    pad = -head_dim % 8 if q.is_cuda else 0  # CUDA's fused attentions read rows in steps of 16 bytes
    if pad:
        q, k, v = (F.pad(x, (0, pad)) for x in (q, k, v))
        depth_k, depth_v = ([F.pad(x, (0, pad)) for x in pieces] for pieces in (depth_k, depth_v))
    o, lse = _attention(q, k, v, depth_k, depth_v, causal, scale, impl)
    o = o[..., :head_dim] if pad else o
    return (o, lse.detach()) if return_lse else o
