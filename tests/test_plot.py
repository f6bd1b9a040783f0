"""tools/plot.py: what it draws is what the runs have, and it can be read.

    python -m pytest tests/test_plot.py
"""
import contextlib
import io
import json
import math
import shutil
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import _runs
import mix
import plot
from helpers import logits_of, make_dataset, train
from train_gpt import equivalent_tokens, load_dataset, write_json

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure  # noqa: E402

# of the toy runs, whose val loss is between 3 and 5
BASELINE = {"one_epoch": [[1_000, 9.0], [2_000, 5.0], [1_000_000, 2.0], [3_000_000, 1.0]],
            "tuned": [[1_000, 8.0], [50_000, 1.5]], "single": [[2_000, 7.0], [50_000, 1.7]]}
RANDOM = ["--vocab_size=100", "--seq_len=16", "--model_dim=32", "--selection_tokens=300",
          "--num_layers=1", "--train_tokens=3000", "--eval_tokens=0", "--batch_rows=16"]


@contextlib.contextmanager
def figures():
    """A list of the figures that are drawn and saved within."""
    found, save = [], Figure.savefig

    def savefig(self, path, **options):
        found.append(self)
        return save(self, path, **{**options, "dpi": 30})       # quicker
    with mock.patch.object(Figure, "savefig", savefig):
        yield found


def tool(*arguments):
    """(exit code, stdout, stderr, figures) of plot.py in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (mock.patch.object(sys, "argv", ["plot.py", *map(str, arguments)]), figures() as found,
          contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          pytest.raises(SystemExit) as end):
        _runs.run_tool(plot.main)
    return end.value.code or 0, out.getvalue(), err.getvalue(), found


def drawn(path, *arguments):
    """The figure that plot.py draws into `path`, a PNG."""
    code, out, err, found = tool(*arguments)
    assert (code, out, err) == (0, f"{path}\n", "")
    assert path.read_bytes().startswith(b"\x89PNG")
    figure, = found
    return figure


def complaint(*arguments):
    """The one line that plot.py says of what a person can mend."""
    code, out, err, found = tool(*arguments)
    assert (code, out, found) == (2, "", [])
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Real runs on random text with a baseline: one member, three members, two that remember their
    rows; and the mixture of these and an n-gram, which has no weights of its own."""
    data = make_dataset(tmp_path_factory.mktemp("data"), documents=(100, 8, 8))
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps({**meta, "baseline": BASELINE}))
    folder = tmp_path_factory.mktemp("runs")
    shared = ["--track=cpu", *RANDOM, f"--dataset={data}", "--num_epochs=2"]
    return SimpleNamespace(
        one=train(folder, *shared, "--num_models=1", "--final_mixture=uniform"),
        three=train(folder, *shared, "--num_models=3", "--seed=2",
                    "--final_mixture=learned", "--num_epochs=1"),
        memory=train(folder, *shared, "--num_models=2", "--row_memory=true", "--seed=3",
                     "--final_mixture=learned", "--num_epochs=1"))


@pytest.fixture
def copy(tmp_path):
    """A function: a run in a folder of its own, where pictures may be left."""
    def make(run, name="run"):
        shutil.copytree(run.folder, tmp_path / name)
        return tmp_path / name
    return make


def panel(figure, title):
    """The axes whose title begins so."""
    axes, = (axes for axes in figure.axes if axes.get_title().startswith(title))
    return axes


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def curves(axes):
    """[(label, [x], [y])] of the lines of axes, in the order in which they were drawn."""
    return [(line.get_label(), [float(x) for x in line.get_xdata()],
             [float(y) for y in line.get_ydata()]) for line in axes.lines]


def curve(axes, label):
    """([x], [y]) of the line whose label begins so."""
    (x, y), = ((x, y) for name, x, y in curves(axes) if str(name).startswith(label))
    return x, y


def points(run, member, key):
    """([epoch], [value]) of a member's lines of metrics with that value, each step's last."""
    steps = {}
    for line in run.metrics:
        if line["member"] == member and "step" in line:
            steps[line["step"]] = line
    found = [(line["epoch"], line[key]) for step, line in sorted(steps.items()) if key in line]
    return [epoch for epoch, _ in found], [value for _, value in found]


def assert_legible(figure):
    """Axes are wide enough and named, and legends lie within the picture."""
    figure.draw_without_rendering()
    whole = figure.bbox
    for axes in figure.axes:
        assert axes.get_position().width >= 0.25, axes.get_title()
        assert axes.get_title()
        if axes.lines:
            assert axes.get_xlabel() and axes.get_ylabel()
            unit = ("nats", "norm", "part")
            assert any(word in axes.get_ylabel() for word in unit)
        else:
            assert axes.texts and not axes.get_xlabel()
        legend = axes.get_legend()
        for text in legend.get_texts() if legend else []:
            box = text.get_window_extent()
            assert whole.x0 <= box.x0 and box.x1 <= whole.x1, text.get_text()
            assert whole.y0 <= box.y0 and box.y1 <= whole.y1, text.get_text()
    heading = figure.get_suptitle()
    assert heading and whole.x0 <= figure._suptitle.get_window_extent().x0


# ==== One run ===================================================================================
@pytest.fixture(scope="module")
def of_one(runs, tmp_path_factory):
    """The figure of the run of one member."""
    path = tmp_path_factory.mktemp("one") / "one.png"
    return drawn(path, runs.one.folder, f"--out={path}", "--tokens=200")


@pytest.fixture(scope="module")
def of_three(runs, tmp_path_factory):
    """The figure of the run of three members."""
    path = tmp_path_factory.mktemp("three") / "three.png"
    return drawn(path, runs.three.folder, f"--out={path}", "--tokens=200")


def test_panels_of_one_member(of_one, runs):
    assert titles(of_one) == ["Losses by epoch", "Gradient", "Data efficiency",
                              "Calibration on val"]
    assert of_one.get_suptitle() == (
        f"{runs.one.folder.name}: val loss {runs.one.result['val_loss']:.4f}, uniform mixture of 1")
    assert_legible(of_one)


def test_losses_by_epoch_of_one_member(of_one, runs):
    axes = panel(of_one, "Losses by epoch")
    train_points = points(runs.one, 1, "train_loss")
    selection = points(runs.one, 1, "selection_loss")
    assert len(selection[0]) == 2 and len(train_points[0]) == len(runs.one.steps)
    assert [(x, y) for _, x, y in curves(axes)] == [train_points, selection]
    assert axes.get_xlabel() == "epoch of a member"
    assert axes.get_ylabel() == "loss (nats per token)"
    bottom, top = axes.get_ylim()
    assert bottom < min(train_points[1] + selection[1]) and top > max(selection[1])


def test_gradients_of_one_member(of_one, runs):
    axes = panel(of_one, "Gradient")
    assert curve(axes, "member 1") == points(runs.one, 1, "grad_norm")
    assert axes.get_yscale() == "log" and axes.get_ylabel() == "norm of the gradient"


def test_losses_by_epoch_of_three_members(of_three, runs):
    axes = panel(of_three, "Losses by epoch (earlier members fainter)")
    expected = [points(runs.three, member, key) for member in (1, 2, 3)
                for key in ("train_loss", "selection_loss")]
    assert [(x, y) for _, x, y in curves(axes)] == expected
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["train (first target)", "selection, member 3"]
    shades = [line.get_alpha() for line in axes.lines]
    assert shades[0] < shades[2] < shades[4] == 1 and shades[1] < shades[3] < shades[5] == 1


def test_ensemble_of_three_members(of_three, runs):
    axes = panel(of_three, "Ensemble of the first n")
    result = runs.three.result
    ends = [1.0, 2.0, 3.0]
    assert curve(axes, "member n alone") == (ends, [m["val_loss"] for m in result["members"]])
    assert curve(axes, "mixture: uniform") == (ends, [p["val_loss"] for p in result["ensemble"]])
    assert curve(axes, "mixture: learned (declared)") == (
        ends, [p["val_loss_learned"] for p in result["ensemble"]])
    assert len(axes.lines) == 3
    assert axes.get_xlabel() == "members" and axes.get_ylabel() == "val loss (nats per token)"
    assert curve(axes, "mixture: learned")[1][-1] == result["val_loss"]


def test_three_members_have_no_gradient_but_an_ensemble(of_three):
    assert titles(of_three) == ["Losses by epoch (earlier members fainter)",
                                "Ensemble of the first n", "Data efficiency", "Calibration on val"]
    assert_legible(of_three)


def test_mixture_with_an_ngram(runs, tmp_path):
    """That tools/mix.py makes, of all members alone."""
    folder = tmp_path / "mix"
    result = mix.mix([runs.memory.folder], final_mixture="ngram", ngram_order=3)
    write_json(folder / "result.json", result)
    figure = drawn(folder / "plot.png", folder, "--tokens=0")
    axes = panel(figure, "Ensemble of the first n")
    assert curve(axes, "mixture: with n-gram (declared)") == ([2.0], [result["val_loss"]])
    assert curve(axes, "mixture: learned")[1] == [
        p["val_loss_learned"] for p in runs.memory.result["ensemble"]]
    assert len(axes.lines) == 4
    assert "Calibration on val" not in titles(figure)       # --tokens=0
    assert_legible(figure)


def test_baselines_with_the_point_and_all_multiples(of_one, runs):
    axes, result = panel(of_one, "Data efficiency"), runs.one.result
    loss, tokens = result["val_loss"], result["train_tokens"]
    assert 2 < loss < 5
    for kind, label in (("one_epoch", "plain model, one epoch"), ("tuned", "plain model, tuned"),
                        ("single", "one such member, tuned")):
        assert curve(axes, label) == tuple(map(list, zip(*BASELINE[kind])))
    assert curve(axes, f"this run: {loss:.4f}") == ([float(tokens)], [loss])
    there = {kind: float(np.interp(-loss, [-y for _, y in BASELINE[kind]],
                                   [x for x, _ in BASELINE[kind]])) for kind in BASELINE}
    written = {text.get_text(): text.xy for text in axes.texts if text.get_text()}
    assert written == {f"{round(there[kind] / tokens, 2)}x": (there[kind], loss)
                       for kind in BASELINE}
    assert len(written) == 3
    arrows = [(text.xy, text.xyann) for text in axes.texts if not text.get_text()]
    assert sorted(arrows) == sorted(((x, loss), (tokens, loss)) for x in there.values())
    assert axes.get_xlabel() == "training tokens" and axes.get_xscale() == "log"
    ticks = [text.get_text() for text in axes.get_xticklabels()]
    assert ticks == ["1k", "2k", "50k", "1M", "3M"]


def test_a_loss_beyond_the_curves_has_the_sign_of_the_result(runs, copy):
    folder = copy(runs.one)
    result = json.loads((folder / "result.json").read_text())
    result["data_efficiency"]["curve"] = {"one_epoch": [[1_000, 2.0], [2_000, 1.5]], "tuned": []}
    (folder / "result.json").write_text(json.dumps(result))
    axes = panel(drawn(folder / "plot.png", folder, "--tokens=0"), "Data efficiency")
    x, sign = equivalent_tokens(result["val_loss"], [[1_000, 2.0], [2_000, 1.5]])
    written, = (text for text in axes.texts if text.get_text())
    assert sign == "<" and written.xy[0] == x
    assert written.get_text() == f"< {round(1_000 / result['train_tokens'], 2)}x"


def test_without_a_baseline_there_are_words(runs, copy):
    folder = copy(runs.one)
    result = json.loads((folder / "result.json").read_text())
    result["data_efficiency"] = {"one_epoch": "n/a", "tuned": "n/a", "curve": None}
    (folder / "result.json").write_text(json.dumps(result))
    figure = drawn(folder / "plot.png", folder, "--tokens=0")
    axes = panel(figure, "Data efficiency")
    assert "no baseline curve of this data" in axes.texts[0].get_text() and not axes.lines
    assert_legible(figure)


@pytest.mark.parametrize("count, text", [(999, "999"), (1_000, "1k"), (50_000, "50k"),
                                         (1_200_000, "1.2M"), (3e9, "3B")])
def test_tokens_as_text(count, text):
    assert plot.as_tokens(count) == text


# ==== Several runs, unfinished ones, mixes ======================================================
def test_several_runs_in_one_picture(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    three = (runs.one, runs.three, runs.memory)
    _, out, err, (figure,) = tool(*(run.folder for run in three), "--tokens=200")
    assert (out, err) == ("plot.png\n", "") and (tmp_path / "plot.png").exists()
    assert figure.get_suptitle() == "3 runs"
    names = [run.folder.name for run in three]

    axes = panel(figure, "Loss on selection by epoch (earlier members fainter)")
    assert [(x, y) for _, x, y in curves(axes)] == [
        points(run, member + 1, "selection_loss") for run in three
        for member in range(len(run.result["members"]))]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == names

    axes = panel(figure, "Ensemble of the first n, as declared")
    keys = ("val_loss", "val_loss_learned", "val_loss_learned")
    for run, key in zip(three, keys):
        found = [point[key] for point in run.result["ensemble"]]
        assert curve(axes, run.folder.name) == ([*range(1, 1 + len(found))], found)

    axes = panel(figure, "Does compute go on paying?")
    for run, key in zip(three, keys):
        flops, x = 0.0, []
        for member in run.result["members"]:
            flops += member["train_flops"]
            x.append(pytest.approx(flops))
        assert curve(axes, run.folder.name) == (x, [point[key] for point in run.result["ensemble"]])
    assert axes.get_xlabel() == "FLOPs of training" and axes.get_xscale() == "log"

    axes = panel(figure, "Data efficiency")
    for run in three:
        result, times = run.result, run.result["data_efficiency"]
        label = f"{run.folder.name}: " + ", ".join(f"{times[kind]}x" for kind in BASELINE)
        assert curve(axes, label) == ([result["train_tokens"]], [result["val_loss"]])

    labels = [label for label, _, _ in curves(panel(figure, "Calibration on val"))]
    assert labels[0] == "perfect" and [text.split(":")[0] for text in labels[1:]] == names
    looks = [(line.get_linestyle(), line.get_marker(), line.get_color())
             for line in panel(figure, "Calibration").lines[1:]]
    assert all(len(set(part)) == 3 for part in zip(*looks))
    assert_legible(figure)


def test_an_unfinished_run_has_its_curves_by_epoch(runs, copy):
    folder = copy(runs.one)
    (folder / "result.json").unlink()
    figure = drawn(folder / "plot.png", folder)
    assert titles(figure) == ["Losses by epoch", "Gradient"]
    assert figure.get_suptitle() == "run (not finished)"
    axes = panel(figure, "Losses by epoch")
    assert curves(axes)[0][1:] == points(runs.one, 1, "train_loss")
    assert_legible(figure)


def test_a_run_that_has_just_begun(runs, copy):
    """One reading, none of selection."""
    folder = copy(runs.one)
    (folder / "result.json").unlink()
    first = (folder / "metrics.jsonl").read_text().splitlines()[0]
    (folder / "metrics.jsonl").write_text(first + "\n")
    figure = drawn(folder / "plot.png", folder)
    assert curves(panel(figure, "Losses by epoch"))[0][1:] == tuple(
        values[:1] for values in points(runs.one, 1, "train_loss"))


def test_a_line_that_is_being_written_is_no_traceback(runs, copy):
    """The picture of a run under way: its last line may not be whole yet."""
    folder = copy(runs.one)
    (folder / "result.json").unlink()
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"member": 1, "st')
    drawn(folder / "plot.png", folder)


def test_a_finished_run_beside_an_unfinished_one(runs, copy, tmp_path):
    folder = copy(runs.one)
    (folder / "result.json").unlink()
    figure = drawn(tmp_path / "x.png", folder, runs.three.folder, f"--out={tmp_path / 'x.png'}",
                   "--tokens=200")
    assert {"run", runs.three.folder.name} == {
        text.get_text() for text in panel(figure, "Loss on").get_legend().get_texts()}
    found = [point["val_loss_learned"] for point in runs.three.result["ensemble"]]
    assert found in [y for _, _, y in curves(panel(figure, "Ensemble"))]
    assert_legible(figure)


def test_a_run_looks_the_same_in_all_panels(runs, copy, tmp_path):
    """A run that a panel leaves out gives its colour and marker to nobody else."""
    folder = copy(runs.one)
    (folder / "result.json").unlink()
    path = tmp_path / "x.png"
    figure = drawn(path, folder, runs.three.folder, runs.memory.folder, f"--out={path}",
                   "--tokens=100")
    looks = {}
    for axes in figure.axes:
        for line in axes.lines:
            name = line.get_label().partition(":")[0]
            if name in (runs.three.folder.name, runs.memory.folder.name):
                looks.setdefault(name, set()).add((line.get_color(), line.get_marker()))
    assert [len(found) for found in looks.values()] == [1, 1]


def test_repeated_steps_count_once(runs, copy):
    """Steps that a run made again after it was stopped: the last reading of each is drawn."""
    folder = copy(runs.one)
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    stale = [{**line, "train_loss": 99.0} for line in lines[:3]]
    path.write_text("".join(json.dumps(line) + "\n" for line in stale + lines))
    figure = drawn(folder / "plot.png", folder, "--tokens=0")
    assert curves(panel(figure, "Losses by epoch"))[0][1:] == points(runs.one, 1, "train_loss")


def test_a_mix_without_metrics(runs, tmp_path):
    """Only what result.json has: no curves by epoch, no weights."""
    folder = tmp_path / "mix"
    folder.mkdir()
    shutil.copy(runs.three.folder / "result.json", folder)
    figure = drawn(folder / "plot.png", folder)
    assert titles(figure) == ["Ensemble of the first n", "Data efficiency"]
    assert curve(panel(figure, "Ensemble"), "mixture: uniform")[1] == [
        point["val_loss"] for point in runs.three.result["ensemble"]]
    assert_legible(figure)


@pytest.mark.parametrize("count", [1, 2, 6])
def test_long_names_leave_room(count, runs, copy, tmp_path):
    """The names that sweep.py gives, told apart by their ends."""
    name = "cpu_dropout0.1_presettoy_devicecpu_dtypefloat32_num_layers1_batch_rows4_numb-4f581b7"
    folders = [copy((runs.one, runs.three)[i % 2], f"{name}_seed{i}") for i in range(count)]
    path = tmp_path / "long.png"
    figure = drawn(path, *folders, f"--out={path}", "--tokens=100")
    assert_legible(figure)
    if count > 1:
        labels = [text.get_text()
                  for text in panel(figure, "Loss on selection").get_legend().get_texts()]
        assert len(set(labels)) == count and max(map(len, labels)) <= 32


def test_labels_of_names_that_are_not_long():
    short = plot.Curves("a" * 32, None, [], {}, None)
    assert short.label == "a" * 32
    long = plot.Curves("a" * 21 + "x" * 10 + "b" * 8, None, [], {}, None)
    assert long.label == "a" * 21 + "..." + "b" * 8


# ==== Calibration ===============================================================================
def test_reliability_by_hand():
    """20 tokens: two a point; a stable order among equals."""
    confidence = np.array([0.05 * i for i in range(20)])[::-1].copy()
    correct = np.array([True] * 10 + [False] * 10)
    x, y, gap = plot.reliability(confidence, correct)
    assert x == pytest.approx([0.025 + 0.1 * i for i in range(10)])
    assert y == pytest.approx([0] * 5 + [1] * 5)
    assert gap == pytest.approx(np.mean([0.025, 0.125, 0.225, 0.325, 0.425,
                                         0.475, 0.375, 0.275, 0.175, 0.075]))


@pytest.mark.parametrize("count", [1, 7, 10, 103, 1000])
def test_reliability_as_slow(count):
    source = np.random.default_rng(count)
    confidence = source.choice(np.linspace(0.1, 1, 400), count, replace=False) if count < 400 else (
        source.random(count))
    correct = source.random(count) < confidence ** 2
    order = sorted(range(count), key=lambda i: confidence[i])
    bins, start = [], 0
    for number in range(10):        # the first ones take what is left over
        size = count // 10 + (number < count % 10)
        if size:
            bins.append(order[start:start + size])
        start += size
    x, y, gap = plot.reliability(confidence, correct)
    assert x == pytest.approx([math.fsum(confidence[i] for i in part) / len(part) for part in bins])
    assert y == pytest.approx([sum(correct[i] for i in part) / len(part) for part in bins])
    assert gap == pytest.approx(math.fsum(
        abs(math.fsum(confidence[i] - correct[i] for i in part)) for part in bins) / count)


def slow_confidences(run, tokens):
    """{name: [(confidence, right)]} of member 1 and of the equal mixture, one row at a time; rows
    are of seq_len tokens of val as it lies in the file, as many whole ones as `tokens` allows."""
    _, config = _runs.read_result(run.folder)
    val = load_dataset(config.dataset, config).scored["val"]
    stream = [int(token) for document in val for token in document]
    found = {"member 1": [], "ensemble": []}
    runtime = plot.start_runtime(config)
    models = [_runs.load_member(run.folder, number, config, runtime)
              for number in range(1, len(run.result["members"]) + 1)]
    for row in range(min(tokens, len(stream) - 1) // config.seq_len):
        inputs = stream[row * config.seq_len:(row + 1) * config.seq_len]
        with torch.no_grad():
            hidden = [model(torch.tensor([inputs])) for model in models]
            logits = [logits_of(model, h)[0].double().numpy() for model, h in zip(models, hidden)]
        for t in range(len(inputs)):
            target = stream[row * config.seq_len + t + 1]
            each = [np.exp(z[t]) for z in logits]
            for i in range(t if config.row_memory else 0):
                for p, h in zip(each, hidden):
                    p[inputs[i + 1]] += math.exp(h[0, t] @ h[0, i] / config.model_dim ** 0.5)
            each = [p / p.sum() for p in each]
            for name, p in (("member 1", each[0]), ("ensemble", sum(each) / len(each))):
                found[name].append((p.max(), p.argmax() == target))
    return found


@pytest.mark.parametrize("name", ["three", "memory"])
def test_confidences_are_those_of_the_model(name, runs):
    trained = getattr(runs, name)
    run = plot.read_curves(trained.folder)
    notes = []
    confidence, correct = plot.confidences(run, 150, notes)
    assert notes == [] and list(confidence) == ["member 1", "ensemble"]
    for name, pairs in slow_confidences(trained, 150).items():
        assert len(confidence[name]) == len(correct[name]) == len(pairs) == 144    # whole rows
        assert confidence[name] == pytest.approx([p for p, _ in pairs], rel=1e-4)
        assert list(correct[name]) == [right for _, right in pairs]
    assert 0 < np.mean(correct["ensemble"]) < 1


def test_one_member_is_no_ensemble(runs):
    confidence, _ = plot.confidences(plot.read_curves(runs.one.folder), 64, [])
    assert list(confidence) == ["member 1"]


def test_less_than_a_row_of_val_is_scored_too(runs):
    confidence, _ = plot.confidences(plot.read_curves(runs.one.folder), 5, [])
    assert len(confidence["member 1"]) >= 5


def test_calibration_curves_are_of_the_confidences(of_three, runs):
    axes = panel(of_three, "Calibration on val")
    slow = slow_confidences(runs.three, 200)
    assert curves(axes)[0][1:] == ([0.0, 1.0], [0.0, 1.0])
    for name in ("member 1", "ensemble"):
        confidence, correct = map(np.array, zip(*slow[name]))
        x, y, gap = plot.reliability(confidence, correct)
        found = curve(axes, f"{name}: gap")
        assert found[0] == pytest.approx(x, rel=1e-4) and found[1] == pytest.approx(y)
        label, = (text for text, _, _ in curves(axes) if text.startswith(name))
        assert float(label.split()[-1]) == pytest.approx(gap, abs=6e-4)
    assert axes.get_xlabel() == "probability of the likeliest token"


def test_data_that_has_changed_is_said_in_the_panel(runs, copy):
    folder = copy(runs.one)
    result = json.loads((folder / "result.json").read_text())
    name = next(iter(result["data_sha256"]))
    result["data_sha256"][name] = "0" * 64
    (folder / "result.json").write_text(json.dumps(result))
    figure = drawn(folder / "plot.png", folder)
    axes = panel(figure, "Calibration on val")
    assert [text.get_text() for text in axes.texts] == ["run: the data has changed since"]
    assert len(axes.lines) == 1


def test_a_model_that_is_too_big_for_a_cpu_is_said_in_the_panel(runs, copy, monkeypatch):
    monkeypatch.setattr(plot, "MAX_FLOPS", 1e6)
    folder = copy(runs.one)
    figure = drawn(folder / "plot.png", folder)
    text, = panel(figure, "Calibration on val").texts
    assert "FLOPs are too many for a CPU" in text.get_text()


# ==== What cannot be ============================================================================
def test_no_matplotlib_is_one_line(runs, copy, monkeypatch):
    folder = copy(runs.one)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "no matplotlib: pip install -r tools/requirements.txt" in complaint(folder)
    assert not (folder / "plot.png").exists()


def test_what_is_no_run_is_one_line(tmp_path, runs):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "metrics.jsonl").write_text("")
    for folder in (tmp_path / "empty", tmp_path / "hollow", tmp_path / "not there"):
        error = complaint(folder)
        assert f"{folder}: neither metrics.jsonl nor result.json; is that a run?" in error
    complaint(runs.one.folder, tmp_path / "empty", f"--out={tmp_path / 'x.png'}")
    assert not (tmp_path / "x.png").exists()


def test_too_many_runs_and_what_is_no_picture_are_one_line(runs, tmp_path):
    assert "7 runs: at most 6 can be told apart" in complaint(*[runs.one.folder] * 7)
    path = tmp_path / "new" / "x.xyz"
    assert f"--out={path}: must end in .png, .pdf, .svg" in complaint(
        runs.one.folder, f"--out={path}")
    assert "--tokens=-1: must be 0" in complaint(runs.one.folder, "--tokens=-1")
    assert not path.parent.exists()


def test_a_picture_that_cannot_be_written_is_one_line(runs, tmp_path):
    (tmp_path / "none").touch()
    code, out, err, _ = tool(runs.one.folder, f"--out={tmp_path}/none/x.png", "--tokens=0")
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
