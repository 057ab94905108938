"""The pictures of bench.py, from the committed measurements; the measuring itself needs a GPU."""

import json
from statistics import median

import pytest
from matplotlib.figure import Figure

from experiments import plots


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """draw(name) -> the axes of the picture that bench.py makes of a committed measurement, and that measurement."""
    committed, saved, save = plots.ROOT / "results", [], Figure.savefig
    monkeypatch.setattr(plots, "ROOT", tmp_path)
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **how: (saved.append(self), save(self, path, **how)))

    def draw(name):
        result = json.loads((committed / f"{name}_h100-80gb-hbm3.json").read_text())
        result = result["shapes"] if name == "train" else result
        getattr(plots, f"plot_{name}")(result, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").exists()
        return saved[0].axes, result

    return draw


def test_kernel_picture(draw):
    (times, ladder), result = draw("kernel")
    got, want = [1 / bar.get_height() for bar in times.patches], [x["flash_over_moda"] for x in result["settings"]]
    assert got == pytest.approx(want, rel=0.02)  # a ratio of medians, a median of ratios
    assert [bar.get_width() for bar in ladder.patches] == [median(ms) for ms in result["ladder"].values()][::-1]


def test_train_picture(draw):
    (speed, extra), shapes = draw("train")
    rows = shapes["paper-48l"]["rows"]  # the last shape
    names = ["row 3", "row 4", "row 4, window 16"]
    want = [median(rows[name]["beside_ms"]) / median(rows[name]["ms"]) for name in names]
    assert [bar.get_height() for bar in speed.patches[len(shapes) - 1 :: len(shapes)]] == want
    more = sum(rows["row 4"]["kernels_ms"].values()) - sum(rows["plain"]["kernels_ms"].values())
    top = extra.patches[-1].get_y() + extra.patches[-1].get_height()
    assert top == pytest.approx(more / median(rows["plain"]["ms"]))


def test_scale_picture(draw):
    panels, result = draw("scale")
    for axes, points in zip(panels, result["sweeps"].values(), strict=True):
        drawn = [list(line.get_ydata()) for line in axes.lines]
        for kind in ("train", "prefill"):
            plain, row_4 = ([median(point[row][kind]) for point in points] for row in ("plain", "row 4"))
            assert plain in drawn and [a - b for a, b in zip(row_4, plain, strict=True)] in drawn
