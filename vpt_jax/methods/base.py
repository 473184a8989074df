"""What a prompt method is, how methods compose, and the forward pass of a prompted network.

A method is a frozen dataclass of static settings. It overrides the places it needs (`models.places.Places`) and says
with `init` what its prompt pytree is: a nested dict, keyed by strings, of arrays. Only that pytree is trained.

Shapes: B images, T tokens, N patches, P prompts, D width, L blocks, C classes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax

from vpt_jax.errors import UsageError
from vpt_jax.models.places import Context, Places

PyTree = Any

PLACES = {'weights': 'weights', 'pixels': 'pixels', 'tokens': 'tokens', 'layer': 'layer', 'readout': 'logits',
          'logits': 'logits'}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Method(Places):
    """A way to adapt a frozen network.

    Attributes:
      name: what configs and prompt files call it; also its key in a stack's prompt pytree.
      rewrites_block: True if `layer` uses the block's parts instead of calling the block.
      backbone_dropout: dropout rate inside the backbone while training (only full fine-tuning has one).
    """

    name: ClassVar[str] = ''
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

    def init_state(self, model: Any) -> PyTree:
        """What is carried from step to step without being trained (running statistics); a nested dict."""
        return {}

    def changes(self, place: str) -> bool:
        """Whether this method does something at `place` ('weights', 'pixels', 'tokens', 'layer', ...)."""
        return getattr(type(self), place) is not getattr(Places, place)

    def check(self, model: Any) -> None:
        """Refuses a backbone that lacks a place this method needs.

        Raises:
          UsageError: with the method, the place and the backbone's type named.
        """
        for function, place in PLACES.items():
            if self.changes(function) and place not in model.places:
                raise UsageError(
                    f'method {self.name!r} changes the {place!r} of a network, which {type(model).__name__} does not '
                    f'offer (it offers: {", ".join(sorted(model.places))}); choose another method or backbone'
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

    def init_state(self, model: Any) -> PyTree:
        """The members' states under their names; members without one are left out."""
        states = {m.name: m.init_state(model) for m in self.methods}
        return {name: state for name, state in states.items() if state}

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

    def boundaries(self, depth: int) -> tuple[int, ...]:
        """All boundaries of the members."""
        return tuple(sorted({b for m in self.methods for b in m.boundaries(depth)}))


def overlay(tree: PyTree, part: PyTree) -> PyTree:
    """`tree` with the leaves of `part`, a sub-tree of it, in their places; branches without leaves add nothing."""
    if not isinstance(part, dict):
        return part
    return {**tree, **{k: overlay(tree.get(k, {}), v) for k, v in part.items() if jax.tree.leaves(v)}}


def forward(model: Any, method: Method, params: PyTree, prompts: PyTree, images: jax.Array, *,
            state: PyTree = None, train: bool = False, key: jax.Array | None = None,
            weight: jax.Array | None = None) -> tuple[jax.Array, PyTree]:  # fmt: skip
    """The prompted network, from images to class scores.

    Args:
      model: the backbone module.
      method: the method, with a head in it if class scores are wanted (features are returned otherwise).
      params: the frozen weights, as the module stores them.
      prompts: the method's pytree; differentiate with respect to this and nothing else.
      images: [B, H, W, 3] float, normalised as the backbone expects.
      state: the method's state (`Method.init_state`).
      train: draws dropout and uses batch statistics where the method has them.
      key: random key, needed in training if the method draws random numbers.
      weight: [B] float or None; 0 marks padding examples.

    Returns:
      (scores [B, C], new state).
    """
    state = state or {}
    ctx = Context(train=train, key=key, state=state, weight=weight)
    if method.changes('weights'):
        params = model.stored(method.weights(prompts, model.canonical(params)))
    images = method.pixels(prompts, images, ctx)
    rngs = {}
    if train and method.backbone_dropout:
        model = model.clone(dropout=method.backbone_dropout)
        rngs = {'dropout': ctx.rng('backbone')}
    features = model.apply({'params': params}, images, method, prompts, ctx, rngs=rngs)
    return method.logits(prompts, features, ctx), overlay(state, ctx.updates)
