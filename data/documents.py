"""Documents of text files, JSON Lines and parquet, one after the other: what data/text.py reads.

A file of text is a document, or with a separator those that it parts; of JSON Lines each line is
one, of parquet each row: in `field`, beside which a field `source` may say where it is from. What
ends in .gz or .zst is unpacked. Errors of the user's files are BuildErrors, in one line.
"""
import codecs
import glob
import gzip
import io
import json
import sys
import time
from itertools import count
from pathlib import Path

ENDINGS = (".txt", ".md", ".jsonl", ".ndjson", ".parquet")      # of what is taken from a folder
MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"),
         (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
         (codecs.BOM_UTF16_BE, "utf-16"))
MAX_DOCUMENT = 1 << 25      # characters
MAX_LINE = 1 << 27          # bytes of a line of JSON
PIECE = 1 << 20             # bytes that are read at a time
PROGRESS_SECONDS = 5


class BuildError(Exception):
    """Something the user can put right: what, where, what to do, in one line."""


class Progress:
    """A line on stderr every PROGRESS_SECONDS, by calls that say how much of `total` is done."""
    def __init__(self, label, total):
        self.label, self.total = label, max(1, total)
        self.start = self.last = time.monotonic()

    def __call__(self, done):
        now = time.monotonic()
        if done and now - self.last > PROGRESS_SECONDS:
            self.last = now
            left = int((now - self.start) * max(0, self.total / done - 1))
            print(f"{self.label:9} {done / self.total:4.0%}  left {left // 60}:{left % 60:02d}",
                  file=sys.stderr, flush=True)


# ---- files ----

def ending(path):
    """The ending that says what is in a file: .jsonl of x.jsonl.gz."""
    is_packed = path.suffix.lower() in (".gz", ".zst")
    return (path.with_suffix("") if is_packed else path).suffix.lower()


def find_files(arguments):
    """[(path, argument)] of all files, each once, that files, folders and globs stand for."""
    files = {}
    for argument in arguments:
        path, found = Path(argument).expanduser(), []
        for match in [path] if path.exists() else map(Path, glob.glob(str(path), recursive=True)):
            if match.is_dir():
                found += [part for part in match.rglob("*")
                          if ending(part) in ENDINGS and part.is_file()]
            else:
                found.append(match)
        if not found:
            why = f"no {', '.join(ENDINGS)} in it" if path.is_dir() else "no such file"
            raise BuildError(f"{argument}: {why}")
        for match in sorted(found):
            files.setdefault(match.resolve(), (match, argument))
    return list(files.values())


def unpacked(raw, path):
    """The binary file `raw`, from its beginning, as what its .gz or .zst holds."""
    raw.seek(0)
    if path.suffix.lower() == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix.lower() == ".zst":
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
        return zstd.ZstdFile(raw, options={zstd.DecompressionParameter.window_log_max: 31})
    return raw


def decodes(file, encoding):
    """Whether a binary file is text in `encoding`, to its end."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        while piece := file.read(PIECE):
            decoder.decode(piece)
        decoder.decode(b"", final=True)
        return True
    except UnicodeError:
        return False


def find_encoding(raw, path):
    """The encoding of a text file, None if it is no text: that of its mark, else UTF-8, else what
    chardet makes of its first pieces that are not ASCII."""
    head = unpacked(raw, path).read(1 << 16)
    marked = [name for mark, name in MARKS if head.startswith(mark)]
    if b"\0" in head and not marked:
        return None
    guess = marked[0] if marked else "utf-8"
    if decodes(unpacked(raw, path), guess):
        return guess
    import chardet
    file, sample = unpacked(raw, path), b""
    while len(sample) < 1 << 18 and (piece := file.read(1 << 14)):
        sample += b"" if piece.isascii() else piece
    guess = chardet.detect(sample)["encoding"]
    return guess.lower() if guess and decodes(unpacked(raw, path), guess) else None


# ---- (text, source or None) of a file's documents ----

def read_text(raw, path, args, report):
    encoding = args.encoding or find_encoding(raw, path)
    if encoding is None:
        report["skipped"].append(str(path))
        print(f"{path}: skipped, it is no text (if it is, name its --encoding)", file=sys.stderr)
        return
    report["encodings"][encoding] += 1
    file, rest = io.TextIOWrapper(unpacked(raw, path), encoding, newline=""), ""
    while piece := file.read(PIECE):
        rest += piece
        if args.separator:
            *texts, rest = rest.split(args.separator)
            yield from ((text, None) for text in texts)
        check_length(rest, path)
    yield rest, None


def read_lines(raw, path, args, report):
    report["encodings"]["utf-8"] += 1
    file = unpacked(raw, path)
    for number in count(1):
        line, where = file.readline(MAX_LINE), f"{path}, line {number}"
        if not line:
            return
        if len(line) == MAX_LINE:
            raise BuildError(f"{where}: longer than {MAX_LINE:,} bytes; a line is a document")
        try:
            record = json.loads(line.decode("utf-8-sig")) if line.strip() else {args.field: ""}
        except (ValueError, RecursionError) as error:
            raise BuildError(f"{where}: not JSON in UTF-8 ({error}); mend or delete it") from None
        yield take_field(record, args.field, where)


def read_rows(raw, path, args, report):
    from pyarrow.parquet import ParquetFile
    report["encodings"]["parquet"] += 1
    file = ParquetFile(raw)
    names = file.schema_arrow.names
    columns = [name for name in dict.fromkeys((args.field, "source")) if name in names]
    if args.field not in names:
        take_field(dict.fromkeys(names), args.field, path)      # which says so
    for batch in file.iter_batches(batch_size=256, columns=columns):
        yield from (take_field(record, args.field, path) for record in batch.to_pylist())


READERS = {".jsonl": read_lines, ".ndjson": read_lines, ".json": read_lines, ".parquet": read_rows}


def take_field(record, field, where):
    """(text, source or None) of a record; null is an empty text."""
    if not isinstance(record, dict) or field not in record:
        has = f"has {', '.join(record)}" if isinstance(record, dict) else "is no JSON object"
        raise BuildError(f"{where}: no field {field!r} (it {has}); name it with --field=")
    text, source = record[field], record.get("source")
    if not isinstance(text, str | None):
        raise BuildError(f"{where}: {field!r} is no text; name another one with --field=")
    check_length(text or "", where)
    return text or "", source if isinstance(source, str) else None


def check_length(text, where):
    if len(text) > MAX_DOCUMENT:
        raise BuildError(f"{where}: a document of more than {MAX_DOCUMENT:,} characters; cut it (a"
                         r" text file: with --separator=TEXT, such as --separator='\n\n')")


def read_documents(files, args, report):
    """(text, source) of the documents of [(path, argument)]; source: the record's, or the argument.

    args: separator, encoding, field. Adds to report["encodings"] (a Counter) and ["skipped"].
    """
    sizes = [path.stat().st_size for path, _ in files]
    progress, done = Progress("reading", sum(sizes)), 0
    for (path, argument), size in zip(files, sizes):
        try:
            with open(path, "rb") as raw:
                reader = READERS.get(ending(path), read_text)
                for text, source in reader(raw, path, args, report):
                    yield text, source or argument
                    progress(done + raw.tell())
        except (BuildError, ImportError):
            raise
        except Exception as error:      # damaged or cut off, in the words of each library
            raise BuildError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
        done += size
