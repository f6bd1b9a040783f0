"""A student of any size that another run's members teach (tools/distill.py), on small runs.

    python -m pytest tests/test_distill.py
"""
import hashlib
import json
import math
import re
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import distill
import eval as evaluation
import sample
from _runs import load_member, read_result
from helpers import (ROOT, TINY, complaint, losses, main, python, random_tokens, randomize,
                     read_run, said, saved_logps, tool, torchrun, train)
from train_gpt import (GPT, TRACKS, Log, Rows, Runtime, Trainer, dataset_folder, load_dataset,
                       make_config, member_path, step_flops, token_logits, training_stages,
                       write_tensors)

DISTILL = str(ROOT / "tools/distill.py")
SMALL = ["--model_dim=32", "--num_heads=1", "--num_layers=1", "--kd_epoch_factor=2",
         "--dropout=0.1"]
PARTS = "_model_dim32_num_heads1_num_layers1_kd_epoch_factor2_dropout0.1"


def digest(tensors):
    """Of {name: tensor}, by what is in them."""
    parts = [name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of two members that nobody teaches, of 2 blocks of width 64."""
    return train(tmp_path_factory.mktemp("runs"), "--track=cpu", "--num_models=2", "--kd_alpha=0",
                 "--spelling=false")


@pytest.fixture(scope="module")
def student(base):
    """Its student of 1 block of width 32; teachers: a digest of the teacher's weights by step."""
    teachers, gradients = [], Trainer.gradients

    def noted(trainer, *arguments):
        teachers.append(digest(trainer.teacher.state_dict()))
        return gradients(trainer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "gradients", noted)
        console = said(distill, base.folder, *SMALL)
    run = read_run(base.folder.with_name(f"{base.folder.name}_student{PARTS}"), console)
    return SimpleNamespace(run=run, teachers=teachers, config=read_result(run.folder)[1])


# ==== The student ===============================================================================
def test_a_student_has_the_fields_of_its_teachers_but_for_those_that_are_given(base, student):
    given = dict(model_dim=32, num_heads=1, num_layers=1, kd_epoch_factor=2, dropout=0.1)
    changed = dict(num_models=1, kd_from=1, kd_alpha=0.7, kd_teachers=2, final_mixture="uniform",
                   continue_members=False, run_id=student.run.folder.name,
                   seed=base.result["seed"] + 1000)
    assert student.run.result["config"] == {**base.result["config"], **given, **changed}
    assert student.run.result["overrides"] == {**base.result["overrides"], **given, **changed}
    weights = load_file(student.run.folder / "members/001.safetensors")
    assert weights["wte.weight"].shape == (2048, 32)
    assert {name.split(".")[1] for name in weights if name.startswith("blocks.")} == {"0"}


def test_it_is_one_member_of_num_epochs_times_kd_epoch_factor_epochs(base, student):
    assert len(student.run.result["members"]) == len(student.run.result["ensemble"]) == 1
    an_epoch, = re.findall(r"data .*: ([\d,]+) tokens an epoch", student.run.console)
    pairs = np.load(ROOT / "data/prose/tokens.npz")["pairs"]
    data = load_dataset(ROOT / "data/prose", student.config)
    tokens = np.concatenate(data.train)
    assert len(tokens) == int(an_epoch.replace(",", ""))
    cut = round(0.14 * np.count_nonzero(pairs[tokens, 0] >= 0))
    rows = math.ceil((len(tokens) + cut - 1) / 64)
    steps = math.ceil(2 * rows / 4)
    assert [m["step"] for m in student.run.steps] == list(range(1, steps + 1))
    assert student.run.steps[-1]["epoch"] == 2
    assert len(base.steps) == 2 * math.ceil(rows / 4)
    assert "track     cpu: 1 model(s) x 2 epochs" in student.run.console


def test_it_is_taught_in_each_step_by_one_of_all_members(base, student):
    files = [digest(load_file(member_path(base.folder, number))) for number in (1, 2)]
    assert len(student.teachers) == len(student.run.steps)
    counts = [student.teachers.count(file) for file in files]
    assert sum(counts) == len(student.teachers) and min(counts) >= len(student.teachers) / 5
    assert all(m["kl"] > 0 for m in student.run.steps)
    assert all(m["kl"] == 0 for m in base.steps)


def test_its_cost_is_that_of_both_sizes(base, student):
    """6 and 2 a weight of a matrix product, 12 and 4 a channel and key that a query sees."""
    def sizes(folder):
        weights = load_file(member_path(folder, 1))
        return sum(p.numel() for name, p in weights.items() if name != "wte.weight")

    def keys(window):
        return sum(min(position, window) + 1 for position in range(64)) / 64

    forward = 2 * sizes(base.folder) + 4 * 64 * 2 * keys(64)
    early, late = (6 * sizes(student.run.folder) + 12 * 32 * keys(window) for window in (32, 64))
    steps = len(student.run.steps)
    total = sum((early if step / steps < 0.5 else late) + forward for step in range(steps)) * 256
    assert student.run.result["members"][0]["train_flops"] == pytest.approx(total, rel=1e-12)
    assert student.run.result["train_flops"] == pytest.approx(total, rel=1e-12)
    by_stage, teacher = step_flops(student.config, read_result(base.folder)[1])
    stages = training_stages(replace(student.config, num_epochs=2))
    assert [by_stage[stage] for stage in stages] == pytest.approx([early, late], rel=1e-12)
    assert teacher == pytest.approx(forward, rel=1e-12)


def test_keeps_lines_are_of_the_log_p_in_the_folders(base, student):
    teachers, (own,) = saved_logps(base), saved_logps(student.run)
    lines = re.findall(r"^keeps on (\w+) +(\S+)% .*: member 1 (\S+), mixture (\S+), student (\S+)$",
                       student.run.console, re.M)
    assert [line[0] for line in lines] == ["val", "holdout"]
    for split, *shown in lines:
        alone = -teachers[0][split].mean()
        mixture = -np.log((np.exp(teachers[0][split]) + np.exp(teachers[1][split])) / 2).mean()
        loss = -own[split].mean()
        share = 100 * (alone - loss) / (alone - mixture)
        assert [float(number) for number in shown] == pytest.approx(
            [share, alone, mixture, loss], abs=0.051)
        assert [float(number) for number in shown[1:]] == pytest.approx(
            [alone, mixture, loss], abs=6e-5)


def test_of_one_teacher_the_mixture_is_that_alone(base, student):
    """Member 2 against member 1; and where there is nothing to keep, nothing is divided."""
    one, two = ([-logp[split].mean() for split in ("val", "holdout")]
                for logp in saved_logps(base))
    lines = distill.kept_lines(base.folder, [2], student.run.result)
    for line, alone, other in zip(lines, one, two):
        assert f"member 1 {alone:.4f}, mixture {other:.4f}," in line
    lines = distill.kept_lines(base.folder, [1], student.run.result)
    assert len(lines) == 2 and all(" n/a of what the mixture gains" in line for line in lines)


# ==== Teachers ==================================================================================
def teacher_trainer(folder, numbers, config, **changes):
    """A Trainer of a student whose teachers are members `numbers` of the run in `folder`."""
    runtime = Runtime()
    teachers = distill.load_teachers(folder, numbers, config, runtime)
    own = replace(config, num_models=1, kd_from=1, kd_alpha=0.7, dtype="float32", **changes)
    data = load_dataset(dataset_folder(own), own)
    return Trainer(own, runtime, data.tables, teachers[:2]), data


@pytest.mark.parametrize("track", TRACKS)
def test_hidden_states_of_a_teacher_are_those_of_its_own_model(track, tmp_path):
    """Of a size of its own, with all that a track's models have, in the last stage of training."""
    config = make_config(track, preset="toy")
    for number in (1, 2):
        weights = {name: p.detach() for name, p in
                   randomize(GPT(config), number).named_parameters()}
        write_tensors(member_path(tmp_path, number), weights, {})
    trainer, _ = teacher_trainer(tmp_path, [1, 2], config, model_dim=96, num_heads=3,
                                 num_layers=3, mtp_weight=0)
    tokens = random_tokens(config, 2, config.seq_len)
    found = []
    for number, weights in zip((1, 2), trainer.teachers):
        trainer.teacher.load_state_dict(weights, assign=True)
        member = load_member(tmp_path, number, config, Runtime())
        with torch.no_grad():
            found.append(trainer.forward(trainer.teacher, tokens, trainer.teacher_specs))
            assert torch.equal(found[-1], member(tokens))
    assert not torch.isclose(*found, atol=0.1).all()
    assert trainer.model.config.model_dim == 96 and trainer.teacher.config.model_dim == 64


@pytest.mark.parametrize("number", [1, 2])
def test_kl_of_a_step_is_that_of_all_logits_to_the_members(number, base):
    """And the whole loss has (1 - alpha) of the cross-entropy, whose gradient goes to the student
    alone; by autograd from logits that are all there."""
    config = read_result(base.folder)[1]
    trainer, data = teacher_trainer(base.folder, [number], config, model_dim=32, num_heads=1,
                                    num_layers=1, second_weight=(), third_weight=())
    trainer.teacher.load_state_dict(trainer.teachers[0], assign=True)
    randomize(trainer.model)
    inputs, targets = Rows(data.train, 64, 4, 1, 1001, data.bos).step(0)
    sums = trainer.gradients(inputs, targets, 0.9, True)
    grads = {name: p.grad for name, p in trainer.model.named_parameters()}
    assert all(p.grad is None for p in trainer.teacher.parameters())
    logps = []
    for model in (trainer.model, load_member(base.folder, number, config, Runtime())):
        hidden = model(inputs).flatten(0, 1)
        logits, similar, _ = token_logits(hidden, model.head.weight, targets.flatten(), config, 64)
        logps.append(torch.cat((logits, similar), dim=1).log_softmax(dim=1))
    own, taught = logps
    counted = targets.flatten() >= 0
    q = taught[counted].exp()
    kl = torch.where(q > 0, q * (taught[counted] - own[counted]), 0).sum(dim=1).mean()
    assert sums["kl"].item() == pytest.approx(kl.item(), rel=1e-4)
    trainer.model.zero_grad()
    earlier = torch.ones(64, 64, dtype=torch.bool).tril(-1)
    same = (targets[:, :, None] == targets[:, None, :]) & earlier & (targets[:, :, None] >= 0)
    right = torch.cat((torch.nn.functional.one_hot(targets.flatten().clamp(min=0), 2048).bool(),
                       same.flatten(0, 1)), dim=1)
    ce = -torch.where(right, own, -torch.inf)[counted].logsumexp(dim=1).mean()
    assert sums["train_loss"].item() == pytest.approx(ce.item(), rel=1e-4)
    (0.3 * ce + 0.7 * kl).backward()
    for name, p in trainer.model.named_parameters():
        assert (grads[name] - p.grad).abs().max() <= 1e-3 * p.grad.abs().max() + 1e-7, name


def captured(monkeypatch, *arguments):
    """(Config, overrides, teachers) that distill.py gives to run()."""
    calls = []

    def stopped(*found):
        calls.append(found)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distill, "run", stopped)
        assert tool(distill, *arguments)[0] == 130
    return calls[0]


def test_kd_teachers_are_the_last_members(base, monkeypatch):
    for count, numbers in ((1, [2]), (2, [1, 2]), (99, [1, 2])):
        config, _, (_, weights, hashes) = captured(monkeypatch, base.folder,
                                                   f"--kd_teachers={count}")
        assert config.kd_teachers == count
        assert [digest(tensors) for tensors in weights] == [
            digest(load_file(member_path(base.folder, number))) for number in numbers]
        assert hashes == {
            f"teacher {number}": hashlib.sha256(member_path(base.folder, number).read_bytes())
            .hexdigest() for number in numbers}


# ==== Its settings and its folder ===============================================================
def test_without_fields_it_is_of_the_members_size(base, monkeypatch):
    config, overrides, _ = captured(monkeypatch, base.folder)
    theirs = read_result(base.folder)[1]
    assert config == replace(theirs, num_models=1, kd_from=1, kd_alpha=0.7, kd_teachers=2,
                             run_id=f"{base.folder.name}_student", seed=theirs.seed + 1000)
    assert overrides.pop("kd_from") == 1
    same = make_config("cpu", **{name: value for name, value in overrides.items()
                                 if name != "track"})
    assert replace(same, kd_from=1) == config


def test_its_folder_is_named_by_what_is_given(base, monkeypatch):
    for arguments, name in (
            (["--num_epochs=3", "--save_minutes=1"], "_num_epochs3"),
            (["--wd_schedule=0:1,0.5:0.25"], "_wd_schedule0-1-0.5-0.25"), (["--seed=2"], "_seed2")):
        config, _, _ = captured(monkeypatch, base.folder, *arguments)
        assert config.run_id == f"{base.folder.name}_student{name}"
    config, _, _ = captured(monkeypatch, base.folder, "--seed=2", "--run_id=mine")
    assert (config.run_id, config.seed) == ("mine", 2)


def test_a_student_may_teach_one_too(student, monkeypatch):
    config, _, (model, weights, _) = captured(monkeypatch, student.run.folder, "--num_layers=2")
    assert (config.kd_from, config.kd_teachers, len(weights)) == (1, 1, 1)
    assert (config.num_layers, config.model_dim) == (2, 32)
    assert model.config == read_result(student.run.folder)[1]


def test_a_student_that_is_stopped_ends_with_the_same_digits(base, student, monkeypatch):
    """With dropout, in its second epoch; and another is refused in its folder."""
    arguments = [base.folder, *SMALL, "--run_id=stopped", "--save_minutes=0"]
    metrics, steps = Log.metrics, len(student.run.steps)

    def until_nearly_the_end(log, **numbers):
        metrics(log, **numbers)
        if numbers.get("step") == steps - 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "metrics", until_nearly_the_end)
        code, _, err = tool(distill, *arguments)
    assert code == 143 and err.startswith(f"stopped   member 1 after step {steps - 3};")
    assert "num_epochs=2 (was 1)" in complaint(distill, *arguments, "--num_epochs=2")
    out = said(distill, *arguments)
    assert f"resumed   member 1 after step {steps - 3}" in out
    stopped = read_run(base.folder.with_name("stopped"))
    assert losses(stopped) == losses(student.run)
    assert stopped.result["train_flops"] == student.run.result["train_flops"]
    for kind in ("", ".logp"):
        ours, theirs = (load_file(member_path(run.folder, 1, kind))
                        for run in (stopped, student.run))
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    kept = [line for line in student.run.console.splitlines() if line.startswith("keeps on ")]
    assert out.splitlines()[-2:] == kept


def test_the_script_shows_a_student_that_is_finished(base, student):
    before = (student.run.folder / "log.txt").read_bytes()
    done = python(DISTILL, base.folder, *SMALL)
    assert (done.returncode, done.stderr) == (0, "")
    assert "this run is finished" in done.stdout
    assert done.stdout.splitlines()[-2:] == student.run.console.splitlines()[-2:]
    assert (student.run.folder / "log.txt").read_bytes() == before


def test_teachers_that_have_changed_are_named(base, student, tmp_path):
    """Of a run that lies elsewhere: it is known by what is in its files."""
    folder = tmp_path / base.folder.name
    shutil.copytree(base.folder, folder)
    assert "this run is finished" in said(distill, folder, *SMALL)
    path = member_path(folder, 2)
    weights = load_file(path)
    weights["wte.weight"][5, 5] += 1
    save_file(weights, path, {"facts": "{}"})
    err = complaint(distill, folder, *SMALL)
    assert "teacher 2=" in err and "teacher 1=" not in err and student.run.folder.name in err


@pytest.mark.slow
def test_two_processes_train_the_same_student(base, student):
    """But for rounding and dropout, which differs between them: it has none here."""
    found = []
    for processes, name in ((1, "one"), (2, "two")):
        arguments = [DISTILL, base.folder, *SMALL, "--dropout=0", f"--run_id={name}"]
        done = torchrun(processes, *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("keeps on val") == 1
        found.append(read_run(base.folder.with_name(name)))
    one, two = ([m["kl"] for m in run.steps] for run in found)
    assert two[:3] == pytest.approx(one[:3], rel=1e-4)
    assert two == pytest.approx(one, rel=0.02)


# ==== Other tools ===============================================================================
def test_its_text_can_be_written(student):
    writer = sample.load(student.run.folder, "student")
    assert writer.name == "member 1, a student"
    assert writer.generate_text("It was", tokens=5, seed=3)
    assert "member 1, a student writes" in said(sample, student.run.folder, "--member=student",
                                                "--tokens=5")


def test_its_losses_can_be_computed_again(student):
    lines = said(evaluation, student.run.folder).splitlines()
    member = student.run.result["members"][0]
    assert f"member 1, taught   {member['val_loss']:.4f}   {member['holdout_loss']:.4f}" in lines


# ==== What is refused ===========================================================================
@pytest.mark.parametrize("name, value", [
    ("track", "mini"), ("preset", "toy"), ("dataset", "data/fineweb"), ("train_tokens", 4000),
    ("selection_tokens", 500), ("eval_tokens", 100), ("vocab_size", 100), ("seq_len", 32),
    ("row_memory", "false"), ("softcap", 9), ("num_models", 2), ("kd_from", 1)])
def test_what_teachers_and_student_share_cannot_be_given(name, value, base):
    assert name in distill.SHARED
    err = complaint(distill, base.folder, f"--{name}={value}")
    assert err.startswith(f"error: --{name}: a student has its teachers'")


@pytest.mark.parametrize("arguments, words", [
    (["--kd_alpha=0"], "--kd_alpha=0: it would be taught by nobody"),
    (["--num_layer=2"], "unknown field 'num_layer'; did you mean num_layers?"),
    (["--num_heads=x"], "--num_heads=x: must be a whole number"),
    (["--model_dim=31"], "--model_dim=31: must be from 32"),
    (["--num_heads=3"], "--num_heads=3 does not divide --model_dim=64"),
    (["--kd_teachers=0"], "--kd_teachers=0: must be from 1"),
    (["model_dim=32"], "'model_dim=32' is not --field=value"),
    (["--seed=1", "--seed=2"], "--seed is given twice")], ids=lambda value: str(value)[:20])
def test_settings_that_cannot_be(arguments, words, base):
    before = sorted(base.folder.parent.iterdir())
    assert words in complaint(distill, base.folder, *arguments)
    assert sorted(base.folder.parent.iterdir()) == before


def test_runs_that_cannot_teach(base, tmp_path):
    for arguments in ([], ["--model_dim=64"]):
        assert "give a finished run first" in complaint(distill, *arguments)
    assert "no finished run" in complaint(distill, tmp_path / "none")
    (tmp_path / "begun").mkdir()
    shutil.copy(base.folder / "run.json", tmp_path / "begun")
    assert "no finished run" in complaint(distill, tmp_path / "begun")
    (tmp_path / "mixture").mkdir()
    result = {**base.result, "runs": ["runs/a", "runs/b"]}
    (tmp_path / "mixture/result.json").write_text(json.dumps(result))
    err = complaint(distill, tmp_path / "mixture")
    assert "a mixture of runs" in err and "runs/a, runs/b" in err


def test_teachers_whose_weights_are_gone(base, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(base.folder, folder)
    member_path(folder, 2).unlink()
    assert "members/002.safetensors" in complaint(distill, folder)


def test_help_is_the_docstring():
    assert said(distill, "--help").strip() == distill.__doc__.strip()
    assert said(distill, "runs/ID", "-h").strip() == distill.__doc__.strip()


def test_a_run_by_itself_has_no_student_that_is_its_first_member(tmp_path):
    code, out, err = main(*TINY, "--track=cpu", f"--runs_dir={tmp_path}", "--kd_from=1")
    assert (code, out) == (2, "") and not list(tmp_path.iterdir())
    assert re.fullmatch("error: --kd_from=1: must be from 2 [^\n]*\n", err)
