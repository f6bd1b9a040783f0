"""Train an ensemble of GPTs, each distilled from the one before, on a fixed budget of tokens.

The regime is "data is fixed, compute is not" (the NanoGPT Slowrun): at most `train_tokens` tokens
may be seen, as often as one likes, and the lowest loss on unseen text wins.

    ./run.sh                                            set up, pick a track, get its data, run
    torchrun --nproc_per_node=8 train_gpt.py --track=limited        8 GPUs
    python train_gpt.py --track=cpu --num_models=2                  one device, one field changed
    python train_gpt.py baseline --track=cpu            the plain models that we compare against
    python train_gpt.py sample --run_id=NAME --prompt="It was"      text from a finished run
    python train_gpt.py check --track=mini              validate settings and data, train nothing
    python train_gpt.py bench --track=mini              seconds, MFU and memory of a step; no data
    python train_gpt.py --help                          every field: default, unit, meaning

Rules of a record: the result is one number declared in advance (the mixture of all members after
their last step), never a minimum over evaluations. Choices are made on `selection`, whole documents
cut from the training budget; `val` is for comparison between runs, `holdout` is shown once, at the
end. The log begins with this source and reproduces the run.
This file is read from top to bottom and has at most 1,600 lines. Beside it stand data/shards.py,
which reads token shards, data/ngram.py, and in records/: settings.py, which checks what is typed,
checkpoint.py, what a stopped run goes on from, and report.py, which writes log and result.
"""
import contextlib
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint as checkpoint_block

from data.ngram import NGram, weights_by_support
from data.shards import load_dataset, refuse, write_json
from records import baseline, bench, checkpoint, plot, report
from records.settings import (
    check_config, convert, help_text, known, lacks_to_compile, launched, meet, parse_arguments,
    parse_schedule, split_processes, wait_for_first)

# ==== Config and tracks =========================================================================
ROOT = Path(__file__).resolve().parent


def opt(default, meaning, *choices, least=None, below=math.inf):
    """A field of Config with its unit and meaning, which --help prints, and what it may be.

    Whole numbers are at least 1 and others at least 0, unless `least` says otherwise.
    """
    least = least if least is not None else int(type(default) is int)
    return field(default=default, metadata=dict(help=meaning, choices=choices, least=least,
                                                below=below))


AVERAGES = ("last", "ema", "weights", "weights_recency", "probs", "probs_recency", "best")


@dataclass(frozen=True)
class Config:
    """Every tunable number of a run. The defaults are what the tracks share; 0 or false is off."""
    track: str = opt("cpu", "name of a track; the table TRACKS says what it changes")
    preset: str = opt("", "toy: shrink any track to seconds on a CPU, its techniques left on")
    run_id: str = opt("", "name of the folder under runs_dir; empty: track, date and time")
    runs_dir: str = opt("runs", "folder of the runs")
    seed: int = opt(1, "of init, order and dropout; members and ranks derive theirs", least=0)
    device: str = opt("auto", "auto: the first of the others that is there",
                      "auto", "cuda", "mps", "cpu")
    dtype: str = opt("auto", "of matrix products; auto: bfloat16 if it is fast",
                     "auto", "bfloat16", "float32")
    compile: bool = opt(True, "use torch.compile (where a compiler is found)")
    compile_model: str = opt("whole", "the part of the model to compile; none: the loss only",
                             "whole", "blocks", "none")
    prompt: str = opt("", "text that the command `sample` continues")
    time_limit: float = opt(0.0, "minutes of training that the track allows; 0: any")
    log_steps: int = opt(5, "steps between readings of the loss, each a line of metrics.jsonl")
    log_seconds: float = opt(5.0, "seconds between progress lines when not on a terminal")
    save_minutes: float = opt(5.0, "minutes between states to go on from; 0: at ends only")
    allow_changed: bool = opt(False, "go on with a run though settings, source or data changed")
    on_nonfinite: str = opt("stop", "if a step's loss or gradient is not finite", "stop", "skip")
    max_skips: int = opt(3, "steps that a member may skip with on_nonfinite=skip")
    hang_minutes: float = opt(30.0, "minutes that processes wait for each other", least=0.05)

    # ---- data
    dataset: str = opt("data/fineweb", "folder of *_train_*.bin, *_val_*.bin and meta.json")
    train_tokens: int = opt(100_000_000, "tokens, the whole data budget, selection included")
    selection_tokens: int = opt(132_000, "tokens, whole documents from the front of train", least=0)
    eval_tokens: int = opt(0, "tokens of val and of holdout that are scored; 0: all", least=0)
    vocab_size: int = opt(50257, "tokens of the dataset's vocabulary (its shards must agree)")
    seq_len: int = opt(2048, "tokens a row")
    batch_rows: int = opt(256, "rows a step, over all devices")
    device_batch_size: int = opt(4, "rows a micro-batch on a device; 0, auto: what fits", least=0)

    # ---- ensemble
    num_models: int = opt(1, "members, trained one after the other")
    num_epochs: int = opt(11, "passes over the training tokens, each member")
    first_epochs: int = opt(0, "passes of the first member; 0: num_epochs", least=0)
    num_chains: int = opt(1, "independent chains of num_models members, one ensemble of all")
    subset_fraction: float = opt(1.0, "part of the documents that a member sees")
    include_first: bool = opt(True, "keep the first, undistilled member in the ensemble")
    ngram_order: int = opt(0, "order, to 4, of an n-gram member; 0: none", least=0, below=5)
    ngram_support: bool = opt(True, "weights beside it depend on what it knows of the context")
    final_mixture: str = opt("uniform", "mixture that is the declared result",
                             "uniform", "learned", "ngram")
    mixture_size: int = opt(0, "members kept in the learned mixture, the heaviest; 0: all", least=0)
    shuffle: str = opt("documents", "permuted each epoch, then rows", "documents", "rows", "none")
    average: str = opt("last", "what a member ends as", *AVERAGES)
    average_epochs: int = opt(1, "ends of epochs that `weights` and `probs` average, the last ones")
    continue_members: bool = opt(False, "members start from the one before, perturbed")
    perturb_start: float = opt(0.25, "perturbation of the second member, in std of each tensor")
    perturb_end: float = opt(0.05, "perturbation of the last member; a cosine in between")
    edge_batch_rows: int = opt(0, "batch_rows in the outer quarters of members; 0: same", least=0)
    kd_from: int = opt(2, "first member that has a teacher")
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
    rope_fraction: float = opt(1.0, "part of the rotary frequencies that turn")
    key_offset: bool = opt(False, "in L layers the unrotated key channels are of the token before")
    xsa: str = opt("", "exclusive self-attention, learned by head", "", "fixed", "learned")
    iha: bool = opt(False, "a head's q, k, v weights are learned mixtures of all heads'")
    document_mask: bool = opt(False, "attention only within a document (sdpa: slow on a GPU)")
    rope_base: float = opt(10000.0, "base of the rotary position embedding; 0: none")
    window_pattern: str = opt("SSSL", "windows by layer, S = seq_len/2, L = seq_len; last is L")
    loop_start: int = opt(0, "first of the layers that are run repeatedly, counted from 0", least=0)
    loop_end: int = opt(0, "last of the layers that are run repeatedly", least=0)
    loop_count: int = opt(1, "times that loop_start..loop_end are run; 1: no looping")
    loop_from_epoch: int = opt(0, "epoch of num_epochs, from 0, in which looping begins", least=0)
    recurrence_from: float = opt(0.0, "progress from which the network runs twice; 0: never")
    window_schedule: str = opt("", "progress:S:L,... as parts of a row, with YaRN when L grows")
    softcap: float = opt(10.0, "logits are c*tanh(z/c); 0: not capped")
    proj_init: str = opt("normal", "of the output projections", "normal", "zero", "small",
                         "depth", "uniform", "xavier")
    mtp_weight: float = opt(0.0, "weight of the second-next-token loss (one extra block)")
    second_weight: str = opt("", "progress:weight,... of the second next token, on the same logits")
    third_weight: str = opt("", "progress:weight,... of the third next token, on the same logits")

    # ---- optimizer and regularization
    matrix_lr: float = opt(0.01, "Muon's learning rate, all matrices of the blocks")
    embed_lr: float = opt(0.0375, "AdamW's learning rate, embedding")
    head_lr: float = opt(0.0005, "AdamW's learning rate, output head")
    x0_lr: float = opt(0.025, "AdamW's learning rate, the a of x0_init")
    scalar_lr: float = opt(0.00025, "AdamW's learning rate, the r of resid_init and the skips")
    gate_lr: float = opt(0.0, "AdamW's learning rate, attention gates; 0: Muon, like the matrices")
    xsa_lr: float = opt(0.2, "AdamW's learning rate, xsa=learned")
    iha_lr: float = opt(0.02, "AdamW's learning rate, iha")
    grad_clip: float = opt(0.0, "largest norm of the whole gradient; 0: not clipped")
    meta_lr: float = opt(0.0, "norm of the meta-gradient's inner step; 0: off")
    meta_decay: bool = opt(False, "meta_lr falls with the learning rate's warmdown")
    meta_scope: str = opt("matrices", "weights that take the inner step", "matrices", "mlp")
    meta_rows: int = opt(16, "rows of half a virtual rank, whatever the number of GPUs")
    weight_decay: float = opt(1.3, "of matrices, embedding and head; a step takes lr*wd*w off")
    momentum: float = opt(0.95, "Muon's momentum", below=1)
    momentum_start: float = opt(0.85, "Muon's momentum at the first step", below=1)
    momentum_steps: int = opt(300, "steps in which the momentum rises; 0: at once", least=0)
    muon_eq: bool = opt(True, "MuonEq-R: rows to unit length before orthogonalization")
    normuon_beta2: float = opt(0.95, "NorMuon's second moment by neuron; 0: plain Muon", below=1)
    cautious: bool = opt(True, "decay only weights that the update does not push outwards")
    dropout: float = opt(0.1, "after the output projections of attention and MLP", below=1)
    mlp_dropout: bool = opt(True, "dropout after the MLP too")
    stochastic_depth: float = opt(0.0, "probability to skip the last block; linear", below=1)
    token_noise: float = opt(0.0, "part of the input tokens replaced by random ones", below=1)
    masked_weight: float = opt(0.0, "weight of a loss on inputs with holes (a second forward)")
    masked_rate: float = opt(0.15, "part of the tokens that are holes there", below=1)
    lr_warmup: float = opt(0.0, "fraction of the steps in which lr rises linearly from 0")
    lr_warmdown: float = opt(0.2, "fraction of the steps, at the end, in which lr falls")
    lr_power: float = opt(0.5, "the warmdown's exponent: 1 linear, 0.5 square root")
    lr_floor: float = opt(0.0, "lr at the end as a fraction of its peak")
    sawtooth_epochs: int = opt(0, "last epochs in each of which lr falls to 0.05", least=0)
    wd_schedule: str = opt("0:1", "progress:multiplier,... of weight_decay, linear in between")
    recompute_blocks: bool = opt(False, "less memory, more time: blocks run again in the backward")
    loss_chunk: int = opt(2048, "tokens whose logits are in memory at once")

    @property
    def padded_vocab(self):
        """Rows of embedding and head: a multiple of 64, for the hardware and for sharding."""
        return -(-self.vocab_size // 64) * 64

    @property
    def mlp_dim(self):
        units = -(-8 * self.model_dim // (3 * self.mlp_multiple))
        return units * self.mlp_multiple if self.swiglu else 4 * self.model_dim

    def rows_of(self, member):
        """Rows a step of a member (from 1)."""
        edge = min(member, self.num_models + 1 - member) <= self.num_models // 4
        return self.edge_batch_rows if edge and self.edge_batch_rows else self.batch_rows

    def epochs_of(self, member):
        return self.first_epochs if member == 1 and self.first_epochs else self.num_epochs


# What differs from the defaults, which are the settings of `limited` where tracks share them. The
# NanoGPT Slowrun's: limited (1 hour on 8 H100, slowrun #98), tiny (15 minutes, #99), two_hour (#96)
# and unlimited (#90). cpu and mini are ours; mini is untuned. cpu has x0_lr, scalar_lr for trials.
LARGE = dict(loop_start=15, loop_end=20, loop_count=3, mtp_weight=0.3, iha=True, average="probs")
TRACKS = {
    "cpu": dict(
        dataset="data/sample", vocab_size=2048, train_tokens=50_000, selection_tokens=5_000,
        time_limit=6, seq_len=256, batch_rows=8, device_batch_size=8, num_models=4, num_epochs=8,
        ngram_order=4, final_mixture="ngram", kd_alpha=0.5, num_layers=4, model_dim=128,
        num_heads=4, mlp_multiple=32, resid_init=0.0, x0_init=0.0, unet=False, dropout=0.0,
        qk_norm=False, window_pattern="L", window_schedule="0:0.25:0.5,0.5:0.5:1", softcap=0.0,
        proj_init="zero", second_weight="0:0.5,0.33:0.5,0.66:0", third_weight="0:0.25,0.33:0",
        normuon_beta2=0.0, matrix_lr=0.04, embed_lr=0.1, head_lr=0.003, x0_lr=0.02, scalar_lr=0.002,
        weight_decay=1.0, momentum_steps=100, lr_warmdown=0.4, lr_power=1.0, loss_chunk=1024,
        compile_model="none"),      # compiling it takes 44 s and saves about 30
    "mini": dict(
        train_tokens=4_000_000, selection_tokens=60_000, time_limit=15, seq_len=1024, batch_rows=64,
        device_batch_size=32, num_models=4, num_epochs=16, kd_alpha=0.5, num_layers=12,
        model_dim=768, num_heads=6, softcap=15.0, lr_warmdown=0.4, lr_power=1.0),
    "tiny": dict(
        time_limit=15, device_batch_size=32, num_epochs=15, num_layers=16, model_dim=1024,
        num_heads=8, softcap=15.0, resid_init=1.1, rope_fraction=0.5, key_offset=True,
        xsa="learned", recurrence_from=0.7, proj_init="zero", matrix_lr=0.032, embed_lr=0.12,
        head_lr=0.0008, x0_lr=0.2, scalar_lr=0.002, gate_lr=0.2, muon_eq=False, weight_decay=0.8,
        wd_schedule="0:1,0.1333:1,0.5333:0.125,1:1.1625", mlp_dropout=False, lr_warmdown=0.4,
        lr_power=1.0, sawtooth_epochs=4, second_weight="0:0.5,0.33:0.5,0.66:0",
        third_weight="0:0.25,0.33:0", average="weights_recency", average_epochs=4,
        meta_lr=0.5, meta_scope="mlp"),
    "limited": dict(
        **LARGE, time_limit=60, loop_from_epoch=6, sawtooth_epochs=3, average_epochs=3,
        meta_lr=0.5, meta_decay=True, dropout=0.05,
        wd_schedule="0:1,0.4:1,0.7273:0.65,0.8182:1.5,0.8182:0.65,0.9091:1.5,0.9091:0.65,1:1.5"),
    "two_hour": dict(
        **LARGE, time_limit=120, num_epochs=22, loop_from_epoch=13, sawtooth_epochs=8,
        average_epochs=9, stochastic_depth=0.05,    # the public 11: two from before the loops
        window_schedule=f"0:0.125:0.375,{6 / 22}:0.375:0.875,{13 / 22}:0.625:1",
        wd_schedule="0:1,0.4:1,0.6364:0.65," + ",".join(
            f"{e / 22:.4f}:0.65,{(e + 1) / 22:.4f}:1.5" for e in range(14, 22))),
    "unlimited": dict(
        device_batch_size=2, num_chains=5, num_models=96, num_epochs=2, continue_members=True,
        edge_batch_rows=192, final_mixture="learned", mixture_size=256, kd_from=9, kd_alpha=0.45,
        kd_temperature=1.2, model_dim=2048, num_heads=16, softcap=15.0, loop_start=15, loop_end=24,
        loop_count=5, mtp_weight=0.3, iha=True, grad_clip=1.0, momentum_start=0.95, lr_warmdown=1.0,
        lr_power=1.0, lr_floor=0.08, wd_schedule="0:0.7,1:1", time_limit=80 * 60),
}

# A preset's (upper limits of a track's numbers, values).
PRESETS = {
    "": ({}, {}),
    "toy": (dict(
        vocab_size=2048, train_tokens=9_000, selection_tokens=1_000, seq_len=64, batch_rows=16,
        device_batch_size=4, num_models=4, num_chains=2, num_epochs=2, first_epochs=0, kd_from=2,
        edge_batch_rows=12, mixture_size=2, average_epochs=2, sawtooth_epochs=1, num_layers=4,
        model_dim=64, num_heads=2, mlp_multiple=32, loop_start=2, loop_end=2, loop_count=2,
        loop_from_epoch=1, momentum_steps=10, meta_rows=2, loss_chunk=512),
        dict(dataset="data/sample", eval_tokens=2_000, compile=False)),
}


def make_config(track="cpu", **overrides):
    """The Config of `track` with `overrides` (values, or their text). UserError if unsound."""
    types = {f.name: type(f.default) for f in fields(Config)}
    limits, changes = PRESETS[known(overrides.get("preset", ""), PRESETS, "preset")]
    values = {**TRACKS[known(track, TRACKS, "track")], **changes}
    for name, limit in limits.items():
        values[name] = min(limit, values.get(name, getattr(Config, name)))
    for name, value in overrides.items():
        values[name] = convert(name, value, types[known(name, types, "field")])
    config = Config(**{**values, "track": track})
    check_config(config, VALUE_GATE_CHANNELS)
    return config


# ==== Runtime: processes, device, dtype, log ====================================================
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
    chains: tuple = (0,)        # the chains of members that these processes train
    is_main: bool = True        # writes the log
    group: object = None        # of the processes of a chain; None: all
    across: object = None       # of the processes with this rank in every chain; None: one chain

    def sum(self, tensor):
        """Sum of `tensor` over the processes of a chain, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, tensor, group=None):
        """[n, ...] of each process of the chain (or `group`) -> [processes * n, ...] on all."""
        group = group or self.group
        if not dist.is_initialized() or dist.get_world_size(group) == 1:
            return tensor
        whole = tensor.new_empty(dist.get_world_size(group) * len(tensor), *tensor.shape[1:])
        all_gather(whole, tensor.contiguous(), group=group)
        return whole

    def synchronize(self):
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()


# torch 2.13 renamed these two
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def start_runtime(c):
    """Join the process group that torchrun announces, if any; choose device, dtype, attention."""
    kind, notes = c.device, []
    rank, local_rank, world, local_world = launched()
    if kind == "auto":
        kind = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() and world == 1 else "cpu")
    refuse([(kind == "cuda" and local_world > torch.cuda.device_count(),
             f"--device=cuda: {local_world} process(es), {torch.cuda.device_count()} GPU(s) here;"
             " lower --nproc_per_node or use --device=cpu"),
            (kind == "mps" and (world > 1 or not torch.backends.mps.is_available()),
             "--device=mps: not here, or not for several processes; use --device=cpu")])
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
        meet("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", c.hang_minutes)
    dtype = getattr(torch, c.dtype if c.dtype != "auto" else
                    "bfloat16" if fast_bf16 else "float32")
    lacks = lacks_to_compile(kind)
    compiles = c.compile and not lacks
    torch._dynamo.config.recompile_limit = 64       # stages, and a teacher; beyond it is eager
    if c.compile and lacks:
        notes.append(f"compile   off: {lacks}; slower")
    attention = "sdpa" if c.document_mask else choose_attention(
        device, dtype, compiles and c.compile_model != "none", notes)
    rt = Runtime(rank, world, device, dtype, attention, compiles, notes, tuple(range(c.num_chains)),
                 rank == 0)
    rt.world = chain_processes(c, world)
    if rt.world < world:
        rt.group, rt.across = split_processes(world, c.num_chains, c.hang_minutes)
        rt.rank, rt.chains = rank % rt.world, (rank // rt.world,)
    return rt


def chain_processes(c, world):
    """Processes that train one chain; all, one chain after the other, if they cannot be split."""
    return world if world % c.num_chains else world // c.num_chains


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


# ==== Data (data/shards.py reads the shards) ====================================================
def member_documents(documents, fraction, seed):
    """A random part of `documents` (at least one), in their order; all of them if fraction is 1."""
    count = max(1, round(fraction * len(documents)))
    chosen = np.random.default_rng((seed, 1)).permutation(len(documents))[:count]
    return [documents[i] for i in sorted(chosen)]


class Rows:
    """The rows that a member trains on, as one endless sequence cut into steps.

    Every epoch permutes the documents, lays them end to end, cuts rows of seq_len + 1 tokens that
    overlap by one (so that each token is predicted once), and permutes the rows. Rows that do not
    fill an epoch's last step are carried over; only the very last step may be smaller.
    """

    def __init__(self, documents, seq_len, batch_rows, num_epochs, seed, bos, shuffle="documents"):
        self.documents, self.seq_len, self.batch_rows = documents, seq_len, batch_rows
        self.seed, self.bos, self.shuffle = seed, bos, shuffle
        self.tokens = sum(map(len, documents))
        self.rows_per_epoch = -(-(self.tokens - 1) // seq_len)
        self.total_rows = self.rows_per_epoch * num_epochs
        self.num_steps = -(-self.total_rows // batch_rows)
        self.epoch, self.stream, self.order, self.document_order = None, None, None, None

    def load(self, epoch):
        """Shuffle and cut `epoch`, unless it is the present one."""
        if epoch != self.epoch:
            random, documents = np.random.default_rng((self.seed, epoch)), self.documents
            self.stream = None      # before there is another: 2 bytes a token
            self.document_order = (random.permutation if self.shuffle == "documents" else
                                   np.arange)(len(documents))
            self.stream = np.concatenate([documents[i] for i in self.document_order])
            order = np.arange if self.shuffle == "none" else random.permutation
            self.order, self.epoch = order(self.rows_per_epoch), epoch

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
    start: float                # progress, 0 to 1
    loops: int                  # times that loop_start..loop_end are run
    passes: int                 # times that the whole network is run, all but the last detached
    windows: tuple              # keys that a query of each layer sees, itself included
    yarn: tuple                 # window growths (old, new) so far, for yarn()


def stages(c):
    """The stages of a member's training, in order."""
    growth = sorted(parse_schedule(c.window_schedule or "0:0.5:1", "window_schedule", "0:0.5:1"))
    loop_from = c.loop_from_epoch / c.num_epochs if c.loop_count > 1 else 0.0
    starts = {0.0, loop_from, c.recurrence_from, *(start for start, _, _ in growth)}
    result = []
    for start in sorted(start for start in starts if start < 1):
        short, long = [entry[1:] for entry in growth if entry[0] <= start][-1]
        sizes = [round(entry[2] * c.seq_len) for entry in growth if entry[0] <= start]
        result.append(Stage(
            start, c.loop_count if start >= loop_from else 1,
            2 if c.recurrence_from and start >= c.recurrence_from else 1,
            windows(c, short, long), tuple(zip(sizes, sizes[1:]))))
    return result


def windows(c, short=0.5, long=1.0):
    """Keys that a query of each layer sees, itself included: S or L, parts of a row."""
    pattern = (c.window_pattern or "L") * c.num_layers
    sizes = {kind: max(1, round(part * c.seq_len)) for kind, part in (("S", short), ("L", long))}
    return tuple(sizes[kind] for kind in (*pattern[:c.num_layers - 1], "L"))


def layer_order(c, loops):
    """Layer numbers in the order in which they run: loop_start..loop_end `loops` times."""
    layers = list(range(c.num_layers))
    if loops > 1:
        end = c.loop_end + 1
        layers[end:end] = layers[c.loop_start:end] * (loops - 1)
    return layers


def yarn(frequency, growths):
    """(frequencies, factor of the attention scale) after windows grew: modded-nanogpt's YaRN.

    Frequencies that turn less than once in the old window are interpolated, those that turn 32
    times are kept, in between is linear (arXiv 2309.00071).
    """
    scale = 1.0
    for old, new in growths:
        turns = old * frequency / (2 * math.pi)
        keep = ((turns - 1) / 31).clamp(0, 1)
        frequency = frequency * (old / new + keep * (1 - old / new))
        scale *= 0.2 * math.log(new / old) + 1
    return frequency, scale


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


class AttentionSpec(NamedTuple):
    """What a layer's attention knows of positions: made by GPT.prepare."""
    window: int                 # keys that a query sees, itself included
    mask: object                # of make_mask
    rope: tuple | None          # cos, sin [T, 1, Dh/2]
    from_before: object         # bool [Dh]: key channels taken from the token before, or None
    scale: float                # of the products of queries and keys
    path: str                   # "fa3", "flex" or "sdpa"


def attend(q, k, v, spec):
    """Causal attention, q, k, v [B, T, H, Dh] -> [B, T, H, Dh]."""
    if spec.path == "fa3":
        from flash_attn_interface import flash_attn_func
        y = flash_attn_func(q, k, v, causal=True, window_size=(spec.window - 1, 0),
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
        self.heads, self.qk_norm, self.xsa_kind = c.num_heads, c.qk_norm, c.xsa
        self.q, self.k, self.v, self.proj = (Linear(c.model_dim, c.model_dim) for _ in range(4))
        self.gate = Linear(GATE_CHANNELS, c.num_heads) if c.attn_gate else None
        self.value_gate = Linear(VALUE_GATE_CHANNELS, c.num_heads) if has_value_projection else None
        self.xsa = nn.Parameter(torch.empty(c.num_heads)) if c.xsa == "learned" else None
        self.mix = nn.Parameter(torch.empty(3, c.num_heads, c.num_heads)) if c.iha else None

    def project(self, x):
        """q, k, v [B, T, H, Dh]; with IHA each head's weights are a mixture of all heads'."""
        B, T, D = x.shape
        weights = [layer.weight for layer in (self.q, self.k, self.v)]
        if self.mix is not None:         # slowrun #69: -0.008
            weights = [(m @ w.view(self.heads, -1)).view(D, D) for m, w in zip(self.mix, weights)]
        return (F.linear(x, w.to(x.dtype)).view(B, T, self.heads, -1) for w in weights)

    def forward(self, x, value, spec):
        B, T, D = x.shape
        q, k, v = self.project(x)
        if self.value_gate is not None:  # the gate starts at 1 (slowrun #11: -0.027)
            gate = 2 * torch.sigmoid(self.value_gate(x[..., :VALUE_GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * value.view(B, T, self.heads, -1)
        if spec.rope is not None:
            q, k = rotate(q, *spec.rope), rotate(k, *spec.rope)
        if self.qk_norm:
            q, k = norm(q), norm(k)
        if spec.from_before is not None:    # keys of the token before (modded-nanogpt)
            k = torch.where(spec.from_before, torch.cat((k[:, :1], k[:, :-1]), dim=1), k)
        y = attend(q, k, v, spec)
        if self.xsa_kind:                # exclusive self-attention: less of the token's own value
            own = v / v.norm(dim=-1, keepdim=True).clamp(min=1e-4)
            part = torch.tanh(self.xsa).view(-1, 1).to(y.dtype) if self.xsa is not None else 1.0
            y = y - part * (y * own).sum(dim=-1, keepdim=True) * own
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
        self.dropout, self.mlp_dropout = c.dropout, c.dropout if c.mlp_dropout else 0.0

    def forward(self, x, value, spec):
        y = self.attn(norm(x), value, spec)
        x = x + F.dropout(y, self.dropout, self.training)
        return x + F.dropout(self.mlp(norm(x)), self.mlp_dropout, self.training)


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
        self.value_projs = nn.ModuleDict({str(i): Linear(c.model_dim, c.model_dim) for i in valued})
        self.head = Linear(c.model_dim, c.padded_vocab)
        self.resid_lambdas = nn.Parameter(torch.empty(c.num_layers)) if c.resid_init else None
        self.x0_lambdas = nn.Parameter(torch.empty(c.num_layers)) if c.x0_init else None
        self.skip_lambdas = nn.Parameter(torch.empty(c.num_layers // 2)) if (
            c.unet and c.num_layers > 1) else None
        self.mtp_proj = Linear(2 * c.model_dim, c.model_dim) if c.mtp_weight else None
        self.mtp_block = Block(c, False) if c.mtp_weight else None
        self.bos = None             # of the dataset: for document masks
        self.prepare(c.seq_len)

    @torch.no_grad()
    def init_weights(self, seed):
        """Fill every parameter, by name, from `seed`; the same values on all ranks."""
        c, random = self.config, torch.Generator(self.wte.weight.device).manual_seed(seed)
        d = c.model_dim
        normal = lambda std: lambda p: p.normal_(0, std, generator=random)
        constant = lambda value: lambda p: p.fill_(value)
        unit_gain = lambda p: p.uniform_(-1, 1, generator=random).mul_((3 / p.shape[1]) ** 0.5)
        table = (
            (r"wte\.weight", normal(1)),
            (r"head\.weight", normal(0.001)),
            (r"resid_lambdas", constant(c.resid_init)),
            (r"x0_lambdas", constant(c.x0_init)),
            (r"skip_lambdas", constant(1)),
            (r".*attn\.xsa", constant(0)),
            (r".*attn\.mix", lambda p: p.copy_(torch.eye(c.num_heads).expand_as(p))),
            (r".*attn\.(value_)?gate\.weight", constant(0)),
            (r".*(\.[qkv]|\.fc|mlp\.gate|value_projs\.\d+|mtp_proj)\.weight", unit_gain),
            (r".*\.proj\.weight", {      # normal: -0.007 over zero (slowrun #59)
                "normal": normal(d ** -0.5), "zero": constant(0), "small": normal(0.001),
                "depth": normal((2 * c.num_layers * d) ** -0.5), "uniform": lambda p: p.uniform_(
                    -(3 / d) ** 0.5, (3 / d) ** 0.5, generator=random),
                "xavier": lambda p: normal((2 / sum(p.shape)) ** 0.5)(p)}[c.proj_init]))
        for name, p in self.named_parameters():
            rules = [fill for pattern, fill in table if re.fullmatch(pattern, name)]
            if len(rules) != 1:
                raise ValueError(f"parameter {name} has {len(rules)} initializations")
            rules[0](p)
        return self

    def prepare(self, length, stage=None):
        """Set the stage (None: the last) and positions of `length` tokens, outside of a graph."""
        c, device = self.config, self.wte.weight.device
        self.stage = stage = stage or stages(c)[-1]
        width = c.model_dim // c.num_heads
        rotating = max(1, round(width // 2 * c.rope_fraction))
        frequency = c.rope_base ** (-torch.arange(rotating, device=device) / rotating)
        frequency, factor = yarn(frequency, stage.yarn)
        frequency = F.pad(frequency, (0, width // 2 - rotating))     # the other pairs stand still
        angle = torch.arange(length, device=device)[:, None, None] * frequency      # [T, 1, Dh/2]
        rope = (angle.cos().to(self.dtype), angle.sin().to(self.dtype)) if c.rope_base else None
        from_before = (torch.arange(width, device=device) % (width // 2) >= rotating)
        self.specs = {window: AttentionSpec(
            window, make_mask(window, length, device, self.attention), rope,
            from_before if c.key_offset and window == max(stage.windows) else None,
            factor * width ** -0.5, self.attention) for window in {*stage.windows, c.seq_len}}
        return self

    def trunk(self, x, x0, specs):
        """One pass through the layers. x, x0 [B, T, D]"""
        c, skips = self.config, {}
        half, deepest = c.num_layers // 2, max(1, c.num_layers - 1)
        for i in layer_order(c, self.stage.loops):
            mirror = c.num_layers - 1 - i
            if self.skip_lambdas is not None and i > mirror:     # U-Net (slowrun #17: -0.021)
                x = x + self.skip_lambdas[half - 1 - mirror] * skips[mirror]
            if self.resid_lambdas is not None:
                x = self.resid_lambdas[i] * x
            if self.x0_lambdas is not None:
                x = x + self.x0_lambdas[i] * x0
            value = self.value_projs[str(i)](x0) if str(i) in self.value_projs else None
            inputs = (x, value, specs[self.stage.windows[i]])
            y = checkpoint_block(self.blocks[i], *inputs, use_reentrant=False) if (
                c.recompute_blocks and self.training) else self.blocks[i](*inputs)
            if self.training and c.stochastic_depth * i:         # slowrun #62: -0.003
                kept = torch.rand((), device=x.device) >= c.stochastic_depth * i / deepest
                y = torch.where(kept, y, x)
            x = y
            if i < mirror:
                skips[i] = x
        return x

    def forward(self, tokens):
        """int64 [B, T] -> normalized final hidden states [B, T, D]. `prepare(T)` comes first.

        A token of -1 is masked: it has no embedding.
        """
        x0 = norm(self.wte(tokens.clamp(min=0)).to(self.dtype)) * (tokens >= 0).unsqueeze(-1)
        specs, x = self.specs_for(tokens), x0
        if self.stage.passes > 1:       # full recurrence (slowrun #92: -0.005)
            with torch.no_grad():
                x = norm(self.trunk(x, x0, specs))
        return norm(self.trunk(x, x0, specs))

    def specs_for(self, tokens):
        """self.specs, with document masks if they are wanted."""
        if not self.config.document_mask:
            return self.specs
        document = (tokens == self.bos).cumsum(dim=1)
        same = (document[:, None, :, None] == document[:, None, None, :]).tril()    # [B, 1, T, T]
        inside = (tokens != self.bos)[:, :, None, None]     # a BOS has no token before
        return {window: spec._replace(
            mask=same if spec.mask is None else same & spec.mask,
            from_before=None if spec.from_before is None else spec.from_before & inside)
            for window, spec in self.specs.items()}

    def mtp_hidden(self, hidden, tokens, next_tokens):
        """Hidden states that predict the token after next (DeepSeek's MTP). [B, T, D]

        hidden: what `forward(tokens)` returned; next_tokens: int64 [B, T], its targets.
        """
        following = norm(self.wte(next_tokens).to(self.dtype))
        x = self.mtp_proj(torch.cat((hidden, following), dim=-1))
        return norm(self.mtp_block(x, None, self.specs_for(tokens)[self.config.seq_len]))

    def logits(self, hidden):
        """[..., D] -> softcapped fp32 logits [..., vocab_size]; the padding is not among them."""
        c = self.config
        return capped_logits(hidden, self.head.weight.to(hidden.dtype), c.softcap)[
            ..., :c.vocab_size]


def flops_per_token(c, stage):
    """Training FLOPs a token: 6 per matmul parameter and exact causal window attention.

    A layer that is run k times counts k times; the MTP block and its use of the head count too,
    and so does the second forward of masked inputs.
    """
    # the mean number of keys over a row's positions; each costs 12 D
    keys = lambda window: (window * (window + 1) / 2 + (c.seq_len - window) * window) / c.seq_len
    with torch.device("meta"):
        model = GPT(c)
    size = lambda module: sum(p.numel() for p in module.parameters())
    total = 6 * size(model.head)
    passes = 1 + (stage.passes - 1) / 3                 # all but the last are forward only
    for i in layer_order(c, stage.loops):
        value = size(model.value_projs[str(i)]) if str(i) in model.value_projs else 0
        total += passes * (6 * (size(model.blocks[i]) + value)
                           + 12 * c.model_dim * keys(stage.windows[i]))
    total *= 1 + bool(c.masked_weight)
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


def loss_chunk(h, w, y, y_weights, teacher_h, teacher_w, alpha, temperature, softcap, vocab):
    """Loss and gradients of one chunk of tokens, the only ones whose [n, V] logits exist.

    (1 - alpha) * CE + alpha * T^2 * KL(teacher || student), both at temperature T, of softcapped
    logits. h [n, D], w [V, D], teacher_* likewise or None; y int64 [n, J]: the next token and those
    after it (-1: none; a token without a next one is not counted), whose cross-entropies add up to
    CE with y_weights [J]. Returns the sums of CE, of the next token's CE and of KL, and
    d(sum of the loss) / dh [n, D], / dw [V, D].
    """
    s = capped_logits(h, w, softcap)
    slope = 1 - (s / softcap) ** 2 if softcap else 1.0
    column = torch.arange(s.shape[1], device=s.device)
    real = column < vocab                       # the padding never receives probability
    s = torch.where(real, s, -torch.inf)
    logp = torch.log_softmax(s, dim=1)
    counted = y[:, :1] >= 0
    next_ce = -torch.where(column == y[:, :1], logp, 0).sum()
    wanted = counted * sum(y_weights[j] * (column == y[:, j:j + 1]) for j in range(y.shape[1]))
    ce = -torch.where(wanted > 0, wanted * logp, 0).sum()
    mass = ((y >= 0) * y_weights).sum(dim=1, keepdim=True)
    grad = (1 - alpha) * (mass * logp.exp() - wanted)
    kl = torch.zeros_like(ce)
    if teacher_h is not None:
        t = torch.where(real, capped_logits(teacher_h, teacher_w, softcap), -torch.inf)
        teacher_logp = torch.log_softmax(t / temperature, dim=1)
        student_logp = torch.log_softmax(s / temperature, dim=1) if temperature != 1 else logp
        q = teacher_logp.exp()
        difference = torch.where(real, teacher_logp - student_logp, 0)
        kl = torch.where(counted, q * difference, 0).sum()
        grad = grad + alpha * temperature * (student_logp.exp() - q)
    grad = torch.where(counted, grad * slope, 0).to(h.dtype)
    return ce, next_ce, kl, grad @ w, grad.T @ h


class ChunkedLoss(torch.autograd.Function):
    """Head, softcap, CE and KL over chunks of tokens, with the gradients made in the forward.

    No [tokens, vocabulary] tensor of the micro-batch ever exists (as in Liger Kernel). Returns sums
    over the counted tokens: loss, CE of the next token, KL; the loss has gradients for hidden
    [N, D] and weight [V, D].
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, target_weights, teacher_hidden, teacher_weight, alpha,
                temperature, softcap, vocab, chunk, chunk_function):
        w = weight.to(hidden.dtype)
        sums = torch.zeros(3, device=hidden.device, dtype=widen(hidden[:0]).dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            teacher = teacher_hidden[rows] if teacher_hidden is not None else None
            *parts, grad_hidden[rows], grad_w = chunk_function(
                hidden[rows], w, targets[rows], target_weights, teacher, teacher_weight, alpha,
                temperature, softcap, vocab)
            sums += torch.stack(parts)
            grad_weight += grad_w
        ctx.save_for_backward(grad_hidden, grad_weight)
        ce, next_ce, kl = sums.unbind()
        ctx.mark_non_differentiable(next_ce, kl)
        return (1 - alpha) * ce + alpha * temperature ** 2 * kl, next_ce, kl

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (grad_hidden * grad_loss.to(grad_hidden.dtype), grad_weight * grad_loss,
                *[None] * 10)


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
        (r"(blocks\.\d+|mtp_block)\.(?!attn\.gate).*weight|(value_projs\.\d+|mtp_proj)\.weight",
         "muon", c.matrix_lr, wd, None),
        (r".*attn\.gate\.weight", *(("adamw", c.gate_lr, 0.0, (0.9, 0.99)) if c.gate_lr else
                                    ("muon", c.matrix_lr, wd, None))),
        (r".*attn\.xsa", "adamw", c.xsa_lr, 0.0, (0.9, 0.95)),
        (r".*attn\.mix", "adamw", c.iha_lr, 0.0, (0.8, 0.95)),
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
    compiled: adamw_update compiled, for matrices (embedding, head): reads and writes them once.
    ValueError if a parameter is in no group of the table, or in two.
    """

    def __init__(self, named_parameters, config, world=1, rank=0, dtype=torch.float32, group=None,
                 compiled=None):
        self.config, self.world, self.dtype, self.steps, members = config, world, dtype, 0, {}
        self.process_group, self.compiled = group, compiled
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
        if c.grad_clip:
            for _, handle in reductions:        # once: gloo's second wait brings the sum back
                handle and handle.wait()
            reductions = [(grad, None) for grad, _ in reductions]
            self.clip([grad for grad, _ in reductions], c.grad_clip)
        for group, (grad, handle) in zip(self.groups, reductions):
            handle and handle.wait()
            lr, wd = group.lr * lr_multiplier, group.wd * wd_multiplier
            share = group.slice(group.params, group.first, group.share)
            if group.kind == "adamw":
                numbers, update = (self.steps, lr, wd), adamw_update
                if self.compiled and share.dim() == 2:      # 0-D: not a graph for each number
                    numbers, update = map(torch.tensor, map(float, numbers)), self.compiled
                update(share, grad, group.m, group.v, *numbers, *group.betas)
            else:
                muon_update(share, grad, group.m, group.v, lr, wd, momentum, c.normuon_beta2,
                            c.muon_eq, c.cautious, self.dtype)
            gathers.append(self.gather(share))
        for group, (whole, handle) in zip(self.groups, gathers):
            handle and handle.wait()
            updated = whole if group.kind == "muon" else [whole[:len(group.params[0])]]
            for p, new in zip(group.params, updated):
                p.copy_(new)

    def clip(self, grads, limit):
        """Scale the gradients, in place, so that their norm over all ranks is at most `limit`."""
        square = sum(grad.float().square().sum() for grad in grads)
        if self.world > 1:
            dist.all_reduce(square, group=self.process_group)
        for grad in grads:
            grad *= (limit / (square.sqrt() + 1e-6)).clamp(max=1)

    def scatter(self, whole, share):
        """(this rank's share of the sum of `whole` over ranks, a handle to wait for or None)."""
        if self.world == 1:
            return whole, None
        part = whole.new_empty(share, *whole.shape[1:])
        return part, reduce_scatter(part, whole.contiguous(), group=self.process_group,
                                    async_op=True)

    def gather(self, share):
        if self.world == 1:
            return share, None
        whole = share.new_empty(self.world * len(share), *share.shape[1:])
        return whole, all_gather(whole, share.contiguous(), group=self.process_group,
                                 async_op=True)


# ==== Schedules: pure functions of progress, the fraction of steps done =========================
def base_multiplier(c, progress):
    """Linear warmup, flat, then ((1 - progress) / warmdown) ** power down to the floor."""
    if progress < c.lr_warmup:
        return progress / c.lr_warmup
    left = min(1.0, (1 - progress) / c.lr_warmdown) if c.lr_warmdown else 1.0
    return c.lr_floor + (1 - c.lr_floor) * left ** c.lr_power


def lr_multiplier(c, progress):
    """base_multiplier; in each of the last sawtooth_epochs a cosine from it down to 0.05."""
    base, epoch = base_multiplier(c, progress), progress * c.num_epochs
    if not c.sawtooth_epochs or epoch < c.num_epochs - c.sawtooth_epochs:
        return base
    return 0.05 + (max(base, 0.05) - 0.05) * (1 + math.cos(math.pi * (epoch % 1))) / 2


def piecewise_linear(schedule, progress):
    """Value at `progress` of "progress:value,progress:value,..."; two at one progress: a jump."""
    x, y = zip(*sorted(parse_schedule(schedule), key=lambda point: point[0]))
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
    """log p(target) of a mixture of models, fp64 [n]: k arrays [n], weights [k] (None: equal).

    A target's probability under a mixture is the mixture of its probabilities, so one float a token
    and member is all that an ensemble's loss takes. Weights may differ by token: [k, n].
    """
    weights = np.full(len(logps), 1 / len(logps)) if weights is None else np.asarray(weights)
    total = np.full(len(logps[0]), -np.inf)
    with np.errstate(divide="ignore"):
        for weight, logp in zip(np.log(weights), logps):
            np.logaddexp(total, weight + np.asarray(logp, np.float64), out=total)
    return total


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


def learned_mixture(members, size=0, support=None):
    """val and holdout losses, and the weights, of the mixture that is fitted on selection.

    members: a list of {split: log p(target)}. size: members kept, the heaviest; 0: all. support:
    {split: what the n-gram, the last member, knows of each context}: the losses are with weights
    that depend on it, drawn towards those returned.
    """
    logps = {split: [m[split] for m in members] for split in ("selection", "val", "holdout")}
    weights = fit_mixture(logps["selection"])
    if 0 < size < len(members):         # as slowrun #90: cut off, then renormalized
        weights[np.argsort(weights)[:-size]] = 0.0
        weights /= weights.sum()
    table, losses = None, []
    if support:
        table = weights_by_support(logps["selection"], support["selection"], weights)
    for split in ("val", "holdout"):
        by_token = table[:, support[split]] if support else weights
        losses.append(mean_loss(mixture_logp(logps[split], by_token)))
    return (*losses, [round(float(w), 4) for w in weights])


def kept_members(members, c):
    """Those of `members`, in the order of training, chain after chain, that the ensemble holds."""
    return [m for i, m in enumerate(members) if c.include_first or i % c.num_models]


def ensemble_curve(members, c, ngram=None, support=None):
    """One dict for each n: the mixtures of the first n members that the ensemble may hold.

    members: a list of {split: log p(target)} in the order of training; ngram: the same of the
    count-based member, support: for learned_mixture. Beyond 16 members weights are fitted for
    powers of two and all only.
    """
    kept, numbers = kept_members(members, c), kept_members(range(1, len(members) + 1), c)
    curve, sums = [], {}
    for n, member in enumerate(kept, 1):
        some, point = kept[:n], {"n": n, "member": numbers[n - 1]}
        for split, logp in member.items():
            sums[split] = np.logaddexp(sums.get(split, -np.inf), logp.astype(np.float64))
            point[f"{split}_loss"] = mean_loss(sums[split]) + math.log(n)
        if "selection" in some[0] and (n <= 16 or n == len(kept) or n & (n - 1) == 0):
            mixtures = {"learned": (some, c.mixture_size)}
            if ngram:
                mixtures["ngram"] = [*some, ngram], c.mixture_size, support
            for name, mixture in mixtures.items():
                (point[f"val_loss_{name}"], point[f"holdout_loss_{name}"],
                 point[f"weights_{name}"]) = learned_mixture(*mixture)
        curve.append(point)
    return curve


# ==== One member ================================================================================
class Averages:
    """What a member can end as besides its last weights; `average` names it.

    ema: exponential moving average of the weights, of every 10th step, decaying to 0.15 in an
    epoch. weights, probs: means of the weights, or of the probabilities, at the ends of the last
    average_epochs epochs; _recency: weighted 1, 2, 3, ... best: the best of all on selection.
    """

    def __init__(self, c, model, rows):
        self.c, self.model, self.rows, self.ends = c, model, rows, 0
        self.params = {name: p.detach() for name, p in model.named_parameters()}    # as they are
        self.names = [name for name in AVERAGES[:-1] if c.average in (name, "best")]
        self.sums = {name: [0.0, {}] for name in self.names if name != "last"}  # mass, sums

    def add(self, name, values, weight, keep=1.0):
        mass, sums = self.sums[name]
        self.sums[name][0] = keep * mass + weight
        for key, value in values.items():
            sums[key] = keep * sums.get(key, 0.0) + weight * value

    def update(self, step, score):
        """After each step. score(): {split: log p(target)} of the model as it is."""
        rows, c = self.rows, self.c
        if "ema" in self.sums and (step + 1) % 10 == 0:
            decay = 0.15 ** (10 * rows.batch_rows / rows.rows_per_epoch)
            self.add("ema", self.params, 1 - decay, decay)
        end = math.floor(rows.epoch_of(step)) + 1
        if rows.epoch_of(step + 1) < end or end <= c.num_epochs - c.average_epochs:
            return
        self.ends += 1
        logp = score() if any("probs" in name for name in self.sums) else {}
        values = {"weights": self.params,
                  "probs": {split: np.exp(p.astype(np.float64)) for split, p in logp.items()}}
        for name in set(self.sums) - {"ema"}:
            kind, _, recency = name.partition("_")
            self.add(name, values[kind], self.ends if recency else 1)

    def finish(self, score):
        """(name, {split: log p(target)}) of the choice, whose weights the model gets."""
        if self.names == ["last"]:
            return "last", score()
        last, options = {k: p.clone() for k, p in self.params.items()}, {}
        for name in self.names:
            mass, sums = self.sums.get(name, (1.0, last))
            mean = {key: total / mass for key, total in sums.items()} or last   # nothing averaged
            if "probs" in name:
                options[name] = {s: np.log(p).astype(np.float32) for s, p in mean.items()}, last
            else:
                self.model.load_state_dict(mean)
                options[name] = score(), mean
        best = self.names[0] if len(options) == 1 else min(
            options, key=lambda name: mean_loss(options[name][0]["selection"]))
        self.model.load_state_dict(options[best][1])
        return best, options[best][0]


class Trainer:
    """The models, compiled functions and clocks that all members of a run share.

    Weights are copied into one student and one teacher, so another member compiles nothing anew.
    """

    def __init__(self, c, rt, log, data):
        if not c.device_batch_size:
            c = bench.fit_micro_batch(sys.modules[__name__], c, rt, data, log and log.folder)
        self.c, self.rt, self.log, self.data = c, rt, log, data
        self.model = self.new_model()
        self.teacher = self.new_model().to(rt.dtype).eval() if c.kd_alpha else None
        fast = lambda f, wanted=True: (
            torch.compile(f, dynamic=False) if rt.compile and wanted else f)
        self.forward, self.mtp_hidden = (
            fast(f, c.compile_model == "whole") for f in (GPT.forward, GPT.mtp_hidden))
        self.chunk_function, self.logprobs = fast(loss_chunk), fast(target_logprobs)
        self.adamw = fast(adamw_update) if rt.compile and c.compile_model != "none" else None
        self.compile_seconds = self.eval_seconds = self.earlier_seconds = 0.0   # earlier launches
        self.optimizer, self.one = None, torch.ones(1, device=rt.device)
        self.plan, self.seen = stages(c), set()
        self.flops = {stage: flops_per_token(c, stage) for stage in self.plan}  # of a token
        # a teacher's forward is a third of a step; 3 p - 2: all of its passes are forward only
        last = self.plan[-1]._replace(passes=3 * self.plan[-1].passes - 2)
        plain = replace(c, mtp_weight=0.0, masked_weight=0.0)
        self.teacher_flops, self.start = flops_per_token(plain, last) / 3, time.perf_counter()
        self.chain, self.at, self.keeper = 0, 0, None   # at: steps that the member has done

    def new_model(self):
        with self.rt.device:
            model = GPT(self.c, self.rt.dtype, self.rt.attention)
        model.bos = self.data.bos
        if self.c.compile_model == "blocks" and self.rt.compile:    # one graph for like blocks
            for block in filter(lambda module: isinstance(module, Block), model.modules()):
                block.compile(dynamic=False)
        return model

    def new_optimizer(self):
        return MuonAdamW(self.model.named_parameters(), self.c, self.rt.world, self.rt.rank,
                         self.rt.dtype, self.rt.group, self.adamw)

    def clocks(self):
        """[compile, evaluation, wall] seconds of the run so far."""
        return [self.compile_seconds, self.eval_seconds,
                time.perf_counter() - self.start + self.earlier_seconds]

    def requests(self):
        return self.keeper.requests() if self.keeper else [0.0, 0.0]

    @contextlib.contextmanager
    def first_time(self, *key):
        """Clocks what runs under a new key as compilation; yields whether the key is new."""
        new = self.rt.compile and key not in self.seen
        if new:
            self.rt.synchronize()
        start = time.perf_counter()
        yield new
        if new:
            self.seen.add(key)
            self.rt.synchronize()
            self.compile_seconds += time.perf_counter() - start

    def loss(self, hidden, targets, target_weights=None, teacher=None, alpha=0.0):
        """ChunkedLoss of hidden [B, T, D], targets [B, T, J]; teacher: its hidden states."""
        c, teacher_weight = self.c, None
        if teacher is not None:
            teacher = teacher.flatten(0, 1)
            teacher_weight = self.teacher.head.weight.to(self.rt.dtype)
        weights = self.one if target_weights is None else target_weights
        return ChunkedLoss.apply(
            hidden.flatten(0, 1), self.model.head.weight, targets.flatten(0, 1), weights, teacher,
            teacher_weight, alpha, c.kd_temperature, c.softcap, c.vocab_size, c.loss_chunk,
            self.chunk_function)

    def backward(self, inputs, targets, counts, progress, distill):
        """Backward passes of some rows; returns the sums [ce, kl].

        counts: targets of the whole batch, and of its second next tokens, that the loss is over.
        """
        c, rt, model, teacher = self.c, self.rt, self.model, None
        alpha, sums = c.kd_alpha if distill else 0.0, torch.zeros(2, device=rt.device)
        schedules = (c.second_weight, c.third_weight)           # of the 2nd and 3rd next token
        later = [piecewise_linear(s or "0:0", progress) for s in schedules if any(schedules)]
        weights = torch.tensor([1.0, *later]).to(rt.device) if later else self.one
        micro = micro_batch_rows(c, rt.world)
        for clean, y in zip(inputs.split(micro), targets.split(micro)):
            draw = lambda rate: (clean != model.bos) & (
                torch.rand(clean.shape, device=clean.device) < rate)
            x = clean
            if c.token_noise:           # random tokens in place of some (arXiv 2606.16246)
                noise = x.flatten()[torch.randint(x.numel(), x.shape, device=x.device)]
                x = torch.where(draw(c.token_noise) & (noise != model.bos), noise, x)
            hidden = self.forward(model, x)
            if distill:
                with torch.no_grad():
                    teacher = self.forward(self.teacher, clean)
            shifted = [F.pad(y[:, j:], (0, j), value=-1) for j in range(1 + len(later))]
            loss, ce, kl = self.loss(hidden, torch.stack(shifted, dim=2), weights, teacher, alpha)
            if c.mtp_weight:        # slowrun #65; its targets do not cross the row's end
                ahead = self.mtp_hidden(model, hidden, x, y.clamp(min=0))
                second = F.pad(y[:, 1:], (0, 1), value=-1).unsqueeze(2)
                loss = loss + (1 - alpha) * c.mtp_weight * self.loss(ahead, second)[0] * (
                    counts[0] / counts[1])
            if c.masked_weight:     # predict from inputs with holes (arXiv 2606.06888)
                hidden = self.forward(model, x.masked_fill(draw(c.masked_rate), -1))
                loss = loss + c.masked_weight * self.loss(hidden, y.unsqueeze(2))[0]
            (loss / counts[0]).backward()
            sums += torch.stack((ce, kl)) / counts[0]
        return sums

    def gradients(self, inputs, targets, progress, distill):
        """Backward passes of this rank's rows of the batch; returns the sums [ce, kl].

        The loss is divided by the targets of the whole batch, so gradients add up over ranks. With
        the first-order meta-gradient (slowrun #98: -0.012), each virtual rank, 2 * meta_rows rows
        wherever they are computed, takes half of its gradient a step of norm meta_lr further on.
        """
        c, rt = self.c, self.rt
        counts = int((targets >= 0).sum()), max(1, int((targets[:, 1:] >= 0).sum()))
        inputs, targets = inputs.to(rt.device), targets.to(rt.device)
        parts = len(inputs) // (2 * c.meta_rows) if c.meta_lr else rt.world
        sums = torch.zeros(2, device=rt.device)
        for part in range(rt.rank, parts, rt.world):
            x, y = inputs[part::parts], targets[part::parts]
            if not c.meta_lr:
                sums += self.backward(x, y, counts, progress, distill)
                continue
            before = [(p, p.grad) for p in self.model.parameters()]
            for p, _ in before:
                p.grad = None
            sums += self.backward(x[:c.meta_rows], y[:c.meta_rows], counts, progress, distill)
            size = c.meta_lr * (base_multiplier(c, progress) if c.meta_decay else 1.0)
            with self.adapted(size):
                sums += self.backward(x[c.meta_rows:], y[c.meta_rows:], counts, progress, distill)
            for p, grad in before:
                p.grad = p.grad if grad is None else grad.add_(p.grad)
        return sums

    @contextlib.contextmanager
    def adapted(self, size):
        """Within: plastic weights are moved against their gradients by a step of norm `size`."""
        pattern = {"matrices": r"(?!wte|head).*weight", "mlp": r"blocks.*mlp.*weight"}
        plastic = [p for name, p in self.model.named_parameters()
                   if re.fullmatch(pattern[self.c.meta_scope], name) and p.grad is not None]
        saved = [p.detach().clone() for p in plastic]
        length = sum(p.grad.square().sum() for p in plastic).sqrt().clamp(min=1e-12)
        with torch.no_grad():
            for p in plastic:
                p -= size / length * p.grad
        yield
        with torch.no_grad():
            for p, value in zip(plastic, saved):
                p.copy_(value)

    def start_member(self, c, seed, k):
        """Fresh weights and optimizer, or the last member's, perturbed (slowrun #90)."""
        rt, model = self.rt, self.model.train()
        if c.continue_members and k > 1:
            random = torch.Generator(rt.device).manual_seed(seed)
            done = (k - 2) / max(1, c.num_models - 2)
            strength = c.perturb_end + (c.perturb_start - c.perturb_end) * (
                1 + math.cos(math.pi * done)) / 2
            with torch.no_grad():
                for p in model.parameters():
                    noise = torch.randn(p.shape, generator=random, device=rt.device)
                    p += strength * p.std(correction=0) * noise
        else:
            model.init_weights(seed)
            self.optimizer = self.new_optimizer()
        torch.manual_seed(7919 * seed + rt.rank)                # dropout differs between ranks

    def train_member(self, k, chain=0, state=None):
        """Train member k (from 1) of a chain, taught by the one before, still in self.model.

        state: of checkpoint.Keeper, from which training goes on. Returns Meter.facts() and
        {split: log p(target)}; self.model has the member's weights.
        """
        rt, distill = self.rt, self.teacher is not None and k >= max(2, self.c.kd_from)
        c = replace(self.c, num_epochs=self.c.epochs_of(k), batch_rows=self.c.rows_of(k))
        seed, self.chain = 1000 * c.seed + chain * c.num_models + k, chain
        if distill:
            self.teacher.load_state_dict(self.model.state_dict())
        self.start_member(c, seed, k)
        rows = Rows(member_documents(self.data.train, c.subset_fraction, seed), c.seq_len,
                    c.batch_rows, c.num_epochs, seed, self.data.bos, c.shuffle)
        flops = {s: count + distill * self.teacher_flops for s, count in self.flops.items()}
        meter, averages = report.Meter(self, k, rows, flops), Averages(c, self.model, rows)
        first = checkpoint.restore(self, state, meter, averages) if state else 0
        for step in range(first, rows.num_steps):
            progress = step / rows.num_steps
            lr = lr_multiplier(c, progress)
            stage = [stage for stage in self.plan if stage.start <= progress][-1]
            if stage != self.model.stage:
                self.model.prepare(c.seq_len, stage)
            inputs, targets = rows.step(step)
            with self.first_time("step", stage, distill) as new:
                sums = self.gradients(inputs, targets, progress, distill)
                if checkpoint.is_finite(self, sums, meter, rows, step):
                    self.optimizer.step(lr, piecewise_linear(c.wd_schedule, progress),
                                        momentum_at(c, step))
            due, stop = meter.update(step, sums, stage, lr, new)
            averages.update(step, self.score_splits)
            if self.keeper and (due or stop or step + 1 == rows.num_steps):
                self.keeper.save(k, step + 1, meter, averages, stop)
        rt.synchronize()
        facts = meter.facts()
        facts["average"], scores = averages.finish(self.score_splits)
        return facts, scores

    def score_splits(self):
        """{split: log p(target)} of self.model as it is, in its last stage."""
        stage = self.model.stage
        self.model.eval().prepare(self.c.seq_len)
        scores = {split: self.score(part) for split, part in self.data.evaluated().items()}
        self.model.train().prepare(self.c.seq_len, stage)
        return scores

    @torch.no_grad()
    def score(self, documents):
        """log p(target) of all tokens but the first of `documents`, laid end to end: fp32 [n - 1].

        Rows overlap by one token, so that each is scored exactly once, whatever the world size.
        """
        c, rt, _ = self.c, self.rt, self.rt.synchronize()
        start = time.perf_counter() - self.compile_seconds
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
                hidden = self.forward(self.model, x).flatten(0, 1)
                for h, t in zip(hidden.split(c.loss_chunk), y.flatten().split(c.loss_chunk)):
                    parts.append(self.logprobs(h, weight, t, c.softcap, c.vocab_size))
        logp = rt.gather(torch.cat(parts)).cpu().numpy().astype(np.float32)[:len(tokens) - 1]
        self.eval_seconds += time.perf_counter() - self.compile_seconds - start
        return logp


# ==== The run ===================================================================================
def micro_batch_rows(c, world):
    """Rows of a micro-batch. UserError if the batch cannot be shared out evenly."""
    if c.meta_lr:
        unit, micro = world * 2 * c.meta_rows, max(1, min(c.device_batch_size, c.meta_rows))
    else:
        fewest = min(rows for rows in (c.batch_rows, c.edge_batch_rows) if rows)
        micro = max(1, min(c.device_batch_size, fewest // world))
        unit = world * micro
    parts = f"2 x {c.meta_rows} rows of --meta_rows" if c.meta_lr else (
        f"{micro} rows of --device_batch_size")
    refuse([(rows % unit, f"--{name}={rows} is not divisible by {world} process(es) x {parts};"
             f" the nearest that is: {max(1, round(rows / unit)) * unit}")
            for name in ("batch_rows", "edge_batch_rows") for rows in [getattr(c, name)]]
           + [(c.meta_lr and c.meta_rows % micro, f"--device_batch_size={micro} does not divide"
               f" --meta_rows={c.meta_rows}")])
    return micro


def train_chain(trainer, chain, signals):
    """Train the members of one chain that are not finished; returns (their facts, their scores)."""
    c, rt, log, members, scores = trainer.c, trainer.rt, trainer.log, [], []
    trainer.keeper = keeper = checkpoint.Keeper(trainer, chain, signals)
    first = chain * c.num_models            # members before this chain's
    state, ready = keeper.load(), True      # ready: the member before is in trainer.model
    for k in range(1, c.num_models + 1):
        done = keeper.finished(first + k)
        if done is None:
            if not ready:
                keeper.load_weights(first + k - 1, state, k - 1)
            with keeper.blame(k):
                facts, logp = trainer.train_member(k, chain, keeper.of(state, k))
            facts |= {f"{split}_loss": mean_loss(p) for split, p in logp.items()}
            keeper.save_member(first + k, logp, facts)
        else:
            facts, logp = done
        ready = done is None
        members.append(facts)
        if rt.rank:             # one process of a chain writes, and holds all scores
            continue
        scores.append(logp)
        curve = ensemble_curve([{"val": member["val"]} for member in scores], c)
        single, mixed = facts["val_loss"], curve[-1]["val_loss"] if curve else float("nan")
        log.metrics(chain=chain, member=k, val_loss=single, ensemble=len(curve),
                    ensemble_val_loss=mixed)
        log.say(f"member {k}/{c.num_models} {'done' if ready else 'was done'} in"
                f" {report.minutes(facts['train_seconds'])}: val loss {single:.4f}, ensemble of"
                f" {len(curve)}: {mixed:.4f}")
    return members, scores


def run(c, overrides):
    """Train the members, write the run's folder, print the table; returns the result on rank 0."""
    start, rt = time.perf_counter(), start_runtime(c)
    micro_batch_rows(c, rt.world)
    data = load_dataset(ROOT / c.dataset, c)
    claimed = checkpoint.claim(c, report.run_folder(c), data.hashes, rt.is_main)
    folder, began, changes, lock = claimed
    if (folder / "result.json").exists() and not changes:
        return report.show_finished(sys.modules[__name__], folder, rt.is_main)
    log = report.Log(folder, rt.is_main, c.log_seconds)
    trainer, ngram, support = Trainer(c, rt, log, data), None, None
    if c.ngram_order and rt.is_main:
        ngram, support = NGram(
            np.concatenate(data.train), c.vocab_size, data.bos, c.ngram_order).score(data)
    rows = Rows(data.train, c.seq_len, c.batch_rows, c.num_epochs, c.seed, data.bos)
    report.announce(trainer, overrides, rows, micro_batch_rows(trainer.c, rt.world), not began,
                    changes)
    with checkpoint.Signals() as signals:
        parts = [train_chain(trainer, chain, signals) for chain in rt.chains]
    trainer.keeper.end()
    if rt.across is not None:   # the chains of other processes
        mine, parts = parts[0], [([], [])] * c.num_chains
        dist.gather_object(mine, None if rt.chains[0] else parts, group=rt.across, group_dst=0)
    members, scores = (sum(lists, []) for lists in zip(*parts))
    memory = rt.gather(torch.tensor([report.peak_memory(rt.device)], device=rt.device),
                       dist.group.WORLD)
    result = None
    if rt.is_main:
        curve = ensemble_curve(scores, c, ngram, support if c.ngram_support else None)
        alone = {f"{split}_loss": mean_loss(p) for split, p in (ngram or {}).items()}
        result = report.summarize(trainer, members, curve, alone, memory, overrides, start)
        plot.plot_progress(result, folder / "progress.png")
        for line in report.closing_lines(sys.modules[__name__], c, rt, data, folder, result):
            log.say(line)
        log.say("RESULT " + json.dumps(result), console=False)
        write_json(folder / "result.json", result)      # with it the run is finished
        shutil.rmtree(folder / "states", ignore_errors=True)
        lock.close()
    wait_for_first()
    return result


# ==== Commands beyond training ==================================================================
def dispatch(argv):
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "train"
    known(command, ("train", "baseline", "sample", "check", "bench"), "command")
    if {"--help", "-h"} & set(argv):
        return print(help_text(__doc__, fields(Config), TRACKS))
    arguments = parse_arguments(argv)
    c = make_config(**arguments)
    overrides = {name: getattr(c, name) for name in arguments if name != "track"}
    if command == "train":
        run(c, overrides)
    elif command in ("baseline", "bench"):
        measure = baseline.measure_baseline if command == "baseline" else bench.bench
        measure(sys.modules[__name__], c, overrides)
    elif command == "sample":
        report.sample(sys.modules[__name__], c)
    else:
        micro_batch_rows(c, chain_processes(c, launched()[2]))
        load_dataset(ROOT / c.dataset, c)
        print(f"track {c.track}: settings and dataset {c.dataset} are sound")


def main(argv=None):
    """Run a command; returns the exit code: 0, 2 for what a person can mend, 128 + a signal."""
    try:
        dispatch(list(sys.argv[1:] if argv is None else argv))
        return 0
    except (Exception, KeyboardInterrupt) as error:
        code = report.tell(error)
        if code is None:        # a defect: its traceback is wanted
            raise
        return code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
