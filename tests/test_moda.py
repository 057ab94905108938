"""The model: against the same model written naively, and property by property on whole models."""

import copy
import dataclasses
import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from small import ROWS, SMALL, depth_variants, each_variant, gradients, name_of, random_model, tokens
from torch.utils.flop_counter import FlopCounterMode

import kernel
import moda
from experiments.common import flops, gradient_bytes
from kernel import moda_attention_reference
from moda import PRESETS, DepthStream, KVCache, MoDA, MoDAConfig, plain

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
        window, reading = c.depth_window or len(stream), range(c.n_layer - 1, -1, -c.depth_every)
        kept = [n < c.depth_first or n >= len(stream) - window for n in range(len(stream))]
        read = {name: slot for (name, slot), keep in zip(stream.items(), kept, strict=True) if keep and i in reading}
        depth = [torch.stack(x) for x in zip(*read.values(), strict=True)] if read else [None, None]
        attended.append((k, v, read))
        o = moda_attention_reference(q, k, v, *depth).transpose(1, 2).reshape(B, T, c.n_embd)
        x = x + linear(o, f"{attn}.wo")
        if c.norm == "post":
            x = rms_norm(x, f"{block}.attn_norm")
        unread = (torch.full_like(k, float("nan")),) * 2
        if c.depth_kv and c.attn_slot and i + 1 < c.n_layer:
            if not c.attn_kv:  # reuse the sequence KV
                stream[f"attn {i}"] = slot(h, attn, "kv")
            else:
                made = f"{attn}.attn_kv.wk.weight" in w
                stream[f"attn {i}"] = slot(h, attn, "attn_kv") if made else unread
        h = rms_norm(x, f"{block}.ffn_norm") if c.norm == "pre" else x
        if c.ffn_kv and i + 1 < c.n_layer:
            stream[f"ffn {i}"] = slot(h, attn, "ffn_kv") if f"{attn}.ffn_kv.wk.weight" in w else unread
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
        assert model.config.slot_names(layer) == list(read)
        torch.testing.assert_close(call["k"], k)
        torch.testing.assert_close(call["v"], v)
        if not read:
            assert call["depth_k"] == call["depth_v"] == []
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
    assert model(idx, torch.full_like(idx, -1))[1].isnan()  # of nothing there is no mean


def test_rotary_angles():
    model = MoDA(replace(SMALL, block_size=1000, rope_theta=500.0))
    assert model.cos.shape == model.sin.shape == (1000, 4)  # block_size, head_dim / 2
    for position in (0, 1, 999):
        for i in range(4):
            angle = position * 500.0 ** (-2 * i / 8)
            assert model.cos[position, i].item() == pytest.approx(math.cos(angle), abs=1e-7)
            assert model.sin[position, i].item() == pytest.approx(math.sin(angle), abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rotary_angles_have_the_precision_of_the_model(dtype):
    """And no less than float32, whichever way the model came to its dtype."""
    config = replace(SMALL, block_size=100_000)
    angle = 99_999 * 10_000.0 ** (-2 / 8)
    for model in (MoDA(config).to(dtype), MoDA(config).bfloat16().to(dtype)):
        wide = torch.promote_types(dtype, torch.float32)
        assert model.cos.dtype == wide
        assert model.cos[-1, 1].item() == pytest.approx(math.cos(angle), abs=torch.finfo(wide).eps)
        assert model(tokens())[0].dtype == dtype


def test_a_float64_model_computes_in_float64():
    """In each step: changed a little, every result moves by less than float32 could resolve."""
    model, seen = random_model(), []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, out: seen.append(out))
    model(tokens())
    flat = [x for out in seen for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor)]
    assert {x.dtype for x in flat} == {torch.float64}


def test_model_made_without_memory():
    """On the meta device, then to_empty: the rotary table, which no state_dict holds, is made anew. Module by module,
    as sharding does it, the model's own turn comes before that of its embedding."""
    for recurse in (True, False):
        with torch.device("meta"):
            model = MoDA(SMALL)
        for module in [model] if recurse else model.modules():
            module.to_empty(device="cpu", recurse=recurse)
        model.load_state_dict(MoDA(SMALL).state_dict())
        assert torch.equal(model.cos, MoDA(SMALL).cos) and torch.equal(model.sin, MoDA(SMALL).sin)
    cos = model.cos
    assert model.float().cpu().cos is cos  # where nothing changes, a recorded CUDA graph still finds it


@pytest.mark.parametrize("change", [lambda model: model, copy.deepcopy, nn.Module.double], ids=["", "copy", "cast"])
def test_a_model_on_the_meta_device_takes_the_weights_it_is_given(change):
    """assign=True passes by `_apply`; no state_dict holds the rotary table."""
    trained, idx = random_model(), tokens(T=4)
    with torch.device("meta"):
        model = change(MoDA(SMALL))
    model.load_state_dict(trained.state_dict(), assign=True)
    model = change(model)
    assert torch.equal(model.cos, trained.cos) and torch.equal(model.sin, trained.sin)
    torch.testing.assert_close(model(idx)[0], trained(idx)[0], rtol=0, atol=0)
    assert torch.equal(model.generate(idx.tolist(), 3, 0)[0], trained.generate(idx.tolist(), 3, 0)[0])


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
    names = model.config.slot_names(SMALL.n_layer - 1)
    original_write = DepthStream.write
    outputs = {}
    for layer, block in enumerate(model.blocks):
        block.attn.wo.register_forward_hook(lambda module, args, out, layer=layer: outputs.update({layer: out}))

    def run(changed_slot):
        def write(self, layer, kind, kv):
            if kv is not None and f"{kind} {layer.layer}" == changed_slot:
                mark = torch.zeros_like(kv[0])
                mark[0, :, t] = 1.0
                kv = kv[0] + mark, kv[1] - mark
            original_write(self, layer, kind, kv)

        monkeypatch.setattr(DepthStream, "write", write)
        return model(idx)[0], dict(outputs)

    logits, before = run(None)
    only_t = [[position == t for position in range(8)], [False] * 8]
    from_t = [[position >= t for position in range(8)], [False] * 8]
    for name in names:
        logits_after, after = run(name)
        reader = next(layer for layer in range(SMALL.n_layer) if name in model.config.slot_names(layer))
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
    ({**ROWS[4], "attn_slot": False}, FFN[:3], FFN),
    ({**ROWS[4], "attn_slot": False, "depth_window": 1, "depth_first": 1}, ["ffn 0", "ffn 2"], FFN),
    ({**ROWS[4], "depth_every": 2}, [], FFN),  # layers 4 and 2 read
    ({**ROWS[4], "depth_every": 3}, [], FFN),  # layers 4 and 1
    ({**ROWS[4], "depth_every": 99}, [], FFN),  # layer 4
    ({**ROWS[5], "depth_every": 2, "depth_window": 1}, [], ["ffn 1", "ffn 3"]),
    ({**ROWS[4], "depth_window": 2, "depth_first": 1}, ["attn 0", "attn 2", "ffn 2"], FFN),
    ({**ROWS[4], "depth_window": 2, "depth_first": 3}, ["attn 0", "ffn 0", "attn 1", "attn 2", "ffn 2"], FFN),
    ({**ROWS[4], "depth_window": 2, "depth_first": 4}, ALL[:6], FFN),
    ({**ROWS[4], "depth_window": 5, "depth_first": 99}, ALL[:6], FFN),
    ({**ROWS[5], "depth_window": 1, "depth_first": 1}, ["attn 0", "ffn 2"], ["attn 0", *FFN]),
    ({**ROWS[5], "depth_window": 1, "depth_first": 1, "depth_every": 3}, [], ["attn 0", "ffn 0", "ffn 3"]),
]


@pytest.mark.parametrize("variant, layer_3, projections", SCHEDULE, ids=lambda x: name_of(x) if type(x) is dict else "")
def test_slot_schedule(variant, layer_3, projections):
    model = random_model(n_layer=5, **variant)
    c, window, first = model.config, variant.get("depth_window", 99), variant.get("depth_first", 0)
    writes_attn = c.depth_kv and c.attn_slot
    possible = [name for name in ALL if (name in ATTN and writes_attn) or (name in FFN and c.ffn_kv)]
    for layer in range(5):  # the first and the most recent ones of what the layers below may write
        below = [name for name in possible if int(name.split()[1]) < layer]
        reads = layer in range(4, -1, -variant.get("depth_every", 1))
        assert c.slot_names(layer) == (below[:-window][:first] + below[-window:] if reads else [])
    assert model.config.slot_names(3) == layer_3

    modules = [name for name, _ in model.named_modules() if name.endswith((".attn_kv", ".ffn_kv"))]
    assert modules == [f"blocks.{name.split()[1]}.attn.{name.split()[0]}_kv" for name in projections]
    assert set(model.state_dict()) >= {f"{name}.{w}.weight" for name in modules for w in ("wk", "wv")}

    stream = DepthStream()  # and what nobody reads is not written
    model.hidden(tokens(), stream)
    assert len(stream.slots) == len({name for layer in range(5) for name in c.slot_names(layer)})


@each_variant
def test_plain_is_the_same_shape_without_depth(variant):
    config, depth = replace(SMALL, **variant), {**ROWS[1], "attn_slot": True, "depth_window": None}
    depth |= {"depth_first": 0, "depth_every": 1}
    baseline = plain(config)
    assert all(getattr(baseline, field) == off for field, off in depth.items()) and baseline.slot_kinds == ()
    assert replace(baseline, **{field: getattr(config, field) for field in depth}) == config


def test_slot_names_errors():
    for layer in (-1, 3, 99):
        with pytest.raises(ValueError, match="layer"):
            random_model().config.slot_names(layer)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_ffn_slot_comes_from_what_the_ffn_reads(norm):
    model = random_model(norm=norm)
    block, seen = model.blocks[1], {}
    block.ffn.register_forward_pre_hook(lambda module, args: seen.update(ffn=args[0]))
    block.ffn.gate.register_forward_pre_hook(lambda module, args: seen.update(gate=args[0]))
    block.attn.ffn_kv.wk.register_forward_pre_hook(lambda module, args: seen.update(slot=args[0]))
    block.attn_norm.register_forward_hook(lambda module, args, out: seen.update(attn_norm=out))
    block.ffn_norm.register_forward_hook(lambda module, args, out: seen.update(ffn_norm=out))
    model(tokens())
    assert torch.equal(seen["slot"], seen["ffn"]) and torch.equal(seen["slot"], seen["gate"])
    assert torch.equal(seen["slot"], seen["attn_norm" if norm == "post" else "ffn_norm"])


def test_attention_slot_is_the_sequence_kv(attention_calls):
    model = random_model()
    model(tokens())
    for layer in range(SMALL.n_layer - 1):
        mine, reader = attention_calls[layer], attention_calls[layer + 1]
        slot = model.config.slot_names(layer + 1).index(f"attn {layer}")
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
    for start in (0, 37):
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
    got = [F.linear(model.hidden(chunk, cache=cache), model.embed.weight) for chunk in idx.split(chunks, dim=1)]
    assert (torch.cat(got, dim=1) - want).abs().max() < 1e-10
    assert cache.length == 16
    with pytest.raises(ValueError, match="block_size"):
        model.hidden(idx[:, :1], cache=cache)


def test_cache_holds_the_sequence_alone():
    caches = {}
    for row, variant in ROWS.items():
        cache = caches[row] = KVCache(replace(SMALL, **variant), 2)
        with torch.no_grad():
            random_model(**variant).hidden(tokens(T=5), cache=cache)
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


def test_stop():
    model, idx = random_model(), tokens(3, 4)
    want = model.generate(idx, 40, temperature=0)
    stop = want[0, 9].item()
    ends = [4 + (row[4:].tolist().index(stop) + 1 if stop in row[4:] else 40) for row in want]
    assert len(set(ends)) > 1
    assert torch.equal(model.generate(idx, 40, temperature=0, stop=stop), want[:, : max(ends)])
    rows = model.generate(list(idx), 40, temperature=0, stop=stop)
    assert all(torch.equal(row, w[:end]) for row, w, end in zip(rows, want, ends, strict=True))


def test_nearly_greedy():
    model, idx = random_model(), tokens(3, 4)
    want = model.generate(idx, 9, temperature=0)
    for temperature in (1e-42, 1e-6, 1e-4):
        assert torch.equal(model.generate(idx, 9, temperature=temperature), want)


# ------------------------------------------------------------------------------------------------------ attention maps


@each_variant
def test_attention_maps_reproduce_the_output(variant, attention_calls):
    model, idx, T = random_model(**variant), tokens(), 9
    maps = model.attention_maps(idx)
    assert len(maps) == model.config.n_layer
    for layer, (p, call) in enumerate(zip(maps, attention_calls, strict=True)):
        n_slot, group = len(model.config.slot_names(layer)), model.config.n_head // model.config.n_kv_head
        assert p.shape == (2, 4, T, T + n_slot) and not p.requires_grad
        torch.testing.assert_close(p.sum(-1), torch.ones(2, 4, T, dtype=torch.float64))
        assert (p[..., :T] > 0).all(dim=(0, 1)).equal(torch.ones(T, T).tril().bool())
        assert (p[..., T:] > 0).all()
        o = p[..., :T] @ call["v"].repeat_interleave(group, dim=1)
        for s in range(n_slot):
            o = o + p[..., T + s, None] * call["depth_v"][s].repeat_interleave(group, dim=1)
        torch.testing.assert_close(o, call["o"])


def test_some_attention_maps():
    model, idx = random_model(), tokens()
    maps = model.attention_maps(idx)
    for layers, heads in ([2, 0], [3, 1]), (None, [2]), (range(1, 2), None):
        some = model.attention_maps(idx, layers, heads)
        wanted = [p for layer, p in enumerate(maps) if layers is None or layer in layers]
        for p, q in zip(wanted, some, strict=True):
            torch.testing.assert_close(p if heads is None else p[:, heads], q)


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


def test_bytes_of_the_slots_gradients():
    """Three layers in row 3, by hand: slot 1 has one reader, slot 0 two, and each is one call."""
    config, B, T = replace(SMALL, ffn_kv=False), 5, SMALL.block_size
    kv, q, lse = B * T * config.n_kv_head * config.head_dim, B * T * config.n_embd, B * T * config.n_head
    a_slot, a_reader = 2 * kv * (2 + 2), 2 * (2 * q + 4 * lse)  # K, V, dK, dV in bf16; q, do in bf16, lse, delta
    assert gradient_bytes(config, B) == 2 * a_slot + 3 * a_reader
    deep = replace(config, n_layer=12)  # reading all 11 readers of each slot would be the naive way, blocks take less
    naive = sum(a_slot + n_reader * a_reader for n_reader in range(1, 12))
    assert 11 * a_slot + 11 * a_reader < gradient_bytes(deep, B) < naive
    assert gradient_bytes(plain(config), B) == 0


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


@pytest.mark.parametrize("row", [3, 4])
def test_memory_grows_linearly_with_depth(row):
    """The forward keeps a fixed number of bytes a layer for the backward: a slot is kept once, not by each reader."""
    kept = []
    for n_layer in (8, 16, 32):
        model, storages = MoDA(replace(SMALL, n_layer=n_layer, **ROWS[row])), {}

        def keep(x, storages=storages):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(tokens(), tokens(seed=2))[1]
        kept.append(sum(storages.values()))
        del loss
    assert kept[2] - kept[1] == pytest.approx(2 * (kept[1] - kept[0]), rel=0.05)


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
        dtypes = {x.dtype for x in (call["q"], call["k"], call["v"], *call["depth_k"], *call["depth_v"], call["o"])}
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
    assert set(PRESETS) == {"tiny", "deep", "paper-24l", "lean-24l", "paper-48l", "paper-700m"}
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
        *(({"depth_every": value}, ["depth_every"]) for value in (0, -2, 1.0, True, None)),
        ({"depth_kv": False, "ffn_kv": False, "depth_every": 2}, ["depth_every", "depth_kv"]),
        ({"depth_first": 1}, ["depth_first", "depth_window"]),
        *(({"attn_slot": False, **more}, ["attn_slot", "ffn_kv"]) for more in ({"ffn_kv": False}, {"attn_kv": True})),
        *(({"depth_first": value, "depth_window": 2}, ["depth_first"]) for value in (-1, 1.0, True, None)),
        ({"n_head": 3}, ["n_embd", "n_head"]),
        ({"n_kv_head": 3}, ["n_head", "n_kv_head"]),
        ({"n_kv_head": 8}, ["n_head", "n_kv_head"]),
        ({"n_embd": 12, "n_head": 4}, ["n_embd", "2 * n_head"]),
        ({"norm": "both"}, ["norm", "both"]),
        ({"norm": None}, ["norm"]),
        ({"rope_theta": 0}, ["rope_theta"]),
        *(({"rope_theta": value}, ["rope_theta"]) for value in ("10000", True, math.inf, math.nan)),
        ({"qk_norm": "False"}, ["qk_norm", "bool"]),
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
        with pytest.raises(ValueError, match="idx"):
            model.generate(idx, 1)


def test_other_errors():
    model, idx = random_model(), tokens()
    with pytest.raises(ValueError, match=r"targets.*\(2, 8\).*\(2, 9\)"):
        model(idx, idx[:, 1:])
    for options, word in [
        ({"temperature": -1.0}, "temperature"),
        *(({"temperature": value}, "temperature") for value in (math.nan, math.inf, 1e300)),
        ({"top_k": 0}, "top_k"),
    ]:
        with pytest.raises(ValueError, match=word):
            model.generate(idx, 1, **options)
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(idx, -1)
