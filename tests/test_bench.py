"""The pictures of bench.py, from the committed measurements; the measuring itself needs a GPU."""

import json

import pytest

import bench


@pytest.mark.parametrize("name", ["kernel", "train", "scale"])
def test_pictures(name, tmp_path, monkeypatch):
    committed = bench.ROOT / "results" / f"{name}_h100-80gb-hbm3.json"
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    result = json.loads(committed.read_text())
    picture = tmp_path / f"{name}.png"
    getattr(bench, f"plot_{name}")(result["shapes"] if name == "train" else result, picture)
    assert picture.stat().st_size > 10_000
