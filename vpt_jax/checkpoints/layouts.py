"""From the array layouts of other frameworks to ours; numpy in, numpy out, views where possible.

A layout is a function of the stored arrays; those with settings are made by functions that return one.

Shapes: D width, H heads, k = D / H, O and I output and input channels.
"""

from collections.abc import Callable

import numpy as np

Layout = Callable[..., np.ndarray]


def same(x: np.ndarray) -> np.ndarray:
    """As it is."""
    return x


def linear(x: np.ndarray) -> np.ndarray:
    """A torch linear layer's [O, I] to [I, O]."""
    return x.T


def conv(x: np.ndarray) -> np.ndarray:
    """A torch convolution's [O, I / groups, h, w] to [h, w, I / groups, O]."""
    return x.transpose(2, 3, 1, 0)


def reshaped(*shape: int) -> Layout:
    """The same numbers in another shape."""
    return lambda x: x.reshape(shape)


def into_heads(heads: int) -> Layout:
    """A torch query, key or value layer's [D, I] to [I, H, k]; its bias [D] to [H, k]."""

    def layout(x: np.ndarray) -> np.ndarray:
        if x.ndim == 1:
            return x.reshape(heads, -1)
        return x.T.reshape(x.shape[1], heads, -1)

    return layout


def from_heads(heads: int) -> Layout:
    """A torch attention output layer's [O, D] to [H, k, O]."""
    return lambda x: x.T.reshape(heads, -1, x.shape[0])


def rows(index: int, count: int, then: Layout = same) -> Layout:
    """The `index`-th of `count` equal blocks of rows (fused query-key-value layers), and then another layout."""

    def layout(x: np.ndarray) -> np.ndarray:
        size = x.shape[0] // count
        return then(x[index * size : (index + 1) * size])

    return layout


def entry(index: int) -> Layout:
    """One entry of the leading axis (scanned blocks)."""
    return lambda x: x[index]
