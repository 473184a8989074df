"""Prompt condensation of a trained prompt (arXiv 2305.17223): scores over the training images, tuning what is kept."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vpt_jax import data
from vpt_jax.checkpoints.prompt_file import PromptFile
from vpt_jax.data.preprocess import normalise
from vpt_jax.errors import UsageError, unknown
from vpt_jax.methods import Stack, forward
from vpt_jax.methods.condense import SCORES, condense, keep, prompts_of, rows_of
from vpt_jax.training import mesh as meshes
from vpt_jax.training import step as steps
from vpt_jax.training.cost import forward_flops
from vpt_jax.training.inference import Predictor, Trained, check_classes, load_trained
from vpt_jax.training.loop import fit
from vpt_jax.training.recipe import Recipe


def importance(
    trained: Trained, split: data.Split, score: str = 'taylor_token', batch_size: int = 64, precision: str = 'auto'
) -> list[np.ndarray]:
    """How much the prompts of a trained network matter, in one pass over a split.

    The network runs as in evaluation: evaluation views, no dropout. Nothing is changed.

    Args:
      trained: a network with VPT prompts.
      split: what it was trained on; never what it is evaluated on.
      score: a name of `methods.condense.SCORES`.
      batch_size: examples of a mini-batch; the score of a data set is the mean over mini-batches, or over examples
        for 'taylor_token_samplemean'.
      precision: as in `Predictor`.

    Returns:
      float64 [n_l] for every prompted block.

    Raises:
      UsageError: an unknown score, or a method without VPT prompts.
    """
    if score not in SCORES:
        raise unknown('score of prompts', score, SCORES)
    method, model = trained.method, trained.backbone.model
    name = prompts_of(method).name
    precision = Recipe(precision=precision).resolved_precision()
    mesh = meshes.data_mesh()
    program = steps.Program(model, method, trained.preprocess, len(trained.class_names), precision=precision)
    params = meshes.cast_backbone(trained.backbone.params, precision, mesh)
    prompts, state = meshes.replicate((trained.file.prompts, trained.file.state), mesh)
    model, inside, blocks = program.compute_model(), isinstance(method, Stack), _blocks(trained)

    def loss(own, params, prompts, state, images, labels, weight):
        prompts = {**prompts, name: own} if inside else own
        logits, _ = forward(model, method, params, prompts, images, state=state, pixels=program.pixels)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
        return weight @ losses / weight.sum()

    def scores(params, prompts, state, images, labels, weight):
        own = prompts[name] if inside else prompts
        gradient = jax.grad(loss)(own, params, prompts, state, images, labels, weight)
        pairs = zip(rows_of(gradient, blocks), rows_of(own, blocks), strict=True)
        return [SCORES[score](g, p) for g, p in pairs]

    @jax.jit
    def step(params, prompts, state, batch):
        images = normalise(batch['image'], program.preprocess.mean, program.preprocess.std)
        with jax.default_matmul_precision('highest' if precision == 'float32' else 'default'):
            if score != 'taylor_token_samplemean':
                return scores(params, prompts, state, images, batch['label'], batch['weight']), 1.0

            def one(example):
                image, label = example
                return scores(params, prompts, state, image[None], label[None], jnp.ones(1))

            each = jax.lax.map(one, (images, batch['label']))
            return jax.tree.map(lambda a: batch['weight'] @ a, each), batch['weight'].sum()

    size = -(-batch_size // jax.device_count()) * jax.device_count()
    total, count = None, 0.0
    for batch in data.Batches(split, trained.preprocess, size, train=False).epoch():
        found, weight = step(params, prompts, state, meshes.shard_batch(batch, mesh))
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        count += weight
    return [np.asarray(s, np.float64) / float(count) for s in total]


def _blocks(trained: Trained) -> int:
    """Number of prompted blocks."""
    vpt, model = prompts_of(trained.method), trained.backbone.model
    return (vpt.deep_layers or model.depth) if vpt.deep else 1


def condensed(trained: Trained, kept: Sequence[np.ndarray]) -> Trained:
    """A trained network with only the prompts in `kept` (for every prompted block the indices that stay)."""
    method, prompts = condense(trained.method, trained.file.prompts, kept)
    method.check(trained.backbone.model)
    file = PromptFile(jax.device_get(prompts), trained.file.state, trained.file.meta)
    return dataclasses.replace(trained, method=method, file=file)


def tune(
    trained: Trained,
    dataset: data.Dataset,
    ratios: Sequence[float],
    workdir: str | Path,
    *,
    score: str = 'taylor_token',
    per_layer: bool = False,
    epochs: int = 20,
    base_lr: float | None = None,
    batch_size: int = 64,
    precision: str = 'auto',
) -> Iterator[dict[str, Any]]:
    """Condenses a trained prompt at several ratios, and trains what is kept, with the head, on a fresh schedule.

    Everything else is as in the run that trained the prompt: optimizer, batches, augmentation, seed, and the share of
    warm-up epochs. The result of each ratio is a run's folder, `workdir/keep_RATIO`, whose prompt is like any other.

    Args:
      trained: a network with VPT prompts.
      dataset: what it was trained on, decoded by `trained.preprocess`.
      ratios: shares of the prompts that stay, in (0, 1].
      workdir: where the runs are written; unfinished ones there are resumed.
      score: a name of `methods.condense.SCORES`.
      per_layer: rank the prompts of every block by themselves instead of all at once.
      epochs: of the fine-tuning, >= 1.
      base_lr: None for that of the run that trained the prompt.
      batch_size: of scoring and evaluation.
      precision: of everything.

    Yields:
      One dict for the prompt as it was trained, then one a ratio: `keep`; `prompts`, their number, and `per_block`;
      `trained_parameters`, with the head; `accuracy` on the test split (or, without one, on val or train: `split`) and
      `accuracy_untuned`; `gflops` an image; `images_per_second` of evaluation; `prompt`, the folder.

    Raises:
      UsageError, DivergedError, StoppedError: see `loop.fit`.
    """
    check_classes(trained, dataset)
    if epochs < 1:
        raise UsageError(f'the number of epochs to fine-tune must be >= 1, got {epochs}')
    split = next(name for name in ('test', 'val', 'train') if len(getattr(dataset, name)))
    held_out = getattr(dataset, split)
    names = {ratio: Path(workdir) / f'keep_{ratio:g}' for ratio in ratios}
    whole = [np.arange(len(row)) for row in rows_of(_own(trained), _blocks(trained))]
    for ratio in ratios:  # a share that leaves nothing is refused before anything runs
        keep([np.zeros(len(k)) for k in whole], ratio, per_layer)
    scores = importance(trained, dataset.train, score, batch_size, precision)
    chosen = {ratio: keep(scores, ratio, per_layer) for ratio in ratios}
    recipe = _recipe(trained, epochs, base_lr, precision)

    def row(ratio: float, kept: Sequence[np.ndarray], result: Trained, **more: Any) -> dict[str, Any]:
        measured = Predictor(result, batch_size, precision).scores(held_out)
        flops = forward_flops(trained.backbone.model, result.method, len(trained.class_names))
        return {
            'keep': ratio, 'prompts': sum(map(len, kept)), 'per_block': [len(k) for k in kept], 'split': split,
            'trained_parameters': sum(a.size for a in jax.tree.leaves(result.file.prompts)),
            'accuracy': measured['accuracy'], 'gflops': flops / 1e9,
            'images_per_second': measured['images_per_second'], **more,
        }  # fmt: skip

    yield row(1.0, whole, trained, accuracy_untuned=None, prompt=None)
    for ratio, kept in chosen.items():
        part = condensed(trained, kept)
        untuned = Predictor(part, batch_size, precision).scores(held_out)['accuracy']
        fit(
            part.method, dataset, trained.backbone, workdir=names[ratio], recipe=recipe,
            preprocess=trained.preprocess, start=part.file,
        )  # fmt: skip
        result = load_trained(names[ratio], trained.backbone)
        yield row(ratio, kept, result, accuracy_untuned=untuned, prompt=str(names[ratio]))


def _own(trained: Trained) -> dict:
    prompts = trained.file.prompts
    return prompts[prompts_of(trained.method).name] if isinstance(trained.method, Stack) else prompts


def _recipe(trained: Trained, epochs: int, base_lr: float | None, precision: str) -> Recipe:
    """The recipe of the run that trained the prompt, with as large a share of warm-up in fewer epochs."""
    known = {f.name for f in dataclasses.fields(Recipe)}
    before = Recipe(**{k: v for k, v in trained.file.meta.get('recipe', {}).items() if k in known})
    changes = {'epochs': epochs, 'warmup_epochs': before.warmup_epochs * epochs // before.epochs}
    changes |= {'precision': precision} | ({} if base_lr is None else {'base_lr': base_lr})
    return dataclasses.replace(before, **changes)
