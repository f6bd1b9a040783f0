"""The scripts of tools/, except bench.py, on small finished runs.

    python -m pytest tests/test_tools.py
"""
import hashlib
import importlib
import json
import re
import shutil
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import _runs
import baseline
import bench
import helpers
import logit_average
import mix
import plan
import plot
import sample
import train_gpt
from data.ngram import PRIOR, NGram
from helpers import (ROOT, SCRIPT, TINY, VOCAB, last_of_each, python, random_model, random_tokens,
                     saved_logps, small_config, train)
from train_gpt import (FIELDS, GPT, TRACKS, Config, Log, MuonAdamW, UserError, load_dataset,
                       make_config, opt, piecewise_linear, start_runtime, training_stages)

TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("[a-z]*.py"))


def tool(module, *arguments):
    return helpers.tool(module, *last_of_each(arguments))


def said(module, *arguments):
    return helpers.said(module, *last_of_each(arguments))


def complaint(module, *arguments):
    return helpers.complaint(module, *last_of_each(arguments))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs on the same data: `one` has one member, `two` has two and is of another track, `memory`
    has one that remembers its row."""
    folder = tmp_path_factory.mktemp("runs")
    one = train(folder, "--track=mini", "--num_models=1", "--seed=2",
                "--final_mixture=uniform", "--num_epochs=2", "--row_memory=false")
    two = train(folder, "--track=cpu", "--num_models=2", "--final_mixture=learned")
    memory = train(folder, "--track=cpu", "--num_models=1", "--row_memory=true")
    return SimpleNamespace(one=one, two=two, memory=memory)


def copied(run, folder, config=None, **changes):
    """A copy of a run in `folder`, with `changes` in its result.json; returns `folder`."""
    shutil.copytree(run.folder, folder)
    result = {**run.result, **changes, "config": {**run.result["config"], **(config or {})}}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


# ==== All of them ===============================================================================
@pytest.mark.parametrize("name", TOOLS)
def test_tool_starts_as_a_script_from_anywhere_and_says_what_it_does(name, tmp_path):
    done = python(ROOT / "tools" / f"{name}.py", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    module = importlib.import_module(name)
    for line in module.__doc__.strip().splitlines():
        assert line in done.stdout
    assert f"python tools/{name}.py" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["_runs", "_public_step", *TOOLS])
def test_tool_has_no_train_gpt_of_its_own(name):
    """What a tool takes from the script is that of the one module `train_gpt`."""
    assert train_gpt.__file__ == SCRIPT
    module = vars(importlib.import_module(name))
    taken = {key: value for key, value in module.items() if key in vars(train_gpt)
             and getattr(value, "__module__", "") == "train_gpt"}
    assert taken and all(value is getattr(train_gpt, key) for key, value in taken.items())


def test_defects_have_a_traceback_and_other_errors_one_line(capsys):
    def unlucky():
        raise KeyError("a defect")

    def mistyped():
        raise UserError("no such\nthing")
    with pytest.raises(KeyError):
        _runs.run_tool(unlucky)
    with pytest.raises(SystemExit) as end:
        _runs.run_tool(mistyped)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: no such thing\n"


# ==== Finished runs =============================================================================
@pytest.mark.parametrize("preset", ["", "toy"])
@pytest.mark.parametrize("track", TRACKS)
def test_config_comes_back_as_it_was(track, preset, tmp_path, capsys):
    config = make_config(track, preset=preset, run_id="r", wd_schedule="0:1,0.5:0.25,1:2")
    (tmp_path / "result.json").write_text(json.dumps({"config": asdict(config), "other": 3}))
    result, read = _runs.read_result(tmp_path)
    assert read == config and result["other"] == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text, message", [
    (None, "no finished run"), ("", "cannot be read"), ('{"config": {"seed": 1', "cannot be read"),
    ("[]", "cannot be read"), ('{"val_loss": 3}', "cannot be read"),
    ('{"config": [1]}', "cannot be read"), ('{"config": null}', "cannot be read")])
def test_what_is_no_result_is_one_line(text, message, tmp_path):
    if text is not None:
        (tmp_path / "result.json").write_text(text)
    for module in (sample, mix, logit_average):
        error = complaint(module, tmp_path)
        assert message in error and str(tmp_path) in error


def test_result_of_an_earlier_version_is_read_as_far_as_it_goes(tmp_path, capsys):
    """Fields that are gone, or whose values are of another kind now, are named."""
    now = make_config("tiny", seed=5, second_weight=(), wd_schedule=((0, 1), (1, 0.5)))
    then = {**asdict(now), "wd_schedule": "0:1,1:0.5", "second_weight": "", "seed": "5",
            "token_noise": 0.1, "subset_fraction": 1.0, "compile_model": "blocks",
            "num_layers": "sixteen"}
    (tmp_path / "result.json").write_text(json.dumps({"format": 1, "config": then}))
    _, config = _runs.read_result(tmp_path)
    assert config == replace(now, compile_model=FIELDS["compile_model"].default,
                             num_layers=FIELDS["num_layers"].default)
    line, = capsys.readouterr().err.splitlines()
    assert line.endswith("of another version; without the fields compile_model, num_layers,"
                         " token_noise, subset_fraction, which are gone")


@pytest.mark.parametrize("name, value", [("dropout", None), ("seed", [1]),
                                         ("wd_schedule", [1, 2])])
def test_value_that_no_field_has_is_named(name, value, tmp_path, capsys):
    config = {**asdict(make_config("cpu")), name: value}
    (tmp_path / "result.json").write_text(json.dumps({"config": config}))
    _, read = _runs.read_result(tmp_path)
    assert getattr(read, name) == FIELDS[name].default
    assert name in capsys.readouterr().err


# ==== Text ======================================================================================
def slow_probabilities(model, tokens):
    """p [T, V] of what follows each of `tokens` [T], one column of logits after the other."""
    config = model.config
    hidden = model(tokens.unsqueeze(0))[0].detach().numpy()
    weight = model.head.weight.detach().numpy()
    p = np.zeros((len(tokens), config.vocab_size))
    for t, h in enumerate(hidden):
        for token in range(config.vocab_size):
            z = weight[token] @ h
            z = config.softcap * np.tanh(z / config.softcap) if config.softcap else z
            p[t, token] += np.exp(z)
        for i in range(t if config.row_memory else 0):
            z = hidden[i] @ h / config.model_dim ** 0.5
            p[t, tokens[i + 1]] += np.exp(z)
    return p / p.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("row_memory", [False, True])
@pytest.mark.parametrize("length, softcap", [(12, 15.0), (5, 0.0), (1, 15.0)])
def test_probabilities_are_those_of_a_slow_sum(row_memory, length, softcap):
    """Over the vocabulary and the row's earlier positions; rows may be shorter than seq_len."""
    config = small_config(row_memory=row_memory, loss_chunk=12, softcap=softcap)
    model = random_model(config, seed=4)
    tokens = random_tokens(config, 3, length) % 7       # what stands in a row stands there again
    p = _runs.probabilities(model, tokens)
    assert p.shape == (3, length, VOCAB) and p.dtype == torch.float64
    assert p.sum(dim=2).numpy() == pytest.approx(np.ones((3, length)), abs=1e-12)
    for row in range(3):
        expected = slow_probabilities(model, tokens[row])
        assert p[row].numpy() == pytest.approx(expected, rel=1e-9)
    if row_memory and length > 1:       # the last row's, of another model: memory does count
        without = slow_probabilities(random_model(small_config(softcap=softcap), seed=4), tokens[2])
        assert np.abs(expected - without).max() > 1e-3


# ==== Tokenizers, damaged members, logit_average ================================================
def test_a_run_keeps_what_turns_tokens_into_text(runs):
    kept, dataset = runs.two.folder / "tokenizer", ROOT / "data/prose"
    meta, of_dataset = (json.loads((folder / "meta.json").read_text(encoding="utf-8"))
                        for folder in (kept, dataset))
    ranks = (kept / meta["ranks"]).read_bytes()
    assert ranks == (dataset / "ranks.tiktoken").read_bytes()
    assert hashlib.sha256(ranks).hexdigest() == meta["ranks_sha256"]
    assert {"tokenizer", "vocab_size", "bos_id", "bos_text", "pattern", "licence"} < set(meta)
    assert meta.items() < of_dataset.items() and "splits" not in meta


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def test_damaged_members_are_one_line(runs, tmp_path):
    run = copied(runs.two, tmp_path / "run")
    for number, kind, module in ((2, "", sample), (1, ".logp", mix)):
        path = run / f"members/{number:03d}{kind}.safetensors"
        cut(path)
        arguments = [run, f"--member={number}"] if module is sample else [run]
        assert complaint(module, *arguments).startswith(f"error: {path}: damaged (")
    assert said(sample, run, "--member=1")      # of which the weights are whole


@pytest.mark.parametrize("row_memory", [False, True])
def test_logit_average_against_a_loop(row_memory):
    config = small_config(row_memory=row_memory, loss_chunk=12)
    models = [random_model(config, seed=seed) for seed in (1, 2, 3)]
    tokens = random_tokens(models[0].config, 2, 9)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    ours = logit_average.logit_average(models, inputs, targets)
    for row in range(2):
        logits = [np.log(slow_probabilities(model, inputs[row])) for model in models]
        for i in range(8):
            z = np.mean([z[i] for z in logits], axis=0)
            expected = z[targets[row, i]] - np.log(np.exp(z).sum())
            assert ours[row, i].item() == pytest.approx(expected, rel=1e-9)


def test_logit_average_of_a_run(runs):
    """Of one member both are its own loss, over whole rows; of two the mixture is theirs."""
    for run in (runs.one, runs.two, runs.memory):
        whole = 64 * (len(saved_logps(run)[0]["val"]) // 64)
        logps = [logp["val"][:whole] for logp in saved_logps(run)]
        words = said(logit_average, run.folder).replace(",", "").split()
        assert words[:2] == [str(len(logps)), "members"]
        average, mixture = float(words[9]), float(words[13])
        assert mixture == pytest.approx(mixture_loss(logps), abs=6e-5)
        assert average == pytest.approx(mixture, abs=0.5 if run is runs.two else 1e-4)
        assert run is not runs.two or average != mixture


# ==== mix =======================================================================================
def mixture_loss(logps, weights=None):
    """Nats per token of a mixture of models, the obvious way; weights [k] or [k, n]."""
    p = np.exp(logps)
    weights = np.full(len(p), 1 / len(p)) if weights is None else weights
    return -np.log((np.broadcast_to(np.transpose(weights), p.T.shape) * p.T).sum(axis=1)).mean()


def most_probable_weights(logps, prior=0.0, common=None):
    """Weights that make targets most probable, if `common` ones were seen on `prior` tokens."""
    p = np.exp(logps)
    weights = common = np.full(len(p), 1 / len(p)) if common is None else common
    for _ in range(3000):
        seen = (weights[:, None] * p / (weights @ p)).sum(axis=1) + prior * common
        weights = seen / seen.sum()
    return weights


def mixed(folder, *arguments):
    """(result.json of a mixture in `folder`, what mix.py says)."""
    out = said(mix, *arguments, f"--out={folder}")
    return json.loads((folder / "result.json").read_text(encoding="utf-8")), out


@pytest.mark.parametrize("kind", ["uniform", "learned"])
def test_mixture_of_two_runs_is_that_of_their_probabilities(kind, runs, tmp_path):
    """Every point of the curve, and the result, from the saved log p alone."""
    members = saved_logps(runs.two) + saved_logps(runs.one)
    result, out = mixed(tmp_path / "mix", runs.two.folder, runs.one.folder,
                        f"--final_mixture={kind}")
    assert [point["n"] for point in result["ensemble"]] == [1, 2, 3]
    for n, point in enumerate(result["ensemble"], 1):
        weights = most_probable_weights([member["selection"] for member in members[:n]])
        assert point["weights_learned"] == pytest.approx(weights, abs=0.02)
        for split in ("val", "holdout"):
            logps = [member[split] for member in members[:n]]
            assert point[f"{split}_loss"] == pytest.approx(mixture_loss(logps), abs=1e-9)
            assert point[f"{split}_loss_learned"] == pytest.approx(mixture_loss(logps, weights),
                                                                   abs=2e-3)
    suffix = "" if kind == "uniform" else "_learned"
    for split in ("val", "holdout"):
        assert result[f"{split}_loss"] == result["ensemble"][-1][f"{split}_loss{suffix}"]
    assert f"val loss {result['val_loss']:.4f} ({kind} mixture)" in out
    names = [(fact["run"], fact["number"], fact["val_loss"]) for fact in result["members"]]
    assert names == [(run.folder.name, number, fact["val_loss"])
                     for run in (runs.two, runs.one)
                     for number, fact in enumerate(run.result["members"], 1)]


def test_mixture_with_an_ngram_has_weights_by_bucket(runs, tmp_path):
    result, out = mixed(tmp_path / "mix", runs.one.folder, runs.two.folder, "--ngram_order=3",
                        "--final_mixture=ngram")
    _, config = _runs.read_result(runs.one.folder)
    data = load_dataset(ROOT / config.dataset, config)
    ngram = NGram(np.concatenate(data.train), config.vocab_size, data.bos, 3)
    tokens = {split: np.concatenate(documents) for split, documents in data.scored.items()}
    ngram_logp, _ = ngram.score(tokens, PRIOR)
    buckets = {split: ngram.support(part) for split, part in tokens.items()}
    members = [*saved_logps(runs.one), *saved_logps(runs.two), ngram_logp]
    common = most_probable_weights([member["selection"] for member in members])
    weights = {bucket: most_probable_weights(
        np.array([member["selection"] for member in members])[:, buckets["selection"] == bucket],
        PRIOR, common) for bucket in range(16)}
    assert sum((buckets["selection"] == bucket).any() for bucket in weights) > 4
    for split in ("val", "holdout"):
        by_token = np.transpose([weights[bucket] for bucket in buckets[split]])
        expected = mixture_loss([member[split] for member in members], by_token)
        assert result[f"{split}_loss"] == pytest.approx(expected, abs=1e-3)
        of_all = mixture_loss([member[split] for member in members], common)
        assert abs(expected - of_all) > 2e-3        # else nothing is said of the buckets
    last = result["ensemble"][-1]
    assert last["weights_ngram"] == pytest.approx(common, abs=0.02)
    assert 0.1 < last["weights_ngram"][-1] < 0.9
    assert last["val_loss_ngram"] == result["val_loss"] < last["val_loss_learned"] - 2e-3
    assert not any("val_loss_ngram" in point for point in result["ensemble"][:-1])
    assert out.splitlines()[-2].split(maxsplit=2)[2] == (
        f"val loss {last['val_loss_ngram']:.4f}, selection {last['selection_loss_ngram']:.4f}")


@pytest.mark.parametrize("order", [0, 4])
def test_mixture_of_one_run_is_that_run(order, runs, tmp_path):
    """With an n-gram that is not declared, too, which is one more reading."""
    result, out = mixed(tmp_path / "mix", runs.two.folder, f"--ngram_order={order}")
    ngram = {key: result["ensemble"][-1].pop(key) for key in [*result["ensemble"][-1]]
             if key.endswith("_ngram")}
    assert len(ngram) == (4 if order else 0) and ("with n-gram" in out) == bool(order)
    for key in ("val_loss", "holdout_loss", "val_bpb", "data_efficiency", "ensemble",
                "track", "train_tokens", "train_seconds", "peak_memory_bytes"):
        assert result[key] == runs.two.result[key], key
    lines = runs.two.console.splitlines()
    table = lines[lines.index(""):]         # members and ensembles, of a run's end
    assert [line for line in out.splitlines() if line[:3] in (" 1 ", " 2 ")] == [
        line for line in table if line[:3] in (" 1 ", " 2 ")]


def test_mixture_costs_what_its_runs_cost_and_is_a_finished_run(runs, tmp_path):
    result, _ = mixed(tmp_path / "mix", runs.one.folder, runs.two.folder)
    parts = [runs.one.result, runs.two.result]
    for name in ("train_seconds", "wall_seconds", "eval_seconds", "compile_seconds", "train_flops"):
        assert result[name] == pytest.approx(sum(part[name] for part in parts), abs=2e-3)
    tokens = sum(part["train_seconds"] * part["tokens_per_second"] for part in parts)
    assert result["tokens_per_second"] == pytest.approx(tokens / result["train_seconds"], rel=1e-3)
    assert result["peak_memory_bytes"] == max(part["peak_memory_bytes"] for part in parts)
    assert result["runs"] == [str(run.folder) for run in (runs.one, runs.two)]
    assert said(plot, tmp_path / "mix").endswith("plot.png\n")
    assert "give one of these" in complaint(mix, tmp_path / "mix", f"--out={tmp_path / 'again'}")


def test_keep_takes_the_heaviest(runs, tmp_path):
    members = saved_logps(runs.one) + saved_logps(runs.two)
    names = [(runs.one.folder.name, 1), (runs.two.folder.name, 1), (runs.two.folder.name, 2)]
    weights = most_probable_weights([member["selection"] for member in members])
    for keep in (1, 2, 3, 9):
        kept = sorted(np.argsort(weights)[::-1][:keep])
        result, _ = mixed(tmp_path / f"mix{keep}", runs.one.folder, runs.two.folder,
                          f"--keep={keep}", "--final_mixture=uniform")
        assert [(fact["run"], fact["number"]) for fact in result["members"]] == [
            names[i] for i in kept]
        assert result["val_loss"] == pytest.approx(mixture_loss([members[i]["val"] for i in kept]))


def test_a_mixture_has_no_members_of_its_own(runs, tmp_path):
    mixed(tmp_path / "mix", runs.one.folder, runs.two.folder)
    for module in (mix, sample):
        error = complaint(module, tmp_path / "mix")
        assert f"give one of these: {runs.one.folder}, {runs.two.folder}" in error
    assert "--keep=-1: must be" in complaint(mix, runs.one.folder, "--keep=-1")


def test_run_given_twice_is_refused(runs, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(runs.one.folder)
    for again in (runs.one.folder, link, runs.two.folder / ".." / runs.one.folder.name):
        assert "given twice" in complaint(mix, runs.one.folder, runs.two.folder, again)
    copy = copied(runs.one, tmp_path / "copy", seed=77)
    assert "are the same: a copy" in complaint(mix, runs.one.folder, runs.two.folder, copy)


@pytest.mark.parametrize("config, changes, message", [
    ({"train_tokens": 4999}, {}, "its --train_tokens=4999, but 5000 in"),
    ({"selection_tokens": 900}, {}, "its --selection_tokens=900, but 1000 in"),
    ({"eval_tokens": 400}, {}, "its --eval_tokens=400, but 500 in"),
    ({"vocab_size": 2000}, {}, "its --vocab_size=2000, but 2048 in"),
    ({}, {"data_sha256": {"prose_train_000000.bin": "0" * 64}}, "trained on other data")])
def test_runs_on_other_tokens_are_refused(config, changes, message, runs, tmp_path):
    other = copied(runs.two, tmp_path / "other", config, **changes)
    error = complaint(mix, runs.one.folder, other, f"--out={tmp_path / 'mix'}")
    assert message in error and str(other) in error
    assert not (tmp_path / "mix").exists()


def test_runs_on_shards_that_are_gone_are_refused(runs, tmp_path):
    same = {"data_sha256": {"prose_train_000000.bin": "0" * 64}}
    others = [copied(run, tmp_path / name, **same) for run, name in ((runs.one, "a"),
                                                                     (runs.two, "b"))]
    assert "other data" in complaint(mix, *others)


def test_unfinished_runs_and_taken_folders_are_refused(runs, tmp_path):
    other = copied(runs.two, tmp_path / "other")
    (other / "members/002.logp.safetensors").unlink()
    assert "002.logp" in complaint(mix, runs.one.folder, other)
    (other / "result.json").unlink()
    assert "no finished run" in complaint(mix, runs.one.folder, other)
    before = (runs.two.folder / "result.json").read_bytes()
    error = complaint(mix, runs.one.folder, f"--out={runs.two.folder}")
    assert "choose another --out" in error
    assert (runs.two.folder / "result.json").read_bytes() == before


def test_mixture_that_needs_what_is_not_there_is_refused(runs, tmp_path):
    assert "needs --ngram_order" in complaint(mix, runs.one.folder, "--final_mixture=ngram")
    (tmp_path / "runs").mkdir()
    run = train(tmp_path / "runs", "--track=mini", "--num_models=1", "--num_layers=1",
                "--selection_tokens=0")
    for arguments in (["--final_mixture=learned"], ["--final_mixture=uniform", "--keep=1"]):
        assert "no selection" in complaint(mix, run.folder, *arguments)
    result, _ = mixed(tmp_path / "mix", run.folder, "--final_mixture=uniform")
    assert result["val_loss"] == run.result["val_loss"]


# ==== plan ======================================================================================
def test_plan_knows_spelling_and_split_tokens():
    """The state and the tables on the device are those of a real optimizer; rows are longer."""
    usual = make_config("cpu", preset="toy", num_layers=2, spelling=False)
    config = replace(usual, spelling=True)
    tables = bench.random_tables(config, 2047, np.random.default_rng(0))
    optimizer = MuonAdamW(GPT(config).named_parameters(), config, tables=tables)
    state = sum(part.nbytes for group in optimizer.groups for part in group.state.values())
    fixed, _ = plan.fixed_parts(config, 1, torch.float32)
    assert fixed["optimizer state"] == state
    assert fixed["strings of tokens"] == sum(table.nbytes for table in optimizer.features)
    before, _ = plan.fixed_parts(usual, 1, torch.float32)
    assert state - before["optimizer state"] == 2 * 2 * 4 * 2048 * config.model_dim
    assert before["strings of tokens"] == 0
    arguments = ["--track=cpu", "--gpu=H100", "--gpus=1", "--spelling=true", "--row_memory=true"]
    whole, halved = (said(plan, *arguments, f"--split_tokens={cut}") for cut in (0, 0.5))
    tokens = [int(re.search(r"tokens +([\d,]+) an epoch", out)[1].replace(",", ""))
              for out in (whole, halved)]
    assert tokens[1] == pytest.approx(tokens[0] * (1 + 0.5 * plan.CAN_BE_CUT), abs=1)


def test_plan_advises_no_part_of_a_row_to_those_who_remember_it():
    arguments = ["--track=mini", "--gpu=RTX 4090", "--seq_len=16384", "--batch_rows=1",
                 "--loss_chunk=16384"]
    forgetful = said(plan, *arguments, "--row_memory=false")
    assert "it does with --device_batch_size=1 --loss_chunk=" in forgetful
    assert "no device_batch_size fits" in said(plan, *arguments)


def test_split_tokens_make_rows_of_prose_as_much_longer_as_plan_says():
    config = make_config("cpu", split_tokens=0.5)
    data = load_dataset(ROOT / "data/prose", config)
    rows = train_gpt.Rows(data.train, 64, 4, 1, 0, data.bos, data.tables["pairs"], 0.5)
    assert rows.num_cut == pytest.approx(0.5 * plan.CAN_BE_CUT * rows.tokens, rel=0.02)


# ==== baseline ==================================================================================
@dataclass(frozen=True)
class LongerConfig(Config):
    """Config as it may be one day: with more techniques, of every kind."""
    new_rate: float = opt(0.5, "")
    new_count: int = opt(3, "", least=0)
    new_steps: int = opt(0, "")
    new_switch: bool = opt(True, "")
    new_schedule: tuple = opt(((0, 1), (1, 2)), "")
    new_way: str = opt("b", "", "off", "b")


NEW = {name: f for name, f in LongerConfig.__dataclass_fields__.items() if name not in FIELDS}


def test_plain_switches_off_what_is_not_kept():
    assert set(baseline.KEPT) <= set(FIELDS)
    assert not set(baseline.NEUTRAL) & set(baseline.KEPT)
    for track in TRACKS:
        config = make_config(track)
        plain = baseline.plain(config)
        assert all(getattr(plain, name) == getattr(config, name) for name in baseline.KEPT)
        stages = training_stages(plain)
        assert {(stage.loops, stage.passes) for stage in stages} == {(1, 1)}
        assert [piecewise_linear(plain.wd_schedule, part) for part in (0, 0.3, 1)] == [1, 1, 1]
        assert (plain.num_models, plain.average_epochs) == (1, 1)
        assert not any((plain.kd_alpha, plain.mtp_weight, plain.meta_lr, plain.second_weight,
                        plain.third_weight, plain.sawtooth_epochs, plain.dropout,
                        plain.stochastic_depth, plain.continue_members, plain.spelling,
                        plain.row_memory, plain.split_tokens))


@pytest.mark.parametrize("track", TRACKS)
def test_plain_is_the_same_with_the_techniques_of_any_track(track):
    techniques = {name: value for name, value in asdict(make_config(track)).items()
                  if name not in baseline.KEPT}
    config = make_config("cpu")
    assert baseline.plain(replace(config, **techniques)) == baseline.plain(config)


def test_plain_switches_off_fields_that_are_new(monkeypatch):
    config = LongerConfig(**asdict(make_config("limited")))
    for name, f in NEW.items():
        monkeypatch.setitem(FIELDS, name, f)
    plain = baseline.plain(config)
    assert {name: getattr(plain, name) for name in NEW} == {
        "new_rate": 0, "new_count": 0, "new_steps": 0, "new_switch": False, "new_schedule": (),
        "new_way": "off"}


class MadeUpRuns:
    """Runs whose selection loss is known: lowest at some epochs, weight decay and fields."""

    def __init__(self, *best):
        self.best = best

    def measure(self, tokens, epochs, wd, values):
        found = np.log2(epochs), wd, *values
        best = np.log2(self.best[0]), *self.best[1:]
        loss = sum((a - b) ** 2 for a, b in zip(found, best))
        return {"tokens": tokens, "epochs": epochs, "weight_decay": wd, "selection": loss,
                **dict(zip(baseline.TRIED, values))}


@pytest.mark.parametrize("epochs", [1, 2, 8, 32])
@pytest.mark.parametrize("wd", [0.03, 0.3, 1.0, 2.0])
def test_search_goes_along_epochs_decays_and_fields(epochs, wd):
    lowest = MadeUpRuns(epochs, wd, True, False, True)
    guess = 8, 1.0, (False, True, True)
    both = *baseline.ALONG, *baseline.FLIPS
    for steps, values in ((both, (True, False, True)), (baseline.ALONG, guess[2])):
        found = baseline.search(lowest, 100, guess, steps)
        assert found == lowest.measure(100, epochs, wd, values)
        assert baseline.settings_of(found) == (epochs, wd, values)
    once = baseline.search(lowest, 100, guess, baseline.FLIPS)
    assert baseline.settings_of(once) == (8, 1.0, (True, False, True))


def test_each_budget_begins_with_what_was_best_at_the_one_before():
    lowest = MadeUpRuns(4, 0.1, True, True, False)
    asked = []
    measure = lowest.measure
    lowest.measure = lambda tokens, *key: asked.append((tokens, key)) or measure(tokens, *key)
    found = baseline.tune(lowest, [100, 200], (16, 1.0, (False, True, True)),
                          (*baseline.ALONG, *baseline.FLIPS))
    best = 4, 0.1, (True, True, False)
    assert found == [measure(tokens, *best) for tokens in (100, 200)]
    assert next(key for tokens, key in asked if tokens == 200) == best


def test_a_single_model_is_a_member_without_a_teacher():
    track = make_config("cpu")
    off = {"num_models": 1, "kd_alpha": 0, "final_mixture": "uniform"}
    assert asdict(baseline.single(track)) == {**asdict(track), **off}


def test_baseline_is_stored_and_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, "MULTIPLES", (1, 2))
    monkeypatch.setattr(baseline, "TUNED_UP_TO", 1)
    monkeypatch.setattr(baseline, "FIRST_GUESS", (2, 0.1, (False, True, True)))
    dataset, runs = tmp_path / "prose", tmp_path / "runs"
    shutil.copytree(ROOT / "data/prose", dataset)
    before = json.loads((dataset / "meta.json").read_text(encoding="utf-8"))
    small = ["--train_tokens=4000", "--num_layers=1", f"--dataset={dataset}"]
    arguments = ["--track=cpu", *TINY, *small, f"--runs_dir={runs}",
                 "--matrix_lr=0.1", "--embed_lr=0.3", "--head_lr=0.01"]     # overfits soon
    out = said(baseline, *arguments)
    meta = json.loads((dataset / "meta.json").read_text(encoding="utf-8"))
    stored = meta["baseline"]
    assert {**meta, "baseline": before.get("baseline")} == before
    lines = (runs / "baseline_cpu/runs.jsonl").read_text(encoding="utf-8").splitlines()
    done = [json.loads(line) for line in lines]
    keys = [(run["settings"], *(run[key] for key in baseline.KEY)) for run in done]
    lines_said = [line for line in out.splitlines() if line.startswith("run ")]
    assert [line.split()[1] for line in lines_said] == [str(i + 1) for i in range(len(done))]
    assert len(set(keys)) == len(keys) >= 14    # one epoch: two sizes, four ways; two searches
    (plain, single), = [dict.fromkeys(run["settings"] for run in done)]
    of_members = [run for run in done if run["settings"] == single]
    done = [run for run in done if run["settings"] == plain]
    for tokens, val in stored["one_epoch"]:
        once = [run for run in done if (run["tokens"], run["epochs"], run["weight_decay"])
                == (tokens, 1, baseline.USUAL_WEIGHT_DECAY)]
        ways = {tuple(run[name] for name in baseline.TRIED) for run in once}
        assert {len(set(values)) for values in zip(*ways)} == {2}       # each of TRIED, both ways
        assert val == min(once, key=lambda run: run["selection"])["val"]
    assert [tokens for tokens, _ in stored["one_epoch"]] == [4000, 8000]
    chosen, = stored["tuned_settings"]
    assert stored["tuned"] == [[4000, chosen["val"]]]
    assert chosen["selection"] <= min(run["selection"] for run in done if run["tokens"] == 4000)
    chosen, = stored["single_settings"]
    assert stored["single"] == [[4000, chosen["val"]]]
    assert chosen["selection"] == min(run["selection"] for run in of_members)
    assert {run["tokens"] for run in of_members} == {4000}
    assert stored["source"].startswith("tools/baseline.py --track=cpu") and stored["hardware"]
    assert f"--dataset={dataset}" in stored["source"]

    with monkeypatch.context() as patch:
        patch.delattr(baseline, "train_member")     # trains nothing
        assert "run " not in said(baseline, *arguments)
    assert json.loads((dataset / "meta.json").read_text(encoding="utf-8")) == meta
    assert lines == (runs / "baseline_cpu/runs.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "more").mkdir()
    run = train(tmp_path / "more", "--track=cpu", "--num_models=1", "--eval_tokens=0",
                *small)
    assert run.result["data_efficiency"]["curve"] == stored     # read against the stored curves
    assert run.result["data_efficiency"]["tuned"] != "n/a"


def test_baseline_measures_again_what_was_measured_otherwise(tmp_path):
    config = make_config("cpu", preset="toy", device="cpu")
    log = SimpleNamespace(folder=tmp_path)
    runtime = start_runtime(config)
    settings = baseline.Runs(config, runtime, log).settings
    run = dict(zip(baseline.KEY, (9000, 1, 0.1, True, False, True)), selection=5.0, val=6.0)
    (tmp_path / "runs.jsonl").write_text(json.dumps({**run, "settings": settings}) + "\n")
    for changes, count in ((dict(run_id="r", save_minutes=9, time_limit=9), 1),
                           (dict(unet=True, qk_norm=True), 1), (dict(matrix_lr=0.5), 0),
                           (dict(seed=3), 0), (dict(train_tokens=8000), 0)):
        again = baseline.Runs(replace(config, **changes), runtime, log)
        assert len(again.done) == count, changes
    assert again.runtime is runtime
    done = baseline.Runs(config, runtime, log)
    assert done.measure(9000, 1, 0.1, (True, False, True)) == run


class AnnouncedRuns(MadeUpRuns):
    """MadeUpRuns that remember, as baseline.Runs do; a token of work takes a millisecond."""
    settings = "made up"
    val_tokens = 300

    def __init__(self, *best):
        super().__init__(*best)
        self.done, self.made, self.seconds = {}, [], 0.0

    def measure(self, tokens, epochs, wd, values):
        key = (tokens, epochs, wd, *values)
        if key not in self.done:
            self.done[key] = super().measure(tokens, epochs, wd, values)
            self.made.append(key)
            self.seconds += (tokens * epochs + self.val_tokens / 3) / 1000
        return self.done[key]


def announced(runs, *curves):
    """The lines that are said when curves (name, budgets, guess, steps) are measured."""
    lines = []
    curves = [baseline.Curve(name, runs, *rest) for name, *rest in curves]
    for curve in curves:
        said_by = baseline.Announced(curve, curves, SimpleNamespace(say=lines.append))
        baseline.tune(said_by, *curve[2:])
    return lines


def test_runs_are_announced_with_what_is_to_come():
    guess = 8, 1.0, (False, True, True)
    curves = (("one_epoch", [1000, 2000], baseline.FIRST_ONCE, baseline.FLIPS),
              ("tuned", [1000], guess, (*baseline.ALONG, *baseline.FLIPS)))
    runs = AnnouncedRuns(1, 0.1, True, True, True)      # where each one begins: none helps
    lines = announced(runs, *curves[:1])
    assert [line.split("  ")[-1].split()[0] for line in lines] == [str(7 - i) for i in range(8)]
    assert lines[0] == ("run 1  one_epoch  1,000 tokens x 1 epoch, decay 0.1, unet, qk norm, half"
                        " rows  7 more if no change helps")
    # 4 runs of 2,000 and one of 1,000 tokens, 100 more each: 9.5 s
    assert lines[3] == ("run 4  one_epoch  1,000 tokens x 1 epoch, decay 0.1, unet, qk norm  4 more"
                        " if no change helps, about 0:09 in all")
    assert announced(runs, *curves[:1]) == []           # all is known
    runs.best = guess[0], guess[1], *guess[2]
    lines = announced(runs, *curves)
    assert [line.split()[1:3] for line in lines] == [[str(9 + i), "tuned"] for i in range(8)]
    assert "  1,000 tokens x 8 epochs, decay 1, qk norm, half rows  7 more if" in lines[0]
    assert "about 1:08 in all" in lines[0]      # 6 x 8.1 + 16.1 + 4.1 s
    assert lines[-1].endswith("  0 more if no change helps, about 0:08 in all")


def test_a_change_that_helps_is_followed_by_more():
    guess = 8, 1.0, (False, True, True)
    runs = AnnouncedRuns(2, 1.0, False, True, True)
    lines = announced(runs, ("tuned", [1000], guess, baseline.ALONG))
    left = [int(line.split("  ")[-1].split()[0]) for line in lines]
    epochs = [line.split(" x ")[1].split()[0] for line in lines]
    assert epochs == ["8", "16", "4", "2", "1", "2", "2"]
    assert left == [4, 3, 2, 2, 2, 1, 0]        # 4 epochs helped, and 2


def test_half_rows_are_twice_as_many(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(baseline, "Trainer", lambda config, *_: asked.append(config) or
                        SimpleNamespace())
    monkeypatch.setattr(baseline, "train_member", lambda *_: (None, {
        "selection": np.zeros(3), "val": np.zeros(3)}))
    config = make_config("cpu", preset="toy", device="cpu")
    runs = baseline.Runs(config, start_runtime(config), Log(tmp_path, True))
    for half in (False, True):
        runs.measure(9000, 1, 0.1, (True, False, half))
    whole, half = asked
    assert (half.seq_len, half.batch_rows) == (whole.seq_len // 2, 2 * whole.batch_rows)
    assert half.device_batch_size == 2 * whole.device_batch_size
    assert replace(half, seq_len=whole.seq_len, batch_rows=whole.batch_rows,
                   device_batch_size=whole.device_batch_size) == whole


def test_baseline_needs_a_selection(tmp_path):
    error = complaint(baseline, "--track=mini", *TINY, "--selection_tokens=0",
                      f"--runs_dir={tmp_path}")
    assert "--selection_tokens=0" in error
