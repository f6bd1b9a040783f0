"""The numeric pieces against independent references: float64, SVD, autograd, brute force, NumPy."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as t

TINY = dict(preset="toy", num_layers=4, model_dim=64, num_heads=4, seq_len=16, dropout=0.0)


def tiny_config(**changes):
    return t.make_config("limited", **{**TINY, **changes})


def random_model(c, dtype=torch.float64):
    """A model whose every parameter is random, gates and lambdas included."""
    model = t.GPT(c, dtype=dtype).to(dtype)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=random))
    return model.prepare(c.seq_len).eval()


# ---- loss

@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("alpha, temperature", [(0.0, 1.0), (0.5, 1.0), (0.7, 2.0)])
@pytest.mark.parametrize("chunk", [7, 64])
def test_chunked_loss_equals_naive_float64_autograd(softcap, alpha, temperature, chunk):
    n, d, vocab, padded = 40, 16, 50, 64
    random = torch.Generator().manual_seed(1)
    h, th = (torch.randn(n, d, generator=random) for _ in range(2))
    w, tw = (torch.randn(padded, d, generator=random) for _ in range(2))
    y = torch.randint(0, vocab, (n,), generator=random)
    y[::5] = -1
    teacher = (th, tw) if alpha else (None, None)
    h32, w32 = h.clone().requires_grad_(), w.clone().requires_grad_()
    loss, ce, kl = t.ChunkedLoss.apply(h32, w32, y, *teacher, alpha, temperature, softcap, vocab,
                                       chunk, t.loss_chunk)
    (3 * loss).backward()

    h64, w64 = h.double().requires_grad_(), w.double().requires_grad_()
    cap = lambda z: softcap * torch.tanh(z / softcap) if softcap else z
    s = cap(h64 @ w64[:vocab].T)
    naive_ce = F.cross_entropy(s, y, ignore_index=-1, reduction="sum")
    q = torch.softmax(cap(th.double() @ tw.double()[:vocab].T) / temperature, 1)
    logp = torch.log_softmax(s / temperature, 1)
    naive_kl = (q * (q.log() - logp))[y >= 0].sum()
    naive = (1 - alpha) * naive_ce + alpha * temperature ** 2 * naive_kl
    (3 * naive).backward()
    for ours, reference in ((loss, naive), (ce, naive_ce), (h32.grad, h64.grad),
                            (w32.grad, w64.grad)):
        error = (ours.double() - reference).abs().max() / reference.abs().max()
        assert error < 1e-5
    if alpha:
        assert abs(float(kl) / float(naive_kl.detach()) - 1) < 1e-5
    assert w32.grad[vocab:].abs().max() == 0        # the padding has no probability


def test_no_tensor_of_all_logits_is_made():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return out

    h = torch.randn(512, 8, requires_grad=True)
    w = torch.randn(256, 8, requires_grad=True)
    with Largest() as largest:
        loss, _, _ = t.ChunkedLoss.apply(h, w, torch.zeros(512, dtype=torch.long), h.detach(),
                                         w.detach(), 0.5, 1.0, 10.0, 256, 32, t.loss_chunk)
        loss.backward()
    assert largest.numel <= 32 * 256


def test_target_logprobs_and_padding():
    h, w, y = torch.randn(9, 8), torch.randn(64, 8), torch.randint(0, 40, (9,))
    reference = torch.log_softmax(5 * torch.tanh(h.double() @ w.double()[:40].T / 5), 1)
    ours = t.target_logprobs(h, w, y, 5.0, 40)
    assert torch.allclose(ours.double(), reference[torch.arange(9), y], atol=1e-5)


def test_mtp_loss_does_not_cross_rows():
    """Trainer.gradients against the formula, in float64, without teacher."""
    c = tiny_config(mtp_weight=0.3, loop_count=1, batch_rows=4, device_batch_size=2)
    model = random_model(c)
    rt = t.Runtime(0, 1, torch.device("cpu"), torch.float64, "sdpa", False, [])
    trainer = t.Trainer.__new__(t.Trainer)
    trainer.c, trainer.rt, trainer.model = c, rt, model
    trainer.forward, trainer.mtp_hidden = t.GPT.forward, t.GPT.mtp_hidden
    trainer.chunk_function = t.loss_chunk
    x = torch.randint(0, c.vocab_size, (4, c.seq_len))
    y = torch.randint(0, c.vocab_size, (4, c.seq_len))
    y[3, 10:] = -1
    trainer.gradients(x, y, 1, False)
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    hidden = model(x)
    ahead = model.mtp_hidden(hidden, y.clamp(min=0))[:, :-1]
    loss = F.cross_entropy(model.logits(hidden).flatten(0, 1), y.flatten(), ignore_index=-1)
    loss = loss + 0.3 * F.cross_entropy(model.logits(ahead).flatten(0, 1), y[:, 1:].flatten(),
                                        ignore_index=-1)
    loss.backward()
    for name, p in model.named_parameters():
        assert torch.allclose(ours[name], p.grad, rtol=1e-6, atol=1e-10), name


# ---- model

def slow_attention(block, x, value, c, window):
    """One attention layer from the formulas, position by position and head by head."""
    B, T, D = x.shape
    H, d = c.num_heads, D // c.num_heads
    attn = block.attn
    q, k, v = (x @ layer.weight.T for layer in (attn.q, attn.k, attn.v))
    out = torch.zeros_like(x)
    rms = lambda z: z / (z.square().mean() + torch.finfo(z.dtype).eps).sqrt()

    def rotated(z, position):
        result = z.clone()
        for i in range(d // 2):
            angle = position * c.rope_base ** (-i / (d // 2))
            a, b = z[i], z[i + d // 2]
            result[i] = a * math.cos(angle) - b * math.sin(angle)
            result[i + d // 2] = a * math.sin(angle) + b * math.cos(angle)
        return rms(result)

    for b in range(B):
        for h in range(H):
            part = slice(h * d, (h + 1) * d)
            values = []
            for s in range(T):
                one = v[b, s, part]
                if attn.value_gate is not None:
                    gate = 2 * torch.sigmoid(attn.value_gate.weight[h] @ x[b, s, :32])
                    one = one + gate * value[b, s, part]
                values.append(one)
            keys = [rotated(k[b, s, part], s) for s in range(T)]
            for s in range(T):
                query, seen = rotated(q[b, s, part], s), range(max(0, s - window + 1), s + 1)
                p = torch.softmax(torch.stack([query @ keys[j] for j in seen]) / d ** 0.5, 0)
                y = sum(p[i] * values[j] for i, j in enumerate(seen))
                out[b, s, part] = y * torch.sigmoid(attn.gate.weight[h] @ x[b, s, :12])
    return out @ attn.proj.weight.T


def slow_forward(model, tokens, loops):
    c, L = model.config, model.config.num_layers
    rms = lambda z: z / (z.square().mean(-1, keepdim=True) + torch.finfo(z.dtype).eps).sqrt()
    x = x0 = rms(model.wte.weight[tokens])
    order = (list(range(c.loop_start)) + list(range(c.loop_start, c.loop_end + 1)) * loops
             + list(range(c.loop_end + 1, L))) if loops > 1 else list(range(L))
    encoder = {}
    for i in order:
        if i >= L - L // 2:
            x = x + model.skip_lambdas[i - (L - L // 2)] * encoder[L - 1 - i]
        x = model.resid_lambdas[i] * x + model.x0_lambdas[i] * x0
        value = x0 @ model.value_projs[str(i)].weight.T if i % 2 == (L - 1) % 2 else None
        window = c.seq_len if i == L - 1 or c.window_pattern[i % 4] == "L" else c.seq_len // 2
        block = model.blocks[i]
        x = x + slow_attention(block, rms(x), value, c, window)
        h = rms(x)
        x = x + (F.silu(h @ block.mlp.gate.weight.T) * (h @ block.mlp.fc.weight.T)
                 ) @ block.mlp.proj.weight.T
        if i < L // 2:
            encoder[i] = x
    return rms(x)


@pytest.mark.parametrize("loops, start, end, layers", [(1, 0, 0, 4), (3, 2, 2, 4), (2, 1, 3, 5)])
def test_forward_equals_slow_reference(loops, start, end, layers):
    c = tiny_config(num_layers=layers, loop_count=loops, loop_start=start, loop_end=end,
                    mtp_weight=0.0)
    model = random_model(c)
    tokens = torch.randint(0, c.vocab_size, (2, c.seq_len))
    with torch.no_grad():
        ours, slow = model(tokens, loops), slow_forward(model, tokens, loops)
        assert torch.allclose(ours, slow, atol=1e-5)     # the rotation's angles are fp32
        z = slow @ model.head.weight[:c.vocab_size].T
        assert torch.allclose(model.logits(ours), c.softcap * torch.tanh(z / c.softcap), atol=1e-3)


@pytest.mark.parametrize("window", [1, 3, 8, 16])
def test_windows_against_masked_softmax(window):
    q, k, v = (torch.randn(2, 16, 3, 8, dtype=torch.float64) for _ in range(3))
    mask = t.make_mask(window, 16, torch.device("cpu"), "sdpa")
    z = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8 ** 0.5
    i = torch.arange(16)
    allowed = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - window)
    p = torch.softmax(z.masked_fill(~allowed, -torch.inf), -1)
    assert torch.allclose(t.attend(q, k, v, window, mask, "sdpa"),
                          torch.einsum("bhqk,bkhd->bqhd", p, v))


@pytest.mark.parametrize("off", [
    dict(unet=False), dict(value_projections=False), dict(attn_gate=False), dict(x0_init=0.0),
    dict(resid_init=0.0), dict(loop_count=1), dict(window_pattern="")])
def test_off_value_gives_the_model_without_it(off):
    """Off equals on with the technique's parameters set to do nothing."""
    c = tiny_config(loop_count=2, mtp_weight=0.0)
    on, without = random_model(c), random_model(tiny_config(**{"loop_count": 2, "mtp_weight": 0.0,
                                                               **off}))
    with torch.no_grad():
        if "unet" in off:
            on.skip_lambdas.zero_()
        if "x0_init" in off:
            on.x0_lambdas.zero_()
        if "resid_init" in off:
            on.resid_lambdas.fill_(1)
        for value in on.value_projs.values() if "value_projections" in off else ():
            value.weight.zero_()
        for block in on.blocks if "attn_gate" in off else ():
            block.attn.gate.weight.zero_()
            block.attn.proj.weight.mul_(2)      # the gate of weight 0 lets half through
        if "window_pattern" in off:
            on.windows = [c.seq_len] * c.num_layers
        without.load_state_dict({name: p for name, p in on.state_dict().items()
                                 if name in without.state_dict()})
        for block in without.blocks if "attn_gate" in off else ():
            block.attn.proj.weight.div_(2)
    tokens = torch.randint(0, c.vocab_size, (2, c.seq_len))
    assert torch.allclose(on(tokens, 1 if "loop_count" in off else 2),
                          without(tokens, without.config.loop_count), atol=1e-10)


def test_sizes_and_flops_of_limited():
    c = t.make_config("limited")
    with torch.device("meta"):
        model = t.GPT(c)
    size = lambda module: sum(p.numel() for p in module.parameters())
    assert abs(size(model) / 1.444e9 - 1) < 1e-3
    assert abs(size(model.blocks) / 1.170e9 - 1) < 1e-3
    before, after = (t.flops_per_token(c, stage) for stage in t.stages(c))
    assert abs(before / 9.22e9 - 1) < 0.01 and abs(after / 12.37e9 - 1) < 0.01
    rows = -(-(c.train_tokens - c.selection_tokens - 1) // c.seq_len)
    assert abs(c.num_epochs * rows / c.batch_rows / 2097 - 1) < 0.01


# ---- optimizer

@pytest.mark.parametrize("shape", [(12, 12), (24, 8), (8, 24)])
def test_polar_express_against_svd(shape):
    x = torch.randn(3, *shape, dtype=torch.float64)
    ours = t.polar_express(x)
    for a, b in zip(x, ours):
        u, _, vt = torch.linalg.svd(a, full_matrices=False)
        inner = u.T @ b @ vt.T              # diagonal, near 1, if b has the singular vectors of a
        assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-8
        sigma = torch.linalg.svdvals(a / (1.02 * a.norm() + 1e-6))
        for first, third, fifth in t.POLAR_EXPRESS:
            sigma = first * sigma + third * sigma ** 3 + fifth * sigma ** 5
        assert torch.allclose(inner.diagonal(), sigma, atol=1e-8)
        assert ((sigma - 1).abs() < 0.2).all()      # what five steps reach


def numpy_muon(w, grads, lr, wd, mu, beta2):
    """TECHNIQUE rows 1-6 for one matrix, step by step."""
    m, v = np.zeros_like(w), 0.0
    tall = w.shape[0] >= w.shape[1]
    for g in grads:
        m = mu * m + (1 - mu) * g
        u = (1 - mu) * g + mu * m
        u = u / np.maximum(np.linalg.norm(u, axis=1, keepdims=True), 1e-7)
        x = u / (1.02 * np.linalg.norm(u) + 1e-6)
        for a, b, c in t.POLAR_EXPRESS:
            if w.shape[0] > w.shape[1]:
                s = x.T @ x
                x = a * x + x @ (b * s + c * s @ s)
            else:
                s = x @ x.T
                x = a * x + (b * s + c * s @ s) @ x
        v = beta2 * v + (1 - beta2) * np.mean(x ** 2, axis=1 if tall else 0, keepdims=True)
        y = x / np.sqrt(np.maximum(v, 1e-10))
        x = y * np.linalg.norm(x) / np.linalg.norm(y)
        step = lr * max(1, w.shape[0] / w.shape[1]) ** 0.5
        w = w - step * x - lr * wd * w * (x * w >= 0)
    return w


@pytest.mark.parametrize("shape", [(10, 10), (16, 6), (6, 16)])
def test_optimizer_step_against_numpy(shape):
    random = np.random.default_rng(0)
    w, grads = random.normal(size=(2, *shape)), random.normal(size=(3, 2, *shape))
    c = tiny_config(momentum=0.9)
    params = [(f"blocks.{i}.mlp.fc.weight", torch.nn.Parameter(torch.tensor(w[i])))
              for i in range(2)]
    optimizer = t.MuonAdamW(params, c, dtype=torch.float64)
    for g in grads:
        for (_, p), one in zip(params, g):
            p.grad = torch.tensor(one)
        optimizer.step(0.7, 1.5)
    for i, (_, p) in enumerate(params):
        expected = numpy_muon(w[i], grads[:, i], 0.7 * c.matrix_lr, 1.5 * c.weight_decay, 0.9,
                              c.normuon_beta2)
        assert np.allclose(p.detach().numpy(), expected, atol=1e-10)


def test_adamw_against_numpy():
    random = np.random.default_rng(0)
    w, grads, c = random.normal(size=(64, 8)), random.normal(size=(3, 64, 8)), tiny_config()
    p = torch.nn.Parameter(torch.tensor(w))
    optimizer, m, v = t.MuonAdamW([("wte.weight", p)], c), 0, 0
    for i, g in enumerate(grads, 1):
        p.grad = torch.tensor(g)
        optimizer.step()
        w = w * (1 - c.embed_lr * c.weight_decay)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        w = w - c.embed_lr / (1 - 0.8 ** i) * m / (np.sqrt(v / (1 - 0.95 ** i)) + 1e-10)
    assert np.allclose(p.detach().numpy(), w, atol=1e-12)


def test_every_parameter_is_in_one_group(monkeypatch):
    c = tiny_config(loop_count=1)
    model = t.GPT(c)
    grouped = [p for group in t.MuonAdamW(model.named_parameters(), c).groups
               for p in group.params]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    table = t.parameter_table(c)
    for changed in (table[1:], (*table, table[0])):
        monkeypatch.setattr(t, "parameter_table", lambda _, changed=changed: changed)
        with pytest.raises(ValueError, match="groups of parameter_table"):
            t.MuonAdamW(model.named_parameters(), c)


# ---- schedules, data, ensemble

def test_schedules():
    c = tiny_config(lr_warmup=0.1, lr_warmdown=0.2, lr_power=0.5, lr_floor=0.1, momentum_steps=10)
    assert t.lr_multiplier(c, 0.05) == 0.5 and t.lr_multiplier(c, 0.5) == 1
    assert t.lr_multiplier(c, 0.95) == pytest.approx(0.1 + 0.9 * 0.5)
    assert t.piecewise_linear("0:1,0.5:0.2,1:0.6", 0.75) == pytest.approx(0.4)
    assert t.momentum_at(c, 5) == pytest.approx(0.9) and t.momentum_at(c, 99) == 0.95


@pytest.mark.parametrize("lengths, seq_len, batch", [
    ((5, 9, 3), 4, 3), ((7, 1, 1, 20), 8, 2), ((16, 1), 16, 4), ((3, 30, 4, 6), 5, 7)])
def test_each_epoch_visits_every_token_once(lengths, seq_len, batch):
    first = np.cumsum((0, *lengths))[:-1]
    documents = [np.arange(a, a + n) for a, n in zip(first, lengths)]   # every token is distinct
    rows = t.Rows(documents, seq_len, batch, 3, seed=1, bos=0)
    x, y = (torch.cat(part) for part in zip(*(rows.step(s) for s in range(rows.num_steps))))
    assert len(x) >= rows.total_rows == 3 * rows.rows_per_epoch > len(x) - batch
    streams = []
    for epoch in range(3):
        part = slice(epoch * rows.rows_per_epoch, (epoch + 1) * rows.rows_per_epoch)
        keep = y[part] >= 0
        pairs = dict(zip(y[part][keep].tolist(), x[part][keep].tolist()))  # target -> token before
        assert len(pairs) == int(keep.sum()) == sum(lengths) - 1
        following = {before: target for target, before in pairs.items()}
        stream = [(set(range(sum(lengths))) - set(pairs)).pop()]
        while stream[-1] in following:
            stream.append(following[stream[-1]])
        assert sorted(stream) == list(range(sum(lengths)))
        for document in documents:          # documents stay whole
            at = stream.index(document[0])
            assert stream[at:at + len(document)] == document.tolist()
        streams.append(stream)
    assert (y[3 * rows.rows_per_epoch:] == -1).all()
    again = t.Rows(documents, seq_len, batch, 3, seed=1, bos=0)
    last = rows.num_steps - 1
    assert torch.equal(again.step(last)[0], rows.step(last)[0])       # a pure function of the step


def test_documents_are_shuffled_every_epoch():
    documents = [np.arange(10 * i, 10 * i + 10) for i in range(20)]
    rows, streams = t.Rows(documents, 16, 4, 2, seed=1, bos=0), []
    for epoch in range(2):
        rows.load(epoch)
        streams.append(rows.stream[::10].tolist())
    assert streams[0] != streams[1] and sorted(streams[0]) == sorted(streams[1])
    assert streams[0] != sorted(streams[0])


def test_mixture_against_full_distributions():
    random = np.random.default_rng(0)
    p = random.dirichlet(np.ones(11), size=(3, 50))         # 3 models, 50 tokens, 11 words
    y, weights = random.integers(0, 11, 50), np.array([0.2, 0.5, 0.3])
    logp = np.log(p[:, np.arange(50), y])
    for w in (None, weights):
        full = np.average(p, axis=0, weights=w)             # the mixture's whole distribution
        assert np.allclose(full.sum(1), 1)
        assert np.allclose(t.mixture_logp(logp, w), np.log(full[np.arange(50), y]))


def test_learned_weights_are_optimal():
    random = np.random.default_rng(0)
    logp = np.log(random.uniform(0.01, 1, size=(2, 400)) * np.array([[1.0], [0.8]]))
    loss = lambda w: t.mean_loss(t.mixture_logp(logp, [w, 1 - w]))
    best = min(loss(w) for w in np.linspace(0.001, 0.999, 999))
    weights = t.fit_mixture(logp)
    assert weights.sum() == pytest.approx(1) and loss(weights[0]) <= best + 2e-5


def test_data_efficiency_of_the_public_results():
    curve = [[2e8, 3.703], [4e8, 3.370], [6e8, 3.200], [8e8, 3.123], [1e9, 3.046], [2e9, 2.892]]
    for loss, multiple in ((3.307, 4.74), (3.195, 6.13), (3.139, 7.58), (2.987, 13.83)):
        result = t.data_efficiency(loss, {"one_epoch": curve}, 1e8)
        assert result["one_epoch"] == pytest.approx(multiple, abs=0.006)
        assert result["tuned"] == "n/a"
    assert t.data_efficiency(2.8, {"tuned": curve}, 1e8)["tuned"] == "> 20.0"
    assert t.data_efficiency(3.9, {"tuned": curve}, 1e8)["tuned"] == "< 2.0"
