"""What each technique is worth: records/ABLATIONS.md, made from runs of the `cpu` track.

    python records/ablate.py                    run what is missing, then write the table
    python records/ablate.py --ensemble         the same of whole jobs, for the rows of ENSEMBLE
    python records/ablate.py --jobs=2           two runs side by side, one thread each
    python records/ablate.py --only=xsa,iha     runs of some rows only
    python records/ablate.py --seeds=1          the first seed of 3 only
    python records/ablate.py --dtype=bfloat16   where the processor multiplies it fast
    python records/ablate.py --write            no runs, only the table

Each row flips one technique from the settings BASE: off if they have it, else on. A run is one
member (or, with --ensemble, the whole job) for each of 3 seeds; a difference is paired by seed, on
minus off. The losses of finished runs are lines of records/ablations.jsonl and are never measured
again. Choices are made on the column `selection`; val is shown beside it.
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
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "ablations"
RESULTS, TABLE = ROOT / "records" / "ablations.jsonl", ROOT / "records" / "ABLATIONS.md"
SEEDS = (2, 3, 1)
# Bases: flags that lead from the track's settings to those in which a technique is flipped. The
# last ones are settings that the track had before, whose pairs of runs count as well.
BEFORE = ("normuon_beta2=0.95 resid_init=1 x0_init=0.1 softcap=15 proj_init=normal"
          " window_schedule=")
BASES = ("dtype=float32", "dtype=bfloat16", *(f"{flags} {BEFORE}" for flags in (
    "dtype=float32", "dtype=bfloat16", "dropout=0.1", "dropout=0.1 compile_model=whole",
    "unet=true dropout=0.1", "unet=true dropout=0.1 compile_model=whole", "unet=true",
    "unet=true compile_model=whole")))

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
    "XSA, fixed": ("xsa=", "xsa=fixed", "-0.002 (#36)"),
    "XSA, learned": ("xsa=", "xsa=learned", "-0.003 (#91)"),
    "IHA": ("iha=false", "iha=true", "-0.008 (#69)"),
    "layers 1-2 looped twice": (
        "loop_count=1", "loop_start=1 loop_end=2 loop_count=2 loop_from_epoch=4", "-0.010 (#34)"),
    "full recurrence": ("recurrence_from=0", "recurrence_from=0.7", "-0.005 (#92)"),
    "window schedule with YaRN": (
        "window_schedule=", "window_schedule=0:0.25:0.5,0.5:0.5:1", "-0.006 (#86)"),
    "softcap": ("softcap=0", "softcap=15", ""),
    "proj init normal": ("proj_init=zero", "proj_init=normal", "-0.007 (#59)"),
    "proj init depth": ("proj_init=normal", "proj_init=depth", "0.000 (#59)"),
    "proj init uniform": ("proj_init=normal", "proj_init=uniform", "+0.003 (#59)"),
    "proj init xavier": ("proj_init=normal", "proj_init=xavier", "+0.003 (#59)"),
    "proj init small": ("proj_init=normal", "proj_init=small", "+0.003 (#59)"),
    "dropout": ("dropout=0", "dropout=0.1", ""),
    "stochastic depth": ("stochastic_depth=0", "stochastic_depth=0.05", "-0.003 (#62)"),
    "MTP block": ("mtp_weight=0", "mtp_weight=0.3", "-0.005 (#65)"),
    "three targets on one head": (
        "second_weight= third_weight=",
        "second_weight=0:0.5,0.33:0.5,0.66:0 third_weight=0:0.25,0.33:0", "-0.014 (#93)"),
    "meta-gradient": (
        "meta_lr=0", "meta_lr=0.5 meta_rows=4 meta_decay=true device_batch_size=4",
        "-0.012 (#98)"),
    "EMA": ("average=last", "average=ema", "-0.012 (#43)"),
    "weights of 3 epochs": ("average=last", "average=weights average_epochs=3", ""),
    "random token replacement": ("token_noise=0", "token_noise=0.05", "arXiv 2606.16246"),
    "masked-input loss": ("masked_weight=0", "masked_weight=0.5", "arXiv 2606.06888"),
    "document masks": ("document_mask=false", "document_mask=true", "-0.009 (#67)"),
    "data subset of 80 %": ("subset_fraction=1", "subset_fraction=0.8", ""),
    "layers 1-2 run 4 times": (
        "loop_count=1", "loop_start=1 loop_end=2 loop_count=4 loop_from_epoch=4", ""),
    "NorMuon, both lambdas, softcap and normal projections": (
        "normuon_beta2=0 resid_init=0 x0_init=0 softcap=0 proj_init=zero",
        "normuon_beta2=0.95 resid_init=1 x0_init=0.1 softcap=15 proj_init=normal", ""),
    "chain distillation": ("kd_alpha=0", "kd_alpha=0.5", "-0.02 and more"),
    "distillation at T=2": ("kd_temperature=1", "kd_temperature=2", ""),
    "first member left out": ("include_first=true", "include_first=false", "in unlimited"),
    "snapshots: members continue, perturbed": (
        "continue_members=false", "continue_members=true num_epochs=4 first_epochs=8",
        "in unlimited"),
}
# Rows whose whole job is run too, and those that a single member cannot show.
ENSEMBLE_ONLY = ("chain distillation", "distillation at T=2", "first member left out",
                 "snapshots: members continue, perturbed")
ENSEMBLE = (*ENSEMBLE_ONLY, "window schedule with YaRN",
            "NorMuon, both lambdas, softcap and normal projections", "weight decay", "sawtooth lr, probabilities of 3 epochs",
            "value projections", "half RoPE and key offset", "dropout", "MTP block",
            "three targets on one head", "meta-gradient", "EMA", "random token replacement",
            "data subset of 80 %", "SwiGLU")


def key_of(flags, seed, ensemble, base):
    return {"base": base, "flags": flags, "seed": seed, "ensemble": ensemble}


def finished(flags, seed, ensemble, base):
    """(selection loss, val loss) of a finished run, or None."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    wanted = key_of(flags, seed, ensemble, base)
    for line in map(json.loads, lines):
        if wanted.items() <= line.items():
            return line["selection"], line["val"]
    return None


def train(job):
    """Run the job (flags, seed, ensemble, base, threads) unless it is done; note its losses."""
    flags, seed, ensemble, base, threads = job
    if finished(flags, seed, ensemble, base):
        return
    digest = hashlib.sha256(json.dumps(key_of(*job[:4])).encode()).hexdigest()
    name = f"{'ensemble' if ensemble else 'member'}_{digest[:12]}"
    shutil.rmtree(RUNS / name, ignore_errors=True)
    command = [sys.executable, str(ROOT / "train_gpt.py"), "--track=cpu", f"--seed={seed}",
               f"--runs_dir={RUNS.relative_to(ROOT)}", f"--run_id={name}",
               "--eval_tokens=50000", *([] if ensemble else ["--num_models=1"]),
               *(f"--{flag}" for flag in f"{base} {flags}".split())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={
        **os.environ, "OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "0"})
    if done.returncode:
        print(f"{flags}: {(done.stderr.strip() or 'killed').splitlines()[-1]}", file=sys.stderr)
        return
    result = json.loads((RUNS / name / "result.json").read_text())
    point = result["ensemble"][-1] if ensemble else result["members"][0]   # the equal mixture
    line = key_of(*job[:4]) | {
        "selection": round(point["selection_loss"], 5), "val": round(point["val_loss"], 5),
        "train_seconds": result["train_seconds"], "commit": result["commit"]}
    with open(RESULTS, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(line) + "\n")
    shutil.rmtree(RUNS / name)
    print(json.dumps(line), flush=True)


@functools.cache
def config(flags):
    from train_gpt import make_config
    return make_config("cpu", **pairs(flags))


def beyond(base, flags):
    """`flags`, or none if the settings `base` have them."""
    return "" if config(f"{base} {flags}") == config(base) else flags


def pairs(flags):
    return dict(flag.split("=", 1) for flag in flags.split())


def main():
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many, of 3")
    parser.add_argument("--only", default="", help="names of rows, or parts of them")
    parser.add_argument("--ensemble", action="store_true", help="whole jobs instead of one member")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--write", action="store_true", help="only write the table")
    args = parser.parse_args()
    if not args.write:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(train, missing_runs(args)))
    TABLE.write_text(table(), encoding="utf-8")


def missing_runs(args):
    """Jobs for train: the rows that are wanted and have no pair of runs with a seed."""
    wanted = [part.lower() for part in args.only.split(",") if part]
    threads, jobs = max(1, (os.cpu_count() or 1) // args.jobs), []
    base = f"dtype={args.dtype}"
    for seed in SEEDS[:args.seeds]:
        for name, (off, on, _) in TECHNIQUES.items():
            chosen = (any(part in name.lower() for part in wanted) if wanted else
                      name in ENSEMBLE if args.ensemble else name not in ENSEMBLE_ONLY)
            if chosen and pair(off, on, seed, args.ensemble) is None:
                jobs += [(beyond(base, flags), seed, args.ensemble, base, threads)
                         for flags in (off, on)]
    return list(dict.fromkeys(jobs))


INTRODUCTION = """# Ablations on the `cpu` track

Made by `python records/ablate.py` and `python records/ablate.py --ensemble` from the runs in
`records/ablations.jsonl`. Each row flips one technique; a difference is the loss with it minus the
loss without it (negative: it helps), paired by seed, the mean and its standard error over the
runs counted beside it: one run says little. Member: one of 8 epochs, selection and 50,000 tokens of
val. Ensemble: the equal mixture of the whole job. Settings are chosen on `selection`. The last
column is what the public project measured at 100M tokens. What was not run yet says so; the
command goes on where it stopped.
"""


def pair(off, on, seed, ensemble):
    """[selection, val] loss on minus off, of two runs that differ in nothing else, or None."""
    for base in BASES:
        losses = [finished(beyond(base, flags), seed, ensemble, base) for flags in (off, on)]
        if all(losses):
            return np.subtract(losses[1], losses[0])
    return None


def difference(off, on, ensemble):
    """("-0.0123 ± 0.0010" for selection and for val, on minus off; pairs of runs), or None."""
    changes = [change for seed in SEEDS
               if (change := pair(off, on, seed, ensemble)) is not None]
    if not changes:
        return None
    mean = np.mean(changes, axis=0)
    if len(changes) == 1:
        return [f"{m:+.4f}" for m in mean], 1
    error = np.std(changes, axis=0, ddof=1) / len(changes) ** 0.5
    return [f"{m:+.4f} ± {e:.4f}" for m, e in zip(mean, error)], len(changes)


def table():
    lines = [INTRODUCTION, "| technique | flipped by | in the track | member, selection |"
             " member, val | runs | ensemble, selection | ensemble, val | runs | public |",
             "|-|-|-|-|-|-|-|-|-|-|"]
    for name, (off, on, public) in TECHNIQUES.items():
        is_on, cells = not beyond("", on), []
        for ensemble in (False, True):
            found = difference(off, on, ensemble)
            cells += [*found[0], str(found[1])] if found else ["not run"] * 2 + ["0"]
        shown = " ".join(f"`--{flag}`" for flag in (off if is_on else on).split())
        lines.append(f"| {name} | {shown} | {'yes' if is_on else 'no'} | "
                     + " | ".join(cells) + f" | {public} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
