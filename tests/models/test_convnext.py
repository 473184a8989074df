"""ConvNeXt: the depthwise convolution against a naive one, sizes, counts, and methods on a tiny network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from tests.models.staged import apply, assert_methods_learn, count, drawn, traced
from vpt_jax.errors import UsageError
from vpt_jax.methods import VPT, Adapter, ClsToken, Full, Linear, Partial, VPTBelow, VPTPad, with_head
from vpt_jax.models.convnext import VARIANTS, ConvNeXt, ConvNeXtBlock
from vpt_jax.models.places import Places

SMALL = {'depths': (1, 2), 'dims': (4, 8), 'image_size': 16}


def _norm(x, params):
    mean = x.mean(-1, keepdims=True)
    x = (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6)
    return x * params['scale'] + params['bias']


def test_block_is_the_naive_one():
    block = ConvNeXtBlock(3, 'gelu', 1e-6)
    x = np.random.default_rng(0).normal(size=(1, 5, 4, 3)).astype(np.float32)
    params = drawn(block, x, size=0.5)
    with jax.default_matmul_precision('highest'):
        out = apply(block, params, x)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    image, y = x[0].astype(np.float64), np.zeros((5, 4, 3))
    for r, c, a, b in np.ndindex(5, 4, 7, 7):
        if 0 <= r + a - 3 < 5 and 0 <= c + b - 3 < 4:
            y[r, c] += image[r + a - 3, c + b - 3] * p['depthwise']['kernel'][a, b, 0]
    y = _norm(y + p['depthwise']['bias'], p['LayerNorm_0'])
    first, second = p['MlpBlock_0']['Dense_0'], p['MlpBlock_0']['Dense_1']
    y = y @ first['kernel'] + first['bias']
    y = y * 0.5 * (1 + special.erf(y / np.sqrt(2)))
    y = (y @ second['kernel'] + second['bias']) * p['layer_scale']
    np.testing.assert_allclose(out[0], image + y, atol=2e-5)


@pytest.mark.parametrize(
    ('variant', 'parameters'),
    # torchvision and timm print these with a head of 1000 classes.
    [('T', 28_589_128 - 769_000), ('S', 50_223_688 - 769_000), ('B', 88_591_464 - 1_025_000),
     ('L', 197_767_336 - 1_537_000), ('XL', 350_196_968 - 2_049_000)],
)  # fmt: skip
def test_published_sizes(variant, parameters):
    model = ConvNeXt(**VARIANTS[variant])
    assert count(model) == parameters
    assert model.activation_shape(0) == (56, 56, model.dims[0])
    assert model.activation_shape(3) == (28, 28, model.dims[1])
    assert model.activation_shape(model.depth) == (7, 7, model.feature_width) == (7, 7, model.dims[-1])


def test_layers_see_the_maps_that_activation_shape_says():
    model, seen = ConvNeXt(**SMALL), {}

    class Spy(Places):
        def layer(self, prompts, block, x, i, ctx):
            assert ctx.start == i and hasattr(block, 'feed')
            seen[i] = x.shape[1:]
            return block(x)

        def readout(self, prompts, x, pool, ctx):
            seen[model.depth] = x.shape[1:]
            return pool(x)

    assert traced(model, (16, 16), Spy()) == (1, 8)
    assert seen == {i: model.activation_shape(i) for i in range(model.depth + 1)}
    assert seen == {0: (4, 4, 4), 1: (2, 2, 8), 2: (2, 2, 8), 3: (2, 2, 8)}


def test_the_norm_comes_after_the_mean():
    model = ConvNeXt(**SMALL)
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    params = drawn(model, images)

    class Raw(Places):
        def readout(self, prompts, x, pool, ctx):
            return x.mean((1, 2))

    raw = np.asarray(apply(model, params, images, Raw()))
    np.testing.assert_allclose(apply(model, params, images), _norm(raw, params['norm']), atol=1e-5)


def test_remainders_are_dropped():
    model = ConvNeXt(**SMALL)
    images = np.random.default_rng(0).normal(size=(1, 23, 23, 3)).astype(np.float32)
    params = drawn(model, images)
    out = apply(model, params, images)
    # 23 pixels make 5 patches: the last 3 pixels are never seen, while the odd fifth patch is, by convolutions.
    np.testing.assert_array_equal(out, apply(model, params, images[:, :20, :20]))
    assert np.abs(out - apply(model, params, images[:, :16, :16])).max() > 1e-3
    with pytest.raises(UsageError, match='7x7 pixels leave nothing of the last map; this network needs at least 8'):
        traced(model, (7, 7))


def test_settings_that_do_not_belong_together():
    with pytest.raises(UsageError, match='a ConvNeXt needs depths, dims for the same stages'):
        ConvNeXt(depths=(1, 2), dims=(4,))
    with pytest.raises(UsageError, match='activation'):
        ConvNeXt(**SMALL, activation='swish1')
    assert ConvNeXt(depths=[1, 2], dims=[4, 8], image_size=16) == ConvNeXt(**SMALL)


def test_tokens_and_scan_are_not_offered():
    with pytest.raises(UsageError, match="'tokens' of a network, which ConvNeXt does not offer"):
        with_head(VPT()).check(ConvNeXt(**SMALL))
    for method in (Partial(), Adapter(reduction=2), ClsToken(), VPTBelow()):
        with pytest.raises(UsageError, match='backbone'):
            with_head(method).check(ConvNeXt(**SMALL))
    with pytest.raises(TypeError, match='scan'):
        ConvNeXt(**SMALL, scan=True)


@pytest.mark.parametrize('method', [Linear(), with_head(VPTPad(num_pixels=3)), with_head(Full())], ids=str)
def test_methods_learn(method):
    assert_methods_learn(ConvNeXt(**SMALL), method)


def test_without_layer_scale_it_is_all_ones():
    model = ConvNeXt(**SMALL)
    images = np.random.default_rng(0).normal(size=(1, 16, 16, 3)).astype(np.float32)
    params = drawn(model, images)
    bare = {k: {n: v for n, v in p.items() if n != 'layer_scale'} for k, p in params.items()}
    ones = {k: {n: np.ones_like(v) if n == 'layer_scale' else v for n, v in p.items()} for k, p in params.items()}
    out = apply(model.clone(layer_scale=False), bare, images)
    np.testing.assert_allclose(out, apply(model, ones, images), atol=1e-6)


def test_half_precision_stays_close():
    model, images = ConvNeXt(**SMALL), np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    params = drawn(model, images)
    exact = apply(model, params, images)
    half = apply(model.clone(dtype=jnp.bfloat16), params, images)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), exact, atol=0.1)
