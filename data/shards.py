"""The shard format that every data script writes and train_gpt.py reads.

A shard is llm.c's and modded-nanogpt's file: int32[256] header, then uint16 tokens, each document
preceded by its BOS. header[0] = 20240520, header[1] = 1, header[2] = number of tokens,
header[3] = vocabulary size and header[4] = BOS id (both 0 in files of other projects: GPT-2's).

A dataset is one folder: `<name>_<split>_<index>.bin` files, with split one of train, val, holdout,
and `meta.json`, which says for each `<split>_<index>` its tokens, documents, text_bytes (UTF-8 bytes
of the text, for bits per byte; null if unknown) and sha256, and for the dataset its source, licence,
tokenizer, vocab_size, bos_id and, if the tokenizer's ranks lie beside the shards, their file name.
"""
import hashlib
import json
import os
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
GPT2_VOCAB, GPT2_BOS = 50257, 50256


def read_shard(path):
    """Return (tokens: uint16 memmap [n], vocab_size, bos_id). ValueError if it is no such shard."""
    path = Path(path)
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if len(header) < HEADER_INTS or header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(f"{path}: not a token shard (wrong magic or version)")
    n, size = int(header[2]), path.stat().st_size
    if size != 4 * HEADER_INTS + 2 * n:
        raise ValueError(f"{path}: header says {n} tokens, the file holds {(size - 1024) / 2:g}")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS, shape=(n,))
    return tokens, int(header[3]) or GPT2_VOCAB, int(header[4]) or GPT2_BOS


def write_shard(path, tokens, vocab_size, bos_id):
    """Write uint16 `tokens` [n] atomically; return {tokens, documents, sha256} for meta.json."""
    path, tokens = Path(path), np.ascontiguousarray(tokens, dtype="<u2")
    if len(tokens) == 0 or tokens[0] != bos_id or int(tokens.max()) >= vocab_size:
        raise ValueError(f"{path}: tokens must begin with BOS {bos_id} and be below {vocab_size}")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:5] = MAGIC, VERSION, len(tokens), vocab_size, bos_id
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    with open(beside, "wb") as file:
        file.write(header.tobytes())
        file.write(tokens.tobytes())
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sha256 = hashlib.sha256(header.tobytes() + tokens.tobytes()).hexdigest()
    documents = int((tokens == bos_id).sum())
    return {"tokens": len(tokens), "documents": documents, "sha256": sha256}


def write_meta(folder, meta):
    """Write `meta` (dict) to folder/meta.json atomically."""
    beside = Path(folder) / "meta.json.tmp"
    beside.write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(Path(folder) / "meta.json")
