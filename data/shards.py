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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
GPT2_VOCAB, GPT2_BOS = 50257, 50256


class UserError(ValueError):
    """Something a person can mend: what, where, what to do, in one line. Exit code 2."""


def refuse(problems):
    """UserError with the message of the first of `problems`, (is_wrong, message), that is wrong."""
    for is_wrong, message in problems:
        if is_wrong:
            raise UserError(message)


def read_shard(path, vocab_size=None, sha256=None, begins_with_bos=False):
    """(tokens: uint16 memory map [n], vocab_size, bos_id, SHA-256). UserError if not sound.

    vocab_size, sha256: what they must be; begins_with_bos: no document may begin before the file.
    """
    path, again = Path(path), "fetch or build the dataset again"
    try:
        header, size = np.fromfile(path, dtype="<i4", count=HEADER_INTS), path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    refuse([(len(header) < HEADER_INTS or header[0] != MAGIC,
             f"{path}: not a token shard (wrong magic); {again}")])
    count, vocab, bos = int(header[2]), int(header[3]) or GPT2_VOCAB, int(header[4]) or GPT2_BOS
    held = (size - 4 * HEADER_INTS) / 2
    refuse([(header[1] != VERSION, f"{path}: shard version {header[1]}, not {VERSION}; {again}"),
            (count < 2 or held != count,
             f"{path}: the header says {count} tokens, the file holds {held:g}; {again}"),
            (vocab_size not in (None, vocab),
             f"{path}: vocabulary of {vocab}; set --vocab_size={vocab}")])
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS, shape=(count,))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    refuse([(tokens.max() >= vocab, f"{path}: token {tokens.max()} is not below {vocab}; {again}"),
            (begins_with_bos and tokens[0] != bos,
             f"{path}: must begin with BOS {bos}, not {tokens[0]}; {again}"),
            (sha256 not in (None, digest), f"{path}: its SHA-256 is not meta.json's; {again}")])
    return tokens, vocab, bos, digest


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
        folder = os.open(path.parent, os.O_RDONLY)      # the new name, too
        os.fsync(folder)
        os.close(folder)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path, value):
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_shard(path, tokens, vocab_size, bos_id):
    """Write uint16 `tokens` [n] atomically; return {tokens, documents, sha256} for meta.json."""
    path, tokens = Path(path), np.ascontiguousarray(tokens, dtype="<u2")
    if len(tokens) == 0 or tokens[0] != bos_id or int(tokens.max()) >= vocab_size:
        raise ValueError(f"{path}: tokens must begin with BOS {bos_id} and be below {vocab_size}")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:5] = MAGIC, VERSION, len(tokens), vocab_size, bos_id

    def write(beside):
        with open(beside, "wb") as file:
            file.write(header.tobytes())
            file.write(tokens.tobytes())

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, write)
    sha256 = hashlib.sha256(header.tobytes() + tokens.tobytes()).hexdigest()
    documents = int((tokens == bos_id).sum())
    return {"tokens": len(tokens), "documents": documents, "sha256": sha256}


def write_meta(folder, meta):
    """Write `meta` (dict) to folder/meta.json atomically."""
    write_json(Path(folder) / "meta.json", meta)


def split_documents(tokens, bos):
    """[n] -> list of views, one a document, each beginning with BOS."""
    starts = np.flatnonzero(tokens == bos)
    return [tokens[a:b] for a, b in zip(starts, [*starts[1:], len(tokens)])]


def cut_documents(documents, budget):
    """The first documents, the last one shortened, that make exactly `budget` tokens."""
    kept, total = [], 0
    for document in documents:
        if total >= budget:
            break
        kept.append(document[:budget - total])
        total += len(kept[-1])
    return kept


@dataclass
class Dataset:
    """Lists of documents (uint16 views that begin with BOS) and the folder's meta.json."""
    train: list
    selection: list
    val: list
    holdout: list
    bos: int
    meta: dict
    hashes: dict                # file name -> SHA-256
    bytes_per_token: dict       # split -> UTF-8 bytes of text a token, 0 if unknown
    notes: list

    def evaluated(self):
        """{split: documents} of what members are scored on."""
        splits = {"selection": self.selection, "val": self.val, "holdout": self.holdout}
        return {split: documents for split, documents in splits.items() if documents}


def load_dataset(folder, c):
    """Read a dataset, cut selection and budget, check that no val document is in train.

    c: has train_tokens, selection_tokens, eval_tokens and vocab_size, as train_gpt.Config.
    """
    script = folder.name if folder.name in ("sample", "fineweb") else "YOUR_SCRIPT"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        listed = {key: (facts.get("sha256"), int(facts.get("text_bytes") or 0))
                  for key, facts in meta.get("splits", {}).items()}
        for curve in ("one_epoch", "tuned"):
            for tokens, loss in (meta.get("baseline") or {}).get(curve, []):
                float(tokens), float(loss)
    except FileNotFoundError:
        meta, listed = {}, {}
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{folder / 'meta.json'}: cannot be read ({error})") from None
    splits, hashes, per_token, bos = {}, {}, {}, None
    for split in ("train", "val", "holdout"):
        documents, tokens, text_bytes = [], 0, 0
        for path in sorted(folder.glob(f"*_{split}_*.bin")):
            if tokens >= c.train_tokens and split == "train":
                break
            sha256, size = listed.get(f"{split}_{path.stem.rpartition('_')[2]}", (None, 0))
            before = bos
            shard, _, bos, hashes[path.name] = read_shard(path, c.vocab_size, sha256, True)
            refuse([(before not in (None, bos), f"{path}: BOS {bos}, and {before} in the files"
                     " before; fetch or build the dataset again")])
            documents += split_documents(shard, bos)
            tokens, text_bytes = tokens + len(shard), text_bytes + size
        refuse([(not documents, f"{folder}: no {split} shards; get them with: python"
                 f" data/{script}.py"),
                (split == "train" and tokens < c.train_tokens, f"{folder}: {tokens:,} tokens in"
                 f" train, fewer than --train_tokens={c.train_tokens}; get more or lower it")])
        splits[split], per_token[split] = documents, text_bytes / tokens
    held_out = {document.tobytes() for document in splits["val"] + splits["holdout"]}
    train = [document for document in splits["train"] if document.tobytes() not in held_out]
    lost = len(splits["train"]) - len(train)
    # a few exact duplicates are normal in web text, more mean that the splits are wrong
    refuse([(lost > 0.005 * len(held_out), f"{folder}: {lost} documents of train are also in val or"
             " holdout; the splits overlap, build the dataset again")])
    notes = [f"data      {lost} documents of train left out: val or holdout has them"][:lost]
    for split in ("val", "holdout") if c.eval_tokens else ():
        splits[split] = cut_documents(splits[split], c.eval_tokens)
    train, selected = cut_documents(train, c.train_tokens), 0
    while sum(map(len, train[:selected])) < c.selection_tokens:
        selected += 1
    refuse([(selected >= len(train), f"--selection_tokens={c.selection_tokens} takes all documents"
             " of train; lower it")])
    return Dataset(train[selected:], train[:selected], splits["val"], splits["holdout"], bos,
                   meta, hashes, per_token, notes)
