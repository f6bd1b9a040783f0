"""A toy repository with runs, and a forger who tampers with its record: for test_record.py.

The toy's track `cpu` is small, so that its runs have no overrides. TAMPERING: {function of a copy
of the repository (root, folder, runs): what verify must say of it}.
"""
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout

import _record_files
import _record_verify
from helpers import ROOT, kept_handlers
from train_gpt import read_tensors, result_lines, write_json, write_tensors

TOY_TRACK = dict(
    train_tokens=5_000, selection_tokens=1_000, eval_tokens=500, seq_len=64, batch_rows=4,
    num_models=2, kd_from=2, num_epochs=1, num_layers=2, model_dim=64, num_heads=2, loss_chunk=256,
    compile=False, final_mixture="learned", log_steps=2)
SEEDS = (1, 2, 3)
FACTS = ("overrides", "data_sha256", "seed", "processes", "torch", "hardware", "config")


# ==== The toy ===================================================================================
def git(root, *arguments):
    return subprocess.run(["git", "-c", "user.name=T", "-c", "user.email=t@example.com",
                           *arguments], cwd=root, check=True, capture_output=True)


def make_repository(root):
    """A repository with a small track, the small dataset and empty tables, committed in `root`."""
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    before, found, after = source.partition("TOY = dict(")
    assert found
    (root / "records").mkdir(parents=True)
    (root / "train_gpt.py").write_text(f"{before}TRACKS['cpu'] |= {TOY_TRACK}\n{found}{after}")
    (root / "data").mkdir()
    (root / "data/prose").symlink_to(ROOT / "data/prose")
    begin, end = _record_files.markers("leaderboard")
    for name in ("README.md", "records/README.md"):
        (root / name).write_text(f"# Toy\n\n{begin}\n{end}\n\nMore.\n")
    (root / ".gitignore").write_text("runs/\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "toy")


def train_toys(root):
    """Folders of runs of seeds 1 to 3 with the source in `root`, in this process."""
    spec = importlib.util.spec_from_file_location("toy_train_gpt", root / "train_gpt.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folders = []
    for seed in SEEDS:
        with redirect_stdout(io.StringIO()), kept_handlers():
            assert module.main(["--track=cpu", "--device=cpu", f"--seed={seed}",
                                f"--run_id=toy{seed}"]) == 0
        folders.append(root / f"runs/toy{seed}")
    return folders


# ==== Tampering =================================================================================
def edit(path, change):
    """`change` the dict of a JSON file in place."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    write_json(path, value)


def rewrite(path, *pairs):
    """Replace texts in a file; each must be there."""
    text = path.read_text(encoding="utf-8")
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


def substitute(path, pattern, new):
    """Replace in a file what matches a pattern, which must be there."""
    text, count = re.subn(pattern, new, path.read_text(encoding="utf-8"), flags=re.M)
    assert count
    path.write_text(text, encoding="utf-8")


def rewrite_source(copy, *pair):
    """Replace a text of the source, and its hash in all places."""
    path = copy.folder / "seed1.log"
    before = _record_files.read_log(path).source_sha256
    rewrite(path, pair)
    after = _record_files.read_log(path).source_sha256
    for seed in (2, 3):
        rewrite(copy.folder / f"seed{seed}.log", (before, after))
    rebuild(copy.root, copy.folder)


def edit_log(path, change, printed=True):
    """`change` RESULT of a log, and all that the log says of the same (printed: its table too)."""
    text = path.read_text(encoding="utf-8")
    line, = re.findall(r"^RESULT .*$", text, re.M)
    old = json.loads(line.removeprefix("RESULT "))
    new = json.loads(line.removeprefix("RESULT "))
    change(new)
    text = text.replace(line, "RESULT " + json.dumps(new))
    for key in FACTS:
        text = text.replace(f"\n{key}:{json.dumps(old[key])}\n",
                            f"\n{key}:{json.dumps(new.get(key))}\n")
    if printed:
        text = text.replace("\n".join(result_lines(old)), "\n".join(result_lines(new)))
    path.write_text(text, encoding="utf-8")


def rebuild(root, folder, **changes):
    """result.json and README.md made anew from the folder's logs, as submit would; `changes` on
    top."""
    seeds = [path for path in sorted(folder.glob("seed*.log"))]
    logs = [_record_files.read_log(path) for path in seeds]
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    logp = folder / "logp.safetensors"
    result |= {**_record_files.from_logs(logs), **changes}
    result["logp"]["sha256"] = _record_files.sha256(logp.read_bytes())
    others = [other for other in _record_files.history(root, "cpu") if other.folder != folder]
    result["against"] = _record_files.judge(
        result, _record_files.standing(others, result["number"]))
    result = _record_files.plain(result)
    write_json(folder / "result.json", result)
    readme = folder / "README.md"
    head, _, tail = _record_files.between(readme, "numbers")
    readme.write_text(head + _record_verify.numbers_of(result) + tail, encoding="utf-8")


def forge(copy, change, seeds=SEEDS, printed=True):
    """A forgery that agrees with itself: logs, tables, result.json and README.md are changed."""
    for seed in seeds:
        edit_log(copy.folder / f"seed{seed}.log", change, printed)
    rebuild(copy.root, copy.folder)


def second_record(copy, slug="zweiter", **changes):
    """The toy's record again, as number 2: its folder."""
    folder = copy.folder.with_name(copy.folder.name.replace("_toy", f"_{slug}"))
    shutil.copytree(copy.folder, folder)
    rebuild(copy.root, folder, **{"name": folder.name, "number": 2, **changes})
    return folder


def lower(result, by=0.05):
    """Every declared val loss lower."""
    result["val_loss"] -= by
    result["ensemble"][-1]["val_loss_learned"] -= by
    result["val_bpb"] *= result["val_loss"] / (result["val_loss"] + by)


def copy_holdout(result):
    result["holdout_loss"] = result["ensemble"][-1]["holdout_loss_learned"] = result["val_loss"]


def train_longer(result):
    """As if training had taken 6e13 FLOPs, all counts agreeing."""
    for member in result["members"]:
        member["train_flops"] = 3e13
    result["train_flops"] = 6e13


def edit_weights(*weights):
    def change(result):
        result["ensemble"][-1]["weights_learned"] = list(weights)
    return change


def set_value(key, value):
    def change(result):
        result[key] = value
    return change


def set_config(key, value):
    def change(result):
        result["config"][key] = value
    return change


def edit_seed_row(copy):
    edit(copy.folder / "result.json", lambda result: result["seeds"][1].update(val_loss=5.0))


def edit_mean(copy):
    edit(copy.folder / "result.json", lambda result: result["val_loss"].update(mean=5.0))


def edit_result_alone(copy):
    forge(copy, lower, seeds=[2], printed=False)


def edit_first_loss(copy):
    forge(copy, lower, seeds=[1])


def edit_member_loss(copy):
    def change(result):
        result["members"][0]["val_loss"] -= 0.1
    forge(copy, change, seeds=[3])


def edit_uniform_loss(copy):
    def change(result):
        result["ensemble"][-1]["selection_loss"] -= 0.01
    forge(copy, change, seeds=[1])


def edit_config(copy):
    forge(copy, set_config("weight_decay", 9.0))


def edit_config_of_one(copy):
    forge(copy, set_config("weight_decay", 9.0), seeds=[2])


def edit_config_in_result(copy):
    edit(copy.folder / "result.json", set_config("weight_decay", 9.0))


def edit_fact(copy):
    substitute(copy.folder / "seed2.log", r'^(config:.*"weight_decay": )1.5', r"\g<1>9.0")


def cut_log(copy):
    text = (copy.folder / "seed2.log").read_text(encoding="utf-8")
    (copy.folder / "seed2.log").write_text(text[:text.index("RESULT ")], encoding="utf-8")


def edit_member_line(copy):
    substitute(copy.folder / "seed3.log", r"(member 1/2 done in \d+:\d\d: val loss )\d",
               r"\g<1>1")


def edit_reading(copy):
    substitute(copy.folder / "seed2.log", r"(member:2 val_loss:)\d", r"\g<1>1")


def edit_source(copy):
    rewrite(copy.folder / "seed1.log", ("The regime is", "The kingdom is"))


def edit_source_everywhere(copy):
    """Other settings in the source, and its new hash in all places."""
    rewrite_source(copy, "'seq_len': 64", "'seq_len': 32")


def remove_source(copy):
    path = copy.folder / "seed1.log"
    log = _record_files.read_log(path)
    path.write_text(_record_files.without_source(log, "seed1.log"), encoding="utf-8")


def break_source(copy):
    rewrite_source(copy, "import contextlib\n", "import a_module_that_is_not_there\n")


def edit_learned_weights(copy):
    forge(copy, edit_weights(1.0, 0.0))


def edit_sum_of_weights(copy):
    forge(copy, edit_weights(0.9, 0.9))


def change_logp(copy, change):
    path = copy.folder / "logp.safetensors"
    tensors, facts = read_tensors(path)
    change(tensors)
    write_tensors(path, tensors, facts)
    rebuild(copy.root, copy.folder)


def take_logp_of_another(copy):
    def change(tensors):
        for number in (1, 2):
            other, _ = read_tensors(copy.runs[1] / f"members/{number:03d}.logp.safetensors")
            for split, logp in other.items():
                if tensors[f"{number:03d}.{split}"].shape == logp.shape:
                    tensors[f"{number:03d}.{split}"] = logp.half()
    change_logp(copy, change)


def copy_val_in_logp(copy):
    def change(tensors):
        for number in (1, 2):
            tensors[f"{number:03d}.holdout"] = tensors[f"{number:03d}.val"].clone()
    change_logp(copy, change)


def leave_out_a_member(copy):
    change_logp(copy, lambda tensors: tensors.pop("002.val"))


def damage_logp(copy):
    path = copy.folder / "logp.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def remove_logp(copy):
    (copy.folder / "logp.safetensors").unlink()


def duplicate_seed(copy):
    shutil.copy(copy.folder / "seed2.log", copy.folder / "seed3.log")

    def change(result):
        result["seed"] = result["config"]["seed"] = result["overrides"]["seed"] = 3
    forge(copy, change, seeds=[3])


def remove_seed(copy):
    (copy.folder / "seed3.log").unlink()
    rebuild(copy.root, copy.folder)


def remove_seed_from_result(copy):
    edit(copy.folder / "result.json", lambda result: result["seeds"].pop())


def remove_log(copy):
    (copy.folder / "seed2.log").unlink()


def skip_a_seed(copy):
    (copy.folder / "seed2.log").rename(copy.folder / "seed4.log")

    def change(result):
        result["seed"] = result["config"]["seed"] = result["overrides"]["seed"] = 4
    forge(copy, change, seeds=[4])


def write_another_seed(copy):
    forge(copy, set_config("seed", 7), seeds=[2])


def use_other_data(copy):
    def change(result):
        result["data_sha256"]["prose_train_000000.bin"] = "0" * 64
    forge(copy, change)


def leave_out_data(copy):
    forge(copy, lambda result: result["data_sha256"].pop("prose_holdout_000000.bin"))


def score_fewer_tokens(copy):
    for seed in SEEDS:
        rewrite(copy.folder / f"seed{seed}.log", ("val 500, holdout 500", "val 400, holdout 500"))


def take_too_long(copy):
    forge(copy, train_longer)


def hide_flops(copy):
    forge(copy, set_value("train_flops", 1e9))


def shorten_wall_time(copy):
    forge(copy, set_value("wall_seconds", 0.1))


def shorten_training(copy):
    forge(copy, set_value("train_seconds", 0.1))


def was_overridden(copy):
    def change(result):
        result["overrides"]["weight_decay"] = result["config"]["weight_decay"] = 2.0
    forge(copy, change)


def was_changed_midway(copy):
    forge(copy, set_value("changes", ["weight_decay=2 (was 1.5), with 1 member(s) done"]))


def declare_otherwise(copy):
    forge(copy, set_value("final_mixture", "uniform"))


def choose_the_best(copy):
    def change(result):
        result["val_loss"] = result["members"][0]["val_loss"]
    forge(copy, change)


def count_fewer_members(copy):
    def change(result):
        result["members"].pop()
        result["ensemble"].pop()
    forge(copy, change)


def count_bytes_wrong(copy):
    def change(result):
        result["val_bpb"] *= 0.9
    forge(copy, change)


def copy_val_as_holdout(copy):
    forge(copy, copy_holdout)


def rename(copy):
    copy.folder.rename(copy.folder.with_name("2026-01-01_toy"))


def move(copy):
    (copy.root / "records/mini").mkdir()
    copy.folder.rename(copy.root / "records/mini" / copy.folder.name)


def edit_readme(copy):
    rewrite(copy.folder / "README.md", ("n = 3 (mean", "n = 9 (mean"))


def remove_markers(copy):
    rewrite(copy.folder / "README.md", (_record_files.markers("numbers")[0], ""))


def edit_number(copy):
    edit(copy.folder / "result.json", set_value("number", 5))


def edit_date(copy):
    edit(copy.folder / "result.json", set_value("date", "2020-01-01"))


def claim_more_multiples(copy):
    edit(copy.folder / "result.json", lambda result: result["data_efficiency"].update(tuned=99.0))


TAMPERING = {
    edit_seed_row: r"val_loss of seed 2 is 5.0, and its log says 6\.",
    edit_mean: r"val_loss is .*5.0.*, and the logs give",
    edit_result_alone: r"seed2.log: RESULT gives .*which is not what the log printed",
    edit_first_loss: r"seed1.log: the val loss of the learned mixture of 2 is .* from logp",
    edit_member_loss: r"seed3.log: no line says of member 1",
    edit_uniform_loss: r"seed1.log: the selection loss of the mixture of 2 is .* from logp",
    edit_config: r"its config has weight_decay=9.0, and the source in it 1.5",
    edit_config_of_one: r"seed2.log: its weight_decay is not that of seed1.log",
    edit_config_in_result: r"result.json: config is .* and the logs give",
    edit_fact: r"seed2.log: its line 'config' and RESULT differ",
    cut_log: r"seed2.log: 0 lines that begin with RESULT",
    edit_member_line: r"seed3.log: no line says of member 1 'done in",
    edit_reading: r"seed2.log: the last val_loss of member 2 is 1\..*, and 6\.",
    edit_source: r"source_sha256 is .* and the logs give",
    edit_source_everywhere: r"seed1.log: its config has seq_len=64, and the source in it 32",
    remove_source: r"seed1.log: has no source",
    break_source: r"the source in the log does not load \(ModuleNotFoundError",
    edit_learned_weights: r"weights of the learned mixture of 2 are 1 0, and fitted on selection",
    edit_sum_of_weights: r"the weights of the learned mixture, 0.9 0.9, do not sum to one",
    take_logp_of_another: r"the val loss of member 1 is .*, and .* from logp.safetensors",
    copy_val_in_logp: r"logp.safetensors: holdout is a copy of val",
    leave_out_a_member: r"logp.safetensors is not of the members and tokens that the log has",
    damage_logp: r"logp.safetensors is not the file whose SHA-256 is in result.json",
    remove_logp: r"logp.safetensors is missing",
    duplicate_seed: r"seed3.log: has the losses of seed2.log: it is a copy",
    remove_seed: r"2 seed\(s\), and a record has at least 3",
    remove_seed_from_result: r"seed3.log is here, and result.json has no such seed",
    remove_log: r"seed2.log: cannot be read",
    skip_a_seed: r"seeds are 1 3 4, and must be 1 to 3",
    write_another_seed: r"seed2.log: is of seed 2, and its config has 7",
    use_other_data: r"run on other data than the track's: prose_train_000000.bin",
    leave_out_data: r"was run without prose_holdout_000000.bin",
    score_fewer_tokens: r"scored 399 tokens of val, and the dataset has 499",
    take_too_long: r"trained for 6e\+13 FLOPs, over the track's limit of 4e\+13 FLOPs",
    hide_flops: r"trained for 1e\+09 FLOPs, and its members for",
    shorten_wall_time: r"wall time 0.1 s is less than training, compilation and evaluation",
    shorten_training: r"training took 0.1 s, and its members",
    was_overridden: r"was run with --weight_decay=2.0: a record has no overrides",
    was_changed_midway: r"changed while it was under way: weight_decay=2",
    declare_otherwise: r"its result is the uniform mixture, and its config declares learned",
    choose_the_best: r"its val loss is .*, and the declared one, val_loss_learned of all members",
    count_fewer_members: r"1 members and 1 mixtures, and its config declares 2",
    count_bytes_wrong: r"bits per byte, and val loss over the [\d,]+ bytes of the scored tokens",
    copy_val_as_holdout: r"its holdout loss is its val loss",
    rename: r"the folder is named 2026-01-01_toy, and its record .*_toy: it was renamed",
    move: r"the folder is one of the track mini, and its record of cpu",
    edit_readme: r"README.md: the numbers between the markers are not those of result.json",
    remove_markers: r"README.md: lacks the lines",
    edit_number: r"its number is 5, with 0 record\(s\) before it",
    edit_date: r"the date is 2020-01-01, and the name",
    claim_more_multiples: r"data_efficiency is .*99.0.*, and the logs give",
}
