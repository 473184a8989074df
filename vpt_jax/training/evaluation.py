"""Evaluation of a prompted network on a split."""

import jax
import numpy as np

from vpt_jax.data import Batches
from vpt_jax.training.step import Program, PyTree, eval_step, shard_batch


def evaluate(program: Program, mesh, params: PyTree, prompts: PyTree, state: PyTree, batches: Batches) -> dict:
    """Accuracy over all examples of a split.

    Args:
      program: the compiled network's settings.
      mesh: the device mesh.
      params: backbone weights.
      prompts, state: the method's pytrees.
      batches: evaluation batches of the split.

    Returns:
      `accuracy` (top-1), `mean_class_accuracy` (mean over the classes that occur), both in [0, 1]; `loss`;
      `examples`.
    """
    step = eval_step(program, mesh)
    # Sums stay on the device: the host prepares the next batch while this one is computed.
    sums = None
    for batch in batches.epoch():
        out = step(params, (prompts, state), shard_batch(batch, mesh))
        out = {name: out[name] for name in ('loss', 'correct', 'count')}
        sums = out if sums is None else jax.tree.map(lambda a, b: a + b, sums, out)
    sums = jax.device_get(sums)
    correct, count = np.asarray(sums['correct'], np.float64), np.asarray(sums['count'], np.float64)
    seen = count > 0
    return {
        'accuracy': float(correct.sum() / count.sum()),
        'mean_class_accuracy': float((correct[seen] / count[seen]).mean()),
        'loss': float(sums['loss'] / count.sum()),
        'examples': int(count.sum()),
    }
