"""VPT's prompt location below: learned channels under the image's (arXiv 2203.12119, KMnP/vpt@4410440 ablations).

Shapes: P prompts, D width of the first layer, S image side, p side of its kernel.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vpt_jax.errors import MissingPlace, UsageError, unknown
from vpt_jax.methods.base import Method, PyTree, overlay
from vpt_jax.models import batch_statistics
from vpt_jax.models.pixels import IMAGENET
from vpt_jax.models.places import Context


@dataclasses.dataclass(frozen=True)
class VPTBelow(Method):
    """Learned input channels below RGB; the first layers are trained with them (not parameter-efficient).

    These are the whole patch convolution of a ViT, the first convolution and its norm of a ResNet. Such a BatchNorm
    runs in train mode, as published: on the batch in training, on running statistics otherwise.

    Prompts: `channels` [S, S, P]; the first layers (`Network.first_layers`), `embedding/{kernel [p, p, 3 + P, D],
    bias [D]}` say, the kernel's first three input slices copied from the backbone.

    Attributes:
      num_channels: P (the original's NUM_TOKENS).
      pixel_init: 'uniform' (published for ViTs: channels and new slices from VPT's U(-v, v)), 'imagenet' (for ResNets:
        U(0, 1), and normalisation by the mean of ImageNet's channels at every use) or 'gaussian' (likewise: N(0, 1),
        used as it is). The latter two draw the slices Xavier-uniformly.
    """

    name: ClassVar[str] = 'vpt_below'
    num_channels: int = 1
    pixel_init: str = 'uniform'

    def __post_init__(self):
        if self.num_channels < 1:
            raise UsageError(f'method vpt_below: num_channels must be >= 1, got {self.num_channels}')
        if self.pixel_init not in ('uniform', 'imagenet', 'gaussian'):
            raise unknown('pixel initialisation', self.pixel_init, ('uniform', 'imagenet', 'gaussian'))

    def check(self, model: Any) -> None:
        """Refuses a backbone whose first convolution is not to be widened."""
        super().check(model)
        if not model.first_layers:
            raise MissingPlace(
                'first convolution',
                f'method vpt_below widens the first convolution, which {type(model).__name__} does not offer; choose '
                'another method or backbone',
            )

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """Draws the channels and the new slices of the kernel."""
        k1, k2 = jax.random.split(key)
        size, count = model.image_size, self.num_channels
        params = flatten_dict(params, sep='/')
        # What a norm has counted is not trained.
        names = [f'{layer}/{leaf}' for layer in model.first_layers for leaf in ('kernel', 'bias', 'scale')]
        layers = {name: jnp.array(params[name], jnp.float32) for name in names if name in params}
        first = f'{model.first_layers[0]}/kernel'
        side, _, _, width = layers[first].shape
        bound = math.sqrt(6.0 / (3 * side**2 + width))
        new = (side, side, count, width)
        if self.pixel_init == 'uniform':
            channels = jax.random.uniform(k1, (size, size, count), minval=-bound, maxval=bound)
        else:
            draw = jax.random.uniform if self.pixel_init == 'imagenet' else jax.random.normal
            channels = draw(k1, (size, size, count))
            bound = math.sqrt(6.0 / ((3 + count + width) * side**2))
        new = jax.random.uniform(k2, new, minval=-bound, maxval=bound)
        layers[first] = jnp.concatenate([layers[first], new], axis=2)
        return {'channels': channels, **unflatten_dict(layers, sep='/')}

    def init_state(self, model: Any, num_classes: int = 0, key: jax.Array | None = None) -> PyTree:
        """Running statistics of the first layers' BatchNorm, if there is one."""
        return batch_statistics.initial(model, model.first_layers)

    def pixels(self, prompts: PyTree, images: jax.Array, ctx: Context) -> jax.Array:
        """Appends the channels."""
        if ctx.state:
            batch_statistics.track(ctx)
        channels = prompts['channels']
        if self.pixel_init == 'imagenet':
            channels = (channels - sum(IMAGENET.mean) / 3) / (sum(IMAGENET.std) / 3)
        channels = channels.astype(images.dtype)
        return jnp.concatenate([images, jnp.broadcast_to(channels, (images.shape[0], *channels.shape))], axis=3)

    def weights(self, prompts: PyTree, params: PyTree) -> PyTree:
        """The backbone with the wider convolution."""
        return overlay(params, {name: tree for name, tree in prompts.items() if name != 'channels'})
