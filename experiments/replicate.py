"""Does depth KV help? The paper's Table 6 at single-GPU scale, one cell of the table a run.

    python -m experiments.replicate --data FOLDER 24l-post-plain 24l-post-row4 --seeds 0 1 2
        trains these, one after the other, on the novels
    python -m experiments.replicate --text linux --tokens 64 24l-post-plain 24l-post-row4
        on the first 64 million tokens of the Linux kernel
    python -m experiments.replicate report [--text linux]
        writes results/quality.md and quality.png, or results/quality_linux.md, in this folder

A cell is LAYERS-NORM-ROW, such as 24l-post-row4 (rows: see --help). Each run appends one line to results/quality.jsonl,
or to quality_linux.jsonl; what is there already is not run again, and what was cut off goes on where it was. Once the
tokens are in runs/, several processes may run side by side, each with cells or seeds of its own: small models gain from
it. A row's speed is that of its fastest run: run plain and row4 alone before longer; a short run will do.

The texts are in texts.py. Their tokens are kept in runs/, so that FOLDER is needed once.
"""

import argparse
import itertools
import json
import re
import statistics
from dataclasses import asdict, replace

import torch

from environment import machine, pick_device
from experiments import texts
from experiments.common import ROWS, row_config
from experiments.plots import draw_quality, save
from experiments.quality import (
    OPTIMIZERS,
    WARMUP,
    at_same_setting,
    best_runs,
    differences,
    finished,
    paper_difference,
    results_path,
    spread,
    tries,
)
from moda import PRESETS, MoDA
from text import tokenizer_from_json, validation_windows
from train_small import TrainConfig, train

AS_LONG_AS = {"longer": "row4", "longer3": "row3"}  # the rows that plain gets the time of
BATCH = 16  # sequences of 512 tokens
# the best for plain with 24 layers, of those in results/quality.md
LR = {"muon": {"post": 1e-3, "pre": 2e-3}, "adamw": {"post": 1e-3, "pre": 2e-3}}


def corpus(text, folder):
    """The dict of texts.load, which must be of the text that the results are about. ValueError if it is not."""
    data = texts.load(text, folder)
    if any(line["sha256"] != data["sha256"] for line in finished(text)):
        raise ValueError(f"{results_path(text)} is about another text than {texts.RUNS / text}: move one of them away")
    if data["sha256"] != texts.SHA256[text]:
        print("note: this is not, to the byte, the text of the published results: compare your runs with each other")
    return data


def cell_config(cell):
    """ "24l-post-row4" -> (MoDAConfig, row). ValueError for what is no cell."""
    match = re.fullmatch(r"(\d+)l-(pre|post)-(.+)", cell)
    if not match or match[3] not in ROWS:
        raise ValueError(f"{cell!r} is no cell: LAYERS-NORM-ROW, with the rows {', '.join(ROWS)}")
    row_4 = replace(PRESETS["paper-24l"], vocab_size=4096, n_layer=int(match[1]), norm=match[2])
    config = row_config(match[3], row_4)
    if match[3] == "wide":  # hidden units for the parameters of the FFN KV projections, in steps of 8
        extra = MoDA(row_4).num_params() - MoDA(config).num_params()
        per_unit = config.n_layer * (3 * config.n_embd + 2)
        config = replace(config, n_hidden=config.hidden + -(-extra // per_unit) // -8 * -8)
    return config, match[3]


def steps_of(cell, row, steps, done):
    """Optimizer steps of a cell: `steps`; of a row in AS_LONG_AS, as many as fit into the time that its model takes."""
    if row in AS_LONG_AS:
        plain, other = (
            [run["tokens_per_s"] for run in done if run["cell"] == f"{cell.removesuffix(row)}{name}"]
            for name in ("plain", AS_LONG_AS[row])
        )
        if not (plain and other):
            raise ValueError(
                f"{cell} needs the speed of plain and {AS_LONG_AS[row]}: run them first, on the same machine and commit"
            )
        steps = round(steps * max(plain) / max(other))  # max: other runs may have shared the machine
    return steps


def depth_mass(model, idx):
    """The share of attention that each layer which reads slots pays to them, over idx (B, T): a list."""
    T = idx.shape[1]
    return [p[..., T:].sum(-1).mean().item() for p in model.attention_maps(idx) if p.shape[-1] > T]


def run(cell, seed, length, optimizer, lr, warmup, text, data, device):
    """Train one cell and append its line to the results of the text.

    length: {"epochs": passes over the novels}, or of another text {"budget": millions of tokens}, each read once.
    ValueError if there are not as many."""
    model_config, row = cell_config(cell)
    lr = LR[optimizer][model_config.norm] if lr is None else lr
    done, ran_on, path = finished(text), machine(device), results_path(text)
    key = {"cell": cell, "seed": seed, **length, "optimizer": optimizer, "lr": lr, "warmup": warmup}
    if any(all(line[name] == value for name, value in key.items()) for line in done):
        print(f"{key} is in {path.name} already")
        return
    same = [line for line in done if line["optimizer"] == optimizer and line["machine"] == ran_on]
    tokens, per_step = data["tokens"], BATCH * model_config.block_size
    if "epochs" in length:
        steps = steps_of(cell, row, round(length["epochs"] * len(tokens) / per_step), same)
    else:
        steps = steps_of(cell, row, round(length["budget"] * 1e6) // per_step, same)
        if steps * per_step > len(tokens):
            wanted = f"{cell} reads {steps * per_step:,} tokens once"
            raise ValueError(f"{wanted}, but there are {len(tokens):,}, and repeated ones would not be fresh text")
        tokens = tokens[: steps * per_step]
    settings = {"compile": device.type == "cuda", "eval_tokens": 65_536, "test_tokens": None}
    settings |= dict.fromkeys(("eval_every", "save_every"), max(1, steps // 20))
    config = TrainConfig("paper-24l", seed=seed, steps=steps, batch_size=BATCH, optimizer=optimizer, lr=lr,
                         warmup=warmup, **settings)  # fmt: skip
    tokens, held_out = (part.long().to(device) for part in (tokens, data["held_out"]))
    windows = validation_windows(held_out, model_config.block_size)
    name = (cell, steps, optimizer, f"{lr:g}", warmup, f"s{seed}", data["sha256"][0][:8])  # what resuming must not mix
    folder = texts.RUNS / "replicate" / "-".join(map(str, name))
    source = {"source": data.get("version", text), "sha256": data["sha256"], "bytes": data["bytes"]}
    tokenizer = tokenizer_from_json(data["tokenizer"])
    model, result = train(folder, config, model_config, tokenizer, tokens, windows, source, resume=True)
    history = result.pop("history")
    kept = [step for step in history if step["step"] % max(1, steps // 100) == 0 or step["val_loss"] is not None]
    line = key | {"row": row, "n_layer": model_config.n_layer, "norm": model_config.norm, **result}
    line["train_loss"] = statistics.mean(step["loss"] for step in history[-100:])
    line["tokens"] = history[-1]["tokens"]
    line["depth_mass"] = depth_mass(model, windows[0][:4])
    line["curve"] = [[step["tokens"], round(step["loss"], 4), step["val_loss"]] for step in kept]
    line |= {"model_config": asdict(model_config), "train_config": asdict(config)}
    line |= {"sha256": data["sha256"], "machine": ran_on}
    if text != "novels":
        line |= {"text": text, "version": data["version"]}
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:  # one write: other processes append here too
        file.write(json.dumps(line) + "\n")
    print(f"{cell} seed {seed}: {line['val_loss']:.4f} nats per token, {line['val_bpb']:.4f} bits per byte")


# ---------------------------------------------------------------------------------------------------------- the report


COLUMNS = "row||lr|warmup|of|parameters|seeds|nats/token|bits/byte|training loss|difference|paper|same setting|depth"


def report(text="novels"):
    """results/quality.jsonl -> results/quality.md and results/quality.png; of another text quality_TEXT.md."""
    lines = finished(text)
    if not lines:
        raise SystemExit(f"error: there is nothing in {results_path(text)} yet")
    if text == "novels":
        report_novels(lines)
    else:
        report_budgets(text, lines)


def machines(lines):
    ran_on = {f"{m['device']}, torch {m['torch']}, commit {m['commit']}" for m in (line["machine"] for line in lines)}
    return f"\nRun on: {'; '.join(sorted(ran_on))}."


def report_budgets(text, lines):
    """A table of rows and budgets for each depth, norm and optimizer -> results/quality_TEXT.md."""
    groups, tried = best_runs(lines), tries(lines)
    versions = ", ".join(sorted({f"{line['version']}, SHA-256 {line['sha256'][0][:8]}" for line in lines}))
    page = [
        f"""# Quality on more text: {text}

Written by `python -m experiments.replicate report --text {text}` from quality_{text}.jsonl ({versions}).
Budget: millions of training tokens, each read once; of a "longer" row, that of the row whose time it gets. Loss in nats
per token and bits per byte over all held-out tokens, mean ± standard deviation over seeds. Each row stands at the
learning rate and warmup with the lowest mean loss, of those with the most seeds (of: how many were tried). Minus plain:
each at its own best, pair by pair of the same seed (in brackets, how many). Tokens/s: of its fastest run, which may
have shared the GPU."""
    ]
    names = "budget|row||lr|warmup|of|seeds|tokens (millions)|nats/token|bits/byte|minus plain|tokens/s"
    for heading, same in itertools.groupby(sorted(groups), key=lambda group: group[:3]):
        page += [f"\n## {heading[0]} layers, {heading[1]}-norm, {OPTIMIZERS[heading[2]]}\n"]
        page += [f"|{names}|", "|--:|---|---|" + "--:|" * (names.count("|") - 2)]
        for group, row in ((group, row) for group in same for row in ROWS if row in groups[group]):
            runs, delta = groups[group][row], differences(groups[group][row], groups[group].get("plain", []))
            cells = [f"{group[3]:g}", row, ROWS[row][0], f"{runs[0]['lr']:g}", str(runs[0]["warmup"])]
            cells += [str(len(tried[group][row])), str(len(runs)), f"{runs[0]['tokens'] / 1e6:.1f}"]
            cells += [spread([line[name] for line in runs]) for name in ("val_loss", "val_bpb")]
            cells += [f"{spread(delta)} ({len(delta)})" if delta and row != "plain" else ""]
            cells += [f"{max(line['tokens_per_s'] for line in runs):,.0f}"]
            page.append(f"| {' | '.join(cells)} |")
    path = results_path(text).with_suffix(".md")
    path.write_text("\n".join([*page, machines(lines)]) + "\n")
    print(f"wrote results/{path.name}")


def report_novels(lines):
    groups, tried = best_runs(lines), tries(lines)
    page = [
        """# Quality: does depth KV lower the loss?

Written by `python -m experiments.replicate report` from quality.jsonl. Loss in nats per token and bits per byte of
UTF-8, over the whole validation text; mean ± standard deviation over seeds; training loss: of the last 100 steps.
Each row at the learning rate and warmup with the lowest mean loss among those that it was run at with the most seeds
(of: how many were tried at all). One seed says little, so all runs are below. The difference is to the plain model of
the same seed, at its own such setting, over the seeds that both have (in brackets, how many); beside it, that of the
paper's Table 6, on other data; same setting: to the plain model at the row's own learning rate and warmup, which is
what the ablations are to be judged by. Depth: the share of attention that slots get, over 2,048 validation tokens and
the layers that read any; the first runs did not record it."""
    ]
    for group, rows in sorted(groups.items()):
        n_layer, norm, optimizer, epochs = group
        page += [
            f"\n## {n_layer} layers, {norm}-norm, {OPTIMIZERS[optimizer]}, {epochs:g} epoch{'s' * (epochs != 1)}\n"
        ]
        page += [f"|{COLUMNS}|", "|---|---|" + "--:|" * (COLUMNS.count("|") - 1)]
        for row in (row for row in ROWS if row in rows):
            runs, paper = rows[row], paper_difference(n_layer, norm, row, epochs)
            delta = differences(runs, rows.get("plain", []))
            same = at_same_setting(runs, tried[group].get("plain", {}))
            cells = [row, ROWS[row][0], f"{runs[0]['lr']:g}", str(runs[0]["warmup"]), str(len(tried[group][row]))]
            cells += [f"{runs[0]['parameters']:,}", str(len(runs))]
            cells += [spread([line[name] for line in runs]) for name in ("val_loss", "val_bpb", "train_loss")]
            cells += [
                f"{spread(delta)} ({len(delta)})" if delta and row != "plain" else "",
                "" if paper is None else f"{paper:.4f}",
                f"{spread(same)} ({len(same)})" if same and row != "plain" else "",
            ]
            depth = [statistics.mean(line["depth_mass"]) for line in runs if line.get("depth_mass")]
            cells.append(f"{statistics.mean(depth):.0%}" if depth else "")
            page.append(f"| {' | '.join(cells)} |")
    page += ["\n## Minus plain at the same learning rate, warmup and seed\n"]
    page += ["|layers|norm|optimizer|epochs|lr|warmup|plain|row3|row4|", "|--:|---|---|--:|--:|--:|--:|--:|--:|"]
    for group, rows in sorted(tried.items()):
        for setting, plain in sorted(rows.get("plain", {}).items()):
            at_this = {row: rows[row][setting].values() for row in ("row3", "row4") if setting in rows.get(row, {})}
            delta = {row: differences(runs, plain.values()) for row, runs in at_this.items()}
            if any(delta.values()):
                settings = [f"{x:g}" if isinstance(x, float) else OPTIMIZERS.get(x, str(x)) for x in (*group, *setting)]
                cells = [f"{spread(d)} ({len(d)})" if (d := delta.get(row)) else "" for row in ("row3", "row4")]
                losses = spread([line["val_loss"] for line in plain.values()])
                page.append(f"| {' | '.join([*settings, losses, *cells])} |")
    names = ("cell", "seed", "epochs", "optimizer", "lr", "warmup")
    page += ["\n## All runs\n", f"| {' | '.join(names)} | nats/token |", "|---|--:|--:|---|--:|--:|--:|"]
    for line in sorted(lines, key=lambda line: [line[n] for n in names]):
        cells = [f"{line[n]:g}" if n in ("epochs", "lr") else str(line[n]) for n in names]
        page.append(f"| {' | '.join(cells)} | {line['val_loss']:.4f} |")
    page.append(machines(lines))
    path = results_path("novels")
    path.with_suffix(".md").write_text("\n".join(page) + "\n")
    print("wrote results/quality.md")
    save(draw_quality(lines), path.with_suffix(".png"))


def main():
    rows = "rows:\n" + "\n".join(f"  {name:15} {what}" for name, (what, _) in ROWS.items())
    parser = argparse.ArgumentParser(None, None, __doc__, rows, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="+", metavar="CELL", help="LAYERS-NORM-ROW, or report")
    parser.add_argument("--text", choices=texts.TEXTS, default="novels", help="what to train on (default: novels)")
    parser.add_argument("--data", metavar="FOLDER", help="where the text is, see texts.py; needed the first time")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run each (default: 0)")
    parser.add_argument("--epochs", type=float, help="novels: passes over the 16 million tokens (default: 1)")
    parser.add_argument("--tokens", type=float, help="other texts: millions of tokens, read once (default: all)")
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="muon",
        help="muon (default): of the hidden matrices; AdamW does the rest",
    )
    parser.add_argument("--lr", type=float, help=f"to search for it (default: {LR})")
    parser.add_argument("--warmup", type=int, default=WARMUP, help="steps (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (the best that is there)")
    args = parser.parse_args()
    try:
        if args.cells == ["report"]:
            return report(args.text)
        for cell in args.cells:
            cell_config(cell)
        if (args.tokens if args.text == "novels" else args.epochs) is not None:
            raise ValueError("--epochs is for the novels, --tokens for other texts")
        device = pick_device(args.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")
        data = corpus(args.text, args.data)
        length = {"epochs": 1 if args.epochs is None else args.epochs}
        if args.text != "novels":
            length = {"budget": len(data["tokens"]) / 1e6 if args.tokens is None else args.tokens}
        for seed in args.seeds:  # seed by seed, so that what is there after a cut can be compared
            for cell in args.cells:
                run(cell, seed, length, args.optimizer, args.lr, args.warmup, args.text, data, device)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
