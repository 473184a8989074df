"""BEiT against a plain numpy one, and the sizes that the reference's classes have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.conftest import OPTIONS
from tests.models import beit_reference as reference
from vpt_jax.checkpoints import scheme
from vpt_jax.checkpoints.source import ArraySource
from vpt_jax.errors import UsageError
from vpt_jax.methods import VAPT, VPT, Stack, forward
from vpt_jax.models import loading, relative
from vpt_jax.models.beit import BEiT

HEADS, WINDOW, PATCH = 2, (2, 3), 4
SIZES = {'heads': HEADS, 'window_rows': WINDOW[0], 'window_columns': WINDOW[1]}

KINDS = {
    'shared': {'shared': True},
    'block, absolute': {'block': True, 'positions': True},
    'both': {'shared': True, 'block': True},
    'absolute, no biases, no scales': {'positions': True, 'biases': False, 'scales': False},
}


def images_of(rng, window=WINDOW, batch=2):
    return rng.uniform(-1, 1, (batch, window[0] * PATCH, window[1] * PATCH, 3)).astype(np.float32)


def loaded(state, **settings):
    part, ported = scheme.port(ArraySource(state), hints={**SIZES, **settings})
    return loading.build(part, ported, **{**SIZES, **settings})


def applied(model, params, *args, method=None):
    run = jax.jit(lambda params, *args: model.apply({'params': params}, *args, method=method), **OPTIONS)
    return run(params, *args)


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1, np.abs(theirs).max()))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize('kind', KINDS)
def test_masked_prediction(rng, kind):
    state = reference.weights(rng, vocab=7, **KINDS[kind])
    model, params = loaded(state)
    images, mask = images_of(rng), rng.random((2, 6)) < 0.4
    (ours,) = applied(model, params, images, mask, method='masked_logits')
    (theirs,) = reference.masked_logits(state, images, mask, HEADS, WINDOW)
    assert_close(ours, theirs)
    assert not np.allclose(ours, applied(model, params, images, method='masked_logits')[0], atol=1e-3)


@pytest.mark.parametrize(
    ('start', 'own_head', 'scan'), [(1, False, True), (2, True, False), (2, False, True), (3, False, False)]
)
def test_second_branch(rng, start, own_head, scan):
    state = reference.weights(rng, depth=3, vocab=7, shared=True, branch=2, branch_head=own_head)
    model, params = loaded(state, branch_from=start, scan=scan)
    images, mask = images_of(rng), rng.random((2, 6)) < 0.4
    ours = applied(model, params, images, mask, method='masked_logits')
    for a, b in zip(ours, reference.masked_logits(state, images, mask, HEADS, WINDOW, start), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize('kind', ['shared', 'block, absolute', 'both'])
@pytest.mark.parametrize('pooled', [False, True])
def test_classifier_features(rng, kind, pooled):
    state = reference.weights(rng, pooled=pooled, norm=not pooled, **KINDS[kind])
    model, params = loaded(state)
    images = images_of(rng)
    x = reference.blocks(state, reference.embed(state, images), HEADS, WINDOW)[-1]
    theirs = reference.norm(state, 'fc_norm', x[:, 1:].mean(1)) if pooled else reference.norm(state, 'norm', x)[:, 0]
    assert_close(applied(model, params, images), theirs)
    assert model.pool == ('gap' if pooled else 'tok') and model.final_norm is not pooled


@pytest.mark.parametrize(
    ('extra_bias', 'kind', 'scan'),
    [('zero', 'shared', False), ('zero', 'both', True), ('cls', 'block, absolute', True)],
)
def test_prompts_get_the_bias_of_tokens_outside_the_window(rng, extra_bias, kind, scan):
    state = reference.weights(rng, depth=3, **KINDS[kind])
    model, params = loaded(state, extra_bias=extra_bias, scan=scan)
    images, method = images_of(rng), VPT(num_tokens=2, deep=True, deep_layers=2, drop_after=True)
    prompts = {'prompts': rng.normal(size=(2, 16)), 'deep': rng.normal(size=(1, 2, 16))}
    ours = jax.jit(lambda params, p: forward(model, method, params, p, images)[0], **OPTIONS)(params, prompts)

    def with_prompts(x, rows):
        return np.concatenate([x[:, :1], np.broadcast_to(rows, (2, *rows.shape)), x[:, -6:]], axis=1)

    x = with_prompts(reference.embed(state, images), prompts['prompts'])
    for i, rows in enumerate([prompts['prompts'], prompts['deep'][0], np.zeros((0, 16))]):
        x, name = with_prompts(x, rows), f'blocks.{i}'
        x = reference.run_block(state, name, x, HEADS, reference.added(state, name, WINDOW, len(rows), extra_bias))
    assert_close(ours, reference.norm(state, 'norm', x)[:, 0])


def test_methods_of_other_networks_run_unchanged(rng):
    sizes = {'window_rows': 2, 'window_columns': 2}
    model, params = loaded(reference.weights(rng, shared=True, window=(2, 2)), **sizes)
    method = Stack(VAPT(num_tokens=2), VPT(num_tokens=3))
    method.check(model)
    prompts = jax.jit(lambda: method.init(jax.random.key(0), model, params, 3), **OPTIONS)()
    images = jnp.asarray(images_of(rng, (2, 2)))
    run = jax.jit(jax.grad(lambda p: jnp.square(forward(model, method, params, p, images)[0]).sum()), **OPTIONS)
    grads = run(prompts)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert np.abs(grads['vpt']['prompts']).max() > 1e-3 and np.abs(grads['vapt']['prompts']).max() > 1e-3


def test_tokens_of_the_window_cannot_be_dropped(rng):
    bias = relative.RelativeBias(WINDOW, WINDOW, shared=jnp.zeros((relative.table_rows(WINDOW), HEADS)))
    assert bias(7).shape == (1, HEADS, 7, 7) and bias(9).shape == (1, HEADS, 9, 9)
    with pytest.raises(UsageError, match='6 tokens are fewer than CLS and 2x3 patches'):
        bias(6)


@pytest.mark.parametrize('rule', relative.RULES)
def test_other_image_sizes_resample_the_tables(rng, rule):
    window = (3, 3)
    state = reference.weights(rng, window=window, shared=True, positions=True)
    sizes = {'window_rows': 3, 'window_columns': 3, 'relative_rule': rule}
    model, params = loaded(state, **sizes)
    larger, _ = loaded(state, **sizes, image_size=5 * PATCH)
    images = images_of(rng, (5, 5))
    assert model.window == larger.window == (3, 3) and larger.grid(larger.image_size) == (5, 5)
    ours = applied(larger, params, images)
    table = relative.resize_table(params['relative_bias'], window, (5, 5), rule)
    resized = {**state, 'rel_pos_bias.relative_position_bias_table': np.asarray(table)}
    del resized['pos_embed']
    x = reference.embed(resized, images)
    native = applied(larger.clone(posemb='none'), params, images)
    theirs = reference.norm(state, 'norm', reference.blocks(resized, x, HEADS, (5, 5))[-1])[:, 0]
    assert_close(native, theirs)
    assert not np.allclose(ours, native, atol=1e-3)


def test_near_distances_keep_their_bias_and_cls_rows_are_copied():
    table = np.arange(52.0)[:, None]
    grown = np.asarray(relative.resize_table(jnp.asarray(table), (4, 4), (6, 6), 'geometric_cubic'))
    np.testing.assert_array_equal(grown[-3:], table[-3:])
    old, new = table[:-3].reshape(7, 7), grown[:-3].reshape(11, 11)
    np.testing.assert_allclose(new[4:7, 4:7], old[2:5, 2:5], atol=1e-4)
    np.testing.assert_allclose(relative.distance_matrix(4, 6, 'geometric_linear').sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ('settings', 'count'),
    [
        ({'vocab': 8192, 'mask_token': True, 'branch_from': 9}, 106_143_056),
        ({'relative': 'block', 'final_norm': False, 'fc_norm': True, 'pool': 'gap'}, 86_530_984 - 769_000),
    ],
)
def test_parameters_of_the_base_size(settings, count):
    model = BEiT(
        width=768, depth=12, mlp_dim=3072, heads=12, patch_size=16, posemb='none', layer_scale=True, **settings
    )
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3))))['params']
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'relative': 'sharde'}, "did you mean 'shared'"),
        ({'extra_bias': 'none'}, "unknown bias for inserted tokens 'none'"),
        ({'relative_rule': 'geometric'}, 'did you mean'),
        ({'registers': 2}, 'not 3'),
        ({'branch_from': 3}, 'no block of a network of 2'),
        ({'branch_from': 1}, 'vocab > 0'),
        ({'vocab': 5, 'final_norm': False}, 'needs final_norm=True'),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UsageError, match=message):
        BEiT(width=16, depth=2, mlp_dim=32, heads=2, patch_size=4, image_size=8, **settings)
