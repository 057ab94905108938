"""Text in, batches of tokens out: files, tokenizer, and the order in which a run reads its windows."""

import base64
import functools
import hashlib
import json
import sysconfig
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F

END = "<|endoftext|>"
PIECE = 2**16  # characters encoded at a time: a longer run of spaces overflows the stack of tiktoken's regex
# besides tests and other people's packages: what is no program, one generated file of prose and a hundred code tables
STDLIB_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings"}


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
    if skipped:
        print(f"skipped {skipped} of {skipped + len(documents)} files: binary, unreadable or not UTF-8")
    return documents


def split_documents(documents):
    """Split {path: text} into two lists of texts, for training and for validation.

    A hash of its path holds out one file in 16, whatever else the folder gains or loses. Where that gives no usable
    split, as with a single file, the last tenth of every file is held out, from the beginning of a line.
    """
    held_out = {name for name in documents if hashlib.sha256(name.encode()).digest()[0] < 16}
    validation = [text for name, text in documents.items() if name in held_out]
    if 0.01 < sum(map(len, validation)) / sum(map(len, documents.values())) < 0.5:
        return [text for name, text in documents.items() if name not in held_out], validation
    tenths = [(text, len(text) * 9 // 10) for text in documents.values()]
    cuts = [(text, text.rfind("\n", 0, tenth) + 1 or tenth) for text, tenth in tenths]
    return [text[:cut] for text, cut in cuts], [text[cut:] for text, cut in cuts]


def pieces(text):
    return (text[i : i + PIECE] for i in range(0, len(text), PIECE))


def make_tokenizer(name, texts, vocab_size):
    """tiktoken.Encoding: "bpe" is trained on texts, at most vocab_size tokens; any other name is one of tiktoken's.
    ValueError for a name that tiktoken cannot load, and for a vocab_size with less than every byte and END."""
    if name != "bpe":
        try:
            return tiktoken.get_encoding(name)
        except Exception as error:  # an unknown name, or whatever the network does
            raise ValueError(f"tiktoken cannot load its encoding {name!r}: {error}") from error
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257, for every byte and {END}, got {vocab_size}")
    import rustbpe  # here, as whoever only reads a run does not need it

    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator((piece for text in texts for piece in pieces(text)), vocab_size=vocab_size - 1)
    ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
    return tiktoken.Encoding("bpe", pat_str=bpe.get_pattern(), mergeable_ranks=ranks, special_tokens={END: len(ranks)})


def tokenizer_to_json(tokenizer):
    """A tiktoken.Encoding as text, for `tokenizer_from_json`."""
    # The underscored fields are tiktoken's documented way to extend an encoding. Its loader of rank files is no use
    # here: it caches them by path, and would give one run the tokenizer of another.
    ranks = {base64.b64encode(token).decode(): rank for token, rank in tokenizer._mergeable_ranks.items()}
    parts = {"name": tokenizer.name, "pat_str": tokenizer._pat_str, "special_tokens": tokenizer._special_tokens}
    return json.dumps(parts | {"mergeable_ranks": ranks})


def tokenizer_from_json(text):
    """The tiktoken.Encoding that `tokenizer_to_json` wrote."""
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
    """Where the windows of an epoch start in the stream, in the order in which they are read: (n_window,)."""
    generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
    offset = torch.randint(block_size, (1,), generator=generator)
    return torch.randperm(n_window, generator=generator) * block_size + offset


def get_batch(tokens, block_size, seed, rows):
    """Inputs and targets (B, T): the windows numbered `rows` (a range) of an endless shuffled order.

    Every epoch cuts the stream, tokens (n_token,) closed to a ring, into windows at another offset and visits each
    once. Only the seed and its number decide a window: a resumed run and another model read the same text.
    """
    n_window = len(tokens) // block_size
    starts = [epoch_order(n_window, block_size, seed, row // n_window)[row % n_window] for row in rows]
    positions = (torch.stack(starts)[:, None] + torch.arange(block_size + 1)) % len(tokens)  # (B, T + 1)
    window = tokens[positions.to(tokens.device)]
    return window[:, :-1], window[:, 1:]


def validation_windows(tokens, T):
    """tokens (n_token,) -> (idx, targets), (n_window, T) each: all but the first are predicted once, -1 fills up."""
    pad = -(len(tokens) - 1) % T
    return F.pad(tokens[:-1], (0, pad)).view(-1, T), F.pad(tokens[1:], (0, pad), value=-1).view(-1, T)


def token_bytes(tokenizer):
    """How many bytes of UTF-8 each token stands for: int64 (n_vocab,). Special tokens are no text, and stand for 0."""
    n_byte = torch.zeros(tokenizer.n_vocab, dtype=torch.int64)
    for token, token_id in tokenizer._mergeable_ranks.items():
        n_byte[token_id] = len(token)
    return n_byte


def load_text(source, tokenizer, vocab_size):
    """Read, split and encode the text -> (tiktoken.Encoding, training tokens (n_token,), validation tokens (n_token,),
    what a run records of its text: a dict). ValueError for what cannot be read.

    source: see `read_documents`. tokenizer: a name and the largest vocab_size for `make_tokenizer`, or an Encoding.
    """
    documents = read_documents(source)
    train_texts, held_out_texts = split_documents(documents)
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, train_texts, vocab_size)
    tokens, held_out = encode(tokenizer, train_texts), encode(tokenizer, held_out_texts)
    sha256 = hashlib.sha256("".join(documents.values()).encode()).hexdigest()
    record = {"source": source or "Python's standard library", "files": len(documents), "sha256": sha256}
    record["vocab_size"] = vocab_size  # as asked for: a short text may not have that many tokens
    for name, texts, ids in (("train", train_texts, tokens), ("validation", held_out_texts, held_out)):
        record |= {f"{name}_bytes": len("".join(texts).encode()), f"{name}_tokens": len(ids)}
    return tokenizer, tokens, held_out, record
