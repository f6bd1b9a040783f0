"""Whole runs of train_gpt.py, as a user meets them: what they print and write, and what does and
does not change their numbers; the script copied alone, and run again from nothing but a log.

    python -m pytest tests/test_run.py
"""
import ast
import base64
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_gpt
from helpers import (
    PLAIN, ROOT, SCRIPT, TINY, TOY, VOCAB, clean_environment, last_of_each, logits_of, losses, main,
    make_dataset, python, read_run, saved_logps, torchrun, train)
from shards import read_shard
from train_gpt import GPT, Log, as_text, make_config

PROSE = ROOT / "data/prose"
PROSE_BOS = 2047
END_OF_SOURCE = re.compile(r"^={40} end of train_gpt\.py\n", re.M)


def mixture_loss(logps, weights=None):
    """Nats per token of a mixture of models, the obvious way; weights [k]."""
    p = np.exp(logps)
    weights = np.full(len(p), 1 / len(p)) if weights is None else weights
    return -np.log(weights @ p).mean()


def kl(run, member):
    return [m["kl"] for m in run.steps if m["member"] == member]


def declared_number(run):
    return run.result["val_loss"], run.result["holdout_loss"]


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


# ==== A whole run on prose, in a process of its own =============================================
@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    """Three members of 15 steps, with distillation."""
    runs = tmp_path_factory.mktemp("runs")
    done = python(SCRIPT, "--track=cpu", *TOY, "--seed=1", "--dtype=float32", "--log_steps=5",
                  "--train_tokens=9000", "--selection_tokens=1000", "--eval_tokens=2000",
                  "--seq_len=64", "--batch_rows=8", "--num_models=3", "--num_epochs=1",
                  "--kd_alpha=0.5", "--final_mixture=learned", "--num_layers=2",
                  "--model_dim=64", "--dropout=0.1", *PLAIN, f"--runs_dir={runs}")
    assert (done.returncode, done.stderr) == (0, "")
    folder, = runs.iterdir()
    return read_run(folder, done.stdout)


def prose_tokens(split):
    """uint16 of the run on prose: the whole budget (train), or the part that is scored."""
    tokens = np.asarray(read_shard(PROSE / f"prose_{split}_000000.bin")[0])
    return tokens[:9_000 if split == "train" else 2_000]


def selected_tokens():
    """How many tokens of the budget are selection: whole documents, until it has 1,000."""
    starts = np.flatnonzero(prose_tokens("train") == PROSE_BOS)
    return int(starts[starts >= 1_000].min())


def test_folder_is_named_by_track_settings_and_seed(prose):
    assert prose.folder.name.startswith("cpu_presettoy_devicecpu_dtypefloat32_")
    assert prose.folder.name.endswith("_seed1") and len(prose.folder.name) < 90
    assert {path.name for path in files(prose.folder)} == {
        "run.json", "lock", "log.txt", "metrics.jsonl", "result.json", "meta.json", "ranks.tiktoken",
        *(f"{k:03d}{kind}.safetensors" for k in (1, 2, 3) for kind in ("", ".logp"))}


def test_console_begins_with_the_plan(prose):
    plan = prose.console.partition("\n\n")[0]
    lines = dict(re.findall(r"^(\S+) +(.*(?:\n {10}.*)*)", plan, re.M))
    assert list(lines) == ["track", "settings", "data", "model", "steps", "machine", "folder"]
    assert lines["track"] == "cpu: 3 model(s) x 1 epochs"
    assert "num_layers=2" in lines["settings"] and "final_mixture=" in lines["settings"]
    assert re.match(r"\S+M parameters, 2 blocks of width 64; \S+ then \S+ FLOPs a token$",
                    lines["model"])
    assert lines["machine"].startswith(prose.result["hardware"])
    assert f"torch {torch.__version__}, torch.float32" in lines["machine"]
    assert lines["machine"].endswith("compile off")
    assert lines["folder"] == os.path.relpath(prose.folder)


def test_console_goes_on_with_progress_members_and_table(prose):
    rest = prose.console.partition("\n\n")[2]
    for k in (1, 2, 3):
        member, mixed = (prose.result[part][k - 1] for part in ("members", "ensemble"))
        val = f"{member['val_loss']:.4f}"
        assert re.search(rf"^member {k}/3  step (\d+)/\1  epoch 1.0/1  loss \d.* tok/s", rest, re.M)
        line, = re.findall(rf"^member {k}/3 done in .*$", rest, re.M)
        assert line.endswith(f"val loss {val}, ensemble of {k}: {mixed['val_loss']:.4f}")
        row, = re.findall(rf"^ {k}  .*$", rest, re.M)
        columns = ("val_loss", "val_loss_learned", "holdout_loss")
        assert row.split() == [str(k), val, *(f"{mixed[column]:.4f}" for column in columns)]
    header, = re.findall("^ n    member .*", rest, re.M)
    assert header.partition("(")[0].split() == ["n", "member", "ensemble", "learned", "holdout"]
    assert f"val loss {prose.result['val_loss']:.4f} (learned mixture)" in rest
    assert f"{prose.result['val_bpb']:.4f} bits per byte" in rest
    assert re.search(r"^data efficiency  n/a$", rest, re.M)     # of a part of val
    assert "\ndata      a part of val is scored" in prose.console
    assert max(len(line) for line in rest.splitlines() if not line.startswith("folder")) <= 120


def test_console_ends_with_the_table_and_the_folder(prose):
    """No text is written by a run: tools/sample.py does that."""
    lines = prose.console.splitlines()
    assert lines[-1] == f"folder           {os.path.relpath(prose.folder)}"
    table = lines[lines.index(next(line for line in lines if line.startswith(" n    member"))):]
    assert [line.partition("  ")[0] for line in table] == [
        " n", " 1", " 2", " 3", "", "result", "data efficiency", "time", "speed", "folder"]
    assert "writes" not in prose.console


def test_budget_holds_training_and_selection(prose):
    pattern = r"data/prose: (\S+) tokens an epoch in (\d+) documents; selection (\S+), val"
    told = re.search(pattern, prose.console).groups()
    epoch, documents, selection = (int(number.replace(",", "")) for number in told)
    assert selection == selected_tokens()
    assert epoch + selection == prose.result["train_tokens"] == 9_000
    assert documents == (prose_tokens("train")[selection:] == PROSE_BOS).sum()
    scored = {split: len(logp) + 1 for split, logp in saved_logps(prose)[0].items()}
    assert scored == {"selection": selection, "val": 2_000, "holdout": 2_000}


def split_log(log):
    """(the source, the rest) of log.txt."""
    source, rest = END_OF_SOURCE.split(log)
    return source.removesuffix("\n"), rest


def facts_of(log):
    """{name: value} of the lines `name:JSON` between the source and the plan."""
    lines = split_log(log)[1].partition("\ntrack ")[0].splitlines()
    pairs = [line.split(":", maxsplit=1) for line in lines]
    return {name: json.loads(value) for name, value in pairs}


def test_log_begins_with_the_source(prose):
    source, _ = split_log(prose.log)
    assert source == Path(SCRIPT).read_text(encoding="utf-8")


def test_log_goes_on_with_facts_and_what_the_console_said(prose):
    facts, result = facts_of(prose.log), prose.result
    for name in ("torch", "hardware", "data_sha256", "config", "overrides", "seed", "processes"):
        assert facts[name] == result[name]
    assert facts["numpy"] == np.__version__
    assert facts["python"] == sys.version.split()[0]
    rest = split_log(prose.log)[1].splitlines()
    said = [line for line in prose.console.splitlines() if not re.match(r"member \d/3  step", line)]
    assert [line for line in rest if line in said] == said


def test_log_has_the_metrics_and_the_result_before_its_table(prose):
    lines = prose.log.splitlines()
    steps = [line for line in lines if re.match(r"member:\d step:", line)]
    assert len(steps) == len(prose.steps)
    for line, step in zip(steps, prose.steps):
        pairs = dict(pair.split(":") for pair in line.split())
        assert {k: float(v) for k, v in pairs.items()} == pytest.approx(step, rel=1e-5)
    told, = (i for i, line in enumerate(lines) if line.startswith("RESULT "))
    assert json.loads(lines[told].partition(" ")[2]) == prose.result
    assert lines[told + 1:] == prose.console.splitlines()[1 - len(lines) + told:]
    assert lines[told + 1] == "" and lines[told + 2].startswith(" n    member ")
    assert lines[told - 1].startswith("member 3/3 done in ")


def test_metrics_have_every_reading_and_member(prose):
    rows = math.ceil((9_000 - selected_tokens() - 1) / 64)
    steps = math.ceil(rows / 8)
    readings = sorted({*range(5, steps, 5), steps})     # every fifth step and the last
    assert len(readings) >= 3
    assert [(m["member"], m["step"]) for m in prose.steps] == [
        (k, step) for k in (1, 2, 3) for step in readings]
    for m in prose.steps:
        assert m["epoch"] == pytest.approx(min(1, m["step"] * 8 / rows), abs=1e-3)
        assert math.isfinite(m["train_loss"]) and 0 < m["lr_multiplier"] <= 1
        assert m["tokens_per_second"] > 0
    assert kl(prose, 1) == [0] * len(readings)
    assert min(kl(prose, 2) + kl(prose, 3)) > 0
    seconds = [m["seconds"] for m in prose.steps]
    assert seconds == sorted(seconds)
    last = [m["train_loss"] for m in prose.steps if m["step"] == steps]
    assert last == [m["train_loss"] for m in prose.result["members"]]
    ends = [m for m in prose.metrics if "step" not in m]
    assert [m["val_loss"] for m in ends] == [m["val_loss"] for m in prose.result["members"]]
    assert [m["ensemble_val_loss"] for m in ends] == pytest.approx(
        [point["val_loss"] for point in prose.result["ensemble"]], abs=1e-12)


def test_result_says_what_was_run_and_what_it_cost(prose):
    result = prose.result
    assert result["track"] == "cpu" and result["seed"] == 1 and result["processes"] == 1
    assert result["overrides"] == {
        "preset": "toy", "device": "cpu", "seed": 1, "dtype": "float32", "log_steps": 5,
        "train_tokens": 9_000, "selection_tokens": 1_000, "eval_tokens": 2_000, "seq_len": 64,
        "batch_rows": 8, "num_models": 3, "num_epochs": 1, "kd_alpha": 0.5,
        "final_mixture": "learned", "num_layers": 2, "model_dim": 64, "dropout": 0.1,
        "spelling": False, "split_tokens": 0, "row_memory": False,
        "runs_dir": str(prose.folder.parent)}
    assert result["config"].items() >= {**result["overrides"], "track": "cpu"}.items()
    assert result["data_sha256"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                                     for path in (*PROSE.glob("*.bin"), PROSE / "tokens.npz")}
    assert result["changes"] == [] and not {"format", "others"} & set(result)
    of_members = [member["train_seconds"] for member in result["members"]]
    assert min(of_members) > 0
    assert result["train_seconds"] == pytest.approx(sum(of_members), abs=0.01)
    assert 0 < result["train_seconds"] + result["eval_seconds"] <= result["wall_seconds"]
    assert result["compile_seconds"] == 0
    assert result["tokens_per_second"] > 0 and result["mfu"] is None    # unknown peak
    assert 2 ** 26 < result["peak_memory_bytes"] < 2 ** 33
    assert result["over_limit"] is False


def test_losses_are_those_of_the_saved_scores(prose):
    logps = saved_logps(prose)
    assert len(logps) == 3
    for member, scores in zip(prose.result["members"], logps, strict=True):
        for split, logp in scores.items():
            assert member[f"{split}_loss"] == pytest.approx(-logp.mean(), abs=1e-9)
    for n, point in enumerate(prose.result["ensemble"], 1):
        assert point["n"] == n
        for split in logps[0]:
            stack = [scores[split] for scores in logps[:n]]
            assert point[f"{split}_loss"] == pytest.approx(mixture_loss(stack), abs=1e-9)


def test_learned_mixtures_are_fitted_on_selection_alone(prose):
    """All is fitted again here, from the scores that are saved, by many steps of expectation
    maximization."""
    logps, last = saved_logps(prose), prose.result["ensemble"][-1]
    p, weights = np.exp([scores["selection"] for scores in logps]), np.full(3, 1 / 3)
    for _ in range(2_000):
        weights = (weights[:, None] * p / (weights @ p)).mean(axis=1)
    assert last["weights_learned"] == pytest.approx(weights, abs=0.02)
    for split in ("selection", "val", "holdout"):
        assert last[f"{split}_loss_learned"] == pytest.approx(
            mixture_loss([scores[split] for scores in logps], weights), abs=1e-4)
        assert prose.result[f"{split}_loss"] == last[f"{split}_loss_learned"]


def test_saved_weights_give_the_saved_scores(prose):
    """val is scored again, a row of seq_len at a time, with nothing of the script but the model."""
    tokens = torch.from_numpy(prose_tokens("val").astype(np.int64))
    model = GPT(make_config("cpu", **prose.result["overrides"])).eval()
    for k, saved in enumerate(saved_logps(prose), 1):
        model.load_state_dict(load_file(prose.folder / f"members/{k:03d}.safetensors"))
        parts = []
        for start in range(0, len(tokens) - 1, 64):
            row = tokens[start:start + 65]
            with torch.no_grad():
                logits = logits_of(model, model(row[None, :-1]))[0].double()
            parts.append(torch.log_softmax(logits, dim=1).gather(1, row[1:, None])[:, 0])
        assert np.abs(torch.cat(parts).numpy() - saved["val"]).max() < 1e-4


def test_bits_per_byte_by_hand(prose):
    """Of the tokens that are scored: all but the first, whose text has bytes but for BOS."""
    lines = (PROSE / "ranks.tiktoken").read_text(encoding="ascii").splitlines()
    table = {int(rank): base64.b64decode(text) for text, rank in map(str.split, lines)}
    tokens = prose_tokens("val")
    text_bytes = sum(len(table[token]) for token in tokens.tolist() if token != PROSE_BOS)
    nats_a_byte = prose.result["val_loss"] * (len(tokens) - 1) / text_bytes
    assert prose.result["val_bpb"] == pytest.approx(nats_a_byte / math.log(2), rel=1e-12)


# ==== What settings change ======================================================================
@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Settings of runs that take a fraction of a second; on random words, without tokens.npz."""
    folder = tmp_path_factory.mktemp("data") / "small"
    return [*small_settings(make_dataset(folder, tables=False)), *PLAIN]


def small_settings(dataset):
    return [f"--dataset={dataset}", f"--vocab_size={VOCAB}", "--train_tokens=3000",
            "--selection_tokens=500", "--eval_tokens=0"]


@pytest.fixture(scope="module")
def spelled(tmp_path_factory):
    """The same on the same words, with tokens.npz; rows that remember, of cut tokens whose strings
    are alike."""
    dataset = make_dataset(tmp_path_factory.mktemp("data") / "spelled")
    return [*small_settings(dataset), *BY_STRINGS]


BY_STRINGS = ["--spelling=true", "--split_tokens=0.3", "--row_memory=true"]
PAIR = ["--seed=1", "--num_models=2", "--kd_alpha=0.5", "--kd_from=2", "--dropout=0",
        "--device_batch_size=4", "--final_mixture=learned"]


@pytest.fixture(scope="module")
def pair(small, tmp_path_factory):
    """Two members, the second distilled from the first."""
    return train(tmp_path_factory.mktemp("pair"), *small, *PAIR)


def test_same_seed_same_bits_another_seed_others(pair, small, tmp_path):
    again, other = (train(tmp_path, *small, *PAIR, f"--seed={seed}") for seed in (1, 2))
    assert losses(again) == losses(pair)
    assert declared_number(again) == declared_number(pair)
    for path in pair.folder.glob("members/*.safetensors"):
        tensors = load_file(path)
        same = load_file(again.folder / "members" / path.name)
        assert all(torch.equal(same[name], tensors[name]) for name in tensors)
    everything = {m["val_loss"] for run in (pair, other) for m in run.result["members"]}
    assert len(everything) == 4         # members differ from each other, too


def test_without_distillation_the_second_member_is_another(pair, small, tmp_path):
    plain = train(tmp_path, *small, *PAIR, "--kd_alpha=0")
    ours, others = (run.result["members"] for run in (pair, plain))
    assert ours[0]["val_loss"] == others[0]["val_loss"]
    assert ours[1]["val_loss"] != others[1]["val_loss"]
    assert set(kl(plain, 2)) == {0} and min(kl(pair, 2)) > 0
    assert kl(pair, 1) == kl(plain, 1) == [0] * len(kl(pair, 1))


def test_distillation_alone_pulls_towards_the_teacher(pair, small, tmp_path):
    """kd_alpha=1: the student never sees a target, and still ends close to its teacher."""
    run = train(tmp_path, *small, *PAIR, "--kd_alpha=1")
    assert kl(run, 2)[-1] < kl(run, 2)[0] / 10
    teacher, student = (member["val_loss"] for member in run.result["members"])
    assert teacher == pair.result["members"][0]["val_loss"]
    assert student < teacher + 0.1 < math.log(VOCAB) - 0.5


@pytest.mark.parametrize("mixture, suffix", [("uniform", ""), ("learned", "_learned")])
def test_the_declared_mixture_is_the_result(mixture, suffix, pair, small, tmp_path):
    """It changes no training and no other number."""
    run = train(tmp_path, *small, *PAIR, f"--final_mixture={mixture}")
    assert run.result["ensemble"] == pair.result["ensemble"]
    assert losses(run) == losses(pair)
    last = run.result["ensemble"][-1]
    assert declared_number(run) == (last[f"val_loss{suffix}"], last[f"holdout_loss{suffix}"])
    assert last["val_loss"] != last["val_loss_learned"]
    assert f"val loss {run.result['val_loss']:.4f} ({mixture} mixture)" in run.console
    assert run.result["val_bpb"] is None and "nan bits per byte" in run.console     # no tokens.npz


def test_without_selection_nothing_is_fitted(small, tmp_path):
    run = train(tmp_path, *small, "--selection_tokens=0", "--num_models=2",
                "--final_mixture=uniform")
    assert set(run.result["ensemble"][0]) == {"n", "val_loss", "holdout_loss"}
    assert set(saved_logps(run)[0]) == {"val", "holdout"}
    assert run.result["val_loss"] == run.result["ensemble"][-1]["val_loss"]
    assert "3,000 tokens an epoch in 60 documents; val 400, holdout 400" in run.console
    assert "learned" not in re.search("^ n    member .*", run.console, re.M)[0]


def test_micro_batches_change_nothing_but_rounding(pair, small, tmp_path):
    run = train(tmp_path, *small, *PAIR, "--device_batch_size=1")
    assert "micro-batches of 1 row(s)" in run.console
    assert "micro-batches of 4 row(s)" in pair.console
    assert_same_training(pair, run)


TECHNIQUES = {
    "tiny": ["--track=tiny", "--num_models=2", "--kd_alpha=0.5", "--kd_from=2"],
    "limited": ["--track=limited", "--num_epochs=2", "--num_layers=4", "--batch_rows=8",
                "--xsa=true", "--final_mixture=learned", "--stochastic_depth=0.2"],
    "two_hour": ["--track=two_hour", "--num_epochs=2", "--num_layers=4", "--num_models=2",
                 "--kd_alpha=0.3",
                 "--key_offset=true", "--rope_fraction=0.5"],
    "unlimited": ["--track=unlimited", "--num_layers=3", "--num_models=4", "--batch_rows=8",
                  "--device_batch_size=8", "--average=weights", "--recurrence_from=0.5"],
    "cpu": ["--track=cpu", "--num_models=2", "--kd_alpha=0.5", "--kd_from=2", "--num_epochs=2",
            "--batch_rows=8", *BY_STRINGS],
}


@pytest.mark.parametrize("name", TECHNIQUES)
def test_techniques_of_tracks_and_others_together(name, small, spelled, tmp_path):
    run = train(tmp_path, *(spelled if name == "cpu" else small), *TECHNIQUES[name])
    config = run.result["config"]
    assert len(run.result["members"]) == config["num_models"]
    assert run.result["val_loss"] < math.log(VOCAB)
    assert run.steps[-1]["train_loss"] < run.steps[0]["train_loss"]
    taught = [m["kl"] > 0 for m in run.steps]
    assert taught == [bool(config["kd_alpha"]) and m["member"] >= config["kd_from"]
                      for m in run.steps]


# ==== What strings and rows tell ================================================================
def test_spelling_split_tokens_and_row_memory_each_change_a_run(pair, spelled, tmp_path):
    """The first member, which nobody teaches. Bits per byte are known with tokens.npz."""
    found = set()
    for i, on in enumerate(BY_STRINGS):
        run = train(tmp_path, *spelled, *PAIR, "--num_models=1", *PLAIN[:i], on, *PLAIN[i + 1:])
        found.add(run.result["members"][0]["val_loss"])
    plain = train(tmp_path, *spelled, *PAIR, "--num_models=1", *PLAIN)
    assert plain.result["members"][0]["val_loss"] == pair.result["members"][0]["val_loss"]
    assert len(found | {plain.result["members"][0]["val_loss"]}) == 4
    assert plain.result["val_bpb"] > 0
    hashes, others = (run.result["data_sha256"] for run in (plain, pair))
    assert set(hashes) - set(others) == {"tokens.npz"} and hashes.items() >= others.items()


def test_cut_tokens_make_more_steps(pair, spelled, tmp_path):
    """And the plan says how many."""
    run = train(tmp_path, *spelled, *PAIR, "--num_models=1")
    config, folder = run.result["config"], Path(run.result["config"]["dataset"])
    tables = np.load(folder / "tokens.npz")
    tokens = np.asarray(read_shard(folder / "small_train_000000.bin")[0])[500:3000]
    count = len(tokens) + round(0.3 * np.count_nonzero(tables["pairs"][tokens, 0] >= 0))
    rows = math.ceil((count - 1) / config["seq_len"]) * config["num_epochs"]
    steps = math.ceil(rows / config["batch_rows"])
    assert run.steps[-1]["step"] == steps > pair.steps[-1]["step"]
    assert f"steps     {steps:,} in " in run.console


def test_a_run_by_strings_that_is_stopped_ends_with_the_same_digits(spelled, tmp_path, monkeypatch):
    """In the second epoch of a member that is taught, with dropout and averaged weights."""
    arguments = [*TINY, *spelled, *PAIR, "--dropout=0.1", "--num_epochs=2", "--average=weights",
                 "--average_epochs=2", "--continue_members=true", "--save_minutes=0"]
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole = train(tmp_path / "whole", *arguments)
    steps = whole.steps[-1]["step"]
    metrics = Log.metrics

    def until_nearly_the_end(log, **numbers):
        metrics(log, **numbers)
        if (numbers["member"], numbers.get("step")) == (2, steps - 3):
            signal.raise_signal(signal.SIGTERM)

    arguments += [f"--runs_dir={tmp_path / 'stopped'}", "--run_id=run"]
    with monkeypatch.context() as patch:
        patch.setattr(Log, "metrics", until_nearly_the_end)
        code, _, err = main(*arguments)
    assert code == 143 and err.startswith(f"stopped   member 2 after step {steps - 3};")
    code, out, err = main(*arguments)
    assert (code, err) == (0, "") and f"resumed   member 2 after step {steps - 3}" in out
    stopped = read_run(tmp_path / "stopped/run")
    assert losses(stopped) == losses(whole)
    assert declared_number(stopped) == declared_number(whole)
    for path in whole.folder.glob("members/*.safetensors"):
        tensors, same = load_file(path), load_file(stopped.folder / "members" / path.name)
        assert tensors and all(torch.equal(same[name], tensors[name]) for name in tensors)


# ==== A run that is finished ====================================================================
def test_result_is_there_before_its_table_is_shown(pair, small, tmp_path, monkeypatch):
    """Whoever stops it there, or a terminal that is gone, loses nothing; it is shown again."""
    def gone(result):
        raise KeyboardInterrupt

    arguments = [*TINY, *small, *PAIR, f"--runs_dir={tmp_path}", "--run_id=run"]
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "result_lines", gone)
        assert main(*arguments)[0] == 130
    assert not (tmp_path / "run/state.safetensors").exists()
    run = read_run(tmp_path / "run")
    assert run.log.splitlines()[-1] == "RESULT " + json.dumps(run.result)
    assert losses(run) == losses(pair)
    code, out, err = main(*arguments)
    assert (code, err) == (0, "") and "this run is finished" in out and "\nresult  " in out


def pair_arguments(run, **changes):
    """The arguments that `run` was started with, by its result.json."""
    values = run.result["overrides"] | changes
    return [f"--{name}={as_text(value)}" for name, value in values.items()]


def test_finished_run_gets_more_members(pair, small, tmp_path):
    """By the real script; the longer run equals one that was begun with as many."""
    short = train(tmp_path, *small, *PAIR, "--num_models=1")
    first = (short.folder / "members/001.safetensors").stat().st_mtime_ns
    done = python(SCRIPT, *pair_arguments(short, num_models=2))
    assert (done.returncode, done.stderr) == (0, "")
    assert "changed   num_models=2 (was 1)" in done.stdout
    assert re.search("^member 1/2 was done in ", done.stdout, re.M)
    longer = read_run(short.folder, done.stdout)
    assert (short.folder / "members/001.safetensors").stat().st_mtime_ns == first
    assert losses(longer) == losses(pair)
    assert declared_number(longer) == declared_number(pair)
    assert longer.result["ensemble"] == pair.result["ensemble"]


# ==== Several processes =========================================================================
# looped from the second epoch on, with MTP, the meta-gradient and averaged probabilities
SHARED = ["--track=limited", *TOY, "--dtype=float32", "--dropout=0", "--batch_rows=16",
          "--seq_len=32", "--num_layers=3", "--model_dim=32", "--num_epochs=2", "--num_models=2",
          "--kd_alpha=0.5", "--meta_rows=2", "--log_steps=1"]


@pytest.fixture(scope="module")
def one_process(small, tmp_path_factory):
    return train(tmp_path_factory.mktemp("one"), *SHARED, *small)


def assert_same_training(one, many):
    """The same members up to the order of summation."""
    assert [(m["member"], m["step"]) for m in many.steps] == [
        (m["member"], m["step"]) for m in one.steps]
    for key in ("train_loss", "kl", "grad_norm"):
        assert [m[key] for m in many.steps] == pytest.approx([m[key] for m in one.steps], abs=1e-3)
    for k, (ours, theirs) in enumerate(zip(one.result["members"], many.result["members"],
                                           strict=True), 1):
        for key in ("train_loss", "selection_loss", "val_loss", "holdout_loss"):
            assert theirs[key] == pytest.approx(ours[key], abs=1e-3)
        a, b = (load_file(run.folder / f"members/{k:03d}.safetensors") for run in (one, many))
        for name in a | b:
            scale = a[name].abs().max().clamp(min=1e-3)
            assert (a[name] - b[name]).abs().mean() <= 0.01 * scale, name
    assert declared_number(many) == pytest.approx(declared_number(one), abs=1e-3)


def test_the_shared_run_has_what_could_go_wrong(one_process):
    config = one_process.result["config"]
    assert config["mtp_weight"] and config["meta_lr"] and config["average"] == "probs"
    first, second = re.search(r"(\S+) then (\S+) FLOPs", one_process.console).groups()
    assert float(first) < float(second)         # layers that are looped
    assert len(one_process.steps) == 20 and min(kl(one_process, 2)) > 0
    starts = [m["train_loss"] for m in one_process.steps if m["step"] == 1]
    assert max(m["train_loss"] for m in one_process.result["members"]) < min(starts)


@pytest.mark.parametrize("processes, micro_rows", [(2, 1), (4, 2)])
def test_processes_train_the_members_of_one(processes, micro_rows, one_process, small, tmp_path):
    done = torchrun(processes, SCRIPT, *SHARED, *small, f"--device_batch_size={micro_rows}",
                    f"--runs_dir={tmp_path}", "--run_id=run")
    assert done.returncode == 0, done.stderr
    many = read_run(tmp_path / "run", done.stdout)
    assert f"{processes} process(es), micro-batches of {micro_rows} row(s)" in many.console
    assert many.result["processes"] == processes
    assert len(re.findall("^member 2/2 done", many.console, re.M)) == 1      # the first one speaks
    assert_same_training(one_process, many)


def test_two_processes_train_the_members_of_one_by_strings(spelled, tmp_path):
    (tmp_path / "one").mkdir()
    arguments = [*SHARED, *spelled, "--meta_lr=0", "--cautious=false"]      # and few signs
    one = train(tmp_path / "one", *arguments, "--device_batch_size=4")
    done = torchrun(2, SCRIPT, *arguments, "--device_batch_size=1", f"--runs_dir={tmp_path}",
                    "--run_id=run")
    assert done.returncode == 0, done.stderr
    many = read_run(tmp_path / "run", done.stdout)
    assert many.result["processes"] == 2 and min(kl(many, 2)) > 0
    assert_same_training(one, many)


def test_batch_that_processes_cannot_share_is_refused(small, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = main("check", *TOY, *small, "--batch_rows=17", f"--runs_dir={tmp_path}")
    assert code == 2 and out == "track cpu, processes 2\n"
    assert err == "error: --batch_rows=17 must be a multiple of 2 with 2 process(es): 16 is\n"


@pytest.mark.slow
def test_processes_refuse_a_batch_in_one_voice(small, tmp_path):
    done = torchrun(2, SCRIPT, *TOY, *small, "--batch_rows=17", f"--runs_dir={tmp_path / 'runs'}")
    assert done.returncode != 0
    line, = re.findall("^error: .*", done.stderr, re.M)
    assert "--batch_rows=17" in line and "2 process(es)" in line
    assert not (tmp_path / "runs").exists()


# ==== One file ==================================================================================
@pytest.fixture(scope="module")
def copied_alone(tmp_path_factory):
    """(folder, environment): a folder with copies of script and dataset; tiktoken is blocked."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(SCRIPT, folder)
    shutil.copytree(PROSE, folder / "DATA")
    blocked = tmp_path_factory.mktemp("blocked")
    (blocked / "tiktoken.py").write_text("raise ImportError('blocked')\n")
    return folder, clean_environment(PYTHONPATH=str(blocked))


ALONE = ["train_gpt.py", "--track=cpu", "--preset=toy", "--dataset=DATA",
         "--final_mixture=learned", "--device=cpu", "--dtype=float32", "--num_models=2",
         "--num_layers=2", "--num_epochs=1", "--batch_rows=8", "--seq_len=64",
         "--train_tokens=9000", "--selection_tokens=1000", "--log_steps=1", "--split_tokens=0"]


def stop_after_first_step(arguments, folder, environment):
    """(exit code, stdout, stderr) of a run that gets a SIGTERM as its first member trains."""
    process = subprocess.Popen([sys.executable, *last_of_each(arguments)], cwd=folder,
                               env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               encoding="utf-8")
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("member 1/2  step "):
            process.send_signal(signal.SIGTERM)
            break
    rest, err = process.communicate(timeout=60)
    return process.returncode, "".join(said) + rest, err


@pytest.fixture(scope="module")
def alone(copied_alone):
    """(what was said before and at the stop, the run that went on and finished)"""
    folder, environment = copied_alone
    code, out, err = stop_after_first_step(ALONE, folder, environment)
    assert code == 128 + signal.SIGTERM, err
    name = re.fullmatch(r"stopped   member 1 after step \d+; .* --run_id=(\S+)\n", err)[1]
    done = python(*ALONE, f"--run_id={name}", cwd=folder, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    return out, read_run(folder / "runs" / name, done.stdout)


def test_script_copied_alone_trains_stops_and_goes_on(alone, copied_alone):
    before, run = alone
    assert "step 15/15" not in before and not re.search("^resumed", before, re.M)
    assert re.search(r"^resumed   member 1 after step [1-9]", run.console, re.M)
    assert [(m["member"], m["step"]) for m in run.steps] == [
        (k, step) for k in (1, 2) for step in range(1, 16)]
    assert run.result["val_loss"] == run.result["ensemble"][-1]["val_loss_learned"] < 7.6
    assert re.search("^result  +val loss", run.console, re.M)
    folder, _ = copied_alone
    assert {path.name for path in folder.iterdir()} == {"train_gpt.py", "DATA", "runs"}


def imports_of(source):
    """(module, name of the function around it, or "") for each import in Python source."""
    found = []

    def visit(node, function):
        if isinstance(node, ast.Import):
            found.extend((alias.name, function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.append(("." * node.level + (node.module or ""), function))
        inside = isinstance(node, (ast.FunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, getattr(node, "name", "lambda") if inside else function)
    visit(ast.parse(source), "")
    return found


def test_script_imports_nothing_local():
    found = imports_of(Path(SCRIPT).read_text(encoding="utf-8"))
    others = [(name, function) for name, function in found
              if name.partition(".")[0] not in {*sys.stdlib_module_names, "torch", "numpy",
                                                "safetensors"}]
    assert others == [("flash_attn_interface", "")]
    assert not {"importlib", "runpy", "imp"} & {name.partition(".")[0] for name, _ in found}


def test_records_hold_no_code():
    assert not list((ROOT / "records").rglob("*.py"))


def test_importing_says_and_does_nothing(tmp_path):
    done = python("-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train_gpt, torch;"
                  " assert not torch.distributed.is_initialized()", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# ==== The log alone =============================================================================
def replay(run, folder):
    """The run again, from nothing but its log and its dataset, in the empty `folder`."""
    source, _ = split_log(run.log)
    (folder / "train_gpt.py").write_text(source, encoding="utf-8")
    facts = facts_of(run.log)
    shutil.copytree(facts["config"]["dataset"], folder / "copy")
    values = {"track": facts["config"]["track"], **facts["overrides"], "dataset": "copy",
              "runs_dir": "replayed", "run_id": "again"}
    arguments = [f"--{name}={as_text(value)}" for name, value in values.items()]
    done = python("train_gpt.py", *arguments, cwd=folder, env=clean_environment(PYTHONPATH=""))
    assert (done.returncode, done.stderr) == (0, "")
    return read_run(folder / "replayed/again", done.stdout)


def test_log_alone_gives_the_same_digits(spelled, tmp_path):
    """With a schedule, a bool, an int and a float among the overrides."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "empty").mkdir()
    run = train(tmp_path / "runs", *spelled, "--final_mixture=learned", "--num_models=2",
                "--qk_norm=true", "--wd_schedule=0:1,0.5:0.25", "--dropout=0.1")
    again = replay(run, tmp_path / "empty")
    assert losses(again) == losses(run)
    assert again.result["ensemble"] == run.result["ensemble"]
    assert declared_number(again) == declared_number(run)
