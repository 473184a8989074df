"""Relative position bias of BEiT (arXiv 2106.08254, 2208.06366): what attention adds to its scores by distance.

A table has a row for every distance in a window of patches, (2 rows - 1)(2 columns - 1) = R of them, and three more:
R is the query CLS on any patch, R + 1 any patch on the key CLS, R + 2 CLS on itself. A bias is a gather from it by an
index that depends on the window alone.

Tokens that a method inserts are no part of the window. They lie between CLS and the patches, so the length of the
sequence tells how many there are, and their pairs get one of `EXTRA`.

Shapes: H heads, N patches, E inserted tokens, T = 1 + E + N tokens, R distances.
"""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax.errors import UsageError, unknown
from vpt_jax.models.posemb import resize_matrix

Grid = tuple[int, int]

EXTRA = {
    'zero': 'no bias for any pair with an inserted token, as VPT pads the windows of Swin (KMnP/vpt@4410440)',
    'cls': 'inserted tokens are treated as CLS',
}
RULES = {
    'geometric_cubic': 'unilm: distances in geometric progression, cubic spline',
    'geometric_linear': 'timm: distances in geometric progression, linear',
    'linear': 'Hugging Face: distances on an even grid, linear',
}


def table_rows(window: Grid) -> int:
    """R + 3, the rows of a table for a window of patches."""
    return (2 * window[0] - 1) * (2 * window[1] - 1) + 3


@lru_cache(maxsize=32)
def token_index(window: Grid, extra: int = 0, mode: str = 'zero') -> np.ndarray:
    """Which row of a table each pair (query, key) takes.

    Args:
      window: rows and columns of patches.
      extra: E, tokens between CLS and the patches.
      mode: a name of `EXTRA`; 'zero' points at the row behind the table's last.

    Returns:
      int32 [T, T].

    Raises:
      UsageError: unknown mode.
    """
    if mode not in EXTRA:
        raise unknown('bias for inserted tokens', mode, EXTRA)
    y, x = (axis.reshape(-1) for axis in np.mgrid[: window[0], : window[1]])
    patches = (y[:, None] - y + window[0] - 1) * (2 * window[1] - 1) + x[:, None] - x + window[1] - 1
    distances = table_rows(window) - 3
    to_patch, to_cls, among = (distances, distances + 1, distances + 2) if mode == 'cls' else (distances + 3,) * 3
    head = 1 + extra
    index = np.full((head + len(y),) * 2, among, np.int32)
    index[head:, head:] = patches
    index[:head, head:] = to_patch
    index[head:, :head] = to_cls
    index[0, head:], index[head:, 0], index[0, 0] = distances, distances + 1, distances + 2
    return index


@lru_cache(maxsize=32)
def distance_matrix(old: int, new: int, rule: str) -> np.ndarray:
    """The matrix that resamples the distances along a side of `old` patches to one of `new`.

    The geometric rules put the old distances at 0, 1, 1 + q, 1 + q + q^2, ... on either side, with q such that they
    reach as far as the new ones, which are whole numbers: near patches keep their bias (microsoft/unilm@768a3c87
    beit2/run_class_finetuning.py). Beyond the outermost old distance its own value holds.

    Args:
      old, new: patches along the side.
      rule: a name of `RULES`.

    Returns:
      float32 [2 new - 1, 2 old - 1].

    Raises:
      UsageError: unknown rule.
    """
    if rule not in RULES:
        raise unknown('relative-position resampling rule', rule, RULES)
    if old == new:
        return np.eye(2 * old - 1, dtype=np.float32)
    if rule == 'linear':
        return resize_matrix(2 * old - 1, 2 * new - 1, 'linear')
    low, high, ratio = 1.01, 1.5, 1.0
    while high - low > 1e-6:
        ratio = (low + high) / 2
        reach = (1 - ratio ** (old - 1)) / (1 - ratio)
        low, high = (low, ratio) if reach > new - 1 else (ratio, high)
    side = np.cumsum(ratio ** np.arange(old - 1))
    known = np.concatenate([-side[::-1], [0.0], side])
    wanted = np.clip(np.arange(1 - new, new), known[0], known[-1])
    degree = min(3 if rule == 'geometric_cubic' else 1, len(known) - 1)
    from scipy.interpolate import make_interp_spline  # takes long to import

    return make_interp_spline(known, np.eye(len(known)), k=degree)(wanted).astype(np.float32)


def resize_table(table: jax.Array, old: Grid, new: Grid, rule: str) -> jax.Array:
    """A table for another window; the three rows of CLS are kept.

    Args:
      table: [R + 3, H] of the window `old`.
      old, new: rows and columns of patches.
      rule: a name of `RULES`.

    Returns:
      [R' + 3, H] of the window `new`.

    Raises:
      UsageError: unknown rule, or a table that is not of the window `old`.
    """
    if table.shape[0] != table_rows(old):
        raise UsageError(
            f'a window of {old[0]}x{old[1]} patches has {table_rows(old)} relative positions, not {table.shape[0]}'
        )
    if old == new:
        return table
    rows, columns = (jnp.asarray(distance_matrix(a, b, rule), table.dtype) for a, b in zip(old, new, strict=True))
    distances = table[:-3].reshape(rows.shape[1], columns.shape[1], -1)
    distances = jnp.einsum('ra,cb,abh->rch', rows, columns, distances, precision='highest')
    return jnp.concatenate([distances.reshape(-1, table.shape[1]), table[-3:]])


@dataclasses.dataclass(frozen=True, eq=False)
class RelativeBias:
    """The bias of one forward pass, for any number of inserted tokens.

    Attributes:
      grid: rows and columns of the patches at hand.
      window: of those that the tables are for; tables are resampled where they differ.
      rule: how, a name of `RULES`.
      extra: what inserted tokens get, a name of `EXTRA`.
      shared: [R + 3, H] the table of all blocks, or None.
      own_heads: H if every block has a table of its own (added to the shared one), else 0.
    """

    grid: Grid
    window: Grid
    rule: str = 'geometric_cubic'
    extra: str = 'zero'
    shared: jax.Array | None = None
    own_heads: int = 0

    @property
    def own_shape(self) -> tuple[int, int] | None:
        """Shape [R + 3, H] of a block's own table, None if it has none."""
        return (table_rows(self.window), self.own_heads) if self.own_heads else None

    def __call__(self, tokens: int, own: jax.Array | None = None) -> jax.Array:
        """The bias [1, H, T, T] for T = `tokens`, from the shared table and a block's `own`.

        Raises:
          UsageError: fewer tokens than CLS and the patches.
        """
        extra = tokens - 1 - self.grid[0] * self.grid[1]
        if extra < 0:
            raise UsageError(
                f'{tokens} tokens are fewer than CLS and {self.grid[0]}x{self.grid[1]} patches: a network with '
                'relative positions cannot do without some of its patches'
            )
        table = sum(t for t in (self.shared, own) if t is not None)
        table = resize_table(table, self.window, self.grid, self.rule)
        table = jnp.concatenate([table, jnp.zeros_like(table[:1])])
        return table[token_index(self.grid, extra, self.extra)].transpose(2, 0, 1)[None]
