"""run.sh, with stubs in place of python and nvidia-smi: what it sets up, asks, fetches, launches.

    python -m pytest tests/test_run_sh.py
"""
import os
import re
import shutil
import subprocess
import sys

import pytest

from helpers import ROOT, main

# It notes its arguments, in front of them `system` if it is not .venv's, and plays the commands
# that run.sh gives to python. The first `check` fails if there is a file $CALLS.missing.
STUB = """#!/bin/sh
case " $* " in *version_info*)
    case " $OLD " in *" ${0##*/} "*) exit 1 ;; *) exit 0 ;; esac ;;
esac
case " $* " in *is_available*) echo "$USABLE"; exit ;; *version.cuda*) echo 13.0; exit ;; esac
{ case "$0" in *.venv*) ;; *) printf '%s ' "${0##*/}" ;; esac
  for argument; do printf '<%s>' "$argument"; done; echo; } >> "$CALLS"
[ "$2" != venv ] || { mkdir -p "$3/bin" && cp "$STUBS/python3" "$3/bin/python"; }
case " $* " in
    *" $FAIL "*) exit 7 ;;
    *" check "*)
        echo "${PLAN:-track $TRACK, processes $PROCESSES}"
        ! rm "$CALLS.missing" 2> /dev/null || { echo "error: $SAYS" >&2; exit 2; } ;;
esac
"""
NVIDIA_SMI = """#!/bin/sh
case "$*" in
    -L) printf '%s' "$GPUS"; [ -n "$GPUS" ] ;;
    *driver_version*) echo 535.104; echo 535.104 ;;
    *) echo "| NVIDIA-SMI 535.104    Driver Version: 535.104    CUDA Version: 12.2     |" ;;
esac
"""
PROGRAMS = ("bash", "sh", "dirname", "grep", "cmp", "rm", "cp", "mkdir", "sed", "ls", "xargs",
            "echo", "sleep")
TOOLS = ("bench", "export", "mix", "plan", "plot", "record", "_shared")
SET_UP = ["python3 <-m><venv><.venv>",
          "<-m><pip><install><--quiet><--disable-pip-version-check><-r><requirements.txt>"]


class Tree:
    """A folder like the repository's, and calls of its run.sh."""

    def __init__(self, folder):
        self.folder = folder
        self.home = folder / "a repo"
        self.stubs = folder / "bin"
        self.calls = folder / "calls"
        for name in ("tests", "tools", "data"):
            (self.home / name).mkdir(parents=True)
        for name in ("run.sh", "requirements.txt", "tests/requirements.txt",
                     "tools/requirements.txt", "tools/requirements-export.txt",
                     "data/requirements-text.txt", "train_gpt.py"):
            shutil.copy(ROOT / name, self.home / name)
        for name in TOOLS:
            (self.home / f"tools/{name}.py").touch()
        self.stubs.mkdir()
        for name in PROGRAMS:
            (self.stubs / name).symlink_to(shutil.which(name))
        self.write("python3", STUB)

    def write(self, name, text):
        (self.stubs / name).write_text(text)
        (self.stubs / name).chmod(0o755)

    def __call__(self, *arguments, gpus=None, processes=1, track="limited", usable=True,
                 missing=None, fail="nothing", old="", smi=NVIDIA_SMI, **environment):
        """(exit code, stderr, calls of python) of run.sh.

        gpus: that nvidia-smi, of the text `smi`, lists (None: there is none), and PyTorch finds
        usable or not; processes, track: what `check` says; missing: what its first call says that
        is missing; fail: a word, with which calls fail; old: names of pythons that are too old.
        """
        (self.stubs / "nvidia-smi").unlink(missing_ok=True)
        if gpus is not None:
            self.write("nvidia-smi", smi)
        self.calls.write_text("")
        if missing is not None:
            (self.folder / "calls.missing").touch()
        environment = {
            "PATH": str(self.stubs), "STUBS": str(self.stubs), "CALLS": str(self.calls),
            "GPUS": "GPU: NVIDIA H100\n  MIG 1g.10gb\n" * (gpus or 0), "USABLE": str((gpus or 0) * usable),
            "PROCESSES": str(processes), "TRACK": track, "SAYS": missing or "", "FAIL": fail,
            "OLD": old, **environment}
        done = subprocess.run([self.home / "run.sh", *arguments], cwd=self.folder,
                              env=environment, capture_output=True, encoding="utf-8", timeout=60)
        self.output = done.stdout
        return done.returncode, done.stderr, self.calls.read_text().splitlines()


@pytest.fixture
def bare(tmp_path):
    """As after a git clone."""
    return Tree(tmp_path)


@pytest.fixture
def tree(bare):
    """With a .venv that fits requirements.txt."""
    assert bare("check")[0] == 0
    return bare


def script(*arguments):
    return "<train_gpt.py>" + "".join(f"<{argument}>" for argument in arguments)


def launched(processes, *arguments):
    launcher = f"<-m><torch.distributed.run><--standalone><--nproc_per_node={processes}>"
    return launcher + script(*arguments)


def test_it_is_sound_bash():
    assert subprocess.run(["bash", "-n", ROOT / "run.sh"]).returncode == 0
    assert os.access(ROOT / "run.sh", os.X_OK)


# ==== The environment ===========================================================================
def test_venv_is_set_up_once(bare):
    assert bare() == (0, "", [*SET_UP, script()])
    assert "setting up" in bare.output
    assert bare() == (0, "", [script()])
    assert "setting up" not in bare.output


def test_venv_is_made_anew_when_requirements_change(tree):
    (tree.home / "requirements.txt").write_text("torch==0\n")
    (tree.home / ".venv/left_over").touch()
    assert tree() == (0, "", [*SET_UP, script()])
    assert not (tree.home / ".venv/left_over").exists()
    assert tree() == (0, "", [script()])


@pytest.mark.parametrize("fail, words", [("install", "requirements.txt"),
                                         ("venv", "python3-venv")])
def test_set_up_that_failed_is_tried_again(fail, words, bare):
    code, err, calls = bare(fail=fail)
    assert code == 2 and re.fullmatch(f"error: [^\n]*{re.escape(words)}[^\n]*\n", err)
    assert script() not in calls
    assert bare() == (0, "", [*SET_UP, script()])


def test_the_first_python_that_is_new_enough_is_taken(bare):
    bare.write("python3.11", STUB)
    bare.write("python3.12", STUB)
    _, _, calls = bare(old="python3 python3.13")
    assert calls[0] == "python3.12 <-m><venv><.venv>"


def test_no_python_that_is_new_enough(bare):
    code, err, calls = bare(old="python3")
    assert (code, calls) == (2, []) and re.fullmatch(r"error: no Python 3\.11[^\n]*\n", err)
    assert not (bare.home / ".venv").exists()


def test_help_needs_and_makes_no_environment(bare):
    for flag in ("--help", "-h"):
        assert bare(flag) == (0, "", ["python3 <train_gpt.py><--help>"])
        assert "./run.sh check [...]" in bare.output and "set -euo" not in bare.output
        assert re.search(r"^TOOL is one of: .*\bbench export mix plan plot record$", bare.output, re.M)
        assert not (bare.home / ".venv").exists()


def test_help_of_the_real_script(bare):
    bare.write("python3", f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    assert bare("--help")[:2] == (0, "")
    assert "./run.sh [--field=value ...]" in bare.output
    assert "num_models: int" in bare.output
    assert not (bare.home / ".venv").exists()


def test_help_behind_settings_is_help_as_well(tree):
    """train_gpt.py takes it anywhere, and has no plan to show then."""
    for flag in ("--help", "-h"):
        code, err, calls = tree("--track=cpu", flag, gpus=2, PLAN="no plan")
        assert (code, err, len(calls)) == (0, "", 1)
        assert re.search("<train_gpt.py>.*<(--help|-h)>$", calls[0])


# ==== What is launched ==========================================================================
def test_without_a_gpu_nothing_has_to_be_asked(tree):
    for gpus in (None, 0):
        assert tree("--num_models=2", "--run_id=a b", gpus=gpus) == (
            0, "", [script("--num_models=2", "--run_id=a b")])


@pytest.mark.parametrize("processes", [2, 8])
def test_script_says_on_how_many_processes(processes, tree):
    arguments = ["--seed=3", "--run_id=a  b"]
    assert tree(*arguments, gpus=8, processes=processes) == (
        0, "", [script("check", *arguments), launched(processes, *arguments)])
    assert f"track limited, processes {processes}" in tree.output


def test_one_process_needs_no_launcher(tree):
    assert tree(gpus=1, track="mini") == (0, "", [script("check"), script()])
    assert tree("train", "--device=cpu", gpus=4, track="cpu") == (
        0, "", [script("check", "--device=cpu"), script("--device=cpu")])


def test_gpus_that_are_listed_slowly_are_found(tree):
    """As grep -q ends at the first line, what goes on writing to it is ended by a signal."""
    slow = "#!/bin/sh\necho 'GPU 0: NVIDIA H100'\nsleep 0.2\necho 'GPU 1: NVIDIA H100'\n"
    assert tree(gpus=2, processes=2, smi=slow) == (0, "", [script("check"), launched(2)])


@pytest.mark.parametrize("arguments", [(), ("--track=cpu",), ("bench",), ("train", "--seed=2")],
                         ids=str)
def test_gpus_that_pytorch_cannot_use_stop_the_launch(arguments, tree):
    """With the versions, of which one is too old; who hides the GPUs, or asks for the CPU, knows."""
    code, err, calls = tree(*arguments, gpus=2, usable=False)
    assert (code, calls) == (2, [])
    assert re.fullmatch("error: [^\n]*nvidia-smi[^\n]*\n", err)
    assert all(word in err for word in ("driver 535.104", "CUDA 12.2", "CUDA 13.0", "--device=cpu"))
    arguments = [argument for argument in arguments if argument != "train"]
    last = "<tools/bench.py>" if "bench" in arguments else script(*arguments)
    for code, err, calls in (tree(*arguments, gpus=2, usable=False, CUDA_VISIBLE_DEVICES=""),
                             tree(*arguments, gpus=2, usable=False, CUDA_VISIBLE_DEVICES="-1")):
        assert (code, err, calls[-1]) == (0, "", last)
    code, err, calls = tree(*arguments, "--device=cpu", gpus=2, usable=False)
    assert (code, err, calls[-1]) == (0, "", last + "<--device=cpu>")


@pytest.mark.parametrize("track", ["mini", "tiny", "limited", "two_hour", "unlimited"])
def test_a_track_for_gpus_stops_where_there_is_none(track, tree):
    """With its plan, before anything is downloaded; who insists, or wants a toy, goes on."""
    arguments = [f"--track={track}", "--seed=2"]
    for missing in (None, MISSING):
        code, err, calls = tree(*arguments, track=track, missing=missing)
        assert (code, calls) == (2, [f"<tools/plan.py><--track={track}><--seed=2>"])
        assert re.fullmatch("error: a track for GPUs[^\n]*--device=cpu\n", err)
    (tree.folder / "calls.missing").unlink()
    for more in ("--device=cpu", "--device=mps", "--preset=toy"):
        code, err, calls = tree(*arguments, more, track=track)
        assert (code, err, calls[-1]) == (0, "", script(*arguments, more))
    assert tree(*arguments, fail="tools/plan.py")[0] == 7
    assert tree("check", *arguments, track=track)[0] == 0
    assert tree(*arguments, gpus=1, track=track)[2][-1] == script(*arguments)


@pytest.mark.parametrize("gpus, processes", [(0, 1), (1, 1), (2, 2), (3, 2), (8, 8)])
def test_bench_takes_as_many_processes_as_a_run(gpus, processes, tree):
    code, err, calls = tree("bench", "--track=tiny", gpus=gpus)
    assert (code, err) == (0, "")
    launcher = f"<-m><torch.distributed.run><--standalone><--nproc_per_node={processes}>"
    assert calls == [launcher * (processes > 1) + "<tools/bench.py><--track=tiny>"]
    assert tree("bench", "--device=cpu", gpus=gpus)[2] == ["<tools/bench.py><--device=cpu>"]


def test_errors_of_what_is_launched_are_those_of_run_sh(tree):
    assert tree(fail="train_gpt.py")[0] == 7
    assert tree(gpus=2, processes=2, fail="torch.distributed.run")[0] == 7
    assert tree("check", fail="check")[0] == 7
    assert tree("mix", fail="tools/mix.py")[0] == 7
    assert tree("test", fail="pytest")[0] == 7


def test_check_launches_nothing(tree):
    assert tree("check", "--track=tiny", gpus=8, processes=8) == (
        0, "", [script("check", "--track=tiny")])


# ==== Data that are missing =====================================================================
MISSING = "data/fineweb: no train shards; get them: python data/fineweb.py"


@pytest.mark.parametrize("track, processes, fetch", [
    ("mini", 1, "<data/fineweb.py><--tokens=48_000_000>"), ("limited", 2, "<data/fineweb.py>")])
def test_fineweb_is_fetched_where_it_is_missing(track, processes, fetch, tree):
    last = script() if processes == 1 else launched(processes)
    for says in (MISSING, "/x/data/fineweb: 5 tokens in train, below --train_tokens=9; get more"):
        assert tree(gpus=processes, processes=processes, track=track, missing=says) == (
            0, "", [script("check"), fetch, script("check"), last])


def test_fineweb_is_fetched_for_a_track_that_is_named_without_a_gpu(tree):
    for arguments in (["--track=mini", "--device=cpu"], ["--dataset=data/fineweb"]):
        code, err, calls = tree(*arguments, track="mini", missing=MISSING)
        assert (code, err, len(calls)) == (0, "", 4)
        assert calls[1].startswith("<data/fineweb.py>") and calls[3] == script(*arguments)


def test_fetching_that_fails_ends_it(tree):
    code, _, calls = tree(gpus=2, processes=2, missing=MISSING, fail="data/fineweb.py")
    assert code == 7 and calls == [script("check"), "<data/fineweb.py>"]


@pytest.mark.parametrize("says", [
    "unknown field 'sed'; did you mean seed?", "--batch_rows=17 must be a multiple of 2",
    "/x/prose: 5 tokens in train, below --train_tokens=9; get more or lower it",
    "mine: no val shards; get them: python data/text.py"])
def test_after_any_other_error_nothing_is_fetched_or_launched(says, tree):
    code, err, calls = tree("--sed=1", gpus=2, missing=says)
    assert code == 2 and calls == [script("check", "--sed=1")]
    assert err.splitlines()[-1] == f"error: {says}"


@pytest.mark.parametrize("track", ["mini", "limited"])
def test_the_real_script_says_what_run_sh_reads(track, tree, tmp_path, monkeypatch):
    """What the stubs say here are its words: of the plan, and of data that are missing."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    settings = ["--device=cpu", "--preset=toy", f"--track={track}"]
    code, out, _ = main("check", *settings)
    assert code == 0 and out.startswith(f"track {track}, processes 1\n")
    folder = tmp_path / "data/fineweb"
    shutil.copytree(ROOT / "data/prose", folder)
    for tokens in ("2_000_000", "1000"):
        code, _, err = main("check", *settings, f"--dataset={folder}", f"--train_tokens={tokens}",
                            "--selection_tokens=0", "--final_mixture=uniform")
        assert code == 2 * (tokens != "1000")
        if code:
            says = err.removeprefix("error: ").strip()
            assert len(tree(gpus=1, track=track, missing=says)[2]) == 4
    for path in folder.glob("*train*"):
        path.unlink()
    code, _, err = main("check", *settings, f"--dataset={folder}")
    assert code == 2
    says = err.removeprefix("error: ").strip()
    assert len(tree(gpus=1, track=track, missing=says)[2]) == 4


# ==== Tests and tools ===========================================================================
def test_tests_install_what_they_need_once(tree):
    install = "<-m><pip><install><--quiet><--disable-pip-version-check><-r><{}>"
    files = ("tests/requirements.txt", "tools/requirements.txt", "data/requirements-text.txt",
             "tools/requirements-export.txt")
    code, err, calls = tree("test", gpus=1)
    assert (code, err, calls[:-1]) == (0, "", [install.format(file) for file in files])
    assert calls[-1].startswith("<-m><pytest>") and calls[-1].endswith("<tests>")
    code, err, calls = tree("test", "--slow", "-k", "a b")
    assert (code, err, len(calls)) == (0, "", 1)
    assert "<--slow><-k><a b>" in calls[0]


def test_tests_whose_needs_cannot_be_installed(tree):
    code, err, calls = tree("test", fail="tests/requirements.txt")
    assert code == 2 and re.fullmatch(r"error: [^\n]*tests/requirements\.txt[^\n]*\n", err)
    assert len(calls) == 1 and len(tree("test")[2]) == 5


def test_tools_are_run_by_name(tree):
    assert tree("mix", "runs/a", "runs/b c", gpus=2, processes=2) == (
        0, "", ["<tools/mix.py><runs/a><runs/b c>"])
    calls = tree("plot", "runs/a")[2]
    assert calls[0].endswith("<-r><tools/requirements.txt>") and calls[1:] == [
        "<tools/plot.py><runs/a>"]
    assert tree("record", "verify")[2] == ["<tools/record.py><verify>"]
    calls = tree("export", "runs/a", "b")[2]
    assert calls[0].endswith("<-r><tools/requirements-export.txt>") and calls[1:] == [
        "<tools/export.py><runs/a><b>"]


def test_settings_that_fit_a_text_and_a_time_are_chosen_by_a_tool(tree):
    """With all arguments, wherever the track stands, on GPUs or none; data are not asked for."""
    for gpus in (None, 1, 2):
        for arguments in (["--track=auto", "--dataset=my text", "--minutes=5"],
                          ["--dataset=a", "--num_epochs=3", "--track=auto", "--dry_run"]):
            expected = "<tools/auto.py>" + "".join(f"<{argument}>" for argument in arguments)
            for words in (arguments, ["train", *arguments]):
                assert tree(*words, gpus=gpus, processes=2, missing=MISSING) == (
                    0, "", [expected])
    assert tree("--track=auto", "--dataset=a", fail="tools/auto.py")[0] == 7
    assert "auto.py" not in str(tree("--track=automatic", "--dataset=a", gpus=1)[2])


def test_text_is_made_a_dataset_by_name(tree):
    calls = tree("text", "a b.txt", "--out=c", gpus=2)[2]
    assert calls[0].endswith("<-r><data/requirements-text.txt>")
    assert calls[1:] == ["<data/text.py><a b.txt><--out=c>"]
    assert tree("text", "--help")[2] == ["<data/text.py><--help>"]


def test_plot_has_what_it_needs_after_requirements_changed(tree):
    tree("plot", "runs/a")
    (tree.home / "requirements.txt").write_text("torch==0\n")
    calls = tree("plot", "runs/a")[2]
    assert calls[:2] == SET_UP and calls[2].endswith("<-r><tools/requirements.txt>")
    assert calls[3:] == ["<tools/plot.py><runs/a>"]


def test_what_tools_share_is_no_tool(tree):
    assert "_shared" not in tree("--help")[1] + tree.output
    code, err, calls = tree("_shared")
    assert (code, calls) == (2, []) and "_shared" in err


@pytest.mark.parametrize("name", ["mxi", "", "tran"])
def test_unknown_tool_is_one_line(name, tree):
    code, err, calls = tree(name, gpus=2)
    assert (code, calls) == (2, [])
    assert re.fullmatch("error: [^\n]+\n", err) and name in err


def test_a_typing_error_sets_up_nothing(bare):
    code, err, calls = bare("mxi")
    assert (code, calls) == (2, []) and "tools/mxi.py" in err
    assert not (bare.home / ".venv").exists()
