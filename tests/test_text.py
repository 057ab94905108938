"""text.py: which files are read, how they are split, and that no token is lost or read twice."""

import itertools

import torch

from text import (
    encode,
    get_batch,
    load_text,
    make_tokenizer,
    read_documents,
    split_documents,
    token_bytes,
    tokenizer_from_json,
    tokenizer_to_json,
    validation_windows,
)


def test_a_folder_is_read_but_for_what_is_no_text(tmp_path, capsys):
    files = {"b.txt": b"b\r\n", "a/c.md": "ä".encode(), "d.bin": b"\0", "e": b"\xff", ".git/f": b"f", "g": b""}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert list(read_documents(str(tmp_path)).items()) == [("a/c.md", "ä"), ("b.txt", "b\r\n")]
    assert "skipped 2 of 4 files" in capsys.readouterr().out


def test_the_split_is_by_file_stable_and_disjoint():
    documents = {f"package/module_{i}.py": f"text {i}\n" for i in range(400)}
    train, validation = split_documents(documents)
    assert sorted(train + validation) == sorted(documents.values()) and 10 < len(validation) < 45
    fewer = dict(list(documents.items())[::3])  # other files come and go
    train_2, validation_2 = split_documents(fewer)
    assert set(train_2) <= set(train) and set(validation_2) <= set(validation)


def test_a_single_file_is_cut_at_a_line():
    text = "".join(f"line {i}\n" for i in range(1000))
    (train,), (validation,) = split_documents({".": text})
    assert train + validation == text and train.endswith("\n") and 0.88 < len(train) / len(text) <= 0.9


def test_the_default_text_is_the_standard_library_without_tests():
    documents = read_documents()
    assert "argparse.py" in documents and len(documents) > 300 and all(name.endswith(".py") for name in documents)
    assert not [name for name in documents if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert list(documents) == sorted(documents)
    train, validation = split_documents(documents)
    assert not set(train) & set(validation) - {""} and 0.03 < sum(map(len, validation)) / sum(map(len, train)) < 0.15


def test_tokenizer_round_trip():
    texts = ["def f():\n    return '<|endoftext|>'\r\n", "é€好😀 \t \u2028", " " * 1_000_000, "x" * 100_000]
    tokenizer = make_tokenizer("bpe", [*texts, *texts], 300)
    again = tokenizer_from_json(tokenizer_to_json(tokenizer))
    tokens = encode(again, texts)
    assert torch.equal(tokens, encode(tokenizer, texts)) and tokens.dtype == torch.int64
    ends = (tokens == tokenizer.eot_token).nonzero().flatten().tolist()
    assert len(ends) == len(texts) + 1 and ends[0] == 0 and ends[-1] == len(tokens) - 1  # only between the texts
    assert [again.decode(tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(ends)] == texts
    assert tokenizer.n_vocab <= 300 and tokens.max() < tokenizer.n_vocab


def test_one_runs_tokenizer_does_not_leak_into_another(tmp_path):
    for words in ("aaaa bbbb " * 50, "cccc dddd " * 50):
        path = tmp_path / "tokenizer.json"  # the same path twice
        tokenizer = make_tokenizer("bpe", [words], 270)
        path.write_text(tokenizer_to_json(tokenizer))
        assert tokenizer_from_json(path.read_text()).encode(words) == tokenizer.encode(words)


def test_every_epoch_visits_each_window_once():
    tokens, T = torch.arange(1000), 8
    x, y = get_batch(tokens, T, 7, range(125))
    assert torch.equal(x.flatten().sort().values, tokens) and torch.equal(y, (x + 1) % 1000)
    assert len(x[:, 0].diff().unique()) > 50  # in no order
    later, _ = get_batch(tokens, T, 7, range(125, 250))
    assert torch.equal(later.flatten().sort().values, tokens)
    assert not torch.equal(x, later) and not torch.equal(x, get_batch(tokens, T, 8, range(125))[0])
    assert torch.equal(get_batch(tokens, T, 7, range(120, 130))[0], torch.cat([x[120:], later[:5]]))  # any slice


def test_token_bytes_add_up_to_the_text():
    text = "é€好😀 def f():\n" * 20
    tokenizer = make_tokenizer("bpe", [text], 280)
    n_byte = token_bytes(tokenizer)
    assert n_byte[encode(tokenizer, [text, text])].sum() == 2 * len(text.encode())  # <|endoftext|> is no text
    assert n_byte.shape == (tokenizer.n_vocab,) and n_byte[tokenizer.eot_token] == 0


def test_every_validation_token_is_predicted_once():
    for n_token in (2, 8, 9, 10, 100):
        idx, targets = validation_windows(torch.arange(n_token), 8)
        assert idx.shape == targets.shape and idx.shape[1] == 8
        assert targets[targets >= 0].tolist() == list(range(1, n_token))
        assert torch.equal(idx[targets >= 0] + 1, targets[targets >= 0])


def test_a_text_is_loaded_the_same_with_the_tokenizer_that_it_made(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("".join(f"line {i} äöü\n" for i in range(300)).encode())
    tokenizer, tokens, held_out, record = load_text(str(path), "bpe", 300)
    again = load_text(str(path), tokenizer, 300)
    assert again[0] is tokenizer and again[3] == record
    assert torch.equal(again[1], tokens) and torch.equal(again[2], held_out)
    assert record["train_bytes"] + record["validation_bytes"] == path.stat().st_size
    assert (record["train_tokens"], record["validation_tokens"]) == (len(tokens), len(held_out))
    assert record["files"] == 1 and record["source"] == str(path) and record["vocab_size"] == 300
