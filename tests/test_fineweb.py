"""data/fineweb.py, without network: a stand-in hub on 127.0.0.1 serves small synthetic shards.

    python -m pytest tests/test_fineweb.py
"""
import base64
import hashlib
import json
import re
import shutil
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken

import fineweb
import prose
from helpers import ROOT, clean_environment, python
from shards import GPT2_BOS as BOS, read_shard
from token_tables import read_ranks
from train_gpt import load_dataset, make_config

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
VAL_FILE, TRAIN_FILE = fineweb.FILES
COMMIT = "c0ffee" + "0" * 34
SMALL = ["--val_tokens=500", "--tokens=1_500", "--holdout_tokens=400"]  # fits the first shard
SMALL_BUDGETS = 500, 1500, 400
SHARDS = [f"fineweb_{split}_000000.bin" for split in ("holdout", "train", "val")]


def make_stream(lengths, seed=0):
    """Documents of the given lengths, BOS included."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, BOS, sum(lengths)).astype(np.uint16)
    tokens[np.cumsum([0] + list(lengths[:-1]))] = BOS
    return tokens


def shard_bytes(tokens, claimed=None):
    """A shard as other projects write it: header[3] and header[4] are 0."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens) if claimed is None else claimed
    return header.tobytes() + tokens.astype("<u2").tobytes()


def cut_slowly(tokens, budgets):
    """What cut_splits should find, token by token."""
    ranges, at = [], 0
    for budget in budgets:
        while tokens[at] != BOS:
            at += 1
        ranges.append((at, at + budget))
        at += budget
    return ranges


# ==== Cutting ===================================================================================
def test_cut_splits_like_the_slow_loop():
    random = np.random.default_rng(1)
    for trial in range(100):
        tokens = make_stream(random.integers(1, 60, 80), trial)
        budgets = [int(n) for n in random.integers(1, len(tokens) // 4, 3)]
        cuts = sorted(random.integers(0, len(tokens), 2))  # some streams are empty
        streams = np.split(tokens, cuts)
        ranges = fineweb.cut_splits(streams, *budgets, BOS)
        assert ranges == cut_slowly(tokens.tolist(), budgets)
        document = np.cumsum(tokens == BOS)
        seen = [set(document[start:end].tolist()) for start, end in ranges]
        assert not (seen[0] & seen[1] or seen[1] & seen[2] or seen[0] & seen[2])
        for start, end in ranges:
            part = fineweb.take(streams, start, end)
            assert part[0] == BOS and np.array_equal(part, tokens[start:end])


@pytest.mark.parametrize("val, train, expected", [
    (30, 30, [(0, 30), (30, 60), (60, 70)]),  # both ends fall exactly on a document's start
    (31, 30, [(0, 31), (40, 70), (70, 80)]),  # one token more cuts the fourth document
    (29, 31, [(0, 29), (30, 61), (70, 80)]),
])
def test_cut_at_and_beside_a_document_start(val, train, expected):
    tokens = make_stream([10] * 10)
    for cut in (45, 50, 65):  # the second shard begins within, or with, a document
        assert fineweb.cut_splits([tokens[:cut], tokens[cut:]], val, train, 10, BOS) == expected


def test_next_document_in_small_pieces():
    tokens = make_stream([7, 1, 12, 30, 2, 9])
    starts = np.flatnonzero(tokens == BOS)
    for position in range(len(tokens) + 1):
        want = next((int(at) for at in starts if at >= position), None)
        for piece in (1, 3, 1000):
            assert fineweb.next_document([tokens[:15], tokens[15:]], position, BOS, piece) == want


def test_cut_splits_refuses_too_short_streams():
    tokens = make_stream([10] * 10)
    assert fineweb.cut_splits([tokens], 35, 30, 30, BOS) == [(0, 35), (40, 70), (70, 100)]
    for budgets in ((35, 35, 21), (35, 35, 30), (95, 1, 1), (35, 30, 31)):
        with pytest.raises(ValueError, match="complete"):
            fineweb.cut_splits([tokens], *budgets, BOS)


# ==== The stand-in hub ==========================================================================
class Hub(BaseHTTPRequestHandler):
    """Answers like the hub: the resolve URL redirects, with size and hash, to another host."""
    protocol_version = "HTTP/1.1"

    def answer(self, status, body=b"", cut=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    def do_GET(self):
        hub, name = self.server, self.path.rsplit("/", 1)[-1]
        place = self.path.split("/")[1]
        if place not in ("datasets", "store"):
            return self.answer(404)
        asked = self.headers.get("Range")
        hub.log.append((self.command, place, name, asked, self.headers.get("Authorization")))
        for fault in hub.faults:
            if fault["at"] == (self.command, place) and fault["times"] > 0:
                fault["times"] -= 1
                if "status" in fault:
                    return self.answer(fault["status"], **fault.get("headers", {}))
                return self.send_range(hub.files[name], asked, cut=fault["cut"])
        if place == "store":
            return self.send_range(hub.files[name], asked)
        if not self.path.startswith(f"/datasets/{fineweb.REPO}/resolve/") or name not in hub.files:
            return self.answer(404, X_Error_Code="EntryNotFound")
        body = hub.files[name]
        self.answer(302, Location=f"http://localhost:{hub.server_port}/store/{name}",
                    X_Repo_Commit=COMMIT, X_Linked_Size=hub.sizes.get(name, len(body)),
                    X_Linked_Etag=hub.etags.get(name, f'"{hashlib.sha256(body).hexdigest()}"'))

    do_HEAD = do_GET

    def send_range(self, body, asked, cut=None):
        if not asked:
            return self.answer(200, body, cut)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
        if start >= len(body):
            return self.answer(416)
        held = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.answer(206, body[start:], cut, Content_Range=held)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in with two shards of 3000 tokens; a document goes on from one into the other."""
    lengths = np.random.default_rng(2).integers(5, 60, 300)
    tokens = make_stream(lengths)[:6000]
    assert tokens[3000] != BOS
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.tokens, server.log, server.faults, server.sizes, server.etags = tokens, [], [], {}, {}
    server.files = {VAL_FILE: shard_bytes(tokens[:3000]), TRAIN_FILE: shard_bytes(tokens[3000:])}
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 512)  # it keeps whole chunks only
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # as if not installed
    server.slept = []
    monkeypatch.setattr(time, "sleep", server.slept.append)
    huggingface_hub.close_session()
    yield server
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


def run(tmp_path, *arguments):
    return fineweb.main([f"--out={tmp_path / 'out'}", *arguments])


def bodies(hub):
    """(file, Range) of each GET that reached the store."""
    return [(name, asked) for method, place, name, asked, _ in hub.log
            if (method, place) == ("GET", "store")]


def modified(out):
    return {path.name: path.stat().st_mtime_ns for path in out.iterdir()}


def check_dataset(out, tokens, budgets, *more):
    """The dataset is that of `tokens`, with the files `more` beside its own; returns its meta."""
    meta = json.loads((out / "meta.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == [*SHARDS, "meta.json", *more]
    for split, (start, end) in zip(fineweb.SPLITS, cut_slowly(tokens.tolist(), budgets)):
        path, entry = out / f"fineweb_{split}_000000.bin", meta["splits"][f"{split}_000000"]
        written, vocab_size, bos_id = read_shard(path)
        assert np.array_equal(written, tokens[start:end]) and (vocab_size, bos_id) == (50257, BOS)
        assert entry["tokens"] == end - start
        assert entry["documents"] == tokens[start:end].tolist().count(BOS)
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    return meta


def check_failure(capsys, out, *words):
    """One last line that says it all, no traceback, nothing of a dataset."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("fineweb: ") and not any("Traceback" in line for line in lines)
    for word in words:
        assert word in lines[-1]
    assert not out.exists() or not list(out.iterdir())
    return lines


# ==== The whole script ==========================================================================
def test_over_both_shards_and_then_nothing_to_do(hub, tmp_path, capsys):
    arguments = ["--val_tokens=600", "--tokens=4_000", "--holdout_tokens=500"]
    assert run(tmp_path, *arguments) == 0
    meta = check_dataset(tmp_path / "out", hub.tokens, (600, 4000, 500))
    assert meta["tokenizer"] == "gpt2" and meta["licence"] == "ODC-By 1.0"
    assert meta["vocab_size"] == 50257 and meta["bos_id"] == BOS and fineweb.REPO in meta["source"]
    assert meta["baseline"]["one_epoch"][4] == [1000000000, 3.046]
    assert meta["splits"]["val_000000"]["text_bytes"] is None and "ranks" not in meta
    assert [name for name, _ in bodies(hub)] == [VAL_FILE, TRAIN_FILE]
    said = capsys.readouterr()
    assert "not comparable with the public leaderboard" in said.err
    assert "bits per byte will be n/a" in said.out
    # the token goes to the hub, not to where it redirects
    assert {place: token for _, place, _, _, token in hub.log} == {
        "datasets": "Bearer hf_secret", "store": None}

    before = modified(tmp_path / "out")
    hub.log.clear()
    assert run(tmp_path, *arguments) == 0
    assert "already there" in capsys.readouterr().out and not hub.log
    assert before == modified(tmp_path / "out")


@pytest.mark.parametrize("budgets, files", [
    (SMALL_BUDGETS, [VAL_FILE]),
    ((501, 2000, 499), [VAL_FILE, TRAIN_FILE]),     # 3000, as the first has, but documents are cut
])
def test_the_second_shard_only_where_needed(budgets, files, hub, tmp_path):
    assert (cut_slowly(hub.tokens.tolist(), budgets)[-1][1] > 3000) == (len(files) == 2)
    names = "--val_tokens", "--tokens", "--holdout_tokens"
    assert run(tmp_path, *(f"{name}={budget}" for name, budget in zip(names, budgets))) == 0
    check_dataset(tmp_path / "out", hub.tokens, budgets)
    assert [name for name, _ in bodies(hub)] == files


def test_another_size_than_there(hub, tmp_path, capsys):
    out, less = tmp_path / "out", ["--val_tokens=500", "--tokens=900", "--holdout_tokens=400"]
    assert run(tmp_path, *SMALL) == 0
    hub.log.clear()
    assert run(tmp_path, *less) == 0            # smaller: stays
    assert "--force" in capsys.readouterr().out
    check_dataset(out, hub.tokens, SMALL_BUDGETS)
    assert run(tmp_path, *less, "--force") == 0
    check_dataset(out, hub.tokens, (500, 900, 400))
    assert run(tmp_path, *SMALL) == 0           # larger: built anew
    check_dataset(out, hub.tokens, SMALL_BUDGETS)
    with open(out / "fineweb_train_000000.bin", "r+b") as file:     # damaged: built anew
        file.seek(2000)
        file.write(b"\x07\x07\x07")
    assert run(tmp_path, *SMALL) == 0
    check_dataset(out, hub.tokens, SMALL_BUDGETS)
    assert not hub.log                          # all of it from the cache


# ==== GPT-2's vocabulary ========================================================================
PROSE_RANKS = read_ranks(ROOT / "data/prose/ranks.tiktoken")
PUBLISHED = (r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"""
             r"""|\s+""")                      # of GPT-2's encoder.py
TEXTS = [
    "It's what they'd've said: we'll, I'm, you're 'scared', DON'T 's 'S 'lll 'rex",
    "  two  spaces\n\n\tand tabs \n", "trailing   ", " \u00a0no-break\u2003 space\u3000",
    "caf\u00e9 \u4e2d\u6587\u5b57 \u0627\u0644\u0639\u0631 \u00b2\u00bd\u2167 x\u0301",
    "3.14, 10,000 (50%) $5 -- ... !!! <|endoftext|>", "\U0001f600\U0001f468\u200d\U0001f469 ok",
    "snake_case a'b'c d'' '' ' s", "\x00\x07\r\n\r\n x"]


def stub_bytes(token):
    """The bytes of a token in a vocabulary of GPT-2's size that begins with that of data/prose."""
    return PROSE_RANKS.get(token) or b"\xff" * (2 + token % 5) + token.to_bytes(2, "big")


def pieces(pattern, text):
    """What tiktoken's engine splits `text` into: each piece is a token, as all substrings are."""
    raw = text.encode()
    substrings = {raw[i:j] for i in range(len(raw)) for j in range(i + 2, len(raw) + 1)}
    tokens = [*(bytes([b]) for b in range(256)), *sorted(substrings)]
    encoding = tiktoken.Encoding("pieces", pat_str=pattern, special_tokens={},
                                 mergeable_ranks={token: i for i, token in enumerate(tokens)})
    return [tokens[i] for i in encoding.encode_ordinary(text)]


def test_ranks_lie_beside_the_shards_and_give_their_bytes(hub, tmp_path, monkeypatch):
    encoding = SimpleNamespace(decode_single_token_bytes=stub_bytes)
    stub = SimpleNamespace(get_encoding={"gpt2": encoding}.__getitem__)
    monkeypatch.setitem(sys.modules, "tiktoken", stub)
    assert run(tmp_path, *SMALL) == 0
    monkeypatch.setitem(sys.modules, "tiktoken", tiktoken)
    out = tmp_path / "out"
    meta = check_dataset(out, hub.tokens, SMALL_BUDGETS, "ranks.tiktoken", "tokens.npz")
    ranks = read_ranks(out / meta["ranks"])
    assert ranks == {token: stub_bytes(token) for token in range(BOS)}
    for split in fineweb.SPLITS:
        tokens = read_shard(out / f"fineweb_{split}_000000.bin")[0].tolist()
        assert meta["splits"][f"{split}_000000"]["text_bytes"] == sum(
            len(ranks[token]) for token in tokens if token != BOS)
    sizes = dict(train_tokens=1500, selection_tokens=0)
    data = load_dataset(out, make_config("limited", **sizes))
    assert data.val_bytes == meta["splits"]["val_000000"]["text_bytes"]
    written = (out / "tokens.npz").read_bytes()
    assert data.hashes["tokens.npz"] == hashlib.sha256(written).hexdigest()
    assert data.tables["bytes"].tolist() == [len(ranks[token]) for token in range(BOS)] + [0]
    pairs, merged = data.tables["pairs"], np.flatnonzero(data.tables["pairs"][:, 0] >= 0)
    assert len(merged) > 1000 and len(pairs) == BOS + 1
    assert all(ranks[pairs[i, 0]] + ranks[pairs[i, 1]] == ranks[i] for i in merged)
    assert data.tables["features"].shape[1] == make_config("limited").padded_vocab
    assert data.meta["baseline"] and not data.notes
    data = load_dataset(out, make_config("limited", eval_tokens=123, **sizes))
    scored = read_shard(out / "fineweb_val_000000.bin")[0][:123].tolist()
    assert data.val_bytes == sum(len(ranks[token]) for token in scored if token != BOS)
    assert "baseline" not in data.meta and len(data.notes) == 1
    # with pattern and special token they are all that tiktoken needs
    ours = tiktoken.Encoding("ours", pat_str=meta["pattern"],
                             mergeable_ranks={text: token for token, text in ranks.items()},
                             special_tokens={meta["bos_text"]: meta["bos_id"]})
    assert ours.encode("<|endoftext|>", allowed_special="all") == [BOS]
    document = read_shard(ROOT / "data/prose/prose_val_000000.bin")[0][1:500].tolist()
    assert ours.encode_ordinary(ours.decode(document)) == document


def test_ranks_may_be_given_where_tiktoken_cannot_download_them(hub, tmp_path, capsys):
    given = tmp_path / "gpt2.tiktoken"
    lines = [base64.b64encode(stub_bytes(token)) + b" %d\n" % token for token in range(BOS)]
    given.write_bytes(b"".join(lines[:-1]))
    assert run(tmp_path, *SMALL, f"--ranks={given}") != 0
    error = capsys.readouterr().err
    assert f"{given}: must have GPT-2's 50,256 tokens" in error and error.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.bin"))
    given.write_bytes(b"".join(lines))
    assert run(tmp_path, *SMALL, f"--ranks={given}") == 0
    out = tmp_path / "out"
    check_dataset(out, hub.tokens, SMALL_BUDGETS, "ranks.tiktoken", "tokens.npz")
    assert (out / "ranks.tiktoken").read_bytes() == given.read_bytes()


def test_bytes_are_counted_in_pieces():
    tokens = make_stream([50, 30])
    lengths = np.arange(BOS + 1) % 7
    for piece in (1, 7, 80, 1000):
        assert fineweb.count_bytes(tokens, lengths, piece) == sum(int(t) % 7 for t in tokens)


def test_pattern_splits_text_as_the_published_one():
    random = np.random.default_rng(0)
    alphabet = list("''sStdmlvre  ab1\u00b2\u00e9\u4e2d\n\t!_\u00a0")
    samples = ["".join(random.choice(alphabet, 24)) for _ in range(200)]
    for text in TEXTS + samples:
        expected = pieces(PUBLISHED, text)
        assert b"".join(expected).decode() == text
        for pattern in {fineweb.PATTERN, prose.PATTERN}:
            assert pieces(pattern, text) == expected, text
    assert [b"It", b"'s", b" what"] == pieces(fineweb.PATTERN, TEXTS[0])[:3]


# ==== Trouble ===================================================================================
def test_429_is_waited_for_as_asked(hub, tmp_path, capsys):
    hub.faults += [{"at": ("HEAD", "datasets"), "times": 1, "status": 429,
                    "headers": {"Retry_After": 17}},
                   {"at": ("HEAD", "datasets"), "times": 1, "status": 429,
                    "headers": {"RateLimit": '"resolvers";r=0;t=23'}},
                   {"at": ("GET", "store"), "times": 1, "status": 429,
                    "headers": {"Retry_After": 5}}]
    assert run(tmp_path, *SMALL) == 0
    check_dataset(tmp_path / "out", hub.tokens, SMALL_BUDGETS)
    assert hub.slept == [17, 23, 6.0]  # the last by the library, which adds a second
    assert "try 2 of 6 in 17 s" in capsys.readouterr().err


def test_server_errors_back_off_and_end(hub, tmp_path, capsys):
    hub.faults.append({"at": ("HEAD", "datasets"), "times": 99, "status": 503})
    assert run(tmp_path, *SMALL) == 2
    check_failure(capsys, tmp_path / "out", "503", VAL_FILE, "run again")
    assert hub.slept == [2, 4, 8, 16, 32]


@pytest.mark.parametrize("name, waits", [
    ("ReadTimeout", [2, 4, 8, 16, 32]), ("ReadError", [2, 4, 8, 16, 32]),
    ("ConnectError", [0.5, 1.0]), ("ConnectTimeout", [0.5, 1.0]),  # no network, no patience
])
def test_stalls_and_resets_get_more_tries_than_no_network(monkeypatch, name, waits):
    error = getattr(pytest.importorskip("httpx2"), name)
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)

    def fail():
        raise error("it broke")
    with pytest.raises(fineweb.Failure, match="somewhere: it broke; .*run again"):
        fineweb.retry("somewhere", fail)
    assert slept == waits
    failures = iter([error("once")])

    def fail_once():
        for failure in failures:
            raise failure
        return "done"
    assert fineweb.retry("somewhere", fail_once) == "done"


def test_truncated_transfer_is_resumed(hub, tmp_path):
    hub.faults.append({"at": ("GET", "store"), "times": 1, "cut": 3000})
    assert run(tmp_path, *SMALL) == 0
    check_dataset(tmp_path / "out", hub.tokens, SMALL_BUDGETS)
    first, second = bodies(hub)
    assert first == (VAL_FILE, None) and re.fullmatch(r"bytes=2\d\d\d-", second[1])


def test_a_later_run_resumes(hub, tmp_path, capsys):
    hub.faults += [{"at": ("GET", "store"), "times": 1, "cut": 3000},
                   {"at": ("GET", "store"), "times": 99, "status": 503}]
    assert run(tmp_path, *SMALL) == 2
    check_failure(capsys, tmp_path / "out", "503")
    hub.faults.clear()
    hub.log.clear()
    assert run(tmp_path, *SMALL) == 0
    (name, asked), = bodies(hub)
    assert name == VAL_FILE and re.fullmatch(r"bytes=2\d\d\d-", asked)
    check_dataset(tmp_path / "out", hub.tokens, SMALL_BUDGETS)
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
    # what is filed is what the library itself finds
    path = huggingface_hub.try_to_load_from_cache(
        fineweb.REPO, VAL_FILE, cache_dir=tmp_path / "cache", repo_type="dataset")
    assert Path(path).read_bytes() == hub.files[VAL_FILE]


@pytest.mark.parametrize("hub_has, arguments, words, not_left", [
    (dict(sizes={VAL_FILE: 7022}), [], [VAL_FILE], "snapshots"),        # of 7024 bytes
    (dict(sizes={VAL_FILE: 7026}), [], [VAL_FILE], "snapshots"),
    (dict(etags={VAL_FILE: "0" * 64}), [], ["sha256", VAL_FILE], "*.incomplete"),
    (dict(files={VAL_FILE: shard_bytes(np.full(3000, BOS), claimed=2999)}), [],
     ["2999", "delete"], "*.incomplete"),
    (dict(faults=[{"at": ("HEAD", "datasets"), "times": 1, "status": 200}]), [],    # a login page
     ["not the hub's answer"], "blobs"),
    ({}, ["--repo=some/other"], ["some/other", "--repo="], "blobs"),
    ({}, ["--tokens=9_000"], ["6,000", "--tokens="], "blobs"),          # more than there is
])
def test_what_cannot_be_right_ends_in_one_line(hub_has, arguments, words, not_left, hub, tmp_path,
                                               capsys):
    for name, value in hub_has.items():
        setattr(hub, name, value)
    assert run(tmp_path, *SMALL, *arguments) == 2
    lines = check_failure(capsys, tmp_path / "out", *words)
    assert len(lines) == 1 or hub.slept
    assert not list((tmp_path / "cache").rglob(not_left))


def test_no_space(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    assert run(tmp_path, *SMALL) == 2
    lines = check_failure(capsys, tmp_path / "out", "MB free", "--out=")
    assert len(lines) == 1 and not bodies(hub) and not (tmp_path / "cache").exists()


def test_failure_leaves_what_is_there(hub, tmp_path, capsys, monkeypatch):
    assert run(tmp_path, *SMALL) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(fineweb, "write_shard", full)
    assert run(tmp_path, *SMALL, "--force") == 2
    assert "No space left" in capsys.readouterr().err.strip().splitlines()[-1]
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_other_datasets_are_left_alone(hub, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "meta.json").write_text('{"source": "something else", "splits": {}}')
    assert run(tmp_path, *SMALL, "--force") == 2
    assert "another dataset" in capsys.readouterr().err and not hub.log


@pytest.mark.parametrize("argument", ("--tokens=many", "--tokens=0", "--token=5"))
def test_bad_arguments(tmp_path, capsys, argument):
    with pytest.raises(SystemExit) as error:
        run(tmp_path, argument)
    assert error.value.code == 2
    assert len(check_failure(capsys, tmp_path / "out")) == 1


# ==== As a program ==============================================================================
def program(tmp_path, *arguments, **environment):
    hidden = "HF_", "HUGGINGFACE_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"
    clean = {name: value for name, value in clean_environment().items()
             if not name.upper().startswith(hidden)}
    return python(ROOT / "data/fineweb.py", f"--out={tmp_path / 'out'}", *arguments, cwd=tmp_path,
                  env={**clean, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1",
                       "NO_PROXY": "127.0.0.1,localhost", **environment})


def test_program_without_network(tmp_path):
    done = program(tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2
    line, = done.stderr.splitlines()
    assert line.startswith("fineweb: http://127.0.0.1:9/") and "check the network" in line
    assert not done.stdout and not (tmp_path / "out").exists()


def test_program(hub, tmp_path):
    (tmp_path / "own").mkdir()
    done = program(tmp_path, *SMALL, f"--cache={tmp_path / 'own'}", HF_ENDPOINT=hub.url,
                   TIKTOKEN_CACHE_DIR=str(tmp_path), HTTPS_PROXY="http://127.0.0.1:9",
                   TQDM_POSITION="-1")      # this one shows progress bars without a terminal, too
    assert done.returncode == 0, done.stderr
    check_dataset(tmp_path / "out", hub.tokens, SMALL_BUDGETS)
    assert VAL_FILE in done.stderr          # the progress bar
    assert "bits per byte will be n/a" in done.stdout
    assert list((tmp_path / "own").rglob(VAL_FILE)) and not (tmp_path / "home" / "hub").exists()


def test_import_has_no_side_effects(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import fineweb;"
            "print([name for name in ('huggingface_hub', 'tiktoken') if name in sys.modules])")
    done = python("-c", code, ROOT / "data", cwd=tmp_path)
    assert done.stdout == "[]\n" and not done.stderr and not list(tmp_path.iterdir())
