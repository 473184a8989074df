"""Fitting a file's parameters to a model: names, shapes, and the position embedding's grid."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vpt_jax.checkpoints import google_npz
from vpt_jax.errors import UsageError
from vpt_jax.models import posemb


def match(params: Mapping, template: Mapping, source: str, *, prefix: int = 1, rule: str = 'corner') -> dict:
    """Fits a file's parameters to a model, or says what does not fit.

    A position embedding for another grid is resampled; everything else must have the model's names and shapes.

    Args:
      params: what a reader of `checkpoints` returned.
      template: the model's parameters or shapes of them (`jax.eval_shape` of its `init`), blocks unrolled.
      source: the file's name, for messages.
      prefix: the model's `posemb_prefix`.
      rule: the model's `posemb_rule`.

    Returns:
      A tree like `template`: numpy arrays in the template's types (only a resampled embedding is a new jax array).

    Raises:
      UsageError: names are missing or unexpected, or shapes differ.
    """
    have = traverse_util.flatten_dict(dict(params), sep='/')
    want = traverse_util.flatten_dict(dict(template), sep='/')
    faults = []
    for verb, names in (('lacks', want.keys() - have.keys()), ('holds', have.keys() - want.keys())):
        if names:
            first = f'{verb} {min(names, key=google_npz.natural)!r}'
            first += f' and {len(names) - 1} more' if len(names) > 1 else ''
            faults.append(first + (' that the model has no place for' if verb == 'holds' else ''))
    if faults:
        raise UsageError(f'{source} does not fit the model: it {"; it ".join(faults)}')
    fitted, wrong = {}, []
    for name, leaf in want.items():
        array = have[name]
        if name == 'pos_embedding' and array.shape != leaf.shape and array.shape[::2] == leaf.shape[::2]:
            array = _resampled(array, leaf.shape[1], source, prefix, rule)
        if array.shape != leaf.shape:
            wrong.append(f'{name!r} has shape {list(array.shape)} where the model has {list(leaf.shape)}')
        else:
            fitted[name] = array.astype(leaf.dtype, copy=False) if isinstance(array, np.ndarray) else array
    if wrong:
        more = f' (and {len(wrong) - 1} more such shapes)' if len(wrong) > 1 else ''
        raise UsageError(f'{source} does not fit the model: {wrong[0]}{more}')
    return traverse_util.unflatten_dict(fitted, sep='/')


def _resampled(pos: np.ndarray, count: int, source: str, prefix: int, rule: str) -> Any:
    """`pos` for `count` entries; both counts are a prefix and a square grid."""
    old, new = (math.isqrt(max(n - prefix, 0)) for n in (pos.shape[1], count))
    if not new or old**2 + prefix != pos.shape[1] or new**2 + prefix != count:
        raise UsageError(
            f'{source} has {pos.shape[1]} position embeddings where the model has {count}; they cannot be resampled, '
            f'because with posemb_prefix={prefix} that is no square grid'
        )
    return posemb.resample(jnp.asarray(pos, jnp.float32), (new, new), prefix, rule)
