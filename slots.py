"""Slots in one buffer, read in place, and their gradients, summed along depth: the inside of fast.py.

A slot is read by every layer above the one that wrote it, and its gradient is the sum of what they add. Autograd would
add reader by reader, through memory: for each, a gradient of all slots is written, read and added. Here a layer's
backward computes its dq alone, and leaves (q, do, lse, delta) behind. When the backward reaches the sublayer that wrote
a slot, all its readers have been there. Then one kernel goes through them and adds in registers: FlashAttention's dK,
dV loop, with layers in place of query blocks. While decoding there is one token: `place` stores its heads.
"""

import math
from itertools import pairwise

import torch
from torch.autograd import Variable

import kernel
from kernel import _launch, jit, tl, triton
from sdpa import laid_out, sequence_backward


class SlotBuffers:
    """Buffers (n_slot, B, n_kv_head, T, head_dim) of all slots' K and V, and what a backward has gathered so far.

    Slots between the same two readers have all their readers in common: such a stretch gets its gradients at once. So
    that not every stretch has to look at all its readers, gradients are summed in blocks of readers. When the backward
    enters a block, what the readers above it add is summed for all its slots at once, in float32 (`sums`). Each stretch
    then adds the readers within its block only.
    """

    # Readers of a block, times depth_every. At 24 and 48 layers, with groups from 1 to 4, no other number moves much
    # fewer bytes. Where only every k-th layer reads, a block of as many readers has k times the slots to sum, and there
    # are fewer readers to save: then only larger blocks pay.
    BLOCK = 8

    def __init__(self, config):
        per_layer = len(config.slot_kinds)
        self.n_slot, self.n_first = (config.n_layer - 1) * per_layer, config.depth_first
        self.per_reader, self.block = config.depth_every * per_layer, config.depth_every * self.BLOCK
        self.k, self.v = None, None
        self.lowest = None  # the first slot with a gradient, so the last one to get it
        self.begin_backward()

    def begin_backward(self, stop=0):
        """Forget what an earlier backward, finished or broken off, has left. This one begins at the layer that writes
        the slot `stop`."""
        self.readers, self.addresses = [], None  # (q, do, lse, delta, start) of each, deepest first; where they lie
        self.grads = {}  # slot: (dk, dv), of the stretch that is being differentiated
        self.n_summed, self.sums, self.sums_start = 0, None, 0  # readers in `sums`; (dk, dv); the first slot in it
        self.graph_task = torch._C._current_graph_task_id()  # which of autograd's backwards this is
        self.is_whole = stop == self.n_slot  # from the last layer on, so that the forward is over

    def end_backward(self, ctx):
        """Every slot has its gradient: free the buffers. Not with retain_graph=True, when they are needed again; then
        autograd still has what it saved for ctx, a `Write`."""
        try:
            ctx.saved_tensors  # noqa: B018
        except RuntimeError:
            if self.is_whole:
                self.k = self.v = None
        self.begin_backward()

    def write(self, slot, k, v):
        if self.k is None:
            self.k, self.v = (x.new_empty(self.n_slot, *x.shape) for x in (k, v))
        self.k[slot], self.v[slot] = k, v

    def read(self, layer):
        """The slots that a layer reads, in place: pairs depth_k, depth_v, one for each run of successive numbers."""
        ends = [i + 1 for i, (a, b) in enumerate(pairwise(layer.reads)) if b > a + 1]
        runs = [layer.reads[i:j] for i, j in pairwise([0, *ends, len(layer.reads)])] if layer.reads else []
        return [(self.k[run[0] : run[-1] + 1], self.v[run[0] : run[-1] + 1]) for run in runs]

    def attend(self, layer, q, k, v):
        """-> o (B, n_head, T, head_dim), lse (B, n_head, T)."""
        scale = q.shape[-1] ** -0.5
        state = kernel.attention_forward(q, k, v, [], [], True, scale, "triton")
        for depth_k, depth_v in self.read(layer):  # the kernel goes on from one run of slots to the next
            state = kernel._forward_triton(q, k, v, depth_k, depth_v, True, scale, state)
        return state

    def add_reader(self, layer, do, q, o, lse, dq):
        """A layer's attention is being differentiated: add the depth part to dq, and keep what the slots need of it.
        Rows of q and do start at multiples of 16 bytes: `FastMoDA._can_be_fast` asks for head_dim % 8 == 0."""
        if self.addresses is None:
            n_reader = triton.cdiv(self.n_slot, self.per_reader)
            self.addresses = torch.empty(n_reader, 8, dtype=torch.int64, device=q.device)
        for depth_k, depth_v in self.read(layer):  # each adds its part to dq; delta is the same
            args = (do, q, depth_k, depth_v, o, lse, q.shape[-1] ** -0.5, dq)
            delta = kernel._depth_backward_triton(*args, slots=False)
        start = layer.reads[-len(depth_k)]
        _addresses_kernel[(1,)](self.addresses[len(self.readers)], q, do, lse, delta, start)
        self.readers.append((q.detach(), do, lse, delta, start))

    def sum_readers(self, since, first, last, dtype, sums=None):
        args = (self.readers[since:], self.addresses[since:], self.k, self.v, first, last, dtype, sums, self.sums_start)
        return slots_backward(*args, self.k.shape[-1] ** -0.5, self.n_first)

    def gradients(self, slot):
        """-> dk, dv of a slot whose readers have all been differentiated, None if there was none in this backward."""
        if not self.readers:
            return None, None
        if slot not in self.grads:  # readers are counted from the last layer, so stretches from the last slot
            first, last = max(0, slot - (slot - self.n_slot) % self.per_reader), slot + 1
            if sum(start < last for *_, start in self.readers[self.n_summed :]) >= self.block:  # other windows moved on
                self.sums = None  # and its memory
                self.n_summed, self.sums_start = len(self.readers), max(0, last - self.block * self.per_reader)
                self.sums = self.sum_readers(0, self.sums_start, last, torch.float32)
            grads = self.sum_readers(self.n_summed, first, last, self.k.dtype, self.sums)
            self.grads = {first + i: pair for i, pair in enumerate(zip(*grads, strict=True))}
        return self.grads[slot]


def check_backward(buffers):
    """RuntimeError for what would give wrong gradients."""
    # once_differentiable refuses by a node of the graph, which torch.autograd.grad(..., inputs) may never visit
    if torch.is_grad_enabled():
        raise RuntimeError('the fast depth stream has no second derivatives: impl="reference" takes create_graph=True')
    if buffers.graph_task != torch._C._current_graph_task_id():
        raise RuntimeError(
            'a graph of the fast depth stream was differentiated within its own backward: use impl="torch"'
        )


class Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, v, chain, buffers, slot):
        buffers.write(slot, k, v)
        if buffers.lowest is None and any(ctx.needs_input_grad):
            buffers.lowest = slot
        ctx.buffers, ctx.slot = buffers, slot
        return k.new_empty(0)

    @staticmethod
    def backward(ctx, dchain):
        check_backward(ctx.buffers)
        if ctx.slot == ctx.buffers.lowest:
            Variable._execution_engine.queue_callback(lambda: ctx.buffers.end_backward(ctx))
        return *ctx.buffers.gradients(ctx.slot), dchain, None, None


class Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, chain, buffers, layer):
        o, lse = buffers.attend(layer, q, k, v)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.buffers, ctx.layer = buffers, layer
        ctx.set_materialize_grads(False)
        return o, q.new_empty(0)

    @staticmethod
    def backward(ctx, do, dchain):
        (q, k, v, o, lse), buffers = ctx.saved_tensors, ctx.buffers
        if dchain is None:  # nothing later was read: this backward starts here
            buffers.begin_backward(ctx.layer.first_slot)
            dchain = q.new_empty(0)
        check_backward(buffers)
        # one kernel loops over all readers with the first one's strides: all must share its layout
        q = laid_out(q, buffers.readers[0][0] if buffers.readers else q)
        o = laid_out(o, q)
        do = torch.zeros_like(q) if do is None else laid_out(do, q)  # None: only its slots were used
        dq, dk, dv = sequence_backward(do, q, k, v, o, lse, True, q.shape[-1] ** -0.5)
        if ctx.layer.reads:
            buffers.add_reader(ctx.layer, do, q, o, lse, dq)
        return dq, dk, dv, dchain, None, None


# Triton compiles a kernel anew for numbers that are 1 or multiples of 16. Strides profit from that; numbers of slots
# and readers would only multiply the kernels, so they are excepted.


@jit(do_not_specialize=["first"])
def _addresses_kernel(row, q, do, lse, delta, first):
    """Fill the row of one reader: where its tensors lie, and the first slot that it read."""
    tl.store(row, q.to(tl.int64))
    tl.store(row + 1, do.to(tl.int64))
    tl.store(row + 2, lse.to(tl.int64))
    tl.store(row + 3, delta.to(tl.int64))
    tl.store(row + 4, first)


@jit(do_not_specialize=["first", "last", "sums_start", "n_reader", "n_first"])
def _slots_backward_kernel(
    addresses,  # pointer: for each reader a row of 8 numbers, written by `_addresses_kernel`
    depth_k, depth_v, sum_k, sum_v, out_k, out_v,  # pointers
    q_stride, do_stride, slot_stride, sum_stride, out_stride,  # K and V of a kind are laid out alike
    T, first, last, sums_start, n_reader, n_first, scale, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, N_READER: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """FlashAttention's dK, dV loop, along depth: gradients of the slots first..last-1, summed over the layers that read
    them. The rows of N_READER readers make one tile, as if they were more heads of the group. With SUMMED the sums
    begin at what an earlier call put out: slot s at sum[s - sums_start]. Slot s goes to out[s - first]."""
    LN2: tl.constexpr = 0.6931471805599453
    BLOCK_T: tl.constexpr = BLOCK_M // (GROUP * N_READER)
    t0 = tl.program_id(0) * BLOCK_T
    kv_head, b, n_head = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1) * GROUP

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
            sum_slot = (slot - sums_start) * sum_stride[0]
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
            reader = addresses + number * 8
            q_row = tl.load(reader, mask=in_row, other=0).to(depth_k.dtype) + q_at
            do_row = tl.load(reader + 1, mask=in_row, other=0).to(depth_k.dtype) + do_at
            lse_row = tl.load(reader + 2, mask=in_row, other=0).to(sum_k.dtype) + lse_at
            delta_row = tl.load(reader + 3, mask=in_row, other=0).to(sum_k.dtype) + lse_at
            first_read = tl.load(reader + 4, mask=in_row, other=0)
            # A pointer made from an integer carries no alignment; without this promise Triton loads 2 bytes at a time.
            q_row, do_row = tl.multiple_of(q_row, 16), tl.multiple_of(do_row, 16)
            q_tile = tl.load(q_row[:, None] + dim[None, :], mask=in_tile, other=0.0)  # (BLOCK_M, D)
            do_tile = tl.load(do_row[:, None] + dim[None, :], mask=in_tile, other=0.0)
            lse_log2 = tl.load(lse_row, mask=in_row, other=0.0) / LN2
            delta_tile = tl.load(delta_row, mask=in_row, other=0.0)
            z = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale_log2  # (BLOCK_M, BLOCK_N)
            read = (slot[None, :] >= first_read[:, None]) | (slot[None, :] < n_first)
            read = read & (token[:, None] == source[None, :]) & in_row[:, None]
            p = tl.exp2(tl.where(read, z - lse_log2[:, None], float("-inf")))
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
            dz = (p * (dp - delta_tile[:, None]) * scale).to(k_tile.dtype)
            dk_tile = tl.dot(tl.trans(dz), q_tile, dk_tile, input_precision="ieee")
            dv_tile = tl.dot(tl.trans(p.to(do_tile.dtype)), do_tile, dv_tile, input_precision="ieee")
        out_slot = (slot - first) * out_stride[0]
        out_at = out_slot + b * out_stride[1] + kv_head * out_stride[2] + source * out_stride[3]
        tl.store(out_k + out_at[:, None] + dim[None, :], dk_tile.to(out_k.dtype.element_ty), mask=in_kv)
        tl.store(out_v + out_at[:, None] + dim[None, :], dv_tile.to(out_v.dtype.element_ty), mask=in_kv)


@jit(do_not_specialize=["own", "first", "last", "number", "n_slot"])
def _place_kernel(
    x, v, weight, cos, sin, position, to_x, to_v,  # pointers
    layer_stride, batch_stride, head_stride, own, first, last, number, n_slot, eps,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr, VALUES: tl.constexpr,
    OWN: tl.constexpr,
):  # fmt: skip
    """While decoding: one head of x, a key or a query, normalised, rotated and stored where it will be read. That is
    row `number` of the layers first..last-1, and with OWN row n_slot + position of the layer `own`. With VALUES v is
    stored beside it, as it is."""
    b, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, HALF)
    there, begin = dim < HEAD_DIM // 2, (b * tl.num_programs(1) + head) * HEAD_DIM
    t = tl.load(position)
    x1 = tl.load(x + begin + dim, mask=there, other=0.0).to(tl.float32)
    x2 = tl.load(x + begin + HEAD_DIM // 2 + dim, mask=there, other=0.0).to(tl.float32)
    if NORM:
        rrms = tl.rsqrt((tl.sum(x1 * x1) + tl.sum(x2 * x2)) / HEAD_DIM + eps)
        x1 *= rrms * tl.load(weight + dim, mask=there, other=0.0).to(tl.float32)
        x2 *= rrms * tl.load(weight + HEAD_DIM // 2 + dim, mask=there, other=0.0).to(tl.float32)
        x1 = x1.to(weight.dtype.element_ty).to(tl.float32)  # rounded where moda.py rounds
        x2 = x2.to(weight.dtype.element_ty).to(tl.float32)
    if ROTATE:
        c = tl.load(cos + t * (HEAD_DIM // 2) + dim, mask=there, other=0.0)
        s = tl.load(sin + t * (HEAD_DIM // 2) + dim, mask=there, other=0.0)
        x1, x2 = x1 * c - x2 * s, x1 * s + x2 * c
    v1 = tl.load(v + begin + dim, mask=there, other=0.0)
    v2 = tl.load(v + begin + HEAD_DIM // 2 + dim, mask=there, other=0.0)
    head_at = b * batch_stride + head * head_stride + dim
    for i in range(last - first + OWN):
        is_own = i == last - first
        to_layer, to_row = tl.where(is_own, own, first + i).to(tl.int64), tl.where(is_own, n_slot + t, number)
        at = head_at + to_layer * layer_stride + to_row * HEAD_DIM
        tl.store(to_x + at, x1.to(to_x.dtype.element_ty), mask=there)
        tl.store(to_x + HEAD_DIM // 2 + at, x2.to(to_x.dtype.element_ty), mask=there)
        if VALUES:
            tl.store(to_v + at, v1, mask=there)
            tl.store(to_v + HEAD_DIM // 2 + at, v2, mask=there)


def place(x, v, norm, rope, position, to, layers, number, own=None, n_slot=0):
    """Store the heads of one token a sequence, x and v (B, 1, n * head_dim), both contiguous: x normalised and rotated,
    v as it is, or None.

    norm: of a head, or Identity. rope: cos, sin (block_size, head_dim / 2), or None. position (1,). to: the buffers for
    x and for v, (n_layer, B, n, n_key, head_dim). The token becomes row `number` of the layers from layers[0] to below
    layers[1], and row n_slot + position of the layer `own`."""
    to_x, to_v = to
    _, B, n, _, head_dim = to_x.shape
    weight = getattr(norm, "weight", None)
    args = (x, x if v is None else v, x if weight is None else weight, *(rope or (x, x)))  # x: for what is not read
    args += (position, to_x, to_x if v is None else to_v)
    args += (*to_x.stride()[:3], own or 0, *layers, number, n_slot, getattr(norm, "eps", 0.0))
    meta = {"HEAD_DIM": head_dim, "HALF": triton.next_power_of_2(head_dim // 2), "NORM": weight is not None}
    meta |= {"ROTATE": rope is not None, "VALUES": v is not None, "OWN": own is not None}
    with torch.cuda.device(x.device if x.is_cuda else -1):
        _place_kernel[(B, n)](*args, **meta, num_warps=1)


def slots_backward(readers, addresses, depth_k, depth_v, first, last, dtype, sums, sums_start, scale, n_first=0):
    """-> dk, dv (last - first, B, n_kv_head, T, head_dim) of the slots first..last-1, summed over their readers.

    readers: (q, do, lse, delta, start) of each layer, deepest first: q, do (B, n_head, T, head_dim), lse, delta (B,
    n_head, T), all laid out alike, rows at multiples of 16 bytes. A layer reads the slots from `start` to at least
    last-1, and the first n_first. addresses (n_reader, 8), int64: the rows of `_addresses_kernel`. depth_k, depth_v:
    all slots (n_slot, B, n_kv_head, T, head_dim). sums: dk and dv in float32 to begin with, of the slots from
    `sums_start` on, or None.
    """
    if not readers:  # all of them are in sums
        return [x[first - sums_start : last - sums_start].to(dtype) for x in sums]
    n_out, unread = last - first, sum(start >= last and first >= n_first for *_, start in readers)  # by their windows
    readers, addresses = readers[unread:], addresses[unread:]
    q, do, lse = readers[0][:3]
    n_head, T, n_kv_head = *q.shape[1:3], depth_k.shape[2]
    out = [x.new_empty(n_out, *x.shape[1:], dtype=dtype) for x in (depth_k, depth_v)]
    # What was fastest with 1 to 4 heads a group: for a layer's own slots about 8 tokens, so that one tile of 16 columns
    # holds them all, for a block's about 2, and as many readers as make 32 or 64 rows of that.
    group = n_head // n_kv_head
    padded = triton.next_power_of_2(group)
    if n_out <= 2:
        n_reader = triton.next_power_of_2(triton.cdiv(4, group))
        rows, cols, num_warps, num_stages = 32, 16, 1, 3
    else:
        n_reader = min(16, max(1, (32 if q.shape[3] <= 128 else 16) // padded))
        if len(readers) < 8:  # depth_every: q and do, read once for all columns, cost the bytes, not rows of no reader
            n_reader = min(n_reader, max(triton.next_power_of_2(len(readers)), 8 // padded))
        rows, cols, num_warps, num_stages = 2 * padded * n_reader, 16 if n_out <= 8 else 32, 2, 2
    if q.dtype == torch.float32:  # without tensor cores, where large tiles take minutes to compile
        n_reader, rows = max(1, 16 // padded), 16
    if q.dtype == torch.float32 or q.shape[3] > 64:  # or the registers of fewer warps overflow
        num_warps, num_stages = 4, 1
    sum_k, sum_v = (lse, lse) if sums is None else sums  # to point anywhere, in float32
    strides = [x.stride()[:-1] for x in (q, do, depth_k, depth_k if sums is None else sum_k, out[0])]
    args = (addresses, depth_k, depth_v, sum_k, sum_v, *out, *strides)
    args += (T, first, last, sums_start, len(readers), n_first, scale, scale / math.log(2))
    meta = {"N_READER": n_reader, "SUMMED": sums is not None, "num_warps": num_warps, "num_stages": num_stages}
    _launch(_slots_backward_kernel, q, n_kv_head, rows, cols, args, n_reader, **meta)
    return out
