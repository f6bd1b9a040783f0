"""What a run survives: kills, signals, damaged files, a full disk, processes that die or hang.

    python -m pytest tests/test_faults.py

tests/chaos.py kills more, at random.
"""
import contextlib
import errno
import fcntl
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from chaos import RUN, Launch, assert_same, chaos, free_port, worlds
from helpers import SCRIPT, clean_environment, last_of_each, main, make_dataset, read_run

import train_gpt
from train_gpt import TRACKS, Trainer, read_tensors

# two members of 6 steps, each of which is read, so that a state is due
SHORT = [*RUN, "--num_models=2", "--continue_members=false", "--average=probs", "--num_epochs=1",
         "--log_steps=1"]
# 16 steps a member, and nothing that differs with the number of processes but the order of sums:
# an update of about 0 may change its sign with it, and a cautious decay with the sign
SHARED = [*SHORT, "--num_epochs=3", "--dropout=0", "--cautious=false"]
ROUNDING = 1e-4
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(autouse=True)
def interrupts():
    """A shell starts its background jobs, these tests perhaps among them, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return f"--dataset={make_dataset(tmp_path_factory.mktemp('data') / 'small')}"


def finished(runs, *arguments):
    """Folder of a run that nothing befalls, in this process."""
    code, _, err = main(*arguments, f"--runs_dir={runs}")
    assert (code, err) == (0, "")
    return runs / "run"


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    return finished(tmp_path_factory.mktemp("whole"), *SHORT, data)


@pytest.fixture(scope="module")
def shared(data, tmp_path_factory):
    return finished(tmp_path_factory.mktemp("shared"), *SHARED, data)


def short(runs, data, *arguments):
    """(exit code, stderr) of the SHORT run, begun or gone on with, in this process."""
    code, _, err = main(*SHORT, data, f"--runs_dir={runs}", *arguments)
    return code, err


def log(runs):
    """What a run told, without its source and without numbers."""
    text = (runs / "run/log.txt").read_text(encoding="utf-8")
    told = text.rpartition("\n" + "=" * 40 + " end of ")[2].splitlines()
    return "\n".join(line for line in told if not re.match(r"\w+:|RESULT ", line))


def wait_until(condition, *launchers, seconds=60):
    """Until condition() is true, while processes run that make it so."""
    end = time.monotonic() + seconds
    while not condition():
        assert all(launcher.poll() is None for launcher in launchers), "ended too early"
        assert time.monotonic() < end, "took too long"
        time.sleep(0.01)


@contextlib.contextmanager
def at_reading(count, action):
    """Within: `action()` happens before the count-th reading of the loss."""
    left = [count]
    metrics = train_gpt.Log.metrics

    def patched(self, **numbers):
        left[0] -= "step" in numbers
        if left[0] == 0 and "step" in numbers:
            action()
        metrics(self, **numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.Log, "metrics", patched)
        yield


def stop_at(runs, data, count, number=signal.SIGTERM):
    """Run until a signal at the count-th reading; (exit code, stderr)."""
    with at_reading(count, lambda: os.kill(os.getpid(), number)):
        return short(runs, data)


def ends_equal(runs, data, whole, *words):
    """The same command ends the run as if nothing had been; its log then says `words`."""
    assert short(runs, data) == (0, "")
    assert_same(whole, runs / "run")
    assert all(word in log(runs) for word in words), log(runs)[-3000:]
    assert not (runs / "run/state.safetensors").exists() and not list(runs.rglob("*.tmp"))


# ==== Kills =====================================================================================
@pytest.mark.parametrize("processes, kills", [
    (1, 4), pytest.param(1, 40, marks=pytest.mark.slow),
    pytest.param(2, 20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_random_ends_as_one_that_is_not(processes, kills, tmp_path):
    chaos(tmp_path, kills, processes, seed=11)


@pytest.mark.slow
@pytest.mark.parametrize("track", TRACKS)
def test_four_processes_train_the_members_of_one(track, tmp_path):
    worlds(tmp_path, track, 4)


# ==== Launchers =================================================================================
def descendants(pid):
    """Process ids of the children of `pid`, and theirs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if path.read_text().rpartition(")")[2].split()[1] == str(pid):
                found += [int(path.parent.name), *descendants(int(path.parent.name))]
    return found


def workers(launcher):
    """{rank: process id} of what a torchrun has started."""
    found = {}
    for pid in descendants(launcher.pid):
        with contextlib.suppress(OSError):
            rank = re.search(rb"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
            if rank:
                found[int(rank[1])] = pid
    return found


def kill_all(launcher):
    """SIGKILL for a torchrun and its workers, which have sessions of their own."""
    for pid in [launcher.pid, *descendants(launcher.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    launcher.wait()


@contextlib.contextmanager
def torchrun(console, *arguments):
    """A torchrun under way, whose processes write to the file `console`; killed at the end."""
    environment = clean_environment(TORCH_ELASTIC_SHUTDOWN_TIMEOUT="20")
    with open(console, "a", encoding="utf-8") as file:
        launcher = subprocess.Popen([*TORCHRUN, *last_of_each(arguments)], env=environment,
                                    stdout=file, stderr=file)
    try:
        yield launcher
    finally:
        kill_all(launcher)


def is_free(folder):
    """Whether no process holds the lock of a run any more."""
    with open(folder / "lock", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_one_process_ends_what_two_began(data, shared, tmp_path):
    """Two processes of torchrun share each step; all are killed, and one goes on."""
    with torchrun(tmp_path / "console", "--standalone", "--nproc_per_node=2", SCRIPT, *SHARED,
                  data, f"--runs_dir={tmp_path}") as launcher:
        wait_until((tmp_path / "run/state.safetensors").exists, launcher)
        kill_all(launcher)
    assert not (tmp_path / "run/result.json").exists()
    wait_until(lambda: is_free(tmp_path / "run"))
    assert read_tensors(tmp_path / "run/state.safetensors")[1]["world_size"] == 2
    assert finished(tmp_path, *SHARED, data)
    assert "resumed   member " in log(tmp_path)
    assert_same(shared, tmp_path / "run", ROUNDING)


@pytest.mark.parametrize("number", [
    signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_torchrun_restarts_when_a_process_dies_or_hangs(number, data, shared, tmp_path):
    console = tmp_path / "console"
    with torchrun(console, "--standalone", "--nproc_per_node=2", "--max-restarts=1", SCRIPT,
                  *SHARED, data, f"--runs_dir={tmp_path}", "--hang_minutes=0.1") as launcher:
        wait_until((tmp_path / "run/state.safetensors").exists, launcher)
        os.kill(workers(launcher)[1], number)
        assert launcher.wait(timeout=120) == 0, console.read_text(encoding="utf-8")[-4000:]
    said = console.read_text(encoding="utf-8")
    assert re.search(r"^error: rank 0 lost another process .*start the same command again", said,
                     re.M), said[-4000:]
    assert "resumed   member " in log(tmp_path)
    assert_same(shared, tmp_path / "run", ROUNDING)


@pytest.fixture(scope="module")
def two_ranks(data, tmp_path_factory):
    """The SHARED run on two processes, that nothing befell."""
    runs = tmp_path_factory.mktemp("two")
    Launch([*SHARED, data, f"--runs_dir={runs}"], 2, runs / "console").succeed()
    return runs / "run"


@contextlib.contextmanager
def two_nodes(folder, port, *arguments):
    """Two torchrun under way, as of two machines that share the folder of the runs."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(torchrun(
            folder / f"console{rank}", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}",
            "--master_addr=127.0.0.1", f"--master_port={port}", SCRIPT, *arguments,
            f"--runs_dir={folder}")) for rank in (0, 1)]


def test_two_nodes_that_are_stopped_end_as_two_processes_that_are_not(
        data, shared, two_ranks, tmp_path):
    port = free_port()
    with two_nodes(tmp_path, port, *SHARED, data) as nodes:
        wait_until((tmp_path / "run/state.safetensors").exists, *nodes)
        for node in nodes:
            node.send_signal(signal.SIGTERM)
        for node in nodes:
            assert node.wait(timeout=60) != 0
    assert not (tmp_path / "run/result.json").exists()
    assert re.search(r"^stopped   member \d after step \d+; the same command goes on",
                     (tmp_path / "console0").read_text(encoding="utf-8"), re.M)
    with two_nodes(tmp_path, port, *SHARED, data) as nodes:
        codes = [node.wait(timeout=120) for node in nodes]
    assert codes == [0, 0], (tmp_path / "console0").read_text(encoding="utf-8")[-4000:]
    assert "resumed   member " in log(tmp_path)
    assert_same(two_ranks, tmp_path / "run")
    assert_same(shared, tmp_path / "run", ROUNDING)


@pytest.mark.parametrize("ranks", ["01", "1"])
def test_two_processes_are_stopped_by_a_signal_and_go_on(ranks, data, tmp_path):
    """To both or to one. With dropout, whose random generators differ between processes."""
    def be_told():
        if os.environ["RANK"] in ranks:
            os.kill(os.getpid(), signal.SIGTERM)

    for name in ("whole", "stopped"):
        arguments = [*SHORT, data, f"--runs_dir={tmp_path / name}"]
        if name == "stopped":
            with at_reading(9, be_told):
                codes = Launch(arguments, 2, tmp_path / "console").wait()
        Launch(arguments, 2, tmp_path / "console").succeed()
    assert "resumed   member 2 after step 3" in log(tmp_path / "stopped")
    assert_same(tmp_path / "whole/run", tmp_path / "stopped/run")
    assert codes == [143, 143]


def test_a_refusal_of_the_first_process_ends_the_others(data, whole, tmp_path):
    launch = Launch([*SHORT, data, f"--runs_dir={whole.parent}", "--seed=5"], 2,
                    tmp_path / "console")
    codes = launch.wait(30)
    launch.send(signal.SIGKILL)
    assert codes == [2, 2]
    said = (tmp_path / "console").read_text(encoding="utf-8")
    assert re.fullmatch("error: [^\n]*seed=5 .was 1[^\n]*\n", said), said


# ==== Signals ===================================================================================
@pytest.mark.parametrize("number, code, count, member, step", [
    (signal.SIGTERM, 143, 2, 1, 2), (signal.SIGINT, 130, 9, 2, 3), (signal.SIGTERM, 143, 6, 1, 6)])
def test_a_signal_stops_after_the_step_and_its_state(number, code, count, member, step, data, whole,
                                                     tmp_path):
    """Also after a member's last step, when its scores are still to be made."""
    got, err = stop_at(tmp_path, data, count, number)
    assert got == code
    assert re.fullmatch(rf"stopped   member {member} after step {step}; [^\n]*--run_id=run\n", err)
    ends_equal(tmp_path, data, whole, f"resumed   member {member} after step {step}")


@contextlib.contextmanager
def at_step(count, action):
    """Within: `action()` happens in the count-th step, before anything is updated."""
    left = [count]
    gradients = Trainer.gradients

    def patched(trainer, *arguments):
        left[0] -= 1
        if left[0] == 0:
            action()
        return gradients(trainer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "gradients", patched)
        yield


@pytest.mark.parametrize("minutes", ["0", "0.00001"])
@pytest.mark.parametrize("log_steps, step", [(4, 4), (1000000, 6)])
def test_a_stop_waits_for_the_next_reading(log_steps, step, minutes, data, tmp_path):
    """The last one is the end of an epoch; with no state before it, or with one. Each reading is
    of all steps since the one before, as without a stop."""
    rarely = [f"--log_steps={log_steps}", f"--save_minutes={minutes}"]
    assert short(tmp_path / "whole", data, *rarely) == (0, "")
    with at_step(9, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        code, err = short(tmp_path / "stopped", data, *rarely)
    assert code == 143 and err.startswith(f"stopped   member 2 after step {step}; ")
    assert short(tmp_path / "stopped", data, *rarely) == (0, "")
    assert f"resumed   member 2 after step {step}" in log(tmp_path / "stopped")
    assert_same(tmp_path / "whole/run", tmp_path / "stopped/run")


@pytest.mark.parametrize("log_steps, minutes, step", [
    (2, "0.00001", 4), (3, "0.00001", 3), (1000000, "0.00001", None), (2, "1000", None)])
def test_states_are_saved_at_the_readings_at_which_they_are_due(log_steps, minutes, step, data,
                                                                tmp_path):
    class PowerCut(BaseException):
        pass

    def cut_power():
        raise PowerCut

    with at_step(5, cut_power), pytest.raises(PowerCut):
        short(tmp_path, data, f"--log_steps={log_steps}", f"--save_minutes={minutes}")
    state = tmp_path / "run/state.safetensors"
    assert state.exists() == (step is not None)
    assert step is None or read_tensors(state)[1]["step"] == step


def test_an_interrupt_that_comes_twice_is_one(data, whole, tmp_path):
    """As from the terminal and from torchrun, which passes on its own; the first one counts."""
    with at_reading(5, lambda: [signal.raise_signal(n) for n in (signal.SIGINT, signal.SIGTERM)]):
        code, err = short(tmp_path, data)
    assert code == 130 and re.fullmatch("stopped   member 1 after step 5; [^\n]+\n", err)
    ends_equal(tmp_path, data, whole, "resumed   member 1 after step 5")


def test_a_signal_while_a_state_is_written(data, whole, tmp_path, monkeypatch):
    """It is written to its end, and so is that after the next step."""
    save_file = train_gpt.save_file
    saved = []

    def slow(tensors, path, metadata):
        saved.append(path.name)
        if len(saved) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "save_file", slow)
        assert short(tmp_path, data)[0] == 143
    assert saved == 4 * ["state.tmp"]
    assert read_tensors(tmp_path / "run/state.safetensors")[1]["step"] == 4
    ends_equal(tmp_path, data, whole, "resumed   member 1 after step 4")


def test_a_signal_to_the_real_script(data, whole, tmp_path):
    """From a shell: SIGTERM as the first member trains; exit code, one line, and it goes on."""
    process = subprocess.Popen(
        last_of_each([sys.executable, "-u", SCRIPT, *SHORT, data, f"--runs_dir={tmp_path}"]),
        env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("member 1/2  step 1/"):
            process.send_signal(signal.SIGTERM)
            break
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 143, (rest, err)
    assert re.fullmatch(r"stopped   member \d after step \d+; [^\n]+\n", err)
    ends_equal(tmp_path, data, whole, "resumed   member ")


# ==== Damaged files =============================================================================
def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def refused_until_deleted(runs, data, path, spoil):
    """A damaged file is one line that says so, as often as one tries; then it is deleted."""
    if spoil is not remove:
        spoil(path)
        held = path.read_bytes()
        for _ in range(2):
            code, err = short(runs, data)
            assert code == 2 and err.count("\n") == 1, err
            assert re.fullmatch(f"error: {os.path.relpath(path)}: damaged .*; delete it, and the"
                                " run trains again what it held", err.strip()), err
            assert path.read_bytes() == held
    path.unlink()


@pytest.mark.parametrize("spoil, count, member", [(cut, 3, 1), (cut, 9, 2), (empty, 9, 2),
                                                  (remove, 9, 2)])
def test_the_member_of_a_damaged_state_is_trained_again_when_that_is_deleted(
        spoil, count, member, data, whole, tmp_path):
    assert stop_at(tmp_path, data, count)[0] == 143
    refused_until_deleted(tmp_path, data, tmp_path / "run/state.safetensors", spoil)
    ends_equal(tmp_path, data, whole)
    assert "resumed" not in log(tmp_path)
    assert ("member 1/2 was done" in log(tmp_path)) == (member == 2)


@pytest.mark.parametrize("spoil, name", [
    (cut, "001.safetensors"), (cut, "001.logp.safetensors"), (empty, "001.logp.safetensors"),
    (remove, "001.safetensors"), (remove, "001.logp.safetensors")])
def test_a_damaged_member_is_trained_again_when_it_is_deleted(spoil, name, data, whole, tmp_path):
    """And the state of the next one is still good."""
    assert stop_at(tmp_path, data, 9)[0] == 143
    refused_until_deleted(tmp_path, data, tmp_path / "run/members" / name, spoil)
    ends_equal(tmp_path, data, whole, "resumed   member 2 after step 3")
    assert "was done" not in log(tmp_path)


# ==== What has changed ==========================================================================
def test_changes_in_the_middle_of_a_run_are_in_its_result(data, whole, tmp_path):
    """When, and from what to what; later launches keep them."""
    assert stop_at(tmp_path, data, 9)[0] == 143
    code, err = short(tmp_path, data, "--embed_lr=0.2")
    assert code == 2 and "embed_lr=0.2 (was 0.1)" in err
    with at_reading(2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert short(tmp_path, data, "--embed_lr=0.2", "--allow_changed=true")[0] == 143
    change = "embed_lr=0.2 (was 0.1), with 1 member(s) done"
    held = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))
    assert (held["changes"], held["embed_lr"]) == ([change], "0.2")
    more = ["--embed_lr=0.2", "--head_lr=0.5", "--allow_changed=true"]
    assert short(tmp_path, data, *more)[0] == 0
    result = read_run(tmp_path / "run").result
    assert result["changes"] == [change, "head_lr=0.5 (was 0.003), with 1 member(s) done"]
    assert read_run(whole).result["changes"] == [] and "format" not in result
    assert "changed   embed_lr=0.2 (was 0.1)\n" in (tmp_path / "run/log.txt").read_text(
        encoding="utf-8")


@pytest.mark.parametrize("change, count", [
    ("--model_dim=48", 3), ("--num_layers=3", 9)])
def test_files_that_do_not_fit_the_settings_are_refused(change, count, data, tmp_path):
    """To who insists: a state or a member of another model."""
    assert stop_at(tmp_path, data, count)[0] == 143
    code, err = short(tmp_path, data, change, "--allow_changed=true")
    assert code == 2 and re.fullmatch("error: [^\n]*choose another --run_id\n", err), err


# ==== Numbers that are not finite ===============================================================
def test_weights_that_are_not_finite_are_never_saved(data, whole, tmp_path, monkeypatch):
    """Gradients are not looked at in every step: those of step 4 get into the weights."""
    gradients = Trainer.gradients
    calls = []

    def poisoned(trainer, *arguments):
        sums = gradients(trainer, *arguments)
        calls.append(sums)
        if len(calls) == 4:
            trainer.model.blocks[1].mlp.proj.weight.grad[3, 2] = float("nan")
        return sums

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "gradients", poisoned)
        code, err = short(tmp_path, data)
    assert code == 2
    assert re.fullmatch(r"error: member 1, step 4: [^\n]*not finite; lower [^\n]+_lr\n", err), err
    ends_equal(tmp_path, data, whole, "resumed   member 1 after step 3")


# ==== Disk and memory ===========================================================================
@contextlib.contextmanager
def full_disk(name):
    """Within: the writing of files of this name breaks off for want of space."""
    write_whole = train_gpt.write_whole

    def no_space(beside):
        beside.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def patched(path, write):
        write_whole(path, no_space if path.name == name else write)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "write_whole", patched)
        yield


def test_a_disk_too_full_for_states_does_not_stop_a_run(data, whole, tmp_path):
    with full_disk("state.safetensors"):
        assert short(tmp_path, data) == (0, "")
    assert re.search(r"^warning   state not saved[^\n]*state\.safetensors[^\n]*No space left",
                     log(tmp_path), re.M)
    assert_same(whole, tmp_path / "run")


@pytest.mark.parametrize("name", ["002.safetensors", "002.logp.safetensors", "result.json"])
def test_a_disk_too_full_for_a_result_stops_a_run_that_then_goes_on(name, data, whole, tmp_path):
    with full_disk(name):
        code, err = short(tmp_path, data)
    assert code == 2
    assert re.fullmatch(r"error: [^\n]*No space left[^\n]*\n", err) and "Traceback" not in err
    assert not list(tmp_path.rglob("*.tmp"))
    ends_equal(tmp_path, data, whole, "member 1/2 was done")


def test_files_that_may_not_be_large(data, whole, tmp_path):
    """The system refuses, not a stub: states do not fit below the limit, all else does."""
    limit = 20_000 + max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        assert short(tmp_path, data) == (0, "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "warning   state not saved" in log(tmp_path)
    assert_same(whole, tmp_path / "run")


@pytest.mark.parametrize("place", ["/proc/runs", "/dev/null/runs", "a file"])
def test_a_folder_of_runs_that_cannot_be_written(place, data, tmp_path):
    if place == "a file":
        place = tmp_path / "file"
        place.touch()
    code, out, err = main(*SHORT, data, f"--runs_dir={place}")
    assert code == 2 and out == "" and re.fullmatch(f"error: [^\n]*{place}[^\n]*\n", err), err


def test_a_name_too_long_for_a_folder(data, tmp_path):
    code, err = short(tmp_path, data, "--run_id=" + "x" * 300)
    assert code == 2 and re.fullmatch("error: [^\n]*File name too long[^\n]*\n", err), err
    assert not list(tmp_path.iterdir())


def no_array(*_):
    raise MemoryError("Unable to allocate 8 TiB for an array")


def no_gpu_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def no_tensor(*_):
    torch.empty(2 ** 55, dtype=torch.uint8)


@pytest.mark.parametrize("fail, where, name", [
    (no_array, train_gpt.Rows, "step"), (no_gpu_memory, train_gpt.GPT, "forward"),
    (no_tensor, train_gpt.GPT, "forward")])
def test_out_of_memory_names_the_remedy(fail, where, name, data, tmp_path, monkeypatch):
    monkeypatch.setattr(where, name, fail)
    code, err = short(tmp_path, data)
    assert code == 2
    assert re.fullmatch("error: out of memory; lower --device_batch_size, then --loss_chunk,"
                        " [^\n]*\n", err), err


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("a bug"), IndexError("a bug"),
                                   RuntimeError("Connection reset by peer")])
def test_other_errors_keep_their_traceback(error, data, tmp_path, monkeypatch):
    """What may be a process that is lost, is none where there is one process."""
    def bug(*_):
        raise error

    monkeypatch.setattr(train_gpt.GPT, "forward", bug)
    with pytest.raises(type(error), match=error.args[0]):
        short(tmp_path, data)
