"""Pretrains a small network from scratch: `python -m vpt_jax.pretrain --config=configs/pretrain.py:dataset=npz:FILE`.

With configs/pretrain_mim.py it is masked pretraining, in two runs (`training.masked`). With configs/pretrain.py it is
supervised, which is how the embedded backbone was made. It is full fine-tuning of a randomly initialised network by the
same loop as every other run, resumable like every other run; the result is written as a Google-format `.npz`.

The features of a network trained by itself share a large mean and differ in scale, which slows every head that is put
on them. On export both are folded into the final LayerNorm, so that over the training images each feature has mean 0
and deviation 1. Linear heads can express the same functions before and after.
"""

from pathlib import Path

import jax
import numpy as np

from vpt_jax import cli, data
from vpt_jax.checkpoints.schemes import big_vision
from vpt_jax.methods import Linear
from vpt_jax.methods.base import overlay
from vpt_jax.models import zoo
from vpt_jax.training import config as configs
from vpt_jax.training import masked
from vpt_jax.training import mesh as meshes
from vpt_jax.training import step as steps
from vpt_jax.training.probe import features


def main(config, workdir: str) -> None:
    """Trains, and writes the network into the run's folder."""
    (_masked if 'stage' in config else _supervised)(config, workdir)


def _masked(config, workdir: str) -> None:
    result = masked.run(config, workdir)
    found = ', '.join(f'{k.removeprefix("test_")} {v:.4g}' for k, v in result.items() if k.startswith('test_'))
    print(f'\non held-out images: {found or "there are none"}\n{config.stage} written to {result["written"]}')


def _supervised(config, workdir: str) -> None:
    """`backbone.npz` is stored in bfloat16."""
    backbone = zoo.load_backbone(config.backbone, pixels=zoo.HALF, **config.model)
    result, dataset, preprocess = configs.run(config, workdir, backbone)
    params = standardised(backbone.model, result.prompts['full'], dataset.train, preprocess)
    path = Path(result.folder) / 'backbone.npz'
    big_vision.write(path, jax.device_get(params), dtype='bfloat16')
    print(f'\ntop-1 on the test split {100 * result.metrics["test_accuracy"]:.2f}%')
    print(f'backbone written to {path} ({path.stat().st_size / 1e6:.1f} MB)')


def standardised(model, params: dict, split: data.Split, preprocess: data.Preprocess, images: int = 5000) -> dict:
    """The network with its final LayerNorm rescaled so that its features are standardised.

    Args:
      model: a ViT with a final norm and pool 'tok'.
      params: its weights.
      split: images that decide the statistics; the first `images` of them in a fixed random order.
      preprocess: how they become pixels.
      images: how many.

    Returns:
      `params` with other `encoder_norm` weights.
    """
    chosen = np.random.default_rng(0).permutation(len(split))[:images]
    sample = data.Split(split.images[chosen], split.labels[chosen], tuple(split.names[i] for i in chosen))
    mesh = meshes.data_mesh()
    program = steps.Program(model, Linear(), preprocess, 2)
    found = features(program, mesh, meshes.cast_backbone(params, 'float32', mesh), sample, 500)
    mean, std = found.mean(axis=0), found.std(axis=0) + 1e-6
    norm = params['Transformer']['encoder_norm']
    return overlay(params, {'Transformer': {'encoder_norm': {
        'scale': norm['scale'] / std, 'bias': (norm['bias'] - mean) / std,
    }}})  # fmt: skip


if __name__ == '__main__':
    cli.run_with_config(main, __doc__)
