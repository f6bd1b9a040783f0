"""Text of a finished run's best member.

    python tools/sample.py runs/ID
    python tools/sample.py runs/ID --prompt="It was" --count=200 --temperature=1 --member=2

Needs the run's folder and the meta.json and ranks file of its dataset; a prompt also needs
tiktoken.
"""
import argparse
import sys
import textwrap
from pathlib import Path

import torch

from _runs import load_member, probabilities, read_result, run_tool
from data.token_tables import read_ranks
from train_gpt import UserError, dataset_folder, read_meta, read_token_tables, start_runtime

TEMPERATURE = 0.8


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


@torch.no_grad()
def generate(model, tokens, count, temperature=TEMPERATURE, seed=1):
    """Continue the list `tokens`, BOS first, by `count` tokens or to the next BOS."""
    generator = torch.Generator().manual_seed(seed)
    bos = tokens[0]
    device = model.wte.weight.device
    for _ in range(count):
        context = torch.tensor([tokens[-model.config.seq_len:]], device=device)
        p = probabilities(model, context, temperature)[0, -1]
        token = int(torch.multinomial(p, 1, generator=generator))
        if token == bos:
            break
        tokens = [*tokens, token]
    return tokens


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
    parser.add_argument("--temperature", type=float, default=TEMPERATURE,
                        help="[%(default)s]")
    parser.add_argument("--seed", type=int, default=1, help="[%(default)s]")
    parser.add_argument("--member", type=int, help="number; else the best on selection")
    args = parser.parse_args()
    result, config = read_result(args.run)
    if args.temperature <= 0 or args.count < 1:
        raise UserError("--temperature and --count must be above 0")
    if args.member is not None and not 1 <= args.member <= len(result["members"]):
        raise UserError(f"--member={args.member}: the run has {len(result['members'])} member(s)")
    dataset = dataset_folder(config)
    meta, _ = read_meta(dataset)
    path = dataset / str(meta.get("ranks", "ranks.tiktoken"))
    try:
        ranks = read_ranks(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no ranks to decode tokens with ({error.args[-1]})") from None
    _, found = read_token_tables(dataset, config)
    held = result["data_sha256"]
    if any(held.get(name, sha256) != sha256 for name, sha256 in found.items()):
        raise UserError(f"{dataset}: its tokens are not those that {args.run} was trained with")
    member = args.member or best_member(result["members"])
    model = load_member(args.run, member, config, start_runtime(config))
    tokens = [meta["bos_id"]]
    if args.prompt:
        tokens += encode(args.prompt, meta, ranks)
    tokens = generate(model, tokens, args.count, args.temperature, args.seed)
    text = b"".join(ranks.get(token, b"") for token in tokens[1:]).decode("utf-8", "ignore")
    sys.stdout.reconfigure(errors="replace")        # a terminal need not know all characters
    print(f"member {member} writes (temperature {args.temperature:g}):\n")
    for paragraph in text.splitlines():
        print(textwrap.fill(paragraph, 96, initial_indent="  ", subsequent_indent="  "))


if __name__ == "__main__":
    run_tool(main)
