"""data/fineweb.py, without network: a stand-in hub on 127.0.0.1 serves small synthetic shards.

    python -m pytest tests/test_fineweb.py
"""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))
import fineweb  # noqa: E402
from shards import GPT2_BOS as BOS, read_shard  # noqa: E402

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
VAL_FILE, TRAIN_FILE = fineweb.FILES
COMMIT = "c0ffee" + "0" * 34
SMALL = ["--val_tokens=500", "--tokens=1_500", "--holdout_tokens=400"]  # fits the first shard


def make_stream(lengths, seed=0):
    """Documents of the given lengths, BOS included."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, BOS, sum(lengths)).astype(np.uint16)
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


# ---- cutting ----

def test_cut_splits_like_the_slow_loop():
    rng = np.random.default_rng(1)
    for trial in range(100):
        tokens = make_stream(rng.integers(1, 60, 80), trial)
        budgets = [int(n) for n in rng.integers(1, len(tokens) // 4, 3)]
        cuts = sorted(rng.integers(0, len(tokens), 2))  # some streams are empty
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


# ---- the stand-in hub ----

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


def check_dataset(out, tokens, budgets):
    meta = json.loads((out / "meta.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == [
        "fineweb_holdout_000000.bin", "fineweb_train_000000.bin", "fineweb_val_000000.bin",
        "meta.json"]
    for split, (start, end) in zip(fineweb.SPLITS, cut_slowly(tokens.tolist(), budgets)):
        path, entry = out / f"fineweb_{split}_000000.bin", meta["splits"][f"{split}_000000"]
        written, vocab_size, bos_id, sha256 = read_shard(path)
        assert np.array_equal(written, tokens[start:end]) and (vocab_size, bos_id) == (50257, 50256)
        assert entry["tokens"] == end - start
        assert entry["documents"] == tokens[start:end].tolist().count(BOS)
        assert entry["sha256"] == sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    return meta


def check_failure(capsys, out, *words):
    """One last line that says it all, no traceback, nothing of a dataset."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("fineweb: ") and not any("Traceback" in line for line in lines)
    for word in words:
        assert word in lines[-1]
    assert not out.exists() or not list(out.iterdir())
    return lines


# ---- the whole script ----

def test_over_both_shards_and_then_nothing_to_do(hub, tmp_path, capsys):
    arguments = ["--val_tokens=600", "--tokens=4_000", "--holdout_tokens=500"]
    assert run(tmp_path, *arguments) == 0
    meta = check_dataset(tmp_path / "out", hub.tokens, (600, 4000, 500))
    assert meta["tokenizer"] == "gpt2" and meta["licence"] == "ODC-By 1.0"
    assert meta["vocab_size"] == 50257 and meta["bos_id"] == BOS and fineweb.REPO in meta["source"]
    assert meta["baseline"]["one_epoch"][4] == [1000000000, 3.046]
    assert meta["splits"]["val_000000"]["text_bytes"] is None
    assert [name for name, _ in bodies(hub)] == [VAL_FILE, TRAIN_FILE]
    said = capsys.readouterr()
    assert "not comparable with the public leaderboard" in said.err
    assert "bits per byte will be n/a" in said.out
    # The token goes to the hub, not to where it redirects.
    assert {place: token for _, place, _, _, token in hub.log} == {
        "datasets": "Bearer hf_secret", "store": None}

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    hub.log.clear()
    assert run(tmp_path, *arguments) == 0
    assert "already there" in capsys.readouterr().out and not hub.log
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_the_second_shard_only_where_needed(hub, tmp_path):
    assert run(tmp_path, *SMALL) == 0
    check_dataset(tmp_path / "out", hub.tokens, (500, 1500, 400))
    assert [name for name, _ in bodies(hub)] == [VAL_FILE]


def test_the_second_shard_where_cut_documents_take_too_much(hub, tmp_path):
    budgets = 501, 2000, 499  # 3000 in all, as many as the first shard has
    assert cut_slowly(hub.tokens.tolist(), budgets)[-1][1] > 3000
    assert run(tmp_path, "--val_tokens=501", "--tokens=2000", "--holdout_tokens=499") == 0
    check_dataset(tmp_path / "out", hub.tokens, budgets)
    assert [name for name, _ in bodies(hub)] == [VAL_FILE, TRAIN_FILE]


def test_another_size_than_there(hub, tmp_path, capsys):
    out, less = tmp_path / "out", ["--val_tokens=500", "--tokens=900", "--holdout_tokens=400"]
    assert run(tmp_path, *SMALL) == 0
    hub.log.clear()
    assert run(tmp_path, *less) == 0  # smaller: stays
    assert "--force" in capsys.readouterr().out
    check_dataset(out, hub.tokens, (500, 1500, 400))
    assert run(tmp_path, *less, "--force") == 0
    check_dataset(out, hub.tokens, (500, 900, 400))
    assert run(tmp_path, *SMALL) == 0  # larger: built anew
    check_dataset(out, hub.tokens, (500, 1500, 400))
    with open(out / "fineweb_train_000000.bin", "r+b") as file:  # damaged: built anew
        file.seek(2000)
        file.write(b"\x07\x07\x07")
    assert run(tmp_path, *SMALL) == 0
    check_dataset(out, hub.tokens, (500, 1500, 400))
    assert not hub.log  # all of it from the cache


def test_text_bytes(hub, tmp_path, monkeypatch):
    encoding = SimpleNamespace(decode_single_token_bytes=lambda token: b"x" * (token % 7 + 1))
    tiktoken = SimpleNamespace(get_encoding={"gpt2": encoding}.__getitem__)
    monkeypatch.setitem(sys.modules, "tiktoken", tiktoken)
    assert run(tmp_path, *SMALL) == 0
    meta = check_dataset(tmp_path / "out", hub.tokens, (500, 1500, 400))
    for split in fineweb.SPLITS:
        tokens = read_shard(tmp_path / "out" / f"fineweb_{split}_000000.bin")[0]
        want = sum(token % 7 + 1 for token in tokens.tolist() if token != BOS)
        assert meta["splits"][f"{split}_000000"]["text_bytes"] == want
        assert fineweb.count_bytes(tokens, fineweb.gpt2_byte_lengths(BOS), piece=7) == want


# ---- trouble ----

def test_429_is_waited_for_as_asked(hub, tmp_path, capsys):
    hub.faults += [{"at": ("HEAD", "datasets"), "times": 1, "status": 429,
                    "headers": {"Retry_After": 17}},
                   {"at": ("HEAD", "datasets"), "times": 1, "status": 429,
                    "headers": {"RateLimit": '"resolvers";r=0;t=23'}},
                   {"at": ("GET", "store"), "times": 1, "status": 429,
                    "headers": {"Retry_After": 5}}]
    assert run(tmp_path, *SMALL) == 0
    check_dataset(tmp_path / "out", hub.tokens, (500, 1500, 400))
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
    check_dataset(tmp_path / "out", hub.tokens, (500, 1500, 400))
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
    check_dataset(tmp_path / "out", hub.tokens, (500, 1500, 400))
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
    # What is filed is what the library itself finds.
    path = huggingface_hub.try_to_load_from_cache(
        fineweb.REPO, VAL_FILE, cache_dir=tmp_path / "cache", repo_type="dataset")
    assert Path(path).read_bytes() == hub.files[VAL_FILE]


@pytest.mark.parametrize("more", (2, -2))
def test_wrong_size(hub, tmp_path, capsys, more):
    hub.sizes[VAL_FILE] = len(hub.files[VAL_FILE]) + more
    assert run(tmp_path, *SMALL) == 2
    check_failure(capsys, tmp_path / "out", VAL_FILE)
    assert not list((tmp_path / "cache").rglob("snapshots"))


def test_wrong_content(hub, tmp_path, capsys):
    hub.etags[VAL_FILE] = "0" * 64
    assert run(tmp_path, *SMALL) == 2
    check_failure(capsys, tmp_path / "out", "sha256", VAL_FILE)
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


def test_header_and_size_disagree(hub, tmp_path, capsys):
    hub.files[VAL_FILE] = shard_bytes(hub.tokens[:3000], claimed=2999)
    assert run(tmp_path, *SMALL) == 2
    check_failure(capsys, tmp_path / "out", "2999", "delete")


def test_no_space(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    assert run(tmp_path, *SMALL) == 2
    lines = check_failure(capsys, tmp_path / "out", "MB free", "--out=")
    assert len(lines) == 1 and not bodies(hub) and not (tmp_path / "cache").exists()


def test_not_on_the_hub(hub, tmp_path, capsys):
    assert run(tmp_path, *SMALL, "--repo=some/other") == 2
    assert len(check_failure(capsys, tmp_path / "out", "some/other", "--repo=")) == 1
    assert not hub.slept


def test_not_a_hub(hub, tmp_path, capsys):
    hub.faults.append({"at": ("HEAD", "datasets"), "times": 1, "status": 200})  # a login page
    assert run(tmp_path, *SMALL) == 2
    assert len(check_failure(capsys, tmp_path / "out", "not the hub's answer")) == 1


def test_more_than_the_shards_hold(hub, tmp_path, capsys):
    assert run(tmp_path, "--val_tokens=500", "--tokens=9_000", "--holdout_tokens=400") == 2
    assert len(check_failure(capsys, tmp_path / "out", "6,000", "--tokens=")) == 1
    assert not bodies(hub)


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


# ---- as a program ----

def program(tmp_path, *arguments, **environment):
    hidden = "HF_", "HUGGINGFACE_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"
    clean = {key: value for key, value in os.environ.items() if not key.upper().startswith(hidden)}
    command = [sys.executable, str(ROOT / "data" / "fineweb.py"), f"--out={tmp_path / 'out'}"]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=60, cwd=tmp_path,
        env={**clean, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1",
             "NO_PROXY": "127.0.0.1,localhost", **environment})


def test_program_without_network(tmp_path):
    began = time.monotonic()
    done = program(tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2 and time.monotonic() - began < 20
    line, = done.stderr.splitlines()
    assert line.startswith("fineweb: http://127.0.0.1:9/") and "check the network" in line
    assert not done.stdout and not (tmp_path / "out").exists()


def test_program(hub, tmp_path):
    (tmp_path / "own").mkdir()
    done = program(tmp_path, *SMALL, f"--cache={tmp_path / 'own'}", HF_ENDPOINT=hub.url,
                   TIKTOKEN_CACHE_DIR=str(tmp_path), HTTPS_PROXY="http://127.0.0.1:9",
                   TQDM_POSITION="-1")  # this one shows progress bars without a terminal, too
    assert done.returncode == 0, done.stderr
    check_dataset(tmp_path / "out", hub.tokens, (500, 1500, 400))
    assert VAL_FILE in done.stderr  # the progress bar
    assert "bits per byte will be n/a" in done.stdout
    assert list((tmp_path / "own").rglob(VAL_FILE)) and not (tmp_path / "home" / "hub").exists()


def test_import_has_no_side_effects(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import fineweb;"
            "print([name for name in ('huggingface_hub', 'tiktoken') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT / "data")], cwd=tmp_path,
                          capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n" and not done.stderr and not list(tmp_path.iterdir())
