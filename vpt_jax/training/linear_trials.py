"""Trials of a linear head as one program: the backbone sees every image once, and all settings train at the same time.

The numbers are those of single runs: same features, same initial head, same batches in the same order.
"""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from vpt_jax import data
from vpt_jax.training import config as configs
from vpt_jax.training import mesh as meshes
from vpt_jax.training import step as steps
from vpt_jax.training.loop import as_run
from vpt_jax.training.probe import accuracies, features, shuffled, train_heads
from vpt_jax.training.recipe import Recipe
from vpt_jax.training.together import trials_together
from vpt_jax.training.trials import Outcome, TaskRun, Trial

# So many heads at a time: their optimizer states and scores must fit beside the features.
_TOGETHER = 64


def linear_trials(run: TaskRun, trials: Sequence[Trial]) -> Iterator[Outcome]:
    """Runs trials that train only a linear head, as published, all at once; others as `trials_together` does."""
    together = [trial for trial in trials if _is_linear(run, trial)]
    yield from trials_together(run, [trial for trial in trials if trial not in together])
    groups: dict[tuple, list[Trial]] = {}
    for trial in together:
        recipe = configs.recipe(run.config_of(trial))
        head = configs.whole_method(run.config_of(trial))
        key = (trial.phase, trial.seed, head, recipe.batch_size, recipe.epochs, recipe.warmup_epochs, recipe.momentum)
        groups.setdefault(key, []).append(trial)
    known: dict[str, np.ndarray] = {}
    for group in groups.values():
        for start in range(0, len(group), _TOGETHER):
            yield from _train(run, group[start : start + _TOGETHER], known)


def _is_linear(run: TaskRun, trial: Trial) -> bool:
    config = run.config_of(trial)
    recipe = configs.recipe(config)
    published = recipe.optimizer == 'sgd' and recipe.schedule == 'cosine' and not recipe.per_step
    plain = run.preprocess.augment == 'none' and not (recipe.mixup or recipe.label_smoothing)
    heads = {config.method.name, config.head.name} == {'linear'}
    return heads and published and plain


def _train(run: TaskRun, trials: list[Trial], known: dict[str, np.ndarray]) -> Iterator[Outcome]:
    """Trials that differ in rate and weight decay only; `known` keeps features from one call to the next."""
    recipe = configs.recipe(run.config_of(trials[0]))
    dataset = run.dataset_of(trials[0])
    backbone = as_run(recipe, run.backbone)
    head = configs.whole_method(run.config_of(trials[0]))
    program = steps.Program(
        backbone.model, head, run.preprocess, dataset.num_classes, precision=recipe.resolved_precision(),
        shard_backbone=recipe.shard_backbone,
    )  # fmt: skip
    state = steps.init_state(
        program, backbone.params, seed=trials[0].seed, learning_rate=0.0, weight_decay=0.0,
        warmup_epochs=recipe.warmup_epochs, epochs=recipe.epochs, steps_per_epoch=1,
    )  # fmt: skip

    def of(name: str) -> np.ndarray:
        if name not in known:
            known[name] = _features(backbone.params, program, getattr(run.dataset, name), recipe)
        return known[name]

    joined = trials[0].phase == 'final' and run.final_on_val
    x = np.concatenate([of('train'), of('val')]) if joined else of('train')
    order = shuffled(len(x), recipe.batch_size, recipe.epochs, trials[0].seed)
    recipes = [configs.recipe(run.config_of(trial)) for trial in trials]
    rates, decays = (np.array(values, np.float32) for values in zip(
        *((r.learning_rate, r.weight_decay) for r in recipes), strict=True))  # fmt: skip
    heads = train_heads(x, dataset.train.labels, order, state.prompts, rates, decays, recipe.warmup_epochs,
                        recipe.epochs, momentum=recipe.momentum)  # fmt: skip
    scored_on = trials[0].scored_on
    accuracy = accuracies(heads, of(scored_on), getattr(dataset, scored_on).labels)
    finite = np.logical_and.reduce([np.isfinite(a).reshape(len(trials), -1).all(-1) for a in jax.tree.leaves(heads)])
    size = sum(a.size for a in jax.tree.leaves(heads)) // len(trials)
    for i, trial in enumerate(trials):
        yield Outcome(trial, float(accuracy[i]), size) if finite[i] else Outcome(trial, 0.0, None)


def _features(params: dict, program: steps.Program, split: data.Split, recipe: Recipe) -> np.ndarray:
    mesh = meshes.data_mesh()
    params = meshes.cast_backbone(params, program.precision, mesh, recipe.shard_backbone)
    wanted = min(recipe.eval_batch_size or 64, 256)
    size = -(-wanted // jax.device_count()) * jax.device_count()
    return features(program, mesh, params, split, size)
