"""VPT's prompt location pad: a learned frame around the image (arXiv 2203.12119, KMnP/vpt@4410440 ablations).

Shapes: S image side, n width of the frame.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vpt_jax.errors import UsageError, unknown
from vpt_jax.methods.base import Method, PyTree
from vpt_jax.models.pixels import IMAGENET
from vpt_jax.models.places import Context


@dataclasses.dataclass(frozen=True)
class VPTPad(Method):
    """A learned frame around the image, which grows from S to S + 2n pixels; positions are resampled to the new grid.

    Prompts: `top_bottom` [2n, S + 2n, 3], `left_right` [S, 2n, 3].

    Attributes:
      num_pixels: n, the width of the frame (the original's NUM_TOKENS). In a ViT, S + 2n must be a multiple of the
        patch side.
      pixel_init: 'imagenet' (U(0, 1), and ImageNet normalisation at every use) or 'gaussian' (N(0, 1), used as it is;
        published for ConvNets only).
    """

    name: ClassVar[str] = 'vpt_pad'
    num_pixels: int = 8
    pixel_init: str = 'imagenet'

    def __post_init__(self):
        if self.num_pixels < 1:
            raise UsageError(f'method vpt_pad: num_pixels must be >= 1, got {self.num_pixels}')
        if self.pixel_init not in ('imagenet', 'gaussian'):
            raise unknown('pixel initialisation', self.pixel_init, ('imagenet', 'gaussian'))

    def check(self, model: Any) -> None:
        """Refuses a frame that does not fit the patch grid."""
        super().check(model)
        size = model.image_size + 2 * self.num_pixels
        if size % model.patch_size:
            raise UsageError(
                f'method vpt_pad: {model.image_size} + 2 x {self.num_pixels} = {size} pixels is not a multiple of the '
                f'patch size {model.patch_size}; choose another num_pixels'
            )
        model.clone(image_size=size).activation_shape(0)  # a Swin refuses maps that are not whole windows

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """Draws the frame."""
        k1, k2 = jax.random.split(key)
        size, n = model.image_size, self.num_pixels
        draw = jax.random.uniform if self.pixel_init == 'imagenet' else jax.random.normal
        return {'top_bottom': draw(k1, (2 * n, size + 2 * n, 3)), 'left_right': draw(k2, (size, 2 * n, 3))}

    def pixels(self, prompts: PyTree, images: jax.Array, ctx: Context) -> jax.Array:
        """Joins the sides first, then top and bottom."""
        n, batch = self.num_pixels, images.shape[0]
        norm = IMAGENET.normalise if self.pixel_init == 'imagenet' else jnp.asarray
        sides, ends = (
            jnp.broadcast_to(norm(prompts[k]).astype(images.dtype), (batch, *prompts[k].shape))
            for k in ('left_right', 'top_bottom')
        )
        images = jnp.concatenate([sides[:, :, :n], images, sides[:, :, n:]], axis=2)
        return jnp.concatenate([ends[:, :n], images, ends[:, n:]], axis=1)
