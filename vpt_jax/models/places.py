"""The places where a prompt method may change a frozen network, and what it sees there.

A backbone calls `tokens`, `layer` and `readout` of whatever it is given; the training room calls `weights`, `pixels`
and `logits`. `Places` holds the defaults, which leave the network as it is. Backbones depend on this file and on
nothing else that concerns methods.

Shapes: B images, T tokens, N patches, P prompts, D width, L blocks, C classes.
"""

import copy
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vpt_jax.errors import UsageError

PyTree = Any


class Context:
    """What one forward pass tells a method at every place.

    It lives while the program is traced, never between steps. A method inside a `Stack` sees its own `state`, its own
    span of tokens and its own random keys.

    Attributes:
      train: True in a training step; dropout and batch statistics depend on it.
      weight: [B] float or None; 0 marks the padding examples of a last, partial batch.
      pixels: (mean, std) by which images in [0, 1] were normalised, None where the caller did not say.
      state: what the method carries from step to step without training it (running statistics); a dict.
      updates: where the method writes the next `state`; what it leaves out stays as it was.
      memo: values that the method computes at one place and needs at a later one.
      statistics: BatchNorms whose statistics a method exchanges, by name: a function (x [B, H, W, C], mean, var) to
        the (mean, var) to use, entered in `pixels` (`batch_statistics.track`).
      model: the bound backbone, so that a method can call its parts (`model.patches(images)`).
      images: [B, H, W, C] the network's input after `pixels`.
      prefix: number of tokens before the patches that belong to the backbone (CLS, distillation, registers).
      num_patches: N; patch tokens are always the last N tokens.
      start: first block of the current run of blocks, a Python integer. Blocks of one run are treated alike
        (`Places.boundaries`), and under `scan=True` the index given to `layer` is traced: choose by `start`,
        look up by the index.
    """

    def __init__(self, *, train: bool = False, key: jax.Array | None = None, state: PyTree = None, weight=None,
                 pixels=None):  # fmt: skip
        self.train = train
        self.weight = weight
        self.pixels = pixels
        self.state = state or {}
        self.updates: dict = {}
        self.memo: dict = {}
        self.statistics: dict[str, Callable] = {}
        self.model = None
        self.images = None
        self.prefix = 0
        self.num_patches = 0
        self.start = 0
        self._key = key
        self._scope: tuple[str, ...] = ()
        self._spans: dict[tuple[str, ...], tuple[int, int]] = {}

    def scoped(self, name: str) -> 'Context':
        """The same forward pass as seen by one member, called `name`, of a stack of methods."""
        child = copy.copy(self)
        child._scope = (*self._scope, name)
        child.state = self.state.get(name, {})
        child.updates = self.updates.setdefault(name, {})
        child.memo = self.memo.setdefault(name, {})
        return child

    def rng(self, *tags) -> jax.Array:
        """A random key that depends on the step, the method's name and `tags` (strings, or integers, traced or not)."""
        if self._key is None:
            raise ValueError('this forward pass draws random numbers: give it a key')
        key = self._key
        for tag in (*self._scope, *tags):
            key = jax.random.fold_in(key, zlib.crc32(tag.encode()) if isinstance(tag, str) else tag)
        return key

    def dropout(self, x: jax.Array, rate: float | jax.Array, *tags, shared: tuple[int, ...] = ()) -> jax.Array:
        """Inverted dropout of `x` in training; the axes in `shared` are dropped as a whole. `rate` may be traced."""
        if not self.train or (isinstance(rate, float) and rate == 0.0):
            return x
        shape = tuple(1 if axis in shared else size for axis, size in enumerate(x.shape))
        keep = jax.random.bernoulli(self.rng(*tags), 1.0 - rate, shape)
        return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)

    def insert(self, x: jax.Array, prompts: jax.Array) -> jax.Array:
        """Puts `prompts` [B, P, D] between the backbone's prefix tokens and everything else of `x` [B, T, D]."""
        count = prompts.shape[1]
        for scope, (start, size) in self._spans.items():
            self._spans[scope] = (start + count, size)
        self._spans[self._scope] = (self.prefix, count)
        return jnp.concatenate([x[:, : self.prefix], prompts.astype(x.dtype), x[:, self.prefix :]], axis=1)

    def replace(self, x: jax.Array, prompts: jax.Array | None) -> jax.Array:
        """Swaps this method's tokens in `x` for `prompts` [B, P', D] (any P'), or takes them out if None."""
        start, count = self._spans[self._scope]
        grown = (0 if prompts is None else prompts.shape[1]) - count
        if grown:
            for scope, (other, size) in self._spans.items():
                behind = other > start or (other == start and not count)
                self._spans[scope] = (other + grown if behind else other, size)
            self._spans[self._scope] = (start, count + grown)
        middle = [] if prompts is None else [prompts.astype(x.dtype)]
        return jnp.concatenate([x[:, :start], *middle, x[:, start + count :]], axis=1)

    def claim(self, count: int) -> None:
        """Declares the `count` tokens behind the prefix to be this method's, whatever they were."""
        self._spans[self._scope] = (self.prefix, count)

    def own(self, x: jax.Array) -> jax.Array:
        """The method's own tokens in `x`: [B, P, D]."""
        start, count = self._spans[self._scope]
        return x[:, start : start + count]

    def beside_own(self, rows: jax.Array, x: jax.Array) -> jax.Array:
        """Rows for the backbone's own tokens, [prefix + N, D], as rows for all tokens of `x` [B, T, D]: [T, D].

        Tokens that methods inserted get zeros.

        Raises:
          UsageError: rows for another number of patches than the images have.
        """
        if rows.shape[0] != self.prefix + self.num_patches:
            raise UsageError(
                f'prompts for {rows.shape[0]} tokens do not fit an image of {self.prefix + self.num_patches}: they '
                'belong to one image size, and go with no method that makes the images larger'
            )
        between = jnp.zeros((x.shape[1] - rows.shape[0], rows.shape[1]), rows.dtype)
        return jnp.concatenate([rows[: self.prefix], between, rows[self.prefix :]])

    def patches(self, x: jax.Array) -> jax.Array:
        """The patch tokens of `x`: [B, N, D], row-major over the grid."""
        return x[:, x.shape[1] - self.num_patches :]


class Places:
    """The five places; each default leaves the network unchanged.

    `prompts` is always the method's own pytree and `ctx` the `Context` of this forward pass. The fifth place, the
    head, has two halves: `readout` (tokens to features) and `logits` (features to class scores).
    """

    def weights(self, prompts: PyTree, params: PyTree) -> PyTree:
        """Place 1: the effective backbone weights, a tree like `params`."""
        return params

    def pixels(self, prompts: PyTree, images: jax.Array, ctx: Context) -> jax.Array:
        """Place 2: the network's input, from normalised `images` [B, H, W, 3]."""
        return images

    def tokens(self, prompts: PyTree, x: jax.Array, ctx: Context) -> jax.Array:
        """Place 3: the sequence, from [B, prefix + N, D] with positions added; CLIP's pre-norm comes after it."""
        return x

    def layer(self, prompts: PyTree, block: Callable, x: jax.Array, i: int | jax.Array, ctx: Context) -> jax.Array:
        """Place 4: around block i; `block(x)` is the frozen block, its parts are its attributes."""
        return block(x)

    def readout(self, prompts: PyTree, x: jax.Array, pool: Callable, ctx: Context) -> jax.Array:
        """Place 5a: features [B, D] from the encoder's output tokens [B, T, D]; `pool` is the backbone's own."""
        return pool(x)

    def logits(self, prompts: PyTree, features: jax.Array, ctx: Context) -> jax.Array:
        """Place 5b: class scores [B, C] from features [B, D]."""
        return features

    def untouched_end(self, depth: int) -> bool:
        """Whether `layer` hands on what the last of `depth` blocks gave, and `readout` is the network's own.

        A network that reads only its first tokens then computes no others in its last block.
        """
        return type(self).layer is Places.layer and type(self).readout is Places.readout

    def boundaries(self, depth: int) -> tuple[int, ...]:
        """Block indices at which this method starts to treat blocks differently; `scan` is split there."""
        return ()


UNCHANGED = Places()
