"""Training: gradients of a batch, what members and steps are given, averages, scores, faults.

    python -m pytest tests/test_training.py

Gradients are compared with the formula by float64 autograd over lists of positions.
"""
import contextlib
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt
from helpers import (BOS, VOCAB, batch, gradients_of, logits_of, losses, main, make_dataset,
                     random_tokens, random_trainer, randomize, relative_error, small_config,
                     small_tables, train, TINY)
from train_gpt import (GPT, Clocks, Log, Member, Rows, Trainer, UserError, collect_state,
                       load_dataset, make_config, member_facts, micro_batch_rows, parse,
                       read_tensors, restore_state, result_lines, run_costs, start_runtime,
                       train_member, train_step)

SILENT = Log(None, is_main=False)
SMALL_DATA = [f"--vocab_size={VOCAB}", "--train_tokens=2500", "--selection_tokens=300",
              "--eval_tokens=0", "--final_mixture=uniform"]


# ==== Helpers ===================================================================================
def on_every_rank(trainer, world_size, compute):
    """[compute()] of `world_size` processes, one after the other."""
    results = []
    trainer.runtime.world_size = world_size
    for rank in range(world_size):
        trainer.runtime.rank = rank
        results.append(compute())
    trainer.runtime.world_size = 1
    trainer.runtime.rank = 0
    return results


def summed_gradients(trainer, inputs, targets, progress, distill, world_size=1, micro_rows=4):
    """{name: sum of the losses}, {name: gradient} of all processes together."""
    trainer.micro_rows = micro_rows
    trainer.model.zero_grad()
    shares = on_every_rank(trainer, world_size, lambda: trainer.gradients(
        inputs, targets, progress, distill))
    sums = {name: float(sum(share[name] for share in shares if share)) for name in shares[0]}
    return sums, gradients_of(trainer.model)


NONE = -1e4         # a logit of what is not there: its p is exactly 0


def naive_logits(model, hidden, targets):
    """(logits [B, T, V], the token of each), and with the row's memory T more: h_t h_i / sqrt(D) of
    what was to be predicted at each earlier position i of the row, if anything was."""
    (rows, length, dim), logits = hidden.shape, logits_of(model, hidden)
    tokens = torch.arange(logits.shape[-1]).expand(logits.shape)
    if not model.config.row_memory:
        return logits, tokens
    similar = torch.full((rows, length, length), NONE, dtype=logits.dtype)
    seen = torch.full((rows, length, length), -1)
    for r in range(rows):
        for t in range(length):
            for i in range(t):
                if targets[r, i] >= 0:
                    similar[r, t, i] = hidden[r, t] @ hidden[r, i] / math.sqrt(dim)
                    seen[r, t, i] = targets[r, i]
    return torch.cat((logits, similar), dim=-1), torch.cat((tokens, seen), dim=-1)


def naive_logp(model, hidden, targets):
    """log p(target) [B, T] by naive_logits."""
    logits, tokens = naive_logits(model, hidden, targets)
    right = torch.where(tokens == targets.unsqueeze(-1), logits.log_softmax(-1), NONE)
    return right.logsumexp(-1)


def naive_losses(trainer, inputs, targets, specs, later=(), alpha=0.0, rows=None):
    """The formula: {"loss", "train_loss", "kl"} of `rows` (all), divided by the whole batch's.

    (1 - alpha) (CE + w_2 CE_2 + w_3 CE_3 + MTP's CE_2) + alpha T^2 KL, where CE_j is of the token
    j positions ahead, if its row has it, and a next one. MTP's is a mean over the tokens that have
    a second next one, and has no memory.
    """
    config, model = trainer.config, trainer.model
    rows = range(len(targets)) if rows is None else rows

    def having(ahead, and_next=True):
        """[(row, column, token)] of the whole batch's positions with a token `ahead`."""
        return [(r, i, int(targets[r, i + ahead - 1])) for r in range(len(targets))
                for i in range(targets.shape[1] - ahead + 1)
                if targets[r, i + ahead - 1] >= 0 and (targets[r, i] >= 0 or not and_next)]

    def cross_entropy(logits, stands_for, places):
        """Sum over the positions in `rows`."""
        chosen = [place for place in places if place[0] in rows]
        r, i, token = torch.tensor(chosen or [(0, 0, 0)]).T
        right = torch.where(stands_for[r, i] == token[:, None], logits.log_softmax(-1)[r, i], NONE)
        return -right.logsumexp(-1).sum() * bool(chosen)

    count = len(having(1))
    hidden = model(inputs, specs)
    student, tokens = naive_logits(model, hidden, targets)
    next_token = cross_entropy(student, tokens, having(1)) / count
    loss = next_token
    for ahead, weight in enumerate(later, 2):
        loss = loss + weight * cross_entropy(student, tokens, having(ahead)) / count
    if config.mtp_weight:
        following = torch.cat((inputs[:, 1:], targets[:, -1:].clamp(min=0)), dim=1)
        predicting = logits_of(model, model.mtp_hidden(hidden, following, specs))
        second = having(2, and_next=False)
        ce = cross_entropy(predicting, tokens[:, :, :VOCAB], second)
        loss = loss + config.mtp_weight * ce / max(1, len(second))
    kl = torch.zeros((), dtype=torch.float64)
    if alpha:
        T = config.kd_temperature
        with torch.no_grad():       # a teacher is always in its last stage
            taught, _ = naive_logits(trainer.teacher, trainer.teacher(inputs), targets)
            taught = (taught / T).log_softmax(-1)
        own = (student / T).log_softmax(-1)
        by_token = (taught.exp() * (taught - own)).sum(-1)
        kl = sum((by_token[r, i] for r, i, _ in having(1) if r in rows), kl) / count
        loss = (1 - alpha) * loss + alpha * T ** 2 * kl
    return {"loss": loss, "train_loss": next_token, "kl": kl}


def naive_gradients(trainer, *arguments, **options):
    """{name: loss}, {name: gradient} by naive_losses."""
    trainer.model.zero_grad()
    losses = naive_losses(trainer, *arguments, **options)
    losses["loss"].backward()
    return {name: float(loss.detach()) for name, loss in losses.items()}, gradients_of(trainer.model)


def assert_same_gradients(ours, expected, what, tolerance=1e-6):
    sums, gradients = ours
    for name in ("train_loss", "kl"):
        assert sums[name] == pytest.approx(expected[0][name], rel=1e-6, abs=1e-12), (what, name)
    for name, gradient in expected[1].items():
        scale = max(float(gradient.abs().max()), 1e-12)
        error = float((gradients[name] - gradient).abs().max())
        assert error <= tolerance * scale, (what, name)


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_weights(model, weights):
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[name]), name


def correlation(a, b):
    return abs(np.corrcoef(a.flatten(), b.flatten())[0, 1])


# ==== Gradients of a batch ======================================================================
# two stages: the second, from half of the steps on, has loops and longer windows
STAGED = dict(num_epochs=2, loop_start=1, loop_end=2, loop_count=2, loop_from_epoch=1,
              window_pattern="SL", window_schedule=((0, 0.25, 0.5), (0.5, 0.5, 1)))
TARGETS = dict(second_weight=((0, 0.5), (1, 0.3)), third_weight=((0, 0.25), (0.4, 0)))
DISTILLED = dict(kd_alpha=0.6, kd_temperature=1.3)
MEMORY = dict(row_memory=True, loss_chunk=24)
MORE = dict(rope_fraction=0.5, key_offset=True, xsa=True, iha=True, recurrence_from=0.1)
# settings, progress, stage, weights of the second and third next token, alpha
LOSSES = {
    "next token, first stage": (STAGED, 0.49, 0, (), 0.0),
    "next token, second stage": (STAGED, 0.5, 1, (), 0.0),
    "two tokens": (dict(second_weight=((0, 0.5),)), 0.9, 0, (0.5, 0), 0.0),
    "first and third token": (dict(third_weight=((0, 0.25),)), 0.0, 0, (0, 0.25), 0.0),
    "three tokens": (dict(STAGED, **TARGETS), 0.2, 0, (0.46, 0.125), 0.0),
    "MTP, windows of half a row": (dict(STAGED, mtp_weight=0.3), 0.2, 0, (), 0.0),
    "MTP": (dict(STAGED, mtp_weight=0.3), 0.7, 1, (), 0.0),
    "distilled": (dict(STAGED, **DISTILLED), 0.2, 0, (), 0.6),
    "with a teacher that is not asked": (dict(STAGED, **DISTILLED), 0.2, 0, (), 0.0),
    "all at once": (dict(TARGETS, **DISTILLED, **MORE, mtp_weight=0.3, num_epochs=2),
                    0.2, 1, (0.46, 0.125), 0.6),
    "with the row's memory": (dict(STAGED, **MEMORY), 0.5, 1, (), 0.0),
    "all at once, with the row's memory": (
        dict(TARGETS, **DISTILLED, **MORE, **MEMORY, mtp_weight=0.3, num_epochs=2),
        0.2, 1, (0.46, 0.125), 0.6),
}


@pytest.mark.parametrize("rows_with_targets", [4, 1])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_a_batch_equal_the_formula(name, rows_with_targets):
    """For any number of processes and any micro-batch, also if a last step leaves rows empty."""
    changes, progress, stage, later, alpha = LOSSES[name]
    trainer = random_trainer(**changes)
    specs = trainer.specs[trainer.stages[stage]]
    inputs, targets = batch(trainer.config)     # whose last row ends early
    targets[rows_with_targets:] = -1
    expected = naive_gradients(trainer, inputs, targets, specs, later, alpha)
    for world_size, micro_rows in ((1, 4), (1, 3), (2, 1), (4, 2)):
        ours = summed_gradients(trainer, inputs, targets, progress, bool(alpha), world_size,
                                micro_rows)
        assert_same_gradients(ours, expected, (world_size, micro_rows))


@pytest.mark.parametrize("name", ["next token, first stage", "three tokens", "MTP",
                                  "all at once, with the row's memory"])
def test_gradients_where_tokens_are_cut_equal_the_formula(name):
    """Nothing is to be predicted inside of one, and it is read as its parts, by MTP as well."""
    changes, progress, stage, later, alpha = LOSSES[name]
    trainer = random_trainer(**changes)
    config = trainer.config
    documents = [np.append(BOS, random_tokens(config, 20, seed=i)) for i in range(3)]
    inputs, targets = Rows(documents, config.seq_len, 6, 1, 1, BOS, small_tables()["pairs"],
                           0.5).step(0)
    inputs, targets = inputs[1:5], targets[1:5]
    assert (targets[:, :6] < 0).any() and (inputs[:, 1:] != targets[:, :-1].clamp(min=0)).any()
    specs = trainer.specs[trainer.stages[stage]]
    expected = naive_gradients(trainer, inputs, targets, specs, later, alpha)
    for world_size, micro_rows in ((1, 4), (2, 1)):
        ours = summed_gradients(trainer, inputs, targets, progress, bool(alpha), world_size,
                                micro_rows)
        assert_same_gradients(ours, expected, (world_size, micro_rows))


def test_gradients_are_added_to_those_that_are_there():
    """So that meta-gradients of virtual ranks, and micro-batches, add up."""
    trainer = random_trainer()
    inputs, targets = batch(trainer.config)
    _, once = summed_gradients(trainer, inputs, targets, 0.0, False)
    trainer.gradients(inputs, targets, 0.0, False)
    for name, gradient in gradients_of(trainer.model).items():
        assert relative_error(gradient, 2 * once[name]) < 1e-12


# ---- meta-gradient ----

def takes_the_inner_step(name, scope):
    """All of the blocks' matrices and what else is multiplied, or those of the MLPs."""
    if scope == "mlp":
        return name.startswith("blocks.") and ".mlp." in name
    return name.endswith(".weight") and name not in ("wte.weight", "head.weight")


def naive_meta_gradients(trainer, inputs, targets, specs, size, later, alpha):
    """Over virtual ranks: g1 at w, g2 at w - size g1 / |g1|, both added up."""
    config, model = trainer.config, trainer.model
    parameters = dict(model.named_parameters())
    plastic = [name for name in parameters if takes_the_inner_step(name, config.meta_scope)]
    start = weights_of(model)
    ranks = len(inputs) // (2 * config.meta_rows)
    sums, total = {}, {}
    for rank in range(ranks):
        rows = list(range(rank, len(inputs), ranks))
        for half in (rows[:config.meta_rows], rows[config.meta_rows:]):
            losses, gradients = naive_gradients(trainer, inputs, targets, specs, later, alpha, half)
            norm = math.sqrt(sum(float(gradients[name].square().sum()) for name in plastic))
            with torch.no_grad():
                for name in plastic:
                    parameters[name] -= size / norm * gradients[name]
            for added, values in ((sums, losses), (total, gradients)):
                for name, value in values.items():
                    added[name] = added.get(name, 0) + value
        model.load_state_dict(start)
    return sums, total


@pytest.mark.parametrize("scope, decay, changes, later, alpha", [
    ("matrices", True, MORE, (), 0.0), ("matrices", False, DISTILLED, (), 0.6),
    ("mlp", False, dict(TARGETS, mtp_weight=0.3), (0.32, 0), 0.0),
    ("matrices", False, dict(mtp_weight=0.3), (), 0.0), ("mlp", False, MEMORY, (), 0.0)])
def test_meta_gradients_equal_their_definition(scope, decay, changes, later, alpha):
    """For any number of processes and any micro-batch; weights are then what they were."""
    trainer = random_trainer(**changes, meta_lr=0.5, meta_rows=2, meta_scope=scope,
                             meta_decay=decay, lr_warmdown=0.4, lr_power=0.5, batch_rows=16)
    model = trainer.model
    inputs, targets = batch(trainer.config, 16)
    before = weights_of(model)
    size = 0.5 * math.sqrt((1 - 0.9) / 0.4) if decay else 0.5
    specs = trainer.specs[trainer.stages[-1]]
    expected = naive_meta_gradients(trainer, inputs, targets, specs, size, later, alpha)
    assert_same_weights(model, before)
    for world_size, micro_rows in ((1, 2), (1, 1), (2, 2), (4, 1)):
        ours = summed_gradients(trainer, inputs, targets, 0.9, bool(alpha), world_size, micro_rows)
        assert_same_gradients(ours, expected, (world_size, micro_rows))
        assert_same_weights(model, before)
    trainer.config = replace(trainer.config, meta_lr=0)         # the plain gradient is another
    _, plain = summed_gradients(trainer, inputs, targets, 0.9, bool(alpha))
    assert relative_error(plain["blocks.0.mlp.fc.weight"],
                          expected[1]["blocks.0.mlp.fc.weight"]) > 1e-3


def test_meta_gradient_of_an_inner_step_of_zero_is_the_plain_gradient():
    trainer = random_trainer(meta_lr=0.5, meta_rows=2, meta_decay=True, lr_warmdown=1.0,
                             lr_floor=0.0, mtp_weight=0.3)
    inputs, targets = batch(trainer.config)
    expected = naive_gradients(trainer, inputs, targets, trainer.last_specs)
    ours = summed_gradients(trainer, inputs, targets, 1.0, False)   # the warmdown's end
    assert_same_gradients(ours, expected, "step of 0")


@pytest.mark.parametrize("scope", ["matrices", "mlp"])
def test_adapted_moves_the_plastic_weights_and_restores_them_exactly(scope):
    """After an exception, too."""
    trainer = random_trainer(meta_lr=0.5, meta_rows=2, meta_scope=scope, mtp_weight=0.3)
    model = trainer.model
    before = weights_of(model)
    trainer.backward(*batch(trainer.config), SimpleNamespace(
        specs=trainer.last_specs, num_targets=44, num_second=40,
        loss=train_gpt.LossSpec(torch.ones(1), 0.0, trainer.config)))
    with contextlib.suppress(ZeroDivisionError), trainer.adapted(0.25):
        moved = {name: p.detach() - before[name] for name, p in model.named_parameters()
                 if not torch.equal(p, before[name])}
        assert torch.is_grad_enabled()
        assert set(moved) == {name for name in before if takes_the_inner_step(name, scope)}
        norm = math.sqrt(sum(float(step.square().sum()) for step in moved.values()))
        assert norm == pytest.approx(0.25)
        for name, step in moved.items():        # down the gradient
            slope = model.get_parameter(name).grad
            cosine = -(step * slope).sum() / (step.norm() * slope.norm())
            assert cosine == pytest.approx(1)
        raise ZeroDivisionError
    assert_same_weights(model, before)


# ---- memory ----

def test_memory_that_runs_out_is_the_persons_to_mend(monkeypatch):
    """Micro-batches are as they were told to be; nothing has been updated."""
    trainer = random_trainer(batch_rows=8)
    member = Member(1, trainer, data_of([np.full(500, BOS)]))
    trainer.start_member(1, 1)
    weights = weights_of(trainer.model)
    forward = trainer.forward
    rows = []

    def limited(model, inputs, specs):
        rows.append(len(inputs))
        if len(rows) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return forward(model, inputs, specs)

    trainer.forward = limited
    with pytest.raises(torch.OutOfMemoryError):
        train_step(trainer, member)
    assert (rows, trainer.micro_rows, member.step) == ([4, 4], 4, 0)
    assert_same_weights(trainer.model, weights)


# field values, processes, what --field=value is refused; None: the rows of a micro-batch
SHARES = [
    (dict(batch_rows=8, device_batch_size=4), 1, None, 4),
    (dict(batch_rows=8, device_batch_size=4), 4, None, 2),
    (dict(batch_rows=8, device_batch_size=3), 2, None, 3),
    (dict(batch_rows=6), 4, "--batch_rows=6", 4),
    (dict(batch_rows=1), 4, "--batch_rows=1", 4),
    (dict(batch_rows=16, meta_lr=0.5, meta_rows=2), 4, None, 2),
    (dict(batch_rows=24, meta_lr=0.5, meta_rows=2), 4, "--batch_rows=24", 16),
    (dict(batch_rows=8, meta_lr=0.5, meta_rows=4), 2, "--batch_rows=8", 16),
]


@pytest.mark.parametrize("changes, world_size, refused, number", SHARES, ids=str)
def test_batch_that_cannot_be_shared_out_is_refused(changes, world_size, refused, number):
    """number: of which a batch must be a multiple, and what is proposed is; or rows that fit."""
    config = small_config(**changes)
    if not refused:
        assert micro_batch_rows(config, world_size) == number
        return
    with pytest.raises(UserError, match=rf"^{refused} .* multiple of {number} ") as error:
        micro_batch_rows(config, world_size)
    field = refused.strip("-").partition("=")[0]
    proposed = int(re.search(r": (\d+) is$", str(error.value))[1])
    assert 0 < abs(proposed - changes[field]) < number
    micro_batch_rows(replace(config, **{field: proposed}), world_size)


# ==== Members ===================================================================================
@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "small")


def data_of(documents, scored=("val",)):
    """A Dataset's train, and splits of 30 random tokens."""
    tokens = random_tokens(SimpleNamespace(vocab_size=VOCAB), len(scored), 30, seed=5).numpy()
    return SimpleNamespace(train=documents, bos=BOS, tables={},
                           scored={split: [part] for split, part in zip(scored, tokens)})


def test_members_see_all_documents_in_the_order_of_the_data():
    """They shuffle them themselves; no member leaves any out."""
    documents = [np.full(i + 2, i) for i in range(20)]
    for number in (1, 2, 3):
        rows = Member(number, random_trainer(num_models=3), data_of(documents)).rows
        assert len(rows.documents) == 20 and rows.tokens == sum(map(len, documents))
        assert all(ours is document for ours, document in zip(rows.documents, documents))


def test_order_of_rows_differs_between_members_and_seeds():
    documents = [np.append(BOS, np.arange(i, i + 40)) for i in range(20)]
    first_rows = []
    for number, seed in ((1, 1), (1, 1), (2, 1), (1, 2), (2, 2)):
        trainer = random_trainer()
        trainer.config = replace(trainer.config, seed=seed, num_models=2)
        rows = Member(number, trainer, data_of(documents)).rows
        first_rows.append(tuple(rows.step(0)[0].flatten().tolist()))
    assert first_rows[0] == first_rows[1]
    assert len(set(first_rows)) == 4


@pytest.mark.parametrize("alpha, kd_from, distilled", [
    (0.5, 2, [2, 3, 4]), (0.5, 3, [3, 4]), (0.5, 4, [4]), (0.0, 2, [])])
def test_members_that_are_distilled(alpha, kd_from, distilled):
    """From kd_from on."""
    trainer = random_trainer(num_models=4, kd_alpha=alpha, kd_from=kd_from)
    data = data_of([np.full(500, BOS)])
    assert [n for n in range(1, 5) if Member(n, trainer, data).distill] == distilled


# ---- how members begin ----

def float32_trainer(**changes):
    config = small_config(**changes)
    return Trainer(config, start_runtime(config))


def test_members_begin_afresh():
    """Weights by the member's seed, an optimizer without a past."""
    trainer = float32_trainer(num_models=2)
    for seed in (11, 12):
        trainer.start_member(seed - 10, seed)
        assert_same_weights(trainer.model, GPT(trainer.config).init_weights(seed).state_dict())
        assert trainer.optimizer.steps == 0
        assert not any(state.any() for group in trainer.optimizer.groups
                       for state in group.state.values())
        trainer.optimizer.steps = 9
        for group in trainer.optimizer.groups:
            for state in group.state.values():
                state.fill_(3)


def test_members_that_continue_are_perturbed_and_keep_the_optimizer():
    """p + s std(p) N(0, 1), where s falls from 0.25 to 0.05 along a cosine; std is unbiased."""
    trainer = float32_trainer(num_models=5, continue_members=True, model_dim=96,
                              perturb_start=0.25, perturb_end=0.05)
    model = trainer.model
    trainer.start_member(1, 1001)
    assert_same_weights(model, GPT(trainer.config).init_weights(1001).state_dict())
    optimizer = trainer.optimizer
    optimizer.steps = 17
    optimizer.groups[0].state["momentum" if optimizer.groups[0].kind.stacked
                              else "first_moment"].fill_(3)
    noises = []
    for number in range(2, 6):
        before = weights_of(model)
        trainer.start_member(number, 1000 + number)
        strength = 0.05 + 0.2 * (1 + math.cos(math.pi * (number - 2) / 3)) / 2
        for name, p in model.named_parameters():
            std = before[name].std()
            if p.numel() > 1000 and std:
                noise = (p.detach() - before[name]) / std
                assert noise.std().item() == pytest.approx(strength, rel=0.05), name
                assert noise.mean().abs() < 0.1 * strength, name
            elif not std:
                assert torch.equal(p, before[name]), name
        noises.append(model.wte.weight.detach() - before["wte.weight"])
        assert trainer.optimizer is optimizer and optimizer.steps == 17
        assert any((state == 3).all() for state in optimizer.groups[0].state.values())
    assert all(correlation(a, b) < 0.05 for a, b in zip(noises, noises[1:]))


@pytest.mark.parametrize("num_layers", [2, 3, 5])
def test_perturbation_of_a_few_numbers(num_layers, monkeypatch):
    """By the unbiased standard deviation; a tensor of one number has none and stays."""
    trainer = float32_trainer(num_models=2, continue_members=True, num_layers=num_layers,
                              perturb_start=0.25)
    trainer.start_member(1, 1001)
    lambdas = {name: p for name, p in trainer.model.named_parameters() if p.ndim == 1}
    with torch.no_grad():
        for p in lambdas.values():
            p.copy_(torch.arange(1.0, len(p) + 1) ** 2)
    before = {name: p.detach().clone() for name, p in lambdas.items()}
    monkeypatch.setattr(torch, "randn", lambda shape, **options: torch.ones(shape))
    trainer.start_member(2, 1002)
    for name, p in lambdas.items():
        n, values = len(p), before[name].tolist()
        mean = sum(values) / n
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else 0.0
        assert (p - before[name]).tolist() == pytest.approx([0.25 * std] * n, rel=1e-5), name


def test_member_that_continues_after_a_stop_begins_as_without_it():
    """With the optimizer of a state that was saved when the member before was done."""
    changes = dict(num_models=3, continue_members=True, dropout=0.3)
    trainer = float32_trainer(**changes)
    data = data_of([np.append(BOS, np.arange(50))] * 4)
    member = Member(1, trainer, data)
    trainer.start_member(1, member.seed)
    train_step(trainer, member)
    state = collect_state(trainer, member)
    weights = weights_of(trainer.model)
    resumed = float32_trainer(**changes)
    resumed.model.load_state_dict(weights)
    for one in (trainer, resumed):
        one.start_member(2, 1002, state)
    assert_same_weights(resumed.model, weights_of(trainer.model))
    assert resumed.optimizer.steps == 1
    for group, other in zip(trainer.optimizer.groups, resumed.optimizer.groups):
        assert any(part.any() for part in group.state.values())
        for kind, part in group.state.items():
            assert torch.equal(other.state[kind], part), (group.names, kind)


def test_processes_begin_alike_and_drop_out_differently():
    trainer = float32_trainer(dropout=0.5)
    tokens = random_tokens(trainer.config, 2, 12)

    def begin():
        trainer.start_member(1, 1001)
        return weights_of(trainer.model), trainer.model(tokens).detach()

    first, second = on_every_rank(trainer, 2, begin)
    again = begin()
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    assert not torch.equal(first[1], second[1])
    assert torch.equal(first[1], again[1])


# ==== What every step is given ==================================================================
SCHEDULES = dict(
    num_models=5, num_epochs=4, batch_rows=8, kd_from=3, kd_alpha=0.5, kd_teachers=2,
    kd_epoch_factor=2, split_tokens=0, lr_warmdown=0.5, lr_power=0.5, lr_floor=0.1,
    sawtooth_epochs=1, sawtooth_floor=0.05,
    wd_schedule="0:1,0.5:0.25,0.5:2,1:3", momentum=0.9, momentum_start=0.6, momentum_steps=11,
    loop_start=1, loop_end=1, loop_count=2, loop_from_epoch=1, recurrence_from=0.75,
    window_schedule="0:0.25:0.5,0.5:0.5:1", window_pattern="SL", dropout=0.1,
    second_weight="0:0.6,0.5:0", third_weight="", device_batch_size=8)


class WatchedTrainer(Trainer):
    """Puts down what each step computes with, in `steps` of the class."""
    steps = []

    def gradients(self, inputs, targets, progress, distill):
        self.steps.append(SimpleNamespace(
            rows=len(inputs), progress=progress, first=tuple(inputs[0].tolist()), losses=[],
            is_training=all(module.training for module in self.model.modules()),
            teacher_rests=not any(module.training for module in self.teacher.modules()),
            taught_by=weights_of(self.teacher), weights=weights_of(self.model)))
        return super().gradients(inputs, targets, progress, distill)

    def backward(self, inputs, targets, plan):
        self.steps[-1].losses.append(plan.loss)
        self.steps[-1].specs = plan.specs
        return super().backward(inputs, targets, plan)

    def start_member(self, *arguments):
        super().start_member(*arguments)
        step = self.optimizer.step

        def watched(lr, wd, momentum):
            vars(self.steps[-1]).update(lr=lr, wd=wd, momentum=momentum)
            square = step(lr, wd, momentum)
            self.steps[-1].after = weights_of(self.model)
            return square

        self.optimizer.step = watched


@pytest.fixture(scope="module")
def training(small_data, tmp_path_factory):
    """[[one namespace a step] a member], Config of a whole run with every schedule there is."""
    WatchedTrainer.steps.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "Trainer", WatchedTrainer)
        run = train(tmp_path_factory.mktemp("training"), "--track=cpu", f"--dataset={small_data}",
                    *SMALL_DATA, *(f"--{name}={value}" for name, value in SCHEDULES.items()))
    members = []
    for step in WatchedTrainer.steps:
        if step.progress == 0:
            members.append([])
        members[-1].append(step)
    WatchedTrainer.steps.clear()
    config = make_config(**{name: parse(name, value) if isinstance(value, str) else value
                            for name, value in run.result["config"].items()})
    assert [m["step"] for m in run.steps] == [i for member in members
                                              for i in range(1, len(member) + 1)]
    return members, config


def test_members_take_their_epochs_and_rows(training, small_data):
    """4 epochs each, 8 of who has a teacher, of 8 rows a step."""
    members, config = training
    tokens = sum(len(document) for document in load_dataset(small_data, config).train)
    for epochs, member in zip((4, 4, 8, 8, 8), members, strict=True):
        rows = epochs * math.ceil((tokens - 1) / config.seq_len)
        assert len(member) == math.ceil(rows / 8) > 10
        assert all(step.rows == 8 and step.is_training for step in member)
        assert [step.progress for step in member] == [i / len(member) for i in range(len(member))]
    assert len({member[0].first for member in members}) == 5    # each in an order of its own


def test_every_step_has_its_learning_rate_decay_and_momentum(training):
    for epochs, member in zip((4, 4, 8, 8, 8), training[0], strict=True):
        for i, step in enumerate(member):
            p = step.progress
            base = 0.1 + 0.9 * min(1.0, (1 - p) / 0.5) ** 0.5
            in_epoch = epochs * (p - 1) + 1             # the last epoch has a tooth
            tooth = 0.05 + (max(base, 0.05) - 0.05) * (1 + math.cos(math.pi * in_epoch)) / 2
            assert step.lr == pytest.approx(base if in_epoch < 0 else tooth, abs=1e-9), p
            assert step.wd == pytest.approx(1 - 1.5 * p if p < 0.5 else 2 + (p - 0.5) * 2), p
            assert step.momentum == pytest.approx(0.6 + 0.3 * min(1, i / 11)), p


def test_every_step_is_in_its_stage(training):
    """Loops from a quarter on, longer windows from half, all twice from three quarters."""
    members, config = training
    width = config.model_dim // config.num_heads
    for member in members:
        for step in member:
            p = step.progress
            assert step.specs.layer_order == ((0, 1, 1) if p >= 0.25 else (0, 1))
            assert step.specs.passes == (2 if p >= 0.75 else 1)
            short, long = (0.5, 1) if p >= 0.5 else (0.25, 0.5)
            windows = [spec.window for spec in step.specs.attention]
            assert windows == [short * config.seq_len, long * config.seq_len]
            yarn = 0.2 * math.log(2) + 1 if p >= 0.5 else 1
            assert [spec.scale for spec in step.specs.attention] == 2 * [
                pytest.approx(yarn * width ** -0.5)]


def test_every_step_has_its_loss(training):
    """The second target's weight falls; members from kd_from on are distilled."""
    for number, member in enumerate(training[0], 1):
        for step in member:
            loss, = step.losses
            assert loss.alpha == (0.5 if number >= 3 else 0)
            expected = [1, max(0, 0.6 * (1 - step.progress / 0.5)), 0]
            assert loss.target_weights.tolist() == pytest.approx(expected, abs=1e-6)


def test_teachers_are_the_two_members_before_as_they_ended(training):
    """In each step one of them, each in about half of the steps, and they drop nothing out."""
    members, _ = training
    for *teachers, member in zip(members, members[1:], members[2:]):
        counts = [0, 0]
        for step in member:
            assert step.teacher_rests
            is_by = [all(torch.equal(step.taught_by[name], p)
                         for name, p in teacher[-1].after.items()) for teacher in teachers]
            assert sum(is_by) == 1
            counts[is_by.index(True)] += 1
        assert min(counts) > len(member) / 4


def test_members_of_a_run_begin_with_weights_of_their_own(training):
    begins = [member[0].weights["wte.weight"] for member in training[0]]
    for a, b in zip(begins, begins[1:]):
        assert correlation(a, b) < 0.05


def test_a_reading_is_the_mean_of_the_steps_since_the_last(small_data, tmp_path):
    """Also the last one, of fewer steps; nothing else changes."""
    arguments = ["--track=cpu", f"--dataset={small_data}", *SMALL_DATA, "--num_models=2",
                 "--kd_alpha=0.5", "--kd_from=2"]
    each = train(tmp_path, *arguments, "--log_steps=1")
    some = train(tmp_path, *arguments, "--log_steps=4")
    steps = [step["step"] for step in some.steps if step["member"] == 2]
    assert steps == [4, 8, 9]
    for reading in some.steps:
        since = max(step for step in (0, 4, 8) if step < reading["step"])
        covered = [step for step in each.steps if step["member"] == reading["member"]
                   and since < step["step"] <= reading["step"]]
        for name in ("train_loss", "kl", "lr_multiplier"):
            values = [step[name] for step in covered]
            expected = values[-1] if name == "lr_multiplier" else np.mean(values)
            assert reading[name] == pytest.approx(expected, rel=1e-6), name
    assert some.result["val_loss"] == each.result["val_loss"]


# ==== The loss on selection by epoch, and the gradient's norm ===================================
# three epochs of 4.5 steps: windows that grow, then loops, then all runs twice
BY_EPOCH = ["--num_epochs=3", "--dropout=0.2", "--window_schedule=0:0.25:0.5,0.3:0.5:1",
            "--loop_start=0", "--loop_end=0", "--loop_count=2", "--loop_from_epoch=1",
            "--recurrence_from=0.7", "--num_models=2", "--kd_alpha=0.5", "--kd_from=2"]


@pytest.mark.parametrize("changes", [[], ["--row_memory=true"]], ids=["", "memory"])
def test_selection_by_epoch_is_that_of_the_state_then(changes, small_data, tmp_path, monkeypatch):
    """The states that are saved at ends of epochs, scored here by rows, in the stage of the step."""
    save, states = train_gpt.States.save, {}

    def copied(self, tensors, facts):
        save(self, tensors, facts)
        states[facts["number"], facts["step"]] = read_tensors(self.path)[0]

    monkeypatch.setattr(train_gpt.States, "save", copied)
    run = train(tmp_path, "--track=cpu", f"--dataset={small_data}", *SMALL_DATA, *BY_EPOCH,
                "--save_minutes=1e-9", *changes)
    readings = [m for m in run.steps if "selection_loss" in m]
    values = {name: value for name, value in run.result["config"].items() if name != "track"}
    config = make_config("cpu", **values)
    data = load_dataset(small_data, config)
    steps = len(run.steps) // 2
    assert [m["epoch"] for m in readings] == pytest.approx(2 * [1, 2, 3], abs=0.2)
    tokens = torch.from_numpy(np.concatenate(data.scored["selection"]).astype(np.int64))
    assert len({m["selection_loss"] for m in readings}) == 6
    for reading in readings:
        model = GPT(config).eval()
        state = states[reading["member"], reading["step"]]
        model.load_state_dict(train_gpt.named("model.", state))
        stage = train_gpt.stage_at(train_gpt.training_stages(config), (reading["step"] - 1) / steps)
        total = 0.0
        for x, y in zip(tokens[:-1].split(config.seq_len), tokens[1:].split(config.seq_len)):
            with torch.no_grad():
                hidden = model(x[None], model.specs(stage, len(x)))
                total -= float(naive_logp(model, hidden, y[None]).double().sum())
        assert reading["selection_loss"] == pytest.approx(total / (len(tokens) - 1), abs=1e-5)
    ends = [m["selection_loss"] for m in readings if m["step"] == steps]
    assert ends == [m["selection_loss"] for m in run.result["members"]]


def test_scoring_selection_by_epoch_changes_no_digit(small_data, tmp_path, monkeypatch):
    arguments = ["--track=cpu", f"--dataset={small_data}", *SMALL_DATA, *BY_EPOCH]
    scored = train(tmp_path, *arguments)
    score_splits = Trainer.score_splits

    def at_the_end_only(self, data, splits=None, specs=None):
        return score_splits(self, data, splits, specs) if splits is None else {}

    monkeypatch.setattr(Trainer, "score_splits", at_the_end_only)
    blind = train(tmp_path, *arguments)
    assert losses(scored) == losses(blind)
    for run, count in ((scored, 6), (blind, 2)):        # of 2 members
        assert sum("selection_loss" in m for m in run.steps) == count


def test_every_epoch_is_a_reading_and_a_line(small_data, tmp_path):
    arguments = ["--track=cpu", f"--dataset={small_data}", *SMALL_DATA, *BY_EPOCH,
                 "--log_steps=1000"]
    run = train(tmp_path, *arguments)
    assert [round(m["epoch"]) for m in run.steps] == 2 * [1, 2, 3]
    shown = re.findall(r"member (\d)/2 .* epoch (\d)\.\d/3 .* selection (\d\.\d{3}) ", run.console)
    assert shown == [(str(m["member"]), f"{m['epoch']:.1f}"[0], f"{m['selection_loss']:.3f}")
                     for m in run.steps]
    other = train(tmp_path, *arguments, "--selection_tokens=0")
    assert [round(m["epoch"]) for m in other.steps] == 2 * [1, 2, 3]
    assert not any("selection_loss" in m for m in other.steps)
    assert other.result["selection_loss"] is None
    while_training = other.console.partition("\n\n")[2].partition("\nresult ")[0]
    assert "selection" not in while_training and "selection nan" in other.console


@pytest.mark.parametrize("clip", [0, 0.01])
def test_readings_have_the_norm_of_the_gradient_before_it_is_clipped(
        clip, small_data, tmp_path, monkeypatch):
    step, squares = train_gpt.MuonAdamW.step, []

    def watched(self, *schedules):
        squares.append(sum(p.grad.double().square().sum() for g in self.groups for p in g.params))
        return step(self, *schedules)

    monkeypatch.setattr(train_gpt.MuonAdamW, "step", watched)
    run = train(tmp_path, "--track=cpu", f"--dataset={small_data}", *SMALL_DATA, "--num_models=1",
                "--log_steps=2", f"--grad_clip={clip}")
    ends = [m["step"] for m in run.steps]
    for before, reading in zip([0, *ends], run.steps):
        mean = np.mean(squares[before:reading["step"]])
        assert reading["grad_norm"] == pytest.approx(mean ** 0.5, rel=1e-5)


# ==== Scores ====================================================================================
@pytest.fixture(scope="module", params=[{}, MEMORY], ids=["", "memory"])
def scorer(request):
    """(trainer, tokens [100], log p(target) [99] by one forward pass a token)."""
    trainer = random_trainer(**{**STAGED, "device_batch_size": 3, **request.param})
    tokens = random_tokens(trainer.config, 100, seed=3).numpy()
    T = trainer.config.seq_len
    expected = []
    with torch.no_grad():
        for i in range(1, len(tokens)):
            row = torch.from_numpy(tokens[(i - 1) // T * T:i + 1])[None]     # that it is in
            logp = naive_logp(trainer.model, trainer.model(row[:, :-1]), row[:, 1:])
            expected.append(float(logp[0, -1]))
    return trainer, tokens, np.array(expected)


@pytest.mark.parametrize("count", [2, 3, 12, 13, 14, 25, 26, 50, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_token_is_scored_exactly_once(count, world_size, scorer, monkeypatch):
    trainer, tokens, expected = scorer
    shares = []

    def gather(part):
        shares.append(part)
        return part

    monkeypatch.setattr(trainer.runtime, "all_gather", gather, raising=False)
    scores = on_every_rank(trainer, world_size, lambda: trainer.score(tokens[:count], BOS))
    assert len({share.shape for share in shares}) == 1          # as all_gather needs
    gathered = torch.cat(shares)[:count - 1]
    assert relative_error(gathered, expected[:count - 1]) < 1e-9
    if world_size == 1:
        assert scores[0].dtype == np.float32
        assert relative_error(scores[0], expected[:count - 1]) < 1e-6


def test_splits_are_scored_without_dropout_on_the_clock_of_evaluation(monkeypatch):
    """And training goes on as before, its clock too. Documents are scored end to end."""
    trainer = random_trainer(dropout=0.5, stochastic_depth=0.5)
    tokens = random_tokens(trainer.config, 70, seed=4).numpy().astype(np.uint16)
    data = SimpleNamespace(bos=BOS, scored={"selection": [tokens[:20]],
                                            "val": [tokens[20:33], tokens[33:60]]})
    now = [0.0]
    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    trainer.clocks = Clocks()
    forward = trainer.forward

    def forward_of_a_second(*arguments):
        now[0] += 1
        return forward(*arguments)

    trainer.forward = forward_of_a_second
    now[0] = 10
    scores = trainer.score_splits(data)
    assert trainer.clocks.seconds()["eval"] == now[0] - 10 >= 2
    assert trainer.clocks.training() == pytest.approx(10)
    assert all(module.training for module in trainer.model.modules())
    trainer.model.eval()
    for split, part in (("selection", tokens[:20]), ("val", tokens[20:60])):
        assert np.array_equal(scores[split], trainer.score(part.astype(np.int64), BOS))


# ==== Averages ==================================================================================
def random_steps(trainer, snapshots):
    """A train_step that sets random weights, and puts them down."""
    def step(trainer, member):
        randomize(trainer.model, seed=member.step)
        snapshots.append(weights_of(trainer.model))
        member.recent = {name: [torch.tensor(1.0)] for name in ("train_loss", "kl", "grad_square")}
        member.step += 1
    return step


def ended(monkeypatch, **changes):
    """Of a member of 3 epochs of 33 rows: (trainer, data, weights after each step, facts, scores,
    evaluations)."""
    trainer = random_trainer(num_epochs=3, **changes)
    data = data_of([np.full(33 * trainer.config.seq_len + 1, BOS)], ("selection", "val", "holdout"))
    snapshots = []
    evaluations = []
    score_splits = trainer.score_splits

    def counted(data, splits=None, specs=None):
        if splits is None:      # not for the curve over epochs
            evaluations.append(len(snapshots))
        return score_splits(data, splits, specs)

    monkeypatch.setattr(train_gpt, "train_step", random_steps(trainer, snapshots))
    monkeypatch.setattr(trainer, "score_splits", counted)
    facts, scores = train_member(1, trainer, data, SILENT)
    return trainer, data, snapshots, facts, scores, evaluations


# average, of how many epochs, by recency -> the weights of the ends of epochs 1, 2, 3
AVERAGES = [("weights", 1, True, (0, 0, 1)), ("weights", 2, False, (0, 1 / 2, 1 / 2)),
            ("weights", 2, True, (0, 1 / 3, 2 / 3)), ("weights", 9, True, (1 / 6, 2 / 6, 3 / 6)),
            ("probs", 1, False, (0, 0, 1)), ("probs", 2, True, (0, 1 / 3, 2 / 3)),
            ("probs", 3, False, (1 / 3, 1 / 3, 1 / 3))]


@pytest.mark.parametrize("average, epochs, recency, shares", AVERAGES, ids=str)
def test_members_end_as_averages_of_ends_of_epochs(average, epochs, recency, shares, monkeypatch):
    """4 rows a step: steps 9, 17 and 25 complete an epoch. Only means of weights move weights."""
    trainer, data, snapshots, facts, scores, evaluations = ended(
        monkeypatch, average=average, average_epochs=epochs, average_recency=recency)
    assert len(snapshots) == 25
    ends = [snapshots[step - 1] for step in (9, 17, 25)]
    if average == "probs":
        assert_same_weights(trainer.model, snapshots[-1])
        assert evaluations == [9, 17, 25][-epochs:]
        by_end = []
        for weights in ends:
            trainer.model.load_state_dict(weights)
            by_end.append(Trainer.score_splits(trainer, data))
        expected = {split: np.log(sum(share * np.exp(end[split].astype(np.float64))
                                      for share, end in zip(shares, by_end))) for split in scores}
    else:
        mean = {name: sum(share * end[name] for share, end in zip(shares, ends))
                for name in ends[0]}
        for name, p in trainer.model.named_parameters():
            assert relative_error(p, mean[name]) < 1e-12, name
        assert evaluations == [25]
        trainer.model.load_state_dict(mean)
        expected = Trainer.score_splits(trainer, data)
    assert list(scores) == ["selection", "val", "holdout"]
    for split, logp in expected.items():
        assert scores[split].dtype == np.float32
        assert relative_error(scores[split], logp) < 1e-6
        assert facts[f"{split}_loss"] == pytest.approx(-logp.mean(), rel=1e-6)


@pytest.mark.parametrize("average", ["weights", "probs"])
@pytest.mark.parametrize("batch_rows, epochs", [(60, 2), (60, 1), (99, 1), (128, 2)])
def test_steps_that_complete_several_epochs(average, batch_rows, epochs, monkeypatch):
    """The last step completes all of the epochs that are averaged: they are its weights."""
    trainer, data, snapshots, _, scores, _ = ended(
        monkeypatch, average=average, average_epochs=epochs, batch_rows=batch_rows)
    assert_same_weights(trainer.model, snapshots[-1])
    for split, logp in Trainer.score_splits(trainer, data).items():
        assert relative_error(scores[split], logp) < 1e-6


# ==== Time, speed, FLOPs ========================================================================
def test_clocks_go_on_from_those_of_earlier_launches(monkeypatch):
    """Time of compiling before a clock began, in this process, is not its own."""
    now = [50.0]
    compiled = {"total_wall_time": 5.0}
    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(torch._dynamo.utils, "calculate_time_spent", lambda: compiled)
    for before in (dict(wall=100.0, compile=7.0, eval=3.0), {}):
        clocks = Clocks(**before)
        assert clocks.seconds() == {"wall": 0, "compile": 0, "eval": 0, **before}
        now[0] += 10
        compiled["total_wall_time"] += 2
        clocks.eval += 1
        assert clocks.seconds() == {"wall": before.get("wall", 0) + 10,
                                    "compile": before.get("compile", 0) + 2,
                                    "eval": before.get("eval", 0) + 1}
        assert clocks.training() == clocks.seconds()["wall"] - sum(
            clocks.seconds()[kind] for kind in ("compile", "eval"))


@pytest.mark.parametrize("world_size, peak, mfu", [(1, 1e6, 0.56), (2, 1e6, 0.28), (1, None, None)])
def test_facts_of_a_member_by_hand(world_size, peak, mfu, monkeypatch):
    """4 steps of 4 rows of 12 tokens in 24 s; FLOPs of stages and teacher."""
    now = [0.0]
    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(train_gpt, "peak_flops", lambda device: peak)
    trainer = random_trainer(**STAGED, **DISTILLED, num_models=4, kd_from=2)
    trainer.clocks = Clocks()
    now[0] = 1000                   # what passed before a member is not its time
    trainer.flops = dict(zip(trainer.stages, (30_000.0, 50_000.0)))
    trainer.teacher_flops = 30_000.0
    trainer.add_teacher()
    member = Member(4, trainer, data_of([np.full(8 * 12 + 1, BOS)]))    # 8 rows an epoch
    trainer.optimizer = SimpleNamespace(step=lambda *rates: None)
    assert member.rows.num_steps == 4 and member.distill
    for _ in range(4):
        now[0] += 7
        train_step(trainer, member)
    trainer.clocks.eval += 4        # nor is that of an evaluation
    trainer.runtime.world_size = world_size
    member.train_loss = 2.5
    facts = member_facts(trainer, member)
    assert facts.pop("mfu") == (mfu and pytest.approx(mfu, abs=1e-4))
    assert facts == {"train_loss": 2.5, "train_seconds": 24.0, "tokens_per_second": 8.0,
                     "train_flops": member.flops}


def test_state_has_what_a_member_counts(monkeypatch):
    """Its clock among it: the run's at the member's start, and no seconds of its own."""
    now = [0.0]
    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    trainer = random_trainer(num_models=2)
    now[0] = 500
    member = Member(2, trainer, data_of([np.full(500, BOS)]))
    trainer.start_member(2, member.seed)
    train_step(trainer, member)
    now[0] += 30
    state = collect_state(trainer, member)
    assert {name.partition(".")[0] for name in state[0]} == {
        "model", "first_moment", "second_moment", "momentum", "random"}
    assert set(state[1]) == {"number", "start", "step", "train_loss", "flops", "ends",
                             "world_size", "optimizer_steps", "clocks"}
    assert (state[1]["number"], state[1]["start"], state[1]["step"]) == (2, 500, 1)
    now[0] += 9000          # until somebody goes on
    resumed = random_trainer(num_models=2)
    again = Member(2, resumed, data_of([np.full(500, BOS)]))
    resumed.start_member(2, again.seed)
    restore_state(state, resumed, again)
    now[0] += 10
    assert member_facts(resumed, again)["train_seconds"] == 40


def test_processes_go_on_with_their_own_random_generators():
    """They are rows of a gathered tensor; where there are other processes all are fresh ones."""
    trainer = random_trainer()
    member = Member(1, trainer, data_of([np.full(500, BOS)]))
    trainer.start_member(1, member.seed)
    tensors, facts = collect_state(trainer, member)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    tensors["random"] = torch.stack([generator.get_state() for generator in generators])
    expected = [torch.rand(5, generator=generator).tolist() for generator in generators]

    def go_on():
        restore_state((tensors, facts | {"world_size": 3}), trainer, member)
        return torch.rand(5).tolist()

    assert on_every_rank(trainer, 3, go_on) == expected
    fresh = on_every_rank(trainer, 2, go_on)
    assert fresh[0] != fresh[1] and not any(numbers in expected for numbers in fresh)


@pytest.mark.parametrize("recurrence", [0.0, 0.5])
def test_a_teacher_costs_the_forward_passes_of_the_last_stage(recurrence):
    """A third of a step's FLOPs, without MTP; both passes of a recurrence are forward only."""
    trainer = random_trainer(**DISTILLED, loop_start=1, loop_end=2, loop_count=3,
                             recurrence_from=recurrence, mtp_weight=0.3)
    config = replace(trainer.config, mtp_weight=0)
    last = trainer.stages[-1]
    once = train_gpt.flops_per_token(config, last._replace(passes=1))
    head = 6 * config.padded_vocab * config.model_dim
    passes = 2 if recurrence else 1
    assert 3 * trainer.teacher_flops == pytest.approx(head + passes * (once - head))


@pytest.mark.parametrize("limit, flop_limit, seconds, over", [
    (1.0, 0, (40, 30), True), (1.0, 0, (30, 30), False), (1.0, 0, (30, 20), False),
    (0.0, 0, (40, 30), False), (0.0, 6.9e9, (30, 20), True), (1.0, 7e9, (30, 20), False)])
def test_costs_of_a_run_by_hand(limit, flop_limit, seconds, over):
    """Minutes or FLOPs of training, of all members; speeds are means by time."""
    trainer = SimpleNamespace(config=small_config(time_limit=limit, flop_limit=flop_limit),
                              clocks=SimpleNamespace(seconds=lambda: dict(
                                  wall=99.0, compile=5.0, eval=3.0)))
    members = [dict(train_seconds=seconds[0], tokens_per_second=100.0, mfu=0.5, train_flops=3e9),
               dict(train_seconds=seconds[1], tokens_per_second=200.0, mfu=None, train_flops=4e9)]
    costs = run_costs(trainer, members, 77)
    total = sum(seconds)
    assert costs["over_limit"] is over and costs["train_flops"] == 7e9
    assert costs["train_seconds"] == total and costs["peak_memory_bytes"] == 77
    assert (costs["wall_seconds"], costs["compile_seconds"], costs["eval_seconds"]) == (99, 5, 3)
    assert costs["tokens_per_second"] == pytest.approx(
        (100 * seconds[0] + 200 * seconds[1]) / total, abs=0.1)
    assert costs["mfu"] == pytest.approx(0.5 * seconds[0] / total, abs=1e-4)


def test_a_run_over_its_limit_says_so(tmp_path):
    """And the same result without the limit does not."""
    run = train(tmp_path, "--track=cpu", "--num_models=1", "--flop_limit=1e9")
    times = re.search(r"^time .*$", run.log, re.MULTILINE)[0]
    assert times.endswith("; OVER the limit")
    assert run.result["over_limit"] is True
    assert not any("OVER" in line for line in result_lines({**run.result,
                                                            "over_limit": False}))


# ==== Numbers that are not finite ===============================================================
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    code, _, err = main(*TINY, "--track=cpu", f"--runs_dir={tmp_path}", "--run_id=run",
                        "--embed_lr=1e15", "--head_lr=1e15")
    assert code == 2
    assert re.fullmatch(r"error: member 1, step \d+: the loss is not finite; [^\n]*_lr\n", err)
    assert not (tmp_path / "run/result.json").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("poisoned", [6, 13])
def test_weights_that_are_not_finite_are_never_saved(poisoned, value, tmp_path, monkeypatch):
    """By a gradient of a step whose loss is finite: the state stays that of the step before."""
    steps = []
    gradients = Trainer.gradients

    def spoilt(trainer, *arguments):
        sums = gradients(trainer, *arguments)
        steps.append(sums)
        if len(steps) == poisoned:
            trainer.model.blocks[1].mlp.proj.weight.grad[3, 2] = value
        return sums

    monkeypatch.setattr(Trainer, "gradients", spoilt)
    code, _, err = main(*TINY, "--track=cpu", f"--runs_dir={tmp_path}", "--run_id=run",
                        "--save_minutes=0.000001")
    assert code == 2
    assert re.fullmatch(rf"error: member 1, step {poisoned}: a weight is not finite;"
                        r" [^\n]*_lr\n", err)
    lines = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, poisoned + 1))
    tensors, facts = read_tensors(tmp_path / "run/state.safetensors")
    assert facts["step"] == poisoned - 1
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert not list((tmp_path / "run").glob("members/*"))
