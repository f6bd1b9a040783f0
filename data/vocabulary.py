"""Byte-level BPE vocabularies: {bytes: rank}, trained or read. BOS has the id behind the last rank.

Pieces that no token crosses are those of GPT-2. The files are in tiktoken's format.
"""
import base64
import hashlib
import json
import math
from pathlib import Path

from documents import BuildError
from token_tables import byte_characters, read_ranks

# how text is split into the pieces that a BPE token may not cross: GPT-2's rule
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
BOS_TEXT = "<|endoftext|>"
MAX_WORD = 1_000        # characters; training takes the square of it, and genes have no spaces
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # of its ranks


def train_ranks(texts, vocab_size):
    """Ranks of a byte-level BPE, vocab_size - 1, or fewer if the texts are too short for them."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    shorten = pre_tokenizers.FixedLength(length=MAX_WORD)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, shorten, level])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    byte = {character: b for b, character in byte_characters().items()}
    ranks = {bytes([b]): b for b in range(256)}
    for left, right in json.loads(tokenizer.to_str())["model"]["merges"]:
        ranks.setdefault(bytes(byte[c] for c in left + right), len(ranks))
    return ranks


def default_vocab_size(num_bytes):
    """A token for each 2,000 bytes of text, as a power of two from 512 to 32,768."""
    return min(max(2 ** round(math.log2(max(1, num_bytes / 2000))), 512), 32768)


def find_ranks(tokenizer):
    """(name, ranks) of `tokenizer`: bytes, gpt2 or a file. BuildError if they cannot be had."""
    if tokenizer == "bytes":
        return "bytes", {bytes([b]): b for b in range(256)}
    if tokenizer == "gpt2":
        import tiktoken
        try:
            return "gpt2", tiktoken.get_encoding("gpt2")._mergeable_ranks
        except Exception as error:      # of the network
            raise BuildError(f"tiktoken cannot fetch GPT-2's tokens ({type(error).__name__}); get"
                             " its r50k_base.tiktoken elsewhere: --tokenizer=FILE") from None
    return read_vocabulary(Path(tokenizer).expanduser())


def read_vocabulary(path):
    """(name, ranks) of a file in tiktoken's format. BuildError if it is not sound."""
    try:
        tokens = read_ranks(path)
    except (OSError, ValueError) as error:
        raise BuildError(f"--tokenizer={path}: neither train, gpt2, bytes nor a file of ranks in"
                         f" tiktoken's format ({error})") from None
    ranks = {tokens[rank]: rank for rank in sorted(tokens)}
    if not ranks.keys() >= {bytes([b]) for b in range(256)} or len(ranks) >= 1 << 16 or (
            list(ranks.values()) != list(range(len(tokens)))):
        raise BuildError(f"{path}: {len(tokens):,} tokens; must be at most 65,535, each another"
                         " one, every single byte among them, with ranks 0, 1, 2, ...")
    is_gpt2 = hashlib.sha256(as_file(ranks)).hexdigest() == GPT2_SHA256
    return "gpt2" if is_gpt2 else path.stem, ranks


def as_file(ranks):
    """Ranks in tiktoken's format."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
