# ruff: noqa: E501 - a mutant is a line
"""Break kernel.py and moda.py on purpose, one line at a time, and see the tests go red: `python tests/mutate.py`.

A mutant that no test notices is a test that is missing, unless it changes nothing: EQUIVALENT says why. It takes an hour
or more; `python tests/mutate.py 3 17` runs those two. What only a GPU can notice is not among them.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MUTANTS = [  # file, a line or a part of one that is there once, what it becomes
    # the equation and the portable path
    ("kernel.py", "device=q.device).tril(T_kv - T_q)", "device=q.device).tril(T_kv - T_q - 1)"),
    ("kernel.py", '"bkgtd,sbktd->bkgts", q, depth_k.to(dtype)) * scale', '"bkgtd,sbktd->bkgts", q, depth_k.to(dtype))'),
    ("kernel.py", "q.to(dtype).unflatten(1, (n_kv_head, n_head // n_kv_head))  # (B, n_kv_head, group, T_q, head_dim)",
     "q.to(dtype).unflatten(1, (n_head // n_kv_head, n_kv_head)).transpose(1, 2)"),
    ("kernel.py", "[(0, T_kv - T_q, False), square]", "[square]"),
    ("kernel.py", "state[0] * w_old + o * w_new", "state[0] * w_new + o * w_old"),
    ("kernel.py", "    if not causal or T_q == 1:", "    if not causal:"),
    ("kernel.py", "_by_token(o, n_kv_head) * (lse - joint).exp().unsqueeze(-1)", "_by_token(o, n_kv_head)"),
    ("kernel.py", "dz = p * (do_ @ v_.mT - delta) * scale", "dz = p * (do_ @ v_.mT) * scale"),
    ("kernel.py", "    if scale <= 0:", "    if scale < -1e9:"),
    ("kernel.py", "if causal and T_q > T_kv:", "if causal and T_q > T_kv + 1:"),
    # Algorithm 1
    ("kernel.py", "tl.exp2(m - m_new)", "tl.exp2(m_new - m_new)"),
    ("kernel.py", "n_full = (t0 + (T_kv - T_q) + 1) // BLOCK_N", "n_full = (t0 + (T_kv - T_q) + BLOCK_N) // BLOCK_N"),
    ("kernel.py", "n_seen = tl.minimum(t0 + (T_kv - T_q) + BLOCK_T, T_kv)", "n_seen = tl.minimum(t0 + BLOCK_T, T_kv)"),
    ("kernel.py", "(position[:, None] >= at[None, :])", "(position[:, None] > at[None, :])"),
    ("kernel.py", "        same_token = seen[None, :] & (token[:, None] == source[None, :])\n        m, acc",
     "        same_token = seen[None, :] & (token[:, None] >= source[None, :])\n        m, acc"),
    ("kernel.py", "        m = tl.load(lse_row, mask=in_row, other=0.0) / LN2", "        m = tl.load(lse_row, mask=in_row, other=0.0)"),
    ("kernel.py", "tl.store(lse_row, (m + tl.log2(acc)) * LN2", "tl.store(lse_row, m * LN2"),
    ("kernel.py", "tl.store(o_row[:, None] + dim[None, :], (o_tile / acc[:, None])", "tl.store(o_row[:, None] + dim[None, :], (o_tile)"),
    ("kernel.py", "    for start in range(0, n_slot * BLOCK_T, BLOCK_N):  # (3)", "    for start in range(0, n_slot * BLOCK_T - 1, BLOCK_N):  # (3)"),
    ("kernel.py", "k_col = k_slots + slot * depth_k_stride[0] + source * depth_k_stride[3]\n        v_col = v_slots + slot * depth_v_stride[0] + source * depth_v_stride[3]\n        k_tile = tl.load(k_col[None",
     "k_col = k_slots + slot * depth_k_stride[0] + source * depth_k_stride[3]\n        v_col = v_slots + slot * depth_k_stride[0] + source * depth_k_stride[3]\n        k_tile = tl.load(k_col[None"),
    # its backward
    ("kernel.py", "delta_tile = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)", "delta_tile = tl.sum(do_tile.to(tl.float32), 1)"),
    ("kernel.py", "dq_tile = tl.load(dq_row[:, None] + dim[None, :], mask=in_tile, other=0.0).to(tl.float32)",
     "dq_tile = tl.zeros([BLOCK_M, D], tl.float32)"),
    ("kernel.py", "dk_tile = tl.dot(tl.trans(dz), q_tile, input_precision", "dk_tile = tl.dot(tl.trans(dz), do_tile, input_precision"),
    ("kernel.py", "            tl.store(dv_col[:, None] + dim[None, :], dv_tile", "            tl.store(dv_col[:, None] + dim[None, :], dk_tile"),
    ("kernel.py", "    tl.store(delta + (b * n_head + head) * T_q + token, delta_tile, mask=in_row)", "    pass"),
    # the gradients of the slots, summed over readers
    ("kernel.py", "(slot[None, :] >= first_read[:, None])", "(slot[None, :] > first_read[:, None])"),
    ("kernel.py", "(row < N_READER * BLOCK_T * GROUP) & (number < n_reader)", "(number < n_reader)"),
    ("kernel.py", "number = chunk + row // (BLOCK_T * GROUP)", "number = row // (BLOCK_T * GROUP)"),
    ("kernel.py", "(slot - sum_first) * sum_stride[0]", "(slot - first) * sum_stride[0]"),
    ("kernel.py", "[x[first - sum_first : last - sum_first].to(dtype) for x in sums]", "[x[: last - first].to(dtype) for x in sums]"),
    ("kernel.py", "readers, table = readers[unread:], table[unread:]", "readers, table = readers[unread:], table"),
    # the model
    ("moda.py", "        stop = layer * len(self.kinds)\n", "        stop = max(0, layer - 1) * len(self.kinds)\n"),
    ("moda.py", "max(0, stop - self.depth_window)", "max(0, stop - self.depth_window - 1)"),
    ("moda.py", "return layer + 1 < self.n_layer and", "return layer < self.n_layer and"),
    ("moda.py", "    weight, biases = torch.cat([layer.weight for layer in layers])", "    weight, biases = torch.cat([layer.weight for layer in layers[::-1]])"),
    ("moda.py", "bias = None if biases[0] is None else torch.cat(biases)", "bias = None"),
    ("moda.py", "k = self.k_norm(k.to(rope[0].dtype))", "k = k.to(rope[0].dtype)"),
    ("moda.py", "return (rotate(k, *rope) if turn else k)", "return rotate(k, *rope)"),
    ("moda.py", "if own or not self.config.depth_rope:", "if own:"),
    ("moda.py", "self.heads(*kv[-2:], rope, self.config.depth_rope)", "self.heads(*kv[:2], rope, self.config.depth_rope)"),
    ("moda.py", "self.ffn_norm(x) if self.pre else x, self.attn.ffn_kv)", "self.ffn_norm(x) if self.pre else o, self.attn.ffn_kv)"),
    ("moda.py", "        x = x if self.pre else self.attn_norm(x)\n", "        x = x if self.pre else self.ffn_norm(x)\n"),
    ("moda.py", "stream.write(self.attn.reads[1] + 1, *slot)", "stream.write(self.attn.reads[1], *slot)"),
    ("moda.py", "return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)", "return torch.cat([a * cos + b * sin, a * sin - b * cos], dim=-1)"),
    ("moda.py", "        stop = self.length + k.shape[2]\n", "        stop = self.length + 1\n"),
    ("moda.py", "            cache.length = stop\n", "            cache.length = stop - 1\n"),
    ("moda.py", "rope, x = (self.cos[start:stop], self.sin[start:stop])", "rope, x = (self.cos[: stop - start], self.sin[: stop - start])"),
    ("moda.py", "ignore_index=-1)", "ignore_index=0)"),
    ("moda.py", "std=0.02 / math.sqrt(2 * config.n_layer) if out else 0.02", "std=0.02 / math.sqrt(config.n_layer) if out else 0.02"),
    ("moda.py", "logits.masked_fill(logits < kth", "logits.masked_fill(logits <= kth"),
    ("moda.py", "n_extra * 2 * c.n_embd * kv_dim", "n_extra * c.n_embd * kv_dim"),
    ("moda.py", "        elif stop in self.skipped or not all(self.with_grad[slot]", "        elif stop in self.skipped or False and not all(self.with_grad[slot]"),
    # the fast depth stream
    ("moda.py", "self.sum_readers(0, self.sum_first, last, torch.float32)", "self.sum_readers(1, self.sum_first, last, torch.float32)"),
    ("moda.py", "max(0, last - self.BLOCK * self.per_layer)", "max(0, last - self.BLOCK)"),
    ("moda.py", "self.k.dtype, self.sums, self.sum_first)", "self.k.dtype, None, self.sum_first)"),
    ("moda.py", "self.k.dtype, self.sums, self.sum_first)", "self.k.dtype, self.sums, first)"),
    ("moda.py", "            ctx.slots.begin_backward(ctx.stop)\n", ""),
    ("moda.py", "reader=self.table[len(self.readers)], first=start)", "reader=self.table[len(self.readers)], first=start + 1)"),
    ("moda.py", "            self.order = order\n", "            pass\n"),
    ("moda.py", "            self.order = _Write.apply(", "            _Write.apply("),
    ("moda.py", "first, last = slot - slot % self.per_layer, slot + 1", "first, last = slot, slot + 1"),
    ("moda.py", "        self.k[slot], self.v[slot] = k, v\n\n    def read", "        self.k[slot], self.v[slot] = k, k\n\n    def read"),
    ("moda.py", "stream.finished, stream.order = True, torch.empty(0)", "stream.finished = True"),
    ("moda.py", "stream.finished, stream.order = True, torch.empty(0)", "stream.order = torch.empty(0)"),
    ("moda.py", "        if not self.finished:  # or it would", "        if True:  # or it would"),
    ("moda.py", "        if slot in self.with_grad and not self.finished:", "        if False:"),
    ("moda.py", "            if self.whole:\n", "            if True:\n"),
    ("moda.py", "            self.k = self.v = None\n", "            pass\n"),
    ("moda.py", "            writer.saved_tensors  # noqa: B018\n", "            raise RuntimeError\n"),
    ("moda.py", "if slots.lowest is None and any(ctx.needs_input_grad):", "if slots.lowest is None:"),
    ("moda.py", "self.k = self.v = None\n        self.begin_backward()\n", "self.k = self.v = None\n"),
    ("moda.py", "q = kernel._laid_out(q, ctx.slots.readers[0][0] if ctx.slots.readers else q)", "pass"),
    ("moda.py", "    if torch.is_grad_enabled():\n        raise RuntimeError('the fast", "    if False:\n        raise RuntimeError('the fast"),
    ("moda.py", "(device) if cast else x.dtype)", "(device) if False else x.dtype)"),
    ("moda.py", "eager = not torch.compiler.is_compiling() and not kernel._forward_mode()", "eager = not torch.compiler.is_compiling()"),
    ("kernel.py", "not _has_fused(q) or _forward_mode():", "not _has_fused(q):"),
]  # fmt: skip
EQUIVALENT = {
    "    if not causal:": "a single query with a prefix and a square of one key: two calls, the same numbers",
    "first, last = slot, slot + 1": "a layer's slots one by one, not two at once: slower, the same numbers",
}


def main(chosen):
    survivors = []
    for i, (name, old, new) in enumerate(MUTANTS):
        if chosen and i not in chosen:
            continue
        source = (ROOT / name).read_text()
        if source.count(old) != 1:
            raise SystemExit(f"mutant {i}: {old!r} is in {name} {source.count(old)} times, not once")
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "copy")
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "notebooks", "runs", "results"))
            (copy / name).write_text(source.replace(old, new))
            began, order = time.time(), ["tests/test_kernel.py", "tests/test_moda.py"]
            files = order if name == "kernel.py" else order[::-1]
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
            result = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=1800)
        failed = [line.split(" - ")[0] for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        killed = result.returncode != 0
        verdict = "killed" if killed else "equivalent" if new in EQUIVALENT else "SURVIVED"
        survivors += [i] if verdict == "SURVIVED" else []
        by = EQUIVALENT.get(new, "") if not killed else failed[0] if failed else "a crash"
        print(f"{i:2} {verdict:10} {time.time() - began:4.0f} s  {name}: {new.strip()[:60]!r}  {by}", flush=True)
    raise SystemExit(f"survivors: {survivors}" if survivors else 0)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
