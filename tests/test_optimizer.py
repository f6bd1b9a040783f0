"""The table of parameters, Muon and AdamW against NumPy, and their share-out over processes.

    python -m pytest tests/test_optimizer.py

The references are written from the formulas, a matrix at a time, in float64.
"""
import os
import re
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_gpt
from helpers import (BOS, TECHNIQUES, as_array, clean_environment, randn, randomize,
                     relative_error, small_config, small_tables, torchrun,
                     weights_after_three_steps)
from train_gpt import (ADAM_EPS, GPT, TRACKS, MuonAdamW, ParameterRow, Rates, Runtime, adamw_state,
                       adamw_update, find_row, make_config, muon_state, muon_update,
                       parameter_table, polar_express, spelled_state, spelled_update)

FLOAT64 = Runtime(dtype=torch.float64)
SPELLED = ("wte.weight", "head.weight")


# ==== The table of parameters ===================================================================
@pytest.mark.parametrize("track", TRACKS)
@pytest.mark.parametrize("changes", [
    dict(), dict(TECHNIQUES), dict(TECHNIQUES, gate_lr=0), dict(TECHNIQUES, spelling=True)],
    ids=["as it is", "all", "all, gates by Muon", "all, with spelling"])
def test_every_parameter_of_every_track_is_in_one_row(track, changes):
    config = make_config(track, preset="toy", **changes)
    table = parameter_table(config)
    with torch.device("meta"):
        model = GPT(config)
    for name, p in model.named_parameters():
        row = find_row(table, name)
        assert row.optimizer == "adamw" or p.ndim == 2, name
        assert (row.optimizer == "spelled") == (config.spelling and name in SPELLED), name


def test_a_parameter_in_no_row_or_in_two_is_an_error():
    config = small_config()
    table = parameter_table(config)
    with pytest.raises(ValueError, match="stranger is in 0 rows"):
        find_row(table, "stranger")
    with pytest.raises(ValueError, match="wte.weight is in 0 rows"):
        find_row(table, "_wte.weight")              # the whole name must match
    with pytest.raises(ValueError, match="wte.weight is in 2 rows"):
        find_row([*table, table[0]], "wte.weight")
    stranger = ("stranger", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match="stranger"):
        MuonAdamW([*GPT(config).named_parameters(), stranger], config)


def settings_of(name, gates_by_muon=False):
    """Learning rate, decays or not, betas (None: Muon) of a parameter with RATES."""
    last = re.sub(r"^.*attn\.", "", name)
    if last == "gate.weight" and not gates_by_muon:
        return 0.19, False, (0.9, 0.99)
    return {"wte.weight": (0.11, True, (0.8, 0.95)), "head.weight": (0.07, True, (0.8, 0.95)),
            "resid_lambdas": (0.17, False, (0.8, 0.95)),
            "skip_lambdas": (0.17, False, (0.8, 0.95)),
            "x0_lambdas": (0.13, False, (0.96, 0.95)), "xsa": (0.2, False, (0.9, 0.95)),
            "mix": (0.02, False, (0.8, 0.95))}.get(last, (0.05, True, None))


@pytest.mark.parametrize("gates_by_muon, spelling", [(False, False), (True, False), (False, True)])
def test_rows_have_the_rates_of_their_fields(gates_by_muon, spelling):
    config = small_config(**{**TECHNIQUES, **(dict(gate_lr=0) if gates_by_muon else {}),
                             "spelling": spelling})
    table = parameter_table(config)
    for name, _ in GPT(config).named_parameters():
        row = find_row(table, name)
        lr, decays, betas = settings_of(name, gates_by_muon)
        assert (row.lr, row.weight_decay) == (lr, 1.3 * decays), name
        adamw = "spelled" if spelling and name in SPELLED else "adamw"
        assert row.optimizer == (adamw if betas else "muon"), name
        assert row.betas == (betas or ()), name
        assert row.shared_lr == {"wte.weight": 0.22, "head.weight": 0.07}.get(name, 0), name


# ==== Polar Express =============================================================================
COEFFICIENTS = (        # of the published method, five steps
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def polar_by_svd(x):
    """U p(sigma) V^T of one matrix: the five odd polynomials act on its singular values alone."""
    u, sigma, vt = np.linalg.svd(x, full_matrices=False)
    sigma = sigma / (1.02 * np.sqrt((x ** 2).sum()) + 1e-6)
    for a, b, c in COEFFICIENTS:
        sigma = a * sigma + b * sigma ** 3 + c * sigma ** 5
    return (u * sigma) @ vt


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 24, 8), (3, 8, 24), (2, 20, 1), (2, 1, 20)])
def test_polar_express_against_svd(shape, dtype, tolerance):
    x = randn(*shape, dtype=dtype)
    ours = polar_express(x)
    assert ours.dtype == dtype
    for matrix, result in zip(x.double().numpy(), ours, strict=True):
        assert relative_error(result, polar_by_svd(matrix)) < tolerance


@pytest.mark.parametrize("rows, cols", [(16, 16), (40, 16), (16, 40)])
def test_polar_express_orthogonalizes(rows, cols):
    """Singular values from 1 down to 1/500 of the largest come out near 1, on their own vectors;
    how large the matrix is does not matter."""
    u, v = (torch.linalg.qr(randn(n, 16, seed=n))[0] for n in (rows, cols))
    x = u * torch.logspace(0, np.log10(0.002), 16, dtype=torch.float64) @ v.T
    ours = polar_express(x[None])[0]
    inner = u.T @ ours @ v
    assert (inner - inner.diagonal().diag()).abs().max() < 1e-9
    assert (inner.diagonal() - 1).abs().max() < 0.15    # all that five steps promise
    assert relative_error(ours, u @ inner @ v.T) < 1e-9
    assert relative_error(polar_express(1000 * x[None])[0], ours) < 1e-5


def test_polar_express_of_nothing_is_nothing():
    assert not polar_express(torch.zeros(2, 3, 5)).any()


# ==== Updates ===================================================================================
class NumpyMuon:
    """Muon for one matrix w, from the formulas."""

    def __init__(self, w, muon_eq=True, normuon_beta2=0.95, cautious=True):
        self.w = w.copy()
        self.muon_eq = muon_eq
        self.beta2 = normuon_beta2
        self.cautious = cautious
        self.m = np.zeros_like(w)
        self.v = 0.0

    def step(self, g, lr, wd, momentum):
        rows, cols = g.shape
        self.m = momentum * self.m + (1 - momentum) * g
        u = (1 - momentum) * g + momentum * self.m              # Nesterov
        if self.muon_eq:
            u = u / np.maximum(np.sqrt((u ** 2).sum(1, keepdims=True)), 1e-7)
        x = polar_by_svd(u)
        if self.beta2:                                          # NorMuon
            v = (x ** 2).mean(1 if rows >= cols else 0, keepdims=True)
            self.v = self.beta2 * self.v + (1 - self.beta2) * v
            y = x / np.sqrt(np.maximum(self.v, 1e-10))
            x = y * np.linalg.norm(x) / np.linalg.norm(y)
        mask = (x * self.w >= 0) if self.cautious else 1.0
        lr = lr * np.sqrt(max(1, rows / cols))
        self.w = self.w - lr * x - lr * wd * self.w * mask


class NumpyAdamW:
    """AdamW for one array w, decoupled decay first."""

    def __init__(self, w, beta1, beta2, eps):
        self.w = w.copy()
        self.betas = beta1, beta2
        self.eps = eps
        self.m = self.v = 0.0
        self.steps = 0

    def step(self, g, lr, wd):
        beta1, beta2 = self.betas
        self.steps += 1
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g ** 2
        m = self.m / (1 - beta1 ** self.steps)
        v = self.v / (1 - beta2 ** self.steps)
        self.w = self.w * (1 - lr * wd) - lr * m / (np.sqrt(v) + self.eps)


MUON = {
    "all": dict(muon_eq=True, normuon_beta2=0.95, cautious=True),
    "no NorMuon": dict(muon_eq=True, normuon_beta2=0.0, cautious=True),
    "no MuonEq": dict(muon_eq=False, normuon_beta2=0.95, cautious=True),
    "not cautious": dict(muon_eq=True, normuon_beta2=0.95, cautious=False),
    "plain": dict(muon_eq=False, normuon_beta2=0.0, cautious=False),
}


def rates_of(lr, wd, step, **changes):
    """Rates with `changes`; what is not among them is not used."""
    rest = dict.fromkeys(("shared_lr", "momentum", "betas", "config", "dtype", "features"))
    return Rates(lr=lr, weight_decay=wd, step=step, **rest | changes)


def run_muon(shape, wd, changes, dtype=torch.float64):
    """Three matrices through muon_update and NumpyMuon; yields (ours, reference) a step."""
    p = randn(3, *shape, seed=1)
    state = muon_state(p)
    references = [NumpyMuon(matrix.numpy(), **changes) for matrix in p]
    scale = torch.logspace(-2, 2, 3, dtype=torch.float64)[:, None, None]    # they must not mix
    for step, momentum in enumerate((0.85, 0.9, 0.95, 0.95), 1):
        g = scale * randn(3, *shape, seed=10 + step)
        rates = rates_of(0.05, wd, step, momentum=momentum, config=small_config(**changes),
                         dtype=dtype)
        muon_update(p, g.clone(), state, rates)
        for reference, matrix in zip(references, g.numpy()):
            reference.step(matrix, 0.05, wd, momentum)
        yield p.numpy(), np.stack([reference.w for reference in references])


@pytest.mark.parametrize("name", MUON)
@pytest.mark.parametrize("shape, wd", [
    ((8, 8), 1.3), ((6, 15), 1.3), ((15, 6), 0.0), ((15, 6), 1.3), ((1, 12), 1.3), ((12, 1), 1.3)],
    ids=str)
def test_muon_update_against_numpy(shape, wd, name):
    for ours, reference in run_muon(shape, wd, MUON[name]):
        assert relative_error(ours, reference) < 1e-10


def test_muon_update_in_bfloat16_is_close():
    """The orthogonalization alone is in bf16: a step differs by a small part of itself."""
    start = randn(3, 16, 16, seed=1).numpy()
    ours, exact = next(run_muon((16, 16), 0.0, MUON["all"], torch.bfloat16))
    assert 0 < np.linalg.norm(ours - exact) / np.linalg.norm(exact - start) < 0.15


def test_muon_update_without_gradient_stands_still():
    p = randn(2, 6, 4, dtype=torch.float32)
    before = p.clone()
    rates = rates_of(0.1, 0.0, 1, momentum=0.95, config=small_config(**MUON["all"]),
                     dtype=torch.float32)
    muon_update(p, torch.zeros_like(p), muon_state(p), rates)
    assert torch.equal(p, before)


@pytest.mark.parametrize("wd, betas", [(1.3, (0.8, 0.95)), (0.0, (0.96, 0.95)),
                                       (0.1, (0.9, 0.99))])
def test_adamw_update_against_numpy(wd, betas, monkeypatch):
    p = randn(7, 5)
    state = adamw_state(p)
    reference = NumpyAdamW(p.numpy(), *betas, eps=1e-3)
    monkeypatch.setattr(train_gpt, "ADAM_EPS", 1e-3)
    for step in range(1, 6):
        g = randn(7, 5, seed=step) * (step != 3)        # one without gradient
        adamw_update(p, g.clone(), state, rates_of(0.04, wd, step, betas=betas))
        reference.step(g.numpy(), 0.04, wd)
        assert relative_error(p, reference.w) < 1e-12


class SlowSpelled:
    """AdamW for rows w of tokens, and for a row of each feature that tokens have, from nothing.

    A feature's gradient is the sum of its tokens' gradients, each times the part that the token
    has of it, and the tokens take the same parts of its update.
    """

    def __init__(self, w, tables, beta1, beta2, eps):
        self.rows = NumpyAdamW(w, beta1, beta2, eps)
        self.parts = {}             # of each feature: {token: part}
        for features, weights in zip(tables["features"], tables["weights"][:, :, 0]):
            for token in np.flatnonzero(weights):
                self.parts.setdefault(features[token], {})[token] = float(weights[token])
        self.shared = {feature: NumpyAdamW(np.zeros(w.shape[1]), beta1, beta2, eps)
                       for feature in self.parts}

    @property
    def w(self):
        return self.rows.w

    def step(self, g, lr, wd, shared_lr):
        self.rows.step(g, lr, wd)
        for feature, parts in self.parts.items():
            row = self.shared[feature]
            before = row.w
            row.step(sum(part * g[token] for token, part in parts.items()), shared_lr, 0)
            for token, part in parts.items():
                self.w[token] += part * (row.w - before)


@pytest.mark.parametrize("wd, betas", [(1.3, (0.8, 0.95)), (0.0, (0.9, 0.99))])
def test_spelled_update_against_slow_reference(wd, betas, monkeypatch):
    """Also where rows have no gradient: their like have one. BOS and the padding have no like."""
    p = randn(128, 5)
    state, tables = spelled_state(p), small_tables()
    reference = SlowSpelled(p.numpy(), tables, *betas, eps=1e-3)
    features = [torch.from_numpy(tables[name]) for name in ("features", "weights")]
    monkeypatch.setattr(train_gpt, "ADAM_EPS", 1e-3)
    for step in range(1, 5):
        g = randn(128, 5, seed=step)
        g[::3] = 0
        before = p.clone()
        rates = rates_of(0.04, wd, step, shared_lr=0.07, betas=betas, features=features)
        spelled_update(p, g.clone(), state, rates)
        reference.step(g.numpy(), 0.04, wd, 0.07)
        assert relative_error(p, reference.w) < 1e-11
        if step == 1:               # without a gradient nothing else would move a row but decay
            moved = (p - before * (1 - 0.04 * wd))[::3].abs().amax(dim=1) > 1e-6
            assert torch.equal(moved, torch.arange(0, 128, 3) < BOS)


def test_spelled_update_at_a_shared_rate_of_zero_is_adamw():
    p, tables = randn(128, 5), small_tables()
    alone, state, alone_state = p.clone(), spelled_state(p), adamw_state(p)
    features = [torch.from_numpy(tables[name]) for name in ("features", "weights")]
    for step in range(1, 4):
        g = randn(128, 5, seed=step)
        rates = rates_of(0.04, 1.3, step, shared_lr=0.0, betas=(0.8, 0.95), features=features)
        spelled_update(p, g.clone(), state, rates)
        adamw_update(alone, g.clone(), alone_state, rates)
        assert torch.equal(p, alone)


@pytest.mark.parametrize("shape, second", [((3, 8, 5), (3, 8, 1)), ((3, 5, 8), (3, 1, 8)),
                                           ((3, 6, 6), (3, 6, 1))])
def test_states_have_a_first_dimension_of_matrices(shape, second):
    """By it a state is cut into those of the parameters. All begin at 0."""
    p = randn(*shape)
    muon, adamw, spelled = muon_state(p), adamw_state(p[0]), spelled_state(p[0])
    assert {name: tuple(x.shape) for name, x in muon.items()} == {
        "momentum": shape, "second_moment": second}
    assert {name: tuple(x.shape) for name, x in adamw.items()} == {
        "first_moment": shape[1:], "second_moment": shape[1:]}
    assert {name: tuple(x.shape) for name, x in spelled.items()} == dict.fromkeys((
        "first_moment", "second_moment", "shared_first_moment", "shared_second_moment"), shape[1:])
    states = (*muon.values(), *adamw.values(), *spelled.values())
    assert not any(x.any() for x in states)
    assert len({x.data_ptr() for x in states}) == len(states)       # none is another's


# ==== The optimizer of a model ==================================================================
def set_gradients(model, step=1):
    for i, (name, p) in enumerate(model.named_parameters()):
        p.grad = (i + 1) * randn(*p.shape, seed=100 * step + i, dtype=p.dtype)


@pytest.mark.parametrize("gates_by_muon, spelling", [(False, False), (True, False), (False, True)])
def test_optimizer_equals_the_updates_by_hand(gates_by_muon, spelling):
    """Parameter by parameter, three steps: stacking does not mix them, rates are by step. Without
    spelling no token learns from another, whatever is known of them."""
    config = small_config(**{**TECHNIQUES, **MUON["all"],
                             **(dict(gate_lr=0) if gates_by_muon else {}), "spelling": spelling})
    model = randomize(GPT(config)).double()
    references = {}
    for name, p in model.named_parameters():
        betas = settings_of(name, gates_by_muon)[2]
        references[name] = (NumpyAdamW(as_array(p), *betas, ADAM_EPS) if betas
                            else NumpyMuon(as_array(p), **MUON["all"]))
        if spelling and name in SPELLED:
            references[name] = SlowSpelled(as_array(p), small_tables(), *betas, ADAM_EPS)
    optimizer = MuonAdamW(model.named_parameters(), config, FLOAT64, small_tables())
    schedule = [(0.7, 1.5, 0.8), (0.4, 0.5, 0.9), (1.0, 0.0, 0.95)]
    for step, (lr_multiplier, wd_multiplier, momentum) in enumerate(schedule, 1):
        set_gradients(model, step)
        for name, p in model.named_parameters():
            lr, decays, betas = settings_of(name, gates_by_muon)
            rates = lr * lr_multiplier, 1.3 * decays * wd_multiplier
            more = [] if betas else [momentum]
            if spelling and name in SPELLED:
                more = [{"wte.weight": 0.22, "head.weight": 0.07}[name] * lr_multiplier]
            references[name].step(as_array(p.grad), *rates, *more)
        optimizer.step(lr_multiplier, wd_multiplier, momentum)
        assert optimizer.steps == step
        for name, p in model.named_parameters():
            assert p.grad is None, name
            assert relative_error(p, references[name].w) < 1e-9, name


def test_groups_are_of_what_is_updated_alike():
    """Matrices of one shape and row type are one stack; all else is alone."""
    config = small_config(**TECHNIQUES)
    shapes = {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}
    groups = MuonAdamW(GPT(config).named_parameters(), config).groups
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(shapes)
    stacks = [group for group in groups if settings_of(group.names[0])[2] is None]
    assert len(stacks) == len({shapes[name] for group in stacks for name in group.names})
    for group in stacks:
        assert len({shapes[name] for name in group.names}) == 1
        assert group.state["momentum"].shape == (len(group.names), *shapes[group.names[0]])
    for group in groups:
        if group not in stacks:
            assert len(group.names) == 1


def test_matrices_of_one_shape_with_other_rates_are_another_stack(monkeypatch):
    config = small_config()
    own = ParameterRow(r".*attn\.q\.weight", ("unit gain", 1.0), "muon", 0.001, 0.0)
    table = [row._replace(pattern=r"(?!.*attn\.q\.)" + row.pattern)
             for row in parameter_table(config)]
    monkeypatch.setattr(train_gpt, "parameter_table", lambda config: [own, *table])
    groups = MuonAdamW(GPT(config).named_parameters(), config).groups
    group, = (group for group in groups if "blocks.0.attn.q.weight" in group.names)
    assert group.names == [f"blocks.{i}.attn.q.weight" for i in range(4)]
    assert group.row.lr == 0.001


@pytest.mark.parametrize("limit", [0.0, 2.0, 1e6])
def test_grad_clip_is_of_the_whole_gradient(limit):
    """Seen in the moments of the first step: the norm is over all parameters of both kinds."""
    config = small_config(**TECHNIQUES, grad_clip=limit)
    model = randomize(GPT(config)).double()
    set_gradients(model)
    gradients = {name: as_array(p.grad).copy() for name, p in model.named_parameters()}
    norm = np.sqrt(sum((g ** 2).sum() for g in gradients.values()))
    assert 2.0 < norm < 1e6
    optimizer = MuonAdamW(model.named_parameters(), config, FLOAT64)
    optimizer.step(1.0, 1.0, 0.75)
    for group in optimizer.groups:
        is_adamw = "first_moment" in group.state
        seen = group.state["first_moment" if is_adamw else "momentum"]
        share = 1 - group.row.betas[0] if is_adamw else 0.25
        for name, moment in zip(group.names, [seen] if is_adamw else seen):
            expected = gradients[name] * (min(1.0, limit / norm) if limit else 1.0)
            assert relative_error(moment / share, expected) < 1e-5, name


def test_no_state_is_shared_between_optimizers():
    results = []
    for _ in range(2):
        model = randomize(GPT(small_config(**TECHNIQUES)))
        optimizer = MuonAdamW(model.named_parameters(), model.config)
        set_gradients(model)
        optimizer.step(1.0, 1.0, 0.95)
        results.append(model.state_dict())
    assert all(torch.equal(p, results[1][name]) for name, p in results[0].items())


# ==== Several processes =========================================================================
def optimizers_of(world_size, config):
    model = GPT(config)
    return [MuonAdamW(model.named_parameters(), config, Runtime(rank, world_size))
            for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_every_parameter_has_one_owner_and_groups_are_shared_out(world_size):
    config = small_config(num_layers=5, **TECHNIQUES)
    shapes = {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}
    optimizers = optimizers_of(world_size, config)
    plans = [[(group.names, group.owner) for group in optimizer.groups]
             for optimizer in optimizers]
    assert all(plan == plans[0] for plan in plans)      # else collectives would not match
    names = [name for group, _ in plans[0] for name in group]
    assert sorted(names) == sorted(shapes)
    for rank, optimizer in enumerate(optimizers):
        for group in optimizer.groups:
            assert bool(group.state) == group.is_mine == (group.owner == rank)
    counts = np.bincount([owner for _, owner in plans[0]], minlength=world_size)
    assert counts.max() - counts.min() <= 1
    for shape in set(shapes.values()):                  # matrices of a shape: as evenly as can be
        alike = [(group, owner) for group, owner in plans[0]
                 if shapes[group[0]] == shape and settings_of(group[0])[2] is None]
        sizes = [len(group) for group, _ in alike]
        if sizes:
            assert len(sizes) == min(world_size, sum(sizes))
            assert max(sizes) - min(sizes) <= 1
            assert len({owner for _, owner in alike}) == len(sizes)


SCRIPT = """
import os
import sys
import torch.distributed as dist
from safetensors.torch import save_file
from helpers import small_config, weights_after_three_steps
from train_gpt import start_runtime

runtime = start_runtime(small_config())
save_file(weights_after_three_steps(runtime), f"{sys.argv[1]}/{runtime.rank}.safetensors")
dist.destroy_process_group()
os._exit(0)     # at Python's own end gloo's threads may abort
"""


def test_two_processes_compute_what_one_does(tmp_path):
    """Of most shapes there is an odd number of matrices; all are clipped by one norm."""
    script = tmp_path / "steps.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = clean_environment(PYTHONPATH=os.pathsep.join(sys.path))
    done = torchrun(2, script, tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    alone = weights_after_three_steps(Runtime())
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, p in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert relative_error(first[name], p) < 1e-9, name
