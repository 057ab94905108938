"""Mixture-of-Depths Attention (MoDA, arXiv 2603.15619): the operator.

Query t of head h looks, under ONE softmax, at two sets of keys:

    z_t = scale * [ q_t . k_0 ... q_t . k_t | q_t . k^0_t ... q_t . k^{S-1}_t ]      (sequence | depth)
    o_t = softmax(z_t) . [ v_0 ... v_t | v^0_t ... v^{S-1}_t ]

the causal *sequence* KV of its own layer, and the *depth* KV: what S earlier sublayers wrote at the very same
position t. Shapes, here and everywhere in this repository:

    q                  (B, n_head,    T_q,  head_dim)
    k, v               (B, n_kv_head, T_kv, head_dim)        head h reads kv head h // group, group = n_head // n_kv_head
    depth_k, depth_v   (n_slot, B, n_kv_head, T_q, head_dim)  slot-major: a slot is the K or V tensor one sublayer wrote
    lse                (B, n_head, T_q)                       log-sum-exp of z, natural logarithm

Read `moda_attention_reference` for the mathematics. Everything below it computes the same function faster.
"""

import torch
import torch.nn.functional as F

aten = torch.ops.aten


# ------------------------------------------------------------------------------------------------ the equation


def moda_attention_weights(q, k, depth_k=None, *, causal=True, scale=None):
    """The joint softmax of MoDA, as a matrix. For looking, and for the reference; needs O(T_q * T_kv) memory.

    Arguments as in `moda_attention`. Returns (p, lse): p (B, n_head, T_q, T_kv + n_slot), whose rows sum to 1,
    sequence columns first; lse (B, n_head, T_q). Both in float32, or in float64 for float64 inputs.
    """
    B, n_head, T_q, head_dim = q.shape
    n_kv_head, T_kv = k.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
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
# So a loop over more keys, here the depth slots, can simply go on from it (paper, Algorithm 1, lines after the
# sequence loops). The backward needs even less: it recomputes P = exp(z - lse) and delta = rowsum(do * o) from the o
# and lse it is GIVEN. Give it the JOINT o and lse, and its dq, dk, dv are the sequence half of MoDA's gradients.


def _backend(q, k, v):
    """Name of the fused attention behind PyTorch's SDPA that takes these inputs, or None."""
    if q.device.type == "cpu":
        return "cpu" if q.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16) else None
    return None


def _sdpa_forward(q, k, v, causal, scale):
    """o (B, n_head, T_q, head_dim), lse (B, n_head, T_q) of attention on the sequence keys alone."""
    o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return o, lse


def _sdpa_backward(do, q, k, v, o, lse, causal, scale):
    """dq, dk, dv through P = exp(z - lse) and delta = rowsum(do * o), whatever softmax o and lse came from."""
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(do, q, k, v, o, lse, 0.0, causal, scale=scale)


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
    q_, do_, k_, v_ = _by_token(q, n_kv_head), _by_token(do, n_kv_head), _slots_by_token(depth_k), _slots_by_token(depth_v)
    delta = (do_ * _by_token(o, n_kv_head)).sum(-1, keepdim=True)  # (B, n_kv_head, T_q, group, 1)
    p = (q_ @ k_.mT * scale - _by_token(lse, n_kv_head).unsqueeze(-1)).exp()  # (B, n_kv_head, T_q, group, n_slot)
    dz = p * (do_ @ v_.mT - delta) * scale
    ddepth_k, ddepth_v = ((x.mT @ y).permute(3, 0, 1, 2, 4).to(q.dtype) for x, y in ((dz, q_), (p, do_)))
    return (dz @ k_).transpose(2, 3).flatten(1, 2).to(q.dtype), ddepth_k, ddepth_v


# ------------------------------------------------------------------------------------------------- the operator
#
# Two opaque operators, so that torch.compile neither breaks its graph here nor looks inside. Their outputs have a
# fixed memory layout (out as (B, T_q, n_head, head_dim), gradients like `empty_like` of their inputs), which is what
# the fake versions promise to the compiler.


def _out_like(q):
    B, n_head, T_q, head_dim = q.shape
    return q.new_empty(B, T_q, n_head, head_dim).transpose(1, 2)


def _laid_out(x, like):
    return x if x.stride() == like.stride() else like.copy_(x)


@torch.library.custom_op("moda::attention", mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    depth_k: torch.Tensor | None,
    depth_v: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    o, lse = _sequence_forward(q, k, v, causal, scale)
    if depth_k is not None:
        o, lse = _depth_forward_torch(q, depth_k, depth_v, o, lse, scale)
    return _laid_out(o, _out_like(q)), lse.contiguous()


@_attention.register_fake
def _(q, k, v, depth_k, depth_v, causal, scale):
    return _out_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


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
) -> list[torch.Tensor]:
    dq, dk, dv = _sequence_backward(do, q, k, v, o, lse, causal, scale)
    grads = [dq, dk, dv]
    if depth_k is not None:
        dq_depth, *ddepth = _depth_backward_torch(do, q, depth_k, depth_v, o, lse, scale)
        grads = [dq + dq_depth, dk, dv, *ddepth]
    inputs = [q, k, v] if depth_k is None else [q, k, v, depth_k, depth_v]
    return [_laid_out(grad, torch.empty_like(x)) for grad, x in zip(grads, inputs, strict=True)]


@_attention_backward.register_fake
def _(do, q, k, v, depth_k, depth_v, o, lse, causal, scale):
    return [torch.empty_like(x) for x in (q, k, v, depth_k, depth_v) if x is not None]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, do, _):
    *inputs, o, lse = ctx.saved_tensors
    grads = _attention_backward(do, *inputs, o, lse, ctx.causal, ctx.scale)
    return (*grads, *[None] * (7 - len(grads)))


_attention.register_autograd(_backward, setup_context=_setup_context)

IMPLS = ("reference", "torch")


def moda_attention(q, k, v, depth_k=None, depth_v=None, *, causal=True, scale=None, impl=None, return_lse=False):
    """Mixture-of-Depths Attention (paper, section 3 and Algorithm 1): one softmax over [sequence | depth].

    q (B, n_head, T_q, head_dim); k, v (B, n_kv_head, T_kv, head_dim); depth_k, depth_v (n_slot, B, n_kv_head, T_q,
    head_dim), or None for plain attention. One floating dtype and one device for all; any strides. Head h reads kv
    head h // (n_head // n_kv_head). With T_q < T_kv the queries are the last T_q positions (decoding).

    causal: query t sees sequence keys up to its own position. The depth slots are those of its own position always.
    scale: multiplies the logits; None is head_dim ** -0.5.
    impl: None, the best that can run here, or one of `IMPLS`:
        "reference"  the equation with its (T_q, T_kv) matrix, differentiated by autograd
        "torch"      PyTorch's fused attention, continued over depth in plain PyTorch; O(T * n_slot) memory.
                     Where PyTorch has no fused attention for the device or dtype, this is the reference.
    return_lse: also return the joint log-sum-exp (B, n_head, T_q), float32 or wider, not differentiable.

    Returns out (B, n_head, T_q, head_dim) in q's dtype, or (out, lse). Differentiable, once, in all five tensors.
    Under autocast the inputs are cast as those of PyTorch's own attention are.
    Raises ValueError for shapes, dtypes or devices that do not fit, for T_q > T_kv with causal, for empty tensors,
    and for an `impl` that is unknown or cannot run here.
    """
    if isinstance(q, torch.Tensor) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v, depth_k, depth_v = (
            x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in (q, k, v, depth_k, depth_v)
        )
    _check(q, k, v, depth_k, depth_v, causal)
    if impl not in (None, *IMPLS):
        raise ValueError(f"unknown impl {impl!r}: choose None or one of {', '.join(map(repr, IMPLS))}")
    if depth_k is not None and depth_k.shape[0] == 0:
        depth_k = depth_v = None
    if impl == "reference" or _backend(q, k, v) is None:
        return moda_attention_reference(q, k, v, depth_k, depth_v, causal=causal, scale=scale, return_lse=return_lse)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    o, lse = _attention(q, k, v, depth_k, depth_v, causal, scale)
    return (o, lse.detach()) if return_lse else o
