"""README's "Try an idea": its diffs apply to the script, are as small as they claim, and work.

    python -m pytest tests/test_ideas.py
"""
import importlib.util
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

import train_gpt
from helpers import ROOT, TINY, python, read_run, relative_error, randn, torchrun

README = (ROOT / "README.md").read_text(encoding="utf-8")
DIFFS = dict(zip(("warmup", "z_loss", "sgd"), re.findall(r"```diff\n(.*?)```", README, re.S)))
PROGRESS = [0.0, 0.01, 0.05, 0.3, 0.7, 0.95]


def of_today(diff, source):
    """A diff with the script's own lines where fields of Config are its context: their defaults and
    tracks may have been edited."""
    field = r"    (\w+): \w+ = opt\(.*$"
    lines = {found[1]: found[0] for found in re.finditer("^" + field, source, re.M)}
    return re.sub("^ " + field, lambda found: " " + lines.get(found[1], found[0][1:]), diff,
                  flags=re.M)


@pytest.fixture(scope="module", params=DIFFS)
def idea(request, tmp_path_factory):
    """(name, folder with the changed script and what it needs)."""
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copy(ROOT / "train_gpt.py", folder)
    shutil.copytree(ROOT / "data", folder / "data", ignore=shutil.ignore_patterns("fineweb"))
    diff = of_today(DIFFS[request.param], (ROOT / "train_gpt.py").read_text(encoding="utf-8"))
    done = subprocess.run(["git", "apply", "-"], cwd=folder, input=diff, text=True,
                          capture_output=True)
    assert done.returncode == 0, f"{request.param}: regenerate it for README: {done.stderr}"
    return request.param, folder


@pytest.fixture
def changed(idea):
    """The changed script as a module."""
    name, folder = idea
    spec = importlib.util.spec_from_file_location(f"train_gpt_{name}", folder / "train_gpt.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module         # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def changed_lines(diff):
    """{heading of a hunk: its added and removed lines, blank ones and comments not counted}."""
    hunks = {}
    for line in diff.splitlines():
        if line.startswith("@@"):
            heading = line.rpartition("@@")[2].strip()
        elif re.match(r"[+-](?![+-]{2} )\s*[^\s#]", line):
            hunks.setdefault(heading, []).append(line)
    return hunks


def test_there_are_three_and_they_are_small():
    assert len(DIFFS) == 3
    warmup, z_loss, sgd = (changed_lines(diff) for diff in DIFFS.values())
    assert sum(map(len, warmup.values())) <= 4
    config_line = z_loss.pop("class Config:")
    assert len(config_line) == 1
    assert len(z_loss) <= 2 and sum(map(len, z_loss.values())) <= 6
    assert len(sgd.pop("class Config:")) == 1
    assert len(sgd.pop("def parameter_table(c):")) == 2         # the row before and after
    assert sum(map(len, sgd.values())) <= 25


def test_switched_off_it_changes_nothing(idea, changed):
    name, _ = idea
    config, before = changed.make_config("limited"), train_gpt.make_config("limited")
    if name == "warmup":
        for progress in PROGRESS:
            assert changed.lr_multiplier(config, progress) == train_gpt.lr_multiplier(
                before, progress)
    elif name == "z_loss":
        spec = {module: module.LossSpec(torch.ones(1), 0.0, module.make_config(
            "limited", vocab_size=20)) for module in (changed, train_gpt)}
        batch = (randn(6, 8), randn(64, 8, seed=1), torch.arange(6)[:, None], None)
        ours, theirs = (module.loss_chunk(*batch, spec[module]) for module in spec)
        assert ours[0]["loss"] == theirs[0]["loss"] and ours[0]["z_loss"] == 0
        assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])
    else:
        row = changed.find_row(changed.parameter_table(config), "blocks.0.attn.q.weight")
        assert row == train_gpt.find_row(train_gpt.parameter_table(before),
                                         "blocks.0.attn.q.weight")


def test_it_does_what_it_says(idea, changed):
    name, _ = idea
    if name == "warmup":
        config = changed.make_config("cpu", lr_warmup=0.1)
        flat = [changed.lr_multiplier(config, progress) for progress in (0.0, 0.05, 0.1, 0.3)]
        assert flat == pytest.approx([0, 0.5, 1, 1])
    elif name == "z_loss":
        config = changed.make_config("cpu", vocab_size=20, softcap=5.0, z_weight=0.3)
        hidden = randn(6, 8).requires_grad_()
        weight = randn(64, 8, seed=1).requires_grad_()
        targets = torch.tensor([3, 5, -1, 0, 19, 7])
        logits = 5.0 * torch.tanh(hidden @ weight[:20].T / 5.0)
        counted = targets >= 0
        ce = torch.nn.functional.cross_entropy(logits[counted], targets[counted], reduction="sum")
        (ce + 0.3 * (logits.logsumexp(dim=1)[counted] ** 2).sum()).backward()
        spec = changed.LossSpec(torch.ones(1, dtype=torch.float64), 0.0, config)
        sums, grad_hidden, grad_weight = changed.loss_chunk(
            hidden.detach(), weight.detach(), targets[:, None], None, spec)
        assert relative_error(grad_hidden, hidden.grad) < 1e-12
        assert relative_error(grad_weight, weight.grad) < 1e-12
        assert float(sums["loss"] - sums["train_loss"]) == pytest.approx(float(sums["z_loss"]))
    else:
        config = changed.make_config("cpu", matrix_optimizer="sgd", matrix_lr=0.1, spelling=False)
        p = torch.nn.Parameter(randn(3, 4, dtype=torch.float32))
        expected, momentum = p.detach().double().numpy().copy(), 0.0
        optimizer = changed.MuonAdamW([("blocks.0.attn.q.weight", p)], config)
        for step in range(3):
            grad = randn(3, 4, seed=step + 1, dtype=torch.float32)
            p.grad = grad.clone()
            optimizer.step(1.0, 1.0, 0.9)
            momentum = 0.9 * momentum + grad.double().numpy()
            expected = expected * (1 - 0.1 * config.weight_decay) - 0.1 * momentum
        assert relative_error(p, np.float64(expected)) < 1e-6


def test_a_run_with_it(idea, tmp_path):
    """At toy size, on one process; the optimizer on two as well, with its state in the run's."""
    name, folder = idea
    flag = {"warmup": "--lr_warmup=0.2", "z_loss": "--z_weight=0.01",
            "sgd": "--matrix_optimizer=sgd"}[name]
    arguments = ["train_gpt.py", "--track=cpu", *TINY, "--num_models=1",
                 "--final_mixture=learned", f"--runs_dir={tmp_path}", flag]
    done = python(*arguments, "--run_id=one", cwd=folder)
    assert done.returncode == 0, done.stderr
    run = read_run(tmp_path / "one")
    if name == "warmup":
        rates = [step["lr_multiplier"] for step in run.steps]
        assert rates[0] == 0 and 0 < rates[1] < rates[2]
    elif name == "z_loss":
        assert all(0 < step["z_loss"] < step["train_loss"] for step in run.steps)
    else:
        done = torchrun(2, *arguments, "--run_id=two", "--save_minutes=0.00001", cwd=folder)
        assert done.returncode == 0, done.stderr
        two = read_run(tmp_path / "two")
        assert [s["train_loss"] for s in two.steps] == pytest.approx(
            [s["train_loss"] for s in run.steps], rel=1e-5)


@pytest.mark.parametrize("idea", ["sgd"], indirect=True)
def test_its_state_is_saved(idea, changed, tmp_path):
    config = changed.make_config("cpu", preset="toy", matrix_optimizer="sgd", kd_alpha=0.0)
    runtime = changed.start_runtime(config)
    data = changed.load_dataset(ROOT / config.dataset, config)
    trainer = changed.Trainer(config, runtime, data.tables)
    member = changed.Member(1, trainer, data)
    trainer.start_member(1, 1)
    changed.train_step(trainer, member)
    changed.write_tensors(tmp_path / "state.safetensors", *changed.collect_state(trainer, member))
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        names = {key.partition(".")[0] for key in file.keys() if key.endswith("attn.proj.weight")}
        assert names == {"model", "momentum"}       # of Muon a second moment would be there
        assert file.get_tensor("momentum.blocks.0.attn.proj.weight").abs().sum() > 0
