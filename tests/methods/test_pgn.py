"""PGN: its CNN against plain numpy, its norms in training, where its prompts go, and what it trains."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.methods.conftest import CLASSES, OPTIONS, Tiny
from vpt_jax.errors import UsageError
from vpt_jax.methods import IIP, PGN, VPT, Context, Linear, Stack, forward
from vpt_jax.methods.pgn import resized

SMALL = {'num_tokens': 2, 'library': 3, 'channels': 4, 'groups': 2}


def bilinear(images, side):
    """Half-pixel centers, edges repeated, no anti-aliasing: [B, H, W, C] to [B, side, side, C]."""

    def axis(old):
        at = np.clip((np.arange(side) + 0.5) * old / side - 0.5, 0, old - 1)
        low = np.minimum(np.floor(at).astype(int), old - 2)
        return low, at - low

    (top, down), (left, across) = axis(images.shape[1]), axis(images.shape[2])
    down, across = down[:, None, None], across[:, None]
    rows = images[:, top] * (1 - down) + images[:, top + 1] * down
    return rows[:, :, left] * (1 - across) + rows[:, :, left + 1] * across


def convolved(x, kernel, stride):
    pad = (len(kernel) - 1) // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum('bhwcij,ijcd->bhwd', windows, kernel)


def pooled(x):
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    return np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max(axis=(-2, -1))


def scores(method, prompts, statistics, images):
    """The CNN in evaluation mode, as the specification has it."""
    cnn = prompts['cnn']

    def norm(x, at, name):
        held = {**(cnn[at] if at else cnn)[name], **(statistics[at] if at else statistics)[name]}
        return (x - held['mean']) / np.sqrt(held['var'] + 1e-5) * held['scale'] + held['bias']

    x = bilinear(images, method.resolution) if method.resolution else images
    x = np.maximum(norm(convolved(x, cnn['conv1']['kernel'], 2), '', 'bn1'), 0)
    x = pooled(x) if method.max_pool else x
    for i in range(method.groups * method.blocks):
        name, halves = f'block_{i}', i > 0 and i % method.blocks == 0
        block = cnn[name]
        y = np.maximum(norm(convolved(x, block['conv1']['kernel'], 1 + halves), name, 'bn1'), 0)
        y = norm(convolved(y, block['conv2']['kernel'], 1), name, 'bn2')
        if halves:
            x = convolved(x, block['shortcut']['kernel'], 2) + block['bias']
        x = np.maximum(x + y, 0)
    return x.mean(axis=(1, 2)) @ prompts['mix']['kernel'] + prompts['mix']['bias']


def running(tiny, method, seed=5):
    """A state whose statistics are not special, and these."""
    added = Tiny.drawn(jax.eval_shape(lambda: method.init_state(tiny.model))['added'], 0.3, seed)
    added = jax.tree.map(lambda a: jnp.exp(a) if a.ndim else a, added)  # positive: variances are
    return {'kept': jnp.zeros(()), 'added': added}, jax.tree.map(np.asarray, added)


def generated(tiny, method, prompts, state, images, train=False, weight=None):
    """(Scores, prompts, the next state) of images."""
    state = jax.tree.map(jnp.asarray, state)

    def run(prompts, images):
        ctx = Context(state=state, train=train, weight=weight)
        ctx.model = tiny.model
        with jax.default_matmul_precision('highest'):
            return method.scores(prompts, images, ctx), method.generate(prompts, images, ctx), ctx.updates

    return jax.tree.map(np.asarray, jax.jit(run, **OPTIONS)(prompts, images))


@pytest.mark.parametrize(
    'settings',
    [{'blocks': 2, 'max_pool': False, 'resolution': 10, 'mixture': 'sigmoid'}, {'groups': 3, 'resolution': 23}],
    ids=str,
)
def test_evaluation_equals_plain_numpy(tiny, settings):
    method = PGN(**{**SMALL, **settings})
    prompts = tiny.prompts(method)
    state, statistics = running(tiny, method)
    found, made, _ = generated(tiny, method, prompts, state, tiny.images)
    expected = scores(method, jax.tree.map(np.asarray, prompts), statistics, tiny.images)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    weights = expected.reshape(-1, 2, 3)  # slot k has the N scores from k N on
    if method.mixture == 'softmax':
        weights = np.exp(weights) / np.exp(weights).sum(-1, keepdims=True)
    else:
        weights = 1 / (1 + np.exp(-weights))
    np.testing.assert_allclose(made, weights @ np.asarray(prompts['library']), atol=2e-5)


def test_a_mixture_of_one_vector_is_that_vector_as_a_shallow_prompt(tiny):
    method = Stack(PGN(**SMALL), Linear())
    prompts = tiny.prompts(method)
    chosen = np.array([2, 0])
    bias = np.full((2, 3), -50.0, np.float32)
    bias[[0, 1], chosen] = 50.0
    own = {**prompts['pgn'], 'mix': {'kernel': 0 * prompts['pgn']['mix']['kernel'], 'bias': jnp.asarray(bias.ravel())}}
    library = prompts['pgn']['library'][chosen]
    plain = tiny.logits(Stack(VPT(num_tokens=2), Linear()), {'vpt': {'prompts': library}, 'linear': prompts['linear']})
    np.testing.assert_allclose(tiny.logits(method, {**prompts, 'pgn': own}), plain, atol=1e-5)
    iip = {'iip': {'prompts': library}, 'linear': prompts['linear']}
    np.testing.assert_allclose(tiny.logits(Stack(IIP(num_tokens=2), Linear()), iip), plain, atol=1e-6)


@pytest.mark.parametrize('pre_norm', [True, False])
def test_prompts_go_through_a_norm_before_the_first_block(tiny, pre_norm):
    # As in CLIP's networks: prompts twice as large are the same prompts.
    method = Stack(IIP(num_tokens=2), Linear())
    prompts = tiny.prompts(method)
    params = {**tiny.params, 'pre_norm': {'scale': jnp.ones(16), 'bias': jnp.zeros(16)}}
    model = tiny.model.clone(pre_norm=pre_norm)
    run = jax.jit(lambda p: forward(model, method, params, p, tiny.images)[0], **OPTIONS)
    twice = {**prompts, 'iip': {'prompts': 2 * prompts['iip']['prompts']}}
    assert (np.abs(run(twice) - run(prompts)).max() < 1e-4) == pre_norm


def test_training_normalises_by_the_batch_and_notes_the_unbiased_variance(tiny):
    method = PGN(**SMALL)
    prompts = tiny.prompts(method)
    state = method.init_state(tiny.model)
    _, _, updates = generated(tiny, method, prompts, state, tiny.images, train=True)
    seen = convolved(tiny.images, np.asarray(prompts['cnn']['conv1']['kernel']), 2).reshape(-1, 4)
    held = {kind: updates['kept'] * first + updates['added']['bn1'][kind] for kind, first in (('mean', 0), ('var', 1))}
    np.testing.assert_allclose(held['mean'], 0.1 * seen.mean(0), atol=1e-5)
    np.testing.assert_allclose(held['var'], 0.9 + 0.1 * seen.var(0, ddof=1), rtol=1e-5)


def test_padding_changes_nothing_in_training(tiny):
    method = PGN(**SMALL)
    prompts, state = tiny.prompts(method), method.init_state(tiny.model)
    alone = generated(tiny, method, prompts, state, tiny.images[:3], train=True)
    weight = jnp.array([1.0, 1.0, 1.0, 0.0])
    padded = generated(tiny, method, prompts, state, tiny.images, train=True, weight=weight)
    np.testing.assert_allclose(padded[0][:3], alone[0], atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), padded[2], alone[2])
    assert np.abs(alone[0] - generated(tiny, method, prompts, state, tiny.images, train=True)[0][:3]).max() > 1e-3


def test_images_of_a_batch_are_independent_in_evaluation_only(tiny):
    method = PGN(**SMALL)
    prompts, state = tiny.prompts(method), method.init_state(tiny.model)
    for train in (False, True):
        both, one = (generated(tiny, method, prompts, state, tiny.images[:n], train)[0][0] for n in (2, 1))
        assert (np.abs(both - one).max() < 1e-5) != train


def test_everything_is_trained_and_a_step_lowers_the_loss(tiny):
    method = Stack(PGN(**SMALL), Linear())
    prompts = tiny.init(method)
    model, labels, state = tiny.model, tiny.labels, method.init_state(tiny.model)

    def step(prompts, state):
        def loss(prompts):
            logits, new = forward(model, method, tiny.params, prompts, tiny.images, state=state, train=True)
            return -jax.nn.log_softmax(logits)[jnp.arange(4), labels].mean(), new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(prompts)
        return value, grads, jax.tree.map(lambda p, g: p - 0.02 * g, prompts, grads), new

    step = jax.jit(step, **OPTIONS)
    first, grads, prompts, new = step(prompts, state)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    assert step(prompts, new)[0] < first


@pytest.mark.parametrize(
    ('settings', 'width', 'expected'),
    [
        ({}, 768, 1_032_304),  # these three are the sizes of the released files
        ({'library': 128}, 768, 669_808),
        ({'library': 128}, 384, 620_656),
        ({'cnn': 'resnet18'}, 768, 11_176_512 + 513 * 16 * 256 + 256 * 768),
    ],
    ids=str,
)
def test_number_of_trained_parameters(settings, width, expected):
    method, model = PGN(**settings), SimpleNamespace(width=width, image_size=224)
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), model, {}, CLASSES))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected
    assert not {'mean', 'var'} & {path[-1] for path in flatten_dict(shapes)}


def test_resnet18_is_the_zoos(tiny):
    # Norms in the first step: statistics of the batch, then what was kept of 0 and 1.
    method = PGN(num_tokens=2, library=3, cnn='resnet18')
    shapes = tiny.shapes(method)
    assert shapes['cnn']['layer4_1']['conv2']['kernel'].shape == (3, 3, 512, 512)
    state = jax.eval_shape(lambda: method.init_state(tiny.model))
    assert len(jax.tree.leaves(state)) == 1 + 2 * 20

    def run(prompts, state):
        ctx = Context(state=state, train=True)
        ctx.model = tiny.model
        return method.generate(prompts, tiny.images, ctx), ctx.updates

    made, updates = jax.eval_shape(run, shapes, state)
    assert made.shape == (4, 2, 16)
    assert jax.tree.structure(updates) == jax.tree.structure(state)


def test_resizing_keeps_the_aspect_ratio():
    images = np.random.default_rng(0).normal(size=(2, 15, 20, 3)).astype(np.float32)
    assert resized(images, 9).shape == (2, 9, 12, 3)
    assert resized(images, 15) is images and resized(images, None) is images
    square = images[:, :, :15]
    np.testing.assert_allclose(resized(square, 6), bilinear(square, 6), atol=1e-5)
    assert resized(np.swapaxes(images, 1, 2), 8).shape == (2, 10, 8, 3)  # 10.67 is cut


def test_starts_as_published(tiny):
    method = PGN(num_tokens=16, library=256)
    prompts = tiny.init(method)
    assert np.std(prompts['library']) == pytest.approx(0.02, rel=0.05)
    assert np.abs(prompts['mix']['kernel']).max() == pytest.approx(128**-0.5, rel=0.01)
    kernel = prompts['cnn']['block_3']['conv2']['kernel']
    assert np.std(kernel) == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)  # over the fan-out
    assert np.abs(prompts['cnn']['block_1']['bias']).max() <= 16**-0.5
    assert np.std(tiny.init(IIP(num_tokens=200))['prompts']) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'num_tokens': 0}, 'num_tokens must be >= 1, got 0'),
        ({'library': 0}, 'method pgn: library must be >= 1, got 0'),
        ({'resolution': -1}, 'method pgn: resolution must be >= 1, got -1'),
        ({'mixture': 'softmix'}, "unknown mixture of PGN 'softmix': did you mean 'softmax'"),
        ({'cnn': 'resnet1'}, "unknown CNN of PGN 'resnet1'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        PGN(**settings)
