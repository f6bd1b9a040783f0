"""Processes, device, compiler and attention of train_gpt.py, its collectives, and `check`.

    python -m pytest tests/test_runtime.py
"""
import json
import re
import socket

import pytest
import torch
import torch.distributed as dist

import train_gpt
from helpers import (CPU, LAUNCHER, ROOT, TOY, clean_environment, have_gpus, main, needs_compiler,
                     python, torchrun)
from train_gpt import (Runtime, choose_attention, launcher_ranks, make_config,
                       plan_launch, start_runtime, why_no_compile)

TOY_RUN = ["--track=cpu", *TOY]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """Tests say themselves what a launcher has set; threads are as they were afterwards."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def environment(monkeypatch):
    """environment(RANK="0", ...) sets what a launcher would."""
    def set_all(**variables):
        for name, text in variables.items():
            monkeypatch.setenv(name, text)
    return set_all


# ==== What a launcher says ======================================================================
@pytest.mark.parametrize("variables, ranks", [
    ({}, [0, 0, 1, 1]),
    ({"RANK": "0"}, [0, 0, 1, 1]),
    ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, [5, 1, 8, 4])])
def test_ranks_of_a_launcher(variables, ranks, environment):
    environment(**variables)
    assert launcher_ranks() == ranks


@pytest.mark.parametrize("variables", [
    {"RANK": "1"}, {"RANK": "first", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "two"},
    {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1", "WORLD_SIZE": "2"},
    {"RANK": "0", "WORLD_SIZE": "0"}, {"RANK": "0", "WORLD_SIZE": "1.5"}, {"WORLD_SIZE": ""},
    {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "²"},
    {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": ""}], ids=str)
def test_ranks_that_no_launcher_sets(variables, environment, tmp_path):
    """This process says so itself, whatever its rank: there may be no other one."""
    environment(**variables)
    for command in ("train", "check"):
        code, out, err = main(command, *TOY_RUN, f"--runs_dir={tmp_path / 'runs'}")
        assert (code, err.count("\n")) == (2, 1)
        assert "RANK" in err and "torchrun" in err
        assert all(text in err for text in variables.values())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device, gpus, world_size, plan", [
    ("auto", 0, None, (1, "cpu")), ("auto", 1, None, (1, "mini")),
    ("auto", 2, None, (2, "limited")), ("auto", 3, None, (2, "limited")),
    ("auto", 7, None, (4, "limited")), ("auto", 8, None, (8, "limited")),
    ("cuda", 8, None, (8, "limited")), ("cuda", 1, None, (1, "mini")),
    ("cuda", 0, None, (1, "cpu")), ("cpu", 8, None, (1, "cpu")), ("mps", 0, None, (1, "cpu")),
    ("auto", 8, "1", (1, "mini")), ("auto", 8, "3", (3, "limited")),
    ("auto", 1, "16", (16, "limited")), ("cpu", 8, "4", (4, "cpu")), ("auto", 0, "2", (2, "cpu"))])
def test_plan_of_a_launch(device, gpus, world_size, plan, monkeypatch, environment):
    """`check`: the largest power of two of the GPUs, which divides every batch; a launcher decides.

    Without one a process that trains is alone: its track is one for one GPU.
    """
    have_gpus(monkeypatch, gpus)
    if world_size:
        environment(WORLD_SIZE=world_size)
    assert plan_launch(device, "check") == plan
    alone = (1, "cpu" if plan[1] == "cpu" else "mini")
    assert plan_launch(device) == (plan if world_size else alone)


@pytest.mark.parametrize("memory, track", [(24e9, "mini"), (40e9, "mini"), (80e9, "limited")])
def test_track_is_chosen_by_the_memory_of_gpus(memory, track, monkeypatch):
    have_gpus(monkeypatch, 2, memory)
    assert plan_launch("auto", "check") == (2, track)


# ==== Start =====================================================================================
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_runtime_of_one_process(dtype):
    runtime = start_runtime(make_config("cpu", device="cpu", dtype=dtype, compile=False))
    assert (runtime.rank, runtime.world_size, runtime.is_main) == (0, 1, True)
    assert runtime.device == CPU
    assert runtime.dtype == getattr(torch, dtype)
    assert (runtime.attention, runtime.compile, runtime.notes) == ("sdpa", False, [])
    assert not dist.is_initialized()


@pytest.mark.parametrize("amx, avx512, dtype", [
    (False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)])
def test_bf16_where_the_cpu_has_it(amx, avx512, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert start_runtime(make_config("cpu", device="cpu", dtype="auto")).dtype == dtype


def test_the_first_device_there_is(monkeypatch):
    have_gpus(monkeypatch, 0)
    config = make_config("cpu", device="auto", compile=False)
    for has_mps, kind in ((False, "cpu"), (True, "mps")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
        assert start_runtime(config).device.type == kind


@pytest.mark.parametrize("gpus, processes", [(0, 1), (1, 2)])
def test_gpus_that_are_not_there(gpus, processes, monkeypatch, environment, tmp_path):
    have_gpus(monkeypatch, gpus)
    if processes > 1:
        environment(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    code, out, err = main("--track=cpu", "--preset=toy", "--device=cuda",
                          f"--runs_dir={tmp_path / 'runs'}")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {gpus} GPU(s) for {processes} process(es); ")
    assert "--device=cpu" in err and "--nproc_per_node" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("port, words", [
    (None, ["MASTER_ADDR"]), ("taken", ["invalid literal"]), ("in use", ["in use"])])
def test_processes_that_cannot_meet(port, words, environment, tmp_path):
    environment(RANK="0", WORLD_SIZE="2")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        if port:
            number = str(busy.getsockname()[1])
            environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=number if port == "in use" else port)
        code, out, err = main(*TOY_RUN, f"--runs_dir={tmp_path / 'runs'}")
    assert (code, out) == (2, "")
    assert re.fullmatch("error: processes cannot meet: [^\n]+\n", err), err
    assert all(word in err for word in words), err
    assert not dist.is_initialized()
    assert not list(tmp_path.iterdir())


# ==== What compiling needs ======================================================================
NO_COMPILER = {
    "a compiler that is not there": dict(CXX="icpx"),
    "two words": dict(CXX="ccache g++"),
    "another one only": dict(PATH="clang++"),
    "one that fails": dict(PATH="g++"),
}


@pytest.mark.parametrize("name", NO_COMPILER)
def test_without_a_compiler_a_run_is_eager_and_says_so(name, tmp_path):
    """Whatever is wrong with the compiler that torch takes, it is a line, and no traceback."""
    variables = dict(NO_COMPILER[name])
    if "PATH" in variables:             # a folder with that program alone, which fails
        program = tmp_path / variables["PATH"]
        program.write_text("#!/bin/sh\necho its licence has run out >&2\nexit 1\n")
        program.chmod(0o755)
        variables["PATH"] = str(tmp_path)
    variables["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "cache")
    code = ("from train_gpt import make_config, start_runtime;"
            "runtime = start_runtime(make_config('cpu', device='cpu', compile=True));"
            "print(runtime.compile, runtime.compiled(sorted) is sorted); print(*runtime.notes)")
    done = python("-c", code, env=clean_environment(**variables), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    said, note = done.stdout.splitlines()
    assert said == "False True"
    assert note.startswith("compile   off (needs g++ and python3-dev): ")
    assert "Traceback" not in done.stderr


def test_a_compiler_is_not_asked_when_nobody_wants_it(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    runtime = start_runtime(make_config("cpu", device="cpu", compile=False))
    assert (runtime.compile, runtime.notes) == (False, [])


@needs_compiler
def test_what_can_compile():
    assert why_no_compile(CPU) == ""


def test_what_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: ("compiled", function))
    for compile, wanted in ((True, True), (True, False), (False, True)):
        found = Runtime(compile=compile).compiled(sorted, wanted)
        assert found == (("compiled", sorted) if compile and wanted else sorted)


# ==== Attention =================================================================================
def test_flash_attention_that_works(monkeypatch):
    """It is tried as it will be called: causal, with a window, in the run's dtype."""
    calls = []

    def works(q, k, v, causal, window_size):
        calls.append((q.dtype, q.device, causal, window_size))
        return torch.zeros_like(q)

    monkeypatch.setattr(train_gpt, "flash_attn_func", works)
    for compile in (True, False):
        runtime = Runtime(dtype=torch.bfloat16, compile=compile)
        choose_attention(runtime, compile)
        assert (runtime.attention, runtime.notes) == ("fa3", [])
    assert calls == 2 * [(torch.bfloat16, CPU, True, (63, 0))]


@pytest.mark.parametrize("compile, compile_model, attention", [
    (True, True, "flex"), (True, False, "sdpa"), (False, True, "sdpa")])
@pytest.mark.parametrize("error", [RuntimeError, OSError, TypeError, None], ids=str)
def test_flash_attention_that_fails(error, compile, compile_model, attention, monkeypatch):
    """Flex attention without a compiler would hold all scores: PyTorch's own kernels then."""
    def fails(*_, **__):
        raise error("no kernel image is available")

    monkeypatch.setattr(train_gpt, "flash_attn_func", fails if error else None)
    monkeypatch.setattr(train_gpt, "no_flash", "ModuleNotFoundError", raising=False)
    runtime = Runtime(compile=compile)
    choose_attention(runtime, compile_model)
    assert runtime.attention == attention
    note, = runtime.notes
    assert note.startswith(f"attention {attention}: ")
    assert (error.__name__ if error else "ModuleNotFoundError") in note


# ==== Collectives ===============================================================================
def test_collectives_of_one_process():
    runtime, x = Runtime(), torch.arange(6.0).view(2, 3)
    assert runtime.all_reduce(x) is x
    runtime.reduce(x, 0)
    runtime.broadcast(x, 0)
    assert torch.equal(runtime.all_gather(x), torch.arange(6.0).view(2, 3))
    runtime.synchronize()


COLLECTIVES = """
import json, os, sys
sys.path.insert(0, {root!r})
import torch
from train_gpt import launcher_ranks, make_config, start_runtime

runtime = start_runtime(make_config("cpu", device="cpu", dtype="float32", compile=False))
mine = torch.tensor([[1.0, 10.0]]) * (1 + runtime.rank)     # [1, 10] and [2, 20]
said = dict(rank=runtime.rank, world_size=runtime.world_size, is_main=runtime.is_main,
            ranks=launcher_ranks())
summed = mine.clone()
said["all_reduce"] = runtime.all_reduce(summed).tolist()
said["in place"] = summed.tolist()
for owner in (0, 1):
    x = mine.clone()
    runtime.reduce(x, owner)
    said[f"reduce {{owner}}"] = x.tolist()
    x = mine.clone()
    runtime.broadcast(x, owner)
    said[f"broadcast {{owner}}"] = x.tolist()
said["all_gather"] = runtime.all_gather(mine).tolist()
rows = torch.arange(8).view(2, 4)[:, 1:3] + 100 * runtime.rank      # not contiguous
said["rows"] = runtime.all_gather(rows).tolist()
said["kept"] = mine.tolist()
with open(f"{{sys.argv[1]}}/{{runtime.rank}}.json", "w") as file:
    json.dump(said, file)
torch.distributed.destroy_process_group()
os._exit(0)     # at Python's own end gloo's threads may abort
"""


def test_collectives_of_two_processes(tmp_path):
    script = tmp_path / "collectives.py"
    script.write_text(COLLECTIVES.format(root=str(ROOT)), encoding="utf-8")
    done = torchrun(2, script, tmp_path)
    assert done.returncode == 0, done.stderr
    both = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for rank, said in enumerate(both):
        own = [[1.0 + rank, 10.0 + 10 * rank]]
        assert said["ranks"] == [rank, rank, 2, 2]
        assert (said["rank"], said["world_size"], said["is_main"]) == (rank, 2, rank == 0)
        assert said["all_reduce"] == said["in place"] == [[3, 30]]
        assert both[rank][f"reduce {rank}"] == [[3, 30]]        # on its owner
        assert said["broadcast 0"] == [[1, 10]]
        assert said["broadcast 1"] == [[2, 20]]
        assert said["all_gather"] == [[1, 10], [2, 20]]
        assert said["rows"] == [[1, 2], [5, 6], [101, 102], [105, 106]]
        assert said["kept"] == own


# ==== check =====================================================================================
@pytest.mark.parametrize("arguments, gpus, track, processes", [
    ([], 0, "cpu", 1), ([], 1, "mini", 1), ([], 3, "limited", 2), ([], 8, "limited", 8),
    (["--device=cpu"], 8, "cpu", 1), (["--track=tiny"], 4, "tiny", 4),
    (["--track=unlimited"], 0, "unlimited", 1)])
def test_check_says_what_would_run_and_trains_nothing(arguments, gpus, track, processes,
                                                      tmp_path, monkeypatch):
    """run.sh reads the first line."""
    def never(*_):
        raise AssertionError("trained")

    have_gpus(monkeypatch, gpus)
    monkeypatch.setattr(train_gpt, "run", never)
    code, out, err = main("check", "--preset=toy", "--batch_rows=64",
                          f"--runs_dir={tmp_path / 'runs'}", *arguments)
    assert (code, err) == (0, "")
    assert out.startswith(f"track {track}, processes {processes}\n")
    assert out.endswith("\nsettings and data are sound\n")
    assert not list(tmp_path.iterdir())


def test_check_says_the_track_before_it_misses_data(tmp_path):
    """So that run.sh knows how much to fetch."""
    code, out, err = main("check", *TOY_RUN, f"--dataset={tmp_path / 'fineweb'}")
    assert (code, out) == (2, "track cpu, processes 1\n")
    assert re.fullmatch(r"error: [^\n]*fineweb[^\n]*python data/fineweb\.py\n", err)
