"""BatchNorms that normalise by the batch in training, and keep running statistics for evaluation.

A method that trains norms this way has `initial(...)` as its state and calls `track(ctx)` in `pixels`. The state is
relative to the statistics that the network came with: what is left of those, and what the batches added. So it starts
at one and zero, and no method has to copy what is in the weights.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vpt_jax.models.places import Context


def names(model: nn.Module) -> dict[str, int]:
    """The BatchNorms of a network: name to number of channels."""
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), images))['params']
    flat = flatten_dict(tree, sep='/')
    return {name.removesuffix('/mean'): leaf.shape[0] for name, leaf in flat.items() if name.endswith('/mean')}


def initial(model: nn.Module, which: Collection[str]) -> dict:
    """The state before the first step.

    Args:
      model: the network.
      which: names of BatchNorms.

    Returns:
      `kept` [], the weight of the statistics that came with the network, and `added/NAME/{mean, var}` [C]; {} if none
      of these is a BatchNorm.
    """
    widths = {name: width for name, width in names(model).items() if name in which}
    if not widths:
        return {}
    added = {(*name.split('/'), kind): jnp.zeros(w) for name, w in widths.items() for kind in ('mean', 'var')}
    return {'kept': jnp.ones(()), 'added': unflatten_dict(added)}


def track(ctx: Context, momentum: float = 0.1) -> None:
    """Has the norms of `ctx.state` use the batch in training, and running statistics otherwise.

    Args:
      ctx: the method's own; its state is what `initial` returned.
      momentum: weight of the new batch in the running statistics (torch's convention and default).
    """
    if ctx.train:
        ctx.updates['kept'] = (1 - momentum) * ctx.state['kept']
    flat = flatten_dict(ctx.state['added'])
    for path in {path[:-1] for path in flat}:
        ctx.statistics['/'.join(path)] = partial(_exchange, path, ctx, momentum)


def moments(x: jax.Array, weight: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean and biased variance of the channels of [B, H, W, C], and how many values they are of.

    Args:
      x: float32 maps.
      weight: [B]; examples of weight 0 do not count. None counts all.
    """
    weight = jnp.ones(x.shape[0]) if weight is None else weight.astype(jnp.float32)
    count = jnp.maximum(weight.sum(), 1) * x.shape[1] * x.shape[2]
    mean = jnp.einsum('b,bhwc->c', weight, x) / count
    return mean, jnp.einsum('b,bhwc->c', weight, (x - mean) ** 2) / count, count


def _exchange(path: tuple[str, ...], ctx: Context, momentum: float, x: jax.Array, mean: jax.Array,
              var: jax.Array) -> tuple[Any, Any]:  # fmt: skip
    added = ctx.state['added']
    for key in path:
        added = added[key]
    if not ctx.train:
        return ctx.state['kept'] * mean + added['mean'], ctx.state['kept'] * var + added['var']
    mean, var, count = moments(x, ctx.weight)
    # The running variance is the unbiased one, as torch has it.
    new = {'mean': mean, 'var': var * count / jnp.maximum(count - 1, 1)}
    updates = ctx.updates.setdefault('added', {})
    for key in path:
        updates = updates.setdefault(key, {})
    updates |= {kind: (1 - momentum) * added[kind] + momentum * value for kind, value in new.items()}
    return mean, var
