"""VPT's prompt location prepend-pixel: learned image patches (arXiv 2203.12119, KMnP/vpt@4410440 ablations).

Shapes: B images, P prompts, D width, p patch side.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vpt_jax.errors import unknown
from vpt_jax.methods.base import Method, PyTree
from vpt_jax.methods.vpt import check_dropout, check_num_tokens
from vpt_jax.models.pixels import IMAGENET
from vpt_jax.models.places import Context


@dataclasses.dataclass(frozen=True)
class VPTPixels(Method):
    """A strip of P learned image patches goes through the frozen patch convolution (prepend-pixel). Shallow only.

    Prompts: `pixels` [p, p P, 3].

    Attributes:
      num_tokens: P.
      pixel_init: 'uniform' (VPT's U(-v, v)), 'gaussian' (N(0, 1)), or 'imagenet' (U(0, 1), and ImageNet normalisation
        at every use).
      dropout: on the resulting tokens, in training.
    """

    name: ClassVar[str] = 'vpt_pixels'
    num_tokens: int = 5
    pixel_init: str = 'uniform'
    dropout: float = 0.0

    def __post_init__(self):
        check_num_tokens(self.name, self.num_tokens)
        check_dropout(self.name, dropout=self.dropout)
        if self.pixel_init not in ('uniform', 'gaussian', 'imagenet'):
            raise unknown('pixel initialisation', self.pixel_init, ('uniform', 'gaussian', 'imagenet'))

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """Draws the strip."""
        side = model.patch_size
        shape = (side, side * self.num_tokens, 3)
        if self.pixel_init == 'gaussian':
            return {'pixels': jax.random.normal(key, shape)}
        if self.pixel_init == 'imagenet':
            return {'pixels': jax.random.uniform(key, shape)}
        bound = math.sqrt(6.0 / (3 * side**2 + model.width))
        return {'pixels': jax.random.uniform(key, shape, minval=-bound, maxval=bound)}

    def tokens(self, prompts: PyTree, x: jax.Array, ctx: Context) -> jax.Array:
        """Inserts the strip's tokens; they get no position."""
        pixels = IMAGENET.normalise(prompts['pixels']) if self.pixel_init == 'imagenet' else prompts['pixels']
        tokens = ctx.model.patches(pixels[None].astype(x.dtype)).reshape(1, self.num_tokens, -1)
        tokens = jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape[1:]))
        return ctx.insert(x, ctx.dropout(tokens, self.dropout, 'prompts'))
