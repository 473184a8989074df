"""What cases of one method on one backbone have in common: outputs, gradients and five steps of gradient descent."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from tests.parity import ported
from tests.parity.case import Case, Report
from tests.parity.prompted import Prompted, SeenStack
from vpt_jax.methods import Method

#: Our path in the prompts to the reference's names, stacked along our first axis, and the layout that makes ours.
Names = Mapping[str, tuple[list[str], Callable[[np.ndarray, tuple[int, ...]], np.ndarray]]]


def adapt(
    model: Any, members: Iterable[Method], params: dict, prompts: dict, state: dict | None = None, **how: Any
) -> Prompted:
    """A network and a stack of methods with the case's weights, ready to run; `how` is `train` and `pixels`."""
    params, prompts, state = jax.tree.map(jnp.asarray, (params, prompts, state or {}))
    return Prompted(model, SeenStack(*members), params, prompts, state, frozenset(), {}, {}, **how)


def stacked(case: Case, names: list[str], layout: Callable, shape: tuple[int, ...], group: str) -> np.ndarray:
    """The reference's arrays in our layout, one after the other along a new first axis; a single one as it is."""
    parts = [case.arrays[f'{group}/{name}'] for name in names]
    if len(parts) == 1:
        return layout(parts[0], shape)
    return np.stack([layout(part, shape[1:]) for part in parts])


def compare(
    case: Case, report: Report, prompted: Prompted, names: Names, where: str = '', rate: float | None = None
) -> set[str]:
    """Compares whatever the case holds of one run.

    Args:
      case: the case.
      report: where differences go.
      prompted: what to run.
      names: where gradients of ours are in `grad/`; those that the case does not hold are passed over.
      where: what comes between `out/` or `grad/` and a name ('insert1/').
      rate: of gradient descent.

    Returns:
      The names of the arrays that were compared.
    """
    step = prompted.value_and_grad()
    images, labels = jnp.asarray(case.arrays['in/images']), jnp.asarray(case.arrays['in/labels'])
    (loss, (logits, seen)), grads = step(prompted.trained, images, labels)
    done = set()
    for name, ours in (('features', seen['features']), ('logits', logits), ('loss', loss)):
        theirs = case.arrays.get(f'out/{where}{name}')
        if theirs is not None:
            ported.close(report, f'out/{where}{name}', ours, theirs)
            done.add(f'out/{where}{name}')
    flat = flatten_dict(grads, sep='/')
    for path, (found, layout) in names.items():
        held = [f'grad/{where}{name}' for name in found]
        if not all(name in case.arrays for name in held):
            continue
        theirs = stacked(case, [where + name for name in found], layout, flat[path].shape, 'grad')
        ported.close(report, f'grad/{where}{path}', flat[path], theirs, 'grads')
        done.update(held)
    if f'out/{where}losses_sgd' in case.arrays:
        descend(case, report, prompted, f'out/{where}losses_sgd', rate, step)
        done.add(f'out/{where}losses_sgd')
    return done


def descend(
    case: Case, report: Report, prompted: Prompted, name: str, rate: float, step: Callable | None = None
) -> None:
    """Compares the loss before each step of plain gradient descent."""
    step = step or prompted.value_and_grad()
    images, labels = jnp.asarray(case.arrays['in/images']), jnp.asarray(case.arrays['in/labels'])
    trained, losses = prompted.trained, []
    for _ in case.arrays[name]:
        (loss, _), grads = step(trained, images, labels)
        losses.append(loss)
        trained = jax.tree.map(lambda p, g: p - rate * g, trained, grads)
    report.compare('losses_sgd', name, np.stack(losses), case.arrays[name], rtol=ported.LOSSES_RTOL)


def check_complete(case: Case, report: Report, done: set[str]) -> None:
    """Every output, gradient and initialisation of the case must have been compared, and nothing else can be."""
    given = ('backbone/', 'method/', 'head/', 'in/', 'ignored/')
    for name in sorted(set(case.arrays) - done):
        if not name.startswith(given):
            report.fail(f'{name} has no counterpart')


def check_count(report: Report, prompted: Prompted, expected: int) -> None:
    """The number of trained parameters must be the reference's."""
    count = sum(leaf.size for leaf in jax.tree.leaves(prompted.trained))
    if count != expected:
        report.fail(f'{count} parameters are trained, expected {expected}')
