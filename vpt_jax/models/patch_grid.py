"""Convolutions over the grid of a ViT's patch tokens.

Shapes: B images, D width, N = G G' patches, H H' map after a convolution, K its kernel, P outputs of a mix.
"""

import jax
import jax.numpy as jnp
import numpy as np


def map_of(grid: tuple[int, int], kernel: int, padding: int) -> tuple[int, int]:
    """Rows and columns (H, H') of what a K x K convolution makes of a grid (G, G'); below 1 if it does not fit."""
    rows, columns = (side + 2 * padding - kernel + 1 for side in grid)
    return rows, columns


def multiplied_out(mix: jax.Array, kernel: jax.Array, grid: tuple[int, int], padding: int) -> jax.Array:
    """A mix of positions behind a convolution, as one mix of the patches themselves.

    Args:
      mix: [P, H H'].
      kernel: [K, K], the same for all channels.
      grid: (G, G').
      padding: zeros around the grid.

    Returns:
      [P, N].
    """
    rows, columns = map_of(grid, len(kernel), padding)
    mix = mix.reshape(-1, rows, columns)
    # The transposed convolution: each map position hands its weight on to the K x K patches that it reads.
    out = jnp.zeros((mix.shape[0], grid[0] + 2 * padding, grid[1] + 2 * padding), mix.dtype)
    for a, b in np.ndindex(*kernel.shape):
        out = out.at[:, a : a + rows, b : b + columns].add(kernel[a, b] * mix)
    return out[:, padding : padding + grid[0], padding : padding + grid[1]].reshape(-1, grid[0] * grid[1])


def depthwise(x: jax.Array, kernel: jax.Array, grid: tuple[int, int], padding: int) -> jax.Array:
    """Cross-correlation of patches [B, N, D] with one kernel a channel [K, K, D]: [B, H H', D]."""
    rows, columns = map_of(grid, len(kernel), padding)
    around = (padding, padding)
    x = jnp.pad(x.reshape(x.shape[0], *grid, -1), ((0, 0), around, around, (0, 0)))
    y = sum(kernel[a, b] * x[:, a : a + rows, b : b + columns] for a, b in np.ndindex(*kernel.shape[:2]))
    return y.reshape(y.shape[0], rows * columns, -1)
