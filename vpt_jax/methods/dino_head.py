"""DINO's projection head as a frozen classifier, as PGN reads DINO's networks (arXiv 2104.14294, 2210.06466).

z = W_2 gelu(W_1 gelu(W_0 f + b_0) + b_1) + b_2; scores = V z / |z|, of which classes take rows of V, drawn at random.

Shapes: B images, D features, R width of z, S rows of V, C classes.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vpt_jax.errors import UsageError
from vpt_jax.methods.base import PyTree
from vpt_jax.methods.label_mapping import Mapped, read_arrays
from vpt_jax.models.places import Context

_LAYERS = ('mlp.0', 'mlp.2', 'mlp.4')
_NAMES = (*(f'{layer}.{leaf}' for layer in _LAYERS for leaf in ('weight', 'bias')), 'last_layer.weight')


@dataclasses.dataclass(frozen=True)
class DINOHead(Mapped):
    """The scores of a class are those of one of DINO's prototypes; nothing is trained.

    State: `layer_i/{kernel [in, out], bias [out]}` of three layers, `prototypes` [S, R], `mapping` int32 [C, k].

    Attributes:
      projector: an .npz file with the head's arrays as DINO's own file has them ('mlp.0.weight' [out, in], ...) and
        V as 'last_layer.weight' [S, R], read when a run starts.
      The others are `Mapped`'s; 'random' is PGN's.
    """

    name: ClassVar[str] = 'dino_head'
    mapping: str = 'random'
    projector: str = ''

    def check(self, model: Any) -> None:
        """Refuses to run without weights."""
        super().check(model)
        if not self.projector:
            raise UsageError(
                "method dino_head needs the weights of DINO's projection head: give projector=FILE.npz, or train a "
                'linear head instead'
            )

    def classifier_state(self, model: Any) -> tuple[PyTree, int]:
        """The arrays of the file."""
        *layers, prototypes = map(jnp.asarray, read_arrays(self.name, self.projector, _NAMES))
        state, width = {}, model.feature_width
        for i, (weight, bias) in enumerate(zip(layers[::2], layers[1::2], strict=True)):
            if weight.shape != (*bias.shape, width):
                raise UsageError(
                    f'{self.projector}: {_LAYERS[i]}.weight has shape {list(weight.shape)}, but {width} numbers come '
                    'before it'
                )
            state[f'layer_{i}'] = {'kernel': weight.T, 'bias': bias}
            width = len(bias)
        if prototypes.shape[1:] != (width,):
            raise UsageError(f'{self.projector}: last_layer.weight must be [S, {width}], not {list(prototypes.shape)}')
        return {**state, 'prototypes': prototypes}, len(prototypes)

    def sources(self, features: jax.Array, ctx: Context) -> jax.Array:
        """The scores [B, S] of all prototypes."""
        x = features.astype(jnp.float32)
        for i in range(len(_LAYERS)):
            layer = ctx.state[f'layer_{i}']
            x = (jax.nn.gelu(x, approximate=False) if i else x) @ layer['kernel'] + layer['bias']
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        return x @ ctx.state['prototypes'].T
