"""BiT: ResNets with GroupNorm and standardised weights (arXiv 1912.11370), and the stems of ViT hybrids.

Two forms are in use. The paper's is pre-activated (ResNet V2) with symmetric padding; big_vision's `bit` and the
stems of AugReg's hybrids (arXiv 2106.10270) are post-activated (V1) with SAME padding.

Shapes: B images, H rows, W columns, C channels.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpt_jax.errors import unknown
from vpt_jax.models.convolution import Conv, ResidualStages, max_pool
from vpt_jax.models.places import Context

DEPTHS = {26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}

VARIANTS = {
    f'R{depth}x{factor}': {'depths': DEPTHS[depth], 'width': 64 * factor}
    for depth, factor in ((26, 1), (50, 1), (50, 2), (50, 3), (101, 1), (101, 3), (152, 2), (152, 4), (200, 1))
}

POOL_PADDINGS = ('zero', 'inf')


def standardize_v1(kernel: jax.Array) -> jax.Array:
    """(w - mean) / (std + 1e-5) over all axes but the last."""
    centred = kernel - kernel.mean(axis=(0, 1, 2))
    return centred / (jnp.sqrt((centred**2).mean(axis=(0, 1, 2))) + 1e-5)


def standardize_v2(kernel: jax.Array) -> jax.Array:
    """(w - mean) / sqrt(var + 1e-10) over all axes but the last."""
    centred = kernel - kernel.mean(axis=(0, 1, 2))
    return centred * jax.lax.rsqrt((centred**2).mean(axis=(0, 1, 2)) + 1e-10)


def conv(preact: bool, features: int, size: int, stride: int, dtype: Any, name: str) -> Conv:
    """A convolution with standardised weights, of one form or the other."""
    standardize = standardize_v2 if preact else standardize_v1
    return Conv(features, size, stride, same=not preact, standardize=standardize, dtype=dtype, name=name)


def group_norm(preact: bool, dtype: Any, name: str) -> nn.GroupNorm:
    """GroupNorm of 32 groups, parameters `scale` and `bias` [C]."""
    eps = 1e-5 if preact else 1e-6
    return nn.GroupNorm(32, epsilon=eps, use_fast_variance=False, dtype=dtype, name=name)


class Unit(nn.Module):
    """A bottleneck of width `width` and 4 * `width` output channels.

    Attributes:
      width: channels of the 3 x 3 convolution.
      stride: of the 3 x 3 convolution and of the shortcut.
      preact: V2: norm and ReLU come before each convolution, and the projected shortcut starts behind the first.
      dtype: computation type.
    """

    width: int
    stride: int
    preact: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, 4 * width]."""
        project = self.stride != 1 or x.shape[-1] != 4 * self.width
        layers = [(self.width, 1, 1), (self.width, 3, self.stride), (4 * self.width, 1, 1)]
        shortcut = y = x
        for i, (width, size, stride) in enumerate(layers, 1):
            norm = group_norm(self.preact, self.dtype, f'gn{i}')
            if self.preact:
                y = nn.relu(norm(y))
                if i == 1 and project:
                    shortcut = conv(True, 4 * self.width, 1, self.stride, self.dtype, 'conv_proj')(y)
            y = conv(self.preact, width, size, stride, self.dtype, f'conv{i}')(y)
            if not self.preact:
                y = norm(y)
                y = nn.relu(y) if i < 3 else y
        if self.preact:
            return shortcut + y
        if project:
            shortcut = conv(False, 4 * self.width, 1, self.stride, self.dtype, 'conv_proj')(x)
            shortcut = group_norm(False, self.dtype, 'gn_proj')(shortcut)
        return nn.relu(shortcut + y)


def units(depths: tuple[int, ...], width: int, preact: bool, dtype: Any) -> list[Unit]:
    """The bottlenecks, `block1_unit1` and so on; from the second stage on, the first of a stage has stride 2."""
    return [
        Unit(width * 2**s, 2 if s and not j else 1, preact, dtype, name=f'block{s + 1}_unit{j + 1}')
        for s, count in enumerate(depths)
        for j in range(count)
    ]


class BiT(ResidualStages, nn.Module):
    """A BiT as a pure function of (params, images, method, prompts).

    `layer` is around every unit, over maps [B, H, W, C] (`Staged`), so there is no place `tokens`; V2's last norm comes
    before `readout`.

    Attributes:
      depths: number of units of each stage.
      width: channels of the root; 64 times the width factor.
      preact: the paper's V2 form; otherwise big_vision's V1.
      pool_padding: what surrounds the maps at V2's max-pooling: 'zero' in the original, 'inf' (minus that) in
        big_vision. Logits of small networks differ by 5e-3.
      image_size: side of the images that it is made for; it takes any.
      classes: of the classifier that the network came with (`Network`), 0 for none.
      dtype: computation type; None computes in the parameters' type.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    preact: bool = True
    pool_padding: str = 'zero'
    image_size: int = 224
    classes: int = 0
    dtype: Any = None

    def __post_init__(self):
        if self.pool_padding not in POOL_PADDINGS:
            raise unknown('padding of the max-pooling', self.pool_padding, POOL_PADDINGS)
        self.settle('depths')
        super().__post_init__()

    @property
    def stem_width(self) -> int:
        """Channels of the root."""
        return self.width

    def channels(self, stage: int) -> int:
        """C of what a stage gives."""
        return self.width * 2 ** (stage + 2)

    @property
    def first_layers(self) -> tuple[str, ...]:
        """The root; V2's has no norm."""
        return ('conv_root',) if self.preact else ('conv_root', 'gn_root')

    def setup(self):
        """Makes the sub-modules."""
        self.conv_root = conv(self.preact, self.width, 7, 2, self.dtype, 'conv_root')
        if self.preact:
            self.norm_pre_head = group_norm(True, self.dtype, 'norm_pre_head')
        else:
            self.gn_root = group_norm(False, self.dtype, 'gn_root')
        self.blocks = units(self.depths, self.width, self.preact, self.dtype)
        self.make_classifier()

    def stem(self, images: jax.Array, ctx: Context) -> jax.Array:
        """The root: a quarter of the size."""
        x = self.conv_root(images)
        return max_pool(x, self.pool_padding) if self.preact else max_pool(nn.relu(self.gn_root(x)), 'same')

    def final(self, x: jax.Array) -> jax.Array:
        """V2's last norm."""
        return nn.relu(self.norm_pre_head(x)) if self.preact else x


class HybridStem(nn.Module):
    """The convolutional stem of a hybrid ViT: V1's root and, behind it, its stages.

    Attributes:
      depths: number of units of each stage; () for the root alone.
      width: channels of the root.
      dtype: computation type.
    """

    depths: tuple[int, ...]
    width: int = 64
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps [B, H, W, channels] to maps of their quarter, and half of it per stage but the first; rounded up."""
        x = conv(False, self.width, 7, 2, self.dtype, 'conv_root')(images)
        x = max_pool(nn.relu(group_norm(False, self.dtype, 'gn_root')(x)), 'same')
        for unit in units(self.depths, self.width, False, self.dtype):
            x = unit(x)
        return x
