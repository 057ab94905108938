"""train_small.py: text in, run folder out; and nothing lost whatever goes wrong."""

import contextlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_small
from moda import MoDA, MoDAConfig
from train_small import (
    TrainConfig,
    encode,
    export_run,
    get_batch,
    load_run,
    main,
    make_tokenizer,
    parse_field,
    read_documents,
)

ROOT = Path(__file__).resolve().parents[1]
SMALL = "n_layer=2 n_head=4 n_kv_head=2 n_embd=32 n_hidden=64 block_size=32 vocab_size=300"
EVIL = []  # stays empty unless a checkpoint gets to run code
QUICK = "warmup=2 eval_every=5 eval_tokens=256 save_every=3 sample_tokens=8"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of 20 kB of made-up lines, some letters of which take two, three or four bytes."""
    path = tmp_path_factory.mktemp("text") / "made up.txt"
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdeiounstéß€好😀", k=draw.randint(1, 7))) for _ in range(200)]
    path.write_text("".join(" ".join(draw.choices(words, k=8)) + "\n" for _ in range(301)), encoding="utf-8")
    return str(path)


def arguments(out, data, *more, settings=""):
    settings = f"{SMALL} {QUICK} {settings}".split()
    sets = [argument for setting in settings for argument in ("--set", setting)]
    return ["--data", data, "--out", str(out), "--device", "cpu", "--steps", "10", "--batch-size", "4", *sets, *more]


def checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def metrics(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key not in ("seconds", "tokens_per_s")} for row in rows]


def leaves(tree):
    """The tensors and plain values of a nested checkpoint, in order."""
    if isinstance(tree, dict | list | tuple):
        values = tree.values() if isinstance(tree, dict) else tree
        return [leaf for value in values for leaf in leaves(value)]
    return [tree]


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    a, b = checkpoint(a), checkpoint(b)
    for key in ("step", "model", "optimizers", "rng"):
        pairs = list(zip(leaves(a[key]), leaves(b[key]), strict=True))
        assert pairs and all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in pairs), key


@contextlib.contextmanager
def at_step(monkeypatch, step, act):
    """Call act() in the middle of the given step, counted from 1, of a run that starts inside."""
    with monkeypatch.context() as patch:

        def batch(tokens, block_size, seed, rows):
            if rows.start // 4 + 1 == step:
                act()
            return get_batch(tokens, block_size, seed, rows)

        patch.setattr(train_small, "get_batch", batch)
        yield


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def crash():
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------ a run, and resuming


@pytest.fixture(scope="module", params=["muon", "adamw"])
def whole(request, text, tmp_path_factory):
    """A run that nothing interrupts: its folder, its results and its optimizer."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, main(arguments(folder, text, "--optimizer", request.param)), request.param


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_recorded_steps(text, tmp_path, monkeypatch, optimizer):
    """On a GPU, steps replayed as CUDA graphs train like steps that Python takes one by one, also in two halves."""

    def run(name, *more):
        device = ["--device", "cuda", "--steps", "40", "--optimizer", optimizer]
        return [row["loss"] for row in main(arguments(tmp_path / name, text, *device, *more))["history"]]

    recorded = run("recorded")
    with at_step(monkeypatch, 20, interrupt), pytest.raises(SystemExit, match="after step 20"):
        run("halves")
    halves = run("halves", "--resume")
    monkeypatch.setattr(train_small, "capture", lambda step, *inputs, warmup=3: step)
    plain = run("plain")
    assert plain[-1] < plain[0] - 1
    assert recorded == pytest.approx(plain, abs=0.02) and halves == pytest.approx(plain, abs=0.02)


def test_the_run_folder_holds_everything(whole):
    folder, results, _ = whole
    files = {"checkpoint.pt", "tokenizer.json", "config.json", "metrics.jsonl", "result.json", "sample.txt", "loss.png"}
    assert {path.name for path in folder.iterdir()} == files
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == results["history"] and [row["step"] for row in rows] == list(range(1, 11))
    assert [row["val_loss"] is not None for row in rows] == [step % 5 == 0 for step in range(1, 11)]
    assert rows[-1]["tokens"] == 10 * 4 * 32 and rows[-1]["seconds"] > 0 and rows[0]["loss"] > rows[-1]["loss"]
    config = json.loads((folder / "config.json").read_text())
    assert len(config["data"]["sha256"]) == 64 and config["machine"]["torch"] == torch.__version__
    assert config["model_config"]["vocab_size"] == 300 and config["train_config"]["steps"] == 10
    assert results["run"] == str(folder) and (folder / "sample.txt").read_text(encoding="utf-8") == results["sample"]


def test_bits_per_byte_count_the_utf8_bytes_of_the_whole_validation_split(whole, text):
    folder, results, _ = whole
    data = json.loads((folder / "config.json").read_text())["data"]
    whole_text = Path(text).read_text(encoding="utf-8")
    cut = whole_text.rfind("\n", 0, len(whole_text) * 9 // 10) + 1
    assert data["validation_bytes"] == len(whole_text[cut:].encode()) > len(whole_text[cut:])
    assert (data["validation_tokens"] - 1) % 32  # the last window is not full
    nats = results["val_loss"] * (data["validation_tokens"] - 1)  # all but the first <|endoftext|> are predicted
    assert results["val_bpb"] == pytest.approx(nats / math.log(2) / data["validation_bytes"], rel=1e-9)


def test_load_run_gives_the_trained_model_and_its_tokenizer(whole, text):
    folder, results, _ = whole
    model, tokenizer = load_run(folder)
    whole_text = Path(text).read_text(encoding="utf-8")
    cut = whole_text.rfind("\n", 0, len(whole_text) * 9 // 10) + 1
    tokens = encode(tokenizer, [whole_text[cut:]])
    with torch.no_grad():
        windows = zip(tokens[:-1].split(32), tokens[1:].split(32), strict=True)
        parts = [model(x[None], y[None])[1] * len(x) for x, y in windows]
    assert sum(parts).item() / (len(tokens) - 1) == pytest.approx(results["val_loss"], rel=1e-5)
    assert not model.training and isinstance(model.generate(tokens[None, :1], 4), torch.Tensor)


def test_an_exported_run_is_the_same_model_in_half_the_precision(whole, tmp_path):
    folder, small = whole[0], tmp_path / "small"
    export_run(folder, small)
    (model, tokenizer), (copy, tokenizer_copy) = load_run(folder), load_run(small)
    assert copy.config == model.config and tokenizer_copy._mergeable_ranks == tokenizer._mergeable_ranks
    for (name, w), half in zip(model.state_dict().items(), copy.state_dict().values(), strict=True):
        assert torch.equal(w.half().float(), half), name
    assert metrics(small) == metrics(folder)
    with pytest.raises(SystemExit, match="is an export"):
        main(["--resume", "--out", str(small)])
    assert (small / "checkpoint.pt").stat().st_size < (folder / "checkpoint.pt").stat().st_size / 3


def test_checkpoint_keys_are_the_models_own(whole):
    state = checkpoint(whole[0])
    assert list(state["model"]) == list(MoDA(MoDAConfig(**state["model_config"])).state_dict())


def test_ctrl_c_and_resume_equal_no_interruption(whole, text, tmp_path, monkeypatch):
    folder, _, optimizer = whole
    handler = signal.getsignal(signal.SIGINT)
    with at_step(monkeypatch, 4, interrupt), pytest.raises(SystemExit, match=r"after step 4: .* --resume"):
        main(arguments(tmp_path, text, "--optimizer", optimizer))
    assert checkpoint(tmp_path)["step"] == 4
    assert signal.getsignal(signal.SIGINT) is handler
    results = main(["--out", str(tmp_path), "--resume"])
    assert_same_run(folder, tmp_path)
    assert results["val_loss"] == whole[1]["val_loss"] and results["sample"] == whole[1]["sample"]


def test_crash_and_resume_equal_no_interruption(whole, text, tmp_path, monkeypatch):
    folder, _, optimizer = whole
    with at_step(monkeypatch, 9, crash), pytest.raises(KeyboardInterrupt):
        main(arguments(tmp_path, text, "--optimizer", optimizer))
    assert checkpoint(tmp_path)["step"] == 6 and len(metrics(tmp_path)) == 8
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # cut off by the crash
    main(["--out", str(tmp_path), "--resume"])
    assert_same_run(folder, tmp_path)


def test_second_ctrl_c_stops_at_once(text, tmp_path, monkeypatch):
    with at_step(monkeypatch, 2, lambda: (interrupt(), interrupt())), pytest.raises(KeyboardInterrupt):
        main(arguments(tmp_path, text))


def test_resume_may_lengthen_a_run_but_not_change_its_model_or_text(whole, text, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    resume = ["--resume", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="keeps its optimizer and n_layer"):
        main([*resume, "--set", "n_layer=3", "--optimizer", "adamw" if whole[2] == "muon" else "muon"])
    with pytest.raises(SystemExit, match="keeps its batch_size and seed"):  # they decide what it has read
        main([*resume, "--batch-size", "8", "--seed", "5"])
    with pytest.raises(SystemExit, match="has done 10 steps"):
        main([*resume, "--steps", "9"])
    with pytest.raises(SystemExit, match="another text"):
        main([*resume, "--data", __file__])
    assert len(main([*resume, "--steps", "12", "--data", text])["history"]) == 12


def test_the_same_command_resumes_though_a_short_text_has_fewer_tokens(text, tmp_path):
    command = arguments(tmp_path, text, settings="vocab_size=5000")
    main(command)
    assert load_run(tmp_path)[1].n_vocab < 5000
    assert len(main([*command, "--resume"])["history"]) == 10
    with pytest.raises(SystemExit, match="keeps its vocab_size"):
        main([*command, "--resume", "--set", "vocab_size=4000"])


def test_a_crash_while_saving_leaves_the_old_checkpoint(whole, text, tmp_path, monkeypatch):
    save = torch.save

    def fail_late(state, path):
        if state["step"] < 6:
            return save(state, path)
        Path(path).write_bytes(b"half a checkpoint")
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(torch, "save", fail_late)
        main(arguments(tmp_path, text, "--optimizer", whole[2]))
    assert checkpoint(tmp_path)["step"] == 3

    def fail_half(path, text, encoding):
        half = path.name.startswith("tokenizer")
        path.write_bytes(text.encode()[: len(text) // 2 if half else None])
        if half:
            raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(Path, "write_text", fail_half)
        main(["--resume", "--out", str(tmp_path)])
    main(["--resume", "--out", str(tmp_path)])
    assert_same_run(whole[0], tmp_path)


@pytest.mark.parametrize("what", ["loss", "gradient norm", "validation loss"])
def test_what_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(text, tmp_path, monkeypatch, what):
    class Fails(MoDA):
        calls = 0

        def forward(self, idx, targets=None):
            logits, loss = super().forward(idx, targets)
            Fails.calls += torch.is_grad_enabled()  # training steps
            if what == "validation loss":
                return logits, loss * math.nan if Fails.calls == 6 and not torch.is_grad_enabled() else loss
            if Fails.calls == 5:
                zero = 0 * self.embed.weight[0, 0]
                loss = loss * math.nan if what == "loss" else loss + zero.sqrt()  # whose slope at 0 is infinite
            return logits, loss

    monkeypatch.setattr(train_small, "MoDA", Fails)
    with pytest.raises(SystemExit, match=rf"{what}.* nan at step [56], .*still holds step 3"):
        main(arguments(tmp_path, text))
    assert checkpoint(tmp_path)["step"] == 3 and len(metrics(tmp_path)) >= 4
    assert all(p.isfinite().all() for p in load_run(tmp_path)[0].parameters())


def test_compare_trains_both_on_the_same_batches(text, tmp_path, monkeypatch, capsys):
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(train_small, "get_batch", lambda *a: seen.append(get_batch(*a)) or seen[-1])
        results = main(arguments(tmp_path, text, "--compare"))
    assert all(torch.equal(a, b) for x, y in zip(seen[:10], seen[10:], strict=True) for a, b in zip(x, y, strict=True))
    moda, plain = load_run(tmp_path)[0], load_run(tmp_path / "plain")[0]
    assert moda.config.depth_kv and not plain.config.depth_kv and not plain.config.ffn_kv
    assert results["plain"]["parameters"] == plain.num_params() < moda.num_params() == results["parameters"]
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split()[0] for line in table] == ["MoDA", "plain"]
    assert table[1].split()[-1] == f"{results['plain']['val_bpb']:.4f}"
    again = main(["--resume", "--out", str(tmp_path / "plain")])  # by itself, without --compare
    assert again["val_loss"] == results["plain"]["val_loss"]
    alone = main(arguments(tmp_path / "alone", text, settings="depth_kv=False ffn_kv=False"))
    assert alone["val_loss"] == results["plain"]["val_loss"] != results["val_loss"]


def test_the_commit_is_that_of_git_and_else_named(tmp_path, monkeypatch):
    monkeypatch.setenv("COMMIT", "named")
    assert (train_small.commit() == "named") == (not (ROOT / ".git").exists())
    monkeypatch.setattr(train_small, "__file__", str(tmp_path / "copied.py"))
    assert train_small.commit() == "named"


def test_two_processes_agree_with_one(text, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(ROOT / "train_small.py"), *arguments(tmp_path / "two", text, settings="grad_accum=2")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one = main(arguments(tmp_path / "one", text))
    two = metrics(tmp_path / "two")
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one["history"]], rel=1e-5)
    result = json.loads((tmp_path / "two" / "result.json").read_text())["MoDA"]
    assert result["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5)
    assert result["val_bpb"] == pytest.approx(one["val_bpb"], rel=1e-5)
    assert list(checkpoint(tmp_path / "two")["model"]) == list(checkpoint(tmp_path / "one")["model"])


def test_run_folders_are_numbered_and_never_overwritten(whole, text, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"already holds a run: add --resume"):
        main(arguments(whole[0], text))
    with pytest.raises(SystemExit, match=r"is a file, and has to be a folder"):
        main(arguments(text, text))
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "tiny-2"):
        assert train_small.choose_folder(None, "tiny", False) == Path("runs", name)
        shutil.copytree(whole[0], Path("runs", name))
    assert train_small.choose_folder(None, "tiny", True) == Path("runs", "tiny-2")
    assert train_small.choose_folder(None, "deep", False) == Path("runs", "deep")


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing"),
        (b"", "empty"),
        (b"one line\n", "too short"),
        (b"\0\1\2" * 1000, "UTF-8"),
        ("bücher\n".encode("latin-1") * 1000, "UTF-8"),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_bad_data_is_one_sentence(tmp_path, content, message, folder):
    path = tmp_path / "in" / "text" if folder else tmp_path / "text"
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=message) as error:
        main(arguments(tmp_path / "out", str(path.parent if folder and content is not None else path)))
    assert str(error.value).startswith("error: ") and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["truncated", "foreign", "noise", "pickle", "tokenizer"])
def test_bad_checkpoints_are_refused_and_kept(whole, tmp_path, damage):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoint.pt"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "foreign":
        torch.save({"model": {}}, path)
    elif damage == "noise":
        path.write_bytes(random.Random(0).randbytes(1000))
    elif damage == "pickle":
        torch.save({"format": train_small.FORMAT, "run me": Evil()}, path)
    else:
        (tmp_path / "tokenizer.json").write_text("{}")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"damaged or foreign|is foreign"):
        load_run(tmp_path)
    with pytest.raises(SystemExit, match=r"error: .*foreign"):
        main(["--resume", "--out", str(tmp_path)])
    assert path.read_bytes() == before and not EVIL


@pytest.mark.parametrize("part", ["train_config", "model_config", "model"])
@pytest.mark.parametrize("change", ["one too many", "missing"])
def test_a_run_of_another_version(whole, tmp_path, part, change):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    state = checkpoint(tmp_path)
    if change == "missing":
        del state[part]
    else:
        state[part]["unheard_of"] = torch.zeros(1)
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="damaged or foreign"):
        load_run(tmp_path)
    with pytest.raises(SystemExit, match="damaged or foreign"):
        main(["--resume", "--out", str(tmp_path)])


class Evil:
    def __reduce__(self):
        return EVIL.append, (1,)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "n_layers=3"], "the fields are .*warmup.*n_layer"),
        (["--set", "n_layer"], "--set n_layer takes int, got ''"),
        (["--set", "n_layer=two"], "--set n_layer takes int, got 'two'"),
        (["--set", "qk_norm=1"], "--set qk_norm takes bool"),
        (["--set", "top_k=few"], "--set top_k takes int or NoneType"),
        (["--set", "n_kv_head=3"], "n_head .*n_kv_head"),
        (["--set", "depth_kv=False"], "ffn_kv=True needs depth_kv=True"),
        (["--set", "depth_kv=False", "--set", "ffn_kv=False", "--compare"], "--compare needs depth_kv"),
        (["--set", "vocab_size=256"], "vocab_size must be at least 257"),
        (["--set", "grad_accum=3"], "batch_size .* multiple"),
        (["--steps", "0"], "steps must be above 0"),
        (["--lr", "nan"], "lr must be above 0"),
        (["--set", "temperature=-1"], "temperature must not be negative"),
        (["--set", "top_k=0"], "top_k must be None or at least 1"),
        (["--set", "beta1=1.0"], "beta1 .* below 1"),
        (["--seed", str(2**64)], "seed below"),
        (["--set", "decay=2"], "decay is a share"),
        (["--preset", "huge"], "preset must be one of tiny, deep"),
        (["--optimizer", "sgd"], "optimizer must be one of adamw, muon"),
        (["--tokenizer", "no such encoding"], "tiktoken cannot load"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--resume"], "there is no run"),
    ],
)
def test_bad_settings_are_one_sentence(text, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message) as error:
        main(arguments(tmp_path / "out", text, *more))
    assert str(error.value).startswith("error: ") and not (tmp_path / "out").exists()


def test_settings_are_parsed_by_type():
    assert parse_field("lr=1e-3") == ("lr", 1e-3) and parse_field("norm=pre") == ("norm", "pre")
    assert parse_field("top_k=none") == ("top_k", None) and parse_field("depth_window=4") == ("depth_window", 4)
    assert parse_field("depth_rope=false") == ("depth_rope", False) and parse_field("prompt=a=b") == ("prompt", "a=b")
    assert parse_field("grad_clip=inf") == ("grad_clip", math.inf)


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    out = capsys.readouterr().out
    assert error.value.code == 0 and all(f"{name}=" in out for name in ("warmup", "depth_window"))
    assert "--tokenizer TOKENIZER" in out and "--compare" in out


# ------------------------------------------------------------------------------------------------------ training


def test_learning_rate_warms_up_and_decays():
    config = TrainConfig(steps=100, warmup=10, decay=0.5, lr=1.0)
    rates = [config.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:50] == [1.0] * 41
    assert rates[-1] == pytest.approx(0.02) and rates[50:] == sorted(rates[50:], reverse=True)


@pytest.mark.parametrize("rate", [1e-2, torch.tensor(1e-2)])
def test_muon_steps_like_pytorchs(rate):
    """A step scaled afterwards rounds otherwise: by 2**-24 of what Muon adds at a rate of 1, which is about 1 here."""
    torch.manual_seed(0)
    ours = [torch.randn(8, 24, requires_grad=True), torch.randn(16, 8, requires_grad=True)]
    theirs = [w.detach().clone().requires_grad_() for w in ours]
    muons = [train_small.Muon(ours, rate, 0.1), torch.optim.Muon(theirs, 1e-2, 0.1)]
    for _ in range(5):
        for w, v in zip(ours, theirs, strict=True):
            w.grad = v.grad = torch.randn_like(w)
        for muon in muons:
            muon.step()
    for w, v in zip(ours, theirs, strict=True):
        torch.testing.assert_close(w, v, rtol=0, atol=1e-6)
    assert muons[0].param_groups[0]["lr"] is rate


def test_one_learning_rate_reaches_every_parameter_once():
    config = MoDAConfig(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_kv_head=1, n_embd=16)
    model = MoDA(config)
    for name, kinds in {"adamw": ["AdamW"], "muon": ["AdamW", "Muon"]}.items():
        optimizers = train_small.make_optimizers(model, TrainConfig(optimizer=name))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        held = [p for group in groups for p in group["params"]]
        assert [type(optimizer).__name__ for optimizer in optimizers] == kinds
        assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
        assert all((group["weight_decay"] == 0) == (p.ndim < 2) for group in groups for p in group["params"])
