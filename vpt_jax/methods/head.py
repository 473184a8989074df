"""Heads: the linear probe and the MLP head of VPT (arXiv 2203.12119; KMnP/vpt@4410440 src/models/mlp.py).

Linear: scores = W f + b. MLP-k: k - 1 hidden layers, each Linear, ReLU, BatchNorm, Dropout(0.1), in that order, then
the linear layer. Each is a baseline by itself and the head of every other method.

Initialisation in VPT and VAPT: last kernel Kaiming normal over the fan-out, that is a deviation of sqrt(2 / C); last
bias -log(0.99 / 0.01); hidden layers Kaiming normal, biases U(-1 / sqrt(D), 1 / sqrt(D)). Linear heads of other methods
start otherwise (`INITS`).
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vpt_jax.errors import UsageError, unknown
from vpt_jax.methods.base import Method, PyTree
from vpt_jax.models.initialisers import kaiming_normal_fan_out, torch_uniform
from vpt_jax.models.places import Context

#: How a linear head starts. 'kaiming': as above. 'normal': kernel N(0, s^2) cut at -2 and 2, bias 0 (SPT, timm).
#: 'uniform': kernel and bias U(-1 / sqrt(D), 1 / sqrt(D)) (torch's own, CVPT and PGN).
INITS = ('kaiming', 'normal', 'uniform')


def _dense(layer: PyTree, x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) @ layer['kernel'] + layer['bias']


def _last_layer(key: jax.Array, width: int, num_classes: int, start: str = 'kaiming', deviation: float = 0.0) -> PyTree:
    if num_classes < 2:
        raise UsageError(f'a classification head needs at least 2 classes, got {num_classes}')
    shape = (width, num_classes)
    if start == 'normal':
        kernel = deviation * jax.random.truncated_normal(key, -2 / deviation, 2 / deviation, shape)
        return {'kernel': kernel, 'bias': jnp.zeros(num_classes)}
    if start == 'uniform':
        k1, k2 = jax.random.split(key)
        return {'kernel': torch_uniform(k1, shape, width), 'bias': torch_uniform(k2, shape[1:], width)}
    return {'kernel': kaiming_normal_fan_out(key, shape), 'bias': jnp.full(num_classes, -math.log((1 - 0.01) / 0.01))}


@dataclasses.dataclass(frozen=True)
class Linear(Method):
    """A linear layer on the backbone's features; computed in float32.

    Prompts: `last_layer/kernel` [D, C], `last_layer/bias` [C].

    Attributes:
      start: a name of `INITS`.
      deviation: s of 'normal', > 0; published 0.02, on MoCo v3 0.01.

    Raises:
      UsageError: a setting out of range.
    """

    name: ClassVar[str] = 'linear'
    start: str = 'kaiming'
    deviation: float = 0.02

    def __post_init__(self):
        if self.start not in INITS:
            raise unknown('initialisation of a linear head', self.start, INITS)
        if not 0 < self.deviation < math.inf:
            raise UsageError(f'method linear: deviation must be a finite number > 0, got {self.deviation}')

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """Draws the layer."""
        return {'last_layer': _last_layer(key, model.feature_width, num_classes, self.start, self.deviation)}

    def logits(self, prompts: PyTree, features: jax.Array, ctx: Context) -> jax.Array:
        """Scores [B, C] from features [B, D]."""
        return _dense(prompts['last_layer'], features)


@dataclasses.dataclass(frozen=True)
class MLPHead(Method):
    """An MLP on the backbone's features, with batch normalisation after the ReLU.

    Prompts: `hidden_i/{kernel [D, D], bias [D]}`, `norm_i/{scale, bias} [D]`, `last_layer/{kernel [D, C], bias [C]}`.
    State: `norm_i/{mean, var} [D]`. Padding examples (weight 0) do not enter the batch statistics.

    Attributes:
      layers: k of MLP-k, the number of linear layers, at least 2.
      dropout: after every hidden layer.

    Raises:
      UsageError: fewer than 2 layers.
    """

    name: ClassVar[str] = 'mlp'
    layers: int = 3
    dropout: float = 0.1
    eps: ClassVar[float] = 1e-5
    momentum: ClassVar[float] = 0.1

    def __post_init__(self):
        if self.layers < 2:
            raise UsageError(f'an MLP head has at least 2 layers, got layers={self.layers}; for 1 use method linear')

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """Draws all layers."""
        width = model.feature_width
        prompts = {}
        for i in range(self.layers - 1):
            k1, k2 = jax.random.split(jax.random.fold_in(key, i))
            kernel, bias = kaiming_normal_fan_out(k1, (width, width)), torch_uniform(k2, (width,), width)
            prompts[f'hidden_{i}'] = {'kernel': kernel, 'bias': bias}
            prompts[f'norm_{i}'] = {'scale': jnp.ones(width), 'bias': jnp.zeros(width)}
        last = jax.random.fold_in(key, self.layers)
        return prompts | {'last_layer': _last_layer(last, width, num_classes)}

    def init_state(self, model: Any, num_classes: int = 0, key: jax.Array | None = None) -> PyTree:
        """Running mean 0 and variance 1 per hidden layer."""
        width = model.feature_width
        return {f'norm_{i}': {'mean': jnp.zeros(width), 'var': jnp.ones(width)} for i in range(self.layers - 1)}

    def logits(self, prompts: PyTree, features: jax.Array, ctx: Context) -> jax.Array:
        """Scores [B, C] from features [B, D]."""
        x = features
        for i in range(self.layers - 1):
            x = jax.nn.relu(_dense(prompts[f'hidden_{i}'], x))
            mean, var = self._statistics(f'norm_{i}', x, ctx)
            norm = prompts[f'norm_{i}']
            x = (x - mean) * jax.lax.rsqrt(var + self.eps) * norm['scale'] + norm['bias']
            x = ctx.dropout(x, self.dropout, 'dropout', i)
        return _dense(prompts['last_layer'], x)

    def _statistics(self, name: str, x: jax.Array, ctx: Context) -> tuple[jax.Array, jax.Array]:
        running = ctx.state[name]
        if not ctx.train:
            return running['mean'], running['var']
        weight = jnp.ones(x.shape[0]) if ctx.weight is None else ctx.weight
        count = weight.sum()
        mean = weight @ x / count
        var = weight @ jnp.square(x - mean) / count
        # As in torch, the running variance is the unbiased one, the normalising variance is not.
        seen = {'mean': mean, 'var': var * count / jnp.maximum(count - 1, 1)}
        ctx.updates[name] = jax.tree.map(lambda old, new: old + self.momentum * (new - old), running, seen)
        return mean, var
