"""Settings as a person types them: the command line, --help, schedules, and what cannot work."""
import difflib
import math
import os
import re
import shutil
import sysconfig
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from data.shards import UserError, refuse


def known(name, names, kind):
    """`name`, if it is one of `names`; else UserError with the nearest."""
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else "there are: " + ", ".join(sorted(names))
        raise UserError(f"unknown {kind} {name!r}; {hint}")
    return name


def parse_arguments(argv):
    """["--field=value", ...] -> {field: text of the value}."""
    pairs = [argument.removeprefix("--").partition("=") for argument in argv]
    refuse([(not argument.startswith("--") or not equals,
             f"{argument!r} is not --field=value (--help lists the fields)")
            for argument, (_, equals, _) in zip(argv, pairs)])
    return {name: text for name, _, text in pairs}


def convert(name, value, kind):
    """`value` of the field `name`, from its text if it is one; UserError if no such `kind`."""
    if not isinstance(value, str) or kind is str:
        return value
    if name == "device_batch_size" and value == "auto":
        return 0
    try:
        return kind(value) if kind is not bool else {
            "true": True, "1": True, "false": False, "0": False}[value.lower()]
    except (ValueError, KeyError):
        words = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise UserError(f"--{name}={value}: must be {words}") from None


def launched():
    """(rank, rank here, processes, processes here), as torchrun says; UserError if that is junk."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    texts = {name: os.environ[name] for name in names if name in os.environ}
    said = " ".join(f"{name}={text}" for name, text in texts.items())
    sound = all(re.fullmatch("[0-9]{1,9}", text) for text in texts.values())
    rank, here, world, world_here = (int(texts.get(name, default)) if sound else -1
                                     for name, default in zip(names, (0, 0, 1, 1)))
    refuse([(not (0 <= rank < world and 0 <= here < world_here <= world)
             or ("RANK" in texts) != ("WORLD_SIZE" in texts),
             f"environment {said}: not ranks and numbers of processes; start with torchrun, or"
             " unset these")])
    return rank, here, world, world_here


def meet(backend, minutes):
    """Join the process group that torchrun announces; `minutes`: the longest wait of a collective.

    UserError if a port is taken or the address is missing. Keys of the store are by attempt: after
    a restart gloo would else connect to the addresses of processes that are gone (torch 2.13).
    """
    wait, attempt = timedelta(minutes=minutes), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=wait))
        dist.init_process_group(backend, store=dist.PrefixStore(f"attempt {attempt}", store),
                                rank=rank, world_size=world, timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"processes cannot meet: {str(error).splitlines()[0]}") from None


def split_processes(world, chains, minutes):
    """Groups of this process's chain, and of those at its place in every chain.

    minutes: the longest wait of a collective within a chain. Chains end when they end: between them
    it is a year.
    """
    ranks = [list(range(first, first + world // chains))
             for first in range(0, world, world // chains)]
    chain, _ = dist.new_subgroups_by_enumeration(ranks, timedelta(minutes=minutes))
    across, _ = dist.new_subgroups_by_enumeration(list(map(list, zip(*ranks))), timedelta(days=365))
    return chain, across


def wait_for_first():
    """Until process 0, which mixes and writes for all, comes here too, however long that takes."""
    if dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
        if dist.get_rank() == 0:
            store.set("finished", "1")
        else:
            store.wait(["finished"], timedelta(days=365))
        dist.barrier()              # so that the store's process stays until all have read it


def lacks_to_compile(kind):
    """What torch.compile misses here on a device of this kind, in words, or ""."""
    if kind not in ("cpu", "cuda"):
        return kind
    compilers = ([os.environ.get("CXX", "g++"), "g++", "clang++"] if kind == "cpu" else
                 [os.environ.get("CC", "cc"), "cc", "gcc", "clang"])
    if not any(map(shutil.which, compilers)):
        return "no C++ compiler found" if kind == "cpu" else "no C compiler found"
    header = Path(sysconfig.get_path("include"), "Python.h")    # the kernels are modules of Python
    return "" if header.exists() else f"no {header} (on Debian: apt install python3-dev)"


def speaks():
    """Whether this process, of all that torchrun started, tells what is wrong with settings."""
    try:
        return launched()[0] == 0
    except UserError:
        return True


def help_text(contract, fields, tracks):
    """The text of --help: the script's docstring, its fields and its tracks."""
    lines = [contract, "Fields (--field=value), with the default of no track:", ""]
    for f in fields:
        choices = ", ".join(choice or "(empty)" for choice in f.metadata["choices"])
        lines.append(f"  --{f.name}={f.default}".ljust(34) + " " + f.metadata["help"]
                     + (f" ({choices})" if choices else ""))
    for track, changes in tracks.items():
        lines.append(f"\nTrack {track}: " + " ".join(f"{k}={v}" for k, v in changes.items()))
    return "\n".join(lines)


def check_config(c, gate_channels):
    """UserError, in one line, for values that cannot work. gate_channels: that the gates read."""
    problems = []
    for f in fields(c):
        v, rule = getattr(c, f.name), f.metadata
        is_number = type(v) in (int, float)
        problems += [
            (type(v) is not type(f.default) and not (type(v) is int and type(f.default) is float),
             f"--{f.name}={v}: must be of type {type(f.default).__name__}"),
            (type(v) is float and not math.isfinite(v), f"--{f.name}={v}: must be a finite number"),
            (is_number and v < rule["least"], f"--{f.name}={v}: must be at least {rule['least']}"),
            (is_number and v >= rule["below"], f"--{f.name}={v}: must be below {rule['below']:g}"),
            (type(v) is int and v >= 10 ** 12, f"--{f.name}={v}: must be below 1e12"),
            (rule["choices"] and v not in rule["choices"], f"--{f.name}={v}: must be one of "
             + ", ".join(choice or "(empty)" for choice in rule["choices"]))]
    refuse(problems)
    weights = c.num_layers * c.model_dim * (4 * c.model_dim + 3 * c.mlp_dim)
    weights += 2 * c.vocab_size * c.model_dim
    refuse([(weights > 10 ** 12, f"--num_layers={c.num_layers} --model_dim={c.model_dim}: about"
             f" {weights:.1g} parameters; at most 1e12")])
    heads = sorted((n for n in range(1, c.model_dim + 1) if c.model_dim % n == 0),
                   key=lambda n: abs(n - c.num_heads))
    problems = [
        *((value > most, f"{names}: {value:g} is too much; at most {most:g}")
          for names, value, most in (
              ("--num_layers x --loop_count", c.num_layers * c.loop_count, 10 ** 4),
              ("--num_chains x --num_models", c.num_chains * c.num_models, 10 ** 6),
              ("--batch_rows x --seq_len", c.batch_rows * c.seq_len, 10 ** 8),
              ("--edge_batch_rows x --seq_len", c.edge_batch_rows * c.seq_len, 10 ** 8),
              ("--seed", c.seed, 10 ** 9), ("--hang_minutes", c.hang_minutes, 10 ** 6))),
        (heads[0] != c.num_heads, f"--num_heads={c.num_heads} does not divide --model_dim="
         f"{c.model_dim}; the nearest that does: {heads[0]}"),
        (c.rope_base and c.model_dim // heads[0] % 2, f"--num_heads={c.num_heads}: rotary positions"
         f" need an even width a head; --model_dim={c.model_dim} gives an odd one"),
        (c.model_dim < gate_channels, f"--model_dim={c.model_dim}: must be at least"
         f" {gate_channels}, the channels that the gates read"),
        (c.loop_count > 1 and not c.loop_start <= c.loop_end < c.num_layers, f"--loop_start="
         f"{c.loop_start} --loop_end={c.loop_end}: not a range of layers 0..{c.num_layers - 1}"),
        (set(c.window_pattern) - set("SL"), f"--window_pattern={c.window_pattern}: only S and L"),
        *((getattr(c, name) > 1, f"--{name}={getattr(c, name)}: must be at most 1")
          for name in ("kd_alpha", "subset_fraction", "rope_fraction", "recurrence_from")),
        (not c.kd_temperature, "--kd_temperature=0: must be positive"),
        (c.lr_warmup + c.lr_warmdown > 1, "--lr_warmup and --lr_warmdown together exceed 1"),
        (c.selection_tokens >= c.train_tokens, "--selection_tokens must be below --train_tokens"),
        (c.num_models == 1 and not c.include_first, "--include_first=false leaves no member"),
        (c.final_mixture != "uniform" and not c.selection_tokens,
         f"--final_mixture={c.final_mixture} needs --selection_tokens"),
        (c.final_mixture == "ngram" and not c.ngram_order,
         "--final_mixture=ngram needs --ngram_order"),
        (c.ngram_order and c.vocab_size > 1 << 16, "--ngram_order: tokens must be below 65,536"),
        (c.eval_tokens == 1, "--eval_tokens=1: nothing is predicted; at least 2, or 0 for all"),
        (c.average == "best" and not c.selection_tokens, "--average=best needs --selection_tokens"),
        (not re.fullmatch(r"([A-Za-z0-9][\w.\-]*)?", c.run_id),
         f"--run_id={c.run_id}: letters, digits, '.', '_' and '-' only, and no path")]
    refuse(problems)
    for name in ("wd_schedule", *filter(vars(c).get, ("second_weight", "third_weight"))):
        parse_schedule(getattr(c, name), name)
    if c.window_schedule:
        growth = parse_schedule(c.window_schedule, "window_schedule", "0:0.25:0.5,0.5:0.5:1")
        refuse([(not all(0 < part <= 1 for _, *parts in growth for part in parts),
                 f"--window_schedule={c.window_schedule}: windows are parts of a row, 0 to 1")])


def parse_schedule(text, name="schedule", example="0:1,0.5:0.1,1:0.9"):
    """"0:1,1:2" -> [(0.0, 1.0), (1.0, 2.0)]; UserError if it is not like `example`."""
    try:
        points = [tuple(map(float, part.split(":"))) for part in text.split(",")]
    except ValueError:
        points = [(math.nan,)]
    width = example.split(",")[0].count(":") + 1
    refuse([((width == 3 and points[0][0] != 0) or any(len(point) != width or not all(
        math.isfinite(n) and n >= 0 for n in point) for point in points),
        f"--{name}={text}: must read like {example}")])
    return points
