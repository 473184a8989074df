"""Flax's msgpack files (`flax_model.msgpack` of Hugging Face): nested dicts of arrays, nothing that can run."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from flax import serialization

from vpt_jax.checkpoints.source import ArraySource, config_beside
from vpt_jax.errors import UsageError

# What msgpack and flax raise for bytes that are none of theirs.
_UNREADABLE = (
    msgpack.UnpackException, ValueError, TypeError, KeyError, AttributeError, IndexError, AssertionError,
    OverflowError, RecursionError, MemoryError,
)  # fmt: skip


def opened(path: str | os.PathLike) -> ArraySource:
    """Reads a msgpack file; its names are the dicts' keys joined by '/'.

    Args:
      path: the file.

    Raises:
      UsageError: it cannot be read, is damaged, or is no tree of arrays.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f'cannot read {path}: {error.strerror or error}') from error
    try:
        tree = serialization.msgpack_restore(data)
    except _UNREADABLE as error:
        raise UsageError(f'{path} is cut short or damaged; copy or download it again') from error
    if not isinstance(tree, dict):
        raise UsageError(f'{path} holds a {type(tree).__name__} instead of a tree of weights')
    arrays, skipped = {}, {}
    for name, leaf in _leaves(tree, '', path):
        if isinstance(leaf, (np.ndarray, np.generic)):
            arrays[name] = np.asarray(leaf)
        else:
            skipped[name] = f'no array but {type(leaf).__name__}'
    return ArraySource(arrays, path, config=config_beside(path), skipped=skipped, files=[path])


def _leaves(tree: dict, above: str, path: Path) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if not isinstance(key, str):
            raise UsageError(f'{path} is no tree of weights: it has the key {key!r}, and names are text')
        if isinstance(value, dict):
            yield from _leaves(value, f'{above}{key}/', path)
        else:
            yield f'{above}{key}', value
