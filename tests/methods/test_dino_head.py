"""DINO's head as a frozen classifier: its file, its rows, its refusals."""

import math

import jax
import numpy as np
import pytest

from vpt_jax.errors import UsageError
from vpt_jax.methods import Context, DINOHead


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    sizes = {'mlp.0': (8, 16), 'mlp.2': (8, 8), 'mlp.4': (5, 8)}
    found = {f'{name}.weight': rng.normal(size=size) for name, size in sizes.items()}
    found |= {f'{name}.bias': rng.normal(size=size[0]) for name, size in sizes.items()}
    return {**found, 'last_layer.weight': rng.normal(size=(30, 5))}


@pytest.fixture
def head(tmp_path, arrays):
    np.savez(tmp_path / 'head.npz', **arrays)
    return DINOHead(projector=str(tmp_path / 'head.npz'))


def test_classes_are_rows_drawn_at_random(tiny, head, arrays):
    head.check(tiny.model)
    assert head.init(jax.random.key(0), tiny.model, {}, 4) == {}
    state = head.init_state(tiny.model, 4, jax.random.key(3))
    other = head.init_state(tiny.model, 4, jax.random.key(4))
    picked = np.asarray(state['mapping'])[:, 0]
    assert len(set(picked)) == 4 and list(picked) != list(np.asarray(other['mapping'])[:, 0])
    features = np.random.default_rng(1).normal(size=(3, 16))
    x = features @ arrays['mlp.0.weight'].T + arrays['mlp.0.bias']
    for name in ('mlp.2', 'mlp.4'):
        x = x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2
        x = x @ arrays[f'{name}.weight'].T + arrays[f'{name}.bias']
    expected = x / np.linalg.norm(x, axis=-1, keepdims=True) @ arrays['last_layer.weight'][picked].T
    np.testing.assert_allclose(head.logits({}, features, Context(state=state)), expected, atol=1e-4)


def test_other_files_are_refused(tiny, tmp_path, arrays):
    with pytest.raises(UsageError, match=r'give projector=FILE\.npz'):
        DINOHead().check(tiny.model)
    for changed, message in (
        ({'mlp.2.weight': np.zeros((8, 9))}, r'mlp\.2\.weight has shape \[8, 9\], but 8 numbers come before it'),
        ({'last_layer.weight': np.zeros((30, 4))}, r'last_layer\.weight must be \[S, 5\], not \[30, 4\]'),
    ):
        np.savez(tmp_path / 'other.npz', **{**arrays, **changed})
        with pytest.raises(UsageError, match=message):
            DINOHead(projector=str(tmp_path / 'other.npz')).init_state(tiny.model, 4)
