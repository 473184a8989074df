"""LoRA: low-rank updates of frozen kernels (arXiv 2106.09685): W <- W + alpha / r A B.

At the place `weights`, so that any backbone has it and the network runs as it always does; `methods.merge` puts the
update into the weights for good.

Shapes: I inputs and O outputs of a kernel, all their axes flattened; r rank.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vpt_jax.errors import MissingPlace, UsageError, unknown
from vpt_jax.methods.base import Method, PyTree, overlay
from vpt_jax.models import loading

#: Which layers get an update, by their names; None for every kernel inside blocks, joints and poolings.
TARGETS = {'qv': ('query', 'value'), 'qkv': ('query', 'key', 'value'), 'all': None}


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """Low-rank updates of attention layers, or of every kernel behind the first layer.

    Prompts: `a` [I, r] and `b` [r, O], zero at first, beside where every such kernel is in the backbone's tree. Kernels
    of convolutions are [h w C / groups, O].

    Attributes:
      rank: r.
      alpha: the update is scaled by alpha / r.
      targets: a name of `TARGETS`; 'qv' is what the paper's experiments adapt.

    Raises:
      UsageError: a setting out of range.
    """

    name: ClassVar[str] = 'lora'
    rank: int = 8
    alpha: float = 8.0
    targets: str = 'qv'

    def __post_init__(self):
        if self.targets not in TARGETS:
            raise unknown('targets of LoRA', self.targets, TARGETS)
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise UsageError(f'method lora: rank must be >= 1 and alpha > 0, got {self.rank} and {self.alpha}')

    def check(self, model: Any) -> None:
        """Refuses a backbone without such layers."""
        super().check(model)
        if not self.kernels(model):
            raise MissingPlace(
                'attention',
                f"method lora: targets='{self.targets}' are layers of attention, which {type(model).__name__} does not "
                "have; use targets='all' or another method",
            )

    def kernels(self, model: Any) -> dict[tuple[str, ...], tuple[int, int]]:
        """The kernels that get an update: path in the backbone's tree to (I, O)."""
        wanted, found = TARGETS[self.targets], {}
        for name, leaf in loading.shapes(model).items():
            path = tuple(name.split('/'))
            # What is not inside another module is the first layer or belongs to the readout.
            inside = path[-1] == 'kernel' and len(path) > 2
            if inside and (wanted is None or path[-2] in wanted):
                outputs = 2 if path[-2] in ('query', 'key', 'value') else 1
                found[path] = math.prod(leaf.shape[:-outputs]), math.prod(leaf.shape[-outputs:])
        return found

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """Draws `a` from U(-1 / sqrt(I), 1 / sqrt(I)), as the published code does."""
        found = {}
        for number, (path, (inputs, outputs)) in enumerate(self.kernels(model).items()):
            bound = inputs**-0.5
            shape = (inputs, self.rank)
            a = jax.random.uniform(jax.random.fold_in(key, number), shape, minval=-bound, maxval=bound)
            found |= {(*path[:-1], 'a'): a, (*path[:-1], 'b'): jnp.zeros((self.rank, outputs))}
        return unflatten_dict(found)

    def weights(self, prompts: PyTree, params: PyTree) -> PyTree:
        """The backbone with its updated kernels."""
        flat, old, new = flatten_dict(prompts), flatten_dict(params), {}
        for path in (path[:-1] for path in flat if path[-1] == 'a'):
            kernel = old[(*path, 'kernel')]
            update = (self.alpha / self.rank) * (flat[(*path, 'a')] @ flat[(*path, 'b')])
            # In float32, whatever the backbone is in: a sum in bfloat16 would swallow small updates.
            new[(*path, 'kernel')] = kernel.astype(jnp.float32) + update.reshape(kernel.shape)
        return overlay(params, unflatten_dict(new))
