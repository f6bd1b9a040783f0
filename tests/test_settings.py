"""The first part of train_gpt.py: fields, tracks, what is typed, and how it is refused.

    python -m pytest tests/test_settings.py

Nothing here knows the value of a field or of a track: those are there to be edited.
"""
import math
import re
from dataclasses import asdict, dataclass, fields, replace

import pytest

import train_gpt
from helpers import SCRIPT, TOY, have_gpus, main, python
from train_gpt import (FIELDS, TRACKS, UserError, as_text, check_combinations, check_ranges,
                       is_distilled, make_config, micro_batch_rows, opt, parse, parse_arguments,
                       parse_schedule)

EVERY_TRACK = [(track, preset) for track in TRACKS for preset in ("", "toy")]


def is_of_type(value, kind):
    """As a person writes it: a whole number may stand for a float, True not for a number."""
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is kind


# ==== Fields and tracks =========================================================================
@pytest.mark.parametrize("name", FIELDS)
def test_what_a_field_says_of_itself_is_sound(name):
    """opt() would take a misspelt track (limitd=3) or rule (leest=0) for a track, in silence."""
    field, rule = FIELDS[name], FIELDS[name].metadata
    assert field.type in (str, bool, int, float, tuple)
    assert rule["meaning"]
    assert set(rule["tracks"]) <= set(TRACKS)
    toy = [] if rule["toy"] is None else [rule["toy"]]
    for value in (field.default, *toy, *rule["tracks"].values()):
        assert is_of_type(value, field.type), value
    assert not rule["choices"] or field.type is str


@pytest.mark.parametrize("track, preset", EVERY_TRACK)
def test_every_track_is_sound(track, preset):
    config = make_config(track, preset=preset)      # check_ranges and check_combinations pass
    assert (config.track, config.preset) == (track, preset)
    for name, field in FIELDS.items():
        value = getattr(config, name)
        assert is_of_type(value, field.type), name
        if not preset and name != "track":
            assert value == TRACKS[track].get(name, field.default), name


@pytest.mark.parametrize("track", TRACKS)
def test_toy_only_lowers_what_says_so(track):
    """No number is raised; what is neither marked `toy` nor in TOY is the track's own."""
    config, toy = (asdict(make_config(track, preset=preset)) for preset in ("", "toy"))
    for name, field in FIELDS.items():
        most = field.metadata["toy"]
        if name in train_gpt.TOY:
            assert toy[name] == train_gpt.TOY[name]
        elif most is not None:
            assert toy[name] <= config[name], name
            assert toy[name] in (config[name], most), name
        elif name != "preset":
            assert toy[name] == config[name], name


def test_what_is_typed_beats_track_and_toy():
    for preset in ("", "toy"):
        config = make_config("cpu", preset=preset, num_layers=37, dropout="0.25", compile=True)
        assert (config.num_layers, config.dropout, config.compile) == (37, 0.25, True)
    assert config.num_epochs == min(make_config("cpu").num_epochs,
                                    FIELDS["num_epochs"].metadata["toy"])


# ==== Text of a value ===========================================================================
@pytest.mark.parametrize("track, preset", EVERY_TRACK)
def test_text_of_a_value_gives_the_value_back(track, preset):
    """So what a log shows can be typed. Floats have ten digits."""
    for name, value in asdict(make_config(track, preset=preset)).items():
        again = parse(name, as_text(value))
        assert type(again) is FIELDS[name].type
        if isinstance(value, tuple):
            assert len(again) == len(value)
            for point, same in zip(again, value):
                assert point == pytest.approx(same, rel=1e-9), name
        else:
            assert again == (pytest.approx(value, rel=1e-9) if isinstance(value, float)
                             else value), name


@pytest.mark.parametrize("value, text", [
    (True, "true"), (False, "false"), (3, "3"), (1.0, "1"), (0.1, "0.1"), (1e-10, "1e-10"),
    (100_000_000, "100000000"), ("", ""), ("SSL", "SSL"), ((), ""), (((0, 1),), "0:1"),
    (((0.0, 0.5), (0.25, 2.0)), "0:0.5,0.25:2"), ([[0, 0.25, 0.5], [0.5, 0.5, 1]],
                                                 "0:0.25:0.5,0.5:0.5:1")])
def test_text_of_values(value, text):
    assert as_text(value) == text


@pytest.mark.parametrize("name, text, value", [
    ("seed", "3", 3), ("train_tokens", "100_000", 100_000), ("dropout", "0.5", 0.5),
    ("dropout", "1", 1.0), ("matrix_lr", "1e-8", 1e-8), ("qk_norm", "true", True),
    ("qk_norm", "True", True), ("qk_norm", "1", True), ("qk_norm", "FALSE", False),
    ("qk_norm", "0", False), ("run_id", "", ""), ("run_id", "a=b", "a=b"),
    ("wd_schedule", "0:1,0.5:2", ((0.0, 1.0), (0.5, 2.0))), ("wd_schedule", "", ()),
    ("window_schedule", "0:0.25:0.5", ((0.0, 0.25, 0.5),))])
def test_value_of_a_text(name, text, value):
    found = parse(name, text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("name, words, texts", [
    ("seed", "a whole number", ["", "x", "2.5", "1e3", "0x10", "true", "9" * 5000]),
    ("dropout", "a number", ["", "x", "1,5", "true", "0.1.2"]),
    ("qk_norm", "true or false", ["", "yes", "2", "maybe", "on", "1.0"]),
    ("wd_schedule", "0:1,0.5:0.1", ["5", "0", "0:1:2", "0:x", "half:1", "0:1;1:2", "0:nan",
                                    "0:inf", "0:-1", "-1:1", "0:1,1"]),
    ("window_schedule", "0:0.25:0.5", ["abc", "0:1", "0:1:1:1", "0:0.5:-1"])])
def test_text_that_is_no_value(name, words, texts):
    for text in texts:
        with pytest.raises(UserError) as error:
            parse(name, text)
        assert str(error.value).startswith(f"--{name}={text}: must be ")
        assert words in str(error.value)


def test_schedules_are_sorted_by_progress_and_jumps_keep_their_order():
    assert parse_schedule("0.5:2,0:1,1:0", 2) == ((0, 1), (0.5, 2), (1, 0))
    assert parse_schedule("1:5,0.5:3,0.5:1,0:9", 2) == ((0, 9), (0.5, 3), (0.5, 1), (1, 5))


def test_arguments_are_fields_and_texts():
    given = ["--seed=3", "--run_id=a=b", "--dataset=", "--no_field=x"]
    assert parse_arguments(given) == {"seed": "3", "run_id": "a=b", "dataset": "",
                                      "no_field": "x"}
    assert parse_arguments([]) == {}


@pytest.mark.parametrize("one, two", [("3", "4"), ("3", "3"), ("", "4"), ("a=b", "")])
def test_a_field_that_is_given_twice_is_refused(one, two, capsys):
    """Also with the same value, or with none: which is meant cannot be known."""
    given = [f"--run_id={one}", "--seed=5", f"--run_id={two}"]
    with pytest.raises(UserError) as error:
        parse_arguments(given)
    assert str(error.value) == f"--run_id is given twice: {one} and {two}"
    for command in ([], ["check"]):
        assert train_gpt.main([*command, "--track=cpu", *TOY, *given]) == 2
        out, err = capsys.readouterr()
        assert (out, err.split()) == ("", ["error:", *str(error.value).split()])


@pytest.mark.parametrize("argument", ["--seed", "seed=3", "-seed=3", "3", "", "--"])
def test_argument_that_is_none(argument):
    with pytest.raises(UserError) as error:
        parse_arguments(["--qk_norm=true", argument])
    assert repr(argument) in str(error.value)
    assert "--help" in str(error.value)


# ==== Rules =====================================================================================
@dataclass(frozen=True)
class Rules:
    """Fields of the test: the rules are those of opt, whatever Config has."""
    count: int = opt(3, "at least 1, as it is not off")
    switch: int = opt(0, "at least 0, as it is off")
    start: int = opt(3, "as it says", least=0, most=9)
    ratio: float = opt(0.5, "at least 0", most=1)
    width: float = opt(2, "as it says", least=0.25)
    flag: bool = opt(True, "no number")
    kind: str = opt("first", "one of them", "first", "second")


@pytest.mark.parametrize("name, good, bad", [
    ("count", [1, 10 ** 15], [0, -1, 10 ** 16]), ("switch", [0, 1], [-1]),
    ("start", [0, 9], [-1, 10]), ("width", [0.25, 1e15], [0.249, math.inf, math.nan, 1e16]),
    ("ratio", [0, 0.0, 1, 0.3], [-1e-9, 1.001, math.nan, math.inf, -math.inf]),
    ("flag", [True, False], []), ("kind", ["first", "second"], ["", "First", "third"])])
def test_ranges_and_choices(name, good, bad, monkeypatch):
    monkeypatch.setattr(train_gpt, "FIELDS", {field.name: field for field in fields(Rules)})
    for value in good:
        check_ranges(replace(Rules(), **{name: value}))
    for value in bad:
        with pytest.raises(UserError, match=re.escape(f"--{name}={value}: must be ")):
            check_ranges(replace(Rules(), **{name: value}))


SOUND = dict(model_dim=64, num_heads=4, num_layers=4, loop_start=0, loop_end=0, loop_count=1,
             train_tokens=100, selection_tokens=10, final_mixture="uniform", seq_len=32,
             loss_chunk=100, row_memory=False, window_pattern="SL", run_id="a")


@pytest.mark.parametrize("changes", [
    dict(), dict(num_heads=32), dict(model_dim=48, num_heads=3), dict(window_pattern="L"),
    dict(loop_start=1, loop_end=3, loop_count=2), dict(loop_start=3, loop_end=3, loop_count=9),
    dict(loop_start=9, loop_end=5, loop_count=1), dict(selection_tokens=99),
    dict(selection_tokens=0), dict(final_mixture="learned"), dict(run_id=""),
    dict(row_memory=True, loss_chunk=96), dict(run_id="2026-01-31_a.b")], ids=str)
def test_values_that_work_together(changes):
    check_combinations(make_config("cpu", **{**SOUND, **changes}))


@pytest.mark.parametrize("changes, words", [
    (dict(num_heads=3), ["--num_heads=3", "--model_dim=64"]),
    (dict(model_dim=66, num_heads=22), ["--num_heads=22", "even"]),
    (dict(num_heads=64), ["--num_heads=64", "even"]),
    (dict(loop_count=2, loop_end=4), ["--loop_end=4", "0..3"]),
    (dict(loop_count=2, loop_start=2, loop_end=1), ["--loop_start=2", "--loop_end=1"]),
    (dict(final_mixture="learned", selection_tokens=0), ["learned", "--selection_tokens"]),
    (dict(row_memory=True), ["--loss_chunk=100", "multiple of --seq_len=32"]),
    (dict(window_pattern=""), ["--window_pattern="]),
    (dict(window_pattern="SXL"), ["--window_pattern=SXL"]),
    *((dict(run_id=name), [f"--run_id={name}"]) for name in (
        "../elsewhere", "a/b", "..", "/a", ".hidden", "a\\b", "a\nb", "-a", "a b"))], ids=str)
def test_values_that_do_not_work_together(changes, words):
    with pytest.raises(UserError) as error:
        make_config("cpu", **{**SOUND, **changes})
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("vocab, padded", [(1, 64), (64, 64), (65, 128), (50257, 50304)])
def test_padded_vocabulary(vocab, padded):
    assert make_config("cpu", vocab_size=vocab).padded_vocab == padded


@pytest.mark.parametrize("changes, width", [
    (dict(model_dim=1792, mlp_multiple=256), 4864), (dict(model_dim=1024, mlp_multiple=256), 2816),
    (dict(model_dim=96, num_heads=4, mlp_multiple=256), 256),    # 8/3 * 96, not one more
    (dict(model_dim=98, num_heads=7, mlp_multiple=1), 262)], ids=str)
def test_width_of_the_mlp(changes, width):
    assert make_config("cpu", **{"num_heads": 2, **changes}).mlp_dim == width


# ==== Refusals: one line, exit code 2, nothing written ==========================================
@pytest.fixture
def refused(tmp_path):
    """refused(*arguments) -> the one line that says why."""
    def refuse(*arguments):
        code, out, err = main(*arguments, f"--runs_dir={tmp_path / 'runs'}")
        assert (code, out) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        assert not list(tmp_path.iterdir())
        return err
    return refuse


@pytest.mark.parametrize("arguments, words", [
    (["--track=limitd"], ["track 'limitd'", "did you mean limited?"]),
    (["--track="], ["track ''", *TRACKS]),
    (["--num_epoch=3"], ["field 'num_epoch'", "did you mean num_epochs?"]),
    (["--zzz=3"], ["field 'zzz'", "num_epochs"]),
    (["--Seed=3"], ["field 'Seed'", "did you mean seed?"]),
    (["trian"], ["command 'trian'", "did you mean train?"]),
    (["sample", "--run_id=a"], ["command 'sample'", "check"]),
    (["check", "--num_layer=3"], ["field 'num_layer'", "did you mean num_layers?"]),
    (["--preset=toi"], ["--preset=toi", "toy"]),
    (["--num_epochs", "3"], ["'--num_epochs'", "--field=value", "--help"]),
    (["--num_epochs=three"], ["--num_epochs=three", "whole number"]),
    (["--seed=" + "9" * 400], ["--seed", "from 0 to"]),
    (["--dropout=nan"], ["--dropout=nan"]),
    (["--matrix_lr=inf"], ["--matrix_lr=inf"]),
    (["--weight_decay=-1"], ["--weight_decay=-1"]),
    (["--num_layers=0"], ["--num_layers=0"]),
    (["--kd_alpha=1.5"], ["--kd_alpha=1.5", "to 1"]),
    (["--kd_temperature=0"], ["--kd_temperature=0"]),
    (["--hang_minutes=0"], ["--hang_minutes=0"]),
    (["--device=tpu"], ["--device=tpu", "auto, cuda, mps, cpu"]),
    (["--wd_schedule=0:1,half:2"], ["--wd_schedule=0:1,half:2", "0:1,0.5"]),
    (["--run_id=../elsewhere"], ["--run_id=../elsewhere"]),
    (["--run_id=a\nb"], ["--run_id=a b"]),
    (["--selection_tokens=9000"], ["--selection_tokens=9000", "more than half", "lower"]),
    (["--selection_tokens=4600"], ["--selection_tokens=4600", "more than half", "lower"]),
    (["--model_dim=16"], ["--model_dim=16", "from 32"]),
    (["--train_tokens=1"], ["--train_tokens=1", "from 2"]),
    (["--train_tokens=2", "--selection_tokens=1"], ["2 of the 2 tokens", "to 0 if one alone is"]),
    (["--subset_fraction=0.5"], ["field 'subset_fraction'"]),
    (["--loop_start=0", "--loop_count=2", "--loop_from_epoch=9", "--num_epochs=9"],
     ["--loop_from_epoch=9", "--num_epochs=9", "--loop_count=1"]),
    (["--train_tokens=10_000_000"], ["data/prose", "1,400,337", "--train_tokens=10000000"]),
    (["--vocab_size=1000"], ["prose_train_000000.bin", "--vocab_size=2048"]),
    (["--dataset=nowhere"], ["nowhere", "python data/"]),
    (["--meta_lr=0.5", "--meta_rows=3"], ["--batch_rows=8", "multiple of 6", ": 6 is"]),
    (["--meta_lr=0.5", "--meta_rows=16"], ["--batch_rows=8", "multiple of 32", ": 32 is"]),
    (["--batch_rows=15", "--meta_lr=0.5", "--meta_rows=1"], ["--batch_rows=15", "multiple of 2"]),
    (["--final_mixture=ngram"], ["--final_mixture=ngram", "uniform, learned"]),
    (["--split_tokens=1.5"], ["--split_tokens=1.5", "to 1"]),
    (["--row_memory=true", "--loss_chunk=100"], ["--loss_chunk=100", "multiple of --seq_len=64"]),
], ids=lambda value: " ".join(value)[:50] if value and value[0][:2] in ("--", "tr", "sa", "ch")
    else "")
def test_setting_is_refused(arguments, words, refused):
    command = arguments[:1] if arguments[0].isalpha() else []
    line = refused(*command, "--track=cpu", *TOY, "--batch_rows=8", "--train_tokens=9000",
                   *arguments[len(command):])
    assert all(word in line for word in words), line


def test_plans_that_can_be_meant():
    """Few members have no teacher; loops may begin in the last epoch, or be off."""
    make_config("mini", num_models=4, kd_from=9)
    make_config("unlimited", num_models=4, kd_alpha=0.0)
    make_config("limited", num_epochs=7)
    make_config("limited", num_epochs=3, loop_count=1)


@pytest.mark.parametrize("track", TRACKS)
def test_toy_starts_on_many_processes(track):
    config = make_config(track, preset="toy")
    for world_size in (1, 2, 4, 8):
        assert micro_batch_rows(config, world_size) >= 1
        assert config.batch_rows % world_size == 0


@pytest.mark.parametrize("alpha, first, taught", [
    (0.0, 2, []), (0.5, 2, [2, 3, 4]), (0.5, 3, [3, 4]), (0.5, 1, [1, 2, 3, 4]), (1.0, 5, [])])
def test_members_that_have_a_teacher(alpha, first, taught):
    """Those from kd_from on; the first as well, where another run's members teach (kd_from=1)."""
    config = replace(make_config("cpu"), kd_alpha=alpha, kd_from=first)
    assert [number for number in range(1, 5) if is_distilled(config, number)] == taught


def test_batch_that_processes_cannot_share(refused, monkeypatch):
    """Before any of them is there: run.sh asks with the number that it will launch."""
    have_gpus(monkeypatch, 8)
    arguments = ["--track=limited", "--preset=toy", "--meta_lr=0"]
    assert main("check", *arguments, "--batch_rows=24")[0] == 0
    code, out, err = main("check", *arguments, "--batch_rows=17")
    assert (code, out) == (2, "track limited, processes 8\n")
    assert "--batch_rows=17 must be a multiple of 8 with 8 process(es): 16 is" in err


@pytest.mark.parametrize("place", ["/proc/runs", "/dev/null/runs", "a file"])
def test_runs_folder_that_cannot_be_written(place, tmp_path):
    if place == "a file":
        place = tmp_path / "file"
        place.touch()
    code, out, err = main("--track=cpu", *TOY, f"--runs_dir={place}")
    assert (code, out) == (2, "")
    assert re.fullmatch(f"error: [^\n]*{place}[^\n]*\n", err), err


def test_refusal_of_the_real_script(tmp_path):
    done = python(SCRIPT, "--track=limited", "--num_layer=3", f"--runs_dir={tmp_path / 'runs'}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown field 'num_layer'; did you mean num_layers?\n"
    assert not list(tmp_path.iterdir())


# ==== Help ======================================================================================
@pytest.mark.parametrize("arguments", [["--help"], ["check", "--track=nowhere", "-h"]])
def test_help_needs_nothing_but_python(arguments, tmp_path):
    """No site-packages: neither torch nor numpy is there to be imported."""
    done = python("-S", "-E", SCRIPT, *arguments, cwd=tmp_path, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(train_gpt.__doc__)
    table = done.stdout.removeprefix(train_gpt.__doc__)
    assert re.findall(r"^    (\w+): \w+ = opt\(", table, re.M) == list(FIELDS)
    assert "def " not in table
    assert not list(tmp_path.iterdir())


def test_without_site_packages_there_is_no_torch(tmp_path):
    """Else the test above would prove nothing."""
    done = python("-S", "-E", SCRIPT, "check", cwd=tmp_path, timeout=30)
    assert done.returncode == 1
    assert re.search("^ModuleNotFoundError", done.stderr, re.M)
