"""ConvNeXt (arXiv 2201.03545): depthwise 7x7 convolutions and pointwise MLPs over maps in four stages.

Parameter names: `embedding` and `embedding_norm` (the stem), `block_i` for all blocks of all stages in order,
`downsample_s` before the first block of stage s >= 1, `norm`.

Shapes: B images, rows x columns of a map, C channels.
"""

from typing import Any

import flax.linen as nn
import jax

from vpt_jax.errors import UsageError, unknown
from vpt_jax.models.places import Context
from vpt_jax.models.stages import Staged
from vpt_jax.models.transformer import ACTIVATIONS, Mlp, layer_norm
from vpt_jax.models.vit import PatchEmbedding

VARIANTS = {
    'T': {'depths': (3, 3, 9, 3), 'dims': (96, 192, 384, 768)},
    'S': {'depths': (3, 3, 27, 3), 'dims': (96, 192, 384, 768)},
    'B': {'depths': (3, 3, 27, 3), 'dims': (128, 256, 512, 1024)},
    'L': {'depths': (3, 3, 27, 3), 'dims': (192, 384, 768, 1536)},
    'XL': {'depths': (3, 3, 27, 3), 'dims': (256, 512, 1024, 2048)},
}

#: Side of the stem's patches, and of the kernels of the blocks.
STEM, KERNEL = 4, 7


class ConvNeXtBlock(nn.Module):
    """A block over maps; `feed` is its one residual branch, `depthwise`, `norm` and `mlp` are the parts of it.

    Attributes:
      channels: C; the MLP is four times as wide.
      activation, ln_eps, layer_scale, dtype: as in `ConvNeXt`.
    """

    channels: int
    activation: str
    ln_eps: float
    layer_scale: bool = True
    dtype: Any = None

    def setup(self):
        """Makes the sub-modules and parameters."""
        self.depthwise = nn.Conv(self.channels, (KERNEL, KERNEL), padding=KERNEL // 2,
                                 feature_group_count=self.channels, dtype=self.dtype, name='depthwise')  # fmt: skip
        self.norm = layer_norm(self.ln_eps, self.dtype, 'LayerNorm_0')
        self.mlp = Mlp(4 * self.channels, self.activation, dtype=self.dtype, name='MlpBlock_0')
        if self.layer_scale:
            self.scale = self.param('layer_scale', nn.initializers.constant(1e-6), (self.channels,))

    def feed(self, x: jax.Array) -> jax.Array:
        """The branch, without the residual: [B, rows, columns, C] to the same."""
        y = self.norm(self.depthwise(x))
        y = self.mlp(y.reshape(y.shape[0], -1, self.channels)).reshape(y.shape)
        return y * self.scale.astype(y.dtype) if self.layer_scale else y

    def __call__(self, x: jax.Array) -> jax.Array:
        """The whole block: [B, rows, columns, C] to the same."""
        return x + self.feed(x)


class Downsample(nn.Module):
    """LayerNorm, then a 2x2 convolution of stride 2; an odd last row or column is dropped."""

    channels: int
    ln_eps: float
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, rows, columns, C] to [B, rows // 2, columns // 2, channels]."""
        x = layer_norm(self.ln_eps, self.dtype, 'LayerNorm_0')(x)
        grid = (x.shape[1] // 2, x.shape[2] // 2)
        return PatchEmbedding(self.channels, 2, dtype=self.dtype, name='Conv_0')(x, grid)


class ConvNeXt(Staged, nn.Module):
    """A ConvNeXt as a pure function of (params, images, method, prompts).

    `layer` sees maps as in `Staged`, `readout` the last block's map. It lacks `tokens` and `attention`, which maps and
    convolutions do not have, and `first_layers`: the published code refuses to widen its stem.

    Attributes:
      depths, dims: blocks and C of every stage.
      image_size: side of the images that the weights were trained on; any size of at least 32 pixels does.
      layer_scale: learned vectors on the blocks' branches.
      activation: a name of `ACTIVATIONS`; `ln_eps`: epsilon of every LayerNorm.
      classes: of the classifier that the network came with (`Network`), 0 for none.
      dtype: computation type; None computes in the parameters' type.

    Raises:
      UsageError: settings that do not belong together; images that leave nothing of the last map.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    image_size: int = 224
    layer_scale: bool = True
    activation: str = 'gelu'
    ln_eps: float = 1e-6
    classes: int = 0
    dtype: Any = None

    # Remainders are dropped at every stride, so that images of any size will do.
    patch_size = 1

    def __post_init__(self):
        self.settle('depths', 'dims')
        if self.activation not in ACTIVATIONS:
            raise unknown('activation', self.activation, ACTIVATIONS)
        super().__post_init__()

    def channels(self, stage: int) -> int:
        """C of a stage."""
        return self.dims[stage]

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns of every stage's map; remainders are dropped by the stem and at every joint.

        Raises:
          UsageError: nothing would be left of the last map.
        """
        least = STEM * 2 ** (len(self.dims) - 1)
        if min(height, width) < least:
            raise UsageError(
                f'images of {height}x{width} pixels leave nothing of the last map; this network needs at least {least} '
                'pixels a side'
            )
        return [(height // (STEM * 2**s), width // (STEM * 2**s)) for s in range(len(self.dims))]

    def setup(self):
        """Makes the sub-modules."""
        self.embedding = PatchEmbedding(self.dims[0], STEM, dtype=self.dtype)
        self.embedding_norm = layer_norm(self.ln_eps, self.dtype, 'embedding_norm')
        self.joints = [
            Downsample(self.dims[s], self.ln_eps, self.dtype, name=f'downsample_{s}') for s in range(1, len(self.dims))
        ]
        self.blocks = [
            ConvNeXtBlock(self.dims[stage], self.activation, self.ln_eps, self.layer_scale, self.dtype,
                          name=f'block_{i}')
            for i, (stage, _) in enumerate(self.stages())
        ]  # fmt: skip
        self.norm = layer_norm(self.ln_eps, self.dtype, 'norm')
        self.make_classifier()

    def stem(self, images: jax.Array, ctx: Context) -> jax.Array:
        """Patches of 4 x 4 pixels and their norm."""
        grids = self.grids(*images.shape[1:3])
        return self.embedding_norm(self.embedding(images, grids[0]))

    def pool(self, x: jax.Array) -> jax.Array:
        """The network's own readout: LayerNorm of the mean, [B, rows, columns, C] to [B, C]."""
        return self.norm(super().pool(x))
