"""What a prompt method is, how methods compose, and the forward pass of a prompted network.

A method is a frozen dataclass of static settings. It overrides the places it needs (`models.places.Places`) and says
with `init` what its prompt pytree is: a nested dict, keyed by strings, of arrays. Only that pytree is trained.

Shapes: B images, T tokens, N patches, P prompts, D width, L blocks, C classes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vpt_jax.errors import MissingPlace, UsageError
from vpt_jax.methods import prefix
from vpt_jax.models.places import Context, Places

PyTree = Any

PLACES = ('weights', 'pixels', 'tokens', 'layer', 'readout', 'logits')


@dataclasses.dataclass(frozen=True)
class Method(Places):
    """A way to adapt a frozen network.

    Attributes:
      name: what configs and prompt files call it; also its key in a stack's prompt pytree.
      feeds_blocks: True if `layer` changes what enters a block and nothing else.
      rewrites_block: True if `layer` uses the block's parts instead of calling the block.
      backbone_dropout: dropout rate inside the backbone while training (only full fine-tuning has one).
    """

    name: ClassVar[str] = ''
    feeds_blocks: ClassVar[bool] = False
    rewrites_block: ClassVar[bool] = False

    @property
    def backbone_dropout(self) -> float:
        """Dropout rate inside the backbone in training."""
        return 0.0

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """Draws the prompts.

        Args:
          key: a jax random key.
          model: the backbone module, for its settings (`width`, `depth`, `image_size`, ...).
          params: the backbone's weights, one tree per block.
          num_classes: C.

        Returns:
          The prompt pytree: nested dicts, keyed by strings, of float32 arrays.
        """
        return {}

    def init_from(self, key: jax.Array, model: Any, params: PyTree, prompts: PyTree, images: Any) -> PyTree:
        """Redraws the prompts from what the frozen network makes of training images; most methods never look.

        Training calls this once, before the first step of a run that starts from drawn prompts.

        Args:
          key, model, params: as in `init`.
          prompts: what `init` drew.
          images: training images as the network takes them: anything that, like an array [M, H, W, 3], has a length
            and gives float [n, H, W, 3] for n indices.

        Returns:
          A pytree like `prompts`.
        """
        return prompts

    @property
    def looks_at_images(self) -> bool:
        """Whether `init_from` does something."""
        return type(self).init_from is not Method.init_from

    def init_state(self, model: Any, num_classes: int = 0, key: jax.Array | None = None) -> PyTree:
        """What is carried from step to step without being trained (running statistics, a mapping of labels).

        Args:
          model: as in `init`.
          num_classes: C, for states that depend on it.
          key: a jax random key, for states that are drawn.

        Returns:
          A nested dict of arrays; {} for most methods.
        """
        return {}

    def observes(self, epoch: int) -> bool:
        """Whether this method wants a look at all training images before an epoch, counted from 0."""
        return False

    def observe(self, prompts: PyTree, features: jax.Array, labels: jax.Array, ctx: Context) -> PyTree:
        """What a batch of training images tells, in evaluation mode with the prompts of the moment.

        Args:
          prompts: the method's pytree.
          features: what `logits` would get.
          labels: int32 [B].
          ctx: this forward pass's; `ctx.weight` is 0 for padding.

        Returns:
          A pytree of arrays, of which training takes the sum over all batches.
        """
        return {}

    def conclude(self, epoch: int, state: PyTree, sums: PyTree) -> PyTree:
        """The state from this epoch on, a pytree like `state`, from the sums over what `observe` returned."""
        return state

    def input_size(self, model: Any) -> int:
        """Side in pixels of the images that `pixels` gets; what it gives is for the network to take."""
        return model.image_size

    @property
    def needs_classifier(self) -> bool:
        """Whether the network must keep the classifier that it came with (`Network.classes`)."""
        return False

    def first_block(self, model: Any) -> int:
        """The first block that this method touches; what enters it depends on the image and the frozen weights alone.

        0 where weights, pixels or tokens change, `model.depth` where nothing before the readout does.
        """
        return 0 if any(self.changes(place) for place in ('weights', 'pixels', 'tokens', 'layer')) else model.depth

    def untouched_end(self, depth: int) -> bool:
        """Whether what leaves the last of `depth` blocks goes to the network's own readout as it is."""
        return (self.feeds_blocks or not self.changes('layer')) and not self.changes('readout')

    def changes(self, place: str) -> bool:
        """Whether this method does something at `place` ('weights', 'pixels', 'tokens', 'layer', ...)."""
        return getattr(type(self), place) is not getattr(Places, place)

    def check(self, model: Any) -> None:
        """Refuses a backbone that lacks a place this method needs.

        Raises:
          MissingPlace: with the method, the place and the backbone's type named.
        """
        for place in PLACES:
            if self.changes(place) and place not in model.places:
                raise MissingPlace(
                    place,
                    f'method {self.name!r} changes the {place!r} of a network, which {type(model).__name__} does not '
                    f'offer (it offers: {", ".join(sorted(model.places))}); choose another method or backbone',
                )


class _Around:
    """A block whose call goes through a method; its parts remain the frozen block's."""

    def __init__(self, block: Any, call: Callable):
        self._block, self._call = block, call

    def __call__(self, x: jax.Array) -> jax.Array:
        return self._call(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


@dataclasses.dataclass(frozen=True, init=False)
class Stack(Method):
    """Several methods at once: `Stack(VPT(deep=True), Bias(), Linear())` is a method.

    Prompts, state and random keys are kept apart under the members' names. At `layer` the first member is the
    outermost; a member that rewrites the block (adapters) is always the innermost.

    Raises:
      UsageError: two members with a head, two with a readout, two that rewrite the block, or two of one name.
    """

    name: ClassVar[str] = 'stack'
    methods: tuple[Method, ...]

    def __init__(self, *methods: Method):
        flat = [m for method in methods for m in (method.methods if isinstance(method, Stack) else (method,))]
        flat.sort(key=lambda m: m.rewrites_block)
        names = [m.name for m in flat]
        if len(set(names)) < len(names):
            raise UsageError(f'a stack needs methods of different names, got {", ".join(names)}')
        for what, which in (
            ('have a head', [m.name for m in flat if m.changes('logits')]),
            ('change the readout', [m.name for m in flat if m.changes('readout')]),
            ('rewrite the inside of a block', [m.name for m in flat if m.rewrites_block]),
        ):
            if len(which) > 1:
                raise UsageError(f'at most one method of a stack may {what}, got {" and ".join(which)}')
        object.__setattr__(self, 'methods', tuple(flat))

    @property
    def backbone_dropout(self) -> float:
        """The largest rate among the members."""
        return max((m.backbone_dropout for m in self.methods), default=0.0)

    def changes(self, place: str) -> bool:
        """Whether a member does something at `place`."""
        return any(m.changes(place) for m in self.methods)

    def check(self, model: Any) -> None:
        """Checks every member against the backbone."""
        for m in self.methods:
            m.check(model)

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """The members' prompts under their names."""
        keys = jax.random.split(key, len(self.methods))
        return {m.name: m.init(k, model, params, num_classes) for m, k in zip(self.methods, keys, strict=True)}

    def init_from(self, key: jax.Array, model: Any, params: PyTree, prompts: PyTree, images: Any) -> PyTree:
        """Each member's prompts from the images."""
        keys = jax.random.split(key, len(self.methods))
        members = zip(self.methods, keys, strict=True)
        return {m.name: m.init_from(k, model, params, prompts[m.name], images) for m, k in members}

    @property
    def looks_at_images(self) -> bool:
        """Whether a member looks at them."""
        return any(m.looks_at_images for m in self.methods)

    def init_state(self, model: Any, num_classes: int = 0, key: jax.Array | None = None) -> PyTree:
        """The members' states under their names; members without one are left out."""
        keys = [None] * len(self.methods) if key is None else jax.random.split(key, len(self.methods))
        states = {m.name: m.init_state(model, num_classes, k) for m, k in zip(self.methods, keys, strict=True)}
        return {name: state for name, state in states.items() if state}

    def observes(self, epoch: int) -> bool:
        """Whether a member does."""
        return any(m.observes(epoch) for m in self.methods)

    def observe(self, prompts: PyTree, features: jax.Array, labels: jax.Array, ctx: Context) -> PyTree:
        """What the batch tells each member, under its name."""
        return {m.name: m.observe(prompts[m.name], features, labels, ctx.scoped(m.name)) for m in self.methods}

    def conclude(self, epoch: int, state: PyTree, sums: PyTree) -> PyTree:
        """The states of those members that look before this epoch; the others keep theirs."""
        new = {m.name: m.conclude(epoch, state.get(m.name, {}), sums[m.name]) for m in self.methods
               if m.observes(epoch)}  # fmt: skip
        return {**state, **new}

    def input_size(self, model: Any) -> int:
        """What the first member takes that asks for another size than the network's."""
        sizes = (m.input_size(model) for m in self.methods)
        return next((size for size in sizes if size != model.image_size), model.image_size)

    @property
    def needs_classifier(self) -> bool:
        """Whether a member needs it."""
        return any(m.needs_classifier for m in self.methods)

    def first_block(self, model: Any) -> int:
        """The first that any member touches."""
        return min((m.first_block(model) for m in self.methods), default=model.depth)

    def weights(self, prompts: PyTree, params: PyTree) -> PyTree:
        """Each member's weights in turn."""
        for m in self.methods:
            params = m.weights(prompts[m.name], params)
        return params

    def pixels(self, prompts: PyTree, images: jax.Array, ctx: Context) -> jax.Array:
        """Each member's pixels in turn."""
        for m in self.methods:
            images = m.pixels(prompts[m.name], images, ctx.scoped(m.name))
        return images

    def tokens(self, prompts: PyTree, x: jax.Array, ctx: Context) -> jax.Array:
        """Each member's tokens in turn."""
        for m in self.methods:
            x = m.tokens(prompts[m.name], x, ctx.scoped(m.name))
        return x

    def layer(self, prompts: PyTree, block: Callable, x: jax.Array, i: int | jax.Array, ctx: Context) -> jax.Array:
        """The members around the block, the first outermost."""
        call = block
        for m in reversed(self.methods):
            if m.changes('layer'):
                inner = call
                call = _Around(block, lambda x, m=m, b=inner: m.layer(prompts[m.name], b, x, i, ctx.scoped(m.name)))
        return call(x)

    def readout(self, prompts: PyTree, x: jax.Array, pool: Callable, ctx: Context) -> jax.Array:
        """The one member's readout, or the backbone's own."""
        for m in self.methods:
            if m.changes('readout'):
                return m.readout(prompts[m.name], x, pool, ctx.scoped(m.name))
        return pool(x)

    def logits(self, prompts: PyTree, features: jax.Array, ctx: Context) -> jax.Array:
        """The one member's head; the features where no member has one."""
        for m in self.methods:
            if m.changes('logits'):
                return m.logits(prompts[m.name], features, ctx.scoped(m.name))
        return features

    def untouched_end(self, depth: int) -> bool:
        """Whether no member touches it."""
        return all(m.untouched_end(depth) for m in self.methods)

    def boundaries(self, depth: int) -> tuple[int, ...]:
        """All boundaries of the members."""
        return tuple(sorted({b for m in self.methods for b in m.boundaries(depth)}))


def overlay(tree: PyTree, part: PyTree) -> PyTree:
    """`tree` with the leaves of `part`, a sub-tree of it, in their places; branches without leaves add nothing."""
    if not isinstance(part, dict):
        return part
    return {**tree, **{k: overlay(tree.get(k, {}), v) for k, v in part.items() if jax.tree.leaves(v)}}


def features(model: Any, method: Method, params: PyTree, prompts: PyTree, images: jax.Array | None, *,
             state: PyTree = None, train: bool = False, key: jax.Array | None = None, weight: jax.Array | None = None,
             pixels: Any = None, entering: jax.Array | None = None) -> tuple[jax.Array, Context]:  # fmt: skip
    """The prompted network without the method's head; arguments are those of `forward`.

    Returns:
      (features [B, D], the forward pass's context).
    """
    ctx = Context(train=train, key=key, state=state, weight=weight, pixels=pixels)
    cut = 0 if entering is None else prefix.entry(method, model)
    if cut == model.depth:
        return entering, ctx
    params = model.gathered(params)
    if method.changes('weights'):
        params = model.stored(method.weights(prompts, model.canonical(params)))
    if cut:
        images = jnp.zeros((len(entering), model.image_size, model.image_size, 3), entering.dtype)
    images = method.pixels(prompts, images, ctx)
    rngs = {}
    if train and method.backbone_dropout:
        model = model.with_dropout(method.backbone_dropout)
        rngs = {'dropout': ctx.rng('backbone')}
    places = prefix.Entered(method, cut, entering) if cut else method
    return model.apply({'params': params}, images, places, prompts, ctx, rngs=rngs), ctx


def forward(model: Any, method: Method, params: PyTree, prompts: PyTree, images: jax.Array | None, *,
            state: PyTree = None, train: bool = False, key: jax.Array | None = None, weight: jax.Array | None = None,
            pixels: Any = None, entering: jax.Array | None = None) -> tuple[jax.Array, PyTree]:  # fmt: skip
    """The prompted network, from images to class scores.

    Args:
      model: the backbone module.
      method: the method, with a head in it if class scores are wanted (features are returned otherwise).
      params: the frozen weights, as the module stores them.
      prompts: the method's pytree; differentiate with respect to this and nothing else.
      images: [B, H, W, 3] float, normalised as the backbone expects; H and W are the method's `input_size`.
      state: the method's state (`Method.init_state`).
      train: draws dropout and uses batch statistics where the method has them.
      key: random key, needed in training if the method draws random numbers.
      weight: [B] float or None; 0 marks padding examples.
      pixels: (mean, std) of three numbers each, by which images in [0, 1] were normalised; needed by methods whose
        prompts are pixels in [0, 1].
      entering: [B, ...] what `prefix.entering` made of the images, which are then not looked at and may be None.

    Returns:
      (scores [B, C], new state).
    """
    found, ctx = features(model, method, params, prompts, images, state=state, train=train, key=key, weight=weight,
                          pixels=pixels, entering=entering)  # fmt: skip
    return method.logits(prompts, found, ctx), overlay(state or {}, ctx.updates)
