"""What convolutional networks are made of: convolution, pooling, BatchNorm, and blocks in stages.

Everything is channels-last. Shapes: B images, H rows, W columns, C channels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpt_jax.models.places import Context
from vpt_jax.models.stages import Staged


class Conv(nn.Module):
    """A convolution without bias, parameter `kernel` [h, w, C / groups, features].

    Attributes:
      features: output channels.
      size, stride: side of the kernel, and of the step.
      same: XLA's SAME padding; otherwise (size - 1) / 2 on all sides, as torch networks have it. The two differ where
        the stride is 2.
      groups: of channels that do not see each other.
      standardize: what the kernel goes through before use.
      dtype: computation type.
    """

    features: int
    size: int = 1
    stride: int = 1
    same: bool = False
    groups: int = 1
    standardize: Callable[[jax.Array], jax.Array] | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, features], sizes rounded up."""
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        kernel = self.param('kernel', nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'), shape)
        if self.standardize:
            kernel = self.standardize(kernel.astype(jnp.float32)).astype(kernel.dtype)
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        padding = 'SAME' if self.same else [((self.size - 1) // 2,) * 2] * 2
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            padding,
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            feature_group_count=self.groups,
        )


def max_pool(x: jax.Array, padding: str) -> jax.Array:
    """The 3 x 3 pooling with stride 2 of every ResNet's stem: [B, H, W, C] to half the size, rounded up.

    Args:
      x: the maps.
      padding: 'inf' and 'zero' put that on all sides (torch and big_vision, or the original BiT, whose maps may be
        negative); 'same' is XLA's SAME.
    """
    if padding == 'zero':
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    around = {'inf': ((1, 1), (1, 1)), 'zero': 'VALID', 'same': 'SAME'}[padding]
    return nn.max_pool(x, (3, 3), (2, 2), around)


class BatchNorm(nn.Module):
    """Normalisation of channels by stored statistics, parameters `scale`, `bias`, `mean`, `var` [C].

    A method may exchange the statistics of a norm by its name (`Context.statistics`), for those of the batch say.
    """

    eps: float = 1e-5
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context | None = None) -> jax.Array:
        """Normalises [B, H, W, C]."""
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        values = (self.param(n, f, x.shape[-1:]) for n, f in
                  (('scale', ones), ('bias', zeros), ('mean', zeros), ('var', ones)))  # fmt: skip
        scale, bias, mean, var = (v.astype(jnp.float32) for v in values)
        exchange = ctx.statistics.get('/'.join(self.path)) if ctx else None
        if exchange:
            mean, var = exchange(x.astype(jnp.float32), mean, var)
        y = (x.astype(jnp.float32) - mean) * (scale * jax.lax.rsqrt(var + self.eps)) + bias
        return y.astype(self.dtype or x.dtype)


class ResidualStages(Staged):
    """Stages of residual blocks that change the map's size and channels themselves; mixed into linen modules.

    Images of any size will do.
    """

    patch_size = 1
    stem_width: int

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns of what every stage gives; sizes are rounded up."""
        return [(-(-height // 2 ** (s + 2)), -(-width // 2 ** (s + 2))) for s in range(len(self.depths))]

    def block(self, i: int, ctx: Context) -> Callable[[jax.Array], jax.Array]:
        """Block `i` as `layer` gets it."""
        return partial(self.blocks[i], ctx=ctx)

    def activation_shape(self, i: int) -> tuple[int, int, int]:
        """(H, W, C) of the map that enters block `i` or, for i = depth, the readout."""
        stage, j = [*self.stages(), (len(self.depths), 0)][i]
        grids = self.grids(self.image_size, self.image_size)
        if not stage and not j:
            return *grids[0], self.stem_width
        stage -= not j  # the first block of a stage gets what the stage before it gave
        return *grids[stage], self.channels(stage)
