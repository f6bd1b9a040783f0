"""The numbers of the NanoGPT Slowrun's public tracks, and runs of them on one and two processes.

    python -m pytest tests/test_public_tracks.py [--slow]

The settings are written out here: the script must turn them into the published numbers of
parameters, steps and FLOPs, rates, windows and batches. Its own tracks may be edited.
"""
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_gpt
from helpers import PUBLIC, ROOT, SCRIPT, main, read_run, torchrun
from train_gpt import (GPT, Config, Rows, base_multiplier, find_row, flops_per_token, layer_order,
                       lr_multiplier, momentum_at, num_parameters, parameter_table,
                       piecewise_linear, stage_at, training_stages)


def teeth(first, epochs):
    """Points of decay that rises from 0.65 to 1.5 in each epoch from `first` on."""
    return [((epoch + end) / epochs, (0.65, 1.5)[end])
            for epoch in range(first, epochs) for end in (0, 1)]


SHARED = dict(
    train_tokens=100_000_000, selection_tokens=132_000, vocab_size=50257, seq_len=2048,
    batch_rows=256, num_models=1, num_layers=30, model_dim=1792, num_heads=14,
    mlp_multiple=256, resid_init=1.0, x0_init=0.1, unet=True, value_projections=True,
    attn_gate=True, xsa=False, iha=True, window_pattern="SSSL", window_schedule=(), loop_start=15,
    loop_end=20, loop_count=3, recurrence_from=0.0, mtp_weight=0.3, lr_warmdown=0.2, lr_power=0.5,
    lr_floor=0.0, sawtooth_floor=0.05, weight_decay=1.3, matrix_lr=0.01, embed_lr=0.0375,
    head_lr=0.0005, x0_lr=0.025, scalar_lr=0.00025, gate_lr=0.0, momentum=0.95,
    momentum_start=0.85, momentum_steps=300)
TRACKS = {
    "tiny": dict(
        num_epochs=15, num_layers=16, model_dim=1024, num_heads=8, resid_init=1.1, xsa=True,
        iha=False, recurrence_from=0.7, loop_count=1, loop_start=0, loop_end=0, loop_from_epoch=0,
        mtp_weight=0.0, lr_warmdown=0.4, lr_power=1.0, sawtooth_epochs=4, weight_decay=0.8,
        wd_schedule=((0, 1), (2 / 15, 1), (8 / 15, 0.125), (1, 1.1625))),
    "limited": dict(
        num_epochs=11, loop_from_epoch=6, sawtooth_epochs=3,
        wd_schedule=((0, 1), (0.4, 1), *teeth(8, 11))),
    "two_hour": dict(
        num_epochs=22, loop_from_epoch=13, sawtooth_epochs=8,
        window_schedule=((0, 0.125, 0.375), (6 / 22, 0.375, 0.875), (13 / 22, 0.625, 1)),
        wd_schedule=((0, 1), (0.4, 1), *teeth(14, 22))),
    "unlimited": dict(
        num_epochs=2, num_models=96, model_dim=2048, num_heads=16,
        loop_end=24, loop_count=5, loop_from_epoch=0, lr_warmdown=1.0, lr_power=1.0,
        lr_floor=0.08, sawtooth_epochs=0, wd_schedule=((0, 0.7), (1, 1)), momentum_start=0.95),
}
# Parameters of the blocks and of all; FLOPs a token in the first stages
PUBLISHED = {
    "tiny": (0.2055e9, 0.317e9, [1.76e9]),
    "limited": (1.170e9, 1.444e9, [9.22e9, 12.37e9]),
    "two_hour": (1.170e9, 1.444e9, [8.91e9, 9.15e9, 12.44e9]),
    "unlimited": (1.541e9, 1.870e9, [25.5e9]),
}
CONFIGS = {track: Config(**{**SHARED, **changes}) for track, changes in TRACKS.items()}
# lengths of a member of which ends of epochs are steps, or not
MORE_STEPS = (0, 1, 2, 3, 11, 100)
every_track = pytest.mark.parametrize("track", PUBLIC)


def rows_of(config):
    """The Rows of a member, from the number of tokens alone (the document takes no memory)."""
    tokens = np.broadcast_to(np.uint16(0), config.train_tokens - config.selection_tokens)
    return Rows([tokens], config.seq_len, config.batch_rows, config.num_epochs, 0, 0)


def seen_stages(config):
    """The stages that steps are in."""
    steps = rows_of(config).num_steps
    stages = training_stages(config)
    return list(dict.fromkeys(stage_at(stages, step / steps) for step in range(steps)))


# ==== Size and cost =============================================================================
@pytest.fixture
def published_gates(monkeypatch):
    monkeypatch.setattr(train_gpt, "GATE_CHANNELS", 12)
    monkeypatch.setattr(train_gpt, "VALUE_GATE_CHANNELS", 32)


def block_weights(config):
    """Of attention, SwiGLU MLP, gates and mixed heads; XSA has one number a head."""
    D, H = config.model_dim, config.num_heads
    hidden = 256 * math.ceil(8 * D / 3 / 256)
    extra = H if config.xsa else 3 * H * H
    return 4 * D * D + 3 * D * hidden + 12 * H + extra


@pytest.mark.usefixtures("published_gates")
@every_track
def test_parameters(track):
    """Value projections are of every second layer, and not in the blocks."""
    config = CONFIGS[track]
    D, L, H = config.model_dim, config.num_layers, config.num_heads
    with torch.device("meta"):
        model = GPT(config)
    blocks = L * block_weights(config) + L // 2 * 32 * H
    mtp = block_weights(config) + 2 * D * D if config.mtp_weight else 0
    total = blocks + L // 2 * D * D + 2 * 50304 * D + mtp + 2 * L + L // 2
    assert num_parameters(model.blocks) == blocks
    assert num_parameters(model) == total
    assert [blocks, total] == pytest.approx(PUBLISHED[track][:2], rel=1e-3)


@pytest.mark.parametrize("track, steps", [("tiny", 2859), ("limited", 2097), ("two_hour", 4194)])
def test_steps(track, steps):
    """48,804 rows an epoch in public; ours carry rows over and leave out selection."""
    rows = rows_of(CONFIGS[track])
    assert rows.rows_per_epoch == pytest.approx(48_804, rel=0.01)
    assert rows.num_steps == pytest.approx(steps, rel=0.01)


def flops_by_hand(config, loops, passes, short, long):
    """6 a matmul weight and use; 12 D a key, with the mean over a row of the keys that are seen.

    Loops run `loops` times; of passes all but the last are forward only, a third of both.
    """
    D, H, L, T = config.model_dim, config.num_heads, config.num_layers, config.seq_len
    head = 50304 * D
    looped = range(config.loop_start, config.loop_end + 1) if loops > 1 else ()
    trunk = 0
    for i in [*range(L), *[*looped] * (loops - 1)]:
        weights = block_weights(config) + ((D * D + 32 * H) if i % 2 == 1 else 0)
        window = long if i % 4 == 3 or i == L - 1 else short
        trunk += 6 * weights + 12 * D * np.minimum(np.arange(1, T + 1), window + 1).mean()
    mtp = 0
    if config.mtp_weight:
        mtp = 6 * (block_weights(config) + 2 * D * D + head)
        mtp += 12 * D * np.arange(1, T + 1).mean()
    return 6 * head + (1 + (passes - 1) / 3) * trunk + mtp


@pytest.mark.usefixtures("published_gates")
@every_track
def test_flops_of_a_token(track):
    """loops, passes, windows of each stage that steps are in."""
    expected = {"tiny": [(1, 1, 1024, 2048), (1, 2, 1024, 2048)],
                "limited": [(1, 1, 1024, 2048), (3, 1, 1024, 2048)],
                "two_hour": [(1, 1, 256, 768), (1, 1, 768, 1792), (3, 1, 1280, 2048)],
                "unlimited": [(5, 1, 1024, 2048)]}
    config = CONFIGS[track]
    found = [flops_per_token(config, stage) for stage in seen_stages(config)]
    assert found == pytest.approx(
        [flops_by_hand(config, *stage) for stage in expected[track]], rel=1e-9)
    published = PUBLISHED[track][2]
    assert found[:len(published)] == pytest.approx(published, rel=0.01)


@pytest.mark.usefixtures("published_gates")
@pytest.mark.parametrize("changes", [dict(mtp_weight=0.0), dict(window_pattern="L"),
                                     dict(num_layers=8, loop_start=2, loop_end=5)], ids=str)
def test_flops_of_limited_changed(changes):
    config = replace(CONFIGS["limited"], **changes)
    short = 2048 if config.window_pattern == "L" else 1024
    for stage, loops in zip(training_stages(config), (1, 3), strict=True):
        assert flops_per_token(config, stage) == pytest.approx(
            flops_by_hand(config, loops, 1, short, 2048), rel=1e-9)


@pytest.mark.usefixtures("published_gates")
def test_flops_of_a_whole_run_of_limited():
    """1.17e19 in all: loops run in 5 of the 11 epochs, the 7th (counted from 1) to the last."""
    config = CONFIGS["limited"]
    steps, stages = rows_of(config).num_steps, training_stages(config)
    flops = {stage: flops_per_token(config, stage) for stage in stages}
    total = sum(flops[stage_at(stages, step / steps)] for step in range(steps)) * 256 * 2048
    assert total == pytest.approx(1.17e19, rel=0.01)


# ==== Stages and windows ========================================================================
@every_track
def test_every_stage_has_steps(track):
    """A stage that no step is in is a mistake in a schedule (and compiles a graph for nothing)."""
    config = CONFIGS[track]
    assert seen_stages(config) == training_stages(config)


def test_stages_of_tiny_and_limited():
    tiny, limited = (training_stages(CONFIGS[track]) for track in ("tiny", "limited"))
    assert [(s.start, s.loops, s.passes) for s in tiny] == [(0, 1, 1), (0.7, 1, 2)]
    assert [(s.start, s.loops, s.passes) for s in limited] == [(0, 1, 1), (6 / 11, 3, 1)]
    for stage in limited:
        assert stage.windows == tuple(2048 if i % 4 == 3 or i == 29 else 1024 for i in range(30))
        assert stage.growths == ()


def test_layer_order_of_looped_tracks():
    loop = [*range(15, 21)]
    assert layer_order(CONFIGS["limited"], 3) == (*range(15), *loop * 3, *range(21, 30))
    loop = [*range(15, 25)]
    assert layer_order(CONFIGS["unlimited"], 5) == (*range(15), *loop * 5, *range(25, 30))


def test_windows_of_two_hour():
    """(S, L): (256, 768) in epochs 1 to 6, (768, 1792) to 13, then (1280, 2048) and loops."""
    config = CONFIGS["two_hour"]
    stages, steps = training_stages(config), 4194
    for step in range(0, steps, 10):
        stage = stage_at(stages, step / steps)
        epoch = step / steps * 22
        if min(abs(epoch - 6), abs(epoch - 13)) > 0.01:
            index = (epoch > 6) + (epoch > 13)
            short, long = ((256, 768), (768, 1792), (1280, 2048))[index]
            assert stage.windows == (short, short, short, long) * 7 + (short, long)
            assert stage.growths == ((768, 1792), (1792, 2048))[:index]
            assert stage.loops == (3 if index == 2 else 1)
            assert stage.passes == 1


# ==== Rates, decay, batches =====================================================================
def learning_rate(config, progress):
    """Warmdown of exponent p, then the sawtooth: a cosine from it to 0.05 in each last epoch.

    progress: a Fraction, so that no step is on the wrong side of an epoch's end.
    """
    left = min(1.0, float(1 - progress) / config.lr_warmdown)
    base = config.lr_floor + (1 - config.lr_floor) * left ** config.lr_power
    epoch = progress * config.num_epochs
    if epoch < config.num_epochs - config.sawtooth_epochs:
        return base
    tooth = (1 + math.cos(math.pi * float(epoch - int(epoch)))) / 2
    return 0.05 + (max(base, 0.05) - 0.05) * tooth


@every_track
@pytest.mark.parametrize("more", MORE_STEPS)
def test_learning_rate_of_every_step(track, more):
    config = CONFIGS[track]
    plain = replace(config, sawtooth_epochs=0)
    steps = rows_of(config).num_steps + more
    for step in range(steps):
        assert lr_multiplier(config, step / steps) == pytest.approx(
            learning_rate(config, Fraction(step, steps)), abs=1e-9), step
        assert lr_multiplier(plain, step / steps) == base_multiplier(config, step / steps)


@every_track
@pytest.mark.parametrize("more", MORE_STEPS)
def test_stage_of_every_step(track, more):
    config = CONFIGS[track]
    steps = rows_of(config).num_steps + more
    stages = training_stages(config)
    starts = {"tiny": [0, Fraction(7, 10)], "limited": [0, Fraction(6, 11)],
              "two_hour": [0, Fraction(6, 22), Fraction(13, 22)], "unlimited": [0]}[track]
    for step in range(steps):
        begun = sum(Fraction(step, steps) >= start for start in starts)
        assert stage_at(stages, step / steps) == stages[begun - 1], step


def test_sawtooth_of_limited_restarts_with_each_epoch():
    config = CONFIGS["limited"]
    for epoch in (8, 9, 10):
        top = (max(0, 1 - epoch / 11) / 0.2) ** 0.5 if epoch > 8.8 else 1.0
        assert lr_multiplier(config, epoch / 11 + 1e-9) == pytest.approx(top, abs=1e-6)
        assert lr_multiplier(config, (epoch + 1) / 11 - 1e-9) == pytest.approx(0.05, abs=1e-6)


def weight_decay(track, progress):
    """Base times multiplier, as the public tracks describe it, exactly; progress: a Fraction."""
    if track in ("limited", "two_hour"):        # 1 until 40 %, .65 at the sawtooth's start, teeth
        epochs, last = {"limited": (11, 3), "two_hour": (22, 8)}[track]
        epoch, start = progress * epochs, Fraction(epochs - last, epochs)
        if progress < start:
            falling = max(0, (progress - Fraction(2, 5)) / (start - Fraction(2, 5)))
            return Fraction(13, 10) * (1 - Fraction(35, 100) * falling)
        return Fraction(13, 10) * (Fraction(65, 100) + Fraction(85, 100) * (epoch % 1))
    if track == "tiny":                         # .8 in epochs 1 and 2, .1 at the end of the 8th
        epoch = 15 * progress
        if epoch < 2:
            return Fraction(8, 10)
        if epoch < 8:
            return Fraction(8, 10) - Fraction(7, 10) * (epoch - 2) / 6
        return Fraction(1, 10) + Fraction(83, 100) * (epoch - 8) / 7
    lr = 1 - Fraction(92, 100) * progress       # unlimited: rises from .91 as the LR falls
    return Fraction(13, 10) * (Fraction(7, 10) + Fraction(3, 10) * (1 - lr) / Fraction(92, 100))


@every_track
@pytest.mark.parametrize("more", MORE_STEPS)
def test_weight_decay_of_every_step(track, more):
    """At full length, by exact rationals: which side of a jump a step is on as well."""
    config = CONFIGS[track]
    steps = rows_of(config).num_steps + more
    for step in range(steps):
        ours = config.weight_decay * piecewise_linear(config.wd_schedule, step / steps)
        expected = float(weight_decay(track, Fraction(step, steps)))
        assert ours == pytest.approx(expected, rel=1e-12), step


def test_decay_falls_back_at_the_very_step_that_begins_an_epoch():
    """4,191 steps are 190.5 an epoch of two_hour: every second epoch begins with a step."""
    config = CONFIGS["two_hour"]
    for step in (3048, 3429, 3810):
        assert piecewise_linear(config.wd_schedule, step / 4191) == pytest.approx(0.65, rel=1e-12)
        assert piecewise_linear(config.wd_schedule, (step - 1) / 4191) > 1.49


def test_settings_come_back_from_their_text_to_the_last_bit():
    for track in TRACKS:
        for name in ("wd_schedule", "window_schedule"):
            value = getattr(CONFIGS[track], name)
            assert train_gpt.parse(name, train_gpt.as_text(value)) == value


def test_momentum():
    steps = (0, 150, 300, 2000)
    assert [momentum_at(CONFIGS["limited"], step) for step in steps] == pytest.approx(
        [0.85, 0.9, 0.95, 0.95])
    assert {momentum_at(CONFIGS["unlimited"], step) for step in steps} == {0.95}


@pytest.mark.parametrize("name, kind, rate, decay", [
    ("wte.weight", "adamw", 0.0375, 1.3), ("head.weight", "adamw", 0.0005, 1.3),
    ("x0_lambdas", "adamw", 0.025, 0), ("resid_lambdas", "adamw", 0.00025, 0),
    ("skip_lambdas", "adamw", 0.00025, 0), ("blocks.3.attn.mix", "adamw", 0.02, 0),
    ("blocks.3.attn.q.weight", "muon", 0.01, 1.3), ("mtp_proj.weight", "muon", 0.01, 1.3),
    ("blocks.0.attn.gate.weight", "muon", 0.01, 1.3),
    ("mtp_block.mlp.proj.weight", "muon", 0.01, 1.3)])
def test_rates_of_limited(name, kind, rate, decay):
    row = find_row(parameter_table(CONFIGS["limited"]), name)
    assert (row.optimizer, row.lr, row.weight_decay) == (kind, rate, decay)


# ==== Whole runs on one and two processes =======================================================
# The tracks as they are, small, without what is drawn at random within a step
SMALL = ["--preset=toy", "--device=cpu", "--dtype=float32", "--train_tokens=4000",
         "--selection_tokens=500", "--eval_tokens=300", "--batch_rows=8", "--model_dim=32",
         "--num_layers=2", "--num_epochs=2", "--loop_start=1", "--loop_end=1", "--log_steps=1",
         "--dropout=0", "--stochastic_depth=0", "--run_id=run"]
RUNS = {
    "tiny": [], "limited": [], "two_hour": [],
    "unlimited": ["--num_models=4", "--num_epochs=1", "--kd_from=2", "--kd_alpha=0.45"],
}


def assert_same_run(one, two):
    """The same members up to the order of summation: losses of all steps, scores, weights."""
    assert two.result["processes"] == 2
    steps = [(m["member"], m["step"]) for m in one.steps]
    assert [(m["member"], m["step"]) for m in two.steps] == steps
    assert len(steps) >= 9
    for key in ("train_loss", "kl"):
        assert [m[key] for m in two.steps] == pytest.approx([m[key] for m in one.steps], abs=1e-3)
    for a, b in zip(one.result["members"], two.result["members"], strict=True):
        for key in ("train_loss", "selection_loss", "val_loss", "holdout_loss"):
            assert b[key] == pytest.approx(a[key], abs=1e-3)
    assert two.result["val_loss"] == pytest.approx(one.result["val_loss"], abs=1e-3)
    files = sorted(path.name for path in (one.folder / "members").iterdir())
    assert sorted(path.name for path in (two.folder / "members").iterdir()) == files
    for name in files:
        if "logp" not in name:
            a, b = (load_file(run.folder / "members" / name) for run in (one, two))
            assert set(a) == set(b)
            for key in a:
                scale = a[key].abs().max().clamp(min=1e-3)
                assert (a[key] - b[key]).abs().mean() <= 0.01 * scale, key


@pytest.mark.parametrize("track", [
    "tiny", *(pytest.param(track, marks=pytest.mark.slow) for track in PUBLIC[1:])])
def test_two_processes_train_what_one_does(track, tmp_path):
    arguments = [f"--track={track}", *SMALL, *RUNS[track]]
    code, console, err = main(*arguments, f"--runs_dir={tmp_path / 'one'}")
    assert code == 0, err
    one = read_run(tmp_path / "one/run", console)
    assert one.result["val_loss"] < math.log(2048)
    done = torchrun(2, SCRIPT, *arguments, f"--runs_dir={tmp_path / 'two'}", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert_same_run(one, read_run(tmp_path / "two/run", done.stdout))
    if track == "unlimited":
        assert all((m["kl"] > 0) == (m["member"] > 1) for m in one.steps)
