"""The linear probe of a frozen backbone, as the yardstick beside every run.

The backbone is run once over each split (evaluation views); the published linear protocol (SGD, cosine, 10 warm-up
epochs of 100, arXiv 2203.12119) then trains only the head on those features. All rates of the published grid are
trained at once, under vmap, and the rate is chosen by validation accuracy, so the yardstick is not handicapped by the
rate that suits the prompts.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vpt_jax.data import Batches, Dataset, Preprocess, Split
from vpt_jax.methods import Linear
from vpt_jax.models.zoo import Backbone
from vpt_jax.training import optimizer as optimizers
from vpt_jax.training.schedule import warmup_cosine
from vpt_jax.training.step import Program, cast_backbone, data_mesh, feature_step, shard_batch

#: Base rates (for a batch of 256) of the published grid for linear heads.
RATES = (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05)


def features(program: Program, mesh, params, split: Split, batch_size: int) -> np.ndarray:
    """Features float32 [N, D] of a split, from evaluation views."""
    step = feature_step(program, mesh)
    batches = Batches(split, program.preprocess, batch_size, train=False)
    out = [step(params, None, shard_batch(batch, mesh)) for batch in batches.epoch()]
    return np.concatenate([np.asarray(f) for f in out])[: len(split)]


@partial(jax.jit, static_argnames=('epochs', 'warmup_epochs', 'num_classes', 'width'))
def _train(x, labels, order, rates, key, *, epochs, warmup_epochs, num_classes, width):
    """Heads [R, ...] after training on batches `order` [steps, B] of example indices, -1 for padding."""
    optimizer = optimizers.build('sgd', 0.0, 0.0)
    model = dataclasses.make_dataclass('Width', ['feature_width'])(width)
    head = Linear().init(key, model, None, num_classes)
    steps = order.shape[0] // epochs

    def trial(rate):
        def step(carry, args):
            head, opt_state = carry
            t, index = args
            weight = (index >= 0) / jnp.maximum((index >= 0).sum(), 1)

            def loss_fn(head):
                logits = Linear().logits(head, x[index], None)
                return weight @ optax.softmax_cross_entropy_with_integer_labels(logits, labels[index])

            factor = warmup_cosine(t // steps, warmup_epochs, epochs)
            grads = jax.grad(loss_fn)(head)
            opt_state = optimizers.with_learning_rate(opt_state, rate * factor)
            updates, opt_state = optimizer.update(grads, opt_state, head)
            return (optax.apply_updates(head, updates), opt_state), None

        start = (head, optimizer.init(head))
        return jax.lax.scan(step, start, (jnp.arange(order.shape[0]), order))[0][0]

    return jax.vmap(trial)(rates)


def linear_probe(backbone: Backbone, dataset: Dataset, preprocess: Preprocess, *, seed: int = 0, batch_size: int = 64,
                 epochs: int = 100, warmup_epochs: int = 10, precision: str = 'float32') -> dict:  # fmt: skip
    """Trains a linear head on frozen features and reports it on the test split.

    Args:
      backbone: the frozen network.
      dataset: decoded by `preprocess`; the rate is chosen on `val`, or on `train` if `val` is empty.
      preprocess: evaluation views are used throughout.
      seed: initial head and shuffling.
      batch_size: of the head's training and of the feature extraction.
      epochs, warmup_epochs: the schedule.
      precision: of the backbone.

    Returns:
      `test_accuracy` and `val_accuracy` in [0, 1] (None for an empty split), `base_lr`, `trained_parameters`.
    """
    mesh = data_mesh()
    program = Program(backbone.model, Linear(), preprocess, dataset.num_classes, precision=precision)
    params = cast_backbone(backbone.params, precision, mesh)
    size = max(batch_size // jax.device_count(), 1) * jax.device_count()
    sets = {name: getattr(dataset, name) for name in ('train', 'val', 'test')}
    found = {name: features(program, mesh, params, split, size) for name, split in sets.items() if len(split)}
    count = len(sets['train'])
    per_epoch = -(-count // batch_size)
    order = np.full((epochs, per_epoch * batch_size), -1, np.int32)
    for epoch in range(epochs):
        order[epoch, :count] = np.random.default_rng((seed, epoch)).permutation(count)
    order = order.reshape(epochs * per_epoch, batch_size)
    rates = jnp.asarray(RATES) / 256 * batch_size
    heads = _train(found['train'], sets['train'].labels, order, rates, jax.random.key(seed), epochs=epochs,
                   warmup_epochs=warmup_epochs, num_classes=dataset.num_classes,
                   width=backbone.model.feature_width)  # fmt: skip

    def accuracy(name):
        logits = jax.vmap(lambda head: Linear().logits(head, found[name], None))(heads)
        return np.asarray((logits.argmax(-1) == sets[name].labels).mean(-1))

    chosen = int(accuracy('val' if 'val' in found else 'train').argmax())
    return {
        'test_accuracy': float(accuracy('test')[chosen]) if 'test' in found else None,
        'val_accuracy': float(accuracy('val')[chosen]) if 'val' in found else None,
        'base_lr': RATES[chosen],
        'trained_parameters': sum(a[0].size for a in jax.tree.leaves(heads)),
    }
