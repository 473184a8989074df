"""Trials of a sweep as one program: `vmap` over prompts, optimizer states and seeds, one frozen backbone for all.

Every trial gets the numbers of a run by itself, up to the rounding of larger matrix products. Many small trials so
share one compilation, one pass of the backbone's weights through memory, and the dispatch of each step; on several
devices they are split over the mesh's axis `trial`.
"""

import contextlib
import dataclasses
import time
import zlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax import data
from vpt_jax.methods import Method
from vpt_jax.training import config as configs
from vpt_jax.training import loop, prefixed
from vpt_jax.training import mesh as meshes
from vpt_jax.training import step as steps
from vpt_jax.training.recipe import Recipe
from vpt_jax.training.run_folder import Progress, RunFolder
from vpt_jax.training.stopping import StopRequest
from vpt_jax.training.trials import Outcome, TaskRun, Trial, run_trials

#: So many at most, whatever the memory: beyond it nothing is gained.
MOST = 64
_SAVE_SECONDS = 60.0


def trials_together(run: TaskRun, trials: Sequence[Trial]) -> Iterator[Outcome]:
    """Runs trials that differ only in rate, weight decay and seed as one program; others one by one."""
    groups: dict[tuple, list[Trial]] = {}
    alone = []
    for trial in trials:
        config = run.config_of(trial)
        method, recipe = configs.whole_method(config), configs.recipe(config)
        if _needs_a_run(method, recipe):
            alone.append(trial)
        else:
            plain = dataclasses.replace(recipe, base_lr=1.0, weight_decay=float(recipe.weight_decay > 0), seed=0)
            groups.setdefault((trial.phase, method, plain), []).append(trial)
    for group in groups.values():
        if len(group) == 1:
            alone += group
        else:
            yield from _group(run, group)
    yield from run_trials(run, alone)


def _needs_a_run(method: Method, recipe: Recipe) -> bool:
    """Whether a method looks at training images outside of the step, which only a run by itself does."""
    return method.looks_at_images or any(method.observes(epoch) for epoch in range(recipe.epochs))


def _group(run: TaskRun, trials: list[Trial]) -> Iterator[Outcome]:
    """As many at a time as there is memory for."""
    most = min(MOST, len(trials))
    while trials:
        try:
            yield from _Together(run, trials[:most]).outcomes()
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error) or most == 1:
                raise
            most = max(most // 2, 1)
            continue
        trials = trials[most:]


class _Together:
    """Some trials of one program, from wherever their folder stands to their outcomes."""

    def __init__(self, run: TaskRun, trials: Sequence[Trial]):
        self.run, self.trials = run, trials
        self.recipes: list[Recipe] = [configs.recipe(run.config_of(trial)) for trial in trials]
        recipe = self.recipe = self.recipes[0]
        self.dataset = run.dataset_of(trials[0])
        method = configs.whole_method(run.config_of(trials[0]))
        method.check(run.backbone.model)
        backbone = self.backbone = loop.as_run(recipe, run.backbone)
        self.program = loop.program_of(recipe, backbone.model, method, run.preprocess, self.dataset.num_classes)
        self.mesh = meshes.trial_mesh(len(trials))
        self.params = meshes.cast_backbone(backbone.params, self.program.precision, self.mesh, recipe.shard_backbone)
        seeds = list(dict.fromkeys(r.seed for r in self.recipes))
        self.shared = len(seeds) == 1
        self.batches = {
            seed: data.Batches(self.dataset.train, run.preprocess, recipe.batch_size, seed=seed) for seed in seeds
        }
        if prefixed.applies(self.program, recipe):
            size = recipe.eval_batch_size or recipe.batch_size
            rows = prefixed.rows(self.program, self.mesh, self.params, self.dataset.train, size, run.folder)
            self.batches = {
                seed: prefixed.PrefixedBatches(batches, rows, self.mesh) for seed, batches in self.batches.items()
            }
        self.per_epoch = self.batches[seeds[0]].steps_per_epoch
        self.total = recipe.epochs * self.per_epoch

    def outcomes(self) -> Iterator[Outcome]:
        """Trains and scores; a trial whose loss or prompts are not finite scores 0."""
        names = [trial.key for trial in self.trials]
        folder = self.run.folder / 'runs' / f'together-{zlib.crc32(repr(names).encode()):08x}'
        states = self._states()
        size = sum(a.nbytes for a in jax.tree.leaves(states))
        with contextlib.closing(RunFolder(folder, {'trials': names}, size)) as held:
            states, finite = self._train(held, states)
        accuracy = self._accuracy(states)
        count = sum(a[0].size for a in jax.tree.leaves(states.prompts))
        for trial, value, good in zip(self.trials, accuracy, finite, strict=True):
            yield Outcome(trial, float(value), count) if good else Outcome(trial, 0.0, None)

    def _states(self) -> steps.TrainState:
        each = [loop.first_state(r, self.program, self.backbone.params, self.per_epoch) for r in self.recipes]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    def _batch(self, t: int) -> dict:
        made = {seed: batches.batch(t) for seed, batches in self.batches.items()}
        if self.shared:
            return next(iter(made.values()))
        return jax.tree.map(lambda *arrays: np.stack(arrays), *(made[r.seed] for r in self.recipes))

    def _train(self, folder: RunFolder, states: steps.TrainState) -> tuple[steps.TrainState, np.ndarray]:
        step = steps.trials_step(self.program, self.mesh, self.shared)
        states = folder.restore(meshes.along_trials(states, self.mesh))
        first = int(states.step[0])
        progress = Progress(self.total, first, self.recipe.batch_size * len(self.trials))
        saved = time.perf_counter()
        batches = data.Prefetch(
            lambda t: meshes.shard_trial_batch(self._batch(t), self.mesh, self.shared), range(first, self.total)
        )
        with StopRequest() as request, contextlib.closing(progress), batches:
            for t in range(first, self.total):
                states, metrics = step(self.params, states, next(batches))
                stop, done = request.number, t + 1
                if stop or time.perf_counter() - saved > _SAVE_SECONDS:
                    folder.save(done, states)
                    saved = time.perf_counter()
                if done % self.recipe.log_every_steps == 0 or done == self.total:
                    losses = np.asarray(metrics['loss'])
                    good = losses[np.isfinite(losses)]
                    median = float(np.median(good)) if len(good) else float('nan')
                    progress.update(done, {'trials': len(losses), 'median loss': median})
                if stop and done < self.total:
                    raise request.error(done, self.total, folder.path)
        # A loss that is not finite leaves prompts that are not, and they never recover.
        leaves = jax.tree.leaves(jax.device_get((states.prompts, states.state)))
        return states, np.logical_and.reduce([np.isfinite(a).reshape(len(a), -1).all(-1) for a in leaves])

    def _accuracy(self, states: steps.TrainState) -> np.ndarray:
        split = getattr(self.dataset, self.trials[0].scored_on)
        size = self.recipe.eval_batch_size or self.recipe.batch_size
        step = steps.trials_eval_step(self.program, self.mesh)
        sums = None
        for batch in data.Batches(split, self.run.preprocess, size, train=False).epoch():
            batch = meshes.shard_trial_batch(batch, self.mesh, True)
            out = step(self.params, (states.prompts, states.state), batch)
            out = (out['correct'].sum(-1), out['count'].sum(-1))
            sums = out if sums is None else jax.tree.map(jnp.add, sums, out)
        return np.asarray(sums[0] / sums[1])
