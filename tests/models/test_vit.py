"""The settings of the ViT, one by one, on networks so small that they need no compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.networks import drawn
from vpt_jax.errors import UsageError
from vpt_jax.models.places import UNCHANGED, Places
from vpt_jax.models.transformer import ACTIVATIONS, Mlp, attention, stack_blocks, unstack_blocks
from vpt_jax.models.vit import VARIANTS, ViT

SMALL = {'width': 8, 'depth': 1, 'mlp_dim': 12, 'heads': 2, 'patch_size': 4, 'image_size': 8}
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


def _params(model, images=IMAGES, seed=0):
    """Parameters that are not special; drawing them compiles nothing."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.asarray(images)))['params']
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize(
    ('settings', 'shape', 'has'),
    [
        ({}, (2, 8), {'cls', 'pos_embedding', 'embedding/bias', 'Transformer/encoder_norm/scale'}),
        ({'pool': 'gap', 'cls_token': False, 'posemb_prefix': 0}, (2, 8), set()),
        ({'pool': '0', 'cls_token': False, 'posemb_prefix': 0}, (2, 8), set()),
        ({'pool': 'none'}, (2, 5, 8), set()),
        ({'pool': 'map'}, (2, 8), {'MAPHead_0/probe'}),
        ({'dist_token': True, 'posemb_prefix': 2}, (2, 8), {'dist'}),
        ({'registers': 3, 'pool': 'none'}, (2, 8, 8), {'registers'}),
        ({'layer_scale': True}, (2, 8), {'Transformer/encoderblock_0/layer_scale_1'}),
        ({'pre_logits': 6}, (2, 6), {'pre_logits/kernel'}),
        ({'posemb': 'sincos2d', 'posemb_prefix': 0}, (2, 8), set()),
        ({'posemb': 'none'}, (2, 8), set()),
        ({'activation': 'quick_gelu', 'pre_norm': True, 'patch_bias': False}, (2, 8), {'pre_norm/scale'}),
        ({'final_norm': False, 'fc_norm': True, 'pool': 'gap'}, (2, 8), {'fc_norm/scale'}),
        ({'pool': 'tok_gap', 'registers': 2}, (2, 16), set()),
        ({'projection': 6}, (2, 6), {'proj/kernel'}),
        ({'pre_logits': 6, 'projection': 4}, (2, 4), {'pre_logits/kernel', 'proj/kernel'}),
        ({'activation': 'swiglu'}, (2, 8), {'Transformer/encoderblock_0/MlpBlock_0/gate/kernel'}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_settings_build_and_run(settings, shape, has):
    model = ViT(**SMALL | settings)
    params = _params(model)
    names = {'/'.join(path) for path in flatten_dict(params)}
    assert has <= names
    assert ('cls' in names) == model.cls_token
    assert ('pos_embedding' in names) == (model.posemb == 'learn')
    assert ('embedding/bias' in names) == model.patch_bias
    assert ('Transformer/encoder_norm/scale' in names) == model.final_norm
    # Running it once: what takes the time is LLVM.
    run = jax.jit(
        lambda params: model.apply({'params': params}, IMAGES), compiler_options={'xla_backend_optimization_level': 0}
    )
    out = np.asarray(run(params))
    assert out.shape == shape and out.shape[-1] == model.feature_width and np.isfinite(out).all()


def test_pooling_variants_read_the_same_tokens():
    every = ViT(**SMALL, pool='none', registers=1)
    params = _params(every)
    tokens = every.apply({'params': params}, IMAGES)
    for pool, expected in (('tok', tokens[:, 0]), ('0', tokens[:, 0]), ('gap', tokens[:, 2:].mean(1))):
        out = every.clone(pool=pool).apply({'params': params}, IMAGES)
        np.testing.assert_allclose(out, expected, atol=1e-6)


def test_cls_and_mean_of_patches_side_by_side():
    model = ViT(**SMALL, pool='tok_gap', registers=1)
    params = _params(model)
    tokens = model.clone(pool='none').apply({'params': params}, IMAGES)
    expected = np.concatenate([tokens[:, 0], tokens[:, 2:].mean(1)], axis=1)
    np.testing.assert_allclose(model.apply({'params': params}, IMAGES), expected, atol=1e-6)


def test_projection_is_linear_and_last():
    model = ViT(**SMALL, projection=3)
    params = _params(model)
    plain = model.clone(projection=0).apply({'params': params}, IMAGES)
    np.testing.assert_allclose(model.apply({'params': params}, IMAGES), plain @ params['proj']['kernel'], atol=1e-5)


@pytest.mark.parametrize('fc_norm', [True, 'new', 'norm'])
def test_norm_of_pooled_features_comes_after_a_methods_readout(fc_norm):
    class First(Places):
        def readout(self, prompts, x, pool, ctx):
            return x[:, 1]

    model = ViT(**SMALL, pool='gap', final_norm=False, fc_norm=fc_norm)
    params = _params(model)
    tokens = model.clone(pool='none', fc_norm=False).apply({'params': params}, IMAGES)
    for out, x in ((model.apply({'params': params}, IMAGES), tokens[:, 1:].mean(1)),
                   (model.apply({'params': params}, IMAGES, First()), tokens[:, 1])):  # fmt: skip
        unit = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + model.ln_eps)
        np.testing.assert_allclose(out, unit * params['fc_norm']['scale'] + params['fc_norm']['bias'], atol=1e-4)


def test_gated_mlp():
    mlp = Mlp(6, 'swiglu')
    x = np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32)
    params = mlp.init(jax.random.key(0), x)['params']
    gate, up, down = (params[name]['kernel'] for name in ('gate', 'Dense_0', 'Dense_1'))
    hidden = x @ gate
    np.testing.assert_allclose(
        mlp.apply({'params': params}, x), (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down, atol=1e-5
    )


def test_registers_with_positions():
    model = ViT(**SMALL, registers=2, posemb_prefix=3)
    params = _params(model)
    x = model.apply({'params': params}, IMAGES, method='embed')
    expected = np.concatenate([params['cls'], params['registers']], 1) + params['pos_embedding'][:, :3]
    np.testing.assert_allclose(x[:1, :3], expected, atol=1e-6)


def test_dist_token_is_averaged_with_cls():
    model = ViT(**SMALL, dist_token=True, posemb_prefix=2)
    params = _params(model)
    tokens = model.clone(pool='none').apply({'params': params}, IMAGES)
    np.testing.assert_allclose(model.apply({'params': params}, IMAGES), tokens[:, :2].mean(1), atol=1e-6)


def test_prefix_tokens_come_first_and_registers_have_no_position():
    model = ViT(**SMALL, dist_token=True, registers=2, posemb_prefix=2)
    params = _params(model)
    x = model.apply({'params': params}, IMAGES, method='embed')
    assert model.prefix == 4 and x.shape == (2, 8, 8)
    expected = np.concatenate([params['cls'], params['dist']], 1) + params['pos_embedding'][:, :2]
    np.testing.assert_allclose(x[:1, :2], expected, atol=1e-6)
    np.testing.assert_allclose(x[1:, 2:4], params['registers'], atol=1e-6)


def test_other_image_sizes_resample_positions():
    model = ViT(**SMALL)
    params = _params(model)
    large = model.apply({'params': params}, np.zeros((1, 12, 16, 3), np.float32), method='embed')
    assert large.shape == (1, 1 + 3 * 4, 8)
    corners = np.asarray(large[0, 1:] - params['embedding']['bias']).reshape(3, 4, 8)[[0, 0, -1, -1], [0, -1, 0, -1]]
    np.testing.assert_allclose(corners, params['pos_embedding'][0, 1:], atol=1e-5)


def test_a_method_sees_the_places_in_order():
    seen = []

    class Spy(Places):
        def tokens(self, prompts, x, ctx):
            seen.append(('tokens', x.shape, ctx.prefix, ctx.num_patches))
            return x

        def layer(self, prompts, block, x, i, ctx):
            seen.append(('layer', i))
            np.testing.assert_allclose(x + block.attend(x), (y := x + block.attention(block.norm1(x))), atol=1e-6)
            np.testing.assert_allclose(block(x), y + block.feed(y), atol=1e-5)
            return block(x)

        def readout(self, prompts, x, pool, ctx):
            seen.append(('readout', x.shape))
            return pool(x)

    model = ViT(**SMALL | {'depth': 2})
    model.apply({'params': _params(model)}, IMAGES, Spy())
    assert seen == [('tokens', (2, 5, 8), 1, 4), ('layer', 0), ('layer', 1), ('readout', (2, 5, 8))]


def test_blocks_are_stacked_and_unstacked():
    model = ViT(**SMALL | {'depth': 3})
    params = _params(model)
    stacked = stack_blocks(params)
    assert stacked['Transformer']['encoderblock']['LayerNorm_0']['scale'].shape == (3, 8)
    assert jax.tree.map(np.shape, stacked) == jax.tree.map(np.shape, _params(model.clone(scan=True)))
    for old, new in zip(*map(jax.tree.leaves, (params, unstack_blocks(stacked))), strict=True):
        np.testing.assert_array_equal(old, new)
    scanned = model.clone(scan=True)
    assert scanned.canonical(scanned.stored(params)).keys() == params.keys() and model.stored(params) is params


def test_attention_is_softmax_attention():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 2, 4)).astype(np.float32) for n in (3, 5, 5))
    scores = np.einsum('bthd,bshd->bhts', q, k) / 2
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(attention(q, k, v), np.einsum('bhts,bshd->bthd', weights, v), atol=1e-5)


def test_activations():
    x = np.linspace(-3, 3, 13, dtype=np.float32)
    np.testing.assert_allclose(ACTIVATIONS['gelu'](x), x * jax.scipy.stats.norm.cdf(x), atol=1e-6)
    np.testing.assert_allclose(ACTIVATIONS['quick_gelu'](x), x / (1 + np.exp(-1.702 * x)), atol=1e-6)
    difference = np.abs(ACTIVATIONS['gelu'](x) - ACTIVATIONS['gelu_tanh'](x)).max()
    assert 1e-5 < difference < 1e-3


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'pool': 'token'}, "unknown pooling 'token': did you mean 'tok'"),
        ({'activation': 'relu'}, "unknown activation 'relu'"),
        ({'posemb': 'learned'}, "unknown position embedding 'learned': did you mean 'learn'"),
        ({'posemb_rule': 'corners'}, "'corners': did you mean 'corner'"),
        ({'heads': 3}, 'the width 8 is not divisible by 3 heads'),
        ({'cls_token': False}, "pool='tok' needs cls_token=True"),
        ({'pool': 'tok_gap', 'cls_token': False}, "pool='tok_gap' needs cls_token=True"),
        ({'pool': 'tok_gap', 'projection': 3}, "pool='tok_gap' excludes layers after pooling"),
        ({'fc_norm': 'old'}, "fc_norm must be True, False, 'new' or 'norm', got 'old'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        ViT(**SMALL | settings)


def test_images_smaller_than_a_patch():
    model = ViT(**VARIANTS['Ti'], patch_size=16)
    assert model.grid(224) == (14, 14) and model.grid(40, 20) == (2, 1)
    with pytest.raises(UsageError, match='8x8 pixels is smaller than one patch of 16 pixels'):
        model.grid(8)


class _Whole(Places):
    """Changes nothing, but could."""

    def readout(self, prompts, x, pool, ctx):
        return pool(x)


@pytest.mark.parametrize('settings', [{}, {'dist_token': True, 'posemb_prefix': 2}, {'pool': '0'}])
def test_the_last_block_computes_what_is_read(settings):
    model = ViT(width=16, depth=2, mlp_dim=32, heads=2, patch_size=4, image_size=16, **settings)
    params, images = drawn(model), np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)

    def compiled(method):
        return jax.jit(lambda p: model.apply({'params': p}, images, method)).lower(params).compile()

    short, whole = compiled(UNCHANGED), compiled(_Whole())
    np.testing.assert_allclose(short(params), whole(params), atol=1e-5)
    assert short.cost_analysis()['flops'] < 0.75 * whole.cost_analysis()['flops']
