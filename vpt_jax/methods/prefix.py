"""The blocks that a method leaves alone: what they make of an image depends on nothing that is trained.

It can be computed once, with `entering`, and given to `base.forward` instead of images ever after. Backbones need not
know: a method that watches takes the activation out, and one that swaps puts it in again; what would have led there is
then dead code, which XLA drops.

Shapes: B images, L blocks.
"""

from collections.abc import Callable
from typing import Any

import jax

from vpt_jax.models.places import Context, Places

PyTree = Any


def entry(method: Any, model: Any) -> int:
    """The block in front of which the network can be cut for a method; L for its very end, 0 for nowhere.

    Args:
      method: a `base.Method`.
      model: the backbone module.
    """
    first = method.first_block(model)
    return min(first, model.depth - 1) if method.changes('readout') else first


def entering(model: Any, method: Any, params: PyTree, images: jax.Array) -> jax.Array:
    """What the frozen network hands to the first block that a method touches.

    Args:
      model: the backbone module.
      method: the method; `entry` must not be 0.
      params: the frozen weights, as the module stores them.
      images: [B, H, W, 3] float, normalised as the backbone expects.

    Returns:
      Activations [B, ...] as they enter that block, or features [B, D] if it touches none.
    """
    cut = entry(method, model)
    if cut == model.depth:
        return model.apply({'params': params}, images)
    ctx = Context()
    model.apply({'params': params}, images, _Watch(cut), None, ctx)
    return ctx.memo['entering']


class _Watch(Places):
    """Notes what enters block `cut`."""

    def __init__(self, cut: int):
        self.cut = cut

    def layer(self, prompts: PyTree, block: Callable, x: jax.Array, i: int | jax.Array, ctx: Context) -> jax.Array:
        if ctx.start == self.cut:
            ctx.memo['entering'] = x
        return block(x)

    def boundaries(self, depth: int) -> tuple[int, ...]:
        return (self.cut, self.cut + 1)


class Entered(Places):
    """A method in a network whose block `cut` gets a known activation, whatever the blocks before it gave.

    Args:
      method: touches nothing before that block.
      cut: its number.
      x: what enters it, [B, ...].
    """

    def __init__(self, method: Places, cut: int, x: jax.Array):
        self.method, self.cut, self.x = method, cut, x

    def layer(self, prompts: PyTree, block: Callable, x: jax.Array, i: int | jax.Array, ctx: Context) -> jax.Array:
        """The frozen block before the cut, the method's behind it."""
        if ctx.start < self.cut:
            return block(x)
        return self.method.layer(prompts, block, self.x if ctx.start == self.cut else x, i, ctx)

    def readout(self, prompts: PyTree, x: jax.Array, pool: Callable, ctx: Context) -> jax.Array:
        """The method's."""
        return self.method.readout(prompts, x, pool, ctx)

    def untouched_end(self, depth: int) -> bool:
        """The method's."""
        return self.method.untouched_end(depth)

    def boundaries(self, depth: int) -> tuple[int, ...]:
        """The method's, and the cut."""
        return tuple(sorted({*self.method.boundaries(depth), self.cut, self.cut + 1}))
