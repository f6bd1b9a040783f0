"""What a member's training makes of the schedules, and of dropout; processes that share a chain.

    python -m pytest tests/test_training.py
"""
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from tests.test_techniques import (config, random_model, random_tokens, rng, run_alone, run_in_two,
                                   trainer_of)

CHANGES = dict(
    num_models=5, num_epochs=4, first_epochs=2, batch_rows=8, edge_batch_rows=6, kd_from=3,
    kd_alpha=0.5, lr_warmup=0.1, lr_warmdown=0.5, lr_power=0.5, lr_floor=0.1, sawtooth_epochs=1,
    wd_schedule="0:1,0.5:0.25,0.5:2,1:3", momentum=0.9, momentum_start=0.6, momentum_steps=11,
    loop_start=1, loop_end=1, loop_count=2, loop_from_epoch=1, recurrence_from=0.75,
    window_schedule="0:0.25:0.5,0.5:0.5:1", window_pattern="SL", dropout=0.1)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """([one dict a step], result) of a whole run with every schedule there is."""
    steps = []

    class Watched(t.Trainer):
        def gradients(self, inputs, targets, progress, distill):
            model, teacher = self.model, self.teacher
            steps.append(dict(
                rows=len(inputs), progress=progress, distill=distill, stage=model.stage,
                windows=sorted(model.specs), first=tuple(inputs[0].tolist()),
                training=all(m.training for m in model.modules()),
                teacher_rests=not any(m.training for m in teacher.modules()),
                taught_by={n: p.detach().clone() for n, p in teacher.named_parameters()},
                weights={n: p.detach().clone() for n, p in model.named_parameters()}))
            return super().gradients(inputs, targets, progress, distill)

        def new_optimizer(self):
            optimizer = super().new_optimizer()
            step = optimizer.step

            def watched(lr, wd, momentum):
                steps[-1].update(lr=lr, wd=wd, momentum=momentum)
                step(lr, wd, momentum)
                steps[-1]["after"] = {n: p.detach().clone()
                                      for n, p in self.model.named_parameters()}
            optimizer.step = watched
            return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t, "Trainer", Watched)
        metrics, result = run_alone(
            tmp_path_factory.mktemp("training"), "--track=cpu", "--device_batch_size=2",
            "--ngram_order=0", "--final_mixture=uniform", "--compile=false",
            *(f"--{name}={value}" for name, value in CHANGES.items()))
    members = []
    for step in steps:
        if step["progress"] == 0:
            members.append([])
        members[-1].append(step)
    assert [m["step"] for m in metrics] == [i + 1 for member in members for i in range(len(member))]
    return members, result


def rows_an_epoch(result):
    """From the tokens that the run says it trained on."""
    c = t.make_config(**result["config"])
    tokens = sum(map(len, t.load_dataset(t.ROOT / c.dataset, c).train))
    return math.ceil((tokens - 1) / c.seq_len)


def test_members_take_their_epochs_and_rows(training):
    """2 epochs of the first member, 4 of the others; 6 rows a step at either end, 8 between."""
    members, result = training
    rows = rows_an_epoch(result)
    assert [member[0]["rows"] for member in members] == [6, 8, 8, 8, 6]
    for k, (member, epochs) in enumerate(zip(members, [2, 4, 4, 4, 4])):
        size = member[0]["rows"]
        assert len(member) == math.ceil(epochs * rows / size) and len(member) > 10
        assert [s["rows"] for s in member] == [size] * len(member)
        assert [s["progress"] for s in member] == [i / len(member) for i in range(len(member))]
    assert len({member[0]["first"] for member in members}) == 5     # each in an order of its own


def test_every_step_has_its_learning_rate_decay_and_momentum(training):
    members, _ = training
    for member, epochs in zip(members, [2, 4, 4, 4, 4]):
        for i, step in enumerate(member):
            p = step["progress"]
            rise = p / 0.1 if p < 0.1 else 1.0
            base = rise * (0.1 + 0.9 * min(1.0, (1 - p) / 0.5) ** 0.5)
            in_epoch = p * epochs - (epochs - 1)            # the last one has a tooth
            lr = base if in_epoch < 0 else 0.05 + (max(base, 0.05) - 0.05) * (
                1 + math.cos(math.pi * in_epoch)) / 2
            assert step["lr"] == pytest.approx(lr, abs=1e-9), p
            wd = np.interp(p, [0, 0.5], [1, 0.25]) if p < 0.5 else 2 + (p - 0.5) * 2
            assert step["wd"] == pytest.approx(wd), p
            assert step["momentum"] == pytest.approx(0.6 + 0.3 * min(1, i / 11))


def test_every_step_is_in_its_stage(training):
    """Loops from a quarter on (epoch 1 of 4), longer windows from half, twice from three quarters.

    The first member goes through the same stages in its own 2 epochs.
    """
    members, result = training
    length = result["config"]["seq_len"]
    for member in members:
        for step in member:
            p, stage = step["progress"], step["stage"]
            assert stage.loops == (2 if p >= 0.25 else 1)
            assert stage.passes == (2 if p >= 0.75 else 1)
            short, long = (0.5, 1) if p >= 0.5 else (0.25, 0.5)
            assert stage.windows == (short * length, long * length)
            assert stage.yarn == (((length // 2, length),) if p >= 0.5 else ())
            assert set(stage.windows) <= set(step["windows"])
        assert len({step["stage"] for step in member}) == 4


def test_members_from_kd_from_on_are_taught_by_the_last(training):
    """The teacher is the member before as it ended, and drops nothing out."""
    members, result = training
    for k, member in enumerate(members, 1):
        assert all(step["distill"] == (k >= 3) and step["training"] for step in member)
        assert all(step["teacher_rests"] for step in member)
        if k >= 3:
            for step in (member[0], member[-1]):
                for name, p in members[k - 2][-1]["after"].items():
                    assert torch.equal(step["taught_by"][name], p), (k, name)
    assert result["config"]["average"] == "last"


def test_members_begin_with_weights_of_their_own(training):
    members, _ = training
    begins = [member[0]["weights"] for member in members]
    for a, b in zip(begins, begins[1:]):
        assert not torch.equal(a["wte.weight"], b["wte.weight"])
        assert abs(np.corrcoef(a["wte.weight"].flatten(), b["wte.weight"].flatten())[0, 1]) < 0.05


# ==== Dropout ===================================================================================
@pytest.mark.parametrize("mlp", [True, False])
def test_dropout_is_behind_both_output_projections(mlp):
    """x + m1 attn(norm(x)), then x + m2 mlp(norm(x)); m is 0 with probability p, else 1/(1-p)."""
    model = random_model(config(dropout=0.25, mlp_dropout=mlp)).train()
    block, spec = model.blocks[0], model.specs[12]
    x = torch.randn(2, 12, 48, generator=rng(1), dtype=torch.float64)
    rms = lambda x: x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
    torch.manual_seed(3)
    ours = block(x, None, spec)
    torch.manual_seed(3)
    masks = [F.dropout(torch.ones_like(x), p) for p in (0.25, 0.25 if mlp else 0.0)]
    middle = x + masks[0] * block.attn(rms(x), None, spec)
    assert torch.allclose(ours, middle + masks[1] * block.mlp(rms(middle)), rtol=1e-9)
    for mask, p in zip(masks, (0.25, 0.25 if mlp else 0.0)):
        assert torch.isclose(mask, mask.new_tensor(0)).double().mean() == pytest.approx(p, abs=0.05)
        assert torch.allclose(mask[mask > 0], mask.new_tensor(1 / (1 - p)))
    block.eval()
    torch.manual_seed(3)
    middle = x + block.attn(rms(x), None, spec)
    assert torch.allclose(block(x, None, spec), middle + block.mlp(rms(middle)), rtol=1e-9)


def test_processes_drop_out_differently_and_begin_alike():
    trainer = trainer_of(dropout=0.5)
    trainer.model.float()
    trainer.rt.dtype = trainer.model.dtype = torch.float32
    trainer.model.prepare(12)
    tokens, seen = random_tokens(trainer.c, 2, 12), []
    for rank in (0, 1, 0):
        trainer.rt.rank = rank
        trainer.start_member(trainer.c, 1001, 1)
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        with torch.no_grad():       # weights of the output projections are not 0: normal
            seen.append((trainer.model(tokens), weights))
    assert not torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][0], seen[2][0])
    assert all(torch.equal(seen[0][1][name], seen[1][1][name]) for name in seen[0][1])


# ==== Stages, order =============================================================================
def test_order_of_a_window_schedule_does_not_matter():
    points = ["0:0.125:0.25", "0.25:0.25:0.5", "0.5:0.5:1"]
    expected = t.stages(config(window_schedule=",".join(points), window_pattern="SSSL"))
    assert [stage.windows[-1] for stage in expected] == [3, 6, 12]
    assert t.stages(config(window_schedule=",".join(
        [points[0], points[2], points[1]]), window_pattern="SSSL")) == expected


@pytest.mark.parametrize("shuffle", ["documents", "rows", "none"])
def test_what_an_epoch_permutes(shuffle):
    """Documents and rows; rows of documents in their order; nothing."""
    documents = [np.concatenate(([0], np.full(n, n))) for n in range(5, 35)]
    rows = t.Rows(documents, 8, 1, 3, 7, 0, shuffle)
    epochs = []
    for epoch in range(3):
        steps = range(epoch * rows.rows_per_epoch, (epoch + 1) * rows.rows_per_epoch)
        pieces = [np.append(x[0].numpy()[:1], y[0].numpy()) for x, y in map(rows.step, steps)]
        epochs.append([tuple(int(n) for n in piece if n >= 0) for piece in pieces])
        assert sum(len(piece) - 1 for piece in epochs[-1]) == rows.tokens - 1
    stream = np.concatenate(documents)
    in_order = [tuple(map(int, stream[i:i + 9])) for i in range(0, len(stream) - 1, 8)]
    for epoch in epochs:
        assert (epoch == in_order) == (shuffle == "none")
        assert (sorted(epoch) == sorted(in_order)) == (shuffle != "documents")
    assert (epochs[0] == epochs[1]) == (epochs[1] == epochs[2]) == (shuffle == "none")


# ==== Processes that share a chain ==============================================================
SAME = ["--compile=false", "--dropout=0", "--stochastic_depth=0"]
SHARED = {
    "clipping, batches by member, document masks, subsets": [
        "--track=cpu", *SAME, "--grad_clip=0.05", "--num_models=4", "--edge_batch_rows=6",
        "--device_batch_size=1", "--document_mask=true", "--subset_fraction=0.7"],
    "fixed XSA, EMA, distilled, recomputed, n-gram by support": [
        "--track=cpu", *SAME, "--xsa=fixed", "--average=ema", "--num_models=2",
        "--kd_temperature=2", "--recompute_blocks=true", "--num_layers=4", "--unet=true"],
    "members that continue, perturbed, learned mixture": [
        "--track=unlimited", *SAME, "--num_chains=1", "--num_models=3", "--num_epochs=1",
        "--kd_from=2", "--grad_clip=0.05", "--edge_batch_rows=0"],
}


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_of_a_chain_compute_what_one_does(name, tmp_path):
    """Every reading of the loss and every score, up to rounding."""
    steps, alone = run_alone(tmp_path / "one", *SHARED[name])
    steps_of_two, shared = run_in_two(tmp_path / "two", *SHARED[name])
    assert len(steps) == len(steps_of_two) and shared["processes"] == 2
    for key in ("train_loss", "kl"):
        assert [m[key] for m in steps_of_two] == pytest.approx([m[key] for m in steps], abs=2e-4)
    for one, other in zip(alone["members"], shared["members"], strict=True):
        for key in ("selection_loss", "val_loss", "holdout_loss"):
            assert other[key] == pytest.approx(one[key], abs=2e-4)
    for one, other in zip(alone["ensemble"], shared["ensemble"], strict=True):
        for key in one:
            assert other[key] == pytest.approx(one[key], abs=5e-4), key


# ==== Time limit ================================================================================
@pytest.mark.parametrize("limit, over", [(1e-5, True), (1000.0, False), (0.0, False)])
def test_a_run_over_its_time_limit_says_so(limit, over, tmp_path):
    result = run_alone(tmp_path, "--track=cpu", "--num_models=1", "--num_epochs=1", *SAME,
                       f"--time_limit={limit}")[1]
    lines = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8").splitlines()
    line, = [line for line in lines if re.search(r"\btime {10,}\d", line)]
    said = "; OVER the track's limit of 1e-05 minutes" in line
    assert said is result["over_time_limit"] is over


def test_every_track_has_a_time_limit():
    assert all(t.make_config(track).time_limit > 0 for track in t.TRACKS)
