"""tools/worth.py, on a small run of its own.

    python -m pytest tests/test_worth.py
"""
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import baseline
import worth
from helpers import VOCAB, complaint, make_dataset, said, train
from train_gpt import UserError, make_config

TOKENS = 1600
BUDGETS = [200, 400, 800, 1600]
GUESS = 2, 0.3, (False, True, True)
SMALL = [f"--vocab_size={VOCAB}", f"--train_tokens={TOKENS}", "--selection_tokens=160",
         "--eval_tokens=0", "--seq_len=8", "--batch_rows=32", "--device_batch_size=32",
         "--num_layers=1", "--num_epochs=2", "--num_models=2", "--kd_from=2", "--dropout=0.1",
         "--matrix_lr=0.1", "--embed_lr=0.3"]


def longer(run):
    return baseline.longer(run) if run["epochs"] < 4 else None


def shorten_searches(patch):
    patch.setattr(baseline, "FIRST_GUESS", GUESS)
    patch.setattr(baseline, "WEIGHT_DECAYS", (0.1, 0.3, 1.0))
    patch.setattr(baseline, "ALONG", (longer, *baseline.ALONG[1:]))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run, what worth.py said of it, its worth.json, and the lines of its runs.jsonl."""
    folder = tmp_path_factory.mktemp("worth")
    dataset = make_dataset(folder / "text", documents=(82, 8, 8), length=20)
    (folder / "runs").mkdir()
    run = train(folder / "runs", "--track=cpu", f"--dataset={dataset}", *SMALL)
    with pytest.MonkeyPatch.context() as patch:
        shorten_searches(patch)
        out = said(worth, run.folder, "--single")
    lines = (run.folder / "worth/runs.jsonl").read_text(encoding="utf-8").splitlines()
    return SimpleNamespace(
        run=run, dataset=dataset, out=out, lines=lines, runs=[json.loads(line) for line in lines],
        found=json.loads((run.folder / "worth.json").read_text(encoding="utf-8")),
        quarter=json.loads((folder / "runs/run0_quarter/result.json").read_text(encoding="utf-8")))


def copied(small, folder, config=None, **changes):
    """A copy of the small run in `folder`, with `changes` in its result.json."""
    shutil.copytree(small.run.folder, folder / "run0")
    result = {**small.run.result, **changes, "config": {**small.run.result["config"],
                                                        **(config or {})}}
    (folder / "run0/result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder / "run0"


# ==== The numbers ===============================================================================
def best_runs(small):
    """{curve: [the run with the lowest selection at each budget]}, from runs.jsonl alone."""
    plain = [run for run in small.runs if run["settings"] == small.runs[0]["settings"]]
    members = [run for run in small.runs if run["settings"] != small.runs[0]["settings"]]
    first_tuned = next(i for i, run in enumerate(plain) if run["epochs"] > 1)
    searched = {"one_epoch": plain[:first_tuned], "tuned": plain[first_tuned:], "single": members}
    return {kind: [min((run for run in runs if run["tokens"] == tokens),
                       key=lambda run: run["selection"]) for tokens in BUDGETS]
            for kind, runs in searched.items()}


def tokens_at(curve, loss):
    """Where a curve reaches `loss`: tokens, or "<" or ">" with its end, by similar triangles."""
    points = [curve[0]]
    for point in curve[1:]:
        if point[1] < points[-1][1]:
            points.append(point)
    if loss > points[0][1]:
        return "<", points[0][0]
    for (a, above), (b, below) in zip(points, points[1:]):
        if above >= loss >= below:
            return "", a + (b - a) * (above - loss) / (above - below)
    return ">", points[-1][0]


def test_curves_and_multiples_follow_from_the_runs(small):
    best = best_runs(small)
    recipe = [[400, small.quarter["val_loss"]], [TOKENS, small.run.result["val_loss"]]]
    assert small.found["recipe"] == recipe
    for kind, runs in best.items():
        curve = [[run["tokens"], run["val"]] for run in runs]
        assert small.found[kind] == curve, kind
        for name, (tokens, loss) in zip(("quarter", "whole"), recipe):
            sign, reached = tokens_at(curve, loss)
            value = small.found["multiples"][name][kind]
            sign_said, _, number = str(value).rpartition(" ")
            assert sign_said == sign and float(number) == pytest.approx(
                reached / tokens, abs=0.0051), (kind, name)


def test_table_and_sentences_say_these_numbers(small):
    lines = small.out[small.out.index("      tokens   one epoch"):].splitlines()
    assert lines[0].split() == "tokens one epoch tuned single the recipe".split()
    recipe = dict(map(tuple, small.found["recipe"]))
    for line, *points in zip(lines[1:], *(small.found[kind] for kind in best_runs(small))):
        tokens = points[0][0]
        losses = [loss for _, loss in points]
        if tokens in recipe:
            losses.append(recipe[tokens])
        assert line.split() == [f"{tokens:,}", *(f"{loss:.4f}" for loss in losses)]
    for name, tokens in (("quarter", "400"), ("whole", "1,600")):
        said_of = small.found["multiples"][name]
        assert (f"on {tokens} tokens the recipe is worth {said_of['one_epoch']}x one epoch,"
                f" {said_of['tuned']}x a tuned plain model, {said_of['single']}x a tuned member"
                in small.out)
    assert "stored in" in lines[-1]


def test_all_is_trained_on_parts_of_the_same_text(small):
    """The recipe as the run has it; plain models that are tuned in epochs and decay alone; a
    selection of the same size, of which the run's is too much of an eighth."""
    own = ("train_tokens", "selection_tokens", "run_id", "runs_dir")
    ours, theirs = small.quarter["config"], small.run.result["config"]
    assert {name for name in ours if ours[name] != theirs[name]} <= set(own)
    assert (ours["train_tokens"], ours["selection_tokens"]) == (400, 20)
    assert small.found["selection_tokens"] == 20
    assert "note      selection is 20 tokens at every budget, not the 160 of" in small.out
    for run in best_runs(small)["tuned"]:
        assert tuple(run[name] for name in baseline.TRIED) == GUESS[2]
    assert {run["tokens"] for run in small.runs} == set(BUDGETS)
    assert "baseline" not in json.loads((small.dataset / "meta.json").read_text(encoding="utf-8"))


def test_each_run_is_announced_and_none_is_repeated(small, monkeypatch):
    announced = [line for line in small.out.splitlines() if line.startswith("run ")]
    assert [int(line.split()[1]) for line in announced] == list(range(1, len(small.runs) + 1))
    shorten_searches(monkeypatch)
    monkeypatch.delattr(baseline, "train_member")       # trains nothing
    monkeypatch.delattr(worth, "start")
    again = said(worth, small.run.folder, "--single")
    assert not [line for line in again.splitlines() if line.startswith("run ")]
    assert again[again.index("      tokens"):] == small.out[small.out.index("      tokens"):]
    path = small.run.folder / "worth/runs.jsonl"
    assert path.read_text(encoding="utf-8").splitlines() == small.lines
    assert json.loads((small.run.folder / "worth.json").read_text(encoding="utf-8")) == small.found


MANY = [500, 1000, 2000, 4000]


def reported(quarter, whole, **curves):
    """Lines of the report on 4 budgets, of the losses of the recipe and of the curves."""
    curves = {kind: [list(point) for point in zip(MANY, losses)]
              for kind, losses in curves.items()}
    multiples = {name: {kind: worth.data_efficiency(loss, curves, tokens)[kind] for kind in curves}
                 for name, tokens, loss in (("quarter", 1000, quarter), ("whole", 4000, whole))}
    return "\n".join(worth.report({**curves, "recipe": [[1000, quarter], [4000, whole]],
                                   "multiples": multiples}))


def test_what_cannot_be_known_is_not_claimed():
    falls = dict(one_epoch=(8, 7, 6, 5), tuned=(7, 6, 5, 4))
    text = reported(5.5, 3.9, **falls)
    assert "on 1,000 tokens the recipe is worth 3.0x one epoch, 1.5x a tuned plain model" in text
    assert "on 4,000 tokens the recipe is worth > 1.0x one epoch, > 1.0x a tuned" in text
    assert "cannot be said without more text" in text
    text = reported(3.9, 4.5, **falls)
    assert "on 1,000 tokens the recipe is worth > 4.0x one epoch, > 4.0x a tuned" in text
    assert "on 4,000 tokens the recipe is worth > 1.0x one epoch, 0.75x a tuned" in text
    text = reported(9.0, 5.5, **falls)
    assert "on 1,000 tokens the recipe is worth < 0.5x one epoch, < 0.5x a tuned" in text
    assert "0.75x one epoch" in text and "cannot be said" not in text


# ==== Small texts ===============================================================================
@pytest.mark.parametrize("selection, lengths, budgets, size", [
    (200, [50] * 80, MANY, 200), (250, [50] * 80, MANY, 250), (260, [50] * 80, MANY, 32),
    (300, [300] * 14, MANY[1:], 300), (400, [300] * 14, MANY[1:], 50)])
def test_selection_is_at_most_half_of_the_smallest_part(selection, lengths, budgets, size):
    config = make_config("cpu", train_tokens=4000, selection_tokens=selection, seq_len=16,
                         loss_chunk=16)
    documents = [np.zeros(length, np.uint16) for length in lengths]
    assert worth.share_out("run", documents, config) == (budgets, size)


def test_text_that_is_too_small_is_refused():
    config = make_config("cpu", train_tokens=4000, selection_tokens=50, seq_len=16,
                         loss_chunk=16)
    for changes, length, message in (
            (dict(selection_tokens=0), 50, "without a selection"),
            (dict(seq_len=256), 50, "less than 2 rows of 256"),
            (dict(), 600, "of a quarter no selection can be cut")):
        documents = [np.zeros(length, np.uint16) for _ in range(80)]
        with pytest.raises(UserError, match=message):
            worth.share_out("run", documents, replace(config, **changes))


# ==== Errors ====================================================================================
def test_errors_are_one_line(small, tmp_path):
    assert "no finished run" in complaint(worth, tmp_path)
    hashes = small.run.result["data_sha256"]
    name = next(iter(hashes))
    for i, (changes, message) in enumerate((
            (dict(config={"dataset": str(tmp_path / "gone")}), "no train shards"),
            (dict(data_sha256={**hashes, name: "0" * 64}), f"by the SHA-256 of {name}"),
            (dict(data_sha256={**hashes, "teacher": "0" * 64}), "more than its dataset (teacher)"),
            (dict(config={"kd_from": 1}), "taught by another run's members"),
            (dict(runs={"a": {}}), "a mixture of runs"))):
        (tmp_path / str(i)).mkdir()
        assert message in complaint(worth, copied(small, tmp_path / str(i), **changes))


def test_quarter_that_is_another_run_is_not_taken_for_it(small, tmp_path):
    run = copied(small, tmp_path)
    quarter = tmp_path / "run0_quarter"
    shutil.copytree(small.run.folder.with_name("run0_quarter"), quarter)
    result = {**small.quarter, "config": {**small.quarter["config"], "seed": 7}}
    (quarter / "result.json").write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(UserError, match="a run with --seed=7 instead of 1; move it away"):
        worth.measure(run, *worth.read_own_result(run), ["one_epoch"])
    (quarter / "result.json").unlink()          # not finished, and begun otherwise
    begun = json.loads((quarter / "run.json").read_text(encoding="utf-8"))
    (quarter / "run.json").write_text(json.dumps({**begun, "seed": "7"}), encoding="utf-8")
    with pytest.raises(UserError, match="ended with exit code 2"):
        worth.measure(run, *worth.read_own_result(run), ["one_epoch"])


def test_another_source_is_said(small, tmp_path):
    run = copied(small, tmp_path)
    begun = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps({**begun, "train_gpt.py": "0"}), encoding="utf-8")
    lines = worth.notes_on(run, make_config("cpu", selection_tokens=50), MANY, 50)
    assert lines == [f"note      {run} is of another train_gpt.py; all else here is of the present"
                     " one"]
