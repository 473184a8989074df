"""Trials of a sweep: what one is, what comes out of it, and the plain way to run them."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vpt_jax import data
from vpt_jax.errors import UsageError
from vpt_jax.models.zoo import Backbone
from vpt_jax.training import config as configs
from vpt_jax.training import loop

#: Fields of a config and the values they get, in a fixed order.
Changes = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
      phase: `'search'` (trained on train, scored on val) or `'final'` (scored on test).
      changes: what it changes in the sweep's config.
      seed: of the run.
    """

    phase: str
    changes: Changes
    seed: int

    @property
    def scored_on(self) -> str:
        """The split whose accuracy counts."""
        return 'val' if self.phase == 'search' else 'test'

    @property
    def key(self) -> str:
        """Its name in the sweep's folder."""
        parts = [f'{field.rsplit(".", 1)[-1]}={value}' for field, value in self.changes]
        return f'{self.phase}/' + ','.join([*parts, f'seed={self.seed}']).replace('/', '_')


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came out of a trial.

    Attributes:
      trial: which one.
      accuracy: of the last epoch on the split that counts, in [0, 1]; 0 if the loss was not finite.
      trained_parameters: with the head; None if the loss was not finite.
    """

    trial: Trial
    accuracy: float
    trained_parameters: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class TaskRun:
    """A task of a sweep, loaded: what an executor of trials works with.

    Attributes:
      config: the sweep's config with the task as its dataset.
      backbone: the frozen network.
      dataset: decoded, all splits.
      preprocess: how it was decoded.
      folder: of the task in the sweep's folder.
      final_on_val: whether final runs train on train and val together.
    """

    config: ConfigDict
    backbone: Backbone
    dataset: data.Dataset
    preprocess: data.Preprocess
    folder: Path
    final_on_val: bool

    def config_of(self, trial: Trial) -> ConfigDict:
        """The config that a trial runs."""
        return changed(self.config, {**dict(trial.changes), 'seed': trial.seed})

    def dataset_of(self, trial: Trial) -> data.Dataset:
        """What a trial trains on and is scored on; the search does not get to see test."""
        if trial.phase == 'search':
            return dataclasses.replace(self.dataset, test=_none_of(self.dataset.test))
        return self.dataset.with_val_in_train() if self.final_on_val else self.dataset


def changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of a config with other values in some fields, which are named like `'optim.lr'`.

    Raises:
      UsageError: the config has no such field, or it cannot have that value.
    """
    config = config.copy_and_resolve_references()
    for field, value in changes.items():
        *path, name = field.split('.')
        node = config
        for part in path:
            node = node.get(part) if isinstance(node, ConfigDict) else None
        if not isinstance(node, ConfigDict) or name not in node:
            raise UsageError(f'the config has no field {field}, which {value!r} was meant for')
        try:
            node[name] = value
        except TypeError as error:
            raise UsageError(f'the field {field} of the config cannot be {value!r}: {error}') from error
    return config


def _none_of(split: data.Split) -> data.Split:
    return data.Split([], split.labels[:0], ())


#: Runs trials of a task and yields each outcome as soon as it is known, in any order. The default runs one after the
#: other; one that runs many trials as one program has the same form.
Executor = Callable[[TaskRun, Sequence[Trial]], Iterator[Outcome]]


def run_trials(run: TaskRun, trials: Sequence[Trial]) -> Iterator[Outcome]:
    """Runs trials one after the other, each in a run folder of its own, so that one that was stopped goes on."""
    for trial in trials:
        config = run.config_of(trial)
        method = configs.whole_method(config)
        folder = run.folder / 'runs' / trial.key
        try:
            metrics = loop.fit(
                method, run.dataset_of(trial), run.backbone, workdir=folder, recipe=configs.recipe(config),
                preprocess=run.preprocess,
            ).metrics  # fmt: skip
            yield Outcome(trial, metrics[f'{trial.scored_on}_accuracy'], metrics['trained_parameters'])
        except loop.DivergedError:
            yield Outcome(trial, 0.0, None)
