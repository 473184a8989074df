"""The same step on one device and split over four."""

import json
import os
import subprocess
import sys

import jax
import numpy as np

import vpt_jax as vj
from tests.training.conftest import METHOD
from vpt_jax.training import mesh as meshes
from vpt_jax.training import step as steps
from vpt_jax.training.loop import default_preprocess

DEVICES = 4


def losses():
    """Losses of three train steps on a fixed batch, whose last two examples are padding, over all devices."""
    backbone = vj.load_backbone('random:Ti/8@16', depth=1, width=32, mlp_dim=32, heads=2)
    # The program that other tests train too.
    program = steps.Program(backbone.model, vj.methods.with_head(METHOD), default_preprocess(backbone), 4)
    mesh = meshes.data_mesh()
    state = steps.init_state(program, backbone.params, seed=0, learning_rate=0.1, weight_decay=1e-3, warmup_epochs=0,
                             epochs=10, steps_per_epoch=1)  # fmt: skip
    state, params = meshes.replicate(state, mesh), meshes.cast_backbone(backbone.params, 'float32', mesh)
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    weight = np.array([1, 1, 1, 1, 1, 1, 0, 0], np.float32)
    batch = meshes.shard_batch({'image': images, 'label': np.arange(8, dtype=np.int32) % 4, 'weight': weight}, mesh)
    step, found = steps.train_step(program, mesh), []
    for _ in range(3):
        state, metrics = step(params, state, batch)
        found.append(float(metrics['loss']))
    return {'losses': found, 'compiled': step._cache_size(), 'devices': jax.device_count()}


def test_four_devices_compute_what_one_does():
    env = {**os.environ, 'XLA_FLAGS': f'--xla_force_host_platform_device_count={DEVICES}'}
    program = 'import json; from tests.training.test_mesh import losses; print(json.dumps(losses()))'
    done = subprocess.run([sys.executable, '-c', program], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    four, one = json.loads(done.stdout.splitlines()[-1]), losses()
    assert (four['devices'], one['devices']) == (DEVICES, 1)
    assert four['compiled'] == one['compiled'] == 1
    np.testing.assert_allclose(four['losses'], one['losses'], rtol=1e-5)
    assert len(set(one['losses'])) == 3
