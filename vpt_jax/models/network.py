"""What methods and training ask of any backbone, and the answers that most of them share."""

from typing import Any, Self

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

from vpt_jax.errors import UsageError


def whole(params: Any) -> Any:
    """Weights that are split over devices, whole on each of them.

    The mesh is that of `jax.sharding.use_abstract_mesh`; outside of it, weights are as they are.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return params
    return jax.lax.with_sharding_constraint(params, PartitionSpec())


def all_but_weights(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint`: the backward pass makes gathered or reshaped weights again.

    Kept for it, they would be another backbone on every device.
    """
    return primitive.name not in ('sharding_constraint', 'convert_element_type', 'reshape', 'squeeze', 'transpose')


class Network:
    """A frozen network as a pure function of (params, images, method, prompts); mixed into linen modules.

    `__call__(images, method=UNCHANGED, prompts=None, ctx=None)` gives features [B, feature_width]; it calls the
    method's `layer` around every block and its `readout` around its own pooling.

    Attributes:
      places: which of 'weights', 'pixels', 'tokens', 'layer', 'readout' and 'logits' the network offers, and whether
        its blocks have the parts of `transformer.Block`, with an attention that takes other keys: 'attention'.
      depth: number of blocks, the places where `layer` is called.
      image_size: side in pixels of the images that it is made for.
      feature_width: width of what the head gets.
      dtype: computation type.
      patch_size: pixels per side that an image's size must be a multiple of.
      classes: S, width of the classifier that the network came with, a linear layer behind the features, which then
        are its scores [B, S]; 0 where it was left out, which is the rule.
      first_layers: names of the layers that pixels meet first: the convolution, whose `kernel` is [h, w, channels, D],
        then the norm that belongs to it if there is one; () where methods must not widen it.
    """

    places: frozenset[str] = frozenset({'weights', 'pixels', 'layer', 'readout', 'logits'})
    depth: int
    image_size: int
    feature_width: int
    dtype: Any
    patch_size: int
    classes: int = 0
    first_layers: tuple[str, ...] = ()

    def make_classifier(self) -> None:
        """Makes the classifier, if the network has one; for `setup`."""
        if self.classes:
            self.classifier = nn.Dense(self.classes, dtype=self.dtype)

    def classify(self, x: jax.Array) -> jax.Array:
        """Features [B, D], or the classifier's scores [B, S] of them if there is one."""
        return self.classifier(x) if self.classes else x

    def block_of(self, place: int | str) -> int:
        """The number of the block that `place` enters; `depth` for what leaves the last one.

        Args:
          place: such a number, or 'end': before a ViT's last norm, or before a ResNet's pooling.

        Raises:
          UsageError: there is no such place.
        """
        if place == 'end':
            return self.depth
        if isinstance(place, int) and 0 <= place <= self.depth:
            return place
        raise UsageError(
            f'a {type(self).__name__} of {self.depth} blocks has no place {place!r}: give a number from 0 to '
            f"{self.depth}{self.other_places} or 'end'"
        )

    #: What else `block_of` takes, for its message.
    other_places = ''

    def activation_shape(self, i: int) -> tuple[int, ...]:
        """Shape, without the batch, of what enters block `i`; for i = depth, of what enters the readout.

        (T, D) in transformers over tokens, (H, W, C) in networks over maps; for images of `image_size`.
        """
        raise NotImplementedError

    def canonical(self, params: dict) -> dict:
        """Stored parameters as one tree per block, which is what methods and checkpoints speak of."""
        return params

    def stored(self, params: dict) -> dict:
        """The inverse of `canonical`."""
        return params

    def gathered(self, params: dict) -> dict:
        """Stored parameters as a forward pass starts with them: `whole`, but for those that it gathers as it goes."""
        return whole(params)

    def with_dropout(self, rate: float) -> Self:
        """The network with dropout inside, for full fine-tuning; the same network if it was published without."""
        return self
