"""Mixtures of members against full distributions, and the n-gram against dictionaries.

    python -m pytest tests/test_ensemble.py
"""
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import mix
from data import ngram
from data.ngram import BUCKETS, weights_by_bucket
from helpers import relative_error
from train_gpt import ensemble_curve, fit_mixture, learned_mixture, mean_loss, mixture_logp


# ==== Mixtures ==================================================================================
def random_logps(members, tokens, seed=0):
    return -np.random.default_rng(seed).exponential(2, size=(members, tokens))


def test_mean_loss_is_summed_in_fp64():
    logp = np.full(1 << 20, -1.0, np.float32)
    logp[::2] = -1e-6
    assert mean_loss(logp) == pytest.approx((1 + 1e-6) / 2, rel=1e-9)


@pytest.mark.parametrize("weights", [None, (0.2, 0.5, 0.3), (0.0, 1.0, 0.0), "by token"])
def test_mixture_against_full_distributions(weights):
    """The distributions are mixed as a whole, the target's probability is looked up then."""
    random = np.random.default_rng(0)
    p = random.dirichlet(np.ones(30), size=(3, 50))         # [members, tokens, vocabulary]
    targets = random.integers(0, 30, 50)
    shares = np.full((3, 50), 1 / 3) if weights is None else np.zeros((3, 50))
    if weights == "by token":
        weights = shares = random.dirichlet(np.ones(3), 50).T
        shares[:, 7] = 0, 1, 0
    elif weights is not None:
        shares += np.array(weights)[:, None]
    full = (shares[:, :, None] * p).sum(axis=0)
    assert np.allclose(full.sum(axis=1), 1)
    index = np.arange(50)
    ours = mixture_logp(np.log(p[:, index, targets]), weights)
    assert ours.dtype == np.float64
    assert relative_error(ours, np.log(full[index, targets])) < 1e-12


def test_mixture_of_very_small_probabilities():
    assert np.allclose(mixture_logp([[-2000.0, -1.0], [-2001.0, -5000.0]]),
                       [-2000 + np.log((1 + np.exp(-1)) / 2), -1 - np.log(2)])


@pytest.mark.parametrize("advantage", [0.0, 0.3, 3.0])
def test_fit_mixture_of_two_against_a_grid(advantage):
    logps = random_logps(2, 500)
    logps[0] += advantage           # 3: the second has nothing to add, its weight is 0

    def loss(w):
        return -np.mean(np.log(w * np.exp(logps[0]) + (1 - w) * np.exp(logps[1])))

    best = min(np.linspace(0, 1, 10_001), key=loss)
    weights = fit_mixture(logps)
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
    assert loss(weights[0]) <= loss(best) + 1e-5
    assert abs(weights[0] - best) < 0.01


def test_fit_mixture_of_four_is_optimal():
    """KKT: no member's gradient exceeds 1, and those that have weight reach it."""
    logps = random_logps(4, 600, seed=1) + np.array([[0.2], [0.0], [-0.1], [-2.0]])
    weights = fit_mixture(logps)
    p = np.exp(logps)
    gradient = np.array([np.mean(one / (weights @ p)) for one in p])
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
    assert gradient.max() < 1 + 2e-5
    assert np.abs(gradient - 1)[weights > 0.01].max() < 1e-3
    assert weights[3] < 1e-3 and gradient[3] < 1                # the useless one is left out
    assert np.allclose(fit_mixture(logps - 700), weights)       # it is the ratios that count


def log_posterior(table, p, weights, prior):
    """Of weights [k], by likelihood and by a Dirichlet prior that `prior` tokens have made."""
    return np.log(table @ p).sum() + prior * weights @ np.log(table)


def fitted_by_bucket(members, prior):
    """logps, buckets, weights of all and those by bucket; buckets 3 and 5 have no tokens."""
    logps = random_logps(members, 400, seed=3)
    buckets = np.random.default_rng(3).choice([0, 1, 2, 4], 400)
    weights = np.array((0.2, 0.5, 0.3)[:members])
    weights = weights / weights.sum()
    table = weights_by_bucket(list(logps), buckets, weights, prior)
    assert table.shape == (members, BUCKETS)
    assert np.allclose(table.sum(axis=0), 1) and (table >= 0).all()
    for bucket in (3, 5):                       # the weights of all
        assert np.allclose(table[:, bucket], weights)
    return logps, buckets, weights, table


@pytest.mark.parametrize("prior", [1.0, 30.0, 1000.0])
def test_weights_by_bucket_of_two_against_a_grid(prior):
    logps, buckets, weights, table = fitted_by_bucket(2, prior)
    grid = np.linspace(0, 1, 2001)[1:-1]
    for bucket in np.unique(buckets):
        p = np.exp(logps[:, buckets == bucket])
        best = max(grid, key=lambda w: log_posterior(np.array([w, 1 - w]), p, weights, prior))
        assert table[0, bucket] == pytest.approx(best, abs=2e-3)


def test_weights_by_bucket_climb_to_the_mode():
    """No weights nearby are more probable."""
    logps, buckets, weights, table = fitted_by_bucket(3, 30.0)
    for bucket in np.unique(buckets):
        p = np.exp(logps[:, buckets == bucket])
        best = log_posterior(table[:, bucket], p, weights, 30.0)
        for direction in ((1, -1, 0), (0, 1, -1), (1, 0, -1)):
            for step in (1e-2, -1e-2):
                nearby = table[:, bucket] + step * np.array(direction)
                assert best > log_posterior(nearby, p, weights, 30.0)


# ==== Ensembles =================================================================================
PARTS = {"selection": slice(0, 60), "val": slice(60, 120), "holdout": slice(120, 150)}


def by_split(values):
    return {split: values[part] for split, part in PARTS.items()}


def naive_losses(logps, weights=None):
    """{split: loss} of a mixture of [k, n] with weights [k] or [k, n] (None: equal)."""
    p = np.exp(logps)
    shares = np.full(len(p), 1 / len(p)) if weights is None else weights
    shares = np.broadcast_to(shares.T, p.T.shape).T
    mixed = -np.log((shares * p).sum(axis=0))
    return {split: mixed[part].mean() for split, part in PARTS.items()}


def assert_learned(point, name, logps, buckets=None, prior=30.0):
    """The losses of a learned mixture are those of weights fitted on selection alone."""
    here = PARTS["selection"]
    weights = fit_mixture(logps[:, here])
    assert point[f"weights_{name}"] == pytest.approx(weights, abs=1e-4)
    if buckets is not None:
        table = weights_by_bucket(logps[:, here], buckets[here], weights, prior)
        weights = table[:, buckets]
    expected = naive_losses(logps, weights)
    for split in PARTS:
        assert point[f"{split}_loss_{name}"] == pytest.approx(expected[split], rel=1e-9)


def test_ensemble_curve_against_full_distributions():
    """Of 1, 2, 3 members; alone, and of all with an n-gram by bucket."""
    logps = random_logps(3, 150).astype(np.float32)
    counted = random_logps(1, 150, seed=1)[0]
    buckets = np.random.default_rng(2).integers(0, 4, 150)
    buckets[PARTS["val"]][0] = 6                # a bucket that selection has not seen

    def weigh(by_split_logps, weights):
        table = weights_by_bucket(by_split_logps["selection"], buckets[PARTS["selection"]], weights,
                                  prior=7)
        return {split: table[:, buckets[part]] for split, part in PARTS.items()}

    members = [by_split(logp) for logp in logps]
    curve, logps = ensemble_curve(members), logps.astype(np.float64)
    assert [point["n"] for point in curve] == [1, 2, 3]
    for point in curve:
        first = logps[:point["n"]]
        for split, loss in naive_losses(first).items():
            assert point[f"{split}_loss"] == pytest.approx(loss, rel=1e-12)
        assert_learned(point, "learned", first)
        assert set(point) == {"n", "weights_learned", *(
            split + loss for split in PARTS for loss in ("_loss", "_loss_learned"))}
    joined = mix.with_ngram(members, by_split(counted), weigh)
    assert_learned(joined, "ngram", np.vstack((logps, counted)), buckets, prior=7)
    assert set(joined) == {"weights_ngram", *(f"{split}_loss_ngram" for split in PARTS)}


def test_learned_mixture_is_rounded_for_show_only():
    logps = random_logps(3, 150, seed=5)
    losses, shown = learned_mixture([by_split(logp) for logp in logps])
    assert set(losses) == {"selection", "val", "holdout"}
    assert shown == [round(weight, 6) for weight in shown]
    assert sum(shown) == pytest.approx(1, abs=2e-6)
    exact = naive_losses(logps, fit_mixture(logps[:, PARTS["selection"]]))
    for split, loss in losses.items():
        assert loss == pytest.approx(exact[split], rel=1e-12)


def test_learned_weights_see_selection_only():
    logps = random_logps(2, 150)
    members = [by_split(logp) for logp in logps]
    _, before = learned_mixture(members)
    for split in ("val", "holdout"):
        members[0][split] = members[0][split] + 5
    _, after = learned_mixture(members)
    assert before == after


def test_ensemble_without_selection_learns_nothing():
    members = [{"val": logp[:20], "holdout": logp[20:]} for logp in random_logps(3, 40)]
    for point in ensemble_curve(members):
        assert set(point) == {"n", "val_loss", "holdout_loss"}


def test_beyond_16_members_weights_are_fitted_for_powers_of_two_and_all():
    logps = random_logps(35, 150)
    curve = ensemble_curve([by_split(logp) for logp in logps])
    assert all("val_loss" in point for point in curve)
    fitted = [point["n"] for point in curve if "val_loss_learned" in point]
    assert fitted == [*range(1, 17), 32, 35]
    for n in (16, 32, 35):
        for split, loss in naive_losses(logps[:n]).items():
            assert curve[n - 1][f"{split}_loss"] == pytest.approx(loss, rel=1e-12)
        assert_learned(curve[n - 1], "learned", logps[:n])


# ==== The n-gram ================================================================================
class SlowKneserNey:
    """Interpolated modified Kneser-Ney with dictionaries, from the formulas of Chen and Goodman.

    c: occurrences at the highest order, else the number of distinct tokens seen in front; n-grams
    that begin with BOS have nothing in front and keep their occurrences. Contexts end at BOS.
    """

    def __init__(self, tokens, vocab_size, bos, order):
        self.vocab_size = vocab_size
        self.bos = bos
        self.order = order
        occurrences = {k: Counter() for k in range(1, order + 1)}
        for i in range(1, len(tokens)):
            history = self.history(tokens, i)
            for k in range(1, min(order, len(history) + 1) + 1):
                occurrences[k][(*history[len(history) - k + 1:], tokens[i])] += 1
        self.counts = {}            # of each order: {gram: c}
        self.followers = {}         # of each order: {context: c of its grams}
        self.discounts = {}         # of each order: of c = 0, 1, 2, and 3 or more
        for k in range(1, order + 1):
            in_front = Counter(gram[1:] for gram in occurrences.get(k + 1, ()))
            self.counts[k] = {gram: occurrences[k][gram] if k == order or k > 1 and gram[0] == bos
                              else in_front[gram] for gram in occurrences[k]}
            self.followers[k] = {}
            for gram, count in self.counts[k].items():
                self.followers[k].setdefault(gram[:-1], []).append(count)
            n = [sum(count == size for count in self.counts[k].values()) for size in range(5)]
            self.discounts[k] = (0, 0.5, 1, 1.5)
            if all(n[1:4]):
                y = n[1] / (n[1] + 2 * n[2])
                self.discounts[k] = (0, *(size - (size + 1) * y * n[size + 1] / n[size]
                                          for size in (1, 2, 3)))

    def history(self, tokens, i):
        """The tokens of its document in front of tokens[i], BOS included."""
        start = i - 1
        while start > 0 and tokens[start] != self.bos:
            start -= 1
        return tuple(tokens[start:i])

    def contexts(self, history):
        """(order, context) of those that have been seen, the shortest first."""
        for k in range(1, min(self.order, len(history) + 1) + 1):
            context = tuple(history[len(history) - k + 1:])
            if context in self.followers[k]:
                yield k, context

    def probability(self, history, token):
        p = 1 / self.vocab_size
        for k, context in self.contexts(history):
            counts = self.followers[k][context]
            count = self.counts[k].get((*context, token), 0)
            kept = sum(self.discounts[k][min(n, 3)] for n in counts) / sum(counts)
            p = (count - self.discounts[k][min(count, 3)]) / sum(counts) + kept * p
        return p

    def support(self, history):
        """4 (order - 1) + log4 of the total count of the longest context that has been seen."""
        k, context = [*self.contexts(history)][-1]
        return 4 * (k - 1) + min(3, int(math.log(sum(self.followers[k][context]), 4) + 1e-9))


VOCAB, BOS = 30, 29


def random_documents(count, seed):
    """Documents of all lengths, of a skewed bigram model over 25 of the 29 other tokens."""
    random = np.random.default_rng(seed)
    rows = np.random.default_rng(0).permuted(np.tile(1 / np.arange(1, 26) ** 1.5, (25, 1)), axis=1)
    rows = np.cumsum(rows / rows.sum(axis=1, keepdims=True), axis=1)
    tokens = [BOS]
    while len(tokens) < count:
        if random.random() < 0.08:
            tokens.append(BOS)
        else:
            tokens.append(int(np.searchsorted(rows[tokens[-1] % 25][:-1], random.random())))
    return tokens


def as_tokens(tokens):
    return np.array(tokens, np.uint16)


def ngram_of(tokens, order):
    return ngram.NGram(as_tokens(tokens), VOCAB, BOS, order)


@pytest.fixture(scope="module")
def train():
    return random_documents(3000, 1)


@pytest.fixture(scope="module")
def held_out():
    return [*random_documents(400, 2), 27, 28, 3, 27, BOS, 5]      # 27, 28: tokens never seen


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [25, 3000])
def test_ngram_against_dictionaries(order, count, train, held_out):
    """Probabilities, and how much is known of each context."""
    slow = SlowKneserNey(train[:count], VOCAB, BOS, order)
    fast = ngram_of(train[:count], order)
    logps, _ = fast.score({"val": as_tokens(held_out)}, prior=30)
    histories = [slow.history(held_out, i) for i in range(1, len(held_out))]
    expected = [math.log(slow.probability(history, token))
                for history, token in zip(histories, held_out[1:])]
    assert logps["val"].dtype == np.float32
    assert relative_error(logps["val"], expected) < 1e-6
    known = fast.support(as_tokens(held_out)).tolist()
    assert known == [slow.support(history) for history in histories]
    if count == 3000 and order > 1:         # discounts are estimated, not the fallback
        assert slow.discounts[order] != (0, 0.5, 1, 1.5)


@pytest.mark.parametrize("order", [1, 4])
def test_ngram_probabilities_sum_to_one(order, train):
    """Behind a seen context, an unseen one, one of unseen tokens, and at a document's start."""
    model = ngram_of(train, order)
    for context in (train[:4], train[100:106], [BOS, 28, 27, 26], [BOS, 3, 28, 4], [BOS],
                    [BOS, 7], [BOS, 7, 28]):
        p = [math.exp(model.logprobs(as_tokens([*context, token]))[-1]) for token in range(VOCAB)]
        assert min(p) > 0 and sum(p) == pytest.approx(1, abs=1e-5), context


def test_ngram_contexts_end_at_bos(train):
    """Behind a BOS nothing depends on the document in front of it; BOS itself is predicted."""
    model = ngram_of(train, 4)
    one, two, last = [BOS, 1, 2, 3, 4], [BOS, 9, 8], [BOS, 5, 6, 7, 1]
    first, second, alone = (model.logprobs(as_tokens(x)) for x in (one + last, two + last, last))
    assert np.array_equal(first[-4:], alone) and np.array_equal(second[-4:], alone)
    assert len(first) == len(one + last) - 1 and first[len(one) - 1] != second[len(two) - 1]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 64])
def test_ngram_blocks_change_nothing(block, train, held_out, monkeypatch):
    model = ngram_of(train, 4)
    whole = model.logprobs(as_tokens(held_out))
    monkeypatch.setattr(ngram, "BLOCK", block)
    assert np.array_equal(model.logprobs(as_tokens(held_out)), whole)


def test_ngram_gives_no_token_a_probability_of_zero():
    """Nor when the estimate of a discount is negative: with many n-grams that occur 4 times."""
    times = {(1, 2): 4, (3, 4): 4, (5, 6): 4, (7, 8): 3, (9, 10): 2, (11, 12): 1}
    tokens = [token for pair, count in times.items() for token in (BOS, *pair) * count]
    assert np.isfinite(ngram_of(tokens, 2).logprobs(as_tokens([BOS, 1, 20]))).all()


def test_ngram_of_documents_shorter_than_its_order():
    """Orders that no document is long enough for are left out."""
    short = [BOS, 1, BOS, 2, BOS, 1]
    held = [BOS, 1, 2, 1, 2, BOS, 2]
    slow = SlowKneserNey(short, VOCAB, BOS, 4)
    expected = [math.log(slow.probability(slow.history(held, i), held[i]))
                for i in range(1, len(held))]
    assert relative_error(ngram_of(short, 4).logprobs(as_tokens(held)), expected) < 1e-6


def test_ngram_order_and_vocabulary_have_limits():
    for vocab_size, order in ((VOCAB, 0), (VOCAB, 5), ((1 << 16) + 1, 2)):
        with pytest.raises(ValueError, match="16 bits"):
            ngram.NGram(as_tokens([BOS, 1, 2]), vocab_size, BOS, order)


def documents_of(tokens):
    starts = [i for i, token in enumerate(tokens) if token == BOS]
    return [as_tokens(tokens[a:b]) for a, b in zip(starts, [*starts[1:], len(tokens)])]


def test_score_ngram_counts_train_and_scores_the_rest(train, held_out):
    data = SimpleNamespace(train=documents_of(train), bos=BOS, scored={
        "selection": documents_of(train[:50]), "val": documents_of(held_out)})
    logp, _ = ngram.score_ngram(3, VOCAB, data)
    expected = ngram_of(train, 3)
    for split, tokens in (("selection", train[:50]), ("val", held_out)):
        assert np.array_equal(logp[split], expected.logprobs(as_tokens(tokens)))
    assert set(logp) == {"selection", "val"}


def test_there_is_a_bucket_for_the_most_that_can_be_known():
    tokens = [BOS, 1, 2, 3] * 100
    assert max(ngram_of(tokens, 4).support(as_tokens(tokens))) == BUCKETS - 1


def test_the_ngram_weighs_by_what_it_knows_of_contexts(train, held_out):
    """By buckets of its support, fitted on selection with the prior."""
    data = SimpleNamespace(train=documents_of(train), bos=BOS, scored={
        "selection": documents_of(train[:90]), "val": documents_of(held_out)})
    scores, weigh = ngram.score_ngram(3, VOCAB, data)
    logps = {split: np.stack([np.full(len(p), -2.0), p]) for split, p in scores.items()}
    weights = np.array([0.7, 0.3])
    found = weigh(logps, weights)
    support = {split: ngram_of(train, 3).support(as_tokens(tokens))
               for split, tokens in (("selection", train[:90]), ("val", held_out))}
    table = weights_by_bucket(logps["selection"], support["selection"], weights, ngram.PRIOR)
    for split, buckets in support.items():
        assert np.array_equal(found[split], table[:, buckets])
    assert not np.allclose(found["val"], weights[:, None])
