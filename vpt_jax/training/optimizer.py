"""The optimizers of the published protocols, as optax transformations whose rates are data, not code.

Learning rate and weight decay live in the optimizer's state (`optax.inject_hyperparams`), so a compiled step serves
every rate and a grid of rates can be vmapped.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vpt_jax.errors import UsageError, unknown

PyTree = Any

NAMES = ('sgd', 'adamw_vpt', 'adamw')


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(str(getattr(k, 'key', k)) for k in path)


def _where(tree: PyTree, rule) -> PyTree:
    return jax.tree_util.tree_map_with_path(lambda path, _: rule(_names(path)), tree)


def _is_last_bias(names: tuple[str, ...]) -> bool:
    return names[-2:] == ('last_layer', 'bias')


def decayed(prompts: PyTree) -> PyTree:
    """Which leaves weight decay acts on under SGD: all but the bias of the head's last layer."""
    return _where(prompts, lambda names: not _is_last_bias(names))


def is_head(names: tuple[str, ...]) -> bool:
    """Whether the leaf at a path of names belongs to a trained head (`methods.head`)."""
    return any(name == 'last_layer' or name.startswith('hidden_') for name in names)


def _rate_multipliers(prompts: PyTree, multiplier: float) -> PyTree:
    return _where(prompts, lambda n: multiplier if n[-1] == 'bias' and not _is_last_bias(n) else 1.0)


def _scale_biases(multiplier: float) -> optax.GradientTransformation:
    def update(updates, state, params=None):
        factors = _rate_multipliers(updates, multiplier)
        return jax.tree.map(lambda u, f: u * f, updates, factors), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _sgd(learning_rate, weight_decay, momentum, bias_multiplier) -> optax.GradientTransformation:
    """SGD with coupled L2 decay: g + wd p, then momentum, then the rate."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.trace(momentum),
        _scale_biases(bias_multiplier),
        optax.scale_by_learning_rate(learning_rate),
    )


class _AdamState(NamedTuple):
    count: jax.Array
    mean: PyTree
    square: PyTree


def _scale_by_adam_folded(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6) -> optax.GradientTransformation:
    """Adam with the bias correction folded into the step size, so that eps is not corrected (as published)."""

    def init(params):
        # Two trees: a step that is given one twice could not take over its memory.
        mean, square = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return _AdamState(jnp.zeros([], jnp.int32), mean, square)

    def update(grads, state, params=None):
        count = state.count + 1
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, grads)
        square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.square, grads)
        size = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        updates = jax.tree.map(lambda m, v: size * m / (jnp.sqrt(v) + eps), mean, square)
        return updates, _AdamState(count, mean, square)

    return optax.GradientTransformation(init, update)


def _adamw(learning_rate, weight_decay, decay_biases, head_weight_decay) -> optax.GradientTransformation:
    """Adam, then decay inside the step: of matrices and larger, or of everything; of heads by a number of their own."""

    def mask(of_head: bool):
        def of(prompts: PyTree) -> PyTree:
            def decays(path, leaf):
                apart = head_weight_decay is not None and is_head(_names(path))
                return apart == of_head and (decay_biases or leaf.ndim > 1)

            return jax.tree_util.tree_map_with_path(decays, prompts)

        return of

    apart = () if head_weight_decay is None else (optax.add_decayed_weights(head_weight_decay, mask=mask(True)),)
    return optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(weight_decay, mask=mask(False)),
        *apart,
        optax.scale_by_learning_rate(learning_rate),
    )


def _decay_after_step(learning_rate, weight_decay) -> optax.GradientTransformation:
    """Shrinks what the step leaves, everything but biases: p <- (p + u) (1 - lr wd)."""

    def update(updates, state, params):
        mask = _where(params, lambda names: names[-1] != 'bias')
        shrink = learning_rate * weight_decay
        return jax.tree.map(lambda u, p, m: u - shrink * (p + u) if m else u, updates, params, mask), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def build(
    name: str,
    learning_rate: float,
    weight_decay: float,
    momentum: float = 0.9,
    bias_multiplier: float = 1.0,
    decay_biases: bool = False,
    head_weight_decay: float | None = None,
) -> optax.GradientTransformation:
    """An optimizer by name.

    - `'sgd'`: momentum without Nesterov; L2 decay inside the gradient of everything but the head's last bias; the rate
      of other biases times `bias_multiplier`.
    - `'adamw_vpt'`: the published AdamW of VPT's fine-tuning baselines with its quirks: every positive weight decay
      means 0.01, on all but biases, applied after the step; eps 1e-6, not bias-corrected; and a weight decay of 0
      silently becomes SGD with momentum at AdamW's rate.
    - `'adamw'`: decay on everything that has two or more axes or, as CVPT has it, on everything.

    Args:
      name: one of `NAMES`.
      learning_rate: initial rate; `with_learning_rate` sets another.
      weight_decay: >= 0.
      momentum: of SGD, in [0, 1).
      bias_multiplier: > 0.
      decay_biases: whether `'adamw'` decays biases and the like too.
      head_weight_decay: that of the head under `'adamw'`, >= 0, as SPT has it; None for `weight_decay`.

    Returns:
      An optax transformation; its state has `hyperparams['learning_rate']` and `hyperparams['weight_decay']`.

    Raises:
      UsageError: unknown name, or a value out of range.
    """
    if name not in NAMES:
        raise unknown('optimizer', name, NAMES)
    for what, value, good in (
        ('lr', learning_rate, learning_rate >= 0),
        ('weight_decay', weight_decay, weight_decay >= 0),
        ('momentum', momentum, 0 <= momentum < 1),
        ('bias_multiplier', bias_multiplier, bias_multiplier > 0),
        ('head_weight_decay', head_weight_decay, head_weight_decay is None or head_weight_decay >= 0),
    ):
        if not good:
            raise UsageError(f'optimizer {name}: {what}={value} is out of range')
    if name != 'adamw' and decay_biases:
        raise UsageError(f'optimizer {name} has no decay_biases as adamw has: set --config.optim.decay_biases=False')
    if name != 'adamw' and head_weight_decay is not None:
        raise UsageError(
            f'optimizer {name} has no head_weight_decay={head_weight_decay}, which adamw has: use adamw, or a config '
            'without it (configs/vpt_deep.py, for SPT with --config.method.name=spt)'
        )
    rates = {'learning_rate': float(learning_rate), 'weight_decay': float(weight_decay)}

    if name == 'adamw':

        def make(learning_rate, weight_decay):
            return _adamw(learning_rate, weight_decay, decay_biases, head_weight_decay)

    elif name == 'adamw_vpt' and weight_decay:

        def make(learning_rate, weight_decay):
            return optax.chain(
                _scale_by_adam_folded(),
                _scale_biases(bias_multiplier),
                optax.scale_by_learning_rate(learning_rate),
                _decay_after_step(learning_rate, 0.01),
            )

    else:

        def make(learning_rate, weight_decay):
            return _sgd(learning_rate, weight_decay, momentum, bias_multiplier)

    return optax.inject_hyperparams(make)(**rates)


def with_learning_rate(opt_state: PyTree, learning_rate: jax.Array) -> PyTree:
    """The optimizer's state with another learning rate."""
    old = opt_state.hyperparams['learning_rate']
    hyperparams = {**opt_state.hyperparams, 'learning_rate': jnp.asarray(learning_rate, old.dtype)}
    return opt_state._replace(hyperparams=hyperparams)


def with_rates(opt_state: PyTree, learning_rate: float, weight_decay: float) -> PyTree:
    """The optimizer's state with these rates."""
    rates = {'learning_rate': learning_rate, 'weight_decay': weight_decay}
    return opt_state._replace(hyperparams={name: jax.device_put(np.float32(rate)) for name, rate in rates.items()})
