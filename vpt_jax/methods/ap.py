"""AP: activation prompts, the same for every image, added to what enters a block (arXiv 2604.06440).

z <- z + delta before the block's first norm, so that the skip connection carries it too. Neither code nor body of the
paper was readable: what is pinned here is the abstract's definition. Nothing below the first place is differentiated
or kept for it, so a late prompt trains at about the cost of a linear probe; with a batch norm whose statistics are
those of the batch behind it, a delta per channel would do nothing.

Shapes: B images, T tokens, D width; H, W, C of a map; L blocks.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax

from vpt_jax.errors import UsageError, unknown
from vpt_jax.methods.base import Method, PyTree
from vpt_jax.models.places import Context

SHAPES = ('full', 'channel')


@dataclasses.dataclass(frozen=True)
class AP(Method):
    """Additive prompts on activations, at one place or several.

    Prompts: `deltas/SHAPE` [n, T, D] or [n, H, W, C], by the shape ('197x768'), for the n places that have it; [n, D]
    or [n, C], by the width ('768'), for one number a channel.

    Attributes:
      at: the places (`Network.block_of`): numbers of blocks, at the input of which the prompt is added; 'end' for what
        leaves the last one, before the last norm of a ViT or the pooling of a ResNet; 'layer3.0' or 'layer3' in
        networks of stages. () for the paper's, as far as it is known: the third block of a ViT, the third to last of a
        network of stages (`layer4.0` of a ResNet-101).
      shape: 'full', a number for every entry, which ties the prompt to one image size; 'channel', the same at all
        tokens or positions.
      init_std: deviation of the first prompts; 0 starts as the frozen network.

    Raises:
      UsageError: an unknown shape or a negative deviation.
    """

    name: ClassVar[str] = 'ap'
    at: tuple[int | str, ...] = ()
    shape: str = 'full'
    init_std: float = 0.0

    def __post_init__(self):
        if self.shape not in SHAPES:
            raise unknown('shape of activation prompts', self.shape, SHAPES)
        if self.init_std < 0:
            raise UsageError(f'method ap: init_std must be >= 0, got {self.init_std}')

    def check(self, model: Any) -> None:
        """Refuses places that the backbone does not have."""
        super().check(model)
        self._places(model)

    def _places(self, model: Any) -> list[int]:
        """Numbers of the blocks whose input is prompted, ascending; L for what leaves the last."""
        third = 2 if 'tokens' in model.places else model.depth - 3
        return sorted({model.block_of(place) for place in self.at or (min(max(third, 0), model.depth - 1),)})

    def _rows(self, model: Any) -> dict[str, list[int]]:
        """The places of every shape, by its name in the prompts."""
        rows: dict[str, list[int]] = {}
        for i in self._places(model):
            rows.setdefault('x'.join(map(str, self._shape(model, i))), []).append(i)
        return rows

    def _shape(self, model: Any, i: int) -> tuple[int, ...]:
        whole = model.activation_shape(i)
        return whole if self.shape == 'full' else whole[-1:]

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """Draws the prompts."""
        rows = self._rows(model)
        keys = jax.random.split(key, len(rows))
        shapes = {name: (len(places), *self._shape(model, places[0])) for name, places in rows.items()}
        drawn = zip(keys, shapes.items(), strict=True)
        return {'deltas': {name: self.init_std * jax.random.normal(k, shape) for k, (name, shape) in drawn}}

    def layer(self, prompts: PyTree, block: Callable, x: jax.Array, i: int | jax.Array, ctx: Context) -> jax.Array:
        """The block with a prompt on its input, and on its output if it is the last and the end is prompted."""
        places, depth = self._places(ctx.model), ctx.model.depth
        x = block(self._prompted(prompts, x, ctx.start, i - ctx.start, ctx) if ctx.start in places else x)
        last = ctx.start == depth - 1 and depth in places
        return self._prompted(prompts, x, depth, 0, ctx) if last else x

    def _prompted(self, prompts: PyTree, x: jax.Array, place: int, later: int | jax.Array, ctx: Context) -> jax.Array:
        """What enters the block `later` blocks behind `place`, with its prompt."""
        name, places = next(item for item in self._rows(ctx.model).items() if place in item[1])
        delta = prompts['deltas'][name][places.index(place) + later]
        if delta.ndim == 2:
            delta = ctx.beside_own(delta, x)
        if self.shape == 'full' and delta.shape != x.shape[1:]:
            raise UsageError(
                f'method ap: prompts of {name} entries do not fit activations of {"x".join(map(str, x.shape[1:]))}: '
                "they belong to one image size (shape='channel' fits any)"
            )
        return x + delta.astype(x.dtype)

    def boundaries(self, depth: int) -> tuple[int, ...]:
        """Where prompted blocks begin or end, and the last block if the end is prompted."""
        at = self.at or (min(2, depth - 1),)
        changes = {i for i in range(1, depth) if (i in at) != (i - 1 in at)}
        return tuple(sorted(changes | ({depth - 1} if {'end', depth} & set(at) else set())))

    def untouched_end(self, depth: int) -> bool:
        """Unless it is prompted."""
        return not {'end', depth} & set(self.at)

    def first_block(self, model: Any) -> int:
        """The first place; a prompt on the end is the last block's."""
        return min(self._places(model)[0], model.depth - 1)
