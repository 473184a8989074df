"""Normalisation tuning: scale and shift of every norm are trained (a baseline of arXiv 2604.06440).

The shift half says what activation prompts per channel say: behind a BatchNorm with stored statistics a delta is a
shift of beta by delta, before it one by gamma delta / s.
"""

import dataclasses
from typing import Any, ClassVar

import jax

from vpt_jax.errors import MissingPlace, unknown
from vpt_jax.methods.base import PyTree
from vpt_jax.methods.finetune import TrainedWeights
from vpt_jax.models import batch_statistics, loading
from vpt_jax.models.places import Context

STATISTICS = ('stored', 'batch')


@dataclasses.dataclass(frozen=True)
class NormTune(TrainedWeights):
    """Every LayerNorm, GroupNorm and BatchNorm of the backbone.

    Prompts: `scale` and `bias` of these, a sub-tree of the backbone's parameters. State for 'batch': what the batches
    added to the statistics of BatchNorms (`models.batch_statistics`).

    Attributes:
      statistics: what BatchNorms normalise by. 'stored': mean and variance that the network came with, always. 'batch':
        those of the batch in training, and running ones, with torch's momentum of 0.1, otherwise. Which of them the
        paper's baseline does is not known.

    Raises:
      UsageError: another name.
    """

    name: ClassVar[str] = 'norm'
    statistics: str = 'stored'

    def __post_init__(self):
        if self.statistics not in STATISTICS:
            raise unknown('statistics of method norm', self.statistics, STATISTICS)

    def check(self, model: Any) -> None:
        """Refuses batch statistics where no norm has any."""
        super().check(model)
        if self.statistics == 'batch' and not batch_statistics.names(model):
            raise MissingPlace(
                'BatchNorms',
                f"method norm: statistics='batch' is for BatchNorms, and this {type(model).__name__} has none",
            )

    def selects(self, path: tuple[str, ...], model: Any) -> bool:
        """`scale`, and the `bias` beside one: other layers have no scale."""
        return path[-1] in ('scale', 'bias') and '/'.join((*path[:-1], 'scale')) in loading.shapes(model)

    def init_state(self, model: Any, num_classes: int = 0, key: jax.Array | None = None) -> PyTree:
        """Running statistics of all BatchNorms, if they are to run."""
        if self.statistics == 'stored':
            return {}
        return batch_statistics.initial(model, batch_statistics.names(model))

    def pixels(self, prompts: PyTree, images: jax.Array, ctx: Context) -> jax.Array:
        """Leaves the images; here the forward pass begins, and with it the exchange of statistics."""
        if ctx.state:
            batch_statistics.track(ctx)
        return images

    def changes(self, place: str) -> bool:
        """With stored statistics only the weights."""
        return super().changes(place) and (place != 'pixels' or self.statistics == 'batch')
