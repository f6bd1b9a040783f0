"""Kill a toy run at random moments until it is done; it must end as one that nobody killed.

    python tests/chaos.py --kills=40 --processes=1 --seed=1

Half of the kills come after a random time (a third of these are a SIGTERM), half inside the
writing of a file or of metrics: before or after a flush or a rename, or when half of a file is
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
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo        # the run would import it, which takes a second: here once for all forks
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
for needed in (ROOT, ROOT / "data"):        # for who runs this as a script
    sys.path.insert(0, str(needed))

import train_gpt  # noqa: E402
from helpers import PLAIN, last_of_each, make_dataset  # noqa: E402

SMALL = ["--preset=toy", "--device=cpu", "--dtype=float32", "--vocab_size=100", "--seq_len=32",
         "--train_tokens=1500", "--selection_tokens=200", "--eval_tokens=0", "--model_dim=32",
         "--final_mixture=learned", "--run_id=run"]
# three members, each perturbed and distilled from the one before, with dropout, so that every
# kind of state matters: weights, optimizer, averages, random generators, and the teacher; a state
# is due at every reading
RUN = [*SMALL, "--track=cpu", "--num_models=3", "--kd_alpha=0.5", "--continue_members=true",
       "--average=weights", "--average_epochs=2", "--num_epochs=2", "--num_layers=2",
       "--batch_rows=8", "--dropout=0.1", "--log_steps=2", "--save_minutes=0.00001"]
VARIANTS = ([], ["--average=probs", "--continue_members=false"],
            [*PLAIN, "--loss_chunk=40"])
LIMIT = 120         # seconds that a launch may take


# ==== Launches ==================================================================================
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Launch:
    """Forks of this process that run train_gpt.main(arguments) as the ranks of one group.

    console: file that they write to; die: {rank: moments that it lives through (die_after)}.
    """

    def __init__(self, arguments, processes, console, die=()):
        self.codes = {}         # pid -> exit code, negative: a signal; of those that have ended
        self.pids = []
        self.console = console
        port = free_port()
        for rank in range(processes):
            launcher = {} if processes == 1 else {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port)}
            pid = os.fork()
            if pid == 0:
                run_child(arguments, launcher, console, dict(die).get(rank))
            self.pids.append(pid)

    def poll(self):
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)

    def wait(self, seconds=LIMIT, until_killed=False):
        """The exit codes by rank; None if not all have ended (or one was killed, if asked)."""
        end = time.monotonic() + seconds
        while True:
            self.poll()
            if len(self.codes) == len(self.pids):
                return [self.codes[pid] for pid in self.pids]
            if until_killed and -signal.SIGKILL in self.codes.values():
                return None
            if time.monotonic() > end:
                return None
            time.sleep(0.002)

    def send(self, number):
        """Send a signal to all that have not ended."""
        self.poll()
        for pid in self.pids:
            if pid not in self.codes:
                os.kill(pid, number)

    def succeed(self):
        codes = self.wait()
        assert codes == [0] * len(self.pids), self.failure(codes)
        return self

    def failure(self, codes):
        return f"exit codes {codes}:\n" + Path(self.console).read_text(encoding="utf-8")[-4000:]


def run_child(arguments, launcher, console, moments):
    """In a fork: run main and exit with its code."""
    code = 70
    try:
        with open(console, "a", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)
        os.environ.update(launcher)
        torch.set_num_threads(1)            # a fork must not start threads of its own
        torch.set_num_threads = ignore
        if moments is not None:
            die_after(moments)
        code = train_gpt.main(last_of_each(arguments))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ignore(*_):
    pass


def die_after(count):
    """Patch this process: it dies of SIGKILL after `count` of the moments named at the top."""
    left = [count]

    def moment():
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    def around(function):
        def call(*arguments, **options):
            moment()
            result = function(*arguments, **options)
            moment()
            return result
        return call

    write_whole = train_gpt.write_whole

    def write_half(path, write):
        def half(beside):
            write(beside)
            if left[0] == 0:
                os.truncate(beside, beside.stat().st_size // 2)
            moment()
        write_whole(path, half)

    train_gpt.write_whole = write_half
    train_gpt.Log.metrics = around(train_gpt.Log.metrics)
    os.replace = around(os.replace)         # Path.replace calls it
    os.fsync = around(os.fsync)


def killed_until_done(arguments, processes, source, budget, seconds, console):
    """Launch until the run is done, with `budget` kills at most; returns how many there were.

    seconds: that the run takes if nobody kills it; source: of chance.
    """
    kills = 0
    while True:
        kind = source.choice(("inside", "inside", "inside", "timed", "timed", "gentle"))
        delay = source.uniform(0.05, 1) * seconds
        die = {source.randrange(processes): source.randrange(100)}
        if kills >= budget:
            Launch(arguments, processes, console).succeed()
            return kills
        launch = Launch(arguments, processes, console, die if kind == "inside" else ())
        codes = launch.wait(LIMIT if kind == "inside" else delay, until_killed=True)
        if codes is None:
            launch.send(signal.SIGTERM if kind == "gentle" else signal.SIGKILL)
            codes = launch.wait()
        if codes == [0] * processes:
            return kills
        # 2: of a process that has lost another one
        allowed = {0, -signal.SIGKILL, -signal.SIGTERM, 143} | ({2} if processes > 1 else set())
        assert codes is not None and {*codes} <= allowed and {*codes} != {2}, launch.failure(codes)
        kills += 1


# ==== Comparison ================================================================================
CLOCKS = {"tokens_per_second", "seconds", "train_seconds", "mfu", "clocks"}


def without_clocks(numbers):
    return {name: value for name, value in numbers.items() if name not in CLOCKS}


def read(folder):
    """(losses, metrics, {file: tensors}) of a finished run, without what clocks say."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    numbers = [without_clocks(part) for part in [*result["members"], *result["ensemble"]]]
    numbers.append({key: result[key] for key in ("val_loss", "holdout_loss")})
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = {}            # the last line of a step counts: a run that was stopped repeats some
    for reading in map(json.loads, lines):
        metrics[reading["member"], reading.get("step", math.inf)] = without_clocks(reading)
    tensors = {path.name: load_file(path) for path in sorted(folder.glob("members/*"))}
    return numbers, dict(sorted(metrics.items())), tensors


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
    same = type(a) is type(b) and (
        a == b or isinstance(a, float) and abs(a - b) <= tolerance)
    return [] if same else [f"{where}: {str(a)[:300]}, then {str(b)[:300]}"]


def assert_same(one, other, tolerance=0.0):
    """Two folders hold the same run, digit for digit if there is no tolerance."""
    found = differences(read(one), read(other), tolerance)
    assert not found, f"{len(found)} differences: " + "; ".join(found[:5])


# ==== Commands ==================================================================================
def chaos(folder, kills, processes, seed):
    """Runs that are killed until `kills` is reached; AssertionError if one ends otherwise."""
    source = random.Random(seed)
    data = make_dataset(folder / "small")
    seconds, done, rounds = {}, 0, 0
    while done < kills:
        variant = rounds % len(VARIANTS)
        run = [*RUN, *VARIANTS[variant], f"--dataset={data}"]
        reference = folder / f"reference{variant}"
        if variant not in seconds:
            started = time.monotonic()
            Launch([*run, f"--runs_dir={reference}"], processes, f"{reference}.txt").succeed()
            seconds[variant] = time.monotonic() - started
        rounds += 1
        runs = folder / f"round{rounds}"
        console = Path(f"{runs}.txt")
        done += killed_until_done([*run, f"--runs_dir={runs}"], processes, source, kills - done,
                                  seconds[variant], console)
        text = console.read_text(encoding="utf-8")
        assert "Traceback" not in text or processes > 1, text[-4000:]   # others lose a killed one
        assert_same(reference / "run", runs / "run")
        assert not list(runs.rglob("*.tmp"))
        print(f"run {rounds} {' '.join(VARIANTS[variant])} ended as the one that nobody killed;"
              f" {done} kills so far", flush=True)


def worlds(folder, track, processes):
    """The members of a track's toy are those of one process, whatever the number of processes."""
    data = make_dataset(folder / "small")
    ends = []
    for count in (1, processes):
        runs = folder / f"{track}{count}"
        Launch([*SMALL, f"--track={track}", "--num_models=2", "--kd_alpha=0.5", "--kd_from=2",
                "--dropout=0", "--stochastic_depth=0", "--train_tokens=1000", "--batch_rows=16",
                "--device_batch_size=2", "--save_minutes=0", f"--dataset={data}",
                f"--runs_dir={runs}"],
               count, f"{runs}.txt").succeed()
        numbers, _, _ = read(runs / "run")
        ends.append(numbers)
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
            for track in arguments.worlds.split(","):
                worlds(folder, track, 4)
            return
        chaos(folder, arguments.kills, arguments.processes, arguments.seed)
    print(f"{arguments.kills} kills survived in {time.monotonic() - start:.0f} s,"
          f" {arguments.processes} process(es), seed {arguments.seed}")


if __name__ == "__main__":
    main()
