"""Val loss of a finished run by number of members, as a picture: progress.png in its folder.

    python tools/plot.py runs/ID

Needs matplotlib: pip install -r tools/requirements.txt (./run.sh plot does it).
"""
import argparse
from pathlib import Path

from _runs import read_result, run_tool
from train_gpt import UserError


def plot_progress(result, path):
    """Plot the val losses of `result` (result.json) into `path`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("no matplotlib: pip install -r tools/requirements.txt") from None
    members = [member["val_loss"] for member in result["members"]]
    mixtures = [point["val_loss"] for point in result["ensemble"]]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="members", ylabel="val loss (nats per token)")
    axes.plot(range(1, len(members) + 1), members, "o-", label="member n alone")
    axes.plot(range(1, len(mixtures) + 1), mixtures, "s--", label="ensemble of the first n")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    args = parser.parse_args()
    result, _ = read_result(args.run)
    plot_progress(result, args.run / "progress.png")
    print(args.run / "progress.png")


if __name__ == "__main__":
    run_tool(main)
