"""Did a change help? Finished runs with it beside runs without it, paired by seed.

    python tools/compare.py 'runs/cpu_dropout0.2_seed*' --against 'runs/cpu_seed*'
    python tools/compare.py 'runs/cpu_*'        grouped by settings, against the plainest group

One number decides: the loss on `selection` of the mixture that each run declares; val and holdout
are shown beside it. Runs of the same seed are pairs (t-test of their differences); groups without
two seeds in common are compared as they are (Welch's t-test). Intervals are of 95 %; with several
groups the p are Holm's. A mixture's weights are fitted on selection: compare ensembles of equal
size.

Needs scipy: pip install -r tools/requirements.txt (./run.sh compare does it).
"""
import argparse
import functools
import glob
import hashlib
import json
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np

from _runs import ROOT, compared, read_result, run_git, run_tool
from train_gpt import UserError, minutes

SPLITS = ("selection", "val", "holdout")
SIGNIFICANT = 0.05
SCORING = ("selection_tokens", "eval_tokens", "vocab_size")     # fields that change what is scored


class Run(NamedTuple):
    """A finished run, as far as comparisons go."""
    folder: Path
    seed: int
    settings: dict              # {field: text}, without the seed and what changes no number
    sources: dict               # {file: SHA-256}; empty if run.json is not there
    data: dict                  # {shard: SHA-256}
    losses: dict                # {split: loss of the declared mixture}
    seconds: float              # of training


class Difference(NamedTuple):
    """With minus against, of one split."""
    mean: float
    error: float                # standard error, NaN if there is too little to tell
    interval: tuple             # 95 %
    p: float                    # two-sided


# ==== Reading ===================================================================================
def read_run(folder):
    """The Run in `folder`; UserError if it is not finished or has no selection loss."""
    result, _ = read_result(folder)
    losses = {split: result.get(f"{split}_loss") for split in SPLITS}
    if losses["selection"] is None and result["final_mixture"] == "uniform":    # earlier versions
        losses["selection"] = result["ensemble"][-1].get("selection_loss")
    if losses["selection"] is None:
        raise UserError(f"{folder}: no selection loss of its declared mixture (run without"
                        " --selection_tokens, or by an earlier version); run it again")
    path = folder / "run.json"
    try:
        facts = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    settings = compared(result["config"])
    return Run(folder, int(settings.pop("seed")), settings,
               {name: facts[name] for name in facts if name.endswith(".py")},
               result["data_sha256"], losses, result["train_seconds"])


def read_runs(patterns):
    """(Runs, lines on what is left out) of folders or globs; the newest run of each kind and seed.
    UserError if nothing is finished."""
    folders, notes = {}, []
    for pattern in patterns:
        found = [Path(name) for name in sorted(glob.glob(str(pattern))) if Path(name).is_dir()]
        if not found:
            raise UserError(f"{pattern}: no such run")
        folders |= {folder.resolve(): folder for folder in found}
    newest = {}
    for folder in folders.values():
        if not (folder / "result.json").exists():
            if (folder / "run.json").exists():
                notes.append(f"left out  {folder}: not finished")
            continue
        run = read_run(folder)
        newest.setdefault((kind_of(run), run.seed), []).append(run)
    for runs in newest.values():
        runs.sort(key=lambda run: (run.folder / "result.json").stat().st_mtime)
        notes += [f"left out  {run.folder}: {runs[-1].folder} is a newer run of the same"
                  for run in runs[:-1]]
    if not newest:
        raise UserError(f"{' '.join(map(str, patterns))}: no finished run (none has a result.json)")
    return [runs[-1] for runs in newest.values()], notes


def kind_of(run):
    """What runs that differ in the seed alone have in common."""
    return json.dumps([run.settings, run.sources, run.data], sort_keys=True)


def check_comparable(runs):
    """UserError if the runs are not scored on the same text."""
    first = runs[0]
    for run in runs[1:]:
        where = f"{run.folder} and {first.folder} cannot be compared"
        for name in SCORING:
            ours, theirs = run.settings.get(name), first.settings.get(name)
            if ours != theirs:
                raise UserError(f"{where}: --{name} is {ours} and {theirs}, so they are scored on"
                                " other text")
        for name in sorted(run.data.keys() | first.data.keys()):
            in_both = name in run.data and name in first.data
            is_scored = name.endswith(".bin") and "_train_" not in name
            if run.data.get(name) != first.data.get(name) and (in_both or is_scored):
                raise UserError(f"{where}: {name} of their data differs (data_sha256 in"
                                " result.json)")


# ==== Statistics ================================================================================
def mean_and_error(values):
    """(mean, standard error of the mean: NaN of one value)."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return float(np.mean(values)), float(error)


def pairs_of(ours, theirs):
    """[(run, run)] of the seeds that both groups have; [] if these are fewer than two, unless
    there is no other way."""
    by_seed = {run.seed: run for run in theirs}
    pairs = [(run, by_seed[run.seed]) for run in sorted(ours, key=lambda run: run.seed)
             if run.seed in by_seed]
    return pairs if len(pairs) > 1 or min(len(ours), len(theirs)) < 2 else []


def sides_of(ours, theirs):
    """The two groups as they are compared: the pairs' runs, if there are pairs."""
    pairs = pairs_of(ours, theirs)
    return tuple(zip(*pairs)) if pairs else (ours, theirs)


def difference(ours, theirs, split):
    """The Difference of two groups of Runs in a loss: by pairs if there are two, else Welch's."""
    stats = import_stats()
    a, b = ([run.losses[split] for run in side] for side in sides_of(ours, theirs))
    mean = float(np.mean(a) - np.mean(b))
    if min(len(a), len(b)) < 2:
        return Difference(mean, np.nan, (np.nan, np.nan), np.nan)
    paired = bool(pairs_of(ours, theirs))
    if paired:
        error = mean_and_error(np.subtract(a, b))[1]
    else:
        error = float(np.hypot(mean_and_error(a)[1], mean_and_error(b)[1]))
    if error == 0:              # no spread to judge by
        return Difference(mean, 0.0, (mean, mean), np.nan)
    test = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval(0.95)
    return Difference(mean, error, (float(interval.low), float(interval.high)), float(test.pvalue))


def import_stats():
    try:
        from scipy import stats
        return stats
    except ImportError:
        raise UserError("no scipy: pip install -r tools/requirements.txt") from None


def holm(values):
    """Holm's p of several tests; NaN stays NaN."""
    known = sorted((p, i) for i, p in enumerate(values) if not np.isnan(p))
    adjusted, least = list(values), 0.0
    for rank, (p, i) in enumerate(known):
        least = max(least, min(1.0, p * (len(known) - rank)))
        adjusted[i] = least
    return adjusted


# ==== Differences of settings and sources =======================================================
def differing(settings, base):
    """Fields in which two dicts of texts differ."""
    return [name for name in sorted(settings.keys() | base.keys())
            if settings.get(name) != base.get(name)]


def short(settings, base):
    """"field=value ..." of these: a label."""
    return " ".join(f"{name}={settings.get(name, 'gone')}" for name in differing(settings, base))


@functools.cache
def describe(name, digest):
    """"3f2a91c, commit ab12cd3" of a source, or "3f2a91c, not committed", as far as git knows."""
    commits = (run_git(ROOT, "log", "-n", "100", "--format=%h", "--", name) or b"").decode().split()
    for commit in commits:
        source = run_git(ROOT, "show", f"{commit}:./{name}") or b""
        if hashlib.sha256(source).hexdigest() == digest:
            return f"{digest[:7]}, commit {commit}"
    return f"{digest[:7]}, not committed" if commits else digest[:7]


def source_lines(ours, theirs):
    """Lines on the sources of two groups' first runs."""
    if not ours.sources or not theirs.sources:
        return ["source    unknown (no run.json)"]
    lines = []
    for name in sorted(ours.sources.keys() | theirs.sources.keys()):
        a, b = (run.sources.get(name) for run in (ours, theirs))
        if a == b:
            lines.append(f"source    {name} the same ({describe(name, a)})")
        else:
            with_, without = (describe(name, digest) if digest else "not used" for digest in (a, b))
            lines.append(f"source    {name} DIFFERS: {with_}; against {without}")
    return lines


# ==== Two groups ================================================================================
def compare_two(ours, theirs):
    """Lines on two groups of Runs: who they are, a table by split, the verdict."""
    both = {run.folder.resolve() for run in ours} & {run.folder.resolve() for run in theirs}
    if both:
        raise UserError(f"{sorted(both)[0]}: on both sides; a run is with or against")
    check_comparable([*theirs, *ours])
    for group, side in ((ours, "the runs"), (theirs, "--against")):
        other = next((run for run in group if kind_of(run) != kind_of(group[0])), None)
        if other:
            what = short(other.settings, group[0].settings) or "source or data"
            raise UserError(f"{other.folder}, in {side}, is of another kind than {group[0].folder}:"
                            f" {what}; give one kind a side, or all without --against")
    now, before = ours[0].settings, theirs[0].settings
    changes = [f"{name}={now.get(name, 'gone')} (was {before.get(name, 'not there')})"
               for name in differing(now, before)]
    pairs = pairs_of(ours, theirs)
    lines = [name_group("with", ours), name_group("against", theirs)]
    if changes:
        lines += textwrap.wrap(", ".join(changes), 90, initial_indent="differ    ",
                               subsequent_indent=" " * 10)
    lines += source_lines(ours[0], theirs[0])
    shards = sorted(ours[0].data.items() ^ theirs[0].data.items())
    if shards:
        lines.append(f"data      {', '.join(dict(shards))} of one side only")
    known = ours[0].sources and ours[0].sources == theirs[0].sources
    if known and not changes and not shards:
        lines.append("differ    in nothing: settings, source and data are the same")
    missing = {run.seed for run in ours} ^ {run.seed for run in theirs}
    if missing:
        use = "left out" if pairs else "not paired"
        lines.append(f"seeds     {' '.join(map(str, sorted(missing)))} on one side only: {use}")
    lines += ["", f"{'':11}{'with':>18}{'against':>18}{'difference':>20}{'95 % interval':>22}"
              f"{'p':>8}"]
    differences = {split: difference(ours, theirs, split) for split in SPLITS}
    for split, found in differences.items():
        sides = [group_losses(side, split) for side in sides_of(ours, theirs)]
        interval = "" if np.isnan(found.error) else (
            f"{found.interval[0]:+.4f} to {found.interval[1]:+.4f}")
        lines.append(f"{split:11}{sides[0]:>18}{sides[1]:>18}"
                     f"{plus_minus(found.mean, found.error, sign='+'):>20}{interval:>22}"
                     f"{as_p(found.p):>8}")
    times = [np.mean([run.seconds for run in group]) for group in (ours, theirs)]
    lines.append(f"{'train time':11}{minutes(times[0]):>18}{minutes(times[1]):>18}"
                 f"{times[0] / max(1e-9, times[1]):>19.2f}x")
    return [*lines, "", verdict(differences["selection"], len(pairs), (len(ours), len(theirs)))]


def name_group(word, group):
    seeds = " ".join(str(run.seed) for run in sorted(group, key=lambda run: run.seed))
    name = group[0].folder.parent / common_name(group)
    return f"{word:10}{name}: {len(group)} run(s), seed(s) {seeds}"


def common_name(group):
    """The name of the runs, without the seed."""
    return group[0].folder.name.partition("_seed")[0]


def group_losses(group, split):
    return plus_minus(*mean_and_error([run.losses[split] for run in group]))


def plus_minus(mean, error, sign=""):
    return f"{mean:{sign}.4f}" + ("" if np.isnan(error) else f" ± {error:.4f}")


def as_p(p):
    return "" if np.isnan(p) else f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def verdict(found, pairs, sizes):
    """A sentence on a Difference of selection losses."""
    of = f"{pairs} pairs" if pairs else f"{sizes[0]} and {sizes[1]} runs, not paired"
    if found.mean == 0 and not found.error > 0:
        return "the same to the digit on selection"
    word = "better" if found.mean < 0 else "worse"
    if np.isnan(found.error):
        return (f"{word} by {abs(found.mean):.4f} on selection, but one run a side says nothing of"
                " noise: add seeds")
    size = plus_minus(abs(found.mean), found.error)
    if np.isnan(found.p):
        return f"{word} by exactly {abs(found.mean):.4f} on selection, {of}: there is no spread"
    if found.p < SIGNIFICANT:
        return f"{word} by {size} on selection, {of}, p = {as_p(found.p)}"
    return (f"no difference shown: {word} by {size} on selection, {of}, p = {as_p(found.p)}; within"
            f" noise, or more seeds are needed")


# ==== Many groups ===============================================================================
def group_runs(runs):
    """[[Run]] by kind, each sorted by seed, in the order in which kinds appear."""
    groups = {}
    for run in sorted(runs, key=lambda run: run.seed):
        groups.setdefault(kind_of(run), []).append(run)
    return list(groups.values())


def plainest(groups):
    """The group with the shortest name: the track's own settings, if they are there."""
    return min(groups, key=lambda group: (len(common_name(group)), common_name(group)))


def compare_groups(groups, base=None, labels=None):
    """Lines on several groups, best first on selection, each against `base` (the plainest).
    labels: {kind: name} of groups that have one."""
    base = base or plainest(groups)
    check_comparable([*base, *(run for group in groups for run in group)])
    groups = sorted(groups, key=lambda group: np.mean([run.losses["selection"] for run in group]))
    others = [group for group in groups if group is not base]
    found = {id(group): {split: difference(group, base, split) for split in SPLITS}
             for group in others}
    corrected = dict(zip(found, holm([by_split["selection"].p for by_split in found.values()])))
    rows = [("", "runs", "selection", "difference", "p", "val", "holdout")]
    for group in groups:
        name = (labels or {}).get(kind_of(group[0])) or short(group[0].settings, base[0].settings)
        name = name or common_name(group)
        if group is not base and group[0].sources != base[0].sources:
            digest = group[0].sources.get("train_gpt.py", "unknown")[:7]
            name = f"{name} source {digest}".strip()
        row = [name, str(len(group)), group_losses(group, "selection")]
        if group is base:
            row += ["the base", "", *(group_losses(base, split) for split in SPLITS[1:])]
        else:
            by_split = found[id(group)]
            row.append(plus_minus(*by_split["selection"][:2], sign="+"))
            row.append(as_p(corrected[id(group)]))
            row += [plus_minus(*by_split[split][:2], sign="+") for split in SPLITS[1:]]
        rows.append(row)
    lines = align(rows)
    lines += ["", "val and holdout: losses of the base, differences of the others from it"]
    if len(others) > 1:
        lines.append(f"p is Holm's, for {len(others)} comparisons")
    best = next(group for group in groups if group is not base)
    sentence = verdict(found[id(best)]["selection"]._replace(p=corrected[id(best)]),
                       len(pairs_of(best, base)), (len(best), len(base)))
    name = rows[1 + groups.index(best)][0]
    word = "nothing is better than the base; " if groups[0] is base else "best: "
    return [*lines, "", f"{word}{name}: {sentence}"]


def align(rows):
    """Columns of texts, the first to the left and cut at 48 characters."""
    rows = [[row[0] if len(row[0]) <= 48 else row[0][:45] + "...", *row[1:]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]),
                       *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
            for row in rows]


def compare_one(group):
    """Lines on runs of one kind."""
    lines = [name_group("runs", group), "differ    in nothing but the seed" if len(group) > 1 else
             "differ    one run: nothing to compare it with"]
    for split in SPLITS:
        losses = [run.losses[split] for run in group]
        spread = f" (standard deviation {np.std(losses, ddof=1):.4f})" if len(losses) > 1 else ""
        lines.append(f"{split:10}{group_losses(group, split)}{spread}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, or globs")
    parser.add_argument("--against", nargs="+", default=[], metavar="RUN", help="the runs without")
    args = parser.parse_args()
    runs, notes = read_runs(args.runs)
    if args.against:
        against, more = read_runs(args.against)
        lines = compare_two(runs, against)
        notes += more
    else:
        groups = group_runs(runs)
        lines = compare_groups(groups) if len(groups) > 1 else compare_one(groups[0])
    print("\n".join([*notes, *lines]))


if __name__ == "__main__":
    run_tool(main)
