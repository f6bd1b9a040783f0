"""data/prose, the dataset in the repository: what its files promise, and data/prose.py's parts.

    python -m pytest tests/test_prose.py
"""
import base64
import hashlib
import json
import re
from collections import Counter

import numpy as np
import pytest
import tiktoken

import prose
from helpers import ROOT, clean_environment, python
from shards import read_shard
from token_tables import read_ranks, write_token_tables
from train_gpt import load_dataset, make_config, read_token_tables

FOLDER = ROOT / "data/prose"
META = json.loads((FOLDER / "meta.json").read_text(encoding="utf-8"))
SPLITS = ["train_000000", "val_000000", "holdout_000000"]


@pytest.fixture(scope="module")
def encoding():
    ranks = {text: token for token, text in read_ranks(FOLDER / META["ranks"]).items()}
    return tiktoken.Encoding(META["tokenizer"], pat_str=META["pattern"], mergeable_ranks=ranks,
                             special_tokens={META["bos_text"]: META["bos_id"]})


@pytest.fixture(scope="module")
def documents(encoding):
    """{split: list of (tokens without BOS, text)}"""
    found = {}
    for key in SPLITS:
        tokens = np.asarray(read_shard(FOLDER / f"prose_{key}.bin")[0])
        before, *parts = np.split(tokens, np.flatnonzero(tokens == META["bos_id"]))
        assert len(before) == 0, "the stream begins with BOS"
        parts = [part[1:].tolist() for part in parts]
        texts = [encoding.decode_bytes(part).decode("utf-8", "strict") for part in parts]
        found[key] = list(zip(parts, texts, strict=True))
    return found


# ==== The files =================================================================================
def test_folder_is_small_and_complete():
    files = sorted(path.name for path in FOLDER.iterdir())
    assert files == ["meta.json", *sorted(f"prose_{key}.bin" for key in SPLITS), "ranks.tiktoken",
                     "tokens.npz"]
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4e6


@pytest.mark.parametrize("key", SPLITS)
def test_shard_is_what_meta_says_and_what_its_text_encodes_to(key, documents, encoding):
    path = FOLDER / f"prose_{key}.bin"
    entry = META["splits"][key]
    tokens, vocab_size, bos_id = read_shard(path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
    assert (vocab_size, bos_id) == (META["vocab_size"], META["bos_id"]) == (2048, 2047)
    assert len(tokens) == entry["tokens"]
    assert len(documents[key]) == entry["documents"]
    texts = [text for _, text in documents[key]]
    assert sum(len(text.encode()) for text in texts) == entry["text_bytes"]
    encoded = encoding.encode_ordinary_batch(texts, num_threads=1)
    assert encoded == [tokens for tokens, _ in documents[key]]


def test_vocabulary_is_bytes_then_merges_of_earlier_tokens(encoding):
    raw = (FOLDER / META["ranks"]).read_bytes()
    assert hashlib.sha256(raw).hexdigest() == META["ranks_sha256"]
    lines = [line.split() for line in raw.splitlines()]
    tokens = [base64.b64decode(token) for token, _ in lines]
    assert [int(rank) for _, rank in lines] == list(range(2047))
    assert tokens[:256] == [bytes([b]) for b in range(256)]
    assert len(set(tokens)) == 2047
    for rank, token in enumerate(tokens[256:], 256):
        earlier = set(tokens[:rank])
        assert any(token[:i] in earlier and token[i:] in earlier for i in range(1, len(token)))
    assert encoding.encode("é<|endoftext|>", allowed_special="all")[-1] == 2047


def test_tables_of_tokens_are_those_of_the_ranks(documents, tmp_path):
    """Which data/token_tables.py makes of them; texts have as many bytes as their tokens."""
    tables, hashes = read_token_tables(FOLDER, make_config("cpu"))
    written = (FOLDER / "tokens.npz").read_bytes()
    assert hashes == {"tokens.npz": hashlib.sha256(written).hexdigest()}
    ranks = read_ranks(FOLDER / META["ranks"])
    assert tables["bytes"].tolist() == [len(ranks[token]) for token in range(2047)] + [0]
    for key in SPLITS:
        for tokens, text in documents[key]:
            assert tables["bytes"][tokens].sum() == len(text.encode())
    merged = np.flatnonzero(tables["pairs"][:, 0] >= 0)
    assert merged.tolist() == list(range(256, 2047))        # and not the bytes, nor BOS
    for token in merged:
        a, b = tables["pairs"][token]
        assert ranks[a] + ranks[b] == ranks[token] and max(a, b) < token
    write_token_tables(tmp_path, ranks, 2048, 2047)
    again, _ = read_token_tables(tmp_path, make_config("cpu"))
    assert again.keys() == tables.keys() == {"bytes", "pairs", "features", "weights"}
    for name in tables:
        assert np.array_equal(again[name], tables[name]) and again[name].dtype == tables[name].dtype


def test_meta_names_every_archive_that_the_script_uses():
    listed = {(p["package"], p["version"], p["sha256"]) for p in META["provenance"]}
    assert listed == {(p["name"], p["version"], p["sha256"]) for p in prose.PACKAGES.values()}
    works = [work for package in META["provenance"] for work in package["works"]]
    assert {work["key"] for work in works} == {work.key for work in prose.WORKS}
    assert all(work["public_domain"] and work["chapters"] for work in works)


# ==== The documents =============================================================================
def test_no_document_is_in_two_splits(documents):
    splits = {key: [prose.Document("", "", text) for _, text in documents[key]] for key in SPLITS}
    found = prose.duplicates(splits)
    assert found == {key: META["duplicates"][key] for key in found}
    assert found["exact"] == found["near"] == 0
    assert found["largest_overlap"] < 0.05


def test_duplicates_are_found():
    """Exact ones, and those that share most of their 13-word sequences in other writing."""
    text = "one two three four five six seven eight nine ten eleven twelve thirteen"
    texts = {"train": [text + " fourteen", "twice"], "val": [text.upper() + "!", "twice"],
             "holdout": ["another text"]}
    found = prose.duplicates({split: [prose.Document("", "", text) for text in of_split]
                              for split, of_split in texts.items()})
    assert found == {"exact": 1, "near": 2, "largest_overlap": 1.0}


def test_documents_are_clean_prose_of_moderate_length(documents):
    for key in SPLITS:
        assert max(len(tokens) for tokens, _ in documents[key]) < 2_700
        for _, text in documents[key]:
            assert text == text.strip() and "  " not in text and "\r" not in text
            assert not re.search(r"(?i)gutenberg|copyright notice|https?:|_", text)
            assert not re.search(r"(?im)^(chapter|volume|book) [ivxlc\d]+\.?$", text)
            assert sum(ord(c) < 127 for c in text) >= len(text) - 5


def test_every_split_and_every_prefix_holds_the_mix():
    shares = META["tokens_by_work"]["train_000000"]
    for key in SPLITS:
        works, entry = META["document_works"][key], META["splits"][key]
        by_work = META["tokens_by_work"][key]
        assert len(works) == entry["documents"] and len(set(works)) == 8
        assert sum(by_work.values()) == entry["tokens"]
        for work, tokens in by_work.items():
            share = shares[work] / sum(shares.values())
            assert abs(tokens / entry["tokens"] - share) < 0.05, (key, work)
    train = META["document_works"]["train_000000"]
    for n in (18, 40, 100, 400):        # 18 documents are about 30k tokens
        for work in shares:
            expected = n * train.count(work) / len(train)
            assert abs(train[:n].count(work) - expected) < 2, (n, work)
    assert set(train[:30]) == set(shares)


# ==== data/prose.py =============================================================================
def test_text_is_cleaned():
    text = "\nCHAPTER I\n\n\u201cOh,\u201d said _she_,\n  a daisy-\nchain--\nno.[1]\n\n* * *\n"
    assert prose.paragraphs(text.replace("\n", "\r\n")) == ['"Oh," said she, a daisy-chain--no.']
    assert prose.paragraphs("1/2  3/4   5/6   7/8\n\n\u2018No!\u2019 [Laughter]") == ["'No!'"]


def test_long_chapters_are_cut_between_paragraphs_without_loss():
    paragraphs = [f"Paragraph number {i} " + "is here to be read by somebody. " * 20 + "End."
                  for i in range(40)]
    parts = prose.cut(prose.Chapter("X", "1", paragraphs))
    assert "\n\n".join(part.text for part in parts) == "\n\n".join(paragraphs)
    assert len(parts) == 5 and max(len(part.text) for part in parts) < prose.MAX_CHARS
    sentences = " ".join("This sentence is a part of one long paragraph." for _ in range(400))
    parts = prose.cut(prose.Chapter("X", "2", [sentences]))
    assert len(parts) > 1 and " ".join(part.text for part in parts) == sentences


def made_up_chapters():
    """Chapters of two works, one three times as long as the other, of words that do not repeat."""
    random = np.random.default_rng(0)
    return [prose.Chapter(work, str(i), [" ".join(map(str, random.integers(10 ** 6, size=90)))])
            for work, count in (("X", 90), ("Y", 30)) for i in range(count)]


def test_splits_are_whole_chapters_and_hold_the_same_share_of_each_work(monkeypatch):
    chapters = made_up_chapters()
    monkeypatch.setattr(prose, "HELD_OUT_CHARS", sum(map(prose.length, chapters)) // 10)
    splits = prose.split_chapters(chapters)
    assert sorted(chapter for part in splits.values() for chapter in part) == sorted(chapters)
    counts = {split: Counter(chapter.work for chapter in part) for split, part in splits.items()}
    assert counts == {"val": {"X": 9, "Y": 3}, "holdout": {"X": 9, "Y": 3},
                      "train": {"X": 72, "Y": 24}}


def test_building_writes_a_sound_dataset_and_keeps_its_baseline(tmp_path, monkeypatch):
    """The curves stay in meta.json when the shards come out the same, and only then."""
    out = tmp_path / "out"
    chapters = made_up_chapters()
    ranks = {text: token for token, text in read_ranks(FOLDER / META["ranks"]).items()}
    monkeypatch.setattr(prose, "HELD_OUT_CHARS", sum(map(prose.length, chapters)) // 10)
    monkeypatch.setattr(prose, "unpack", lambda package, cache, folder: folder)
    monkeypatch.setattr(prose, "train_ranks", lambda texts, vocab_size: ranks)
    monkeypatch.setattr(prose, "read_work", lambda work, folder: [
        chapter for chapter in chapters if chapter.work == work.key])
    works = [work._replace(key=key) for work, key in zip(prose.WORKS, "XY")]
    entries = prose.build(works, out, tmp_path, tmp_path)
    config = make_config("cpu", train_tokens=entries["train_000000"]["tokens"],
                         selection_tokens=0, final_mixture="uniform")
    data = load_dataset(out, config)
    assert data.val_bytes == entries["val_000000"]["text_bytes"]
    raw = (out / data.meta["ranks"]).read_bytes()
    assert hashlib.sha256(raw).hexdigest() == data.meta["ranks_sha256"]
    token_bytes = read_ranks(out / data.meta["ranks"])
    assert data.tables["bytes"].tolist() == [len(token_bytes[i]) for i in range(2047)] + [0]
    written = (out / "tokens.npz").read_bytes()
    assert data.hashes["tokens.npz"] == hashlib.sha256(written).hexdigest()
    for split, documents in (("train", data.train), ("holdout", data.scored["holdout"])):
        texts = [b"".join(token_bytes[token] for token in document[1:].tolist()).decode()
                 for document in documents]
        assert sum(map(len, texts)) == entries[f"{split}_000000"]["text_bytes"]
        assert set(texts) < {chapter.paragraphs[0] for chapter in chapters}

    path = out / "meta.json"
    path.write_text(json.dumps({**data.meta, "baseline": {"one_epoch": [[1, 2.0]]}}))
    prose.build(works, out, tmp_path, tmp_path)
    assert json.loads(path.read_text()) == {**data.meta, "baseline": {"one_epoch": [[1, 2.0]]}}
    chapters.pop()
    prose.build(works, out, tmp_path, tmp_path)
    assert "baseline" not in json.loads(path.read_text())


def test_changed_archive_is_refused(tmp_path):
    (tmp_path / prose.PACKAGES["janeaustenr"]["file"]).write_bytes(b"not it")
    done = python(ROOT / "data/prose.py", "--austen_only", f"--out={tmp_path}/out",
                  f"--cache={tmp_path}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "SHA-256" in done.stderr
    assert not (tmp_path / "out").exists()


def test_missing_tool_is_named(tmp_path):
    done = python(ROOT / "data/prose.py", "--austen_only", f"--out={tmp_path}/out",
                  env=clean_environment(PATH=str(tmp_path)))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: apt-get is missing")
