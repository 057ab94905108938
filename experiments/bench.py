"""Measurements of speed. Each command prints its table and writes experiments/results/COMMAND_GPU.json, with every
repetition in it, and the picture of it (plots.py). From the root of the repository:

    python -m experiments.bench kernel    the operator against attention without depth, in the settings of the paper's
                                          Table 2, and the paper's Table 7, the ladder from naive loops to the kernel
    python -m experiments.bench short     the two forwards of the kernels at short lengths, one launch against two
    python -m experiments.bench train     whole training steps, forward + backward, with and without depth, four shapes
    python -m experiments.bench generate  cached decoding with and without depth
    python -m experiments.bench scale     time and memory over n_layer, T and the window of slots, beside the formulas
                                          of Table 1

Variants take turns, repetition by repetition, so that a drift of the clock hits all alike; differences are medians
over the turns. Nothing is timed before it has been checked: `kernel` against the equation in float64 on the same
tensors, `train` against the portable path (loss and every gradient), `generate` token by token, in float32. `scale` is
the exception: for want of memory it times one model after the other, and leaves the checking to `train`.
"""

import argparse
import itertools
import json
import random
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernel
from environment import machine
from experiments.common import (
    LADDER,
    PAPER_TABLE_2,
    PAPER_TABLE_7,
    ROWS,
    SHAPES,
    flops,
    relative_error,
    row_config,
    train_floor,
    train_step,
)
from experiments.plots import redraw
from fast import FastMoDA, record
from kernel import moda_attention, moda_attention_reference
from moda import KVCache, MoDAConfig, plain
from sdpa import sequence_backward

ROOT = Path(__file__).parent
N_KV_HEAD, HEAD_DIM = 8, 64  # of Table 2, and B = 1
SHORT = {"B": (1, 4), "T": (512, 1024, 2048, 4096, 8192), "group": (1, 2, 8), "n_slot": (8, 32, 128)}
median = statistics.median


# ------------------------------------------------------------------------------------------------------- the tools


def this_gpu():
    """What the numbers are measured on, with which code, and when."""
    versions = {"triton": kernel.triton.__version__, "cudnn": torch.backends.cudnn.version()}
    date = {"gpu": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d")}
    return machine(torch.device("cuda")) | versions | date


def interleave(variants, reps):
    """Milliseconds of GPU time of each of the `variants` {name: function}, called in turn: {name: [ms] * reps}.

    Before each call a large buffer is cleared: it empties the L2 cache, and it keeps the GPU busy long enough for
    the call to be enqueued, so that the time between the events holds no waiting for Python. Every turn goes in
    another order: a kernel runs slower after one that drew much power.
    """
    flush = torch.empty(4 << 30, dtype=torch.int8, device="cuda")
    times = {name: [] for name in variants}
    for rep in range(-2, reps):  # two rounds to warm up
        for name in random.sample(list(variants), len(variants)):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            flush.zero_()
            start.record()
            variants[name]()
            stop.record()
            stop.synchronize()
            if rep >= 0:
                times[name].append(start.elapsed_time(stop))
    return times


def ceilings():
    """Copy bandwidth in TB/s (read + written) and bf16 matrix rate in TFLOP/s of this GPU, on random data."""
    a = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    times = interleave({"copy": lambda: b.copy_(a), "matmul": lambda: x @ x}, 10)
    return 4e-9 * a.numel() / median(times["copy"]), 2e-9 * 8192**3 / median(times["matmul"])


def print_table(lines):
    """Print lines of cells (strings), the first line the header, in Markdown."""
    width = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for i, line in enumerate(lines):
        print("| " + " | ".join(cell.rjust(w) for cell, w in zip(line, width, strict=True)) + " |", flush=True)
        if i == 0:
            print("|" + "|".join("-" * (w + 1) + ":" for w in width) + "|")


def result_path(name):
    """results/NAME_GPU.json, of this GPU."""
    gpu = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name().removeprefix("NVIDIA ")).lower()
    return ROOT / "results" / f"{name}_{gpu}.json"


def write_result(name, result):
    """Write results/NAME_GPU.json, numbers to five digits -> its path."""
    path = result_path(name)
    path.parent.mkdir(exist_ok=True)
    numbers = json.loads(json.dumps(result), parse_float=lambda x: float(f"{float(x):.5g}"))
    path.write_text(json.dumps(numbers, separators=(",", ":")).replace("},{", "},\n{") + "\n")
    print(f"wrote {path.relative_to(ROOT.parent)}")
    return path


# --------------------------------------------------------------------------------------------------- bench.py kernel


def random_inputs(T, group, n_slot, B=1):
    """[q, k, v, depth_k, depth_v] of Table 2 in bf16 on the GPU, leaves that require a gradient."""
    kv = (B, N_KV_HEAD, T, HEAD_DIM)
    shapes = [(B, N_KV_HEAD * group, T, HEAD_DIM), kv, kv, (n_slot, *kv), (n_slot, *kv)]
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]


def largest_error(q, k, v, depth_k, depth_v, do, o, lse, grads):
    """Largest relative error of an output and its gradients, against the equation in float64. Sampled: of o, lse, dq
    and the slots' gradients six tokens, as each belongs to one; of dk and dv two keys."""
    dq, dk, dv, ddepth_k, ddepth_v = grads
    T, group, scale, errors = q.shape[2], q.shape[1] // k.shape[1], HEAD_DIM**-0.5, []
    for t in [*torch.randint(T, (4,)).tolist(), 0, T - 1]:
        row = q[:, :, t : t + 1], depth_k[..., t : t + 1, :], depth_v[..., t : t + 1, :]
        row = [x.double().requires_grad_() for x in row]
        past = [x[:, :, : t + 1].double() for x in (k, v)]
        o_ref, lse_ref = moda_attention_reference(row[0], *past, *row[1:], return_lse=True)
        grad_refs = torch.autograd.grad(o_ref, row, do[:, :, t : t + 1].double())
        errors += [relative_error(o[:, :, t : t + 1], o_ref.detach()), relative_error(lse[:, :, t : t + 1], lse_ref)]
        ours = dq[:, :, t : t + 1], ddepth_k[..., t : t + 1, :], ddepth_v[..., t : t + 1, :]
        errors += [relative_error(x, ref) for x, ref in zip(ours, grad_refs, strict=True)]
    heads = slice(0, group)  # those of kv head 0
    for j in torch.randint(T // 2, (2,)).tolist():
        q_, do_, o_, lse_ = (x[0, heads, j:].double() for x in (q, do, o, lse))
        p = (scale * q_ @ k[0, 0, j].double() - lse_).exp()  # (group, T - j)
        dz = p * (do_ @ v[0, 0, j].double() - (do_ * o_).sum(-1)) * scale
        errors += [relative_error(dk[0, 0, j], torch.einsum("gt,gtd->d", dz, q_))]
        errors += [relative_error(dv[0, 0, j], torch.einsum("gt,gtd->d", p, do_))]
    return max(errors)


def kernel_setting(T, group, n_slot, reps):
    """All variants in one setting of Table 2, forward and backward -> {name: [ms] * reps}, largest relative error."""
    q, k, v, depth_k, depth_v = everything = random_inputs(T, group, n_slot)
    do = torch.randn_like(q)

    def without_depth(backend):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    forwards = {
        "flash": lambda: without_depth(SDPBackend.FLASH_ATTENTION),
        "cudnn": lambda: without_depth(SDPBackend.CUDNN_ATTENTION),
        "triton": lambda: moda_attention(*everything, impl="triton"),
        "fused": lambda: moda_attention(*everything, impl="fused"),
    }
    if depth_k.numel() <= 1 << 29:  # the portable path works in float32
        forwards["torch"] = lambda: moda_attention(*everything, impl="torch")

    # correct first
    o, lse = moda_attention(*everything, impl="triton", return_lse=True)
    grads = torch.autograd.grad(o, everything, do)
    error = largest_error(*(x.detach() for x in everything), do, o.detach(), lse, grads)
    o_fused, lse_fused = moda_attention(*everything, impl="fused", return_lse=True)
    error = max(error, relative_error(o_fused, o.double()), relative_error(lse_fused, lse.double()))
    if not error <= 5e-3:
        raise SystemExit(f"T={T} group={group} n_slot={n_slot}: relative error {error:.1e}, not timed")
    del o_fused, lse_fused, grads

    times = interleave({f"{name} forward": fn for name, fn in forwards.items()}, reps)
    for name in ("flash", "cudnn", "triton", "torch"):  # one graph at a time: the gradients of the slots are large
        if name in forwards:
            forwards[name] = (forwards[name](), everything if name in ("triton", "torch") else everything[:3])
    graphs = {name: graph for name, graph in forwards.items() if name != "fused"}

    def backward(out, inputs):
        return lambda: torch.autograd.grad(out, inputs, do, retain_graph=True)

    times |= interleave({f"{name} backward": backward(*graph) for name, graph in graphs.items()}, reps)

    o, lse = o.detach(), lse.detach()
    dq = torch.zeros_like(q)
    scale = HEAD_DIM**-0.5
    depth = [x.detach() for x in (depth_k, depth_v)]
    times |= interleave(
        {  # starting from any o and lse: the arithmetic is the same
            "depth forward": lambda: kernel._forward_triton(q.detach(), k, v, *depth, True, scale, (o, lse)),
            "depth backward": lambda: kernel._depth_backward_triton(do, q.detach(), *depth, o, lse, scale, dq),
        },
        reps,
    )
    return times, error


def depth_bytes(T, group, n_slot):
    """Fewest bytes the depth half can move, forward and backward: each tensor it needs once, each it makes once."""
    q, slots = 2 * T * N_KV_HEAD * group * HEAD_DIM, 2 * T * N_KV_HEAD * n_slot * HEAD_DIM  # bytes in bf16
    lse = 4 * T * N_KV_HEAD * group
    return 2 * slots + 3 * q + 2 * lse, 4 * slots + 5 * q + lse  # q, o, o'; q, o, do, dq, dq'


def bench_kernel(args):
    result = {"machine": this_gpu(), "copy_TBps": 0.0, "matmul_TFLOPs": 0.0, "settings": [], "ladder": {}}
    result["copy_TBps"], result["matmul_TFLOPs"] = ceilings()
    print(result["machine"])
    print(f"copy {result['copy_TBps']:.2f} TB/s, bf16 matmul {result['matmul_TFLOPs']:.0f} TFLOP/s")
    print("ms, bf16, B=1, 8 KV heads, head_dim 64, forward / backward; flash and cuDNN: PyTorch's SDPA without depth")
    head = "T,G,slots,flash,cuDNN,MoDA triton,fused,torch,depth half,of copy bandwidth,flash / MoDA,extra / floor,error"
    lines = [head.split(",")]
    for T, group, n_slot in PAPER_TABLE_2:
        times, error = kernel_setting(T, group, n_slot, args.reps if T <= 16384 else max(5, args.reps // 2))
        torch.cuda.empty_cache()
        m = {name: median(ms) for name, ms in times.items()}
        total = {name: [f + b for f, b in zip(times[f"{name} forward"], times[f"{name} backward"], strict=True)]
                 for name in ("flash", "cudnn", "triton")}  # fmt: skip
        best = min(("flash", "cudnn"), key=lambda name: median(total[name]))
        extra = median([a - b for a, b in zip(total["triton"], total[best], strict=True)])
        n_bytes = depth_bytes(T, group, n_slot)
        floor = sum(n_bytes) / result["copy_TBps"] * 1e-9  # ms
        share = [n / (m[f"depth {way}"] * 1e9 * result["copy_TBps"])
                 for n, way in zip(n_bytes, ("forward", "backward"), strict=True)]  # fmt: skip
        speed = median([a / b for a, b in zip(total["flash"], total["triton"], strict=True)])

        def both(name, m=m):
            return f"{m[f'{name} forward']:.2f} / {m[f'{name} backward']:.2f}" if f"{name} forward" in m else "-"

        lines.append([str(T), str(group), str(n_slot), both("flash"), both("cudnn"), both("triton"),
                     f"{m['fused forward']:.2f}", both("torch"), both("depth"), f"{share[0]:.0%} / {share[1]:.0%}",
                     f"{speed:.2f}", f"{extra / floor:.2f} ({best})", f"{error:.1e}"])  # fmt: skip
        print(*lines[-1], sep=" | ", flush=True)
        result["settings"].append({"T": T, "group": group, "n_slot": n_slot, "error": error, "floor_ms": floor,
                                   "extra_ms": extra, "flash_over_moda": speed, "depth_share_of_copy": share,
                                   "ms": times})  # fmt: skip
    print()
    print_table(lines)
    result["ladder"] = ladder(args.reps)
    redraw(write_result("kernel", result))


def bench_short(args):
    result = {"machine": this_gpu(), "settings": []}
    print(f"{result['machine']}\nms of the forward, bf16, {N_KV_HEAD} KV heads, head_dim {HEAD_DIM}; fused / triton")
    lines = [["B", "T", "G", *(f"{n_slot} slots" for n_slot in SHORT["n_slot"])]]
    for B, T, group in itertools.product(SHORT["B"], SHORT["T"], SHORT["group"]):
        lines.append([str(B), str(T), str(group)])
        for n_slot in SHORT["n_slot"]:
            inputs = [x.detach() for x in random_inputs(T, group, n_slot, B)]
            forwards = {impl: partial(moda_attention, *inputs, impl=impl) for impl in ("fused", "triton")}
            outputs = [forward() for forward in forwards.values()]
            if not (error := relative_error(outputs[0], outputs[1].double())) <= 5e-3:
                raise SystemExit(f"B={B} T={T} group={group} n_slot={n_slot}: they differ by {error:.1e}, not timed")
            times = interleave(forwards, args.reps)
            ratio = median([a / b for a, b in zip(times["fused"], times["triton"], strict=True)])
            lines[-1].append(f"{median(times['fused']):.3f} / {median(times['triton']):.3f} = {ratio:.2f}")
            result["settings"].append({"B": B, "T": T, "group": group, "n_slot": n_slot, "ms": times})
        print(*lines[-1], sep=" | ", flush=True)
        write_result("short", result)
    print()
    print_table(lines)


def naive(q, k, v, depth_k, depth_v):
    """The equation as a loop over positions: gather a token's keys from sequence and depth, one softmax, next token."""
    out = []
    for t in range(q.shape[2]):
        past = slice(t + 1)
        keys = torch.cat([k[:, :, past], depth_k[:, :, :, t].permute(1, 2, 0, 3)], 2)  # (B, n_kv_head, n_key, head_dim)
        values = torch.cat([v[:, :, past], depth_v[:, :, :, t].permute(1, 2, 0, 3)], 2)
        z = q[:, :, t].unflatten(1, (k.shape[1], -1)) @ keys.mT * HEAD_DIM**-0.5  # (B, n_kv_head, group, n_key)
        out.append((z.softmax(-1) @ values).flatten(1, 2))
    return torch.stack(out, dim=2)


def flat(q, k, v, depth_k, depth_v, mask):
    """The rung "flash-compatible": the depth of all tokens as T * n_slot more columns of one fused attention, of which
    a mask leaves each query its own n_slot."""
    keys, values = (
        torch.cat([x, slots.permute(1, 2, 3, 0, 4).flatten(2, 3)], 2).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        for x, slots in ((k, depth_k), (v, depth_v))
    )  # (B, n_head, T * (1 + n_slot), head_dim), the slots of a token side by side
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def tiled(q, k, v, depth_k, depth_v, do, rows):
    """Forward and backward by our kernels with `rows` rows a program: Algorithm 1, then the depth backward."""
    scale = HEAD_DIM**-0.5
    o, lse = kernel._forward_triton(q, k, v, depth_k, depth_v, True, scale, rows=rows)
    dq, dk, dv = sequence_backward(do, q, k, v, o, lse, True, scale)
    return o, dq, dk, dv, *kernel._depth_backward_triton(do, q, depth_k, depth_v, o, lse, scale, dq, rows=rows)


def continued(q, k, v, depth_k, depth_v, do):
    """Forward and backward as `moda_attention` does them, the operators alone."""
    args = (True, HEAD_DIM**-0.5, "triton")
    o, lse = kernel._attention(q, k, v, [depth_k], [depth_v], *args)
    return o, *kernel._attention_backward(do, q, k, v, [depth_k], [depth_v], o, lse, *args)


def ladder(reps):
    """The paper's Table 7: the same numbers, computed less and less wastefully -> {rung: [ms] * reps}."""
    T, group, n_slot = LADDER.values()
    inputs = random_inputs(T, group, n_slot)
    do, values = torch.randn_like(inputs[0]), [x.detach() for x in inputs]
    per_head = [values[0], *(x.repeat_interleave(group, dim=-3) for x in values[1:])]  # every head with KV of its own
    own = torch.eye(T, dtype=torch.bool, device="cuda").repeat_interleave(n_slot, dim=1)  # (T, T * n_slot)
    mask = torch.cat([torch.ones(T, T, dtype=torch.bool, device="cuda").tril(), own], 1)

    def train(fn, *args):
        out = fn(*inputs, *args)
        return out, *torch.autograd.grad(out, inputs, do)

    rungs = {
        "naive": lambda: train(naive),
        "flash-compatible": lambda: train(flat, mask),
        "chunk-aware": lambda: tiled(*per_head, do, rows=64),  # 64 tokens of one head scan the columns of 64 tokens
        "group-aware": lambda: tiled(*values, do, rows=64),  # 8 tokens of 8 heads scan the columns of 8
        "continued": lambda: continued(*values, do),  # 2 tokens of 8 heads, after PyTorch's fused attention
    }
    o_ref = moda_attention_reference(*(x.double() for x in values))
    errors = {name: relative_error(fn()[0].detach(), o_ref) for name, fn in rungs.items()}
    if not max(errors.values()) <= 1e-2:  # bf16 logits in the naive loop
        raise SystemExit(f"wrong result in the ladder, not timed: {errors}")
    times = interleave({"naive": rungs.pop("naive")}, 3) | interleave(rungs, reps)
    print(f"\nthe ladder of Table 7: forward + backward, T={T}, G={group}, {n_slot} slots")
    lines = [["", "ms", "paper, A100", "error of o"]]
    for name, ms in times.items():
        lines.append([name, f"{median(ms):.3f}", f"{PAPER_TABLE_7.get(name, '-')}", f"{errors[name]:.1e}"])
    print_table(lines)
    return times


# --------------------------------------------------------------------------------------------------- bench.py train

WHOLE = "plain, one graph"  # is that a better yardstick? In one shape only: 48 layers take minutes to compile so
# as the results spell it: as common.ROWS does
MODELS = {"plain": "plain", WHOLE: "plain", "row 3": "row3", "row 4": "row4", "row 4, window 16": "window16"}


def kernel_times(step):
    """GPU milliseconds of one step by kind -> {"depth forward", "depth dq", "depth dk, dv", "rest"}."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kinds = {
        "_forward_kernel": "depth forward",
        "_backward_kernel": "depth dq",
        "_slots_backward_kernel": "depth dk, dv",
    }
    times = dict.fromkeys((*kinds.values(), "rest"), 0.0)
    for event in profile.key_averages():
        times[kinds.get(event.key, "rest")] += event.self_device_time_total / 1000
    return times


def step_error(model, step, idx, targets):
    """Against the portable path of the same model: the loss, less its loss; the relative error of all gradients
    together. Both in bf16; and of the parameter that is worst in that, its error over that of the portable path plus
    1e-3, both measured by the portable path in float32."""
    portable = FastMoDA(model.config, impl="torch", checkpoint=True).cuda()
    portable.load_state_dict(model.state_dict())
    portable(idx, targets)[1].backward()
    exact = [p.grad.double() for p in portable.parameters()]
    loss, want = step(idx, targets).item(), train_step(portable)(idx, targets).item()
    grads, wanted = ([p.grad for p in m.parameters()] for m in (model, portable))
    errors = ([relative_error(g, x) for g, x in zip(gs, exact, strict=True)] for gs in (grads, wanted))
    worst = max(got / (usual + 1e-3) for got, usual in zip(*errors, strict=True))
    grads, wanted = (torch.cat([g.flatten() for g in gs]) for gs in (grads, wanted))
    return loss - want, relative_error(grads, wanted.double()), worst


def bench_train(args):
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # and do not time what was not compiled
    copy_TBps, matmul_TFLOPs = ceilings()
    print(f"{this_gpu()}\ncopy {copy_TBps:.2f} TB/s, bf16 matmul {matmul_TFLOPs:.0f} TFLOP/s")
    print("steps are compiled and replayed as CUDA graphs; ms by the wall clock, the split by the profiler")
    head = "shape,model,ms,tokens/s,of plain,extra ms,floor ms,extra / floor / scheme,depth fwd,dq,dk dv,rest,FFN KV"
    lines, path = [(head + ",GB,of plain,MFU,compile s,error").split(",")], result_path("train")
    shapes = json.loads(path.read_text())["shapes"] if path.exists() else {}  # those that this call does not measure
    models = MODELS | {row: row for row in args.row or ()}
    for name in args.shape or SHAPES:
        row_4, B = SHAPES[name]
        T = row_4.block_size
        idx, targets = torch.randint(row_4.vocab_size, (2, B, T), device="cuda")
        steps, info = {}, {}
        for row, name_of_row in models.items():
            if row == WHOLE and name != next(iter(SHAPES)):
                continue
            torch.manual_seed(0)
            model = FastMoDA(row_config(name_of_row, row_4)).cuda()
            if row == WHOLE:
                model.compile()
            else:
                model.compile_layers()
            step = train_step(model)
            began = time.perf_counter()
            step(idx, targets)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            off, error, worst = step_error(model, step, idx, targets)
            if not (abs(off) < 1e-2 and error < 2 * info.get("plain", {"error": 2e-2})["error"] and worst < 1.5):
                got = f"loss off by {off:.1e}, gradients by {error:.1e}, a parameter's by {worst:.2f} of what is usual"
                raise SystemExit(f"{name} {row}: {got}, not timed")
            for p in model.parameters():
                p.grad = None
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(idx, targets)
            weights = sum(p.nbytes for p in model.parameters())
            peak = (torch.cuda.max_memory_allocated() - before + weights) / 1e9
            split = kernel_times(partial(step, idx, targets))
            for p in model.parameters():
                p.grad = None
            info[row] = {"peak_GB": peak, "compile_s": seconds, "kernels_ms": split, "error": error, "worst": worst}
            steps[row] = step
            checked = f"compiled and checked in {time.perf_counter() - began:.0f} s, worst gradient {worst:.2f}"
            print(f"{name} {row}: {checked}", flush=True)
        replay_plain = partial(record(steps["plain"], idx, targets), idx, targets)
        info["plain"] |= {"ms": [], "beside_ms": []}
        for row, step in steps.items():
            if row != "plain":  # one after the other, each in turn with the plain model: together they fill the memory
                replay = partial(record(step, idx, targets), idx, targets)
                times = interleave_steps({"plain": replay_plain, row: replay}, args.reps)
                info[row] |= {"ms": times[row], "beside_ms": times["plain"]}
                info["plain"]["ms"] += times["plain"]
                info["plain"]["beside_ms"] += times["plain"]
                del replay  # and its memory
        plain_rate = 3 * B * flops(plain(row_4), T) / median(info["plain"]["ms"])
        for row, measured in info.items():
            config, ms, beside = row_config(models[row], row_4), measured["ms"], measured["beside_ms"]
            floors = train_floor(config, B, plain_rate, copy_TBps * 1e9)
            floor, scheme = sum(floors[:2]), sum(floors)
            extra = median([a - b for a, b in zip(ms, beside, strict=True)])
            mfu = 3 * B * flops(config, T) / median(ms) / 1e9 / matmul_TFLOPs
            measured |= {"floor_ms": floor, "extra_ms": extra, "mfu": mfu}
            peak, split = measured["peak_GB"], [f"{part:.1f}" for part in measured["kernels_ms"].values()]
            # what is no depth kernel and not there without the FFN's slots: their projection, norm, rotation, writing
            ffn_kv = measured["kernels_ms"]["rest"] - info["row 3"]["kernels_ms"]["rest"] if config.ffn_kv else 0.0
            lines.append([name, row, f"{median(ms):.1f}", f"{B * T / median(ms) * 1000:,.0f}",
                         f"{median(beside) / median(ms):.3f}", f"{extra:.1f}", f"{floor:.1f}",
                         f"{extra / floor:.2f} / {extra / scheme:.2f}" if floor else "-",
                         *split, f"{ffn_kv:.1f}", f"{peak:.1f}",
                         f"{peak / info['plain']['peak_GB']:.2f}", f"{mfu:.0%}", f"{measured['compile_s']:.0f}",
                         f"{measured['error']:.0e}"])  # fmt: skip
            print(*lines[-1], sep=" | ", flush=True)
        shapes[name] = {"machine": this_gpu(), "copy_TBps": copy_TBps, "matmul_TFLOPs": matmul_TFLOPs, "rows": info}
        shapes = {name: shapes[name] for name in SHAPES if name in shapes}
        redraw(write_result("train", {"shapes": shapes}))
        del steps, step, model, replay_plain
        torch.cuda.empty_cache()
    print()
    print_table(lines)


def interleave_steps(steps, reps):
    """Milliseconds of whole steps {name: function} by the wall clock, in turn and in random order: {name: [ms] * reps}.
    Waiting for Python counts here: it is part of training."""
    times = {name: [] for name in steps}
    for _ in range(reps):
        for name in random.sample(list(steps), len(steps)):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(2):
                steps[name]()
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - began) * 500)
    return times


# ------------------------------------------------------------------------------------------- bench.py generate, scale

EAGER = 32  # tokens of decoding that is not recorded: each takes ten times as long


def bench_generate(args):
    result = {"machine": this_gpu(), "settings": []}
    print(f"{result['machine']}\ncached greedy decoding in bf16; tokens/s: of {args.tokens} tokens after the eighth")
    print(f"not recorded: with the cache of moda.py, {EAGER} tokens")
    lines = [["shape", "batch", "prompt", "model", "first, ms", "eight, ms", "tokens/s", "of plain", "GB"]]
    settings = [(name, B, prompt) for name in ("24l-512", "paper-48l") for B in (1, 32) for prompt in (64, 500)]
    for name, B, n_prompt in settings:
        variants, counts, peak = {}, {}, {}
        for row in ("plain", "row 4"):
            torch.manual_seed(0)
            config = replace(row_config(MODELS[row], SHAPES[name][0]), block_size=1024)
            model = FastMoDA(config).cuda()
            prompt = torch.randint(config.vocab_size, (B, n_prompt), device="cuda")
            short = model.generate(prompt[:, :8], 8, temperature=0)
            if not torch.equal(short, model.generate(prompt[:, :8], 8, temperature=0, use_cache=False)):
                raise SystemExit(f"{name} {row}: cached decoding differs from decoding without a cache, not timed")
            model.bfloat16()
            counts[row] = args.tokens
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() - sum(p.nbytes for p in model.parameters())
            model.generate(prompt, 16, temperature=0)
            peak[row] = (torch.cuda.max_memory_allocated() - before) / 1e9
            models = {row: model}
            if n_prompt == 64:
                models[f"{row}, not recorded"] = by_hand = FastMoDA(config).cuda().bfloat16()
                by_hand.new_cache, counts[f"{row}, not recorded"] = partial(KVCache, config), EAGER
            for variant, of in models.items():
                for n in (1, 8, 8 + counts[variant]):
                    variants[variant, n] = partial(of.generate, prompt, n, temperature=0)
        times = interleave_steps(variants, args.reps)
        speeds = {row: [B * n / (b - a) * 1000 for a, b in zip(times[row, 8], times[row, 8 + n], strict=True)]
                  for row, n in counts.items()}  # fmt: skip
        for row, speed in speeds.items():
            ratio = median([a / b for a, b in zip(speed, speeds["plain"], strict=True)])
            line = [name, str(B), str(n_prompt), row, f"{median(times[row, 1]):.1f}", f"{median(times[row, 8]):.0f}"]
            lines.append([*line, f"{median(speed):,.0f}", f"{ratio:.2f}", f"{peak[row]:.2f}" if row in peak else ""])
            print(*lines[-1], sep=" | ", flush=True)
        ms = {row: {n: times[row, n] for name, n in times if name == row} for row in counts}
        result["settings"].append({"shape": name, "B": B, "prompt": n_prompt, "ms": ms, "peak_GB": peak})
        write_result("generate", result)  # whatever is cut, this is kept
    print()
    print_table(lines)


SCALE = MoDAConfig(2048, 4096, n_layer=24, n_head=8, n_kv_head=2, n_embd=512)
SWEEPS = {
    "n_layer": [({"n_layer": n}, 8) for n in (8, 16, 32, 64, 96)],
    "T": [({"block_size": T}, 32_768 // T) for T in (512, 2048, 8192, 32_768)],
    "depth_window": [({"n_layer": 48, "depth_window": n}, 8) for n in (4, 16, 64, None)],
}


def scale_model(config, B, reps):
    """-> milliseconds of forward alone (prefill) and of a training step, peak memory in GB, parameters."""
    torch.manual_seed(0)
    model = FastMoDA(config).cuda()
    idx, targets = torch.randint(config.vocab_size, (2, B, config.block_size), device="cuda")
    step = train_step(model)

    @torch.no_grad()
    def prefill(idx):
        with torch.autocast("cuda", torch.bfloat16):
            return model(idx)[0]

    step(idx, targets)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step(idx, targets)
    peak = torch.cuda.max_memory_allocated() / 1e9
    for p in model.parameters():
        p.grad = None
    runs = {
        "prefill": partial(record(prefill, idx), idx),
        "train": partial(record(step, idx, targets), idx, targets),
    }
    return interleave_steps(runs, reps) | {"GB": peak, "parameters": model.num_params()}


def bench_scale(args):
    result = {"machine": this_gpu(), "copy_TBps": ceilings()[0], "sweeps": {}}
    print(f"{result['machine']}\ncopy {result['copy_TBps']:.2f} TB/s; {SCALE}\nms of prefill (forward alone) and of a "
          "training step, bf16, not compiled, as CUDA graphs; GB of slots: what all readers read, once")  # fmt: skip
    head = "sweep,value,B,T,slots read,GB of slots,prefill plain,extra,extra / GB,training plain,extra,extra / GB"
    lines = [(head + ",memory plain,extra,parameters plain,extra").split(",")]
    for sweep, settings in SWEEPS.items():
        result["sweeps"][sweep] = []
        for changes, B in settings:
            row_4 = replace(SCALE, **changes)
            base = scale_model(plain(row_4), B, args.reps)
            torch.cuda.empty_cache()
            moda = scale_model(row_4, B, args.reps)
            torch.cuda.empty_cache()
            n_read = sum(len(row_4.slot_names(layer)) for layer in range(row_4.n_layer))
            slots_GB = 4e-9 * n_read * B * row_4.block_size * row_4.n_kv_head * row_4.head_dim  # K and V, bf16
            value = [*changes.values()][-1]
            line = [sweep, str(value), str(B), str(row_4.block_size), str(n_read), f"{slots_GB:.2f}"]
            for kind in ("prefill", "train"):
                ms, extra = median(base[kind]), median(moda[kind]) - median(base[kind])
                line += [f"{ms:.1f}", f"{extra:.1f}", f"{extra / slots_GB:.2f}"]
            line += [f"{base['GB']:.2f}", f"{moda['GB'] - base['GB']:.2f}"]
            lines.append([*line, f"{base['parameters']:,}", f"{moda['parameters'] - base['parameters']:,}"])
            print(*lines[-1], sep=" | ", flush=True)
            point = {"value": value, "B": B, "slots_read": n_read, "slots_GB": slots_GB}
            result["sweeps"][sweep].append(point | {"plain": base, "row 4": moda})
        path = write_result("scale", result)
    print()
    print_table(lines)
    redraw(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("kernel", help="the operator, in the settings of the paper's Tables 2 and 7")
    command.add_argument("--reps", type=int, default=20, help="repetitions of each timing (default: %(default)s)")
    command.set_defaults(run=bench_kernel)
    command = commands.add_parser("short", help="the two forwards of the kernels, one launch against two")
    command.add_argument("--reps", type=int, default=20, help="repetitions of each timing (default: %(default)s)")
    command.set_defaults(run=bench_short)
    command = commands.add_parser("train", help="whole training steps with and without depth")
    command.add_argument("--reps", type=int, default=8, help="repetitions of each timing (default: %(default)s)")
    command.add_argument("--shape", action="append", choices=SHAPES, help="only this one; may be repeated")
    command.add_argument("--row", action="append", choices=ROWS, help="time this row too; may be repeated")
    command.set_defaults(run=bench_train)
    command = commands.add_parser("generate", help="cached decoding with and without depth")
    command.add_argument("--reps", type=int, default=5, help="repetitions of each timing (default: %(default)s)")
    command.add_argument("--tokens", type=int, default=400, help="new tokens per sequence (default: %(default)s)")
    command.set_defaults(run=bench_generate)
    command = commands.add_parser("scale", help="time and memory over n_layer, T and the window of slots")
    command.add_argument("--reps", type=int, default=5, help="repetitions of each timing (default: %(default)s)")
    command.set_defaults(run=bench_scale)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.py measures a CUDA GPU, and there is none here")
    args.run(args)


if __name__ == "__main__":
    main()
