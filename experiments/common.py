"""What the measurements, their pictures and the tests share."""

from dataclasses import replace
from functools import partial

import torch

from moda import PRESETS, MoDAConfig, plain
from slots import SlotBuffers

ROWS = {  # of the paper's Table 3, and variants: what it is, and a function that makes it of the configuration of row 4
    "plain": ("plain Transformer", plain),
    "row3": ("+ depth KV", partial(replace, ffn_kv=False)),
    "row4": ("+ depth KV and FFN KV", replace),
    "row5": ("+ attention KV of its own", partial(replace, attn_kv=True)),
    "wide": ("plain, as many parameters as row4", plain),
    "longer": ("plain, as much time as row4 took", plain),
    "longer3": ("plain, as much time as row3 took", plain),
    "longer4": ("plain, as much time as every4 took", plain),
    "window4": ("row4, the last 4 slots", partial(replace, depth_window=4)),
    "window8": ("row4, the last 8 slots", partial(replace, depth_window=8)),
    "window16": ("row4, the last 16 slots", partial(replace, depth_window=16)),
    "ffn": ("the FFN's slots alone", partial(replace, attn_slot=False)),
    "ffnevery2": ("the FFN's slots alone, every 2nd layer reads", partial(replace, attn_slot=False, depth_every=2)),
    "first1window4": ("row4, the first slot and the last 4", partial(replace, depth_first=1, depth_window=4)),
    "first1window8": ("row4, the first slot and the last 8", partial(replace, depth_first=1, depth_window=8)),
    "every2": ("row4, every 2nd layer reads", partial(replace, depth_every=2)),
    "every4": ("row4, every 4th layer reads", partial(replace, depth_every=4)),
    "every8": ("row4, every 8th layer reads", partial(replace, depth_every=8)),
    "last": ("row4, the last layer alone reads", lambda row_4: replace(row_4, depth_every=row_4.n_layer)),
    "row3every2": ("row3, every 2nd layer reads", partial(replace, ffn_kv=False, depth_every=2)),
    "row3every4": ("row3, every 4th layer reads", partial(replace, ffn_kv=False, depth_every=4)),
    "norope": ("row4, depth keys not rotated", partial(replace, depth_rope=False)),
    "noqknorm": ("row4 without QK-norm", partial(replace, qk_norm=False)),
}


def row_config(name, row_4):
    """The configuration of a row of ROWS, given that of row 4."""
    return ROWS[name][1](row_4)


def train_step(model):
    """-> a function of idx, targets (B, T): forward and backward on a GPU, in bf16 autocast; returns the loss."""

    def step(idx, targets):
        for p in model.parameters():
            p.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(idx, targets)[1]
        loss.backward()
        return loss.detach()

    return step


def relative_error(x, ref):
    """||x - ref|| / ||ref||, in float64."""
    return ((x.double() - ref).norm() / ref.norm()).item()


def flops(config, T):
    """Floating-point operations of one forward pass over T tokens (paper, Table 3). A multiply-add counts as 2. T x T
    attention is not halved for causality. The LM head counts, norms and other elementwise work do not."""
    c, kv_dim = config, config.n_kv_head * config.head_dim
    layer = 2 * c.n_embd**2 + 2 * c.n_embd * kv_dim + 3 * c.n_embd * c.hidden  # wq, wo, wk, wv, SwiGLU
    projected = ["attn"] * c.attn_kv + ["ffn"] * c.ffn_kv  # slots with a projection of their own
    n_extra = sum(c.is_read(kind, i) for i in range(c.n_layer) for kind in projected)
    weights = c.n_layer * layer + n_extra * 2 * c.n_embd * kv_dim + c.n_embd * c.vocab_size
    keys = sum(T + len(c.slot_names(i)) for i in range(c.n_layer))  # that one query sees, over all layers
    return 2 * T * weights + 4 * T * keys * c.n_embd


SHAPES = {  # name: (config of row 4, B)
    "24l-512": (MoDAConfig(512, 4096, n_layer=24, n_head=8, n_kv_head=2, n_embd=512), 64),
    "24l-1024": (MoDAConfig(2048, 32_000, n_layer=24, n_head=16, n_kv_head=16, n_embd=1024), 8),
    "paper-700m": (replace(PRESETS["paper-700m"], vocab_size=32_000), 2),
    "paper-48l": (replace(PRESETS["paper-48l"], vocab_size=4096), 64),
}


def train_floor(config, B, plain_rate, copy_rate):
    """Milliseconds that depth must add to a step: (projections, slots, second reading).

    The projections are extra matrix products, forward and twice backward, at the plain model's own rate (FLOP/ms). The
    slots: each reader reads K and V once forward and once backward, q, o, o' and q, o, do, dq, dq' beside them, and
    each slot's gradient is written once, at the measured copy bandwidth (byte/ms). No scheme can do with less. Ours, by
    `gradient_bytes`, reads slots and readers a second time for dk and dv: what that adds.
    """
    T = config.block_size
    slots_read = [len(config.slot_names(layer)) for layer in range(config.n_layer)]
    attention = 4 * T * sum(slots_read) * config.n_embd
    extra_flops = 3 * B * (flops(config, T) - flops(plain(config), T) - attention)
    slot, q = 2 * 2 * B * T * config.n_kv_head * config.head_dim, 2 * B * T * config.n_embd  # bytes in bf16
    n_written = sum(config.is_read(kind, layer) for kind in config.slot_kinds for layer in range(config.n_layer))
    n_bytes = slot * (2 * sum(slots_read) + n_written) + 8 * q * sum(n > 0 for n in slots_read)
    second = gradient_bytes(config, B) - slot * n_written
    return extra_flops / plain_rate, n_bytes / copy_rate, second / copy_rate


def gradient_bytes(config, B):
    """Bytes that the slots' gradients take in bf16, by count: each call of the kernel in slots.py reads K and V of its
    slots, q, do, lse and delta of its readers and the sums that it goes on from, and writes its gradients."""
    kv, q, lse = (B * config.block_size * n for n in (config.n_kv_head * config.head_dim, config.n_embd, config.n_head))
    calls = []

    class Counting(SlotBuffers):
        def sum_readers(self, since, first, last, dtype, sums=None):
            n_slot, readers = last - first, self.readers[since:]
            n_reader = sum(start < last or first < self.n_first for (start,) in readers)
            a_slot = 2 * kv * (2 * (n_reader > 0) + 4 * (sums is not None) + dtype.itemsize)
            calls.append(n_slot * a_slot + n_reader * 2 * (2 * q + 4 * lse))
            return [[None] * n_slot] * 2

    buffers, per_layer = Counting(config), len(config.slot_kinds)
    buffers.k = torch.empty(0, dtype=torch.bfloat16)
    for layer in reversed(range(config.n_layer)):  # the order of the backward
        for number in reversed(range(layer * per_layer, min((layer + 1) * per_layer, buffers.n_slot))):
            if config.is_read(config.slot_kinds[number % per_layer], layer):
                buffers.gradients(number)
        reads = config.slots_read(layer)
        if reads:  # where the last run of successive slots begins
            buffers.readers.append((max(number for number in reads if number - 1 not in reads),))
    return sum(calls)


# --------------------------------------------------------------------------------------------------- of the paper

PAPER_TABLE_6 = {  # nats per token on FineWeb-Edu: plain, row 3, row 4
    (24, "post"): (3.4740, 3.4537, 3.4338),
    (48, "post"): (3.4062, 3.3653, 3.3484),
    (48, "pre"): (3.3800, 3.3759, 3.3656),
}
LADDER = {"T": 1024, "group": 8, "n_slot": 64}  # the setting of Table 7
PAPER_TABLE_7 = {"naive": 2128.9, "flash-compatible": 13.102, "chunk-aware": 6.286, "group-aware": 1.460}  # ms, A100
PAPER_TABLE_2 = {  # ms on an A100, forward + backward: FlashAttention-2 without depth, MoDA
    (4096, 8, 64): (7.970, 10.750), (8192, 8, 64): (28.700, 35.427), (16384, 8, 64): (116.700, 127.661),
    (32768, 8, 64): (459.854, 480.914), (65536, 8, 64): (1831.668, 1883.026), (16384, 2, 64): (28.982, 39.741),
    (16384, 4, 64): (58.071, 68.939), (16384, 16, 64): (233.700, 244.900), (16384, 32, 64): (467.107, 480.767),
    (16384, 8, 128): (116.700, 138.224), (16384, 8, 256): (116.700, 167.958),
}  # fmt: skip
