"""Train a small MoDA language model on real text; a laptop CPU will do.

    python train_small.py                                    Python's own standard library is the text
    python train_small.py --data shakespeare.txt --compare   your text, and the same model without depth KV
    python train_small.py --resume                           go on with the latest run of this --preset
    torchrun --standalone --nproc_per_node=2 train_small.py  data parallel, on CPUs or GPUs

The run folder gets checkpoint.pt, tokenizer.json, config.json, metrics.jsonl, result.json, sample.txt and loss.png.
In a notebook: `main(["--steps", "100"])` trains, `load_run(folder)` gives the model and the tokenizer back.
"""

import argparse
import base64
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sysconfig
import textwrap
import threading
import time
import typing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure  # not pyplot: a notebook keeps its own backend
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from fast import FastMoDA, Muon
from fast import record as capture
from moda import PRESETS, MoDA, MoDAConfig

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
FORMAT = "moda train_small 1"  # changes when older checkpoints can no longer be read
END = "<|endoftext|>"
PIECE = 2**16  # characters encoded at a time: a longer run of spaces overflows the stack of tiktoken's regex
# besides tests and other people's packages: what is no program, one generated file of prose and a hundred code tables
STDLIB_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings"}


@dataclass(frozen=True)
class TrainConfig:
    """All that decides a run, besides the model's own config. ValueError for values that cannot work."""

    preset: str = "tiny"
    data: str = ""  # file or folder; empty: the source of Python's standard library
    tokenizer: str = "bpe"  # trained on the text, or the name of one of tiktoken's encodings
    compare: bool = False
    seed: int = 1337
    steps: int = 800  # of the optimizer
    batch_size: int = 4  # sequences a step, over all processes and micro-batches
    grad_accum: int = 1  # micro-batches a step
    optimizer: str = "adamw"  # "muon" gains more a step, but its bfloat16 is slow on CPUs without such arithmetic
    lr: float = 3e-3
    warmup: int = 200  # steps; with 80 the plain post-norm model gets stuck at 6.57 nats
    decay: float = 0.5  # the last share of the steps, in which lr falls linearly to 0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    compile: bool = False  # by torch.compile, in parts: worth its half minute on a GPU, in long runs
    eval_every: int = 50
    eval_tokens: int = 8192  # of the validation split, while training; at the end all of it counts
    save_every: int = 200
    prompt: str = ""  # of the sample; empty: 32 tokens from the middle of the validation text
    sample_tokens: int = 300
    temperature: float = 0.7
    top_k: int | None = 50

    def __post_init__(self):
        for name, known in {"preset": PRESETS, "optimizer": ("adamw", "muon")}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("steps", "batch_size", "grad_accum", "eval_every", "eval_tokens", "save_every", "lr", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "seed", "sample_tokens", "temperature"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.seed < 2**32):
            got = f"{self.beta1}, {self.beta2} and {self.seed}"
            raise ValueError(f"beta1 and beta2 must be from 0 to below 1, seed below 2**32, got {got}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be None or at least 1, got {self.top_k}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay is a share of the steps, from 0 to 1, got {self.decay}")

    def lr_at(self, step):
        """Learning rate of step 0, 1, ...: linear warmup, constant, linear decay."""
        left = (self.steps - step) / max(1, self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup), left)


# ------------------------------------------------------------------------------------------------ text and tokens


def read_documents(data=""):
    """Read the text -> {path within the folder: text}, ordered by path.

    data: a file, a folder (every UTF-8 file in it, hidden ones excepted), or "" for the source of this machine's
    Python standard library without its tests. ValueError if there is no text.
    """
    root, documents, skipped = Path(data or sysconfig.get_paths()["stdlib"]), {}, 0
    found = [root] if root.is_file() else (path for path in root.rglob("*" if data else "*.py") if path.is_file())
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in found):
        parts = name.split("/")
        hidden = name != "." and any(part.startswith(".") for part in parts)
        if hidden or (not data and STDLIB_SKIP & set(parts)):
            continue
        try:
            text = path.read_bytes().decode("utf-8")  # from bytes: line ends stay as they are
        except (OSError, UnicodeDecodeError):
            text = "\0"
        skipped += "\0" in text
        documents |= {name: text} if text and "\0" not in text else {}
    if not documents:
        raise ValueError(f"no text in {str(root)!r}: it is missing, empty, or neither readable nor UTF-8")
    if skipped and RANK == 0:
        print(f"skipped {skipped} of {skipped + len(documents)} files: binary, unreadable or not UTF-8")
    return documents


def split_documents(documents):
    """Split {path: text} into two lists of texts, for training and for validation.

    A hash of its path holds out one file in 16, whatever else the folder gains or loses. Where that gives no usable
    split, as with a single file, the last tenth of every file is held out, from the beginning of a line.
    """
    held_out = {name: hashlib.sha256(name.encode()).digest()[0] < 16 for name in documents}
    train, validation = ([documents[n] for n in documents if held_out[n] is side] for side in (False, True))
    if 0.01 < sum(map(len, validation)) / sum(map(len, documents.values())) < 0.5:
        return train, validation
    cuts = [(text, len(text) * 9 // 10) for text in documents.values()]
    cuts = [(text, text.rfind("\n", 0, tenth) + 1 or tenth) for text, tenth in cuts]
    return [text[:cut] for text, cut in cuts], [text[cut:] for text, cut in cuts]


def pieces(text):
    return (text[i : i + PIECE] for i in range(0, len(text), PIECE))


def make_tokenizer(name, texts, vocab_size):
    """tiktoken.Encoding: "bpe" is trained on texts, at most vocab_size tokens; any other name is one of tiktoken's."""
    if name != "bpe":
        try:
            return tiktoken.get_encoding(name)
        except Exception as error:  # an unknown name, or whatever the network does
            raise ValueError(f"tiktoken cannot load its encoding {name!r}: {error}") from error
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257, for every byte and {END}, got {vocab_size}")
    import rustbpe  # only here: who loads tokens needs no trainer

    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator((piece for text in texts for piece in pieces(text)), vocab_size=vocab_size - 1)
    ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
    return tiktoken.Encoding("bpe", pat_str=bpe.get_pattern(), mergeable_ranks=ranks, special_tokens={END: len(ranks)})


def tokenizer_to_json(tokenizer):
    # The underscored fields are tiktoken's documented way to extend an encoding. Its loader of rank files is no use
    # here: it caches them by path, and would give one run the tokenizer of another.
    ranks = {base64.b64encode(token).decode(): rank for token, rank in tokenizer._mergeable_ranks.items()}
    parts = {"name": tokenizer.name, "pat_str": tokenizer._pat_str, "special_tokens": tokenizer._special_tokens}
    return json.dumps(parts | {"mergeable_ranks": ranks})


def tokenizer_from_json(text):
    parts = json.loads(text)
    ranks = {base64.b64decode(token): rank for token, rank in parts.pop("mergeable_ranks").items()}
    return tiktoken.Encoding(**parts, mergeable_ranks=ranks)


def encode(tokenizer, texts):
    """One stream of token ids, int64 (n_token,), <|endoftext|> before, between and after the texts.

    Where a text itself spells <|endoftext|>, those characters are encoded, not the token.
    """
    stream, end = [], [np.array([tokenizer.eot_token])]
    for text in texts:
        stream += end + [tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces(text)]
    return torch.from_numpy(np.concatenate(stream + end).astype(np.int64))


@functools.lru_cache(maxsize=2)
def epoch_order(n_window, block_size, seed, epoch):
    generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
    offset = torch.randint(block_size, (1,), generator=generator)
    return torch.randperm(n_window, generator=generator) * block_size + offset  # (n_window,), where windows start


def get_batch(tokens, block_size, seed, rows):
    """Inputs and targets (B, T): the windows numbered `rows` (a range) of an endless shuffled order.

    Every epoch cuts the stream, closed to a ring, into windows at another offset and visits each once. Only the seed
    and its number decide a window: a resumed run, another process and another model read the same text.
    """
    n_window = len(tokens) // block_size
    starts = [epoch_order(n_window, block_size, seed, row // n_window)[row % n_window] for row in rows]
    at = (torch.stack(starts)[:, None] + torch.arange(block_size + 1)) % len(tokens)  # (B, T + 1)
    window = tokens[at.to(tokens.device)]
    return window[:, :-1], window[:, 1:]


# ----------------------------------------------------------------------------------------- loss, optimizer, files


def all_sum(values, device):
    """The sums of a list of numbers over all processes."""
    if WORLD == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def evaluate(model, x, y, n_byte, batch_size):
    """Loss over the windows x, y (n_window, T), targets of -1 left out -> (nats per token, bits per byte of UTF-8).

    n_byte (n_vocab,): the bytes each token stands for. The end of a document costs nats like any other token, but is
    no byte of text.
    """
    nats, tokens, text = 0.0, 0, 0
    for i in range(RANK * batch_size, len(x), WORLD * batch_size):
        targets = y[i : i + batch_size]  # (B, T)
        seen = targets[targets >= 0].cpu()
        with autocast(x.device):
            loss = model(x[i : i + batch_size], targets)[1]
        nats, tokens, text = nats + loss.item() * len(seen), tokens + len(seen), text + n_byte[seen].sum().item()
    nats, tokens, text = all_sum([nats, tokens, text], x.device)
    return nats / tokens, nats / math.log(2) / max(1, text)


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


def write_atomically(path, write):
    """Call write(a temporary path), then rename: a crash half way leaves the old file whole."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def load_checkpoint(folder):
    """-> (the checkpoint's dict, tensors on the CPU, tiktoken.Encoding); ValueError if there is no usable run."""
    folder = Path(folder)
    if not (folder / "checkpoint.pt").is_file():
        raise ValueError(f"there is no run in {str(folder)!r}: no checkpoint.pt")
    try:
        state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        known = isinstance(state, dict) and state.get("format") == FORMAT
        tokenizer = tokenizer_from_json((folder / "tokenizer.json").read_text(encoding="utf-8")) if known else None
        if known:  # settings and weights that this version of the code does not have?
            TrainConfig(**state["train_config"])
            with torch.device("meta"):
                wanted = MoDA(MoDAConfig(**state["model_config"])).state_dict()
            if {name: w.shape for name, w in wanted.items()} != {name: w.shape for name, w in state["model"].items()}:
                raise ValueError("other weights than the model has")
    except Exception as error:  # whatever the damage makes the loaders stumble over
        raise ValueError(f"the checkpoint or tokenizer in {str(folder)!r} is damaged or foreign: {error!r}") from error
    if not known:
        raise ValueError(f"{str(folder / 'checkpoint.pt')!r} is foreign: not marked {FORMAT!r}")
    return state, tokenizer


def load_run(folder, device="cpu"):
    """Load a run folder -> (model, tiktoken.Encoding); ValueError if it holds no usable run."""
    state, tokenizer = load_checkpoint(folder)
    model = MoDA(MoDAConfig(**state["model_config"]))
    model.load_state_dict(state["model"])
    return model.to(device).eval(), tokenizer


def export_run(folder, to):
    """Copy a run to the folder `to` for others to load with `load_run`: the weights in float16, no optimizer."""
    folder, to = Path(folder), Path(to)
    state, _ = load_checkpoint(folder)
    to.mkdir(parents=True, exist_ok=True)
    kept = {name: state[name] for name in ("format", "train_config", "model_config", "data", "step", "seconds")}
    torch.save(kept | {"model": {name: w.half() for name, w in state["model"].items()}}, to / "checkpoint.pt")
    for name in ("tokenizer.json", "config.json", "metrics.jsonl"):
        shutil.copyfile(folder / name, to / name)


def read_metrics(path, last_step):
    """The rows of metrics.jsonl up to last_step: a crash may have left more of them, and half a one."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if row["step"] <= last_step]


def plot(path, histories):
    """Draw the loss curves of {label: rows of metrics.jsonl} into an image file."""
    axes = Figure(figsize=(8, 5), layout="constrained").add_subplot()
    for i, (label, rows) in enumerate(histories.items()):
        axes.plot([r["tokens"] for r in rows], [r["loss"] for r in rows], f"C{i}", alpha=0.3, lw=0.8)
        seen = [(r["tokens"], r["val_loss"]) for r in rows if r["val_loss"] is not None]
        axes.plot(*zip(*seen, strict=True), f"C{i}o-", ms=3, label=f"{label}: validation, and pale training")
    axes.set(xlabel="training tokens", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.figure.savefig(path, dpi=150)


def commit():
    """The commit of this code, with "-dirty" if a .py file differs from it, or None. Where the code was copied without
    its git history, COMMIT in the environment names it."""
    git = functools.partial(subprocess.run, cwd=Path(__file__).resolve().parent, capture_output=True, text=True)
    try:
        changed = git(["git", "diff", "--quiet", "HEAD", "--", "*.py"]).returncode == 1
        if name := git(["git", "describe", "--always"]).stdout.strip():
            return name + "-dirty" * changed
    except OSError:  # no git
        pass
    return os.environ.get("COMMIT")


def machine(device):
    """What the numbers of a run depend on besides its settings."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {"commit": commit(), "torch": torch.__version__, "python": platform.python_version()}
    return versions | {
        "system": f"{platform.system()} {platform.machine()}",
        "device": f"{device} ({name})",
        "cpus": os.cpu_count(),
    }


# ------------------------------------------------------------------------------------------------------- training


@contextlib.contextmanager
def interrupt_between_steps():
    """Yields asked: Ctrl-C only sets asked[0], so that no step is torn in half; a second Ctrl-C stops at once."""
    asked = [False]

    def ask(signum, frame):
        if asked[0] and WORLD == 1:  # torchrun passes on a Ctrl-C that its processes have had already
            raise KeyboardInterrupt
        asked[0] = True

    if threading.current_thread() is not threading.main_thread():  # where there are no signals
        yield asked
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def train(folder, config, model_config, tokenizer, tokens, windows, data, resume=False):
    """Train one model and write its run folder -> (model, results as in `main`, without run, sample and plain).

    tokens (n_token,) and the validation windows, two of (n_window, T), lie on the device that is to train; data is for
    the record. With resume, goes on from the folder's checkpoint if it has one. SystemExit after Ctrl-C, once all is
    saved, and when loss or gradient are not finite; the last checkpoint stays.
    """
    device, T = tokens.device, model_config.block_size
    torch.manual_seed(config.seed)
    model = FastMoDA(model_config).to(device)
    if config.compile:
        model.compile_layers()
    optimizers = make_optimizers(model, config)
    checkpoint, metrics = folder / "checkpoint.pt", folder / "metrics.jsonl"
    step, saved, seconds, rows, shown = 0, 0, 0.0, [], {}
    if resume and checkpoint.exists():
        state, _ = load_checkpoint(folder)
        step = saved = state["step"]
        seconds, rows = state["seconds"], read_metrics(metrics, step)
        model.load_state_dict(state["model"])
        for optimizer, old in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(old)
        torch.set_rng_state(state["rng"].cpu())
    record = {"train_config": asdict(config), "model_config": asdict(model_config), "data": data}
    if RANK == 0:
        folder.mkdir(parents=True, exist_ok=True)
        extra = {"parameters": model.num_params(), "machine": machine(device)}
        kept = "".join(json.dumps(row) + "\n" for row in rows)
        texts = {"config.json": json.dumps(record | extra, indent=2), "tokenizer.json": tokenizer_to_json(tokenizer)}
        for name, text in (texts | {metrics.name: kept}).items():
            write_atomically(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
        print(f"{folder}: {model.num_params():,} parameters, {len(tokens):,} training tokens, on {device}")

    n_byte = torch.zeros(tokenizer.n_vocab, dtype=torch.int64)
    for token, token_id in tokenizer._mergeable_ranks.items():
        n_byte[token_id] = len(token)

    def check_finite(step, values):
        if not all(map(math.isfinite, values.values())):
            found = " and ".join(f"{name} {value:.3g}" for name, value in values.items())
            kept = f"{str(checkpoint)!r} still holds step {saved}" if saved else "nothing was saved yet"
            raise SystemExit(f"error: {found} at step {step}, try a lower --lr; {kept}" if RANK == 0 else 1)

    net = DistributedDataParallel(model) if WORLD > 1 else model
    share = config.batch_size // WORLD  # sequences of this process
    micro = share // config.grad_accum

    def differentiate(x, y):
        """x, y (share, T) -> the mean loss (), the norm of the gradients (); they are in p.grad, clipped."""
        total = 0.0
        for p in model.parameters():
            p.grad = None
        for part in zip(x.split(micro), y.split(micro), strict=True):
            with autocast(device):
                loss = net(*part)[1] / config.grad_accum
            loss.backward()
            total = total + loss.detach()
        return total, torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)

    def update():
        for optimizer in optimizers:
            optimizer.step()

    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    graphs = device.type == "cuda" and WORLD == 1  # small models on a GPU mostly wait for Python
    for group in groups:  # a graph reads its learning rate by address
        group |= {"lr": torch.tensor(config.lr, device=device) if graphs else config.lr, "capturable": False}
    if graphs:
        differentiate = capture(differentiate, *get_batch(tokens, T, config.seed, range(share)))
    quick, begun = [side[:: max(1, side.numel() // config.eval_tokens)] for side in windows], step
    bar = tqdm(total=config.steps, initial=step, desc=folder.name, unit="step", disable=RANK > 0)
    with bar, interrupt_between_steps() as asked:
        while step < config.steps:
            began, lr = time.perf_counter(), config.lr_at(step)
            first = step * config.batch_size + RANK * share
            loss, norm = (
                x.item() for x in differentiate(*get_batch(tokens, T, config.seed, range(first, first + share)))
            )
            loss, stop = all_sum([loss / WORLD, float(asked[0])], device)  # summed, so that all processes stop together
            check_finite(step + 1, {"loss": loss, "gradient norm": norm})
            for group in groups:
                group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], torch.Tensor) else lr
            update()
            if graphs and step == begun:  # the optimizers have their state now, and can be recorded
                for group in groups:
                    group["capturable"] = True  # AdamW wants to be told
                update = capture(update, warmup=0)
            step, took = step + 1, time.perf_counter() - began
            seconds, speed = seconds + took, config.batch_size * T / took
            row = {"step": step, "loss": loss, "val_loss": None, "val_bpb": None, "lr": lr}
            row |= {"tokens": step * config.batch_size * T, "tokens_per_s": speed, "seconds": seconds}
            shown |= {"loss": f"{loss:.3f}", "tokens/s": f"{speed:,.0f}"}
            due_eval = step % config.eval_every == 0 or step == config.steps
            due_save = step % config.save_every == 0 or step == config.steps or stop
            if due_eval or due_save:
                val_loss, val_bpb = evaluate(model, *quick, n_byte, micro)
                check_finite(step, {"validation loss": val_loss})  # before it is saved over a good checkpoint
            if due_eval:
                row |= {"val_loss": val_loss, "val_bpb": val_bpb}
                shown["val"] = f"{val_loss:.3f}"
            rows.append(row)
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if RANK == 0:
                with metrics.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                if due_save:
                    state = record | {"format": FORMAT, "step": step, "seconds": seconds, "model": model.state_dict()}
                    state |= {"optimizers": [o.state_dict() for o in optimizers], "rng": torch.get_rng_state()}
                    write_atomically(checkpoint, functools.partial(torch.save, state))
                    saved = step
            if stop and step < config.steps:
                why = f"stopped and saved after step {step}: run it again to go on (train_small.py with --resume)"
                raise SystemExit(why if RANK == 0 else 1)
    val_loss, val_bpb = evaluate(model, *windows, n_byte, micro)
    results = {"val_loss": val_loss, "val_bpb": val_bpb, "parameters": model.num_params(), "seconds": seconds}
    return model, results | {"tokens_per_s": step * config.batch_size * T / seconds, "history": rows}


# --------------------------------------------------------------------------------------------------- command line


def parse_field(assignment):
    """ "FIELD=VALUE" -> (field, value of that field's type); ValueError for an unknown field or a bad value."""
    hints = typing.get_type_hints(TrainConfig) | typing.get_type_hints(MoDAConfig)
    name, _, text = assignment.partition("=")
    if name not in hints:
        raise ValueError(f"--set takes FIELD=VALUE, got {assignment!r}; the fields are {', '.join(hints)}")
    words = {bool: {"true": True, "false": False}, type(None): {"none": None}}
    kinds = typing.get_args(hints[name]) or (hints[name],)
    for kind in kinds:
        with contextlib.suppress(ValueError, KeyError):
            return name, words[kind][text.lower()] if kind in words else kind(text)
    raise ValueError(f"--set {name} takes {' or '.join(kind.__name__ for kind in kinds)}, got {text!r}")


def parse_arguments(argv):
    def listing(config):
        return textwrap.fill(" ".join(f"{field.name}={getattr(config, field.name)!r}" for field in fields(config)), 100)

    end = f"--set reaches every field of the training (these values suit --preset tiny):\n{listing(TrainConfig())}\n\n"
    end += f"and of the model (these are --preset tiny):\n{listing(PRESETS['tiny'])}"
    parser = argparse.ArgumentParser(None, None, __doc__, end, formatter_class=argparse.RawDescriptionHelpFormatter)
    helps = {
        "preset": f"shape of the model: {', '.join(PRESETS)}",
        "data": "UTF-8 text file, or folder of them; the default is Python's standard library",
        "tokenizer": "bpe is trained on the text; else one of tiktoken's encodings, such as gpt2, which it downloads",
        "steps": "optimizer steps",
        "batch-size": "sequences a step, over all processes",
        "lr": "learning rate after the warmup",
        "optimizer": "adamw or muon",
        "seed": "of the weights, of the order of the text and of the sample",
    }
    for name, text in helps.items():
        default = getattr(TrainConfig, name.replace("-", "_"))
        # SUPPRESS instead of the default: a resumed run keeps its own settings wherever the command line is silent
        text += f" ({default})" if default else ""
        options = {"type": type(default), "default": argparse.SUPPRESS, "metavar": name.upper(), "help": text}
        parser.add_argument("--" + name, **options)
    text = "train the same model without depth KV too, on the same batches, and plot both"
    parser.add_argument("--compare", action="store_true", default=argparse.SUPPRESS, help=text)
    parser.add_argument("--out", metavar="FOLDER", help="run folder (runs/PRESET, or the next free runs/PRESET-2, ...)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps, ... (the best that is there)")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out, or with the latest of --preset"
    )
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any other setting, as below")
    return vars(parser.parse_args(argv))


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def choose_folder(out, preset, resume):
    """out; or, of runs/PRESET, runs/PRESET-2, ..., the first that is free, or to resume the last that is not."""
    if out is None:
        numbered = (Path("runs", preset if i == 1 else f"{preset}-{i}") for i in itertools.count(1))
        used = list(itertools.takewhile(lambda folder: (folder / "checkpoint.pt").exists(), numbered))
        return used[-1] if resume and used else Path("runs", f"{preset}-{len(used) + 1}" if used else preset)
    if Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"--out {out!r} is a file, and has to be a folder")
    if (Path(out) / "checkpoint.pt").exists() and not resume:
        raise ValueError(f"{out!r} already holds a run: add --resume to go on with it, or choose another --out")
    return Path(out)


def validation_windows(tokens, T):
    """tokens (n_token,) -> (idx, targets), (n_window, T) each: all but the first are predicted once, -1 fills up."""
    pad = -(len(tokens) - 1) % T
    return F.pad(tokens[:-1], (0, pad)).view(-1, T), F.pad(tokens[1:], (0, pad), value=-1).view(-1, T)


def prepare(options, out, resume, device):
    """Check and load everything that a run needs -> the arguments of `train`. ValueError for what cannot work."""
    model_options = {field.name: options[field.name] for field in fields(MoDAConfig) if field.name in options}
    train_options = {name: value for name, value in options.items() if name not in model_options}
    config = TrainConfig(**train_options)
    folder = choose_folder(out, config.preset, resume)
    if resume:
        state, tokenizer = load_checkpoint(folder)
        if "optimizers" not in state:
            raise ValueError(f"the run in {str(folder)!r} is an export, without its optimizer: it cannot go on")
        old = state["train_config"]
        fixed = state["model_config"] | {"vocab_size": state["data"]["vocab_size"]}
        fixed |= {name: old[name] for name in ("preset", "tokenizer", "optimizer", "batch_size", "seed")}
        changed = [name for name, value in options.items() if fixed.get(name, value) != value]
        if changed:
            raise ValueError(f"a resumed run keeps its {' and '.join(changed)}: start a new one in another --out")
        config, model_config = TrainConfig(**old | train_options), MoDAConfig(**state["model_config"])
        if config.steps < state["step"]:
            raise ValueError(f"the run in {str(folder)!r} has done {state['step']} steps: --steps cannot be less")
    else:
        model_config = replace(PRESETS[config.preset], **model_options)
    if config.batch_size % (WORLD * config.grad_accum):
        raise ValueError(f"batch_size ({config.batch_size}) must be a multiple of {WORLD} processes times grad_accum")
    if config.compare and not model_config.depth_kv:
        raise ValueError("--compare needs depth_kv=True, as it compares with depth_kv=False")
    documents = read_documents(config.data)
    texts = split_documents(documents)
    sha256 = hashlib.sha256("".join(documents.values()).encode()).hexdigest()
    data = {"source": config.data or "Python's standard library", "files": len(documents), "sha256": sha256}
    if resume:
        data["vocab_size"] = fixed["vocab_size"]
        if sha256 != state["data"]["sha256"]:
            raise ValueError(f"the run in {str(folder)!r} began with another text: the SHA-256 differs")
    else:
        data["vocab_size"] = model_config.vocab_size  # as asked for: a short text may not have that many tokens
        tokenizer = make_tokenizer(config.tokenizer, texts[0], model_config.vocab_size)
        model_config = replace(model_config, vocab_size=tokenizer.n_vocab)
    T = model_config.block_size
    tokens, held_out = (encode(tokenizer, side).to(device) for side in texts)  # (n_token,) each
    if len(tokens) < T:
        raise ValueError(f"the text is too short: {len(tokens)} training tokens, but block_size is {T}")
    for side, text, ids in (("train", texts[0], tokens), ("validation", texts[1], held_out)):
        data |= {f"{side}_bytes": len("".join(text).encode()), f"{side}_tokens": len(ids)}
    return folder, config, model_config, tokenizer, tokens, validation_windows(held_out, T), data, resume


def main(argv=None):
    """Train as the command line says (argv: list of strings, None: sys.argv) -> the results, a dict.

    run (the folder), val_loss (nats per token) and val_bpb (bits per byte) over the whole validation split,
    parameters, seconds, tokens_per_s, history (the rows of metrics.jsonl), sample; with --compare also plain, the
    same of the other model but for run and sample. SystemExit with one clear sentence for whatever cannot work.
    """
    options = parse_arguments(argv)
    out, resume, name, assignments = (options.pop(key) for key in ("out", "resume", "device", "set"))
    try:
        device = pick_device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")
        if WORLD > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        plan = prepare(options | dict(map(parse_field, assignments)), out, resume, device)
    except ValueError as error:
        raise SystemExit(f"error: {error}" if RANK == 0 else 1) from error
    folder, config, model_config, tokenizer, *inputs = plan
    label = "MoDA" if model_config.depth_kv else "plain"
    model, results = train(*plan)
    table = {label: results}
    if config.compare:
        plain = replace(model_config, depth_kv=False, ffn_kv=False, attn_kv=False, depth_window=None)
        table["plain"] = train(folder / "plain", replace(config, compare=False), plain, tokenizer, *inputs)[1]
    if RANK == 0:
        torch.manual_seed(config.seed)
        prompt = torch.tensor([[tokenizer.eot_token, *tokenizer.encode_ordinary(config.prompt)]], device=device)
        if not config.prompt:
            x = inputs[1][0]  # (n_window, T)
            prompt = torch.cat([prompt, x[len(x) // 2, :32][None]], dim=1)  # (1, up to 33)
        ids = model.generate(prompt, config.sample_tokens, config.temperature, config.top_k)[0, 1:]
        results["sample"] = tokenizer.decode(ids.tolist())
        (folder / "sample.txt").write_text(results["sample"], encoding="utf-8")
        plot(folder / "loss.png", {label: r["history"] for label, r in table.items()})
        short = {name: {k: v for k, v in r.items() if k != "history"} for name, r in table.items()}
        (folder / "result.json").write_text(json.dumps(short, indent=2))
        print(f"\n{results['sample']}\n\nmodel    parameters   tokens/s  nats/token  bits/byte")
        for name, r in table.items():
            row = f"{r['parameters']:12,} {r['tokens_per_s']:10,.0f} {r['val_loss']:11.4f} {r['val_bpb']:10.4f}"
            print(f"{name:6} {row}")
    if WORLD > 1:
        dist.barrier()  # a process that leaves early can take the others down
        dist.destroy_process_group()
    results["run"] = str(folder)
    return results | ({"plain": table["plain"]} if config.compare else {})


if __name__ == "__main__":
    main()
