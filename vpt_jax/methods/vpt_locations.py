"""VPT's other prompt locations: add, add-1, prepend-pixel, pad, below (arXiv 2203.12119, KMnP/vpt@4410440 ablations).

Shapes: B images, T tokens, N patches, P prompts, D width, S image side, p patch side, L blocks.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vpt_jax.errors import UsageError, unknown
from vpt_jax.methods.base import Method, PyTree, overlay
from vpt_jax.methods.vpt import check_dropout, check_num_tokens, uniform_prompts
from vpt_jax.models import batch_statistics
from vpt_jax.models.places import Context

# ImageNet's pixel statistics, which the reference applies to prompts that are drawn as images.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def _imagenet(pixels: jax.Array) -> jax.Array:
    """ImageNet normalisation of pixels in [0, 1], channels last."""
    return (pixels - jnp.array(MEAN)) / jnp.array(STD)


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
        pixels = _imagenet(prompts['pixels']) if self.pixel_init == 'imagenet' else prompts['pixels']
        tokens = ctx.model.patches(pixels[None].astype(x.dtype)).reshape(1, self.num_tokens, -1)
        tokens = jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape[1:]))
        return ctx.insert(x, ctx.dropout(tokens, self.dropout, 'prompts'))


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

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """Draws the frame."""
        k1, k2 = jax.random.split(key)
        size, n = model.image_size, self.num_pixels
        draw = jax.random.uniform if self.pixel_init == 'imagenet' else jax.random.normal
        return {'top_bottom': draw(k1, (2 * n, size + 2 * n, 3)), 'left_right': draw(k2, (size, 2 * n, 3))}

    def pixels(self, prompts: PyTree, images: jax.Array, ctx: Context) -> jax.Array:
        """Joins the sides first, then top and bottom."""
        n, batch = self.num_pixels, images.shape[0]
        norm = _imagenet if self.pixel_init == 'imagenet' else jnp.asarray
        sides, ends = (
            jnp.broadcast_to(norm(prompts[k]).astype(images.dtype), (batch, *prompts[k].shape))
            for k in ('left_right', 'top_bottom')
        )
        images = jnp.concatenate([sides[:, :, :n], images, sides[:, :, n:]], axis=2)
        return jnp.concatenate([ends[:, :n], images, ends[:, n:]], axis=1)


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
            raise UsageError(f'method vpt_below widens the first convolution, which {type(model).__name__} does not '
                             'offer; choose another method or backbone')  # fmt: skip

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
            channels = (channels - sum(MEAN) / 3) / (sum(STD) / 3)
        channels = channels.astype(images.dtype)
        return jnp.concatenate([images, jnp.broadcast_to(channels, (images.shape[0], *channels.shape))], axis=3)

    def weights(self, prompts: PyTree, params: PyTree) -> PyTree:
        """The backbone with the wider convolution."""
        return overlay(params, {name: tree for name, tree in prompts.items() if name != 'channels'})
