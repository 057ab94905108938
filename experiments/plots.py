"""The pictures of the measurements in results/, drawn from the files there.

    python -m experiments.plots    draws all of them anew

bench.py and replicate.py call it when they have written a file. One palette for all pictures of this repository: a
model has the same colour wherever it is seen.
"""

import json
import math
import statistics
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from experiments.common import PAPER_TABLE_2, PAPER_TABLE_7, ROWS, SHAPES, train_floor
from experiments.quality import (
    OPTIMIZERS,
    WARMUP,
    at_same_setting,
    best_runs,
    best_setting,
    differences,
    finished,
    paper_difference,
    pays,
    tries,
)

RESULTS = Path(__file__).parent / "results"

# the palette, told apart by colour-blind readers too (Okabe and Ito)
BASELINE = "#0072B2"  # blue: plain, and attention without depth
ROW_3 = "#E69F00"  # orange
ROW_4 = "#D55E00"  # vermillion: MoDA
EVERY_4 = "#009E73"  # green: row 4, every 4th layer reads
WINDOW = "#CC79A7"  # pink: row 4 with a window of slots
OTHER = "#888888"  # grey: all other variants, and what stands for no model
INK = "#222222"  # the paper's points, which are diamonds, and floors
PAPER_POINTS = {"marker": "D", "color": INK, "ms": 5, "ls": "none"}
# parts of row 4's time, in tints of its colour
PARTS = {"depth forward": "#F7CDB0", "depth dq": "#EB9B64", "depth dk, dv": ROW_4, "rest": "#CCCCCC"}
SCALE_PANELS = {  # sweep: (label of the axis, what stays the same)
    "n_layer": ("layers", "T = 2048, B = 8"),
    "T": ("T", "24 layers, 32,768 tokens a step"),
    "depth_window": ("window (slots)", "48 layers, T = 2048, B = 8"),
}


def color_of(row):
    """The colour of a row of common.ROWS."""
    known = {"plain": BASELINE, "row3": ROW_3, "row4": ROW_4, "every4": EVERY_4}
    return known.get(row, WINDOW if row.startswith("window") else OTHER)


def titled(axes, title):
    axes.set_title(title, loc="left", fontsize=10)


def draw_kernel(result):
    """Time relative to FlashAttention-2 without depth, ours and the paper's; and the ladder."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    x, labels, ours, cudnn, paper = [], [], [], [], []
    for s in result["settings"]:
        m = {name: median(ms) for name, ms in s["ms"].items()}
        total = {name: m[f"{name} forward"] + m[f"{name} backward"] for name in ("flash", "cudnn", "triton")}
        gap = 0.5 * ((s["T"], s["n_slot"]) == (16384, 64) and len(x) > 4) + (s["n_slot"] > 64)
        x.append(len(x) + gap)  # the settings over T, over group and over n_slot stand apart
        labels.append(f"{s['T'] // 1024}K\n{s['group']}\n{s['n_slot']}")
        ours.append(total["triton"] / total["flash"])
        cudnn.append(total["cudnn"] / total["flash"])
        flash_ms, moda_ms = PAPER_TABLE_2[s["T"], s["group"], s["n_slot"]]
        paper.append(moda_ms / flash_ms)
    left.bar(x, ours, color=ROW_4, width=0.6, label="MoDA, here")
    left.plot(x, paper, label="MoDA in the paper (A100)", **PAPER_POINTS)
    left.axhline(1, color=BASELINE, lw=1.5, label="FlashAttention-2, no depth")
    left.plot(x, cudnn, "_", color=BASELINE, ms=22, mew=2.5, label="cuDNN attention, no depth")
    left.set_xticks(x, labels, fontsize=9)
    left.tick_params(axis="x", length=0)
    left.set_xlabel("T, query heads per KV head, depth slots")
    left.set_ylabel("of FlashAttention-2's time")
    titled(left, "time, forward + backward: less is better")
    handles, names = left.get_legend_handles_labels()
    by_name = dict(zip(names, handles, strict=True))
    order = ["MoDA, here", "MoDA in the paper (A100)", "FlashAttention-2, no depth", "cuDNN attention, no depth"]
    left.legend([by_name[name] for name in order], order, frameon=False, ncols=2, loc="upper left", fontsize=9)
    left.set_ylim(0, 1.3 * max(*ours, *paper))
    names = list(result["ladder"])[::-1]
    ms = [median(result["ladder"][name]) for name in names]
    for y, (name, value) in enumerate(zip(names, ms, strict=True)):
        color = ROW_4 if name == "continued" else OTHER  # which is what moda_attention does
        right.plot(value, y, "o", color=color, ms=9)
        text = f"{value:,.0f} ms" if value > 100 else f"{value:.3g} ms"
        right.annotate(text, (value, y), (0, 8), "data", "offset points", ha="center", fontsize=9)
        if name in PAPER_TABLE_7:
            right.plot(PAPER_TABLE_7[name], y, **PAPER_POINTS)
    right.set(xscale="log", xlim=(min(ms) / 4, max(*ms, *PAPER_TABLE_7.values()) * 3), ylim=(-0.5, len(names) - 0.3))
    right.set_yticks(range(len(names)), names)
    right.set_xticks(ticks := (1, 10, 100, 1000), [f"{tick:,}" for tick in ticks])
    right.xaxis.set_minor_locator(NullLocator())
    titled(right, "the ladder: T 1024, group 8, 64 slots")
    right.set_xlabel("ms, forward + backward; diamonds: the paper")
    figure.suptitle(f"{result['machine']['gpu']}, bf16, B = 1, 8 KV heads, head_dim 64", fontsize=11)
    return figure


def draw_train(result):
    """Tokens per second relative to the plain model, beside what bytes and FLOPs allow; where the extra time goes."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    shapes, width = result["shapes"], 0.26
    colors = {"row 3": ROW_3, "row 4": ROW_4, "row 4, window 16": WINDOW}
    left.axhline(1, color=BASELINE, lw=1.5, label="plain")
    for i, (row, color) in enumerate(colors.items()):
        for x, shape in enumerate(shapes.values()):
            info = shape["rows"][row]
            plain, ms = median(info["beside_ms"]), median(info["ms"])
            at = x + (i - 1) * width
            left.bar(at, plain / ms, width * 0.9, color=color, label=row if x == 0 else None)
            left.text(at, 0.03, f"{plain / ms:.2f}", ha="center", color="black", fontsize=9)
            floor = plain / (plain + info["floor_ms"])
            label = "floor: bytes and FLOPs alone" if x == i == 0 else None
            left.plot([at - width * 0.45, at + width * 0.45], [floor] * 2, color=INK, lw=2, label=label)
    left.set_ylim(0, 1.3)
    left.set_ylabel("of plain's tokens/s")
    titled(left, "training speed: more is better")
    left.legend(frameon=False, fontsize=9, ncols=3, loc="upper left")
    for x, (name, shape) in enumerate(shapes.items()):
        rows, bottom = shape["rows"], 0.0
        plain = median(rows["plain"]["ms"])
        for part, color in PARTS.items():
            ms = rows["row 4"]["kernels_ms"][part] - rows["plain"]["kernels_ms"][part]
            label = "projections and everything else" if part == "rest" else part
            right.bar(x, ms / plain, 0.5, bottom, color=color, label=label if x == 0 else None)
            bottom += ms / plain
        floor = rows["row 4"]["floor_ms"]
        *_, second = train_floor(*SHAPES[name], 1.0, shape["copy_TBps"] * 1e9)  # 1.0: a rate for products, not needed
        for ms, ls, label in ((floor + second, ":", "floor, and a second reading for dk, dv"), (floor, "-", "floor")):
            right.plot([x - 0.33, x + 0.33], [ms / plain] * 2, color=INK, lw=2, ls=ls, label=label if x == 0 else None)
    right.yaxis.set_major_formatter(PercentFormatter(1, 0))
    right.set_ylabel("of plain's step")
    titled(right, "GPU time that row 4 adds: less is better")
    handles, labels = right.get_legend_handles_labels()
    right.legend(handles[::-1], labels[::-1], frameon=False, fontsize=9, loc="upper left")  # in the order of the stack
    right.set_ylim(0, 1.35 * right.get_ylim()[1])
    for axes in (left, right):
        axes.set_xticks(range(len(shapes)), shapes)
        axes.tick_params(axis="x", length=0)
    gpu = next(iter(shapes.values()))["machine"]["gpu"]
    figure.suptitle(f"{gpu}, bf16, forward + backward", fontsize=11)
    return figure


def draw_scale(result):
    """Time of the plain model, and what depth adds to it, over n_layer, T and the window."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    kinds = {"train": ("training step", {"ls": "-"}), "prefill": ("prefill", {"ls": "--", "mfc": "white"})}
    for axes, (sweep, points) in zip(panels, result["sweeps"].items(), strict=True):
        x = [point["value"] or 94 for point in points]  # no window: the last of 48 layers reads 94 slots
        for kind, (label, style) in kinds.items():
            plain = [median(point["plain"][kind]) for point in points]
            extra = [median(point["row 4"][kind]) - ms for point, ms in zip(points, plain, strict=True)]
            axes.plot(x, plain, marker="o", color=BASELINE, label=f"{label}: plain", **style)
            axes.plot(x, extra, marker="o", color=ROW_4, label=f"{label}: row 4 adds", **style)
        label, title = SCALE_PANELS[sweep]
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.set_xticks(x, [f"{point['value']:,}" if point["value"] else "all" for point in points])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yticks(ticks := (1, 3, 10, 30, 100, 300), map(str, ticks))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y", color="#DDDDDD", lw=0.8)
        titled(axes, title)
    panels[0].set_ylabel("ms")
    panels[0].legend(frameon=False, fontsize=9, loc="lower right")
    figure.suptitle(f"{result['machine']['gpu']}, bf16, 512 wide, 8 heads, 2 KV heads, not compiled", fontsize=11)
    return figure


def draw_curves(axes, n_layer, by_row):
    """Validation loss minus plain's over training, the mean and the range over seeds, each row at the best setting that
    plain was run at too. by_row: {row: {(lr, warmup): {seed: line}}}."""
    for row in ("row3", "row4"):
        tried = {setting: runs for setting, runs in by_row.get(row, {}).items() if setting in by_row.get("plain", {})}
        if not tried:
            continue
        setting, curves = best_setting(tried), []
        plain = by_row["plain"][setting]
        for seed, line in tried[setting].items():
            if seed in plain:
                pairs = zip(line["curve"], plain[seed]["curve"], strict=True)
                curves.append(
                    {tokens / 1e6: loss - base for (tokens, _, loss), (*_, base) in pairs if base is not None}
                )
        if curves:
            tokens = list(curves[0])
            at = [[curve[x] for curve in curves] for x in tokens]
            axes.fill_between(tokens, list(map(min, at)), list(map(max, at)), color=color_of(row), alpha=0.15, lw=0)
            style = {"color": color_of(row), "ls": "-" if n_layer > 24 else "--", "lw": 2}
            axes.plot(tokens, list(map(statistics.mean, at)), label=f"{n_layer} layers, {row}", **style)


def draw_rates(axes, n_layer, by_row):
    """The loss at each learning rate -> the lowest of them."""
    lowest = math.inf
    for row in ("plain", "row3", "row4"):
        runs = [(lr, by_seed[0]["val_loss"]) for (lr, warmup), by_seed in sorted(by_row.get(row, {}).items())
                if warmup == WARMUP and 0 in by_seed]  # fmt: skip
        if len(runs) > 2:
            style = {"color": color_of(row), "ls": "-" if n_layer > 24 else "--", "marker": "o"}
            axes.plot(*zip(*runs, strict=True), label=f"{n_layer} layers, {row}", **style)
            lowest = min(lowest, *(loss for _, loss in runs))
    return lowest


def draw_differences(axes, entries):
    """entries: (label, row, differences, the paper's) from top to bottom, or (heading,)."""
    labels = []
    for y, (label, *entry) in enumerate(entries):
        labels.append(f"{label}:" if not entry else label)
        if not entry:
            continue
        row, delta, paper = entry
        mean, color = statistics.mean(delta), color_of(row)
        if abs(mean) < 0.3:
            error = statistics.stdev(delta) if len(delta) > 1 else None
            axes.errorbar(mean, y, xerr=error, fmt="o", color=color, capsize=4, zorder=3)
        else:  # far off, such as stuck at the unigram loss
            sign = math.copysign(1, mean)
            axes.plot(0.3 * sign, y, ">" if sign > 0 else "<", color=color)
            axes.text(0.29 * sign, y, f"{mean:+.2f}", ha="right" if sign > 0 else "left", va="center", fontsize=9)
        if paper is not None:
            axes.plot(paper, y, **PAPER_POINTS)
    axes.axvline(0, color=BASELINE, lw=1.5)
    axes.set_yticks(range(len(entries)), labels, fontsize=9)
    for text, (_, *entry) in zip(axes.get_yticklabels(), entries, strict=True):
        text.set_fontweight("normal" if entry else "bold")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=5)


def draw_quality(lines):
    """Of the runs on the novels. Where most was run: rows 3 and 4 minus plain of the same seed over training, and the
    loss at each learning rate. Differences at the end, an optimizer a panel: rows 3 and 4 minus plain, each at its best
    setting, all others at the same setting as plain."""
    groups, tried, panels = best_runs(lines), tries(lines), {}
    for (n_layer, norm, optimizer, epochs), rows in sorted(groups.items()):
        heading, entries = f"{n_layer} layers, {norm}-norm" + f", {epochs:g} epochs" * (epochs != 1), []
        for row in (row for row in ROWS if row != "plain" and row in rows):
            delta, paper = differences(rows[row], rows.get("plain", [])), paper_difference(n_layer, norm, row, epochs)
            if row not in ("row3", "row4"):
                delta = at_same_setting(rows[row], tried[n_layer, norm, optimizer, epochs].get("plain", {}))
            if delta:
                entries.append((f"{row} ({len(delta)})", row, delta, paper))
        if entries:
            panels.setdefault(optimizer, []).extend([(heading,), *entries])
    panels = {optimizer: panels[optimizer] for optimizer in OPTIMIZERS if optimizer in panels}
    figure = Figure(figsize=(12, 9), layout="constrained")
    columns = figure.add_gridspec(1, 2)
    above, below = (figure.add_subplot(cell) for cell in columns[0].subgridspec(2, 1))
    heights = [len(entries) + 2 for entries in panels.values()]
    grid = columns[1].subgridspec(max(1, len(panels)), 1, height_ratios=heights or None)

    _, *most = max(groups, key=lambda group: sum(map(len, groups[group].values())))  # norm, optimizer, epochs
    lowest = math.inf
    for (n_layer, *group), by_row in sorted(tried.items()):
        if group == most:
            draw_curves(above, n_layer, by_row)
            lowest = min(lowest, draw_rates(below, n_layer, by_row))
    where = f"{OPTIMIZERS[most[1]]}, {most[0]}-norm"
    above.axhline(0, color=BASELINE, lw=1.5, label="plain")
    above.set(xlabel="training tokens (millions)", ylabel="nats per token, minus plain")
    titled(above, f"{where}: validation loss (a sample), mean and range over seeds")
    above.legend(frameon=False, loc="upper right", fontsize=9, ncols=2)
    if lowest < math.inf:
        below.set_ylim(lowest - 0.01, lowest + 0.2)  # what got stuck is far above
        below.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0.12, 1))
    below.set(xscale="log", xlabel="learning rate", ylabel="nats per token")
    below.set_xticks(rates := (5e-4, 1e-3, 2e-3, 4e-3), [f"{lr:g}" for lr in rates])
    below.xaxis.set_minor_locator(NullLocator())
    titled(below, f"{where}: loss at the end by learning rate, warmup {WARMUP}, seed 0")
    for i, (optimizer, entries) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[i])
        draw_differences(axes, entries)
        titled(axes, f"{OPTIMIZERS[optimizer]}: loss at the end, minus plain (pairs)")
        axes.set_xlabel("nats per token; diamonds: the paper" if i == len(panels) - 1 else None)
    return figure


def draw_front(lines, timed):
    """What less loss costs in time. lines: of one budget. timed: {row: of bench.py train, ms and beside_ms}. Rows that
    are in both; up and to the left is better; the line joins those that no other beats in both."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes, points = figure.subplots(), []
    ((*_, tokens), groups), *_ = tries(lines).items()
    for row in (row for row in ROWS if row != "plain" and row in groups and row in timed):
        runs = groups[row][best_setting(groups[row])]
        gains = [-delta for delta in at_same_setting([*runs.values()], groups["plain"])]
        if gains:
            extra = 100 * median([a / b - 1 for a, b in zip(timed[row]["ms"], timed[row]["beside_ms"], strict=True)])
            points.append((extra, statistics.mean(gains), gains, row))
    best, front = 0, [(0, 0)]
    for extra, gain, gains, row in sorted(points):
        if gain > best:
            best = gain
            front.append((extra, gain))
        error, n = (statistics.stdev(gains), f"{len(gains)} seeds") if len(gains) > 1 else (None, "1 seed")
        face = color_of(row) if len(gains) > 1 else "white"
        axes.errorbar(extra, gain, yerr=error, fmt="o", ms=8, color=color_of(row), mfc=face, capsize=4, zorder=3)
        name = ROWS[row][0].replace("+ ", f"{row}: ", 1)
        at, side = ((0, 6), "center") if error else ((9, -13), "left")  # above the error bar, or beside the point
        at = {"xytext": at, "textcoords": "offset points", "ha": side, "fontsize": 9}
        axes.annotate(f"{name} ({n})", (extra, gain + (error or 0)), **at)
    axes.plot(*zip(*front, strict=True), color=OTHER, lw=1, zorder=1)
    axes.plot(0, 0, "o", ms=8, color=BASELINE, clip_on=False, zorder=3)
    axes.annotate("plain Transformer", (0, 0), (9, 4), textcoords="offset points", fontsize=9)
    right = max([extra for extra, *_ in points], default=1)
    axes.set(xlim=(0, 1.25 * right), ylim=(0, None), ylabel="loss below the baseline's, nats per token")
    axes.set_xlabel(
        "extra time of forward and backward alone, at width 512 (one H100); bars: standard deviation over seeds"
    )
    axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    titled(axes, f"24 layers of 384, {tokens:g} million tokens of C code: gain against extra time")
    return figure


def draw_budgets(lines, novels):
    """How far below plain's the loss is, over the training tokens: for the same text, and for the same time. lines: of
    "linux"; novels: of the other text; post-norm, Muon, 24 layers; squares: 48. Bars: seeds. Hollow: one seed. Dashed:
    read off a curve. The diamonds are the paper's."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    shift = {"row3": 0.97, "row4": 1.0, "every4": 1.03}  # so that bars lie side by side
    names = {"row3": "MoDA without FFN slots (row3)", "row4": "MoDA (row4)", "every4": "MoDA, every 4th layer reads"}
    paid, best, tried = pays(lines), best_runs(novels), tries(novels)
    for n_layer, mark, aside in ((24, "o", 1.0), (48, "s", 1.12)):
        shape = n_layer, "post", "muon"
        small, settings = best[(*shape, 1)], tried[(*shape, 1)]
        for row, offset in ((row, aside * offset) for row, offset in shift.items()):
            text, time, color = {}, {}, color_of(row)  # {millions of tokens: the gain of each seed}
            for group, name, _, same_text, _, same_time, _ in paid:
                if (*group[:3], name) == (*shape, row):
                    text[group[3]] = [-delta for delta in same_text]
                    if same_time:
                        time[group[3]] = [-delta for delta in same_time]
            for axes, points, line in ((left, text, "-"), (right, time, "--")):
                at = sorted(points)
                axes.plot([n * offset for n in at], [statistics.mean(points[n]) for n in at], line, color=color)
            if gains := [-delta for delta in differences(small.get(row, []), small["plain"])]:
                text[16] = gains
            if row == "row4" and n_layer == 24:  # plain in its time ran at one setting: minus row 4 at the same
                time[16] = at_same_setting(small["longer"], settings[row])
            for axes, points in ((left, text), (right, time)):
                for n, gains in points.items():
                    error, face = (statistics.stdev(gains), color) if len(gains) > 1 else (None, "white")
                    style = {"fmt": mark, "ms": 7, "color": color, "mfc": face, "capsize": 4}
                    axes.errorbar(n * offset, statistics.mean(gains), yerr=error, zorder=3, **style)
            if n_layer == 24:
                left.plot([], [], "o-", color=color, label=names[row])
                if paper := paper_difference(24, "post", row):
                    left.plot(400, -paper, **PAPER_POINTS)
                    left.annotate(row, (400, -paper), (7, -4), textcoords="offset points", fontsize=9)
    for axes in (left, right):
        axes.axhline(0, color=BASELINE, lw=1.5)
        axes.set(xscale="log", xlabel="training tokens (millions)", xlim=(12, 560))
        axes.set_xticks([16, 64, 192], ["16\nnovels", "64\nC code", "192\nC code"])
        axes.xaxis.set_minor_locator(NullLocator())
    left.set_xticks([16, 64, 192, 400], ["16\nnovels", "64\nC code", "192\nC code", "the paper,\nunknown"])
    left.set_ylabel("nats per token below the baseline's loss")
    title = "squares: 48 layers; hollow: one seed"
    left.legend(frameon=False, fontsize=9, loc="lower right", title=title, title_fontsize=9)
    for y, text, side in ((0.0007, "above: MoDA is ahead", "bottom"), (-0.0007, "below: the baseline is", "top")):
        right.text(540, y, text, ha="right", va=side, color=BASELINE, fontsize=9)
    titled(left, "for the same text; bars: standard deviation over seeds")
    titled(right, "for the same time, 24 layers (192M and row3: by a curve)")
    return figure


DRAW = {"kernel": draw_kernel, "train": draw_train, "scale": draw_scale}


def save(figure, path):
    """Write the figure as PNG."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    print(f"wrote {path.parent.name}/{path.name}")


def redraw(path):
    """Draw what a file of bench.py, COMMAND_GPU.json, holds -> COMMAND_GPU.png beside it. `generate` has no picture."""
    draw = DRAW.get(path.stem.partition("_")[0])
    if draw:
        save(draw(json.loads(path.read_text())), path.with_suffix(".png"))


def main():
    for path in sorted(RESULTS.glob("*.json")):
        redraw(path)
    if lines := finished():
        save(draw_quality(lines), RESULTS / "quality.png")
    timed = json.loads((RESULTS / "train_h100-80gb-hbm3.json").read_text())["shapes"]["24l-512"]["rows"]
    timed = {row.replace("row ", "row"): times for row, times in timed.items()}  # bench.py spells them otherwise
    if lines := finished("linux"):
        save(draw_front(lines, timed), RESULTS / "front.png")
        save(draw_budgets(lines, finished()), RESULTS / "budgets.png")


if __name__ == "__main__":
    main()
