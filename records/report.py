"""What a run tells: its log, progress line, result, table and a sample of its text.

runs/<id>/log.txt begins with the sources and all that reproduces the run, then has `key:value`
lines, and ends with `RESULT {json}`; metrics.jsonl has a line for every few steps. `t` is the
module train_gpt.
"""
import contextlib
import dataclasses
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from data.shards import GPT2_VOCAB, UserError, write_whole
from records.checkpoint import REMEDY, SOURCES, Lost, Stopped
from records.settings import speaks

ROOT, IMPORTED = Path(__file__).resolve().parent.parent, time.perf_counter()

# Dense bf16 peak of a device, FLOP/s, by whole words of its name: NVIDIA's data sheets.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12,
              "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "GB200": 2500e12, "A100": 312e12,
              "L40S": 362e12, "RTX 5090": 209.5e12, "RTX 4090": 165.2e12}


def hardware_name(device):
    if device.type == "cuda":
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name(device)}"
    return f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU"


def peak_flops(device):
    """FLOP/s of one device, or None (MFU is then n/a): unknown, or a slice or lesser namesake."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if re.search(r"\b(MIG|Laptop|Max-Q|D)\b", name):
        return None
    return next((peak for part, peak in PEAK_FLOPS.items()
                 if re.search(rf"\b{part}\b", name)), None)


def peak_memory(device):
    """Bytes: allocated at most on the GPU, or resident at most in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    units = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * units


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


class Log:
    """Console, runs/<id>/log.txt and metrics.jsonl. Only rank 0 writes."""

    def __init__(self, folder, active, every_seconds):
        self.folder, self.active, self.every = folder, active, every_seconds
        self.terminal, self.live, self.last = sys.stdout.isatty(), False, 0.0
        self.startup = None         # seconds from launch to the end of the first step
        if active:
            (folder / "members").mkdir(parents=True, exist_ok=True)
            self.text = open(folder / "log.txt", "a", encoding="utf-8")
            self.numbers = open(folder / "metrics.jsonl", "a", encoding="utf-8")
            self.keep(lambda numbers: True)     # but a line that was cut off

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
        """`key:value` pairs for log.txt, a line for metrics.jsonl; a member's end only once."""
        if self.active:
            self.say(" ".join(f"{name}:{value:.6g}" for name, value in numbers.items()), False)
            if "step" in numbers or (numbers["chain"], numbers["member"]) not in self.ended:
                print(json.dumps(numbers), file=self.numbers, flush=True)

    def rewind(self, chain, k, step):
        """Forget the metrics of member k after `step` steps, which will come again."""
        if self.active:
            self.keep(lambda numbers: (numbers["chain"], numbers["member"]) != (chain, k)
                      or numbers.get("step", math.inf) <= step)

    def keep(self, is_kept):
        """Write metrics.jsonl anew with the lines that `is_kept`; learn which members ended."""
        path, kept, self.ended = self.folder / "metrics.jsonl", [], set()
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # damaged, or cut off
                numbers = json.loads(line)
                if is_kept(numbers):
                    kept.append(line + "\n")
                    if "step" not in numbers:
                        self.ended.add((numbers["chain"], numbers["member"]))
        self.numbers.close()
        write_whole(path, lambda beside: beside.write_text("".join(kept), encoding="utf-8"))
        self.numbers = open(path, "a", encoding="utf-8")


def git_commit():
    """Hash of HEAD, with "-dirty" behind it if tracked files differ; "unknown" without git."""
    try:
        command = ("git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def announce(trainer, overrides, rows, micro, is_new, changes):
    """Log what reproduces the run (sources, versions, settings); tell what is about to run.

    rows: the Rows of a member; micro: rows of a micro-batch; is_new: the log has no sources yet;
    changes: lines on what is other than at the run's begin.
    """
    c, rt, log, data, model = (getattr(trainer, name) for name in "c rt log data model".split())
    facts = dict(commit=git_commit(), python=platform.python_version(), torch=torch.__version__,
                 numpy=np.__version__, hardware=hardware_name(rt.device), processes=processes(),
                 data_sha256=data.hashes, overrides=overrides, config=dataclasses.asdict(c))
    for source in SOURCES if is_new or changes else ():
        text = (ROOT / source).read_text(encoding="utf-8")
        log.say(f"{text}\n{'=' * 40} end of {source}", console=False)
    for key, value in facts.items():
        log.say(f"{key}:{json.dumps(value)}", console=False)
    size, blocks = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, model.blocks))
    flops = " then ".join(dict.fromkeys(f"{count:.4g}" for count in trainer.flops.values()))
    chain = (f", each distilled from the one before (alpha {c.kd_alpha:g}, T {c.kd_temperature:g})"
             if c.kd_alpha and c.num_models > 1 else "")
    chains = f"{c.num_chains} chains of " if c.num_chains > 1 else ""
    for line in (
            f"track     {c.track}: {chains}{c.num_models} model(s) x {c.num_epochs} epochs{chain}",
            f"data      {c.dataset}: {rows.tokens:,} tokens an epoch ({len(data.train)} documents),"
            f" {sum(map(len, data.selection)):,} for selection; val {sum(map(len, data.val)):,},"
            f" holdout {sum(map(len, data.holdout)):,}",
            f"model     {size:.4g}M parameters ({blocks:.4g}M in {c.num_layers} blocks, width"
            f" {c.model_dim}), {flops} FLOPs a token",
            f"steps     {rows.num_steps:,} a member: {c.batch_rows} rows x {c.seq_len} ="
            f" {c.batch_rows * c.seq_len:,} tokens a step, on {processes()} process(es) in"
            f" {c.batch_rows // rt.world // micro} micro-batch(es) of {micro} rows",
            f"machine   {facts['hardware']}; torch {torch.__version__} on {rt.device.type},"
            f" {str(rt.dtype).removeprefix('torch.')}, attention {rt.attention}, compile"
            f" {'on' if rt.compile else 'off'}",
            f"folder    {log.folder}", *data.notes, *rt.notes, *changes, ""):
        log.say(line)


def seconds_since_launch():
    """Seconds that this process has been there, imports included; off Linux, since this import."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        since_boot = float(Path("/proc/uptime").read_text().split()[0])
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        seconds = since_boot - ticks / os.sysconf("SC_CLK_TCK")
        if seconds > 0:             # in some containers the two have other clocks
            return seconds
    return time.perf_counter() - IMPORTED


class Meter:
    """Clock, progress line and metrics of one member's training."""

    def __init__(self, trainer, k, rows, flops):
        """flops: {stage: FLOPs a token}, the teacher's included."""
        self.trainer, self.k, self.rows, self.recent = trainer, k, rows, []
        self.start = time.perf_counter() - self.uncounted()
        self.compiled_before = trainer.compile_seconds      # by earlier launches, at the first one
        self.steps, self.flops, self.loss = 0, 0.0, float("nan")    # of steps that compiled nothing
        self.skipped = 0            # steps that were not finite
        self.step_tokens, self.flops_per_token = rows.batch_rows * rows.seq_len, flops

    def uncounted(self):
        """Seconds so far of compilation and evaluation, which stop the clock."""
        return self.trainer.compile_seconds + self.trainer.eval_seconds

    def seconds(self):
        return max(1e-9, time.perf_counter() - self.uncounted() - self.start)

    def state(self):
        return {"steps": self.steps, "flops": self.flops, "loss": self.loss,
                "skipped": self.skipped, "seconds": self.seconds()}

    def restore(self, state):
        self.steps, self.flops, self.loss = state["steps"], state["flops"], state["loss"]
        self.skipped = state["skipped"]
        self.start = time.perf_counter() - self.uncounted() - state["seconds"]

    def facts(self):
        """Seconds without compilation, tokens/s and MFU (None: unknown peak) of all devices."""
        rt, seconds = self.trainer.rt, self.seconds()
        peak = peak_flops(rt.device)
        return {"train_loss": self.loss, "train_seconds": round(seconds, 3),
                "tokens_per_second": round(self.steps * self.step_tokens / seconds, 1),
                "mfu": round(self.flops / seconds / peak / rt.world, 4) if peak else None}

    def update(self, step, sums, stage, lr, compiled):
        """After each step; reads the losses (which waits for the device) every log_steps steps.

        Returns whether (a state is due, a signal asks to stop), the same on all processes.
        """
        c, rt, rows, k = self.trainer.c, self.trainer.rt, self.rows, self.k
        self.recent.append(sums)
        self.trainer.at = step + 1
        if self.trainer.log.startup is None:
            rt.synchronize()
            compiled_in = self.trainer.compile_seconds - self.compiled_before
            self.trainer.log.startup = seconds_since_launch()
            self.trainer.log.say(
                f"start-up  {self.trainer.log.startup:.1f} s from launch until the first step was"
                f" done, {compiled_in:.1f} s of them compilation")
        if not compiled:
            self.steps += 1
            self.flops += self.flops_per_token[stage] * self.step_tokens
        last = step + 1 == rows.num_steps
        if (step + 1) % c.log_steps and not last:
            return False, False
        asked = torch.tensor(self.trainer.requests(), device=rt.device)
        self.loss, kl, due, stop = rt.sum(
            torch.cat((torch.stack(self.recent).mean(dim=0), asked))).tolist()
        self.recent = []
        if not math.isfinite(self.loss):
            raise FloatingPointError(
                f"member {k}, step {step + 1}: the loss is {self.loss}; {REMEDY}")
        facts, epoch = self.facts(), min(rows.epoch_of(step + 1), c.epochs_of(k))
        speed = facts["tokens_per_second"]
        self.trainer.log.metrics(
            chain=self.trainer.chain, member=k, step=step + 1, epoch=round(epoch, 3),
            train_loss=self.loss, kl=kl, lr_multiplier=lr, tokens_per_second=speed,
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
        return due > 0, stop > 0


def percent(fraction):
    return f"{fraction:.1%}" if fraction else "n/a"


def minutes(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def run_folder(c):
    """The folder of the run, named by run_id; without it by track, time and seed."""
    name = c.run_id or f"{c.track}_{time.strftime('%Y-%m-%d_%H-%M-%S')}_seed{c.seed}"
    return ROOT / c.runs_dir / name


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
    for kind in ("one_epoch", "tuned"):
        if not (baseline or {}).get(kind):
            continue
        tokens, sign = equivalent_tokens(loss, baseline[kind])
        multiple = round(tokens / train_tokens, 2)
        result[kind] = f"{sign} {multiple}" if sign else multiple
    return result


def summarize(trainer, members, curve, ngram, memory, overrides, start):
    """The dict that becomes result.json. Its val_loss is the declared number of the run.

    ngram: losses of the count-based member, by name; memory: peak bytes of each process; start: of
    the run, time.perf_counter().
    """
    c, rt, data = trainer.c, trainer.rt, trainer.data
    suffix = "" if c.final_mixture == "uniform" else "_" + c.final_mixture
    val_loss, bytes_per_token = curve[-1]["val_loss" + suffix], data.bytes_per_token.get("val")
    baseline = data.meta.get("baseline")
    train_seconds = sum(m["train_seconds"] for m in members)
    average = lambda key: sum(m[key] * m["train_seconds"] for m in members) / train_seconds
    return {
        "track": c.track, "overrides": overrides, "seed": c.seed, "val_loss": val_loss,
        "holdout_loss": curve[-1]["holdout_loss" + suffix],
        "val_bpb": val_loss / math.log(2) / bytes_per_token if bytes_per_token else None,
        "final_mixture": c.final_mixture, "members": members, "ensemble": curve,
        "ngram": ngram,
        "data_efficiency": data_efficiency(val_loss, baseline, c.train_tokens),
        "time_limit_minutes": c.time_limit or None,
        # chains on other processes train at the same time
        "over_time_limit": 0 < 60 * c.time_limit < train_seconds * rt.world / processes(),
        "train_tokens": c.train_tokens, "train_seconds": round(train_seconds, 3),
        "wall_seconds": round(time.perf_counter() - start + trainer.earlier_seconds, 3),
        "compile_seconds": round(trainer.compile_seconds, 3),
        "startup_seconds": trainer.log.startup and round(trainer.log.startup, 3),
        "eval_seconds": round(trainer.eval_seconds, 3),
        "tokens_per_second": round(average("tokens_per_second"), 1),
        "mfu": round(average("mfu"), 4) if members[0]["mfu"] else None,
        "peak_memory_bytes": int(memory.max()), "processes": processes(),
        "hardware": hardware_name(rt.device), "torch": torch.__version__, "commit": git_commit(),
        "data_sha256": data.hashes, "config": dataclasses.asdict(c)}


def tell(error):
    """Say an error to a person; returns the exit code, or None if it is a defect of the program.

    128 + a signal that stopped the run; 2: what a person can mend, in one line of stderr. Of many
    processes the first one speaks, unless only this one can know.
    """
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        message, code = error.args or ("stopped at once; what was saved last goes on", 130)
        if speaks():
            print(message, file=sys.stderr)
        return code
    message = " ".join(str(error).split())
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in message:
        message = ("out of memory; lower --device_batch_size, then --loss_chunk, or set"
                   " --recompute_blocks=true")
    elif isinstance(error, RuntimeError) or not isinstance(error, (
            UserError, OSError, FloatingPointError)):
        return None
    if speaks() or not isinstance(error, UserError) or isinstance(error, Lost):
        print(f"error: {message}", file=sys.stderr)
    return 2


def show_finished(t, folder, is_main):
    """Print the table of a run that is finished; returns its result."""
    result, c = finished_run(t, folder)
    if is_main:
        print("\n".join([f"{folder}: this run is finished", "", *table(t, c, result)]))
    return result


def closing_lines(t, c, rt, data, folder, result):
    """The final table, the folder and a sample of text."""
    return ["", *table(t, c, result), f"folder           {folder}",
            *sample_lines(t, c, rt, data, folder, result["members"])]


def table(t, c, result):
    """The final table, as lines."""
    members, bpb, efficiency = result["members"], result["val_bpb"], result["data_efficiency"]
    columns = [("ensemble", "val_loss"), ("learned", "val_loss_learned"),
               ("+ n-gram", "val_loss_ngram"), ("holdout", "holdout_loss")]
    columns = [column for column in columns if column[1] in result["ensemble"][0]]
    lines = [" n    member" + "".join(f"{name:>10}" for name, _ in columns)
             + "  (member n; ensembles of n)"]
    for first in members[::c.num_models] if not c.include_first else ():
        lines.append(f" -  {first['val_loss']:8.4f}  (left out: it had no teacher)")
    for point in result["ensemble"]:
        lines.append(f"{point['n']:2d}  {members[point['member'] - 1]['val_loss']:8.4f}" + "".join(
            f"  {point.get(key, float('nan')):8.4f}" for _, key in columns))
    multiples = [f"{efficiency[kind]}x against the {name} baseline" for kind, name in (
        ("one_epoch", "one-epoch"), ("tuned", "tuned")) if efficiency[kind] != "n/a"]
    seconds = [f"{minutes(result[f'{kind}_seconds'])} {name}" for kind, name in (
        ("train", "train"), ("compile", "compile"), ("eval", "evaluate"), ("wall", "in all"))]
    return lines + [
        "", f"result           val loss {result['val_loss']:.4f} ({c.final_mixture} mixture),"
        f" {f'{bpb:.4f}' if bpb else 'n/a'} bits per byte, holdout {result['holdout_loss']:.4f}",
        f"data efficiency  {', '.join(multiples) or 'n/a: no curve; see train_gpt.py baseline'}",
        f"time             {', '.join(seconds)}" + (
            f"; OVER the track's limit of {result['time_limit_minutes']:g} minutes of training"
            if result["over_time_limit"] else ""),
        f"speed            {result['tokens_per_second']:,.0f} tokens/s, MFU"
        f" {percent(result['mfu'])}, peak memory {result['peak_memory_bytes'] / 2 ** 20:,.0f} MiB"]


def load_encoding(t, c, meta):
    """tiktoken.Encoding of the dataset, from its own ranks or GPT-2's (which tiktoken fetches)."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe
    if "ranks" not in meta and c.vocab_size == GPT2_VOCAB:
        return tiktoken.get_encoding("gpt2")
    ranks = load_tiktoken_bpe(str(t.ROOT / c.dataset / meta["ranks"]), meta.get("ranks_sha256"))
    return tiktoken.Encoding(meta["tokenizer"], pat_str=meta["pattern"], mergeable_ranks=ranks,
                             special_tokens={meta["bos_text"]: meta["bos_id"]})


@torch.no_grad()
def generate(model, tokens, count, temperature=0.8, seed=1):
    """Continue the list `tokens` by `count` tokens, drawn at `temperature`; stops before BOS."""
    c, device, bos = model.config, model.wte.weight.device, tokens[0]
    random = torch.Generator().manual_seed(seed)
    for _ in range(count):
        context = torch.tensor([tokens[-c.seq_len:]], device=device)
        hidden = model.prepare(context.shape[1])(context)[:, -1]
        p = torch.softmax(model.logits(hidden)[0].double().cpu() / temperature, dim=0)
        token = int(torch.multinomial(p, 1, generator=random))
        if token == bos:
            break
        tokens = [*tokens, token]
    return tokens


def load_member(t, c, rt, data, folder, number):
    """The GPT of a finished run's member, for rows of any length (SDPA takes them)."""
    with rt.device:
        model = t.GPT(c, rt.dtype).eval()
    model.bos = data.bos
    model.load_state_dict(load_file(folder / "members" / f"{number:03d}.safetensors"))
    return model


def finished_run(t, folder):
    """(result, Config) of a finished run; UserError if there is none in `folder`."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return result, t.Config(**result["config"])
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{folder}: no finished run there; name one with --run_id=") from None


def sample_lines(t, c, rt, data, folder, members, count=120):
    """Lines of text from the member that is best on selection (on train if there is none)."""
    try:
        encoding = load_encoding(t, c, data.meta)
    except Exception as error:  # a missing package, file or network: the run is done all the same
        return ["", f"no sample: the tokenizer cannot be loaded ({type(error).__name__})"]
    key = "selection_loss" if data.selection else "train_loss"
    best = min(range(len(members)), key=lambda i: members[i][key]) + 1
    model = load_member(t, c, rt, data, folder, best)
    tokens = generate(model, [data.bos, *encoding.encode_ordinary(c.prompt)], count)
    paragraphs = encoding.decode(tokens[1:], errors="ignore").splitlines()
    return ["", f"member {best} writes (temperature 0.8):", "", *(
        textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  ")
        for text in paragraphs)]


def sample(t, c):
    """Print text of the best member of the finished run `c.run_id`."""
    folder = t.ROOT / c.runs_dir / c.run_id
    result, config = finished_run(t, folder)
    c = replace(config, prompt=c.prompt, device=c.device)
    rt = t.start_runtime(c)
    data = t.load_dataset(ROOT / c.dataset, c)
    print("\n".join(sample_lines(t, c, rt, data, folder, result["members"])))
