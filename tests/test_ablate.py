"""records/ablate.py: every row flips what it says, and runs are told apart by their settings."""
import argparse
import json

import pytest

from records import ablate


@pytest.fixture
def results(tmp_path, monkeypatch):
    """write(flags, seed, selection): one finished run of a member."""
    monkeypatch.setattr(ablate, "RESULTS", tmp_path / "ablations.jsonl")

    def write(flags, seed, selection, ensemble=False):
        with open(ablate.RESULTS, "a") as file:
            print(json.dumps(dict(settings=ablate.settings_of(flags), flags=flags, seed=seed,
                                  ensemble=ensemble, selection=selection, val=selection + 1)),
                  file=file)
    return write


@pytest.mark.parametrize("name", ablate.TECHNIQUES)
def test_row_differs_from_the_track_in_one_way(name):
    off, on, _ = ablate.TECHNIQUES[name]
    assert ablate.settings_of(off) != ablate.settings_of(on)
    if not name.startswith(("proj init", "rows shuffled")):     # compared with another setting
        assert ablate.config("") in (ablate.config(off), ablate.config(on))
    base = ablate.config(ablate.BASES[0]).dtype
    assert ablate.config(ablate.join(f"dtype={base}", on)).dtype == base


def test_rows_of_ensembles_exist():
    assert set(ablate.ENSEMBLE) <= set(ablate.TECHNIQUES)
    assert set(ablate.ENSEMBLE_ONLY) <= set(ablate.ENSEMBLE)


def test_settings_are_what_a_run_computes():
    same = ablate.settings_of("dtype=float32")
    assert same == ablate.settings_of("softcap=0 dtype=float32 time_limit=99 run_id=other")
    assert same != ablate.settings_of("dtype=float32 softcap=1")
    assert ablate.join("dtype=float32", "softcap=0") == "dtype=float32"


def test_difference_is_paired_by_seed_and_base(results):
    """Mean and standard error of on minus off; a run without its like does not count."""
    off, on = "xsa=", "xsa=fixed"
    for seed, without, with_it in ((1, 5.0, 5.5), (2, 6.0, 6.1), (3, 7.0, None)):
        results("dtype=float32", seed, without)
        if with_it:
            results("dtype=float32 xsa=fixed", seed, with_it)
    results("dtype=bfloat16 xsa=fixed", 3, 9.0)         # of another base
    assert ablate.difference(ablate.finished(), off, on, False) == (
        ["+0.3000 ± 0.2000"] * 2, 2)
    assert ablate.difference(ablate.finished(), off, on, True) is None
    results("dtype=bfloat16", 3, 8.0)
    assert ablate.difference(ablate.finished(), off, on, False)[1] == 3


def test_only_missing_runs_are_wanted(results):
    args = argparse.Namespace(only="fixed,swiglu", seeds=1, ensemble=False, dtype="float32")
    seed = ablate.SEEDS[0]
    flags = ["dtype=float32", "dtype=float32 xsa=fixed", "dtype=float32 swiglu=false"]
    assert {job[0] for job in ablate.missing_runs(args)} == set(flags)
    results(flags[0], seed, 5.0)
    results(flags[1], seed, 5.1)
    assert ablate.missing_runs(args) == [(flags[2], seed, False)]
    results(flags[2], seed, 5.2)
    assert ablate.missing_runs(args) == []


def test_stored_runs_belong_to_rows():
    """The table is made of the stored runs: settings that nothing asks for would be lost there."""
    asked = {ablate.settings_of(ablate.join(base, flags)) for base in ablate.BASES
             for row in ablate.TECHNIQUES.values() for flags in row[:2]}
    stored = [json.loads(line) for line in ablate.RESULTS.read_text().splitlines()]
    assert {run["settings"] for run in stored} <= asked
    assert len({(run["settings"], run["seed"], run["ensemble"]) for run in stored}) == len(stored)
