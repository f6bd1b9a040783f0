"""progress.png of a run: val loss by number of members.    python records/plot.py runs/ID"""
import json
import sys
from pathlib import Path


def plot_progress(result, path):
    """Plot the val losses of `result` (result.json) into `path`; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    curve = result["ensemble"]
    members = [result["members"][point["member"] - 1] for point in curve]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="members", ylabel="val loss (nats per token)")
    axes.plot([member["val_loss"] for member in members], "o-", label="member n alone")
    axes.plot([point["val_loss"] for point in curve], "s-", label="ensemble of the first n")
    axes.set_xticks(range(len(curve)), range(1, len(curve) + 1))
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    plot_progress(json.loads((folder / "result.json").read_text()), folder / "progress.png")
