"""A language model with Mixture-of-Depths Attention (MoDA, arXiv 2603.15619), in one file.

A Transformer carries everything in one residual stream, and what a shallow layer wrote there is diluted by every later
addition. MoDA keeps a second, undiluted path. Each sublayer also leaves a key and a value per position, projected from
what it reads: a *slot*. Every later layer's queries look at the slots of their own position, under one softmax with the
sequence. One layer, in the order of `Block.forward`:

    project -> rotate -> attend over [sequence | depth] -> write attention's slot -> write the FFN's slot -> FFN

Shapes: B batch, T positions, n_slot slots that a layer reads. kernel.py is the attention, fast.py the model on a GPU.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import get_args

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernel import moda_attention, moda_attention_weights

# -------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class MoDAConfig:
    """Shape and variant of a model. Raises ValueError for combinations that cannot work. Rows of the paper's Table 3: 1
    and 2 are `plain(config)`, 3 is ffn_kv=False, 4 the default, 5 is attn_kv=True."""

    block_size: int  # longest sequence, in tokens
    vocab_size: int  # tokens that the model knows
    n_layer: int  # layers, of an attention and an FFN each
    n_head: int  # query heads; head_dim is n_embd // n_head
    n_kv_head: int  # grouped-query attention: n_head // n_kv_head query heads share one KV head
    n_embd: int  # width of the residual stream
    n_hidden: int | None = None  # width of the SwiGLU; None: 4 * n_embd
    norm: str = "post"  # "post": x = norm(x + f(x)), the paper's choice; "pre": x = x + f(norm(x))
    qk_norm: bool = True  # RMSNorm of every query and key head
    bias: bool = False  # of every linear layer
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    depth_kv: bool = True  # queries also read earlier layers' slots; attention's slot is its own sequence K and V
    ffn_kv: bool = True  # the FFN writes a slot too, projected from its input
    attn_kv: bool = False  # attention's slot has a K, V projection of its own
    attn_slot: bool = True  # attention writes a slot; False: the FFN alone does
    depth_rope: bool = True  # rotate depth keys like queries: the two cancel, and the depth logit is of content alone
    depth_window: int | None = None  # read only the most recent N slots (paper, section 6.2); None: all
    depth_first: int = 0  # beside the window, read the first N too
    depth_every: int = 1  # only every N-th layer, counted from the last, reads slots; all layers write

    def __post_init__(self):
        for field in fields(self):
            value, types = getattr(self, field.name), get_args(field.type) or (field.type,)
            if type(value) not in types and not (types == (float,) and type(value) is int):
                raise ValueError(f"{field.name} must be {' or '.join(t.__name__ for t in types)}, got {value!r}")
            if type(value) in (int, float) and not 0 < value < math.inf and field.name != "depth_first":
                raise ValueError(f"{field.name} must be above 0 and finite, got {value}")
        if self.n_embd % (2 * self.n_head) or self.n_head % self.n_kv_head:  # 2: rotations turn pairs of channels
            got = f"got {self.n_embd}, {self.n_head} and {self.n_kv_head}"
            raise ValueError(f"n_embd must be a multiple of 2 * n_head, and n_head of n_kv_head, {got}")
        if self.norm not in ("pre", "post"):
            raise ValueError(f'norm must be "pre" or "post", got {self.norm!r}')
        if self.depth_first < 0 or (self.depth_first and not self.depth_window):
            raise ValueError(f"depth_first must be at least 0, and needs depth_window, got {self.depth_first}")
        if not self.depth_kv and (self.ffn_kv or self.attn_kv or self.depth_window or self.depth_every > 1):
            raise ValueError("ffn_kv, attn_kv, depth_window and depth_every need depth_kv=True; plain(config) has none")
        if not self.attn_slot and (self.attn_kv or not self.ffn_kv):
            raise ValueError("attn_slot=False leaves the FFN's slots alone: it needs ffn_kv=True and attn_kv=False")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def hidden(self):
        return self.n_hidden or 4 * self.n_embd

    @property
    def slot_kinds(self):
        """The sublayers that write slots, in order. Slots are numbered as they are written: 0 is "attn 0", 1 "ffn 0",
        2 "attn 1", ...; slot_kinds[i] of layer l has the number l * len(slot_kinds) + i."""
        return ("attn",) * (self.depth_kv and self.attn_slot) + ("ffn",) * self.ffn_kv

    def slots_read(self, layer):
        """The numbers of the slots that layer `layer`, from 0, reads, oldest first."""
        if not 0 <= layer < self.n_layer:
            raise ValueError(f"layer must be from 0 to {self.n_layer - 1}, got {layer}")
        stop = layer * len(self.slot_kinds)
        start = 0 if self.depth_window is None else max(0, stop - self.depth_window)
        slots = [*range(min(self.depth_first, start)), *range(start, stop)]
        return [] if (self.n_layer - 1 - layer) % self.depth_every else slots

    def slot_names(self, layer):
        """Their names: ["attn 0", "ffn 0", "attn 1", ...]."""
        n = len(self.slot_kinds)
        return [f"{self.slot_kinds[slot % n]} {slot // n}" for slot in self.slots_read(layer)]

    def is_read(self, kind, layer):
        """Whether any layer reads the slot of `kind` ("attn" or "ffn") of `layer`. If not, it is not even projected."""
        return any(f"{kind} {layer}" in self.slot_names(later) for later in range(layer + 1, self.n_layer))


def plain(config):
    """The same shape without depth: the baseline, row 1 of the paper's Table 3."""
    off = {"depth_kv": False, "ffn_kv": False, "attn_kv": False, "attn_slot": True}
    return replace(config, **off, depth_window=None, depth_first=0, depth_every=1)


PRESETS = {
    "tiny": MoDAConfig(block_size=256, vocab_size=2048, n_layer=6, n_head=4, n_kv_head=2, n_embd=128),  # for a laptop
    "deep": MoDAConfig(block_size=256, vocab_size=2048, n_layer=16, n_head=4, n_kv_head=2, n_embd=128),  # to look into
    "paper-24l": MoDAConfig(512, 50_304, n_layer=24, n_head=6, n_kv_head=2, n_embd=384, bias=True),  # Table 6
    "paper-48l": MoDAConfig(512, 50_304, n_layer=48, n_head=6, n_kv_head=2, n_embd=384, bias=True),
    "paper-700m": MoDAConfig(4096, 100_352, n_layer=36, n_head=16, n_kv_head=8, n_embd=1024),  # Table 3
}
PRESETS["lean-24l"] = replace(PRESETS["paper-24l"], depth_every=4)  # six layers read: the most gain for its time


# -------------------------------------------------- what is remembered: slots for one pass, K and V while generating


class DepthStream:
    """The slots that one forward pass has written so far.

    A slot is a key and a value for each position, (B, n_kv_head, T, head_dim). It is projected from what a sublayer
    READS, never from what it adds to the residual stream. "attn 3" is the K and V that attention of layer 3 makes for
    its own sequence, used a second time (unless attn_kv). "ffn 3" is one more projection, of the FFN's input.
    Every later layer reads it, unless the config says otherwise. What nobody reads is not written. A query reads the
    slots of its own position alone. Of earlier tokens it sees its layer's sequence K and V, as in any Transformer.

    So the stream ends with the forward pass, and decoding needs no second cache. A token's slots are only read while
    that same token passes through the layers above. A Block calls `write` and `attend`, which calls `read`. Other
    streams have the same methods: to record (`RecordingStream`), to cut slots (notebooks/04), to be faster (fast.py).
    `layer` is the layer's `Attention`, which knows the numbers of the slots that it reads."""

    def __init__(self, impl=None):
        self.impl, self.slots = impl, {}  # number: (k, v)

    def write(self, layer, kind, kv):
        """Keep what `kind` ("attn" or "ffn") of this layer wrote: kv is (k, v), or None if nobody will read it.
        RuntimeError for a second write: a layer that runs twice would leave the wrong slot or lose gradients."""
        if kv is not None:
            number = layer.first_slot + layer.config.slot_kinds.index(kind)
            if number in self.slots:
                raise RuntimeError(f"slot {number} is written twice. Checkpointing? FastMoDA(config, checkpoint=True)")
            self.slots[number] = kv

    def read(self, layer):
        """depth_k, depth_v: lists of the layer's n_slot keys and values (B, n_kv_head, T, head_dim), oldest first."""
        pairs = [self.slots[number] for number in layer.reads]
        return [k for k, _ in pairs], [v for _, v in pairs]

    def attend(self, layer, q, k, v):
        """Causal attention over [sequence | depth] -> (B, n_head, T, head_dim). With a cache k, v go further back."""
        return moda_attention(q, k, v, *self.read(layer), impl=self.impl)


class RecordingStream(DepthStream):
    """Keeps the attention weights of layers and heads (numbers; None: all), in `maps`: as `MoDA.attention_maps`."""

    def __init__(self, impl=None, layers=None, heads=None):
        super().__init__(impl)
        self.layers, self.heads, self.maps = layers, slice(None) if heads is None else heads, []

    def attend(self, layer, q, k, v):
        if self.layers is None or layer.layer in self.layers:
            depth_k = torch.stack(self.read(layer)[0]) if layer.reads else None
            self.maps.append(moda_attention_weights(q, k, depth_k)[0][:, self.heads])
        return super().attend(layer, q, k, v)


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
        self.k[layer, :, :, self.length : stop], self.v[layer, :, :, self.length : stop] = k, v
        return self.k[layer, :, :, :stop], self.v[layer, :, :, :stop]


# ------------------------------------------------------------------------------------------------------ the layers


def rms_norm(n):
    return nn.RMSNorm(n, eps=1e-6)  # an eps of its own: PyTorch's default depends on the dtype


def rotary_table(config, like):
    """cos and sin (block_size, head_dim / 2) of each position's angles: on the device of `like`, in its dtype, but no
    narrower than float32. Computed in float64, as angles grow to thousands of turns."""
    position, pair = (torch.arange(n, device="cpu").double() for n in (config.block_size, config.head_dim // 2))
    angle = torch.outer(position, config.rope_theta ** (-2 * pair / config.head_dim))
    return [x.to(like.device, torch.promote_types(like.dtype, torch.float32)) for x in (angle.cos(), angle.sin())]


def rotate(x, cos, sin):
    """Rotary embedding of x (B, n, T, head_dim): turn each pair (x[i], x[i + head_dim / 2]) by its position's angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class KVProjection(nn.Module):
    """A key and a value per position. The sequence KV, and each slot that does not reuse it, is one of these."""

    def __init__(self, config):
        super().__init__()
        self.wk = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=config.bias)
        self.wv = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=config.bias)

    def forward(self, x):
        return self.wk(x), self.wv(x)


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate, self.up = (nn.Linear(config.n_embd, config.hidden, bias=config.bias) for _ in range(2))
        self.down = nn.Linear(config.hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    """Makes queries, keys and values, and its layer's two slots, which share the key norm. The stream attends."""

    def __init__(self, config, layer):
        super().__init__()
        c = self.config = config
        self.layer, self.reads, self.first_slot = layer, c.slots_read(layer), layer * len(c.slot_kinds)  # by number
        self.wq = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)
        self.kv = KVProjection(c)
        self.wo = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)
        self.q_norm, self.k_norm = (rms_norm(c.head_dim) if c.qk_norm else nn.Identity() for _ in range(2))
        self.writes = c.is_read("attn", layer)
        self.attn_kv = KVProjection(c) if c.attn_kv and self.writes else None
        self.ffn_kv = KVProjection(c) if c.is_read("ffn", layer) else None

    def forward(self, x, rope):
        """x (B, T, n_embd), what attention reads -> its projections, by `heads`. rope: cos, sin (T, head_dim / 2)."""
        return self.heads(self.wq(x), self.kv(x), self.attn_kv(x) if self.attn_kv else None, rope)

    def heads(self, q, kv, own_kv, rope):
        """q (B, T, n_embd); kv, own_kv: two (B, T, n_kv_head * head_dim), or None. Split, normalised and rotated ->
        q (B, n_head, T, head_dim), k, v (B, n_kv_head, T, head_dim), and the slot: such a (k, v), or None."""
        q = q.unflatten(-1, (self.config.n_head, -1))  # (B, T, n_head, head_dim)
        # normalised in the weights' precision, also where autocast makes q, k, v bfloat16
        rotated = rotate(self.q_norm(q.to(self.wq.weight.dtype)), *(angle.unsqueeze(1) for angle in rope))
        q = rotated.to(q.dtype).transpose(1, 2)  # attention's output is laid out like q: this way wo reads it in place
        k, v = self.kv_heads(*kv, rope)
        if not self.writes:
            return q, k, v, None
        if not own_kv and self.config.depth_rope:
            return q, k, v, (k, v)  # the sequence KV, used a second time
        return q, k, v, self.kv_heads(*(own_kv or kv), rope, self.config.depth_rope)

    def kv_heads(self, k, v, rope, rotated=True):
        """k, v (B, T, n_kv_head * head_dim) -> (B, n_kv_head, T, head_dim). Keys are rotated once, for all readers."""
        k, v = (x.unflatten(-1, (self.config.n_kv_head, -1)).transpose(1, 2) for x in (k, v))
        k = self.k_norm(k.to(self.wq.weight.dtype))
        return (rotate(k, *rope) if rotated else k).to(v.dtype), v


class Block(nn.Module):
    """One layer. Post-norm: x = norm(x + f(x)); pre-norm: x = x + f(norm(x))."""

    def __init__(self, config, layer):
        super().__init__()
        self.pre = config.norm == "pre"
        self.attn, self.ffn = Attention(config, layer), SwiGLU(config)
        self.attn_norm, self.ffn_norm = rms_norm(config.n_embd), rms_norm(config.n_embd)

    def forward(self, x, rope, stream, cache=None):
        """x (B, T, n_embd) -> the same shape. rope: cos and sin (T, head_dim / 2)."""
        attn = self.attn
        q, k, v, slot = attn(self.attn_norm(x) if self.pre else x, rope)
        k, v = cache.append(attn.layer, k, v) if cache else (k, v)
        o = stream.attend(attn, q, k, v)  # (B, n_head, T, head_dim): here positions meet, and layers
        stream.write(attn, "attn", slot)
        h = attn.wo(o.transpose(1, 2).flatten(2))  # (B, T, n_embd)
        x = x + h if self.pre else self.attn_norm(x + h)
        h = self.ffn_norm(x) if self.pre else x  # what the FFN reads, and its slot is made of
        slot = attn.kv_heads(*attn.ffn_kv(h), rope, attn.config.depth_rope) if attn.ffn_kv else None
        stream.write(attn, "ffn", slot)
        return x + self.ffn(h) if self.pre else self.ffn_norm(x + self.ffn(h))


# ------------------------------------------------------------------------------------------------------ the model


class MoDA(nn.Module):
    """Decoder-only language model: RMSNorm, rotary positions, QK-norm, SwiGLU, grouped queries, tied embedding.
    impl: see `kernel.moda_attention`. On a GPU this is right but slow. Every layer stacks all the slots that it reads,
    forward and again backward. `fast.FastMoDA` has the same weights and results, and reads slots in place."""

    def __init__(self, config, impl=None):
        super().__init__()
        self.config, self.impl = config, impl
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)  # and, transposed, the LM head
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = rms_norm(config.n_embd) if config.norm == "pre" else nn.Identity()
        for name, table in zip(("cos", "sin"), rotary_table(config, self.embed.weight), strict=True):
            self.register_buffer(name, table, persistent=False)
        self.register_load_state_dict_post_hook(MoDA._loaded)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # the projections back into the residual stream start smaller, as 2 * n_layer add up
                into_residual = name.endswith(("wo.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if into_residual else 0.02)

    def _apply(self, fn, recurse=True):
        """Behind .to(), .half() and .to_empty(). A cast would ruin the rotary table, to_empty lose it: make it anew."""
        before, result = self.cos, super()._apply(fn, recurse)
        if self.cos is not before:
            self.cos, self.sin = rotary_table(self.config, self.cos)
        return result

    def _loaded(self, keys):
        if self.cos.is_meta:  # and perhaps the weights no longer: assign=True passes by `_apply`
            self.cos, self.sin = rotary_table(self.config, self.embed.weight)

    def forward(self, idx, targets=None):
        """idx (B, T) token ids, T <= block_size; targets (B, T) int64 or None; -1 leaves a position out (all: NaN).
        Returns (logits (B, T, vocab_size), mean cross-entropy in nats a token or None). ValueError for wrong shapes."""
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets {tuple(targets.shape)} must have the shape of idx {tuple(idx.shape)}")
        return self.head(self.hidden(idx), targets)

    def hidden(self, idx, stream=None, cache=None):
        """idx (B, T) -> (B, T, n_embd), the input of the LM head. With a cache, idx holds the new positions only."""
        if not isinstance(idx, torch.Tensor) or idx.dim() != 2 or idx.numel() == 0 or idx.is_floating_point():
            got = f"{idx.dtype} {tuple(idx.shape)}" if isinstance(idx, torch.Tensor) else repr(idx)
            raise ValueError(f"idx must be a tensor of integer token ids (B, T), not empty, got {got}")
        stop = (start := cache.length if cache else 0) + idx.shape[1]
        if stop > self.config.block_size:
            raise ValueError(f"{stop} positions exceed block_size ({self.config.block_size})")
        try:
            x = self.embed(idx)
        except IndexError as error:
            raise ValueError(f"idx must be from 0 to below vocab_size ({self.config.vocab_size})") from error
        x = self.layers(x, (self.cos[start:stop], self.sin[start:stop]), stream, cache)
        if cache is not None:
            cache.length = stop
        return self.norm(x)

    def layers(self, x, rope, stream=None, cache=None):
        """x (B, T, n_embd) -> the same shape, through all layers. What fast.py replaces."""
        stream = stream or DepthStream(self.impl)
        for block in self.blocks:
            x = block(x, rope, stream, cache)
        return x

    def head(self, x, targets=None):
        """x (..., n_embd) -> (logits (..., vocab_size), loss or None), as `forward`."""
        logits = F.linear(x, self.embed.weight)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=-1)

    def new_cache(self, B):  # fast.py has another
        return KVCache(self.config, B)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, use_cache=True, stop=None):
        """Continue idx (B, T) by sampled tokens -> (B, T + max_new_tokens), less if every row has sampled `stop`. A
        list of prompts gives a list: each is continued alone, as padding would be read. A temperature below 1e-5 takes
        the likeliest token; top_k samples among the k likeliest. ValueError for arguments out of range."""
        fits = isinstance(idx, (torch.Tensor, list)) and 0 <= temperature <= 1e3 and max_new_tokens >= 0
        if not fits or (top_k is not None and top_k < 1):
            raise ValueError("need ids as tensor or lists, temperature from 0 to 1000, max_new_tokens >= 0, top_k >= 1")
        if isinstance(idx, list):
            rows = [torch.as_tensor(x, device=self.cos.device)[None] for x in idx]  # (1, T) each
            return [self.generate(x, max_new_tokens, temperature, top_k, use_cache, stop)[0] for x in rows]
        context, cache = idx, self.new_cache(len(idx)) if use_cache else None
        for n_new in range(1, max_new_tokens + 1):
            if context.shape[-1] > self.config.block_size:  # a sliding cache would differ: its keys saw what is dropped
                context = context[:, -max(1, self.config.block_size // 2) :]
                if cache:
                    cache.length = 0
            logits, _ = self.head(self.hidden(context[..., cache.length :] if cache else context, cache=cache)[:, -1])
            if top_k is not None:
                logits[logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]] = float("-inf")
            p = (logits.float() / max(temperature, 1e-5)).softmax(-1)
            new = torch.multinomial(p, 1) if temperature >= 1e-5 else logits.argmax(-1, keepdim=True)
            context, idx = torch.cat([context, new], dim=1), torch.cat([idx, new], dim=1)
            if stop is not None and (idx[:, -n_new:] == stop).any(1).all():
                break
        return idx

    @torch.no_grad()
    def attention_maps(self, idx, layers=None, heads=None):
        """Where `layers` look with `heads` (numbers; None: all), the paper's Figure 5: a list of (B, n_head, T, T +
        n_slot). Rows sum to 1: sequence, then slots as `config.slot_names(layer)`. ValueError for more than 8 GiB."""
        n_map = max(self.config.n_head, len(layers or self.blocks) * len(heads or range(self.config.n_head)))
        n = idx.numel() * idx.shape[-1] if isinstance(idx, torch.Tensor) else 0  # what is none, `hidden` refuses
        if (size := n * n_map * self.cos.element_size() / 2**30) > 8:
            raise ValueError(f"the maps would take {size:.1f} GiB, more than 8: choose some layers or heads")
        self.hidden(idx, stream := RecordingStream(self.impl, layers, heads))
        return stream.maps

    def num_params(self):
        return sum(p.numel() for p in self.parameters())  # the tied embedding is one of them
