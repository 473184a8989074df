import dataclasses
import os
import signal

import jax
import numpy as np
import pytest

from vpt_jax import data
from vpt_jax.models.zoo import load_backbone
from vpt_jax.training import config as configs
from vpt_jax.training import loop, together
from vpt_jax.training.stopping import StoppedError
from vpt_jax.training.trials import TaskRun, Trial, changed, run_trials


@pytest.fixture(scope='module')
def task(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp('task'))


def make_task(folder):
    """A tiny task of three classes on an untrained network, two steps an epoch."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 32, 32, 3), np.uint8)
    labels = np.arange(20) % 3
    images[..., 0] = np.minimum(images[..., 0], 80 * labels[:, None, None])

    def split(a, b):
        return data.Split(images[a:b], labels[a:b], tuple(map(str, range(a, b))))

    backbone = load_backbone('random:Ti/16@32', depth=2, width=32, heads=2, mlp_dim=48)
    config = configs.default(None)
    config.method = configs.method('vpt', num_tokens=2, deep=True, dropout=0.1)
    config.train.update(epochs=3, warmup_epochs=1, batch_size=6, linear_probe=False)
    preprocess = loop.default_preprocess(backbone)
    dataset = data.Dataset('tiny', ('a', 'b', 'c'), split(0, 12), split(12, 16), split(16, 20))
    return TaskRun(config, backbone, dataset, preprocess, folder, True)


def trials(phase, seeds=(0,)):
    rates = [(('optim.lr', rate), ('optim.weight_decay', decay)) for rate in (5.0, 1.0) for decay in (0.01, 0.001)]
    return [Trial(phase, changes, seed) for changes in rates for seed in seeds]


@pytest.mark.parametrize(('phase', 'seeds'), [('search', (0,)), ('final', (3, 4))])
def test_each_trial_ends_as_it_would_by_itself(task, phase, seeds, tmp_path):
    run = dataclasses.replace(task, folder=tmp_path)
    ours = together._Together(run, trials(phase, seeds))
    states, finite = ours._train(loop.RunFolder(tmp_path / 'x', {}), ours._states())
    assert finite.all()
    for i in (0, -1):
        config = run.config_of(ours.trials[i])
        alone = loop.fit(
            configs.whole_method(config), run.dataset_of(ours.trials[i]), run.backbone, workdir=tmp_path / str(i),
            recipe=configs.recipe(config), preprocess=run.preprocess,
        )  # fmt: skip
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=2e-5), states.prompts, alone.prompts)


def test_outcomes_are_those_of_single_runs(task, tmp_path):
    wanted = trials('search')[:2]
    run = dataclasses.replace(task, folder=tmp_path)
    found = {o.trial: o for o in together.trials_together(run, wanted)}
    alone = {o.trial: o for o in run_trials(dataclasses.replace(task, folder=tmp_path / 'alone'), wanted)}
    assert found == alone


def test_a_trial_that_diverges_leaves_the_others_alone(task, tmp_path):
    config = changed(task.config, {'optim.name': 'sgd'})
    run = dataclasses.replace(task, folder=tmp_path, config=config)
    wild = [*trials('search'), Trial('search', (('optim.lr', 1e30), ('optim.weight_decay', 0.01)), 0)]
    found = list(together.trials_together(run, wild))
    assert [o.trained_parameters is None for o in found] == [False] * 4 + [True]
    assert found[-1].accuracy == 0
    assert found[:4] == list(together.trials_together(dataclasses.replace(run, folder=tmp_path / 'b'), wild[:4]))


def test_a_stopped_chunk_goes_on_where_it_was(task, tmp_path, monkeypatch):
    run = dataclasses.replace(task, folder=tmp_path)
    step = together.steps.trials_step

    def stopping(*args):
        inner, calls = step(*args), []

        def call(*inputs):
            calls.append(1)
            if len(calls) == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return inner(*inputs)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(together.steps, 'trials_step', stopping)
        with pytest.raises(StoppedError, match='stopped after step 4 of 6'):
            list(together.trials_together(run, trials('search')))
    rest = list(together.trials_together(run, trials('search')))
    whole = list(together.trials_together(dataclasses.replace(run, folder=tmp_path / 'whole'), trials('search')))
    assert rest == whole
