"""The training step as public code writes it, for bench.py to compare ours with.

The same loss and the same update, but: all logits of a micro-batch at once, cross-entropy and KL
through autograd; every process updates every parameter, one matrix at a time; sliding windows as
full [T, T] masks of PyTorch's attention; the loss is read after every micro-batch. torch.compile,
where a run has it, covers the model's forward (and its backward), not the loss.
"""
from dataclasses import replace

import torch
import torch.nn.functional as F

from train_gpt import OPTIMIZERS, Rates, Trainer, add_sums, capped_logits, find_row, parameter_table


def naive_loss(hidden, weight, targets, teacher, spec):
    """What chunked_loss returns, but from logits [N, V] that exist all at once."""
    config, T = spec.config, spec.config.kd_temperature
    real = slice(config.vocab_size)
    logits = capped_logits(hidden, weight.to(hidden.dtype), config.softcap)[:, real]
    logp = torch.log_softmax(logits, dim=1)
    counted = targets[:, 0] >= 0
    losses = [F.nll_loss(logp, torch.where(counted, y, -1), ignore_index=-1, reduction="sum")
              for y in targets.unbind(dim=1)]
    ce = sum(share * loss for share, loss in zip(spec.target_weights, losses))
    kl = torch.zeros_like(losses[0])
    if teacher is not None:
        with torch.no_grad():
            taught = capped_logits(*teacher, config.softcap)[:, real]
            taught = torch.log_softmax(taught / T, dim=1)
        student = torch.log_softmax(logits / T, dim=1)
        each = F.kl_div(student, taught, reduction="none", log_target=True).sum(dim=1)
        kl = torch.where(counted, each, 0).sum()
    loss = (1 - spec.alpha) * ce + spec.alpha * T ** 2 * kl
    return loss, {"train_loss": losses[0].detach(), "kl": kl.detach()}


class ReplicatedOptimizer:
    """The update of MuonAdamW, by every process on every parameter, one after the other."""

    def __init__(self, named_parameters, config, runtime):
        self.config = config
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
            rates = Rates(row.lr * lr_multiplier, row.weight_decay * wd_multiplier, self.steps,
                          config.momentum if momentum is None else momentum, row.betas, config,
                          self.runtime.dtype)
            if kind.stacked:
                kind.update(p.detach().unsqueeze(0), p.grad.unsqueeze(0), state, rates)
            else:
                kind.update(p.detach(), p.grad, state, rates)
            p.grad = None


class PublicTrainer(Trainer):
    """A Trainer whose loss, attention and optimizer are the public ones."""

    def __init__(self, config, runtime):
        super().__init__(config, replace(runtime, attention="sdpa"))
        self.last_loss = 0.0

    def loss(self, hidden, targets, spec, teacher=None):
        """As Trainer.loss, of hidden [B, T, D] and targets [B, T, J]."""
        return naive_loss(hidden.flatten(0, 1), self.model.head.weight, targets.flatten(0, 1),
                          teacher, spec)

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
                                             self.runtime)
        torch.manual_seed(7919 * seed + self.runtime.rank)
