"""Shards and rows: what train_gpt.py reads and refuses, and the order in which it trains on it.

    python -m pytest tests/test_data.py
"""
import base64
import hashlib
import json
import math
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import shards
import token_tables
from helpers import (BOS, PLAIN, ROOT, TOY, VOCAB, main, make_dataset, python, small_ranks,
                     small_tables)
from train_gpt import (Rows, UserError, count_tokens, cut_documents, cut_selection, dataset_folder,
                       drop_held_out, ensemble_curve, load_dataset, make_config, read_meta,
                       read_shard, read_token_tables, split_documents, summarize)

# of datasets in this file: 20 documents of train, 4 of val, 4 of holdout, 50 tokens each
SIZES = dict(vocab_size=VOCAB, train_tokens=400, selection_tokens=60, eval_tokens=0,
             final_mixture="uniform")


@pytest.fixture
def dataset(tmp_path):
    """A sound little dataset that a test may spoil."""
    return make_dataset(tmp_path / "small", documents=(20, 4, 4), tables=False)


def load(folder, **changes):
    plain = {"spelling": False, "split_tokens": 0.0, "row_memory": False}
    return load_dataset(folder, make_config("cpu", preset="toy", **{**plain, **SIZES, **changes}))


def read_tokens(path):
    """Of a shard, by its format."""
    return np.frombuffer(path.read_bytes()[1024:], "<u2")


def rewrite(path, header=(), tokens=None):
    """Change header[i] = value, and write `tokens` (or the old ones) behind it."""
    ints = np.frombuffer(path.read_bytes()[:1024], "<i4").copy()
    for i, value in dict(header).items():
        ints[i] = value
    tokens = read_tokens(path) if tokens is None else np.asarray(tokens, "<u2")
    path.write_bytes(ints.tobytes() + tokens.tobytes())


def with_token(path, index, value):
    tokens = read_tokens(path).copy()
    tokens[index] = value
    rewrite(path, tokens=tokens)


def set_facts(folder, key, **facts):
    """Change what meta.json says of a shard."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    meta["splits"][key] |= facts
    shards.write_meta(folder, meta)


def texts(documents):
    return [document.tolist() for document in documents]


# ==== Shards ====================================================================================
@pytest.mark.parametrize("vocab, bos, tokens, says", [
    (100, 99, [99, 70000], "from 0 to 99"), (100, 99, [99, 100], "from 0 to 99"),
    (100, 99, [99, -1], "from 0"), (100, 99, [5, 99], "begin with BOS 99"),
    (100, 99, [99], "two or more"), (100, 99, [], "whole numbers"),
    (100, 99, [99.0, 1.5], "float64"), (100, 99, [[99, 1]], "one dimension"),
    (100, 99, [True, False], "bool"), (65537, 99, [99, 1], "at most 65,536"),
    (100, 100, [100, 1], "vocabulary of 100"), (100, -1, [-1, 1], "vocabulary of 100"),
    (0, 0, [0, 1], "vocabulary of 0")])
def test_what_a_shard_cannot_hold_is_not_written(vocab, bos, tokens, says, tmp_path):
    """The check comes before the cast to 16 bits, in which 70,000 would be 4,464."""
    with pytest.raises(ValueError, match=says):
        shards.write_shard(tmp_path / "a_train_000000.bin", tokens, vocab, bos)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("vocab, bos, tokens", [
    (64, 63, [63, 1, 2, 63, 0, 62]), (65536, 65535, [65535, 0, 256, 255]),
    (50304, 0, [0, 7, 0, 50303])])          # 0: <|endoftext|> of GPT-NeoX and others
def test_what_the_data_scripts_write_is_read(vocab, bos, tokens, tmp_path):
    path = tmp_path / "a_train_000000.bin"
    facts = shards.write_shard(path, tokens, vocab, bos)
    assert facts == {"tokens": len(tokens), "documents": tokens.count(bos),
                     "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    found, found_bos, sha256 = read_shard(path, vocab, facts["sha256"])
    assert found.dtype == np.uint16
    assert (found.tolist(), found_bos, sha256) == (tokens, bos, facts["sha256"])
    found, *facts = shards.read_shard(path)
    assert (found.tolist(), facts) == (tokens, [vocab, bos])


def test_files_of_other_projects_are_gpt2s(tmp_path):
    """llm.c and modded-nanogpt leave vocabulary and BOS out of the header."""
    path = tmp_path / "fineweb_val_000000.bin"
    tokens = [50256, 5, 50255, 50256, 0]
    shards.write_shard(path, tokens, 50257, 50256)
    rewrite(path, {3: 0, 4: 0})
    found, bos, _ = read_shard(path, 50257)
    assert (found.tolist(), bos) == (tokens, 50256)
    with pytest.raises(UserError, match="vocabulary of 50257; set --vocab_size=50257"):
        read_shard(path, 2048)


def be_directory(path):
    path.unlink()
    path.mkdir()


def be_dangling(path):
    path.unlink()
    path.symlink_to("nowhere")


def be_unreadable(path):
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")


def be(content):
    """content: bytes -> bytes"""
    return lambda path: path.write_bytes(content(path.read_bytes()))


def have(header, tokens=None):
    return lambda path: rewrite(path, header, tokens)


AGAIN, OTHER_VOCABULARY = "fetch or build the dataset again", "set --vocab_size="
SPOILT = {
    "magic": (have({0: 1}), "not a token shard", AGAIN),
    "version": (have({1: 2}), "not a token shard", AGAIN),
    "empty": (be(lambda _: b""), "not a token shard", AGAIN),
    "half a header": (be(lambda held: held[:1000]), "not a token shard", AGAIN),
    "noise": (be(lambda _: np.random.default_rng(1).bytes(4000)), "not a token shard", AGAIN),
    "only a header": (be(lambda held: held[:1024]), "damaged", AGAIN),
    "truncated": (be(lambda held: held[:-2]), "damaged", AGAIN),
    "half a token": (be(lambda held: held[:-1]), "damaged", AGAIN),
    "extended": (be(lambda held: held + b"\0\0"), "damaged", AGAIN),
    "no tokens": (have({2: 0}, []), "damaged", AGAIN),
    "one token": (have({2: 1}, [BOS]), "damaged", AGAIN),
    "negative count": (have({2: -1}), "damaged", AGAIN),
    "huge count": (have({2: 2 ** 31 - 1}), "damaged", AGAIN),
    "token out of range": (lambda path: with_token(path, 7, VOCAB), f"below {VOCAB}", AGAIN),
    "no BOS": (lambda path: with_token(path, 0, 5), f"begin with BOS {BOS}", AGAIN),
    "negative BOS": (have({4: -1}), "begin with BOS -1", AGAIN),
    "other vocabulary": (have({3: 101}), "vocabulary of 101", OTHER_VOCABULARY + "101"),
    "negative vocabulary": (have({3: -5}), "vocabulary of -5", OTHER_VOCABULARY),
    "directory": (be_directory, "cannot be read", "directory"),
    "dangling": (be_dangling, "cannot be read", "No such file"),
    "unreadable": (be_unreadable, "cannot be read", "Permission"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_shard(name, dataset):
    """Even if nothing is known of its SHA-256; the message says which file, and what to do."""
    spoil, what, remedy = SPOILT[name]
    path = dataset / "small_val_000000.bin"
    spoil(path)
    with pytest.raises(UserError) as error:
        read_shard(path, VOCAB)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert what in message and remedy in message


def test_sha256_finds_every_flipped_bit(dataset):
    path = dataset / "small_val_000000.bin"
    sound = path.read_bytes()
    sha256 = hashlib.sha256(sound).hexdigest()
    random = np.random.default_rng(1)
    for bit in random.choice(8 * len(sound), 300, replace=False):
        held = bytearray(sound)
        held[bit // 8] ^= 1 << bit % 8
        path.write_bytes(held)
        with pytest.raises(UserError, match=re.escape(str(path))):
            read_shard(path, VOCAB, sha256)


@pytest.mark.parametrize("split", ["train", "val", "holdout"])
@pytest.mark.parametrize("sha256", ["", 5, "0" * 64])
def test_sha256_of_another_file(split, sha256, dataset):
    set_facts(dataset, f"{split}_000000", sha256=sha256)
    with pytest.raises(UserError, match=f"{split}_000000.bin: damaged, .*SHA-256 in meta.json"):
        load(dataset)


# ==== Documents =================================================================================
def random_documents(count, seed=0, longest=9):
    random = np.random.default_rng(seed)
    lengths = random.integers(0, longest, count)
    return [np.append(BOS, random.integers(0, BOS, n)).astype(np.uint16) for n in lengths]


def test_documents_are_split_at_every_bos():
    documents = random_documents(50)
    tokens = np.concatenate(documents)
    found = split_documents(tokens, BOS)
    assert min(len(document) for document in documents) == 1    # nothing but BOS is no document
    assert texts(found) == [text for text in texts(documents) if len(text) > 1]
    assert all(np.shares_memory(document, tokens) for document in found)


@pytest.mark.parametrize("seed", range(5))
def test_budget_is_met_to_the_token(seed):
    documents = random_documents(20, seed)
    tokens = np.concatenate(documents).tolist()
    for budget in range(1, len(tokens) + 5):
        kept = cut_documents(documents, budget)
        assert np.concatenate(kept).tolist() == tokens[:budget]
        assert texts(kept[:-1]) == texts(documents[:len(kept) - 1])
    assert texts(cut_documents(documents, math.inf)) == texts(documents)


@pytest.mark.parametrize("seed", range(5))
def test_selection_is_the_least_number_of_whole_documents(seed):
    documents = random_documents(20, seed)
    for wanted in range(count_tokens(documents) // 2 - 9):
        train, selection = cut_selection(documents, make_config(
            "cpu", selection_tokens=wanted, final_mixture="uniform"))
        assert texts(selection + train) == texts(documents)
        assert count_tokens(selection) >= wanted
        assert not selection or count_tokens(selection[:-1]) < wanted
        assert train


def of_lengths(*lengths):
    return [np.append(BOS, np.arange(n - 1)).astype(np.uint16) for n in lengths]


@pytest.mark.parametrize("lengths, wanted, says", [
    ((10, 10, 10, 10), 21, "30 of the 40 tokens.*; lower it"),
    ((10, 10, 10, 10), 99, "40 of the 40 tokens.*; lower it"),
    ((21, 10, 9), 1, "21 of the 40 tokens.*to 0 if one alone is"),
    ((40,), 5, "40 of the 40 tokens.*to 0 if one alone is"),
    ((2, 1), 1, "2 of the 3 tokens.*to 0 if one alone is")], ids=str)
def test_selection_that_takes_more_than_half_is_refused(lengths, wanted, says):
    with pytest.raises(UserError, match=f"--selection_tokens={wanted}: .*{says}"):
        cut_selection(of_lengths(*lengths), make_config("cpu", selection_tokens=wanted))
    train, selection = cut_selection(of_lengths(*lengths), make_config(
        "cpu", selection_tokens=0, final_mixture="uniform"))
    assert (count_tokens(train), selection) == (sum(lengths), [])


def test_half_of_train_may_be_selection():
    config = make_config("cpu", selection_tokens=11)
    train, selection = cut_selection(of_lengths(10, 10, 20), config)
    assert (len(selection), len(train)) == (2, 1)


@pytest.mark.parametrize("split", ["val", "holdout"])
@pytest.mark.parametrize("repeated, refused", [(0, False), (1, False), (25, False), (26, True)])
def test_held_out_documents_are_dropped_from_train(split, repeated, refused, tmp_path):
    """What short texts repeat by nature goes; a quarter of a split's tokens, and they overlap."""
    documents = [np.array([BOS, n % BOS, n // BOS], np.uint16) for n in range(300)]
    splits = {"train": documents[:100], "val": documents[100:200], "holdout": documents[200:]}
    train, other = splits["train"], splits[split]
    splits["train"] = [*train[:50], *other[:repeated], *other[:repeated], *train[50:]]
    if refused:
        with pytest.raises(UserError, match=f"{tmp_path}: 26% of {split} is in train.*overlap"):
            drop_held_out(tmp_path, splits)
        return
    kept, notes = drop_held_out(tmp_path, splits)
    assert texts(kept) == texts(train)
    assert len(notes) == min(1, repeated)
    assert all(f" {2 * repeated} documents of train left out" in note for note in notes)


def test_train_of_which_nothing_is_left(dataset):
    """Each of its documents is held out, and yet they are a small part of what is."""
    tokens = read_tokens(dataset / "small_val_000000.bin")[:50]
    facts = shards.write_shard(dataset / "small_train_000000.bin", tokens, VOCAB, BOS)
    set_facts(dataset, "train_000000", **facts)
    for wanted in (0, 10):
        with pytest.raises(UserError, match=f"--selection_tokens={wanted}: 0 of the 0 tokens"):
            load(dataset, train_tokens=50, selection_tokens=wanted)


def test_overlap_is_counted_by_tokens(tmp_path):
    """Nine short documents of ten may be in train, if the tenth is most of the text."""
    short = [np.array([BOS, n], np.uint16) for n in range(9)]
    long = [np.append(BOS, np.arange(80)).astype(np.uint16)]
    own = of_lengths(30, 31)
    splits = {"train": own + short, "val": short + long, "holdout": of_lengths(40)}
    assert texts(drop_held_out(tmp_path, splits)[0]) == texts(own)
    splits["val"] = short + of_lengths(50)
    with pytest.raises(UserError, match="26% of val"):
        drop_held_out(tmp_path, splits)


def add_documents(folder, split, documents):
    path = folder / f"small_{split}_000000.bin"
    tokens = np.concatenate([*documents, read_tokens(path)])
    rewrite(path, {2: len(tokens)}, tokens)
    set_facts(folder, f"{split}_000000", sha256=None)


def test_empty_documents_are_none(dataset):
    """In front of train with --selection_tokens=1, and in all splits at once."""
    data = load(dataset, selection_tokens=1)
    before = {"train": texts(data.train)}
    before |= {split: texts(documents) for split, documents in data.scored.items()}
    for split in ("train", "val", "holdout"):
        add_documents(dataset, split, [np.array([BOS], np.uint16)] * 3)
    data = load(dataset, selection_tokens=1)
    assert texts(data.train) == before["train"] and data.notes == []
    for split, documents in data.scored.items():
        assert texts(documents) == before[split]


def test_the_least_that_is_trained_on_and_scored(dataset):
    data = load(dataset, train_tokens=2, selection_tokens=0, eval_tokens=1)
    assert count_tokens(data.train) == 2
    assert {split: count_tokens(part) for split, part in data.scored.items()} == {
        "val": 2, "holdout": 2}
    with pytest.raises(UserError, match="--train_tokens=1: must be from 2"):
        load(dataset, train_tokens=1, selection_tokens=0)


# ==== Datasets ==================================================================================
def test_sound_dataset(dataset):
    data = load(dataset)
    split = {name: np.split(read_tokens(dataset / f"small_{name}_000000.bin"), count)
             for name, count in (("train", 20), ("val", 4), ("holdout", 4))}
    assert data.bos == BOS
    assert texts(data.scored["selection"]) == texts(split["train"][:2])     # 60 tokens of 50
    assert texts(data.train) == texts(split["train"][2:8])                  # of 400 in all
    for name in ("val", "holdout"):
        assert texts(data.scored[name]) == texts(split[name])
    assert list(data.scored) == ["selection", "val", "holdout"]
    assert data.hashes == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                           for path in dataset.glob("*.bin")}
    assert data.val_bytes is None and data.tables == {}         # no tokens.npz
    assert data.meta == json.loads((dataset / "meta.json").read_text(encoding="utf-8"))
    assert data.notes == []


def test_sizes_that_are_asked_for(dataset):
    data = load(dataset, train_tokens=777, selection_tokens=0, eval_tokens=120)
    assert count_tokens(data.train) == 777
    assert [len(document) for document in data.train] == [50] * 15 + [27]
    assert list(data.scored) == ["val", "holdout"]
    for split in ("val", "holdout"):
        assert [len(document) for document in data.scored[split]] == [50, 50, 20]


def test_shards_of_a_split_are_one_text_in_the_order_of_their_names(tmp_path):
    """A shard that the budget does not need is not read: it may be damaged or half fetched."""
    folder = tmp_path / "many"
    for index in (2, 0, 1):
        for split in ("train", "val", "holdout"):
            tokens = np.full(100, 10 * index + len(split), np.uint16)
            tokens[::25] = BOS
            shards.write_shard(folder / f"many_{split}_{index:06d}.bin", tokens, VOCAB, BOS)
    rewrite(folder / "many_train_000002.bin", {0: 1})
    data = load(folder, train_tokens=200, selection_tokens=0)
    assert [document[1] for document in data.train] == [5] * 4 + [15] * 4
    assert [document[1] for document in data.scored["val"]] == [3] * 4 + [13] * 4 + [23] * 4
    assert "many_train_000002.bin" not in data.hashes
    assert len(data.hashes) == 8
    with pytest.raises(UserError, match="many_train_000002.bin"):
        load(folder, train_tokens=201, selection_tokens=0)


@pytest.mark.parametrize("scored", [0, 2, 7, 60, 120])
def test_bytes_of_exactly_the_scored_tokens(scored, dataset):
    """Of val, which is cheap text and then dear text; BOS is no text. meta.json is not asked."""
    names = {token: b"a" * (1 + token % 3) if token < 50 else "\u4e2d\u6587".encode() * 2
             for token in range(BOS)}
    token_tables.write_token_tables(dataset, names, VOCAB, BOS)
    tokens = np.concatenate([[BOS], np.arange(49), [BOS], np.arange(50, 98)]).astype(np.uint16)
    rewrite(dataset / "small_val_000000.bin", {2: len(tokens)}, tokens)
    set_facts(dataset, "val_000000", sha256=None, text_bytes="nonsense")
    data = load(dataset, eval_tokens=scored)
    targets = tokens[1:scored or None]
    assert data.val_bytes == sum(len(names[token]) for token in targets.tolist() if token != BOS)
    content = (dataset / "tokens.npz").read_bytes()
    assert data.hashes["tokens.npz"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("facts", [{}, {"text_bytes": None}, {"text_bytes": "many"},
                                   {"text_bytes": [1]}, {"text_bytes": -3}], ids=str)
def test_bytes_that_meta_gives_are_not_read(facts, dataset):
    for split in ("train", "val", "holdout"):
        set_facts(dataset, f"{split}_000000", **facts)
    assert load(dataset).val_bytes is None
    token_tables.write_token_tables(dataset, dict.fromkeys(range(BOS), b"abc"), VOCAB, BOS)
    assert load(dataset).val_bytes == 3 * 4 * 49


@pytest.mark.parametrize("scored", [0, 2, 70])
def test_bits_per_byte_are_of_the_scored_tokens(scored, dataset):
    """Whose targets are all but the first; one that is expensive has as many bytes as it has."""
    texts = {token: b"x" * (1 + token) for token in range(BOS)}
    token_tables.write_token_tables(dataset, texts, VOCAB, BOS)
    data = load(dataset, eval_tokens=scored)
    tokens = read_tokens(dataset / "small_val_000000.bin")[:scored or None].tolist()
    logp = -np.random.default_rng(0).exponential(2, len(tokens) - 1)
    bits = sum(-logp / math.log(2)) / sum(1 + token for token in tokens if token != BOS)
    config = make_config("cpu", final_mixture="uniform")
    curve = ensemble_curve([{"val": logp, "holdout": logp}])
    assert summarize(config, data, [], curve)["val_bpb"] == pytest.approx(bits, rel=1e-9)
    data.val_bytes = None
    assert summarize(config, data, [], curve)["val_bpb"] is None


def test_bytes_of_the_whole_val_are_those_of_its_text():
    data = load_dataset(ROOT / "data/prose", make_config("cpu"))
    assert data.val_bytes == data.meta["splits"]["val_000000"]["text_bytes"] == 343_079


@pytest.mark.parametrize("split", ["val", "holdout", "train"])
def test_a_listed_shard_that_is_missing_is_refused(split, tmp_path):
    """Also of train, if it lies before those that are needed; behind them it may be missing."""
    folder = make_dataset(tmp_path / "small")
    for index in (1, 2):
        for name in ("train", "val", "holdout"):
            tokens = np.full(100, 10 * index + len(name), np.uint16)
            tokens[::25] = BOS
            path = folder / f"small_{name}_{index:06d}.bin"
            facts = shards.write_shard(path, tokens, VOCAB, BOS)
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            meta["splits"][f"{name}_{index:06d}"] = facts
            shards.write_meta(folder, meta)
    wanted = dict(train_tokens=3150, selection_tokens=60)
    load(folder, **wanted)
    (folder / f"small_{split}_000001.bin").unlink()
    with pytest.raises(UserError, match=f"{folder}: {split}_000001, .*meta.json lists, is missing"):
        load(folder, **wanted)
    if split == "train":
        load(folder, train_tokens=3000)


def test_a_part_of_val_has_no_data_efficiency(dataset):
    """Its curve is of the whole val."""
    meta = json.loads((dataset / "meta.json").read_text(encoding="utf-8"))
    shards.write_meta(dataset, meta | {"baseline": {"one_epoch": [[100, 5.0]]}})
    assert load(dataset).meta["baseline"] and load(dataset).notes == []
    for whole in (400, 9999):       # no less than val has
        assert load(dataset, eval_tokens=whole).meta["baseline"]
    data = load(dataset, eval_tokens=50)
    assert "baseline" not in data.meta
    assert [note for note in data.notes if "no data efficiency" in note] == data.notes != []


def test_a_relative_dataset_is_looked_for_here_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_config("cpu")
    assert dataset_folder(config) == ROOT / "data/prose"
    (tmp_path / "data/prose").mkdir(parents=True)
    assert dataset_folder(config) == tmp_path / "data/prose"
    assert dataset_folder(make_config("cpu", dataset="nowhere")) == ROOT / "nowhere"
    assert dataset_folder(make_config("cpu", dataset="/nowhere")) == Path("/nowhere")


@pytest.mark.parametrize("split, name", [
    ("train", "fineweb"), ("val", "prose"), ("holdout", "fineweb"), ("val", "my_text")])
def test_missing_split_names_the_command(split, name, dataset):
    (dataset / f"small_{split}_000000.bin").unlink()
    (dataset / "meta.json").unlink()
    dataset = dataset.rename(dataset.parent / name)
    script = name if (ROOT / f"data/{name}.py").exists() else "text"
    with pytest.raises(UserError) as error:
        load(dataset)
    assert str(error.value) == f"{dataset}: no {split} shards; get them: python data/{script}.py"


def test_folder_that_is_none(tmp_path):
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        with pytest.raises(UserError, match=f"{tmp_path / name}: no train shards"):
            load(tmp_path / name)


def test_more_tokens_than_there_are(dataset):
    assert count_tokens(load(dataset, train_tokens=1000, selection_tokens=0).train) == 1000
    with pytest.raises(UserError) as error:
        load(dataset, train_tokens=1001)
    message = str(error.value)
    assert message.startswith(f"{dataset}: 1,000 tokens in train")
    assert "--train_tokens=1001" in message and "lower it" in message


@pytest.mark.parametrize("split", ["val", "holdout"])
def test_held_out_documents_in_train(split, dataset):
    repeated = read_tokens(dataset / "small_train_000000.bin")[50:100]
    path = dataset / f"small_{split}_000000.bin"
    tokens = np.append(read_tokens(path), repeated)
    set_facts(dataset, f"{split}_000000", **shards.write_shard(path, tokens, VOCAB, BOS))
    data = load(dataset)
    assert data.notes == ["data      1 documents of train left out: val or holdout has them"]
    assert repeated.tolist() not in texts(data.scored["selection"] + data.train)
    assert count_tokens(data.scored["selection"] + data.train) == 400
    tokens = np.append(tokens, read_tokens(dataset / "small_train_000000.bin")[100:150])
    set_facts(dataset, f"{split}_000000", **shards.write_shard(path, tokens, VOCAB, BOS))
    with pytest.raises(UserError, match=f"{dataset}: 33% of {split} is in train.* overlap"):
        load(dataset)


# ==== meta.json =================================================================================
def test_meta_by_shard(dataset):
    set_facts(dataset, "val_000000", sha256=None)
    meta, listed = read_meta(dataset)
    assert meta == json.loads((dataset / "meta.json").read_text(encoding="utf-8"))
    assert listed == {key: facts["sha256"] for key, facts in meta["splits"].items()}
    assert listed["val_000000"] is None and len(listed) == 3


def test_dataset_without_meta_is_read(dataset):
    (dataset / "meta.json").unlink()
    assert read_meta(dataset) == ({}, {})
    assert count_tokens(load(dataset).train) == 300


@pytest.mark.parametrize("text", [
    "", "{", "[]", "3", "null", '"text"', '{"splits": 5}', '{"splits": null}', '{"splits": []}',
    '{"splits": {"train_000000": 5}}', '{"splits": {"val_000000": []}}', "\xff"],
    ids=lambda text: text[:50])
def test_malformed_meta(text, dataset):
    (dataset / "meta.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=f"{dataset / 'meta.json'}: cannot be read"):
        load(dataset)


def test_meta_that_is_a_folder(dataset):
    be_directory(dataset / "meta.json")
    with pytest.raises(UserError, match=f"{dataset / 'meta.json'}: cannot be read"):
        load(dataset)


# ==== tokens.npz ================================================================================
PROSE = ROOT / "data/prose"
PROSE_RANKS = token_tables.read_ranks(PROSE / "ranks.tiktoken")


def slow_pairs(ranks, vocab_size):
    """By the greedy merges of tiktoken, token by token: what its string is before the last one."""
    ids, pairs = {text: token for token, text in ranks.items()}, np.full((vocab_size, 2), -1)
    for token, text in ranks.items():
        parts = [bytes([byte]) for byte in text]
        while len(parts) > 2:
            ways = [(ids[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:]))
                    if ids.get(a + b, token) < token]
            if not ways:
                break
            i = min(ways)[1]
            parts = parts[:i] + [parts[i] + parts[i + 1]] + parts[i + 2:]
        if len(parts) == 2 and parts[0] in ids and parts[1] in ids:
            pairs[token] = ids[parts[0]], ids[parts[1]]
    return pairs


def slow_features(text):
    """The names of what a token's string has; its ends are shorter than its word."""
    text = text.decode(errors="replace")
    spaced = text[0] == " "
    bare = text[1:] if spaced and text != " " else text
    word = bare.lower()
    ends = {(kind, part) for n in (1, 2, 3, 4) if n < len(word)
            for kind, part in (("prefix", word[:n]), ("suffix", word[len(word) - n:]))}
    return ends | {("word", word), ("space", spaced), ("capital", bare[:1].isupper()),
                   ("alphabetic", bare.isalpha()), ("length", min(len(bare), 6)),
                   ("first", spaced, word[:1])}


def test_tables_of_prose_are_those_of_its_ranks(tmp_path):
    """As they lie there, and made anew by the script."""
    held = dict(np.load(PROSE / "tokens.npz"))
    for name in ("meta.json", "ranks.tiktoken"):
        (tmp_path / name).write_bytes((PROSE / name).read_bytes())
    done = python(token_tables.__file__, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'tokens.npz'}\n"
    made = dict(np.load(tmp_path / "tokens.npz"))
    assert set(made) == set(held) == {"bytes", "pairs", "features", "weights"}
    assert all(np.array_equal(table, made[name]) for name, table in held.items())
    assert held["bytes"].tolist() == [*(len(PROSE_RANKS[token]) for token in range(2047)), 0]


@pytest.mark.parametrize("ranks, vocab", [(PROSE_RANKS, 2048), (small_ranks(), VOCAB)],
                         ids=["prose", "small"])
def test_pairs_against_slow_reference(ranks, vocab):
    pairs = token_tables.merged_pairs(ranks, vocab)
    assert np.array_equal(pairs, slow_pairs(ranks, vocab))
    found = [(ranks[token], [ranks[half] for half in pair])
             for token, pair in enumerate(pairs.tolist()) if pair != [-1, -1]]
    assert len(found) > 0.8 * (vocab - 256 * (vocab > 256))
    assert all(text == b"".join(halves) for text, halves in found)


def test_pairs_of_tokens_that_merges_do_not_make():
    """One of three bytes without a merge, one with a part that is no token, one of one byte."""
    ranks = {0: b"a", 1: b"b", 2: b"ab", 3: b"abb", 4: b"bba", 5: b"xa", 6: b"aab"}
    assert token_tables.merged_pairs(ranks, 9).tolist() == [
        [-1, -1], [-1, -1], [0, 1], [2, 1], [-1, -1], [-1, -1], [0, 2], [-1, -1], [-1, -1]]


@pytest.mark.parametrize("ranks, vocab", [(PROSE_RANKS, 2048), (small_ranks(), VOCAB)],
                         ids=["prose", "small"])
def test_features_against_slow_reference(ranks, vocab):
    """Those of two tokens or more, at most as many as tokens and the most common; each token has
    1 / sqrt(k) of its k, and BOS and the padding have none."""
    features, weights = token_tables.spelling_features(ranks, vocab)
    padded = -(-vocab // 64) * 64
    assert features.shape == weights.shape[:2] and weights.shape[1:] == (padded, 1)
    assert features.dtype == np.int64 and weights.dtype == np.float32
    has = {token: slow_features(text) for token, text in ranks.items()}
    counts = Counter(name for names in has.values() for name in names)
    shared = {name: count for name, count in counts.items() if count > 1}
    members = {}                # of each number: the tokens that have it
    for token in range(padded):
        weight = weights[:, token, 0]
        numbers = features[weight > 0, token].tolist()
        assert len(set(numbers)) == len(numbers)
        assert weight[weight > 0] == pytest.approx([len(numbers) ** -0.5 for _ in numbers])
        assert not weight[len(numbers):].any() and bool(numbers) == (token in ranks)
        for number in numbers:
            members.setdefault(number, set()).add(token)
    assert len(members) == min(vocab, len(shared)) and set(members) <= set(range(vocab))
    named = Counter(frozenset(token for token, names in has.items() if name in names)
                    for name in shared)
    found = Counter(map(frozenset, members.values()))
    assert not found - named
    assert sorted(map(len, members.values()), reverse=True) == (
        sorted(shared.values(), reverse=True)[:vocab])


def test_what_is_known_of_a_string():
    assert set(token_tables.features_of(b" Hello")) == {
        ("word", "hello"), ("space", True), ("capital", True), ("alphabetic", True),
        ("length", 5), ("first", True, "h"), ("prefix", "h"), ("prefix", "he"), ("prefix", "hel"),
        ("prefix", "hell"), ("suffix", "o"), ("suffix", "lo"), ("suffix", "llo"),
        ("suffix", "ello")}
    for text in (b" ", b"\xe4\xb8", b"  7", " \u00c4rger".encode()):
        assert set(token_tables.features_of(text)) == slow_features(text)


def test_tables_are_read_with_their_hash(tmp_path):
    folder = make_dataset(tmp_path / "small", tables=True)
    content = (folder / "tokens.npz").read_bytes()
    for changes in ({}, {"spelling": True}, {"split_tokens": 0.5}):
        config = make_config("cpu", preset="toy", **SIZES, **changes)
        tables, hashes = read_token_tables(folder, config)
        assert hashes == {"tokens.npz": hashlib.sha256(content).hexdigest()}
        assert set(tables) == set(small_tables())
        assert all(np.array_equal(table, tables[name]) for name, table in small_tables().items())
        data = load(folder, **changes)
        assert data.hashes["tokens.npz"] == hashes["tokens.npz"]
        assert np.array_equal(data.tables["pairs"], tables["pairs"])


@pytest.mark.parametrize("changes", [{}, {"spelling": True}, {"split_tokens": 0.5}], ids=str)
@pytest.mark.parametrize("spoil, says", [
    (Path.unlink, "No such file"), (be_directory, "directory"), (be_dangling, "No such file"),
    (be_unreadable, "Permission"), (be(lambda _: b"noise"), "pickle"),
    (be(lambda _: b""), "data"),
    (be(lambda held: held[:100]), "")], ids=[
        "missing", "directory", "dangling", "unreadable", "noise", "empty", "truncated"])
def test_tables_that_cannot_be_read(changes, spoil, says, tmp_path):
    """Bits per byte are unknown without; who needs them, or has damaged ones, is told of a way."""
    folder = make_dataset(tmp_path / "small", tables=True)
    path = folder / "tokens.npz"
    spoil(path)
    if not changes and not path.exists():
        data = load(folder)
        assert (data.tables, data.val_bytes, "tokens.npz" in data.hashes) == ({}, None, False)
        return
    with pytest.raises(UserError) as error:
        load(folder, **changes)
    message = str(error.value)
    assert message.startswith(f"{path}: cannot be read (") and says in message
    assert message.endswith(f"python data/token_tables.py {folder}")


@pytest.mark.parametrize("arguments, code, words", [
    (["--help"], 0, "token_tables.py FOLDER"), (["-h"], 0, "token_tables.py FOLDER"),
    ([], 2, "token_tables.py FOLDER"), (["a", "b"], 2, "token_tables.py FOLDER"),
    (["--track=cpu"], 2, "token_tables.py FOLDER")], ids=str)
def test_token_tables_as_a_script(arguments, code, words):
    done = python(token_tables.__file__, *arguments)
    assert (done.returncode, done.stderr) == (code, "")
    assert words in done.stdout


@pytest.mark.parametrize("name, text", [
    ("meta.json", None), ("meta.json", "{}"), ("meta.json", "{"), ("ranks.tiktoken", None),
    ("ranks.tiktoken", "YQ== x\n"), ("ranks.tiktoken", "YQ== 0\nYg== 1\n"),
    ("ranks.tiktoken", "YQ==\n")], ids=str)
def test_token_tables_of_a_folder_that_lacks_something(name, text, dataset):
    """One line; and a table that was there is left as it was."""
    lines = [base64.b64encode(text) + b" %d\n" % token for token, text in small_ranks().items()]
    (dataset / "ranks.tiktoken").write_bytes(b"".join(lines))
    assert python(token_tables.__file__, dataset).returncode == 0
    before = (dataset / "tokens.npz").read_bytes()
    (dataset / name).unlink()
    if text is not None:
        (dataset / name).write_text(text)
    done = python(token_tables.__file__, dataset)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"error: {dataset}: needs meta.json [^\n]+\n", done.stderr)
    assert (dataset / "tokens.npz").read_bytes() == before


# ==== As a user meets it ========================================================================
def test_check_refuses_a_dataset_in_one_line(dataset):
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    arguments = ["check", "--track=cpu", *TOY, *sizes, *PLAIN, f"--dataset={dataset}"]
    assert main(*arguments)[0] == 0
    for name in ("small_train_000000.bin", "small_holdout_000000.bin", "meta.json"):
        sound = (dataset / name).read_bytes()
        (dataset / name).write_bytes(sound[:-30])
        code, out, err = main(*arguments)
        assert (code, out) == (2, "track cpu, processes 1\n")
        assert re.fullmatch(f"error: {dataset / name}: [^\n]+\n", err), err
        (dataset / name).write_bytes(sound)


# ==== Rows ======================================================================================
ROWS_BOS = 60_000


def numbered_documents(lengths):
    """Documents in which every token is distinct, so that each tells where it came from."""
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end, dtype=np.uint16) for n, end in zip(lengths, ends)]


def random_shapes(count):
    random = np.random.default_rng(0)
    return [(tuple(random.integers(1, 30, random.integers(1, 9)).tolist()) + (3,),
             int(random.integers(1, 40)), int(random.integers(1, 9)), int(random.integers(1, 5)))
            for _ in range(count)]


SHAPES = [      # lengths of the documents, seq_len, batch_rows, epochs
    ((5, 9, 3), 4, 3, 3), ((7, 1, 1, 20), 8, 2, 2), ((16, 1), 16, 4, 3), ((3, 30, 4, 6), 5, 7, 3),
    ((2,), 8, 2, 3), ((5, 4), 8, 4, 1), ((4, 4, 1), 4, 1, 2), *random_shapes(20)]


def all_steps(rows):
    return [rows.step(step) for step in range(rows.num_steps)]


@pytest.mark.parametrize("lengths, seq_len, batch, epochs", SHAPES)
def test_steps_are_full_rows_of_consecutive_tokens(lengths, seq_len, batch, epochs):
    """What is predicted comes first in a row; behind it BOS is read and nothing predicted."""
    rows = Rows(numbered_documents(lengths), seq_len, batch, epochs, seed=1, bos=ROWS_BOS)
    used = []                               # of each step, the rows that predict something
    for x, y in all_steps(rows):
        assert x.shape == y.shape == (batch, seq_len)
        assert x.dtype == y.dtype == torch.int64
        counted = y >= 0
        predicted = counted.sum(dim=1)
        assert torch.equal(counted, torch.arange(seq_len) < predicted[:, None])
        assert (x[~counted] == ROWS_BOS).all()
        assert (y[~counted] == -1).all()
        assert torch.equal(x[:, 1:][counted[:, 1:]], y[:, :-1][counted[:, 1:]])
        used.append(int((predicted > 0).sum()))
        assert (predicted[:used[-1]] > 0).all()
    an_epoch = -(-(sum(lengths) - 1) // seq_len)
    assert used[:-1] == [batch] * (len(used) - 1)       # only the very last step may be smaller
    assert sum(used) == epochs * an_epoch
    assert 0 < used[-1] <= batch


@pytest.mark.parametrize("lengths, seq_len, batch, epochs", SHAPES)
def test_every_epoch_predicts_every_token_once(lengths, seq_len, batch, epochs):
    """And is complete before the next one begins; documents stay whole."""
    documents, total = numbered_documents(lengths), sum(lengths)
    rows = Rows(documents, seq_len, batch, epochs, seed=1, bos=ROWS_BOS)
    pairs = [pair for x, y in all_steps(rows)
             for pair in zip(x[y >= 0].tolist(), y[y >= 0].tolist())]
    assert len(pairs) == epochs * (total - 1)
    for epoch in range(epochs):
        part = pairs[epoch * (total - 1):(epoch + 1) * (total - 1)]
        following = dict(part)
        first = set(range(total)) - set(following.values())
        assert len(following) == total - 1
        assert len(first) == 1
        stream = [first.pop()]
        while stream[-1] in following:
            stream.append(following[stream[-1]])
        assert sorted(stream) == list(range(total))
        for document in documents:
            start = stream.index(document[0])
            assert stream[start:start + len(document)] == document.tolist()


def test_rows_depend_on_seed_and_step_only():
    def make(seed=1, batch=4):
        return Rows(numbered_documents([7] * 30), 8, batch, 3, seed, ROWS_BOS)

    expected = all_steps(make())
    steps = list(range(len(expected)))
    for order in (steps[::-1], steps[1::2] + steps[::2]):
        other = make()
        for step in order:
            assert all(map(torch.equal, other.step(step), expected[step]))
    total = make().total_rows
    stream = torch.cat([x for x, _ in expected])[:total]
    for batch in (1, 3, 8):                 # the sequence of rows is the same for any batch
        again = torch.cat([x for x, _ in all_steps(make(batch=batch))])[:total]
        assert torch.equal(again, stream)
    assert not torch.equal(make(seed=2).step(0)[0], expected[0][0])


def test_every_epoch_shuffles_documents():
    rows = Rows(numbered_documents([8] * 40), 8, 1, 2, seed=1, bos=ROWS_BOS)
    steps, meetings = all_steps(rows), []
    for part in (steps[:len(steps) // 2], steps[len(steps) // 2:]):
        pairs = [pair for x, y in part for pair in zip(x[y >= 0].tolist(), y[y >= 0].tolist())]
        meetings.append({(a, b) for a, b in pairs if b != a + 1})   # where two documents meet
    assert min(map(len, meetings)) > 30
    assert len(meetings[0] & meetings[1]) < 10


def test_every_epoch_shuffles_rows():
    """Seen with one document, whose rows are the same in every epoch."""
    rows = Rows(numbered_documents([401]), 8, 1, 2, seed=1, bos=ROWS_BOS)
    first = [int(x[0, 0]) for x, _ in all_steps(rows)]
    one, two = first[:50], first[50:]
    assert sorted(one) == sorted(two) == list(range(0, 400, 8))
    for a, b in ((one, two), (one, sorted(one)), (two, sorted(two))):
        assert sum(map(int.__eq__, a, b)) < 10


def test_epochs_count_rows():
    rows = Rows(numbered_documents([33]), 8, 3, 3, seed=1, bos=ROWS_BOS)    # 4 rows an epoch
    assert (rows.rows_per_epoch, rows.total_rows, rows.num_steps) == (4, 12, 4)
    assert [rows.epoch_of(step) for step in range(5)] == [0, 0.75, 1.5, 2.25, 3]


# ==== Tokens that are cut in two ================================================================
CUT = 0.3


def cut_rows(seed=1, cut=CUT, epochs=3, seq_len=64, batch_rows=5):
    """Rows of 20 documents of data/prose, and these."""
    documents = load_dataset(PROSE, make_config("cpu")).train[:20]
    return Rows(documents, seq_len, batch_rows, epochs, seed, 2047, slow_pairs(PROSE_RANKS, 2048),
                cut), documents


def epoch_in_order(rows, epoch):
    """(inputs, targets) of an epoch, as steps give its rows, joined again in their order."""
    rows.load(epoch)
    where = np.argsort(rows.row_order)
    first = epoch * rows.rows_per_epoch
    parts = {}
    for row in range(first, first + rows.rows_per_epoch):
        x, y = rows.step(row // rows.batch_rows)
        parts[row - first] = x[row % rows.batch_rows], y[row % rows.batch_rows]
    ordered = [parts[int(i)] for i in where]
    return (torch.cat([x for x, _ in ordered]).numpy(), torch.cat([y for _, y in ordered]).numpy())


@pytest.mark.parametrize("cut", [0.01, CUT, 1.0])
def test_each_whole_token_is_predicted_once_an_epoch(cut):
    """But the first of all, whatever is cut; and where it begins in the stream."""
    rows, documents = cut_rows(cut=cut)
    for epoch in range(3):
        inputs, targets = epoch_in_order(rows, epoch)
        order = np.random.default_rng((1, epoch)).permutation(len(documents))
        whole = np.concatenate([documents[i] for i in order]).astype(np.int64)
        assert targets[targets >= 0].tolist() == whole[1:].tolist()
        size = len(whole) + rows.num_cut
        assert len(inputs) == rows.rows_per_epoch * rows.seq_len >= size - 1
        assert (targets[size - 1:] == -1).all()
        halves = np.flatnonzero(targets[:size - 1] == -1)
        assert len(halves) == rows.num_cut > 0


@pytest.mark.parametrize("cut", [0.01, CUT, 1.0])
def test_a_stream_that_is_cut_says_the_same_bytes(cut):
    """Each token in the stream is whole, or it and the next one are the pair of a target."""
    rows, documents = cut_rows(cut=cut)
    pairs, sizes = slow_pairs(PROSE_RANKS, 2048), np.load(PROSE / "tokens.npz")["bytes"]
    names = PROSE_RANKS | {2047: b""}
    mergeable = sum(int((pairs[document, 0] >= 0).sum()) for document in documents)
    assert rows.num_cut == round(cut * mergeable)
    for epoch in range(2):
        rows.load(epoch)
        order = np.random.default_rng((1, epoch)).permutation(len(documents))
        whole = np.concatenate([documents[i] for i in order]).tolist()
        stream, targets = rows.stream.tolist(), rows.targets.tolist()
        assert len(stream) == len(targets) == len(whole) + rows.num_cut
        assert b"".join(names[token] for token in stream) == b"".join(
            names[token] for token in whole)
        assert sizes[stream].sum() == sizes[whole].sum()
        count = 0
        for i, target in enumerate(targets):
            if target >= 0 and stream[i] != target:
                assert [stream[i], stream[i + 1]] == pairs[target].tolist()
                assert targets[i + 1] == -1
                count += 1
        assert count == targets.count(-1) == rows.num_cut


def test_what_is_cut_depends_on_seed_and_epoch_only():
    """Other tokens in each epoch and for each member; the same ones, whoever asks first."""
    def is_cut(rows, epoch):
        rows.load(epoch)
        is_there = rows.targets >= 0
        return (rows.stream != rows.targets)[is_there], rows.targets[is_there]

    epochs = [0, 1, 2]
    expected = [is_cut(cut_rows()[0], epoch) for epoch in epochs]
    rows, documents = cut_rows()
    for epoch in epochs[::-1]:
        assert all(map(np.array_equal, is_cut(rows, epoch), expected[epoch]))
    one = Rows(documents[:1], 64, 5, 3, 1, 2047, slow_pairs(PROSE_RANKS, 2048), CUT)
    two = Rows(documents[:1], 64, 5, 3, 2, 2047, slow_pairs(PROSE_RANKS, 2048), CUT)
    masks = [is_cut(part, epoch)[0] for part in (one, two) for epoch in epochs]
    total = one.num_cut
    assert {int(mask.sum()) for mask in masks} == {total} and total > 100
    can = int((slow_pairs(PROSE_RANKS, 2048)[documents[0], 0] >= 0).sum())
    for i, mask in enumerate(masks):
        for other in masks[:i]:     # by chance CUT of them are the same
            assert (mask & other).sum() == pytest.approx(total ** 2 / can, rel=0.25)
    again, _ = cut_rows()
    for step in (5, 0, 3):
        assert all(map(torch.equal, again.step(step), cut_rows()[0].step(step)))


def test_rows_without_cuts_do_not_need_pairs():
    """And the documents' and rows' order is the same with cuts or without."""
    rows, documents = cut_rows(cut=0.0)
    plain = Rows(documents, 64, 5, 3, 1, 2047)
    assert rows.num_cut == 0 and rows.num_steps == plain.num_steps
    for step in range(rows.num_steps):
        assert all(map(torch.equal, rows.step(step), plain.step(step)))
    assert plain.stream.dtype == np.uint16
    cut, _ = cut_rows()
    assert cut.rows_per_epoch > plain.rows_per_epoch
    cut.load(1)
    plain.load(1)
    assert cut.targets[cut.targets >= 0].tolist() == plain.stream.tolist()
