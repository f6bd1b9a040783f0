"""The numeric pieces against independent references: SVD, autograd, brute force, NumPy in float64.

    python -m pytest tests/test_numerics.py

The references are written from the formulas and share no code with train_gpt.py. A test marked
xfail is a place where the formulas, read literally, and train_gpt.py disagree.
"""
import copy
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as t
from data.shards import UserError

CPU = torch.device("cpu")


# ==== Helpers ===================================================================================
def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64).to(dtype)


def relative_error(ours, reference):
    """The largest difference, as a fraction of the reference's largest entry."""
    ours, reference = (np.asarray(torch.as_tensor(x).detach(), dtype=np.float64)
                       for x in (ours, reference))
    assert ours.shape == reference.shape
    return np.abs(ours - reference).max() / np.abs(reference).max()


def small_config(track="limited", **changes):
    """Every technique of `limited` on, at a size that a slow loop can follow."""
    return t.make_config(track, **{
        **dict(preset="toy", vocab_size=100, num_layers=4, model_dim=48, num_heads=4,
               mlp_multiple=8, seq_len=12, dropout=0.0, loop_start=2, loop_end=2, loop_count=3),
        **changes})


def randomize(model, seed=0):
    """Every parameter random and of a size that matters: gates, lambdas and padding as well."""
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            scale = 1.0 if p.ndim == 1 or "gate" in name else 1.5 / p.shape[-1] ** 0.5
            p.copy_(scale * randn(*p.shape, seed=1000 * seed + i))
    return model


def random_model(c, seed=0):
    """A random GPT that computes in float64."""
    return randomize(t.GPT(c, dtype=torch.float64), seed).double().prepare(c.seq_len).eval()


def random_tokens(c, *shape, seed=0):
    return torch.randint(0, c.vocab_size, shape, generator=rng(seed))


# ==== Polar Express =============================================================================
COEFFICIENTS = (        # of the published method, five steps
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def reference_polar(x):
    """U p(sigma) V^T of one matrix: the five odd polynomials act on its singular values alone."""
    u, sigma, vt = np.linalg.svd(x, full_matrices=False)
    sigma = sigma / (1.02 * np.sqrt((x ** 2).sum()) + 1e-6)
    for a, b, c in COEFFICIENTS:
        sigma = a * sigma + b * sigma ** 3 + c * sigma ** 5
    return (u * sigma) @ vt


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 12, 12), (3, 24, 8), (3, 8, 24), (2, 20, 1),
                                   (2, 1, 20)])
def test_polar_express_against_svd(shape, dtype, tolerance):
    x = randn(*shape, dtype=dtype)
    ours = t.polar_express(x)
    assert ours.dtype == dtype
    for one, result in zip(x.double().numpy(), ours):
        assert relative_error(result, reference_polar(one)) < tolerance


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize("rows, cols", [(16, 16), (40, 16), (16, 40)])
def test_polar_express_orthogonalizes(rows, cols, dtype, tolerance):
    """Singular values from 1 down to 1/500 of the largest come out near 1, on their own vectors."""
    u, v = (torch.linalg.qr(randn(n, 16, seed=n, dtype=torch.float64))[0] for n in (rows, cols))
    x = u * torch.logspace(0, np.log10(0.002), 16, dtype=torch.float64) @ v.T
    ours = t.polar_express(x[None].to(dtype))[0].double()
    inner = u.T @ ours @ v
    assert (inner - inner.diagonal().diag()).abs().max() < tolerance
    assert (inner.diagonal() - 1).abs().max() < 0.15    # all that five steps promise
    assert relative_error(ours, u @ inner @ v.T) < tolerance
    assert relative_error(t.polar_express(1000 * x[None])[0], ours) < max(1e-5, tolerance)


def test_polar_express_of_nothing_is_nothing():
    assert torch.equal(t.polar_express(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))


# ==== Loss ======================================================================================
N, D, VOCAB, PADDED = 37, 16, 50, 64
DISTILLATION = [(0.0, 1.0), (0.5, 1.0), (0.7, 2.0), (1.0, 0.5)]
TARGET_WEIGHTS = [(1.0,), (1.0, 0.5, 0.25)]     # of the next token and of those after it


def loss_inputs(alpha, n=N, targets=1):
    """hidden, weight, targets [n, J], teacher's hidden and weight, in float32.

    In some rows the later targets are missing, all of them or the last; in others all are.
    """
    h, w = 2 * randn(n, D, seed=1), randn(PADDED, D, seed=2)
    y = torch.randint(0, VOCAB, (n, targets), generator=rng(3))
    y[1::7, 1:], y[2::7, 2:] = -1, -1
    y[3::7] = y[3::7, :1]                       # one token several times
    y[::5], y[-1] = -1, -1
    teacher = (2 * randn(n, D, seed=4), randn(PADDED, D, seed=5)) if alpha else (None, None)
    return h, w, y, *teacher


def chunked(h, w, y, y_weights, teacher_h, teacher_w, alpha, temperature, softcap, chunk):
    return t.ChunkedLoss.apply(h, w, y, torch.tensor(y_weights), teacher_h, teacher_w, alpha,
                               temperature, softcap, VOCAB, chunk, t.loss_chunk)


def naive_loss(h, w, y, y_weights, teacher_h, teacher_w, alpha, temperature, softcap):
    """(loss, CE of the next token, KL), sums over the counted tokens, from whole logits without
    the padding. The loss has the cross-entropies of all targets, weighted."""
    cap = lambda z: softcap * torch.tanh(z / softcap) if softcap else z
    logits, counted = cap(h @ w[:VOCAB].T), y[:, 0] >= 0
    logp = logits - logits.logsumexp(1, keepdim=True)
    ces = []
    for j in range(y.shape[1]):
        there = counted & (y[:, j] >= 0)
        ces.append(-logp[there, y[there, j]].sum())
    kl = torch.zeros((), dtype=h.dtype)
    if teacher_h is not None:
        q = torch.softmax(cap(teacher_h @ teacher_w[:VOCAB].T) / temperature, 1)
        p = torch.softmax(logits / temperature, 1)
        kl = (q * (q.log() - p.log())).sum(1)[counted].sum()
    ce = sum(weight * one for weight, one in zip(y_weights, ces))
    return (1 - alpha) * ce + alpha * temperature ** 2 * kl, ces[0], kl


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("alpha, temperature", DISTILLATION)
@pytest.mark.parametrize("chunk", [1, 8, 37, 100])
@pytest.mark.parametrize("y_weights", [*TARGET_WEIGHTS, (1.0, 0.0), (1.0, 0.7)], ids=str)
def test_chunked_loss_equals_naive_float64_autograd(softcap, alpha, temperature, chunk, y_weights):
    h, w, y, *teacher = loss_inputs(alpha, targets=len(y_weights))
    h.requires_grad_(), w.requires_grad_()
    sums = chunked(h, w, y, y_weights, *teacher, alpha, temperature, softcap, chunk)
    (3 * sums[0]).backward()        # 3: the gradient that comes in must count

    h64, w64 = (x.detach().double().requires_grad_() for x in (h, w))
    teacher64 = [x if x is None else x.double() for x in teacher]
    reference = naive_loss(h64, w64, y, y_weights, *teacher64, alpha, temperature, softcap)
    (3 * reference[0]).backward()
    for ours, naive in zip(sums[:2 + bool(alpha)], reference):
        assert relative_error(ours, naive) < 1e-5
    assert alpha or sums[2] == 0
    assert relative_error(h.grad, h64.grad) < 1e-5
    assert relative_error(w.grad, w64.grad) < 1e-5
    assert h.grad[y[:, 0] < 0].abs().max() == 0     # nothing is learned where nothing is predicted
    assert w.grad[VOCAB:].abs().max() == 0          # nor by the padding


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("alpha, temperature", DISTILLATION)
@pytest.mark.parametrize("y_weights", TARGET_WEIGHTS, ids=str)
def test_padding_never_receives_probability(softcap, alpha, temperature, y_weights):
    """Not a bit changes when the padding's rows do, however large, in student and teacher."""
    h, w, y, teacher_h, teacher_w = loss_inputs(alpha, targets=len(y_weights))
    results = []
    for scale in (0.0, 1000.0):
        student, teacher = w.clone(), teacher_w if teacher_w is None else teacher_w.clone()
        for weight in (student,) if teacher is None else (student, teacher):
            weight[VOCAB:] = scale * randn(PADDED - VOCAB, D, seed=6)
        arguments = (h, student, y, torch.tensor(y_weights), teacher_h, teacher, alpha,
                     temperature, softcap)
        results.append([*t.loss_chunk(*arguments, VOCAB),
                        t.target_logprobs(h, student, y[:, 0], softcap, VOCAB)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("y_weights", TARGET_WEIGHTS, ids=str)
def test_a_target_that_is_not_counted_changes_nothing(y_weights):
    h, w, y, *teacher = loss_inputs(0.5, targets=len(y_weights))
    y[::5, 1:] = 7                  # a token without a next one, though later ones are known
    settings, keep = (0.5, 2.0, 5.0, VOCAB), y[:, 0] >= 0
    y_weights = torch.tensor(y_weights)
    whole = t.loss_chunk(h, w, y, y_weights, *teacher, *settings)
    part = t.loss_chunk(h[keep], w, y[keep], y_weights, teacher[0][keep], teacher[1], *settings)
    for i in (0, 1, 2, 4):
        assert relative_error(whole[i], part[i]) < 1e-6
    assert relative_error(whole[3][keep], part[3]) < 1e-6


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


def test_no_tensor_of_all_logits_is_made():
    n, chunk = 256, 16
    y_weights = TARGET_WEIGHTS[-1]
    h, w, y, *teacher = loss_inputs(0.5, n, len(y_weights))
    h.requires_grad_(), w.requires_grad_()
    with Largest() as naive:
        naive_loss(h, w, y, y_weights, *teacher, 0.5, 2.0, 5.0)[0].backward()
    assert naive.numel >= n * VOCAB                 # the recorder sees forward and backward
    with Largest() as ours:
        chunked(h, w, y, y_weights, *teacher, 0.5, 2.0, 5.0, chunk)[0].backward()
    assert ours.numel <= max(chunk * PADDED, n * D)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_target_logprobs_and_capped_logits(softcap):
    h, w, y, *_ = loss_inputs(0.0)
    y = y[:, 0]
    z = h.double() @ w.double().T
    z = softcap * torch.tanh(z / softcap) if softcap else z
    ours, reference = t.capped_logits(h, w, softcap), torch.log_softmax(z[:, :VOCAB], 1)
    assert relative_error(ours, z) < 1e-5 and ours.dtype == torch.float32
    assert t.capped_logits(h.bfloat16(), w.bfloat16(), softcap).dtype == torch.float32
    logp = t.target_logprobs(h, w, y, softcap, VOCAB)
    assert logp.shape == (N,) and logp.dtype == torch.float32
    counted = (y >= 0).nonzero()[:, 0]
    assert relative_error(logp[counted], reference[counted, y[counted]]) < 1e-5


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
def test_compiled_loss_chunk_equals_eager():
    y_weights = torch.tensor(TARGET_WEIGHTS[-1])
    h, w, y, *teacher = loss_inputs(0.5, targets=len(y_weights))
    arguments = (h, w, y, y_weights, *teacher, 0.5, 2.0, 5.0, VOCAB)
    compiled = torch.compile(t.loss_chunk, dynamic=False)(*arguments)
    for ours, eager in zip(compiled, t.loss_chunk(*arguments)):
        assert relative_error(ours, eager) < 1e-5


def float64_trainer(**changes):
    """A Trainer whose random student (and teacher) compute in float64, and a batch of 4 rows."""
    c = small_config(**{**dict(mtp_weight=0.3, batch_rows=4, device_batch_size=2, loss_chunk=7,
                               dtype="float32", device="cpu", meta_lr=0.0), **changes})
    runtime = t.start_runtime(c)
    runtime.dtype = torch.float64
    trainer = t.Trainer(c, runtime, None, SimpleNamespace(bos=0))
    for seed, model in enumerate((trainer.model, trainer.teacher)):
        if model is not None:
            randomize(model, seed).double()
    stream = random_tokens(c, 4, c.seq_len + 1)
    x, y = stream[:, :-1], stream[:, 1:].clone()
    y[3, 8:] = -1                                   # a row that ends early
    return trainer, x, y


@pytest.mark.parametrize("later", [(), (0.4, 0.3)], ids=["next", "third"])
@pytest.mark.parametrize("alpha, temperature", [(0.0, 1.0), (0.7, 2.0)])
def test_gradients_of_a_batch_equal_the_formula(alpha, temperature, later):
    """(1 - alpha)(CE + sum of w_j CE of y_t+j + w CE of y_t+1 by MTP) + alpha T^2 KL.

    No y_t+j crosses the end of its row. In two micro-batches, with a row that ends early; the
    model computes in float64. later: the weights of y_t+1 and y_t+2 halfway through.
    """
    schedules = dict(second_weight="0:0.5,1:0.3", third_weight="0:0.3") if later else {}
    trainer, x, y = float64_trainer(kd_alpha=alpha, kd_temperature=temperature, **schedules)
    c, model, teacher = trainer.c, trainer.model, trainer.teacher
    model.prepare(c.seq_len, t.stages(c)[-1]._replace(loops=2))
    ce, kl = trainer.gradients(x, y, 0.5, bool(alpha)).tolist()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    hidden, sums = model(x), dict(ce=0, later=0, ahead=0, kl=0)
    ahead = model.logits(model.mtp_hidden(hidden, x, y.clamp(min=0))).log_softmax(-1)
    student = model.logits(hidden)
    tempered = (student / temperature).log_softmax(-1)
    if alpha:       # the teacher always runs with all its loops
        teacher.prepare(c.seq_len, t.stages(c)[-1])
        q = (teacher.logits(teacher(x)).detach() / temperature).log_softmax(-1)
    counted = [(row, i) for row in range(4) for i in range(c.seq_len) if y[row, i] >= 0]
    for row, i in counted:
        sums["ce"] -= student[row, i].log_softmax(-1)[y[row, i]]
        for j, weight in enumerate(later, 1):
            if (row, i + j) in counted:
                sums["later"] -= weight * student[row, i].log_softmax(-1)[y[row, i + j]]
        if (row, i + 1) in counted:
            sums["ahead"] -= ahead[row, i, y[row, i + 1]]
        if alpha:
            sums["kl"] += (q[row, i].exp() * (q[row, i] - tempered[row, i])).sum()
    pairs = 3 * (c.seq_len - 1) + 7                 # 8 targets of the last row are 7 pairs
    assert len(counted) == 3 * c.seq_len + 8
    naive = (1 - alpha) * ((sums["ce"] + sums["later"]) / len(counted)
                           + 0.3 * sums["ahead"] / pairs)
    (naive + alpha * temperature ** 2 * sums["kl"] / len(counted)).backward()
    for ours_of, sum_of in ((ce, sums["ce"]), (kl, sums["kl"])):
        expected = float(torch.as_tensor(sum_of).detach()) / len(counted)
        assert ours_of == pytest.approx(expected, rel=1e-6, abs=1e-12)
    for name, p in model.named_parameters():
        assert relative_error(ours[name], p.grad) < 1e-6, name


@pytest.mark.parametrize("world, changes", [
    (2, {}), (4, {}), (2, dict(meta_lr=0.5, meta_rows=1, device_batch_size=1))], ids=str)
def test_gradients_add_up_over_ranks(world, changes):
    """The gradients and losses of a batch's shares sum to those of one process."""
    trainer, x, y = float64_trainer(kd_alpha=0.5, **changes)
    results = []
    for processes in (1, world):
        trainer.model.zero_grad()
        trainer.rt.world, sums = processes, 0
        for trainer.rt.rank in range(processes):
            sums = sums + trainer.gradients(x, y, 0.5, True)
        results.append([sums, *(p.grad.clone() for p in trainer.model.parameters())])
    for one, shared in zip(*results):
        assert relative_error(shared, one) < 1e-6


# ==== Ensemble ==================================================================================
@pytest.fixture(scope="module")
def members():
    """Three tiny random models: [k, n, vocabulary] probabilities, [n] targets, [k, n] scores."""
    c = small_config(loop_count=1, mtp_weight=0.0)
    tokens, y = random_tokens(c, 4, c.seq_len), random_tokens(c, 4 * c.seq_len, seed=1)
    p, logp = [], []
    with torch.no_grad():
        for seed in range(3):
            model = random_model(c, seed)
            hidden = model(tokens).flatten(0, 1)
            p.append(torch.softmax(model.logits(hidden), 1).numpy())
            logp.append(t.target_logprobs(hidden, model.head.weight, y, c.softcap, c.vocab_size))
    return np.stack(p), y.numpy(), torch.stack(logp).numpy()


@pytest.mark.parametrize("weights", [None, (0.2, 0.5, 0.3), (0.0, 1.0, 0.0)])
def test_mixture_against_full_distributions(members, weights):
    p, y, logp = members
    full = np.zeros_like(p[0])
    for share, one in zip(weights or (1 / 3,) * 3, p):
        full += share * one
    assert np.allclose(full.sum(1), 1)
    assert relative_error(t.mixture_logp(logp, weights), np.log(full[np.arange(len(y)), y])) < 1e-12


def test_mixture_of_very_small_probabilities():
    assert np.allclose(t.mixture_logp([[-2000.0, -1.0], [-2001.0, -5000.0]]),
                       [-2000 + np.log((1 + np.exp(-1)) / 2), -1 - np.log(2)])


@pytest.mark.parametrize("advantage", [0.0, 0.3, 3.0])
def test_fit_mixture_of_two_against_a_grid(advantage):
    logp = -np.random.default_rng(0).exponential(2, size=(2, 500))
    logp[0] += advantage            # 3: the second has nothing to add, its weight is 0
    loss = lambda w: -np.mean(np.log(w * np.exp(logp[0]) + (1 - w) * np.exp(logp[1])))
    grid = np.linspace(0, 1, 10_001)
    best = min(grid, key=loss)
    weights = t.fit_mixture(logp)
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
    assert loss(weights[0]) <= loss(best) + 1e-5
    assert abs(weights[0] - best) < 0.01


def test_fit_mixture_of_four_is_optimal():
    """KKT: no member's gradient exceeds 1, and those that have weight reach it."""
    random = np.random.default_rng(1)
    logp = -random.exponential(2, size=(4, 600)) + np.array([[0.2], [0.0], [-0.1], [-2.0]])
    weights, p = t.fit_mixture(logp), np.exp(logp)
    gradient = np.array([np.mean(one / (weights @ p)) for one in p])
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
    assert gradient.max() < 1 + 2e-5
    assert np.abs(gradient - 1)[weights > 0.01].max() < 1e-3
    assert weights[3] < 1e-3 and gradient[3] < 1                # the useless one is left out
    assert np.allclose(t.fit_mixture(logp - 700), weights)      # it is the ratios that count


PARTS = {"selection": slice(0, 20), "val": slice(20, 40), "holdout": slice(40, 48)}


def by_split(logp):
    return {split: logp[part] for split, part in PARTS.items()}


@pytest.mark.parametrize("changes, kept", [
    (dict(num_models=3), [0, 1, 2]), (dict(num_models=3, include_first=False), [1, 2]),
    # two chains, each without its first member
    (dict(num_models=2, num_chains=2, include_first=False), [1, 3])], ids=str)
@pytest.mark.parametrize("with_ngram", [False, True])
def test_ensemble_curve_against_full_distributions(members, changes, kept, with_ngram):
    p, y, logp = members
    index = np.arange(len(y))
    p = np.concatenate((p, p[:1] / 2 + p[1:2] / 2))[:, index, y]
    other = np.random.default_rng(0).uniform(0.001, 0.1, len(y))        # the count-based member's
    c = small_config(mixture_size=0, **changes)
    curve = t.ensemble_curve([by_split(np.log(one)) for one in p[:max(kept) + 1]], c,
                             by_split(np.log(other)) if with_ngram else None)
    assert [point["n"] for point in curve] == list(range(1, len(kept) + 1))
    assert [point["member"] for point in curve] == [i + 1 for i in kept]
    for point in curve:
        some = p[kept[:point["n"]]]
        for split, part in PARTS.items():
            loss = -np.log(some[:, part].mean(0)).mean()
            assert point[f"{split}_loss"] == pytest.approx(loss, rel=1e-12)
        assert ("val_loss_ngram" in point) == with_ngram
        for name, mixed in (("learned", some), ("ngram", np.concatenate((some, other[None])))):
            if name == "ngram" and not with_ngram:
                continue
            weights = t.fit_mixture(np.log(mixed[:, :20]))      # of selection, used on the rest
            assert point[f"weights_{name}"] == pytest.approx(weights, abs=1e-4)
            for split in ("val", "holdout"):
                loss = -np.log(weights @ mixed[:, PARTS[split]]).mean()
                assert point[f"{split}_loss_{name}"] == pytest.approx(loss, rel=1e-9)


def test_learned_mixture_keeps_the_heaviest(members):
    _, y, logp = members
    scores = [by_split(one) for one in logp]
    weights = t.fit_mixture(logp[:, :20])
    for size in (1, 2, 3, 4, 0):
        cut = weights.copy()
        for i in sorted(range(3), key=lambda i: weights[i])[:max(0, 3 - (size or 3))]:
            cut[i] = 0
        cut /= cut.sum()
        val, holdout, shown = t.learned_mixture(scores, size)
        assert shown == pytest.approx(cut, abs=1e-4) and len(shown) == 3
        for split, loss in (("val", val), ("holdout", holdout)):
            expected = -np.log(cut @ np.exp(logp[:, PARTS[split]].astype(np.float64))).mean()
            assert loss == pytest.approx(expected, rel=1e-9)


def test_ensemble_without_selection_learns_nothing(members):
    scores = [{"val": one[20:40], "holdout": one[40:]} for one in members[2]]
    point = t.ensemble_curve(scores, small_config(num_models=3))[-1]
    assert set(point) == {"n", "member", "val_loss", "holdout_loss"}


PUBLIC = [[2e8, 3.703], [4e8, 3.370], [6e8, 3.200], [8e8, 3.123], [1e9, 3.046], [2e9, 2.892]]


@pytest.mark.parametrize("loss, multiple", [
    (3.307, 4.74), (3.295, 4.88), (3.195, 6.13), (3.183, 6.44), (3.139, 7.58), (2.987, 13.83),
    (3.370, 4.0), (3.703, 2.0), (2.892, 20.0)])
def test_data_efficiency_of_the_public_results(loss, multiple):
    tokens, sign = t.report.equivalent_tokens(loss, PUBLIC)
    assert tokens / 1e8 == pytest.approx(multiple, abs=0.0051) and sign == ""
    assert t.report.data_efficiency(loss, {"one_epoch": PUBLIC}, 1e8) == {
        "one_epoch": multiple, "tuned": "n/a", "curve": {"one_epoch": PUBLIC}}


def test_equivalent_tokens_by_hand():
    assert t.report.equivalent_tokens(3.307, PUBLIC)[0] == pytest.approx(4e8 + 2e8 * 0.063 / 0.170)
    assert t.report.equivalent_tokens(2.0, PUBLIC) == (2e9, ">")
    assert t.report.equivalent_tokens(9.0, PUBLIC) == (2e8, "<")
    shuffled = [PUBLIC[i] for i in (3, 0, 5, 1, 4, 2)]
    worse = [[5e8, 3.5], [9e8, 3.2]]        # tokens that do not help are no points of the curve
    assert t.report.equivalent_tokens(3.1, shuffled + worse) == t.report.equivalent_tokens(
        3.1, PUBLIC)


def test_data_efficiency_beyond_the_curve_is_not_extrapolated():
    baseline = {"one_epoch": PUBLIC, "tuned": [[1e8, 3.3], [2e8, 3.0]]}
    result = t.report.data_efficiency(2.8, baseline, 1e8)
    assert (result["one_epoch"], result["tuned"]) == ("> 20.0", "> 2.0")
    result = t.report.data_efficiency(3.75, baseline, 1e8)
    assert (result["one_epoch"], result["tuned"]) == ("< 2.0", "< 1.0")
    assert t.report.data_efficiency(3.15, baseline, 1e8)["tuned"] == 1.5
    assert t.report.data_efficiency(3.0, None, 1e8) == {
        "one_epoch": "n/a", "tuned": "n/a", "curve": None}


# ==== Data: rows ================================================================================
BOS = 60_000


def make_documents(lengths):
    """Documents in which every token is distinct, so that each tells where it came from."""
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end, dtype=np.uint16) for n, end in zip(lengths, ends)]


def random_sizes(count):
    random = np.random.default_rng(0)
    return [(tuple(random.integers(1, 30, random.integers(1, 9)).tolist()) + (3,),
             int(random.integers(1, 40)), int(random.integers(1, 9)), int(random.integers(1, 5)))
            for _ in range(count)]


SIZES = [   # lengths of the documents, seq_len, batch_rows, epochs
    ((5, 9, 3), 4, 3, 3), ((7, 1, 1, 20), 8, 2, 2), ((16, 1), 16, 4, 3), ((3, 30, 4, 6), 5, 7, 3),
    ((2,), 8, 2, 3), ((5, 4), 8, 4, 1), ((4, 4, 1), 4, 1, 2), *random_sizes(20)]


@pytest.mark.parametrize("lengths, seq_len, batch, epochs", SIZES)
def test_rows_visit_every_token_once_an_epoch(lengths, seq_len, batch, epochs):
    documents, total = make_documents(lengths), sum(lengths)
    rows = t.Rows(documents, seq_len, batch, epochs, seed=1, bos=BOS)
    steps = [rows.step(s) for s in range(rows.num_steps)]
    used = []                               # of each step, the rows that predict something
    for x, y in steps:
        assert x.shape == y.shape == (batch, seq_len)
        assert x.dtype == y.dtype == torch.int64
        counted = y >= 0
        lengths_used = counted.sum(1)
        # what is predicted comes first in a row; behind it BOS is read and nothing predicted
        assert torch.equal(counted, torch.arange(seq_len) < lengths_used[:, None])
        assert (x[~counted] == BOS).all() and (y[~counted] == -1).all()
        assert torch.equal(x[:, 1:][counted[:, 1:]], y[:, :-1][counted[:, 1:]])
        used.append(int((lengths_used > 0).sum()))
        assert (lengths_used[:used[-1]] > 0).all()
    a_pass = -(-(total - 1) // seq_len)     # rows of an epoch; the last step only may be smaller
    assert used[:-1] == [batch] * (len(used) - 1) and sum(used) == epochs * a_pass
    assert 0 < used[-1] <= batch
    x, y = (torch.cat([part[y >= 0] for part, y in zip(parts, [s[1] for s in steps])]).tolist()
            for parts in zip(*steps))
    assert len(y) == epochs * (total - 1)
    for epoch in range(epochs):             # each epoch is complete before the next begins
        part = slice(epoch * (total - 1), (epoch + 1) * (total - 1))
        following = dict(zip(x[part], y[part]))
        first = set(range(total)) - set(y[part])
        assert len(set(x[part])) == len(set(y[part])) == total - 1 and len(first) == 1
        stream = [first.pop()]
        while stream[-1] in following:
            stream.append(following[stream[-1]])
        assert sorted(stream) == list(range(total))
        for document in documents:          # documents stay whole
            at = stream.index(document[0])
            assert stream[at:at + len(document)] == document.tolist()


def test_rows_depend_on_seed_and_step_only():
    documents = make_documents([7] * 30)
    make = lambda seed=1, batch=4: t.Rows(documents, 8, batch, 3, seed, BOS)
    rows, steps = make(), list(range(make().num_steps))
    expected = [rows.step(s) for s in steps]
    for order in (steps[::-1], steps[1::2] + steps[::2]):
        other = make()
        for s in order:
            assert all(map(torch.equal, other.step(s), expected[s]))
    for batch in (1, 3, 8):                 # the sequence of rows is the same for any batch
        other = make(batch=batch)
        x = torch.cat([other.step(s)[0] for s in range(other.num_steps)])[:rows.total_rows]
        assert torch.equal(x, torch.cat([x for x, _ in expected])[:rows.total_rows])
    assert not torch.equal(make(seed=2).step(0)[0], expected[0][0])


def test_every_epoch_shuffles_documents():
    documents = make_documents([8] * 40)
    rows = t.Rows(documents, 8, 1, 2, seed=1, bos=BOS)
    half, meetings = rows.num_steps // 2, []
    for epoch in (0, 1):
        steps = [rows.step(epoch * half + s) for s in range(half)]
        pairs = [pair for x, y in steps for pair in zip(x[y >= 0].tolist(), y[y >= 0].tolist())]
        meetings.append({(a, b) for a, b in pairs if b != a + 1})   # where two documents meet
    assert min(map(len, meetings)) > 30 and len(meetings[0] & meetings[1]) < 10


def test_every_epoch_shuffles_rows():
    """Seen with one document, whose rows are the same in every epoch."""
    rows = t.Rows(make_documents([401]), 8, 1, 2, seed=1, bos=BOS)
    first = [int(rows.step(s)[0][0, 0]) for s in range(rows.num_steps)]
    one, two = first[:50], first[50:]
    assert sorted(one) == sorted(two) == list(range(0, 400, 8))
    for a, b in ((one, two), (one, sorted(one)), (two, sorted(two))):
        assert sum(map(int.__eq__, a, b)) < 10


def test_epoch_of_counts_rows():
    rows = t.Rows(make_documents([33]), 8, 3, 3, seed=1, bos=BOS)       # 4 rows an epoch
    assert (rows.rows_per_epoch, rows.total_rows, rows.num_steps) == (4, 12, 4)
    assert [rows.epoch_of(s) for s in range(5)] == [0, 0.75, 1.5, 2.25, 3]


# ==== Model =====================================================================================
@pytest.mark.parametrize("scale", [0.5, 0.8], ids=["plain", "YaRN"])
@pytest.mark.parametrize("window", [1, 2, 5, 15, 16, 40])
def test_attend_against_a_slow_loop(window, scale):
    B, T, H, d = 2, 16, 3, 4
    q, k, v = (randn(B, T, H, d, seed=i, dtype=torch.float64) for i in range(3))
    expected = np.zeros((B, T, H, d))
    for b, i, h in np.ndindex(B, T, H):
        seen = range(max(0, i - window + 1), i + 1)     # `window` keys, its own included
        weights = np.array([np.exp(float(q[b, i, h] @ k[b, j, h]) * scale) for j in seen])
        expected[b, i, h] = sum(w * v[b, j, h].numpy()
                                for w, j in zip(weights / weights.sum(), seen))
    mask = t.make_mask(window, T, CPU, "sdpa")
    ours = t.attend(q, k, v, t.AttentionSpec(window, mask, None, None, scale, "sdpa"))
    assert relative_error(ours, expected) < 1e-12


def test_scale_of_attention():
    """1 / sqrt(width of a head) in every layer, without YaRN."""
    model = t.GPT(small_config()).prepare(12)
    assert set(model.specs) == {6, 12}
    for window, sight in model.specs.items():
        assert sight.window == window and sight.scale == pytest.approx(12 ** -0.5, rel=1e-12)


def test_windows_by_layer():
    limited = t.windows(t.make_config("limited"))
    assert limited == tuple(2048 if i % 4 == 3 or i == 29 else 1024 for i in range(30))
    assert t.windows(small_config(num_layers=6)) == (6, 6, 6, 12, 6, 12)
    assert t.windows(small_config(window_pattern="S")) == (6, 6, 6, 12)     # the last sees all
    assert t.windows(small_config(window_pattern="LS")) == (12, 6, 12, 12)
    assert t.windows(small_config(window_pattern="")) == (12,) * 4
    assert t.windows(small_config(num_layers=5), 0.25, 0.75) == (3, 3, 3, 9, 9)
    assert t.windows(small_config(window_pattern="S"), 0.01, 0.5) == (1, 1, 1, 6)   # itself


@pytest.mark.parametrize("start, end, count, order", [
    (0, 0, 1, "012345"), (2, 3, 2, "01232345"), (2, 3, 3, "0123232345"), (0, 1, 2, "01012345"),
    (4, 5, 3, "0123454545"), (0, 5, 2, "012345012345"), (3, 3, 4, "012333345")])
def test_layer_order(start, end, count, order):
    c = small_config(num_layers=6, loop_start=start, loop_end=end, loop_count=count)
    assert "".join(map(str, t.layer_order(c, count))) == order
    assert t.layer_order(c, 1) == list(range(6))


def test_layer_order_of_limited():
    c, loop = t.make_config("limited"), list(range(15, 21))
    order = t.layer_order(c, t.stages(c)[-1].loops)
    assert order == [*range(15), *loop, *loop, *loop, *range(21, 30)] and len(order) == 42


def rms(x):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Reference:
    """The transformer in NumPy, one row at a time, from the formulas; weights: a state_dict."""

    def __init__(self, c, weights):
        self.c, self.w = c, {name: p.double().numpy() for name, p in weights.items()}

    def linear(self, name, x):
        return x @ self.w[name + ".weight"].T

    def turn(self, z):
        """Channel i and its partner, half a head away, are a complex number that rotates."""
        T, half = len(z), z.shape[1] // 2
        frequency = np.array([self.c.rope_base ** (-i / half) for i in range(half)])
        turned = (z[:, :half] + 1j * z[:, half:]) * np.exp(1j * np.outer(np.arange(T), frequency))
        return np.concatenate((turned.real, turned.imag), axis=1)

    def attention(self, block, x, value, window):
        c, (T, dim) = self.c, x.shape
        d, heads = dim // c.num_heads, []
        q, k, v = (self.linear(f"{block}.attn.{name}", x) for name in "qkv")
        if c.iha:       # each head's projection is a mixture of all heads'
            mix = self.w[f"{block}.attn.mix"]
            q, k, v = (np.einsum("gh,thd->tgd", m, z.reshape(T, -1, d)).reshape(T, dim)
                       for m, z in zip(mix, (q, k, v)))
        for h in range(c.num_heads):
            part = slice(h * d, (h + 1) * d)
            qh, kh, vh = q[:, part], k[:, part], v[:, part]
            if value is not None:
                gate = 2 * sigmoid(x[:, :32] @ self.w[f"{block}.attn.value_gate.weight"][h])
                vh = vh + gate[:, None] * value[:, part]
            if c.rope_base:
                qh, kh = self.turn(qh), self.turn(kh)
            if c.qk_norm:
                qh, kh = rms(qh), rms(kh)
            y = np.zeros((T, d))
            for i in range(T):
                first = max(0, i - window + 1)
                score = np.exp(kh[first:i + 1] @ qh[i] / np.sqrt(d))
                y[i] = score / score.sum() @ vh[first:i + 1]
            if c.attn_gate:
                y *= sigmoid(x[:, :12] @ self.w[f"{block}.attn.gate.weight"][h])[:, None]
            heads.append(y)
        return self.linear(f"{block}.attn.proj", np.concatenate(heads, axis=1))

    def block(self, block, x, value, window):
        x = x + self.attention(block, rms(x), value, window)
        z = rms(x)
        fc = self.linear(f"{block}.mlp.fc", z)
        if self.c.swiglu:
            gate = self.linear(f"{block}.mlp.gate", z)
            fc = gate * sigmoid(gate) * fc
        else:
            fc = np.maximum(fc, 0) ** 2
        return x + self.linear(f"{block}.mlp.proj", fc)

    def hidden(self, tokens, loops):
        c, w, outputs = self.c, self.w, {}
        L, encoders = c.num_layers, c.num_layers // 2
        x = x0 = rms(w["wte.weight"][tokens])
        order = list(range(L))
        if loops > 1:
            loop = list(range(c.loop_start, c.loop_end + 1))
            order = order[:c.loop_start] + loop * loops + order[c.loop_end + 1:]
        for i in order:
            if c.unet and i >= L - encoders:
                x = x + w["skip_lambdas"][i - (L - encoders)] * outputs[L - 1 - i]
            if c.resid_init:
                x = w["resid_lambdas"][i] * x
            if c.x0_init:
                x = x + w["x0_lambdas"][i] * x0
            valued = c.value_projections and i % 2 == (L - 1) % 2
            value = self.linear(f"value_projs.{i}", x0) if valued else None
            wide = i == L - 1 or not c.window_pattern or (
                c.window_pattern[i % len(c.window_pattern)] == "L")
            x = self.block(f"blocks.{i}", x, value, c.seq_len if wide else c.seq_len // 2)
            outputs[i] = x
        return rms(x)

    def mtp_hidden(self, hidden, next_tokens):
        following = rms(self.w["wte.weight"][next_tokens])
        x = np.concatenate((hidden, following), axis=1) @ self.w["mtp_proj.weight"].T
        return rms(self.block("mtp_block", x, None, self.c.seq_len))

    def logits(self, hidden):
        z = hidden @ self.w["head.weight"][:self.c.vocab_size].T
        return self.c.softcap * np.tanh(z / self.c.softcap) if self.c.softcap else z


# the field at its off value -> pattern of the parameters that then must not be there
OFF = [
    (dict(swiglu=False), r".*mlp\.gate.*"), (dict(resid_init=0.0), "resid_lambdas"),
    (dict(x0_init=0.0), "x0_lambdas"), (dict(unet=False), "skip_lambdas"),
    (dict(value_projections=False), r"value_projs.*|.*value_gate.*"),
    (dict(attn_gate=False), r".*attn\.gate.*"), (dict(qk_norm=False), None),
    (dict(rope_base=0.0), None), (dict(window_pattern=""), None), (dict(softcap=0.0), None),
    (dict(loop_count=1), None), (dict(mtp_weight=0.0), "mtp.*"), (dict(iha=False), r".*attn\.mix"),
    (dict(unet=False, resid_init=0.0, x0_init=0.0, value_projections=False, attn_gate=False,
          swiglu=False, qk_norm=False, rope_base=0.0, softcap=0.0, loop_count=1, mtp_weight=0.0,
          window_pattern="", iha=False), r".*(gate|lambdas|value|mtp|mix).*")]
ON = [dict(), dict(loop_count=1), dict(num_layers=5, loop_start=1, loop_end=3, loop_count=2),
      dict(loop_start=0, loop_end=3, loop_count=2), dict(num_heads=2, rope_base=100.0),
      dict(window_pattern="LS", softcap=3.0), dict(num_layers=1, loop_count=1)]


@pytest.mark.parametrize("changes", ON + [off for off, _ in OFF], ids=str)
def test_model_equals_slow_reference(changes):
    c = small_config(**changes)
    model, loops = random_model(c), c.loop_count        # prepared for the last stage
    slow = Reference(c, model.state_dict())
    tokens, following = random_tokens(c, 2, c.seq_len), random_tokens(c, 2, c.seq_len, seed=1)
    with torch.no_grad():
        hidden = model(tokens)
        logits = model.logits(hidden)
        ahead = model.mtp_hidden(hidden, tokens, following) if c.mtp_weight else None
    for row in range(2):        # the rotation's angles are fp32, hence no closer than that
        expected = slow.hidden(tokens[row].numpy(), loops)
        assert relative_error(hidden[row], expected) < 2e-5
        assert relative_error(logits[row], slow.logits(expected)) < 2e-5
        if c.mtp_weight:
            expected = slow.mtp_hidden(expected, following[row].numpy())
            assert relative_error(ahead[row], expected) < 2e-5


def test_rows_shorter_than_seq_len():
    """Sampling runs short rows: windows stay those of seq_len, positions begin at 0."""
    c = small_config()
    model, tokens = random_model(c), random_tokens(c, 1, 8)
    with torch.no_grad():
        ours = model.prepare(8)(tokens)[0]
    expected = Reference(c, model.state_dict()).hidden(tokens[0].numpy(), 3)
    assert relative_error(ours, expected) < 2e-5


@pytest.mark.parametrize("loops", [1, 2, 5])
def test_a_stage_says_how_often_layers_are_run(loops):
    c = small_config()
    model, tokens = random_model(c), random_tokens(c, 1, c.seq_len)
    with torch.no_grad():
        ours = model.prepare(c.seq_len, t.stages(c)[0]._replace(loops=loops))(tokens)[0]
        again = model.prepare(c.seq_len)(tokens)[0]
    slow = Reference(c, model.state_dict())
    assert relative_error(ours, slow.hidden(tokens[0].numpy(), loops)) < 2e-5
    assert relative_error(again, slow.hidden(tokens[0].numpy(), 3)) < 2e-5


def test_model_is_causal():
    c = small_config()
    model, tokens = random_model(c), random_tokens(c, 1, c.seq_len)
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % c.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.isclose(before[:, 7:], after[:, 7:]).all(dim=-1).any()


def neutral(field, model):
    """Set the parameters of the technique behind `field` to where it does nothing."""
    for name, p in model.named_parameters():
        if (field, name) == ("resid_init", "resid_lambdas"):
            p.fill_(1)
        elif (field, name) in (("x0_init", "x0_lambdas"), ("unet", "skip_lambdas")) or (
                field == "value_projections" and name.startswith("value_projs")):
            p.zero_()
        elif field == "attn_gate" and name.endswith("attn.gate.weight"):
            p.zero_()                       # lets half of each head through
        elif field == "iha" and name.endswith("attn.mix"):
            p.copy_(torch.eye(p.shape[-1]).expand_as(p))


@pytest.mark.parametrize("off, gone", OFF, ids=str)
def test_off_value_removes_the_technique_exactly(off, gone):
    c, without = small_config(), small_config(**off)
    removed = {name for name, _ in t.GPT(c).named_parameters()} - {
        name for name, _ in t.GPT(without).named_parameters()}
    assert (not removed if gone is None else
            removed and all(re.fullmatch(gone, name) for name in removed)), removed
    field, tokens = next(iter(off)), random_tokens(c, 2, c.seq_len)
    if len(off) > 1 or field in ("swiglu", "qk_norm", "rope_base", "window_pattern", "softcap"):
        return                              # nothing to neutralize: the slow reference is the test
    on = random_model(c)
    with torch.no_grad():
        neutral(field, on)
        other = t.GPT(without, dtype=torch.float64).double().prepare(c.seq_len).eval()
        other.load_state_dict({name: p for name, p in on.state_dict().items()
                               if name not in removed})
        for block in other.blocks if field == "attn_gate" else ():
            block.attn.proj.weight.mul_(0.5)
        on.prepare(c.seq_len, t.stages(without)[-1])
        assert torch.equal(on(tokens), other(tokens))               # bit for bit


def test_dropout_is_off_in_eval():
    c = small_config(dropout=0.5)
    model, tokens = random_model(c), random_tokens(c, 2, c.seq_len)
    plain = t.GPT(small_config(dropout=0.0), dtype=torch.float64).double().prepare(c.seq_len)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(tokens), plain.train()(tokens))
        torch.manual_seed(0)
        assert not torch.allclose(model.train()(tokens), model(tokens))
        assert torch.equal(model.eval()(tokens), plain(tokens))


def test_initial_weights():
    """Scales of the table of initializations; a pure function of the seed."""
    c = small_config(model_dim=96, num_heads=4, resid_init=1.1, x0_init=0.2)
    w = t.GPT(c).init_weights(1).state_dict()
    for name, p in w.items():
        if name.endswith("lambdas"):
            value = {"resid": 1.1, "x0": 0.2, "skip": 1.0}[name.split("_")[0]]
            assert torch.equal(p, torch.full_like(p, value))
        elif re.search(r"attn\.(value_)?gate", name):
            assert not p.any()
        elif name.endswith("attn.mix"):
            assert torch.equal(p, torch.eye(4).expand(3, 4, 4))
        else:
            std = {"wte.weight": 1.0, "head.weight": 0.001}.get(name, p.shape[1] ** -0.5)
            std = c.model_dim ** -0.5 if name.endswith(".proj.weight") else std
            assert p.std().item() == pytest.approx(std, rel=0.06), name
            if re.search(r"attn\.[qkv]\.|mlp\.(gate|fc)\.|value_projs", name):  # uniform
                assert p.abs().max().item() == pytest.approx((3 / c.model_dim) ** 0.5, rel=0.01)
    again, other = (t.GPT(c).init_weights(seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(w[name], again[name]) for name in w)
    assert not torch.equal(w["wte.weight"], other["wte.weight"])
    zero = t.GPT(small_config(proj_init="zero")).init_weights(1).state_dict()
    assert not any(p.any() for name, p in zero.items() if name.endswith(".proj.weight"))


# ==== Size and cost of the limited track ========================================================
@pytest.fixture(scope="module")
def limited():
    with torch.device("meta"):
        return t.GPT(t.make_config("limited"))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_of_limited(limited):
    block = 4 * 1792 ** 2 + 3 * 1792 * 4864 + 14 * 12 + 3 * 14 ** 2     # IHA mixes q, k, v
    blocks = 30 * block + 15 * 14 * 32              # every second layer has a gate for its values
    extra = 15 * 1792 ** 2 + 2 * 50304 * 1792 + (block + 2 * 1792 ** 2) + 30 + 30 + 15
    assert count(limited.blocks) == blocks == pytest.approx(1.170e9, rel=1e-3)
    assert count(limited) == blocks + extra == pytest.approx(1.444e9, rel=1e-3)


def steps_of(c):
    """Steps of a member, from the number of tokens alone (the document takes no memory)."""
    tokens = np.broadcast_to(np.uint16(0), c.train_tokens - c.selection_tokens)
    return t.Rows([tokens], c.seq_len, c.batch_rows, c.num_epochs, 0, 0).num_steps


def test_steps_of_limited():
    assert steps_of(t.make_config("limited")) == pytest.approx(2097, rel=0.01)


@pytest.mark.parametrize("changes", [dict(), dict(mtp_weight=0.0), dict(window_pattern=""),
                                     dict(num_layers=8, loop_start=2, loop_end=5)], ids=str)
def test_flops_per_token_by_hand(changes):
    """6 a matmul weight and use; 12 D a key, with the mean over a row of the keys that are seen."""
    c = t.make_config("limited", **changes)
    block = 4 * 1792 ** 2 + 3 * 1792 * 4864 + 14 * 12 + 3 * 14 ** 2
    for stage in t.stages(c):
        loop = range(c.loop_start, c.loop_end + 1)
        weights, keys = 50304 * 1792, 0
        for i in [*range(c.num_layers), *[*loop] * (stage.loops - 1)]:
            valued = i % 2 == (c.num_layers - 1) % 2
            weights += block + valued * (1792 ** 2 + 14 * 32)
            full = i % 4 == 3 or i == c.num_layers - 1 or not c.window_pattern
            keys += np.minimum(np.arange(1, 2049), 2048 if full else 1024).mean()
        if c.mtp_weight:
            weights += block + 2 * 1792 ** 2 + 50304 * 1792
            keys += np.arange(1, 2049).mean()
        flops = 6 * weights + 12 * 1792 * keys
        assert t.flops_per_token(c, stage) == pytest.approx(flops, rel=1e-9)


def test_flops_of_limited():
    c = t.make_config("limited")
    before, after = (t.flops_per_token(c, stage) for stage in t.stages(c))
    assert before == pytest.approx(9.22e9, rel=0.01) and after == pytest.approx(12.37e9, rel=0.01)


def test_flops_of_a_whole_run_of_limited():
    """1.17e19 in all: loops run in 5 of the 11 epochs, the 7th (counted from 1) to the last."""
    c = t.make_config("limited")
    first, second = t.stages(c)
    a_epoch = 48_804 * 2048
    assert (first.start, second.start) == (0, pytest.approx(6 / 11, rel=1e-12))
    total = 11 * a_epoch * (second.start * t.flops_per_token(c, first)
                            + (1 - second.start) * t.flops_per_token(c, second))
    assert total == pytest.approx(1.17e19, rel=0.01)


# ==== Optimizer =================================================================================
def numpy_polar(x):
    """Polar Express step by step, on the smaller Gram matrix."""
    x = x / (1.02 * np.linalg.norm(x) + 1e-6)
    for a, b, c in COEFFICIENTS:
        if x.shape[0] > x.shape[1]:
            gram = x.T @ x
            x = a * x + x @ (b * gram + c * gram @ gram)
        else:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class NumpyMuon:
    """Muon for one matrix, from the formulas."""

    def __init__(self, w):
        self.w, self.m, self.v = w.copy(), np.zeros_like(w), 0.0

    def step(self, g, lr, wd, momentum, beta2, row_norm, cautious):
        rows, cols = g.shape
        self.m = momentum * self.m + (1 - momentum) * g
        u = (1 - momentum) * g + momentum * self.m              # Nesterov
        if row_norm:                                            # MuonEq-R
            u = u / np.maximum(np.sqrt((u ** 2).sum(1, keepdims=True)), 1e-7)
        x = numpy_polar(u)
        if beta2:                                               # NorMuon
            v = (x ** 2).mean(1 if rows >= cols else 0, keepdims=True)
            self.v = beta2 * self.v + (1 - beta2) * v
            y = x / np.sqrt(np.maximum(self.v, 1e-10))
            x = y * np.linalg.norm(x) / np.linalg.norm(y)
        lr = lr * np.sqrt(max(1, rows / cols))
        mask = (x * self.w >= 0) if cautious else 1.0
        self.w = self.w - lr * x - lr * wd * self.w * mask


def run_muon(shape, wd, momenta, beta2, row_norm, cautious, dtype=torch.float64, steps=4):
    """Three matrices through muon_update and NumpyMuon; yields (ours, reference) a step."""
    n, (rows, cols) = 3, shape
    p, lr = randn(n, *shape, seed=1, dtype=torch.float64), 0.05
    m, v = torch.zeros_like(p), torch.zeros_like(p).mean(2 if rows >= cols else 1, keepdim=True)
    references = [NumpyMuon(one.numpy()) for one in p]
    for step in range(steps):
        scale = torch.logspace(-2, 2, n, dtype=torch.float64)[:, None, None]    # they must not mix
        g, momentum = scale * randn(n, *shape, seed=10 + step, dtype=torch.float64), momenta[step]
        t.muon_update(p, g.clone(), m, v, lr, wd, momentum, beta2, row_norm, cautious, dtype)
        for reference, one in zip(references, g.numpy()):
            reference.step(one, lr, wd, momentum, beta2, row_norm, cautious)
        yield p.numpy(), np.stack([reference.w for reference in references])


MOMENTA = (0.85, 0.9, 0.95, 0.95)


@pytest.mark.parametrize("beta2, row_norm, cautious", [
    (0.95, True, True), (0.0, True, True), (0.95, False, True), (0.95, True, False),
    (0.0, False, False)])
@pytest.mark.parametrize("shape, wd", [
    ((8, 8), 1.3), ((6, 15), 1.3), ((15, 6), 0.0), ((15, 6), 1.3), ((1, 12), 1.3), ((12, 1), 1.3)],
    ids=str)
def test_muon_update_against_numpy(shape, wd, beta2, row_norm, cautious):
    for ours, reference in run_muon(shape, wd, MOMENTA, beta2, row_norm, cautious):
        assert relative_error(ours, reference) < 1e-10


def test_cautious_decay_of_a_tall_matrix_keeps_its_mask():
    """What decay takes off is a positive multiple of w, and only where x w >= 0."""
    p, g = randn(1, 15, 6, seed=1), randn(1, 15, 6, seed=2)
    moved = {}
    for wd, cautious in ((0.0, True), (1.3, True), (1.3, False)):
        q, m, v = p.clone(), torch.zeros_like(p), torch.zeros(1, 15, 1)
        t.muon_update(q, g.clone(), m, v, 0.01, wd, 0.95, 0.95, True, cautious, torch.float32)
        moved[wd, cautious] = p - q
    x = moved[0.0, True]
    for cautious in (True, False):
        ratio = (moved[1.3, cautious] - x) / p
        mask = (x * p >= 0) if cautious else torch.ones_like(p, dtype=torch.bool)
        assert (ratio[mask] > 0.01).all() and (ratio[~mask].abs() < 1e-3).all()
        assert ratio[mask].std() < 1e-3


def test_muon_update_in_bfloat16_is_close():
    """The orthogonalization alone is in bf16: a step differs by a small part of itself."""
    start = randn(3, 16, 16, seed=1, dtype=torch.float64).numpy()
    ours, exact = next(run_muon((16, 16), 0.0, MOMENTA, 0.95, True, True, torch.bfloat16))
    assert 0 < np.linalg.norm(ours - exact) / np.linalg.norm(exact - start) < 0.15


def test_muon_update_without_gradient_stands_still():
    p = randn(2, 6, 4)
    m, v, before = torch.zeros_like(p), torch.zeros(2, 6, 1), p.clone()
    t.muon_update(p, torch.zeros_like(p), m, v, 0.1, 0.0, 0.95, 0.95, True, True, torch.float32)
    assert torch.equal(p, before)


@pytest.mark.parametrize("wd, beta1, beta2", [
    (1.3, 0.8, 0.95), (0.0, 0.96, 0.95), (0.1, 0.9, 0.99)])
def test_adamw_update_against_numpy(wd, beta1, beta2):
    p, lr = randn(7, 5, dtype=torch.float64), 0.04
    w, m, v = p.numpy().copy(), 0.0, 0.0
    state = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(1, 6):
        g = randn(7, 5, seed=step, dtype=torch.float64) * (step != 3)       # one without gradient
        t.adamw_update(p, g.clone(), *state, step, lr, wd, beta1, beta2)
        g = g.numpy()
        w = w * (1 - lr * wd)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g ** 2
        w = w - lr * (m / (1 - beta1 ** step)) / (np.sqrt(v / (1 - beta2 ** step)) + 1e-10)
        assert relative_error(p, w) < 1e-12


def settings_of(name, c):
    """lr, weight decay, betas (None: Muon) of a parameter."""
    return {"wte.weight": (c.embed_lr, c.weight_decay, (0.8, 0.95)),
            "head.weight": (c.head_lr, c.weight_decay, (0.8, 0.95)),
            "x0_lambdas": (c.x0_lr, 0.0, (0.96, 0.95)),
            "resid_lambdas": (c.scalar_lr, 0.0, (0.8, 0.95)),
            "skip_lambdas": (c.scalar_lr, 0.0, (0.8, 0.95)),
            "mix": (c.iha_lr, 0.0, (0.8, 0.95))}.get(
                name.removeprefix(name.rpartition("attn.")[0] + "attn."),
                (c.matrix_lr, c.weight_decay, None))


@pytest.mark.parametrize("compiled", [False, True])
def test_optimizer_equals_the_updates_by_hand(compiled):
    """Two steps of a small GPT, matrix by matrix: stacking does not mix them; one graph for all."""
    c, graphs = small_config(model_dim=36, num_heads=3), torch._dynamo.utils.counters["frames"]
    before = graphs["total"]
    model = randomize(t.GPT(c))
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    state = {}
    optimizer = t.MuonAdamW(model.named_parameters(), c, compiled=torch.compile(
        t.adamw_update, dynamic=False) if compiled else None)
    schedule = [(0.7, 1.5, 0.9), (0.4, 0.5, None)]
    for step, (lr_factor, wd_factor, momentum) in enumerate(schedule, 1):
        for i, (name, p) in enumerate(model.named_parameters()):
            p.grad = (i + 1) * randn(*p.shape, seed=100 * step + i)
            lr, wd, betas = settings_of(name, c)
            lr, wd, g = lr * lr_factor, wd * wd_factor, p.grad.double()
            if betas:
                m, v = state.setdefault(name, (torch.zeros_like(g), torch.zeros_like(g)))
                t.adamw_update(w[name], g, m, v, step, lr, wd, *betas)
            else:
                axis = 2 if p.shape[0] >= p.shape[1] else 1
                m, v = state.setdefault(name, (torch.zeros_like(g[None]), torch.zeros_like(
                    g[None]).mean(axis, keepdim=True)))
                t.muon_update(w[name][None], g[None], m, v, lr, wd, momentum or c.momentum,
                              c.normuon_beta2, c.muon_eq, c.cautious, torch.float64)
        optimizer.step(lr_factor, wd_factor, momentum)
        for name, p in model.named_parameters():
            assert p.grad is None
            assert relative_error(p, w[name]) < 1e-5, name
    assert graphs["total"] - before == compiled     # embedding and head, of one shape


def test_rates_of_limited():
    """The public 1-hour track's settings, by parameter."""
    expected = {"wte.weight": (0.0375, 1.3), "head.weight": (0.0005, 1.3), "x0_lambdas": (0.025, 0),
                "resid_lambdas": (0.00025, 0), "skip_lambdas": (0.00025, 0), "mix": (0.02, 0)}
    c = t.make_config("limited")
    for name, p in t.GPT(small_config()).named_parameters():
        rows = [row for row in t.parameter_table(c) if re.fullmatch(row[0], name)]
        assert len(rows) == 1, name
        _, kind, lr, wd, _ = rows[0]
        name = "mix" if name.endswith("attn.mix") else name
        assert (lr, wd) == expected.get(name, (0.01, 1.3))
        assert (kind == "muon") == (name not in expected)
        assert kind == "adamw" or p.ndim == 2


def test_every_parameter_is_in_one_group(monkeypatch):
    c = small_config()
    model = t.GPT(c)
    grouped = [p for group in t.MuonAdamW(model.named_parameters(), c).groups
               for p in group.params]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    stranger = [*model.named_parameters(), ("stranger", torch.nn.Parameter(torch.zeros(3)))]
    with pytest.raises(ValueError, match="stranger"):
        t.MuonAdamW(stranger, c)
    table = t.parameter_table(c)
    for changed in (table[1:], (*table, table[1])):     # Muon's row is gone; wte is there twice
        monkeypatch.setattr(t, "parameter_table", lambda _, changed=changed: changed)
        with pytest.raises(ValueError, match="blocks|wte"):
            t.MuonAdamW(model.named_parameters(), c)


def test_optimizer_starts_afresh_for_each_model():
    """Two optimizers of equal models do the same: no state is shared."""
    c = small_config()
    first, results = randomize(t.GPT(c)), []
    for _ in range(2):
        model = copy.deepcopy(first)
        optimizer = t.MuonAdamW(model.named_parameters(), c)
        for i, p in enumerate(model.parameters()):
            p.grad = randn(*p.shape, seed=i)
        optimizer.step()
        results.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in results)))


# ==== Schedules =================================================================================
@pytest.mark.parametrize("settings, points", [
    # limited: flat, then the square root of what is left of the last fifth
    (dict(), [(0, 1), (0.5, 1), (0.8, 1), (0.85, 0.75 ** 0.5), (0.95, 0.5), (0.998, 0.1), (1, 0)]),
    # tiny: the last 40 % linear
    (dict(lr_warmdown=0.4, lr_power=1.0), [(0.6, 1), (0.7, 0.75), (0.8, 0.5), (0.9, 0.25), (1, 0)]),
    (dict(lr_floor=0.1), [(0.8, 1), (0.95, 0.55), (1, 0.1)]),
    (dict(lr_warmup=0.1), [(0, 0), (0.05, 0.5), (0.1, 1), (0.5, 1), (0.95, 0.5)]),
    (dict(lr_warmdown=0.0), [(0, 1), (0.5, 1), (1, 1)]),
    (dict(lr_warmdown=1.0, lr_power=1.0), [(0, 1), (0.25, 0.75), (1, 0)])], ids=str)
def test_lr_multiplier_by_hand(settings, points):
    c = t.make_config("limited", sawtooth_epochs=0, **settings)
    for progress, multiplier in points:
        assert t.base_multiplier(c, progress) == pytest.approx(multiplier, abs=1e-9)
        assert t.lr_multiplier(c, progress) == pytest.approx(multiplier, abs=1e-9)


def test_sawtooth_by_hand():
    """Each of the last epochs begins at the base and ends near 0.05, on a cosine."""
    c = t.make_config("limited")                # 3 teeth at the end of 11 epochs
    assert (c.sawtooth_epochs, c.num_epochs) == (3, 11)
    for epoch in (0, 3.3, 7.999):
        assert t.lr_multiplier(c, epoch / 11) == t.base_multiplier(c, epoch / 11) == 1
    for epoch in (8, 9, 10):
        at = lambda part: t.lr_multiplier(c, (epoch + part) / 11)
        base = lambda part: min(1, (1 - (epoch + part) / 11) / 0.2) ** 0.5
        assert at(1e-9) == pytest.approx(base(0), abs=1e-6)
        assert at(0.5) == pytest.approx((base(0.5) + 0.05) / 2, abs=1e-6)
        assert at(1 - 1e-6) == pytest.approx(0.05, abs=1e-6)
    low = t.make_config("limited", lr_warmdown=1.0, lr_power=1.0)
    assert all(t.lr_multiplier(low, (10 + part) / 11) >= 0.05 for part in (0.5, 0.9, 0.99))


def test_piecewise_linear_by_hand():
    tiny = "0:0.8,0.2:0.8,0.5:0.1,1:0.93"
    for progress, value in ((0, 0.8), (0.1, 0.8), (0.3, 0.8 - 0.7 / 3), (0.5, 0.1), (0.75, 0.515),
                            (1, 0.93)):
        assert t.piecewise_linear(tiny, progress) == pytest.approx(value)
    assert t.piecewise_linear("0.2:2,0.4:4", 0.1) == 2 and t.piecewise_linear("0.2:2,0.4:4", 1) == 4
    assert t.piecewise_linear("1:3,0:1", 0.5) == pytest.approx(2)       # in any order
    jump = "0:1,0.5:2,0.5:0.5,1:1"              # two points at one place, in the order given
    for progress, value in ((0.25, 1.5), (0.4999, 1.9998), (0.5, 0.5), (0.75, 0.75)):
        assert t.piecewise_linear(jump, progress) == pytest.approx(value)
    assert t.piecewise_linear(t.Config.wd_schedule, 0.3) == 1
    for broken in ("", "1", "0:1,0.5", "0:one", "0:-1", "0:nan", "0:1,,1:2", "0:1:2",
                   "0:1,0.5:1:3"):
        with pytest.raises(UserError, match="schedule.*0:1,0.5:0.1,1:0.9"):
            t.piecewise_linear(broken, 0.5)


def test_momentum_by_hand():
    c = t.make_config("limited")
    for step, value in ((0, 0.85), (150, 0.9), (300, 0.95), (5000, 0.95)):
        assert t.momentum_at(c, step) == pytest.approx(value)
    assert t.momentum_at(t.make_config("limited", momentum_steps=0), 0) == 0.95


def test_stages_by_hand():
    windows = (6, 6, 6, 12)
    looped = small_config(loop_count=3, loop_from_epoch=1)      # of 2 epochs
    assert [tuple(stage) for stage in t.stages(looped)] == [
        (0, 1, 1, windows, ()), (0.5, 3, 1, windows, ())]
    assert [tuple(stage) for stage in t.stages(small_config(loop_count=1))] == [
        (0, 1, 1, windows, ())]
    assert [tuple(stage) for stage in t.stages(small_config(
        loop_count=3, loop_from_epoch=0))] == [(0, 3, 1, windows, ())]
    assert all(track in t.TRACKS for track in ("limited", "mini", "cpu"))


def test_stages_of_everything_at_once():
    """Loops from halfway, two passes from 0.7, windows that grow at 0.25 and at halfway."""
    c = small_config(loop_count=3, loop_from_epoch=1, recurrence_from=0.7,
                     window_schedule="0:0.25:0.5,0.25:0.25:0.75,0.5:0.5:1")
    assert [tuple(stage) for stage in t.stages(c)] == [
        (0, 1, 1, (3, 3, 3, 6), ()), (0.25, 1, 1, (3, 3, 3, 9), ((6, 9),)),
        (0.5, 3, 1, (6, 6, 6, 12), ((6, 9), (9, 12))),
        (0.7, 3, 2, (6, 6, 6, 12), ((6, 9), (9, 12)))]
