"""The Swin Transformer (arXiv 2103.14030): attention inside windows of a map, shifted in every other block.

Parameter names: `embedding`, `embedding_norm`, `block_i` for all blocks of all stages in order, `merging_s` before the
first block of stage s >= 1, `norm`. A block's parts are those of `transformer.Block` and its `relative_bias`.

Shapes: B images, rows x columns of a map, C channels, w window side, W windows of a map, H heads, S stages.
"""

import math
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax.errors import UsageError, unknown
from vpt_jax.models.network import Network
from vpt_jax.models.places import Context
from vpt_jax.models.relative import token_index
from vpt_jax.models.stages import Staged
from vpt_jax.models.transformer import ACTIVATIONS, Attention, Dense, Mlp, layer_norm
from vpt_jax.models.vit import PatchEmbedding

VARIANTS = {
    'T': {'embed_dim': 96, 'depths': (2, 2, 6, 2), 'heads': (3, 6, 12, 24), 'windows': (7, 7, 7, 7)},
    'S': {'embed_dim': 96, 'depths': (2, 2, 18, 2), 'heads': (3, 6, 12, 24), 'windows': (7, 7, 7, 7)},
    'B': {'embed_dim': 128, 'depths': (2, 2, 18, 2), 'heads': (4, 8, 16, 32), 'windows': (7, 7, 7, 7)},
    'L': {'embed_dim': 192, 'depths': (2, 2, 18, 2), 'heads': (6, 12, 24, 48), 'windows': (7, 7, 7, 7)},
}

# What is added to the scores of positions that the shift brought into one window from opposite sides of the map.
_APART = -100.0


@lru_cache(maxsize=64)
def shift_mask(rows: int, columns: int, window: int, shift: int) -> np.ndarray:
    """What is added to the scores inside the windows of a map that was rolled by `shift` up and left.

    Returns:
      float32 [W, w * w, w * w]: 0 for positions of one region of the original map, -100 for others.
    """

    def strips(size: int) -> np.ndarray:
        at = np.arange(size)
        return (at >= size - window).astype(int) + (at >= size - shift)

    regions = (3 * strips(rows)[:, None] + strips(columns)[None])[None, ..., None]
    regions = np.asarray(into_windows(regions, window))[..., 0]
    return np.where(regions[:, :, None] == regions[:, None], 0.0, _APART).astype(np.float32)


def into_windows(x: Any, window: int) -> Any:
    """Cuts maps [B, rows, columns, C] into windows [B * W, w * w, C], row-major; numpy or jax."""
    batch, rows, columns, channels = x.shape
    x = x.reshape(batch, rows // window, window, columns // window, window, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, window * window, channels)


def from_windows(x: jax.Array, window: int, rows: int, columns: int) -> jax.Array:
    """The inverse of `into_windows` for maps of `rows` by `columns`."""
    x = x.reshape(-1, rows // window, columns // window, window, window, x.shape[-1])
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows, columns, x.shape[-1])


class SwinBlock(nn.Module):
    """A block over maps, callable as a whole or by its parts as `transformer.Block` is.

    Attributes:
      heads, mlp_dim: H, and the MLP's width.
      window: w, which the relative-position table is made for.
      shifted: rolls the map by w // 2 unless it is one window.
      activation, ln_eps, dtype: as in `Swin`.
    """

    heads: int
    mlp_dim: int
    window: int
    shifted: bool
    activation: str
    ln_eps: float
    dtype: Any = None

    def setup(self):
        """Makes the sub-modules and parameters."""
        self.norm1 = layer_norm(self.ln_eps, self.dtype, 'LayerNorm_0')
        self.attention = Attention(self.heads, self.dtype, name='MultiHeadDotProductAttention_0')
        table = ((2 * self.window - 1) ** 2, self.heads)
        self.table = self.param('relative_bias', nn.initializers.truncated_normal(0.02), table)
        self.norm2 = layer_norm(self.ln_eps, self.dtype, 'LayerNorm_1')
        self.mlp = Mlp(self.mlp_dim, self.activation, dtype=self.dtype, name='MlpBlock_0')

    def attend(self, x: jax.Array) -> jax.Array:
        """The attention branch, without the residual: [B, rows, columns, C] to the same."""
        batch, rows, columns, _ = x.shape
        w = self.window
        shift = w // 2 if self.shifted and min(rows, columns) > w else 0
        y = self.norm1(x)
        y = jnp.roll(y, (-shift, -shift), axis=(1, 2)) if shift else y
        # timm's rule for maps that are no whole windows: zeros behind the norm, which are attended to. `Swin` lets
        # no such map come here unless it is asked to.
        below, right = -rows % w, -columns % w
        y = jnp.pad(y, ((0, 0), (0, below), (0, right), (0, 0))) if below or right else y
        padded = y.shape[1:3]
        bias = jnp.transpose(self.table[token_index((w, w))[1:, 1:]], (2, 0, 1))[None]  # the first token is CLS
        if shift:
            bias = jnp.tile(bias + shift_mask(*padded, w, shift)[:, None], (batch, 1, 1, 1))
        y = self.attention(into_windows(y, w), bias=bias)
        y = from_windows(y, w, *padded)[:, :rows, :columns]
        return jnp.roll(y, (shift, shift), axis=(1, 2)) if shift else y

    def feed(self, x: jax.Array, beside: jax.Array | None = None) -> jax.Array:
        """The MLP branch, without the residual: [B, rows, columns, C] to the same; `beside` joins behind the norm."""
        y = self.norm2(x)
        y = y if beside is None else y + beside
        return self.mlp(y.reshape(y.shape[0], -1, y.shape[-1])).reshape(y.shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The whole block: [B, rows, columns, C] to the same."""
        x = x + self.attend(x)
        return x + self.feed(x)


class PatchMerging(nn.Module):
    """Four neighbours become one position: concatenation, LayerNorm, linear layer without bias."""

    ln_eps: float
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, rows, columns, C] to [B, rows / 2, columns / 2, 2 C]."""
        batch, rows, columns, channels = x.shape
        x = x.reshape(batch, rows // 2, 2, columns // 2, 2, channels)
        # The order of the neighbours is (0, 0), (1, 0), (0, 1), (1, 1), row first.
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, -1, 4 * channels)
        x = layer_norm(self.ln_eps, self.dtype, 'LayerNorm_0')(x)
        x = Dense((2 * channels,), self.dtype, use_bias=False, name='reduction')(x)
        return x.reshape(batch, rows // 2, columns // 2, 2 * channels)


class Swin(Staged, nn.Module):
    """A Swin Transformer as a pure function of (params, images, method, prompts).

    `layer` sees maps as in `Staged`, `readout` the map after the final norm.

    It lacks `tokens`: a map has no sequence that prompts could join. VPT's own Swin prepends prompts to every window,
    merges them four to one between stages, and pads the position bias; what exactly it computes is published as code
    only and is not reproduced here. A block's `attention` sees windows [B W, w w, C].

    Attributes:
      embed_dim: C of the first stage; it doubles from stage to stage.
      depths, heads: blocks and H of every stage.
      windows: w of every stage. Where a stage's map at `image_size` is smaller than the window of the others, the
        weights are made for a window of the size of the map.
      patch_size: side of the patches of the embedding.
      mlp_ratio: width of the MLPs over C.
      image_size: side of the images that the weights were made for. Other sizes do if every map is whole windows.
      pad_windows: pads maps that are no whole windows as timm does, instead of refusing them as the original does.
      classes: of the classifier that the network came with (`Network`), 0 for none.
      activation: a name of `ACTIVATIONS`; `ln_eps`: epsilon of every LayerNorm.
      dtype: computation type; None computes in the parameters' type.

    Raises:
      UsageError: settings that do not belong together; images whose maps do not fit the windows.
    """

    embed_dim: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    windows: tuple[int, ...]
    patch_size: int = 4
    mlp_ratio: float = 4.0
    image_size: int = 224
    pad_windows: bool = False
    classes: int = 0
    activation: str = 'gelu'
    ln_eps: float = 1e-5
    dtype: Any = None

    places = Network.places | {'attention'}

    def __post_init__(self):
        self.settle('depths', 'heads', 'windows')
        if self.activation not in ACTIVATIONS:
            raise unknown('activation', self.activation, ACTIVATIONS)
        for stage, heads in enumerate(self.heads):
            if self.channels(stage) % heads:
                raise UsageError(f'{self.channels(stage)} channels of stage {stage} are not divisible by {heads} heads')
        super().__post_init__()

    def channels(self, stage: int) -> int:
        """C of a stage."""
        return self.embed_dim * 2**stage

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns of the map of every stage; a remainder smaller than a patch is dropped.

        Raises:
          UsageError: a map that does not fit the windows, or that cannot be halved.
        """
        found = []
        for stage, w in enumerate(self.windows):
            side = self.patch_size * 2**stage
            rows, columns = height // side, width // side
            whole = self.pad_windows or not (rows % w or columns % w)
            halves = stage + 1 == len(self.windows) or not (rows % 2 or columns % 2)
            if min(rows, columns) < w or not whole or not halves:
                why = f'is not whole windows of {w}x{w}' if halves else 'cannot be halved'
                good = math.lcm(*(self.patch_size * 2**s * w for s, w in enumerate(self.windows)))
                raise UsageError(
                    f'images of {height}x{width} pixels make a map of {rows}x{columns} in stage {stage}, which {why}; '
                    f'multiples of {good} pixels fit this network'
                )
            found.append((rows, columns))
        return found

    def setup(self):
        """Makes the sub-modules."""
        self.embedding = PatchEmbedding(self.embed_dim, self.patch_size, dtype=self.dtype)
        self.embedding_norm = layer_norm(self.ln_eps, self.dtype, 'embedding_norm')
        self.joints = [PatchMerging(self.ln_eps, self.dtype, name=f'merging_{s}') for s in range(1, len(self.depths))]
        self.blocks = [
            SwinBlock(self.heads[stage], round(self.mlp_ratio * self.channels(stage)), self.windows[stage],
                      bool(j % 2), self.activation, self.ln_eps, self.dtype, name=f'block_{i}')
            for i, (stage, j) in enumerate(self.stages())
        ]  # fmt: skip
        self.norm = layer_norm(self.ln_eps, self.dtype, 'norm')
        self.make_classifier()

    def stem(self, images: jax.Array, ctx: Context) -> jax.Array:
        """Patches and their norm: [B, height, width, channels] to [B, rows, columns, embed_dim]."""
        grids = self.grids(*images.shape[1:3])
        return self.embedding_norm(self.embedding(images, grids[0]))

    def final(self, x: jax.Array) -> jax.Array:
        """The final norm."""
        return self.norm(x)
