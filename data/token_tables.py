"""What is known of the tokens of a vocabulary, from their bytes: tokens.npz of a dataset folder.

    python data/token_tables.py FOLDER      data/prose.py and data/fineweb.py do it for theirs

bytes: int64 [V], how many each token has (0: a BOS). pairs: int64 [V, 2], the two tokens that
byte-pair encoding merges into each (-1: none). features: int64 [K, V'], the numbers of what the
string of each token has: its word without case and space, its first and last 1 to 4 letters if it
has more, and of which kind it is; only what at least two tokens have. weights: float32 [K, V', 1],
1 / sqrt(how many a token has), 0 where it has no more. V': the vocabulary in multiples of 64.
train_gpt.py reads them for bits per byte, --spelling and --split_tokens.
"""
import base64
import json
import sys
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import numpy as np


def merged_pairs(ranks, vocab_size):
    """int64 [V, 2] of ranks {token: bytes}: the last merge that makes each token."""
    ids = {string: token for token, string in ranks.items()}
    pairs = np.full((vocab_size, 2), -1)
    for token, string in ranks.items():
        parts = [string[i:i + 1] for i in range(len(string))]
        while len(parts) > 2:
            found = [ids.get(a + b, token) for a, b in pairwise(parts)]
            at = int(np.argmin(found))
            if found[at] >= token:          # not made by merges
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2 and set(parts) <= ids.keys():
            pairs[token] = [ids[part] for part in parts]
    return pairs


def features_of(string):
    """What a token's bytes have, as names."""
    text = string.decode("utf-8", "replace")
    bare = text[1:] if text.startswith(" ") and len(text) > 1 else text
    word, spaced = bare.lower(), text.startswith(" ")
    names = [("word", word), ("space", spaced), ("capital", bare[:1].isupper()),
             ("alphabetic", bare.isalpha()), ("length", min(len(bare), 6)),
             ("first", spaced, word[:1])]
    for n in range(1, min(5, len(word))):
        names += [("prefix", word[:n]), ("suffix", word[-n:])]
    return names


def spelling_features(ranks, vocab_size):
    """(features, weights) of ranks {token: bytes}; at most V features, the most common ones."""
    names = {token: features_of(string) for token, string in sorted(ranks.items())}
    counts = Counter(chain.from_iterable(names.values()))
    ids = {name: i for i, (name, count) in enumerate(counts.most_common(vocab_size)) if count > 1}
    shared = {token: [ids[name] for name in has if name in ids] for token, has in names.items()}
    shape = (max(map(len, shared.values())), -(-vocab_size // 64) * 64)
    features, weights = np.zeros(shape, np.int64), np.zeros((*shape, 1), np.float32)
    for token, has in shared.items():
        features[:len(has), token] = has
        weights[:len(has), token] = max(1, len(has)) ** -0.5
    return features, weights


def write_token_tables(folder, ranks, vocab_size, bos):
    """Write tokens.npz; ranks: {token: bytes} of all tokens but `bos`."""
    features, weights = spelling_features(ranks, vocab_size)
    sizes = [0 if token == bos else len(ranks[token]) for token in range(vocab_size)]
    np.savez_compressed(Path(folder) / "tokens.npz", bytes=np.array(sizes), features=features,
                        weights=weights, pairs=merged_pairs(ranks, vocab_size))


def byte_characters():
    """{byte: the printable character that stands for it in byte-level BPE} (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)}


def read_ranks(path):
    """{token: bytes} of a file in tiktoken's format."""
    lines = [line.split() for line in Path(path).read_bytes().splitlines()]
    return {int(rank): base64.b64decode(string) for string, rank in lines}


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__.strip())
        return 0 if {"--help", "-h"} & set(sys.argv[1:]) else 2
    folder = Path(sys.argv[1])
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        ranks = read_ranks(folder / meta.get("ranks", "ranks.tiktoken"))
        write_token_tables(folder, ranks, meta["vocab_size"], meta["bos_id"])
    except (OSError, ValueError, LookupError) as error:
        print(f"error: {folder}: needs meta.json with vocab_size and bos_id, and ranks of all"
              f" tokens ({type(error).__name__}: {error})", file=sys.stderr)
        return 2
    print(folder / "tokens.npz")
    return 0


if __name__ == "__main__":
    sys.exit(main())
