"""A finished run's model as a folder that Hugging Face's transformers load.

    python tools/export.py runs/ID FOLDER                       the member best on selection
    python tools/export.py runs/ID FOLDER --what=student        the best of those that were taught
    python tools/export.py runs/ID FOLDER --what=ensemble       the run's mixture, as one model
    python tools/export.py runs/ID FOLDER --what=member --member=2
    python tools/export.py runs/ID FOLDER --push=USER/NAME --yes

Whoever has torch, numpy, safetensors and transformers then loads it with
AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True), and the tokens with
AutoTokenizer.from_pretrained(FOLDER); README.md there says how.

A model that has read a text many times may recite it: the dataset's training text is cut at
--stretches random places, the model reads 50 tokens there and writes the 50 likeliest after them;
how often they are the text's own is said here and in README.md. --push sends the folder to the
Hugging Face Hub, as a private repository, only with --yes.

Needs tokenizers: pip install -r tools/requirements-export.txt (./run.sh export does it).
"""
import argparse
import re
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from _decode import TEMPERATURE, generate
from _runs import ROOT, read_own_result, run_tool
from data.token_tables import byte_characters
from sample import chosen_members, load_mixture, read_tokenizer
from train_gpt import (BASELINES, FIELDS, FREE, SOURCE, UserError, data_efficiency, dataset_folder,
                       load_dataset, num_parameters, save_file, write_json)

STRETCH = 50            # tokens that are read, and then written, to see what is recited
BATCH = 20              # stretches at a time
BOS_TEXT = "<|endoftext|>"      # where the dataset does not name one
NOT_OF_THE_MODEL = (*FREE, "dataset", "device", "dtype", "preset", "seed", "compile")


# ==== What it recites ===========================================================================
def training_documents(result, config):
    """(documents that the run was trained on, "") or (None, why they are not there)."""
    try:
        data = load_dataset(dataset_folder(config), config)
    except UserError as error:
        return None, str(error)
    held = result["data_sha256"]
    if any(held.get(name) != sha256 for name, sha256 in data.hashes.items()):
        return None, f"{data.folder} is other text than the run's"
    return data.train, ""


def stretches(documents, count, seed=1):
    """int64 [n, 2 * STRETCH]: tokens from random places within documents; n <= count."""
    places = np.cumsum([max(0, len(document) - 2 * STRETCH + 1) for document in documents])
    count = min(count, places[-1])
    chosen = np.random.default_rng(seed).choice(places[-1], count, replace=False)
    rows = np.zeros((count, 2 * STRETCH), np.int64)
    for row, place in zip(rows, chosen):
        i = np.searchsorted(places, place, side="right")
        end = len(documents[i]) - (places[i] - 1 - place)
        row[:] = documents[i][end - 2 * STRETCH:end]
    return torch.from_numpy(rows)


def count_recited(mixture, rows):
    """Of how many `rows` the model writes the second half after the first, greedily."""
    device = mixture.members[0].wte.weight.device
    recited = 0
    for part in rows.split(BATCH):
        start = part[:, :STRETCH].to(device)
        written = torch.stack(list(generate(mixture, start, STRETCH, temperature=0)), dim=1)
        recited += int((written == part[:, STRETCH:]).all(dim=1).sum())
    return recited


def recitation(mixture, result, config, count):
    """In words, how much of the training text the model recites, or that it was not measured."""
    documents, why = training_documents(result, config)
    if documents is None:
        return f"not measured: the training text is not there ({why})"
    rows = stretches(documents, count)
    if not len(rows):
        return f"not measured: no document of the training text has {2 * STRETCH} tokens"
    return (f"{count_recited(mixture, rows)} of {len(rows)} stretches of {STRETCH} tokens of the"
            " training text are continued word for word")


# ==== Tokens ====================================================================================
def byte_pair_merges(ranks):
    """Pairs of strings that encoding may merge, in the order of ranks {token: bytes}: tiktoken
    merges any two that make a token together."""
    known = set(ranks.values())
    return [(string[:i], string[i:]) for _, string in sorted(ranks.items())
            for i in range(1, len(string)) if string[:i] in known and string[i:] in known]


def build_tokenizer(tokens):
    """A tokenizers.Tokenizer that encodes as sample.Tokenizer `tokens`, BOS first. UserError
    without a pattern or the library."""
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    except ImportError:
        raise UserError("export needs tokenizers: pip install -r tools/requirements-export.txt"
                        ) from None
    if not tokens.pattern:
        raise UserError("meta.json of the tokens has no `pattern`, by which text is cut")
    characters = byte_characters()

    def as_text(string):
        return "".join(characters[byte] for byte in string)

    bos_text = tokens.bos_text or BOS_TEXT
    vocabulary = {as_text(string): token for token, string in tokens.ranks.items()}
    merges = [(as_text(a), as_text(b)) for a, b in byte_pair_merges(tokens.ranks)]
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, bos_text: tokens.bos}, merges=merges,
                                     ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(tokens.pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([bos_text])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos_text} $A", special_tokens=[(bos_text, tokens.bos)])
    return tokenizer


# ==== The card ==================================================================================
def losses_of(result, weights):
    """{split: loss} of the members {number: weight}."""
    found = result if len(weights) > 1 else result["members"][min(weights) - 1]
    return {split: found[f"{split}_loss"] for split in ("selection", "val", "holdout")
            if found.get(f"{split}_loss") is not None}


def data_lines(result, val_loss):
    """What the val loss is worth, as far as the result says it."""
    lines = []
    if result.get("val_bpb"):
        bits = result["val_bpb"] * val_loss / result["val_loss"]
        lines.append(f"On `val` that is {bits:.4f} bits per byte of text.")
    curve = (result.get("data_efficiency") or {}).get("curve")
    multiples = data_efficiency(val_loss, curve, result["train_tokens"])
    worth = [f"{multiples[kind]} times the data with {name}" for kind, name in BASELINES.items()
             if multiples[kind] != "n/a"]
    if worth:
        lines.append(f"The same loss takes {', '.join(worth)}.")
    return lines


def model_card(name, mixture, result, config, weights, what, recited):
    """README.md of the folder."""
    losses = losses_of(result, weights)
    size = num_parameters(mixture) / 1e6
    caveat = ""
    if config.average == "probs" and config.average_epochs > 1:
        caveat = (f" They are of probabilities averaged over the ends of the last"
                  f" {config.average_epochs} epochs; the weights here are those of the last one.")
    table = [f"| {split} | {loss:.4f} |" for split, loss in losses.items()]
    return "\n".join([
        "---", "library_name: transformers", "pipeline_tag: text-generation", "---", "",
        f"# {name}", "",
        f"{what[0].upper()}{what[1:]} of a run of `train_gpt.py` (track `{config.track}`):"
        f" {size:,.4g}M parameters, {config.num_layers} blocks of width {config.model_dim}, rows of"
        f" {config.seq_len} tokens. The run saw {result['train_tokens']:,} tokens of the dataset"
        f" `{Path(config.dataset).name}`, many times.", "",
        "| text | loss, nats a token |", "|-|-|", *table, "",
        "Models were chosen on `selection`; the model was trained on none of the three." + caveat,
        "", *data_lines(result, losses["val"]), "",
        "## Load it", "", "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)',
        'prompt = tokenizer("It was", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100)[0]))", "```", "",
        "It needs torch, numpy, safetensors and transformers (tested with 5.24.0), on Linux or"
        " macOS. The logits are log p of the next token. Several prompts at once are padded in"
        " front, as the tokenizer does it.", "",
        "## What it recites", "", f"{recited[0].upper()}{recited[1:]}.", "",
        "## Limits", "",
        f"It knows what little text it was trained on, and is no assistant. It looks at no more"
        f" than a row of {config.seq_len} tokens: when one is full, its last half is read again as"
        " the beginning of the next. It may recite the training text, say what is untrue, and"
        " repeat the biases of its source.", ""])


# ==== The folder ================================================================================
def config_files(config, tokens, weights):
    """{name: content} of the folder's JSON files."""
    settings = {name: value for name, value in asdict(config).items()
                if value != FIELDS[name].default and name not in NOT_OF_THE_MODEL}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokens.bos)
    texts = dict.fromkeys(("bos_token", "eos_token", "pad_token"), tokens.bos_text or BOS_TEXT)
    return {
        "config.json": {
            "architectures": ["SlowrunForCausalLM"], "model_type": "slowrun",
            "auto_map": {"AutoConfig": "modeling_slowrun.SlowrunConfig",
                         "AutoModelForCausalLM": "modeling_slowrun.SlowrunForCausalLM"},
            "dtype": "float32", "vocab_size": config.vocab_size,
            "hidden_size": config.model_dim, "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads, "max_position_embeddings": config.seq_len,
            **ids, "mixture_weights": list(weights.values()), "settings": settings},
        "generation_config.json": {
            **ids, "do_sample": True, "temperature": TEMPERATURE, "max_new_tokens": 120},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.seq_len,
            **texts, "padding_side": "left", "clean_up_tokenization_spaces": False}}


def write_folder(folder, mixture, tokenizer, files, card):
    """Write all files beside `folder`, then give it the name: it is whole or not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        beside.chmod(0o755)
        tensors = {f"mixture.{name}": p.cpu().contiguous()
                   for name, p in mixture.state_dict().items() if ".mtp_" not in name}
        save_file(tensors, beside / "model.safetensors", {"format": "pt"})
        (beside / "model.safetensors").chmod(0o644)
        for name, content in files.items():
            write_json(beside / name, content)
        tokenizer.save(str(beside / "tokenizer.json"))
        (beside / "README.md").write_text(card, encoding="utf-8")
        shutil.copyfile(SOURCE, beside / "train_gpt.py")
        shutil.copyfile(ROOT / "tools/_decode.py", beside / "_decode.py")
        shutil.copyfile(ROOT / "tools/_modeling_slowrun.py", beside / "modeling_slowrun.py")
        beside.replace(folder)
    except BaseException:
        shutil.rmtree(beside)
        raise


def push(folder, repository):
    """Send the folder to the Hugging Face Hub. UserError if that fails."""
    from huggingface_hub import HfApi
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:          # no network, not logged in, not ours, a bad name
        raise UserError(f"{repository}: not pushed ({error}); {folder} is whole: log in with `hf"
                        f" auth login`, then `hf upload {repository} {folder}`") from None


# ==== The command ===============================================================================
def check_arguments(args):
    """UserError for what does not go together, or a folder that is not free."""
    if args.member is not None and args.what not in (None, "member"):
        raise UserError(f"--member={args.member} does nothing with --what={args.what}; leave one of"
                        " them out")
    if args.what == "member" and args.member is None:
        raise UserError("--what=member: which? add --member=NUMBER")
    if args.yes and not args.push:
        raise UserError("--yes does nothing without --push=USER/NAME")
    if args.push and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push):
        raise UserError(f"--push={args.push}: must be USER/NAME")
    if args.stretches < 1:
        raise UserError(f"--stretches={args.stretches}: must be at least 1")
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise UserError(f"{args.folder}: is there and not empty; name another folder")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, help="folder of a finished run")
    add("folder", type=Path, help="to write; must not be there, or be empty")
    add("--what", choices=("member", "student", "ensemble"), help="[the best member]")
    add("--member", help="its number, from 1")
    add("--stretches", type=int, default=200, help="of training text to be recited [%(default)s]")
    add("--push", metavar="USER/NAME", help="send the folder there, on the Hugging Face Hub")
    add("--yes", action="store_true", help="although the model may recite its training text")
    args = parser.parse_args()
    check_arguments(args)
    result, config = read_own_result(args.run)
    weights, what = chosen_members(result, config, args.member or args.what or "best")
    tokens = read_tokenizer(args.run, result, config)
    tokenizer = build_tokenizer(tokens)
    mixture = load_mixture(args.run, config, weights)
    print(f"exports    {what}, {num_parameters(mixture) / 1e6:,.4g}M parameters", flush=True)
    recited = recitation(mixture, result, config, args.stretches)
    print(f"recites    {recited}", flush=True)
    if args.push and not args.yes:
        raise UserError(f"--push={args.push}: whoever gets the model can read out of it what it"
                        f" recites: {recited}; if that may be, add --yes")
    files = config_files(replace(config, mtp_weight=0.0), tokens, weights)
    name = args.push or args.folder.resolve().name
    card = model_card(name, mixture, result, config, weights, what, recited)
    write_folder(args.folder, mixture, tokenizer, files, card)
    print(f"folder     {args.folder}")
    if args.push:
        push(args.folder, args.push)
        print(f"pushed     https://huggingface.co/{args.push}")


if __name__ == "__main__":
    run_tool(main)
