"""What the runs in results/quality.jsonl say."""

import json
import statistics
from pathlib import Path

from experiments.common import PAPER_TABLE_6

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
OPTIMIZERS = {"muon": "Muon", "adamw": "AdamW"}  # and how they are spelled
WARMUP = 300  # steps


def results_path(text):
    """The file with the runs on a text of texts.TEXTS."""
    return RESULTS if text == "novels" else RESULTS.with_stem(f"{RESULTS.stem}_{text}")


def finished(text="novels"):
    """The lines of results/quality.jsonl, of another text quality_TEXT.jsonl. ValueError if one is damaged."""
    path, lines = results_path(text), []
    for i, line in enumerate(path.read_text().splitlines() if path.exists() else []):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {i + 1} of {path} is damaged, remove it: {error}") from error
    return lines


def spread(values):
    """Mean ± standard deviation, as text."""
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def tries(lines):
    """Lines of results/quality.jsonl -> {(n_layer, norm, optimizer, epochs): {row: {(lr, warmup): {seed: line}}}}.
    Where the lines have no epochs, the budget takes their place."""
    groups = {}
    for line in lines:
        length = line["epochs"] if "epochs" in line else line["budget"]
        rows = groups.setdefault((line["n_layer"], line["norm"], line["optimizer"], length), {})
        rows.setdefault(line["row"], {}).setdefault((line["lr"], line["warmup"]), {})[line["seed"]] = line
    return groups


def best_setting(tried):
    """{(lr, warmup): {seed: line}} -> the setting with the lowest mean loss, of those with the most seeds."""
    most = max(map(len, tried.values()))
    settings = [setting for setting, runs in tried.items() if len(runs) == most]
    return min(settings, key=lambda setting: sum(line["val_loss"] for line in tried[setting].values()))


def best_runs(lines):
    """-> {(n_layer, norm, optimizer, epochs): {row: its lines, seed by seed, at its best setting}}."""

    def best(tried):
        runs = tried[best_setting(tried)]
        return [runs[seed] for seed in sorted(runs)]

    return {group: {row: best(tried) for row, tried in rows.items()} for group, rows in tries(lines).items()}


def differences(runs, plain):
    """Of lines of results/quality.jsonl: loss minus that of the plain run with the same seed, where there is one."""
    losses = {line["seed"]: line["val_loss"] for line in plain}
    return [line["val_loss"] - losses[line["seed"]] for line in runs if line["seed"] in losses]


def at_same_setting(runs, plain):
    """The same, for runs of one learning rate and warmup, to plain at it; plain: {(lr, warmup): {seed: line}}."""
    return differences(runs, plain.get((runs[0]["lr"], runs[0]["warmup"]), {}).values())


def paper_difference(n_layer, norm, row, epochs=1):
    """The paper's loss of this row minus that of plain, in nats per token (Table 6), or None."""
    paper = dict(
        zip(("plain", "row3", "row4"), PAPER_TABLE_6.get((n_layer, norm), ()) if epochs == 1 else (), strict=False)
    )
    return paper[row] - paper["plain"] if row in paper and row != "plain" else None
