"""Masks of masked pretraining: exactly so many patches, in rectangles, a function of the key."""

import jax
import numpy as np
import pytest

from vpt_jax.data.masking import block_masks
from vpt_jax.errors import UsageError


def masks(seed, batch, grid, count, smallest):
    run = jax.jit(block_masks, static_argnums=(1, 2, 3, 4))
    return np.asarray(run(jax.random.key(seed), batch, grid, count, smallest)).reshape(batch, *grid)


@pytest.mark.parametrize(('grid', 'count', 'smallest'), [((14, 14), 75, 16), ((8, 8), 26, 4), ((3, 5), 7, 1)])
def test_exactly_so_many_patches_are_hidden(grid, count, smallest):
    found = masks(0, 32, grid, count, smallest)
    np.testing.assert_array_equal(found.sum((1, 2)), count)
    assert len({mask.tobytes() for mask in found}) > 16


def test_hidden_patches_lie_together():
    found = masks(0, 200, (14, 14), 75, 16)
    agree = (found[:, 1:] == found[:, :-1]).mean()  # neighbours; 0.53 if patches were drawn one by one
    assert agree > 0.75
    # Every place of the grid is hidden now and then.
    assert found.any(0).all() and not found.all(0).any()


def test_the_key_decides():
    a, b, c = masks(1, 4, (8, 8), 26, 4), masks(1, 4, (8, 8), 26, 4), masks(2, 4, (8, 8), 26, 4)
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


@pytest.mark.parametrize('count', [0, 16, -1])
def test_counts_that_cannot_be(count):
    with pytest.raises(UsageError, match='of 4x4 patches cannot be hidden: give a number from 1 to 15'):
        block_masks(jax.random.key(0), 2, (4, 4), count)
    with pytest.raises(UsageError, match='at least 1 patch'):
        block_masks(jax.random.key(0), 2, (4, 4), 3, 0)
