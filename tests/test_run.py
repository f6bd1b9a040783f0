"""train_gpt.py and run.sh as a user meets them: whole runs at toy size, commands, errors.

    python -m pytest tests/test_run.py
"""
import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_gpt as t
from data.shards import read_shard, write_meta, write_shard
from records import settings

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "train_gpt.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
TOY = ["--preset=toy", "--device=cpu"]
# a second or so in this process: 13 steps a member
TINY = [*TOY, "--dtype=float32", "--num_layers=2", "--batch_rows=4", "--num_epochs=1",
        "--train_tokens=5000", "--eval_tokens=500", "--log_steps=1"]
# the same settings for 1 and 2 processes: 30 steps, looped from the second epoch on, with MTP and
# the meta-gradient
INVARIANCE = ["--track=limited", *TOY, "--dtype=float32", "--dropout=0", "--batch_rows=8",
              "--log_steps=1", "--run_id=run"]


def python(*arguments, **options):
    """A python process with one thread and no trace of a launcher in its environment."""
    env = {k: v for k, v in os.environ.items()
           if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, encoding="utf-8",
                          env=env, timeout=120, **options)


def read_run(folder, console=""):
    """What a run left in its folder."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    return SimpleNamespace(
        folder=folder, console=console, log=(folder / "log.txt").read_text(encoding="utf-8"),
        result=json.loads((folder / "result.json").read_text(encoding="utf-8")), metrics=metrics,
        steps=[m for m in metrics if "step" in m])


def train(runs, *arguments):
    """A run with the TINY settings, and then `arguments`, in this process."""
    out, name = io.StringIO(), f"run{len(list(runs.iterdir()))}"
    with contextlib.redirect_stdout(out):
        assert t.main([*TINY, f"--runs_dir={runs}", f"--run_id={name}", *arguments]) == 0
    return read_run(runs / name, out.getvalue())


def losses(run):
    """Every loss of a run, exactly."""
    return [[m[key] for key in ("train_loss", "selection_loss", "val_loss", "holdout_loss")]
            for m in run.result["members"]] + [p["val_loss"] for p in run.result["ensemble"]]


def kl(run, member):
    return [m["kl"] for m in run.steps if m["member"] == member]


def saved_logps(run):
    """A list of {split: log p(target), fp64 [n]}, one a member."""
    files = sorted(run.folder.glob("members/*.logp.safetensors"))
    return [{split: p.double().numpy() for split, p in load_file(file).items()} for file in files]


def mixture_loss(logps, weights=None):
    """Nats per token of a mixture of models, the obvious way."""
    return -np.log(np.average(np.exp(logps), axis=0, weights=weights)).mean()


# ---- a whole run ----

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    source = Path(SCRIPT).read_text(encoding="utf-8")
    done = python(SCRIPT, "--track=cpu", *TOY, "--num_models=3", "--kd_alpha=0.5",
                  f"--runs_dir={runs}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder, = runs.iterdir()
    return SimpleNamespace(source=source, **vars(read_run(folder, done.stdout)))


def test_console_has_plan_progress_members_table_and_text(toy):
    c, console = toy.result["config"], toy.console
    plan, _, rest = console.partition("\n\n")
    for word in ("track", "data", "model", "steps", "machine", "folder"):
        assert re.search(rf"^{word} ", plan, re.M), word
    assert "3 model(s)" in plan and "alpha 0.5" in plan and str(toy.folder) in plan
    assert "torch " + torch.__version__ in plan and "compile off" in plan
    for k in (1, 2, 3):
        val, mixed = (toy.result[part][k - 1]["val_loss"] for part in ("members", "ensemble"))
        assert re.search(rf"^member {k}/3  step (\d+)/\1 .* loss \d.* tok/s", rest, re.M)
        line, = re.findall(rf"^member {k}/3 done .*$", rest, re.M)
        assert f"{val:.4f}" in line and f"{mixed:.4f}" in line
        row, = re.findall(rf"^ {k}  .*$", rest, re.M)
        assert row.split() == [str(k), f"{val:.4f}", f"{mixed:.4f}",
                               *(f"{toy.result['ensemble'][k - 1][key]:.4f}"
                                 for key in ("val_loss_learned", "val_loss_ngram", "holdout_loss"))]
    assert f"val loss {toy.result['val_loss']:.4f}" in rest and "data efficiency" in rest
    assert f"{toy.result['val_bpb']:.4f} bits per byte" in rest and c["preset"] == "toy"
    text = re.search(r"^member \d writes .*\n\n((?:.*\n)+)", rest, re.M)[1]
    assert len(text.split()) > 20
    assert max(map(len, rest.splitlines())) <= 100


def test_budget_holds_training_and_selection(toy):
    epoch, selection = re.search(r"([\d,]+) tokens an epoch .* ([\d,]+) for sel", toy.console)\
        .groups()
    epoch, selection = (int(n.replace(",", "")) for n in (epoch, selection))
    assert epoch + selection == toy.result["train_tokens"] == 9_000
    assert selection >= toy.result["config"]["selection_tokens"]
    assert len(saved_logps(toy)[0]["selection"]) == selection - 1


def test_log_begins_with_source_and_ends_with_result(toy):
    assert toy.log.startswith(toy.source)
    rest = toy.log.removeprefix(toy.source)
    facts = dict(re.findall(r"^([a-z_0-9]+):(.*)$", rest, re.M))
    facts = {name: json.loads(facts[name]) for name in (
        "commit", "python", "torch", "numpy", "hardware", "data_sha256", "config", "overrides")}
    for name in ("commit", "torch", "hardware", "data_sha256", "config", "overrides"):
        assert facts[name] == toy.result[name]
    assert facts["numpy"] == np.__version__ and facts["config"]["seed"] == 1
    assert set(facts["config"]) == {f.name for f in fields(t.Config)}
    steps = re.findall(r"^chain:0 member:\d step:\d+ .*train_loss:\S+ kl:\S+ .*$", rest, re.M)
    assert len(steps) == len(toy.steps)
    pairs = dict(pair.split(":") for pair in steps[0].split())
    assert {k: float(v) for k, v in pairs.items()} == pytest.approx(toy.steps[0], rel=1e-4)
    last = toy.log.splitlines()[-1]
    assert last.startswith("RESULT ")
    assert json.loads(last.removeprefix("RESULT ")) == toy.result
    for line in toy.console.split("\n\n")[0].splitlines():
        assert line in rest


def test_metrics_have_every_member_and_reading(toy):
    tokens, = re.findall(r"([\d,]+) tokens an epoch", toy.console)
    rows = -(-(int(tokens.replace(",", "")) - 1) // 64)
    steps = -(-2 * rows // 8)                   # of 8 rows, in 2 epochs
    readings = [*range(5, steps, 5), steps]     # every fifth step and the last
    assert len(readings) >= 3
    assert [(m["member"], m["step"]) for m in toy.steps] == [
        (k, step) for k in (1, 2, 3) for step in readings]
    for m in toy.steps:
        assert math.isfinite(m["train_loss"]) and 0 < m["lr_multiplier"] <= 1
        assert m["tokens_per_second"] > 0
    seconds = [m["seconds"] for m in toy.steps]
    assert seconds == sorted(seconds)
    ends = [m for m in toy.metrics if "step" not in m]
    assert [m["val_loss"] for m in ends] == [m["val_loss"] for m in toy.result["members"]]
    assert [m["ensemble_val_loss"] for m in ends] == [
        p["val_loss"] for p in toy.result["ensemble"]]


def test_result_has_what_every_run_reports(toy):
    result = toy.result
    assert result["track"] == "cpu" and result["seed"] == 1
    assert result["overrides"] == {"preset": "toy", "device": "cpu", "num_models": 3,
                                   "kd_alpha": 0.5, "runs_dir": str(toy.folder.parent)}
    assert [p["n"] for p in result["ensemble"]] == [1, 2, 3]
    for member in result["members"]:
        assert {"val_loss", "holdout_loss", "train_seconds"} <= set(member)
        assert member["train_seconds"] > 0
    efficiency = result["data_efficiency"]
    assert set(efficiency) >= {"one_epoch", "tuned", "curve"}
    assert all(isinstance(efficiency[kind], (int, float, str)) for kind in ("one_epoch", "tuned"))
    assert result["train_seconds"] == pytest.approx(
        sum(m["train_seconds"] for m in result["members"]), abs=0.01)
    assert 0 < result["train_seconds"] + result["compile_seconds"] < result["wall_seconds"]
    assert 0 < result["startup_seconds"] < 300
    assert result["tokens_per_second"] > 0 and result["mfu"] is None     # unknown peak: n/a
    assert 2 ** 26 < result["peak_memory_bytes"] < 2 ** 33
    assert "CPU" in result["hardware"] and result["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", result["commit"])
    folder = ROOT / "data/sample"
    assert result["data_sha256"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("*.bin")}


def test_losses_are_those_of_the_saved_scores(toy):
    logps, result = saved_logps(toy), toy.result
    assert len(logps) == 3 and all(len(p["val"]) == len(p["holdout"]) == 1_999 for p in logps)
    for member, p in zip(result["members"], logps):
        for split in ("selection", "val", "holdout"):
            assert member[f"{split}_loss"] == pytest.approx(-p[split].mean(), abs=1e-9)
    for point in result["ensemble"]:
        stack = {split: [p[split] for p in logps[:point["n"]]] for split in logps[0]}
        for split in ("selection", "val", "holdout"):
            assert point[f"{split}_loss"] == pytest.approx(mixture_loss(stack[split]), abs=1e-9)
        assert sum(point["weights_learned"]) == pytest.approx(1, abs=1e-3)
        for split in ("val", "holdout"):
            learned = mixture_loss(stack[split], point["weights_learned"])     # 4 digits
            assert point[f"{split}_loss_learned"] == pytest.approx(learned, abs=1e-3)
        # fitted on selection and nothing else: at most this far, in nats, from the best weights
        p = np.exp(stack["selection"])
        mixed = np.average(p, axis=0, weights=point["weights_learned"])
        assert np.max(np.mean(p / mixed, axis=1)) - 1 < 5e-4
    assert result["final_mixture"] == "ngram"           # as the track declares
    for split in ("val", "holdout"):
        assert result[f"{split}_loss"] == result["ensemble"][-1][f"{split}_loss_ngram"]


def test_saved_weights_give_the_saved_scores(toy):
    """Score val again with nothing of the script but the model."""
    c = t.make_config("cpu", preset="toy")
    tokens = torch.from_numpy(read_shard(ROOT / "data/sample/sample_val_000000.bin")[0][:2_000]
                              .astype(np.int64))
    model = t.GPT(c).prepare(c.seq_len).eval()
    for k, saved in enumerate(saved_logps(toy), 1):
        model.load_state_dict(load_file(toy.folder / f"members/{k:03d}.safetensors"))
        padded = torch.cat((tokens[:-1], tokens.new_zeros(-1_999 % c.seq_len)))
        with torch.no_grad():
            logits = model.logits(model(padded.view(-1, c.seq_len))).flatten(0, 1)[:1_999]
        logp = torch.log_softmax(logits, dim=1)[torch.arange(1_999), tokens[1:]].numpy()
        assert logp.mean() == pytest.approx(saved["val"].mean(), abs=0.01)   # bf16 on some CPUs
        assert np.abs(logp - saved["val"]).max() < 0.5


def test_bits_per_byte_by_hand(toy):
    facts = json.loads((ROOT / "data/sample/meta.json").read_text(encoding="utf-8"))["splits"]
    bytes_per_token = facts["val_000000"]["text_bytes"] / facts["val_000000"]["tokens"]
    assert toy.result["val_bpb"] == pytest.approx(
        toy.result["val_loss"] / math.log(2) / bytes_per_token, rel=1e-9)


def test_teacher_is_used_from_the_second_member_on(toy):
    assert set(kl(toy, 1)) == {0}
    assert min(kl(toy, 2) + kl(toy, 3)) > 0


# ---- what settings change ----

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two members, the second distilled from the first."""
    return train(tmp_path_factory.mktemp("pair"), "--num_models=2", "--kd_alpha=0.5")


def test_same_seed_same_losses_other_seed_others(pair, tmp_path):
    again = train(tmp_path, "--num_models=2", "--kd_alpha=0.5")
    other = train(tmp_path, "--num_models=1", "--kd_alpha=0.5", "--seed=2")
    assert losses(again) == losses(pair)
    assert [m["train_loss"] for m in again.steps] == [m["train_loss"] for m in pair.steps]
    assert not set(losses(other)[0]) & set(losses(pair)[0])
    assert losses(pair)[0] != losses(pair)[1]           # members differ from each other, too


def test_without_distillation_the_second_member_is_another(pair, tmp_path):
    plain = train(tmp_path, "--num_models=2", "--kd_alpha=0")
    assert losses(plain)[0] == losses(pair)[0]
    assert losses(plain)[1] != losses(pair)[1]
    assert set(kl(plain, 2)) == {0} and min(kl(pair, 2)) > 0


def test_distillation_alone_pulls_towards_the_teacher(pair, tmp_path):
    """kd_alpha=1: the student never sees a target, and still ends close to its teacher."""
    run = train(tmp_path, "--num_models=2", "--kd_alpha=1")
    assert losses(run)[0] == losses(pair)[0]
    assert kl(run, 2)[-1] < kl(run, 2)[0] / 2
    assert run.result["members"][1]["val_loss"] < math.log(2048)


def test_include_first_false_leaves_the_first_member_out(pair, tmp_path):
    run = train(tmp_path, "--num_models=2", "--kd_alpha=0.5", "--include_first=false",
                "--final_mixture=uniform")
    assert losses(run)[:2] == losses(pair)[:2]
    assert len(run.result["members"]) == 2
    point, = run.result["ensemble"]
    assert (point["n"], point["member"]) == (1, 2)
    second = run.result["members"][1]
    assert run.result["val_loss"] == pytest.approx(second["val_loss"], abs=1e-9)
    assert run.result["holdout_loss"] == pytest.approx(second["holdout_loss"], abs=1e-9)
    assert re.search(rf"^ 1  +{second['val_loss']:.4f} ", run.console, re.M)
    assert "left out" in run.console


@pytest.mark.parametrize("mixture, suffix", [
    ("uniform", ""), ("learned", "_learned"), ("ngram", "_ngram")])
def test_the_declared_mixture_is_the_result(mixture, suffix, pair, tmp_path):
    """It changes no training and no other number."""
    run = train(tmp_path, "--num_models=2", "--kd_alpha=0.5", f"--final_mixture={mixture}")
    assert losses(run) == losses(pair)
    last = run.result["ensemble"][-1]
    for point, other in zip(run.result["ensemble"], pair.result["ensemble"], strict=True):
        assert {key: point[key] for key in other} == other
        assert len(point["weights_ngram"]) == len(point["weights_learned"]) + 1
    for split in ("val", "holdout"):
        assert run.result[f"{split}_loss"] == last[f"{split}_loss{suffix}"]
        assert math.isfinite(run.result["ngram"][f"{split}_loss"])
    assert len({last[f"val_loss{s}"] for s in ("", "_learned", "_ngram")}) == 3
    assert f"val loss {run.result['val_loss']:.4f} ({mixture}" in run.console
    header, = re.findall("^ n    member .*", run.console, re.M)
    assert all(word in header for word in ("ensemble", "learned", "+ n-gram", "holdout"))
    row, = re.findall("^ 2  .*", run.console, re.M)
    assert row.split()[2:] == [f"{last[key]:.4f}" for key in (
        "val_loss", "val_loss_learned", "val_loss_ngram", "holdout_loss")]


def test_without_selection_a_run_still_ends(tmp_path):
    run = train(tmp_path, "--selection_tokens=0", "--num_models=1", "--final_mixture=uniform")
    assert run.result["val_loss"] == run.result["ensemble"][0]["val_loss"]
    assert "selection" not in saved_logps(run)[0]
    assert "val_loss_learned" not in run.result["ensemble"][0]
    assert re.search(r"5,000 tokens an epoch .* 0 for selection", run.console)


def test_averages_that_a_short_run_never_takes(tmp_path):
    """The moving average is of every 10th step; a member of fewer ends as its last weights."""
    run, last = (train(tmp_path, f"--average={average}", "--train_tokens=1800", "--num_models=1",
                       "--batch_rows=8") for average in ("ema", "last"))
    assert run.steps[-1]["step"] < 10
    assert losses(run) == losses(last)


def test_masked_documents_train_and_sample(tmp_path):
    run = train(tmp_path, "--document_mask=true", "--num_models=1")
    assert run.steps[-1]["train_loss"] < run.steps[0]["train_loss"]
    assert re.search(r"^member 1 writes", run.console, re.M)


# ---- several processes ----

def launch(runs, processes, *arguments):
    launcher = TORCHRUN + [f"--nproc_per_node={processes}"] if processes > 1 else []
    done = python(*launcher, SCRIPT, *INVARIANCE, f"--runs_dir={runs}", *arguments, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return read_run(runs / "run", done.stdout)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("one"), 1, "--num_models=2", "--kd_alpha=0.5")


def weights(run, member):
    return load_file(run.folder / f"members/{member:03d}.safetensors")


def assert_same_training(one, many):
    """The same member(s) up to the order of summation."""
    steps = [m for m in one.steps if m["member"] <= len(many.result["members"])]
    assert [(m["member"], m["step"]) for m in many.steps] == [
        (m["member"], m["step"]) for m in steps]
    assert sum(m["member"] == 1 for m in steps) >= 20
    for key in ("train_loss", "kl"):
        assert [m[key] for m in many.steps] == pytest.approx([m[key] for m in steps], abs=1e-3)
    for k, member in enumerate(many.result["members"], 1):
        reference = one.result["members"][k - 1]
        for key in ("train_loss", "selection_loss", "val_loss", "holdout_loss"):
            assert member[key] == pytest.approx(reference[key], abs=1e-3)
        a, b = weights(one, k), weights(many, k)
        assert set(a) == set(b)
        for name in a:
            scale = a[name].abs().max().clamp(min=1e-3)
            assert (a[name] - b[name]).abs().mean() <= 0.01 * scale, name


def test_limited_track_has_its_techniques_on(one_process):
    c, names = one_process.result["config"], weights(one_process, 1)
    assert c["mtp_weight"] > 0 and c["loop_count"] > 1 and c["unet"] and c["iha"]
    assert c["meta_lr"] > 0 and c["sawtooth_epochs"] > 0 and c["average"] == "probs"
    assert "mtp_proj.weight" in names and "skip_lambdas" in names and "blocks.0.attn.mix" in names
    assert {m["average"] for m in one_process.result["members"]} == {"probs"}
    first, second = re.search(r"(\S+) then (\S+) FLOPs", one_process.console).groups()
    assert float(first) < float(second)
    assert set(kl(one_process, 1)) == {0} and min(kl(one_process, 2)) > 0
    assert one_process.result["val_loss"] < math.log(2048)


def test_two_processes_train_the_same_members(one_process, tmp_path):
    many = launch(tmp_path, 2, "--num_models=2", "--kd_alpha=0.5")
    assert "on 2 process(es) in 2 micro-batch(es) of 2 rows" in many.console
    assert many.result["processes"] == 2
    assert len(re.findall("^member 2/2 done", many.console, re.M)) == 1       # only rank 0 talks
    assert_same_training(one_process, many)
    assert many.result["val_loss"] == pytest.approx(one_process.result["val_loss"], abs=1e-3)
    assert len(saved_logps(many)[0]["val"]) == 1_999


def test_two_processes_with_gradient_accumulation(one_process, tmp_path):
    many = launch(tmp_path, 2, "--num_models=1", "--device_batch_size=1")
    assert "on 2 process(es) in 4 micro-batch(es) of 1 rows" in many.console
    assert_same_training(one_process, many)


def test_limited_track_alone(one_process, tmp_path):
    """One model, one process, accumulating; with dropout, as the track has it."""
    run = launch(tmp_path, 1, "--device_batch_size=1", "--dropout=0.1", "--num_epochs=1",
                 "--train_tokens=5000")
    assert "1 model(s)" in run.console and len(run.result["members"]) == 1
    assert math.isfinite(run.result["val_loss"])
    assert run.steps[-1]["train_loss"] < run.steps[0]["train_loss"]


def test_batch_that_two_processes_cannot_share(tmp_path):
    done = python(*TORCHRUN, "--nproc_per_node=2", SCRIPT, "--track=cpu", *TOY, "--batch_rows=17",
                  f"--runs_dir={tmp_path / 'runs'}")
    assert done.returncode != 0
    line, = re.findall("^error: .*", done.stderr, re.M)
    assert "--batch_rows=17" in line and "2 process(es)" in line and line.endswith("16")
    assert not (tmp_path / "runs").exists()


# ---- commands ----

def test_sample_continues_the_prompt(toy):
    done = python(SCRIPT, "sample", f"--run_id={toy.folder.name}",
                  f"--runs_dir={toy.folder.parent}", "--prompt=It was")
    assert (done.returncode, done.stderr) == (0, "")
    text = done.stdout.partition(":\n")[2]
    assert text.strip().startswith("It was") and len(text.split()) > 20


def test_gpt2_tokenizer_of_a_dataset_without_ranks(monkeypatch):
    import tiktoken
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: f"the encoding {name}")
    assert t.report.load_encoding(t, t.make_config("limited"), {}) == "the encoding gpt2"


def test_sample_of_an_unknown_run(tmp_path):
    done = python(SCRIPT, "sample", "--run_id=nowhere", f"--runs_dir={tmp_path}")
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: .*nowhere.*--run_id.*\n", done.stderr)


def test_help_lists_every_field():
    done = python(SCRIPT, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for f in fields(t.Config):
        assert re.search(rf"^ +--{f.name}={re.escape(str(f.default))} +\S+", done.stdout, re.M)
    for track in t.TRACKS:
        assert f"Track {track}: " in done.stdout
    assert max(map(len, done.stdout.partition("\nTrack ")[0].splitlines())) <= 130


@pytest.mark.parametrize("arguments", [["--track=cpu"], ["--track=limited", "--preset=toy"]])
def test_check_trains_nothing(arguments, tmp_path, capsys):
    assert t.main(["check", *arguments, f"--runs_dir={tmp_path / 'runs'}"]) == 0
    assert "sound" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_the_main_file_can_be_read_in_one_sitting():
    assert len(Path(SCRIPT).read_text(encoding="utf-8").splitlines()) <= 1_600


def test_importing_says_and_does_nothing(tmp_path):
    done = python("-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train_gpt, torch;"
                  "assert not torch.distributed.is_initialized()", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_baseline_is_stored_and_not_repeated(tmp_path, monkeypatch, capsys):
    from records import baseline
    monkeypatch.setattr(baseline, "MULTIPLES", (1, 2))
    monkeypatch.setattr(baseline, "TUNED_UP_TO", 1)
    monkeypatch.setattr(baseline, "WEIGHT_DECAYS", (0.1, 1.0))
    monkeypatch.setattr(baseline, "FIRST_GUESS", (2, 0.1, (False, True)))
    before = (ROOT / "data/sample/meta.json").read_bytes()
    shutil.copytree(ROOT / "data/sample", tmp_path / "sample")
    meta = tmp_path / "sample/meta.json"
    data, runs = f"--dataset={tmp_path / 'sample'}", tmp_path / "runs"
    small = ["--train_tokens=3000", "--num_layers=1"]
    fast = ["--matrix_lr=0.1", "--embed_lr=0.3", "--head_lr=0.01"]      # overfits: a short search
    arguments = ["baseline", "--track=cpu", *TINY, *small, *fast, data, f"--runs_dir={runs}"]
    assert t.main(arguments) == 0
    stored = json.loads(meta.read_text(encoding="utf-8"))["baseline"]
    assert [tokens for tokens, _ in stored["one_epoch"]] == [3_000, 6_000]
    assert [tokens for tokens, _ in stored["tuned"]] == [3_000]
    assert stored["tuned"][0][1] == min(stored["tuned_settings"], key=lambda r: r["selection"])[
        "val"]
    lines = (runs / "baseline_cpu/runs.jsonl").read_text(encoding="utf-8").splitlines()
    done = [json.loads(line) for line in lines]
    settings = [tuple(r[key] for key in baseline.KEY) for r in done]
    assert len(set(settings)) == len(settings) >= 10    # one epoch, two sizes, four ways; a search
    assert {(r["unet"], r["qk_norm"]) for r in done if r["epochs"] == 1} == {
        (a, b) for a in (False, True) for b in (False, True)}
    best = {n: min((r for r in done if r["epochs"] == 1 and r["tokens"] == n and
                    r["weight_decay"] == 0.1), key=lambda r: r["selection"]) for n in (3000, 6000)}
    assert stored["one_epoch"] == [[n, run["val"]] for n, run in best.items()]
    assert all(math.isfinite(r["val"]) and math.isfinite(r["selection"]) for r in done)

    def never(*_):
        raise AssertionError("trained again")
    with monkeypatch.context() as patch:
        patch.setattr(t.Trainer, "train_member", never)
        assert t.main(arguments) == 0
    assert json.loads(meta.read_text(encoding="utf-8"))["baseline"] == stored
    assert lines == (runs / "baseline_cpu/runs.jsonl").read_text(encoding="utf-8").splitlines()
    assert (ROOT / "data/sample/meta.json").read_bytes() == before
    capsys.readouterr()

    run = train(runs, data, *small)                     # read against the stored curves
    efficiency = run.result["data_efficiency"]
    assert {kind: efficiency["curve"][kind] for kind in ("one_epoch", "tuned")} == {
        kind: stored[kind] for kind in ("one_epoch", "tuned")}
    for kind in ("one_epoch", "tuned"):
        assert re.fullmatch(r"([<>] )?\d+\.\d+", str(efficiency[kind])), efficiency[kind]
        assert f"{efficiency[kind]}x against the" in run.console


# ---- errors: one line, exit code 2, nothing written ----

def refused(arguments, runs, capsys):
    """The one line that main prints when it refuses `arguments`."""
    before = sorted(runs.rglob("*"))
    assert t.main([*arguments, f"--runs_dir={runs}"]) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert out == "" and "Traceback" not in err
    assert sorted(runs.rglob("*")) == before
    return err


@pytest.mark.parametrize("arguments, words", [
    (["--track=limitd"], ["limitd", "did you mean limited"]),
    (["--preset=toi"], ["toi", "did you mean toy"]),
    (["--num_epoch=3"], ["num_epoch", "did you mean num_epochs"]),
    (["--zzz=3"], ["zzz", "num_epochs"]),
    (["smaple"], ["smaple", "did you mean sample"]),
    (["--num_epochs=three"], ["--num_epochs=three", "whole number"]),
    (["--num_epochs=2.5"], ["--num_epochs=2.5", "whole number"]),
    (["--dropout=some"], ["--dropout=some", "number"]),
    (["--swiglu=maybe"], ["--swiglu=maybe", "true or false"]),
    (["--num_epochs"], ["--num_epochs", "--field=value", "--help"]),
    (["--num_epochs", "3"], ["--num_epochs", "--field=value"]),
    (["-num_epochs=3"], ["-num_epochs=3", "--field=value"]),
    (["--num_epochs="], ["--num_epochs=", "whole number"]),
    (["--batch_rows=17"], ["--batch_rows=17", "device_batch_size", "nearest", " 16"]),
    (["--batch_rows=19"], ["--batch_rows=19", "device_batch_size", "nearest", " 20"]),
    (["--num_heads=5"], ["--num_heads=5", "--model_dim=64", "nearest", " 4"]),
    (["--model_dim=66", "--num_heads=22"], ["--num_heads=22", "even"]),
    (["--model_dim=16"], ["--model_dim=16"]),
    (["--vocab_size=1000"], ["sample_train_000000.bin", "--vocab_size=2048"]),
    (["--selection_tokens=9000"], ["--selection_tokens", "--train_tokens"]),
    (["--selection_tokens=8900"], ["--selection_tokens=8900", "lower"]),
    (["--train_tokens=10_000_000"], ["data/sample", "1,400,337", "--train_tokens=10000000"]),
    (["--run_id=../elsewhere"], ["--run_id=../elsewhere", "path"]),
    (["--run_id=a/b"], ["--run_id=a/b", "path"]),
    (["--run_id=.."], ["--run_id=..", "path"]),
    (["--dropout=nan"], ["--dropout=nan", "finite"]),
    (["--matrix_lr=inf"], ["--matrix_lr=inf", "finite"]),
    (["--weight_decay=-1"], ["--weight_decay=-1", "at least 0"]),
    (["--num_layers=0"], ["--num_layers=0", "at least 1"]),
    (["--num_models=-1"], ["--num_models=-1", "at least 1"]),
    (["--seed=-1"], ["--seed=-1", "at least 0"]),
    (["--dropout=1"], ["--dropout=1", "below 1"]),
    (["--kd_alpha=1.5"], ["--kd_alpha=1.5", "at most 1"]),
    (["--kd_temperature=0"], ["--kd_temperature=0", "positive"]),
    (["--wd_schedule=0:1,half:2"], ["--wd_schedule=0:1,half:2", "0:1,0.5"]),
    (["--wd_schedule="], ["--wd_schedule=", "0:1,0.5"]),
    (["--wd_schedule=0:nan"], ["--wd_schedule=0:nan"]),
    (["--wd_schedule=0:-1"], ["--wd_schedule=0:-1"]),
    (["--second_weight=0:x"], ["--second_weight=0:x", "0:1,0.5"]),
    (["--third_weight=5"], ["--third_weight=5", "0:1,0.5"]),
    (["--final_mixture=best"], ["--final_mixture=best", "uniform, learned"]),
    (["--final_mixture=learned", "--selection_tokens=0"], ["--selection_tokens"]),
    (["--final_mixture=ngram", "--ngram_order=0"], ["--final_mixture=ngram", "--ngram_order"]),
    (["--ngram_order=5"], ["--ngram_order=5", "below 5"]),
    (["--average=best", "--selection_tokens=0", "--final_mixture=uniform"],
     ["--average=best", "--selection_tokens"]),
    (["--average=median"], ["--average=median", "last, ema, weights"]),
    (["--proj_init=ones"], ["--proj_init=ones", "normal, zero"]),
    (["--xsa=all"], ["--xsa=all", "(empty), fixed, learned"]),
    (["--momentum=1"], ["--momentum=1", "below 1"]),
    (["--window_schedule=abc"], ["--window_schedule=abc"]),
    (["--window_schedule=0.5:0.5:1"], ["--window_schedule=0.5:0.5:1"]),
    (["--meta_lr=0.5", "--meta_rows=3"], ["--batch_rows=8", "2 x 3 rows of --meta_rows", " 6"]),
    (["--meta_lr=0.5", "--batch_rows=16", "--meta_rows=8", "--device_batch_size=3"],
     ["--device_batch_size=3", "--meta_rows=8"]),
    (["--edge_batch_rows=15"], ["--edge_batch_rows=15", " 16"]),
    (["--device=tpu"], ["--device=tpu", "cuda"]),
    (["--window_pattern=SXL"], ["--window_pattern=SXL"]),
    (["--loop_count=2", "--loop_end=4"], ["--loop_end=4", "0..3"]),
    (["--recurrence_from=1.5"], ["--recurrence_from=1.5", "at most 1"]),
    (["--shuffle=all"], ["--shuffle=all", "documents, rows, none"]),
    (["--include_first=false", "--num_models=1"], ["--include_first=false"]),
], ids=lambda value: " ".join(value) if value and value[0].startswith(("-", "sm")) else "")
def test_setting_is_refused(arguments, words, tmp_path, capsys):
    runs = tmp_path / "runs"
    if arguments[0].startswith("-"):
        arguments = ["--track=cpu", *TOY, "--num_models=1", "--num_epochs=1", *arguments]
    line = refused(arguments, runs, capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "elsewhere").exists()


def test_gpus_that_are_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    line = refused(["--track=cpu", "--preset=toy", "--device=cuda"], tmp_path, capsys)
    assert "0 GPU(s)" in line and "--device=cpu" in line


def test_run_id_that_exists(pair, capsys):
    line = refused([*TINY, f"--run_id={pair.folder.name}"], pair.folder.parent, capsys)
    assert str(pair.folder) in line and "--num_models=4 (was 2)" in line


@pytest.mark.parametrize("arguments, words", [
    (["--track=limited", "--num_layer=3"], ["num_layer", "num_layers"]),
    (["--track=cpu", "--preset=toy", "--dataset=nowhere"], ["nowhere", "python data/"]),
])
def test_refusals_of_the_real_script(arguments, words, tmp_path):
    done = python(SCRIPT, *arguments, f"--runs_dir={tmp_path / 'runs'}")
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert all(word in done.stderr for word in words)
    assert not (tmp_path / "runs").exists()


def test_out_of_memory_names_the_remedy(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    monkeypatch.setattr(t.GPT, "forward", full)
    assert t.main([*TINY, f"--runs_dir={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]*memory[^\n]*--device_batch_size[^\n]*\n", err)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_compiling_lacks(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(settings.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert f"{tmp_path}/Python.h" in settings.lacks_to_compile(kind)
    (tmp_path / "Python.h").write_text("")
    assert settings.lacks_to_compile(kind) == ""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert settings.lacks_to_compile(kind).endswith(" compiler found")
    rt = t.start_runtime(t.make_config("cpu", device="cpu"))
    assert not rt.compile and rt.notes == ["compile   off: no C++ compiler found; slower"]


def test_loss_that_is_not_finite(tmp_path, capsys):
    assert t.main([*TINY, f"--runs_dir={tmp_path}", "--embed_lr=1e38", "--head_lr=1e38"]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: member 1, step \d+: not finite: [^\n]*_lr[^\n]*\n", err)


def test_other_errors_keep_their_traceback(tmp_path, monkeypatch):
    def bug(*_, **__):
        raise RuntimeError("a bug")
    monkeypatch.setattr(t.GPT, "forward", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        t.main([*TINY, f"--runs_dir={tmp_path}"])


# ---- datasets that are refused ----

VOCAB, BOS = 64, 63
SMALL = ["--vocab_size=64", "--train_tokens=400", "--selection_tokens=50", "--eval_tokens=0"]


def documents(count, seed):
    """uint16 [50 * count] of random documents, 50 tokens each."""
    tokens = np.random.default_rng(seed).integers(0, BOS, 50 * count).astype(np.uint16)
    tokens[::50] = BOS
    return tokens


@pytest.fixture
def dataset(tmp_path):
    """A sound little dataset that a test may spoil."""
    folder, splits = tmp_path / "small", {}
    for seed, (split, count) in enumerate({"train": 10, "val": 4, "holdout": 4}.items()):
        splits[f"{split}_000000"] = write_shard(
            folder / f"small_{split}_000000.bin", documents(count, seed), VOCAB, BOS)
    write_meta(folder, {"splits": splits, "vocab_size": VOCAB, "bos_id": BOS})
    return folder


def refused_dataset(dataset, capsys, *arguments):
    return refused([*TOY, *SMALL, f"--dataset={dataset}", *arguments], dataset.parent / "runs",
                   capsys)


def rewrite(path, header=(), tokens=None):
    """Change header[i] = value and write `tokens` (or the old ones) behind it."""
    data = path.read_bytes()
    ints = np.frombuffer(data[:1024], "<i4").copy()
    for i, value in dict(header).items():
        ints[i] = value
    path.write_bytes(ints.tobytes() + (data[1024:] if tokens is None else tokens.tobytes()))


def with_token(path, index, value):
    tokens = np.frombuffer(path.read_bytes()[1024:], "<u2").copy()
    tokens[index] = value
    rewrite(path, tokens=tokens)


def test_the_small_dataset_is_sound(dataset, capsys):
    assert t.main(["check", *TOY, *SMALL, f"--dataset={dataset}"]) == 0
    for split, held in {"train": 350, "selection": 50, "val": 200, "holdout": 200}.items():
        c = t.make_config("cpu", preset="toy", **dict(a[2:].split("=") for a in SMALL))
        data = t.load_dataset(dataset, c)
        assert sum(map(len, getattr(data, split))) == held
    assert data.evaluated() == {
        "selection": data.selection, "val": data.val, "holdout": data.holdout}


@pytest.mark.parametrize("split", ["train", "val", "holdout"])
@pytest.mark.parametrize("spoil, word", [
    (lambda path: rewrite(path, {0: 1}), "magic"),
    (lambda path: path.write_bytes(b""), "magic"),
    (lambda path: rewrite(path, {1: 2}), "version 2"),
    (lambda path: path.write_bytes(path.read_bytes()[:-2]), "tokens"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "tokens"),
    (lambda path: path.write_bytes(path.read_bytes() + b"\0\0"), "tokens"),
    (lambda path: rewrite(path, {2: -1}), "tokens"),
    (lambda path: with_token(path, 7, VOCAB), "token 64 is not below 64"),
    (lambda path: with_token(path, 0, 5), "BOS 63"),
    (lambda path: with_token(path, 7, (path.read_bytes()[1024 + 14] + 1) % BOS), "SHA-256"),
    (lambda path: rewrite(path, {3: 65}), "--vocab_size=65"),
], ids=["magic", "empty", "version", "truncated", "half a token", "extended", "negative",
        "large token", "no BOS", "hash", "vocabulary"])
def test_shard_is_refused(spoil, word, split, dataset, capsys):
    path = dataset / f"small_{split}_000000.bin"
    spoil(path)
    line = refused_dataset(dataset, capsys)
    assert path.name in line and word in line, line


def test_shard_of_another_vocabulary(dataset, capsys):
    line = refused_dataset(dataset, capsys, "--vocab_size=2048")
    assert "small_train_000000.bin" in line and "--vocab_size=64" in line


@pytest.mark.parametrize("split, data", [("train", "fineweb"), ("val", "sample"),
                                         ("holdout", "fineweb")])
def test_missing_split_names_the_command(split, data, dataset, capsys):
    (dataset / f"small_{split}_000000.bin").unlink()
    dataset = dataset.rename(dataset.parent / data)
    line = refused_dataset(dataset, capsys)
    assert split in line and f"python data/{data}.py" in line


def test_missing_folder_names_the_command(tmp_path, capsys):
    line = refused(["--track=limited", "--device=cpu", f"--dataset={tmp_path}/fineweb"],
                   tmp_path, capsys)
    assert "fineweb" in line and "python data/fineweb.py" in line


@pytest.mark.parametrize("text", [
    "{", "[]", "3", '{"splits": 5}', '{"splits": null}', '{"splits": {"train_000000": 5}}',
    '{"splits": {"val_000000": {"text_bytes": "many"}}}', "\xff"])
def test_malformed_meta(text, dataset, capsys):
    (dataset / "meta.json").write_text(text, encoding="latin-1")
    assert str(dataset / "meta.json") in refused_dataset(dataset, capsys)


def test_malformed_baseline_in_meta(dataset, capsys):
    """Else it would only be found after the last member."""
    write_meta(dataset, {"baseline": {"one_epoch": "low", "tuned": [[1, 2, 3]]}})
    assert str(dataset / "meta.json") in refused_dataset(dataset, capsys)


@pytest.mark.parametrize("split", ["val", "holdout"])
def test_held_out_documents_in_train(split, dataset, capsys):
    tokens = np.concatenate((documents(4, seed=9), documents(10, seed=0)[50:100]))
    facts = write_shard(dataset / f"small_{split}_000000.bin", tokens, VOCAB, BOS)
    meta = json.loads((dataset / "meta.json").read_text())
    meta["splits"][f"{split}_000000"] = facts
    write_meta(dataset, meta)
    line = refused_dataset(dataset, capsys)
    assert str(dataset) in line and "overlap" in line


def test_more_tokens_than_there_are(dataset, capsys):
    line = refused_dataset(dataset, capsys, "--train_tokens=501")
    assert "500 tokens" in line and "--train_tokens=501" in line


# ---- run.sh, with stubs in place of python and nvidia-smi ----

STUB = """#!/bin/sh
echo "$0" "$@" | grep -q version_info && exit ${OLD:-0}
case " $* " in *is_available*) exit ${UNUSABLE:-0} ;; esac
{ case "$0" in *.venv*) ;; *) printf 'system ';; esac
  for argument; do printf '<%s>' "$argument"; done; echo; } >> "$CALLS"
[ "$2" != venv ] || { mkdir -p "$3/bin" && cp "$STUBS/python3" "$3/bin/python"; }
case " $* " in
    *" $FAIL "*) echo "$SAYS"; exit 7 ;;
    *" check "*) ! rm "$CALLS.missing" 2> /dev/null || { echo "error: $SAYS"; exit 2; } ;;
esac
"""


@pytest.fixture
def tree(tmp_path):
    """call(*arguments, gpus=None, fail=...) -> (exit code, stderr, calls of python).

    missing: the first check finds no data and says what is missing.
    """
    home, stubs, calls = tmp_path / "a repo", tmp_path / "bin", tmp_path / "calls"
    (home / ".venv/bin").mkdir(parents=True)
    stubs.mkdir()
    for name in ("bash", "sh", "dirname", "grep", "cmp", "rm", "cp", "mkdir"):
        (stubs / name).symlink_to(shutil.which(name))
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, home)
    shutil.copy(ROOT / "requirements.txt", home / ".venv/requirements.installed")
    for python in (stubs / "python3", home / ".venv/bin/python"):
        python.write_text(STUB)
        python.chmod(0o755)

    def call(*arguments, gpus=None, fail="nothing", old="0", missing=None, **env):
        smi = stubs / "nvidia-smi"
        smi.unlink(missing_ok=True)
        if gpus is not None:                # -L prints a line a GPU, and MIG devices below it
            lines = "".join(f"echo 'GPU {i}: NVIDIA H100 (UUID: x)'\necho '  MIG 1g.10gb'\n"
                            for i in range(gpus))
            smi.write_text(f"#!/bin/sh\n{lines}exit {0 if gpus else 9}\n")
            smi.chmod(0o755)
        calls.write_text("")
        if missing is not None:
            Path(f"{calls}.missing").write_text("")
        env = {"SAYS": missing or "", "PATH": str(stubs), "CALLS": str(calls),
               "STUBS": str(stubs), "FAIL": fail,
               "OLD": old, **env}
        done = subprocess.run([str(home / "run.sh"), *arguments], cwd=tmp_path, env=env,
                              capture_output=True, encoding="utf-8", timeout=60)
        return done.returncode, done.stderr, calls.read_text().splitlines()
    call.home = home
    return call


def launched(processes, *arguments):
    launcher = f"<-m><torch.distributed.run><--standalone><--nproc_per_node={processes}>"
    return (launcher if processes > 1 else "") + "<train_gpt.py>" + "".join(
        f"<{a}>" for a in arguments)


def test_run_sh_is_sound_bash():
    assert subprocess.run(["bash", "-n", ROOT / "run.sh"]).returncode == 0
    assert os.access(ROOT / "run.sh", os.X_OK)


def test_run_sh_counts_the_gpus_that_pytorch_can_use(tree):
    assert tree(gpus=8, CUDA_VISIBLE_DEVICES="2,5")[2][-1] == launched(
        2, "train", "--track=limited")
    assert tree(gpus=8, CUDA_VISIBLE_DEVICES="5")[2][-1] == launched(1, "train", "--track=mini")
    assert tree(gpus=1, CUDA_VISIBLE_DEVICES="0,1,2")[2][-1] == launched(1, "train", "--track=mini")
    assert tree(gpus=2, CUDA_VISIBLE_DEVICES="")[2][-1] == launched(1, "train", "--track=cpu")
    code, stderr, calls = tree(gpus=2, UNUSABLE="1")
    assert code == 0 and calls[-1] == launched(1, "train", "--track=cpu")
    assert stderr.startswith("warning: nvidia-smi lists 2 GPU(s), but PyTorch cannot use them")


@pytest.mark.parametrize("gpus, track", [
    (None, "cpu"), (0, "cpu"), (1, "mini"), (2, "limited"), (8, "limited")])
def test_run_sh_picks_the_track(gpus, track, tree):
    check = [f"<train_gpt.py><check><--track={track}>"]     # the data of cpu is there
    assert tree(gpus=gpus) == (0, "", check * (track != "cpu") + [
        launched(max(1, gpus or 0), "train", f"--track={track}")])


@pytest.mark.parametrize("says", [
    "data/fineweb: no train shards; get them with: python data/fineweb.py",
    "/x/data/fineweb: 5 tokens in train; get more"])
@pytest.mark.parametrize("gpus, track, fetch", [
    (1, "mini", "<data/fineweb.py><--tokens=48_000_000>"), (2, "limited", "<data/fineweb.py>")])
def test_run_sh_fetches_what_is_missing(gpus, track, fetch, says, tree):
    check = f"<train_gpt.py><check><--track={track}>"
    assert tree(gpus=gpus, missing=says) == (0, "", [
        check, fetch, check, launched(gpus, "train", f"--track={track}")])


def test_the_script_takes_the_check_of_run_sh():
    """As run.sh calls it, with its environment; the stub of `tree` takes anything."""
    words = re.search(r"([A-Z_]+=\S+ )+(?=\$python train_gpt.py check)",
                      (ROOT / "run.sh").read_text(encoding="utf-8"))[0]
    for processes in ("1", "2"):
        done = python("-c", "import os, sys; os.execvp('env', ['env', *sys.argv[1:]])",
                      *words.replace("$processes", processes).split(), sys.executable, SCRIPT,
                      "check", "--track=limited", "--preset=toy")
        assert (done.returncode, done.stderr) == (0, "")


def test_run_sh_fetches_for_a_dataset_that_is_named(tree):
    missing = "data/fineweb: no train shards; get them with: python data/fineweb.py"
    arguments = ["--track=cpu", "--dataset=data/fineweb"]
    check = "<train_gpt.py><check><--track=cpu><--dataset=data/fineweb>"
    assert tree(*arguments, missing=missing) == (0, "", [
        check, "<data/fineweb.py>", check, launched(1, "train", *arguments)])


def test_run_sh_passes_arguments_on(tree):
    arguments = ["--track=cpu", "--seed=3", "--prompt=It  was"]
    assert tree(*arguments, gpus=2)[2] == [
        "<train_gpt.py><check><--track=cpu><--seed=3><--prompt=It  was>",
        launched(2, "train", *arguments)]
    assert tree("--num_models=2", "--device=cpu", gpus=4)[2][-1] == launched(
        1, "train", "--track=cpu", "--num_models=2", "--device=cpu")
    assert tree("baseline", "--track=cpu")[2][-1] == launched(1, "baseline", "--track=cpu")
    assert tree("sample", "--run_id=x", "--prompt=It was", gpus=1) == (
        0, "", ["<train_gpt.py><sample><--run_id=x><--prompt=It was>"])
    assert tree("bench", "--loss_chunk=64", gpus=1)[2] == [    # no data, one process
        "<train_gpt.py><bench><--track=mini><--loss_chunk=64>"]
    for flag in ("--help", "-h"):
        assert tree(flag, gpus=1) == (0, "", ["<train_gpt.py><--help>"])


def test_run_sh_stops_at_the_first_failure(tree):
    missing = "data/fineweb: no train shards; get them with: python data/fineweb.py"
    assert tree(gpus=1, missing=missing, fail="data/fineweb.py")[::2] == (
        7, ["<train_gpt.py><check><--track=mini>", "<data/fineweb.py><--tokens=48_000_000>"])
    assert tree(fail="torch.distributed.run", gpus=2)[0] == 7
    assert tree(fail="train")[0] == 7


@pytest.mark.parametrize("arguments", [["trian"], ["--track=limitd"], ["--seed=x"]])
def test_run_sh_fetches_and_launches_nothing_after_a_typing_error(arguments, tree):
    code, stderr, calls = tree(*arguments, gpus=2, missing="unknown thing", fail="trian")
    assert code in (2, 7) and len(calls) == 1 and calls[0].startswith("<train_gpt.py>")


def test_run_sh_runs_the_tests(tree):
    assert tree("test", gpus=1) == (0, "", ["<-m><pytest><-q><tests>"])
    code, _, calls = tree("test", "-k", "a b", fail="pytest")
    assert code == 7 and calls == ["<-m><pytest><-q><-k><a b><tests>"]


def test_run_sh_rebuilds_when_requirements_differ(tree):
    (tree.home / "requirements.txt").write_text("torch==0\n")
    (tree.home / ".venv/left_over").touch()
    code, err, calls = tree("test")
    assert (code, err, calls[0]) == (0, "", "system <-m><venv><.venv>")
    assert calls[1].startswith("<-m><pip><install>") and calls[1].endswith(
        "<-r><requirements.txt>")
    assert calls[2:] == ["<-m><pytest><-q><tests>"]
    assert not (tree.home / ".venv/left_over").exists()
    assert tree("test")[2] == ["<-m><pytest><-q><tests>"]       # and not again


def test_run_sh_tries_again_after_a_failed_installation(tree):
    (tree.home / ".venv/requirements.installed").unlink()
    code, err, _ = tree("test", fail="install")
    assert code == 2 and re.fullmatch("error: .*requirements.txt.*\n", err)
    assert tree("test")[2][0] == "system <-m><venv><.venv>"
    (tree.home / ".venv/requirements.installed").unlink()
    code, err, _ = tree("test", fail="venv")
    assert code == 2 and err.startswith("error: ") and "python3-venv" in err


def test_run_sh_without_a_fitting_python(tree):
    code, err, calls = tree(old="1")
    assert (code, calls) == (2, []) and re.fullmatch(r"error: no Python 3\.11.*\n", err)
