"""Schedules by hand and as properties: they are pure functions of progress.

    python -m pytest tests/test_schedules.py
"""
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from helpers import small_config
from train_gpt import (base_multiplier, lr_multiplier, momentum_at, perturbation,
                       piecewise_linear, teeth)

FLAT = dict(lr_warmdown=0.0, lr_power=1.0, lr_floor=0.0, sawtooth_epochs=0)
PROGRESS = np.linspace(0, 1, 401)


# ==== Learning rate =============================================================================
@pytest.mark.parametrize("changes, points", [
    (dict(), [(0, 1), (0.5, 1), (1, 1)]),
    (dict(lr_warmdown=0.2, lr_power=0.5),       # the square root of what is left of a fifth
     [(0, 1), (0.5, 1), (0.8, 1), (0.85, 0.75 ** 0.5), (0.95, 0.5), (0.998, 0.1), (1, 0)]),
    (dict(lr_warmdown=0.4), [(0.6, 1), (0.7, 0.75), (0.8, 0.5), (0.9, 0.25), (1, 0)]),
    (dict(lr_warmdown=1.0), [(0, 1), (0.25, 0.75), (1, 0)]),
    (dict(lr_warmdown=0.2, lr_power=0.5, lr_floor=0.1), [(0.8, 1), (0.95, 0.55), (1, 0.1)])],
    ids=str)
def test_warmdown_by_hand(changes, points):
    config = small_config(**{**FLAT, **changes})
    for progress, multiplier in points:
        assert base_multiplier(config, progress) == pytest.approx(multiplier, abs=1e-9)
        assert lr_multiplier(config, progress) == pytest.approx(multiplier, abs=1e-9)


TEETH = dict(num_epochs=11, sawtooth_epochs=3, lr_warmdown=0.2, lr_power=0.5)


def test_sawtooth_by_hand():
    """Each of the last epochs begins at the base and ends at the floor, on a cosine."""
    config = small_config(**{**FLAT, **TEETH, "sawtooth_floor": 0.05})
    for epoch in (0, 3.3, 7.999):
        assert lr_multiplier(config, epoch / 11) == 1
    for epoch in (8, 9, 10):
        for part, weight in ((1e-9, 1), (1 / 3, 0.75), (0.5, 0.5), (2 / 3, 0.25), (1 - 1e-7, 0)):
            progress = (epoch + part) / 11
            base = min(1, (1 - progress) / 0.2) ** 0.5
            expected = 0.05 + weight * (base - 0.05)
            assert lr_multiplier(config, progress) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("floor", [0.0, 0.05, 0.6])
@pytest.mark.parametrize("changes", [dict(lr_warmdown=1.0), dict(lr_warmdown=0.3, lr_power=0.5),
                                     dict(lr_warmdown=0.5, lr_floor=0.1)], ids=str)
def test_a_tooth_is_between_its_floor_and_the_base(changes, floor):
    """Where the base is below the teeth's floor, the rate is the floor. Before, it is the base."""
    config = small_config(**{**FLAT, **changes, "num_epochs": 5, "sawtooth_epochs": 2,
                             "sawtooth_floor": floor})
    without = replace(config, sawtooth_epochs=0)
    for progress in PROGRESS:
        base = base_multiplier(config, progress)
        ours = lr_multiplier(config, progress)
        assert lr_multiplier(without, progress) == base
        if progress < 0.6 - 1e-9:
            assert ours == base
        elif progress < 1:
            assert floor - 1e-12 <= ours <= max(base, floor) + 1e-12
            assert base > floor or ours == pytest.approx(floor)
    for tooth in (PROGRESS[(PROGRESS > a) & (PROGRESS < a + 0.19)] for a in (0.601, 0.801)):
        rates = [lr_multiplier(config, progress) for progress in tooth]
        assert all(after <= before + 1e-12 for before, after in itertools.pairwise(rates))


@pytest.mark.parametrize("changes", [
    dict(), dict(lr_warmdown=0.3), dict(lr_warmdown=1.0, lr_power=2.0, lr_floor=0.2)], ids=str)
def test_warmdown_falls_from_1_to_the_floor(changes):
    config = small_config(**{**FLAT, **changes})
    rates = [base_multiplier(config, progress) for progress in PROGRESS]
    assert rates[0] == 1 and all(b <= a for a, b in itertools.pairwise(rates))
    assert rates[-1] == pytest.approx(config.lr_floor if config.lr_warmdown else 1)
    for progress, rate in zip(PROGRESS, rates):
        if abs(progress - (1 - config.lr_warmdown)) > 1e-9:
            assert (rate == 1) == (progress < 1 - config.lr_warmdown)


# ==== Points ====================================================================================
@pytest.mark.parametrize("points, values", [
    (((0.0, 0.8), (0.2, 0.8), (0.5, 0.1), (1.0, 0.93)),
     {0: 0.8, 0.1: 0.8, 0.3: 0.8 - 0.7 / 3, 0.5: 0.1, 0.75: 0.515, 1: 0.93}),
    (((0.2, 2.0), (0.4, 4.0)), {0: 2, 0.1: 2, 0.3: 3, 1: 4}),       # constant beyond its ends
    (((0.0, 1.0), (0.5, 2.0), (0.5, 0.5), (1.0, 1.5)),              # a jump
     {0: 1, 0.25: 1.5, 0.5 - 1e-12: 2, 0.5: 0.5, 0.75: 1, 1: 1.5}),
    (((0.3, 0.7),), {0: 0.7, 1: 0.7}),
    ((), {0: 0, 0.5: 0, 1: 0})], ids=str)                           # off
def test_piecewise_linear_by_hand(points, values):
    for progress, value in values.items():
        assert piecewise_linear(points, progress) == pytest.approx(value), progress


def test_points_of_a_command_line_may_be_in_any_order():
    config = small_config(wd_schedule="1:3,0:1,0.5:1,0.5:2")
    for progress, value in ((0, 1), (0.25, 1), (0.5, 2), (0.75, 2.5), (1, 3)):
        assert piecewise_linear(config.wd_schedule, progress) == pytest.approx(value)


@pytest.mark.parametrize("first, epochs", [(8, 11), (14, 22), (0, 1), (3, 7)])
def test_teeth_rise_linearly_within_each_epoch(first, epochs):
    points = teeth(first, epochs)
    low, high = points[0][1], points[1][1]
    assert 0 < low < high and len(points) == 2 * (epochs - first)
    for epoch in range(first, epochs):
        for part in (0.01, 0.25, 0.5, 0.99):
            expected = low + part * (high - low)
            ours = piecewise_linear(points, (epoch + part) / epochs)
            assert ours == pytest.approx(expected, rel=1e-12)


# ==== Momentum and perturbation =================================================================
def test_momentum_by_hand():
    config = small_config(momentum_start=0.85, momentum=0.95, momentum_steps=300)
    for step, value in ((0, 0.85), (150, 0.9), (300, 0.95), (5000, 0.95)):
        assert momentum_at(config, step) == pytest.approx(value)
    assert momentum_at(replace(config, momentum_steps=0), 0) == 0.95


@pytest.mark.parametrize("num_models", [2, 3, 5, 96])
def test_perturbation_falls_along_a_cosine_from_the_second_member_to_the_last(num_models):
    config = small_config(num_models=num_models, perturb_start=0.25, perturb_end=0.05)
    ours = [perturbation(config, member) for member in range(2, num_models + 1)]
    assert ours[0] == pytest.approx(0.25)
    assert num_models == 2 or ours[-1] == pytest.approx(0.05)
    for i, strength in enumerate(ours):
        angle = math.pi * i / max(1, num_models - 2)
        assert strength == pytest.approx(0.15 + 0.1 * math.cos(angle))


# ==== Purity ====================================================================================
def test_schedules_depend_on_progress_alone():
    """Forwards, backwards and with steps left out, as a run that is resumed asks for them."""
    config = small_config(**{**FLAT, **TEETH, "sawtooth_floor": 0.05, "num_models": 9,
                             "wd_schedule": "0:1,0.5:2,0.5:0.5,1:3"})

    def at(progress):
        return (lr_multiplier(config, progress), piecewise_linear(config.wd_schedule, progress),
                momentum_at(config, round(100 * progress)), perturbation(config, 5))

    forwards = [at(progress) for progress in PROGRESS]
    assert [at(progress) for progress in PROGRESS[::-1]] == forwards[::-1]
    assert [at(progress) for progress in PROGRESS[::7]] == forwards[::7]
    assert all(isinstance(value, float) for value in at(0.7))
