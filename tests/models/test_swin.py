"""Swin: windows against a naive reference, sizes, counts, and methods on a network of two stages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from tests.models.staged import apply, assert_methods_learn, count, drawn, traced
from vpt_jax.errors import UsageError
from vpt_jax.methods import VPT, Adapter, ClsToken, Full, Linear, Partial, VPTBelow, VPTPad, with_head
from vpt_jax.models.places import Places
from vpt_jax.models.swin import VARIANTS, PatchMerging, Swin, SwinBlock

SMALL = {'embed_dim': 8, 'depths': (2, 1), 'heads': (2, 4), 'windows': (2, 2), 'patch_size': 2, 'image_size': 8,
         'mlp_ratio': 2.0}  # fmt: skip


def _naive_attend(params, x, window, shift, heads):
    """The attention branch position by position: who may see whom, and at what distance, by the definition."""
    mean = x.mean(-1, keepdims=True)
    norm = params['LayerNorm_0']
    x = (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5) * norm['scale'] + norm['bias']
    size = x.shape[0]
    full = -(-size // window) * window
    frame = np.zeros((full, full, x.shape[-1]))
    for r in range(size):
        for c in range(size):
            frame[r, c] = x[(r + shift) % size, (c + shift) % size]
    parts = params['MultiHeadDotProductAttention_0']
    q, k, v = (np.einsum('rcd,dhk->rchk', frame, parts[n]['kernel']) + parts[n]['bias']
               for n in ('query', 'key', 'value'))  # fmt: skip
    table = params['relative_bias'].reshape(2 * window - 1, 2 * window - 1, heads)

    def region(at):
        return 0 if at < full - window else 1 if at < full - shift else 2

    out = np.zeros_like(x)
    for r in range(size):
        for c in range(size):
            seen = [
                (a, b)
                for a in range(full) for b in range(full)
                if (a // window, b // window) == (r // window, c // window)
                and (not shift or (region(a), region(b)) == (region(r), region(c)))
            ]  # fmt: skip
            for h in range(heads):
                scores = [q[r, c, h] @ k[a, b, h] / np.sqrt(q.shape[-1])
                          + table[r - a + window - 1, c - b + window - 1, h] for a, b in seen]  # fmt: skip
                weights = special.softmax(scores)
                mixed = sum(w * v[a, b, h] for w, (a, b) in zip(weights, seen, strict=True))
                out[(r + shift) % size, (c + shift) % size] += mixed @ parts['out']['kernel'][h]
    return out + parts['out']['bias']


@pytest.mark.parametrize(
    ('size', 'window', 'shifted', 'shift'),
    [(4, 2, False, 0), (4, 2, True, 1), (6, 3, True, 1), (8, 4, True, 2), (3, 3, True, 0), (5, 3, True, 1),
     (5, 3, False, 0)],
)  # fmt: skip
def test_window_attention_is_the_naive_one(size, window, shifted, shift):
    block = SwinBlock(2, 8, window, shifted, 'gelu', 1e-5)
    x = np.random.default_rng(0).normal(size=(2, size, size, 4)).astype(np.float32)
    params = drawn(block, x, size=1.0)
    with jax.default_matmul_precision('highest'):
        out = apply(block, params, x, method='attend')
    numpy = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    for ours, image in zip(out, x, strict=True):
        np.testing.assert_allclose(ours, _naive_attend(numpy, image.astype(np.float64), window, shift, 2), atol=2e-5)


def test_merging_puts_rows_before_columns():
    x = np.arange(16.0, dtype=np.float32).reshape(1, 4, 4, 1)
    params = {'LayerNorm_0': {'scale': np.ones(4), 'bias': np.zeros(4)}, 'reduction': {'kernel': np.eye(4)[:, :2]}}
    out = apply(PatchMerging(1e-5), params, x)
    # Of the normalised (0,0), (1,0), (0,1), (1,1) the first two: 0 and 4 of 0, 4, 1, 5.
    expected = (np.array([0.0, 4.0]) - 2.5) / np.sqrt(4.25 + 1e-5)
    np.testing.assert_allclose(out[0, 0, 0], expected, atol=1e-6)
    assert out.shape == (1, 2, 2, 2)


@pytest.mark.parametrize(
    ('variant', 'parameters'),
    # torchvision and timm print these with a head of 1000 classes.
    [('T', 28_288_354 - 769_000), ('B', 87_768_224 - 1_025_000), ('L', 196_532_476 - 1_537_000)],
)
def test_published_sizes(variant, parameters):
    model = Swin(**VARIANTS[variant])
    assert count(model) == parameters
    assert model.feature_width == VARIANTS[variant]['embed_dim'] * 8
    assert model.activation_shape(0) == (56, 56, VARIANTS[variant]['embed_dim'])
    assert model.activation_shape(4) == (14, 14, VARIANTS[variant]['embed_dim'] * 4)
    assert model.activation_shape(model.depth) == (7, 7, model.feature_width)


def test_layers_see_the_maps_that_activation_shape_says():
    model, seen = Swin(**SMALL), {}

    class Spy(Places):
        def layer(self, prompts, block, x, i, ctx):
            assert ctx.start == i and hasattr(block, 'attend') and hasattr(block, 'feed')
            seen[i] = x.shape[1:]
            return block(x)

        def readout(self, prompts, x, pool, ctx):
            seen[model.depth] = x.shape[1:]
            return pool(x)

    assert traced(model, (8, 8), Spy()) == (1, 16)
    assert seen == {i: model.activation_shape(i) for i in range(model.depth + 1)}
    assert seen == {0: (4, 4, 8), 1: (4, 4, 8), 2: (2, 2, 16), 3: (2, 2, 16)}


def test_larger_images_run_where_the_maps_are_whole_windows():
    model = Swin(**SMALL)
    padding = model.clone(pad_windows=True)
    assert traced(model, (8, 16)) == traced(padding, (12, 12)) == (1, 16)
    for network, side, message in (
        (
            model,
            12,
            r'12x12 pixels make a map of 3x3 in stage 1, which is not whole windows of 2x2; multiples of 8',
        ),
        (padding, 10, r'10x10 pixels make a map of 5x5 in stage 0, which cannot be halved'),
        (padding, 4, r'4x4 pixels make a map of 1x1 in stage 1, which is not whole windows'),
    ):
        with pytest.raises(UsageError, match=message):
            traced(network, (side, side))


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'heads': (2,)}, 'a Swin needs depths, heads, windows for the same stages'),
        ({'depths': (2, 0)}, 'for the same stages'),
        ({'heads': (2, 3)}, '16 channels of stage 1 are not divisible by 3 heads'),
        ({'activation': 'relu6'}, 'activation'),
    ],
)
def test_settings_that_do_not_belong_together(settings, message):
    with pytest.raises(UsageError, match=message):
        Swin(**SMALL | settings)


def test_tokens_and_scan_are_not_offered():
    with pytest.raises(UsageError, match="'tokens' of a network, which Swin does not offer"):
        with_head(VPT()).check(Swin(**SMALL))
    for method in (Partial(), Adapter(reduction=2), ClsToken(), VPTBelow()):
        with pytest.raises(UsageError, match='backbone'):
            with_head(method).check(Swin(**SMALL))
    with pytest.raises(TypeError, match='scan'):
        Swin(**SMALL, scan=True)


def test_settings_may_come_as_lists():
    assert Swin(**SMALL | {'depths': [2, 1], 'windows': [2, 2]}) == Swin(**SMALL)


@pytest.mark.parametrize('method', [Linear(), with_head(VPTPad(num_pixels=4)), with_head(Full())], ids=str)
def test_methods_learn(method):
    assert_methods_learn(Swin(**SMALL), method)


def test_half_precision_stays_close():
    model, images = Swin(**SMALL), np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    params = drawn(model, images)
    exact = apply(model, params, images)
    half = apply(model.clone(dtype=jnp.bfloat16), params, images)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), exact, atol=0.1)
