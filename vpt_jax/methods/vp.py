"""VP: one pattern of pixels for all images (arXiv 2203.17274; ILM-VP, arXiv 2211.11635).

There are two families. One is added to the normalised image of full size, without any bound: x + canvas, the canvas a
frame ('pad'), a patch in the upper left corner ('fixed_patch') or anywhere ('random_patch'), a frame cut out of a full
canvas ('additive') or all of it ('full'). The other is around a small image, in pixels of [0, 1] ('expansive'):
normalise(zero_pad(u) + sigmoid(program) M), with M = 1 in the frame and a mask of the user's inside. Sources:
hjbahng/visual_prompting@679e71f, OPTML-Group/ILM-VP@84ca042.

Shapes: B images, S the network's image side, P the prompt's size, s the small image's side.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax.errors import UsageError, unknown
from vpt_jax.methods.base import Method, PyTree
from vpt_jax.models.places import Context

KINDS = ('pad', 'fixed_patch', 'random_patch', 'additive', 'full', 'expansive')
_PATCHES = ('fixed_patch', 'random_patch')


@dataclasses.dataclass(frozen=True)
class VP(Method):
    """Learned pixels, the same for every image.

    Prompts: 'pad': `up`, `down` [P, S, 3] and `left`, `right` [S - 2P, P, 3]; patches: `patch` [P, P, 3]; the others:
    `program` [S, S, 3], whose masked entries never get a gradient. State of 'random_patch': `location` int32 [2].

    Attributes:
      kind: one of `KINDS`.
      size: P of the frame or the patch, in pixels (the original's PROMPT_SIZE); no matter for 'full' and 'expansive'.
      inner: s of 'expansive'; None for 4/7 of S, 128 of 224 as published for photographs. Images come to the method in
        this size (`input_size`); where S - s is odd, the frame is wider on top and left.
      mask: of 'expansive', where the prompt is added inside the image too: s rows of s characters '0' and '1' (ILM-VP:
        a triangle, for matrices whose other half says the same); () for nowhere.
      pixel_init: 'normal', N(0, 1) for every pixel, or 'zeros'; '' for the originals': zeros for 'additive', 'full' and
        'expansive'.

    A random patch has one location a batch, anywhere but against the lower and right border, as published. Evaluation
    keeps the location of the last training step instead of drawing one for every batch, so that it can be repeated.

    Raises:
      UsageError: a setting out of range.
    """

    name: ClassVar[str] = 'vp'
    kind: str = 'pad'
    size: int = 30
    inner: int | None = None
    mask: tuple[str, ...] = ()
    pixel_init: str = ''

    def __post_init__(self):
        if self.kind not in KINDS:
            raise unknown('kind of VP', self.kind, KINDS)
        if self.pixel_init not in ('', 'normal', 'zeros'):
            raise unknown('pixel initialisation', self.pixel_init, ('normal', 'zeros'))
        for setting in ('size', 'inner'):
            value = getattr(self, setting)
            if value is not None and value < 1:
                raise UsageError(f'method vp: {setting} must be >= 1, got {value}')
        if self.kind != 'expansive' and (self.mask or self.inner):
            raise UsageError(f"method vp: inner and mask are for kind='expansive', not '{self.kind}'")
        if any(len(row) != len(self.mask) or set(row) - {'0', '1'} for row in self.mask):
            raise UsageError("method vp: mask must be s rows of s characters '0' and '1'")

    def _inner(self, model: Any) -> int:
        return self.inner or len(self.mask) or round(model.image_size * 4 / 7)

    def check(self, model: Any) -> None:
        """Refuses prompts that leave nothing of the image, or a mask of another size."""
        super().check(model)
        side = model.image_size
        room = {'pad': side - 2 * self.size, 'additive': side - 2 * self.size, 'expansive': side - self._inner(model),
                'full': 1}.get(self.kind, side - self.size)  # fmt: skip
        if room < 1:
            what = f'inner={self._inner(model)}' if self.kind == 'expansive' else f'size={self.size}'
            raise UsageError(f"method vp: {what} does not fit kind='{self.kind}' on images of {side} pixels")
        if self.mask and len(self.mask) != self._inner(model):
            raise UsageError(f'method vp: a mask of {len(self.mask)} rows does not fit inner={self._inner(model)}')

    def input_size(self, model: Any) -> int:
        """S, or s of 'expansive'."""
        return self._inner(model) if self.kind == 'expansive' else model.image_size

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """Draws the pixels, or starts from zeros."""
        side, p = model.image_size, self.size
        shapes = {'program': (side, side, 3)}
        if self.kind == 'pad':
            shapes = {'up': (p, side, 3), 'down': (p, side, 3), 'left': (side - 2 * p, p, 3),
                      'right': (side - 2 * p, p, 3)}  # fmt: skip
        elif self.kind in _PATCHES:
            shapes = {'patch': (p, p, 3)}
        if (self.pixel_init or ('zeros' if 'program' in shapes else 'normal')) == 'zeros':
            return {name: jnp.zeros(shape) for name, shape in shapes.items()}
        keys = jax.random.split(key, len(shapes))
        return {name: jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}

    def init_state(self, model: Any, num_classes: int = 0, key: jax.Array | None = None) -> PyTree:
        """Where a random patch is, (row, column)."""
        return {'location': jnp.zeros(2, jnp.int32)} if self.kind == 'random_patch' else {}

    def canvas(self, prompts: PyTree, side: int, ctx: Context) -> jax.Array:
        """What is added to the image of full size, [S, S, 3]; corners of the frame belong to `up` and `down`."""
        if self.kind == 'pad':
            middle = jnp.zeros((side - 2 * self.size, side - 2 * self.size, 3))
            rows = jnp.concatenate([prompts['left'], middle, prompts['right']], axis=1)
            return jnp.concatenate([prompts['up'], rows, prompts['down']])
        if self.kind in _PATCHES:
            row, column = self._location(side, ctx)
            return jax.lax.dynamic_update_slice(jnp.zeros((side, side, 3)), prompts['patch'], (row, column, 0))
        mask = frame_mask(side, side - 2 * self.size, ()) if self.kind == 'additive' else 1.0
        return prompts['program'] * mask

    def _location(self, side: int, ctx: Context) -> jax.Array | tuple[int, int]:
        if self.kind == 'fixed_patch':
            return 0, 0
        if not ctx.train:
            return ctx.state['location']
        ctx.updates['location'] = jax.random.randint(ctx.rng('location'), (2,), 0, side - self.size, jnp.int32)
        return ctx.updates['location']

    def pixels(self, prompts: PyTree, images: jax.Array, ctx: Context) -> jax.Array:
        """Adds the canvas, or puts the images into the frame."""
        if self.kind == 'expansive':
            return self._expanded(prompts['program'], images, ctx).astype(images.dtype)
        return (images + self.canvas(prompts, images.shape[1], ctx)).astype(images.dtype)

    def _expanded(self, program: jax.Array, images: jax.Array, ctx: Context) -> jax.Array:
        if ctx.pixels is None:
            raise ValueError('this prompt is made of pixels in [0, 1]: tell the forward pass how they are normalised')
        mean, std = (jnp.array(values) for values in ctx.pixels)
        side, inner = program.shape[0], images.shape[1]
        if inner >= side or (self.mask and len(self.mask) != inner):
            raise UsageError(f'method vp: images of {inner} pixels do not fit its mask or its frame of {side} pixels')
        left, right = (side - inner + 1) // 2, (side - inner) // 2
        around = ((0, 0), (left, right), (left, right), (0, 0))
        prompt = jax.nn.sigmoid(program) * frame_mask(side, inner, self.mask)
        return (jnp.pad(images * std + mean, around) + prompt - mean) / std


def frame_mask(side: int, inner: int, mask: tuple[str, ...]) -> np.ndarray:
    """Float32 [S, S, 1]: 1 in the frame around an image of s pixels, and inside it what the mask says.

    Args:
      side: S; inner: s.
      mask: s rows of characters '0' and '1', or () for zeros.
    """
    left = (side - inner + 1) // 2
    found = np.ones((side, side, 1), np.float32)
    rows = np.array([list(row) for row in mask], np.float32) if mask else np.zeros((inner, inner), np.float32)
    found[left : left + inner, left : left + inner, 0] = rows
    return found
