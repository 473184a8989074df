"""What the two stages of masked pretraining learn, as pure functions: VQ-KD's tokenizer, then BEiT v2 (2208.06366).

A stage says what it trains from the start (`start`), its losses, and what it carries from step to step without
gradients: the tokenizer's codes, which are clusters of the first batch and moving averages after that.

Shapes: B images, N patches, K codes, R width of the teacher's features.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vpt_jax.data.masking import block_masks
from vpt_jax.data.preprocess import normalise
from vpt_jax.models import vqkd
from vpt_jax.models.beit import BEiT, initial_params
from vpt_jax.models.vit import ViT

PyTree = Any


@dataclasses.dataclass(frozen=True)
class TokenizerStage:
    """What the tokenizer is trained for.

    Attributes:
      model: the tokenizer.
      teacher: a ViT that gives all its tokens, for images that make its grid the tokenizer's.
      mean, std: the teacher's pixels.
      decay: of the codes' moving averages.
    """

    model: vqkd.VQKD
    teacher: ViT
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    decay: float

    def start(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """(Parameters to train, codes, which are not trained by gradients)."""
        size = self.model.encoder.image_size
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        shapes = jax.eval_shape(lambda x: self.model.init(jax.random.key(0), x)['params'], images)
        codes = shapes.pop('codebook')
        params = {name: initial_params(part, jax.random.fold_in(key, i), one_sigma=not name.endswith('coder'))
                  for i, (name, part) in enumerate(sorted(shapes.items()))}  # fmt: skip
        return params, {'codebook': jnp.zeros(codes.shape)}

    def losses(self, params: PyTree, carried: PyTree, frozen: PyTree, images: jax.Array, key: jax.Array):
        """Losses [B], and what was seen: figures [B] an image, and the forward pass."""
        seen = self.model.apply({'params': {**params, 'codebook': carried['codebook']}}, images)
        rebuild, quantization = vqkd.losses(seen, self.targets(frozen, images))
        return rebuild + quantization, ({'rebuild': rebuild, 'quantization': quantization}, seen)

    def targets(self, frozen: PyTree, images: jax.Array) -> jax.Array:
        """The teacher's patch features [B, N, R] of images in [0, 1]."""
        size = self.teacher.image_size
        if images.shape[1] != size:
            images = jax.image.resize(images, (len(images), size, size, 3), 'linear')
        tokens = self.teacher.apply({'params': frozen}, normalise(images, self.mean, self.std))
        return tokens[:, self.teacher.prefix :].astype(jnp.float32)

    def before(self, params: PyTree, carried: PyTree, images: jax.Array, step: jax.Array, key: jax.Array) -> PyTree:
        """Codes to start from: before the first step, clusters of the first batch."""

        def clusters():
            z = self.model.apply({'params': {**params, 'codebook': carried['codebook']}}, images, method='encode')
            return vqkd.kmeans_codes(key, z.reshape(-1, z.shape[-1]), self.model.codes)

        return {'codebook': jax.lax.cond(step == 0, clusters, lambda: carried['codebook'])}

    def after(self, carried: PyTree, seen: vqkd.Tokenized, weight: jax.Array) -> PyTree:
        """The codes after a step."""
        return {'codebook': vqkd.averaged_codes(carried['codebook'], seen.z, seen.ids, self.decay, weight)}

    def in_use(self, seen: vqkd.Tokenized, weight: jax.Array) -> jax.Array:
        """How often each code was chosen, [K]."""
        weight = jnp.repeat(weight, seen.ids.shape[1])
        return jnp.zeros(self.model.codes).at[seen.ids.reshape(-1)].add(weight)


@dataclasses.dataclass(frozen=True)
class BeitStage:
    """What the BEiT is trained for.

    Attributes:
      model: the network, with a head over the tokenizer's codes.
      tokenizer: frozen.
      mean, std: the network's pixels.
      hidden: patches hidden an image.
      smallest: patches of the smallest hidden rectangle.
      layer_scale: where layer scales start.
    """

    model: BEiT
    tokenizer: vqkd.VQKD
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    hidden: int
    smallest: int
    layer_scale: float

    def start(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """(Parameters to train, nothing else)."""
        images = jax.ShapeDtypeStruct((1, self.model.image_size, self.model.image_size, 3), jnp.float32)
        shapes = jax.eval_shape(lambda x: self.model.init(jax.random.key(0), x)['params'], images)
        return initial_params(shapes, key, layer_scale=self.layer_scale, branch_from=self.model.branch_from), {}

    def losses(self, params: PyTree, carried: PyTree, frozen: PyTree, images: jax.Array, key: jax.Array):
        """Losses [B], and what was seen: figures [B] an image."""
        # The tokenizer sees the same crop, whole.
        ids = self.tokenizer.apply({'params': frozen}, images, method='tokens')
        grid = self.model.grid(*images.shape[1:3])
        mask = block_masks(key, len(images), grid, self.hidden, self.smallest)
        pixels = normalise(images, self.mean, self.std)
        logits = self.model.apply({'params': params}, pixels, mask, method='masked_logits')

        def of_hidden(values):
            return jnp.where(mask, values, 0).sum(-1) / self.hidden

        each = [optax.softmax_cross_entropy_with_integer_labels(z.astype(jnp.float32), ids) for z in logits]
        return of_hidden(sum(each)), ({'accuracy': of_hidden(logits[0].argmax(-1) == ids)}, ())

    def before(self, params: PyTree, carried: PyTree, images: jax.Array, step: jax.Array, key: jax.Array) -> PyTree:
        """Nothing is carried."""
        return carried

    def after(self, carried: PyTree, seen: tuple, weight: jax.Array) -> PyTree:
        """Nothing is carried."""
        return carried

    def in_use(self, seen: tuple, weight: jax.Array) -> None:
        """There are no codes of its own."""
