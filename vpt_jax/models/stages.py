"""What networks of stages share: blocks over maps that get smaller from stage to stage.

Shapes: B images, H rows, W columns, C channels of a map.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from vpt_jax.errors import UsageError
from vpt_jax.models.network import Network
from vpt_jax.models.places import UNCHANGED, Context, Places


class Staged(Network):
    """A network of stages, each a run of blocks over maps; mixed into linen modules.

    A stem, the blocks, what comes between the last of them and the pooling (`final`), and the pooling. `layer` is
    called around every block, in order over the stages, with maps [B, H, W, C]; `readout` gets the map that enters the
    pooling. There is no place `tokens`: a map has no sequence that prompts could join.

    Attributes:
      depths: number of blocks of every stage.
      blocks: all of them, in order.
      joints: layers that join the stages and belong to no block, the first before stage 1; empty if the blocks
        themselves change the maps.
    """

    depths: tuple[int, ...]
    blocks: Sequence[nn.Module]
    joints: Sequence[nn.Module] = ()

    def settle(self, *names: str) -> None:
        """Turns settings with an entry a stage into tuples; files of settings hold lists.

        Raises:
          UsageError: settings for different numbers of stages, or a stage without blocks.
        """
        for name in names:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len({len(getattr(self, name)) for name in names}) > 1 or min(self.depths, default=0) < 1:
            given = ', '.join(f'{name}={getattr(self, name)}' for name in names)
            raise UsageError(f'a {type(self).__name__} needs {", ".join(names)} for the same stages, got {given}')

    def channels(self, stage: int) -> int:
        """C of what a stage gives."""
        raise NotImplementedError

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns of what every stage gives, for images of `height` by `width` pixels.

        Raises:
          UsageError: images that the network cannot take.
        """
        raise NotImplementedError

    @property
    def depth(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)

    @property
    def feature_width(self) -> int:
        """Channels of the last stage, or classes of the classifier."""
        return self.classes or self.channels(len(self.depths) - 1)

    def stages(self) -> list[tuple[int, int]]:
        """(stage, place in the stage) of every block."""
        return [(stage, j) for stage, depth in enumerate(self.depths) for j in range(depth)]

    other_places = ", a block 'layer3.0' (stages count from 1), a stage 'layer3'"

    def block_of(self, place: int | str) -> int:
        """The number of the block that `place` enters, which may be 'layer3.0' or, for its first block, 'layer3'."""
        if found := re.fullmatch(r'layer(\d+)(?:\.(\d+))?', str(place)):
            at = (int(found[1]) - 1, int(found[2] or 0))
            place = self.stages().index(at) if at in self.stages() else place
        return super().block_of(place)

    def activation_shape(self, i: int) -> tuple[int, int, int]:
        """(H, W, C) of the map that enters block `i` or, for i = depth, the pooling; blocks keep the shape."""
        stage, _ = self.stages()[min(i, self.depth - 1)]
        return *self.grids(self.image_size, self.image_size)[stage], self.channels(stage)

    def stem(self, images: jax.Array, ctx: Context) -> jax.Array:
        """Everything before block 0: [B, height, width, channels] to [B, H, W, C]."""
        raise NotImplementedError

    def block(self, i: int, ctx: Context) -> Callable[[jax.Array], jax.Array]:
        """Block `i` as `layer` gets it."""
        return self.blocks[i]

    def final(self, x: jax.Array) -> jax.Array:
        """What comes between the last block and the pooling: [B, H, W, C] to the same."""
        return x

    def pool(self, x: jax.Array) -> jax.Array:
        """The network's own readout, the mean over all positions: [B, H, W, C] to [B, C]."""
        return x.mean(axis=(1, 2))

    def __call__(self, images: jax.Array, method: Places = UNCHANGED, prompts: Any = None,
                 ctx: Context | None = None) -> jax.Array:  # fmt: skip
        """Features of normalised images.

        Args:
          images: [B, height, width, channels] float, normalised as the weights expect.
          method: what to do at the places `layer` and `readout`.
          prompts: the method's pytree.
          ctx: the forward pass's `Context`; a fresh one in evaluation mode if None.

        Returns:
          [B, feature_width] features.
        """
        ctx = Context() if ctx is None else ctx
        ctx.model, ctx.images = self, images
        x = self.stem(images, ctx)
        for i, (stage, j) in enumerate(self.stages()):
            if stage and not j and self.joints:
                x = self.joints[stage - 1](x)
            ctx.start = i
            x = method.layer(prompts, self.block(i, ctx), x, i, ctx)
        return self.classify(method.readout(prompts, self.final(x), self.pool, ctx))
