"""A network, a dataset and a finished run that the training room's tests share: compiling them takes the time."""

import dataclasses

import numpy as np
import pytest

import vpt_jax as vj

CLASSES = 4
METHOD = vj.methods.VPT(num_tokens=2, dropout=0.1)
# 3 steps an epoch; the first epoch of the warm-up has rate 0.
RECIPE = vj.Recipe(epochs=3, warmup_epochs=1, batch_size=8, base_lr=4.0, log_every_steps=2, checkpoint_every_steps=2)


def arrays(sizes=(22, 8, 13), classes=CLASSES, side=16, seed=0):
    """The arrays of an .npz dataset: every class is its own pattern in noise; sizes are those of the splits."""
    rng = np.random.default_rng(seed)
    count = sum(sizes)
    labels = np.arange(count) % classes
    patterns = rng.integers(0, 256, (classes, side, side, 3))
    images = np.clip(patterns[labels] + rng.normal(0, 40, (count, side, side, 3)), 0, 255).astype(np.uint8)
    return {'images': images, 'labels': labels, 'split': np.repeat([0, 1, 2], sizes)}


@pytest.fixture(scope='session')
def backbone():
    return vj.load_backbone('random:Ti/8@16', depth=1, width=32, mlp_dim=32, heads=2)


@pytest.fixture(scope='session')
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'patterns.npz'
    np.savez(path, **arrays())
    return f'npz:{path}'


@pytest.fixture(scope='session')
def fit(backbone, npz):
    """`fit(workdir, **recipe fields)` of one program; `method` and `dataset` may be others."""

    def run(workdir, method=METHOD, dataset=npz, **changes):
        recipe = dataclasses.replace(RECIPE, **changes)
        return vj.fit(method, dataset, backbone, workdir=workdir, recipe=recipe)

    return run


@pytest.fixture(scope='session')
def finished(fit, tmp_path_factory):
    """An uninterrupted run."""
    return fit(tmp_path_factory.mktemp('run') / 'finished')
