"""Drawing shared by the notebooks. `python notebooks/viz.py` draws the README's figure, notebooks/moda.png.

One palette (Okabe and Ito's, told apart by colour-blind readers). Where attention is drawn, blue is the sequence,
orange an attention slot, green an FFN slot, red the boundary of [sequence | depth]. Where models are compared, blue is
the baseline, orange row 3, vermillion MoDA with all slots. In grey print blue is the darkest and orange the lightest.
"""

import os
from math import exp
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.patches import Rectangle

SEQUENCE, ATTN, FFN, BOUNDARY = "#0072B2", "#E69F00", "#009E73", "#D81E2C"
INK, GREY, PALE = "#222222", "#767676", "#E4E4E4"
BASELINE, ROW_3, MODA = SEQUENCE, ATTN, "#D55E00"  # where models are compared
OTHER = "#CC79A7"  # a fourth series, where one is needed
HEAT = LinearSegmentedColormap.from_list("heat", ["#FFFFFF", "#C6DBEF", "#6BAED6", "#2171B5", "#08306B"])
SLOT_HEAT = {
    ATTN: LinearSegmentedColormap.from_list("attn", ["#FFFFFF", "#F8DFAC", ATTN, "#9A6A00", "#5C3F00"]),
    FFN: LinearSegmentedColormap.from_list("ffn", ["#FFFFFF", "#B5E2D3", "#3FB68F", "#00714F", "#003D2B"]),
}


def use_style():
    """Matplotlib defaults of every picture here. Call once, first."""
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "font.size": 11,
            "axes.titlesize": 12,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "axes.labelcolor": INK,
            "axes.prop_cycle": plt.cycler(color=[SEQUENCE, ATTN, FFN, OTHER, INK]),
            "xtick.color": GREY,
            "ytick.color": GREY,
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
            "lines.linewidth": 2,
            "legend.frameon": False,
            "hatch.linewidth": 0.8,
        }
    )


def claim(text, *conditions):
    """Print a finding with a tick if all conditions hold, each a bool or a tensor of bools, else that it is not in this
    run. Under pytest, where the run is the shipped one, AssertionError instead."""
    holds = all(bool(torch.as_tensor(condition).all()) for condition in conditions)
    assert holds or "PYTEST_CURRENT_TEST" not in os.environ, text
    print("✓" if holds else "✗ not in your run:", text)


def tint(color, amount):
    """`color` mixed with white: amount 1 is the colour, 0 is white."""
    return tuple(1 - amount * (1 - channel) for channel in to_rgb(color))


def slot_color(name):
    """Colour of a slot from its name, "attn 3" or "ffn 3"."""
    return FFN if name.startswith("ffn") else ATTN


def heatmap(ax, p, tokens, slots=(), vmax=None, values=False):
    """One head's softmax over [sequence | depth]: p (T, T + n_slot), the boundary in red (the paper's Figure 5).

    tokens: T labels; slots: n_slot labels, as `MoDAConfig.slot_names` gives them. values: write each weight into its
    cell. Keys in a query's future are left blank. Returns the sequence's image, for a colour bar; slots have the same
    scale in their own colours.
    """
    T, n_key = p.shape
    vmax = float(p.max()) if vmax is None else vmax
    image = ax.imshow(p, cmap=HEAT, vmin=0, vmax=vmax, aspect="auto", interpolation="nearest")
    tokens = [str(token).encode(errors="replace").decode() for token in tokens]  # half a surrogate pair has no glyph
    ax.set_xticks(range(n_key), [*tokens, *slots], rotation=90, parse_math=False)  # a $ is a $
    ax.set_yticks(range(T), tokens, parse_math=False)
    ax.set_ylabel("query")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    above = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "va": "bottom"}
    ax.annotate("sequence", ((T - 1) / 2, -0.5), color=SEQUENCE, **above)
    for j, name in enumerate(slots, T):
        look = {"cmap": SLOT_HEAT[slot_color(name)], "vmin": 0, "vmax": vmax, "aspect": "auto"}
        ax.imshow(p[:, j : j + 1], extent=(j - 0.5, j + 0.5, T - 0.5, -0.5), interpolation="nearest", **look)
    ax.set_xlim(-0.5, n_key - 0.5)
    if slots:
        ax.axvline(T - 0.5, color=BOUNDARY, linewidth=2.5)
        ax.annotate("depth", (T + (len(slots) - 1) / 2, -0.5), color=INK, **above)
        for label, name in zip(ax.get_xticklabels()[T:], slots, strict=True):
            label.set_color(shade(slot_color(name)))
    if values:
        for t in range(T):
            for j in [*range(t + 1), *range(T, n_key)]:
                color = "white" if p[t, j] > 0.65 * vmax else INK
                ax.text(j, t, f"{p[t, j]:.2f}".removeprefix("0"), ha="center", va="center", color=color, fontsize=9)
    return image


def shade(color, amount=0.7):
    """`color` darkened, for text on white."""
    return tuple(amount * channel for channel in to_rgb(color))


def end_label(ax, x, y, text, color, dy=0.0, **kwargs):
    """Name a line at its right end, in its own colour, instead of a legend. dy moves the text, in points."""
    kwargs = {"color": shade(color), "va": "center", "annotation_clip": False, **kwargs}
    ax.annotate(text, (x, y), (6, dy), textcoords="offset points", **kwargs)


def table(header, rows):
    """A table as the output of a notebook's cell. header: strings; rows: of anything that has a str()."""
    from IPython.display import Markdown

    lines = [header, ["---"] * len(header), *rows]
    return Markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines))


def online_softmax(trace, names, colors, boundary):
    """Online softmax, key by key. trace: (logit, running maximum, denominator) after each key; boundary: where depth
    begins. names, colors: one a key."""
    z, m, a = np.array(trace, dtype=float).T
    x = np.arange(len(z))
    _, (top, low) = plt.subplots(2, 1, figsize=(8, 4.8), sharex=True)
    top.bar(x, z, color=colors, width=0.7)
    top.stairs(m, np.arange(len(z) + 1) - 0.5, baseline=None, color=INK, linewidth=2)
    end_label(top, x[-1] + 0.5, m[-1], "running max $m$", INK)
    top.axhline(0, color=GREY, linewidth=0.8)
    top.set_ylabel("logit $z_j$")
    low.bar(x, a, color=colors, width=0.7)
    low.set_ylabel("denominator $a$")
    for ax in (top, low):
        ax.axvline(boundary, color=BOUNDARY, linewidth=2.5)
    low.set_xticks(x, names, rotation=90)


def tiles(ax, visible, computed, colors):
    """A mask as tiles meet it: what is read in its column's colour, what is computed and masked pale, the rest blank.

    visible, computed: (rows, columns) of bool; colors: one a column.
    """
    strong, pale = ([tint(color, amount) for color in colors] for amount in (1, 0.22))
    image = np.where(np.asarray(computed)[..., None], np.array(pale), 1.0)
    ax.imshow(np.where(np.asarray(visible)[..., None], np.array(strong), image), aspect="auto", interpolation="nearest")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def layouts(masks, group, chunk, n_slot):
    """Masks side by side. masks: title -> (visible, computed), rows of all heads, columns of all tokens' slots; lines
    part the chunks of rows. The last one has the heads of a token side by side, the others head after head."""
    _, axes = plt.subplots(1, len(masks), figsize=(11, 4.2))
    for ax, (title, (visible, computed)) in zip(axes, masks.items(), strict=True):
        n_row, T = len(visible), visible.shape[1] // n_slot
        tiles(ax, visible, computed, [(ATTN, FFN)[slot % 2] for slot in range(n_slot)] * T)
        ax.set_title(title)
        ax.set_xticks(np.arange(0, T, 2) * n_slot + (n_slot - 1) / 2, range(0, T, 2))
        ax.set_xlabel(f"depth columns, by token ({n_slot} slots each)")
        ax.set_yticks([])
        ax.hlines(np.arange(0, n_row + 1, chunk) - 0.5, -0.5, T * n_slot - 0.5, color=GREY, linewidth=0.6)
    heads = [f"head {head}" for head in range(group)]
    axes[0].set_yticks(np.arange(group) * T + (T - 1) / 2, heads, rotation=90, va="center")
    tokens = [f"{t}-{t + chunk // group - 1}" for t in range(0, T, chunk // group)]
    axes[-1].set_yticks(np.arange(len(tokens)) * chunk + (chunk - 1) / 2, tokens)
    axes[-1].yaxis.tick_right()
    axes[-1].yaxis.set_label_position("right")
    axes[-1].set_ylabel(f"tokens, with {group} heads each")


def program(steps, tokens, boundary):
    """The tiles of one program, in order. steps: a tile's title, its visible (rows, columns) of bool, and a colour for
    each column; tokens: labels, one for each group of rows; boundary: how many tiles are the sequence's."""
    n_row, width = steps[0][1].shape
    _, ax = plt.subplots(figsize=(11, 2.9))
    gap = np.zeros((n_row, 1), bool)  # a white column between tiles
    visible = np.concatenate([part for _, mask, _ in steps for part in (np.asarray(mask), gap)], axis=1)
    computed = np.concatenate([part for _ in steps for part in (np.ones((n_row, width), bool), gap)], axis=1)
    tiles(ax, visible, computed, [color for *_, colors in steps for color in (*colors, PALE)])
    for i, (title, *_) in enumerate(steps):
        left = i * (width + 1) - 0.5
        ax.add_patch(Rectangle((left, -0.5), width, n_row, fill=False, edgecolor=GREY, linewidth=0.8))
        ax.annotate(title, (left + width / 2, -0.5), (0, 5), textcoords="offset points", ha="center")
    ax.set_xlim(-0.5, len(steps) * (width + 1) - 1.5)
    ax.axvline(boundary * (width + 1) - 1, color=BOUNDARY, linewidth=2.5)
    group = n_row // len(tokens)
    ax.set_yticks([group * i + (group - 1) / 2 for i in range(len(tokens))], tokens)
    ax.set_xticks([])


def states(rows, labels, boundary, at=()):
    """What a row remembers after each tile, all on one scale. rows: title -> (m, a), arrays of one number a tile, NaN
    where there is none; labels: of the tiles. A bar reaches from m up to m + log a. at: tiles whose top is written."""
    fig, axes = plt.subplots(1, len(rows), figsize=(11, 3.6), sharey=True)
    colors = [SEQUENCE if i < boundary else ATTN for i in range(len(labels))]
    x, end = np.arange(len(labels)), len(labels) - 0.5
    everything = np.concatenate(
        [np.asarray(m) + shift for m, a in rows.values() for shift in (0, np.log2(np.asarray(a)))]
    )
    low, high = np.nanmin(everything) - 0.5, np.nanmax(everything) + 0.7
    for ax, (title, (m, a)) in zip(axes, rows.items(), strict=True):
        m, top = np.asarray(m), np.asarray(m) + np.log2(np.asarray(a))
        ax.bar(x, top - m, 0.72, bottom=m, color=[tint(color, 0.45) for color in colors])
        ax.hlines(m, x - 0.36, x + 0.36, color=INK)
        ax.plot(x, top, color=GREY, linewidth=1)
        ax.scatter(x, top, s=42, color=[shade(color) for color in colors], zorder=3)
        for i in at:
            ax.annotate(f"{top[i]:.2f}", (x[i], top[i]), (0, 8), textcoords="offset points", ha="center")
        ax.axvline(boundary - 0.5, color=BOUNDARY, linewidth=2.5)
        ax.set(title=title, xlim=(-0.6, end + 0.1))
        ax.set_xticks(x, labels)
        if np.isnan(m).any():
            ax.text(x[np.isnan(m)].mean(), low + 0.5 * (high - low), "one call,\nno tiles", ha="center", color=GREY)
    axes[0].set(ylim=(low, high), ylabel="base-2 logits")
    fig.supxlabel("after the tile of loop (1), (2) or (3) that starts at this column", fontsize=11)


def loads(sequence, depth, slots):
    """How many programs load each key. sequence (T,), depth (n_slot, T), slots: names."""
    n_slot, T = depth.shape
    _, (left, right) = plt.subplots(1, 2, figsize=(11, 3), sharey=True, width_ratios=(1, 2))
    left.bar(range(T), sequence, color=SEQUENCE, width=1)
    left.set(title="sequence", xlabel="key", ylabel="programs that load it")
    right.bar(range(depth.size), depth.ravel(), color=np.repeat([slot_color(name) for name in slots], T), width=1)
    right.set(title="depth", xlabel="slot, and in it the token")
    right.set_xticks(np.arange(n_slot) * T + T / 2, slots)
    right.tick_params(length=0)


def backward_tile(visible, group, t0, slots):
    """One tile of the depth half, and below it the sums over its rows. visible (rows, columns): which weights P are not
    zero; a token has `group` rows, and the columns go through the block's tokens slot by slot."""
    n_row, n_column = visible.shape
    block_t = n_row // group
    colors = [slot_color(slots[column // block_t]) for column in range(n_column)]
    fig, (top, low) = plt.subplots(2, 1, figsize=(8, 4.6), height_ratios=(n_row, 2), sharex=True)
    tiles(top, visible, np.ones_like(visible), colors)
    top.set_title(r"$P$ and $dz$: rows of all heads, columns of all slots", loc="left")
    top.set_yticks([group * i + (group - 1) / 2 for i in range(block_t)], [f"token {t0 + i}" for i in range(block_t)])
    tiles(low, np.ones((1, n_column), bool), np.ones((1, n_column), bool), colors)
    low.set_yticks([0], ["$dk$, $dv$"])
    names = [f"{slots[j // block_t]}\nof {t0 + j % block_t}" for j in range(n_column)]
    low.set_xticks(range(n_column), names, rotation=90, fontsize=9)
    for j in range(n_column):
        top.axvline(j - 0.5, color="white", linewidth=1)
        low.axvline(j - 0.5, color="white", linewidth=1)
    for i in range(0, n_row, group):
        top.axhline(i - 0.5, color="white", linewidth=1)
    return fig


def readers(n_layer):
    """Which layer (row) reads which slot (column), two slots a layer; a slot's gradient is the sum down its column."""
    n_slot = 2 * (n_layer - 1)
    names = [f"{kind} {layer}" for layer in range(n_layer - 1) for kind in ("attn", "ffn")]
    read = np.arange(n_slot)[None] // 2 < np.arange(1, n_layer)[:, None]  # (reader, slot)
    fig, ax = plt.subplots(figsize=(8, 3.8))
    tiles(ax, read, read, [slot_color(name) for name in names])
    ax.set_xticks(range(n_slot), names, rotation=90, fontsize=9)
    ax.set_yticks(range(n_layer - 1), range(1, n_layer), fontsize=9)
    ax.set_ylabel("layer that reads")
    for j in range(n_slot):
        ax.axvline(j - 0.5, color="white", linewidth=1.2)
    for i in range(n_layer - 1):
        ax.axhline(i - 0.5, color="white", linewidth=1.2)
    return fig


def roofline(series, names, bandwidth, matmul, title):
    """Measured speeds under the roof of a GPU. series: label -> (colour, [[(FLOPs a byte, TFLOP/s) forward, likewise
    backward] a setting]); names: number of a setting -> text beside its point of the first series."""
    _, ax = plt.subplots(figsize=(9.5, 4.6))
    x = np.geomspace(1, 1e5, 200)
    ax.plot(x, np.minimum(matmul, x * bandwidth), color=INK)
    for label, (color, points) in series.items():
        forward, backward = (zip(*[pair[way][:2] for pair in points], strict=True) for way in (0, 1))
        ax.plot(*forward, "o", color=color, markersize=7, label=label)
        ax.plot(*backward, "o", color=color, markersize=7, markerfacecolor="white")
    color, points = next(iter(series.values()))
    for i, text in names.items():
        ax.annotate(text, points[i][0][:2], (8, -13), textcoords="offset points", color=shade(color))
    for text, point, shift in (
        (f"copy, {bandwidth:.2f} TB/s", (45, 45 * bandwidth), (-8, 6)),
        (f"bf16 matmul, {matmul:.0f} TFLOP/s", (1e5, matmul), (0, 6)),
    ):
        ax.annotate(text, point, shift, textcoords="offset points", ha="right")
    ax.set(xscale="log", yscale="log", xlim=(1, 1e5), ylim=(3, 2000), title=title)
    ax.set(xlabel="FLOPs a byte", ylabel="TFLOP/s")
    ax.legend(loc="lower right", title="filled: forward, hollow: backward", alignment="left")


def floor(names, attention, extra, alone):
    """What depth adds, in units of its byte floor. For each setting: its name, how long attention takes without depth
    (ms), the quartiles of the difference, and the depth half alone. Drawn from the fastest attention to the slowest."""
    order = np.argsort(attention)[::-1]  # the fastest on top
    y, extra, alone = np.arange(len(order)), np.asarray(extra)[order], np.asarray(alone)[order]
    _, ax = plt.subplots(figsize=(9.5, 4.2))
    ax.axvline(1, color=INK, linewidth=1.5)
    ax.hlines(y, 0, 2, color=PALE, linewidth=0.8, zorder=0)
    ax.hlines(y, extra[:, 0], extra[:, 2], color=tint(SEQUENCE, 0.5), linewidth=4)
    ax.plot(extra[:, 1], y, "D", color=SEQUENCE, markersize=6, label="MoDA minus attention without depth")
    ax.plot(alone, y, "o", color=ATTN, markersize=8, label="depth half, timed alone")
    ax.set_yticks(y, [names[i] for i in order])
    ax.set(xlim=(0.75, 1.75), xlabel="time / byte floor")
    ax.annotate(
        "byte floor", (1, 1), (0, 5), xycoords=("data", "axes fraction"), textcoords="offset points", ha="center"
    )
    for i, at in enumerate(order):
        ax.annotate(f"{attention[at]:.0f} ms", (1.01, i), xycoords=("axes fraction", "data"), va="center", color=GREY)
    ax.annotate("attention\ntakes", (1.01, 1.01), xycoords="axes fraction", color=GREY)
    ax.legend(loc="upper right", bbox_to_anchor=(1, 0.9), frameon=True, facecolor="white", edgecolor="white")


def ladder(rungs, paper, gpu):
    """Time of each rung, forward + backward. rungs, paper: name -> ms; the paper has no more rungs than we."""
    _, ax = plt.subplots(figsize=(9.5, 3))
    y = np.arange(len(rungs))[::-1]
    ax.plot(rungs.values(), y, "o-", color=ATTN, markersize=8, label=f"here, {gpu}")
    hollow = {"markerfacecolor": "white", "markersize": 8, "linewidth": 1}
    ax.plot(paper.values(), y[: len(paper)], "D--", color=INK, label="paper, A100", **hollow)
    ax.set_yticks(y, rungs)
    ax.grid(axis="y", color=PALE)
    ax.set(xscale="log", xlim=(0.1, 1e4), xlabel="forward + backward, ms")
    ax.legend(loc="lower right")


def relative(names, ours, cudnn, papers):
    """Times relative to FlashAttention-2 without depth, one bar and two marks for each setting."""
    y = np.arange(len(names))[::-1]
    _, ax = plt.subplots(figsize=(9.5, 4.1))
    ax.axvline(1, color=INK, linewidth=1)
    ax.barh(y, ours, color=ATTN, height=0.55, label="MoDA, here")
    ax.plot(cudnn, y, "|", color=SEQUENCE, markersize=13, markeredgewidth=3, label="cuDNN, no depth, here")
    ax.plot(papers, y, "D", color=INK, markerfacecolor="white", markersize=7, label="MoDA, paper")
    ax.set_yticks(y, names)
    ax.set(xlim=(0, 1.55), xlabel="time / time of FlashAttention-2 without depth, forward + backward")
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, 1.14), ncols=3)


def source_matrix(ax, matrix, kind, vmax):
    """matrix (n_layer, n_layer): what each reader (row) has from each earlier layer's slot of `kind` (column), in the
    slot's colour. Returns the image."""
    n, look = len(matrix), {"cmap": SLOT_HEAT[slot_color(kind)], "vmin": 0, "vmax": vmax}
    image = ax.imshow(matrix[1:, :-1], extent=(-0.5, n - 1.5, n - 0.5, 0.5), **look)
    ax.set(title=f"{kind} slots: mean weight", xlabel="source layer", xticks=range(0, n - 1, 2), yticks=range(1, n, 2))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return image


def percentages(panels, rows, columns, vmax):
    """Tables of numbers side by side, darker where larger, in the colour of the slot that the title begins with.
    panels: title -> (rows, columns)."""
    _, axes = plt.subplots(1, len(panels), figsize=(10, 3), sharey=True)
    for ax, (title, p) in zip(axes, panels.items(), strict=True):
        ax.imshow(p, cmap=SLOT_HEAT[slot_color(title)], vmin=0, vmax=vmax, aspect="auto")
        for i, j in np.ndindex(*p.shape):
            color = "white" if p[i, j] > 0.55 * vmax else INK
            ax.text(j, i, f"{p[i, j]:.1f}", ha="center", va="center", color=color)
        ax.set_xticks(range(len(columns)), columns, rotation=35, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(len(rows)), rows)
        ax.set_title(title)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)


def decoding_grid(ax, sublayers, tokens, t):
    """What is alive while the last of `sublayers` reads at position t: the sequence cache, and position t's slots.

    sublayers: ["attn 0", "ffn 0", ..., "attn l"], drawn bottom up; tokens: one label a position.
    """
    for i, name in enumerate(sublayers):
        for j in range(len(tokens)):
            color = "white"
            if i == len(sublayers) - 1 and j <= t:
                color = SEQUENCE
            elif j == t:
                color = slot_color(name)
            elif j < t and name.startswith("attn"):
                color = tint(SEQUENCE, 0.3)
            elif j < t:
                ax.text(j, i, "gone", ha="center", va="center", color=GREY, fontsize=10)
            ax.add_patch(Rectangle((j - 0.46, i - 0.44), 0.92, 0.88, facecolor=color, edgecolor=PALE))
    ax.set(xlim=(-0.6, len(tokens) - 0.4), ylim=(-0.6, len(sublayers) - 0.4))
    ax.set_xticks(range(len(tokens)), tokens)
    ax.set_yticks(range(len(sublayers)), sublayers)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


# -------------------------------------------------------------------------------------------- where models are compared


def side_by_side(fig, train, val, colors, n_step, every, unigram):
    """Two models in training. train, val: name -> losses, one a step, and one every `every` steps."""
    fig.clear()
    losses, difference = fig.subplots(1, 2)
    steps, seen = (range(first, first * len(of["plain"]) + 1, first) for of, first in ((train, 1), (val, every)))
    for name, color in colors.items():
        losses.plot(steps, train[name], color=tint(color, 0.35), linewidth=1, zorder=1)
        losses.plot(seen, val[name], "o-", color=color, markersize=4, label=name)
    losses.axhline(unigram, color=GREY, linewidth=1, linestyle="--", zorder=0)
    losses.annotate("unigram", (n_step, unigram), (0, 4), textcoords="offset points", ha="right", color=GREY)
    losses.set(ylim=(3.4, 7.2), ylabel="loss, nats per token")
    losses.legend(loc="lower left")
    minus = [[b - a for a, b in zip(kind["plain"], kind["MoDA"], strict=True)] for kind in (train, val)]
    difference.axhline(0, color=INK, linewidth=1)
    difference.plot(steps, minus[0], color=tint(INK, 0.3), linewidth=1)
    difference.plot(seen, minus[1], "o-", color=INK, markersize=4)
    difference.set(ylim=(-0.6, 0.6), ylabel="MoDA $-$ plain")
    difference.annotate("MoDA better", (0.02, 0.03), xycoords="axes fraction", color=GREY)
    for ax in (losses, difference):
        ax.set(xlim=(0, n_step), xlabel="step")


def seeds(losses, colors):
    """losses: seed -> validation loss of plain, of plain trained for MoDA's time, of MoDA."""
    _, ax = plt.subplots(figsize=(8, 2.8))
    at, (plain, longer, moda) = range(len(losses)), zip(*losses.values(), strict=True)
    ax.hlines(at, [min(row) for row in losses.values()], [max(row) for row in losses.values()], color=PALE, zorder=0)
    hollow = {"markerfacecolor": "white", "label": "plain, for MoDA's time"}
    ax.plot(plain, at, "o", color=colors["plain"], markersize=9, label="plain")
    ax.plot(longer, at, "o", color=colors["plain"], markersize=9, **hollow)
    ax.plot(moda, at, "o", color=colors["MoDA"], markersize=9, label="MoDA")
    ax.set_yticks(at, [f"seed {seed}" for seed in losses])
    ax.set(xlabel="validation loss, nats per token", ylim=(-0.6, len(losses) - 0.4))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=3)


def long_run(rows, ends, colors, epoch):
    """MoDA's rows of metrics.jsonl, and where each model ended. ends: name -> loss; epoch: tokens of the whole text."""
    _, ax = plt.subplots(figsize=(8, 3.8))
    end, seen = rows[-1]["tokens"] / 1e6, [row for row in rows if row["val_loss"] is not None]
    for i in range(1, int(end * 1e6 / epoch) + 1):
        ax.axvline(i * epoch / 1e6, color=GREY, linewidth=1, linestyle=":")
    pale = tint(colors["MoDA"], 0.35)
    ax.plot([row["tokens"] / 1e6 for row in rows], [row["loss"] for row in rows], color=pale, linewidth=0.8)
    ax.plot([row["tokens"] / 1e6 for row in seen], [row["val_loss"] for row in seen], color=colors["MoDA"])
    for (name, nats), dy in zip(ends.items(), (5, -5), strict=True):
        ax.plot(end, nats, "o", color=colors[name], markersize=7, clip_on=False)
        end_label(ax, end, nats, f"{name} {nats:.2f}", colors[name], dy=dy)
    ax.annotate("validation", (9.7, 2.85), color=shade(colors["MoDA"]))
    ax.annotate("training", (9.7, 1.75), color=shade(colors["MoDA"]))
    ax.set(xlim=(0, end), ylim=(1.2, 5), xlabel="million tokens", ylabel="loss, nats per token")


def gains(rows):
    """Loss minus the baseline's. rows: label -> (differences over seeds, the paper's or None), row 3, row 4."""
    _, ax = plt.subplots(figsize=(8, 4))
    ax.axvline(0, color=BASELINE)
    for i, pair in enumerate(rows.values()):
        for (values, paper), color, dy in zip(pair, (ROW_3, MODA), (-0.15, 0.15), strict=True):
            spread = np.std(values, ddof=1) if len(values) > 1 else None
            ax.errorbar(np.mean(values), i + dy, xerr=spread, fmt="o", color=color, capsize=3)
            if paper is not None:
                ax.plot(paper, i + dy, "D", color=INK, markersize=5)
    ax.set_yticks(range(len(rows)), rows, fontsize=9)
    ax.invert_yaxis()
    ax.set(
        xlabel="nats per token, minus the baseline (left is better); bars: seeds; diamonds: the paper, on other data"
    )
    ax.annotate("row 3", (0.02, 0.93), xycoords="axes fraction", color=shade(ROW_3))
    ax.annotate("row 4", (0.02, 0.86), xycoords="axes fraction", color=shade(MODA))


# ------------------------------------------------------------------------------------------------ the README's figure


def moda_figure():
    """MoDA at a glance: what a layer writes, what a query of layer 3 reads, and the one softmax over both."""
    fig = plt.figure(figsize=(9, 5.5), layout="none", facecolor="white")
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, 9), ylim=(0, 5.5))
    ax.axis("off")

    def box(x, y, w, h, color):
        ax.add_patch(Rectangle((x, y), w, h, facecolor=color, edgecolor="white", linewidth=1.2))

    def text(x, y, s, size=10.5, ha="center", va="center", color=INK, **kwargs):
        ax.text(x, y, s, fontsize=size, ha=ha, va=va, color=color, **kwargs)

    tokens, t, layer = ["the", "cat", "sat", "on", "the", "mat"], 4, 3
    slots = [f"{kind} {source}" for source in range(layer) for kind in ("attn", "ffn")]
    cell, bottom = 0.36, 2.27
    row = [bottom + i * cell for i in range(len(slots) + 1)]  # one a sublayer, the reading one on top

    # where the keys and values of layer l are tapped: from what each sublayer reads
    stream, slot_x = 0.45, 3.7
    text(0.3, 5.26, r"layer $\ell$ writes two slots", 12, ha="left", weight="bold")
    text(0.3, 5.02, "keys and values of what a sublayer reads", ha="left", color=GREY)
    ax.annotate("", (stream, 4.86), (stream, 2.2), arrowprops={"arrowstyle": "-|>", "color": GREY, "linewidth": 4})
    text(stream - 0.17, 3.4, "residual stream", rotation=90, color=GREY)

    def arrow(*points, color=INK):
        xs, ys = zip(*points, strict=True)
        ax.plot(xs, ys, color=color, linewidth=1.4, solid_joinstyle="round", zorder=1)
        ax.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.4})

    for y, name, slot in [(2.5, "attention", r"attn $\ell$"), (3.75, "FFN", r"ffn $\ell$")]:
        color = slot_color(slot)
        arrow((stream, y), (2.15, y))
        arrow((1.25, y), (1.25, y + 0.27))
        arrow((1.25, y + 0.62), (1.25, y + 0.85), (stream + 0.05, y + 0.85))
        box(0.75, y + 0.25, 1.0, 0.4, PALE)
        text(1.25, y + 0.45, name)
        box(2.15, y - 0.2, 0.9, 0.4, tint(color, 0.35))
        text(2.6, y, "$W_K, W_V$")
        arrow((3.05, y), (slot_x, y), color=shade(color))
        box(slot_x, y - 0.2, 0.8, 0.4, color)
        text(slot_x + 0.4, y, slot, color=INK)
    arrow((2.6, 2.7), (2.6, 2.95), (1.77, 2.95))
    text(2.68, 2.98, "its own row", ha="left", color=SEQUENCE)
    text(slot_x + 0.4, 3.12, "depth\nstream", color=GREY)

    # what the query reads: its row of sequence KV, its column of depth KV
    x0, w = 5.22, 0.58
    text(x0, 5.26, f"a query of layer {layer} at position $t$", 12, ha="left", weight="bold")
    text(x0, 5.02, "reads its row and its column", ha="left", color=GREY)
    for i, name in enumerate(slots):
        for j in range(len(tokens)):
            box(x0 + j * w, row[i] + 0.02, w - 0.04, cell - 0.04, slot_color(name) if j == t else PALE)
        text(x0 + (t + 0.5) * w - 0.02, row[i] + cell / 2, f"$k_t^{i}$", 12)
        text(x0 - 0.12, row[i] + cell / 2, name, ha="right", color=shade(slot_color(name)))
    for j, token in enumerate(tokens):
        box(x0 + j * w, row[-1] + 0.02, w - 0.04, cell - 0.04, SEQUENCE if j <= t else PALE)
        if j <= t:
            text(x0 + (j + 0.5) * w - 0.02, row[-1] + cell / 2, f"$k_{'t' if j == t else j}$", 12, color="white")
        text(x0 + (j + 0.5) * w - 0.02, bottom - 0.19, token, weight="bold" if j == t else "normal")
    text(x0 - 0.12, row[-1] + cell / 2, f"layer {layer}", ha="right", color=SEQUENCE)

    ax.annotate("", (8.75, row[-1]), (8.75, row[0]), arrowprops={"arrowstyle": "-|>", "color": GREY, "linewidth": 1.4})
    text(8.87, row[3], "order of writing", rotation=90, color=GREY)

    # one softmax over both; the weights are made up
    logits = [0.9, -0.6, 0.3, -0.9, 0.6, 1.6, -0.5, 0.2, 0.9, -0.9, 0.5]
    total = sum(exp(z) for z in logits)
    base, step = 0.62, 0.46
    x1 = 8.64 - step * len(logits)
    for j, (name, z) in enumerate(zip([*tokens[: t + 1], *slots], logits, strict=True)):
        color = SEQUENCE if j <= t else slot_color(name)
        box(x1 + j * step + 0.02, base, step - 0.04, 3.1 * exp(z) / total, color)
        label = name.replace(" ", "\n")
        text(x1 + (j + 0.5) * step, base - 0.07, label, va="top", color=INK if j <= t else shade(color))
    boundary = x1 + (t + 1) * step
    ax.plot([x1, x1 + step * len(logits)], [base, base], color=GREY, linewidth=1)
    text(x1 - 0.12, base + 0.4, "weight", rotation=90, color=GREY)
    ax.plot([boundary, boundary], [0.15, 1.72], color=BOUNDARY, linewidth=2.5)
    text(boundary - 0.12, 1.62, "sequence", ha="right", color=SEQUENCE)
    text(boundary + 0.12, 1.62, "depth", ha="left")
    text(0.3, 1.62, "one softmax over both", 12, ha="left", weight="bold")
    text(0.3, 1.2, r"$z = [\,q_t k_0 \cdots q_t k_t\;|\;q_t k_t^0 \cdots q_t k_t^5\,]/\sqrt{d}$", 11.5, ha="left")
    text(0.3, 0.75, r"$o_t = \mathrm{softmax}(z)\,[\,v_0 \cdots v_t\;|\;v_t^0 \cdots v_t^5\,]$", 11.5, ha="left")
    return fig


if __name__ == "__main__":
    use_style()
    moda_figure().savefig(Path(__file__).with_name("moda.png"), dpi=200, metadata={"Software": None})
