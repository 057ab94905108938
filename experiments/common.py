"""What the measurements, their pictures and the tests share."""

from dataclasses import replace
from functools import partial

import torch

from moda import plain

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
