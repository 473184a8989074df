"""A trained prompt at work: loading it beside its backbone, class probabilities of images, scores of a split."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vpt_jax import data, methods
from vpt_jax.checkpoints import prompt_file
from vpt_jax.errors import UsageError
from vpt_jax.methods import Method
from vpt_jax.models.zoo import Backbone, is_named, load_backbone
from vpt_jax.training import mesh as meshes
from vpt_jax.training import step as steps
from vpt_jax.training.evaluation import count, summary
from vpt_jax.training.recipe import Recipe


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A prompt file with everything that is needed to run it.

    Attributes:
      backbone: the frozen network that the prompt was trained on.
      method: the method, with its head.
      preprocess: how images become the network's input.
      file: the prompts, the method's state and the json.
    """

    backbone: Backbone
    method: Method
    preprocess: data.Preprocess
    file: prompt_file.PromptFile

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names, in the order of the head's scores."""
        return tuple(self.file.meta['class_names'])

    @property
    def seed(self) -> int:
        """Seed of the training run; it decides the split of a dataset that comes without one."""
        return int(self.file.meta.get('recipe', {}).get('seed', 0))


def load_trained(path: str | Path, backbone: str | Backbone | None = None) -> Trained:
    """A trained network from its prompt file.

    Args:
      path: a run's folder, or its `prompt.safetensors` or `prompt.json`.
      backbone: a name, path or loaded backbone; by default the name in the file.

    Returns:
      A `Trained`.

    Raises:
      UsageError: a damaged file, or another backbone (or the same one with other settings) than the prompt was
        trained on.
    """
    file = prompt_file.load(path)
    try:
        entries, preprocess, trained_on, _ = (file.meta[k] for k in ('method', 'preprocess', 'backbone', 'class_names'))
        settings = trained_on['settings']
        method = methods.rebuild(entries)
        preprocess = data.Preprocess.from_dict(preprocess)
        if not isinstance(backbone, Backbone):
            backbone = _load(backbone, trained_on['name'], settings)
    except (KeyError, TypeError) as error:
        raise UsageError(f'{path} is not a complete prompt file: {error} is missing from its json') from error
    prompt_file.check_backbone(file.meta, backbone)
    other = _differing(settings, backbone)
    if other:
        now = backbone.describe()['settings']
        shown = ', '.join(f'{k} {v!r} in training and {now[k]!r} now' for k, v in other.items())
        raise UsageError(f'this prompt was trained on {backbone.name} with other settings: {shown}; load it with those')
    method.check(backbone.model)
    return Trained(backbone, method, preprocess, file)


def _load(given: str | None, trained_on: str, settings: dict[str, Any]) -> Backbone:
    """The backbone of that name, with the settings it was trained with."""
    if given is None and not is_named(trained_on) and not Path(trained_on).exists():
        raise UsageError(
            f'this prompt was trained on the weights in a file {trained_on}: say where it is with --backbone=PATH '
            '(load_trained(..., backbone=PATH))'
        )
    given = given or trained_on
    backbone = load_backbone(given, image_size=settings['image_size'])
    other = _differing(settings, backbone)
    return load_backbone(given, image_size=settings['image_size'], **other) if other else backbone


def _differing(settings: dict[str, Any], backbone: Backbone) -> dict[str, Any]:
    """Settings of the training run that this backbone has otherwise, those aside that change no result."""
    now = backbone.describe()['settings']
    return {k: v for k, v in settings.items() if k in now and v != now[k] and k not in ('dtype', 'scan')}


class Predictor:
    """A trained network on the devices, with one compiled program for every batch.

    Args:
      trained: from `load_trained`.
      batch_size: >= 1, rounded up to a multiple of the number of devices; the last batch of a call is padded.
      precision: 'auto' (bfloat16 on accelerators, float32 on the CPU), 'float32' or 'bfloat16'.

    Raises:
      UsageError: a batch size or precision that is not one of these.
    """

    def __init__(self, trained: Trained, batch_size: int = 64, precision: str = 'auto'):
        if batch_size < 1:
            raise UsageError(f'batch_size must be >= 1, got {batch_size}')
        self.trained = trained
        self.batch_size = -(-batch_size // jax.device_count()) * jax.device_count()
        precision = Recipe(precision=precision).resolved_precision()
        self._program = steps.Program(
            trained.backbone.model, trained.method, trained.preprocess, len(trained.class_names), precision=precision
        )
        self._mesh = meshes.data_mesh()
        self._params = meshes.cast_backbone(trained.backbone.params, precision, self._mesh)
        self._prompts = meshes.replicate((trained.file.prompts, trained.file.state), self._mesh)

    def probabilities(self, images: Sequence[Any]) -> np.ndarray:
        """Class probabilities of images.

        Args:
          images: N images: uint8 [H, W], [H, W, 1] or [H, W, 3], or PIL images, of any size; images that
            `Preprocess.decode` gave are taken as they are.

        Returns:
          float32 [N, C], rows that add up to 1, in the order of `Trained.class_names`.

        Raises:
          UsageError: an image of another type or shape.
        """
        if not len(images):
            return np.zeros((0, len(self.trained.class_names)), np.float32)
        preprocess = self.trained.preprocess
        images = [preprocess.decode(image) for image in images]
        images = np.stack(images) if preprocess.fixed_size else images
        split = data.Split(images, np.zeros(len(images), np.int32), ('',) * len(images))
        step = steps.eval_step(self._program, self._mesh)
        out = [step(self._params, self._prompts, meshes.shard_batch(batch, self._mesh))['logits']
               for batch in self._batches(split).epoch()]  # fmt: skip
        logits = np.concatenate([np.asarray(part) for part in out])[: len(images)]
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        return scores / scores.sum(-1, keepdims=True)

    def scores(self, split: data.Split) -> dict[str, Any]:
        """Scores of a labelled split, decoded by the prompt's preprocessing.

        Returns:
          What `evaluation.summary` gives; `images_per_second`, without compilation; and `per_class`, a list with one
          {'class', 'examples', 'correct', 'accuracy'} a class, accuracy None where there are no examples.

        Raises:
          UsageError: an empty split, or one that was decoded otherwise.
        """
        batches = self._batches(split)
        step = steps.eval_step(self._program, self._mesh)
        jax.block_until_ready(step(self._params, self._prompts, meshes.shard_batch(batches.batch(0), self._mesh)))
        began = time.perf_counter()
        sums = count(self._program, self._mesh, self._params, *self._prompts, batches)
        seconds = time.perf_counter() - began
        rows = [
            {'class': name, 'examples': int(n), 'correct': int(hit), 'accuracy': hit / n if n else None}
            for name, n, hit in zip(
                self.trained.class_names, sums['count'].tolist(), sums['correct'].tolist(), strict=True
            )
        ]
        return {**summary(sums), 'images_per_second': len(split) / seconds, 'per_class': rows}

    def _batches(self, split: data.Split) -> data.Batches:
        return data.Batches(split, self.trained.preprocess, self.batch_size, train=False)


def predict(trained: Trained, images: Sequence[Any], *, batch_size: int = 64, precision: str = 'auto') -> np.ndarray:
    """Class probabilities of images by a trained prompt; see `Predictor` for the arguments and errors.

    Returns:
      float32 [N, C], in the order of `trained.class_names`.
    """
    return Predictor(trained, batch_size, precision).probabilities(images)


def top_classes(probabilities: np.ndarray, names: Sequence[str], top: int) -> list[list[tuple[str, float]]]:
    """The most probable classes of each image, best first.

    Args:
      probabilities: [N, C].
      names: C names.
      top: how many, >= 1; all classes if there are fewer.

    Returns:
      N lists of (name, probability).
    """
    best = np.argsort(-probabilities, axis=-1, kind='stable')[:, :top]
    return [[(names[c], float(p[c])) for c in row] for p, row in zip(probabilities, best, strict=True)]


def check_classes(trained: Trained, dataset: data.Dataset) -> None:
    """Refuses a dataset whose labels mean other classes than the head's scores.

    Raises:
      UsageError: another number of classes, or other names; names that are only numbers match any.
    """
    ours, theirs = trained.class_names, dataset.class_names
    if len(ours) != len(theirs):
        raise UsageError(
            f'the prompt knows {len(ours)} classes and {dataset.name} has {len(theirs)}: evaluate it on a dataset with '
            'the classes that it was trained on'
        )
    numbers = tuple(map(str, range(len(ours))))
    if ours != theirs and numbers not in (ours, theirs):
        i = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        raise UsageError(
            f'the prompt and {dataset.name} have {len(ours)} classes each, but not the same: class {i} is {ours[i]!r} '
            f'in the prompt and {theirs[i]!r} in the dataset'
        )
