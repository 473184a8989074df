"""Position embeddings: the fixed sin-cos table, and resampling a learned grid to another size.

Six rules are in use and they differ by up to 0.8 in the logits of a small network, so the rule belongs to the source
of the weights, never to taste. Every rule is separable, hence one matrix [new, old] per axis.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax.errors import UsageError, unknown

RULES = {
    'corner': 'vit_jax, big_vision and VPT reading a Google npz: linear, corners aligned, no anti-aliasing',
    'linear': 'timm reading a Google npz: linear, half-pixel centres, no anti-aliasing',
    'linear_antialias': 'FlexiViT and NaFlex at run time: linear, half-pixel centres, anti-aliased',
    'cubic_antialias': 'timm and DINOv2 with registers: bicubic a=-0.5, half-pixel centres, anti-aliased',
    'cubic_offset': 'DINO, DINOv2 without registers, BEiT v2: bicubic a=-0.75, scale (new + 0.1) / old',
    'cubic': 'Hugging Face DINOv2: bicubic a=-0.75, scale new / old',
}


@lru_cache(maxsize=64)
def resize_matrix(old: int, new: int, rule: str) -> np.ndarray:
    """The matrix that resamples `old` samples to `new` by a rule of `RULES`.

    Returns:
      float32 [new, old]; its rows sum to 1.

    Raises:
      UsageError: unknown rule.
    """
    if rule not in RULES:
        raise unknown('position-embedding resampling rule', rule, RULES)
    if old == new:
        return np.eye(new, dtype=np.float32)
    if rule == 'corner':
        at = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.0)
        low = np.minimum(np.floor(at).astype(int), max(old - 2, 0))
        part = at - low
        matrix = np.zeros((new, old))
        matrix[np.arange(new), low] = 1 - part
        matrix[np.arange(new), np.minimum(low + 1, old - 1)] += part
        return matrix.astype(np.float32)
    if rule in ('cubic', 'cubic_offset'):
        scale = (new + (0.1 if rule == 'cubic_offset' else 0.0)) / old
        at = (np.arange(new) + 0.5) / scale - 0.5
        low = np.floor(at).astype(int)
        matrix = np.zeros((new, old))
        for tap in range(-1, 3):
            column = np.clip(low + tap, 0, old - 1)
            np.add.at(matrix, (np.arange(new), column), _keys(at - (low + tap), a=-0.75))
        return matrix.astype(np.float32)
    kind = 'cubic' if rule == 'cubic_antialias' else 'linear'
    with jax.ensure_compile_time_eval():
        eye = jnp.eye(old, dtype=jnp.float32)
        return np.asarray(jax.image.resize(eye, (new, old), kind, antialias=rule != 'linear', precision='highest'))


def _keys(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel with parameter `a`."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resample(
    pos: jax.Array, grid: tuple[int, int], prefix: int, rule: str, old: tuple[int, int] | None = None
) -> jax.Array:
    """Resamples a learned position embedding to another grid; the prefix entries are kept.

    Args:
      pos: [1, prefix + old rows * old columns, D].
      grid: (rows, columns) wanted.
      prefix: entries that belong to CLS and the like.
      rule: a name of `RULES`.
      old: (rows, columns) of `pos`; square if None.

    Returns:
      [1, prefix + rows * columns, D].

    Raises:
      UsageError: the grid of `pos` is neither `old` nor square, or the rule is unknown.
    """
    count = pos.shape[1] - prefix
    if old is None or old[0] * old[1] != count:
        side = round(count**0.5)
        if side * side != count:
            raise UsageError(f'cannot resample a position embedding of {count} patches: it is not a square grid')
        old = (side, side)
    if tuple(old) == tuple(grid):
        return pos
    rows, columns = (jnp.asarray(resize_matrix(*sizes, rule), pos.dtype) for sizes in zip(old, grid, strict=True))
    table = pos[0, prefix:].reshape(*old, -1)
    table = jnp.einsum('ra,cb,abd->rcd', rows, columns, table, precision='highest')
    return jnp.concatenate([pos[:, :prefix], table.reshape(1, grid[0] * grid[1], -1)], axis=1)


def sincos2d(grid: tuple[int, int], width: int) -> np.ndarray:
    """The fixed sin-cos table of MoCo v3 (arXiv 2104.02057) in big_vision's form.

    Returns:
      float32 [1, rows * columns, width]: sin x, cos x, sin y, cos y, a quarter each.

    Raises:
      UsageError: the width is not a multiple of 4, or below 8.
    """
    if width % 4 or width < 8:
        raise UsageError(
            f'sin-cos position embeddings need a width that is a multiple of 4 and at least 8, got {width}'
        )
    y, x = np.mgrid[: grid[0], : grid[1]]
    omega = 1.0 / 10000.0 ** (np.arange(width // 4) / (width // 4 - 1))
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)[None].astype(np.float32)
