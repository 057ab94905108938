"""Text in, batches of tokens out: files, tokenizer, and the order in which a run reads its windows."""

import base64
import codecs
import functools
import hashlib
import json
import sysconfig
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

END = "<|endoftext|>"
BAR = {"delay": 2, "leave": False}  # of progress: shown where it takes more than 2 seconds
PIECE = 2**16  # characters encoded at a time: a longer run of spaces overflows the stack of tiktoken's regex
# besides tests and other people's packages: what is no program, one generated file of prose and a hundred code tables
STDLIB_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings"}


def read_documents(data="", out=None):
    """Read the text -> {path within the folder: text}, ordered by path.

    data: a file, a folder (every UTF-8 file in it, hidden ones excepted), or "" for the source of this machine's
    Python standard library without its tests. What training wrote is no text: run folders are left out, and the folder
    `out`. ValueError, with a file and a reason, if there is no text.
    """
    root, documents, skipped = Path(data or sysconfig.get_paths()["stdlib"]), {}, []
    if not root.is_file() and not root.is_dir():
        raise ValueError(f"no text: {str(root)!r} is no file and no folder, seen from {str(Path.cwd())!r}")
    found = [root] if root.is_file() else [path for path in root.rglob("*" if data else "*.py") if path.is_file()]
    runs = {path.parent for path in found if path.name == "metrics.jsonl" and path.with_name("tokenizer.json").exists()}
    runs = {path.resolve() for path in (*runs, *([Path(out)] if out else [])) if root.is_dir()}
    for name, path in tqdm(sorted((path.relative_to(root).as_posix(), path) for path in found), "reading", **BAR):
        parts = name.split("/")
        hidden = name != "." and any(part.startswith(".") for part in parts)
        if hidden or (not data and STDLIB_SKIP & set(parts)) or not runs.isdisjoint(path.resolve().parents):
            continue
        try:
            documents[name] = read_text(path)
        except ValueError as error:
            skipped.append(f"{str(path)!r} {error}")
    documents = {name: text for name, text in documents.items() if text}
    if skipped:
        reasons = skipped[0] + f", and {len(skipped) - 1} more" * (len(skipped) > 1)
    if not documents:
        links = any(path.is_symlink() and path.is_dir() for path in root.rglob("*"))
        empty = f"{str(root)!r} is empty" + ", but for links to folders, which are not followed" * links
        raise ValueError(f"no text: {reasons if skipped else empty}")
    if skipped:
        print(f"skipped {len(skipped)} of {len(skipped) + len(documents)} files: {reasons}")
    return documents


def read_text(path):
    """The text of a UTF-8 file, without a byte order mark; line ends stay as they are. ValueError says why not, as the
    end of a sentence that begins with the file."""
    try:
        with path.open("rb") as file:
            if b"\0" not in (raw := file.read(2**16)):  # of a large binary file that is enough
                raw += file.read()
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError("is UTF-16: save it as UTF-8")
        if (zero := raw.find(0)) >= 0:
            raise ValueError(f"is binary, not UTF-8: byte {zero} is 0")
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: byte {error.start} is {raw[error.start]:#x}, {error.reason}") from error
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error


def split_documents(documents):
    """Split {path: text} into two lists of texts, for training and for validation.

    A hash of its path holds out one file in 16, whatever else the folder gains or loses. Where that gives no usable
    split, as with a single file, the last tenth of every file is held out, from the beginning of a line.
    """
    held_out = {name for name in documents if hashlib.sha256(name.encode(errors="surrogateescape")).digest()[0] < 16}
    validation = [text for name, text in documents.items() if name in held_out]
    if 0.01 < sum(map(len, validation)) / sum(map(len, documents.values())) < 0.5:
        return [text for name, text in documents.items() if name not in held_out], validation
    tenths = [(text, len(text) * 9 // 10) for text in documents.values()]
    cuts = [(text, text.rfind("\n", 0, tenth) + 1 or tenth) for text, tenth in tenths]
    return [text[:cut] for text, cut in cuts], [text[cut:] for text, cut in cuts]


def pieces(text, bar):
    for i in range(0, len(text), PIECE):
        yield text[i : i + PIECE]
        bar.update(min(PIECE, len(text) - i))


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
    with tqdm(desc="counting words", unit="char", unit_scale=True, **BAR) as bar:
        words = (piece for text in texts for piece in pieces(text, bar))
        bpe.train_from_iterator(words, vocab_size=vocab_size - 1, buffer_size=64)  # pieces in memory at a time
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
    Nothing masks the boundaries: in training and evaluation, attention looks across them at the text before. What a
    mask would change was not measured.
    """
    stream, end = [], [np.array([tokenizer.eot_token])]
    with tqdm(desc="encoding", unit="char", unit_scale=True, **BAR) as bar:
        for text in texts:
            stream += end + [tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces(text, bar)]
    return torch.from_numpy(np.concatenate(stream + end, dtype=np.int64))


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


def sha256(documents):
    whole = hashlib.sha256()
    for text in documents.values():
        whole.update(text.encode())
    return whole.hexdigest()


def load_text(source, tokenizer, vocab_size, out=None):
    """Read, split and encode the text -> (tiktoken.Encoding, training tokens (n_token,), validation tokens (n_token,),
    what a run records of its text: a dict). ValueError for what cannot be read.

    source, out: see `read_documents`. tokenizer: a name and the largest vocab_size for `make_tokenizer`, or an
    Encoding.
    """
    documents = read_documents(source, out)
    record = {"source": source or "Python's standard library", "files": len(documents), "sha256": sha256(documents)}
    record["vocab_size"] = vocab_size  # as asked for: a short text may not have that many tokens
    parts = split_documents(documents)
    del documents  # of a large text, one copy is enough
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, parts[0], vocab_size)
    tokens, held_out = (encode(tokenizer, texts) for texts in parts)
    for name, texts, ids in zip(("train", "validation"), parts, (tokens, held_out), strict=True):
        record |= {f"{name}_bytes": sum(len(text.encode()) for text in texts), f"{name}_tokens": len(ids)}
    return tokenizer, tokens, held_out, record
