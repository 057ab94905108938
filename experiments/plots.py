"""The pictures of bench.py and replicate.py."""

import math
import statistics
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.common import PAPER_TABLE_2, ROWS
from experiments.quality import NAMES, WARMUP, at_same_setting, best_setting, differences, paper_difference

ROOT = Path(__file__).parent
TITLES = {"n_layer": "T = 2048, B = 8", "T": "24 layers, 32,768 tokens", "depth_window": "48 layers, T = 2048, B = 8"}


def plot_kernel(result, path):
    """Time relative to FlashAttention-2 without depth, ours and the paper's; and the ladder."""
    fig = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(2, 1))
    labels, ours, cudnn, paper = [], [], [], []
    for s in result["settings"]:
        m = {name: median(ms) for name, ms in s["ms"].items()}
        total = {name: m[f"{name} forward"] + m[f"{name} backward"] for name in ("flash", "cudnn", "triton")}
        labels.append(f"{s['T'] // 1024}K\nG {s['group']}\n{s['n_slot']}")
        ours.append(total["triton"] / total["flash"])
        cudnn.append(total["cudnn"] / total["flash"])
        flash_ms, moda_ms = PAPER_TABLE_2[s["T"], s["group"], s["n_slot"]]
        paper.append(moda_ms / flash_ms)
    x = range(len(labels))
    left.axhline(1, color="#D22030", lw=1.5)
    left.bar(x, ours, color="#E69F00", width=0.6, label="MoDA, here")
    left.plot(x, cudnn, "_", color="#0072B2", ms=22, mew=2.5, label="cuDNN attention, no depth")
    left.plot(x, paper, "D", color="#222222", mfc="white", ms=7, label="MoDA in the paper (A100)")
    left.set_xticks(list(x), labels, fontsize=9)
    left.set_xlabel("T / group / depth slots")
    left.set_ylabel("time, forward + backward")
    left.set_title("relative to FlashAttention-2 without depth (red)", loc="left", fontsize=11)
    left.legend(frameon=False, ncols=3, loc="upper left", fontsize=9)
    left.set_ylim(0, 1.2 * max(*ours, *paper))
    names = list(result["ladder"])[::-1]
    ms = [median(result["ladder"][name]) for name in names]
    right.barh(names, ms, color="#E69F00", height=0.6)
    right.set_xscale("log")
    right.set_xlim(min(ms) / 2, max(ms) * 8)
    for i, value in enumerate(ms):
        right.text(value * 1.15, i, f"{value:.3g} ms", va="center", fontsize=9)
    right.set_title("the ladder: T 1024, G 8, 64 slots", loc="left", fontsize=11)
    right.set_xlabel("forward + backward, ms")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    fig.suptitle(f"{result['machine']['gpu']}, bf16, B = 1, 8 KV heads, head_dim 64", fontsize=11)
    fig.savefig(path, dpi=130)
    print(f"wrote {path.relative_to(ROOT.parent)}")


def plot_train(results, path):
    """Tokens per second relative to the plain model, beside what bytes and FLOPs allow; where the extra time goes."""
    fig = Figure(figsize=(12, 4.4), layout="constrained")
    left, right = fig.subplots(1, 2)
    shapes, width = list(results), 0.26
    colors = {"row 3": "#E69F00", "row 4": "#009E73", "row 4, window 16": "#CC79A7"}
    for i, (row, color) in enumerate(colors.items()):
        for x, name in enumerate(shapes):
            info = results[name]["rows"]
            plain, ms = median(info[row]["beside_ms"]), median(info[row]["ms"])
            at = x + (i - 1) * width
            left.bar(at, plain / ms, width * 0.9, color=color, label=row if x == 0 else None)
            left.text(at, plain / ms - 0.03, f"{plain / ms:.2f}", ha="center", va="top", color="#000000", fontsize=9)
            floor = plain / (plain + info[row]["floor_ms"])
            left.plot([at - width * 0.45, at + width * 0.45], [floor] * 2, color="#222222", lw=2,
                      label="floor: bytes and FLOPs alone" if x == i == 0 else None)  # fmt: skip
    left.axhline(1, color="#D22030", lw=1.5)
    left.set_xticks(range(len(shapes)), shapes)
    left.set_ylim(0, 1.3)
    left.set_ylabel("tokens/s, of plain")
    left.set_title("training speed relative to the plain model (red)", loc="left", fontsize=11)
    left.legend(frameon=False, fontsize=9, ncols=2, loc="upper left")
    parts = {"depth forward": "#A6CEE3", "depth dq": "#56B4E9", "depth dk, dv": "#0072B2", "rest": "#CCCCCC"}
    for x, name in enumerate(shapes):
        info, bottom = results[name]["rows"], 0.0
        plain = median(info["plain"]["ms"])
        for part, color in parts.items():
            ms = info["row 4"]["kernels_ms"][part] - info["plain"]["kernels_ms"][part]
            label = "projections and everything else" if part == "rest" else part
            right.bar(x, ms / plain, 0.5, bottom, color=color, label=label if x == 0 else None)
            bottom += ms / plain
        floor = info["row 4"]["floor_ms"] / plain
        label = "floor: all but a second reading for dk, dv" if x == 0 else None
        right.plot([x - 0.33, x + 0.33], [floor] * 2, color="#222222", lw=2, label=label)
    right.set_xticks(range(len(shapes)), shapes)
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.set_title("row 4: extra GPU time, of the plain step", loc="left", fontsize=11)
    handles, labels = right.get_legend_handles_labels()
    right.legend(handles[::-1], labels[::-1], frameon=False, fontsize=9, loc="upper left")  # in the order of the stack
    right.set_ylim(0, 1.35 * right.get_ylim()[1])
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    fig.suptitle(f"{results[shapes[0]]['machine']['gpu']}, bf16, forward + backward", fontsize=11)
    fig.savefig(path, dpi=130)
    print(f"wrote {path.relative_to(ROOT.parent)}")


def plot_scale(result, path):
    """Time of the plain model, and what depth adds to it, over n_layer, T and the window."""
    fig = Figure(figsize=(12, 4), layout="constrained")
    panels = fig.subplots(1, 3, sharey=True)
    kinds = {"train": ("training step", "#0072B2"), "prefill": ("prefill", "#E69F00")}
    for ax, (sweep, points) in zip(panels, result["sweeps"].items(), strict=True):
        x = [point["value"] or 94 for point in points]  # no window: the last of 48 layers reads 94 slots
        for kind, (label, color) in kinds.items():
            plain = [median(point["plain"][kind]) for point in points]
            extra = [median(point["row 4"][kind]) - ms for point, ms in zip(points, plain, strict=True)]
            ax.plot(x, plain, "o--", color=color, mfc="white", label=f"{label}, plain")
            ax.plot(x, extra, "o-", color=color, label=f"{label}, row 4 adds")
        ax.set(xscale="log", yscale="log", xlabel=sweep)
        ax.set_xticks(x, ["all" if point["value"] is None else f"{point['value']}" for point in points])
        ax.set_xticks([], minor=True)
        ax.set_title(TITLES[sweep], loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ms")
    panels[0].legend(frameon=False, fontsize=9)
    fig.suptitle(f"{result['machine']['gpu']}, bf16, 512 wide, 8 heads, 2 kv heads, not compiled", fontsize=11)
    fig.savefig(path, dpi=130)
    print(f"wrote {path.relative_to(ROOT.parent)}")


def plot(groups, tried):
    """Where most was run: rows 3 and 4 minus plain of the same seed over training, at the best setting that plain was
    run at too, and the loss at each learning rate. Differences at the end, an optimizer a panel: rows 3 and 4 minus
    plain, each at its best setting, all others at the same setting as plain."""
    colors, points = {"row3": "#E69F00", "row4": "#009E73"}, {}
    for (n_layer, norm, optimizer, epochs), rows in sorted(groups.items()):
        title = f"{n_layer} layers, {norm}-norm" + f", {epochs:g} epochs" * (epochs != 1)
        for row in (row for row in ROWS if row != "plain" and row in rows):
            delta, paper = differences(rows[row], rows.get("plain", [])), paper_difference(n_layer, norm, row, epochs)
            if row not in colors:
                delta = at_same_setting(rows[row], tried[n_layer, norm, optimizer, epochs].get("plain", {}))
            if delta:
                points.setdefault(optimizer, []).append((f"{title}: {row} ({len(delta)})", row, delta, paper))
    panels = [(optimizer, points[optimizer]) for optimizer in NAMES if optimizer in points]
    figure = Figure(figsize=(12, 8), layout="constrained")
    columns = figure.add_gridspec(1, 2)
    left, below = (figure.add_subplot(cell) for cell in columns[0].subgridspec(2, 1))
    grid = columns[1].subgridspec(max(1, len(panels)), 1, height_ratios=[len(rows) + 1 for _, rows in panels] or None)
    _, most_norm, most, most_epochs = max(groups, key=lambda group: sum(map(len, groups[group].values())))
    for (n_layer, norm, optimizer, epochs), rows in sorted(groups.items()):
        here = tried[n_layer, norm, optimizer, epochs]
        wanted = (norm, optimizer, epochs) == (most_norm, most, most_epochs)
        for row in (row for row in colors if row in rows and wanted):
            shared = {setting: runs for setting, runs in here[row].items() if setting in here.get("plain", {})}
            if not shared:
                continue
            setting = best_setting(shared)
            label, plain = f"{n_layer} layers: {row}", here["plain"][setting]
            for line in (line for seed, line in shared[setting].items() if seed in plain):
                pairs = zip(line["curve"], plain[line["seed"]]["curve"], strict=True)
                seen = [(tokens / 1e6, loss - base) for (tokens, _, loss), (*_, base) in pairs if base is not None]
                left.plot(*zip(*seen, strict=True), color=colors[row], lw=n_layer / 20, label=label)
                label = None
    left.axhline(0, color="#D22030", lw=1.5, label="plain")
    left.set(xlabel="training tokens (millions)", ylabel="nats per token, lower is better")
    title = f"{NAMES[most]}, {most_norm}-norm: validation loss (a sample) minus plain, same setting"
    left.set_title(title, loc="left", fontsize=10)
    left.legend(frameon=False, loc="upper right", fontsize=9, ncols=2)
    searched, lowest = {"plain": "#D22030", **colors}, math.inf
    for (n_layer, *group), rows in sorted(tried.items()):
        for row, color in searched.items():
            runs = [(lr, by_seed[0]["val_loss"]) for (lr, warmup), by_seed in sorted(rows.get(row, {}).items())
                    if warmup == WARMUP and 0 in by_seed]  # fmt: skip
            if group == [most_norm, most, most_epochs] and len(runs) > 2:
                label = f"{n_layer} layers: {row}"
                below.plot(*zip(*runs, strict=True), "o-", color=color, lw=n_layer / 20, label=label)
                lowest = min(lowest, *(loss for _, loss in runs))
    if lowest < math.inf:
        below.set_ylim(lowest - 0.01, lowest + 0.2)  # what got stuck is far above
        below.legend(frameon=False, fontsize=9)
    below.set(xscale="log", xlabel="learning rate", ylabel="nats per token, at the end")
    below.set_xticks(rates := (5e-4, 1e-3, 2e-3, 4e-3), [f"{lr:g}" for lr in rates])
    below.set_xticks([], minor=True)
    title = f"{NAMES[most]}, {most_norm}-norm: at each learning rate, warmup {WARMUP}, seed 0"
    below.set_title(title, loc="left", fontsize=10)
    for i, (optimizer, rows) in enumerate(panels):
        axes = figure.add_subplot(grid[i])
        for y, (_, row, delta, paper) in enumerate(rows):
            mean, color = statistics.mean(delta), colors.get(row, "#767676")
            if abs(mean) < 0.3:
                error = statistics.stdev(delta) if len(delta) > 1 else None
                axes.errorbar(mean, y, xerr=error, fmt="o", color=color, capsize=4, zorder=3)
            else:  # far off, such as stuck at the unigram loss
                side = math.copysign(1, mean)
                axes.plot(0.3 * side, y, ">" if side > 0 else "<", color=color)
                axes.text(0.29 * side, y, f"{mean:+.2f}", ha="right" if side > 0 else "left", va="center", fontsize=9)
            if paper is not None:
                axes.plot(paper, y, "D", color="#222222", mfc="white", ms=6)
        axes.axvline(0, color="#D22030", lw=1.5)
        axes.set_yticks(range(len(rows)), [label for label, *_ in rows], fontsize=9)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=5)
        axes.set_title(f"{NAMES[optimizer]}: at the end, minus plain (pairs)", loc="left", fontsize=10)
        axes.set_xlabel("nats per token; diamonds: the paper" if i == len(panels) - 1 else None)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "results" / "quality.png", dpi=130)
