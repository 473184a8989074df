"""ResNets with BatchNorm as torchvision and timm have them: ResNet-18 to -200, ResNeXt, wide ones (arXiv 1512.03385).

The stride of a bottleneck is on its 3 x 3 convolution ("V1.5"), all padding is symmetric, and BatchNorm uses its
stored statistics, which are parameters like the rest. ResNeXt is arXiv 1611.05431.

Shapes: B images, H rows, W columns, C channels.
"""

from typing import Any

import flax.linen as nn
import jax

from vpt_jax.models.convolution import BatchNorm, Conv, ResidualStages, max_pool
from vpt_jax.models.places import Context

_DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3),
           200: (3, 24, 36, 3)}  # fmt: skip


def variant(depth: int, cardinality: int = 1, group_width: int = 64) -> dict[str, Any]:
    """Settings of a ResNet by the names in papers.

    Args:
      depth: 18, 34, 50, 101, 152 or 200.
      cardinality: number of groups of the 3 x 3 convolutions (ResNeXt).
      group_width: channels a group in the first stage; with one group, 128 is a wide ResNet.

    Returns:
      Keyword arguments for `ResNet`.
    """
    planes, bottleneck = (64, 128, 256, 512), depth >= 50
    return {
        'depths': _DEPTHS[depth],
        'inner': tuple(p * group_width // 64 * cardinality for p in planes) if bottleneck else planes,
        'outer': tuple(4 * p for p in planes) if bottleneck else planes,
        'bottleneck': bottleneck,
        'groups': cardinality,
    }


VARIANTS = {
    **{f'resnet{depth}': variant(depth) for depth in _DEPTHS},
    'resnext50_32x4d': variant(50, 32, 4),
    'resnext101_32x8d': variant(101, 32, 8),
    'wide_resnet50_2': variant(50, 1, 128),
    'wide_resnet101_2': variant(101, 1, 128),
}


class Block(nn.Module):
    """A post-activation residual block: basic (3 x 3, 3 x 3) or bottleneck (1 x 1, 3 x 3, 1 x 1).

    Attributes:
      inner, outer: channels of the 3 x 3 convolution and of the result.
      stride: of the block.
      bottleneck: which of the two.
      groups: of the 3 x 3 convolution.
      average: stride by average pooling instead of by steps of a convolution (CLIP).
      dtype: computation type.
    """

    inner: int
    outer: int
    stride: int = 1
    bottleneck: bool = True
    groups: int = 1
    average: bool = False
    dtype: Any = None

    def setup(self):
        """Makes the sub-modules; `conv_proj` and `bn_proj` get parameters only where shapes change."""
        step = 1 if self.average else self.stride
        widths = [(self.inner, 1, 1, 1), (self.inner, 3, step, self.groups), (self.outer, 1, 1, 1)]
        if not self.bottleneck:
            widths = [(self.inner, 3, step, 1), (self.outer, 3, 1, 1)]
        self.convs = [
            Conv(width, size, stride, groups=groups, dtype=self.dtype, name=f'conv{i}')
            for i, (width, size, stride, groups) in enumerate(widths, 1)
        ]
        self.norms = [BatchNorm(dtype=self.dtype, name=f'bn{i}') for i in range(1, len(widths) + 1)]
        self.conv_proj = Conv(self.outer, 1, step, dtype=self.dtype)
        self.bn_proj = BatchNorm(dtype=self.dtype)

    def pooled(self, x: jax.Array) -> jax.Array:
        """The average pooling of blocks that stride by it; a remainder is dropped."""
        return average_pool(x, self.stride) if self.average else x

    def __call__(self, x: jax.Array, ctx: Context | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, outer]."""
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(self.pooled(y) if i == 2 else y), ctx)
            y = y if i == len(self.convs) - 1 else nn.relu(y)
        if self.stride != 1 or x.shape[-1] != self.outer:
            x = self.bn_proj(self.conv_proj(self.pooled(x)), ctx)
        return nn.relu(x + y)


def average_pool(x: jax.Array, size: int) -> jax.Array:
    """The mean over windows of `size` x `size` that do not overlap; a remainder is dropped."""
    return x if size == 1 else nn.avg_pool(x, (size, size), (size, size))


class ResNet(ResidualStages, nn.Module):
    """A ResNet as a pure function of (params, images, method, prompts).

    `layer` is around every residual block, over maps [B, H, W, C] (`Staged`), so there is no place `tokens`. A method
    that wants BatchNorm on the batch says so through `batch_statistics.track`.

    Attributes:
      depths: number of blocks of each stage; from the second stage on, the first block has stride 2.
      inner, outer: channels of the 3 x 3 convolutions and of the blocks' results, stage by stage.
      bottleneck: which kind of block.
      groups: of the 3 x 3 convolutions (ResNeXt).
      stem_width: channels of the stem.
      image_size: side of the images that it is made for; it takes any.
      classes: of the classifier that the network came with (`Network`), 0 for none.
      dtype: computation type; None computes in the parameters' type.

    Raises:
      UsageError: settings for different numbers of stages.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    inner: tuple[int, ...] = (64, 128, 256, 512)
    outer: tuple[int, ...] = (256, 512, 1024, 2048)
    bottleneck: bool = True
    groups: int = 1
    stem_width: int = 64
    image_size: int = 224
    classes: int = 0
    dtype: Any = None

    average = False
    first_layers = ('conv1', 'bn1')

    def __post_init__(self):
        self.settle('depths', 'inner', 'outer')
        super().__post_init__()

    def channels(self, stage: int) -> int:
        """C of what a stage gives."""
        return self.outer[stage]

    def setup(self):
        """Makes the sub-modules."""
        self.make_ends()
        settings = {'bottleneck': self.bottleneck, 'groups': self.groups, 'average': self.average, 'dtype': self.dtype}
        self.blocks = [
            Block(self.inner[s], self.outer[s], 2 if s and not j else 1, name=f'layer{s + 1}_{j}', **settings)
            for s, j in self.stages()
        ]

    def make_ends(self) -> None:
        """Makes what comes before and after the blocks."""
        self.conv1 = Conv(self.stem_width, 7, 2, dtype=self.dtype)
        self.bn1 = BatchNorm(dtype=self.dtype)
        self.make_classifier()

    def stem(self, images: jax.Array, ctx: Context) -> jax.Array:
        """Convolution, BatchNorm, max-pooling: a quarter of the size."""
        return max_pool(nn.relu(self.bn1(self.conv1(images), ctx)), 'inf')
