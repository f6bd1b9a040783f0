"""What a run will take, before it is started: FLOPs, hours, disk and memory. Trains nothing.

    python tools/plan.py --track=limited                        on this device
    python tools/plan.py --track=limited --gpu=H100 --gpus=8    on others, as if they were here

Takes the fields of train_gpt.py, as --field=value, and reads no dataset: an epoch is taken to be
train_tokens less selection_tokens. --gpu: a name that train_gpt.PEAK_FLOPS knows; --gpus: how many
of them, with a process each (on a CPU: processes). Without them: what is here; with --gpu alone: 8
for a public track, else 1.

Hours are FLOPs / (peak FLOP/s x an assumed MFU), without evaluation and compilation. A CPU's peak
is measured by a second of matrix products. Memory is that of one process by formula: what autograd
keeps, what the loss and the optimizer make, in eager mode on a CPU, where the tests compare it with
what is allocated. Compiled code on a GPU keeps less: there it is an upper estimate, which has not
been measured. CUDA itself, NCCL and fragments of free memory are not in it: ROOM is left for them.
"""
import functools
import os
import sys
from collections import Counter, namedtuple
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from _runs import run_tool
from bench import FEATURES, device_peak
from train_gpt import (GPT, PEAK_FLOPS, MuonAdamW, Rows, Runtime, UserError, hardware_name,
                       epochs_of, is_distilled, layer_order, make_config, micro_batch_rows, num_parameters,
                       parse_arguments, peak_flops, plan_launch, start_runtime, step_flops,
                       training_stages)

GPU_MFU = 0.4               # assumed; public runs of this kind say 0.4 to 0.5 on H100
CPU_MFU = 0.15              # assumed; the track cpu, in bf16 on 2 cores, at 19,000 tokens/s
# GiB of memory by the names of PEAK_FLOPS
GPU_MEMORY = {"H100 PCIe": 80, "H100 NVL": 94, "H100": 80, "H200 NVL": 141, "H200": 141,
              "GH200": 96, "B200": 180, "GB200": 186, "A100": 80, "L40S": 48, "RTX 5090": 32,
              "RTX 4090": 24}
OTHER_SIZES = {"A100": "there are A100 of 40 GiB", "GH200": "there are GH200 of 144 GiB"}
ROOM = 0.9                  # of a device's memory that tensors may take
CAN_BE_CUT = 0.83           # of the tokens of data/prose, for --split_tokens
LEAST_CHUNK = 64            # tokens of a loss chunk, below which lowering it is no advice
HELD_OUT = {"prose": 110_000}   # tokens of val, about, and of holdout, by dataset
HELD_OUT_ELSE = 10_000_000      # FineWeb's, and of datasets that are not known
PUBLIC_GPUS = dict.fromkeys(("tiny", "limited", "two_hour", "unlimited"), 8)

# Where a run is planned for: what it is called, processes, dtype, peak FLOP/s of a process or None,
# the assumed MFU, bytes of memory of a process.
Device = namedtuple("Device", "name processes dtype peak mfu memory is_gpu note")


@functools.cache
def meta_model(config):
    """A GPT whose weights are nowhere."""
    with torch.device("meta"):
        return GPT(config)


# ==== What autograd keeps of a micro-batch ======================================================
# Bytes of a micro-batch of `tokens` tokens: of a tensor [tokens, model_dim] in the dtype and in
# fp32, of [tokens, mlp_dim] and [tokens, num_heads] in the dtype; item: of a number in the dtype;
# cast: what a weight's copy in that dtype takes a number (fp32 weights are used as they are).
Sizes = namedtuple("Sizes", "tokens item cast hidden wide mlp heads")


def sizes_of(config, world_size, dtype):
    """The Sizes of a micro-batch. UserError if the batch cannot be shared out evenly."""
    tokens = micro_batch_rows(config, world_size) * config.seq_len
    item = dtype.itemsize
    return Sizes(tokens, item, item if item < 4 else 0, item * tokens * config.model_dim,
                 4 * tokens * config.model_dim, item * tokens * config.mlp_dim,
                 item * tokens * config.num_heads)


def norm_bytes(sizes):
    """RMS norm keeps its input (in fp32 a copy, unless it is that) and one number a token."""
    return sizes.wide + 4 * sizes.tokens


def attention_bytes(config, sizes, is_valued, is_masked):
    """What the attention of one block keeps for its backward pass."""
    matrix = config.model_dim ** 2
    norms_by_head = 4 * sizes.tokens * config.num_heads
    total = norm_bytes(sizes) + sizes.hidden                # the norm, its result (input of q k v)
    total += 3 * matrix * (sizes.item if config.iha else sizes.cast)    # weights of q, k, v
    if is_valued:
        total += sizes.hidden + matrix * sizes.cast         # value from x0, weight that makes it
        total += 2 * sizes.heads                            # its gate: sigmoid, and twice that
    if config.qk_norm:
        total += 2 * (sizes.wide + norms_by_head)           # rotated q and k
    total += 3 * sizes.hidden                               # q, k, v as they are attended
    total += sizes.hidden + norms_by_head                   # the result, and sums of exponentials
    if is_masked:
        total += sizes.item * config.seq_len ** 2           # the mask, in numbers
    if config.xsa:
        total += 2 * sizes.hidden + 4 * sizes.heads         # unit values, what is left
    if config.attn_gate:
        total += sizes.hidden + sizes.heads                 # the gated result (input of proj), gate
    total += matrix * sizes.cast                            # weight of proj
    return total + sizes.hidden * bool(config.dropout)      # what dropout multiplies by


def mlp_bytes(config, sizes):
    """What the MLP of one block keeps: its matrices, fc, gate, silu(gate) and their product."""
    total = norm_bytes(sizes) + sizes.hidden                # the norm, its result
    total += 3 * config.model_dim * config.mlp_dim * sizes.cast
    total += 4 * sizes.mlp
    return total + sizes.hidden * bool(config.dropout and config.mlp_dropout)


def block_bytes(config, sizes, layer, window):
    """What block `layer` keeps each time that it runs, and what is before it in the trunk."""
    is_valued = config.value_projections and (config.num_layers - 1 - layer) % 2 == 0
    total = attention_bytes(config, sizes, is_valued, window < config.seq_len - 1)
    total += sizes.hidden * bool(config.resid_init)         # r x keeps x
    return total + mlp_bytes(config, sizes)


def mtp_bytes(config, sizes):
    """What the MTP block keeps, with its input and its result."""
    total = 8 * sizes.tokens + norm_bytes(sizes)            # next tokens and their embedding
    total += 2 * sizes.hidden                               # hidden states beside it
    total += 2 * config.model_dim ** 2 * sizes.cast         # weight of mtp_proj
    total += attention_bytes(config, sizes, False, False) + mlp_bytes(config, sizes)
    return total + norm_bytes(sizes) + sizes.hidden         # the last norm, its result


def trunk_bytes(config, sizes, stage):
    """What a forward pass in `stage` keeps, without the MTP block; passes but the last keep
    nothing."""
    total = 8 * sizes.tokens + norm_bytes(sizes)            # tokens, their embedding
    total += sizes.hidden * bool(config.x0_init or config.value_projections)    # x0
    total += sum(block_bytes(config, sizes, layer, stage.windows[layer])
                 for layer in layer_order(config, stage.loops))
    if config.unet:     # inputs of skips; r x has kept all but the middle one
        half = config.num_layers // 2
        total += sizes.hidden * (1 - config.num_layers % 2 if config.resid_init else half)
    return total + norm_bytes(sizes) + sizes.hidden         # the last norm, its result


def mask_bytes(config):
    """Masks of the windows that are shorter than a row, of all stages."""
    windows = [window for stage in training_stages(config) for window in {*stage.windows}]
    return sum(config.seq_len ** 2 for window in windows if window < config.seq_len - 1)


# ==== Loss ======================================================================================
def loss_bytes(config, sizes, has_teacher, row=0):
    """What chunked_loss takes at most, its gradients included; row: tokens that are remembered."""
    n = min(config.loss_chunk, sizes.tokens)
    logits = 4 * n * (config.padded_vocab + row)            # fp32 [n, V], and [n, row]
    weight = config.model_dim * config.padded_vocab
    # logits, p, what of it is the target's, their difference; the gradient of the target before
    within = 4 + bool(config.second_weight or config.third_weight)
    after = 1 + sizes.item / 4          # logits, and the gradient in the dtype
    if has_teacher:     # logits and gradient, the teacher's logits, log p of both, q, two products
        within = 8.5
        after += 2      # teacher's logits, gradient of KL
    earlier = weight * sizes.item * (sizes.tokens > n)      # gradient of the chunk before
    chunk = max(within * logits, after * logits + weight * sizes.item)
    gradients = sizes.hidden + 4 * weight                   # for hidden states and for the head
    return int(weight * sizes.cast + gradients + earlier + chunk)


def teacher_bytes(config, sizes):
    """What a forward pass takes that keeps nothing: inputs of skips, x0, x, a block's parts."""
    skips = config.num_layers // 2 * bool(config.unet)
    return (skips + 4) * sizes.hidden + max(3 * sizes.mlp, 2 * sizes.wide)


# ==== Optimizer =================================================================================
def muon_temporaries(p, config, item):
    """What muon_update makes for matrices p [n, rows, cols] at most, beside p and the gradient."""
    whole, narrow = 4 * p.numel(), item * p.numel()
    gram = item * p.shape[0] * min(p.shape[1:]) ** 2
    # u in fp32; x, a x, the product and their sum beside one gram, or x, a x and four grams
    polar = whole + max(4 * narrow + gram, 2 * narrow + 4 * gram)
    # u, x, (what NorMuon scaled), (decay by element); two terms of the update
    update = 2 + bool(config.normuon_beta2) + bool(config.cautious) + 2
    return max(polar, update * whole)


def strings_bytes(config):
    """The tables that --spelling needs, on the device."""
    return (8 + 4) * FEATURES * config.padded_vocab * bool(config.spelling)


def optimizer_bytes(groups, config, item, rank):
    """(state, temporaries at most) of MuonAdamW.step on process `rank`."""
    state = copies = temporaries = 0
    for group in groups:
        p = group.stack(group.params)
        whole = 4 * p.numel()
        made = 0
        if group.kind.stacked:              # parameters, until all are updated; gradients, briefly
            copies += whole
        if group.owner == rank:
            state += 4 * sum(part.numel() for part in group.new_state().values())
            made = 3 * whole                # AdamW: the root, a quotient, a product
            if group.row.optimizer == "spelled":
                made = 5 * whole            # that, of features: their gradients and updates, too
            if group.kind.stacked:
                made = muon_temporaries(p, config, item)
        temporaries = max(temporaries, copies + made)
    return state, temporaries


def no_tables(config):
    """Of tokens.npz, as large as they would be: nothing depends on what they hold."""
    shape = FEATURES, config.padded_vocab
    return {"features": np.zeros(shape, np.int64), "weights": np.zeros((*shape, 1), np.float32)}


def fullest_process(config, world_size, dtype):
    """(optimizer state, temporaries) of the process that has most of both."""
    with torch.device("meta"):
        named = meta_model(config).named_parameters()
        groups = MuonAdamW(named, config, Runtime(0, world_size), no_tables(config)).groups
        return max((optimizer_bytes(groups, config, dtype.itemsize, rank)
                    for rank in range(world_size)), key=sum)


# ==== Memory of one process =====================================================================
def fixed_parts(config, world_size, dtype):
    """({part: bytes} that are there in all of a step, bytes of the optimizer's temporaries)."""
    state, temporaries = fullest_process(config, world_size, dtype)
    count = num_parameters(meta_model(config))
    teachers = bool(config.kd_alpha) * max(1, min(config.kd_teachers, config.num_models - 1))
    return {"weights": 4 * count, "optimizer state": state,
            "teachers": dtype.itemsize * count * teachers,
            "masks": mask_bytes(config), "strings of tokens": strings_bytes(config)}, temporaries


def plastic_bytes(config):
    """Copies of the weights that the meta-gradient moves."""
    count = sum(p.numel() for name, p in meta_model(config).named_parameters()
                if name.endswith("weight") and not name.startswith(("wte", "head"))
                and (config.meta_scope == "matrices" or "blocks" in name and "mlp" in name))
    return 4 * count


def gradient_parts(config, world_size, sizes):
    """({part: bytes} that are there when a micro-batch begins, whether gradients are)."""
    whole = 4 * num_parameters(meta_model(config))
    rows = sizes.tokens // config.seq_len
    if config.meta_lr:          # the second half of a virtual rank
        virtual_ranks = config.batch_rows // (2 * config.meta_rows * world_size)
        return {"gradients": whole, "meta-gradient: weights moved": plastic_bytes(config),
                "meta-gradient: ranks before": whole * (virtual_ranks > 1)}, True
    has_gradients = config.batch_rows // world_size > rows
    return {"gradients": whole * has_gradients}, has_gradients


def backward_begins(config, sizes, has_gradients):
    """Bytes at the start of backward, beside what is kept: head's gradient, then last block's."""
    head = 4 * config.model_dim * config.padded_vocab
    losses = 1 + bool(config.mtp_weight)
    of_head = losses * (sizes.hidden + head) + sizes.hidden + head
    # MTP: of its loss the head's gradient waits for that of the main loss
    waiting = 2 * head + sizes.hidden if config.mtp_weight else head * (not has_gradients)
    matrix = config.model_dim * config.mlp_dim * (sizes.cast + 4)       # a weight's gradient
    of_block = 3 * sizes.hidden + max(2 * sizes.mlp, matrix)    # gradients of fc and gate
    return max(of_head, waiting + of_block)


def backward_ends(config, sizes, stage, has_gradients):
    """Bytes at the end of backward, beside all gradients: the first block, then the embedding."""
    table = 4 * config.model_dim * config.padded_vocab
    waits = has_gradients or config.mtp_weight      # else the gradient that comes is the first one
    block = block_bytes(config, sizes, 0, stage.windows[0]) + 2 * sizes.mlp + 4 * sizes.hidden
    return max(block, table) if waits else max(0, block - table)


def stage_phases(config, world_size, dtype, stage):
    """{phase: {part: bytes}} of one process in a training step of `stage`."""
    sizes = sizes_of(config, world_size, dtype)
    fixed, temporaries = fixed_parts(config, world_size, dtype)
    gradients, has_gradients = gradient_parts(config, world_size, sizes)
    whole = {"gradients": 4 * num_parameters(meta_model(config))}
    has_teacher = is_distilled(config, config.num_models)
    trunk = trunk_bytes(config, sizes, stage)
    mtp = mtp_bytes(config, sizes) if config.mtp_weight else 0
    row = config.row_memory * config.seq_len
    loss = loss_bytes(config, sizes, has_teacher, row) + sizes.hidden * has_teacher
    phases = {"loss": gradients | {"activations": trunk, "loss": loss}}
    if has_teacher:
        phases["teacher"] = gradients | {
            "activations": trunk, "teacher's activations": teacher_bytes(config, sizes)}
    if mtp:             # the gradients of the main loss are kept meanwhile
        head = 4 * config.model_dim * config.padded_vocab
        phases["loss of MTP"] = gradients | {
            "activations": trunk + mtp,
            "loss": loss_bytes(config, sizes, False) + sizes.hidden + head}
    phases["backward"] = gradients | {
        "activations": trunk + mtp,
        "gradients of activations": backward_begins(config, sizes, has_gradients)}
    phases["end of backward"] = gradients | whole | {
        "last activations": backward_ends(config, sizes, stage, has_gradients)}
    phases["optimizer"] = whole | {"optimizer temporaries": temporaries}
    return {phase: fixed | parts for phase, parts in phases.items()}


def total(parts):
    return sum(parts.values())


def memory_phases(config, world_size, dtype):
    """{phase of a step: {part: bytes}} of one process, each in the stage in which it is largest."""
    phases = {}
    for stage in training_stages(config):
        for phase, parts in stage_phases(config, world_size, dtype, stage).items():
            phases[phase] = max(phases.get(phase, {}), parts, key=total)
    return phases


def memory_parts(config, world_size, dtype):
    """{part: bytes} of one process at the peak of a step; parts of 0 bytes are left out."""
    parts = max(memory_phases(config, world_size, dtype).values(), key=total)
    return {part: size for part, size in parts.items() if size}


def peak_bytes(config, world_size, dtype):
    """Bytes of tensors of one process at the peak of a step."""
    return total(memory_parts(config, world_size, dtype))


def fitting(config, device, room):
    """The fields to lower, as text, so that a step fits into `room` bytes, or None.

    device_batch_size to the largest power of two that does, or else loss_chunk, too.
    """
    size = 1 << micro_batch_rows(config, device.processes).bit_length()
    trials = []
    while size > 1:
        size //= 2
        trials.append({"device_batch_size": size})
    chunk = 1 << (config.loss_chunk - 1).bit_length()
    while chunk > LEAST_CHUNK and not config.row_memory:        # else a chunk is a whole row
        chunk //= 2
        trials.append({"device_batch_size": 1, "loss_chunk": chunk})
    for trial in trials:
        lowered = replace(config, **trial)
        if peak_bytes(lowered, device.processes, device.dtype) <= room:
            return " ".join(f"--{name}={value}" for name, value in trial.items()
                            if value != getattr(config, name))
    return None


# ==== Disk and host memory ======================================================================
def scored_tokens(config):
    """(tokens of selection, val and holdout, how that is known)."""
    each = config.eval_tokens or HELD_OUT.get(Path(config.dataset).name, HELD_OUT_ELSE)
    how = "" if config.eval_tokens else f" (for {each:,} tokens of val, of holdout)"
    return config.selection_tokens + 2 * each, how


def average_bytes(config):
    """The sum that `average` keeps in host memory and in the state."""
    weights = 4 * num_parameters(meta_model(config))
    return {"weights": weights, "probs": 8 * scored_tokens(config)[0]}[config.average]


def state_bytes(config):
    """state.safetensors: weights, the optimizer's state of all processes, the average."""
    fixed, _ = fixed_parts(config, 1, torch.float32)
    return fixed["weights"] + fixed["optimizer state"] + average_bytes(config)


# ==== Device ====================================================================================
def whole_number(text):
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--gpus={text}: must be a whole number from 1 on")
    return int(text)


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def other_gpus(config, gpu, gpus):
    """The Device of `gpus` GPUs (0: as many as the track has in public) of the name `gpu`."""
    if gpu not in PEAK_FLOPS:
        raise UserError(f"unknown GPU {gpu!r}; known are {', '.join(PEAK_FLOPS)}")
    count = gpus or PUBLIC_GPUS.get(config.track, 1)
    name = "bfloat16" if config.dtype == "auto" else config.dtype
    if gpu not in GPU_MEMORY:
        raise UserError(f"--gpu={gpu}: its memory is not in GPU_MEMORY of tools/plan.py; add it")
    note = OTHER_SIZES.get(gpu, "")
    return Device(f"{count}x {gpu}", count, getattr(torch, name), PEAK_FLOPS[gpu], GPU_MFU,
                  GPU_MEMORY[gpu] * 2 ** 30, True, note)


def this_device(config, processes):
    """The Device that is here; processes: 0: as many as run.sh would start."""
    runtime = start_runtime(replace(config, compile=False))
    count = processes or plan_launch(config.device, "check")[0]
    if runtime.device.type == "cuda":
        name = torch.cuda.get_device_name(runtime.device)
        memory = torch.cuda.get_device_properties(runtime.device).total_memory
        return Device(f"{count}x {name}", count, runtime.dtype, peak_flops(runtime.device), GPU_MFU,
                      memory, True, "")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    peak, _ = device_peak(runtime)
    return Device(hardware_name(runtime.device), count, runtime.dtype, peak and peak / count,
                  CPU_MFU, memory // count, False, "")


# ==== What is printed ===========================================================================
def amount(size):
    """Bytes in GiB, or in MiB below a tenth of that."""
    return f"{size / 2 ** 30:,.1f} GiB" if size >= 2 ** 30 / 10 else f"{size / 2 ** 20:,.2f} MiB"


def time_text(flops, device):
    """Hours that a number of FLOPs take, or minutes below a tenth of one."""
    if not device.peak:
        return "unknown time"
    hours = flops / (device.peak * device.processes * device.mfu) / 3600
    return f"{hours:.2f} hours" if hours >= 0.1 else f"{60 * hours:.2f} minutes"


def planned_flops(config, tokens):
    """Training FLOPs of each member, a list, with `tokens` an epoch."""
    by_stage, teacher = step_flops(config)
    starts = [*(stage.start for stage in by_stage), 1.0]
    a_token = sum(flops * (end - start) for flops, (start, end) in
                  zip(by_stage.values(), pairwise(starts)))
    return [tokens * epochs_of(config, number) * (a_token + teacher * is_distilled(config, number))
            for number in range(1, config.num_models + 1)]


def model_lines(config, tokens):
    """Parameters and tokens."""
    model = meta_model(config)
    return [f"model     {num_parameters(model):,} parameters, {num_parameters(model.blocks):,} of"
            f" them in {config.num_layers} blocks",
            f"tokens    {tokens:,} an epoch; {config.num_models} member(s)"]


def member_lines(config, tokens, device):
    """A line for each kind of member: steps, FLOPs, hours."""
    flops = planned_flops(config, tokens)
    numbers = range(1, config.num_models + 1)
    kinds = Counter((is_distilled(config, n), epochs_of(config, n), flops[n - 1]) for n in numbers)
    rows = config.batch_rows
    lines = []
    for (distilled, epochs, count), members in kinds.items():
        # a range is a document of as many tokens
        steps = Rows([range(tokens)], config.seq_len, rows, epochs, 0, 0).num_steps
        lines.append(
            f"members   {members} with{'' if distilled else 'out'} teacher: {epochs} epochs,"
            f" {steps:,} steps of {rows} rows, {count:.4g} FLOPs,"
            f" {time_text(count, device)}")
    return lines


def run_lines(config, tokens, device):
    """FLOPs and hours of the run, and whether that is too long."""
    flops = sum(planned_flops(config, tokens))
    lines = [f"run       {flops:.4g} FLOPs, {time_text(flops, device)}; evaluation and compilation"
             " come on top"]
    if 0 < config.flop_limit < flops:
        lines.append(f"          OVER the track's limit of {config.flop_limit:.4g} FLOPs")
    if device.peak:
        speed = device.peak * device.processes
        where = "data sheet" if device.is_gpu else "best of big matrix products"
        lines.append(f"          at an assumed MFU of {device.mfu:.0%} of {speed / 1e12:.4g}"
                     f" TFLOP/s ({where}, {dtype_name(device.dtype)})")
        minutes = flops / speed / device.mfu / 60
        if 0 < config.time_limit < minutes:
            lines.append(f"          OVER the track's time limit of {config.time_limit:g} minutes")
    return lines


def disk_lines(config):
    """Files of a run."""
    weights = 4 * num_parameters(meta_model(config))
    tokens, how = scored_tokens(config)
    members = config.num_models * (weights + 4 * tokens)
    return [f"disk      a member: weights {amount(weights)}, log p {amount(4 * tokens)}{how}",
            f"          all members {amount(members)}; the state {amount(state_bytes(config))},"
            " twice that while it is replaced"]


def memory_lines(config, device):
    """Memory of one process by part, in its largest phase; the others' sums."""
    phases = memory_phases(config, device.processes, device.dtype)
    parts = memory_parts(config, device.processes, device.dtype)
    peak = max(phases, key=lambda phase: total(phases[phase]))
    rows = micro_batch_rows(config, device.processes)
    lines = [f"memory    of the fullest process, with micro-batches of {rows} row(s) in"
             f" {dtype_name(device.dtype)}", f"          at the peak of a step, which is: {peak}",
             *(f"          {part:30}{amount(size):>12}" for part, size in parts.items()),
             f"          {'total':30}{amount(total(parts)):>12}"]
    others = [f"{phase} {amount(total(held))}" for phase, held in phases.items() if phase != peak]
    for first in range(0, len(others), 3):
        label = "other phases: " if not first else " " * 14
        lines.append("          " + label + ", ".join(others[first:first + 3]))
    doubt = "estimate, of eager mode, without what PyTorch itself takes"
    if device.is_gpu:
        doubt = "upper estimate, of eager mode, not measured on a GPU; CUDA and NCCL not in it"
    return [*lines, f"          {doubt}"]


def host_bytes(config):
    """Host memory of the main process: the average, and the state while it is written."""
    return average_bytes(config) + state_bytes(config)


def fit_lines(config, device):
    """Whether it fits, or else what to lower."""
    room = int(ROOM * device.memory)
    lines = [f"host      {amount(average_bytes(config))} for --average={config.average},"
             f" {amount(state_bytes(config))} for a state while it is written"]
    if not device.is_gpu:       # what is in host memory is beside the tensors
        room -= host_bytes(config)
    head = f"fits      {{}}: {amount(max(0, room))} a process may be taken, {ROOM:.0%} of"
    head += f" {amount(device.memory)}"
    if not device.is_gpu:
        head += " less host"
    if device.note:
        head += f" (assumed: {device.note})"
    if peak_bytes(config, device.processes, device.dtype) <= room:
        return [*lines, head.format("yes")]
    lower = fitting(config, device, room)
    if lower:
        return [*lines, head.format("NO"), f"          it does with {lower}"]
    fixed, _ = fixed_parts(config, device.processes, device.dtype)
    alone = total(fixed) + fixed["weights"]     # gradients are as large
    chunk = max(LEAST_CHUNK, config.row_memory * config.seq_len)
    least = replace(config, device_batch_size=1, loss_chunk=min(config.loss_chunk, chunk))
    least = peak_bytes(least, device.processes, device.dtype)
    return [*lines, head.format("NO"), "          no device_batch_size fits: weights, gradients and"
            f" optimizer alone take {amount(alone)},",
            f"          a step {amount(least)} at least; more processes or a smaller model"]


def plan_lines(config, device):
    """All that is printed."""
    tokens = config.train_tokens - config.selection_tokens
    micro_batch_rows(config, device.processes)      # refused before anything is said
    if tokens < 2:
        raise UserError(f"--train_tokens={config.train_tokens}: too few; more than"
                        f" --selection_tokens={config.selection_tokens} are needed")
    tokens += round(CAN_BE_CUT * config.split_tokens * tokens)
    return [f"plan      {config.track} on {device.name}: {device.processes} process(es); nothing is"
            " trained, no dataset is read",
            *model_lines(config, tokens), *member_lines(config, tokens, device),
            *run_lines(config, tokens, device), *disk_lines(config),
            *memory_lines(config, device), *fit_lines(config, device)]


def main():
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(__doc__.strip())
        return
    values = parse_arguments(sys.argv[1:])
    gpu = values.pop("gpu", None)
    gpus = whole_number(values.pop("gpus")) if "gpus" in values else 0
    _, track = plan_launch(values.get("device", "auto"))
    if gpu is not None:
        track = "mini" if gpus == 1 else "limited"
    config = make_config(values.pop("track", track), **values)
    if gpu is not None:
        device = other_gpus(config, gpu, gpus)
    else:
        device = this_device(config, gpus)
    print("\n".join(plan_lines(config, device)))


if __name__ == "__main__":
    run_tool(main)
