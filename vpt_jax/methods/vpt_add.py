"""VPT's prompt locations add and add-1: prompts on top of the tokens (arXiv 2203.12119, KMnP/vpt@4410440 ablations).

Shapes: B images, T tokens, N patches, D width, L blocks.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vpt_jax.methods.base import Method, PyTree
from vpt_jax.methods.vpt import check_dropout, uniform_prompts
from vpt_jax.models.places import Context


@dataclasses.dataclass(frozen=True)
class VPTAdd(Method):
    """Prompts are added to the tokens, CLS included: one per position, or one vector for all (`single`).

    Prompts: `prompts` [1 + N, D], or [1, D] if single; deep: `deep` [L - 1, same].

    Attributes:
      single: the original's location add-1 instead of add.
      deep: add another set before every block.
      dropout: element-wise, per image, in training.
    """

    name: ClassVar[str] = 'vpt_add'
    feeds_blocks: ClassVar[bool] = True
    single: bool = False
    deep: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        check_dropout(self.name, dropout=self.dropout)

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """Draws the prompts."""
        rows, columns = model.grid(model.image_size)
        count = 1 if self.single else model.prefix + rows * columns
        k1, k2 = jax.random.split(key)
        prompts = {'prompts': uniform_prompts(k1, (count, model.width), model.patch_size)}
        if self.deep:
            prompts['deep'] = uniform_prompts(k2, (model.depth - 1, count, model.width), model.patch_size)
        return prompts

    def _add(self, x: jax.Array, rows: jax.Array, i: int | jax.Array, ctx: Context) -> jax.Array:
        rows = rows if self.single else ctx.beside_own(rows, x)
        rows = ctx.dropout(jnp.broadcast_to(rows, (x.shape[0], *rows.shape)), self.dropout, 'prompts', i)
        return x + rows.astype(x.dtype)

    def tokens(self, prompts: PyTree, x: jax.Array, ctx: Context) -> jax.Array:
        """Adds the first prompts to the embedded tokens."""
        return self._add(x, prompts['prompts'], 0, ctx)

    def layer(self, prompts: PyTree, block: Callable, x: jax.Array, i: int | jax.Array, ctx: Context) -> jax.Array:
        """Adds the block's prompts."""
        return block(self._add(x, prompts['deep'][i - 1], i, ctx) if self.deep and ctx.start else x)

    def boundaries(self, depth: int) -> tuple[int, ...]:
        """Block 0 differs."""
        return (1,) if self.deep else ()
