"""train_small.py: text in, run folder out; and nothing lost whatever goes wrong."""

import contextlib
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.colors import to_hex

import environment
import train_small
from fast import FastMoDA
from moda import PRESETS, MoDA, MoDAConfig
from text import encode, get_batch
from train_small import TrainConfig, export_run, load_run, main

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "n_hidden": 64, "block_size": 32, "vocab_size": 300}
QUICK = {"steps": 10, "warmup": 2, "eval_every": 5, "eval_tokens": 256, "save_every": 3, "sample_tokens": 8}
EVIL = []  # stays empty unless a checkpoint gets to run code


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C counts: a background job of a script, as these tests may be, ignores it."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of 20 kB of made-up lines, some letters of which take two, three or four bytes."""
    path = tmp_path_factory.mktemp("text") / "made up.txt"
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdeiounstéß€好😀", k=draw.randint(1, 7))) for _ in range(200)]
    path.write_text("".join(" ".join(draw.choices(words, k=8)) + "\n" for _ in range(301)), encoding="utf-8")
    return str(path)


def keywords(out, data, **more):
    """What a small run takes, as `main` takes it in a notebook."""
    return {"data": data, "out": str(out), "device": "cpu", **SMALL, **QUICK, **more}


def arguments(out, data, *more):
    """The same as the flags of a command line."""
    flags = (("--" + name.replace("_", "-"), str(value)) for name, value in keywords(out, data).items())
    return [argument for flag in flags for argument in flag] + list(more)


def checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def edit(folder, **changes):
    """Change some entries of a checkpoint."""
    state = checkpoint(folder)
    torch.save(
        state | {k: state[k] | v if isinstance(v, dict) else v for k, v in changes.items()}, folder / "checkpoint.pt"
    )


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


@pytest.fixture(scope="module")
def compared(text, tmp_path_factory):
    """The folder of a run with its plain model."""
    folder = tmp_path_factory.mktemp("compared") / "run"
    main(arguments(folder, text, "--compare", "--steps", "2"))
    return folder


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_recorded_steps(text, tmp_path, monkeypatch, optimizer):
    """On a GPU, steps replayed as CUDA graphs train like steps that Python takes one by one, also in two halves."""

    def run(name, *more):
        device = ["--device", "cuda", "--steps", "40", "--optimizer", optimizer]
        return [row["loss"] for row in main(arguments(tmp_path / name, text, *device, *more))["history"]]

    def eager(differentiate, optimizers, *inputs):
        def update(lr):
            for one in optimizers:
                for group in one.param_groups:
                    group["lr"] = lr
                one.step()

        return differentiate, update

    recorded = run("recorded")
    with at_step(monkeypatch, 20, interrupt), pytest.raises(SystemExit, match="after step 20"):
        run("halves")
    halves = run("halves", "--resume")
    monkeypatch.setattr(train_small, "record_training", eager)
    plain = run("plain")
    assert plain[-1] < plain[0] - 1
    assert recorded == pytest.approx(plain, abs=0.02) and halves == pytest.approx(plain, abs=0.02)


def test_the_run_folder_holds_everything(whole):
    folder, results, _ = whole
    files = {"checkpoint.pt", "tokenizer.json", "config.json", "metrics.jsonl", "result.json", "sample.txt", "loss.png"}
    assert {path.name for path in folder.iterdir()} == files
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == results["history"] == checkpoint(folder)["history"] and [row["step"] for row in rows] == list(
        range(1, 11)
    )
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


def test_folder_of_runs_names_them():
    with pytest.raises(ValueError, match=r"there is no run in .*: no checkpoint.pt, but in .*deep/moda, .*deep/plain$"):
        load_run(ROOT / "notebooks" / "deep")


def test_text_in_text_out():
    run = load_run(ROOT / "notebooks" / "deep" / "moda")
    text = "def count(self, items):"
    torch.manual_seed(0)
    longer = run.complete(text, n_token=5)
    torch.manual_seed(0)
    ids = run.model.generate(run.ids(text), 5, 0.8, 50)
    assert longer.startswith(text) and longer == run.tokenizer.decode(ids[0, 1:].tolist())
    assert run.complete("", n_token=3)
    labels, maps = run.maps(text)
    T, n_slot = len(labels), len(run.model.config.slot_names(15))
    assert "".join(labels[1:]) == text and [p.shape for p in maps][-1] == (4, T, T + n_slot)
    torch.testing.assert_close(maps[3], run.model.attention_maps(run.ids(text))[3][0])


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
    with (
        at_step(monkeypatch, 4, interrupt),
        pytest.raises(SystemExit, match=r"after step 4: .*, with --out '.*' --resume"),
    ):
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


def test_ctrl_c_in_a_notebook_says_how_to_go_on_there(whole, text, tmp_path, monkeypatch):
    with at_step(monkeypatch, 4, interrupt), pytest.raises(SystemExit) as stopped:
        main(**keywords(tmp_path, text, optimizer=whole[2]))
    command = str(stopped.value).split(", with ")[1]
    assert command == f"main(out={str(tmp_path)!r}, resume=True)"
    eval(command)
    assert_same_run(whole[0], tmp_path)


def test_second_ctrl_c_stops_at_once(text, tmp_path, monkeypatch):
    with at_step(monkeypatch, 2, lambda: (interrupt(), interrupt())), pytest.raises(KeyboardInterrupt):
        main(arguments(tmp_path, text))


def test_an_older_versions_run_loads_but_does_not_go_on(whole, tmp_path):
    """Such a checkpoint has no loss rows."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    old = checkpoint(tmp_path)
    del old["history"], old["train_config"]["checkpoint"]
    torch.save(old, tmp_path / "checkpoint.pt")
    assert isinstance(load_run(tmp_path)[0], MoDA)
    with pytest.raises(SystemExit, match=r"error: the run in .* older version's: load_run can read it, but"):
        main(["--resume", "--out", str(tmp_path)])


@pytest.mark.parametrize("name", ["moda", "plain"])
def test_the_shipped_runs_load(name):
    model, tokenizer = load_run(ROOT / "notebooks" / "deep" / name)
    assert model.config.n_layer == 16 and model.config.depth_kv == (name == "moda")
    idx = encode(tokenizer, ["def main():\n    parser = argparse.ArgumentParser()\n    args = parser.parse_args()\n"])[
        None
    ]
    with torch.no_grad():
        assert model(idx[:, :-1], idx[:, 1:])[1] < 3  # 7.6 nats is what an untrained model says


def test_resume_may_lengthen_a_run_but_not_change_its_model_or_text(whole, text, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    resume = ["--resume", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="keeps its optimizer and n_layer"):
        main([*resume, "--n-layer", "3", "--optimizer", "adamw" if whole[2] == "muon" else "muon"])
    with pytest.raises(SystemExit, match="keeps its seed and batch_size"):  # they decide what it has read
        main([*resume, "--batch-size", "8", "--seed", "5"])
    old = checkpoint(tmp_path)
    del old["model_config"]["depth_every"]  # a field that the run's version did not have
    torch.save(old, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="keeps its depth_every"):
        main([*resume, "--depth-every", "2"])
    with pytest.raises(SystemExit, match="has done 10 steps"):
        main([*resume, "--steps", "9"])
    with pytest.raises(SystemExit, match="another text"):
        main([*resume, "--data", __file__])
    assert len(main([*resume, "--steps", "12", "--data", text])["history"]) == 12


def test_the_same_command_resumes_though_a_short_text_has_fewer_tokens(text, tmp_path):
    command = arguments(tmp_path, text, "--vocab-size", "5000")
    main(command)
    assert load_run(tmp_path)[1].n_vocab < 5000
    assert len(main([*command, "--resume"])["history"]) == 10
    with pytest.raises(SystemExit, match="keeps its vocab_size"):
        main([*command, "--resume", "--vocab-size", "4000"])


def test_a_crash_while_saving_leaves_the_old_checkpoint(whole, text, tmp_path, monkeypatch):
    save = torch.save

    def fail_late(state, path):
        if state["step"] < 6:
            return save(state, path)
        Path(path).write_bytes(b"half a checkpoint")
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="error: disk full"):
        patch.setattr(torch, "save", fail_late)
        main(arguments(tmp_path, text, "--optimizer", whole[2]))
    assert checkpoint(tmp_path)["step"] == 3 and not list(tmp_path.glob("*.tmp"))  # it would keep the disk full

    def fail_half(path, text, encoding):
        half = path.name.startswith("tokenizer")
        path.write_bytes(text.encode()[: len(text) // 2 if half else None])
        if half:
            raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="error: disk full"):
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "checkpoint.pt").write_bytes(b"damaged"), "plain' is damaged or foreign"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "plain' is damaged or foreign"),
        (lambda folder: edit(folder, step=11), "plain' has done 11 steps"),
        (lambda folder: edit(folder, data={"sha256": ""}), "plain' began with another text"),
        (lambda folder: edit(folder, train_config={"seed": 5}), "plain' is not that of these settings"),
        (lambda folder: edit(folder, model_config={"rope_theta": 5e3}), "plain' is not that of these settings"),
        (lambda folder: (shutil.rmtree(folder), folder.write_bytes(b"")), "plain' has to be a folder"),
    ],
)
def test_what_the_second_run_needs_is_checked_before_the_first_begins(compared, tmp_path, monkeypatch, change, message):
    shutil.copytree(compared, tmp_path, dirs_exist_ok=True)
    change(tmp_path / "plain")
    monkeypatch.setattr(train_small, "train", None)
    with pytest.raises(SystemExit, match=f"error: .*{message}") as error:
        main(["--resume", "--out", str(tmp_path)])
    assert "\n" not in str(error.value)


def test_compare_does_not_write_over_a_plain_run(compared, text, tmp_path):
    shutil.copytree(compared / "plain", tmp_path / "plain")
    with pytest.raises(SystemExit, match="plain' already holds a run"):
        main(arguments(tmp_path, text, "--compare"))


def test_ctrl_c_in_the_second_run(text, tmp_path, monkeypatch):
    steps = iter(range(100))
    with (
        monkeypatch.context() as patch,
        pytest.raises(SystemExit, match=r"after step 4: .*, with --out '[^']*(?<!plain)' --resume"),
    ):
        patch.setattr(train_small, "get_batch", lambda *a: (next(steps) == 11 + 4 and interrupt()) or get_batch(*a))
        main(arguments(tmp_path, text, "--compare"))
    assert checkpoint(tmp_path)["step"] == 10 and checkpoint(tmp_path / "plain")["step"] == 4
    assert len(main(["--resume", "--out", str(tmp_path)])["plain"]["history"]) == 10


def test_compare_trains_both_on_the_same_batches(text, tmp_path, monkeypatch, capsys):
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(train_small, "get_batch", lambda *a: seen.append(get_batch(*a)) or seen[-1])
        results = main(arguments(tmp_path, text, "--compare"))
    assert len(seen) == 22  # one more each, for whoever records the step
    assert all(torch.equal(a, b) for x, y in zip(seen[:11], seen[11:], strict=True) for a, b in zip(x, y, strict=True))
    moda, plain = load_run(tmp_path)[0], load_run(tmp_path / "plain")[0]
    assert moda.config.depth_kv and not plain.config.depth_kv and not plain.config.ffn_kv
    assert results["plain"]["parameters"] == plain.num_params() < moda.num_params() == results["parameters"]
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split()[0] for line in table] == ["MoDA", "plain"]
    assert table[1].split()[-1] == f"{results['plain']['val_bpb']:.4f}"
    again = main(["--resume", "--out", str(tmp_path / "plain")])  # by itself, without --compare
    assert again["val_loss"] == results["plain"]["val_loss"]
    alone = main(arguments(tmp_path / "alone", text, "--no-depth-kv", "--no-ffn-kv"))
    assert alone["val_loss"] == results["plain"]["val_loss"] != results["val_loss"]


def test_the_commit_is_that_of_git_and_else_named(tmp_path, monkeypatch):
    monkeypatch.setenv("COMMIT", "named")
    assert (environment.commit() == "named") == (not (ROOT / ".git").exists())
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "copied.py"))
    assert environment.commit() == "named"


def test_run_folders_are_numbered_and_never_overwritten(whole, text, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"already holds a run: add --resume"):
        main(arguments(whole[0], text))
    with pytest.raises(SystemExit, match=r"has to be a folder"):
        main(arguments(text, text))
    monkeypatch.chdir(tmp_path)

    def choose(resume, preset="tiny"):
        with contextlib.ExitStack() as claims:
            return environment.choose_folder(claims, None, preset, resume)

    for name in ("tiny", "tiny-2"):
        assert choose(False) == Path("runs", name)
        assert not Path("runs", name).exists()  # nothing was written: removed again
        shutil.copytree(whole[0], Path("runs", name))
    assert choose(True) == Path("runs", "tiny-2") and choose(False, "deep") == Path("runs", "deep")


def test_a_rank_in_the_environment_has_no_effect(whole, text, tmp_path):
    """It once trained, wrote nothing and ended as if all was well."""
    command = [sys.executable, str(ROOT / "train_small.py"), *arguments(tmp_path, text, "--optimizer", whole[2])]
    subprocess.run(command, check=True, env=os.environ | {"RANK": "1", "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert_same_run(whole[0], tmp_path)


def test_checkpoint_and_compile_are_handed_on(text, tmp_path, monkeypatch):
    monkeypatch.setattr(FastMoDA, "compile_layers", lambda model: setattr(model, "was_compiled", True) or model)
    losses = {}
    for flag in ("--checkpoint", "--no-checkpoint", "--compile"):
        run = train_small.prepare(parse(*arguments(tmp_path / flag, text, flag)), contextlib.ExitStack())["MoDA"]
        model, results = train_small.train(*run)
        losses[flag] = [row["loss"] for row in results["history"]]
        assert getattr(model, "checkpoint", False) == (flag == "--checkpoint")
        assert hasattr(model, "was_compiled") == (flag == "--compile")
    assert losses["--checkpoint"] == pytest.approx(losses["--no-checkpoint"], rel=1e-5)
    assert losses["--compile"] == pytest.approx(losses["--no-checkpoint"], rel=1e-5)


def test_micro_batches_train_like_whole_ones(text, tmp_path):
    losses = [
        [row["loss"] for row in main(arguments(tmp_path / n, text, "--grad-accum", n))["history"]]
        for n in ("1", "2", "4")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(losses[0], rel=1e-4)


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no file and no folder"),
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


class Evil:
    def __reduce__(self):
        return EVIL.append, (1,)


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


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--n-layers", "3"], "there is no --n-layers: did you mean --n-layer\\?"),
        (["--set", "n_layer=3"], "there is no --set, see --help"),
        (["--batch", "3"], "there is no --batch: did you mean --batch-size\\?"),  # it is not taken for it
        (["--n-layer"], "--n-layer: expected one argument"),
        (["--n-layer", "two"], "--n-layer: invalid int value: 'two'"),
        (["--qk-norm=1"], "--qk-norm.* '1'"),
        (["--top-k", "few"], "--top-k: invalid int value"),
        (["--steps", "none"], "--steps: invalid int value"),  # only what is optional takes none
        (["--n-kv-head", "3"], "n_head .*n_kv_head"),
        (["--no-depth-kv"], "ffn_kv, attn_kv, depth_window and depth_every need depth_kv=True"),
        (["--no-depth-kv", "--no-ffn-kv", "--compare"], "--compare needs depth_kv"),
        (["--vocab-size", "256"], "vocab_size must be at least 257"),
        (["--grad-accum", "3"], "batch_size .* multiple"),
        (["--compile", "--checkpoint"], "exclude each other"),
        (["--steps", "0"], "steps must be above 0"),
        (["--lr", "nan"], "lr must be above 0"),
        (["--temperature=-1"], "temperature must be from 0 to 1000, got -1.0"),  # as `generate` would say at the end
        (["--temperature", "1001"], "temperature must be"),
        (["--temperature", "inf"], "temperature must be"),
        (["--temperature", "nan"], "temperature must be"),
        (["--top-k", "0"], "top_k must be none or at least 1"),
        (["--beta1", "1"], "beta1 .* below 1"),
        (["--seed", str(2**64)], "seed must be .* below"),
        (["--decay", "2"], "decay must be a share"),
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


# ------------------------------------------------------------------------------------ flags, keywords and results


def parse(*argv, **keywords):
    return environment.parse_arguments(train_small.PARSER, argv, keywords)


def test_every_field_is_a_flag_and_a_keyword_of_its_type():
    names = [field.name for config in train_small.GROUPS.values() for field in dataclasses.fields(config)]
    assert len(names) == len(set(names)) and {"out", "steps", "n_layer"} < set(names)
    for config in train_small.GROUPS.values():
        for name, value in vars(config).items():
            assert parse(**{name: value}) == {name: value} and type(parse(**{name: value})[name]) is type(value)
    flags = "--lr 1e-3 --norm pre --top-k none --depth-window 4 --no-depth-rope --prompt=--x --grad-clip inf --compare"
    given = {"lr": 1e-3, "norm": "pre", "top_k": None, "depth_window": 4, "depth_rope": False, "prompt": "--x"}
    assert parse(*flags.split()) == given | {"grad_clip": math.inf, "compare": True}
    assert parse() == {}  # so that a resumed run keeps what it has


def test_help_says_what_every_setting_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    out = capsys.readouterr().out
    assert error.value.code == 0 and all(preset in out for preset in PRESETS)
    for config in train_small.GROUPS.values():
        for name, value in vars(config).items():
            (line,) = re.findall(rf"^  --{name.replace('_', '-')}[, ].*", out, re.MULTILINE)
            assert value == "" or line.endswith(f"({'none' if value is None else value})"), line
            assert isinstance(config, MoDAConfig) or len(re.split("  +", line.strip())[1].split()) > 2, line


def test_keywords_are_the_same_as_flags(whole, text, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])  # no business of main()
    main(**keywords(tmp_path, text, optimizer=whole[2], compare=False, top_k=50))
    assert_same_run(whole[0], tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layers": 3}, r"there is no n_layers: did you mean n_layer\?"),
        ({"steps": 1e3}, "steps: invalid int value: '1000.0'"),
        ({"steps": True}, "steps: expected one argument"),
        ({"compile": None}, "compile.* 'none'"),
        ({"temperature": math.inf}, "temperature must be from 0 to 1000"),
        ({"resume": True}, "there is no run in"),
    ],
)
def test_bad_keywords_are_one_sentence_in_pythons_words(text, tmp_path, settings, message):
    with pytest.raises(SystemExit, match=message) as error:
        main(**keywords(tmp_path / "out", text, **settings))
    assert "--" not in str(error.value) and not (tmp_path / "out").exists()


def test_results_print_as_three_lines(whole):
    results = train_small.Results(whole[1], plain=train_small.Results(whole[1]))
    for shown in (repr(results), repr(results["plain"]), f"{whole[1]}"):
        assert len(shown.splitlines()) == 3 and len(shown) < 300 and "sample" in shown
        assert f"{results['val_bpb']:.4f}" in shown and f"{results['parameters']:,}" in shown
    assert json.loads(json.dumps(results))["history"] == whole[1]["history"]


def test_what_disappoints_is_said_before(capsys):
    def hints(n_token, **settings):
        train_small.print_hints(TrainConfig(**settings), n_token, 256)
        return capsys.readouterr().out

    assert hints(1_000_000) == ""
    assert "never reaches lr = 0.003, it stops at 0.001" in hints(1_000_000, steps=100)
    assert "never reaches" in hints(1_000_000, steps=200) and not hints(1_000_000, steps=200, warmup=50)
    assert "reads this text 82 times" in hints(10_000)


def test_every_model_has_its_colour(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(train_small.Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    history = [{"tokens": i, "loss": 2.0, "val_loss": 2.0} for i in range(2)]
    for labels in (["MoDA"], ["plain"], ["MoDA", "plain"], ["plain", "MoDA"]):
        train_small.plot(tmp_path, dict.fromkeys(labels, history))
        lines = drawn.pop().axes[0].lines
        named = {line.get_label().split(":")[0]: line.get_color() for line in lines[1::2]}  # the others are pale
        assert named == {label: {"plain": "#0072B2", "MoDA": "#D55E00"}[label] for label in labels}
        assert [to_hex(line.get_color()) for line in lines[::2]] == [to_hex(line.get_color()) for line in lines[1::2]]


# ------------------------------------------------------------------------------------------------------ training


def test_learning_rate_warms_up_and_decays():
    config = TrainConfig(steps=100, warmup=10, decay=0.5, lr=1.0)
    rates = [config.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:50] == [1.0] * 41
    assert rates[-1] == pytest.approx(0.02) and rates[50:] == sorted(rates[50:], reverse=True)


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
