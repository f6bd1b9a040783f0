"""Settings for a text and a time: chosen, said, then trained with.

    ./run.sh --track=auto --dataset=FOLDER --minutes=60 [--field=value ...]
    python tools/auto.py --dataset=FOLDER --minutes=60 --dry_run    only says what it would run

Takes all of the train tokens there are (at most 100M) and the settings of the nearest size in a
table (SIZES, measured: records/EXPERIMENTS.md). How many models there is time for follows from a
few steps that it times on this machine, which should have nothing else to do then. What it chose
are ordinary fields of a run of the track `cpu` (or `mini`, for a large text on a GPU): fields that
are given here are left as given.

The run's folder is runs/auto_<dataset>_<minutes>m_seed<seed>, or --run_id. If it is there already,
its own settings are taken and nothing is chosen again, so the same command goes on with a run that
was stopped, on another machine, too.
"""
import itertools
import json
import math
import os
import re
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from _runs import ROOT, python_on, run_tool
from baseline import USUAL_WEIGHT_DECAY
from train_gpt import (FIELDS, FREE, Member, Rows, Trainer, UserError, as_text, check_name,
                       cut_documents, dataset_folder, epochs_of, is_distilled, load_dataset,
                       make_config, minutes, parse_arguments, plan_launch, read_meta, start_runtime,
                       train_step)


class Size(NamedTuple):
    """What suits a text of `tokens`: fields of the members, and where that is known from."""
    tokens: int
    fields: dict
    source: str


# One member of `cpu`'s shape each, on data/prose; the ensemble was searched at 50,000 alone.
SIZES = (
    Size(50_000, dict(num_epochs=12, weight_decay=1.5, split_tokens=0.14), "the track `cpu`"),
    Size(100_000, dict(num_epochs=24, weight_decay=1.0, split_tokens=0.14), "a search of members"),
    Size(200_000, dict(num_epochs=12, weight_decay=0.5, split_tokens=0.14), "two members tried"),
    Size(800_000, dict(num_epochs=3, weight_decay=0.3, split_tokens=0.14), "one member tried"),
)
MINI = Size(4_000_000, {}, "the track `mini`, not tuned")
# Members that nobody teaches and members that are taught, by the time that they take: `cpu`'s are
# 3 and 1, `cpu_long`'s 6 and 4, where it flattens.
PLANS = ((1, 0), (2, 0), (3, 0), (3, 1), (4, 1), (6, 1), (6, 2), (6, 3), (6, 4))
MOST_TOKENS = 100_000_000
QUICK_EVAL = 200_000        # tokens of val and of holdout that a CPU scores in a minute or so
SHARE = 0.9                 # of the time that training may take: the rest is for scores and start
WARMUP_STEPS, STEPS = 2, 5  # of each kind
FEW_EPOCHS = 3              # below which tokens are hardly repeated: with the usual decay


def read_arguments(arguments):
    """({option: value}, {field: text} of the run) from a command line. UserError."""
    options = {"minutes": 60.0, "dry_run": "--dry_run" in arguments}
    given = parse_arguments([word for word in arguments
                             if word not in ("--track=auto", "--dry_run")])
    if "minutes" in given:
        text = given.pop("minutes")
        try:
            options["minutes"] = float(text)
        except ValueError:
            raise UserError(f"--minutes={text}: must be a number") from None
        if not 0 < options["minutes"] < 1e6:
            raise UserError(f"--minutes={text}: must be above 0")
    for name in given:
        check_name(name, (*FIELDS, "minutes", "dry_run"), "field or option")
    if not given.get("dataset"):
        raise UserError("--dataset=FOLDER is wanted: ./run.sh text makes one of your own text")
    for name in ("track", "preset"):
        if name in given:
            raise UserError(f"--{name}={given[name]}: auto chooses that itself; leave it out")
    return options, given


def settings_there(folder):
    """(track, {field: text}) of the run in `folder`; None if none was begun."""
    path = folder / "run.json"
    if not path.exists():
        return None
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return held["track"], {name: held[name] for name in FIELDS
                               if name in held and name not in (*FREE, "track", "preset")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error}); choose another"
                        " --run_id") from None


def read_text(given, track):
    """(Dataset of all train tokens, {field: text} that the text decides)."""
    folder = dataset_folder(make_config("cpu", dataset=given["dataset"]))
    meta, _ = read_meta(folder)
    counts = [facts.get("tokens", 0) for key, facts in meta.get("splits", {}).items()
              if key.startswith("train_")]
    if "vocab_size" not in meta or not sum(counts):
        raise UserError(f"{folder}: no dataset with a meta.json that has vocab_size and the tokens"
                        " of train; ./run.sh text makes one")
    fields = {"vocab_size": str(meta["vocab_size"]),
              "train_tokens": str(min(sum(counts), MOST_TOKENS)), "selection_tokens": "0"}
    data = load_dataset(folder, make_config(track, **{**fields, **given}))
    fields["selection_tokens"] = str(selection_size([len(document) for document in data.train]))
    longest = max(sum(map(len, data.scored[split])) for split in ("val", "holdout"))
    if longest > QUICK_EVAL and not torch.cuda.is_available():
        fields["eval_tokens"] = str(QUICK_EVAL)
    return data, fields


def selection_size(sizes):
    """Tokens for selection of a text whose documents have `sizes`: a tenth, at most `mini`'s; 0 if
    that is more than half of the text, as selection is whole documents."""
    wanted = min(60_000, sum(sizes) // 10)
    cut = next((end for end in itertools.accumulate(sizes) if end >= wanted), sum(sizes))
    return wanted if cut <= sum(sizes) / 2 else 0


def nearest(tokens, sizes):
    """The Size whose number of tokens is the nearest, by ratio."""
    return min(sizes, key=lambda size: abs(math.log(size.tokens / tokens)))


def step_seconds(config, runtime, data):
    """Seconds of a step without a teacher and with one, in the last stage: medians."""
    config = replace(config, num_models=2, kd_from=2, kd_teachers=1, kd_epoch_factor=1,
                     kd_alpha=0.5)
    trainer = Trainer(config, runtime, data.tables)
    medians = []
    for number in (1, 2):
        member = Member(number, trainer, data)
        trainer.start_member(number, member.seed)
        member.step = max(0, member.rows.num_steps - WARMUP_STEPS - STEPS)
        seconds = []
        for _ in range(WARMUP_STEPS + STEPS):
            start = time.perf_counter()
            train_step(trainer, member)
            runtime.synchronize()
            seconds.append(time.perf_counter() - start)
        trainer.add_teacher()
        medians.append(median(seconds[WARMUP_STEPS:]))
    return medians


def plan_fields(untaught, taught):
    """Fields of an ensemble of so many members that nobody teaches, and that are taught."""
    fields = {"num_models": untaught + taught, "kd_from": max(2, untaught + 1), "kd_alpha": 0,
              "final_mixture": "uniform"}
    if taught:
        fields |= {"kd_alpha": 0.5 if taught == 1 else 0.7, "kd_teachers": 99, "kd_epoch_factor": 3}
    if taught > 1:
        fields["final_mixture"] = "learned"
    return {name: as_text(value) for name, value in fields.items()}


def training_seconds(config, steps_an_epoch, seconds):
    """Of all members of a Config; seconds: of step_seconds."""
    return sum(epochs_of(config, number) * steps_an_epoch * seconds[is_distilled(config, number)]
               for number in range(1, config.num_models + 1))


def fit(track, fields, given, steps_an_epoch, seconds, limit):
    """({field: text} of the ensemble, seconds of training) of the largest of PLANS that `limit`
    seconds are enough for; of one member with fewer epochs if they are not enough for one."""
    best, whole = None, {**fields, **given}
    for untaught, taught in PLANS:
        chosen = fields | plan_fields(untaught, taught)
        is_learned = chosen["final_mixture"] == "learned" and "final_mixture" not in given
        if is_learned and not int(whole["selection_tokens"]):
            continue
        if best and int(given.get("num_models", untaught + taught)) != untaught + taught:
            continue            # of other plans the first has as many members, untaught
        config = make_config(track, **{**chosen, **given})
        needed = training_seconds(config, steps_an_epoch, seconds)
        if best is None or needed <= limit:
            best = chosen, needed
    chosen, needed = best
    if needed > limit:
        epochs = make_config(track, **{**chosen, **given}).num_epochs * limit / needed
        chosen = chosen | fewer_epochs(epochs, int(whole["train_tokens"]))
        config = make_config(track, **{**chosen, **given})
        share = config.train_tokens / int(whole["train_tokens"])
        needed = training_seconds(config, steps_an_epoch * share, seconds)
    return chosen, needed


def fewer_epochs(epochs, tokens):
    """{field: text} of one member that there is time for so many epochs of; for less than one, of
    fewer than `tokens` tokens."""
    changes = {"num_epochs": str(max(1, int(epochs)))}
    if epochs < FEW_EPOCHS:
        changes["weight_decay"] = as_text(USUAL_WEIGHT_DECAY)
    if epochs < 1:
        changes["train_tokens"] = str(max(2, int(epochs * tokens)))
    return changes


def choose(options, given):
    """(track, {field: text}, lines that say why) for a text and a time."""
    gpus = torch.cuda.device_count() if given.get("device", "auto") in ("auto", "cuda") else 0
    data, fields = read_text(given, "cpu")
    documents = data.train
    tokens = sum(map(len, data.train))
    size = nearest(tokens, SIZES + ((MINI,) if gpus else ()))
    track = "mini" if size is MINI else "cpu"
    fields |= {name: as_text(value) for name, value in size.fields.items()}
    config = make_config(track, **{**fields, **given})
    data = load_dataset(data.folder, config)
    runtime = start_runtime(config)
    seconds = step_seconds(config, runtime, data)
    rows = Rows(data.train, config.seq_len, config.batch_rows, config.num_epochs, config.seed,
                data.bos, data.tables.get("pairs"), config.split_tokens)
    steps_an_epoch = rows.rows_per_epoch / config.batch_rows
    limit = SHARE * 60 * options["minutes"]
    processes, _ = plan_launch(given.get("device", "auto"), "check")
    seconds = [value / processes for value in seconds]
    chosen, needed = fit(track, fields, given, steps_an_epoch, seconds, limit)
    config = make_config(track, **{**chosen, **given})
    if config.train_tokens < tokens:        # selection is a tenth of what is left
        left = cut_documents(documents, config.train_tokens)
        chosen["selection_tokens"] = str(selection_size([len(document) for document in left]))
        config = make_config(track, **{**chosen, **given})
    numbers = range(1, config.num_models + 1)
    members = ", ".join(f"{epochs_of(config, k)}{' taught' if is_distilled(config, k) else ''}"
                        for k in numbers)
    part = f" of {config.train_tokens:,} tokens" if config.train_tokens < tokens else ""
    shape = f"{config.num_layers} blocks of width {config.model_dim}"
    why = (f"the largest of its plans that {options['minutes']:g} minutes are enough for"
           if needed <= limit else "more than the time, but the least there is")
    return track, chosen, [
        f"auto      {tokens:,} tokens: settings for {size.tokens:,} ({size.source}): {shape},"
        f" {' '.join(f'{name}={value}' for name, value in size.fields.items())}",
        f"auto      a step takes {seconds[0]:.3f} s, with a teacher {seconds[1]:.3f} s, an epoch"
        f" {steps_an_epoch:.0f} steps: {config.num_models} model(s), of {members} epochs{part}, in"
        f" {minutes(needed)}: {why}"]


def main():
    arguments = sys.argv[1:]
    if {"--help", "-h"} & set(arguments):
        print(__doc__.strip())
        return
    options, given = read_arguments(arguments)
    name = Path(given["dataset"]).resolve().name
    name = f"auto_{name}_{options['minutes']:g}m_seed{given.get('seed', '1')}"
    run_id = given.setdefault("run_id", re.sub(r"[^\w.-]+", "-", name))
    folder = ROOT / given.get("runs_dir", "runs") / run_id
    there = settings_there(folder)
    if there:
        track, chosen = there
        lines = [f"auto      {folder} was begun: its own settings, nothing is chosen"]
    else:
        track, chosen, lines = choose(options, given)
    usual = make_config(track)
    fields = {field: text for field, text in {**chosen, **given}.items()
              if text != as_text(getattr(usual, field)) or field in given}
    command = [f"--track={track}", *(f"--{field}={text}" for field, text in fields.items())]
    lines.append(f"auto      ./run.sh {' '.join(map(shlex.quote, command))}")
    print("\n".join(lines), flush=True)
    if options["dry_run"]:
        return
    processes, _ = plan_launch(given.get("device", "auto"), "check")
    os.execv(sys.executable, [*python_on(processes), str(ROOT / "train_gpt.py"), *command])


if __name__ == "__main__":
    run_tool(main)
