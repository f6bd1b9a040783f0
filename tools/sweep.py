"""Runs of several settings and seeds, and what compare.py says of them, best first on selection.

    python tools/sweep.py --seeds=1,2,3 --dropout=0,0.1 --weight_decay=1,2
    python tools/sweep.py --seeds=1,2,3 --dropout=0,0.1 --weight_decay=1,2 --one_at_a_time
    python tools/sweep.py --seeds=1,2,3 --rows=tools/ablations.txt --num_models=1

Takes the fields of train_gpt.py; of one with several values (commas; semicolons where values are
schedules) every combination is run, or with --one_at_a_time each value with all else as the track
has it. --rows: a file of `name | fields when off | fields when on`, each row of which flips one
thing. A single value holds for all runs.

  --seeds=1,2,3         the seeds of each setting [1,2,3]
  --jobs=2              runs side by side, which share cores or GPUs [1]
  --out=NAME            folder of the runs under runs/ [sweep_ and the source's hash]

The same command again runs what is not finished, goes on with what was stopped, and prints the
table. Edited source is another folder, so that no run of one source counts for another; compare the
two: python tools/compare.py 'runs/sweep_A/*' --against 'runs/sweep_B/*'.
"""
import fcntl
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from _runs import ROOT, compared, python_on, run_tool
from compare import compare_groups, compare_one, kind_of, read_run
from train_gpt import (FIELDS, SOURCE, UserError, check_name, epochs_of, make_config, minutes,
                       parse_arguments, plan_launch, run_name)

OPTIONS = ("seeds", "jobs", "out", "rows", "one_at_a_time")
OWN = ("run_id", "runs_dir", "seed")        # fields that the sweep sets itself
AS_IT_IS = "as it is"       # the label of the base, if it differs in nothing
POLL_SECONDS = 0.5
REPORT_SECONDS = 60


class Setting(NamedTuple):
    """A label for people, and {field: text} of what is not as the default track has it."""
    label: str
    fields: dict                # first those that tell settings apart


class Job(NamedTuple):
    """A run to be made: its setting, seed, Config and folder."""
    setting: Setting
    seed: int
    config: object
    folder: Path


# ==== What is to be run =========================================================================
def settings_of(values, one_at_a_time, rows):
    """[Setting], the base first if there is one, of {field: [texts]} and [(name, off, on)]."""
    fixed = {name: texts[0] for name, texts in values.items() if len(texts) == 1}
    varied = {name: texts for name, texts in values.items() if len(texts) > 1}
    if one_at_a_time and "track" in varied:
        raise UserError("--one_at_a_time and several tracks do not go together")
    if rows:
        if varied:
            raise UserError("--rows and several values of a field do not go together")
        settings = [Setting(AS_IT_IS, fixed)]
        settings += [flipped(name, off, on, fixed) for name, off, on in rows]
    elif one_at_a_time:
        settings = [Setting(AS_IT_IS, fixed)]
        settings += [Setting(f"{name}={text}", {name: text, **fixed})
                     for name, texts in varied.items() for text in texts]
    else:
        combinations = [dict(zip(varied, texts)) for texts in itertools.product(*varied.values())]
        settings = [Setting(label_of(chosen), {**chosen, **fixed}) for chosen in combinations]
    distinct = {}
    for setting in settings:
        distinct.setdefault(config_of(setting.fields), setting)
    return list(distinct.values())


def label_of(fields):
    return " ".join(f"{name}={text}" for name, text in fields.items()) or AS_IT_IS


def config_of(fields):
    fields = dict(fields)
    return make_config(fields.pop("track"), **fields)


def flipped(name, off, on, fixed):
    """The Setting of a row: on if the runs have it off, else off."""
    is_off = config_of({**fixed, **off}) == config_of(fixed)
    change = on if is_off else off
    if config_of({**fixed, **change}) == config_of(fixed):
        raise UserError(f"row {name!r}: both of its sides are as the runs have it anyway")
    rest = {field: text for field, text in fixed.items() if field not in change}
    return Setting(f"{'with' if is_off else 'without'} {name}", {**change, **rest})


def read_rows(path):
    """[(name, {field: text} when off, the same when on)] of a file of rows."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = [part.strip() for part in line.split("|")]
        if len(parts) != 3 or not all("=" in word for part in parts[1:] for word in part.split()):
            raise UserError(f"{path}, line {number}: must be `name | field=value ... | field=value"
                            " ...`")
        off, on = (dict(word.split("=", 1) for word in part.split()) for part in parts[1:])
        if parts[0] in [name for name, *_ in rows]:
            raise UserError(f"{path}, line {number}: a second row named {parts[0]!r}")
        rows.append((parts[0], off, on))
    if not rows:
        raise UserError(f"{path}: no rows in it")
    return rows


def read_arguments(arguments):
    """({option: text}, {field: [texts]}) of a command line; UserError if it cannot be meant."""
    arguments = ["--one_at_a_time=true" if argument == "--one_at_a_time" else argument
                 for argument in arguments]
    given = parse_arguments(arguments)
    options = {name: given.pop(name) for name in OPTIONS if name in given}
    if options.get("one_at_a_time", "true") != "true":
        raise UserError("--one_at_a_time takes no value")
    values = {}
    for name, text in given.items():
        check_name(name, (*FIELDS, *OPTIONS), "field or option")
        if name in OWN:
            raise UserError(f"--{name}: a sweep sets that itself" + (
                "; say --seeds=1,2,3" if name == "seed" else ""))
        values[name] = text.split(";" if FIELDS[name].type is tuple else ",")
        if len(set(values[name])) < len(values[name]):
            raise UserError(f"--{name}={text}: the same value twice")
    _, track = plan_launch(values.get("device", ["auto"])[0])
    values = {"track": values.pop("track", [track]), **values}
    return options, values


def whole_numbers(name, text):
    """[int] of "1,2,3"; UserError if it cannot be."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise UserError(f"--{name}={text}: must be whole numbers, each once, as 1,2,3")
    return numbers


def jobs_of(settings, seeds, out):
    """[Job]: all settings with the first seed, then with the next. Runs are named as train_gpt.py
    would name them, what tells settings apart first."""
    jobs = []
    for seed in seeds:
        for setting in settings:
            fields = {**setting.fields, "seed": str(seed)}
            config = config_of(fields)
            given = {name: getattr(config, name) for name in fields if name != "track"}
            jobs.append(Job(setting, seed, config, out / run_name(config, given)))
    return jobs


def default_out():
    """sweep_ and seven digits that tell sources apart."""
    return f"sweep_{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:7]}"


def is_done(job):
    """Whether the run is finished; UserError if its folder holds a run of other settings."""
    path = job.folder / "result.json"
    if not path.exists():
        return False
    held = compared(json.loads(path.read_text(encoding="utf-8"))["config"])
    for name, ours in compared(asdict(job.config)).items():
        theirs = held.get(name, "not there")
        if ours != theirs and (name, ours) != ("dtype", "auto"):
            raise UserError(f"{job.folder}: a run with --{name}={theirs} instead of {ours}; choose"
                            " another --out")
    return True


# ==== Running ===================================================================================
class Machine:
    """What the runs that go on side by side have of this machine."""

    def __init__(self, jobs, device):
        self.gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
        if 0 < self.gpus < jobs:
            raise UserError(f"--jobs={jobs} on {self.gpus} GPU(s): at most {self.gpus}")
        self.threads = max(1, (os.cpu_count() or 1) // jobs)
        share = self.gpus // jobs
        self.processes = 1 << (share.bit_length() - 1) if share else 1
        self.visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if self.visible == [""]:
            self.visible = [str(i) for i in range(self.gpus)]

    def start(self, job, slot):
        """A process that trains the run of `job` with the share of `slot`."""
        environment = {**os.environ}
        if self.gpus:
            mine = self.visible[slot * self.processes:(slot + 1) * self.processes]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        else:
            environment |= {"OMP_NUM_THREADS": str(self.threads)}
            if self.threads < (os.cpu_count() or 1):        # others need the cores
                environment["GOMP_SPINCOUNT"] = "0"
        arguments = {**job.setting.fields, "seed": job.seed, "run_id": job.folder.name,
                     "runs_dir": job.folder.parent}
        job.folder.mkdir(parents=True, exist_ok=True)
        with open(job.folder / "console.txt", "ab") as output:
            return subprocess.Popen(
                [*python_on(self.processes), str(ROOT / "train_gpt.py"),
                 *(f"--{name}={value}" for name, value in arguments.items())],
                stdout=output, stderr=subprocess.STDOUT, env=environment)


def is_under_way(job):
    """Whether another process is at the run (one that outlived a sweep that was killed, say)."""
    try:
        with open(job.folder / "lock", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


def last_line(job):
    """The last line that a run has said."""
    path = job.folder / "console.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def name_of(job):
    return f"{job.setting.label}, seed {job.seed}"


def part_done(job):
    """The part of a run that is done, by the last line of its metrics."""
    try:
        *_, last = (job.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        reading = json.loads(last)
        lengths = [epochs_of(job.config, k) for k in range(1, job.config.num_models + 1)]
        before = reading["member"] - 1
        return (sum(lengths[:before]) + reading.get("epoch", lengths[before])) / sum(lengths)
    except (OSError, ValueError, KeyError):
        return 0.0


class Sweep:
    """Runs jobs, some at a time, and says how far it is."""

    def __init__(self, jobs, machine, at_once):
        self.waiting = [job for job in jobs if not is_done(job)]
        self.finished = len(jobs) - len(self.waiting)
        self.total = len(jobs)
        self.machine = machine
        self.running = dict.fromkeys(range(at_once))    # slot: (job, process), or None
        self.begun = {id(job): part_done(job) for job in self.waiting}
        self.start = time.monotonic()
        self.failed = []

    def run(self):
        """Make all runs that are not finished; the jobs that failed, with their last line."""
        last_report = time.monotonic()
        try:
            while self.waiting or any(self.running.values()):
                self.fill()
                time.sleep(POLL_SECONDS)
                self.collect()
                if time.monotonic() - last_report > REPORT_SECONDS:
                    last_report = time.monotonic()
                    self.report("")
        except BaseException:
            self.stop()
            raise
        return self.failed

    def fill(self):
        """Start a run on each slot that is free."""
        for slot in [slot for slot, held in self.running.items() if held is None]:
            job = next((job for job in self.waiting if not is_under_way(job)), None)
            if job is None:
                return
            self.waiting.remove(job)
            if is_done(job):                # by another process, meanwhile
                self.finished += 1
            else:
                self.running[slot] = job, self.machine.start(job, slot)

    def collect(self):
        """Note the runs that have ended."""
        for slot, held in self.running.items():
            if held is None or held[1].poll() is None:
                continue
            job, process = held
            self.running[slot] = None
            if process.returncode or not is_done(job):
                self.failed.append((job, last_line(job)))
                self.report(f"FAILED {name_of(job)}: {last_line(job)}")
            else:
                self.finished += 1
                loss = read_run(job.folder).losses["selection"]
                self.report(f"{name_of(job)}: selection {loss:.4f}")

    def report(self, what):
        """A line: how many are done, what has happened, how long it will take."""
        running = [job for job, _ in filter(None, self.running.values())]
        done = self.finished + len(self.failed) + sum(map(part_done, [*running, *self.waiting]))
        begun = sum(self.begun.values()) + self.total - len(self.begun)
        elapsed = time.monotonic() - self.start
        left = ""
        if done > begun and done < self.total:
            left = f"  left {minutes(elapsed / (done - begun) * (self.total - done))}"
        what = what or "running " + ", ".join(
            f"{name_of(job)} ({part_done(job):.0%})" for job in running)
        print(f"sweep  {self.finished}/{self.total} done{left}  {what}", flush=True)

    def stop(self):
        """Let the runs that are under way save their states and end."""
        processes = [process for _, process in filter(None, self.running.values())]
        for process in processes:
            process.send_signal(signal.SIGTERM)
        if processes:
            print("stopping: the runs save their states; the same command goes on", flush=True)
        for process in processes:
            process.wait()


# ==== The command ===============================================================================
def table(jobs):
    """Lines of compare on the runs of `jobs` that are finished."""
    runs, labels = {}, {}
    for job in jobs:
        if is_done(job):
            run = read_run(job.folder)
            runs.setdefault(job.setting.label, []).append(run)
            labels[kind_of(run)] = job.setting.label
    groups = list(runs.values())
    if len(groups) < 2:
        return compare_one(groups[0]) if groups else ["no run is finished"]
    base = runs.get(AS_IT_IS) or min(groups, key=lambda group: distance_from_track(group[0]))
    return compare_groups(groups, base, labels)


def distance_from_track(run):
    """How many fields of a run are not as its track has them."""
    usual = compared(asdict(make_config(run.settings["track"])))
    return sum(usual[name] != text for name, text in run.settings.items() if name in usual)


def main():
    if not sys.argv[1:] or {"--help", "-h"} & set(sys.argv[1:]):
        print(__doc__.strip())
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options, values = read_arguments(sys.argv[1:])
    seeds = whole_numbers("seeds", options.get("seeds", "1,2,3"))
    at_once, *more = whole_numbers("jobs", options.get("jobs", "1"))
    if more or not at_once:
        raise UserError(f"--jobs={options['jobs']}: must be one number, at least 1")
    rows = read_rows(options["rows"]) if "rows" in options else []
    settings = settings_of(values, "one_at_a_time" in options, rows)
    out = ROOT / "runs" / (options.get("out") or default_out())
    jobs = jobs_of(settings, seeds, out)
    sweep = Sweep(jobs, Machine(at_once, values.get("device", ["auto"])[0]), at_once)
    print(f"sweep  {len(settings)} setting(s) x {len(seeds)} seed(s) in {out}:"
          f" {sweep.finished} of {len(jobs)} runs are finished", flush=True)
    failed = sweep.run()
    text = "\n".join(table(jobs))
    print(f"\n{text}")
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    if failed:
        raise UserError(f"{len(failed)} run(s) failed, the first one {name_of(failed[0][0])}:"
                        f" {failed[0][1]}; the same command tries again")


if __name__ == "__main__":
    run_tool(main)
