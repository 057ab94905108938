# ruff: noqa: E501 - a mutant is a line
"""Break the code on purpose, one line at a time, and see the tests go red: `python tests/mutate.py`.

A mutant that no test notices is a test that is missing, unless it changes nothing: EQUIVALENT says why. It takes an hour
or more; `python tests/mutate.py 3 17` runs those two, and `--check` only looks whether every line is still there, as
test_mutants.py does. Those of GPU run only where there is one.
"""

import ast
import collections
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = {  # what notices a mutant, the likeliest first
    "kernel.py": ["test_kernel.py", "test_moda.py", "test_fast.py"],
    "sdpa.py": ["test_sdpa.py", "test_kernel.py", "test_moda.py"],
    "moda.py": ["test_moda.py", "test_fast.py"],
    "fast.py": ["test_fast.py", "test_kernel.py"],
    "slots.py": ["test_fast.py", "test_slots.py", "test_kernel.py"],
    "experiments/common.py": ["test_moda.py"],
}
MUTANTS = [  # file, and a function of it; code that is there once, however it is broken into lines; what it becomes
    # slots as a list
    ("kernel.py:_stacked", "torch.stack(pieces, dim=3)", "torch.stack(pieces[::-1], dim=3)"),
    ("kernel.py:_stacked", ".permute(3, 0, 1, 2, 4)", ".permute(3, 1, 0, 2, 4)"),
    ("kernel.py:_backward", "list(grad.unbind())", "list(grad.unbind())[::-1]"),
    ("kernel.py:_backward", "depth[:n], depth[n:]", "depth[n:], depth[:n]"),
    ("kernel.py:_backward", "or [[], []]", "or []"),
    ("kernel.py:_setup_context", "*depth_k, *depth_v, *output", "*depth_v, *depth_k, *output"),
    ("kernel.py:_autocast", "return [_autocast(y) for y in x]", "return x"),
    ("kernel.py:_check", "len(depth_k) != len(depth_v)", "False"),
    ("kernel.py:_check", "if isinstance(slots, list) else", "if False else"),
    ("kernel.py:_readable", "x.stride(-1) == 1 and not", "not"),
    ("sdpa.py:laid_out", "x.stride() == torch.empty_like(like, device='meta').stride()", "True"),
    ("kernel.py:_why_not_triton", "or max(q.shape[:2]) > 65_535", ""),
    ("kernel.py:_why_not_triton", "q.dtype.itemsize > 4", "q.dtype.itemsize > 8"),
    ("kernel.py:moda_attention", "or not has_fused(q) or", "or"),
    ("sdpa.py:has_fused", "(torch.float64, torch.float32, torch.bfloat16, torch.float16)", "(torch.float32, torch.bfloat16, torch.float16)"),
    ("sdpa.py:has_fused", "(torch.float64, torch.float32, torch.bfloat16, torch.float16)", "(torch.float64, torch.float32, torch.float16)"),
    ("sdpa.py:has_fused", 'q.device.type != "cuda" or', ""),
    # what the model remembers, and its rotary table
    ("moda.py:plain", ', "attn_kv": False', ""),
    ("moda.py:plain", ', "attn_slot": True', ""),
    ("moda.py:plain", ", depth_window=None", ""),
    ("moda.py:plain", ", depth_first=0", ""),
    ("moda.py:plain", ", depth_every=1", ""),
    ("moda.py:DepthStream.write", "if number in self.slots:", "if False:"),
    ("moda.py:DepthStream.write", "+ layer.config.slot_kinds.index(kind)", ""),
    ("moda.py:DepthStream.read", "[v for _, v in pairs]", "[k for k, _ in pairs]"),
    ("moda.py:RecordingStream.attend", "self.read(layer)[0]", "self.read(layer)[1]"),
    ("moda.py:rotary_table", "torch.promote_types(like.dtype, torch.float32)", "like.dtype"),
    ("moda.py:rotary_table", "torch.promote_types(like.dtype, torch.float32)", "torch.float32"),
    ("moda.py:rotary_table", ".double()", ".float()"),
    ("moda.py:MoDA._apply", "if self.cos is not before:", "if False:"),
    ("moda.py:MoDA._loaded", "rotary_table(self.config, self.embed.weight)", "rotary_table(self.config, self.cos)"),
    ("moda.py:Attention.heads", "self.q_norm(q.to(self.wq.weight.dtype))", "self.q_norm(q)"),
    ("moda.py:Attention.heads", "if not self.writes:", "if False:"),
    ("moda.py:Block.forward", "attn.ffn_kv(h)", "attn.ffn_kv(x)"),
    ("moda.py:MoDA.generate", "cache.length = 0", "pass"),
    ("moda.py:MoDA.generate", "idx[:, -n_new:] == stop", "idx == stop"),
    ("moda.py:RecordingStream.attend", "[0][:, self.heads]", "[0]"),
    # decoding with slots and sequence in one buffer
    ("fast.py:TokenPass.__init__", "model.config.slots_read(layer)] = False", "model.config.slots_read(n_layer - 1)] = False"),
    ("fast.py:TokenPass.__call__", "self.position_of > position", "self.position_of >= position"),
    ("fast.py:TokenPass.attend", "index_copy_(2, self.position + self.n_slot, k)", "index_copy_(2, self.position, k)"),
    ("fast.py:TokenPass.write", "attn.layer + 1", "attn.layer + 2"),
    ("fast.py:FastMoDA.layers", "and cache is None", ""),
    ("fast.py:TokenPass.through", "and attn.attn_kv is None", ""),
    ("fast.py:TokenPass.through", "and c.depth_rope", ""),
    ("fast.py:TokenPass.through", '"attn" if shared else None', '"attn"'),
    ("fast.py:TokenPass.through", "attn.attn_kv(h) if attn.attn_kv else kv", "kv"),
    ("fast.py:TokenPass.through", 'attn.ffn_kv(h), "ffn"', 'attn.ffn_kv(x), "ffn"'),
    ("fast.py:TokenPass.through", "block.attn_norm(x + h)", "block.ffn_norm(x + h)"),
    ("fast.py:TokenPass.store", "attn.layer + 1", "attn.layer + 2"),
    ("fast.py:TokenPass.store", "self.rope if rotated else None", "self.rope"),
    ("slots.py:_place_kernel", "x1 * c - x2 * s", "x1 * c + x2 * s"),
    ("slots.py:_place_kernel", "(tl.sum(x1 * x1) + tl.sum(x2 * x2))", "tl.sum(x1 * x1)"),
    ("slots.py:_place_kernel", "tl.where(is_own, n_slot + t, number)", "tl.where(is_own, n_slot, number)"),
    ("slots.py:_place_kernel", "tl.store(to_v + HEAD_DIM // 2 + at, v2", "tl.store(to_v + HEAD_DIM // 2 + at, v1"),
    ("fast.py:DecodingCache.append", "self.run.n_slot :, :]", "self.run.n_slot + 1 :, :]"),
    # Muon, a shape at a time
    ("fast.py:Muon.step", "1 - momentum", "momentum"),
    ("fast.py:Muon.step", "1 - lr * group['weight_decay']", "1 - group['weight_decay']"),
    ("fast.py:Muon.orthogonal", "beta=b, alpha=c", "beta=c, alpha=b"),
    ("fast.py:Muon.orthogonal", "x.shape[1] > x.shape[2]", "x.shape[1] < x.shape[2]"),
    # the fast model: joined products, layers in parts
    ("fast.py:joined", "[layer.weight for layer in layers]", "[layer.weight for layer in layers[::-1]]"),
    ("fast.py:joined", "None if biases[0] is None else torch.cat(biases)", "None"),
    ("fast.py:joined", "[layer.bias for layer in layers]", "[layer.bias for layer in layers[::-1]]"),
    ("fast.py:before_attention", "block.attn_norm(x) if block.pre else x", "x"),
    ("fast.py:before_attention", "attn.heads(q, (k, v), own, rope)", "attn.heads(q, (k, v), (), rope)"),
    ("fast.py:between_attentions", "block.attn_norm(x + h)", "block.ffn_norm(x + h)"),
    ("fast.py:between_attentions", "block.ffn_norm(x + h)", "block.attn_norm(x + h)"),
    ("fast.py:between_attentions", "h = block.ffn_norm(x) if block.pre else x", "h = x"),
    ("fast.py:between_attentions", "joined(h, ffn.gate, ffn.up,", "joined(h, ffn.up, ffn.gate,"),
    ("fast.py:between_attentions", "joined(h, ffn.gate, ffn.up,", "joined(x, ffn.gate, ffn.up,"),
    ("fast.py:between_attentions", "attn.config.depth_rope", "True"),
    ("fast.py:between_attentions", "before_attention(following, x, rope)", "before_attention(block, x, rope)"),
    ("fast.py:FastMoDA._is_unchanged", "type(m) in usual and", ""),
    ("fast.py:FastMoDA._is_unchanged", '"_forward_hooks",', ""),
    ("fast.py:FastMoDA._is_unchanged", '"_forward_pre_hooks",', ""),
    ("fast.py:FastMoDA._is_unchanged", '"_backward_hooks",', ""),
    ("fast.py:FastMoDA._is_unchanged", '"_backward_pre_hooks",', ""),
    ("fast.py:FastMoDA._is_unchanged", ', "forward")', ")"),
    ("fast.py:FastMoDA._is_compiled", "and not kernel._transformed()", ""),
    ("fast.py:FastMoDA._is_compiled", "and not torch.compiler.is_compiling()", ""),
    ("fast.py:FastMoDA.layers", "stream is not None or torch.compiler.is_compiling()", "torch.compiler.is_compiling()"),
    ("fast.py:FastMoDA.layers", "stream is not None or torch.compiler.is_compiling()", "stream is not None"),
    ("fast.py:FastMoDA.layers", "if trains and self.checkpoint:", "if False:"),
    ("fast.py:FastMoDA._can_be_fast", "torch.get_autocast_dtype(device) if cast else x.dtype", "x.dtype"),
    ("fast.py:FastMoDA._can_be_fast", "c.head_dim % 8 == 0 and", ""),
    ("fast.py:FastMoDA._can_be_fast", "and not kernel._transformed()", ""),
    ("fast.py:record", "x.shape != y.shape or x.dtype != y.dtype", "False"),
    ("fast.py:record", "replay.step = step", "pass"),
    # the fast depth stream
    ("fast.py:PortableStream.finish", "self.finished = True", "pass"),
    ("fast.py:PortableStream.write", "if not (self.finished and self.checkpoint):", "if True:"),
    ("fast.py:FastDepthStream.finish", "super().finish()", "pass"),
    ("fast.py:FastDepthStream.finish", "self.chain = torch.empty(0)", "pass"),
    ("fast.py:FastDepthStream.write", "kv is None or (self.finished and self.checkpoint)", "kv is None"),
    ("fast.py:FastDepthStream.write", "DepthStream.write(self, layer, kind, ())", "pass"),
    ("fast.py:FastDepthStream.write", "self.chain = Write.apply", "Write.apply"),
    ("fast.py:FastDepthStream.attend", "if self.finished and not self.checkpoint:", "if False:"),
    ("fast.py:FastDepthStream.attend", "if not self.finished:", "if True:"),
    ("fast.py:FastDepthStream.attend", "self.chain = chain", "pass"),
    ("slots.py:SlotBuffers.end_backward", "ctx.saved_tensors", "raise RuntimeError"),
    ("slots.py:SlotBuffers.end_backward", "if self.is_whole:", "if True:"),
    ("slots.py:SlotBuffers.end_backward", "self.k = self.v = None", "pass"),
    ("slots.py:SlotBuffers.end_backward", "self.begin_backward()", "pass"),
    ("slots.py:SlotBuffers.write", "self.k[slot], self.v[slot] = k, v", "self.k[slot], self.v[slot] = k, k"),
    ("slots.py:SlotBuffers.add_reader", "layer.reads[-len(depth_k)]", "layer.reads[0]"),
    ("slots.py:SlotBuffers.add_reader", "in self.read(layer)", "in self.read(layer)[-1:]"),
    ("slots.py:SlotBuffers.add_reader", "q, do, lse, delta, start)  self.readers", "q, do, lse, delta, start + 1)\n        self.readers"),
    ("slots.py:SlotBuffers.attend", "in self.read(layer)", "in self.read(layer)[:1]"),
    ("slots.py:SlotBuffers.read", "if b > a + 1", "if b > a + 99"),
    ("slots.py:SlotBuffers.gradients", "if not self.readers:", "if False:"),
    ("slots.py:SlotBuffers.gradients", "max(0, slot - (slot - self.n_slot) % self.per_reader), slot + 1", "slot, slot + 1"),
    ("slots.py:SlotBuffers.gradients", "(slot - self.n_slot) % self.per_reader", "slot % self.per_reader"),
    ("slots.py:SlotBuffers.gradients", "start < last for", "True for"),
    ("slots.py:SlotBuffers.gradients", "last - self.block * self.per_reader", "last - self.block"),
    ("slots.py:SlotBuffers.gradients", "self.sum_readers(0, self.sums_start", "self.sum_readers(1, self.sums_start"),
    ("slots.py:SlotBuffers.gradients", "self.k.dtype, self.sums)", "self.k.dtype, None)"),
    ("slots.py:SlotBuffers.sum_readers", "dtype, sums, self.sums_start)", "dtype, sums, first)"),
    ("slots.py:check_backward", "if torch.is_grad_enabled():", "if False:"),
    ("slots.py:check_backward", "if buffers.graph_task != torch._C._current_graph_task_id():", "if False:"),
    ("slots.py:Write.forward", "buffers.lowest is None and any(ctx.needs_input_grad)", "buffers.lowest is None"),
    ("slots.py:Attend.backward", "buffers.begin_backward(ctx.layer.first_slot)", "pass"),
    ("slots.py:Attend.backward", "laid_out(q, buffers.readers[0][0] if buffers.readers else q)", "q"),
    ("slots.py:Attend.backward", "o = laid_out(o, q)", "o = o"),
    ("slots.py:Attend.backward", "torch.zeros_like(q) if do is None else laid_out(do, q)", "torch.zeros_like(q) if do is None else do"),
    ("slots.py:_slots_backward_kernel", "(slot[None, :] >= first_read[:, None])", "(slot[None, :] > first_read[:, None])"),
    ("slots.py:_slots_backward_kernel", "(slot[None, :] < n_first)", "(slot[None, :] < 0)"),
    ("slots.py:_slots_backward_kernel", "(row < N_READER * BLOCK_T * GROUP) & (number < n_reader)", "(number < n_reader)"),
    ("slots.py:_slots_backward_kernel", "number = chunk + row // (BLOCK_T * GROUP)", "number = row // (BLOCK_T * GROUP)"),
    ("slots.py:_slots_backward_kernel", "(slot - sums_start) * sum_stride[0]", "(slot - first) * sum_stride[0]"),
    ("slots.py:slots_backward", "x[first - sums_start : last - sums_start].to(dtype)", "x[: last - first].to(dtype)"),
    ("slots.py:slots_backward", "readers[unread:], addresses[unread:]", "readers[unread:], addresses"),
    ("slots.py:slots_backward", "start >= last and first >= n_first", "start >= last"),
    # the model
    ("moda.py:MoDAConfig.slots_read", "stop = layer * len(self.slot_kinds)", "stop = max(0, layer - 1) * len(self.slot_kinds)"),
    ("moda.py:MoDAConfig.slots_read", "stop - self.depth_window)", "stop - self.depth_window - 1)"),
    ("moda.py:MoDAConfig.slots_read", "min(self.depth_first, start)", "self.depth_first"),
    ("moda.py:MoDAConfig.slots_read", "(self.n_layer - 1 - layer) % self.depth_every", "layer % self.depth_every"),
    ("moda.py:MoDAConfig.is_read", "range(layer + 1, self.n_layer)", "range(layer + 1, min(layer + 2, self.n_layer))"),
    ("moda.py:Attention.kv_heads", "k = self.k_norm(k.to(self.wq.weight.dtype))", "k = k.to(self.wq.weight.dtype)"),
    ("moda.py:Attention.kv_heads", "rotate(k, *rope) if rotated else k", "rotate(k, *rope)"),
    ("moda.py:Attention.heads", "not own_kv and self.config.depth_rope", "not own_kv"),
    ("moda.py:Attention.heads", "*(own_kv or kv)", "*kv"),
    ("moda.py:Block.forward", "self.attn_norm(x + h)", "self.ffn_norm(x + h)"),
    ("moda.py:Block.forward", "attn(self.attn_norm(x) if self.pre else x, rope)", "attn(x, rope)"),
    ("moda.py:rotate", "[a * cos - b * sin, a * sin + b * cos]", "[a * cos + b * sin, a * sin - b * cos]"),
    ("moda.py:KVCache.append", "stop = self.length + k.shape[2]", "stop = self.length + 1"),
    ("moda.py:MoDA.hidden", "cache.length = stop", "cache.length = stop - 1"),
    ("moda.py:MoDA.hidden", "(self.cos[start:stop], self.sin[start:stop])", "(self.cos[: stop - start], self.sin[: stop - start])"),
    ("moda.py:MoDA.head", "ignore_index=-1", "ignore_index=0"),
    ("moda.py:MoDA.__init__", "math.sqrt(2 * config.n_layer)", "math.sqrt(config.n_layer)"),
    ("moda.py:MoDA.generate", "logits[logits < logits.topk", "logits[logits <= logits.topk"),
    ("experiments/common.py:flops", "n_extra * 2 * c.n_embd * kv_dim", "n_extra * c.n_embd * kv_dim"),
    # the equation and the portable path
    ("kernel.py:moda_attention_weights", ".tril(T_kv - T_q)", ".tril(T_kv - T_q - 1)"),
    ("kernel.py:moda_attention_weights", '"bkgtd,sbktd->bkgts", q, depth_k.to(dtype)) * scale', '"bkgtd,sbktd->bkgts", q, depth_k.to(dtype))'),
    ("kernel.py:moda_attention_weights", "q.to(dtype).unflatten(1, (n_kv_head, n_head // n_kv_head))", "q.to(dtype).unflatten(1, (n_head // n_kv_head, n_kv_head)).transpose(1, 2)"),
    ("kernel.py:_depth_forward_torch", "p_seq * _by_token(o, n_kv_head)", "_by_token(o, n_kv_head)"),
    ("kernel.py:_depth_backward_torch", "p * (do_ @ v_.mT - delta) * scale", "p * (do_ @ v_.mT) * scale"),
    ("kernel.py:moda_attention", "if scale <= 0:", "if scale < -1e9:"),
    ("kernel.py:moda_attention", "or _transformed():", ":"),
    ("kernel.py:_check", "if causal and T_q > T_kv:", "if causal and T_q > T_kv + 1:"),
    ("sdpa.py:_key_blocks", "[(0, T_kv - T_q, False), square]", "[square]"),
    ("sdpa.py:_key_blocks", "if not causal or T_q == 1:", "if not causal:"),
    ("sdpa.py:sequence_forward", "state[0] * w_old + o * w_new", "state[0] * w_new + o * w_old"),
    ("sdpa.py:sequence_backward", "sum(dq[1:], dq[0])", "dq[0]"),
    # Algorithm 1
    ("kernel.py:_softmax_step", "tl.exp2(m - m_new)", "tl.exp2(m_new - m_new)"),
    ("kernel.py:_forward_kernel", "(t0 + (T_kv - T_q) + 1 if CAUSAL", "(t0 + (T_kv - T_q) + BLOCK_N if CAUSAL"),
    ("kernel.py:_forward_kernel", "tl.minimum(t0 + (T_kv - T_q) + BLOCK_T, T_kv)", "tl.minimum(t0 + BLOCK_T, T_kv)"),
    ("kernel.py:_forward_kernel", "(position[:, None] >= at[None, :])", "(position[:, None] > at[None, :])"),
    ("kernel.py:_forward_kernel", "(token[:, None] == source[None, :])", "(token[:, None] >= source[None, :])"),
    ("kernel.py:_forward_kernel", "m = tl.load(lse_row, mask=in_row, other=0.0) / LN2", "m = tl.load(lse_row, mask=in_row, other=0.0)"),
    ("kernel.py:_forward_kernel", "(m + tl.log2(acc)) * LN2", "m * LN2"),
    ("kernel.py:_forward_kernel", "(o_tile / acc[:, None])", "o_tile"),
    ("kernel.py:_forward_kernel", "range(0, n_slot * BLOCK_T, BLOCK_N)", "range(0, n_slot * BLOCK_T - 1, BLOCK_N)"),
    ("kernel.py:_forward_kernel", "v_slots + slot * depth_v_stride[0]", "v_slots + slot * depth_k_stride[0]"),
    ("kernel.py:_depth_backward_torch", "dq += ", "dq -= "),
    # its backward
    ("kernel.py:_backward_kernel", "tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)", "tl.sum(do_tile.to(tl.float32), 1)"),
    ("kernel.py:_backward_kernel", "tl.load(dq_row[:, None] + dim[None, :], mask=in_tile, other=0.0).to(tl.float32)", "tl.zeros([BLOCK_M, D], tl.float32)"),
    ("kernel.py:_backward_kernel", "tl.dot(tl.trans(dz), q_tile,", "tl.dot(tl.trans(dz), do_tile,"),
    ("kernel.py:_backward_kernel", "tl.store(dv_col[:, None] + dim[None, :], dv_tile", "tl.store(dv_col[:, None] + dim[None, :], dk_tile"),
    ("kernel.py:_is_short", "n_slot <= 8 or B * T", "n_slot <= 8 or T"),
    ("kernel.py:_is_short", "n_slot > 0 and (", "("),
    ("kernel.py:_backward_kernel", "tl.store(delta + (b * n_head + head) * T_q + token, delta_tile, mask=in_row)", "pass"),
]  # fmt: skip
EQUIVALENT = {  # place, what it becomes: why no test can see it
    ("kernel.py:moda_attention", "or"): "a CPU has a fused attention for every dtype; it takes a GPU to notice",
    ("sdpa.py:_key_blocks", "if not causal:"): "one query with a prefix and a square of one key: the same numbers",
    ("slots.py:Attend.backward", "o = o"): "cuDNN alone wants it so: see sdpa.py; it takes a GPU to notice",
    ("slots.py:SlotBuffers.gradients", "slot, slot + 1"): "a stretch's slots one by one: slower, the same numbers",
    ("slots.py:SlotBuffers.gradients", "True for"): "sums of readers that no slot has: slower, the same numbers",
}
GPU = {"fast.py:record"}  # what takes a GPU to notice


def span(source, place, code):
    """Where `code` stands within the function that `place` ("file:function", "file:Class.method") names -> (start,
    stop) in source. Spaces, line breaks, kinds of quotes and commas before a bracket do not count, so that the code may
    be formatted anew. ValueError unless it stands there once."""
    nodes = [ast.parse(source)]
    for name in place.partition(":")[2].split("."):
        nodes = [child for node in nodes for child in node.body if getattr(child, "name", None) == name]
    if len(nodes) != 1:
        raise ValueError(f"there is no {place}, or more than one")
    lines = source.splitlines(keepends=True)
    start, stop = (sum(map(len, lines[:n])) for n in (nodes[0].lineno - 1, nodes[0].end_lineno))
    tokens = [r"""['"]""" if token in "'\"" else re.escape(token) for token in re.findall(r"\w+|[^\w\s]", code)]
    pattern = r"\s*".join(r",?\s*" + token if token in (r"\)", r"\]") else token for token in tokens)
    pattern = r"\b" * code[0].isalnum() + pattern + r"\b" * code[-1].isalnum()
    found = [match.span() for match in re.compile(pattern).finditer(source, start, stop)]
    if len(found) != 1:
        raise ValueError(f"{code!r} is in {place} {len(found)} times, not once")
    return found[0]


def mutated(place, code, becomes):
    """The source of the file with the mutant in it. ValueError if it cannot be made."""
    source = (ROOT / place.partition(":")[0]).read_text()
    start, stop = span(source, place, code)
    source = source[:start] + becomes + source[stop:]
    try:
        ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"{code!r} in {place} becomes no Python: {error}") from error
    return source


def pytest_collection_modifyitems(items):
    """This file is a plugin too: every test with its first parameters, file by file, then all with their second, and so
    on. Most mutants fail many tests, and so the first failure comes minutes earlier."""
    files, count = list(dict.fromkeys(item.path for item in items)), collections.Counter()

    def key(item):
        count[item.path, item.originalname] += 1
        return files.index(item.path), count[item.path, item.originalname]

    items.sort(key=key)


def run(place, code, becomes, gpu):
    """-> (whether the tests notice the mutant, the first that does)."""
    file = place.partition(":")[0]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "notebooks", "runs", "results"))
        (copy / file).write_text(mutated(place, code, becomes))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-p", "mutate"]
        command += [*(["-m", "gpu"] if gpu else []), *(f"tests/{test}" for test in TESTS[file])]
        env = os.environ | {"PYTHONPATH": "tests"}
        result = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=3600)
    failed = [line.split(" - ")[0] for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return result.returncode != 0, failed[0] if failed else "a crash"


def main(arguments):
    for mutant in MUTANTS:
        mutated(*mutant)
    if arguments == ["--check"]:
        return
    survivors = []
    for i in map(int, arguments or range(len(MUTANTS))):
        place, code, becomes = MUTANTS[i]
        began, gpu = time.time(), place in GPU
        if gpu and not shutil.which("nvidia-smi"):
            print(f"{i:3} not run           {place}: {becomes[:60]!r}  takes a GPU", flush=True)
            continue
        killed, by = run(place, code, becomes, gpu)
        reason = EQUIVALENT.get((place, becomes))
        survivors += [] if killed or reason else [i]
        verdict, by = ("killed", by) if killed else ("equivalent", reason) if reason else ("SURVIVED", "")
        print(f"{i:3} {verdict:10} {time.time() - began:4.0f} s  {place}: {becomes.strip()[:60]!r}  {by}", flush=True)
    raise SystemExit(f"survivors: {survivors}" if survivors else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
