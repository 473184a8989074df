"""Runs that are stopped, resumed, diverge, or meet another run's folder."""

import os
import re
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.training.test_fit import read_metrics
from vpt_jax import data
from vpt_jax.errors import UsageError
from vpt_jax.training.loop import DivergedError
from vpt_jax.training.stopping import StoppedError


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """The process gets a signal while it waits for a batch."""
    original, taken = data.Prefetch.__next__, iter(range(1000))

    def following(self):
        if next(taken) == step:
            os.kill(os.getpid(), number)
        return original(self)

    monkeypatch.setattr(data.Prefetch, '__next__', following)


@pytest.mark.parametrize(('step', 'number'), [(0, signal.SIGINT), (4, signal.SIGTERM)])
def test_a_stopped_run_resumes_to_the_same_bits(fit, finished, tmp_path, monkeypatch, step, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        stop_at(patch, step, number)
        with pytest.raises(StoppedError, match=f'stopped after step {step + 1} of 9.*resume') as stopped:
            fit(tmp_path)
    assert stopped.value.signal == number
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert not (tmp_path / 'prompt.json').exists()
    resumed = fit(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, resumed.prompts, finished.prompts)
    name = 'prompt.safetensors'
    assert (tmp_path / name).read_bytes() == (finished.folder / name).read_bytes()
    logged = [row['step'] for row in read_metrics(tmp_path)]
    assert logged == sorted(set(logged))
    assert {2, 4, 6, 8, 9} <= set(logged)


def test_another_configuration_is_refused_and_the_fields_named(fit, finished):
    with pytest.raises(UsageError, match=r'another configuration.*recipe\.base_lr: 4\.0 there, 0\.5 now') as error:
        fit(finished.folder, base_lr=0.5, seed=1)
    assert 'recipe.seed: 0 there, 1 now' in str(error.value)


def test_a_loss_that_is_not_finite_stops_the_run(fit, tmp_path):
    # Rate 0 in epoch 0 (steps 1 to 3), so that the checkpoint of step 3 is good.
    with pytest.raises(DivergedError) as error:
        fit(tmp_path, base_lr=1e38, checkpoint_every_steps=3, log_every_steps=1)
    assert re.search(r'the loss became (nan|inf) at step [56] \(learning rate 3\.125e\+36\)', str(error.value))
    assert 'last good checkpoint is step 3' in str(error.value)
    assert '--config.optim.lr' in str(error.value)
    assert not (tmp_path / 'prompt.json').exists()
    with ocp.CheckpointManager(tmp_path / 'checkpoints') as manager:
        assert manager.all_steps() == [3]
        restored = manager.restore(3, args=ocp.args.StandardRestore())
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(restored['prompts']))


def test_prompts_that_are_not_finite_are_never_saved(fit, tmp_path):
    # The loss of step 1 is finite: it was computed before the update that makes the prompts infinite.
    with pytest.raises(DivergedError, match='prompts became infinite or NaN at step 1; no checkpoint had been saved'):
        fit(tmp_path, base_lr=1e40, warmup_epochs=0, checkpoint_every_steps=1, log_every_steps=1)
