"""What a run survives: kills, signals, damaged files, a full disk, numbers that are not, bad input.

    python -m pytest tests/test_faults.py

tests/chaos.py kills more, at random.
"""
import contextlib
import errno
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt as t
from data.shards import UserError, write_meta
from records import checkpoint, report
from tests.chaos import RUN, assert_same, make_dataset
from tests.test_run import SCRIPT, TORCHRUN, dataset, refused, refused_dataset, rewrite  # noqa

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
# two members of 9 steps, a state due at every step
SHORT = [*RUN, "--num_models=2", "--average=probs", "--num_epochs=1", "--log_steps=1"]
SHORT = [a for i, a in enumerate(SHORT) if a.partition("=")[0] not in
         {b.partition("=")[0] for b in SHORT[i + 1:]}]


@pytest.fixture(autouse=True)
def interrupts():
    """A shell starts its background jobs, these tests perhaps among them, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return f"--dataset={make_dataset(tmp_path_factory.mktemp('data') / 'small')}"


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Folder of the run that nothing befell."""
    runs = tmp_path_factory.mktemp("whole")
    assert main(runs, data) == (0, "")
    return runs / "run"


def main(runs, data, *arguments):
    """(exit code, stderr) of the SHORT run, begun or gone on with."""
    err = io.StringIO()
    given = [a for a in (*SHORT, data) if a.partition("=")[0] not in
             {b.partition("=")[0] for b in arguments}]
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = t.main([*given, f"--runs_dir={runs}", *arguments])
    return code, err.getvalue()


def log(runs):
    """What a run told, or since it was resumed from changed sources: after the last source."""
    text = (runs / "run/log.txt").read_text(encoding="utf-8")
    return text.rpartition("\n" + "=" * 40 + " end of ")[2]


@contextlib.contextmanager
def at_reading(count, action):
    """Within: `action(trainer)` happens before the count-th reading of the loss."""
    left, metrics = [count], report.Log.metrics

    def patched(self, **numbers):
        left[0] -= "step" in numbers
        if left[0] == 0 and "step" in numbers:
            action()
        metrics(self, **numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.Log, "metrics", patched)
        yield


def stop_at(runs, data, count, number=signal.SIGTERM, *arguments):
    """Run until a signal at the count-th reading; (exit code, stderr)."""
    with at_reading(count, lambda: os.kill(os.getpid(), number)):
        return main(runs, data, *arguments)


def ends_equal(runs, data, whole, *words):
    """The same command ends the run as if nothing had been; its log then says `words`."""
    assert main(runs, data) == (0, "")
    assert_same(whole, runs / "run")
    assert all(word in log(runs) for word in words), log(runs)[-3000:]
    assert not (runs / "run/states").exists() and not list((runs / "run").rglob("*.tmp"))


# ---- kills ----

@pytest.mark.parametrize("processes, kills", [(1, 5), (2, 2)])
def test_killed_at_random(processes, kills):
    done = script("tests/chaos.py", f"--kills={kills}", f"--processes={processes}", "--seed=11")
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{kills} kills survived" in done.stdout


def test_four_processes_train_the_members_of_one():
    done = script("tests/chaos.py", "--worlds=limited")
    assert done.returncode == 0, done.stderr[-4000:]


def script(*arguments, **options):
    env = {k: v for k, v in os.environ.items() if k not in ENVIRONMENT} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, encoding="utf-8",
                          env=env, timeout=120, cwd=ROOT, **options)


def test_random_state_of_any_process():
    """A row of the gathered states does not begin its storage; torch alone would misread it."""
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append(checkpoint.random_state(torch.device("cpu")))
    for seed, state in enumerate(torch.stack(states)):
        checkpoint.set_random_state(state, torch.device("cpu"))
        assert torch.equal(torch.rand(5), torch.rand(
            5, generator=torch.Generator().manual_seed(seed)))


def test_torchrun_killed_then_one_process_goes_on(data, tmp_path):
    """Two processes share each step of one chain; one process ends what they began."""
    env = {k: v for k, v in os.environ.items() if k not in ENVIRONMENT} | {"OMP_NUM_THREADS": "1"}
    # an update of about 0 may change its sign with the order of summation, and with it the decay
    smooth = ("--dropout=0", "--cautious=false")
    shared = [*SHORT, data, *smooth]
    launcher = subprocess.Popen(
        [sys.executable, *TORCHRUN, "--nproc_per_node=2", SCRIPT, *shared,
         f"--runs_dir={tmp_path / 'killed'}"], env=env, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while not list((tmp_path / "killed").glob("run/states/00.safetensors")):
            assert launcher.poll() is None and time.monotonic() < end
            time.sleep(0.01)
    finally:
        for pid in [launcher.pid, *descendants(launcher.pid)]:      # workers have own sessions
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launcher.wait()
    assert not (tmp_path / "killed/run/result.json").exists()
    wait_for_lock(tmp_path / "killed/run")
    for name in ("killed", "whole"):
        assert main(tmp_path / name, data, *smooth) == (0, "")
    assert "resumed   member " in log(tmp_path / "killed")
    assert_same(tmp_path / "whole/run", tmp_path / "killed/run", 1e-5)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_torchrun_restarts_when_a_process_dies_or_hangs(number, data, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ENVIRONMENT} | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "stderr", "w", encoding="utf-8") as stderr:
        launcher = subprocess.Popen(
            [sys.executable, *TORCHRUN, "--nproc_per_node=2", "--max-restarts=1", SCRIPT, *SHORT,
             data, f"--runs_dir={tmp_path}", "--hang_minutes=0.15"], env=env,
            stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        end = time.monotonic() + 60
        while not list(tmp_path.glob("run/states/00.safetensors")):
            assert launcher.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        second = max(pid for pid in descendants(launcher.pid) if "--hang_minutes" in Path(
            f"/proc/{pid}/cmdline").read_text())
        os.kill(second, number)
        assert launcher.wait(timeout=90) == 0
    finally:
        for pid in [*descendants(launcher.pid), launcher.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    message = (tmp_path / "stderr").read_text(encoding="utf-8")
    assert re.search(r"^error: rank 0 lost another process .* member \d after step \d.*"
                     r"rank 1 at step \S+ \(does not answer\)", message, re.M), message
    assert "resumed   member " in log(tmp_path) and (tmp_path / "run/result.json").exists()


def descendants(pid):
    """Process ids of the children of `pid`, and theirs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ProcessLookupError):
            if path.read_text().rpartition(")")[2].split()[1] == str(pid):
                found += [int(path.parent.name), *descendants(int(path.parent.name))]
    return found


def wait_for_lock(folder):
    for _ in range(500):
        with contextlib.suppress(UserError):
            return checkpoint.take_lock(folder).close()
        time.sleep(0.01)


# ---- signals ----

@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("count", [2, 12])
def test_signal_stops_after_a_state(number, code, count, data, whole, tmp_path):
    got, err = stop_at(tmp_path, data, count, number)
    assert got == code
    assert re.fullmatch(r"stopped   member [12] after step \d+; [^\n]*--run_id=run\n", err), err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ends_equal(tmp_path, data, whole, "resumed   member ")


def test_second_interrupt_stops_at_once(data, whole, tmp_path):
    with at_reading(5, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]):
        code, err = main(tmp_path, data)
    assert code == 130 and re.fullmatch("stopped at once; [^\n]+\n", err)
    join()
    ends_equal(tmp_path, data, whole, "resumed   member ")


def test_signal_while_a_state_is_written(data, whole, tmp_path, monkeypatch):
    """The thread that writes is let finish, and the state after the step at hand is saved too."""
    save, left = checkpoint.save_file, [3]

    def slow(tensors, path, metadata):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
        save(tensors, path, metadata)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", slow)
        assert main(tmp_path, data)[0] == 143
    states = sorted((tmp_path / "run/states").iterdir())
    assert [checkpoint.read_tensors(path)[1]["step"] for path in states][1] >= 4
    ends_equal(tmp_path, data, whole, "resumed   member ")


def test_signal_to_the_real_script(data, whole, tmp_path):
    """From a shell: SIGTERM as the first member trains; exit code, one line, and it goes on."""
    env = {k: v for k, v in os.environ.items() if k not in ENVIRONMENT} | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([sys.executable, "-u", SCRIPT, *SHORT, data, f"--runs_dir={tmp_path}"],
                           env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in run.stdout:
        if line.startswith("member 1/2  step 1/"):
            run.send_signal(signal.SIGTERM)
            break
    rest, err = run.communicate(timeout=60)
    assert run.returncode == 143, (rest, err)
    assert re.fullmatch(r"stopped   member \d after step \d+; [^\n]+\n", err)
    ends_equal(tmp_path, data, whole, "resumed   member ")


def join():
    """Wait for the thread that writes a state, as the end of a process does."""
    import threading
    for thread in set(threading.enumerate()) - {threading.main_thread()}:
        if "write" in thread.name:
            thread.join()


# ---- damaged files ----

def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path, at=0.6):
    held = bytearray(path.read_bytes())
    held[int(at * len(held))] ^= 16
    path.write_bytes(held)


def pickle_in_place(path):
    """A pickle that would leave a file behind, if anything loaded it."""
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(path.parent.parent.parent / "executed"),)
    torch.save(Code(), path)


@pytest.mark.parametrize("spoil", [truncate, flip, pickle_in_place, lambda p: p.write_bytes(b"")],
                         ids=["truncated", "flipped", "pickle", "empty"])
def test_damaged_state_falls_back_to_the_one_before(spoil, data, whole, tmp_path):
    assert stop_at(tmp_path, data, 4)[0] == 143
    spoil(tmp_path / "run/states/00.safetensors")
    ends_equal(tmp_path, data, whole, "going back to the state before",
               "resumed   member 1 after step 4")
    assert not (tmp_path / "executed").exists()


def test_both_states_damaged(data, whole, tmp_path):
    assert stop_at(tmp_path, data, 4)[0] == 143
    for path in (tmp_path / "run/states").iterdir():
        flip(path)
    ends_equal(tmp_path, data, whole, "going back to the state before")
    assert "resumed" not in log(tmp_path)


@pytest.mark.parametrize("name", ["001.safetensors", "001.logp.safetensors"])
def test_damaged_member_is_trained_again(name, data, whole, tmp_path):
    assert stop_at(tmp_path, data, 13)[0] == 143
    flip(tmp_path / "run/members" / name)
    assert main(tmp_path, data, "--continue_members=true") == (0, "")
    assert "the member is trained again" in log(tmp_path)
    for kind in ("", ".logp"):
        a, b = (checkpoint.read_tensors(folder / f"members/001{kind}.safetensors")[0]
                for folder in (whole, tmp_path / "run"))
        assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_every_flipped_bit_is_found(tmp_path):
    path, source = tmp_path / "file.safetensors", random.Random(1)
    checkpoint.write_tensors(path, {"a": torch.arange(9.0), "b": torch.ones(3, dtype=torch.int8)},
                             {"step": 3})
    sound = path.read_bytes()
    assert checkpoint.read_tensors(path)[1] == {"step": 3}
    for bit in source.sample(range(8 * len(sound)), 400):
        held = bytearray(sound)
        held[bit // 8] ^= 1 << bit % 8
        path.write_bytes(held)
        with contextlib.suppress(UserError):
            tensors, facts = checkpoint.read_tensors(path)
            assert facts == {"step": 3} and set(tensors) == {"a", "b"}      # spaces of JSON
            assert torch.equal(tensors["a"], torch.arange(9.0)) and tensors["b"].sum() == 3


@pytest.mark.parametrize("count", [4, 13])
@pytest.mark.parametrize("change", ["--model_dim=48", "--num_layers=3", "--swiglu=false"])
def test_state_of_another_model(change, count, data, tmp_path):
    """Whether it is met in a state or in a finished member."""
    assert stop_at(tmp_path, data, count)[0] == 143
    code, err = main(tmp_path, data, change, "--allow_changed=true")
    assert code == 2 and re.fullmatch("error: [^\n]*of another model[^\n]*\n", err), err


def test_state_of_another_optimizer(data, tmp_path):
    assert stop_at(tmp_path, data, 4)[0] == 143
    code, err = main(tmp_path, data, "--gate_lr=0.1", "--allow_changed=true")
    assert code == 2 and re.fullmatch("error: [^\n]*of another optimizer[^\n]*\n", err), err


def test_member_scored_on_other_text(data, tmp_path):
    assert stop_at(tmp_path, data, 13)[0] == 143
    code, err = main(tmp_path, data, "--eval_tokens=100", "--allow_changed=true")
    assert code == 2 and re.fullmatch("error: [^\n]*other text[^\n]*\n", err), err


def test_cut_off_metrics(data, whole, tmp_path):
    assert stop_at(tmp_path, data, 12)[0] == 143
    with open(tmp_path / "run/metrics.jsonl", "ab") as file:
        file.write(b'{"chain": 0, "member": 2, "st\xff')
    ends_equal(tmp_path, data, whole)


# ---- the run's identity ----

@pytest.fixture
def finished(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path


def never(*_, **__):
    raise AssertionError("this must not happen")


def test_finished_run_shows_its_table(finished, data, monkeypatch, capsys):
    before = {p: p.read_bytes() for p in (finished / "run").rglob("*") if p.name not in "lock"
              and p.is_file()}
    monkeypatch.setattr(t.Trainer, "train_member", never)
    assert t.main([*SHORT, data, f"--runs_dir={finished}"]) == 0
    out, err = capsys.readouterr()
    assert "this run is finished" in out and re.search("^result  +val loss", out, re.M)
    assert err == "" and before == {p: p.read_bytes() for p in before}


@pytest.fixture
def stopped(data, tmp_path):
    assert stop_at(tmp_path, data, 4)[0] == 143
    return tmp_path


def test_other_settings_are_refused_with_a_list(stopped, data, whole):
    code, err = main(stopped, data, "--embed_lr=0.2", "--seed=3")
    assert code == 2 and re.fullmatch(r"error: [^\n]+\n", err)
    assert "--embed_lr=0.2 (was 0.1)" in err and "--seed=3 (was 1)" in err
    assert "--allow_changed=true" in err
    ends_equal(stopped, data, whole)


def test_other_sources_are_refused_or_noted(stopped, data, whole, monkeypatch):
    path = stopped / "run/run.json"
    facts = json.loads(path.read_text())
    facts["sources"]["data/ngram.py"] = "0" * 64
    path.write_text(json.dumps(facts))
    code, err = main(stopped, data)
    assert code == 2 and re.fullmatch(r"error: [^\n]*data/ngram.py was edited[^\n]*\n", err)
    assert main(stopped, data, "--allow_changed=true") == (0, "")
    assert "changed   data/ngram.py was edited" in log(stopped)
    assert_same(whole, stopped / "run")


def test_other_dataset_is_refused(stopped, data, tmp_path):
    folder = Path(data.partition("=")[2])
    shutil.copytree(folder, tmp_path / "other/small")
    path = tmp_path / "other/small/small_val_000000.bin"
    rewrite(path, tokens=np.frombuffer(path.read_bytes()[1024:], "<u2")[::-1][-1:0:-1].copy(),
            header={2: 399})
    write_meta(path.parent, {})
    code, err = main(stopped, data, f"--dataset={path.parent}")
    assert code == 2 and re.fullmatch(r"error: [^\n]*the dataset's files[^\n]*\n", err), err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": 5}', '{"settings": {}}', "\xff"])
def test_damaged_identity(text, stopped, data):
    (stopped / "run/run.json").write_bytes(text.encode("latin-1"))
    code, err = main(stopped, data)
    assert code == 2 and re.fullmatch(r"error: [^\n]*run\.json[^\n]*--run_id[^\n]*\n", err), err


def test_second_process_is_refused_and_a_stale_lock_taken(stopped, data, whole):
    lock = checkpoint.take_lock(stopped / "run")
    code, err = main(stopped, data)
    assert code == 2 and f"process {os.getpid()} on {socket.gethostname()}" in err
    assert re.fullmatch(r"error: [^\n]*under way[^\n]*--run_id\n", err)
    lock.close()                # as the system does when its holder dies; the file stays
    assert "process" in (stopped / "run/lock").read_text()
    ends_equal(stopped, data, whole)


def test_run_before_there_was_an_identity(stopped, data):
    (stopped / "run/run.json").unlink()
    code, err = main(stopped, data)
    assert code == 2 and re.fullmatch(r"error: [^\n]*want of run\.json[^\n]*\n", err)


# ---- numbers that are not ----

@contextlib.contextmanager
def poisoned(steps, value=float("nan")):
    """Within: the gradient of a matrix has a number that is not, in the given calls."""
    gradients, call = t.Trainer.gradients, [0]

    def patched(self, *arguments):
        sums = gradients(self, *arguments)
        call[0] += 1
        if call[0] in steps:
            self.model.blocks[1].mlp.proj.weight.grad[3, 2] = value
        return sums
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Trainer, "gradients", patched)
        yield


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_gradient_that_is_not_finite_stops(value, data, whole, tmp_path):
    with poisoned([6], value):
        code, err = main(tmp_path, data)
    assert code == 2
    assert re.fullmatch(r"error: member 1, step 6: not finite: blocks\.1\.mlp\.proj\.weight;"
                        r" documents (\d+, )+\d+; lower [^\n]+_lr\n", err), err
    join()
    ends_equal(tmp_path, data, whole, "resumed   member 1 after step 5")


def test_weights_that_are_not_finite_are_never_saved(data, whole, tmp_path):
    """A GPU is not asked in every step: the gradient of step 6, before a reading, gets through."""
    with poisoned([6]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "is_finite", lambda *_: True)
        code, err = main(tmp_path, data)
    assert code == 2
    assert re.fullmatch(r"error: member 1, step 6: weights are not finite; lower [^\n]+_lr\n", err)
    join()
    ends_equal(tmp_path, data, whole, "resumed   member 1 after step 5")


def test_skipped_steps(data, tmp_path):
    with poisoned([3, 6, 12]):
        assert main(tmp_path, data, "--on_nonfinite=skip", "--max_skips=2") == (0, "")
    found = re.findall(r"^warning   member (\d), step (\d+): .*; the step is skipped",
                       log(tmp_path), re.M)
    assert found == [("1", "3"), ("1", "6"), ("2", "3")]
    for path in (tmp_path / "run/members").glob("*"):
        assert all(p.isfinite().all() for p in checkpoint.read_tensors(path)[0].values())


def test_limit_of_skips_holds_over_a_stop(data, tmp_path):
    settings = ("--on_nonfinite=skip", "--max_skips=2")
    with poisoned([2, 3]):
        assert stop_at(tmp_path, data, 4, signal.SIGTERM, *settings)[0] == 143
    with poisoned([2]):
        code, err = main(tmp_path, data, *settings)
    assert code == 2 and "member 1, step 7: not finite" in err


def test_documents_of_a_step(data):
    c = t.make_config(**dict(a[2:].split("=") for a in (*SHORT, data)))
    documents = t.load_dataset(Path(c.dataset), c).train
    rows = t.Rows(documents, c.seq_len, c.batch_rows, 2, 5, 63)
    for step in (0, 3, rows.num_steps - 1):
        inputs, targets = rows.step(step)
        seen = checkpoint.documents_of(rows, step)
        text = np.concatenate([documents[i] for i in seen])
        for row, later in zip(inputs.numpy(), targets.numpy()):
            row = row[later >= 0]
            windows = np.lib.stride_tricks.sliding_window_view(text, min(len(row), 10))
            for a in range(0, len(row) - 10, 10):
                part = row[a:a + 10]
                assert (windows == part).all(axis=1).any() or 63 in part


# ---- a full disk ----

@contextlib.contextmanager
def full_disk(is_full):
    """Within: a file of tensors for which is_full(path) breaks off for want of space."""
    save = checkpoint.save_file

    def patched(tensors, path, metadata):
        if is_full(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path, metadata)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_file", patched)
        yield


def test_disk_too_full_for_states(data, whole, tmp_path):
    with full_disk(lambda path: "states" in path.parts):
        assert main(tmp_path, data) == (0, "")
    assert re.search(r"^warning   state not saved[^\n]*00\.fresh\.safetensors[^\n]*No space left",
                     log(tmp_path), re.M)
    assert_same(whole, tmp_path / "run")


@pytest.mark.parametrize("name", ["002.tmp", "002.logp.tmp"])
def test_disk_too_full_for_a_member(name, data, whole, tmp_path):
    with full_disk(lambda path: path.name == name):
        code, err = main(tmp_path, data)
    assert code == 2
    assert re.fullmatch(rf"error: [^\n]*{name[:-4]}\.safetensors cannot be written[^\n]*\n", err)
    assert checkpoint.read_tensors(tmp_path / "run/members/001.safetensors")
    ends_equal(tmp_path, data, whole, "member 1/2 was done")


def test_files_that_may_not_be_large(data, whole, tmp_path):
    """The system refuses, not a stub: states do not fit below the limit, members do."""
    member = (whole / "members/001.safetensors").stat().st_size
    limit = max(2 * member, (whole / "log.txt").stat().st_size + 50_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        assert main(tmp_path, data, "--average=best")[0] == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "warning   state not saved" in log(tmp_path)
    assert (tmp_path / "run/result.json").exists()


# ---- inputs that are refused ----

@pytest.mark.parametrize("arguments, words", [
    (["--num_layers=1000000000000000"], ["--num_layers=1000000000000000", "1e12"]),
    (["--model_dim=100000000", "--num_heads=1"], ["--model_dim=100000000", "parameters"]),
    (["--num_layers=1000000", "--model_dim=100000"], ["--num_layers=1000000", "parameters"]),
    (["--vocab_size=100000000000"], ["parameters"]),
    (["--mlp_multiple=100000000000"], ["parameters"]),
    (["--num_layers=100000"], ["--num_layers", "10"]),
    (["--num_chains=1000000000"], ["--num_chains"]),
    (["--batch_rows=100000000000"], ["--batch_rows"]),
    (["--seq_len=1000000000"], ["--seq_len"]),
    (["--seed=99999999999"], ["--seed"]),
    (["--seed=" + "9" * 400], ["--seed"]),
    (["--seed=" + "9" * 5000], ["--seed", "whole number"]),
    (["--hang_minutes=1e300"], ["--hang_minutes"]),
    (["--hang_minutes=0"], ["--hang_minutes=0.0", "at least 0.05"]),
    (["--save_minutes=-1"], ["--save_minutes=-1", "at least 0"]),
    (["--save_minutes=nan"], ["--save_minutes=nan", "finite"]),
    (["--log_steps=0"], ["--log_steps=0", "at least 1"]),
    (["--max_skips=-1"], ["--max_skips=-1"]),
    (["--on_nonfinite=ignore"], ["--on_nonfinite=ignore", "stop, skip"]),
    (["--allow_changed=perhaps"], ["--allow_changed=perhaps", "true or false"]),
    (["--train_tokens=0"], ["--train_tokens=0", "at least 1"]),
    (["--train_tokens=1e3"], ["--train_tokens=1e3", "whole number"]),
    (["--batch_rows=0"], ["--batch_rows=0", "at least 1"]),
    (["--eval_tokens=1"], ["--eval_tokens=1", "at least 2"]),
    (["--rope_fraction=2"], ["--rope_fraction=2", "at most 1"]),
    (["--lr_warmup=0.7", "--lr_warmdown=0.7"], ["exceed 1"]),
    (["--run_id=/tmp/elsewhere"], ["path"]),
    (["--run_id=.hidden"], ["--run_id=.hidden"]),
    (["--run_id=a\\b"], ["--run_id=a\\b"]),
    (["--run_id=a\nb"], ["--run_id=a"]),
    (["--dropout=-0.1"], ["--dropout=-0.1"]),
    (["--dropout=1e400"], ["--dropout=inf", "finite"]),
], ids=lambda value: " ".join(value)[:50] if value and value[0].startswith("-") else "")
def test_value_is_refused(arguments, words, tmp_path, capsys):
    line = refused(["--track=cpu", "--preset=toy", "--device=cpu", *arguments], tmp_path, capsys)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("variables, words", [
    ({"RANK": "1"}, ["RANK=1"]),
    ({"RANK": "0"}, ["RANK=0"]),
    ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2"]),
    ({"RANK": "first", "WORLD_SIZE": "2"}, ["RANK=first"]),
    ({"RANK": "0", "WORLD_SIZE": "two"}, ["WORLD_SIZE=two"]),
    ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK=2"]),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, ["RANK=-1"]),
    ({"RANK": "0", "WORLD_SIZE": "0"}, ["WORLD_SIZE=0"]),
    ({"RANK": "0", "WORLD_SIZE": "1.5"}, ["WORLD_SIZE=1.5"]),
    ({"RANK": "0", "WORLD_SIZE": "9" * 30}, ["WORLD_SIZE=9"]),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "3"}, ["LOCAL_RANK=3"]),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": ""}, ["LOCAL_WORLD_SIZE="]),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, ["cannot meet", "MASTER_ADDR"]),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
      "MASTER_PORT": "taken"}, ["cannot meet"]),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
      "MASTER_PORT": "in use"}, ["cannot meet", "EADDRINUSE"]),
], ids=lambda value: " ".join(f"{k}={v[:9]}" for k, v in value.items())
    if isinstance(value, dict) else "")
def test_environment_is_refused(variables, words, data, tmp_path, capfd, monkeypatch):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        for name in (*ENVIRONMENT, "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, text in variables.items():
            monkeypatch.setenv(name, text if text != "in use" else str(busy.getsockname()[1]))
        assert t.main([*SHORT, data, f"--runs_dir={tmp_path}"]) == 2
    err = "\n".join(line for line in capfd.readouterr().err.splitlines()
                    if not line.startswith("["))        # what torch itself says of the port
    assert re.fullmatch("error: [^\n]+", err) and all(word in err for word in words), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["check", "train"])
def test_more_processes_than_rows(command, data, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(t, "start_runtime", lambda c: SimpleNamespace(world=64))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "64")
    line = refused([command, *SHORT, data], tmp_path, capsys)
    assert "--batch_rows=8" in line and "64 process(es)" in line and line.strip().endswith("64")


@pytest.mark.parametrize("place", ["/proc/runs", "/dev/null/runs", "a file"])
def test_runs_folder_that_cannot_be_written(place, data, tmp_path, capsys):
    if place == "a file":
        (tmp_path / "file").touch()
        place = tmp_path / "file"
    assert t.main([*SHORT, data, f"--runs_dir={place}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(f"error: [^\n]*{place}[^\n]*\n", err), err


def test_run_id_too_long_for_a_folder(data, tmp_path, capsys):
    line = refused([*SHORT, data, "--run_id=" + "x" * 300], tmp_path, capsys)
    assert "File name too long" in line


def test_no_memory_for_arrays(data, tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError("Unable to allocate 8 TiB for an array")
    monkeypatch.setattr(t.Rows, "step", full)
    code, err = main(tmp_path, data)
    assert code == 2 and re.fullmatch("error: out of memory; lower [^\n]+\n", err)


def directory(path):
    path.unlink()
    path.mkdir()


def dangling(path):
    path.unlink()
    path.symlink_to("nowhere")


def no_permission(path):
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")


@pytest.mark.parametrize("spoil, words", [
    (directory, ["cannot be read"]),
    (dangling, ["cannot be read"]),
    (no_permission, ["cannot be read"]),
    (lambda path: rewrite(path, {2: 2 ** 31 - 1}), ["2147483647 tokens"]),
    (lambda path: rewrite(path, {2: -2 ** 31}), ["-2147483648 tokens"]),
    (lambda path: rewrite(path, {2: 0}, np.zeros(0, "<u2")), ["0 tokens"]),
    (lambda path: rewrite(path, {2: 1}, np.full(1, 63, "<u2")), ["1 tokens"]),
    (lambda path: rewrite(path, {3: -5}), ["vocabulary of -5"]),
    (lambda path: rewrite(path, {3: 2 ** 31 - 1}), ["vocabulary of 2147483647"]),
    (lambda path: rewrite(path, {4: -1}), ["BOS -1"]),
    (lambda path: rewrite(path, {4: 2 ** 31 - 1}), ["BOS 2147483647"]),
    (lambda path: rewrite(path, {1: -1}), ["version -1"]),
    (lambda path: path.write_bytes(path.read_bytes()[:1000]), ["magic"]),
    (lambda path: path.write_bytes(path.read_bytes()[:1024]), ["tokens"]),
    (lambda path: path.write_bytes(os.urandom(4000)), ["magic"]),
], ids=["directory", "dangling", "unreadable", "huge count", "least count", "no tokens",
        "one token", "negative vocabulary", "huge vocabulary", "negative BOS", "huge BOS",
        "negative version", "half a header", "only a header", "noise"])
def test_spoilt_shard(spoil, words, dataset, capsys):
    path = dataset / "small_val_000000.bin"
    spoil(path)
    line = refused_dataset(dataset, capsys)
    assert path.name in line and all(word in line for word in words), line


def test_shards_that_differ_in_bos(dataset, capsys):
    path = dataset / "small_val_000000.bin"
    tokens = np.frombuffer(path.read_bytes()[1024:], "<u2").copy()
    tokens[tokens == 63] = 62
    rewrite(path, {4: 62}, tokens)
    write_meta(dataset, {})
    assert "BOS 62, and 63" in refused_dataset(dataset, capsys)


@pytest.mark.parametrize("text", [
    "", "[" * 100_000, '"text"', "null", '{"splits": []}', '{"splits": {"val_000000": []}}',
    '{"splits": {"val_000000": {"text_bytes": 1e400}}}', '{"baseline": 5}',
    '{"baseline": {"tuned": 5}}', '{"baseline": {"one_epoch": [5]}}',
    '{"splits": {"val_000000": {"text_bytes": [1]}}}'], ids=lambda text: text[:50])
def test_spoilt_meta(text, dataset, capsys):
    (dataset / "meta.json").write_text(text)
    assert str(dataset / "meta.json") in refused_dataset(dataset, capsys)


def test_meta_that_is_a_folder(dataset, capsys):
    directory(dataset / "meta.json")
    assert str(dataset / "meta.json") in refused_dataset(dataset, capsys)


def test_sha256_of_another_type(dataset, capsys):
    write_meta(dataset, {"splits": {"val_000000": {"sha256": 5}}})
    assert "SHA-256" in refused_dataset(dataset, capsys)


def test_dataset_that_is_a_file(tmp_path, capsys):
    (tmp_path / "small").touch()
    assert "small" in refused_dataset(tmp_path / "small", capsys)


def test_digest_tells_names_shapes_and_types_apart():
    one = {"a": torch.zeros(4)}
    others = [{"b": torch.zeros(4)}, {"a": torch.zeros(2, 2)}, {"a": torch.zeros(4).int()},
              {"a": torch.tensor([0, 0, 0, -0.0])}, {}]
    found = {checkpoint.digest(tensors, "") for tensors in (one, *others)}
    assert len(found) == 6 and checkpoint.digest(one, "x") not in found
    assert hashlib.sha256(b"").hexdigest() in found
