"""Compiled programs are kept on disk: what the second process compiles, and folders that are no use."""

import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from vpt_jax.training.compiled import _trim, keep_compiled

ROOT = Path(__file__).parents[2]
RUN = """
import json, sys
from collections import Counter
import jax
import vpt_jax as vj
events = Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rsplit('/', 1)[-1]]))
vj.keep_compiled()
backbone = vj.load_backbone('random:Ti/8@16', depth=1, width=32, mlp_dim=32, heads=2)
recipe = vj.Recipe(epochs=1, warmup_epochs=0, batch_size=8)
vj.fit(vj.methods.VPT(num_tokens=2, dropout=0.1), sys.argv[1], backbone, workdir=sys.argv[2], recipe=recipe)
print(json.dumps(events))
"""
SETTINGS = ('jax_compilation_cache_dir', 'jax_enable_compilation_cache', 'jax_persistent_cache_min_compile_time_secs')


def fit(npz, workdir, cache):
    """Trains in a process of its own; returns how often JAX says what it did with its cache."""
    unset = [name for name in os.environ if name.startswith('JAX_')]
    env = {
        **{k: v for k, v in os.environ.items() if k not in unset},
        'JAX_PLATFORMS': 'cpu',
        'VPT_JAX_CACHE': str(cache),
    }
    command = [sys.executable, '-W', 'error', '-c', RUN, npz, workdir]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return Counter(json.loads(done.stdout.splitlines()[-1]))


def test_the_second_process_compiles_nothing_and_trains_the_same_bits(npz, tmp_path):
    first, second = (fit(npz, tmp_path / name, tmp_path / 'cache') for name in ('first', 'second'))
    assert first['cache_misses'] == len(list((tmp_path / 'cache' / 'compiled').glob('*-cache'))) > 0
    assert second['cache_misses'] == 0 and second['cache_hits'] == second['compile_requests_use_cache'] > 0
    trained = [(tmp_path / name / 'prompt.safetensors').read_bytes() for name in ('first', 'second')]
    assert trained[0] == trained[1]


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """JAX's cache as in a process that was just started, and $VPT_JAX_CACHE an empty folder, which is returned."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    for name, value in zip(SETTINGS, (None, True, 1.0), strict=True):
        monkeypatch.delenv(name.upper(), raising=False)
        jax.config.update(name, value)
    monkeypatch.setenv('VPT_JAX_CACHE', str(tmp_path / 'cache'))
    compilation_cache.reset_cache()
    yield tmp_path / 'cache'
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compute():
    """Compiles a program that no earlier call has left in memory."""
    return jax.jit(lambda x: x * 3 + 1)(np.arange(4.0)).tolist()


def test_the_folder(fresh):
    keep_compiled()
    assert compute() == [1, 4, 7, 10]
    assert list((fresh / 'compiled').iterdir())


def test_another_folder(fresh, tmp_path):
    jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'other'))
    keep_compiled()
    compute()
    assert list((tmp_path / 'other').iterdir()) and not fresh.exists()


def test_none(fresh):
    jax.config.update('jax_enable_compilation_cache', False)
    keep_compiled()
    compute()
    assert not fresh.exists()


def test_a_folder_that_cannot_be_written_is_one_warning(fresh, capsys):
    fresh.write_text('a file where the folder should be')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        keep_compiled()
        assert compute() == [1, 4, 7, 10]
    said = capsys.readouterr().err
    assert said.startswith(f'warning: cannot write to {fresh / "compiled"} (') and said.count('\n') == 1


def test_a_damaged_program_is_compiled_anew(fresh):
    keep_compiled()
    compute()
    for path in (fresh / 'compiled').iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match='Error reading persistent compilation cache'):
        assert compute() == [1, 4, 7, 10]


def test_what_was_used_last_stays(tmp_path):
    (tmp_path / 'xla').mkdir()
    for i, size in enumerate((10, 10, 0, 10)):
        path = tmp_path / 'xla' / f'{i}'
        path.write_bytes(bytes(size))
        os.utime(path, (100 + i, 50))
    _trim(tmp_path, 20)
    assert sorted(path.name for path in (tmp_path / 'xla').iterdir()) == ['1', '3']
