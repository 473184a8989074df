"""The same numbers on one device and split over eight: batches, trials, and the frozen backbone."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import vpt_jax as vj
from tests.commands import QUICK_FLAGS, environment
from tests.training import test_together as together_tests
from tests.training.conftest import METHOD, arrays
from vpt_jax import data
from vpt_jax.errors import UsageError
from vpt_jax.training import distributed, loop, together
from vpt_jax.training import mesh as meshes
from vpt_jax.training import step as steps
from vpt_jax.training.loop import default_preprocess

DEVICES = 8
# Two blocks whose kernels are large enough to be split.
WIDE = {'depth': 2, 'width': 256, 'mlp_dim': 512, 'heads': 2}


def losses(shard=False, scan=False):
    """Losses of three train steps on a fixed batch, whose last two examples are padding, over all devices."""
    backbone = vj.load_backbone('random:Ti/8@16', on_host=shard, scan=scan, **WIDE)
    program = steps.Program(
        backbone.model, vj.methods.with_head(METHOD), default_preprocess(backbone), 4, shard_backbone=shard
    )
    mesh = meshes.data_mesh()
    state = steps.init_state(program, backbone.params, seed=0, learning_rate=0.1, weight_decay=1e-3, warmup_epochs=0,
                             epochs=10, steps_per_epoch=1)  # fmt: skip
    state = meshes.replicate(state, mesh)
    params = meshes.cast_backbone(backbone.params, 'float32', mesh, shard)
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    weight = np.array([1, 1, 1, 1, 1, 1, 0, 0], np.float32)
    batch = meshes.shard_batch({'image': images, 'label': np.arange(8, dtype=np.int32) % 4, 'weight': weight}, mesh)
    step, found = steps.train_step(program, mesh), []
    for _ in range(3):
        state, metrics = step(params, state, batch)
        found.append(float(metrics['loss']))
    held = [shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(backbone.params))
    return {'losses': found, 'compiled': step._cache_size(), 'held': sum(held) / jax.device_count() / whole}


def trials(folder):
    """Prompts of four trials as one program, as nested lists; on several devices their backbone is split too."""
    task = together_tests.make_task(folder)
    if jax.device_count() > 1:
        task.config.train.shard_backbone, meshes.SMALLEST_SHARDED = True, 256
    ours = together._Together(task, together_tests.trials('search'))
    states, finite = ours._train(loop.RunFolder(folder / 'x', {}), ours._states())
    assert finite.all()
    largest = max(jax.tree.leaves(ours.params), key=lambda leaf: leaf.size)
    assert largest.addressable_shards[0].data.size * jax.device_count() == largest.size
    assert ours.mesh.shape == {'trial': 4, 'data': jax.device_count() // 4} or jax.device_count() == 1
    return [np.asarray(a).tolist() for a in jax.tree.leaves(states.prompts)]


def fitted(workdir, npz):
    """Prompts of a run whose recipe shards the backbone, as nested lists; and its scores."""
    backbone = vj.load_backbone('random:Ti/8@16', on_host=True, **WIDE)
    recipe = vj.Recipe(epochs=2, warmup_epochs=0, batch_size=8, base_lr=4.0, shard_backbone=jax.device_count() > 1)
    result = vj.fit(METHOD, npz, backbone, workdir=workdir, recipe=recipe)
    return [a.tolist() for a in jax.tree.leaves(result.prompts)], result.metrics['test_loss']


def refusal(workdir, npz):
    """What is said of a batch that the devices do not divide, and whether it left anything behind."""
    try:
        vj.fit(METHOD, npz, 'random:Ti/8@16', workdir=workdir, recipe=vj.Recipe(batch_size=20))
    except UsageError as error:
        return str(error), workdir.exists()


@pytest.fixture(scope='module')
def on_eight(tmp_path_factory, npz):
    """What the functions above give on eight devices."""
    folder = tmp_path_factory.mktemp('eight')
    program = f"""
import json, pathlib
from tests.training.test_mesh import losses, refusal, trials, fitted
folder = pathlib.Path({str(folder)!r})
print(json.dumps({{
    'whole': losses(), 'split': losses(shard=True), 'scanned': losses(shard=True, scan=True),
    'fitted': fitted(folder / 'run', {npz!r}), 'refusal': refusal(folder / 'no', {npz!r}),
    'trials': trials(folder / 'trials'),
}}))
"""
    devices = f'--xla_force_host_platform_device_count={DEVICES}'
    env = environment(folder / 'cache') | {'XLA_FLAGS': f'{devices} {QUICK_FLAGS}'}
    done = subprocess.run([sys.executable, '-c', program], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_eight_devices_compute_what_one_does(on_eight):
    one = losses()
    assert len(set(one['losses'])) == 3
    for name in ('whole', 'split', 'scanned'):
        assert on_eight[name]['compiled'] == one['compiled'] == 1
        np.testing.assert_allclose(on_eight[name]['losses'], one['losses'], rtol=1e-5)


def test_a_device_holds_its_share_of_a_sharded_backbone(on_eight):
    assert on_eight['whole']['held'] == 1
    # Biases and norms are on every device.
    for name in ('split', 'scanned'):
        assert 1 / DEVICES <= on_eight[name]['held'] < 1.2 / DEVICES


def test_trials_over_devices_end_as_on_one(on_eight, tmp_path):
    for a, b in zip(on_eight['trials'], trials(tmp_path), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_run_with_a_sharded_backbone_ends_as_one_without(on_eight, npz, tmp_path):
    prompts, loss = fitted(tmp_path, npz)
    for a, b in zip(on_eight['fitted'][0], prompts, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert on_eight['fitted'][1] == pytest.approx(loss, rel=1e-5)


def test_which_axis_is_split():
    mesh = jax.sharding.AbstractMesh((4, 2), ('trial', 'data'))
    every = ('trial', 'data')
    assert tuple(meshes.shard_spec((1664, 8192), mesh)) == (None, every)
    assert tuple(meshes.shard_spec((48, 16, 88, 1408), mesh)) == (None, None, None, every)
    assert tuple(meshes.shard_spec((1408, 6145), mesh)) == (every,)
    assert tuple(meshes.shard_spec((1411, 6145), mesh)) == ()  # no axis that 8 divides
    assert tuple(meshes.shard_spec((8192,), mesh)) == ()  # small
    assert tuple(meshes.shard_spec((1664, 8192), jax.sharding.AbstractMesh((1,), ('data',)))) == ()


def test_parts_of_a_batch_are_the_rows_of_the_whole():
    made = arrays()
    split = data.Split(made['images'], made['labels'].astype(np.int32), tuple(map(str, made['labels'])))
    preprocess = data.Preprocess(16, 'vtab', 'flip', (0.5,) * 3, (0.5,) * 3)
    batches = data.Batches(split, preprocess, 8, seed=3)
    last = batches.steps_per_epoch - 1  # padded
    for t in (0, last, last + 1):
        whole = batches.batch(t)
        for rows in (np.arange(2), np.array([1, 6, 7])):
            jax.tree.map(lambda a, b, r=rows: np.testing.assert_array_equal(a[r], b), whole, batches.batch(t, rows))


def test_a_batch_that_cannot_be_split_is_refused(on_eight):
    message, wrote = on_eight['refusal']
    assert message == ('--config.train.batch_size of 20 examples cannot be split over 8 devices: use a multiple of 8, '
                       'such as 16')  # fmt: skip
    assert not wrote
    with pytest.raises(UsageError, match='such as 8'):
        meshes.check_batch(2, jax.sharding.AbstractMesh((8,), ('data',)))


@pytest.mark.parametrize(('environment', 'gpus'), [
    ({}, None),
    ({'SLURM_STEP_TASKS_PER_NODE': '1(x2)', 'SLURM_LOCALID': '0'}, None),
    ({'SLURM_STEP_TASKS_PER_NODE': '1(x2)', 'SLURM_LOCALID': '0', 'CUDA_VISIBLE_DEVICES': '0,1,2,3'}, [0, 1, 2, 3]),
    ({'SLURM_STEP_TASKS_PER_NODE': '4', 'SLURM_LOCALID': '3', 'CUDA_VISIBLE_DEVICES': '0,1,2,3'}, [3]),
    ({'SLURM_STEP_TASKS_PER_NODE': '4', 'SLURM_LOCALID': '3', 'CUDA_VISIBLE_DEVICES': '3'}, [0]),
    ({'SLURM_STEP_TASKS_PER_NODE': '2(x3),1', 'SLURM_NODEID': '3', 'SLURM_LOCALID': '0', 'CUDA_VISIBLE_DEVICES': '0,1'},
     [0, 1]),
    ({'SLURM_STEP_TASKS_PER_NODE': '2', 'SLURM_LOCALID': '1', 'CUDA_VISIBLE_DEVICES': '0,1,2,3'}, [2, 3]),
])  # fmt: skip
def test_the_gpus_of_a_task(environment, gpus):
    assert distributed.local_gpus(environment) == gpus


def test_processes_started_by_hand_need_all_three():
    with pytest.raises(UsageError, match='given together or not at all'):
        distributed.start(num_processes=2)
    with pytest.raises(UsageError, match='HOST:PORT, and processes are numbered from 0'):
        distributed.start('auto', 'localhost:1234', 2, 2)
    with pytest.raises(UsageError, match="unknown value of --distributed 'on'"):
        distributed.start('on')


def test_sharding_is_no_part_of_what_a_run_is(backbone, npz):
    def described(**changes):
        recipe = dataclasses.replace(vj.Recipe(), **changes)
        return loop.describe_run(METHOD, npz, backbone, default_preprocess(backbone), recipe)

    assert described(shard_backbone=True) == described()
