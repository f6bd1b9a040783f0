"""Train an ensemble of GPTs on a fixed budget of tokens, each distilled from the one before.

The regime is "data is fixed, compute is not" (the NanoGPT Slowrun): at most `train_tokens` may
be seen, as often as one likes, and the lowest loss on unseen text wins.

    torchrun --nproc_per_node=8 train_gpt.py            8 GPUs: the track `limited`
    python train_gpt.py                                 one device: `mini` on a GPU, else `cpu`
    python train_gpt.py --track=cpu --num_models=2      a track, and one field changed
    python train_gpt.py check --track=mini              validate settings and data, no training
    python train_gpt.py --help                          this text and the fields of Config

The same command, with the same --run_id, goes on with a run that was stopped; with a larger
--num_models a finished one gets more members.

The result is one number, declared in advance. Choices are made on `selection`, cut from train;
`val` compares runs; `holdout` is shown once, at the end. The log reproduces the run.
"""
import contextlib
import copy
import ctypes
import difflib
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import resource
import signal
import sys
import textwrap
import time
from collections import Counter, namedtuple
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).resolve()
ROOT = SOURCE.parent
TRACK_NAMES = ("cpu", "cpu_long", "mini", "tiny", "limited", "two_hour", "unlimited")

# ==== Settings ==========================================================================
def opt(default, meaning, *choices, least=None, most=1e15, toy=None, **tracks):
    """A field of Config: its default, meaning and choices, and the tracks in which it differs.
    Numbers are at least 0, whole ones whose default is not 0 at least 1, unless `least` says
    otherwise. toy: the most that --preset=toy leaves of it; TOY has what it sets."""
    assert set(tracks) <= set(TRACK_NAMES), f"no such track: {', '.join(tracks)}"
    return field(default=default, metadata=dict(meaning=meaning, choices=choices, least=least,
                                                most=most, toy=toy, tracks=tracks))

def teeth(first, epochs):
    """Points of wd_schedule: decay rises within each epoch from `first` on (slowrun #82)."""
    return tuple(point for epoch in range(first, epochs) for point in (
        (epoch / epochs, 0.65), ((epoch + 1) / epochs, 1.5)))

@dataclass(frozen=True)
class Config:
    """Every tunable number of a run: the default, then the tracks in which it is another.
    0, False and () are off. Schedules are points (progress, value), linear in between; progress
    is the part of a member's steps that is done. limited (1 hour on 8 H100; slowrun #98), tiny
    (15 minutes; #99), two_hour (#96) and unlimited (one node's chain of #90) are the NanoGPT
    Slowrun's; cpu, cpu_long (cpu's values, but for those of its own) and mini are ours."""
    track: str = opt("", "its name")
    preset: str = opt("", "toy: shrink any track to seconds on a CPU", "", "toy")
    run_id: str = opt("", "name of the folder under runs_dir; empty: by track, fields, seed")
    runs_dir: str = opt("runs", "folder of the runs")
    seed: int = opt(1, "of init, order and dropout", least=0, most=10 ** 9)
    device: str = opt("auto", "auto: the first there is", "auto", "cuda", "mps", "cpu")
    dtype: str = opt("auto", "auto: bf16 if it is fast", "auto", "bfloat16", "float32")
    compile: bool = opt(True, "use torch.compile (where a compiler is found)")
    compile_model: bool = opt(True, "the model too, not the loss only", cpu=False, cpu_long=True)
    time_limit: float = opt(0, "minutes of training that the track allows", mini=15, tiny=15,
                            limited=60, two_hour=120, unlimited=4800)
    flop_limit: float = opt(0, "FLOPs of training, as CPUs differ", cpu=4e13, cpu_long=4e14)
    log_steps: int = opt(5, "steps between readings of the loss, for metrics.jsonl")
    save_minutes: float = opt(15, "minutes between states to go on from; 0: at ends only")
    allow_changed: bool = opt(False, "go on though settings, source or data have changed")
    hang_minutes: float = opt(30, "minutes that processes wait for each other", least=0.05)

    # ---- data
    dataset: str = opt("data/fineweb", "folder of shards and meta.json", cpu="data/prose")
    train_tokens: int = opt(100_000_000, "the whole data budget, selection included",
                            least=2, cpu=50_000, mini=4_000_000, toy=9_000)
    selection_tokens: int = opt(132_000, "whole documents, from the front", least=0,
                                cpu=5_000, mini=60_000, toy=1_000)
    eval_tokens: int = opt(0, "tokens of val and of holdout that are scored; 0: all")
    split_tokens: float = opt(0, "part of the inputs cut in two", most=1, cpu=0.14, mini=0.05)
    vocab_size: int = opt(50257, "tokens of the dataset's vocabulary", cpu=2048, toy=2048)
    seq_len: int = opt(2048, "tokens a row", cpu=512, cpu_long=1024, mini=1024, toy=64)
    batch_rows: int = opt(256, "rows a step, over all devices", cpu=4, cpu_long=2, mini=64)
    device_batch_size: int = opt(4, "rows of a micro-batch",
                                 cpu=4, cpu_long=2, mini=32, tiny=32, unlimited=2, toy=4)

    # ---- members and ensemble
    num_models: int = opt(1, "members, in turn", cpu=4, cpu_long=10, mini=4, unlimited=96, toy=4)
    num_epochs: int = opt(11, "passes over the data, each member", cpu=12, mini=16, tiny=15,
                          two_hour=22, unlimited=2, toy=2)
    kd_alpha: float = opt(0, "KL's weight", most=1, cpu=0.5, cpu_long=0.7, mini=0.5, unlimited=0.45)
    kd_temperature: float = opt(1, "its temperature T", least=0.01, unlimited=1.2)
    kd_from: int = opt(2, "first that is taught", least=2, cpu=4, cpu_long=7, unlimited=9, toy=2)
    kd_teachers: int = opt(1, "last members that teach, one in each step", cpu=99)
    kd_epoch_factor: int = opt(1, "times the epochs for who is taught", cpu=3, toy=1)
    continue_members: bool = opt(False, "begin as the last one ended", unlimited=True)
    perturb_start: float = opt(0.25, "but perturbed, the second, by std of each tensor")
    perturb_end: float = opt(0.05, "and the last; a cosine in between")
    average: str = opt("probs", "members end as means over ends of epochs of what", "probs",
                       "weights", tiny="weights")
    average_epochs: int = opt(1, "of how many, the last", tiny=4, limited=3, two_hour=9, toy=2)
    average_recency: bool = opt(False, "weighted 1, 2, 3, ... and not equally", tiny=True)
    final_mixture: str = opt("uniform", "the declared result", "uniform", "learned",
                             cpu_long="learned", unlimited="learned")

    # ---- model
    num_layers: int = opt(30, "blocks", cpu=4, mini=12, tiny=16, toy=4)
    model_dim: int = opt(1792, "width", least=32, cpu=128, mini=768, tiny=1024, unlimited=2048,
                         toy=64)
    num_heads: int = opt(14, "attention heads", cpu=4, mini=6, tiny=8, unlimited=16, toy=2)
    mlp_multiple: int = opt(256, "8/3 model_dim is rounded up to it", cpu=32, toy=32)
    proj_init: str = opt("normal", "of projections", "normal", "zero", cpu="zero", tiny="zero")
    resid_init: float = opt(1, "first r of x <- r x + a x0; 0: no r", cpu=0, tiny=1.1)
    x0_init: float = opt(0.1, "first a of it (x0: the embedding); 0: no a", cpu=0)
    unet: bool = opt(True, "learned skips from early layers to their mirrors", cpu=False)
    spelling: bool = opt(False, "tokens of like strings learn from each other", cpu=True, mini=True)
    row_memory: bool = opt(False, "what is in the row is likelier to come", cpu=True, mini=True)
    value_projections: bool = opt(True, "in every second layer values come from x0 too")
    attn_gate: bool = opt(True, "a gate per attention head")
    qk_norm: bool = opt(True, "RMS-normalize queries and keys", cpu=False)
    rope_base: float = opt(10000, "of the rotary position embedding", least=1)
    rope_fraction: float = opt(1, "part of the frequencies that turn", most=1, tiny=0.5)
    key_offset: bool = opt(False, "L layers: others are of the token before", tiny=True)
    xsa: bool = opt(False, "exclusive self-attention, learned by head", tiny=True)
    iha: bool = opt(False, "mixed heads", limited=True, two_hour=True, unlimited=True)
    window_pattern: str = opt("SSSL", "windows by layer, S: half a row, L: a row", cpu="L")
    window_schedule: tuple = opt(
        (), "(progress, S, L), parts of a row; with YaRN", cpu=((0, 0.25, 0.5), (0.5, 0.5, 1)),
        two_hour=((0, 0.125, 0.375), (6 / 22, 0.375, 0.875), (13 / 22, 0.625, 1)))
    loop_start: int = opt(0, "first looped layer", limited=15, two_hour=15, unlimited=15, toy=2)
    loop_end: int = opt(0, "the last one", limited=20, two_hour=20, unlimited=24, toy=2)
    loop_count: int = opt(1, "times they run", limited=3, two_hour=3, unlimited=5, toy=2)
    loop_from_epoch: int = opt(0, "when, epochs from 0", limited=6, two_hour=13, toy=1)
    recurrence_from: float = opt(0, "progress when all runs twice", most=1, tiny=0.7)
    softcap: float = opt(10, "c * tanh(logit / c)", cpu=0, mini=15, tiny=15, unlimited=15)
    mtp_weight: float = opt(0, "of the MTP block", limited=0.3, two_hour=0.3, unlimited=0.3)
    second_weight: tuple = opt(
        (), "(progress, weight) of the second next token's loss, on the same logits",
        cpu=((0, 0.5), (0.33, 0.5), (0.66, 0)), tiny=((0, 0.5), (0.33, 0.5), (0.66, 0)))
    third_weight: tuple = opt((), "(progress, weight) of the third next token's",
                              cpu=((0, 0.25), (0.33, 0)), tiny=((0, 0.25), (0.33, 0)))

    # ---- optimizer and regularization (cpu: x0_lr and scalar_lr are for ablations)
    matrix_lr: float = opt(0.01, "Muon, matrices of the blocks", cpu=0.04, tiny=0.032)
    embed_lr: float = opt(0.0375, "AdamW, embedding", cpu=0.1, tiny=0.12)
    head_lr: float = opt(0.0005, "AdamW, output head", cpu=0.003, tiny=0.0008)
    x0_lr: float = opt(0.025, "AdamW, the a of x0_init", cpu=0.02, tiny=0.2)
    scalar_lr: float = opt(0.00025, "AdamW, r of resid_init; skips", cpu=0.002, tiny=0.002)
    gate_lr: float = opt(0, "AdamW, attention gates; 0: Muon, as matrices", tiny=0.2)
    momentum: float = opt(0.95, "Muon's", most=1)
    momentum_start: float = opt(0.85, "Muon's at the first step", most=1, unlimited=0.95)
    momentum_steps: int = opt(300, "steps in which it rises", least=0, cpu=100, toy=10)
    muon_eq: bool = opt(True, "MuonEq-R: unit rows before orthogonalization", tiny=False)
    normuon_beta2: float = opt(0.95, "NorMuon; 0: plain Muon", most=1, cpu=0)
    cautious: bool = opt(True, "decay only what the update does not push outwards")
    weight_decay: float = opt(1.3, "of matrices, embedding and head", cpu=1.5, tiny=0.8)
    wd_schedule: tuple = opt(
        ((0, 1),), "(progress, multiplier) of weight_decay",
        tiny=((0, 1), (2 / 15, 1), (8 / 15, 0.125), (1, 1.1625)),
        limited=((0, 1), (0.4, 1), *teeth(8, 11)), two_hour=((0, 1), (0.4, 1), *teeth(14, 22)),
        unlimited=((0, 0.7), (1, 1)))
    lr_warmdown: float = opt(0.2, "last part of the steps, in which rates fall", most=1,
                             cpu=0.4, mini=0.4, tiny=0.4, unlimited=1)
    lr_power: float = opt(0.5, "how: 1 linearly", cpu=1, mini=1, tiny=1, unlimited=1)
    lr_floor: float = opt(0, "where to, as a part of the peak", unlimited=0.08)
    sawtooth_epochs: int = opt(0, "last, with teeth", tiny=4, limited=3, two_hour=8, toy=1)
    sawtooth_floor: float = opt(0.05, "where to, as a part of the peak")
    grad_clip: float = opt(0, "largest norm of the whole gradient; 0: any", unlimited=1)
    meta_lr: float = opt(0, "norm of the meta-gradient's inner step", tiny=0.5, limited=0.5)
    meta_decay: bool = opt(False, "it falls with the rate's warmdown", limited=True)
    meta_scope: str = opt("matrices", "who takes it", "matrices", "mlp", tiny="mlp")
    meta_rows: int = opt(16, "rows of half a virtual rank, for any number of GPUs", toy=1)
    dropout: float = opt(0.1, "after output projections", most=1, cpu=0, limited=0.05)
    mlp_dropout: bool = opt(True, "after the MLP's too", tiny=False)
    stochastic_depth: float = opt(0, "of the last block; linear", most=1, two_hour=0.05)
    loss_chunk: int = opt(2048, "tokens whose logits are in memory", cpu=512, cpu_long=1024)

    @property
    def padded_vocab(self):
        """Rows of embedding and head: a multiple of 64, for the hardware and for sharding."""
        return math.ceil(self.vocab_size / 64) * 64

    @property
    def mlp_dim(self):
        return math.ceil(8 * self.model_dim / (3 * self.mlp_multiple)) * self.mlp_multiple

FIELDS = {f.name: f for f in fields(Config)}
TRACKS = {track: {name: f.metadata["tracks"][track] for name, f in FIELDS.items()
                  if track in f.metadata["tracks"]} for track in TRACK_NAMES}
TRACKS["cpu_long"] = TRACKS["cpu"] | TRACKS["cpu_long"]
TOY = dict(dataset="data/prose", eval_tokens=2_000, batch_rows=16, compile=False)
FREE = ("run_id", "runs_dir", "save_minutes", "allow_changed", "hang_minutes", "time_limit",
        "flop_limit", "device_batch_size", "loss_chunk")      # that change no more than rounding
ADAM_EPS = 1e-10            # added to the root of AdamW's second moment
GATE_CHANNELS = 12          # of the residual stream, that attention gates read
VALUE_GATE_CHANNELS = 32    # the same of the gates of value projections
BASELINES = {"one_epoch": "one epoch", "tuned": "a tuned plain model", "single": "a tuned member"}
PROGRESS_SECONDS = 5        # between lines of progress on the console

# ==== What is typed =====================================================================
class UserError(ValueError):
    """Something a person can mend: what, where, what to do, in one line. Exit code 2."""

def check_name(name, names, kind):
    """UserError with the nearest of `names` if `name` is none of them."""
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1) or sorted(names)
        raise UserError(f"unknown {kind} {name!r}; did you mean {' or '.join(close)}?")

def parse_arguments(arguments):
    """["--field=value", ...] -> {field: text of the value}."""
    values = {}
    for argument in arguments:
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise UserError(f"{argument!r} is not --field=value (--help lists the fields)")
        if name in values:
            raise UserError(f"--{name} is given twice: {values[name]} and {text}")
        values[name] = text
    return values

def parse(name, text):
    """The value of a field from its text. UserError if it cannot be one."""
    kind = FIELDS[name].type
    try:
        if kind is tuple:
            return parse_schedule(text, width=3 if name == "window_schedule" else 2)
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        like = {bool: "true or false", int: "a whole number", float: "a number",
                tuple: "points, as 0:1,0.5:0.1 (of windows: 0:0.25:0.5,0.5:0.5:1)"}
        raise UserError(f"--{name}={text}: must be {like[kind]}") from None

def parse_schedule(text, width):
    """"0:1,1:2" -> ((0.0, 1.0), (1.0, 2.0)), by progress. ValueError if it cannot be."""
    points = [tuple(float(n) for n in point.split(":")) for point in text.split(",") if point]
    for point in points:
        if len(point) != width or not all(0 <= number < math.inf for number in point):
            raise ValueError(point)
    return tuple(sorted(points, key=lambda point: point[0]))

def as_text(value):
    """The reverse of parse: schedules as "0:1,1:2", false for False, 1 for 1.0."""
    if isinstance(value, (tuple, list)):
        return ",".join(":".join(as_text(float(n)) for n in point) for point in value)
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return str(value).lower() if isinstance(value, bool) else str(value)

def make_config(track, **overrides):
    """The Config of `track` with `overrides` (values, or their text). UserError if unsound."""
    check_name(track, TRACKS, "track")
    values = {**TRACKS[track], "track": track}
    if overrides.get("preset") == "toy":
        values |= TOY
        for name, f in FIELDS.items():
            if f.metadata["toy"] is not None:
                values[name] = min(values.get(name, f.default), f.metadata["toy"])
    for name, value in overrides.items():
        check_name(name, FIELDS, "field")
        values[name] = parse(name, value) if isinstance(value, str) else value
    config = Config(**values)
    check_ranges(config)
    check_combinations(config)
    return config

def check_ranges(config):
    """UserError for a value that is none of its field's choices, or out of its range."""
    for name, f in FIELDS.items():
        value, rule = getattr(config, name), f.metadata
        least = rule["least"]
        if least is None:
            least = 1 if f.type is int and f.default else 0
        if rule["choices"] and value not in rule["choices"]:
            raise UserError(f"--{name}={value}: must be one of {', '.join(rule['choices'])}")
        if f.type in (int, float) and not least <= value <= rule["most"]:
            raise UserError(f"--{name}={value}: must be from {least} to {rule['most']:g}")

def check_combinations(c):
    """UserError for values of a Config that cannot work together."""
    if c.model_dim % (2 * c.num_heads):
        raise UserError(f"--num_heads={c.num_heads} does not divide --model_dim={c.model_dim}"
                        " into parts of even width")
    if c.loop_count > 1 and not c.loop_start <= c.loop_end < c.num_layers:
        raise UserError(f"--loop_start={c.loop_start} --loop_end={c.loop_end}: not a range of"
                        f" layers 0..{c.num_layers - 1}")
    if c.loop_count > 1 and c.loop_from_epoch >= c.num_epochs:
        raise UserError(f"--loop_from_epoch={c.loop_from_epoch}, counted from 0, is after the last"
                        f" of --num_epochs={c.num_epochs}; lower it, or --loop_count=1")
    if c.final_mixture != "uniform" and not c.selection_tokens:
        raise UserError(f"--final_mixture={c.final_mixture} needs --selection_tokens")
    if c.row_memory and c.loss_chunk % c.seq_len:
        raise UserError(f"--loss_chunk={c.loss_chunk} must be a multiple of --seq_len={c.seq_len}:"
                        " rows that are remembered are whole")
    for name, pattern in (("window_pattern", "[SL]+"), ("run_id", r"([A-Za-z0-9][\w.-]*)?")):
        if not re.fullmatch(pattern, getattr(c, name)):
            raise UserError(f"--{name}={getattr(c, name)}: must match {pattern}")

if __name__ == "__main__":      # before imports that take seconds and an environment
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")     # threads that wait leave cores to others
    if {"--help", "-h"} & set(sys.argv[1:]):
        settings = Path(__file__).read_text(encoding="utf-8").partition("class Config:\n")[2]
        print(__doc__ + "\nFields, as --field=value:\n" + settings.partition("\n    @property")[0])
        sys.exit()

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

try:
    from flash_attn_interface import flash_attn_func        # FlashAttention 3
except Exception as error:      # not installed, or a broken build
    flash_attn_func, no_flash = None, type(error).__name__

# ==== Runtime: processes, device, dtype =================================================
@dataclass
class Runtime:
    """The processes and the device of a run; one process and many take the same path."""
    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32      # of matrix products
    attention: str = "sdpa"                 # or "flex", "fa3"
    compile: bool = False
    notes: list = field(default_factory=list)   # what is slower or other than asked for

    @property
    def is_main(self):
        return self.rank == 0

    def all_reduce(self, tensor):
        """Sum of `tensor` over the processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def reduce(self, tensor, owner):
        """The same on the process `owner` alone; what others then hold is of no use."""
        if self.world_size > 1:
            dist.reduce(tensor, owner)

    def broadcast(self, tensor, owner):
        """`tensor` of the process `owner`, in place on all of them."""
        if self.world_size > 1:
            dist.broadcast(tensor, owner)

    def all_gather(self, tensor):
        """[n, ...] of each process -> [world_size * n, ...] on all of them."""
        if self.world_size == 1:
            return tensor
        whole = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(whole, tensor.contiguous())
        return torch.cat(whole)

    def synchronize(self):
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def compiled(self, function, wanted=True):
        return torch.compile(function, dynamic=False) if self.compile and wanted else function

def launcher_ranks():
    """[rank, rank on this machine, processes, processes on it]; OSError, which all print."""
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    said = [os.environ.get(name, str(default)) for name, default in names.items()]
    if not all(text.isdecimal() for text in said) or int(said[0]) >= int(said[2]):
        raise OSError(f"{', '.join(names)} are {', '.join(said)}: use torchrun or unset them")
    return [int(text) for text in said]

def plan_launch(device, command="train"):
    """(processes, track) of a launch; for `check`, of the one that run.sh makes."""
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    processes = 1 << (max(1, gpus).bit_length() - 1) if command == "check" else 1
    if {"RANK", "WORLD_SIZE"} & set(os.environ):
        processes = launcher_ranks()[2]
    if not gpus:
        return processes, "cpu"
    fits = torch.cuda.get_device_properties(0).total_memory > 60e9      # `limited`, in bytes
    return processes, "limited" if processes > 1 and fits else "mini"

def start_runtime(config):
    """Join the process group, if there is one to join; choose device, dtype and attention."""
    rank, local_rank, world_size, local_world_size = launcher_ranks()
    gpus = torch.cuda.device_count()
    kind = config.device
    if kind == "auto":
        has_mps = torch.backends.mps.is_available() and world_size == 1
        kind = "cuda" if gpus else "mps" if has_mps else "cpu"
    if kind == "cuda" and local_world_size > gpus:
        raise UserError(f"{gpus} GPU(s) for {local_world_size} process(es); lower"
                        " --nproc_per_node or use --device=cpu")
    device = torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        bf16_is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bf16_is_fast = kind == "cpu" and (torch.cpu._is_amx_tile_supported()
                                          or torch.cpu._is_avx512_bf16_supported())
    if local_world_size > 1:                        # processes share the cores
        torch.set_num_threads(max(1, os.cpu_count() // local_world_size))
    if world_size > 1 and not dist.is_initialized():
        join_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", config)
    dtype = torch.bfloat16 if bf16_is_fast else torch.float32
    if config.dtype != "auto":
        dtype = getattr(torch, config.dtype)
    runtime = Runtime(rank, world_size, device, dtype)
    missing = why_no_compile(device) if config.compile else ""
    if missing:
        runtime.notes.append(f"compile   off (needs g++ and python3-dev): {missing}")
    runtime.compile = config.compile and not missing
    torch._dynamo.config.recompile_limit = 64       # stages, and a teacher; beyond it is eager
    if kind == "cuda":
        choose_attention(runtime, config.compile_model)
    if kind == "cpu":           # glibc keeps what is freed: 0.75 of a step's time
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(-3, 2 ** 25)          # M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)      # M_TRIM_THRESHOLD
    return runtime

def join_process_group(backend, config):
    """Join the group that torchrun announces. UserError if a port is taken, or no address.
    Keys are by attempt: after a restart gloo would else look for processes that are gone."""
    attempt = "attempt " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    timeout = timedelta(minutes=config.hang_minutes)        # the longest wait of a collective
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(backend, store=dist.PrefixStore(attempt, store),
                                rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"processes cannot meet: {str(error).splitlines()[0]}") from None

def why_no_compile(device):
    """In a line why torch.compile fails on `device`, or "": the very compiler is tried."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
        return ""
    except Exception as error:      # no compiler, no Python.h, a broken installation
        error = getattr(error, "inner_exception", error)
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]

def choose_attention(runtime, compiles_model):
    """FlashAttention 3 if it is there and a call succeeds, else what PyTorch ships."""
    try:
        probe = torch.zeros(1, 128, 2, 128, device=runtime.device, dtype=runtime.dtype)
        flash_attn_func(probe, probe, probe, causal=True, window_size=(63, 0))
        runtime.synchronize()
        runtime.attention = "fa3"
    except Exception as error:      # not installed, another architecture
        why = type(error).__name__ if flash_attn_func else no_flash
        runtime.attention = "flex" if runtime.compile and compiles_model else "sdpa"
        runtime.notes.append(f"attention {runtime.attention}: FlashAttention 3 fails ({why})")

# ==== Shards and rows ===================================================================
# llm.c's and modded-nanogpt's file: an int32[256] header (magic, version, tokens, vocabulary
# size, BOS id; 0 in the last two: GPT-2's), then uint16 tokens, each document behind its BOS.
SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256

def read_shard(path, vocab_size, sha256=None):
    """(tokens: uint16 memory map [n], BOS id, SHA-256). UserError if the file is not sound.
    vocab_size, sha256: what they must be."""
    try:
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
        held = (path.stat().st_size - 4 * HEADER_INTS) / 2
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    again = "fetch or build the dataset again"
    if len(header) < HEADER_INTS or (header[0], header[1]) != (SHARD_MAGIC, SHARD_VERSION):
        raise UserError(f"{path}: not a token shard of version {SHARD_VERSION}; {again}")
    count, *ids = (int(number) for number in header[2:5])
    vocab, bos = ids if ids[0] else (50257, 50256)
    if count < 2 or held != count or sha256 not in (None, found):
        raise UserError(f"{path}: damaged, by its size or its SHA-256 in meta.json; {again}")
    if vocab != vocab_size:
        raise UserError(f"{path}: vocabulary of {vocab}; set --vocab_size={vocab}")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS, shape=(count,))
    if tokens[0] != bos or tokens.max() >= vocab:
        raise UserError(f"{path}: must begin with BOS {bos} and be below {vocab}; {again}")
    return tokens, bos, found

def split_documents(tokens, bos):
    """[n] -> list of views, one a document, each beginning with BOS; without empty ones."""
    starts = np.flatnonzero(tokens == bos)
    return [tokens[a:b] for a, b in itertools.pairwise([*starts, len(tokens)]) if b - a > 1]

def count_tokens(documents):
    return sum(len(document) for document in documents)

def cut_documents(documents, budget):
    """The first documents, the last one shortened, that make exactly `budget` tokens."""
    kept, total = [], 0
    for document in documents:
        if total >= budget:
            break
        kept.append(document[:min(len(document), budget - total)])
        total += len(kept[-1])
    return kept

@dataclass
class Dataset:
    """Lists of documents (uint16 views that begin with BOS) and the folder's meta.json."""
    folder: Path
    train: list
    scored: dict                # split -> list: selection (if there is one), val, holdout
    bos: int
    meta: dict
    hashes: dict                # SHA-256 by name of a shard, and of tokens.npz
    tables: dict                # of read_token_tables
    val_bytes: int | None       # of UTF-8 text in the scored tokens of val, if that is known
    notes: list

def read_meta(folder):
    """(meta.json, {"<split>_<index>" of its shards: SHA-256 or None}). UserError if malformed."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return meta, {key: facts.get("sha256") for key, facts in meta.get("splits", {}).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None

def dataset_folder(config):
    """Where the dataset lies: from the present folder, or else from this script's."""
    here = Path(config.dataset)
    return here.resolve() if here.is_dir() else ROOT / here

def load_dataset(folder, config):
    """Read a dataset, cut selection and budget, see to it that no held-out document is in train.
    UserError if it cannot be used so."""
    folder = Path(folder)
    meta, listed = read_meta(folder)
    splits, hashes = {}, {}
    for split in ("train", "val", "holdout"):
        splits[split] = []
        shards = [("_".join(path.stem.split("_")[-2:]), path)
                  for path in sorted(folder.glob(f"*_{split}_*.bin"))]
        shards += [(key, None) for key in listed
                   if key.startswith(f"{split}_") and key not in dict(shards)]
        for key, path in sorted(shards, key=lambda shard: shard[0]):
            if split == "train" and count_tokens(splits[split]) >= config.train_tokens:
                break
            if path is None:
                raise UserError(f"{folder}: {key}, which meta.json lists, is missing; get it")
            tokens, bos, hashes[path.name] = read_shard(path, config.vocab_size, listed.get(key))
            splits[split] += split_documents(tokens, bos)
        if not splits[split]:
            script = folder.name if folder.name in ("prose", "fineweb") else "text"
            raise UserError(f"{folder}: no {split} shards; get them: python data/{script}.py")
    if count_tokens(splits["train"]) < config.train_tokens:
        raise UserError(f"{folder}: {count_tokens(splits['train']):,} tokens in train, below"
                        f" --train_tokens={config.train_tokens}; get more or lower it")
    train, notes = drop_held_out(folder, splits)
    train, selection = cut_selection(cut_documents(train, config.train_tokens), config)
    scored = {"selection": selection} if selection else {}
    for split in ("val", "holdout"):
        scored[split] = cut_documents(splits[split], max(2, config.eval_tokens or math.inf))
    if 0 < config.eval_tokens < count_tokens(splits["val"]) and meta.pop("baseline", None):
        notes.append("data      a part of val is scored: no data efficiency, whose curve is of all")
    tables, found = read_token_tables(folder, config)
    val_bytes = int(tables["bytes"][np.concatenate(scored["val"])].sum()) if tables else None
    return Dataset(folder, train, scored, bos, meta, hashes | found, tables, val_bytes, notes)

def drop_held_out(folder, splits):
    """(documents of train that are in no other split, notes). UserError if splits overlap."""
    texts = {document.tobytes() for document in splits["train"]}
    held_out = set()
    for split in ("val", "holdout"):
        shared = [document for document in splits[split] if document.tobytes() in texts]
        share = count_tokens(shared) / count_tokens(splits[split])
        if share > 0.25:            # short documents have natural duplicates
            raise UserError(f"{folder}: {share:.0%} of {split} is in train, too; build the dataset"
                            " again, with splits that do not overlap")
        held_out |= {document.tobytes() for document in shared}
    kept = [document for document in splits["train"] if document.tobytes() not in held_out]
    lost = len(splits["train"]) - len(kept)
    note = f"data      {lost} documents of train left out: val or holdout has them"
    return kept, [note] if lost else []

def cut_selection(documents, config):
    """(train, selection): the first documents until they have selection_tokens."""
    ends = np.cumsum([0] + [len(document) for document in documents])
    first = min(len(documents), int(np.searchsorted(ends, config.selection_tokens)))
    if ends[first] > ends[-1] / 2 or not documents:
        raise UserError(f"--selection_tokens={config.selection_tokens}: {ends[first]:,} of the"
                        f" {ends[-1]:,} tokens, more than half; lower it, to 0 if one alone is")
    return documents[first:], documents[:first]

def read_token_tables(folder, config):
    """({name: array} of data/token_tables.py, {"tokens.npz": SHA-256}); {} if there are none and
    only bits per byte would need them. UserError if they are needed, or damaged."""
    path = folder / "tokens.npz"
    if not path.exists() and not config.spelling and not config.split_tokens:
        return {}, {}
    try:
        with np.load(path) as held:
            tables = {name: held[name] for name in ("bytes", "pairs", "features", "weights")}
        if len(tables["bytes"]) != config.vocab_size:
            raise ValueError(f"of {len(tables['bytes'])} tokens, not {config.vocab_size}")
        return tables, {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    except Exception as error:          # not there, not whole, without a table
        raise UserError(f"{path}: cannot be read ({error}); it is made from the ranks of tokens:"
                        f" python data/token_tables.py {folder}") from None

class Rows:
    """The rows that a member trains on, as one endless sequence cut into steps.
    Every epoch permutes the documents (slowrun #76: -0.007 to -0.013), lays them end to end,
    cuts rows of seq_len + 1 tokens that overlap by one (each token is predicted once), and
    permutes the rows (#7: -0.026). Rows that do not fill an epoch's last step are carried over;
    only the very last step may be smaller. pairs, cut: those of tokens.npz, and the part of
    the tokens that have one which is read as that, others each epoch (arXiv 1910.13267)."""
    def __init__(self, documents, seq_len, batch_rows, num_epochs, seed, bos, pairs=None, cut=0.0):
        self.documents = documents
        self.seq_len = seq_len
        self.batch_rows = batch_rows
        self.seed = seed
        self.bos = bos
        self.tokens = count_tokens(documents)
        self.pairs = pairs
        self.num_cut = 0
        if cut:
            mergeable = [np.count_nonzero(pairs[document, 0] >= 0) for document in documents]
            self.num_cut = round(cut * sum(mergeable))
        self.rows_per_epoch = math.ceil((self.tokens + self.num_cut - 1) / seq_len)
        self.total_rows = self.rows_per_epoch * num_epochs
        self.num_steps = math.ceil(self.total_rows / batch_rows)
        self.epoch = None       # whose documents, end to end, are the stream
        self.stream = self.targets = self.row_order = None

    def load(self, epoch):
        """Shuffle and cut `epoch`, unless it is the present one."""
        if epoch == self.epoch:
            return
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.documents))
        self.targets = self.stream = np.concatenate([self.documents[i] for i in order])
        if self.num_cut:
            self.stream, self.targets = self.cut_tokens(self.stream.astype(np.int64), random)
        self.row_order = random.permutation(self.rows_per_epoch)
        self.epoch = epoch

    def cut_tokens(self, tokens, random):
        """(stream, targets) int64 [n + num_cut]. Whole tokens are targets, where they begin; what
        goes on inside of one is not predicted."""
        can = np.flatnonzero(self.pairs[tokens, 0] >= 0)
        is_cut = np.zeros(len(tokens), bool)
        is_cut[random.permutation(can)[:self.num_cut]] = True
        stream = np.repeat(tokens, 1 + is_cut)
        start = np.arange(len(tokens)) + np.cumsum(is_cut) - is_cut
        targets = np.full(len(stream), -1)
        targets[start] = tokens
        for half in (0, 1):
            stream[start[is_cut] + half] = self.pairs[tokens[is_cut], half]
        return stream, targets

    def step(self, step):
        """inputs, targets: int64 [batch_rows, seq_len]. Target -1: nothing is predicted."""
        inputs = np.full((self.batch_rows, self.seq_len), self.bos)
        targets = np.full((self.batch_rows, self.seq_len), -1)
        first = step * self.batch_rows
        for i, row in enumerate(range(first, min(first + self.batch_rows, self.total_rows))):
            self.load(row // self.rows_per_epoch)
            start = self.row_order[row % self.rows_per_epoch] * self.seq_len
            following = self.targets[start + 1:start + self.seq_len + 1]
            inputs[i, :len(following)] = self.stream[start:start + len(following)]
            targets[i, :len(following)] = following
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def epoch_of(self, step):
        """Epochs completed when `step` begins (float)."""
        return step * self.batch_rows / self.rows_per_epoch

# ==== Model =============================================================================
# What changes in training: the progress at which a stage begins, how often looped layers and the
# whole network run (passes but the last are detached), how many keys before its own a query of
# each layer sees, and the (old, new) sizes of the L window.
Stage = namedtuple("Stage", "start loops passes windows growths")

def training_stages(config):
    """The stages of a member's training, in order."""
    schedule = config.window_schedule or ((0.0, 0.5, 1.0),)
    loop_from = config.loop_from_epoch / config.num_epochs if config.loop_count > 1 else 0.0
    starts = {0.0, loop_from, config.recurrence_from, *(point[0] for point in schedule)}
    stages = []
    for start in sorted(start for start in starts if start < 1):
        begun = [point for point in schedule if point[0] <= start] or schedule[:1]
        _, short, long = begun[-1]
        sizes = [round(point[2] * config.seq_len) for point in begun]
        passes = 2 if config.recurrence_from and start >= config.recurrence_from else 1
        loops = config.loop_count if start >= loop_from else 1
        stages.append(Stage(start, loops, passes, layer_windows(config, short, long),
                            tuple(itertools.pairwise(sizes))))
    return stages

def stage_at(stages, progress):
    """The stage that training is in: the last that has begun."""
    return max(stage for stage in stages if stage.start <= progress)

def layer_windows(config, short, long):
    """Keys before its own that a query of each layer sees; short, long: parts of a row."""
    parts = {"S": short, "L": long}
    kinds = itertools.islice(itertools.cycle(config.window_pattern), config.num_layers - 1)
    return tuple(max(1, round(parts[kind] * config.seq_len)) for kind in (*kinds, "L"))

def layer_order(config, loops):
    """Layer numbers in the order in which they run: loop_start..loop_end `loops` times."""
    layers = list(range(config.num_layers))
    looped = layers[config.loop_start:config.loop_end + 1]
    layers[config.loop_end + 1:config.loop_end + 1] = looped * (loops - 1)
    return tuple(layers)

def yarn(frequency, growths):
    """(frequencies, factor of the attention scale) after windows grew: modded-nanogpt's YaRN.
    Those that turn less than once in the old window are interpolated, those that turn 32 times
    are kept, linear in between (arXiv 2309.00071)."""
    scale = 1.0
    for old, new in growths:
        turns = old * frequency / (2 * math.pi)
        keep = ((turns - 1) / 31).clamp(0, 1)
        frequency = frequency * (old / new + keep * (1 - old / new))
        scale *= 0.2 * math.log(new / old) + 1
    return frequency, scale

# A layer's attention: how many keys before its own a query sees, make_mask's mask, (cos, sin)
# [T, 1, Dh/2], key channels [Dh] of the token before (None: none), scale of q k, Runtime's path.
AttentionSpec = namedtuple("AttentionSpec", "window mask rope from_before scale path")

# What a forward pass needs beside weights and tokens (GPT.specs): the order of the layers, how
# often they run, an AttentionSpec for each layer, and that of the MTP block.
Specs = namedtuple("Specs", "layer_order passes attention mtp")

def norm(x):
    """RMS norm without parameters."""
    return F.rms_norm(x, (x.size(-1),))

class Linear(nn.Module):
    """x W^T without bias; fp32 weights [out, in], cast to the dtype of x."""
    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))

def rotate(x, cos, sin):
    """Rotary position embedding, rotate-half. x [B, T, H, Dh]; cos, sin [T, 1, Dh/2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

def attend(q, k, v, spec):
    """Causal attention, q, k, v [B, T, H, Dh] -> [B, T, H, Dh]."""
    if callable(spec.path):     # tools/_decode.py: with the keys of earlier tokens
        return spec.path(q, k, v, spec)
    if spec.path == "fa3":
        y = flash_attn_func(q, k, v, causal=True, window_size=(spec.window, 0),
                            softmax_scale=spec.scale)
        return y[0] if isinstance(y, tuple) else y
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if spec.path == "flex":
        y = flex_attention(q, k, v, block_mask=spec.mask, scale=spec.scale)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=spec.mask, scale=spec.scale,
                                           is_causal=spec.mask is None)
    return y.transpose(1, 2)

def make_mask(window, length, device, path):
    """The mask that `attend` wants for rows of `length` tokens."""
    if path == "fa3" or (path == "sdpa" and window >= length - 1):
        return None
    if path == "flex":
        return create_block_mask(lambda b, h, q, k: (k <= q) & (q - k <= window), None, None,
                                 length, length, device=device)
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance <= window)

class Attention(nn.Module):
    """Causal self-attention with QK-norm, gated value projections and a gate per head."""
    def __init__(self, config, has_value_projection):
        super().__init__()
        self.qk_norm = config.qk_norm
        self.heads = heads = config.num_heads
        width = config.model_dim
        self.q = Linear(width, width)
        self.k = Linear(width, width)
        self.v = Linear(width, width)
        self.proj = Linear(width, width)
        self.gate = Linear(GATE_CHANNELS, heads) if config.attn_gate else None
        self.value_gate = Linear(VALUE_GATE_CHANNELS, heads) if has_value_projection else None
        self.xsa = nn.Parameter(torch.empty(heads)) if config.xsa else None
        self.mix = nn.Parameter(torch.empty(3, heads, heads)) if config.iha else None

    def project(self, x):
        """q, k, v [B, T, H, Dh]; with IHA each head's weights are a mixture of all heads'."""
        B, T, D = x.shape
        weights = [layer.weight for layer in (self.q, self.k, self.v)]
        if self.mix is not None:         # slowrun #69: -0.008
            weights = [(m @ w.view(self.heads, -1)).view(D, D) for m, w in zip(self.mix, weights)]
        return [F.linear(x, w.to(x.dtype)).view(B, T, self.heads, -1) for w in weights]

    def forward(self, x, value, spec):
        B, T, D = x.shape
        q, k, v = self.project(x)
        if self.value_gate is not None:  # the gate starts at 1 (slowrun #11: -0.027)
            gate = 2 * torch.sigmoid(self.value_gate(x[..., :VALUE_GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * value.view(B, T, self.heads, -1)
        q = rotate(q, *spec.rope)
        k = rotate(k, *spec.rope)
        if self.qk_norm:
            q = norm(q)
            k = norm(k)
        if spec.from_before is not None:    # keys of the token before (modded-nanogpt)
            k = torch.where(spec.from_before, torch.cat((k[:, :1], k[:, :-1]), dim=1), k)
        y = attend(q, k, v, spec)
        if self.xsa is not None:         # less of the token's own value (slowrun #91: -0.003)
            own = v / v.norm(dim=-1, keepdim=True).clamp(min=1e-4)
            part = torch.tanh(self.xsa).view(-1, 1).to(y.dtype)
            y = y - part * (y * own).sum(dim=-1, keepdim=True) * own
        if self.gate is not None:        # slowrun #21: -0.019
            y = y * torch.sigmoid(self.gate(x[..., :GATE_CHANNELS])).unsqueeze(-1)
        return self.proj(y.reshape(B, T, D))

class MLP(nn.Module):
    """SwiGLU (slowrun: -0.014 against squared ReLU)."""
    def __init__(self, config):
        super().__init__()
        self.gate = Linear(config.model_dim, config.mlp_dim)
        self.fc = Linear(config.model_dim, config.mlp_dim)
        self.proj = Linear(config.mlp_dim, config.model_dim)

    def forward(self, x):
        return self.proj(F.silu(self.gate(x)) * self.fc(x))

class Block(nn.Module):
    def __init__(self, config, has_value_projection):
        super().__init__()
        self.attn = Attention(config, has_value_projection)
        self.mlp = MLP(config)
        self.dropout = config.dropout
        self.mlp_dropout = config.dropout if config.mlp_dropout else 0.0

    def forward(self, x, value, spec):
        y = self.attn(norm(x), value, spec)
        x = x + F.dropout(y, self.dropout, self.training)
        return x + F.dropout(self.mlp(norm(x)), self.mlp_dropout, self.training)

class GPT(nn.Module):
    """Decoder-only transformer. `forward` gives hidden states; head and loss are the caller's.
    dtype: of activations and matrix products (weights are fp32). attention: as Runtime's."""
    def __init__(self, config, dtype=torch.float32, attention="sdpa"):
        super().__init__()
        self.config = config
        self.dtype, self.attention = dtype, attention
        layers, width = config.num_layers, config.model_dim
        valued = range((layers - 1) % 2, layers, 2) if config.value_projections else ()
        self.wte = nn.Embedding(config.padded_vocab, width)
        self.blocks = nn.ModuleList(Block(config, i in valued) for i in range(layers))
        self.value_projs = nn.ModuleDict({str(i): Linear(width, width) for i in valued})
        self.head = Linear(width, config.padded_vocab)
        self.resid_lambdas = nn.Parameter(torch.empty(layers)) if config.resid_init else None
        self.x0_lambdas = nn.Parameter(torch.empty(layers)) if config.x0_init else None
        has_skips = config.unet and layers > 1
        self.skip_lambdas = nn.Parameter(torch.empty(layers // 2)) if has_skips else None
        self.mtp_proj = Linear(2 * width, width) if config.mtp_weight else None
        self.mtp_block = Block(config, False) if config.mtp_weight else None

    @torch.no_grad()
    def init_weights(self, seed):
        """Fill every parameter, by parameter_table, from `seed`; the same on all ranks."""
        generator = torch.Generator(self.wte.weight.device).manual_seed(seed)
        table = parameter_table(self.config)
        for name, p in self.named_parameters():
            initialize(p, *find_row(table, name).init, generator)
        return self

    def specs(self, stage=None, length=None):
        """The Specs of a stage (None: the last), for rows of `length` tokens (seq_len)."""
        config, device = self.config, self.wte.weight.device
        stage = stage or training_stages(config)[-1]
        length = length or config.seq_len
        width = config.model_dim // config.num_heads
        rotating = max(1, round(width // 2 * config.rope_fraction))
        frequency = config.rope_base ** (-torch.arange(rotating, device=device) / rotating)
        frequency, factor = yarn(frequency, stage.growths)
        frequency = F.pad(frequency, (0, width // 2 - rotating))     # other pairs stand still
        angle = torch.arange(length, device=device)[:, None, None] * frequency  # [T, 1, Dh/2]
        rope = (angle.cos().to(self.dtype), angle.sin().to(self.dtype))
        standing = torch.arange(width, device=device) % (width // 2) >= rotating
        by_window = {}
        for window in {*stage.windows, config.seq_len}:
            has_offset = config.key_offset and window == max(stage.windows)
            by_window[window] = AttentionSpec(
                window, make_mask(window, length, device, self.attention), rope,
                standing if has_offset else None, factor * width ** -0.5, self.attention)
        return Specs(layer_order(config, stage.loops), stage.passes,
                     tuple(by_window[window] for window in stage.windows),
                     by_window[config.seq_len])

    def trunk(self, x, x0, specs):
        """One pass through the layers. x, x0 [B, T, D]"""
        config, skips = self.config, {}
        last = config.num_layers - 1
        for i in specs.layer_order:
            mirror = last - i
            if self.skip_lambdas is not None and i > mirror:     # U-Net (slowrun #17: -0.021)
                x = x + self.skip_lambdas[config.num_layers // 2 - 1 - mirror] * skips[mirror]
            if self.resid_lambdas is not None:
                x = self.resid_lambdas[i] * x
            if self.x0_lambdas is not None:
                x = x + self.x0_lambdas[i] * x0
            value = self.value_projs[str(i)](x0) if str(i) in self.value_projs else None
            x = self.drop_block(i, self.blocks[i](x, value, specs.attention[i]), x)
            if i < mirror:
                skips[i] = x
        return x

    def drop_block(self, i, y, x):
        """Block i's y, or in training its x at times: stochastic depth (slowrun #62: -0.003)."""
        probability = self.config.stochastic_depth * i / max(1, self.config.num_layers - 1)
        if not self.training or not probability:
            return y
        return torch.where(torch.rand((), device=x.device) >= probability, y, x)

    def forward(self, tokens, specs=None):
        """int64 [B, T] -> normalized final hidden states [B, T, D]; specs: the last stage's."""
        specs = specs or self.specs(length=tokens.shape[1])
        x = x0 = norm(self.wte(tokens).to(self.dtype))
        for _ in range(specs.passes - 1):       # full recurrence (slowrun #92: -0.005)
            with torch.no_grad():
                x = norm(self.trunk(x, x0, specs))
        return norm(self.trunk(x, x0, specs))

    def mtp_hidden(self, hidden, next_tokens, specs):
        """Hidden states that predict the token after next (DeepSeek's MTP). [B, T, D]
        hidden: what `forward(tokens)` returned; next_tokens: int64 [B, T], its targets."""
        following = norm(self.wte(next_tokens).to(self.dtype))
        x = self.mtp_proj(torch.cat((hidden, following), dim=-1))
        return norm(self.drop_block(self.config.num_layers, self.mtp_block(x, None, specs.mtp), x))

def num_parameters(module):
    return sum(p.numel() for p in module.parameters())

def flops_per_token(config, stage):
    """Training FLOPs a token: 6 a matmul parameter, 12 D a key that a query sees, each use."""
    def attention(window):                      # by the mean of the keys over a row
        keys = sum(min(position, window) + 1 for position in range(config.seq_len))
        return 12 * config.model_dim * keys / config.seq_len

    with torch.device("meta"):
        model = GPT(config)
    total = 6 * num_parameters(model.head)
    passes = 1 + (stage.passes - 1) / 3         # all but the last are forward only
    for i in layer_order(config, stage.loops):
        weights = num_parameters(model.blocks[i])
        if str(i) in model.value_projs:
            weights += num_parameters(model.value_projs[str(i)])
        total += passes * (6 * weights + attention(stage.windows[i]))
    if config.mtp_weight:
        modules = (model.mtp_block, model.mtp_proj, model.head)
        total += 6 * sum(num_parameters(module) for module in modules) + attention(config.seq_len)
    return total

def step_flops(config, teacher=None):
    """({stage: training FLOPs a token}, those of the forward of a teacher of Config `teacher`)."""
    teacher = replace(teacher or config, mtp_weight=0)
    last = training_stages(teacher)[-1]
    # a teacher's forward is a third of a step; 3 p - 2: all of its passes are forward only
    forward = flops_per_token(teacher, last._replace(passes=3 * last.passes - 2)) / 3
    return {stage: flops_per_token(config, stage) for stage in training_stages(config)}, forward

def is_distilled(config, number):
    """Whether member `number` (from 1) has a teacher; in tools/distill.py kd_from is 1."""
    return bool(config.kd_alpha) and number >= config.kd_from

def epochs_of(config, number):
    """Passes over the data of member `number` (from 1); students are patient (arXiv 2106.05237)."""
    return config.num_epochs * (config.kd_epoch_factor if is_distilled(config, number) else 1)

# ==== Loss ==============================================================================
class LossSpec(NamedTuple):
    """The loss of some tokens: (1 - alpha) * CE + alpha * T^2 * KL(teacher || student)."""
    target_weights: torch.Tensor    # [J]: of the next token and those after it, in CE
    alpha: float
    config: Config                  # T, softcap, vocabulary, chunk
    row: int = 0                    # tokens of a row that is remembered; 0: none is

def token_logits(hidden, weight, targets, config, row):
    """Logits of all that may come next: the vocabulary, [n, V] (its padding is -inf); what stands
    earlier in the row (TRIME, arXiv 2205.12674), [n, row]; and which token that is, int64 [n, row].
    hidden [n, D], of whole rows of `row` tokens (0: nothing is remembered), weight [V, D]. An
    earlier position i, with the logit h_t h_i / sqrt(D), stands for its target (int64 [n]), where
    it has one; -inf and -1 are nothing."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    if config.softcap:
        logits = config.softcap * torch.tanh(logits / config.softcap)
    is_token = torch.arange(len(weight), device=hidden.device) < config.vocab_size
    logits = torch.where(is_token, logits, -torch.inf)
    if not row:
        return logits, logits[:, :0], targets.unsqueeze(1)[:, :0]
    rows = hidden.view(-1, row, hidden.shape[1])
    similar = (rows @ rows.mT).to(logits.dtype).view(-1, row) * hidden.shape[1] ** -0.5
    earlier = torch.ones(row, row, dtype=torch.bool, device=hidden.device).tril(-1)
    seen = torch.where(earlier, targets.view(-1, 1, row), -1).view(-1, row)
    return logits, torch.where(seen >= 0, similar, -torch.inf), seen

def log_sum(logits, similar):
    """log(sum of exp) over the columns of both, [n, 1]."""
    return torch.logaddexp(torch.logsumexp(logits, dim=1, keepdim=True),
                           torch.logsumexp(similar, dim=1, keepdim=True))

def only_target(target, logits, similar, seen):
    """Of token_logits what stands for `target`, int64 [n, 1] (-1: junk): [n, 1] and [n, row]."""
    right = logits.gather(1, target.clamp(min=0))
    return right, torch.where(seen == target, similar, -torch.inf)

def loss_chunk(hidden, weight, targets, teacher, spec):
    """Loss and gradients of one chunk of tokens, the only ones whose [n, V] logits exist.
    hidden [n, D], weight [V, D], teacher: these two of the teacher, or None; targets int64 [n, J]:
    the next token and those after it (-1: none). Returns {name: sum} and the gradients for hidden
    and weight, by d(CE) / d(logits) = p - p(. | target), d(T^2 KL) / d(logits) = T (p_T - q_T)."""
    config, alpha, T = spec.config, spec.alpha, spec.config.kd_temperature
    logits, similar, seen = token_logits(hidden, weight, targets[:, 0], config, spec.row)
    log_all = log_sum(logits, similar)
    columns = torch.arange(len(weight), device=hidden.device)
    counted = targets[:, :1] >= 0
    ce, grad, grad_similar = [], 0, 0
    for j in range(targets.shape[1]):
        target = targets[:, j:j + 1]
        right, right_similar = only_target(target, logits, similar, seen)
        log_right = log_sum(right, right_similar)
        is_there = counted & (target >= 0)
        ce.append(torch.where(is_there, log_all - log_right, 0).sum())
        share = spec.target_weights[j] * is_there
        grad = grad + share * ((logits - log_all).exp() - torch.where(
            columns == target, (right - log_right).exp(), 0))
        grad_similar = grad_similar + share * (
            (similar - log_all).exp() - (right_similar - log_right).exp())
    sums = {"loss": sum(w * part for w, part in zip(spec.target_weights, ce)),
            "train_loss": ce[0], "kl": torch.zeros_like(ce[0])}
    if teacher is not None:
        taught = token_logits(*teacher, targets[:, 0], config, spec.row)[:2]
        sums["kl"], kl_grads = distillation((logits, similar), taught, counted, T)
        sums["loss"] = (1 - alpha) * sums["loss"] + alpha * T ** 2 * sums["kl"]
        grad = (1 - alpha) * grad + alpha * T * kl_grads[0]
        grad_similar = (1 - alpha) * grad_similar + alpha * T * kl_grads[1]
    if config.softcap:          # tanh's slope, 0 for the padding
        grad = grad * (1 - (logits.clamp(min=-config.softcap) / config.softcap) ** 2)
    grad = grad.to(hidden.dtype)
    of_hidden = grad @ weight
    if spec.row:
        rows = hidden.view(-1, spec.row, hidden.shape[1])
        grad_similar = (grad_similar * hidden.shape[1] ** -0.5).to(hidden.dtype)
        grad_similar = grad_similar.view(-1, spec.row, spec.row)
        of_hidden = of_hidden + ((grad_similar + grad_similar.mT) @ rows).view_as(hidden)
    return sums, of_hidden, grad.T @ hidden

def distillation(logits, teacher_logits, counted, T):
    """(sum of KL(teacher || student) at temperature T, T d(KL) / d(each of the logits), 0 where a
    token does not count). logits, teacher_logits: both of token_logits."""
    log_all = log_sum(*(z / T for z in logits))
    teacher_log_all = log_sum(*(z / T for z in teacher_logits))
    kl, grads = 0, []
    for z, teacher_z in zip(logits, teacher_logits):
        logp = z / T - log_all
        teacher_logp = teacher_z / T - teacher_log_all
        q = teacher_logp.exp()
        kl = kl + torch.where(counted & (q > 0), q * (teacher_logp - logp), 0).sum()
        grads.append(torch.where(counted, logp.exp() - q, 0))
    return kl, grads

class KnownGradient(torch.autograd.Function):
    """`loss`, whose gradients for hidden and weight have been computed with it."""
    @staticmethod
    def forward(ctx, hidden, weight, loss, grad_hidden, grad_weight):
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad, None, None, None

def add_sums(total, parts):
    """Add {name: tensor} to `total`, in place."""
    for name, part in parts.items():
        total[name] = total[name] + part if name in total else part

def chunked_loss(hidden, weight, targets, teacher, spec, chunk_function=loss_chunk):
    """Head, softcap, CE and KL over chunks of tokens, with the gradients made in the forward.
    No [tokens, vocabulary] tensor of the micro-batch ever exists (as in Liger Kernel).
    hidden [N, D], weight [V, D] fp32, targets [N, J], teacher: (hidden, weight) or None.
    Returns the loss, which has gradients, and {name: sum} over the counted tokens."""
    with torch.no_grad():
        sums = {}
        narrow = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        for start in range(0, len(hidden), spec.config.loss_chunk):
            rows = slice(start, start + spec.config.loss_chunk)
            taught = None if teacher is None else (teacher[0][rows], teacher[1])
            parts, grad_hidden[rows], grad = chunk_function(
                hidden[rows], narrow, targets[rows], taught, spec)
            grad_weight += grad
            add_sums(sums, parts)
    loss = KnownGradient.apply(hidden, weight, sums.pop("loss"), grad_hidden, grad_weight)
    return loss, sums

def target_logprobs(hidden, weight, targets, config):
    """log p(target), fp32 [N]. hidden [N, D], weight [V, D], targets int64 [N] (-1: junk)."""
    row = config.row_memory * config.seq_len
    logits, similar, seen = token_logits(hidden, weight, targets, config, row)
    right = only_target(targets.unsqueeze(1), logits, similar, seen)
    return (log_sum(*right) - log_sum(logits, similar)).squeeze(1)

# ==== Parameter table and optimizer =====================================================
POLAR_EXPRESS = (       # five steps for singular values in [1e-3, 1] (arXiv 2505.16932)
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

class ParameterRow(NamedTuple):
    """How the parameters whose whole name matches a pattern begin and how they are updated."""
    pattern: str
    init: tuple                 # kind and value, of initialize
    optimizer: str              # a key of OPTIMIZERS
    lr: float
    weight_decay: float
    betas: tuple = ()           # AdamW's
    shared_lr: float = 0.0      # of what strings have in common

def parameter_table(c):
    """Rows for all parameters of a GPT with Config c; each parameter matches just one."""
    betas = (0.8, 0.95)
    muon = ("muon", c.matrix_lr, c.weight_decay)
    gates = ("adamw", c.gate_lr, 0.0, (0.9, 0.99)) if c.gate_lr else muon
    # normal: -0.007 over zero at 100M tokens (slowrun #59)
    proj = ("normal", c.model_dim ** -0.5) if c.proj_init == "normal" else ("constant", 0.0)
    rows = "spelled" if c.spelling else "adamw"
    return [ParameterRow(*row) for row in (
        (r"wte\.weight", ("normal", 1.0), rows, c.embed_lr, c.weight_decay, betas,
         2 * c.embed_lr),       # twice: -0.024 on `cpu`
        (r"head\.weight", ("normal", 0.001), rows, c.head_lr, c.weight_decay, betas, c.head_lr),
        (r"resid_lambdas", ("constant", c.resid_init), "adamw", c.scalar_lr, 0.0, betas),
        (r"skip_lambdas", ("constant", 1.0), "adamw", c.scalar_lr, 0.0, betas),
        (r"x0_lambdas", ("constant", c.x0_init), "adamw", c.x0_lr, 0.0, (0.96, 0.95)),
        (r".*attn\.xsa", ("constant", 0.0), "adamw", 0.2, 0.0, (0.9, 0.95)),
        (r".*attn\.mix", ("identity", 1.0), "adamw", 0.02, 0.0, betas),
        (r".*attn\.gate\.weight", ("constant", 0.0), *gates),
        (r".*attn\.value_gate\.weight", ("constant", 0.0), *muon),
        (r".*\.proj\.weight", proj, *muon),
        (r".*(\.[qkv]|\.fc|mlp\.gate|value_projs\.\d+)\.weight", ("unit gain", 1.0), *muon),
        (r"mtp_proj\.weight", ("unit gain", 2 ** 0.5), *muon),      # as if of one input, not two
    )]

def find_row(table, name):
    """The row of the parameter `name`; ValueError if there is none, or more than one."""
    rows = [row for row in table if re.fullmatch(row.pattern, name)]
    if len(rows) != 1:
        raise ValueError(f"parameter {name} is in {len(rows)} rows of parameter_table")
    return rows[0]

def initialize(p, kind, value, generator):
    """Fill `p` as a row of the table says; "unit gain": uniform, of variance 1 / inputs."""
    if kind == "normal":
        p.normal_(0, value, generator=generator)
    elif kind == "unit gain":
        p.uniform_(-1, 1, generator=generator).mul_(value * (3 / p.shape[1]) ** 0.5)
    elif kind == "identity":
        p.copy_(value * torch.eye(p.shape[-1]).expand_as(p))
    else:
        p.fill_(value)

# What an update has beside parameters, gradients and state: learning rate, weight decay, the
# step (from 1), Muon's momentum, AdamW's betas, the Config, the dtype of matrix products, and
# features and weights of tokens.npz.
Rates = namedtuple("Rates", "lr shared_lr weight_decay step momentum betas config dtype features")

def polar_express(x):
    """Approximate polar factor U V^T of each matrix of x [n, rows, cols], in x's dtype."""
    x = x / (1.02 * x.norm(dim=(1, 2), keepdim=True) + 1e-6)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x

def neuron_axis(p):
    """The axis of [n, rows, cols] that NorMuon averages over: the shorter side's."""
    return 2 if p.shape[1] >= p.shape[2] else 1

def muon_state(p):
    second = torch.zeros_like(p).mean(dim=neuron_axis(p), keepdim=True)
    return {"momentum": torch.zeros_like(p), "second_moment": second}

def muon_update(p, grad, state, rates):
    """One step of Muon on the matrices p, grad [n, rows, cols], in place (p and state).
    Nesterov momentum, unit rows (MuonEq-R, slowrun #71), Polar Express, NorMuon's moment by
    neuron (arXiv 2510.05491), cautious weight decay (arXiv 2510.12402)."""
    config = rates.config
    decay = rates.weight_decay
    momentum = state["momentum"].lerp_(grad, 1 - rates.momentum)
    u = grad.lerp(momentum, rates.momentum)
    if config.muon_eq:
        u = u / u.norm(dim=2, keepdim=True).clamp(min=1e-7)
    x = polar_express(u.to(rates.dtype)).to(p.dtype)
    if config.normuon_beta2:
        second = x.square().mean(dim=neuron_axis(x), keepdim=True)
        second = state["second_moment"].lerp_(second, 1 - config.normuon_beta2)
        scaled = x * second.clamp(min=1e-10).rsqrt()
        length = scaled.norm(dim=(1, 2), keepdim=True).clamp(min=1e-10)
        x = scaled * (x.norm(dim=(1, 2), keepdim=True) / length)
    if config.cautious:
        decay = (x * p >= 0).to(p.dtype) * decay
    p -= rates.lr * max(1, x.shape[1] / x.shape[2]) ** 0.5 * (x + decay * p)

def adamw_state(p):
    return {"first_moment": torch.zeros_like(p), "second_moment": torch.zeros_like(p)}

def adamw_update(p, grad, state, rates):
    """One step of AdamW (decoupled decay first), in place (p and state)."""
    beta1, beta2 = rates.betas
    p *= 1 - rates.lr * rates.weight_decay
    first = state["first_moment"].lerp_(grad, 1 - beta1)
    second = state["second_moment"].lerp_(grad.square(), 1 - beta2)
    root = (second / (1 - beta2 ** rates.step)).sqrt() + ADAM_EPS
    p -= rates.lr / (1 - beta1 ** rates.step) * first / root

def spelled_state(p):
    return adamw_state(p) | {f"shared_{name}": zeros for name, zeros in adamw_state(p).items()}

def spelled_update(p, grad, state, rates):
    """AdamW of rows, and of what their tokens' strings have in common: features, each with the sum
    of its rows' gradients, whose updates their rows take as well. In place (p and state)."""
    adamw_update(p, grad, state, rates)
    shared, update = torch.zeros_like(p), torch.zeros_like(p)       # a row for each feature
    for feature, weight in zip(*rates.features):
        shared.index_add_(0, feature, weight * grad)
    moments = {name: state[f"shared_{name}"] for name in ("first_moment", "second_moment")}
    adamw_update(update, shared, moments, rates._replace(lr=rates.shared_lr))
    for feature, weight in zip(*rates.features):
        p += weight * update[feature]

# An update in place (p, grad, state, rates), the state that it needs (p -> {name: tensor}), and
# whether matrices of one shape are one p [n, rows, cols], with states of the same n.
OptimizerKind = namedtuple("OptimizerKind", "update new_state stacked")
OPTIMIZERS = {"muon": OptimizerKind(muon_update, muon_state, stacked=True),
              "spelled": OptimizerKind(spelled_update, spelled_state, stacked=False),
              "adamw": OptimizerKind(adamw_update, adamw_state, stacked=False)}

class ParameterGroup:
    """Parameters that one rank, their owner, updates as one; it alone has their state."""
    def __init__(self, row, named_parameters, owner, rank):
        self.row = row
        self.kind = OPTIMIZERS[row.optimizer]
        self.names = [name for name, _ in named_parameters]
        self.params = [p for _, p in named_parameters]
        self.owner = owner
        self.is_mine = owner == rank
        self.state = self.new_state() if self.is_mine else {}

    def new_state(self):
        return self.kind.new_state(self.stack(self.params))

    def stack(self, tensors):
        """One tensor of those of the parameters."""
        return torch.stack(tensors) if self.kind.stacked else tensors[0]

class MuonAdamW:
    """Muon for matrices, AdamW for the rest, shared out over the processes.
    Gradients must sum, not average, over processes to the gradient of the whole batch. Each
    group is summed for its owner, updated there, and sent to all."""
    def __init__(self, named_parameters, config, runtime=Runtime(), tables=None):
        self.config = config
        names = ("features", "weights") if config.spelling else ()
        self.features = [torch.from_numpy(tables[name]).to(runtime.device) for name in names]
        self.runtime = runtime
        self.steps = 0
        self.groups = []
        table = parameter_table(config)
        alike = {}              # what is updated alike, and if stacked has one shape
        for name, p in named_parameters:
            row = find_row(table, name)
            key = (*row[2:], p.shape if OPTIMIZERS[row.optimizer].stacked else name)
            alike.setdefault(key, (row, []))[1].append((name, p))
        for row, named in alike.values():
            for first in range(min(runtime.world_size, len(named))):
                part = named[first::runtime.world_size]
                owner = len(self.groups) % runtime.world_size
                self.groups.append(ParameterGroup(row, part, owner, runtime.rank))

    @torch.no_grad()
    def step(self, lr_multiplier, wd_multiplier, momentum):
        """One update from the parameters' .grad, which it clears. Returns this process's part of
        the square of the norm of the whole gradient, before it is clipped."""
        self.steps += 1
        gradients = []
        for group in self.groups:
            grad = group.stack([p.grad for p in group.params])
            self.runtime.reduce(grad, group.owner)
            gradients.append(grad)
            for p in group.params:
                p.grad = None
        square = sum(torch.linalg.vector_norm(grad).square() * group.is_mine
                     for group, grad in zip(self.groups, gradients))
        if self.config.grad_clip:
            length = self.runtime.all_reduce(square.clone()).sqrt()
            for grad in gradients:
                grad *= (self.config.grad_clip / (length + 1e-6)).clamp(max=1)
        updated = []
        for group, grad in zip(self.groups, gradients):
            row = group.row
            p = group.stack(group.params)
            if group.is_mine:
                rates = Rates(row.lr * lr_multiplier, row.shared_lr * lr_multiplier,
                              row.weight_decay * wd_multiplier, self.steps, momentum,
                              row.betas, self.config, self.runtime.dtype, self.features)
                group.kind.update(p, grad, group.state, rates)
            updated.append(p)
        for group, p in zip(self.groups, updated):      # not before: owners work side by side
            self.runtime.broadcast(p, group.owner)
            for old, new in zip(group.params, p if group.kind.stacked else [p]):
                old.copy_(new)
        return square

# ==== Schedules: pure functions of progress, the part of the steps that is done =========
def base_multiplier(config, progress):
    """Flat, then ((1 - progress) / warmdown) ** power down to the floor."""
    left = min(1.0, (1 - progress) / config.lr_warmdown) if config.lr_warmdown else 1.0
    return config.lr_floor + (1 - config.lr_floor) * left ** config.lr_power

def lr_multiplier(config, progress):
    """base_multiplier; in each of the last sawtooth_epochs a cosine from it to its floor."""
    base = base_multiplier(config, progress)
    epoch = round(progress * config.num_epochs, 9)      # 15.999999999999998 is 16
    if not config.sawtooth_epochs or epoch < config.num_epochs - config.sawtooth_epochs:
        return base
    floor = config.sawtooth_floor
    return floor + (max(base, floor) - floor) * (1 + math.cos(math.pi * (epoch % 1))) / 2

def piecewise_linear(points, progress):
    """Value at `progress` of points (progress, value); off, (), is 0."""
    return float(np.interp(progress, *zip(*points))) if points else 0.0

def momentum_at(config, step):
    """Muon's momentum rises linearly over the first momentum_steps steps."""
    done = min(1.0, step / config.momentum_steps) if config.momentum_steps else 1.0
    return config.momentum_start + (config.momentum - config.momentum_start) * done

def perturbation(config, member):
    """Noise on the weights that a member begins with, in std of each tensor (slowrun #90)."""
    done = (member - 2) / max(1, config.num_models - 2)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return config.perturb_end + (config.perturb_start - config.perturb_end) * cosine

# ==== Ensemble ==========================================================================
def mean_loss(logp):
    """Nats per token of log p(target) [n], summed in fp64."""
    return -float(np.mean(logp, dtype=np.float64))

def mixture_logp(logps, weights=None):
    """log p(target) of a mixture, fp64 [n], of k arrays [n]; weights [k], [k, n] or None: equal.
    It is the mixture of the probabilities: an ensemble takes one float a token and member."""
    weights = np.full(len(logps), 1 / len(logps)) if weights is None else np.asarray(weights)
    total = np.full(len(logps[0]), -np.inf)
    with np.errstate(divide="ignore"):
        for weight, logp in zip(np.log(weights), logps):
            np.logaddexp(total, weight + np.asarray(logp, np.float64), out=total)
    return total

def fit_mixture(logps, iterations=3000, tolerance=1e-5):
    """Weights [k] of the mixture that makes the targets of logps [k, n] most probable.
    Expectation maximization climbs the concave log likelihood without a learning rate (slowrun
    #90 descends) and stops when no weights can be better by `tolerance` nats a token."""
    p = np.exp(np.asarray(logps, dtype=np.float64) - np.max(logps, axis=0))
    weights = np.full(len(p), 1 / len(p))
    for _ in range(iterations):
        gain = np.mean(p / (weights @ p), axis=1)   # the duality gap is max(gain) - 1
        if gain.max() - 1 < tolerance:
            break
        weights = weights * gain
    return weights / weights.sum()

def learned_mixture(members):
    """({split: loss}, weights) of the mixture of `members` that is fitted on selection.
    members: a list of {split: log p(target)}."""
    logps = {split: [member[split] for member in members] for split in members[0]}
    weights = fit_mixture(logps["selection"])
    losses = {split: mean_loss(mixture_logp(parts, weights)) for split, parts in logps.items()}
    return losses, [round(float(w), 6) for w in weights]

def ensemble_curve(members):
    """One dict for each n: the losses of the mixtures of the first n members.
    members: [{split: log p(target)}]. Beyond 16 weights are fitted for powers of two and all."""
    curve, sums = [], {}
    for n, member in enumerate(members, 1):
        point = {"n": n}
        for split, logp in member.items():
            sums[split] = np.logaddexp(sums.get(split, -np.inf), logp.astype(np.float64))
            point[f"{split}_loss"] = mean_loss(sums[split]) + math.log(n)
        curve.append(point)
        if "selection" in member and (n <= 16 or n == len(members) or n & (n - 1) == 0):
            losses, point["weights_learned"] = learned_mixture(members[:n])
            for split, loss in losses.items():
                point[f"{split}_loss_learned"] = loss
    return curve

# ==== Files: tensors, identity, states ==================================================
# runs/<id>/run.json: settings and hashes of source and data, which tell what may go on there;
# lock: held while the run is under way; state.safetensors: what training goes on from; members/:
# weights of the finished ones, and their log p by split; tokenizer/: of the data.
class Stopped(Exception):
    """The run was asked to stop, and its state is saved. args: message, exit code."""

def write_whole(path, write):
    """Let `write` fill a file beside `path`, flush it to the disk, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    try:
        write(beside)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise

def write_json(path, value):
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))

def write_tensors(path, tensors, facts):
    """Write CPU `tensors` {name: tensor} and `facts` (JSON); OSError if it cannot be."""
    metadata = {"facts": json.dumps(facts)}
    try:
        write_whole(path, lambda beside: save_file(tensors, beside, metadata))
        path.chmod(0o644)       # safetensors lets nobody else read it
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path} cannot be written ({error})") from None

def read_tensors(path):
    """(tensors, facts) of write_tensors. UserError if the file is not whole."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, json.loads(file.metadata()["facts"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); delete it, and"
                        " the run trains again what it held") from None

def member_path(folder, member, kind=""):
    """Of a member's weights, or (kind=".logp") of its log p by split."""
    return folder / "members" / f"{member:03d}{kind}.safetensors"

def run_name(config, overrides):
    """Of a run without --run_id: track, what differs from it, seed: cpu_dropout0.2_seed3."""
    usual = {name: TRACKS[config.track].get(name, f.default) for name, f in FIELDS.items()}
    parts = [f"_{name}{as_text(value)}" for name, value in overrides.items()
             if name not in (*FREE, "seed") and value != usual[name]]
    name = config.track + re.sub(r"[^\w.-]+", "-", "".join(parts))
    name = name if len(name) <= 80 else name[:72] + hashlib.sha256(name.encode()).hexdigest()[:7]
    return f"{name}_seed{config.seed}"

def claim(config, overrides, hashes, runtime):
    """(folder, whether it had a run, lines on what has changed now, on all that has, the lock to
    hold on to). UserError, on all processes, if another is at it or the run was begun otherwise."""
    answer, lock = [None], None
    if runtime.is_main:
        folder = ROOT / config.runs_dir / (config.run_id or run_name(config, overrides))
        if not config.run_id and folder.exists():
            folder = folder.with_name(folder.name + time.strftime("_%Y-%m-%d_%H-%M-%S"))
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w", encoding="utf-8")
        try:        # the system lets go of it when this process ends, however it ends
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            answer = [(folder, *identify(config, folder, hashes))]
        except BlockingIOError:
            answer = [f"{folder}: this run is under way in another process; wait for it or"
                      " choose another --run_id"]
        except (ValueError, OSError) as error:      # UserErrors, a full disk, a torn run.json
            answer = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], str):
        raise UserError(answer[0])
    return *answer[0], lock

def identify(config, folder, hashes):
    """(whether there is a run, lines on what has changed now, lines on all that has since it was
    begun). UserError if it cannot go on."""
    path = folder / "run.json"
    now = {name: as_text(value) for name, value in asdict(config).items()
           if name not in (*FREE, "dataset")}         # wherever it lies: it has its hashes
    now |= {SOURCE.name: hashlib.sha256(SOURCE.read_bytes()).hexdigest(), **hashes}
    had_run = path.exists()
    before = json.loads(path.read_text(encoding="utf-8")) if had_run else dict(now)
    history = before.pop("changes", [])
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    changes = [f"{name}={now.get(name, 'gone')} (was {before.get(name)})" for name in changed]
    # members do not depend on how many come after them, unless their plan does
    is_longer = changed == ["num_models"] and int(before["num_models"]) < config.num_models
    is_longer = is_longer and not config.continue_members
    if (folder / "result.json").exists() and set(changed) <= {SOURCE.name}:
        return had_run, changes, history        # it is shown, whatever its source is by now
    if changes and not is_longer and not config.allow_changed:
        raise UserError(f"{folder}: its run was begun otherwise: {', '.join(changes)}; undo"
                        " that, choose another --run_id, or insist with --allow_changed=true")
    if changes:
        (folder / "result.json").unlink(missing_ok=True)
        done = len(list(folder.glob("members/*.logp.safetensors")))
        history = [*history, *(f"{change}, with {done} member(s) done" for change in changes)]
    write_json(path, now | {"changes": history})
    return had_run, changes, history

def remember_signals():
    """A list that SIGTERM and SIGINT are put into from here on."""
    received = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    return received

class States:
    """The state of a run: when it is due, written, read again."""
    def __init__(self, log, save_minutes, signals):
        self.log = log
        self.signals = signals
        self.save_seconds = 60 * save_minutes
        self.path = log.folder / "state.safetensors"
        self.last = time.monotonic()    # when a state was saved

    def requests(self, runtime):
        """(whether a state is due, whether to stop), alike on all processes; asked after readings,
        so that no sums wait to be read."""
        is_due = 0 < self.save_seconds <= time.monotonic() - self.last
        said = torch.tensor([float(is_due and self.log.is_main), float(len(self.signals))])
        return [number > 0 for number in runtime.all_reduce(said).tolist()]

    def save(self, tensors, facts):
        """Write the state (on the main process), while training waits."""
        if self.log.is_main:
            try:
                write_tensors(self.path, tensors, facts)
            except OSError as error:
                with contextlib.suppress(OSError):      # a disk too full for the log, too
                    self.log.say(f"warning   state not saved, the one before stays: {error}")
        self.last = time.monotonic()

def generator_of(device):
    """torch's own generator, which dropout draws from on `device`."""
    is_cuda = device.type == "cuda"
    return torch.cuda.default_generators[device.index] if is_cuda else torch.default_generator

# ==== Log and report ====================================================================
# Dense bf16 peak of a device, FLOP/s, by whole words of its name: NVIDIA's data sheets.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12,
              "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "GB200": 2500e12,
              "A100": 312e12, "L40S": 362e12, "RTX 5090": 209.5e12, "RTX 4090": 165.2e12}

def hardware_name(device):
    if device.type == "cuda":
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name(device)}"
    return f"{os.cpu_count()}-core {os.uname().machine.replace('_', '-')} CPU"

def peak_flops(device):
    """FLOP/s of one device, or None (MFU is n/a): unknown, or a slice or lesser namesake."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peaks = [peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)]
    return peaks[0] if peaks and not re.search(r"\b(MIG|Laptop|Max-Q|D)\b", name) else None

def peak_memory(device):
    """Bytes: allocated at most on the GPU, or resident at most in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

class Log:
    """Console, runs/<id>/log.txt and metrics.jsonl. Only the main process writes."""
    def __init__(self, folder, is_main):
        self.folder = folder
        self.is_main = is_main
        self.last = 0.0
        if is_main:
            self.text = open(folder / "log.txt", "a", encoding="utf-8")
            self.numbers = open(folder / "metrics.jsonl", "a", encoding="utf-8")

    def say(self, text, console=True):
        """A line for log.txt and the console."""
        if self.is_main:
            print(text, file=self.text, flush=True)
            if console:
                print(text, flush=True)

    def progress(self, text, always=False):
        """A line for the console, every PROGRESS_SECONDS."""
        now = time.monotonic()
        if self.is_main and (always or now - self.last > PROGRESS_SECONDS):
            print(text, flush=True)
            self.last = now

    def metrics(self, **numbers):
        """`key:value` pairs for log.txt, a line for metrics.jsonl.
        A run that was stopped repeats some steps: the last line of a step counts."""
        if self.is_main:
            self.say(" ".join(f"{name}:{value:.6g}" for name, value in numbers.items()), False)
            print(json.dumps(numbers), file=self.numbers, flush=True)

def percent(fraction):
    return f"{fraction:.1%}" if fraction else "n/a"

def minutes(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

def announce(trainer, data, log, overrides, had_run, changes):
    """Log what reproduces the run (source, versions, settings); tell what is about to run."""
    c, runtime = trainer.config, trainer.runtime
    if changes or not had_run:
        source = SOURCE.read_text(encoding="utf-8")
        log.say(f"{source}\n{'=' * 40} end of {SOURCE.name}", console=False)
    facts = dict(python=sys.version.split()[0], numpy=np.__version__, overrides=overrides,
                 threads=torch.get_num_threads(), data_sha256=data.hashes, **run_facts(trainer))
    for key, value in facts.items():
        log.say(f"{key}:{json.dumps(value)}", console=False)
    sets = " ".join(f"{name}={as_text(getattr(c, name))}" for name in TRACKS[c.track] | overrides)
    rows = Member(1, trainer, data).rows
    lengths = Counter(epochs_of(c, number) for number in range(1, c.num_models + 1))
    members = [f"{count} model(s) x {epochs} epochs" for epochs, count in lengths.items()]
    scored = [f"{split} {count_tokens(part):,}" for split, part in data.scored.items()]
    flops = " then ".join(dict.fromkeys(f"{count:.4g}" for count in trainer.flops.values()))
    for line in (
            f"track     {c.track}: {' and '.join(members)}",
            *textwrap.wrap(sets, 95, initial_indent="settings  ", subsequent_indent=" " * 10),
            f"data      {c.dataset}: {rows.tokens:,} tokens an epoch in {len(data.train)}"
            f" documents; {', '.join(scored)}",
            f"model     {num_parameters(trainer.model) / 1e6:.4g}M parameters,"
            f" {c.num_layers} blocks of width {c.model_dim}; {flops} FLOPs a token",
            f"steps     {rows.num_steps:,} in {epochs_of(c, 1)} epochs, of {c.batch_rows} rows x"
            f" {c.seq_len} = {c.batch_rows * c.seq_len:,} tokens; {runtime.world_size} process(es),"
            f" micro-batches of {trainer.micro_rows} row(s)",
            f"machine   {hardware_name(runtime.device)}; torch {torch.__version__},"
            f" {runtime.dtype}, attention {runtime.attention},"
            f" compile {'on' if runtime.compile else 'off'}",
            f"folder    {log.folder}", *data.notes, *runtime.notes,
            *(f"changed   {change}" for change in changes), ""):
        log.say(line)

def equivalent_tokens(loss, curve):
    """(D, sign): the tokens D at which a baseline curve [[D, loss], ...] reaches `loss`, linear
    between points that improve. Beyond the curve the sign is ">" or "<" and D the curve's end."""
    points = []
    for tokens, value in sorted(curve):
        if not points or value < points[-1][1]:
            points.append((tokens, value))
    tokens, losses = zip(*points)
    sign = "<" if loss > losses[0] else ">" if loss < losses[-1] else ""
    return float(np.interp(-loss, [-value for value in losses], tokens)), sign

def data_efficiency(loss, baseline, train_tokens):
    """{kind of BASELINES, and curve}: multiples of train_tokens, numbers or strings as "> 12.4"."""
    result = {**dict.fromkeys(BASELINES, "n/a"), "curve": baseline}
    for kind in BASELINES:
        if (baseline or {}).get(kind):
            tokens, sign = equivalent_tokens(loss, baseline[kind])
            multiple = round(tokens / train_tokens, 2)
            result[kind] = f"{sign} {multiple}" if sign else multiple
    return result

def summarize(config, data, members, curve):
    """What result.json says of an ensemble; val_loss is the declared number of ensemble_curve."""
    suffix = "" if config.final_mixture == "uniform" else "_" + config.final_mixture
    val_loss = curve[-1]["val_loss" + suffix]
    bits = val_loss / math.log(2) * (count_tokens(data.scored["val"]) - 1)
    return {
        "track": config.track, "final_mixture": config.final_mixture,
        "val_loss": val_loss, "selection_loss": curve[-1].get("selection_loss" + suffix),
        "holdout_loss": curve[-1]["holdout_loss" + suffix],
        "val_bpb": bits / data.val_bytes if data.val_bytes else None,
        "data_efficiency": data_efficiency(val_loss, data.meta.get("baseline"),
                                           config.train_tokens),
        "members": members, "ensemble": curve,
        "train_tokens": config.train_tokens, "data_sha256": data.hashes}

def run_facts(trainer):
    """What log and result.json say of what computes a run."""
    config, runtime = trainer.config, trainer.runtime
    return {"seed": config.seed, "processes": runtime.world_size, "torch": torch.__version__,
            "hardware": hardware_name(runtime.device), "config": asdict(config)}

def run_costs(trainer, members, peak_bytes):
    """What result.json says of a run's time, speed and memory."""
    config, flops = trainer.config, sum(member["train_flops"] for member in members)
    seconds = [member["train_seconds"] for member in members]
    speeds = [(member["tokens_per_second"], member["mfu"] or 0.0) for member in members]
    tokens_per_second, mfu = np.average(speeds, axis=0, weights=seconds)
    clocks = {f"{kind}_seconds": round(value, 3)
              for kind, value in trainer.clocks.seconds().items()}
    return {"train_seconds": round(sum(seconds), 3), **clocks, "peak_memory_bytes": peak_bytes,
            "tokens_per_second": round(tokens_per_second, 1), "mfu": round(mfu, 4) or None,
            "train_flops": flops, "over_limit": 0 < 60 * config.time_limit < sum(seconds)
            or 0 < config.flop_limit < flops}

def result_lines(result):
    """The table of members and ensembles, the declared number and what it cost."""
    columns = {"ensemble": "val_loss", "learned": "val_loss_learned", "holdout": "holdout_loss"}
    columns = {name: key for name, key in columns.items() if key in result["ensemble"][0]}
    header = "".join(f"{name:>10}" for name in columns)
    lines = [f" n    member{header}  (member n; ensembles of n)"]
    for member, point in zip(result["members"], result["ensemble"]):
        losses = "".join(f"  {point.get(key, math.nan):8.4f}" for key in columns.values())
        lines.append(f"{point['n']:2d}  {member['val_loss']:8.4f}{losses}")
    multiples = [f"{value}x {BASELINES[kind]}" for kind, value in result["data_efficiency"].items()
                 if kind in BASELINES and value != "n/a"]
    times = ", ".join(f"{kind} {minutes(result[f'{kind}_seconds'])}"
                      for kind in ("train", "compile", "eval", "wall"))
    return lines + [
        "", f"result           val loss {result['val_loss']:.4f} ({result['final_mixture']}"
        f" mixture), {result['val_bpb'] or math.nan:.4f} bits per byte, selection"
        f" {result['selection_loss'] or math.nan:.4f}, holdout {result['holdout_loss']:.4f}",
        f"data efficiency  {', '.join(multiples) or 'n/a'}",
        f"time             {times}{'; OVER the limit' * result.get('over_limit', 0)}",
        f"speed            {result.get('train_flops', math.nan):.3g} FLOPs,"
        f" {result['tokens_per_second']:,.0f} tokens/s, MFU {percent(result['mfu'])}, peak memory"
        f" {result['peak_memory_bytes'] / 2 ** 20:,.0f} MiB"]

# ==== Training ==========================================================================
class Clocks:
    """Seconds of a run, of its compilation and evaluation, beginning with earlier launches'."""
    def __init__(self, wall=0.0, compile=0.0, eval=0.0):
        self.start = time.perf_counter() - wall
        self.eval = eval
        self.compiled_before = 0.0
        self.compiled_before = compile - self.seconds()["compile"]

    def seconds(self):
        compiled = torch._dynamo.utils.calculate_time_spent()["total_wall_time"]
        return {"wall": time.perf_counter() - self.start,
                "compile": self.compiled_before + compiled, "eval": self.eval}

    def training(self):
        seconds = self.seconds()
        return seconds["wall"] - seconds["compile"] - seconds["eval"]

# What the losses of a step need beside models and tokens: Specs of the student, the LossSpec,
# the targets and second next targets of the whole batch, over all processes, and the progress.
StepPlan = namedtuple("StepPlan", "specs loss num_targets num_second progress")

class Trainer:
    """The models, optimizer and compiled functions that all members of a run share.
    Weights are copied into one student and one teacher: the next member compiles nothing."""
    def __init__(self, config, runtime, tables=None, teachers=None):
        self.config = config
        self.runtime = runtime
        self.tables = tables
        self.clocks = Clocks()
        self.micro_rows = micro_batch_rows(config, runtime.world_size)
        with runtime.device:
            self.model = GPT(config, runtime.dtype, runtime.attention)
        self.teacher, self.teachers = teachers or (None, [])    # a model, the weights it takes
        if config.kd_alpha:
            self.teacher = self.teacher or copy.deepcopy(self.model).to(runtime.dtype).eval()
            self.teacher_specs = self.teacher.specs()
        self.optimizer = None
        self.forward = runtime.compiled(GPT.forward, config.compile_model)
        self.mtp_hidden = runtime.compiled(GPT.mtp_hidden, config.compile_model)
        self.loss = functools.partial(chunked_loss, chunk_function=runtime.compiled(loss_chunk))
        self.logprobs = runtime.compiled(target_logprobs)
        self.stages = training_stages(config)
        self.specs = {stage: self.model.specs(stage) for stage in self.stages}
        self.last_specs = self.specs[self.stages[-1]]
        self.flops, self.teacher_flops = step_flops(config, teachers and self.teacher.config)

    @torch.no_grad()
    def start_member(self, number, seed, state=None):
        """Fresh weights and optimizer, or the last member's, perturbed (slowrun #90).
        state: of a run that is resumed, with the last member's optimizer if that is done."""
        config, runtime = self.config, self.runtime
        is_new = self.optimizer is None or not config.continue_members
        if is_new:
            self.optimizer = MuonAdamW(self.model.named_parameters(), config, runtime, self.tables)
        if config.continue_members and number > 1:
            if is_new and state and state[1]["number"] in (number - 1, number):
                restore_optimizer(state, self.optimizer)
            generator = torch.Generator(runtime.device).manual_seed(seed)
            for p in self.model.parameters():
                noise = torch.randn(p.shape, generator=generator, device=runtime.device)
                p += perturbation(config, number) * p.std(correction=min(1, p.numel() - 1)) * noise
        else:
            self.model.init_weights(seed)
        torch.manual_seed(7919 * seed + runtime.rank)       # dropout differs between ranks

    def add_teacher(self):
        """The model as it is teaches kd_teachers members to come (Fukuda 2017, Interspeech)."""
        if self.config.kd_alpha:
            weights = {name: p.to(self.runtime.dtype, copy=True)
                       for name, p in self.model.state_dict().items()}
            self.teachers = [*self.teachers, weights][-self.config.kd_teachers:]

    def gradients(self, inputs, targets, progress, distill):
        """Backward passes of this rank's rows; returns {name: its share of the batch's mean}.
        int64 [rows, T]; distill: there is a teacher. The loss is divided by the targets of the
        whole batch, so gradients add up over ranks."""
        config, runtime = self.config, self.runtime
        weights = [1.0]
        if config.second_weight or config.third_weight:
            weights.append(piecewise_linear(config.second_weight, progress))
            weights.append(piecewise_linear(config.third_weight, progress))
        plan = StepPlan(
            self.specs[stage_at(self.stages, progress)],
            LossSpec(torch.tensor(weights, device=runtime.device),
                     config.kd_alpha if distill else 0.0, config,
                     config.row_memory * config.seq_len),
            int((targets >= 0).sum()), max(1, int((targets[:, 1:] >= 0).sum())), progress)
        inputs = inputs.to(runtime.device)
        targets = targets.to(runtime.device)
        if config.meta_lr:
            return self.meta_gradient(inputs, targets, plan)
        mine = slice(runtime.rank, None, runtime.world_size)
        return self.backward(inputs[mine], targets[mine], plan)

    def meta_gradient(self, inputs, targets, plan):
        """First-order meta-gradient (slowrun #98: -0.012); else as `gradients`.
        Each virtual rank, 2 * meta_rows rows wherever they are computed, takes half of its
        gradient a step of norm meta_lr further on."""
        config, runtime = self.config, self.runtime
        sums = {}
        half = config.meta_rows
        decay = base_multiplier(config, plan.progress) if config.meta_decay else 1.0
        virtual_ranks = len(inputs) // (2 * half)
        for rank in range(runtime.rank, virtual_ranks, runtime.world_size):
            x = inputs[rank::virtual_ranks]
            y = targets[rank::virtual_ranks]
            before = [(p, p.grad) for p in self.model.parameters()]
            self.model.zero_grad()
            add_sums(sums, self.backward(x[:half], y[:half], plan))
            with self.adapted(config.meta_lr * decay):
                add_sums(sums, self.backward(x[half:], y[half:], plan))
            for p, grad in before:
                p.grad = p.grad if grad is None else grad.add_(p.grad)
        return sums

    @contextlib.contextmanager
    @torch.no_grad()            # but not what runs within
    def adapted(self, size):
        """Within: plastic weights are moved against their gradient, a step of norm `size`."""
        pattern = {"matrices": r"(?!wte|head).*weight", "mlp": r"blocks.*mlp.*weight"}
        pattern = pattern[self.config.meta_scope]
        plastic = [p for name, p in self.model.named_parameters()
                   if re.fullmatch(pattern, name) and p.grad is not None]
        saved = [p.detach().clone() for p in plastic]
        length = sum(p.grad.square().sum() for p in plastic).sqrt().clamp(min=1e-12)
        try:
            for p in plastic:
                p -= size / length * p.grad
            yield
        finally:
            for p, value in zip(plastic, saved):
                p.copy_(value)

    def backward(self, inputs, targets, plan):
        """Backward passes of rows, in micro-batches; returns {name: sum / num_targets}."""
        sums = {}
        for x, y in zip(inputs.split(self.micro_rows), targets.split(self.micro_rows)):
            hidden = self.forward(self.model, x, plan.specs)
            loss, parts = self.main_loss(hidden, x, y, plan)
            if self.config.mtp_weight:
                loss = loss + self.mtp_loss(hidden, x, y, plan)
            (loss / plan.num_targets).backward()
            add_sums(sums, {name: part / plan.num_targets for name, part in parts.items()})
        return sums

    def main_loss(self, hidden, inputs, targets, plan):
        """CE of the next token (and of later ones, by the same logits: slowrun #93) and KL.
        hidden [B, T, D], inputs and targets [B, T]. Returns the loss and {name: sum}."""
        teacher = None
        if plan.loss.alpha:         # slowrun #31: -0.085 in the first generation
            with torch.no_grad():
                taught = self.forward(self.teacher, inputs, self.teacher_specs).flatten(0, 1)
            teacher = (taught, self.teacher.head.weight.to(self.runtime.dtype))
        ahead = [shift(targets, j) for j in range(len(plan.loss.target_weights))]
        ahead = torch.stack(ahead, dim=2).flatten(0, 1)
        return self.loss(hidden.flatten(0, 1), self.model.head.weight, ahead, teacher, plan.loss)

    def mtp_loss(self, hidden, inputs, targets, plan):
        """CE of the second next token of a row, by one more block (slowrun #65)."""
        following = torch.cat((inputs[:, 1:], targets[:, -1:].clamp(min=0)), dim=1)
        ahead = self.mtp_hidden(self.model, hidden, following, plan.specs)
        spec = LossSpec(torch.ones(1, device=targets.device), 0.0, self.config)
        loss, _ = self.loss(ahead.flatten(0, 1), self.model.head.weight,
                            shift(targets, 1).view(-1, 1), None, spec)
        weight = (1 - plan.loss.alpha) * self.config.mtp_weight
        return weight * loss * (plan.num_targets / plan.num_second)

    def score_splits(self, data, splits=None, specs=None):
        """{split: log p(target)} of the model as it is; None: of all splits, in the last stage."""
        self.runtime.synchronize()
        start = self.clocks.training()
        self.model.eval()
        scores = {split: self.score(np.concatenate(data.scored[split]).astype(np.int64),
                                    data.bos, specs)
                  for split in (data.scored if splits is None else splits)}
        self.model.train()
        self.clocks.eval += self.clocks.training() - start
        return scores

    @torch.no_grad()
    def score(self, tokens, bos, specs=None):
        """log p(target) of all but the first of int64 `tokens` [n]: fp32 [n - 1].
        Rows overlap by one token: each is scored exactly once, whatever the world size."""
        config, runtime = self.config, self.runtime
        size = config.device_batch_size
        count = math.ceil((len(tokens) - 1) / config.seq_len)
        share = math.ceil(count / (runtime.world_size * size)) * size       # rows of each rank
        padded = np.full(runtime.world_size * share * config.seq_len + 1, bos)
        padded[:len(tokens)] = tokens
        inputs = torch.from_numpy(padded[:-1]).view(-1, config.seq_len)
        targets = torch.from_numpy(padded[1:]).view(-1, config.seq_len)
        parts = []
        weight = self.model.head.weight.to(runtime.dtype)
        for row in range(runtime.rank * share, (runtime.rank + 1) * share, size):
            x = inputs[row:row + size].to(runtime.device)
            y = targets[row:row + size].to(runtime.device).flatten()
            hidden = self.forward(self.model, x, specs or self.last_specs).flatten(0, 1)
            for h, t in zip(hidden.split(config.loss_chunk), y.split(config.loss_chunk)):
                parts.append(self.logprobs(h, weight, t, config))
        logp = runtime.all_gather(torch.cat(parts)).cpu().numpy().astype(np.float32)
        return logp[:len(tokens) - 1]

def shift(targets, ahead):
    """targets [B, T] of the token `ahead` later, -1 where the row has none."""
    return F.pad(targets[:, ahead:], (0, ahead), value=-1)

def micro_batch_rows(config, world_size):
    """Rows of a micro-batch. UserError if the batch cannot be shared out evenly."""
    unit = world_size * (2 * config.meta_rows if config.meta_lr else 1)
    rows = config.batch_rows
    if rows % unit:
        raise UserError(f"--batch_rows={rows} must be a multiple of {unit} with {world_size}"
                        f" process(es): {max(1, round(rows / unit)) * unit} is")
    most = config.meta_rows if config.meta_lr else config.batch_rows // world_size
    return min(config.device_batch_size, most)

class Member:
    """What one member's training holds beside weights, optimizer and random generators.
    config: the run's, with the member's own num_epochs."""
    counters = ("number", "start", "step", "train_loss", "flops", "ends")   # that a state keeps

    def __init__(self, number, trainer, data):
        config = replace(trainer.config, num_epochs=epochs_of(trainer.config, number))
        self.config = config
        self.number = number
        self.seed = 1000 * config.seed + number
        self.distill = is_distilled(config, number)
        self.rows = Rows(data.train, config.seq_len, config.batch_rows, config.num_epochs,
                         self.seed, data.bos, data.tables.get("pairs"), config.split_tokens)
        self.start = trainer.clocks.training()      # seconds, since the run was begun
        self.step = 0               # steps that are done
        self.flops = 0.0            # of these
        self.recent = {}            # name: mean losses of the steps since the last reading
        self.train_loss = math.nan  # of the last reading
        self.ends = 0               # ends of epochs that are averaged
        self.average = {}           # sum of what is averaged

    def check_finite(self, what, value):
        if not math.isfinite(value):
            raise FloatingPointError(f"member {self.number}, step {self.step}: {what} is not"
                                     " finite; lower --matrix_lr, --embed_lr or --head_lr")

def train_member(number, trainer, data, log, states=None, state=None):
    """Train member `number` (from 1) in trainer.model, taught by trainer.teachers.
    state: of States, to go on from if it is of this member. Returns facts, {split: log p}."""
    config = trainer.config
    member = Member(number, trainer, data)
    trainer.start_member(number, member.seed, state)
    if state and state[1]["number"] == number:
        restore_state(state, trainer, member)
        log.say(f"resumed   member {number} after step {member.step}")
    while member.step < member.rows.num_steps:
        train_step(trainer, member)
        scored = end_epoch(trainer, member, data)
        if scored is None and member.step % config.log_steps:
            continue
        read_losses(trainer, member, log, scored)
        is_due, is_stopped = states.requests(trainer.runtime) if states else (False, False)
        if states and (is_due or is_stopped or member.step == member.rows.num_steps):
            states.save(*collect_state(trainer, member))
        if is_stopped:
            trainer.runtime.all_reduce(torch.zeros(1))  # torchrun ends all when the first one ends
            raise Stopped(f"stopped   member {number} after step {member.step}; the same"
                          f" command goes on, with --run_id={log.folder.name}",
                          128 + (states.signals or [signal.SIGTERM])[0])
    trainer.runtime.synchronize()
    facts = member_facts(trainer, member)
    scores = final_scores(trainer, member, data)
    return facts | {f"{split}_loss": mean_loss(logp) for split, logp in scores.items()}, scores

def train_step(trainer, member):
    """One step of the optimizer."""
    config, rows = member.config, member.rows
    progress = member.step / rows.num_steps
    inputs, targets = rows.step(member.step)
    if member.distill:
        random = np.random.default_rng((member.seed, member.step))
        weights = trainer.teachers[random.integers(len(trainer.teachers))]
        trainer.teacher.load_state_dict(weights, assign=True)
    sums = trainer.gradients(inputs, targets, progress, member.distill)
    sums["grad_square"] = trainer.optimizer.step(
        lr_multiplier(config, progress), piecewise_linear(config.wd_schedule, progress),
        momentum_at(config, member.step))
    for name, mean in sums.items():
        member.recent.setdefault(name, []).append(mean)
    flops = trainer.flops[stage_at(trainer.stages, progress)]
    flops += member.distill * trainer.teacher_flops
    member.flops += flops * rows.batch_rows * rows.seq_len
    member.step += 1

def member_facts(trainer, member):
    """Seconds of training, tokens/s and MFU (None: unknown peak) of all devices."""
    seconds = max(1e-9, trainer.clocks.training() - member.start)
    tokens = member.step * member.rows.batch_rows * member.rows.seq_len
    peak = peak_flops(trainer.runtime.device)
    mfu = member.flops / seconds / peak / trainer.runtime.world_size if peak else None
    return {"train_loss": member.train_loss, "train_seconds": round(seconds, 3),
            "train_flops": member.flops, "tokens_per_second": round(tokens / seconds, 1),
            "mfu": mfu and round(mfu, 4)}

def read_losses(trainer, member, log, scored):
    """Read the means of the last steps (which waits for the device); log them, and progress.
    scored: of end_epoch. The gradient's norm is the root of its mean square."""
    config, runtime, rows = member.config, trainer.runtime, member.rows
    means = torch.stack([torch.stack(values).mean() for values in member.recent.values()])
    losses = dict(zip(member.recent, runtime.all_reduce(means).tolist()))
    member.recent = {}
    losses |= {"grad_norm": losses.pop("grad_square") ** 0.5, **(scored or {})}
    member.train_loss = losses["train_loss"]
    member.check_finite("the loss", member.train_loss)
    facts = member_facts(trainer, member)
    epoch = min(rows.epoch_of(member.step), config.num_epochs)
    log.metrics(member=member.number, step=member.step, epoch=round(epoch, 3), **losses,
                lr_multiplier=lr_multiplier(config, (member.step - 1) / rows.num_steps),
                tokens_per_second=facts["tokens_per_second"],
                seconds=round(trainer.clocks.seconds()["wall"], 3))
    a_step = facts["train_seconds"] / member.step
    left = a_step * (rows.num_steps - member.step)
    later = a_step * rows.num_steps / config.num_epochs * sum(
        epochs_of(trainer.config, k) for k in range(member.number + 1, config.num_models + 1))
    kl = f"  kl {losses['kl']:.3f}" if losses["kl"] else ""
    selection = f"  selection {scored['selection_loss']:.3f}" if scored else ""
    log.progress(
        f"member {member.number}/{config.num_models}  step {member.step}/{rows.num_steps} "
        f" epoch {epoch:.1f}/{config.num_epochs}  loss {member.train_loss:.3f}{kl}{selection} "
        f" {facts['tokens_per_second']:,.0f} tok/s  MFU {percent(facts['mfu'])}  left"
        f" {minutes(left)}, run {minutes(left + later)}", always=scored is not None)

def end_epoch(trainer, member, data):
    """If a step ends an epoch: {"selection_loss"} of the stage that was trained, or {}; and what
    the last epochs add to the average: weights, or probabilities of the targets. Else None."""
    config, rows = member.config, member.rows
    epoch = math.floor(rows.epoch_of(member.step))
    if epoch == math.floor(rows.epoch_of(member.step - 1)):
        return None
    averaged = config.average if epoch > config.num_epochs - config.average_epochs else ""
    if averaged == "probs":
        scores = trainer.score_splits(data)
        values = {split: torch.from_numpy(logp).double().exp() for split, logp in scores.items()}
    else:
        stage = stage_at(trainer.stages, (member.step - 1) / rows.num_steps)
        scores = trainer.score_splits(data, {"selection"} & set(data.scored), trainer.specs[stage])
    if averaged == "weights":
        values = {name: p.detach().cpu() for name, p in trainer.model.named_parameters()}
    if averaged:
        member.ends += 1
        weight = member.ends if config.average_recency else 1
        add_sums(member.average, {name: weight * value for name, value in values.items()})
    return {"selection_loss": mean_loss(scores["selection"])} if "selection" in scores else {}

def final_scores(trainer, member, data):
    """{split: log p(target)} of what the member ends as; the model gets averaged weights."""
    total = sum(range(member.ends + 1)) if trainer.config.average_recency else member.ends
    means = {name: value / total for name, value in member.average.items()}
    if trainer.config.average == "probs":
        return {split: p.log().float().numpy() for split, p in means.items()}
    trainer.model.load_state_dict(means)
    return trainer.score_splits(data)

def collect_state(trainer, member):
    """(tensors on the CPU, facts) that a member's training goes on from, of all processes."""
    runtime, optimizer = trainer.runtime, trainer.optimizer
    tensors = {f"model.{name}": p.detach() for name, p in trainer.model.named_parameters()}
    member.check_finite("a weight", float(sum(p.sum() for p in tensors.values())))
    tensors |= {f"average.{name}": value for name, value in member.average.items()}
    random = generator_of(runtime.device).get_state()
    tensors["random"] = runtime.all_gather(random.unsqueeze(0).to(runtime.device))
    for group in optimizer.groups:
        for kind, state in (group.state or group.new_state()).items():
            runtime.broadcast(state, group.owner)
            for name, part in zip(group.names, state if group.kind.stacked else [state]):
                tensors[f"{kind}.{name}"] = part
    if runtime.is_main:
        tensors = {name: tensor.to("cpu", copy=True).contiguous()
                   for name, tensor in tensors.items()}
    facts = {**{name: getattr(member, name) for name in member.counters},
             "world_size": runtime.world_size, "optimizer_steps": optimizer.steps,
             "clocks": trainer.clocks.seconds()}
    return tensors, facts

def restore_state(state, trainer, member):
    """Put a state of collect_state into trainer and member."""
    tensors, facts = state
    runtime, device = trainer.runtime, trainer.runtime.device
    trainer.model.load_state_dict(named("model.", tensors))
    restore_optimizer(state, trainer.optimizer)
    for name in member.counters:
        setattr(member, name, facts[name])
    member.average = named("average.", tensors)
    trainer.clocks = Clocks(**facts["clocks"])
    if facts["world_size"] == runtime.world_size:
        generator_of(device).set_state(tensors["random"][runtime.rank].clone())
    else:
        torch.manual_seed(7919 * (1000 * member.number + member.step) + runtime.rank)

def restore_optimizer(state, optimizer):
    """Put the optimizer's part of a state into it."""
    tensors, facts = state
    optimizer.steps = facts["optimizer_steps"]
    for group in optimizer.groups:
        for kind, held in group.state.items():
            held.copy_(group.stack([tensors[f"{kind}.{name}"] for name in group.names]))

def named(prefix, tensors):
    """{rest of the name: tensor} of those whose names begin with `prefix`."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
            if name.startswith(prefix)}

# ==== The run ===========================================================================
def train_members(trainer, data, log, states):
    """Train the members that are not finished; returns their facts and (main) their scores."""
    config = trainer.config
    state = read_tensors(states.path) if states.path.exists() else None
    members, scores, total = [], [], -np.inf
    for number in range(1, config.num_models + 1):
        was_done = is_finished(log.folder, number)
        last_taught = min(number + config.kd_teachers, config.num_models)
        is_needed = number < last_taught and not is_finished(log.folder, last_taught)
        if was_done:
            logp, facts = read_tensors(member_path(log.folder, number, ".logp"))
            logp = {split: values.numpy() for split, values in logp.items()}
            trainer.clocks = Clocks(**facts["clocks"])
            if is_needed:
                weights, _ = read_tensors(member_path(log.folder, number))
                trainer.model.load_state_dict(weights)
        else:
            facts, logp = train_member(number, trainer, data, log, states, state)
            facts["clocks"] = trainer.clocks.seconds()
        if is_needed:
            trainer.add_teacher()
        members.append(facts)
        if log.is_main:
            scores.append(logp)
            total = np.logaddexp(total, logp["val"].astype(np.float64))
            mixed = mean_loss(total) + math.log(number)
            if not was_done:
                log.metrics(member=number, val_loss=facts["val_loss"], ensemble_val_loss=mixed)
                save_member(number, trainer, log.folder, facts, logp)
            log.say(f"member {number}/{config.num_models} {'was ' * was_done}done in"
                    f" {minutes(facts['train_seconds'])}: val loss {facts['val_loss']:.4f},"
                    f" ensemble of {number}: {mixed:.4f}")
    return members, scores

def save_member(number, trainer, folder, facts, logp):
    """Write a member's weights, then its scores: with these it is finished."""
    weights = {name: p.detach().cpu().contiguous()
               for name, p in trainer.model.named_parameters()}
    write_tensors(member_path(folder, number), weights, {})
    write_tensors(member_path(folder, number, ".logp"),
                  {split: torch.from_numpy(p) for split, p in logp.items()}, facts)

def is_finished(folder, number):
    return all(member_path(folder, number, kind).exists() for kind in ("", ".logp"))

def keep_tokenizer(data, folder):
    """Copy what turns tokens into text, so that a run's folder can do without its dataset."""
    ranks = data.folder / data.meta.get("ranks", "ranks.tiktoken")
    if ranks.is_file():
        write_whole(folder / ranks.name, lambda beside: beside.write_bytes(ranks.read_bytes()))
        write_json(folder / "meta.json", {name: value for name, value in data.meta.items()
                                          if isinstance(value, (str, int))})

def run(config, overrides, teachers=None):
    """Train the members, write the run's folder. teachers: of another run (tools/distill.py)."""
    runtime = start_runtime(config)
    micro_batch_rows(config, runtime.world_size)
    config = replace(config, dtype=str(runtime.dtype).removeprefix("torch."))
    data = load_dataset(dataset_folder(config), config)
    hashes = data.hashes | (teachers[2] if teachers else {})
    folder, had_run, changes, history, lock = claim(config, overrides, hashes, runtime)
    log = Log(Path(os.path.relpath(folder)), runtime.is_main)   # a log may be published
    path = folder / "result.json"
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        if runtime.is_main:
            print("\n".join([f"{folder}: this run is finished", *(f"changed   {change}"
                             for change in changes), "", *result_lines(result)]))
        return
    trainer = Trainer(config, runtime, data.tables, teachers and teachers[:2])
    announce(trainer, data, log, overrides, had_run, changes)
    states = States(log, config.save_minutes, remember_signals())
    members, scores = train_members(trainer, data, log, states)
    memory = torch.tensor([peak_memory(runtime.device)], device=runtime.device)
    memory = int(runtime.all_gather(memory).max())
    if runtime.is_main:
        result = {**summarize(config, data, members, ensemble_curve(scores)),
                  "overrides": overrides, "changes": history,
                  **run_costs(trainer, members, memory),
                  **run_facts(trainer)}
        keep_tokenizer(data, log.folder / "tokenizer")
        log.say("RESULT " + json.dumps(result), console=False)
        write_json(path, result)            # with it the run is finished
        states.path.unlink(missing_ok=True)
        for line in ("", *result_lines(result), f"folder           {log.folder}"):
            log.say(line)

def report_error(error):
    """Say an error to a person; returns the exit code (2, or 128 + a signal that stopped the run),
    None if it is a defect of ours. A machine's first process speaks, or who alone can know."""
    code, rank = 2, os.environ.get("RANK", "0")
    message = "error: " + " ".join(str(error).split())
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        message, code = error.args or ("stopped at once; what was saved last goes on", 130)
    elif isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate mem" in message:
        message = ("error: out of memory; lower --device_batch_size, then --loss_chunk, and the run"
                   " goes on from its last state")
    elif "loading state_dict" in message:       # after --allow_changed
        message = "error: the run's files are of another model; choose another --run_id"
    elif isinstance(error, RuntimeError) and "WORLD_SIZE" in os.environ and re.search(
            r"gloo|NCCL|Connection (closed|reset)|[Tt]imed out|timeout|peer", message):
        message = (f"error: rank {rank} lost another process or waited for it too long; start"
                   f" the same command again ({message[7:160]})")
    elif not isinstance(error, (UserError, OSError, FloatingPointError)):
        return None
    shared = (UserError, Stopped, KeyboardInterrupt, FloatingPointError)
    if os.environ.get("LOCAL_RANK", "0") != "0" and isinstance(error, shared):
        time.sleep(1)       # torchrun ends all when the first one ends: not before it has spoken
    else:
        print(message, file=sys.stderr)
    return code

def main(argv=None):
    """Run a command; returns the exit code: 0, 2 (a person can mend it), 128 + a signal."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        command = "train"
        if arguments and not arguments[0].startswith("-"):
            command = arguments.pop(0)
            check_name(command, ("train", "check"), "command")
        values = parse_arguments(arguments)
        processes, track = plan_launch(values.get("device", "auto"), command)
        config = make_config(values.pop("track", track), **values)
        if command == "train":
            run(config, {name: getattr(config, name) for name in values})
            if dist.is_initialized():
                dist.barrier()      # the main process mixes and writes for all
        else:                   # what run.sh asks before it launches
            print(f"track {config.track}, processes {processes}")
            micro_batch_rows(config, processes)
            data = load_dataset(dataset_folder(config), config)
            print("\n".join([*data.notes, "settings and data are sound"]))
        return 0
    except (Exception, KeyboardInterrupt) as error:
        code = report_error(error)
        if code is None:        # a defect: its traceback is wanted
            raise
        return code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    exit_code = main()
    if "WORLD_SIZE" in os.environ:      # Python's own end may be aborted by threads of gloo
        sys.stdout.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
