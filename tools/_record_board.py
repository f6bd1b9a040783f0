"""`record.py leaderboard`: the tables between markers and records/history.png, from result.json."""
import json
import os
import struct
import zlib
from pathlib import Path

from _record_files import as_loss, between, history, read_record, record_folders, sha256
from _record_verify import check_schema, numbers_of
from plot import COLOURS
from train_gpt import BASELINES, TRACK_NAMES, UserError, minutes, write_whole

PICTURE = Path("records/history.png")
KEYWORD = b"numbers"        # of the picture's text chunk that holds the hash of what it shows
# facts reported elsewhere: (track, val loss, what, pull request)
PUBLIC = (("tiny", 3.295, "15 minutes on 8 H100", 99), ("limited", 3.183, "1 hour on 8 H100", 98),
          ("two_hour", 3.139, "2 hours on 8 H100", 96),
          ("unlimited", 2.987, "80 hours on 5 x 8 H100", 90))
PULL = "https://github.com/qlabs-eng/slowrun/pull"


# ==== Tables ====================================================================================
def as_cell(text):
    """A text that ends no cell of a table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def multiples_of(result):
    """"7.66x one epoch, 1.99x tuned", or n/a."""
    names = {"one_epoch": "one epoch", "tuned": "tuned", "single": "a tuned member"}
    found = [f"{value}x {names[kind]}" for kind, value in result["data_efficiency"].items()
             if value != "n/a"]
    return ", ".join(found) or "n/a"


def what_it_is(result):
    """The description, and a word if it is no improvement."""
    against = result["against"]
    text = as_cell(result["description"])
    if not against["improves"]:
        return f"{text} (valid, not significantly better: {against['difference']:+.4f})"
    if against["by"] == "time":
        return f"{text} (faster: {against['time']:.2f} of the time)"
    return text


def row(record, base, with_track=False):
    """A record's line; links are from the folder `base`."""
    result = record.result
    log = os.path.relpath(record.folder / "seed1.log", base)
    bpb = f"{result['val_bpb']['mean']:.4f}" if result["val_bpb"] else "n/a"
    times = [minutes(result[key]) for key in ("train_seconds", "wall_seconds")]
    number = f"[{result['number']}]({os.path.relpath(record.folder, base)})"
    cells = [number, f"{as_loss(result['val_loss'])}, n = {result['n']}",
             as_loss(result["holdout_loss"]), bpb, multiples_of(result), what_it_is(result),
             result["date"], ", ".join(times),
             as_cell(result["hardware"]), f"[log]({log})", as_cell(result["author"])]
    if with_track:
        cells.insert(0, f"`{result['track']}`")
    return f"| {' | '.join(cells)} |"


HEADER = ("number", "val", "holdout", "bits per byte", "multiples of the data", "description",
          "date", "training, wall time", "hardware", "log", "contributors")


def table(records, base, with_track=False):
    """Lines of a table of records."""
    names = [*(["track"] if with_track else []), *HEADER]
    return [f"| {' | '.join(names)} |", f"|{'-|' * len(names)}",
            *(row(record, base, with_track) for record in records)]


def public_table():
    """Lines on what was reported elsewhere, by others, and not checked here."""
    rows = [f"| `{track}` | {loss} | {what} | [#{pull}]({PULL}/{pull}) |"
            for track, loss, what, pull in PUBLIC]
    return ["Reported elsewhere (the public leaderboard of the NanoGPT Slowrun; not run here):", "",
            "| track | val | time | pull request |", "|-|-|-|-|", *rows]


def all_tables(tracks, base):
    """The text of records/README.md: a table of each track, the picture, the public results."""
    lines = []
    for track, records in tracks.items():
        lines += [f"### `{track}`", "", *table(records, base), ""]
    if not tracks:
        lines += ["No records yet.", ""]
    else:
        lines += ["val is the mean over seeds ± its standard error; a multiple is how many times"
                  " the data a plain model would need.", "",
                  "![val, holdout and multiples by record](history.png)", ""]
    return "\n".join([*lines, *public_table(), ""])


def short_tables(tracks, base):
    """The text of the root README: the newest record of each track, the public results."""
    best = []
    for records in tracks.values():
        better = [record for record in records if record.result["against"]["improves"]]
        best += better[-1:]
    lines = table(best, base, with_track=True) if best else ["No records yet."]
    return "\n".join([*lines, "", *public_table(), ""])


# ==== The picture ===============================================================================
def numbers_drawn(tracks):
    """{track: [{number, val, val_error, holdout, multiples}]}: all that the picture shows."""
    drawn = {}
    for track, records in tracks.items():
        drawn[track] = []
        for record in records:
            result = record.result
            multiples = {kind: as_number(result["data_efficiency"].get(kind))
                         for kind in ("one_epoch", "tuned")}
            drawn[track].append({
                "number": result["number"], "improves": result["against"]["improves"],
                "val": result["val_loss"]["mean"],
                "val_error": result["val_loss"]["standard_error"],
                "holdout": result["holdout_loss"]["mean"], **multiples})
    return drawn


def as_number(multiple):
    """A multiple of the data as a number; None if it is not known, the bound of "> 12.4"."""
    if multiple in (None, "n/a"):
        return None
    return float(str(multiple).lstrip("<> "))


def draw_losses(axes, rows, track):
    """Val with its standard error, and holdout, by record."""
    numbers = [point["number"] for point in rows]
    errors = [point["val_error"] or 0.0 for point in rows]
    axes.errorbar(numbers, [point["val"] for point in rows], yerr=errors, color=COLOURS[0],
                  marker="o", ms=5, capsize=3, label="val (± standard error)")
    axes.plot(numbers, [point["holdout"] for point in rows], color=COLOURS[1], ls="--", marker="s",
              ms=4, label="holdout")
    plain = [point for point in rows if not point["improves"]]
    axes.plot([point["number"] for point in plain], [point["val"] for point in plain], "x",
              color="black", ms=10, label="not significantly better" if plain else None)
    axes.set(xlabel="record", ylabel="loss (nats per token)", title=f"{track}: losses")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)


def draw_multiples(axes, rows, track):
    """How many times the data a plain model needs for the same loss, by record."""
    for kind, colour, line, marker in zip(("one_epoch", "tuned"), COLOURS, ("-", "--"), "os"):
        points = [(point["number"], point[kind]) for point in rows if point[kind] is not None]
        if points:
            axes.plot(*zip(*points), color=colour, ls=line, marker=marker, ms=5,
                      label=f"against {BASELINES[kind]}")
    axes.set(xlabel="record", ylabel="times the data", title=f"{track}: what it is worth")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if axes.lines:
        axes.legend(fontsize=8)


def draw(drawn, path):
    """Write the picture of numbers_drawn, with their hash in it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("no matplotlib: pip install -r tools/requirements.txt") from None
    figure = Figure(figsize=(12, 4.2 * len(drawn)), layout="constrained")
    for place, (track, rows) in enumerate(drawn.items()):
        for panel, function in enumerate((draw_losses, draw_multiples)):
            axes = figure.add_subplot(len(drawn), 2, 2 * place + panel + 1)
            axes.grid(alpha=0.3)
            function(axes, rows, track)
    metadata = {KEYWORD.decode(): digest(drawn)}
    write_whole(path, lambda beside: figure.savefig(beside, dpi=110, format="png",
                                                    metadata=metadata))


def digest(drawn):
    """SHA-256 of what is drawn."""
    return sha256(json.dumps(drawn, sort_keys=True))


def digest_in(path):
    """The hash that `draw` put into a picture; None if there is no picture, or none in it."""
    data = path.read_bytes() if path.exists() else b""
    place = 8                   # behind the signature: length, kind, data, checksum of each chunk
    while place + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[place:place + 8])
        body = data[place + 8:place + 8 + length]
        checksum = data[place + 8 + length:place + 12 + length]
        is_whole = checksum == struct.pack(">I", zlib.crc32(kind + body))
        if kind == b"tEXt" and is_whole and body.startswith(KEYWORD + b"\0"):
            return body[len(KEYWORD) + 1:].decode("latin-1")
        place += 12 + length
    return None


# ==== The command ===============================================================================
def read_tracks(root):
    """{track: [Record]} of all tracks that have records, in the order of the script's."""
    names = {folder.parent.name for folder in record_folders(root)}
    for folder in record_folders(root):
        wrong = check_schema(read_record(folder))
        if wrong:
            raise UserError(f"{folder}: {wrong[0]}; ./run.sh record verify says all")
    ordered = [name for name in TRACK_NAMES if name in names] + sorted(names - set(TRACK_NAMES))
    return {track: history(root, track) for track in ordered}


def texts_of(root, tracks):
    """[(file, markers' name, text that belongs between them)]."""
    texts = [(root / "records/README.md", "leaderboard", all_tables(tracks, root / "records")),
             (root / "README.md", "leaderboard", short_tables(tracks, root))]
    for records in tracks.values():
        texts += [(record.folder / "README.md", "numbers", numbers_of(record.result))
                  for record in records]
    return texts


def leaderboard(root, check):
    """(lines, exit code: 1 if `check` and something is stale)."""
    tracks = read_tracks(root)
    lines = []
    for path, name, text in texts_of(root, tracks):
        head, inside, tail = between(path, name)
        if inside == text:
            continue
        lines.append(f"stale     {path.relative_to(root)}: what is between its markers")
        if not check:
            whole = head + text + tail
            write_whole(path, lambda beside: beside.write_text(whole, encoding="utf-8"))
    picture, drawn = root / PICTURE, numbers_drawn(tracks)
    if digest_in(picture) != (digest(drawn) if drawn else None):
        lines.append(f"stale     {PICTURE}: drawn from other numbers")
        if not check and drawn:
            draw(drawn, picture)
        elif not check:
            picture.unlink()
    if not lines:
        return ["tables and picture are those of the records"], 0
    if check:
        return [*lines, "make them anew: ./run.sh record leaderboard"], 1
    return [line.replace("stale  ", "made   ") for line in lines], 0
