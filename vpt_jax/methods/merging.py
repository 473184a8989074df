"""Putting trained weights into the backbone for good, so that it runs without the methods that made them."""

from typing import Any

import jax

from vpt_jax.methods.base import PLACES, Method, PyTree, Stack


def merge(model: Any, method: Method, params: PyTree, prompts: PyTree) -> tuple[Method, PyTree, PyTree]:
    """The same network, with everything that only changes weights (LoRA, biases, norms) merged into them.

    Args:
      model: the backbone module.
      method: what was trained.
      params: the backbone's weights, as the module stores them.
      prompts: the method's pytree.

    Returns:
      (what is left of the method, a stack; the weights, likewise stored and in their types; the prompts of what is
      left).
    """
    stack = method if isinstance(method, Stack) else Stack(method)
    prompts = prompts if stack is method else {method.name: prompts}
    weights, kept = model.canonical(params), []
    for member in stack.methods:
        if member.changes('weights') and not any(member.changes(place) for place in PLACES if place != 'weights'):
            weights = member.weights(prompts[member.name], weights)
        else:
            kept.append(member)
    merged = jax.tree.map(lambda old, new: new.astype(old.dtype), params, model.stored(weights))
    return Stack(*kept), merged, {member.name: prompts[member.name] for member in kept}
