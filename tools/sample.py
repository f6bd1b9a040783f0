"""Text of a finished run's best member.

    python tools/sample.py runs/ID
    python tools/sample.py runs/ID --prompt="It was" --count=200 --temperature=1 --member=2

Needs the run's folder and the meta.json and ranks file of its dataset; a prompt also needs tiktoken.
"""
import argparse
import textwrap
from pathlib import Path

from _runs import ROOT, load_member, read_result, run_tool
from train_gpt import (SAMPLE_TEMPERATURE, UserError, generate, read_meta, read_ranks,
                       start_runtime)


def encode(prompt, meta, ranks):
    """Tokens of a prompt, by the ranks of the dataset."""
    try:
        import tiktoken
    except ImportError:
        raise UserError("a prompt needs tiktoken: pip install tiktoken==0.14.0") from None
    if "pattern" not in meta:
        raise UserError("meta.json of the dataset has no `pattern`, which encoding a prompt needs")
    encoding = tiktoken.Encoding(meta["tokenizer"], pat_str=meta["pattern"], special_tokens={},
                                 mergeable_ranks={text: token for token, text in ranks.items()})
    return encoding.encode_ordinary(prompt)


def best_member(members):
    """Number (from 1) of the member that is best on selection; on train if there is none."""
    key = "selection_loss" if "selection_loss" in members[0] else "train_loss"
    return 1 + min(range(len(members)), key=lambda i: members[i][key])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--prompt", default="", help="what the text goes on from")
    parser.add_argument("--count", type=int, default=120, help="tokens [%(default)s]")
    parser.add_argument("--temperature", type=float, default=SAMPLE_TEMPERATURE,
                        help="[%(default)s]")
    parser.add_argument("--seed", type=int, default=1, help="[%(default)s]")
    parser.add_argument("--member", type=int, help="number; else the best on selection")
    args = parser.parse_args()
    result, config = read_result(args.run)
    if args.temperature <= 0 or args.count < 1:
        raise UserError("--temperature and --count must be above 0")
    if args.member is not None and not 1 <= args.member <= len(result["members"]):
        raise UserError(f"--member={args.member}: the run has {len(result['members'])} member(s)")
    dataset = ROOT / config.dataset
    meta, _ = read_meta(dataset)
    ranks = read_ranks(dataset, meta)
    member = args.member or best_member(result["members"])
    model = load_member(args.run, member, config, start_runtime(config))
    tokens = [meta["bos_id"]]
    if args.prompt:
        tokens += encode(args.prompt, meta, ranks)
    tokens = generate(model, tokens, args.count, args.temperature, args.seed)
    text = b"".join(ranks.get(token, b"") for token in tokens[1:]).decode("utf-8", "ignore")
    print(f"member {member} writes (temperature {args.temperature:g}):\n")
    for paragraph in text.splitlines():
        print(textwrap.fill(paragraph, 96, initial_indent="  ", subsequent_indent="  "))


if __name__ == "__main__":
    run_tool(main)
