"""The MLP head's batch statistics are torch's."""

import jax
import numpy as np
import pytest

from vpt_jax.errors import UsageError
from vpt_jax.methods import Context, Linear, MLPHead

WIDTH, CLASSES = 6, 3


class _Model:
    feature_width = WIDTH


@pytest.fixture
def head():
    method = MLPHead(layers=2, dropout=0.0)
    rng = np.random.default_rng(0)
    prompts = method.init(jax.random.key(0), _Model, {}, CLASSES)
    prompts = jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), prompts)
    return method, prompts, rng.normal(size=(5, WIDTH)).astype(np.float32)


def _hidden(prompts, x):
    return np.maximum(x @ np.asarray(prompts['hidden_0']['kernel']) + prompts['hidden_0']['bias'], 0)


def test_running_statistics_move_like_torch(head):
    method, prompts, x = head
    ctx = Context(train=True, state=method.init_state(_Model))
    method.logits(prompts, x, ctx)
    h = _hidden(prompts, x)
    np.testing.assert_allclose(ctx.updates['norm_0']['mean'], 0.1 * h.mean(0), atol=1e-6)
    np.testing.assert_allclose(ctx.updates['norm_0']['var'], 0.9 + 0.1 * h.var(0, ddof=1), atol=1e-6)


def test_training_normalises_by_the_biased_variance_of_the_batch(head):
    method, prompts, x = head
    out = method.logits(prompts, x, Context(train=True, state=method.init_state(_Model)))
    h = _hidden(prompts, x)
    h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5) * prompts['norm_0']['scale'] + prompts['norm_0']['bias']
    np.testing.assert_allclose(out, h @ prompts['last_layer']['kernel'] + prompts['last_layer']['bias'], atol=2e-5)


def test_evaluation_uses_the_running_statistics_and_leaves_them(head):
    method, prompts, x = head
    ctx = Context(state={'norm_0': {'mean': np.full(WIDTH, 0.3), 'var': np.full(WIDTH, 2.0)}})
    out = method.logits(prompts, x, ctx)
    h = (_hidden(prompts, x) - 0.3) / np.sqrt(2.0 + 1e-5) * prompts['norm_0']['scale'] + prompts['norm_0']['bias']
    np.testing.assert_allclose(out, h @ prompts['last_layer']['kernel'] + prompts['last_layer']['bias'], atol=2e-5)
    assert ctx.updates == {}


def test_padding_examples_do_not_count(head):
    method, prompts, x = head
    state = method.init_state(_Model)
    plain = Context(train=True, state=state)
    expected = method.logits(prompts, x, plain)
    padded = Context(train=True, state=state, weight=np.array([1, 1, 1, 1, 1, 0, 0], np.float32))
    ours = method.logits(prompts, np.concatenate([x, 100 * x[:2]]), padded)
    np.testing.assert_allclose(ours[:5], expected, atol=1e-5)
    for name in ('mean', 'var'):
        np.testing.assert_allclose(padded.updates['norm_0'][name], plain.updates['norm_0'][name], atol=1e-5)


class _Wide:
    feature_width = 4000


def test_initialisation():
    prompts = Linear().init(jax.random.key(0), _Wide, {}, 8)['last_layer']
    assert abs(float(prompts['kernel'].std()) - (2 / 8) ** 0.5) < 0.01
    np.testing.assert_allclose(prompts['bias'], -4.59512, atol=1e-5)
    with pytest.raises(UsageError, match='at least 2 classes, got 1'):
        Linear().init(jax.random.key(0), _Model, {}, 1)
    with pytest.raises(UsageError, match='layers=1'):
        MLPHead(layers=1)


def test_linear_heads_start_as_the_originals_do():
    normal = Linear(start='normal', deviation=0.01).init(jax.random.key(0), _Wide, {}, 8)['last_layer']
    assert abs(float(normal['kernel'].std()) - 0.01) < 3e-4
    assert not normal['bias'].any()
    wide = Linear(start='normal', deviation=2.0).init(jax.random.key(0), _Wide, {}, 8)['last_layer']['kernel']
    assert 1.99 < float(abs(wide).max()) <= 2  # cut at 2, not at two deviations
    uniform = Linear(start='uniform').init(jax.random.key(0), _Wide, {}, 8)['last_layer']
    bound = 4000**-0.5
    assert 0.999 * bound < float(abs(uniform['kernel']).max()) <= bound
    assert abs(float(uniform['kernel'].std()) - bound / 3**0.5) < 2e-4
    assert uniform['bias'].all() and float(abs(uniform['bias']).max()) <= bound
