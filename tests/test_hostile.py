"""Whatever is thrown at it: an answer, or one error that says what is wrong. And a run that is killed, twenty times."""

import contextlib
import io
import math
import operator
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import test_train_small
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from small import SMALL
from test_train_small import ROOT, arguments, assert_same_run, at_step, keywords, metrics, text, whole  # noqa: F401
from torch.autograd import Variable

import environment
import kernel
import train_small
from kernel import moda_attention, moda_attention_reference
from moda import PRESETS, MoDA
from text import make_tokenizer, read_documents, tokenizer_to_json
from train_small import load_run, main

calm = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

# -------------------------------------------------------------------------------------------------------- the operator

sizes = st.integers(0, 3)
tensors = st.one_of(
    st.builds(
        lambda shape, dtype: torch.ones(shape).to(dtype),
        st.lists(sizes, max_size=6),
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
    ),
    st.sampled_from([None, 1.0, "q", [[1.0]]]),
)


@calm
@given(st.lists(tensors, min_size=3, max_size=5), st.booleans(), st.sampled_from([None, 0.0, -2.0, float("inf")]))
def test_operator_given_anything(inputs, causal, scale):
    with contextlib.suppress(ValueError):  # and no other error, nor a crash; something that fits is not among these
        moda_attention(*inputs, causal=causal, scale=scale)


@settings(calm, max_examples=200)
@given(st.data())
def test_operator_given_nearly_the_right_thing(data):
    """One size of one tensor is off by one, or none is."""
    B, n_kv_head, group, T, head_dim, n_slot = (data.draw(st.integers(1, 3)) for _ in range(6))
    shapes = [[B, n_kv_head * group, T, head_dim], *[[B, n_kv_head, T, head_dim] for _ in range(2)]]
    shapes += [[n_slot, B, n_kv_head, T, head_dim] for _ in range(2)]
    which = data.draw(st.integers(0, 4))
    dim, change = data.draw(st.integers(0, len(shapes[which]) - 1)), data.draw(st.sampled_from([-1, 0, 1]))
    shapes[which][dim] += change
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    more_heads = (which, dim) == (0, 1) and shapes[0][1] % n_kv_head == 0 < shapes[0][1]
    if change == 0 or more_heads:
        torch.testing.assert_close(moda_attention(*inputs), moda_attention_reference(*inputs))
    else:
        with pytest.raises(ValueError, match=r"must|empty|needs"):
            moda_attention(*inputs)


# ------------------------------------------------------------------------------------------------------------ the text


@settings(calm, max_examples=50)
@given(
    st.dictionaries(st.sampled_from(["a", "b.txt", "c/d", ".e"]), st.binary(max_size=300) | st.text().map(str.encode))
)
def test_a_folder_of_anything(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("files")
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    try:
        documents = read_documents(str(folder))
    except ValueError as error:
        documents = {}
        assert "no text" in str(error)
    for name, document in documents.items():
        assert document == files[name].decode().removeprefix("\ufeff") != ""
        assert "\0" not in document and name != ".e"


def test_links_in_circles_and_what_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a" * 3_000_000)  # one line
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")  # whoever opens it waits for ever
    (tmp_path / "b.txt").write_text("b")
    original = Path.open

    def refuse(path, *mode):  # the super-user may read everything, so that its mode proves nothing
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied")
        return original(path, *mode)

    monkeypatch.setattr(Path, "open", refuse)
    assert list(read_documents(str(tmp_path))) == ["a.txt"]


# ------------------------------------------------------------------------------------------------------ the checkpoint


@settings(calm, max_examples=40)
@given(data=st.data())
def test_a_damaged_checkpoint(whole, tmp_path_factory, data):  # noqa: F811
    """Cut anywhere, or with bytes overwritten: refused in one sentence, or, where only numbers changed, loaded."""
    raw = (whole[0] / "checkpoint.pt").read_bytes()
    at = data.draw(st.integers(0, len(raw) - 1))
    cut = data.draw(st.booleans())
    noise = data.draw(st.binary(min_size=1, max_size=64))
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "checkpoint.pt").write_bytes(raw[:at] if cut else raw[:at] + noise + raw[at + len(noise) :])
    (folder / "tokenizer.json").write_bytes((whole[0] / "tokenizer.json").read_bytes())
    try:
        load_run(folder)
    except ValueError as error:
        assert "foreign" in str(error) and "\n" not in str(error)


KILLER = """
import os, random, signal, sys, time, torch
torch.set_num_threads(1)
import train_small

def steps():
    return open(f"{out}/metrics.jsonl").read().count("val_bpb") if os.path.exists(f"{out}/metrics.jsonl") else 0

out, arguments, draw, seen = sys.argv[1], sys.argv[2:], random.Random(0), 0
for life in range(21):
    child = os.fork()
    if not child:
        resume = ["--resume"] if os.path.exists(f"{out}/checkpoint.pt") else []
        train_small.main(arguments + resume)
        os._exit(0)
    if life < 20:  # it dies once it has got further than all before it, by chance in the middle of whatever
        seen += draw.randint(1, 15)
        while steps() < seen and not os.waitpid(child, os.WNOHANG)[0]:
            time.sleep(draw.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) != (life < 20):
        sys.exit(f"life {life} ended with status {status}")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_twenty_times(text, tmp_path):  # noqa: F811
    """SIGKILL at random moments, also while it saves: the weights, the optimizer and the log end as if nothing was."""
    command = arguments(tmp_path / "whole", text, "--steps", "400")
    torch.manual_seed(0)
    main(command)
    command = arguments(tmp_path / "killed", text, "--steps", "400")
    script = [sys.executable, "-W", "ignore", "-c", KILLER, str(tmp_path / "killed"), *command]
    subprocess.run(script, check=True, capture_output=True, cwd=test_train_small.ROOT, timeout=300)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


# ---------------------------------------------------------------------------------------------------- 1. not in silence


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_two_runs_do_not_share_a_folder(text, tmp_path, monkeypatch):  # noqa: F811
    """The second takes the next folder, or is refused: also while the first has saved nothing, and both resume."""
    monkeypatch.chdir(tmp_path)
    first = keywords("", text, steps=5)
    del first["out"]
    folders = []

    def second():
        with contextlib.suppress(StopIteration):
            next(once)
            folders.append(main(**first)["run"])
            for resume in (False, True):
                with pytest.raises(SystemExit, match=r"another run is at work in 'runs/tiny'"):
                    main(**first, out="runs/tiny", resume=resume)

    once = iter([None])
    with at_step(monkeypatch, 2, second):
        assert main(**first)["run"] == os.path.join("runs", "tiny")
    assert folders == [os.path.join("runs", "tiny-2")]
    assert [row["step"] for row in metrics("runs/tiny")] == [row["step"] for row in metrics("runs/tiny-2")]
    assert len(metrics("runs/tiny")) == 5
    main(resume=True, out="runs/tiny")  # it is free again


def test_another_runs_tokenizer(whole, text, tmp_path):  # noqa: F811
    """One of equal size would give gibberish, a larger one an IndexError, a smaller one a KeyError after training."""
    words = Path(text).read_text(encoding="utf-8")
    for vocab_size in (300, 400, 270):
        shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
        other = make_tokenizer("bpe", [words[::-1]], vocab_size)
        (tmp_path / "tokenizer.json").write_text(tokenizer_to_json(other), encoding="utf-8")
        with pytest.raises(ValueError, match="tokenizer is not the one that the model was trained with"):
            load_run(tmp_path)
        with pytest.raises(SystemExit, match="tokenizer is not the one"):
            main(["--resume", "--out", str(tmp_path)])


def test_an_older_run_has_a_tokenizer_of_the_right_size(whole, tmp_path):  # noqa: F811
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    state = test_train_small.checkpoint(tmp_path)
    del state["data"]["tokenizer_sha256"]
    torch.save(state, tmp_path / "checkpoint.pt")
    load_run(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer_to_json(make_tokenizer("bpe", ["text"], 257)))
    with pytest.raises(ValueError, match="tokenizer is not the one"):
        load_run(tmp_path)


def test_what_training_wrote_is_no_text(whole, text, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(whole[0], tmp_path / "runs" / "a")
    shutil.copyfile(text, tmp_path / "text")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "half").write_text("begun")
    monkeypatch.chdir(tmp_path)
    assert list(read_documents(".", "out")) == ["text"] and list(read_documents("runs/a/sample.txt")) == ["."]
    for folder in ("runs", "runs/a"):
        with pytest.raises(ValueError, match="no text"):
            read_documents(folder)
    with pytest.raises(ValueError, match="no text"):
        read_documents(".", ".")
    main(**keywords("out", ".", steps=4))
    assert len(main(out="out", resume=True, steps=6)["history"]) == 6  # it is the same text still


def test_the_prompt_of_the_sample_is_text(tmp_path, monkeypatch):
    """The last window of the validation text is filled up with token 0, which is a byte 0."""
    (tmp_path / "text").write_text("".join(f"line {i} of a short text\n" for i in range(100)))
    prompts = []
    monkeypatch.setattr(train_small, "write_sample", lambda *arguments: prompts.append(arguments[-1]) or "")
    main(**keywords(tmp_path / "out", str(tmp_path / "text"), steps=2, block_size=80))
    tokenizer = load_run(tmp_path / "out")[1]
    assert re.fullmatch(r"[a-z0-9 \n]*line 99 of a short text\n", tokenizer.decode(prompts[0].tolist()))


@pytest.mark.parametrize("impl", ["torch", "triton", "fused", "reference"])
@pytest.mark.parametrize("largest", [30, 100, 1000, 10_000])
def test_large_logits(largest, impl):
    """A weight is exp(z - lse): where z and lse round to 2**-23 of their size, it is off by that share, and dq by what
    that does to dz = P * (dp - delta), delta included. 8: the sums' own roundings."""
    if impl in ("triton", "fused") and kernel._why_not_triton(torch.ones(1, 1, 1, 1)):
        pytest.skip("no Triton here")
    torch.manual_seed(0)
    B, n_head, n_kv_head, T, head_dim, n_slot = 2, 4, 2, 13, 16, 5
    q, do = torch.randn(2, B, n_head, T, head_dim)
    k, v = torch.randn(2, B, n_kv_head, T, head_dim)
    depth_k, depth_v = torch.randn(2, n_slot, B, n_kv_head, T, head_dim)

    def joint(x, slots):  # (B, n_head, T, T + n_slot, head_dim)
        x = x[:, :, None].expand(-1, -1, T, -1, -1)
        return torch.cat([x, slots.permute(1, 2, 3, 0, 4)], 3).repeat_interleave(n_head // n_kv_head, 1).double()

    keys, values = joint(k, depth_k), joint(v, depth_v)
    q *= largest / ((q.double().unsqueeze(3) * keys).sum(-1).abs().max() * head_dim**-0.5).float()

    def dq(dtype, impl):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v, depth_k, depth_v)]
        return torch.autograd.grad(moda_attention(*inputs, impl=impl), inputs[0], do.to(dtype))[0].double()

    p = kernel.moda_attention_weights(q.double(), k.double(), depth_k.double())[0]
    dp = (do.double().unsqueeze(3) * values).sum(-1)  # (B, n_head, T, T + n_slot)
    delta = (p * dp).sum(-1, keepdim=True)
    off = p * ((dp - delta).abs() + (p * dp.abs()).sum(-1, keepdim=True))
    bound = 2**-23 * (largest + 8) * head_dim**-0.5 * (off.unsqueeze(-1) * keys.abs()).sum(3)
    want = dq(torch.float64, "reference")
    error = dq(torch.float32, impl) - want
    assert (error.abs() <= bound).all()
    documented = {30: 1e-6, 100: 3e-6, 1000: 1e-4}.get(largest, math.inf)
    assert error.norm() <= 2 * documented * want.norm()  # 2: other CPUs sum in other orders


# ------------------------------------------------------------------------- 2. before the work, or at least not after it


@pytest.mark.parametrize(
    "out", ["", "{file}/run", "{file}", "{dangling}", "{tmp}/" + "x" * 300, "/proc/run", "{tmp}/\0"]
)
def test_a_folder_that_cannot_be(text, tmp_path, monkeypatch, out):  # noqa: F811
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    out = out.format(file=tmp_path / "file", dangling=tmp_path / "dangling", tmp=tmp_path)
    monkeypatch.setattr(train_small, "load_text", None)  # before the text is read
    with pytest.raises(
        SystemExit, match=r"error: (--out '.*' (has to be a folder|cannot be used)|embedded null)"
    ) as error:
        main(arguments(out, text))
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


def test_a_folder_that_may_not_be_written_to(text, tmp_path, monkeypatch):  # noqa: F811
    def refuse(dir):  # the super-user may write everywhere, so that a mode proves nothing
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(environment.tempfile, "TemporaryFile", refuse)
    with pytest.raises(SystemExit, match=r"--out '.*' cannot be used: Permission denied"):
        main(arguments(tmp_path / "out", text))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on the size of files")
def test_a_full_disk(text, tmp_path):  # noqa: F811
    """torch.save calls it a RuntimeError about positions in a zip."""
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
    code = limit + "import sys, train_small; train_small.main(sys.argv[1:])"
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments(tmp_path / "out", text)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert re.match(r"error: cannot write '.*checkpoint.pt', is the disk full\?", run.stderr.splitlines()[-1])
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_terminal_that_is_not_utf8(text, tmp_path):  # noqa: F811
    env = os.environ | {"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(ROOT / "train_small.py"),
        *arguments(tmp_path, text, "--prompt", "\u2248 \U0001f600"),
    ]
    run = subprocess.run(command, env=env, capture_output=True, timeout=300)
    assert run.returncode == 0 and b"bits/byte" in run.stdout and b"? ?" in run.stdout


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_what_a_cluster_sends_is_ctrl_c(whole, text, tmp_path, monkeypatch, name):  # noqa: F811
    signum = getattr(signal, name, None) or pytest.skip(f"no {name}")
    before = signal.signal(signum, signal.SIG_DFL)  # these tests may themselves run under nohup
    try:
        with (
            at_step(monkeypatch, 4, lambda: os.kill(os.getpid(), signum)),
            pytest.raises(SystemExit, match=r"stopped and saved after step 4"),
        ):
            main(arguments(tmp_path, text, "--optimizer", whole[2]))
        assert signal.getsignal(signum) is signal.SIG_DFL
    finally:
        signal.signal(signum, before)
    main(["--out", str(tmp_path), "--resume"])
    assert_same_run(whole[0], tmp_path)


def test_nohup_still_holds(text, tmp_path, monkeypatch):  # noqa: F811
    signum = getattr(signal, "SIGHUP", None) or pytest.skip("no SIGHUP")
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        with at_step(monkeypatch, 4, lambda: os.kill(os.getpid(), signum)):
            assert len(main(arguments(tmp_path, text))["history"]) == 10
    finally:
        signal.signal(signum, before)


def test_the_last_evaluation_is_bounded_and_says_so(text, tmp_path, monkeypatch, capsys):  # noqa: F811
    results = main(**keywords(tmp_path / "a", text))
    n_token = test_train_small.checkpoint(tmp_path / "a")["data"]["validation_tokens"] - 1
    assert f"validation: all {n_token:,} tokens" in capsys.readouterr().out and results["val_tokens"] == n_token
    few = main(**keywords(tmp_path / "b", text, test_tokens=128))
    assert f"validation: 128 of {n_token:,} tokens" in capsys.readouterr().out and few["val_tokens"] == 128
    assert few["val_loss"] != results["val_loss"] and "over 128 tokens" in repr(few)
    assert main(**keywords(tmp_path / "c", text, test_tokens=None))["val_loss"] == results["val_loss"]

    original = train_small.evaluate

    def evaluate(model, x, *more):
        if len(x) > 8:  # at the end
            raise KeyboardInterrupt
        return original(model, x, *more)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=r"all 10 steps are saved, but not evaluated"):
        patch.setattr(train_small, "evaluate", evaluate)
        main(**keywords(tmp_path / "d", text))
    assert main(out=str(tmp_path / "d"), resume=True)["val_loss"] == results["val_loss"]


def test_windows_are_spread_evenly():
    windows = [torch.arange(100).repeat_interleave(4).view(100, 4)] * 2
    for n_token, wanted in (
        (40, range(0, 100, 10)),
        (12, [0, 33, 66]),
        (1, [0]),
        (400, range(100)),
        (None, range(100)),
    ):
        assert [x[:, 0].tolist() for x in train_small.spread(windows, n_token)] == [list(wanted)] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of memory")
def test_a_large_text_takes_eight_bytes_a_byte(tmp_path):
    """Also with one character that makes Python keep four bytes for each, and a binary file that is left unread.

    By count, with a vocabulary of 2,000: 1.3 for the text, 1.4 for the words that the tokenizer counted, and 12 for
    each token, 0.35 of them a byte. That is 6.9. Measured were 6.8, give or take 0.05. A second text adds 1 to 4.
    """
    size, draw = 24_000_000, random.Random(0)
    words = ["".join(draw.choices("abcdeiounst", k=draw.randint(1, 9))) for _ in range(50_000)]
    content = " ".join(draw.choices(words, k=5_000_000))[:size]
    (tmp_path / "text").write_text(content + "\n\U0001f600", encoding="utf-8")
    with (tmp_path / "binary").open("wb") as file:
        file.truncate(1_000_000_000)
    code = (
        "import sys, text; peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) << 10\n"
    )
    code += "import rustbpe; before = peak(); text.load_text(sys.argv[1], 'bpe', 2000); print(peak() - before)"
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert int(run.stdout.split()[-1]) < 8 * size, run.stderr


# -------------------------------------------------------------------------------------------------- 3. errors that help


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("text".encode("utf-16"), "'.*' is UTF-16: save it as UTF-8"),
        (b"text \xfc", "'.*' is not UTF-8: byte 5 is 0xfc"),
        (b"text\0", "'.*' is binary, not UTF-8: byte 4 is 0"),
        (b"", "is empty"),
    ],
)
def test_why_a_file_is_no_text(tmp_path, content, reason):
    path = tmp_path / "file"
    path.write_bytes(content)
    for data in (path, tmp_path):
        with pytest.raises(ValueError, match=f"^no text: .*{reason}"):
            read_documents(str(data))


def test_folders_without_text(tmp_path, capsys):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "text").write_bytes(b"\xef\xbb\xbftext")
    assert read_documents(str(tmp_path)) == {"a/b/text": "text"}  # without the byte order mark
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "b").symlink_to(tmp_path / "a" / "b", target_is_directory=True)
    with pytest.raises(ValueError, match="is empty, but for links to folders, which are not followed"):
        read_documents(str(tmp_path / "links"))
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "p")
    with pytest.raises(ValueError, match="p' is no file and no folder"):
        read_documents(str(tmp_path / "pipe" / "p"))
    with pytest.raises(ValueError, match=r"'gone\.txt' is no file and no folder, seen from '"):
        read_documents("gone.txt")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux")
def test_a_name_that_is_not_utf8(text, tmp_path, capsys):  # noqa: F811
    (tmp_path / "in").mkdir()
    shutil.copyfile(text, os.fsencode(tmp_path / "in") + b"/\xff")
    (Path(tmp_path) / "in" / "binary\udcfe").write_bytes(b"\0")
    assert len(main(**keywords(tmp_path / "out", str(tmp_path / "in"), steps=2))["history"]) == 2
    assert r"skipped 1 of 2 files: '" in (out := capsys.readouterr().out) and r"binary\udcfe' is binary" in out


def test_a_text_of_one_letter(tmp_path):
    (tmp_path / "text").write_text("a" * 20_000)
    with pytest.raises(SystemExit, match=r"too short: its 18,000 bytes for training are \d+ tokens, but block_size"):
        main(**keywords(tmp_path / "out", str(tmp_path / "text")))


@pytest.mark.parametrize("field", ["step", "seconds", "history", "data", "optimizers", "rng", "train_config"])
def test_a_checkpoint_without_a_field(whole, tmp_path, field):  # noqa: F811
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    state = test_train_small.checkpoint(tmp_path)
    del state[field]
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match=r"^error: .*(damaged or foreign|older version's)"):
        main(["--resume", "--out", str(tmp_path)])


@pytest.mark.parametrize("impl", [None, "torch", "reference"])
def test_torch_func_and_second_derivatives(impl):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64)  # (B, n_head, T, head_dim)
    slots = torch.randn(2, 3, 1, 2, 5, 8, dtype=torch.float64)

    def loss(q):
        return moda_attention(q, k, v, *slots, impl=impl).square().sum()

    x = q.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(x), x)
    got = [torch.func.grad(loss)(q), torch.func.vjp(loss, q)[1](torch.ones_like(loss(q)))[0]]
    got += [torch.func.vmap(torch.func.grad(loss))(q[None])[0], torch.func.jacrev(loss)(q)]
    for grad in got:
        torch.testing.assert_close(grad, want)
    (again,) = torch.autograd.grad(loss(x), x, create_graph=True)
    if impl == "reference":
        torch.autograd.grad(again.sum(), x)
    else:
        with pytest.raises(RuntimeError, match='no second derivatives: impl="reference" takes create_graph=True'):
            torch.autograd.grad(again.sum(), x)


def test_labels_are_no_mathematics(monkeypatch):
    """Half a surrogate pair is drawn as ?, and every $ as itself."""
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    import viz

    axes = Figure().add_subplot()
    labels = ["$$", r"$\frac$", "$a_$", "$x$", "\ud800", "\\$"]
    viz.heatmap(axes, torch.rand(6, 7).numpy(), labels, ["attn 0"])
    axes.figure.savefig(io.BytesIO())
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in ticks][:6] == [*labels[:4], "?", "\\$"]
        assert not any(label.get_parse_math() for label in ticks)


def test_ids_that_cannot_be():
    model = MoDA(SMALL)
    for ids in ([[1, SMALL.vocab_size]], [[-1, 2]]):
        for use in (model, model.attention_maps, lambda idx: model.generate(idx, 1)):
            with pytest.raises(ValueError, match=r"idx must be from 0 to below vocab_size \(23\)"):
                use(torch.tensor(ids))
    for ids in ([[1, 2]], "text"):
        for use in (model, model.attention_maps):
            with pytest.raises(ValueError, match="idx must be a tensor of integer token ids"):
                use(ids)
    with pytest.raises(ValueError, match="need ids as tensor or lists"):
        model.generate("text", 1)


# -------------------------------------------------------------------------------------------------- 4. what was missing


@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_of_any_lengths(use_cache):
    """Each as if alone, also one longer than block_size, and ends for itself. Lists of ids, or tensors."""
    torch.manual_seed(0)
    model = MoDA(SMALL)
    prompts = [torch.randint(SMALL.vocab_size, (T,)) for T in (3, 1, 40, 16)]
    alone = [model.generate(prompt[None], 12, 0, use_cache=use_cache)[0] for prompt in prompts]
    for ids in (prompts, [prompt.tolist() for prompt in prompts]):
        assert all(map(torch.equal, model.generate(ids, 12, 0, use_cache=use_cache), alone))
    stop = alone[0][-1].item()
    for prompt, row, got in zip(
        prompts, alone, model.generate(prompts, 12, 0, use_cache=use_cache, stop=stop), strict=True
    ):
        new = row[len(prompt) :].tolist()
        assert got[len(prompt) :].tolist() == (new[: new.index(stop) + 1] if stop in new else new)
    with pytest.raises(ValueError, match="empty"):
        model.generate([[1, 2], []], 3)


def test_more_maps_than_memory():
    """Refused before they are computed: the device has no numbers."""
    with torch.device("meta"):
        model, idx = MoDA(PRESETS["paper-700m"]), torch.zeros(1, 4096, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"would take 36\.0 GiB.*some layers or heads"):
        model.attention_maps(idx)
    assert [p.shape for p in model.attention_maps(idx, layers=[35], heads=[3])] == [(1, 1, 4096, 4096 + 70)]


# -------------------------------------------------------------------------------------------------- 5. another PyTorch


CODE = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
CODE = re.sub(r"from (torch[\w.]*) import (_\w+)", r"\1.\2", CODE)
PRIVATE = sorted(set(re.findall(r"\b(?:torch|aten|forward_ad|Variable)(?:\.[a-z]\w*)*\._[a-zA-Z][\w.]+", CODE)))


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_name_of_pytorch_is_still_there(name):
    place = {"torch": torch, "aten": torch.ops.aten, "forward_ad": torch.autograd.forward_ad, "Variable": Variable}
    root, _, rest = name.partition(".")
    assert operator.attrgetter(rest)(place[root]) is not None


def test_the_private_names_are_these():
    """All that another PyTorch may take away, in one place."""
    assert [name for name in PRIVATE if "_scaled_dot_product" not in name] == [
        "Variable._execution_engine.queue_callback",
        "forward_ad._current_level",
        "torch._C._current_graph_task_id",
        "torch._C._functorch.peek_interpreter_stack",
        "torch._dynamo.config",
        "torch._foreach_lerp_",
        "torch._foreach_mul_",
        "torch._foreach_sub_",
        "torch.optim._muon._adjust_lr",
    ]
