"""The schedule is the published formula."""

import math

import numpy as np
import pytest

from vpt_jax.errors import UsageError
from vpt_jax.training.schedule import NAMES, rate, warmup_cosine


def test_equals_the_formula_at_every_epoch():
    warmup, total = 10, 100
    expected = [e / warmup if e < warmup else 0.5 * (1 + math.cos(math.pi * (e - warmup) / (total - warmup)))
                for e in range(total)]  # fmt: skip
    factors = warmup_cosine(np.arange(total), warmup, total)
    np.testing.assert_allclose(factors, expected, atol=1e-6)


def test_the_first_epoch_of_a_warm_up_has_rate_zero_and_the_first_after_it_the_full_rate():
    factors = warmup_cosine(np.array([0, 9, 10, 100]), 10, 100)
    np.testing.assert_allclose(factors, [0, 0.9, 1, 0], atol=1e-6)


def test_without_warm_up_the_first_epoch_has_the_full_rate():
    assert warmup_cosine(0, 0, 5) == 1


def test_fractions_of_an_epoch_lie_between_their_neighbours():
    whole = np.asarray(warmup_cosine(np.arange(20), 5, 20))
    half = np.asarray(warmup_cosine(np.arange(19) + 0.5, 5, 20))
    assert ((half - whole[:-1]) * (half - whole[1:]) <= 0).all()


def half_cosine(share):
    return 0.5 * (1 + math.cos(math.pi * share))


def by_hand(name, t, lr, warmup, epochs, length):
    """The published rules in plain Python: the rate of step t."""
    e, exact = t // length, t / length
    if name == 'cosine':
        return lr * (e / warmup if e < warmup else half_cosine((e - warmup) / (epochs - warmup)))
    if name == 'pgn':
        low = lr / 100
        return (
            lr * max(e, 1) / warmup if e < warmup else low + (lr - low) * half_cosine((e - warmup) / (epochs - warmup))
        )
    if name == 'vp':
        w, total = warmup * length, epochs * length
        return lr * (t + 1) / w if t < w else lr * half_cosine((t - w) / (total - w))
    if name == 'multistep':
        return lr * 0.1 ** ((e >= int(0.5 * epochs)) + (e >= int(0.72 * epochs)))
    if name == 'spt':
        return lr * exact / warmup if exact < warmup else 1e-8 + (lr - 1e-8) * half_cosine(
            (exact - warmup) / (epochs - warmup))  # fmt: skip
    late = max(e - 1, 0)
    return 1e-6 + late * (lr - 1e-6) / warmup if late < warmup else 1e-5 + (lr - 1e-5) * half_cosine(late / epochs)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize(('lr', 'warmup', 'epochs', 'length'), [(0.1, 5, 20, 3), (40.0, 1, 7, 8), (1e-3, 10, 100, 2)])
def test_every_schedule_equals_its_published_rule(name, lr, warmup, epochs, length):
    expected = [by_hand(name, t, lr, warmup, epochs, length) for t in range(epochs * length)]
    rates = rate(name, np.arange(epochs * length), lr, warmup, epochs, length)
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-6 * lr)


def test_cvpt_is_one_epoch_late_and_never_at_the_top():
    rates = np.asarray(rate('cvpt', np.arange(100), 1e-3, 10, 100, 1))
    assert rates[0] == rates[1] == np.float32(1e-6)
    assert rates.max() == pytest.approx(0.976e-3, rel=1e-3)


def test_an_unknown_schedule_is_named():
    with pytest.raises(UsageError, match="unknown schedule 'cosin': did you mean 'cosine'"):
        rate('cosin', 0, 1.0, 0, 1, 1)
