"""Masked pretraining of BEiT v2 (arXiv 2208.06366) on any set of images, in two stages of one configuration.

'tokenizer': VQ-KD learns to rebuild a teacher's patch features from discrete codes. 'beit': a BEiT learns to name the
codes of hidden patches, which the frozen tokenizer gives. Both run in the same loop as everything else: batches are a
function of the seed and their number, a folder that was stopped is resumed.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vpt_jax import data
from vpt_jax.checkpoints import containers
from vpt_jax.checkpoints.ported import Ported, Weight
from vpt_jax.checkpoints.source import ArraySource
from vpt_jax.data import augment
from vpt_jax.data.masking import block_masks
from vpt_jax.errors import UsageError, unknown
from vpt_jax.methods import Full
from vpt_jax.models import converting, vqkd, zoo
from vpt_jax.models.beit import BEiT
from vpt_jax.models.pixels import HALF, PIXELS
from vpt_jax.models.vit import ViT
from vpt_jax.training import config as configs
from vpt_jax.training import loop
from vpt_jax.training import mesh as meshes
from vpt_jax.training import optimizer as optimizers
from vpt_jax.training import schedule as schedules
from vpt_jax.training import step as steps
from vpt_jax.training.masked_stages import BeitStage, TokenizerStage
from vpt_jax.training.run_folder import RunFolder, write_result

PyTree = Any
STAGES = ('tokenizer', 'beit')


class MaskedRun(loop.Run):
    """A run of one stage."""

    def __init__(self, stage: TokenizerStage | BeitStage, *args: Any):
        super().__init__(*args)
        self.stage = stage
        # Nearest codes, and features to be rebuilt, want all their digits.
        self.params = meshes.cast_backbone(self.backbone.params, 'float32', self.mesh)

    def step(self):
        """The compiled step: (frozen, state, batch) -> (state, metrics)."""
        precision = 'highest' if self.program.precision == 'float32' else 'default'

        def step(*args):
            with jax.default_matmul_precision(precision):
                return _step(self.stage, self.program, *args)

        return self._compiled(step, donate_argnums=1)

    def _compiled(self, function: Callable, **options: Any) -> Callable:
        """A function (frozen, state, batch, ...) jitted so that its results can be its arguments without another."""
        replicated, split = (NamedSharding(self.mesh, PartitionSpec(*axes)) for axes in ((), ('data',)))
        return jax.jit(function, in_shardings=(replicated, replicated, split), out_shardings=replicated, **options)

    def scores(self, state: steps.TrainState) -> dict[str, float]:
        """Means over the test split, or the validation split where there is no test split; {} without either."""
        split = self.dataset.test if len(self.dataset.test) else self.dataset.val
        if not len(split):
            return {}
        size = self.recipe.eval_batch_size or self.recipe.batch_size
        batches = data.Batches(split, self.preprocess, size, train=False)
        score = self._compiled(partial(_score, self.stage))
        sums = None
        for t, batch in enumerate(batches.epoch()):
            numbered = state.replace(step=jnp.asarray(t, jnp.int32))  # decides which patches are hidden
            out = score(self.params, numbered, meshes.shard_batch(batch, self.mesh))
            sums = out if sums is None else jax.tree.map(jnp.add, sums, out)
        found = {name: float(value) / len(split) for name, value in jax.device_get(sums[0]).items()}
        if sums[1] is not None:
            found['codes_in_use'] = float((sums[1] > 0).mean())
        return {f'test_{name}': value for name, value in found.items()}


def _pixels(batch: dict[str, jax.Array]) -> jax.Array:
    return batch['image'].astype(jnp.float32) / 255


def _step(stage: Any, program: steps.Program, frozen: PyTree, state: steps.TrainState, batch: dict):
    """One step of gradient descent, metrics averaged over the batch's images."""
    view, first, draw = jax.random.split(jax.random.fold_in(jax.random.key(state.seed), state.step + 1), 3)
    images = _pixels(batch)
    if program.preprocess.augment == 'pretrain':
        images = augment.pretrain(view, images)
    weight = batch['weight'] / batch['weight'].sum()
    carried = stage.before(state.prompts, state.state, images, state.step, first)

    def loss_fn(params):
        each, seen = stage.losses(params, carried, frozen, images, draw)
        return weight @ each, seen

    (loss, (figures, seen)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.prompts)
    rate = schedules.rate(program.schedule, state.step, **state.schedule, per_step=program.per_step)
    opt_state = optimizers.with_learning_rate(state.opt_state, rate)
    updates, opt_state = program.transformation().update(grads, opt_state, state.prompts)
    metrics = {'loss': loss, **{name: weight @ value for name, value in figures.items()}, 'learning_rate': rate}
    state = state.replace(
        step=state.step + 1, prompts=optax.apply_updates(state.prompts, updates), opt_state=opt_state,
        state=stage.after(carried, seen, batch['weight']),
    )  # fmt: skip
    return state, metrics


def _score(stage: Any, frozen: PyTree, state: steps.TrainState, batch: dict):
    """Sums of loss and figures over a batch's images, and how often each code was chosen (None without codes)."""
    key = jax.random.key(state.step)
    each, (figures, seen) = stage.losses(state.prompts, state.state, frozen, _pixels(batch), key)
    sums = {name: batch['weight'] @ value for name, value in {'loss': each, **figures}.items()}
    return sums, stage.in_use(seen, batch['weight'])


def run(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Runs the stage that a config names, and writes `tokenizer.npz` or `backbone.npz` into the run's folder.

    Args:
      config: of configs/pretrain_mim.py.
      workdir: the run's folder.

    Returns:
      The content of `result.json`.

    Raises:
      UsageError, DivergedError, StoppedError: see `loop.fit`.
    """
    recipe = configs.recipe(config)
    if config.stage not in STAGES:
        raise unknown('stage of masked pretraining', config.stage, STAGES)
    if recipe.shard_backbone:
        raise UsageError('masked pretraining trains all of the network: leave out --config.train.shard_backbone')
    loop.check_batches(recipe)
    if recipe.label_smoothing or recipe.mixup:
        raise UsageError('masked pretraining has no labels: set --config.train.label_smoothing and mixup to 0')
    preprocess = configs.build_preprocess(config, zoo.Backbone(config.stage, _network(config), {}, '', HALF))
    if preprocess.augment not in ('none', 'pretrain') or not preprocess.fixed_size:
        raise UsageError("masked pretraining takes --config.data.augment of 'none' or 'pretrain', and square images")
    stage, frozen = (_tokenizer_stage if config.stage == 'tokenizer' else _beit_stage)(config, preprocess)
    dataset = configs.load_dataset(config, preprocess)
    if config.data.train_on == 'train+val':
        dataset = dataset.with_val_in_train()
    batches = data.Batches(dataset.train, preprocess, recipe.batch_size, seed=recipe.seed)
    precision = recipe.resolved_precision() if config.stage == 'beit' else 'float32'
    program = steps.Program(
        stage.model, Full(), preprocess, 0, recipe.optimizer, recipe.weight_decay > 0, recipe.momentum,
        recipe.bias_multiplier, recipe.per_step, precision=precision, schedule=recipe.schedule,
        decay_biases=recipe.decay_biases, head_weight_decay=recipe.head_weight_decay,
    )  # fmt: skip
    params, carried = jax.jit(stage.start)(jax.random.fold_in(jax.random.key(recipe.seed), 0))
    stage = dataclasses.replace(stage, model=program.compute_model()) if config.stage == 'beit' else stage
    state = _start(program, params, carried, recipe, batches.steps_per_epoch)
    described = {'config': config.to_dict(), 'frozen': frozen.sha256, 'preprocess': preprocess.to_dict()}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    folder = RunFolder(workdir, described, size, recipe.keep_checkpoints)
    with contextlib.closing(folder):
        attempt = MaskedRun(stage, recipe, frozen, dataset, preprocess, batches, program, folder)
        state, timing = attempt.train(state, drawn=False)
        result = {'stage': config.stage, 'parameters': sum(a.size for a in jax.tree.leaves(params)),
                  'steps': attempt.total, **attempt.speed(timing), **attempt.scores(state), 'frozen': frozen.name,
                  'dataset': dataset.name, 'workdir': str(folder.path)}  # fmt: skip
        result['written'] = str(folder.path / ('tokenizer.npz' if config.stage == 'tokenizer' else 'backbone.npz'))
        if folder.main:
            trained = jax.device_get({**state.prompts, **state.state})
            if config.stage == 'tokenizer':
                vqkd.save(result['written'], stage.model, trained)
            else:
                _save_backbone(result['written'], program, trained, jax.device_get(frozen.params))
            write_result(folder.path, result)
    return result


def _start(program: steps.Program, params: PyTree, carried: PyTree, recipe: Any, length: int) -> steps.TrainState:
    numbers = {'learning_rate': recipe.learning_rate, 'warmup_epochs': recipe.warmup_epochs, 'epochs': recipe.epochs,
               'steps_per_epoch': length}  # fmt: skip
    return steps.TrainState(
        step=jax.device_put(np.int32(0)), prompts=params, state=carried,
        opt_state=optimizers.with_rates(
            jax.jit(program.transformation().init)(params), recipe.learning_rate, recipe.weight_decay
        ),
        seed=jax.device_put(np.uint32(recipe.seed)),
        schedule={name: jax.device_put(np.float32(value)) for name, value in numbers.items()},
    )  # fmt: skip


def _network(config: ConfigDict, **settings: Any) -> BEiT:
    kept = {'image_size': config.image_size, 'activation': 'gelu', 'ln_eps': 1e-6, **config.network.to_dict()}
    return BEiT(**{**kept, **settings})


def _tokenizer_stage(config: ConfigDict, preprocess: data.Preprocess) -> tuple[TokenizerStage, zoo.Backbone]:
    plain = {'relative': 'none', 'final_norm': False, 'fc_norm': True, 'pool': 'none'}
    encoder = _network(config, **plain)
    rows, _ = encoder.grid(config.image_size)
    decoder = _network(config, **plain, depth=config.codes.decoder_depth, patch_size=1, image_size=rows)
    probe = zoo.load_backbone(config.backbone)
    if not isinstance(probe.model, ViT):
        raise UsageError(f'the teacher must be a ViT, and {config.backbone} is a {probe.family}')
    teacher = zoo.load_backbone(config.backbone, image_size=rows * probe.model.patch_size)
    whole = teacher.model.clone(pool='none', pre_logits=0, fc_norm=False)
    images = jax.ShapeDtypeStruct((1, whole.image_size, whole.image_size, 3), jnp.float32)
    target = jax.eval_shape(lambda x: whole.apply({'params': teacher.params}, x), images)
    model = vqkd.VQKD(
        encoder, decoder, codes=config.codes.count, code_width=config.codes.width, target_width=target.shape[-1]
    )
    return TokenizerStage(model, whole, teacher.pixels.mean, teacher.pixels.std, config.codes.decay), teacher


def _beit_stage(config: ConfigDict, preprocess: data.Preprocess) -> tuple[BeitStage, zoo.Backbone]:
    if not config.tokenizer:
        raise UsageError('stage=beit needs the tokenizer of the first stage: --config=FILE:stage=beit,tokenizer=PATH')
    with containers.opened(config.tokenizer) as source:
        tokenizer, params = vqkd.load(source)
        sha256 = containers.fingerprint(source.files)
    model = _network(
        config, posemb='none', relative='shared', pool='gap', layer_scale=True, mask_token=True,
        vocab=tokenizer.codes, branch_from=config.masking.branch_from,
    )  # fmt: skip
    grid, size = model.grid(config.image_size), config.image_size
    if tokenizer.encoder.grid(size) != grid:
        raise UsageError(
            f'{config.tokenizer} cuts images of {size} pixels into {"x".join(map(str, tokenizer.encoder.grid(size)))} '
            f'patches and the network into {"x".join(map(str, grid))}: they must agree'
        )
    hidden = round(config.masking.share * grid[0] * grid[1])
    smallest = config.masking.smallest
    jax.eval_shape(lambda key: block_masks(key, 1, grid, hidden, smallest), jax.random.key(0))  # refuses early
    stage = BeitStage(model, tokenizer, preprocess.mean, preprocess.std, hidden, smallest, config.masking.layer_scale)
    return stage, zoo.Backbone(Path(config.tokenizer).name, tokenizer, params, sha256, HALF)


def _save_backbone(path: str, program: steps.Program, params: PyTree, tokenizer: PyTree) -> None:
    """The network with the tokenizer's codes beside its head, so that both are one file."""
    seen = (program.preprocess.mean, program.preprocess.std)
    pixels = next(name for name, known in PIXELS.items() if (known.mean, known.std) == seen)
    model = program.model.clone(code_width=tokenizer['codebook'].shape[1])
    flat = flatten_dict({**params, 'codebook': tokenizer['codebook']}, sep='/')
    flat = {name: np.asarray(array, np.float32) for name, array in flat.items()}
    weights = {name: Weight(array.shape, (name,)) for name, array in flat.items()}
    ported = Ported('beit', {}, weights, {}, pixels)
    converting.write(path, ArraySource(flat, path), ported, model)
