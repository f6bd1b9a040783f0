"""Train an ensemble of GPTs, each distilled from the one before, on a fixed budget of tokens.

The regime is "data is fixed, compute is not" (the NanoGPT Slowrun): at most `train_tokens` tokens
may be seen, as often as one likes, and the lowest loss on unseen text wins.

    ./run.sh                                            set up, pick a track, get its data, run
    torchrun --nproc_per_node=8 train_gpt.py --track=limited        8 GPUs
    python train_gpt.py --track=cpu --num_models=2                  one device, one field changed
    python train_gpt.py baseline --track=cpu            the plain models that we compare against
    python train_gpt.py sample --run_id=NAME --prompt="It was"      text from a finished run
    python train_gpt.py check --track=mini              validate settings and data, train nothing
    python train_gpt.py --help                          every field: default, unit, meaning

Rules of a record: the result is one number declared in advance (the mixture of all members after
their last step), never a minimum over evaluations. Choices are made on `selection`, whole documents
cut from the training budget; `val` is for comparison between runs, `holdout` is shown once, at the
end. The log begins with this source and reproduces the run.
This file is read from top to bottom and has at most 1,600 lines.
"""
import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

# ==== Config and tracks =========================================================================
ROOT = Path(__file__).resolve().parent


class UserError(Exception):
    """Something a person can mend: what, where, what to do, in one line. Exit code 2."""


def refuse(problems):
    """UserError with the message of the first of `problems`, (is_wrong, message), that is wrong."""
    for is_wrong, message in problems:
        if is_wrong:
            raise UserError(message)


def opt(default, meaning):
    """A field of Config with its unit and meaning, which --help prints."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Config:
    """Every tunable number of a run. The defaults are what the tracks share; 0 or false is off."""
    track: str = opt("cpu", "name of a track; the table TRACKS says what it changes")
    preset: str = opt("", "toy: shrink any track to seconds on a CPU, its techniques left on")
    run_id: str = opt("", "name of the folder under runs_dir; empty: track, date and time")
    runs_dir: str = opt("runs", "folder of the runs")
    seed: int = opt(1, "of init, order and dropout; members and ranks derive theirs from it")
    device: str = opt("auto", "cuda, mps or cpu; auto: the first of them that is there")
    dtype: str = opt("auto", "bfloat16 or float32, of matrix products; auto: bfloat16 if fast")
    compile: bool = opt(True, "use torch.compile (where a compiler is found)")
    prompt: str = opt("", "text that the command `sample` continues")
    log_steps: int = opt(5, "steps between readings of the loss, each a line of metrics.jsonl")
    log_seconds: float = opt(5.0, "seconds between progress lines when not on a terminal")

    # ---- data
    dataset: str = opt("data/fineweb", "folder of *_train_*.bin, *_val_*.bin and meta.json")
    train_tokens: int = opt(100_000_000, "tokens, the whole data budget, selection included")
    selection_tokens: int = opt(132_000, "tokens, whole documents cut from the front of train")
    eval_tokens: int = opt(0, "tokens of val and of holdout that are scored; 0: all")
    vocab_size: int = opt(50257, "tokens of the dataset's vocabulary (its shards must agree)")
    seq_len: int = opt(2048, "tokens a row")
    batch_rows: int = opt(256, "rows a step, over all devices")
    device_batch_size: int = opt(4, "rows a micro-batch on one device; lower it on out of memory")

    # ---- ensemble
    num_models: int = opt(1, "members, trained one after the other")
    num_epochs: int = opt(11, "passes over the training tokens, each member")
    first_epochs: int = opt(0, "passes of the first member; 0: num_epochs")
    include_first: bool = opt(True, "keep the first, undistilled member in the ensemble")
    final_mixture: str = opt("uniform", "uniform or learned (on selection): the declared result")
    kd_alpha: float = opt(0.0, "weight of the distillation loss from member k-1, 0 to 1")
    kd_temperature: float = opt(1.0, "temperature T of the distillation loss; it gets T*T")

    # ---- model
    num_layers: int = opt(30, "blocks")
    model_dim: int = opt(1792, "width of the residual stream")
    num_heads: int = opt(14, "attention heads; must divide model_dim")
    mlp_multiple: int = opt(256, "the MLP's hidden width, 8/3 model_dim, is rounded up to it")
    swiglu: bool = opt(True, "SwiGLU MLP; off: squared ReLU of width 4 model_dim")
    resid_init: float = opt(1.0, "initial r of x <- r x + a x0 before each block; 0: no r")
    x0_init: float = opt(0.1, "initial a of x <- r x + a x0 (x0: the embedding); 0: no a")
    unet: bool = opt(True, "learned skips from each early layer to its mirror image")
    value_projections: bool = opt(True, "in every second layer values also come from x0, gated")
    attn_gate: bool = opt(True, "a gate per attention head, read from the first 12 channels")
    qk_norm: bool = opt(True, "RMS-normalize queries and keys after the rotation")
    rope_base: float = opt(10000.0, "base of the rotary position embedding; 0: none")
    window_pattern: str = opt("SSSL", "windows by layer, S = seq_len/2, L = seq_len; last is L")
    loop_start: int = opt(0, "first of the layers that are run repeatedly, counted from 0")
    loop_end: int = opt(0, "last of the layers that are run repeatedly")
    loop_count: int = opt(1, "times that loop_start..loop_end are run; 1: no looping")
    loop_from_epoch: int = opt(0, "epoch, counted from 0, in which looping begins")
    softcap: float = opt(10.0, "logits are c*tanh(z/c); 0: not capped")
    proj_init: str = opt("normal", "output projections of attention and MLP: normal or zero")
    mtp_weight: float = opt(0.0, "weight of the second-next-token loss (one extra block)")

    # ---- optimizer and regularization
    matrix_lr: float = opt(0.01, "Muon's learning rate, all matrices of the blocks")
    embed_lr: float = opt(0.0375, "AdamW's learning rate, embedding")
    head_lr: float = opt(0.0005, "AdamW's learning rate, output head")
    x0_lr: float = opt(0.025, "AdamW's learning rate, the a of x0_init")
    scalar_lr: float = opt(0.00025, "AdamW's learning rate, the r of resid_init and the skips")
    weight_decay: float = opt(1.3, "of matrices, embedding and head; a step takes lr*wd*w off")
    momentum: float = opt(0.95, "Muon's momentum")
    momentum_start: float = opt(0.85, "Muon's momentum at the first step")
    momentum_steps: int = opt(300, "steps in which the momentum rises to its value; 0: at once")
    muon_eq: bool = opt(True, "MuonEq-R: rows to unit length before orthogonalization")
    normuon_beta2: float = opt(0.95, "NorMuon's second moment by neuron; 0: plain Muon")
    cautious: bool = opt(True, "decay only weights that the update does not push outwards")
    dropout: float = opt(0.1, "after the output projections of attention and MLP")
    lr_warmup: float = opt(0.0, "fraction of the steps in which lr rises linearly from 0")
    lr_warmdown: float = opt(0.2, "fraction of the steps, at the end, in which lr falls")
    lr_power: float = opt(0.5, "the warmdown's exponent: 1 linear, 0.5 square root")
    lr_floor: float = opt(0.0, "lr at the end as a fraction of its peak")
    wd_schedule: str = opt("0:1", "progress:multiplier,... of weight_decay, linear in between")
    loss_chunk: int = opt(2048, "tokens whose logits are in memory at once")

    @property
    def padded_vocab(self):
        """Rows of embedding and head: a multiple of 64, for the hardware and for sharding."""
        return -(-self.vocab_size // 64) * 64

    @property
    def mlp_dim(self):
        units = -(-8 * self.model_dim // (3 * self.mlp_multiple))
        return units * self.mlp_multiple if self.swiglu else 4 * self.model_dim

    def epochs_of(self, member):
        return self.first_epochs if member == 1 and self.first_epochs else self.num_epochs


# What differs from the defaults. `limited`: the NanoGPT Slowrun's 1-hour track; `mini`: not tuned.
TRACKS = {
    "cpu": dict(
        dataset="data/sample", vocab_size=2048, train_tokens=50_000, selection_tokens=5_000,
        seq_len=256, batch_rows=8, device_batch_size=8, num_models=4, num_epochs=10, first_epochs=8,
        final_mixture="learned", kd_alpha=0.5, num_layers=4, model_dim=128, num_heads=4,
        mlp_multiple=32, window_pattern="L", softcap=15.0, matrix_lr=0.04, embed_lr=0.1,
        head_lr=0.003, x0_lr=0.02, scalar_lr=0.002, weight_decay=1.5, momentum_steps=100,
        lr_warmdown=0.4, lr_power=1.0, loss_chunk=1024),
    "mini": dict(
        train_tokens=4_000_000, selection_tokens=60_000, seq_len=1024, batch_rows=64,
        device_batch_size=32, num_models=4, num_epochs=16, kd_alpha=0.5, num_layers=12,
        model_dim=768, num_heads=6, softcap=15.0, lr_warmdown=0.4, lr_power=1.0),
    "limited": dict(
        loop_start=15, loop_end=20, loop_count=3, loop_from_epoch=6, mtp_weight=0.3),
}

PRESETS = {
    "": {},
    "toy": dict(
        dataset="data/sample", vocab_size=2048, train_tokens=9_000, selection_tokens=1_000,
        eval_tokens=2_000, seq_len=64, batch_rows=16, device_batch_size=4, num_epochs=2,
        first_epochs=0, num_layers=4, model_dim=64, num_heads=2, mlp_multiple=32, loop_start=2,
        loop_end=2, loop_from_epoch=1, momentum_steps=10, loss_chunk=512, compile=False,
        final_mixture="uniform"),
}


def known(name, names, kind):
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else "there are: " + ", ".join(sorted(names))
        raise UserError(f"unknown {kind} {name!r}; {hint}")
    return name


def make_config(track="cpu", **overrides):
    """The Config of `track` with `overrides` (values, or their text). UserError if unsound."""
    types, preset = {f.name: type(f.default) for f in fields(Config)}, overrides.get("preset", "")
    values = {**TRACKS[known(track, TRACKS, "track")], **PRESETS[known(preset, PRESETS, "preset")]}
    for name, value in overrides.items():
        kind = types[known(name, types, "field")]
        if isinstance(value, str) and kind is not str:
            try:
                value = kind(value) if kind is not bool else {
                    "true": True, "1": True, "false": False, "0": False}[value.lower()]
            except (ValueError, KeyError):
                words = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
                raise UserError(f"--{name}={value}: must be {words}") from None
        values[name] = value
    config = Config(**{**values, "track": track})
    check_config(config)
    return config


CHOICES = {"final_mixture": ("uniform", "learned"), "proj_init": ("normal", "zero"),
           "dtype": ("auto", "bfloat16", "float32"), "device": ("auto", "cuda", "mps", "cpu")}
MAY_BE_ZERO = {"seed", "selection_tokens", "eval_tokens", "first_epochs", "momentum_steps",
               "loop_start", "loop_end", "loop_from_epoch"}                # of the whole numbers
BELOW_ONE = ("dropout", "momentum", "momentum_start", "normuon_beta2")


def check_config(c):
    """UserError, in one line, for values that cannot work."""
    heads = sorted((n for n in range(1, c.model_dim + 1) if c.model_dim % n == 0),
                   key=lambda n: abs(n - c.num_heads))
    problems = [(not math.isfinite(v), f"--{name}={v}: must be a finite number")
                for name, v in vars(c).items() if type(v) is float]
    problems += [(v < (type(v) is int and name not in MAY_BE_ZERO), f"--{name}={v}: must be"
                  f" {'positive' if type(v) is int and name not in MAY_BE_ZERO else 'at least 0'}")
                 for name, v in vars(c).items() if type(v) in (int, float)]
    problems += [(getattr(c, name) not in values, f"--{name}={getattr(c, name)}: must be one of "
                  + ", ".join(values)) for name, values in CHOICES.items()]
    problems += [(getattr(c, name) >= 1, f"--{name}={getattr(c, name)}: must be below 1")
                 for name in BELOW_ONE]
    problems += [
        (heads[0] != c.num_heads, f"--num_heads={c.num_heads} does not divide --model_dim="
         f"{c.model_dim}; the nearest that does: {heads[0]}"),
        (c.rope_base and c.model_dim // heads[0] % 2, f"--num_heads={c.num_heads}: rotary positions"
         f" need an even width a head; --model_dim={c.model_dim} gives an odd one"),
        (c.model_dim < VALUE_GATE_CHANNELS, f"--model_dim={c.model_dim}: must be at least"
         f" {VALUE_GATE_CHANNELS}, the channels that the gates read"),
        (c.loop_count > 1 and not c.loop_start <= c.loop_end < c.num_layers, f"--loop_start="
         f"{c.loop_start} --loop_end={c.loop_end}: not a range of layers 0..{c.num_layers - 1}"),
        (set(c.window_pattern) - set("SL"), f"--window_pattern={c.window_pattern}: only S and L"),
        (c.kd_alpha > 1, f"--kd_alpha={c.kd_alpha}: must be at most 1"),
        (not c.kd_temperature, "--kd_temperature=0: must be positive"),
        (c.lr_warmup + c.lr_warmdown > 1, "--lr_warmup and --lr_warmdown together exceed 1"),
        (c.selection_tokens >= c.train_tokens, "--selection_tokens must be below --train_tokens"),
        (c.num_models == 1 and not c.include_first, "--include_first=false leaves no member"),
        (c.final_mixture == "learned" and not c.selection_tokens,
         "--final_mixture=learned needs --selection_tokens"),
        (not re.fullmatch(r"([A-Za-z0-9][\w.\-]*)?", c.run_id),
         f"--run_id={c.run_id}: letters, digits, '.', '_' and '-' only, and no path")]
    refuse(problems)
    piecewise_linear(c.wd_schedule, 0.0)


def parse_arguments(argv):
    """["--field=value", ...] -> {field: text of the value}."""
    pairs = [argument.removeprefix("--").partition("=") for argument in argv]
    refuse([(not argument.startswith("--") or not equals,
             f"{argument!r} is not --field=value (--help lists the fields)")
            for argument, (_, equals, _) in zip(argv, pairs)])
    return {name: text for name, _, text in pairs}


def help_text():
    lines = [__doc__, "Fields (--field=value), with the default of no track:", ""]
    for f in fields(Config):
        lines.append(f"  --{f.name}={f.default}".ljust(34) + " " + f.metadata["help"])
    for track, changes in TRACKS.items():
        lines.append(f"\nTrack {track}: " + " ".join(f"{k}={v}" for k, v in changes.items()))
    return "\n".join(lines)


# ==== Runtime: processes, device, dtype, log ====================================================
# Dense bf16 peak of a device, FLOP/s, by a part of its name: NVIDIA's data sheets.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
              "A100": 312e12, "L40S": 362e12, "RTX 5090": 209.5e12, "RTX 4090": 165.2e12}


@dataclass
class Runtime:
    """The processes and the device of this run; one process and many take the same code path."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype          # of matrix products
    attention: str              # "fa3", "flex" or "sdpa"
    compile: bool
    notes: list                 # what is slower or other than asked for: one line each

    def sum(self, tensor):
        """Sum of `tensor` over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor):
        """[n, ...] of each process -> [world * n, ...], on all of them."""
        if self.world == 1:
            return tensor
        whole = tensor.new_empty(self.world * len(tensor), *tensor.shape[1:])
        all_gather(whole, tensor.contiguous())
        return whole

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def synchronize(self):
        return torch.cuda.synchronize() if self.device.type == "cuda" else None


# torch 2.13 renamed these two
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def start_runtime(c):
    """Join the process group that torchrun announces, if any; choose device, dtype, attention."""
    kind, notes = c.device, []
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    world, local_world = (int(os.environ.get(n, 1)) for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if kind == "auto":
        kind = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() and world == 1 else "cpu")
    refuse([(kind == "cuda" and local_rank >= torch.cuda.device_count(),
             f"--device=cuda: {local_world} process(es), {torch.cuda.device_count()} GPU(s) here;"
             " lower --nproc_per_node or use --device=cpu")])
    device = torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast_bf16 = kind == "cpu" and (torch.cpu._is_amx_tile_supported()
                                       or torch.cpu._is_avx512_bf16_supported())
        torch.set_num_threads(max(1, torch.get_num_threads() if local_world == 1 else
                                  os.cpu_count() // local_world))   # they share the cores
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    dtype = getattr(torch, c.dtype if c.dtype != "auto" else
                    "bfloat16" if fast_bf16 else "float32")
    compiles = c.compile and (kind == "cuda" or kind == "cpu" and any(
        map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))))
    if c.compile and not compiles:
        notes.append(f"compile   off: {'no C++ compiler found' if kind == 'cpu' else kind}; slower")
    attention = choose_attention(device, dtype, compiles, notes)
    return Runtime(rank, world, device, dtype, attention, compiles, notes)


def choose_attention(device, dtype, compiles, notes):
    """FlashAttention 3 if it imports and a call succeeds, else what PyTorch ships."""
    if device.type != "cuda":
        return "sdpa"
    path = "flex" if compiles else "sdpa"
    try:
        from flash_attn_interface import flash_attn_func
        probe = torch.zeros(1, 128, 2, 128, device=device, dtype=dtype)
        flash_attn_func(probe, probe, probe, causal=True, window_size=(63, 0))
        torch.cuda.synchronize()
        return "fa3"
    except Exception as error:  # not installed, another architecture or dtype, a broken build
        notes.append(f"attention {path}, as FlashAttention 3 fails ({type(error).__name__})")
        return path


def hardware_name(device):
    if device.type == "cuda":
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name(device)}"
    return f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU"


def peak_flops(device):
    """FLOP/s of one device, or None if unknown (MFU is then n/a)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def peak_memory(device):
    """Bytes: allocated at most on the GPU, or resident at most in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    units = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * units


class Log:
    """Console, runs/<id>/log.txt and metrics.jsonl. Only rank 0 writes."""

    def __init__(self, folder, active, every_seconds):
        self.folder, self.active, self.every = folder, active, every_seconds
        self.terminal, self.live, self.last = sys.stdout.isatty(), False, 0.0
        if active:
            (folder / "members").mkdir(parents=True, exist_ok=True)
            self.text = open(folder / "log.txt", "w", encoding="utf-8")
            self.numbers = open(folder / "metrics.jsonl", "w", encoding="utf-8")

    def say(self, text, console=True):
        """A line for log.txt and the console."""
        if self.active:
            print(text, file=self.text, flush=True)
        if self.active and console:
            print(("\r\033[K" if self.live else "") + text, flush=True)
            self.live = False

    def progress(self, text, always=False):
        """One line that rewrites itself on a terminal, else a line every few seconds."""
        now = time.monotonic()
        if self.active and (always or now - self.last > (0.2 if self.terminal else self.every)):
            print("\r\033[K" + text if self.terminal else text, flush=True,
                  end="" if self.terminal else "\n")
            self.live, self.last = self.terminal, now

    def metrics(self, **numbers):
        """`key:value` pairs for log.txt, one JSON line for metrics.jsonl."""
        if self.active:
            self.say(" ".join(f"{name}:{value:.6g}" for name, value in numbers.items()), False)
            print(json.dumps(numbers), file=self.numbers, flush=True)


def git_commit():
    """Hash of HEAD, with "-dirty" behind it if tracked files differ; "unknown" without git."""
    try:
        command = ("git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ==== Data ======================================================================================
MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256   # llm.c's and modded-nanogpt's shard format
GPT2_VOCAB, GPT2_BOS = 50257, 50256              # what a header with zeros there means


def read_shard(path, vocab_size, sha256):
    """uint16 memory map of the tokens, BOS id, SHA-256. UserError if the file is not sound."""
    try:
        header, size = np.fromfile(path, dtype="<i4", count=HEADER_INTS), path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    again = "fetch or build the dataset again"
    refuse([(len(header) < HEADER_INTS or header[0] != MAGIC,
             f"{path}: not a token shard (wrong magic); {again}")])
    count, vocab, bos = int(header[2]), int(header[3]) or GPT2_VOCAB, int(header[4]) or GPT2_BOS
    held = (size - 4 * HEADER_INTS) / 2
    refuse([(header[1] != VERSION, f"{path}: shard version {header[1]}, not {VERSION}; {again}"),
            (count < 2 or held != count,
             f"{path}: the header says {count} tokens, the file holds {held:g}; {again}"),
            (vocab != vocab_size, f"{path}: vocabulary of {vocab}; set --vocab_size={vocab}")])
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS, shape=(count,))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    refuse([(tokens.max() >= vocab, f"{path}: token {tokens.max()} is not below {vocab}; {again}"),
            (tokens[0] != bos, f"{path}: must begin with BOS {bos}, not {tokens[0]}; {again}"),
            (sha256 not in (None, digest), f"{path}: its SHA-256 is not meta.json's; {again}")])
    return tokens, bos, digest


def split_documents(tokens, bos):
    """[n] -> list of views, one a document, each beginning with BOS."""
    starts = np.flatnonzero(tokens == bos)
    return [tokens[a:b] for a, b in zip(starts, [*starts[1:], len(tokens)])]


def cut_documents(documents, budget):
    """The first documents, the last one shortened, that make exactly `budget` tokens."""
    kept, total = [], 0
    for document in documents:
        if total >= budget:
            break
        kept.append(document[:budget - total])
        total += len(kept[-1])
    return kept


@dataclass
class Dataset:
    """Lists of documents (uint16 views that begin with BOS) and the folder's meta.json."""
    train: list
    selection: list
    val: list
    holdout: list
    bos: int
    meta: dict
    hashes: dict                # file name -> SHA-256
    bytes_per_token: dict       # split -> UTF-8 bytes of text a token, 0 if unknown
    notes: list


def load_dataset(c):
    """Read `c.dataset`, cut selection and budget, check that no val document is in train."""
    folder = ROOT / c.dataset
    script = folder.name if folder.name in ("sample", "fineweb") else "YOUR_SCRIPT"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        listed = {key: (facts.get("sha256"), int(facts.get("text_bytes") or 0))
                  for key, facts in meta.get("splits", {}).items()}
        data_efficiency(1.0, meta.get("baseline"), 1)
    except FileNotFoundError:
        meta, listed = {}, {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'meta.json'}: cannot be read ({error})") from None
    splits, hashes, per_token, bos = {}, {}, {}, None
    for split in ("train", "val", "holdout"):
        documents, tokens, text_bytes = [], 0, 0
        for path in sorted(folder.glob(f"*_{split}_*.bin")):
            if tokens >= c.train_tokens and split == "train":
                break
            sha256, size = listed.get(f"{split}_{path.stem.rpartition('_')[2]}", (None, 0))
            shard, bos, hashes[path.name] = read_shard(path, c.vocab_size, sha256)
            documents += split_documents(shard, bos)
            tokens, text_bytes = tokens + len(shard), text_bytes + size
        refuse([(not documents, f"{folder}: no {split} shards; get them with: python"
                 f" data/{script}.py"),
                (split == "train" and tokens < c.train_tokens, f"{folder}: {tokens:,} tokens in"
                 f" train, fewer than --train_tokens={c.train_tokens}; get more or lower it")])
        splits[split], per_token[split] = documents, text_bytes / tokens
    held_out = {document.tobytes() for document in splits["val"] + splits["holdout"]}
    train = [document for document in splits["train"] if document.tobytes() not in held_out]
    lost = len(splits["train"]) - len(train)
    # a few exact duplicates are normal in web text, more mean that the splits are wrong
    refuse([(lost > 0.005 * len(held_out), f"{folder}: {lost} documents of train are also in val or"
             " holdout; the splits overlap, build the dataset again")])
    notes = [f"data      {lost} documents of train left out: val or holdout has them"][:lost]
    for split in ("val", "holdout") if c.eval_tokens else ():
        splits[split] = cut_documents(splits[split], c.eval_tokens)
    train, selected = cut_documents(train, c.train_tokens), 0
    while sum(map(len, train[:selected])) < c.selection_tokens:
        selected += 1
    refuse([(selected >= len(train), f"--selection_tokens={c.selection_tokens} takes all documents"
             " of train; lower it")])
    return Dataset(train[selected:], train[:selected], splits["val"], splits["holdout"], bos,
                   meta, hashes, per_token, notes)


class Rows:
    """The rows that a member trains on, as one endless sequence cut into steps.

    Every epoch permutes the documents, lays them end to end, cuts rows of seq_len + 1 tokens that
    overlap by one (so that each token is predicted once), and permutes the rows. Rows that do not
    fill an epoch's last step are carried over; only the very last step may be smaller.
    """

    def __init__(self, documents, seq_len, batch_rows, num_epochs, seed, bos):
        self.documents, self.seq_len, self.batch_rows = documents, seq_len, batch_rows
        self.seed, self.bos, self.tokens = seed, bos, sum(map(len, documents))
        self.rows_per_epoch = -(-(self.tokens - 1) // seq_len)
        self.total_rows = self.rows_per_epoch * num_epochs
        self.num_steps = -(-self.total_rows // batch_rows)
        self.epoch, self.stream, self.order = None, None, None

    def load(self, epoch):
        """Shuffle and cut `epoch`, unless it is the present one."""
        if epoch != self.epoch:
            random, documents = np.random.default_rng((self.seed, epoch)), self.documents
            order = random.permutation(len(documents))
            self.stream = np.concatenate([documents[i] for i in order])
            self.order, self.epoch = random.permutation(self.rows_per_epoch), epoch

    def step(self, step):
        """inputs, targets: int64 [batch_rows, seq_len]. Target -1: nothing is predicted there."""
        first, shape = step * self.batch_rows, (self.batch_rows, self.seq_len)
        inputs, targets = np.full(shape, self.bos), np.full(shape, -1)
        for i, row in enumerate(range(first, min(first + self.batch_rows, self.total_rows))):
            self.load(row // self.rows_per_epoch)
            start = self.order[row % self.rows_per_epoch] * self.seq_len
            tokens = self.stream[start:start + self.seq_len + 1]
            inputs[i, :len(tokens) - 1], targets[i, :len(tokens) - 1] = tokens[:-1], tokens[1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def epoch_of(self, step):
        """Epochs completed when `step` begins (float)."""
        return step * self.batch_rows / self.rows_per_epoch


# ==== Model =====================================================================================
GATE_CHANNELS, VALUE_GATE_CHANNELS = 12, 32   # of the residual stream, that the gates read


class Stage(NamedTuple):
    """What of the model's graph changes in the course of training."""
    from_epoch: int
    loops: int


def stages(c):
    return [Stage(0, 1), Stage(c.loop_from_epoch, c.loop_count)][:1 + (c.loop_count > 1)]


def layer_order(c, loops):
    """Layer numbers in the order in which they run: loop_start..loop_end `loops` times."""
    layers = list(range(c.num_layers))
    if loops > 1:
        end = c.loop_end + 1
        layers[end:end] = layers[c.loop_start:end] * (loops - 1)
    return layers


def windows(c):
    """Keys that a query of each layer sees, itself included: S half a row, L all of it."""
    pattern = (c.window_pattern or "L") * c.num_layers
    sizes = {"S": max(1, c.seq_len // 2), "L": c.seq_len}
    return [sizes[kind] for kind in pattern[:c.num_layers - 1]] + [c.seq_len]


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


def attend(q, k, v, window, mask, path):
    """Causal attention, q, k, v [B, T, H, Dh]; a query sees `window` keys. mask: of make_mask."""
    if path == "fa3":
        from flash_attn_interface import flash_attn_func
        y = flash_attn_func(q, k, v, causal=True, window_size=(window - 1, 0))
        return y[0] if isinstance(y, tuple) else y
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if path == "flex":
        y = flex_attention(q, k, v, block_mask=mask)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return y.transpose(1, 2)


def make_mask(window, length, device, path):
    """The mask that `attend` wants for rows of `length` tokens."""
    if path == "fa3" or (path == "sdpa" and window >= length):
        return None
    if path == "flex":
        return create_block_mask(lambda b, h, q, k: (k <= q) & (q - k < window), None, None,
                                 length, length, device=device)
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


class Attention(nn.Module):
    """Causal self-attention with QK-norm, gated value projections and a gate per head."""

    def __init__(self, c, has_value_projection):
        super().__init__()
        self.heads, self.qk_norm = c.num_heads, c.qk_norm
        self.q = Linear(c.model_dim, c.model_dim)
        self.k = Linear(c.model_dim, c.model_dim)
        self.v = Linear(c.model_dim, c.model_dim)
        self.proj = Linear(c.model_dim, c.model_dim)
        self.gate = Linear(GATE_CHANNELS, c.num_heads) if c.attn_gate else None
        self.value_gate = Linear(VALUE_GATE_CHANNELS, c.num_heads) if has_value_projection else None

    def forward(self, x, value, rope, window, mask, path):
        B, T, D = x.shape
        q, k, v = (layer(x).view(B, T, self.heads, -1) for layer in (self.q, self.k, self.v))
        if self.value_gate is not None:  # the gate starts at 1 (slowrun #11: -0.027)
            gate = 2 * torch.sigmoid(self.value_gate(x[..., :VALUE_GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * value.view(B, T, self.heads, -1)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if self.qk_norm:
            q, k = norm(q), norm(k)
        y = attend(q, k, v, window, mask, path)
        if self.gate is not None:        # slowrun #21: -0.019
            y = y * torch.sigmoid(self.gate(x[..., :GATE_CHANNELS])).unsqueeze(-1)
        return self.proj(y.reshape(B, T, D))


class MLP(nn.Module):
    """SwiGLU (slowrun: -0.014), or squared ReLU."""

    def __init__(self, c):
        super().__init__()
        self.gate = Linear(c.model_dim, c.mlp_dim) if c.swiglu else None
        self.fc = Linear(c.model_dim, c.mlp_dim)
        self.proj = Linear(c.mlp_dim, c.model_dim)

    def forward(self, x):
        h = self.fc(x)
        return self.proj(F.relu(h).square() if self.gate is None else F.silu(self.gate(x)) * h)


class Block(nn.Module):
    def __init__(self, c, has_value_projection):
        super().__init__()
        self.attn, self.mlp = Attention(c, has_value_projection), MLP(c)
        self.dropout = c.dropout

    def forward(self, x, value, rope, window, mask, path):
        y = self.attn(norm(x), value, rope, window, mask, path)
        x = x + F.dropout(y, self.dropout, self.training)
        return x + F.dropout(self.mlp(norm(x)), self.dropout, self.training)


class GPT(nn.Module):
    """Decoder-only transformer. `forward` gives hidden states; head and loss are the caller's.

    dtype: of activations and matrix products (weights are fp32). attention: "fa3", "flex", "sdpa".
    """

    def __init__(self, config, dtype=torch.float32, attention="sdpa"):
        super().__init__()
        c = self.config = config
        self.dtype, self.attention = dtype, attention
        self.wte = nn.Embedding(c.padded_vocab, c.model_dim)
        valued = [i for i in range(c.num_layers)
                  if c.value_projections and i % 2 == (c.num_layers - 1) % 2]
        self.blocks = nn.ModuleList(Block(c, i in valued) for i in range(c.num_layers))
        self.value_projs = nn.ModuleDict({str(i): Linear(c.model_dim, c.model_dim)
                                          for i in valued})
        self.head = Linear(c.model_dim, c.padded_vocab)
        self.resid_lambdas = nn.Parameter(torch.empty(c.num_layers)) if c.resid_init else None
        self.x0_lambdas = nn.Parameter(torch.empty(c.num_layers)) if c.x0_init else None
        self.skip_lambdas = nn.Parameter(torch.empty(c.num_layers // 2)) if (
            c.unet and c.num_layers > 1) else None
        self.mtp_proj = Linear(2 * c.model_dim, c.model_dim) if c.mtp_weight else None
        self.mtp_block = Block(c, False) if c.mtp_weight else None
        self.windows, self.masks, self.rope = windows(c), {}, None

    @torch.no_grad()
    def init_weights(self, seed):
        """Fill every parameter, by name, from `seed`; the same values on all ranks."""
        c, random = self.config, torch.Generator(self.wte.weight.device).manual_seed(seed)
        normal = lambda std: lambda p: p.normal_(0, std, generator=random)
        constant = lambda value: lambda p: p.fill_(value)
        unit_gain = lambda p: p.uniform_(-1, 1, generator=random).mul_((3 / p.shape[1]) ** 0.5)
        table = (
            (r"wte\.weight", normal(1)),
            (r"head\.weight", normal(0.001)),
            (r"resid_lambdas", constant(c.resid_init)),
            (r"x0_lambdas", constant(c.x0_init)),
            (r"skip_lambdas", constant(1)),
            (r".*attn\.(value_)?gate\.weight", constant(0)),
            (r".*\.([qkv]|fc)\.weight|.*mlp\.gate\.weight", unit_gain),
            (r"(value_projs\.\d+|mtp_proj)\.weight", unit_gain),
            (r".*\.proj\.weight",       # normal: -0.007 over zero (slowrun #59)
             normal(c.model_dim ** -0.5 if c.proj_init == "normal" else 0)))
        for name, p in self.named_parameters():
            rules = [fill for pattern, fill in table if re.fullmatch(pattern, name)]
            if len(rules) != 1:
                raise ValueError(f"parameter {name} has {len(rules)} initializations")
            rules[0](p)
        return self

    def prepare(self, length):
        """Masks and rotation tables for rows of `length`; call it outside of compiled code."""
        c, device = self.config, self.wte.weight.device
        half = c.model_dim // c.num_heads // 2
        if c.rope_base:
            frequency = c.rope_base ** (-torch.arange(half, device=device) / half)
            angle = torch.arange(length, device=device)[:, None, None] * frequency
            self.rope = angle.cos().to(self.dtype), angle.sin().to(self.dtype)  # [T, 1, Dh/2]
        self.masks = {window: make_mask(window, length, device, self.attention)
                      for window in {*self.windows, c.seq_len}}
        return self

    def run_block(self, block, x, value, window):
        return block(x, value, self.rope, window, self.masks[window], self.attention)

    def forward(self, tokens, loops=1):
        """int64 [B, T] -> normalized final hidden states [B, T, D]. `prepare(T)` comes first."""
        c, skips = self.config, {}
        half = c.num_layers // 2
        x = x0 = norm(self.wte(tokens).to(self.dtype))
        for i in layer_order(c, loops):
            mirror = c.num_layers - 1 - i
            if self.skip_lambdas is not None and i > mirror:     # U-Net (slowrun #17: -0.021)
                x = x + self.skip_lambdas[half - 1 - mirror] * skips[mirror]
            if self.resid_lambdas is not None:
                x = self.resid_lambdas[i] * x
            if self.x0_lambdas is not None:
                x = x + self.x0_lambdas[i] * x0
            value = self.value_projs[str(i)](x0) if str(i) in self.value_projs else None
            x = self.run_block(self.blocks[i], x, value, self.windows[i])
            if i < mirror:
                skips[i] = x
        return norm(x)

    def mtp_hidden(self, hidden, next_tokens):
        """Hidden states that predict the token after next (DeepSeek's MTP). [B, T, D]

        hidden: what `forward` returned; next_tokens: int64 [B, T], the targets of `hidden`.
        """
        following = norm(self.wte(next_tokens).to(self.dtype))
        x = self.mtp_proj(torch.cat((hidden, following), dim=-1))
        return norm(self.run_block(self.mtp_block, x, None, self.config.seq_len))

    def logits(self, hidden):
        """[..., D] -> softcapped fp32 logits [..., vocab_size]; the padding is not among them."""
        c = self.config
        return capped_logits(hidden, self.head.weight.to(hidden.dtype), c.softcap)[
            ..., :c.vocab_size]


def flops_per_token(c, stage):
    """Training FLOPs a token: 6 per matmul parameter and exact causal window attention.

    A layer that is run k times counts k times; the MTP block and its use of the head count too.
    """
    # the mean number of keys over a row's positions; each costs 12 D
    keys = lambda window: (window * (window + 1) / 2 + (c.seq_len - window) * window) / c.seq_len
    with torch.device("meta"):
        model = GPT(c)
    size = lambda module: sum(p.numel() for p in module.parameters())
    total = 6 * size(model.head)
    for i in layer_order(c, stage.loops):
        value = size(model.value_projs[str(i)]) if str(i) in model.value_projs else 0
        total += 6 * (size(model.blocks[i]) + value) + 12 * c.model_dim * keys(model.windows[i])
    if c.mtp_weight:
        total += 6 * sum(map(size, (model.mtp_block, model.mtp_proj, model.head)))
        total += 12 * c.model_dim * keys(c.seq_len)
    return total


# ==== Loss ======================================================================================
def widen(x):
    """bf16 and fp16 to fp32; fp32 and fp64 as they are."""
    return x if x.dtype == torch.float64 else x.float()


def capped_logits(hidden, weight, softcap):
    """[N, D], [V, D] -> [N, V] in at least fp32: z, or c * tanh(z / c)."""
    z = widen(hidden @ weight.T)
    return softcap * torch.tanh(z / softcap) if softcap else z


def loss_chunk(h, w, y, teacher_h, teacher_w, alpha, temperature, softcap, vocab):
    """Loss and gradients of one chunk of tokens; at most two [n, V] logits live at once.

    (1 - alpha) * CE + alpha * T^2 * KL(teacher || student), both at temperature T, of softcapped
    logits. h [n, D], w [V, D], y int64 [n] (-1: not counted), teacher_* likewise or None.
    Returns the sums of CE and KL and d(sum of the loss) / dh [n, D], / dw [V, D].
    """
    s = capped_logits(h, w, softcap)
    slope = 1 - (s / softcap) ** 2 if softcap else 1.0
    column = torch.arange(s.shape[1], device=s.device)
    real = column < vocab                       # the padding never receives probability
    s = torch.where(real, s, -torch.inf)
    logp = torch.log_softmax(s, dim=1)
    counted = (y >= 0).unsqueeze(1)
    is_target = (column == y.unsqueeze(1))
    ce = -torch.where(is_target, logp, 0).sum()
    grad = (1 - alpha) * (logp.exp() - is_target.to(s.dtype))
    kl = torch.zeros_like(ce)
    if teacher_h is not None:
        t = torch.where(real, capped_logits(teacher_h, teacher_w, softcap), -torch.inf)
        teacher_logp = torch.log_softmax(t / temperature, dim=1)
        student_logp = torch.log_softmax(s / temperature, dim=1)
        q = teacher_logp.exp()
        difference = torch.where(real, teacher_logp - student_logp, 0)
        kl = torch.where(counted, q * difference, 0).sum()
        grad = grad + alpha * temperature * (student_logp.exp() - q)
    grad = torch.where(counted, grad * slope, 0).to(h.dtype)
    return ce, kl, grad @ w, grad.T @ h


class ChunkedLoss(torch.autograd.Function):
    """Head, softcap, CE and KL over chunks of tokens, with the gradients made in the forward.

    No [tokens, vocabulary] tensor of the micro-batch ever exists (as in Liger Kernel). Returns sums
    (loss, ce, kl) over the counted tokens; the loss has gradients for hidden [N, D], weight [V, D].
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, teacher_hidden, teacher_weight, alpha, temperature,
                softcap, vocab, chunk, chunk_function):
        w = weight.to(hidden.dtype)
        ce = kl = torch.zeros((), device=hidden.device, dtype=widen(hidden[:0]).dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            teacher = teacher_hidden[rows] if teacher_hidden is not None else None
            chunk_ce, chunk_kl, grad_hidden[rows], grad_w = chunk_function(
                hidden[rows], w, targets[rows], teacher, teacher_weight, alpha, temperature,
                softcap, vocab)
            ce, kl = ce + chunk_ce, kl + chunk_kl
            grad_weight += grad_w
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(ce, kl)
        return (1 - alpha) * ce + alpha * temperature ** 2 * kl, ce, kl

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (grad_hidden * grad_loss.to(grad_hidden.dtype), grad_weight * grad_loss,
                *[None] * 9)


def target_logprobs(hidden, weight, targets, softcap, vocab):
    """log p(target), fp32 [N]. hidden [N, D], weight [V, D], targets int64 [N] (-1 gives junk)."""
    logp = torch.log_softmax(capped_logits(hidden, weight, softcap)[:, :vocab], dim=1)
    return logp.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)


# ==== Optimizer =================================================================================
# Coefficients of five steps of Polar Express (Amsel et al., arXiv 2505.16932) for singular values
# in [1e-3, 1], as modded-nanogpt and slowrun use them.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def parameter_table(c):
    """(pattern of names, optimizer, lr, weight decay, betas); each parameter matches just one."""
    wd = c.weight_decay
    return (
        (r"(blocks\.\d+|mtp_block)\..*weight|(value_projs\.\d+|mtp_proj)\.weight",
         "muon", c.matrix_lr, wd, None),
        (r"wte\.weight", "adamw", c.embed_lr, wd, (0.8, 0.95)),
        (r"head\.weight", "adamw", c.head_lr, wd, (0.8, 0.95)),
        (r"x0_lambdas", "adamw", c.x0_lr, 0.0, (0.96, 0.95)),
        (r"(resid|skip)_lambdas", "adamw", c.scalar_lr, 0.0, (0.8, 0.95)),
    )


def polar_express(x):
    """Approximate polar factor U V^T of each matrix of x [n, rows, cols], in x's dtype."""
    x = x / (1.02 * x.norm(dim=(1, 2), keepdim=True) + 1e-6)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def muon_update(p, grad, m, v, lr, wd, momentum, beta2, row_norm, cautious, dtype):
    """One step of Muon on the matrices p, grad [n, rows, cols], in place (p, m, v).

    Nesterov momentum (m), unit rows (MuonEq-R, slowrun #71), Polar Express, NorMuon's second moment
    by neuron (v; arXiv 2510.05491), cautious weight decay (arXiv 2510.12402).
    """
    m.lerp_(grad, 1 - momentum)
    u = grad.lerp(m, momentum)
    if row_norm:
        u = u / u.norm(dim=2, keepdim=True).clamp(min=1e-7)
    x = polar_express(u.to(dtype)).to(p.dtype)
    if beta2:
        v.lerp_(x.square().mean(dim=2 if x.shape[1] >= x.shape[2] else 1, keepdim=True), 1 - beta2)
        scaled = x * v.clamp(min=1e-10).rsqrt()
        x = scaled * (x.norm(dim=(1, 2), keepdim=True)
                      / scaled.norm(dim=(1, 2), keepdim=True).clamp(min=1e-10))
    decay = (x * p >= 0).to(p.dtype) * wd if cautious else wd
    p -= lr * max(1, x.shape[1] / x.shape[2]) ** 0.5 * (x + decay * p)


def adamw_update(p, grad, m, v, step, lr, wd, beta1, beta2):
    """One step of AdamW (decoupled decay first), in place (p, m, v); `step` counts from 1."""
    p *= 1 - lr * wd
    m.lerp_(grad, 1 - beta1)
    v.lerp_(grad.square(), 1 - beta2)
    p -= lr / (1 - beta1 ** step) * m / ((v / (1 - beta2 ** step)).sqrt() + 1e-10)


class ParameterGroup:
    """Parameters that are updated as one tensor, and this rank's share of their state.

    Muon: parameters of one shape, stacked to [n, rows, cols]; a rank owns a slice of the matrices.
    AdamW: one parameter; a rank owns a slice of its first dimension. Zeros fill up the last share.
    """

    def __init__(self, kind, params, lr, wd, betas, world, rank):
        self.kind, self.params, self.lr, self.wd, self.betas = kind, params, lr, wd, betas
        p, length = params[0], len(params) if kind == "muon" else len(params[0])
        self.share, self.whole = -(-length // world), -(-length // world) * world
        self.first = rank * self.share
        self.m = torch.zeros_like(self.slice(params, self.first, self.share))
        self.v = self.m.clone()
        if kind == "muon":                      # NorMuon: one number a neuron
            self.v = self.v.mean(dim=2 if p.shape[0] >= p.shape[1] else 1, keepdim=True)

    def slice(self, tensors, first, count):
        """`count` matrices (Muon) or rows (AdamW) of `tensors` from `first` on, as one tensor."""
        if self.kind == "adamw":
            part = tensors[0][first:first + count]
        else:
            part = torch.stack(tensors[first:first + count] or [torch.zeros_like(tensors[0])])
        missing = count - len(part)
        return part if not missing else torch.cat((part, part.new_zeros(missing, *part.shape[1:])))


class MuonAdamW:
    """Muon for matrices, AdamW for the rest, sharded over the ranks (in nanochat's three phases).

    Gradients must sum, not average, over ranks to the gradient of the whole batch. Phase 1 starts
    the reductions of all groups, phase 2 updates each rank's share, phase 3 gathers the parameters.
    ValueError if a parameter is in no group of the table, or in two.
    """

    def __init__(self, named_parameters, config, world=1, rank=0, dtype=torch.float32):
        self.config, self.world, self.dtype, self.steps, members = config, world, dtype, 0, {}
        for name, p in named_parameters:
            rows = [row for row in parameter_table(config) if re.fullmatch(row[0], name)]
            if len(rows) != 1:
                raise ValueError(f"parameter {name} is in {len(rows)} groups of parameter_table")
            key = (*rows[0][1:], p.shape if rows[0][1] == "muon" else name)
            members.setdefault(key, []).append(p)
        self.groups = [ParameterGroup(kind, params, lr, wd, betas, world, rank)
                       for (kind, lr, wd, betas, _), params in members.items()]

    @torch.no_grad()
    def step(self, lr_multiplier=1.0, wd_multiplier=1.0, momentum=None):
        """One update from the parameters' .grad, which it clears."""
        c, reductions, gathers, self.steps = self.config, [], [], self.steps + 1
        momentum = c.momentum if momentum is None else momentum
        for group in self.groups:
            whole = group.slice([p.grad for p in group.params], 0, group.whole)
            reductions.append(self.scatter(whole, group.share))
            for p in group.params:
                p.grad = None
        for group, (grad, handle) in zip(self.groups, reductions):
            if handle is not None:
                handle.wait()
            lr, wd = group.lr * lr_multiplier, group.wd * wd_multiplier
            share = group.slice(group.params, group.first, group.share)
            if group.kind == "adamw":
                adamw_update(share, grad, group.m, group.v, self.steps, lr, wd, *group.betas)
            else:
                muon_update(share, grad, group.m, group.v, lr, wd, momentum, c.normuon_beta2,
                            c.muon_eq, c.cautious, self.dtype)
            gathers.append(self.gather(share))
        for group, (whole, handle) in zip(self.groups, gathers):
            if handle is not None:
                handle.wait()
            updated = whole if group.kind == "muon" else [whole[:len(group.params[0])]]
            for p, new in zip(group.params, updated):
                p.copy_(new)

    def scatter(self, whole, share):
        """(this rank's share of the sum of `whole` over ranks, a handle to wait for or None)."""
        if self.world == 1:
            return whole, None
        part = whole.new_empty(share, *whole.shape[1:])
        return part, reduce_scatter(part, whole.contiguous(), async_op=True)

    def gather(self, share):
        if self.world == 1:
            return share, None
        whole = share.new_empty(self.world * len(share), *share.shape[1:])
        return whole, all_gather(whole, share.contiguous(), async_op=True)


# ==== Schedules: pure functions of progress, the fraction of steps done =========================
def lr_multiplier(c, progress):
    """Linear warmup, flat, then ((1 - progress) / warmdown) ** power down to the floor."""
    if progress < c.lr_warmup:
        return progress / c.lr_warmup
    left = min(1.0, (1 - progress) / c.lr_warmdown) if c.lr_warmdown else 1.0
    return c.lr_floor + (1 - c.lr_floor) * left ** c.lr_power


def piecewise_linear(schedule, progress):
    """Value at `progress` of "progress:value,progress:value,...", constant beyond its ends."""
    try:
        points = sorted(tuple(map(float, point.split(":"))) for point in schedule.split(","))
        x, y = zip(*points)
        if not all(math.isfinite(number) and number >= 0 for number in (*x, *y)):
            raise ValueError
    except ValueError:
        raise UserError(f"--wd_schedule={schedule}: must read like 0:1,0.5:0.1,1:0.9") from None
    return float(np.interp(progress, x, y))


def momentum_at(c, step):
    """Muon's momentum rises linearly over the first momentum_steps steps."""
    done = min(1.0, step / c.momentum_steps) if c.momentum_steps else 1.0
    return c.momentum_start + (c.momentum - c.momentum_start) * done


# ==== Evaluation and ensemble ===================================================================
def mean_loss(logp):
    """Nats per token of log p(target) [n], summed in fp64."""
    return -float(np.mean(logp, dtype=np.float64))


def mixture_logp(logps, weights=None):
    """log p(target) of a mixture of models: [k, n] and weights [k] (None: equal) -> fp64 [n].

    A target's probability under a mixture is the mixture of its probabilities, so one float a token
    and member is all that an ensemble's loss takes.
    """
    logps = np.asarray(logps, dtype=np.float64)
    weights = np.full(len(logps), 1 / len(logps)) if weights is None else np.asarray(weights)
    top = logps.max(axis=0)
    return top + np.log(weights @ np.exp(logps - top))


def fit_mixture(logps, iterations=3000, tolerance=1e-5):
    """Weights [k] of the mixture that makes the targets of logps [k, n] most probable.

    The log likelihood is concave in the weights, and expectation maximization climbs to its top
    without a learning rate (slowrun #90 descends on the weights' logits instead). It stops when no
    weights can be better by more than `tolerance` nats a token.
    """
    p = np.exp(np.asarray(logps, dtype=np.float64) - np.max(logps, axis=0))
    weights = np.full(len(p), 1 / len(p))
    for _ in range(iterations):
        gain = np.mean(p / (weights @ p), axis=1)   # the duality gap is max(gain) - 1
        if gain.max() - 1 < tolerance:
            break
        weights = weights * gain
    return weights / weights.sum()


def ensemble_curve(members, c):
    """One dict for each n: the mixtures of the first n members that the ensemble may hold.

    members: a list of {split: log p(target)} in the order of training.
    """
    kept, curve = members[0 if c.include_first else 1:], []
    for n in range(1, len(kept) + 1):
        stack = {split: np.stack([m[split] for m in kept[:n]]) for split in kept[0]}
        point = {"n": n, "val_loss": mean_loss(mixture_logp(stack["val"])),
                 "holdout_loss": mean_loss(mixture_logp(stack["holdout"]))}
        if "selection" in stack:
            weights = fit_mixture(stack["selection"])
            point.update(
                selection_loss=mean_loss(mixture_logp(stack["selection"])),
                val_loss_learned=mean_loss(mixture_logp(stack["val"], weights)),
                holdout_loss_learned=mean_loss(mixture_logp(stack["holdout"], weights)),
                weights=[round(float(w), 4) for w in weights])
        curve.append(point)
    return curve


def equivalent_tokens(loss, curve):
    """(D, sign): the tokens D at which a baseline curve [[D, loss], ...] reaches `loss`.

    D is piecewise linear in the loss; points no better than a smaller D are left out. Nothing is
    extrapolated: beyond the measured range the sign is ">" or "<" and D the end of the range.
    """
    points = []
    for tokens, value in sorted(curve):
        if not points or value < points[-1][1]:
            points.append((tokens, value))
    tokens, losses = zip(*points)
    sign = "<" if loss > losses[0] else ">" if loss < losses[-1] else ""
    return float(np.interp(-loss, [-value for value in losses], tokens)), sign


def data_efficiency(loss, baseline, train_tokens):
    """{one_epoch, tuned, curve}: multiples of train_tokens, numbers or strings like "> 12.4"."""
    result = {"one_epoch": "n/a", "tuned": "n/a", "curve": baseline}
    for kind in {"one_epoch", "tuned"} & set(baseline or ()):
        tokens, sign = equivalent_tokens(loss, baseline[kind])
        multiple = round(tokens / train_tokens, 2)
        result[kind] = f"{sign} {multiple}" if sign else multiple
    return result


# ==== One member ================================================================================
class Trainer:
    """The models, compiled functions and clocks that all members of a run share.

    Weights are copied into one student and one teacher, so another member compiles nothing anew.
    """

    def __init__(self, c, rt, log, data):
        self.c, self.rt, self.log, self.data = c, rt, log, data
        self.model = self.new_model()
        self.teacher = self.new_model().eval() if c.kd_alpha else None
        fast = (lambda f: torch.compile(f, dynamic=False)) if rt.compile else (lambda f: f)
        self.forward, self.mtp_hidden = fast(GPT.forward), fast(GPT.mtp_hidden)
        self.chunk_function, self.logprobs = fast(loss_chunk), fast(target_logprobs)
        self.seen, self.compile_seconds, self.eval_seconds = set(), 0.0, 0.0
        self.start = time.perf_counter()

    def new_model(self):
        with self.rt.device:
            return GPT(self.c, self.rt.dtype, self.rt.attention).prepare(self.c.seq_len)

    @contextlib.contextmanager
    def first_time(self, *key):
        """Clocks what runs under a new key as compilation; yields whether the key is new."""
        new, start = self.rt.compile and key not in self.seen, time.perf_counter()
        yield new
        if new:
            self.seen.add(key)
            self.rt.synchronize()
            self.compile_seconds += time.perf_counter() - start

    def loss(self, hidden, targets, teacher, alpha):
        """ChunkedLoss of hidden [B, T, D]; teacher: the teacher's hidden states, or None."""
        c, teacher_weight = self.c, None
        if teacher is not None:
            teacher = teacher.flatten(0, 1)
            teacher_weight = self.teacher.head.weight.to(self.rt.dtype)
        return ChunkedLoss.apply(
            hidden.flatten(0, 1), self.model.head.weight, targets.flatten(), teacher,
            teacher_weight, alpha, c.kd_temperature, c.softcap, c.vocab_size, c.loss_chunk,
            self.chunk_function)

    def gradients(self, inputs, targets, loops, distill):
        """Backward passes of this rank's rows of the batch; returns the sums [ce, kl].

        The loss is divided by the targets of the whole batch, so gradients add up over ranks.
        """
        c, rt, model, teacher = self.c, self.rt, self.model, None
        mine, micro = slice(rt.rank, None, rt.world), micro_batch_rows(c, rt.world)
        counts = int((targets >= 0).sum()), max(1, int((targets[:, 1:] >= 0).sum()))
        alpha, sums = c.kd_alpha if distill else 0.0, torch.zeros(2, device=rt.device)
        for x, y in zip(inputs[mine].split(micro), targets[mine].split(micro)):
            x, y = x.to(rt.device), y.to(rt.device)
            hidden = self.forward(model, x, loops)
            if distill:
                with torch.no_grad():
                    teacher = self.forward(self.teacher, x, stages(c)[-1].loops)
            loss, ce, kl = self.loss(hidden, y, teacher, alpha)
            loss = loss / counts[0]
            if c.mtp_weight:        # slowrun #65; its targets do not cross the row's end
                ahead = self.mtp_hidden(model, hidden, y.clamp(min=0))
                ahead_loss, _, _ = self.loss(ahead, F.pad(y[:, 1:], (0, 1), value=-1), None, 0.0)
                loss = loss + (1 - alpha) * c.mtp_weight * ahead_loss / counts[1]
            loss.backward()
            sums += torch.stack((ce, kl)) / counts[0]
        return sums

    def train_member(self, k, teacher_weights=None):
        """Train member k (from 1) in self.model, by a teacher if given; returns Meter.facts()."""
        c, rt, distill = self.c, self.rt, teacher_weights is not None and bool(self.c.kd_alpha)
        member_seed = 1000 * c.seed + k
        self.model.init_weights(member_seed).train()
        torch.manual_seed(7919 * member_seed + rt.rank)        # dropout differs between ranks
        if distill:
            self.teacher.load_state_dict(teacher_weights)
        rows = Rows(self.data.train, c.seq_len, c.batch_rows, c.epochs_of(k), member_seed,
                    self.data.bos)
        optimizer = MuonAdamW(self.model.named_parameters(), c, rt.world, rt.rank, rt.dtype)
        meter = Meter(self, k, rows, distill)
        for step in range(rows.num_steps):
            progress, epoch = step / rows.num_steps, rows.epoch_of(step)
            loops = [stage for stage in stages(c) if stage.from_epoch <= epoch][-1].loops
            inputs, targets = rows.step(step)
            with self.first_time("step", loops, distill) as new:
                sums = self.gradients(inputs, targets, loops, distill)
                optimizer.step(lr_multiplier(c, progress),
                               piecewise_linear(c.wd_schedule, progress), momentum_at(c, step))
            meter.update(step, sums, loops, new)
        rt.synchronize()
        return meter.facts()

    @torch.no_grad()
    def score(self, documents):
        """log p(target) of all tokens but the first of `documents`, laid end to end: fp32 [n - 1].

        Rows overlap by one token, so that each is scored exactly once, whatever the world size.
        """
        c, rt, start = self.c, self.rt, time.perf_counter()
        self.model.eval()
        tokens, size = np.concatenate(documents).astype(np.int64), c.device_batch_size
        count = -(-(len(tokens) - 1) // c.seq_len)
        share = -(-count // (rt.world * size)) * size           # rows of each rank
        padded = np.full(rt.world * share * c.seq_len + 1, self.data.bos)
        padded[:len(tokens)] = tokens
        inputs = torch.from_numpy(padded[:-1]).view(-1, c.seq_len)
        targets = torch.from_numpy(padded[1:]).view(-1, c.seq_len)
        weight, parts = self.model.head.weight.to(rt.dtype), []
        for row in range(rt.rank * share, (rt.rank + 1) * share, size):
            x, y = (t[row:row + size].to(rt.device) for t in (inputs, targets))
            with self.first_time("score"):
                hidden = self.forward(self.model, x, stages(c)[-1].loops).flatten(0, 1)
                for h, t in zip(hidden.split(c.loss_chunk), y.flatten().split(c.loss_chunk)):
                    parts.append(self.logprobs(h, weight, t, c.softcap, c.vocab_size))
        logp = rt.gather(torch.cat(parts)).cpu().numpy().astype(np.float32)[:len(tokens) - 1]
        self.eval_seconds += time.perf_counter() - start
        return logp


class Meter:
    """Clock, progress line and metrics of one member's training."""

    def __init__(self, trainer, k, rows, distill):
        self.trainer, self.k, self.rows, self.recent = trainer, k, rows, []
        self.start = time.perf_counter() - trainer.compile_seconds  # compiling stops the clock
        self.steps, self.flops, self.loss = 0, 0.0, float("nan")    # of steps that compiled nothing
        c = trainer.c   # a teacher's forward is a third of a step, without MTP and all loops on
        teacher = distill * flops_per_token(replace(c, mtp_weight=0.0), stages(c)[-1]) / 3
        self.batch_flops = {stage.loops: (flops_per_token(c, stage) + teacher) * c.batch_rows
                            * c.seq_len for stage in stages(c)}

    def facts(self):
        """Seconds without compilation, tokens/s and MFU (None: unknown peak) of all devices."""
        rt, c = self.trainer.rt, self.trainer.c
        seconds = max(1e-9, time.perf_counter() - self.trainer.compile_seconds - self.start)
        peak = peak_flops(rt.device)
        return {"train_loss": self.loss, "train_seconds": round(seconds, 3),
                "tokens_per_second": round(self.steps * c.batch_rows * c.seq_len / seconds, 1),
                "mfu": round(self.flops / seconds / peak / rt.world, 4) if peak else None}

    def update(self, step, sums, loops, compiled):
        """After each step; reads the losses (which waits for the device) every log_steps steps."""
        c, rt, rows, k = self.trainer.c, self.trainer.rt, self.rows, self.k
        self.recent.append(sums)
        if not compiled:
            self.steps, self.flops = self.steps + 1, self.flops + self.batch_flops[loops]
        last = step + 1 == rows.num_steps
        if (step + 1) % c.log_steps and not last:
            return
        self.loss, kl = rt.sum(torch.stack(self.recent).mean(dim=0)).tolist()
        self.recent = []
        if not math.isfinite(self.loss):
            raise UserError(f"member {k}, step {step + 1}: the loss is {self.loss}; lower"
                            " --matrix_lr, --embed_lr or --head_lr")
        facts, epoch = self.facts(), min(rows.epoch_of(step + 1), c.epochs_of(k))
        speed = facts["tokens_per_second"]
        self.trainer.log.metrics(
            member=k, step=step + 1, epoch=round(epoch, 3), train_loss=self.loss, kl=kl,
            lr_multiplier=lr_multiplier(c, step / rows.num_steps), tokens_per_second=speed,
            seconds=round(time.perf_counter() - self.trainer.start, 3))
        an_epoch = facts["train_seconds"] / max(1, self.steps) * rows.num_steps / c.epochs_of(k)
        left = (c.epochs_of(k) - epoch) * an_epoch
        later = sum(map(c.epochs_of, range(k + 1, c.num_models + 1))) * an_epoch
        later *= 4 / 3 if k == 1 and c.kd_alpha else 1      # later members pay for a teacher
        self.trainer.log.progress(
            f"member {k}/{c.num_models}  step {step + 1}/{rows.num_steps}  epoch {epoch:.1f}/"
            f"{c.epochs_of(k)}  loss {self.loss:.3f}{f'  kl {kl:.3f}' if kl else ''}  {speed:,.0f}"
            f" tok/s  MFU {percent(facts['mfu'])}  left {minutes(left)}, run"
            f" {minutes(left + later)}", always=last)


def percent(fraction):
    return f"{fraction:.1%}" if fraction else "n/a"


def minutes(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# ==== The run ===================================================================================
def micro_batch_rows(c, world):
    """Rows of a micro-batch. UserError if the batch cannot be shared out evenly."""
    micro = max(1, min(c.device_batch_size, c.batch_rows // world))
    unit = world * micro
    refuse([(c.batch_rows % unit, f"--batch_rows={c.batch_rows} is not divisible by {world}"
             f" process(es) x {micro} rows of --device_batch_size; the nearest that is:"
             f" {max(1, round(c.batch_rows / unit)) * unit}")])
    return micro


def run_folder(c):
    """The folder of the run, not yet made; UserError if there is a run in it."""
    name = c.run_id or f"{c.track}_{time.strftime('%Y-%m-%d_%H-%M-%S')}_seed{c.seed}"
    folder = ROOT / c.runs_dir / name
    refuse([((folder / "log.txt").exists(), f"{folder} has a run; choose another --run_id")])
    return folder


def announce(c, rt, log, data, model, overrides):
    """Log what reproduces the run (source, versions, settings); tell what is about to run."""
    facts = dict(commit=git_commit(), python=platform.python_version(), torch=torch.__version__,
                 numpy=np.__version__, hardware=hardware_name(rt.device), processes=rt.world,
                 data_sha256=data.hashes, overrides=overrides, config=dataclasses.asdict(c))
    log.say(Path(__file__).read_text(encoding="utf-8") + "\n" + "=" * 100, console=False)
    for key, value in facts.items():
        log.say(f"{key}:{json.dumps(value)}", console=False)
    rows = Rows(data.train, c.seq_len, c.batch_rows, c.num_epochs, 0, data.bos)
    size, blocks = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, model.blocks))
    flops = " then ".join(f"{flops_per_token(c, stage):.4g}" for stage in stages(c))
    chain = (f", each distilled from the one before (alpha {c.kd_alpha:g}, T {c.kd_temperature:g})"
             if c.kd_alpha and c.num_models > 1 else "")
    micro = micro_batch_rows(c, rt.world)
    for line in (
            f"track     {c.track}: {c.num_models} model(s) x {c.num_epochs} epochs{chain}",
            f"data      {c.dataset}: {rows.tokens:,} tokens an epoch ({len(data.train)} documents),"
            f" {sum(map(len, data.selection)):,} for selection; val {sum(map(len, data.val)):,},"
            f" holdout {sum(map(len, data.holdout)):,}",
            f"model     {size:.4g}M parameters ({blocks:.4g}M in {c.num_layers} blocks, width"
            f" {c.model_dim}), {flops} FLOPs a token",
            f"steps     {rows.num_steps:,} a member: {c.batch_rows} rows x {c.seq_len} ="
            f" {c.batch_rows * c.seq_len:,} tokens a step, on {rt.world} process(es) in"
            f" {c.batch_rows // rt.world // micro} micro-batch(es) of {micro} rows",
            f"machine   {facts['hardware']}; torch {torch.__version__} on {rt.device.type},"
            f" {str(rt.dtype).removeprefix('torch.')}, attention {rt.attention}, compile"
            f" {'on' if rt.compile else 'off'}",
            f"folder    {log.folder}", *data.notes, *rt.notes, ""):
        log.say(line)


def write_whole(path, write):
    """Let `write` fill a file beside `path`, then rename it, so that `path` is never half there."""
    beside = path.with_suffix(".tmp")
    write(beside)
    os.replace(beside, path)


def write_json(path, value):
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def run(c, overrides):
    """Train the members, write the run's folder, print the table; returns the result (a dict)."""
    start, rt = time.perf_counter(), start_runtime(c)
    micro_batch_rows(c, rt.world)
    data, folder = load_dataset(c), run_folder(c)
    rt.barrier()                # rank 0 makes the folder only after all have looked
    log = Log(folder, rt.rank == 0, c.log_seconds)
    trainer = Trainer(c, rt, log, data)
    announce(c, rt, log, data, trainer.model, overrides)
    splits = {"selection": data.selection, "val": data.val, "holdout": data.holdout}
    scores, members, teacher = [], [], None
    for k in range(1, c.num_models + 1):
        facts = trainer.train_member(k, teacher)
        teacher = {name: p.detach().cpu().clone() for name, p in trainer.model.named_parameters()}
        scores.append({split: trainer.score(part) for split, part in splits.items() if part})
        if rt.rank == 0:
            logp = {split: torch.from_numpy(values) for split, values in scores[-1].items()}
            for kind, tensors in (("", teacher), (".logp", logp)):
                write_whole(folder / "members" / f"{k:03d}{kind}.safetensors",
                            lambda beside, tensors=tensors: save_file(tensors, beside))
        members.append({f"{split}_loss": mean_loss(s) for split, s in scores[-1].items()} | facts)
        curve = ensemble_curve(scores, c)
        single, mixed = members[-1]["val_loss"], curve[-1]["val_loss"] if curve else float("nan")
        log.metrics(member=k, val_loss=single, ensemble=len(curve), ensemble_val_loss=mixed)
        log.say(f"member {k}/{c.num_models} done in {minutes(facts['train_seconds'])}: val loss"
                f" {single:.4f}, ensemble of {len(curve)}: {mixed:.4f}")
    result = summarize(c, rt, data, trainer, members, curve, overrides, start)
    for line in ("", *table(c, result), f"folder           {folder}"):
        log.say(line)
    if rt.rank == 0:
        write_json(folder / "result.json", result)
        with contextlib.suppress(ImportError):      # no matplotlib, or train_gpt.py on its own
            from records.plot import plot_progress
            plot_progress(result, folder / "progress.png")
        for line in sample_lines(c, rt, data, folder, members):
            log.say(line)
    log.say("RESULT " + json.dumps(result), console=False)
    rt.barrier()
    return result


def summarize(c, rt, data, trainer, members, curve, overrides, start):
    """The dict that becomes result.json. Its val_loss is the declared number of the run."""
    suffix = "_learned" if c.final_mixture == "learned" else ""
    val_loss, bytes_per_token = curve[-1]["val_loss" + suffix], data.bytes_per_token.get("val")
    baseline = data.meta.get("baseline")
    train_seconds = sum(m["train_seconds"] for m in members)
    average = lambda key: sum(m[key] * m["train_seconds"] for m in members) / train_seconds
    memory = rt.gather(torch.tensor([float(peak_memory(rt.device))], device=rt.device))
    return {
        "track": c.track, "overrides": overrides, "seed": c.seed, "val_loss": val_loss,
        "holdout_loss": curve[-1]["holdout_loss" + suffix],
        "val_bpb": val_loss / math.log(2) / bytes_per_token if bytes_per_token else None,
        "final_mixture": c.final_mixture, "members": members, "ensemble": curve,
        "data_efficiency": data_efficiency(val_loss, baseline, c.train_tokens),
        "train_tokens": c.train_tokens, "train_seconds": round(train_seconds, 3),
        "wall_seconds": round(time.perf_counter() - start, 3),
        "compile_seconds": round(trainer.compile_seconds, 3),
        "eval_seconds": round(trainer.eval_seconds, 3),
        "tokens_per_second": round(average("tokens_per_second"), 1),
        "mfu": round(average("mfu"), 4) if members[0]["mfu"] else None,
        "peak_memory_bytes": int(memory.max()), "processes": rt.world,
        "hardware": hardware_name(rt.device), "torch": torch.__version__, "commit": git_commit(),
        "data_sha256": data.hashes, "config": dataclasses.asdict(c)}


def table(c, result):
    """The final table, as lines."""
    members, bpb, efficiency = result["members"], result["val_bpb"], result["data_efficiency"]
    lines = [" n    member  ensemble   learned   holdout  (member n; ensembles of n)"]
    if not c.include_first:
        lines.append(f" -  {members[0]['val_loss']:8.4f}  (left out: it had no teacher)")
    for point in result["ensemble"]:
        single = members[point["n"] - c.include_first]["val_loss"]
        learned = point.get("val_loss_learned", float("nan"))
        lines.append(f"{point['n']:2d}  {single:8.4f}  {point['val_loss']:8.4f}  {learned:8.4f}"
                     f"  {point['holdout_loss']:8.4f}")
    multiples = [f"{efficiency[kind]}x against the {name} baseline" for kind, name in (
        ("one_epoch", "one-epoch"), ("tuned", "tuned")) if efficiency[kind] != "n/a"]
    seconds = [f"{minutes(result[f'{kind}_seconds'])} {name}" for kind, name in (
        ("train", "train"), ("compile", "compile"), ("eval", "evaluate"), ("wall", "in all"))]
    return lines + [
        "", f"result           val loss {result['val_loss']:.4f} ({c.final_mixture} mixture),"
        f" {f'{bpb:.4f}' if bpb else 'n/a'} bits per byte, holdout {result['holdout_loss']:.4f}",
        f"data efficiency  {', '.join(multiples) or 'n/a: no curve; see train_gpt.py baseline'}",
        f"time             {', '.join(seconds)}",
        f"speed            {result['tokens_per_second']:,.0f} tokens/s, MFU"
        f" {percent(result['mfu'])}, peak memory {result['peak_memory_bytes'] / 2 ** 20:,.0f} MiB"]


# ==== Commands beyond training ==================================================================
def load_encoding(c, meta):
    """tiktoken.Encoding of the dataset, from its own ranks or GPT-2's (which tiktoken fetches)."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe
    if "ranks" not in meta and c.vocab_size == GPT2_VOCAB:
        return tiktoken.get_encoding("gpt2")
    ranks = load_tiktoken_bpe(str(ROOT / c.dataset / meta["ranks"]), meta.get("ranks_sha256"))
    return tiktoken.Encoding(meta["tokenizer"], pat_str=meta["pattern"], mergeable_ranks=ranks,
                             special_tokens={meta["bos_text"]: meta["bos_id"]})


@torch.no_grad()
def generate(model, tokens, count, temperature=0.8, seed=1):
    """Continue the list `tokens` by `count` tokens, drawn at `temperature`; stops before BOS."""
    c, device, bos = model.config, model.wte.weight.device, tokens[0]
    random, loops = torch.Generator().manual_seed(seed), stages(model.config)[-1].loops
    for _ in range(count):
        context = torch.tensor([tokens[-c.seq_len:]], device=device)
        hidden = model.prepare(context.shape[1])(context, loops)[:, -1]
        p = torch.softmax(model.logits(hidden)[0].double().cpu() / temperature, dim=0)
        token = int(torch.multinomial(p, 1, generator=random))
        if token == bos:
            break
        tokens = [*tokens, token]
    return tokens


def sample_lines(c, rt, data, folder, members, count=120):
    """Lines of text from the member that is best on selection (on train if there is none)."""
    try:
        encoding = load_encoding(c, data.meta)
    except Exception as error:  # a missing package, file or network: the run is done all the same
        return ["", f"no sample: the tokenizer cannot be loaded ({type(error).__name__})"]
    key = "selection_loss" if data.selection else "train_loss"
    best = min(range(len(members)), key=lambda i: members[i][key]) + 1
    with rt.device:
        model = GPT(c, rt.dtype).eval()     # SDPA takes rows of any length
    model.load_state_dict(load_file(folder / "members" / f"{best:03d}.safetensors"))
    tokens = generate(model, [data.bos, *encoding.encode_ordinary(c.prompt)], count)
    paragraphs = encoding.decode(tokens[1:], errors="ignore").splitlines()
    return ["", f"member {best} writes (temperature 0.8):", "", *(
        textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  ")
        for text in paragraphs)]


def sample(c):
    """Print text of the best member of the finished run `c.run_id`."""
    folder = ROOT / c.runs_dir / c.run_id
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        c = replace(Config(**result["config"]), prompt=c.prompt, device=c.device)
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{folder}: no finished run there; name one with --run_id=") from None
    rt = start_runtime(c)
    print("\n".join(sample_lines(c, rt, load_dataset(c), folder, result["members"])))


COMMANDS = ("train", "baseline", "sample", "check")


def dispatch(argv):
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "train"
    known(command, COMMANDS, "command")
    if {"--help", "-h"} & set(argv):
        return print(help_text())
    arguments = parse_arguments(argv)
    c = make_config(**arguments)
    overrides = {name: getattr(c, name) for name in arguments if name != "track"}
    if command == "train":
        run(c, overrides)
    elif command == "baseline":
        from records.baseline import measure_baseline
        measure_baseline(sys.modules[__name__], c, overrides)
    elif command == "sample":
        sample(c)
    elif load_dataset(c) and run_folder(c) and micro_batch_rows(
            c, int(os.environ.get("WORLD_SIZE", 1))):
        print(f"track {c.track}: settings and dataset {c.dataset} are sound")


def main(argv=None):
    """Run a command; returns the exit code: 0, or 2 for what a person can mend."""
    try:
        dispatch(list(sys.argv[1:] if argv is None else argv))
        return 0
    except (UserError, RuntimeError, OSError) as error:
        message = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in message:
            message = "out of memory; lower --device_batch_size, then --loss_chunk"
        elif not isinstance(error, (UserError, OSError)):
            raise
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, UserError):
            print(f"error: {message}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
