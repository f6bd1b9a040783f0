"""tools/record.py: a toy record made, verified, replayed and ranked; and all that is refused.

    python -m pytest tests/test_record.py

The toy is a repository of its own, whose track `cpu` is small: so its runs have no overrides.
"""
import functools
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import stdtr

import _record_board
import _record_files
import _record_replay
import _record_submit
import _record_verify
import helpers
import record
from forgery import (
    SEEDS, TAMPERING, damage_logp, edit, edit_log, edit_readme, edit_source, edit_weights,
    forge, git, lower, make_repository, remove_logp, rewrite, second_record, set_config,
    set_value, train_longer, train_toys)
from helpers import ROOT
from train_gpt import UserError, read_tensors, write_tensors


# ==== The toy ===================================================================================
def submit(root, runs, *more):
    return ["submit", *runs, "--slug=toy", "--author=A. Uthor", "--description=the toy | track",
            f"--repository={root}", *more]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """root: of the repository with a record; bare: the same before it; runs: their folders."""
    folder = tmp_path_factory.mktemp("record")
    make_repository(folder / "bare")
    train_toys(folder / "bare")
    shutil.copytree(folder / "bare", folder / "root", symlinks=True)
    runs = [folder / f"bare/runs/toy{seed}" for seed in SEEDS]
    out = helpers.said(record, *submit(folder / "root", runs))
    helpers.said(record, "leaderboard", f"--repository={folder / 'root'}")
    found, = (folder / "root/records/cpu").iterdir()
    return SimpleNamespace(root=folder / "root", bare=folder / "bare", runs=runs, out=out,
                           folder=found)


@pytest.fixture
def copy(toy, tmp_path):
    """A copy of the toy's repository to tamper with: root, folder (of the record)."""
    shutil.copytree(toy.root, tmp_path / "toy", symlinks=True,
                    ignore=shutil.ignore_patterns("runs", ".git"))
    return SimpleNamespace(root=tmp_path / "toy", runs=toy.runs,
                           folder=tmp_path / "toy" / toy.folder.relative_to(toy.root))


@pytest.fixture
def bare(toy, tmp_path):
    """A copy of the repository without records, with its runs: root, runs."""
    shutil.copytree(toy.bare, tmp_path / "bare", symlinks=True)
    return SimpleNamespace(root=tmp_path / "bare",
                           runs=[tmp_path / f"bare/runs/toy{seed}" for seed in SEEDS])


def verify(root, *folders):
    """(exit code, output) of verify; on an unsound record it complains in lines of its own."""
    code, out, err = helpers.tool(record, "verify", *folders, f"--repository={root}")
    assert err == ""
    return code, out


def refused(root, sentence, *arguments):
    """submit with `arguments` refuses with a line that has `sentence`, and writes nothing."""
    before = sorted(root.glob("records/**/*"))
    error = helpers.complaint(record, *arguments)
    assert re.search(sentence, error), error
    assert sorted(root.glob("records/**/*")) == before


# ==== Tampering =================================================================================
@pytest.mark.parametrize("tamper", TAMPERING, ids=lambda tamper: tamper.__name__)
def test_tampering_is_named(tamper, copy):
    tamper(copy)
    code, out = verify(copy.root)
    wrong = [line for line in out.splitlines() if line.startswith("WRONG")]
    assert code == 1 and any(re.search(TAMPERING[tamper], line) for line in wrong), out


def test_the_forger_is_not_caught_for_nothing(copy):
    """What the tampering above goes through leaves an honest record as it was."""
    files = {path.name: path.read_bytes() for path in copy.folder.iterdir()}
    forge(copy, lambda result: None)
    assert {path.name: path.read_bytes() for path in copy.folder.iterdir()} == files
    assert verify(copy.root)[0] == 0


def test_any_key_may_be_missing(copy):
    """Whatever is taken out of result.json or RESULT: a sentence, never a traceback."""
    path, log = copy.folder / "result.json", copy.folder / "seed2.log"
    for file, remove in ((path, edit), (log, edit_log)):
        whole = file.read_bytes()
        keys = _record_files.read_log(log).result if file == log else json.loads(whole)
        for key in keys:
            if key in ("selection_loss", "changes", "tokens_per_second", "mfu",
                       "peak_memory_bytes") and file == log:
                continue
            file.write_bytes(whole)
            if file == log:
                rewrite(log, (f'"{key}": ', f'"no_{key}": '))
            else:
                remove(file, lambda value: value.pop(key))
            code, out = verify(copy.root)
            assert code == 1 and "WRONG" in out, (file, key)
            if file == path:
                code, _, err = helpers.tool(record, "leaderboard", f"--repository={copy.root}")
                assert code == 2 and err.count("\n") == 1
        file.write_bytes(whole)
    assert verify(copy.root)[0] == 0


@pytest.mark.parametrize("text", ["", "no JSON", "[]", '{"seeds": 3}'])
def test_result_that_is_none(text, copy):
    (copy.folder / "result.json").write_text(text)
    code, out, err = helpers.tool(record, "verify", f"--repository={copy.root}")
    assert (code == 2 and err.count("\n") == 1) or (code == 1 and "WRONG" in out)


# ==== A sound record ============================================================================
def test_submit_says_what_it_made(toy):
    lines = toy.out.splitlines()
    assert lines[0] == "record 1 of cpu: the track's first record"
    assert lines[1].split() == ["folder", str(toy.folder)]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_toy", toy.folder.name)
    assert sorted(path.name for path in toy.folder.iterdir()) == [
        "README.md", "logp.safetensors", "result.json", "seed1.log", "seed2.log", "seed3.log"]
    readme = (toy.folder / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# the toy | track\n\nBy A. Uthor")
    assert "## What changed, and why" in readme and "seed3.log" in readme


def test_record_holds_the_numbers_of_its_runs(toy):
    result = json.loads((toy.folder / "result.json").read_text(encoding="utf-8"))
    runs = [json.loads((run / "result.json").read_text(encoding="utf-8")) for run in toy.runs]
    for split in ("val", "holdout", "selection"):
        values = [run[f"{split}_loss"] for run in runs]
        mean = sum(values) / 3
        sd = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
        assert result[f"{split}_loss"] == pytest.approx(
            {"mean": mean, "sd": sd, "standard_error": sd / 3 ** 0.5})
        assert [row[f"{split}_loss"] for row in result["seeds"]] == values
    assert result["train_seconds"] == pytest.approx(sum(r["train_seconds"] for r in runs) / 3)
    assert result["commit"] == git(toy.root, "rev-parse", "HEAD").stdout.decode().strip()
    assert result["source_sha256"] == _record_files.sha256((toy.root / "train_gpt.py").read_bytes())
    assert result["weights"] == runs[0]["ensemble"][-1]["weights_learned"]
    assert result["against"]["improves"] and result["against"]["by"] == "first"


def test_first_log_is_whole_and_the_others_name_its_source(toy):
    for seed, run in zip(SEEDS, toy.runs):
        whole = (run / "log.txt").read_text(encoding="utf-8")
        kept = (toy.folder / f"seed{seed}.log").read_text(encoding="utf-8")
        source = (toy.root / "train_gpt.py").read_text(encoding="utf-8")
        assert whole.startswith(source)
        if seed == 1:
            assert kept == whole
        else:
            first, rest = kept.split("\n", 1)
            assert first == f"source sha256:{_record_files.sha256(source)}, in seed1.log"
            assert rest == whole.removeprefix(source + "\n")


def test_verify_passes_it(toy):
    for arguments in ([], [toy.folder]):
        code, out = verify(toy.root, *arguments)
        lines = out.splitlines()
        assert code == 0 and lines[0].startswith(f"sound     cpu/{toy.folder.name}: val 6.")
        assert re.fullmatch(r"history   cpu: val - holdout by record: 1: [+-]0\.\d{4}", lines[1])


def test_verify_without_records(toy):
    code, out = verify(toy.bare)
    assert (code, out) == (0, "no records yet: nothing to verify\n")
    assert "no such folder" in helpers.complaint(record, "verify", toy.root / "records/cpu/none",
                                                 f"--repository={toy.root}")


def test_verify_without_the_dataset_says_what_it_left_out(copy):
    (copy.root / "data/prose").unlink()
    code, out = verify(copy.root)
    assert code == 0 and "bits per byte not checked" in out


def test_logp_may_lie_elsewhere(copy):
    damage_logp(copy)
    remove_logp(copy)
    edit(copy.folder / "result.json", lambda result: result["logp"].update(place="https://x"))
    code, out = verify(copy.root)
    assert code == 0 and "logp.safetensors is at https://x" in out


def test_large_logp_stays_beside_its_run(bare, monkeypatch):
    monkeypatch.setattr(_record_submit, "MOST_LOGP_BYTES", 1000)
    refused(bare.root, r"logp.safetensors: 0 MB are too many .* give --logp_place=URL",
            *submit(bare.root, bare.runs))
    helpers.said(record, *submit(bare.root, bare.runs, "--logp_place=https://x"))
    folder, = (bare.root / "records/cpu").iterdir()
    assert not (folder / "logp.safetensors").exists()
    code, out = verify(bare.root)
    assert code == 0 and "logp.safetensors is at https://x" in out
    shutil.copy(bare.runs[0] / "logp.safetensors", folder)
    code, out = verify(bare.root)
    assert code == 0 and "https://x" not in out
    shutil.copy(bare.runs[0] / "members/001.logp.safetensors", folder / "logp.safetensors")
    assert verify(bare.root)[0] == 1


# ==== What submit refuses =======================================================================
def edit_run(run, change):
    """Change RESULT and result.json of a run alike."""
    edit_log(run / "log.txt", change)
    edit(run / "result.json", change)


def dirty_source(bare):
    rewrite(bare.root / "train_gpt.py", ("The regime is", "The kingdom is"))


def other_source(bare):
    dirty_source(bare)
    git(bare.root, "commit", "-qam", "another")


def no_repository(bare):
    shutil.rmtree(bare.root / ".git")


def override(bare):
    def change(result):
        result["overrides"]["weight_decay"] = result["config"]["weight_decay"] = 2.0
    for run in bare.runs:
        edit_run(run, change)


def other_config(bare):
    edit_run(bare.runs[1], set_config("weight_decay", 2.0))


def changes(bare):
    edit_run(bare.runs[2], set_value("changes", ["weight_decay=2 (was 1.5)"]))


def other_result(bare):
    edit(bare.runs[0] / "result.json", lower)


def unfinished(bare):
    (bare.runs[0] / "result.json").unlink()


def of_a_mixture(bare):
    (bare.runs[0] / "log.txt").unlink()


def no_source(bare):
    path = bare.runs[0] / "log.txt"
    path.write_text(path.read_text(encoding="utf-8").partition(_record_files.END)[2])


def two_sources(bare):
    path = bare.runs[0] / "log.txt"
    path.write_text(2 * path.read_text(encoding="utf-8"))


def no_dataset(bare):
    (bare.root / "data/prose").unlink()


def other_dataset(bare):
    no_dataset(bare)
    shutil.copytree(ROOT / "data/prose", bare.root / "data/prose")
    edit(bare.root / "data/prose/meta.json",
         lambda meta: meta["splits"]["val_000000"].update(sha256="0" * 64))


def no_logp(bare):
    (bare.runs[0] / "members/002.logp.safetensors").unlink()


def other_mixture(bare):
    for run in bare.runs:
        edit_run(run, set_value("final_mixture", "uniform"))


def too_slow(bare):
    for run in bare.runs:
        edit_run(run, train_longer)


def taken_name(bare):
    helpers.said(record, *submit(bare.root, bare.runs))


REFUSALS = {
    dirty_source: "train_gpt.py: has changes that are not committed",
    other_source: "the source in it is not the committed train_gpt.py",
    no_repository: "git knows no committed train_gpt.py",
    override: "was run with --weight_decay=2.0: a record has no overrides",
    other_config: "its weight_decay is not that of .*toy1",
    changes: "changed while it was under way: weight_decay=2",
    other_result: "its result.json is not the RESULT of its log.txt",
    unfinished: "no finished run",
    of_a_mixture: "has no log.txt: a mixture of several runs",
    no_source: "not the whole log of a run",
    two_sources: "holds two sources",
    no_dataset: "is not here",
    other_dataset: "run on other data than the track's: prose_val_000000.bin",
    no_logp: "002.logp.safetensors",
    other_mixture: "its result is the uniform mixture, and its config declares learned",
    too_slow: "over the track's limit",
    taken_name: "is there already; choose another --slug",
}


@pytest.mark.parametrize("breach", REFUSALS, ids=lambda breach: breach.__name__)
def test_submit_refuses(breach, bare):
    breach(bare)
    refused(bare.root, REFUSALS[breach], *submit(bare.root, bare.runs))


@pytest.mark.parametrize("seeds, sentence", [
    ((1, 2), r"2 seed\(s\), and a record has at least 3"),
    ((2, 3), "seeds are 2 3, and must be 1 to 2"),
    ((1, 2, 2), "seeds are 1 2 2, and must be 1 to 3, each once"),
    ((1, 2, 3, 3), "seeds are 1 2 3 3, and must be")])
def test_submit_refuses_seeds(seeds, sentence, bare):
    refused(bare.root, sentence, *submit(bare.root, [bare.runs[seed - 1] for seed in seeds]))


def test_submit_refuses_a_slug_that_is_no_name(bare):
    for more, sentence in (("--slug=a/b", "must be letters"), ("--slug=", "must be letters"),
                           ("--author= ", "--author= is empty")):
        refused(bare.root, sentence, *submit(bare.root, bare.runs, more))


def test_a_costly_track_may_have_one_seed():
    def logs(minutes_allowed, processes, count):
        config = dict(time_limit=minutes_allowed)
        return [SimpleNamespace(seed=seed, name=f"seed{seed}.log", source_sha256="", readings=[],
                                result=dict(config=config, processes=processes, data_sha256={},
                                            members=[dict(val_loss=seed)]))
                for seed in range(1, count + 1)]
    assert _record_verify.check_seeds(logs(4800, 8, 1)) == []
    assert _record_verify.check_seeds(logs(120, 8, 3)) == []
    for allowed, processes in ((120, 8), (700, 8)):
        assert "1 seed(s)" in _record_verify.check_seeds(logs(allowed, processes, 1))[0]


# ==== The record before =========================================================================
def of_losses(losses, seconds=100.0, hardware="a CPU", name="before"):
    return {"name": name, "seeds": [{"val_loss": loss} for loss in losses], "processes": 1,
            "train_seconds": seconds, "hardware": hardware}


def slow_welch(a, b):
    """One-sided p that the mean of `a` is lower, from the formulas (Welch-Satterthwaite)."""
    parts = [np.var(side, ddof=1) / len(side) for side in (a, b)]
    df = sum(parts) ** 2 / sum(part ** 2 / (len(side) - 1) for part, side in zip(parts, (a, b)))
    return float(stdtr(df, (np.mean(a) - np.mean(b)) / sum(parts) ** 0.5))


@pytest.mark.parametrize("ours, improves", [
    ([4.50, 4.501, 4.502], True), ([4.58, 4.55, 4.57], False), ([4.62, 4.63, 4.61], False),
    ([4.4, 4.5, 4.6, 4.5], False)])
def test_improvement_is_welchs_test(ours, improves):
    theirs = [4.570, 4.574, 4.568]
    found = _record_files.judge(of_losses(ours), of_losses(theirs))
    assert found["p"] == pytest.approx(slow_welch(ours, theirs), rel=1e-9)
    assert found["difference"] == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert found["improves"] == improves == bool(found["by"])


def test_a_significant_gain_that_is_too_small_is_none():
    ours, theirs = ([base + 1e-6 * i for i in range(3)] for base in (4.5685, 4.57))
    found = _record_files.judge(of_losses(ours), of_losses(theirs))
    assert found["p"] < 1e-6 and not found["improves"]
    assert "valid, not significantly better" in _record_files.verdict(found)


def test_a_faster_run_counts_at_a_loss_that_is_not_worse():
    theirs = of_losses([4.570, 4.574, 4.568])
    same, worse = [4.571, 4.572, 4.569], [4.571, 4.575, 4.569]
    for losses, seconds, hardware, by in ((same, 89, "a CPU", "time"), (same, 91, "a CPU", ""),
                                          (same, 50, "a GPU", ""), (worse, 50, "a CPU", "")):
        found = _record_files.judge(of_losses(losses, seconds, hardware), theirs)
        assert found["by"] == by, (losses, seconds, hardware)
    found = _record_files.judge(of_losses(same, 80), theirs)
    assert _record_files.verdict(found).startswith("faster: 0.80 of the time")


def test_one_seed_has_no_test():
    for loss, improves in ((4.55, True), (4.565, False)):
        found = _record_files.judge(of_losses([loss]), of_losses([4.57]))
        assert found["p"] is None and found["improves"] == improves
        assert "one seed, no test" in _record_files.verdict(found)


def test_what_is_not_better_is_listed_as_that(copy):
    folder = second_record(copy)
    code, out = verify(copy.root)
    line, = (line for line in out.splitlines() if folder.name in line)
    assert code == 0 and line.startswith("sound")
    assert "valid, not significantly better: +0.0000 nats against" in line and "p = 0.5" in line
    helpers.said(record, "leaderboard", f"--repository={copy.root}")
    table = (copy.root / "records/README.md").read_text(encoding="utf-8")
    assert "(valid, not significantly better: +0.0000)" in table
    short = (copy.root / "README.md").read_text(encoding="utf-8")
    assert copy.folder.name in short and folder.name not in short


def test_a_gain_that_is_claimed_and_not_there_is_an_error(copy):
    folder = second_record(copy)
    edit(folder / "result.json",
         lambda result: result["against"].update(improves=True, by="loss", p=0.001))
    code, out = verify(copy.root)
    assert code == 1 and f"WRONG     cpu/{folder.name}: it claims to be better, and is not" in out


def test_records_are_held_against_the_last_that_was_better(copy):
    second_record(copy)
    third = second_record(copy, "dritter", number=3)
    against = json.loads((third / "result.json").read_text(encoding="utf-8"))["against"]
    assert against["record"] == copy.folder.name
    assert verify(copy.root)[0] == 0


def test_numbers_and_dates_are_in_order(copy):
    folder = second_record(copy, number=1)
    assert "its number 1 is another record's, too: submit one" in verify(copy.root)[1]
    shutil.rmtree(folder)
    old = second_record(copy, date="2001-01-01", name="2001-01-01_zweiter")
    old.rename(old.with_name("2001-01-01_zweiter"))
    code, out = verify(copy.root)
    assert code == 1 and "its date is before that of record 1" in out


def test_a_record_may_not_change_the_track(copy):
    folder = second_record(copy)
    edit(copy.folder / "result.json", set_config("train_tokens", 4_000))
    out = verify(copy.root, folder)[1]
    assert "train_tokens is 5000, and 4000 in cpu/" in out and "no record may change it" in out


def test_a_drift_of_holdout_is_flagged(copy):
    folder = second_record(copy)
    assert "DRIFT" not in verify(copy.root)[1]

    def change(result):
        for row in result["seeds"]:
            row["holdout_loss"] += 0.2
    edit(folder / "result.json", change)
    line, = (line for line in _record_verify.drift(copy.root, "cpu") if line.startswith("DRIFT"))
    assert "at record 2 val - holdout has fallen by 0.2000" in line


# ==== Replay ====================================================================================
def test_replay_gives_the_record_its_number(toy, tmp_path):
    out = helpers.said(record, "replay", toy.folder, f"--repository={toy.root}",
                       f"--keep={tmp_path / 'kept'}")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["same"] == "all losses of members and mixtures, to the last digit"
    assert lines["sums"].startswith("to one over the vocabulary, on 384 contexts")
    assert lines["log"] == lines["replay"]
    new = json.loads((tmp_path / "kept/runs/replay/result.json").read_text(encoding="utf-8"))
    assert f"val loss {new['val_loss']:.6f}" in lines["log"]
    assert "is not empty" in helpers.complaint(record, "replay", toy.folder,
                                               f"--repository={toy.root}", f"--keep={tmp_path}")


@pytest.mark.slow
def test_replay_of_a_lie_shows_it(copy):
    forge(copy, functools.partial(lower, by=1.0))
    code, out, _ = helpers.tool(record, "replay", copy.folder / "seed2.log",
                                f"--repository={copy.root}")
    assert code == 1 and "WRONG     val loss differs by +1.0000" in out


def compared(old, change, record=None):
    """What replay says when the new run's RESULT is `old`'s with a `change`."""
    result = json.loads(json.dumps(old.result))
    change(result)
    return _record_replay.compare(old, old._replace(result=result), record)


def test_digits_must_be_the_same_on_the_same_machine(toy, monkeypatch):
    monkeypatch.setattr(_record_replay, "cpu_name", lambda: "Zuse Z3")
    old = _record_files.read_log(toy.folder / "seed1.log")
    held = {"cpu": "Zuse Z3", "val_loss": {"sd": 0.01}}
    lines, is_right = compared(old, lambda result: None, held)
    assert is_right and lines[-1].startswith("same")
    near, far = functools.partial(lower, by=0.02), functools.partial(lower, by=0.04)
    lines, is_right = compared(old, near, held)
    assert not is_right and "the digits must be the same" in lines[-1]
    for where, reference in (("another processor", held | {"cpu": "Pentium"}),
                             ("may be another processor", held | {"cpu": ""})):
        lines, is_right = compared(old, near, reference)
        assert is_right and where in lines[-1] and "within 0.0300 (3 standard" in lines[-1]
        lines, is_right = compared(old, far, reference)
        assert not is_right and "more than 0.0300" in lines[-1]

    def elsewhere(result):
        near(result)
        result["torch"] = "9.9"
    lines, is_right = compared(old, elsewhere, held)
    assert is_right and "on another torch" in lines[-1]
    assert not compared(old, near)[1] and "no seeds" in compared(old, near)[0][-1]
    lines, is_right = compared(old, lambda result: result["data_sha256"].update(x="0"), held)
    assert not is_right and "the dataset here is not that of the log" in lines[0]


def test_replay_takes_the_source_from_the_first_log(toy, tmp_path):
    source = (toy.root / "train_gpt.py").read_text(encoding="utf-8")
    for path in (toy.folder, toy.folder / "seed1.log", toy.folder / "seed3.log"):
        log, result = _record_replay.find_log(path)
        assert log.source == source and result["number"] == 1
    log, result = _record_replay.find_log(toy.runs[0])
    assert log.source == source and result is None


def test_replay_refuses_a_source_that_is_not_the_records(copy):
    edit_source(copy)
    for path, sentence in ((copy.folder, "not that in result.json"),
                           (copy.folder / "seed2.log", "by its SHA-256, and it is not")):
        with pytest.raises(UserError, match=sentence):
            _record_replay.find_log(path)


def test_replay_needs_the_dataset(copy):
    (copy.root / "data/prose").unlink()
    error = helpers.complaint(record, "replay", copy.folder, f"--repository={copy.root}")
    assert "the dataset of the log is not here" in error


def mixture_of(run, change=lambda module: None):
    """What replay says of the members in a run's folder, with the source changed by `change`."""
    log = _record_files.read_log(run / "log.txt")
    module = SimpleNamespace(**vars(_record_files.load_source(log.source)))
    change(module)
    return log, functools.partial(_record_replay.check_mixture, module, run,
                                  dataset=ROOT / "data/prose")


def test_mixture_that_does_not_sum_to_one_is_found(toy):
    log, check = mixture_of(toy.runs[0])
    assert check(log.result)[1]
    edit_weights(0.9, 0.9)(log.result)
    lines, is_right = check(log.result)
    assert not is_right and "the declared mixture does not sum to one" in lines[-1]


def test_scores_that_are_no_distribution_are_found(bare):
    """A source whose log p is 0.3 nats too good has a softmax that sums to one, all the same."""
    path = bare.runs[0] / "members/002.logp.safetensors"
    tensors, facts = read_tensors(path)
    write_tensors(path, {split: logp + 0.3 for split, logp in tensors.items()}, facts)
    log, check = mixture_of(bare.runs[0])
    lines, is_right = check(log.result)
    assert not is_right
    assert re.search(r"member 2: its log p is \+0\.(29|30|31)\d\d nats off", lines[0])


def test_older_sources_are_not_summed_and_that_is_said(toy):
    log, check = mixture_of(toy.runs[0], lambda module: delattr(module, "token_logits"))
    lines, is_right = check(log.result)
    assert is_right and "was not checked: the source lacks" in lines[0] and len(lines) == 1


def test_log_of_a_run_that_went_on_is_read(bare):
    """It holds its settings twice, and some readings."""
    path = bare.runs[0] / "log.txt"
    text = path.read_text(encoding="utf-8")
    log = _record_files.read_log(path)
    begin = text.index("\npython:")
    end = text.index("\nmember:2 ")
    path.write_text(text[:end] + text[begin:], encoding="utf-8")
    again = _record_files.read_log(path)
    assert again.facts == log.facts and again.result == log.result
    assert len(again.readings) > len(log.readings)
    helpers.said(record, *submit(bare.root, bare.runs))


# ==== Leaderboard ===============================================================================
def check_tables(root):
    return helpers.tool(record, "leaderboard", "--check", f"--repository={root}")[:2]


def test_leaderboard_is_made_again_without_a_diff(copy):
    files = [copy.root / name for name in ("README.md", "records/README.md",
                                           "records/history.png")]
    before = [path.read_bytes() for path in files]
    assert check_tables(copy.root) == (0, "tables and picture are those of the records\n")
    helpers.said(record, "leaderboard", f"--repository={copy.root}")
    assert [path.read_bytes() for path in files] == before


def test_leaderboard_has_its_columns(toy):
    result = json.loads((toy.folder / "result.json").read_text(encoding="utf-8"))
    for file, place in (("records/README.md", "cpu"), ("README.md", "records/cpu")):
        text = (toy.root / file).read_text(encoding="utf-8")
        assert text.startswith("# Toy\n\n") and text.endswith("\n\nMore.\n")
        line, = (line for line in text.splitlines() if toy.folder.name in line)
        val, holdout = result["val_loss"], result["holdout_loss"]
        for part in (f"[1]({place}/{toy.folder.name})", "the toy \\| track", "A. Uthor", "CPU",
                     f"{val['mean']:.4f} ± {val['standard_error']:.4f}, n = 3",
                     f"{holdout['mean']:.4f} ±", f"{result['val_bpb']['mean']:.4f}",
                     result["date"], f"[log]({place}/{toy.folder.name}/seed1.log)"):
            assert part in line
        assert (toy.root / file).parent.joinpath(place, toy.folder.name, "seed1.log").exists()
        for loss, pull in ((3.295, 99), (3.183, 98), (3.139, 96), (2.987, 90)):
            assert f"| {loss} |" in text
            assert f"[#{pull}](https://github.com/qlabs-eng/slowrun/pull/{pull})" in text


def test_stale_tables_and_pictures_are_named(copy):
    picture = copy.root / "records/history.png"
    for spoil, name in (
            (lambda: rewrite(copy.root / "README.md", ("A. Uthor", "B. Uthor")), "README.md"),
            (lambda: rewrite(copy.root / "records/README.md", ("n = 3", "n = 9")),
             "records/README.md"),
            (lambda: edit_readme(copy), f"records/cpu/{copy.folder.name}/README.md"),
            (picture.unlink, "records/history.png"),
            (lambda: picture.write_bytes(picture.read_bytes().replace(b"numbers\0", b"numbers\1")),
             "records/history.png"),
            (lambda: _record_board.draw({"cpu": _record_board.numbers_drawn(
                _record_board.read_tracks(copy.root))["cpu"] * 2}, picture),
             "records/history.png")):
        spoil()
        code, out = check_tables(copy.root)
        assert code == 1 and out.count("stale") == 1 and f"stale     {name}: " in out
        assert check_tables(copy.root) == (code, out)       # a check makes nothing
        helpers.said(record, "leaderboard", f"--repository={copy.root}")
        assert check_tables(copy.root)[0] == 0


def test_leaderboard_without_records(copy):
    shutil.rmtree(copy.root / "records/cpu")
    code, out = check_tables(copy.root)
    assert code == 1 and out.count("stale") == 3
    helpers.said(record, "leaderboard", f"--repository={copy.root}")
    assert check_tables(copy.root)[0] == 0
    assert not (copy.root / "records/history.png").exists()
    for name in ("README.md", "records/README.md"):
        assert "No records yet." in (copy.root / name).read_text(encoding="utf-8")


def test_tables_without_markers_are_one_line(copy):
    (copy.root / "README.md").write_text("# Toy\n")
    error = helpers.complaint(record, "leaderboard", f"--repository={copy.root}")
    assert "README.md: lacks the lines" in error


def test_our_own_tables_are_those_of_our_records():
    assert check_tables(ROOT)[0] == 0


def test_multiples_are_drawn_with_their_bounds():
    assert [_record_board.as_number(text) for text in (7.66, "> 12.4", "< 1.0", "n/a", None)] == [
        7.66, 12.4, 1.0, None, None]
