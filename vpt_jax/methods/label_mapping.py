"""Label mapping: the classes of a task are classes of a frozen classifier (arXiv 2211.11635; 2203.17274).

Scores of S source classes f(x) become scores of C target classes f(x)[:, seq]; nothing of the head is trained. The
sequence is what `MAPPINGS` says, and it is a constant for the gradient. OPTML-Group/ILM-VP@84ca042.

Shapes: B images, D features, S source classes, C target classes, k sources of a target.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax.errors import MissingPlace, UsageError, unknown
from vpt_jax.methods.base import Method, PyTree
from vpt_jax.models.places import Context

MAPPINGS = {
    'first': 'the first C sources, in order (hard-coded in the original VP)',
    'random': 'drawn once without replacement (RLM)',
    'frequency': 'the sources that images of a class are taken for, before the first epoch (FLM)',
    'iterative': 'the same before every epoch, or every few, with the prompts of the moment (ILM)',
}


def frequency_mapping(counts: np.ndarray, per_class: int = 1) -> np.ndarray:
    """Gives every target sources of its own, greedily: the largest count first.

    Equal counts go by the lowest source, then the lowest target. Zeros count too: a target that nothing is left for
    gets the lowest free sources.

    Args:
      counts: [S, C], images of target t that the classifier takes for source s.
      per_class: k, with k C <= S.

    Returns:
      int32 [C, k], ascending in every row.
    """
    sources, targets = counts.shape
    found: list[list[int]] = [[] for _ in range(targets)]
    free = dict.fromkeys(range(sources))
    filled = np.flatnonzero(counts)
    for cell in filled[np.argsort(-counts.reshape(-1)[filled], kind='stable')]:
        source, target = divmod(int(cell), targets)
        if source in free and len(found[target]) < per_class:
            found[target].append(source)
            del free[source]
    rest = iter(free)
    rows = [sorted([*row, *(next(rest) for _ in range(per_class - len(row)))]) for row in found]
    return np.array(rows, np.int32)


def read_arrays(method: str, path: str, names: tuple[str, ...]) -> list[np.ndarray]:
    """Float32 arrays of a user's .npz file.

    Raises:
      UsageError: no such file, or one without these arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return [np.asarray(file[name], np.float32) for name in names]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f'method {method} needs an .npz file with the arrays {" and ".join(names)}, and {path} is none: {error}'
        ) from error


@dataclasses.dataclass(frozen=True)
class Mapped(Method):
    """A head that picks classes of a frozen classifier; `sources` and `classifier_state` are a subclass's.

    State: `mapping` int32 [C, k], and the classifier's own.

    Attributes:
      mapping: a name of `MAPPINGS`.
      every: epochs between two looks at the training images, for 'iterative'.
      per_class: k; a target's score is the mean over its sources' (the original defines none for k > 1).

    Raises:
      UsageError: a setting out of range.
    """

    mapping: str = 'iterative'
    every: int = 1
    per_class: int = 1

    def __post_init__(self):
        if self.mapping not in MAPPINGS:
            raise unknown('mapping of labels', self.mapping, MAPPINGS)
        for setting in ('every', 'per_class'):
            if getattr(self, setting) < 1:
                raise UsageError(f'method {self.name}: {setting} must be >= 1, got {getattr(self, setting)}')

    def classifier_state(self, model: Any) -> tuple[PyTree, int]:
        """The frozen classifier's arrays, and S."""
        raise NotImplementedError

    def sources(self, features: jax.Array, ctx: Context) -> jax.Array:
        """Scores [B, S], float32, of the source classes."""
        raise NotImplementedError

    def init_state(self, model: Any, num_classes: int = 0, key: jax.Array | None = None) -> PyTree:
        """The classifier, and the mapping before anything was looked at.

        Raises:
          UsageError: fewer source classes than the targets need.
        """
        state, sources = self.classifier_state(model)
        needed = self.per_class * num_classes
        if needed > sources:
            raise UsageError(
                f'method {self.name}: {num_classes} classes with per_class={self.per_class} need {needed} classes of '
                f'the frozen classifier, which has {sources}'
            )
        if self.mapping == 'random':
            picked = jax.random.permutation(jax.random.key(0) if key is None else key, sources)[:needed]
        else:
            picked = jnp.arange(needed)
        return {**state, 'mapping': picked.reshape(num_classes, self.per_class).astype(jnp.int32)}

    def logits(self, prompts: PyTree, features: jax.Array, ctx: Context) -> jax.Array:
        """Target scores [B, C]."""
        return self.sources(features, ctx)[:, ctx.state['mapping']].mean(-1)

    def observes(self, epoch: int) -> bool:
        """Before the first epoch, and before later ones if 'iterative'."""
        return epoch == 0 if self.mapping == 'frequency' else self.mapping == 'iterative' and epoch % self.every == 0

    def observe(self, prompts: PyTree, features: jax.Array, labels: jax.Array, ctx: Context) -> PyTree:
        """`counts` [S, C]: the images of every target that are taken for every source."""
        scores = self.sources(features, ctx)
        weight = jnp.ones(len(labels)) if ctx.weight is None else ctx.weight
        counts = jnp.zeros((scores.shape[1], ctx.state['mapping'].shape[0]))
        return {'counts': counts.at[scores.argmax(-1), labels].add(weight)}

    def conclude(self, epoch: int, state: PyTree, sums: PyTree) -> PyTree:
        """The mapping by frequency."""
        return {**state, 'mapping': jnp.asarray(frequency_mapping(np.asarray(sums['counts']), self.per_class))}


@dataclasses.dataclass(frozen=True)
class LabelMapping(Mapped):
    """Classes of an image classifier: the network's own, or one that is given with `classifier`.

    State: `mapping` int32 [C, k]; `kernel` [D, S] and `bias` [S] of a classifier that was given.

    Attributes:
      classifier: an .npz file with `kernel` [D, S] and `bias` [S], read when a run starts; '' for the classifier that
        the network came with (`load_backbone(..., own_classifier=True)`).
      The others are `Mapped`'s.
    """

    name: ClassVar[str] = 'label_mapping'
    classifier: str = ''

    @property
    def needs_classifier(self) -> bool:
        """Whether the network's own is meant."""
        return not self.classifier

    def check(self, model: Any) -> None:
        """Refuses a network whose classifier is missing or, if another is given, in the way."""
        super().check(model)
        if self.needs_classifier and not model.classes:
            raise MissingPlace(
                'classifier',
                f'method label_mapping picks classes of a frozen classifier, and this {type(model).__name__} has none: '
                'load a backbone with own_classifier=True, or give classifier=FILE.npz',
            )
        if not self.needs_classifier and model.classes:
            raise UsageError('method label_mapping: classifier is for features, but this network gives the scores of '
                             'its own classifier')  # fmt: skip

    def classifier_state(self, model: Any) -> tuple[PyTree, int]:
        """The arrays of the file, if there is one."""
        if self.needs_classifier:
            return {}, model.classes
        kernel, bias = read_arrays(self.name, self.classifier, ('kernel', 'bias'))
        if kernel.shape != (model.feature_width, *bias.shape):
            raise UsageError(
                f'{self.classifier}: a classifier of this network has a kernel [{model.feature_width}, S] and a bias '
                f'[S], not {list(kernel.shape)} and {list(bias.shape)}'
            )
        return {'kernel': jnp.asarray(kernel), 'bias': jnp.asarray(bias)}, len(bias)

    def sources(self, features: jax.Array, ctx: Context) -> jax.Array:
        """The classifier's scores [B, S]."""
        features = features.astype(jnp.float32)
        return features @ ctx.state['kernel'] + ctx.state['bias'] if 'kernel' in ctx.state else features
