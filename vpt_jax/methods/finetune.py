"""Methods that train part of the backbone itself: full, partial-k, bias, CLS (VPT's baselines, arXiv 2203.12119).

All four are one idea: the prompts are a copy of some of the backbone's weights, and `weights` puts it back in place.
They differ in which weights they take. BitFit's own source is arXiv 2106.10199; TinyTL's arXiv 2007.11622.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vpt_jax.errors import MissingPlace, UsageError
from vpt_jax.methods.base import Method, PyTree, overlay


@dataclasses.dataclass(frozen=True)
class TrainedWeights(Method):
    """Trains the weights that `selects` names. Prompts: that sub-tree of the backbone's parameters."""

    def selects(self, path: tuple[str, ...], model: Any) -> bool:
        """Whether the parameter at `path` is trained."""
        raise NotImplementedError

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """A copy of the selected weights, in float32; the stored statistics of BatchNorm are none to train."""
        flat = {path: a for path, a in flatten_dict(params).items() if path[-1] not in ('mean', 'var')}
        return unflatten_dict({p: jnp.array(a, jnp.float32) for p, a in flat.items() if self.selects(p, model)})

    def weights(self, prompts: PyTree, params: PyTree) -> PyTree:
        """The backbone with the trained weights in place."""
        return overlay(params, prompts)


@dataclasses.dataclass(frozen=True)
class Full(TrainedWeights):
    """Full fine-tuning, with dropout after the embedding and inside the MLPs as the published baseline has it.

    Attributes:
      dropout: the backbone's dropout rate in training.
    """

    name: ClassVar[str] = 'full'
    dropout: float = 0.1

    @property
    def backbone_dropout(self) -> float:
        """The rate of `dropout`."""
        return self.dropout

    def selects(self, path: tuple[str, ...], model: Any) -> bool:
        """Every parameter."""
        return True


@dataclasses.dataclass(frozen=True)
class Partial(TrainedWeights):
    """Partial-k: the last k blocks and the encoder's final norm; no dropout, as published.

    Attributes:
      blocks: k, at least 1.

    Raises:
      UsageError: k below 1, or more blocks than the backbone has.
    """

    name: ClassVar[str] = 'partial'
    blocks: int = 1

    def __post_init__(self):
        if self.blocks < 1:
            raise UsageError(f'partial fine-tuning trains at least 1 block, got blocks={self.blocks}')

    def check(self, model: Any) -> None:
        """Refuses more blocks than the backbone has, and backbones whose blocks it does not know by name."""
        super().check(model)
        if 'tokens' not in model.places:
            raise MissingPlace(
                'blocks of one width',
                f'method partial trains the last transformer blocks of one width, which {type(model).__name__} does '
                'not have; choose another method or backbone',
            )
        if self.blocks > model.depth:
            raise UsageError(f'method partial: blocks={self.blocks}, but the backbone has {model.depth} blocks')

    def selects(self, path: tuple[str, ...], model: Any) -> bool:
        """Blocks L - k to L - 1, and `encoder_norm`."""
        last = {f'encoderblock_{i}' for i in range(self.first_block(model), model.depth)}
        return path[0] == 'Transformer' and (path[1] in last or path[1] == 'encoder_norm')

    def first_block(self, model: Any) -> int:
        """L - k."""
        return model.depth - self.blocks


@dataclasses.dataclass(frozen=True)
class Bias(TrainedWeights):
    """Every bias of the backbone: patch convolution, attention, MLPs and LayerNorms (BitFit, VPT's tinytl-bias)."""

    name: ClassVar[str] = 'bias'

    def selects(self, path: tuple[str, ...], model: Any) -> bool:
        """Leaves called `bias`."""
        return path[-1] == 'bias'


@dataclasses.dataclass(frozen=True)
class ClsToken(TrainedWeights):
    """The CLS token (VPT's cls+prompt when stacked with VPT).

    Attributes:
      redraw: start from N(0, 1e-6) instead of the pretrained token (VPT's cls-reinit+prompt).
    """

    name: ClassVar[str] = 'cls'
    redraw: bool = False

    def check(self, model: Any) -> None:
        """Refuses a backbone without a CLS token."""
        super().check(model)
        if not getattr(model, 'cls_token', False):
            raise MissingPlace('CLS token', 'method cls trains the CLS token, but this backbone has none')

    def selects(self, path: tuple[str, ...], model: Any) -> bool:
        """The leaf `cls`."""
        return path == ('cls',)

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """The pretrained token, or a new draw."""
        prompts = super().init(key, model, params, num_classes)
        return {'cls': jax.random.normal(key, prompts['cls'].shape) * 1e-6} if self.redraw else prompts
