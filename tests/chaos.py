"""Kill a toy run at random moments until it is done; it must end as one that nobody killed.

    python tests/chaos.py --kills=40 --processes=1 --seed=1

Half of the kills come after a random time (a third of these are a SIGTERM), half inside the writing
of states, members and metrics: before or after a flush or a rename, or when half of a file is
there. train_gpt is imported once; each launch is a fork of this process, so a kill costs little
more than the steps it throws away. Or compare four processes with one, without a kill:

    python tests/chaos.py --worlds=cpu,mini,tiny,limited,two_hour,unlimited
"""
import argparse
import json
import math
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t
from data.shards import write_meta, write_shard
from records import checkpoint, report

VOCAB, BOS = 64, 63
# three members a chain, each perturbed from and distilled from the one before, that end as the best
# of six averages; a state is due at every reading of the loss
RUN = ["--track=cpu", "--preset=toy", "--device=cpu", "--dtype=float32", "--vocab_size=64",
       "--train_tokens=2500", "--selection_tokens=300", "--eval_tokens=0", "--seq_len=32",
       "--num_models=3", "--kd_alpha=0.5", "--average=best", "--average_epochs=2",
       "--continue_members=true", "--num_epochs=2", "--num_layers=2", "--model_dim=32",
       "--batch_rows=8", "--log_steps=2", "--save_minutes=0.00001", "--ngram_order=0",
       "--final_mixture=learned", "--run_id=run"]


def make_dataset(folder):
    """A little dataset of random documents of 50 tokens, with words that repeat."""
    splits = {}
    for seed, (split, count) in enumerate({"train": 60, "val": 8, "holdout": 8}.items()):
        source = np.random.default_rng(seed)
        tokens = np.minimum(source.geometric(0.15, 50 * count), BOS - 1).astype(np.uint16)
        tokens[::50] = BOS
        splits[f"{split}_000000"] = write_shard(folder / f"small_{split}_000000.bin", tokens,
                                                VOCAB, BOS)
    write_meta(folder, {"splits": splits, "vocab_size": VOCAB, "bos_id": BOS})
    return folder


# ---- launches ----
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(arguments, processes, console, prepare=lambda: None):
    """Process ids of forks that run main(arguments) as ranks of one group; prepare: in each."""
    port, pids = free_port(), []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            child(arguments, rank, processes, port, console, prepare)
        pids.append(pid)
    return pids


def child(arguments, rank, processes, port, console, prepare):
    code = 70
    try:
        with open(console, "a", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if processes > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port)}
        os.cpu_count = lambda: 1        # a fork must not start threads of its own
        prepare()
        code = t.main(list(arguments))
        for thread in set(threading.enumerate()) - {threading.current_thread()}:
            if not thread.daemon:
                thread.join()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pids, seconds=math.inf):
    """Exit codes (negative: of a signal); None if one still runs after `seconds`."""
    end, codes = time.monotonic() + seconds, {}
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.002)
    return [codes[pid] for pid in pids]


def kill(pids, number):
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def die_at(count):
    """Patch this process: it dies of SIGKILL at the count-th of the moments listed above."""
    left = [count]

    def moment():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(function):
        def call(*arguments, **options):
            moment()
            result = function(*arguments, **options)
            moment()
            return result
        return call

    def half(tensors, path, metadata):
        save(tensors, path, metadata)
        if left[0] == 1:
            os.truncate(path, os.path.getsize(path) // 2)
        moment()

    save, checkpoint.save_file = checkpoint.save_file, half
    os.replace, os.fsync = around(os.replace), around(os.fsync)
    report.Log.metrics = around(report.Log.metrics)


def killed_until_done(arguments, processes, source, budget, console):
    """Launch until the run ends, killing it at most `budget` times; returns the number of kills."""
    kills = 0
    while True:
        timed, is_gentle = source.random() < 0.5, source.random() < 0.33
        delay = source.uniform(0.1, 3) if timed else 60
        count = 0 if timed or kills >= budget else source.randint(1, 150)
        victim = source.randrange(processes)

        def prepare():
            if count and int(os.environ.get("RANK", 0)) == victim:
                die_at(count)

        pids = launch(arguments, processes, console, prepare)
        codes = wait(pids, 120 if kills >= budget else delay) if timed else until_one_ends(pids)
        if codes is None:
            kill(pids, signal.SIGTERM if timed and is_gentle else signal.SIGKILL)
            codes = wait(pids, 60)
        if codes == [0] * processes:
            return kills
        if codes is None or not {-signal.SIGKILL, -signal.SIGTERM, 143} & set(codes):
            raise AssertionError(f"exit codes {codes}:\n" + Path(console).read_text()[-4000:])
        kills += 1


def until_one_ends(pids, seconds=120):
    """None as soon as one process is killed (so that the others are killed too), else codes."""
    end, codes = time.monotonic() + seconds, {}
    while len(codes) < len(pids) and time.monotonic() < end:
        for pid in set(pids) - set(codes):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                codes[pid] = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if codes[pid].si_code == os.CLD_KILLED:
                    return None
        time.sleep(0.002)
    return wait(pids, 1)


# ---- comparison ----
def read(folder):
    """(losses, metrics without clocks, {file: tensors}) of a finished run."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    clocks = {"tokens_per_second", "seconds", "train_seconds", "mfu"}
    numbers = [{k: v for k, v in part.items() if k not in clocks}
               for part in [*result["members"], *result["ensemble"]]]
    numbers.append({key: result[key] for key in ("val_loss", "holdout_loss")})
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [{k: v for k, v in json.loads(line).items() if k not in clocks} for line in lines]
    tensors = {path.name: load_file(path) for path in sorted(folder.glob("members/*"))}
    return numbers, metrics, tensors


def differences(a, b, tolerance=0.0, where=""):
    """Lines on what differs between two values of `read`, by more than `tolerance`."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape:
        error = (a.double() - b.double()).abs().max().item()
        same = error <= tolerance * max(1.0, a.abs().max().item())
        return [] if same else [f"{where}: differ by {error:.3g}"]
    if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
        return [line for k in a for line in differences(a[k], b[k], tolerance, f"{where}.{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b))
                for line in differences(x, y, tolerance, f"{where}[{i}]")]
    if isinstance(a, float) and isinstance(b, float):
        same = a == b or abs(a - b) <= tolerance or (math.isnan(a) and math.isnan(b))
        return [] if same else [f"{where}: {a!r}, then {b!r}"]
    same = type(a) is type(b) and a == b
    return [] if same else [f"{where}: {str(a)[:300]}, then {str(b)[:300]}"]


def assert_same(one, other, tolerance=0.0):
    found = differences(read(one), read(other), tolerance)
    assert not found, f"{len(found)} differences: " + "; ".join(found[:5])


def chaos(folder, kills, processes, seed, extra=()):
    """Runs that are killed until `kills` is reached; AssertionError if one ends as another."""
    source, done, rounds = random.Random(seed), 0, 0
    data, references = make_dataset(folder / "small"), {}
    tolerance = 0.0 if processes == 1 else 1e-5
    while done < kills:
        chains = 1 + rounds % 2
        run = [*RUN, f"--dataset={data}", f"--num_chains={chains}", *extra]
        if chains not in references:
            references[chains] = folder / f"reference{chains}"
            started = time.monotonic()
            codes = wait(launch([*run, f"--runs_dir={references[chains]}"], processes,
                                folder / f"reference{chains}.txt"), 120)
            assert codes == [0] * processes, (folder / f"reference{chains}.txt").read_text()
            print(f"reference of {chains} chain(s): {time.monotonic() - started:.1f} s", flush=True)
        rounds += 1
        runs = folder / f"round{rounds}"
        done += killed_until_done([*run, f"--runs_dir={runs}"], processes, source, kills - done,
                                  folder / f"round{rounds}.txt")
        text = (folder / f"round{rounds}.txt").read_text(encoding="utf-8")
        assert "Traceback" not in text or processes > 1, text[-4000:]   # others lose a killed one
        assert_same(references[chains] / "run", runs / "run", tolerance)
        print(f"run {rounds}, {chains} chain(s): ended as the one that nobody killed;"
              f" {done} kills so far", flush=True)
    return done


def worlds(folder, track, processes):
    """The members of a track's toy are those of one process, whatever the number of processes."""
    ends = []
    for count in (1, processes):
        runs = folder / f"{track}{count}"
        codes = wait(launch([
            *RUN[1:], f"--track={track}", "--num_models=2", "--num_chains=1", "--dropout=0",
            "--num_layers=4", "--train_tokens=1000", "--batch_rows=16", "--meta_rows=2",
            "--device_batch_size=2",
            "--edge_batch_rows=16", "--average=last", "--save_minutes=0",
            f"--dataset={folder / 'small'}", f"--runs_dir={runs}"], count,
            folder / f"{track}{count}.txt"), 120)
        assert codes == [0] * count, (folder / f"{track}{count}.txt").read_text()[-4000:]
        ends.append(read(runs / "run")[0])
    found = differences(*ends, 1e-3)
    assert not found, f"{track}, {processes} processes: {found}"
    print(f"{track}: {processes} processes train the members of one", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("kills", 40), ("processes", 1), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--worlds", default="", help="instead: TRACK,... in 4 processes and in one")
    parser.add_argument("--keep", default="", help="folder for runs and consoles; default: none")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.keep or scratch).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.worlds:
            make_dataset(folder / "small")
            return [worlds(folder, track, 4) for track in arguments.worlds.split(",")]
        done = chaos(folder, arguments.kills, arguments.processes, arguments.seed)
    print(f"{done} kills survived in {time.monotonic() - start:.0f} s,"
          f" {arguments.processes} process(es), seed {arguments.seed}")


if __name__ == "__main__":
    main()
