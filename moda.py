"""A language model with Mixture-of-Depths Attention (MoDA, arXiv 2603.15619), in one file.

A Transformer carries everything in one residual stream, and what a shallow layer wrote is diluted by every later
addition. MoDA keeps a second, *undiluted* path: each sublayer also writes one key and one value per position into a
depth stream, and every later layer's queries read that stream, at their own position, under the same softmax as the
sequence. One layer, in the order of the code:

    project -> rotate -> attend over [sequence | depth] -> write a slot -> FFN -> write a slot

Shapes: B batch, T positions, n_slot depth slots that a layer reads, group = n_head // n_kv_head.
The operator itself lives in kernel.py.
"""

import functools
import math
from dataclasses import dataclass, fields
from types import MethodType

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import Variable
from torch.utils.checkpoint import checkpoint

import kernel
from kernel import moda_attention, moda_attention_weights

# -------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class MoDAConfig:
    """Shape and variant of a model. Raises ValueError for combinations that cannot work.

    Rows of the paper's Table 3: 1 is depth_kv=ffn_kv=False, 3 is ffn_kv=False, 4 the default, 5 is attn_kv=True.
    """

    block_size: int  # longest sequence, in tokens
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int  # grouped-query attention: n_head // n_kv_head query heads share one KV head
    n_embd: int
    n_hidden: int | None = None  # width of the SwiGLU; None: 4 * n_embd
    norm: str = "post"  # "post": x = norm(x + f(x)), the paper's choice; "pre": x = x + f(norm(x))
    qk_norm: bool = True  # RMSNorm of every query and key head
    bias: bool = False
    rope_theta: float = 10_000.0
    depth_kv: bool = True  # queries also read earlier layers' KV; the attention slot reuses the sequence K and V
    ffn_kv: bool = True  # the FFN writes a slot too, projected from its input
    attn_kv: bool = False  # the attention slot has a K, V projection of its own
    depth_rope: bool = True  # rotate depth keys like queries: one position's rotations cancel in the depth logit
    depth_window: int | None = None  # read only the most recent N slots (paper, section 6.2); None: all

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            valid = (type(value) is int and value >= 1) or (value is None and field.type == int | None)
            if field.type in (int, int | None) and not valid:
                raise ValueError(f"{field.name} must be a whole number of at least 1, got {value!r}")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{field.name} must be True or False, got {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.head_dim % 2:
            raise ValueError(f"n_embd // n_head ({self.head_dim}) must be even: rotary embedding turns pairs")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head})")
        if self.norm not in ("pre", "post"):
            raise ValueError(f'norm must be "pre" or "post", got {self.norm!r}')
        if not isinstance(self.rope_theta, int | float) or not self.rope_theta > 0:
            raise ValueError(f"rope_theta must be positive, got {self.rope_theta!r}")
        for field in ("ffn_kv", "attn_kv"):
            if getattr(self, field) and not self.depth_kv:
                raise ValueError(f"{field}=True needs depth_kv=True: without it nobody reads the slot")
        if self.depth_window is not None and not self.depth_kv:
            raise ValueError("depth_window needs depth_kv=True: without it there are no slots")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def hidden(self):
        return 4 * self.n_embd if self.n_hidden is None else self.n_hidden

    @property
    def kinds(self):
        """The sublayers that write slots, in order: slot kinds[i] of layer l is number l * len(kinds) + i."""
        return ("attn",) * self.depth_kv + ("ffn",) * self.ffn_kv

    def slot_range(self, layer):
        """Layer `layer` (from 0) reads the slots numbered start..stop-1 -> (start, stop)."""
        if not 0 <= layer < self.n_layer:
            raise ValueError(f"layer must be from 0 to {self.n_layer - 1}, got {layer}")
        stop = layer * len(self.kinds)
        return (0 if self.depth_window is None else max(0, stop - self.depth_window)), stop

    def slot_names(self, layer):
        """The slots that layer `layer` (from 0) reads, oldest first: ["attn 0", "ffn 0", "attn 1", ...]."""
        n = len(self.kinds)
        return [f"{self.kinds[slot % n]} {slot // n}" for slot in range(*self.slot_range(layer))]

    def is_read(self, kind, layer):
        """Whether anyone reads the slot that `kind` ("attn" or "ffn") of `layer` writes. If the next layer does not,
        nobody does: windows only move on. What nobody reads is neither projected nor written."""
        return layer + 1 < self.n_layer and f"{kind} {layer}" in self.slot_names(layer + 1)


PRESETS = {
    # trains on a laptop CPU in about two minutes
    "tiny": MoDAConfig(block_size=256, vocab_size=2048, n_layer=6, n_head=4, n_kv_head=2, n_embd=128),
    # deep and narrow: for looking at where layers look
    "deep": MoDAConfig(block_size=256, vocab_size=2048, n_layer=16, n_head=4, n_kv_head=2, n_embd=128),
    # the paper's Table 6 and Table 3
    "paper-24l": MoDAConfig(512, 50_304, n_layer=24, n_head=6, n_kv_head=2, n_embd=384, bias=True),
    "paper-48l": MoDAConfig(512, 50_304, n_layer=48, n_head=6, n_kv_head=2, n_embd=384, bias=True),
    "paper-700m": MoDAConfig(4096, 100_352, n_layer=36, n_head=16, n_kv_head=8, n_embd=1024),
}


def flops(config, T):
    """Floating-point operations of one forward pass over T tokens (paper, Table 3): 2 per multiply-add, the full T x T
    attention not halved for causality, LM head counted, norms and other elementwise work not. Needs no weights."""
    c, kv_dim = config, config.n_kv_head * config.head_dim
    layer = 2 * c.n_embd**2 + 2 * c.n_embd * kv_dim + 3 * c.n_embd * c.hidden  # wq, wo, wk, wv, SwiGLU
    projected = ["attn"] * c.attn_kv + ["ffn"] * c.ffn_kv  # slots with a projection of their own
    n_extra = sum(c.is_read(kind, i) for i in range(c.n_layer) for kind in projected)
    weights = c.n_layer * layer + n_extra * 2 * c.n_embd * kv_dim + c.n_embd * c.vocab_size
    keys = sum(T + len(c.slot_names(i)) for i in range(c.n_layer))  # that one query sees, over all layers
    return 2 * T * weights + 4 * T * keys * c.n_embd


# ------------------------------------------------------------------------------------------------------ the parts


class DepthStream:
    """The slots written so far in one forward pass: a K and a V (B, n_kv_head, T, head_dim) each, by number.

    It lives as long as the forward pass: depth KV is only ever read at its own position, so cached decoding has
    nothing to remember here. This plain version leaves gradients to autograd, which adds them up reader by reader;
    FastDepthStream does the same sums with less memory traffic.
    """

    def __init__(self, config, impl=None):
        self.impl, self.n_all = impl, config.slot_range(config.n_layer - 1)[1]  # slots of all layers but the last
        self.k, self.v = [None] * self.n_all, [None] * self.n_all
        self.with_grad = {}  # slot: whether gradients were on when it was written
        self.skipped = set()  # of layers that read without gradients: the `stop` of their range
        self.finished = False  # the forward: layers that run now are checkpointed ones, whose slots are there already

    def write(self, slot, k, v):
        if self.is_new(slot):
            self.k[slot], self.v[slot] = k, v

    def is_new(self, slot):
        """Whether the slot is to be written now. RuntimeError if that has been done in this forward."""
        if slot in self.with_grad and not self.finished:
            raise RuntimeError(f"slot {slot} is written twice: a layer ran a second time within one forward")
        self.with_grad.setdefault(slot, torch.is_grad_enabled())
        return not self.finished

    def read(self, start, stop):
        """depth_k, depth_v (stop - start, B, n_kv_head, T, head_dim): the slots start..stop-1, or (None, None)."""
        self.check_gradients(start, stop)
        return (torch.stack(self.k[start:stop]), torch.stack(self.v[start:stop])) if stop > start else (None, None)

    def check_gradients(self, start, stop):
        if not torch.is_grad_enabled():
            self.skipped.add(stop)
        elif stop in self.skipped or not all(self.with_grad[slot] for slot in range(start, stop)):
            raise RuntimeError(
                "a layer ran without gradients, and is run again or read with them, so that gradients of slots would "
                "be lost: activation checkpointing needs use_reentrant=False, freezing layers requires_grad_(False)"
            )

    def attend(self, q, k, v, start, stop):
        """Attention over the sequence and the slots start..stop-1 -> (B, n_head, T, head_dim)."""
        return moda_attention(q, k, v, *self.read(start, stop), impl=self.impl)


class FastDepthStream(DepthStream):
    """The same, for the Triton kernels: slots lie in one buffer, are read in place as a range of it, and their
    gradients are summed over the readers by `kernel.slots_backward`, in float32.

    In the backward, a reader computes its dq and leaves (q, do, lse, delta) here, and their addresses in a table on the
    GPU, so that one kernel can go through any number of readers. When the backward reaches the layer that wrote a slot,
    all its readers have been there, and the slot's gradient is summed up over them. So that not every slot has to look
    at all of them, this goes in blocks of layers: what the readers above a block add is summed up for all its slots at
    once, and each slot then adds only the readers within its block. The order is kept in the graph by `order`, an empty
    tensor that each operation takes and passes on; on the GPU, for autograd to take each to its forward's CUDA stream.
    """

    def __init__(self, config, impl=None):
        super().__init__(config, impl)
        self.order = torch.empty(0)
        self.slots = _Slots(self.n_all, len(config.kinds))  # apart, so that the graph does not hold on to itself

    def write(self, slot, k, v):
        if not self.is_new(slot):
            return
        if self.with_grad[slot]:
            self.order = _Write.apply(k, v, self.order, self.slots, slot)
        else:
            self.slots.write(slot, k, v)

    def read(self, start, stop):
        self.check_gradients(start, stop)
        return self.slots.read(start, stop)

    def attend(self, q, k, v, start, stop):
        self.check_gradients(start, stop)
        if not torch.is_grad_enabled():
            return self.slots.attend(q, k, v, start, stop)[0]
        o, order = _Attend.apply(q, k, v, self.order, self.slots, start, stop)
        if not self.finished:  # or it would keep what a checkpointed layer has just computed again
            self.order = order
        return o


class _Slots:
    """Buffers (n_all, B, n_kv_head, T, head_dim) of a FastDepthStream, and what its backward has gathered so far."""

    BLOCK = 8  # layers; at 24 and 48 layers, with groups from 1 to 4, no other number moves much fewer bytes

    def __init__(self, n_all, per_layer):
        self.n_all, self.per_layer, self.k, self.v = n_all, per_layer, None, None
        self.lowest = None  # the first slot with a gradient, so the last to get it
        self.begin_backward()

    def begin_backward(self, stop=0):
        """Forget what an earlier backward, finished or broken off, has left. This one begins at the layer that reads
        the slots up to `stop`."""
        self.readers, self.table, self.done = [], None, {}
        self.task = torch._C._current_graph_task_id()  # which of autograd's backwards this is
        self.whole = stop == self.n_all  # from the last layer on, so that the forward is over
        # how many readers lie above the block, what they add to its slots (dk, dv), the first of these slots
        self.n_summed, self.sums, self.sum_first = 0, None, 0

    def end_backward(self, writer):
        """Every slot has its gradient. Whoever holds the loss shall not hold the slots, unless autograd keeps the graph
        too: then what it saved for `writer`, the context of a _Write, can be asked for still."""
        try:
            writer.saved_tensors  # noqa: B018
        except RuntimeError:
            if self.whole:
                self.k = self.v = None
        self.begin_backward()

    def write(self, slot, k, v):
        if self.k is None:
            self.k, self.v = (x.new_empty(self.n_all, *x.shape) for x in (k, v))
        self.k[slot], self.v[slot] = k, v

    def read(self, start, stop):
        return (self.k[start:stop], self.v[start:stop]) if stop > start else (None, None)

    def attend(self, q, k, v, start, stop):
        """-> o (B, n_head, T, head_dim), lse (B, n_head, T)."""
        return kernel.attention_forward(q, k, v, *self.read(start, stop), True, q.shape[-1] ** -0.5, "triton")

    def add_reader(self, do, q, o, lse, dq, start, stop):
        """A layer's attention is being differentiated: add the depth part to dq, and keep what the slots need of it.
        Rows of q and do start at multiples of 16 bytes, as `MoDA._stream` makes sure (head_dim % 8)."""
        if self.table is None:
            self.table = torch.empty(self.n_all // self.per_layer, 8, dtype=torch.int64, device=q.device)
        args = (do, q, *self.read(start, stop), o, lse, q.shape[-1] ** -0.5, dq)
        delta = kernel._depth_backward_triton(*args, reader=self.table[len(self.readers)], first=start)
        self.readers.append((q.detach(), do, lse, delta, start))

    def sum_readers(self, since, first, last, dtype, sums=None, sum_first=0):
        args = (self.readers[since:], self.table[since:], self.k, self.v, first, last, dtype, sums, sum_first)
        return kernel.slots_backward(*args, self.k.shape[-1] ** -0.5)

    def gradients(self, slot):
        """-> dk, dv of a slot whose readers have all been differentiated."""
        if slot not in self.done:  # all slots of its layer at once: they have the same readers
            first, last = slot - slot % self.per_layer, slot + 1
            if len(self.readers) - self.n_summed >= self.BLOCK:
                self.sums = None  # and its memory
                self.n_summed, self.sum_first = len(self.readers), max(0, last - self.BLOCK * self.per_layer)
                self.sums = self.sum_readers(0, self.sum_first, last, torch.float32)
            grads = self.sum_readers(self.n_summed, first, last, self.k.dtype, self.sums, self.sum_first)
            self.done = {first + i: pair for i, pair in enumerate(zip(*grads, strict=True))}
        return self.done[slot]


def _check_backward(slots):
    # once_differentiable refuses by a node of the graph, which torch.autograd.grad(..., inputs) may never visit
    if torch.is_grad_enabled():
        raise RuntimeError('the fast depth stream has no second derivatives: impl="torch" takes create_graph=True')
    if slots.task != torch._C._current_graph_task_id():
        raise RuntimeError(
            'a graph of the fast depth stream was differentiated within its own backward: use impl="torch"'
        )


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, v, order, slots, slot):
        slots.write(slot, k, v)
        if slots.lowest is None and any(ctx.needs_input_grad):
            slots.lowest = slot
        ctx.slots, ctx.slot = slots, slot
        return k.new_empty(0)

    @staticmethod
    def backward(ctx, dorder):
        _check_backward(ctx.slots)
        if ctx.slot == ctx.slots.lowest:
            Variable._execution_engine.queue_callback(lambda: ctx.slots.end_backward(ctx))
        return *ctx.slots.gradients(ctx.slot), dorder, None, None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, order, slots, start, stop):
        o, lse = slots.attend(q, k, v, start, stop)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.slots, ctx.start, ctx.stop = slots, start, stop
        ctx.set_materialize_grads(False)
        return o, q.new_empty(0)

    @staticmethod
    def backward(ctx, do, dorder):
        q, k, v, o, lse = ctx.saved_tensors
        if dorder is None:  # nothing later was read: this backward starts here
            ctx.slots.begin_backward(ctx.stop)
            dorder = q.new_empty(0)
        _check_backward(ctx.slots)
        # one kernel goes through all readers: they shall lie alike, also where a hook has moved one
        q = kernel._laid_out(q, ctx.slots.readers[0][0] if ctx.slots.readers else q)
        o = kernel._laid_out(o, q)
        do = torch.zeros_like(q) if do is None else kernel._laid_out(do, q)  # None: only its slots were used
        dq, dk, dv = kernel._sequence_backward(do, q, k, v, o, lse, True, q.shape[-1] ** -0.5)
        if ctx.stop > ctx.start:
            ctx.slots.add_reader(do, q, o, lse, dq, ctx.start, ctx.stop)
        return dq, dk, dv, dorder, None, None, None


class KVCache:
    """Sequence keys and values of every layer while generating. Nothing for depth: see DepthStream."""

    def __init__(self, config, B):
        self.shape = (config.n_layer, B, config.n_kv_head, config.block_size, config.head_dim)
        self.length, self.k, self.v = 0, None, None  # allocated by the first append, which knows dtype and device

    def append(self, layer, k, v):
        """Store k, v (B, n_kv_head, T, head_dim) of new positions; return all the layer's keys and values so far."""
        if self.k is None:
            self.k, self.v = k.new_empty(self.shape), v.new_empty(self.shape)
        stop = self.length + k.shape[2]
        self.k[layer, :, :, self.length : stop] = k
        self.v[layer, :, :, self.length : stop] = v
        return self.k[layer, :, :, :stop], self.v[layer, :, :, :stop]


def rms_norm(n):
    """PyTorch's RMSNorm over n channels, with one eps: its default depends on the dtype."""
    return nn.RMSNorm(n, eps=1e-6)


def rotate(x, cos, sin):
    """Rotary embedding of x (..., head_dim): turn each pair (x[i], x[i + head_dim / 2]) by its position's angle i.

    cos, sin (T, head_dim / 2), or (T, 1, head_dim / 2) where x is (B, T, n_head, head_dim)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def linears(x, *layers):
    """[layer(x) for layer in layers] for linear layers, in one matrix product, so that x and its gradient pass by once.
    The weights stay parameters of their own: Muon orthogonalises each."""
    plain = all(type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks) for layer in layers)
    if not torch.is_grad_enabled() or not plain:  # joining copies the weights: too dear for the few tokens of decoding
        return [layer(x) for layer in layers]
    weight, biases = torch.cat([layer.weight for layer in layers]), [layer.bias for layer in layers]
    bias = None if biases[0] is None else torch.cat(biases)
    return F.linear(x, weight, bias).split([layer.out_features for layer in layers], dim=-1)


class KVProjection(nn.Module):
    """A key and a value per position. The sequence KV, and each slot that does not reuse it, is one of these."""

    def __init__(self, config):
        super().__init__()
        self.wk = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=config.bias)
        self.wv = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=config.bias)


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.hidden, bias=config.bias)
        self.up = nn.Linear(config.n_embd, config.hidden, bias=config.bias)
        self.down = nn.Linear(config.hidden, config.n_embd, bias=config.bias)

    def forward(self, x, kv=None):
        """x (B, T, n_embd) -> the same shape, and the k, v (B, T, n_kv_head * head_dim) that kv makes of x."""
        gate, up, *slot = linears(x, self.gate, self.up, *([kv.wk, kv.wv] if kv else []))  # gate, up (B, T, hidden)
        return self.down(F.silu(gate) * up), *slot  # not nested: reentrant checkpointing would not see them


class Attention(nn.Module):
    """Multi-head attention over [sequence | depth], and the writing of both of its layer's slots."""

    def __init__(self, config, layer):
        super().__init__()
        c = self.config = config
        self.layer, self.reads = layer, c.slot_range(layer)  # the first slot it may not read is the first it writes
        self.wq = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)
        self.kv = KVProjection(c)
        self.wo = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)
        self.q_norm = rms_norm(c.head_dim) if c.qk_norm else nn.Identity()
        self.k_norm = rms_norm(c.head_dim) if c.qk_norm else nn.Identity()  # for the slots of this layer too
        self.writes = {kind: c.is_read(kind, layer) for kind in ("attn", "ffn")}
        self.attn_kv = KVProjection(c) if c.attn_kv and self.writes["attn"] else None
        self.ffn_kv = KVProjection(c) if self.writes["ffn"] else None

    def heads(self, k, v, rope, turn=True):
        """k, v (B, T, n_kv_head * head_dim) -> k, v (B, n_kv_head, T, head_dim), keys normalised and, if they shall
        turn, rotated. What is written has been through here once, so that no reader has to do it again."""
        k, v = (x.unflatten(-1, (self.config.n_kv_head, -1)).transpose(1, 2) for x in (k, v))
        k = self.k_norm(k.to(rope[0].dtype))  # in the weights' precision, also where autocast makes q, k, v bf16
        return (rotate(k, *rope) if turn else k).to(v.dtype), v

    def project(self, x, rope):
        """x (B, T, n_embd) -> q (B, n_head, T, head_dim), k, v (B, n_kv_head, T, head_dim), slot: None or (k, v)."""
        own = [self.attn_kv.wk, self.attn_kv.wv] if self.attn_kv else []
        q, *kv = linears(x, self.wq, self.kv.wk, self.kv.wv, *own)
        q = q.unflatten(-1, (self.config.n_head, -1))  # (B, T, n_head, head_dim)
        turned = rotate(self.q_norm(q.to(rope[0].dtype)), *(angle.unsqueeze(1) for angle in rope))
        q = turned.to(q.dtype).transpose(1, 2)  # attention's output is laid out like q: this way wo reads it in place
        k, v = self.heads(*kv[:2], rope)
        if not self.writes["attn"]:
            return q, k, v, None
        if own or not self.config.depth_rope:
            return q, k, v, self.heads(*kv[-2:], rope, self.config.depth_rope)
        return q, k, v, (k, v)

    def forward(self, q, k, v, slot, stream, cache=None, maps=None):
        """What `project` returned -> what the heads found, side by side (B, T, n_embd), before wo."""
        keys, values = (k, v) if cache is None else cache.append(self.layer, k, v)
        if maps is not None:
            maps.append(moda_attention_weights(q, keys, stream.read(*self.reads)[0])[0])  # (B, n_head, T, T + n_slot)
        o = stream.attend(q, keys, values, *self.reads)  # (B, n_head, T, head_dim)
        if slot is not None:
            stream.write(self.reads[1], *slot)
        return o.transpose(1, 2).flatten(2)


class Block(nn.Module):
    """One layer. Post-norm: x = norm(x + f(x)); pre-norm: x = x + f(norm(x))."""

    def __init__(self, config, layer):
        super().__init__()
        self.pre = config.norm == "pre"
        self.attn, self.ffn = Attention(config, layer), SwiGLU(config)
        self.attn_norm, self.ffn_norm = rms_norm(config.n_embd), rms_norm(config.n_embd)

    def forward(self, x, rope, stream, cache=None, maps=None):
        o = self.attn(*self.before_attention(x, rope), stream, cache, maps)  # (B, T, n_embd)
        x, slot = self.after_attention(x, o, rope)
        self.write(slot, stream)
        return x

    def before_attention(self, x, rope):
        return self.attn.project(self.attn_norm(x) if self.pre else x, rope)

    def after_attention(self, x, o, rope):
        """-> x (B, T, n_embd) after the layer, and the slot of the FFN: None or (k, v)."""
        x = x + self.attn.wo(o)
        x = x if self.pre else self.attn_norm(x)
        h, *slot = self.ffn(self.ffn_norm(x) if self.pre else x, self.attn.ffn_kv)  # k, v of what the FFN reads
        x = x + h
        slot = self.attn.heads(*slot, rope, self.attn.config.depth_rope) if slot else None
        return x if self.pre else self.ffn_norm(x), slot

    def write(self, slot, stream):
        if slot is not None:
            stream.write(self.attn.reads[1] + 1, *slot)

    def between(self, following, x, o, rope):
        """From one attention to the next: `after_attention`, and `before_attention` of the following layer."""
        x, slot = self.after_attention(x, o, rope)
        return x, slot, following.before_attention(x, rope)


# ------------------------------------------------------------------------------------------------------ the model


class MoDA(nn.Module):
    """Decoder-only language model: RMSNorm, rotary positions, QK-norm, SwiGLU, grouped queries, tied embedding.

    impl: which implementation of the attention to use, see `kernel.moda_attention`.
    checkpoint: keep only each layer's input for the backward, and compute the rest of the layer again there.
    """

    def __init__(self, config, impl=None, checkpoint=False):
        super().__init__()
        self.config, self.impl, self.checkpoint, self.compiled = config, impl, checkpoint, False
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)  # and, transposed, the LM head
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = rms_norm(config.n_embd) if config.norm == "pre" else nn.Identity()
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        angle = torch.outer(torch.arange(config.block_size, dtype=torch.float64), config.rope_theta**-exponent)
        self.register_buffer("cos", angle.cos().float(), persistent=False)  # (block_size, head_dim / 2)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # the projections back into the residual stream start smaller, as 2 * n_layer add up
                out = name.endswith(("wo.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if out else 0.02)

    def _hidden(self, idx, cache=None, maps=None):
        """idx (B, T) -> (B, T, n_embd), the input of the LM head."""
        if idx.dim() != 2 or idx.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"idx must be integer token ids (B, T), got {idx.dtype} {tuple(idx.shape)}")
        start = cache.length if cache is not None else 0
        stop = start + idx.shape[1]
        if idx.numel() == 0:
            raise ValueError(f"idx is empty: {tuple(idx.shape)}")
        if stop > self.config.block_size:
            raise ValueError(f"{stop} positions exceed block_size ({self.config.block_size})")
        rope, x = (self.cos[start:stop], self.sin[start:stop]), self.embed(idx)  # x (B, T, n_embd)
        stream = self._stream(x)(self.config, self.impl)
        if self.checkpoint and torch.is_grad_enabled():
            for block in self.blocks:
                x = checkpoint(block, x, rope, stream, cache, maps, use_reentrant=False)
        elif self._in_parts():  # the same, cut at the attentions instead of the layers
            projected = _compiled(self.blocks[0].before_attention)(x, rope)
            for block, following in zip(self.blocks[:-1], self.blocks[1:], strict=True):
                o = block.attn(*projected, stream, cache, maps)
                x, slot, projected = _compiled(block.between)(following, x, o, rope)
                block.write(slot, stream)
            o = self.blocks[-1].attn(*projected, stream, cache, maps)
            x, _ = _compiled(self.blocks[-1].after_attention)(x, o, rope)
        else:
            for block in self.blocks:
                x = block(x, rope, stream, cache, maps)
        stream.finished, stream.order = True, torch.empty(0)  # whoever keeps the stream shall not keep the graph
        if cache is not None:
            cache.length = stop
        return self.norm(x)

    def _stream(self, x):
        """The class of the depth stream: the fast one where the Triton kernels are to run and the graph is eager."""
        c, device = self.config, x.device.type
        cast = device in kernel.AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
        q = x.new_empty(0, c.head_dim, dtype=torch.get_autocast_dtype(device) if cast else x.dtype)
        wanted = self.impl == "triton" or (self.impl is None and x.is_cuda)
        able = c.depth_kv and c.n_layer > 1 and c.head_dim % 8 == 0 and kernel._why_not_triton(q) is None
        eager = not torch.compiler.is_compiling() and not kernel._forward_mode()
        return FastDepthStream if wanted and able and eager else DepthStream

    def forward(self, idx, targets=None):
        """idx (B, T) token ids, T <= block_size; targets (B, T) int64 or None, positions with -1 are left out.

        Returns (logits (B, T, vocab_size), mean cross-entropy in nats per token or None). Raises ValueError for empty
        or too long input, or ids that are not integers.
        """
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets {tuple(targets.shape)} must have the shape of idx {tuple(idx.shape)}")
        head = _compiled(self.head) if self._in_parts() else self.head
        return head(self._hidden(idx), targets)

    def head(self, x, targets=None):
        """x (B, T, n_embd), targets (B, T) or None -> (logits, loss or None), as `forward`."""
        logits = F.linear(x, self.embed.weight)  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    def compile_parts(self):
        """torch.compile everything but the attention and the depth stream, which stay eager: what lies between two
        attentions becomes one graph, the same for every layer. The fastest way to train on a GPU. Returns self.
        Hooks of a Block, which spans two graphs, are not called then, and what is in it has to have its hooks before
        the first call. With `checkpoint`, training runs eagerly.
        (`torch.compile(model)` works as well; its depth stream is then the plain one.)"""
        limits = torch._dynamo.config  # all models share the parts' code; beyond this many variants it runs eagerly
        limits.recompile_limit = max(limits.recompile_limit, 64)
        self.compiled = True
        return self

    def _in_parts(self):
        # a graph would drop the tangents of forward mode; and in torch.compile(model) all is one graph anyway
        return self.compiled and not kernel._forward_mode() and not torch.compiler.is_compiling()

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, use_cache=True):
        """Continue idx (B, T) by max_new_tokens sampled tokens; returns (B, T + max_new_tokens).

        temperature 0 takes the likeliest token; top_k samples among the k likeliest. When the context outgrows
        block_size, its last block_size // 2 tokens are kept and start again at position 0, with or without a cache:
        a sliding cache would not equal the model without one, as deep keys still carry what was dropped.
        Raises ValueError for an empty prompt, ids that are not integers, and arguments out of range.
        """
        if not temperature >= 0 or max_new_tokens < 0 or (top_k is not None and top_k < 1):
            got = f"got {temperature}, {max_new_tokens} and {top_k}"
            raise ValueError(f"need temperature >= 0, max_new_tokens >= 0 and top_k >= 1 or None, {got}")
        if idx.dim() != 2 or idx.numel() == 0:
            raise ValueError(f"generation needs a prompt (B, T) of at least one token, got {tuple(idx.shape)}")
        context, cache = idx, None
        for _ in range(max_new_tokens):
            if context.shape[1] > self.config.block_size:
                context, cache = context[:, -max(1, self.config.block_size // 2) :], None
            if use_cache and cache is None:
                cache = KVCache(self.config, idx.shape[0])
            hidden = self._hidden(context[:, cache.length :] if use_cache else context, cache)
            logits = F.linear(hidden[:, -1], self.embed.weight)  # (B, vocab_size)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, float("-inf"))
                new = torch.multinomial((logits.float() / temperature).softmax(-1), 1)
            context, idx = torch.cat([context, new], dim=1), torch.cat([idx, new], dim=1)
        return idx

    @torch.no_grad()
    def attention_maps(self, idx):
        """Where every layer looks (the paper's Figure 5): a list over layers of (B, n_head, T, T + n_slot).

        Rows sum to 1: sequence columns first, then the depth slots in the order of `slot_names(layer)`.
        Raises ValueError as `forward` does.
        """
        maps = []
        self._hidden(idx, maps=maps)
        return maps

    def slot_names(self, layer):
        """The slots that layer `layer` (from 0) reads, oldest first: ["attn 0", "ffn 0", "attn 1", ...]."""
        return self.config.slot_names(layer)

    def num_params(self):
        """Parameters, the tied embedding counted once."""
        return sum(p.numel() for p in self.parameters())


_compile = functools.cache(torch.compile)  # a function's graphs, for all objects that have it as their method


def _compiled(method):
    """obj.method, compiled as a function of obj. A compiled method kept by its object would, in a copy of the model,
    go on computing with the weights of the original."""
    return MethodType(_compile(method.__func__), method.__self__)


def capture(step, *inputs, warmup=3):
    """Record the kernels of step(*inputs) as a CUDA graph -> a function of inputs of the same shapes that replays it.

    Python is not asked again: where small kernels wait for it, a training step gets several times as fast. For that
    reason the step must not depend on anything but its inputs and on tensors that stay where they are; what it makes
    (its result, and gradients that it lets begin as None) is overwritten by the next replay. The function that replays
    raises ValueError for inputs of another shape or dtype.
    warmup: how often to run it first, for whatever is compiled, planned or loaded at first use.
    """
    inputs = [x.clone() for x in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step(*inputs)

    def replay(*new):
        for x, y in zip(inputs, new, strict=True):
            if x.shape != y.shape or x.dtype != y.dtype:  # copy_ would broadcast and cast
                raise ValueError(f"recorded with {x.dtype} {tuple(x.shape)}, got {y.dtype} {tuple(y.shape)}")
            x.copy_(y)
        graph.replay()
        return result

    replay.step = step  # the graph reads its weights by address: they have to live as long
    return replay
