"""One model, of any size, that the members of a finished run teach: a student.

    python tools/distill.py runs/ID                                 of the members' size
    python tools/distill.py runs/ID --model_dim=64 --num_heads=2    smaller
    torchrun --nproc_per_node=8 tools/distill.py runs/ID --num_epochs=96

The student has the fields of the run, but for those that are given, and --kd_alpha=0.7. It reads
the text that the run read, and in each step another member, drawn at random, is its teacher
(--kd_teachers=K: one of the last K). It trains --num_epochs x --kd_epoch_factor epochs, from a seed
1,000 above the run's: member 1 began as the same numbers otherwise.

It becomes a run of its own, runs/ID_student..., which the same command goes on with if it was
stopped, and which sample, eval and export take like any other. At the end a line says how much it
keeps of what the mixture of its teachers gains over member 1.

A run can do this by itself for students of the members' size: fields kd_from, kd_teachers and
kd_epoch_factor of train_gpt.py.
"""
import hashlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

from _runs import ROOT, read_own_result, run_tool
from train_gpt import (FIELDS, FREE, GPT, UserError, as_text, check_combinations, check_name,
                       check_ranges, mean_loss, member_path, mixture_logp, parse, parse_arguments,
                       read_tensors, run, start_runtime)

ALPHA = 0.7                 # records/EXPERIMENTS.md: the best for one model that is taught
# What teachers and student have in common: the text and its rows, the form of their logits.
SHARED = """track preset dataset train_tokens selection_tokens eval_tokens vocab_size seq_len
row_memory softcap num_models kd_from""".split()


def student_config(folder, result, config, values):
    """(Config, overrides) of the student of a run. values: {field: text} as typed. UserError."""
    given = {}
    for name, text in values.items():
        check_name(name, FIELDS, "field")
        if name in SHARED:
            raise UserError(f"--{name}: a student has its teachers'; leave it out")
        given[name] = parse(name, text)
    changes = {"num_models": 1, "kd_from": 2, "kd_alpha": ALPHA,
               "kd_teachers": len(result["members"]), "final_mixture": "uniform",
               "continue_members": False, "seed": config.seed + 1000, **given}
    parts = [f"_{name}{as_text(value)}" for name, value in given.items() if name not in FREE]
    name = re.sub(r"[^\w.-]+", "-", folder.name + "_student" + "".join(parts))
    changes.setdefault("run_id", name)
    config = replace(config, **changes)
    check_ranges(config)
    check_combinations(config)
    if not config.kd_alpha:
        raise UserError("--kd_alpha=0: it would be taught by nobody")
    changes["kd_from"] = 1
    return replace(config, kd_from=1), {**result["overrides"], **changes}


def load_teachers(folder, numbers, config, runtime):
    """(a GPT, the weights of members `numbers` in turn, {name: SHA-256} of their files)."""
    with runtime.device:
        model = GPT(config, runtime.dtype, runtime.attention).to(runtime.dtype).eval()
    weights, hashes = [], {}
    for number in numbers:
        path = member_path(folder, number)
        tensors, _ = read_tensors(path)
        weights.append({name: p.to(runtime.device, runtime.dtype) for name, p in tensors.items()})
        hashes[f"teacher {number}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return model, weights, hashes


def kept_lines(folder, numbers, student):
    """Lines that say what the student of result.json `student` keeps of what the mixture of its
    teachers, members `numbers` of the run in `folder`, gains over member 1."""
    first, _ = read_tensors(member_path(folder, 1, ".logp"))
    logps = [read_tensors(member_path(folder, number, ".logp"))[0] for number in numbers]
    lines = []
    for split in ("val", "holdout"):
        alone = mean_loss(first[split].numpy())
        mixture = mean_loss(mixture_logp([logp[split].numpy() for logp in logps]))
        loss = student["ensemble"][-1][f"{split}_loss"]
        share = f"{(alone - loss) / (alone - mixture):.1%}" if mixture < alone else "n/a"
        lines.append(f"keeps on {split:<7} {share} of what the mixture gains: member 1 {alone:.4f},"
                     f" mixture {mixture:.4f}, student {loss:.4f}")
    return lines


def main():
    arguments = sys.argv[1:]
    if {"--help", "-h"} & set(arguments):
        print(__doc__.strip())
        return
    if not arguments or arguments[0].startswith("-"):
        raise UserError("give a finished run first: tools/distill.py runs/ID [--field=value ...]")
    folder = Path(arguments[0])
    result, of_teachers = read_own_result(folder)
    config, overrides = student_config(folder.resolve(), result, of_teachers,
                                       parse_arguments(arguments[1:]))
    runtime = start_runtime(config)
    numbers = range(1, len(result["members"]) + 1)[-config.kd_teachers:]
    run(config, overrides, load_teachers(folder, numbers, of_teachers, runtime))
    if runtime.is_main:
        path = ROOT / config.runs_dir / config.run_id / "result.json"
        student = json.loads(path.read_text(encoding="utf-8"))
        print("\n".join(kept_lines(folder, numbers, student)))


if __name__ == "__main__":
    run_tool(main)
