"""What the recipe of a finished run is worth on its own text, without more text than that.

    python tools/worth.py runs/ID
    python tools/worth.py runs/ID --single      a third curve: one model like its members, tuned

How many times the data would a plain model need? On all of a text that cannot be measured: there is
no more of it. So the recipe is trained once more, by train_gpt.py with all fields of the run, on
the first quarter of its tokens (runs/ID_quarter), and plain models on an eighth, a quarter, a half
and all of them: for one epoch, and tuned. The curves are those of baseline.py (its --help says how
they are searched, and what the lines before each run say), but that a tuned model keeps the U-Net
skips, QK norm and row length that its search begins with: epochs and weight decay are tuned.

At every budget the same `selection` is cut from the front, the run's or, if it is more than half of
an eighth of the text, an eighth of it. An eighth whose first document alone is more than half of it
is left out. All losses are of val, with one seed: the second digits of multiples are noise.

Results go into runs/ID/worth.json, the plain models' logs into runs/ID/worth/. The same command
goes on where it was stopped, and repeats nothing.
"""
import argparse
import hashlib
import json
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from _runs import compared, python_on, read_own_result, read_result, run_tool
from baseline import measure_curves, points_of
from train_gpt import (BASELINES, SOURCE, Log, UserError, as_text, count_tokens, cut_documents,
                       cut_selection, data_efficiency, dataset_folder, hardware_name, load_dataset,
                       make_config, minutes, start_runtime, write_json)

PARTS = (8, 4, 2, 1)        # of the run's tokens: the curves' budgets
RECIPE_PART = 4             # on which the recipe is trained once more
LEAST_ROWS = 2              # that the smallest part must have, to be trained on
COLUMNS = {"one_epoch": "one epoch", "tuned": "tuned", "single": "single"}


# ==== What is to be measured ====================================================================
def read_text(run, result, config):
    """All documents of a run's train, those of selection first. UserError if its dataset is not
    there, or not what the run was trained on."""
    if config.kd_from == 1:     # a student of tools/distill.py
        raise UserError(f"{run}: taught by another run's members, which have read all of the text;"
                        " give that run")
    folder = dataset_folder(config)
    data = load_dataset(folder, config)
    trained_on = result["data_sha256"]
    changed = [name for name, sha256 in data.hashes.items()
               if trained_on.get(name, sha256) != sha256]
    if changed:
        raise UserError(f"{folder}: not what {run} was trained on, by the SHA-256 of"
                        f" {', '.join(changed)}; get the dataset that it was trained on")
    more = [name for name in trained_on if name not in data.hashes]
    if more:
        raise UserError(f"{run}: was trained on more than its dataset ({', '.join(more)}), which a"
                        " part of the text cannot be; give a run that was not")
    return [*data.scored.get("selection", []), *data.train]


def share_out(run, documents, config):
    """(budgets, selection_tokens at all of them). UserError if the text is too small for that."""
    tokens = config.train_tokens
    selection = config.selection_tokens
    if not selection:
        raise UserError(f"{run}: without a selection, on which plain models are tuned; give a run"
                        " with --selection_tokens")
    budgets = [tokens // part for part in PARTS]
    reason = ""
    while budgets[0] <= tokens // RECIPE_PART:
        for size in (selection, max(1, selection // PARTS[0])):
            try:
                train, _ = cut_selection(cut_documents(documents, budgets[0]),
                                         replace(config, selection_tokens=size))
            except UserError as error:
                reason = str(error)
                continue
            left = count_tokens(train)
            if left < LEAST_ROWS * config.seq_len:
                raise UserError(f"{run}: {tokens:,} tokens are too few: of {budgets[0]:,} there are"
                                f" {left:,} to train on, less than {LEAST_ROWS} rows of"
                                f" {config.seq_len}")
            return budgets, size
        budgets = budgets[1:]
    raise UserError(f"{run}: {tokens:,} tokens are too few: of a quarter no selection can be cut"
                    f" ({reason})")


def notes_on(run, config, budgets, selection):
    """Lines on what is other than one might think."""
    lines = []
    if selection != config.selection_tokens:
        lines.append(f"note      selection is {selection:,} tokens at every budget, not the"
                     f" {config.selection_tokens:,} of {run}, which are too much of"
                     f" {budgets[0]:,} tokens")
    if len(budgets) < len(PARTS):
        lines.append(f"note      {config.train_tokens // PARTS[0]:,} tokens are left out: their"
                     " first document is too long to be selection")
    begun = run / "run.json"
    if begun.exists():
        source = json.loads(begun.read_text(encoding="utf-8")).get(SOURCE.name)
        if source != hashlib.sha256(SOURCE.read_bytes()).hexdigest():
            lines.append(f"note      {run} is of another {SOURCE.name}; all else here is of the"
                         " present one")
    return lines


# ==== The recipe on a quarter ===================================================================
def train_recipe(run, result, config):
    """The val loss that the recipe declares with `config`, in a run that is made, gone on with, or
    read if it is finished."""
    folder = Path(config.runs_dir) / config.run_id
    if not (folder / "result.json").exists():
        seconds = result["train_seconds"] / RECIPE_PART + result["eval_seconds"]
        print(f"the recipe on {config.train_tokens:,} tokens, in {folder}: about"
              f" {minutes(seconds)} if it begins now", flush=True)
        start(config, min(result["processes"], max(1, torch.cuda.device_count())))
    found, held = read_result(folder)
    theirs, ours = compared(asdict(held)), compared(asdict(config))
    for name, text in ours.items():
        if theirs[name] != text:
            raise UserError(f"{folder}: a run with --{name}={theirs[name]} instead of {text}; move"
                            " it away")
    return found["val_loss"]


def start(config, processes):
    """Run train_gpt.py with all fields of `config`. UserError if it fails."""
    usual = make_config(config.track, preset=config.preset)
    command = [*python_on(processes), str(SOURCE), f"--track={config.track}"]
    if config.preset:
        command.append(f"--preset={config.preset}")
    command += [f"--{name}={as_text(value)}" for name, value in asdict(config).items()
                if value != getattr(usual, name)]
    process = subprocess.Popen(command)
    try:
        code = process.wait()
    except BaseException:
        process.send_signal(signal.SIGTERM)     # it saves its state
        process.wait()
        raise
    if code:
        raise UserError(f"{config.run_id}: train_gpt.py ended with exit code {code} (it says why"
                        " above); the same command goes on")


# ==== What comes of it ==========================================================================
def table(curves, recipe):
    """Lines: of each budget the losses of the curves [[tokens, loss], ...] and of the recipe."""
    columns = {COLUMNS[kind]: dict(map(tuple, curve)) for kind, curve in curves.items()}
    columns["the recipe"] = dict(map(tuple, recipe))
    lines = ["".join(f"{name:>12}" for name in ("tokens", *columns))]
    for tokens, _ in curves["one_epoch"]:
        losses = [f"{column[tokens]:.4f}" if tokens in column else ""
                  for column in columns.values()]
        lines.append("".join(f"{text:>12}" for text in (f"{tokens:,}", *losses)).rstrip())
    return lines


def sentence(tokens, multiples):
    """What the recipe is worth on `tokens` tokens, by {kind of BASELINES: of data_efficiency}."""
    worth = [f"{value}x {BASELINES[kind]}" for kind, value in multiples.items()]
    return f"on {tokens:,} tokens the recipe is worth {', '.join(worth)}"


def report(found):
    """Lines: the table, and what it means."""
    curves = {kind: found[kind] for kind in BASELINES if kind in found}
    (quarter, _), (whole, _) = found["recipe"]
    multiples = found["multiples"]
    lines = [*table(curves, found["recipe"]), ""]
    lines.append(sentence(quarter, multiples["quarter"])
                 + " (between points of the curves; > and <: beyond their ends)")
    lines.append(sentence(whole, multiples["whole"]))
    if any(str(value).startswith(">") for value in multiples["whole"].values()):
        lines.append(f">: the curves end there, with all of the text; how much more it is worth on"
                     f" {whole:,} tokens cannot be said without more text")
    return lines


def measure(run, result, config, kinds):
    """What worth.json says of a run: curves of `kinds`, the recipe's losses, multiples."""
    documents = read_text(run, result, config)
    budgets, selection = share_out(run, documents, config)
    for line in notes_on(run, config, budgets, selection):
        print(line, flush=True)
    config = replace(config, selection_tokens=selection)
    quarter = replace(config, train_tokens=config.train_tokens // RECIPE_PART,
                      run_id=f"{run.resolve().name}_quarter", allow_changed=False,
                      runs_dir=str(run.resolve().parent))
    loss = train_recipe(run, result, quarter)
    # afterwards, so that two processes never share a GPU's memory
    runtime = start_runtime(config)
    folder = run / "worth"
    folder.mkdir(exist_ok=True)
    chosen = measure_curves(config, runtime, Log(folder, runtime.is_main),
                            dict.fromkeys(kinds, budgets), flips=False)
    curves = points_of(chosen)
    recipe = [[quarter.train_tokens, loss], [config.train_tokens, result["val_loss"]]]
    multiples = {}
    for name, (tokens, value) in zip(("quarter", "whole"), recipe):
        of_all = data_efficiency(value, curves, tokens)
        multiples[name] = {kind: of_all[kind] for kind in kinds}
    return {"train_tokens": config.train_tokens, "selection_tokens": selection, **curves,
            "recipe": recipe, "multiples": multiples, "quarter": quarter.run_id,
            **{f"{kind}_settings": chosen[kind] for kind in kinds if kind != "one_epoch"},
            "data_sha256": result["data_sha256"], "hardware": hardware_name(runtime.device)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--single", action="store_true",
                        help="tune one model like the run's members, too, without a teacher")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    result, config = read_own_result(args.run)
    kinds = [kind for kind in BASELINES if kind != "single" or args.single]
    found = measure(args.run, result, config, kinds)
    write_json(args.run / "worth.json", found)
    print("\n".join(["", *report(found), "", f"stored in {args.run / 'worth.json'}"]))


if __name__ == "__main__":
    run_tool(main)
