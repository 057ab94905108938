"""The replication script, on a text of a few thousand words: cells, files, what is not run twice, the report."""

import json
import lzma
import random
import shutil
from pathlib import Path

import pytest
import torch

from experiments import quality, replicate, texts
from experiments.common import ROWS
from experiments.replicate import cell_config
from moda import MoDA
from text import make_tokenizer, tokenizer_to_json


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of its own for runs and results, and a corpus in it, one half packed."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "novels.txt").write_text("train Missing.txt")
    monkeypatch.setattr(texts, "ROOT", tmp_path)
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "results" / "quality.jsonl")
    monkeypatch.setattr(texts, "RUNS", tmp_path / "runs")
    words = random.Random(0).choices(
        ["the", "whale", "it", "was", "a", "captain", "of", "my", "ship", "and", "sea"], k=40_000
    )
    (tmp_path / "novels_train.txt").write_text(" ".join(words))
    (tmp_path / "novels_val.txt.xz").write_bytes(lzma.compress(" ".join(words[:2000]).encode()))
    return tmp_path


def test_cells_of_the_table():
    plain, row_3, row_4, wide = (cell_config(f"24l-post-{row}")[0] for row in ("plain", "row3", "row4", "wide"))
    count = [MoDA(config).num_params() for config in (plain, row_3, row_4, wide)]
    assert count[0] == count[1] < count[2] <= count[3] < count[2] * 1.01
    # the paper's Table 6, less what its larger vocabulary adds
    assert round((count[0] + (50_304 - 4096) * 384) / 1e6, 2) == 71.35
    assert not plain.depth_kv and row_3.depth_kv and not row_3.ffn_kv and row_4.ffn_kv
    assert cell_config("48l-pre-window8")[0].depth_window == 8 and cell_config("48l-pre-window8")[0].norm == "pre"
    for row in ROWS:
        assert cell_config(f"2l-pre-{row}")[1] == row
    for wrong in ("24l-post", "24-post-row4", "24l-mid-row4", "24l-post-row6"):
        with pytest.raises(ValueError, match="LAYERS-NORM-ROW"):
            cell_config(wrong)


def test_the_best_setting_counts():
    def line(row, lr, seed, loss):
        setting = {"n_layer": 24, "norm": "post", "optimizer": "adamw", "epochs": 1, "warmup": 300}
        return setting | {"row": row, "lr": lr, "seed": seed, "val_loss": loss}

    runs = [("plain", 1e-3, 1, 3.6), ("plain", 1e-3, 0, 3.7), ("plain", 2e-3, 0, 3.8), ("plain", 2e-3, 1, 3.55)]
    lines = [line(*run) for run in [*runs, ("plain", 4e-3, 2, 3.1), ("row4", 2e-3, 0, 3.5)]]
    best, tried = (f(lines)[24, "post", "adamw", 1] for f in (replicate.best_runs, replicate.tries))
    assert [(x["lr"], x["seed"]) for x in best["plain"]] == [(1e-3, 0), (1e-3, 1)]  # by the mean, not by one lucky seed
    assert replicate.differences(best["row4"], best["plain"]) == [pytest.approx(-0.2)]
    assert replicate.at_same_setting(best["row4"], tried["plain"]) == [pytest.approx(-0.3)]


def test_a_table_fills(place, monkeypatch, capsys):
    def main(*arguments):
        monkeypatch.setattr("sys.argv", ["replicate.py", *arguments])
        replicate.main()
        return [json.loads(line) for line in quality.RESULTS.read_text().splitlines()]

    with pytest.raises(SystemExit, match=r"novels\.pt"):
        main("1l-post-plain", "--device", "cpu")
    with pytest.raises(SystemExit, match="nothing in"):
        main("report")
    few = ("--epochs", "0.2", "--device", "cpu", "--data", str(place))
    lines = main("1l-post-plain", "2l-post-row4", *few)
    assert [line["cell"] for line in lines] == ["1l-post-plain", "2l-post-row4"]
    for line in lines:
        assert line["tokens"] == 16 * 512 and line["seed"] == 0 and len(line["sha256"]) == 2
        assert line["curve"][-1][0] == line["tokens"] and line["curve"][-1][2] == line["val_loss"]  # the sample is all
    with pytest.raises(SystemExit, match="needs the speed"):
        main("1l-post-longer", *few)
    *_, adamw = main("1l-post-plain", *few, "--optimizer", "adamw")
    assert adamw["optimizer"] == adamw["train_config"]["optimizer"] == "adamw" and lines[0]["optimizer"] == "muon"
    assert abs(adamw["val_loss"] - lines[0]["val_loss"]) > 1e-4  # trained afresh, in another folder
    lines.append(adamw)
    (place / "novels_train.txt").unlink()  # the tokens are kept
    assert main("1l-post-plain", *few) == lines
    said = capsys.readouterr().out
    assert "is in quality.jsonl already" in said and f"{place} is not read" in said
    lines = main("1l-post-row4", *few[:4], "--seeds", "0", "1")
    assert [(line["cell"], line["seed"]) for line in lines[3:]] == [("1l-post-row4", 0), ("1l-post-row4", 1)]

    main("report")
    text = (place / "results" / "quality.md").read_text()
    difference = lines[3]["val_loss"] - lines[0]["val_loss"]
    assert text.count(f" {difference:.4f} (1) |") == 4 and "2 layers, post-norm, Muon, 0.2 epochs" in text
    assert "1 layers, post-norm, AdamW, 0.2 epochs" in text
    assert (place / "results" / "quality.png").exists()

    elsewhere = [json.dumps(line | {"machine": {"device": "another"}}) + "\n" for line in lines]
    quality.RESULTS.write_text("".join(elsewhere))
    with pytest.raises(SystemExit, match="needs the speed"):
        main("1l-post-longer", *few)
    quality.RESULTS.write_text(json.dumps(lines[0] | {"sha256": ["another", "text"]}) + "\n")
    with pytest.raises(SystemExit, match="another text"):
        main("1l-post-plain", *few)
    quality.RESULTS.write_text(json.dumps(lines[0]) + "\n" + '{"cell": "1l-po')
    with pytest.raises(SystemExit, match=r"line 2 .* damaged"):
        main("report")


def test_the_committed_report_is_that_of_the_committed_runs(place):
    committed = Path(replicate.__file__).parent / "results"
    if not (committed / "quality.jsonl").exists():
        pytest.skip("the runs are gone: README suggests that for own ones")
    shutil.copy(committed / "quality.jsonl", quality.RESULTS)
    replicate.report()
    assert (place / "results" / "quality.md").read_text() == (committed / "quality.md").read_text()


def test_whether_a_row_pays():
    """What plain gains in a row's time was measured, or is read off the power law through its own losses."""

    def line(row, budget, loss, speed, seed=0, machine="new", norm="post"):
        setting = {"n_layer": 24, "norm": norm, "optimizer": "muon", "lr": 1e-3, "warmup": 300, "machine": machine}
        result = {"budget": budget, "val_loss": loss, "tokens_per_s": speed}
        return setting | {"row": row, "seed": seed} | result

    def law(tokens):
        return 0.8 + 3 / tokens**0.4

    lines = [line("plain", n, law(n), 1000) for n in (16, 64, 192)] + [line("plain", 64, law(64), 700, 1, "old")]
    lines += [line("row4", 64, law(64) - 0.03, 800), line("row4", 64, law(64) - 0.05, 600, 1, "old")]
    lines += [line("every2", 192, 1.0, 600, machine="old"), line("row3", 16, 1.0, 900) | {"n_layer": 48}]
    row_4, every_2 = quality.pays(lines)
    assert row_4[:2] == ((24, "post", "muon", 64), "row4") and row_4[3] == pytest.approx([-0.03, -0.05])
    gained = law(64) - law(80)
    assert row_4[4:] == (0.8, pytest.approx([gained - 0.03, gained - 0.05], rel=1e-6), "curve")
    assert every_2[1] == "every2" and every_2[4:] == (None, None, None)  # its speed is of another commit
    more = [line("plain", 4096, 0.85, 1000), line("plain", 64, 3.0, 2000, norm="pre")]  # farther away; another norm
    assert quality.pays(lines + more)[0] == row_4
    few = [x for x in lines if x["budget"] != 16]
    assert quality.pays(few)[0][4:] == (0.8, None, None)  # two budgets are no curve
    longer = [line("longer", 64, law(64) - drop, 1000, i) | {"tokens": 80e6} for i, drop in enumerate((0.01, 0.03))]
    (measured, _) = quality.pays([*few, *longer])
    assert measured[4:] == (0.8, pytest.approx([-0.01, -0.03]), "measured")
    curve, check, spread = replicate.what_it_rests_on([*lines, *longer])
    assert curve == "* The baseline's curve: 0.80 + 3.00 / (millions of tokens)^0.400."
    assert f"At 80.0 million tokens the baseline ends at {law(64) - 0.02:.4f} (2)" in check
    assert f"the curve says {law(80):.4f}." in check
    assert "varies by 0.0115" in spread
    seeds = (
        {0: {"val_loss": 1.0}, 1: {"val_loss": 1.2}},
        {0: {"val_loss": 3.0}, 1: {"val_loss": 3.4}},
        {0: {"val_loss": 9.0}},
    )
    pooled = quality.spread_of_a_run({name: {"setting": runs} for name, runs in zip("abc", seeds, strict=True)})
    assert pooled == pytest.approx((0.02 / 2 + 0.08 / 2) ** 0.5)
    for losses in ((1.0, 0.9, 0.5), (1.0, 1.1, 0.5), (1.0, 0.9, 0.9)):
        assert quality.power_law(dict(zip((16, 64, 192), losses, strict=True))) is None


def test_as_many_steps_as_the_time_of_the_other_buys():
    speeds = [("plain", 150), ("plain", 200), ("row4", 160), ("row3", 100), ("every4", 175)]
    done = [{"cell": f"1l-post-{row}", "tokens_per_s": speed} for row, speed in speeds]
    done.append({"cell": "2l-post-plain", "tokens_per_s": 900})
    rows = "plain", "row4", "longer", "longer3", "longer4"
    steps = [replicate.steps_of(f"1l-post-{row}", row, 84, done) for row in rows]
    assert steps == [84, 84, 105, 168, 96]


def test_a_budget_is_read_once(place, monkeypatch, capsys):
    def main(*arguments):
        monkeypatch.setattr("sys.argv", ["replicate.py", "--text", "linux", "--device", "cpu", *arguments])
        replicate.main()
        return replicate.finished("linux")

    tokens = torch.arange(3 * 16 * 512 + 5).remainder(300).to(torch.int16)
    tokenizer = tokenizer_to_json(make_tokenizer("bpe", ["int main"], 4096))
    data = {"tokens": tokens, "held_out": tokens[:3000] % 250, "tokenizer": tokenizer, "version": "Linux 6.1.0"}
    (place / "runs").mkdir()
    torch.save(data | {"sha256": ["a", "b"], "bytes": [7, 7]}, place / "runs" / "linux.pt")
    monkeypatch.setitem(texts.SHA256, "linux", ["a", "b"])
    read, real = [], replicate.train

    def train(*arguments, **options):
        read.append(arguments[4])
        return real(*arguments, **options)

    monkeypatch.setattr(replicate, "train", train)
    with pytest.raises(SystemExit, match="--tokens for other"):
        main("1l-post-plain", "--epochs", "1")
    with pytest.raises(SystemExit, match=r"32,768 tokens once, but there are 24,581"):
        main("1l-post-plain", "--tokens", "0.033")
    lines = main("1l-post-plain", "1l-post-row4", "--tokens", "0.02")
    assert all(torch.equal(x, tokens[: 2 * 16 * 512]) for x in read) and len(read) == 2
    for line in lines:
        assert (line["budget"], line["tokens"], line["text"]) == (0.02, 2 * 16 * 512, "linux")
        assert line["version"] == "Linux 6.1.0" and line["sha256"] == ["a", "b"] and "epochs" not in line
    assert main("1l-post-plain", "--tokens", "0.02") == lines and len(read) == 2
    assert main("1l-post-plain")[2]["budget"] == 0.024581  # all there is
    assert not quality.RESULTS.exists()  # that of the novels
    main("report")
    table = (place / "results" / "quality_linux.md").read_text()
    assert f"| {lines[1]['val_loss'] - lines[0]['val_loss']:.4f} (1) |" in table and "| 0.024581 | plain |" in table
    for line, speed in zip(lines, (150, 100), strict=True):
        line["tokens_per_s"] = speed
    replicate.results_path("linux").write_text("".join(json.dumps(line) + "\n" for line in lines))
    longer = main("1l-post-longer", "--tokens", "0.02")[2]
    assert (longer["budget"], longer["tokens"]) == (0.02, 3 * 16 * 512)  # the time of row 4, in tokens
    assert torch.equal(read[-1], tokens[: 3 * 16 * 512])
