"""Text of a finished run's models, as it is written.

    python tools/sample.py runs/ID
    python tools/sample.py runs/ID --prompt="It was" --tokens=200 --temperature=1 --member=ensemble
    python tools/sample.py runs/ID --temperature=0            the likeliest token each time

Text ends after --tokens, or where the model ends the document. <|endoftext|> in a prompt (or what
else the tokens have for it) begins a new document. A model sees at most a row (seq_len tokens):
when one is full, its last half is read again as the beginning of the next.

Needs the run's folder, and of runs without the folder `tokenizer` the meta.json and ranks file of
their dataset; a prompt also needs tiktoken. In Python, with tools/ in sys.path:

    from sample import load
    print(load("runs/ID", "ensemble").generate_text("It was", tokens=200, temperature=1))
"""
import argparse
import codecs
import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from _decode import TEMPERATURE, Mixture, generate
from _runs import load_member, read_own_result, run_tool, tokenizer_folder
from data.token_tables import read_ranks
from train_gpt import UserError, is_distilled, member_path, read_meta, start_runtime


# ==== Tokens ====================================================================================
class Tokenizer(NamedTuple):
    """Tokens of a run and how text becomes them."""
    ranks: dict             # {token: bytes} of all tokens but BOS
    bos: int
    bos_text: str | None    # what stands for BOS in a prompt
    pattern: str | None     # of the pieces that are encoded on their own

    def encode(self, text):
        """A list: BOS and the tokens of `text`. UserError without a pattern or tiktoken."""
        if not text:
            return [self.bos]
        try:
            import tiktoken
        except ImportError:
            raise UserError("a prompt needs tiktoken: pip install tiktoken==0.14.0") from None
        if not self.pattern:
            raise UserError("meta.json of the tokens has no `pattern`, which a prompt needs")
        encoding = tiktoken.Encoding(
            "run", pat_str=self.pattern,
            mergeable_ranks={string: token for token, string in self.ranks.items()},
            special_tokens={self.bos_text: self.bos} if self.bos_text else {})
        return [self.bos, *encoding.encode(text, allowed_special="all")]


def read_tokenizer(run, result, config):
    """The Tokenizer of a run: in its folder, or else that of its dataset. UserError if that is not
    there or not the one that the run was trained with."""
    folder = tokenizer_folder(run, result, config)
    meta, _ = read_meta(folder)
    path = folder / str(meta.get("ranks", "ranks.tiktoken"))
    try:
        ranks = read_ranks(path)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no ranks to decode tokens with ({error.args[-1]})") from None
    if "bos_id" not in meta:
        raise UserError(f"{folder / 'meta.json'}: has no `bos_id`, the token before a document")
    if meta.get("ranks_sha256", found) != found:
        raise UserError(f"{path}: its tokens are not those that {run} was trained with")
    return Tokenizer(ranks, meta["bos_id"], meta.get("bos_text"), meta.get("pattern"))


# ==== Models ====================================================================================
def best_member(members):
    """Number (from 1) of the member that is best on selection; on train if there is none."""
    key = "selection_loss" if "selection_loss" in members[0] else "train_loss"
    return 1 + min(range(len(members)), key=lambda i: members[i][key])


def chosen_members(result, config, which):
    """({number: weight}, in words what that is) of "best", "student", "ensemble" or a number.
    UserError if there is none."""
    members = result["members"]
    if which == "ensemble":
        weights = [1 / len(members)] * len(members)
        if result["final_mixture"] == "learned":
            weights = result["ensemble"][-1]["weights_learned"]
        kept = {number: weight for number, weight in enumerate(weights, 1) if weight > 0}
        total = sum(kept.values())
        return ({number: weight / total for number, weight in kept.items()},
                f"the {result['final_mixture']} mixture of {len(kept)} members")
    if which == "student":
        taught = [n for n in range(1, len(members) + 1) if is_distilled(config, n)]
        if not taught:
            raise UserError("no member of the run was taught by others: it has no student")
        best = taught[best_member([members[n - 1] for n in taught]) - 1]
        return {best: 1.0}, f"member {best}, a student"
    if which == "best":
        best = best_member(members)
        return {best: 1.0}, f"member {best}"
    if not str(which).isdecimal() or not 1 <= int(which) <= len(members):
        raise UserError(f"--member={which}: must be a number from 1 to {len(members)}, student or"
                        " ensemble")
    return {int(which): 1.0}, f"member {which}"


def load_mixture(run, config, weights):
    """The Mixture of members {number: weight} of a run, on the first device there is."""
    for number in weights:
        if not member_path(Path(run), number).exists():
            raise UserError(f"{member_path(Path(run), number)}: not there; the run's folder must"
                            " have its members' weights")
    runtime = start_runtime(replace(config, device="auto", compile=False))
    members = [load_member(run, number, config, runtime) for number in weights]
    return Mixture(members, list(weights.values()))


class Writer(NamedTuple):
    """A model and its tokenizer: what `load` gives."""
    mixture: Mixture
    tokenizer: Tokenizer
    name: str

    def stream(self, prompt="", tokens=120, **options):
        """Yield what the model writes after `prompt`, in pieces of whole characters.
        options: temperature, top_k, top_p and seed, of generate."""
        start = torch.tensor([self.tokenizer.encode(prompt)],
                             device=self.mixture.members[0].wte.weight.device)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in generate(self.mixture, start, tokens, **options):
            if token.item() == self.tokenizer.bos:
                break
            yield decoder.decode(self.tokenizer.ranks.get(token.item(), b""))
        yield decoder.decode(b"", final=True)

    def generate_text(self, prompt="", tokens=120, **options):
        """What the model writes after `prompt`."""
        return "".join(self.stream(prompt, tokens, **options))


def load(run, which="best"):
    """The Writer of a finished run's model: "best" on selection, "student" (the best of those who
    were taught), "ensemble" or a member's number. UserError if there is none."""
    result, config = read_own_result(run)
    weights, name = chosen_members(result, config, which)
    tokenizer = read_tokenizer(run, result, config)
    return Writer(load_mixture(run, config, weights), tokenizer, name)


# ==== The command ===============================================================================
def check_options(args):
    """UserError for a number that cannot be, or that would do nothing."""
    if args.tokens < 1:
        raise UserError(f"--tokens={args.tokens}: must be at least 1")
    if not 0 <= args.temperature < float("inf"):
        raise UserError(f"--temperature={args.temperature}: must be a number from 0 on")
    if args.top_k is not None and args.top_k < 1:
        raise UserError(f"--top_k={args.top_k}: must be at least 1")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top_p={args.top_p}: must be above 0 and at most 1")
    for name in ("top_k", "top_p", "seed"):
        if not args.temperature and getattr(args, name) is not None:
            raise UserError(f"--{name} does nothing with --temperature=0, which always takes the"
                            " likeliest token; leave one of them out")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, help="folder of a finished run")
    add("--prompt", default="", help="what the text goes on from")
    add("--tokens", type=int, default=120, help="how many to write at most [%(default)s]")
    add("--temperature", type=float, default=TEMPERATURE,
        help="below 1 likely tokens become likelier; 0: always the likeliest [%(default)s]")
    add("--top_k", type=int, help="draw from that many likeliest tokens [all]")
    add("--top_p", type=float, help="draw from the likeliest that have this probability [1]")
    add("--seed", type=int, help="[1]")
    add("--member", default="best", help="a number, student or ensemble [the best on selection]")
    args = parser.parse_args()
    check_options(args)
    writer = load(args.run, args.member)
    pieces = writer.stream(args.prompt, args.tokens, temperature=args.temperature,
                           top_k=args.top_k or 0, top_p=args.top_p or 1.0,
                           seed=1 if args.seed is None else args.seed)
    first = next(pieces)                            # what is wrong with a prompt is said alone
    sys.stdout.reconfigure(errors="replace")        # a terminal need not know all characters
    print(f"{writer.name} writes (temperature {args.temperature:g}):\n")
    print(args.prompt + first, end="", flush=True)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass                # who has read enough stops it
    print()


if __name__ == "__main__":
    run_tool(main)
