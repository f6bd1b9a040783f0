"""How fast the training step is, where its time goes and what it needs: on random tokens.

    python tools/bench.py --track=mini                              one device
    torchrun --nproc_per_node=8 tools/bench.py --track=limited      8 processes

Takes the fields of train_gpt.py, as --field=value; a dataset is not needed. Trainer, compiled
functions and optimizer are those of a run, in its last stage (the slowest: all loops, passes and
windows); the teacher is there on every track, with kd_alpha 0.5 where the track has none. A step is
`Rows.step`, `Trainer.gradients` and the optimizer, and waits for the device. Everything is a median
after warm-up.

Prints a table and appends one line of JSON to <runs_dir>/bench.jsonl. Its keys, beside those that
say what was run: warmup_seconds; steps, and for "ce" and "kd" seconds (of a step),
tokens_per_second, flops_per_token, mfu, peak_bytes (of this process in such a step) and pieces
(seconds); kd_over_ce; peak_flops (of a process) and peak_source; recompiles; optimizer (seconds,
share_of_full_batch, and parameters_a_process, the part that a process updates); loss (tokens, ours,
naive and the ratios: the chunked loss against all logits at once); public (steps, seconds,
peak_bytes and ratio of the step of public code, or why it was skipped). null: not known here.
"""
import contextlib
import ctypes
import gc
import json
import re
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from _runs import ROOT, config_from_arguments, run_tool
from _public_step import PublicTrainer, naive_loss
from train_gpt import (Dataset, LossSpec, Rows, Trainer, UserError, hardware_name,
                       lr_multiplier, peak_flops, percent, piecewise_linear, split_documents,
                       start_runtime)

STEPS = 20                  # that a median is over
SLOW_STEP, FEW_STEPS = 10.0, 3      # seconds beyond which that few are enough
PIECE_STEPS = 5             # for the pieces of a step, and for the public step
WARMUP_STEPS = 2            # of each kind
KD_ALPHA = 0.5              # where the track has no teacher
LOSS_TOKENS = 8192          # of the comparison of losses, if they fit
LOSS_ROOM = 0.75            # part of the free memory that the comparison may take
LOGIT_COPIES = 9            # fp32 [N, V] that the public loss with KD has at its peak, about
FULL_BATCH = 524_288        # tokens of the public tracks' step
DOCUMENT = 500              # tokens of a random document, on average
FEATURES = 14               # of a random token's string, for --spelling
ENDLESS = 1_000_000         # epochs of the rows
PRODUCTS = (1024, 2048)     # widths of the matrix products that measure a CPU's peak


# ==== Device: clock, memory, peak ===============================================================
def now(runtime):
    """Seconds, when the device has done all that it was asked for."""
    runtime.synchronize()
    return time.perf_counter()


class Memory:
    """Bytes of this process on a device: allocated (CUDA), or resident (CPU, on Linux only)."""

    def __init__(self, device):
        self.device = device

    def reset(self):
        """The next peak() counts from here on."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")   # VmHWM begins at what is resident

    def peak(self):
        """Bytes at most since reset(); None: unknown."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return read_kilobytes("/proc/self/status", "VmHWM") if self.device.type == "cpu" else None

    def free(self):
        """Bytes that this process may still take; None: unknown."""
        if self.device.type == "cuda":
            cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            return torch.cuda.mem_get_info()[0] + cached
        return read_kilobytes("/proc/meminfo", "MemAvailable")

    def settle(self):
        """Give back what Python, the C library (glibc) and PyTorch keep of freed memory."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)

    def extra(self, work):
        """Bytes that `work()` needs at its peak beyond those in use; None: unknown, or < 1 MiB."""
        self.settle()
        self.reset()
        on_gpu = self.device.type == "cuda"
        before = torch.cuda.memory_allocated() if on_gpu else self.peak()
        work()
        after = self.peak()
        grown = after - before if after is not None else 0
        return grown if grown >= 2 ** 20 else None


def read_kilobytes(path, field):
    """A field of a file of /proc in bytes, or None."""
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path(path).read_text())
    except OSError:
        found = None
    return 1024 * int(found[1]) if found else None


def device_peak(runtime):
    """(FLOP/s of one process's device or None, where that is from).

    A GPU's is in its data sheet; a CPU's is the best of several big matrix products, which all
    processes make at the same time.
    """
    if runtime.device.type != "cpu":
        peak = peak_flops(runtime.device)
        return peak, "data sheet, dense bf16" if peak else "unknown device"
    best = 0.0
    for width in PRODUCTS:
        a = torch.randn(width, width).to(runtime.dtype)
        for _ in range(3):
            start = time.perf_counter()
            a @ a
            best = max(best, 2 * width ** 3 / (time.perf_counter() - start))
    total = runtime.all_reduce(torch.tensor([best], dtype=torch.float64))
    return float(total) / runtime.world_size, "best of big matrix products"


# ==== Steps =====================================================================================
def random_data(config, steps):
    """A Dataset of random documents that each begin with BOS: the budget, or what `steps` need."""
    need = steps * config.batch_rows * config.seq_len
    count = max(config.seq_len + 1, min(config.train_tokens, need))
    random = np.random.default_rng(config.seed)
    bos = config.vocab_size - 1
    tokens = random.integers(0, max(1, bos), count, dtype=np.uint16)
    tokens[random.random(count) < 1 / DOCUMENT] = bos
    tokens[0] = bos
    return Dataset(Path(), split_documents(tokens, bos), {}, bos, {}, {},
                   random_tables(config, bos, random), None, [])


def random_tables(config, bos, random):
    """What --spelling and --split_tokens need of tokens.npz; few features are common, as there."""
    shape = FEATURES, config.padded_vocab
    features = (config.vocab_size * random.random(shape) ** 4).astype(np.int64)
    pairs = random.integers(0, max(1, bos), (config.vocab_size, 2))
    pairs[bos] = -1
    return {"features": features, "pairs": pairs,
            "weights": np.full((*shape, 1), FEATURES ** -0.5, np.float32)}


class TimedTrainer(Trainer):
    """A Trainer that adds up the seconds of its pieces while `pieces` is a dict."""

    def __init__(self, config, runtime, tables=None):
        super().__init__(config, runtime, tables)
        self.pieces = None
        self.forward = self.timed(self.forward, "forward")
        self.mtp_hidden = self.timed(self.mtp_hidden, "forward")
        self.main_loss = self.timed(self.main_loss, "loss")
        self.mtp_loss = self.timed(self.mtp_loss, "loss")

    def timed(self, function, piece):
        """`function`, whose seconds, without those of the pieces within, are added to `piece`."""
        def run(first, *arguments):
            if self.pieces is None:
                return function(first, *arguments)
            start, before = now(self.runtime), sum(self.pieces.values())
            result = function(first, *arguments)
            name = "teacher" if first is self.teacher else piece
            within = sum(self.pieces.values()) - before
            self.pieces[name] += now(self.runtime) - start - within
            return result
        return run


class Stepper:
    """Training steps of a trainer, in the last stage of its plan."""

    def __init__(self, trainer, data):
        config = trainer.config
        self.trainer = trainer
        self.runtime = trainer.runtime
        self.number = 0
        trainer.model.init_weights(config.seed + 1)
        trainer.teacher.load_state_dict(trainer.model.state_dict())
        trainer.start_member(1, config.seed)
        self.rows = Rows(data.train, config.seq_len, config.batch_rows, ENDLESS, config.seed,
                         data.bos, data.tables.get("pairs"), config.split_tokens)
        self.progress = trainer.stages[-1].start
        self.rates = (lr_multiplier(config, self.progress),
                      piecewise_linear(config.wd_schedule, self.progress), config.momentum)

    def batch(self):
        """The next step's inputs and targets, int64 [batch_rows, seq_len]."""
        self.number += 1
        return self.rows.step(self.number - 1)

    def seconds(self, distill):
        """Of one whole step."""
        start = now(self.runtime)
        inputs, targets = self.batch()
        self.trainer.gradients(inputs, targets, self.progress, distill)
        self.trainer.optimizer.step(*self.rates)
        return now(self.runtime) - start

    def count(self, seconds, wanted):
        """How many steps to measure when one takes `seconds`; the same on all processes."""
        total = self.runtime.all_reduce(torch.tensor([seconds], device=self.runtime.device))
        return wanted if float(total) / self.runtime.world_size <= SLOW_STEP else FEW_STEPS

    def pieces(self, distill):
        """Seconds of the parts of one step, each of which waits for the device.

        `backward` is what `gradients` takes beyond its forward passes and losses.
        """
        times = [now(self.runtime)]
        inputs, targets = self.batch()
        times.append(now(self.runtime))
        inner = dict.fromkeys(("forward", "loss", "teacher"), 0.0)
        self.trainer.pieces = inner
        self.trainer.gradients(inputs, targets, self.progress, distill)
        self.trainer.pieces = None
        times.append(now(self.runtime))
        self.trainer.optimizer.step(*self.rates)
        times.append(now(self.runtime))
        data, gradients, optimizer = np.diff(times).tolist()
        return {"data": data, **inner, "backward": gradients - sum(inner.values()),
                "optimizer": optimizer}


def compiled_frames():
    """Functions that torch.compile has compiled so far in this process, repetitions included."""
    return torch._dynamo.utils.counters["frames"]["total"]


# ==== What is measured ==========================================================================
def measure_steps(stepper, memory, steps):
    """Whole steps without ("ce") and with ("kd") a teacher, in turns; recompilations in them."""
    trainer, runtime = stepper.trainer, stepper.runtime
    start = now(runtime)
    for _ in range(WARMUP_STEPS):
        last = max(stepper.seconds(False), stepper.seconds(True))
    warmup = now(runtime) - start
    frames = compiled_frames()
    seconds, peaks = {"ce": [], "kd": []}, {"ce": [], "kd": []}
    for _ in range(stepper.count(last, steps)):
        for kind in seconds:
            memory.reset()
            seconds[kind].append(stepper.seconds(kind == "kd"))
            peaks[kind].append(memory.peak())
    recompiles = compiled_frames() - frames
    peak, source = device_peak(runtime)
    facts = {"warmup_seconds": warmup, "steps": len(seconds["ce"]), "recompiles": recompiles,
             "peak_flops": peak, "peak_source": source}
    for kind in seconds:
        flops = trainer.flops[trainer.stages[-1]] + (kind == "kd") * trainer.teacher_flops
        speed = trainer.config.batch_rows * trainer.config.seq_len / median(seconds[kind])
        facts[kind] = {
            "seconds": median(seconds[kind]), "tokens_per_second": speed, "flops_per_token": flops,
            "mfu": speed * flops / peak / runtime.world_size if peak else None,
            "peak_bytes": None if None in peaks[kind] else max(peaks[kind])}
    return facts | {"kd_over_ce": facts["kd"]["seconds"] / facts["ce"]["seconds"]}


def measure_pieces(stepper, steps):
    """{"ce": {piece: median seconds}, "kd": ...}; the teacher's are its forward and dearer loss."""
    pieces = {}
    for kind in ("ce", "kd"):
        runs = [stepper.pieces(kind == "kd") for _ in range(steps)]
        pieces[kind] = {name: median(run[name] for run in runs) for name in runs[0]}
    ce, kd = pieces["ce"], pieces["kd"]
    kd["teacher"] += kd["loss"] - ce["loss"]
    kd["loss"] = ce["loss"]
    del ce["teacher"]
    return pieces


def optimizer_share(stepper, facts):
    """The optimizer's part of a step of 524,288 tokens, if the rest grows with the tokens."""
    config, groups = stepper.trainer.config, stepper.trainer.optimizer.groups
    seconds = facts["ce"]["pieces"]["optimizer"]
    rest = max(0.0, facts["ce"]["seconds"] - seconds) / (config.batch_rows * config.seq_len)
    sizes = {mine: sum(p.numel() for group in groups if group.is_mine == mine
                       for p in group.params) for mine in (True, False)}
    return {"seconds": seconds, "share_of_full_batch": seconds / (seconds + rest * FULL_BATCH),
            "parameters_a_process": sizes[True] / sum(sizes.values())}


def compare_losses(trainer, memory, repeats=PIECE_STEPS):
    """Forward and backward of chunked_loss and of naive_loss, with KD, on the same tensors."""
    config, runtime = trainer.config, trainer.runtime
    room = memory.free()
    row = config.row_memory * config.seq_len
    bytes_a_token = 4 * LOGIT_COPIES * (config.padded_vocab + row)
    fits = LOSS_TOKENS if room is None else int(LOSS_ROOM * room / bytes_a_token)
    whole = row or 1            # rows that are remembered are whole
    tokens = max(1, min(LOSS_TOKENS, fits) // whole) * whole
    size = (tokens, config.model_dim)
    hidden = torch.randn(size, device=runtime.device).to(runtime.dtype).requires_grad_()
    weight = torch.randn(config.padded_vocab, config.model_dim, device=runtime.device)
    weight = (weight * config.model_dim ** -0.5).requires_grad_()
    targets = torch.randint(config.vocab_size, (tokens, 1), device=runtime.device)
    teacher = (torch.randn(size, device=runtime.device).to(runtime.dtype),
               weight.detach().flip(0).to(runtime.dtype))
    spec = LossSpec(torch.ones(1, device=runtime.device), config.kd_alpha, config, row)
    facts = {"tokens": tokens}
    for name, function in (("ours", trainer.loss), ("naive", naive_loss)):
        def work(function=function):
            hidden.grad = weight.grad = None
            function(hidden, weight, targets, teacher, spec)[0].backward()
        work()
        seconds = []
        while len(seconds) < (repeats if sum(seconds) < SLOW_STEP else 1):
            start = now(runtime)
            work()
            seconds.append(now(runtime) - start)
        facts[name] = {"seconds": median(seconds), "peak_extra_bytes": memory.extra(work)}
    facts["seconds_ratio"] = ratio(facts["naive"]["seconds"], facts["ours"]["seconds"])
    facts["memory_ratio"] = ratio(facts["naive"]["peak_extra_bytes"],
                                  facts["ours"]["peak_extra_bytes"])
    return facts


def measure_public(config, runtime, data, memory, ours):
    """Whole KD steps of the public way; {"skipped": why} when its logits do not fit."""
    trainer = PublicTrainer(config, runtime, data.tables)
    stepper = Stepper(trainer, data)
    losses = 1 + bool(config.mtp_weight)            # alive at the same time
    free = memory.free()
    columns = losses * config.padded_vocab + config.row_memory * config.seq_len
    need = 4 * LOGIT_COPIES * trainer.micro_rows * config.seq_len * columns
    short = torch.tensor([float(free is not None and need > free)], device=runtime.device)
    if runtime.all_reduce(short) > 0:               # on all processes or on none
        return {"skipped": f"its logits would take about {need / 2 ** 30:.1f} GiB, of"
                f" {free / 2 ** 30:.1f} free; lower --device_batch_size"}
    try:
        for _ in range(WARMUP_STEPS):
            last = stepper.seconds(True)
        memory.reset()
        seconds = [stepper.seconds(True) for _ in range(stepper.count(last, PIECE_STEPS))]
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory; lower --device_batch_size"}
    return {"steps": len(seconds), "seconds": median(seconds), "peak_bytes": memory.peak(),
            "ratio": median(seconds) / ours}


def ratio(a, b):
    return a / b if a is not None and b else None


# ==== The table =================================================================================
def mebibytes(count):
    return f"{count / 2 ** 20:,.0f} MiB" if count is not None else "n/a"


def times(number):
    return f"{number:.2f}x" if number is not None else "n/a"


def head_lines(trainer):
    """What is measured, and on what."""
    config, runtime, stage = trainer.config, trainer.runtime, trainer.stages[-1]
    micro = trainer.micro_rows
    return [
        f"bench     {config.track}: {config.batch_rows} rows x {config.seq_len} ="
        f" {config.batch_rows * config.seq_len:,} tokens a step; a process has"
        f" {config.batch_rows // runtime.world_size // micro} micro-batch(es) of {micro} rows",
        f"stage     the last of {len(trainer.stages)}: loops {stage.loops}, passes {stage.passes},"
        f" windows {'/'.join(map(str, sorted({*stage.windows})))}; KD with alpha"
        f" {config.kd_alpha:g}",
        f"machine   {hardware_name(runtime.device)}, {runtime.world_size} process(es); torch"
        f" {torch.__version__} on {runtime.device.type}",
        f"          {str(runtime.dtype).removeprefix('torch.')}, attention {runtime.attention},"
        f" compile {'on' if runtime.compile else 'off'}", *runtime.notes]


def step_lines(facts):
    """Whole steps and their pieces."""
    peak = facts["peak_flops"]

    def row(name, form):
        return f"{name:16}{form(facts['ce']):>16}{form(facts['kd']):>16}"

    def piece_cell(pieces, piece):
        if piece not in pieces:
            return "-"
        return f"{pieces[piece]:.4f} {pieces[piece] / sum(pieces.values()):6.1%}"

    lines = [
        f"warm-up   {facts['warmup_seconds']:.1f} s, compilation included", "",
        f"{'':16}{'CE step':>16}{'KD step':>16}",
        row("seconds", lambda f: f"{f['seconds']:.4f}")
        + f"   median of {facts['steps']}; KD / CE {times(facts['kd_over_ce'])}",
        row("tokens/s", lambda f: f"{f['tokens_per_second']:,.0f}"),
        row("MFU", lambda f: percent(f["mfu"]))
        + (f"   of {peak / 1e12:.4g} TFLOP/s" if peak else "") + f" ({facts['peak_source']})",
        row("peak memory", lambda f: mebibytes(f["peak_bytes"])), "",
        f"pieces, each waiting for the device (median of {facts['piece_steps']})"]
    labels = {"data": "data", "forward": "forward", "loss": "loss", "backward": "backward, rest",
              "optimizer": "optimizer", "teacher": "KD teacher"}
    for piece, label in labels.items():
        lines.append(row(label, lambda f, piece=piece: piece_cell(f["pieces"], piece)))
    share = facts["optimizer"]
    return [*lines, "", f"optimizer {share['share_of_full_batch']:.2%} of a {FULL_BATCH:,}-token"
            f" step; a process updates {share['parameters_a_process']:.1%} of the parameters",
            f"recompiles after warm-up: {facts['recompiles']}"]


def loss_lines(config, facts):
    """The chunked loss against all logits at once."""
    lines = ["", f"loss of {facts['tokens']:,} tokens, width {config.model_dim}, vocabulary"
             f" {config.padded_vocab:,}, with KD: forward and backward",
             f"{'':16}{'seconds':>16}{'extra memory':>16}"]
    for name in ("ours", "naive"):
        extra = mebibytes(facts[name]["peak_extra_bytes"])
        lines.append(f"{name:16}{facts[name]['seconds']:16.4f}{extra:>16}")
    ratios = [times(facts["seconds_ratio"]), times(facts["memory_ratio"])]
    return [*lines, "naive / ours".ljust(16) + "".join(f"{text:>16}" for text in ratios)]


def public_lines(facts):
    label = "whole KD step, the public way / ours: "
    if "skipped" in facts:
        return ["", label + "skipped, " + facts["skipped"]]
    return ["", f"{label}{times(facts['ratio'])} ({facts['seconds']:.4f} s, median of"
            f" {facts['steps']}; peak memory {mebibytes(facts['peak_bytes'])})"]


# ==== The command ===============================================================================
def measure_ours(config, runtime, data, memory, steps, say):
    """All that one trainer of a run tells; it is gone, with its memory, when this returns."""
    trainer = TimedTrainer(config, runtime, data.tables)
    say(head_lines(trainer))
    stepper = Stepper(trainer, data)
    facts = {"micro_batch_rows": trainer.micro_rows, **measure_steps(stepper, memory, steps)}
    count = min(stepper.count(facts["kd"]["seconds"], PIECE_STEPS), steps)
    for kind, pieces in measure_pieces(stepper, count).items():
        facts[kind]["pieces"] = pieces
    facts["piece_steps"] = count
    facts["optimizer"] = optimizer_share(stepper, facts)
    say(step_lines(facts))
    facts["loss"] = compare_losses(trainer, memory)
    say(loss_lines(config, facts["loss"]))
    return facts


def bench(config, overrides, steps=STEPS):
    """Measure the steps of a Config, print the table; returns the dict of its line of JSON."""
    if config.vocab_size > 1 << 16:
        raise UserError(f"--vocab_size={config.vocab_size}: tokens must be below 65,536")
    runtime = start_runtime(config)
    config = replace(config, kd_alpha=config.kd_alpha or KD_ALPHA)
    memory = Memory(runtime.device)

    def say(lines):
        if runtime.is_main:
            print("\n".join(lines), flush=True)

    data = random_data(config, 2 * (WARMUP_STEPS + steps + PIECE_STEPS))
    facts = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"), "track": config.track, "overrides": overrides,
        "hardware": hardware_name(runtime.device), "processes": runtime.world_size,
        "device": runtime.device.type, "dtype": str(runtime.dtype).removeprefix("torch."),
        "compile": runtime.compile, "attention": runtime.attention, "torch": torch.__version__,
        "python": sys.version.split()[0],
        "tokens_per_step": config.batch_rows * config.seq_len,
        **measure_ours(config, runtime, data, memory, steps, say)}
    memory.settle()
    facts["public"] = measure_public(config, runtime, data, memory, facts["kd"]["seconds"])
    say(public_lines(facts["public"]))
    facts["config"] = asdict(config)
    if runtime.is_main:
        path = ROOT / config.runs_dir / "bench.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            print(json.dumps(facts), file=file)
        say(["", f"appended to {path}"])
    if runtime.world_size > 1:
        torch.distributed.barrier()
    return facts


def main():
    config, overrides = config_from_arguments(__doc__)
    bench(config, overrides)


if __name__ == "__main__":
    run_tool(main)
