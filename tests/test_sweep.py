"""The sweep: which run is wanted next, and that what was cut off or failed is not lost or tried for ever."""

import argparse
import json
import subprocess
import sys

import pytest

from experiments import quality, sweep
from experiments.quality import WARMUP

LR = {"plain": 7e-4, "row3": 2.6e-4, "row4": 9e-4, "longer": 7e-4}  # where the loss of each row is lowest


def line(row, lr, warmup, seed):
    setting = {"n_layer": 24, "norm": "post", "optimizer": "muon", "budget": 64.0, "warmup": warmup}
    return setting | {"row": row, "lr": lr, "seed": seed, "val_loss": (lr - LR[row]) ** 2}


def test_rates_then_seeds_then_equal_time_then_warmup():
    ran, rows, seeds = [], ["plain", "row3", "row4", "longer"], [0, 1, 2]
    while wanted := sweep.wishes(
        quality.tries([line(*run) for run in ran]).get((24, "post", "muon", 64), {}), rows, seeds
    ):
        assert wanted[0] not in ran
        ran.append(wanted[0])
    rates = {row: [run[1] for run in ran if run[0] == row and run[2:] == (WARMUP, 0)] for row in rows}
    assert rates["plain"] == [7.1e-4, 1e-3, 5e-4]  # the best of the first three lies between worse ones
    assert rates["row3"] == [7.1e-4, 1e-3, 5e-4, 3.5e-4, 2.5e-4, 1.8e-4]  # goes on until it does
    assert rates["row4"] == [7.1e-4, 1e-3, 5e-4, 1.4e-3]
    assert rates["longer"] == [7.1e-4]  # takes plain's
    for row, best in {"plain": 7.1e-4, "row3": 2.5e-4, "row4": 1e-3, "longer": 7.1e-4}.items():
        assert [run[1:] for run in ran if run[0] == row and run[3]] == [(best, WARMUP, 1), (best, WARMUP, 2)]
    assert [run for run in ran if run[2] != WARMUP] == ran[-3:]


def test_a_given_rate():
    tried = quality.tries([line("row3", 7.1e-4, WARMUP, 0), line("plain", 1e-3, WARMUP, 0)])[24, "post", "muon", 64]
    wanted = sweep.wishes(tried, ["row3", "plain"], [0, 1], 7.1e-4)
    assert wanted == [("plain", 7.1e-4, WARMUP, 0), ("row3", 7.1e-4, WARMUP, 1), ("plain", 7.1e-4, WARMUP, 1)]


@pytest.mark.parametrize("fails", [False, True])
def test_runs_side_by_side(tmp_path, monkeypatch, capsys, fails):
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "quality.jsonl")
    started = []

    def start(run, gpu, args):
        started.append(run)
        write = f"open({str(tmp_path / 'quality_linux.jsonl')!r}, 'a').write({json.dumps(line(*run)) + chr(10)!r})"
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)" if fails else write])

    monkeypatch.setattr(sweep, "start", start)
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: None)
    args = {
        "text": "linux",
        "tokens": 64.0,
        "layers": 24,
        "rows": ["plain"],
        "lr": None,
        "seeds": [0, 1],
        "gpus": [0, 1],
        "each": 2,
    }
    sweep.sweep(argparse.Namespace(**args, minutes=1))
    assert len(started) == len(set(started)) == (3 if fails else 5)  # three rates, a seed, a warmup
    assert ("FAILED" in capsys.readouterr().out) == fails
