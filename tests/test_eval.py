"""tools/eval.py on small finished runs, against losses computed token by token.

    python -m pytest tests/test_eval.py
"""
import base64
import copy
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
from helpers import (ROOT, TOY, clean_environment, complaint, main, make_dataset, python, read_run,
                     said, train)
from shards import write_meta, write_shard
from train_gpt import GPT, make_config

PROSE = ROOT / "data/prose"
PROSE_BOS = 2047
META = json.loads((PROSE / "meta.json").read_text(encoding="utf-8"))
RANKS = {int(rank): base64.b64decode(string) for string, rank in
         map(bytes.split, (PROSE / "ranks.tiktoken").read_bytes().splitlines())}


# ==== Runs, datasets and a slow reference =======================================================
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`taught`: three members teach a fourth, all remember their row; `plain`: two untaught ones,
    without memory, and the learned mixture is declared."""
    folder = tmp_path_factory.mktemp("runs")
    taught = train(folder, "--track=cpu", "--num_models=4", "--kd_from=4", "--row_memory=true")
    plain = train(folder, "--track=cpu", "--num_models=2", "--kd_alpha=0", "--row_memory=false",
                  "--final_mixture=learned", "--softcap=5", "--dropout=0.2")
    return SimpleNamespace(taught=taught, plain=plain)


def documents_of(split):
    """[int64 tokens] of the documents of a split of data/prose, BOS first."""
    content = (PROSE / f"prose_{split}_000000.bin").read_bytes()[1024:]
    tokens = np.frombuffer(content, "<u2").astype(np.int64)
    return np.split(tokens, np.flatnonzero(tokens == PROSE_BOS)[1:])


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A dataset in the tokens of data/prose, without holdout and tokens.npz: two shards of val with
    an empty document, two documents of train and parts of others; three sources."""
    folder = tmp_path_factory.mktemp("other")
    train_documents, val = documents_of("train"), documents_of("val")
    shards = [[val[3][:150], val[4][:1], train_documents[1], val[5][:90]],
              [val[6][:77], train_documents[0], val[7][:40]]]
    write_other(folder, shards, {"val_000000": [0, 1, 2, 1], "val_000001": [0, 2, 0]})
    return SimpleNamespace(folder=folder, documents=[d for shard in shards for d in shard],
                           sources="letters,x,novel,verse,letters,novel,letters".split(","))


def write_other(folder, shards, sources, **changes):
    splits = {f"val_{i:06d}": write_shard(folder / f"other_val_{i:06d}.bin",
                                          np.concatenate(documents), 2048, PROSE_BOS)
              for i, documents in enumerate(shards)}
    shutil.copy(PROSE / "ranks.tiktoken", folder)
    write_meta(folder, {"splits": splits, "vocab_size": 2048, "bos_id": PROSE_BOS,
                        "sources": ["letters", "verse", "novel"], "document_sources": sources,
                        **changes})


def numbers_of(tmp_path, run, *arguments):
    """{(dataset, split): numbers} that eval.py writes, and what it prints."""
    path = tmp_path / "numbers.json"
    path.unlink(missing_ok=True)
    console = said(evaluation, run.folder, *arguments, f"--out={path}", "--device=cpu")
    found = json.loads(path.read_text())
    return {(part["dataset"], part["split"]): part for part in found["evaluations"]}, console


def config_of(run):
    settings = run.result["config"]
    values = {name: tuple(map(tuple, value)) if isinstance(value, list) else value
              for name, value in settings.items()}
    return make_config(values.pop("track"), **values)


def slow_models(run):
    """The members of a run as models that compute in float64."""
    models = []
    for number in range(1, 1 + len(run.result["members"])):
        model = GPT(config_of(run), torch.float64).double().eval()
        model.load_state_dict({name: p.double() for name, p in load_file(
            run.folder / f"members/{number:03d}.safetensors").items()})
        models.append(model)
    return models


@torch.no_grad()
def slow_row(model, inputs, targets):
    """log p [T] of the targets of one row: the softmax of each position in turn, over all tokens
    and, with memory, the positions before it, which stand for what came after them."""
    config = model.config
    hidden = model(torch.from_numpy(inputs).unsqueeze(0))[0].numpy()
    head = model.head.weight.detach().numpy()[:config.vocab_size]
    found = []
    for t, target in enumerate(targets):
        logits = head @ hidden[t]
        if config.softcap:
            logits = config.softcap * np.tanh(logits / config.softcap)
        weights = np.exp(logits)
        total = weights.sum()
        right = weights[target]
        for i in range(t if config.row_memory else 0):
            weight = math.exp(hidden[t] @ hidden[i] / math.sqrt(config.model_dim))
            total += weight
            right += weight * (targets[i] == target)
        found.append(math.log(right / total))
    return np.array(found)


def slow_logps(run, tokens):
    """[K, n] log p of all tokens but the first: rows one after the other."""
    size = run.result["config"]["seq_len"]
    return np.array([np.concatenate([
        slow_row(model, tokens[start:start + size][:len(tokens) - 1 - start],
                 tokens[start + 1:start + size + 1])
        for start in range(0, len(tokens) - 1, size)]) for model in slow_models(run)])


def slow_strided(run, tokens):
    """The same, each token from a row of its own: the earliest of those that begin at multiples of
    half a row and in which half a row stands before it."""
    size = run.result["config"]["seq_len"]
    half = size // 2
    found = []
    for model in slow_models(run):
        rows = {}
        for target in range(len(tokens) - 1):
            start = max(0, target // half - 1) * half
            if start not in rows:
                inputs = tokens[start:start + size][:len(tokens) - 1 - start]
                rows[start] = slow_row(model, inputs, tokens[start + 1:start + size + 1])
            found.append(rows[start][target - start])
    return np.array(found).reshape(len(run.result["members"]), -1)


def slow_losses(run, logps):
    """{name: loss} of log p [K, n]."""
    weights = np.array(run.result["ensemble"][-1]["weights_learned"])
    losses = {"uniform": -np.log(np.exp(logps).mean(axis=0)).mean(),
              "learned": -np.log(weights @ np.exp(logps)).mean()}
    return losses | {"declared": losses[run.result["final_mixture"]],
                     "members": [-logp.mean() for logp in logps]}


def assert_losses(numbers, losses, tolerance=1e-5):
    for name, loss in losses.items():
        np.testing.assert_allclose(numbers[name], loss, atol=tolerance, rtol=0)


# ==== The numbers ===============================================================================
@pytest.mark.parametrize("name", ["taught", "plain"])
def test_losses_of_own_dataset_are_those_of_the_run(name, runs, tmp_path):
    run = getattr(runs, name)
    found, console = numbers_of(tmp_path, run)
    assert list(found) == [("data/prose", "val"), ("data/prose", "holdout")]
    last = run.result["ensemble"][-1]
    for split in ("val", "holdout"):
        part = found["data/prose", split]
        assert_losses(part["record"], {
            "members": [member[f"{split}_loss"] for member in run.result["members"]],
            "uniform": last[f"{split}_loss"], "learned": last[f"{split}_loss_learned"],
            "declared": run.result[f"{split}_loss"]})
        assert part["known_tokens"] == 0 and "strided" not in part
    bits = found["data/prose", "val"]["record"]["bits_per_byte"]
    assert bits == pytest.approx(run.result["val_bpb"], abs=1e-5)
    assert "note" not in console


@pytest.mark.parametrize("name", ["taught", "plain"])
def test_losses_are_those_of_full_distributions(name, runs, other, tmp_path):
    run = getattr(runs, name)
    tokens = np.concatenate([d for d in other.documents if len(d) > 1])[:400]
    found, _ = numbers_of(tmp_path, run, other.folder, "--eval_tokens=400", "--strided")
    assert list(found) == [(str(other.folder), "val")]
    part = found[str(other.folder), "val"]
    assert part["record"]["tokens"] == part["strided"]["tokens"] == 399
    assert_losses(part["record"], slow_losses(run, slow_logps(run, tokens)))
    assert_losses(part["strided"], slow_losses(run, slow_strided(run, tokens)))
    assert part["record"]["declared"] != part["strided"]["declared"]


@pytest.mark.parametrize("seq_len", [5, 6])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 23])
def test_strided_scores_look_back_half_a_row_and_score_each_token_once(seq_len, count):
    tokens = np.arange(100, 101 + count)

    def score(tokens, bos):
        """Instead of log p: the token, and after the point how many stand before it in its row."""
        seen = 1 + np.arange(len(tokens) - 1) % seq_len
        return tokens[1:] + seen / 100

    trainer = SimpleNamespace(config=SimpleNamespace(seq_len=seq_len), score=score)
    scored = evaluation.look_back(score(tokens, 0), trainer, tokens, 0)
    assert np.array_equal(scored.astype(int), tokens[1:])
    seen = np.round(100 * (scored % 1)).astype(int)
    start = min(count, seq_len // 2)
    assert list(seen[:start]) == list(range(1, start + 1))
    assert (seen[start:] > seq_len // 2).all() and (seen <= seq_len).all()


def test_bits_per_byte_are_of_the_text_that_is_scored(runs, other, tmp_path):
    """With sizes from tokens.npz (data/prose) and from the ranks (the other one)."""
    found, _ = numbers_of(tmp_path, runs.plain, PROSE, other.folder, "--eval_tokens=700",
                          "--split=val")
    streams = {str(PROSE): np.concatenate(documents_of("val")),
               str(other.folder): np.concatenate([d for d in other.documents if len(d) > 1])}
    for name, tokens in streams.items():
        text = b"".join(RANKS.get(token, b"") for token in tokens[1:700].tolist())
        numbers = found[name, "val"]["record"]
        bits = 699 * numbers["declared"] / math.log(2)
        assert numbers["bytes"] == len(text)
        assert numbers["bits_per_byte"] == pytest.approx(bits / len(text), rel=1e-9)


def test_sources_have_the_losses_of_their_documents_and_add_up_to_the_whole(runs, other, tmp_path):
    found, console = numbers_of(tmp_path, runs.plain, other.folder, "--eval_tokens=0")
    numbers = found[str(other.folder), "val"]["record"]
    kept = [(d, source) for d, source in zip(other.documents, other.sources) if len(d) > 1]
    tokens = np.concatenate([document for document, _ in kept])
    logp = slow_logps(runs.plain, tokens)[1]
    sums, place = {}, 0
    for document, source in kept:           # what is predicted from each token of the document
        sums.setdefault(source, []).extend(logp[place:place + len(document)])
        place += len(document)
    assert set(numbers["sources"]) == set(sums) == {"letters", "verse", "novel"}
    for source, parts in sums.items():
        part = numbers["sources"][source]
        assert part["tokens"] == len(parts)
        assert part["members"][1] == pytest.approx(-np.mean(parts), abs=1e-5)
        assert any(line.split()[:3] == [source, f"{part['tokens']:,}", f"{part['declared']:.4f}"]
                   for line in console.splitlines())
    for name in ("uniform", "learned", "declared"):
        whole = sum(part["tokens"] * part[name] for part in numbers["sources"].values())
        assert whole == pytest.approx(numbers["tokens"] * numbers[name], rel=1e-9)
    assert sum(part["bytes"] for part in numbers["sources"].values()) == numbers["bytes"]


def test_works_of_prose_have_their_titles(runs, tmp_path):
    found, _ = numbers_of(tmp_path, runs.plain, "--eval_tokens=3000")
    titles = {work["key"]: work["title"] for entry in META["provenance"]
              for work in entry["works"]}
    for split in ("val", "holdout"):
        counts, left = {}, 2999
        for letter, document in zip(META["document_works"][f"{split}_000000"],
                                    documents_of(split)):
            if left:
                taken = min(left, len(document))
                counts[titles[letter]] = counts.get(titles[letter], 0) + taken
                left -= taken
        numbers = found["data/prose", split]["record"]
        assert {name: part["tokens"] for name, part in numbers["sources"].items()} == counts


def test_table_has_the_largest_of_many_sources(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "SHOWN_SOURCES", 2)
    found, console = numbers_of(tmp_path, runs.plain, "--eval_tokens=3000")
    sizes = {}
    for part in found.values():
        for name, numbers in part["record"]["sources"].items():
            sizes[name] = sizes.get(name, 0) + numbers["tokens"]
    assert len(sizes) > 2
    table = console.partition("by source")[2].splitlines()[2:]
    largest = sorted(sizes, key=sizes.get, reverse=True)
    assert [line[:len(name)] for line, name in zip(table, largest[:2])] == largest[:2]
    assert table[2:] == [f"{len(sizes) - 2} smaller ones: --out"]


def test_what_a_taught_member_keeps_of_the_gain(runs, tmp_path):
    found, console = numbers_of(tmp_path, runs.taught, "--strided")
    shown = [line.split()[3:] for line in console.splitlines() if line.startswith("member 4 keeps")]
    expected = []
    for split in ("val", "holdout"):
        losses = [member[f"{split}_loss"] for member in runs.taught.result["members"]]
        three = runs.taught.result["ensemble"][2][f"{split}_loss"]
        expected.append((losses[0] - losses[3]) / (losses[0] - three))
        numbers = found["data/prose", split]["record"]
        assert numbers["untaught"] == pytest.approx(three, abs=1e-5)
        assert numbers["kept"] == {"4": pytest.approx(expected[-1], abs=2e-3)}
    assert len(shown) == 2 and shown[0] == [
        f"{found['data/prose', split]['record']['kept']['4']:.1%}" for split in ("val", "holdout")]
    assert "member 4, taught" in console and "member 3, taught" not in console


def test_nothing_is_kept_where_nobody_is_taught_or_nothing_is_gained(runs, tmp_path):
    found, console = numbers_of(tmp_path, runs.plain)
    assert all(part["record"]["kept"] == {} for part in found.values())
    assert "keeps" not in console and "taught" not in console
    config = config_of(runs.taught)
    assert evaluation.kept_gains({"members": [5, 5, 5, 4], "untaught": 5.1}, config) == {}
    logps = np.log([[0.5, 0.2], [0.3, 0.4], [0.3, 0.1], [0.2, 0.2]])
    for first_taught, has_some in ((2, False), (3, True), (5, False)):
        changed = replace(config, kd_from=first_taught)
        mixtures = evaluation.mixtures_of(logps, runs.taught.result, changed)
        assert ("untaught" in mixtures) == has_some


def test_documents_that_the_run_was_trained_on_are_counted(runs, other, tmp_path):
    """Of train the first document is `selection`; the budget of 5,000 ends within a document."""
    documents = documents_of("train")
    ends = np.cumsum([len(document) for document in documents])
    last = int(np.searchsorted(ends, 5000))
    assert ends[0] >= 1000 and last > 1 and ends[last] > 5000
    found, console = numbers_of(tmp_path, runs.plain, other.folder, "--eval_tokens=0")
    part = found[str(other.folder), "val"]
    assert part["known_tokens"] == len(documents[1])
    assert f"{part['known_tokens'] / part['record']['tokens']:.1%} of the tokens" in console
    found, _ = numbers_of(tmp_path, runs.plain, PROSE, "--split=train", "--eval_tokens=9000")
    assert found[str(PROSE), "train"]["known_tokens"] == ends[last] - ends[0]


# ==== The command ===============================================================================
def test_command_as_a_stranger_types_it(runs, other, tmp_path):
    out = tmp_path / "deep/numbers.json"
    done = python(ROOT / "tools/eval.py", runs.plain.folder, other.folder, PROSE, f"--out={out}",
                  cwd=tmp_path, env=clean_environment())
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in out.parent.iterdir()] == ["numbers.json"]
    numbers = json.loads(out.read_text())
    assert numbers["run"] == str(runs.plain.folder) and numbers["final_mixture"] == "learned"
    splits = [(part["dataset"], part["split"]) for part in numbers["evaluations"]]
    assert splits == [(str(other.folder), "val"), (str(PROSE), "val"), (str(PROSE), "holdout")]
    prose = [part["record"] for part in numbers["evaluations"][1:]]
    lines = [line.split() for line in done.stdout.splitlines()]
    for label, values in (
            ("member 1", [part["members"][0] for part in prose]),
            ("uniform", [part["uniform"] for part in prose]),
            ("learned, declared", [part["learned"] for part in prose]),
            ("bits per byte", [part["bits_per_byte"] for part in prose])):
        assert label.split() + [f"{value:.4f}" for value in values] in lines
    assert not any(line != line.rstrip() for line in done.stdout.splitlines())


def copied(run, folder, changes=None, **config):
    """A copy of a run in `folder`, with `changes` of its result and of its config."""
    shutil.copytree(run.folder, folder)
    result = {**run.result, **(changes or {}), "config": {**run.result["config"], **config}}
    (folder / "result.json").write_text(json.dumps(result))
    return SimpleNamespace(folder=folder, result=result)


def test_run_that_has_its_tokenizer_needs_no_dataset(runs, other, tmp_path):
    run = copied(runs.plain, tmp_path / "run", dataset=str(tmp_path / "gone"))
    shutil.rmtree(run.folder / "tokenizer", ignore_errors=True)
    assert "its tokens are not known" in complaint(evaluation, run.folder, other.folder)
    (run.folder / "tokenizer").mkdir()
    for name in ("meta.json", "ranks.tiktoken"):
        shutil.copy(PROSE / name, run.folder / "tokenizer")
    found, console = numbers_of(tmp_path, run, other.folder)
    expected, _ = numbers_of(tmp_path, runs.plain, other.folder)
    part = found[str(other.folder), "val"]
    assert part["record"] == expected[str(other.folder), "val"]["record"]
    assert part["known_tokens"] is None and "is not known" in console


def test_members_that_are_means_over_epochs_are_told(runs, tmp_path):
    run = copied(runs.plain, tmp_path / "run", average_epochs=3, num_epochs=3)
    assert "mean of each member's last 3 epochs" in said(evaluation, run.folder)
    shutil.rmtree(run.folder)
    run = copied(runs.plain, tmp_path / "run", average_epochs=3, average="weights")
    assert "last 3 epochs" not in said(evaluation, run.folder)


def test_run_without_selection_has_no_learned_mixture(tmp_path):
    code, _, err = main(*TOY, "--track=cpu", "--num_layers=1", "--num_models=2", "--num_epochs=1",
                        "--train_tokens=600", "--selection_tokens=0", "--eval_tokens=200",
                        f"--runs_dir={tmp_path}", "--run_id=r")
    assert code == 0, err
    found, console = numbers_of(tmp_path, read_run(tmp_path / "r"))
    assert "learned" not in found["data/prose", "val"]["record"] and "learned" not in console


def test_datasets_without_ranks_are_of_one_vocabulary_by_their_numbers(tmp_path):
    data = make_dataset(tmp_path / "small")
    code, _, err = main(*TOY, "--track=cpu", f"--dataset={data}", "--vocab_size=100",
                        "--train_tokens=900", "--selection_tokens=100", "--eval_tokens=0",
                        "--num_layers=1", "--num_models=1", "--num_epochs=1", "--spelling=false",
                        "--split_tokens=0", f"--runs_dir={tmp_path}", "--run_id=r")
    assert code == 0, err
    run = read_run(tmp_path / "r")
    found, console = numbers_of(tmp_path, run)
    assert found[str(data), "val"]["record"]["uniform"] == pytest.approx(
        run.result["val_loss"], abs=1e-5)
    assert found[str(data), "val"]["record"]["bits_per_byte"] == pytest.approx(
        run.result["val_bpb"], abs=1e-5)
    assert "by source" not in console
    bare = make_dataset(tmp_path / "bare", tables=False)
    found, console = numbers_of(tmp_path, run, bare)
    assert found[str(bare), "val"]["record"]["bits_per_byte"] is None
    assert ["bits", "per", "byte", "n/a", "n/a"] in [line.split() for line in console.splitlines()]


# ==== Refusals ==================================================================================
def changed_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    write_meta(folder, {**meta, **changes})


@pytest.mark.parametrize("changes, message", [
    ({"vocab_size": 100}, "vocab_size is 100, not 2048"),
    ({"bos_id": 0}, "bos is 0, not 2047"),
    ({"pattern": "a|b"}, "pattern is 'a|b'"),
    ({"ranks": "none.tiktoken"}, "no file of ranks with this dataset"),
    ({"document_sources": {"val_000000": [0, 1, 1], "val_000001": [0, 0, 0]}},
     "sources of 3 documents of val_000000, which has 4"),
    ({"document_sources": {"val_000000": [0, 1, 1, 9]}}, "sources of val_000000 cannot be read"),
    ({"sources": None}, "sources of val_000000 cannot be read"),
    ({"splits": {"val_000002": {}}}, "val_000002, which meta.json lists, is missing"),
    ({"splits": {"val_000000": {"sha256": "0"}}}, "other_val_000000.bin: damaged")])
def test_dataset_that_does_not_fit_is_one_line(changes, message, runs, other, tmp_path):
    folder = shutil.copytree(other.folder, tmp_path / "data")
    changed_meta(folder, **changes)
    error = complaint(evaluation, runs.plain.folder, folder, f"--out={tmp_path / 'out.json'}")
    assert message in error and str(folder) in error
    assert not (tmp_path / "out.json").exists()


def test_other_ranks_are_refused(runs, other, tmp_path):
    folder = shutil.copytree(other.folder, tmp_path / "data")
    path = folder / "ranks.tiktoken"
    lines = path.read_bytes().splitlines()
    lines[300], lines[301] = (lines[b].split()[0] + b" " + lines[a].split()[1]
                              for a, b in ((300, 301), (301, 300)))
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert "their ranks differ" in complaint(evaluation, runs.plain.folder, folder)
    path.write_bytes(b"no ranks")
    assert f"{path}: no ranks of tokens" in complaint(evaluation, runs.plain.folder, folder)


def test_run_whose_dataset_has_other_tokens_by_now_is_refused(runs, other, tmp_path):
    folder = shutil.copytree(PROSE, tmp_path / "data")
    run = copied(runs.plain, tmp_path / "run", dataset=str(folder))
    shutil.rmtree(run.folder / "tokenizer", ignore_errors=True)
    assert said(evaluation, run.folder, other.folder)
    np.savez(folder / "tokens.npz", **{**np.load(folder / "tokens.npz"), "more": 1})
    assert "not those that" in complaint(evaluation, run.folder, other.folder)


def test_what_cannot_be_evaluated_is_one_line(runs, other, tmp_path):
    run = runs.plain.folder
    taken = tmp_path / "taken.json"
    taken.write_text("{}")
    mixed = copied(runs.plain, tmp_path / "mixed", {"runs": ["runs/a", "runs/b"]})
    torn = copied(runs.plain, tmp_path / "torn")
    (torn.folder / "members/002.safetensors").write_bytes(b"torn")
    for arguments, message in (
            ((tmp_path / "nowhere",), "no finished run"),
            ((run, tmp_path / "nowhere"), "it has no meta.json with 'vocab_size'"),
            ((run, other.folder, "--split=val,holdout"), "no holdout shards"),
            ((run, other.folder, "--split=train"), "no train shards"),
            ((run, "--split=test"), "unknown split 'test'"),
            ((run, "--split=val,"), "unknown split ''"),
            ((run, "--eval_tokens=-1"), "--eval_tokens=-1"),
            ((run, f"--out={taken}"), "is there already"),
            ((mixed.folder,), "runs/a, runs/b"),
            ((torn.folder,), "002.safetensors: damaged")):
        assert message in complaint(evaluation, *arguments)
    assert taken.read_text() == "{}"
    shutil.rmtree(tmp_path / "mixed")
    empty = shutil.copytree(other.folder, tmp_path / "empty")
    for path in empty.glob("*.bin"):
        path.unlink()
    changed_meta(empty, splits={})
    assert "no val and no holdout shards" in complaint(evaluation, run, empty)


def test_compiler_and_teacher_are_not_needed(runs, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("not needed")
    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(copy, "deepcopy", fail)
    assert said(evaluation, runs.taught.folder, "--split=val")
