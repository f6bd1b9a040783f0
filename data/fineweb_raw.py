"""FineWeb's text as GPT-2's tokens: what `python data/fineweb.py --from_raw` cuts.

The hub's parquet files are read from the first one on, a row group after the other (of 1,000
documents), and of each only the column of the text travels. A document becomes BOS and its ordinary
encoding; batches of documents go to processes on all cores, and their tokens come back in order.
So memory has the batches that are on their way, and nothing is read that is not wanted soon.
"""
import functools
import os
import tempfile
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from pathlib import Path

import numpy as np
import tiktoken     # noqa: F401 (text.py imports it later; what is missing is said at once)
from pyarrow.parquet import ParquetFile

from documents import BuildError
from text import load_encoding, parallel
from vocabulary import as_file

FOLDER = "sample/10BT"          # in the dataset on the hub
BATCH = 100         # documents, some 300 kB, that a process is given at a time


def open_hub(repo):
    """(the hub's file system, its folder of parquet files), of the dataset's newest commit."""
    from huggingface_hub import HfApi, HfFileSystem     # slow, and of no use to the processes
    commit = HfApi().dataset_info(repo).sha
    return HfFileSystem(), f"datasets/{repo}@{commit}/{FOLDER}"


def list_files(files, folder):
    """Paths of the parquet files in `folder` of the file system `files`, in the dataset's order."""
    try:
        paths = [path for path in files.ls(folder, detail=False) if path.endswith(".parquet")]
    except FileNotFoundError:
        paths = []
    if not paths:
        raise BuildError(f"{folder}: no parquet files there; check --repo=")
    return sorted(paths)


def read_metadata(files, path):
    with files.open(path, "rb", cache_type="none") as file:
        table = ParquetFile(file)
        if "text" not in table.schema_arrow.names:
            raise BuildError(f"{path}: no column 'text' (it has"
                             f" {', '.join(table.schema_arrow.names)}); check --repo=")
        return table.metadata


def read_row_group(files, path, metadata, group):
    """The texts of a row group, as an array of pyarrow. Opens the file anew: that asks the hub
    nothing, and after a failure no state is left."""
    with files.open(path, "rb", cache_type="none") as file:     # without it more is read, ahead
        table = ParquetFile(file, metadata=metadata)
        return table.read_row_group(group, columns=["text"]).column("text")


def read_batches(files, folder, retry):
    """Lists of at most BATCH consecutive texts, of all files."""
    for path in retry(folder, lambda: list_files(files, folder)):
        metadata = retry(path, lambda: read_metadata(files, path))
        for group in range(metadata.num_row_groups):
            texts = retry(path, lambda: read_row_group(files, path, metadata, group))
            for start in range(0, len(texts), BATCH):
                yield texts[start:start + BATCH].to_pylist()


def encode(texts, ranks):
    """uint16 [n], the documents end to end; BOS is the id behind the last of the file `ranks`."""
    encoding = load_encoding(ranks)
    documents = ([encoding.n_vocab, *encoding.encode_ordinary(text or "")] for text in texts)
    return np.fromiter(chain.from_iterable(documents), np.uint16)


def read_tokens(files, folder, vocabulary, retry):
    """uint16 [n] of each batch of documents, in order, until the text ends.

    vocabulary: the bytes of each token but BOS. retry(what, action): action's result, after as
    many tries as a failure deserves.
    """
    with tempfile.TemporaryDirectory(prefix="fineweb_") as work:
        ranks = Path(work) / "ranks.tiktoken"
        ranks.write_bytes(as_file({token: i for i, token in enumerate(vocabulary)}))
        function = functools.partial(encode, ranks=ranks)
        batches = read_batches(files, folder, retry)
        try:
            for _, tokens in parallel(function, batches, os.cpu_count()):
                yield tokens
        except BrokenProcessPool:
            raise BuildError("out of memory, or a process was killed; run again, which starts"
                             " over") from None
