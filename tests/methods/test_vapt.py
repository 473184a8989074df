"""VAPT's adaptive prompts against a literal transcription of their formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from vpt_jax.methods import VAPT, VPT, Context, Linear, Stack

WIDTH, GRID = 8, (3, 5)


def _context(tiny, **settings):
    ctx = Context(**settings)
    ctx.model, ctx.images = tiny.model, np.zeros((2, 4 * GRID[0], 4 * GRID[1], 3))
    return ctx


def _prompts(method, seed=0):
    """Prompts of one adaptive block for a grid that is not square."""
    rng = np.random.default_rng(seed)
    rows, columns = method._map(GRID)
    shape = (1, method.kernel, method.kernel) + ((WIDTH,) if method.depthwise else ())
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    scale = {'scale': draw(1)} if method.learnable_scale else {}
    return scale | {
        'norm': {'scale': draw(1, WIDTH), 'bias': draw(1, WIDTH)},
        'conv': {'kernel': draw(*shape)},
        'mix': {'kernel': draw(1, rows * columns, method.num_tokens), 'bias': draw(1, method.num_tokens)},
        'proj': {'down': draw(WIDTH, method.hidden), 'up': draw(method.hidden, WIDTH)},
    }


def _literally(method, prompts, x):
    """LayerNorm, depthwise cross-correlation, linear map over positions, bottleneck with a skip."""
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    x = (x - mean) / np.sqrt(var + 1e-5) * prompts['norm']['scale'][0] + prompts['norm']['bias'][0]
    maps = x.transpose(0, 2, 1)
    if method.conv:
        kernel = prompts['conv']['kernel'][0]
        kernel = kernel[..., None] if kernel.ndim == 2 else kernel
        kernel = np.broadcast_to(kernel, (method.kernel, method.kernel, WIDTH)).transpose(2, 0, 1)[:, None]
        pad = [(method.padding, method.padding)] * 2
        maps = lax.conv_general_dilated(maps.reshape(-1, WIDTH, *GRID), kernel, (1, 1), pad, feature_group_count=WIDTH,
                                        precision='highest')  # fmt: skip
    maps = np.asarray(maps).reshape(len(x), WIDTH, -1)
    q = (maps @ prompts['mix']['kernel'][0] + prompts['mix']['bias'][0]).transpose(0, 2, 1)
    if not method.projector:
        return q
    act = {'relu': lambda h: np.maximum(h, 0), 'identity': lambda h: h}[method.activation]
    scale = prompts['scale'] if method.learnable_scale else 1.0
    return act(q @ prompts['proj']['down']) @ prompts['proj']['up'] * scale + q


@pytest.mark.parametrize(
    'settings',
    [
        {},
        {'kernel': 3},
        {'kernel': 1, 'padding': 2, 'activation': 'identity'},
        {'kernel': 3, 'padding': 1, 'learnable_scale': True},
        {'depthwise': True},
        {'depthwise': True, 'kernel': 3, 'padding': 2, 'projector': False},
        {'conv': False},
    ],
    ids=str,
)
def test_equals_the_formula(tiny, settings):
    method = VAPT(num_tokens=3, hidden=4, **settings)
    prompts = _prompts(method)
    x = np.random.default_rng(1).normal(size=(2, GRID[0] * GRID[1], WIDTH)).astype(np.float32)
    with jax.default_matmul_precision('highest'):
        ours = method.adaptive_prompts(prompts, x, 0, _context(tiny))
    np.testing.assert_allclose(ours, _literally(method, prompts, x), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize('depthwise', [False, True])
def test_map_dropout_drops_whole_channels_before_the_bias(tiny, depthwise):
    method = VAPT(num_tokens=3, projector=False, map_dropout=0.25, depthwise=depthwise)
    prompts = _prompts(method)
    x = np.random.default_rng(1).normal(size=(256, GRID[0] * GRID[1], WIDTH)).astype(np.float32)
    key = jax.random.key(0)
    trained = method.adaptive_prompts(prompts, x, 0, _context(tiny, train=True, key=key))
    bias = prompts['mix']['bias'][0][:, None]
    kept, plain = trained - bias, method.adaptive_prompts(prompts, x, 0, _context(tiny)) - bias
    dropped = np.asarray(jnp.abs(kept) < 1e-6)
    assert (dropped == dropped[:, :1]).all()  # the whole (image, channel) map, for every prompt
    assert abs(dropped[:, 0].mean() - 0.25) < 0.04
    np.testing.assert_allclose(np.where(dropped, 0, plain / 0.75), np.where(dropped, 0, kept), atol=1e-4, rtol=1e-4)


def test_starts_as_deep_prompts_of_zeros(tiny):
    vapt, deep = Stack(VAPT(num_tokens=2), Linear()), Stack(VPT(num_tokens=2, deep=True), Linear())
    prompts = tiny.init(vapt)
    zeros = {'prompts': prompts['vapt']['prompts'], 'deep': jnp.zeros((2, 2, 16))}
    expected = tiny.logits(deep, {'vpt': zeros, 'linear': prompts['linear']})
    np.testing.assert_allclose(tiny.logits(vapt, prompts), expected, atol=1e-6)


def test_prompts_depend_on_the_image_only_from_the_first_adaptive_block(tiny):
    # With as many static layers as blocks, nothing adapts, and nothing of the generator is allocated.
    method = VAPT(num_tokens=2, static_layers=3)
    assert set(tiny.shapes(method)) == {'prompts', 'deep'}
    prompts = tiny.prompts(Stack(method, Linear()))
    expected = tiny.logits(Stack(VPT(num_tokens=2, deep=True), Linear()), {**prompts, 'vpt': prompts['vapt']})
    np.testing.assert_allclose(tiny.logits(Stack(method, Linear()), prompts), expected, atol=1e-6)


def test_an_unshared_projector_has_its_own_scale(tiny):
    shapes = tiny.shapes(VAPT(shared_projector=False, learnable_scale=True))
    assert shapes['scale'].shape == (2, 1) and shapes['proj']['down'].shape == (2, 16, 8)
    assert tiny.shapes(VAPT(learnable_scale=True))['scale'].shape == (1,)
