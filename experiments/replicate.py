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
    AS_LONG_AS,
    OPTIMIZERS,
    WARMUP,
    at_same_setting,
    best_runs,
    best_setting,
    differences,
    finished,
    law_of,
    paper_difference,
    pays,
    results_path,
    spread,
    spread_of_a_run,
    tries,
)
from moda import PRESETS, MoDA
from text import tokenizer_from_json, validation_windows
from train_small import TrainConfig, train

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


def table(names, rows, n_left=1):
    """The lines of a Markdown table; the first n_left columns are text, the others numbers."""
    names = names.split("|")
    ruler = ["---"] * n_left + ["--:"] * (len(names) - n_left)
    return [f"| {' | '.join(map(str, cells))} |" for cells in (names, ruler, *rows)] + [""]


def paired(deltas):
    """Differences of runs of one seed, as text: mean ± standard deviation (how many)."""
    return f"{spread(deltas)} ({len(deltas)})" if deltas else ""


def described(group):
    """(n_layer, norm, optimizer, epochs or budget), as a report spells them."""
    n_layer, norm, optimizer, length = group
    return [str(n_layer), norm, OPTIMIZERS[optimizer], f"{length:g}"]


def what_it_rests_on(lines):
    """Sentences below the table "Does it pay?"."""
    tried, sentences = tries(lines), []
    for (*shape, budget), rows in sorted(tried.items()):
        law, one = law_of(tried, shape, budget), spread_of_a_run(rows)
        if law:
            sentences.append("The baseline's curve: {:.2f} + {:.2f} / (millions of tokens)^{:.3f}.".format(*law))
        for runs in ([*rows[name][best_setting(rows[name])].values()] for name in AS_LONG_AS if law and name in rows):
            read, loss = (statistics.mean(line[key] for line in runs) for key in ("tokens", "val_loss"))
            at = f"At {read / 1e6:.1f} million tokens the baseline ends at {loss:.4f} ({len(runs)})"
            sentences.append(f"{at}; the curve says {law[0] + law[1] / (read / 1e6) ** law[2]:.4f}.")
        if one:
            size = f"{shape[0]} layers and {budget:g} million tokens"
            sentences.append(f"One run of {size} varies by {one:.4f}, pooled over the rows with several seeds.")
    return [f"* {sentence}" for sentence in dict.fromkeys(sentences)]  # budgets may share a curve


def report(text="novels"):
    """results/quality.jsonl -> results/quality.md and quality.png; of another text quality_TEXT.jsonl -> .md."""
    lines, path = finished(text), results_path(text)
    if not lines:
        raise SystemExit(f"error: there is nothing in {path} yet")
    groups, tried = best_runs(lines), tries(lines)
    unit = "epochs" if text == "novels" else "millions of tokens"
    option = "" if text == "novels" else f" --text {text}"
    page = [
        f"""# Does depth KV lower the loss? On {lines[0].get("version", "English novels")}

Written by `python -m experiments.replicate report{option}` from {path.name}; what it means is in the
[laboratory](../README.md). Loss: nats per token on held-out text, mean ± standard deviation over seeds. Each row stands
at its best learning rate and warmup, among those with the most seeds. Minus baseline: seed by seed (how many).
"""
    ]
    cells = []
    for group, rows in sorted(groups.items()):
        plain = rows.get("plain", [])
        cells.append([*described(group), spread([line["val_loss"] for line in plain]) if plain else ""])
        for row in ("row3", "row4"):
            runs, paper = rows.get(row, []), paper_difference(*group[:2], row, group[3])
            cells[-1] += [spread([line["val_loss"] for line in runs]) if runs else "", paired(differences(runs, plain))]
            cells[-1] += [f"{paper:.4f}" if paper else ""] * (text == "novels")
    rest = "minus baseline|paper" if text == "novels" else "minus baseline"
    page += table(f"layers|norm|optimizer|{unit}|baseline|row3|{rest}|row4|{rest}", cells, 3)
    if text != "novels":
        page += [
            """## Does it pay?

Speed: tokens/s of training, over the baseline's. Same time: minus a baseline that reads as much more text as it can in
the row's time; measured, or by the curve (a power law) through its losses at three budgets. Below zero: row ahead.
"""
        ]
        cells = []
        for (n_layer, _, _, budget), row, _, same_text, speed, same_time, how in pays(lines):
            cells.append([n_layer, f"{budget:g}", row, paired(same_text), f"{speed:.2f}" if speed else ""])
            cells[-1] += [paired(same_time), how] if same_time else ["", ""]
        page += table("layers|millions of tokens|row|minus baseline|speed|same time|by", cells, 3)
        page += [*what_it_rests_on(lines), ""]
    page += [
        """## Every row at its best

Of: settings tried. Training loss: of the last 100 steps. Same setting: minus the baseline at the row's own learning
rate and warmup, by which to judge the ablations. Depth: the share of attention on slots, over 2,048 held-out tokens and
the layers that read any; the first runs did not record it.
"""
    ]
    names = "row||lr|warmup|of|parameters|seeds|nats/token|bits/byte|training loss|minus baseline|same setting|depth"
    for group, rows in sorted(groups.items()):
        layers, norm, optimizer, length = described(group)
        size = f"{length} epoch{'s' * (length != '1')}" if text == "novels" else f"{length} million tokens"
        page += [f"### {layers} layers, {norm}-norm, {optimizer}, {size}\n"]
        cells = []
        for row in (row for row in ROWS if row in rows):
            runs, plain = rows[row], [] if row == "plain" else rows.get("plain", [])
            same = at_same_setting(runs, tried[group].get("plain", {})) if plain else []
            depth = [statistics.mean(line["depth_mass"]) for line in runs if line.get("depth_mass")]
            cells.append([row, ROWS[row][0], f"{runs[0]['lr']:g}", runs[0]["warmup"], len(tried[group][row])])
            cells[-1] += [f"{runs[0]['parameters']:,}", len(runs)]
            cells[-1] += [spread([line[name] for line in runs]) for name in ("val_loss", "val_bpb", "train_loss")]
            cells[-1] += [paired(differences(runs, plain)), paired(same)]
            cells[-1] += [f"{statistics.mean(depth):.0%}" if depth else ""]
        page += table(names, cells, 2)
    page += ["## Minus baseline at the same learning rate, warmup and seed\n"]
    cells = []
    for group, rows in sorted(tried.items()):
        for setting, plain in sorted(rows.get("plain", {}).items()):
            at_this = [rows.get(row, {}).get(setting, {}).values() for row in ("row3", "row4")]
            deltas = [differences(runs, plain.values()) for runs in at_this]
            if any(deltas):
                losses = spread([line["val_loss"] for line in plain.values()])
                cells.append([*described(group), f"{setting[0]:g}", setting[1], losses, *map(paired, deltas)])
    page += table(f"layers|norm|optimizer|{unit}|lr|warmup|baseline|row3|row4", cells, 3)
    page += ["## All runs\n"]
    cells = []
    for group, rows in sorted(tried.items()):
        for row in (row for row in ROWS if row in rows):
            for (lr, warmup), runs in sorted(rows[row].items()):
                for seed, line in sorted(runs.items()):
                    gpu = line["machine"]["device"].split("NVIDIA ")[-1].split()[0].rstrip(")")
                    cells.append([*described(group), row, f"{lr:g}", warmup, seed, f"{line['tokens'] / 1e6:.1f}"])
                    cells[-1] += [f"{line['val_loss']:.4f}", f"{line['tokens_per_s']:,.0f}"]
                    cells[-1] += [line["machine"]["commit"], gpu]
    names = f"layers|norm|optimizer|{unit}|row|lr|warmup|seed|tokens (millions)|nats/token|tokens/s|commit|GPU"
    page += table(names, cells, 3)
    path.with_suffix(".md").write_text("\n".join(page[:-1]) + "\n")
    print(f"wrote results/{path.stem}.md")
    if text == "novels":
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
