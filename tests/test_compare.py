"""tools/compare.py: its statistics against slow ones, and what it says of runs of all kinds.

    python -m pytest tests/test_compare.py
"""
import functools
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

import compare
import helpers
from helpers import train
from train_gpt import make_config

SPLITS = ("selection", "val", "holdout")
DATA = {"prose_train_000000.bin": "1" * 64, "prose_val_000000.bin": "2" * 64,
        "prose_holdout_000000.bin": "3" * 64, "tokens.npz": "4" * 64}
# selection losses of three seeds, without and with a change that helps by 0.5, 0.45 and 0.58
WITHOUT = {1: 6.0, 2: 6.1, 3: 5.95}
WITH = {1: 5.5, 2: 5.65, 3: 5.37}
NODES = np.polynomial.legendre.leggauss(200)


tool = functools.partial(helpers.tool, compare)
complaint = functools.partial(helpers.complaint, compare)


def said(*arguments):
    """The lines that compare.py prints when all is well."""
    return helpers.said(compare, *arguments).splitlines()


def fabricate(runs, name, losses, source="a" * 64, data=DATA, track="cpu", finished=True, extra=(),
              seconds=60.0, **settings):
    """Folders of runs under `runs` without training: {seed: selection loss, or the three}.

    source: of train_gpt.py, None for no run.json; extra: more of result.json; `settings`: fields.
    """
    folders = []
    for seed, loss in losses.items():
        folder = runs / f"{name}_seed{seed}"
        folder.mkdir(parents=True)
        three = loss if isinstance(loss, tuple) else (loss, loss - 0.1, loss + 0.1)
        config = asdict(make_config(track, preset="toy", device="cpu", dtype="float32", seed=seed,
                                    run_id=folder.name, runs_dir=str(runs), **settings))
        scores = {f"{split}_loss": value for split, value in zip(SPLITS, three)}
        result = {"track": track, "final_mixture": config["final_mixture"], **scores,
                  "ensemble": [{"n": 1, **scores}], "data_sha256": data,
                  "train_seconds": seconds, "seed": seed, "config": config, **dict(extra)}
        if finished:
            (folder / "result.json").write_text(json.dumps(result))
        if source:
            (folder / "run.json").write_text(json.dumps({"train_gpt.py": source, **data}))
        folders.append(folder)
    return folders


def edit(folder, change):
    """`change` the dict of a result.json in place."""
    result = json.loads((folder / "result.json").read_text())
    change(result)
    (folder / "result.json").write_text(json.dumps(result))


def cells(lines, name):
    """The columns of the line that begins with `name`."""
    line, = (line for line in lines if line.startswith(f"{name}  "))
    return re.split(r"\s{2,}", line.strip())


def line_of(lines, word):
    """The rest of the one line that begins with `word`."""
    found, = (line for line in lines if line.split(maxsplit=1)[:1] == [word])
    return found.split(maxsplit=1)[1]


# ==== A slow t-test =============================================================================
def tail(t, df):
    """P(|T| > t) of Student's distribution: with T = sqrt(df) tan(a), its density times dT is
    proportional to cos(a)^(df - 1) da."""
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.pi ** 0.5
    nodes, weights = NODES
    low, high = math.atan(abs(t) / df ** 0.5), math.pi / 2
    angles = (high - low) / 2 * nodes + (high + low) / 2
    return 2 * scale * (high - low) / 2 * float(weights @ np.cos(angles) ** (df - 1))


def quantile(df):
    """The t that |T| exceeds in 5 % of cases."""
    low, high = 0.0, 1000.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, df) > 0.05 else (low, middle)
    return low


def slow_difference(a, b, paired):
    """(mean, standard error, (low, high), p) of a - b."""
    if paired:
        gaps = [x - y for x, y in zip(a, b)]
        mean = math.fsum(gaps) / len(gaps)
        spread = math.fsum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)
        error, df = (spread / len(gaps)) ** 0.5, len(gaps) - 1
    else:
        means = [math.fsum(group) / len(group) for group in (a, b)]
        mean = means[0] - means[1]
        squares = [math.fsum((x - m) ** 2 for x in group) / (len(group) - 1) / len(group)
                   for group, m in zip((a, b), means)]
        error = sum(squares) ** 0.5
        df = sum(squares) ** 2 / sum(s ** 2 / (len(group) - 1)
                                     for s, group in zip(squares, (a, b)))
    reach = quantile(df) * error
    return mean, error, (mean - reach, mean + reach), tail(mean / error, df)


def test_the_slow_test_knows_tables():
    assert quantile(2) == pytest.approx(4.30265, abs=1e-5)
    assert quantile(10) == pytest.approx(2.22814, abs=1e-5)
    assert tail(0, 5) == pytest.approx(1) and tail(12.7062, 1) == pytest.approx(0.05, abs=1e-6)


def assert_same(found, expected):
    mean, error, interval, p = expected
    assert found.mean == pytest.approx(mean, rel=1e-9)
    assert found.error == pytest.approx(error, rel=1e-9)
    assert found.interval == pytest.approx(interval, rel=1e-8, abs=1e-12)
    assert found.p == pytest.approx(p, rel=1e-7)


def p_text(p):
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def assert_printed(lines, split, a, b, expected):
    """The row of a split: both groups, their difference, interval and p."""
    sides = [f"{np.mean(x):.4f} ± {np.std(x, ddof=1) / len(x) ** 0.5:.4f}" for x in (a, b)]
    mean, error, (low, high), p = expected
    assert cells(lines, split) == [split, *sides, f"{mean:+.4f} ± {error:.4f}",
                                   f"{low:+.4f} to {high:+.4f}", p_text(p)]


# ==== Real runs =================================================================================
@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Three seeds as they are and three with dropout; patterns for both."""
    folder = tmp_path_factory.mktemp("real")
    runs = {}
    for dropout in (0, 0.3):
        runs[dropout] = [train(folder, "--track=cpu", "--num_layers=1", "--num_models=1",
                               "--train_tokens=4000", "--final_mixture=learned",
                               f"--dropout={dropout}", f"--seed={seed}") for seed in (1, 2, 3)]
    return SimpleNamespace(without=runs[0], with_=runs[0.3], folder=folder,
                           with_pattern=folder / "run[345]", without_pattern=folder / "run[012]")


def test_six_real_runs_are_as_a_slow_paired_test_has_them(real):
    ours, _ = compare.read_runs([str(real.with_pattern)])
    theirs, _ = compare.read_runs([str(real.without_pattern)])
    lines = said(real.with_pattern, "--against", real.without_pattern)
    for split in SPLITS:
        a, b = ([run.result[f"{split}_loss"] for run in group]
                for group in (real.with_, real.without))
        expected = slow_difference(a, b, paired=True)
        assert_same(compare.difference(ours, theirs, split), expected)
        assert_printed(lines, split, a, b, expected)
    assert "dropout=0.3 (was 0)" == line_of(lines, "differ")
    assert "seeds     " not in "\n".join(line[:10] for line in lines)
    assert lines[0] == f"with      {real.folder}/run3: 3 run(s), seed(s) 1 2 3"
    assert lines[1] == f"against   {real.folder}/run0: 3 run(s), seed(s) 1 2 3"
    times = [np.mean([run.result["train_seconds"] for run in group])
             for group in (real.with_, real.without)]
    assert cells(lines, "train time")[-1] == f"{times[0] / times[1]:.2f}x"
    assert "3 pairs" in lines[-1]


def test_order_of_the_runs_does_not_matter(real):
    """Pairs are of seeds, not of places."""
    backwards = [real.folder / f"run{i}" for i in (5, 3, 4)]
    lines = said(*backwards, "--against", real.without_pattern)
    assert lines[3:] == said(real.with_pattern, "--against", real.without_pattern)[3:]


def test_what_is_scored_is_the_declared_mixture(tmp_path):
    folder, = fabricate(tmp_path, "cpu", {1: (5.0, 4.0, 3.0)},
                        extra={"ensemble": [{"n": 1, "selection_loss": 9.0}]})
    assert compare.read_run(folder).losses == {"selection": 5.0, "val": 4.0, "holdout": 3.0}


# ==== Unpaired ==================================================================================
def test_seeds_that_do_not_overlap_are_compared_by_welch(tmp_path):
    a = {1: (5.5, 5.3, 5.9), 2: (5.7, 5.4, 5.2), 3: (5.4, 5.2, 5.8), 4: (5.65, 5.6, 5.1)}
    b = {5: (5.9, 5.5, 5.6), 6: (6.3, 5.6, 5.5), 7: (5.7, 5.8, 5.9)}
    fabricate(tmp_path, "cpu_dropout0.1", a, dropout=0.1)
    fabricate(tmp_path, "cpu", b)
    ours, _ = compare.read_runs([tmp_path / "cpu_dropout*"])
    theirs, _ = compare.read_runs([tmp_path / "cpu_seed*"])
    lines = said(tmp_path / "cpu_dropout*", "--against", tmp_path / "cpu_seed*")
    for i, split in enumerate(SPLITS):
        left, right = [three[i] for three in a.values()], [three[i] for three in b.values()]
        expected = slow_difference(left, right, paired=False)
        assert_same(compare.difference(ours, theirs, split), expected)
        assert_printed(lines, split, left, right, expected)
    assert line_of(lines, "seeds") == "1 2 3 4 5 6 7 on one side only: not paired"
    assert "4 and 3 runs, not paired" in lines[-1]


def test_one_seed_in_common_is_not_enough_for_pairs(tmp_path):
    fabricate(tmp_path, "cpu_dropout0.1", {1: 5.5, 2: 5.75, 3: 5.4}, dropout=0.1)
    fabricate(tmp_path, "cpu", {3: 6.0, 4: 6.2})
    lines = said(tmp_path / "cpu_dropout*", "--against", tmp_path / "cpu_seed*")
    a, b = [5.5, 5.75, 5.4], [6.0, 6.2]
    assert_printed(lines, "selection", a, b, slow_difference(a, b, paired=False))
    assert line_of(lines, "seeds") == "1 2 4 on one side only: not paired"


def test_a_seed_that_one_side_lacks_is_left_out_of_the_pairs(tmp_path):
    fabricate(tmp_path, "cpu_dropout0.1", {1: 5.5, 2: 5.65, 4: 5.3}, dropout=0.1)
    fabricate(tmp_path, "cpu", {1: 6.0, 2: 6.2, 3: 5.9, 4: 6.05})
    lines = said(tmp_path / "cpu_dropout*", "--against", tmp_path / "cpu_seed*")
    assert line_of(lines, "seeds") == "3 on one side only: left out"
    a, b = [5.5, 5.65, 5.3], [6.0, 6.2, 6.05]
    assert_printed(lines, "selection", a, b, slow_difference(a, b, paired=True))
    assert "3 pairs" in lines[-1]


def test_one_run_against_several_is_compared_with_that_of_its_seed(tmp_path):
    fabricate(tmp_path, "cpu_dropout0.1", {2: 5.65}, dropout=0.1)
    fabricate(tmp_path, "cpu", WITHOUT)
    lines = said(tmp_path / "cpu_dropout*", "--against", tmp_path / "cpu_seed*")
    assert cells(lines, "selection") == ["selection", "5.6500", "6.1000", "-0.4500"]
    assert line_of(lines, "seeds") == "1 3 on one side only: left out"
    assert lines[-1].startswith("better by 0.4500 on selection, but one run a side")


# ==== The verdict ===============================================================================
def test_verdicts_by_hand(tmp_path):
    fabricate(tmp_path, "cpu", WITHOUT)
    fabricate(tmp_path, "cpu_dropout0.1", WITH, dropout=0.1)
    mean, error, _, p = slow_difference([*WITH.values()], [*WITHOUT.values()], paired=True)
    assert p < 0.05
    better = said(tmp_path / "cpu_dropout*", "--against", tmp_path / "cpu_seed*")
    worse = said(tmp_path / "cpu_seed*", "--against", tmp_path / "cpu_dropout*")
    rest = f"by {-mean:.4f} ± {error:.4f} on selection, 3 pairs, p = {p_text(p)}"
    assert better[-1] == f"better {rest}"
    assert worse[-1] == f"worse {rest}"
    assert cells(better, "selection")[3].startswith("-0.5100")
    assert cells(worse, "selection")[3].startswith("+0.5100")


def test_noise_shows_no_difference(tmp_path):
    fabricate(tmp_path, "cpu", {1: 6.0, 2: 6.1, 3: 5.95})
    fabricate(tmp_path, "cpu_dropout0.1", {1: 6.3, 2: 5.9, 3: 6.0}, dropout=0.1)
    *_, p = slow_difference([6.3, 5.9, 6.0], [6.0, 6.1, 5.95], paired=True)
    last = said(tmp_path / "cpu_dropout*", "--against", tmp_path / "cpu_seed*")[-1]
    assert last.startswith("no difference shown: worse by 0.0500 ± ")
    assert f"3 pairs, p = {p:.3f}; within noise, or more seeds are needed" in last


def test_the_same_to_the_digit(tmp_path):
    fabricate(tmp_path, "cpu", WITHOUT)
    fabricate(tmp_path, "cpu_log", WITHOUT, log_steps=3)
    lines = said(tmp_path / "cpu_log*", "--against", tmp_path / "cpu_seed*")
    assert lines[-1] == "the same to the digit on selection"
    assert cells(lines, "selection")[3] == "+0.0000 ± 0.0000"
    lone = said(tmp_path / "cpu_log_seed1", "--against", tmp_path / "cpu_seed1")
    assert lone[-1] == "the same to the digit on selection"


def test_a_mean_of_nothing_with_noise_is_not_the_same_to_the_digit(tmp_path):
    fabricate(tmp_path, "cpu", {1: 6.0, 2: 6.5})
    fabricate(tmp_path, "cpu_dropout0.1", {1: 6.5, 2: 6.0}, dropout=0.1)
    lines = said(tmp_path / "cpu_dropout*", "--against", tmp_path / "cpu_seed*")
    assert lines[-1].startswith("no difference shown: ") and "p = 1.000" in lines[-1]


def test_differences_that_are_all_one_have_no_p(tmp_path):
    fabricate(tmp_path, "cpu", {1: 6.0, 2: 6.25, 3: 6.5})
    fabricate(tmp_path, "cpu_dropout0.1", {1: 5.5, 2: 5.75, 3: 6.0}, dropout=0.1)
    lines = said(tmp_path / "cpu_dropout*", "--against", tmp_path / "cpu_seed*")
    assert lines[-1] == "better by exactly 0.5000 on selection, 3 pairs: there is no spread"
    assert cells(lines, "selection")[3:] == ["-0.5000 ± 0.0000", "-0.5000 to -0.5000"]


def test_one_run_a_side_says_nothing_of_noise(tmp_path):
    fabricate(tmp_path, "cpu", {1: 6.0})
    fabricate(tmp_path, "cpu_dropout0.1", {1: 6.25}, dropout=0.1)
    lines = said(tmp_path / "cpu_dropout*", "--against", tmp_path / "cpu_seed*")
    assert lines[-1] == ("worse by 0.2500 on selection, but one run a side says nothing of noise:"
                         " add seeds")
    assert cells(lines, "val") == ["val", "6.1500", "5.9000", "+0.2500"]


@pytest.mark.parametrize("p, text", [(0.5, "0.500"), (0.0123, "0.012"), (0.001, "0.001"),
                                     (0.00042, "4e-04"), (3e-9, "3e-09"), (math.nan, "")])
def test_p_as_text(p, text):
    assert compare.as_p(p) == text


# ==== What can be compared ======================================================================
def test_runs_that_differ_in_nothing(tmp_path):
    fabricate(tmp_path / "a", "cpu", WITHOUT)
    fabricate(tmp_path / "b", "cpu", WITH)
    lines = said(tmp_path / "a/*", "--against", tmp_path / "b/*")
    assert line_of(lines, "differ") == "in nothing: settings, source and data are the same"


def test_nothing_is_said_of_a_source_that_is_not_known(tmp_path):
    fabricate(tmp_path / "a", "cpu", WITHOUT, source=None)
    fabricate(tmp_path / "b", "cpu", WITH, source=None)
    lines = said(tmp_path / "a/*", "--against", tmp_path / "b/*")
    assert line_of(lines, "source") == "unknown (no run.json)"
    assert not [line for line in lines if "source and data are the same" in line]


def test_a_shard_of_train_that_one_side_lacks_is_no_sameness(tmp_path):
    fabricate(tmp_path / "a", "cpu", WITHOUT)
    fabricate(tmp_path / "b", "cpu", WITH, data={**DATA, "prose_train_000001.bin": "5" * 64})
    lines = said(tmp_path / "a/*", "--against", tmp_path / "b/*")
    assert not [line for line in lines if "data are the same" in line]


def test_one_group_alone(tmp_path):
    fabricate(tmp_path, "cpu", {1: (6.0, 5.0, 4.0), 2: (6.5, 5.25, 4.5)})
    lines = said(tmp_path / "*")
    assert lines[:2] == [f"runs      {tmp_path}/cpu: 2 run(s), seed(s) 1 2",
                         "differ    in nothing but the seed"]
    assert lines[2] == "selection 6.2500 ± 0.2500 (standard deviation 0.3536)"
    assert lines[3] == "val       5.1250 ± 0.1250 (standard deviation 0.1768)"
    assert lines[4] == "holdout   4.2500 ± 0.2500 (standard deviation 0.3536)"
    alone = said(tmp_path / "cpu_seed1")
    assert alone[1:3] == ["differ    one run: nothing to compare it with", "selection 6.0000"]


@pytest.mark.parametrize("name", ["prose_train_000000.bin", "prose_val_000000.bin",
                                  "prose_holdout_000000.bin", "tokens.npz"])
def test_other_data_is_one_line(name, tmp_path):
    fabricate(tmp_path, "cpu", WITHOUT)
    fabricate(tmp_path, "cpu_dropout0.1", WITH, dropout=0.1, data={**DATA, name: "9" * 64})
    for arguments in ([tmp_path / "cpu_dropout*", "--against", tmp_path / "cpu_seed*"],
                      [tmp_path / "*"]):
        error = complaint(*arguments)
        assert "cannot be compared" in error and f"{name} of their data differs" in error


@pytest.mark.parametrize("name", ["tokens.npz", "ranks"])       # ranks: of earlier versions
def test_tables_of_tokens_on_one_side_are_told(name, tmp_path):
    """They may have been made since; the text that is scored is the same."""
    bare = {shard: digest for shard, digest in DATA.items() if shard.endswith(".bin")}
    fabricate(tmp_path, "cpu", WITHOUT, data=bare)
    fabricate(tmp_path, "cpu_dropout0.1", WITH, dropout=0.1, data={**bare, name: "9" * 64})
    lines = said(tmp_path / "cpu_dropout*", "--against", tmp_path / "cpu_seed*")
    assert f"data      {name} of one side only" in lines
    gone = {**bare}
    del gone["prose_val_000000.bin"]
    fabricate(tmp_path, "cpu_dropout0.2", WITH, dropout=0.2, data=gone)
    error = complaint(tmp_path / "cpu_dropout0.2*", "--against", tmp_path / "cpu_seed*")
    assert "prose_val_000000.bin of their data differs" in error


@pytest.mark.parametrize("name, value, usual", [("selection_tokens", 800, 1000),
                                                ("eval_tokens", 500, 2000)])
def test_other_text_scored_is_one_line(name, value, usual, tmp_path):
    fabricate(tmp_path, "cpu", WITHOUT)
    fabricate(tmp_path, "cpu_other", WITH, **{name: value})
    for arguments in ([tmp_path / "cpu_other*", "--against", tmp_path / "cpu_seed*"],
                      [tmp_path / "*"]):
        error = complaint(*arguments)
        assert f"--{name} is" in error
        assert {str(value), str(usual)} <= set(re.findall(r"\d+", error))


def test_another_track_on_the_same_text_works(tmp_path):
    fabricate(tmp_path, "cpu", WITHOUT)
    fabricate(tmp_path, "mini", WITH, track="mini")
    lines = said(tmp_path / "mini*", "--against", tmp_path / "cpu*")
    assert "track=mini (was cpu)" in " ".join(line.strip() for line in lines)
    assert max(map(len, lines[2:])) <= 100
    assert lines[-1].startswith("better by ")


def test_more_training_data_can_be_compared(tmp_path):
    fabricate(tmp_path, "cpu", WITHOUT)
    fabricate(tmp_path, "cpu_more", WITH, train_tokens=40_000,
              data={**DATA, "prose_train_000001.bin": "5" * 64})
    lines = said(tmp_path / "cpu_more*", "--against", tmp_path / "cpu_seed*")
    assert line_of(lines, "differ").startswith("train_tokens=40000 (was ")


def test_what_changes_no_number_is_no_difference(tmp_path):
    fabricate(tmp_path / "a", "cpu", WITHOUT, device_batch_size=1, save_minutes=3)
    fabricate(tmp_path / "b", "cpu", WITH, device_batch_size=2)
    assert line_of(said(tmp_path / "a/*", "--against", tmp_path / "b/*"),
                   "differ").startswith("in nothing")


def test_the_same_run_on_both_sides_is_one_line(tmp_path):
    fabricate(tmp_path, "cpu", WITHOUT)
    again = tmp_path / ".." / tmp_path.name / "cpu_seed2"
    error = complaint(tmp_path / "cpu*", "--against", again)
    assert f"{tmp_path}/cpu_seed2: on both sides" in error


@pytest.mark.parametrize("on_the_left", [True, False])
def test_two_kinds_on_a_side_is_one_line(on_the_left, tmp_path):
    mixed, plain = tmp_path / "mixed", tmp_path / "plain"
    fabricate(mixed, "cpu", {1: 6.0})
    fabricate(mixed, "cpu_dropout0.1", {2: 6.0}, dropout=0.1)
    fabricate(plain, "cpu", {1: 6.5})
    sides = [mixed / "*", plain / "*"] if on_the_left else [plain / "*", mixed / "*"]
    error = complaint(sides[0], "--against", sides[1])
    assert "is of another kind than" in error and "dropout=0" in error
    assert ("in the runs," if on_the_left else "in --against,") in error


def test_two_sources_on_a_side_is_one_line(tmp_path):
    fabricate(tmp_path / "mixed", "cpu", {1: 6.0})
    fabricate(tmp_path / "mixed", "other", {2: 6.0}, source="b" * 64)
    fabricate(tmp_path / "plain", "cpu", {1: 6.5})
    error = complaint(tmp_path / "mixed/*", "--against", tmp_path / "plain/*")
    assert "source" in error


# ==== Which runs ================================================================================
def test_an_unfinished_run_is_left_out(tmp_path):
    fabricate(tmp_path, "cpu", {1: 6.0, 2: 6.1})
    fabricate(tmp_path, "cpu", {3: 0.0}, finished=False)
    (tmp_path / "cpu_notes").mkdir()            # no run at all: nothing is said of it
    lines = said(tmp_path / "cpu*")
    assert lines[0] == f"left out  {tmp_path}/cpu_seed3: not finished"
    assert "2 run(s), seed(s) 1 2" in lines[1]


def test_no_finished_run_is_one_line(tmp_path):
    fabricate(tmp_path, "cpu", {1: 6.0, 2: 6.1}, finished=False)
    assert "no finished run" in complaint(tmp_path / "cpu*")


def test_a_pattern_of_nothing_is_one_line(tmp_path):
    fabricate(tmp_path, "cpu", WITHOUT)
    (tmp_path / "file.txt").write_text("no folder")
    for arguments in ([tmp_path / "none*"], [tmp_path / "file.txt"],
                      [tmp_path / "cpu*", tmp_path / "none*"],
                      [tmp_path / "cpu*", "--against", tmp_path / "none*"]):
        assert "no such run" in complaint(*arguments)


@pytest.mark.parametrize("newer", ["cpu_seed1", "cpu_seed1_2026-01-01_10-00-00"])
def test_the_newest_of_a_kind_and_seed_counts(newer, tmp_path):
    fabricate(tmp_path, "cpu", {1: 6.0, 2: 6.0})
    other = tmp_path / "cpu_seed1_2026-01-01_10-00-00"
    shutil.copytree(tmp_path / "cpu_seed1", other)
    edit(other, lambda result: result.update(selection_loss=5.0))
    older = ({"cpu_seed1", other.name} - {newer}).pop()
    os.utime(tmp_path / older / "result.json", (1e9, 1e9))
    os.utime(tmp_path / newer / "result.json", (2e9, 2e9))
    lines = said(tmp_path / "cpu*")
    assert lines[0] == (f"left out  {tmp_path}/{older}: {tmp_path}/{newer} is a newer run of the"
                        " same")
    mean = (6.0 + (5.0 if newer == other.name else 6.0)) / 2
    assert lines[3].startswith(f"selection {mean:.4f} ")


def test_a_run_that_two_patterns_match_counts_once(tmp_path):
    fabricate(tmp_path, "cpu", WITHOUT)
    assert said(tmp_path / "cpu*", tmp_path / "cpu_seed1") == said(tmp_path / "cpu*")


# ==== Earlier versions ==========================================================================
@pytest.fixture
def earlier(tmp_path):
    """Three runs with the uniform mixture, before there was a selection_loss at the top."""
    folders = fabricate(tmp_path, "cpu", WITHOUT, final_mixture="uniform")
    for folder in folders:
        edit(folder, lambda result: result.pop("selection_loss"))
    return folders


def test_the_uniform_mixture_of_an_earlier_version_is_read(earlier):
    for folder, loss in zip(earlier, WITHOUT.values()):
        def lengthen(result, loss=loss):
            result["ensemble"] = [{"n": 1, "selection_loss": 9.0}, {"n": 2, "selection_loss": loss}]
        edit(folder, lengthen)
    lines = said(*earlier)
    assert cells(lines, "runs")[0] == "runs"
    assert lines[2].startswith(f"selection {np.mean([*WITHOUT.values()]):.4f} ")


def test_another_mixture_of_an_earlier_version_is_one_line(tmp_path):
    folder, = fabricate(tmp_path, "cpu", {1: 6.0}, final_mixture="learned")
    edit(folder, lambda result: result.pop("selection_loss"))
    error = complaint(folder)
    assert f"{folder}: no selection loss of its declared mixture" in error and "again" in error


def test_a_run_without_selection_is_one_line(tmp_path):
    folder, = fabricate(tmp_path, "cpu", {1: 6.0}, final_mixture="uniform", selection_tokens=0)

    def forget(result):
        result["selection_loss"] = None
        del result["ensemble"][-1]["selection_loss"]
    edit(folder, forget)
    assert "no selection loss" in complaint(folder)


def test_fields_that_are_gone_do_not_stop_it(earlier):
    for folder in earlier:
        edit(folder, lambda result: result["config"].update(token_noise=0.1))
    code, out, err = tool(*earlier)
    assert code == 0 and "3 run(s)" in out
    assert "token_noise" in err


def test_a_field_that_one_side_lacks_is_named(tmp_path):
    fabricate(tmp_path, "cpu", WITHOUT)
    for folder in fabricate(tmp_path, "old", WITH):
        edit(folder, lambda result: result["config"].update(token_noise=0.1))
        edit(folder, lambda result: result["config"].pop("cautious"))
    code, out, _ = tool(tmp_path / "old*", "--against", tmp_path / "cpu*")
    assert code == 0
    assert "token_noise=0.1 (was not there)" in out and "cautious=gone (was true)" in out


def test_no_scipy_is_one_line(tmp_path, monkeypatch):
    fabricate(tmp_path, "cpu", WITHOUT)
    fabricate(tmp_path, "cpu_dropout0.1", WITH, dropout=0.1)
    monkeypatch.setitem(sys.modules, "scipy", None)
    for arguments in ([tmp_path / "cpu_dropout*", "--against", tmp_path / "cpu_seed*"],
                      [tmp_path / "*"]):
        assert "no scipy: pip install -r tools/requirements.txt" in complaint(*arguments)


# ==== Many groups ===============================================================================
@pytest.mark.parametrize("values, adjusted", [
    ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
    ([0.04, 0.01], [0.04, 0.02]),
    ([0.5, 0.9, 0.6], [1.0, 1.0, 1.0]),
    ([0.02, math.nan, 0.03], [0.04, math.nan, 0.04]),
    ([0.001, 0.002, 0.003, 0.004], [0.004, 0.006, 0.006, 0.006]),
    ([], [])])
def test_holm_by_hand(values, adjusted):
    before = list(values)
    assert compare.holm(values) == pytest.approx(adjusted, nan_ok=True)
    assert values == pytest.approx(before, nan_ok=True)


@pytest.fixture
def four(tmp_path):
    """Four groups of three seeds; the plainest is the second best."""
    losses = {"cpu": {1: 6.0, 2: 6.1, 3: 5.95}, "cpu_dropout0.1": {1: 5.5, 2: 5.65, 3: 5.37},
              "cpu_weight_decay2": {1: 6.3, 2: 6.45, 3: 6.2},
              "cpu_grad_clip1": {1: 6.1, 2: 6.0, 3: 6.15}}
    for name, values in losses.items():
        changed = re.fullmatch(r"cpu_(\D+)(\d.*)", name)
        settings = {changed[1]: float(changed[2])} if changed else {}
        fabricate(tmp_path, name, values, **settings)
    return SimpleNamespace(folder=tmp_path, losses=losses)


def test_groups_are_sorted_best_first_against_the_plainest(four):
    lines = said(four.folder / "*")
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[:5]]
    assert rows[0] == ["runs", "selection", "difference", "p", "val", "holdout"]
    names = {"cpu_dropout0.1": "dropout=0.1", "cpu": "cpu", "cpu_grad_clip1": "grad_clip=1",
             "cpu_weight_decay2": "weight_decay=2"}
    assert [row[0] for row in rows[1:]] == list(names.values())

    base = [*four.losses["cpu"].values()]
    found = {name: slow_difference([*four.losses[name].values()], base, paired=True)
             for name in names if name != "cpu"}
    first, second, third = sorted(found, key=lambda name: found[name][3])
    adjusted = {first: 3 * found[first][3]}
    adjusted[second] = max(adjusted[first], 2 * found[second][3])
    adjusted[third] = max(adjusted[second], found[third][3])
    for (name, label), row in zip(names.items(), rows[1:]):
        values = [*four.losses[name].values()]
        side = f"{np.mean(values):.4f} ± {np.std(values, ddof=1) / 3 ** 0.5:.4f}"
        if name == "cpu":
            error = np.std(values, ddof=1) / 3 ** 0.5
            assert row == ["cpu", "3", side, "the base",
                           f"{np.mean(values) - 0.1:.4f} ± {error:.4f}",
                           f"{np.mean(values) + 0.1:.4f} ± {error:.4f}"]
        else:
            mean, error, *_ = found[name]
            gap = f"{mean:+.4f} ± {error:.4f}"
            assert row == [label, "3", side, gap, p_text(min(1, adjusted[name])), gap, gap]
    mean, error, *_ = found["cpu_dropout0.1"]
    assert "p is Holm's, for 3 comparisons" in lines
    p = p_text(adjusted["cpu_dropout0.1"])
    word = "" if adjusted["cpu_dropout0.1"] < 0.05 else "no difference shown: "
    assert lines[-1].startswith(f"best: dropout=0.1: {word}better by {-mean:.4f} ± {error:.4f} on"
                                f" selection, 3 pairs, p = {p}")


def test_two_groups_need_no_correction(four):
    lines = said(four.folder / "cpu_seed*", four.folder / "cpu_dropout*")
    *_, p = slow_difference([*four.losses["cpu_dropout0.1"].values()],
                            [*four.losses["cpu"].values()], paired=True)
    assert cells(lines, "dropout=0.1")[4] == p_text(p)
    assert not [line for line in lines if "Holm" in line]


def test_nothing_is_better_than_the_base(four):
    lines = said(four.folder / "cpu_seed*", four.folder / "cpu_weight*", four.folder / "cpu_grad*")
    assert lines[1].startswith("cpu  ")
    assert lines[-1].startswith("nothing is better than the base; grad_clip=1: ")
    assert "worse by 0.0667 " in lines[-1]


def test_groups_that_differ_in_the_source_alone_are_told_apart(tmp_path):
    fabricate(tmp_path, "cpu", WITHOUT)
    fabricate(tmp_path, "cpu_later", WITH, source="b" * 64)
    lines = said(tmp_path / "*")
    assert cells(lines, "cpu_later source bbbbbbb")[1] == "3"


def test_rows_stay_within_reach_of_a_terminal(tmp_path):
    fabricate(tmp_path, "cpu", WITHOUT)
    fabricate(tmp_path, "cpu_x", WITH, dropout=0.1, weight_decay=2, grad_clip=1, softcap=15,
              momentum_steps=100)
    row, = (line for line in said(tmp_path / "*") if "dropout" in line and "..." in line)
    assert row.index("...") == 45


# ==== Sources ===================================================================================
def git(folder, *arguments):
    """stdout of git, with nothing of the person's or the machine's settings."""
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    for role in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{role}_NAME": "A", f"GIT_{role}_EMAIL": "a@example.org"}
    return subprocess.run(["git", *arguments], cwd=folder, env=environment, check=True,
                          capture_output=True, encoding="utf-8").stdout


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with two commits of train_gpt.py; their digests and short names."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    digests, commits = [], []
    for text in ("first\n", "second\n"):
        (folder / "train_gpt.py").write_text(text)
        git(folder, "add", ".")
        git(folder, "commit", "-qm", text)
        digests.append(hashlib.sha256(text.encode()).hexdigest())
        commits.append(git(folder, "rev-parse", "--short", "HEAD").strip())
    monkeypatch.setattr(compare, "ROOT", folder)
    compare.describe.cache_clear()
    yield SimpleNamespace(folder=folder, digests=digests, commits=commits)
    compare.describe.cache_clear()


def test_sources_are_named_with_their_commits(repository, tmp_path):
    first, second = repository.digests
    fabricate(tmp_path / "a", "cpu", WITHOUT, source=second)
    fabricate(tmp_path / "b", "cpu", WITH, source=first)
    fabricate(tmp_path / "c", "cpu", WITH, source="c" * 64)
    lines = said(tmp_path / "a/*", "--against", tmp_path / "b/*")
    assert line_of(lines, "source") == (
        f"train_gpt.py DIFFERS: {second[:7]}, commit {repository.commits[1]};"
        f" against {first[:7]}, commit {repository.commits[0]}")
    assert not [line for line in lines if line.startswith("differ  ")]
    lines = said(tmp_path / "a/*", "--against", tmp_path / "c/*")
    assert line_of(lines, "source").endswith("against ccccccc, not committed")


def test_the_same_source_is_named_once(repository, tmp_path):
    digest = repository.digests[0]
    fabricate(tmp_path / "a", "cpu", WITHOUT, source=digest)
    fabricate(tmp_path / "b", "cpu", WITH, source=digest)
    lines = said(tmp_path / "a/*", "--against", tmp_path / "b/*")
    assert line_of(lines, "source") == (f"train_gpt.py the same ({digest[:7]}, commit"
                                        f" {repository.commits[0]})")


def test_a_source_that_one_side_does_not_use(tmp_path, monkeypatch):
    (tmp_path / "bare").mkdir()
    monkeypatch.setattr(compare, "ROOT", tmp_path / "bare")         # no repository
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    compare.describe.cache_clear()
    for folder in fabricate(tmp_path / "a", "cpu", WITHOUT):
        facts = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**facts, "data/ngram.py": "d" * 64}))
    fabricate(tmp_path / "b", "cpu", WITH)
    lines = said(tmp_path / "a/*", "--against", tmp_path / "b/*")
    compare.describe.cache_clear()
    assert "source    data/ngram.py DIFFERS: ddddddd; against not used" in lines
    assert "source    train_gpt.py the same (aaaaaaa)" in lines
