"""`record.py replay`: a log's source run again, in a fresh folder, with the logged settings."""
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from _record_checks import check_data
from _record_files import RunLog, load_source, read_log, read_record, sha256, weights_of
from _record_submit import cpu_name
from _runs import over_vocabulary, python_on
from train_gpt import UserError, as_text, member_path, read_tensors

CONTEXTS = 384              # of val, for which the mixture is summed over the vocabulary
ROW = 256                   # tokens of a row that are read for that
NEAR = 0.01                 # nats, if there are no seeds that say how much runs differ
SUM_TOLERANCE = 1e-6
LOGP_TOLERANCE = {"float32": 2e-3, "bfloat16": 2e-2}    # nats, of the mean over the contexts
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


# ==== What is replayed ==========================================================================
def find_log(path):
    """(RunLog with its source, the record's result.json or None) of a folder or a log. UserError
    if the source is not there, or its hash is not the record's."""
    if path.is_dir():
        path = path / ("seed1.log" if (path / "seed1.log").exists() else "log.txt")
    log = read_log(path)
    in_record = (path.parent / "seed1.log").exists() and (path.parent / "result.json").exists()
    result = read_record(path.parent).result if in_record else None
    if log.source is None:
        name = re.search(r"(seed\d+\.log)$", path.read_text(encoding="utf-8").splitlines()[0])[1]
        other = read_log(path.parent / name)
        if other.source is None or other.source_sha256 != log.source_sha256:
            raise UserError(f"{path}: says that its source is in {name}, by its SHA-256, and it is"
                            " not")
        log = RunLog(path, other.source, *log[2:])
    if sha256(log.source) != log.source_sha256 or (
            result and log.source_sha256 != result.get("source_sha256")):
        raise UserError(f"{path}: the SHA-256 of the source in it is {log.source_sha256[:12]}, and"
                        f" not that in result.json, {str(result.get('source_sha256'))[:12]}")
    return log, result


def prepare(folder, log, repository):
    """Write the source into `folder`, with a link to the dataset; returns the dataset's folder."""
    (folder / "train_gpt.py").write_text(log.source, encoding="utf-8")
    name = Path(log.result["config"]["dataset"])
    dataset = repository / name
    if not name.is_absolute():
        (folder / name.parent).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(dataset.resolve())
    return dataset


def run_again(folder, log):
    """Run the source in `folder` as the log says; returns the new RunLog. UserError if it fails."""
    given = {**log.result["overrides"], "seed": log.seed, "run_id": "replay", "runs_dir": "runs"}
    settings = [f"--{name}={as_text(value)}" for name, value in given.items()]
    processes = min(log.result["processes"], max(1, torch.cuda.device_count()))
    command = [*python_on(processes), "train_gpt.py",
               f"--track={log.result['config']['track']}", *settings]
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    code = subprocess.run(command, cwd=folder, env=environment, stdout=2).returncode
    if code:
        raise UserError(f"{log.name}: its source, run again, ended with exit code {code} (see"
                        " above)")
    return read_log(folder / "runs/replay/log.txt")


# ==== Comparison ================================================================================
def losses_of(result):
    """All losses of members and mixtures."""
    return [{name: value for name, value in facts.items() if "loss" in name}
            for facts in (*result["members"], *result["ensemble"])]


def is_same_kind(old, new, record):
    """("" or what differs between the machines of two runs, whether the CPU's name is known)."""
    differ = [name for name in ("hardware", "processes", "torch")
              if old.result[name] != new.result[name]]
    differ += [name for name in ("numpy", "threads")
               if old.facts.get(name) != new.facts.get(name)]
    if old.result["config"].get("dtype") != new.result["config"].get("dtype"):
        differ.append("dtype")
    cpu = (record or {}).get("cpu")
    if cpu and cpu != cpu_name():
        differ.append("processor")
    return ", ".join(differ), bool(cpu)


def compare(old, new, record):
    """(lines, whether the new run gives the old one's number)."""
    if new.result["data_sha256"] != old.result["data_sha256"]:
        return ["WRONG     the dataset here is not that of the log (data_sha256)"], False
    if new.result["train_flops"] != old.result["train_flops"]:
        return [f"WRONG     the log says {old.result['train_flops']:.6g} FLOPs of training, and they"
                f" are {new.result['train_flops']:.6g}"], False
    was, is_now = old.result["val_loss"], new.result["val_loss"]
    sd = ((record or {}).get("val_loss") or {}).get("sd")
    near = 3 * sd if sd else NEAR
    differ, is_known = is_same_kind(old, new, record)
    lines = [f"log       val loss {was:.6f}, holdout {old.result['holdout_loss']:.6f}",
             f"replay    val loss {is_now:.6f}, holdout {new.result['holdout_loss']:.6f}"]
    if losses_of(old.result) == losses_of(new.result):
        return [*lines, "same      all losses of members and mixtures, to the last digit"], True
    size = f"val loss differs by {is_now - was:+.6f}"
    reason = "3 standard deviations of its seeds" if sd else "no seeds to judge by"
    if not differ and is_known and new.result["hardware"].endswith("CPU"):
        return [*lines, f"WRONG     {size}, on the same processor, torch, dtype and number of"
                " threads: the digits must be the same"], False
    where = f"on another {differ}" if differ else (
        "on what may be another processor (the log does not name it)")
    if abs(is_now - was) <= near:
        return [*lines, f"near      {size} {where}: within {near:.4f} ({reason})"], True
    return [*lines, f"WRONG     {size} {where}: more than {near:.4f} ({reason})"], False


# ==== Is it a distribution? =====================================================================
@torch.no_grad()
def probabilities(module, config, weights, tokens):
    """p of what follows each of int64 `tokens` [B, T]: fp64 [B * T, vocab_size], with the source's
    own model and logits."""
    model = module.GPT(config, torch.float64).double().eval()
    model.load_state_dict(weights)
    hidden = model(tokens).flatten(0, 1)
    logits = module.token_logits(
        hidden, model.head.weight, module.shift(tokens, 1).flatten(), config,
        config.row_memory * tokens.shape[1])
    return over_vocabulary(*logits, config.vocab_size)


def check_mixture(module, folder, result, dataset):
    """(lines, whether the declared mixture of a run in `folder` sums to one over the vocabulary,
    and its members' scores are log of these probabilities)."""
    try:
        return sum_mixture(module, folder, result, dataset)
    except (AttributeError, TypeError, KeyError) as error:
        return [f"note      the sum over the vocabulary was not checked: the source lacks what that"
                f" needs ({type(error).__name__}: {error})"], True


def sum_mixture(module, folder, result, dataset):
    config = module.make_config(result["config"]["track"], **result["overrides"])
    data = module.load_dataset(dataset, config)
    text = torch.from_numpy(np.concatenate(data.scored["val"]).astype(np.int64))
    length = min(ROW, config.seq_len, len(text) - 1)
    count = max(1, min(-(-CONTEXTS // length), (len(text) - 1) // config.seq_len))
    places = torch.arange(count)[:, None] * config.seq_len + torch.arange(length)    # [B, T]
    targets = text[places + 1].flatten()
    total, lines, is_right = 0, [], True
    averaged = config.average == "probs" and config.average_epochs > 1
    for number, weight in enumerate(weights_of(result), 1):
        tensors, _ = read_tensors(member_path(folder, number))
        p = probabilities(module, config, tensors, text[places])
        total = total + weight * p.sum(dim=1)
        if averaged:
            continue
        logp, _ = read_tensors(member_path(folder, number, ".logp"))
        gain = logp["val"][places.flatten()].double() - p[range(len(p)), targets].log()
        if abs(gain.mean()) > LOGP_TOLERANCE[result["config"]["dtype"]]:
            is_right = False
            lines.append(f"WRONG     member {number}: its log p is {gain.mean():+.4f} nats off that"
                         " of its own distribution over the vocabulary: what it scored does not"
                         " sum to one")
    if averaged:
        lines.append("note      scores are means over epochs, whose weights are not kept: they were"
                     " not compared with the last epoch's distribution")
    off = float((total - 1).abs().max())
    rounding = 1e-6 * len(result["members"])        # weights in RESULT have six digits
    if off > SUM_TOLERANCE + rounding * (result["final_mixture"] != "uniform"):
        return [*lines, "WRONG     the declared mixture does not sum to one over the vocabulary:"
                f" off by {off:.2g} on {len(total)} contexts"], False
    return [*lines, f"sums      to one over the vocabulary, on {len(total)} contexts: off by"
            f" {off:.1g} at most"], is_right


# ==== The command ===============================================================================
def replay(args):
    """(lines, exit code: 1 if the log does not give its number, or the mixture is none)."""
    log, record = find_log(args.log)
    module = load_source(log.source)
    if not (args.repository / log.result["config"]["dataset"]).is_dir():
        raise UserError(f"{log.result['config']['dataset']}: the dataset of the log is not here; get"
                        " it first")
    wrong = check_data(args.repository, log, [])
    if wrong:
        raise UserError(wrong[0])
    with tempfile.TemporaryDirectory(prefix="replay_") as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder}: is not empty; --keep needs a new folder")
        dataset = prepare(folder, log, args.repository)
        new = run_again(folder, log)
        lines, is_same = compare(log, new, record)
        more, is_right = check_mixture(module, new.path.parent, new.result, dataset)
    origin = "as in result.json" if record else "no result.json beside it"
    head = [f"source    {log.source_sha256[:12]}, {origin}; seed {log.seed}",
            f"settings  {json.dumps(log.result['overrides'])}"]
    return [*head, *lines, *more], 0 if is_same and is_right else 1
