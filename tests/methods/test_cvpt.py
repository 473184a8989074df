"""CVPT's cross-attention: what follows from its formula, how weights are shared, which blocks it touches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpt_jax.errors import UsageError
from vpt_jax.methods import CVPT, Context, Linear, Stack, forward
from vpt_jax.models.convnext import ConvNeXt
from vpt_jax.models.swin import Swin
from vpt_jax.models.vit import VARIANTS, ViT

PLAIN = {'dropout': 0.0, 'drop_path': 0.0}


def with_head(**settings):
    return Stack(CVPT(**{'num_tokens': 3, **PLAIN, **settings}), Linear())


def crossed(tiny, method, prompts):
    """What the cross-attention of block 1 adds, for the tokens that enter it."""
    seen = {}

    class Watch(CVPT):
        def layer(self, _, block, x, i, ctx):
            if i == 1:
                seen['out'] = method.cross(prompts, block, x, i, ctx)
                seen['weights'] = block.attention.variables['params']
            return block(x)

    tiny.model.apply({'params': tiny.params}, tiny.images, Watch(), None, Context())
    return np.asarray(seen['out']), seen['weights']


def test_one_prompt_adds_the_same_vector_to_every_token(tiny):
    method = CVPT(num_tokens=1, **PLAIN)
    prompts = tiny.prompts(method)
    out, weights = crossed(tiny, method, prompts)
    value = prompts['prompts']['16'][1, 0] @ weights['value']['kernel'].reshape(16, 16)
    value = value + weights['value']['bias'].reshape(16)
    expected = value @ weights['out']['kernel'].reshape(16, 16) + weights['out']['bias']
    np.testing.assert_allclose(out, np.broadcast_to(expected, out.shape), atol=1e-5)


def test_the_key_bias_has_no_gradient_and_everything_else_has(tiny):
    method = with_head(sharing='trained')
    _, grads = tiny.gradient(method, tiny.prompts(method))
    attention = grads['cvpt']['attention']['16']
    np.testing.assert_allclose(attention['key'].pop('bias'), 0.0, atol=1e-7)
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(grads))


def test_a_copy_starts_where_the_frozen_attention_is(tiny):
    frozen, trained = with_head(), with_head(sharing='trained')
    prompts = tiny.init(trained)
    copy = prompts['cvpt']['attention']['16']['query']['kernel'][1]
    own = tiny.params['Transformer']['encoderblock_1']['MultiHeadDotProductAttention_0']['query']['kernel']
    np.testing.assert_array_equal(copy, own)
    shared = {**prompts, 'cvpt': {'prompts': prompts['cvpt']['prompts']}}
    np.testing.assert_allclose(tiny.logits(trained, prompts), tiny.logits(frozen, shared), atol=1e-6)


def test_random_attentions_are_trained_or_carried_as_state(tiny):
    trained, frozen = CVPT(sharing='random'), CVPT(sharing='random_frozen')
    shapes = tiny.shapes(trained)
    state = frozen.init_state(tiny.model)
    assert set(tiny.shapes(frozen)) == {'prompts'}
    expected = jax.tree.map(lambda a: a.shape, shapes['attention'])
    assert jax.tree.map(lambda a: a.shape, state['attention']) == expected
    kernel = np.asarray(state['attention']['16']['query']['kernel'])
    assert not np.allclose(kernel[0], kernel[1])
    scanned, other = (frozen.init_state(tiny.model.clone(scan=True), key=key) for key in (None, jax.random.key(1)))
    np.testing.assert_array_equal(kernel, scanned['attention']['16']['query']['kernel'])
    assert not np.allclose(kernel, other['attention']['16']['query']['kernel'])
    # The state is what is used: other numbers there, other scores.
    method = Stack(frozen, Linear())
    prompts = tiny.prompts(method)

    def scores(state):
        return forward(tiny.model, method, tiny.params, prompts, tiny.images, state={'cvpt': state})[0]

    assert np.abs(scores(state) - scores(jax.tree.map(lambda a: a + 0.1, state))).max() > 1e-3


@pytest.mark.parametrize('settings', [{'layers': (0, 2)}, {'sharing': 'random', 'position': 2}], ids=str)
def test_scan_equals_unrolled_in_training(tiny, settings):
    method = with_head(dropout=0.2, drop_path=0.3, **settings)
    prompts = tiny.prompts(method)
    logits, grads = tiny.gradient(method, prompts, train=True)
    scanned, scanned_grads = tiny.gradient(method, prompts, train=True, scan=True)
    np.testing.assert_allclose(logits, scanned, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-3), grads, scanned_grads)
    assert np.abs(logits - tiny.logits(method, prompts)).max() > 1e-2


def test_drop_path_drops_whole_branches_and_none_in_the_first_block(tiny_at_depth):
    one, three = tiny_at_depth(1), tiny_at_depth(3)
    method = with_head(drop_path=0.9)
    prompts = one.prompts(method)
    np.testing.assert_allclose(one.logits(method, prompts, train=True), one.logits(method, prompts), atol=1e-6)
    # Of the last block, nine in ten of both branches are gone, the rest is ten times as large.
    seen = {}

    class Watch(CVPT):
        def layer(self, prompts, block, x, i, ctx):
            y = super().layer(prompts, block, x, i, ctx)
            seen[i] = (x, y)
            return y

    watch = Stack(Watch(**{'num_tokens': 3, **PLAIN, 'drop_path': 0.9, 'layers': (0,)}), Linear())
    images = jnp.concatenate([three.images] * 16)
    prompts = three.prompts(watch)
    forward(three.model, watch, three.params, prompts, images, train=True, key=jax.random.key(3))
    x, y = seen[2]
    untouched = np.asarray((x == y).all(axis=(1, 2)))
    assert 0.65 < untouched.mean() < 0.95  # 0.81 expected, both branches dropped
    assert not np.asarray((x == y).all(axis=2))[~untouched].any()


def test_prompts_start_small_as_torch_counts_them(tiny):
    prompts = tiny.init(CVPT(num_tokens=5, layers=(0, 2)))['prompts']['16']
    bound = (6 / ((5 + 2) * 16)) ** 0.5
    assert prompts.shape == (2, 5, 16) and 0.9 * bound < np.abs(prompts).max() <= bound
    assert not tiny.init(CVPT(prompt_init='zeros'))['prompts']['16'].any()


@pytest.mark.parametrize(('settings', 'trained'), [({}, 92_160), ({'sharing': 'trained'}, 92_160 + 28_348_416)])
def test_count_on_vit_b16(settings, trained):
    model = ViT(**VARIANTS['B'], patch_size=16)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3))))['params']
    method = CVPT(**settings)
    shapes = jax.eval_shape(lambda p: method.init(jax.random.key(0), model, p, 100), params)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == trained


def test_runs_on_windows_whose_width_grows():
    model = Swin(embed_dim=8, depths=(1, 1), heads=(2, 2), windows=(2, 2), patch_size=4, image_size=16)
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    params = model.init(jax.random.key(0), images)['params']
    method = Stack(CVPT(num_tokens=3, sharing='trained', **PLAIN), Linear())
    method.check(model)
    prompts = method.init(jax.random.key(1), model, params, 4)
    assert {k: v.shape for k, v in prompts['cvpt']['prompts'].items()} == {'8': (1, 3, 8), '16': (1, 3, 16)}

    def loss(prompts):
        return jnp.square(forward(model, method, params, prompts, images)[0]).sum()

    grads = jax.grad(loss)(prompts)['cvpt']['prompts']
    assert all(np.abs(leaf).max() > 0 for leaf in grads.values())


REFUSED = [
    ({'position': 6}, 'position must be 1, 2, 3, 4 or 5, got 6'),
    ({'sharing': 'frozn'}, "unknown sharing of weights in CVPT 'frozn': did you mean 'frozen'"),
    ({'layers': (2, 0)}, r'layers are different block numbers >= 0, ascending, got \(2, 0\)'),
    ({'layers': (0, 0)}, 'ascending'),
    ({'drop_path': 1.0}, r'drop_path must be in \[0, 1\), got 1.0'),
    ({'num_tokens': 0}, 'method cvpt: num_tokens must be >= 1, got 0'),
]


@pytest.mark.parametrize(('settings', 'message'), REFUSED)
def test_refused_at_once(settings, message):
    with pytest.raises(UsageError, match=message):
        CVPT(**settings)


def test_refused_by_the_backbone(tiny):
    with pytest.raises(UsageError, match='layers names block 3, but the backbone has blocks 0 to 2'):
        CVPT(layers=(0, 3)).check(tiny.model)
    with pytest.raises(UsageError, match="needs the 'attention' of every block, which ConvNeXt does not offer"):
        CVPT().check(ConvNeXt(depths=(1, 1), dims=(8, 16)))
