"""tools/sweep.py: what it would run, how runs share a machine, what stops it and what does not.

    python -m pytest tests/test_sweep.py
"""
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import compare
import helpers
import sweep
from helpers import ROOT, clean_environment, have_gpus
from train_gpt import TRACKS, UserError, as_text, make_config

SCRIPT = str(ROOT / "tools/sweep.py")
# a second or two a run: 13 steps
SHORT = ["--track=cpu", "--preset=toy", "--device=cpu", "--dtype=float32", "--num_layers=1",
         "--batch_rows=4", "--num_epochs=1", "--num_models=1", "--train_tokens=5000",
         "--eval_tokens=500", "--final_mixture=learned", "--log_steps=1"]
TWO_BY_TWO = [*SHORT, "--seeds=1,2", "--dropout=0,0.4"]
SPLITS = ("selection", "val", "holdout")


tool = functools.partial(helpers.tool, sweep)
complaint = functools.partial(helpers.complaint, sweep)


@pytest.fixture
def no_runs(monkeypatch):
    """A list of the jobs that a sweep would have started; to start one is an error."""
    started = []

    def start(self, job, slot):
        started.append(job)
        raise AssertionError(f"{job.folder} was started")
    monkeypatch.setattr(sweep.Machine, "start", start)
    return started


def settings(values, one_at_a_time=False, rows=()):
    """[(label, {field: text})] of the settings, on the track `cpu`."""
    found = sweep.settings_of({"track": ["cpu"], **values}, one_at_a_time, list(rows))
    return [(setting.label, {name: text for name, text in setting.fields.items()
                             if name != "track"}) for setting in found]


def read(*arguments):
    return sweep.read_arguments(list(arguments))


def jobs_in(folder, values, seeds=(1, 2, 3), one_at_a_time=False, rows=()):
    """[Job] of toy runs under `folder`."""
    values = {"track": ["cpu"], "preset": ["toy"], "device": ["cpu"], "num_models": ["1"], **values}
    return sweep.jobs_of(sweep.settings_of(values, one_at_a_time, list(rows)), seeds, folder)


def finish(job, loss):
    """As if the run of a job were finished, with this loss on all splits."""
    job.folder.mkdir(parents=True, exist_ok=True)
    config = asdict(job.config)
    losses = {f"{split}_loss": loss for split in SPLITS}
    result = {"final_mixture": config["final_mixture"], **losses, "ensemble": [{"n": 1, **losses}],
              "data_sha256": {"x_val_000000.bin": "2" * 64}, "train_seconds": 1.0,
              "config": config}
    (job.folder / "result.json").write_text(json.dumps(result))


# ==== What is to be run =========================================================================
def test_every_combination_by_hand():
    assert settings({"dropout": ["0", "0.1"], "weight_decay": ["2", "3"], "num_models": ["1"]}) == [
        (f"dropout={dropout} weight_decay={decay}",
         {"dropout": dropout, "weight_decay": decay, "num_models": "1"})
        for dropout in ("0", "0.1") for decay in ("2", "3")]


def test_no_values_is_one_setting():
    assert settings({}) == [("as it is", {})]
    assert settings({"num_models": ["1"]}) == [("as it is", {"num_models": "1"})]


def test_one_at_a_time_by_hand():
    """The base first; a value that is the track's own is the base again."""
    assert make_config("cpu").dropout == 0 and make_config("cpu").weight_decay == 1.5
    found = settings({"dropout": ["0", "0.1"], "weight_decay": ["2", "3"], "seq_len": ["64"]}, True)
    assert found == [("as it is", {"seq_len": "64"}),
                     ("dropout=0.1", {"dropout": "0.1", "seq_len": "64"}),
                     ("weight_decay=2", {"weight_decay": "2", "seq_len": "64"}),
                     ("weight_decay=3", {"weight_decay": "3", "seq_len": "64"})]


def test_rows_by_hand():
    """What the runs have on is flipped off, what they have off is flipped on."""
    rows = [("drop", {"dropout": "0"}, {"dropout": "0.1"}),
            ("decay", {"weight_decay": "0.1"}, {"weight_decay": "1"}),
            ("both", {"dropout": "0", "softcap": "0"}, {"dropout": "0.2", "softcap": "15"})]
    assert settings({"num_models": ["1"]}, rows=rows) == [
        ("as it is", {"num_models": "1"}),
        ("with drop", {"dropout": "0.1", "num_models": "1"}),
        ("without decay", {"weight_decay": "0.1", "num_models": "1"}),
        ("with both", {"dropout": "0.2", "softcap": "15", "num_models": "1"})]


def test_a_row_takes_the_place_of_a_given_value():
    rows = [("drop", {"dropout": "0"}, {"dropout": "0.1"})]
    assert settings({"dropout": ["0.3"]}, rows=rows) == [
        ("as it is", {"dropout": "0.3"}), ("without drop", {"dropout": "0"})]


def test_a_row_that_flips_nothing_is_named():
    with pytest.raises(UserError, match="row 'none': both of its sides"):
        settings({}, rows=[("none", {"dropout": "0"}, {"dropout": "0.0"})])


def test_the_same_setting_twice_is_run_once():
    rows = [("drop", {"dropout": "0"}, {"dropout": "0.1"}),
            ("again", {"dropout": "0.0"}, {"dropout": "1e-1"})]
    assert [label for label, _ in settings({}, rows=rows)] == ["as it is", "with drop"]
    assert len(settings({"dropout": ["0", "0.0", "0.1"]})) == 2


def test_several_tracks_are_a_combination_too():
    found = sweep.settings_of({"track": ["cpu", "mini"], "dropout": ["0.2", "0.3"]}, False, [])
    assert [setting.label for setting in found] == [
        f"track={track} dropout={dropout}" for track in ("cpu", "mini")
        for dropout in ("0.2", "0.3")]
    assert sweep.config_of(found[3].fields) == make_config("mini", dropout=0.3)


def test_several_tracks_one_at_a_time_are_no_traceback(tmp_path, no_runs):
    complaint("--track=cpu,mini", "--one_at_a_time", "--dropout=0,0.1", "--preset=toy",
              f"--out={tmp_path}")


def test_several_tracks_with_rows_are_no_traceback(tmp_path, no_runs):
    complaint("--track=cpu,mini", f"--rows={ROOT}/tools/ablations_ensemble.txt", "--preset=toy",
              f"--out={tmp_path}")


def test_values_are_separated_by_commas_and_schedules_by_semicolons():
    options, values = read("--track=cpu", "--device=cpu", "--dropout=0,0.1",
                           "--wd_schedule=0:1;0:1,1:0.5", "--lr_warmdown=0.3", "--seeds=4,5",
                           "--one_at_a_time", "--out=x")
    assert options == {"seeds": "4,5", "one_at_a_time": "true", "out": "x"}
    assert values == {"track": ["cpu"], "device": ["cpu"], "dropout": ["0", "0.1"],
                      "wd_schedule": ["0:1", "0:1,1:0.5"], "lr_warmdown": ["0.3"]}
    assert [label for label, _ in settings({"wd_schedule": values["wd_schedule"]})] == [
        "wd_schedule=0:1", "wd_schedule=0:1,1:0.5"]


def test_the_default_track_is_that_of_the_machine(monkeypatch):
    have_gpus(monkeypatch, 0)
    assert read("--dropout=0")[1]["track"] == ["cpu"]
    have_gpus(monkeypatch, 1)
    assert read("--dropout=0")[1]["track"] == ["mini"]
    assert read("--dropout=0", "--device=cpu")[1]["track"] == ["cpu"]


@pytest.mark.parametrize("argument, message", [
    ("--dropuot=0.1", "did you mean dropout"), ("--dropout=0,x", "--dropout=x: must be a number"),
    ("--dropout=0,7", "--dropout=7"), ("--track=cpu,gpu", "unknown track 'gpu'"),
    ("--seed=3", "--seed: a sweep sets that itself; say --seeds=1,2,3"),
    ("--run_id=a", "--run_id: a sweep sets that itself"),
    ("--runs_dir=a", "--runs_dir: a sweep sets that itself"),
    ("--dropout=0.1,0.1", "the same value twice"), ("dropout=1", "is not --field=value"),
    ("--wd_schedule=0:1;0:x", "--wd_schedule=0:x: must be points"),
    ("--seeds=", "--seeds=: must be whole"), ("--seeds=1,1", "--seeds=1,1: must be whole numbers"),
    ("--seeds=1,x", "must be whole"), ("--seeds=-1", "must be whole"), ("--seeds=1.5", "whole"),
    ("--jobs=x", "--jobs=x: must be"), ("--jobs=-1", "--jobs=-1: must be"),
    ("--rows=none.txt", "none.txt: cannot be read (No such file")])
def test_what_cannot_be_meant_is_one_line_before_anything_runs(argument, message, tmp_path,
                                                               no_runs):
    assert message in complaint("--preset=toy", "--device=cpu", argument, f"--out={tmp_path / 'o'}")
    assert not no_runs and not (tmp_path / "o").exists()


@pytest.mark.parametrize("argument", ["--jobs=1,2", "--jobs=0", "--one_at_a_time=maybe"])
def test_an_option_is_not_taken_for_another_value(argument, tmp_path, no_runs):
    complaint("--preset=toy", "--device=cpu", argument, f"--out={tmp_path / 'o'}")


def test_rows_and_several_values_do_not_go_together(tmp_path, no_runs):
    rows = tmp_path / "rows.txt"
    rows.write_text("drop | dropout=0 | dropout=0.1\n")
    assert "do not go together" in complaint("--device=cpu", f"--rows={rows}", "--softcap=0,15")


# ==== Files of rows =============================================================================
@pytest.mark.parametrize("track", TRACKS)
@pytest.mark.parametrize("file", ["ablations.txt", "ablations_ensemble.txt"])
def test_every_row_flips_something(file, track):
    """On the track `cpu` all of them; elsewhere each does, or says why it cannot."""
    fixed = {"track": track}
    for name, off, on in sweep.read_rows(ROOT / "tools" / file):
        try:
            setting = sweep.flipped(name, off, on, fixed)
        except UserError:
            assert track != "cpu", name
            continue
        config, usual = sweep.config_of(setting.fields), make_config(track)
        changed = {field for field in asdict(usual)
                   if getattr(usual, field) != getattr(config, field)}
        assert changed and changed <= off.keys() | on.keys()
        assert setting.label in (f"with {name}", f"without {name}")


@pytest.mark.parametrize("file", ["ablations.txt", "ablations_ensemble.txt"])
def test_every_row_has_a_name_and_a_setting_of_its_own(file):
    rows = sweep.read_rows(ROOT / "tools" / file)
    assert len({name for name, _, _ in rows}) == len(rows)
    assert len(settings({}, rows=rows)) == len(rows) + 1


def test_rows_are_read_as_written(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("# words\n\n  # more\n a b, c | x=1 | y= z=0:1,1:2\nd|x=|x=a=b\n")
    assert sweep.read_rows(path) == [("a b, c", {"x": "1"}, {"y": "", "z": "0:1,1:2"}),
                                     ("d", {"x": ""}, {"x": "a=b"})]


@pytest.mark.parametrize("line", ["drop | dropout=0", "drop", "a | b=1 | c=2 | d=3",
                                  "drop | dropout | dropout=1", "drop | dropout=0 | 0.1"])
def test_a_malformed_row_is_one_line_with_its_number(line, tmp_path, no_runs):
    path = tmp_path / "rows.txt"
    path.write_text(f"# first\n\nfine | dropout=0 | dropout=0.1\n{line}\n")
    error = complaint("--device=cpu", f"--rows={path}", f"--out={tmp_path / 'o'}")
    assert f"{path}, line 4: must be `name | " in error


@pytest.mark.parametrize("row, message", [("a | dropuot=0 | dropout=1", "dropuot"),
                                          ("a | dropout=0 | dropout=x", "--dropout=x")])
def test_a_row_of_no_field_or_value_is_one_line(row, message, tmp_path, no_runs):
    (tmp_path / "rows.txt").write_text(row)
    assert message in complaint("--device=cpu", f"--rows={tmp_path / 'rows.txt'}")


def test_a_file_without_rows_is_one_line(tmp_path, no_runs):
    (tmp_path / "rows.txt").write_text("# nothing\n")
    assert "no rows in it" in complaint("--device=cpu", f"--rows={tmp_path / 'rows.txt'}")


# ==== Jobs and the table ========================================================================
def test_all_settings_of_a_seed_come_before_the_next_seed(tmp_path):
    jobs = jobs_in(tmp_path, {"dropout": ["0", "0.1"]}, seeds=[3, 1])
    assert [(job.setting.label, job.seed, job.config.seed) for job in jobs] == [
        (f"dropout={dropout}", seed, seed) for seed in (3, 1) for dropout in ("0", "0.1")]
    assert len({job.folder for job in jobs}) == 4
    assert all(job.folder.parent == tmp_path for job in jobs)
    assert jobs[1].folder.name.startswith("cpu_dropout0.1")
    assert jobs[1].folder.name.endswith("_seed3")


def test_folders_are_distinct_for_every_row(tmp_path):
    rows = sweep.read_rows(ROOT / "tools/ablations.txt")
    values = {"track": ["cpu"], "num_models": ["1"]}
    jobs = sweep.jobs_of(sweep.settings_of(values, False, rows), [1, 2], tmp_path)
    assert len({job.folder for job in jobs}) == len(jobs) == 2 * (len(rows) + 1)


def test_sources_have_folders_of_their_own(monkeypatch, tmp_path):
    (tmp_path / "train_gpt.py").write_text("a")
    monkeypatch.setattr(sweep, "SOURCE", tmp_path / "train_gpt.py")
    before = sweep.default_out()
    assert re.fullmatch("sweep_[0-9a-f]{7}", before) and sweep.default_out() == before
    (tmp_path / "train_gpt.py").write_text("b")
    assert sweep.default_out() != before


def test_a_result_is_done_if_it_is_of_the_same_settings(tmp_path):
    job, = jobs_in(tmp_path, {}, seeds=[1])
    assert not sweep.is_done(job)
    finish(job, 6.0)
    assert sweep.is_done(job)
    path = job.folder / "result.json"
    result = json.loads(path.read_text())
    changed = {**result["config"], "dtype": "bfloat16", "device_batch_size": 1, "runs_dir": "x"}
    path.write_text(json.dumps({**result, "config": changed}))
    assert sweep.is_done(job)           # dtype was to be chosen, the others change no number
    for change, told in (({"dropout": 0.5}, "--dropout=0.5 instead of 0"),
                         ({"seed": 2}, "--seed=2 instead of 1")):
        path.write_text(json.dumps({**result, "config": {**result["config"], **change}}))
        with pytest.raises(UserError, match=told):
            sweep.is_done(job)
    del result["config"]["cautious"]
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match="--cautious=not there instead of true"):
        sweep.is_done(job)


def rows_of(lines):
    """{name: columns} of a table's lines, in order."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines[1:lines.index("")]]
    return {row[0]: row[1:] for row in cells}


def test_table_of_what_is_finished(tmp_path):
    jobs = jobs_in(tmp_path, {"dropout": ["0", "0.1", "0.2"]})
    assert sweep.table(jobs) == ["no run is finished"]
    for job in jobs[:1]:
        finish(job, 6.0)
    assert "one run" in sweep.table(jobs)[1]
    losses = {("dropout=0", 1): 6.0, ("dropout=0", 2): 6.5, ("dropout=0.1", 1): 5.5,
              ("dropout=0.1", 2): 5.25, ("dropout=0.2", 1): 7.0}
    for job in jobs:
        if (job.setting.label, job.seed) in losses:
            finish(job, losses[job.setting.label, job.seed])
    rows = rows_of(sweep.table(jobs))
    assert list(rows) == ["dropout=0.1", "dropout=0", "dropout=0.2"]
    assert rows["dropout=0"][:3] == ["2", "6.2500 ± 0.2500", "the base"]
    assert rows["dropout=0.1"][:3] == ["2", "5.3750 ± 0.1250", "-0.8750 ± 0.3750"]
    assert rows["dropout=0.2"][:3] == ["1", "7.0000", "+1.0000"]


def test_the_base_of_rows_is_the_runs_as_they_are(tmp_path):
    """All rows differ from it in one thing, even if one row is closer to the track."""
    rows = [("drop", {"dropout": "0"}, {"dropout": "0.1"}),
            ("decay", {"weight_decay": "0.1"}, {"weight_decay": "1"})]
    jobs = jobs_in(tmp_path, {"dropout": ["0.3"]}, rows=rows)
    for job in jobs:
        finish(job, 6.0 + job.seed / 8)
    assert rows_of(sweep.table(jobs))["as it is"][2] == "the base"


def test_rows_of_one_name_are_not_thrown_together(tmp_path):
    """Each setting is a line of the table, or the file is refused."""
    path = tmp_path / "rows.txt"
    path.write_text("x | dropout=0 | dropout=0.1\nx | softcap=0 | softcap=15\n")
    with contextlib.suppress(UserError):
        jobs = jobs_in(tmp_path, {}, rows=sweep.read_rows(path))
        for job in jobs:
            finish(job, 6.0 + job.seed / 8 + job.config.dropout)
        counts = [line.split()[-1] for line in ()]
        lines = sweep.table(jobs)
        counts = [re.split(r"\s{2,}", line)[1] for line in lines[1:lines.index("")]]
        assert counts == ["3", "3", "3"]


# ==== Sharing a machine =========================================================================
@pytest.fixture
def launched(monkeypatch):
    """What is started: [(arguments, environment)], without starting it."""
    found = []

    def popen(arguments, env, **options):
        found.append((arguments, env))
        return SimpleNamespace(poll=lambda: None, returncode=None)
    monkeypatch.setattr(sweep.subprocess, "Popen", popen)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return found


@pytest.mark.parametrize("gpus, at_once, processes", [
    (1, 1, 1), (2, 1, 2), (2, 2, 1), (3, 1, 2), (3, 2, 1), (4, 2, 2), (8, 1, 8), (8, 3, 2),
    (8, 2, 4), (7, 1, 4)])
def test_gpus_are_shared_out(gpus, at_once, processes, tmp_path, monkeypatch, launched):
    have_gpus(monkeypatch, gpus)
    machine = sweep.Machine(at_once, "auto")
    job, = jobs_in(tmp_path, {}, seeds=[1])
    for slot in range(at_once):
        machine.start(job, slot)
    seen = [env["CUDA_VISIBLE_DEVICES"].split(",") for _, env in launched]
    assert all(len(devices) == processes for devices in seen)
    every = [device for devices in seen for device in devices]
    assert len(set(every)) == len(every) and set(every) <= set(map(str, range(gpus)))
    for arguments, _ in launched:
        torchrun = [word for word in arguments if word.startswith("--nproc_per_node=")]
        assert torchrun == ([f"--nproc_per_node={processes}"] if processes > 1 else [])
        assert ("torch.distributed.run" in arguments) == (processes > 1)


def test_of_the_gpus_that_are_visible_only(tmp_path, monkeypatch, launched):
    have_gpus(monkeypatch, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    machine = sweep.Machine(2, "cuda")
    job, = jobs_in(tmp_path, {}, seeds=[1])
    for slot in (1, 0):
        machine.start(job, slot)
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in launched] == ["3", "5"]


def test_more_jobs_than_gpus_are_refused(tmp_path, monkeypatch, no_runs):
    have_gpus(monkeypatch, 2)
    error = complaint("--jobs=3", "--preset=toy", "--device=auto", f"--out={tmp_path / 'o'}")
    assert "--jobs=3 on 2 GPU(s): at most 2" in error
    assert sweep.Machine(3, "cpu").gpus == 0


def test_runs_on_a_cpu_share_its_cores(tmp_path, monkeypatch, launched):
    have_gpus(monkeypatch, 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    job, = jobs_in(tmp_path, {}, seeds=[1])
    for at_once, threads in ((1, "8"), (2, "4"), (3, "2"), (20, "1")):
        sweep.Machine(at_once, "cpu").start(job, 0)
        assert launched[-1][1]["OMP_NUM_THREADS"] == threads


def test_a_run_is_started_with_its_settings(tmp_path, monkeypatch, launched):
    job = jobs_in(tmp_path / "out", {"dropout": ["0", "0.1"]}, seeds=[7])[1]
    sweep.Machine(1, "cpu").start(job, 0)
    (arguments, _), = launched
    assert arguments[:2] == [sys.executable, str(ROOT / "train_gpt.py")]
    assert sorted(arguments[2:]) == sorted([
        "--track=cpu", "--preset=toy", "--device=cpu", "--num_models=1", "--dropout=0.1",
        "--seed=7", f"--run_id={job.folder.name}", f"--runs_dir={tmp_path / 'out'}"])


# ==== How far it is =============================================================================
@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(sweep, "time", SimpleNamespace(monotonic=lambda: now.seconds,
                                                       sleep=time.sleep))
    return now


def progress(job, epoch, member=1):
    """As if a job's run had come so far."""
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "metrics.jsonl").write_text(
        json.dumps({"member": member, "step": 1, "epoch": epoch}) + "\n")


def reported(state, capsys, what=""):
    state.report(what)
    return capsys.readouterr().out.rstrip("\n")


def test_part_that_is_done(tmp_path):
    fields = {"num_models": ["2"], "num_epochs": ["4"], "kd_epoch_factor": ["3"]}
    job, = jobs_in(tmp_path, fields, seeds=[1])
    assert sweep.part_done(job) == 0
    progress(job, 1.0)
    assert sweep.part_done(job) == pytest.approx(1 / 16)
    progress(job, 10.0, member=2)
    assert sweep.part_done(job) == pytest.approx(14 / 16)
    with open(job.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"member": 2, "val_loss": 5.0}\n')
    assert sweep.part_done(job) == 1
    (job.folder / "metrics.jsonl").write_text('{"member": 2, "st')
    assert sweep.part_done(job) == 0


def test_time_left_by_hand(tmp_path, clock, capsys):
    """A run was finished before; then 1.5 runs take 90 seconds, so 1.5 more take as long."""
    jobs = jobs_in(tmp_path, {"dropout": ["0", "0.1"], "num_epochs": ["2"]}, seeds=[1, 2])
    finish(jobs[0], 6.0)
    state = sweep.Sweep(jobs, None, 1)
    assert (state.finished, state.total, state.waiting) == (1, 4, jobs[1:])
    assert reported(state, capsys, "x") == "sweep  1/4 done  x"         # nothing to judge by
    clock.seconds += 90
    state.waiting = jobs[3:]
    state.finished = 2
    state.running = {0: (jobs[2], None)}
    progress(jobs[2], 1.0)
    line = reported(state, capsys)
    assert line == "sweep  2/4 done  left 1:30  running dropout=0, seed 2 (50%)"


def test_time_left_of_two_at_once_and_a_failure(tmp_path, clock, capsys):
    jobs = jobs_in(tmp_path, {"dropout": ["0", "0.1"], "num_epochs": ["2"]}, seeds=[1, 2, 3])
    state = sweep.Sweep(jobs, None, 2)
    clock.seconds += 100
    state.waiting, state.finished, state.failed = jobs[4:], 1, [(jobs[1], "why")]
    state.waiting = jobs[4:]
    state.running = {0: (jobs[2], None), 1: (jobs[3], None)}
    progress(jobs[2], 1.0)
    progress(jobs[3], 1.0)
    assert reported(state, capsys, "y") == "sweep  1/6 done  left 1:40  y"
    state.waiting, state.finished, state.running = [], 5, {0: None, 1: None}
    assert reported(state, capsys, "z") == "sweep  5/6 done  z"


def test_time_left_when_runs_that_wait_had_begun(tmp_path, clock, capsys):
    """Both were half done; 60 seconds later one has a quarter more: 0.75 runs are left."""
    jobs = jobs_in(tmp_path, {"num_epochs": ["4"]}, seeds=[1, 2])
    for job in jobs:
        progress(job, 2.0)
    state = sweep.Sweep(jobs, None, 1)
    clock.seconds += 60
    state.waiting = jobs[1:]
    state.running = {0: (jobs[0], None)}
    progress(jobs[0], 3.0)
    assert "left 3:00" in reported(state, capsys)


# ==== Real sweeps ===============================================================================
def started(*arguments):
    """sweep.py as a process of its own."""
    return subprocess.Popen([sys.executable, SCRIPT, *map(str, arguments)], encoding="utf-8",
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=clean_environment())


def processes_in(folder):
    """Processes, not yet ended, whose command names a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().decode(errors="replace")
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            if str(folder) in words and "train_gpt.py" in words and state != "Z":
                found.append(int(path.name))
    return found


def caught(folder, *runs):
    """{run: process that trains it}, each stopped (SIGSTOP) as soon as it has made a step."""
    found, deadline = {}, time.monotonic() + 60
    while len(found) < len(runs):
        assert time.monotonic() < deadline, f"only {found} of {runs} were trained"
        for run in set(runs) - found.keys():
            metrics = folder / run / "metrics.jsonl"
            if metrics.exists() and metrics.stat().st_size:
                found[run], = (pid for pid in processes_in(folder)
                               if run in Path(f"/proc/{pid}/cmdline").read_text())
                os.kill(found[run], signal.SIGSTOP)
                assert not (folder / run / "result.json").exists()
        time.sleep(0.005)
    return found


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of two settings and two seeds by the command, uninterrupted."""
    folder = tmp_path_factory.mktemp("swept") / "out"
    process = started(*TWO_BY_TWO, "--jobs=2", f"--out={folder}")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, ""), out + err
    runs = sorted(path.parent.name for path in folder.glob("*/result.json"))
    return SimpleNamespace(folder=folder, out=out, runs=runs,
                           table=(folder / "table.txt").read_text(encoding="utf-8"))


@pytest.fixture
def copy(swept, tmp_path):
    """A function: the sweep's folder again, without the runs whose names are given."""
    def make(*without):
        folder = tmp_path / "out"
        shutil.copytree(swept.folder, folder)
        (folder / "table.txt").unlink()
        for name in without:
            shutil.rmtree(folder / name)
        return folder
    yield make
    for pid in processes_in(tmp_path):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def quick(monkeypatch):
    """Waits little; a list of the names of the runs that are started in this process."""
    names, start = [], sweep.Machine.start

    def record(self, job, slot):
        names.append(job.folder.name)
        return start(self, job, slot)
    monkeypatch.setattr(sweep.Machine, "start", record)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.05)
    return names


def table_in(folder):
    return (folder / "table.txt").read_text(encoding="utf-8")


def test_a_sweep_prints_what_compare_finds(swept):
    assert len(swept.runs) == 4
    assert swept.out.startswith(f"sweep  2 setting(s) x 2 seed(s) in {swept.folder}: 0 of 4 runs")
    assert swept.out.endswith(f"\n\n{swept.table}")
    results = {}
    for name in swept.runs:
        result = json.loads((swept.folder / name / "result.json").read_text())
        label = f"dropout={as_text(result['config']['dropout'])}"
        results.setdefault(label, []).append(result)
        assert f"{label}, seed {result['seed']}: selection {result['selection_loss']:.4f}" in (
            swept.out)
    rows = rows_of(swept.table.splitlines())
    means = {label: np.mean([result["selection_loss"] for result in group])
             for label, group in results.items()}
    assert list(rows) == sorted(means, key=means.get)
    base, other = ([run.losses["selection"] for run in compare.read_runs(
        [swept.folder / name for name in swept.runs if ("dropout0.4" in name) == with_])[0]]
        for with_ in (False, True))
    runs, _ = compare.read_runs([f"{swept.folder}/*_seed*"])
    groups = {as_text(group[0].settings["dropout"]): group for group in compare.group_runs(runs)}
    gap = compare.difference(groups["0.4"], groups["0"], "selection")
    assert gap.mean == pytest.approx(np.mean(other) - np.mean(base))
    for label, losses in (("dropout=0", base), ("dropout=0.4", other)):
        error = np.std(losses, ddof=1) / 2 ** 0.5
        assert rows[label][:2] == ["2", f"{np.mean(losses):.4f} ± {error:.4f}"]
    assert rows["dropout=0"][2] == "the base"
    assert rows["dropout=0.4"][2:4] == [f"{gap.mean:+.4f} ± {gap.error:.4f}", compare.as_p(gap.p)]
    own, = (line for line in compare.compare_groups([groups["0"], groups["0.4"]], groups["0"])
            if line.startswith("dropout=0.4"))
    assert re.split(r"\s{2,}", own)[1:] == rows["dropout=0.4"]


def test_the_same_command_again_runs_nothing(swept, no_runs):
    code, out, err = tool(*TWO_BY_TWO, f"--out={swept.folder}")
    assert (code, err, no_runs) == (0, "", [])
    assert "4 of 4 runs are finished" in out and out.endswith(f"\n\n{swept.table}")
    assert table_in(swept.folder) == swept.table


def test_more_seeds_keep_what_is_there(swept):
    """Of three seeds two are there; each job that is started is one of the third."""
    settings = sweep.settings_of(read(*TWO_BY_TWO)[1], False, [])
    jobs = sweep.jobs_of(settings, [1, 2, 3], swept.folder)
    waiting = sweep.Sweep(jobs, None, 1).waiting
    assert [job.seed for job in waiting] == [3, 3]


def test_a_sweep_that_is_killed_goes_on(swept, copy, quick, monkeypatch):
    """Of two runs one dies with it, the other outlives it and is waited for, not run again."""
    dead, orphan = swept.runs[1], swept.runs[2]
    folder = copy(dead, orphan)
    first = started(*TWO_BY_TWO, "--jobs=2", f"--out={folder}")
    pids = caught(folder, dead, orphan)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    os.kill(pids[dead], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while sweep.is_under_way(SimpleNamespace(folder=folder / dead)):    # on a busy machine it lingers
        assert time.monotonic() < deadline
        time.sleep(0.005)
    rounds, fill = [], sweep.Sweep.fill

    def count(self):
        rounds.append([job.folder.name for job in self.waiting])
        if len(rounds) == 3:
            os.kill(pids[orphan], signal.SIGCONT)
        return fill(self)
    monkeypatch.setattr(sweep.Sweep, "fill", count)
    code, out, err = tool(*TWO_BY_TWO, "--jobs=2", f"--out={folder}")
    assert (code, err) == (0, ""), out
    assert quick == [dead]
    assert rounds[2] == [orphan]
    assert table_in(folder) == swept.table
    assert not processes_in(folder)


def test_a_sweep_that_is_told_to_stop_goes_on_beside_a_run_that_fails(swept, copy, quick):
    """By then the result of one run is gone, which was begun otherwise: train_gpt.py says so."""
    run, bad = swept.runs[3], swept.runs[0]
    folder = copy(run)
    process = started(*TWO_BY_TWO, f"--out={folder}")
    pid = caught(folder, run)[run]
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.3)
    os.kill(pid, signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and err == ""
    assert "stopping: the runs save their states; the same command goes on" in out
    assert not processes_in(folder)
    assert not (folder / run / "result.json").exists()
    assert (folder / run / "state.safetensors").exists()

    facts = json.loads((folder / bad / "run.json").read_text())
    (folder / bad / "run.json").write_text(json.dumps({**facts, "softcap": "33"}))
    (folder / bad / "result.json").unlink()
    code, out, err = tool(*TWO_BY_TWO, "--jobs=2", f"--out={folder}")
    assert code == 2 and err.startswith("error: 1 run(s) failed") and err.count("\n") == 1
    assert "dropout=" in err and "softcap=0 (was 33)" in err
    assert re.search(r"FAILED dropout=0[.4]*, seed \d: .*softcap=0 \(was 33\)", out)
    assert "2 of 4 runs are finished" in out and sorted(quick) == [bad, run]
    assert sorted(row[0] for row in rows_of(table_in(folder).splitlines()).values()) == ["1", "2"]

    shutil.rmtree(folder / bad)
    shutil.copytree(swept.folder / bad, folder / bad)
    quick.clear()
    code, out, err = tool(*TWO_BY_TWO, f"--out={folder}")
    assert (code, err, quick) == (0, "", []) and table_in(folder) == swept.table


def test_a_result_of_other_settings_is_one_line(swept, copy, no_runs):
    folder = copy()
    path = folder / swept.runs[0] / "result.json"
    result = json.loads(path.read_text())
    result["config"]["softcap"] = 33
    path.write_text(json.dumps(result))
    error = complaint(*TWO_BY_TWO, f"--out={folder}")
    assert f"{path.parent}: a run with --softcap=33 instead of 0; choose another --out" in error
