"""Evaluation of a prompted network on a split."""

from collections.abc import Callable

import jax
import numpy as np

from vpt_jax.data import Batches, Prefetch
from vpt_jax.training.mesh import feeder
from vpt_jax.training.step import Program, PyTree, eval_step, observe_step


def count(program: Program, mesh, params: PyTree, prompts: PyTree, state: PyTree, batches: Batches) -> dict:
    """Sums over all examples of a split.

    Args:
      program: the compiled network's settings.
      mesh: the device mesh.
      params: backbone weights.
      prompts, state: the method's pytrees.
      batches: evaluation batches of the split; padding does not count.

    Returns:
      `loss`, a float; `correct` and `count`, float64 [C]: examples of each class, and those recognised.
    """
    step = eval_step(program, mesh)

    def counts(batch):
        out = step(params, (prompts, state), batch)
        return {name: out[name] for name in ('loss', 'correct', 'count')}

    sums = _total(counts, mesh, batches)
    return {'loss': float(sums['loss'])} | {k: np.asarray(sums[k], np.float64) for k in ('correct', 'count')}


def observe(program: Program, mesh, params: PyTree, prompts: PyTree, state: PyTree, batches: Batches) -> PyTree:
    """Sums over what the method observes of a split's batches (`Method.observe`); arguments are `count`'s."""
    step = observe_step(program, mesh)
    return _total(lambda batch: step(params, (prompts, state), batch), mesh, batches)


def _total(of: Callable[[dict], PyTree], mesh, batches: Batches) -> PyTree:
    """The sum of `of` over all batches, numpy."""
    # Sums stay on the device: the host prepares the next batch while this one is computed.
    sums = None
    with Prefetch(feeder(batches, mesh), range(batches.steps_per_epoch)) as ahead:
        for batch in ahead:
            out = of(batch)
            sums = out if sums is None else jax.tree.map(lambda a, b: a + b, sums, out)
    return jax.device_get(sums)


def summary(sums: dict) -> dict:
    """Scores from what `count` returned.

    Returns:
      `accuracy` (top-1), `mean_class_accuracy` (mean over the classes that occur), both in [0, 1]; `loss`;
      `examples`.
    """
    correct, total = sums['correct'], sums['count']
    seen = total > 0
    return {
        'accuracy': float(correct.sum() / total.sum()),
        'mean_class_accuracy': float((correct[seen] / total[seen]).mean()),
        'loss': float(sums['loss'] / total.sum()),
        'examples': int(total.sum()),
    }


def evaluate(program: Program, mesh, params: PyTree, prompts: PyTree, state: PyTree, batches: Batches) -> dict:
    """Scores of a split: `summary` of `count`, whose arguments it takes."""
    return summary(count(program, mesh, params, prompts, state, batches))
