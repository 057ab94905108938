"""The model: against the same model written naively, and property by property on whole models."""

import copy
import dataclasses
import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import kernel
import moda
from experiments.bench import train_step
from kernel import moda_attention, moda_attention_reference
from moda import PRESETS, DepthStream, FastDepthStream, KVCache, MoDA, MoDAConfig, capture, flops

SMALL = MoDAConfig(block_size=16, vocab_size=23, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, n_hidden=40)

ROWS = {  # of the paper's Table 3
    1: {"depth_kv": False, "ffn_kv": False, "attn_kv": False},
    3: {"depth_kv": True, "ffn_kv": False, "attn_kv": False},
    4: {"depth_kv": True, "ffn_kv": True, "attn_kv": False},
    5: {"depth_kv": True, "ffn_kv": True, "attn_kv": True},
}
VARIANTS = [  # every row in both norms, then every other switch
    *({**row, "norm": norm} for row in ROWS.values() for norm in ("post", "pre")),
    *({"depth_window": n} for n in (1, 2, 3)),
    {"depth_window": 1, "norm": "pre", "attn_kv": True},
    {"depth_window": 1, "ffn_kv": False},
    {"depth_window": 3, "attn_kv": True},
    {"depth_rope": False},
    {"depth_rope": False, "ffn_kv": False, "norm": "pre"},
    {"depth_rope": False, "attn_kv": True, "n_kv_head": 1},
    {"qk_norm": False, "bias": True},
    {"bias": True, "attn_kv": True, "n_kv_head": 4, "rope_theta": 100.0},
    {"n_hidden": None, "n_layer": 1},
]


def name_of(variant):
    changes = [f"{field}={value}" for field, value in variant.items() if getattr(SMALL, field) != value]
    return ",".join(changes) or "row 4"


each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
depth_variants = pytest.mark.parametrize("variant", [ROWS[3], ROWS[4], ROWS[5], {"norm": "pre"}], ids=name_of)


def random_model(impl=None, dtype=torch.float64, **variant):
    """A model whose weights are large enough for everything to matter."""
    generator = torch.Generator().manual_seed(0)
    model = MoDA(replace(SMALL, **variant), impl=impl).to(dtype)
    for p in model.parameters():
        with torch.no_grad():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64) * (0.3 if p.dim() == 1 else 0.2)
            p.copy_(p.double() + noise if p.dim() == 1 else noise)
    return model


def tokens(B=2, T=9, vocab_size=SMALL.vocab_size, seed=1):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def gradients(model, idx, targets):
    """{name: gradient of the loss}, None where it does not depend on the parameter."""
    model.zero_grad(set_to_none=True)
    model(idx, targets)[1].backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture
def attention_calls(monkeypatch):
    """What the model hands to the operator, and gets: a list of dicts over calls, so over layers."""
    calls = []

    def record(q, k, v, depth_k=None, depth_v=None, **kwargs):
        o = moda_attention(q, k, v, depth_k, depth_v, **kwargs)
        calls.append({"q": q, "k": k, "v": v, "depth_k": depth_k, "depth_v": depth_v, "o": o, **kwargs})
        return o

    monkeypatch.setattr(moda, "moda_attention", record)
    return calls


# -------------------------------------------------------------------------------------- the same model, written naively


def rope(x, cos, sin):
    """x (B, n, T, head_dim): the pair (x[i], x[i + head_dim / 2]) is one complex number, turned by its position."""
    a, b = x.double().chunk(2, dim=-1)
    y = torch.complex(a, b) * torch.complex(cos, sin).to(torch.complex128)
    return torch.cat([y.real, y.imag], dim=-1)


def naive_model(model, idx):
    """The paper's section on the model, from a state_dict. Returns the logits and, for every layer, what it attends to:
    the sequence K and V, and the K and V of {slot name: (B, n_kv_head, T, head_dim)} that it reads, oldest first."""
    c, w = model.config, {name: p.double() for name, p in model.state_dict().items()}
    B, T = idx.shape
    cos, sin = model.cos[:T].double(), model.sin[:T].double()
    stream, attended = {}, []

    def linear(x, name):
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if c.bias else y

    def rms_norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def heads(x, norm=None):
        x = x.unflatten(-1, (-1, c.head_dim)).transpose(1, 2)  # (B, n, T, head_dim)
        return rms_norm(x, norm) if norm and c.qk_norm else x

    def slot(x, layer, projection):
        k = heads(linear(x, f"{layer}.{projection}.wk"), f"{layer}.k_norm")
        return rope(k, cos, sin) if c.depth_rope else k, heads(linear(x, f"{layer}.{projection}.wv"))

    x = w["embed.weight"][idx]
    for i in range(c.n_layer):
        block, attn, ffn = f"blocks.{i}", f"blocks.{i}.attn", f"blocks.{i}.ffn"
        h = rms_norm(x, f"{block}.attn_norm") if c.norm == "pre" else x
        q = rope(heads(linear(h, f"{attn}.wq"), f"{attn}.q_norm"), cos, sin)
        k = rope(heads(linear(h, f"{attn}.kv.wk"), f"{attn}.k_norm"), cos, sin)
        v = heads(linear(h, f"{attn}.kv.wv"))
        read = dict(list(stream.items())[-(c.depth_window or len(stream)) :])
        depth = [torch.stack(x) for x in zip(*read.values(), strict=True)] if read else [None, None]
        attended.append((k, v, read))
        o = moda_attention_reference(q, k, v, *depth).transpose(1, 2).reshape(B, T, c.n_embd)
        x = x + linear(o, f"{attn}.wo")
        if c.norm == "post":
            x = rms_norm(x, f"{block}.attn_norm")
        if c.depth_kv and i + 1 < c.n_layer:
            if not c.attn_kv:  # reuse the sequence KV
                stream[f"attn {i}"] = slot(h, attn, "kv")
            elif f"{attn}.attn_kv.wk.weight" in w:
                stream[f"attn {i}"] = slot(h, attn, "attn_kv")
            else:
                stream[f"attn {i}"] = (torch.full_like(k, float("nan")),) * 2  # nobody may read it
        h = rms_norm(x, f"{block}.ffn_norm") if c.norm == "pre" else x
        if c.ffn_kv and i + 1 < c.n_layer:
            stream[f"ffn {i}"] = slot(h, attn, "ffn_kv")
        x = x + linear(F.silu(linear(h, f"{ffn}.gate")) * linear(h, f"{ffn}.up"), f"{ffn}.down")
        if c.norm == "post":
            x = rms_norm(x, f"{block}.ffn_norm")
    if c.norm == "pre":
        x = rms_norm(x, "norm")
    return x @ w["embed.weight"].T, attended


@each_variant
def test_equals_the_naive_model(variant, attention_calls):
    """Logits; and in every layer the sequence KV and the depth slots: which ones, in which order, made of what."""
    model, idx = random_model(**variant), tokens()
    want, attended = naive_model(model, idx)
    logits, loss = model(idx)
    assert logits.shape == (2, 9, SMALL.vocab_size) and loss is None
    torch.testing.assert_close(logits, want, rtol=1e-10, atol=1e-10)
    assert logits.std() > 0.5  # nothing was multiplied away
    with torch.no_grad():  # each projection by itself
        torch.testing.assert_close(model(idx)[0], want, rtol=1e-10, atol=1e-10)
    del attention_calls[model.config.n_layer :]
    for layer, (call, (k, v, read)) in enumerate(zip(attention_calls, attended, strict=True)):
        assert model.slot_names(layer) == list(read)
        torch.testing.assert_close(call["k"], k)
        torch.testing.assert_close(call["v"], v)
        if not read:
            assert call["depth_k"] is None and call["depth_v"] is None
        for s, (depth_k, depth_v) in enumerate(read.values()):
            torch.testing.assert_close(call["depth_k"][s], depth_k)
            torch.testing.assert_close(call["depth_v"][s], depth_v)


def test_loss():
    model, idx, targets = random_model(), tokens(), tokens(seed=2)
    targets[0, :4] = -1
    logits, loss = model(idx, targets)
    p = logits.softmax(-1).flatten(0, 1)
    want = -torch.stack([p[i, t].log() for i, t in enumerate(targets.flatten().tolist()) if t != -1]).mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)  # computed in float32
    torch.testing.assert_close(logits, model(idx)[0])
    torch.testing.assert_close(model(idx.int())[0], logits)


def test_rotary_angles():
    model = MoDA(replace(SMALL, block_size=1000, rope_theta=500.0))
    assert model.cos.shape == model.sin.shape == (1000, 4)  # block_size, head_dim / 2
    for position in (0, 1, 999):
        for i in range(4):
            angle = position * 500.0 ** (-2 * i / 8)
            assert model.cos[position, i].item() == pytest.approx(math.cos(angle), abs=1e-7)
            assert model.sin[position, i].item() == pytest.approx(math.sin(angle), abs=1e-7)


# ------------------------------------------------------------------------------------------------------- who sees what


@each_variant
def test_model_is_causal(variant):
    model, idx = random_model(**variant), tokens(T=8)
    before = model(idx)[0]
    for t in range(8):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % SMALL.vocab_size
        differs = (model(changed)[0] != before).any(-1)  # (B, T)
        assert differs.tolist() == [[position >= t for position in range(8)], [False] * 8]


@depth_variants
def test_slot_reaches_its_own_position_only(variant, monkeypatch):
    """Change one slot at position t when it is written: the attention of the first layer that reads it changes at t
    only, the layers before not at all, the logits from t on."""
    model, idx, t = random_model(**variant), tokens(T=8), 3
    names = model.slot_names(SMALL.n_layer - 1)
    original_write = DepthStream.write
    outputs = {}
    for layer, block in enumerate(model.blocks):
        block.attn.register_forward_hook(lambda module, args, out, layer=layer: outputs.update({layer: out}))

    def run(changed_slot):
        def write(self, slot, k, v):
            if slot == changed_slot:
                mark = torch.zeros_like(k)
                mark[0, :, t] = 1.0
                k, v = k + mark, v - mark
            original_write(self, slot, k, v)

        monkeypatch.setattr(DepthStream, "write", write)
        return model(idx)[0], dict(outputs)

    logits, before = run(None)
    only_t = [[position == t for position in range(8)], [False] * 8]
    from_t = [[position >= t for position in range(8)], [False] * 8]
    for slot, name in zip(range(*model.config.slot_range(SMALL.n_layer - 1)), names, strict=True):
        logits_after, after = run(slot)
        reader = next(layer for layer in range(SMALL.n_layer) if name in model.slot_names(layer))
        differs = [(after[layer] != before[layer]).any(-1).tolist() for layer in range(SMALL.n_layer)]
        assert differs[:reader] == [[[False] * 8] * 2] * reader
        assert differs[reader] == only_t
        assert (logits_after != logits).any(-1).tolist() == (only_t if reader == SMALL.n_layer - 1 else from_t)


@each_variant
def test_every_parameter_learns(variant):
    grads = gradients(random_model(**variant), tokens(), tokens(seed=2))
    assert [name for name, grad in grads.items() if grad is None or not grad.norm() > 1e-6] == []


def test_slots_pass_gradients_to_their_writers():
    """With the path through the residual stream cut, the depth KV alone carries gradients to the layers below."""
    model = random_model(norm="pre")
    last = model.blocks[-1]
    original = last.forward
    last.forward = lambda x, *args: original(x.detach(), *args)
    grads = gradients(model, tokens(), tokens(seed=2))
    assert grads["blocks.1.ffn.down.weight"] is None
    for name in ("blocks.0.attn.kv.wv.weight", "blocks.1.attn.ffn_kv.wk.weight", "blocks.0.ffn.down.weight"):
        assert grads[name].norm() > 1e-6


# -------------------------------------------------------------------------------------------------- the slot schedule

ALL = ["attn 0", "ffn 0", "attn 1", "ffn 1", "attn 2", "ffn 2", "attn 3", "ffn 3"]
ATTN, FFN = ALL[::2], ALL[1::2]
SCHEDULE = [  # of 5 layers: variant, the slots that layer 3 reads, those with a projection of their own
    (ROWS[1], [], []),
    (ROWS[3], ATTN[:3], []),
    (ROWS[4], ALL[:6], FFN),
    (ROWS[5], ALL[:6], ALL),
    ({**ROWS[3], "depth_window": 1}, ["attn 2"], []),
    ({**ROWS[3], "depth_window": 2}, ["attn 1", "attn 2"], []),
    ({**ROWS[4], "depth_window": 1}, ["ffn 2"], FFN),
    ({**ROWS[4], "depth_window": 3}, ["ffn 1", "attn 2", "ffn 2"], FFN),
    ({**ROWS[4], "depth_window": 99}, ALL[:6], FFN),
    ({**ROWS[5], "depth_window": 1}, ["ffn 2"], FFN),  # no attention slot is read, so none has a projection
    ({**ROWS[5], "depth_window": 2}, ["attn 2", "ffn 2"], ALL),
]


@pytest.mark.parametrize("variant, layer_3, projections", SCHEDULE, ids=lambda x: name_of(x) if type(x) is dict else "")
def test_slot_schedule(variant, layer_3, projections, monkeypatch):
    model = random_model(n_layer=5, **variant)
    c, window = model.config, variant.get("depth_window", 99)
    possible = [name for name in ALL if (name in ATTN and c.depth_kv) or (name in FFN and c.ffn_kv)]
    for layer in range(5):  # the most recent ones of what the layers below may write
        below = [name for name in possible if int(name.split()[1]) < layer]
        assert model.slot_names(layer) == c.slot_names(layer) == below[-window:]
    assert model.slot_names(3) == layer_3

    modules = [name for name, _ in model.named_modules() if name.endswith((".attn_kv", ".ffn_kv"))]
    assert modules == [f"blocks.{name.split()[1]}.attn.{name.split()[0]}_kv" for name in projections]
    assert set(model.state_dict()) >= {f"{name}.{w}.weight" for name in modules for w in ("wk", "wv")}

    written, original_write = [], DepthStream.write  # and what nobody reads is not written
    monkeypatch.setattr(DepthStream, "write", lambda self, *slot: (written.append(slot), original_write(self, *slot)))
    model(tokens())
    assert len(written) == len({name for layer in range(5) for name in model.slot_names(layer)})


def test_slot_names_errors():
    for layer in (-1, 3, 99):
        with pytest.raises(ValueError, match="layer"):
            random_model().slot_names(layer)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_ffn_slot_comes_from_what_the_ffn_reads(norm):
    model = random_model(norm=norm)
    block, seen = model.blocks[1], {}
    block.ffn.register_forward_pre_hook(lambda module, args: seen.update(ffn=args[0]))
    block.ffn.gate.register_forward_pre_hook(lambda module, args: seen.update(gate=args[0]))
    block.attn.ffn_kv.wk.register_forward_pre_hook(lambda module, args: seen.update(slot=args[0]))
    block.attn_norm.register_forward_hook(lambda module, args, out: seen.update(attn_norm=out))
    block.ffn_norm.register_forward_hook(lambda module, args, out: seen.update(ffn_norm=out))
    with torch.no_grad():  # with gradients, these projections are one matrix product and no calls of their own
        model(tokens())
    assert torch.equal(seen["slot"], seen["ffn"]) and torch.equal(seen["slot"], seen["gate"])
    assert torch.equal(seen["slot"], seen["attn_norm" if norm == "post" else "ffn_norm"])


def test_attention_slot_is_the_sequence_kv(attention_calls):
    model = random_model()
    model(tokens())
    for layer in range(SMALL.n_layer - 1):
        mine, reader = attention_calls[layer], attention_calls[layer + 1]
        slot = model.slot_names(layer + 1).index(f"attn {layer}")
        assert torch.equal(reader["depth_k"][slot], mine["k"]) and torch.equal(reader["depth_v"][slot], mine["v"])


@pytest.mark.parametrize("row, n_key", [(1, 3), (3, 3), (4, 3 + 2), (5, 3 + 4)])
def test_keys_are_normalised_and_rotated_once(row, n_key, monkeypatch):
    """One key norm per layer, for the sequence and its slots; called when a key is written, not when it is read."""
    model, norms, rotations, rotate = random_model(**ROWS[row]), [], [], moda.rotate
    for block in model.blocks:
        block.attn.k_norm.register_forward_hook(lambda *args: norms.append(1))
    monkeypatch.setattr(moda, "rotate", lambda x, cos, sin: (rotations.append(1), rotate(x, cos, sin))[1])
    model(tokens())
    assert len(norms) == n_key
    assert len(rotations) == n_key + SMALL.n_layer  # and the queries
    assert sum("k_norm" in name for name in model.state_dict()) == SMALL.n_layer


@pytest.mark.parametrize("depth_rope", [True, False])
def test_shifting_all_positions(depth_rope):
    """Rotated depth keys: the depth logits depend on content only. Not rotated: on the absolute position."""
    model, idx, T = random_model(depth_rope=depth_rope, block_size=64), tokens(T=8), 8
    frequency = 10_000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    runs = []
    for start in (0, 37):  # in float64 throughout: the buffers are float32
        angle = torch.outer(torch.arange(start, start + 64, dtype=torch.float64), frequency)
        model.cos, model.sin = angle.cos(), angle.sin()
        runs.append(model.attention_maps(idx))
    before, maps = runs
    # log p is the logit up to a constant of the row: take off the logit of the query's own position, which cannot shift
    own = torch.arange(T)
    logits_before, logits = ([p[..., T:].log() - p[:, :, own, own, None].log() for p in run[1:]] for run in runs)
    difference = [(a - b).abs().max().item() for a, b in zip(logits, logits_before, strict=True)]
    maps_difference = max((a - b).abs().max().item() for a, b in zip(maps, before, strict=True))
    if depth_rope:
        assert max(difference) < 1e-9 and maps_difference < 1e-9
    else:
        assert min(difference) > 0.1 and maps_difference > 0.01


# ---------------------------------------------------------------------------------------------------------- generation


def plain_generate(model, idx, max_new_tokens, choose):
    """No cache, no cleverness: when the context outgrows block_size, half a block is kept, from position 0 again."""
    block_size, context = model.config.block_size, idx
    for _ in range(max_new_tokens):
        if context.shape[1] > block_size:
            context = context[:, -max(1, block_size // 2) :]
        new = choose(model(context)[0][:, -1])[:, None]
        context, idx = torch.cat([context, new], dim=1), torch.cat([idx, new], dim=1)
    return idx


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("block_size, prompt", [(1, 1), (2, 1), (7, 1), (7, 7), (7, 20), (8, 3), (8, 9)])
def test_cached_generation_equals_uncached(block_size, prompt, B):
    model, idx, n = random_model(block_size=block_size), tokens(B, prompt), 3 * block_size
    want = plain_generate(model, idx, n, lambda logits: logits.argmax(-1))
    for use_cache in (True, False):
        got = model.generate(idx, n, temperature=0, use_cache=use_cache)
        assert got.shape == (B, prompt + n) and got.dtype == idx.dtype
        assert torch.equal(got, want)
        assert torch.equal(model.generate(idx, n, top_k=1, use_cache=use_cache), want)
    for options in ({}, {"temperature": 0.7, "top_k": 5}, {"top_k": 10_000}):
        samples = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            samples.append(model.generate(idx, n, use_cache=use_cache, **options))
        assert torch.equal(*samples)
        assert not torch.equal(samples[0], want)


@each_variant
def test_cached_generation_of_every_variant(variant):
    model, idx = random_model(block_size=8, **variant), tokens(2, 3)
    want = plain_generate(model, idx, 20, lambda logits: logits.argmax(-1))
    assert torch.equal(model.generate(idx, 20, temperature=0), want)


@each_variant
@pytest.mark.parametrize("chunks", [[1] * 16, [3, 1, 5, 2, 4, 1], [15, 1]], ids=str)
def test_cached_logits_equal_uncached(chunks, variant):
    model, idx = random_model(**variant), tokens(T=16)
    want, cache = model(idx)[0], KVCache(model.config, 2)
    got = [F.linear(model._hidden(chunk, cache), model.embed.weight) for chunk in idx.split(chunks, dim=1)]
    assert (torch.cat(got, dim=1) - want).abs().max() < 1e-10
    assert cache.length == 16
    with pytest.raises(ValueError, match="block_size"):
        model._hidden(idx[:, :1], cache)


def test_cache_holds_the_sequence_alone():
    caches = {}
    for row, variant in ROWS.items():
        cache = caches[row] = KVCache(replace(SMALL, **variant), 2)
        with torch.no_grad():
            random_model(**variant)._hidden(tokens(T=5), cache)
        held = [x for x in vars(cache).values() if isinstance(x, torch.Tensor)]
        assert [tuple(x.shape) for x in held] == [(3, 2, 2, 16, 8)] * 2  # n_layer, B, n_kv_head, block_size, head_dim
        assert vars(cache).keys() == vars(caches[1]).keys()


def test_generate_samples_what_it_should(monkeypatch):
    model, idx = random_model(), tokens(3, 4)
    p = []
    monkeypatch.setattr(torch, "multinomial", lambda x, n: (p.append(x), x.argmax(-1, keepdim=True))[1])
    model.generate(idx, 1, temperature=0.5, top_k=4)
    logits = model(idx)[0][:, -1]
    keep = logits >= logits.sort(descending=True).values[:, 3:4]
    want = (logits * 2).masked_fill(~keep, float("-inf")).softmax(-1)
    torch.testing.assert_close(p[0].double(), want, rtol=1e-5, atol=1e-6)
    assert (p[0] > 0).sum(-1).tolist() == [4] * 3
    assert torch.equal(model.generate(idx, 0), idx)
    assert not model.generate(idx, 1).requires_grad


# ------------------------------------------------------------------------------------------------------ attention maps


@each_variant
def test_attention_maps_reproduce_the_output(variant, attention_calls):
    model, idx, T = random_model(**variant), tokens(), 9
    maps = model.attention_maps(idx)
    assert len(maps) == model.config.n_layer
    for layer, (p, call) in enumerate(zip(maps, attention_calls, strict=True)):
        n_slot, group = len(model.slot_names(layer)), model.config.n_head // model.config.n_kv_head
        assert p.shape == (2, 4, T, T + n_slot) and not p.requires_grad
        torch.testing.assert_close(p.sum(-1), torch.ones(2, 4, T, dtype=torch.float64))
        assert (p[..., :T] > 0).all(dim=(0, 1)).equal(torch.ones(T, T).tril().bool())
        assert (p[..., T:] > 0).all()
        o = p[..., :T] @ call["v"].repeat_interleave(group, dim=1)
        for s in range(n_slot):
            o = o + p[..., T + s, None] * call["depth_v"][s].repeat_interleave(group, dim=1)
        torch.testing.assert_close(o, call["o"])


# ----------------------------------------------------------------------------------------------- the paper's numbers

TABLE_3 = [  # row, n_layer, parameters in millions, FLOPs of a forward pass at T = 4096 in 10^12
    (1, 36, 669.0, 8.01),
    (1, 38, 700.5, 8.41),
    (3, 36, 669.0, 8.02),
    (4, 36, 705.7, 8.33),
    (5, 36, 742.4, 8.63),
]


@pytest.mark.parametrize("row, n_layer, params, tera", TABLE_3)
def test_table_3(row, n_layer, params, tera):
    config = replace(PRESETS["paper-700m"], n_layer=n_layer, **ROWS[row])
    with torch.device("meta"):
        model = MoDA(config)
    assert model.num_params() / 1e6 == pytest.approx(params, abs=0.1)
    got = flops(config, 4096) / 1e12
    if row == 1:
        assert got == pytest.approx(tera, rel=0.01)
    else:
        row_1 = flops(replace(config, **ROWS[1]), 4096) / 1e12
        assert got - row_1 == pytest.approx(tera - 8.01, abs=0.005)


@pytest.mark.parametrize("n_layer, row, params", [(24, 1, 71.35), (24, 4, 73.72), (48, 1, 123.38), (48, 4, 128.11)])
def test_table_6(n_layer, row, params):
    with torch.device("meta"):
        model = MoDA(replace(PRESETS[f"paper-{n_layer}l"], **ROWS[row]))
    unread = 98_560 if row == 4 else 0  # the paper counted the last layer's FFN KV projection, which nobody reads
    assert (model.num_params() + unread) / 1e6 == pytest.approx(params, abs=0.01)


def test_depth_kv_alone_has_no_parameters():
    count = {row: random_model(**variant).num_params() for row, variant in ROWS.items()}
    projection = 2 * 32 * 16  # K and V: n_embd * n_kv_head * head_dim; two of three layers have a reader
    assert count == {1: count[1], 3: count[1], 4: count[1] + 2 * projection, 5: count[1] + 4 * projection}


@each_variant
def test_flops_are_what_pytorch_counts(variant):
    config = replace(SMALL, **variant)
    with torch.device("meta"):
        model, idx = MoDA(config, impl="reference"), torch.zeros(1, 11, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(idx)
    single = sum(len(config.slot_names(layer)) == 1 for layer in range(config.n_layer))
    not_counted = single * 2 * 11 * config.n_embd  # the sum over one slot is no matrix product, so PyTorch sees none
    assert flops(config, 11) == counter.get_total_flops() + not_counted


# ------------------------------------------------------------------------------------------------ training, and PyTorch


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_overfits_one_batch(norm):
    torch.manual_seed(0)
    model, data = MoDA(replace(SMALL, norm=norm)), tokens(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = model(data[:, :-1], data[:, 1:])[1].item()
    for _ in range(80):
        loss = model(data[:, :-1], data[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first > 2.5
    assert loss.item() < 0.05


@each_variant
def test_gradients_equal_the_reference(variant):
    """Of the whole model, also after other models and plain attention with other strides ran in this process."""
    idx, targets = tokens(), tokens(seed=2)
    want = gradients(random_model("reference", **variant), idx, targets)
    got = gradients(random_model("torch", **variant), idx, targets)
    for other in (ROWS[1], {"norm": "pre", "n_kv_head": 4}):
        gradients(random_model(**other), idx, targets)
    q = torch.randn(2, 9, 4, 8, dtype=torch.float64, requires_grad=True)
    for x in (q.transpose(1, 2), q.transpose(1, 2).contiguous()):
        F.scaled_dot_product_attention(x, x, x, is_causal=True).sum().backward()
    again = gradients(random_model("torch", **variant), idx, targets)
    for name, grad in want.items():
        assert (got[name] - grad).norm() <= 1e-9 * grad.norm(), name
        assert torch.equal(again[name], got[name]), name


@pytest.mark.parametrize("row", ROWS)
def test_compiled_gradients_equal_eager(row):
    model, idx, targets = random_model(**ROWS[row]), tokens(), tokens(seed=2)
    want = gradients(model, idx, targets)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(idx, targets)[1].backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("impl", [None, "reference", "torch"])
def test_impl_reaches_the_operator(impl, attention_calls):
    random_model(impl)(tokens())
    assert [call["impl"] for call in attention_calls] == [impl] * SMALL.n_layer


def test_impl_is_used(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("not the reference")

    monkeypatch.setattr(kernel, "moda_attention_reference", forbidden)
    random_model("torch")(tokens())
    with pytest.raises(AssertionError, match="not the reference"):
        random_model("reference")(tokens())
    with pytest.raises(ValueError, match="unknown impl 'nonsense'"):
        random_model("nonsense")(tokens())


@pytest.mark.parametrize("row", ROWS)
def test_state_dict(row, tmp_path):
    model = random_model(**ROWS[row])
    keys = set(model.state_dict())
    assert keys == {name for name, _ in model.named_parameters()}  # no buffers
    assert {key.split(".")[0] for key in keys} <= {"embed", "blocks", "norm"}
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = MoDA(model.config).double()
    assert not torch.equal(other(tokens())[0], model(tokens())[0])
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    assert torch.equal(other(tokens())[0], model(tokens())[0])


@pytest.mark.parametrize("variant", [ROWS[1], ROWS[4], ROWS[5], {"depth_rope": False, "norm": "pre"}], ids=name_of)
def test_bf16_autocast(variant, attention_calls):
    """Everything attention reads is bf16 then, and results stay close to float32. Without a warning."""
    model, idx, targets = random_model(dtype=torch.float32, **variant), tokens(), tokens(seed=2)
    want, want_grads = model(idx)[0], gradients(model, idx, targets)
    attention_calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(idx, targets)
    for call in attention_calls:
        dtypes = {call[name].dtype for name in ("q", "k", "v", "depth_k", "depth_v", "o") if call[name] is not None}
        assert dtypes == {torch.bfloat16}
    model.zero_grad()
    loss.backward()
    assert loss.dtype == torch.float32
    assert (logits - want).norm() < 0.05 * want.norm()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        assert (p.grad - want_grads[name]).norm() < 0.2 * want_grads[name].norm(), name
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(idx, 20, temperature=0).shape == (2, 29)
        assert all(torch.isfinite(p).all() for p in model.attention_maps(idx))


def test_initialisation():
    torch.manual_seed(0)
    config = replace(SMALL, n_embd=128, n_hidden=None, n_layer=8, vocab_size=500, bias=True, attn_kv=True)
    for name, p in MoDA(config).named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            into_the_stream = name.endswith(("wo.weight", "down.weight"))
            assert p.std().item() == pytest.approx(0.02 / 4 if into_the_stream else 0.02, rel=0.05), name  # sqrt(2 * 8)
    assert all(isinstance(m, nn.RMSNorm) for name, m in MoDA(config).named_modules() if name.endswith("_norm"))


# -------------------------------------------------------------------------------------------------------------- config


def test_defaults_and_presets():
    required = [f.name for f in dataclasses.fields(MoDAConfig) if f.default is dataclasses.MISSING]
    assert required == ["block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"]
    config = MoDAConfig(4, 5, 2, 2, 1, 8)
    assert (config.depth_kv, config.ffn_kv, config.attn_kv) == (True, True, False)  # row 4
    assert config.norm == "post" and config.qk_norm and config.depth_rope and config.depth_window is None
    assert MoDA(config).blocks[0].ffn.gate.weight.shape == (4 * 8, 8)
    assert set(PRESETS) == {"tiny", "deep", "paper-24l", "paper-48l", "paper-700m"}
    assert PRESETS["deep"].n_layer >= 16
    for c in PRESETS.values():
        assert (c.depth_kv, c.ffn_kv, c.attn_kv, c.norm, c.qk_norm) == (True, True, False, "post", True)
    for name in ("tiny", "deep"):
        model = MoDA(PRESETS[name])
        assert model(tokens(1, PRESETS[name].block_size))[0].isfinite().all()


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"depth_kv": False}, ["ffn_kv", "depth_kv"]),
        ({"depth_kv": False, "ffn_kv": False, "attn_kv": True}, ["attn_kv", "depth_kv"]),
        ({"depth_kv": False, "ffn_kv": False, "depth_window": 2}, ["depth_window", "depth_kv"]),
        ({"depth_window": 0}, ["depth_window", "0"]),
        ({"depth_window": -1}, ["depth_window"]),
        ({"depth_window": 1.5}, ["depth_window"]),
        ({"n_head": 3}, ["n_embd", "n_head"]),
        ({"n_kv_head": 3}, ["n_head", "n_kv_head"]),
        ({"n_kv_head": 8}, ["n_head", "n_kv_head"]),
        ({"n_embd": 12, "n_head": 4}, ["n_embd", "n_head", "even"]),
        ({"norm": "both"}, ["norm", "both"]),
        ({"norm": None}, ["norm"]),
        ({"rope_theta": 0}, ["rope_theta"]),
        ({"rope_theta": "10000"}, ["rope_theta"]),
        ({"qk_norm": "False"}, ["qk_norm", "True or False"]),
        *(({name: 0}, [name]) for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")),
        *(({name: value}, [name]) for name in ("n_layer", "n_hidden") for value in (-3, 2.0, "2", True)),
        ({"n_layer": None}, ["n_layer"]),
        ({"n_hidden": 0}, ["n_hidden"]),
    ],
    ids=str,
)
def test_config_errors(wrong, words):
    with pytest.raises(ValueError) as error:
        replace(SMALL, **wrong)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "idx, message",
    [
        (tokens().float(), "integer.*float32"),
        (tokens().bool(), "integer.*bool"),
        (tokens()[0], r"idx.*\(9,\)"),
        (tokens()[None], r"idx.*\(1, 2, 9\)"),
        (tokens()[:, :0], r"empty.*\(2, 0\)"),
        (tokens()[:0], r"empty.*\(0, 9\)"),
        (tokens(T=17), r"17.*block_size \(16\)"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_forward_errors(idx, message):
    model = random_model()
    with pytest.raises(ValueError, match=message):
        model(idx)
    with pytest.raises(ValueError, match=message):
        model.attention_maps(idx)
    if idx.shape[-1] <= SMALL.block_size:  # generation shortens a long prompt
        with pytest.raises(ValueError, match=r"idx|prompt"):
            model.generate(idx, 1)


def test_other_errors():
    model, idx = random_model(), tokens()
    with pytest.raises(ValueError, match=r"targets.*\(2, 8\).*\(2, 9\)"):
        model(idx, idx[:, 1:])
    for options, word in [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k"),
    ]:
        with pytest.raises(ValueError, match=word):
            model.generate(idx, 1, **options)
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(idx, -1)


# ---------------------------------------------------------------------------------------------- the fast depth stream
#
# In Triton's interpreter on the CPU, or compiled on a GPU, against the plain stream of the portable path.

DEEP = {
    "n_layer": 7,
    "n_head": 8,
    "n_kv_head": 1,
    "n_embd": 64,
}  # in blocks of 4 layers (below): a full one, and a rest
FAST_VARIANTS = [
    DEEP,
    DEEP | ROWS[3],
    DEEP | ROWS[5],
    DEEP | {"depth_window": 1},
    DEEP | {"depth_window": 3},
    DEEP | {"depth_window": 9},
    DEEP | {"norm": "pre", "depth_rope": False},
    {"n_layer": 2},
    {"n_layer": 12},
    {"n_layer": 12, "n_head": 6, "n_kv_head": 2, "n_embd": 48},  # three heads a group: no power of two
    {"n_layer": 12, "n_kv_head": 1},
    {"n_layer": 18, "n_head": 2, "n_kv_head": 2, "n_embd": 16},
]
torch_compile_warns = pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:TensorFloat32 tensor cores")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture
def small_blocks(monkeypatch):
    """So that models of few layers have slots of more than one block."""
    monkeypatch.setattr(moda._Slots, "BLOCK", 4)


TIGHT = 1e-5  # float32 rounds to 6e-8; with weights as they are initialised a deep model amplifies that tenfold


def fast_and_plain(device="cpu", **variant):
    """A float32 model with the fast stream, its twin in float64 without, and tokens."""
    if device == "cpu":
        pytest.importorskip("triton")
    torch.manual_seed(0)
    model = MoDA(replace(SMALL, **variant), impl="triton").to(device)
    plain = copy.deepcopy(model).double()
    plain.impl = "torch"
    assert model._stream(model.cos) is FastDepthStream and plain._stream(plain.cos) is DepthStream
    return model, plain, tokens().to(device), tokens(seed=2).to(device)


def worst(got, want):
    """The largest relative error ||x - ref|| / ||ref|| of the gradients {name: gradient}."""
    return max(((got[name].double() - grad).norm() / grad.norm()).item() for name, grad in want.items())


@on_each_device
@pytest.mark.filterwarnings(
    "ignore:.*encountered in matmul:RuntimeWarning"
)  # in slots that nobody reads, never written
@pytest.mark.parametrize("variant", FAST_VARIANTS, ids=name_of)
def test_fast_stream_gradients(variant, device, request):
    if variant.get("n_layer", 0) < 8:
        request.getfixturevalue("small_blocks")
    model, plain, idx, targets = fast_and_plain(device, **variant)
    assert worst(gradients(model, idx, targets), gradients(plain, idx, targets)) <= TIGHT


@on_each_device
def test_fast_stream_under_autograd(device, small_blocks):
    """Accumulation, several graphs at once, one used twice, one that broke off, one that starts in the middle."""
    model, plain, idx, targets = fast_and_plain(device, **DEEP)
    want = gradients(plain, idx, targets)
    first, second = model(idx, targets)[1], model(targets, idx)[1]
    model.zero_grad()
    second.backward()
    second_grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    first.backward(retain_graph=True)
    assert worst({name: p.grad for name, p in model.named_parameters()}, want) <= TIGHT
    first.backward()  # adds the same once more
    twice = {name: 2 * grad for name, grad in want.items()}
    assert worst({name: p.grad for name, p in model.named_parameters()}, twice) <= TIGHT
    assert worst(second_grads, gradients(plain, targets, idx)) <= TIGHT

    loss = model(idx, targets)[1]

    def broken(grad):
        raise RuntimeError("broke off")

    handle = model.blocks[2].attn.wq.weight.register_hook(broken)
    with pytest.raises(RuntimeError, match="broke off"):
        loss.backward(retain_graph=True)
    handle.remove()
    model.zero_grad()
    loss.backward()
    assert worst({name: p.grad for name, p in model.named_parameters()}, want) <= TIGHT

    def of_layer_4(model):
        seen = []
        handle = model.blocks[4].attn.register_forward_hook(lambda module, args, out: seen.append(out))
        model(idx)
        handle.remove()
        loss = (seen[0] * torch.linspace(-1, 1, DEEP["n_embd"], device=device)).sum()
        parameters = [p for block in model.blocks[:4] for p in block.parameters()]
        return dict(enumerate(torch.autograd.grad(loss, parameters)))

    assert worst(of_layer_4(model), of_layer_4(plain)) <= TIGHT
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0].double(), plain(idx)[0], rtol=1e-4, atol=1e-4)


@on_each_device
@pytest.mark.parametrize("row", (3, 4))
def test_fast_stream_when_only_slots_pass_gradients(row, device):
    """The residual stream is cut below the last layer: in row 3 nobody asks for the gradient of the attention there."""
    model, plain, idx, targets = fast_and_plain(device, **ROWS[row], norm="pre")

    def of_slots(model):
        last = model.blocks[-1]
        forward, last.forward = last.forward, lambda x, *args: type(last).forward(last, x.detach(), *args)
        grads = gradients(model, idx, targets)
        last.forward = forward
        return {name: grad for name, grad in grads.items() if grad is not None}

    got, want = of_slots(model), of_slots(plain)
    assert "blocks.0.attn.kv.wv.weight" in want and worst(got, want) <= TIGHT
    assert not any(got[name].any() for name in got.keys() - want.keys())  # zero instead of None


@on_each_device
def test_fast_stream_of_frozen_weights(device):
    model, plain, idx, targets = fast_and_plain(device)
    for m in (model, plain):
        m.embed.requires_grad_(False)
        m.blocks[:2].requires_grad_(False)
    frozen, wanted = (
        {name: grad for name, grad in gradients(m, idx, targets).items() if grad is not None} for m in (model, plain)
    )
    assert frozen.keys() == wanted.keys() and worst(frozen, wanted) <= TIGHT
    assert not model.requires_grad_(False)(idx)[0].requires_grad


@on_each_device
def test_checkpointed_layers(device):
    model, plain, idx, targets = fast_and_plain(device, **DEEP)
    want = gradients(plain, idx, targets)
    for either in (model, plain):
        either.checkpoint = True
        assert worst(gradients(either, idx, targets), want) <= TIGHT


@pytest.mark.parametrize("part", ["all", "first", "last", "last attention"])
@pytest.mark.parametrize("which", ["fast", "plain"])
def test_reentrant_checkpointing_is_refused(which, part):
    model, plain, idx, targets = fast_and_plain()
    model = model if which == "fast" else plain
    last = model.blocks[-1]
    for module in {"all": model.blocks, "first": model.blocks[:1], "last": [last]}.get(part, [last.attn]):
        forward = module.forward
        module.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss = model(idx, targets)[1]
        assert part != "first", "the next layer reads its slots with gradients: that raises in the forward"
        loss.backward()


def test_reentrant_checkpointing_of_the_ffn():
    """It touches no stream: its slot is passed on by the block."""
    model, plain, idx, targets = fast_and_plain()
    want = gradients(plain, idx, targets)
    for block in model.blocks:
        forward = block.ffn.forward
        block.ffn.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=True)
    assert worst(gradients(model, idx, targets), want) <= TIGHT


@on_each_device
@pytest.mark.parametrize("of", ["loss", "last attention", "first attention"])
def test_second_derivative_of_the_fast_stream_is_refused(of, device):
    model, _, idx, targets = fast_and_plain(device)
    seen = []
    attn = model.blocks[-1 if of == "last attention" else 0].attn
    attn.register_forward_hook(lambda module, args, out: seen.append(out))
    loss = model(idx, targets)[1]
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(loss if of == "loss" else seen[0].sum(), model.embed.weight, create_graph=True)


@on_each_device
@pytest.mark.parametrize("layer", [1, 2])
def test_a_reader_that_lies_otherwise_in_memory(layer, device):
    model, plain, idx, targets = fast_and_plain(device)
    for m in (model, plain):
        hook = lambda module, args: (args[0].contiguous(), *args[1:])  # noqa: E731
        m.blocks[layer].attn.register_forward_pre_hook(hook)
    assert worst(gradients(model, idx, targets), gradients(plain, idx, targets)) <= TIGHT


@pytest.mark.parametrize("with_grad", [True, False])
def test_forward_mode(with_grad):
    """Along the gradient: its squared norm."""
    model, plain, idx, targets = fast_and_plain()
    grads = {name: grad for name, grad in gradients(plain, idx, targets).items() if ".attn." in name}
    weights = {name: p.detach() for name, p in model.named_parameters()}
    direction = {name: grads.get(name, torch.zeros_like(p)).float() for name, p in weights.items()}
    with torch.set_grad_enabled(with_grad):
        loss = lambda p: torch.func.functional_call(model, p, (idx, targets))[1]  # noqa: E731
        tangent = torch.func.jvp(loss, (weights,), (direction,))[1].item()
    assert tangent == pytest.approx(sum(grad.square().sum().item() for grad in grads.values()), rel=1e-4)


def test_autocast_decides_which_stream():
    model, *_ = fast_and_plain()
    with torch.autocast("cpu", torch.bfloat16):  # which Triton's interpreter computes wrongly
        assert model._stream(model.cos) is DepthStream


@on_each_device
@pytest.mark.parametrize("checkpointed", [False, True])
def test_fast_stream_leaves_nothing_behind(checkpointed, device):
    model, _, idx, targets = fast_and_plain(device)
    model.checkpoint = checkpointed
    slots = []
    original = moda._Slots.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            moda._Slots, "__init__", lambda self, *a: (slots.append(weakref.ref(self)), original(self, *a))[1]
        )
        gc.collect()
        gc.disable()  # by reference counting alone
        try:
            for _ in range(3):
                model(idx, targets)[1].backward()
            model(idx, targets)  # and never differentiated
            alive = [ref() is not None for ref in slots]
        finally:
            gc.enable()
    assert alive == [False] * 4


@on_each_device
@pytest.mark.parametrize("frozen", [0, 3])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_slots_live_as_long_as_the_graph(checkpointed, frozen, device):
    """Also while the loss is held, and with it the nodes of the graph."""
    model, _, idx, targets = fast_and_plain(device, n_layer=5)
    model.checkpoint = checkpointed
    model.embed.requires_grad_(False)
    model.blocks[:frozen].requires_grad_(False)
    slots, original = [], moda._Slots.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moda._Slots, "__init__", lambda self, *a: (slots.append(self), original(self, *a))[1])
        loss = model(idx, targets)[1]
    loss.backward(retain_graph=True)
    assert slots[0].k is not None and not slots[0].readers and slots[0].sums is None
    loss.backward()
    assert slots[0].k is slots[0].v is None and not slots[0].readers and not slots[0].done


@on_each_device
def test_backward_within_the_forward(device):
    """Of a layer's output, by a hook: the layers above still need the slots."""
    model, plain, idx, _ = fast_and_plain(device, n_layer=5)
    for m in (model, plain):

        def backward(module, args, out, m=m):
            torch.autograd.grad(out.square().sum(), m.embed.weight)

        m.blocks[2].attn.wo.register_forward_hook(backward)
    torch.testing.assert_close(model(idx)[0].double(), plain(idx)[0], rtol=1e-4, atol=1e-4)


def test_backward_within_its_own_backward():
    model, _, idx, targets = fast_and_plain(n_layer=5)
    loss = model(idx, targets)[1]
    inner = lambda grad: torch.autograd.grad(loss, model.blocks[3].attn.wq.weight, retain_graph=True)  # noqa: E731
    handle = model.blocks[2].attn.wo.weight.register_hook(lambda grad: (handle.remove(), inner(grad), None)[-1])
    with pytest.raises(RuntimeError, match="within its own backward"):
        loss.backward(retain_graph=True)


@pytest.mark.parametrize("layer", ["wq", "kv.wv", "ffn_kv.wk"])
def test_a_hook_on_a_joined_projection(layer):
    """Works with gradients, where such projections are one product, as it does without."""
    model, idx = random_model(), tokens()
    usual = model(idx)[0]
    hook = lambda module, args, out: -out  # noqa: E731 - a factor would be normalised away
    model.blocks[0].attn.get_submodule(layer).register_forward_hook(hook)
    logits = model(idx)[0]
    assert (logits - usual).norm() > 1e-3 * usual.norm()
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], logits)


@torch_compile_warns
@pytest.mark.parametrize("compiled", [False, True])
def test_overridden_methods_are_used(compiled):
    class Doubled(MoDA):
        def head(self, x, targets=None):
            return super().head(2 * x, targets)

    torch.manual_seed(0)
    model, idx = MoDA(SMALL), tokens()
    usual, model.__class__ = model(idx)[0], Doubled
    model = model.compile_parts() if compiled else model
    torch.testing.assert_close(model(idx)[0], 2 * usual, rtol=1e-4, atol=1e-5)


@torch_compile_warns
def test_forward_mode_of_compiled_parts():
    model, plain, idx, targets = fast_and_plain()
    grads = gradients(plain, idx, targets)
    model.compile_parts()(idx, targets)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(p.detach(), grads[name].float()) for name, p in model.named_parameters()}
        tangent = forward_ad.unpack_dual(torch.func.functional_call(model, dual, (idx, targets))[1]).tangent
    assert tangent.item() == pytest.approx(sum(grad.square().sum().item() for grad in grads.values()), rel=1e-4)


@on_each_device
def test_backward_of_an_early_exit(device):
    """It frees the graph of the layers below. Those above can be differentiated still."""
    model, plain, idx, targets = fast_and_plain(device, n_layer=5)

    def above(m):
        seen = []
        m.blocks[2].register_forward_hook(lambda module, args, out: seen.append(out))
        loss = m(idx, targets)[1]
        seen[0].square().sum().backward()
        return dict(enumerate(torch.autograd.grad(loss, (m.blocks[3].attn.wq.weight, m.blocks[4].ffn.up.weight))))

    assert worst(above(model), above(plain)) <= TIGHT


@on_each_device
@pytest.mark.parametrize("which", ["fast", "plain"])
def test_checkpointing_keeps_nothing_that_it_computed_again(which, device):
    model, plain, idx, targets = fast_and_plain(device, n_layer=5)
    model = model if which == "fast" else plain
    model.checkpoint, streams, original = True, [], moda.DepthStream.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moda.DepthStream, "__init__", lambda self, *a: (streams.append(self), original(self, *a))[1])
        loss = model(idx, targets)[1]
    slots = list(streams[0].k)
    loss.backward()
    assert streams[0].k == slots and (which == "plain" or not streams[0].order.requires_grad)


@pytest.mark.parametrize("which", ["fast", "plain"])
def test_a_layer_that_runs_twice(which):
    model, plain, idx, _ = fast_and_plain()
    model = model if which == "fast" else plain
    model.blocks.insert(1, model.blocks[0])
    with pytest.raises(RuntimeError, match="written twice"):
        model(idx)


@pytest.mark.gpu
def test_backward_on_the_stream_of_the_forward():
    """The gradient of the loss is late: operations that wait for it on the wrong stream read too early."""
    model, plain, idx, targets = fast_and_plain("cuda", **DEEP)
    want, side = gradients(plain, idx, targets), torch.cuda.Stream()
    model.zero_grad()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        loss = model(idx, targets)[1]
        torch.cuda._sleep(100_000_000)  # cycles
    loss.backward()
    torch.cuda.synchronize()
    assert worst({name: p.grad for name, p in model.named_parameters()}, want) <= TIGHT


@on_each_device
@torch_compile_warns
def test_compiled_parts(device):
    model, plain, idx, targets = fast_and_plain(device, **DEEP)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_parts()
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):  # the last writes no slots
        assert worst(gradients(model, idx, targets), gradients(plain, idx, targets)) <= TIGHT
        twin, plain_twin = copy.deepcopy(model), copy.deepcopy(plain)  # have weights of their own
        with torch.no_grad():
            for p in (*twin.parameters(), *plain_twin.parameters()):
                p.mul_(1.5)
        assert worst(gradients(twin, idx, targets), gradients(plain_twin, idx, targets)) <= TIGHT
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 5  # before the first attention, two between, after the last, the head


@on_each_device
@torch_compile_warns
def test_compiled_parts_under_autograd(device, small_blocks):
    """Micro-batches, several graphs at once, one that broke off, one that is never differentiated, one used twice."""
    model, plain, idx, targets = fast_and_plain(device, **DEEP)
    want = gradients(plain, idx, targets)
    torch._dynamo.reset()
    model.compile_parts()

    def check(what):
        assert worst({name: p.grad for name, p in model.named_parameters()}, want) <= TIGHT, what
        model.zero_grad()

    for i in range(2):
        (model(idx[i : i + 1], targets[i : i + 1])[1] / 2).backward()
    check("micro-batches")
    first, second = model(idx, targets)[1], model(targets, idx)[1]
    model(targets, idx)
    first.backward()
    check("the first of two")
    second.backward()
    assert worst({name: p.grad for name, p in model.named_parameters()}, gradients(plain, targets, idx)) <= TIGHT

    def broken(grad):
        raise RuntimeError("broke off")

    handle = model.blocks[2].attn.wq.weight.register_hook(broken)
    with pytest.raises(RuntimeError, match="broke off"):
        model(idx, targets)[1].backward()
    handle.remove()
    model.zero_grad()
    model(idx, targets)[1].backward()
    check("after one that broke off")
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0].double(), plain(idx)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="retain_graph=False"):  # says torch.compile
        model(idx, targets)[1].backward(retain_graph=True)


@pytest.mark.gpu
def test_fast_stream_in_bf16():
    """Whole-model gradients under autocast, against float64, after other models and attention of the same shapes."""
    model, plain, *_ = fast_and_plain("cuda", **DEEP | {"n_embd": 512, "block_size": 128})  # so that cuDNN takes them
    idx, targets = tokens(T=128).cuda(), tokens(T=128, seed=2).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        for other in (ROWS[1], {"norm": "pre"}):
            gradients(MoDA(replace(model.config, **other)).cuda(), idx, targets)
        q = torch.randn(2, 8, 128, 64, device="cuda", requires_grad=True)
        k = q[:, :1].expand(q.shape)
        for x in (q, q.transpose(1, 2).contiguous().transpose(1, 2)):
            F.scaled_dot_product_attention(x, k, k, is_causal=True).square().sum().backward()
    want, portable = gradients(plain, idx, targets), copy.deepcopy(model)
    portable.impl = "torch"
    with torch.autocast("cuda", torch.bfloat16):
        got, portable_grads = gradients(model, idx, targets), gradients(portable, idx, targets)
    for name, grad in want.items():  # bf16 everywhere: no worse than the portable path, which rounds in the same places
        error, usual = ((g[name].double() - grad).norm() / grad.norm() for g in (got, portable_grads))
        assert error <= 1.5 * usual + 1e-3, name


def ddp_worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, _, idx, targets = fast_and_plain(**DEEP)
    net = DistributedDataParallel(model)  # has to live until the gradients are there
    net(idx[rank : rank + 1], targets[rank : rank + 1])[1].backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_fast_stream_data_parallel(tmp_path):
    _, plain, idx, targets = fast_and_plain(**DEEP)
    torch.multiprocessing.spawn(ddp_worker, (tmp_path,), nprocs=2)
    want = gradients(plain, idx, targets)
    for rank in range(2):
        assert worst(torch.load(tmp_path / f"{rank}.pt"), want) <= TIGHT


@pytest.mark.gpu
def test_captured_step():
    """The CUDA graph gives the loss and gradients of the step it recorded, for other inputs too."""
    model, _, idx, targets = fast_and_plain("cuda", **DEEP | {"n_embd": 128})
    step = train_step(model)
    replay = capture(step, idx, targets)
    assert replay.step is step  # and so the model lives as long as the graph
    graph_grads = [p.grad for p in model.parameters()]
    with pytest.raises(ValueError, match="recorded with"):
        replay(idx[:1], targets)
    for x, y in ((targets, idx), (idx, targets)):
        loss = replay(x, y).clone()
        assert all(p.grad is grad for p, grad in zip(model.parameters(), graph_grads, strict=True))
        got = [grad.clone() for grad in graph_grads]
        torch.testing.assert_close(step(x, y), loss)
        torch.testing.assert_close([p.grad for p in model.parameters()], got)
        for p, grad in zip(model.parameters(), graph_grads, strict=True):
            p.grad = grad


@pytest.mark.gpu
def test_no_leak_in_1000_steps():
    model, _, idx, targets = fast_and_plain("cuda")
    held = []
    for _ in range(1000):
        model(idx, targets)[1].backward()
        model.zero_grad(set_to_none=True)
        held.append(torch.cuda.memory_allocated())
    assert len(set(held[10:])) == 1


@pytest.mark.gpu
def test_training_curve():
    """500 steps through the fast path lie on those of the reference path: text of a random Markov chain, whose entropy
    is known, is learnt equally fast."""
    generator = torch.Generator().manual_seed(0)
    chain = (2.5 * torch.randn(64, 64, generator=generator)).softmax(-1)
    text = torch.randint(64, (500 * 32, 1), generator=generator)
    for _ in range(64):
        text = torch.cat([text, torch.multinomial(chain[text[:, -1]], 1, generator=generator)], 1)  # (16000, 65)
    text, curves = text.cuda(), {}
    entropy = -(chain * chain.log()).sum(-1)[text[:, :-1].cpu()].mean().item()
    for impl in ("triton", "reference"):
        torch.manual_seed(0)
        model = MoDA(MoDAConfig(64, 64, n_layer=8, n_head=6, n_kv_head=2, n_embd=96), impl).cuda()
        replay = capture(train_step(model), text[:32, :-1], text[:32, 1:])
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3, (0.9, 0.95))
        losses = []
        for step, rows in enumerate(text.split(32)):
            losses.append(replay(rows[:, :-1], rows[:, 1:]).item())
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 100)
            optimizer.step()
        curves[impl] = torch.tensor(losses).view(25, 20).mean(1)
    fast, reference = curves.values()
    print(f"entropy {entropy:.3f}; 20-step means, fast {fast.tolist()}, reference {reference.tolist()}")
    assert fast[0] > entropy + 0.5 and fast[-1] < entropy + 0.2
    assert (fast - reference).abs().max() < 0.02
