"""`record.py submit`: a record's folder from finished runs."""
import datetime
import os
import re
import shutil

import torch

from _record_checks import check_log
from _record_files import (ALLOWED, FORMAT, MOST_LOGP_BYTES, SPLITS, from_logs, history, judge,
                           load_source, markers, plain, read_log, sha256, standing, verdict,
                           without_source)
from _record_verify import check_record, check_seeds, numbers_of
from _runs import load_logp, read_result, run_git
from train_gpt import UserError, hardware_name, write_json, write_tensors

README = """# {description}

By {author}, {date}. Track `{track}`, number {number}.

{begin}
{numbers}{end}

## What changed, and why

{todo}

## Ablation

{todo}

## What did not work

{todo}
"""
TODO = "_The author's words._"


def committed_source(root):
    """(text, commit) of train_gpt.py at HEAD. UserError if it is not committed as it is."""
    held = run_git(root, "show", "HEAD:./train_gpt.py")
    commit = run_git(root, "rev-parse", "HEAD")
    if held is None or commit is None:
        raise UserError(f"{root}: git knows no committed train_gpt.py; commit it, then run")
    if run_git(root, "status", "--porcelain", "--", "train_gpt.py"):
        raise UserError(f"{root / 'train_gpt.py'}: has changes that are not committed; a record is"
                        " of a committed source: commit them, then run, or undo them")
    return held.decode("utf-8"), commit.decode().strip()


def cpu_name():
    """The processor of this machine, in the system's words; "" if it does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line for line in file if line.startswith("model name")]
    except OSError:
        return ""
    return names[0].partition(":")[2].strip() if names else ""


def refuse(sentences):
    """UserError with the first of the sentences, if there are any."""
    if sentences:
        more = f" (and {len(sentences) - 1} more)" if len(sentences) > 1 else ""
        raise UserError(f"{sentences[0]}{more}")


def read_runs(folders):
    """RunLogs of finished runs by seed. UserError if one is none."""
    logs = []
    for folder in folders:
        result, _ = read_result(folder)
        if not (folder / "log.txt").exists():
            raise UserError(f"{folder}: has no log.txt: a mixture of several runs, or no run; a"
                            " record is of runs with their logs")
        log = read_log(folder / "log.txt")
        if result != log.result:
            raise UserError(f"{folder}: its result.json is not the RESULT of its log.txt")
        logs.append(log)
    return sorted(logs, key=lambda log: log.seed)


def check_source(root, logs):
    """(the source as a module, its commit). UserError if a log's is not the committed one."""
    source, commit = committed_source(root)
    for log in logs:
        if log.source != source:
            raise UserError(f"{log.path}: the source in it is not the committed train_gpt.py (its"
                            f" SHA-256 is {log.source_sha256[:12]}, and that of HEAD"
                            f" {sha256(source)[:12]}); run it again, or go to its commit")
    return load_source(source), commit


def logp_of(log):
    """{"001.val": fp16 [n], ...} of the members of a log's run."""
    tensors = {}
    for number in range(1, len(log.result["members"]) + 1):
        logp, _ = load_logp(log.path.parent, number)
        for split in SPLITS:
            if split in logp:
                tensors[f"{number:03d}.{split}"] = torch.from_numpy(logp[split]).half()
    return tensors


def write_logp(folder, log, place):
    """Write logp.safetensors, beside the run if it is large; returns {sha256, place}. UserError if
    it is large and has no place."""
    tensors = logp_of(log)
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size <= MOST_LOGP_BYTES:
        path, place = folder / "logp.safetensors", ""
    else:
        path = log.path.parent / "logp.safetensors"
    write_tensors(path, tensors, {"seed": log.seed})
    if size > MOST_LOGP_BYTES and not place:
        raise UserError(f"{path}: {size / 1e6:.0f} MB are too many for the repository; put the file"
                        " where others can get it and give --logp_place=URL")
    return {"sha256": sha256(path.read_bytes()), "place": place}


def write_folder(folder, logs, args, date, commit):
    """Fill `folder` with the record's files; returns result.json's dict."""
    facts = from_logs(logs)
    track = facts["track"]
    for log in logs:
        text = log.path.read_text(encoding="utf-8")
        if log is not logs[0]:
            text = without_source(log, f"seed{logs[0].seed}.log")
        (folder / f"seed{log.seed}.log").write_text(text, encoding="utf-8")
    records = history(args.repository, track)
    number = len(records) + 1
    is_here = hardware_name(torch.device("cpu")) == facts["hardware"]
    result = {
        "format": FORMAT, "name": f"{date}_{args.slug}", "track": track, "number": number,
        "date": date, "author": args.author, "description": args.description or args.slug,
        "commit": commit, "cpu": cpu_name() if is_here else "", **facts,
        "logp": write_logp(folder, logs[0], args.logp_place)}
    result["against"] = judge(result, standing(records, number))
    result = plain(result)
    write_json(folder / "result.json", result)
    begin, end = markers("numbers")
    text = README.format(begin=begin, end=end, numbers=numbers_of(result), todo=TODO,
                         **{key: result[key] for key in ("description", "author", "date", "track",
                                                         "number")})
    (folder / "README.md").write_text(text, encoding="utf-8")
    return result


def submit(args):
    """Lines on the record made from the runs `args.runs`. UserError if the rules do not allow it;
    then nothing is written."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", args.slug):
        raise UserError(f"--slug={args.slug}: must be letters, digits, - and _")
    if not args.author.strip():
        raise UserError("--author= is empty; name those who made it")
    logs = read_runs(args.runs)
    tracks = sorted({log.result["track"] for log in logs})
    if len(tracks) > 1:
        raise UserError(f"runs are of the tracks {' and '.join(tracks)}; a record is of one")
    for log in logs:
        given = [name for name in log.result["overrides"] if name not in ALLOWED]
        if given:
            raise UserError(f"{log.path}: was run with --{given[0]}="
                            f"{log.result['overrides'][given[0]]}: a record has no overrides; a"
                            " change of the track is a commit")
    module, commit = check_source(args.repository, logs)
    notes = []
    refuse(check_seeds(logs))
    for log in logs:
        refuse(check_log(args.repository, log, module, notes))
    dataset = args.repository / logs[0].result["config"]["dataset"]
    if not (dataset / "meta.json").exists():
        raise UserError(f"{dataset}: is not here (no meta.json), and the data's hashes and bits per"
                        " byte are checked before a record is made; get it")
    date = datetime.date.today().isoformat()
    folder = args.repository / "records" / tracks[0] / f"{date}_{args.slug}"
    if folder.exists():
        raise UserError(f"{folder}: is there already; choose another --slug")
    beside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        result = write_folder(beside, logs, args, date, commit)
        refuse(check_record(args.repository, beside, notes)[0])
        os.replace(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        if folder.parent.is_dir() and not any(folder.parent.iterdir()):
            folder.parent.rmdir()
        raise
    return [*notes, f"record {result['number']} of {tracks[0]}: {verdict(result['against'])}",
            f"folder    {folder}", "now write what changed into its README.md, then"
            " ./run.sh record leaderboard"]
