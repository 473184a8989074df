"""The linear probe of a frozen backbone, as the yardstick beside every run.

The backbone is run once over each split (evaluation views); the published linear protocol (SGD, cosine, 10 warm-up
epochs of 100, arXiv 2203.12119) then trains only the head on those features. All rates of the published grid are
trained at once, under vmap, and the rate is chosen by validation accuracy, so the yardstick is not handicapped by the
rate that suits the prompts.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vpt_jax.data import Dataset, Preprocess, Split
from vpt_jax.methods import Linear
from vpt_jax.models.zoo import Backbone
from vpt_jax.training import optimizer as optimizers
from vpt_jax.training import schedule as schedules
from vpt_jax.training.mesh import cast_backbone, data_mesh
from vpt_jax.training.prefixed import rows
from vpt_jax.training.step import Program

PyTree = Any

#: Base rates (for a batch of 256) of the published grid for linear heads.
RATES = (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05)


def features(program: Program, mesh, params, split: Split, batch_size: int) -> np.ndarray:
    """Features float32 [N, D] of a split, from evaluation views."""
    return np.asarray(rows(program, mesh, params, split, batch_size), np.float32)


def shuffled(count: int, batch_size: int, epochs: int, seed: int) -> np.ndarray:
    """Example indices int32 [steps, B] of training batches, in the order of `data.Batches`; -1 for padding."""
    per_epoch = -(-count // batch_size)
    order = np.full((epochs, per_epoch * batch_size), -1, np.int32)
    for epoch in range(epochs):
        order[epoch, :count] = np.random.default_rng((seed, epoch)).permutation(count)
    return order.reshape(epochs * per_epoch, batch_size)


@partial(jax.jit, static_argnames='momentum')
def train_heads(
    x: jax.Array, labels: jax.Array, order: jax.Array, head: PyTree, rates: jax.Array, decays: jax.Array,
    warmup_epochs: jax.Array, epochs: jax.Array, momentum: float = 0.9,
) -> PyTree:  # fmt: skip
    """Trains a linear head on features with SGD, once for each pair of a rate and a weight decay, all at once.

    Args:
      x: features float32 [N, D].
      labels: int [N].
      order: batches of examples, from `shuffled`.
      head: what all start from, from `Linear.init`.
      rates, decays: float [K].
      warmup_epochs, epochs: of the schedule 'cosine'.
      momentum: of SGD.

    Returns:
      Heads with a leading axis K.
    """
    optimizer = optimizers.build('sgd', 0.0, 0.0, momentum)
    per_epoch = order.shape[0] // epochs

    def trial(rate, decay):
        def step(carry, args):
            head, opt_state = carry
            t, index = args
            weight = (index >= 0) / jnp.maximum((index >= 0).sum(), 1)

            def loss_fn(head):
                logits = Linear().logits(head, x[index], None)
                return weight @ optax.softmax_cross_entropy_with_integer_labels(logits, labels[index])

            grads = jax.grad(loss_fn)(head)
            opt_state = optimizers.with_learning_rate(
                opt_state, schedules.rate('cosine', t, rate, warmup_epochs, epochs, per_epoch)
            )
            updates, opt_state = optimizer.update(grads, opt_state, head)
            return (optax.apply_updates(head, updates), opt_state), None

        opt_state = optimizer.init(head)
        opt_state = opt_state._replace(hyperparams={**opt_state.hyperparams, 'weight_decay': decay})
        return jax.lax.scan(step, (head, opt_state), (jnp.arange(order.shape[0]), order))[0][0]

    return jax.vmap(trial)(rates, decays)


def accuracies(heads: PyTree, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Accuracy in [0, 1] of each of K heads on features [N, D]: float [K]."""
    return np.asarray(_hits(heads, x, labels)) / len(labels)


@jax.jit
def _hits(heads: PyTree, x: jax.Array, labels: jax.Array) -> jax.Array:
    logits = jax.vmap(lambda head: Linear().logits(head, x, None))(heads)
    return (logits.argmax(-1) == labels).sum(-1)


def linear_probe(backbone: Backbone, dataset: Dataset, preprocess: Preprocess, *, seed: int = 0, batch_size: int = 64,
                 epochs: int = 100, warmup_epochs: int = 10, precision: str = 'float32',
                 shard_backbone: bool = False) -> dict:  # fmt: skip
    """Trains a linear head on frozen features and reports it on the test split.

    Args:
      backbone: the frozen network.
      dataset: decoded by `preprocess`; the rate is chosen on `val`, or on `train` if `val` is empty.
      preprocess: evaluation views are used throughout.
      seed: initial head and shuffling.
      batch_size: of the head's training and of the feature extraction.
      epochs, warmup_epochs: the schedule.
      precision: of the backbone.
      shard_backbone: see `Recipe`.

    Returns:
      `test_accuracy` and `val_accuracy` in [0, 1] (None for an empty split), `base_lr`, `trained_parameters`.
    """
    mesh = data_mesh()
    model = backbone.model.clone(classes=0)  # features, whatever the run itself reads
    program = Program(
        model, Linear(), preprocess, dataset.num_classes, precision=precision, shard_backbone=shard_backbone
    )
    params = cast_backbone(backbone.params, precision, mesh, shard_backbone)
    size = max(batch_size // jax.device_count(), 1) * jax.device_count()
    sets = {name: getattr(dataset, name) for name in ('train', 'val', 'test')}
    found = {name: features(program, mesh, params, split, size) for name, split in sets.items() if len(split)}
    order = shuffled(len(sets['train']), batch_size, epochs, seed)
    head = Linear().init(jax.random.key(seed), model, None, dataset.num_classes)
    rates = np.array(RATES, np.float32) / 256 * batch_size
    heads = train_heads(found['train'], sets['train'].labels, order, head, rates, np.zeros_like(rates), warmup_epochs,
                        epochs)  # fmt: skip

    def accuracy(name):
        return accuracies(heads, found[name], sets[name].labels)

    chosen = int(accuracy('val' if 'val' in found else 'train').argmax())
    return {
        'test_accuracy': float(accuracy('test')[chosen]) if 'test' in found else None,
        'val_accuracy': float(accuracy('val')[chosen]) if 'val' in found else None,
        'base_lr': RATES[chosen],
        'trained_parameters': sum(a.size for a in jax.tree.leaves(heads)) // len(RATES),
    }
