"""Your own text as a dataset folder.

    python data/text.py notes/ forum.jsonl.zst 'wiki/*.parquet' --out=data/mine
    python data/text.py stories.txt --separator='<|endoftext|>' --out=data/stories

A document is a file (.txt, .md; any other that is named itself), or with --separator what stands
between; a line of a .jsonl; a row of a .parquet. .gz and .zst are unpacked, folders searched.
Encodings are detected; files that are no text are skipped. No text is changed.

Dropped are documents that are empty, invalid (lone surrogates, 50,000 blanks in a row), or there
before: exactly, or nearly, by MinHash of their sequences of 5 words (of 32 bytes where words have
more than 20 on average, as in scripts without spaces). A document's SHA-256 says to which split it
belongs and where it stands there: other documents do not change that, and every prefix of a split
is a sample of it. A vocabulary is trained on documents of train only; pieces that no token crosses
are GPT-2's.

1 GB takes less than 2 GB of memory: texts wait in a file beside FOLDER, a document takes 1.5 kB.
Needs `pip install -r data/requirements-text.txt`.
"""
import argparse
import bisect
import codecs
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import tempfile
import zlib
from array import array
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import accumulate
from pathlib import Path

import numpy as np

from documents import PIECE, BuildError, Progress, find_files, read_documents
from shards import write_meta, write_shard
from token_tables import read_ranks, write_token_tables
from vocabulary import BOS_TEXT, PATTERN, as_file, default_vocab_size, find_ranks, train_ranks

ROOT = Path(__file__).resolve().parent.parent
BLANKS = re.compile(r"\s{50000}")       # tiktoken's splitting overflows its stack on more
GRAM, BYTE_GRAM = 5, 32                 # words, or bytes, in a sequence that MinHash compares
NUM_PERM, BANDS = 64, 8                 # find 77 % of pairs that are alike by 0.8, 99 % by 0.9
READ_PER_TOKEN = 8                      # bytes that are read for each of --max_tokens: more than
                                        # a token of 32,768 has in most languages
VOCABULARY_BYTES = 100_000_000          # of train, from the front, that a vocabulary is trained on
SHARD_TOKENS = 100_000_000
MAX_SOURCES = 1_000                     # more are no groups to evaluate by
FEW_TOKENS = 20_000                     # of val: its loss is noisy
SMALL = 8_000_000                       # bytes of files that one process is quickest with
DATASET_FILE = re.compile(r".+_(train|val|holdout)_\d+\.bin"
                          r"|meta\.json|ranks\.tiktoken|tokens\.npz")


class Corpus:
    """The documents that are kept, as UTF-8 in a file; memory has a few numbers of each."""
    def __init__(self, path):
        self.path = path
        self.file = open(path, "wb+")
        self.keys, self.ends, self.sources = array("Q"), array("Q", [0]), array("L")
        self.names = {}         # of sources, and their numbers

    def add(self, text, key, source):
        self.ends.append(self.ends[-1] + self.file.write(text.encode()))
        self.keys.append(key)
        self.sources.append(self.names.setdefault(source, len(self.names)))

    def size(self, i):
        """Bytes of document i."""
        return self.ends[i + 1] - self.ends[i]

    def text(self, i):
        self.file.seek(self.ends[i])
        return self.file.read(self.size(i)).decode()


# ---- many documents ----

def batches(items, size):
    """Lists of consecutive items, of PIECE bytes and little more by size(item)."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= PIECE:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def parallel(function, items, jobs):
    """(item, function(item)), in order, by `jobs` processes, which are given few items ahead."""
    if jobs == 1:
        yield from ((item, function(item)) for item in items)
        return
    # not forked: libraries have threads by now
    context, waiting = multiprocessing.get_context("spawn"), deque()
    with ProcessPoolExecutor(jobs, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > 2 * jobs:
                item, future = waiting.popleft()
                yield item, future.result()
        yield from ((item, future.result()) for item, future in waiting)


# ---- which documents are kept, and where ----

def sketch(data):
    """The RMinHash of the sequences in a document of UTF-8 `data`."""
    from rensa import RMinHash
    words, length = data.split(), GRAM
    hashes = np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
    if len(data) > 20 * len(words):
        hashes, length = np.frombuffer(data, np.uint8).astype(np.uint64), BYTE_GRAM
    length = min(length, len(hashes))
    num_grams = len(hashes) - length + 1
    grams = np.zeros(num_grams, np.uint64)
    for i in range(length):
        grams = grams * np.uint64(0x9E3779B97F4A7C15) + hashes[i:i + num_grams]
    minhash = RMinHash(NUM_PERM, 42)
    for start in range(0, num_grams, PIECE):
        minhash.update(grams[start:start + PIECE].view("V8").tolist())
    return minhash


def examine(documents, near):
    """Of each (text, source) why it is dropped, or (SHA-256 as a number, sketch or None)."""
    results = []
    for text, _ in documents:
        data = text.encode(errors="ignore")         # without lone surrogates, which JSON can write
        if not text or text.isspace():
            results.append("empty")
        elif data.decode() != text or BLANKS.search(text):
            results.append("invalid")
        else:
            key = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
            results.append((key, sketch(data) if near else None))
    return results


def split_of(key, args):
    """val has the lowest keys, holdout the highest."""
    place = key / 2 ** 64       # uniform in [0, 1]
    return "val" if place < args.val else "holdout" if place >= 1 - args.holdout else "train"


def collect(args, files, jobs, corpus, report):
    """Fill `corpus` with documents of the files, until train has enough for --max_tokens."""
    from rensa import RMinHashDeduplicator
    similar = RMinHashDeduplicator(args.near or 1.0, NUM_PERM, True, BANDS)
    seen, train_bytes, dropped = set(), 0, report["dropped"]
    work = batches(read_documents(files, args, report), lambda document: len(document[0]))
    examined = parallel(functools.partial(examine, near=args.near), work, jobs)
    for batch, results in examined:
        report["documents"] += len(batch)
        for (text, source), result in zip(batch, results):
            if isinstance(result, str):
                dropped[result] += 1
                continue
            key, minhash = result
            if key in seen:
                dropped["exact duplicates"] += 1
            elif minhash and not similar.add(str(len(seen)), minhash):
                dropped["near duplicates"] += 1
            else:
                corpus.add(text, key, source)
                if split_of(key, args) == "train":
                    train_bytes += corpus.size(len(corpus.keys) - 1)
            seen.add(key)
        if train_bytes > READ_PER_TOKEN * args.max_tokens:
            report["stopped"] = next(examined, None) is not None
            break
    corpus.file.flush()


def split_corpus(corpus, args):
    """{split: numbers of its documents, in the order of their keys}. BuildError if one is empty."""
    splits = {"train": [], "val": [], "holdout": []}
    for i in np.argsort(np.array(corpus.keys, np.uint64)).tolist():
        splits[split_of(corpus.keys[i], args)].append(i)
    if not all(splits.values()):
        counts = ", ".join(f"{split} {len(numbers)}" for split, numbers in splits.items())
        raise BuildError(f"too few documents for three splits by their hashes: {counts}; give more,"
                         r" cut text files (--separator='\n\n'), or raise --val and --holdout")
    return splits


# ---- tokens ----

@functools.cache
def load_encoding(path):
    import tiktoken
    ranks = {token: rank for rank, token in read_ranks(path).items()}
    return tiktoken.Encoding("text", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def encode(places, texts, ranks):
    """[(number, uint16 tokens [n], BOS first)] of (number, start, size) in the file `texts`."""
    encoding, documents = load_encoding(ranks), []
    with open(texts, "rb") as file:
        for number, start, size in places:
            file.seek(start)
            tokens = encoding.encode_ordinary(file.read(size).decode())
            documents.append((number, np.array([encoding.n_vocab, *tokens], np.uint16)))
    return documents


def encode_split(numbers, corpus, folder, jobs, max_tokens):
    """(number, tokens) of documents, in order; max_tokens: how many are wanted."""
    progress, size = Progress("encoding", 1), sum(map(corpus.size, numbers))
    read = num_tokens = 0
    places = ((i, corpus.ends[i], corpus.size(i)) for i in numbers)
    function = functools.partial(encode, texts=corpus.path, ranks=folder / "ranks.tiktoken")
    for batch, documents in parallel(function, batches(places, lambda place: place[2]), jobs):
        yield from documents
        read += sum(length for _, _, length in batch)
        num_tokens += sum(len(tokens) for _, tokens in documents)
        progress(max(read / size, num_tokens / max_tokens))


def group(documents, max_tokens):
    """Lists of (number, tokens), a shard each, of as many documents as max_tokens holds."""
    shard, in_shard, total = [], 0, 0
    for number, tokens in documents:
        total += len(tokens)
        if total > max_tokens:
            break
        if in_shard + len(tokens) > SHARD_TOKENS:
            yield shard
            shard, in_shard = [], 0
        shard.append((number, tokens))
        in_shard += len(tokens)
    if shard:
        yield shard


def write_split(split, documents, corpus, folder, max_tokens):
    """Write the shards of a split from (number, tokens) of its documents.

    Returns {key of a shard: (entry in meta.json, numbers of its documents)}.
    """
    written = {}
    for shard in group(documents, max_tokens):
        numbers, tokens = zip(*shard)
        key, bos = f"{split}_{len(written):06d}", int(tokens[0][0])
        path = folder / f"{folder.name}_{key}.bin"
        entry = write_shard(path, np.concatenate(tokens), bos + 1, bos)
        entry["text_bytes"] = sum(map(corpus.size, numbers))
        written[key] = entry, numbers
    if not written:
        raise BuildError(f"--max_tokens={max_tokens}: less than the first document has; raise it")
    return written


# ---- the folder ----

def train_vocabulary(vocab_size, corpus, numbers):
    """(name, ranks) of a BPE trained on the first of the documents; vocab_size 0: by all their
    bytes."""
    ends = list(accumulate(map(corpus.size, numbers)))
    front = numbers[:1 + bisect.bisect(ends, VOCABULARY_BYTES)]
    vocab_size = vocab_size or default_vocab_size(ends[-1])
    if ends[-1] > SMALL:
        print(f"training a vocabulary of {vocab_size:,} tokens", file=sys.stderr)
    ranks = train_ranks(map(corpus.text, front), vocab_size)
    return f"bpe-{len(ranks) + 1}", ranks


def build(args, files, folder, jobs):
    """Write the dataset into `folder`; returns (meta.json, tokens of each document of train)."""
    report = {"documents": 0, "dropped": Counter(), "encodings": Counter(), "skipped": [],
              "stopped": False}
    known = find_ranks(args.tokenizer) if args.tokenizer != "train" else None
    corpus = Corpus(folder.parent / ".texts")
    collect(args, files, jobs, corpus, report)
    splits = split_corpus(corpus, args)
    name, ranks = known or train_vocabulary(args.vocab_size, corpus, splits["train"])
    vocab_size = len(ranks) + 1
    (folder / "ranks.tiktoken").write_bytes(as_file(ranks))
    vocabulary = {rank: token for token, rank in ranks.items()}
    write_token_tables(folder, vocabulary, vocab_size, bos=vocab_size - 1)
    shards = {}
    for split, numbers in splits.items():
        most = args.max_tokens if split == "train" else math.inf
        documents = encode_split(numbers, corpus, folder, jobs, most)
        shards |= write_split(split, documents, corpus, folder, most)
    kept = sum(len(numbers) for _, numbers in shards.values())
    report["dropped"]["beyond --max_tokens"] = len(corpus.keys) - kept
    meta = {
        "splits": {key: entry for key, (entry, _) in shards.items()},
        "tokenizer": name, "vocab_size": vocab_size, "bos_id": vocab_size - 1,
        "bos_text": BOS_TEXT, "pattern": PATTERN, "ranks": "ranks.tiktoken",
        "ranks_sha256": hashlib.sha256(as_file(ranks)).hexdigest(),
        "source": "; ".join(args.paths), "licence": "unknown", "files": len(files), **report,
        "settings": settings_of(args)}
    if 1 < len(corpus.names) <= MAX_SOURCES:
        meta |= {"sources": list(corpus.names), "document_sources": {
            key: [corpus.sources[i] for i in numbers] for key, (_, numbers) in shards.items()}}
    return meta


def settings_of(args):
    """What decides what is in the folder, beside the texts."""
    return {name: value for name, value in vars(args).items()
            if name not in ("out", "jobs", "overwrite")}


def check_out(out, settings, overwrite):
    """meta.json of the dataset in `out`, which is to be replaced; {} if there is none."""
    if not out.exists():
        return {}
    names = [path.name for path in out.iterdir()] if out.is_dir() else [out.name]
    others = [name for name in names if not DATASET_FILE.fullmatch(name)]
    if others:
        raise BuildError(f"{out}: {others[0]} there is of no dataset; name another --out=")
    path = out / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        meta = {}
    if names and meta.get("settings") != settings and not overwrite:
        raise BuildError(f"{out}: holds another dataset; name another --out=, or --overwrite it")
    return meta


def make(args):
    """Build beside --out, and put it there when it is whole."""
    out = args.out.expanduser().resolve()
    before = check_out(out, settings_of(args), args.overwrite)
    files = find_files(args.paths)
    jobs = args.jobs if sum(path.stat().st_size for path, _ in files) > SMALL else 1
    beside = next(folder for folder in out.parents if folder.exists())
    with tempfile.TemporaryDirectory(dir=beside, prefix=".text_") as work:
        # no _ in names but where train_gpt.py wants it, no . as in those of other files here
        folder = Path(work, re.sub("[^A-Za-z0-9-]+", "-", out.name))
        folder.mkdir()
        meta = build(args, files, folder, jobs)
        if before.get("splits") == meta["splits"] and "baseline" in before:
            meta["baseline"] = before["baseline"]       # curves measured on the same shards
        write_meta(folder, meta)
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            out.rename(Path(work, ".before"))
        folder.rename(out)
    summarize(out, meta)


def count_of(meta, split, what):
    return sum(entry[what] for key, entry in meta["splits"].items() if key.startswith(split))


def summarize(out, meta):
    """Print what there is, of what, and what trains on it."""
    for split in ("train", "val", "holdout"):
        documents, tokens, size = (count_of(meta, split, what)
                                   for what in ("documents", "tokens", "text_bytes"))
        print(f"{split:9} {documents:9,} documents {tokens:13,} tokens {size:14,} bytes,"
              f" {size / tokens:.2f} a token")
    dropped = [f"{number:,} {why}" for why, number in meta["dropped"].items() if number]
    print(f"dropped   of {meta['documents']:,} documents: {', '.join(dropped) or 'none'}")
    encodings = [f"{number:,} {name}" for name, number in meta["encodings"].items()]
    encodings += [f"{len(meta['skipped']):,} skipped, which are no text"] * bool(meta["skipped"])
    print(f"files     {meta['files']:,}: {', '.join(encodings)}")
    print(f"tokenizer {meta['tokenizer']}, {meta['vocab_size']:,} tokens")
    if meta["stopped"]:
        print("note      not all was read: the first files have enough for --max_tokens")
    if meta["vocab_size"] < meta["settings"]["vocab_size"]:
        print("note      train is too short for more tokens")
    if count_of(meta, "val", "tokens") < FEW_TOKENS:
        print(f"note      val has less than {FEW_TOKENS:,} tokens, so its loss is noisy: give more"
              " text, or raise --val and --holdout")
    place = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    print(f"folder    {out}\n\ntrain on it, with settings that fit it and the time that you have:\n"
          f"    ./run.sh --track=auto --dataset={shlex.quote(str(place))} --minutes=60")


def parse(argv):
    parser = argparse.ArgumentParser("text.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message}; see --help\n")
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="files, folders, globs")
    add("--out", type=Path, required=True, metavar="FOLDER", help="to make")
    add("--overwrite", action="store_true", help="another dataset that is there")
    add("--field", default="text", help="of JSON and parquet [%(default)s]")
    add("--separator", default="", metavar="TEXT", help=r"in text files; \n is the end of a line")
    add("--encoding", default="", help="of text files [detected]")
    add("--val", type=float, default=0.05, metavar="PART", help="of documents [%(default)s]")
    add("--holdout", type=float, default=0.05, metavar="PART", help="[%(default)s]")
    add("--near", type=float, default=0.8, metavar="JACCARD",
        help="similarity of near duplicates; 0: they stay [%(default)s]")
    add("--tokenizer", default="train", help="train, bytes, gpt2, or a file of ranks in tiktoken's"
        " format [%(default)s]")
    add("--vocab_size", type=int, default=0, metavar="N", help="of --tokenizer=train [1 per 2,000"
        " bytes of train, as a power of two, 512 to 32,768]")
    add("--max_tokens", type=int, default=100_000_000, metavar="N", help="of train [%(default)s]")
    add("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes [%(default)s]")
    args = parser.parse_args(argv)
    args.separator = args.separator.replace(r"\n", "\n").replace(r"\t", "\t")
    if not 0 < args.val < 1 or not 0 < args.holdout < 1 - args.val or not 0 <= args.near <= 1:
        parser.error("--val and --holdout must be above 0 and together below 1, --near from 0 to 1")
    if args.vocab_size and (args.tokenizer != "train" or not 258 <= args.vocab_size <= 1 << 16):
        parser.error("--vocab_size must be from 258 to 65536, and of --tokenizer=train")
    if args.max_tokens < 2 or args.jobs < 1:
        parser.error("--max_tokens must be 2 or more, --jobs 1 or more")
    try:
        codecs.lookup(args.encoding or "utf-8")
    except LookupError as error:
        parser.error(str(error))
    return args


def main(argv=None):
    args = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # which cleans up
    try:
        make(args)
        return 0
    except ImportError as error:
        message = f"{error}: pip install -r data/requirements-text.txt"
    except (BuildError, OSError) as error:
        message = str(error)
    except (BrokenProcessPool, MemoryError):
        message = "out of memory, or a process was killed; lower --jobs"
    except KeyboardInterrupt:
        print("error: stopped; nothing was written", file=sys.stderr)
        return 130
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
