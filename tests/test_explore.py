"""notebooks/explore.html: its numbers are the shipped model's, and in a browser every control does what it says."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from small import SMALL

from moda import DepthStream, MoDA
from notebooks import explore

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DATA = explore.embedded_data(explore.PAGE.read_text(encoding="utf-8"))
N_LAYER = DATA["plug"]["n_layer"]


@pytest.fixture(scope="module")
def run():
    return explore.load_run(explore.NOTEBOOKS / "deep" / "moda")


# ---------------------------------------------------------------------------------------------- what explore.py does


def test_shares_add_up():
    p = np.random.default_rng(0).dirichlet(np.full(37, 0.1), 500)
    steps = explore.apportion(p)
    assert (steps.sum(1) == explore.STEPS).all()
    assert np.abs(steps - explore.STEPS * p).max() < 1
    np.testing.assert_array_equal(explore.unpack(explore.pack(steps), "<u2"), steps.ravel())


def test_rectangles_are_every_cut_once():
    n, seen = 5, [frozenset(map(tuple, explore.gone_of(r, 5).nonzero().tolist())) for r in explore.rectangles(5)]
    corners = [(a, b, c, d) for a in range(n) for b in range(a, n) for c in range(n) for d in range(c, n)]
    cells = [{(x, y) for x in range(a, b + 1) for y in range(c, d + 1) if y < x} for a, b, c, d in corners]
    every = {frozenset((x, 2 * y + i) for x, y in part for i in (0, 1)) for part in cells if part}
    assert len(seen) == len(set(seen)) and set(seen) == every


class Without(DepthStream):
    """The slots that `gone` (n_layer, n_slot) names are left out, or emptied: the definition, one slot at a time."""

    def __init__(self, gone, emptied):
        super().__init__("reference")
        self.gone, self.emptied = gone, emptied

    def read(self, layer):
        k, v = super().read(layer)
        gone = self.gone[layer.layer, : len(k)].tolist()
        if self.emptied:
            return k, [0 * x if cut else x for x, cut in zip(v, gone, strict=True)]
        return tuple([x for x, cut in zip(part, gone, strict=True) if not cut] for part in (k, v))


@torch.no_grad()
@pytest.mark.parametrize("emptied", [False, True], ids=["removed", "emptied"])
def test_cut_stream_is_a_model_without_these_slots(emptied):
    torch.manual_seed(0)
    model, idx = MoDA(SMALL).double(), torch.randint(SMALL.vocab_size, (1, 11))
    for p in model.parameters():  # weights that matter
        p.mul_(8 if p.dim() == 2 else 1)
    rectangles = explore.rectangles(SMALL.n_layer)
    gone = torch.stack([explore.gone_of(r, SMALL.n_layer) for r in rectangles])
    together = model.hidden(idx.expand(len(gone), -1), explore.CutStream(gone, emptied))
    uncut = model.hidden(idx)[0]
    for one, cut in zip(together, gone, strict=True):
        torch.testing.assert_close(one, model.hidden(idx, Without(cut, emptied))[0], rtol=0, atol=1e-12)
        assert (one - uncut).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------- what is in the page


def test_page_is_small_and_self_contained():
    page = explore.PAGE.read_text(encoding="utf-8")
    assert len(page.encode()) < 1_500_000
    code = re.sub(r'<script id="data".*?</script>', "", page)
    assert not re.search(
        r"https?:|@import|url\(|<link (?!rel=\"icon\")|<img|src=|\bimport\b|fetch\(|XMLHttp|Socket", code
    )
    assert not re.search(r"__[A-Z]+__", code), "a placeholder is left"
    assert "<noscript>" in code and "Trust HTML" in code
    assert code.index('id="tip"') < code.index("<script"), (
        "a reload scrolls, and asks for the tip, before the end is read"
    )


def test_page_is_made_of_the_committed_sources():
    assert explore.PAGE.read_text(encoding="utf-8") == explore.html(data=DATA), "run python notebooks/explore.py"


def test_online_softmax_is_of_the_shipped_model(run):
    ours = explore.how_data(*run)
    assert [ours.pop(x) for x in ("names", "n_seq")] == [DATA["how"][x] for x in ("names", "n_seq")]
    for name in ("z", "v"):
        np.testing.assert_allclose(DATA["how"][name], ours[name], rtol=0, atol=2e-3)


def split(where, steps):
    """The weights in the page, one (n_head, t + 1 + n_slot) array a layer and query -> {(layer, t): array}."""
    n_head, T, at, rows = where["n_head"], len(where["tokens"]) - 1, 0, {}
    for layer, slots in enumerate(where["slots"]):
        for t in range(T):
            size = n_head * (t + 1 + len(slots))
            rows[layer, t] = steps[at : at + size].reshape(n_head, -1).astype(int)
            at += size
    assert at == len(steps)
    return rows


def test_weights_and_predictions_are_the_shipped_models(run):
    ours, theirs = explore.where_data(*run), DATA["where"]
    steps = explore.unpack(theirs["weights"], "<u2")
    assert np.abs(steps.astype(int) - explore.unpack(ours["weights"], "<u2")).max() <= 2  # rounding, elsewhere
    assert all((row.sum(1) == explore.STEPS).all() for row in split(theirs, steps).values())
    for name in ("tokens", "slots", "n_head"):
        assert ours[name] == theirs[name]
    for row, other in zip(ours["top"], theirs["top"], strict=True):
        np.testing.assert_allclose([p for _, p in row], [p for _, p in other], rtol=0, atol=2e-3)
        assert row[0][0] == other[0][0]


def test_findings_are_true():
    where = DATA["where"]
    rows, tokens = split(where, explore.unpack(where["weights"], "<u2")), where["tokens"]
    source = (explore.NOTEBOOKS / "page" / "where.html").read_text(encoding="utf-8")

    def weight(layer, head, t, of):
        assert f"{{ layer: {layer}, head: {head}, t: {t} }}" in source
        column = of if isinstance(of, int) else t + 1 + where["slots"][layer].index(of)
        return rows[layer, t][head][column] / explore.STEPS

    assert tokens[30] == " with" and weight(14, 0, 30, "ffn 3") > 0.9
    assert weight(7, 0, 32, "attn 0") > 0.9
    assert tokens[13] == tokens[19] == where["top"][18][0][0] == " path" and weight(2, 0, 18, 13) > 0.7
    assert tokens[45].isspace() and tokens[47:49] == [" OSError", ":\n"] and weight(6, 0, 48, 45) > 0.8


def test_cuts_are_of_the_shipped_model(run):
    model, plug = run[0], DATA["plug"]
    ids, rectangles, kinds = explore.token_ids(run[1]), explore.rectangles(N_LAYER), explore.kinds_gone(N_LAYER)
    assert plug["kinds"] == list(kinds) and plug["tokens"] == DATA["where"]["tokens"]
    n_case, T = 1 + len(rectangles) + len(kinds), len(ids) - 1
    loss, rank, p = explore.unpack(plug["cases"], np.uint8).reshape(3, T, 2, n_case).astype(int)
    some = [0, *range(1, n_case, 997), *range(n_case - len(kinds), n_case)]
    gone = [torch.zeros(N_LAYER, 2 * (N_LAYER - 1), dtype=torch.bool)]
    gone += [explore.gone_of(rectangle, N_LAYER) for rectangle in rectangles] + list(kinds.values())
    texts = explore.spell(run[1])
    for how, emptied in enumerate((False, True)):
        ours = explore.cut(model, ids, torch.stack([gone[i] for i in some]), emptied)
        assert np.abs(ours[0].T - loss[:, how, some]).max() <= 1
        assert np.abs(ours[2].T - p[:, how, some]).max() <= 1
        theirs = [[plug["guesses"][t][i] for t, i in enumerate(rank[:, how, case])] for case in some]
        same = np.array([[texts[i] for i in row] for row in ours[1].tolist()]) == np.array(theirs)
        assert same.mean() > 0.99  # all but ties, elsewhere


# -------------------------------------------------------------------------------------------------- in a real browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser with")
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium that starts here: {error.message.splitlines()[0]}")
        yield browser
        browser.close()


def opened(browser, path=explore.PAGE, width=1440, **options):
    """The page, with the list of all that went wrong in it."""
    page = browser.new_page(viewport={"width": width, "height": 900}, **options)
    page.wrong = []
    page.on("console", lambda message: page.wrong.append(message.text))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith((path.as_uri(), "data:", "blob:"))
            else page.wrong.append(request.url))  # fmt: skip
    page.goto(path.as_uri())
    page.wait_for_selector("#where-map button")
    return page


def fits(page):
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1440])
def test_every_control_works(browser, width, scheme):
    """Every button is clicked, every slider goes from end to end, and the page stays whole, and within its width."""
    page = opened(browser, width=width, color_scheme=scheme)
    page.wait_for_selector("#plug-triangle .cut")
    for button in page.query_selector_all("button:visible"):
        if button.is_enabled():
            button.click()
    for slider in page.query_selector_all("input[type=range]:visible"):
        for key in ("Home", "ArrowRight", "End"):
            slider.press(key)
            assert fits(page)
    for t in range(len(DATA["where"]["tokens"]) - 1):
        page.evaluate(f"document.querySelectorAll('#where-text > span')[{t}].click()")
        shares = re.findall(r"(\d+\.\d)%", " ".join(page.locator("#where-says b").all_inner_texts()))
        assert len(shares) == 3
        assert sum(int(share.replace(".", "")) for share in shares) == 1000
    assert fits(page) and not page.wrong
    page.close()


def test_keyboard_reaches_everything(browser):
    page = opened(browser)
    page.wait_for_selector("#plug-triangle .cut")
    reached = set()
    page.focus("nav a")
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('[id]')?.id"))
    assert reached >= {
        *("why-layers", "why-sharp", "why-strip", "what-grid", "what-modes", "what-bars", "what-play", "what-step"),
        *(
            "how-back",
            "how-on",
            "how-flash",
            "how-keys",
            "how-logits",
            "where-findings",
            "where-map",
            "where-text",
            "where-link",
        ),
        *("plug-triangle", "plug-presets", "plug"),
    }
    before = page.inner_text("#where-says")
    page.focus("nav a")
    page.keyboard.press("ArrowRight")  # no arrow is taken where nothing asks for it
    assert page.inner_text("#where-says") == before
    page.focus("#where-text [aria-checked=true]")
    page.keyboard.press("ArrowRight")
    assert "token 31" in page.inner_text("#where-says")
    page.close()


def test_a_link_opens_its_state(browser):
    page = opened(browser)
    page.goto(explore.PAGE.as_uri() + "#layer=7&head=4&token=12")
    assert "Layer 7, mean of heads, token 12" in page.inner_text("#where-says")
    page.goto(explore.PAGE.as_uri() + "#layer=99&head=4&token=12")  # no such layer: stays
    assert "Layer 7, mean of heads, token 12" in page.inner_text("#where-says")
    assert not page.wrong
    page.close()


def test_flash_attention_and_one_by_one_agree(browser):
    page, n = opened(browser), len(DATA["how"]["z"])
    states = []
    for button in ("#how-back", "#how-flash"):
        page.click(button)
        while page.is_enabled("#how-on"):
            page.click("#how-on")
        states.append(page.eval_on_selector_all("#how-output i", "all => all.map(e => e.style.height)"))
        assert f"{n} of {n} keys" in page.inner_text("#how-says")
        assert float(re.search(r"differ by (\S+),", page.inner_text("#how-says"))[1]) < 1e-12
    assert states[0] == states[1]
    p = np.exp(DATA["how"]["z"])
    answer = p / p.sum() @ np.array(DATA["how"]["v"])
    shown = np.array([float(x.rstrip("%")) for x in states[0]])
    np.testing.assert_allclose(shown / shown.max(), np.abs(answer) / np.abs(answer).max(), atol=1e-4)
    page.close()


def drag(page, bar, up):
    """Grabs a bar, and drags it up by so many pixels."""
    bar.scroll_into_view_if_needed()
    box = bar.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y - up / 2)
    page.mouse.move(x, y - up)
    page.mouse.up()


def touch(page, start, *path):
    """A finger goes along points of the window."""
    session = page.context.new_cdp_session(page)
    for kind, points in (("touchStart", [start]), *(("touchMove", [point]) for point in path), ("touchEnd", [])):
        touches = [{"x": x, "y": y} for x, y in points]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})


def test_a_logit_can_be_dragged_and_the_state_follows(browser):
    how = DATA["how"]
    z, v, names = list(how["z"]), np.array(how["v"]), how["names"]
    page = opened(browser, has_touch=True)
    bars = page.locator("#how-logits [role=slider]")
    assert bars.count() == len(z) and page.is_disabled("#how-reset")

    def heights(which):
        get = "all => all.map(e => parseFloat(e.style.height))"
        return np.array(page.eval_on_selector_all(f"#how-output {which}", get))

    def agrees():  # all keys are read
        e = np.exp(np.array(z) - max(z))
        shown = re.findall(r"[-\d.]+$", page.inner_text("#how-state").replace("−", "-"), re.MULTILINE)
        np.testing.assert_allclose([float(x) for x in shown], [max(z), e.sum()], atol=0.01)
        answer, outlined = np.abs(e @ v), heights("b")
        np.testing.assert_allclose(outlined / outlined.max(), answer / answer.max(), atol=5e-3)
        np.testing.assert_allclose(heights("i"), outlined, atol=1e-3)
        assert float(re.search(r"differ by (\S+),", page.inner_text("#how-says"))[1]) < 1e-12

    def now(i):
        return float(bars.nth(i).get_attribute("aria-valuenow"))

    slot = names.index("attn 4")
    page.focus("#how-keys")
    page.keyboard.press("End")
    agrees()
    drag(page, bars.nth(slot), 40)
    assert now(slot) > z[slot] + 0.5
    z[slot] = now(slot)
    agrees()
    assert "your logits" in page.inner_text("#how-says")
    bars.nth(2).focus()  # keyboard
    for _ in range(3):
        page.keyboard.press("ArrowUp")
    assert now(2) == pytest.approx(z[2] + 0.75, abs=0.01)
    z[2] = now(2)
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.ariaLabel") == f"logit of {names[3]}"
    agrees()
    box = bars.nth(5).bounding_box()  # a finger
    x, y = box["x"] + box["width"] / 2, box["y"] + 60
    touch(page, (x, y), (x, y - 20), (x, y - 50))
    assert now(5) > z[5] + 1.2
    z[5] = now(5)
    page.click("#how-flash")  # from FlashAttention's state, too
    while page.is_enabled("#how-on"):
        page.click("#how-on")
    agrees()
    page.click("#how-reset")
    assert page.is_disabled("#how-reset") and now(5) == pytest.approx(how["z"][5], abs=0.006)
    page.focus("#how-keys")
    page.keyboard.press("End")
    z = list(how["z"])
    agrees()
    assert not page.wrong
    page.close()


SQUARES = "all => all.map(cell => [...cell.children].map(square => square.className))"


def squares(page):
    """Of every layer and token the squares: its key in the sequence, attention's slot, the FFN's slot."""
    rows = page.eval_on_selector_all("#what-grid button", SQUARES)
    n = page.locator("#what-grid > span:not(.layer)").count() - 1
    return {(len(rows) // n - 1 - i // n, i % n): row for i, row in enumerate(rows)}


def test_the_picture_dissolves(browser):
    """Plain after one layer, gone after ten; sharp in a slot, and at sharpness 0 all slots get the same weight."""
    page = opened(browser)

    def set_to(slider, value):
        page.eval_on_selector(slider, "(e, value) => { e.value = value; e.oninput(); }", value)

    def said(which):
        return page.locator(f"{which} ~ span").inner_text()

    def weights():
        labels = page.eval_on_selector_all("#why-strip button:not([hidden])", "all => all.map(e => e.ariaLabel)")
        return [float(re.search(r"weight (\S+)%", x)[1]) for x in labels]

    cat = []
    for layers in range(1, 13):
        set_to("#why-layers", layers)
        cat.append(float(re.search(r"the cat is (\S+)% of it", said("#why-sum"))[1]))
    assert cat == sorted(cat, reverse=True)
    assert cat[0] > 90 and 10 < cat[4] < 30 and cat[9] < 3
    page.reload()
    page.wait_for_selector("#where-map button")
    assert "the cat is 1.8% of it" in said("#why-sum")  # the dissolved one beside the sharp one
    assert said("#why-read") == "100% like ffn 0, which held the cat alone"
    page.click("#why-strip button >> text=attn 9")
    assert said("#why-read").startswith("100% like attn 9, which held ")
    shown = page.locator("#why-strip button:has-text('attn 9') em").inner_text()
    assert int(shown) > 90 and max(weights()) > 90  # late slots can be told apart
    set_to("#why-sharp", 0)
    assert len(weights()) == 19 and weights() == pytest.approx([100 / 19] * 19, abs=0.1)
    assert said("#why-read").startswith("all slots mixed")
    assert not page.wrong
    page.close()


def test_pointing_changes_nothing_and_drags_can_be_undone(browser):
    page = opened(browser)
    step, bars = page.locator("#what-step"), page.locator("#what-bars [role=slider]")
    assert page.is_disabled("#what-reset")
    before, grid = step.input_value(), squares(page)
    page.locator("[aria-label='query sat, layer 2']").hover()
    assert step.input_value() == before and squares(page) != grid
    said = page.inner_text("#what-says")
    assert (
        said == "“sat” in layer 2 would read 3 keys of its row and 4 slots of its column. Click to make it the query."
    )
    page.locator("#what-says").hover()
    assert step.input_value() == before and squares(page) == grid
    assert page.inner_text("#what-says").startswith("“the” attends in layer 3")
    texts = bars.evaluate_all("all => all.map(e => e.ariaValueText)")
    drag(page, bars.nth(4), 35)
    assert bars.evaluate_all("all => all.map(e => e.ariaValueText)") != texts
    page.click("#what-reset")
    assert bars.evaluate_all("all => all.map(e => e.ariaValueText)") == texts and page.is_disabled("#what-reset")
    page.click("#what-play")
    page.locator("[aria-label='query sat, layer 2']").hover()
    page.locator("[aria-label='query sat, layer 3']").hover()
    assert "pause" in page.inner_text("#what-play")  # still on
    page.click("#what-play")
    step.fill("48")
    assert "one step ago" in page.inner_text("#what-budget")  # whose the faded bars are
    page.close()


@pytest.mark.parametrize("width", [420, 1440])
def test_the_play_row_stands_still(browser, width):
    page = opened(browser, width=width)
    step, places = page.locator("#what-step"), set()
    step.press("Home")
    for _ in range(20):
        step.press("ArrowRight")
        places.add(
            page.evaluate("""["#what-step", "#what-modes", ".under"].map(
            x => document.querySelector(x).getBoundingClientRect().top + scrollY).join()""")
        )
    assert len(places) == 1
    page.close()


def test_what_flash_attention_hands_over_is_said(browser):
    page = opened(browser)
    assert "the old sums shrink" in page.inner_text("#how-code")  # the opening state shows the idea
    pressed = page.locator("#how-flash")
    assert pressed.get_attribute("aria-pressed") == "false"
    pressed.click()
    assert pressed.get_attribute("aria-pressed") == "true" and "lse of the tokens" in page.inner_text("#how-state")
    z, n_seq = DATA["how"]["z"], DATA["how"]["n_seq"]
    lse = np.log(np.exp(z[:n_seq]).sum())
    for i in range(n_seq, len(z)):
        page.click("#how-on")
        m = max([lse, *z[n_seq : i + 1]])
        assert f"{m:.3f}" in page.inner_text("#how-state")
        assert ("lse of the tokens" in page.inner_text("#how-state")) == (m == lse)
        assert pressed.get_attribute("aria-pressed") == "true"
    page.locator("#how-keys").fill(str(n_seq))
    page.click("#how-back")
    assert pressed.get_attribute("aria-pressed") == "false" and "key by key again" in page.inner_text("#how-says")
    page.close()


def test_a_query_lights_its_row_and_its_column(browser):
    page = opened(browser)
    page.locator("[aria-label='query sat, layer 2']").hover()
    for (layer, t), (seq, attn, ffn) in squares(page).items():
        assert (seq == "read") == (layer == 2 and t <= 2)
        assert (attn == "read") == (ffn == "read") == (t == 2 and layer < 2)
    colours = page.eval_on_selector_all("#what-grid .read", "all => all.map(e => getComputedStyle(e).backgroundColor)")
    assert len(set(colours)) == 3, "tokens, attention slots, FFN slots"
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_one_meaning_a_colour(browser, scheme):
    page = opened(browser, color_scheme=scheme)
    page.wait_for_selector("#plug-triangle .cut")
    page.locator("[aria-label='query sat, layer 2']").hover()

    def colours(*where):
        get = "all => all.map(e => getComputedStyle(e).backgroundColor)"
        return {colour for x in where for colour in page.eval_on_selector_all(x, get)}

    kinds = [
        colours(f"#what-grid .read:nth-child({i})", f"#what-bars div:has(> .{kind}) .bar", f".key .{kind} i",
                f"#how-logits div:has(> .{kind}) .bar", f"#where-share i:nth-child({i})")
        for i, kind in enumerate(("seq", "attn", "ffn"), 1)
    ]  # fmt: skip
    kinds += [colours(".key .worse i", "#plug-costs i.worse"), colours(".key .better i")]
    assert [len(kind) for kind in kinds] == [1] * 5 and len(set.union(*kinds)) == 5
    others = colours("#how-output *", "#plug-triangle .cut", "#plug-token *", "button", "#where-predicts i")
    assert not others & set.union(*kinds)
    page.close()


def test_one_budget(browser):
    page = opened(browser)
    page.locator("[aria-label='query sat, layer 2']").click()
    bars = page.locator("#what-bars [role=slider]")

    def weights():
        texts = page.eval_on_selector_all("#what-bars [role=slider]", "all => all.map(e => e.ariaValueText)")
        return np.array([float(re.search(r"weight (\S+)%", text)[1]) for text in texts])

    def ticks():
        get = "all => all.map(e => [parseFloat(e.style.bottom), parseFloat(e.previousSibling.style.height)])"
        return np.array(page.eval_on_selector_all("#what-bars .tick", get))

    n_seq, n = 3, 3 + 4
    before = weights()
    assert len(before) == n
    drag(page, bars.nth(4), 35)
    after = weights()
    others = np.arange(n) != 4
    assert after[4] > before[4] + 5 and (after[others] < before[others]).all()
    tick, height = ticks().T
    np.testing.assert_allclose(tick / height * after, 100 / n, atol=1)  # at a weight of 1 / n
    page.click("text=two softmaxes")
    before = weights()
    assert before[:n_seq].sum() == pytest.approx(50, abs=2)
    drag(page, bars.nth(0), 35)
    after = weights()
    assert after[0] > before[0] and (after[1:n_seq] < before[1:n_seq]).all()
    np.testing.assert_array_equal(after[n_seq:], before[n_seq:])
    page.click("text=no depth")
    assert len(weights()) == n_seq and "0.0% depth" in page.inner_text("#what-budget")
    assert all(slots == ["none", "none"] for _, *slots in squares(page).values())
    page.close()


def test_play_shows_slots_come_and_go(browser):
    page = opened(browser)
    step = page.locator("#what-step")
    step.press("Home")
    n_layer = 5
    for number in range(2 * n_layer * 2):  # of two tokens
        t, layer, ffn = number // (2 * n_layer), number % (2 * n_layer) // 2, number % 2
        grid, said = squares(page), page.inner_text("#what-says")
        kept = sum(row[0] in ("there", "read") for row in grid.values())
        alive = [place for place, row in grid.items() if row[1] in ("there", "read")]
        over = ffn and layer == n_layer - 1
        assert kept == t * n_layer + layer + 1 and f"KV cache: {kept} key" in said
        assert sorted(alive) == ([] if over else [(x, t) for x in range(layer + ffn)])
        assert f"Slots alive: {2 * len(alive)}" in said
        step.press("ArrowRight")
    step.press("Home")
    page.click("#what-play")
    page.wait_for_function("document.querySelector('#what-step').value >= 3")
    page.click("#what-play")
    at = step.input_value()
    page.wait_for_timeout(500)
    assert step.input_value() == at
    page.close()


def test_a_gain_lies_on_the_other_side(browser):
    page = opened(browser)
    page.wait_for_selector("#plug-triangle .cut")

    def bars():
        return page.eval_on_selector_all(
            "#plug-costs div",
            """all => all.map(parent => {
            const [bar, box] = [parent.firstChild, parent].map(e => e.getBoundingClientRect());
            const zero = box.left + parseFloat(getComputedStyle(parent, "::before").left);
            return [parent.firstChild.className, bar.right <= zero + 1, bar.left >= zero - 1,
                    getComputedStyle(parent.firstChild).backgroundColor, bar.width];
        })""",
        )

    page.click("#plug-presets button >> text=cut all")
    worse = bars()
    page.click("#plug-presets button >> text=cut nothing")  # a click on what is cut would take it back
    assert [x[:3] for x in worse] == [["worse", False, True]] * 2
    page.locator("[data-tip^='layer 15 without the slots of layer 14:']").click()
    better = bars()
    assert "−0.03" in page.inner_text("#plug-costs")
    assert [x[:3] for x in better] == [["better", True, False]] * 2 and all(x[4] >= 3 for x in better)
    assert worse[0][3] != better[0][3]
    page.click("#plug-presets button >> text=cut nothing")
    assert all(x[4] == 0 for x in bars())
    page.close()


def test_a_finger_cuts(browser):
    page = opened(browser, width=420, has_touch=True)
    page.wait_for_selector("#plug-triangle .cut")
    page.locator("#plug-triangle").scroll_into_view_if_needed()
    boxes = [page.locator(f"[data-tip^='layer {r} without the slots of layer {s}:']").bounding_box()
             for r, s in ((9, 3), (7, 5))]  # fmt: skip
    start, end = [(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2) for box in boxes]
    touch(page, start, tuple(np.mean([start, end], axis=0)), end)
    assert page.inner_text("#plug-says") == "Layers 7 to 9 cannot read the slots of layers 3 to 5."
    page.locator("#where-slots").scroll_into_view_if_needed()
    page.locator("[data-tip^='ffn 3 ']").tap()
    assert page.inner_text("#tip").startswith("ffn 3") and page.inner_text("#tip").endswith("%")
    assert fits(page) and not page.wrong
    page.close()


def test_a_tap_takes_a_cut_back(browser):
    page = opened(browser, has_touch=True)
    page.wait_for_selector("#plug-triangle .cut")
    cell = page.locator("[data-tip^='layer 9 without the slots of layer 3:']")
    assert "Layers 8 to 15" in page.inner_text("#plug-says")
    cell.click()
    assert "Nothing is cut" in page.inner_text("#plug-says")
    cell.tap()
    assert page.inner_text("#plug-says") == "Layer 9 cannot read the slots of layer 3."
    cell.tap()
    assert "Nothing is cut" in page.inner_text("#plug-says")
    page.focus("#plug-triangle")  # keyboard
    page.keyboard.press("ArrowUp")
    assert page.inner_text("#plug-says") == "Layer 10 cannot read the slots of layer 3."
    page.keyboard.press("Enter")
    assert "Nothing is cut" in page.inner_text("#plug-says")
    page.keyboard.press("Enter")
    assert page.inner_text("#plug-says") == "Layer 10 cannot read the slots of layer 3."
    page.close()


def test_a_finger_leaves_nothing_behind(browser):
    """A cell that was tapped looks like any other once the step has moved on."""
    page = opened(browser, width=420, has_touch=True, is_mobile=True)
    page.locator("[aria-label='query sat, layer 2']").tap()
    box = page.locator("#what-step").bounding_box()
    y = box["y"] + box["height"] / 2
    touch(page, (box["x"] + 90, y), (box["x"] + 120, y), (box["x"] + 160, y))
    get = "all => all.map(e => [e.ariaChecked, getComputedStyle(e).borderColor + getComputedStyle(e).outlineStyle])"
    cells = page.eval_on_selector_all("#what-grid button", get)
    assert page.locator("#what-grid [aria-checked=true]").get_attribute("aria-label") != "query sat, layer 2"
    assert len({look for chosen, look in cells if chosen != "true"}) == 1
    page.close()


def test_largest_weights_have_whole_names(browser):
    for width in (420, 1440):
        page = opened(browser, width=width)
        for head in (0, 1, 2, 3):
            page.goto(explore.PAGE.as_uri() + f"#layer=6&head={head}&token=48")
            names = page.locator("#where-largest code")
            assert not any("…" in name for name in names.all_inner_texts())
            assert all(names.evaluate_all("all => all.map(e => e.scrollWidth <= e.clientWidth)"))
        page.close()


def test_the_head_of_the_page(browser):
    page = opened(browser)
    links = page.eval_on_selector_all("nav a", "all => all.map(e => e.hash)")
    assert links == ["#why", "#what", "#how", "#where", "#plug", "#short"]
    assert all(page.query_selector(link) for link in links)
    assert not page.query_selector_all("header .worse, header .better")  # before a loss is mentioned
    page.close()


def test_a_tip_keeps_off_the_text_and_goes(browser):
    page = opened(browser, has_touch=True)
    page.wait_for_selector("#plug-triangle .cut")
    cell = page.locator("[data-tip^='layer 15 without the slots of layer 14:']")
    cell.hover()
    page.wait_for_timeout(300)  # scrolling hides it
    cell.hover(position={"x": 5, "y": 5})
    assert page.is_visible("#tip")
    right = "document.querySelector('{}').getBoundingClientRect().right"
    assert page.evaluate(right.format("#tip")) <= page.evaluate(right.format("#plug-triangle")) + 1
    page.close()
    page = opened(browser, width=420, has_touch=True)
    page.wait_for_selector("#plug-triangle .cut")
    page.locator("[data-tip^='layer 15 without the slots of layer 14:']").tap()
    assert page.is_visible("#tip") and page.evaluate(right.format("#tip")) <= 420 - 12
    page.wait_for_selector("#tip", state="hidden", timeout=3000)
    says, triangle = [page.locator(x).bounding_box() for x in ("#plug-says", "#plug-triangle")]
    assert (
        says["y"] < triangle["y"] and triangle["y"] + triangle["height"] - says["y"] < 700
    )  # what a cut costs and the triangle: one screen
    page.close()


def test_the_triangles_colours_are_those_of_its_scale(browser):
    """Full colour at 0.05 nats, as the scale above it says."""
    page = opened(browser)
    page.wait_for_selector("#plug-triangle .cut")
    page.click("#plug-presets button >> text=cut nothing")
    assert "−0.05" in page.inner_text("#plug-scale") and "+0.05" in page.inner_text("#plug-scale")
    get = "all => all.map(e => [e.dataset.tip, e.style.background])"
    for tip, style in page.eval_on_selector_all("#plug-triangle [data-tip]", get):
        loss = float(tip.split()[-1].replace("−", "-"))
        shown = float(re.search(r"([\d.]+)%", style)[1])
        assert shown == pytest.approx(min(100, 2000 * abs(loss)), abs=1.1)
    page.close()


def test_numbers_are_those_of_the_notebook_and_the_laboratory():
    """The bars of all slots are notebook 04's, the gains and costs those of experiments/results."""
    page = explore.NOTEBOOKS / "page"
    cells = json.loads((explore.NOTEBOOKS / "04_depth_attention.ipynb").read_text(encoding="utf-8"))["cells"]
    printed = "".join("".join(x.get("text", [])) for cell in cells for x in cell.get("outputs", []))
    removed, emptied = map(float, re.search(r"all slots removed \+(\S+) .*emptied \+(\S+) ", printed).groups())
    twin = float(re.search(r"difference -(\S+) ", printed)[1])
    plug = (page / "plug.html").read_text(encoding="utf-8")
    shown = re.findall(r'<b class="num">\+(\S+)</b><i style="width: (\S+)%">', plug)
    for (number, width), x in zip(shown, (removed, emptied, twin), strict=True):
        assert float(number) == pytest.approx(x, abs=0.005) and float(width) == pytest.approx(
            100 * x / removed, abs=0.5
        )
    outro = (page / "outro.html").read_text(encoding="utf-8")
    results = explore.NOTEBOOKS.parent / "experiments" / "results"
    pairs = re.findall(r"--x: (\S+)\"></i><b>(\S+)</b>", outro)
    rows = [
        re.search(pattern, (results / name).read_text(encoding="utf-8"), re.MULTILINE).groups()
        for name, pattern in (
            ("quality_linux.md", r"^\| 24 \| post \| Muon \| 64 \| (\S+) .*\| (\S+) ± \S+ \| -(\S+) ± (\S+) \(3\) \|$"),
            ("quality.md", r"^\| 24 \| post \| Muon \| 1 \| (\S+) .*\| (\S+) ± \S+ \| -(\S+) ± (\S+) \(3\) \| \S+ \|$"),
        )
    ]
    for (plain, moda), (without, with_, gain, spread) in zip(
        zip(pairs[::2], pairs[1::2], strict=True), rows, strict=True
    ):
        assert plain[0] == plain[1] and moda[0] == moda[1]
        assert float(plain[0]) == pytest.approx(float(without), abs=6e-4)
        assert float(moda[0]) == pytest.approx(float(with_), abs=6e-4)
        said = re.search(rf"−{float(gain):.3f} ± {float(spread):.3f}: (\S+)%", outro)
        assert float(said[1]) == pytest.approx(100 * float(gain) / float(without), abs=0.15)
    readme = (results.parent / "README.md").read_text(encoding="utf-8")
    speeds = re.findall(r"^\| \S+, H100 \|[^|]+\|[^|]+\| (0\.\d\d) \|", readme, re.MULTILINE)
    assert re.findall(r"width \S+</th><td>(0\.\d\d)<", outro) == speeds


def test_pointing_at_a_token_tells_what_the_cut_did(browser):
    page = opened(browser)
    page.wait_for_selector("#plug-triangle .cut")
    page.locator("#plug .text").first.locator("> span").nth(18).hover()
    assert "is ·path." in page.inner_text("#plug-token")
    assert page.locator("#plug-token tbody th").all_inner_texts() == ["uncut", "removed", "emptied"]
    heads = page.locator("#plug-token thead th").all_inner_texts()
    assert heads == ["", "likeliest", "right?", "its chance", "the right token’s chance"]
    of = {
        True: [],
        False: [],
    }  # the right token's chance is the likeliest's where that is right, and below it elsewhere
    for t in range(len(DATA["plug"]["tokens"]) - 1):
        page.locator("#plug .text").first.locator("> span").nth(t).click()
        rows = page.locator("#plug-token tbody tr").evaluate_all(
            "rows => rows.map(row => [...row.cells].map(x => x.innerText))"
        )
        for _, _, right, chance, its in rows:
            of[right == "✓"].append([float(x.removeprefix("under ").removesuffix("%")) for x in (chance, its)])
    assert of[True] and all(a == b for a, b in of[True])
    assert of[False] and all(b <= a for a, b in of[False])
    page.close()


def test_each_section_has_two_sentences_above_and_one_below(browser):
    page = opened(browser)
    for section in explore.SECTIONS:
        text = page.inner_text(f"#{section} > p:not(.under)"), page.inner_text(f"#{section} > p.under")
        assert [len(re.findall(r"[.!?](?=\s|$)", x)) for x in text] == [2, 1], section
        assert len(page.query_selector_all(f"#{section} > figure .key")) >= 1, f"{section} has no legend"
    asked = ["What it is", "What a slot holds", "What it costs", "What it brings", "What a trained model does"]
    assert page.locator("footer dt").all_inner_texts() == asked
    strip = page.inner_text("#why-strip").split("\n")
    assert "attn 0" in strip[0] and "attn 0 is blank here" in page.inner_text("#why")
    page.close()


def test_dragging_over_the_triangle_cuts(browser):
    page = opened(browser)
    page.wait_for_selector("#plug-triangle .cut")
    page.locator("#plug-triangle").scroll_into_view_if_needed()

    def drag(start, end):
        """From one cell, (reader, source), to the other's height and column, which may lie outside the triangle."""
        cell = "[data-tip^='layer {} without the slots of layer {}:']"
        rows = [page.locator(cell.format(reader, 0)).bounding_box() for reader, _ in (start, end)]
        columns = [page.locator(cell.format(N_LAYER - 1, source)).bounding_box() for _, source in (start, end)]
        points = [(x["x"] + x["width"] / 2, y["y"] + y["height"] / 2) for x, y in zip(columns, rows, strict=True)]
        page.mouse.move(*points[0])
        page.mouse.down()
        page.mouse.move(*points[1])
        page.mouse.up()
        return page.inner_text("#plug-says")

    assert drag((5, 2), (3, 14)) == "Layers 3 to 5 cannot read the slots of layers 2 to 4."
    assert drag((15, 10), (1, 12)) == "Layers 11 to 15 cannot read the slots of layers 10 to 12."
    assert drag((15, 2), (9, 6)) == "Layers 9 to 15 cannot read the slots of layers 2 to 6."
    number = 1 + explore.rectangles(N_LAYER).index((9, 15, 2, 6))
    loss = explore.unpack(DATA["plug"]["cases"], np.uint8).reshape(3, len(DATA["plug"]["tokens"]) - 1, 2, -1)[0] * 0.05
    for how, shown in enumerate(page.eval_on_selector_all("#plug-costs b", "all => all.map(e => e.textContent)")):
        want = (loss[:, how, number] - loss[:, 0, 0]).mean()
        assert float(shown.replace("−", "-")) == pytest.approx(want, abs=6e-4)
    page.focus("#plug-triangle")
    page.keyboard.press("Escape")
    assert "Nothing is cut" in page.inner_text("#plug-says")
    assert not page.wrong
    page.close()


STRANGE = """#: </script><!-- "quotes" & 'more' é 漢字 🙂
################################################################
\tx = {"a": 1}\r\n\n\n                                                             y = 2
"""


@pytest.mark.parametrize("width", [420, 1440])
def test_strange_tokens(browser, run, tmp_path, monkeypatch, width):
    """Long ones, line breaks, part of a character, what looks like the end of the script."""
    monkeypatch.setattr(explore, "TEXT", STRANGE)
    path = tmp_path / "strange.html"
    data = {"where": explore.where_data(*run)}
    path.write_text(explore.html("where", data=data), encoding="utf-8")
    assert max(map(len, data["where"]["tokens"])) >= 32 and any("\ufffd" in x for x in data["where"]["tokens"])
    page = opened(browser, path, width)
    T = len(data["where"]["tokens"]) - 1
    assert len(page.query_selector_all("#where-text > span")) == T
    page.evaluate("[...document.querySelectorAll('#where-text > span')].at(-1).click()")
    assert f"token {T - 1} " in page.inner_text("#where-says")
    assert fits(page) and not page.wrong
    page.close()


@pytest.mark.parametrize("width", [420, 1440])
def test_strange_tokens_fit_the_other_pictures(browser, tmp_path, width):
    strange = ["#" * 64, "</script>", "\n\n\n", "\ufffd", "漢字", "\t", " " * 40, "<b>"]
    data = json.loads(json.dumps({name: DATA[name] for name in ("how", "where", "plug")}))
    data["plug"]["tokens"] = [strange[i % len(strange)] for i in range(len(data["plug"]["tokens"]))]
    data["plug"]["guesses"] = [[strange[i % len(strange)] for i in range(len(x))] for x in data["plug"]["guesses"]]
    data["how"]["names"][: len(strange)] = strange
    path = tmp_path / "strange.html"
    path.write_text(explore.html("how", "where", "plug", data=data), encoding="utf-8")
    page = opened(browser, path, width)
    page.wait_for_selector("#plug-triangle .cut")
    for t in range(len(strange)):
        page.evaluate(f"document.querySelectorAll('#plug .text > span')[{t}].click()")
        assert fits(page)
        right = page.eval_on_selector_all(
            "#plug-token, #plug-token *", "all => all.map(e => e.getBoundingClientRect().right)"
        )
        assert max(right) == right[0], "no token is wider than the panel"
    for _ in strange:
        page.click("#how-on")
        assert fits(page)
    assert not page.query_selector_all("section b b") and not page.wrong
    page.close()


def test_notebooks_embed_a_section_at_its_height(browser, tmp_path):
    path = tmp_path / "notebook.html"
    path.write_text(f"<meta charset=utf-8><body>{explore.embed('where').data}", encoding="utf-8")
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    page.goto(path.as_uri())
    frame = page.query_selector("iframe").content_frame()
    frame.wait_for_selector("#where-map button")
    assert frame.eval_on_selector_all("section", "all => all.map(e => e.id)") == ["where"]
    for width in (1000, 420):
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_function("document.querySelector('iframe').offsetHeight === "
                               "document.querySelector('iframe').contentDocument.body.offsetHeight")  # fmt: skip
        assert fits(frame) and frame.evaluate("document.body.offsetHeight") > 800
    assert page.inner_text("body") == ""  # beside the frame
    frame.click("#where-findings button >> nth=1")  # no address to change here, and no error
    assert "Layer 7" in frame.inner_text("#where-says")
    page.close()


def test_without_scripts_it_says_what_to_do(browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(explore.PAGE.as_uri())
    assert "Trust HTML" in page.inner_text("main")
    context.close()


def test_an_untrusted_notebook_says_what_to_do(browser):
    """JupyterLab takes frames and handlers out of what it does not trust."""
    page = browser.new_page()
    page.set_content(re.sub(r"<iframe.*</iframe>", "", explore.embed("how").data, flags=re.DOTALL))
    assert "Run this cell" in page.inner_text("body")
    page.close()
