"""Every technique of the public tracks against its formula, and switched off.

    python -m pytest tests/test_techniques.py

The references are slow, in float64, and share no code with train_gpt.py and data/ngram.py.
"""
import contextlib
import io
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data.ngram
import train_gpt as t
from records.settings import lacks_to_compile

ROOT = Path(__file__).resolve().parent.parent
BOS = 99                    # of the small models below, whose vocabulary has 100 tokens
PUBLIC = ("tiny", "limited", "two_hour", "unlimited")


# ==== Helpers ===================================================================================
def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def relative_error(ours, reference):
    """The largest difference, as a fraction of the reference's largest entry."""
    ours, reference = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, np.float64)
                       for x in (ours, reference))
    assert ours.shape == reference.shape
    return np.abs(ours - reference).max() / np.abs(reference).max()


def config(**changes):
    """4 layers with 4 heads of 12 channels on rows of 12 tokens, no dropout; then `changes`."""
    return t.make_config("cpu", **{**dict(
        preset="toy", vocab_size=100, seq_len=12, num_layers=4, model_dim=48, num_heads=4,
        mlp_multiple=8, window_pattern="SSSL", unet=True, resid_init=1.0, x0_init=0.1, softcap=15.0,
        proj_init="normal", normuon_beta2=0.95, window_schedule="", dropout=0.0, num_models=1,
        qk_norm=True, second_weight="", third_weight="",
        kd_alpha=0.0, batch_rows=4, device_batch_size=4, loss_chunk=7, dtype="float32",
        device="cpu"), **changes})


def randomize(model, seed=0):
    """Every parameter random and of a size that matters."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            scale = 1.0 if p.ndim == 1 else 1.5 / p.shape[-1] ** 0.5
            p.copy_(scale * torch.randn(p.shape, generator=rng(1000 * seed + i)))
    model.bos = BOS
    return model


def random_model(c, seed=0, stage=None):
    """A random GPT that computes in float64, in its last stage if none is given."""
    model = randomize(t.GPT(c, dtype=torch.float64), seed).double().eval()
    return model.prepare(c.seq_len, stage)


def random_tokens(c, *shape, seed=0):
    return torch.randint(0, c.vocab_size - 1, shape, generator=rng(seed))


def trainer_of(seed=0, **changes):
    """A Trainer whose random student (and teacher) compute in float64."""
    c = config(**changes)
    runtime = t.start_runtime(c)
    runtime.dtype = torch.float64
    trainer = t.Trainer(c, runtime, None, SimpleNamespace(bos=BOS))
    for model in filter(None, (trainer.model, trainer.teacher)):
        randomize(model, seed).double()
        seed += 1
    return trainer


def batch(c, rows=4, seed=0):
    """inputs, targets [rows, T]; the last row ends early."""
    stream = random_tokens(c, rows, c.seq_len + 1, seed=seed)
    x, y = stream[:, :-1].clone(), stream[:, 1:].clone()
    y[-1, 8:] = -1
    return x, y


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def recorded(trainer):
    """A list that will have (model, tokens) of every forward pass of the trainer."""
    calls, forward = [], trainer.forward
    trainer.forward = lambda model, x: calls.append((model, x.clone())) or forward(model, x)
    return calls


# ==== The model against a slow reference ========================================================
def rms(x):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-300)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Slow:
    """The transformer in NumPy, one row and one query at a time, from the formulas.

    windows: keys that a query of each layer sees; growths: (old, new) L windows for YaRN; kept: an
    iterator of bools, one for each block that is run: false skips it.
    """

    def __init__(self, model, windows, loops=1, passes=1, growths=(), kept=None):
        self.c, self.windows, self.loops, self.passes = model.config, windows, loops, passes
        self.w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
        self.growths, self.kept = growths, kept

    def linear(self, name, x):
        return x @ self.w[name + ".weight"].T

    def frequencies(self, width):
        """Of channel i and its partner i + width / 2, and the factor of the attention scale."""
        count, scale = round(width // 2 * self.c.rope_fraction), 1.0
        frequency = [self.c.rope_base ** (-i / count) for i in range(count)]
        for old, new in self.growths:
            scale *= 0.2 * math.log(new / old) + 1
            for i, f in enumerate(frequency):
                ramp = min(1.0, max(0.0, (old * f / (2 * math.pi) - 1) / 31))
                frequency[i] = f * (old / new + ramp * (1 - old / new))
        return frequency, scale

    def attention(self, block, x, value, window, offset, document):
        c, (T, dim) = self.c, x.shape
        heads, d = c.num_heads, dim // c.num_heads
        frequency, factor = self.frequencies(d)
        weights = {name: self.w[f"{block}.attn.{name}.weight"] for name in "qkv"}
        if c.iha:               # W_h <- sum over m of M[h, m] W_m
            for name, mix in zip("qkv", self.w[f"{block}.attn.mix"]):
                own = weights[name].reshape(heads, d, dim)
                mixed = [sum(mix[h, m] * own[m] for m in range(heads)) for h in range(heads)]
                weights[name] = np.concatenate(mixed)
        outputs = []
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            q, k, v = (x @ weights[name][part].T for name in "qkv")
            if value is not None:
                gate = 2 * sigmoid(x[:, :32] @ self.w[f"{block}.attn.value_gate.weight"][h])
                v = v + gate[:, None] * value[:, part]
            for z in (q, k):
                for i, f in enumerate(frequency):
                    for position in range(T):
                        a, b = z[position, i], z[position, i + d // 2]
                        cos, sin = math.cos(position * f), math.sin(position * f)
                        z[position, i] = a * cos - b * sin
                        z[position, i + d // 2] = a * sin + b * cos
            q, k = rms(q), rms(k)
            if offset:          # channels that do not rotate: the key of the token before
                still = [i for i in range(d) if i % (d // 2) >= len(frequency)]
                before = k.copy()
                for position in range(1, T):
                    if document[position] == document[position - 1]:
                        k[position, still] = before[position - 1, still]
            y = np.zeros((T, d))
            for i in range(T):
                seen = [j for j in range(max(0, i - window + 1), i + 1)
                        if document[j] == document[i]]
                score = np.exp(factor / math.sqrt(d) * (k[seen] @ q[i]))
                y[i] = score / score.sum() @ v[seen]
                if c.xsa:       # y - tanh(alpha) (y . v^) v^
                    unit = v[i] / max(np.linalg.norm(v[i]), 1e-4)
                    alpha = self.w[f"{block}.attn.xsa"][h] if c.xsa == "learned" else np.inf
                    y[i] = y[i] - np.tanh(alpha) * (y[i] @ unit) * unit
            outputs.append(y * sigmoid(x[:, :12] @ self.w[f"{block}.attn.gate.weight"][h])[:, None])
        return self.linear(f"{block}.attn.proj", np.concatenate(outputs, axis=1))

    def block(self, block, x, value, window, offset, document):
        x = x + self.attention(block, rms(x), value, window, offset, document)
        z = rms(x)
        gate = self.linear(f"{block}.mlp.gate", z)
        return x + self.linear(f"{block}.mlp.proj",
                               gate * sigmoid(gate) * self.linear(f"{block}.mlp.fc", z))

    def documents(self, tokens):
        return np.cumsum(tokens == BOS) if self.c.document_mask else np.zeros(len(tokens))

    def hidden(self, tokens):
        tokens = np.asarray(tokens)
        x = x0 = np.stack([rms(self.w["wte.weight"][i]) if i >= 0 else np.zeros(self.c.model_dim)
                           for i in tokens])
        for _ in range(self.passes):
            x = rms(self.trunk(x, x0, self.documents(tokens)))
        return x

    def trunk(self, x, x0, document):
        c, outputs, L = self.c, {}, self.c.num_layers
        loop = list(range(c.loop_start, c.loop_end + 1)) * self.loops
        order = [*range(c.loop_start), *loop, *range(c.loop_end + 1, L)]
        for i in order if self.loops > 1 else range(L):
            if i >= L - L // 2:
                x = x + self.w["skip_lambdas"][i - (L - L // 2)] * outputs[L - 1 - i]
            x = self.w["resid_lambdas"][i] * x + self.w["x0_lambdas"][i] * x0
            value = self.linear(f"value_projs.{i}", x0) if i % 2 == (L - 1) % 2 else None
            offset = c.key_offset and self.windows[i] == max(self.windows)
            y = self.block(f"blocks.{i}", x, value, self.windows[i], offset, document)
            x = y if self.kept is None or next(self.kept) else x
            outputs[i] = x
        return x


S6L12 = (6, 6, 6, 12)       # what window_pattern=SSSL makes of rows of 12 tokens
LOOP = dict(loop_start=1, loop_end=2, loop_count=2)
MODELS = {
    "plain": (dict(), {}),
    "half RoPE": (dict(rope_fraction=0.5), {}),
    "half RoPE, key offset": (dict(rope_fraction=0.5, key_offset=True), {}),
    "XSA": (dict(xsa="fixed"), {}),
    "learned XSA": (dict(xsa="learned"), {}),
    "IHA": (dict(iha=True), {}),
    "recurrence": (dict(recurrence_from=0.7), dict(passes=2)),
    "document mask": (dict(document_mask=True), {}),
    "YaRN": (dict(rope_base=3.0, window_schedule="0:0.25:0.5,0.4:0.5:1"),
             dict(growths=((6, 12),))),
    "all": (dict(**LOOP, rope_fraction=0.5, key_offset=True, xsa="learned", iha=True,
                 recurrence_from=0.7, window_schedule="0:0.125:0.25,0.2:0.25:0.5,0.4:0.5:1"),
            dict(loops=2, passes=2, growths=((3, 6), (6, 12)))),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_equals_slow_reference(name):
    changes, slow = MODELS[name]
    model = random_model(config(**changes))
    tokens = random_tokens(model.config, 2, 12)
    tokens[0, 5], tokens[1, 0], tokens[1, 8] = BOS, BOS, BOS
    tokens[0, 2] = -1                   # masked
    with torch.no_grad():
        ours = model(tokens)
    for row in range(2):                # the rotation's angles are fp32, hence no closer than that
        assert relative_error(ours[row], Slow(model, S6L12, **slow).hidden(tokens[row])) < 2e-5


@pytest.mark.parametrize("name", MODELS)
def test_model_is_causal(name):
    model = random_model(config(**MODELS[name][0]))
    tokens = random_tokens(model.config, 1, 12)
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % BOS
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.isclose(before[:, 7:], after[:, 7:]).all(dim=-1).any()


def test_key_offset_is_of_channels_that_do_not_rotate_and_of_long_windows_only():
    """Channel i pairs with i + Dh/2: half RoPE of 12 channels lets 3, 4, 5, 9, 10, 11 stand."""
    model = random_model(config(rope_fraction=0.5, key_offset=True))
    assert model.specs[12].from_before.nonzero().flatten().tolist() == [3, 4, 5, 9, 10, 11]
    assert model.specs[6].from_before is None
    cos, sin = model.specs[12].rope
    assert (cos[:, :, 3:] == 1).all() and (sin[:, :, 3:] == 0).all()
    assert (sin[1:, :, :3] != 0).all()


def test_first_pass_of_the_recurrence_has_no_gradient():
    """The gradient is that of the second pass alone, started from a constant."""
    trainer = trainer_of(recurrence_from=0.7)
    model, (x, y) = trainer.model, batch(trainer.c)
    trainer.backward(x, y, (1, 1), 0.9, False)
    ours = gradients_of(model)
    model.zero_grad()
    x0 = t.norm(model.wte(x))
    with torch.no_grad():
        first = t.norm(model.trunk(x0, x0, model.specs))
    logp = model.logits(t.norm(model.trunk(first.clone(), x0, model.specs))).log_softmax(-1)
    (-logp[y >= 0].gather(1, y[y >= 0][:, None]).sum()).backward()
    for name, p in model.named_parameters():
        assert relative_error(ours[name], p.grad) < 1e-9, name


# what is on with a neutral parameter, or on in name only -> what must be the same model
NEUTRAL = {
    "learned XSA of 0": dict(xsa="learned"),
    "IHA of the identity": dict(iha=True),
    "key offset of no channel": dict(rope_fraction=1.0, key_offset=True),
    "one document": dict(document_mask=True),
    "stochastic depth in evaluation": dict(stochastic_depth=0.9),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_off_is_exactly_the_model_without(name):
    plain, on = random_model(config()), random_model(config(**NEUTRAL[name]))
    result = on.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys
    with torch.no_grad():
        for parameter in result.missing_keys:
            p, kind = on.get_parameter(parameter), parameter.rpartition(".")[2]
            p.copy_({"xsa": torch.zeros(4), "mix": torch.eye(4).expand(3, 4, 4)}[kind])
        tokens = random_tokens(plain.config, 2, 12)
        assert torch.equal(on(tokens), plain(tokens))       # bit for bit
    initial = t.GPT(on.config).init_weights(1)              # the parameters begin there
    for parameter in result.missing_keys:
        assert torch.equal(initial.get_parameter(parameter).double(), on.get_parameter(parameter))


@pytest.mark.parametrize("changes", [dict(), dict(rope_fraction=0.5, key_offset=True),
                                     dict(**LOOP, xsa="learned", recurrence_from=0.5)], ids=str)
def test_document_mask_lets_nothing_through(changes):
    """Behind a BOS nothing depends on what is in front of it, and a document is as if alone."""
    model = random_model(config(document_mask=True, **changes))
    tokens = random_tokens(model.config, 1, 12)
    tokens[0, 0] = tokens[0, 5] = BOS
    changed = tokens.clone()
    changed[0, 1:5] = (changed[0, 1:5] + 1) % BOS
    with torch.no_grad():
        ours, other = model(tokens), model(changed)
        alone = model.prepare(7)(tokens[:, 5:])
    assert not torch.isclose(ours[:, 1:5], other[:, 1:5]).all(dim=-1).any()
    assert torch.equal(ours[:, 5:], other[:, 5:])
    assert relative_error(ours[:, 5:], alone) < 2e-5


def test_document_mask_holds_for_the_token_after_next():
    """The MTP block's states of a document do not depend on the document in front of it."""
    model = random_model(config(document_mask=True, mtp_weight=0.3))
    tokens, following = random_tokens(model.config, 1, 12), random_tokens(model.config, 1, 12)
    tokens[0, 0] = tokens[0, 5] = following[0, 4] = BOS
    changed = tokens.clone()
    changed[0, 1:5] = (changed[0, 1:5] + 1) % BOS
    with torch.no_grad():
        ours, other = (model.mtp_hidden(model(x), x, following) for x in (tokens, changed))
    assert torch.equal(ours[:, 5:], other[:, 5:])


@pytest.mark.parametrize("changes", [dict(masked_weight=1.0, masked_rate=0.9),
                                     dict(token_noise=0.9)], ids=str)
def test_holes_and_noise_leave_the_borders_of_documents(changes):
    """Where documents begin is read from the tokens: they must not get lost or be made up."""
    trainer = trainer_of(document_mask=True, **changes)
    calls, (x, y) = recorded(trainer), batch(trainer.c)
    x[:, 0] = x[:, 5] = BOS
    trainer.gradients(x, y, 0.0, False)
    for _, tokens in calls:
        assert torch.equal(tokens == BOS, x == BOS)


def test_masked_token_has_no_embedding():
    trainer = trainer_of(xsa="learned")
    model, (x, y) = trainer.model, batch(trainer.c)
    x[x == 0] = 1
    holes = x.clone()
    holes[:, ::3] = -1
    with torch.no_grad():
        before = model(holes)
        model.wte.weight[0] += 1                # the row that the index is clamped to
        assert torch.equal(model(holes), before)
        assert not torch.allclose(model(x), before)
    trainer.backward(holes, y, (1, 1), 0.0, False)
    assert not model.wte.weight.grad[0].any()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_stochastic_depth_against_slow_reference(monkeypatch):
    """Block l is skipped with probability p l / (L - 1), drawn at each call; nothing is scaled."""
    c = config(**LOOP, stochastic_depth=0.6)
    model, draws = random_model(c).train(), torch.rand(100, generator=rng(3)).tolist()
    tokens = random_tokens(c, 1, 12)
    order, calls = (1, 2, 1, 2, 3), []          # layer 0 is always kept
    monkeypatch.setattr(torch, "rand", lambda *size, **_: calls.append(size) or torch.tensor(
        next(numbers)))
    outcomes = set()
    for trial in range(4):
        numbers = iter(draws[5 * trial:])
        with torch.no_grad():
            ours = model(tokens)[0]
        kept = (True, *(u >= 0.6 * layer / 3 for u, layer in zip(draws[5 * trial:], order)))
        outcomes.add(kept)
        assert relative_error(ours, Slow(model, S6L12, 2, kept=iter(kept)).hidden(tokens[0])) < 2e-5
    assert len(outcomes) > 1 and calls == [((),)] * 20      # one number a block call


# ---- how it is computed, not what ----

@pytest.mark.parametrize("changes", [
    dict(recompute_blocks=True),
    dict(recompute_blocks=True, dropout=0.3, stochastic_depth=0.3, loop_count=3, loop_start=1,
         loop_end=2, iha=True, xsa="learned")])
def test_blocks_that_run_again_in_the_backward(changes):
    plain, again = (trainer_of(**changes | dict(recompute_blocks=on)) for on in (False, True))
    for trainer in (plain, again):
        torch.manual_seed(3)
        trainer.gradients(*batch(trainer.c), 0.9, False)
    for p, q in zip(plain.model.parameters(), again.model.parameters()):
        assert torch.equal(p.grad, q.grad)


def test_like_blocks_share_a_graph(monkeypatch):
    compile_with = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compile_with(
        module, backend="eager", **options))
    changes = dict(num_layers=8, window_pattern="L", compile_model="blocks")
    whole, blocks = trainer_of(**changes), trainer_of(**changes)
    torch._dynamo.reset()
    blocks.rt.compile = True
    blocks.model = randomize(blocks.new_model()).double()
    before = torch._dynamo.utils.counters["frames"]["total"]
    for trainer in (whole, blocks):
        trainer.gradients(*batch(trainer.c), 0.0, False)
    # with and without value projections
    assert torch._dynamo.utils.counters["frames"]["total"] - before == 2
    for p, q in zip(whole.model.parameters(), blocks.model.parameters()):
        assert relative_error(q.grad, p.grad) < 1e-12


# ---- windows over training, and YaRN ----

def test_windows_of_two_hour():
    """(S, L): (256, 768) in epochs 1 to 6, (768, 1792) to 13, then (1280, 2048) and loops."""
    c = t.make_config("two_hour")
    steps = 4194
    for step in range(0, steps, 10):
        stage = [stage for stage in t.stages(c) if stage.start <= step / steps][-1]
        epoch = step / steps * 22
        if min(abs(epoch - 6), abs(epoch - 13)) > 0.01:
            index = (epoch > 6) + (epoch > 13)
            short, long = ((256, 768), (768, 1792), (1280, 2048))[index]
            assert stage.windows == (short, short, short, long) * 7 + (short, long)
            assert stage.yarn == ((768, 1792), (1792, 2048))[:index]
            assert stage.loops == (3 if index == 2 else 1) and stage.passes == 1


@pytest.mark.parametrize("growths", [(), ((768, 1792),), ((768, 1792), (1792, 2048))], ids=str)
def test_yarn_by_hand(growths):
    frequency = 10_000.0 ** (-torch.arange(64, dtype=torch.float64) / 64)
    ours, scale = t.yarn(frequency, growths)
    expected, factor = frequency.tolist(), 1.0
    for old, new in growths:
        factor *= 0.2 * math.log(new / old) + 1
        for i, f in enumerate(expected):
            turns = old * f / (2 * math.pi)
            keep = 0.0 if turns < 1 else 1.0 if turns > 32 else (turns - 1) / 31
            expected[i] = f * old / new * (1 - keep) + f * keep
    assert scale == pytest.approx(factor) and relative_error(ours, expected) < 1e-12
    if growths:     # the fastest are kept, the slowest interpolated
        assert ours[0] == frequency[0]
        assert ours[-1] / frequency[-1] == pytest.approx(768 / growths[-1][1])


def test_stages_of_tiny_and_limited():
    tiny, limited = (t.stages(t.make_config(track)) for track in ("tiny", "limited"))
    assert [(s.start, s.loops, s.passes) for s in tiny] == [(0, 1, 1), (0.7, 1, 2)]
    assert [(s.start, s.loops, s.passes) for s in limited] == [(0, 1, 1), (6 / 11, 3, 1)]


def test_every_track_has_no_more_stages_than_steps_see():
    """A stage that no step is in is a mistake in a schedule (and compiles a graph for nothing)."""
    for track in PUBLIC:
        c = t.make_config(track)
        starts = [stage.start for stage in t.stages(c)] + [1.0]
        for start, end in zip(starts, starts[1:]):
            assert end - start > 1 / steps_of(c), (track, start, end)


# ---- initial weights ----

@pytest.mark.parametrize("kind", ["normal", "zero", "small", "depth", "uniform", "xavier"])
def test_initial_output_projections(kind):
    c = config(model_dim=96, proj_init=kind, mtp_weight=0.3)
    d, hidden = 96, c.mlp_dim
    for name, p in t.GPT(c).init_weights(1).named_parameters():
        if not name.endswith(".proj.weight"):
            continue
        inputs = hidden if ".mlp." in name else d
        assert p.shape == (d, inputs)
        std = {"normal": d ** -0.5, "zero": 0.0, "small": 0.001, "uniform": d ** -0.5,
               "depth": (2 * 4 * d) ** -0.5, "xavier": (2 / (d + inputs)) ** 0.5}[kind]
        assert p.std().item() == pytest.approx(std, rel=0.05), name
        assert p.mean().abs() <= 0.05 * std
        if kind == "uniform":
            assert p.abs().max().item() == pytest.approx((3 / d) ** 0.5, rel=0.01)


def test_initial_weights_of_tiny():
    """Zero output projections, r = 1.1; XSA begins at 0 and the gates at a half."""
    c = t.make_config("tiny", preset="toy")
    for name, p in t.GPT(c).init_weights(1).named_parameters():
        if name.endswith((".proj.weight", "gate.weight")) and "mlp.gate" not in name or (
                name.endswith("xsa")):
            assert not p.any(), name
        elif name == "resid_lambdas":
            assert (p == 1.1).all()
        else:
            assert p.any(), name


# ==== Losses ====================================================================================
def naive_loss(trainer, x, y, later=(), alpha=0.0, student_x=None, masked_x=None):
    """(1 - alpha)(CE + w2 CE_2 + w3 CE_3 + MTP) + alpha T^2 KL + CE with holes, a mean, by loops.

    student_x: what the student reads instead of x. masked_x: the same with holes.
    """
    c, model, T = trainer.c, trainer.model, trainer.c.kd_temperature
    read = x if student_x is None else student_x
    hidden = model(read)
    student = model.logits(hidden)
    counted = [(r, i) for r in range(len(y)) for i in range(y.shape[1]) if y[r, i] >= 0]
    rows, columns = zip(*counted)

    def cross_entropy(logits, shift):
        """Sum over the positions of the token `shift` after the next, where their row has it."""
        where = [(r, i) for r, i in counted if i + shift < y.shape[1] and y[r, i + shift] >= 0]
        r, i = zip(*where)
        wanted = [int(y[row, column + shift]) for row, column in where]
        return -logits.log_softmax(-1)[r, i, wanted].sum(), len(where)

    total = sum(weight * cross_entropy(student, shift)[0]
                for shift, weight in enumerate((1.0, *later))) * (1 - alpha) / len(counted)
    if c.mtp_weight:
        ahead = model.logits(model.mtp_hidden(hidden, read, y.clamp(min=0)))
        ahead, pairs = cross_entropy(ahead, 1)
        total = total + (1 - alpha) * c.mtp_weight * ahead / pairs
    if alpha:
        with torch.no_grad():
            q = (trainer.teacher.logits(trainer.teacher(x)) / T).log_softmax(-1)[rows, columns]
        p = (student / T).log_softmax(-1)[rows, columns]
        total = total + alpha * T ** 2 * (q.exp() * (q - p)).sum() / len(counted)
    if masked_x is not None:
        masked, _ = cross_entropy(model.logits(model(masked_x)), 0)
        total = total + c.masked_weight * masked / len(counted)
    return total


def assert_gradients(trainer, loss, ours, tolerance=1e-6):
    trainer.model.zero_grad()
    loss.backward()
    for name, p in trainer.model.named_parameters():
        assert relative_error(ours[name], p.grad) < tolerance, name
    trainer.model.zero_grad()


TECHNIQUES = dict(**LOOP, rope_fraction=0.5, key_offset=True, xsa="learned", iha=True,
                  recurrence_from=0.1, mtp_weight=0.3, second_weight="0:0.5,0.33:0.5,0.66:0",
                  third_weight="0:0.25,0.33:0")


@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize("progress, later", [(0.0, (0.5, 0.25)), (0.22, (0.5, 0.25 / 3)),
                                             (0.495, (0.25, 0.0)), (0.9, (0.0, 0.0))])
def test_three_targets_with_and_without_a_teacher(alpha, progress, later):
    """Of a row that ends early as well; the second and third target do not cross its end."""
    trainer = trainer_of(**TECHNIQUES, kd_alpha=alpha, kd_temperature=1.2, device_batch_size=2)
    x, y = batch(trainer.c)
    sums = trainer.gradients(x, y, progress, bool(alpha))
    ours = gradients_of(trainer.model)
    assert_gradients(trainer, naive_loss(trainer, x, y, later, alpha), ours)
    trainer.c = replace(trainer.c, mtp_weight=0.0)          # the next token's loss is reported
    assert sums[0].item() == pytest.approx(naive_loss(trainer, x, y).item(), rel=1e-6)


@pytest.mark.parametrize("later", [("0:0.5", ""), ("", "0:0.25"), ("", "")], ids=str)
def test_one_later_target_alone(later):
    """third_weight alone is of the third next token; without either it is the plain loss."""
    trainer = trainer_of(second_weight=later[0], third_weight=later[1])
    x, y = batch(trainer.c)
    ce, _ = trainer.gradients(x, y, 0.0, False).tolist()
    weights = [float(text[2:] or 0) if text else 0.0 for text in later]
    ours = gradients_of(trainer.model)
    assert ce == pytest.approx(naive_loss(trainer, x, y).item(), rel=1e-6)  # of the next token
    assert_gradients(trainer, naive_loss(trainer, x, y, weights), ours)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_token_noise(alpha):
    """Of the student's inputs only: the targets, and what the teacher reads, are clean."""
    trainer = trainer_of(token_noise=0.3, kd_alpha=alpha, batch_rows=40, device_batch_size=40)
    calls, (x, y) = recorded(trainer), batch(trainer.c, 40)
    trainer.gradients(x, y, 0.0, bool(alpha))
    (student, noisy), *teacher = calls
    assert student is trainer.model
    for model, tokens in teacher:
        assert model is trainer.teacher and torch.equal(tokens, x)
    assert len(teacher) == bool(alpha)
    assert (noisy != x).float().mean().item() == pytest.approx(0.3, abs=0.07)
    assert set(noisy.flatten().tolist()) <= set(x.flatten().tolist())
    ours = gradients_of(trainer.model)
    assert_gradients(trainer, naive_loss(trainer, x, y, (), alpha, noisy), ours)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_loss_on_inputs_with_holes(alpha):
    trainer = trainer_of(masked_weight=0.7, masked_rate=0.25, kd_alpha=alpha, batch_rows=40,
                         device_batch_size=40, xsa="fixed")
    calls, (x, y) = recorded(trainer), batch(trainer.c, 40)
    trainer.gradients(x, y, 0.0, bool(alpha))
    holes = calls[-1][1]
    assert torch.equal(calls[0][1], x) and len(calls) == 2 + bool(alpha)
    assert (holes < 0).float().mean().item() == pytest.approx(0.25, abs=0.06)
    assert torch.equal(torch.where(holes < 0, x, holes), x) and holes.min() == -1
    ours = gradients_of(trainer.model)
    assert_gradients(trainer, naive_loss(trainer, x, y, (), alpha, masked_x=holes), ours)


@pytest.mark.parametrize("changes", [
    dict(TECHNIQUES, loop_count=1, document_mask=True, masked_weight=0.5, token_noise=0.2,
         recurrence_from=0.5, window_schedule="0:0.25:0.5,0.5:0.5:1"),
    dict(loop_start=0, loop_end=1, loop_count=3, loop_from_epoch=4, xsa="fixed", iha=True,
         meta_lr=0.5, meta_rows=2, dropout=0.2, stochastic_depth=0.5),
    dict(loop_start=0, loop_end=1, loop_count=2, loop_from_epoch=4, swiglu=False, mtp_weight=0.3,
         recompute_blocks=True, dropout=0.2)], ids=["1", "2", "3"])
def test_compiled_techniques_equal_eager(changes):
    """Forward, MTP and losses with a teacher, in the first stage and in the last, in one graph."""
    changes = dict(changes, num_layers=2, window_pattern="SL", kd_alpha=0.5, num_epochs=8)
    x, y = batch(config())
    x[:, 5] = BOS
    results = []
    for compiled in (False, True):
        trainer = trainer_of(**changes)
        if compiled:
            for name in ("forward", "mtp_hidden", "chunk_function"):
                setattr(trainer, name, torch.compile(getattr(trainer, name), dynamic=False,
                                                     backend="aot_eager", fullgraph=True))
        for stage in t.stages(trainer.c):
            trainer.model.prepare(12, stage)
            torch.manual_seed(0)
            sums = trainer.gradients(x, y, stage.start, True)
            results.append([sums, *gradients_of(trainer.model).values()])
            trainer.model.zero_grad()
    assert len(results) == 4
    for eager, compiled in zip(results[:2], results[2:]):
        for one, other in zip(eager, compiled):
            assert (other - one).abs().max() <= 1e-6 * one.abs().max()
    assert relative_error(results[0][1], results[1][1]) > 1e-2      # the stages do differ


@pytest.mark.skipif(bool(lacks_to_compile("cpu")), reason="no C++ compiler")
def test_inductor_computes_what_eager_does():
    """The whole model in fp32, as `compile_model=whole` compiles it."""
    x, y = batch(config())
    results = []
    for compiled in (False, True):
        c = config(num_layers=1, loop_count=2, xsa="learned", iha=True, rope_fraction=0.5,
                   key_offset=True, compile=compiled, compile_model="whole")
        trainer = t.Trainer(c, t.start_runtime(c), None, SimpleNamespace(bos=BOS))
        assert trainer.rt.compile is compiled
        randomize(trainer.model)
        sums = trainer.gradients(x, y, 0.0, False)
        results.append([sums, *gradients_of(trainer.model).values()])
    for eager, other in zip(*results):
        assert relative_error(other, eager) < 1e-3


# ==== Meta-gradient =============================================================================
def plastic(name, scope):
    """Parameters that take the inner step: all of Muon's matrices, or those of the MLPs."""
    return ".mlp." in name and name.startswith("blocks") if scope == "mlp" else (
        name.endswith("weight") and name not in ("wte.weight", "head.weight"))


def naive_meta_gradient(trainer, x, y, size, ranks, later, alpha):
    """Over virtual ranks: g1 at w, g2 at w - size g1 / |g1| (plastic weights only); g1 + g2."""
    c, model = trainer.c, trainer.model
    parameters, total = dict(model.named_parameters()), {}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    whole = int((y >= 0).sum())

    def gradient(rows):
        model.zero_grad()
        part = int((y[rows] >= 0).sum()) / whole        # naive_loss is a mean over its own targets
        (naive_loss(trainer, x[rows], y[rows], later, alpha) * part).backward()
        return gradients_of(model)

    for rank in range(ranks):
        rows = list(range(rank, len(x), ranks))
        first = gradient(rows[:c.meta_rows])
        chosen = [name for name in parameters if plastic(name, c.meta_scope)]
        norm = math.sqrt(sum(float((first[name] ** 2).sum()) for name in chosen))
        with torch.no_grad():
            for name in chosen:
                parameters[name] -= size * first[name] / norm
        second = gradient(rows[c.meta_rows:])
        model.load_state_dict(start)
        for name in parameters:
            total[name] = total.get(name, 0) + first[name] + second[name]
    model.zero_grad()
    return total


@pytest.mark.parametrize("scope, decay, alpha", [("matrices", True, 0.0), ("matrices", False, 0.6),
                                                 ("mlp", False, 0.0)])
def test_meta_gradient_of_any_number_of_processes_and_any_micro_batch(scope, decay, alpha):
    """Equal to the formula; the weights are afterwards what they were, bit for bit."""
    changes = {name: value for name, value in TECHNIQUES.items() if name != "mtp_weight"}
    trainer = trainer_of(**changes, meta_lr=0.5, meta_rows=2, meta_scope=scope, meta_decay=decay,
                         lr_warmdown=0.4, lr_power=0.5, batch_rows=16, kd_alpha=alpha)
    model, (x, y) = trainer.model, batch(trainer.c, 16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    size = 0.5 * math.sqrt((1 - 0.9) / 0.4) if decay else 0.5
    expected = naive_meta_gradient(trainer, x, y, size, 4, (0.0, 0.0), alpha)
    for world, micro in ((1, 2), (1, 1), (2, 2), (4, 1)):
        trainer.c = replace(trainer.c, device_batch_size=micro)
        trainer.rt.world, sums = world, 0
        for trainer.rt.rank in range(world):
            sums = sums + trainer.gradients(x, y, 0.9, bool(alpha))
        for name, gradient in gradients_of(model).items():
            assert relative_error(gradient, expected[name]) < 1e-6, (name, world, micro)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        model.zero_grad()
    trainer.rt.world, trainer.rt.rank = 1, 0
    trainer.c = replace(trainer.c, meta_lr=0.0)             # off: the plain gradient, another one
    trainer.gradients(x, y, 0.9, bool(alpha))
    plain = gradients_of(model)
    assert relative_error(plain["blocks.0.mlp.fc.weight"],
                          expected["blocks.0.mlp.fc.weight"]) > 1e-3
    assert_gradients(trainer, naive_loss(trainer, x, y, (0.0, 0.0), alpha), plain)


def test_meta_gradient_of_step_zero_is_the_plain_gradient():
    trainer = trainer_of(meta_lr=0.5, meta_rows=2, meta_decay=True, lr_warmdown=1.0, mtp_weight=0.3)
    x, y = batch(trainer.c)
    trainer.gradients(x, y, 1.0, False)         # the warmdown's end: an inner step of 0
    ours = gradients_of(trainer.model)
    assert_gradients(trainer, naive_loss(trainer, x, y), ours)


def test_weights_that_take_the_inner_step():
    """All 279 Muon matrices of limited, 48 matrices (138M weights) of tiny."""
    for track, count, size in (("limited", 279, None), ("tiny", 48, 138e6)):
        c = t.make_config(track)
        with torch.device("meta"):
            model = t.GPT(c)
        parameters = [(n, p) for n, p in model.named_parameters() if plastic(n, c.meta_scope)]
        assert len(parameters) == count
        if size:
            assert sum(p.numel() for _, p in parameters) == pytest.approx(size, rel=0.01)
        for p in model.parameters():            # those with a step are those that `adapted` saves
            p.grad = torch.empty_like(p)
        saved, owner = [], SimpleNamespace(c=c, model=model)
        clone = torch.Tensor.clone
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "clone", lambda x: saved.append(x) or clone(x))
            with t.Trainer.adapted(owner, 0.1):
                pass
        assert [x.shape for x in saved] == [p.shape for _, p in parameters]


# ==== Optimizer and schedules ===================================================================
def optimizer_of(shapes, **changes):
    names = [f"blocks.0.attn.{name}.weight" for name in "qkv"]
    parameters = [(name, torch.nn.Parameter(torch.zeros(shape)))
                  for name, shape in zip(names, shapes)]
    return t.MuonAdamW(parameters, config(**changes)), [p for _, p in parameters]


@pytest.mark.parametrize("limit", [1.0, 3.0, 1000.0])
@pytest.mark.parametrize("world", [1, 2])
def test_grad_clip_is_of_the_whole_gradient(limit, world, monkeypatch):
    """The norm is over all parameters of all ranks; a smaller gradient is left alone."""
    grads = [torch.randn(shape, generator=rng(i)) for i, shape in enumerate([(5, 4), (3,), (2, 2)])]
    expected = [g.clone() for g in grads]
    ranks = [grads] if world == 1 else [grads[:2], grads[2:]]
    total = math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads))
    assert 3.0 < total < 1000.0
    for rank, mine in enumerate(ranks):
        others = [g for other, theirs in enumerate(ranks) if other != rank
                  for g in expected[2:] * (rank == 0) or expected[:2]]
        monkeypatch.setattr(t.dist, "all_reduce", lambda x, group: x.add_(
            sum(g.square().sum() for g in others)))
        t.MuonAdamW.clip(SimpleNamespace(world=world, process_group=None), mine, limit)
    for ours, before in zip(grads, expected):
        assert relative_error(ours, before.double() * min(1.0, limit / total)) < 1e-5
    if limit > total:
        assert all(map(torch.equal, grads, expected))


def test_step_clips_before_the_momentum():
    for limit, norm in ((0.0, 10.0), (1.0, 1.0)):
        optimizer, (q, k, v) = optimizer_of([(4, 4)] * 3, grad_clip=limit, momentum=0.5)
        for i, p in enumerate((q, k, v)):
            p.grad = torch.randn(4, 4, generator=rng(i))
        scale = 10 / math.sqrt(sum(float(p.grad.square().sum()) for p in (q, k, v)))
        for p in (q, k, v):
            p.grad *= scale
        optimizer.step(momentum=0.5)
        assert optimizer.groups[0].m.norm().item() == pytest.approx(0.5 * norm, rel=1e-5)


def reference_lr(c, progress):
    """Warmdown of exponent p, then the sawtooth: a cosine from it to 0.05 in each last epoch."""
    left = min(1.0, (1 - progress) / c.lr_warmdown)
    base = c.lr_floor + (1 - c.lr_floor) * left ** c.lr_power
    epoch = progress * c.num_epochs
    if epoch < c.num_epochs - c.sawtooth_epochs:
        return base
    return 0.05 + (max(base, 0.05) - 0.05) * (1 + math.cos(math.pi * (epoch - int(epoch)))) / 2


@pytest.mark.parametrize("track, warmdown, power, floor, sawtooth", [
    ("tiny", 0.4, 1.0, 0.0, 4), ("limited", 0.2, 0.5, 0.0, 3), ("two_hour", 0.2, 0.5, 0.0, 8),
    ("unlimited", 1.0, 1.0, 0.08, 0)])
def test_learning_rate_of_public_tracks(track, warmdown, power, floor, sawtooth):
    c = t.make_config(track)
    settings = c.lr_warmup, c.lr_warmdown, c.lr_power, c.lr_floor, c.sawtooth_epochs
    assert settings == (0.0, warmdown, power, floor, sawtooth)
    for progress in np.linspace(0, 0.9999, 777):
        assert t.lr_multiplier(c, progress) == pytest.approx(reference_lr(c, progress), abs=1e-9)
        plain = replace(c, sawtooth_epochs=0)
        assert t.lr_multiplier(plain, progress) == t.base_multiplier(plain, progress)


def test_sawtooth_restarts_with_each_epoch():
    c = t.make_config("limited")
    for epoch in (8, 9, 10):
        top = t.base_multiplier(c, epoch / 11 + 1e-9)
        assert t.lr_multiplier(c, epoch / 11 + 1e-9) == pytest.approx(max(top, 0.05), abs=1e-6)
        assert t.lr_multiplier(c, (epoch + 1) / 11 - 1e-9) == pytest.approx(0.05, abs=1e-6)


def test_without_sawtooth_the_schedule_ends_at_its_floor():
    c = config(sawtooth_epochs=0, lr_warmdown=0.5, lr_floor=0.0)
    assert t.lr_multiplier(c, 1.0) == t.base_multiplier(c, 1.0) == 0.0


def reference_wd(track, progress):
    """Weight decay of the public tracks, base times multiplier."""
    if track in ("limited", "two_hour"):        # 1 until 40 %, .65 at the sawtooth's start, teeth
        epochs, teeth = {"limited": (11, 3), "two_hour": (22, 8)}[track]
        epoch, start = progress * epochs, (epochs - teeth) / epochs
        if progress < start:
            return 1.3 * (1 - 0.35 * max(0.0, (progress - 0.4) / (start - 0.4)))
        return 1.3 * (0.65 + 0.85 * (epoch % 1))
    if track == "tiny":                         # .8 in epochs 1 and 2, .1 at the end of the 8th
        epoch = 15 * progress
        return (0.8 if epoch < 2 else 0.8 - 0.7 * (epoch - 2) / 6 if epoch < 8 else
                0.1 + 0.83 * (epoch - 8) / 7)
    lr = 1 - 0.92 * progress                    # unlimited: rises from .91 as the LR falls
    return 1.3 * (0.7 + 0.3 * (1 - lr) / (1 - 0.08))


@pytest.mark.parametrize("track", PUBLIC)
def test_weight_decay_of_public_tracks(track):
    c = t.make_config(track)
    for progress in np.linspace(0, 0.99999, 2000):
        edge = abs(progress * c.num_epochs - round(progress * c.num_epochs)) < 2e-3
        if not edge:                            # the jumps are written to four digits
            ours = c.weight_decay * t.piecewise_linear(c.wd_schedule, progress)
            assert ours == pytest.approx(reference_wd(track, progress), rel=2e-3), progress


def test_a_schedule_with_jumps():
    schedule = "0:1,0.5:2,0.5:0.5,1:1.5"
    points = {-1: 1, 0: 1, 0.25: 1.5, 0.5 - 1e-12: 2, 0.5: 0.5, 0.75: 1.0, 1: 1.5, 2: 1.5}
    for progress, value in points.items():
        assert t.piecewise_linear(schedule, progress) == pytest.approx(value), progress
    assert t.piecewise_linear("0:1", 0.3) == 1.0


# ==== Members ===================================================================================
def test_batch_rows_of_unlimited():
    """Cycles of the first and of the last quarter: 393,216 tokens a step; else 524,288."""
    c = t.make_config("unlimited")
    tokens = [c.rows_of(k) * c.seq_len for k in range(1, 97)]
    assert tokens == [393_216] * 24 + [524_288] * 48 + [393_216] * 24
    for track in ("tiny", "limited", "two_hour"):
        assert t.make_config(track).rows_of(1) * 2048 == 524_288


@pytest.mark.parametrize("models, edge, rows", [
    (4, 6, [6, 8, 8, 6]), (8, 6, [6, 6, 8, 8, 8, 8, 6, 6]), (3, 6, [8, 8, 8]), (1, 6, [8]),
    (4, 0, [8, 8, 8, 8])])
def test_batch_rows_of_outer_quarters(models, edge, rows):
    c = config(num_models=models, batch_rows=8, edge_batch_rows=edge)
    assert [c.rows_of(k) for k in range(1, models + 1)] == rows


def test_members_continue_perturbed():
    """p + N(0, 1) std(p) s, with s from 0.25 to 0.05 along a cosine; the optimizer goes on."""
    trainer = trainer_of(num_models=5, continue_members=True, model_dim=96)
    model = trainer.model.float()
    trainer.start_member(trainer.c, 1001, 1)
    optimizer, initial = trainer.optimizer, t.GPT(trainer.c).init_weights(1001).state_dict()
    assert all(torch.equal(p, initial[name]) for name, p in model.named_parameters())
    optimizer.steps, optimizer.groups[0].m[:] = 17, 3.0
    noises = []
    for k in range(2, 6):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer.start_member(trainer.c, 1000 + k, k)
        strength = 0.05 + 0.2 * (1 + math.cos(math.pi * (k - 2) / 3)) / 2
        for name, p in model.named_parameters():
            if before[name].numel() > 1000 and before[name].std():
                noise = (p.detach() - before[name]) / before[name].std()
                assert noise.std().item() == pytest.approx(strength, rel=0.05), name
                assert noise.mean().abs() < 0.1 * strength
        noises.append(model.wte.weight.detach() - before["wte.weight"])
        assert trainer.optimizer is optimizer
        assert optimizer.steps == 17 and (optimizer.groups[0].m == 3).all()
    for a, b in zip(noises, noises[1:]):
        assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < 0.05
    trainer.start_member(trainer.c, 1001, 1)        # the first of another chain begins afresh
    assert trainer.optimizer is not optimizer and trainer.optimizer.steps == 0
    assert all(torch.equal(p, initial[name]) for name, p in model.named_parameters())


def test_members_that_do_not_continue_begin_afresh():
    trainer = trainer_of(num_models=3)
    trainer.model.float()
    for k in (1, 2):
        trainer.start_member(trainer.c, k, k)
        expected = t.GPT(trainer.c).init_weights(k).state_dict()
        assert all(torch.equal(p, expected[n]) for n, p in trainer.model.named_parameters())
        assert trainer.optimizer.steps == 0
        trainer.optimizer.steps = 9


@pytest.mark.parametrize("fraction, count", [(1.0, 20), (0.5, 10), (0.33, 7), (0.0, 1)])
def test_part_of_the_documents_by_member(fraction, count):
    documents = [np.full(i + 2, i) for i in range(20)]
    parts = [t.member_documents(documents, fraction, seed) for seed in (1, 1, 2, 3)]
    numbers = [[int(d[0]) for d in part] for part in parts]
    for chosen, part in zip(numbers, parts):
        assert len(chosen) == len(set(chosen)) == count and chosen == sorted(chosen)
        assert all(part_document is documents[i] for part_document, i in zip(part, chosen))
    assert numbers[0] == numbers[1]
    assert fraction == 1 or len(set(map(tuple, numbers[1:]))) > 1


def test_learned_mixture_keeps_the_heaviest():
    """Cut off after fitting all members, then renormalized, not fitted anew."""
    random = np.random.default_rng(0)
    members = [{split: (-random.exponential(2, 400) - 0.1 * i) for split in
                ("selection", "val", "holdout")} for i in range(5)]
    p = np.exp([m["selection"] for m in members])
    weights = np.full(5, 0.2)
    for _ in range(20_000):
        weights *= (p / (weights @ p)).mean(axis=1)
    for size in (0, 1, 2, 4, 5, 9):
        kept = np.sort(weights)[::-1][:size or 5]
        expected = np.where(weights >= kept[-1], weights, 0) / kept.sum()
        val, holdout, ours = t.learned_mixture(members, size)
        assert np.allclose(ours, expected, atol=5e-3)
        assert sum(w > 0 for w in ours) == min(size or 5, 5)
        for split, loss in (("val", val), ("holdout", holdout)):
            mixed = sum(w * np.exp(m[split]) for w, m in zip(expected, members))
            assert loss == pytest.approx(-np.log(mixed).mean(), abs=2e-3)


# ---- averages ----

class FakeTraining:
    """25 steps of 3 epochs of 33 rows, 4 a step, with random weights; snapshots of all of them."""

    ENDS = (9, 17, 25)          # steps, from 1, that complete an epoch

    def __init__(self, average, last_epochs=2, steps=25, **changes):
        self.model = torch.nn.Linear(3, 2, bias=False).double()
        c = config(average=average, average_epochs=last_epochs, num_epochs=3, **changes)
        rows = t.Rows([np.zeros(331, np.uint16)], 10, 4, 3, 0, 0)
        rows.num_steps, self.snapshots, self.scored = steps, {}, 0
        self.averages = t.Averages(c, self.model, rows)
        for step in range(steps):
            with torch.no_grad():
                self.model.weight.copy_(torch.randn(2, 3, generator=rng(step)) / (1 + step))
            self.snapshots[step + 1] = self.model.weight.detach().clone()
            self.averages.update(step, self.score)
        self.rows = rows

    @staticmethod
    def logp(split, weight):
        directions = torch.randn(50, 6, generator=rng(len(split)), dtype=torch.float64)
        return torch.nn.functional.logsigmoid(directions @ weight.flatten()).numpy()

    def score(self):
        self.scored += 1
        weight = self.model.weight.detach()
        return {split: self.logp(split, weight).astype(np.float32)
                for split in ("selection", "val", "holdout")}

    def expected(self):
        """{name: (weights, {split: log p})} from the snapshots."""
        ends, last = [self.snapshots[n] for n in self.ENDS[1:]], self.snapshots[25]
        beta = 0.15 ** (10 * 4 / self.rows.rows_per_epoch)
        ema, mass = torch.zeros(2, 3, dtype=torch.float64), 0.0
        for n in (10, 20):
            ema, mass = beta * ema + (1 - beta) * self.snapshots[n], beta * mass + 1 - beta
        weights = {"last": last, "ema": ema / mass, "weights": (ends[0] + ends[1]) / 2,
                   "weights_recency": (ends[0] + 2 * ends[1]) / 3}
        splits = ("selection", "val", "holdout")
        options = {name: (w, {s: self.logp(s, w) for s in splits}) for name, w in weights.items()}
        for name, (a, b) in {"probs": (1 / 2, 1 / 2), "probs_recency": (1 / 3, 2 / 3)}.items():
            options[name] = last, {s: np.log(a * np.exp(self.logp(s, ends[0]))
                                             + b * np.exp(self.logp(s, ends[1]))) for s in splits}
        return options


@pytest.mark.parametrize("average", t.AVERAGES)
def test_averages_against_snapshots(average):
    """`best` is the lowest loss on selection, whatever val and holdout say."""
    training = FakeTraining(average)
    expected = training.expected()
    name, scores = training.averages.finish(training.score)
    if average == "best":
        assert name == min(expected, key=lambda n: -expected[n][1]["selection"].mean())
        assert name != min(expected, key=lambda n: -expected[n][1]["val"].mean())
    else:
        assert name == average
    weights, logps = expected[name]
    assert relative_error(training.model.weight, weights) < 1e-9
    for split, logp in logps.items():
        assert scores[split].dtype == np.float32
        assert relative_error(scores[split], logp) < 1e-6
    if average == "last":
        assert training.scored == 1             # nothing but the end is evaluated
    if average in ("last", "probs", "probs_recency"):
        assert torch.equal(training.model.weight, training.snapshots[25])   # bit for bit


def test_average_of_a_run_too_short_for_it():
    """Fewer than 10 steps have no EMA; the member ends as its last weights."""
    training = FakeTraining("ema", steps=9)
    _, scores = training.averages.finish(training.score)
    assert torch.equal(training.model.weight, training.snapshots[9])
    assert relative_error(scores["val"], training.score()["val"]) == 0


def test_averages_of_public_tracks():
    settings = {track: (c.average, c.average_epochs, c.sawtooth_epochs) for track, c in (
        (track, t.make_config(track)) for track in PUBLIC)}
    assert settings == {"tiny": ("weights_recency", 4, 4), "limited": ("probs", 3, 3),
                        "two_hour": ("probs", 9, 8), "unlimited": ("last", 1, 0)}


# ==== The count-based member ====================================================================
class SlowKneserNey:
    """Interpolated modified Kneser-Ney with dictionaries, from the formulas of Chen and Goodman.

    c: occurrences at the highest order, else the number of distinct tokens seen in front; n-grams
    that begin with BOS have nothing in front and keep their occurrences. Contexts end at BOS.
    """

    def __init__(self, tokens, vocab_size, bos, order):
        self.vocab_size, self.bos, self.order = vocab_size, bos, order
        occurrences = {k: Counter() for k in range(1, order + 1)}
        for i in range(1, len(tokens)):
            history = self.history(tokens, i)
            for k in range(1, min(order, len(history) + 1) + 1):
                occurrences[k][(*history[len(history) - k + 1:], tokens[i])] += 1
        self.counts, self.followers, self.discounts = {}, {}, {}
        for k in range(1, order + 1):
            in_front = Counter(gram[1:] for gram in occurrences.get(k + 1, ()))
            self.counts[k] = {gram: occurrences[k][gram] if k == order or k > 1 and gram[0] == bos
                              else in_front[gram] for gram in occurrences[k]}
            self.followers[k] = {}
            for gram, count in self.counts[k].items():
                self.followers[k].setdefault(gram[:-1], []).append(count)
            n = [sum(count == size for count in self.counts[k].values()) for size in range(5)]
            y = n[1] / (n[1] + 2 * n[2]) if n[1] else 0
            self.discounts[k] = (0, *(size - (size + 1) * y * n[size + 1] / n[size]
                                      for size in (1, 2, 3))) if all(n[1:4]) else (0, 0.5, 1, 1.5)

    def history(self, tokens, i):
        """The tokens of its document in front of tokens[i], BOS included."""
        start = i - 1
        while start > 0 and tokens[start] != self.bos:
            start -= 1
        return tuple(tokens[start:i])

    def probability(self, history, token):
        p = 1 / self.vocab_size
        for k in range(1, min(self.order, len(history) + 1) + 1):
            context = tuple(history[len(history) - k + 1:])
            if context in self.followers[k]:
                counts = self.followers[k][context]
                count = self.counts[k].get((*context, token), 0)
                kept = sum(self.discounts[k][min(n, 3)] for n in counts) / sum(counts)
                p = (count - self.discounts[k][min(count, 3)]) / sum(counts) + kept * p
        return p


NGRAM_VOCAB, NGRAM_BOS = 30, 29


def ngram_tokens(count, seed):
    """Documents of all lengths, of a skewed bigram model over 25 of the 29 other tokens."""
    random = np.random.default_rng(seed)
    rows = np.random.default_rng(0).permuted(np.tile(1 / np.arange(1, 26) ** 1.5, (25, 1)), axis=1)
    tokens = [NGRAM_BOS]
    while len(tokens) < count:
        if random.random() < 0.08:
            tokens.append(NGRAM_BOS)
        else:
            before = tokens[-1] % 25
            tokens.append(int(random.choice(25, p=rows[before] / rows[before].sum())))
    return tokens


def ngram_model(tokens, order):
    return data.ngram.NGram(np.array(tokens, np.uint16), NGRAM_VOCAB, NGRAM_BOS, order)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [25, 3000])
def test_ngram_against_dictionaries(order, count):
    train, held_out = ngram_tokens(count, 1), [*ngram_tokens(400, 2), 27, 28, 3, 27, NGRAM_BOS, 5]
    slow = SlowKneserNey(train, NGRAM_VOCAB, NGRAM_BOS, order)
    ours = ngram_model(train, order).logprobs(np.array(held_out, np.uint16))
    expected = [math.log(slow.probability(slow.history(held_out, i), held_out[i]))
                for i in range(1, len(held_out))]
    assert ours.dtype == np.float32 and relative_error(ours, expected) < 1e-6
    if count == 3000 and order > 1:         # discounts are estimated, not the fallback
        assert slow.discounts[order][1:] != (0.5, 1, 1.5)


@pytest.mark.parametrize("order", [1, 4])
def test_ngram_probabilities_sum_to_one(order):
    """Behind a seen context, an unseen one, one of unseen tokens, and at a document's start."""
    train = ngram_tokens(3000, 1)
    model = ngram_model(train, order)
    for context in (train[:4], train[100:106], [NGRAM_BOS, 28, 27, 26], [NGRAM_BOS, 3, 28, 4],
                    [NGRAM_BOS], [NGRAM_BOS, 7], [NGRAM_BOS, 7, 28]):
        p = [math.exp(model.logprobs(np.array([*context, token], np.uint16))[-1])
             for token in range(NGRAM_VOCAB)]
        assert min(p) > 0 and sum(p) == pytest.approx(1, abs=1e-5), context


@pytest.mark.parametrize("order", [1, 2, 4])
def test_ngram_support_against_dictionaries(order):
    train, held_out = ngram_tokens(3000, 1), [*ngram_tokens(400, 2), 27, 28, 3, 27, NGRAM_BOS, 5]
    ours = ngram_model(train, order).support(np.array(held_out, np.uint16))
    # the counts of every context: occurrences at the top order and behind a BOS, else the
    # distinct tokens that stand in front, summed over the tokens that follow
    grams = {k: {} for k in range(1, 5)}
    for k in grams:
        for i in range(1, len(train)):
            gram = tuple(train[max(0, i - k + 1):i + 1])
            if len(gram) == k and NGRAM_BOS not in gram[1:-1]:
                grams[k][gram] = grams[k].get(gram, 0) + 1
    def total(context):
        k = len(context) + 1
        if k == order or context[:1] == (NGRAM_BOS,):
            return sum(n for gram, n in grams[k].items() if gram[:-1] == context)
        return len([gram for gram in grams[k + 1] if gram[1:-1] == context])
    for i in range(1, len(held_out)):
        start = max(j for j in range(i) if held_out[j] == NGRAM_BOS)
        want = 0
        for k in range(1, order + 1):
            if i - k + 1 < start:
                continue
            context = tuple(held_out[i - k + 1:i])
            if (n := total(context)):
                want = 4 * (k - 1) + min(3, int(math.log(n, 4) + 1e-9))
        assert ours[i - 1] == want, (i, context)


def test_weights_by_support_climb_to_the_mode():
    """No weights nearby are more probable, by likelihood and Dirichlet prior; without tokens: the
    weights of all."""
    random = np.random.default_rng(3)
    logps, support = np.log(random.uniform(0.01, 1, (3, 500))), random.integers(0, 5, 500)
    weights = np.array([0.2, 0.5, 0.3])
    table = data.ngram.weights_by_support(list(logps), support, weights)
    assert table.shape == (3, 16) and np.allclose(table.sum(axis=0), 1)
    assert np.allclose(table[:, 5:], weights[:, None])
    for known in range(5):
        p = np.exp(logps[:, support == known])
        score = lambda w: np.log(w @ p).sum() + data.ngram.PRIOR * weights @ np.log(w)
        for direction in ((1, -1, 0), (0, 1, -1), (1, 0, -1)):
            for step in (1e-2, -1e-2):
                assert score(table[:, known]) > score(table[:, known] + step * np.array(direction))


def test_mixture_with_weights_by_token():
    random = np.random.default_rng(4)
    logps, weights = np.log(random.uniform(0.01, 1, (3, 50))), random.dirichlet(np.ones(3), 50).T
    weights[:, 7] = 0, 1, 0
    want = np.log((weights * np.exp(logps)).sum(axis=0))
    assert np.allclose(t.mixture_logp(list(logps), weights), want, atol=1e-12)


def test_ngram_contexts_end_at_bos():
    """Behind a BOS nothing depends on the document in front of it; BOS itself is predicted."""
    model = ngram_model(ngram_tokens(3000, 1), 4)
    a, b, c = [NGRAM_BOS, 1, 2, 3, 4], [NGRAM_BOS, 9, 8], [NGRAM_BOS, 5, 6, 7, 1]
    first, second, alone = (model.logprobs(np.array(x, np.uint16)) for x in (a + c, b + c, c))
    assert np.array_equal(first[-4:], alone) and np.array_equal(second[-4:], alone)
    assert len(first) == len(a + c) - 1 and first[len(a) - 1] != second[len(b) - 1]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 64])
def test_ngram_blocks_change_nothing(block, monkeypatch):
    model, tokens = ngram_model(ngram_tokens(3000, 1), 4), np.array(ngram_tokens(200, 2), np.uint16)
    whole = model.logprobs(tokens)
    monkeypatch.setattr(data.ngram, "BLOCK", block)
    assert np.array_equal(model.logprobs(tokens), whole)


def test_ngram_gives_no_token_a_probability_of_zero():
    """Nor when the estimate of a discount is negative: with many n-grams that occur 4 times."""
    sentences = [[NGRAM_BOS, 1, 2]] * 4 + [[NGRAM_BOS, 3, 4]] * 4 + [[NGRAM_BOS, 5, 6]] * 4
    sentences += [[NGRAM_BOS, 7, 8]] * 3 + [[NGRAM_BOS, 9, 10]] * 2 + [[NGRAM_BOS, 11, 12]]
    logp = ngram_model(sum(sentences, []), 2).logprobs(np.array([NGRAM_BOS, 1, 20], np.uint16))
    assert np.isfinite(logp).all()


# ==== Size and cost of the public tracks ========================================================
def count(module):
    return sum(p.numel() for p in module.parameters())


def rows_of(c):
    """The Rows of a member, from the number of tokens alone (the document takes no memory)."""
    tokens = np.broadcast_to(np.uint16(0), c.train_tokens - c.selection_tokens)
    return t.Rows([tokens], c.seq_len, c.batch_rows, c.num_epochs, 0, 0)


def steps_of(c):
    return rows_of(c).num_steps


@pytest.mark.parametrize("track, blocks, total", [
    ("limited", 1.170e9, 1.444e9), ("two_hour", 1.170e9, 1.444e9), ("tiny", 0.2055e9, 0.317e9),
    ("unlimited", 1.541e9, 1.870e9)])
def test_parameters_of_public_tracks(track, blocks, total):
    """Value projections are not in the blocks."""
    with torch.device("meta"):
        model = t.GPT(t.make_config(track))
    assert count(model.blocks) == pytest.approx(blocks, rel=1e-3)
    assert count(model) == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("track, expected", [
    ("limited", [9.22e9, 12.37e9]), ("two_hour", [8.91e9, 9.15e9, 12.44e9]),
    ("unlimited", [25.5e9]), ("tiny", [1.76e9, None])])
def test_flops_of_public_tracks(track, expected):
    """Training FLOPs a token in each stage that steps are in; tiny: a third of the trunk more."""
    c = t.make_config(track)
    seen = list(dict.fromkeys(
        [stage for stage in t.stages(c) if stage.start <= step / steps_of(c)][-1]
        for step in range(steps_of(c))))
    flops = [t.flops_per_token(c, stage) for stage in seen]
    if track == "tiny":
        expected[1] = flops[0] + (flops[0] - 6 * c.model_dim * c.padded_vocab) / 3
    assert flops == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("track, steps", [("limited", 2097), ("tiny", 2859), ("two_hour", 4194)])
def test_steps_of_public_tracks(track, steps):
    """48,804 rows an epoch, 256 a step; ours carry rows over and leave out selection."""
    rows = rows_of(t.make_config(track))
    assert rows.rows_per_epoch == pytest.approx(48_804, rel=0.01) and rows.batch_rows == 256
    assert rows.num_steps == pytest.approx(steps, rel=0.01)


def test_settings_of_public_tracks():
    """The values of the techniques above."""
    settings = {
        "tiny": dict(num_layers=16, model_dim=1024, num_heads=8, num_epochs=15, rope_fraction=0.5,
                     key_offset=True, xsa="learned", xsa_lr=0.2, iha=False, recurrence_from=0.7,
                     proj_init="zero", resid_init=1.1, muon_eq=False, gate_lr=0.2, dropout=0.1,
                     mlp_dropout=False, stochastic_depth=0.0, mtp_weight=0.0, meta_lr=0.5,
                     meta_decay=False, meta_scope="mlp", meta_rows=16, softcap=15.0, grad_clip=0.0,
                     second_weight="0:0.5,0.33:0.5,0.66:0", third_weight="0:0.25,0.33:0",
                     matrix_lr=0.032, embed_lr=0.12, head_lr=0.0008, x0_lr=0.2, scalar_lr=0.002,
                     weight_decay=0.8, loop_count=1),
        "limited": dict(num_epochs=11, loop_start=15, loop_end=20, loop_count=3, loop_from_epoch=6,
                        xsa="", iha=True, iha_lr=0.02, mtp_weight=0.3, proj_init="normal",
                        muon_eq=True, dropout=0.05, mlp_dropout=True, stochastic_depth=0.0,
                        meta_lr=0.5, meta_decay=True, meta_scope="matrices", meta_rows=16,
                        softcap=10.0, grad_clip=0.0, weight_decay=1.3, matrix_lr=0.01),
        "two_hour": dict(num_epochs=22, loop_start=15, loop_end=20, loop_count=3,
                         loop_from_epoch=13, iha=True, mtp_weight=0.3, dropout=0.1, meta_lr=0.0,
                         stochastic_depth=0.05, softcap=10.0, grad_clip=0.0, weight_decay=1.3),
        "unlimited": dict(num_layers=30, model_dim=2048, num_heads=16, num_chains=5, num_models=96,
                          num_epochs=2, loop_start=15, loop_end=24, loop_count=5, loop_from_epoch=0,
                          iha=True, mtp_weight=0.3, dropout=0.1, stochastic_depth=0.0, kd_from=9,
                          kd_alpha=0.45, kd_temperature=1.2, grad_clip=1.0, momentum=0.95,
                          momentum_start=0.95, continue_members=True, perturb_start=0.25,
                          perturb_end=0.05, mixture_size=256, final_mixture="learned",
                          softcap=15.0, weight_decay=1.3, meta_lr=0.0)}
    for track, values in settings.items():
        c = t.make_config(track)
        assert {name: getattr(c, name) for name in values} == values, track


# ==== Whole runs of the public tracks ===========================================================
RUN = ["--preset=toy", "--device=cpu", "--dtype=float32", "--train_tokens=4000",
       "--selection_tokens=500", "--eval_tokens=300", "--batch_rows=8", "--model_dim=32",
       "--num_layers=2", "--loop_start=1", "--loop_end=1", "--log_steps=1", "--run_id=run"]


def read_run(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [m for m in map(json.loads, lines) if "step" in m]
    return steps, json.loads((folder / "result.json").read_text(encoding="utf-8"))


def run_alone(runs, *arguments):
    """In this process."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert t.main([*RUN, f"--runs_dir={runs}", *arguments]) == 0
    return read_run(runs / "run")


def arguments_of(track):
    same = ["--dropout=0", "--stochastic_depth=0"]      # random numbers differ by process,
    if track == "unlimited":                            # but here each process has a whole chain
        same = ["--num_models=2", "--num_epochs=1", "--loop_count=2"]
    return [f"--track={track}", *same]


def run_in_two(runs, *arguments):
    """In two processes, as torchrun starts them."""
    env = {k: v for k, v in os.environ.items()
           if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "train_gpt.py", *RUN, f"--runs_dir={runs}", *arguments], capture_output=True,
        encoding="utf-8", cwd=ROOT, env=env | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0, done.stderr
    return read_run(runs / "run")


@pytest.mark.parametrize("track", PUBLIC)
def test_public_track_in_one_and_two_processes(track, tmp_path):
    """The same losses; with 2 chains each process trains one of them, dropout and all."""
    steps, alone = run_alone(tmp_path / "one", *arguments_of(track))
    steps_of_two, shared = run_in_two(tmp_path / "two", *arguments_of(track))
    chains = alone["config"]["num_chains"]
    assert chains == (2 if track == "unlimited" else 1)
    assert len(alone["members"]) == len(shared["members"]) == (4 if track == "unlimited" else 1)
    assert shared["processes"] == 2
    # the log is that of the first chain
    first = steps[:len(steps) // chains]
    assert [(m["member"], m["step"]) for m in steps_of_two] == [
        (m["member"], m["step"]) for m in first] and len(first) >= 9
    for key in ("train_loss", "kl"):
        assert [m[key] for m in steps_of_two] == pytest.approx([m[key] for m in first], abs=1e-3)
    for one, other in zip(alone["members"], shared["members"]):
        for key in ("train_loss", "selection_loss", "val_loss", "holdout_loss"):
            assert other[key] == pytest.approx(one[key], abs=1e-3)
        assert one["average"] == other["average"] == alone["config"]["average"]
    if chains > 1:              # the chains differ, and only distilled members have a KL
        assert alone["members"][0]["train_loss"] != alone["members"][2]["train_loss"]
        assert all((m["kl"] > 0) == (m["member"] > 1) for m in steps)
    assert shared["val_loss"] == pytest.approx(alone["val_loss"], abs=1e-3)
    assert alone["val_loss"] < math.log(2048)
    names, others = ({file.name for file in (tmp_path / runs / "run/members").iterdir()}
                     for runs in ("one", "two"))
    assert names == others


@pytest.mark.parametrize("changes", [
    ["--track=tiny", "--num_models=2", "--kd_alpha=0.5", "--kd_from=2", "--token_noise=0.1",
     "--masked_weight=0.5", "--average=best", "--subset_fraction=0.6"],
    ["--track=limited", "--document_mask=true", "--ngram_order=3", "--final_mixture=ngram",
     "--xsa=fixed", "--average=ema"]], ids=str)
def test_run_with_techniques_of_no_public_track(changes, tmp_path):
    steps, result = run_alone(tmp_path, *changes)
    assert len(result["members"]) == result["config"]["num_models"]
    assert 0 < result["val_loss"] < math.log(2048)
    assert all((m["kl"] > 0) == (m["member"] > 1) for m in steps)
    if result["config"]["final_mixture"] == "ngram":
        assert result["val_loss"] == result["ensemble"][-1]["val_loss_ngram"]
        assert result["ngram"]["val_loss"] > result["val_loss"]


# ==== Members averaged in logits, for comparison ================================================
def test_logit_average_against_a_loop():
    from records.logit_average import logit_average
    models = [random_model(config(), seed=seed) for seed in (1, 2, 3)]
    tokens = random_tokens(models[0].config, 2, 9)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    for model in models:
        model.prepare(8)
    ours = logit_average(models, inputs, targets)
    for row in range(2):
        for i in range(8):
            z = np.mean([m.logits(m(inputs))[row, i].detach().numpy() for m in models], axis=0)
            expected = z[targets[row, i]] - np.log(np.exp(z).sum())
            assert ours[row, i].item() == pytest.approx(expected, rel=1e-9)
