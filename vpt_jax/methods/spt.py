"""SPT: Self-Prompt Tuning, VPT that starts from tokens of the training images (arXiv 2402.02382, ICML 2024).

The forward pass is VPT's. Prompts of block i start as tokens that enter block i of the frozen, prompt-free network:
T_0 are the embedded patches without positions, T_i the patches after block i - 1; CLS is never among them. Where the
network pools by a mean over everything but CLS (MAE), prompts are averaged in. WangYZ1608/Self-Prompt-Tuning@ce0754f.

Shapes: S drawn images, N patches, P prompts, D width, L prompted blocks.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax.errors import UsageError, unknown
from vpt_jax.methods.base import PyTree
from vpt_jax.methods.kmeans import lloyd
from vpt_jax.methods.vpt import VPT
from vpt_jax.models.places import Context, Places

STRATEGIES = ('random', 'mean_pooling', 'max_pooling', 'kmeans')
_CHUNK = 8  # images at a time: tokens of every block of more would fill the memory


class _Tokens(Places):
    """Notes the patch tokens that enter the first `blocks` blocks, those of block 0 without positions."""

    def __init__(self, blocks: int):
        self.blocks = blocks

    def tokens(self, prompts, x, ctx):
        patches = ctx.model.patches(ctx.images)
        ctx.memo[0] = patches.reshape(x.shape[0], -1, x.shape[-1])
        return x

    def layer(self, prompts, block, x, i, ctx):
        if 0 < ctx.start < self.blocks:
            ctx.memo[ctx.start] = ctx.patches(x)
        return block(x)

    def boundaries(self, depth):
        return tuple(range(depth))


def tokens_of(model: Any, stored: PyTree, images: jax.Array, blocks: int) -> jax.Array:
    """What enters the first `blocks` blocks of the network as it is, from images [S, H, W, 3]: [blocks, S, N, D]."""
    ctx = Context()
    model.apply({'params': stored}, images, _Tokens(blocks), None, ctx)
    return jnp.stack([ctx.memo[i] for i in range(blocks)]).astype(jnp.float32)


def pool_windows(tokens: jax.Array, count: int, reduce: Callable) -> jax.Array:
    """Pools tokens [..., N, D] over runs of their raster order to [..., count, D].

    As published: `count` - 1 windows of w = N // (count - 1) tokens, then the last N mod w or, if that is 0, all N.
    """
    total = tokens.shape[-2]
    width = total // (count - 1)
    rest = total % width
    windows = tokens[..., : (count - 1) * width, :]
    windows = windows.reshape(*tokens.shape[:-2], count - 1, width, tokens.shape[-1])
    last = tokens[..., total - rest :, :] if rest else tokens
    return jnp.concatenate([reduce(windows, axis=-2), reduce(last, axis=-2)[..., None, :]], axis=-2)


@dataclasses.dataclass(frozen=True)
class SPT(VPT):
    """VPT whose prompts start as tokens of the training images.

    Prompts are those of `VPT`. `init` alone draws VPT's random ones; `init_from` makes them tokens of images.

    Attributes:
      strategy: how P rows are made of the tokens of a block. 'random': P different tokens; 'mean_pooling',
        'max_pooling': P different rows out of each image's tokens, pooled by `pool_windows`; 'kmeans': the centers of
        `lloyd`, from P different tokens. Shallow prompts are always 'random'.
      images: S, drawn with replacement; 0 for as many as there are (published; 1 for MoCo v3).
      kmeans_tokens: tokens that are clustered, at most; these are drawn first and held in memory.
      The others are `VPT`'s.

    Raises:
      UsageError: a setting out of range, or one that excludes another.
    """

    name: ClassVar[str] = 'spt'
    num_tokens: int = 20
    deep: bool = True
    strategy: str = 'random'
    images: int = 0
    kmeans_tokens: int = 16384

    def __post_init__(self):
        super().__post_init__()
        if self.strategy not in STRATEGIES:
            raise unknown('SPT strategy', self.strategy, STRATEGIES)
        if self.strategy != 'random' and not self.deep:
            raise UsageError(f"method spt: strategy='{self.strategy}' needs deep=True; shallow prompts are always "
                             'embedded patches drawn at random')  # fmt: skip
        if self._pools and self.num_tokens < 2:
            raise UsageError(f"method spt: strategy='{self.strategy}' needs num_tokens >= 2, got {self.num_tokens}")
        for setting in ('project', 'last_layers_overwriting_patches'):
            if getattr(self, setting):
                raise UsageError(f'method spt: prompts start as tokens of every block, which excludes {setting}')
        for setting, least in (('images', 0), ('kmeans_tokens', self.num_tokens)):
            if getattr(self, setting) < least:
                raise UsageError(f'method spt: {setting} must be >= {least}, got {getattr(self, setting)}')

    @property
    def _pools(self) -> bool:
        return self.strategy in ('mean_pooling', 'max_pooling')

    def check(self, model: Any) -> None:
        """Refuses more pooling windows than an image has patches."""
        super().check(model)
        rows, columns = model.grid(model.image_size)
        if self._pools and self.num_tokens - 1 > rows * columns:
            raise UsageError(
                f"method spt: strategy='{self.strategy}' makes num_tokens - 1 = {self.num_tokens - 1} windows, but an "
                f'image has {rows * columns} patches; use fewer prompts or another strategy'
            )

    def init_from(self, key: jax.Array, model: Any, params: PyTree, prompts: PyTree, images: Any) -> PyTree:
        """Prompts from tokens of the images; only the images that a drawn token is of pass through the network."""
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
        drawn = rng.integers(len(images), size=self.images or len(images))
        rows, columns = model.grid(model.image_size)
        total = len(drawn) * (self.num_tokens if self._pools else rows * columns)
        if self.num_tokens > total:
            raise UsageError(
                f'method spt: {self.num_tokens} prompts cannot be drawn from the {total} tokens of {len(drawn)} '
                'images; use fewer prompts or more images'
            )
        count = min(self.kmeans_tokens, total) if self.strategy == 'kmeans' else self.num_tokens
        blocks = 1 + len(prompts.get('deep', ()))
        ids = np.stack([rng.choice(total, count, replace=False) for _ in range(blocks)])
        found = self.gather(model, params, images, drawn, ids)
        if self.strategy == 'kmeans':
            found = np.stack([lloyd(points, points[: self.num_tokens])[0] for points in found])
        found = jnp.asarray(found, jnp.float32)
        return {'prompts': found[0]} | ({'deep': found[1:]} if blocks > 1 else {})

    def gather(self, model: Any, params: PyTree, images: Any, drawn: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Some of the rows that the strategy draws from.

        Args:
          model, params, images: as in `init_from`.
          drawn: [S] which images.
          ids: [L, n] which rows: s * N + token or, where tokens are pooled, window * S + s (as published), where s
            is a place in `drawn`.

        Returns:
          float32 [L, n, D].
        """
        reduce = {'mean_pooling': jnp.mean, 'max_pooling': jnp.max}.get(self.strategy)

        @jax.jit
        def rows_of(stored: PyTree, chunk: jax.Array) -> jax.Array:
            tokens = tokens_of(model, stored, chunk, len(ids))
            return tokens if reduce is None else pool_windows(tokens, self.num_tokens, reduce)

        rows, columns = model.grid(model.image_size)
        draw, row = (ids % len(drawn), ids // len(drawn)) if reduce else np.divmod(ids, rows * columns)
        stored, found = model.stored(params), np.zeros((*ids.shape, model.width), np.float32)
        number = np.asarray(drawn)[draw]  # of the image
        needed = np.unique(number)
        for start in range(0, len(needed), _CHUNK):
            chunk = needed[start : start + _CHUNK]
            tokens = np.asarray(rows_of(stored, jnp.asarray(images[np.resize(chunk, _CHUNK)])))
            for place, image in enumerate(chunk):
                at = np.nonzero(number == image)
                found[at] = tokens[at[0], place, row[at]]
        return found
