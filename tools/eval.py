"""Losses of a finished run on other text of the same tokens: by member, mixture and source.

    python tools/eval.py runs/ID                    the run's own dataset: val and holdout
    python tools/eval.py runs/ID FOLDER FOLDER --split=val --out=losses.json
    python tools/eval.py runs/ID FOLDER --strided

A dataset is a folder of shards (data/shards.py) with the run's vocabulary and ranks. The text that
the run was trained on is not needed; where it is at hand, what is evaluated is looked for in it.

The protocol is the record's: rows of seq_len tokens that overlap by one, each token scored once;
the weights of the `learned` mixture are those that the run fitted on its selection. With --strided
every token is scored once more, in a row in which at least half a row stands before it (but for the
first half row): that looks further back than the record's protocol and is no number of a record.

A source has the tokens of its documents, the end of each among them. What a taught member keeps is
its part, below the loss of member 1, of what the uniform mixture of the untaught ones gains.
"""
import argparse
import math
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from _runs import read_own_result, run_tool, tokenizer_folder
from data.token_tables import read_ranks
from train_gpt import (PROGRESS_SECONDS, Trainer, UserError, check_name, check_ranges,
                       cut_documents, dataset_folder, is_distilled, load_dataset, mean_loss,
                       member_path, mixture_logp, read_meta, read_shard, read_tensors,
                       read_token_tables, start_runtime, write_json)

SPLITS = ("val", "holdout")     # what is scored unless --split says otherwise
SHOWN_SOURCES = 20              # on the console: those that have most tokens


class Text(NamedTuple):
    """A split of a dataset, as it is scored: n tokens are predicted."""
    dataset: str
    split: str
    tokens: np.ndarray          # int64 [n + 1]
    sizes: np.ndarray | None    # int64 [n]: bytes of the targets, if they are known
    sources: np.ndarray | None  # [n]: names of what the targets are from, if the dataset says it
    known: np.ndarray | None    # bool [n]: of documents that the run was trained on, if known


# ==== Tokens ====================================================================================
class Tokenizer(NamedTuple):
    """What a folder says of its tokens."""
    vocab_size: int
    bos: int
    pattern: str | None         # by which text is cut before it is encoded
    ranks: dict | None          # {token: bytes}, if its file is there


def read_tokenizer(folder):
    """The Tokenizer of a folder with meta.json; UserError if that does not say enough."""
    meta, _ = read_meta(folder)
    path = folder / str(meta.get("ranks", "ranks.tiktoken"))
    try:
        ranks = read_ranks(path) if path.exists() else None
        return Tokenizer(meta["vocab_size"], meta["bos_id"], meta.get("pattern"), ranks)
    except KeyError as error:
        raise UserError(f"{folder}: no dataset: it has no meta.json with {error}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no ranks of tokens ({error})") from None


def check_same_tokens(folder, ours, theirs):
    """UserError if the dataset in `folder`, with the Tokenizer `theirs`, is not of our tokens."""
    for name in ("vocab_size", "bos", "pattern"):
        a, b = getattr(ours, name), getattr(theirs, name)
        if a != b and None not in (a, b):
            raise UserError(f"{folder}: other tokens than the run's: {name} is {b!r}, not {a!r};"
                            " build it with the run's ranks")
    if ours.ranks != theirs.ranks:
        where = [side for side, tokenizer in (("the run", ours), ("this dataset", theirs))
                 if tokenizer.ranks is None]
        why = f"no file of ranks with {where[0]}" if where else "their ranks differ"
        raise UserError(f"{folder}: not known to be of the run's tokens: {why}; build it with the"
                        " run's ranks")


def token_sizes(folder, tokenizer, config):
    """int64 [vocab_size]: bytes of each token of a dataset; None if nothing says it."""
    tables, _ = read_token_tables(folder, replace(config, spelling=False, split_tokens=0.0))
    if tables:
        return tables["bytes"]
    if tokenizer.ranks is None:
        return None
    return np.array([len(tokenizer.ranks.get(token, b"")) for token in range(config.vocab_size)])


# ==== Text ======================================================================================
def source_names(folder, meta, key, count):
    """Names of the sources of a shard's `count` documents, by meta.json of the dataset in `folder`;
    None of each if it does not say. UserError if what it says is not of these."""
    try:
        if key in meta.get("document_sources", {}):
            names = [meta["sources"][i] for i in meta["document_sources"][key]]
        else:
            works = [work for entry in meta.get("provenance", ()) for work in entry["works"]]
            titles = {work["key"]: work["title"] for work in works}
            letters = meta.get("document_works", {}).get(key, [None] * count)
            names = [titles.get(letter, letter) for letter in letters]
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/meta.json: the sources of {key} cannot be read"
                        f" ({type(error).__name__}: {error})") from None
    if len(names) != count:
        raise UserError(f"{folder}/meta.json: sources of {len(names)} documents of {key}, which has"
                        f" {count}; build the dataset again")
    return names


def read_split(folder, split, config):
    """[(document, name of its source or None)] of a split, [] if there is none."""
    meta, listed = read_meta(folder)
    paths = {"_".join(path.stem.split("_")[-2:]): path for path in folder.glob(f"*_{split}_*.bin")}
    documents = []
    for key in sorted({*paths, *(key for key in listed if key.startswith(f"{split}_"))}):
        if key not in paths:
            raise UserError(f"{folder}: {key}, which meta.json lists, is missing; get it")
        tokens, bos, _ = read_shard(paths[key], config.vocab_size, listed.get(key))
        parts = np.split(tokens, np.flatnonzero(tokens == bos)[1:])
        names = source_names(folder, meta, key, len(parts))
        documents += [pair for pair in zip(parts, names) if len(pair[0]) > 1]
    return documents


def read_text(dataset, split, config, sizes, is_known):
    """The Text of a split, or None. sizes: of token_sizes; is_known: of known_documents."""
    documents = read_split(folder_of(dataset, config), split, config)
    if not documents:
        return None
    kept = cut_documents([part for part, _ in documents], max(2, config.eval_tokens or math.inf))
    documents = documents[:len(kept)]
    lengths = [len(part) for part in kept]
    tokens = np.concatenate(kept).astype(np.int64)
    sources = known = None
    names = [name for _, name in documents]
    if None not in names:
        sources = np.repeat(names, lengths)[:-1]
    if is_known is not None:
        known = np.repeat([is_known(part) for part, _ in documents], lengths)[:-1]
    sizes = None if sizes is None else sizes[tokens[1:]]
    return Text(dataset, split, tokens, sizes, sources, known)


def known_documents(config, result):
    """A function that tells whether the run was trained on a document; None if that is not known,
    for its dataset is not at hand or has changed."""
    try:
        data = load_dataset(dataset_folder(config), config)
    except UserError:
        return None
    if data.hashes != result["data_sha256"]:
        return None
    texts = {document.tobytes() for document in data.train}
    last = data.train[-1].tobytes()             # the budget may have shortened it

    def is_known(document):
        return document.tobytes() in texts or document.tobytes().startswith(last)
    return is_known


def folder_of(dataset, config):
    """Where a dataset lies: as the script looks for its own."""
    return dataset_folder(replace(config, dataset=dataset))


def read_texts(datasets, splits, config, tokenizer, is_known):
    """A list of Texts. UserError if a dataset is not of the run's tokens, or has no such split."""
    texts = []
    for dataset in datasets:
        folder = folder_of(dataset, config)
        theirs = read_tokenizer(folder)
        check_same_tokens(folder, tokenizer, theirs)
        sizes = token_sizes(folder, theirs, config)
        found = {split: read_text(dataset, split, config, sizes, is_known)
                 for split in splits or SPLITS}
        missing = [split for split, text in found.items() if text is None]
        if missing and (splits or len(missing) == len(found)):
            raise UserError(f"{folder}: no {' and no '.join(missing)} shards")
        texts += [text for text in found.values() if text is not None]
    return texts


# ==== Scores ====================================================================================
def look_back(logp, trainer, tokens, bos):
    """log p(target) [n] like `logp`, that of the record's protocol, but each from a row in which
    at least half a row stands before it: else from rows that begin half a row later."""
    size = trainer.config.seq_len
    half = size // 2
    position = np.arange(len(logp))
    early = np.flatnonzero((position >= half) & (position % size < half))
    longer = logp.copy()
    if len(early):
        longer[early] = trainer.score(tokens[half:], bos)[early - half]
    return longer


def score_members(run, count, texts, trainer, bos, strided):
    """{protocol: [[log p(target), fp32 [n], of each member] of each Text]}."""
    scores = {"record": [[] for _ in texts]}
    if strided:
        scores["strided"] = [[] for _ in texts]
    trainer.model.eval()
    last = time.monotonic()
    for number in range(1, count + 1):
        weights, _ = read_tensors(member_path(run, number))
        trainer.model.load_state_dict(weights)
        for i, text in enumerate(texts):
            logp = trainer.score(text.tokens, bos)
            scores["record"][i].append(logp)
            if strided:
                scores["strided"][i].append(look_back(logp, trainer, text.tokens, bos))
        if time.monotonic() - last > PROGRESS_SECONDS:
            print(f"member {number}/{count} is scored", flush=True)
            last = time.monotonic()
    return scores


def mixtures_of(logps, result, config):
    """{name: log p(target), fp64 [n]} of the members' mixtures: `uniform`, `learned` if the run has
    weights, the `declared` one of the two, and the uniform one of those that are `untaught`, if
    these are two or more and others are taught."""
    mixtures = {"uniform": mixture_logp(logps)}
    weights = result["ensemble"][-1].get("weights_learned")
    if weights:                                 # of six digits: they need not add up to 1
        mixtures["learned"] = mixture_logp(logps, np.array(weights) / sum(weights))
    mixtures["declared"] = mixtures[result["final_mixture"]]
    untaught = [logp for number, logp in enumerate(logps, 1) if not is_distilled(config, number)]
    if 1 < len(untaught) < len(logps):
        mixtures["untaught"] = mixture_logp(untaught)
    return mixtures


def losses(logps, mixtures, sizes, where):
    """Tokens, losses and bits per byte of the targets `where`, bool [n]."""
    numbers = {"tokens": int(where.sum()),
               "members": [mean_loss(logp[where]) for logp in logps],
               **{name: mean_loss(logp[where]) for name, logp in mixtures.items()},
               "bytes": None, "bits_per_byte": None}
    if sizes is not None and sizes[where].any():
        numbers["bytes"] = int(sizes[where].sum())
        bits = numbers["declared"] / math.log(2) * numbers["tokens"]
        numbers["bits_per_byte"] = bits / numbers["bytes"]
    return numbers


def kept_gains(numbers, config):
    """{number of a taught member: its part of what the untaught ones' mixture gains over member 1};
    {} if there is no such gain."""
    first, *_ = members = numbers["members"]
    gain = first - numbers.get("untaught", first)
    taught = [number for number in range(1, len(members) + 1) if is_distilled(config, number)]
    return {number: (first - members[number - 1]) / gain for number in taught if gain > 0}


def measure(text, logps, result, config):
    """All numbers of a Text from its members' log p: of the whole, and of each source."""
    mixtures = mixtures_of(logps, result, config)
    numbers = losses(logps, mixtures, text.sizes, np.ones(len(text.tokens) - 1, bool))
    numbers["kept"] = kept_gains(numbers, config)
    if text.sources is not None:
        numbers["sources"] = {
            str(name): losses(logps, mixtures, text.sizes, text.sources == name)
            for name in np.unique(text.sources)}
    return numbers


def evaluate(run, datasets, splits, result, config, strided):
    """[{"dataset", "split", "known_tokens", "record": numbers, "strided": numbers}] of measure."""
    tokenizer = read_tokenizer(tokenizer_folder(run, result, config))
    is_known = known_documents(config, result)
    texts = read_texts(datasets, splits, config, tokenizer, is_known)
    alone = replace(config, compile=False, kd_alpha=0.0)        # without a teacher
    trainer = Trainer(alone, start_runtime(alone))
    scores = score_members(run, len(result["members"]), texts, trainer, tokenizer.bos, strided)
    return [{"dataset": text.dataset, "split": text.split,
             "known_tokens": None if text.known is None else int(text.known.sum()),
             **{protocol: measure(text, logps[i], result, config)
                for protocol, logps in scores.items()}} for i, text in enumerate(texts)]


# ==== Report ====================================================================================
def table(rows):
    """Lines of rows [label, cell, ...], in columns; cells are at the right of theirs."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for label, *cells in rows:
        right = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:]))
        lines.append(f"{label:<{widths[0]}}{right}".rstrip())
    return lines


def with_digits(value):
    """A loss as the report has it."""
    return "n/a" if value is None else f"{value:.4f}"


def loss_rows(found, protocol, result, config):
    """Rows of a table with a column for each split of a dataset, of `evaluate`."""
    numbers = [part[protocol] for part in found]
    rows = [["", *(part["split"] for part in found)],
            ["tokens", *(f"{part['tokens']:,}" for part in numbers)]]
    for number in range(1, len(result["members"]) + 1):
        taught = ", taught" if is_distilled(config, number) else ""
        rows.append([f"member {number}{taught}",
                     *(with_digits(part["members"][number - 1]) for part in numbers)])
    for name in ("uniform", "learned"):
        if name in numbers[0]:
            declared = ", declared" if name == result["final_mixture"] else ""
            rows.append([f"{name}{declared}", *(with_digits(part[name]) for part in numbers)])
    rows.append(["bits per byte", *(with_digits(part["bits_per_byte"]) for part in numbers)])
    for number in sorted({number for part in numbers for number in part["kept"]}):
        shares = (part["kept"].get(number) for part in numbers)
        rows.append([f"member {number} keeps", *(
            "n/a" if share is None else f"{share:.1%}" for share in shares)])
    return rows


def source_rows(found):
    """Rows of a table by source, of the declared mixture by the record's protocol."""
    splits = [part for part in found if "sources" in part["record"]]
    rows, tokens = [["by source"], [""]], Counter()
    for part in splits:
        rows[0] += [part["split"], "", ""]
        rows[1] += ["tokens", "loss", "bits/byte"]
        tokens += {name: of["tokens"] for name, of in part["record"]["sources"].items()}
    for name, _ in tokens.most_common(SHOWN_SOURCES):
        row = [name]
        for part in splits:
            numbers = part["record"]["sources"].get(name)
            row += ["0", "n/a", "n/a"] if numbers is None else [
                f"{numbers['tokens']:,}", with_digits(numbers["declared"]),
                with_digits(numbers["bits_per_byte"])]
        rows.append(row)
    if len(tokens) > SHOWN_SOURCES:
        rows.append([f"{len(tokens) - SHOWN_SOURCES} smaller ones: --out"] + [""] * 3 * len(splits))
    return rows if splits else []


def notes(found, config):
    """Lines on what to think of when one reads these losses."""
    lines = []
    if config.average == "probs" and config.average_epochs > 1:
        lines.append(f"note: the run scored the mean of each member's last {config.average_epochs}"
                     " epochs; these are its weights after the last")
    for part in found:
        where = f"{part['dataset']}, {part['split']}"
        if part["known_tokens"]:
            share = part["known_tokens"] / part["record"]["tokens"]
            lines.append(f"note: {where}: {share:.1%} of the tokens are of documents that the run"
                         " was trained on")
    if any(part["known_tokens"] is None for part in found):
        lines.append("note: the run's dataset is not there as it was: whether the run was trained"
                     " on some of this text is not known")
    return lines


def report(run, found, result, config):
    """Lines for the console on what `evaluate` found."""
    lines = [f"{run}: {len(result['members'])} member(s), {result['final_mixture']} mixture"
             f" declared, rows of {config.seq_len} tokens; nats a token", *notes(found, config)]
    for dataset in dict.fromkeys(part["dataset"] for part in found):
        parts = [part for part in found if part["dataset"] == dataset]
        lines += ["", dataset, *table(loss_rows(parts, "record", result, config))]
        if rows := source_rows(parts):
            lines += ["", *table(rows)]
        if "strided" in parts[0]:
            lines += ["", f"{dataset}: looks further back than the record's protocol, at least"
                      f" {config.seq_len // 2} tokens",
                      *table(loss_rows(parts, "strided", result, config))]
    return lines


def parse_splits(text):
    """["val", ...] of "val,...", None of nothing. UserError if one is no split."""
    splits = list(dict.fromkeys(text.split(","))) if text else None
    for split in splits or ():
        check_name(split, ("train", *SPLITS), "split")
    return splits


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("datasets", nargs="*", metavar="DATASET", help="folders [the run's own]")
    parser.add_argument("--split", help="which, as val,holdout,train [val,holdout]")
    parser.add_argument("--eval_tokens", type=int, help="of each split, from the front; 0: all"
                        " [as the run]")
    parser.add_argument("--strided", action="store_true", help="score again, looking further back")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto",
                        help="[%(default)s]")
    parser.add_argument("--out", type=Path, help="a JSON file for all the numbers")
    args = parser.parse_args()
    splits = parse_splits(args.split)
    if args.out and args.out.exists():
        raise UserError(f"{args.out}: is there already; choose another --out")
    result, config = read_own_result(args.run)
    config = replace(config, device=args.device)
    if args.eval_tokens is not None:
        config = replace(config, eval_tokens=args.eval_tokens)
        check_ranges(config)
    found = evaluate(args.run, args.datasets or [config.dataset], splits, result, config,
                     args.strided)
    print("\n".join(report(args.run, found, result, config)))
    if args.out:
        write_json(args.out, {
            "run": str(args.run), "final_mixture": result["final_mixture"],
            "weights_learned": result["ensemble"][-1].get("weights_learned"),
            "seq_len": config.seq_len, "evaluations": found})


if __name__ == "__main__":
    run_tool(main)
