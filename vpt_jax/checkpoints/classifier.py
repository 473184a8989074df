"""The task head of a weight file as the network's classifier, which plans pass over unless it is asked for."""

import dataclasses

import numpy as np

from vpt_jax.checkpoints.npz import natural
from vpt_jax.checkpoints.ported import Ported, Weight
from vpt_jax.checkpoints.source import Source
from vpt_jax.errors import UsageError

#: What schemes say of the names of a task head.
TASK_HEAD = 'task head'


def with_classifier(source: Source, ported: Ported) -> Ported:
    """The plan that reads the task head too: `classifier/kernel` [D, S], `classifier/bias` [S], setting `classes`.

    Args:
      source: the part of the file that the plan speaks of.
      ported: the plan of any scheme.

    Raises:
      UsageError: the file holds no task head, or one that is more than a linear layer.
    """
    if 'classifier/kernel' in ported.weights:
        return ported
    held = sorted((name for name, reason in ported.ignored.items() if reason == TASK_HEAD), key=natural)
    leaves = {name.replace('.', '/').split('/')[-1]: name for name in held}
    kernel, bias = leaves.get('kernel', leaves.get('weight')), leaves.get('bias')
    if kernel is None or bias is None or len(held) != 2:
        found = f': it holds {", ".join(held)}' if held else ''
        raise UsageError(f'{source.path} has no classifier that is one linear layer{found}')
    layout = _torch if kernel.endswith('weight') else _google
    shape = layout(np.empty(source.members[kernel].shape, np.bool_)).shape
    weights = {'classifier/kernel': Weight(shape, (kernel,), layout), 'classifier/bias': Weight(shape[1:], (bias,))}
    ignored = {name: reason for name, reason in ported.ignored.items() if name not in held}
    settings = {**ported.settings, 'classes': shape[1]}
    return dataclasses.replace(ported, settings=settings, weights={**ported.weights, **weights}, ignored=ignored)


def _torch(x: np.ndarray) -> np.ndarray:
    """A linear layer's [S, D], or a 1 x 1 convolution's [S, D, 1, 1], to [D, S]."""
    return x.reshape(x.shape[:2]).T


def _google(x: np.ndarray) -> np.ndarray:
    """A linear layer's [D, S], or a 1 x 1 convolution's [1, 1, D, S], to [D, S]."""
    return x.reshape(x.shape[-2:])
