"""`fit`: from a method, a backbone and a dataset to a result, in a folder that can be stopped and resumed anywhere."""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax import data, methods
from vpt_jax.checkpoints import prompt_file
from vpt_jax.data.preprocess import normalise
from vpt_jax.errors import UsageError
from vpt_jax.methods import prefix
from vpt_jax.models.zoo import Backbone, load_backbone
from vpt_jax.training import distributed, evaluation, prefixed
from vpt_jax.training import mesh as meshes
from vpt_jax.training import step as steps
from vpt_jax.training.recipe import Recipe
from vpt_jax.training.run_folder import Progress, RunFolder, crc32, write_result
from vpt_jax.training.stopping import StopRequest

PyTree = Any


class DivergedError(RuntimeError):
    """The loss became NaN or infinite; the message has the step, the last good checkpoint and advice."""


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What `fit` returns.

    Attributes:
      metrics: the content of `result.json`.
      prompts, state: the trained pytree and what the method carried along, numpy arrays.
      backbone: the frozen network.
      folder: where everything was written.
    """

    metrics: dict
    prompts: PyTree
    state: PyTree
    backbone: Backbone
    folder: Path

    def add(self, name: str, value: Any) -> None:
        """Adds an entry to `metrics` and to `result.json`."""
        self.metrics[name] = value
        if distributed.is_main():
            write_result(self.folder, self.metrics)


def fit(
    method: methods.Method,
    dataset: str | data.Dataset = 'digits',
    backbone: str | Backbone = 'tiny_vit64',
    *,
    workdir: str | Path,
    recipe: Recipe | None = None,
    preprocess: data.Preprocess | None = None,
    head: methods.Method | None = None,
    on_bad_image: str = 'stop',
    on_empty_class: str = 'stop',
    start: Any = None,
) -> Result:
    """Adapts a frozen backbone to a dataset.

    A folder that holds an unfinished run of the same configuration is resumed, and ends with the same prompts, bit for
    bit, as if it had never been stopped.

    Args:
      method: what is trained; a linear head is added if it has none.
      dataset: a name for `data.load`, or a loaded dataset (decoded by `preprocess`).
      backbone: a name for `load_backbone`, or a loaded backbone.
      workdir: everything the run writes is under it.
      recipe: how to train; `Recipe()` by default.
      preprocess: by default the backbone's own resize rule and pixel statistics, without augmentation, and its size
        or the method's (`Method.input_size`).
      head: another head than linear.
      on_bad_image, on_empty_class: see `data.load`.
      start: prompts to go on from instead of drawn ones, with what the method carries along: anything with `prompts`
        and `state`, such as the `Result` of another run.

    Returns:
      A `Result`.

    Raises:
      UsageError: anything the caller can mend: names, shapes, folders, another configuration in `workdir`.
      DivergedError: the loss is not finite.
      StoppedError: SIGTERM or SIGINT came; the run was saved and can be resumed.
    """
    recipe, method = recipe or Recipe(), methods.with_head(method, head)
    if isinstance(backbone, str):
        name, own = backbone, method.needs_classifier
        host = recipe.shard_backbone
        backbone = distributed.main_first(lambda: load_backbone(name, own_classifier=own, on_host=host))
    method.check(backbone.model)
    preprocess = preprocess or default_preprocess(backbone, method=method)
    described = describe_run(method, dataset, backbone, preprocess, recipe)
    if start is not None:
        described['start'] = {'crc32': crc32((start.prompts, start.state))}
    backbone = as_run(recipe, backbone)
    check_batches(recipe)
    if isinstance(dataset, str):
        task = dataset
        dataset = distributed.together(lambda: data.load(
            task, preprocess, seed=recipe.seed, on_bad_image=on_bad_image, on_empty_class=on_empty_class
        ))  # fmt: skip
    batches = data.Batches(dataset.train, preprocess, recipe.batch_size, seed=recipe.seed)
    program = program_of(recipe, backbone.model, method, preprocess, dataset.num_classes)
    state = first_state(recipe, program, backbone.params, batches.steps_per_epoch)
    if start is not None:
        state = _from_start(state, start)
    state_bytes = sum(a.nbytes for a in jax.tree.leaves(state))
    folder = RunFolder(workdir, described, state_bytes, recipe.keep_checkpoints)
    with contextlib.closing(folder):
        run = Run(recipe, backbone, dataset, preprocess, batches, program, folder)
        return run.finish(described, *run.train(state, drawn=start is None))


def program_of(recipe: Recipe, model, method, preprocess, num_classes: int) -> steps.Program:
    """What a recipe compiles to; rates and lengths are not part of it."""
    return steps.Program(
        model, method, preprocess, num_classes, recipe.optimizer, recipe.weight_decay > 0, recipe.momentum,
        recipe.bias_multiplier, recipe.per_step, recipe.label_smoothing, recipe.mixup, recipe.resolved_precision(),
        recipe.schedule, recipe.shard_backbone, recipe.decay_biases, recipe.head_weight_decay,
    )  # fmt: skip


def check_batches(recipe: Recipe) -> None:
    """Refuses batches that the devices do not divide, before anything of the run is on disk."""
    mesh = meshes.data_mesh()
    for field in ('batch_size', 'eval_batch_size'):
        meshes.check_batch(getattr(recipe, field), mesh, f'--config.train.{field}')


def as_run(recipe: Recipe, backbone: Backbone) -> Backbone:
    """The backbone as a recipe runs it: a sharded one with scanned blocks if it can, so that one is whole at a time."""
    return backbone.with_scan() if recipe.shard_backbone and hasattr(backbone.model, 'scan') else backbone


def first_state(recipe: Recipe, program: steps.Program, params: PyTree, steps_per_epoch: int) -> steps.TrainState:
    """The state before a recipe's first step."""
    return steps.init_state(
        program, params, seed=recipe.seed, learning_rate=recipe.learning_rate, weight_decay=recipe.weight_decay,
        warmup_epochs=recipe.warmup_epochs, epochs=recipe.epochs, steps_per_epoch=steps_per_epoch,
    )  # fmt: skip


def _from_start(state: steps.TrainState, start: Any) -> steps.TrainState:
    for what in ('prompts', 'state'):
        ours, given = getattr(state, what), getattr(start, what)
        if jax.tree.map(np.shape, ours) != jax.tree.map(np.shape, given):
            raise UsageError(f'the {what} to start from are not those of this method on this backbone and dataset')
        state = state.replace(**{what: jax.tree.map(lambda a, b: jnp.array(b, a.dtype), ours, given)})
    return state


class _Views:
    """The training images as `Method.init_from` takes them: one view of each, augmented as in training."""

    def __init__(self, batches: data.Batches):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches.split)

    def __getitem__(self, index: np.ndarray) -> jax.Array:
        preprocess = self.batches.preprocess
        return normalise(jnp.asarray(self.batches.views(index)), preprocess.mean, preprocess.std)


def default_preprocess(
    backbone: Backbone, augment: str = 'none', resize: str | None = None, method: methods.Method | None = None
) -> data.Preprocess:
    """The pixels that a backbone, or a method in front of it, expects, with an augmentation of `data.Preprocess`."""
    pixels, model = backbone.pixels, backbone.model
    size = model.image_size if method is None else method.input_size(model)
    return data.Preprocess(size, resize or pixels.resize, augment, pixels.mean, pixels.std)


def describe_run(method, dataset, backbone, preprocess, recipe) -> dict:
    """A run's resolved configuration as plain data: what must agree for a folder to be resumed."""
    how = dataclasses.asdict(recipe)
    del how['shard_backbone']  # changes no result
    return {
        'method': methods.describe(method),
        'dataset': dataset if isinstance(dataset, str) else dataset.name,
        'backbone': backbone.describe(),
        'preprocess': preprocess.to_dict(),
        'recipe': how,
    }


class Run:
    """One attempt at a run: training from wherever the folder stands, then evaluation."""

    def __init__(self, recipe, backbone, dataset, preprocess, batches, program, folder):
        self.recipe, self.backbone, self.dataset, self.preprocess = recipe, backbone, dataset, preprocess
        self.batches, self.program, self.folder = batches, program, folder
        self.mesh = meshes.data_mesh()
        self.params = meshes.cast_backbone(backbone.params, program.precision, self.mesh, recipe.shard_backbone)
        self.total = recipe.epochs * batches.steps_per_epoch
        self.pending: list[tuple[int, dict]] = []
        self.cached_blocks = 0

    def step(self):
        """The compiled train step."""
        return steps.train_step(self.program, self.mesh)

    def train(self, state, drawn: bool = True):
        """Runs the remaining steps, of prompts that were just drawn or not; returns the last state and the timing."""
        state = self.folder.restore(meshes.replicate(state, self.mesh))
        first = int(state.step)
        if drawn and not first and self.program.method.looks_at_images:
            state = meshes.on_host(state)
            state = steps.look_at_images(self.program, state, self.backbone.params, _Views(self.batches))
            state = meshes.replicate(distributed.from_main(state), self.mesh)
        self.folder.open_metrics(first)
        every = self.recipe.checkpoint_every_steps or self.batches.steps_per_epoch
        step = self.step()
        progress = Progress(self.total, first, self.recipe.batch_size)
        if prefixed.applies(self.program, self.recipe) and first < self.total:
            rows = prefixed.rows(self.program, self.mesh, self.params, self.dataset.train, self._eval_size,
                                 self.folder.path)  # fmt: skip
            self.batches = prefixed.PrefixedBatches(self.batches, rows, self.mesh)
            self.cached_blocks = prefix.entry(self.program.method, self.program.model)
        timing = {'began': time.perf_counter(), 'first_step': 0.0, 'steps': self.total - first}
        meter = data.WaitMeter()
        with StopRequest() as request, contextlib.closing(progress), self._batches(first) as batches:
            for t in range(first, self.total):
                state = self._observed(t, state)
                batch = next(batches)
                meter.add(batches.waited, not self.pending or self.pending[-1][1]['loss'].is_ready())
                state, metrics = step(self.params, state, batch)
                self.pending.append((t + 1, metrics))
                if t == first:
                    jax.block_until_ready(metrics)
                    timing['first_step'] = time.perf_counter() - timing['began']
                    meter.restart()
                done = t + 1
                logs, saves = (done % n == 0 for n in (self.recipe.log_every_steps, every))
                stop = request.agreed(logs or saves)  # one that comes later than this is for the next step
                last = done == self.total or stop
                row = None
                if last or logs:
                    row = self._log()
                if last or saves:
                    self._log()
                    self._save(done, state)
                if self._validates_after(done):
                    row = self._validate(done, state)
                progress.update(done, row and {**row, 'waiting for data': meter.share})
                if stop and done < self.total:
                    raise request.error(done, self.total, self.folder.path)
            jax.block_until_ready(state)
        timing |= {'seconds': time.perf_counter() - timing['began'], 'waiting': meter.share}
        return state, timing

    def _batches(self, first: int) -> data.Prefetch:
        """The remaining batches, on the devices, made a few steps ahead."""
        return data.Prefetch(meshes.feeder(self.batches, self.mesh), range(first, self.total))

    def _observed(self, t: int, state):
        """Before step t: the state after a look at all training images, if an epoch begins and the method wants one."""
        epoch, inside = divmod(t, self.batches.steps_per_epoch)
        method = self.program.method
        if inside or not method.observes(epoch):
            return state
        batches = self._evaluation(self.dataset.train)
        sums = evaluation.observe(self.program, self.mesh, self.params, state.prompts, state.state, batches)
        carried = method.conclude(epoch, meshes.on_host(state.state), sums)
        return state.replace(state=meshes.replicate(carried, self.mesh))

    def finish(self, described: dict, state, timing: dict) -> Result:
        """Evaluates, writes `result.json` and the prompt file."""
        prompts, carried = jax.device_get((state.prompts, state.state))
        trained = sum(a.size for a in jax.tree.leaves(prompts))
        result = {
            'test_accuracy': None,
            'trained_parameters': trained,
            'percent_of_backbone': 100 * trained / self.backbone.num_params,
            'epochs': self.recipe.epochs,
            'steps': self.total,
            **self.speed(timing),
        }
        for name in ('val', 'test'):
            split = getattr(self.dataset, name)
            if len(split):
                scores = self._evaluate(split, state)
                result |= {f'{name}_{k}': v for k, v in scores.items()}
        result |= {
            'backbone': self.backbone.name,
            'dataset': self.dataset.name,
            'classes': self.dataset.num_classes,
            'data_source': self.dataset.source or None,
            'unreadable_images': len(self.dataset.unreadable),
            'resize': self.preprocess.resize,
            'augment': self.preprocess.augment,
            'normalisation': {'mean': self.preprocess.mean, 'std': self.preprocess.std},
            'precision': self.program.precision,
            'cached_blocks': self.cached_blocks,
            'device': jax.devices()[0].device_kind,
            'devices': jax.device_count(),
            'processes': jax.process_count(),
            'jax': jax.__version__,
            'workdir': str(self.folder.path),
        }
        if self.folder.main:
            meta = {**described, 'class_names': list(self.dataset.class_names)}
            prompt_file.save(self.folder.path, prompts, carried, meta)
            write_result(self.folder.path, result)
        return Result(result, prompts, carried, self.backbone, self.folder.path)

    def _log(self) -> dict[str, float] | None:
        """Fetches the metrics of all steps since the last call, checks every loss, writes the newest."""
        if not self.pending:
            return None
        pending, self.pending = jax.device_get(self.pending), []
        for t, metrics in pending:
            if not np.isfinite(metrics['loss']):
                rate = float(metrics['learning_rate'])
                raise self._diverged(f'the loss became {float(metrics["loss"])} at step {t} (learning rate {rate:.4g})')
        t, metrics = pending[-1]
        row = {name: float(value) for name, value in metrics.items()}
        self.folder.log(t, row)
        return row

    def _save(self, done: int, state) -> None:
        # The loss is computed before the update: a finite one does not vouch for the prompts after it.
        if not all(np.isfinite(a).all() for a in jax.tree.leaves(jax.device_get((state.prompts, state.state)))):
            raise self._diverged(f'the prompts became infinite or NaN at step {done}')
        self.folder.save(done, state)

    def _diverged(self, what: str) -> DivergedError:
        saved = self.folder.last_saved()
        where = f'the last good checkpoint is step {saved}' if saved else 'no checkpoint had been saved yet'
        return DivergedError(
            f'{what}; {where} in {self.folder.path}. Use a smaller --config.optim.lr (and another --workdir), or more '
            '--config.train.warmup_epochs'
        )

    def _evaluate(self, split: data.Split, state) -> dict:
        batches = self._evaluation(split)
        return evaluation.evaluate(self.program, self.mesh, self.params, state.prompts, state.state, batches)

    def _evaluation(self, split: data.Split) -> data.Batches:
        return data.Batches(split, self.preprocess, self._eval_size, train=False)

    @property
    def _eval_size(self) -> int:
        return self.recipe.eval_batch_size or self.recipe.batch_size

    def _validates_after(self, done: int) -> bool:
        epoch, rest = divmod(done, self.batches.steps_per_epoch)
        every = self.recipe.eval_every_epochs
        return bool(every and not rest and epoch % every == 0 and len(self.dataset.val))

    def _validate(self, done: int, state) -> dict[str, float]:
        scores = self._evaluate(self.dataset.val, state)
        row = {'val_accuracy': scores['accuracy'], 'val_loss': scores['loss']}
        self.folder.log(done, row)
        return row

    def speed(self, timing: dict) -> dict:
        """Rates of this attempt; one that had nothing left to train keeps the figures of the one before."""
        if timing['steps'] < 2:
            names = ('train_images_per_second', 'compile_seconds', 'share_of_time_waiting_for_data')
            return {name: self.folder.previous_result().get(name) for name in names}
        per_step = (timing['seconds'] - timing['first_step']) / (timing['steps'] - 1)
        return {
            'train_images_per_second': self.recipe.batch_size / per_step,
            'compile_seconds': max(timing['first_step'] - per_step, 0.0),
            'share_of_time_waiting_for_data': timing['waiting'],
        }
