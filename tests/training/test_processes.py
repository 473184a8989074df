"""Two real processes as one run: they end as one process does, stop together, and can be resumed by another number."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.commands import QUICK_FLAGS, ROOT, environment, write_task
from vpt_jax import data

# 3 steps an epoch, the last one with padding; dropout is on.
SETTINGS = (
    '--config.train.epochs=4', '--config.train.warmup_epochs=1', '--config.train.batch_size=8',
    '--config.train.log_every_steps=2', '--config.train.eval_every_epochs=2', '--config.train.linear_probe=False',
    '--config.checkpoint.every_steps=2', '--config.optim.lr=0.5',
)  # fmt: skip
PROMPTS = ('--config.method.num_tokens=2', '--config.method.dropout=0.3')
#: Methods that look at the training images: before the first step, and before every epoch.
LOOKING = {
    'spt': ('vpt_deep', '--config.method.name=spt', *PROMPTS),
    'ilm': ('ilm', '--config.method.inner=12', '--config.optim.name=sgd', '--config.optim.schedule=cosine'),
}


def child(argv, stop_at):
    """`python -m vpt_jax.train` that gets SIGTERM while it waits for batch `stop_at` (-1: never); prints which rows
    of batches it made."""
    original, taken, made, make = data.Prefetch.__next__, iter(range(1000)), set(), data.Batches.batch

    def following(self):
        if next(taken) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    def batch(self, t, rows=None):
        made.update(range(self.batch_size) if rows is None else rows.tolist())
        return make(self, t, rows)

    data.Prefetch.__next__, data.Batches.batch = following, batch
    sys.argv = ['vpt_jax.train', *argv]
    try:
        runpy.run_module('vpt_jax.train', run_name='__main__', alter_sys=True)
    finally:
        print(f'\nrows {sorted(made)}', file=sys.stderr, flush=True)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('processes')
    backbone, dataset = write_task(folder, train=22)
    weights, rng = dict(np.load(backbone)), np.random.default_rng(0)
    np.savez(backbone, **weights, **{'head/kernel': rng.normal(size=(32, 9)).astype('f4'),
                                     'head/bias': np.zeros(9, 'f4')})  # fmt: skip
    return folder, f'backbone={backbone},dataset=npz:{dataset}'


@pytest.fixture(scope='module')
def start(place):
    """`start(workdir, processes, devices of each)`: (exit code, stdout, stderr) of every process."""
    folder, arguments = place

    def run(workdir, processes=1, devices=1, stop_at=(-1, -1), more=(), method=('vapt', *PROMPTS)):
        config, *settings = method
        flags = [f'--config=configs/{config}.py:{arguments}', *SETTINGS, *settings, f'--workdir={folder / workdir}',
                 *more]  # fmt: skip
        flags_of_xla = f'--xla_force_host_platform_device_count={devices} {QUICK_FLAGS}'
        env = environment(folder / 'cache') | {'XLA_FLAGS': flags_of_xla}
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        running = []
        for i in range(processes):
            joined = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}', f'--process_id={i}']
            argv = [*flags, *(joined if processes > 1 else [])]
            code = f'from tests.training.test_processes import child; child({argv!r}, {stop_at[i]})'
            running.append(subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, env=env, text=True,
                                            stdout=subprocess.PIPE, stderr=subprocess.PIPE))  # fmt: skip
        try:
            outputs = [process.communicate(timeout=300) for process in running]
        finally:
            for process in running:
                process.kill()
        return [(process.returncode, *output) for process, output in zip(running, outputs, strict=True)]

    return run


@pytest.fixture(scope='module')
def alone(place, start):
    """The folder of an uninterrupted run of one process on one device."""
    ((code, _, stderr),) = start('alone')
    assert code == 0, stderr
    return place[0] / 'alone'


def check_same_end(folder, alone):
    ours, theirs = (load_file(path / 'prompt.safetensors') for path in (folder, alone))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=1e-5, atol=2e-5)
    ours, theirs = (json.loads((path / 'result.json').read_text()) for path in (folder, alone))
    for name in ('test_accuracy', 'val_accuracy', 'test_examples', 'steps', 'trained_parameters'):
        assert ours[name] == theirs[name]
    assert ours['test_loss'] == pytest.approx(theirs['test_loss'], rel=1e-5)
    ours, theirs = ([json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]
                    for path in (folder, alone))  # fmt: skip
    # A run that was stopped has the line of that step besides.
    ours = [row for row in ours if {**row, 'loss': 0}.keys() in ({**r, 'loss': 0}.keys() for r in theirs)]
    for row in theirs:
        (same,) = [r for r in ours if r['step'] == row['step'] and r.keys() == row.keys()]
        assert same == pytest.approx(row, rel=1e-4)


def test_two_processes_end_as_one_does(start, alone, place):
    workdir = place[0] / 'two'
    first, second = start('two', processes=2, devices=2, more=['--config.train.shard_backbone'])
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    check_same_end(workdir, alone)
    assert json.loads((workdir / 'result.json').read_text())['processes'] == 2
    # Each made its own half of every batch; one reported.
    assert 'rows [0, 1, 2, 3]' in first[2] and 'rows [4, 5, 6, 7]' in second[2]
    assert 'test accuracy' in first[1] and 'accuracy' not in second[1]
    kept = sorted(p.name for p in (workdir / 'checkpoints').iterdir())
    assert kept == sorted(p.name for p in (alone / 'checkpoints').iterdir()) == ['10', '12']


@pytest.mark.parametrize('name', LOOKING)
def test_methods_that_look_at_the_images_see_the_same_ones(start, place, name):
    ((code, _, stderr),) = start(f'{name}_alone', method=LOOKING[name])
    assert code == 0, stderr
    done = start(name, processes=2, method=LOOKING[name])
    assert [code for code, _, _ in done] == [0, 0], done
    check_same_end(place[0] / name, place[0] / f'{name}_alone')


def test_a_signal_to_one_stops_all_and_another_number_of_processes_resumes(start, alone, place):
    first, second = start('stopped', processes=2, stop_at=(-1, 4))
    assert (first[0], second[0]) == (143, 143), first[2] + second[2]
    assert 'SIGTERM: stopped after step 6 of 12' in first[2] and 'stopped after' not in second[2]
    assert not (place[0] / 'stopped' / 'result.json').exists()
    ((code, _, stderr),) = start('stopped', devices=4)
    assert code == 0, stderr
    check_same_end(place[0] / 'stopped', alone)


def test_what_only_process_0_sees_is_refused_by_all(start, alone):
    done = start(alone.name, processes=2, more=['--config.seed=1'])
    assert [code for code, _, _ in done] == [2, 2]
    assert 'holds a run with another configuration (recipe.seed: 0 there, 1 now)' in done[0][2]
    assert 'another configuration' not in done[1][2]
