"""How torch draws the first values of layers, for networks and methods whose originals are torch's."""

import math

import jax


def torch_uniform(key: jax.Array, shape: tuple[int, ...], inputs: int) -> jax.Array:
    """U(-v, v) with v = 1 / sqrt(inputs): biases of any layer, and kernels of linear ones."""
    bound = 1 / math.sqrt(inputs)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def kaiming_normal_fan_out(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """A kernel [in, out] with deviation sqrt(2 / out) (arXiv 1502.01852, torch's mode='fan_out')."""
    return jax.random.normal(key, shape) * math.sqrt(2.0 / shape[1])
