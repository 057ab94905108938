"""Makes notebooks/explore.html, the page to play with: `python notebooks/explore.py` (five minutes on one core).

The page is one file and needs no network. Its text, styles and scripts lie in notebooks/page, one file a section; its
numbers are those of the shipped model, notebooks/deep/moda, computed here. In a notebook, `embed("why")` shows one
section.
"""

import base64
import json
import sys
import zlib
from html import escape
from itertools import product
from pathlib import Path

import numpy as np
import torch

NOTEBOOKS = Path(__file__).resolve().parent
sys.path.insert(0, str(NOTEBOOKS.parent))

from kernel import moda_attention_weights  # noqa: E402
from moda import DepthStream  # noqa: E402
from train_small import load_run  # noqa: E402

PAGE = NOTEBOOKS / "explore.html"
SECTIONS = ("why", "what", "how", "where", "plug")
TEXT = """class Counter:
    def __init__(self, path):
        self.path = path

    def count(self):
        try:
            with open(self.path) as file:
                return len(file.readlines())
        except OSError:
            return None
"""
STEPS = 4095  # a weight is stored in steps of 1 / STEPS; each query's add up to 1 exactly
LOSS_STEP = 0.05  # nats; a loss is stored in one byte


def pack(array):
    """An integer array as text: little endian, compressed, base64."""
    return base64.b64encode(zlib.compress(array.tobytes(), 9)).decode()


def unpack(text, dtype):
    """The integers that `pack` packed, flat."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


def apportion(p):
    """p (rows, n), each row of sum 1 -> uint16 (rows, n): steps of 1 / STEPS whose row sums are exactly STEPS. What
    rounding down leaves over goes to the largest remainders."""
    exact = np.float64(p) / np.float64(p).sum(1, keepdims=True) * STEPS
    steps = np.floor(exact)
    rank = np.argsort(np.argsort(-(exact - steps), axis=1, kind="stable"), axis=1)
    return (steps + (rank < np.rint(STEPS - steps.sum(1, keepdims=True)))).astype("<u2")


def rectangles(n_layer):
    """Every set of (reader, source) pairs that a rectangle over their triangle can mark, once: (first reader, last
    reader, first source, last source), both ends included. A layer reads the slots of the layers below it."""
    n = range(n_layer)
    return [(a, b, c, d) for a, b, c, d in product(n, n, n, n) if c < a <= b and c <= d < b]


class CutStream(DepthStream):
    """Cuts slots, another set of them in each example of the batch.

    gone (B, n_layer, n_slot): whether a layer cannot read a slot. Removed: the key leaves the softmax, its weight goes
    to all other keys. Emptied: the key stays, and its value becomes zero."""

    def __init__(self, gone, emptied):
        super().__init__()
        self.gone, self.emptied = gone, emptied

    def attend(self, layer, q, k, v):
        if not layer.first_slot:
            return super().attend(layer, q, k, v)
        depth_k, depth_v = (torch.stack(x) for x in self.read(layer))  # (n_slot, B, n_kv_head, T, head_dim)
        p = moda_attention_weights(q, k, depth_k)[0]  # (B, n_head, T, T + n_slot)
        T, group = k.shape[2], q.shape[1] // k.shape[1]
        kept = ~self.gone[:, layer.layer, None, None, : layer.first_slot]  # (B, 1, 1, n_slot)
        p = torch.cat([p[..., :T], p[..., T:] * kept], dim=-1)
        if not self.emptied:
            p = p / p.sum(-1, keepdim=True)
        v, depth_v = v.repeat_interleave(group, 1), depth_v.repeat_interleave(group, 2)
        return p[..., :T] @ v + torch.einsum("bhts,sbhtd->bhtd", p[..., T:], depth_v)


def gone_of(rectangle, n_layer):
    """-> (n_layer, 2 * (n_layer - 1)) bool: which slots which layer cannot read. Two slots a layer: attn, ffn."""
    first, last, begin, end = rectangle
    gone = torch.zeros(n_layer, 2 * (n_layer - 1), dtype=torch.bool)
    for reader in range(first, last + 1):
        gone[reader, 2 * begin : 2 * min(end + 1, reader)] = True
    return gone


def kinds_gone(n_layer):
    """What the page's buttons cut beside rectangles -> {name: (n_layer, n_slot) bool}."""
    everything = gone_of((1, n_layer - 1, 0, n_layer - 2), n_layer)
    slot = torch.arange(everything.shape[1])
    return {
        "attention slots": everything & (slot % 2 == 0),
        "FFN slots": everything & (slot % 2 == 1),
        "attn 0": everything & (slot == 0),
    }


@torch.no_grad()
def cut(model, ids, gone, emptied):
    """ids (T + 1,); gone (n_case, n_layer, n_slot) -> of every case and token the loss in steps of LOSS_STEP, at most
    255 of them, the id of the likeliest next token, and its probability in steps of 1 / 255: (n_case, T) each."""
    parts = []
    for some in gone.split(128):
        x = ids[:-1].expand(len(some), -1)
        p = model.head(model.hidden(x, CutStream(some, emptied)))[0].softmax(-1)  # (n_case, T, vocab_size)
        top = p.max(-1)
        loss = -p.gather(-1, ids[1:].expand(len(some), -1).unsqueeze(-1)).squeeze(-1).log()
        parts.append(((loss / LOSS_STEP).round().clamp(max=255), top.indices, (255 * top.values).round()))
    return [torch.cat(x).numpy() for x in zip(*parts, strict=True)]


def spell(tokenizer):
    """What each token says: a list of strings. A byte that is only part of a character becomes �."""
    texts = [tokenizer.decode([token]) for token in range(tokenizer.n_vocab)]
    texts[tokenizer.eot_token] = "<end>"
    return texts


def token_ids(tokenizer):
    return torch.tensor([tokenizer.eot_token, *tokenizer.encode_ordinary(TEXT)])


class StateStream(DepthStream):
    """Keeps one query's logits and values: the page's online softmax runs over them."""

    def __init__(self, layer, head, t):
        super().__init__()
        self.at = layer, head, t

    def attend(self, layer, q, k, v):
        number, head, t = self.at
        if layer.layer == number:
            kv_head = head // (q.shape[1] // k.shape[1])
            depth_k, depth_v = self.read(layer)
            keys = torch.cat([k[0, kv_head, : t + 1], torch.stack([x[0, kv_head, t] for x in depth_k])])
            self.values = torch.cat([v[0, kv_head, : t + 1], torch.stack([x[0, kv_head, t] for x in depth_v])])
            self.logits = keys @ q[0, head, t] * q.shape[-1] ** -0.5  # (t + 1 + n_slot,)
        return super().attend(layer, q, k, v)


@torch.no_grad()
def how_data(model, tokenizer, layer=6, head=3, t=11):
    """The logits and values that one query of the shipped model meets."""
    ids = token_ids(tokenizer)
    model.hidden(ids[None, :-1], stream := StateStream(layer, head, t))
    texts = spell(tokenizer)
    return {
        "layer": layer,
        "head": head,
        "names": [texts[i] for i in ids[: t + 1]] + model.config.slot_names(layer),
        "n_seq": t + 1,
        "z": [round(z, 4) for z in stream.logits.tolist()],
        "v": [[round(x, 3) for x in row] for row in stream.values.tolist()],
    }


@torch.no_grad()
def where_data(model, tokenizer, n_top=5):
    """Every attention map of the text, and what the model predicts there."""
    ids, texts, config = token_ids(tokenizer), spell(tokenizer), model.config
    x, T = ids[None, :-1], len(ids) - 1
    weights = []
    for p in model.attention_maps(x):  # (1, n_head, T, T + n_slot)
        for t in range(T):  # of each head: the t + 1 tokens it can see, then the slots
            weights.append(apportion(torch.cat([p[0, :, t, : t + 1], p[0, :, t, T:]], dim=-1).numpy()).ravel())
    top = model(x)[0][0].softmax(-1).topk(n_top)
    return {
        "tokens": [texts[i] for i in ids],
        "slots": [config.slot_names(layer) for layer in range(config.n_layer)],
        "n_head": config.n_head,
        "steps": STEPS,
        "weights": pack(np.concatenate(weights)),
        "top": [
            [[texts[i], round(p, 4)] for i, p in zip(*row, strict=True)]
            for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ],
    }


def plug_data(model, tokenizer):
    """What every cut does to the text. Case 0 cuts nothing, then come the rectangles, then `kinds_gone`; first all of
    them removed, then all emptied."""
    ids, texts, n_layer = token_ids(tokenizer), spell(tokenizer), model.config.n_layer
    kinds = kinds_gone(n_layer)
    some = [gone_of(rectangle, n_layer) for rectangle in rectangles(n_layer)]
    gone = torch.stack([torch.zeros_like(some[0]), *some, *kinds.values()])
    loss, top, p = (np.concatenate(x) for x in zip(*(cut(model, ids, gone, how) for how in (False, True)), strict=True))
    guesses = [list(dict.fromkeys(column)) for column in top.T.tolist()]  # at each token, in order of appearance
    rank = np.array([[of.index(i) for of, i in zip(guesses, row, strict=True)] for row in top.tolist()])
    assert rank.max() < 256
    # One token after the other, and each beside its neighbour among the cases: differences are small, and pack well.
    columns = np.stack([x.T.astype(np.uint8) for x in (loss, rank, p)])  # (3, T, 2 * n_case)
    return {
        "tokens": [texts[i] for i in ids],
        "n_layer": n_layer,
        "kinds": list(kinds),
        "loss_step": LOSS_STEP,
        "guesses": [[texts[i] for i in of] for of in guesses],
        "cases": pack(columns),
    }


def html(*sections, data=None):
    """The page, or of it the sections named. data: {section: numbers}, computed if not given."""
    sections = sections or SECTIONS
    if data is None:
        make = {"how": how_data, "where": where_data, "plug": plug_data}
        run = load_run(NOTEBOOKS / "deep" / "moda")
        data = {name: make[name](*run) for name in sections if name in make}
    read = {path.name: path.read_text(encoding="utf-8") for path in (NOTEBOOKS / "page").iterdir()}
    numbers = {name: data[name] for name in sections if name in data}
    parts = {
        "__STYLE__": read["style.css"],
        "__COMMON__": read["common.js"],
        "__INTRO__": read["intro.html"] if len(sections) == len(SECTIONS) else "",
        "__SECTIONS__": "\n".join(read[f"{name}.html"] for name in sections),
        "__OUTRO__": read["outro.html"] if len(sections) == len(SECTIONS) else "",
        # last, as a token of the text may look like anything; "<": a token "</script>" must not end the script
        "__DATA__": json.dumps(numbers, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = read["page.html"]
    for name, part in parts.items():
        page = page.replace(name, part)
    return page


def embedded_data(page):
    """The numbers in a page that `html` made: {section: numbers}."""
    return json.loads(page.split('<script id="data" type="application/json">')[1].split("</script>")[0])


def embed(section):
    """A section of the page, with the numbers that are in it, as the output of a notebook's cell."""
    from IPython.display import HTML

    page = html(section, data=embedded_data(PAGE.read_text(encoding="utf-8")))
    # What a viewer without frames and scripts shows, as an untrusted JupyterLab or GitHub; the frame takes it away.
    instead = "<p>A picture to play with belongs here. Run this cell to see it, or open notebooks/explore.html.</p>"
    # as high as what it shows, also when the window gets narrower
    grow = "new ResizeObserver(() => this.style.height = this.contentDocument.body.offsetHeight + 'px')"
    load = f"this.previousSibling?.remove(); {grow}.observe(this.contentDocument.body)"
    style = "width: 100%; height: 900px; border: 0"
    start = f'<iframe title="{section}" style="{style}" onload="{load}"'
    return HTML(f'<div>{instead}{start} srcdoc="{escape(page)}"></iframe></div>')


if __name__ == "__main__":
    PAGE.write_text(html(), encoding="utf-8")
