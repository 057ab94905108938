"""Train a small MoDA language model on real text; a laptop CPU will do.

    python train_small.py                                    Python's own standard library is the text
    python train_small.py --data shakespeare.txt --compare   your text, and the same model without depth KV beside it
    python train_small.py --n-layer 12 --no-depth-rope       every setting of the training and of the model is a flag
    python train_small.py --resume                           go on with the latest run of this --preset
    OMP_NUM_THREADS=1 python train_small.py                  one thread: faster where other work shares a small CPU

In a notebook the flags are keywords: `main(steps=100, data="shakespeare.txt")`, and `main(resume=True)` to go on.
The run folder gets checkpoint.pt, tokenizer.json, config.json, metrics.jsonl, result.json, sample.txt and loss.png;
`load_run("runs/tiny").complete("def ")` uses what was trained. How text becomes batches of tokens is in text.py.
"""

import contextlib
import hashlib
import json
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
from matplotlib.figure import Figure  # not pyplot: a notebook keeps its own backend
from tqdm.auto import tqdm

from environment import (
    Interrupted,
    Place,
    as_keywords,
    choose_folder,
    interrupt_between_steps,
    machine,
    make_parser,
    parse_arguments,
    pick_device,
    write_atomically,
)
from fast import FastMoDA, Muon, record_training
from moda import PRESETS, MoDA, MoDAConfig, plain
from text import BAR, get_batch, load_text, token_bytes, tokenizer_from_json, tokenizer_to_json, validation_windows

FORMAT = "moda train_small 1"  # changes when load_run can no longer read older checkpoints
BLUE, VERMILLION = "#0072B2", "#D55E00"
COLORS = {"plain": BLUE, "MoDA": VERMILLION}  # wherever models are compared


@dataclass(frozen=True)
class TrainConfig:
    """All that decides a run, besides the model's own config. ValueError for values that cannot work."""

    preset: str = "tiny"  # shape of the model: tiny, deep, paper-24l, paper-48l, paper-700m or lean-24l
    data: str = ""  # UTF-8 text file, or folder of them; empty: the source of Python's standard library
    tokenizer: str = "bpe"  # bpe is trained on the text; else one of tiktoken's encodings, which it downloads
    compare: bool = False  # train the same model without depth KV too, on the same batches, and plot both
    seed: int = 1337  # of the weights, of the order of the text and of the sample
    steps: int = 800  # of the optimizer, over the whole run
    batch_size: int = 4  # sequences a step, over all its micro-batches
    grad_accum: int = 1  # micro-batches a step: more of them need less memory
    optimizer: str = "adamw"  # adamw, or muon: gains more a step, but its bfloat16 is slow on many CPUs
    lr: float = 3e-3  # learning rate between warmup and decay
    warmup: int = 200  # steps until the rate is lr; with 80 the plain post-norm model gets stuck at 6.57 nats
    decay: float = 0.5  # the last share of the steps, in which the rate falls linearly to 0
    weight_decay: float = 0.1  # of matrices and embedding
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient
    compile: bool = False  # by torch.compile: worth its half minute on a GPU, in long runs
    checkpoint: bool = False  # compute each layer's inside again in the backward: less memory, more time
    eval_every: int = 50  # steps from one validation loss to the next
    eval_tokens: int = 8192  # of the validation text, spread over it, while training
    test_tokens: int | None = 1_000_000  # of the validation text, spread over it, at the end; none: all
    save_every: int = 200  # steps from one checkpoint to the next
    prompt: str = ""  # of the sample; empty: 32 tokens from the middle of the validation text
    sample_tokens: int = 300  # length of the sample
    temperature: float = 0.7  # of the sample; 0: always the likeliest token
    top_k: int | None = 50  # sample among the k likeliest tokens; none: among all

    def __post_init__(self):
        rules = [
            ("preset", lambda x: x in PRESETS, f"one of {', '.join(PRESETS)}"),
            ("optimizer", lambda x: x in ("adamw", "muon"), "one of adamw, muon"),
            ("steps batch_size grad_accum eval_every eval_tokens save_every lr grad_clip", lambda x: x > 0, "above 0"),
            ("warmup weight_decay sample_tokens", lambda x: x >= 0, "at least 0"),
            ("beta1 beta2", lambda x: 0 <= x < 1, "from 0 to below 1"),
            ("decay", lambda x: 0 <= x <= 1, "a share of the steps, from 0 to 1"),
            ("seed", lambda x: 0 <= x < 2**32, "from 0 to below 2**32"),
            ("temperature", lambda x: 0 <= x <= 1000, "from 0 to 1000"),
            ("top_k test_tokens", lambda x: x is None or x >= 1, "none or at least 1"),
        ]
        for names, is_right, wanted in rules:
            for name in names.split():
                if not is_right(getattr(self, name)):
                    raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        if self.batch_size % self.grad_accum:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of grad_accum ({self.grad_accum})")
        if self.compile and self.checkpoint:
            raise ValueError("compile and checkpoint exclude each other: what is computed again runs eagerly")

    def lr_at(self, step):
        """Learning rate of step 0, 1, ...: linear warmup, constant, linear decay."""
        left = (self.steps - step) / max(1, self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup), left)


# ------------------------------------------------------------------------------------------------- the run folder


def sha256(tokenizer):
    return hashlib.sha256(tokenizer_to_json(tokenizer).encode()).hexdigest()


def load_checkpoint(folder, to_resume=False):
    """-> (the checkpoint's dict, tensors on the CPU; tiktoken.Encoding). ValueError if there is no usable run; with
    to_resume also for one that `load_run` can read, but that cannot go on."""
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file():
        inside = sorted(found.parent.as_posix() for found in Path(folder).glob("*/checkpoint.pt"))
        hint = f", but in {', '.join(inside)}" if inside else ""
        raise ValueError(f"there is no run in {str(folder)!r}: no checkpoint.pt{hint}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"not marked {FORMAT!r}")
        tokenizer = tokenizer_from_json(path.with_name("tokenizer.json").read_text(encoding="utf-8"))
        known = state["data"].get("tokenizer_sha256"), state["model_config"]["vocab_size"]
        if known[0] not in (None, sha256(tokenizer)) or known[1] != tokenizer.n_vocab:
            raise ValueError("the tokenizer is not the one that the model was trained with")
        state["train_config"] = asdict(TrainConfig(**state["train_config"]))  # settings that this version has?
        with torch.device("meta"):
            wanted = MoDA(MoDAConfig(**state["model_config"])).state_dict()
        if {name: w.shape for name, w in wanted.items()} != {name: w.shape for name, w in state["model"].items()}:
            raise ValueError("other weights than the model has")
    except Exception as error:  # whatever the damage makes the loaders stumble over
        raise ValueError(f"the checkpoint or tokenizer in {str(folder)!r} is damaged or foreign: {error!r}") from error
    if to_resume and not {"optimizers", "rng", "history", "step", "seconds"} <= state.keys():
        why = "is an export, or an older version's: load_run can read it, but it cannot go on"
        raise ValueError(f"the run in {str(folder)!r} {why}")
    return state, tokenizer


class Run(NamedTuple):
    """What was trained, text in and text out. `model, tokenizer = run` takes it apart."""

    model: MoDA
    tokenizer: tiktoken.Encoding

    def ids(self, text):
        """The tokens of a text, behind <|endoftext|>: (1, T) ids on the model's device."""
        ids = [self.tokenizer.eot_token, *self.tokenizer.encode_ordinary(text)]
        return torch.tensor([ids], device=self.model.embed.weight.device)

    def complete(self, text, n_token=100, temperature=0.8, top_k=50):
        """The text, continued by n_token sampled tokens, as `MoDA.generate` does. An empty text begins a new one."""
        return self.tokenizer.decode(self.model.generate(self.ids(text), n_token, temperature, top_k)[0, 1:].tolist())

    def maps(self, text):
        """Where each layer looks -> (T labels of the tokens, a list over layers of (n_head, T, T + n_slot)), as
        `MoDA.attention_maps`. ValueError for a text of more than block_size - 1 tokens."""
        ids = self.ids(text)
        return [self.tokenizer.decode([i]) for i in ids[0].tolist()], [p[0] for p in self.model.attention_maps(ids)]


def load_run(folder, device="cpu"):
    """Load a run folder -> Run(model, tokenizer); ValueError if it holds no usable run."""
    state, tokenizer = load_checkpoint(folder)
    model = make_model(MoDAConfig(**state["model_config"]), torch.device(device))
    model.load_state_dict(state["model"])
    return Run(model.eval(), tokenizer)


def export_run(folder, to):
    """Copy a run to the folder `to` for others to load with `load_run`: the weights in float16, no optimizer."""
    folder, to = Path(folder), Path(to)
    state, _ = load_checkpoint(folder)
    to.mkdir(parents=True, exist_ok=True)
    kept = {name: state[name] for name in ("format", "train_config", "model_config", "data", "step", "seconds")}
    torch.save(kept | {"model": {name: w.half() for name, w in state["model"].items()}}, to / "checkpoint.pt")
    for name in ("tokenizer.json", "config.json", "metrics.jsonl"):
        shutil.copyfile(folder / name, to / name)


def plot(path, histories):
    """Draw the loss curves of {"MoDA" or "plain": history, as in `main`} into an image file."""
    axes = Figure(figsize=(8, 5), layout="constrained").add_subplot()
    for label, history in histories.items():
        axes.plot([r["tokens"] for r in history], [r["loss"] for r in history], COLORS[label], alpha=0.3, lw=0.8)
        val = [(r["tokens"], r["val_loss"]) for r in history if r["val_loss"] is not None]
        axes.plot(*zip(*val, strict=True), "o-", c=COLORS[label], ms=3, label=f"{label}: validation, and pale training")
    axes.set(xlabel="training tokens", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.figure.savefig(path, dpi=150)


# ------------------------------------------------------------------------------------------------------- training


def make_model(config, device, checkpoint=False, compile=False):
    """The model on its device: `FastMoDA` if it is to run on a GPU or needs what only that can do, else `MoDA`."""
    if device.type == "cuda" or checkpoint or compile:
        model = FastMoDA(config, checkpoint=checkpoint).to(device)
        return model.compile_layers() if compile else model
    return MoDA(config).to(device)


def make_optimizers(model, config):
    """AdamW for everything, or Muon for the hidden matrices and AdamW for the rest; one lr serves both."""
    embed, decay = model.embed.weight, config.weight_decay
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embed]
    vectors = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}
    tables = {"params": [embed] if config.optimizer == "muon" else [embed, *matrices], "weight_decay": decay}
    adamw = torch.optim.AdamW([tables, vectors], config.lr, (config.beta1, config.beta2), fused=True)
    if config.optimizer == "adamw":
        return [adamw]
    # match_rms_adamw makes Muon's updates as large as AdamW's, hence the one lr
    return [adamw, Muon(matrices, config.lr, decay, adjust_lr_fn="match_rms_adamw")]


def mean_loss(model, x, y):
    """Mean cross-entropy () of a batch x, y (B, T), in bfloat16 on a GPU."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        return model(x, y)[1]


def training_step(model, optimizers, config, x, y):
    """The two halves of a step -> differentiate(x, y), update(lr); on CUDA recorded, for batches (B, T) like these.

    differentiate gives the mean loss () and the norm of the gradients (); it leaves them, clipped, in p.grad.
    """

    def differentiate(x, y):
        total, micro = 0.0, len(x) // config.grad_accum
        for p in model.parameters():
            p.grad = None
        for part in zip(x.split(micro), y.split(micro), strict=True):
            loss = mean_loss(model, *part) / config.grad_accum
            loss.backward()
            total = total + loss.detach()
        return total, torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)

    def update(lr):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group |= {"lr": lr, "capturable": False}  # whatever a GPU left in the checkpoint
            optimizer.step()

    return record_training(differentiate, optimizers, x, y) if x.is_cuda else (differentiate, update)


def spread(windows, n_token):
    """Of the validation windows, two of (n_window, T), so many that they hold n_token tokens, None for all of them."""
    n_window, T = windows[0].shape
    n = n_window if n_token is None else min(n_window, max(1, n_token // T))
    return [x[torch.arange(n, device=x.device) * n_window // n] for x in windows]


@torch.no_grad()
def evaluate(model, x, y, n_byte, batch_size):
    """Loss over the windows x, y (n_window, T), targets of -1 left out -> (nats per token, bits per byte of UTF-8).

    n_byte (n_vocab,): the bytes each token stands for. The end of a document costs nats like any other token, but is
    no byte of text.
    """
    nats, n_token, n_text = 0.0, 0, 0
    batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    for idx, targets in tqdm(batches, "evaluating", **BAR):  # (B, T) each
        predicted = targets[targets >= 0].cpu()
        nats += mean_loss(model, idx, targets).item() * len(predicted)
        n_token += len(predicted)
        n_text += n_byte[predicted].sum().item()
    return nats / n_token, nats / math.log(2) / max(1, n_text)


class Results(dict):
    """What `main` returns. It prints as three lines, without its history."""

    def __repr__(self):
        text = "validation: {val_bpb:.4f} bits per byte, {val_loss:.4f} nats per token, over {val_tokens:,} tokens\n"
        text += "training: {parameters:,} parameters, {seconds:,.0f} s, {tokens_per_s:,.0f} tokens/s\nkeys: "
        return text.format_map(self) + ", ".join(self)


def train(folder, config, model_config, tokenizer, tokens, windows, data, resume=False):
    """Train one model and write its run folder -> (model, results as in `main`, without run, sample and plain).

    tokens (n_token,) and the validation windows, two of (n_window, T), lie on the device that is to train; data is for
    the record. With resume, goes on from the folder's checkpoint if it has one; ValueError if that one is unusable.
    SystemExit after Ctrl-C, once all is saved, and when loss or gradient are not finite; the last checkpoint stays.
    """
    device, B, T = tokens.device, config.batch_size, model_config.block_size
    torch.manual_seed(config.seed)
    model = make_model(model_config, device, config.checkpoint, config.compile)
    optimizers = make_optimizers(model, config)
    checkpoint, metrics = folder / "checkpoint.pt", folder / "metrics.jsonl"
    step, saved, seconds, history, postfix = 0, 0, 0.0, [], {}
    if resume and checkpoint.exists():
        state, _ = load_checkpoint(folder, to_resume=True)
        step, saved, seconds, history = (state[name] for name in ("step", "step", "seconds", "history"))
        model.load_state_dict(state["model"])
        for optimizer, old in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(old)
        torch.set_rng_state(state["rng"])
    folder.mkdir(parents=True, exist_ok=True)
    record = {"train_config": asdict(config), "model_config": asdict(model_config)}
    record["data"] = data | {"tokenizer_sha256": sha256(tokenizer)}
    extra = {"parameters": model.num_params(), "machine": machine(device)}
    texts = {"config.json": json.dumps(record | extra, indent=2), "tokenizer.json": tokenizer_to_json(tokenizer)}
    texts[metrics.name] = "".join(json.dumps(row) + "\n" for row in history)  # a crash may have left more there
    for name, text in texts.items():
        write_atomically(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    print(f"{folder}: {model.num_params():,} parameters, {len(tokens):,} training tokens, on {device}")

    def check_finite(step, **values):
        if not all(map(math.isfinite, values.values())):
            found = " and ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in values.items())
            kept = f"{str(checkpoint)!r} still holds step {saved}" if saved else "nothing was saved yet"
            raise SystemExit(f"error: {found} at step {step}, try a lower lr; {kept}")

    def batch(step):
        return get_batch(tokens, T, config.seed, range(step * B, (step + 1) * B))

    n_byte, micro = token_bytes(tokenizer), B // config.grad_accum
    few_windows, test_windows = spread(windows, config.eval_tokens), spread(windows, config.test_tokens)
    differentiate, update = training_step(model, optimizers, config, *batch(0))
    bar = tqdm(total=config.steps, initial=step, desc=folder.name, unit="step")
    with bar, interrupt_between_steps() as interrupts:
        while step < config.steps:
            began, lr = time.perf_counter(), config.lr_at(step)
            loss, norm = (x.item() for x in differentiate(*batch(step)))
            check_finite(step + 1, loss=loss, gradient_norm=norm)
            update(lr)
            step, stop, took = step + 1, bool(interrupts), time.perf_counter() - began
            seconds, speed = seconds + took, B * T / took
            row = {"step": step, "loss": loss, "val_loss": None, "val_bpb": None, "lr": lr}
            row |= {"tokens": step * B * T, "tokens_per_s": speed, "seconds": seconds}
            postfix |= {"loss": f"{loss:.3f}", "tokens/s": f"{speed:,.0f}"}
            due_eval = step % config.eval_every == 0 or step == config.steps
            due_save = step % config.save_every == 0 or step == config.steps or stop
            if due_eval or due_save:
                val_loss, val_bpb = evaluate(model, *few_windows, n_byte, micro)
                check_finite(step, validation_loss=val_loss)  # before it is saved over a good checkpoint
            if due_eval:
                row |= {"val_loss": val_loss, "val_bpb": val_bpb}
                postfix["val"] = f"{val_loss:.3f}"
            history.append(row)
            bar.set_postfix(postfix, refresh=False)
            bar.update()
            with metrics.open("a") as file:
                file.write(json.dumps(row) + "\n")
            if due_save:
                state = record | {"format": FORMAT, "step": step, "seconds": seconds, "history": history}
                state |= {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
                write_atomically(checkpoint, lambda path, s=state: torch.save(s | {"rng": torch.get_rng_state()}, path))
                saved = step
            if stop and step < config.steps:
                raise Interrupted(f"stopped and saved after step {step}: run it again to go on")
    try:
        val_loss, val_bpb = evaluate(model, *test_windows, n_byte, micro)
    except KeyboardInterrupt:
        raise Interrupted(f"all {step} steps are saved, but not evaluated: run it again for that") from None
    results = Results(val_loss=val_loss, val_bpb=val_bpb, val_tokens=(test_windows[1] >= 0).sum().item())
    results |= {"parameters": model.num_params(), "seconds": seconds}
    return model, Results(results, tokens_per_s=step * B * T / seconds, history=history)


# ---------------------------------------------------------------------------------------- command line, notebook


GROUPS = {"place": Place(), "training": TrainConfig(), "model (the values are those of tiny)": PRESETS["tiny"]}
PARSER = make_parser(__doc__, GROUPS)
FIXED = ("preset", "tokenizer", "optimizer", "batch_size", "seed")  # what a resumed run cannot change


def prepare(options, claims):
    """Read and check all that every run needs, before the first begins -> {"MoDA" or "plain": the arguments of
    `train`}. options: {field: value} of `Place`, `TrainConfig` and `MoDAConfig`. The run folders are claimed until the
    ExitStack `claims` closes. ValueError for what cannot work."""
    groups = [{f.name: options[f.name] for f in fields(group) if f.name in options} for group in GROUPS.values()]
    place, training, shape = Place(**groups[0]), *groups[1:]
    device, resume = pick_device(place.device), place.resume
    folder = choose_folder(claims, place.out, TrainConfig(**training).preset, resume)
    if resume:
        old, tokenizer = load_checkpoint(folder, to_resume=True)
        model_config = MoDAConfig(**old["model_config"])  # which may be of fewer fields than there are today
        vocab_size = old["data"].get("vocab_size", model_config.vocab_size)  # as it was asked for
        fixed = {name: old["train_config"][name] for name in FIXED} | asdict(model_config) | {"vocab_size": vocab_size}
        changed = [name for name, value in (training | shape).items() if fixed.get(name, value) != value]
        if changed:
            raise ValueError(f"a resumed run keeps its {' and '.join(changed)}: start a new one in another --out")
        config = TrainConfig(**old["train_config"] | training)
    else:
        config = TrainConfig(**training)
        model_config = replace(PRESETS[config.preset], **shape)
        tokenizer, vocab_size = config.tokenizer, model_config.vocab_size
    if config.compare and not model_config.depth_kv:
        raise ValueError("--compare needs depth_kv=True, as it compares with depth_kv=False")
    tokenizer, tokens, held_out, data = load_text(config.data, tokenizer, vocab_size, folder)
    model_config, T = replace(model_config, vocab_size=tokenizer.n_vocab), model_config.block_size
    if len(tokens) < T:
        found = f"its {data['train_bytes']:,} bytes for training are {len(tokens)} tokens"
        raise ValueError(f"the text is too short: {found}, but block_size is {T}")

    runs = {"MoDA" if model_config.depth_kv else "plain": (folder, config, model_config)}
    if config.compare:
        beside = choose_folder(claims, folder / "plain", config.preset, resume)
        runs["plain"] = beside, replace(config, compare=False), plain(model_config)
    for run_folder, _, run_model in runs.values():
        if not (run_folder / "checkpoint.pt").exists():
            continue
        old, _ = load_checkpoint(run_folder, to_resume=True)
        if old["step"] > config.steps:
            raise ValueError(f"the run in {str(run_folder)!r} has done {old['step']} steps: --steps cannot be less")
        if old["data"].get("sha256") != data["sha256"]:
            raise ValueError(f"the run in {str(run_folder)!r} began with another text: the SHA-256 differs")
        same = all(old["train_config"][name] == getattr(config, name) for name in FIXED)
        if not same or MoDAConfig(**old["model_config"]) != run_model:
            raise ValueError(f"the run in {str(run_folder)!r} is not that of these settings: choose another --out")

    inputs = tokenizer, tokens.to(device), validation_windows(held_out.to(device), T), data, resume
    return {label: (*run, *inputs) for label, run in runs.items()}


def print_hints(config, n_token, T):
    """Say what works, and will disappoint: for n_token tokens of text and windows of T."""
    peak, epochs = max(map(config.lr_at, range(config.steps))), config.steps * config.batch_size * T / n_token
    if peak < 0.9 * config.lr:
        why = f"warmup is {config.warmup} of {config.steps} steps"
        print(f"hint: the rate never reaches lr = {config.lr:g}, it stops at {peak:.2g}: {why}")
    if epochs > 20:
        print(f"hint: the model reads this text {epochs:.0f} times, and learns it by heart; watch the validation loss")


def write_sample(folder, model, config, tokenizer, idx):
    """Continue config.prompt, or idx (n,) if that is empty -> the text, which sample.txt gets too."""
    torch.manual_seed(config.seed)
    start = torch.cat([idx.new_tensor([tokenizer.eot_token]), idx])[None]  # (1, 1 + n)
    prompt = Run(model, tokenizer).ids(config.prompt) if config.prompt else start
    ids = model.generate(prompt, config.sample_tokens, config.temperature, config.top_k)[0, 1:]
    text = tokenizer.decode(ids.tolist())
    (folder / "sample.txt").write_text(text, encoding="utf-8")
    return text


def main(argv=None, **keywords):
    """Train -> the results, a dict that prints as three lines. `main(["--steps", "100"])` is the command line,
    `main(steps=100)` the same in a notebook; --help lists the names.

    run (the folder), val_loss (nats per token) and val_bpb (bits per byte) over val_tokens of the validation split,
    parameters, seconds, tokens_per_s, history (the rows of metrics.jsonl), sample; with compare also plain, the same
    of the other model but for run and sample. SystemExit with one clear sentence for whatever cannot work.
    """
    with contextlib.ExitStack() as claims:
        try:
            try:
                runs = prepare(parse_arguments(PARSER, argv or [], keywords), claims)
            except ValueError as error:
                raise SystemExit(f"error: {error if argv is not None else as_keywords(str(error))}") from error
            return run(runs)
        except Interrupted as stopped:
            folder = str(next(iter(runs.values()))[0])
            how = f"main(out={folder!r}, resume=True)" if argv is None else f"--out {folder!r} --resume"
            raise SystemExit(f"{stopped}, with {how}") from None
        except OSError as error:  # a full disk
            raise SystemExit(f"error: {error}") from error


def run(runs):
    """Train what `prepare` made ready, sample, plot and print -> the results, as in `main`."""
    folder, config, model_config, tokenizer, tokens, (x, y), data, _ = next(iter(runs.values()))
    if tokens.is_cuda:
        torch.cuda.set_device(tokens.device)
        torch.set_float32_matmul_precision("high")
    print_hints(config, len(tokens), model_config.block_size)
    trained = {label: train(*arguments) for label, arguments in runs.items()}
    model, results = next(iter(trained.values()))
    results["sample"] = write_sample(folder, model, config, tokenizer, x[len(x) // 2][y[len(x) // 2] >= 0][:32])
    table = {label: results for label, (_, results) in trained.items()}
    plot(folder / "loss.png", {label: results["history"] for label, results in table.items()})
    short = {label: {k: v for k, v in results.items() if k != "history"} for label, results in table.items()}
    (folder / "result.json").write_text(json.dumps(short, indent=2))
    n, n_all = results["val_tokens"], data["validation_tokens"] - 1
    print(f"\n{results['sample']}\n\nvalidation: {'all' if n == n_all else f'{n:,} of'} {n_all:,} tokens")
    print("model    parameters   tokens/s  nats/token  bits/byte")
    for label, r in table.items():
        print(f"{label:6} {r['parameters']:12,} {r['tokens_per_s']:10,.0f} {r['val_loss']:11.4f} {r['val_bpb']:10.4f}")
    return Results(results, run=str(folder), **({"plain": table["plain"]} if config.compare else {}))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # the sample, as `> log.txt` on Windows, has more characters than cp1252
    main(sys.argv[1:])
