"""The training step as public code writes it, for `train_gpt.py bench` to compare ours with.

The same loss and the same update, but: all logits of a micro-batch at once, cross-entropy and KL
through autograd; every process updates every parameter, one matrix at a time; sliding windows as
full [T, T] masks of PyTorch's attention; the loss is read after every micro-batch. torch.compile,
where a run has it, covers the model's forward (and its backward), not the loss. `t` is the module
train_gpt.
"""
import re
from dataclasses import replace

import torch
import torch.nn.functional as F


def naive_loss(t, hidden, weight, targets, target_weights, teacher_hidden, teacher_weight, alpha,
               temperature, softcap, vocab):
    """What t.ChunkedLoss returns, but from logits [N, V] that exist all at once."""
    logits = t.capped_logits(hidden, weight.to(hidden.dtype), softcap)[:, :vocab]
    counted, logp = targets[:, 0] >= 0, torch.log_softmax(logits, dim=1)
    losses = [F.nll_loss(logp, torch.where(counted, y, -1), ignore_index=-1, reduction="sum")
              for y in targets.unbind(dim=1)]
    ce = sum(share * loss for share, loss in zip(target_weights, losses))
    kl = torch.zeros_like(losses[0])
    if teacher_hidden is not None:
        with torch.no_grad():
            teacher = t.capped_logits(teacher_hidden, teacher_weight, softcap)[:, :vocab]
            teacher = torch.log_softmax(teacher / temperature, dim=1)
        student = torch.log_softmax(logits / temperature, dim=1)
        each = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
        kl = torch.where(counted, each, 0).sum()
    return (1 - alpha) * ce + alpha * temperature ** 2 * kl, losses[0], kl


class ReplicatedOptimizer:
    """The update of t.MuonAdamW, by every process on every parameter, one after the other.

    compiled: as there, since public code compiles AdamW as well.
    """

    def __init__(self, t, named_parameters, c, rt, compiled=None):
        self.t, self.c, self.rt, self.steps, self.groups = t, c, rt, 0, []
        self.compiled = compiled
        for name, p in named_parameters:
            (_, kind, lr, wd, betas), = (
                row for row in t.parameter_table(c) if re.fullmatch(row[0], name))
            self.groups.append(t.ParameterGroup(kind, [p], lr, wd, betas, world=1, rank=0))

    @torch.no_grad()
    def step(self, lr_multiplier=1.0, wd_multiplier=1.0, momentum=None):
        """One update from the parameters' .grad, which it clears."""
        t, c, self.steps = self.t, self.c, self.steps + 1
        momentum = c.momentum if momentum is None else momentum
        params = [group.params[0] for group in self.groups]
        for p in params:
            self.rt.sum(p.grad)
        if c.grad_clip:
            torch.nn.utils.clip_grad_norm_(params, c.grad_clip)
        for group, p in zip(self.groups, params):
            lr, wd = group.lr * lr_multiplier, group.wd * wd_multiplier
            if group.kind == "adamw":
                numbers, update = (self.steps, lr, wd), t.adamw_update
                if self.compiled and p.dim() == 2:
                    numbers, update = map(torch.tensor, map(float, numbers)), self.compiled
                update(p.detach(), p.grad, group.m, group.v, *numbers, *group.betas)
            else:
                t.muon_update(p.unsqueeze(0), p.grad.unsqueeze(0), group.m, group.v, lr, wd,
                              momentum, c.normuon_beta2, c.muon_eq, c.cautious, self.rt.dtype)
            p.grad = None


def public_trainer(t, c, rt, data):
    """A t.Trainer whose loss, attention and optimizer are the public ones."""

    class PublicTrainer(t.Trainer):
        last_loss = 0.0

        def loss(self, hidden, targets, target_weights=None, teacher=None, alpha=0.0):
            """As Trainer.loss, of hidden [B, T, D] and targets [B, T, J]."""
            c, teacher_weight = self.c, None
            if teacher is not None:
                teacher = teacher.flatten(0, 1)
                teacher_weight = self.teacher.head.weight.detach().to(self.rt.dtype)
            weights = self.one if target_weights is None else target_weights
            return naive_loss(t, hidden.flatten(0, 1), self.model.head.weight,
                              targets.flatten(0, 1), weights, teacher, teacher_weight, alpha,
                              c.kd_temperature, c.softcap, c.vocab_size)

        def backward(self, inputs, targets, counts, progress, distill):
            """As Trainer.backward, but the loss is read after each micro-batch."""
            micro = t.micro_batch_rows(self.c, self.rt.world)
            sums = torch.zeros(2, device=self.rt.device)
            for x, y in zip(inputs.split(micro), targets.split(micro)):
                part = super().backward(x, y, counts, progress, distill)
                self.last_loss = part[0].item()     # waits for the device
                sums += part
            return sums

        def start_member(self, c, seed, k):
            self.model.train().init_weights(seed)
            self.optimizer = ReplicatedOptimizer(t, self.model.named_parameters(), c, self.rt,
                                                 self.adamw)
            torch.manual_seed(7919 * seed + self.rt.rank)

    return PublicTrainer(c, replace(rt, attention="sdpa"), None, data)
