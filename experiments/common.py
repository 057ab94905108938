"""What the measurements and the tests share."""


def flops(config, T):
    """Floating-point operations of one forward pass over T tokens (paper, Table 3): 2 per multiply-add, the full T x T
    attention not halved for causality, LM head counted, norms and other elementwise work not. Needs no weights."""
    c, kv_dim = config, config.n_kv_head * config.head_dim
    layer = 2 * c.n_embd**2 + 2 * c.n_embd * kv_dim + 3 * c.n_embd * c.hidden  # wq, wo, wk, wv, SwiGLU
    projected = ["attn"] * c.attn_kv + ["ffn"] * c.ffn_kv  # slots with a projection of their own
    n_extra = sum(c.is_read(kind, i) for i in range(c.n_layer) for kind in projected)
    weights = c.n_layer * layer + n_extra * 2 * c.n_embd * kv_dim + c.n_embd * c.vocab_size
    keys = sum(T + len(c.slot_names(i)) for i in range(c.n_layer))  # that one query sees, over all layers
    return 2 * T * weights + 4 * T * keys * c.n_embd
