"""notebooks/depth_view.html: what it shows is what the shipped model reads, also after clicks and keys in a browser."""

import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from train_small import load_run

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
VIEW = NOTEBOOKS / "depth_view.html"
STEP = 1 / 4095  # of the embedded weights
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def embedded():
    """What the page embeds: its data, and its weights as one (n_head, T, T + n_slot) array a layer."""
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', VIEW.read_text(encoding="utf-8")).group(1))
    T, n_head, at, maps = len(data["tokens"]), data["n_head"], 0, []
    three = np.frombuffer(base64.b64decode(data["weights"]), np.uint8).reshape(-1, 3).astype(int)  # bytes of 2 weights
    numbers = (
        np.stack([three[:, 0] * 16 + three[:, 1] // 16, three[:, 1] % 16 * 256 + three[:, 2]], axis=1).flatten() * STEP
    )
    for slots in data["slots"]:
        p = np.zeros((n_head, T, T + len(slots)))
        for head in range(n_head):
            for t in range(T):
                columns = [*range(t + 1), *range(T, T + len(slots))]
                p[head, t, columns] = numbers[at : at + len(columns)]
                at += len(columns)
        maps.append(p)
    assert at == len(numbers)
    return data, maps


def test_page_is_self_contained():
    page = VIEW.read_text(encoding="utf-8")
    assert len(page) < 1_000_000
    code = re.sub(r'<script id="data".*?</script>', "", page)
    assert not re.search(r"https?:|@import|url\(|<link|<img|src=|\bimport\b|fetch\(|XMLHttpRequest|WebSocket", code)
    assert "__" not in code, "a placeholder of the template is left"


def test_embedded_weights_are_the_shipped_models(embedded):
    data, maps = embedded
    model, tokenizer = load_run(NOTEBOOKS / "deep" / "moda")
    text = "".join(data["tokens"][1:])  # the first token is the end of the document before
    ids = torch.tensor([[tokenizer.eot_token, *tokenizer.encode_ordinary(text)]])
    assert ids.shape[1] == len(data["tokens"])
    assert data["slots"] == [model.config.slot_names(layer) for layer in range(model.config.n_layer)]
    for ours, theirs in zip(maps, model.attention_maps(ids), strict=True):
        assert np.abs(ours - theirs[0].numpy()).max() < 0.6 * STEP  # half, and the rounding of another machine


@pytest.fixture(scope="module")
def page():
    """The view in a headless browser, with the list of everything that went wrong in it."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser with")
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=CHROMIUM)  # None: playwright's own, if installed
        except sync_api.Error as error:
            pytest.skip(f"no Chromium that starts here: {error.message.splitlines()[0]}")
        page = browser.new_page()
        page.wrong = []
        page.on("console", lambda message: page.wrong.append(message.text))
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("request", lambda request: page.wrong.append(request.url) if request.url != VIEW.as_uri() else None)
        page.goto(VIEW.as_uri())
        yield page
        browser.close()


def check_shown(page, embedded, layer, head, t):
    """The page shows this layer's, head's and token's weights, and nothing but them."""
    data, maps = embedded
    p = maps[layer].mean(0) if head == data["n_head"] else maps[layer][head]
    T, slots = len(data["tokens"]), data["slots"][layer]
    pressed = "all => all.map(e => e.ariaPressed).indexOf('true')"
    state = [page.eval_on_selector_all(f"#{name} > *", pressed) for name in ("layers", "heads", "text")]
    assert state == [layer, head, t]
    shown = page.eval_on_selector_all("#text > *", "all => all.map(e => e.dataset.p)")
    assert shown[t + 1 :] == [None] * (T - t - 1)
    np.testing.assert_allclose(np.array(shown[: t + 1], float), p[t, : t + 1], atol=1e-9)
    shown = dict(page.eval_on_selector_all(".slot[data-p]", "all => all.map(e => [e.dataset.label, e.dataset.p])"))
    assert set(shown) == set(slots)
    np.testing.assert_allclose([float(shown[name]) for name in slots], p[t, T:], atol=1e-9)
    depth = f"{100 * p[t, : t + 1].sum():.1f}% sequence"
    assert depth in page.inner_text("#summary")


def test_clicks_and_keys_show_the_embedded_weights(page, embedded):
    data, maps = embedded
    last, mean = len(maps) - 1, data["n_head"]
    check_shown(page, embedded, last, mean, len(data["tokens"]) - 1)
    page.click("#layers > * >> nth=5")
    check_shown(page, embedded, 5, mean, len(data["tokens"]) - 1)
    page.click("#heads > * >> nth=1")
    check_shown(page, embedded, 5, 1, len(data["tokens"]) - 1)
    page.click("#text > * >> nth=20")
    check_shown(page, embedded, 5, 1, 20)
    for key in ("ArrowLeft", "ArrowUp", "h"):
        page.keyboard.press(key)
    check_shown(page, embedded, 6, 2, 19)
    for key in ("ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    check_shown(page, embedded, 5, 2, 20)
    page.click("#layers > * >> nth=0")
    check_shown(page, embedded, 0, 2, 20)
    for key in ("ArrowDown", "h", "h", "h"):  # no layer below; and round to the first head
        page.keyboard.press(key)
    check_shown(page, embedded, 0, 0, 20)
    assert not page.wrong


def test_tooltip_tells_the_weight(page, embedded):
    data, maps = embedded
    page.click(f"#layers > * >> nth={len(maps) - 1}")
    page.click("#heads > * >> nth=0")
    page.click("#text > * >> nth=20")
    page.hover(".slot[data-label='ffn 2']")
    weight = maps[-1][0, 20, len(data["tokens"]) + data["slots"][-1].index("ffn 2")]
    assert page.inner_text("#tip") == f"ffn 2  {100 * weight:.2f}%"
    page.hover("h1")
    assert page.is_hidden("#tip")
    assert not page.wrong
