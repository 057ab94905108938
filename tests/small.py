"""Small models that the tests share, with weights that matter, and what they compare of them."""

from dataclasses import replace

import pytest
import torch

from moda import MoDA, MoDAConfig

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
    {"depth_every": 2, "n_layer": 6},
    {"depth_every": 3, "n_layer": 5, "ffn_kv": False},
    {"depth_every": 4, "norm": "pre", "attn_kv": True},  # the last layer alone
    {"depth_first": 1, "depth_window": 2, "n_layer": 5},
    {"depth_first": 3, "depth_window": 1, "n_layer": 5, "norm": "pre"},
    {"depth_first": 1, "depth_window": 1, "n_layer": 4, "ffn_kv": False},
    {"depth_first": 2, "depth_window": 2},  # all of them
    {"depth_first": 1, "depth_window": 1, "depth_every": 2, "n_layer": 6, "attn_kv": True},
    {"attn_slot": False},
    {"attn_slot": False, "depth_first": 1, "depth_window": 1, "norm": "pre", "n_layer": 4},
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


def worst(got, want):
    """The largest relative error ||x - ref|| / ||ref|| of the gradients {name: gradient}."""
    return max(((got[name].double() - grad).norm() / grad.norm()).item() for name, grad in want.items())
