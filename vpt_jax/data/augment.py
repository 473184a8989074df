"""Augmentation on the device: pure functions of an explicit key, float images in [0, 1] in and out, made for jit.

Shapes never change, so that the step that calls them compiles once.
"""

import jax
import jax.numpy as jnp

# Rec. 601 luma, what PIL and torchvision turn colour into grey with.
_LUMA = (0.299, 0.587, 0.114)


def random_resized_crop(
    key: jax.Array,
    images: jax.Array,
    scale: tuple[float, float] = (0.35, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> jax.Array:
    """A random box of each image, resized back to the full size (GoogLeNet's crop, arXiv 1409.4842).

    The box's share of the area is uniform in `scale`, its aspect ratio (width / height, relative to the image's own)
    log-uniform in `ratio`; a side that would leave the image is cut to it, where torchvision draws again. Resampling
    is bilinear with half-pixel centres, written as one small matrix an axis: boxes are never larger than the image,
    so nothing is shrunk and no antialiasing is needed.

    Args:
      key: PRNG key.
      images: float [B, H, W, C] in [0, 1].
      scale: smallest and largest share of the area, in (0, 1].
      ratio: smallest and largest aspect ratio, > 0.

    Returns:
      float [B, H, W, C] in [0, 1], the dtype of `images`.
    """
    batch, height, width, _ = images.shape
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    area = jax.random.uniform(area_key, (batch,), minval=scale[0], maxval=scale[1])
    low, high = jnp.log(jnp.asarray(ratio, jnp.float32))
    aspect = jnp.exp(jax.random.uniform(ratio_key, (batch,), minval=low, maxval=high))
    # [2, B]: the box's height and width as shares of the image's.
    sides = jnp.minimum(jnp.sqrt(jnp.stack([area / aspect, area * aspect])), 1.0)
    starts = jax.random.uniform(place_key, (2, batch)) * (1.0 - sides)
    rows = jax.vmap(lambda start, side: _resample(start, side, height))(starts[0], sides[0])
    columns = jax.vmap(lambda start, side: _resample(start, side, width))(starts[1], sides[1])
    # Full precision: an accelerator's default would round pixels to about eight bits of mantissa.
    precision = jax.lax.Precision.HIGHEST
    out = jnp.einsum('bij,bjwc->biwc', rows, images.astype(jnp.float32), precision=precision)
    out = jnp.einsum('bkw,biwc->bikc', columns, out, precision=precision)
    return jnp.clip(out, 0.0, 1.0).astype(images.dtype)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each image mirrored left to right with probability 0.5.

    Args:
      key: PRNG key.
      images: [B, H, W, C], any dtype and range.

    Returns:
      [B, H, W, C], the dtype of `images`.
    """
    flip = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def colour_jitter(key: jax.Array, images: jax.Array, strength: float = 0.3) -> jax.Array:
    """Brightness, contrast and saturation of each image scaled by factors of its own, in this order.

    Args:
      key: PRNG key.
      images: float [B, H, W, 3] in [0, 1].
      strength: each factor is uniform in [1 - strength, 1 + strength], 0 <= strength <= 1; 0 changes nothing.

    Returns:
      float [B, H, W, 3] in [0, 1], the dtype of `images`.
    """
    dtype = images.dtype
    factors = jax.random.uniform(key, (3, images.shape[0], 1, 1, 1), minval=1.0 - strength, maxval=1.0 + strength)
    brightness, contrast, saturation = factors
    images = jnp.clip(images.astype(jnp.float32) * brightness, 0.0, 1.0)
    level = _grey(images).mean(axis=(1, 2), keepdims=True)
    images = jnp.clip(level + (images - level) * contrast, 0.0, 1.0)
    grey = _grey(images)
    return jnp.clip(grey + (images - grey) * saturation, 0.0, 1.0).astype(dtype)


def mixup(
    key: jax.Array, images: jax.Array, soft_labels: jax.Array, alpha: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each example blended with its neighbour in the batch, one weight a batch (mixup, arXiv 1710.09412).

    Args:
      key: PRNG key.
      images: float [B, H, W, C], any range.
      soft_labels: float [B, C], rows that sum to 1 (one-hot labels, for instance).
      alpha: the weight is drawn from Beta(alpha, alpha); may be traced; 0 changes nothing.

    Returns:
      The blended images [B, H, W, C] and labels [B, C]; rows still sum to 1.
    """
    alpha = jnp.asarray(alpha, jnp.float32)
    # Beta(0, 0) has no density: draw from a harmless one and discard it, so that alpha may be traced.
    drawn = jax.random.beta(key, jnp.where(alpha > 0, alpha, 1.0), jnp.where(alpha > 0, alpha, 1.0))
    weight = jnp.where(alpha > 0, drawn, 1.0)

    def blend(x: jax.Array) -> jax.Array:
        # Batches are shuffled already, so the neighbour is as random as a permutation and costs no draw.
        return (weight * x + (1.0 - weight) * jnp.roll(x, 1, axis=0)).astype(x.dtype)

    return blend(images), blend(soft_labels)


def pretrain(key: jax.Array, images: jax.Array) -> jax.Array:
    """The augmentation of pretraining from scratch: random resized crop, flip, light colour jitter.

    Args:
      key: PRNG key.
      images: float [B, H, W, 3] in [0, 1].

    Returns:
      float [B, H, W, 3] in [0, 1], the dtype of `images`.
    """
    crop_key, flip_key, colour_key = jax.random.split(key, 3)
    images = random_resized_crop(crop_key, images)
    images = random_flip(flip_key, images)
    return colour_jitter(colour_key, images)


def _resample(start: jax.Array, side: jax.Array, size: int) -> jax.Array:
    """Bilinear resampling of the interval [start, start + side] of an axis, in shares of it: [size, size]."""
    centres = start * size + (jnp.arange(size) + 0.5) * side - 0.5
    centres = jnp.clip(centres, 0.0, size - 1.0)
    return jnp.maximum(0.0, 1.0 - jnp.abs(centres[:, None] - jnp.arange(size)[None, :]))


def _grey(images: jax.Array) -> jax.Array:
    """Luma [B, H, W, 1] of colour [B, H, W, 3]; a sum of three products, which needs no matrix unit."""
    return (images * jnp.asarray(_LUMA, images.dtype)).sum(-1, keepdims=True)
