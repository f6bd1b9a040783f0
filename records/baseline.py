"""The losses of plain single models by number of tokens: what data efficiency is read from.

    python train_gpt.py baseline --track=cpu

Plain: the track's model, optimizer and batch, one member, without teacher and dropout. For budgets
D, multiples of the track's train_tokens as far as the data goes: (a) one epoch with the usual
weight decay; (b) the best on `selection` over epochs and weight decays, found by a search that
begins at each D with what was best at the D before: fewer epochs while that helps (at the smallest
D else more), then the other weight decay. Both with and without U-Net skips and QK norm, whichever
is better on selection (some help only where there are few steps). Both curves hold val losses and
go into the dataset's meta.json. Every run is a line of runs/baseline_<track>/runs.jsonl and is not
repeated when the command is started again.
"""
import hashlib
import json
import time
from dataclasses import replace
from itertools import product

from data.shards import HEADER_INTS, write_meta

MULTIPLES = (1, 2, 4, 8, 12, 16)
TUNED_UP_TO = 4                         # the largest multiple for (b), which costs epochs times D
USUAL_WEIGHT_DECAY = 0.1
WEIGHT_DECAYS = (0.1, 1.0)
PLAIN = dict(                           # what a baseline does without, on any track
    num_models=1, num_chains=1, first_epochs=0, continue_members=False, edge_batch_rows=0,
    subset_fraction=1.0, kd_alpha=0.0, average="last", mtp_weight=0.0, second_weight="",
    third_weight="", masked_weight=0.0, token_noise=0.0, meta_lr=0.0, dropout=0.0,
    stochastic_depth=0.0, loop_count=1, recurrence_from=0.0, sawtooth_epochs=0, wd_schedule="0:1")
TRIED = "unet", "qk_norm"                # fields of which the better value counts
FIRST_GUESS = 8, 1.0, (False, True)     # epochs, weight decay and those fields at the smallest D
KEY = "tokens", "epochs", "weight_decay", *TRIED        # what tells runs apart


def measure_baseline(t, c, overrides):
    """Measure and store both curves of the dataset of config `c`. t: the module train_gpt."""
    c = replace(c, **PLAIN)
    t.refuse([(not c.selection_tokens, "--selection_tokens=0: the tuned curve is chosen on it")])
    start, rt = time.perf_counter(), t.start_runtime(c)
    folder, dataset = t.ROOT / c.runs_dir / f"baseline_{c.track}", t.ROOT / c.dataset
    log = t.report.Log(folder, rt.rank == 0, c.log_seconds)
    runs = Runs(t, c, rt, log, folder)
    available = sum((path.stat().st_size - 4 * HEADER_INTS) // 2
                    for path in dataset.glob("*_train_*.bin"))
    budgets = [(m, m * c.train_tokens) for m in MULTIPLES if m * c.train_tokens <= available]
    one_epoch = [[tokens, min((runs.measure(tokens, 1, USUAL_WEIGHT_DECAY, values)
                               for values in product((True, False), repeat=len(TRIED))),
                              key=by_selection)["val"]] for _, tokens in budgets]
    chosen, guess = [], FIRST_GUESS
    for multiple, tokens in budgets:
        if multiple <= TUNED_UP_TO:
            chosen.append(search(runs, tokens, *guess, may_rise=not chosen))
            guess = chosen[-1]["epochs"], chosen[-1]["weight_decay"], tried(chosen[-1])
    tuned = [[best["tokens"], best["val"]] for best in chosen]
    if rt.rank == 0:
        meta = json.loads((dataset / "meta.json").read_text(encoding="utf-8"))
        meta["baseline"] = {
            "one_epoch": one_epoch, "tuned": tuned, "tuned_settings": chosen,
            "source": " ".join([f"train_gpt.py baseline --track={c.track}",
                                *(f"--{k}={v}" for k, v in overrides.items())]),
            "hardware": t.report.hardware_name(rt.device)}
        write_meta(dataset, meta)
    log.say(f"one epoch  {one_epoch}\ntuned      {tuned}\nstored in {dataset / 'meta.json'} after"
            f" {t.report.minutes(time.perf_counter() - start)}")


def by_selection(run):
    return run["selection"]


def tried(run):
    return tuple(run[name] for name in TRIED)


def search(runs, tokens, epochs, wd, values, may_rise):
    """The run with the lowest selection loss at budget `tokens`, from the settings outwards."""
    def better(best, epochs, wd=wd, values=values):
        return min(best, runs.measure(tokens, epochs, wd, values), key=by_selection)

    best = runs.measure(tokens, epochs, wd, values)
    while best["epochs"] > 1 and better(best, best["epochs"] // 2) is not best:
        best = better(best, best["epochs"] // 2)
    if may_rise and best["epochs"] == epochs:
        while better(best, best["epochs"] * 2) is not best:
            best = better(best, best["epochs"] * 2)
    for other in set(WEIGHT_DECAYS) - {wd}:
        best = better(best, best["epochs"], other)
    for name in TRIED:
        flipped = tried({**best, name: not best[name]})
        best = better(best, best["epochs"], best["weight_decay"], flipped)
    return best


class Runs:
    """Trains plain models with compiled trainers and remembers what was measured."""

    def __init__(self, t, c, rt, log, folder):
        self.t, self.rt, self.log, self.path = t, rt, log, folder / "runs.jsonl"
        self.trainers = {}      # by the fields of TRIED
        self.plain = c
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        same = {name: value for name, value in vars(self.plain).items()
                if name not in (*t.checkpoint.FREE, "log_steps", *TRIED)}
        self.settings = hashlib.sha256(json.dumps(same).encode()).hexdigest()[:16]
        runs = [run for run in map(json.loads, lines) if run.pop("settings", 0) == self.settings]
        self.done = {tuple(run[key] for key in KEY): run for run in runs}

    def measure(self, tokens, epochs, wd, values):
        """{fields of KEY, selection, val} of a plain model with `values` of TRIED, run if new."""
        run = dict(zip(KEY, (tokens, epochs, wd, *values)))
        if tuple(run.values()) in self.done:
            return self.done[tuple(run.values())]
        t, setting = self.t, replace(self.plain, train_tokens=tokens, num_epochs=epochs,
                                     weight_decay=wd, **dict(zip(TRIED, values)))
        data = t.load_dataset(t.ROOT / setting.dataset, setting)
        data.holdout = []               # not looked at here
        if values not in self.trainers:
            self.trainers[values] = t.Trainer(setting, self.rt, self.log, data)
        trainer = self.trainers[values]
        trainer.c, trainer.data = replace(
            setting, device_batch_size=trainer.c.device_batch_size), data
        _, scores = trainer.train_member(1)
        for split in ("selection", "val"):
            run[split] = round(t.mean_loss(scores[split]), 4)
        self.done[tokens, epochs, wd, *values] = run
        self.log.say(" ".join(f"{k}:{v}" for k, v in run.items()))
        if self.rt.rank == 0:
            with open(self.path, "a", encoding="utf-8") as file:
                print(json.dumps({**run, "settings": self.settings}), file=file)
        return run
