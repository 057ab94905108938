"""MoDA, fast on a GPU: the model of moda.py, with the same weights and the same numbers, moving fewer bytes.

Nobody needs this file to understand MoDA. A layer must read all slots below it, so a forward pass reads about
n_layer ** 2 of them, and that traffic decides the speed. With 48 layers of 384, 32,768 tokens a step and bf16 a slot is
16.8 MB (K and V), and the layers read 2,256 of them: 38 GB. What `FastMoDA` does otherwise than `MoDA`:

1. Slots lie in one buffer and are read in place. moda.py stacks them anew for every layer: three times the bytes, in
   the forward and again in the backward.
2. The gradient of a slot is a sum over the layers that read it: one kernel goes along depth (slots.py, as are 1's
   buffers). Autograd adds it up reader by reader, through memory.
3. Projections of the same input are one matrix product. What lies between two attentions can be compiled
   (`compile_layers`). A whole step can be recorded as CUDA graphs (`record`): kernels do not wait for Python.
4. While generating, the pass of one token is recorded (`DecodingCache`).
"""

import functools
import gc

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim._muon import _adjust_lr as adjust_lr
from torch.utils.checkpoint import checkpoint

import kernel
from moda import Attention, Block, DepthStream, KVCache, KVProjection, MoDA, SwiGLU
from slots import Attend, SlotBuffers, Write, place

# ----------------------------------------------------------------------------------------------------- the model


class FastMoDA(MoDA):
    """`MoDA`, with the depth stream of the Triton kernels where they can run, and moda.py's elsewhere.

    checkpoint: keep only each layer's input and its slots for the backward, and compute the rest of it again there.
    """

    def __init__(self, config, impl=None, checkpoint=False):
        super().__init__(config, impl)
        self.checkpoint, self.compiled = checkpoint, False

    def compile_layers(self):
        """From now on, train with what lies between two attentions compiled by torch.compile: one graph, which all
        layers share. The fastest way to train on a GPU, after half a minute. Whatever is not training runs as before,
        and so does a model with `checkpoint`, with hooks in a layer or with exchanged parts. Returns self."""
        limits = torch._dynamo.config  # all models share the graphs; beyond this many variants a layer runs eagerly
        limits.recompile_limit = max(limits.recompile_limit, 64)
        self.compiled = True
        return self

    def new_cache(self, B):
        """On a GPU one that decodes by a recorded pass, unless layers are not as made, which a record would miss."""
        fast = self.cos.is_cuda and self.impl in (None, "triton") and self._is_unchanged()
        return DecodingCache(self, B) if fast else super().new_cache(B)

    def layers(self, x, rope, stream=None, cache=None):
        if isinstance(cache, DecodingCache) and cache.length and x.shape[1] == 1:
            return cache.next_token(x)
        if stream is not None or torch.compiler.is_compiling():
            return super().layers(x, rope, stream, cache)
        Stream = FastDepthStream if self._can_be_fast(x) else PortableStream
        stream = Stream(self.config, self.impl, self.checkpoint)
        trains = torch.is_grad_enabled() and cache is None
        if trains and self.checkpoint:
            for block in self.blocks:  # nothing is random here, and a CUDA graph cannot record the generator's state
                x = checkpoint(block, x, rope, stream, use_reentrant=False, preserve_rng_state=False)
        elif trains and self._is_unchanged():
            x = self._layers_in_parts(x, rope, stream)
        else:
            x = super().layers(x, rope, stream, cache)
        stream.finish()
        return x

    def _layers_in_parts(self, x, rope, stream):
        """The same, cut at the attentions instead of the layers, so that a graph reaches from one to the next."""
        compiled = _compiled if self._is_compiled() else lambda function: function
        q, k, v, slot = compiled(before_attention)(self.blocks[0], x, rope)
        for block, following in zip(self.blocks, [*self.blocks[1:], None], strict=True):
            o = stream.attend(block.attn, q, k, v)
            stream.write(block.attn, "attn", slot)
            x, ffn_slot, projected = compiled(between_attentions)(block, following, x, o, rope)
            stream.write(block.attn, "ffn", ffn_slot)
            q, k, v, slot = projected or [None] * 4
        return x

    def _is_unchanged(self):
        """Whether the layers are as made: hooks, adapters and other forwards in them would be missed in parts."""
        usual = (nn.ModuleList, Block, Attention, KVProjection, SwiGLU, nn.Linear, nn.RMSNorm, nn.Identity)
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "forward")
        return all(type(m) in usual and not any(vars(m).get(name) for name in hooks) for m in self.blocks.modules())

    def _is_compiled(self):
        # forward mode: a compiled graph would drop the tangents. In torch.compile(model) all is one graph anyway
        return self.compiled and not kernel._transformed() and not torch.compiler.is_compiling()

    def head(self, x, targets=None):
        return (_compiled(MoDA.head) if targets is not None and self._is_compiled() else MoDA.head)(self, x, targets)

    def _can_be_fast(self, x):
        """Whether the Triton kernels can run on x (B, T, n_embd), and autograd will see what they do."""
        c, device = self.config, x.device.type
        cast = device in kernel.AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if cast else x.dtype
        q = x.new_empty(x.shape[0], c.n_head, 0, c.head_dim, dtype=dtype)
        wanted = self.impl == "triton" or (self.impl is None and x.is_cuda)
        able = c.depth_kv and c.n_layer > 1 and c.head_dim % 8 == 0 and kernel._why_not_triton(q) is None
        return wanted and able and not kernel._transformed()


# A layer, cut in two at its attention, with one matrix product for all projections of the same input.


def joined(x, *layers):
    """[layer(x) for layer in layers] for linear layers, as one matrix product: x and its gradient pass by once. The
    weights stay parameters of their own, as Muon orthogonalises each."""
    weight, biases = torch.cat([layer.weight for layer in layers]), [layer.bias for layer in layers]
    bias = None if biases[0] is None else torch.cat(biases)
    return F.linear(x, weight, bias).split([layer.out_features for layer in layers], dim=-1)


def before_attention(block, x, rope):
    attn = block.attn
    own = (attn.attn_kv.wk, attn.attn_kv.wv) if attn.attn_kv else ()
    h = block.attn_norm(x) if block.pre else x
    q, k, v, *own = joined(h, attn.wq, attn.kv.wk, attn.kv.wv, *own)
    return attn.heads(q, (k, v), own, rope)


def between_attentions(block, following, x, o, rope):
    """-> x after the layer, the FFN's slot, and what the following layer's attention reads; None if there is none."""
    attn, ffn = block.attn, block.ffn
    h = attn.wo(o.transpose(1, 2).flatten(2))
    x = x + h if block.pre else block.attn_norm(x + h)
    h = block.ffn_norm(x) if block.pre else x
    if attn.ffn_kv:
        gate, up, *slot = joined(h, ffn.gate, ffn.up, attn.ffn_kv.wk, attn.ffn_kv.wv)
        h = ffn.down(F.silu(gate) * up)
    else:
        h, slot = ffn(h), None  # gate and up are faster apart, if nothing else reads h
    x = x + h if block.pre else block.ffn_norm(x + h)
    slot = attn.kv_heads(*slot, rope, attn.config.depth_rope) if slot else None
    return x, slot, before_attention(following, x, rope) if following is not None else None


_compiled = functools.cache(torch.compile)  # of functions, not of bound methods: a copied model has its own weights


class PortableStream(DepthStream):
    """moda.py's stream, for layers that may be checkpointed."""

    def __init__(self, config, impl=None, checkpoint=False):
        super().__init__(impl)
        self.checkpoint, self.finished = checkpoint, False

    def finish(self):
        """The forward is over. Layers that run from now on are checkpointed ones, computed again."""
        self.finished = True

    def write(self, layer, kind, kv):
        if not (self.finished and self.checkpoint):  # or the slot is there already
            super().write(layer, kind, kv)


class FastDepthStream(PortableStream):
    """The stream of the Triton kernels: slots lie in one buffer and are read in place.

    In the backward, a layer computes its dq and leaves with `buffers` what its slots' gradients need: (q, do, lse,
    delta). When the backward reaches the sublayer that wrote a slot, all its readers have been there, and its gradient
    is summed. Autograd keeps that order because of `chain`, an empty tensor that each operation takes and passes on.
    """

    def __init__(self, config, impl=None, checkpoint=False):
        super().__init__(config, impl, checkpoint)
        self.buffers = SlotBuffers(config)
        self.chain = torch.empty(0)

    def finish(self):
        super().finish()
        self.chain = torch.empty(0)  # whoever keeps the stream must not keep the graph

    def write(self, layer, kind, kv):
        if kv is None or (self.finished and self.checkpoint):
            return
        DepthStream.write(self, layer, kind, ())  # notes that it is written; what is written lies in the buffers
        number = layer.first_slot + layer.config.slot_kinds.index(kind)
        if torch.is_grad_enabled():
            self.chain = Write.apply(*kv, self.chain, self.buffers, number)
        else:
            self.buffers.write(number, *kv)

    def attend(self, layer, q, k, v):
        if self.finished and not self.checkpoint:  # the gradients of its slots would be lost
            raise RuntimeError("a layer ran after the forward. Checkpointing? FastMoDA(config, checkpoint=True)")
        if not torch.is_grad_enabled():
            return self.buffers.attend(layer, q, k, v)[0]
        o, chain = Attend.apply(q, k, v, self.chain, self.buffers, layer)
        if not self.finished:  # or it would keep what a checkpointed layer has just computed again
            self.chain = chain
        return o


# --------------------------------------------------------------------------------------------------------- decoding


class DecodingCache(KVCache):
    """For generating on a GPU: from the fourth new token on, `TokenPass` is recorded and no kernel waits for Python.
    `MoDA.hidden` runs the prompt as with any KVCache. No gradients pass through it."""

    def __init__(self, model, B):
        super().__init__(model.config, B)
        self.model, self.n_token = model, 0

    @torch.no_grad()
    def append(self, layer, k, v):
        if self.k is None:
            self.run = TokenPass(self.model, self.shape, k)
            self.k, self.v = (x[..., self.run.n_slot :, :] for x in (self.run.keys, self.run.values))
        return super().append(layer, k, v)

    @torch.no_grad()
    def next_token(self, x):
        """x (B, 1, n_embd), a token at position `length` -> the same shape, through all layers."""
        position, self.n_token = torch.full((1,), self.length, device=x.device), self.n_token + 1
        with torch.cuda.device_of(x):  # records belong to a GPU; a tensor elsewhere changes nothing
            if self.n_token == 4 and x.is_cuda:  # by then PyTorch has prepared whatever it prepares at first use
                kept = torch.is_autocast_cache_enabled()
                torch.set_autocast_cache_enabled(False)  # weights that autocast has cast do not live as long
                try:
                    self.run = record(self.run, x, position, warmup=0)
                finally:
                    torch.set_autocast_cache_enabled(kept)
            return self.run(x, position)


class TokenPass:
    """All layers for one new token, with tensors of one size and address, and so fit to be recorded.

    A layer's keys lie in one buffer, [slots | sequence], and so do its values: n_slot more rows than a KVCache has.
    Attention is then PyTorch's, over the whole buffer, whatever the position, with a mask on slots that the layer does
    not read and on positions to come. Where Triton can run, one kernel normalises, rotates and stores; elsewhere this
    is moda.py's stream.
    """

    def __init__(self, model, shape, like):
        """shape: of KVCache. like: a key, for its dtype and device."""
        n_layer, B, n_kv_head, block_size, head_dim = shape
        self.model, self.n_slot = model, (n_layer - 1) * len(model.config.slot_kinds)
        n_key = -(-(self.n_slot + block_size) // 16) * 16  # so that each layer's part of the mask starts aligned
        self.keys, self.values = like.new_zeros(2, n_layer, B, n_kv_head, n_key, head_dim)
        self.position_of = torch.arange(n_key, device=like.device) - self.n_slot  # of each key; below 0: a slot
        hidden = self.position_of.repeat(n_layer, 1) < 0  # (n_layer, n_key)
        for layer in range(n_layer):
            hidden[layer, model.config.slots_read(layer)] = False
        self.mask = torch.zeros_like(hidden, dtype=like.dtype).masked_fill(hidden, float("-inf"))
        self.has_kernel = kernel._why_not_triton(like) is None

    def __call__(self, x, position):
        """x (B, 1, n_embd), position (1,) -> the same shape."""
        self.position = position
        self.seen = self.mask.masked_fill(self.position_of > position, float("-inf"))
        if self.has_kernel:
            self.rope = self.model.cos, self.model.sin
            for block in self.model.blocks:
                x = self.through(block, x)
            return x
        rope = [table.index_select(0, position) for table in (self.model.cos, self.model.sin)]
        return MoDA.layers(self.model, x, rope, self)

    def write(self, attn, kind, kv):
        if kv is not None:
            number = attn.first_slot + attn.config.slot_kinds.index(kind)
            for buffer, new in zip((self.keys, self.values), kv, strict=True):
                buffer[attn.layer + 1 :, :, :, number] = new[:, :, 0]

    def attend(self, attn, q, k, v):
        self.keys[attn.layer].index_copy_(2, self.position + self.n_slot, k)
        self.values[attn.layer].index_copy_(2, self.position + self.n_slot, v)
        return self.look(attn, q)

    def look(self, attn, q):
        keys, values = self.keys[attn.layer], self.values[attn.layer]  # (B, n_kv_head, n_key, head_dim)
        group = q.reshape(*keys.shape[:2], -1, q.shape[-1])  # (B, n_kv_head, group, head_dim): as if it were positions
        mask = self.seen[attn.layer].expand(*group.shape[:3], -1)
        return F.scaled_dot_product_attention(group, keys, values, mask).reshape(q.shape)

    def through(self, block, x):
        """`Block.forward` for one token. What lies between a projection and attention is one kernel."""
        attn, ffn, c = block.attn, block.ffn, block.attn.config
        h = block.attn_norm(x) if block.pre else x
        q, kv = attn.wq(h), attn.kv(h)
        queries = q.new_empty(1, len(x), c.n_head, 1, c.head_dim)  # a buffer of one layer and one key
        place(q, None, attn.q_norm, self.rope, self.position, (queries, None), (0, 1), 0)
        shared = attn.writes and attn.attn_kv is None and c.depth_rope
        self.store(attn, kv, "attn" if shared else None, own=attn.layer)
        if attn.writes and not shared:
            self.store(attn, attn.attn_kv(h) if attn.attn_kv else kv, "attn", c.depth_rope)
        h = attn.wo(self.look(attn, queries[0]).flatten(1).unsqueeze(1))
        x = x + h if block.pre else block.attn_norm(x + h)
        h = block.ffn_norm(x) if block.pre else x
        if attn.ffn_kv:
            self.store(attn, attn.ffn_kv(h), "ffn", c.depth_rope)
        return x + ffn(h) if block.pre else block.ffn_norm(x + ffn(h))

    def store(self, attn, kv, kind, rotated=True, own=None):
        """Store a key and a value as the slot `kind` of all later layers, and as the sequence's of the layer `own`."""
        number = attn.first_slot + attn.config.slot_kinds.index(kind) if kind else 0
        layers = (attn.layer + 1, len(self.keys)) if kind else (0, 0)
        rope = self.rope if rotated else None
        place(*kv, attn.k_norm, rope, self.position, (self.keys, self.values), layers, number, own, self.n_slot)


# --------------------------------------------------------------------------------------- CUDA graphs, and an optimizer


_side_stream = functools.cache(torch.cuda.Stream)  # one a GPU: cuBLAS keeps a workspace for every stream


def record(step, *inputs, warmup=3):
    """Record the kernels of step(*inputs), on the current GPU, as a CUDA graph -> a function that replays it.

    Replaying skips Python, which makes steps of many short kernels several times faster. The step may use only its
    inputs and tensors that keep their address. What it makes (its result, and gradients that it lets begin as None) is
    overwritten by the next replay. The function raises ValueError for inputs of another shape or dtype.
    warmup: how often to run the step first, for whatever is compiled, planned or loaded at first use.
    """
    inputs = [x.clone() for x in inputs]
    side = _side_stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph, was_enabled = torch.cuda.CUDAGraph(), gc.isenabled()
    gc.disable()  # an old graph that was collected in the middle would break this one
    try:
        with torch.cuda.graph(graph, stream=side):  # its default is a stream of the GPU that recorded first
            result = step(*inputs)
    finally:
        if was_enabled:
            gc.enable()

    def replay(*new):
        for x, y in zip(inputs, new, strict=True):
            if x.shape != y.shape or x.dtype != y.dtype:  # copy_ would broadcast and cast
                raise ValueError(f"recorded with {x.dtype} {tuple(x.shape)}, got {y.dtype} {tuple(y.shape)}")
            x.copy_(y)
        graph.replay()
        return result

    replay.step = step  # the graph reads its weights by address: they have to live as long
    return replay


def record_training(differentiate, optimizers, *inputs):
    """The two halves of a training step, recorded -> differentiate(*inputs), update(lr).

    differentiate: a function of the inputs that leaves gradients in p.grad. optimizers: AdamW or `Muon`, all at one
    learning rate, with a state already (a resumed run) or none yet. `update` steps them all, and is recorded in its
    first call, when they have one.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:  # a graph reads its learning rate by address
        group |= {"lr": torch.tensor(float(group["lr"]), device=inputs[0].device), "capturable": False}
    differentiate, recorded = record(differentiate, *inputs), []

    def step():
        for optimizer in optimizers:
            optimizer.step()

    def update(lr):
        for group in groups:
            group["lr"].fill_(lr)
        if recorded:
            return recorded[0]()
        step()
        for group in groups:
            group["capturable"] = True  # AdamW wants to be told
        recorded.append(record(step, warmup=0))

    return differentiate, update


class Muon(torch.optim.Muon):
    """PyTorch's Muon for one group of matrices, with all of a shape in one step: thousands of small matrix products
    become a hundred large ones. The rate may be a tensor on the GPU, so that a record need not be made anew for it."""

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        lr, momentum, of_shape = group["lr"], group["momentum"], {}
        for p in group["params"]:
            if p.grad is not None:
                of_shape.setdefault(p.shape, []).append(p)
        for shape, params in of_shape.items():
            grads = torch.stack([p.grad for p in params])  # (number of matrices, rows, columns)
            for p in params:
                self.state[p] = self.state[p] or {"momentum_buffer": torch.zeros_like(p)}
            averages = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(averages, list(grads), 1 - momentum)
            average = torch.stack(averages)
            updates = self.orthogonal(grads.lerp(average, momentum) if group["nesterov"] else average, group)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_sub_(params, list(updates * (lr * adjust_lr(1.0, group["adjust_lr_fn"], shape))))

    @staticmethod
    def orthogonal(x, group):
        """x (n, rows, columns) with all singular values moved towards 1, by Newton-Schulz iterations in bfloat16."""
        a, b, c = group["ns_coefficients"]
        tall = x.shape[1] > x.shape[2]
        x = x.mT.bfloat16() if tall else x.bfloat16()
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
        for _ in range(group["ns_steps"]):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return (x.mT if tall else x).float()
