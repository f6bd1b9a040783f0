"""How fast the training step is, where its time goes and what it needs: on random tokens.

    python train_gpt.py bench --track=mini          one device; with torchrun: N processes

A dataset is not needed. The trainer, its compiled functions and its optimizer are those of a run,
in the last stage of the plan (the slowest: all loops, passes and windows); the teacher is there on
every track, with alpha 0.5 where the track has none. A step is `Rows.step`, `Trainer.gradients` and
the optimizer, and waits for the device. Everything is a median after warm-up.

Prints a table and appends one line of JSON to <runs_dir>/bench.jsonl. Its keys, beside those that
say what was run: warmup_seconds; steps, and for "ce" and "kd" seconds (of a step),
tokens_per_second, flops_per_token, mfu, peak_bytes (of this process in such a step) and pieces
(seconds); kd_over_ce; peak_flops (of a process) and peak_source; recompiles; optimizer (seconds,
share_of_full_batch, and parameters_a_process, the part that a process updates); loss (tokens, ours,
naive and the ratios: t.ChunkedLoss against all logits at once); public (steps, seconds, peak_bytes
and ratio of the step of records/bench_public.py, or why it was skipped). null: not known here.
"""
import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import re
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from data.shards import Dataset, UserError, refuse, split_documents
from records.bench_public import naive_loss, public_trainer
from records.settings import wait_for_first

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
ENDLESS = 1_000_000         # epochs of the rows
PRODUCTS = (1024, 2048)     # widths of the matrix products that measure a CPU's peak


# ==== Device: clock, memory, peak ===============================================================
def now(rt):
    """Seconds, when the device has done all that it was asked for."""
    rt.synchronize()
    return time.perf_counter()


class Memory:
    """Bytes of this process on a device: allocated (CUDA), or resident (CPU, on Linux only)."""

    def __init__(self, device):
        self.device, self.resets = device, True

    def reset(self):
        """The next peak() counts from here on."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif self.device.type == "cpu":
            try:
                Path("/proc/self/clear_refs").write_text("5")   # VmHWM begins at what is resident
            except OSError:
                self.resets = False

    def status(self, field):
        """A field of /proc/self/status in bytes, or None."""
        try:
            found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        except OSError:
            found = None
        return 1024 * int(found[1]) if found else None

    def peak(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return self.status("VmHWM") if self.device.type == "cpu" and self.resets else None

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

    def free(self):
        """Bytes that one process may still take; None: unknown."""
        if self.device.type == "cuda":
            cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            return torch.cuda.mem_get_info()[0] + cached
        try:
            found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        except OSError:
            return None
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))       # processes that share it
        free = [1024 * int(found[1])] if found else []
        with contextlib.suppress(OSError, ValueError):          # a container may have less
            limit, used = (int(Path("/sys/fs/cgroup", name).read_text())
                           for name in ("memory.max", "memory.current"))
            free.append(max(0, limit - used))
        return min(free) // here if free else None


def device_peak(t, rt):
    """(FLOP/s of one process's device or None, where that is from).

    A GPU's is in its data sheet; a CPU's is the best of several big matrix products, which all
    processes make at the same time.
    """
    if rt.device.type != "cpu":
        peak = t.report.peak_flops(rt.device)
        return peak, "data sheet, dense bf16" if peak else "unknown device"
    best = 0.0
    for width in PRODUCTS:
        a = torch.randn(width, width).to(rt.dtype)
        for _ in range(3):
            start = time.perf_counter()
            a @ a
            best = max(best, 2 * width ** 3 / (time.perf_counter() - start))
    total = rt.sum(torch.tensor([best], dtype=torch.float64))
    return float(total) / rt.world, "best of big matrix products"


# ==== Steps =====================================================================================
def random_data(c, steps):
    """A Dataset of random documents that each begin with BOS: the budget, or what `steps` need."""
    count = max(c.seq_len + 1, min(c.train_tokens, steps * c.batch_rows * c.seq_len))
    random, bos = np.random.default_rng(c.seed), c.vocab_size - 1
    tokens = random.integers(0, max(1, bos), count, dtype=np.uint16)
    tokens[random.random(count) < 1 / DOCUMENT] = bos
    tokens[0] = bos
    return Dataset(split_documents(tokens, bos), [], [], [], bos, {}, {}, {}, [])


class Stepper:
    """Training steps of a trainer, in the last stage of its plan."""

    def __init__(self, t, trainer):
        c, self.trainer, self.rt, self.number = trainer.c, trainer, trainer.rt, 0
        trainer.model.init_weights(c.seed + 1)
        if trainer.teacher is not None:
            trainer.teacher.load_state_dict(trainer.model.state_dict())
        trainer.start_member(c, c.seed, 1)
        trainer.model.prepare(c.seq_len)
        self.rows = t.Rows(trainer.data.train, c.seq_len, c.batch_rows, ENDLESS, c.seed,
                           trainer.data.bos)
        self.progress = trainer.plan[-1].start
        self.rates = (t.lr_multiplier(c, self.progress),
                      t.piecewise_linear(c.wd_schedule, self.progress), c.momentum)

    def batch(self):
        """The next step's inputs and targets, int64 [batch_rows, seq_len]."""
        self.number += 1
        return self.rows.step(self.number - 1)

    def gradients(self, distill):
        self.trainer.gradients(*self.batch(), self.progress, distill)

    def update(self):
        self.trainer.optimizer.step(*self.rates)

    def seconds(self, distill):
        """Of one whole step."""
        start = now(self.rt)
        self.gradients(distill)
        self.update()
        return now(self.rt) - start

    def count(self, seconds, wanted):
        """How many steps to measure when one takes `seconds`; the same on all processes."""
        mean = self.rt.sum(torch.tensor([seconds], device=self.rt.device)) / self.rt.world
        return wanted if float(mean) <= SLOW_STEP else min(wanted, FEW_STEPS)

    def pieces(self, distill):
        """Seconds of the parts of one step, each of which waits for the device.

        `backward` is what `gradients` takes beyond its forward passes and losses.
        """
        rt, trainer = self.rt, self.trainer
        times = [now(rt)]
        inputs, targets = (tensor.to(rt.device) for tensor in self.batch())
        times.append(now(rt))
        with clocked(trainer) as inner:
            trainer.gradients(inputs, targets, self.progress, distill)
        times.append(now(rt))
        self.update()
        times.append(now(rt))
        data, gradients, optimizer = np.diff(times).tolist()
        return dict(data=data, **inner, backward=gradients - sum(inner.values()),
                    optimizer=optimizer)


@contextlib.contextmanager
def clocked(trainer):
    """Within: the trainer's forward passes and losses add their seconds to the dict it yields."""
    seconds, rt = dict.fromkeys(("forward", "loss", "teacher"), 0.0), trainer.rt

    def clock(function, piece):
        def run(*arguments):
            name = "teacher" if arguments[0] is trainer.teacher else piece
            start = now(rt)
            result = function(*arguments)
            seconds[name] += now(rt) - start
            return result
        return run

    own = trainer.forward, trainer.mtp_hidden
    trainer.forward, trainer.mtp_hidden = (clock(function, "forward") for function in own)
    trainer.loss = clock(trainer.loss, "loss")
    try:
        yield seconds
    finally:
        trainer.forward, trainer.mtp_hidden = own
        del trainer.loss            # the method is there again


def compiled_frames():
    """Functions that torch.compile has compiled so far in this process, repetitions included."""
    return torch._dynamo.utils.counters["frames"]["total"]


# ==== The micro-batch that fits ==================================================================
FILLED = 0.9                # part of the free memory that a micro-batch may take
WEIGHT_AVERAGES = ("ema", "weights", "weights_recency")     # that add up weights on the device


def fit_micro_batch(t, c, rt, data, folder=None):
    """`c` with the largest power of two as device_batch_size that memory has room for.

    folder: a run's, which keeps the number for when it goes on. One row if memory cannot be
    measured, or if two do not fit or cannot be.
    """
    start, memory, kept = now(rt), Memory(rt.device), folder and folder / "micro_batch.txt"
    rows = int(kept.read_text()) if kept and kept.exists() else 0
    if rows and may_be(t, c, rt, rows):
        return replace(c, device_batch_size=rows)
    memory.reset()
    if memory.peak() is None:
        rt.notes.append(f"memory    not known on {rt.device.type}: micro-batches of 1 row")
        return replace(c, device_batch_size=1)
    try:
        rows = rows_that_fit(t, c, rt, data, memory)
    except torch.OutOfMemoryError:
        rows = 1
    everywhere = rt.gather(torch.tensor([rows], device=rt.device), torch.distributed.group.WORLD)
    rows = int(everywhere.min())
    rt.notes.append(f"memory    micro-batches of {rows} row(s): what fits, by steps with fewer"
                    f" ({now(rt) - start:.1f} s)")
    if kept and rt.is_main:
        kept.write_text(f"{rows}\n")
    return replace(c, device_batch_size=rows)


def rows_that_fit(t, c, rt, data, memory):
    """The largest micro-batch (with a teacher, if there is one) that should fit, a power of two.

    In the last stage of the plan, gradients are measured with `first` rows, a chunk of the loss if
    that may be, and with twice as many: what they need grows in proportion to further rows. An
    optimizer's step needs the same for any, with the gradients, as large as the weights, in memory.
    Sums of weights that `average` makes later are left room for.
    """
    first, need, rows = 1, [], 1
    while first * c.seq_len < c.loss_chunk and may_be(t, c, rt, 4 * first):
        first *= 2
    if not may_be(t, c, rt, 2 * first):
        return 1
    for size in (first, 2 * first):
        stepper = Stepper(t, t.Trainer(replace(c, device_batch_size=size), rt, None, data))
        model, gradients = stepper.trainer.model, partial(stepper.gradients, bool(c.kd_alpha))
        gradients()                             # compiles
        if size == first:
            stepper.update()                    # compiles
            gradients()
            weights = 4 * sum(p.numel() for p in model.parameters())
            update = weights + (memory.extra(stepper.update) or 0)
        model.zero_grad()
        need.append(memory.extra(gradients) or 2 ** 20)
        model.zero_grad()
        free = memory.free()
        stepper = model = gradients = None      # before there is another
    sums = sum(c.average in (name, "best") for name in WEIGHT_AVERAGES)
    room, slope = FILLED * (free - sums * weights), (need[1] - need[0]) / first
    while may_be(t, c, rt, 2 * rows) and max(
            update, need[0] + (2 * rows - first) * slope) <= room:
        rows *= 2
    return rows


def may_be(t, c, rt, rows):
    """Whether the batch can be shared out in micro-batches of `rows` rows."""
    try:
        return t.micro_batch_rows(replace(c, device_batch_size=rows), rt.world) == rows
    except UserError:
        return False


# ==== What is measured ==========================================================================
def measure_steps(t, stepper, memory, steps):
    """Whole steps without ("ce") and with ("kd") a teacher, in turns; recompilations in them."""
    c, trainer = stepper.trainer.c, stepper.trainer
    start = now(stepper.rt)
    for _ in range(WARMUP_STEPS):
        last = max(stepper.seconds(False), stepper.seconds(True))
    warmup, frames = now(stepper.rt) - start, compiled_frames()
    count = stepper.count(last, steps)
    seconds, peaks = {"ce": [], "kd": []}, {"ce": [], "kd": []}
    for _ in range(count):
        for kind in seconds:
            memory.reset()
            seconds[kind].append(stepper.seconds(kind == "kd"))
            peaks[kind].append(memory.peak())
    recompiles = compiled_frames() - frames
    peak_flops, source = device_peak(t, stepper.rt)
    facts = dict(warmup_seconds=warmup, steps=count, recompiles=recompiles, peak_flops=peak_flops,
                 peak_source=source)
    for kind in seconds:
        flops = trainer.flops[trainer.plan[-1]] + (kind == "kd") * trainer.teacher_flops
        speed = c.batch_rows * c.seq_len / median(seconds[kind])
        facts[kind] = dict(
            seconds=median(seconds[kind]), tokens_per_second=speed, flops_per_token=flops,
            mfu=speed * flops / peak_flops / stepper.rt.world if peak_flops else None,
            peak_bytes=None if None in peaks[kind] else max(peaks[kind]))
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
    c, seconds = stepper.trainer.c, facts["ce"]["pieces"]["optimizer"]
    rest = max(0.0, facts["ce"]["seconds"] - seconds) / (c.batch_rows * c.seq_len)  # a token
    groups = stepper.trainer.optimizer.groups
    whole = sum(p.numel() for group in groups for p in group.params)
    return dict(seconds=seconds, share_of_full_batch=seconds / (seconds + rest * FULL_BATCH),
                parameters_a_process=sum(group.m.numel() for group in groups) / whole)


def compare_losses(t, trainer, memory, repeats=PIECE_STEPS):
    """Forward and backward of ChunkedLoss and of naive_loss, with KD, on the same tensors."""
    c, rt, room = trainer.c, trainer.rt, memory.free()
    bytes_a_token = 4 * LOGIT_COPIES * c.padded_vocab
    fits = LOSS_TOKENS if room is None else int(LOSS_ROOM * room / bytes_a_token)
    tokens = max(1, min(LOSS_TOKENS, fits))
    draw = lambda rows: torch.randn(rows, c.model_dim, device=rt.device)
    hidden = draw(tokens).to(rt.dtype).requires_grad_()
    weight = (draw(c.padded_vocab) * c.model_dim ** -0.5).requires_grad_()
    targets = torch.randint(c.vocab_size, (tokens, 1), device=rt.device)
    common = (hidden, weight, targets, trainer.one, draw(tokens).to(rt.dtype),
              weight.detach().flip(0).to(rt.dtype), c.kd_alpha, c.kd_temperature, c.softcap,
              c.vocab_size)
    ways = {"ours": lambda: t.ChunkedLoss.apply(*common, c.loss_chunk, trainer.chunk_function),
            "naive": lambda: naive_loss(t, *common)}
    facts = {"tokens": tokens}
    for name, loss in ways.items():
        def work():
            hidden.grad = weight.grad = None
            loss()[0].backward()
        seconds = []
        while len(seconds) < 1 + (repeats if not seconds or seconds[-1] < SLOW_STEP else FEW_STEPS):
            start = now(rt)
            work()
            seconds.append(now(rt) - start)
        facts[name] = dict(seconds=median(seconds[1:]), peak_extra_bytes=memory.extra(work))
    for key, unit in ("seconds", "seconds"), ("memory", "peak_extra_bytes"):
        facts[f"{key}_ratio"] = ratio(facts["naive"][unit], facts["ours"][unit])
    return facts


def measure_public(t, c, rt, data, memory, ours):
    """Whole KD steps of the public way; {"skipped": why} when its logits do not fit."""
    trainer = public_trainer(t, c, rt, data)
    stepper = Stepper(t, trainer)
    losses = 1 + bool(c.mtp_weight) + bool(c.masked_weight)     # alive at the same time
    rows, free = t.micro_batch_rows(c, rt.world), memory.free()
    need = 4 * LOGIT_COPIES * losses * rows * c.seq_len * c.padded_vocab
    short = torch.tensor([float(free is not None and need > free)], device=rt.device)
    if rt.sum(short) > 0:           # on all processes or on none
        return {"skipped": f"its logits would take about {need / 2 ** 30:.1f} GiB, of"
                f" {free / 2 ** 30:.1f} free; lower --device_batch_size"}
    try:
        for _ in range(WARMUP_STEPS):
            last = stepper.seconds(True)
        memory.reset()
        seconds = [stepper.seconds(True) for _ in range(stepper.count(last, PIECE_STEPS))]
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory; lower --device_batch_size"}
    return dict(steps=len(seconds), seconds=median(seconds), peak_bytes=memory.peak(),
                ratio=median(seconds) / ours)


def ratio(a, b):
    return a / b if a is not None and b else None


# ==== The table =================================================================================
def mebibytes(count):
    return f"{count / 2 ** 20:,.0f} MiB" if count is not None else "n/a"


def times(number):
    return f"{number:.2f}x" if number is not None else "n/a"


def head_lines(t, c, rt, trainer):
    """What is measured, and on what."""
    micro, stage = t.micro_batch_rows(c, rt.world), trainer.plan[-1]
    return [
        f"bench     {c.track}: {c.batch_rows} rows x {c.seq_len} = {c.batch_rows * c.seq_len:,}"
        f" tokens a step; a process has {c.batch_rows // rt.world // micro} micro-batch(es) of"
        f" {micro} rows",
        f"stage     the last of {len(trainer.plan)}: loops {stage.loops}, passes {stage.passes},"
        f" windows {'/'.join(map(str, sorted({*stage.windows})))}; KD with alpha {c.kd_alpha:g}",
        f"machine   {t.report.hardware_name(rt.device)}, {rt.world} process(es); torch"
        f" {torch.__version__} on {rt.device.type}",
        f"          {str(rt.dtype).removeprefix('torch.')}, attention {rt.attention}, compile"
        f" {'on' if rt.compile else 'off'}", *rt.notes]


def step_lines(t, facts):
    """Whole steps and their pieces."""
    ce, kd, peak = facts["ce"], facts["kd"], facts["peak_flops"]
    row = lambda name, form: f"{name:16}{form(ce):>16}{form(kd):>16}"
    lines = [
        f"warm-up   {facts['warmup_seconds']:.1f} s, compilation included", "",
        f"{'':16}{'CE step':>16}{'KD step':>16}",
        row("seconds", lambda f: f"{f['seconds']:.4f}")
        + f"   median of {facts['steps']}; KD / CE {times(facts['kd_over_ce'])}",
        row("tokens/s", lambda f: f"{f['tokens_per_second']:,.0f}"),
        row("MFU", lambda f: t.report.percent(f["mfu"]))
        + (f"   of {peak / 1e12:.4g} TFLOP/s" if peak else "") + f" ({facts['peak_source']})",
        row("peak memory", lambda f: mebibytes(f["peak_bytes"])), "",
        f"pieces, each waiting for the device (median of {facts['piece_steps']})"]
    for piece, label in (("data", "data"), ("forward", "forward"), ("loss", "loss"),
                         ("backward", "backward, rest"), ("optimizer", "optimizer"),
                         ("teacher", "KD teacher")):
        lines.append(row(label, lambda f: "-" if piece not in f["pieces"] else (
            f"{f['pieces'][piece]:.4f} {f['pieces'][piece] / sum(f['pieces'].values()):6.1%}")))
    share = facts["optimizer"]
    return [*lines, "", f"optimizer {share['share_of_full_batch']:.2%} of a {FULL_BATCH:,}-token"
            f" step; a process updates {share['parameters_a_process']:.1%} of the parameters",
            f"recompiles after warm-up: {facts['recompiles']}"]


def loss_lines(c, facts):
    """ChunkedLoss against all logits at once."""
    lines = ["", f"loss of {facts['tokens']:,} tokens, width {c.model_dim}, vocabulary"
             f" {c.padded_vocab:,}, with KD: forward and backward",
             f"{'':16}{'seconds':>16}{'extra memory':>16}"]
    for name in ("ours", "naive"):
        extra = mebibytes(facts[name]["peak_extra_bytes"])
        lines.append(f"{name:16}{facts[name]['seconds']:16.4f}{extra:>16}")
    ratios = (times(facts[f"{key}_ratio"]) for key in ("seconds", "memory"))
    return [*lines, "naive / ours".ljust(16) + "".join(f"{text:>16}" for text in ratios)]


def public_lines(facts):
    label = "whole KD step, the public way / ours: "
    if "skipped" in facts:
        return ["", label + "skipped, " + facts["skipped"]]
    return ["", f"{label}{times(facts['ratio'])} ({facts['seconds']:.4f} s, median of"
            f" {facts['steps']}; peak memory {mebibytes(facts['peak_bytes'])})"]


# ==== The command ===============================================================================
def measure_ours(t, c, rt, data, memory, steps, say):
    """All that one trainer of a run tells; it is gone, with its memory, when this returns."""
    trainer = t.Trainer(c, rt, None, data)
    say(head_lines(t, c, rt, trainer))
    stepper = Stepper(t, trainer)
    facts = measure_steps(t, stepper, memory, steps)
    count = stepper.count(facts["kd"]["seconds"], min(steps, PIECE_STEPS))
    for kind, pieces in measure_pieces(stepper, count).items():
        facts[kind]["pieces"] = pieces
    facts["piece_steps"], facts["optimizer"] = count, optimizer_share(stepper, facts)
    say(step_lines(t, facts))
    facts["loss"] = compare_losses(t, trainer, memory)
    say(loss_lines(c, facts["loss"]))
    return facts


def bench(t, c, overrides, steps=STEPS):
    """Measure the steps of config `c`, print the table; returns the dict of its line of JSON."""
    refuse([(c.vocab_size > 1 << 16, f"--vocab_size={c.vocab_size}: tokens must be below 65,536")])
    rt = t.start_runtime(c)
    c = replace(c, kd_alpha=c.kd_alpha or KD_ALPHA)
    memory = Memory(rt.device)
    say = lambda lines: rt.is_main and print("\n".join(lines), flush=True)
    data = random_data(c, 2 * (WARMUP_STEPS + steps + PIECE_STEPS))
    c = c if c.device_batch_size else fit_micro_batch(t, c, rt, data)
    facts = dict(
        time=time.strftime("%Y-%m-%d %H:%M:%S"), track=c.track, overrides=overrides,
        hardware=t.report.hardware_name(rt.device), processes=t.report.processes(),
        device=rt.device.type, dtype=str(rt.dtype).removeprefix("torch."), compile=rt.compile,
        attention=rt.attention, torch=torch.__version__, python=sys.version.split()[0],
        commit=t.report.git_commit(), tokens_per_step=c.batch_rows * c.seq_len,
        micro_batch_rows=t.micro_batch_rows(c, rt.world),
        **measure_ours(t, c, rt, data, memory, steps, say))
    memory.settle()
    facts["public"] = measure_public(t, c, rt, data, memory, facts["kd"]["seconds"])
    say(public_lines(facts["public"]))
    facts["config"] = dataclasses.asdict(c)
    if rt.is_main:
        path = t.ROOT / c.runs_dir / "bench.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            print(json.dumps(facts), file=file)
        say(["", f"appended to {path}"])
    wait_for_first()
    return facts
