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
    """(tokens: uint16 memory map [n], vocab_size, bos_id). ValueError if the file is not sound."""
    path = Path(path)
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if len(header) < HEADER_INTS or header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(f"{path}: not a token shard of version {VERSION}")
    count, *ids = (int(number) for number in header[2:5])
    vocab_size, bos_id = ids if ids[0] else (GPT2_VOCAB, GPT2_BOS)
    held = (path.stat().st_size - 4 * HEADER_INTS) / 2
    if count < 2 or held != count:
        raise ValueError(f"{path}: the header says {count} tokens, the file holds {held:g}")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS, shape=(count,))
    if tokens.max() >= vocab_size:
        raise ValueError(f"{path}: token {tokens.max()} is not below {vocab_size}")
    return tokens, vocab_size, bos_id


def write_whole(path, write):
    """Let `write` fill a file beside `path`, flush it to the disk, then rename it.

    So `path` is never half there, whatever happens; of a failure nothing is left.
    """
    beside = path.with_suffix(".tmp")
    try:
        write(beside)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_shard(path, tokens, vocab_size, bos_id):
    """Write `tokens` [n], whole numbers, atomically; return {tokens, documents, sha256} of them.

    ValueError, before anything is written, if a shard cannot hold them as they are.
    """
    path = Path(path)
    tokens = np.asarray(tokens)
    if not 0 < vocab_size <= 1 << 16 or not 0 <= bos_id < vocab_size:
        raise ValueError(f"{path}: a vocabulary of {vocab_size} with BOS {bos_id}; at most 65,536"
                         " tokens, BOS among them, fit into 16 bits")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"{path}: tokens are {tokens.dtype} {list(tokens.shape)}; must be whole"
                         " numbers in one dimension")
    if len(tokens) < 2 or tokens[0] != bos_id or tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(f"{path}: tokens must be two or more, begin with BOS {bos_id} and be from"
                         f" 0 to {vocab_size - 1}")
    tokens = np.ascontiguousarray(tokens, dtype="<u2")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:5] = MAGIC, VERSION, len(tokens), vocab_size, bos_id

    def write(beside):
        with open(beside, "wb") as file:        # without a copy of all the tokens
            header.tofile(file)
            tokens.tofile(file)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, write)
    digest = hashlib.sha256(header)
    digest.update(tokens)
    return {"tokens": len(tokens), "documents": int((tokens == bos_id).sum()),
            "sha256": digest.hexdigest()}


def write_meta(folder, meta):
    """Write `meta` (dict) to folder/meta.json atomically."""
    text = json.dumps(meta, indent=1, ensure_ascii=False) + "\n"
    write_whole(Path(folder) / "meta.json",
                lambda beside: beside.write_text(text, encoding="utf-8"))
