"""The texts that the experiments train on, as tokens in runs/.

    python -m experiments.texts linux FOLDER              reads and encodes a text: runs/linux.pt
    python -m experiments.texts pack linux --tokens 66    its first 66 million tokens, to carry elsewhere: runs/linux.xz

"novels": English novels of 1839 to 1929, of which the held-out part is whole books that training never sees. FOLDER is
the folder corpus/ of a clone of github.com/computationalstylistics/100_english_novels, or holds novels_train.txt and
novels_val.txt (or .txt.xz).

"linux": the C files of the Linux kernel. FOLDER is its unpacked source, of the release 6.1.192 from kernel.org or from
Debian's package linux-source-6.1. The text is GPL-2.0: measure with it, and pass on none of it with this repository.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import lzma
import re
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from environment import write_atomically
from text import encode, make_tokenizer, tokenizer_to_json

ROOT = Path(__file__).parent
RUNS = ROOT.parent / "runs"
SHA256 = {  # of the training and of the held-out text that results/ is about
    "novels": [
        "fae1a2873b385eb1447c0843ec11af368c6cf82db0f73faa1c3e67e953666852",
        "cdc7881b17436643220a1964772f3d3f84ccd59ad45058e7268ffc06f5a16fda",
    ],
    "linux": [  # 6.1.192
        "89fac1228c799ff1e0579fee286fc7a5defae3fb53e484d191ef097a4b920dfd",
        "5ff38b8c8ba006a59e29abed1618218bc7da343f75c89c84df91d468d2849943",
    ],
}


def book_text(folder, part):
    """The text of "train" or "val": novels_PART.txt or .txt.xz in folder; else the books in it that results/novels.txt
    names for this part, in its order, without byte-order marks, carriage returns, spaces at line ends and runs of blank
    lines. ValueError if there is neither."""
    whole = Path(folder, f"novels_{part}.txt")
    if whole.exists():
        return whole.read_bytes().decode()
    if whole.with_suffix(".txt.xz").exists():
        return lzma.decompress(whole.with_suffix(".txt.xz").read_bytes()).decode()
    listed = [line.split() for line in (ROOT / "results" / "novels.txt").read_text().splitlines()]
    text = ""
    for book in (whole.with_name(name) for of, name in listed if of == part):
        if not book.exists():
            raise ValueError(f"there is neither {whole} nor {book.name} beside it")
        lines = book.read_bytes().decode().replace("\ufeff", "").replace("\r", "")
        text += re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", lines)).strip() + "\n\n"
    return text


def novels(folder):
    """-> (training texts, held-out texts, version); all books of a part are one text."""
    return [book_text(folder, "train")], [book_text(folder, "val")], "100 English novels"


def linux(folder):
    """-> (training texts, held-out texts, version), a text a file: every *.c under 400,000 bytes that is UTF-8 without
    NUL, ordered by the SHA-256 of its path. The same hash holds out one file in 128, so that a prefix of the training
    text is a sample of the whole kernel and another release holds out the same files. ValueError for another folder."""
    root, parts = Path(folder), ([], [])
    head = (root / "Makefile").read_text()[:1000] if (root / "Makefile").is_file() else ""
    version = re.findall(r"^(?:VERSION|PATCHLEVEL|SUBLEVEL) = (\d+)$", head, re.MULTILINE)
    if len(version) != 3:
        raise ValueError(f"{folder} is no Linux source: there is no Makefile with VERSION, PATCHLEVEL and SUBLEVEL")
    paths = (path for path in root.rglob("*.c") if path.is_file() and not path.is_symlink())
    hashed = sorted((hashlib.sha256(path.relative_to(root).as_posix().encode()).digest(), path) for path in paths)
    for digest, path in tqdm(hashed, "reading", unit="file"):
        raw = path.read_bytes()
        if len(raw) < 400_000 and b"\0" not in raw:
            with contextlib.suppress(UnicodeDecodeError):
                parts[digest[0] < 2].append(raw.decode())
    return *parts, "Linux " + ".".join(version)


TEXTS = {"novels": novels, "linux": linux}


def beginning(texts, n_char):
    """The first of the texts, at least one, up to and with the one that reaches n_char characters."""
    starts = itertools.accumulate(map(len, texts), initial=0)
    return [text for text, start in zip(texts, starts, strict=False) if start < n_char]


def make(name, folder):
    """Read and encode a text and write runs/NAME.pt -> a dict: "version"; "files", "bytes", "sha256", each of the
    training and of the held-out text; "tokenizer", of 4,096 tokens, trained on the first 64 million characters;
    "tokens" and "held_out", (n_token,) int16, <|endoftext|> around files. ValueError if the folder does not hold it."""
    *parts, version = TEXTS[name](folder)
    if not all(parts):
        raise ValueError(f"there is too little text in {folder}: {len(parts[0])} and {len(parts[1])} files")
    data = {"version": version, "files": [len(files) for files in parts]}
    raw = ["".join(files).encode() for files in parts]
    data |= {"bytes": [len(x) for x in raw], "sha256": [hashlib.sha256(x).hexdigest() for x in raw]}
    tokenizer = make_tokenizer("bpe", beginning(parts[0], 64_000_000), 4096)
    data["tokenizer"] = tokenizer_to_json(tokenizer)
    for part, files in zip(("tokens", "held_out"), parts, strict=True):
        data[part] = encode(tokenizer, files).to(torch.int16)
    RUNS.mkdir(exist_ok=True)
    write_atomically(RUNS / f"{name}.pt", partial(torch.save, data))
    return data


def pack(name, n_token):
    """Write runs/NAME.xz: runs/NAME.pt with the first n_token training tokens only, compressed -> the dict in it."""
    data = load(name)
    if n_token > len(data["tokens"]):
        raise ValueError(f"{name} has {len(data['tokens']):,} training tokens, not {n_token:,}")
    data["tokens"] = data["tokens"][:n_token].clone()
    file = io.BytesIO()
    torch.save(data, file)
    # tokens are pairs of bytes, and files that are alike lie far apart: 0.4 bytes a token, not 0.6
    options = {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2**28, "lp": 1, "pb": 1}
    packed = lzma.compress(file.getvalue(), filters=[options])
    write_atomically(RUNS / f"{name}.xz", lambda path: path.write_bytes(packed))
    return data


def load(name, folder=None):
    """The dict of `make`, from runs/NAME.pt or else runs/NAME.xz; where there is neither, made from folder.
    ValueError if there is no folder either."""
    whole, packed = RUNS / f"{name}.pt", RUNS / f"{name}.xz"
    if not whole.exists() and not packed.exists():
        if not folder:
            raise ValueError(f"there is neither {whole} nor {packed.name} beside it: see texts.py about its FOLDER")
        return make(name, folder)
    if folder:
        print(f"note: {folder} is not read, its tokens are taken to be those in {whole if whole.exists() else packed}")
    file = whole if whole.exists() else io.BytesIO(lzma.decompress(packed.read_bytes()))
    return torch.load(file, weights_only=True)


def main():
    parser = argparse.ArgumentParser(None, None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in TEXTS:
        commands.add_parser(name).add_argument("folder", metavar="FOLDER")
    command = commands.add_parser("pack")
    command.add_argument("text", choices=TEXTS)
    command.add_argument("--tokens", type=float, required=True, metavar="N", help="millions of training tokens to keep")
    args = parser.parse_args()
    try:
        if args.command == "pack":
            data = pack(args.text, round(args.tokens * 1e6))
        else:
            data = make(args.command, args.folder)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(data["version"])
    for i, part in enumerate(("tokens", "held_out")):
        print(f"{part:9} {len(data[part]):12,} of {data['bytes'][i]:12,} bytes in {data['files'][i]:,} files, ", end="")
        print(f"SHA-256 of the text {data['sha256'][i]}")


if __name__ == "__main__":
    main()
