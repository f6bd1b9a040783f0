"""A run's files: written whole, checked when read, claimed by one process, and what may go on.

    python -m pytest tests/test_files.py
"""
import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CPU, flat, kept_handlers, losses, main, make_dataset, randn, read_run
from safetensors.torch import load_file, save_file

import train_gpt
from train_gpt import (
    FIELDS, FREE, SOURCE, Log, Runtime, States, UserError, as_text, claim, generator_of,
    identify, make_config, parse_arguments, read_tensors, remember_signals, run_name, write_json,
    write_tensors, write_whole)

TENSORS = {"a": torch.arange(9.0).view(3, 3), "b": torch.ones(3, dtype=torch.int8)}
FACTS = {"step": 3}


def never(*_, **__):
    raise AssertionError("this must not happen")


def assert_equal(ours, theirs):
    """{name: tensor}, twice."""
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


# ==== Writing ===================================================================================
class Failure(Exception):
    pass


def fail(*_):
    raise Failure


def write_nothing(beside):
    raise Failure


def write_half(beside):
    beside.write_text("ne")
    raise Failure


def write_interrupted(beside):
    beside.write_text("ne")
    raise KeyboardInterrupt


def write_all(beside):
    beside.write_text("new")


@pytest.mark.parametrize("write, broken", [
    (write_nothing, ""), (write_half, ""), (write_interrupted, ""), (write_all, "fsync"),
    (write_all, "replace")])
@pytest.mark.parametrize("before", [None, "old"])
def test_of_a_failure_nothing_is_left(before, write, broken, tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    if before:
        path.write_text(before)
    if broken:
        monkeypatch.setattr(os, broken, fail)
    with pytest.raises((Failure, KeyboardInterrupt)):
        write_whole(path, write)
    assert [p.read_text() for p in tmp_path.iterdir()] == ([before] if before else [])


def test_a_file_is_flushed_whole_before_it_takes_its_place(tmp_path, monkeypatch):
    path = tmp_path / "folder/file.json"
    calls = []
    fsync, replace_file = os.fsync, os.replace

    def seen_fsync(number):
        calls.append(("flush", os.fstat(number).st_size, path.exists()))
        fsync(number)

    def seen_replace(source, target):
        calls.append(("rename", Path(source).read_text(), Path(target) == path))
        replace_file(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    write_whole(path, write_all)
    assert calls == [("flush", 3, False), ("rename", "new", True)]
    assert [p.name for p in path.parent.iterdir()] == ["file.json"] and path.read_text() == "new"


# ==== Tensors ===================================================================================
def test_tensors_and_facts_come_back_exactly(tmp_path):
    path = tmp_path / "members/001.logp.safetensors"
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    tensors = {"odd": odd.view(torch.int32), "half": randn(2, 3, dtype=torch.bfloat16),
               "double": randn(4), "number": torch.tensor(7), "none": torch.empty(0, 5),
               "random": torch.get_rng_state(), "täglich": torch.tensor([True, False])}
    facts = {"step": 3, "loss": 0.1 + 0.2, "clocks": {"wall": 1e-9}, "name": "Ärger\n\"", "no": None}
    write_tensors(path, tensors, facts)
    found, found_facts = read_tensors(path)
    assert_equal(found, tensors)
    assert found_facts == facts
    assert path.stat().st_mode & 0o444 == 0o444         # whoever shares the folder may read it
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Bytes of a file that write_tensors wrote."""
    path = tmp_path_factory.mktemp("sound") / "file.safetensors"
    write_tensors(path, TENSORS, FACTS)
    return path.read_bytes()


def assert_refused(path):
    """In one line that names the file and says what to do, by a UserError."""
    with pytest.raises(UserError) as error:
        read_tensors(path)
    line = str(error.value)
    assert line.startswith(f"{path}: damaged (") and "\n" not in line
    assert line.endswith("; delete it, and the run trains again what it held")


def test_a_file_that_is_cut_off_or_too_long_is_found(sound, tmp_path):
    path = tmp_path / "file.safetensors"
    for size in range(len(sound)):
        path.write_bytes(sound[:size])
        assert_refused(path)
    path.write_bytes(sound + b"\0")
    assert_refused(path)


class Executed:
    """Its pickle makes a folder when it is loaded."""
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def as_pickle(path):
    torch.save(Executed(str(path.parent / "executed")), path)


def as_folder(path):
    path.mkdir()


def as_nothing(path):
    pass


def as_dangling_link(path):
    path.symlink_to("nowhere")


def as_text_file(path):
    path.write_text('{"a": [1, 2, 3]}')


def as_noise(path):
    path.write_bytes(bytes(range(7, 256)) * 20)


def as_foreign_safetensors(path):
    save_file(TENSORS, path)


@pytest.mark.parametrize("make", [
    as_pickle, as_folder, as_nothing, as_dangling_link, as_text_file, as_noise,
    as_foreign_safetensors])
def test_a_foreign_file_is_refused(make, tmp_path):
    path = tmp_path / "file.safetensors"
    make(path)
    assert_refused(path)
    assert not (tmp_path / "executed").exists()


# ==== The lock ==================================================================================
def fork(act):
    """Process id of a fork that exits with the code that act() returns."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = act()
        finally:
            os._exit(code)
    return pid


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def toy(runs, **changes):
    return make_config("cpu", preset="toy", run_id="run", runs_dir=str(runs), **changes)


def test_a_run_under_way_is_refused_and_a_stale_lock_taken(tmp_path):
    reader, writer = os.pipe()

    def hold():
        *_, lock = claim(toy(tmp_path), {}, {}, Runtime())
        os.write(writer, b"held")
        signal.pause()
        return lock

    holder = fork(hold)
    try:
        assert os.read(reader, 4) == b"held"
        with pytest.raises(UserError) as error:
            claim(toy(tmp_path), {}, {}, Runtime())
        assert str(tmp_path / "run") in str(error.value) and "under way" in str(error.value)
        assert "\n" not in str(error.value)
        folder, had_run, *_, lock = claim(replace(toy(tmp_path), run_id="other"), {}, {}, Runtime())
        assert (folder, had_run) == (tmp_path / "other", False)
        lock.close()
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.close(reader)
        os.close(writer)
    assert (tmp_path / "run/lock").exists()
    *facts, lock = claim(toy(tmp_path), {}, {}, Runtime())
    assert facts == [tmp_path / "run", True, [], []]
    lock.close()


def test_a_run_without_a_name_gets_one(tmp_path):
    """By what differs from the track, and by the time only where that name is taken."""
    config = make_config("cpu", runs_dir=str(tmp_path), seed=7, dropout=0.2)
    names = []
    for _ in range(2):
        folder, *facts, lock = claim(config, {"seed": 7, "dropout": 0.2}, {}, Runtime())
        lock.close()
        assert folder.parent == tmp_path and facts == [False, [], []]
        names.append(folder.name)
    assert names[0] == "cpu_dropout0.2_seed7"
    assert re.fullmatch(r"cpu_dropout0\.2_seed7_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", names[1])


@pytest.mark.parametrize("arguments, name", [
    ("", "cpu_seed1"),
    ("--seed=3 --dropout=0.20", "cpu_dropout0.2_seed3"),
    ("--track=mini --num_models=2 --compile=false", "mini_num_models2_compilefalse_seed1"),
    ("--num_models=4 --dropout=0 --weight_decay=1.50", "cpu_seed1"),     # as the track has them
    ("--runs_dir=x --save_minutes=1 --device_batch_size=2", "cpu_seed1"),
    ("--wd_schedule=0:1,1:0.5 --window_schedule=", "cpu_wd_schedule0-1-1-0.5_window_schedule_seed1"),
    ("--preset=toy --dataset=/a/b", "cpu_presettoy_dataset-a-b_seed1"),
])
def test_names_of_runs(arguments, name):
    values = parse_arguments(arguments.split())
    config = make_config(values.pop("track", "cpu"), **values)
    found = run_name(config, {field: getattr(config, field) for field in values})
    assert found == name
    assert make_config("cpu", run_id=found)             # may be typed


def test_long_names_are_cut_and_still_differ():
    names = set()
    for last in (0.9, 0.8):
        config = make_config("cpu", wd_schedule=tuple((i / 40, last) for i in range(40)))
        names.add(run_name(config, {"wd_schedule": config.wd_schedule}))
    assert len(names) == 2 and all(len(name) < 90 for name in names)
    assert all(name.startswith("cpu_wd_schedule0-") for name in names)


# ==== The run's identity ========================================================================
HASHES = {"small_train_000000.bin": "1" * 64, "small_val_000000.bin": "2" * 64}


@pytest.fixture
def begun(tmp_path):
    """(config, folder) of a run that has begun, and is finished as far as identify knows."""
    config = toy(tmp_path)
    assert identify(config, tmp_path, HASHES) == (False, [], [])
    write_json(tmp_path / "result.json", {})
    return config, tmp_path


def another(config, name):
    """Another value of a field, of its type."""
    value = getattr(config, name)
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value, (0.9, 3.0, 4.0))
    return value + "x" if isinstance(value, str) else 2 * value + 1


def refusal(config, folder, hashes=HASHES):
    """The one line of a refusal, which changes nothing."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError) as error:
        identify(config, folder, hashes)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    line = str(error.value)
    assert str(folder) in line and "--run_id" in line and "\n" not in line
    return line


def test_the_same_settings_go_on(begun):
    config, folder = begun
    assert identify(config, folder, HASHES) == (True, [], [])
    assert (folder / "result.json").exists()


def test_a_run_holds_its_settings_its_hashes_and_what_changed(begun):
    """And nothing else: no version of a format."""
    config, folder = begun
    fields = {name: as_text(getattr(config, name)) for name in FIELDS
              if name not in (*FREE, "dataset")}
    held = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert {name: held.pop(name) for name in fields} == fields
    assert {name: held.pop(name) for name in HASHES} == HASHES
    assert held.pop("changes") == []
    assert set(held) == {"train_gpt.py"} and len(held["train_gpt.py"]) == 64


def test_every_field_that_is_not_free_is_compared(begun):
    """But for num_models, of which later."""
    config, folder = begun
    for name in set(FIELDS) - {*FREE, "num_models", "dataset"}:
        other = replace(config, **{name: another(config, name)})
        before, now = (as_text(getattr(c, name)) for c in (config, other))
        line = refusal(other, folder)
        assert f"{name}={now} (was {before})" in line and line.count("(was ") == 1, name
        assert "--allow_changed" in line


def test_free_fields_are_not_compared(begun):
    """Nor is where the dataset lies: its hashes are."""
    config, folder = begun
    other = replace(config, **{name: another(config, name) for name in (*FREE, "dataset")})
    assert {"device_batch_size", "loss_chunk", "save_minutes"} < {*FREE}
    assert identify(other, folder, HASHES) == (True, [], [])
    assert (folder / "result.json").exists()


@pytest.mark.parametrize("hashes, words", [
    (HASHES | {"small_val_000000.bin": "3" * 64}, ["small_val_000000.bin=333", "(was 222"]),
    (HASHES | {"small_val_000001.bin": "3" * 64}, ["small_val_000001.bin=333", "(was None)"]),
    ({"small_train_000000.bin": "1" * 64}, ["small_val_000000.bin=gone (was 222"])],
    ids=["changed", "added", "gone"])
def test_other_data_are_refused(hashes, words, begun):
    config, folder = begun
    line = refusal(config, folder, hashes)
    assert all(word in line for word in words) and "small_train" not in line


def edit_source(folder, monkeypatch):
    """As if the script had one more comment."""
    edited = folder / SOURCE.name
    edited.write_text(SOURCE.read_text(encoding="utf-8") + "# a comment\n")
    monkeypatch.setattr(train_gpt, "SOURCE", edited)


def test_an_edited_source_is_refused(begun, tmp_path_factory, monkeypatch):
    config, folder = begun
    (folder / "result.json").unlink()
    edit_source(tmp_path_factory.mktemp("edited"), monkeypatch)
    line = refusal(config, folder)
    assert "train_gpt.py=" in line and line.count("(was ") == 1


@pytest.mark.parametrize("insists", [False, True])
def test_the_result_of_an_edited_source_stays(insists, begun, tmp_path_factory, monkeypatch):
    """A finished run is shown; one that would be trained further is refused."""
    config, folder = begun
    edit_source(tmp_path_factory.mktemp("edited"), monkeypatch)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = replace(config, allow_changed=insists)
    had_run, (line,), history = identify(config, folder, HASHES)
    assert had_run and line.startswith("train_gpt.py=") and history == []
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    if not insists:
        assert "num_models=" in refusal(replace(config, num_models=9), folder)


def test_who_insists_goes_on_with_a_list_of_changes(begun):
    config, folder = begun
    other = replace(config, embed_lr=0.5, seed=config.seed + 1, allow_changed=True)
    assert "embed_lr" in refusal(replace(other, allow_changed=False), folder)
    (folder / "members").mkdir()
    for name in ("001", "001.logp", "002"):         # of the second the scores are not there yet
        (folder / f"members/{name}.safetensors").touch()
    had_run, changes, history = identify(other, folder,
                                         HASHES | {"small_val_000000.bin": "3" * 64})
    assert had_run and sorted(changes) == [
        f"embed_lr=0.5 (was {as_text(config.embed_lr)})", f"seed={other.seed} (was {config.seed})",
        f"small_val_000000.bin={'3' * 64} (was {'2' * 64})"]
    assert history == [f"{change}, with 1 member(s) done" for change in changes]
    assert not (folder / "result.json").exists()        # it was of the other settings
    # from here on these are the settings of the run
    shutil.rmtree(folder / "members")
    assert "embed_lr" in refusal(config, folder)
    assert identify(replace(other, allow_changed=False), folder,
                    HASHES | {"small_val_000000.bin": "3" * 64}) == (True, [], history)
    again = replace(other, embed_lr=0.25)
    *_, longer = identify(again, folder, HASHES | {"small_val_000000.bin": "3" * 64})
    assert longer == [*history, "embed_lr=0.25 (was 0.5), with 0 member(s) done"]
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["changes"] == longer


def test_fields_of_another_version_are_named(begun):
    """A run of an earlier script: with fields that are gone, or without those that are new."""
    config, folder = begun
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    del facts["changes"], facts["head_lr"]
    write_json(folder / "run.json", facts | {"format": "1", "subset_fraction": "0.5"})
    line = refusal(config, folder)
    assert "format=gone (was 1)" in line and "subset_fraction=gone (was 0.5)" in line
    assert f"head_lr={as_text(config.head_lr)} (was None)" in line and line.count("(was ") == 3
    _, changes, history = identify(replace(config, allow_changed=True), folder, HASHES)
    assert len(changes) == len(history) == 3


@pytest.mark.parametrize("text", ["", "{", '{"seed": 1', "\0"])
def test_a_torn_run_json_is_one_line(text, tmp_path):
    config = toy(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(text)
    with pytest.raises(UserError) as error:
        claim(config, {}, HASHES, Runtime())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes, is_refused", [
    ({}, False), ({"save_minutes": 9.0}, False), ({"seed": 99}, True), ({"kd_from": 9}, True)])
def test_a_larger_number_of_members_alone_extends(changes, is_refused, begun):
    config, folder = begun
    longer = replace(config, num_models=config.num_models + 2, **changes)
    if is_refused:
        assert "num_models=" in refusal(longer, folder)
    else:
        had_run, (line,), history = identify(longer, folder, HASHES)
        assert had_run and line == f"num_models={longer.num_models} (was {config.num_models})"
        assert not (folder / "result.json").exists()
        assert identify(longer, folder, HASHES) == (True, [], history)
        assert "num_models=" in refusal(config, folder)


def test_members_whose_plan_depends_on_their_number_are_not_extended(tmp_path):
    """Perturbations do."""
    config = toy(tmp_path, continue_members=True)
    identify(config, tmp_path, HASHES)
    assert "num_models=" in refusal(replace(config, num_models=config.num_models + 1), tmp_path)


# ==== Runs that are extended ====================================================================
RUN = ["--track=cpu", "--preset=toy", "--device=cpu", "--dtype=float32", "--vocab_size=100",
       "--seq_len=32", "--train_tokens=1500", "--selection_tokens=200", "--eval_tokens=0",
       "--model_dim=32", "--num_layers=2", "--num_epochs=1", "--batch_rows=8", "--dropout=0.1",
       "--kd_alpha=0.5", "--average=weights", "--final_mixture=learned", "--log_steps=1",
       "--save_minutes=0.00001", "--run_id=run"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of the runs two/run and three/run, of as many members; data: --dataset=FOLDER."""
    folder = tmp_path_factory.mktemp("runs")
    make_dataset(folder / "small")
    for name, members in (("two", 2), ("three", 3)):
        assert go(folder, folder / name, members)[0] == 0
    return folder


def go(runs, folder, members, *arguments):
    """main's (exit code, stdout, stderr) of the run in `folder`, begun or gone on with."""
    return main(*RUN, f"--dataset={runs / 'small'}", f"--runs_dir={folder}",
                f"--num_models={members}", *arguments)


def assert_same_run(one, other):
    """Digit for digit, but for clocks."""
    first, second = read_run(one / "run"), read_run(other / "run")
    assert losses(first) == losses(second)
    for key in ("val_loss", "holdout_loss", "ensemble"):
        assert first.result[key] == second.result[key]
    names = [path.name for path in sorted(first.folder.glob("members/*"))]
    assert names == [path.name for path in sorted(second.folder.glob("members/*"))]
    for name in names:
        assert_equal(load_file(first.folder / "members" / name),
                     load_file(second.folder / "members" / name))


@pytest.fixture
def finished(runs, tmp_path):
    """A copy of the run of two members."""
    shutil.copytree(runs / "two", tmp_path / "copy")
    return tmp_path / "copy"


def times_of(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.glob("run/members/00[12].*"))}


def test_a_finished_run_shows_its_table_and_trains_nothing(runs, finished, monkeypatch):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    monkeypatch.setattr(train_gpt, "Trainer", never)
    code, out, err = go(runs, finished, 2)
    assert (code, err) == (0, "")
    told = (finished / "run/log.txt").read_text(encoding="utf-8")
    table = told[told.rindex("\n n    member ") + 1:].partition("\nfolder ")[0]
    assert out == f"{finished / 'run'}: this run is finished\n\n{table}\n"
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


@pytest.mark.parametrize("arguments", [[], ["--allow_changed=true"]], ids=str)
def test_a_finished_run_of_another_source_is_shown_and_kept(arguments, runs, finished,
                                                            tmp_path_factory, monkeypatch):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    edit_source(tmp_path_factory.mktemp("edited"), monkeypatch)
    monkeypatch.setattr(train_gpt, "Trainer", never)
    code, out, err = go(runs, finished, 2, *arguments)
    assert (code, err) == (0, "")
    first, changed, empty, header, *_ = out.splitlines()
    assert first.endswith(": this run is finished") and header.startswith(" n    member ")
    assert changed.startswith("changed   train_gpt.py=") and empty == ""
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_a_finished_run_of_other_settings_is_trained_again_by_who_insists(runs, finished):
    """Its members are kept; the result says so."""
    code, out, err = go(runs, finished, 2, "--embed_lr=0.2", "--allow_changed=true")
    assert (code, err) == (0, "") and "member 2/2 was done" in out
    assert json.loads((finished / "run/result.json").read_text(encoding="utf-8"))["changes"] == [
        "embed_lr=0.2 (was 0.1), with 2 member(s) done"]


def test_an_extended_run_is_the_longer_one(runs, finished):
    before = times_of(finished)
    assert go(runs, finished, 3)[0] == 0
    assert before and times_of(finished) == before      # the first two are not trained again
    assert_same_run(runs / "three", finished)


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_an_extension_that_was_stopped_goes_on(number, code, runs, finished):
    def stopped():
        metrics = Log.metrics

        def until_the_third_member(log, **numbers):
            metrics(log, **numbers)
            if (numbers["member"], numbers.get("step")) == (3, 3):
                os.kill(os.getpid(), number)

        Log.metrics = until_the_third_member
        return go(runs, finished, 3)[0]

    assert exit_code(fork(stopped)) == code
    assert not (finished / "run/result.json").exists()
    assert (finished / "run/state.safetensors").exists()
    assert go(runs, finished, 2)[0] == 2        # it has become a run of three
    code, out, err = go(runs, finished, 3)
    assert (code, err) == (0, "") and "resumed   member 3 after step" in out
    assert_same_run(runs / "three", finished)


def test_a_smaller_number_of_members_is_refused(runs, finished):
    code, out, err = go(runs, finished, 1)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert "num_models=1 (was 2)" in err
    assert_same_run(runs / "two", finished)


def set_bf16(monkeypatch, is_fast):
    """As if this were a machine with, or without, fast bfloat16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@pytest.mark.parametrize("begun_fast, dtype, other", [
    (True, "bfloat16", "float32"), (False, "float32", "bfloat16")])
def test_who_goes_on_where_auto_is_another_dtype_is_told(
        begun_fast, dtype, other, runs, tmp_path, monkeypatch):
    """By the usual refusal; to type the dtype that it was begun with is enough."""
    set_bf16(monkeypatch, begun_fast)
    for name, members in (("whole", 3), ("moved", 2)):
        assert go(runs, tmp_path / name, members, "--dtype=auto")[0] == 0
    folder = tmp_path / "moved/run"
    for is_fast, typed in ((begun_fast, other), (not begun_fast, other), (not begun_fast, "auto")):
        set_bf16(monkeypatch, is_fast)
        code, out, err = go(runs, tmp_path / "moved", 3, f"--dtype={typed}")
        assert (code, out) == (2, "") and f"dtype={other} (was {dtype})" in err
        assert (folder / "result.json").exists()
    code, out, err = go(runs, tmp_path / "moved", 3, f"--dtype={dtype}")
    assert (code, err) == (0, "") and f", torch.{dtype}, " in out
    assert re.findall(r"^changed   (\w+)=", out, re.M) == ["num_models"]
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["dtype"] == dtype
    assert read_run(folder).result["config"]["dtype"] == dtype
    assert_same_run(tmp_path / "whole", tmp_path / "moved")


ROUNDS = ("device_batch_size", "loss_chunk")        # free, too, but for rounding; below


def test_free_fields_do_not_change_what_a_run_computes(runs, tmp_path):
    config = toy(tmp_path)
    other = {name: another(config, name) for name in FREE
             if name not in ("run_id", "runs_dir", *ROUNDS)}
    arguments = [f"--{name}={as_text(value)}" for name, value in other.items()]
    assert go(runs, tmp_path, 2, *arguments)[0] == 0
    assert_same_run(runs / "two", tmp_path)


def test_a_run_that_has_run_out_of_memory_goes_on_in_smaller_parts(runs, tmp_path, monkeypatch):
    """From the last state, up to rounding (a cautious decay has signs); the result has the sizes
    that it ended with."""
    settings = ["--dropout=0", "--cautious=false"]
    assert go(runs, tmp_path / "whole", 2, *settings)[0] == 0
    forward = train_gpt.GPT.forward
    steps = []

    def limited(model, tokens, specs=None):
        if model.training:
            steps.append(len(tokens))
        if len(steps) > 5 and len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return forward(model, tokens, specs)

    monkeypatch.setattr(train_gpt.GPT, "forward", limited)
    code, _, err = go(runs, tmp_path / "parts", 2, *settings)
    assert code == 2 and err.startswith("error: out of memory; lower --device_batch_size")
    assert go(runs, tmp_path / "parts", 2, *settings)[0] == 2       # it is not lowered for you
    code, out, err = go(runs, tmp_path / "parts", 2, *settings, "--device_batch_size=2",
                        "--loss_chunk=32")
    assert (code, err) == (0, "") and "changed" not in out
    assert re.search("^resumed   member 1 after step [1-9]", out, re.M)
    assert "micro-batches of 2 row(s)" in out
    whole, parts = (read_run(tmp_path / name / "run") for name in ("whole", "parts"))
    assert flat(losses(parts)) == pytest.approx(flat(losses(whole)), abs=1e-5)
    assert (parts.result["config"]["device_batch_size"], parts.result["changes"]) == (2, [])


# ==== Signals and states ========================================================================
@pytest.fixture
def handlers():
    with kept_handlers():
        yield


@pytest.mark.parametrize("number, other", [(signal.SIGTERM, signal.SIGINT),
                                           (signal.SIGINT, signal.SIGTERM)])
def test_signals_are_remembered_and_none_ends_the_process(number, other, monkeypatch, handlers):
    """However many there are, and however late."""
    monkeypatch.setattr(os, "_exit", never)
    received = remember_signals()
    assert received == []
    signal.raise_signal(number)
    signal.raise_signal(other)
    monotonic = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + 3600)
    signal.raise_signal(number)
    signal.raise_signal(signal.SIGCHLD)         # no other signal is its business
    assert received == [number, other, number]


def test_signals_stay_remembered_after_a_run(handlers):
    """So that one that comes as the result is written does not lose it."""
    received = remember_signals()
    signal.raise_signal(signal.SIGTERM)
    again = remember_signals()          # of the next run in this process
    signal.raise_signal(signal.SIGINT)
    assert (received, again) == ([signal.SIGTERM], [signal.SIGINT])


class TwoProcesses(Runtime):
    """Adds up what is asked of it with what the other process says."""
    other = (0.0, 0.0)

    def all_reduce(self, tensor):
        assert tensor.device == CPU     # no device is waited for
        return tensor + torch.tensor(self.other)


def test_a_state_is_due_after_its_minutes_and_only_the_main_process_says_so(tmp_path):
    assert FIELDS["save_minutes"].default == 15
    signals = []
    states = States(Log(tmp_path, True), 2, signals)
    assert states.requests(Runtime()) == [False, False]
    states.last -= 119
    assert states.requests(Runtime()) == [False, False]
    states.last -= 2
    assert states.requests(Runtime()) == [True, False]
    states.save(TENSORS, FACTS)
    assert states.requests(Runtime()) == [False, False]
    signals.append(signal.SIGTERM)
    assert states.requests(Runtime()) == [False, True]
    signals.append(signal.SIGTERM)
    assert states.requests(Runtime()) == [False, True]
    for states in (States(Log(tmp_path, False), 2, []), States(Log(tmp_path, True), 0, [])):
        states.last -= 1e6
        assert states.requests(Runtime()) == [False, False]


@pytest.mark.parametrize("other, found", [
    ((0.0, 0.0), [False, False]), ((1.0, 0.0), [True, False]), ((0.0, 2.0), [False, True])])
def test_requests_are_alike_on_all_processes(other, found, tmp_path):
    """What one process wants, all hear."""
    runtime = TwoProcesses(rank=1, world_size=2)
    runtime.other = other
    states = States(Log(tmp_path, False), 2, [])
    states.last -= 1e6                  # the clock of another process does not count
    assert states.requests(runtime) == found
    states.signals.append(signal.SIGINT)
    assert states.requests(runtime) == [found[0], True]


def test_a_state_is_on_the_disk_when_it_has_been_saved(tmp_path):
    states = States(Log(tmp_path, True), 0, [])
    for step in range(3):
        states.save({"a": torch.full((4,), step)}, {"step": step})
        tensors, facts = read_tensors(states.path)
        assert facts == {"step": step} and tensors["a"].tolist() == [step] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "log.txt", "metrics.jsonl", "state.safetensors"]
    States(Log(tmp_path, False), 0, []).save(TENSORS, {"step": 9})
    assert read_tensors(states.path)[1] == {"step": 2}      # the main process writes alone


def test_the_generator_of_a_device_is_the_one_that_dropout_draws_from():
    torch.manual_seed(3)
    state = generator_of(CPU).get_state()
    drawn = torch.dropout(torch.ones(64), 0.5, True)
    torch.manual_seed(4)
    generator_of(CPU).set_state(state)
    assert torch.equal(torch.dropout(torch.ones(64), 0.5, True), drawn)
