"""A case of a plain backbone: its weights through the reader into our network, and every number compared."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.parity.case import Case, Report, Unsupported
from tests.parity.prompted import quick_compile
from vpt_jax.checkpoints import scheme
from vpt_jax.checkpoints.source import ArraySource, Source
from vpt_jax.models import loading
from vpt_jax.models.places import Context, Places

TOLERANCE, LOSSES_RTOL = 2e-5, 1e-3


class Seen(Places):
    """Hands out what leaves every block and what enters the readout."""

    def layer(self, prompts, block, x, i, ctx: Context):
        """The block, noted."""
        ctx.updates[f'block{i:02d}'] = x = block(x)
        return x

    def readout(self, prompts, x, pool, ctx: Context):
        """The pooling, its input noted."""
        ctx.updates['encoded'] = x
        return pool(x)


def build(case: Case, name: str | None = None, group: str = 'backbone', source: Source | None = None, **settings: Any):
    """Our network with a case's weights.

    Args:
      case: the case.
      name: the scheme; None to let it be recognised, as a user's file would be.
      group: where the case keeps the weights.
      source: an opened file to read instead.
      **settings: what weights do not tell ('heads' of fused layers, another image size).

    Returns:
      (module, parameters).
    """
    source = source or ArraySource(case.group(group), case.name)
    part, ported = scheme.port(source, name, settings)
    settings.pop('tower', None)
    return loading.build(part, ported, **settings)


def run(model: Any, params: dict, images: np.ndarray) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Features of images, and what `Seen` saw."""

    def forward(params, images):
        ctx = Context()
        return model.apply({'params': params}, images, Seen(), None, ctx), ctx.updates

    return jax.jit(forward, compiler_options=quick_compile())(params, jnp.asarray(images))


def close(report: Report, name: str, ours: Any, theirs: np.ndarray, group: str | None = None) -> None:
    """Compares within the tolerance of the specification: 2e-5 of the larger of 1 and the array's own scale."""
    scale = max(1.0, float(np.abs(theirs).max(initial=0.0)))
    report.compare(group or name.split('/')[-1], name, ours, theirs, atol=TOLERANCE * scale)


def head(case: Case, group: str = 'head') -> tuple[str, str, np.ndarray, np.ndarray]:
    """The case's linear head: names of kernel and bias, kernel [D, C], bias [C]."""
    arrays = case.group(group)
    kernel = next(name for name in arrays if name.split('.')[-1].split('/')[-1] in ('kernel', 'weight'))
    bias = next(name for name in arrays if name.split('.')[-1].split('/')[-1] == 'bias')
    weight = arrays[kernel]
    return kernel, bias, weight.T if kernel.endswith('weight') else weight, arrays[bias]


def compare_head(case: Case, report: Report, features: Callable[[jax.Array], jax.Array]) -> None:
    """Logits, loss, gradients of head and images, and plain gradient descent on the head, as far as the case has them.

    Args:
      case: the case.
      report: where differences go.
      features: normalised images [B, H, W, 3] to what the head receives [B, D].
    """
    kernel_name, bias_name, kernel, bias = head(case)
    images = jnp.asarray(case.arrays['in/images'])
    out = case.group('out')

    def loss(head, images):
        logits = features(images) @ head[0] + head[1]
        if 'in/labels' not in case.arrays:
            return 0.0 * logits.sum(), logits
        labels = jnp.asarray(case.arrays['in/labels'])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), compiler_options=quick_compile())
    weights = (jnp.asarray(kernel), jnp.asarray(bias))
    (value, logits), (gradient, pixels) = step(weights, images)
    close(report, 'out/logits', logits, out['logits'])
    if 'loss' in out:
        close(report, 'out/loss', value, out['loss'])
    grads = case.group('grad')
    for name, ours in ((kernel_name, gradient[0]), (bias_name, gradient[1]), ('in_images', pixels)):
        for stored in (name, f'head/{name}'):
            if stored in grads:
                theirs = grads[stored].T if stored.endswith('weight') else grads[stored]
                close(report, f'grad/{stored}', ours, theirs, 'grad')
    if 'losses_sgd' in out:
        rate = case.config.get('sgd_lr', case.meta.get('sgd_lr'))
        if rate is None:
            raise Unsupported('a trajectory without its rate')
        # Only the head moves, so the features are computed once.
        labels, held = (
            jnp.asarray(case.arrays['in/labels']),
            jax.jit(features, compiler_options=quick_compile())(images),
        )

        def head_loss(head):
            return optax.softmax_cross_entropy_with_integer_labels(held @ head[0] + head[1], labels).mean()

        losses = []
        for _ in out['losses_sgd']:
            value, gradient = jax.value_and_grad(head_loss)(weights)
            losses.append(value)
            weights = jax.tree.map(lambda w, g: w - rate * g, weights, gradient)
        # Heads that fit the batch leave losses of 1e-4, of which float32 logits of 10 resolve three digits.
        report.compare('losses_sgd', 'out/losses_sgd', losses, out['losses_sgd'], atol=1e-6, rtol=LOSSES_RTOL)
