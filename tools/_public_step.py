"""The training step as public code writes it, for bench.py to compare ours with.

The same loss and the same update, but: all logits of a micro-batch at once, cross-entropy and KL
through autograd; every process updates every parameter, one matrix at a time; sliding windows as
full [T, T] masks of PyTorch's attention; the loss is read after every micro-batch. torch.compile,
where a run has it, covers the model's forward (and its backward), not the loss.
"""
from dataclasses import replace

import torch
import torch.nn.functional as F

from train_gpt import (OPTIMIZERS, Rates, Trainer, add_sums, find_row, parameter_table,
                       token_logits)

NOTHING = -1e30         # the logit of what cannot come, of which autograd makes no NaN


def all_logits(hidden, weight, targets, spec):
    """(logits of all tokens at once, the token that each stands for; None: its column's)."""
    config = spec.config
    if not spec.row:
        logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
        if config.softcap:
            logits = config.softcap * torch.tanh(logits / config.softcap)
        return logits[:, :config.vocab_size], None
    logits, similar, seen = token_logits(hidden, weight, targets[:, 0], config, spec.row)
    columns = torch.arange(len(weight), device=hidden.device).expand_as(logits)
    return torch.cat((logits, similar), dim=1).clamp(min=NOTHING), torch.cat((columns, seen), dim=1)


def cross_entropy(logp, tokens, targets, counted):
    """The sum over the tokens that count and have a target."""
    targets = torch.where(counted, targets, -1)
    if tokens is None:
        return F.nll_loss(logp, targets, ignore_index=-1, reduction="sum")
    right = torch.where(tokens == targets.clamp(min=0).unsqueeze(1), logp, -torch.inf)
    return -torch.where(targets >= 0, torch.logsumexp(right, dim=1), 0).sum()


def naive_loss(hidden, weight, targets, teacher, spec):
    """What chunked_loss returns, but from logits [N, V] that exist all at once."""
    T = spec.config.kd_temperature
    logits, tokens = all_logits(hidden, weight.to(hidden.dtype), targets, spec)
    logp = torch.log_softmax(logits, dim=1)
    counted = targets[:, 0] >= 0
    losses = [cross_entropy(logp, tokens, y, counted) for y in targets.unbind(dim=1)]
    ce = sum(share * loss for share, loss in zip(spec.target_weights, losses))
    kl = torch.zeros_like(losses[0])
    if teacher is not None:
        with torch.no_grad():
            taught = torch.log_softmax(all_logits(*teacher, targets, spec)[0] / T, dim=1)
        student = torch.log_softmax(logits / T, dim=1)
        each = F.kl_div(student, taught, reduction="none", log_target=True).sum(dim=1)
        kl = torch.where(counted, each, 0).sum()
    loss = (1 - spec.alpha) * ce + spec.alpha * T ** 2 * kl
    return loss, {"train_loss": losses[0].detach(), "kl": kl.detach()}


class ReplicatedOptimizer:
    """The update of MuonAdamW, by every process on every parameter, one after the other."""

    def __init__(self, named_parameters, config, runtime, tables=None):
        self.config = config
        names = ("features", "weights") if config.spelling else ()
        self.features = [torch.from_numpy(tables[name]).to(runtime.device) for name in names]
        self.runtime = runtime
        self.steps = 0
        table = parameter_table(config)
        self.params = []                # (p, row, kind of optimizer, state)
        for name, p in named_parameters:
            row = find_row(table, name)
            kind = OPTIMIZERS[row.optimizer]
            view = p.detach().unsqueeze(0) if kind.stacked else p.detach()
            self.params.append((p, row, kind, kind.new_state(view)))

    @torch.no_grad()
    def step(self, lr_multiplier=1.0, wd_multiplier=1.0, momentum=None):
        """One update from the parameters' .grad, which it clears."""
        config = self.config
        self.steps += 1
        for p, _, _, _ in self.params:
            self.runtime.all_reduce(p.grad)
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_([p for p, _, _, _ in self.params], config.grad_clip)
        for p, row, kind, state in self.params:
            rates = Rates(row.lr * lr_multiplier, row.shared_lr * lr_multiplier,
                          row.weight_decay * wd_multiplier, self.steps,
                          config.momentum if momentum is None else momentum, row.betas, config,
                          self.runtime.dtype, self.features)
            if kind.stacked:
                kind.update(p.detach().unsqueeze(0), p.grad.unsqueeze(0), state, rates)
            else:
                kind.update(p.detach(), p.grad, state, rates)
            p.grad = None


class PublicTrainer(Trainer):
    """A Trainer whose loss, attention and optimizer are the public ones."""

    def __init__(self, config, runtime, tables=None):
        super().__init__(config, replace(runtime, attention="sdpa"), tables)
        self.loss = naive_loss
        self.last_loss = 0.0

    def backward(self, inputs, targets, plan):
        """As Trainer.backward, but the loss is read after each micro-batch."""
        sums = {}
        for x, y in zip(inputs.split(self.micro_rows), targets.split(self.micro_rows)):
            parts = super().backward(x, y, plan)
            self.last_loss = parts["train_loss"].item()     # waits for the device
            add_sums(sums, parts)
        return sums

    def start_member(self, number, seed, state=None):
        self.model.train().init_weights(seed)
        self.optimizer = ReplicatedOptimizer(self.model.named_parameters(), self.config,
                                             self.runtime, self.tables)
        torch.manual_seed(7919 * seed + self.runtime.rank)
