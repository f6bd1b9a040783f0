"""Trained GPTs read and write token by token: what was read once is kept.

tools/export.py copies this file beside a copy of train_gpt.py: it imports nothing else.
"""
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

try:
    from .train_gpt import token_logits        # in an exported folder
except ImportError:
    from _runs import token_logits

TEMPERATURE = 0.8


class Reader:
    """What a GPT has read in each row of a batch: tokens, keys and values of each run of a layer
    (looped layers run several times), and final hidden states if it remembers the row.

    A row has at most config.seq_len tokens, as in training. When it is full, its last half is read
    again as the beginning of a new one. padding: int64 [B], tokens in front of each row that are
    none; nothing sees them.
    """

    def __init__(self, model, padding):
        self.model = model
        self.specs = model.specs()
        self.padding = padding
        self.tokens = padding.new_empty(len(padding), 0)
        self.kept = []          # (keys, values), each [B, T, H, Dh], of all runs in their order
        self.earlier = None     # an iterator over them while more is read
        self.hidden = None      # [B, T, D]

    def read(self, tokens, last):
        """Go on with int64 `tokens` [B, n], however many: log p of what follows each of the last
        `last` of them, fp32 [B, last, vocab_size]."""
        length = self.model.config.seq_len
        logps = []
        while tokens.shape[1]:
            if self.tokens.shape[1] == length:
                self.begin_again()
            room = length - self.tokens.shape[1]
            fitting, tokens = tokens[:, :room], tokens[:, room:]
            hidden = self.extend(fitting)
            wanted = min(fitting.shape[1], last - tokens.shape[1])
            if wanted > 0:
                logps.append(self.logp(hidden[:, -wanted:]))
        return torch.cat(logps, dim=1)

    def begin_again(self):
        """Drop the first half of a full row, read the other again."""
        dropped = self.tokens.shape[1] - self.tokens.shape[1] // 2
        tokens = self.tokens[:, dropped:]
        self.padding = (self.padding - dropped).clamp(min=0)
        self.tokens = tokens[:, :0]
        self.kept, self.hidden = [], None
        self.extend(tokens)

    def extend(self, tokens):
        """Final hidden states [B, n, D] of int64 `tokens` [B, n], for which the row has room."""
        start = self.tokens.shape[1]
        self.tokens = torch.cat((self.tokens, tokens), dim=1)
        distance, is_token = self.places(tokens.shape[1])
        masks = {window: ((distance >= 0) & (distance <= window) & is_token | (distance == 0))
                 for window in {spec.window for spec in self.specs.attention}}
        attention = []
        for spec in self.specs.attention:
            rope = [turn[start:self.tokens.shape[1]] for turn in spec.rope]
            attention.append(spec._replace(
                mask=masks[spec.window].unsqueeze(1), rope=rope, from_before=None,
                path=functools.partial(self.attend, spec.from_before)))
        self.earlier, self.kept = iter(self.kept), []
        hidden = self.model(tokens, self.specs._replace(attention=attention))
        if self.model.config.row_memory:
            self.hidden = hidden if start == 0 else torch.cat((self.hidden, hidden), dim=1)
        return hidden

    def places(self, count):
        """(How far the row's positions are before its last `count`, int64 [count, T]; whether a
        token stands there, bool [B, 1, T])."""
        position = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        distance = position[len(position) - count:, None] - position
        return distance, position >= self.padding[:, None, None]

    def attend(self, from_before, q, k, v, spec):
        """train_gpt.attend of the queries of new tokens to all that the row has, [B, n, H, Dh].
        from_before: AttentionSpec's, whose keys of the token before are made here."""
        earlier = next(self.earlier, None)
        if earlier is not None:
            k = torch.cat((earlier[0], k), dim=1)
            v = torch.cat((earlier[1], v), dim=1)
        self.kept.append((k, v))
        if from_before is not None:
            is_first = torch.arange(k.shape[1], device=k.device) == self.padding[:, None]
            before = torch.cat((k[:, :1], k[:, :-1]), dim=1)
            k = torch.where(from_before & ~is_first[:, :, None, None], before, k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=spec.mask, scale=spec.scale)
        return y.transpose(1, 2)

    def logp(self, hidden):
        """log p of what follows the last n tokens read, fp32 [B, n, vocab_size], as token_logits
        has it. hidden [B, n, D]: theirs."""
        config = self.model.config
        weight = self.model.head.weight.to(hidden.dtype)
        B, n, D = hidden.shape
        logits, _, _ = token_logits(hidden.reshape(B * n, D), weight, self.tokens[:1, 0], config, 0)
        logits = logits[:, :config.vocab_size].view(B, n, -1)
        if not config.row_memory:
            return logits.log_softmax(dim=2)
        similar = (hidden @ self.hidden.mT).to(logits.dtype) * D ** -0.5
        distance, is_token = self.places(n)
        similar = torch.where((distance > 0) & is_token, similar, -torch.inf)
        log_all = torch.cat((logits, similar), dim=2).logsumexp(dim=2, keepdim=True)
        following = F.pad(self.tokens[:, 1:], (0, 1)).unsqueeze(1).expand(similar.shape)
        remembered = torch.zeros_like(logits).scatter_add(2, following, (similar - log_all).exp())
        least = torch.finfo(logits.dtype).tiny          # log 0 would have no gradient
        return torch.logaddexp(logits - log_all, remembered.clamp(min=least).log())

    def reorder(self, rows):
        """Let row i go on from what row rows[i] has read; rows: int64 [B]."""
        self.tokens, self.padding = self.tokens[rows], self.padding[rows]
        self.kept = [(k[rows], v[rows]) for k, v in self.kept]
        self.hidden = None if self.hidden is None else self.hidden[rows]


class Mixture(nn.Module):
    """GPTs whose probabilities are mixed; weights: of each, above 0, 1 together."""

    def __init__(self, members, weights):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.weights = weights

    def readers(self, padding):
        """A Reader for each member, which have read nothing. padding: int64 [B], as Reader's."""
        return [Reader(member, padding) for member in self.members]

    def forward(self, tokens, readers, last):
        """Let all readers read `tokens`; the mixture's log p, else as Reader.read."""
        logps = (reader.read(tokens, last) + math.log(weight)
                 for reader, weight in zip(readers, self.weights))
        return functools.reduce(torch.logaddexp, logps)


def choose(logp, temperature, top_k, top_p, generator):
    """Tokens int64 [B] drawn by log p [B, V]: of the top_k likeliest (0: all), of the fewest that
    have top_p of the probability together; temperature 0: the likeliest."""
    if not temperature:
        return logp.argmax(dim=1)
    p = torch.softmax(logp / temperature, dim=1)
    if top_k:
        least = p.topk(min(top_k, p.shape[1]), dim=1).values[:, -1:]
        p = torch.where(p >= least, p, 0)
        p = p / p.sum(dim=1, keepdim=True)
    if top_p < 1:
        ordered, order = p.sort(dim=1, descending=True)
        is_beyond = ordered.cumsum(dim=1) - ordered >= top_p
        p = torch.zeros_like(p).scatter(1, order, torch.where(is_beyond, 0, ordered))
    return torch.multinomial(p, 1, generator=generator).squeeze(1)


@torch.no_grad()
def generate(mixture, tokens, count, temperature=TEMPERATURE, top_k=0, top_p=1.0, seed=1):
    """Yield what the mixture writes after int64 `tokens` [B, n]: `count` times int64 [B]."""
    generator = torch.Generator().manual_seed(seed)
    readers = mixture.readers(tokens.new_zeros(len(tokens)))
    for _ in range(count):
        logp = mixture(tokens, readers, last=1)[:, 0]
        chosen = choose(logp.double().cpu(), temperature, top_k, top_p, generator)
        yield chosen
        tokens = chosen.unsqueeze(1).to(tokens.device)
