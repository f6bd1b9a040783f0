"""Pictures of runs: losses by epoch, the ensemble, data efficiency, calibration; of several runs
also loss by time.

    python tools/plot.py runs/ID                      runs/ID/plot.png
    python tools/plot.py runs/A runs/B --out=ab.png   several runs in one picture

A run that is under way has its curves by epoch, all that tells whether it is healthy. Calibration
reads the members' weights and scores --tokens of val with them (0: not drawn).

Needs matplotlib: pip install -r tools/requirements.txt (./run.sh plot does it).
"""
import argparse
import json
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from _runs import load_member, probabilities, read_result, run_tool
from train_gpt import (BASELINES, UserError, data_efficiency, dataset_folder, equivalent_tokens,
                       load_dataset, num_parameters, start_runtime)

# told apart without colour too: each run has a line style, a marker and a lightness of its own
COLOURS = ("#1b3a6b", "#d1662b", "#4f9d69", "#b98bc9", "#8c8c8c", "#e0b13c")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = "osD^vP"
NATS = "loss (nats per token)"
ENDINGS = (".png", ".pdf", ".svg")
BINS = 10
MAX_FLOPS = 1e14            # of calibration, beyond which it is left out: half an hour of a CPU


class Curves(NamedTuple):
    """What is known of a run, finished or not."""
    name: str
    folder: Path
    readings: list              # lines of metrics.jsonl, the last of each step
    result: dict                # result.json, or {}
    config: object              # or None
    place: int = 0              # among the runs of the picture

    @property
    def look(self):
        """Colour, line and marker, the same in all panels."""
        return COLOURS[self.place], LINES[self.place], MARKERS[self.place]

    def of(self, member, key):
        """([epoch], [value]) of the readings of a member that have `key`."""
        found = [(r["epoch"], r[key]) for r in self.readings if r["member"] == member and key in r]
        return tuple(zip(*found)) or ((), ())

    @property
    def label(self):
        """The name, as long as a legend allows."""
        return self.name if len(self.name) <= 32 else f"{self.name[:21]}...{self.name[-8:]}"

    @property
    def members(self):
        return sorted({reading["member"] for reading in self.readings})


# ==== Reading ===================================================================================
def read_curves(folder, place=0):
    """The Curves of a run's folder; UserError if there is nothing to draw."""
    path = folder / "metrics.jsonl"
    finished = (folder / "result.json").exists()
    result, config = read_result(folder) if finished else ({}, None)
    steps = {}
    if path.exists():
        whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")      # the last may be torn
        for reading in map(json.loads, whole.splitlines()):
            if "step" in reading:
                steps[reading["member"], reading["step"]] = reading
    if not steps and not result:
        raise UserError(f"{folder}: neither metrics.jsonl nor result.json; is that a run?")
    return Curves(folder.resolve().name, folder, [steps[key] for key in sorted(steps)], result,
                  config, place)


def declared(result):
    """The key of the declared mixture's val loss in result["ensemble"]."""
    mixture = result["final_mixture"]
    return "val_loss" if mixture == "uniform" else f"val_loss_{mixture}"


# ==== Panels ====================================================================================
def draw_epochs(axes, runs):
    """Train loss and selection loss of each member by epoch; of several runs selection only."""
    single = len(runs) == 1
    for run in runs:
        colour, line, marker = run.look
        for member in run.members:
            last = member == run.members[-1]
            shade = 1.0 if last else 0.25 + 0.4 * member / max(run.members)
            if single:
                axes.plot(*run.of(member, "train_loss"), color=COLOURS[4], lw=0.8, alpha=shade,
                          label="train (first target)" if last else None)
            axes.plot(*run.of(member, "selection_loss"), color=colour, ls=line, marker=marker, ms=4,
                      alpha=shade, lw=2 if last else 1,
                      label=None if not last else
                      f"selection, member {member}" if single else run.label)
    axes.set(xlabel="epoch of a member", ylabel=NATS)
    title = "Losses by epoch" if single else "Loss on selection by epoch"
    earlier = any(len(run.members) > 1 for run in runs)
    axes.set_title(title + (" (earlier members fainter)" if earlier else ""))
    tops = [run.of(member, "selection_loss")[1] for run in runs for member in run.members]
    values = [value for top in tops for value in top]
    if values and single:       # the first steps' losses would flatten all that follows
        axes.set_ylim(top=max(values) + 0.35 * (max(values) - min(values)) + 0.1)
    axes.legend(fontsize=8)


def draw_gradients(axes, runs):
    """The gradient's norm by epoch, of the last member."""
    for run in runs:
        colour, line, _ = run.look
        member = run.members[-1]
        axes.plot(*run.of(member, "grad_norm"), color=colour, ls=line, lw=1,
                  label=f"{run.label}, member {member}" if len(runs) > 1 else f"member {member}")
    axes.set(xlabel="epoch of a member", ylabel="norm of the gradient", yscale="log")
    axes.set_title("Gradient")
    axes.legend(fontsize=8)


def draw_ensemble(axes, runs):
    """Val loss by number of members: alone, and of the mixtures."""
    single = len(runs) == 1
    for run in runs:
        colour, line, marker = run.look
        curve = run.result["ensemble"]
        key = declared(run.result)
        if single:
            alone = [member["val_loss"] for member in run.result["members"]]
            axes.plot(range(1, len(alone) + 1), alone, "x", color="black", label="member n alone")
            shown = {"uniform": "val_loss", "learned": "val_loss_learned",
                     "with n-gram": "val_loss_ngram"}
            styles = zip(shown.items(), COLOURS, LINES, MARKERS)
            for (name, loss), colour, line, marker in styles:
                points = [(p["n"], p[loss]) for p in curve if loss in p]
                if points:
                    axes.plot(*zip(*points), color=colour, ls=line, marker=marker, ms=5,
                              label=f"mixture: {name}" + " (declared)" * (loss == key))
        else:
            points = [(p["n"], p[key]) for p in curve if key in p]
            axes.plot(*zip(*points), color=colour, ls=line, marker=marker, ms=5, label=run.label)
    axes.set(xlabel="members", ylabel="val " + NATS)
    axes.set_title("Ensemble of the first n" + ("" if single else ", as declared"))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)


def draw_compute(axes, runs):
    """Val loss by FLOPs of training: of the mixtures of the first n members, as declared."""
    from matplotlib.ticker import LogLocator    # optional, as in `draw`
    for run in runs:
        colour, line, marker = run.look
        key = declared(run.result)
        # runs of earlier versions have none
        ends = np.cumsum([member.get("train_flops", np.nan) for member in run.result["members"]])
        points = [(ends[p["n"] - 1], p[key]) for p in run.result["ensemble"] if key in p]
        axes.plot(*zip(*points), color=colour, ls=line, marker=marker, ms=5, label=run.label)
    axes.set(xlabel="FLOPs of training", ylabel="val " + NATS, xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:.0e}".replace("e+", "e"))
    axes.minorticks_off()
    axes.set_title("Does compute go on paying?")
    axes.legend(fontsize=8)


def draw_efficiency(axes, runs):
    """The baselines' curves, and where the runs' losses meet them."""
    curves = next((run.result["data_efficiency"]["curve"] for run in runs if run.result and
                   run.result["data_efficiency"]["curve"]), None)
    axes.set_title("Data efficiency")
    if not curves:
        return say(axes, "no baseline curve of this data:\ntools/baseline.py measures one")
    for kind, line, label in (("one_epoch", "-", "plain model, one epoch"),
                              ("tuned", "--", "plain model, tuned"),
                              ("single", ":", "one such member, tuned")):
        if curves.get(kind):
            axes.plot(*zip(*curves[kind]), color=COLOURS[4], ls=line, marker=".", label=label)
    for run in runs:
        colour, _, marker = run.look
        if run.result:
            loss, tokens = run.result["val_loss"], run.result["train_tokens"]
            found = data_efficiency(loss, curves, tokens)
            times = f"{run.label}: " + ", ".join(f"{found[kind]}x" for kind in BASELINES
                                                 if curves.get(kind))
            axes.plot(tokens, loss, marker, color=colour, ms=8,
                      label=times if len(runs) > 1 else f"this run: {loss:.4f}")
            if len(runs) == 1:
                draw_multiples(axes, loss, tokens, curves, found, colour)
    axes.set(xlabel="training tokens", ylabel="val " + NATS, xscale="log")
    points = [point for kind in BASELINES for point in curves.get(kind) or []]
    ticks = []
    for tick in sorted({tokens for tokens, _ in points}):
        if not ticks or tick >= 1.5 * ticks[-1]:        # labels need room
            ticks.append(tick)
    axes.set_xticks(ticks, [as_tokens(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=8)


def as_tokens(count):
    """50k, 1.2M, 3B of a number of tokens."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:g}{unit}"
    return f"{count:g}"


def draw_multiples(axes, loss, tokens, curves, found, colour):
    """Lines from a run's point to the curves, each with its multiple, of data_efficiency."""
    for kind, above in (("single", -1), ("tuned", -1), ("one_epoch", 1)):
        if not curves.get(kind):
            continue
        there, _ = equivalent_tokens(loss, curves[kind])
        axes.annotate("", (there, loss), (tokens, loss),
                      arrowprops={"arrowstyle": "->", "color": colour, "lw": 1})
        if there < 1.2 * tokens:        # no room at the left
            above = 1
        axes.annotate(f"{found[kind]}x", (there, loss), (6 * above, 6 * above), fontsize=9,
                      color=colour, textcoords="offset points",
                      ha="left" if above > 0 else "right", va="bottom" if above > 0 else "top")


def draw_calibration(axes, runs, tokens):
    """How often the likeliest token is right, by how likely it was said to be."""
    axes.set_title("Calibration on val")
    axes.plot([0, 1], [0, 1], color="black", lw=0.8, label="perfect")
    said = []
    for run in runs:
        confidence, correct = confidences(run, tokens, said)
        for name, style in (("member 1", 0), ("ensemble", 1)):
            if name not in confidence or (len(runs) > 1 and name != list(confidence)[-1]):
                continue
            x, y, gap = reliability(confidence[name], correct[name])
            label = f"{run.label}: {gap:.3f}" if len(runs) > 1 else f"{name}: gap {gap:.3f}"
            colour, line, marker = run.look if len(runs) > 1 else (
                COLOURS[style], LINES[style], MARKERS[style])
            axes.plot(x, y, color=colour, ls=line, marker=marker, ms=5, label=label)
    axes.set(xlabel="probability of the likeliest token", ylabel="part that is right")
    axes.legend(fontsize=8, loc="upper left")
    if said:
        axes.text(0.98, 0.02, "\n".join(said), ha="right", va="bottom", fontsize=7,
                  transform=axes.transAxes)


def say(axes, text):
    """A panel with words instead of a curve."""
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=9, transform=axes.transAxes)
    axes.set(xticks=[], yticks=[])


# ==== Calibration ===============================================================================
@torch.no_grad()
def confidences(run, tokens, said):
    """({name: largest probability [n]}, {name: whether it was the target's [n]}) of member 1 and of
    the equal mixture of all; {} if it cannot be, with a line in `said`."""
    config = run.config
    try:
        data = load_dataset(dataset_folder(config), config)
        if data.hashes != run.result["data_sha256"]:
            raise UserError("the data has changed since")
        runtime = start_runtime(config)
        count = min(tokens, sum(map(len, data.scored["val"])) - 1) // config.seq_len
        text = torch.from_numpy(np.concatenate(data.scored["val"]).astype(np.int64))
        mixed, found = 0.0, {}
        for number in range(1, len(run.result["members"]) + 1):
            model = load_member(run.folder, number, config, runtime)
            work = 2 * num_parameters(model) * tokens * len(run.result["members"])
            if work > MAX_FLOPS and runtime.device.type == "cpu":
                raise UserError(f"{work:.0e} FLOPs are too many for a CPU")
            p = torch.cat([row_probabilities(model, text, row, config, runtime)
                           for row in range(max(1, count))])
            mixed = mixed + p
            found.setdefault("member 1", p)
        if len(run.result["members"]) > 1:
            found["ensemble"] = mixed / len(run.result["members"])
    except UserError as error:
        said.append(f"{run.label}: {error}")
        return {}, {}
    targets = text[1:1 + len(mixed)]
    best = {name: p.max(dim=1) for name, p in found.items()}
    return ({name: top.values.numpy() for name, top in best.items()},
            {name: (top.indices == targets).numpy() for name, top in best.items()})


def row_probabilities(model, text, row, config, runtime):
    """p of the tokens after those of row `row` of `text`, fp64 [T, vocab_size]."""
    inputs = text[row * config.seq_len:(row + 1) * config.seq_len][:len(text) - 1]
    inputs = inputs[:len(text) - 1 - row * config.seq_len].unsqueeze(0).to(runtime.device)
    return probabilities(model, inputs)[0]


def reliability(confidence, correct):
    """(mean confidence, part that is right) of equally many tokens a point, and their gap: the
    expected calibration error (Naeini et al. 2015), with bins of equal size."""
    parts = np.array_split(np.argsort(confidence, kind="stable"), BINS)
    x = np.array([confidence[part].mean() for part in parts if len(part)])
    y = np.array([correct[part].mean() for part in parts if len(part)])
    sizes = np.array([len(part) for part in parts if len(part)])
    return x, y, float(np.average(np.abs(x - y), weights=sizes))


# ==== The picture ===============================================================================
def draw(runs, path, tokens):
    """Draw the panels that `runs` have something for into `path`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("no matplotlib: pip install -r tools/requirements.txt") from None
    finished = [run for run in runs if run.result]
    trained = [run for run in runs if run.readings]
    panels = []
    if trained:
        panels.append((draw_epochs, trained))
    if any(len(run.result["members"]) > 1 for run in finished):
        panels.append((draw_ensemble, finished))
        if len(finished) > 1:
            panels.append((draw_compute, finished))
    elif trained and any("grad_norm" in reading for run in trained for reading in run.readings):
        panels.append((draw_gradients, trained))
    if finished:
        panels.append((draw_efficiency, finished))
    with_weights = [run for run in finished if (run.folder / "members/001.safetensors").exists()]
    if with_weights and tokens:
        panels.append((draw_calibration, with_weights, tokens))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6 * columns, 4.2 * rows), layout="constrained")
    for place, (panel, *arguments) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.grid(alpha=0.3)
        panel(axes, *arguments)
    heading = title(runs[0]) if len(runs) == 1 else f"{len(runs)} runs"
    figure.suptitle(textwrap.fill(heading, 55 * columns), fontsize=11)
    figure.savefig(path, dpi=110)


def title(run):
    if not run.result:
        return f"{run.name} (not finished)"
    result = run.result
    return (f"{run.name}: val loss {result['val_loss']:.4f}, {result['final_mixture']} mixture of"
            f" {len(result['members'])}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, help="the picture [RUN/plot.png, of several plot.png]")
    parser.add_argument("--tokens", type=int, default=16_384, help="of val, for calibration"
                        " [%(default)s]")
    args = parser.parse_args()
    if args.tokens < 0:
        raise UserError(f"--tokens={args.tokens}: must be 0 (no calibration) or more")
    if len(args.runs) > len(COLOURS):
        raise UserError(f"{len(args.runs)} runs: at most {len(COLOURS)} can be told apart")
    runs = [read_curves(folder, place) for place, folder in enumerate(args.runs)]
    path = args.out or (args.runs[0] / "plot.png" if len(runs) == 1 else Path("plot.png"))
    if path.suffix not in ENDINGS:
        raise UserError(f"--out={path}: must end in {', '.join(ENDINGS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, path, args.tokens)
    print(path)


if __name__ == "__main__":
    run_tool(main)
