"""The texts that the experiments train on, as tokens in runs/.

"novels": English novels of 1839 to 1929, of which validation holds whole books that training never sees. Their FOLDER
is the folder corpus/ of a clone of github.com/computationalstylistics/100_english_novels, or holds novels_train.txt and
novels_val.txt (or .txt.xz).
"""

import hashlib
import lzma
import re
from functools import partial
from pathlib import Path

import torch

from train_small import encode, make_tokenizer, tokenizer_to_json, write_atomically

ROOT = Path(__file__).parent
TOKENS = ROOT.parent / "runs" / "novels.pt"
SHA256 = [  # of the two texts that results/ is about
    "fae1a2873b385eb1447c0843ec11af368c6cf82db0f73faa1c3e67e953666852",
    "cdc7881b17436643220a1964772f3d3f84ccd59ad45058e7268ffc06f5a16fda",
]


def novels(folder, part):
    """The text of "train" or "val": novels_PART.txt or .txt.xz in folder; else the books in it that results/novels.txt
    names for this part, in its order, without byte-order marks, carriage returns, spaces at line ends and runs of blank
    lines. SystemExit if there is neither."""
    whole = Path(folder or ".", f"novels_{part}.txt")
    if whole.exists():
        return whole.read_bytes().decode()
    if whole.with_suffix(".txt.xz").exists():
        return lzma.decompress(whole.with_suffix(".txt.xz").read_bytes()).decode()
    listed = [line.split() for line in (ROOT / "results" / "novels.txt").read_text().splitlines()]
    text = ""
    for book in (whole.with_name(name) for side, name in listed if side == part):
        if not book.exists():
            raise SystemExit(f"error: there is neither {whole} nor {book.name} beside it: see --help about --data")
        lines = book.read_bytes().decode().replace("\ufeff", "").replace("\r", "")
        text += re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", lines)).strip() + "\n\n"
    return text


def corpus(folder):
    """-> {"tokens", "held_out" (n_token,) int16, "tokenizer", "sha256", "bytes"}, kept in runs/novels.pt."""
    if not TOKENS.exists():
        texts = [novels(folder, part) for part in ("train", "val")]
        tokenizer = make_tokenizer("bpe", texts[:1], 4096)
        tokens, held_out = (encode(tokenizer, [text]).to(torch.int16) for text in texts)
        raw = [text.encode() for text in texts]
        data = {"tokens": tokens, "held_out": held_out, "tokenizer": tokenizer_to_json(tokenizer)}
        data |= {"sha256": [hashlib.sha256(x).hexdigest() for x in raw], "bytes": [len(x) for x in raw]}
        TOKENS.parent.mkdir(exist_ok=True)
        write_atomically(TOKENS, partial(torch.save, data))
    elif folder:
        print(f"note: {folder} is not read, its tokens are taken to be those in {TOKENS}")
    return torch.load(TOKENS, weights_only=True)
