"""Settings for a text and a time (tools/auto.py): what is chosen, and that nothing else is.

    python -m pytest tests/test_auto.py
"""
import itertools
import json
import math
import os
import re
import shlex
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import auto
from helpers import ROOT, VOCAB, complaint, have_gpus, main, make_dataset, python, said
from train_gpt import (FIELDS, FREE, TRACKS, Member, Runtime, Trainer, UserError, as_text, claim,
                       cut_selection, identify, load_dataset, make_config, parse_arguments)

AUTO = str(ROOT / "tools/auto.py")
PLAIN = ["--device=cpu", "--compile=false"]
SMALL = [*PLAIN, "--num_layers=1", "--model_dim=32", "--num_heads=1", "--seq_len=64"]
TEXT = {"vocab_size": "100", "train_tokens": "3000", "selection_tokens": "300"}
FIELDS_OF_A_SIZE = {**TEXT, "num_epochs": "12", "weight_decay": "1.5", "split_tokens": "0.14"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A dataset of 60 documents of 50 tokens."""
    return make_dataset(tmp_path_factory.mktemp("text") / "small text")


@pytest.fixture
def begun(monkeypatch):
    """Steps take 0.1 s, with a teacher 0.2 s; chosen: what `choose` returned; begun: what would
    have been started."""
    found = SimpleNamespace(chosen=[], begun=[])
    choose = auto.choose

    def noted(*arguments):
        found.chosen.append(choose(*arguments))
        return found.chosen[-1]

    monkeypatch.setattr(auto, "choose", noted)
    monkeypatch.setattr(auto, "step_seconds", lambda *arguments: [0.1, 0.2])
    monkeypatch.setattr(os, "execv", lambda *arguments: found.begun.append(arguments))
    return found


def never(*arguments):
    raise AssertionError("called")


def printed(output):
    """(arguments, Config) of the command that it prints at last."""
    command = shlex.split(output.splitlines()[-1].removeprefix("auto "))
    assert command[0] == "./run.sh"
    values = parse_arguments(command[1:])
    return command[1:], make_config(values.pop("track"), **values)


def differing(one, other):
    """Names of the fields that differ between two Configs."""
    return {name for name in FIELDS if getattr(one, name) != getattr(other, name)}


# ==== Selection and sizes =======================================================================
def cut(sizes, tokens):
    """Tokens of the selection that train_gpt.py cuts; None: it refuses."""
    documents = [np.zeros(size, np.uint16) for size in sizes]
    try:
        _, selection = cut_selection(documents, replace(make_config("cpu"),
                                                        selection_tokens=tokens))
    except UserError:
        return None
    return sum(map(len, selection))


@pytest.mark.parametrize("seed", range(6))
def test_selection_is_never_refused_and_a_tenth_where_that_fits(seed):
    random, fitting = np.random.default_rng(seed), 0
    for _ in range(150):
        scale = 10 ** random.uniform(0.5, 4)
        sizes = (2 + random.pareto(1, random.integers(1, 12)) * scale).astype(int).tolist()
        total, size = sum(sizes), auto.selection_size(sizes)
        found = cut(sizes, size)
        assert found is not None and found <= total / 2
        tenth = min(60_000, total // 10)
        if cut(sizes, tenth) is None:
            assert size == 0
        else:
            fitting += 1
            assert size == tenth <= found
    assert 0 < fitting < 150


@pytest.mark.parametrize("sizes, size", [
    ([50], 0), ([500, 500], 100), ([501, 500], 0), ([10] * 100, 100), ([2], 0), ([2, 2], 0),
    ([5, 600, 400], 0), ([1_000] * 1_000, 60_000), ([99, 1, 2, 898], 100)])
def test_selection_of_some_texts(sizes, size):
    assert auto.selection_size(sizes) == size


@pytest.mark.parametrize("tokens, size", [
    (1, 0), (50_000, 0), (70_000, 0), (71_000, 1), (141_000, 1), (142_000, 2), (399_000, 2),
    (401_000, 3), (1_788_000, 3), (1_790_000, 4), (10 ** 8, 4)])
def test_the_nearest_size_is_by_ratio(tokens, size):
    """Between two it is their geometric mean that divides."""
    sizes = (*auto.SIZES, auto.MINI)
    assert auto.nearest(tokens, sizes) is sizes[size]
    assert auto.nearest(tokens, auto.SIZES) is auto.SIZES[min(size, 3)]


def test_what_the_sizes_set_are_fields():
    for size in (*auto.SIZES, auto.MINI):
        assert make_config("cpu", **size.fields)
    assert [size.tokens for size in auto.SIZES] == sorted(size.tokens for size in auto.SIZES)


# ==== Plans =====================================================================================
def slow_seconds(fields, steps_an_epoch, seconds):
    """Of all members, by the text of the fields, and whether one is taught."""
    total, taught = 0, []
    for number in range(1, int(fields["num_models"]) + 1):
        taught.append(float(fields["kd_alpha"]) > 0 and number >= int(fields["kd_from"]))
        epochs = int(fields["num_epochs"]) * (int(fields["kd_epoch_factor"]) if taught[-1] else 1)
        total += epochs * steps_an_epoch * seconds[taught[-1]]
    return total, taught


@pytest.mark.parametrize("given", [
    {}, {"num_epochs": "5"}, {"kd_epoch_factor": "1"}, {"final_mixture": "uniform"},
    {"selection_tokens": "0"}, {"selection_tokens": "0", "final_mixture": "uniform"}], ids=str)
def test_the_largest_plan_that_fits_is_chosen(given):
    random, usual = np.random.default_rng(1), {"kd_epoch_factor": "3"}
    has_selection = "selection_tokens" not in given or "final_mixture" in given
    plans = [plan for plan in auto.PLANS if has_selection or plan[1] < 2]
    for _ in range(60):
        seconds = sorted(random.uniform(0.01, 1, 2))
        steps = random.uniform(5, 500)
        fields = {**usual, **FIELDS_OF_A_SIZE, **given}
        costs = {}
        for untaught, taught in plans:
            costs[untaught, taught] = steps * int(fields["num_epochs"]) * (
                untaught * seconds[0] + taught * int(fields["kd_epoch_factor"]) * seconds[1])
        limit = costs[1, 0] * 10 ** random.uniform(0.001, 2)
        best = max((plan for plan in plans if costs[plan] <= limit), key=costs.get)
        chosen, needed = auto.fit("cpu", FIELDS_OF_A_SIZE, given, steps, seconds, limit)
        whole = {**usual, **chosen, **given}
        found, is_taught = slow_seconds(whole, steps, seconds)
        assert (is_taught.count(False), is_taught.count(True)) == best
        assert is_taught == sorted(is_taught)
        assert needed == pytest.approx(costs[best]) and found == pytest.approx(needed)
        config = make_config("cpu", **{**chosen, **given})
        assert auto.training_seconds(config, steps, seconds) == pytest.approx(needed)
        assert config.num_epochs == int(fields["num_epochs"])
        assert config.final_mixture == given.get(
            "final_mixture", "learned" if best[1] > 1 else "uniform")
        assert config.selection_tokens or config.final_mixture == "uniform"
    biggest, _ = auto.fit("cpu", FIELDS_OF_A_SIZE, given, 1, [0.1, 0.1], 1e9)
    assert int(biggest["num_models"]) == (10 if has_selection else 7)


@pytest.mark.parametrize("count, plan", [(1, (1, 0)), (2, (2, 0)), (3, (3, 0)), (4, (3, 1)),
                                         (5, (4, 1)), (6, (6, 0)), (8, (6, 2)), (10, (6, 4))])
def test_of_as_many_members_as_are_given_as_many_are_taught_as_a_plan_says(count, plan):
    """If the time is enough for it; else nobody is. Of six members there is no plan."""
    given = {"num_models": str(count)}
    for limit, expected in ((1e9, plan), (12 * count + 1, (count, 0))):
        chosen, needed = auto.fit("cpu", FIELDS_OF_A_SIZE, given, 1, [1.0, 2.0], limit)
        found, is_taught = slow_seconds({**chosen, **given, "kd_epoch_factor": "3"}, 1, [1.0, 2.0])
        assert (is_taught.count(False), is_taught.count(True)) == expected
        assert needed == pytest.approx(found) and needed <= limit


@pytest.mark.parametrize("epochs", [11.5, 7.2, 3.1, 2.9, 1.4, 1.01])
def test_one_member_has_fewer_epochs_where_there_is_no_time_for_all(epochs):
    limit = epochs * 30 * 0.25
    chosen, needed = auto.fit("cpu", FIELDS_OF_A_SIZE, {}, 30, [0.25, 0.4], limit)
    config = make_config("cpu", **chosen)
    assert (config.num_models, config.kd_alpha, config.num_epochs) == (1, 0, int(epochs))
    assert needed == pytest.approx(int(epochs) * 30 * 0.25) and needed <= limit
    assert config.weight_decay == (0.1 if epochs < 3 else 1.5)
    assert config.train_tokens == 3000


@pytest.mark.parametrize("epochs", [0.9, 0.31, 0.02])
def test_one_epoch_has_fewer_tokens_where_there_is_no_time_for_it(epochs):
    limit = epochs * 30 * 0.25
    chosen, needed = auto.fit("cpu", FIELDS_OF_A_SIZE, {}, 30, [0.25, 0.4], limit)
    config = make_config("cpu", **{**chosen, "selection_tokens": 0})
    assert (config.num_models, config.num_epochs) == (1, 1)
    assert config.train_tokens == pytest.approx(3000 * epochs, abs=1)
    assert needed == pytest.approx(limit, rel=0.02) and needed <= limit


def test_what_is_given_stays_where_there_is_no_time_for_it():
    """And the time that is said to be needed is that of the tokens that are given."""
    for given, epochs, needed in (
            ({"num_epochs": "12"}, 12, 12.0), ({"train_tokens": "500"}, 1, 1.0),
            ({"num_models": "4"}, 1, None), ({"num_models": "4", "kd_alpha": "0.5"}, 1, None)):
        chosen, found = auto.fit("cpu", FIELDS_OF_A_SIZE, given, 10, [0.1, 0.1], 0.7)
        config = make_config("cpu", **{**chosen, "selection_tokens": 0, **given})
        assert config.num_epochs == epochs
        assert all(as_text(getattr(config, name)) == value for name, value in given.items())
        if "train_tokens" in given:
            assert found == pytest.approx(needed)
    chosen, needed = auto.fit("cpu", FIELDS_OF_A_SIZE, {"num_models": "4"}, 10, [0.1, 0.1], 20)
    assert chosen["num_epochs"] == "5" and needed == pytest.approx(20)


def test_a_learned_mixture_that_is_asked_for_without_selection_is_refused():
    fields = {**FIELDS_OF_A_SIZE, "selection_tokens": "0"}
    with pytest.raises(UserError, match="--final_mixture=learned needs --selection_tokens"):
        auto.fit("cpu", fields, {"final_mixture": "learned"}, 10, [0.1, 0.1], 1e9)


# ==== The command that is chosen ================================================================
@pytest.mark.parametrize("minutes, members", [(0.02, 1), (0.08, 2), (0.33, 4), (5, 10)])
def test_the_printed_command_is_what_was_chosen(minutes, members, text, begun, tmp_path):
    """For no time at all, too; its settings and data are sound, and nothing is started."""
    arguments = [f"--dataset={text}", *PLAIN, f"--minutes={minutes}", f"--runs_dir={tmp_path}"]
    out = said(auto, *arguments, "--track=auto", "--dry_run")
    assert not begun.begun and not list(tmp_path.iterdir())
    (track, chosen, lines), = begun.chosen
    command, config = printed(out)
    given = parse_arguments([*arguments[:3], *arguments[4:]])
    assert config == make_config(track, **{**chosen, **given, "run_id": config.run_id})
    assert config.run_id == f"auto_small-text_{minutes:g}m_seed1"
    assert (config.track, config.vocab_size) == ("cpu", VOCAB)
    assert config.num_models == members
    assert out.startswith("\n".join(lines)) and "3,000 tokens: settings for 50,000" in out
    code, checked, err = main("check", *command)
    assert (code, err) == (0, "") and "settings and data are sound" in checked
    assert said(auto, *arguments, "--dry_run") == out


def test_it_is_the_script_that_is_started(text, begun, tmp_path):
    out = said(auto, f"--dataset={text}", *PLAIN, f"--runs_dir={tmp_path}", "--seed=3")
    command, config = printed(out)
    (program, words), = begun.begun
    assert program == sys.executable == words[0]
    assert words[1:] == [str(ROOT / "train_gpt.py"), *command]
    assert (config.seed, config.run_id) == (3, "auto_small-text_60m_seed3")


@pytest.mark.parametrize("field", [
    "num_epochs=5", "num_models=2", "weight_decay=0.25", "kd_alpha=0.3", "train_tokens=1_000",
    "selection_tokens=0", "final_mixture=uniform", "split_tokens=0", "run_id=mine",
    "wd_schedule=0:1,0.5:0.25", "eval_tokens=150", "kd_epoch_factor=2", "dropout=0.0"])
def test_a_field_that_is_given_is_left_as_given(field, text, begun):
    out = said(auto, f"--dataset={text}", *PLAIN, f"--{field}", "--dry_run")
    command, config = printed(out)
    name, _, value = field.partition("=")
    assert f"--{field}" in command
    assert getattr(config, name) == getattr(make_config("cpu", **{name: value}), name)
    assert main("check", *command)[0] == 0


def test_a_text_of_one_document_has_no_selection_and_no_learned_mixture(begun, tmp_path):
    folder = make_dataset(tmp_path / "one", documents=(1, 8, 8), length=400)
    out = said(auto, f"--dataset={folder}", *PLAIN, "--minutes=1000", "--dry_run")
    command, config = printed(out)
    assert (config.selection_tokens, config.final_mixture) == (0, "uniform")
    assert config.num_models == 7 and main("check", *command)[0] == 0


def test_part_of_a_text_has_a_selection_that_is_not_refused(text, begun):
    """A tenth of that part, in whole documents: of 80 tokens, in two, the first is too much."""
    out = said(auto, f"--dataset={text}", *SMALL, "--minutes=0.0006", "--dry_run")
    command, config = printed(out)
    assert config.num_epochs == 1 and config.train_tokens < 100
    assert config.selection_tokens == 0
    assert main("check", *command)[0] == 0


def test_long_held_out_texts_are_scored_in_part_on_a_cpu(begun, tmp_path, monkeypatch):
    folder = make_dataset(tmp_path / "long", documents=(60, 8, 450), length=500)
    arguments = [f"--dataset={folder}", *PLAIN, "--dry_run"]
    assert printed(said(auto, *arguments))[1].eval_tokens == 200_000
    assert printed(said(auto, *arguments, "--eval_tokens=0"))[1].eval_tokens == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert printed(said(auto, *arguments))[1].eval_tokens == 0


def test_a_large_text_is_mini_s_on_gpus(begun, tmp_path, monkeypatch):
    """A step there takes as long on two as half of one; and without them it is cpu's."""
    folder = make_dataset(tmp_path / "large", documents=(4_200, 8, 8), length=500)
    arguments = [f"--dataset={folder}", "--compile=false", "--num_layers=1", "--model_dim=32",
                 "--num_heads=1"]
    out = said(auto, *arguments, "--device=cpu", "--dry_run")
    config = printed(out)[1]
    assert (config.track, config.num_epochs) == ("cpu", auto.SIZES[-1].fields["num_epochs"])
    assert "2,100,000 tokens: settings for 800,000" in out
    with monkeypatch.context() as patch:
        have_gpus(patch, 3)
        patch.setattr(auto, "start_runtime", lambda config: Runtime())
        out = said(auto, *arguments)
    assert "settings for 4,000,000" in out and "a step takes 0.050 s, with a teacher 0.100 s" in out
    command, config = printed(out)
    assert (config.track, config.train_tokens) == ("mini", 2_100_000)
    assert config.selection_tokens == 60_000
    assert begun.begun[0][1][1:] == ["-m", "torch.distributed.run", "--standalone",
                                     "--nproc_per_node=2", str(ROOT / "train_gpt.py"), *command]


def test_an_epoch_has_the_steps_of_its_rows(text, begun):
    """With tokens that are cut in two, without the documents of selection."""
    out = said(auto, f"--dataset={text}", *SMALL, "--minutes=5", "--dry_run")
    config = printed(out)[1]
    documents = load_dataset(text, config).train
    pairs = np.load(text / "tokens.npz")["pairs"]
    tokens = np.concatenate(documents)
    count = len(tokens) + round(0.14 * np.count_nonzero(pairs[tokens, 0] >= 0))
    steps = math.ceil((count - 1) / 64) / 4
    assert int(re.search(r"an epoch (\d+) steps", out)[1]) == round(steps)
    untaught, taught = (sum(pair) for pair in zip(*(
        (0, 1) if config.kd_alpha and number >= config.kd_from else (1, 0)
        for number in range(1, config.num_models + 1))))
    needed = 12 * steps * (0.1 * untaught + 0.2 * 3 * taught)
    shown, seconds = re.search(r" in (\d+):(\d\d): the largest of its plans", out).groups()
    assert 60 * int(shown) + int(seconds) == int(needed) <= 0.9 * 5 * 60


# ==== A run that was begun ======================================================================
ODD = dict(seed="7", dropout="0.1234567", wd_schedule="0:0.1,0.3333333333333333:1.7",
           weight_decay="0.1", matrix_lr="0.0123", spelling="false", window_pattern="SL",
           average="weights", time_limit="3", loss_chunk="4096", hang_minutes="7")


def begin(config, hashes=None):
    """Begin the run of a Config, as train_gpt.py does, in its folder; returns that."""
    folder, _, _, _, lock = claim(config, {}, hashes or {}, Runtime())
    lock.close()
    return folder


@pytest.mark.parametrize("changes", [{}, ODD], ids=["as it is", "changed"])
@pytest.mark.parametrize("track", TRACKS)
def test_settings_of_a_run_come_back_exactly(track, changes, tmp_path):
    config = make_config(track, dtype="float32", runs_dir=str(tmp_path), run_id="run", **changes)
    found, fields = auto.settings_there(begin(config))
    assert found == track and all(isinstance(text, str) for text in fields.values())
    assert differing(make_config(found, **fields), config) <= {*FREE, "dataset"}
    assert set(fields) == set(asdict(config)) - {*FREE, "dataset", "track", "preset"}


def test_there_are_no_settings_where_no_run_was_begun(tmp_path):
    assert auto.settings_there(tmp_path) is None
    assert auto.settings_there(tmp_path / "none") is None


def test_a_run_that_was_begun_goes_on_with_its_own_settings(text, begun, tmp_path, monkeypatch):
    """Nothing is timed or chosen again, and train_gpt.py finds nothing changed."""
    arguments = [f"--dataset={text}", *PLAIN, f"--runs_dir={tmp_path}", "--weight_decay=0.123",
                 "--minutes=7"]
    _, first = printed(said(auto, *arguments, "--dry_run"))
    folder = begin(replace(first, dtype="float32"), {"a shard": "1"})
    for name in ("step_seconds", "choose", "read_text"):
        monkeypatch.setattr(auto, name, never)
    for more in ([], ["--dry_run"]):
        out = said(auto, *arguments, *more)
        assert f"{folder} was begun" in out
        command, config = printed(out)
        assert differing(config, first) == {"dtype"} and config.dtype == "float32"
        assert len(begun.begun) == 1
        assert identify(config, folder, {"a shard": "1"}) == (True, [], [])
    assert begun.begun[0][1][2:] == command
    _, config = printed(said(auto, *arguments, "--num_models=9"))
    with pytest.raises(UserError, match="num_models=9 .was "):
        identify(config, folder, {"a shard": "2"})


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"seed": "1"}'])
def test_a_run_json_that_is_not_whole_is_one_line(content, text, begun, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/run.json").write_text(content)
    err = complaint(auto, f"--dataset={text}", f"--runs_dir={tmp_path}", "--run_id=mine")
    assert "run.json: cannot be read" in err and not begun.begun and not begun.chosen


# ==== Steps that are timed ======================================================================
@pytest.mark.parametrize("changes", [
    dict(), dict(num_models=4, kd_from=3, kd_alpha=0.0, continue_members=True),
    dict(train_tokens=300, num_epochs=1, kd_epoch_factor=3)], ids=str)
def test_some_steps_are_timed(changes, text, monkeypatch):
    """The last ones of a member, of whom a second then has it as its teacher; however few a member
    has. What is trained then has nothing to do with the trainer's settings."""
    config = make_config("cpu", **{**dict(
        preset="toy", vocab_size=VOCAB, train_tokens=3000, selection_tokens=100, device="cpu",
        batch_rows=4, dtype="float32", final_mixture="uniform"), **changes})
    data = load_dataset(text, config)
    before, steps, train_step = asdict(config), [], auto.train_step
    rows = Member(1, Trainer(replace(config, kd_alpha=0), Runtime(), data.tables), data).rows

    def noted(trainer, member):
        steps.append((member.number, member.step, member.distill, len(trainer.teachers)))
        train_step(trainer, member)

    monkeypatch.setattr(auto, "train_step", noted)
    seconds = auto.step_seconds(config, Runtime(), data)
    assert len(seconds) == 2 and all(0 < value < 60 for value in seconds)
    assert asdict(config) == before
    first = max(0, rows.num_steps - 7)
    assert steps == [(number, first + i, number == 2, number - 1)
                     for number, i in itertools.product((1, 2), range(7))]


def test_median_of_the_steps_after_the_first_two(text, monkeypatch):
    config = make_config("cpu", preset="toy", vocab_size=VOCAB, train_tokens=1000,
                         selection_tokens=100, device="cpu", batch_rows=4)
    data = load_dataset(text, config)
    clock, durations = [0.0], iter([90, 50, 3, 1, 2, 8, 4, 90, 50, 7, 9, 6, 11, 30])

    def step(trainer, member):
        clock[0] += next(durations)
        member.step += 1

    monkeypatch.setattr(auto, "train_step", step)
    monkeypatch.setattr(auto.time, "perf_counter", lambda: clock[0])
    assert auto.step_seconds(config, Runtime(), data) == [3, 9]


# ==== A whole run ===============================================================================
def test_a_run_from_the_command_line(text, tmp_path, monkeypatch):
    """In a process of its own; the same command then shows it."""
    arguments = [f"--dataset={text}", *SMALL, "--minutes=0.02", f"--runs_dir={tmp_path}",
                 "--dtype=float32"]
    done = python(AUTO, "--track=auto", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    line, = (line for line in done.stdout.splitlines() if "./run.sh" in line)
    command, config = printed(line)
    folder = tmp_path / "auto_small-text_0.02m_seed1"
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert result["config"] == json.loads(json.dumps(asdict(config)))
    assert len(result["members"]) == config.num_models
    begun = []
    monkeypatch.setattr(os, "execv", lambda *words: begun.append(words[1]))
    for name in ("step_seconds", "choose"):
        monkeypatch.setattr(auto, name, never)
    assert "was begun" in said(auto, *arguments)
    code, out, err = main(*begun[0][2:])
    assert (code, err) == (0, "") and "this run is finished" in out


# ==== What is refused ===========================================================================
@pytest.mark.parametrize("arguments, words", [
    ([], "--dataset=FOLDER is wanted"), (["--dataset="], "--dataset=FOLDER is wanted"),
    (["--minutes=5"], "--dataset=FOLDER is wanted"),
    (["--dataset=x", "--track=cpu"], "--track=cpu: auto chooses that itself"),
    (["--dataset=x", "--preset=toy"], "--preset=toy: auto chooses that itself"),
    (["--dataset=x", "--minutes=x"], "--minutes=x: must be a number"),
    (["--dataset=x", "--minutes="], "--minutes=: must be a number"),
    (["--dataset=x", "--minutes=0"], "--minutes=0: must be above 0"),
    (["--dataset=x", "--minutes=-3"], "--minutes=-3: must be above 0"),
    (["--dataset=x", "--minutes=nan"], "--minutes=nan: must be above 0"),
    (["--dataset=x", "--minutes=inf"], "--minutes=inf: must be above 0"),
    (["--dataset=x", "--num_epoch=3"], "unknown field or option 'num_epoch'; did you mean num_epo"),
    (["--dataset=x", "--minute=3"], "unknown field or option 'minute'; did you mean minutes?"),
    (["--dataset=x", "--dataset=y"], "--dataset is given twice"),
    (["--dataset=x", "train"], "'train' is not --field=value"),
    (["--dataset=no such folder"], "no dataset with a meta.json")], ids=str)
def test_arguments_that_cannot_be(arguments, words, monkeypatch):
    monkeypatch.setattr(os, "execv", never)
    for more in ([], ["--dry_run"], ["--track=auto"]):
        assert words in complaint(auto, *arguments, *more)


@pytest.mark.parametrize("field, words", [
    ("num_epochs=x", "--num_epochs=x: must be a whole number"),
    ("num_epochs=0", "--num_epochs=0: must be from 1"), ("device=gpu", "--device=gpu: must be one"),
    ("train_tokens=9_000", "3,000 tokens in train, below --train_tokens=9000"),
    ("selection_tokens=2000", "more than half"), ("num_heads=7", "--num_heads=7 does not divide"),
    ("vocab_size=99", "set --vocab_size=100"), ("run_id=a b", "--run_id=a b: must match"),
    ("final_mixture=learn", "--final_mixture=learn: must be one of")])
def test_fields_that_cannot_be(field, words, text, begun):
    assert words in complaint(auto, f"--dataset={text}", *PLAIN[1:], f"--{field}")
    assert not begun.begun


def test_folders_that_are_no_dataset(text, begun, tmp_path):
    (tmp_path / "empty").mkdir()
    for meta in (None, "{}", '{"vocab_size": 100}', '{"vocab_size": 100, "splits": {}}',
                 '{"splits": {"train_000000": {"tokens": 5}}}'):
        if meta:
            (tmp_path / "empty/meta.json").write_text(meta)
        err = complaint(auto, f"--dataset={tmp_path / 'empty'}")
        assert "no dataset with a meta.json" in err and str(tmp_path / "empty") in err
    (tmp_path / "empty/meta.json").write_text("{")
    assert "meta.json: cannot be read" in complaint(auto, f"--dataset={tmp_path / 'empty'}")
    bare = make_dataset(tmp_path / "bare", tables=False)
    assert "tokens.npz: cannot be read" in complaint(auto, f"--dataset={bare}", *PLAIN)
    assert not begun.begun


def test_help_is_the_docstring():
    for arguments in (["--help"], ["--track=auto", "-h"]):
        assert said(auto, *arguments).strip() == auto.__doc__.strip()
