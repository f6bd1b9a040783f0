"""tools/bench.py, and the public way of training that it compares with.

    python -m pytest tests/test_bench.py
"""
import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import bench
from _public_step import PublicTrainer, ReplicatedOptimizer, naive_loss
from _runs import run_tool
from helpers import (ROOT, VOCAB, batch, gradients_of, last_of_each, randn, randomize, rng,
                     small_config, small_tables, torchrun)
from train_gpt import (LossSpec, MuonAdamW, Trainer, chunked_loss, loss_chunk, make_config,
                       parse_arguments, start_runtime)

# a step takes some hundredths of a second
SMALL = ["--preset=toy", "--device=cpu", "--dtype=float32", "--compile=false", "--vocab_size=300",
         "--seq_len=16", "--num_layers=2", "--model_dim=32", "--num_heads=2", "--batch_rows=8",
         "--loop_start=0", "--loop_end=0"]
TABLE = ("warm-up", "seconds", "tokens/s", "MFU", "peak memory", "data", "forward", "loss",
         "backward, rest", "optimizer", "KD teacher", "ours", "naive", "naive / ours")
PIECES = {"data", "forward", "loss", "backward", "optimizer"}


def tool(monkeypatch, *arguments):
    """Exit code of `python tools/bench.py` with `arguments`, in this process."""
    monkeypatch.setattr(sys, "argv", ["bench.py", *last_of_each(arguments)])
    with pytest.raises(SystemExit) as end:
        run_tool(bench.main)
    return end.value.code or 0


def only_line(runs):
    """The one line of JSON that a bench left in the folder `runs`."""
    assert [path.name for path in runs.iterdir()] == ["bench.jsonl"]        # no run's folder
    line, = (runs / "bench.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(line)


def check_facts(facts, loss_tokens=None):
    """Every documented key is there, and what cannot be 0 or less is not."""
    loss_tokens = loss_tokens or bench.LOSS_TOKENS
    for kind, pieces in ("ce", PIECES), ("kd", PIECES | {"teacher"}):
        step = facts[kind]
        assert all(step[key] > 0 for key in ("seconds", "tokens_per_second", "mfu", "peak_bytes",
                                             "flops_per_token"))
        assert set(step["pieces"]) == pieces
        assert all(step["pieces"][piece] > 0 for piece in PIECES)   # the teacher's: a difference
        speed = facts["tokens_per_step"] / step["seconds"]
        assert step["tokens_per_second"] == pytest.approx(speed)
        assert step["mfu"] == pytest.approx(
            speed * step["flops_per_token"] / facts["peak_flops"] / facts["processes"])
    assert facts["kd"]["flops_per_token"] > facts["ce"]["flops_per_token"]
    assert facts["kd_over_ce"] == facts["kd"]["seconds"] / facts["ce"]["seconds"]
    assert facts["warmup_seconds"] > 0 and facts["steps"] == bench.STEPS
    assert facts["recompiles"] == 0
    assert 0 < facts["optimizer"]["share_of_full_batch"] <= 1
    assert facts["loss"]["tokens"] == loss_tokens
    assert facts["loss"]["ours"]["seconds"] > 0 and facts["loss"]["seconds_ratio"] > 0
    assert facts["loss"]["naive"]["peak_extra_bytes"] > 3 * 4 * loss_tokens * 300
    assert all(facts["public"][key] > 0 for key in ("steps", "seconds", "ratio", "peak_bytes"))


# ==== The command ===============================================================================
@pytest.mark.skipif(sys.platform != "linux", reason="a CPU's peak memory is known on Linux only")
def test_bench_prints_its_table_and_appends_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "LOSS_TOKENS", 2048)
    monkeypatch.setattr(bench, "PRODUCTS", (256,))
    assert tool(monkeypatch, "--track=tiny", *SMALL, f"--runs_dir={tmp_path}") == 0
    said = capsys.readouterr()
    assert said.err == ""
    for name in TABLE:
        assert re.search(rf"^{name}  ", said.out, re.M), name
    assert "recompiles after warm-up: 0" in said.out
    assert "% of a 524,288-token step; a process updates 100.0%" in said.out
    assert re.search(r"^whole KD step, the public way / ours: [\d.]+x", said.out, re.M)
    assert max(map(len, said.out.splitlines())) <= 120
    facts = only_line(tmp_path)
    check_facts(facts)
    assert facts["track"] == "tiny" and facts["overrides"]["vocab_size"] == 300
    assert facts["config"]["kd_alpha"] == 0.5 and facts["optimizer"]["parameters_a_process"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="a CPU's peak memory is known on Linux only")
def test_bench_in_two_processes(tmp_path):
    done = torchrun(2, ROOT / "tools/bench.py", "--track=mini", *SMALL, f"--runs_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("warm-up  ") == 1 and done.stdout.count("public way") == 1
    facts = only_line(tmp_path)
    check_facts(facts)
    assert facts["processes"] == 2
    assert 0.1 < facts["optimizer"]["parameters_a_process"] < 0.9


@pytest.mark.parametrize("arguments, message", [
    (["--track=limited", *SMALL, "--meta_rows=3"], "must be a multiple of 6 with 1 process(es)"),
    (["--track=cpu", *SMALL, "--vocab_size=70000"], "tokens must be below 65,536"),
    (["--track=cpu", "--steps=3"], "unknown field 'steps'"), (["toy"], "is not --field=value")])
def test_bad_settings_are_one_line(arguments, message, monkeypatch, capsys):
    assert tool(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="a CPU's peak memory is known on Linux only")
def test_bench_of_what_needs_more_than_tokens(tmp_path, monkeypatch, capsys):
    """Rows that are remembered, spelling and split tokens: without a dataset's tokens.npz."""
    monkeypatch.setattr(bench, "LOSS_TOKENS", 1000)
    monkeypatch.setattr(bench, "PRODUCTS", (256,))
    arguments = ["--row_memory=true", "--spelling=true", "--split_tokens=0.3", "--seq_len=48",
                 "--dataset=nowhere", "--loss_chunk=96", f"--runs_dir={tmp_path}"]
    assert tool(monkeypatch, "--track=cpu", *SMALL, *arguments) == 0
    assert capsys.readouterr().err == ""
    facts = only_line(tmp_path)
    check_facts(facts, loss_tokens=960)             # 20 rows, less than 1000 tokens
    assert facts["config"]["row_memory"] and facts["config"]["spelling"]


def test_public_step_is_skipped_where_its_logits_do_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.Memory, "free", lambda self: 2 ** 20)
    monkeypatch.setattr(bench, "PRODUCTS", (256,))
    config = make_config("cpu", **parse_arguments(SMALL) | dict(
        runs_dir=str(tmp_path), device_batch_size=8, seq_len=32))
    facts = bench.bench(config, {}, steps=1)
    assert "lower --device_batch_size" in facts["public"]["skipped"]
    assert "the public way / ours: skipped, its logits would take" in capsys.readouterr().out
    assert facts["loss"]["tokens"] < bench.LOSS_TOKENS and facts["steps"] == 1


# ==== Steps =====================================================================================
@pytest.mark.parametrize("seconds, steps", [(1.0, 20), (30.0, 3)])
def test_slow_steps_are_measured_less_often(seconds, steps):
    """By the mean over processes: they have to agree, here two, the other one takes no time."""
    runtime = SimpleNamespace(device=torch.device("cpu"), world_size=2, all_reduce=torch.clone)
    assert bench.Stepper.count(SimpleNamespace(runtime=runtime), 2 * seconds, 20) == steps


@pytest.mark.parametrize("steps, tokens", [(2, 2 * 8 * 16), (10 ** 6, 9_000)])
def test_random_documents_begin_with_bos(steps, tokens):
    """As many as the steps need, but not more than the budget."""
    config = make_config("cpu", **parse_arguments(SMALL))
    data = bench.random_data(config, steps)
    assert sum(map(len, data.train)) == tokens
    for document in data.train:
        assert document[0] == data.bos == 299 and (document[1:] < 299).all()
    assert len(data.train) > tokens / bench.DOCUMENT / 2


def test_random_tokens_are_split_and_have_strings():
    config = make_config("cpu", **parse_arguments(SMALL), split_tokens=0.3, spelling=True,
                         train_tokens=4000, selection_tokens=0, final_mixture="uniform")
    data = bench.random_data(config, 10)
    trainer = bench.TimedTrainer(replace(config, kd_alpha=0.5), start_runtime(config), data.tables)
    stepper = bench.Stepper(trainer, data)
    mergeable = sum(int((document != data.bos).sum()) for document in data.train)
    assert stepper.rows.num_cut == round(0.3 * mergeable) > 100
    features = data.tables["features"]
    assert features.shape == (bench.FEATURES, config.padded_vocab)
    assert 0 <= features.min() and features.max() < config.vocab_size
    before = trainer.model.head.weight.detach().clone()
    stepper.seconds(True)
    groups = {group.row.optimizer for group in trainer.optimizer.groups}
    assert "spelled" in groups and (trainer.model.head.weight != before).any()


def test_seconds_of_a_piece_are_without_those_within(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(bench, "now", lambda runtime: clock[0])
    trainer = SimpleNamespace(runtime=None, teacher="teacher", pieces=None)

    def takes(seconds, *inner):
        def run(model):
            clock[0] += seconds
            for function in inner:
                function("teacher")
        return run
    forward = bench.TimedTrainer.timed(trainer, takes(3.0), "forward")
    loss = bench.TimedTrainer.timed(trainer, takes(2.0, forward, forward), "loss")
    loss("model")                   # is not being timed
    trainer.pieces = dict.fromkeys(("forward", "loss", "teacher"), 0.0)
    loss("model")
    forward("model")
    assert trainer.pieces == {"forward": 3.0, "loss": 2.0, "teacher": 6.0}


# ==== The public way computes the same ==========================================================
def both_trainers(track, **changes):
    """Our Trainer and the public one, of the same random student and teacher in float64."""
    config = small_config(track, kd_alpha=0.4, device_batch_size=2, meta_rows=2, **changes)
    runtime = start_runtime(config)
    runtime.dtype = torch.float64
    pair = []
    for kind, optimizer in ((Trainer, MuonAdamW), (PublicTrainer, ReplicatedOptimizer)):
        trainer = kind(config, runtime, small_tables())
        for seed, model in enumerate((trainer.model, trainer.teacher)):
            randomize(model, seed).double()
        trainer.optimizer = optimizer(trainer.model.named_parameters(), config, runtime,
                                      trainer.tables)
        pair.append(trainer)
    return config, pair


@pytest.mark.parametrize("track, changes", [
    ("cpu", dict(second_weight=((0, 0.5),), third_weight=((0, 0.25),))),
    ("cpu", dict(kd_temperature=2.0, softcap=0.0, grad_clip=0.01, muon_eq=False)),
    ("limited", {}), ("tiny", {}), ("unlimited", {}),
    ("cpu", dict(row_memory=True, loss_chunk=24, second_weight=((0, 0.5),), kd_temperature=2.0)),
    ("limited", dict(row_memory=True, loss_chunk=12, spelling=True))])
@pytest.mark.parametrize("distill", [False, True])
def test_public_step_has_our_loss_gradients_and_update(track, changes, distill):
    config, pair = both_trainers(track, **changes)
    inputs, targets = batch(config)
    sums, gradients, weights = [], [], []
    for trainer in pair:
        for seed in (0, 1):         # the second step has the state that the first one leaves
            torch.manual_seed(seed)
            sums.append(trainer.gradients(inputs, targets, 0.8, distill))
            gradients.append(gradients_of(trainer.model))
            trainer.optimizer.step(0.5, 0.7, 0.9)
            weights.append({name: p.detach().clone()
                            for name, p in trainer.model.named_parameters()})
    for step in (0, 1):
        assert sums[step]["train_loss"] > 1
        assert (sums[step]["kl"] > 0.01) == distill
        for found in (sums, gradients, weights):
            ours, public = found[step], found[step + 2]
            assert ours.keys() == public.keys()
            for name in ours:
                difference = (public[name] - ours[name]).abs().max()
                assert difference <= 1e-6 * ours[name].abs().max(), name


@pytest.mark.parametrize("alpha, temperature, softcap", [
    (0.0, 1.0, 15.0), (0.5, 1.0, 15.0), (0.3, 2.0, 0.0)])
@pytest.mark.parametrize("row", [0, 6])
def test_naive_loss_is_the_chunked_loss(alpha, temperature, softcap, row):
    config = small_config(kd_temperature=temperature, softcap=softcap, loss_chunk=12)
    rows = config.padded_vocab
    assert rows > VOCAB         # the padding must not count
    targets = torch.randint(-1, 9, (30, 3), generator=rng())
    teacher = (randn(30, 8, seed=3), randn(rows, 8, seed=4)) if alpha else None
    spec = LossSpec(torch.tensor([1.0, 0.5, 0.25]), alpha, config, row)
    results = []
    for function, more in ((chunked_loss, [loss_chunk]), (naive_loss, [])):
        hidden = randn(30, 8, seed=1).requires_grad_()
        weight = randn(rows, 8, seed=2).requires_grad_()
        loss, sums = function(hidden, weight, targets, teacher, spec, *more)
        loss.backward()
        assert loss.isfinite()
        results.append([loss.detach(), sums["train_loss"], sums["kl"], hidden.grad, weight.grad])
    for ours, naive in zip(*results):
        torch.testing.assert_close(ours, naive, rtol=1e-6, atol=1e-9)
    assert (results[1][2] > 0.1) == bool(alpha)
