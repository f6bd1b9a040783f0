"""Records: made from finished runs, checked, run again from their logs, and ranked.

    python tools/record.py submit runs/a runs/b runs/c --slug=NAME --author=WHO
    python tools/record.py verify                       all records, or the FOLDERs that are named
    python tools/record.py replay records/cpu/2026-12-01_name
    python tools/record.py leaderboard                  tables and picture; --check: are they stale?

A record is a clean run of one track, without overrides, over seeds 1..n: records/README.md has the
rules. `submit` and `verify` apply them alike. `replay` needs nothing but a log and the dataset.

Needs scipy and matplotlib: pip install -r tools/requirements.txt (./run.sh record does it).
"""
import argparse
from pathlib import Path

from _record_board import leaderboard
from _record_files import record_folders, as_loss, verdict
from _record_replay import replay
from _record_submit import submit
from _record_verify import check_record, drift
from _runs import ROOT, run_tool
from train_gpt import UserError


def verify(args):
    """(lines on the records in `args.folders`, or on all; exit code 1 if one is not sound)."""
    folders = [folder.resolve() for folder in args.folders] or record_folders(args.repository)
    if not folders:
        return ["no records yet: nothing to verify"], 0
    lines, code = [], 0
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        notes = []
        wrong, record = check_record(args.repository, folder, notes)
        if wrong:
            code = 1
            lines += [f"WRONG     {record.name}: {sentence}" for sentence in wrong]
        else:
            result = record.result
            lines.append(f"sound     {record.name}: val {as_loss(result['val_loss'])}, holdout"
                         f" {as_loss(result['holdout_loss'])}, n = {result['n']};"
                         f" {verdict(result['against'])}")
        lines += [f"note      {record.name}: {note}" for note in dict.fromkeys(notes)]
    if not code:
        for track in dict.fromkeys(folder.parent.name for folder in folders):
            lines += drift(args.repository, track)
    return lines, code


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--repository", type=Path, default=ROOT, metavar="FOLDER",
                        help="whose records these are [this one]")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("submit", parents=[shared], help="make a record of runs")
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a seed's finished run")
    command.add_argument("--slug", required=True, help="its name, in the folder's")
    command.add_argument("--author", required=True, help="those who made it")
    command.add_argument("--description", default="", help="in a line what is new")
    command.add_argument("--logp_place", default="", metavar="URL",
                         help="where log p is, if it is too large for the repository")
    command = commands.add_parser("verify", parents=[shared], help="check records")
    command.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", help="records [all]")
    command = commands.add_parser("replay", parents=[shared], help="run a record's log again")
    command.add_argument("log", type=Path, metavar="FOLDER_OR_LOG", help="a record, or a run's log")
    command.add_argument("--keep", type=Path, metavar="FOLDER",
                         help="where the new run is left [nowhere]")
    command = commands.add_parser("leaderboard", parents=[shared], help="make tables and picture")
    command.add_argument("--check", action="store_true", help="only say whether they are stale")
    args = parser.parse_args()
    args.repository = args.repository.resolve()
    return args


def main():
    args = parse_arguments()
    if args.command == "submit":
        lines, code = submit(args), 0
    elif args.command == "verify":
        lines, code = verify(args)
    elif args.command == "replay":
        lines, code = replay(args)
    else:
        lines, code = leaderboard(args.repository, args.check)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    run_tool(main)
