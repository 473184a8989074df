"""A trained prompt as pixels: every image with its prompts beside it, and what the plain network makes of that."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax.data.preprocess import normalise
from vpt_jax.errors import UsageError, unknown
from vpt_jax.methods import Context, Stack, forward
from vpt_jax.methods.base import features
from vpt_jax.methods.inversion import check_method, check_model, inverse_of
from vpt_jax.models import canvas
from vpt_jax.training.inference import Trained

POSITIONS = ('none', 'index')


class _Watched(Stack):
    """A stack that keeps what its members insert."""

    def tokens(self, prompts: Any, x: jax.Array, ctx: Context) -> jax.Array:
        x = super().tokens(prompts, x, ctx)
        ctx.memo['inserted'] = x[:, ctx.prefix : x.shape[1] - ctx.num_patches]
        return x


class Inverted(NamedTuple):
    """Images with their prompts as pixels, which are float32 on the scale of [0, 1] and not clipped to it.

    Attributes:
      canvas: [B, H, W, 3], what the plain network is to be given (`Inverter.model`).
      patches: [B, K, p, p, 3], its last K patches.
      residual: [B, K], share of every prompt that its patch misses.
      outside: [B], share of the patches' values that are not in [0, 1].
      logits: [B, C] by name: 'latent' of the prompted network; of the plain one, 'exact' from the canvas, 'clipped'
        from the canvas in [0, 1], 'rounded' from its 256 levels.
    """

    canvas: np.ndarray
    patches: np.ndarray
    residual: np.ndarray
    outside: np.ndarray
    logits: dict[str, np.ndarray]

    def difference(self, name: str) -> np.ndarray:
        """The largest difference between the scores of that name and those of the prompts, [B]."""
        return np.abs(self.logits[name] - self.logits['latent']).max(axis=-1)

    def agrees(self, name: str) -> np.ndarray:
        """Whether the scores of that name are for the same class as those of the prompts, bool [B]."""
        return self.logits[name].argmax(-1) == self.logits['latent'].argmax(-1)


class Inverter:
    """Turns images into canvases that make a plain network answer as the prompted one does.

    Args:
      trained: from `load_trained`.
      positions: of the patches that are joined: 'none', or 'index', those of the image's last patches.
      rounds: how often patches are moved towards [0, 1] (`Inverse.into_range`).
      batch_size: how many images it takes at most, >= 1.
      least_squares: take a network, too, whose prompts cannot be made exactly.

    Attributes:
      inverse: the patch convolution's.
      index: the entries of the table of positions that the patches get, counted with the class token's; None for none.
      model, params: the plain network for canvases; its table of positions is longer, nothing else is changed.

    Raises:
      UsageError: the method does more than insert prompts; the network's prompts cannot be pixels; a setting out of
        range.
    """

    def __init__(self, trained: Trained, positions: str = 'none', rounds: int = 0, batch_size: int = 16,
                 least_squares: bool = False):  # fmt: skip
        if positions not in POSITIONS:
            raise unknown('positions of inverted prompts', positions, POSITIONS)
        for name, value, low in (('rounds', rounds, 0), ('batch_size', batch_size, 1)):
            if value < low:
                raise UsageError(f'--{name} must be >= {low}, got {value}')
        check_method(trained.method)
        check_model(trained.backbone.model)
        self.trained, self.rounds, self.batch_size = trained, rounds, batch_size
        self._model = trained.backbone.model.clone(dtype=None)
        self._params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), trained.backbone.params)
        embedding = self._params['embedding']
        self.inverse = inverse_of(embedding['kernel'], embedding.get('bias'), least_squares)
        self._prompted, self._plain = jax.jit(self._run_prompted), jax.jit(self._run_plain)
        size = trained.preprocess.size
        count = jax.eval_shape(self._run_prompted, jnp.zeros((1, size, size, 3)))[1].shape[1]
        held, (rows, columns) = canvas.table(self._model, self._params), self._model.grid(size)
        self.index, self._pos = None, np.zeros((count, self._model.width))
        if positions == 'index':
            patches = rows * columns
            self.index = len(held) - patches + (np.arange(count) - count) % patches
            self._pos = held[self.index]
        self.model, self.params = canvas.deployed(self._model, self._params, self._pos)

    def _run_prompted(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scores and prompts of normalised images."""
        file, watched = self.trained.file, _Watched(*self.trained.method.methods)
        with jax.default_matmul_precision('highest'):
            found, ctx = features(self._model, watched, self._params, file.prompts, images, state=file.state)
            return watched.logits(file.prompts, found, ctx), ctx.memo['inserted']

    def _run_plain(self, canvases: jax.Array) -> jax.Array:
        """Scores of canvases on the scale of [0, 1]: the plain network and the head."""
        preprocess, file = self.trained.preprocess, self.trained.file
        head = next(m for m in self.trained.method.methods if m.changes('logits'))
        prompts, state = file.prompts[head.name], file.state.get(head.name)
        with jax.default_matmul_precision('highest'):
            images = normalise(canvases, preprocess.mean, preprocess.std)
            return forward(self.model, head, self.params, prompts, images, state=state)[0]

    def __call__(self, images: np.ndarray) -> Inverted:
        """Inverts the prompts of uint8 images [B, S, S, 3], as `Preprocess.eval_view` gives them."""
        count = len(images)
        images = np.resize(images, (self.batch_size, *images.shape[1:]))  # repeats some: one program for all batches
        mean, std = (np.asarray(a) for a in (self.trained.preprocess.mean, self.trained.preprocess.std))
        logits, prompts = jax.device_get(self._prompted(normalise(images, mean, std)))
        patches = self.inverse.patches(prompts, self._pos)
        patches = self.inverse.into_range(patches, -mean / std, (1 - mean) / std, self.rounds)
        pixels = (patches * std + mean).astype(np.float32)
        whole = canvas.canvas(images.astype(np.float32) / 255, pixels)
        clipped = np.clip(whole, 0, 1)
        variants = {'exact': whole, 'clipped': clipped, 'rounded': np.rint(clipped * 255) / np.float32(255)}
        inverted = Inverted(
            whole,
            pixels,
            self.inverse.residual(patches, prompts, self._pos),
            ((pixels < 0) | (pixels > 1)).mean(axis=(1, 2, 3, 4)),
            {'latent': logits, **{name: self._plain(variant) for name, variant in variants.items()}},
        )
        return jax.tree.map(lambda a: np.asarray(a)[:count], inverted)

    def preview(self, images: np.ndarray, patches: np.ndarray) -> np.ndarray:
        """For the eye: images with all patches in rows below them, uint8, the last row filled up with grey.

        Args:
          images: uint8 [B, S, S, 3].
          patches: [B, K, p, p, 3], of an `Inverted`.
        """
        (rows, columns), count = self._model.grid(images.shape[1]), patches.shape[1]
        more = -(-count // columns)
        padding = [(0, 0), (0, more * columns - count), *[(0, 0)] * 3]
        patches = np.pad(np.clip(patches, 0, 1), padding, constant_values=0.5)
        return canvas.canvas(images, np.rint(patches * 255), (rows + more, columns))
