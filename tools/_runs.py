"""What the tools share: train_gpt.py found, arguments, errors in one line, finished runs read."""
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # a tool is started as a script: only its folder is there

import torch  # noqa: E402

from train_gpt import (  # noqa: E402
    FIELDS, FREE, GPT, Config, UserError, as_text, dataset_folder, make_config, member_path, parse,
    parse_arguments, plan_launch, read_tensors, read_token_tables, report_error, shift, token_logits)


def run_tool(main):
    """Exit with main's code (None: 0); what a person can mend is one line, with exit code 2."""
    try:
        code = main()
    except (Exception, KeyboardInterrupt) as error:
        code = report_error(error)
        if code is None:
            raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if "WORLD_SIZE" in os.environ:      # Python's own end may be aborted by threads of gloo
        sys.stdout.flush()
        os._exit(code or 0)
    sys.exit(code)


def config_from_arguments(doc):
    """(Config, overrides) of `--field=value` arguments like train_gpt.py's; --help prints `doc`."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(doc.strip())
        sys.exit()
    values = parse_arguments(sys.argv[1:])
    _, track = plan_launch(values.get("device", "auto"))
    config = make_config(values.pop("track", track), **values)
    return config, {name: getattr(config, name) for name in values}


def python_on(processes):
    """The beginning of a command that runs a script on so many processes of this Python."""
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc_per_node={processes}"]


def read_result(folder):
    """(result.json of a finished run, its Config). UserError if there is none.

    A result of an earlier version is read as far as its fields are still there; those that are gone
    are named on stderr.
    """
    path = Path(folder) / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        settings = dict(result["config"])
    except FileNotFoundError:
        raise UserError(f"{folder}: no finished run (it has no result.json)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
    values, gone = {}, []
    for name, value in settings.items():
        try:
            values[name] = field_value(name, value)
        except (KeyError, TypeError, UserError):
            gone.append(name)
    if gone:
        print(f"{path}: of another version; without the fields {', '.join(gone)}, which are gone",
              file=sys.stderr)
    return result, Config(**values)


def read_own_result(folder):
    """read_result of a run that has members of its own. UserError if there is none."""
    result, config = read_result(folder)
    if "runs" in result:
        raise UserError(f"{folder}: a mixture of runs, without members of its own; give one of"
                        f" these: {', '.join(result['runs'])}")
    return result, config


def field_value(name, value):
    """The value of a field from JSON; KeyError, TypeError or UserError if it is none."""
    kind = FIELDS[name].type
    if kind is tuple and isinstance(value, list):
        return tuple(tuple(point) for point in value)
    if isinstance(value, str) and kind is not str:
        return parse(name, value)
    return kind(value)


def compared(values):
    """{field: text} of a config's values {field: value}, without what changes no number."""
    return {name: as_text(value) for name, value in values.items() if name not in FREE}


def tokenizer_folder(run, result, config):
    """Where meta.json and ranks of a run's tokens lie: in its folder, or else with its dataset.
    UserError if that is not there, or not of the tokens that the run was trained with."""
    own = Path(run) / "tokenizer"
    if own.is_dir():
        return own
    folder = dataset_folder(config)
    if not (folder / "meta.json").exists():
        raise UserError(f"{run}: its tokens are not known: it has no tokenizer/, and its dataset"
                        f" {folder} is not there")
    _, found = read_token_tables(folder, config)
    if any(result["data_sha256"].get(name, sha256) != sha256 for name, sha256 in found.items()):
        raise UserError(f"{folder}: its tokens are not those that {run} was trained with")
    return folder


def load_member(folder, number, config, runtime):
    """The GPT of a finished run's member, with attention that takes rows of any length."""
    with runtime.device:
        model = GPT(config, runtime.dtype).eval()
    weights, _ = read_tensors(member_path(Path(folder), number))
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def probabilities(model, tokens):
    """p of what follows each of int64 `tokens` [B, T], rows: fp64 [B, T, vocab_size] on the CPU.
    With the memory of the row, if the model has been trained with it."""
    config = model.config
    hidden = model(tokens).flatten(0, 1)
    logits = token_logits(hidden, model.head.weight.to(hidden.dtype), shift(tokens, 1).flatten(),
                          config, config.row_memory * tokens.shape[1])
    p = over_vocabulary(*logits, config.vocab_size)
    return p.view(*tokens.shape, -1)


def over_vocabulary(logits, similar, seen, vocab_size):
    """p of each token, fp64 [n, vocab_size] on the CPU, from what token_logits returns."""
    both = torch.cat((logits, similar), dim=1).double().cpu()
    p = torch.softmax(both, dim=1)
    seen = seen.cpu().clamp(min=0)              # what is nothing has p = 0
    return p[:, :vocab_size].scatter_add(1, seen, p[:, logits.shape[1]:])


def run_git(root, *arguments):
    """What git says in the folder `root`, as bytes; None if it fails or is not there."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def load_logp(folder, number):
    """({split: log p(target), fp32 [n]}, facts) of a finished run's member."""
    logp, facts = read_tensors(member_path(Path(folder), number, ".logp"))
    return {split: values.numpy() for split, values in logp.items()}, facts
