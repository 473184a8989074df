"""The small ResNet that PGN reads images with (arXiv 2210.06466; jochemloedeman/PGN@fe5ebc2, `resnet.py`).

Its shortcuts are convolutions with a bias and without a norm, which no other ResNet here has, and it has no classifier.

Shapes: B images, H rows, W columns, C channels.
"""

import flax.linen as nn
import jax

from vpt_jax.models.convolution import BatchNorm, Conv, max_pool
from vpt_jax.models.initialisers import torch_uniform
from vpt_jax.models.places import Context


class PromptBlock(nn.Module):
    """Two 3 x 3 convolutions with norms, and a shortcut.

    Attributes:
      features: channels of the result.
      halves: whether the block has stride 2; blocks that have not keep the channels.
    """

    features: int
    halves: bool

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, H, W, C] or [B, H / 2, W / 2, features], sizes rounded up."""
        stride = 2 if self.halves else 1
        y = nn.relu(BatchNorm(name='bn1')(Conv(self.features, 3, stride, name='conv1')(x), ctx))
        y = BatchNorm(name='bn2')(Conv(self.features, 3, name='conv2')(y), ctx)
        if self.halves:
            inputs = x.shape[-1]
            x = Conv(self.features, 1, stride, name='shortcut')(x)
            x = x + self.param('bias', lambda key, shape: torch_uniform(key, shape, inputs), (self.features,))
        return nn.relu(x + y)


class PromptCNN(nn.Module):
    """Groups of blocks, each but the first of half the size and twice the channels; features are means over the map.

    Attributes:
      channels: of the stem and the first group.
      groups: number of groups.
      blocks: number of blocks a group.
      max_pool: whether the stem pools.
      image_size: side of the images that it is made for; it takes any.
    """

    channels: int = 16
    groups: int = 4
    blocks: int = 1
    max_pool: bool = True
    image_size: int = 224

    @property
    def feature_width(self) -> int:
        """Channels of the last group."""
        return self.channels * 2 ** (self.groups - 1)

    @nn.compact
    def __call__(self, images: jax.Array, ctx: Context | None = None) -> jax.Array:
        """Features [B, feature_width] of images [B, H, W, 3]."""
        x = nn.relu(BatchNorm(name='bn1')(Conv(self.channels, 3, 2, name='conv1')(images), ctx))
        x = max_pool(x, 'inf') if self.max_pool else x
        for group in range(self.groups):
            for j in range(self.blocks):
                name = f'block_{group * self.blocks + j}'
                x = PromptBlock(self.channels * 2**group, bool(group and not j), name=name)(x, ctx)
        return x.mean(axis=(1, 2))
