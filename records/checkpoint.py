"""What a run keeps, so that stopping it anywhere loses nothing.

runs/<id>/run.json          settings and hashes of sources and data: what may go on under this id
runs/<id>/lock              held by the first process while the run is under way
runs/<id>/states/           the newest state of each chain and the one before it
runs/<id>/members/          finished members: weights, and log p(target) by split

A file of tensors holds a SHA-256 of all that is in it. It is written beside its place, flushed to
the disk and renamed, so it is whole or not there; a damaged one is found when it is read. Processes
on several machines need one shared runs folder to go on.
"""
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import signal
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.shards import UserError, refuse, write_json, write_whole

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("train_gpt.py", "data/shards.py", "data/ngram.py", "records/settings.py",
           "records/checkpoint.py", "records/report.py")
REMEDY = "lower --matrix_lr, --embed_lr or --head_lr"     # for numbers that are not finite
# fields that do not change what a run computes
FREE = ("run_id", "runs_dir", "prompt", "log_seconds", "save_minutes", "allow_changed",
        "hang_minutes", "time_limit")


class Stopped(Exception):
    """The run was asked to stop, and its state is saved. args: message, exit code."""


class Lost(UserError):
    """Another process of the run is gone, or did not come to a collective in time."""


# ==== Files of tensors ==========================================================================
def digest(tensors, text):
    """SHA-256 of `text` and of names, dtypes, shapes and bytes of `tensors`."""
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def write_tensors(path, tensors, facts):
    """Write CPU `tensors` {name: tensor} and `facts` (JSON) to `path`; OSError if it cannot be."""
    text = json.dumps(facts)
    metadata = {"facts": text, "sha256": digest(tensors, text)}

    def write(beside):
        save_file(tensors, beside, metadata)
        beside.chmod(0o644)     # safetensors lets nobody else read it

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_whole(path, write)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path} cannot be written ({error})") from None


def read_tensors(path):
    """(tensors, facts) of write_tensors. UserError if the file is not whole."""
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {n: file.get_tensor(n) for n in file.keys()}
        is_whole = metadata["sha256"] == digest(tensors, metadata["facts"])
        facts = json.loads(metadata["facts"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
    refuse([(not is_whole, f"{path}: damaged, its SHA-256 is another")])
    return tensors, facts


def save_member(folder, number, weights, scores, facts):
    """Write <number>.safetensors, the weights, then <number>.logp.safetensors, log p by split."""
    logp = {split: torch.from_numpy(values) for split, values in scores.items()}
    write_tensors(folder / "members" / f"{number:03d}.safetensors", weights, {})
    write_tensors(folder / "members" / f"{number:03d}.logp.safetensors", logp, facts)


def load_scores(folder, number, model, log):
    """(facts, {split: log p}) of a member that is finished and whole, or None."""
    paths = [folder / "members" / f"{number:03d}{kind}.safetensors" for kind in ("", ".logp")]
    if not all(path.exists() for path in paths):
        return None
    try:
        weights, _ = read_tensors(paths[0])
        logp, facts = read_tensors(paths[1])
    except UserError as error:
        log.say(f"warning   {error}; the member is trained again")
        return None
    fit(weights, model, paths[0])
    return facts, {split: values.numpy() for split, values in logp.items()}


def fit(weights, model, path):
    """UserError if `weights` of `path` are not those of `model`, which has other settings."""
    shapes, needed = ({name: tuple(p.shape) for name, p in some.items()}
                      for some in (weights, dict(model.named_parameters())))
    other = [name for name in sorted({*shapes, *needed}) if shapes.get(name) != needed.get(name)]
    refuse([(other, f"{path}: of another model ({', '.join(other[:3])}); undo the change of"
             " settings, or choose another --run_id")])


# ==== A run's identity and its lock =============================================================
def claim(c, folder, hashes, is_main):
    """(folder, whether it had a run, lines about it, the lock to hold on to): the run may go on.

    The same on all processes, but for the lock. UserError if another process is at it, or if its
    settings, sources or data are others than now.
    """
    answer, lock = [None], None
    if is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = take_lock(folder)
            answer = [(folder, *identify(c, folder, hashes))]
        except (UserError, OSError) as error:
            answer = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        if lock:
            lock.close()
        raise answer[0]
    return *answer[0], lock


def take_lock(folder):
    """An open, locked file; the system lets go of it when this process ends, however it ends."""
    file = open(folder / "lock", "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise UserError(f"{folder}: this run is under way ({owner}); wait for it, or choose another"
                        " --run_id") from None
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return file


def identify(c, folder, hashes):
    """(whether the folder has a run, lines of what is other now); UserError if it may not go on."""
    path = folder / "run.json"
    settings = {k: v for k, v in dataclasses.asdict(c).items() if k not in FREE}
    now = {"settings": settings, "data_sha256": hashes, "sources": {
        name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in SOURCES}}
    if not path.exists():
        refuse([((folder / "log.txt").exists(), f"{folder}: its run cannot go on, for want of"
                 " run.json; choose another --run_id")])
        write_json(path, now)
        return False, []
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        different = [f"--{name}={settings.get(name)} (was {before['settings'].get(name)})"
                     for name in sorted({*settings, *before["settings"]})
                     if settings.get(name) != before["settings"].get(name)]
        different += [f"{name} was edited" for name in SOURCES
                      if now["sources"][name] != before["sources"].get(name)]
        different += ["the dataset's files"] * (before["data_sha256"] != hashes)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not readable ({error}); choose another --run_id") from None
    refuse([(different and not c.allow_changed, f"{folder}: its run was begun otherwise: "
             + ", ".join(different) + "; undo that, choose another --run_id, or insist with"
             " --allow_changed=true")])
    if different:
        write_json(path, now)
    return True, [f"changed   {line}" for line in different]


# ==== States ====================================================================================
class Keeper:
    """The states of one chain: when they are due, written in the background, read again.

    A state is the same for any number of processes: shards of the optimizer are gathered. Only the
    random generators are by process; with another number of them they are seeded anew.
    """

    def __init__(self, trainer, chain, signals):
        self.trainer, self.chain, self.signals = trainer, chain, signals
        self.thread, self.last, self.folder = None, time.monotonic(), trainer.log.folder
        self.store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
        name, states = f"{chain:02d}", self.folder / "states"
        self.newest = states / f"{name}.safetensors"
        self.previous, self.fresh = (states / f"{name}.{kind}.safetensors"
                                     for kind in ("previous", "fresh"))

    def requests(self):
        """[a state is due, a signal asks to stop], as numbers to be summed over processes."""
        if self.store is not None:
            self.store.set(f"at/{dist.get_rank()}", str(self.trainer.at))
        waited = time.monotonic() - self.last
        minutes = self.trainer.c.save_minutes
        due = self.trainer.rt.rank == 0 and minutes and waited >= 60 * minutes
        return [float(bool(due)), float(self.signals.number or 0)]

    def save(self, k, step, meter, averages, stop=False):
        """Copy the state after `step` steps of member k; it is written while training goes on.

        stop: when it is written, Stopped. FloatingPointError if weights are not finite.
        """
        sums = torch.stack([p.detach().sum() for p in self.trainer.model.parameters()])
        if not sums.isfinite().all():
            raise FloatingPointError(f"member {k}, step {step}: weights are not finite; {REMEDY}")
        tensors, facts = collect(self.trainer, k, step, meter, averages)
        self.wait()
        self.last = time.monotonic()
        if self.trainer.rt.rank == 0:
            self.thread = threading.Thread(target=self.write, args=(tensors, facts))
            self.thread.start()
        if stop:
            self.wait()
            raise Stopped(f"stopped   member {k} after step {step}; the same command goes on, with"
                          f" --run_id={self.folder.name}",
                          128 + (self.signals.number or signal.SIGTERM))

    def write(self, tensors, facts):
        try:
            write_tensors(self.fresh, tensors, facts)
            if self.newest.exists():
                self.newest.replace(self.previous)
            self.fresh.replace(self.newest)
        except OSError as error:
            with contextlib.suppress(OSError):      # a disk too full for the log, too
                self.trainer.log.say(f"warning   state not saved, the one before stays: {error}")

    def wait(self):
        if self.thread is not None:
            self.thread.join()

    def load(self):
        """(tensors, facts) of the newest state that is whole, or None; sets the run's clocks."""
        trainer = self.trainer
        for path in (self.newest, self.previous):
            try:
                if path.exists():
                    state = read_tensors(path)
                    trainer.compile_seconds, trainer.eval_seconds, trainer.earlier_seconds = map(
                        max, trainer.clocks(), state[1]["clocks"])
                    return state
            except UserError as error:
                trainer.log.say(f"warning   {error}; going back to the state before")
        return None

    def of(self, state, k):
        """`state` if it is member k's, else None: the member begins; its later metrics go."""
        state = state if state and state[1]["member"] == k else None
        step = state[1]["step"] if state else 0
        self.trainer.log.rewind(self.chain, k, step)
        if state:
            self.trainer.log.say(f"resumed   member {k} after step {step}")
        return state

    def finished(self, number):
        """(facts, {split: log p} on the first process) of a finished member, or None."""
        rt = self.trainer.rt
        done = None
        if rt.rank == 0:
            done = load_scores(self.folder, number, self.trainer.model, self.trainer.log)
            sizes = {split: sum(map(len, documents)) - 1
                     for split, documents in self.trainer.data.evaluated().items()}
            refuse([(done and {split: len(p) for split, p in done[1].items()} != sizes,
                     f"{self.folder}: member {number} was scored on other text; undo the change of"
                     " settings, or choose another --run_id")])
        if rt.world > 1:
            facts = [done and done[0]]
            dist.broadcast_object_list(facts, group=rt.group, group_src=0)
            done = done or (facts[0] and (facts[0], None))
        return done

    def load_weights(self, number, state, k):
        """Put finished member k, which the next one is taught by or begins from, into the model."""
        trainer, at = self.trainer, state[1]["member"] if state else 0
        if trainer.c.continue_members and at != k + 1:      # else the state of k + 1 follows
            if at == k and state[1]["is_last"]:
                restore(trainer, state)
            else:
                trainer.log.say("warning   no state of the member before: new optimizer state")
                trainer.optimizer = trainer.new_optimizer()
        weights, _ = read_tensors(self.folder / "members" / f"{number:03d}.safetensors")
        trainer.model.load_state_dict(weights)

    @contextlib.contextmanager
    def blame(self, k):
        """Within: when processes lose each other, Lost says where each was seen last."""
        try:
            yield
        except RuntimeError as error:
            text = " ".join(str(error).split())
            lost = isinstance(error, dist.DistError) or re.search(
                r"gloo|Connection (closed|reset)|[Tt]imed out|timeout|peer", text)
            if self.trainer.rt.world == 1 or not lost:
                raise
            raise Lost(
                f"rank {dist.get_rank()} lost another process or waited for it too long, in member"
                f" {k} after step {self.trainer.at}; last seen: {', '.join(self.last_seen())};"
                f" start the same command again ({text[:160]})") from None

    def last_seen(self):
        """"rank 0 at step 20", ...: what the processes have told at their readings of the loss.

        All that still run come here at about the same time, and say so.
        """
        def told(key, default):
            try:
                self.store.wait([key], timedelta(seconds=2))
                return self.store.get(key).decode()
            except RuntimeError:        # never told, or the store's process is gone
                return default

        with contextlib.suppress(RuntimeError):
            self.store.set(f"lost/{dist.get_rank()}", "")
        return [f"rank {rank} at step {told(f'at/{rank}', '?')}"
                + told(f"lost/{rank}", " (does not answer)")
                for rank in range(dist.get_world_size())]

    def save_member(self, number, scores, facts):
        """Write what a member is and scored, once its last state is there: the next needs both."""
        self.wait()
        if self.trainer.rt.rank == 0:
            weights = {name: p.detach().cpu().contiguous()
                       for name, p in self.trainer.model.named_parameters()}
            save_member(self.folder, number, weights, scores, facts)

    def end(self):
        """When the chain is done; chains of other processes may have heeded a signal before."""
        self.wait()
        if self.signals.number and self.trainer.rt.across is not None:
            raise Stopped(f"stopped   chain {self.chain + 1} is done; the same command goes on,"
                          f" with --run_id={self.folder.name}", 128 + self.signals.number)


def collect(trainer, k, step, meter, averages):
    """(tensors on the CPU, facts) that member k goes on from after `step` steps.

    All processes of a chain call it; the tensors are only in the first one's result.
    """
    rt, optimizer, tensors = trainer.rt, trainer.optimizer, {}

    def keep(name, tensor):
        if rt.rank == 0:
            tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()

    for name, p in trainer.model.named_parameters():
        keep(f"model.{name}", p)
    for i, group in enumerate(optimizer.groups):
        for name in ("m", "v"):
            keep(f"optimizer.{i}.{name}", rt.gather(getattr(group, name)))
    for name, (_, sums) in averages.sums.items():
        for key, value in sums.items():
            keep(f"average.{name}.{key}", torch.as_tensor(value))
    keep("random", rt.gather(random_state(rt.device).unsqueeze(0).to(rt.device)))
    facts = {
        "member": k, "step": step, "is_last": step == meter.rows.num_steps, "world": rt.world,
        "optimizer_steps": optimizer.steps,
        "masses": {name: mass for name, (mass, _) in averages.sums.items()},
        "ends": averages.ends, "meter": meter.state(), "clocks": trainer.clocks()}
    return tensors, facts


def restore(trainer, state, meter=None, averages=None):
    """Put a state of `collect` into trainer, meter and averages; returns the steps done."""
    tensors, facts = state
    rt, model = trainer.rt, trainer.model
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items()
               if name.startswith("model.")}
    fit(weights, model, trainer.log.folder / "states")
    model.load_state_dict(weights)
    trainer.optimizer = trainer.optimizer or trainer.new_optimizer()
    trainer.optimizer.steps = facts["optimizer_steps"]
    for i, group in enumerate(trainer.optimizer.groups):
        for name in ("m", "v"):
            whole = tensors.get(f"optimizer.{i}.{name}", torch.zeros(1)).to(rt.device)
            parts = list(whole) if group.kind == "muon" else [whole]
            part, mine = group.slice(parts, group.first, group.share), getattr(group, name)
            refuse([(part.shape != mine.shape, f"{trainer.log.folder / 'states'}: of another"
                     " optimizer; undo the change of settings, or choose another --run_id")])
            mine.copy_(part)
    if meter is None:       # only weights and optimizer, for a member that continues
        return 0
    meter.restore(facts["meter"])
    averages.ends = facts["ends"]
    for name, mass in facts["masses"].items():
        sums = {key.removeprefix(f"average.{name}."): value for key, value in tensors.items()
                if key.startswith(f"average.{name}.")}
        averages.sums[name] = [mass, {key: value.numpy() if "probs" in name else
                                      value.to(rt.device) for key, value in sums.items()}]
    random = tensors["random"]
    if facts["world"] == rt.world and random.shape[1] == len(random_state(rt.device)):
        set_random_state(random[rt.rank], rt.device)
    else:
        torch.manual_seed(7919 * (1000 * facts["member"] + facts["step"]) + rt.rank)
    return facts["step"]


def random_state(device):
    """uint8 [n]: states of torch's generators of this process."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def set_random_state(state, device):
    """The reverse. clone: torch misreads a view that does not begin its storage."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].cpu().clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[size:].cpu().clone(), device)


# ==== Signals and numbers that are not ==========================================================
class Signals:
    """Within: SIGTERM and SIGINT are remembered, to be heeded after a step; a second one is not."""

    def __enter__(self):
        self.number, self.before = None, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self.remember)
        return self

    def remember(self, number, _):
        self.number = number
        signal.signal(number, self.before[number])

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def is_finite(trainer, sums, meter, rows, step):
    """Whether loss and gradients are finite; if not: FloatingPointError, or the step is skipped.

    Looked at in every step on a CPU and to skip. Elsewhere that would make the host wait for the
    device: there the loss stops the run when it is read, and no state or member with weights that
    are not finite is saved.
    sums: [ce, kl] of this process, which become the last ones if the step is skipped.
    """
    c, rt, model = trainer.c, trainer.rt, trainer.model
    if rt.device.type == "cuda" and c.on_nonfinite == "stop":
        return True
    if math.isfinite(rt.sum(sums.sum() + sum(p.grad.sum() for p in model.parameters()))):
        return True
    names = [name for name, p in model.named_parameters() if not p.grad.isfinite().all()]
    message = (f"member {meter.k}, step {step + 1}: not finite: {', '.join(names[:4]) or 'loss'};"
               f" documents {', '.join(map(str, documents_of(rows, step)[:8]))}")
    meter.skipped += 1
    if c.on_nonfinite == "stop" or meter.skipped > c.max_skips:
        raise FloatingPointError(f"{message}; {REMEDY}")
    trainer.log.say(f"warning   {message}; the step is skipped")
    model.zero_grad()
    sums.copy_(meter.recent[-1] if meter.recent else sums.new_zeros(2))
    return False


def documents_of(rows, step):
    """Numbers, from 0 in the member's order, of the documents in the batch of `step`."""
    found, first = set(), step * rows.batch_rows
    for row in range(first, min(first + rows.batch_rows, rows.total_rows)):
        rows.load(row // rows.rows_per_epoch)
        start = rows.order[row % rows.rows_per_epoch] * rows.seq_len
        ends = np.cumsum([len(rows.documents[i]) for i in rows.document_order])
        a, b = np.searchsorted(ends, [start, min(start + rows.seq_len, ends[-1] - 1)], "right")
        found |= {int(i) for i in rows.document_order[a:b + 1]}
    return sorted(found)
