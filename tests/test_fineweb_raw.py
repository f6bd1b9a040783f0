"""data/fineweb.py --from_raw, without network: stand-ins of the hub have small parquet files.

    python -m pytest tests/test_fineweb_raw.py
"""
import base64
import io
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken

import fineweb
from helpers import ROOT
from shards import GPT2_BOS as BOS, read_shard
from token_tables import read_ranks

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
httpx2 = pytest.importorskip("httpx2")
huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
# Its log goes to what is stderr when it is imported, and that of a test is closed after it.
pytest.importorskip("huggingface_hub.hf_file_system")
fineweb_raw = pytest.importorskip("fineweb_raw")
NAMES = "000_00000.parquet", "000_00001.parquet", "001_00000.parquet"
ROWS, GROUP, BATCH = 60, 20, 7      # documents in a file, in a row group, for a process at a time
BUDGETS = 600, 4500, 500            # of val, train, holdout: end in the second file
PUBLISHED = (r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"""
             r"""|\s+""")           # of GPT-2's encoder.py


def make_vocabulary():
    """The bytes of each token of a vocabulary of GPT-2's size that begins with data/prose's."""
    prose = read_ranks(ROOT / "data/prose/ranks.tiktoken")
    return [prose.get(token) or b"\xff" * (2 + token % 5) + token.to_bytes(2, "big")
            for token in range(BOS)]


def make_documents():
    """Texts of all files, of 0 to 40 words."""
    random = np.random.default_rng(0)
    words = ["the", "It's", "caf\u00e9", "\u4e2d\u6587", "10,000", "<|endoftext|>", "\n\n", "  ",
             "people", "\U0001f600", "don't", "...", "nothing", "said"]
    return [" ".join(random.choice(words, random.integers(0, 41)))
            for _ in range(ROWS * len(NAMES))]


def write_inputs(folder, ranks, vocab_size, bos):
    """In place of write_token_tables, which takes seconds: what it was called with."""
    (Path(folder) / "tokens.npz").write_text(repr((ranks, vocab_size, bos)))


VOCABULARY, DOCUMENTS = make_vocabulary(), make_documents()


@pytest.fixture(scope="module")
def documents_tokens():
    """The tokens of each document, BOS first."""
    ranks = {token: i for i, token in enumerate(VOCABULARY)}
    encoding = tiktoken.Encoding("test", pat_str=PUBLISHED, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": BOS})
    return [[BOS] + encoding.encode(text, disallowed_special=()) for text in DOCUMENTS]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A folder of the parquet files, the ranks, and what is no parquet file."""
    folder = tmp_path_factory.mktemp("store")
    for i, name in enumerate(NAMES):
        texts = DOCUMENTS[i * ROWS:(i + 1) * ROWS]
        table = pa.table({"id": [f"{name} {j}" * 50 for j in range(ROWS)], "text": texts,
                          "url": ["https://example.com" * 20] * ROWS})
        pq.write_table(table, folder / name, row_group_size=GROUP, compression="zstd")
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(VOCABULARY)]
    (folder / "gpt2.tiktoken").write_bytes(b"".join(lines))
    return folder


def find_texts(store):
    """{(name, start, size) of what a read of a row group's texts asks for: (file, row group)}."""
    places = {}
    for i, name in enumerate(NAMES):
        metadata = pq.read_metadata(store / name)
        for group in range(metadata.num_row_groups):
            column = metadata.row_group(group).column(1)
            start = column.dictionary_page_offset or column.data_page_offset
            places[name, start, column.total_compressed_size] = i, group
    return places


class Files:
    """In place of the hub's file system: lists and opens local files, and notes what is read."""
    def __init__(self, folder):
        self.folder, self.places = folder, find_texts(folder)
        self.log = []       # (name, start, size) of each read
        self.faults = {}    # {(file, row group): exceptions to raise, one a read}

    def ls(self, folder, detail):
        assert not detail
        return [str(path) for path in sorted(self.folder.iterdir(), reverse=True)]

    def open(self, path, mode, cache_type):
        assert (mode, cache_type) == ("rb", "none")
        return Opened(path, self)

    def groups(self):
        """(file, row group) of each read of texts."""
        return [self.places[read] for read in self.log if read in self.places]


class Opened(io.FileIO):
    def __init__(self, path, files):
        super().__init__(path, "rb")
        self.files = files

    def read(self, size=-1):
        read = os.path.basename(self.name), self.tell(), size
        self.files.log.append(read)
        faults = self.files.faults.get(self.files.places.get(read))
        if faults:
            raise faults.pop(0)
        return super().read(size)


@pytest.fixture
def files(store, tmp_path, monkeypatch):
    files = Files(store)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(fineweb_raw, "open_hub", lambda repo: (files, str(store)))
    monkeypatch.setattr(fineweb_raw, "BATCH", BATCH)
    monkeypatch.setattr(fineweb, "write_token_tables", write_inputs)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    files.slept = []
    monkeypatch.setattr(time, "sleep", files.slept.append)
    yield files
    assert not list((tmp_path / "temporary").iterdir())


def run(store, out, *arguments, budgets=BUDGETS):
    names = "--val_tokens", "--tokens", "--holdout_tokens"
    sizes = [f"{name}={budget}" for name, budget in zip(names, budgets)]
    return fineweb.main([f"--out={out}", f"--ranks={store / 'gpt2.tiktoken'}", *sizes, *arguments])


def cut(documents_tokens, budgets=BUDGETS):
    """(tokens of each split, how many documents that takes), document by document."""
    splits, waiting = [], list(documents_tokens)
    for budget in budgets:
        tokens = []
        while len(tokens) < budget:
            tokens += waiting.pop(0)
        splits.append(tokens[:budget])
    return splits, len(documents_tokens) - len(waiting)


def check_shards(out, documents_tokens, budgets=BUDGETS):
    for split, expected in zip(fineweb.SPLITS, cut(documents_tokens, budgets)[0]):
        tokens, vocab_size, bos_id = read_shard(out / f"fineweb_{split}_000000.bin")
        assert tokens.tolist() == expected and (vocab_size, bos_id) == (50257, BOS)


def check_failure(capsys, out, *words):
    """One line that says it all at the end, and nothing in the folder."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("fineweb: ") and "Traceback" not in "".join(lines)
    for word in words:
        assert word in lines[-1]
    assert not out.exists() or not list(out.iterdir())
    return lines


# ==== The dataset ===============================================================================
def test_it_is_the_dataset_of_the_tokenized_shards(files, store, tmp_path, monkeypatch, capsys,
                                                   documents_tokens):
    raw, tokenized = tmp_path / "raw", tmp_path / "tokenized"
    assert run(store, raw, "--from_raw") == 0
    check_shards(raw, documents_tokens)
    assert "not comparable with the public leaderboard" in capsys.readouterr().err

    stream = np.concatenate(documents_tokens)
    stream = np.concatenate([stream, [BOS], stream])    # more than is looked at
    for name, part in zip(fineweb.FILES, (stream[:2000], stream[2000:])):
        path, header = tmp_path / name, np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(part)
        path.write_bytes(header.tobytes() + part.astype("<u2").tobytes())
    monkeypatch.setattr(fineweb, "locate", lambda repo, name, cache: {
        "name": name, "size": (tmp_path / name).stat().st_size, "path": tmp_path / name})
    assert run(store, tokenized) == 0
    names = sorted(path.name for path in tokenized.iterdir())
    assert names == sorted(path.name for path in raw.iterdir()) and "tokens.npz" in names
    for name in set(names) - {"meta.json"}:
        assert (raw / name).read_bytes() == (tokenized / name).read_bytes(), name
    ours, theirs = (json.loads((out / "meta.json").read_text()) for out in (raw, tokenized))
    assert ours.pop("source") == (
        f"FineWeb sample-10BT, tokenized from the raw parquet files of {store}")
    assert theirs.pop("source").endswith("the tokenized shards of kjj0/fineweb10B-gpt2")
    assert ours == theirs

    files.log.clear()
    assert run(store, raw, "--from_raw") == 0
    assert "already there" in capsys.readouterr().out and not files.log


@pytest.mark.parametrize("budgets", [BUDGETS, (30, 20, 40), (400, 6300, 900)])
def test_no_more_is_read_than_is_wanted(budgets, files, store, tmp_path, documents_tokens):
    assert run(store, tmp_path / "out", "--from_raw", budgets=budgets) == 0
    check_shards(tmp_path / "out", documents_tokens, budgets)
    num_documents = cut(documents_tokens, budgets)[1]
    groups = [(i // ROWS, i % ROWS // GROUP) for i in range(0, num_documents, GROUP)]
    assert files.groups() == groups
    assert len(files.log) == len(groups) + 1 + groups[-1][0]    # and of each file its footer


def test_processes_keep_the_order(files, store, tmp_path, monkeypatch, documents_tokens):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert run(store, tmp_path / "out", "--from_raw") == 0
    check_shards(tmp_path / "out", documents_tokens)


def test_progress_has_tokens_and_the_time_left(files, store, tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert run(store, tmp_path / "out", "--from_raw") == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 5
    assert all(re.fullmatch(r"[\d,]+ tokens +\d+%  left \d+:\d\d", line) for line in lines[:-1])


# ==== Trouble ===================================================================================
def test_a_failed_read_is_tried_again(files, store, tmp_path, capsys, documents_tokens):
    files.faults = {(0, 0): [httpx2.ReadTimeout("it stalled")],
                    (1, 0): [httpx2.ReadError("it broke"), OSError("Unexpected end of stream")]}
    assert run(store, tmp_path / "out", "--from_raw") == 0
    check_shards(tmp_path / "out", documents_tokens)
    assert files.slept == [2, 2, 4] and not any(files.faults.values())
    assert f"{NAMES[1]}: it broke; try 2 of 6 in 2 s" in capsys.readouterr().err


@pytest.mark.parametrize("faults, words", [
    ([httpx2.ReadError("it broke")] * 6, [NAMES[1], "it broke", "starts over"]),
    ([httpx2.ConnectError("no way")] * 3, [NAMES[1], "no way", "check the network"]),
    ([OSError(28, "No space left on device")], ["No space left"]),
    ([KeyboardInterrupt()], ["interrupted; run again to start over"]),
])
def test_a_failure_is_one_line_and_leaves_nothing(faults, words, files, store, tmp_path, capsys):
    files.faults = {(1, 0): list(faults)}
    assert run(store, tmp_path / "out", "--from_raw") == 2
    lines = check_failure(capsys, tmp_path / "out", *words)
    assert len(lines) == 1 + sum(seconds > 1 for seconds in files.slept)


def test_too_little_text(files, store, tmp_path, capsys, documents_tokens):
    total = sum(map(len, documents_tokens))
    for budgets in ((100, total, 100), (100, total - 110, 10)):     # the latter by rests alone
        assert run(store, tmp_path / "out", "--from_raw", budgets=budgets) == 2
        lines = check_failure(capsys, tmp_path / "out", f"{total:,} tokens", "--tokens=")
        assert len(lines) == 1


def test_what_is_there_stays_when_it_fails(files, store, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(store, out, "--from_raw") == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    files.faults = {(1, 0): [KeyboardInterrupt()]}
    assert run(store, out, "--from_raw", "--force") == 2
    assert before == {path: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("package", ["pyarrow", "tiktoken"])
def test_a_missing_package_is_named(package, files, store, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "fineweb_raw")
    monkeypatch.delitem(sys.modules, "pyarrow.parquet")
    monkeypatch.setitem(sys.modules, package, None)
    assert run(store, tmp_path / "out", "--from_raw") == 2
    lines = check_failure(capsys, tmp_path / "out", package, "-r data/requirements-text.txt")
    assert len(lines) == 1 and not files.log


def test_gpt2_tokens_that_cannot_be_had(files, tmp_path, monkeypatch, capsys):
    def fail(name):
        raise OSError("no network")
    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    assert fineweb.main([f"--out={tmp_path / 'out'}", "--from_raw"]) == 2
    assert len(check_failure(capsys, tmp_path / "out", "GPT-2's tokens", "--ranks=")) == 1


def test_no_space(files, store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    assert run(store, tmp_path / "out", "--from_raw") == 2
    check_failure(capsys, tmp_path / "out", "MB free", "--out=")
    assert not files.log and not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", ["no files", "no text"])
def test_another_dataset(other, files, store, tmp_path, capsys):
    files.folder = tmp_path / "other"
    files.folder.mkdir()
    if other == "no text":
        pq.write_table(pa.table({"content": ["x"]}), files.folder / NAMES[0])
    assert run(store, tmp_path / "out", "--from_raw") == 2
    assert len(check_failure(capsys, tmp_path / "out", other[3:], "check --repo=")) == 1


# ==== The library's file system =================================================================
COMMIT = "c0ffee" + "0" * 34


class Hub(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks for."""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        store, base = self.server.store, f"/api/datasets/{fineweb.RAW_REPO}"
        asked, name = self.headers.get("Range"), self.path.split("?")[0].rsplit("/", 1)[-1]
        self.server.log.append((self.path.split("?")[0], asked))
        if self.path.startswith(f"{base}/tree/{COMMIT}/sample%2F10BT"):
            found = [{"type": "file", "path": f"sample/10BT/{name}", "oid": "0" * 40,
                      "size": (store / name).stat().st_size} for name in reversed(NAMES)]
            return self.answer(200, json.dumps(found).encode())
        if self.path in (base, f"{base}/revision/{COMMIT}"):
            return self.answer(200, json.dumps({"id": fineweb.RAW_REPO, "sha": COMMIT}).encode())
        place = f"/datasets/{fineweb.RAW_REPO}/resolve/{COMMIT}/sample/10BT/"
        if self.path.startswith(place) and asked:
            start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups())
            return self.answer(206, (store / name).read_bytes()[start:end + 1])
        self.answer(404)

    def answer(self, status, body=b""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(store, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.store, server.log = store, []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    huggingface_hub.close_session()
    yield server
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


def test_only_ranges_of_the_text_are_asked_for(hub, store, tmp_path, monkeypatch,
                                               documents_tokens):
    monkeypatch.setattr(fineweb, "write_token_tables", write_inputs)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert run(store, tmp_path / "out", "--from_raw") == 0
    check_shards(tmp_path / "out", documents_tokens)
    source = json.loads((tmp_path / "out/meta.json").read_text())["source"]
    assert source.endswith(f"of datasets/HuggingFaceFW/fineweb@{COMMIT}/sample/10BT")
    num_documents = cut(documents_tokens)[1]
    wanted = list(find_texts(store))[:-(-num_documents // GROUP)]
    asked = [(path.rsplit("/", 1)[-1], *map(int, asked[6:].split("-")))
             for path, asked in hub.log if asked]
    assert wanted == [(name, start, end + 1 - start) for name, start, end in asked
                      if end + 1 < (store / name).stat().st_size]       # which a footer's is
    assert len(asked) == len(wanted) + 1 + (num_documents - 1) // ROWS
    others = [path for path, asked in hub.log if fineweb.RAW_REPO in path and not asked]
    assert len(others) == 3             # the commit, twice, and the folder
