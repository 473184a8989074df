"""The schedule is the published formula."""

import math

import numpy as np

from vpt_jax.training.schedule import warmup_cosine


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
