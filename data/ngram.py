"""A count-based member of the ensemble: Kneser-Ney n-grams.

It errs where neural members do not, so it earns a weight in their mixture, and counting takes
seconds. NumPy only; no loop over tokens.
"""
import numpy as np

SHIFT = np.uint64(16)       # bits of a token in a packed n-gram
BLOCK = 1 << 20             # targets that are scored at once
BUCKETS = 16                # of contexts, by NGram.support
PRIOR = 30                  # tokens that pull the weights of a bucket to those of all tokens


class NGram:
    """Interpolated Kneser-Ney n-grams with modified discounts (Chen & Goodman, 1999), order 1 to 4.

    Counted on uint16 `tokens` [n], documents that begin with `bos`; contexts end at the document's
    BOS, which is predicted as well, as the end of the document before. Each order has sorted keys
    (its tokens packed in 64 bits, the last one lowest) with their counts: occurrences at the top
    and behind a BOS, else the distinct tokens in front; and sorted contexts with the total of their
    counts and the share of probability that discounting leaves to the order below.
    """

    def __init__(self, tokens, vocab_size, bos, order=4):
        if not 1 <= order <= 4 or vocab_size > 1 << 16:
            raise ValueError("four tokens of at most 16 bits are what a key holds")
        self.bos, self.uniform, self.tables = bos, 1 / vocab_size, {}
        reach, above = self.reach(tokens), None
        for k in range(order, 0, -1):
            keys = self.pack(tokens, k, reach)
            if above is not None:       # nothing stands in front of a BOS: those keep occurrences
                first = keys[keys >> np.uint64(16 * (k - 1)) == bos] if k > 1 else keys[:0]
                keys = np.concatenate((above & np.uint64((1 << 16 * k) - 1), first))
            if not len(keys):           # no document is as long as that
                continue
            above, counts = unique(keys)
            contexts, start = unique(above >> SHIFT, starts=True)
            total = np.add.reduceat(counts, start)
            discount = modified_discounts(counts)
            left = np.add.reduceat(discount[np.minimum(counts, 3)], start) / total
            self.tables[k] = above, counts, discount, contexts, total, left

    def reach(self, tokens):
        """Tokens of its document in front of each but the first of `tokens`, its BOS included."""
        index = np.arange(len(tokens))
        starts = np.maximum.accumulate(np.where(tokens == self.bos, index, 0))
        return index[1:] - starts[:-1]

    def pack(self, tokens, k, reach):
        """uint64 keys of the k-grams that end at a target with k - 1 tokens in reach."""
        ends = np.flatnonzero(reach >= k - 1) + 1
        keys = np.zeros(len(ends), np.uint64)
        for back in range(k):
            keys |= tokens[ends - back].astype(np.uint64) << np.uint64(16 * back)
        return keys

    def logprobs(self, tokens):
        """log p(target) of all but the first of `tokens`: fp32 [n - 1]."""
        blocks = []
        for first in range(1, len(tokens), BLOCK):      # with the tokens that its contexts reach
            before = min(first, max(1, max(self.tables) - 1))
            part = tokens[first - before:first + BLOCK]
            reach = self.reach(part)
            p = np.full(len(reach), self.uniform)
            for k, table in sorted(self.tables.items()):
                which = reach >= k - 1
                p[which] = interpolate(p[which], self.pack(part, k, reach), *table)
            blocks.append(np.log(p[before - 1:]).astype(np.float32))
        return np.concatenate(blocks)

    def support(self, tokens):
        """How much is known of each target's context, 0 to 15: int [n - 1].

        4 (k - 1) + log4 of the total of its counts, at most 3; k: the longest order that has it.
        """
        reach, known = self.reach(tokens), np.zeros(len(tokens) - 1, np.int8)
        for k, (_, _, _, contexts, total, _) in sorted(self.tables.items()):
            context, seen = find(contexts, self.pack(tokens, k, reach) >> SHIFT)
            size = np.minimum(np.log2(total[context]) / 2, 3).astype(np.int8)
            which = np.flatnonzero(reach >= k - 1)[seen]
            known[which] = 4 * (k - 1) + size[seen]
        return known

    def score(self, splits, prior):
        """({split: log p(target)}, a function that weighs the members of a mixture by context).

        splits: {split: tokens}; prior: as weights_by_bucket's. The function takes {split: log p of
        the targets [k, n]} and the weights [k] of all tokens, and returns {split: weights [k, n]}.
        """
        buckets = {split: self.support(tokens) for split, tokens in splits.items()}

        def weigh(logps, weights):
            table = weights_by_bucket(logps["selection"], buckets["selection"], weights, prior)
            return {split: table[:, bucket] for split, bucket in buckets.items()}

        return {split: self.logprobs(tokens) for split, tokens in splits.items()}, weigh


def score_ngram(order, vocab_size, data):
    """What NGram.score returns of an n-gram counted on the training tokens of a Dataset."""
    ngram = NGram(np.concatenate(data.train), vocab_size, data.bos, order)
    splits = {split: np.concatenate(documents) for split, documents in data.scored.items()}
    return ngram.score(splits, PRIOR)


def interpolate(lower, wanted, keys, counts, discount, contexts, total, left):
    """p of the n-grams `wanted`, given `lower`, that of the order below."""
    context, seen = find(contexts, wanted >> SHIFT)
    gram, known = find(keys, wanted)
    count = np.where(known, counts[gram], 0)
    p = (count - discount[np.minimum(count, 3)]) / total[context] + left[context] * lower
    return np.where(seen, p, lower)


def weights_by_bucket(logps, buckets, weights, prior, iterations=100):
    """Mixture weights [k, BUCKETS], fitted on log p(target) [k, n] and buckets [n].

    With a Dirichlet prior: as if `weights` [k], those of all tokens, came from `prior` tokens more.
    """
    table = np.repeat(weights[:, None], BUCKETS, axis=1)
    for bucket in np.unique(buckets):
        p = np.exp(np.asarray(logps, np.float64)[:, buckets == bucket])
        for _ in range(iterations):
            w = table[:, bucket]
            seen = w * (p / (w @ p)).sum(axis=1) + prior * weights
            table[:, bucket] = seen / (p.shape[1] + prior)
    return table


def modified_discounts(counts):
    """What is taken from counts of 0, 1, 2, and 3 or more; Ney's estimate from counts of counts."""
    n1, n2, n3, n4 = (int((counts == n).sum()) for n in (1, 2, 3, 4))
    if not n1 * n2 * n3:
        return np.array((0, 0.5, 1, 1.5))
    y = n1 / (n1 + 2 * n2)
    estimate = (0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return np.clip(estimate, (0, 0.1, 0.1, 0.1), (0, 1, 2, 3))


def unique(keys, starts=False):
    """(sorted distinct keys, how often each occurs or, for sorted keys, where it starts)."""
    keys = keys if starts else np.sort(keys)
    start = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    return keys[start], start if starts else np.diff(start, append=len(keys)).astype(np.int32)


def find(keys, wanted):
    """(index in the sorted `keys`, whether it is there) of each of `wanted`."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return index, keys[index] == wanted
