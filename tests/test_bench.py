"""The command `bench`, and the public way of training that it compares with.

    python -m pytest tests/test_bench.py
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_gpt as t
from data.shards import UserError
from records import bench, bench_public, report

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "train_gpt.py")
# a step takes some hundredths of a second
SMALL = ["--preset=toy", "--device=cpu", "--dtype=float32", "--vocab_size=300", "--seq_len=16",
         "--num_layers=4", "--model_dim=32", "--num_heads=2", "--batch_rows=8"]
TABLE = ("warm-up", "seconds", "tokens/s", "MFU", "peak memory", "data", "forward", "loss",
         "backward, rest", "optimizer", "KD teacher", "ours", "naive", "naive / ours")
PIECES = {"data", "forward", "loss", "backward", "optimizer"}


def command(*arguments, processes=0):
    """`train_gpt.py bench` in a process of its own, or in several."""
    env = {k: v for k, v in os.environ.items()
           if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [sys.executable, *(launcher if processes else []), SCRIPT, "bench", *arguments],
        capture_output=True, encoding="utf-8", env=env, timeout=120)


def only_line(runs):
    """The one line of JSON that a bench left in the folder `runs`."""
    line, = (runs / "bench.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(line)


def check_facts(facts):
    """Every documented key is there, and what cannot be 0 or less is not."""
    for kind, pieces in ("ce", PIECES), ("kd", PIECES | {"teacher"}):
        step = facts[kind]
        assert all(step[key] > 0 for key in ("seconds", "tokens_per_second", "mfu", "peak_bytes",
                                             "flops_per_token"))
        assert set(step["pieces"]) == pieces
        assert all(step["pieces"][piece] > 0 for piece in PIECES)   # the teacher's: a difference
    speed = facts["tokens_per_step"] / facts["kd"]["seconds"]
    assert facts["kd"]["tokens_per_second"] == pytest.approx(speed)
    assert facts["kd"]["mfu"] == pytest.approx(
        speed * facts["kd"]["flops_per_token"] / facts["peak_flops"] / facts["processes"])
    assert facts["kd"]["flops_per_token"] > facts["ce"]["flops_per_token"]
    assert facts["kd_over_ce"] == facts["kd"]["seconds"] / facts["ce"]["seconds"]
    assert facts["warmup_seconds"] > 0 and facts["steps"] == bench.STEPS
    assert facts["recompiles"] == 0
    assert 0 < facts["optimizer"]["share_of_full_batch"] < 1
    assert facts["loss"]["tokens"] == bench.LOSS_TOKENS
    for way in ("ours", "naive"):
        assert facts["loss"][way]["seconds"] > 0
    assert facts["loss"]["naive"]["peak_extra_bytes"] > 4 * 3 * bench.LOSS_TOKENS * 300
    assert facts["loss"]["seconds_ratio"] > 0
    assert all(facts["public"][key] > 0 for key in ("steps", "seconds", "ratio", "peak_bytes"))


# ==== The command ===============================================================================
@pytest.mark.skipif(sys.platform != "linux", reason="a CPU's peak memory is known on Linux only")
def test_bench_prints_its_table_and_appends_a_line(tmp_path):
    done = command("--track=tiny", *SMALL, f"--runs_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for name in TABLE:
        assert re.search(rf"^{name}  ", done.stdout, re.M), name
    assert "recompiles after warm-up: 0" in done.stdout
    assert re.search(r"% of a 524,288-token step; a process updates 100.0%", done.stdout)
    assert re.search(r"^whole KD step, the public way / ours: [\d.]+x", done.stdout, re.M)
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert [path.name for path in tmp_path.iterdir()] == ["bench.jsonl"]       # no run's folder
    facts = only_line(tmp_path)
    check_facts(facts)
    assert facts["track"] == "tiny" and facts["overrides"]["vocab_size"] == 300
    assert facts["config"]["kd_alpha"] == 0.5 and facts["optimizer"]["parameters_a_process"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="a CPU's peak memory is known on Linux only")
def test_bench_in_two_processes(tmp_path):
    done = command("--track=limited", *SMALL, f"--runs_dir={tmp_path}", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("warm-up  ") == 1 and done.stdout.count("public way") == 1
    facts = only_line(tmp_path)
    check_facts(facts)
    assert facts["processes"] == 2
    assert 0.5 <= facts["optimizer"]["parameters_a_process"] < 0.6


@pytest.mark.parametrize("arguments, message", [
    (["--track=limited", *SMALL, "--meta_rows=3"], "is not divisible by 1 process(es) x 2 x 3"),
    (["--track=cpu", *SMALL, "--vocab_size=70000"], "tokens must be below 65,536"),
    (["--track=cpu", "--steps=3"], "unknown field 'steps'")])
def test_bad_settings_are_one_line(arguments, message, capsys):
    assert t.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_public_step_is_skipped_where_its_logits_do_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.Memory, "free", lambda self: 2 ** 20)
    c = t.make_config("cpu", **settings(SMALL) | dict(
        runs_dir=str(tmp_path), device_batch_size=8, seq_len=32))
    facts = bench.bench(t, c, {}, steps=1)
    assert "lower --device_batch_size" in facts["public"]["skipped"]
    assert "the public way / ours: skipped, its logits would take" in capsys.readouterr().out
    assert facts["loss"]["tokens"] < bench.LOSS_TOKENS and facts["steps"] == 1


def settings(arguments):
    return t.parse_arguments(arguments)


# ==== The public way computes the same ==========================================================
def trainers(track, **changes):
    """Our trainer and the public one, of the same config, in float64, dropout off."""
    c = t.make_config(track, **settings(SMALL) | dict(dropout=0.0, kd_alpha=0.4) | changes)
    rt, data = t.start_runtime(c), SimpleNamespace(bos=c.vocab_size - 1)
    rt.dtype = torch.float64
    pair = t.Trainer(c, rt, None, data), bench_public.public_trainer(t, c, rt, data)
    for trainer in pair:
        for k, model in enumerate((trainer.teacher, trainer.model)):
            trainer.start_member(c, 1 + k, 1)
            random = torch.Generator().manual_seed(k)
            for p in trainer.model.parameters():    # of a size that matters, the zeros too
                p.data += 0.3 * torch.randn(p.shape, generator=random)
            model.load_state_dict(trainer.model.state_dict())
            model.double()
        trainer.optimizer = type(trainer.optimizer)(
            *([t] if trainer is pair[1] else []), trainer.model.named_parameters(), c,
            *([rt] if trainer is pair[1] else [1, 0, rt.dtype]))
    return c, pair


def random_batch(c, seed=0):
    """inputs, targets [batch_rows, T]; the last row ends early."""
    random = torch.Generator().manual_seed(seed)
    stream = torch.randint(0, c.vocab_size - 1, (c.batch_rows, c.seq_len + 1), generator=random)
    inputs, targets = stream[:, :-1].clone(), stream[:, 1:].clone()
    targets[-1, 9:] = -1
    return inputs, targets


@pytest.mark.parametrize("track, changes", [
    ("cpu", {}), ("cpu", dict(kd_temperature=2.0, softcap=0.0, document_mask=True)),
    ("limited", {}), ("tiny", {}), ("unlimited", dict(num_chains=1, edge_batch_rows=0))])
@pytest.mark.parametrize("distill", [False, True])
def test_public_step_has_our_loss_gradients_and_update(track, changes, distill):
    c, pair = trainers(track, **changes)
    sums, gradients, weights = [], [], []
    for trainer in pair:
        torch.manual_seed(0)
        # at the first step: all targets have weight then
        sums.append(trainer.gradients(*random_batch(c), 0.0, distill))
        gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
        trainer.optimizer.step(0.5, 0.7, 0.9)
        weights.append({name: p.detach() for name, p in trainer.model.named_parameters()})
    torch.testing.assert_close(*sums, rtol=1e-6, atol=1e-6)
    assert sums[0][0] > 1 and (sums[0][1] > 0.01) == distill
    for ours, public in gradients, weights:
        assert ours.keys() == public.keys()
        for name in ours:
            scale = ours[name].abs().max().clamp(min=1e-12)
            assert (ours[name] - public[name]).abs().max() / scale < 1e-4, name


@pytest.mark.parametrize("alpha, temperature, softcap", [(0.0, 1.0, 15.0), (0.5, 1.0, 15.0),
                                                         (0.3, 2.0, 0.0)])
def test_naive_loss_is_the_chunked_loss(alpha, temperature, softcap):
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    hidden, weight = draw(23, 8), draw(64, 8)
    targets = torch.randint(-1, 50, (23, 3), generator=random)
    teacher = (draw(23, 8), draw(64, 8)) if alpha else (None, None)
    results = []
    for loss, more in ((t.ChunkedLoss.apply, (7, t.loss_chunk)),
                       (lambda *a: bench_public.naive_loss(t, *a), ())):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        sums = loss(h, w, targets, torch.tensor([1.0, 0.5, 0.2]), *teacher, alpha, temperature,
                    softcap, 50, *more)
        sums[0].backward()
        results.append([*sums, h.grad, w.grad])
    for ours, naive in zip(*results):
        torch.testing.assert_close(ours, naive, rtol=1e-5, atol=1e-6)


# ==== Peaks and steps ===========================================================================
@pytest.mark.parametrize("name, tera", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
    ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835), ("NVIDIA GH200 480GB", 989),
    ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA L40S", 362), ("NVIDIA GeForce RTX 4090", 165.2),
    ("NVIDIA GeForce RTX 5090", 209.5), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ("NVIDIA L40", None), ("NVIDIA H20", None), ("Tesla V100-SXM2-16GB", None)])
def test_peak_of_a_device(name, tera, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = report.peak_flops(torch.device("cuda"))
    assert peak == (tera and pytest.approx(tera * 1e12))


def test_slow_steps_are_measured_less_often():
    rt = SimpleNamespace(device=torch.device("cpu"), world=1, sum=lambda tensor: tensor)
    stepper = SimpleNamespace(rt=rt)
    assert bench.Stepper.count(stepper, 1.0, 20) == 20
    assert bench.Stepper.count(stepper, 30.0, 20) == 3


def test_random_documents_begin_with_bos():
    c = t.make_config("cpu", preset="toy", vocab_size=300)
    data = bench.random_data(c, 10)
    assert sum(map(len, data.train)) == min(c.train_tokens, 10 * c.batch_rows * c.seq_len)
    assert len(data.train) > 3
    for document in data.train:
        assert document[0] == data.bos == 299 and (document[1:] < 299).all()


# ==== device_batch_size=auto ====================================================================
@pytest.mark.parametrize("room, rows", [(99, 1), (100, 1), (139, 1), (140, 2), (220, 4), (379, 4),
                                        (380, 8), (10 ** 6, 8)])
def test_largest_micro_batch_that_fits(room, rows, monkeypatch):
    """Gradients that need 100 MiB with one row and 40 more with each other; 8 rows a batch."""
    c = t.make_config("cpu", preset="toy", device="cpu", device_batch_size="auto", batch_rows=8,
                      compile=False)
    assert c.device_batch_size == 0
    rt, tried = t.start_runtime(c), []

    def extra(memory, work):
        work = getattr(work, "func", work)
        size = work.__self__.trainer.c.device_batch_size
        tried.append((work.__name__, size))
        return (100 + 40 * (size - 1)) * 2 ** 20 if work.__name__ == "gradients" else None
    monkeypatch.setattr(bench.Memory, "extra", extra)
    monkeypatch.setattr(bench.Memory, "free", lambda memory: room * 2 ** 20 / bench.FILLED)
    trainer = t.Trainer(c, rt, None, bench.random_data(c, 10))
    assert tried == [("update", 4), ("gradients", 4), ("gradients", 8)]     # 4: a chunk of the loss
    assert t.micro_batch_rows(trainer.c, 1) == rows == trainer.c.device_batch_size
    assert f"micro-batches of {rows} row(s)" in rt.notes[-1]


@pytest.mark.parametrize("average, rows", [("last", 4), ("probs", 4), ("ema", 2), ("best", 1)])
def test_micro_batch_leaves_room_for_the_optimizer_and_averages(average, rows, monkeypatch):
    """The optimizer's step is the peak with 1 and 2 rows, which says nothing of further rows."""
    c = t.make_config("cpu", preset="toy", device="cpu", device_batch_size="auto", batch_rows=16,
                      seq_len=64, loss_chunk=64, average=average, compile=False)
    weights = 4 * sum(p.numel() for p in t.GPT(c).parameters())
    monkeypatch.setattr(bench.Memory, "extra", lambda memory, work: weights * (
        1 / 5 if getattr(work, "func", work).__name__ == "update" else
        work.func.__self__.trainer.c.device_batch_size / 2))
    monkeypatch.setattr(bench.Memory, "free", lambda memory: 3.5 * weights / bench.FILLED
                        - (0 if average != "ema" else 1.5 * weights))
    trainer = t.Trainer(c, t.start_runtime(c), None, bench.random_data(c, 10))
    assert trainer.c.device_batch_size == rows


@pytest.mark.parametrize("rows, problem", [(9, None), (8, torch.OutOfMemoryError("too big"))])
def test_one_row_where_two_do_not_fit_or_cannot_be(rows, problem, monkeypatch):
    def extra(memory, work):
        raise problem or AssertionError
    monkeypatch.setattr(bench.Memory, "extra", extra)
    c = t.make_config("cpu", preset="toy", device="cpu", device_batch_size="auto", batch_rows=rows,
                      compile=False)
    trainer = t.Trainer(c, t.start_runtime(c), None, bench.random_data(c, 10))
    assert trainer.c.device_batch_size == 1


def test_a_run_that_goes_on_keeps_its_micro_batch(tmp_path, monkeypatch):
    c = t.make_config("cpu", preset="toy", device="cpu", device_batch_size="auto", batch_rows=8,
                      compile=False)
    rt, data = t.start_runtime(c), bench.random_data(c, 10)
    found = bench.fit_micro_batch(t, c, rt, data, tmp_path).device_batch_size
    monkeypatch.setattr(bench.Memory, "free", lambda memory: 0)
    assert bench.fit_micro_batch(t, c, rt, data, tmp_path).device_batch_size == found > 1
    assert bench.fit_micro_batch(t, c, rt, data).device_batch_size == 1


def test_micro_batch_where_memory_is_not_known(monkeypatch):
    monkeypatch.setattr(bench.Memory, "peak", lambda memory: None)
    c = t.make_config("cpu", preset="toy", device="cpu", device_batch_size="auto")
    assert t.Trainer(c, t.start_runtime(c), None, bench.random_data(c, 9)).c.device_batch_size == 1


def test_bench_finds_its_micro_batch(tmp_path):
    done = command("--track=tiny", *SMALL, "--batch_rows=16", "--device_batch_size=auto",
                   f"--runs_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    facts = only_line(tmp_path)
    assert facts["micro_batch_rows"] == facts["config"]["device_batch_size"] == 2   # meta_rows
    assert "micro-batches of 2 row(s)" in done.stdout


def test_only_a_micro_batch_is_automatic():
    with pytest.raises(UserError, match="--num_layers=auto: must be a whole number"):
        t.make_config("cpu", num_layers="auto")
