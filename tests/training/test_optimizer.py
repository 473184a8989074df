"""Single optimizer steps against numbers worked out by hand."""

from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from vpt_jax.errors import UsageError
from vpt_jax.methods import Linear, MLPHead
from vpt_jax.training import optimizer as optimizers
from vpt_jax.training.recipe import Recipe

PROMPTS = {
    'linear': {'last_layer': {'kernel': np.full((1, 2), 2.0, 'f4'), 'bias': np.full(2, 3.0, 'f4')}},
    'vapt': {'prompts': np.full((1, 2), 5.0, 'f4'), 'mix': {'bias': np.full(2, 7.0, 'f4')}},
}
GRADS = jax.tree.map(np.ones_like, PROMPTS)


def stepped(name, steps=1, rate=0.1, **settings):
    """The four kinds of leaf (last kernel, last bias, prompts, another bias) after some steps on constant gradients."""
    transformation = optimizers.build(name, rate, **settings)

    @jax.jit
    def step(prompts, state):
        updates, state = transformation.update(GRADS, state, prompts)
        return optax.apply_updates(prompts, updates), state

    prompts, state = PROMPTS, transformation.init(PROMPTS)
    for _ in range(steps):
        prompts, state = step(prompts, state)
    head, vapt = prompts['linear']['last_layer'], prompts['vapt']
    return [float(a.ravel()[0]) for a in (head['kernel'], head['bias'], vapt['prompts'], vapt['mix']['bias'])]


def test_sgd_decays_everything_but_the_last_bias():
    # p - lr (g + wd p); the last bias without wd p.
    got = stepped('sgd', weight_decay=0.1)
    np.testing.assert_allclose(got, [2 - 0.1 * 1.2, 3 - 0.1 * 1, 5 - 0.1 * 1.5, 7 - 0.1 * 1.7], rtol=1e-6)


def test_sgd_momentum_accumulates_without_dampening():
    # Second step: the trace is 0.5 * 1 + 1.
    got = stepped('sgd', steps=2, weight_decay=0.0, momentum=0.5)
    np.testing.assert_allclose(got, [p - 0.1 * (1 + 1.5) for p in (2, 3, 5, 7)], rtol=1e-6)


def test_the_bias_multiplier_is_for_biases_but_not_the_last_one():
    got = stepped('sgd', weight_decay=0.0, bias_multiplier=2.0)
    np.testing.assert_allclose(got, [2 - 0.1, 3 - 0.1, 5 - 0.1, 7 - 0.2], rtol=1e-6)


def test_adamw_vpt_takes_any_decay_for_a_hundredth_and_applies_it_after_the_step():
    # First step: m = 0.1 g, v = 0.001 g^2; u = sqrt(0.001) / 0.1 * m / (sqrt(v) + 1e-6).
    update = 0.1 * np.sqrt(0.001) / (np.sqrt(0.001) + 1e-6)
    shrink = 1 - 0.1 * 0.01
    expected = [(2 - update) * shrink, 3 - update, (5 - update) * shrink, 7 - update]
    for weight_decay in (0.5, 1e-4):
        np.testing.assert_allclose(stepped('adamw_vpt', weight_decay=weight_decay), expected, rtol=1e-5)


def test_adamw_vpt_without_decay_is_sgd():
    assert stepped('adamw_vpt', 3, weight_decay=0.0) == stepped('sgd', 3, weight_decay=0.0)


def _adam_step(value, decay):
    # The first step of Adam is g / (|g| + eps); then rate * decay * value.
    return value - 0.1 * (1 / (1 + 1e-8) + decay * value)


def test_adamw_decays_matrices_and_if_asked_everything():
    expected = [_adam_step(v, d) for v, d in ((2, 0.5), (3, 0), (5, 0.5), (7, 0))]
    np.testing.assert_allclose(stepped('adamw', weight_decay=0.5), expected, rtol=1e-6)
    expected = [_adam_step(v, 0.5) for v in (2, 3, 5, 7)]
    np.testing.assert_allclose(stepped('adamw', weight_decay=0.5, decay_biases=True), expected, rtol=1e-6)


def test_the_head_may_have_a_decay_of_its_own():
    settings = {'weight_decay': 0.5, 'head_weight_decay': 3.0}
    expected = [_adam_step(v, d) for v, d in ((2, 3.0), (3, 0), (5, 0.5), (7, 0))]
    np.testing.assert_allclose(stepped('adamw', **settings), expected, rtol=1e-6)
    expected = [_adam_step(v, d) for v, d in ((2, 3.0), (3, 3.0), (5, 0.5), (7, 0.5))]
    np.testing.assert_allclose(stepped('adamw', decay_biases=True, **settings), expected, rtol=1e-6)
    with pytest.raises(UsageError, match=r'optimizer sgd has no head_weight_decay=0.5, which adamw has'):
        optimizers.build('sgd', 0.1, 0.0, head_weight_decay=0.5)


@pytest.mark.parametrize('head', [Linear(), MLPHead(layers=3)])
def test_heads_are_known_by_their_names(head):
    own = head.init(jax.random.key(0), SimpleNamespace(feature_width=6), {}, 3)
    prompts = {'vpt': {'prompts': np.zeros((2, 6))}, head.name: own}
    kernels = [
        (path[0].key, optimizers.is_head(tuple(key.key for key in path)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(prompts) if leaf.ndim > 1
    ]  # fmt: skip
    assert {name for name, _ in kernels} == {'vpt', head.name}
    assert all(found == (name == head.name) for name, found in kernels)


def test_the_learning_rate_is_data():
    state = optimizers.build('sgd', 0.1, 0.0).init(PROMPTS)
    changed = optimizers.with_learning_rate(state, 0.7)
    assert jax.tree.structure(changed) == jax.tree.structure(state)
    assert float(changed.hyperparams['learning_rate']) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ('settings', 'named'),
    [
        ({'optimizer': 'sdg'}, "'sgd'"),
        ({'weight_decay': -1.0}, 'weight_decay'),
        ({'momentum': 1.0}, 'momentum'),
        ({'bias_multiplier': 0.0}, 'bias_multiplier'),
        ({'optimizer': 'adamw', 'head_weight_decay': -0.1}, 'head_weight_decay'),
        ({'decay_biases': True}, 'decay_biases'),
        ({'base_lr': -1.0}, 'optim.lr'),
        ({'base_lr': float('nan')}, 'optim.lr'),
        ({'epochs': 0}, 'train.epochs'),
        ({'warmup_epochs': 100}, 'warmup_epochs=100'),
        ({'batch_size': 0}, 'train.batch_size'),
        ({'label_smoothing': 1.0}, 'label_smoothing'),
        ({'precision': 'float16'}, "'bfloat16'"),
        ({'seed': -1}, 'seed'),
    ],
)
def test_a_value_out_of_range_is_named(settings, named):
    with pytest.raises(UsageError, match=named):
        Recipe(**settings)
