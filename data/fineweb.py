"""FineWeb with a fixed budget: 100M GPT-2 tokens to train on, as in the NanoGPT Slowrun.

    python data/fineweb.py                       # val 10M, train 100M, holdout 10M; 400 MB
    python data/fineweb.py --tokens=48_000_000   # less to train on: 200 MB
    python data/fineweb.py --out=/disk/fineweb --cache=/disk/hub   # other places; --help: the rest
    python data/fineweb.py --from_raw            # the same, tokenized here from FineWeb's text

The Slowrun's dataset is the beginning of FineWeb's sample-10BT: 10M tokens to validate on, then
100M to train on. modded-nanogpt's tokenized shards are that very stream in pieces of 100M tokens,
so two of them hold all of it, and 10M further tokens as a holdout that nobody tunes on. Each split
begins with the first document after the one that the end of the split before it cuts; the rest of a
cut document is in no split. Run again, an interrupted download goes on where it stopped.

With --from_raw the stream is made here: the text of FineWeb's own parquet files, as much of it as
the splits take, is tokenized on all cores. Run again, that starts over. It needs
`pip install -r data/requirements-text.txt`.
"""
import argparse
import functools
import hashlib
import itertools
import json
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from documents import BuildError, Progress
from shards import GPT2_BOS, GPT2_VOCAB, HEADER_INTS, read_shard, write_meta, write_shard
from token_tables import read_ranks, write_token_tables
from vocabulary import BOS_TEXT, PATTERN, as_file

RAW_REPO = "HuggingFaceFW/fineweb"
REPO = "kjj0/fineweb10B-gpt2"
FILES = "fineweb_val_000000.bin", "fineweb_train_000001.bin"  # consecutive pieces of one stream
SPLITS = "val", "train", "holdout"
PUBLIC_TRAIN_DOCUMENTS = 143_651
BASELINE = {
    "one_epoch": [[200_000_000, 3.703], [400_000_000, 3.370], [600_000_000, 3.200],
                  [800_000_000, 3.123], [1_000_000_000, 3.046], [2_000_000_000, 2.892]],
    "source": "best of three model sizes at each D, one epoch, nanochat defaults, as published by"
              " the NanoGPT Slowrun",
}
TRIES, QUICK_TRIES = 6, 3  # a server in trouble gets time to recover, a missing network does not
LONGEST_WAIT = 300  # seconds; whoever is asked to wait longer had better come back later


class Failure(BuildError):
    """What went wrong, where, and what to do about it, in one line."""


def one_line(error):
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, BuildError) or len(text) < 200 else text[:197] + "..."


def sha256(path):
    return hashlib.sha256(np.memmap(path, dtype=np.uint8, mode="r")).hexdigest()


# ---- cutting: positions count from the start of the streams laid end to end ----

def next_document(streams, position, bos_id, piece=1 << 20):
    """Position of the first BOS at or after `position`, None if there is none."""
    offset = 0
    for stream in streams:
        for start in range(max(position - offset, 0), len(stream), piece):
            found = np.flatnonzero(stream[start:start + piece] == bos_id)
            if len(found):
                return offset + start + int(found[0])
        offset += len(stream)
    return None


def cut_splits(streams, val_tokens, train_tokens, holdout_tokens, bos_id):
    """[(start, end)] of val, train, holdout. ValueError if the streams are too short for them."""
    total, end, ranges = sum(map(len, streams)), 0, []
    for split, tokens in zip(SPLITS, (val_tokens, train_tokens, holdout_tokens)):
        start = next_document(streams, end, bos_id)  # == end if no document is cut there
        if start is None or start + tokens > total:
            raise ValueError(f"{total:,} tokens end before the {tokens:,} of {split} are complete")
        end = start + tokens
        ranges.append((start, end))
    return ranges


def take(streams, start, end):
    """Tokens [start, end), a view where one stream has them all."""
    offsets = np.cumsum([0] + [len(stream) for stream in streams])
    parts = [stream[max(start - at, 0):max(end - at, 0)] for stream, at in zip(streams, offsets)]
    parts = [part for part in parts if len(part)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def gpt2_tokens(bos_id, path=None, needed=False):
    """The text of each token but BOS, as bytes, by the ranks file `path` or tiktoken; if that
    cannot say [], or a Failure where they are `needed`."""
    if path:
        try:
            ranks = read_ranks(path)
            return [ranks[token] for token in range(bos_id)]
        except (OSError, ValueError, LookupError) as error:
            raise Failure(f"{path}: must have GPT-2's {bos_id:,} tokens, in base64 with their ranks,"
                          f" as tiktoken stores them ({type(error).__name__}: {error})") from None
    try:
        import tiktoken
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # not installed, or its vocabulary neither cached nor reachable
        advice = ("give their file with --ranks=, or install tiktoken where it can download them"
                  f" ({type(error).__name__})")
        if needed:
            raise Failure(f"without GPT-2's tokens no text can be tokenized: {advice}") from error
        print("without GPT-2's tokens bits per byte will be n/a, tools/sample.py writes no text and"
              f" --spelling and --split_tokens are refused: {advice}")
        return []
    return [encoding.decode_single_token_bytes(token) for token in range(bos_id)]


def count_bytes(tokens, lengths, piece=1 << 22):
    """In pieces, as indexing widens two bytes a token to eight."""
    return sum(int(lengths[tokens[at:at + piece]].sum()) for at in range(0, len(tokens), piece))


# ---- downloading ----

def patience(error, attempt, again):
    """(tries that this failure deserves, seconds until the next, what the user can do about it)."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import parse_ratelimit_headers
    seconds = min(2 ** attempt, 60)
    if isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError,
                          httpx2.UnsupportedProtocol)):
        return QUICK_TRIES, attempt / 2, "check the network (and HF_ENDPOINT, if set); " + again
    if isinstance(error, HfHubHTTPError):
        status, headers = error.response.status_code, error.response.headers
        if status in (401, 403, 404):
            return 1, 0, "check --repo="
        limit = parse_ratelimit_headers(headers)
        if headers.get("Retry-After", "").isdigit():
            seconds = int(headers["Retry-After"])
        elif status == 429 and limit and limit.remaining == 0:
            seconds = limit.reset_in_seconds
        passing = (status in (408, 429) or status >= 500) and seconds <= LONGEST_WAIT
    else:  # stalled, reset, cut short; a bare OSError is the library's check of the size
        bare = type(error) is OSError and error.errno is None
        passing = bare or isinstance(error, httpx2.TransportError)
    return TRIES if passing else 1, seconds, again


def retry(what, action, again="run again, what is downloaded is kept"):
    """action(), after as many tries as its failures deserve; again: advice for after the last."""
    import httpx2
    for attempt in itertools.count(1):
        try:
            return action()
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            tries, seconds, advice = patience(error, attempt, again)
            if attempt >= tries:
                raise Failure(f"{what}: {one_line(error)}; {advice}") from error
            if seconds > 1:
                print(f"{what}: {one_line(error)}; try {attempt + 1} of {tries} in {seconds} s",
                      file=sys.stderr)
            time.sleep(seconds)


def locate(repo, name, cache):
    """A shard that may still have to be downloaded: {name, size, path or None, url, etag}."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    path = try_to_load_from_cache(repo, name, cache_dir=cache, repo_type="dataset")
    if isinstance(path, str):  # then no network is needed
        return {"name": name, "size": Path(path).stat().st_size, "path": path}
    url = hf_hub_url(repo, name, repo_type="dataset")
    found = retry(url, lambda: get_hf_file_metadata(url))
    if not (found.size and found.etag and found.commit_hash):
        raise Failure(f"{url}: this is not the hub's answer; check HF_ENDPOINT, proxy and firewall")
    url = hf_hub_url(repo, name, repo_type="dataset", revision=found.commit_hash)
    return {"name": name, "size": found.size, "path": None, "url": url, "etag": found.etag}


def download(repo, shard, cache):
    """Path of the shard in the hub's cache.

    hf_hub_download forgets the part it has when it fails or is stopped. So the library's http_get
    fills a file with a fixed name, and hf_hub_download finds the blob complete and files it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils import WeakFileLock, build_hf_headers
    name, size, url, etag = (shard[key] for key in ("name", "size", "url", "etag"))
    folder = cache / repo_folder_name(repo_id=repo, repo_type="dataset")
    blob, part = folder / "blobs" / etag, folder / "blobs" / f"{etag}.incomplete"
    lock = cache / ".locks" / folder.name / f"{etag}.lock"
    # What is compressed on the way cannot be resumed.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}

    def transfer():
        if part.exists() and part.stat().st_size > size:
            part.unlink()
        with open(part, "ab") as file:
            http_get(url, file, resume_size=file.tell(), headers=headers, expected_size=size,
                     displayed_filename=name)

    for path in blob, lock:
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not blob.exists():
            retry(url, transfer)
            if re.fullmatch("[0-9a-f]{64}", etag) and sha256(part) != etag:
                part.unlink()
                raise Failure(f"{url}: what arrived has the wrong sha256; run again to start over")
            part.replace(blob)
    return retry(url, lambda: hf_hub_download(repo, name, repo_type="dataset", cache_dir=cache))


def check_space(*needs):
    """needs: (folder, bytes), which add up where two folders share a disk."""
    wanted = {}
    for folder, size in needs:
        folder = next(path for path in (folder, *folder.parents) if path.exists())
        device = folder.stat().st_dev
        wanted[device] = folder, size + wanted.get(device, (None, 0))[1]
    for folder, size in wanted.values():
        free = shutil.disk_usage(folder).free
        if free < size:
            raise Failure(f"{folder}: {size / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free; make"
                          " room there or name another disk with --out= and --cache=")


def get_streams(args):
    """(streams, ranges of the splits, vocab_size, bos_id), with as few shards as it takes."""
    budgets = args.val_tokens, args.tokens, args.holdout_tokens
    shards, held, wanted = [], 0, sum(budgets)
    while True:
        while held < wanted:
            if len(shards) == len(FILES):
                raise Failure(f"{args.repo}: its {len(FILES)} shards hold {held:,} tokens, too few"
                              f" to cut {sum(budgets):,} from; ask for less with --tokens=")
            shards.append(locate(args.repo, FILES[len(shards)], args.cache))
            held += (shards[-1]["size"] - 4 * HEADER_INTS) // 2
        missing = sum(shard["size"] for shard in shards if not shard["path"])
        check_space((args.cache, missing), (args.out, 2 * sum(budgets) + 16384))
        streams = []
        for shard in shards:
            shard["path"] = shard["path"] or download(args.repo, shard, args.cache)
            try:
                tokens, vocab_size, bos_id = read_shard(shard["path"])
            except ValueError as error:
                raise Failure(f"{error}; delete that file, then run again") from error
            streams.append(tokens)
        try:
            return streams, cut_splits(streams, *budgets, bos_id), vocab_size, bos_id
        except ValueError:
            wanted = held + 1  # the rests of cut documents were too much: the next shard as well


def tokenize(args):
    """(streams, ranges of the splits, GPT-2's tokens, the folder on the hub that the text is from),
    with as little text as it takes.

    The stream is in a file without a name, which is gone however this process ends.
    """
    import fineweb_raw      # which needs packages that the rest here does not
    vocabulary = gpt2_tokens(GPT2_BOS, args.ranks, needed=True)
    patiently = functools.partial(retry, again="run again, which starts over")
    budgets = args.val_tokens, args.tokens, args.holdout_tokens
    wanted = sum(budgets)
    held = 0
    check_space((args.out, 2 * 2 * wanted + (1 << 24)))     # the stream, and the shards
    files, folder = patiently(args.repo, lambda: fineweb_raw.open_hub(args.repo))
    args.out.mkdir(parents=True, exist_ok=True)
    progress = Progress("", wanted)
    with tempfile.TemporaryFile(dir=args.out) as file:
        for tokens in fineweb_raw.read_tokens(files, folder, vocabulary, patiently):
            file.write(tokens)
            held += len(tokens)
            progress.label = f"{held:,} tokens"
            progress(held)
            if held < wanted:
                continue
            file.flush()
            streams = [np.memmap(file, np.uint16, mode="r")]
            try:
                return streams, cut_splits(streams, *budgets, GPT2_BOS), vocabulary, folder
            except ValueError:      # the rests of cut documents were too much: more text
                continue
    raise Failure(f"{folder}: its text is {held:,} tokens, too few to cut {wanted:,} from; ask for"
                  " less with --tokens=")


# ---- the dataset ----

def tokens_there(out):
    """Tokens of each split in SPLITS if `out` holds this dataset undamaged, else None."""
    try:
        meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
        if "FineWeb" not in str(meta.get("source")):
            raise Failure(f"{out}: holds another dataset; name another folder with --out=")
        splits = [meta["splits"][f"{split}_000000"] for split in SPLITS]
        for split, entry in zip(SPLITS, splits):
            if sha256(out / f"fineweb_{split}_000000.bin") != entry["sha256"]:
                return None
        return [int(entry["tokens"]) for entry in splits]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def build(args):
    """Get, cut and write the dataset; nothing in args.out changes before all of it is written."""
    if args.from_raw:
        streams, ranges, vocabulary, place = tokenize(args)
        vocab_size, bos_id = GPT2_VOCAB, GPT2_BOS
        origin = f"tokenized from the raw parquet files of {place}"
    else:
        streams, ranges, vocab_size, bos_id = get_streams(args)
        vocabulary = gpt2_tokens(bos_id, args.ranks)
        origin = f"from the tokenized shards of {args.repo}"
    lengths = np.array([len(token) for token in vocabulary] + [0])      # BOS is no text
    splits, tokenizer = {}, {"tokenizer": "gpt2", "vocab_size": vocab_size, "bos_id": bos_id}
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out, prefix="building_") as folder:
        for split, (start, end) in zip(SPLITS, ranges):
            tokens = take(streams, start, end)
            path = Path(folder) / f"fineweb_{split}_000000.bin"
            entry = splits[f"{split}_000000"] = write_shard(path, tokens, vocab_size, bos_id)
            entry["text_bytes"] = count_bytes(tokens, lengths) if vocabulary else None
        if vocabulary:  # as tiktoken's files have it, so that tokens can be read without it
            tokenizer |= {"ranks": "ranks.tiktoken", "pattern": PATTERN, "bos_text": BOS_TEXT}
            ranks = {token: i for i, token in enumerate(vocabulary)}
            (Path(folder) / tokenizer["ranks"]).write_bytes(as_file(ranks))
            write_token_tables(folder, dict(enumerate(vocabulary)), vocab_size, bos_id)
        # Old hashes beside new shards would be a lie, should this stop in between.
        (args.out / "meta.json").unlink(missing_ok=True)
        for path in Path(folder).iterdir():
            path.replace(args.out / path.name)
    write_meta(args.out, {
        "splits": splits, **tokenizer,
        "source": f"FineWeb sample-10BT, {origin}", "licence": "ODC-By 1.0", "baseline": BASELINE})
    for name, entry in splits.items():
        print(f"{name}: {entry['tokens']:,} tokens, {entry['documents']:,} documents")
    documents = splits["train_000000"]["documents"]
    if documents != PUBLIC_TRAIN_DOCUMENTS:
        print(f"warning: {documents:,} train documents, {PUBLIC_TRAIN_DOCUMENTS:,} in the public"
              " split: results are not comparable with the public leaderboard", file=sys.stderr)
    print(f"{args.out}: done")


def parse(argv):
    parser = argparse.ArgumentParser("fineweb.py", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"fineweb: {message}; see --help\n")
    add = parser.add_argument
    add("--tokens", type=int, default=100_000_000, metavar="N", help="of train [%(default)s]")
    add("--val_tokens", type=int, default=10_000_000, metavar="N", help="[%(default)s]")
    add("--holdout_tokens", type=int, default=10_000_000, metavar="N", help="[%(default)s]")
    add("--out", type=Path, default=Path(__file__).parent / "fineweb", help="[data/fineweb]")
    add("--cache", type=Path, help="where downloads are kept [the hub's cache]")
    add("--repo", help=f"dataset on the hub [{REPO}; with --from_raw {RAW_REPO}]")
    add("--ranks", type=Path, metavar="FILE", help="of GPT-2's tokens [tiktoken's]")
    add("--from_raw", action="store_true", help="tokenize the text of FineWeb's own parquet files,"
        " on all cores, instead of downloading tokens; needs data/requirements-text.txt")
    add("--force", action="store_true", help="build again, whatever is there")
    args = parser.parse_args(argv)
    if min(args.tokens, args.val_tokens, args.holdout_tokens) < 1:
        parser.error("--tokens, --val_tokens and --holdout_tokens must be 1 or more")
    args.repo = args.repo or (RAW_REPO if args.from_raw else REPO)
    return args


def main(argv=None):
    args = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # which cleans up
    try:
        args.out = args.out.expanduser().resolve()
        there, asked = tokens_there(args.out), [args.val_tokens, args.tokens, args.holdout_tokens]
        if there and not args.force and all(has >= want for has, want in zip(there, asked)):
            note = "" if there == asked else ", more than asked for (--force cuts it anew)"
            print(f"{args.out}: already there, hashes right: val, train, holdout of "
                  + ", ".join(f"{has:,}" for has in there) + f" tokens{note}")
            return 0
        from huggingface_hub import constants
        args.cache = Path(args.cache or constants.HF_HUB_CACHE).expanduser().resolve()
        build(args)
        return 0
    except ImportError as error:
        is_hub = str(error.name).startswith("huggingface_hub")
        packages = ("-r data/requirements-text.txt" if args.from_raw and not is_hub
                    else "huggingface_hub==2.4.0")
        message = f"{one_line(error)}; pip install {packages}"
    except (BuildError, OSError, ValueError) as error:
        message = one_line(error)
    except KeyboardInterrupt:
        again = "start over" if args.from_raw else "go on, what is downloaded is kept"
        message = f"interrupted; run again to {again}"
    print(f"fineweb: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
