"""data/sample, the dataset in the repository: what its files promise, and data/sample.py's parts.

    python -m pytest tests/test_sample.py
"""
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tiktoken.load import load_tiktoken_bpe

DATA = Path(__file__).resolve().parents[1] / "data"
FOLDER = DATA / "sample"
sys.path.insert(0, str(DATA))
import sample  # noqa: E402
from shards import read_shard  # noqa: E402

SPLITS = ["train_000000", "val_000000", "holdout_000000"]
META = json.loads((FOLDER / "meta.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def encoding():
    # with a hash, since tiktoken else takes an older file of the same path from its own cache
    ranks = load_tiktoken_bpe(str(FOLDER / META["ranks"]), META["ranks_sha256"])
    return tiktoken.Encoding(META["tokenizer"], pat_str=META["pattern"], mergeable_ranks=ranks,
                             special_tokens={META["bos_text"]: META["bos_id"]})


@pytest.fixture(scope="module")
def documents(encoding):
    """{split: list of (tokens without BOS, text)}"""
    found = {}
    for key in SPLITS:
        tokens = np.asarray(read_shard(FOLDER / f"sample_{key}.bin")[0])
        parts = np.split(tokens, np.flatnonzero(tokens == META["bos_id"]))
        assert len(parts[0]) == 0, "the stream begins with BOS"
        parts = [part[1:].tolist() for part in parts[1:]]
        texts = [encoding.decode_bytes(part).decode("utf-8", "strict") for part in parts]
        found[key] = list(zip(parts, texts, strict=True))
    return found


@pytest.mark.parametrize("key", SPLITS)
def test_shard_is_what_meta_says(key, documents):
    path, entry = FOLDER / f"sample_{key}.bin", META["splits"][key]
    tokens, vocab_size, bos_id, sha256 = read_shard(path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"] == sha256
    assert (vocab_size, bos_id) == (META["vocab_size"], META["bos_id"]) == (2048, 2047)
    assert len(tokens) == entry["tokens"] and int(tokens.max()) < 2048
    assert len(documents[key]) == entry["documents"]
    assert sum(len(text.encode()) for _, text in documents[key]) == entry["text_bytes"]


@pytest.mark.parametrize("key", SPLITS)
def test_encoding_the_text_gives_the_shard(key, documents, encoding):
    encoded = encoding.encode_ordinary_batch([text for _, text in documents[key]], num_threads=1)
    assert encoded == [tokens for tokens, _ in documents[key]]


def test_vocabulary_is_bytes_then_merges_of_earlier_tokens(encoding):
    raw = (FOLDER / META["ranks"]).read_bytes()
    assert hashlib.sha256(raw).hexdigest() == META["ranks_sha256"]
    tokens = [base64.b64decode(line.split()[0]) for line in raw.splitlines()]
    assert [int(line.split()[1]) for line in raw.splitlines()] == list(range(2047))
    assert tokens[:256] == [bytes([b]) for b in range(256)] and len(set(tokens)) == 2047
    for rank, token in enumerate(tokens[256:], 256):
        earlier = set(tokens[:rank])
        assert any(token[:i] in earlier and token[i:] in earlier for i in range(1, len(token)))
    assert encoding.encode("é<|endoftext|>", allowed_special="all")[-1] == 2047


def test_no_document_is_in_two_splits(documents):
    every = Counter(text for key in SPLITS for _, text in documents[key])
    assert max(every.values()) == 1
    splits = {key: [sample.Document("", "", text) for _, text in documents[key]] for key in SPLITS}
    found = sample.duplicates(splits)
    assert found == {key: META["duplicates"][key] for key in found}
    assert found["exact"] == found["near"] == 0 and found["largest_overlap"] < 0.05


def test_near_duplicates_are_found():
    text = "one two three four five six seven eight nine ten eleven twelve thirteen"
    splits = {"train": [text + " fourteen"], "val": [text + "!"], "holdout": ["another text"]}
    found = sample.duplicates({split: [sample.Document("", "", text) for text in texts]
                               for split, texts in splits.items()})
    assert found["exact"] == 0 and found["near"] == 2 and found["largest_overlap"] == 1.0


def test_documents_are_clean_prose_of_moderate_length(documents):
    for key in SPLITS:
        assert max(len(tokens) for tokens, _ in documents[key]) < 2_700
        for _, text in documents[key]:
            assert text == text.strip() and "  " not in text and "\r" not in text
            assert not re.search(r"(?i)gutenberg|copyright notice|https?:|_", text)
            assert not re.search(r"(?im)^(chapter|volume|book) [ivxlc\d]+\.?$", text)
            assert sum(ord(c) < 127 for c in text) >= len(text) - 5


def test_every_prefix_holds_the_mix():
    whole = Counter()
    for key in SPLITS:
        works, entry = META["document_works"][key], META["splits"][key]
        assert len(works) == entry["documents"] and len(set(works)) == 8
        by_work = META["tokens_by_work"][key]
        assert sum(by_work.values()) == entry["tokens"]
        for work, tokens in by_work.items():
            share = META["tokens_by_work"]["train_000000"][work] / 1.4e6
            assert abs(tokens / entry["tokens"] - share) < 0.05, (key, work)
        whole.update(works)
    train = META["document_works"]["train_000000"]
    for n in (18, 40, 100, 400):  # 18 documents are about 30k tokens
        for work in whole:
            expected = n * train.count(work) / len(train)
            assert abs(train[:n].count(work) - expected) < 2, (n, work)


def test_first_65k_tokens_hold_30_documents_of_all_works():
    tokens = read_shard(FOLDER / "sample_train_000000.bin")[0][:65_000]
    n = int((tokens == META["bos_id"]).sum())
    works = set(META["document_works"]["train_000000"][:n])
    assert n >= 30 and works == {work.key for work in sample.WORKS}


def test_folder_is_small_and_complete():
    files = sorted(path.name for path in FOLDER.iterdir())
    assert files == ["meta.json", "ranks.tiktoken", *sorted(f"sample_{k}.bin" for k in SPLITS)]
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4e6


def test_meta_names_every_archive_that_the_script_uses():
    listed = {(p["package"], p["version"], p["sha256"]) for p in META["provenance"]}
    assert listed == {(p["name"], p["version"], p["sha256"]) for p in sample.PACKAGES.values()}
    assert all(w["public_domain"] and w["chapters"] for p in META["provenance"] for w in p["works"])


def test_plain_and_paragraphs():
    text = "\nCHAPTER I\n\n\u201cOh,\u201d said _she_,\n  a daisy-\nchain--\nno.[1]\n\n* * *\n"
    assert sample.paragraphs(text.replace("\n", "\r\n")) == ['"Oh," said she, a daisy-chain--no.']
    assert sample.paragraphs("1/2  3/4   5/6   7/8\n\n\u2018No!\u2019 [Laughter]") == ["'No!'"]


def test_long_chapters_are_cut_between_paragraphs_without_loss():
    paragraphs = [f"Paragraph number {i} " + "is here to be read by somebody. " * 20 + "End."
                  for i in range(40)]
    parts = sample.cut(sample.Chapter("X", "1", paragraphs))
    assert "\n\n".join(part.text for part in parts) == "\n\n".join(paragraphs)
    assert len(parts) == 5 and max(len(part.text) for part in parts) < 7_400
    sentences = " ".join("This sentence is a part of one long paragraph." for _ in range(400))
    assert " ".join(d.text for d in sample.cut(sample.Chapter("X", "2", [sentences]))) == sentences


def run_script(*arguments, **environment):
    command = [sys.executable, str(DATA / "sample.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60,
                          env={**os.environ, **environment})


def test_changed_archive_is_refused(tmp_path):
    (tmp_path / sample.PACKAGES["janeaustenr"]["file"]).write_bytes(b"not it")
    done = run_script("--austen_only", f"--out={tmp_path}/out", f"--cache={tmp_path}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "SHA-256" in done.stderr
    assert not (tmp_path / "out").exists()


def test_missing_tool_is_named(tmp_path):
    done = run_script("--austen_only", f"--out={tmp_path}/out", PATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: apt-get is missing")
