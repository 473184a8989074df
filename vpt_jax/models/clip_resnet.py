"""CLIP's ResNets (arXiv 2103.00020): a stem of three convolutions, striding by average pooling, attention pooling.

Shapes: B images, H rows, W columns, C channels, E width of the joint embedding.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpt_jax.errors import UsageError
from vpt_jax.models import posemb
from vpt_jax.models.convolution import BatchNorm, Conv
from vpt_jax.models.places import Context
from vpt_jax.models.resnet import ResNet, average_pool
from vpt_jax.models.transformer import Dense, attention


def variant(depths: tuple[int, ...], width: int, heads: int, embed: int, image_size: int) -> dict[str, Any]:
    """Settings of a published size: channels of the stem, heads of the pooling, E."""
    inner = tuple(width * 2**i for i in range(4))
    return {'depths': depths, 'stem_width': width, 'inner': inner, 'outer': tuple(4 * w for w in inner),
            'heads': heads, 'embed_width': embed, 'image_size': image_size}  # fmt: skip


VARIANTS = {
    'RN50': variant((3, 4, 6, 3), 64, 32, 1024, 224),
    'RN101': variant((3, 4, 23, 3), 64, 32, 512, 224),
    'RN50x4': variant((4, 6, 10, 6), 80, 40, 640, 288),
    'RN50x16': variant((6, 8, 18, 8), 96, 48, 768, 384),
    'RN50x64': variant((3, 15, 36, 10), 128, 64, 1024, 448),
}


class AttentionPool(nn.Module):
    """The mean of all positions attends to itself and to them; a linear map to the joint embedding.

    Attributes:
      heads: number of heads.
      features: E.
      dtype: computation type.
    """

    heads: int
    features: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, pos: jax.Array) -> jax.Array:
        """Pools [B, H, W, C] with positions [1, 1 + H * W, C] to [B, E]."""
        batch, rows, columns, width = x.shape
        x = x.reshape(batch, rows * columns, width)
        x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1) + pos.astype(x.dtype)
        split = (self.heads, width // self.heads)
        q = Dense(split, self.dtype, name='query')(x[:, :1])
        k, v = (Dense(split, self.dtype, name=name)(x) for name in ('key', 'value'))
        return Dense((self.features,), self.dtype, name='out')(attention(q, k, v))[:, 0]


class CLIPResNet(ResNet):
    """CLIP's convolutional image tower; features [B, E] are the joint embedding, not normalised.

    Attributes:
      heads: of the attention pooling.
      embed_width: E.
      image_size: side of the images that the pooling's positions are for; others get resampled ones.
    """

    heads: int = 32
    embed_width: int = 1024

    average = True
    posemb_prefix = 1
    # timm's rule for CLIP weights; the original refuses maps of another size.
    posemb_rule = 'cubic_antialias'

    @property
    def feature_width(self) -> int:
        """Width of the joint embedding."""
        return self.classes or self.embed_width

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns of what every stage gives; every halving but the first drops a remainder.

        Raises:
          UsageError: nothing would be left of the last map.
        """
        height, width = -(-height // 2), -(-width // 2)
        found = [(height // 2 ** (s + 1), width // 2 ** (s + 1)) for s in range(len(self.depths))]
        if not min(found[-1]):
            least = 2 ** (len(self.depths) + 1) - 1
            raise UsageError(f'this network needs images of at least {least} pixels a side')
        return found

    def make_ends(self) -> None:
        """Makes the stem and the pooling."""
        widths = (self.stem_width // 2, self.stem_width // 2, self.stem_width)
        self.stem_convs = [
            Conv(width, 3, 2 if i == 1 else 1, dtype=self.dtype, name=f'conv{i}') for i, width in enumerate(widths, 1)
        ]
        self.stem_norms = [BatchNorm(dtype=self.dtype, name=f'bn{i}') for i in (1, 2, 3)]
        rows, columns = self.grids(self.image_size, self.image_size)[-1]
        shape = (1, 1 + rows * columns, self.outer[-1])
        self.pos_embedding = self.param('pos_embedding', nn.initializers.normal(shape[-1] ** -0.5), shape)
        self.attnpool = AttentionPool(self.heads, self.embed_width, self.dtype)
        self.make_classifier()

    def stem(self, images: jax.Array, ctx: Context) -> jax.Array:
        """Three convolutions and average pooling: a quarter of the size."""
        x = images
        for conv, norm in zip(self.stem_convs, self.stem_norms, strict=True):
            x = nn.relu(norm(conv(x), ctx))
        return average_pool(x, 2)

    def pool(self, x: jax.Array) -> jax.Array:
        """Attention pooling: [B, H, W, C] to [B, E]."""
        pos = posemb.resample(self.pos_embedding, x.shape[1:3], self.posemb_prefix, self.posemb_rule)
        return self.attnpool(x, pos)
