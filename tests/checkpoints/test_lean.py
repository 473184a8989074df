"""Loading takes hardly more memory than the weights themselves; measured in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vpt_jax.checkpoints import npz
from vpt_jax.models import loading
from vpt_jax.models.vit import VARIANTS, ViT

ROOT = Path(__file__).parents[2]
MEASURE = """
import re, sys
import jax, jax.numpy as jnp
import vpt_jax as vj

def memory(what):
    return 1024 * int(re.search(rf'{what}:\\s+(\\d+) kB', open('/proc/self/status').read())[1])

kept = vj.load_backbone('tiny_vit64')  # what is made once is made, and its memory not made free for the next
open('/proc/self/clear_refs', 'w').write('5')  # the peak starts again from here
before = memory('VmRSS')
backbone = vj.load_backbone(sys.argv[1], param_dtype=sys.argv[2])
jax.block_until_ready(backbone.params)
assert {leaf.dtype for leaf in jax.tree.leaves(backbone.params)} == {jnp.dtype(sys.argv[2])}
print(memory('VmHWM') - before)
"""


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    """Half a ViT-S/16, 44 MB."""
    path = tmp_path_factory.mktemp('lean') / 'vit.npz'
    values = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    model = ViT(**{**VARIANTS['S'], 'depth': 6}, patch_size=16)
    npz.write(path, {name: np.resize(values, leaf.shape) for name, leaf in loading.shapes(model).items()})
    return path


@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='memory is measured as Linux tells it')
@pytest.mark.parametrize(('dtype', 'least', 'most'), [('float32', 0.9, 1.3), ('bfloat16', 0.45, 0.9)])
def test_peak_of_memory(path, dtype, least, most):
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, '-c', MEASURE, path, dtype]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert least < int(done.stdout) / path.stat().st_size < most
