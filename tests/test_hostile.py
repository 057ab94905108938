"""Whatever is thrown at it: an answer, or one error that says what is wrong. And a run that is killed, twenty times."""

import contextlib
import os
import subprocess
import sys

import pytest
import test_train_small
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_train_small import arguments, assert_same_run, text, whole  # noqa: F401

from kernel import moda_attention, moda_attention_reference
from text import read_documents
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
        assert document.encode() == files[name] and document and "\0" not in document and name != ".e"


def test_links_in_circles_and_what_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a" * 3_000_000)  # one line
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")  # whoever opens it waits for ever
    (tmp_path / "b.txt").write_text("b")
    original = type(tmp_path).read_bytes

    def read_bytes(path):  # the super-user may read everything, so that its mode proves nothing
        if path.name == "b.txt":
            raise PermissionError(path)
        return original(path)

    monkeypatch.setattr(type(tmp_path), "read_bytes", read_bytes)
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
