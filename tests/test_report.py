"""What a run says: data efficiency, the table and its numbers, peaks of devices, log, plan.

    python -m pytest tests/test_report.py
"""
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt
from helpers import BOS, SCRIPT, make_dataset, random_trainer, small_config
from train_gpt import (
    TRACKS, Log, Member, announce, as_text, collect_state, data_efficiency, equivalent_tokens,
    hardware_name, load_dataset, member_facts, minutes, num_parameters, peak_flops,
    percent, restore_state, result_lines, summarize)

# ==== Data efficiency ===========================================================================
PUBLIC = [[2e8, 3.703], [4e8, 3.370], [6e8, 3.200], [8e8, 3.123], [1e9, 3.046], [2e9, 2.892]]


@pytest.mark.parametrize("loss, multiple", [
    (3.307, 4.74), (3.295, 4.88), (3.195, 6.13), (3.183, 6.44), (3.139, 7.58), (2.987, 13.83),
    (3.370, 4.0), (3.703, 2.0), (2.892, 20.0)])
def test_data_efficiency_of_the_public_results(loss, multiple):
    assert data_efficiency(loss, {"one_epoch": PUBLIC}, 1e8) == {
        "one_epoch": multiple, "tuned": "n/a", "single": "n/a", "curve": {"one_epoch": PUBLIC}}


def test_equivalent_tokens_by_hand():
    tokens, sign = equivalent_tokens(3.307, PUBLIC)
    assert tokens == pytest.approx(4e8 + 2e8 * 0.063 / 0.170) and sign == ""
    assert equivalent_tokens(3.370, PUBLIC) == (4e8, "")
    assert equivalent_tokens(3.5, [[1e6, 4.0], [3e6, 3.0]]) == (2e6, "")


def test_points_of_a_curve_have_no_order_and_those_that_do_not_help_are_left_out():
    shuffled = [PUBLIC[i] for i in (3, 0, 5, 1, 4, 2)]
    useless = [[5e8, 3.5], [9e8, 3.123]]
    for loss in (3.4, 3.25, 3.1, 3.0):
        assert equivalent_tokens(loss, shuffled + useless) == equivalent_tokens(loss, PUBLIC)


def test_beyond_the_curve_nothing_is_extrapolated():
    assert equivalent_tokens(2.0, PUBLIC) == (2e9, ">")
    assert equivalent_tokens(9.0, PUBLIC) == (2e8, "<")
    baseline = {"one_epoch": PUBLIC, "tuned": [[1e8, 3.3], [2e8, 3.0]]}
    for loss, multiples in {2.8: ("> 20.0", "> 2.0"), 3.75: ("< 2.0", "< 1.0"),
                            2.95: (16.23, "> 2.0")}.items():
        result = data_efficiency(loss, baseline, 1e8)
        assert (result["one_epoch"], result["tuned"]) == multiples
    assert data_efficiency(3.15, baseline, 1e8)["tuned"] == 1.5


@pytest.mark.parametrize("baseline", [None, {}, {"one_epoch": []}])
def test_without_a_baseline_there_is_no_data_efficiency(baseline):
    assert data_efficiency(3.0, baseline, 1e8) == {
        "one_epoch": "n/a", "tuned": "n/a", "single": "n/a", "curve": baseline}


# ==== The result ================================================================================
CURVE = [{"n": 1, "val_loss": 3.25, "holdout_loss": 3.5, "val_loss_learned": 3.125,
          "holdout_loss_learned": 3.0},
         {"n": 2, "val_loss": 3.0, "holdout_loss": 3.375, "selection_loss": 3.125,
          "val_loss_learned": 2.875, "holdout_loss_learned": 2.8125, "selection_loss_learned": 2.5}]
MEMBERS = [{"val_loss": 3.25}, {"val_loss": 3.0625}]


def summary(mixture="learned", val_bytes=16, curve=CURVE):
    """A result with all that result_lines reads; 4 targets, of 5 tokens, are scored."""
    val = [np.array([BOS, 1, 2], np.uint16), np.array([BOS, 3], np.uint16)]
    data = SimpleNamespace(val_bytes=val_bytes, scored={"val": val}, meta={}, hashes={"f": "0"})
    result = summarize(small_config(final_mixture=mixture), data, MEMBERS, curve)
    return result | {"train_seconds": 3725.9, "compile_seconds": 59.9, "eval_seconds": 0.0,
                     "wall_seconds": 3900.0, "over_limit": False, "mfu": 0.4321,
                     "train_flops": 1.25e15,
                     "tokens_per_second": 1234567.8, "peak_memory_bytes": 3 * 2 ** 30}


@pytest.mark.parametrize("mixture, losses", [
    ("uniform", (3.0, 3.375, 3.125)), ("learned", (2.875, 2.8125, 2.5))])
def test_summary_has_the_declared_mixture_of_all_members(mixture, losses):
    result = summary(mixture)
    assert tuple(result[f"{split}_loss"] for split in ("val", "holdout", "selection")) == losses
    assert result["final_mixture"] == mixture
    assert result["val_bpb"] == pytest.approx(losses[0] / math.log(2) / 4)
    assert "others" not in result
    assert (result["members"], result["ensemble"]) == (MEMBERS, CURVE)
    assert summary(mixture, val_bytes=None)["val_bpb"] is None


def test_result_lines_by_hand():
    assert result_lines(summary()) == [
        " n    member  ensemble   learned   holdout  (member n; ensembles of n)",
        " 1    3.2500    3.2500    3.1250    3.5000",
        " 2    3.0625    3.0000    2.8750    3.3750",
        "",
        "result           val loss 2.8750 (learned mixture), 1.0369 bits per byte, selection"
        " 2.5000, holdout 2.8125",
        "data efficiency  n/a",
        "time             train 62:05, compile 0:59, eval 0:00, wall 65:00",
        "speed            1.25e+15 FLOPs, 1,234,568 tokens/s, MFU 43.2%, peak memory 3,072 MiB"]


def test_result_lines_of_what_is_not_known():
    """Weights are not fitted for every n, nor without selection; few devices have a peak."""
    curve = [CURVE[0], {"n": 2, "val_loss": 3.0, "holdout_loss": 3.375}]
    result = summary("uniform", 0, curve) | {"mfu": None, "over_limit": True}
    lines = result_lines(result)
    assert lines[2].split() == ["2", "3.0625", "3.0000", "nan", "3.3750"]
    assert "nan bits per byte" in lines[4]
    assert lines[6].endswith("wall 65:00; OVER the limit")
    assert "MFU n/a," in lines[7]
    result["ensemble"] = [{"n": 1, "val_loss": 3.0, "holdout_loss": 3.375}]
    assert "learned" not in result_lines(result)[0]


@pytest.mark.parametrize("seconds, text", [
    (0, "0:00"), (59.99, "0:59"), (60, "1:00"), (3599, "59:59"), (36000.5, "600:00")])
def test_minutes(seconds, text):
    assert minutes(seconds) == text


@pytest.mark.parametrize("fraction, text", [
    (None, "n/a"), (0, "n/a"), (0.4321, "43.2%"), (0.00049, "0.0%"), (1.0, "100.0%")])
def test_percent(fraction, text):
    assert percent(fraction) == text


def test_a_run_that_goes_on_counts_its_seconds_on(monkeypatch):
    """Time between two launches is not the run's; compilation and evaluation train nothing."""
    now, compiled = [1000.0], [7.0]
    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(torch._dynamo.utils, "calculate_time_spent",
                        lambda: {"total_wall_time": compiled[0]})
    data = SimpleNamespace(train=[np.append(BOS, np.arange(50))] * 4, bos=BOS, tables={})

    def begin():
        trainer = random_trainer()
        trainer.start_member(1, 1001)
        return trainer, Member(1, trainer, data)

    trainer, _ = begin()
    now[0] += 10
    member = Member(1, trainer, data)
    member.step = 2
    now[0], compiled[0], trainer.clocks.eval = now[0] + 100, compiled[0] + 20, 5.0
    state = collect_state(trainer, member)

    now[0], compiled[0] = 50_000.0, 3.0
    resumed, again = begin()
    now[0], compiled[0] = now[0] + 1_000, compiled[0] + 50
    restore_state(state, resumed, again)
    assert resumed.clocks.seconds() == pytest.approx({"wall": 110, "compile": 20, "eval": 5})
    assert member_facts(resumed, again)["train_seconds"] == 75
    now[0], compiled[0], resumed.clocks.eval = now[0] + 8, compiled[0] + 3, 6.0
    assert resumed.clocks.seconds() == pytest.approx({"wall": 118, "compile": 23, "eval": 6})
    assert member_facts(resumed, again)["train_seconds"] == 79


# ==== Devices ===================================================================================
@pytest.mark.parametrize("name, tera", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
    ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835), ("NVIDIA GH200 480GB", 989),
    ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA L40S", 362), ("NVIDIA GeForce RTX 4090", 165.2),
    ("NVIDIA GeForce RTX 5090", 209.5), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ("NVIDIA RTX 4090 Max-Q", None), ("NVIDIA L40", None), ("NVIDIA H20", None),
    ("Tesla V100-SXM2-16GB", None)])
def test_peak_of_a_device_by_whole_words_of_its_name(name, tera, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert peak_flops(torch.device("cuda")) == (tera and pytest.approx(tera * 1e12))
    assert hardware_name(torch.device("cuda")) == f"3x {name}"


def test_a_cpu_has_a_name_but_no_known_peak():
    assert peak_flops(torch.device("cpu")) is None
    assert re.fullmatch(r"\d+-core \S+ CPU", hardware_name(torch.device("cpu")))


# ==== Log =======================================================================================
def test_log_writes_text_numbers_and_console(tmp_path, capsys):
    log = Log(tmp_path, True)
    log.say("both")
    log.say("log only", console=False)
    log.metrics(member=1, loss=math.pi, rate=1e-12)
    log.metrics(member=2, loss=0.5)
    assert capsys.readouterr().out == "both\n"
    assert (tmp_path / "log.txt").read_text() == (
        "both\nlog only\nmember:1 loss:3.14159 rate:1e-12\nmember:2 loss:0.5\n")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"member": 1, "loss": math.pi, "rate": 1e-12}, {"member": 2, "loss": 0.5}]
    Log(tmp_path, True).say("later")         # a run that goes on adds to its files
    assert (tmp_path / "log.txt").read_text().endswith("loss:0.5\nlater\n")


def test_other_processes_say_nothing(tmp_path, capsys):
    log = Log(tmp_path, False)
    log.say("text")
    log.progress("text", always=True)
    log.metrics(loss=1.0)
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_progress_is_shown_every_few_seconds_and_never_logged(tmp_path, capsys, monkeypatch):
    now = iter([100, 101, 104.9, 105.1, 106, 107, 111.9, 112.1])
    monkeypatch.setattr(train_gpt.time, "monotonic", lambda: next(now))
    log = Log(tmp_path, True)
    for text in "abcde":
        log.progress(text)
    log.progress("f", always=True)              # from here on 5 seconds are waited again
    log.progress("g")
    log.progress("h")
    assert capsys.readouterr().out.split() == ["a", "d", "f", "h"]
    assert (tmp_path / "log.txt").read_text() == ""


# ==== The plan ==================================================================================
@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(Config, Dataset): a small dataset, with 700 tokens of it in the budget."""
    dataset = make_dataset(tmp_path_factory.mktemp("data") / "small")
    config = small_config(dataset=str(dataset), train_tokens=700, selection_tokens=80,
                          eval_tokens=0, kd_alpha=0.25, num_epochs=3)
    return config, load_dataset(dataset, config)


OVERRIDES = {"num_epochs": 3, "num_layers": 3}


def announced(trainer, data, folder, had_run=False, changes=()):
    """log.txt of announce."""
    folder.mkdir()
    announce(trainer, data, Log(folder, True), OVERRIDES, had_run, list(changes))
    return (folder / "log.txt").read_text(encoding="utf-8")


def test_plan_by_hand(small, tmp_path, capsys):
    config, data = small
    trainer = random_trainer(**{name: getattr(config, name) for name in (
        "kd_alpha", "num_epochs", "dataset")})
    trainer.runtime.notes.append("compile   off: a note")
    data.notes[:] = ["data      2 documents left out"]
    announced(trainer, data, tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    parameters = num_parameters(trainer.model)
    flops, = set(trainer.flops.values())
    plan = [line for line in lines if not re.match("settings| {10}", line)]
    assert plan[:4] == [
        "track     cpu: 1 model(s) x 3 epochs",         # alone it has no teacher
        f"data      {config.dataset}: 600 tokens an epoch in 12 documents; selection 100,"
        " val 400, holdout 400",
        f"model     {parameters / 1e6:.4g}M parameters, 4 blocks of width 48; {flops:.4g} FLOPs a"
        " token",
        "steps     38 in 3 epochs, of 4 rows x 12 = 48 tokens; 1 process(es), micro-batches of"
        " 4 row(s)"]
    assert plan[4].startswith(f"machine   {hardware_name(torch.device('cpu'))}; torch ")
    assert plan[5:] == [f"folder    {tmp_path / 'run'}", "data      2 documents left out",
                        "compile   off: a note", ""]


@pytest.mark.parametrize("track", TRACKS)
def test_plan_says_what_track_and_arguments_set(track, small, tmp_path, capsys):
    """As it is now, as it could be typed, wrapped at 100 columns (within what is longer, too)."""
    trainer = random_trainer(track=track, num_layers=3, loop_start=1, loop_end=1)
    announced(trainer, small[1], tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if re.match("settings| {10}", line)]
    assert max(map(len, told)) <= 100 and not any(line.startswith("s") for line in told[1:])
    typed = [f"{name}={as_text(getattr(trainer.config, name))}"
             for name in TRACKS[track] | OVERRIDES]
    assert "".join("".join(told).split()) == "settings" + "".join(typed)


def test_the_source_is_logged_at_the_start_and_after_changes_only(small, tmp_path, capsys):
    trainer = random_trainer()
    with open(SCRIPT, encoding="utf-8") as file:
        source = file.read()
    for name, had_run, changes, is_there in (
            ("first", False, [], True), ("again", True, [], False),
            ("changed", True, ["seed=2 (was 1)"], True)):
        log = announced(trainer, small[1], tmp_path / name, had_run, changes)
        assert log.startswith(source) is is_there
        assert log.count(f"\n{'=' * 40} end of train_gpt.py\n") == is_there
        console = capsys.readouterr().out
        assert log.endswith(console)
        assert re.findall("^changed   (.*)$", console, re.M) == changes
        facts = dict(re.findall(r"^(\w+):(.*)$", log.removesuffix(console), re.M))
        assert json.loads(facts["overrides"]) == OVERRIDES
        assert json.loads(facts["data_sha256"]) == small[1].hashes
        assert json.loads(facts["config"])["seq_len"] == trainer.config.seq_len
