"""The compiled train and evaluation steps: pure functions of (frozen params, state, batch) over a device mesh.

Everything a run may vary without being another program is data: seed, learning rate, weight decay, the schedule's
lengths. Only the prompt pytree is differentiated; the backbone is an argument that is never copied or updated.
"""

import contextlib
import dataclasses
from functools import lru_cache, partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vpt_jax.data import augment
from vpt_jax.data.preprocess import Preprocess, normalise
from vpt_jax.methods import Method, forward
from vpt_jax.methods.base import features
from vpt_jax.methods.prefix import entering
from vpt_jax.models.network import all_but_weights
from vpt_jax.training import optimizer as optimizers
from vpt_jax.training import schedule as schedules
from vpt_jax.training.mesh import batch_axes

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Program:
    """What a train step is compiled for; two runs that agree on it share one compilation.

    Attributes:
      model: the backbone module.
      method: the method, with a head.
      preprocess: for the pixel statistics and device-side augmentation.
      num_classes: C.
      optimizer: a name of `optimizer.NAMES`.
      decays: whether the weight decay is positive (the published AdamW becomes SGD where it is not).
      momentum, bias_multiplier, decay_biases, head_weight_decay: of the optimizer.
      per_step: change the rate every step instead of every epoch.
      label_smoothing: in [0, 1).
      mixup: alpha of the Beta distribution, 0 for none.
      precision: 'float32' (highest matmul precision) or 'bfloat16' (backbone and activations).
      schedule: a name of `schedule.NAMES`.
      shard_backbone: whether the weights are split over the devices (`mesh.cast_backbone`), to be gathered when used.
    """

    model: Any
    method: Method
    preprocess: Preprocess
    num_classes: int
    optimizer: str = 'sgd'
    decays: bool = True
    momentum: float = 0.9
    bias_multiplier: float = 1.0
    per_step: bool = False
    label_smoothing: float = 0.0
    mixup: float = 0.0
    precision: str = 'float32'
    schedule: str = 'cosine'
    shard_backbone: bool = False
    decay_biases: bool = False
    head_weight_decay: float | None = None

    def transformation(self):
        """The optax optimizer; its rates are those of the state (`optimizer.with_rates`)."""
        return optimizers.build(
            self.optimizer, 0.0, float(self.decays), self.momentum, self.bias_multiplier, self.decay_biases,
            self.head_weight_decay,
        )  # fmt: skip

    @property
    def pixels(self) -> tuple:
        """(mean, std) by which images in [0, 1] are normalised."""
        return self.preprocess.mean, self.preprocess.std

    def compute_model(self) -> Any:
        """The backbone computing in the program's precision."""
        return self.model.clone(dtype=jnp.bfloat16 if self.precision == 'bfloat16' else None)


class TrainState(flax.struct.PyTreeNode):
    """All that training changes, and the numbers that steer it. Every field is made of arrays.

    Attributes:
      step: int32, steps done.
      prompts: what is trained.
      state: what the method carries along untrained (running statistics).
      opt_state: the optimizer's.
      seed: uint32; dropout and device-side augmentation depend on (seed, step) only.
      schedule: `learning_rate` (at factor 1), `warmup_epochs`, `epochs`, `steps_per_epoch`; float32 scalars.
    """

    step: jax.Array
    prompts: PyTree
    state: PyTree
    opt_state: PyTree
    seed: jax.Array
    schedule: dict


def init_state(program: Program, params: PyTree, *, seed: int, learning_rate: float, weight_decay: float,
               warmup_epochs: int, epochs: int, steps_per_epoch: int) -> TrainState:  # fmt: skip
    """The state before the first step; prompts are drawn from `seed`.

    Args:
      program: what will be trained.
      params: the backbone's weights, as the module stores them.
      seed: >= 0.
      learning_rate: the rate at schedule factor 1 (base rate / 256 * batch size).
      weight_decay: >= 0.
      warmup_epochs, epochs, steps_per_epoch: the schedule.

    Raises:
      UsageError: if the backbone lacks a place the method needs.
    """
    program.method.check(program.model)
    prompts, opt_state, key = _drawn(program, np.uint32(seed), params)
    schedule = {'learning_rate': learning_rate, 'warmup_epochs': warmup_epochs, 'epochs': epochs,
                'steps_per_epoch': steps_per_epoch}  # fmt: skip
    return TrainState(
        step=jax.device_put(np.int32(0)),
        prompts=prompts,
        state=_strong(program.method.init_state(program.model, program.num_classes, key)),
        opt_state=optimizers.with_rates(opt_state, learning_rate, weight_decay),
        seed=jax.device_put(np.uint32(seed)),
        schedule={name: jax.device_put(np.float32(value)) for name, value in schedule.items()},
    )


@partial(jax.jit, static_argnums=0)
def _drawn(program: Program, seed: jax.Array, params: PyTree) -> tuple[PyTree, PyTree, jax.Array]:
    """Prompts, the optimizer's state for them, and the key of what the method carries along: one program for all."""
    key = jax.random.fold_in(jax.random.key(seed), 0)
    prompts = _strong(program.method.init(key, program.model, program.model.canonical(params), program.num_classes))
    return prompts, program.transformation().init(prompts), jax.random.fold_in(key, 1)


def look_at_images(program: Program, state: TrainState, params: PyTree, images: Any) -> TrainState:
    """The state before the first step, with prompts that the method makes of training images (`Method.init_from`).

    Args:
      program: what will be trained.
      state: from `init_state`.
      params: the backbone's weights, as the module stores them.
      images: as `Method.init_from` takes them.
    """
    key = jax.random.fold_in(jax.random.key(state.seed), 0)
    precision = 'highest' if program.precision == 'float32' else 'default'
    with jax.default_matmul_precision(precision):
        prompts = program.method.init_from(key, program.model, program.model.canonical(params), state.prompts, images)
    return state.replace(prompts=_strong(prompts))


def _strong(tree: PyTree) -> PyTree:
    """Without weak types, which the first step would lose: every later step would then be another program."""
    return jax.tree.map(lambda a: jnp.asarray(a, a.dtype), tree)


@lru_cache(maxsize=16)
def train_step(program: Program, mesh: Mesh):
    """Compiles the train step of a program (once per program and mesh).

    Returns:
      step(params, state, batch) -> (state, metrics). `state` is donated. `batch` has `label` int32 [B], `weight`
      float32 [B], and `image` uint8 [B, S, S, 3] or, made of it by `entering_step`, `entering` [B, ...]; metrics are
      the scalars `loss`, `accuracy` and `learning_rate`.
    """
    return _compile(_train(program), program, mesh, donate=(1,))


@lru_cache(maxsize=16)
def trials_step(program: Program, mesh: Mesh, shared: bool):
    """Compiles the train step of several trials at once: one frozen backbone, a leading axis of trials on the rest.

    Args:
      program: what every trial runs; rates, decays, seeds and schedules are part of each trial's state.
      mesh: with the axes `trial` and `data` (`trial_mesh`).
      shared: whether all trials see the same batch (they do if their seeds are equal).

    Returns:
      step(params, states, batch) -> (states, metrics), as `train_step` with a leading axis K on every array of
      `states` and `metrics`, and on those of `batch` unless it is shared.
    """
    step = jax.vmap(_train(program), in_axes=(None, 0, None if shared else 0))
    return _compile(step, program, mesh, donate=(1,), state=('trial',), batch=batch_axes(shared))


@lru_cache(maxsize=16)
def trials_eval_step(program: Program, mesh: Mesh):
    """Compiles `eval_step` for several trials on one batch; every result has a leading axis K."""
    step = jax.vmap(_evaluate(program), in_axes=(None, 0, None))
    return _compile(step, program, mesh, state=('trial',), batch=batch_axes(True))


def _train(program: Program):
    """The train step as a plain function."""
    model, method = program.compute_model(), program.method
    transformation = program.transformation()

    def step(params, state, batch):
        key = jax.random.fold_in(jax.random.key(state.seed), state.step + 1)
        images, targets = _prepare(program, batch, key)
        weight = batch['weight'] / batch['weight'].sum()

        def logits_fn(prompts, params):
            return forward(model, method, params, prompts, images, state=state.state, train=True, key=key,
                           weight=batch['weight'], pixels=program.pixels, entering=batch.get('entering'))  # fmt: skip

        if program.shard_backbone and not getattr(model, 'scan', False):  # a scan sees to it itself
            logits_fn = jax.checkpoint(logits_fn, policy=all_but_weights)

        def loss_fn(prompts):
            logits, carried = logits_fn(prompts, params)
            logits = logits.astype(jnp.float32)
            return weight @ optax.softmax_cross_entropy(logits, targets), (logits, carried)

        (loss, (logits, carried)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.prompts)
        rate = schedules.rate(program.schedule, state.step, **state.schedule, per_step=program.per_step)
        opt_state = optimizers.with_learning_rate(state.opt_state, rate)
        updates, opt_state = transformation.update(grads, opt_state, state.prompts)
        hit = logits.argmax(-1) == batch['label']
        metrics = {'loss': loss, 'accuracy': weight @ hit, 'learning_rate': rate}
        prompts = optax.apply_updates(state.prompts, updates)
        return state.replace(step=state.step + 1, prompts=prompts, state=carried, opt_state=opt_state), metrics

    return step


@lru_cache(maxsize=16)
def eval_step(program: Program, mesh: Mesh):
    """Compiles the evaluation step of a program.

    Returns:
      step(params, (prompts, state), batch) -> dict of sums over the batch's examples: `loss`, and per class
      `correct` [C] and `count` [C]; and `logits` float32 [B, C].
    """
    return _compile(_evaluate(program), program, mesh)


def _evaluate(program: Program):
    """The evaluation step as a plain function."""
    model, method = program.compute_model(), program.method

    def step(params, trained, batch):
        prompts, state = trained
        images = normalise(batch['image'], program.preprocess.mean, program.preprocess.std)
        logits, _ = forward(model, method, params, prompts, images, state=state, pixels=program.pixels)
        logits = logits.astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
        labels = jax.nn.one_hot(batch['label'], program.num_classes) * batch['weight'][:, None]
        hit = (logits.argmax(-1) == batch['label']).astype(jnp.float32)
        return {'loss': batch['weight'] @ loss, 'correct': hit @ labels, 'count': labels.sum(0), 'logits': logits}

    return step


@lru_cache(maxsize=16)
def observe_step(program: Program, mesh: Mesh):
    """Compiles step(params, (prompts, state), batch) -> what the method observes of a batch (`Method.observe`)."""
    model, method = program.compute_model(), program.method

    def step(params, trained, batch):
        prompts, state = trained
        images = normalise(batch['image'], program.preprocess.mean, program.preprocess.std)
        found, ctx = features(model, method, params, prompts, images, state=state, weight=batch['weight'],
                              pixels=program.pixels)  # fmt: skip
        return method.observe(prompts, found, batch['label'], ctx)

    return _compile(step, program, mesh)


@lru_cache(maxsize=16)
def entering_step(program: Program, mesh: Mesh):
    """Compiles step(params, None, batch) -> what enters the first block that the method touches (`methods.prefix`)."""
    model = program.compute_model()

    def step(params, _, batch):
        images = normalise(batch['image'], program.preprocess.mean, program.preprocess.std)
        return entering(model, program.method, model.gathered(params), images)

    return _compile(step, program, mesh)


def _compile(step, program: Program, mesh: Mesh, donate: tuple[int, ...] = (), state: tuple[str, ...] = (),
             batch: tuple[str, ...] = ('data',)):  # fmt: skip
    """Jits step(params, state, batch) with the mesh axes that split the leading axes of state and batch."""
    replicated, along = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(*state))
    split = NamedSharding(mesh, PartitionSpec(*batch))
    precision = 'highest' if program.precision == 'float32' else 'default'

    def traced(*args):
        # Inside of `use_abstract_mesh`, networks gather their weights.
        sharded = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
        with jax.default_matmul_precision(precision), sharded if program.shard_backbone else contextlib.nullcontext():
            return step(*args)

    weights = None if program.shard_backbone else replicated  # None: as they are
    return jax.jit(traced, donate_argnums=donate, in_shardings=(weights, along, split), out_shardings=along)


def _prepare(program: Program, batch: dict, key: jax.Array) -> tuple[jax.Array | None, jax.Array]:
    """Augmented, normalised images [B, S, S, 3], None if their place is taken, and soft targets [B, C]."""
    targets = jax.nn.one_hot(batch['label'], program.num_classes)
    targets = optax.smooth_labels(targets, program.label_smoothing) if program.label_smoothing else targets
    if 'entering' in batch:
        return None, targets
    images = batch['image']
    if program.preprocess.augment == 'pretrain':
        images = augment.pretrain(jax.random.fold_in(key, 1), images.astype(jnp.float32) / 255)
    if program.mixup:
        images = images if images.dtype == jnp.float32 else images.astype(jnp.float32) / 255
        images, targets = augment.mixup(jax.random.fold_in(key, 2), images, targets, program.mixup)
    return normalise(images, program.preprocess.mean, program.preprocess.std), targets
