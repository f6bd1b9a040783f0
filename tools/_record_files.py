"""What the commands of record.py share: the rules' numbers, logs and sources read, a record's facts
made from its logs, and its folder."""
import functools
import hashlib
import importlib.util
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compare import import_stats
from train_gpt import BASELINES, UserError, data_efficiency

FORMAT = 1                  # of result.json
MIN_SEEDS = 3
SINGLE_GPU_HOURS = 100      # a run that may cost more is a record with one seed
SIGNIFICANT = 0.01          # of the one-sided test over seeds
LEAST_GAIN = 0.002          # nats, below which a gain is none
SINGLE_GAIN = 0.01          # the same where a side has one seed: no test is possible
FASTER = 0.9                # of the time before, at a loss that is not worse: a record too
FP16_TOLERANCE = 1e-3       # nats, of a loss from log p in fp16
MOST_LOGP_BYTES = 50e6      # of log p that a folder holds; beyond, its hash and its place
SPLITS = ("selection", "val", "holdout")
TIMES = ("train_seconds", "compile_seconds", "eval_seconds", "wall_seconds")
# fields that may be given: they change where a run lies and computes, and no more than rounding
ALLOWED = ("seed", "run_id", "runs_dir", "save_minutes", "hang_minutes", "device",
           "device_batch_size", "loss_chunk")
# fields that make a track what it is: the same in all of its records
RULES = ("dataset", "vocab_size", "train_tokens", "eval_tokens", "time_limit",
         "flop_limit")
# what a log must hold: its lines "name:value", RESULT, and the config in it
FACTS = ("python", "overrides", "data_sha256", "seed", "config")
RESULT = ("track", "final_mixture", "val_loss", "holdout_loss", "val_bpb", "data_efficiency",
          "members", "ensemble", "train_tokens", "data_sha256", "overrides", "over_limit",
          "train_flops", "seed", "processes", "torch", "hardware", "config", *TIMES)
CONFIG = ("track", "seed", "final_mixture", "num_models", *RULES)
END = "=" * 40 + " end of train_gpt.py"
MISSING = object()


class RunLog(NamedTuple):
    """The log of a finished run."""
    path: Path
    source: str | None          # text of train_gpt.py; None: in another log, by its hash
    source_sha256: str
    body: str                   # what comes after the source
    facts: dict                 # python, numpy, overrides, data_sha256, seed, config, ...
    result: dict                # RESULT
    readings: list              # the lines of metrics, dicts of numbers

    @property
    def name(self):
        """The file, or the run's folder and the file."""
        return self.path.name if self.path.name != "log.txt" else str(self.path)

    @property
    def seed(self):
        return self.result["seed"]


class Record(NamedTuple):
    """A record's folder, and its result.json."""
    folder: Path
    result: dict

    @property
    def name(self):
        """track/date_slug, as the folder says."""
        return f"{self.folder.parent.name}/{self.folder.name}"


# ==== Logs ======================================================================================
def sha256(data):
    """Of bytes, or of a text in UTF-8."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def plain(value):
    """`value` as JSON gives it back: lists for tuples."""
    return json.loads(json.dumps(value))


def split_source(path, text):
    """(source or None, its SHA-256, the rest) of a log's text. UserError if it holds no source."""
    head, marker, rest = text.partition(f"\n{END}\n")
    if not marker:
        raise UserError(f"{path}: no line 'end of train_gpt.py': not the whole log of a run")
    if f"\n{END}\n" in rest:
        raise UserError(f"{path}: holds two sources: it was changed while the run was stopped; a"
                        " record is of one source, so run it again")
    found = re.fullmatch(r"source sha256:([0-9a-f]{64}), in seed\d+\.log", head)
    return (None, found[1], rest) if found else (head, sha256(head), rest)


def without_source(log, first):
    """The text of `log` with a line in place of the source, which is in `first`."""
    return f"source sha256:{log.source_sha256}, in {first}\n{END}\n{log.body}"


def read_log(path):
    """The RunLog in a file. UserError if it is not that of a finished run."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    source, digest, body = split_source(path, text)
    facts, results, readings = {}, [], []
    for line in body.splitlines():
        try:
            if line.startswith("RESULT "):
                results.append(dict(json.loads(line.removeprefix("RESULT "))))
            elif re.match(r"member:\d", line):
                pairs = (pair.split(":") for pair in line.split(" "))
                readings.append({name: float(value) for name, value in pairs})
            elif found := re.match(r"([a-z_0-9]+):(?=[\[{\"\d])", line):
                facts[found[1]] = json.loads(line[found.end():])
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: {line[:60]!r} cannot be read ({error})") from None
    if len(results) != 1:
        raise UserError(f"{path}: {len(results)} lines that begin with RESULT, and a finished run"
                        " has one")
    missing = [name for name in FACTS if name not in facts]
    missing += [f"RESULT.{name}" for name in RESULT if name not in results[0]]
    missing += [f"config.{name}" for name in CONFIG if name not in results[0].get("config", {})]
    if missing:
        raise UserError(f"{path}: has no {', '.join(missing)}; is it of another version?")
    return RunLog(path, source, digest, body, facts, results[0], readings)


def counts_of(log):
    """{split: tokens that are scored}, from the log's line on its data."""
    line = re.search(r"^data .* documents; (.*)$", log.body, re.M)
    found = re.findall(r"(\w+) ([\d,]+)", line[1]) if line else []
    return {split: int(number.replace(",", "")) - 1 for split, number in found}


@functools.lru_cache(maxsize=8)
def load_source(text):
    """A log's source as a module of its own, with its settings. UserError if it cannot be."""
    name = f"train_gpt_{sha256(text)[:16]}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train_gpt.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(f"the source in the log does not load ({type(error).__name__}:"
                            f" {error})") from None
    if not hasattr(module, "make_config"):
        raise UserError("the source in the log has no make_config, which knows its settings")
    return module


# ==== What logs say =============================================================================
def declared(result, split):
    """The key, in result["ensemble"][-1], of the loss that the config declares."""
    mixture = result["config"]["final_mixture"]
    return f"{split}_loss" if mixture == "uniform" else f"{split}_loss_{mixture}"


def weights_of(result):
    """Weights of the declared mixture of a run, as its RESULT has them."""
    count = len(result["members"])
    if result["config"]["final_mixture"] == "uniform":
        return [1 / count] * count
    return result["ensemble"][-1][f"weights_{result['config']['final_mixture']}"]


def spread(values):
    """mean, sd and standard error (None of one value)."""
    values = [float(value) for value in values]
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": sd,
            "standard_error": sd / len(values) ** 0.5 if sd is not None else None}


def seed_row(log):
    """What result.json says of one seed."""
    losses = {f"{split}_loss": log.result.get(f"{split}_loss") for split in SPLITS}
    return {"seed": log.seed, "log": f"seed{log.seed}.log", **losses,
            "val_bpb": log.result["val_bpb"], **{name: log.result[name] for name in TIMES},
            "hardware": log.result["hardware"]}


def from_logs(logs):
    """What result.json says that its logs say, too: a dict. logs: RunLogs by seed."""
    first = logs[0].result
    seeds = [seed_row(log) for log in logs]
    found = {
        "track": first["track"], "source_sha256": logs[0].source_sha256,
        "config": {name: value for name, value in first["config"].items() if name not in ALLOWED},
        "data_sha256": first["data_sha256"], "train_tokens": first["train_tokens"],
        "hardware": ", ".join(sorted({log.result["hardware"] for log in logs})),
        "processes": first["processes"], "torch": first["torch"],
        "python": logs[0].facts["python"], "numpy": logs[0].facts.get("numpy"),
        "final_mixture": first["config"]["final_mixture"], "members": len(first["members"]),
        "weights": weights_of(first), "n": len(logs), "seeds": seeds}
    for name in (*(f"{split}_loss" for split in SPLITS), "val_bpb"):
        values = [row[name] for row in seeds]
        found[name] = None if None in values else spread(values)
    for name in TIMES:
        found[name] = float(np.mean([row[name] for row in seeds]))
    curve = first["data_efficiency"]["curve"]
    multiples = data_efficiency(found["val_loss"]["mean"], curve, first["train_tokens"])
    return {**found, "data_efficiency": {kind: multiples[kind] for kind in BASELINES}}


# ==== The test against the record before ========================================================
def welch(ours, theirs):
    """p of Welch's one-sided test that `ours` are lower; None if a side has one value."""
    if min(len(ours), len(theirs)) < 2:
        return None
    if np.std(ours) == np.std(theirs) == 0:
        return float(np.mean(ours) >= np.mean(theirs))
    stats = import_stats()
    return float(stats.ttest_ind(ours, theirs, equal_var=False, alternative="less").pvalue)


def judge(result, before):
    """{record, difference, p, time, improves, by} of a result.json against that of the record
    before (None: there is none). time: training time as a part of that before, None: on other
    hardware."""
    if before is None:
        return {"record": None, "difference": None, "p": None, "time": None, "improves": True,
                "by": "first"}
    ours, theirs = ([row["val_loss"] for row in side["seeds"]] for side in (result, before))
    difference = float(np.mean(ours) - np.mean(theirs))
    p = welch(ours, theirs)
    same = all(result[name] == before[name] for name in ("hardware", "processes"))
    time = result["train_seconds"] / before["train_seconds"] if same else None
    if p is None:
        is_lower = difference <= -SINGLE_GAIN
    else:
        is_lower = p < SIGNIFICANT and difference <= -LEAST_GAIN
    is_faster = time is not None and time <= FASTER and difference <= 0
    by = "loss" if is_lower else "time" if is_faster else ""
    return {"record": before["name"], "difference": difference, "p": p, "time": time,
            "improves": bool(by), "by": by}


def verdict(found):
    """A sentence on what `judge` found."""
    if found["by"] == "first":
        return "the track's first record"
    test = "one seed, no test" if found["p"] is None else f"p = {found['p']:.2g}"
    change = f"{found['difference']:+.4f} nats against {found['record']}, {test}"
    if found["by"] == "loss":
        return f"better: {change}"
    if found["by"] == "time":
        return f"faster: {found['time']:.2f} of the time at a loss that is not worse ({change})"
    return f"valid, not significantly better: {change}"


# ==== Folders ===================================================================================
def read_record(folder):
    """The Record in a folder. UserError if its result.json cannot be read."""
    path = folder / "result.json"
    try:
        return Record(folder, dict(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def record_folders(root):
    """Folders of all records of the repository `root`, by track and name."""
    folders = sorted(path for path in (root / "records").glob("*/*") if path.is_dir())
    return [folder for folder in folders if not folder.name.endswith(".tmp")]


def history(root, track):
    """Records of a track by number, as far as they have one."""
    folders = [folder for folder in record_folders(root) if folder.parent.name == track]
    records = [read_record(folder) for folder in folders]
    return sorted((record for record in records if isinstance(record.result.get("number"), int)),
                  key=lambda record: (record.result["number"], record.name))


def standing(records, number):
    """result.json of the record that `number` is held against: the last improvement before it."""
    earlier = [record.result for record in records if record.result["number"] < number
               and record.result["against"]["improves"]]
    return earlier[-1] if earlier else None


# ==== Text between markers ======================================================================
def markers(name):
    return f"<!-- {name}: made by tools/record.py -->", f"<!-- end of {name} -->"


def between(path, name):
    """(text before, between, after) the markers of `name` in a file. UserError if it lacks them."""
    begin, end = markers(name)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    head, found, rest = text.partition(begin + "\n")
    inside, ended, tail = rest.partition(end)
    if not found or not ended:
        raise UserError(f"{path}: lacks the lines {begin!r} and {end!r}; put them back")
    return head + begin + "\n", inside, end + tail


def as_loss(found):
    """"4.5701 ± 0.0020" of `spread`."""
    error = found["standard_error"]
    return f"{found['mean']:.4f}" + (f" ± {error:.4f}" if error is not None else "")
