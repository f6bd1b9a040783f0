"""The loss over chunks of tokens against naive autograd in float64.

    python -m pytest tests/test_loss.py
"""
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import needs_compiler, randn, relative_error, rng, small_config
from train_gpt import (KnownGradient, LossSpec, add_sums, chunked_loss, loss_chunk,
                       target_logprobs, token_logits)

N, D, VOCAB, PADDED = 37, 16, 50, 64
ROW = 12        # tokens of a row that is remembered
DISTILLATION = [(0.0, 1.0), (0.5, 1.0), (0.7, 2.0), (1.0, 0.5)]     # alpha, temperature
TARGET_WEIGHTS = [(1.0,), (1.0, 0.5, 0.25)]     # of the next token and of those after it


def loss_inputs(alpha, n=N, targets=1, dtype=torch.float64):
    """hidden, weight, targets [n, J], the teacher's (hidden, weight) or None.

    In some rows the later targets are missing, all of them or the last; in others all are.
    """
    hidden = 2 * randn(n, D, seed=1, dtype=dtype)
    weight = randn(PADDED, D, seed=2, dtype=dtype)
    y = torch.randint(0, VOCAB, (n, targets), generator=rng(3))
    y[1::7, 1:] = -1
    y[2::7, 2:] = -1
    y[3::7] = y[3::7, :1]                       # one token several times
    y[::5] = -1
    y[-1] = -1
    teacher = (2 * randn(n, D, seed=4, dtype=dtype), randn(PADDED, D, seed=5, dtype=dtype))
    return hidden, weight, y, teacher if alpha else None


def spec_of(target_weights=(1.0,), alpha=0.0, temperature=1.0, softcap=0.0, chunk=N, row=0):
    config = small_config(vocab_size=VOCAB, kd_temperature=temperature, softcap=softcap,
                          loss_chunk=chunk, row_memory=bool(row), seq_len=row or ROW)
    return LossSpec(torch.tensor(target_weights, dtype=torch.float64), alpha, config, row)


def naive_logits(hidden, weight, softcap):
    z = hidden @ weight[:VOCAB].T
    return softcap * torch.tanh(z / softcap) if softcap else z


def remembered(hidden, weight, y, config, row):
    """(logits, the token that each stands for) of each position, a list: of the vocabulary, and of
    the earlier positions of its row that have a target; as many as there are."""
    logits, found = naive_logits(hidden, weight, config.softcap), []
    for t in range(len(hidden)):
        earlier = [i for i in range(t - t % row, t) if y[i] >= 0]
        similar = hidden[earlier] @ hidden[t] / D ** 0.5
        tokens = torch.cat((torch.arange(VOCAB), y[earlier]))
        found.append((torch.cat((logits[t], similar)), tokens))
    return found


def naive_row_loss(hidden, weight, y, teacher, spec):
    """naive_loss of rows that are remembered. The KL is of entries, not of tokens."""
    T, config = spec.config.kd_temperature, spec.config
    entries = remembered(hidden, weight, y[:, 0], config, spec.row)
    taught = remembered(*teacher, y[:, 0], config, spec.row) if teacher is not None else None
    ces, kl = [torch.zeros((), dtype=hidden.dtype) for _ in range(y.shape[1])], 0
    for t, (logits, tokens) in enumerate(entries):
        if y[t, 0] < 0:
            continue
        logp = logits.log_softmax(0)
        for j, target in enumerate(y[t].tolist()):
            if target >= 0:
                ces[j] = ces[j] - logp[tokens == target].logsumexp(0)
        if taught is not None:
            log_q, log_p = ((x / T).log_softmax(0) for x in (taught[t][0], logits))
            kl = kl + (log_q.exp() * (log_q - log_p)).sum()
    ce = sum(share * one for share, one in zip(spec.target_weights, ces))
    loss = (1 - spec.alpha) * ce + spec.alpha * T ** 2 * kl
    return loss, {"train_loss": ces[0], "kl": torch.as_tensor(kl)}


def naive_loss(hidden, weight, y, teacher, spec):
    """(loss, {train_loss: CE of the next token, kl}), sums over the counted tokens, from whole
    logits without the padding. The loss has the cross-entropies of all targets, weighted."""
    T = spec.config.kd_temperature
    softcap = spec.config.softcap
    logits = naive_logits(hidden, weight, softcap)
    counted = y[:, 0] >= 0
    logp = logits - logits.logsumexp(1, keepdim=True)
    ces = []
    for j in range(y.shape[1]):
        there = counted & (y[:, j] >= 0)
        ces.append(-logp[there, y[there, j]].sum())
    kl = torch.zeros((), dtype=hidden.dtype)
    if teacher is not None:
        log_q = (naive_logits(*teacher, softcap) / T).log_softmax(1)
        log_p = (logits / T).log_softmax(1)
        kl = (log_q.exp() * (log_q - log_p)).sum(1)[counted].sum()
    ce = sum(share * one for share, one in zip(spec.target_weights, ces))
    loss = (1 - spec.alpha) * ce + spec.alpha * T ** 2 * kl
    return loss, {"train_loss": ces[0], "kl": kl}


def with_gradients(function, hidden, weight, *arguments, factor=3):
    """[loss, d/d hidden, d/d weight] and sums of a loss; factor: the gradient that comes in."""
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    loss, sums = function(hidden, weight, *arguments)
    (factor * loss).backward()
    sums = {name: value.detach() for name, value in sums.items()}
    return [loss, hidden.grad / factor, weight.grad / factor], sums


# ==== Against naive autograd ====================================================================
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("alpha, temperature", DISTILLATION)
@pytest.mark.parametrize("chunk", [1, 8, 37, 100])
@pytest.mark.parametrize("target_weights", [*TARGET_WEIGHTS, (1.0, 0.0), (1.0, 0.7)], ids=str)
def test_chunked_loss_equals_naive_autograd(softcap, alpha, temperature, chunk, target_weights):
    arguments = loss_inputs(alpha, targets=len(target_weights))
    spec = spec_of(target_weights, alpha, temperature, softcap, chunk)
    ours, sums = with_gradients(chunked_loss, *arguments, spec)
    expected, naive_sums = with_gradients(naive_loss, *arguments, spec)
    for one, naive in zip(ours, expected):
        assert relative_error(one, naive) < 1e-12
    assert set(sums) == {"train_loss", "kl"}
    assert float(sums["train_loss"]) == pytest.approx(float(naive_sums["train_loss"]), rel=1e-12)
    assert float(sums["kl"]) == pytest.approx(float(naive_sums["kl"]), rel=1e-12)
    _, hidden_grad, weight_grad = ours
    assert not hidden_grad[arguments[2][:, 0] < 0].any()    # nothing is predicted there
    assert not weight_grad[VOCAB:].any()                    # the padding


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("alpha, temperature", DISTILLATION)
@pytest.mark.parametrize("row, chunk", [(ROW, ROW), (ROW, 2 * ROW), (ROW, 100 * ROW), (4, ROW),
                                        (1, 5)])
@pytest.mark.parametrize("target_weights", [*TARGET_WEIGHTS, (1.0, 0.0)], ids=str)
def test_loss_of_remembered_rows_equals_naive_autograd(softcap, alpha, temperature, row, chunk,
                                                       target_weights):
    """A hidden state has a gradient where it asks and where it is remembered."""
    arguments = loss_inputs(alpha, 3 * ROW, len(target_weights))
    arguments[2][3 * ROW // 2:, 0] %= 4             # in some rows most has been there before
    spec = spec_of(target_weights, alpha, temperature, softcap, chunk, row)
    ours, sums = with_gradients(chunked_loss, *arguments, spec)
    expected, naive_sums = with_gradients(naive_row_loss, *arguments, spec)
    for one, naive in zip(ours, expected):
        assert relative_error(one, naive) < 1e-12
    for name in ("train_loss", "kl"):
        assert float(sums[name]) == pytest.approx(float(naive_sums[name]), rel=1e-12, abs=1e-12)
    without, _ = with_gradients(naive_loss, *arguments, spec)
    assert (relative_error(ours[1], without[1]) > 1e-9) == (row > 1)    # else nothing is earlier
    assert not ours[2][VOCAB:].any()


@pytest.mark.parametrize("row", [0, ROW])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_narrow_hidden_states_have_fp32_sums_and_weight_gradients(dtype, tolerance, row):
    """Logits and sums are fp32 whatever the dtype of products is; so is what adds up in chunks."""
    hidden, weight, y, teacher = loss_inputs(0.5, 3 * ROW if row else N, targets=3, dtype=dtype)
    chunk = row or 8
    spec = spec_of(TARGET_WEIGHTS[-1], 0.5, 2.0, 5.0, chunk, row)
    spec = spec._replace(target_weights=spec.target_weights.float())
    ours, sums = with_gradients(chunked_loss, hidden, weight.float(), y, teacher, spec)
    assert ours[1].dtype == dtype and ours[2].dtype == torch.float32
    assert ours[0].dtype == sums["train_loss"].dtype == sums["kl"].dtype == torch.float32
    wide = hidden.double(), weight.double(), y, tuple(x.double() for x in teacher)
    expected, _ = with_gradients(naive_row_loss if row else naive_loss, *wide, spec)
    for one, naive in zip(ours, expected):
        assert relative_error(one.double(), naive) < tolerance
    added = sum(loss_chunk(h, weight, targets, (taught, teacher[1]), spec)[2].double()
                for h, targets, taught in zip(*(x.split(chunk) for x in (hidden, y, teacher[0]))))
    assert relative_error(ours[2], added) < 1e-6


@pytest.mark.parametrize("row", [0, ROW])
def test_logits_too_large_for_exp(row):
    """Probabilities that underflow, of student and teacher, cost and teach what they do exactly."""
    hidden, weight, y, teacher = loss_inputs(0.5, 3 * ROW if row else N)
    hidden, teacher = 100 * hidden, (100 * teacher[0], teacher[1])
    if row:                     # that a token stood earlier makes it 0 or 1, too
        hidden, teacher = hidden / 20, (teacher[0] / 20, 20 * teacher[1])
        weight = 20 * weight
    spec = spec_of(alpha=0.5, chunk=row or N, row=row)
    ours, sums = with_gradients(chunked_loss, hidden, weight, y, teacher, spec)
    naive = naive_row_loss if row else naive_loss
    expected, naive_sums = with_gradients(naive, hidden, weight, y, teacher, spec)
    assert naive_sums["train_loss"] > 1000 * N
    for one, naive in zip((*ours, *sums.values()), (*expected, *naive_sums.values())):
        assert torch.isfinite(one).all() and relative_error(one, naive) < 1e-12


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_capped_logits_and_target_logprobs(softcap):
    hidden, weight, y, _ = loss_inputs(0.0)
    config = spec_of(softcap=softcap).config
    z = hidden @ weight[:VOCAB].T
    z = softcap * torch.tanh(z / softcap) if softcap else z
    logits = token_logits(hidden, weight, y[:, 0], config, 0)[0]
    assert relative_error(logits[:, :VOCAB], z) < 1e-12
    narrow = hidden.bfloat16(), weight.bfloat16()
    assert token_logits(*narrow, y[:, 0], config, 0)[0].dtype == torch.float32
    assert target_logprobs(*narrow, y[:, 0], config).dtype == torch.float32
    ours = target_logprobs(hidden, weight, y[:, 0], config)
    assert ours.shape == (N,)           # those of no target are junk
    expected = naive_logits(hidden, weight, softcap).log_softmax(1)
    counted = y[:, 0] >= 0
    assert relative_error(ours[counted], expected[counted, y[counted, 0]]) < 1e-12


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_target_logprobs_of_remembered_rows(softcap):
    """Whatever stood there, they are of a distribution over the vocabulary: they sum to one."""
    hidden, weight, y, _ = loss_inputs(0.0, 3 * ROW)
    y, spec = y[:, 0] % 7, spec_of(softcap=softcap, chunk=ROW, row=ROW)
    y[5], y[ROW] = -1, -1
    ours = target_logprobs(hidden, weight, y, spec.config)
    for t, (logits, tokens) in enumerate(remembered(hidden, weight, y, spec.config, ROW)):
        if y[t] >= 0:
            expected = logits.softmax(0)[tokens == y[t]].sum().log()
            assert float(ours[t]) == pytest.approx(float(expected), rel=1e-12)
    narrow = hidden.bfloat16(), weight.bfloat16()
    assert target_logprobs(*narrow, y, spec.config).dtype == torch.float32
    sums = torch.zeros(3 * ROW, dtype=torch.float64)
    for t in range(ROW):        # every token as the target of position t of each row
        for token in range(VOCAB):
            asked = y.clone()
            asked[t::ROW] = token
            sums[t::ROW] += target_logprobs(hidden, weight, asked, spec.config)[t::ROW].exp()
    assert torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=1e-12)


def results_of_rows(hidden, weight, y, teacher):
    """log p, d/d hidden of three rows that are remembered."""
    spec = spec_of((1.0, 0.5), 0.5, 2.0, 5.0, 3 * ROW, ROW)
    _, of_hidden, _ = loss_chunk(hidden, weight, y, teacher, spec)
    return target_logprobs(hidden, weight, y[:, 0], spec.config), of_hidden


def test_what_is_remembered_is_earlier_and_of_the_row():
    """Not a bit of what is said before a change, or in another row, changes; what follows does."""
    hidden, weight, y, teacher = loss_inputs(0.5, 3 * ROW, 2)
    hidden = hidden / 4
    y = y.clamp(min=0) % 7              # every token comes again
    logp, of_hidden = results_of_rows(hidden, weight, y, teacher)
    at, end = ROW + 4, 2 * ROW
    for what in ("hidden", "target"):
        other, targets = hidden.clone(), y.clone()
        depends = torch.ones(end - at, dtype=torch.bool)
        if what == "hidden":
            other[at] += 1
        else:
            targets[at, 0] = (y[at, 0] + 1) % 7
            depends = (y[at:end, 0] == y[at, 0]) | (y[at:end, 0] == targets[at, 0])
            assert 1 < depends.sum() < end - at
        new_logp, new_of_hidden = results_of_rows(other, weight, targets, teacher)
        changed = logp != new_logp
        assert not changed[:at].any() and not changed[end:].any()
        assert torch.equal(changed[at:end], depends)
        moved = (of_hidden != new_of_hidden).any(dim=1)
        assert moved[at] and (what == "target" or moved[ROW:end].all())
        assert not moved[:ROW].any() and not moved[end:].any()


# ==== What must not matter ======================================================================
@pytest.mark.parametrize("row", [0, ROW])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("alpha, temperature", DISTILLATION)
@pytest.mark.parametrize("target_weights", TARGET_WEIGHTS, ids=str)
def test_padding_never_receives_probability(softcap, alpha, temperature, target_weights, row):
    """Not a bit changes when the padding's rows do, however large, in student and teacher."""
    n = 3 * ROW if row else N
    hidden, weight, y, teacher = loss_inputs(alpha, n, len(target_weights))
    spec = spec_of(target_weights, alpha, temperature, softcap, n, row)
    results = []
    for scale in (0.0, 1000.0):
        padding = scale * randn(PADDED - VOCAB, D, seed=6)
        weight[VOCAB:] = padding
        if teacher is not None:
            teacher[1][VOCAB:] = -padding
        sums, *gradients = loss_chunk(hidden, weight, y, teacher, spec)
        assert not gradients[1][VOCAB:].any()
        results.append([*sums.values(), *gradients,
                        target_logprobs(hidden, weight, y[:, 0], spec.config)])
    for before, after in zip(*results):
        assert torch.equal(before, after)


@pytest.mark.parametrize("target_weights", TARGET_WEIGHTS, ids=str)
def test_a_target_that_is_not_counted_changes_nothing(target_weights):
    """A token without a next one is not there, though later ones are known."""
    hidden, weight, y, teacher = loss_inputs(0.5, targets=len(target_weights))
    y[::5, 1:] = 7
    keep = y[:, 0] >= 0
    spec = spec_of(target_weights, 0.5, 2.0, 5.0)
    whole = loss_chunk(hidden, weight, y, teacher, spec)
    part = loss_chunk(hidden[keep], weight, y[keep], (teacher[0][keep], teacher[1]), spec)
    for name, value in part[0].items():
        assert float(whole[0][name]) == pytest.approx(float(value), rel=1e-12)
    assert relative_error(whole[1][keep], part[1]) < 1e-12
    assert relative_error(whole[2], part[2]) < 1e-12
    assert not whole[1][~keep].any()


@pytest.mark.parametrize("n, row", [(N, 0), (3 * ROW, ROW)])
def test_a_chunk_without_targets_is_zero(n, row):
    hidden, weight, _, teacher = loss_inputs(0.5, n)
    none = torch.full((n, 1), -1)
    spec = spec_of(alpha=0.5, chunk=n, row=row)
    sums, *gradients = loss_chunk(hidden, weight, none, teacher, spec)
    assert not any(x.any() for x in (*sums.values(), *gradients))


# ==== How it is computed ========================================================================
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
    arguments = loss_inputs(0.5, n, 3)
    spec = spec_of(TARGET_WEIGHTS[-1], 0.5, 2.0, 5.0, chunk)
    with Largest() as naive:
        with_gradients(naive_loss, *arguments, spec)
    assert naive.numel >= n * VOCAB                 # the recorder sees forward and backward
    with Largest() as ours:
        with_gradients(chunked_loss, *arguments, spec)
    assert ours.numel <= max(chunk * PADDED, n * D)


def test_known_gradient_scales_with_the_gradient_that_comes_in():
    hidden = randn(5, 3, seed=1).bfloat16().requires_grad_()
    weight = randn(4, 3, seed=2).float().requires_grad_()
    known = torch.ones(5, 3).bfloat16(), randn(4, 3, seed=3).float()
    first = KnownGradient.apply(hidden, weight, torch.tensor(7.0), *known)
    second = KnownGradient.apply(hidden, weight, torch.tensor(9.0), *known)
    assert (first.item(), second.item()) == (7.0, 9.0)
    (0.25 * first + 0.5 * second).backward()
    assert torch.equal(hidden.grad, 0.75 * known[0])
    assert relative_error(weight.grad, 0.75 * known[1]) < 1e-6


def test_add_sums_adds_by_name_and_leaves_the_parts_alone():
    first = {"a": torch.ones(2)}
    second = {"a": torch.ones(2), "b": torch.ones(1)}
    total = {}
    for parts in (first, second, second):
        add_sums(total, parts)
    assert {name: value.tolist() for name, value in total.items()} == {"a": [3, 3], "b": [2]}
    assert first["a"].tolist() == second["a"].tolist() == [1, 1]


@pytest.mark.parametrize("n, row", [(N, 0), (3 * ROW, ROW)])
def test_a_chunk_is_one_graph_whatever_the_weights_of_targets_are(n, row):
    """They are a tensor, as they change at every step; alpha is one of two numbers."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(loss_chunk, dynamic=False, backend=counter, fullgraph=True)
    for graphs, alpha in enumerate((0.0, 0.5), 1):
        arguments = loss_inputs(alpha, n, 3)
        for later in (0.5, 0.25):
            spec = spec_of((1.0, later, later), alpha, 2.0, 5.0, n, row)
            sums, *gradients = compiled(*arguments, spec)
            expected_sums, *expected = loss_chunk(*arguments, spec)
            assert sums == expected_sums
            assert all(map(torch.equal, gradients, expected))
            assert counter.frame_count == graphs


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@needs_compiler
@pytest.mark.parametrize("n, row", [(N, 0), (3 * ROW, ROW)])
def test_compiled_loss_chunk_equals_eager(n, row):
    hidden, weight, y, teacher = loss_inputs(0.5, n, 3, torch.float32)
    spec = spec_of(TARGET_WEIGHTS[-1], 0.5, 2.0, 5.0, n, row)
    spec = spec._replace(target_weights=spec.target_weights.float())
    torch._dynamo.reset()
    compiled = torch.compile(loss_chunk, dynamic=False)(hidden, weight, y, teacher, spec)
    sums, *gradients = loss_chunk(hidden, weight, y, teacher, spec)
    for ours, eager in zip((*compiled[0].values(), *compiled[1:]), (*sums.values(), *gradients)):
        assert relative_error(ours, eager) < 1e-5
