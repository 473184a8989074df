"""PGN: a small trained CNN looks at the image and writes its prompts (arXiv 2210.06466; jochemloedeman/PGN@fe5ebc2).

    a = CNN(resize(x)) in [P N];  m = softmax(a.reshape(P, N));  prompts = m L

It chooses, for each of P prompts, a mixture of the N vectors of a trained library L. The prompts enter once, beside the
embedded patches, without positions; in CLIP's networks before the first norm, which they go through. IIP is the same
with P free vectors for all images, the original's baseline.

Shapes: B images, P prompts, N vectors in the library, D width, F features of the CNN.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vpt_jax.errors import UsageError, unknown
from vpt_jax.methods.base import Method, PyTree, overlay
from vpt_jax.methods.vpt import check_num_tokens
from vpt_jax.models import batch_statistics
from vpt_jax.models.initialisers import torch_uniform
from vpt_jax.models.places import Context
from vpt_jax.models.prompt_cnn import PromptCNN
from vpt_jax.models.resnet import ResNet, variant

CNNS = ('resnet10', 'resnet18')
MIXTURES = {'softmax': jax.nn.softmax, 'sigmoid': jax.nn.sigmoid}
_DEVIATION = 0.02


@dataclasses.dataclass(frozen=True)
class PGN(Method):
    """Prompts generated from the image.

    In training the CNN's norms use the batch, and keep running statistics for evaluation.

    Prompts: `cnn`, its convolutions, scales and biases; `mix/{kernel [F, P N], bias [P N]}`; `library` [N, D].
    State: the running statistics, as `models.batch_statistics` keeps them; those before training are 0 and 1.

    Attributes:
      num_tokens: P.
      library: N.
      mixture: 'softmax' over the library, or 'sigmoid' of every weight.
      resolution: the shorter side of the image is brought to so many pixels for the CNN, bilinearly and without
        anti-aliasing; None for the image as it is, which the original's 224 is for images of 224.
      cnn: 'resnet10', the original's own, or torchvision's 'resnet18', here untrained.
      channels: of resnet10's first group; every further group doubles them.
      groups, blocks: of resnet10, and in each group; the '10' are those of 4 groups of 1.
      max_pool: in resnet10's stem.

    Raises:
      UsageError: a setting out of range.
    """

    name: ClassVar[str] = 'pgn'
    num_tokens: int = 16
    library: int = 256
    mixture: str = 'softmax'
    resolution: int | None = None
    cnn: str = 'resnet10'
    channels: int = 16
    groups: int = 4
    blocks: int = 1
    max_pool: bool = True

    def __post_init__(self):
        check_num_tokens(self.name, self.num_tokens)
        for setting in ('library', 'resolution', 'channels', 'groups', 'blocks'):
            value = getattr(self, setting)
            if value is not None and value < 1:
                raise UsageError(f'method pgn: {setting} must be >= 1, got {value}')
        for kind, value, known in (('mixture of PGN', self.mixture, MIXTURES), ('CNN of PGN', self.cnn, CNNS)):
            if value not in known:
                raise unknown(kind, value, known)

    def network(self, image_size: int) -> PromptCNN | ResNet:
        """The CNN for images of that many pixels a side."""
        size = self.resolution or image_size
        if self.cnn == 'resnet18':
            return ResNet(**variant(18), image_size=size, parent=None)
        return PromptCNN(self.channels, self.groups, self.blocks, self.max_pool, size, parent=None)

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """Draws the CNN and the library."""
        k1, k2, k3, k4 = jax.random.split(key, 4)
        network = self.network(model.image_size)
        images = jnp.zeros((1, network.image_size, network.image_size, 3))
        drawn = flatten_dict(network.init(k1, images)['params'])
        inputs, outputs = network.feature_width, self.num_tokens * self.library
        return {
            'cnn': unflatten_dict({path: a for path, a in drawn.items() if path[-1] not in ('mean', 'var')}),
            'mix': {
                'kernel': torch_uniform(k2, (inputs, outputs), inputs),
                'bias': torch_uniform(k3, (outputs,), inputs),
            },
            'library': _DEVIATION * jax.random.normal(k4, (self.library, model.width)),
        }

    def init_state(self, model: Any, num_classes: int = 0, key: jax.Array | None = None) -> PyTree:
        """The running statistics of all norms of the CNN."""
        network = self.network(model.image_size)
        return batch_statistics.initial(network, batch_statistics.names(network))

    def scores(self, prompts: PyTree, images: jax.Array, ctx: Context) -> jax.Array:
        """What the mixture is made of, [B, P N], from normalised images [B, H, W, 3]."""
        own = Context(train=ctx.train, state=ctx.state, weight=ctx.weight)
        own.updates = ctx.updates
        batch_statistics.track(own)
        first = jax.tree_util.tree_map_with_path(
            lambda path, a: jnp.full_like(a, float(path[-1].key == 'var')), ctx.state['added']
        )
        cnn, images = self.network(ctx.model.image_size), resized(images, self.resolution)
        features = cnn.apply({'params': overlay(prompts['cnn'], first)}, images, ctx=own)
        return features @ prompts['mix']['kernel'] + prompts['mix']['bias']

    def generate(self, prompts: PyTree, images: jax.Array, ctx: Context) -> jax.Array:
        """The prompts [B, P, D] of normalised images [B, H, W, 3]."""
        scores = self.scores(prompts, images, ctx).reshape(-1, self.num_tokens, self.library)
        return jnp.einsum('bpn,nd->bpd', MIXTURES[self.mixture](scores), prompts['library'])

    def tokens(self, prompts: PyTree, x: jax.Array, ctx: Context) -> jax.Array:
        """Inserts the prompts."""
        return ctx.insert(x, self.generate(prompts, ctx.images[..., :3], ctx))


@dataclasses.dataclass(frozen=True)
class IIP(Method):
    """Input-independent prompts, PGN's baseline: VPT-shallow as PGN draws it.

    Prompts: `prompts` [P, D].

    Attributes:
      num_tokens: P.
    """

    name: ClassVar[str] = 'iip'
    num_tokens: int = 16

    def __post_init__(self):
        check_num_tokens(self.name, self.num_tokens)

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """Draws the prompts."""
        return {'prompts': _DEVIATION * jax.random.normal(key, (self.num_tokens, model.width))}

    def tokens(self, prompts: PyTree, x: jax.Array, ctx: Context) -> jax.Array:
        """Inserts the prompts."""
        return ctx.insert(x, jnp.broadcast_to(prompts['prompts'], (x.shape[0], *prompts['prompts'].shape)))


def resized(images: jax.Array, side: int | None) -> jax.Array:
    """Images [B, H, W, C] whose shorter side has `side` pixels, as torchvision 0.13 resizes tensors; None: as they are.

    Bilinear with half-pixel centers and without anti-aliasing; the longer side is cut to whole pixels.
    """
    batch, height, width, channels = images.shape
    short = min(height, width)
    if side is None or side == short:
        return images
    shape = (batch, side * height // short, side * width // short, channels)
    return jax.image.resize(images, shape, 'linear', antialias=False)
