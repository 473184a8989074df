"""Pfeiffer adapters, one per block, after the MLP (arXiv 2005.00247; VPT's baseline, KMnP/vpt@4410440).

y = MLP(LN(x));  y <- y + W_up gelu(W_down y + b_down) + b_up;  x <- x + y, with the exact GELU.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vpt_jax.errors import MissingPlace, UsageError, unknown
from vpt_jax.methods.base import Method, PyTree
from vpt_jax.models.places import Context


@dataclasses.dataclass(frozen=True)
class Adapter(Method):
    """A bottleneck of width m = D // reduction in every block.

    Prompts: `down/{kernel [L, D, m], bias [L, m]}`, `up/{kernel [L, m, D], bias [L, D]}`.

    Attributes:
      reduction: D // m; m is rounded down.
      adapter_init: 'up-zero' (W_down Kaiming uniform, the rest zero: the identity at first) or 'zero', which is what
        the published code does. With 'zero' W_down, b_down and W_up never receive a gradient, so what is trained is
        one offset vector per block: the two are different methods and must not be compared.

    Raises:
      UsageError: reduction below 1 or above the width; unknown initialisation.
    """

    name: ClassVar[str] = 'adapter'
    rewrites_block: ClassVar[bool] = True
    reduction: int = 8
    adapter_init: str = 'up-zero'

    def __post_init__(self):
        if self.reduction < 1:
            raise UsageError(f'method adapter: reduction must be >= 1, got {self.reduction}')
        if self.adapter_init not in ('up-zero', 'zero'):
            raise unknown('adapter initialisation', self.adapter_init, ('up-zero', 'zero'))

    def check(self, model: Any) -> None:
        """Refuses a reduction that leaves no hidden unit, and backbones whose blocks differ in width."""
        super().check(model)
        if 'tokens' not in model.places:
            raise MissingPlace(
                'blocks of one width',
                f'method adapter needs transformer blocks of one width, which {type(model).__name__} does not have; '
                'choose another method or backbone',
            )
        if self.reduction > model.width:
            raise UsageError(
                f'method adapter: reduction={self.reduction} leaves no hidden unit at width {model.width}; '
                f'use at most {model.width}'
            )

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """Draws the adapters."""
        depth, width, hidden = model.depth, model.width, model.width // self.reduction
        shape = (depth, width, hidden)
        if self.adapter_init == 'zero':
            down = jnp.zeros(shape)
        else:
            bound = width**-0.5
            down = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        return {
            'down': {'kernel': down, 'bias': jnp.zeros((depth, hidden))},
            'up': {'kernel': jnp.zeros((depth, hidden, width)), 'bias': jnp.zeros((depth, width))},
        }

    def layer(self, prompts: PyTree, block: Callable, x: jax.Array, i: int | jax.Array, ctx: Context) -> jax.Array:
        """The block with the adapter on its MLP branch."""
        down, up = prompts['down'], prompts['up']
        x = x + block.attend(x)
        y = block.feed(x)
        h = jax.nn.gelu(y @ down['kernel'][i] + down['bias'][i], approximate=False)
        return x + y + (h @ up['kernel'][i] + up['bias'][i]).astype(x.dtype)
