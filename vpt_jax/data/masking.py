"""Which patches masked pretraining hides: rectangles, until a fixed number is hidden (BEiT, arXiv 2106.08254)."""

import math

import jax
import jax.numpy as jnp

from vpt_jax.errors import UsageError

#: Rectangles that are tried at most; whatever is then missing is drawn patch by patch.
_ATTEMPTS = 48
#: Height over width lies between this and its inverse.
_FLATTEST = 0.3


def block_masks(key: jax.Array, batch: int, grid: tuple[int, int], count: int, smallest: int = 16) -> jax.Array:
    """Masks with exactly `count` patches each.

    Rectangles of between `smallest` and as many patches as are still missing, height over width log-uniform in
    [0.3, 1 / 0.3], are laid at random until none is missing; one that would hide too many, or nothing new, is passed
    over. Patches that are missing after so many attempts are drawn one by one (microsoft/unilm@768a3c87
    beit2/masking_generator.py does the same with other numbers of attempts).

    Args:
      key: PRNG key.
      batch: B.
      grid: rows and columns of patches.
      count: patches to hide, between 1 and one less than there are.
      smallest: patches of the smallest rectangle, >= 1.

    Returns:
      bool [B, N], row-major over the grid; True is hidden.

    Raises:
      UsageError: a count or size out of range.
    """
    rows, columns = grid
    if not 0 < count < rows * columns:
        raise UsageError(f'{count} of {rows}x{columns} patches cannot be hidden: give a number from 1 to '
                         f'{rows * columns - 1}')  # fmt: skip
    if smallest < 1:
        raise UsageError(f'the smallest rectangle of a mask has at least 1 patch, got {smallest}')
    # All draws at once: random numbers inside the loop would be most of what there is to compile.
    draws_key, last_key = jax.random.split(key)
    draws = jax.random.uniform(draws_key, (batch, _ATTEMPTS, 4))
    last = jax.random.uniform(last_key, (batch, rows * columns))
    return jax.vmap(lambda d, u: _mask(d, u, rows, columns, count, smallest))(draws, last)


def _mask(draws: jax.Array, last: jax.Array, rows: int, columns: int, count: int, smallest: int) -> jax.Array:
    y, x = jnp.mgrid[:rows, :columns]

    def attempt(mask, draw):
        missing = count - mask.sum()
        area = draw[0] * jnp.maximum(missing - smallest, 0) + smallest
        ratio = jnp.exp((2 * draw[1] - 1) * math.log(1 / _FLATTEST))
        height, width = (jnp.round(jnp.sqrt(a)).astype(int) for a in (area * ratio, area / ratio))
        top = (draw[2] * (jnp.maximum(rows - height, 0) + 1)).astype(int)
        left = (draw[3] * (jnp.maximum(columns - width, 0) + 1)).astype(int)
        inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
        new = (inside & ~mask).sum()
        fits = (height < rows) & (width < columns) & (new > 0) & (new <= missing)
        return mask | (inside & fits), None

    mask, _ = jax.lax.scan(attempt, jnp.zeros((rows, columns), bool), draws)
    mask = mask.reshape(-1)
    # Hidden patches first, the others in random order: the first `count` of them.
    order = jnp.argsort(jnp.where(mask, -1.0, last))
    return jnp.zeros_like(mask).at[order[:count]].set(True)
