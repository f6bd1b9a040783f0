"""The losses of single models by number of tokens: what data efficiency is read from.

    python tools/baseline.py --track=cpu

Takes the fields of train_gpt.py, as --field=value. Three curves of val losses, for budgets D,
multiples of the track's train_tokens as far as the data goes:

one_epoch  a plain model, one epoch with the usual weight decay. Plain: the track's model, optimizer
           and batch (KEPT), all else off.
tuned      a plain model, the best on `selection` over epochs and weight decays. Both of them with
           and without U-Net skips and QK norm, with the track's rows and with rows of half the
           length, whichever is better on selection (some help only where there are few steps;
           without a memory of the row long rows may cost more than they bring).
single     one model with all that the track's members have but a teacher, epochs and weight decay
           tuned alike: what is left of a multiple against it is what teachers and mixing add.

A search begins at each D with what was best at the D before, and goes on in each direction, of
epochs by factors of two, as long as that helps. Before each run a line says which it is, how many
are to come after it if no further change helps (if some do there may be more), and how long all of
these take at the speed of the runs so far. The curves go into the dataset's meta.json. Every run is
a line of <runs_dir>/baseline_<track>/runs.jsonl and is not repeated when the command is started
again.
"""
import hashlib
import json
import math
import time
from dataclasses import asdict, replace
from functools import partial
from typing import NamedTuple

from _runs import ROOT, config_from_arguments, run_tool
from train_gpt import (FIELDS, HEADER_INTS, Clocks, Log, Trainer, UserError, check_ranges,
                       count_tokens, dataset_folder, hardware_name, load_dataset, mean_loss,
                       minutes, start_runtime, train_member, write_json)

MULTIPLES = (1, 2, 4, 8, 12, 16)
# The largest multiple for what is tuned, which costs epochs times D. No ensemble has been worth
# twice the data of a tuned model.
TUNED_UP_TO = 2
USUAL_WEIGHT_DECAY = 0.1
WEIGHT_DECAYS = (0.03, 0.1, 0.3, 1.0, 1.5, 2.0)         # that a search goes along
TRIED = "unet", "qk_norm", "half_rows"  # what a plain model has or has not, as is better
FIRST_ONCE = 1, USUAL_WEIGHT_DECAY, (True, True, True)
FIRST_GUESS = 8, 1.0, (False, True, True)       # epochs, weight decay and TRIED at the smallest D
KEY = "tokens", "epochs", "weight_decay", *TRIED        # what tells runs apart
# Fields that a plain model has from the track: the machine, the data, the size and the blocks of
# the model, the optimizer and its rates. All others are off, whatever they are and will be.
KEPT = """track preset run_id runs_dir seed device dtype compile compile_model time_limit log_steps
save_minutes allow_changed hang_minutes dataset train_tokens selection_tokens
eval_tokens vocab_size seq_len batch_rows device_batch_size num_epochs num_layers model_dim
num_heads mlp_multiple proj_init resid_init x0_init unet value_projections
attn_gate qk_norm rope_base rope_fraction key_offset xsa iha window_pattern window_schedule softcap
matrix_lr embed_lr head_lr x0_lr scalar_lr gate_lr momentum momentum_start momentum_steps muon_eq
normuon_beta2 cautious weight_decay lr_warmdown lr_power lr_floor grad_clip loss_chunk""".split()
# off, where that is not 0, False, () or the first of the choices
NEUTRAL = {"wd_schedule": ((0, 1),), "mlp_dropout": True}


def plain(config):
    """The Config of a plain model: KEPT from `config`, all other fields off."""
    off = {}
    for name, field in FIELDS.items():
        if name not in KEPT:
            choices, least = field.metadata["choices"], field.metadata["least"]
            if least is None:           # as check_ranges has it
                least = 1 if field.type is int and field.default else 0
            off[name] = choices[0] if choices else () if field.type is tuple else field.type(least)
    config = replace(config, **{**off, **NEUTRAL})
    check_ranges(config)
    return config


def single(config):
    """The Config of one model as the track's members are, without a teacher."""
    return replace(config, num_models=1, kd_alpha=0, final_mixture="uniform")


def measure_baseline(config, overrides):
    """Measure the curves of the dataset of a Config and store them in its meta.json."""
    if not config.selection_tokens:
        raise UserError("--selection_tokens=0: the tuned curves are chosen on it")
    start = time.perf_counter()
    runtime = start_runtime(config)
    folder = ROOT / config.runs_dir / f"baseline_{config.track}"
    folder.mkdir(parents=True, exist_ok=True)
    dataset = dataset_folder(config)
    log = Log(folder, runtime.is_main)
    available = sum((path.stat().st_size - 4 * HEADER_INTS) // 2
                    for path in dataset.glob("*_train_*.bin"))
    budgets = [m * config.train_tokens for m in MULTIPLES if m * config.train_tokens <= available]
    few = [tokens for tokens in budgets if tokens <= TUNED_UP_TO * config.train_tokens]
    chosen = measure_curves(config, runtime, log,
                            {"one_epoch": budgets, "tuned": few, "single": few})
    curves = points_of(chosen)
    if runtime.is_main:
        meta = json.loads((dataset / "meta.json").read_text(encoding="utf-8"))
        meta["baseline"] = {
            **curves, "tuned_settings": chosen["tuned"], "single_settings": chosen["single"],
            "source": " ".join([f"tools/baseline.py --track={config.track}",
                                *(f"--{name}={value}" for name, value in overrides.items())]),
            "hardware": hardware_name(runtime.device)}
        write_json(dataset / "meta.json", meta)
    for kind, curve in curves.items():
        log.say(f"{kind:<10} {curve}")
    log.say(f"stored in {dataset / 'meta.json'} after {minutes(time.perf_counter() - start)}")


class Curve(NamedTuple):
    """A curve that is to be measured: its name, its Runs, and what `tune` takes beside them."""
    name: str
    runs: object
    budgets: list
    guess: tuple
    steps: tuple


def measure_curves(config, runtime, log, budgets, flips=True):
    """{name of a curve: [the best run at each budget]}. budgets: {name, of one_epoch, tuned and
    single: numbers of tokens, in order}; flips: whether the tuned search goes along TRIED too."""
    plain_runs = Runs(plain(config), runtime, log)
    single_runs = Runs(single(config), runtime, log)
    guess = config.num_epochs, config.weight_decay, (config.unet, config.qk_norm, False)
    both = (*ALONG, *FLIPS) if flips else ALONG
    curves = [Curve(name, runs, budgets[name], guess, steps) for name, runs, guess, steps in (
        ("one_epoch", plain_runs, FIRST_ONCE, FLIPS), ("tuned", plain_runs, FIRST_GUESS, both),
        ("single", single_runs, guess, ALONG)) if name in budgets]
    chosen = {}
    for i, curve in enumerate(curves):
        announced = Announced(curve, curves, log)
        chosen[curve.name] = tune(announced, curve.budgets, curve.guess, curve.steps)
        if all(later.runs is not curve.runs for later in curves[i + 1:]):
            curve.runs.trainers.clear()         # of their memory
    return chosen


def points_of(chosen):
    """{name of a curve: [[tokens, val loss], ...]} of measure_curves."""
    return {name: [[run["tokens"], run["val"]] for run in runs] for name, runs in chosen.items()}


def tune(runs, budgets, guess, steps):
    """The best run at each budget of `search`, begun with what was best at the one before."""
    chosen = []
    for tokens in budgets:
        chosen.append(search(runs, tokens, guess, steps))
        guess = settings_of(chosen[-1])
    return chosen


def settings_of(run):
    """What `measure` takes beside the budget."""
    return run["epochs"], run["weight_decay"], tuple(run[name] for name in TRIED)


def search(runs, tokens, guess, steps):
    """The run with the lowest selection loss at budget `tokens`, from `guess` (of settings_of)
    outwards: each of `steps` (of ALONG, FLIPS) in turn, as far as it helps."""
    best = runs.measure(tokens, *guess)
    for step in steps:
        while changed := step(best):
            found = runs.measure(tokens, *settings_of({**best, **changed}))
            if found["selection"] >= best["selection"]:
                break
            best = found
    return best


# A step of a search: what it changes in a run's settings, None where there is no further.
def longer(run):
    return {"epochs": 2 * run["epochs"]}


def shorter(run):
    return {"epochs": run["epochs"] // 2} if run["epochs"] > 1 else None


def heavier(run):
    more = [wd for wd in WEIGHT_DECAYS if wd > run["weight_decay"]]
    return {"weight_decay": more[0]} if more else None


def lighter(run):
    less = [wd for wd in WEIGHT_DECAYS if wd < run["weight_decay"]]
    return {"weight_decay": less[-1]} if less else None


def flip(name, run):
    return {name: not run[name]}


ALONG = longer, shorter, heavier, lighter
FLIPS = tuple(partial(flip, name) for name in TRIED)


class Runs:
    """Trains single models with compiled trainers and remembers what was measured."""

    def __init__(self, config, runtime, log):
        self.config = config
        self.runtime = runtime
        self.log = log
        self.path = log.folder / "runs.jsonl"
        self.trainers = {}      # by the values of TRIED
        self.made = []          # keys of the runs of this launch
        self.seconds = 0.0      # that these took, without compilation
        self.val_tokens = 0     # that each of them scored
        own = ("run_id", "runs_dir", "time_limit", "flop_limit", "log_steps", "save_minutes",
               "allow_changed", "hang_minutes", "unet", "qk_norm")
        same = {name: value for name, value in asdict(config).items() if name not in own}
        self.settings = hashlib.sha256(json.dumps(same).encode()).hexdigest()[:16]
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        runs = [run for run in map(json.loads, lines) if run.pop("settings", 0) == self.settings]
        self.done = {tuple(run[key] for key in KEY): run for run in runs}

    def measure(self, tokens, epochs, wd, values):
        """{fields of KEY, selection, val} of a model with `values` of TRIED, run if new."""
        key = (tokens, epochs, wd, *values)
        if key in self.done:
            return self.done[key]
        clocks = Clocks()
        unet, qk_norm, half_rows = values
        config = replace(self.config, train_tokens=tokens, num_epochs=epochs, weight_decay=wd,
                         unet=unet, qk_norm=qk_norm)
        if half_rows:
            config = replace(config, seq_len=config.seq_len // 2, batch_rows=2 * config.batch_rows,
                             device_batch_size=2 * config.device_batch_size)
        data = load_dataset(dataset_folder(config), config)
        del data.scored["holdout"]              # not looked at here
        if values not in self.trainers:
            self.trainers[values] = Trainer(config, self.runtime, data.tables)
        trainer = self.trainers[values]
        trainer.config = config                 # other tokens, epochs, decay: the same model
        _, scores = train_member(1, trainer, data, self.log)
        run = dict(zip(KEY, key))
        for split in ("selection", "val"):
            run[split] = round(mean_loss(scores[split]), 4)
        self.done[key] = run
        self.made.append(key)
        self.seconds += clocks.training()
        self.val_tokens = count_tokens(data.scored["val"])
        self.log.say(" ".join(f"{name}:{value}" for name, value in run.items()))
        if self.runtime.is_main:
            with open(self.path, "a", encoding="utf-8") as file:
                print(json.dumps({**run, "settings": self.settings}), file=file)
        return run


# ==== What is still to come =====================================================================
class Forecast:
    """Stands in for Runs: of a run that is not made it notes the key, and that it does not help."""

    def __init__(self, done):
        self.done = done
        self.keys = []

    def measure(self, tokens, epochs, wd, values):
        key = (tokens, epochs, wd, *values)
        if key in self.done:
            return self.done[key]
        self.keys.append(key)
        return {**dict(zip(KEY, key)), "selection": math.inf}


def keys_to_come(curves):
    """Keys of what is still to be run for [Curve], if no change that is tried helps."""
    found = set()
    for curve in curves:
        forecast = Forecast(curve.runs.done)
        tune(forecast, curve.budgets, curve.guess, curve.steps)
        found |= {(curve.runs.settings, key) for key in forecast.keys}  # plain curves share runs
    return [key for _, key in found]


class Announced:
    """The Runs of a curve, that say before each new run which it is and what is to come."""

    def __init__(self, curve, curves, log):
        self.curve = curve
        self.curves = curves
        self.log = log

    def measure(self, tokens, epochs, wd, values):
        runs = self.curve.runs
        if (tokens, epochs, wd, *values) not in runs.done:
            self.log.say(self.line(tokens, epochs, wd, values))
        return runs.measure(tokens, epochs, wd, values)

    def line(self, tokens, epochs, wd, values):
        """Of a run that is about to be made: its number, counting earlier launches', what it is."""
        distinct = {curve.runs.settings: curve.runs for curve in self.curves}.values()
        number = 1 + sum(len(runs.done) for runs in distinct)
        is_on = [name.replace("_", " ") for name, value in zip(TRIED, values) if value]
        what = ", ".join([f"{tokens:,} tokens x {epochs} epoch{'s' * (epochs > 1)}",
                          f"decay {wd:g}", *is_on])
        to_come = keys_to_come(self.curves)
        left = ""
        seconds = sum(runs.seconds for runs in distinct)
        if seconds:
            scored = max(runs.val_tokens for runs in distinct)
            made = work([key for runs in distinct for key in runs.made], scored)
            left = f", about {minutes(seconds * work(to_come, scored) / made)} in all"
        return (f"run {number}  {self.curve.name}  {what}  {len(to_come) - 1} more if no change"
                f" helps{left}")


def work(keys, scored):
    """What runs take, in tokens of training; each scores `scored` tokens, a third of the work."""
    return sum(tokens * epochs + scored / 3 for tokens, epochs, *_ in keys)


def main():
    config, overrides = config_from_arguments(__doc__)
    measure_baseline(config, overrides)


if __name__ == "__main__":
    run_tool(main)
