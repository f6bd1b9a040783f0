"""Checks of a record's folder, for `verify` and at the end of `submit`: sentences on what is wrong.
Those of its logs are in _record_checks.py."""
import datetime
import math
import re

import numpy as np

from _record_checks import check_log, check_logp
from _record_files import (
    ALLOWED, FORMAT, MIN_SEEDS, MISSING, RULES, SINGLE_GPU_HOURS, TIMES, as_loss, between,
    from_logs, history, judge, load_source, plain, read_log, read_record, standing, verdict)
from train_gpt import BASELINES, UserError, minutes

# result.json: each key and what it may hold
TEXT, NUMBER, MAYBE = str, (int, float), type(None)
SCHEMA = {
    "format": int, "name": TEXT, "track": TEXT, "number": int, "date": TEXT, "author": TEXT,
    "description": TEXT, "commit": TEXT, "source_sha256": TEXT, "config": dict,
    "data_sha256": dict, "train_tokens": int, "hardware": TEXT, "processes": int, "torch": TEXT,
    "python": TEXT, "numpy": TEXT, "cpu": TEXT, "final_mixture": TEXT, "members": int,
    "weights": list, "n": int, "seeds": list, "selection_loss": (dict, MAYBE), "val_loss": dict,
    "holdout_loss": dict, "val_bpb": (dict, MAYBE), "train_seconds": NUMBER,
    "compile_seconds": NUMBER, "eval_seconds": NUMBER, "wall_seconds": NUMBER,
    "data_efficiency": dict, "logp": dict, "against": dict}
SEED_SCHEMA = {
    "seed": int, "log": TEXT, "val_loss": float, "holdout_loss": float,
    "selection_loss": (float, MAYBE), "val_bpb": (float, MAYBE), "hardware": TEXT,
    **dict.fromkeys(TIMES, NUMBER)}
SPREADS = ("selection_loss", "val_loss", "holdout_loss", "val_bpb")
AGAINST = ("record", "difference", "p", "time", "improves", "by")
LEAST_DRIFT = 0.01          # nats, of val - holdout, that is worth a word


# ==== result.json and the folder ================================================================
def check_schema(record):
    """Keys and kinds of result.json, and the folder's name."""
    result, wrong = record.result, []
    for key in sorted(SCHEMA.keys() - result.keys()):
        wrong.append(f"result.json has no {key!r}")
    for key in sorted(result.keys() - SCHEMA.keys()):
        wrong.append(f"result.json has {key!r}, which no record has")
    for key in SCHEMA.keys() & result.keys():
        if not isinstance(result[key], SCHEMA[key]) or isinstance(result[key], bool):
            wrong.append(f"result.json: {key!r} cannot be {str(result[key])[:40]!r}")
    wrong = wrong or check_parts(result)
    if not wrong and result["format"] != FORMAT:
        wrong.append(f"result.json is of format {result['format']}, and this tool's is {FORMAT}")
    return wrong or check_name(record)


def check_parts(result):
    """Keys and kinds within values of result.json."""
    wrong = []
    for row in result["seeds"]:
        for key, kind in SEED_SCHEMA.items():
            if not isinstance(row, dict) or not isinstance(row.get(key, MISSING), kind):
                wrong.append(f"result.json: a row of 'seeds' has no sound {key!r}")
    for key in SPREADS:
        found = result[key]
        if found is not None and (found.keys() != {"mean", "sd", "standard_error"}
                                  or not isinstance(found["mean"], float)):
            wrong.append(f"result.json: {key!r} is not a mean with its sd and standard_error")
    for key, names in (("against", AGAINST), ("data_efficiency", BASELINES)):
        if result[key].keys() != set(names):
            wrong.append(f"result.json: {key!r} must have {', '.join(names)}")
    return wrong


def check_name(record):
    """The folder is records/<track>/<date>_<slug>, as result.json has it."""
    result, folder = record.result, record.folder
    wrong = []
    if folder.name.removesuffix(".tmp") != result["name"]:
        wrong.append(f"the folder is named {folder.name}, and its record {result['name']}: it was"
                     " renamed")
    if folder.parent.name != result["track"]:
        wrong.append(f"the folder is one of the track {folder.parent.name}, and its record of"
                     f" {result['track']}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d_[A-Za-z0-9][\w.-]*", result["name"]):
        wrong.append(f"the name {result['name']!r} is not <YYYY-MM-DD>_<slug>")
    try:
        datetime.date.fromisoformat(result["date"])
    except ValueError:
        wrong.append(f"the date {result['date']!r} is no date")
    if not result["name"].startswith(result["date"]):
        wrong.append(f"the date is {result['date']}, and the name {result['name']}")
    return wrong


def check_readme(record):
    """The numbers in README.md are those of result.json."""
    try:
        _, inside, _ = between(record.folder / "README.md", "numbers")
    except UserError as error:
        return [str(error).replace(str(record.folder), record.folder.name)]
    if inside != numbers_of(record.result):
        return ["README.md: the numbers between the markers are not those of result.json; run"
                " ./run.sh record leaderboard"]
    return []


def numbers_of(result):
    """The generated part of a record's README.md."""
    rows = ["| seed | val | holdout | selection | bits per byte | training | wall |",
            "|-|-|-|-|-|-|-|"]
    for row in result["seeds"]:
        losses = [f"{row[key]:.4f}" if row[key] is not None else "n/a"
                  for key in ("val_loss", "holdout_loss", "selection_loss", "val_bpb")]
        times = [minutes(row[key]) for key in ("train_seconds", "wall_seconds")]
        rows.append(f"| [{row['seed']}]({row['log']}) | {' | '.join([*losses, *times])} |")
    multiples = ", ".join(f"{kind} {value}" for kind, value in result["data_efficiency"].items())
    return "\n".join([
        *rows, "", f"val {as_loss(result['val_loss'])}, holdout {as_loss(result['holdout_loss'])},"
        f" n = {result['n']} (mean ± standard error); {result['final_mixture']} mixture of"
        f" {result['members']}.", f"Multiples of the data: {multiples}.",
        f"Verdict: {verdict(result['against'])}.",
        f"{result['hardware']}, torch {result['torch']}; source {result['source_sha256'][:12]},"
        f" commit {result['commit'][:12]}.", ""])


# ==== Seeds =====================================================================================
def check_seeds(logs):
    """Seeds 1..n, enough of them, of one source, config and data, and no copies."""
    first, wrong = logs[0], []
    seeds = sorted(log.seed for log in logs)
    if len(set(seeds)) < len(seeds) or seeds != list(range(1, len(seeds) + 1)):
        wrong.append(f"seeds are {' '.join(map(str, seeds))}, and must be 1 to {len(seeds)}, each"
                     " once: declared in advance, all reported")
    config = first.result["config"]
    hours = config["time_limit"] / 60 * first.result["processes"]
    if len(logs) < MIN_SEEDS and hours <= SINGLE_GPU_HOURS:
        wrong.append(f"{len(logs)} seed(s), and a record has at least {MIN_SEEDS} (one only where a"
                     f" run may take more than {SINGLE_GPU_HOURS} GPU-hours)")
    seen = {}
    for log in logs:
        different = [name for name in sorted(log.result["config"].keys() | config.keys())
                     if log.result["config"].get(name, MISSING) != config.get(name, MISSING)
                     and name not in ALLOWED]
        if different:
            wrong.append(f"{log.name}: its {', '.join(different)} is not that of {first.name}")
        if log.source_sha256 != first.source_sha256:
            wrong.append(f"{log.name}: is of another source than {first.name}")
        if log.result["data_sha256"] != first.result["data_sha256"]:
            wrong.append(f"{log.name}: was run on other data than {first.name}")
        losses = [member["val_loss"] for member in log.result["members"]]
        readings = [reading.get("train_loss") for reading in log.readings]
        for values in (losses, readings):
            other = seen.setdefault(str(values), log.name) if values else log.name
            if other != log.name:
                wrong.append(f"{log.name}: has the losses of {other}: it is a copy, with another"
                             " seed written in")
                break
    return wrong


# ==== A record ==================================================================================
def read_logs(record):
    """(RunLogs by seed, the first one's source as a module, what is wrong)."""
    wrong, logs = [], []
    names = [f"seed{row['seed']}.log" for row in record.result["seeds"]]
    for name in dict.fromkeys(names):
        try:
            logs.append(read_log(record.folder / name))
        except UserError as error:
            wrong.append(str(error).replace(f"{record.folder}/", ""))
    for path in sorted(record.folder.glob("seed*.log")):
        if path.name not in names:
            wrong.append(f"{path.name} is here, and result.json has no such seed: all that were run"
                         " are reported")
    wrong += [f"{log.name}: is the log of seed {log.seed}" for log in logs
              if log.name != f"seed{log.seed}.log"]
    if not logs or wrong:
        return logs, None, wrong or ["no seeds"]
    if logs[0].source is None:
        return logs, None, [f"{logs[0].name}: has no source; the first seed's log is whole"]
    try:
        return logs, load_source(logs[0].source), []
    except UserError as error:
        return logs, None, [f"{logs[0].name}: {error}"]


def check_facts(record, logs):
    """What result.json repeats from the logs."""
    wrong = []
    for name, found in from_logs(logs).items():
        stated = record.result[name]
        if name == "seeds":
            for row, own in zip(stated, found):
                wrong += [f"result.json: {key} of seed {own['seed']} is {row.get(key)}, and its log"
                          f" says {value}" for key, value in own.items() if row.get(key) != value]
        elif not same(stated, plain(found)):
            wrong.append(f"result.json: {name} is {short(stated)}, and the logs give"
                         f" {short(found)}")
    return wrong


def same(a, b):
    """Whether two values of JSON are equal, numbers up to rounding."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) or isinstance(b, float):
        is_number = all(isinstance(x, (int, float)) for x in (a, b))
        return is_number and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    return a == b


def short(value):
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def check_against(root, record):
    """The rules and data are the track's, the number is next, and the improvement is as claimed."""
    result, wrong = record.result, []
    others = [other for other in history(root, result["track"])
              if other.folder.name.removesuffix(".tmp") != result["name"]]
    earlier = [other for other in others if other.result["number"] < result["number"]]
    if any(other.result["number"] == result["number"] for other in others):
        wrong.append(f"its number {result['number']} is another record's, too: submit one of"
                     " them again")
    if len(earlier) + 1 < result["number"]:
        wrong.append(f"its number is {result['number']}, with {len(earlier)} record(s) before it")
    if earlier and result["date"] < earlier[-1].result["date"]:
        wrong.append(f"its date is before that of record {earlier[-1].result['number']}")
    for other in earlier[-1:]:
        for name in RULES:
            ours, theirs = result["config"].get(name), other.result["config"].get(name)
            if ours != theirs:
                wrong.append(f"{name} is {ours}, and {theirs} in {other.name}: it is the track's"
                             " and no record may change it")
        if result["data_sha256"] != other.result["data_sha256"]:
            wrong.append(f"its data is not that of {other.name}")
    found, stated = judge(result, standing(earlier, result["number"])), result["against"]
    if stated.get("improves") and not found["improves"]:
        wrong.append(f"it claims to be better, and is not: {verdict(found)}")
    elif not same(stated, found):
        wrong.append(f"result.json: 'against' is not what its seeds give: {verdict(found)}")
    return wrong


def check_record(root, folder, notes):
    """(sentences on what is wrong with the record in `folder`, its Record)."""
    record = read_record(folder)
    wrong = check_schema(record)
    if wrong:
        return wrong, record
    logs, module, wrong = read_logs(record)
    if module is None:
        return wrong, record
    for log in logs:
        wrong += check_log(root, log, module, notes)
    try:
        wrong += check_seeds(logs)
        wrong += check_logp(record, logs[0], notes) + check_facts(record, logs)
        wrong += check_against(root, record) + check_readme(record)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        wrong.append(f"result.json cannot be read ({type(error).__name__}: {error})")
    return wrong, record


# ==== The history ===============================================================================
def drift(root, track):
    """Lines on val minus holdout over a track's history; a fall says that val was fitted."""
    gaps = []
    for record in history(root, track):
        rows = record.result["seeds"]
        gap = np.array([row["val_loss"] - row["holdout_loss"] for row in rows])
        error = gap.std(ddof=1) / len(gap) ** 0.5 if len(gap) > 1 else 0.0
        gaps.append((record.result["number"], gap.mean(), error))
    if not gaps:
        return []
    lines = [f"history   {track}: val - holdout by record: "
             + ", ".join(f"{number}: {mean:+.4f}" for number, mean, _ in gaps)]
    _, first, first_error = gaps[0]
    for number, mean, error in gaps[1:]:
        if first - mean > max(LEAST_DRIFT, 3 * math.hypot(error, first_error)):
            lines.append(f"DRIFT     {track}: at record {number} val - holdout has fallen by"
                         f" {first - mean:.4f} since the first: val improves more than holdout")
    return lines
