"""The pictures, from the committed measurements; the measuring itself needs a GPU."""

import json
import statistics
from statistics import median

import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure

from experiments import plots, quality

GPUS = ("h100-80gb-hbm3", "h200")


def drawn(name, gpu=GPUS[0]):
    """-> the axes of the picture of a committed measurement, and that measurement."""
    result = json.loads((plots.RESULTS / f"{name}_{gpu}.json").read_text())
    return plots.DRAW[name](result).axes, result


def test_kernel_picture():
    (times, ladder), result = drawn("kernel")
    got, want = [1 / bar.get_height() for bar in times.patches], [x["flash_over_moda"] for x in result["settings"]]
    assert got == pytest.approx(want, rel=0.02)  # a ratio of medians, a median of ratios
    ours = [line.get_xdata()[0] for line in ladder.lines if line.get_marker() == "o"]
    assert ours == [median(ms) for ms in result["ladder"].values()][::-1]


def test_train_picture():
    (speed, extra), result = drawn("train")
    shapes = result["shapes"]
    rows = shapes["paper-48l"]["rows"]  # the last shape
    names = ["row 3", "row 4", "row 4, window 16"]
    want = [median(rows[name]["beside_ms"]) / median(rows[name]["ms"]) for name in names]
    assert [bar.get_height() for bar in speed.patches[len(shapes) - 1 :: len(shapes)]] == want
    more = sum(rows["row 4"]["kernels_ms"].values()) - sum(rows["plain"]["kernels_ms"].values())
    top = extra.patches[-1].get_y() + extra.patches[-1].get_height()
    assert top == pytest.approx(more / median(rows["plain"]["ms"]))


def test_scale_picture():
    panels, result = drawn("scale")
    for axes, points in zip(panels, result["sweeps"].values(), strict=True):
        lines = [list(line.get_ydata()) for line in axes.lines]
        for kind in ("train", "prefill"):
            plain, row_4 = ([median(point[row][kind]) for point in points] for row in ("plain", "row 4"))
            assert plain in lines and [a - b for a, b in zip(row_4, plain, strict=True)] in lines


def test_quality_picture():
    lines = quality.finished()
    groups, tried = quality.best_runs(lines), quality.tries(lines)
    curves, rates, muon, _ = plots.draw_quality(lines).axes
    assert len(curves.lines) == 1 + 2 * 2 == 1 + len(curves.collections)  # plain; two depths, two rows
    for n_layer in (24, 48):
        group = n_layer, "post", "muon", 1
        delta = quality.differences(groups[group]["row4"], groups[group]["plain"])
        mean = statistics.mean(delta)
        assert any(list(line.get_xdata()) == [mean] for line in muon.lines)
        # the last point of the curve: a sample of the validation text
        plain, row_4 = (tried[group][row] for row in ("plain", "row4"))
        setting = quality.best_setting({setting: row_4[setting] for setting in row_4.keys() & plain.keys()})
        last = [row_4[setting][i]["curve"][-1][2] - plain[setting][i]["curve"][-1][2] for i in range(3)]
        assert any(line.get_ydata()[-1] == pytest.approx(statistics.mean(last)) for line in curves.lines)
        at_1e3 = tried[group]["row4"][1e-3, 300][0]["val_loss"]
        assert any((1e-3, at_1e3) in zip(*line.get_data(), strict=True) for line in rates.lines)


def test_front_picture():
    """A row is where its time and its gain are. The line skips what another row beats in both."""

    def line(row, seed, loss):
        setting = {"n_layer": 24, "norm": "post", "optimizer": "muon", "budget": 64.0, "lr": 1e-3, "warmup": 300}
        return setting | {"row": row, "seed": seed, "val_loss": loss}

    lines = [line("plain", 0, 2.0), line("plain", 1, 2.2), line("row3", 0, 1.9), line("row3", 1, 2.0)]
    lines += [line("every4", 0, 1.9), line("row4", 0, 1.8), line("ffn", 0, 1.0)]
    timed = {"row3": {"ms": [12.0], "beside_ms": [10.0]}, "every4": {"ms": [13.0], "beside_ms": [10.0]}}
    timed |= {"row4": {"ms": [16.0, 18.0], "beside_ms": [10.0, 15.0]}}
    (axes,) = plots.draw_front(lines, timed).axes
    front = next(line for line in axes.lines if len(line.get_xdata()) > 2)
    assert front.get_xdata() == pytest.approx([0, 20, 40]) and front.get_ydata() == pytest.approx([0, 0.15, 0.2])
    texts = [text.get_text() for text in axes.texts]
    assert any("2 seeds" in text for text in texts) and len(texts) == 1 + 3


def test_budgets_picture():
    """Per token a gain stands where it was measured; in equal time against a plain that has read more."""
    lines = quality.finished("linux")
    left, right = plots.draw_budgets(lines, quality.finished()).axes
    (measured,) = (x for x in quality.pays(lines) if x[:2] == ((24, "post", "muon", 192), "row4"))
    *_, (same_text,), _, (same_time,), _ = measured
    for axes, want in ((left, -same_text), (right, -same_time)):
        drawn_at = [(min(len(x), 2), x[-1], y[-1]) for x, y in (line.get_data() for line in axes.lines) if len(x)]
        assert {n for n, *end in drawn_at if end == [192, pytest.approx(want)]} == {1, 2}  # a point, and a line to it
    assert same_time - same_text > 0.01


def test_a_model_has_one_colour():
    """Plain is blue, row 4 vermillion, in every picture and both machines'."""
    for gpu in GPUS:
        (speed, _), (panel, *_) = drawn("train", gpu)[0], drawn("scale", gpu)[0]
        assert same_color(drawn("kernel", gpu)[0][0].patches[0].get_facecolor(), plots.ROW_4)
        assert same_color(speed.lines[0].get_color(), plots.BASELINE) and speed.lines[0].get_label() == "plain"
        for line in panel.lines:
            assert same_color(line.get_color(), plots.BASELINE if "plain" in line.get_label() else plots.ROW_4)
    above, below, *_ = plots.draw_quality(quality.finished()).axes
    for line in (*above.lines, *below.lines):
        assert same_color(line.get_color(), plots.color_of(line.get_label().split()[-1]))


def test_all_are_drawn_anew(monkeypatch, capsys):
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **how: saved.append(path))
    plots.main()
    committed = set(plots.RESULTS.glob("*.png"))
    assert set(saved) == committed and len(saved) == len(committed)
