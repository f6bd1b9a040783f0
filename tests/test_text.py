"""data/text.py: one's own text becomes a dataset, right to the byte, or one line says why not.

    python -m pytest tests/test_text.py
"""
import base64
import contextlib
import gzip
import hashlib
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken.load

import auto
import documents
import text
import vocabulary
from helpers import ROOT, TINY, clean_environment, kept_handlers, main, python
from token_tables import write_token_tables
from train_gpt import load_dataset, make_config

SCRIPT = ROOT / "data/text.py"
NAMES = ("train", "val", "holdout")


# ==== Helpers ===================================================================================
def made_up(count, words=60, seed=0):
    """Documents of random words, which are no duplicates of each other."""
    random = np.random.default_rng(seed)
    syllables = np.array("ka lo mi nu pre sta tion ing über ños 日本 ".split(" "))
    return [" ".join("".join(random.choice(syllables, 3)) for _ in range(words)) + f".\n{i}"
            for i in range(count)]


def write_lines(path, texts, **more):
    """JSON Lines of {"text"} and what `more` says of each."""
    records = [{"text": text, **{name: values[i] for name, values in more.items()}}
               for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def command(*arguments):
    """(exit code, stdout, stderr) of text.main in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), kept_handlers():
        try:
            code = text.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def build(out, *arguments):
    """meta.json of a dataset that is made without complaint."""
    code, _, err = command(*arguments, f"--out={out}")
    assert code == 0, err
    return json.loads((out / "meta.json").read_text(encoding="utf-8"))


def tokens_of(path):
    """Of a shard, by modded-nanogpt's reader: header, then as many uint16 as it says."""
    header = np.fromfile(path, "<i4", 256)
    assert (header[0], header[1]) == (20240520, 1)
    tokens = np.frombuffer(path.read_bytes()[1024:], "<u2")
    assert len(tokens) == header[2]
    return tokens


def encoding_of(folder):
    """tiktoken's, by what the folder says."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    ranks = tiktoken.load.load_tiktoken_bpe(str(folder / meta["ranks"]), meta["ranks_sha256"])
    return tiktoken.Encoding("of the folder", pat_str=meta["pattern"], mergeable_ranks=ranks,
                             special_tokens={meta["bos_text"]: meta["bos_id"]})


def read_split(folder, split):
    """The texts of a split, in order, by tiktoken."""
    encoding, texts = encoding_of(folder), []
    for path in sorted(folder.glob(f"*_{split}_*.bin")):
        tokens = tokens_of(path).tolist()
        starts = [i for i, token in enumerate(tokens) if token == encoding.eot_token]
        assert starts[0] == 0
        texts += [encoding.decode(tokens[a + 1:b], errors="strict")
                  for a, b in zip(starts, [*starts[1:], len(tokens)])]
    return texts


def place(document):
    return int(hashlib.sha256(document.encode()).hexdigest()[:16], 16) / 16 ** 16


def expected_split(texts, split, val=0.05, holdout=0.05):
    """Which of the texts belong there, in order."""
    least, most = {"val": (0, val), "train": (val, 1 - holdout), "holdout": (1 - holdout, 1)}[split]
    return sorted((t for t in texts if least <= place(t) < most), key=place)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dataset of the real command: its folder, documents, their sources, what it printed."""
    folder = tmp_path_factory.mktemp("made")
    texts = [*made_up(300), "say <|endoftext|> as text\r\n", "\ttabs\0 and 𝄞, Ελληνικά, ไทย\n\n",
             "x"]
    sources = [["forum", "books"][i % 3 == 0] for i in range(len(texts))]
    path = write_lines(folder / "own.jsonl", texts, source=sources)
    done = python(SCRIPT, path, f"--out={folder}/my_val_set")
    assert done.returncode == 0, done.stderr
    return folder / "my_val_set", texts, sources, done.stdout


# ==== What is in the folder =====================================================================
def test_each_split_has_its_documents_unchanged_and_in_order(made):
    folder, texts, *_ = made
    for split in NAMES:
        assert read_split(folder, split) == expected_split(texts, split)


def test_tokens_are_those_of_tiktoken(made):
    folder, texts, *_ = made
    encoding = encoding_of(folder)
    for split in NAMES:
        stream = [token for document in expected_split(texts, split)
                  for token in (encoding.eot_token, *encoding.encode_ordinary(document))]
        assert tokens_of(next(folder.glob(f"*_{split}_000000.bin"))).tolist() == stream


def test_meta_says_what_the_files_hold(made, tmp_path):
    folder, texts, sources, printed = made
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert sorted(path.name for path in folder.iterdir()) == [
        "meta.json", *(f"my-val-set_{split}_000000.bin" for split in sorted(NAMES)),
        "ranks.tiktoken", "tokens.npz"]
    assert (meta["vocab_size"], meta["bos_id"], meta["bos_text"]) == (512, 511, "<|endoftext|>")
    for split in NAMES:
        documents_ = expected_split(texts, split)
        path = folder / f"my-val-set_{split}_000000.bin"
        assert meta["splits"][f"{split}_000000"] == {
            "tokens": len(tokens_of(path)), "documents": len(documents_),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "text_bytes": sum(len(document.encode()) for document in documents_)}
        assert [meta["sources"][i] for i in meta["document_sources"][f"{split}_000000"]] == [
            sources[texts.index(document)] for document in documents_]
        assert re.search(rf"^{split} +{len(documents_)} documents +{len(tokens_of(path)):,} tokens",
                         printed, re.M)
    ranks = tiktoken.load.load_tiktoken_bpe(str(folder / "ranks.tiktoken"))
    write_token_tables(tmp_path, {rank: token for token, rank in ranks.items()}, 512, 511)
    with np.load(tmp_path / "tokens.npz") as wanted, np.load(folder / "tokens.npz") as held:
        assert all(np.array_equal(held[name], wanted[name]) for name in wanted.files)


def test_command_that_it_prints_trains(made, tmp_path):
    """And the dataset is what load_dataset makes of it, without the traps of the folder's name."""
    folder, texts, _, printed = made
    words = shlex.split(printed.splitlines()[-1])
    assert words == ["./run.sh", "--track=auto", f"--dataset={folder}", "--minutes=60"]
    _, fields = auto.read_text({"dataset": str(folder)}, "cpu")
    data = load_dataset(folder, make_config("cpu", dataset=str(folder), **fields))
    assert data.notes == [] and len(data.scored["val"]) == len(expected_split(texts, "val"))
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert data.val_bytes == meta["splits"]["val_000000"]["text_bytes"]
    code, out, err = main("--track=cpu", f"--dataset={folder}", *TINY, "--num_models=1",
                          f"--vocab_size={fields['vocab_size']}", f"--runs_dir={tmp_path}")
    assert code == 0, err
    assert "bits per byte" in out and "n/a bits" not in out


def test_same_command_gives_the_same_bytes(made, tmp_path):
    """By any number of processes, which work in a few batches."""
    folder, texts, *_ = made
    before = contents(folder)
    arguments = folder.parent / "own.jsonl", f"--out={folder}"
    assert python(SCRIPT, *arguments).returncode == 0
    assert contents(folder) == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "SMALL", 0)
        patch.setattr(text, "PIECE", 20_000)
        assert command(*arguments, "--jobs=2")[0] == 0
    assert contents(folder) == before


def test_splits_stay_when_documents_are_added_or_shares_change(tmp_path):
    old, more = made_up(200), made_up(200, seed=1)
    paths = [write_lines(tmp_path / f"{name}.jsonl", texts)
             for name, texts in (("z", old), ("a", more))]
    build(tmp_path / "one", paths[0], "--val=0.1")
    build(tmp_path / "two", *reversed(paths), "--val=0.1")
    build(tmp_path / "three", paths[0], "--val=0.2", "--holdout=0.1")
    for split in NAMES:
        one, two, three = (read_split(tmp_path / name, split) for name in ("one", "two", "three"))
        assert one == expected_split(old, split, val=0.1)
        assert two == expected_split(old + more, split, val=0.1)
        assert three == expected_split(old, split, 0.2, 0.1)
        assert 0 < len(one) < len(two)


def test_sources_are_arguments_where_documents_name_none(tmp_path):
    texts = made_up(120)
    paths = [write_lines(tmp_path / f"{name}.jsonl", texts[i::2]) for i, name in enumerate("ab")]
    meta = build(tmp_path / "out", *paths)
    assert meta["sources"] == list(map(str, paths))
    assert meta["document_sources"]["val_000000"] == [
        texts.index(document) % 2 for document in expected_split(texts, "val")]


# ==== What is dropped ===========================================================================
def test_duplicates_are_dropped(tmp_path):
    """Exact ones; near ones by words, or by bytes in a script without spaces; no others."""
    texts = made_up(120, words=150)
    near = texts[7].split(" ")
    near[40] = "other"
    chinese = "".join(chr(0x4e00 + 7919 * i % 5000) for i in range(900))
    genes = ["".join(np.random.default_rng(i).choice(list("ACGT"), 400)) for i in range(2)]
    short = ["a b", "a c", "a", "b", "1", "2"]
    kept = [*texts, chinese, *genes, *short]
    twins = [texts[3], " ".join(near), chinese[:500] + "新" + chinese[500:]]
    far = texts[8].split(" ")
    far[::8] = ["other"] * len(far[::8])
    kept.append(" ".join(far))
    path = write_lines(tmp_path / "own.jsonl", [*kept, *twins, "", " \n\t", None, "x\ud800",
                                                "a" + " " * 60_000 + "b"])
    meta = build(tmp_path / "out", path)
    assert meta["dropped"] == {"exact duplicates": 1, "near duplicates": 2, "empty": 3,
                               "invalid": 2, "beyond --max_tokens": 0}
    assert meta["documents"] == len(kept) + 8
    held = [document for split in NAMES for document in read_split(tmp_path / "out", split)]
    assert Counter(held) == Counter(kept)
    meta = build(tmp_path / "all", path, "--near=0")
    assert meta["dropped"] == {"exact duplicates": 1, "empty": 3, "invalid": 2,
                               "beyond --max_tokens": 0}


def test_sketch_estimates_jaccard_similarity():
    words = [str(i) for i in np.random.default_rng(0).integers(10 ** 6, size=3000)]
    for changed in (5, 20, 60):
        others = list(words)
        others[::3000 // changed] = ["x"] * len(others[::3000 // changed])
        a, b = ({tuple(part[i:i + 5]) for i in range(2996)} for part in (words, others))
        estimate = text.sketch(" ".join(words).encode()).jaccard(
            text.sketch(" \n".join(others).encode()))
        assert abs(estimate - len(a & b) / len(a | b)) < 0.15


def test_train_ends_with_max_tokens(tmp_path):
    """It is a prefix of what it would be, and files beyond are not read."""
    paths = [write_lines(tmp_path / f"{i}.jsonl", made_up(100, seed=i)) for i in range(3)]
    arguments = *paths[:1], "--tokenizer=bytes"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    build(whole, *arguments)
    meta = build(cut, *arguments, "--max_tokens=6000")
    train = read_split(whole, "train")
    kept = read_split(cut, "train")
    assert kept == train[:len(kept)] and len(kept) < len(train)
    sizes = [len(document.encode()) + 1 for document in train]
    assert sum(sizes[:len(kept)]) <= 6000 < sum(sizes[:len(kept) + 1])
    assert meta["dropped"]["beyond --max_tokens"] == len(train) - len(kept)
    assert not meta["stopped"] and read_split(cut, "val") == read_split(whole, "val")
    paths[2].write_text("not JSON")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE", 1000)
        code, out, _ = command(*paths, f"--out={tmp_path}/few", "--max_tokens=3000")
    assert code == 0 and "not all was read" in out


# ==== Files =====================================================================================
def test_all_kinds_of_files_give_the_same_documents(tmp_path):
    texts = [document.replace("\n", "\r\n") for document in made_up(80)]
    lines = write_lines(tmp_path / "own.jsonl", texts).read_bytes()
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    half = len(lines) // 2
    (tmp_path / "own.jsonl.zst").write_bytes(zstd.compress(lines[:half])
                                             + zstd.compress(lines[half:]))     # two frames
    (tmp_path / "own.ndjson.gz").write_bytes(gzip.compress(lines))
    table = pyarrow.table({"id": range(80), "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "own.parquet")
    (tmp_path / "own.txt").write_text("\n<cut>\n".join(texts), newline="", encoding="utf-8")
    (tmp_path / "deep/er").mkdir(parents=True)
    for i, document in enumerate(texts):
        path = tmp_path / "deep" / ("er" if i % 2 else "") / f"{i}.{['md', 'txt', 'TXT.gz'][i % 3]}"
        raw = document.encode()
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    (tmp_path / "deep/data.csv").write_text("is of no known kind")
    for name in ("own.jsonl", "own.jsonl.zst", "own.ndjson.gz", "own.parquet", "deep", "dee*",
                 "deep/**/*.*[tdz]"):
        build(tmp_path / "out", tmp_path / name, "--overwrite")
        for split in NAMES:
            assert read_split(tmp_path / "out", split) == expected_split(texts, split), name
    build(tmp_path / "cut", tmp_path / "own.txt", r"--separator=\n<cut>\n")
    assert read_split(tmp_path / "cut", "train") == expected_split(texts, "train")


@pytest.mark.parametrize("encoding, reported, line", [
    ("utf-8", "utf-8", "Über die Brücke gehen 日本 müde Männer."),
    ("utf-8-sig", "utf-8-sig", "Über die Brücke gehen 日本 müde Männer."),
    ("utf-16", "utf-16", "Über die Brücke gehen 日本 müde Männer."),
    ("utf-32", "utf-32", "Über die Brücke gehen 日本 müde Männer."),
    ("cp1252", "windows-1252", "Die müden Männer gehen über die alte Brücke nach Hause – “spät”."),
    ("cp1251", "windows-1251", "Старый мост через реку был весной в основном обновлён."),
    ("shift_jis", "cp932", "古い橋は春にほとんど新しくされ、市民は高い料金を払わなければならない。"),
    ("gb18030", "gb18030", "那座旧桥在春天基本翻新了，市民现在必须支付更高的费用。"),
])
def test_encodings_are_detected(tmp_path, encoding, reported, line):
    path = tmp_path / "own.txt"
    path.write_bytes(" ".join([line] * 5).encode(encoding))
    args, report = text.parse(["x", "--out=y"]), {"encodings": Counter(), "skipped": []}
    read = list(documents.read_documents([(path, "x")], args, report))
    assert read == [(" ".join([line] * 5), "x")]
    assert list(report["encodings"]) == [reported]


def test_what_is_not_ascii_is_found_late_in_a_file(tmp_path):
    path = tmp_path / "own.txt"
    content = "plain words\n" * 200_000 + "Über die müden Männer – “spät” gehört, größer als früher"
    path.write_bytes(content.encode("cp1252"))
    args, report = text.parse(["x", "--out=y"]), {"encodings": Counter(), "skipped": []}
    assert next(documents.read_documents([(path, "x")], args, report))[0] == content


def test_files_that_are_no_text_are_skipped_and_counted(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for i, document in enumerate(made_up(80)):
        (folder / f"{i}.txt").write_text(document, encoding="utf-8")
    noise = np.random.default_rng(0).integers(1, 256, 5000, dtype=np.uint8)
    (folder / "picture.txt").write_bytes(noise.tobytes())
    (folder / "zeros.txt").write_bytes(b"text\0\1\2" * 50)
    code, out, err = command(folder, f"--out={tmp_path}/out")
    assert code == 0 and "2 skipped" in out
    for name in ("picture.txt", "zeros.txt"):
        assert re.search(rf"^{folder}/{name}: skipped, it is no text", err, re.M)
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["skipped"] == [f"{folder}/picture.txt", f"{folder}/zeros.txt"]
    assert meta["documents"] == 80 and meta["encodings"] == {"utf-8": 80}


# ==== Vocabulary ================================================================================
def test_vocabulary_is_trained_on_train_only(tmp_path):
    """What only val and holdout write becomes no token."""
    texts = [document.replace("ka", "zugzwang") if not 0.1 <= place(document) < 0.9 else document
             for document in made_up(150)]
    texts = [document for document in texts
             if ("zugzwang" in document) != (0.1 <= place(document) < 0.9)]
    path = write_lines(tmp_path / "own.jsonl", texts)
    build(tmp_path / "out", path, "--val=0.1", "--holdout=0.1", "--vocab_size=600")
    ranks = tiktoken.load.load_tiktoken_bpe(str(tmp_path / "out/ranks.tiktoken"))
    assert len(ranks) == 599 and not any(b"zw" in token or b"zu" in token for token in ranks)
    assert any(b"zug" in read.encode() for read in read_split(tmp_path / "out", "val"))


def test_default_size_of_the_vocabulary():
    """1 per 2,000 bytes, as a power of two; data/prose has 2,048."""
    sizes = {0: 512, 1_000_000: 512, 4_589_708: 2048, 5_600_000: 2048, 30_000_000: 16384,
             10 ** 9: 32768}
    assert {size: vocabulary.default_vocab_size(size) for size in sizes} == sizes


def test_trained_vocabulary_is_that_of_data_prose():
    """Which its own script has trained on the same documents, byte for byte."""
    folder = ROOT / "data/prose"
    ranks = vocabulary.train_ranks(read_split(folder, "train"), 2048)
    assert vocabulary.as_file(ranks) == (folder / "ranks.tiktoken").read_bytes()


def test_words_without_end_are_cut_for_training():
    """Which would take the square of their length; no token is longer."""
    ranks = vocabulary.train_ranks(["ab" * 4_000, "ab" * 4_000], 300)
    assert max(map(len, ranks)) == 1_000


def test_short_text_has_a_smaller_vocabulary(tmp_path):
    path = write_lines(tmp_path / "own.jsonl", [f"{'ab' * (i % 5)} {i}" for i in range(120)])
    code, out, _ = command(path, f"--out={tmp_path}/out", "--vocab_size=9000", "--near=0")
    assert code == 0 and "too short for more tokens" in out
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert 257 < meta["vocab_size"] < 9000
    assert len(encoding_of(tmp_path / "out")._mergeable_ranks) == meta["vocab_size"] - 1


def many_ranks(count):
    """{bytes: rank}: single bytes, then pairs and triples of them."""
    ranks = {bytes([b]): b for b in range(256)}
    for i in range(count - 256):
        ranks[bytes(divmod(i, 256)) if i < 1 << 15 else bytes((97, *divmod(i, 256)))] = len(ranks)
    return ranks


def test_bytes_and_a_file_of_ranks(tmp_path):
    """50,256 ranks make a vocabulary of GPT-2's size, as modded-nanogpt's loader wants it."""
    texts = made_up(80)
    path = write_lines(tmp_path / "own.jsonl", texts)
    ranks = many_ranks(50_256)
    (tmp_path / "mine.tiktoken").write_bytes(b"".join(
        base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    meta = build(tmp_path / "out", path, f"--tokenizer={tmp_path}/mine.tiktoken")
    assert (meta["tokenizer"], meta["vocab_size"], meta["bos_id"]) == ("mine", 50257, 50256)
    header = np.fromfile(tmp_path / "out/out_train_000000.bin", "<i4", 256)
    assert header[3:5].tolist() == [50257, 50256]
    meta = build(tmp_path / "bytes", path, "--tokenizer=bytes")
    assert (meta["tokenizer"], meta["vocab_size"], meta["bos_id"]) == ("bytes", 257, 256)
    for name in ("out", "bytes"):
        for split in NAMES:
            assert read_split(tmp_path / name, split) == expected_split(texts, split)
    entry = meta["splits"]["train_000000"]
    assert entry["tokens"] == entry["text_bytes"] + entry["documents"]


def test_ranks_of_gpt2_are_recognized(tmp_path, monkeypatch):
    ranks = many_ranks(50_256)
    path = tmp_path / "r50k_base.tiktoken"
    path.write_bytes(vocabulary.as_file(ranks))
    assert vocabulary.find_ranks(str(path)) == ("r50k_base", ranks)
    monkeypatch.setattr(vocabulary, "GPT2_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert vocabulary.find_ranks(str(path)) == ("gpt2", ranks)


def test_shards_are_cut_between_documents(tmp_path, monkeypatch):
    texts = made_up(120)
    path = write_lines(tmp_path / "own.jsonl", texts)
    build(tmp_path / "one", path)
    monkeypatch.setattr(text, "SHARD_TOKENS", 5_000)
    meta = build(tmp_path / "many", path)
    sizes = [entry["tokens"] for key, entry in meta["splits"].items() if "train" in key]
    assert len(sizes) > 2 and max(sizes) <= 5_000
    assert read_split(tmp_path / "many", "train") == read_split(tmp_path / "one", "train")
    config = make_config("cpu", vocab_size=512, train_tokens=sum(sizes), selection_tokens=0)
    assert len(load_dataset(tmp_path / "many", config).train) == len(expected_split(texts, "train"))


# ==== What is refused ===========================================================================
ERRORS = {
    "no file": ([], "nowhere.txt: no such file"),
    "no glob": (["*.nothing"], "*.nothing: no such file"),
    "empty folder": (["empty"], "no .txt, .md, .jsonl, .ndjson, .parquet in it"),
    "one document": (["one.txt"], "too few documents for three splits by their hashes: train "),
    "no document": (["blank.jsonl"], "train 0, val 0, holdout 0; give more, cut text files (--sep"),
    "field": (["own.jsonl", "--field=body"], "own.jsonl, line 1: no field 'body' (it has text)"),
    "column": (["own.parquet", "--field=body"], "own.parquet: no field 'body' (it has text)"),
    "number": (["number.jsonl"], "number.jsonl, line 2: 'text' is no text"),
    "JSON": (["torn.jsonl"], "torn.jsonl, line 2: not JSON in UTF-8"),
    "list": (["list.json"], "list.json, line 1: no field 'text' (it is no JSON object)"),
    "cut gzip": (["cut.jsonl.gz"], "cut.jsonl.gz: cannot be read (EOFError"),
    "cut zstd": (["cut.jsonl.zst"], "cut.jsonl.zst: cannot be read (EOFError"),
    "parquet": (["torn.parquet"], "torn.parquet: cannot be read (ArrowInvalid"),
    "encoding": (["latin.txt", "--encoding=utf-8"], "latin.txt: cannot be read (UnicodeDecode"),
    "no encoding": (["one.txt", "--encoding=klingon"], "unknown encoding: klingon"),
    "tokenizer": (["own.jsonl", "--tokenizer=gtp2"], "neither train, gpt2, bytes nor a file"),
    "no ranks": (["own.jsonl", "--tokenizer=one.txt"], "neither train, gpt2, bytes nor a file"),
    "few ranks": (["own.jsonl", "--tokenizer=few.tiktoken"], "255 tokens; must be at most 65,535"),
    "many ranks": (["own.jsonl", "--tokenizer=many.tiktoken"], "65,536 tokens; must be at most"),
    "gap": (["own.jsonl", "--tokenizer=gap.tiktoken"], "300 tokens; must be at most 65,535"),
    "shares": (["own.jsonl", "--val=0.6", "--holdout=0.5"], "together below 1"),
    "no share": (["own.jsonl", "--val=0"], "must be above 0"),
    "vocabulary": (["own.jsonl", "--vocab_size=70000"], "--vocab_size must be from 258 to 65536"),
    "two sizes": (["own.jsonl", "--vocab_size=500", "--tokenizer=bytes"], "--vocab_size must be"),
    "budget": (["own.jsonl", "--max_tokens=9"], "--max_tokens=9: less than the first document"),
    "abbreviation": (["own.jsonl", "--hold=0.1"], "unrecognized arguments: --hold=0.1"),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of files with which something is wrong."""
    folder = tmp_path_factory.mktemp("bad")
    lines = write_lines(folder / "own.jsonl", made_up(60)).read_bytes()
    (folder / "empty").mkdir()
    (folder / "one.txt").write_text("It is the only one.")
    (folder / "blank.jsonl").write_text("\n\n{\"text\": \"\"}\n")
    (folder / "number.jsonl").write_text('{"text": "x"}\n{"text": 5}\n')
    (folder / "torn.jsonl").write_text('{"text": "x"}\n{"text": "x\n')
    (folder / "list.json").write_text('["x", "y"]')
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-9])
    zstd = pyarrow.compress(lines, "zstd", asbytes=True)
    (folder / "cut.jsonl.zst").write_bytes(zstd[:-9])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), folder / "own.parquet")
    (folder / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    (folder / "latin.txt").write_bytes("größer".encode("cp1252"))
    ranks = list(many_ranks(65_536).items())
    gap = [*ranks[:299], (ranks[299][0], 300)]
    for name, some in (("few", ranks[:255]), ("many", ranks), ("gap", gap)):
        (folder / f"{name}.tiktoken").write_bytes(vocabulary.as_file(dict(some)))
    return folder


@pytest.mark.parametrize("arguments, message", ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line_and_leave_nothing(bad, monkeypatch, arguments, message):
    monkeypatch.chdir(bad)
    before = sorted(bad.rglob("*"))
    code, out, err = command(*(arguments or ["nowhere.txt"]), "--out=new/out")
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert sorted(bad.rglob("*")) == before


def test_documents_that_are_too_long_are_refused(tmp_path, monkeypatch):
    """Before they are in memory; a separator cuts them."""
    monkeypatch.setattr(documents, "MAX_DOCUMENT", 3_000)
    monkeypatch.setattr(documents, "MAX_LINE", 9_000)
    monkeypatch.setattr(documents, "PIECE", 500)
    (tmp_path / "own.txt").write_text("no end of words " * 10_000)
    write_lines(tmp_path / "own.jsonl", ["words " * 600])
    write_lines(tmp_path / "one.jsonl", ["words " * 2000])
    for name, message in (("own.txt", "a document of more than 3,000 characters; cut it"),
                          ("own.jsonl", "line 1: a document of more than 3,000 characters"),
                          ("one.jsonl", "line 1: longer than 9,000 bytes")):
        code, _, err = command(tmp_path / name, f"--out={tmp_path}/out")
        assert code == 2 and message in err and err.count("\n") == 1
    texts = made_up(60, words=20)
    (tmp_path / "own.txt").write_text("\n\n\n".join(texts), encoding="utf-8")
    build(tmp_path / "out", tmp_path / "own.txt", r"--separator=\n\n\n")
    assert read_split(tmp_path / "out", "train") == expected_split(texts, "train")


def test_what_is_in_the_way_is_not_replaced(tmp_path):
    """But a dataset by the same command is, another one with --overwrite; its curves stay if its
    shards do."""
    path, out = write_lines(tmp_path / "own.jsonl", made_up(80)), tmp_path / "out"
    meta = build(out, path)
    curves = {**meta, "baseline": {"one_epoch": [[1, 2.0]]}}
    (out / "meta.json").write_text(json.dumps(curves))
    assert build(out, path) == curves
    code, _, err = command(path, f"--out={out}", "--near=0.9")
    assert code == 2 and "holds another dataset" in err and err.count("\n") == 1
    assert build(out, path, "--near=0.9", "--overwrite")["settings"]["near"] == 0.9
    assert "baseline" not in build(out, path, "--overwrite", "--tokenizer=bytes")
    before = contents(out)
    write_lines(path, ["too few"])
    assert command(path, f"--out={out}", "--tokenizer=bytes")[0] == 2
    assert contents(out) == before      # a failure leaves what was there
    (out / "notes.md").write_text("mine")
    code, _, err = command(path, f"--out={out}", "--overwrite")
    assert code == 2 and "notes.md there is of no dataset" in err
    assert (out / "notes.md").read_text() == "mine"
    code, _, err = command(path, f"--out={path}", "--overwrite")
    assert code == 2 and "own.jsonl there is of no dataset" in err


def test_missing_libraries_are_named(made, tmp_path):
    """As a real command says it, of one that all texts need and one that parquet does."""
    path = tmp_path / "own.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), path)
    for name, file in (("rensa", made[0].parent / "own.jsonl"), ("pyarrow", path)):
        stubs = tmp_path / name
        stubs.mkdir()
        (stubs / f"{name}.py").write_text(f"raise ImportError('no {name}')")
        done = python(SCRIPT, file, f"--out={tmp_path}/out",
                      env=clean_environment(PYTHONPATH=str(stubs)))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"error: no {name}: pip install -r data/requirements-text.txt\n"


def test_gpt2_without_a_network_says_what_to_do(made, tmp_path):
    offline = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTPS_PROXY")}
    done = python(SCRIPT, made[0].parent / "own.jsonl", f"--out={tmp_path}/out", "--tokenizer=gpt2",
                  env=clean_environment(TIKTOKEN_CACHE_DIR=str(tmp_path / "cache"), **offline))
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert "r50k_base.tiktoken elsewhere: --tokenizer=FILE" in done.stderr


def test_stopping_it_leaves_nothing(tmp_path):
    texts = [" ".join(map(str, range(i, i + 70))) for i in range(0, 10 ** 6, 70)]
    path = write_lines(tmp_path / "own.jsonl", texts)
    process = subprocess.Popen([sys.executable, SCRIPT, path, f"--out={tmp_path}/out"],
                               stderr=subprocess.PIPE, text=True, env=clean_environment())
    while not list(tmp_path.glob(".text_*/.texts")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "error: stopped; nothing was written"
    assert [item.name for item in tmp_path.iterdir()] == ["own.jsonl"]


# ==== Parts =====================================================================================
def test_processes_are_given_few_items_ahead():
    """So that memory holds a few batches, however much text there is."""
    taken = []
    results = text.parallel(str, (taken.append(i) or i for i in range(100)), jobs=2)
    assert next(results) == (0, "0") and len(taken) <= 6
    assert list(results) == [(i, str(i)) for i in range(1, 100)]
