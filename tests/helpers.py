"""What tests share: processes and runs, small random models in float64, a slow transformer.

Test files import from here and from what they test, never from each other.
"""
import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import _runs
import train_gpt
from shards import write_meta, write_shard
from token_tables import merged_pairs, spelling_features, write_token_tables
from train_gpt import GPT, MuonAdamW, Trainer, make_config, start_runtime, token_logits

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "train_gpt.py")
PUBLIC = ("tiny", "limited", "two_hour", "unlimited")
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TOY = ["--preset=toy", "--device=cpu"]
# a second or so in this process: 13 steps a member
TINY = [*TOY, "--dtype=float32", "--num_layers=2", "--batch_rows=4", "--num_epochs=1",
        "--train_tokens=5000", "--eval_tokens=500", "--log_steps=1"]
PLAIN = ["--spelling=false", "--split_tokens=0", "--row_memory=false"]
CPU = torch.device("cpu")
VOCAB, BOS = 100, 99            # of the small models and datasets below
needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")),
                                    reason="nothing to compile with")
# another rate for each, so that a mistaken one shows
RATES = dict(
    matrix_lr=0.05, embed_lr=0.11, head_lr=0.07, x0_lr=0.13, scalar_lr=0.17, gate_lr=0.19,
    momentum=0.9, weight_decay=1.3)
TECHNIQUES = dict(xsa=True, iha=True, mtp_weight=0.3, **RATES)


# ==== Processes and runs ========================================================================
def clean_environment(**variables):
    """This environment without traces of a launcher, with one thread, and then `variables`."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    return environment | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"} | variables


def last_of_each(arguments):
    """`arguments` as texts, without each --field=value that a later one replaces."""
    texts = [str(argument) for argument in arguments]
    names = [text.partition("=")[0] if text.startswith("--") and "=" in text else None
             for text in texts]
    return [text for i, text in enumerate(texts)
            if names[i] is None or names[i] not in names[i + 1:]]


def python(*arguments, timeout=120, env=None, **options):
    """A finished python process: returncode, stdout and stderr."""
    return subprocess.run([sys.executable, *last_of_each(arguments)], capture_output=True,
                          encoding="utf-8", timeout=timeout, env=env or clean_environment(),
                          **options)


def torchrun(processes, *arguments, **options):
    """The same by torchrun, on several processes of this machine."""
    return python("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                  *arguments, **options)


def have_gpus(monkeypatch, count, memory=80e9):
    """As if `count` GPUs of `memory` bytes were here, for those who ask only that."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(total_memory=memory))


@contextlib.contextmanager
def kept_handlers():
    """Within: a run may handle signals in its own way, for good; afterwards all is as before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(*arguments):
    """(exit code, stdout, stderr) of train_gpt.main in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), kept_handlers():
        code = train_gpt.main(last_of_each(arguments))
    return code, out.getvalue(), err.getvalue()


def tool(module, *arguments):
    """(exit code, stdout, stderr) of a tool in this process, whose stdout is like a terminal's."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    with (mock.patch.object(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)]),
          kept_handlers(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          pytest.raises(SystemExit) as end):
        _runs.run_tool(module.main)
    out.seek(0)
    return end.value.code or 0, out.read(), err.getvalue()


def said(module, *arguments):
    """What a tool prints when all is well."""
    code, out, err = tool(module, *arguments)
    assert (code, err) == (0, "")
    return out


def complaint(module, *arguments):
    """The one line that a tool says of what a person can mend."""
    code, out, err = tool(module, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def train(runs, *arguments):
    """A run in this process with the TINY settings and `arguments`, under the folder `runs`."""
    name = f"run{len(list(runs.iterdir()))}"
    code, out, err = main(*TINY, f"--runs_dir={runs}", f"--run_id={name}", *arguments)
    assert code == 0, err
    return read_run(runs / name, out)


def read_run(folder, console=""):
    """What a run left in its folder; steps: the last line of metrics of each step."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    steps = {(m["member"], m["step"]): m for m in metrics if "step" in m}
    return SimpleNamespace(
        folder=folder, console=console, log=(folder / "log.txt").read_text(encoding="utf-8"),
        result=json.loads((folder / "result.json").read_text(encoding="utf-8")), metrics=metrics,
        steps=[steps[key] for key in sorted(steps)])


def losses(run):
    """Every loss of a run, exactly: of its steps, its members and its ensembles."""
    members = [[m[key] for key in ("train_loss", "selection_loss", "val_loss", "holdout_loss")]
               for m in run.result["members"]]
    return [[(m["train_loss"], m["kl"]) for m in run.steps], members,
            [point["val_loss"] for point in run.result["ensemble"]]]


def flat(value):
    """All that lists and tuples hold, within others too, as one list."""
    if not isinstance(value, (list, tuple)):
        return [value]
    return [x for part in value for x in flat(part)]


def saved_logps(run):
    """A list of {split: log p(target), fp64 [n]}, one a member."""
    files = sorted(run.folder.glob("members/*.logp.safetensors"))
    return [{split: p.double().numpy() for split, p in load_file(file).items()} for file in files]


def small_ranks():
    """{token: bytes} of all tokens but BOS: letters, and merges of two tokens before them."""
    strings, source = [bytes([byte]) for byte in b" abcdefghijkABCD"], np.random.default_rng(5)
    while len(strings) < BOS:
        merged = b"".join(strings[i] for i in source.integers(0, len(strings), 2))
        if merged not in strings and len(merged) < 9:
            strings.append(merged)
    return dict(enumerate(strings))


def small_tables():
    """What read_token_tables finds of small_ranks()."""
    ranks = small_ranks()
    features, weights = spelling_features(ranks, VOCAB)
    sizes = [len(ranks.get(token, b"")) for token in range(VOCAB)]
    return {"bytes": np.array(sizes), "features": features, "weights": weights,
            "pairs": merged_pairs(ranks, VOCAB)}


def make_dataset(folder, documents=(60, 8, 8), length=50, tables=True):
    """A dataset of random documents, with words that repeat, in `folder`; tables: with the
    tokens.npz of small_ranks()."""
    splits = {}
    for seed, (split, count) in enumerate(zip(("train", "val", "holdout"), documents)):
        source = np.random.default_rng(seed)
        tokens = np.minimum(source.geometric(0.1, length * count), BOS - 1).astype(np.uint16)
        tokens[::length] = BOS
        splits[f"{split}_000000"] = write_shard(folder / f"small_{split}_000000.bin", tokens,
                                                VOCAB, BOS)
    write_meta(folder, {"splits": splits, "vocab_size": VOCAB, "bos_id": BOS})
    if tables:
        write_token_tables(folder, small_ranks(), VOCAB, BOS)
    return folder


# ==== Numbers and small models ==================================================================
def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64).to(dtype)


def as_array(x):
    return np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, np.float64)


def relative_error(ours, reference):
    """The largest difference, as a fraction of the reference's largest entry."""
    ours, reference = as_array(ours), as_array(reference)
    assert ours.shape == reference.shape
    return np.abs(ours - reference).max() / np.abs(reference).max()


def small_config(track="cpu", **changes):
    """4 layers with 4 heads of 12 channels on rows of 12 tokens, no dropout; then `changes`.

    The model has what most tracks have: skips, lambdas, gates, QK norm, softcap, windows.
    """
    return make_config(track, **{**dict(
        preset="toy", vocab_size=VOCAB, seq_len=12, num_layers=4, model_dim=48, num_heads=4,
        mlp_multiple=8, window_pattern="SSSL", unet=True, resid_init=1.0, x0_init=0.1,
        softcap=15.0, proj_init="normal", normuon_beta2=0.95, window_schedule=(), dropout=0.0,
        num_models=1, qk_norm=True, second_weight=(), third_weight=(), kd_alpha=0.0, batch_rows=4,
        spelling=False, split_tokens=0.0, row_memory=False, device_batch_size=4, loss_chunk=7,
        dtype="float32", device="cpu"), **changes})


def randomize(model, seed=0):
    """Every parameter random and of a size that matters: gates, lambdas and padding as well."""
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            scale = 1.0 if p.ndim == 1 or "gate" in name else 1.5 / p.shape[-1] ** 0.5
            p.copy_(scale * randn(*p.shape, seed=1000 * seed + i))
    return model


def logits_of(model, hidden):
    """[..., D] -> softcapped fp32 logits [..., vocab_size], without the padding and memory."""
    flat = hidden.flatten(0, -2)
    nothing = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
    logits = token_logits(flat, model.head.weight.to(flat.dtype), nothing, model.config, 0)[0]
    return logits[:, :model.config.vocab_size].view(*hidden.shape[:-1], -1)


def random_model(config, seed=0, attention="sdpa"):
    """A random GPT that computes in float64, in evaluation."""
    return randomize(GPT(config, torch.float64, attention), seed).double().eval()


def random_tokens(config, *shape, seed=0):
    return torch.randint(0, config.vocab_size - 1, shape, generator=rng(seed))


def random_trainer(seed=0, **changes):
    """A Trainer whose random student (and teacher) compute in float64."""
    config = small_config(**changes)
    runtime = start_runtime(config)
    runtime.dtype = torch.float64
    trainer = Trainer(config, runtime, small_tables())
    for i, model in enumerate((trainer.model, trainer.teacher)):
        if model is not None:
            randomize(model, seed + i).double()
    return trainer


def batch(config, rows=4, seed=0):
    """inputs, targets [rows, T]; the last row ends early."""
    stream = random_tokens(config, rows, config.seq_len + 1, seed=seed)
    inputs, targets = stream[:, :-1].clone(), stream[:, 1:].clone()
    targets[-1, 8:] = -1
    return inputs, targets


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def weights_after_three_steps(runtime):
    """Of a model of three layers, with spelling; the gradients of the processes add up to the
    same ones."""
    runtime.dtype = torch.float64
    config = small_config(num_layers=3, grad_clip=2.0, spelling=True, **TECHNIQUES)
    model = randomize(GPT(config)).double()
    optimizer = MuonAdamW(model.named_parameters(), config, runtime, small_tables())
    for step in range(3):
        for i, p in enumerate(model.parameters()):
            whole = randn(*p.shape, seed=100 * step + i)
            other = randn(*p.shape, seed=1000 + 100 * step + i)
            p.grad = other if runtime.rank else whole - (runtime.world_size - 1) * other
        optimizer.step(1 - step / 4, 1.0, 0.9)
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_causal(forward, tokens, position=7):
    """forward([1, T]) -> [1, T, ...] must not look ahead of `position`, and must look at it."""
    changed = tokens.clone()
    changed[0, position:] = (changed[0, position:] + 1) % (BOS - 1)
    with torch.no_grad():
        before, after = forward(tokens), forward(changed)
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.isclose(before[:, position:], after[:, position:]).all(dim=-1).any()


# ==== A slow transformer ========================================================================
def rms(x):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-300)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class SlowModel:
    """The transformer in NumPy, one row and one query at a time, from the formulas.

    windows: keys before its own that a query of each layer sees; loops, passes: of the stage;
    growths: (old, new) L windows for YaRN; kept: an iterator of bools, one for each block that is
    run: False skips it.
    """

    def __init__(self, model, windows, loops=1, passes=1, growths=(), kept=None):
        self.config = model.config
        self.windows = windows
        self.loops = loops
        self.passes = passes
        self.growths = growths
        self.kept = kept
        self.w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}

    def linear(self, name, x):
        return x @ self.w[name + ".weight"].T

    def frequencies(self, width):
        """Of channel i and its partner i + width / 2, and the factor of the attention scale."""
        count, scale = round(width // 2 * self.config.rope_fraction), 1.0
        frequency = [self.config.rope_base ** (-i / count) for i in range(count)]
        for old, new in self.growths:
            scale *= 0.2 * math.log(new / old) + 1
            for i, f in enumerate(frequency):
                ramp = min(1.0, max(0.0, (old * f / (2 * math.pi) - 1) / 31))
                frequency[i] = f * (old / new + ramp * (1 - old / new))
        return frequency, scale

    def head_weights(self, block):
        """{q, k, v: [D, D]}; with IHA W_h <- sum over m of M[h, m] W_m."""
        config = self.config
        weights = {name: self.w[f"{block}.attn.{name}.weight"] for name in "qkv"}
        if config.iha:
            for name, mix in zip("qkv", self.w[f"{block}.attn.mix"]):
                own = weights[name].reshape(config.num_heads, -1, config.model_dim)
                mixed = [sum(m * w for m, w in zip(row, own)) for row in mix]
                weights[name] = np.concatenate(mixed)
        return weights

    def attention(self, block, x, value, window, offset):
        config, (T, dim) = self.config, x.shape
        d = dim // config.num_heads
        frequency, factor = self.frequencies(d)
        weights, outputs = self.head_weights(block), []
        for h in range(config.num_heads):
            part = slice(h * d, (h + 1) * d)
            q, k, v = (x @ weights[name][part].T for name in "qkv")
            if value is not None:
                read = x[:, :train_gpt.VALUE_GATE_CHANNELS]
                gate = 2 * sigmoid(read @ self.w[f"{block}.attn.value_gate.weight"][h])
                v = v + gate[:, None] * value[:, part]
            for z in (q, k):
                for i, f in enumerate(frequency):
                    turn = np.exp(1j * f * np.arange(T))        # a pair is a complex number
                    turned = (z[:, i] + 1j * z[:, i + d // 2]) * turn
                    z[:, i], z[:, i + d // 2] = turned.real, turned.imag
            if config.qk_norm:
                q, k = rms(q), rms(k)
            if offset:          # channels that do not turn: the key of the token before
                still = [i for i in range(d) if i % (d // 2) >= len(frequency)]
                k[1:, still] = k[:-1, still].copy()
            y = np.zeros((T, d))
            for i in range(T):
                seen = range(max(0, i - window), i + 1)
                score = np.exp(factor / math.sqrt(d) * (k[seen] @ q[i]))
                y[i] = score / score.sum() @ v[seen]
                if config.xsa:  # y - tanh(a) (y . v^) v^
                    unit = v[i] / max(np.linalg.norm(v[i]), 1e-4)
                    y[i] -= np.tanh(self.w[f"{block}.attn.xsa"][h]) * (y[i] @ unit) * unit
            if config.attn_gate:
                read = x[:, :train_gpt.GATE_CHANNELS]
                y *= sigmoid(read @ self.w[f"{block}.attn.gate.weight"][h])[:, None]
            outputs.append(y)
        return self.linear(f"{block}.attn.proj", np.concatenate(outputs, axis=1))

    def block(self, block, x, value, window, offset=False):
        x = x + self.attention(block, rms(x), value, window, offset)
        z = rms(x)
        gate = self.linear(f"{block}.mlp.gate", z)
        inner = gate * sigmoid(gate) * self.linear(f"{block}.mlp.fc", z)
        return x + self.linear(f"{block}.mlp.proj", inner)

    def trunk(self, x, x0):
        config, outputs, L = self.config, {}, self.config.num_layers
        loop = list(range(config.loop_start, config.loop_end + 1)) * self.loops
        order = [*range(config.loop_start), *loop, *range(config.loop_end + 1, L)]
        for i in order if self.loops > 1 else range(L):
            if config.unet and i >= L - L // 2:
                x = x + self.w["skip_lambdas"][i - (L - L // 2)] * outputs[L - 1 - i]
            if config.resid_init:
                x = self.w["resid_lambdas"][i] * x
            if config.x0_init:
                x = x + self.w["x0_lambdas"][i] * x0
            is_valued = config.value_projections and i % 2 == (L - 1) % 2
            value = self.linear(f"value_projs.{i}", x0) if is_valued else None
            offset = config.key_offset and self.windows[i] == max(self.windows)
            y = self.block(f"blocks.{i}", x, value, self.windows[i], offset)
            x = y if self.kept is None or next(self.kept) else x
            outputs[i] = x
        return x

    def hidden(self, tokens):
        """[T] -> [T, D]"""
        x = x0 = rms(self.w["wte.weight"][np.asarray(tokens)])
        for _ in range(self.passes):
            x = rms(self.trunk(x, x0))
        return x

    def mtp_hidden(self, hidden, next_tokens):
        """[T, D], [T] -> [T, D]"""
        following = rms(self.w["wte.weight"][np.asarray(next_tokens)])
        x = self.linear("mtp_proj", np.concatenate((hidden, following), axis=1))
        return rms(self.block("mtp_block", x, None, self.config.seq_len))

    def logits(self, hidden):
        """[T, D] -> [T, vocab_size]"""
        z = hidden @ self.w["head.weight"][:self.config.vocab_size].T
        cap = self.config.softcap
        return cap * np.tanh(z / cap) if cap else z
