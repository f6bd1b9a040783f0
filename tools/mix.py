"""One ensemble of the members of several finished runs, from their saved log p.

    python tools/mix.py runs/a runs/b runs/c
    python tools/mix.py runs/chain* --keep=256 --out=runs/mix
    python tools/mix.py runs/a runs/b --ngram_order=4 --final_mixture=ngram

The runs must have been trained on the same tokens of the same data and scored on the same text;
they may differ in all else: seed, model, track. --keep takes the members that are heaviest in the
mixture fitted on `selection`. Prints the table of a run, with the curve over the members in the
order of the runs, and writes a result.json of its own. Which mixture is the result should be
declared before the losses are seen: say it with --final_mixture.
"""
import argparse
import hashlib
import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from _runs import ROOT, load_logp, read_own_result, run_tool
from data.ngram import score_ngram
from train_gpt import (UserError, dataset_folder, ensemble_curve, fit_mixture, load_dataset,
                       mean_loss, mixture_logp, result_lines, summarize, write_json)

# fields of which the tokens that are trained on and scored depend
DATA_FIELDS = ("dataset", "vocab_size", "train_tokens", "selection_tokens", "eval_tokens")
TIMES = ("train_seconds", "compile_seconds", "eval_seconds", "wall_seconds")


def check_same_data(folders, results, configs):
    """UserError if two runs are one, or differ in the tokens that they have seen or scored."""
    for i, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:i]]:
            raise UserError(f"{folder}: given twice; name each run once")
        for name in DATA_FIELDS[1:]:
            ours, first = getattr(configs[i], name), getattr(configs[0], name)
            if ours != first:
                raise UserError(f"{folder}: its --{name}={ours}, but {first} in {folders[0]}; runs"
                                " of one mixture need the same tokens")
        if results[i]["data_sha256"] != results[0]["data_sha256"]:
            raise UserError(f"{folder}: trained on other data than {folders[0]} (data_sha256 in"
                            " their result.json)")


def read_members(folders, results):
    """([{split: log p}], [facts]) of all members; UserError if two of them are the same."""
    members, facts, seen = [], [], {}
    for folder, result in zip(folders, results):
        for number, of_result in enumerate(result["members"], 1):
            logp, _ = load_logp(folder, number)
            key = hashlib.sha256(logp["val"].tobytes()).digest()
            if key in seen:
                raise UserError(f"{folder}, member {number} and {seen[key]} are the same: a copy,"
                                " or the same settings and seed; give one of them")
            seen[key] = f"{folder}, member {number}"
            members.append(logp)
            facts.append({"run": folder.name, "number": number, **of_result})
    return members, facts


def heaviest(members, keep):
    """Indices, in order, of the `keep` members with the largest fitted weights (slowrun #90)."""
    if not 0 < keep < len(members):
        return list(range(len(members)))
    weights = fit_mixture([member["selection"] for member in members])
    return sorted(np.argsort(-weights, kind="stable")[:keep].tolist())


def costs(results):
    """What result.json says of time, speed and memory: of all runs together."""
    total = {name: round(sum(result[name] for result in results), 3) for name in TIMES}
    tokens = sum(result["tokens_per_second"] * result["train_seconds"] for result in results)
    return {**total, "tokens_per_second": round(tokens / max(1e-9, total["train_seconds"]), 1),
            "mfu": None, "peak_memory_bytes": max(r["peak_memory_bytes"] for r in results),
            "train_flops": sum(result.get("train_flops", math.nan) for result in results),
            "over_limit": any(result.get("over_limit", False) for result in results)}


def with_ngram(members, logp, weigh):
    """The losses, as an ensemble's curve has them, of the members and an n-gram, by score_ngram."""
    logps = {split: [*(member[split] for member in members), logp[split]] for split in logp}
    weights = fit_mixture(logps["selection"])
    by_token = weigh(logps, weights)
    losses = {f"{split}_loss_ngram": mean_loss(mixture_logp(parts, by_token[split]))
              for split, parts in logps.items()}
    return losses | {"weights_ngram": [round(float(weight), 6) for weight in weights]}


def mix(folders, keep=0, final_mixture="learned", ngram_order=0):
    """The result, like a run's, of the mixture of the members of the runs in `folders`."""
    results, configs = zip(*(read_own_result(folder) for folder in folders))
    check_same_data(folders, results, configs)
    config = replace(configs[0], final_mixture=final_mixture)
    data = load_dataset(dataset_folder(config), config)
    if data.hashes != results[0]["data_sha256"]:
        raise UserError(f"{data.folder}: other data than these runs were trained on")
    members, facts = read_members(folders, results)
    if "selection" not in members[0] and (keep or final_mixture != "uniform"):
        raise UserError("these runs have no selection, on which --keep and learned mixtures are"
                        " fitted; use --final_mixture=uniform without --keep")
    kept = heaviest(members, keep)
    members = [members[i] for i in kept]
    facts = [facts[i] for i in kept]
    curve = ensemble_curve(members)
    if ngram_order:
        curve[-1] |= with_ngram(members, *score_ngram(ngram_order, config.vocab_size, data))
    return {**summarize(config, data, facts, curve), **costs(results),
            "runs": [str(folder) for folder in folders], "keep": keep,
            "hardware": ", ".join(sorted({result["hardware"] for result in results})),
            "config": asdict(config)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--keep", type=int, default=0, help="members, the heaviest [0: all]")
    parser.add_argument("--final_mixture", choices=("uniform", "learned", "ngram"),
                        default="learned", help="the declared result [%(default)s]")
    parser.add_argument("--ngram_order", type=int, default=0, choices=range(5),
                        help="of a Kneser-Ney n-gram that joins [0: none]")
    parser.add_argument("--out", type=Path, help="folder of result.json [runs/mix_TIME]")
    args = parser.parse_args()
    if args.keep < 0:
        raise UserError(f"--keep={args.keep}: must be a number of members, or 0 for all")
    if args.final_mixture == "ngram" and not args.ngram_order:
        raise UserError("--final_mixture=ngram needs --ngram_order")
    out = args.out or ROOT / "runs" / time.strftime("mix_%Y-%m-%d_%H-%M-%S")
    if (out / "result.json").exists():
        raise UserError(f"{out}: has a result.json already; choose another --out")
    result = mix(args.runs, args.keep, args.final_mixture, args.ngram_order)
    write_json(out / "result.json", result)
    last = result["ensemble"][-1]
    ngram = [f"with n-gram      val loss {last['val_loss_ngram']:.4f}, selection"
             f" {last['selection_loss_ngram']:.4f}"] if args.ngram_order else []
    print("\n".join(["", *result_lines(result), *ngram, f"folder           {out}"]))


if __name__ == "__main__":
    run_tool(main)
