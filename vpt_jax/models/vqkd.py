"""VQ-KD, BEiT v2's tokenizer of images (arXiv 2208.06366; microsoft/unilm@768a3c87 beit2/modeling_vqkd.py).

An encoder and a bottleneck give every patch a unit vector z; its token is the nearest code e_k; a decoder rebuilds a
teacher's features from the codes. Frozen, it is a function from images to tokens 0 .. K - 1; nothing here counts or
averages as it runs, as the original does even in evaluation mode.

Shapes: B images, N patches, c code width, K codes, R width of the teacher's features.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from vpt_jax.checkpoints import scheme
from vpt_jax.checkpoints.layouts import linear
from vpt_jax.checkpoints.schemes import canonical
from vpt_jax.checkpoints.source import Part, Source
from vpt_jax.errors import UsageError, unknown
from vpt_jax.models.beit import BEiT
from vpt_jax.models.families import settings_of
from vpt_jax.models.loading import check_names
from vpt_jax.models.pixels import PIXELS
from vpt_jax.models.transformer import Dense

#: What our files call it. It is no backbone, so it is not among `families.FAMILIES`.
FAMILY = 'vqkd'

_NETWORKS = ('encoder', 'decoder')
_SETTINGS = ('codes', 'code_width', 'target_width', 'pixels')


class Tokenized(NamedTuple):
    """What a tokenizer makes of images.

    Attributes:
      z: [B, N, c] unit vectors before quantization.
      ids: int32 [B, N] tokens, row-major over the grid.
      codes: [B, N, c] the tokens' codes; gradients pass straight through to z.
      rebuilt: [B, N, R] the decoder's output.
    """

    z: jax.Array
    ids: jax.Array
    codes: jax.Array
    rebuilt: jax.Array


def unit(x: jax.Array) -> jax.Array:
    """Vectors along the last axis, scaled to length 1 (zero stays zero)."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def distances(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Squared distances [..., K] of z [..., c] to codes [K, c], which need not be of unit length."""
    cross = jnp.einsum('...c,kc->...k', z, codebook)
    return jnp.square(z).sum(-1, keepdims=True) + jnp.square(codebook).sum(-1) - 2 * cross


class _Bottleneck(nn.Module):
    """Dense, tanh, Dense."""

    hidden: int
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Dense((self.hidden,), name='Dense_0')(x)
        return Dense((self.features,), name='Dense_1')(nn.tanh(x))


class VQKD(nn.Module):
    """The tokenizer with its decoder.

    Attributes:
      encoder: the network of images; its tokens leave through `fc_norm` (pool='none').
      decoder: the network of maps of codes, with patches of 1 x 1.
      codes, code_width: K, c.
      target_width: R.
      pixels: how images in [0, 1] are normalised, 'half' or 'imagenet'.
    """

    encoder: BEiT
    decoder: BEiT
    codes: int
    code_width: int
    target_width: int
    pixels: str = 'half'

    def __post_init__(self):
        if self.pixels not in ('half', 'imagenet'):
            raise unknown("normalisation of a tokenizer's pixels", self.pixels, ('half', 'imagenet'))
        super().__post_init__()

    def setup(self):
        """Makes the parameters around encoder and decoder."""
        self.encode_task = _Bottleneck(self.encoder.width, self.code_width)
        self.decode_task = _Bottleneck(self.decoder.width, self.target_width)
        # Codes live on the unit sphere.
        self.codebook = self.param('codebook', lambda key, shape: unit(jax.random.normal(key, shape)),
                                   (self.codes, self.code_width))  # fmt: skip

    def normalise(self, images: jax.Array) -> jax.Array:
        """Images [B, H, W, 3] in [0, 1] as the encoder wants them.

        The original multiplies by 255 if the largest value of a batch is at most 1; here the range is the caller's duty
        (`check_images`), so that an image's tokens do not depend on its neighbours in the batch.
        """
        pixels = PIXELS[self.pixels]
        return (images - jnp.asarray(pixels.mean)) / jnp.asarray(pixels.std)

    def features(self, images: jax.Array) -> jax.Array:
        """The encoder's patch features [B, N, D] of images in [0, 1]."""
        return self.encoder(self.normalise(images))[:, 1:]

    def encode(self, images: jax.Array) -> jax.Array:
        """Unit vectors z [B, N, c] of images [B, H, W, 3] in [0, 1]."""
        return unit(self.encode_task(self.features(images)))

    def nearest(self, z: jax.Array) -> jax.Array:
        """Tokens [B, N] of z [B, N, c]."""
        return distances(z, self.codebook).argmin(-1).astype(jnp.int32)

    def tokens(self, images: jax.Array) -> jax.Array:
        """Tokens int32 [B, N] of images [B, H, W, 3] in [0, 1]."""
        return self.nearest(self.encode(images))

    def decode(self, codes: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """The teacher's features [B, N, R], rebuilt from codes [B, N, c] on a grid of patches."""
        x = self.decoder(codes.reshape(-1, *grid, self.code_width))[:, 1:]
        return self.decode_task(x)

    def __call__(self, images: jax.Array) -> Tokenized:
        """All the way through, from images [B, H, W, 3] in [0, 1]."""
        z = self.encode(images)
        ids = self.nearest(z)
        codes = z + jax.lax.stop_gradient(self.codebook[ids] - z)
        return Tokenized(z, ids, codes, self.decode(codes, self.encoder.grid(*images.shape[1:3])))


def check_images(images: Any) -> jax.Array:
    """Images for a tokenizer: uint8, or float in [0, 1]; float32 [B, H, W, 3] in [0, 1].

    Raises:
      UsageError: another shape or type, or values outside of [0, 1]. Inside a compiled function values cannot be seen,
        and only shape and type are checked.
    """
    if getattr(images, 'ndim', 0) != 4 or images.shape[-1] != 3:
        raise UsageError(f'a tokenizer takes images [B, H, W, 3], got shape {list(np.shape(images))}')
    if images.dtype == jnp.uint8:
        return jnp.asarray(images, jnp.float32) / 255
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UsageError(f'a tokenizer takes images of uint8, or of floats in [0, 1], got {images.dtype}')
    if not isinstance(images, jax.core.Tracer):
        low, high = float(images.min()), float(images.max())
        if not (low >= 0 and high <= 1):
            raise UsageError(
                f'a tokenizer takes images in [0, 1], before any normalisation, and these are in '
                f'[{low:.3g}, {high:.3g}]'
            )
    return jnp.asarray(images, jnp.float32)


def losses(seen: Tokenized, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a tokenizer is trained by, image by image; the whole loss is the sum of the two.

    Args:
      seen: of a batch of images.
      target: [B, N, R] the teacher's features of the same patches.

    Returns:
      ([B] mean of 1 - cosine between rebuilt and target, [B] mean squared distance of z to its fixed code).
    """
    rebuild = (1 - (unit(seen.rebuilt) * unit(target)).sum(-1)).mean(-1)
    fixed = jax.lax.stop_gradient(seen.codes)  # the codes' values; z moves towards them
    return rebuild, jnp.square(fixed - seen.z).mean((-2, -1))


def averaged_codes(
    codebook: jax.Array, z: jax.Array, ids: jax.Array, decay: float = 0.99, weight: jax.Array | None = None
) -> jax.Array:
    """Codes after a batch: each moves towards the mean of the z that chose it; those that nothing chose stay.

    Args:
      codebook: [K, c] of unit length.
      z: [B, N, c] unit vectors.
      ids: [B, N] their tokens.
      decay: share of the old code that is kept.
      weight: [B] of the images; 0 for padding. None for 1.

    Returns:
      [K, c] of unit length.
    """
    weight = jnp.ones(len(z)) if weight is None else weight
    weight = jnp.repeat(weight, z.shape[1])
    z, ids = z.reshape(-1, z.shape[-1]), ids.reshape(-1)
    count = jnp.zeros(len(codebook)).at[ids].add(weight)
    total = jnp.zeros_like(codebook).at[ids].add(z * weight[:, None])
    target = jnp.where(count[:, None] > 0, unit(total), codebook)  # the mean's direction is the sum's
    return unit(decay * codebook + (1 - decay) * target)


def kmeans_codes(key: jax.Array, z: jax.Array, codes: int, steps: int = 10) -> jax.Array:
    """First codes [K, c]: k-means by cosine of z [M, c], from K of them drawn without replacement if there are enough.

    A centre that loses all its vectors keeps its place.
    """
    chosen = jax.random.choice(key, len(z), (codes,), replace=len(z) < codes)

    def step(_, centres):
        return averaged_codes(centres, z[None], (z @ centres.T).argmax(-1)[None], decay=0.0)

    return jax.lax.fori_loop(0, steps, step, unit(z[chosen]))


def save(path: str | os.PathLike, model: VQKD, params: Mapping[str, Any]) -> None:
    """Writes a tokenizer to an `.npz` or `.safetensors` file that `load` reads.

    Raises:
      UsageError: another suffix, or the file cannot be written.
    """
    flat = {name: np.asarray(array) for name, array in flatten_dict(dict(params), sep='/').items()}
    settings = {name: getattr(model, name) for name in _SETTINGS}
    for name in _NETWORKS:
        network = getattr(model, name)
        settings[name] = {key: getattr(network, key) for key in settings_of(BEiT) if key != 'dtype'}
    shapes = {name: (array.shape, array.dtype) for name, array in flat.items()}
    canonical.write(path, shapes, flat.items(), FAMILY, settings, model.pixels)


def load(source: Source, *, heads: int | None = None, decoder_heads: int | None = None,
         pixels: str = 'half') -> tuple[VQKD, dict]:  # fmt: skip
    """The tokenizer of a file: one of ours, or unilm's (`vqkd_encoder_base_decoder_...pth`).

    Args:
      source: the opened file.
      heads, decoder_heads: of unilm's encoder and decoder, where heads are not 64 wide.
      pixels: as `VQKD.pixels`; unilm's files do not tell, the released ones are 'half'.

    Returns:
      (module, parameters).

    Raises:
      UsageError: not such a file.
    """
    if source.about:
        return _ours(source)
    prefix = next((p for p in ('', 'model.') if f'{p}encoder.cls_token' in source.members), None)
    if prefix is None:
        raise UsageError(f"{source.path} is no VQ-KD tokenizer: it has no 'encoder.cls_token'")
    part = Part(source, prefix) if prefix else source
    networks, tree = {}, {}
    for name, count in zip(_NETWORKS, (heads, decoder_heads), strict=True):
        half, ported = scheme.port(Part(part, f'{name}.'), 'beit', {'heads': count})
        networks[name] = BEiT(**{**ported.settings, 'pool': 'none'})
        tree[name] = scheme.load(half, ported)
    for ours, theirs in (('encode_task', 'encode_task_layer'), ('decode_task', 'decode_task_layer')):
        tree[ours] = {f'Dense_{i}': _dense(part, f'{theirs}.{2 * i}') for i in range(2)}
    tree['codebook'] = _read(part, 'quantize.embedding.weight')
    codes, width = tree['codebook'].shape
    model = VQKD(**networks, codes=codes, code_width=width, pixels=pixels,
                 target_width=len(tree['decode_task']['Dense_1']['bias']))  # fmt: skip
    return model, jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


def _ours(source: Source) -> tuple[VQKD, dict]:
    ported = canonical.port(source, {})
    if ported.family != FAMILY:
        raise UsageError(f'{source.path} is no VQ-KD tokenizer: it holds a {ported.family}')
    try:
        networks = {name: BEiT(**ported.settings[name]) for name in _NETWORKS}
        model = VQKD(**networks, **{name: ported.settings[name] for name in _SETTINGS})
    except (KeyError, TypeError) as error:
        raise UsageError(f'{source.path} is damaged: it does not describe a tokenizer ({error})') from error
    images = jax.ShapeDtypeStruct((1, model.encoder.image_size, model.encoder.image_size, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x)['params'], images)
    check_names(ported.weights, flatten_dict(shapes, sep='/'), source.path, ())
    return model, jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), scheme.load(source, ported))


def _dense(source: Source, name: str) -> Mapping[str, np.ndarray]:
    return {'kernel': linear(_read(source, f'{name}.weight')), 'bias': _read(source, f'{name}.bias')}


def _read(source: Source, name: str) -> np.ndarray:
    if name not in source.members:
        raise UsageError(f'{source.path} is no VQ-KD tokenizer: it has no {name!r}')
    return source.read(name)
