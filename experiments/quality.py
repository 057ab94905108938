"""What the runs in results/quality.jsonl say."""

import json
import math
import statistics
from pathlib import Path

from experiments.common import PAPER_TABLE_6, ROWS
from moda import plain

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
OPTIMIZERS = {"muon": "Muon", "adamw": "AdamW"}  # and how they are spelled
WARMUP = 300  # steps
AS_LONG_AS = {"longer": "row4", "longer3": "row3", "longer4": "every4"}  # plain, with the time of these rows


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


def relative_speed(lines, row):
    """Training speed of a row, of lines of one shape: tokens/s over plain's. Medians over the runs of one machine and
    commit, of those with both that on which plain is fastest. None if there is none, or if plain is a fifth slower
    there than anywhere: with older code, other parts took the time."""
    plain_runs = [line for line in lines if line["row"] == "plain"]
    machines = [line["machine"] for line in lines if line["row"] == row]
    both = [line for line in plain_runs if line["machine"] in machines]
    fastest = max(both, key=lambda line: line["tokens_per_s"], default=None)
    if not both or fastest["tokens_per_s"] < 0.8 * max(line["tokens_per_s"] for line in plain_runs):
        return None
    here = [line for line in lines if line["machine"] == fastest["machine"]]
    speeds = [[line["tokens_per_s"] for line in here if line["row"] == name] for name in (row, "plain")]
    return statistics.median(speeds[0]) / statistics.median(speeds[1])


def power_law(points):
    """{tokens: loss} at three budgets -> E, A, a of the law E + A / tokens ** a that goes through them, or None."""
    (x, f), (y, g), (z, h) = sorted(points.items())
    low, high = 1e-3, 5.0

    def bend(a):  # the first drop over the second: it grows with a
        return (x**-a - y**-a) / (y**-a - z**-a)

    if not f > g > h or not bend(low) < (f - g) / (g - h) < bend(high):
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if bend(middle) < (f - g) / (g - h) else (low, middle)
    scale = (g - h) / (y**-low - z**-low)
    return h - scale * z**-low, scale, low


def law_of(tried, shape, budget):
    """`power_law` through plain's losses at the three budgets nearest to this one, or None. shape: a group's, see
    `tries`, without the budget."""
    alike = {n: there["plain"] for (*other, n), there in tried.items() if other == [*shape] and "plain" in there}
    budgets = sorted(alike, key=lambda n: abs(math.log(n / budget)))[:3]
    best = {n: alike[n][best_setting(alike[n])].values() for n in budgets}
    losses = {n: statistics.mean(line["val_loss"] for line in runs) for n, runs in best.items()}
    return power_law(losses) if len(losses) == 3 else None


def spread_of_a_run(rows):
    """Standard deviation of one run's loss, pooled over the rows {row: settings} with several seeds; or None."""
    best = [rows[row][best_setting(rows[row])].values() for row in rows]
    losses = [[line["val_loss"] for line in runs] for runs in best if len(runs) > 1]
    n = sum(len(x) - 1 for x in losses)
    return math.sqrt(sum(statistics.variance(x) * (len(x) - 1) for x in losses) / n) if n else None


def pays(lines):
    """Whether MoDA pays for its time -> [(group, row, runs, same_text, speed, same_time, how)], a group as in `tries`.

    runs: of the row, at its best setting. same_text: differences of loss, minus plain at that setting, seed by seed.
    speed: `relative_speed`. same_time: each run minus plain that has read more, as much as it can in the row's time;
    below zero the row is ahead. how: "measured", minus the mean over the seeds of a row of AS_LONG_AS, or "curve", by
    the power law through plain's losses at the three nearest budgets. None: a number is missing."""
    tried, out = tries(lines), []
    for (*shape, budget), rows in sorted(tried.items()):
        law = law_of(tried, shape, budget)
        same_shape = [line for line in lines if [line["n_layer"], line["norm"], line["optimizer"]] == shape]
        longer = {row: rows[name][best_setting(rows[name])] for name, row in AS_LONG_AS.items() if name in rows}
        for row in (row for row in ROWS if row in rows and ROWS[row][1] is not plain):
            runs = [*rows[row][best_setting(rows[row])].values()]
            same_text, speed = at_same_setting(runs, rows.get("plain", {})), relative_speed(same_shape, row)
            same_time, how = None, None
            if row in longer:
                beside = statistics.mean(line["val_loss"] for line in longer[row].values())
                same_time, how = [line["val_loss"] - beside for line in runs], "measured"
            elif speed and law:
                gained = law[1] * (budget ** -law[2] - (budget / speed) ** -law[2])
                same_time, how = [delta + gained for delta in same_text], "curve"
            if same_text:
                out.append(((*shape, budget), row, runs, same_text, speed, same_time, how))
    return out


def paper_difference(n_layer, norm, row, epochs=1):
    """The paper's loss of this row minus that of plain, in nats per token (Table 6), or None."""
    paper = dict(
        zip(("plain", "row3", "row4"), PAPER_TABLE_6.get((n_layer, norm), ()) if epochs == 1 else (), strict=False)
    )
    return paper[row] - paper["plain"] if row in paper and row != "plain" else None
