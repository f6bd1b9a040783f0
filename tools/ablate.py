"""What each technique is worth: records/ABLATIONS.md, made from runs of the `cpu` track.

    python tools/ablate.py                      run what is missing, then write the table
    python tools/ablate.py --ensemble           the same of whole jobs, for the rows of ENSEMBLE
    python tools/ablate.py --jobs=2             two runs side by side, one thread each
    python tools/ablate.py --only=xsa,iha       runs of some rows only
    python tools/ablate.py --seeds=1            the first seed of 3 only
    python tools/ablate.py --dtype=bfloat16     where the processor multiplies it fast
    python tools/ablate.py --write              no runs, only the table

Each row flips one technique from the track's settings: off if they have it, else on. A run is one
member (or, with --ensemble, the whole job) for each of 3 seeds; a difference is paired by seed, on
minus off. The losses of finished runs are lines of tools/ablations.jsonl and are never measured
again, not even when the track's settings have changed since (see BASES). Choices are made on the
column `selection`; val is shown beside it.
"""
import argparse
import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np

from _runs import ROOT, run_tool
from train_gpt import FREE, as_text, make_config

RUNS = ROOT / "runs" / "ablations"
RESULTS = ROOT / "tools" / "ablations.jsonl"
TABLE = ROOT / "records" / "ABLATIONS.md"
SEEDS = (2, 3, 1)
# Bases: flags that lead from the track's settings to those in which a technique is flipped. The
# last ones are settings that the track had before, whose pairs of runs count as well.
BEFORE = "qk_norm=true second_weight= third_weight="
EARLIER = (f"{BEFORE} normuon_beta2=0.95 resid_init=1 x0_init=0.1 softcap=15 proj_init=normal"
           " window_schedule=")
BASES = ("dtype=float32", "dtype=bfloat16", f"dtype=float32 {BEFORE}", f"dtype=bfloat16 {BEFORE}",
         *(f"{flags} {EARLIER}" for flags in (
             "dtype=float32", "dtype=bfloat16", "dropout=0.1", "dropout=0.1 compile_model=true",
             "unet=true dropout=0.1", "unet=true dropout=0.1 compile_model=true", "unet=true",
             "unet=true compile_model=true")))

# name: (fields when off, fields when on, the change of val loss that its authors measured)
TECHNIQUES = {
    "nesterov momentum warmup": ("momentum_steps=0", "momentum_steps=100", "in all tracks"),
    "MuonEq-R": ("muon_eq=false", "muon_eq=true", "-0.003 (#71)"),
    "NorMuon": ("normuon_beta2=0", "normuon_beta2=0.95", ""),
    "cautious weight decay": ("cautious=false", "cautious=true", ""),
    "weight decay": ("weight_decay=0.1", "weight_decay=1.0", ""),
    "gradient clipping": ("grad_clip=0", "grad_clip=1", ""),
    "sawtooth lr, probabilities of 3 epochs": (
        "sawtooth_epochs=0 average=last", "sawtooth_epochs=3 average=probs average_epochs=3",
        "-0.012 (#56), -0.004 (#50)"),
    "weight decay falls to 0.65": ("wd_schedule=0:1", "wd_schedule=0:1,0.4:1,1:0.65", ""),
    "sawtooth as above and anti-phase weight decay": (
        "sawtooth_epochs=0 average=last wd_schedule=0:1",
        "sawtooth_epochs=3 average=probs average_epochs=3 wd_schedule=0:1,0.4:1,0.625:0.65,"
        "0.75:1.5,0.75:0.65,0.875:1.5,0.875:0.65,1:1.5", "-0.009 more (#82)"),
    "SwiGLU": ("swiglu=false", "swiglu=true", "-0.014"),
    "residual lambdas": ("resid_init=0", "resid_init=1", ""),
    "x0 lambdas": ("x0_init=0", "x0_init=0.1", ""),
    "U-Net skips": ("unet=false", "unet=true", "-0.021 (#17)"),
    "value projections": ("value_projections=false", "value_projections=true", "-0.027 (#11)"),
    "attention gate": ("attn_gate=false", "attn_gate=true", "-0.019 (#21)"),
    "QK norm": ("qk_norm=false", "qk_norm=true", ""),
    "sliding windows SSSL": ("window_pattern=L", "window_pattern=SSSL", ""),
    "half RoPE and key offset": (
        "rope_fraction=1 key_offset=false", "rope_fraction=0.5 key_offset=true", "-0.009 (#29)"),
    "XSA": ("xsa=false", "xsa=true", "-0.003 (#91)"),
    "IHA": ("iha=false", "iha=true", "-0.008 (#69)"),
    "layers 1-2 looped twice": (
        "loop_count=1", "loop_start=1 loop_end=2 loop_count=2 loop_from_epoch=4", "-0.010 (#34)"),
    "full recurrence": ("recurrence_from=0", "recurrence_from=0.7", "-0.005 (#92)"),
    "window schedule with YaRN": (
        "window_schedule=", "window_schedule=0:0.25:0.5,0.5:0.5:1", "-0.006 (#86)"),
    "softcap": ("softcap=0", "softcap=15", ""),
    "proj init normal": ("proj_init=zero", "proj_init=normal", "-0.007 (#59)"),
    "dropout": ("dropout=0", "dropout=0.1", ""),
    "stochastic depth": ("stochastic_depth=0", "stochastic_depth=0.05", "-0.003 (#62)"),
    "MTP block": ("mtp_weight=0", "mtp_weight=0.3", "-0.005 (#65)"),
    "three targets on one head": (
        "second_weight= third_weight=",
        "second_weight=0:0.5,0.33:0.5,0.66:0 third_weight=0:0.25,0.33:0", "-0.014 (#93)"),
    "meta-gradient": (
        "meta_lr=0", "meta_lr=0.5 meta_rows=4 meta_decay=true device_batch_size=4",
        "-0.012 (#98)"),
    "weights of 3 epochs": ("average=last", "average=weights average_epochs=3", ""),
    "layers 1-2 run 4 times": (
        "loop_count=1", "loop_start=1 loop_end=2 loop_count=4 loop_from_epoch=4", ""),
    "NorMuon, both lambdas, softcap and normal projections": (
        "normuon_beta2=0 resid_init=0 x0_init=0 softcap=0 proj_init=zero",
        "normuon_beta2=0.95 resid_init=1 x0_init=0.1 softcap=15 proj_init=normal", ""),
    "chain distillation": ("kd_alpha=0", "kd_alpha=0.5", "-0.02 and more"),
    "distillation at T=2": ("kd_temperature=1", "kd_temperature=2", ""),
    "snapshots: members continue, perturbed": (
        "continue_members=false", "continue_members=true num_epochs=4",
        "in unlimited"),
}
# Rows whose whole job is run too, and those that a single member cannot show.
ENSEMBLE_ONLY = ("chain distillation", "distillation at T=2",
                 "snapshots: members continue, perturbed")
ENSEMBLE = (*ENSEMBLE_ONLY, "NorMuon, both lambdas, softcap and normal projections",
            "weight decay", "sawtooth lr, probabilities of 3 epochs", "SwiGLU", "U-Net skips",
            "value projections", "attention gate", "QK norm", "window schedule with YaRN",
            "dropout", "three targets on one head")


@functools.cache
def config(flags):
    return make_config("cpu", **dict(flag.split("=", 1) for flag in flags.split()))


@functools.cache
def settings_of(flags):
    """What the track with `flags` is, in 12 digits: a hash of the fields that are not off.

    Flags that change nothing, and the same settings written in another way, have the same hash; a
    new field of Config, off, does not change it.
    """
    kept = {name: as_text(value) for name, value in asdict(config(flags)).items()
            if value and name not in FREE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def finished():
    """{(settings, seed, ensemble): (selection loss, val loss)} of the runs so far."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return {(run["settings"], run["seed"], run["ensemble"]): (run["selection"], run["val"])
            for run in map(json.loads, lines)}


def train(job, threads):
    """Run the job (flags, seed, ensemble) and note its losses."""
    flags, seed, ensemble = job
    name = f"{'ensemble' if ensemble else 'member'}_{settings_of(flags)}_{seed}"
    shutil.rmtree(RUNS / name, ignore_errors=True)
    command = [sys.executable, str(ROOT / "train_gpt.py"), "--track=cpu", f"--seed={seed}",
               f"--runs_dir={RUNS.relative_to(ROOT)}", f"--run_id={name}",
               "--eval_tokens=50000", *([] if ensemble else ["--num_models=1"]),
               *(f"--{flag}" for flag in flags.split())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={
        **os.environ, "OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "0"})
    if done.returncode:
        print(f"{flags}: {(done.stderr.strip() or 'killed').splitlines()[-1]}", file=sys.stderr)
        return
    result = json.loads((RUNS / name / "result.json").read_text())
    point = result["ensemble"][-1] if ensemble else result["members"][0]   # the equal mixture
    line = {"settings": settings_of(flags), "flags": flags, "seed": seed, "ensemble": ensemble,
            "selection": round(point["selection_loss"], 5), "val": round(point["val_loss"], 5),
            "train_seconds": result["train_seconds"]}
    with open(RESULTS, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(line) + "\n")
    shutil.rmtree(RUNS / name)
    print(json.dumps(line), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many, of 3")
    parser.add_argument("--only", default="", help="names of rows, or parts of them")
    parser.add_argument("--ensemble", action="store_true", help="whole jobs instead of one member")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--write", action="store_true", help="only write the table")
    args = parser.parse_args()
    if not args.write:
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(functools.partial(train, threads=threads), missing_runs(args)))
    write_table()


def join(base, flags):
    """Both, without those of `flags` that `base` or the track has anyway."""
    return base if config(f"{base} {flags}") == config(base) else f"{base} {flags}"


def missing_runs(args):
    """Jobs for train: the rows that are wanted and have no pair of runs with a seed."""
    wanted = [part.lower() for part in args.only.split(",") if part]
    jobs, runs = {}, finished()
    for seed in SEEDS[:args.seeds]:
        for name, (off, on, _) in TECHNIQUES.items():
            chosen = (any(part in name.lower() for part in wanted) if wanted else
                      name in ENSEMBLE if args.ensemble else name not in ENSEMBLE_ONLY)
            if chosen and pair(runs, off, on, seed, args.ensemble) is None:
                for flags in (off, on):
                    flags = join(f"dtype={args.dtype}", flags)
                    jobs[settings_of(flags), seed, args.ensemble] = flags, seed, args.ensemble
    return [job for key, job in jobs.items() if key not in runs]


INTRODUCTION = """# Ablations on the `cpu` track

Made by `python tools/ablate.py` and `python tools/ablate.py --ensemble` from the runs in
`tools/ablations.jsonl`. Each row flips one technique; a difference is the loss with it minus the
loss without it (negative: it helps), paired by seed, the mean and its standard error over the
runs counted beside it: one run says little. Member: one of 8 epochs, selection and 50,000 tokens of
val. Ensemble: the equal mixture of the whole job. Some pairs ran before the track had its present
settings; their two runs differ in the technique alone all the same. Settings are chosen on
`selection`. The last column is what the public project measured at 100M tokens. What was not run
yet says so; the command goes on where it stopped.
"""


def pair(runs, off, on, seed, ensemble):
    """[selection, val] loss on minus off, of two runs that differ in nothing else, or None."""
    for base in BASES:
        losses = [runs.get((settings_of(f"{base} {flags}"), seed, ensemble))
                  for flags in (off, on)]
        if all(losses):
            return np.subtract(losses[1], losses[0])
    return None


def difference(runs, off, on, ensemble):
    """("-0.0123 ± 0.0010" for selection and for val, on minus off; pairs of runs), or None."""
    changes = [change for seed in SEEDS
               if (change := pair(runs, off, on, seed, ensemble)) is not None]
    if not changes:
        return None
    mean = np.mean(changes, axis=0)
    if len(changes) == 1:
        return [f"{m:+.4f}" for m in mean], 1
    error = np.std(changes, axis=0, ddof=1) / len(changes) ** 0.5
    return [f"{m:+.4f} ± {e:.4f}" for m, e in zip(mean, error)], len(changes)


SOURCES = "## Techniques and their sources\n"       # what begins with it is written by hand


def write_table():
    """The measured table, in front of what is written by hand."""
    before = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
    _, heading, sources = before.partition(SOURCES)
    TABLE.write_text(f"{table()}\n{heading}{sources}".rstrip("\n") + "\n", encoding="utf-8")


def table():
    lines = [INTRODUCTION, "| technique | flipped by | in the track | member, selection |"
             " member, val | runs | ensemble, selection | ensemble, val | runs | public |",
             "|-|-|-|-|-|-|-|-|-|-|"]
    runs = finished()
    for name, (off, on, public) in TECHNIQUES.items():
        is_on, cells = config(on) == config(""), []
        for ensemble in (False, True):
            found = difference(runs, off, on, ensemble)
            cells += [*found[0], str(found[1])] if found else ["not run"] * 2 + ["0"]
        shown = " ".join(f"`--{flag}`" for flag in (off if is_on else on).split())
        lines.append(f"| {name} | {shown} | {'yes' if is_on else 'no'} | "
                     + " | ".join(cells) + f" | {public} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_tool(main)
