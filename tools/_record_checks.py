"""Checks of a finished run's log, of its data, and of log p, for `submit` and `verify`.
Each returns sentences on what is wrong; what could not be checked here goes to `notes`."""
import math
import re
from dataclasses import asdict

import numpy as np

from _record_files import (
    ALLOWED, FP16_TOLERANCE, MISSING, SPLITS, counts_of, declared, plain, sha256,
    weights_of)
from train_gpt import (UserError, cut_documents, fit_mixture, mean_loss, minutes, mixture_logp,
                       read_meta, read_shard, read_tensors, split_documents)

WEIGHT_TOLERANCE = 0.02     # of weights fitted on log p in fp16
TIME_TOLERANCE = 0.05       # seconds: clocks are rounded


# ==== One log ===================================================================================
def check_settings(log, module):
    """No overrides, and the config that the source has for the track and seed."""
    wrong, result = [], log.result
    given = result["overrides"]
    not_allowed = [f"--{name}={value}" for name, value in given.items()
                   if name not in (*ALLOWED, "track")]
    if not_allowed:
        wrong.append(f"{log.name}: was run with {', '.join(not_allowed)}: a record has no"
                     " overrides; a change of the track is a commit")
        return wrong
    if result.get("changes"):
        wrong.append(f"{log.name}: settings, source or data changed while it was under way:"
                     f" {result['changes'][0]}")
    facts = {name: value for name, value in log.facts.items() if name in result}
    for name, value in facts.items():
        if value != result[name]:
            wrong.append(f"{log.name}: its line {name!r} and RESULT differ")
    if result["seed"] != result["config"]["seed"]:
        wrong.append(f"{log.name}: is of seed {result['seed']}, and its config has"
                     f" {result['config']['seed']}")
    allowed = {name: value for name, value in given.items() if name in ALLOWED}
    try:
        config = module.make_config(result["config"]["track"], **allowed)
    except (UserError, ValueError) as error:
        return [*wrong, f"{log.name}: the source has no such settings: {error}"]
    expected = plain(asdict(config))
    if expected.get("dtype") == "auto":
        expected["dtype"] = result["config"].get("dtype")
    for name in sorted(expected.keys() | result["config"].keys()):
        logged = result["config"].get(name, MISSING)
        if logged != expected.get(name, MISSING):
            wrong.append(f"{log.name}: its config has {name}={said(logged)}, and the source in it"
                         f" {said(expected.get(name, MISSING))} for the track"
                         f" {result['config']['track']}")
    return wrong


def said(value):
    return "no such field" if value is MISSING else value


def check_declared(log):
    """The result is the one that the config declares, of all its members, within the limit."""
    result, wrong = log.result, []
    config = result["config"]
    if result["final_mixture"] != config["final_mixture"]:
        wrong.append(f"{log.name}: its result is the {result['final_mixture']} mixture, and its"
                     f" config declares {config['final_mixture']}")
    if not len(result["members"]) == len(result["ensemble"]) == config["num_models"]:
        wrong.append(f"{log.name}: {len(result['members'])} members and {len(result['ensemble'])}"
                     f" mixtures, and its config declares {config['num_models']}")
        return wrong
    last = result["ensemble"][-1]
    for split in SPLITS:
        key = declared(result, split)
        if result.get(f"{split}_loss") != last.get(key):
            wrong.append(f"{log.name}: its {split} loss is {result.get(f'{split}_loss')}, and the"
                         f" declared one, {key} of all members, {last.get(key)}")
    limits = {"minutes": (config["time_limit"], result["train_seconds"] / 60),
              "FLOPs": (config["flop_limit"], result["train_flops"])}
    for unit, (limit, spent) in limits.items():
        if 0 < limit < spent:
            wrong.append(f"{log.name}: trained for {spent:.3g} {unit}, over the track's limit of"
                         f" {limit:.3g} {unit}")
    of_members = sum(member["train_flops"] for member in result["members"])
    if not math.isclose(of_members, result["train_flops"], rel_tol=1e-9):
        wrong.append(f"{log.name}: trained for {result['train_flops']:.4g} FLOPs, and its members"
                     f" for {of_members:.4g}")
    if result["holdout_loss"] == result["val_loss"]:
        wrong.append(f"{log.name}: its holdout loss is its val loss: copied, or the same text")
    weights = np.array(weights_of(result))
    off = abs(weights.sum() - 1)
    if (weights < 0).any() or len(weights) != len(result["members"]) or off > 1e-6 * len(weights):
        wrong.append(f"{log.name}: the weights of the {result['final_mixture']} mixture,"
                     f" {said_weights(weights)}, do not sum to one")
    return wrong


def said_weights(weights):
    return " ".join(f"{weight:.4g}" for weight in weights[:8]) + " ..." * (len(weights) > 8)


def check_printed(log, module):
    """RESULT against what the log printed while the run went on, and after it."""
    result, wrong = log.result, []
    if hasattr(module, "result_lines"):
        printed = log.body.rpartition("\nRESULT ")[2].splitlines()[1:]
        for line in module.result_lines(result):
            if line and line not in printed:
                wrong.append(f"{log.name}: RESULT gives {line.strip()!r}, which is not what the log"
                             " printed")
    for number, (member, point) in enumerate(zip(result["members"], result["ensemble"]), 1):
        line = (f"done in {minutes(member['train_seconds'])}: val loss {member['val_loss']:.4f},"
                f" ensemble of {number}: {point['val_loss']:.4f}")
        if not re.search(rf"^member {number}/\d+ (was )?{re.escape(line)}$", log.body, re.M):
            wrong.append(f"{log.name}: no line says of member {number} {line!r}, as RESULT does")
        readings = [reading for reading in log.readings if reading["member"] == number]
        for key, logged in (("train_loss", member["train_loss"]), ("val_loss", member["val_loss"]),
                            ("ensemble_val_loss", point["val_loss"])):
            found = [reading[key] for reading in readings if key in reading]
            if not found or not math.isclose(found[-1], logged, rel_tol=1e-5):
                wrong.append(f"{log.name}: the last {key} of member {number} is"
                             f" {found[-1] if found else 'missing'}, and {logged:.6g} in RESULT")
    return wrong


def check_times(log):
    """Wall time is at least the sum of its parts, and that of the readings."""
    result, wrong = log.result, []
    parts = sum(result[f"{part}_seconds"] for part in ("train", "compile", "eval"))
    members = sum(member["train_seconds"] for member in result["members"])
    if result["wall_seconds"] < parts - TIME_TOLERANCE:
        wrong.append(f"{log.name}: wall time {result['wall_seconds']} s is less than training,"
                     f" compilation and evaluation, {parts:.3f} s")
    if abs(members - result["train_seconds"]) > TIME_TOLERANCE:
        wrong.append(f"{log.name}: training took {result['train_seconds']} s, and its members"
                     f" {members:.3f} s")
    last = max((reading.get("seconds", 0) for reading in log.readings), default=0)
    if last > result["wall_seconds"] + TIME_TOLERANCE:
        wrong.append(f"{log.name}: its last reading was after {last} s, and wall time is"
                     f" {result['wall_seconds']} s")
    return wrong


# ==== Data and bytes ============================================================================
def check_data(root, log, notes):
    """The data is the track's, and bits per byte are of exactly the tokens that are scored."""
    config, hashes = log.result["config"], log.result["data_sha256"]
    folder = root / config["dataset"]
    if hashes != log.facts["data_sha256"]:
        return [f"{log.name}: the data's hashes in RESULT are not those of its line 'data_sha256'"]
    if not (folder / "meta.json").exists():
        notes.append(f"{config['dataset']} is not here: hashes of the data and bits per byte not"
                     " checked")
        return []
    _, listed = read_meta(folder)
    wrong, known = [], {}
    for path in folder.glob("*.bin"):
        key = "_".join(path.stem.split("_")[-2:])
        known[path.name] = listed.get(key) or sha256(path.read_bytes())
    if (folder / "tokens.npz").exists():
        known["tokens.npz"] = sha256((folder / "tokens.npz").read_bytes())
    for name, digest in hashes.items():
        if known.get(name) != digest:
            wrong.append(f"{log.name}: was run on other data than the track's: {name} of"
                         f" {config['dataset']} is another")
    unused = [name for name in known if "_train_" not in name and name not in hashes]
    if unused:
        wrong.append(f"{log.name}: was run without {', '.join(unused)} of {config['dataset']}")
    return wrong or check_bytes(folder, log)


def check_bytes(folder, log):
    """val_bpb, and the number of tokens scored, from the shards."""
    config, result, wrong, tokens = log.result["config"], log.result, [], {}
    for split in ("val", "holdout"):
        documents = []
        for path in sorted(folder.glob(f"*_{split}_*.bin")):
            shard, bos, _ = read_shard(path, config["vocab_size"])
            documents += split_documents(shard, bos)
        tokens[split] = np.concatenate(
            cut_documents(documents, max(2, config["eval_tokens"] or math.inf)))
        count = counts_of(log).get(split)
        if count != len(tokens[split]) - 1:
            wrong.append(f"{log.name}: scored {count} tokens of {split}, and the dataset has"
                         f" {len(tokens[split]) - 1}")
    if not (folder / "tokens.npz").exists():
        return wrong
    with np.load(folder / "tokens.npz") as tables:
        text_bytes = int(tables["bytes"][tokens["val"]].sum())
    bpb = result["val_loss"] / math.log(2) * (len(tokens["val"]) - 1) / text_bytes
    if not math.isclose(result["val_bpb"] or 0, bpb, rel_tol=1e-9):
        wrong.append(f"{log.name}: {result['val_bpb']} bits per byte, and val loss over the"
                     f" {text_bytes:,} bytes of the scored tokens makes {bpb:.6f}")
    return wrong


# ==== Log p =====================================================================================
def check_logp(record, log, notes):
    """Losses and weights of the first seed, from log p of its members."""
    path = record.folder / "logp.safetensors"
    stated = record.result["logp"]
    if not path.exists():
        if not stated.get("place"):
            return ["logp.safetensors is missing, and result.json names no place where it is"]
        notes.append(f"logp.safetensors is at {stated['place']}: losses not recomputed (put it into"
                     " the folder to do it)")
        return []
    wrong = []
    if sha256(path.read_bytes()) != stated.get("sha256"):
        wrong.append("logp.safetensors is not the file whose SHA-256 is in result.json")
    try:
        tensors, _ = read_tensors(path)
    except UserError as error:
        return [*wrong, f"logp.safetensors cannot be read: {error}"]
    members = []
    for number in range(1, len(log.result["members"]) + 1):
        parts = {split: tensors.get(f"{number:03d}.{split}") for split in SPLITS}
        members.append({split: part.numpy().astype(np.float64) for split, part in parts.items()
                        if part is not None})
    names = {f"{n:03d}.{split}" for n, member in enumerate(members, 1) for split in member}
    counts = counts_of(log)
    if names != tensors.keys() or any(
            {split: len(part) for split, part in member.items()} != counts for member in members):
        return [*wrong, "logp.safetensors is not of the members and tokens that the log has"]
    return wrong + check_losses(members, log) + check_weights(members, log)


def check_losses(members, log):
    """Single members, and mixtures of the first n with equal and with learned weights."""
    wrong = []

    def check(name, loss, parts, weights=None):
        """Add a sentence if `loss` is not that of the mixture of `parts`."""
        if weights is not None and len(weights) != len(parts):
            wrong.append(f"{log.name}: the {name} has {len(weights)} weights")
            return
        found = mean_loss(mixture_logp(parts, weights))
        if loss is None or not abs(loss - found) <= FP16_TOLERANCE:
            wrong.append(f"{log.name}: the {name} is {loss}, and {found:.4f} from"
                         " logp.safetensors")

    for n, (facts, point) in enumerate(zip(log.result["members"], log.result["ensemble"]), 1):
        for split in members[0]:
            parts = [member[split] for member in members[:n]]
            check(f"{split} loss of member {n}", facts.get(f"{split}_loss"), parts[-1:])
            check(f"{split} loss of the mixture of {n}", point.get(f"{split}_loss"), parts)
            if "weights_learned" in point:
                check(f"{split} loss of the learned mixture of {n}",
                      point.get(f"{split}_loss_learned"), parts, point["weights_learned"])
    if np.array_equal(members[-1]["val"], members[-1]["holdout"]):
        wrong.append("logp.safetensors: holdout is a copy of val")
    return wrong


def check_weights(members, log):
    """The learned weights are those that are fitted on selection."""
    wrong = []
    for point in log.result["ensemble"]:
        if "weights_learned" not in point or "selection" not in members[0]:
            continue
        weights = np.array(point["weights_learned"])
        fitted = fit_mixture([member["selection"] for member in members[:point["n"]]])
        off = np.abs(fitted - weights).max() if len(weights) == len(fitted) else 1
        if off > WEIGHT_TOLERANCE or (weights < 0).any():
            wrong.append(f"{log.name}: weights of the learned mixture of {point['n']} are"
                         f" {said_weights(weights)}, and fitted on selection"
                         f" {said_weights(fitted)}")
    return wrong


# ==== All of a log =============================================================================
def check_log(root, log, module, notes):
    """All that can be said of a log by itself."""
    try:
        return (check_settings(log, module) + check_declared(log) + check_printed(log, module)
                + check_times(log) + check_data(root, log, notes))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        return [f"{log.name}: RESULT cannot be read ({type(error).__name__}: {error})"]
