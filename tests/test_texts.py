"""The texts of the experiments, on small ones: which files, in which order, what is held out, what is packed."""

import hashlib

import pytest
import torch

from experiments import texts
from text import tokenizer_from_json


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A made-up source tree: 300 files to be read, and some that are not."""
    monkeypatch.setattr(texts, "RUNS", tmp_path / "runs")
    root = tmp_path / "tree"
    (root / "drivers").mkdir(parents=True)
    (root / "Makefile").write_text("# SPDX\nVERSION = 6\nPATCHLEVEL = 1\nSUBLEVEL = 192\nEXTRAVERSION =\n")
    for i in range(300):
        (root / "drivers" / f"{i}.c").write_text(f"int f{i}(void) {{ return {i}; }} /* é */\n")
    (root / "long.c").write_bytes(b"x" * 400_000)
    (root / "latin.c").write_bytes(b"caf\xe9")
    (root / "binary.c").write_bytes(b"a\0b")
    (root / "header.h").write_text("no C file")
    (root / "link.c").symlink_to(root / "drivers" / "1.c")
    return root


def test_files_of_the_kernel(tree):
    train, held_out, version = texts.linux(tree)
    assert version == "Linux 6.1.192" and len(train) + len(held_out) == 300 and held_out
    digest = {(tree / name).read_text(): hashlib.sha256(name.encode()).hexdigest()
              for name in (f"drivers/{i}.c" for i in range(300))}  # fmt: skip
    for part in (train, held_out):
        assert part == sorted(part, key=digest.get)
    assert all(digest[text] < "02" for text in held_out) and all(digest[text] >= "02" for text in train)
    (tree / "long.c").write_bytes(b"x" * 399_999)
    assert sum(map(len, texts.linux(tree)[:2])) == 301
    (tree / "Makefile").unlink()
    with pytest.raises(ValueError, match="no Linux source"):
        texts.linux(tree)


def test_packed_is_a_prefix(tree, monkeypatch, capsys):
    def main(*arguments):
        monkeypatch.setattr("sys.argv", ["texts.py", *arguments])
        texts.main()
        return capsys.readouterr().out

    with pytest.raises(SystemExit, match="see texts"):
        main("pack", "linux", "--tokens", "1")
    said, whole = main("linux", str(tree)), texts.load("linux")
    assert all(x in said for x in ("Linux 6.1.192", *whole["sha256"]))
    train, held_out, _ = texts.linux(tree)
    for text, part, i in ((train, "tokens", 0), (held_out, "held_out", 1)):
        assert whole[part].dtype == torch.int16 and whole["files"][i] == len(text)
        decoded = tokenizer_from_json(whole["tokenizer"]).decode(whole[part].tolist())
        assert decoded.split("<|endoftext|>") == ["", *text, ""]
        raw = "".join(text).encode()
        assert (whole["sha256"][i], whole["bytes"][i]) == (hashlib.sha256(raw).hexdigest(), len(raw))
    with pytest.raises(SystemExit, match="not 1,000,000"):
        main("pack", "linux", "--tokens", "1")
    main("pack", "linux", "--tokens", "0.001")
    (texts.RUNS / "linux.pt").unlink()
    packed = texts.load("linux")
    assert torch.equal(packed["tokens"], whole["tokens"][:1000]) and torch.equal(packed["held_out"], whole["held_out"])
    assert all(packed[name] == whole[name] for name in ("tokenizer", "sha256", "bytes", "files", "version"))


def test_books_become_a_text(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "novels.txt").write_text("train B.txt\nval C.txt\ntrain A.txt\n")
    (tmp_path / "A.txt").write_bytes("\ufeff\r\nCHAPTER I \t\r\n\r\n \r\n\r\n  It was.\r\n\r\n".encode())
    (tmp_path / "B.txt").write_bytes("Ça\nira".encode())
    assert texts.book_text(tmp_path, "train") == "Ça\nira\n\nCHAPTER I\n\n  It was.\n\n"
    with pytest.raises(ValueError, match=r"C\.txt"):
        texts.book_text(tmp_path, "val")


def test_beginning():
    assert texts.beginning(["abc", "de", "f"], 4) == ["abc", "de"]
    assert texts.beginning(["abc"], 1) == ["abc"]
